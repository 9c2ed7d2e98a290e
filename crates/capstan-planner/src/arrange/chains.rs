//! The search where links differ: a state also knows which kind came last, and the search is made for each first one,
//! for the ring closes.
use super::Arrangement;
use super::grid::Grid;
use super::search::{Goal, Search, Stage, Step};

/// What does not change from one first machine to the next.
struct Chains<'s> {
    search: &'s Search<'s>,
    goal: Goal,
    cap: f64,
    bound: f64,
    grid: Grid,
    froms: Vec<Vec<usize>>,
    /// The stages with which every chain begins because they are given, as a row of prefixes.
    origin: Vec<f64>,
}

impl Search<'_> {
    /// The best of at most `bound` whose stages and links take no longer than `cap`.
    pub fn over_chains(&self, goal: Goal, cap: f64, bound: f64) -> Option<Arrangement> {
        let mut origin = vec![f64::INFINITY; self.n + 1];
        origin[0] = 0.0;
        let (grid, froms) = (Grid::new(&self.counts)?, self.froms(cap));
        let mut chains = Chains { search: self, goal, cap, bound, grid, froms, origin };
        let mut origin = std::mem::take(&mut chains.origin);
        chains.bridge(&mut origin, None);
        chains.origin = origin;
        let firsts: Vec<usize> = self.given.first().map_or_else(|| self.movable().collect(), |k| vec![k]);
        let found = firsts.into_iter().filter_map(|first| chains.from(first));
        found.min_by(|a, b| self.value(goal, a).total_cmp(&self.value(goal, b)))
    }
}

impl Chains<'_> {
    /// The kind before a stage that starts here, when `last` was placed last.
    fn source(&self, last: Option<usize>, start: usize) -> Option<usize> {
        self.search.given.ending(start).map(|(k, _)| k).or(last)
    }

    /// What the hop to a stage of kind `k` that starts here costs; nothing before the first, none where it is too slow.
    fn hop(&self, last: Option<usize>, start: usize, k: usize) -> Option<f64> {
        match self.source(last, start) {
            Some(from) if self.search.hop_exceeds(from, k, self.cap) => None,
            from => Some(from.map_or(0.0, |from| self.search.hop(self.goal, from, k))),
        }
    }

    fn bridge(&self, row: &mut [f64], last: Option<usize>) {
        self.search.given.bridge(self.goal, row, |(k, a, b)| {
            Some(self.goal.join(self.hop(last, a, k)?, self.search.stage_s(k, a, b)))
        });
    }

    fn row(&self, state: usize, last: usize) -> usize {
        (state * self.search.counts.len() + last) * (self.search.n + 1)
    }

    /// What may come before a stage of kind `k`, hops included.
    fn before(&self, table: &[f64], state: usize, k: usize) -> Vec<f64> {
        let n = self.search.n;
        let mut before = vec![f64::INFINITY; n + 1];
        let mut join = |row: &[f64], last: Option<usize>| {
            for (l, (to, &prefix)) in before.iter_mut().zip(row).enumerate().filter(|(_, (_, p))| p.is_finite()) {
                if let Some(hop) = self.hop(last, l, k) {
                    *to = to.min(self.goal.join(prefix, hop));
                }
            }
        };
        if state == 0 {
            join(&self.origin, None);
        }
        for last in self.lasts(state) {
            join(&table[self.row(state, last)..=self.row(state, last) + n], Some(last));
        }
        // The whole on fewer machines is no prefix of anything.
        before[n] = f64::INFINITY;
        before
    }

    fn lasts(&self, state: usize) -> impl Iterator<Item = usize> + '_ {
        self.search.movable().filter(move |&k| self.grid.used(state, k) > 0)
    }

    /// The best chain that begins with this kind.
    fn from(&self, first: usize) -> Option<Arrangement> {
        let (search, grid, goal, n) = (self.search, &self.grid, self.goal, self.search.n);
        // A given stage comes first whatever the state; else the first machine is in each.
        let given = search.given.first().is_some();
        let begins = |state: usize, k: usize| state == grid.strides[k] && (given || k == first);
        let mut table = vec![f64::INFINITY; grid.states * search.counts.len() * (n + 1)];
        let (mut next, mut queue) = (vec![f64::INFINITY; n + 1], Vec::new());
        for state in 1..grid.states {
            for k in self.lasts(state) {
                let from = state - grid.strides[k];
                if !(begins(state, k) || from > 0 && (given || grid.used(from, first) > 0)) {
                    continue;
                }
                let mut before = self.before(&table, from, k);
                for (l, b) in before.iter_mut().enumerate() {
                    if search.hopeless(goal, l, *b, self.bound) {
                        *b = f64::INFINITY;
                    }
                }
                if before.iter().all(|b| b.is_infinite()) {
                    continue;
                }
                next.fill(f64::INFINITY);
                let step = Step { k, goal, froms: &self.froms[k], before: &before, shortest: 0, ends: 1..=n };
                search.extend(&step, &mut next, &mut queue);
                self.bridge(&mut next, Some(k));
                let at = self.row(state, k);
                table[at..=at + n].copy_from_slice(&next);
            }
        }
        // The ring closes from the last to the first; one machine has no ring and is known as `whole`.
        let mut best: Option<(f64, usize, usize)> = None;
        let mut offer = |prefix: f64, state: usize, last: Option<usize>| {
            let Some(hop) = self.hop(last, n, first) else { return };
            let value = goal.join(prefix, hop);
            if value.is_finite() && best.is_none_or(|b| value < b.0) && search.enough(|k| grid.used(state, k)) {
                best = Some((value, state, last.unwrap_or(first)));
            }
        };
        offer(self.origin[n], 0, None);
        for state in 1..grid.states {
            for last in self.lasts(state) {
                if begins(state, last) && search.given.stages.is_empty() {
                    continue;
                }
                offer(table[self.row(state, last) + n], state, Some(last));
            }
        }
        let (_, state, last) = best?;
        Some(search.arrangement(self.trace(&table, state, last)?))
    }

    fn trace(&self, table: &[f64], mut state: usize, mut last: usize) -> Option<Vec<Stage>> {
        let (search, goal) = (self.search, self.goal);
        let (mut stages, mut end) = (Vec::new(), search.n);
        while end > 0 {
            if let Some((k, start)) = search.given.ending(end) {
                stages.push((k, start, end));
                end = start;
                continue;
            }
            let from = state.checked_sub(self.grid.strides[last])?;
            let start = search.start_of(last, goal, &self.froms, &self.before(table, from, last), end)?;
            stages.push((last, start, end));
            let value = |p: usize| {
                let hop = self.hop(Some(p), start, last).unwrap_or(f64::INFINITY);
                goal.join(table[self.row(from, p) + start], hop)
            };
            let prior = self.lasts(from).filter(|&p| value(p).is_finite());
            // None before the first: what is left then is given.
            last = prior.min_by(|&a, &b| value(a).total_cmp(&value(b))).unwrap_or(last);
            (state, end) = (from, start);
        }
        stages.reverse();
        Some(stages)
    }
}
