//! Answers other nodes' requests for shards: members only, whole or in ranges, never a write.

use std::io::{self, Write};
use std::sync::Arc;
use std::time::Duration;

use bao_tree::ChunkRanges;
use bytes::{Bytes, BytesMut};
use iroh::EndpointId;
use iroh::endpoint::{Connection, RecvStream, SendStream, VarInt};
use iroh::protocol::{AcceptError, ProtocolHandler};
use iroh_blobs::protocol::{ERR_PERMISSION, Request};
use tokio::sync::{Semaphore, mpsc};
use tokio::task::JoinSet;
use tokio::time::timeout;

use crate::error::short;
use crate::store::Store;
use crate::tree::{EncodeFailure, Source};
use crate::{Hash, hex};

/// The protocol's name for the router: iroh-blobs' own, whose messages this is.
pub const BLOBS_ALPN: &[u8] = iroh_blobs::ALPN;

/// Why a connection was closed, for the other side to turn into its own words.
pub(crate) const CLOSE_DONE: VarInt = VarInt::from_u32(0);
pub(crate) const CLOSE_REFUSED: VarInt = VarInt::from_u32(1);
pub(crate) const CLOSE_NOT_OFFERED: VarInt = VarInt::from_u32(2);
pub(crate) const CLOSE_CHANGED: VarInt = VarInt::from_u32(3);
const CLOSE_STOPPING: VarInt = VarInt::from_u32(4);

/// Longest reason that travels with a close: it has to fit into one packet.
pub(crate) const REASON_BYTES_MAX: usize = 900;

/// Requests served at once. Each has a blocking thread, of which tokio has 512; a load of a large cluster asks for one
/// shard a node.
const SERVING_MAX: usize = 64;

/// Bytes that go to the network in one piece, and how many such pieces wait for it: a slow receiver holds one MiB.
const PIECE_BYTES: usize = 256 << 10;
const PIECES_MAX: usize = 4;

/// Longest wait for a receiver that takes nothing, or for the rest of a request: after that its place is given away.
const PATIENCE_MAX: Duration = Duration::from_secs(60);

/// Serves a [`Store`] to members over [`BLOBS_ALPN`]; made by [`Store::protocol`]. Stops when the router or the store
/// shuts down.
#[derive(Clone)]
pub struct ShardProtocol {
    store: Store,
    allow: Arc<dyn Fn(EndpointId) -> bool + Send + Sync>,
    places: Arc<Semaphore>,
}

impl std::fmt::Debug for ShardProtocol {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ShardProtocol").field("store", &self.store).finish_non_exhaustive()
    }
}

impl Store {
    /// The handler that serves offers and complete shards, read-only, over [`BLOBS_ALPN`]. `allow` is asked for every
    /// new connection and again for every request on it; whoever it turns down is disconnected with a reason.
    pub fn protocol(&self, allow: impl Fn(EndpointId) -> bool + Send + Sync + 'static) -> ShardProtocol {
        ShardProtocol { store: self.clone(), allow: Arc::new(allow), places: Arc::new(Semaphore::new(SERVING_MAX)) }
    }
}

impl ProtocolHandler for ShardProtocol {
    async fn accept(&self, connection: Connection) -> Result<(), AcceptError> {
        if !self.admits(&connection) {
            return Ok(());
        }
        let stop = self.store.inner.stop.clone();
        let mut requests = JoinSet::new();
        loop {
            tokio::select! {
                streams = connection.accept_bi() => match streams {
                    Ok((send, receive)) => {
                        let (handler, connection) = (self.clone(), connection.clone());
                        requests.spawn(async move {
                            if let Err(close) = handler.answer(&connection, send, receive).await {
                                close.on(&connection);
                            }
                        });
                    }
                    // The other side is done, or gone.
                    Err(_) => break,
                },
                Some(_) = requests.join_next(), if !requests.is_empty() => {}
                () = stop.cancelled() => {
                    connection.close(CLOSE_STOPPING, b"the node is stopping");
                    break;
                }
            }
        }
        Ok(())
    }
}

