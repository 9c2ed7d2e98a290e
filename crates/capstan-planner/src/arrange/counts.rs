//! The search where links are all alike: which machine came last does not matter, only how many of each kind did.
use std::ops::{Range, RangeInclusive};

use super::grid::Grid;
use super::reach;
use super::rest::Rest;
use super::search::{Goal, Search, Stage, Step};
use super::{Arrangement, ROUNDING};

impl Search<'_> {
    /// The shortest way through stages that take no longer than `cap`, if it is shorter than that of the guess or hardly
    /// longer.
    pub fn over_counts(&self, cap: f64, guess: Option<&Arrangement>) -> Option<Arrangement> {
        let (n, goal) = (self.n, Goal::Way);
        let hop = self.hop(goal, 0, 0);
        if self.hop_exceeds(0, 0, cap) {
            return None;
        }
        let grid = Grid::new(&self.counts)?;
        let froms = self.froms(cap);
        // The most layers that the machines of a state can hold; those left over must be able to hold the others.
        let (ahead, behind) = (reach::ahead(self, &grid, &froms), reach::behind(self, &grid, &froms));
        let band = |state: usize| usize::from(behind[grid.others(state)])..=usize::from(ahead[state]);
        let bound = guess.map_or(f64::INFINITY, |g| g.way_s * (1.0 + ROUNDING));
        let rest = Rest::new(self, &froms, hop, guess);
        let all_gain_s: f64 = self.movable().map(|k| rest.gain_s(k, self.counts[k])).sum();
        let mut rows = Rows { spans: vec![None; grid.states], cells: Vec::new() };
        let (mut next, mut queue) = (vec![f64::INFINITY; n + 1], Vec::new());
        let mut whole: Option<(f64, usize)> = None;
        let mut odometer = grid.odometer();
        for state in 0..grid.states {
            if state > 0 {
                odometer.count_on();
            }
            let band = band(state);
            // Which prefixes came about.
            let (mut least, mut most) = (n + 1, 0);
            for k in odometer.present() {
                let Some((shortest, before)) = rows.get(state - grid.strides[k]) else { continue };
                let longest = shortest + before.len() - 1;
                let ends = (shortest + 1).max(*band.start())..=(longest + rest.reach(k)).min(*band.end());
                if ends.is_empty() {
                    continue;
                }
                if least > most {
                    next[band.clone()].fill(f64::INFINITY);
                }
                (least, most) = (least.min(*ends.start()), most.max(*ends.end()));
                self.extend(&Step { k, goal, froms: &froms[k], before, shortest, ends }, &mut next, &mut queue);
            }
            if state == 0 && band.contains(&0) {
                next[0] = 0.0;
                (least, most) = (0, 0);
            }
            if least > most {
                continue;
            }
            // Every stage of a pipeline has a hop before it: the first one's closes the ring.
            if state > 0 {
                next[least..=most].iter_mut().for_each(|to| *to += hop);
            }
            if !self.given.stages.is_empty() {
                most = self.bridge_counts(least..=most, *band.end(), hop, &mut next);
            }
            // What is complete is no prefix of anything.
            if most == n {
                let complete = std::mem::replace(&mut next[n], f64::INFINITY);
                if complete.is_finite() && whole.is_none_or(|w| complete < w.0) && self.enough(|k| odometer.used[k]) {
                    whole = Some((complete, state));
                }
            }
            let used_gain_s: f64 = odometer.present().map(|k| rest.gain_s(k, odometer.used[k])).sum();
            for (l, prefix) in next.iter_mut().enumerate().take(most + 1).skip(least) {
                let rest_s = rest.least_s(l, all_gain_s - used_gain_s).max(self.rest_s[l]);
                if *prefix + rest_s > bound {
                    *prefix = f64::INFINITY;
                }
            }
            let first = (least..=most).find(|&l| next[l].is_finite());
            let last = (least..=most).rev().find(|&l| next[l].is_finite());
            if let (Some(first), Some(last)) = (first, last) {
                rows.put(state, first..=last, &next[first..=last]);
            }
        }
        // A lone stage has no hop: `arrangement` reckons it right.
        Some(self.arrangement(self.trace(&grid, &froms, &rows, whole?.1)?))
    }

    /// Prefixes of a row go on through given stages; returns the length of the longest.
    fn bridge_counts(&self, lengths: RangeInclusive<usize>, end: usize, hop: f64, row: &mut [f64]) -> usize {
        let mut longest = *lengths.end();
        for &(k, from, to) in &self.given.stages {
            if (*lengths.start()..=longest).contains(&from) && to <= end {
                let prefix = std::mem::replace(&mut row[from], f64::INFINITY);
                row[longest + 1..=end.max(longest)].fill(f64::INFINITY);
                longest = longest.max(to);
                row[to] = prefix + hop + self.stage_s(k, from, to);
            }
        }
        longest
    }

    /// The stages of the best way to all layers with these machines.
    fn trace(&self, grid: &Grid, froms: &[Vec<usize>], rows: &Rows, mut state: usize) -> Option<Vec<Stage>> {
        let (mut stages, mut end) = (Vec::new(), self.n);
        let mut before = vec![f64::INFINITY; self.n + 1];
        while end > 0 {
            if let Some((k, start)) = self.given.ending(end) {
                stages.push((k, start, end));
                end = start;
                continue;
            }
            let mut best: Option<(f64, Stage)> = None;
            for k in self.movable().filter(|&k| grid.used(state, k) > 0) {
                let Some((first, values)) = rows.get(state - grid.strides[k]) else { continue };
                before.fill(f64::INFINITY);
                before[first..first + values.len()].copy_from_slice(values);
                let Some(start) = self.start_of(k, Goal::Way, froms, &before, end) else { continue };
                let value = before[start] + self.stage_s(k, start, end);
                if best.is_none_or(|b| value < b.0) {
                    best = Some((value, (k, start, end)));
                }
            }
            let (_, stage) = best?;
            stages.push(stage);
            (state, end) = (state - grid.strides[stage.0], stage.1);
        }
        stages.reverse();
        Some(stages)
    }
}

/// Of each state the prefixes worth keeping, one state's after the other's: few states have many.
struct Rows {
    /// The shortest of them, and where they lie.
    spans: Vec<Option<(usize, Range<usize>)>>,
    cells: Vec<f64>,
}

impl Rows {
    fn put(&mut self, state: usize, lengths: RangeInclusive<usize>, values: &[f64]) {
        let at = self.cells.len();
        self.cells.extend_from_slice(values);
        self.spans[state] = Some((*lengths.start(), at..self.cells.len()));
    }

    fn get(&self, state: usize) -> Option<(usize, &[f64])> {
        let (first, at) = self.spans[state].clone()?;
        Some((first, &self.cells[at]))
    }
}
