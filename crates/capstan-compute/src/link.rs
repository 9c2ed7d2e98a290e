//! Links between stages: frames in order, one direction a link, behind a trait so that a faster transport can follow.
//!
//! The dialling stage says a [`DataHello`]; the accepting one checks it and answers one byte. From then on only frames
//! flow, from the dialling stage to the accepting one, in two lanes: micro-batches in the stream of the hello, drop
//! notices in a stream of their own, so that a notice neither waits for megabytes to be sent nor for room where they
//! arrive:
//!
//! ```text
//! frames  ═══ 12 ═══ 11 ═══ 10 ═══▶       each lane keeps its order
//! notices ──────────── drop 12 ───▶       and goes first where both have something to send
//! ```
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use capstan_proto::child::PeerAddr;
use capstan_proto::codec::{self, CodecError, PREFIX};
use capstan_proto::control::ADDRS_MAX;
use capstan_proto::data::{DATA_ALPN, DATA_VERSION, DataHello};
use capstan_proto::limits;
use iroh::endpoint::{Connection, QuicTransportConfig, RecvStream, SendStream, presets};
use iroh::{Endpoint, EndpointAddr, EndpointId, RelayMode, SecretKey, TransportAddr};
use tokio::sync::oneshot;

/// Largest hello: a few numbers.
const HELLO_BYTES_MAX: usize = 256;
/// What the accepting side answers to a good hello.
const ACCEPTED: u8 = 1;
/// A stage that has not appeared after this long is lost. The daemons wire all stages at the same time.
const WIRE_TIMEOUT: Duration = Duration::from_secs(15);
/// Pause before a refused dial is tried again: the other side has perhaps not got its wiring yet.
const REDIAL_PAUSE: Duration = Duration::from_millis(20);
/// A peer that is silent for this long, though keep-alives are sent five times as often, is gone.
const IDLE_TIMEOUT: Duration = Duration::from_secs(10);
/// Priority of the notices' stream; others have 0.
const NOTICES_FIRST: i32 = 1;
/// Bytes in flight that a stream accepts: one chunk of 512 rows of a 7168-wide model, so that a chunk never waits for
/// a window update.
const STREAM_WINDOW_BYTES: u32 = 16 << 20;

