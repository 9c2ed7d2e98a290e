//! Who brings which chunk: suppliers take chunks from one queue, those of this node and other nodes before the source.
//!
//! The source gets a chunk only when nobody in the cluster who still answers has it, so each byte comes from outside
//! once. A supplier that fails gives its chunk back, pauses, and after a few failures in a row is out of the work.
use std::collections::VecDeque;
use std::fs::File;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bao_tree::io::BaoContentItem;
use bao_tree::{ChunkNum, ChunkRanges};
use bytes::Bytes;
use capstan_proto::weights::{AssembleOrder, FileRecord};
use iroh::endpoint::Connection;
use iroh::{EndpointAddr, EndpointId};
use iroh_blobs::protocol::GetRequest;
use tokio::sync::{Notify, mpsc};

use super::chunks::Chunk;
use super::{Assembly, Sources, WRITE_QUEUE};
use crate::StoreError;
use crate::fetch::{dial, transfer};
use crate::remote::RemoteFile;
use crate::serve::CLOSE_DONE;
use crate::store::{Store, lock};
use crate::tree::{BLOCK_SIZE, Source, file_tree, valid_in};

/// Requests to the source at once: enough to fill a line on which each stream is slowed down by itself.
const OUTSIDE_STREAMS: usize = 8;
/// Requests to one node at once.
const PEER_STREAMS: usize = 2;
/// Failures in a row, without a byte between them, after which a supplier is out.
const FRUITLESS_MAX: u32 = 7;
/// Pause after the first of them; it doubles each time up to [`PAUSE_MAX`]. All together half a minute: a server that is
/// started again, or a line that is back.
const PAUSE: Duration = Duration::from_millis(250);
/// See [`PAUSE`].
const PAUSE_MAX: Duration = Duration::from_secs(10);
/// Bytes read at once from a part that is here.
const READ_BYTES: u64 = 1 << 20;

/// Who can bring something.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Who {
    /// This node has parts itself.
    Here,
    /// A node, by the providers that it has.
    Peer(EndpointAddr, Vec<usize>),
    /// The source.
    Outside,
}

/// One stream of chunks.
#[derive(Clone, Debug)]
pub(super) struct Supplier {
    /// Its place in the list of those who can bring something.
    index: usize,
    who: Who,
}

struct State {
    queue: VecDeque<Chunk>,
    under_way: usize,
    /// For each of those who can bring something, the streams that are still at it.
    alive: Vec<usize>,
    outside_failure: Option<StoreError>,
    peer_failure: Option<String>,
}

/// The chunks that are left, and who is at work.
pub(super) struct Work {
    who: Vec<Who>,
    /// Providers that are here.
    here: Vec<usize>,
    /// Files that can be read at the source.
    outside: Vec<bool>,
    state: Mutex<State>,
    changed: Notify,
    outside_bytes: AtomicU64,
}

impl Work {
    pub fn new(chunks: Vec<Chunk>, order: &AssembleOrder, local: &[Option<Source>], sources: &Sources) -> Work {
        let here: Vec<usize> = (0..local.len()).filter(|i| local[*i].is_some()).collect();
        let mut peers: Vec<(EndpointAddr, Vec<usize>)> = Vec::new();
        for (i, holders) in sources.holders.iter().enumerate() {
            for holder in holders {
                match peers.iter_mut().find(|(addr, _)| addr.id == holder.id) {
                    Some((_, provides)) => provides.push(i),
                    None => peers.push((holder.clone(), vec![i])),
                }
            }
        }
        let outside: Vec<bool> = order
            .files
            .iter()
            .map(|f| sources.remote.is_some() && f.url.as_ref().is_some_and(|u| !u.is_empty()))
            .collect();
        let mut who = vec![Who::Here];
        who.extend(peers.into_iter().map(|(addr, provides)| Who::Peer(addr, provides)));
        who.push(Who::Outside);
        let alive = who.iter().map(Who::streams).collect();
        let state = State { queue: chunks.into(), under_way: 0, alive, outside_failure: None, peer_failure: None };
        let (state, outside_bytes) = (Mutex::new(state), AtomicU64::new(0));
        Work { who, here, outside, state, changed: Notify::new(), outside_bytes }
    }

