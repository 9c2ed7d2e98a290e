//! Nodes on loopback, and peers that speak to them byte by byte: what an attacker can do that our own code never does.
#![allow(dead_code)]
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use capstan_node::{Node, NodeConfig, Service};
use capstan_proto::control::{
    CONTROL_ALPN, CONTROL_VERSION_MAX, DeploymentList, Gossip, HELLO_BYTES_MAX, Hello, JOIN_ALPN, Join, JoinReply,
    Request,
};
use capstan_proto::manage::{ManageError, NodeStatus};
use capstan_proto::{NodeId, codec, limits};
use iroh::endpoint::{Connection, ConnectionError, ReadError, ReadExactError, RecvStream, SendStream, presets};
use iroh::{Endpoint, EndpointAddr, EndpointId, RelayMode, SecretKey, TransportAddr};
use tempfile::TempDir;

/// Nothing on loopback takes so long, not even hashing a model on a busy machine; only a fault makes it wait to the end.
pub const PATIENCE: Duration = Duration::from_secs(120);

pub fn config(dir: &Path, name: &str) -> NodeConfig {
    let mut config = NodeConfig::new(dir.to_owned(), vec!["false".into()]);
    config.measure = false;
    config.mdns = false;
    config.name = Some(name.into());
    config.bind_addr = ([127, 0, 0, 1], 0).into();
    config.gpu_layers = 0;
    config
}

pub async fn node(name: &str) -> (Arc<Node>, TempDir) {
    node_with(name, |_| {}).await
}

pub async fn node_with(name: &str, change: impl FnOnce(&mut NodeConfig)) -> (Arc<Node>, TempDir) {
    let dir = tempfile::tempdir().unwrap();
    let mut config = config(dir.path(), name);
    change(&mut config);
    (Node::start(config).await.unwrap(), dir)
}

pub async fn join(inviter: &Node, new: &Node) {
    new.join(inviter.ticket(600, false).await.unwrap().ticket).await.unwrap();
}

