//! Micro-batches under way: sent, not yet back. The pipeline is a queue, so they return in order.
use std::collections::VecDeque;

use crate::cost::Work;

/// What a micro-batch is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BatchKind {
    /// A chunk of a prompt.
    Prefill,
    /// The next token of each of some sequences.
    Decode,
    /// A token that may be a sequence's next one.
    Guess,
    /// Rows of no sequence: how long do they take?
    Measure,
    /// No rows: snapshots are restored.
    Restore,
}

/// A micro-batch that is under way.
#[derive(Debug)]
pub(crate) struct Sent {
    pub step: u64,
    pub kind: BatchKind,
    /// Whose rows it has, ascending; none for a measurement.
    pub slots: Vec<u32>,
    /// Rows flagged `output`: none, or one of each of `slots`, or all those of a measurement.
    pub outputs: u32,
    /// What it asks of a stage: one thing after the other.
    pub runs: Vec<Work>,
    /// Its guess is known to be wrong.
    pub void: bool,
    /// Nothing else was under way when it was sent.
    pub alone: bool,
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
    pub fn push(&mut self, kind: BatchKind, slots: Vec<u32>, outputs: u32, runs: Vec<Work>) -> u64 {
        let step = self.next_step;
        self.next_step += 1;
        let alone = self.sent.is_empty();
        self.sent.push_back(Sent { step, kind, slots, outputs, runs, void: false, alone });
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

    pub fn get(&self, step: u64) -> Option<&Sent> {
        self.sent.iter().find(|s| s.step == step)
    }

    /// The step that the next micro-batch will have.
    pub fn next_step(&self) -> u64 {
        self.next_step
    }

    /// Its guess is wrong.
    pub fn void(&mut self, step: u64) {
        self.sent.iter_mut().filter(|s| s.step == step).for_each(|s| s.void = true);
    }

    pub fn len(&self) -> usize {
        self.sent.len()
    }

    /// Those of a kind, void ones left out.
    pub fn count(&self, kind: BatchKind) -> usize {
        self.sent.iter().filter(|s| s.kind == kind && !s.void).count()
    }

    pub fn iter(&self) -> impl Iterator<Item = &Sent> {
        self.sent.iter()
    }
}
