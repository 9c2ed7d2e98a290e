//! How many machines, and how fast: the whole answer, in figures and in sentences.
use capstan_gguf::{Model, ModelProfile};
use capstan_proto::{LayerRange, limits};
use serde::Serialize;

use crate::arrange::{Arrangement, Hops, Kind, Objective, Problem, arrange, fewest};
use crate::cost::{Need, Sizes};
use crate::forecast::{Forecast, Pipeline, Placed, Wiring};
use crate::human_bytes;
use crate::links::{Link, Links};
use crate::machines::{MACHINES_MAX, Machine};
use crate::models::KnownModel;
use crate::quant::Quantisation;
use crate::timing::{Batch, Times, hidden_bytes, hop_s};

/// Depth for which layers are dealt out: a conversation of some length.
const TYPICAL_DEPTH_TOKENS: u64 = 4096;
/// Prompt by which prefill is compared.
const TYPICAL_PROMPT_TOKENS: u32 = 2048;
/// How much faster the link is in "what a faster link would bring".
const FASTER_LINK: f64 = 10.0;
/// Contexts are tried in steps of this: llama.cpp rounds up to it.
const CTX_STEP: u32 = 256;

/// A model to plan for.
pub struct Subject<'a> {
    /// Its name for people.
    pub name: String,
    /// Its numbers.
    pub profile: ModelProfile,
    /// Why a window may not be a stage; none when it may.
    pub window_problem: Box<dyn Fn(LayerRange) -> Option<String> + 'a>,
    /// Where its numbers are from.
    pub sources: Vec<String>,
}

impl Subject<'static> {
    /// A model of the catalogue in one of its quantisations.
    pub fn known(model: &KnownModel, quantisation: &Quantisation) -> Self {
        let windows = model.shape.windows();
        Self {
            name: format!("{} {}", model.name, quantisation.name),
            profile: model.shape.profile(model.name, quantisation),
            window_problem: Box::new(move |range| windows.problem(range)),
            sources: vec![model.source.to_owned(), quantisation.source.to_owned()],
        }
    }
}

impl<'a> Subject<'a> {
    /// A model whose headers were read.
    pub fn read(model: &'a Model) -> Self {
        let file = model.files().first().map(|f| f.display().to_string()).unwrap_or_default();
        Self {
            name: model.name().unwrap_or("the model").to_owned(),
            profile: model.profile(),
            window_problem: Box::new(|range| model.window_problem(range)),
            sources: vec![file],
        }
    }
}

/// What is asked.
#[derive(Clone, Copy)]
pub struct Question<'a> {
    /// The model.
    pub subject: &'a Subject<'a>,
    /// The machines.
    pub machines: &'a [Machine],
    /// What connects them.
    pub links: &'a Links,
    /// Tokens a slot holds.
    pub ctx: u32,
    /// Sequences at once.
    pub slots: u32,
    /// Most rows of a micro-batch.
    pub ubatch: u32,
    /// Memory that is kept free on each machine, in bytes.
    pub headroom_bytes: u64,
    /// What is wanted.
    pub objective: Objective,
}

/// Why there is no placement.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum Unfit {
    /// No machines, or too many.
    #[error("{0} machines were named; name 1 to {MACHINES_MAX}")]
    Machines(usize),
    /// Not a model.
    #[error("the model has {0} layers; 1 to {max} can be placed", max = limits::LAYERS_MAX)]
    Layers(usize),
    /// Nothing to serve.
    #[error("a context of {ctx} tokens for {slots} slots cannot be planned for; ask for at least one of each")]
    Nothing {
        /// Tokens a slot holds.
        ctx: u32,
        /// Slots.
        slots: u32,
    },
    /// Too little memory.
    #[error("{}", .0.join(" "))]
    Memory(Vec<String>),
}

