//! The short measurement at the start: how long the stages take for a few sizes, so that the first prompt is cut well.
//!
//! It runs while nobody asks for anything, and ends where a size takes so long that it would be felt.
use std::collections::VecDeque;

use crate::config::EngineConfig;
use crate::cost::Work;

/// A size that takes longer than this through all stages is the last one of its kind, in microseconds: who asks in the
/// meantime waits so long at most.
const ONE_US_MAX: u64 = 700_000;
/// All of it takes no longer than about this, in microseconds.
const ALL_US_MAX: u64 = 3_000_000;

/// What is still to be measured.
#[derive(Debug, Default)]
pub(crate) struct Measure {
    todo: VecDeque<Work>,
    spent_us: u64,
    /// The first one finds cold caches and is not counted.
    warm: bool,
}

impl Measure {
    pub fn new(config: &EngineConfig) -> Self {
        if !config.measure {
            return Self::default();
        }
        let sizes = |max: u32| (0..).map(|i| 1u32 << i).take_while(move |n| *n <= max.min(config.ctx));
        // Decode first: most of the time is spent there.
        let decode = sizes(config.decode_batch.min(config.slots).min(config.chunk));
        let decode = decode.map(|rows| Work::decode(rows, u64::from(rows)));
        // And once more in the end, for something else may have run meanwhile.
        let again = decode.clone();
        let prefill = sizes(config.chunk).map(|rows| Work::prefill(rows, 0));
        Self {
            todo: [Work::decode(1, 1)].into_iter().chain(decode).chain(prefill).chain(again).collect(),
            spent_us: 0,
            warm: false,
        }
    }

    /// What to measure next.
    pub fn take(&mut self) -> Option<Work> {
        self.todo.pop_front()
    }

    /// How long it took through all stages. Whether that counts.
    pub fn learn(&mut self, work: Work, us: u64) -> bool {
        self.spent_us += us;
        if us > ONE_US_MAX || self.spent_us > ALL_US_MAX {
            let over = self.spent_us > ALL_US_MAX;
            self.todo.retain(|other| !over && other.decode != work.decode);
        }
        std::mem::replace(&mut self.warm, true)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_grow_until_they_are_felt() {
        let config = EngineConfig::new(2, 4, 512, 64);
        let mut m = Measure::new(&config);
        let mut seen = Vec::new();
        while let Some(work) = m.take() {
            let counted = m.learn(work, u64::from(work.rows) * 50_000);
            assert_eq!(counted, !seen.is_empty());
            seen.push(work);
        }
        let rows: Vec<(u32, bool)> = seen.iter().map(|w| (w.rows, w.decode)).collect();
        assert_eq!(rows[..4], [(1, true), (1, true), (2, true), (4, true)]);
        assert_eq!(rows[rows.len() - 4..], [(16, false), (1, true), (2, true), (4, true)]);
        assert!(Measure::new(&EngineConfig { measure: false, ..config }).take().is_none());
    }
}
