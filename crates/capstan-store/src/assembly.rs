//! A file put together from bytes that are elsewhere: in parts that this node has, in parts that others have, and, for
//! what no part has, at the source.
//!
//! ```text
//! order: pieces ──cut where what can supply them changes──▶ chunks ──┬─ here ────▶┐
//!                                                                    ├─ peer 1 ──▶├─▶ <id>.assembly, <id>.assembly-done
//!                                                                    ├─ peer 2 ──▶│       │ all there, hash right
//!                                                                    └─ source ──▶┘       ▼
//!                                                                                    shards/<hash>.gguf
//! ```
//!
//! What comes from parts is verified by their hash trees as it comes. What comes from the source is verified as a whole,
//! by [`Store::digest`] along all nodes that have bytes of a file, before anything is published.
mod chunks;
mod suppliers;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use capstan_proto::weights::{AssembleOrder, HashState, StoredFile};
use iroh::{Endpoint, EndpointAddr};
use tokio::sync::mpsc;

use crate::assembly::chunks::chunks;
use crate::assembly::suppliers::{Supplier, Supply, Work};
use crate::layout::{occupied_bytes, open_for_update, remove_if_there, sync_folder};
use crate::ranges::Ranges;
use crate::remote::Remote;
use crate::sha256::Sha256;
use crate::store::{Store, lock};
use crate::{Hash, Offer, StoreError};

/// How often what has arrived is noted on the disk: what a crash costs.
const NOTE_INTERVAL: Duration = Duration::from_secs(1);
/// How often progress is told.
const TELL_INTERVAL: Duration = Duration::from_millis(100);
/// Pieces between the network and the disk, of some 16 to 64 KiB each.
const WRITE_QUEUE: usize = 64;
/// Longest note of what has arrived: a line for each of a hundred thousand ranges.
const NOTE_BYTES_MAX: u64 = 8 << 20;

/// Who has the parts of an order, in the order of its providers, and how to reach the source.
pub struct Sources<'a> {
    /// This node's endpoint.
    pub endpoint: &'a Endpoint,
    /// For each provider, the nodes that have it.
    pub holders: Vec<Vec<EndpointAddr>>,
    /// What reads the source; none where only nodes are to be asked.
    pub remote: Option<Arc<Remote>>,
}

/// How far an assembly is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct AssemblyProgress {
    /// Bytes there.
    pub done_bytes: u64,
    /// Bytes in all.
    pub total_bytes: u64,
    /// Bytes that came from the source this time.
    pub outside_bytes: u64,
}

/// The name of what an order asks for: the same order goes on with what an earlier one left.
pub fn assembly_id(order: &AssembleOrder) -> Hash {
    let mut hasher = blake3::Hasher::new_derive_key("capstan 2026 assembly");
    hasher.update(&order.model.0);
    hasher.update(&order.bytes.to_le_bytes());
    hasher.update(&(order.header.len() as u64).to_le_bytes());
    hasher.update(&order.header);
    for piece in &order.pieces {
        for number in [u64::from(piece.file), piece.from, piece.to, piece.bytes] {
            hasher.update(&number.to_le_bytes());
        }
    }
    *hasher.finalize().as_bytes()
}

/// A file under way: its data, and which of it is there.
#[derive(Debug)]
pub(crate) struct Assembly {
    path: PathBuf,
    data: fs::File,
    done: Mutex<Ranges>,
}

impl Assembly {
    fn missing(&self) -> u64 {
        self.data.metadata().map_or(0, |m| m.len()).saturating_sub(lock(&self.done).bytes())
    }

    /// Writes what arrives until the sender hangs up; a piece counts as there when the system has it.
    fn receive(&self, mut pieces: mpsc::Receiver<(u64, Bytes)>) -> Result<(), StoreError> {
        use std::os::unix::fs::FileExt;
        while let Some((to, bytes)) = pieces.blocking_recv() {
            self.data.write_all_at(&bytes, to).map_err(|e| StoreError::io("write", &self.path, e, self.missing()))?;
            lock(&self.done).add(to..to + bytes.len() as u64);
        }
        Ok(())
    }
}

