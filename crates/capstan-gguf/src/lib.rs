//! Read untrusted GGUF files, say what is in them, and write any layer range as a GGUF of its own.
//!
//! A shard is an ordinary GGUF: layers renumbered from 0, metadata adjusted by the rules of its architecture, loaded by
//! unmodified llama.cpp. Pure: no tokio, no clock, no sockets; files are the only effect. A map:
//!
//! | module | idea |
//! |---|---|
//! | [`mod@model`] | an open model: one file or its splits, metadata, tensors |
//! | [`metadata`] | keys and values in file order; long arrays stay where they lie |
//! | [`parse`] | bytes to a header, every count and length checked before anything is allocated |
//! | [`bytes`] | a file's bytes, memory-mapped |
//! | [`beginnings`] | a model from the first bytes of files that are elsewhere |
//! | [`types`] | the ggml tensor types and their block sizes |
//! | [`arch`] | the one table of architecture rules, and which windows it allows |
//! | [`cut`] | what a shard of a layer range contains |
//! | [`shard`] | writing it: shared extents, nothing half-written |
//! | [`writer`] | a GGUF from metadata and tensors |
//! | [`synthetic`] | weights made up for a header, taking next to no space |
//! | [`profile`] | what the planner needs to know of a model |
#![forbid(unsafe_code)]

pub mod arch;
pub mod beginnings;
pub mod bytes;
pub mod cut;
pub mod error;
pub mod metadata;
pub mod model;
pub mod parse;
pub mod profile;
pub mod shard;
pub mod synthetic;
pub mod types;
pub mod writer;

pub use error::GgufError;
pub use metadata::{Array, Metadata, Value, ValueType};
pub use model::Model;
pub use parse::TensorInfo;
pub use profile::{LayerProfile, Matrices, ModelProfile, Part};
pub use shard::{Recipe, Run, ShardInfo};