    pub fn suppliers(&self) -> Vec<Supplier> {
        let streams = |(index, who): (usize, &Who)| vec![Supplier { index, who: who.clone() }; who.streams()];
        self.who.iter().enumerate().flat_map(streams).collect()
    }

    pub fn outside_bytes(&self) -> u64 {
        self.outside_bytes.load(Ordering::Relaxed)
    }

    /// Bytes that nobody brought.
    pub fn left_bytes(&self) -> u64 {
        lock(&self.state).queue.iter().map(|c| c.piece.bytes).sum()
    }

    /// Why: what the source said, or what the last node said.
    pub fn failure(&self) -> Result<StoreError, String> {
        let mut state = lock(&self.state);
        match state.outside_failure.take() {
            Some(error) => Ok(error),
            None => Err(state.peer_failure.take().map(|reason| format!(" ({reason})")).unwrap_or_default()),
        }
    }

    /// Whether someone can bring a chunk now. The source only where no node can that is still at it.
    fn can(&self, index: usize, chunk: &Chunk, alive: &[usize]) -> bool {
        if alive[index] == 0 {
            return false;
        }
        match &self.who[index] {
            Who::Here => chunk.providers.iter().any(|(p, _)| self.here.contains(p)),
            Who::Peer(_, provides) => chunk.providers.iter().any(|(p, _)| provides.contains(p)),
            Who::Outside => {
                let inside = (0..index).any(|other| self.can(other, chunk, alive));
                !inside && self.outside.get(usize::from(chunk.piece.file)).copied().unwrap_or(false)
            }
        }
    }

    /// The next chunk for a supplier; none when there is nothing left that it could ever get.
    async fn take(&self, index: usize) -> Option<Chunk> {
        loop {
            let changed = self.changed.notified();
            tokio::pin!(changed);
            // From here on no change is missed.
            changed.as_mut().enable();
            {
                let mut state = lock(&self.state);
                let state = &mut *state;
                if let Some(at) = state.queue.iter().position(|c| self.can(index, c, &state.alive)) {
                    state.under_way += 1;
                    return state.queue.remove(at);
                }
                let someone = |c: &Chunk| (0..self.who.len()).any(|i| self.can(i, c, &state.alive));
                if state.under_way == 0 && !state.queue.iter().any(someone) {
                    return None;
                }
            }
            changed.await;
        }
    }

    fn finished(&self) {
        lock(&self.state).under_way -= 1;
        self.changed.notify_waiters();
    }

    fn give_back(&self, chunk: Chunk) {
        let mut state = lock(&self.state);
        state.under_way -= 1;
        state.queue.push_front(chunk);
        drop(state);
        self.changed.notify_waiters();
    }

    fn retire(&self, index: usize, error: Option<StoreError>) {
        let mut state = lock(&self.state);
        state.alive[index] = state.alive[index].saturating_sub(1);
        match error {
            Some(error) if self.who[index] == Who::Outside => {
                // The first reason is the cause; what other streams say follows from it.
                state.outside_failure.get_or_insert(error);
            }
            Some(error) => state.peer_failure = Some(error.to_string()),
            None => {}
        }
        drop(state);
        self.changed.notify_waiters();
    }
}

impl Who {
    fn streams(&self) -> usize {
        match self {
            Who::Here => 1,
            Who::Peer(..) => PEER_STREAMS,
            Who::Outside => OUTSIDE_STREAMS,
        }
    }
}

/// A thread that writes, and what came of it.
type Writing = tokio::task::JoinHandle<Result<(), StoreError>>;

/// What suppliers need.
pub(super) struct Supply<'a> {
    pub store: &'a Store,
    pub order: &'a AssembleOrder,
    pub local: &'a [Option<Source>],
    pub sources: &'a Sources<'a>,
    pub assembly: &'a std::sync::Arc<Assembly>,
    pub work: &'a Work,
}

