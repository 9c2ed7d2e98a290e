//! The compute child: one process for one stage, so that an abort in C++ is a lost stage and never a lost node.
//!
//! | module | idea |
//! |---|---|
//! | [`host`] | the daemon's side: start a child, talk with it, notice its end |
//! | [`child`] | the child's side: standard input to compute thread, results to standard output |
//! | [`ask`] | questions that a short-lived child answers in JSON: devices, memory of a stage, speed |
//! | [`measure`] | what this machine takes to compute |
//! | [`link`] | frames between stages, behind a trait; iroh is the transport |
//! | `wire` | one epoch's place in the ring: accept the previous stage, dial the next |
//! | `drops` | steps that need not be computed any more |
//! | `middle` | the compute loop of every stage but the last |
//! | `driver` | the compute loop of the last stage: schedule, compute, sample |
//! | `draft` | a small model beside the driver that guesses what comes next |
//! | `answer` | one request inside the driver: sampler, text, log-probabilities, counts |
//! | `snapshots` | the files of KV snapshots |
//! | `prompt` | chat template and tokenizer, off the compute thread |
//! | `counters` | what is counted, read once a second |
//! | `os` | standard output kept for the protocol |
//! | `embed` | embedding rows from the last stage's own file |
//!
//! Two threads matter in a child. The *compute thread* owns llama.cpp and nothing else blocks it but its one queue; the
//! async runtime owns pipes and links. While the compute thread works on a micro-batch, the runtime already receives
//! the next and sends the previous:
//!
//! ```text
//! runtime   recv k+1 | send k-1   recv k+2 | send k
//! compute   ---- k ----           ---- k+1 ----
//! ```
#![forbid(unsafe_code)]

mod answer;
pub mod ask;
pub mod child;
mod counters;
mod draft;
mod driver;
mod drops;
mod embed;
pub mod host;
pub mod link;
pub mod measure;
mod middle;
mod os;
mod prompt;
mod snapshots;
mod wire;

pub use host::devices;