/// The answer.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Answer {
    /// The model.
    pub model: String,
    /// Layers of each stage in pipeline order, and the place of its machine in the list.
    pub stages: Vec<(usize, String)>,
    /// What Capstan would do.
    pub forecast: Forecast,
    /// What llama.cpp's RPC would do with the same machines and layers.
    pub plain_rpc: Forecast,
    /// The fewest of these machines that can hold the model.
    pub fewest: usize,
    /// The longest context of a slot that these machines can hold, in tokens.
    pub ctx_max: u32,
    /// Tokens per second of one sequence by number of machines, where all are alike; one more than there are comes last.
    pub by_machines: Vec<(usize, f64)>,
    /// Whether nothing better exists.
    pub exact: bool,
    /// In sentences.
    pub explanation: Vec<String>,
}

/// Answers.
pub fn answer(question: &Question) -> Result<Answer, Unfit> {
    let n = question.subject.profile.layers.len();
    if question.machines.is_empty() || question.machines.len() > MACHINES_MAX {
        return Err(Unfit::Machines(question.machines.len()));
    }
    if n == 0 || n > limits::LAYERS_MAX as usize {
        return Err(Unfit::Layers(n));
    }
    if question.ctx == 0 || question.slots == 0 || question.ubatch == 0 {
        return Err(Unfit::Nothing { ctx: question.ctx, slots: question.slots });
    }
    let desk = Desk::new(question);
    let keep =
        |m: &Machine| Machine { usable_bytes: m.usable_bytes.saturating_sub(question.headroom_bytes), ..m.clone() };
    let fleet = Fleet::of(&question.machines.iter().map(keep).collect::<Vec<_>>(), question.links);
    let found = desk.arrange(&fleet).ok_or_else(|| Unfit::Memory(desk.why_not(&fleet)))?;
    let placed = desk.place(&fleet, &found);
    let ring = fleet.ring(&found);
    let pipeline = Pipeline { profile: desk.profile(), stages: &placed, ring: &ring };
    let of = |wiring| pipeline.forecast(wiring, question.ctx, question.slots, question.ubatch);
    let fewest = desk.fewest(&fleet).unwrap_or(found.stages.len());
    let by_machines = desk.by_machines(&fleet, fewest);
    Ok(Answer {
        model: question.subject.name.clone(),
        stages: fleet.named(&found),
        forecast: of(Wiring::Capstan),
        plain_rpc: of(Wiring::PlainRpc),
        fewest,
        ctx_max: desk.ctx_max(&fleet),
        exact: found.exact,
        explanation: desk.explain(&fleet, &found, &pipeline, fewest),
        by_machines,
    })
}

/// The fewest machines of the first kind in the list with which one sequence reaches so many tokens per second, and how
/// many it then reaches; none when no number of them does.
pub fn machines_for(question: &Question, tokens_per_s: f64) -> Option<(usize, f64)> {
    let machine = question.machines.first()?;
    let desk = Desk::new(question);
    let links = Links::all(question.links.usual);
    let speed = |n: usize| Some((n, desk.speed(&Fleet::of(&vec![machine.clone(); n], &links))?));
    (1..=MACHINES_MAX).filter_map(speed).find(|(_, reached)| *reached >= tokens_per_s)
}

/// Machines grouped into kinds that nothing tells apart, links included.
#[derive(Clone)]
struct Fleet {
    machines: Vec<Machine>,
    /// Of each kind, the places of its machines in the list.
    members: Vec<Vec<usize>>,
    links: Links,
}

impl Fleet {
    fn of(machines: &[Machine], links: &Links) -> Self {
        let same_links = |a: usize, b: usize| {
            (0..machines.len()).filter(|&c| c != a && c != b).all(|c| links.between(a, c) == links.between(b, c))
        };
        let alike = |a: usize, b: usize| machines[a] == machines[b] && (links.between.is_empty() || same_links(a, b));
        let mut members: Vec<Vec<usize>> = Vec::new();
        for i in 0..machines.len() {
            match members.iter_mut().find(|m| alike(m[0], i)) {
                Some(kind) => kind.push(i),
                None => members.push(vec![i]),
            }
        }
        Self { machines: machines.to_vec(), members, links: links.clone() }
    }

    fn machine(&self, kind: usize) -> &Machine {
        &self.machines[self.members[kind][0]]
    }

