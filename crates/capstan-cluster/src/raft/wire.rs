//! Messages between replicas, and the transport that carries them.
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use capstan_proto::NodeId;
use openraft::error::{Fatal, NetworkError, RPCError, RaftError, ReplicationClosed, StreamingError, Unreachable};
use openraft::network::{RPCOption, RaftNetwork, RaftNetworkFactory};
use openraft::raft::{AppendEntriesRequest, AppendEntriesResponse, SnapshotResponse, VoteRequest, VoteResponse};
use openraft::{EmptyNode, Snapshot, Vote};
use serde::{Deserialize, Serialize};

use super::{RaftId, SnapshotMeta, Types};
use crate::command::{OutOfBounds, Outcome, Proposal};

/// Most entries of one message. The largest entries, of a placement with as many stages as there can be, are 60 KB.
pub const ENTRIES_MAX: u64 = 64;
/// Largest snapshot, in bytes: members, removed keys and placements at their limits take about 12 MB.
pub const SNAPSHOT_BYTES_MAX: usize = 14 << 20;

/// What one replica asks of another, which must be the one that is meant.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct RaftMessage {
    /// Who is meant.
    pub to: RaftId,
    /// What is asked.
    pub request: RaftRequest,
}

/// What one replica asks of another.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum RaftRequest {
    /// The leader: here are entries, or only a sign of life.
    Append(AppendEntriesRequest<Types>),
    /// A candidate: vote for me.
    Vote(VoteRequest<RaftId>),
    /// The leader: here is all of the state.
    Snapshot {
        /// Its vote.
        vote: Vote<RaftId>,
        /// Of what.
        meta: SnapshotMeta,
        /// The state.
        bytes: Vec<u8>,
    },
    /// To the leader: make this change.
    Propose(Proposal),
    /// To the leader: what is committed, and do you still lead?
    Confirm,
    /// The leader: I go; stand for election at once.
    Stand,
}

/// What it answers.
#[derive(Debug, Serialize, Deserialize)]
pub enum RaftReply {
    /// To [`RaftRequest::Append`].
    Append(AppendEntriesResponse<RaftId>),
    /// To [`RaftRequest::Vote`].
    Vote(VoteResponse<RaftId>),
    /// To [`RaftRequest::Snapshot`].
    Snapshot(Vote<RaftId>),
    /// To [`RaftRequest::Propose`]: it is committed, and this came of it.
    Proposed(Outcome),
    /// To [`RaftRequest::Confirm`]: a majority agrees that I lead, and this is the last entry that counts.
    Confirmed(Option<u64>),
    /// I do not lead; this node does, as far as I know. Nothing was done. Also to [`RaftRequest::Stand`].
    Elsewhere(Option<RaftId>),
    /// I cannot; for people. Whether a change was made is unknown.
    Unable(String),
}

/// A message that an honest replica does not send.
#[derive(Debug, thiserror::Error)]
pub enum BadRequest {
    /// In another's name.
    #[error("it speaks for node {0:?}, which did not send it")]
    Impostor(NodeId),
    /// Entries that do not follow each other.
    #[error("its entries do not follow each other")]
    Gap,
    /// Larger than any of ours.
    #[error("it breaks a limit")]
    TooLarge,
    /// See [`OutOfBounds`].
    #[error(transparent)]
    OutOfBounds(#[from] OutOfBounds),
    /// A state that is none.
    #[error("its state is unreadable")]
    Unreadable,
}

impl RaftRequest {
    /// Refuses what `from` may not say, and what would break the log.
    pub fn check(&self, from: NodeId) -> Result<(), BadRequest> {
        let speaks = |vote: &Vote<RaftId>| {
            let who = vote.leader_id.node_id.node;
            if who == from { Ok(()) } else { Err(BadRequest::Impostor(who)) }
        };
        match self {
            Self::Append(a) => {
                speaks(&a.vote)?;
                if a.entries.len() as u64 > ENTRIES_MAX {
                    return Err(BadRequest::TooLarge);
                }
                let first = a.prev_log_id.map_or(Some(0), |p| p.index.checked_add(1)).ok_or(BadRequest::Gap)?;
                let mut before = a.prev_log_id.map(|p| p.leader_id);
                for (i, entry) in a.entries.iter().enumerate() {
                    let id = entry.log_id;
                    if first.checked_add(i as u64) != Some(id.index)
                        || before.is_some_and(|b| b > id.leader_id)
                        || id.leader_id > a.vote.leader_id
                    {
                        return Err(BadRequest::Gap);
                    }
                    before = Some(id.leader_id);
                    if let openraft::EntryPayload::Normal(proposal) = &entry.payload {
                        proposal.check()?;
                    }
                }
                Ok(())
            }
            Self::Vote(v) => speaks(&v.vote),
            Self::Snapshot { vote, bytes, .. } => {
                speaks(vote)?;
                if bytes.len() > SNAPSHOT_BYTES_MAX {
                    return Err(BadRequest::TooLarge);
                }
                postcard::from_bytes::<crate::State>(bytes).map(|_| ()).map_err(|_| BadRequest::Unreadable)
            }
            Self::Propose(p) if p.by != from => Err(BadRequest::Impostor(p.by)),
            Self::Propose(p) => Ok(p.check()?),
            Self::Confirm | Self::Stand => Ok(()),
        }
    }
}

/// Why no answer came.
#[derive(Clone, Debug, thiserror::Error)]
pub enum Lost {
    /// The node cannot be reached now; nothing was done.
    #[error("{0}")]
    Unreachable(String),
    /// The connection broke, or it took too long. Whether anything was done is unknown.
    #[error("{0}")]
    Broken(String),
}

/// Carries messages to other replicas and proves who sends them.
#[async_trait]
pub trait Transport: Send + Sync + 'static {
    /// Sends a message to the node that is meant and waits for its answer, at most as long as the limit says.
    async fn call(&self, message: RaftMessage, limit: Duration) -> Result<RaftReply, Lost>;
}

