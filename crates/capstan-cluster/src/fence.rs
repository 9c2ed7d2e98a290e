//! What keeps two epochs of one deployment apart, as pure code: a fence at every stage, and a lease on serving.
//!
//! ```text
//! stage of epoch 3 ──Connect, epoch 5 (committed)──▶ fence at 5: whatever carries 3 or 4 is refused for good
//! node that lost the majority ──lease runs out──▶ serves no epoch at all, until it knows again which one counts
//! a new epoch ──if a node of the old one did not answer, or it is not known to have begun: leases first──▶ begins
//! ```
//! The fence alone is not enough: where the old stages and the new ones share no node, nobody would tell the old ones.
use capstan_proto::Epoch;

/// How long a node serves after it last asked a majority, in milliseconds: as long as a node counts as online after it
/// was heard, so that both sides of a cut see it end at about the same time.
pub const LEASE_MS: u64 = crate::detector::ONLINE_MS;
/// How long a new epoch waits for the leases of nodes that did not answer, in milliseconds. Clocks of two machines may
/// run differently fast: a tenth is far beyond any crystal.
pub const TAKEOVER_MS: u64 = LEASE_MS + LEASE_MS / 10;

/// A message that was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Fenced {
    /// From an epoch that is over.
    #[error("it is from epoch {got}, and epoch {now} has begun; whoever sent it must stop")]
    Old {
        /// The message's.
        got: Epoch,
        /// The stage's.
        now: Epoch,
    },
    /// From an epoch that has not begun here.
    #[error("it is from epoch {got}, which has not begun here (epoch {now})")]
    Early {
        /// The message's.
        got: Epoch,
        /// The stage's.
        now: Epoch,
    },
    /// The node does not know whether its epoch still counts.
    #[error("this node has not reached a majority of the voters for {silent_ms} ms and stopped serving")]
    NoLease {
        /// Since when, in milliseconds.
        silent_ms: u64,
    },
}

/// The epoch that a stage is in. It only grows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Fence {
    epoch: Epoch,
}

impl Fence {
    /// The epoch that counts here; 0 before the first.
    pub fn epoch(&self) -> Epoch {
        self.epoch
    }

    /// A committed epoch begins here. One that has begun begins again without harm.
    pub fn begin(&mut self, epoch: Epoch) -> Result<(), Fenced> {
        if epoch < self.epoch {
            return Err(Fenced::Old { got: epoch, now: self.epoch });
        }
        self.epoch = epoch;
        Ok(())
    }

    /// Whether a message of this epoch may act here.
    pub fn admit(&self, epoch: Epoch) -> Result<(), Fenced> {
        match epoch.cmp(&self.epoch) {
            std::cmp::Ordering::Less => Err(Fenced::Old { got: epoch, now: self.epoch }),
            std::cmp::Ordering::Greater => Err(Fenced::Early { got: epoch, now: self.epoch }),
            std::cmp::Ordering::Equal => Ok(()),
        }
    }
}

/// Until when a node may serve. Times are of one steady clock of that node, in milliseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Lease {
    asked_ms: Option<u64>,
}

impl Lease {
    /// A majority answered a question that was asked at `asked_ms`. When it was asked counts, not when the answer came.
    pub fn renew(&mut self, asked_ms: u64) {
        self.asked_ms = self.asked_ms.max(Some(asked_ms));
    }

    /// Whether the node may serve.
    pub fn check(&self, now_ms: u64) -> Result<(), Fenced> {
        let silent_ms = self.asked_ms.map_or(now_ms, |asked| now_ms.saturating_sub(asked));
        if self.asked_ms.is_some() && silent_ms < LEASE_MS { Ok(()) } else { Err(Fenced::NoLease { silent_ms }) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fence_only_moves_on() {
        let mut fence = Fence::default();
        assert!(fence.admit(Epoch(1)).is_err());
        fence.begin(Epoch(3)).unwrap();
        fence.begin(Epoch(3)).unwrap();
        assert_eq!(fence.admit(Epoch(3)), Ok(()));
        assert_eq!(fence.admit(Epoch(2)), Err(Fenced::Old { got: Epoch(2), now: Epoch(3) }));
        assert_eq!(fence.admit(Epoch(4)), Err(Fenced::Early { got: Epoch(4), now: Epoch(3) }));
        assert_eq!(fence.begin(Epoch(2)), Err(Fenced::Old { got: Epoch(2), now: Epoch(3) }));
        assert_eq!(fence.epoch(), Epoch(3));
    }

    #[test]
    fn a_lease_counts_from_the_question() {
        let mut lease = Lease::default();
        assert!(lease.check(0).is_err());
        lease.renew(1000);
        lease.renew(500);
        assert_eq!(lease.check(1000 + LEASE_MS - 1), Ok(()));
        assert_eq!(lease.check(1000 + LEASE_MS), Err(Fenced::NoLease { silent_ms: LEASE_MS }));
        const { assert!(TAKEOVER_MS > LEASE_MS) }
    }
}
