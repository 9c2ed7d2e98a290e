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
//! | [`cost`] | what a micro-batch costs on each stage, measured |
//! | [`schedule`] | how a prompt is cut, and how much of it goes along with those who decode |
//! | [`dealing`] | into which groups sequences are best dealt |
//! | `measure` | the short measurement at the start |
//! | `sequence`, `slots`, `queue`, `flight` | one request, its place in the KV caches, those who wait, what is under way |
//! | `dealer` | which sequences decode together, and when that changes |
//! | `turns` | whose turn it is, chunks or groups |
//! | `throttle` | whether steps beside a prompt are as long as was reckoned |
//! | `prefix` | what a new prompt takes over from the caches |
//! | `ngram`, `guess` | where guesses come from, and whether they pay |
//! | [`engine`] | the state machine over all of them; `report` what it hands out, `invariants` what always holds |
//!
//! Two sequences, A and B, decode over three stages while C's prompt comes in (a number is a step):
//!
//! ```text
//! stage 0 | A 0 | B 1 | C 2 | A 3 | C 4 | B 5 | ...
//! stage 1 |     | A 0 | B 1 | C 2 | A 3 | C 4 | ...
//! stage 2 |     |     | A 0 | B 1 | C 2 | A 3 | ...     the driver samples A's token after step 0, and so on
//! ```
//!
//! A lone sequence leaves stages idle. They verify guesses, one token a micro-batch, of which the sampled token tells
//! whether it was right:
//!
//! ```text
//! stage 0 | A 0 | A 1? | A 2? | A 3 | ...        step 1 was guessed right, step 2 was not: it is void, and its row is
//! stage 1 |     | A 0  | A 1? | void| A 3 | ...  trimmed from the caches before step 3
//! ```
//!
//! What always holds: steps count from 0 without gaps; micro-batches come back in the order they were sent; a sequence
//! has at most one row under way that is not a guess; a slot is given to another sequence only when nothing of the
//! former one is under way, and what it must forget or copy travels no later than the new one's first row.
#![forbid(unsafe_code)]

pub mod config;
pub mod contract;
pub mod cost;
mod dealer;
pub mod dealing;
pub mod engine;
pub mod fake;
mod flight;
mod guess;
mod invariants;
mod measure;
mod ngram;
mod prefix;
mod queue;
mod report;
pub mod schedule;
mod sequence;
mod slots;
pub mod stage;
mod throttle;
mod turns;

pub use config::{ConfigError, EngineConfig, in_flight_max};
pub use cost::{CostModel, Work};
pub use engine::Engine;
pub use fake::{FakeModel, FakeSnapshot, FakeStage};
pub use flight::{BatchKind, CompletedError};
pub use report::{
    Completed, Counters, FinishedBy, GuessWanted, InvariantBroken, PlannedBatch, Saved, SequenceStats, Started,
    SubmitError, TokenOutcome,
};
pub use stage::{Stage, StageError, StageOutput, StepGuard};
