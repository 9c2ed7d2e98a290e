//! The fence around llama.cpp: the only crate with unsafe code, and the only one that links C++.
//!
//! What is here is owned and checked: a type per C object with `Drop`, every precondition of a C call tested in Rust
//! first, because a failed assertion in C++ aborts the process. What cannot be tested (a wrong shard's tensors, memory
//! that runs out) still may; that is why each stage is a process of its own.
//!
//! | module | idea |
//! |---|---|
//! | [`backend`] | start llama.cpp once; which devices compute |
//! | `log` | llama.cpp's log lines become `tracing` events, and the sentences of our errors |
//! | [`model`] | weights in memory |
//! | [`vocab`] | text to tokens and back |
//! | [`context`] | KV cache and compute buffers; runs a micro-batch |
//! | `batch` | rows of a micro-batch as llama.cpp wants them |
//! | `capture` | takes the hidden state out of the graph and ends it there |
//! | [`stage`] | a layer range behind the engine's `Stage` |
//! | [`sampler`] | a token from logits |
//! | [`rows`] | an embedding row from a quantised tensor |
//! | `sparse` | mapping a file that is larger than the memory |
//! | `snapshot` | a slot's cache as a file |
//! | `rpc` | llama.cpp's own RPC, for the benchmark to compare with (feature `rpc`, never on in the product) |
pub mod backend;
mod batch;
mod capture;
pub mod context;
mod error;
mod log;
pub mod model;
pub mod rows;
#[cfg(feature = "rpc")]
pub mod rpc;
pub mod sampler;
mod snapshot;
mod sparse;
pub mod stage;
pub mod vocab;

pub use backend::{DeviceInfo, DeviceKind, devices, init, offloads};
pub use capture::Capture;
pub use context::{Context, ContextMemory, ContextOptions};
pub use error::LlamaError;
pub use model::{Model, ModelOptions, Progress};
pub use rows::{append_row, dequantize_row, row_bytes};
pub use sampler::{Sampler, logprobs};
pub use stage::{LlamaStage, StageInput, StageOptions, dry_run};
pub use vocab::Vocab;
