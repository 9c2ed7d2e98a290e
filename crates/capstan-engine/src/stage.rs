//! The seam to whatever computes a layer range: one trait, one answer, one error, and the order every stage enforces.
use capstan_proto::Epoch;
use capstan_proto::data::{DataError, MicroBatch};

/// A layer range that computes micro-batches and holds the KV cache of its layers.
///
/// What an implementation must do is what [`crate::contract::check_stage`] checks.
pub trait Stage {
    /// Applies the batch's KV operations in order, computes its rows and keeps their KV.
    ///
    /// Refuses, without changing anything, a micro-batch of another epoch, one out of order, one that is malformed and
    /// one whose payload is not what this layer range takes. A batch without rows gives an empty answer.
    fn forward(&mut self, batch: &MicroBatch) -> Result<StageOutput, StageError>;

    /// Empties the whole KV cache and enters `epoch`, whose steps start at 0.
    fn reset(&mut self, epoch: Epoch) -> Result<(), StageError>;
}

/// What a stage answers to a micro-batch.
#[derive(Clone, Debug, PartialEq)]
pub enum StageOutput {
    /// Hidden states of **all** rows, row after row: what the next stage takes.
    Hidden(Vec<f32>),
    /// The last stage: `n_vocab` logits for each row flagged `output`, in row order.
    Logits(Vec<f32>),
}

/// Why a stage did not compute a micro-batch.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StageError {
    /// The micro-batch belongs to another placement. Nothing changed: drop it and go on.
    #[error("a micro-batch of epoch {got} reached a stage in epoch {want}; it was dropped, nothing changed")]
    WrongEpoch {
        /// The stage's epoch.
        want: Epoch,
        /// The micro-batch's.
        got: Epoch,
    },
    /// A micro-batch is missing or came twice. Nothing changed, but the epoch cannot go on: start the next one.
    #[error("micro-batch {got} came where {want} was expected; nothing changed, but a new epoch must be started")]
    OutOfOrder {
        /// The step the stage expects.
        want: u64,
        /// The micro-batch's.
        got: u64,
    },
    /// The micro-batch was not accepted. Nothing changed; the step has not been used up.
    #[error("the stage refused a micro-batch: {0}; nothing changed, send a correct one for the same step")]
    Refused(String),
    /// The KV cache may have changed in part: the epoch is lost. Only [`Stage::reset`] helps.
    #[error("the stage failed: {0}; its KV cache is no longer valid, a new epoch must be started")]
    Failed(String),
}

impl StageError {
    /// Whether the KV cache may have changed, so that only [`Stage::reset`] makes the stage usable again.
    pub fn kv_changed(&self) -> bool {
        matches!(self, Self::Failed(_))
    }
}

impl From<DataError> for StageError {
    fn from(e: DataError) -> Self {
        Self::Refused(e.to_string())
    }
}

/// The order of micro-batches, for stages to embed.
///
/// A stage calls [`StepGuard::check`] before it touches anything, [`StepGuard::advance`] after the micro-batch is
/// computed and [`StepGuard::fail`] when it broke in between.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StepGuard {
    epoch: Epoch,
    next: u64,
    failed: bool,
}

impl StepGuard {
    /// A stage that has just entered `epoch`.
    pub fn new(epoch: Epoch) -> Self {
        Self { epoch, next: 0, failed: false }
    }

    /// Enters `epoch`; its steps start at 0. The guard does not mind an older one: who wires stages decides.
    pub fn reset(&mut self, epoch: Epoch) {
        *self = Self::new(epoch);
    }

    /// Checks epoch, step and [`MicroBatch::check`]. Changes nothing.
    pub fn check(&self, batch: &MicroBatch) -> Result<(), StageError> {
        if batch.epoch != self.epoch {
            return Err(StageError::WrongEpoch { want: self.epoch, got: batch.epoch });
        }
        if self.failed {
            return Err(StageError::Failed("an earlier micro-batch of this epoch broke off".into()));
        }
        if batch.step != self.next {
            return Err(StageError::OutOfOrder { want: self.next, got: batch.step });
        }
        Ok(batch.check()?)
    }

    /// The micro-batch that was checked is computed: the next step is expected.
    pub fn advance(&mut self) {
        self.next += 1;
    }

    /// Poisons the epoch: every further micro-batch of it fails.
    pub fn fail(&mut self) {
        self.failed = true;
    }

    /// The stage's epoch.
    pub fn epoch(&self) -> Epoch {
        self.epoch
    }

    /// The step that is expected next.
    pub fn next_step(&self) -> u64 {
        self.next
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use capstan_proto::data::Payload;

    fn batch(epoch: u64, step: u64) -> MicroBatch {
        MicroBatch { epoch: Epoch(epoch), step, ops: vec![], rows: vec![], payload: Payload::Hidden(vec![]) }
    }

    #[test]
    fn the_guard_lets_only_the_next_step_of_its_epoch_pass() {
        let mut guard = StepGuard::new(Epoch(2));
        assert_eq!(guard.check(&batch(1, 0)), Err(StageError::WrongEpoch { want: Epoch(2), got: Epoch(1) }));
        assert_eq!(guard.check(&batch(2, 1)), Err(StageError::OutOfOrder { want: 0, got: 1 }));
        assert_eq!(guard.check(&batch(2, 0)), Ok(()));
        guard.advance();
        assert_eq!(guard.check(&batch(2, 0)), Err(StageError::OutOfOrder { want: 1, got: 0 }));
        guard.fail();
        assert!(guard.check(&batch(2, 1)).is_err_and(|e| e.kv_changed()));
        guard.reset(Epoch(3));
        assert_eq!(guard.check(&batch(3, 0)), Ok(()));
    }
}
