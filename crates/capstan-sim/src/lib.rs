//! Virtual time: the very engine of a driver over stages and links that take as long as they are told, and the very state
//! of a cluster over disks and a network that fail.
//!
//! Pure but for the binaries' reports: no clock, no sockets; a seed decides a run to the last bit. A map:
//!
//! | module | idea |
//! |---|---|
//! | [`dice`] | chance that a seed decides |
//! | [`cost`] | what stages, links and the driver take |
//! | [`profiles`] | the machines that scenarios run on |
//! | [`text`] | what is said, and the answer that a request gets alone |
//! | [`station`], [`link`] | a stage and a link with their bounded queues |
//! | [`world`] | events in virtual time: the engine, the pipeline, the clients |
//! | [`check`] | what must hold in every run |
//! | [`log`] | what happened, for the figures |
//! | [`bound`] | the best that a pipeline could do |
//! | [`scenario`], [`figure`] | what is asked, and the table of answers |
//! | [`workload`] | random workloads, for the checkers |
//! | [`report`] | `target/reports/sim.json` |
//! | [`cluster`] | what a cluster agrees on: members, removals, epochs |
//!
//! docs/simulation.md defines bounds and figures.
#![forbid(unsafe_code)]

pub mod bound;
pub mod check;
pub mod cluster;
pub mod cost;
pub mod dice;
pub mod figure;
pub mod link;
pub mod log;
pub mod profiles;
pub mod report;
pub mod scenario;
pub mod station;
pub mod text;
pub mod workload;
pub mod world;
