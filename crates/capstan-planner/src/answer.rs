//! How many machines, and how fast: the whole answer, in figures and in sentences.
//!
//! | module | idea |
//! |---|---|
//! | `fleet` | machines grouped into kinds that nothing tells apart |
//! | `desk` | what is reckoned with a question, whatever the machines |
//! | `explain` | why it is so, and what each machine does for a token |
//! | `choices` | what other choices would bring, and what was rejected |
use capstan_gguf::{Model, ModelProfile};
use capstan_proto::{LayerRange, limits};
use serde::Serialize;

use self::desk::Desk;
use self::fleet::Fleet;
use crate::arrange::Objective;
use crate::forecast::{CHUNK_ROWS, Forecast, PROMPT_TOKENS, Pipeline, Placed, Wiring};
use crate::links::Links;
use crate::machines::{MACHINES_MAX, Machine};
use crate::models::KnownModel;
use crate::quant::Quantisation;

mod choices;
mod desk;
mod explain;
mod fleet;

/// So much faster prompts must come in for larger micro-batches, which take memory, to be worth it.
const WORTHWHILE: f64 = 0.01;

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

/// What is settled about a machine before layers are dealt out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Wish {
    /// It holds exactly these layers.
    Holds(LayerRange),
    /// It holds some layers.
    Used,
    /// It holds none.
    Unused,
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
    /// What is settled about machines, by their places in the list; at most one wish each.
    pub wishes: &'a [(usize, Wish)],
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
    /// Nothing to serve, or more than can be.
    #[error(
        "a context of {ctx} tokens for {slots} slots in micro-batches of {ubatch} rows cannot be planned for; ask for at \
         least one of each, at most {max} slots and {rows} rows", max = limits::SLOTS_MAX, rows = limits::ROWS_MAX
    )]
    Nothing {
        /// Tokens a slot holds.
        ctx: u32,
        /// Slots.
        slots: u32,
        /// Rows of a micro-batch.
        ubatch: u32,
    },
    /// What is settled about machines cannot be.
    #[error("{0}")]
    Wish(String),
    /// Too little memory.
    #[error("{}", .0.join(" "))]
    Memory(Vec<String>),
}

/// Tokens per second.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Speeds {
    /// Machines that are used.
    pub machines: usize,
    /// Of one sequence that is alone.
    pub alone_tokens_per_s: f64,
    /// Of all slots together.
    pub all_tokens_per_s: f64,
    /// Of a prompt of usual length, until the first token of the answer.
    pub prompt_tokens_per_s: f64,
}

/// Another choice, and what it would bring.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Choice {
    /// What is chosen: `machines`, `link`, `objective`, `context`, `slots` or `ubatch`.
    pub of: &'static str,
    /// How, for people.
    pub what: String,
    /// How fast it would be; none when it does not fit.
    pub speeds: Option<Speeds>,
}

/// What a machine does for one step of decoding.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct StageWork {
    /// Which.
    pub machine: String,
    /// Layers `start..end`.
    pub layers: String,
    /// Sequences that are computed at once.
    pub rows: u32,
    /// Weights it reads, in bytes.
    pub weight_bytes: u64,
    /// KV cache and state it reads and writes, in bytes.
    pub kv_bytes: u64,
    /// How long it computes.
    pub compute_s: f64,
    /// How long what it sends is on its way.
    pub hop_s: f64,
    /// What it sends, in bytes.
    pub sent_bytes: u64,
}

/// The answer.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Answer {
    /// The model.
    pub model: String,
    /// Where its numbers are from.
    pub sources: Vec<String>,
    /// What was wanted.
    pub objective: Objective,
    /// Tokens a slot holds.
    pub ctx: u32,
    /// Sequences at once.
    pub slots: u32,
    /// Most rows of a micro-batch.
    pub ubatch: u32,
    /// Layers of each stage in pipeline order, and the place of its machine in the list.
    pub stages: Vec<(usize, String)>,
    /// What each stage does for one step of decoding.
    pub work: Vec<StageWork>,
    /// What Capstan would do.
    pub forecast: Forecast,
    /// What llama.cpp's RPC would do with the same machines and layers.
    pub plain_rpc: Forecast,
    /// The fewest of these machines that can hold the model.
    pub fewest: usize,
    /// The longest context of a slot that these machines can hold, in tokens.
    pub ctx_max: u32,
    /// The most slots of that context which they can hold.
    pub slots_max: u32,
    /// Tokens per second by number of machines, where all are alike; one more than there are comes last.
    pub by_machines: Vec<(usize, f64)>,
    /// What other choices would bring.
    pub choices: Vec<Choice>,
    /// Whether nothing better exists.
    pub exact: bool,
    /// In sentences.
    pub explanation: Vec<String>,
    /// What was not chosen, and why, in sentences.
    pub rejected: Vec<String>,
}