/// Waits for a condition.
pub async fn until<F: Future<Output = bool>>(what: &str, condition: impl Fn() -> F) {
    let wait = async {
        while !condition().await {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(PATIENCE, wait).await.unwrap_or_else(|_| panic!("never came true: {what}"));
}

#[track_caller]
pub fn refused<T: std::fmt::Debug>(result: Result<T, ManageError>, status: u16, text: &str) {
    let error = result.unwrap_err();
    assert_eq!(error.status, status, "{error}");
    assert!(error.message.contains(text), "{error}");
}

pub async fn endpoint(key: SecretKey) -> Endpoint {
    let builder = Endpoint::builder(presets::Minimal).secret_key(key).relay_mode(RelayMode::Disabled);
    builder.clear_ip_transports().bind_addr("127.0.0.1:0").unwrap().bind().await.unwrap()
}

/// A message with its length, as it goes over a stream.
pub fn frame<T: serde::Serialize>(message: &T) -> Vec<u8> {
    codec::encode(message, limits::MESSAGE_BYTES_MAX).unwrap()
}

/// A length that no message may have.
pub fn oversized() -> Vec<u8> {
    u32::MAX.to_le_bytes().to_vec()
}

/// A whole frame of bytes that are no message: the number of a kind that there never will be.
pub fn garbage() -> Vec<u8> {
    let body = [0xff; 64];
    [&(body.len() as u32).to_le_bytes()[..], &body].concat()
}

/// The body of the next frame.
pub async fn read_body(recv: &mut RecvStream) -> Result<Vec<u8>, ReadExactError> {
    let mut prefix = [0; codec::PREFIX];
    recv.read_exact(&mut prefix).await?;
    let mut body = vec![0; codec::frame_len(prefix, limits::MESSAGE_BYTES_MAX).unwrap()];
    recv.read_exact(&mut body).await?;
    Ok(body)
}

pub async fn read<T: serde::de::DeserializeOwned>(recv: &mut RecvStream) -> T {
    codec::decode(&read_body(recv).await.unwrap()).unwrap()
}

/// The code of the reset with which a stream ended.
pub fn reset_code(error: ReadExactError) -> u64 {
    match error {
        ReadExactError::ReadError(ReadError::Reset(code)) => code.into_inner(),
        other => panic!("no reset but {other}"),
    }
}

/// A key with an endpoint, which says what it is told to.
pub struct Peer {
    pub endpoint: Endpoint,
}

impl Peer {
    pub async fn new() -> Self {
        Self { endpoint: endpoint(SecretKey::generate()).await }
    }

    pub fn id(&self) -> NodeId {
        NodeId(*self.endpoint.id().as_bytes())
    }

    pub async fn dial(&self, node: &Node, alpn: &[u8]) -> Result<Connection, String> {
        let id = EndpointId::from_bytes(&node.id().0).unwrap();
        let addr = EndpointAddr::from_parts(id, node.addrs().into_iter().map(TransportAddr::Ip));
        self.endpoint.connect(addr, alpn).await.map_err(|e| e.to_string())
    }

    /// A connection after the hellos.
    pub async fn greet(&self, node: &Node, alpn: &[u8]) -> Connection {
        let connection = self.dial(node, alpn).await.unwrap();
        let theirs = hello(&connection, &Hello::ours("test")).await.unwrap();
        assert_eq!(theirs.max, CONTROL_VERSION_MAX);
        connection
    }

    /// What a request to join of this peer looks like on the wire.
    pub fn join_frame(&self, ticket: &str, name: &str) -> Vec<u8> {
        let ticket: capstan_cluster::Ticket = ticket.parse().unwrap();
        frame(&Join {
            cluster: ticket.cluster,
            secret: ticket.secret,
            name: name.into(),
            addrs: self.endpoint.bound_sockets(),
            version: "test".into(),
            attempt: 1,
        })
    }

    /// Sends these bytes as a request to join.
    pub async fn join(&self, node: &Node, bytes: &[u8]) -> JoinReply {
        let connection = self.greet(node, JOIN_ALPN).await;
        let (_, mut recv) = send(&connection, bytes).await;
        let reply = read(&mut recv).await;
        connection.close(0u32.into(), b"");
        reply
    }

    /// Becomes a member by a fresh ticket.
    pub async fn become_member(&self, node: &Node, name: &str) {
        let ticket = node.ticket(600, false).await.unwrap().ticket;
        let reply = self.join(node, &self.join_frame(&ticket, name)).await;
        assert!(matches!(reply, JoinReply::Welcome { .. }), "{reply:?}");
    }

    /// A connection of a member's.
    pub async fn control(&self, node: &Node) -> Connection {
        self.greet(node, CONTROL_ALPN).await
    }

    /// What this peer would tell as a member.
    pub fn gossip(&self, node: &Node) -> Gossip {
        let status = NodeStatus {
            id: self.id(),
            name: "raw".into(),
            version: "test".into(),
            addrs: self.endpoint.bound_sockets(),
            online: true,
            is_self: true,
            rtt_us: None,
            memory_total_bytes: 0,
            memory_free_bytes: 0,
            devices: vec![],
            profile: None,
            links: vec![],
            votes: false,
        };
        let deployments = DeploymentList { coordinator: self.id(), stamp: 1, deployments: vec![] };
        Gossip { cluster: node.cluster(), node: status, deployments }
    }

    /// Asks for news on a connection: whether a member is answered.
    pub async fn poll(&self, node: &Node, connection: &Connection) -> Gossip {
        let (_, mut recv) = send(connection, &frame(&Request::Poll(Box::new(self.gossip(node))))).await;
        read(&mut recv).await
    }
}

/// Sends bytes on a stream of their own and ends it; the answer follows.
pub async fn send(connection: &Connection, bytes: &[u8]) -> (SendStream, RecvStream) {
    let (mut send, recv) = connection.open_bi().await.unwrap();
    // The other side may refuse in the middle of it.
    send.write_all(bytes).await.ok();
    send.finish().ok();
    (send, recv)
}

/// Exchanges hellos.
pub async fn hello(connection: &Connection, ours: &Hello) -> Result<Hello, String> {
    let (mut send, mut recv) = connection.open_bi().await.map_err(|e| e.to_string())?;
    send.write_all(&codec::encode(ours, HELLO_BYTES_MAX).unwrap()).await.map_err(|e| e.to_string())?;
    send.finish().ok();
    let body = read_body(&mut recv).await.map_err(|e| e.to_string())?;
    codec::decode(&body).map_err(|e| e.to_string())
}

/// With which code and sentence the other side closed a connection.
pub async fn closed(connection: &Connection) -> (u64, String) {
    match tokio::time::timeout(PATIENCE, connection.closed()).await.expect("it is closed") {
        ConnectionError::ApplicationClosed(close) => {
            (close.error_code.into_inner(), String::from_utf8_lossy(&close.reason).into_owned())
        }
        other => panic!("not closed but {other}"),
    }
}

/// Where a node that shows a pairing code is asked.
pub fn at(reply: &capstan_proto::pairing::PairingReply) -> Option<SocketAddr> {
    reply.at.first().copied()
}
