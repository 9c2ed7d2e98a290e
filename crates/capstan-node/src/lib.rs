//! The daemon as a library: sockets, clock, supervision around the pure crates.
//!
//! | module | idea |
//! |---|---|
//! | [`service`] | what the HTTP layer asks of a node |
//! | [`node`] | what a node is made of, how it starts and stops |
//! | [`config`], [`error`] | what it is told, and why it does not start |
//! | `identity`, `files` | its key; small files that are there whole or not at all |
//! | `endpoint`, `frames` | QUIC by key; messages on a stream |
//! | `raft_link`, `agreement` | the replicated state's messages; what this node does about it |
//! | `membership`, `view` | who is in the cluster; how the others are |
//! | `keys` | the cluster's API keys, by their hashes |
//! | `pairing`, `nearby` | a short code instead of a ticket; how the machine that shows it is found |
//! | `control_client`, `control_server` | calls to other nodes, and answers |
//! | `deployments`, `blueprint`, `coordinator`, `cutter` | load and place; bring up, wire, mend; shards for others |
//! | [`weights`] | what the HTTP layer asks about models on disks |
//! | `catalogue` | the models that were pulled, who has which parts, how one is opened |
//! | `pulling`, `pull_source`, `plan_pull`, `digests` | a pull to its record: what is pulled; what each node gets; hashes along nodes |
//! | `assembling`, `supply` | files put together here and elsewhere; a stage's shard from parts |
//! | `replicas` | copies of layers, and which may be deleted |
//! | `scheduling` | what a load asks of the scheduler, and what follows for a placement |
//! | `saved`, `takeover` | a deployment written down; who goes on with it when its coordinator is lost |
//! | `session` | a coordinator's hold on one stage, wherever it runs |
//! | `stages`, `requests` | the stages that run here; a request's events, bounded |
//! | `rehearsal` | weights that are made up here, for a stage that only rehearses |
//! | `snapshots` | the folders in memory where stages keep KV snapshots |
//! | `arrival`, `runs` | a stage's files come; one run of a stage follows another |
//! | `generate` | a request's way to its driver and back |
//! | `placing`, `moving` | where layers go; when a model is loaded anew elsewhere by itself |
//! | `buffers` | how large compute buffers will be, by a dry run |
//! | `fleet` | the nodes that answer, as the planner wants them |
//! | `machine` | memory and devices |
//! | `measuring` | what this machine and its links reach, measured while nothing runs |
//! | `throttle` | progress that is reported only so often |

mod agreement;
mod arrival;
mod assembling;
mod blueprint;
mod buffers;
mod catalogue;
pub mod config;
mod control_client;
mod control_server;
mod coordinator;
mod cutter;
mod deployments;
mod digests;
mod endpoint;
pub mod error;
mod files;
mod fleet;
mod frames;
mod generate;
mod identity;
mod keys;
mod machine;
mod measuring;
mod membership;
mod moving;
mod nearby;
pub mod node;
mod pairing;
mod placing;
mod plan_pull;
mod pull_source;
mod pulling;
mod pulse;
mod raft_link;
mod rehearsal;
mod replicas;
mod requests;
mod runs;
mod saved;
mod scheduling;
pub mod service;
mod service_impl;
mod session;
mod snapshots;
mod stages;
mod supply;
mod takeover;
mod throttle;
mod transcript;
mod view;
pub mod weights;

pub use config::{Hub, NodeConfig};
pub use error::NodeError;
pub use node::Node;
pub use service::Service;
pub use weights::Weights;