/// The transport as openraft wants it.
pub(super) struct Peers(pub(super) Arc<dyn Transport>);

/// One other replica.
pub(super) struct Peer {
    to: RaftId,
    transport: Arc<dyn Transport>,
}

impl RaftNetworkFactory<Types> for Peers {
    type Network = Peer;

    async fn new_client(&mut self, to: RaftId, _: &EmptyNode) -> Peer {
        Peer { to, transport: self.0.clone() }
    }
}

impl Peer {
    async fn call(&self, request: RaftRequest, option: &RPCOption) -> Result<RaftReply, Lost> {
        self.transport.call(RaftMessage { to: self.to, request }, option.hard_ttl()).await
    }
}

type CallError<E> = RPCError<RaftId, EmptyNode, E>;

fn lost<E: From<Unreachable> + From<NetworkError>>(error: Lost) -> E {
    match error {
        Lost::Unreachable(_) => Unreachable::new(&error).into(),
        Lost::Broken(_) => NetworkError::new(&error).into(),
    }
}

/// An answer to another question, or none.
fn odd(reply: &RaftReply) -> Lost {
    // It will not be otherwise at once.
    Lost::Unreachable(match reply {
        RaftReply::Unable(reason) => reason.clone(),
        _ => "the answer does not fit the question".to_owned(),
    })
}

impl RaftNetwork<Types> for Peer {
    async fn append_entries(
        &mut self,
        rpc: AppendEntriesRequest<Types>,
        option: RPCOption,
    ) -> Result<AppendEntriesResponse<RaftId>, CallError<RaftError<RaftId>>> {
        match self.call(RaftRequest::Append(rpc), &option).await {
            Ok(RaftReply::Append(answer)) => Ok(answer),
            Ok(other) => Err(lost(odd(&other))),
            Err(error) => Err(lost(error)),
        }
    }

    async fn vote(
        &mut self,
        rpc: VoteRequest<RaftId>,
        option: RPCOption,
    ) -> Result<VoteResponse<RaftId>, CallError<RaftError<RaftId>>> {
        match self.call(RaftRequest::Vote(rpc), &option).await {
            Ok(RaftReply::Vote(answer)) => Ok(answer),
            Ok(other) => Err(lost(odd(&other))),
            Err(error) => Err(lost(error)),
        }
    }

    async fn full_snapshot(
        &mut self,
        vote: Vote<RaftId>,
        snapshot: Snapshot<Types>,
        cancel: impl Future<Output = ReplicationClosed> + Send + 'static,
        option: RPCOption,
    ) -> Result<SnapshotResponse<RaftId>, StreamingError<Types, Fatal<RaftId>>> {
        let request = RaftRequest::Snapshot { vote, meta: snapshot.meta, bytes: *snapshot.snapshot };
        let error = tokio::select! {
            biased;
            answer = self.call(request, &option) => match answer {
                Ok(RaftReply::Snapshot(vote)) => return Ok(SnapshotResponse::new(vote)),
                Ok(other) => odd(&other),
                Err(error) => error,
            },
            closed = cancel => return Err(closed.into()),
        };
        Err(lost(error))
    }
}
