//! How far machines reach, whatever the order: with windows that fit and take no longer than a cap.
//!
//! A part of a window that may be also may be, so the longest prefix that some machines can hold decides whether the
//! others can hold the rest:
//!
//! ```text
//!   ahead(used) = max over kinds k of the furthest end of a window of k that starts at ahead(used - k)
//! ```
//!
//! That is a few nanoseconds a step where a search over all prefixes takes a hundred times as long. It bounds which
//! prefixes of a search are of use, and finds the fastest slowest stage: the least cap under which all machines together
//! reach the end.
use super::Arrangement;
use super::grid::Grid;
use super::search::{Search, Stage};

/// How often the order of a first guess is gone through for exchanges that make it better.
const EXCHANGE_ROUNDS: usize = 4;
/// Halvings of an interval of times until its ends are the same number but for rounding.
const HALVINGS: usize = 40;

/// Of each way to use machines: the end of the longest prefix that they can hold.
pub(super) fn ahead(search: &Search, grid: &Grid, froms: &[Vec<usize>]) -> Vec<u16> {
    let furthest = |of: &Vec<usize>| furthest(of, search.n, |l| search.given.after(l));
    table(grid, search.n, search.given.after(0), froms.iter().flat_map(furthest).collect(), Ord::max)
}

/// Of each way to use machines: the start of the longest rest that they can hold.
pub(super) fn behind(search: &Search, grid: &Grid, froms: &[Vec<usize>]) -> Vec<u16> {
    let first = froms.iter().flatten().map(|&l| search.given.before(l) as u16);
    table(grid, search.n, search.given.before(search.n), first.collect(), Ord::min)
}

/// `to` says, kind by kind, where one comes to from each border with one more machine.
fn table(grid: &Grid, n: usize, origin: usize, to: Vec<u16>, better: impl Fn(u16, u16) -> u16) -> Vec<u16> {
    let mut reached = vec![origin as u16; grid.states];
    let mut odometer = grid.odometer();
    for state in 1..grid.states {
        odometer.count_on();
        let mut best = origin as u16;
        for k in odometer.present() {
            best = better(best, to[k * (n + 1) + usize::from(reached[state - grid.strides[k]])]);
        }
        reached[state] = best;
    }
    reached
}

/// The furthest end of a window from each start; the start itself where there is none.
fn furthest(froms: &[usize], n: usize, after: impl Fn(usize) -> usize) -> Vec<u16> {
    let mut end = 0;
    let mut of = |start: usize| {
        end = end.max(start);
        while end < n && froms[end + 1] <= start {
            end += 1;
        }
        after(end) as u16
    };
    (0..=n).map(&mut of).collect()
}

