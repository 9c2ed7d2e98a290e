//! Which sequences decode together: groups that stay together until somebody joins or leaves, a prompt comes in beside
//! them, or what was learnt of the costs makes others better.
//!
//! A group is sent when all its members have their tokens. Members that change groups wait for their new one once.
use crate::cost::CostModel;
use crate::dealing::{self, Dealing, Member, WORTH_A_CHANGE};
use crate::schedule::{self, Chunk, Share};
use crate::throttle::Throttle;

/// Decode micro-batches after which the dealing is looked at again though nothing happened: sequences grow longer and
/// costs are measured anew.
const LOOK_EVERY: u32 = 64;
/// The same after a change, doubled each time: what the new groups cost was perhaps never observed.
const LOOK_FIRST: u32 = 8;
/// Micro-batches for which a dealing is tried whose cost is not known for certain: enough to correct an estimate that is
/// a third off.
const TRIAL: u32 = 6;
/// Micro-batches between two trials: what they cost at most is then one or two percent.
const TRIAL_EVERY: u32 = 256;
/// So much longer a step may seem than it is now, to be tried.
const TRIAL_WORSE: f64 = 1.3;
/// The same for sizes that never came up, of which there are few: what was measured of them at the start may be wrong by
/// much.
const UNSEEN_EVERY: u32 = 32;
/// See [`UNSEEN_EVERY`].
const UNSEEN_WORSE: f64 = 2.0;
/// What was not observed within so many micro-batches of other sizes may have changed.
const STALE: u64 = 4096;
/// Groups are not changed for a prompt where a step of them without it takes more than this share of what is allowed.
const NEARLY: f64 = 0.985;
/// When rows of a prompt come in slower than this share of what they did, the groups are looked at again.
const SLOWED: f64 = 0.75;
/// So much longer a step gets from one look to the next because sequences grow deeper.
const DEEPER: f64 = 1.0025;
/// A step beside a prompt that is this much longer than it was said to be was never known.
const MISJUDGED: f64 = 1.5;
/// A prompt must come in sooner by so many steps to change groups for it.
const STEPS_SAVED: f64 = 2.0;

/// What bounds a dealing.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    pub groups_max: usize,
    pub group_max: usize,
    /// Whether a dealing may be tried that seems worse.
    pub trials: bool,
}

/// A prompt that comes in beside those who decode.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Prompt {
    /// Where its next chunk begins, and rows from there on.
    pub start: u32,
    pub left: u32,
    pub chunk_max: u32,
    /// Micro-batches that may be under way, groups and chunks together.
    pub in_flight_max: u32,
    pub slowdown_percent: u16,
    /// Rows of the chunks that go along now, if any do.
    pub rows_now: Option<u32>,
}

/// The groups of sequences that decode, by slot.
#[derive(Debug, Default)]
pub(crate) struct Dealer {
    groups: Vec<Vec<u32>>,
    /// Joined, not yet dealt.
    new: Vec<u32>,
    changed: bool,
    /// Whether a prompt came in when the groups were looked at last.
    beside: bool,
    /// Micro-batches until the next look.
    look_in: u32,
    /// How many lay between the last two looks.
    waited: u32,
    /// Micro-batches since the last trial.
    since_trial: Option<u32>,
    /// How long a step of the best dealing takes when no prompt comes in.
    plain_us: f64,
    throttle: Throttle,
    /// Whether the groups are being tried.
    trial: bool,
    /// How fast rows of a prompt came in when the groups were looked at.
    rows_per_s: f64,
}

impl Dealer {
    /// A sequence decodes from now on.
    pub fn join(&mut self, slot: u32) {
        self.new.push(slot);
        self.changed = true;
    }

    /// It does so no longer. Nothing happens when it never did.
    pub fn leave(&mut self, slot: u32) {
        let before = self.len();
        self.new.retain(|s| *s != slot);
        self.groups.iter_mut().for_each(|g| g.retain(|s| *s != slot));
        self.groups.retain(|g| !g.is_empty());
        self.changed |= self.len() < before;
    }

    /// Whether it decodes.
    pub fn contains(&self, slot: u32) -> bool {
        self.new.contains(&slot) || self.groups.iter().any(|g| g.contains(&slot))
    }

    /// Sequences that decode.
    pub fn len(&self) -> usize {
        self.new.len() + self.groups.iter().map(Vec::len).sum::<usize>()
    }

