//! The search behind [`arrange`](super::arrange()): what all its parts know, and which of them is asked.
use std::ops::RangeInclusive;

use capstan_proto::LayerRange;

use super::given::Given;
use super::grid::Grid;
use super::{Arrangement, Kind, Problem, ROUNDING};

/// Most steps of an exact search, each a few nanoseconds: seconds on a slow machine.
const STEPS_MAX: f64 = 1.2e9;
/// Most numbers that it keeps: 256 MiB.
const CELLS_MAX: f64 = 3.2e7;
/// From so many states on a better guess pays for itself.
const IMPROVE_STATES: f64 = 2000.0;

/// Kind, start and end.
pub(super) type Stage = (usize, usize, usize);

#[derive(Clone, Copy, PartialEq)]
pub(super) enum Goal {
    /// Times add up.
    Way,
    /// The largest counts.
    Slowest,
}

impl Goal {
    pub fn join(self, a: f64, b: f64) -> f64 {
        match self {
            Self::Way => a + b,
            Self::Slowest => a.max(b),
        }
    }
}

pub(super) struct Search<'a> {
    pub problem: &'a Problem<'a>,
    pub n: usize,
    /// Of each kind: machines that the search may place; none of one whose stage is given.
    pub counts: Vec<usize>,
    pub given: Given,
    /// Of each kind and end: the first start from which a window fits its memory; the end itself when none does.
    pub fits_from: Vec<Vec<usize>>,
    /// Of each layer: a time that all from it on take at least.
    pub rest_s: Vec<f64>,
    /// Of each kind: the time of the first `l` layers.
    upto: Vec<Vec<f64>>,
    /// Which windows may be stages, row by row of starts; empty when all may.
    allowed: Vec<bool>,
    uniform: bool,
}

/// One more stage for each of some prefixes.
pub(super) struct Step<'s> {
    /// The kind of its machine.
    pub k: usize,
    pub goal: Goal,
    /// First starts of that kind's windows, by end.
    pub froms: &'s [usize],
    /// What prefixes cost, by length.
    pub before: &'s [f64],
    /// How long the first of them is.
    pub shortest: usize,
    /// Which ends are of use.
    pub ends: RangeInclusive<usize>,
}

impl<'a> Search<'a> {
    pub fn new(problem: &'a Problem<'a>) -> Option<Self> {
        let (n, kinds) = (problem.layers as usize, problem.kinds);
        let bad = |k: &Kind| k.layers_s.len() != n || k.required > k.count;
        if n == 0 || n >= usize::from(u16::MAX) || kinds.is_empty() || kinds.iter().any(bad) {
            return None;
        }
        let given = Given::new(problem)?;
        let counts: Vec<_> = kinds.iter().map(|k| if k.holds.is_some() { 0 } else { k.count }).collect();
        let range = |a: usize, b: usize| LayerRange::new(a as u32, b as u32).ok();
        let mut allowed: Vec<bool> = (0..=n)
            .flat_map(|a| (0..=n).map(move |b| (a, b)))
            .map(|(a, b)| range(a, b).is_some_and(|r| r.count() as usize == n || (problem.allowed)(r)))
            .collect();
        if (0..n).all(|a| (a + 1..=n).all(|b| allowed[a * (n + 1) + b])) {
            allowed.clear();
        }
        let upto = |k: &Kind| {
            let mut sums = vec![0.0];
            sums.extend(k.layers_s.iter().scan(0.0, |sum, s| {
                *sum += s;
                Some(*sum)
            }));
            sums
        };
        // The last end also holds the head, so its windows are shorter; the others' first starts only move on.
        let fits_from = |k: &Kind| {
            let mut from = vec![0; n + 1];
            let mut start = 0;
            for (end, first) in from.iter_mut().enumerate().skip(1) {
                start = start.max(given.floor(end));
                while start < end && range(start, end).is_some_and(|r| (problem.need_bytes)(r) > k.usable_bytes) {
                    start += 1;
                }
                *first = start;
            }
            from
        };
        let fits_from = kinds.iter().map(fits_from).collect();
        let mut search = Self {
            problem,
            n,
            counts,
            given,
            fits_from,
            rest_s: vec![0.0; n + 1],
            upto: kinds.iter().map(upto).collect(),
            allowed,
            uniform: problem.hops.is_uniform(),
        };
        for l in (0..n).rev() {
            let after = if l + 1 == n { search.least_head_s() } else { search.rest_s[l + 1] };
            search.rest_s[l] = after + search.least_s(l);
        }
        Some(search)
    }

