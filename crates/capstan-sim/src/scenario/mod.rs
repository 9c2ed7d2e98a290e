//! The scenarios: each sets a pipeline up, lets it run, and gives figures.
//!
//! | module | asks |
//! |---|---|
//! | [`decode`] | do all stages work when many sequences decode? |
//! | [`prefill`] | do all stages work when one prompt comes in? |
//! | [`mixed`] | how much does a prompt that comes in hold up those who decode? |
//! | [`guess`] | what do guesses gain, and do they ever cost? |
//! | [`kimi`] | what would four real machines do with a model of a trillion weights? |
pub mod decode;
pub mod guess;
pub mod kimi;
pub mod mixed;
pub mod prefill;

use std::cell::RefCell;

use capstan_engine::EngineConfig;

use crate::cost::Ns;
use crate::dice::{Dice, mix};
use crate::figure::Figure;
use crate::log::{Request, RequestLog};
use crate::text::Text;
use crate::world::{Failure, World};

/// A scenario broke a rule.
#[derive(Debug, thiserror::Error)]
#[error("scenario {scenario}, S = {stages}, {case}, seed {seed}: {failure}")]
pub struct Broken {
    /// Which.
    pub scenario: &'static str,
    /// Its stages.
    pub stages: usize,
    /// Its case.
    pub case: String,
    /// Replays it.
    pub seed: u64,
    /// What happened.
    pub failure: Failure,
    /// What led to it, where that was asked for.
    pub trace: Vec<String>,
}

/// A case of a scenario, for its figures and for whoever must replay it.
#[derive(Clone, Debug)]
pub struct Case {
    /// The scenario.
    pub scenario: &'static str,
    /// Stages.
    pub stages: usize,
    /// Its name in the table.
    pub name: String,
    /// Decides everything that chance does.
    pub seed: u64,
    /// Whether events are written down.
    pub trace: bool,
    /// Those of the last run.
    events: RefCell<Vec<String>>,
}

impl Case {
    /// A figure of this case.
    pub fn figure(&self) -> Figure {
        let figure = Figure::new(self.scenario, self.stages, self.name.clone(), self.seed);
        Figure { events: self.events.take(), ..figure }
    }

    /// Lets a world run to its end.
    pub fn run(&self, world: &mut World) -> Result<(), Broken> {
        let outcome = world.run().map_err(|failure| self.broken(failure, world.trace()));
        *self.events.borrow_mut() = world.trace().to_vec();
        outcome
    }

    /// What to say when it cannot even begin.
    pub fn broken(&self, failure: Failure, trace: &[String]) -> Broken {
        Broken {
            scenario: self.scenario,
            stages: self.stages,
            case: self.name.clone(),
            seed: self.seed,
            failure,
            trace: trace.to_vec(),
        }
    }
}

/// What a scenario is given.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Options {
    /// Decides everything that chance does.
    pub seed: u64,
    /// Events are written down of cases whose name has this in it, with the number of stages before it: "4 weights".
    pub trace: Option<String>,
}

impl Options {
    /// A case.
    pub fn case(&self, scenario: &'static str, stages: usize, name: impl Into<String>) -> Case {
        let name = name.into();
        let trace = self.trace.as_ref().is_some_and(|part| format!("{stages} {name}").contains(part));
        Case { scenario, stages, name, seed: self.seed, trace, events: RefCell::default() }
    }
}

/// A scenario: its figures, or the rule that was broken.
pub type Scenario = fn(&Options) -> Result<Vec<Figure>, Broken>;

/// All of them, in the order of the table.
pub const ALL: [(&str, Scenario); 9] = [
    ("decode", decode::saturated),
    ("decode-learnt", decode::learnt),
    ("decode-unequal", decode::unequal),
    ("prefill", prefill::alone),
    ("mixed", mixed::prompt_beside_decode),
    ("ngram", guess::ngram),
    ("draft", guess::draft),
    ("unguessable", guess::unguessable),
    ("kimi", kimi::four_machines),
];

/// A prompt of tokens that are drawn.
pub(crate) fn prompt(seed: u64, len: u32, n_vocab: usize) -> Vec<i32> {
    (0..u64::from(len)).map(|i| (mix(seed, i) % n_vocab as u64) as i32).collect()
}

/// A request whose answer nothing can guess.
pub(crate) fn free_request(seed: u64, prompt_len: u32, max_tokens: u32, n_vocab: usize) -> Request {
    Request { prompt: prompt(seed, prompt_len, n_vocab), max_tokens, text: Text::free(seed) }
}

/// Settings for so many sequences, none of which must wait for a slot.
pub(crate) fn config(stages: usize, slots: usize, ctx: u32, chunk: u32) -> EngineConfig {
    EngineConfig::new(stages as u16, slots as u32, ctx, chunk)
}

/// A window in which every one of these requests was decoding: after each has said `skip` tokens, and before any ended.
pub(crate) fn steady_window<'a>(
    requests: impl Iterator<Item = &'a RequestLog> + Clone,
    skip: usize,
) -> Option<(Ns, Ns)> {
    let from = requests.clone().map(|r| r.token_ns.get(skip).copied()).max()??;
    let to = requests.map(|r| r.token_ns.last().copied()).min()??;
    (from < to).then_some((from, to))
}

/// Seeds for the parts of a scenario.
pub(crate) fn seeds(seed: u64) -> impl Iterator<Item = u64> {
    let mut dice = Dice::new(seed);
    std::iter::repeat_with(move || dice.bits())
}