impl Store {
    /// Puts a file together, going on with what an earlier call left, and gives its name. Nobody sees it before
    /// [`Store::publish`]. Dropping the future, a crash or an error leaves what has arrived.
    pub async fn assemble(
        &self,
        order: &AssembleOrder,
        sources: Sources<'_>,
        mut progress: impl FnMut(AssemblyProgress) + Send,
    ) -> Result<(Hash, u64), StoreError> {
        self.alive()?;
        let id = assembly_id(order);
        let turn = self.turn(&id).await;
        let total_bytes = order.bytes;
        if self.inner.layout.became(&id).is_some() {
            progress(AssemblyProgress { done_bytes: total_bytes, total_bytes, outside_bytes: 0 });
            return Ok((id, 0));
        }
        let layout = &self.inner.layout;
        let there = occupied_bytes(&layout.assembly(&id));
        let mut room = self.room_for(total_bytes.saturating_sub(there)).await?;
        let (header, pieces) = (order.header.clone(), order.pieces.clone());
        let assembly = self.blocking(move |store| open(store, &id, total_bytes, &header, &pieces)).await?;
        let assembly = Arc::new(assembly);
        // Of the parts that this node has itself, only what matches its hash is taken.
        let local: Vec<_> = order.providers.iter().map(|p| self.source(&p.hash.0)).collect();
        let work = Work::new(chunks(order, &lock(&assembly.done)), order, &local, &sources);
        let supply = Supply { store: self, order, local: &local, sources: &sources, assembly: &assembly, work: &work };
        let all = work.suppliers().into_iter().map(|s: Supplier| supply.run(s));
        let mut all = std::pin::pin!(futures::future::try_join_all(all));
        let (mut tell, mut note) = (tokio::time::interval(TELL_INTERVAL), tokio::time::interval(NOTE_INTERVAL));
        note.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut counted = lock(&assembly.done).bytes();
        let stop = self.inner.stop.clone();
        let result = loop {
            tokio::select! {
                result = &mut all => break result.map(drop),
                () = stop.cancelled() => break Err(StoreError::Closed),
                _ = tell.tick() => {
                    let done_bytes = lock(&assembly.done).bytes();
                    room.shrink(done_bytes.saturating_sub(counted));
                    counted = counted.max(done_bytes);
                    progress(AssemblyProgress { done_bytes, total_bytes, outside_bytes: work.outside_bytes() });
                }
                _ = note.tick() => {
                    let assembly = assembly.clone();
                    self.blocking(move |store| store.note(&id, &assembly)).await?;
                }
            }
        };
        let noted = assembly.clone();
        self.blocking(move |store| store.note(&id, &noted)).await?;
        result?;
        let left = work.left_bytes();
        if left > 0 {
            return Err(work.failure().unwrap_or_else(|reason| StoreError::Nowhere {
                what: order.what.clone(),
                missing_bytes: left,
                reason,
            }));
        }
        progress(AssemblyProgress { done_bytes: total_bytes, total_bytes, outside_bytes: work.outside_bytes() });
        drop(turn);
        Ok((id, work.outside_bytes()))
    }

    /// Takes a SHA-256 on over bytes of a file.
    pub async fn digest(
        &self,
        file: StoredFile,
        ranges: Vec<(u64, u64)>,
        state: &HashState,
    ) -> Result<HashState, StoreError> {
        self.alive()?;
        let path = self.stored(file)?;
        let bad = || StoreError::NotHere { id: Hash::default() };
        let mut sha = Sha256::resume(state).ok_or_else(bad)?;
        self.work(0, &mut |_, _| {}, move |report| {
            let open = fs::File::open(&path).map_err(|e| StoreError::io("open", &path, e, 1))?;
            for (from, bytes) in ranges {
                let (mut at, end) = (from, from.saturating_add(bytes));
                while at < end {
                    if report.is_stopped() {
                        return Err(StoreError::Closed);
                    }
                    let now = (end - at).min(64 << 20);
                    sha.update_from(&open, at, now).map_err(|e| StoreError::io("read", &path, e, 1))?;
                    at += now;
                }
            }
            Ok(sha.state())
        })
        .await
    }

    /// Makes what was put together a shard: hashed, visible, served. Publishing again gives the same.
    pub async fn publish(&self, id: &Hash) -> Result<Offer, StoreError> {
        self.alive()?;
        let turn = self.turn(id).await;
        let layout = &self.inner.layout;
        if let Some(hash) = layout.became(id) {
            let path = layout.shard(&hash);
            let bytes = fs::metadata(&path).map_err(|e| StoreError::io("read", &path, e, 1))?.len();
            return Ok(Offer { hash, bytes });
        }
        let path = layout.assembly(id);
        if !path.exists() {
            return Err(StoreError::NotHere { id: *id });
        }
        let offer = self.adopt_noting(&path, Some(layout.assembled(id)), |_, _| {}).await?;
        let done = layout.assembly_done(id);
        remove_if_there(&done).map_err(|e| StoreError::io("remove", &done, e, 1))?;
        drop(turn);
        Ok(offer)
    }

