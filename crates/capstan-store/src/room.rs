//! Room on the disk: shards that nobody uses stay for a quick reload, and make way when space is short.

use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError};
use std::time::UNIX_EPOCH;

use futures::future::BoxFuture;

use crate::error::short;
use crate::fetch::SPARE_BYTES;
use crate::layout::{Layout, free_bytes, occupied_bytes};
use crate::store::{Inner, Store};
use crate::{Hash, StoreError, parse_hex};

/// A shard that is in use, or will be: it is not deleted to make room until this is dropped.
#[derive(Debug)]
pub struct Hold {
    store: Store,
    hash: Hash,
}

/// A shard, whole or partial, that may go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Unused {
    hash: Hash,
    /// When it was used last; for a partial, when something arrived last. In milliseconds.
    used: u64,
    /// What it takes on the disk.
    bytes: u64,
}

impl Store {
    /// Keeps a shard from being deleted to make room. Take it before asking whether the shard is here, so that it
    /// cannot go between the answer and its use.
    pub fn hold(&self, hash: &Hash) -> Hold {
        *self.state().held.entry(*hash).or_default() += 1;
        Hold { store: self.clone(), hash: *hash }
    }

    /// Whether a shard is in use, see [`Store::hold`].
    pub fn is_held(&self, hash: &Hash) -> bool {
        self.state().held.contains_key(hash)
    }

    /// Most bytes that the store may take; none is what the disk has.
    pub fn set_limit(&self, limit_bytes: Option<u64>) {
        self.inner.limit_bytes.store(limit_bytes.unwrap_or(u64::MAX), Ordering::Relaxed);
    }

    /// The limit that was set.
    pub fn limit(&self) -> Option<u64> {
        Some(self.inner.limit_bytes.load(Ordering::Relaxed)).filter(|limit| *limit != u64::MAX)
    }

    /// Asks `may_go` before a shard or partial is deleted to make room; what it refuses stays.
    pub fn ask_before_deleting(&self, may_go: impl Fn(Hash) -> BoxFuture<'static, bool> + Send + Sync + 'static) {
        *self.inner.may_go.lock().unwrap_or_else(PoisonError::into_inner) = Some(Arc::new(may_go));
    }

    /// Bytes that the store may still take: what the disk has free less a reserve, within the limit, less what is
    /// promised to work that is under way.
    pub fn free_bytes(&self) -> Result<u64, StoreError> {
        Ok(self.room()?.0.saturating_sub(self.inner.reserved_bytes.load(Ordering::Relaxed)))
    }

    /// Bytes that may be written, promised ones included, and whether the limit or the disk says so.
    fn room(&self) -> Result<(u64, bool), StoreError> {
        let folder = &self.inner.layout.blobs;
        let free = free_bytes(folder).map_err(|e| StoreError::io("measure", folder, e, 1))?;
        let free = free.saturating_sub(SPARE_BYTES);
        let Some(limit) = self.limit() else { return Ok((free, false)) };
        let left = limit.saturating_sub(self.bytes_used()?);
        Ok((free.min(left), left < free))
    }

    /// Sees to it that a file of `bytes` bytes fits on the disk, by deleting shards that nobody holds. Where even all
    /// of them are not enough, none is deleted: whoever writes the file then says what is missing.
    pub async fn make_room(&self, bytes: u64) -> Result<(), StoreError> {
        let promised = self.inner.reserved_bytes.load(Ordering::Relaxed);
        let missing = bytes.saturating_add(promised).saturating_sub(self.room()?.0);
        self.drop_unused(missing).await?;
        Ok(())
    }

