//! Topology and cost in, placement, forecast and explanation out: pure functions.
//!
//! Two ways lead to a placement. [`plan()`] places a model on the nodes of a cluster, all taken as equally fast.
//! [`answer()`] plans with machines of known speed, of a catalogue or of one's own, before anybody buys, downloads or
//! waits: whether a model fits, on how many of them, and how fast it will be.
//!
//! | module | idea |
//! |---|---|
//! | [`cost`] | what a window needs in memory and, for nodes taken as equal, in time |
//! | [`placement`] | ordered stages that provably cover every layer once |
//! | [`plan`](mod@plan) | which layers go where on the nodes of a cluster, or a sentence that says why nowhere |
//! | [`shape`] | a model's shape from its public configuration, and the profile of a quantisation of it |
//! | [`quant`] | how many bits the weights of a quantisation take |
//! | [`header`] | a GGUF header made from a shape, so that it can be rehearsed |
//! | [`models`] | the catalogue of large models |
//! | [`machines`] | the catalogue of machines, what they reach, and lists of them as people type them |
//! | [`machine_file`] | machines of one's own from TOML |
//! | [`links`] | round trips and bandwidths between machines |
//! | `measured` | the same for a machine that was measured |
//! | [`nodes`] | the nodes of a cluster as machines and links, by what they tell of themselves |
//! | [`timing`] | how long a machine takes for a micro-batch on some layers |
//! | [`arrange`] | the best order and cut over unequal machines, exactly |
//! | [`resident`] | the memory that a stage's process will be seen to hold |
//! | [`forecast`] | time to the first token, tokens per second, memory, loading, traffic |
//! | [`answer`](mod@answer) | the whole answer to "how many, and how fast", in sentences |
//! | [`moving`] | whether another placement is worth loading a model anew |
//! | [`table`] | the answer as tables and sentences |
//! | [`picture`] | the answer as an SVG |
//! | [`names`] | names in any spelling, and the nearest ones when unknown |
#![forbid(unsafe_code)]

pub mod answer;
pub mod arrange;
pub mod cost;
pub mod forecast;
pub mod header;
pub mod links;
pub mod machine_file;
pub mod machines;
mod measured;
pub mod models;
pub mod moving;
pub mod names;
pub mod nodes;
pub mod picture;
pub mod placement;
pub mod plan;
pub mod quant;
pub mod resident;
pub mod shape;
pub mod table;
pub mod timing;

pub use answer::{
    Answer, Question, Subject, Target, Unfit, Wish, answer, best_ubatch, fewest_of, machines_for, place, targets,
};
pub use arrange::Objective;
pub use cost::{Buffers, Need, Sizes};
pub use forecast::Forecast;
pub use links::{Link, Links};
pub use machines::{Machine, Rates};
pub use moving::Move;
pub use placement::{BadPlacement, Placement, StagePlan};
pub use plan::{NodeResources, PlanError, PlanInput, PlanOptions, plan};
pub use shape::Shape;

/// Bytes for people: `1.5 GiB`, `312 MiB`.
pub fn human_bytes(bytes: u64) -> String {
    let mib = bytes as f64 / f64::from(1 << 20);
    if mib >= 1024.0 { format!("{:.1} GiB", mib / 1024.0) } else { format!("{} MiB", mib.ceil() as u64) }
}
