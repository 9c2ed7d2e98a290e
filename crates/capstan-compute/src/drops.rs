//! Steps that need not be computed any more: marked by the task that reads notices, looked up by the compute thread.
//!
//! A notice names steps that may be anywhere: computed already, waiting here, or not here yet. All steps of a notice are
//! marked at once, so that the guesses of a sequence are void from one of them on and never with a gap.
use std::collections::BTreeSet;
use std::sync::{Mutex, MutexGuard, PoisonError};

use capstan_proto::limits;

/// More steps were marked than can be under way: the sender is broken.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct TooMany;

/// The marks of one epoch at one stage.
#[derive(Debug, Default)]
pub(crate) struct Drops(Mutex<Marks>);

#[derive(Debug, Default)]
struct Marks {
    /// The compute thread has begun all steps before this one.
    next: u64,
    /// At most [`limits::IN_FLIGHT_MAX`], none before `next`.
    marked: BTreeSet<u64>,
}

impl Drops {
    /// Marks steps; those that were begun already are left out.
    pub fn mark(&self, steps: &[u64]) -> Result<(), TooMany> {
        let mut marks = self.marks();
        let next = marks.next;
        marks.marked.extend(steps.iter().filter(|step| **step >= next));
        if marks.marked.len() > limits::IN_FLIGHT_MAX { Err(TooMany) } else { Ok(()) }
    }

    /// The compute thread begins this step. Whether it is marked.
    pub fn begin(&self, step: u64) -> bool {
        let mut marks = self.marks();
        marks.next = marks.next.max(step.saturating_add(1));
        let later = marks.marked.split_off(&step.saturating_add(1));
        std::mem::replace(&mut marks.marked, later).contains(&step)
    }

    fn marks(&self) -> MutexGuard<'_, Marks> {
        // Nothing in here can panic half-way.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marks_are_found_once_and_late_ones_forgotten() {
        let drops = Drops::default();
        assert!(!drops.begin(0));
        drops.mark(&[0, 2, 3, 7]).unwrap();
        assert!(!drops.begin(1));
        assert!(drops.begin(2) && drops.begin(3));
        assert!(!drops.begin(3), "a mark is used up");
        drops.mark(&[1, 2]).unwrap();
        assert!(!drops.begin(4));
        assert!(drops.begin(7));
        assert_eq!(drops.0.lock().unwrap().marked.len(), 0);
        assert!(!drops.begin(u64::MAX));
    }

    #[test]
    fn marks_are_bounded() {
        let drops = Drops::default();
        let many: Vec<u64> = (0..limits::IN_FLIGHT_MAX as u64).collect();
        assert_eq!(drops.mark(&many), Ok(()));
        assert_eq!(drops.mark(&many), Ok(()), "the same ones again");
        assert_eq!(drops.mark(&[1 << 40]), Err(TooMany));
    }
}