/// Why a link could not be made or broke.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// The endpoint could not be opened.
    #[error("no network endpoint could be opened on {0}: {1}")]
    Bind(IpAddr, String),
    /// The other stage did not appear in time.
    #[error("the {0} stage did not answer within {1} s; is its node reachable?")]
    Timeout(&'static str, u64),
    /// The link broke.
    #[error("the link broke: {0}")]
    Broken(String),
    /// The peer sent something else than the protocol allows.
    #[error(transparent)]
    Codec(#[from] CodecError),
    /// The endpoint is closed.
    #[error("the endpoint is closed")]
    Closed,
}

fn broken(e: impl std::fmt::Display) -> LinkError {
    LinkError::Broken(e.to_string())
}

/// The sending end of a lane.
#[async_trait]
pub trait LaneSender: Send {
    /// Sends a frame with its prefix. The bytes are not copied.
    async fn send(&mut self, frame: Bytes) -> Result<(), LinkError>;
}

/// The receiving end of a lane.
#[async_trait]
pub trait LaneReceiver: Send {
    /// The body of the next frame. An error is final.
    async fn recv(&mut self) -> Result<Vec<u8>, LinkError>;
}

/// The end of a link that sends.
pub struct Outgoing {
    /// Micro-batches.
    pub frames: Box<dyn LaneSender>,
    /// Drop notices.
    pub notices: Box<dyn LaneSender>,
}

/// The end of a link that receives.
pub struct Incoming {
    /// Micro-batches.
    pub frames: Box<dyn LaneReceiver>,
    /// Drop notices.
    pub notices: Box<dyn LaneReceiver>,
}

/// What makes links. Of each wiring there is one incoming and one outgoing.
#[async_trait]
pub trait Transport: Send + Sync {
    /// Where others dial.
    fn addr(&self) -> PeerAddr;
    /// Waits for the stage with this key to dial with exactly this hello. A later call ends an earlier one.
    async fn accept(&self, key: [u8; 32], hello: DataHello) -> Result<Incoming, LinkError>;
    /// Dials a stage until it accepts this hello.
    async fn dial(&self, peer: &PeerAddr, hello: &DataHello) -> Result<Outgoing, LinkError>;
}

struct Expected {
    key: EndpointId,
    hello: DataHello,
    found: oneshot::Sender<(Connection, RecvStream)>,
}

/// Links over iroh: QUIC, encrypted, both sides proven by key.
pub struct IrohTransport {
    endpoint: Endpoint,
    addr: PeerAddr,
    expected: Arc<Mutex<Option<Expected>>>,
}

impl IrohTransport {
    /// Listens on a free port of `ip`, under a key made for this process. No relay and no public look-up is asked.
    pub async fn bind(ip: IpAddr) -> Result<Self, LinkError> {
        let bind = |e: String| LinkError::Bind(ip, e);
        let transport = QuicTransportConfig::builder()
            .max_idle_timeout(Some(IDLE_TIMEOUT.try_into().map_err(|_| bind("bad idle timeout".into()))?))
            .keep_alive_interval(IDLE_TIMEOUT / 5)
            .stream_receive_window(STREAM_WINDOW_BYTES.into())
            .build();
        let endpoint = Endpoint::builder(presets::Minimal)
            .secret_key(SecretKey::generate())
            .alpns(vec![DATA_ALPN.to_vec()])
            .relay_mode(RelayMode::Disabled)
            .clear_address_lookup()
            .transport_config(transport)
            .clear_ip_transports()
            .bind_addr(SocketAddr::new(ip, 0))
            .map_err(|e| bind(e.to_string()))?
            .bind()
            .await
            .map_err(|e| bind(e.to_string()))?;
        let mut addrs: Vec<SocketAddr> = endpoint.addr().ip_addrs().copied().collect();
        if addrs.is_empty() {
            addrs = endpoint.bound_sockets();
        }
        // More than a message may carry are of no use to anybody.
        addrs.truncate(ADDRS_MAX);
        let addr = PeerAddr { key: *endpoint.id().as_bytes(), addrs };
        let expected = Arc::new(Mutex::new(None));
        tokio::spawn(accept_loop(endpoint.clone(), expected.clone()));
        Ok(Self { endpoint, addr, expected })
    }

    /// Ends its links in order.
    pub(crate) async fn close(&self) {
        self.endpoint.close().await;
    }

    async fn try_dial(&self, peer: EndpointAddr, hello: &[u8]) -> Result<Outgoing, LinkError> {
        let connection = self.endpoint.connect(peer, DATA_ALPN).await.map_err(broken)?;
        let (mut send, mut recv) = connection.open_bi().await.map_err(broken)?;
        send.write_all(hello).await.map_err(broken)?;
        let mut answer = [0];
        recv.read_exact(&mut answer).await.map_err(broken)?;
        if answer[0] != ACCEPTED {
            return Err(broken("refused"));
        }
        let notices = connection.open_uni().await.map_err(broken)?;
        notices.set_priority(NOTICES_FIRST).map_err(broken)?;
        Ok(Outgoing {
            frames: Box::new(IrohSender { _connection: connection.clone(), send }),
            notices: Box::new(IrohSender { _connection: connection, send: notices }),
        })
    }
}

impl Drop for IrohTransport {
    fn drop(&mut self) {
        let endpoint = self.endpoint.clone();
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            runtime.spawn(async move { endpoint.close().await });
        }
    }
}

#[async_trait]
impl Transport for IrohTransport {
    fn addr(&self) -> PeerAddr {
        self.addr.clone()
    }

    async fn accept(&self, key: [u8; 32], hello: DataHello) -> Result<Incoming, LinkError> {
        let key = EndpointId::from_bytes(&key).map_err(broken)?;
        let (found, wait) = oneshot::channel();
        match self.expected.lock() {
            Ok(mut slot) => *slot = Some(Expected { key, hello, found }),
            Err(_) => return Err(LinkError::Closed),
        }
        match tokio::time::timeout(WIRE_TIMEOUT, wait).await {
            Ok(Ok((connection, recv))) => Ok(Incoming {
                frames: Box::new(FrameLane { _connection: connection.clone(), recv }),
                notices: Box::new(NoticeLane { connection, recv: None }),
            }),
            Ok(Err(_)) => Err(LinkError::Closed),
            Err(_) => Err(LinkError::Timeout("previous", WIRE_TIMEOUT.as_secs())),
        }
    }