/// A reason to end a whole connection.
struct Close {
    code: VarInt,
    reason: String,
}

impl Close {
    fn refused(reason: &str) -> Close {
        Close { code: CLOSE_REFUSED, reason: reason.into() }
    }

    fn on(self, connection: &Connection) {
        tracing::warn!(node = %connection.remote_id().fmt_short(), reason = self.reason, "closing a shard connection");
        let bytes = self.reason.as_bytes();
        connection.close(self.code, &bytes[..bytes.len().min(REASON_BYTES_MAX)]);
    }
}

impl ShardProtocol {
    fn admits(&self, connection: &Connection) -> bool {
        let admitted = (self.allow)(connection.remote_id());
        if !admitted {
            Close::refused("you are not a member of its cluster; join it first").on(connection);
        }
        admitted
    }

    /// One request and its answer. An error closes the connection, which is how a reason travels.
    async fn answer(
        &self,
        connection: &Connection,
        mut send: SendStream,
        mut receive: RecvStream,
    ) -> Result<(), Close> {
        let request = match timeout(PATIENCE_MAX, Request::read_async(&mut receive)).await {
            Ok(Ok((request, _))) => request,
            Ok(Err(_)) | Err(_) => return Err(Close::refused("the request could not be read")),
        };
        // Membership may have ended since the connection was made.
        if !self.admits(connection) {
            return Ok(());
        }
        let Request::Get(request) = request else {
            _ = send.reset(ERR_PERMISSION);
            return Err(Close::refused("shards can only be read here"));
        };
        // A sequence would make the store read a whole shard as a list of hashes.
        if !request.ranges.is_blob() {
            return Err(Close::refused("only single files are served"));
        }
        let hash: Hash = *request.hash.as_bytes();
        let Some(source) = self.store.source(&hash) else {
            return Err(Close { code: CLOSE_NOT_OFFERED, reason: format!("{} is not offered", hex(&hash)) });
        };
        if let Some(reason) = source.problem() {
            return Err(Close { code: CLOSE_CHANGED, reason });
        }
        let ranges = request.ranges.iter().next().cloned().unwrap_or_else(ChunkRanges::empty);
        let Ok(_place) = self.places.acquire().await else { return Ok(()) };
        tracing::debug!(node = %connection.remote_id().fmt_short(), shard = %short(&hash), "sending");
        self.send(source, ranges, &mut send).await
    }

    async fn send(&self, source: Source, ranges: ChunkRanges, send: &mut SendStream) -> Result<(), Close> {
        let (pieces, mut queue) = mpsc::channel(PIECES_MAX);
        let reader = self.store.inner.tracker.spawn_blocking(move || source.encode(&ranges, Pieces::new(pieces)));
        while let Some(piece) = queue.recv().await {
            if !matches!(timeout(PATIENCE_MAX, send.write_chunk(piece)).await, Ok(Ok(()))) {
                break;
            }
        }
        drop(queue);
        match reader.await {
            Ok(Ok(())) => _ = send.finish(),
            Ok(Err(EncodeFailure::Source(reason))) => return Err(Close { code: CLOSE_CHANGED, reason }),
            Ok(Err(EncodeFailure::Receiver)) | Err(_) => _ = send.reset(ERR_PERMISSION),
        }
        Ok(())
    }
}

/// Collects small writes into pieces and hands them to the network task; blocks while that is behind.
struct Pieces {
    buffer: BytesMut,
    queue: mpsc::Sender<Bytes>,
}

impl Pieces {
    fn new(queue: mpsc::Sender<Bytes>) -> Pieces {
        Pieces { buffer: BytesMut::with_capacity(PIECE_BYTES), queue }
    }
}

impl Write for Pieces {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.buffer.len() + bytes.len() > PIECE_BYTES {
            self.flush()?;
        }
        self.buffer.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        if self.buffer.is_empty() {
            return Ok(());
        }
        let piece = std::mem::replace(&mut self.buffer, BytesMut::with_capacity(PIECE_BYTES)).freeze();
        self.queue.blocking_send(piece).map_err(|_| io::Error::from(io::ErrorKind::BrokenPipe))
    }
}
