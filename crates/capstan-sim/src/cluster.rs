//! The state that a cluster agrees on, in virtual time: real openraft on disks that lose what was not synced, over a
//! network that drops, delays, doubles and cuts. A seed decides a run.
//!
//! | module | idea |
//! |---|---|
//! | [`mod@run`] | one run: a cluster grows, chance has its way, everything heals, all must agree |
//! | [`node`] | a node: its disk, its replica, what it serves |
//! | [`driver`] | places a deployment, begins its epoch, sends work; an old one may be stubborn |
//! | [`net`] | the network, and what a node's door lets in |
//! | [`disk`] | a disk that may lose power |
//! | [`books`] | what everybody saw, and the rules it must keep |
//!
//! What is not decided by the seed: nothing that a run's outcome was seen to depend on. openraft's election timeouts are
//! drawn from the run's dice ([`capstan_cluster::raft::chance`]), tokio's clock is paused and its one thread takes tasks
//! in order; a run's fingerprint covers every message and every applied entry, and a test compares two runs of a seed.
pub mod books;
pub mod disk;
pub mod driver;
pub mod net;
pub mod node;
pub mod run;

pub use books::Tally;
pub use run::{Failure, Options, run};

/// Something built wrongly on purpose, to prove that the rules find it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mistake {
    /// Disks say that something is synced and then lose it.
    LyingDisks,
    /// Stages take messages of any epoch.
    NoFence,
    /// Nodes serve on without a majority, and new epochs begin without waiting for them.
    NoLease,
}
