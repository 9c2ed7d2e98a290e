//! The short measurement at the start: how long the stages take for a few sizes, so that the first prompt is cut well.
//!
//! It runs while nobody asks for anything, and ends where a size takes so long that it would be felt.
use std::collections::VecDeque;

use capstan_proto::data::Row;

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

    /// What to measure next, with its rows in slots of these, which are empty and ascend.
    ///
    /// Rows that decode are of as many sequences, whose attention cannot be computed together; where too few neighbours
    /// are empty, what is measured is a little less.
    pub fn take(&mut self, empty: &[u32]) -> Option<(Work, Vec<Row>)> {
        let &slot = empty.first()?;
        let work = self.todo.pop_front()?;
        let neighbours = |slots: &&[u32]| work.decode && slots.windows(2).all(|pair| pair[0] + 1 == pair[1]);
        let rows = match empty.get(..work.rows as usize).filter(neighbours) {
            Some(slots) => slots.iter().map(|&slot| Row { slot, pos: 0, output: true }).collect(),
            None => (0..work.rows).map(|pos| Row { slot, pos, output: work.decode }).collect(),
        };
        Some((work, rows))
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
        while let Some((work, batch)) = m.take(&[0, 1, 2, 3]) {
            assert_eq!(batch.len(), work.rows as usize);
            assert!(batch.iter().all(|row| row.output == work.decode && (row.pos == 0 || !work.decode)));
            let counted = m.learn(work, u64::from(work.rows) * 50_000);
            assert_eq!(counted, !seen.is_empty());
            seen.push(work);
        }
        let rows: Vec<(u32, bool)> = seen.iter().map(|w| (w.rows, w.decode)).collect();
        assert_eq!(rows[..4], [(1, true), (1, true), (2, true), (4, true)]);
        assert_eq!(rows[rows.len() - 4..], [(16, false), (1, true), (2, true), (4, true)]);
        assert!(Measure::new(&EngineConfig { measure: false, ..config.clone() }).take(&[0]).is_none());
        // With gaps between them slots do not decode together, and without any there is nothing to measure with.
        let mut m = Measure::new(&config);
        assert!(m.take(&[]).is_none());
        let two = std::iter::from_fn(|| m.take(&[0, 2])).find(|(work, _)| work.rows == 2).unwrap();
        assert_eq!(two.1.iter().map(|row| (row.slot, row.pos)).collect::<Vec<_>>(), [(0, 0), (0, 1)]);
    }
}