    /// Between a machine of one kind and another of a kind.
    fn link(&self, a: usize, b: usize) -> Link {
        let second = if a == b { self.members[b].get(1) } else { self.members[b].first() };
        second.map_or(self.links.usual, |&s| self.links.between(self.members[a][0], s))
    }

    /// From each stage to the next, the last one's to the first.
    fn ring(&self, found: &Arrangement) -> Vec<Link> {
        let n = found.stages.len();
        (0..n).map(|i| self.link(found.stages[i].0, found.stages[(i + 1) % n].0)).collect()
    }

    fn named(&self, found: &Arrangement) -> Vec<(usize, String)> {
        let mut used = vec![0; self.members.len()];
        let place = |&(kind, range): &(usize, LayerRange)| {
            used[kind] += 1;
            (self.members[kind][used[kind] - 1], range.to_string())
        };
        found.stages.iter().map(place).collect()
    }

    /// One more machine of a kind, over the usual link.
    fn with_another(&self, kind: usize) -> Self {
        let mut machines = self.machines.clone();
        machines.push(self.machine(kind).clone());
        Self::of(&machines, &self.links)
    }

    fn first(&self, n: usize) -> Self {
        Self::of(&self.machines[..n], &self.links)
    }
}

/// Everything about the question that does not depend on the machines.
struct Desk<'a> {
    question: &'a Question<'a>,
    sizes: Sizes,
    allowed: Vec<bool>,
}

impl<'a> Desk<'a> {
    fn new(question: &'a Question<'a>) -> Self {
        let n = question.subject.profile.layers.len() as u32;
        let ok = |a, b| {
            LayerRange::new(a, b).is_ok_and(|r| r.count() == n || (question.subject.window_problem)(r).is_none())
        };
        let allowed = (0..=n).flat_map(|a| (0..=n).map(move |b| (a, b))).map(|(a, b)| ok(a, b)).collect();
        Self { question, sizes: Sizes::of(&question.subject.profile), allowed }
    }