    /// Their slots, ascending.
    pub fn slots(&self) -> Vec<u32> {
        let mut slots: Vec<u32> = self.new.iter().chain(self.groups.iter().flatten()).copied().collect();
        slots.sort_unstable();
        slots
    }

    pub fn groups(&self) -> &[Vec<u32>] {
        &self.groups
    }

    /// A group was sent.
    pub fn sent(&mut self) {
        self.look_in = self.look_in.saturating_sub(1);
        self.since_trial = self.since_trial.map(|n| n.saturating_add(1));
    }

    /// Whether the groups must be looked at; `beside` says whether a prompt comes in.
    pub fn is_due(&self, beside: bool) -> bool {
        self.changed || self.look_in == 0 || self.beside != beside
    }

    /// Deals everybody anew where that is better. Members' slots ascend.
    pub fn look(&mut self, cost: &CostModel, members: &[Member], limits: Limits, prompt: Option<Prompt>, beside: bool) {
        debug_assert!(members.iter().map(|m| m.slot).eq(self.slots()));
        let regular = self.look_in == 0;
        let same_prompt = self.beside && beside && !self.changed;
        let wait = if regular && !self.changed { (2 * self.waited).clamp(LOOK_FIRST, LOOK_EVERY) } else { LOOK_FIRST };
        (self.beside, self.look_in, self.waited) = (beside, wait, wait);
        let all = dealing::dealings(cost, members, limits.groups_max, limits.group_max);
        if self.changed {
            self.throttle.forget();
        }
        // Groups that were only tried are nothing to hold on to.
        let tried = std::mem::take(&mut self.trial);
        let now = (!self.changed && !tried).then(|| Dealing::of(cost, &self.groups, members));
        let Some(plain) = dealing::best(&all).cloned() else { return self.deal(Vec::new()) };
        // Stages that share memory slow each other down while a prompt keeps all of them busy. What is learnt meanwhile must
        // not make what is allowed grow, but for those who decode growing deeper.
        if !same_prompt || plain.step_us > self.plain_us * MISJUDGED {
            self.plain_us = plain.step_us;
        } else {
            self.plain_us = plain.step_us.clamp(self.plain_us, self.plain_us * DEEPER);
        }
        let target = match (prompt, now) {
            (Some(prompt), now) => self.for_prompt(cost, now.unwrap_or(plain), all, prompt),
            (None, None) => plain,
            (None, Some(now)) => {
                let trial = regular && !beside && limits.trials;
                if let Some(other) = trial.then(|| untried(cost, &now, all, self.since_trial)).flatten() {
                    self.trial = true;
                    (self.look_in, self.since_trial) = (TRIAL.max(4 * other.groups.len() as u32), Some(0));
                    other
                } else if plain.step_us < now.step_us * WORTH_A_CHANGE {
                    plain
                } else {
                    now
                }
            }
        };
        self.rows_per_s = prompt.map_or(0.0, |prompt| self.share(cost, &target, prompt).rows_per_s);
        self.deal(target.groups);
    }

    /// Beside a prompt that dealing is best under which it comes in soonest, if the change is worth it.
    fn for_prompt(&self, cost: &CostModel, now: Dealing, all: Vec<Dealing>, prompt: Prompt) -> Dealing {
        let us = |d: &Dealing| f64::from(prompt.left) * 1e6 / self.share(cost, d, prompt).rows_per_s.max(1e-3);
        let least = us(&now) - STEPS_SAVED * self.plain_us;
        // Where the groups' own way nearly fills a round, the least delay would make it too long.
        let most = (self.allowed_us(prompt) * NEARLY).max(self.plain_us / WORTH_A_CHANGE);
        let roomy = all.into_iter().filter(|d| d.step_us <= most);
        let better = roomy.map(|d| (us(&d), d)).filter(|(us, _)| *us < least);
        better.min_by(|a, b| a.0.total_cmp(&b.0)).map_or(now, |(_, dealing)| dealing)
    }

    /// How long a round may take beside a prompt.
    fn allowed_us(&self, prompt: Prompt) -> f64 {
        self.plain_us * self.throttle.reckon(f64::from(prompt.slowdown_percent) / 100.0)
    }

    /// A group came back after so long; `slowdown_percent` is what it may be, if chunks are under way.
    pub fn returned(&mut self, us: f64, slowdown_percent: Option<u16>) {
        if !self.changed && !self.trial && slowdown_percent.is_some() == self.beside {
            self.throttle.learn(us, slowdown_percent.map(|percent| f64::from(percent) / 100.0));
        }
    }

