//! First guesses: cuts of orders that are often the best. What cannot become better than a guess need not be searched.
use super::search::{Goal, Search, Stage, Step};
use super::{Arrangement, Kind, ROUNDING};

/// How often a guess is gone through for exchanges that make it better.
const IMPROVE_ROUNDS: usize = 3;
/// Halvings of what the slowest stage may take, until it is even but for a thousandth.
const EVENING_ROUNDS: usize = 12;
/// Numbers of machines of an order that are tried, at most about so many.
const NUMBERS: usize = 12;

impl Search<'_> {
    /// All machines that may be placed, in plausible orders.
    pub fn orders(&self) -> [Vec<usize>; 3] {
        let kinds = self.problem.kinds;
        let by = |key: &dyn Fn(&Kind) -> f64| {
            let mut order: Vec<usize> = self.movable().collect();
            order.sort_by(|&a, &b| key(&kinds[a]).total_cmp(&key(&kinds[b])));
            order.into_iter().flat_map(|k| std::iter::repeat_n(k, self.counts[k])).collect::<Vec<_>>()
        };
        let speed = |k: &Kind| k.layers_s.iter().sum::<f64>();
        [by(&speed), by(&|k| -(k.usable_bytes as f64)), by(&|k| speed(k) / (k.usable_bytes as f64 + 1.0))]
    }

    /// Cuts of a few orders that are often the best.
    pub fn guess(&self, goal: Goal, cap: f64) -> Option<Arrangement> {
        let froms = self.froms(cap);
        let mut best: Option<Arrangement> = None;
        for order in &self.orders() {
            let must = self.musts(order);
            let required = must.iter().filter(|m| **m).count();
            // With few machines every number of them is worth a look, with many only some.
            let (step, most) = ((order.len() / NUMBERS).max(1), order.len().min(self.n));
            for used in (required.max(1)..=most).step_by(step).chain([most]) {
                let mut spare = used.saturating_sub(required);
                let mut taken = |must: bool| {
                    let free = !must && spare > 0;
                    spare -= usize::from(free);
                    must || free
                };
                let mut tried: Vec<_> = order.iter().zip(&must).filter(|(_, m)| taken(**m)).map(|(k, _)| *k).collect();
                for _ in 0..2 {
                    let found = self.cut(&tried, goal, cap, &froms);
                    if let Some(f) = found
                        && best.as_ref().is_none_or(|b| self.value(goal, &f) < self.value(goal, b) * (1.0 - ROUNDING))
                    {
                        best = Some(f);
                    }
                    tried.reverse();
                }
            }
        }
        best
    }

    /// Which machines of an order must be used: the first ones of each kind.
    fn musts(&self, order: &[usize]) -> Vec<bool> {
        let mut left: Vec<usize> = self.problem.kinds.iter().map(|k| k.required).collect();
        let must = |&k: &usize| {
            let must = left[k] > 0;
            left[k] -= usize::from(must);
            must
        };
        order.iter().map(must).collect()
    }

    /// Exchanges machines, with each other and with unused ones, as long as that helps.
    pub fn improved(&self, mut best: Arrangement, goal: Goal, cap: f64) -> Arrangement {
        let froms = self.froms(cap);
        let movable = |k: &usize| self.counts[*k] > 0;
        let mut order: Vec<usize> = best.stages.iter().map(|s| s.0).filter(movable).collect();
        for _ in 0..IMPROVE_ROUNDS {
            let value = self.value(goal, &best);
            for i in 0..order.len() {
                for other in i + 1..order.len() + self.counts.len() {
                    let mut tried = order.clone();
                    let uses = |order: &[usize], k: usize| order.iter().filter(|&&o| o == k).count();
                    match other.checked_sub(order.len()) {
                        None => tried.swap(i, other),
                        Some(k) if uses(&order, k) < self.counts[k] => tried[i] = k,
                        Some(_) => continue,
                    }
                    if tried == order || !self.enough(|k| uses(&tried, k)) {
                        continue;
                    }
                    if let Some(found) = self.cut(&tried, goal, cap, &froms)
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

    /// Cut anew, in the same order, so that the slowest stage is as fast as it can be while the way stays as short: among
    /// machines that are alike every cut has the same way, and prompts go through an even one sooner.
    pub fn evened(&self, found: Arrangement) -> Arrangement {
        let order: Vec<usize> = found.stages.iter().map(|s| s.0).filter(|&k| self.counts[k] > 0).collect();
        let longest_s = found.way_s * (1.0 + ROUNDING);
        let (mut best, mut low) = (found, 0.0);
        for _ in 0..EVENING_ROUNDS {
            let cap = low + (best.slowest_s - low) / 2.0;
            match self.cut(&order, Goal::Way, cap, &self.froms(cap)).filter(|c| c.way_s <= longest_s) {
                Some(evener) => best = Arrangement { exact: best.exact, ..evener },
                None => low = cap,
            }
        }
        best
    }

    /// The best cut over machines in this order, all used, with the given stages between them.
    pub fn cut(&self, order: &[usize], goal: Goal, cap: f64, froms: &[Vec<usize>]) -> Option<Arrangement> {
        let (n, used) = (self.n, order.len());
        // How long prefixes of so many machines can be, and must be for the others to hold the rest.
        let (mut most, mut least) = (vec![self.given.after(0); used + 1], vec![self.given.before(n); used + 1]);
        for (i, &k) in order.iter().enumerate() {
            let furthest = froms[k].partition_point(|&from| from <= most[i]) - 1;
            most[i + 1] = self.given.after(furthest.max(most[i]));
        }
        for (i, &k) in order.iter().enumerate().rev() {
            least[i] = self.given.before(froms[k][least[i + 1]]);
        }
        if most[used] < n || least[0] > 0 {
            return None;
        }
        // The machine before this one, for a prefix of this length.
        let source =
            |i: usize, l: usize| self.given.ending(l).map(|(k, _)| k).or_else(|| Some(order[i.checked_sub(1)?]));
        let hop = |from: Option<usize>, to: usize| match from {
            Some(from) if self.hop_exceeds(from, to, cap) => None,
            from => Some(from.map_or(0.0, |from| self.hop(goal, from, to))),
        };
        let bridge = |i: usize, row: &mut [f64]| {
            self.given.bridge(goal, row, |(k, a, b)| Some(goal.join(hop(source(i, a), k)?, self.stage_s(k, a, b))));
        };
        let (mut rows, mut queue) = (Vec::with_capacity(used + 1), Vec::new());
        let mut row = vec![f64::INFINITY; n + 1];
        row[0] = 0.0;
        bridge(0, &mut row);
        rows.push(row);
        let with_hop = |rows: &[Vec<f64>], i: usize, k: usize| -> Vec<f64> {
            let joined = |l: usize| hop(source(i, l), k).map_or(f64::INFINITY, |h| goal.join(rows[i][l], h));
            let mut before = vec![f64::INFINITY; n + 1];
            let span = least[i]..=most[i].min(n);
            if !span.is_empty() {
                before[span.clone()].iter_mut().zip(span).for_each(|(to, l)| *to = joined(l));
            }
            before
        };
        for (i, &k) in order.iter().enumerate() {
            let before = with_hop(&rows, i, k);
            let mut next = vec![f64::INFINITY; n + 1];
            let (shortest, longest) = (least[i], most[i]);
            if shortest > longest {
                return None;
            }
            let before = &before[shortest..=longest];
            let ends = least[i + 1].max(shortest + 1)..=most[i + 1];
            self.extend(&Step { k, goal, froms: &froms[k], before, shortest, ends }, &mut next, &mut queue);
            bridge(i + 1, &mut next);
            // The whole on fewer machines is no prefix of anything.
            if i + 1 < used {
                next[n] = f64::INFINITY;
            }
            rows.push(next);
        }
        if !rows[used][n].is_finite() {
            return None;
        }
        let mut stages: Vec<Stage> = Vec::new();
        let (mut i, mut end) = (used, n);
        while end > 0 {
            if let Some((k, start)) = self.given.ending(end) {
                stages.push((k, start, end));
                end = start;
                continue;
            }
            i = i.checked_sub(1)?;
            let start = self.start_of(order[i], goal, froms, &with_hop(&rows, i, order[i]), end)?;
            stages.push((order[i], start, end));
            end = start;
        }
        stages.reverse();
        let (first, last) = (stages.first()?.0, stages.last()?.0);
        if i > 0 || stages.len() > 1 && self.hop_exceeds(last, first, cap) {
            return None;
        }
        Some(self.arrangement(stages))
    }
}