    fn profile(&self) -> &'a ModelProfile {
        &self.question.subject.profile
    }

    fn need_at(&self, range: LayerRange, ctx: u32) -> Need {
        self.sizes.need(range, ctx, self.question.slots, self.question.ubatch)
    }

    fn need(&self, range: LayerRange) -> Need {
        self.need_at(range, self.question.ctx)
    }

    fn whole(&self) -> Option<LayerRange> {
        LayerRange::new(0, self.sizes.layers()).ok()
    }

    /// The micro-batch for which layers are dealt out.
    fn batch(&self, machines: usize) -> Batch {
        let depth_tokens = TYPICAL_DEPTH_TOKENS.min(u64::from(self.question.ctx) / 2);
        let sequences = match self.question.objective {
            Objective::Latency => 1,
            _ => self.question.slots.div_ceil(machines.max(1) as u32).max(1),
        };
        Batch::Decode { sequences, depth_tokens }
    }

    fn with_problem<T>(&self, fleet: &Fleet, ctx: u32, of: impl FnOnce(&Problem) -> T) -> T {
        let batch = self.batch(fleet.machines.len());
        let kind = |k: usize| {
            let machine = fleet.machine(k);
            let times = Times::of(self.profile(), &machine.rates, batch);
            Kind {
                count: fleet.members[k].len(),
                usable_bytes: machine.usable_bytes,
                layers_s: times.layers_s,
                head_s: times.head_s,
            }
        };
        let kinds: Vec<_> = (0..fleet.members.len()).map(kind).collect();
        let bytes = hidden_bytes(self.profile(), batch.rows()) as f64;
        let each = |of: &dyn Fn(Link) -> f64| -> Vec<Vec<f64>> {
            (0..kinds.len()).map(|a| (0..kinds.len()).map(|b| of(fleet.link(a, b))).collect()).collect()
        };
        let hops = Hops {
            way_s: each(&|link| hop_s(self.profile(), link, batch.rows())),
            wire_s: each(&|link| link.wire_s(bytes)),
        };
        let width = self.sizes.layers() as usize + 1;
        let allowed = |r: LayerRange| self.allowed[r.start() as usize * width + r.end() as usize];
        of(&Problem {
            layers: self.sizes.layers(),
            kinds: &kinds,
            hops: &hops,
            need_bytes: &|range| self.need_at(range, ctx).total(),
            allowed: &allowed,
            objective: self.question.objective,
        })
    }

    fn arrange(&self, fleet: &Fleet) -> Option<Arrangement> {
        self.with_problem(fleet, self.question.ctx, arrange)
    }

    fn fewest(&self, fleet: &Fleet) -> Option<usize> {
        self.with_problem(fleet, self.question.ctx, fewest)
    }

    fn place(&self, fleet: &Fleet, found: &Arrangement) -> Vec<Placed> {
        let names = fleet.named(found);
        let stage = |(&(kind, layers), (place, _)): (&(usize, LayerRange), &(usize, String))| {
            let machine = fleet.machine(kind);
            let alone = fleet.machines.iter().filter(|m| m.name == machine.name).count() == 1;
            let machine_name =
                if alone { machine.name.clone() } else { format!("{} (no. {})", machine.name, place + 1) };
            Placed {
                node: *place,
                machine: machine_name,
                rates: machine.rates.clone(),
                usable_bytes: machine.usable_bytes,
                layers,
                need: self.need(layers),
            }
        };
        found.stages.iter().zip(&names).map(stage).collect()
    }

    /// Tokens per second of one sequence, or of all slots where throughput is wanted.
    fn speed(&self, fleet: &Fleet) -> Option<f64> {
        self.with_pipeline(fleet, |pipeline| self.speed_of(pipeline))
    }

    /// What is said of the best arrangement over some machines.
    fn with_pipeline<T>(&self, fleet: &Fleet, of: impl FnOnce(&Pipeline) -> T) -> Option<T> {
        let found = self.arrange(fleet)?;
        let (placed, ring) = (self.place(fleet, &found), fleet.ring(&found));
        Some(of(&Pipeline { profile: self.profile(), stages: &placed, ring: &ring }))
    }

    /// Tokens per second, and tokens of a prompt per second until the first token of the answer.
    fn speeds_of(&self, pipeline: &Pipeline) -> (f64, f64) {
        let prompt = TYPICAL_PROMPT_TOKENS.min(self.question.ctx);
        let first = pipeline.first_token(Wiring::Capstan, prompt, self.question.ubatch);
        (self.speed_of(pipeline), first.tokens_per_s)
    }

    fn speed_of(&self, pipeline: &Pipeline) -> f64 {
        let sequences = if self.question.objective == Objective::Latency { 1 } else { self.question.slots };
        let depth = TYPICAL_DEPTH_TOKENS.min(u64::from(self.question.ctx) / 2);
        pipeline.decode(Wiring::Capstan, sequences, depth).tokens_per_s
    }

    fn by_machines(&self, fleet: &Fleet, fewest: usize) -> Vec<(usize, f64)> {
        if fleet.members.len() > 1 {
            return Vec::new();
        }
        let all = fleet.machines.len();
        let mut speeds: Vec<_> = (fewest..=all).filter_map(|n| Some((n, self.speed(&fleet.first(n))?))).collect();
        if all < MACHINES_MAX {
            speeds.extend(self.speed(&fleet.with_another(0)).map(|s| (all + 1, s)));
        }
        speeds
    }

    fn fits_at(&self, fleet: &Fleet, ctx: u32) -> bool {
        self.with_problem(fleet, ctx, fewest).is_some()
    }

    /// The longest context that fits, up to what the model was trained with.
    fn ctx_max(&self, fleet: &Fleet) -> u32 {
        let most = self.profile().context_train.max(self.question.ctx);
        let (mut fits, mut not) = (self.question.ctx / CTX_STEP, most / CTX_STEP + 1);
        if self.fits_at(fleet, most) {
            return most;
        }
        while not - fits > 1 {
            let middle = fits + (not - fits) / 2;
            if self.fits_at(fleet, middle * CTX_STEP) { fits = middle } else { not = middle }
        }
        (fits * CTX_STEP).max(self.question.ctx)
    }

    /// Why the model does not fit, and what would help.
    fn why_not(&self, fleet: &Fleet) -> Vec<String> {
        let Some(whole) = self.whole() else { return vec!["The model has no layers.".to_owned()] };
        let need = self.need(whole);
        let usable: u64 = fleet.machines.iter().fold(0, |sum, m| sum.saturating_add(m.usable_bytes));
        let compute = need.compute.saturating_mul(fleet.machines.len() as u64);
        let total = need.weights.saturating_add(need.kv).saturating_add(compute);
        let mut lines = vec![format!(
            "{} does not fit: it needs {} ({} of weights, {} of KV cache for {} slots of {} tokens, {} to compute), and {} \
             may be used on {} machine{}.",
            self.question.subject.name,
            human_bytes(total),
            human_bytes(need.weights),
            human_bytes(need.kv),
            self.question.slots,
            self.question.ctx,
            human_bytes(compute),
            human_bytes(usable),
            fleet.machines.len(),
            if fleet.machines.len() == 1 { "" } else { "s" },
        )];
        let reason = self.whole_only();
        if let Some(reason) = &reason {
            lines.push(format!("It cannot be split: {reason}."));
        } else if total <= usable {
            lines.push(
                "The sum would do, but layers are not divided, and no cut leaves each machine what it can hold.".into(),
            );
        }
        let enough = (0..fleet.members.len()).filter_map(|kind| {
            let machine = fleet.machine(kind);
            let one_kind = Fleet::of(&vec![machine.clone(); MACHINES_MAX], &Links::all(fleet.links.usual));
            Some(format!("{} of {}", self.fewest(&one_kind)?, machine.name))
        });
        let enough: Vec<_> = enough.collect();
        lines.push(match (enough.is_empty(), reason) {
            (false, _) => format!("It would fit on {}.", enough.join(", or on ")),
            (true, Some(_)) => "Take a machine with more memory, or a smaller quantisation.".to_owned(),
            (true, None) => format!("Even {MACHINES_MAX} of these would not do: take machines with more memory each."),
        });
        if need.kv > need.weights / 10 {
            lines.push("A shorter context or fewer slots would save KV cache.".to_owned());
        }
        lines
    }

    /// Why the model cannot be split at all.
    fn whole_only(&self) -> Option<String> {
        let n = self.sizes.layers();
        if n < 2 {
            return Some("it has a single layer".to_owned());
        }
        let width = n as usize + 1;
        let any = (1..n as usize).any(|cut| self.allowed[cut] && self.allowed[cut * width + n as usize]);
        if any { None } else { LayerRange::new(0, n / 2).ok().and_then(|r| (self.question.subject.window_problem)(r)) }
    }

    fn explain(&self, fleet: &Fleet, found: &Arrangement, pipeline: &Pipeline, fewest: usize) -> Vec<String> {
        let used = found.stages.len();
        let all = fleet.machines.len();
        let mut lines = vec![match (used, all) {
            (1, 1) => "The model runs whole on the machine.".to_owned(),
            (1, _) => format!("One machine of {all} is best: every further stage would add a hop to each token."),
            _ if used < all => {
                format!("{used} of {all} machines are used: with more of them a token would take longer.")
            }
            _ => format!("All {all} machines are used."),
        }];
        if used < all && self.question.objective == Objective::Throughput {
            lines.pop();
            lines.push(format!(
                "{used} of {all} machines are used: the others would not make the slowest stage faster."
            ));
        }
        lines.push(if fewest == 1 {
            "One machine can hold the model.".to_owned()
        } else {
            format!("At least {fewest} of them are needed to hold the model.")
        });
        if !found.exact {
            lines.push("There are too many orders of so many different machines to try all; this is the best of plausible ones.".into());
        }
        self.explain_bottleneck(pipeline, &mut lines);
        self.explain_more(fleet, pipeline, &mut lines);
        lines
    }

    fn explain_bottleneck(&self, pipeline: &Pipeline, lines: &mut Vec<String>) {
        let batch = self.batch(pipeline.stages.len());
        let stages = pipeline.stage_s(batch);
        let Some((i, slowest)) = stages.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1)) else { return };
        let sum: f64 = stages.iter().sum();
        let hops: f64 = match pipeline.stages.len() {
            1 => 0.0,
            _ => pipeline.ring.iter().map(|&link| hop_s(self.profile(), link, batch.rows())).sum(),
        };
        let stage = &pipeline.stages[i];
        if pipeline.stages.len() > 1 {
            lines.push(format!(
                "The slowest stage is {} with layers {}: {:.1} ms of {:.1} ms that a token is computed, and {:.1} ms on the way \
                 between machines.",
                stage.machine,
                stage.layers,
                slowest * 1e3,
                sum * 1e3,
                hops * 1e3
            ));
        }
        let active: u64 =
            self.profile().layers.iter().map(|l| l.active_bytes).sum::<u64>() + self.profile().output_bytes;
        let read: f64 = pipeline
            .stages
            .iter()
            .map(|s| {
                let span = s.layers.start() as usize..s.layers.end() as usize;
                let last = s.layers.end() == self.sizes.layers();
                let layers: u64 = self.profile().layers[span].iter().map(|l| l.active_bytes).sum();
                (layers + if last { self.profile().output_bytes } else { 0 }) as f64 / s.rates.weight_bytes_per_s
            })
            .sum();
        lines.push(format!(
            "A token reads {} of weights, which takes {:.1} ms; the rest is the KV cache at {} tokens and the start of \
             kernels.",
            human_bytes(active),
            read * 1e3,
            match batch {
                Batch::Decode { depth_tokens, .. } | Batch::Chunk { depth_tokens, .. } => depth_tokens,
            }
        ));
        if let Some(tight) = pipeline
            .stages
            .iter()
            .min_by_key(|s| s.usable_bytes.saturating_sub(s.need.total()))
            .filter(|s| s.usable_bytes.saturating_sub(s.need.total()) < s.usable_bytes / 20)
        {
            lines.push(format!(
                "{} is nearly full: {} of {}.",
                tight.machine,
                human_bytes(tight.need.total()),
                human_bytes(tight.usable_bytes)
            ));
        }
    }

    fn explain_more(&self, fleet: &Fleet, pipeline: &Pipeline, lines: &mut Vec<String>) {
        let now = self.speeds_of(pipeline);
        let percent = |then: f64, now: f64, what: &str| match then / now - 1.0 {
            gain if gain >= 0.005 => format!("{:.0} % more {what}", gain * 100.0),
            gain if gain <= -0.005 => format!("{:.0} % fewer {what}", -gain * 100.0),
            _ => format!("no more {what}"),
        };
        let change = |then: (f64, f64)| {
            let (decode, prompt) = ("tokens per second", "tokens of a prompt per second");
            format!("{} and {}", percent(then.0, now.0, decode), percent(then.1, now.1, prompt))
        };
        if fleet.machines.len() < MACHINES_MAX {
            for kind in 0..fleet.members.len().min(4) {
                if let Some(then) = self.with_pipeline(&fleet.with_another(kind), |p| self.speeds_of(p)) {
                    lines.push(format!("One more {} would bring {}.", fleet.machine(kind).name, change(then)));
                }
            }
        }
        if pipeline.stages.len() > 1 {
            let faster = |l: Link| Link { rtt_s: l.rtt_s, bytes_per_s: l.bytes_per_s * FASTER_LINK };
            let links = Links {
                usual: faster(fleet.links.usual),
                between: fleet.links.between.iter().map(|&(a, b, l)| (a, b, faster(l))).collect(),
            };
            if let Some(then) = self.with_pipeline(&Fleet::of(&fleet.machines, &links), |p| self.speeds_of(p)) {
                lines.push(format!("Links with {FASTER_LINK:.0} times the bandwidth would bring {}.", change(then)));
            }
        }
    }
}
