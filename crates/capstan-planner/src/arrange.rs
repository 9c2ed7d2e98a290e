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
//! for the ring closes. Where they do not and every window is allowed, two facts make a step linear in the layers: the
//! first layer that still fits a machine never moves back as its last one moves on, so a sliding minimum does for sums;
//! and the largest of two things that move in opposite directions is smallest where they cross. A first guess, cuts of a
//! few plausible orders, discards what cannot become better.
use capstan_proto::LayerRange;
use serde::{Deserialize, Serialize};

use self::search::{Goal, Search};

mod rest;
mod search;

/// `balanced` takes the lowest latency among placements whose slowest stage takes at most so many times as long as the
/// best: a lone request is then hardly slower, and many still share all machines.
pub const BALANCED_SLACK: f64 = 1.15;
/// Sums in another order differ in the last bits; this much is no difference.
pub(crate) const ROUNDING: f64 = 1e-9;

/// What is wanted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Objective {
    /// The shortest way of a token through all stages.
    #[default]
    Latency,
    /// The fastest slowest stage; among equals the shortest way.
    Throughput,
    /// The shortest way among those nearly as good for throughput.
    Balanced,
}

/// Machines that are alike.
#[derive(Clone, Debug, PartialEq)]
pub struct Kind {
    /// How many.
    pub count: usize,
    /// Memory of each that a stage may take, in bytes.
    pub usable_bytes: u64,
    /// What a layer takes of a token's way, in seconds.
    pub layers_s: Vec<f64>,
    /// What the head takes, which the last stage computes.
    pub head_s: f64,
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
    let slowest = |cap| search.best(Goal::Slowest, cap);
    let way = |cap| search.best(Goal::Way, cap);
    match problem.objective {
        Objective::Latency => way(f64::INFINITY),
        Objective::Throughput => {
            let found = slowest(f64::INFINITY)?;
            way(found.slowest_s * (1.0 + ROUNDING)).or(Some(found))
        }
        Objective::Balanced => {
            let found = slowest(f64::INFINITY)?;
            way(found.slowest_s * BALANCED_SLACK).or(Some(found))
        }
    }
}

/// The fewest machines that can hold the model, whatever the speed.
pub fn fewest(problem: &Problem) -> Option<usize> {
    let free = |k: &Kind| Kind { layers_s: vec![0.0; problem.layers as usize], head_s: 0.0, ..k.clone() };
    let kinds: Vec<_> = problem.kinds.iter().map(free).collect();
    let hops = Hops::uniform(kinds.len(), 1.0, 0.0);
    let unit = Problem { kinds: &kinds, hops: &hops, objective: Objective::Latency, ..*problem };
    Some(arrange(&unit)?.stages.len())
}

/// The best cut over machines in a given order, all of which are used.
pub fn in_order(problem: &Problem, order: &[usize]) -> Option<Arrangement> {
    let search = Search::new(problem)?;
    let slowest = |cap| search.cut(order, Goal::Slowest, cap);
    let found = match problem.objective {
        Objective::Latency => return search.cut(order, Goal::Way, f64::INFINITY),
        _ => slowest(f64::INFINITY)?,
    };
    let slack = if problem.objective == Objective::Balanced { BALANCED_SLACK } else { 1.0 + ROUNDING };
    search.cut(order, Goal::Way, found.slowest_s * slack).or(Some(found))
}
