//! The log's messages over our links: a connection of its own kind to each member, one stream a message.
use std::sync::{Arc, Weak};
use std::time::Duration;

use async_trait::async_trait;
use capstan_cluster::raft::{Lost, RaftMessage, RaftReply, RaftRequest, Transport};
use capstan_proto::control::{CLOSE_NOT_A_MEMBER, CLOSE_REMOVED, CONTROL_VERSION_MIN, HAND_OVER_SINCE};
use capstan_proto::{ClusterId, NodeId, limits};
use iroh::endpoint::{Connection, RecvStream, SendStream};
use iroh::protocol::{AcceptError, ProtocolHandler};
use serde::{Deserialize, Serialize};
use tokio::sync::Semaphore;
use tokio::time::timeout;

use crate::control_client::{Asked, ControlClient};
use crate::control_server::{HELLO_TIMEOUT, close, hello};
use crate::endpoint::node_id;
use crate::error::CallError;
use crate::frames::{self, FrameError};
use crate::node::Shared;

/// Messages served at once: a leader has one under way to each member, and the largest is 16 MiB.
const AT_ONCE: usize = 32;

/// A message, and the cluster whose log it is about.
#[derive(Serialize, Deserialize)]
struct Envelope {
    cluster: ClusterId,
    message: RaftMessage,
}

impl Asked for Envelope {
    fn since(&self) -> u32 {
        match self.message.request {
            RaftRequest::Stand => HAND_OVER_SINCE,
            _ => CONTROL_VERSION_MIN,
        }
    }
}

/// Carries one cluster's messages.
pub(crate) struct RaftLink {
    pub(crate) client: Arc<ControlClient>,
    pub(crate) cluster: ClusterId,
}

#[async_trait]
impl Transport for RaftLink {
    async fn call(&self, message: RaftMessage, limit: Duration) -> Result<RaftReply, Lost> {
        let to = message.to.node;
        let envelope = Envelope { cluster: self.cluster, message };
        let call = async {
            self.client.stand(to).await?;
            self.client.call(to, &envelope, limit).await
        };
        match call.await {
            Ok(reply) => Ok(reply),
            Err(error @ (CallError::Lost { .. } | CallError::TimedOut { .. })) => Err(Lost::Broken(error.to_string())),
            Err(error) => Err(Lost::Unreachable(error.to_string())),
        }
    }
}

/// Answers other nodes' messages about the log.
pub(crate) struct RaftProtocol {
    shared: Weak<Shared>,
    turns: Arc<Semaphore>,
}

impl RaftProtocol {
    pub(crate) fn new(shared: Weak<Shared>) -> Self {
        Self { shared, turns: Arc::new(Semaphore::new(AT_ONCE)) }
    }
}

impl std::fmt::Debug for RaftProtocol {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("RaftProtocol")
    }
}

impl ProtocolHandler for RaftProtocol {
    async fn accept(&self, connection: Connection) -> Result<(), AcceptError> {
        let Some(shared) = self.shared.upgrade() else { return Ok(()) };
        let from = node_id(connection.remote_id());
        if refuse(&shared, &connection, from) {
            return Ok(());
        }
        let id = shared.connections.add(from, &connection);
        if hello(&connection, &shared.config.speaks).await.is_ok() {
            while let Ok((send, recv)) = connection.accept_bi().await {
                if refuse(&shared, &connection, from) {
                    break;
                }
                let Ok(turn) = self.turns.clone().acquire_owned().await else { break };
                let shared = shared.clone();
                tokio::spawn(async move {
                    if let Err(error) = serve(&shared, from, send, recv).await {
                        tracing::debug!(node = %from.short(), %error, "a message about the log ended early");
                    }
                    drop(turn);
                });
            }
        }
        shared.connections.remove(from, id);
        Ok(())
    }
}

/// Closes the connection of a node that may not speak about the log.
fn refuse(shared: &Shared, connection: &Connection, from: NodeId) -> bool {
    if shared.membership.may_speak(from) {
        return false;
    }
    if shared.membership.is_removed(from) {
        close(connection, CLOSE_REMOVED, REMOVED);
    } else {
        close(connection, CLOSE_NOT_A_MEMBER, "it does not have this node in its member list");
    }
    true
}

/// What a removed node is told.
pub(crate) const REMOVED: &str = "this node was removed from the cluster, and its key stays out for good; to use the machine again, \
                                  give it a new identity with another data folder, then join";

async fn serve(shared: &Shared, from: NodeId, mut send: SendStream, mut recv: RecvStream) -> Result<(), FrameError> {
    let read = frames::expect::<Envelope>(&mut recv, limits::MESSAGE_BYTES_MAX);
    let Ok(envelope) = timeout(HELLO_TIMEOUT, read).await else {
        return Err(FrameError::Stream("no message came in time".into()));
    };
    let Envelope { cluster, message } = envelope?;
    let reply = match shared.membership.replica() {
        Some(replica) if cluster == shared.membership.cluster() => replica.answer(from, message).await,
        _ => RaftReply::Unable("this node is in another cluster".into()),
    };
    frames::write(&mut send, &reply, limits::MESSAGE_BYTES_MAX).await?;
    send.finish().ok();
    Ok(())
}