impl Search<'_> {
    /// The fastest slowest stage where links are all alike, windows forbidden or machines required notwithstanding: a
    /// bound, and the best where [`Search::may_be`] says that the arrangement may be. None when not even memory suffices.
    pub fn least_slowest(&self) -> Option<Arrangement> {
        let grid = Grid::new(&self.counts)?;
        let total_s = |k: usize| self.stage_s(k, 0, self.n);
        let most = self.movable().map(total_s).fold(0.0, f64::max).max(self.problem.hops.wire_s[0][0]);
        let mut best = match self.guess_slowest(most) {
            Some(guess) => guess,
            None => self.reached(&grid, f64::INFINITY)?,
        };
        // Between what even machines without gaps between their windows would need, and the guess.
        let (mut low, mut high) = (0.0, best.slowest_s);
        for _ in 0..HALVINGS {
            let middle = low + (high - low) / 2.0;
            if self.might_reach(middle) { high = middle } else { low = middle }
        }
        let mut times = self.times_between(low, best.slowest_s);
        while let Some(&time) = times.get(times.len() / 2) {
            match self.reached(&grid, time) {
                Some(found) => {
                    times.retain(|&t| t < found.slowest_s);
                    best = found;
                }
                None => times.retain(|&t| t > time),
            }
        }
        Some(best)
    }

    /// The times between two that a stage or a link can take, in order.
    pub fn times_between(&self, low: f64, high: f64) -> Vec<f64> {
        let mut times = vec![self.problem.hops.wire_s[0][0]];
        for k in self.movable() {
            for end in 1..=self.n {
                times.extend((self.fits_from[k][end]..end).map(|start| self.stage_s(k, start, end)));
            }
        }
        times.extend(self.given.stages.iter().map(|&(k, a, b)| self.stage_s(k, a, b)));
        times.retain(|t| (low..high).contains(t));
        times.sort_unstable_by(f64::total_cmp);
        times.dedup();
        times
    }

    /// Whether the layers are no more than the machines' longest windows together.
    fn might_reach(&self, cap: f64) -> bool {
        let longest = |k: usize| {
            let mut start = 0;
            let length = |end: usize| {
                start = start.max(self.fits_from[k][end]);
                while start < end && self.stage_s(k, start, end) > cap {
                    start += 1;
                }
                end - start
            };
            (1..=self.n).map(length).max().unwrap_or(0)
        };
        let given: usize = self.given.stages.iter().map(|s| s.2 - s.1).sum();
        given + self.movable().map(|k| self.counts[k] * longest(k)).sum::<usize>() >= self.n
    }

    /// Some arrangement under a cap.
    pub fn reached(&self, grid: &Grid, cap: f64) -> Option<Arrangement> {
        if self.given_exceeds(cap) {
            return None;
        }
        let froms = self.froms(cap);
        let whole = self.movable().find(|&k| self.given.stages.is_empty() && froms[k][self.n] == 0);
        if let Some(k) = whole {
            return Some(self.arrangement(vec![(k, 0, self.n)]));
        }
        if self.hop_exceeds(0, 0, cap) {
            return None;
        }
        let ahead = ahead(self, grid, &froms);
        let (mut state, mut end) = (grid.states - 1, self.n);
        if usize::from(ahead[state]) < end {
            return None;
        }
        let mut stages = Vec::new();
        while end > 0 {
            if let Some((k, start)) = self.given.ending(end) {
                stages.push((k, start, end));
                end = start;
                continue;
            }
            let from = |k: usize| usize::from(ahead[state - grid.strides[k]]);
            let used = |&k: &usize| grid.used(state, k) > 0;
            // Unused where the others reach as far.
            if let Some(k) = self.movable().filter(used).find(|&k| from(k) >= end) {
                state -= grid.strides[k];
                continue;
            }
            let k = self.movable().filter(used).find(|&k| froms[k][end] <= from(k))?;
            stages.push((k, from(k), end));
            end = from(k);
            state -= grid.strides[k];
        }
        stages.reverse();
        Some(self.arrangement(stages))
    }

    /// The best of a few orders, each as even as it can be.
    fn guess_slowest(&self, most: f64) -> Option<Arrangement> {
        let mut best: Option<(f64, Vec<usize>)> = None;
        let offer = |best: &mut Option<(f64, Vec<usize>)>, order: Vec<usize>| {
            let (mut low, mut high) = (0.0, best.as_ref().map_or(most, |b| b.0));
            if self.along(&order, high).is_none() {
                return;
            }
            for _ in 0..HALVINGS {
                let middle = low + (high - low) / 2.0;
                if self.along(&order, middle).is_some() { high = middle } else { low = middle }
            }
            *best = Some((high, order));
        };
        for order in self.orders() {
            offer(&mut best, order.iter().rev().copied().collect());
            offer(&mut best, order);
        }
        for _ in 0..EXCHANGE_ROUNDS {
            let (before, order) = best.clone()?;
            for i in 0..order.len() {
                for j in i + 1..order.len() {
                    let (time, mut tried) = best.clone()?;
                    tried.swap(i, j);
                    if self.along(&tried, time * (1.0 - super::ROUNDING)).is_some() {
                        offer(&mut best, tried);
                    }
                }
            }
            if best.as_ref().is_some_and(|b| b.0 >= before) {
                break;
            }
        }
        let (time, order) = best?;
        Some(self.arrangement(self.along(&order, time)?))
    }

    /// The stages of machines in this order, each as long as can be under a cap; those that are not needed are left out.
    fn along(&self, order: &[usize], cap: f64) -> Option<Vec<Stage>> {
        if self.given_exceeds(cap) || self.hop_exceeds(0, 0, cap) {
            return None;
        }
        let (mut stages, mut at) = (Vec::new(), 0);
        let bridged = |stages: &mut Vec<Stage>, at: &mut usize| {
            while let Some(&stage) = self.given.stages.iter().find(|s| s.1 == *at) {
                stages.push(stage);
                *at = stage.2;
            }
        };
        bridged(&mut stages, &mut at);
        for &k in order {
            let may = |end: usize| self.fits_from[k][end] <= at && self.stage_s(k, at, end) <= cap;
            let (mut least, mut most) = (at, self.n);
            while least < most {
                let middle = least + (most - least).div_ceil(2);
                if may(middle) { least = middle } else { most = middle - 1 }
            }
            if least > at {
                stages.push((k, at, least));
                at = least;
                bridged(&mut stages, &mut at);
            }
        }
        (at == self.n).then_some(stages)
    }
}
