//! Everything about a question that does not depend on the machines, and what is reckoned with it.
use std::rc::Rc;

use capstan_gguf::ModelProfile;
use capstan_proto::{LayerRange, limits};

use super::fleet::Fleet;
use super::{Question, Speeds};
use crate::arrange::{self, Arrangement, Hops, Kind, Objective, Problem};
use crate::cost::{Need, Sizes};
use crate::forecast::{Pipeline, Placed, Wiring};
use crate::links::Link;
use crate::timing::{Batch, Times, hidden_bytes, hop_s};

/// Depth for which layers are dealt out: a conversation of some length.
pub(super) const TYPICAL_DEPTH_TOKENS: u64 = 4096;
/// Prompt by which prefill is compared.
pub(super) const TYPICAL_PROMPT_TOKENS: u32 = 2048;
/// Contexts are tried in steps of this: llama.cpp rounds up to it.
const CTX_STEP: u32 = 256;

#[derive(Clone)]
pub(super) struct Desk<'a> {
    pub question: Question<'a>,
    pub sizes: Rc<Sizes>,
    /// Why windows may not be stages, row by row of starts.
    allowed: Rc<Vec<bool>>,
}

impl<'a> Desk<'a> {
    pub fn new(question: &Question<'a>) -> Self {
        let n = question.subject.profile.layers.len() as u32;
        let ok = |a, b| {
            LayerRange::new(a, b).is_ok_and(|r| r.count() == n || (question.subject.window_problem)(r).is_none())
        };
        let allowed = (0..=n).flat_map(|a| (0..=n).map(move |b| (a, b))).map(|(a, b)| ok(a, b)).collect();
        let sizes = Rc::new(Sizes::of(&question.subject.profile));
        Self { question: *question, sizes, allowed: Rc::new(allowed) }
    }

    /// The same model, asked otherwise.
    pub fn asking(&self, change: impl FnOnce(&mut Question<'a>)) -> Self {
        let mut other = self.clone();
        change(&mut other.question);
        other
    }

    pub fn profile(&self) -> &'a ModelProfile {
        &self.question.subject.profile
    }

    pub fn need(&self, range: LayerRange) -> Need {
        self.sizes.need(range, self.question.ctx, self.question.slots, self.question.ubatch)
    }

    pub fn may(&self, range: LayerRange) -> bool {
        let width = self.sizes.layers() as usize + 1;
        self.allowed.get(range.start() as usize * width + range.end() as usize).copied().unwrap_or(false)
    }

    pub fn depth_tokens(&self) -> u64 {
        TYPICAL_DEPTH_TOKENS.min(u64::from(self.question.ctx) / 2)
    }

    /// The micro-batch for which layers are dealt out.
    pub fn batch(&self, machines: usize) -> Batch {
        let sequences = match self.question.objective {
            Objective::Latency => 1,
            _ => self.question.slots.div_ceil(machines.max(1) as u32).max(1),
        };
        Batch::Decode { sequences, depth_tokens: self.depth_tokens() }
    }

    fn with_problem<T>(&self, fleet: &Fleet, of: impl FnOnce(&Problem) -> T) -> T {
        let batch = self.batch(fleet.len());
        let kind = |k: usize| {
            let machine = fleet.machine(k);
            let times = Times::of(self.profile(), &machine.rates, batch);
            Kind {
                count: fleet.count(k),
                usable_bytes: machine.usable_bytes,
                layers_s: times.layers_s,
                head_s: times.head_s,
                required: fleet.required(k),
                holds: fleet.holds(k),
            }
        };
        let kinds: Vec<_> = (0..fleet.kinds()).map(kind).collect();
        let bytes = hidden_bytes(self.profile(), batch.rows()) as f64;
        let each = |of: &dyn Fn(Link) -> f64| -> Vec<Vec<f64>> {
            (0..kinds.len()).map(|a| (0..kinds.len()).map(|b| of(fleet.link(a, b))).collect()).collect()
        };
        let hops = Hops {
            way_s: each(&|link| hop_s(self.profile(), link, batch.rows())),
            wire_s: each(&|link| link.wire_s(bytes)),
        };
        of(&Problem {
            layers: self.sizes.layers(),
            kinds: &kinds,
            hops: &hops,
            need_bytes: &|range| self.need(range).total(),
            allowed: &|range| self.may(range),
            objective: self.question.objective,
        })
    }

