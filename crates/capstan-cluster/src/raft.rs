//! The log of changes: openraft, its disk and its messages.
//!
//! | module | idea |
//! |---|---|
//! | [`replica`] | one node's copy: start, propose, answer others, confirm |
//! | [`keeper`] | the leader keeps voters and learners in step with the members |
//! | [`store`] | log, vote and snapshot in one redb file |
//! | [`machine`] | the state behind the log |
//! | [`wire`] | messages between replicas, and the transport that carries them |
//! | [`chance`] | the draws of election timeouts, which a test may seed |
//!
//! ```text
//! propose ──▶ leader ──append──▶ voters and learners
//!               │  a majority of the voters has it on disk: committed
//!               ▼
//!            State::apply, on every node, in the same order
//! ```
pub mod chance;
pub mod keeper;
pub mod machine;
pub mod replica;
pub mod store;
pub mod wire;

use std::fmt;

use capstan_proto::NodeId;
use serde::{Deserialize, Serialize};

pub use replica::{ProposeError, Replica, Settings, Standing};
pub use store::{Store, StoreError};
pub use wire::{Lost, RaftMessage, RaftReply, RaftRequest, Transport};

use crate::command::{Outcome, Proposal};

/// A replica. A node that left and comes back has forgotten what it promised, and so is another one: whatever still
/// counts on the old one's vote must not get the new one's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct RaftId {
    /// The node.
    pub node: NodeId,
    /// Which of its lives in this cluster ([`State::life`](crate::State::life)).
    pub life: u64,
}

impl fmt::Display for RaftId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.node.short(), self.life)
    }
}

openraft::declare_raft_types!(
    /// What openraft is made of here. Where a node is dialled is no concern of its: the member list says that.
    pub Types:
        D = Proposal,
        R = Outcome,
        NodeId = RaftId,
        Node = openraft::EmptyNode,
        Entry = openraft::Entry<Types>,
        SnapshotData = Vec<u8>,
        Responder = openraft::impls::OneshotResponder<Types>,
        AsyncRuntime = chance::Runtime,
);

pub(crate) type LogId = openraft::LogId<RaftId>;
pub(crate) type Entry = openraft::Entry<Types>;
pub(crate) type StoredMembership = openraft::StoredMembership<RaftId, openraft::EmptyNode>;
pub(crate) type SnapshotMeta = openraft::SnapshotMeta<RaftId, openraft::EmptyNode>;
