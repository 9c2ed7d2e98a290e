//! Gets a shard from another node: checks the room, resumes what is there, verifies as it arrives, then publishes it.

use std::collections::VecDeque;
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use bao_tree::io::BaoContentItem;
use bao_tree::{ChunkNum, ChunkRanges};
use iroh::endpoint::{ConnectError, ConnectingError, Connection, ConnectionError};
use iroh::{Endpoint, EndpointAddr, EndpointId};
use iroh_blobs::get::fsm::{self, BlobContentNext, ConnectedNext, DecodeError};
use iroh_blobs::protocol::GetRequest;
use tokio::sync::mpsc;
use tokio::time::timeout;

use crate::error::short;
use crate::layout::occupied_bytes;
use crate::partial::{Partial, WRITE_QUEUE};
use crate::room::Reservation;
use crate::serve::{BLOBS_ALPN, CLOSE_CHANGED, CLOSE_DONE, CLOSE_NOT_OFFERED, CLOSE_REFUSED, REASON_BYTES_MAX};
use crate::store::Store;
use crate::tree::PROGRESS_STEP_BYTES;
use crate::{Hash, StoreError};

/// Longest wait for a connection. Nodes of a cluster answer in milliseconds; a node behind a slow link in seconds.
const CONNECT_MAX: Duration = Duration::from_secs(10);

/// Longest silence of a source in the middle of a transfer: a busy disk may pause, but not for a minute.
const SILENCE_MAX: Duration = Duration::from_secs(60);

/// Tries in a row that brought nothing before a broken connection is the caller's affair.
const FRUITLESS_TRIES_MAX: u32 = 3;

/// Pause before the next try, times the number of fruitless ones: enough for a daemon to restart.
const RETRY_PAUSE: Duration = Duration::from_secs(1);

/// Longest shard that is believed: a pebibyte, a thousand times the largest model known.
const SHARD_BYTES_MAX: u64 = 1 << 50;

/// Chunks of 1 KiB that one source is asked for at a time: 8 MiB, a tenth of a second of gigabit Ethernet, so that the
/// faster of several takes more, and many times what a request costs.
const SLICE_CHUNKS: u64 = 8 << 10;

/// Room that a fetch leaves free on the disk, for logs and for the rest of the machine.
pub(crate) const SPARE_BYTES: u64 = 64 << 20;

/// A source, and how it fared.
type Fared = (EndpointId, Result<(), StoreError>);

impl Store {
    /// Fetches a shard of `bytes` bytes from node `from`; see [`Store::fetch_from`].
    pub async fn fetch(
        &self,
        endpoint: &Endpoint,
        from: EndpointAddr,
        hash: Hash,
        bytes: u64,
        progress: impl FnMut(u64, u64) + Send,
    ) -> Result<PathBuf, StoreError> {
        self.fetch_from(endpoint, vec![from], hash, bytes, progress).await
    }

    /// Fetches a shard of `bytes` bytes from all these nodes at once into `shards/` and returns its path.
    ///
    /// A shard that is there and verifies costs no network. What an earlier fetch left is hashed and kept, so
    /// `progress(done, total)`, in bytes and called on the caller's task, starts with what was there. A broken
    /// connection is tried again a few times, and what one node does not send another does. Dropping the future, a crash
    /// or an error leaves a resumable partial, and nothing in `shards/`. The room on the disk is checked first, counting
    /// what other fetches still need; where it is short, shards that nobody holds make way.
    pub async fn fetch_from(
        &self,
        endpoint: &Endpoint,
        from: Vec<EndpointAddr>,
        hash: Hash,
        bytes: u64,
        mut progress: impl FnMut(u64, u64) + Send,
    ) -> Result<PathBuf, StoreError> {
        self.alive()?;
        if bytes == 0 || bytes > SHARD_BYTES_MAX {
            return Err(StoreError::BadSize { hash, bytes });
        }
        let stop = self.inner.stop.clone();
        tokio::select! {
            result = self.fetch_or_resume(endpoint, from, hash, bytes, &mut progress) => result,
            () = stop.cancelled() => Err(StoreError::Closed),
        }
    }

