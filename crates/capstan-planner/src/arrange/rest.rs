//! A bound from below on what the layers after a prefix take, which discards most of them.
use std::ops::RangeInclusive;

use super::Kind;
use super::search::{Goal, Search};

/// What the layers after a prefix take at least, given which machines are left.
pub(super) struct Rest {
    /// Of each kind: the most layers of a window.
    pub reach: Vec<usize>,
    /// Of each kind: the most work of a window, in seconds of the machine that is fastest at each layer.
    work_s: Vec<f64>,
    /// Of each layer: the kinds from the fastest to the slowest for it and all after it, and how many times slower than
    /// that machine each is at least.
    by_speed: Vec<Vec<(usize, f64)>>,
    /// Kinds from the longest reach to the shortest.
    by_reach: Vec<usize>,
    hop: f64,
}

impl Rest {
    pub fn new(search: &Search, froms: &[Vec<usize>], hop: f64) -> Self {
        let (n, kinds) = (search.n, search.problem.kinds);
        let least = |l: usize| kinds.iter().map(|k| k.layers_s[l]).fold(f64::INFINITY, f64::min);
        let mut work = vec![0.0; n + 1];
        for l in 0..n {
            work[l + 1] = work[l] + least(l);
        }
        let widest = |k: usize| (1..=n).map(|end| work[end] - work[froms[k][end]]).fold(0.0, f64::max);
        let slower = |k: &Kind, l: usize| if least(l) > 0.0 { k.layers_s[l] / least(l) } else { 1.0 };
        let mut by_speed: Vec<Vec<(usize, f64)>> = vec![(0..kinds.len()).map(|k| (k, f64::INFINITY)).collect()];
        for l in (0..n).rev() {
            let after = &by_speed[by_speed.len() - 1];
            by_speed.push(after.iter().map(|&(k, s)| (k, s.min(slower(&kinds[k], l)))).collect());
        }
        by_speed.reverse();
        by_speed.iter_mut().for_each(|of| of.sort_by(|a, b| a.1.total_cmp(&b.1)));
        let reach: Vec<usize> = froms.iter().map(|of| (1..=n).map(|end| end - of[end]).max().unwrap_or(0)).collect();
        let mut by_reach: Vec<usize> = (0..kinds.len()).collect();
        by_reach.sort_by_key(|&k| std::cmp::Reverse(reach[k]));
        Self { reach, work_s: (0..kinds.len()).map(widest).collect(), by_speed, by_reach, hop }
    }

    /// Discards prefixes that cannot become better than `bound`: what is left goes to the fastest machines first, and
    /// over as few hops as possible, whether or not both can be had together.
    pub fn discard(
        &self,
        search: &Search,
        goal: Goal,
        ends: RangeInclusive<usize>,
        left: impl Fn(usize) -> usize,
        bound: f64,
        next: &mut [f64],
    ) {
        for l in ends {
            if next[l].is_infinite() {
                continue;
            }
            if goal == Goal::Way && next[l] + search.rest_s[l] > bound {
                next[l] = f64::INFINITY;
                continue;
            }
            let mut least = 0.0;
            if goal == Goal::Way && l < search.n {
                let (mut work, mut layers) = (search.rest_s[l] - search.least_head_s, search.n - l);
                for &(k, slowness) in &self.by_speed[l] {
                    let taken = work.min(self.work_s[k] * left(k) as f64);
                    least += taken * slowness;
                    work -= taken;
                    if work <= 0.0 {
                        break;
                    }
                }
                for &k in &self.by_reach {
                    if layers == 0 {
                        break;
                    }
                    let machines = layers.div_ceil(self.reach[k].max(1)).min(left(k));
                    least += self.hop * machines as f64;
                    layers = layers.saturating_sub(machines * self.reach[k]);
                }
                least += search.least_head_s;
            }
            if next[l] + least > bound {
                next[l] = f64::INFINITY;
            }
        }
    }
}
