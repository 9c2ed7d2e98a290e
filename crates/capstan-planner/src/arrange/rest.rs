//! A bound from below on what the layers after a prefix take, which discards most prefixes.
use std::ops::RangeInclusive;

use super::search::{Goal, Search};

/// What the layers after a prefix take at least, given which machines are left.
pub(super) struct Rest {
    /// Of each kind: the most layers of a window.
    reach: Vec<usize>,
    /// Of each kind: the most work of a window, in seconds of the machine that is fastest at each layer.
    work_s: Vec<f64>,
    /// Of each layer: the kinds from the fastest to the slowest for it and all after it, and how many times slower than
    /// that machine each is at least.
    by_speed: Vec<Vec<(usize, f64)>>,
    /// Kinds from the longest reach to the shortest.
    by_reach: Vec<usize>,
    /// Of each layer: how many from it on are free, what these take at least, and what given stages take with their hops.
    free: Vec<usize>,
    free_s: Vec<f64>,
    given_s: Vec<f64>,
    /// What the head takes at least, where it is not in a given stage.
    head_s: f64,
    hop: f64,
}

impl Rest {
    pub fn new(search: &Search, froms: &[Vec<usize>], hop: f64) -> Self {
        let (n, kinds) = (search.n, search.problem.kinds);
        let mut work = vec![0.0; n + 1];
        let (mut free, mut free_s, mut given_s) = (vec![0; n + 1], vec![0.0; n + 1], vec![0.0; n + 1]);
        for l in 0..n {
            work[l + 1] = work[l] + search.least_s(l);
        }
        let mut by_speed: Vec<Vec<(usize, f64)>> = vec![search.movable().map(|k| (k, f64::INFINITY)).collect()];
        for l in (0..n).rev() {
            (free[l], free_s[l]) = (free[l + 1], free_s[l + 1]);
            let begins = search.given.stages.iter().find(|s| s.1 == l);
            given_s[l] = given_s[l + 1] + begins.map_or(0.0, |&(k, a, b)| hop + search.stage_s(k, a, b));
            let (after, least) = (&by_speed[by_speed.len() - 1], search.least_s(l));
            let slower = |k: usize| if least > 0.0 { kinds[k].layers_s[l] / least } else { 1.0 };
            let now = match search.given.holds(l) {
                Some(_) => after.clone(),
                None => {
                    (free[l], free_s[l]) = (free[l] + 1, free_s[l] + least);
                    after.iter().map(|&(k, s)| (k, s.min(slower(k)))).collect()
                }
            };
            by_speed.push(now);
        }
        by_speed.reverse();
        by_speed.iter_mut().for_each(|of| of.sort_by(|a, b| a.1.total_cmp(&b.1)));
        let widest = |of: &Vec<usize>| (1..=n).map(|end| work[end] - work[of[end]]).fold(0.0, f64::max);
        let reach: Vec<usize> = froms.iter().map(|of| (1..=n).map(|end| end - of[end]).max().unwrap_or(0)).collect();
        let mut by_reach: Vec<usize> = search.movable().collect();
        by_reach.sort_by_key(|&k| std::cmp::Reverse(reach[k]));
        let head_s = if search.given.ending(n).is_some() { 0.0 } else { search.least_head_s() };
        let work_s = froms.iter().map(widest).collect();
        Self { reach, work_s, by_speed, by_reach, free, free_s, given_s, head_s, hop }
    }

    /// Discards prefixes that cannot become better than `bound`: what is left goes to the fastest machines first, and
    /// over as few hops as possible, whether or not both can be had together.
    pub fn discard(
        &self,
        search: &Search,
        ends: RangeInclusive<usize>,
        left: impl Fn(usize) -> usize,
        bound: f64,
        next: &mut [f64],
    ) {
        for l in ends.filter(|&l| l < search.n) {
            if next[l].is_infinite() {
                continue;
            }
            if next[l] + search.rest_s[l] > bound || next[l] + self.least(l, &left) > bound {
                next[l] = f64::INFINITY;
            }
        }
    }

    fn least(&self, l: usize, left: &impl Fn(usize) -> usize) -> f64 {
        let mut least = self.given_s[l] + self.head_s;
        let (mut work, mut layers) = (self.free_s[l], self.free[l]);
        for &(k, slowness) in &self.by_speed[l] {
            if work <= 0.0 {
                break;
            }
            let taken = work.min(self.work_s[k] * left(k) as f64);
            least += taken * slowness;
            work -= taken;
        }
        for &k in &self.by_reach {
            if layers == 0 {
                break;
            }
            let machines = layers.div_ceil(self.reach[k].max(1)).min(left(k));
            least += self.hop * machines as f64;
            layers = layers.saturating_sub(machines * self.reach[k]);
        }
        least
    }
}

impl Search<'_> {
    /// Whether a prefix cannot become better than `bound`, whatever comes after it.
    pub fn hopeless(&self, goal: Goal, l: usize, value: f64, bound: f64) -> bool {
        value + if goal == Goal::Way { self.rest_s[l] } else { 0.0 } > bound
    }
}
