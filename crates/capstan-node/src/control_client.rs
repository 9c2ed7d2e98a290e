//! Calls to other nodes: one connection a member, dialled by key when needed, kept for the next call.
use std::collections::{HashMap, HashSet};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use capstan_proto::control::{self, CLOSE_REMOVED, Hello, Request};
use capstan_proto::{NodeId, limits};
use iroh::Endpoint;
use iroh::endpoint::{Connection, ConnectionError, RecvStream, SendStream, VarInt};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::time::timeout;

use crate::endpoint::dial_addr;
use crate::error::CallError;
use crate::frames;
use crate::membership::Membership;

/// How long a connection may take to stand. On a LAN it takes milliseconds; a machine that is off never answers.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(4);
/// How long an ordinary call may take.
pub(crate) const CALL_TIMEOUT: Duration = Duration::from_secs(10);

/// A connection, with the version that both sides agreed on.
type Slot = Arc<tokio::sync::Mutex<Option<(Connection, u32)>>>;

/// Connections to other members.
pub(crate) struct ControlClient {
    endpoint: Endpoint,
    membership: Arc<Membership>,
    speaks: Hello,
    /// What is spoken on these connections.
    alpn: &'static [u8],
    slots: Mutex<HashMap<NodeId, Slot>>,
    /// Nodes that are being dialled by themselves, see [`Self::stand`].
    dialling: Mutex<HashSet<NodeId>>,
    /// Nodes that share no version with this one, so that each is told of once.
    parted: Mutex<HashSet<NodeId>>,
}

/// What one node asks of another.
pub(crate) trait Asked: Serialize + Sync {
    /// The version of the control protocol that brought it.
    fn since(&self) -> u32;
}

impl Asked for Request {
    fn since(&self) -> u32 {
        Request::since(self)
    }
}

impl ControlClient {
    pub(crate) fn new(endpoint: Endpoint, membership: Arc<Membership>, speaks: Hello, alpn: &'static [u8]) -> Self {
        let (slots, dialling, parted) = Default::default();
        Self { endpoint, membership, speaks, alpn, slots, dialling, parted }
    }

    fn slot(&self, node: NodeId) -> Slot {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner).entry(node).or_default().clone()
    }

    /// A live connection to a member, and the version that both sides speak.
    async fn connection(&self, node: NodeId) -> Result<(Connection, u32), CallError> {
        let member = self.membership.get(node).ok_or_else(|| CallError::NotAMember(node.short()))?;
        let slot = self.slot(node);
        // Callers for the same node wait here for one attempt instead of making many.
        let mut kept = slot.lock().await;
        if let Some(kept) = kept.as_ref().filter(|(c, _)| c.close_reason().is_none()) {
            return Ok(kept.clone());
        }
        let fresh = connect(&self.endpoint, &self.speaks, node, &member.name, &member.addrs, self.alpn).await;
        self.note_version(node, &member.name, fresh.as_ref().err());
        *kept = Some(fresh?);
        // It was put there the line before.
        kept.clone().ok_or_else(|| CallError::NotAMember(node.short()))
    }

    /// Says once, and not with every poll, that a node runs a build that this one cannot talk to.
    fn note_version(&self, node: NodeId, name: &str, error: Option<&CallError>) {
        let mut parted = self.parted.lock().unwrap_or_else(PoisonError::into_inner);
        match error {
            Some(CallError::Version(mismatch)) => {
                if parted.insert(node) {
                    tracing::warn!(node = name, "{mismatch}");
                }
            }
            Some(_) => {}
            None => _ = parted.remove(&node),
        }
    }

    /// Has a connection to a member made, if none stands. Whoever gives up waiting does not stop it, so that the next
    /// caller, who has as little patience, finds one.
    pub(crate) async fn stand(self: &Arc<Self>, node: NodeId) -> Result<(), CallError> {
        let slot = self.slot(node);
        if slot.try_lock().is_ok_and(|kept| kept.as_ref().is_some_and(|(c, _)| c.close_reason().is_none())) {
            return Ok(());
        }
        if !self.dialling.lock().unwrap_or_else(PoisonError::into_inner).insert(node) {
            let (node, reason) = (self.membership.name_of(node), "it is being dialled".to_owned());
            return Err(CallError::Unreachable { node, reason });
        }
        let client = self.clone();
        let dial = tokio::spawn(async move {
            let made = client.connection(node).await;
            client.dialling.lock().unwrap_or_else(PoisonError::into_inner).remove(&node);
            made.map(|_| ())
        });
        let lost = |e: tokio::task::JoinError| CallError::Lost { node: node.short(), reason: e.to_string() };
        dial.await.map_err(lost)?
    }

    /// The version that a member and this node speak with each other.
    pub(crate) async fn agreed(&self, node: NodeId) -> Result<u32, CallError> {
        self.connection(node).await.map(|(_, agreed)| agreed)
    }

    /// Opens a stream to a member and sends a request on it, unless the member's build is too old for it.
    pub(crate) async fn open(&self, to: NodeId, request: &impl Asked) -> Result<(SendStream, RecvStream), CallError> {
        let name = self.membership.name_of(to);
        let lost = |reason: String| CallError::Lost { node: name.clone(), reason };
        let (connection, agreed) = self.connection(to).await?;
        if request.since() > agreed {
            return Err(CallError::TooOld { node: name, agreed, needs: request.since() });
        }
        let (mut send, recv) = match connection.open_bi().await {
            Ok(streams) => streams,
            // The kept connection had died without our notice: one fresh one is worth a try.
            Err(_) => self.connection(to).await?.0.open_bi().await.map_err(|e| lost(reason(&e)))?,
        };
        match frames::write(&mut send, request, limits::MESSAGE_BYTES_MAX).await {
            Ok(()) => Ok((send, recv)),
            Err(frames::FrameError::Codec(e)) => Err(e.into()),
            Err(e) => Err(lost(e.to_string())),
        }
    }

    /// Sends a request to a member and waits for its one answer.
    pub(crate) async fn call<T: DeserializeOwned>(
        &self,
        to: NodeId,
        request: &impl Asked,
        limit: Duration,
    ) -> Result<T, CallError> {
        let name = self.membership.name_of(to);
        let call = async {
            let (mut send, mut recv) = self.open(to, request).await?;
            // A second finish is the only way this fails.
            send.finish().ok();
            frames::expect(&mut recv, limits::MESSAGE_BYTES_MAX).await.map_err(|e| match e {
                frames::FrameError::NotUnderstood => CallError::NotUnderstood { node: name.clone() },
                e => CallError::Lost { node: name.clone(), reason: e.to_string() },
            })
        };
        match timeout(limit, call).await {
            Ok(result) => result,
            Err(_) => Err(CallError::TimedOut { node: name.clone(), seconds: limit.as_secs() }),
        }
    }

    /// Whether a connection to this member stands.
    pub(crate) fn forget(&self, node: NodeId, code: u32, reason: &str) {
        let slot = self.slots.lock().unwrap_or_else(PoisonError::into_inner).remove(&node);
        if let Some((connection, _)) = slot.and_then(|s| s.try_lock().ok().and_then(|mut c| c.take())) {
            connection.close(VarInt::from_u32(code), reason.as_bytes());
        }
    }

    /// The members to whom a connection was made.
    pub(crate) fn known(&self) -> Vec<NodeId> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner).keys().copied().collect()
    }
}

