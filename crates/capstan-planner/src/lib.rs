//! Topology and cost in, placement and its explanation out: a pure function.
//!
//! It gives the stages equal work, under the memory of the nodes and the windows that an architecture allows.
//!
//! | module | idea |
//! |---|---|
//! | [`cost`] | what a window needs in memory and in time |
//! | [`placement`] | ordered stages that provably cover every layer once |
//! | [`plan`](mod@plan) | which layers go where, or a sentence that says why nowhere |
#![forbid(unsafe_code)]

pub mod cost;
pub mod placement;
pub mod plan;

pub use cost::{Need, Sizes};
pub use placement::{BadPlacement, Placement, StagePlan};
pub use plan::{NodeResources, PlanError, PlanInput, PlanOptions, plan};

/// Bytes for people: `1.5 GiB`, `312 MiB`.
pub fn human_bytes(bytes: u64) -> String {
    let mib = bytes as f64 / f64::from(1 << 20);
    if mib >= 1024.0 { format!("{:.1} GiB", mib / 1024.0) } else { format!("{} MiB", mib.ceil() as u64) }
}