    /// Moves what was put together to a place outside of the store where there is no file yet, or copies it where that is
    /// another disk. It is there whole or not at all. Gives its size.
    pub async fn take_out(&self, id: &Hash, path: &Path) -> Result<u64, StoreError> {
        self.alive()?;
        let turn = self.turn(id).await;
        let from = self.stored(StoredFile::Assembly(capstan_proto::ContentHash(*id)))?;
        let layout = &self.inner.layout;
        let (mine, done, to) = (from == layout.assembly(id), layout.assembly_done(id), path.to_path_buf());
        let bytes = self.blocking(move |_| take_out(&from, &to, mine)).await?;
        remove_if_there(&done).map_err(|e| StoreError::io("remove", &done, e, 1))?;
        drop(turn);
        Ok(bytes)
    }

    /// Forgets what was put together, published or not: it is not what it should be.
    pub async fn discard(&self, id: &Hash) -> Result<(), StoreError> {
        self.alive()?;
        if let Some(hash) = self.inner.layout.became(id) {
            self.remove(&hash).await?;
        }
        let _turn = self.turn(id).await;
        let layout = &self.inner.layout;
        for path in [layout.assembly(id), layout.assembly_done(id), layout.assembled(id)] {
            remove_if_there(&path).map_err(|e| StoreError::io("remove", &path, e, 1))?;
        }
        Ok(())
    }

    /// Where a file of the store lies.
    fn stored(&self, file: StoredFile) -> Result<PathBuf, StoreError> {
        let layout = &self.inner.layout;
        match file {
            StoredFile::Assembly(id) => match layout.became(&id.0) {
                Some(hash) => Ok(layout.shard(&hash)),
                None if layout.assembly(&id.0).exists() => Ok(layout.assembly(&id.0)),
                None => Err(StoreError::NotHere { id: id.0 }),
            },
            StoredFile::Part(hash) => {
                let path = self.local(&hash.0).or_else(|| self.offered(&hash.0));
                path.ok_or(StoreError::NotHere { id: hash.0 })
            }
        }
    }

    /// Notes what has arrived, after it has reached the disk.
    fn note(&self, id: &Hash, assembly: &Assembly) -> Result<(), StoreError> {
        let ranges: Vec<(u64, u64)> = lock(&assembly.done).iter().collect();
        let path = self.inner.layout.assembly_done(id);
        let failed = |e| StoreError::io("write", &path, e, assembly.missing());
        assembly.data.sync_data().map_err(failed)?;
        let temporary = path.with_extension("done.tmp");
        fs::write(&temporary, serde_json::to_vec(&ranges).map_err(|e| failed(e.into()))?).map_err(failed)?;
        fs::rename(&temporary, &path).map_err(failed)
    }
}

fn take_out(from: &Path, to: &Path, may_move: bool) -> Result<u64, StoreError> {
    let failed = |e| StoreError::io("write", to, e, 1);
    if to.exists() {
        return Err(failed(io::Error::from(io::ErrorKind::AlreadyExists)));
    }
    let bytes = fs::metadata(from).map_err(failed)?.len();
    // A second name is there at once, and only if the first name is free.
    if may_move && fs::hard_link(from, to).is_ok() {
        fs::remove_file(from).map_err(failed)?;
        return Ok(bytes);
    }
    let beside = to.with_added_extension("part");
    let copied = fs::copy(from, &beside)
        .and_then(|_| fs::File::open(&beside)?.sync_all())
        .and_then(|()| fs::hard_link(&beside, to).or_else(|_| fs::rename(&beside, to)));
    remove_if_there(&beside).map_err(failed)?;
    copied.map_err(failed)?;
    if may_move {
        fs::remove_file(from).map_err(failed)?;
    }
    Ok(bytes)
}

/// Opens or creates the file; what is in no piece is there at once.
fn open(
    store: &Store,
    id: &Hash,
    bytes: u64,
    header: &[u8],
    pieces: &[capstan_proto::weights::Piece],
) -> Result<Assembly, StoreError> {
    use std::os::unix::fs::FileExt;
    let layout = &store.inner.layout;
    let (path, note) = (layout.assembly(id), layout.assembly_done(id));
    let failed = |e| StoreError::io("write", &path, e, bytes);
    let known = path.exists() && fs::metadata(&note).is_ok_and(|m| m.len() <= NOTE_BYTES_MAX);
    let ranges: Vec<(u64, u64)> = match fs::read(&note) {
        Ok(text) if known => serde_json::from_slice(&text).unwrap_or_default(),
        _ => Vec::new(),
    };
    let mut done: Ranges = ranges.into_iter().filter(|(_, end)| *end <= bytes).collect();
    let data = open_for_update(&path).map_err(failed)?;
    data.set_len(bytes).map_err(failed)?;
    data.write_all_at(header, 0).map_err(failed)?;
    sync_folder(&layout.blobs).map_err(failed)?;
    let needed: Ranges = pieces.iter().map(|p| (p.to, p.to.saturating_add(p.bytes))).collect();
    for gap in needed.missing(0..bytes) {
        done.add(gap);
    }
    Ok(Assembly { path, data, done: Mutex::new(done) })
}