    /// The share of a prompt beside such a dealing.
    fn share(&self, cost: &CostModel, dealing: &Dealing, prompt: Prompt) -> Share {
        let chunk = Chunk {
            start: prompt.start,
            rows_max: prompt.chunk_max,
            count_max: prompt.in_flight_max.saturating_sub(dealing.groups.len() as u32),
            rows_now: prompt.rows_now,
        };
        schedule::share(cost, &dealing.loads, self.allowed_us(prompt), chunk)
    }

    /// The share of a prompt beside the groups there are.
    pub fn share_now(&mut self, cost: &CostModel, members: &[Member], prompt: Prompt) -> Share {
        let share = self.share(cost, &Dealing::of(cost, &self.groups, members), prompt);
        // It grows deeper, and so do those who decode: from some depth on other groups leave it more.
        if share.rows_per_s < self.rows_per_s * SLOWED {
            self.look_in = 0;
        }
        share
    }

    fn deal(&mut self, groups: Vec<Vec<u32>>) {
        debug_assert_eq!(groups.iter().map(Vec::len).sum::<usize>(), self.len());
        self.groups = groups;
        self.new.clear();
        self.changed = false;
    }
}

/// The best dealing that is nearly as good as this one, or better, if its sizes cost what is believed of them, which was
/// not observed for long. Else a size that seems dear would never be seen again, and never be known to be cheap.
fn untried(cost: &CostModel, now: &Dealing, all: Vec<Dealing>, since_trial: Option<u32>) -> Option<Dealing> {
    let near = all.into_iter().filter(|d| {
        let any = |is: &dyn Fn(u32) -> bool| d.run_sizes().any(is);
        let (worse, every) = match any(&|rows| cost.is_unseen(rows)) {
            true => (UNSEEN_WORSE, UNSEEN_EVERY),
            false => (TRIAL_WORSE, TRIAL_EVERY),
        };
        d.groups != now.groups
            && d.step_us < now.step_us * worse
            && since_trial.is_none_or(|n| n >= every)
            && any(&|rows| cost.is_stale(rows, STALE))
    });
    near.min_by(|a, b| a.step_us.total_cmp(&b.step_us))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cost::Work;

    const LIMITS: Limits = Limits { groups_max: 4, group_max: 64, trials: true };
    /// Microseconds of a decode micro-batch on either of two stages, by rows.
    const TRUE: [(u32, f64); 5] = [(1, 30e3), (2, 47e3), (4, 56e3), (8, 66e3), (16, 130e3)];
    const PROMPT: Prompt =
        Prompt { start: 0, left: 512, chunk_max: 512, in_flight_max: 6, slowdown_percent: 175, rows_now: None };

    fn members(dealer: &Dealer) -> Vec<Member> {
        dealer.slots().into_iter().map(|slot| Member { slot, depth: 0 }).collect()
    }

    fn us(rows: u32, points: &[(u32, f64)]) -> f64 {
        let (n1, us1) = *points.iter().find(|(n, _)| *n >= rows).unwrap();
        let (n0, us0) = *points.iter().rfind(|(n, _)| *n <= rows).unwrap();
        if n0 == n1 { us0 } else { us0 + (us1 - us0) * f64::from(rows - n0) / f64::from(n1 - n0) }
    }

    fn dealer(slots: &[u32]) -> Dealer {
        let mut dealer = Dealer::default();
        slots.iter().for_each(|s| dealer.join(*s));
        dealer
    }

    fn measured(factor: impl Fn(u32) -> f64) -> CostModel {
        let mut cost = CostModel::new(2);
        for (rows, us) in TRUE {
            cost.measure(Work::decode(rows, 0), &[(us * factor(rows)) as u32; 2], 0);
        }
        for (rows, us) in [(1, 30_000), (4, 55_000), (8, 80_000), (16, 140_000), (64, 450_000)] {
            cost.measure(Work::prefill(rows, 0), &[us; 2], 0);
        }
        cost
    }

    #[test]
    fn neighbours_decode_together() {
        let cost = measured(|_| 1.0);
        let mut d = dealer(&[3, 0, 2, 1]);
        assert!(d.is_due(false));
        d.look(&cost, &members(&d), LIMITS, None, false);
        assert_eq!(d.groups(), [vec![0, 1], vec![2, 3]]);
        assert!(!d.is_due(false) && d.is_due(true));
        d.leave(77);
        assert!(!d.is_due(false));
        d.join(9);
        d.look(&cost, &members(&d), LIMITS, None, false);
        assert_eq!((d.len(), d.groups()), (5, &[vec![0, 1, 2, 3], vec![9]][..]));
        d.leave(9);
        assert!(d.is_due(false));
    }

    #[test]
    fn beside_a_long_prompt_fewer_groups_leave_more_room() {
        let cost = measured(|_| 1.0);
        let mut d = dealer(&[0, 1, 2, 3]);
        d.look(&cost, &members(&d), LIMITS, None, false);
        assert_eq!(d.groups().len(), 2);
        // A short one is in before it would pay.
        d.look(&cost, &members(&d), LIMITS, Some(Prompt { left: 8, ..PROMPT }), true);
        assert_eq!(d.groups().len(), 2);
        d.look(&cost, &members(&d), LIMITS, Some(PROMPT), true);
        assert_eq!(d.groups(), [[0, 1, 2, 3]]);
        let share = d.share_now(&cost, &members(&d), PROMPT);
        assert!(512.0 / share.rows_per_s < 9.0, "{share:?}");
        d.look(&cost, &members(&d), LIMITS, None, false);
        assert_eq!(d.groups().len(), 2);
    }

    #[test]
    fn what_a_prompt_may_take_is_a_matter_of_the_time_before_it_came() {
        let mut cost = measured(|_| 1.0);
        let mut d = dealer(&[0]);
        d.look(&cost, &members(&d), LIMITS, None, false);
        d.look(&cost, &members(&d), LIMITS, Some(PROMPT), true);
        let before = d.share_now(&cost, &members(&d), PROMPT);
        (0..40).for_each(|_| cost.observe(Work::decode(1, 0), &[38_000; 2], None));
        d.look(&cost, &members(&d), LIMITS, Some(PROMPT), true);
        let slower = d.share_now(&cost, &members(&d), PROMPT);
        assert!(slower.rows < before.rows, "{slower:?} after {before:?}");
        d.look(&cost, &members(&d), LIMITS, None, false);
        d.look(&cost, &members(&d), LIMITS, Some(PROMPT), true);
        assert!(d.share_now(&cost, &members(&d), PROMPT).rows > slower.rows);
    }

    /// Rounds with times that stray by five percent; the mean step against the best one, in the second half.
    fn efficiency(cost: &mut CostModel, slots: &[u32], seed: u64) -> f64 {
        let mut dealer = dealer(slots);
        let members = members(&dealer);
        let mut truth = CostModel::new(2);
        TRUE.iter().for_each(|(rows, us)| truth.observe(Work::decode(*rows, 0), &[*us as u32; 2], None));
        let best = dealing::best(&dealing::dealings(&truth, &members, 4, 64)).unwrap().step_us;
        let (mut state, mut spent, mut steps) = (seed, 0.0, 0.0);
        for round in 0..1200 {
            if dealer.is_due(false) {
                dealer.look(cost, &members, LIMITS, None, false);
            }
            let dealing = Dealing::of(&truth, dealer.groups(), &members);
            for group in dealer.groups().to_vec() {
                let group: Vec<Member> = group.iter().map(|slot| Member { slot: *slot, depth: 0 }).collect();
                let runs: Vec<Work> = dealing::runs(&group).collect();
                let times = [(); 2].map(|()| {
                    state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                    let stray = 0.95 + 0.1 * (state >> 40) as f64 / (1u64 << 24) as f64;
                    (runs.iter().map(|run| us(run.rows, &TRUE)).sum::<f64>() * stray) as u32
                });
                cost.observe_runs(&runs, &times, None);
                dealer.sent();
            }
            if round >= 600 {
                (spent, steps) = (spent + dealing.step_us, steps + 1.0);
            }
        }
        best * steps / spent
    }

    #[test]
    fn the_best_dealing_is_found_though_the_measurement_was_wrong() {
        for slots in [&[0, 1, 2, 3][..], &[0, 1, 4, 5], &[0, 1, 2, 7], &[0, 2, 4, 6], &[0, 1, 2, 3, 4, 5, 6, 7]] {
            for seed in 0..4u64 {
                // All sizes right, or each a fifth off in either direction.
                for wrong in 0..16u32 {
                    let factor = |rows: u32| if wrong >> rows.ilog2().min(3) & 1 == 1 { 1.2 } else { 0.85 };
                    let mut cost = if wrong == 0 { measured(|_| 1.0) } else { measured(factor) };
                    let got = efficiency(&mut cost, slots, seed);
                    assert!(got >= 0.95, "{slots:?}, seed {seed}, {wrong:04b}: {got}");
                }
            }
        }
    }
}
