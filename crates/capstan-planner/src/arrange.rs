//! The best order of unequal machines and the best cut of the layers over them, exactly.
//!
//! Machines that are alike count as one kind, so the search runs over how many of each kind are used, not over which:
//! `best(used, l)` is the cheapest way to put the first `l` layers on machines of which `used[k]` are of kind `k`. Eight
//! unequal machines are 256 such counts, 64 machines of two kinds about a thousand.
//!
//! ```text
//!   best(used, end) = min over kinds k and starts of  best(used - k, start) ⊕ cost of k for start..end
//!   ⊕ adds times of a token that passes the stages, or takes the larger of two stages that work at once
//! ```
//!
//! Where links between kinds differ, `best` also knows the last machine, and the search is repeated for each first one,
//! for the ring closes. Four facts make it fast where they do not: the first layer that still fits a machine never moves
//! back as its last one moves on, so a sliding minimum does for sums; a part of a window that fits also fits, so how far
//! machines reach together bounds which prefixes are of use (`reach`), and finds the fastest slowest stage by itself; a
//! first guess, cuts of a few plausible orders, and a bound on what the rest takes discard what cannot become better.
//!
//! | module | idea |
//! |---|---|
//! | `search` | what all parts know, and which of them is asked |
//! | `given` | stages that are settled beforehand |
//! | `grid` | how many machines of each kind are used, as one number |
//! | `reach` | how far machines reach, whatever the order |
//! | `counts` | the search where links are all alike |
//! | `chains` | the search where they differ |
//! | `rest` | what the layers after a prefix take at least |
//! | `guess` | first guesses |
use capstan_proto::LayerRange;
pub use capstan_proto::manage::Objective;

use self::search::{Goal, Search};

mod chains;
mod counts;
mod given;
mod grid;
mod guess;
mod reach;
mod rest;
mod search;

/// `balanced` takes the lowest latency among placements whose slowest stage takes at most so many times as long as the
/// best: a lone request is then hardly slower, and many still share all machines.
pub const BALANCED_SLACK: f64 = 1.15;
/// Sums in another order differ in the last bits; this much is no difference.
pub(crate) const ROUNDING: f64 = 1e-9;

/// Machines that are alike.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Kind {
    /// How many.
    pub count: usize,
    /// Memory of each that a stage may take, in bytes.
    pub usable_bytes: u64,
    /// What a layer takes of a token's way, in seconds.
    pub layers_s: Vec<f64>,
    /// What the head takes, which the last stage computes.
    pub head_s: f64,
    /// So many of them at least hold layers.
    pub required: usize,
    /// The layers that the only machine of this kind holds, and no other does; none where that is to be found.
    pub holds: Option<LayerRange>,
}

/// What goes from one kind to another takes.
#[derive(Clone, Debug, PartialEq)]
pub struct Hops {
    /// `way_s[a][b]`: seconds from a machine of kind `a` to another of kind `b`.
    pub way_s: Vec<Vec<f64>>,
    /// `wire_s[a][b]`: seconds for which it keeps the link.
    pub wire_s: Vec<Vec<f64>>,
}

impl Hops {
    /// The same between any two of so many kinds.
    pub fn uniform(kinds: usize, way_s: f64, wire_s: f64) -> Self {
        Self { way_s: vec![vec![way_s; kinds]; kinds], wire_s: vec![vec![wire_s; kinds]; kinds] }
    }

    pub(crate) fn is_uniform(&self) -> bool {
        let same = |m: &Vec<Vec<f64>>| m.iter().flatten().all(|x| Some(x) == m.first().and_then(|r| r.first()));
        same(&self.way_s) && same(&self.wire_s)
    }
}

/// What is to be arranged.
pub struct Problem<'a> {
    /// Layers of the model.
    pub layers: u32,
    /// The machines.
    pub kinds: &'a [Kind],
    /// The links.
    pub hops: &'a Hops,
    /// Memory that a stage of these layers needs; more layers never need less.
    pub need_bytes: &'a dyn Fn(LayerRange) -> u64,
    /// Whether a window may be a stage. The full range always may.
    pub allowed: &'a dyn Fn(LayerRange) -> bool,
    /// What is wanted.
    pub objective: Objective,
}

/// The best arrangement.
#[derive(Clone, Debug, PartialEq)]
pub struct Arrangement {
    /// Kinds and layers in pipeline order.
    pub stages: Vec<(usize, LayerRange)>,
    /// A token's way through all of it, hops included, in seconds.
    pub way_s: f64,
    /// What the slowest stage or link takes, in seconds.
    pub slowest_s: f64,
    /// Whether nothing better exists. When the search would have been too long, only plausible orders were tried.
    pub exact: bool,
}

/// Finds the best arrangement; none when no subset of the machines can hold the model.
pub fn arrange(problem: &Problem) -> Option<Arrangement> {
    let search = Search::new(problem)?;
    let slack = match problem.objective {
        Objective::Latency => return Some(search.evened(search.best(Goal::Way, f64::INFINITY, None)?)),
        Objective::Throughput => 1.0 + ROUNDING,
        Objective::Balanced => BALANCED_SLACK,
    };
    let found = search.best(Goal::Slowest, f64::INFINITY, None)?;
    let way = search.best(Goal::Way, found.slowest_s * slack, Some(found.clone()));
    Some(way.map_or(found, |way| search.evened(way)))
}

/// The fewest machines that can hold the model, whatever the speed.
pub fn fewest(problem: &Problem) -> Option<usize> {
    let free = |k: &Kind| Kind { layers_s: vec![0.0; problem.layers as usize], head_s: 0.0, ..k.clone() };
    let kinds: Vec<_> = problem.kinds.iter().map(free).collect();
    let hops = Hops::uniform(kinds.len(), 1.0, 0.0);
    let unit = Problem { kinds: &kinds, hops: &hops, objective: Objective::Latency, ..*problem };
    Some(arrange(&unit)?.stages.len())
}

/// Whether the machines can hold the model, whatever the speed.
pub fn fits(problem: &Problem) -> bool {
    match Search::new(problem) {
        Some(search) => search.fits().unwrap_or_else(|| fewest(problem).is_some()),
        None => false,
    }
}

/// The best cut over machines in a given order, all of which are used, with the given stages between them.
pub fn in_order(problem: &Problem, order: &[usize]) -> Option<Arrangement> {
    let search = Search::new(problem)?;
    if order.iter().any(|&k| search.counts.get(k).is_none_or(|&count| count == 0)) {
        return None;
    }
    let cut = |goal, cap| search.cut(order, goal, cap, &search.froms(cap));
    let found = match problem.objective {
        Objective::Latency => return cut(Goal::Way, f64::INFINITY),
        _ => cut(Goal::Slowest, f64::INFINITY)?,
    };
    let slack = if problem.objective == Objective::Balanced { BALANCED_SLACK } else { 1.0 + ROUNDING };
    cut(Goal::Way, found.slowest_s * slack).or(Some(found))
}
