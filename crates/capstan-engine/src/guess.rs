//! Whether a guess is worth a place in the pipeline: what was guessed before, and what stages cost, decide.
//!
//! A stage that has nothing else to do verifies guesses for nothing, but a guess that is still being computed when the
//! right token comes holds it up. So a guess is sent when what it saves, if it is right, outweighs that.
use crate::cost::{CostModel, Work};
use crate::ngram::Ground;

/// Weight of one outcome in the measured acceptance: about the last eight guesses count.
const NEW_SHARE: f64 = 0.125;
/// Acceptance that is assumed before anything was guessed.
const ASSUMED: [f64; 3] = [0.5, 0.9, 0.7];
/// Guesses are always right less often than this before they are given up, even where they cost nothing: they keep a
/// machine from resting.
const ACCEPTANCE_MIN: f64 = 0.1;
/// A guess of the draft model that is more likely right than this goes before what waits for the driver: simulations
/// with drafts of 2 to 10 % of the model's cost gained most there and lost nowhere (docs/simulation.md).
pub(crate) const LIKELY: f64 = 0.5;
/// After guessing was given up, one guess in so many tokens finds out whether the text has changed.
const PROBE_EVERY: u32 = 24;

/// Where a guess comes from, for which acceptance is kept apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Source {
    Ngram(Ground),
    Model,
}

impl Source {
    fn index(self) -> usize {
        match self {
            Self::Ngram(Ground::Fresh) => 0,
            Self::Ngram(Ground::Followed) => 1,
            Self::Model => 2,
        }
    }
}

/// What a sequence's guesses were worth.
#[derive(Clone, Debug)]
pub(crate) struct Record {
    acceptance: [f64; 3],
    /// Tokens since the last guess of each kind.
    rest: [u32; 3],
    pub guessed: u32,
    pub accepted: u32,
}

impl Default for Record {
    fn default() -> Self {
        Self { acceptance: ASSUMED, rest: [0; 3], guessed: 0, accepted: 0 }
    }
}

impl Record {
    /// A guess was sent.
    pub fn sent(&mut self, source: Source) {
        self.guessed += 1;
        self.rest[source.index()] = 0;
    }

    /// It was right, or not.
    pub fn learn(&mut self, source: Source, right: bool) {
        let known = &mut self.acceptance[source.index()];
        *known += (if right { 1.0 } else { 0.0 } - *known) * NEW_SHARE;
        self.accepted += u32::from(right);
    }

    /// A token came.
    pub fn token(&mut self) {
        self.rest.iter_mut().for_each(|n| *n = n.saturating_add(1));
    }

    /// How likely a guess from this source is right behind `ahead` others: it counts only when those are right too.
    pub fn likely(&self, source: Source, ahead: usize) -> f64 {
        self.acceptance[source.index()].powi(ahead as i32 + 1)
    }

    /// Whether the draft model should guess here instead of this source: it was right at least as often, and pays.
    pub fn leaves_to_model(&self, source: Source, ahead: usize, cost: &CostModel) -> bool {
        let model = Source::Model;
        self.acceptance[model.index()] >= self.acceptance[source.index()] && self.pays(model, ahead, cost)
    }

    /// Whether a guess from this source pays behind `ahead` others of the same sequence (one row is before them all).
    pub fn pays(&self, source: Source, ahead: usize, cost: &CostModel) -> bool {
        self.likely(source, ahead) > threshold(cost, ahead) || ahead == 0 && self.rest[source.index()] >= PROBE_EVERY
    }
}

/// The acceptance at which a guess behind `ahead` others neither gains nor loses.
///
/// ```text
/// stage 0 | token | guess | wait  |      the guess is done before the token is back: nothing is lost when it is wrong
/// stage 1 |       | token | guess |      and one stage's time instead of two goes by when it is right
/// ```
fn threshold(cost: &CostModel, ahead: usize) -> f64 {
    let row = Work::decode(1, 0);
    let (through, slowest) = (cost.through_us(row), cost.slowest_us(row));
    let gain = (through - slowest).max(0.0);
    // The right token is back after `through`; by then the slowest stage has been busy with the token and all guesses.
    let loss = ((ahead as f64 + 2.0) * slowest - through).clamp(0.0, slowest);
    if gain + loss == 0.0 { 1.0 } else { (loss / (gain + loss)).max(ACCEPTANCE_MIN) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cost(us: &[u32]) -> CostModel {
        let mut cost = CostModel::new(us.len() as u16);
        cost.observe(Work::decode(1, 0), us, None);
        cost
    }

    #[test]
    fn idle_stages_guess_and_busy_ones_do_not() {
        let record = Record::default();
        let fresh = Source::Ngram(Ground::Fresh);
        assert!(record.pays(fresh, 0, &cost(&[1000, 1000])));
        assert!(!record.pays(fresh, 1, &cost(&[1000, 1000])));
        assert!(record.pays(fresh, 2, &cost(&[1000; 4])));
        // One stage: there is nothing to gain.
        assert!(!record.pays(fresh, 0, &cost(&[1000])));
    }

    #[test]
    fn what_is_never_right_is_given_up_but_tried_again() {
        let mut record = Record::default();
        let (source, cost) = (Source::Ngram(Ground::Fresh), cost(&[1000, 1000]));
        let mut sent = 0;
        for _ in 0..500 {
            if record.pays(source, 0, &cost) {
                record.sent(source);
                record.learn(source, false);
                sent += 1;
            }
            record.token();
        }
        assert!((15..60).contains(&sent), "{sent}");
        for _ in 0..40 {
            record.learn(source, true);
        }
        assert!(record.pays(source, 0, &cost));
    }

    #[test]
    fn the_better_source_guesses() {
        let mut record = Record::default();
        let cost = cost(&[1000, 1000]);
        let [fresh, followed] = [Ground::Fresh, Ground::Followed].map(Source::Ngram);
        assert!(record.leaves_to_model(fresh, 0, &cost) && !record.leaves_to_model(followed, 0, &cost));
        (0..20).for_each(|_| record.learn(Source::Model, true));
        assert!(record.leaves_to_model(followed, 0, &cost));
        (0..40).for_each(|_| record.learn(Source::Model, false));
        assert!(!record.leaves_to_model(fresh, 0, &cost));
    }

    #[test]
    fn a_slow_first_stage_asks_for_more_certainty() {
        assert!(threshold(&cost(&[1000, 1000]), 0) < threshold(&cost(&[1500, 500]), 0));
    }
}