impl Supply<'_> {
    /// Brings chunks until there are none left for this supplier. An error is one of this node's disk, which ends all.
    pub async fn run(&self, supplier: Supplier) -> Result<(), StoreError> {
        let mut connection = None;
        let mut fruitless = 0;
        let failure = loop {
            let Some(chunk) = self.work.take(supplier.index).await else { break None };
            let before = self.missing(&chunk);
            let brought = match &supplier.who {
                Who::Here => self.copy_here(&chunk).await,
                Who::Peer(addr, provides) => self.ask_peer(addr, provides, &chunk, &mut connection).await,
                Who::Outside => self.ask_outside(&chunk).await,
            };
            let Err(error) = brought else {
                self.work.finished();
                fruitless = 0;
                continue;
            };
            fruitless = if self.missing(&chunk) < before { 0 } else { fruitless + 1 };
            self.work.give_back(chunk);
            if is_ours(&error) {
                return Err(error);
            }
            connection = None;
            if !retryable(&error) || fruitless >= FRUITLESS_MAX {
                break Some(error);
            }
            tracing::info!(file = self.order.what, %error, "trying again");
            tokio::time::sleep((PAUSE * 2u32.saturating_pow(fruitless.saturating_sub(1))).min(PAUSE_MAX)).await;
        };
        if let Some(connection) = connection {
            connection.close(CLOSE_DONE, b"done");
        }
        self.work.retire(supplier.index, failure);
        Ok(())
    }

    /// Bytes of a chunk that are not there.
    fn missing(&self, chunk: &Chunk) -> u64 {
        let (to, bytes) = (chunk.piece.to, chunk.piece.bytes);
        lock(&self.assembly.done).missing(to..to + bytes).iter().map(|r| r.end - r.start).sum()
    }

    /// Bytes of a chunk that are not there, as offsets within it.
    fn gaps(&self, chunk: &Chunk) -> Vec<(u64, u64)> {
        let (to, bytes) = (chunk.piece.to, chunk.piece.bytes);
        let gaps = lock(&self.assembly.done).missing(to..to + bytes);
        gaps.into_iter().map(|r| (r.start - to, r.end - r.start)).collect()
    }

    /// What goes to the disk, on a thread of its own.
    fn writer(&self) -> (mpsc::Sender<(u64, Bytes)>, Writing) {
        let (pieces, queue) = mpsc::channel(WRITE_QUEUE);
        let assembly = self.assembly.clone();
        (pieces, self.store.inner.tracker.spawn_blocking(move || assembly.receive(queue)))
    }

    async fn copy_here(&self, chunk: &Chunk) -> Result<(), StoreError> {
        let found = chunk.providers.iter().find_map(|(p, at)| Some((self.local[*p].clone()?, *at)));
        let Some((source, at)) = found else { return Ok(()) };
        let (gaps, to, assembly) = (self.gaps(chunk), chunk.piece.to, self.assembly.clone());
        let bytes = chunk.piece.bytes;
        self.store
            .blocking(move |_| {
                use std::os::unix::fs::FileExt;
                let lost = |reason: String| StoreError::PartRotten { path: source.path.clone(), reason };
                let open = |path| File::open(path).map_err(|e| lost(e.to_string()));
                if let Some(reason) = source.problem() {
                    return Err(lost(reason));
                }
                let data = open(&source.path)?;
                let tree = file_tree(&source.hash, source.stamp.bytes, open(&source.tree_path)?);
                let wanted = blocks_of(at, bytes, source.stamp.bytes);
                let right = valid_in(&data, &tree, &wanted).map_err(|e| lost(e.to_string()))?;
                if !(wanted - right).is_empty() {
                    return Err(lost("some of it does not match its hash".into()));
                }
                let mut buffer = vec![0; READ_BYTES as usize];
                for (from, bytes) in gaps {
                    let mut done = 0;
                    while done < bytes {
                        let now = (bytes - done).min(READ_BYTES) as usize;
                        data.read_exact_at(&mut buffer[..now], at + from + done).map_err(|e| lost(e.to_string()))?;
                        let place = to + from + done;
                        assembly
                            .data
                            .write_all_at(&buffer[..now], place)
                            .map_err(|e| StoreError::io("write", &assembly.path, e, assembly.missing()))?;
                        lock(&assembly.done).add(place..place + now as u64);
                        done += now as u64;
                    }
                }
                Ok(())
            })
            .await
    }

    async fn ask_peer(
        &self,
        addr: &EndpointAddr,
        provides: &[usize],
        chunk: &Chunk,
        connection: &mut Option<Connection>,
    ) -> Result<(), StoreError> {
        let Some((provider, at)) = chunk.providers.iter().find(|(p, _)| provides.contains(p)) else { return Ok(()) };
        let (hash, bytes) = (self.order.providers[*provider].hash.0, self.order.providers[*provider].bytes);
        let connected = match connection.take().filter(|c| c.close_reason().is_none()) {
            Some(connected) => connected,
            None => dial(self.sources.endpoint, addr, hash).await?,
        };
        *connection = Some(connected.clone());
        let node: EndpointId = addr.id;
        for (from, len) in self.gaps(chunk) {
            let (items, mut queue) = mpsc::channel(WRITE_QUEUE);
            let (pieces, writer) = self.writer();
            let (begin, end, to) = (at + from, at + from + len, chunk.piece.to + from);
            let forward = async move {
                while let Some(item) = queue.recv().await {
                    let BaoContentItem::Leaf(leaf) = item else { continue };
                    // Blocks are whole, what is wanted of the first and the last may not be.
                    let (start, stop) = (leaf.offset.max(begin), (leaf.offset + leaf.data.len() as u64).min(end));
                    if start >= stop {
                        continue;
                    }
                    let cut = leaf.data.slice((start - leaf.offset) as usize..(stop - leaf.offset) as usize);
                    if pieces.send((to + (start - begin), cut)).await.is_err() {
                        break;
                    }
                }
                drop(pieces);
            };
            let request = GetRequest::blob_ranges(hash.into(), blocks_of(begin, len, bytes));
            let mut uncounted = |_, _| {};
            let ((), sent) = tokio::join!(forward, transfer(&connected, request, bytes, items, &mut uncounted));
            writer.await.map_err(|_| StoreError::Closed)??;
            sent.map_err(|failure| failure.explain(&connected, node, hash, bytes))?;
        }
        Ok(())
    }

    async fn ask_outside(&self, chunk: &Chunk) -> Result<(), StoreError> {
        let file = self.order.files.get(usize::from(chunk.piece.file));
        let (Some(file), Some(remote)) = (file.and_then(|f| remote_file(f, self.sources)), &self.sources.remote) else {
            return Ok(());
        };
        for (from, len) in self.gaps(chunk) {
            let mut stream = remote.pieces(&file, chunk.piece.from + from, len).await?;
            let (pieces, writer) = self.writer();
            let mut at = chunk.piece.to + from;
            let outcome = loop {
                match stream.next().await {
                    Ok(Some(bytes)) => {
                        let len = bytes.len() as u64;
                        if pieces.send((at, bytes)).await.is_err() {
                            break Ok(());
                        }
                        self.work.outside_bytes.fetch_add(len, Ordering::Relaxed);
                        at += len;
                    }
                    Ok(None) => break Ok(()),
                    Err(error) => break Err(error),
                }
            };
            drop(pieces);
            writer.await.map_err(|_| StoreError::Closed)??;
            outcome?;
        }
        Ok(())
    }
}

