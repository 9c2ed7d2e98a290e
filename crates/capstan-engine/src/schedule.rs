//! The scheduler's decisions as small pure functions: how a prompt is cut, how sequences are dealt, whose turn it is.
use std::ops::Range;

/// Smallest chunk that a prompt is cut into for the sake of idle stages. Below this a stage reads its weights again for
/// so few rows that the cut costs more than the idle stages would.
pub const CHUNK_ROWS_MIN: u32 = 16;

/// How a prompt is cut: `count` chunks whose lengths differ by at most one row.
///
/// It depends on the prompt's length and the configuration alone, so that a prompt is always computed in the same
/// shapes, whatever runs beside it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ChunkPlan {
    rows: u32,
    count: u32,
}

impl ChunkPlan {
    /// Cuts `rows` (at least one) into chunks of at most `chunk_max` rows: as few as possible, but up to `chunks_min`
    /// while none falls below [`CHUNK_ROWS_MIN`].
    pub fn new(rows: u32, chunk_max: u32, chunks_min: u16) -> Self {
        let needed = rows.div_ceil(chunk_max.max(1));
        let wanted = u32::from(chunks_min).min(rows / CHUNK_ROWS_MIN);
        Self { rows, count: needed.max(wanted).max(1) }
    }

    /// How many chunks; at least one.
    pub fn count(self) -> u32 {
        self.count
    }

    /// Rows of the chunk `index`, below [`ChunkPlan::count`].
    pub fn chunk(self, index: u32) -> Range<u32> {
        let cut = |i: u32| (u64::from(self.rows) * u64::from(i) / u64::from(self.count)) as u32;
        cut(index)..cut(index + 1)
    }
}

/// Most sequences of one decode micro-batch, when `decoding` sequences decode in all: they are dealt evenly over the
/// stages, so that no stage waits, within `decode_batch` and the `chunk` rows that a micro-batch may have.
pub fn group_size(decoding: usize, stages: u16, decode_batch: u32, chunk: u32) -> usize {
    decoding.div_ceil(usize::from(stages.max(1))).min(decode_batch.min(chunk) as usize).max(1)
}

/// What the next micro-batch is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Turn {
    /// A chunk of a prompt.
    Prefill,
    /// One token each of some sequences.
    Decode,
}

/// Whose turn it is. Either goes at once when the other has nothing to send. When both have, `decodes_per_prefill`
/// decode micro-batches go between two chunks, so neither waits for long.
pub fn turn(prefill: bool, decode: bool, decodes_since_prefill: u16, decodes_per_prefill: u16) -> Option<Turn> {
    match (prefill, decode) {
        (false, false) => None,
        (true, false) => Some(Turn::Prefill),
        (false, true) => Some(Turn::Decode),
        (true, true) if decodes_since_prefill >= decodes_per_prefill => Some(Turn::Prefill),
        (true, true) => Some(Turn::Decode),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lengths(rows: u32, chunk_max: u32, chunks_min: u16) -> Vec<u32> {
        let plan = ChunkPlan::new(rows, chunk_max, chunks_min);
        (0..plan.count()).map(|i| plan.chunk(i).len() as u32).collect()
    }

    #[test]
    fn prompts_are_cut_for_all_stages_but_not_below_the_smallest_chunk() {
        assert_eq!(lengths(1, 512, 3), [1]);
        assert_eq!(lengths(31, 512, 3), [31]);
        assert_eq!(lengths(32, 512, 3), [16, 16]);
        assert_eq!(lengths(100, 512, 3), [33, 33, 34]);
        assert_eq!(lengths(100, 512, 1), [100]);
        assert_eq!(lengths(513, 512, 1), [256, 257]);
        assert_eq!(lengths(5, 2, 1), [1, 2, 2]);
    }

    #[test]
    fn chunks_cover_every_row_once_within_bounds() {
        for rows in 1..400 {
            for (chunk_max, chunks_min) in [(1, 1), (7, 3), (16, 4), (33, 2), (512, 5)] {
                let all = lengths(rows, chunk_max, chunks_min);
                assert_eq!(all.iter().sum::<u32>(), rows);
                assert!(all.iter().all(|n| (1..=chunk_max).contains(n)), "{rows} {chunk_max}: {all:?}");
            }
        }
    }

    #[test]
    fn the_longest_prompt_does_not_overflow() {
        let plan = ChunkPlan::new(u32::MAX, 4096, 8);
        assert_eq!(plan.chunk(plan.count() - 1).end, u32::MAX);
    }

    #[test]
    fn sequences_are_dealt_over_the_stages() {
        let group = |decoding, stages, decode_batch| group_size(decoding, stages, decode_batch, 512);
        assert_eq!([1, 3, 4, 6, 7].map(|n| group(n, 3, 64)), [1, 1, 2, 2, 3]);
        assert_eq!(group(8, 1, 64), 8);
        assert_eq!(group(8, 2, 1), 1);
        assert_eq!(group(8, 2, 3), 3);
        assert_eq!(group_size(8, 1, 64, 2), 2);
    }

    #[test]
    fn both_kinds_get_their_share() {
        let mut decodes = 0;
        let turns: Vec<Turn> = (0..6)
            .filter_map(|_| {
                let next = turn(true, true, decodes, 2);
                decodes = if next == Some(Turn::Decode) { decodes + 1 } else { 0 };
                next
            })
            .collect();
        use Turn::{Decode as D, Prefill as P};
        assert_eq!(turns, [D, D, P, D, D, P]);
        assert_eq!(turn(true, false, 0, 2), Some(P));
        assert_eq!(turn(false, true, 9, 2), Some(D));
        assert_eq!(turn(false, false, 9, 2), None);
    }
}