/// Answers.
pub fn answer(question: &Question) -> Result<Answer, Unfit> {
    check(question)?;
    let desk = Desk::new(question);
    let fleet = fleet(question);
    let found = desk.arrange(&fleet).ok_or_else(|| Unfit::Memory(desk.why_not(&fleet)))?;
    let placed = desk.place(&fleet, &found);
    let ring = fleet.ring(&found);
    let pipeline = Pipeline { profile: desk.profile(), stages: &placed, ring: &ring };
    let ctx_max = desk.ctx_max(&fleet).max(question.ctx);
    let slots_max = desk.slots_max(&fleet).max(question.slots);
    // Speeds are forecast as far as the machines can hold; the memory is that of the context that was asked for.
    let of = |wiring| pipeline.forecast(wiring, ctx_max, question.slots, question.ubatch);
    let fewest = desk.fewest(&fleet).unwrap_or(found.stages.len());
    let layers = found.stages.iter().map(|(_, layers)| layers.to_string());
    Ok(Answer {
        model: question.subject.name.clone(),
        sources: question.subject.sources.clone(),
        objective: question.objective,
        ctx: question.ctx,
        slots: question.slots,
        ubatch: question.ubatch,
        stages: fleet.places(&found).into_iter().zip(layers).collect(),
        work: desk.work(&pipeline),
        forecast: of(Wiring::Capstan),
        plain_rpc: of(Wiring::PlainRpc),
        fewest,
        ctx_max,
        slots_max,
        by_machines: by_machines(&desk, &fleet, fewest),
        choices: desk.choices(&fleet, &found, &desk.speeds_of(&pipeline, desk.depth_tokens()), (ctx_max, slots_max)),
        exact: found.exact,
        explanation: desk.explain(&fleet, &found, &pipeline, fewest),
        rejected: desk.rejected(&fleet, &found, &pipeline, fewest),
    })
}

/// Where the layers go, and nothing else; none when they do not fit.
pub fn place(question: &Question) -> Result<Option<Vec<Placed>>, Unfit> {
    check(question)?;
    let (desk, fleet) = (Desk::new(question), fleet(question));
    Ok(desk.arrange(&fleet).map(|found| desk.place(&fleet, &found)))
}

/// The machines less what is kept free on each.
fn fleet(question: &Question) -> Fleet {
    let keep =
        |m: &Machine| Machine { usable_bytes: m.usable_bytes.saturating_sub(question.headroom_bytes), ..m.clone() };
    Fleet::of(question.machines.iter().map(keep).collect(), question.links, question.wishes)
}

fn check(question: &Question) -> Result<(), Unfit> {
    let n = question.subject.profile.layers.len();
    if question.machines.is_empty() || question.machines.len() > MACHINES_MAX {
        return Err(Unfit::Machines(question.machines.len()));
    }
    if n == 0 || n > limits::LAYERS_MAX as usize {
        return Err(Unfit::Layers(n));
    }
    let &Question { ctx, slots, ubatch, .. } = question;
    if ctx == 0 || !(1..=limits::SLOTS_MAX).contains(&slots) || !(1..=limits::ROWS_MAX as u32).contains(&ubatch) {
        return Err(Unfit::Nothing { ctx, slots, ubatch });
    }
    check_wishes(question, n as u32).map_err(Unfit::Wish)
}

fn check_wishes(question: &Question, n: u32) -> Result<(), String> {
    let (machines, wishes) = (question.machines, question.wishes);
    let mut held: Vec<(LayerRange, &str)> = Vec::new();
    for (i, &(place, wish)) in wishes.iter().enumerate() {
        let Some(machine) = machines.get(place) else {
            return Err(format!("there is no machine no. {}: {} were named", place + 1, machines.len()));
        };
        if wishes[..i].iter().any(|w| w.0 == place) {
            return Err(format!("{} is pinned or excluded twice; say it once", machine.name));
        }
        let Wish::Holds(layers) = wish else { continue };
        if layers.end() > n {
            return Err(format!("layers {layers} are pinned to {}, but the model has {n} layers", machine.name));
        }
        if let Some(why) = (question.subject.window_problem)(layers).filter(|_| layers.count() < n) {
            return Err(format!("layers {layers} cannot be pinned to {}: {why}", machine.name));
        }
        let crosses = |&&(other, _): &&(LayerRange, &str)| other.start() < layers.end() && layers.start() < other.end();
        if let Some((other, name)) = held.iter().find(crosses) {
            return Err(format!("layers {layers} are pinned to {}, and {other} to {name}: they overlap", machine.name));
        }
        held.push((layers, &machine.name));
    }
    let unused = wishes.iter().filter(|w| w.1 == Wish::Unused).count();
    if unused == machines.len() {
        return Err("every machine is excluded; leave at least one".to_owned());
    }
    Ok(())
}