/// The file at the source. Only the hub that this node itself uses is shown its token.
fn remote_file(file: &FileRecord, sources: &Sources) -> Option<RemoteFile> {
    let url = file.url.clone()?;
    let on_hub = file.on_hub && sources.remote.as_ref().is_some_and(|r| r.is_hub(&url));
    Some(RemoteFile {
        path: file.path.clone().into(),
        url,
        on_hub,
        bytes: Some(file.bytes),
        sha256: file.sha256.map(|s| s.to_string()),
        etag: file.etag.clone(),
    })
}

/// The blocks of the hash tree that hold these bytes of a file of `total` bytes.
fn blocks_of(from: u64, bytes: u64, total: u64) -> ChunkRanges {
    let block = BLOCK_SIZE.bytes() as u64;
    let end = from.saturating_add(bytes).next_multiple_of(block).min(total);
    ChunkRanges::from(ChunkNum::full_chunks(from / block * block)..ChunkNum::chunks(end))
}

/// Whether an error is one of this node's own disk or state, against which another supplier does not help.
fn is_ours(error: &StoreError) -> bool {
    matches!(
        error,
        StoreError::Io { .. } | StoreError::DiskFull { .. } | StoreError::OverLimit { .. } | StoreError::Closed
    )
}

fn retryable(error: &StoreError) -> bool {
    match error {
        StoreError::Outside { source } => source.is_retryable(),
        error => error.is_retryable(),
    }
}