    async fn dial(&self, peer: &PeerAddr, hello: &DataHello) -> Result<Outgoing, LinkError> {
        let id = EndpointId::from_bytes(&peer.key).map_err(broken)?;
        let addr = EndpointAddr::from_parts(id, peer.addrs.iter().map(|a| TransportAddr::Ip(*a)));
        let hello = codec::encode(hello, HELLO_BYTES_MAX)?;
        let dial = async {
            loop {
                match self.try_dial(addr.clone(), &hello).await {
                    Ok(link) => return link,
                    Err(error) => tracing::debug!(%error, "the next stage does not accept yet"),
                }
                tokio::time::sleep(REDIAL_PAUSE).await;
            }
        };
        match tokio::time::timeout(WIRE_TIMEOUT, dial).await {
            Ok(link) => Ok(link),
            Err(_) => Err(LinkError::Timeout("next", WIRE_TIMEOUT.as_secs())),
        }
    }
}

async fn accept_loop(endpoint: Endpoint, expected: Arc<Mutex<Option<Expected>>>) {
    while let Some(incoming) = endpoint.accept().await {
        let expected = expected.clone();
        tokio::spawn(async move {
            // Whoever connects and then says nothing is not waited for.
            match tokio::time::timeout(WIRE_TIMEOUT, admit(incoming, &expected)).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => tracing::debug!(%error, "a link was refused"),
                Err(_) => tracing::debug!("a link was refused: no hello came"),
            }
        });
    }
}

async fn admit(incoming: iroh::endpoint::Incoming, expected: &Mutex<Option<Expected>>) -> Result<(), LinkError> {
    let connection = incoming.await.map_err(broken)?;
    let key = connection.remote_id();
    let known = expected.lock().is_ok_and(|slot| slot.as_ref().is_some_and(|e| e.key == key));
    if !known {
        connection.close(1u32.into(), b"this key is not the previous stage");
        return Err(broken(format!("{} is not the previous stage", key.fmt_short())));
    }
    let (mut send, mut recv) = connection.accept_bi().await.map_err(broken)?;
    let mut prefix = [0; PREFIX];
    recv.read_exact(&mut prefix).await.map_err(broken)?;
    let mut body = vec![0; codec::frame_len(prefix, HELLO_BYTES_MAX)?];
    recv.read_exact(&mut body).await.map_err(broken)?;
    let hello: DataHello = codec::decode(&body)?;
    let accepted = expected.lock().ok().and_then(|mut slot| slot.take_if(|e| e.key == key && e.hello == hello));
    let Some(accepted) = accepted else {
        connection.close(2u32.into(), b"another epoch, stage or version is expected");
        let why = if hello.version == DATA_VERSION { "another epoch or stage" } else { "another version" };
        return Err(broken(format!("{} said {why} than expected", key.fmt_short())));
    };
    send.write_all(&[ACCEPTED]).await.map_err(broken)?;
    send.finish().map_err(broken)?;
    // When nobody waits any more, the connection is dropped and so closed.
    accepted.found.send((connection, recv)).map_err(|_| LinkError::Closed)
}

struct IrohSender {
    // Dropping the connection would close it under the stream.
    _connection: Connection,
    send: SendStream,
}

#[async_trait]
impl LaneSender for IrohSender {
    async fn send(&mut self, frame: Bytes) -> Result<(), LinkError> {
        self.send.write_chunk(frame).await.map_err(broken)
    }
}

struct FrameLane {
    _connection: Connection,
    recv: RecvStream,
}

#[async_trait]
impl LaneReceiver for FrameLane {
    async fn recv(&mut self) -> Result<Vec<u8>, LinkError> {
        read_frame(&mut self.recv, limits::DATA_BYTES_MAX).await
    }
}

struct NoticeLane {
    connection: Connection,
    /// The other side opens it, and it appears with the first notice.
    recv: Option<RecvStream>,
}

#[async_trait]
impl LaneReceiver for NoticeLane {
    async fn recv(&mut self) -> Result<Vec<u8>, LinkError> {
        let recv = match &mut self.recv {
            Some(recv) => recv,
            none => none.insert(self.connection.accept_uni().await.map_err(broken)?),
        };
        read_frame(recv, limits::NOTICE_BYTES_MAX).await
    }
}

async fn read_frame(recv: &mut RecvStream, bytes_max: usize) -> Result<Vec<u8>, LinkError> {
    let mut prefix = [0; PREFIX];
    recv.read_exact(&mut prefix).await.map_err(broken)?;
    let mut body = vec![0; codec::frame_len(prefix, bytes_max)?];
    recv.read_exact(&mut body).await.map_err(broken)?;
    Ok(body)
}
