//! The search behind [`arrange`](super::arrange()).
use std::ops::{Range, RangeInclusive};

use capstan_proto::LayerRange;

use super::rest::Rest;
use super::{Arrangement, Kind, Problem, ROUNDING};

/// Most steps of an exact search, each a few nanoseconds: seconds on a slow machine.
const STEPS_MAX: f64 = 1.2e9;
/// From so many states on a better guess pays for itself.
const IMPROVE_STATES: f64 = 2000.0;
/// How often a guess is gone through for exchanges that make it better.
const IMPROVE_ROUNDS: usize = 3;
/// Most numbers that it keeps: 256 MiB.
const CELLS_MAX: f64 = 3.2e7;

#[derive(Clone, Copy, PartialEq)]
pub(super) enum Goal {
    /// Times add up.
    Way,
    /// The largest counts.
    Slowest,
}

impl Goal {
    fn join(self, a: f64, b: f64) -> f64 {
        match self {
            Self::Way => a + b,
            Self::Slowest => a.max(b),
        }
    }
}

pub(super) struct Search<'a> {
    pub(super) problem: &'a Problem<'a>,
    pub(super) n: usize,
    /// Of each kind: the time of the first `l` layers.
    upto: Vec<Vec<f64>>,
    /// Of each kind and end: the first start from which a window fits its memory; the end itself when none does.
    fits_from: Vec<Vec<usize>>,
    /// Which windows may be stages, row by row of starts; empty when all may.
    allowed: Vec<bool>,
    uniform: bool,
    /// Of each layer: a time that all after it take at least.
    pub(super) rest_s: Vec<f64>,
    /// What the head takes at least.
    pub(super) least_head_s: f64,
}

/// One more stage for each of some prefixes.
struct Step<'s> {
    /// The kind of its machine.
    k: usize,
    goal: Goal,
    /// First starts of that kind's windows, by end.
    froms: &'s [usize],
    /// Longer prefixes never cost less.
    monotone: bool,
    /// Which prefixes count.
    starts: RangeInclusive<usize>,
    /// Which ends are of use.
    ends: RangeInclusive<usize>,
}

