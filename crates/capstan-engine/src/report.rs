//! What the engine hands out, and why it refuses what it is handed.
use capstan_proto::data::{KvOp, MicroBatch, Payload, Row};
use capstan_proto::{Epoch, RequestId};

use crate::flight::BatchKind;

/// A micro-batch to send. The driver adds the epoch, and embeds the tokens where stages take hidden states.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PlannedBatch {
    /// Counts from 0 in an epoch, without gaps.
    pub step: u64,
    /// What it is for.
    pub kind: BatchKind,
    /// KV operations that precede the rows.
    pub ops: Vec<KvOp>,
    /// Rows of one sequence, or one row each of several, slots ascending; none only to restore snapshots.
    pub rows: Vec<Row>,
    /// One a row.
    pub tokens: Vec<i32>,
    /// What the snapshot holds that is to be saved behind the rows, if one is.
    pub saved: Option<Saved>,
}

/// A KV snapshot, as whoever restores it must know it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Saved {
    /// The slot that it is of.
    pub slot: u32,
    /// By which stages find it; later ones have greater marks.
    pub mark: u64,
    /// The tokens whose KV it holds.
    pub tokens: Vec<i32>,
    /// Of these and those that followed so many were asked; the rest is answered.
    pub asked: u32,
    /// Of these the first ones that were computed in chunks of the fixed grid.
    pub grid_rows: u32,
}

impl PlannedBatch {
    /// The micro-batch with what its rows are computed on.
    pub fn into_micro_batch(self, epoch: Epoch, payload: Payload) -> MicroBatch {
        MicroBatch { epoch, step: self.step, ops: self.ops, rows: self.rows, payload }
    }
}

/// A request left the queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Started {
    /// Which.
    pub id: RequestId,
    /// The slot it got.
    pub slot: u32,
    /// Tokens of its prompt that were in the caches already.
    pub cached: u32,
}

/// What a micro-batch that came back brought.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Completed {
    /// What it was for.
    pub kind: BatchKind,
    /// The requests that await a token now, each with the index of its row among those flagged `output`: its logits are
    /// `[index * n_vocab .. (index + 1) * n_vocab]`. Those cancelled meanwhile are left out.
    pub outputs: Vec<(RequestId, usize)>,
    /// Rows flagged `output` in all, so the micro-batch must have brought `output_rows * n_vocab` logits. None of a
    /// guess that was known to be wrong.
    pub output_rows: usize,
}

/// A guess that the draft model may make.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GuessWanted {
    /// For which request.
    pub id: RequestId,
    /// What is certain of it and what is guessed already: the guess is what comes next.
    pub tokens: Vec<i32>,
    /// Whether it is likely enough to be made before a micro-batch that waits for the driver is computed: the stages
    /// before it rest until it is sent. Else it is made only while nothing waits.
    pub first: bool,
}

/// What became of a sequence with a new token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TokenOutcome {
    /// It goes on.
    Continue,
    /// That was its last token; it is no longer known.
    Finished(FinishedBy),
    /// The request awaits no token: it is unknown, or was cancelled or finished. Nothing changed.
    Ignored,
}

/// Which length ended a sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FinishedBy {
    /// The request's own `max_tokens`.
    MaxTokens,
    /// Prompt and answer together fill the context.
    Context,
}

/// Why a request was not taken. Nothing changed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SubmitError {
    /// There is nothing to continue.
    #[error("the prompt has no tokens; send at least one")]
    Empty,
    /// `max_tokens` is 0.
    #[error("max_tokens is 0; ask for at least one token")]
    NoTokens,
    /// The prompt leaves no room for an answer.
    #[error(
        "the prompt has {prompt} tokens, but the context holds {ctx}, answer included; shorten the prompt or load the \
         model with a larger context"
    )]
    ContextExceeded {
        /// Its tokens.
        prompt: usize,
        /// Tokens that a slot holds.
        ctx: u32,
    },
    /// All slots are taken and the queue is full.
    #[error("{queue_max} requests wait already; try again in a moment")]
    Busy {
        /// How many may wait.
        queue_max: usize,
    },
    /// The name is taken by a request that lives.
    #[error("request {0} is already being answered; every request needs a name of its own")]
    Duplicate(RequestId),
}

/// What speculation did for one request so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SequenceStats {
    /// Tokens guessed ahead.
    pub guessed: u32,
    /// Of these, right ones.
    pub accepted: u32,
}

/// How much is going on, and how much has been since the engine was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Slots in all.
    pub slots: u32,
    /// Those with a sequence, or whose last micro-batch is still under way.
    pub slots_used: u32,
    /// Requests without a slot.
    pub queued: usize,
    /// Micro-batches under way.
    pub in_flight: usize,
    /// Tokens of all prompts that got a slot.
    pub prompt_tokens: u64,
    /// Of these, taken from the caches.
    pub cached_tokens: u64,
    /// Tokens guessed.
    pub guessed: u64,
    /// Of these, right ones.
    pub accepted: u64,
    /// Guesses given up while they were under way.
    pub dropped: u64,
}

/// A mistake in the scheduler itself.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the scheduler contradicts itself: {0}; this is a bug, please report it")]
pub struct InvariantBroken(pub(crate) String);
