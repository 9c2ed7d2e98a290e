//! Whose turn it is beside decoding sequences: so many chunks follow each group that is sent.
//!
//! What was sent lies in one queue before the first stage, so the order of sending is the order of computing everywhere. A
//! chunk follows a group at once, without waiting for chunks before it, and a group goes behind what was sent meanwhile:
//! then the first stage is never idle, and each round is as long as was reckoned.
use crate::schedule::Share;

/// Of the rows of its share a prompt gets so much in the first rounds. A group that no chunk was ahead of is back sooner
/// than later ones: it would wait for the rest of whole chunks, and then trail them.
const FIRST_PARTS: [f64; 4] = [0.5, 0.65, 0.8, 0.9];
/// Shares are fractions of chunks; so much of one is rounding.
const ROUNDING: f64 = 1e-6;

/// The chunks that may be sent.
#[derive(Debug)]
pub(crate) struct Turns {
    share: Option<Share>,
    /// Groups that a round has.
    groups: usize,
    /// Chunks that may be sent now.
    credit: f64,
    /// Rounds since a prompt came in, as far as they count.
    rounds: f64,
}

impl Default for Turns {
    /// A prompt that comes begins with a chunk.
    fn default() -> Self {
        Self { share: None, groups: 1, credit: 1.0, rounds: 0.0 }
    }
}

impl Turns {
    /// No prompt comes in.
    pub fn rest(&mut self) {
        (self.credit, self.rounds) = (1.0, 0.0);
    }

    /// What prefill is given beside so many groups. Without a share every group is followed by a chunk.
    pub fn set(&mut self, share: Option<Share>, groups: usize) {
        (self.share, self.groups) = (share, groups.max(1));
    }

    /// Rows of the chunks that go along.
    pub fn rows_now(&self) -> Option<u32> {
        self.share.map(|s| s.rows)
    }

    /// How many of these rows the next chunk has.
    pub fn rows(&self, rows: u32) -> u32 {
        let part = FIRST_PARTS.get((self.rounds + ROUNDING) as usize).copied().unwrap_or(1.0);
        ((f64::from(rows) * part) as u32).max(1)
    }

    /// Whether it is a chunk's turn.
    pub fn chunk_is_due(&self) -> bool {
        self.credit >= 1.0 - ROUNDING
    }

    /// A chunk was sent.
    pub fn sent_chunk(&mut self) {
        self.credit = (self.credit - 1.0).max(0.0);
    }

    /// A group was sent.
    pub fn sent_group(&mut self) {
        let each = self.share.map_or(1.0, |s| s.chunks / (self.groups as f64 * f64::from(s.every.max(1))));
        self.rounds = (self.rounds + 1.0 / self.groups as f64).min(FIRST_PARTS.len() as f64);
        // What could not be sent when it was due is not made up for: the next group would wait behind all of it.
        self.credit = self.credit.min(1.0) + each;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is sent while there always is a group and a chunk to send.
    fn order(share: Option<Share>, groups: usize, count: usize) -> String {
        let mut turns = Turns::default();
        turns.set(share, groups);
        let next = |_| {
            if turns.chunk_is_due() {
                turns.sent_chunk();
                'c'
            } else {
                turns.sent_group();
                'G'
            }
        };
        (0..count).map(next).collect()
    }

    #[test]
    fn chunks_follow_groups_evenly() {
        let share = |chunks: u32, every| Some(Share { chunks: chunks.into(), rows: 1, every, rows_per_s: 1.0 });
        assert_eq!(order(None, 2, 8), "cGcGcGcG");
        assert_eq!(order(share(3, 1), 1, 9), "cGcccGccc");
        assert_eq!(order(share(1, 1), 3, 9), "cGGGcGGGc");
        assert_eq!(order(share(3, 1), 2, 12), "cGcGccGcGccG");
        assert_eq!(order(share(1, 2), 1, 7), "cGGcGGc");
        let mut turns = Turns::default();
        turns.set(share(4, 1), 1);
        let parts = [(); 5].map(|()| {
            turns.sent_group();
            turns.rows(100)
        });
        assert_eq!((parts, turns.rows(1)), ([65, 80, 90, 100, 100], 1));
        let half = Some(Share { chunks: 1.5, rows: 1, every: 1, rows_per_s: 1.0 });
        assert_eq!(order(half, 1, 11), "cGcGccGcGcc");
    }
}