    async fn fetch_or_resume(
        &self,
        endpoint: &Endpoint,
        mut from: Vec<EndpointAddr>,
        hash: Hash,
        bytes: u64,
        progress: &mut (impl FnMut(u64, u64) + Send),
    ) -> Result<PathBuf, StoreError> {
        let turn = self.turn(&hash).await;
        if let Some(path) = self.check(&hash, false, &turn, progress).await? {
            let actual_bytes = std::fs::metadata(&path).map_err(|e| StoreError::io("read", &path, e, 1))?.len();
            if actual_bytes != bytes {
                return Err(StoreError::WrongSize { hash, expected_bytes: bytes, actual_bytes });
            }
            progress(bytes, bytes);
            return Ok(path);
        }
        let layout = &self.inner.layout;
        let there = occupied_bytes(&layout.partial(&hash)) + occupied_bytes(&layout.partial_tree(&hash));
        let mut room = self.room_for(Partial::disk_bytes(bytes).saturating_sub(there)).await?;
        let mut partial = self.blocking(move |store| Partial::open(&store.inner.layout, &hash, bytes, turn)).await?;
        progress(partial.have_bytes, bytes);
        let mut fruitless = 0;
        while !partial.is_complete() {
            let before = partial.have_bytes;
            let round;
            (partial, round) = self.receive(endpoint, &from, partial, &mut room, progress).await?;
            let mut lost = None;
            for (node, result) in round {
                let Err(error) = result else { continue };
                if !error.is_retryable() {
                    from.retain(|addr| addr.id != node);
                }
                tracing::info!(shard = %short(&hash), %error, "a source failed");
                lost = Some(error);
            }
            if partial.is_complete() {
                break;
            }
            let error = match (lost, from.first()) {
                (Some(error), _) => error,
                (None, Some(addr)) => {
                    let reason = "it sent less than was asked for".into();
                    StoreError::SourceLost { node: addr.id, reason }
                }
                (None, None) => return Err(StoreError::NobodyHas { hash }),
            };
            fruitless = if partial.have_bytes > before { 0 } else { fruitless + 1 };
            if from.is_empty() || fruitless == FRUITLESS_TRIES_MAX {
                return Err(error);
            }
            tokio::time::sleep(RETRY_PAUSE * (fruitless + 1)).await;
        }
        let path = self.blocking(move |store| publish(store, partial)).await?;
        progress(bytes, bytes);
        Ok(path)
    }

    /// One connection's worth from each source. The partial comes back also when the network failed, with how each fared.
    async fn receive(
        &self,
        endpoint: &Endpoint,
        from: &[EndpointAddr],
        partial: Partial,
        room: &mut Reservation<'_>,
        progress: &mut (impl FnMut(u64, u64) + Send),
    ) -> Result<(Partial, Vec<Fared>), StoreError> {
        let (bytes, hash, have_bytes) = (partial.bytes, partial.hash, partial.have_bytes);
        let slices = Mutex::new(slices(&partial.missing()));
        let (items, queue) = mpsc::channel(WRITE_QUEUE);
        let writer = self.inner.tracker.spawn_blocking(move || partial.receive(queue));
        let meter = Mutex::new((have_bytes, room, progress));
        let arrived = |new: u64| {
            let mut meter = meter.lock().unwrap_or_else(PoisonError::into_inner);
            let (so_far, room, progress) = &mut *meter;
            *so_far += new;
            room.shrink(new);
            progress((*so_far).min(bytes), bytes);
        };
        let take = |addr: &EndpointAddr| {
            let (addr, items, slices, arrived) = (addr.clone(), items.clone(), &slices, &arrived);
            async move {
                let node = addr.id;
                let taken = async {
                    let connection = dial(endpoint, &addr, hash).await?;
                    let mut result = Ok(());
                    while let Some(ranges) = next_slice(slices) {
                        let request = GetRequest::blob_ranges(hash.into(), ranges);
                        let sent =
                            transfer(&connection, request, bytes, items.clone(), &mut |new, _| arrived(new)).await;
                        if let Err(failure) = sent {
                            result = Err(failure.explain(&connection, node, hash, bytes));
                            break;
                        }
                    }
                    connection.close(CLOSE_DONE, b"done");
                    result
                };
                (node, taken.await)
            }
        };
        let round = futures::future::join_all(from.iter().map(take)).await;
        drop(items);
        let (partial, written) = writer.await.map_err(|_| StoreError::Closed)?;
        // A writer that failed is why the transfers stopped, so its error counts.
        written?;
        Ok((partial, round))
    }
}