impl<'a> Search<'a> {
    pub(super) fn new(problem: &'a Problem<'a>) -> Option<Self> {
        let n = problem.layers as usize;
        if n == 0 || problem.kinds.iter().any(|k| k.layers_s.len() != n) || problem.kinds.iter().all(|k| k.count == 0) {
            return None;
        }
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
                while start < end && range(start, end).is_some_and(|r| (problem.need_bytes)(r) > k.usable_bytes) {
                    start += 1;
                }
                *first = start;
            }
            from
        };
        let least = |of: &dyn Fn(&Kind) -> f64| problem.kinds.iter().map(of).fold(f64::INFINITY, f64::min);
        let least_head_s = least(&|k| k.head_s);
        let mut rest_s = vec![0.0; n + 1];
        for l in (0..n).rev() {
            let after = if l + 1 == n { least_head_s } else { rest_s[l + 1] };
            rest_s[l] = after + least(&|k| k.layers_s[l]);
        }
        Some(Self {
            problem,
            n,
            upto: problem.kinds.iter().map(upto).collect(),
            fits_from: problem.kinds.iter().map(fits_from).collect(),
            allowed,
            uniform: problem.hops.is_uniform(),
            rest_s,
            least_head_s,
        })
    }

    fn may(&self, start: usize, end: usize) -> bool {
        self.allowed.is_empty() || self.allowed[start * (self.n + 1) + end]
    }

    /// What a stage of kind `k` takes for `start..end`.
    fn stage_s(&self, k: usize, start: usize, end: usize) -> f64 {
        let head = if end == self.n { self.problem.kinds[k].head_s } else { 0.0 };
        (self.upto[k][end] - self.upto[k][start]) + head
    }

    /// Of each kind and end: the first start from which a window fits its memory and takes no longer than `cap`.
    fn froms(&self, cap: f64) -> Vec<Vec<usize>> {
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

    fn hop(&self, goal: Goal, a: usize, b: usize) -> f64 {
        let hops = self.problem.hops;
        if goal == Goal::Way { hops.way_s[a][b] } else { hops.wire_s[a][b] }
    }

    /// Whether a hop is too slow for the cap.
    fn hop_exceeds(&self, a: usize, b: usize, cap: f64) -> bool {
        self.problem.hops.wire_s[a][b] > cap
    }

    /// Extends prefixes by one stage each: `next[end] = min over start of before[start] joined with it`.
    fn extend(&self, step: &Step, before: &[f64], next: &mut [f64], queue: &mut Vec<usize>) {
        let &Step { k, goal, froms, monotone, ref starts, ref ends } = step;
        let upto = &self.upto[k];
        queue.clear();
        let mut front = 0;
        let (mut pushed, mut cross) = (*starts.start(), *starts.start());
        for end in ends.clone() {
            let from = froms[end].max(*starts.start());
            let last = end.min(*starts.end() + 1);
            if from >= last {
                continue;
            }
            let mut found = f64::INFINITY;
            if !self.allowed.is_empty() || goal == Goal::Slowest && !monotone {
                for (start, &prefix) in before.iter().enumerate().take(last).skip(from) {
                    if prefix.is_finite() && self.may(start, end) {
                        found = found.min(goal.join(prefix, self.stage_s(k, start, end)));
                    }
                }
            } else if goal == Goal::Way {
                // A queue of starts whose prefixes get dearer, relative to what the machine saves by starting later.
                let relative = |start: usize| before[start] - upto[start];
                while pushed < last {
                    if before[pushed].is_finite() {
                        while queue.len() > front && relative(queue[queue.len() - 1]) >= relative(pushed) {
                            queue.pop();
                        }
                        queue.push(pushed);
                    }
                    pushed += 1;
                }
                while front < queue.len() && queue[front] < from {
                    front += 1;
                }
                if let Some(&start) = queue.get(front) {
                    found = before[start] + self.stage_s(k, start, end);
                }
            } else {
                while cross < last && before[cross] < self.stage_s(k, cross, end) {
                    cross += 1;
                }
                for start in [cross.saturating_sub(1).max(from), cross.max(from)] {
                    if start < last {
                        found = found.min(before[start].max(self.stage_s(k, start, end)));
                    }
                }
            }
            next[end] = next[end].min(found);
        }
    }

    /// The exact best, or the best of plausible orders where that would take too long.
    pub(super) fn best(&self, goal: Goal, cap: f64) -> Option<Arrangement> {
        let kinds = self.problem.kinds;
        let states: f64 = kinds.iter().map(|k| k.count as f64 + 1.0).product();
        let mut guess = self.guess(goal, cap);
        if states > IMPROVE_STATES {
            guess = guess.map(|g| self.improved(g, goal, cap));
        }
        let width = self.n as f64 + 1.0;
        let (per_step, chains) = match (self.uniform, self.allowed.is_empty()) {
            (true, true) => (8.0 * width, 1.0),
            (true, false) => (width * width / 2.0, 1.0),
            (false, _) => (width * width / 2.0, kinds.len() as f64),
        };
        let steps = states * kinds.len() as f64 * per_step * chains;
        if steps > STEPS_MAX || states * width * chains > CELLS_MAX {
            return guess.map(|g| Arrangement { exact: false, ..g });
        }
        let bound = guess.as_ref().map_or(f64::INFINITY, |g| self.value(goal, g)) * (1.0 + ROUNDING);
        let whole = self.whole(goal, cap);
        let split = if self.uniform { self.over_counts(goal, cap, bound) } else { self.over_chains(goal, cap, bound) };
        // Equally good: the one with fewer machines, and that of the guess is as good as any.
        let better = |a: Option<Arrangement>, b: Option<Arrangement>| match (a, b) {
            (Some(a), Some(b)) => {
                Some(if self.value(goal, &b) < self.value(goal, &a) * (1.0 - ROUNDING) { b } else { a })
            }
            (a, b) => a.or(b),
        };
        better(better(whole, split), guess)
    }

    fn value(&self, goal: Goal, a: &Arrangement) -> f64 {
        if goal == Goal::Way { a.way_s } else { a.slowest_s }
    }

    /// All layers on one machine.
    fn whole(&self, goal: Goal, cap: f64) -> Option<Arrangement> {
        let froms = self.froms(cap);
        let held = |k: &usize| self.problem.kinds[*k].count > 0 && froms[*k][self.n] == 0;
        let found = (0..self.problem.kinds.len()).filter(held).map(|k| self.arrangement(vec![(k, 0, self.n)]));
        found.min_by(|a, b| self.value(goal, a).total_cmp(&self.value(goal, b)))
    }

    /// Cuts of a few orders that are often the best.
    fn guess(&self, goal: Goal, cap: f64) -> Option<Arrangement> {
        let kinds = self.problem.kinds;
        let by = |key: &dyn Fn(&Kind) -> f64| {
            let mut order: Vec<usize> = (0..kinds.len()).collect();
            order.sort_by(|&a, &b| key(&kinds[a]).total_cmp(&key(&kinds[b])));
            order.into_iter().flat_map(|k| std::iter::repeat_n(k, kinds[k].count)).collect::<Vec<_>>()
        };
        let speed = |k: &Kind| k.layers_s.iter().sum::<f64>();
        let orders = [by(&speed), by(&|k| -(k.usable_bytes as f64)), by(&|k| speed(k) / (k.usable_bytes as f64 + 1.0))];
        let mut best: Option<Arrangement> = None;
        for order in &orders {
            // With few machines every number of them is worth a look, with many only some.
            let step = (order.len() / 12).max(1);
            for used in (1..=order.len().min(self.n)).step_by(step).chain([order.len().min(self.n)]) {
                for turned in [false, true] {
                    let mut tried = order[..used].to_vec();
                    if turned {
                        tried.reverse();
                    }
                    let found = self.cut(&tried, goal, cap);
                    if let Some(f) = found
                        && best.as_ref().is_none_or(|b| self.value(goal, &f) < self.value(goal, b) * (1.0 - ROUNDING))
                    {
                        best = Some(f);
                    }
                }
            }
        }
        best
    }

    /// Exchanges machines, with each other and with unused ones, as long as that helps.
    fn improved(&self, mut best: Arrangement, goal: Goal, cap: f64) -> Arrangement {
        let mut order: Vec<usize> = best.stages.iter().map(|s| s.0).collect();
        for _ in 0..IMPROVE_ROUNDS {
            let value = self.value(goal, &best);
            for i in 0..order.len() {
                for other in (0..order.len() + self.problem.kinds.len()).filter(|&o| o > i) {
                    let mut tried = order.clone();
                    match other.checked_sub(order.len()) {
                        None => tried.swap(i, other),
                        Some(k) if order.iter().filter(|&&o| o == k).count() < self.problem.kinds[k].count => {
                            tried[i] = k
                        }
                        Some(_) => continue,
                    }
                    if tried == order {
                        continue;
                    }
                    if let Some(found) = self.cut(&tried, goal, cap)
                        && self.value(goal, &found) < self.value(goal, &best) * (1.0 - ROUNDING)
                    {
                        (best, order) = (found, tried);
                    }
                }
            }
            if self.value(goal, &best) >= value {
                break;
            }
        }
        best
    }

    /// The best cut over machines in this order, all used.
    pub(super) fn cut(&self, order: &[usize], goal: Goal, cap: f64) -> Option<Arrangement> {
        let (n, froms) = (self.n, self.froms(cap));
        let (mut rows, mut queue) = (vec![vec![f64::INFINITY; n + 1]], Vec::new());
        rows[0][0] = 0.0;
        for (i, &k) in order.iter().enumerate() {
            let mut before = rows[i].clone();
            if i > 0 {
                if self.hop_exceeds(order[i - 1], k, cap) {
                    return None;
                }
                let hop = self.hop(goal, order[i - 1], k);
                before.iter_mut().for_each(|b| *b = goal.join(*b, hop));
            }
            let mut next = vec![f64::INFINITY; n + 1];
            let step = Step { k, goal, froms: &froms[k], monotone: false, starts: i..=n, ends: i + 1..=n };
            self.extend(&step, &before, &mut next, &mut queue);
            if i + 1 < order.len() {
                next[n] = f64::INFINITY;
            }
            rows.push(next);
        }
        if !rows[order.len()][n].is_finite() {
            return None;
        }
        let (first, last) = (*order.first()?, *order.last()?);
        if order.len() > 1 && self.hop_exceeds(last, first, cap) {
            return None;
        }
        let (mut stages, mut end) = (Vec::new(), n);
        for i in (0..order.len()).rev() {
            let hop = if i > 0 { self.hop(goal, order[i - 1], order[i]) } else { 0.0 };
            let before: Vec<f64> = rows[i].iter().map(|&b| if i > 0 { goal.join(b, hop) } else { b }).collect();
            let start = self.start_of(order[i], goal, &froms, &before, end)?;
            stages.push((order[i], start, end));
            end = start;
        }
        stages.reverse();
        Some(self.arrangement(stages))
    }

    /// The best start of a stage that ends here.
    fn start_of(&self, k: usize, goal: Goal, froms: &[Vec<usize>], before: &[f64], end: usize) -> Option<usize> {
        let ways = (froms[k][end]..end).filter(|&s| before[s].is_finite() && self.may(s, end));
        let value = |s: usize| goal.join(before[s], self.stage_s(k, s, end));
        ways.min_by(|&a, &b| value(a).total_cmp(&value(b)))
    }

    /// Links are all alike: which machine came last does not matter. For the slowest stage a state may leave machines
    /// unused, so that values never fall as layers are added, which the fast step needs.
    fn over_counts(&self, goal: Goal, cap: f64, bound: f64) -> Option<Arrangement> {
        let (n, kinds) = (self.n, self.problem.kinds);
        let hop = self.hop(goal, 0, 0);
        if self.hop_exceeds(0, 0, cap) {
            return None;
        }
        let strides: Vec<usize> = kinds
            .iter()
            .scan(1, |stride, k| {
                let this = *stride;
                *stride *= k.count + 1;
                Some(this)
            })
            .collect();
        let states: usize = kinds.iter().map(|k| k.count + 1).product();
        let used = |state: usize, k: usize| state / strides[k] % (kinds[k].count + 1);
        let froms = self.froms(if goal == Goal::Slowest { cap.min(bound) } else { cap });
        let rest = Rest::new(self, &froms, if goal == Goal::Way { hop } else { 0.0 });
        let total: usize = kinds.iter().zip(&rest.reach).map(|(k, reach)| k.count * reach).sum();
        // The most layers that the machines of a state can hold; those left over must be able to hold the others.
        let mut held = vec![0usize; states];
        let band = |held: usize| n.saturating_sub(total - held)..=held.min(n);
        let mut rows = Rows { spans: vec![None; states], cells: Vec::new() };
        rows.put(0, 0..=0, &[0.0]);
        let mut before = vec![f64::INFINITY; n + 1];
        let (mut next, mut queue) = (vec![f64::INFINITY; n + 1], Vec::new());
        let mut whole: Option<(f64, usize)> = None;
        // How many of each kind the state uses, counted on like an odometer: dividing would take most of the time.
        let mut counts = vec![0usize; kinds.len()];
        for state in 1..states {
            for (count, kind) in counts.iter_mut().zip(kinds) {
                *count += 1;
                if *count <= kind.count {
                    break;
                }
                *count = 0;
            }
            let present = |k: &usize| counts[*k] > 0;
            let any = (0..kinds.len()).find(present).unwrap_or(0);
            held[state] = held[state - strides[any]] + rest.reach[any];
            let ends = band(held[state]);
            let present = |k: &usize| present(k) && rows.spans[state - strides[*k]].is_some();
            if ends.is_empty() || !(0..kinds.len()).any(|k| present(&k)) {
                continue;
            }
            next.fill(f64::INFINITY);
            for k in (0..kinds.len()).filter(present) {
                let Some((first, values)) = rows.get(state - strides[k]) else { continue };
                let last = first + values.len() - 1;
                before[first..=last].copy_from_slice(values);
                let starts = first..=last;
                let ends = (*ends.start()).max(first + 1)..=(*ends.end()).min(last + rest.reach[k]);
                let step = Step { k, goal, froms: &froms[k], monotone: true, starts, ends };
                self.extend(&step, &before, &mut next, &mut queue);
            }
            // Every stage of a pipeline has a hop before it: the first one's closes the ring.
            next[ends.clone()].iter_mut().for_each(|to| *to = goal.join(*to, hop));
            for k in (0..kinds.len()).filter(|k| goal == Goal::Slowest && present(k)) {
                let Some((first, values)) = rows.get(state - strides[k]) else { continue };
                for (to, &unused) in next[first..].iter_mut().zip(values) {
                    *to = to.min(unused);
                }
            }
            // What is complete is no prefix of anything.
            if next[n].is_finite() && whole.is_none_or(|w| next[n] < w.0) {
                whole = Some((next[n], state));
            }
            next[n] = f64::INFINITY;
            let left = |k: usize| kinds[k].count - counts[k];
            rest.discard(self, goal, ends.clone(), left, bound, &mut next);
            let first = ends.clone().find(|&l| next[l].is_finite());
            let last = ends.rev().find(|&l| next[l].is_finite());
            if let (Some(first), Some(last)) = (first, last) {
                rows.put(state, first..=last, &next[first..=last]);
            }
        }
        let (mut state, mut end) = (whole?.1, n);
        let mut stages = Vec::new();
        while end > 0 {
            // What came before: the value, the kind, where its stage starts; at the end itself when it is not used.
            let mut best: Option<(f64, usize, usize)> = None;
            for k in (0..kinds.len()).filter(|&k| used(state, k) > 0 && rows.spans[state - strides[k]].is_some()) {
                let Some((first, values)) = rows.get(state - strides[k]) else { continue };
                before.fill(f64::INFINITY);
                before[first..first + values.len()].copy_from_slice(values);
                let placed = self.start_of(k, goal, &froms, &before, end);
                let placed = placed.map(|s| (goal.join(goal.join(before[s], self.stage_s(k, s, end)), hop), k, s));
                let unused = (goal == Goal::Slowest).then_some((before[end], k, end));
                for offer in [unused, placed].into_iter().flatten() {
                    if offer.0.is_finite() && best.is_none_or(|b| offer.0 < b.0) {
                        best = Some(offer);
                    }
                }
            }
            let (_, k, start) = best?;
            if start < end {
                stages.push((k, start, end));
            }
            (state, end) = (state - strides[k], start);
        }
        stages.reverse();
        // A lone stage has no hop: `arrangement` reckons it right.
        Some(self.arrangement(stages))
    }

    /// Links differ: a state also knows the last kind, and the search is made for each first one.
    fn over_chains(&self, goal: Goal, cap: f64, bound: f64) -> Option<Arrangement> {
        let found = (0..self.problem.kinds.len()).filter_map(|first| self.chain_from(first, goal, cap, bound));
        found.min_by(|a, b| self.value(goal, a).total_cmp(&self.value(goal, b)))
    }

    fn chain_from(&self, first: usize, goal: Goal, cap: f64, bound: f64) -> Option<Arrangement> {
        let (n, kinds) = (self.n, self.problem.kinds);
        let m = kinds.len();
        if kinds[first].count == 0 {
            return None;
        }
        let mut strides = vec![1];
        for k in kinds {
            strides.push(strides[strides.len() - 1] * (k.count + 1));
        }
        let states = strides[m];
        let used = |state: usize, k: usize| state / strides[k] % (kinds[k].count + 1);
        let row = |state: usize, last: usize| (state * m + last) * (n + 1);
        let mut table = vec![f64::INFINITY; states * m * (n + 1)];
        let mut start = vec![f64::INFINITY; n + 1];
        start[0] = 0.0;
        let at = row(strides[first], first);
        let mut next = vec![f64::INFINITY; n + 1];
        let (froms, mut queue) = (self.froms(cap), Vec::new());
        let step = |k: usize| Step { k, goal, froms: &froms[k], monotone: false, starts: 0..=n, ends: 1..=n };
        self.extend(&step(first), &start, &mut next, &mut queue);
        table[at..=at + n].copy_from_slice(&next);
        let before_of = |table: &[f64], state: usize, k: usize| {
            let mut before = vec![f64::INFINITY; n + 1];
            for last in (0..m).filter(|&last| used(state, last) > 0 && !self.hop_exceeds(last, k, cap)) {
                let hop = self.hop(goal, last, k);
                for (to, &b) in before.iter_mut().zip(&table[row(state, last)..=row(state, last) + n]) {
                    *to = to.min(goal.join(b, hop));
                }
            }
            // The whole on fewer machines is no prefix of anything.
            before[n] = f64::INFINITY;
            before
        };
        for state in 0..states {
            for k in (0..m).filter(|&k| used(state, k) > 0) {
                let from = state - strides[k];
                if used(from, first) == 0 {
                    continue;
                }
                let mut before = before_of(&table, from, k);
                for (l, b) in before.iter_mut().enumerate() {
                    if *b + if goal == Goal::Way { self.rest_s[l] } else { 0.0 } > bound {
                        *b = f64::INFINITY;
                    }
                }
                if before.iter().all(|b| b.is_infinite()) {
                    continue;
                }
                next.fill(f64::INFINITY);
                self.extend(&step(k), &before, &mut next, &mut queue);
                let at = row(state, k);
                for (to, &value) in table[at..=at + n].iter_mut().zip(&next) {
                    *to = to.min(value);
                }
            }
        }
        // The ring closes from the last to the first; one machine has no ring and is known as `whole`.
        let total: usize = kinds.iter().map(|k| k.count).sum();
        let mut best: Option<(f64, usize, usize)> = None;
        for state in (0..states).filter(|&s| total > 1 && s != strides[first] && used(s, first) > 0) {
            for last in (0..m).filter(|&k| used(state, k) > 0 && !self.hop_exceeds(k, first, cap)) {
                let value = goal.join(table[row(state, last) + n], self.hop(goal, last, first));
                if value.is_finite() && best.is_none_or(|b| value < b.0) {
                    best = Some((value, state, last));
                }
            }
        }
        let (_, mut state, mut last) = best?;
        let (mut stages, mut end) = (Vec::new(), n);
        while state != strides[first] {
            let from = state - strides[last];
            let before = before_of(&table, from, last);
            let start = self.start_of(last, goal, &froms, &before, end)?;
            stages.push((last, start, end));
            let value = |p: usize| goal.join(table[row(from, p) + start], self.hop(goal, p, last));
            let prior =
                (0..m).filter(|&p| used(from, p) > 0 && !self.hop_exceeds(p, last, cap) && value(p).is_finite());
            let prior = prior.min_by(|&a, &b| value(a).total_cmp(&value(b)))?;
            (state, last, end) = (from, prior, start);
        }
        stages.push((first, 0, end));
        stages.reverse();
        Some(self.arrangement(stages))
    }

    /// The stages with their times, reckoned anew.
    fn arrangement(&self, stages: Vec<(usize, usize, usize)>) -> Arrangement {
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
        let range = |&(k, a, b): &(usize, usize, usize)| LayerRange::new(a as u32, b as u32).ok().map(|r| (k, r));
        Arrangement { stages: stages.iter().filter_map(range).collect(), way_s, slowest_s, exact: true }
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