    /// Sets disk space aside for `bytes` more, deleting shards that nobody holds where need be, or says how much is
    /// missing.
    pub(crate) async fn room_for(&self, bytes: u64) -> Result<Reservation<'_>, StoreError> {
        match self.reserve(bytes) {
            Err(StoreError::DiskFull { missing_bytes, .. } | StoreError::OverLimit { missing_bytes, .. })
                if self.drop_unused(missing_bytes).await? > 0 =>
            {
                self.reserve(bytes)
            }
            other => other,
        }
    }

    fn reserve(&self, bytes: u64) -> Result<Reservation<'_>, StoreError> {
        let (room, by_limit) = self.room()?;
        let others = self.inner.reserved_bytes.fetch_add(bytes, Ordering::Relaxed);
        let reservation = Reservation { inner: &self.inner, bytes };
        let missing_bytes = bytes.saturating_add(others).saturating_sub(room);
        if bytes == 0 || missing_bytes == 0 {
            return Ok(reservation);
        }
        let folder = self.inner.layout.blobs.clone();
        Err(match self.limit() {
            Some(limit_bytes) if by_limit => StoreError::OverLimit { folder, limit_bytes, missing_bytes },
            _ => StoreError::DiskFull { folder, missing_bytes },
        })
    }

    /// Deletes shards and partials that nobody holds, the least recently used first, until `missing_bytes` are freed.
    /// Where all of them together are not enough, none is deleted. Returns how many bytes were freed.
    pub async fn drop_unused(&self, missing_bytes: u64) -> Result<u64, StoreError> {
        self.alive()?;
        if missing_bytes == 0 {
            return Ok(0);
        }
        let layout = &self.inner.layout;
        let mut unused = self.unused().map_err(|e| StoreError::io("list", &layout.shards, e, 1))?;
        let may_go = self.inner.may_go.lock().unwrap_or_else(PoisonError::into_inner).clone();
        if let Some(may_go) = may_go {
            // Only as many are asked about as have to go, the least recently used first.
            unused.sort_by_key(|u| u.used);
            let (mut kept, mut enough) = (Vec::new(), 0u64);
            for one in unused {
                if enough >= missing_bytes {
                    break;
                }
                if may_go(one.hash).await {
                    enough = enough.saturating_add(one.bytes);
                    kept.push(one);
                }
            }
            unused = kept;
        }
        let mut freed = 0;
        for Unused { hash, bytes, .. } in choose(unused, missing_bytes) {
            // Whoever works on it now has a use for it. Who comes later takes a hold, then waits for this turn.
            let Some(_turn) = self.turn_now(&hash) else { continue };
            if self.state().held.contains_key(&hash) {
                continue;
            }
            if self.blocking(move |store| store.remove_files(&hash)).await? {
                tracing::info!(shard = %short(&hash), bytes, "deleted to make room: no stage here uses it");
                freed += bytes;
            }
        }
        Ok(freed)
    }

    fn unused(&self) -> std::io::Result<Vec<Unused>> {
        let layout = &self.inner.layout;
        let mut unused = Vec::new();
        for (folder, extension) in [(&layout.shards, "gguf"), (&layout.blobs, "partial"), (&layout.blobs, "assembly")] {
            for entry in fs::read_dir(folder)? {
                let path = entry?.path();
                let Some(hash) = hash_of(&path, extension) else { continue };
                let state = self.state();
                // A shard that is offered from its place here is in use by others.
                let offered = state.index.offers.get(&hash).is_some_and(|o| o.path == path);
                if offered || state.held.contains_key(&hash) {
                    continue;
                }
                let used = state.index.used.get(&hash).copied().unwrap_or_else(|| changed(&path));
                unused.push(Unused { hash, used, bytes: all_bytes(layout, &hash) });
            }
        }
        // A shard that was taken out of use may be there both whole and partial.
        unused.sort_by_key(|u| (u.hash, u.used));
        unused.dedup_by_key(|u| u.hash);
        Ok(unused)
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        let mut state = self.store.state();
        if let Some(times) = state.held.get_mut(&self.hash) {
            *times -= 1;
            if *times == 0 {
                state.held.remove(&self.hash);
            }
        }
    }
}

fn hash_of(path: &Path, extension: &str) -> Option<Hash> {
    if path.extension()? != extension {
        return None;
    }
    parse_hex(path.file_stem()?.to_str()?)
}

fn changed(path: &Path) -> u64 {
    let modified = fs::metadata(path).and_then(|m| m.modified()).ok();
    modified.and_then(|t| t.duration_since(UNIX_EPOCH).ok()).map_or(0, |t| t.as_millis() as u64)
}

fn all_bytes(layout: &Layout, hash: &Hash) -> u64 {
    let files =
        [layout.shard(hash), layout.tree(hash), layout.partial(hash), layout.partial_tree(hash), layout.assembly(hash)];
    files.iter().map(|f| occupied_bytes(f)).sum()
}

/// Which to delete: the least recently used, until it is enough; none when all are not.
fn choose(mut unused: Vec<Unused>, missing_bytes: u64) -> Vec<Unused> {
    if unused.iter().map(|u| u.bytes).fold(0, u64::saturating_add) < missing_bytes {
        return Vec::new();
    }
    unused.sort_by_key(|u| u.used);
    let mut freed = 0u64;
    let enough = unused.iter().position(|u| {
        freed = freed.saturating_add(u.bytes);
        freed >= missing_bytes
    });
    unused.truncate(enough.map_or(0, |last| last + 1));
    unused
}

/// Disk space promised to work that is under way; given back as it is used up, and at the end.
pub(crate) struct Reservation<'a> {
    inner: &'a Inner,
    bytes: u64,
}

impl Reservation<'_> {
    pub fn shrink(&mut self, used: u64) {
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
