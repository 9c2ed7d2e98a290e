//! Changes to the replicated state as values, and what comes of them.
//!
//! A change may be applied twice, when its answer was lost and it was asked for again: each is made so that the second
//! time changes nothing and answers like the first.
use std::net::SocketAddr;

use capstan_proto::control::{ADDRS_MAX, Member};
use capstan_proto::limits::{LAYERS_MAX, NAME_BYTES_MAX};
use capstan_proto::{ClusterId, DeploymentId, Epoch, LayerRange, NodeId};
use serde::{Deserialize, Serialize};

use crate::members::MemberError;
use crate::ticket::{TicketBook, TicketError};

/// Most deployments of a cluster: as many as one node may coordinate, for a few nodes.
pub const DEPLOYMENTS_MAX: usize = 256;
/// Longest recipe of a deployment, in bytes: a path of 4 KiB, names of nodes, and numbers.
pub const RECIPE_BYTES_MAX: usize = 8 << 10;
/// Most keys that a cluster remembers as removed. They are kept for its whole life, 200 bytes each.
pub const REMOVED_MAX: usize = 4096;

/// A change that somebody asks for. Time travels in it: whoever applies it has no clock.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Proposal {
    /// The member that asks.
    pub by: NodeId,
    /// When it asks, in milliseconds since 1970.
    pub at_ms: u64,
    /// What it asks for.
    pub command: Command,
}

/// What a node says of itself when it comes in.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Newcomer {
    /// Its key.
    pub id: NodeId,
    /// The name it would like.
    pub name: String,
    /// Where it is dialled.
    pub addrs: Vec<SocketAddr>,
    /// Version of capstan it runs.
    pub version: String,
}

/// Why a node may come in.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Voucher {
    /// It holds the ticket whose secret has this hash.
    Ticket([u8; 32]),
    /// The member that asks has made sure of it in another way, such as a pairing code.
    Member,
}

/// A stage's place.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Seat {
    /// The node that runs it.
    pub node: NodeId,
    /// Its layers.
    pub layers: LayerRange,
}

/// What a change is. New kinds go to the end: the log of a running cluster holds the old ones.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub enum Command {
    /// The first change of a cluster: what it was before it had a log.
    Found {
        /// Its name.
        cluster: ClusterId,
        /// Its members.
        members: Vec<Member>,
        /// Tickets that are out.
        tickets: TicketBook,
    },
    /// Let a node in, or back in after it left.
    Admit {
        /// Which.
        node: Newcomer,
        /// Why.
        voucher: Voucher,
        /// Tells a request that is made again from another one, which begins a new life. Grows from one request of a
        /// node to its next: milliseconds since 1970 do.
        attempt: u64,
    },
    /// The member that asks has another name, address or version now.
    Refresh(Newcomer),
    /// The member that asks leaves. It may come back with a ticket.
    Leave {
        /// In which of its lives: one that comes late must not end the next.
        life: u64,
    },
    /// Take a member out for good: its key is never let in again.
    Remove(NodeId),
    /// A ticket is out.
    Issue {
        /// Hash of its secret.
        hash: [u8; 32],
        /// In seconds since 1970.
        expires_unix_s: u64,
        /// Whether several nodes may use it.
        reusable: bool,
    },
    /// A deployment runs like this from now on, under a new epoch. The member that asks is its driver's coordinator.
    Place {
        /// Which.
        deployment: DeploymentId,
        /// Its epoch before; 0 when it is new. Another one means that somebody else was faster.
        previous: Epoch,
        /// Its stages in order.
        seats: Vec<Seat>,
        /// What another member needs to coordinate it, should this one be lost; empty when no other can. The state only
        /// keeps it.
        recipe: Vec<u8>,
        /// Tells a change that is asked for again from another one.
        attempt: u64,
    },
    /// A deployment is no more.
    Withdraw {
        /// Which.
        deployment: DeploymentId,
        /// Its epoch; another one means that somebody has placed it anew.
        previous: Epoch,
    },
}

