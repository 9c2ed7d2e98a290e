//! Gets a shard from another node: checks the room, resumes what is there, verifies as it arrives, then publishes it.

use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bao_tree::io::BaoContentItem;
use iroh::endpoint::{ConnectError, ConnectingError, Connection, ConnectionError};
use iroh::{Endpoint, EndpointAddr, EndpointId};
use iroh_blobs::get::fsm::{self, BlobContentNext, ConnectedNext, DecodeError};
use iroh_blobs::protocol::GetRequest;
use tokio::sync::mpsc;
use tokio::time::timeout;

use crate::error::short;
use crate::layout::{free_bytes, occupied_bytes};
use crate::partial::{Partial, WRITE_QUEUE};
use crate::serve::{BLOBS_ALPN, CLOSE_CHANGED, CLOSE_DONE, CLOSE_NOT_OFFERED, CLOSE_REFUSED, REASON_BYTES_MAX};
use crate::store::{Inner, Store};
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

/// Room that a fetch leaves free on the disk, for logs and for the rest of the machine.
pub(crate) const SPARE_BYTES: u64 = 64 << 20;

impl Store {
    /// Fetches a shard of `bytes` bytes from node `from` into `shards/` and returns its path.
    ///
    /// A shard that is there and verifies costs no network. What an earlier fetch left is hashed and kept, so
    /// `progress(done, total)`, in bytes and called on the caller's task, starts with what was there. A broken
    /// connection is tried again a few times. Dropping the future, a crash or an error leaves a resumable partial, and
    /// nothing in `shards/`. The room on the disk is checked first, counting what other fetches still need; where it is
    /// short, shards that nobody holds make way.
    pub async fn fetch(
        &self,
        endpoint: &Endpoint,
        from: EndpointAddr,
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
        from: EndpointAddr,
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
        let mut room = match self.reserve(&hash, bytes) {
            Err(StoreError::DiskFull { missing_bytes, .. }) if self.drop_unused(missing_bytes).await? > 0 => {
                self.reserve(&hash, bytes)?
            }
            other => other?,
        };
        let mut partial = self.blocking(move |store| Partial::open(&store.inner.layout, &hash, bytes, turn)).await?;
        progress(partial.have_bytes, bytes);
        let mut fruitless = 0;
        while !partial.is_complete() {
            let before = partial.have_bytes;
            let mut result;
            (partial, result) = self.receive(endpoint, &from, partial, &mut room, progress).await?;
            if result.is_ok() && !partial.is_complete() {
                let reason = "it sent less than was asked for".into();
                result = Err(StoreError::SourceLost { node: from.id, reason });
            }
            let Err(error) = result else { continue };
            fruitless = if partial.have_bytes > before { 0 } else { fruitless + 1 };
            if !error.is_retryable() || fruitless == FRUITLESS_TRIES_MAX {
                return Err(error);
            }
            tracing::info!(shard = %short(&hash), %error, "trying again");
            tokio::time::sleep(RETRY_PAUSE * (fruitless + 1)).await;
        }
        let path = self.blocking(move |store| publish(store, partial)).await?;
        progress(bytes, bytes);
        Ok(path)
    }

    /// One connection's worth of a transfer. The partial comes back also when the network failed.
    async fn receive(
        &self,
        endpoint: &Endpoint,
        from: &EndpointAddr,
        partial: Partial,
        room: &mut Reservation<'_>,
        progress: &mut (impl FnMut(u64, u64) + Send),
    ) -> Result<(Partial, Result<(), StoreError>), StoreError> {
        let (node, hash) = (from.id, partial.hash);
        let connection = match timeout(CONNECT_MAX, endpoint.connect(from.clone(), BLOBS_ALPN)).await {
            Ok(Ok(connection)) => connection,
            Ok(Err(e)) => return Ok((partial, Err(connect_failure(e, node, hash)))),
            Err(_) => {
                let reason = format!("no answer in {} seconds", CONNECT_MAX.as_secs());
                return Ok((partial, Err(StoreError::Unreachable { node, reason })));
            }
        };
        let (bytes, have_bytes, missing) = (partial.bytes, partial.have_bytes, partial.missing());
        let (items, queue) = mpsc::channel(WRITE_QUEUE);
        let writer = self.inner.tracker.spawn_blocking(move || partial.receive(queue));
        let mut arrived = |new: u64, total_new: u64| {
            room.shrink(new);
            progress((have_bytes + total_new).min(bytes), bytes);
        };
        let request = GetRequest::blob_ranges(hash.into(), missing);
        let transfer = transfer(&connection, request, bytes, items, &mut arrived).await;
        let (partial, written) = writer.await.map_err(|_| StoreError::Closed)?;
        // A writer that failed is why the transfer stopped, so its error comes first.
        let result = written.and_then(|()| transfer.map_err(|failure| failure.explain(&connection, node, hash, bytes)));
        connection.close(CLOSE_DONE, b"done");
        Ok((partial, result))
    }

    /// Sets disk space aside, or says how much is missing.
    fn reserve(&self, hash: &Hash, bytes: u64) -> Result<Reservation<'_>, StoreError> {
        let layout = &self.inner.layout;
        let there = occupied_bytes(&layout.partial(hash)) + occupied_bytes(&layout.partial_tree(hash));
        let needed = Partial::disk_bytes(bytes).saturating_sub(there);
        let free = free_bytes(&layout.blobs).map_err(|e| StoreError::io("measure", &layout.blobs, e, 1))?;
        let others = self.inner.reserved_bytes.fetch_add(needed, Ordering::Relaxed);
        let reservation = Reservation { inner: &self.inner, bytes: needed };
        let wanted = needed.saturating_add(others).saturating_add(SPARE_BYTES);
        if needed > 0 && wanted > free {
            return Err(StoreError::DiskFull { folder: layout.blobs.clone(), missing_bytes: wanted - free });
        }
        Ok(reservation)
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

/// Disk space promised to one fetch; given back as it is used up, and at the end.
struct Reservation<'a> {
    inner: &'a Inner,
    bytes: u64,
}

impl Reservation<'_> {
    fn shrink(&mut self, used: u64) {
        let used = used.min(self.bytes);
        self.bytes -= used;
        release(&self.inner.reserved_bytes, used);
    }
}

impl Drop for Reservation<'_> {
    fn drop(&mut self) {
        release(&self.inner.reserved_bytes, self.bytes);
    }
}

fn release(reserved: &AtomicU64, bytes: u64) {
    reserved.fetch_sub(bytes, Ordering::Relaxed);
}

/// What ended a transfer, before the connection is asked why.
enum Failure {
    Network(String),
    Silence,
    BadData,
    WrongSize(u64),
    /// The disk side hung up and has the reason.
    Writer,
}

/// Asks for the ranges and passes the verified items on. `arrived(new, so far)` counts bytes of content.
async fn transfer(
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
    fn explain(self, connection: &Connection, node: EndpointId, hash: Hash, bytes: u64) -> StoreError {
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