    /// Kinds of which the search may place machines.
    pub fn movable(&self) -> impl Iterator<Item = usize> + '_ {
        (0..self.counts.len()).filter(|&k| self.counts[k] > 0)
    }

    /// What a layer takes at least.
    pub fn least_s(&self, layer: usize) -> f64 {
        let of = |k: usize| self.problem.kinds[k].layers_s[layer];
        self.given.holds(layer).map_or_else(|| self.movable().map(of).fold(f64::INFINITY, f64::min), of)
    }

    /// What the head takes at least.
    pub fn least_head_s(&self) -> f64 {
        let of = |k: usize| self.problem.kinds[k].head_s;
        self.given.holds(self.n - 1).map_or_else(|| self.movable().map(of).fold(f64::INFINITY, f64::min), of)
    }

    fn may(&self, start: usize, end: usize) -> bool {
        self.allowed.is_empty() || self.allowed[start * (self.n + 1) + end]
    }

    /// What a stage of kind `k` takes for `start..end`.
    pub fn stage_s(&self, k: usize, start: usize, end: usize) -> f64 {
        let head = if end == self.n { self.problem.kinds[k].head_s } else { 0.0 };
        (self.upto[k][end] - self.upto[k][start]) + head
    }

    /// Of each kind and end: the first start from which a window fits its memory and takes no longer than `cap`.
    pub fn froms(&self, cap: f64) -> Vec<Vec<usize>> {
        let of = |k: usize| {
            let mut start = 0;
            let mut first = |end: usize| {
                start = start.max(self.fits_from[k][end]);
                while start < end && self.stage_s(k, start, end) > cap {
                    start += 1;
                }
                start
            };
            (0..=self.n).map(&mut first).collect()
        };
        (0..self.problem.kinds.len()).map(of).collect()
    }

    pub fn hop(&self, goal: Goal, a: usize, b: usize) -> f64 {
        let hops = self.problem.hops;
        if goal == Goal::Way { hops.way_s[a][b] } else { hops.wire_s[a][b] }
    }

    /// Whether a hop is too slow for the cap.
    pub fn hop_exceeds(&self, a: usize, b: usize, cap: f64) -> bool {
        self.problem.hops.wire_s[a][b] > cap
    }

    /// Whether a given stage is too slow for the cap.
    pub fn given_exceeds(&self, cap: f64) -> bool {
        self.given.stages.iter().any(|&(k, a, b)| self.stage_s(k, a, b) > cap)
    }

    /// Whether so many machines of each kind are all that must be used.
    pub fn enough(&self, used: impl Fn(usize) -> usize) -> bool {
        self.movable().all(|k| used(k) >= self.problem.kinds[k].required)
    }

    /// Whether an arrangement has all required machines and no forbidden window.
    fn may_be(&self, found: &Arrangement) -> bool {
        let used = |k: usize| found.stages.iter().filter(|s| s.0 == k).count();
        let window = |r: LayerRange| self.may(r.start() as usize, r.end() as usize);
        self.enough(used) && found.stages.iter().all(|s| window(s.1))
    }

    /// Extends prefixes by one stage each: `next[end] = min over start of before[start] joined with it`.
    pub fn extend(&self, step: &Step, next: &mut [f64], queue: &mut Vec<(usize, f64)>) {
        let &Step { k, goal, froms, before, shortest, ref ends } = step;
        let upto = &self.upto[k];
        let limit = shortest + before.len();
        let scan = |from: usize, last: usize, end: usize| {
            let may = |start: &usize| before[start - shortest].is_finite() && self.may(*start, end);
            let value = |start: usize| goal.join(before[start - shortest], self.stage_s(k, start, end));
            (from..last).filter(may).map(value).fold(f64::INFINITY, f64::min)
        };
        let span = |end: usize| (froms[end].max(shortest), end.min(limit));
        if goal == Goal::Slowest {
            for end in ends.clone() {
                let (from, last) = span(end);
                next[end] = next[end].min(scan(from, last, end));
            }
            return;
        }
        // A queue of starts whose prefixes get dearer, relative to what the machine saves by starting later.
        queue.clear();
        let (mut front, mut pushed) = (0, shortest);
        for end in ends.clone() {
            let (from, last) = span(end);
            while pushed < last {
                let relative = before[pushed - shortest] - upto[pushed];
                if relative < f64::INFINITY {
                    while queue.len() > front && queue[queue.len() - 1].1 >= relative {
                        queue.pop();
                    }
                    queue.push((pushed, relative));
                }
                pushed += 1;
            }
            while front < queue.len() && queue[front].0 < from {
                front += 1;
            }
            let Some(&(start, relative)) = queue.get(front) else { continue };
            let found = match self.may(start, end) {
                true => relative + upto[end] + if end == self.n { self.problem.kinds[k].head_s } else { 0.0 },
                false => scan(from, last, end),
            };
            next[end] = next[end].min(found);
        }
    }

    /// The best start of a stage that ends here. `before` are the costs of all prefixes.
    pub fn start_of(&self, k: usize, goal: Goal, froms: &[Vec<usize>], before: &[f64], end: usize) -> Option<usize> {
        let ways = (froms[k][end]..end).filter(|&s| before[s].is_finite() && self.may(s, end));
        let value = |s: usize| goal.join(before[s], self.stage_s(k, s, end));
        ways.min_by(|&a, &b| value(a).total_cmp(&value(b)))
    }

    /// The exact best, or the best of plausible orders where that would take too long. What is `known` keeps the cap.
    pub fn best(&self, goal: Goal, cap: f64, known: Option<Arrangement>) -> Option<Arrangement> {
        if self.given_exceeds(cap) {
            return None;
        }
        if let [all @ (_, 0, end)] = self.given.stages[..]
            && end == self.n
        {
            return self.enough(|_| 0).then(|| self.arrangement(vec![all]));
        }
        let states = Grid::size(&self.counts);
        let width = self.n as f64 + 1.0;
        let kinds = self.movable().count() as f64;
        let steps = states * kinds * if self.uniform { 8.0 * width } else { width * width / 2.0 * kinds };
        let cells = states * width * if self.uniform { 1.0 } else { kinds };
        let feasible = steps <= STEPS_MAX && cells <= CELLS_MAX;
        if feasible && self.uniform && goal == Goal::Slowest {
            return self.slowest(cap);
        }
        let mut guess = self.guess(goal, cap);
        if let Some(known) = known
            && guess.as_ref().is_none_or(|g| self.value(goal, &known) < self.value(goal, g))
        {
            guess = Some(known);
        }
        if states > IMPROVE_STATES {
            guess = guess.map(|g| self.improved(g, goal, cap));
        }
        if !feasible {
            return guess.map(|g| Arrangement { exact: false, ..g });
        }
        let whole = self.whole(goal, cap);
        let split = if self.uniform {
            self.over_counts(cap, guess.as_ref())
        } else {
            let bound = guess.as_ref().map_or(f64::INFINITY, |g| self.value(goal, g)) * (1.0 + ROUNDING);
            self.over_chains(goal, cap, bound)
        };
        // Equally good: the one with fewer machines, and that of the guess is as good as any.
        let better = |a: Option<Arrangement>, b: Option<Arrangement>| match (a, b) {
            (Some(a), Some(b)) => {
                Some(if self.value(goal, &b) < self.value(goal, &a) * (1.0 - ROUNDING) { b } else { a })
            }
            (a, b) => a.or(b),
        };
        better(better(whole, split), guess)
    }

    /// Whether there is any arrangement, where reaching tells.
    pub fn fits(&self) -> Option<bool> {
        if !self.uniform || Grid::size(&self.counts) * self.counts.len() as f64 > STEPS_MAX / 10.0 {
            return None;
        }
        match self.reached(&Grid::new(&self.counts)?, f64::INFINITY) {
            None => Some(false),
            Some(found) => self.may_be(&found).then_some(true),
        }
    }

    /// The fastest slowest stage where links are all alike: what reaching tells, and where that is none that may be, the
    /// least cap under which there is a way.
    fn slowest(&self, cap: f64) -> Option<Arrangement> {
        let least = self.least_slowest()?;
        if self.may_be(&least) {
            return Some(least).filter(|l| l.slowest_s <= cap);
        }
        let under = |cap| self.best(Goal::Way, cap, None);
        let mut best = match under(least.slowest_s * (1.0 + ROUNDING)) {
            Some(found) => return Some(found).filter(|f| f.slowest_s <= cap),
            None => under(cap)?,
        };
        let mut times = self.times_between(least.slowest_s, best.slowest_s);
        while let Some(&time) = times.get(times.len() / 2) {
            match under(time) {
                Some(found) => {
                    times.retain(|&t| t < found.slowest_s);
                    best = found;
                }
                None => times.retain(|&t| t > time),
            }
        }
        Some(best)
    }

    pub fn value(&self, goal: Goal, a: &Arrangement) -> f64 {
        if goal == Goal::Way { a.way_s } else { a.slowest_s }
    }

    /// All layers on one machine.
    fn whole(&self, goal: Goal, cap: f64) -> Option<Arrangement> {
        if !self.given.stages.is_empty() {
            return None;
        }
        let froms = self.froms(cap);
        let held = |k: &usize| froms[*k][self.n] == 0 && self.enough(|other| usize::from(other == *k));
        let found = self.movable().filter(held).map(|k| self.arrangement(vec![(k, 0, self.n)]));
        found.min_by(|a, b| self.value(goal, a).total_cmp(&self.value(goal, b)))
    }

    /// The stages with their times, reckoned anew.
    pub fn arrangement(&self, stages: Vec<Stage>) -> Arrangement {
        let (mut way_s, mut slowest_s) = (0.0, 0.0f64);
        for (i, &(k, start, end)) in stages.iter().enumerate() {
            let stage = self.stage_s(k, start, end);
            way_s += stage;
            slowest_s = slowest_s.max(stage);
            if stages.len() > 1 {
                let next = stages[(i + 1) % stages.len()].0;
                way_s += self.problem.hops.way_s[k][next];
                slowest_s = slowest_s.max(self.problem.hops.wire_s[k][next]);
            }
        }
        let range = |&(k, a, b): &Stage| LayerRange::new(a as u32, b as u32).ok().map(|r| (k, r));
        Arrangement { stages: stages.iter().filter_map(range).collect(), way_s, slowest_s, exact: true }
    }
}
