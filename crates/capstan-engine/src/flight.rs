//! Micro-batches under way: sent, not yet back. The pipeline is a queue, so they return in order.
use std::collections::VecDeque;

/// A micro-batch that is under way.
#[derive(Debug)]
pub(crate) struct Sent {
    pub step: u64,
    /// Whose rows it has, ascending.
    pub slots: Vec<u32>,
    /// Whether each of `slots` has one row flagged `output`; else none has.
    pub outputs: bool,
}

/// A micro-batch came back that is not the oldest under way. Nothing changed, but the pipeline lost or repeated
/// something: the epoch must be given up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("micro-batch {got} came back where {want:?} was expected; the pipeline must be wired again under a new epoch")]
pub struct CompletedError {
    /// The oldest step under way; none when nothing is.
    pub want: Option<u64>,
    /// The step that came.
    pub got: u64,
}

/// What is under way in an epoch.
#[derive(Debug, Default)]
pub(crate) struct Flight {
    sent: VecDeque<Sent>,
    next_step: u64,
}

impl Flight {
    /// Notes a micro-batch as sent; gives its step.
    pub fn push(&mut self, slots: Vec<u32>, outputs: bool) -> u64 {
        let step = self.next_step;
        self.next_step += 1;
        self.sent.push_back(Sent { step, slots, outputs });
        step
    }

    /// Takes the oldest one, which must be `step`.
    pub fn pop(&mut self, step: u64) -> Result<Sent, CompletedError> {
        let want = self.sent.front().map(|s| s.step);
        if want != Some(step) {
            return Err(CompletedError { want, got: step });
        }
        self.sent.pop_front().ok_or(CompletedError { want, got: step })
    }

    pub fn len(&self) -> usize {
        self.sent.len()
    }

    pub fn iter(&self) -> impl Iterator<Item = &Sent> {
        self.sent.iter()
    }
}