/// Tokens per second with each number of machines, where all are alike.
fn by_machines(desk: &Desk, fleet: &Fleet, fewest: usize) -> Vec<(usize, f64)> {
    if !fleet.is_uniform() {
        return Vec::new();
    }
    let all = fleet.len();
    let speed = |fleet: &Fleet| desk.decode_speed(fleet);
    let mut speeds: Vec<_> = (fewest..=all).filter_map(|n| Some((n, speed(&fleet.first(n))?))).collect();
    if all < MACHINES_MAX {
        speeds.extend(speed(&fleet.with_another(0)).map(|s| (all + 1, s)));
    }
    speeds
}

/// How many machines of a kind reach a speed.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Target {
    /// The kind.
    pub machine: String,
    /// Of so many sequences together.
    pub sequences: u32,
    /// The fewest that reach it, and what they reach; none when no number does.
    pub enough: Option<(usize, f64)>,
    /// The number that reaches most, and how much; none when no number holds the model.
    pub most: Option<(usize, f64)>,
}

/// For each kind of machine in the list, how many reach so many tokens per second: of one sequence for `latency`, of all
/// slots together else.
pub fn targets(question: &Question, tokens_per_s: f64) -> Result<Vec<Target>, Unfit> {
    check(question)?;
    let mut kinds: Vec<Machine> = Vec::new();
    for machine in fleet(question).usable() {
        if !kinds.contains(machine) {
            kinds.push(machine.clone());
        }
    }
    Ok(kinds.iter().map(|machine| target(question, machine, tokens_per_s)).collect())
}

fn target(question: &Question, machine: &Machine, tokens_per_s: f64) -> Target {
    let desk = Desk::new(&Question { wishes: &[], ..*question });
    let mut target = Target { machine: machine.name.clone(), sequences: desk.sequences(), enough: None, most: None };
    for n in 1..=MACHINES_MAX {
        let Some(speed) = desk.decode_speed(&Fleet::same(machine, n, question.links.usual)) else { continue };
        if target.most.is_none_or(|m| speed > m.1) {
            target.most = Some((n, speed));
        }
        if speed >= tokens_per_s {
            target.enough = Some((n, speed));
            break;
        }
    }
    target
}

/// The fewest machines of the first kind in the list with which one sequence, or all slots together where that is wanted,
/// reach so many tokens per second, and how many they then reach; none when no number of them does.
pub fn machines_for(question: &Question, tokens_per_s: f64) -> Option<(usize, f64)> {
    target(question, question.machines.first()?, tokens_per_s).enough
}

/// The fewest machines of the first kind in the list that hold the model; none when no number of them does.
pub fn fewest_of(question: &Question) -> Option<usize> {
    check(question).ok()?;
    let machine = fleet(question).usable().next()?.clone();
    Desk::new(question).fewest(&Fleet::same(&machine, MACHINES_MAX, question.links.usual))
}

/// The size of micro-batches with which prompts of all listed lengths that a slot holds are through soonest, the smallest
/// among those that are about as good. None when the model fits with none.
pub fn best_ubatch(question: &Question) -> Option<u32> {
    check(question).ok()?;
    let (desk, fleet) = (Desk::new(question), fleet(question));
    let fits = |tokens: &u32| *tokens < question.ctx;
    let prompts: Vec<u32> = PROMPT_TOKENS.into_iter().filter(fits).collect();
    let mut best: Option<(u32, f64)> = None;
    for ubatch in CHUNK_ROWS {
        // The mean of how much faster it is counts, so that long prompts do not drown short ones.
        let score = |p: &Pipeline| -> f64 {
            prompts.iter().map(|&tokens| p.first_token(Wiring::Capstan, tokens, ubatch).tokens_per_s.ln()).sum()
        };
        if let Some(score) = desk.asking(|q| q.ubatch = ubatch).with_pipeline(&fleet, score)
            && best.is_none_or(|b| score > b.1 + WORTHWHILE * prompts.len() as f64)
        {
            best = Some((ubatch, score));
        }
    }
    best.map(|b| b.0)
}