    pub fn arrange(&self, fleet: &Fleet) -> Option<Arrangement> {
        self.with_problem(fleet, arrange::arrange)
    }

    pub fn fewest(&self, fleet: &Fleet) -> Option<usize> {
        self.with_problem(fleet, arrange::fewest)
    }

    pub fn fits(&self, fleet: &Fleet) -> bool {
        self.with_problem(fleet, arrange::fits)
    }

    pub fn place(&self, fleet: &Fleet, found: &Arrangement) -> Vec<Placed> {
        let stage = |(&(kind, layers), place): (&(usize, LayerRange), usize)| {
            let machine = fleet.machine(kind);
            Placed {
                node: place,
                cache: place,
                machine: fleet.name_of(place),
                rates: machine.rates.clone(),
                usable_bytes: machine.usable_bytes,
                layers,
                need: self.need(layers),
            }
        };
        found.stages.iter().zip(fleet.places(found)).map(stage).collect()
    }

    /// What is said of the best arrangement over some machines.
    pub fn with_pipeline<T>(&self, fleet: &Fleet, of: impl FnOnce(&Pipeline) -> T) -> Option<T> {
        let found = self.arrange(fleet)?;
        let (placed, ring) = (self.place(fleet, &found), fleet.ring(&found));
        Some(of(&Pipeline { profile: self.profile(), stages: &placed, ring: &ring }))
    }

    /// The speeds of the best arrangement over some machines, for sequences so deep.
    pub fn speeds(&self, fleet: &Fleet, depth_tokens: u64) -> Option<Speeds> {
        self.with_pipeline(fleet, |pipeline| self.speeds_of(pipeline, depth_tokens))
    }

    pub fn speeds_of(&self, pipeline: &Pipeline, depth_tokens: u64) -> Speeds {
        let prompt = TYPICAL_PROMPT_TOKENS.min(self.question.ctx);
        let decode = |sequences| pipeline.decode(Wiring::Capstan, sequences, depth_tokens).tokens_per_s;
        Speeds {
            machines: pipeline.stages.len(),
            alone_tokens_per_s: decode(1),
            all_tokens_per_s: decode(self.question.slots),
            prompt_tokens_per_s: pipeline.first_token(Wiring::Capstan, prompt, self.question.ubatch).tokens_per_s,
        }
    }

    /// Of two decode speeds, of one sequence and of all slots together, that which the objective is about.
    pub fn wanted(&self, speeds: &Speeds) -> f64 {
        match self.question.objective {
            Objective::Latency => speeds.alone_tokens_per_s,
            _ => speeds.all_tokens_per_s,
        }
    }

    /// How many sequences that speed is of.
    pub fn sequences(&self) -> u32 {
        if self.question.objective == Objective::Latency { 1 } else { self.question.slots }
    }

    /// The decode speed that the objective is about, with the best arrangement over some machines.
    pub fn decode_speed(&self, fleet: &Fleet) -> Option<f64> {
        let decode = |p: &Pipeline| p.decode(Wiring::Capstan, self.sequences(), self.depth_tokens()).tokens_per_s;
        self.with_pipeline(fleet, decode)
    }

    /// The longest context that fits, up to what the model was trained with; 0 when none does.
    pub fn ctx_max(&self, fleet: &Fleet) -> u32 {
        let most = self.profile().context_train.max(self.question.ctx);
        let fits = |ctx: u32| self.asking(|q| q.ctx = ctx).fits(fleet);
        if fits(most) {
            return most;
        }
        CTX_STEP * most_of(most / CTX_STEP, |steps| fits(steps * CTX_STEP))
    }

    /// The most slots that fit; 0 when not even one does.
    pub fn slots_max(&self, fleet: &Fleet) -> u32 {
        most_of(limits::SLOTS_MAX, |slots| self.asking(|q| q.slots = slots).fits(fleet))
    }
}

/// The largest number up to `most` that will do, when all smaller ones will do too; 0 when none does.
fn most_of(most: u32, will_do: impl Fn(u32) -> bool) -> u32 {
    let (mut least, mut most) = (0, most);
    while least < most {
        let middle = least + (most - least).div_ceil(2);
        if will_do(middle) { least = middle } else { most = middle - 1 }
    }
    least
}