/// A change that breaks a bound. It is refused before it reaches the log.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error, Serialize, Deserialize)]
#[error("the change breaks a limit ({0}); it was refused")]
pub struct OutOfBounds(String);

fn bound(holds: bool, what: &str) -> Result<(), OutOfBounds> {
    if holds { Ok(()) } else { Err(OutOfBounds(what.to_owned())) }
}

impl Newcomer {
    fn check(&self) -> Result<(), OutOfBounds> {
        bound(self.name.len() <= NAME_BYTES_MAX, "the length of a node's name")?;
        bound(self.addrs.len() <= ADDRS_MAX, "the number of a node's addresses")?;
        bound(self.version.len() <= NAME_BYTES_MAX, "the length of a version")
    }
}

impl Proposal {
    /// Refuses what exceeds a bound.
    pub fn check(&self) -> Result<(), OutOfBounds> {
        match &self.command {
            Command::Found { members, .. } => {
                bound(members.len() <= capstan_proto::control::ENTRIES_MAX, "the number of members")?;
                bound(members.iter().all(|m| m.check().is_ok()), "a member's entry")
            }
            Command::Admit { node, .. } | Command::Refresh(node) => node.check(),
            Command::Place { seats, recipe, .. } => {
                bound(recipe.len() <= RECIPE_BYTES_MAX, "the length of a deployment's recipe")?;
                bound(!seats.is_empty() && seats.len() <= LAYERS_MAX as usize, "the number of stages")
            }
            Command::Leave { .. } | Command::Remove(_) | Command::Issue { .. } | Command::Withdraw { .. } => Ok(()),
        }
    }
}

/// What a change brought about.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Response {
    /// It was made.
    Done,
    /// The member's entry as it is now.
    Member(Member),
    /// It is a member.
    Admitted {
        /// Its entry.
        entry: Member,
        /// Which of its lives here began ([`State::life`](crate::State::life)).
        life: u64,
    },
    /// The placement's epoch.
    Epoch(Epoch),
}

/// Why a change was not made. The state is as it was.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error, Serialize, Deserialize)]
pub enum Refusal {
    /// See [`MemberError`].
    #[error(transparent)]
    Member(#[from] MemberError),
    /// See [`TicketError`].
    #[error(transparent)]
    Ticket(#[from] TicketError),
    /// A removed key stays out.
    #[error(
        "node {name} was removed from this cluster, and its key stays out for good; to use the machine again, give it a new identity with another data folder, then join"
    )]
    Removed {
        /// Its name when it was removed.
        name: String,
    },
    /// The node has asked again since, or was let in and left.
    #[error("the node has asked to join again since; try once more")]
    Overtaken,
    /// Who asks is no member.
    #[error("a node that is no member of this cluster asked for a change; join it with a ticket")]
    Stranger,
    /// Nobody would be left.
    #[error("the last node of a cluster cannot be removed or leave")]
    LastMember,
    /// The cluster exists.
    #[error("the cluster was founded already")]
    Founded,
    /// Somebody else placed the deployment meanwhile.
    #[error("the deployment is in epoch {current} now, not in {expected}: another node has placed it anew")]
    EpochMoved {
        /// What was believed.
        expected: Epoch,
        /// What it is; 0 when it is not there.
        current: Epoch,
    },
    /// It was unloaded.
    #[error("the deployment was unloaded; load the model again")]
    Withdrawn,
    /// A stage on a node that is none of us.
    #[error("a stage is placed on node {0:?}, which is no member of this cluster")]
    SeatOutside(NodeId),
    /// No room.
    #[error("the cluster holds {DEPLOYMENTS_MAX} models; unload one first")]
    TooManyDeployments,
    /// No room to remember it.
    #[error("this cluster has removed {REMOVED_MAX} nodes, which is as many as it remembers; found a new one")]
    TooManyRemoved,
    /// See [`OutOfBounds`].
    #[error(transparent)]
    OutOfBounds(#[from] OutOfBounds),
}

/// What applying a change gives.
pub type Outcome = Result<Response, Refusal>;