/// Connects to a node that is to send a shard.
pub(crate) async fn dial(endpoint: &Endpoint, to: &EndpointAddr, hash: Hash) -> Result<Connection, StoreError> {
    match timeout(CONNECT_MAX, endpoint.connect(to.clone(), BLOBS_ALPN)).await {
        Ok(Ok(connection)) => Ok(connection),
        Ok(Err(e)) => Err(connect_failure(e, to.id, hash)),
        Err(_) => {
            let reason = format!("no answer in {} seconds", CONNECT_MAX.as_secs());
            Err(StoreError::Unreachable { node: to.id, reason })
        }
    }
}

/// What is missing, in slices that sources take one after the other: the faster one takes more of them.
fn slices(missing: &ChunkRanges) -> VecDeque<ChunkRanges> {
    let mut slices = VecDeque::new();
    let boundaries = missing.boundaries();
    for pair in boundaries.chunks(2) {
        let [start, end] = pair else {
            // A range without an end is no range of a file; it is asked for as it is.
            return VecDeque::from([missing.clone()]);
        };
        let mut at = *start;
        while at < *end {
            let next = ChunkNum(at.0.saturating_add(SLICE_CHUNKS)).min(*end);
            slices.push_back(ChunkRanges::from(at..next));
            at = next;
        }
    }
    slices
}

fn next_slice(slices: &Mutex<VecDeque<ChunkRanges>>) -> Option<ChunkRanges> {
    let mut slices = slices.lock().unwrap_or_else(PoisonError::into_inner);
    // Small holes go together in one request.
    let mut taken = slices.pop_front()?;
    let mut chunks = count(&taken);
    while let Some(next) = slices.front()
        && chunks + count(next) <= SLICE_CHUNKS
    {
        chunks += count(next);
        taken |= slices.pop_front().unwrap_or_else(ChunkRanges::empty);
    }
    Some(taken)
}

fn count(slice: &ChunkRanges) -> u64 {
    match slice.boundaries() {
        [start, end] => end.0 - start.0,
        _ => SLICE_CHUNKS,
    }
}

/// Makes a complete partial a shard and records it, in one step that a dropped future does not cut in two.
fn publish(store: &Store, partial: Partial) -> Result<PathBuf, StoreError> {
    let hash = partial.hash;
    let path = store.inner.layout.shard(&hash);
    let _turn = partial.finish()?;
    let stamp = crate::layout::Stamp::of(&path).map_err(|e| StoreError::io("read", &path, e, 1))?;
    store.record(&hash, stamp)?;
    Ok(path)
}

/// What ended a transfer, before the connection is asked why.
pub(crate) enum Failure {
    Network(String),
    Silence,
    BadData,
    WrongSize(u64),
    /// The disk side hung up and has the reason.
    Writer,
}

