//! Sequences, slots, chunks and the scheduler that keeps every stage of a pipeline busy.
//!
//! Pure: no tokio, no clock, no input or output. [`Engine`] is a state machine: its `handle_*` methods take something
//! in, its `poll_*` methods hand something out. [`Stage`] is the seam to what computes. A map:
//!
//! | module | idea |
//! |---|---|
//! | [`stage`] | `trait Stage`: what a layer range does with a micro-batch, and the order it enforces |
//! | [`contract`] | the tests that every stage passes |
//! | [`fake`] | a stage that hashes instead of multiplying, so that any KV mistake shows |
//! | [`config`] | the scheduler's limits, checked |
//! | [`schedule`] | the decisions as small pure functions: chunks, deal, whose turn it is |
//! | `sequence`, `slots`, `queue`, `flight` | one request, its place in the KV caches, those who wait, what is under way |
//! | [`engine`] | the state machine over all of them |
//!
//! Two sequences, A and B, decode over three stages while C's prompt comes in (a number is a step):
//!
//! ```text
//! stage 0 | A 0 | B 1 | C 2 | A 3 | C 4 | B 5 | ...
//! stage 1 |     | A 0 | B 1 | C 2 | A 3 | C 4 | ...
//! stage 2 |     |     | A 0 | B 1 | C 2 | A 3 | ...     the driver samples A's token after step 0, and so on
//! ```
//!
//! What always holds: steps count from 0 without gaps; micro-batches come back in the order they were sent; a sequence
//! has at most one decode row under way; a slot is given to another sequence only when nothing of the former one is
//! under way, and its `Clear` travels no later than the new one's first row.
#![forbid(unsafe_code)]

pub mod config;
pub mod contract;
pub mod engine;
pub mod fake;
mod flight;
mod queue;
pub mod schedule;
mod sequence;
mod slots;
pub mod stage;

pub use config::{ConfigError, EngineConfig};
pub use engine::{
    Completed, Counters, Engine, FinishedBy, InvariantBroken, PlannedBatch, Started, SubmitError, TokenOutcome,
};
pub use fake::{FakeModel, FakeStage};
pub use flight::CompletedError;
pub use stage::{Stage, StageError, StageOutput, StepGuard};