/// Dials a node and exchanges hellos. Gives the version that both sides speak.
pub(crate) async fn connect(
    endpoint: &Endpoint,
    speaks: &Hello,
    node: NodeId,
    name: &str,
    addrs: &[SocketAddr],
    alpn: &[u8],
) -> Result<(Connection, u32), CallError> {
    let unreachable = |reason: String| CallError::Unreachable { node: name.to_owned(), reason };
    let addr = dial_addr(node, addrs).ok_or_else(|| unreachable("its key is not valid".into()))?;
    let dial = async {
        let connection = endpoint.connect(addr, alpn).await.map_err(|e| unreachable(e.to_string()))?;
        // The other side may close at once when it does not know our key: its reason is what the user must see.
        let refused = |c: &Connection, e: String| match c.close_reason() {
            Some(ConnectionError::ApplicationClosed(close)) if close.error_code == VarInt::from_u32(CLOSE_REMOVED) => {
                CallError::Removed { node: name.to_owned() }
            }
            Some(ConnectionError::ApplicationClosed(close)) => CallError::Refused {
                node: name.to_owned(),
                reason: String::from_utf8_lossy(&close.reason).chars().take(500).collect(),
            },
            _ => unreachable(e),
        };
        let (mut send, mut recv) = connection.open_bi().await.map_err(|e| refused(&connection, e.to_string()))?;
        let hellos = async {
            frames::write(&mut send, speaks, control::HELLO_BYTES_MAX).await?;
            frames::expect::<Hello>(&mut recv, control::HELLO_BYTES_MAX).await
        };
        let theirs = match hellos.await {
            Ok(theirs) => theirs,
            Err(e) => {
                // The stream's error can come before the connection's reason is noted.
                timeout(Duration::from_millis(200), connection.closed()).await.ok();
                return Err(refused(&connection, e.to_string()));
            }
        };
        send.finish().ok();
        let agreed = speaks.agree(&theirs)?;
        Ok((connection, agreed))
    };
    match timeout(CONNECT_TIMEOUT, dial).await {
        Ok(result) => result,
        Err(_) => Err(unreachable(format!("no answer within {} s", CONNECT_TIMEOUT.as_secs()))),
    }
}

/// What a closed connection says, for people.
fn reason(error: &ConnectionError) -> String {
    match error {
        ConnectionError::ApplicationClosed(close) => String::from_utf8_lossy(&close.reason).chars().take(500).collect(),
        other => other.to_string(),
    }
}