/// Asks for the ranges and passes the verified items on. `arrived(new, so far)` counts bytes of content.
pub(crate) async fn transfer(
    connection: &Connection,
    request: GetRequest,
    bytes: u64,
    items: mpsc::Sender<BaoContentItem>,
    arrived: &mut impl FnMut(u64, u64),
) -> Result<(), Failure> {
    let start = async {
        let connected = fsm::start(connection.clone(), request, Default::default()).next().await.map_err(text)?;
        match connected.next().await.map_err(text)? {
            ConnectedNext::StartRoot(root) => root.next().next().await.map_err(text),
            // Only requests for something else lead to another state.
            _ => Err(Failure::Network("unexpected answer".into())),
        }
    };
    let (mut content, size) = timeout(SILENCE_MAX, start).await.map_err(|_| Failure::Silence)??;
    if size != bytes {
        return Err(Failure::WrongSize(size));
    }
    let (mut so_far, mut unreported) = (0, 0);
    loop {
        match timeout(SILENCE_MAX, content.next()).await.map_err(|_| Failure::Silence)? {
            BlobContentNext::More((next, item)) => {
                content = next;
                let item = item.map_err(|e| match e {
                    DecodeError::ParentHashMismatch { .. } | DecodeError::LeafHashMismatch { .. } => Failure::BadData,
                    other => text(other),
                })?;
                if let BaoContentItem::Leaf(leaf) = &item {
                    so_far += leaf.data.len() as u64;
                    unreported += leaf.data.len() as u64;
                }
                items.send(item).await.map_err(|_| Failure::Writer)?;
                if unreported >= PROGRESS_STEP_BYTES {
                    arrived(unreported, so_far);
                    unreported = 0;
                }
            }
            BlobContentNext::Done(_) => {
                arrived(unreported, so_far);
                return Ok(());
            }
        }
    }
}

fn text(error: impl std::fmt::Display) -> Failure {
    Failure::Network(error.to_string())
}

impl Failure {
    /// The error for the caller. A source that closed the connection said why, and that counts more than the read that
    /// failed because of it.
    pub(crate) fn explain(self, connection: &Connection, node: EndpointId, hash: Hash, bytes: u64) -> StoreError {
        match self {
            Self::BadData => StoreError::Corrupt { node, hash },
            Self::WrongSize(actual_bytes) => StoreError::WrongSize { hash, expected_bytes: bytes, actual_bytes },
            Self::Silence => {
                StoreError::SourceLost { node, reason: format!("silent for {} seconds", SILENCE_MAX.as_secs()) }
            }
            Self::Writer => StoreError::Closed,
            Self::Network(reason) => match connection.close_reason() {
                Some(closed) => closed_failure(&closed, node, hash),
                None => StoreError::SourceLost { node, reason },
            },
        }
    }
}

fn connect_failure(error: ConnectError, node: EndpointId, hash: Hash) -> StoreError {
    match &error {
        ConnectError::Connection { source, .. }
        | ConnectError::Connecting { source: ConnectingError::ConnectionError { source, .. }, .. }
            if matches!(source, ConnectionError::ApplicationClosed(_)) =>
        {
            closed_failure(source, node, hash)
        }
        _ => StoreError::Unreachable { node, reason: error.to_string() },
    }
}

fn closed_failure(closed: &ConnectionError, node: EndpointId, hash: Hash) -> StoreError {
    let ConnectionError::ApplicationClosed(close) = closed else {
        return StoreError::SourceLost { node, reason: closed.to_string() };
    };
    let reason = readable(&close.reason);
    match close.error_code {
        CLOSE_REFUSED => StoreError::Refused { node, reason },
        CLOSE_NOT_OFFERED => StoreError::NotOffered { node, hash },
        CLOSE_CHANGED => StoreError::SourceChanged { node, hash, reason },
        _ => StoreError::SourceLost { node, reason: format!("it closed the connection: {reason}") },
    }
}

/// Text from another machine, fit for a terminal: bounded and without control characters.
fn readable(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(&bytes[..bytes.len().min(REASON_BYTES_MAX)]);
    text.chars().filter(|c| !c.is_control()).collect()
}
