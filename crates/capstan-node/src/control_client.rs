//! Calls to other nodes: one connection a member, dialled by key when needed, kept for the next call.
use std::collections::{HashMap, HashSet};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use capstan_proto::control::{self, CLOSE_REMOVED, Hello};
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

type Slot = Arc<tokio::sync::Mutex<Option<Connection>>>;

/// Connections to other members.
pub(crate) struct ControlClient {
    endpoint: Endpoint,
    membership: Arc<Membership>,
    build: String,
    /// What is spoken on these connections.
    alpn: &'static [u8],
    slots: Mutex<HashMap<NodeId, Slot>>,
    /// Nodes that are being dialled by themselves, see [`Self::stand`].
    dialling: Mutex<HashSet<NodeId>>,
}

impl ControlClient {
    pub(crate) fn new(endpoint: Endpoint, membership: Arc<Membership>, build: &str, alpn: &'static [u8]) -> Self {
        Self { endpoint, membership, build: build.into(), alpn, slots: Mutex::default(), dialling: Mutex::default() }
    }

    fn slot(&self, node: NodeId) -> Slot {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner).entry(node).or_default().clone()
    }

    /// A live connection to a member.
    async fn connection(&self, node: NodeId) -> Result<Connection, CallError> {
        let member = self.membership.get(node).ok_or_else(|| CallError::NotAMember(node.short()))?;
        let slot = self.slot(node);
        // Callers for the same node wait here for one attempt instead of making many.
        let mut kept = slot.lock().await;
        if let Some(connection) = kept.as_ref().filter(|c| c.close_reason().is_none()) {
            return Ok(connection.clone());
        }
        let fresh = connect(&self.endpoint, &self.build, node, &member.name, &member.addrs, self.alpn).await?;
        *kept = Some(fresh.clone());
        Ok(fresh)
    }

    /// Has a connection to a member made, if none stands. Whoever gives up waiting does not stop it, so that the next
    /// caller, who has as little patience, finds one.
    pub(crate) async fn stand(self: &Arc<Self>, node: NodeId) -> Result<(), CallError> {
        let slot = self.slot(node);
        if slot.try_lock().is_ok_and(|kept| kept.as_ref().is_some_and(|c| c.close_reason().is_none())) {
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

    /// Opens a stream to a member and sends a request on it.
    pub(crate) async fn open(
        &self,
        to: NodeId,
        request: &(impl Serialize + Sync),
    ) -> Result<(SendStream, RecvStream), CallError> {
        let name = self.membership.name_of(to);
        let lost = |reason: String| CallError::Lost { node: name.clone(), reason };
        let connection = self.connection(to).await?;
        let (mut send, recv) = match connection.open_bi().await {
            Ok(streams) => streams,
            // The kept connection had died without our notice: one fresh one is worth a try.
            Err(_) => self.connection(to).await?.open_bi().await.map_err(|e| lost(reason(&e)))?,
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
        request: &(impl Serialize + Sync),
        limit: Duration,
    ) -> Result<T, CallError> {
        let name = self.membership.name_of(to);
        let call = async {
            let (mut send, mut recv) = self.open(to, request).await?;
            // A second finish is the only way this fails.
            send.finish().ok();
            frames::expect(&mut recv, limits::MESSAGE_BYTES_MAX)
                .await
                .map_err(|e| CallError::Lost { node: name.clone(), reason: e.to_string() })
        };
        match timeout(limit, call).await {
            Ok(result) => result,
            Err(_) => Err(CallError::TimedOut { node: name.clone(), seconds: limit.as_secs() }),
        }
    }

    /// Whether a connection to this member stands.
    pub(crate) fn forget(&self, node: NodeId, code: u32, reason: &str) {
        let slot = self.slots.lock().unwrap_or_else(PoisonError::into_inner).remove(&node);
        if let Some(connection) = slot.and_then(|s| s.try_lock().ok().and_then(|mut c| c.take())) {
            connection.close(VarInt::from_u32(code), reason.as_bytes());
        }
    }

    /// The members to whom a connection was made.
    pub(crate) fn known(&self) -> Vec<NodeId> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner).keys().copied().collect()
    }
}

/// Dials a node and exchanges hellos.
pub(crate) async fn connect(
    endpoint: &Endpoint,
    build: &str,
    node: NodeId,
    name: &str,
    addrs: &[SocketAddr],
    alpn: &[u8],
) -> Result<Connection, CallError> {
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
        let ours = Hello::ours(build);
        let hellos = async {
            frames::write(&mut send, &ours, control::HELLO_BYTES_MAX).await?;
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
        ours.agree(&theirs)?;
        Ok(connection)
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
