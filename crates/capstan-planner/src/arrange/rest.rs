//! A bound from below on what the layers after a prefix take, which discards most prefixes.
//!
//! Give each layer a price. A machine that is left is paid the prices of a window of its, and takes its time for it, so it
//! gains at most what its best window gains; then
//!
//! ```text
//!   time of the rest  >=  prices of the layers that are left  -  what each machine that is left can gain at most
//! ```
//!
//! whatever the prices. Good ones are found by raising the price of a layer that no machine's best window holds and
//! lowering that of one that several hold (a subgradient method on the Lagrangian dual), a few microseconds a round. The
//! bound of a prefix is then a sum of numbers that are known beforehand.
use super::Arrangement;
use super::search::{Goal, Search};

/// How often prices are corrected.
const ROUNDS: usize = 150;
/// After so many rounds that made nothing better, steps get half as long.
const PATIENCE: usize = 8;

/// What the layers after a prefix take at least, given which machines are left.
pub(super) struct Rest {
    /// Of each border: the prices of the free layers after it, with what given stages and the head take there.
    after_s: Vec<f64>,
    /// Of each kind: the most that one machine gains.
    gain_s: Vec<f64>,
    /// Of each kind: the most layers of a window.
    reach: Vec<usize>,
}

/// Prices, and what machines gain by them.
struct Prices<'s> {
    search: &'s Search<'s>,
    froms: &'s [Vec<usize>],
    hop: f64,
    /// Of each layer; nothing for those in given stages, which are paid as they are.
    price_s: Vec<f64>,
    free: Vec<bool>,
}

impl Rest {
    /// `guess` is what the bound is compared with; without one nothing is ever discarded.
    pub fn new(search: &Search, froms: &[Vec<usize>], hop: f64, guess: Option<&Arrangement>) -> Self {
        let n = search.n;
        let reach = froms.iter().map(|of| (1..=n).map(|end| end - of[end]).max().unwrap_or(0)).collect();
        let free: Vec<bool> = (0..n).map(|l| search.given.holds(l).is_none()).collect();
        let Some(guess) = guess else {
            return Self { after_s: vec![0.0; n + 1], gain_s: vec![0.0; froms.len()], reach };
        };
        // As much as the guess takes for it, its share of a hop included.
        let mut price_s = vec![0.0; n];
        for &(k, range) in &guess.stages {
            for l in (range.start() as usize..range.end() as usize).filter(|&l| free[l]) {
                price_s[l] = search.problem.kinds[k].layers_s[l] + hop / f64::from(range.count());
            }
        }
        let head_s = if search.given.ending(n).is_some() { 0.0 } else { search.least_head_s() };
        let mut after_s = vec![0.0; n + 1];
        for l in (0..n).rev() {
            let begins = search.given.stages.iter().find(|s| s.1 == l);
            after_s[l] = after_s[l + 1] + begins.map_or(0.0, |&(k, a, b)| hop + search.stage_s(k, a, b));
        }
        let goal_s = guess.way_s - head_s - after_s[0];
        let (price_s, gain_s) = Prices { search, froms, hop, price_s, free }.settled(goal_s);
        let mut sum = head_s;
        for l in (0..n).rev() {
            sum += price_s[l];
            after_s[l] += sum;
        }
        Self { after_s, gain_s, reach }
    }

    /// The most layers of a window of a kind.
    pub fn reach(&self, k: usize) -> usize {
        self.reach[k]
    }

    /// What machines of a kind gain at most.
    pub fn gain_s(&self, k: usize, machines: usize) -> f64 {
        self.gain_s[k] * machines as f64
    }

    /// What the layers after a prefix of this length take at least, when the machines that are left gain at most so much.
    pub fn least_s(&self, length: usize, gain_s: f64) -> f64 {
        self.after_s[length] - gain_s
    }
}

impl Prices<'_> {
    /// Prices that bring the bound near the goal, and what one machine of each kind gains by them.
    fn settled(mut self, goal_s: f64) -> (Vec<f64>, Vec<f64>) {
        let kinds = self.froms.len();
        let mut best = (f64::NEG_INFINITY, self.price_s.clone(), vec![0.0; kinds]);
        let (mut pace, mut since) = (1.0, 0);
        let (mut gain_s, mut held) = (vec![0.0; kinds], vec![0i32; self.search.n]);
        for _ in 0..ROUNDS {
            held.fill(0);
            let mut bound = self.price_s.iter().sum::<f64>();
            for k in self.search.movable() {
                let (gain, start, end) = self.best_window(k);
                let machines = self.search.counts[k];
                gain_s[k] = gain;
                bound -= gain * machines as f64;
                held[start..end].iter_mut().for_each(|h| *h += machines as i32);
            }
            since += 1;
            if bound > best.0 {
                best = (bound, self.price_s.clone(), gain_s.clone());
                since = 0;
            }
            let steps: f64 =
                held.iter().zip(&self.free).filter(|(_, f)| **f).map(|(h, _)| f64::from(1 - h).powi(2)).sum();
            if steps == 0.0 || bound >= goal_s {
                break;
            }
            if since >= PATIENCE {
                (pace, since) = (pace / 2.0, 0);
            }
            let step = pace * (goal_s - bound) / steps;
            for (price, h) in self.price_s.iter_mut().zip(&held).zip(&self.free).filter(|(_, f)| **f).map(|(p, _)| p) {
                *price += step * f64::from(1 - h);
            }
        }
        (best.1, best.2)
    }

    /// The window of a kind that gains most, and how much; an empty one where none gains.
    fn best_window(&self, k: usize) -> (f64, usize, usize) {
        let (n, froms, kind) = (self.search.n, &self.froms[k], &self.search.problem.kinds[k]);
        let head_s = kind.head_s - self.search.least_head_s();
        let mut best = (0.0, 0, 0);
        // Gains up to each border, and the borders that may be the best start, the least gain first.
        let (mut upto, mut gains): (f64, Vec<f64>) = (0.0, Vec::with_capacity(n + 1));
        let (mut queue, mut front): (Vec<usize>, usize) = (Vec::with_capacity(n + 1), 0);
        for (end, &from) in froms.iter().enumerate() {
            if end > 0 {
                upto += self.price_s[end - 1] - kind.layers_s[end - 1];
                while front < queue.len() && queue[front] < from {
                    front += 1;
                }
                if let Some(&start) = queue.get(front) {
                    let head_s = if end == n { head_s } else { 0.0 };
                    let gain = upto - gains[start] - self.hop - head_s;
                    if gain > best.0 {
                        best = (gain, start, end);
                    }
                }
            }
            while queue.len() > front && gains[queue[queue.len() - 1]] >= upto {
                queue.pop();
            }
            gains.push(upto);
            queue.push(end);
        }
        best
    }
}

impl Search<'_> {
    /// Whether a prefix cannot become better than `bound`, whatever comes after it.
    pub fn hopeless(&self, goal: Goal, l: usize, value: f64, bound: f64) -> bool {
        value + if goal == Goal::Way { self.rest_s[l] } else { 0.0 } > bound
    }
}
