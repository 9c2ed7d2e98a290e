//! What a node holds: files it offers, shards it keeps, and the checks before a shard is handed out.

use std::collections::{BTreeMap, HashMap};
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::UNIX_EPOCH;

use futures::future::BoxFuture;
use tokio::sync::{Mutex as AsyncMutex, OwnedMutexGuard};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::error::short;
use crate::index::{Index, Offered};
use crate::layout::{Layout, Stamp, remove_if_there, sync_folder};
use crate::tree::{self, Report, Source};
use crate::{Hash, Offer, Shard, StoreError, hex};

/// A node's shards and offers, in one data folder. Clones share everything.
///
/// Methods may be called from several tasks; work on the same hash waits for its turn. After a shutdown, everything
/// that would read or write a shard returns [`StoreError::Closed`].
#[derive(Debug, Clone)]
pub struct Store {
    pub(crate) inner: Arc<Inner>,
}

/// Says whether a shard may be deleted to make room.
pub(crate) type MayGo = Arc<dyn Fn(Hash) -> BoxFuture<'static, bool> + Send + Sync>;

pub(crate) struct Inner {
    pub layout: Layout,
    /// Tells transfers and long reads to end.
    pub stop: CancellationToken,
    /// Blocking work that a shutdown waits for.
    pub tracker: TaskTracker,
    /// Disk space promised to fetches that are under way, in bytes.
    pub reserved_bytes: AtomicU64,
    /// Most bytes that the store may take; `u64::MAX` is what the disk has.
    pub limit_bytes: AtomicU64,
    /// See [`Store::ask_before_deleting`].
    pub may_go: Mutex<Option<MayGo>>,
    state: Mutex<State>,
    folder_lock: Mutex<Option<File>>,
    temporary_names: AtomicU64,
}

impl std::fmt::Debug for Inner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Inner").field("layout", &self.layout).finish_non_exhaustive()
    }
}

#[derive(Debug)]
pub(crate) struct State {
    pub index: Index,
    /// Shards whose whole content this process has seen, with their stamps then.
    seen: BTreeMap<Hash, Stamp>,
    locks: HashMap<Hash, Arc<AsyncMutex<()>>>,
    /// How many times each shard is held, see [`Store::hold`].
    pub held: HashMap<Hash, usize>,
}

impl State {
    /// Notes that a shard is used now.
    fn touch(&mut self, hash: &Hash) {
        let clock = UNIX_EPOCH.elapsed().map_or(0, |t| t.as_millis() as u64);
        let last = self.index.used.values().max().copied().unwrap_or(0);
        self.index.used.insert(*hash, clock.max(last + 1));
    }
}

impl Store {
    /// Opens the store below `data_dir` (`blobs/` and `shards/`), creating what is missing and sweeping up what a
    /// crash left. Fails when another process holds the folder. Quick: no shard is read.
    pub fn open(data_dir: &Path) -> Result<Store, StoreError> {
        let layout = Layout::create(data_dir)?;
        let folder_lock = layout.lock()?;
        let index = Index::load(&layout);
        layout
            .sweep(|hash| index.offers.contains_key(hash))
            .map_err(|e| StoreError::io("sweep", &layout.blobs, e, 1))?;
        let state = State { index, seen: BTreeMap::new(), locks: HashMap::new(), held: HashMap::new() };
        let inner = Inner {
            layout,
            stop: CancellationToken::new(),
            tracker: TaskTracker::new(),
            reserved_bytes: AtomicU64::new(0),
            limit_bytes: AtomicU64::new(u64::MAX),
            may_go: Mutex::default(),
            state: Mutex::new(state),
            folder_lock: Mutex::new(Some(folder_lock)),
            temporary_names: AtomicU64::new(0),
        };
        Ok(Store { inner: Arc::new(inner) })
    }

    /// Serves a file from where it lies, without a copy. `progress(done, total)` counts bytes hashed. The offer
    /// survives a restart as long as the file's size and time of change stay; offering the same unchanged file again
    /// costs nothing.
    pub async fn offer(&self, path: &Path, mut progress: impl FnMut(u64, u64) + Send) -> Result<Offer, StoreError> {
        self.alive()?;
        let path = fs::canonicalize(path).map_err(|e| StoreError::io("find", path, e, 1))?;
        if path.to_str().is_none() {
            return Err(StoreError::PathNotText { path });
        }
        if let Some(offer) = self.offer_still_good(&path) {
            return Ok(offer);
        }
        let (store, file) = (self.clone(), path.clone());
        let (hash, stamp, temporary) =
            self.work(tree::total_bytes(&path), &mut progress, move |report| store.build_tree(&file, report)).await?;
        let _turn = self.turn(&hash).await;
        self.blocking(move |store| {
            store.place_tree(&temporary, &hash)?;
            store.update(|state| state.index.offers.insert(hash, Offered { path, stamp }))?;
            Ok(Offer { hash, bytes: stamp.bytes })
        })
        .await
    }

    /// Stops serving a file and forgets it; the file itself stays, delete it when you like. Transfers of it that are
    /// under way end when it is deleted or when they are done. Says whether it was offered.
    pub async fn withdraw(&self, hash: &Hash) -> Result<bool, StoreError> {
        self.alive()?;
        let hash = *hash;
        let _turn = self.turn(&hash).await;
        self.blocking(move |store| {
            let had = store.update(|state| state.index.offers.remove(&hash).is_some())?;
            store.drop_tree_if_unused(&hash)?;
            Ok(had)
        })
        .await
    }

    /// Path of an offered file, while its size and time of change are as they were.
    pub fn offered(&self, hash: &Hash) -> Option<PathBuf> {
        let offered = self.state().index.offers.get(hash).cloned()?;
        (Stamp::of(&offered.path).ok()? == offered.stamp).then_some(offered.path)
    }

    /// Hashes a finished file and moves it into `shards/`: from then on it is local and served, as if fetched. The
    /// file must lie on the data folder's file system, since a move must not become a copy.
    pub async fn adopt(&self, path: &Path, progress: impl FnMut(u64, u64) + Send) -> Result<Offer, StoreError> {
        self.adopt_noting(path, None, progress).await
    }

    /// The same; its hash is written to `note` before it is moved, so that a crash between the two loses nothing.
    pub(crate) async fn adopt_noting(
        &self,
        path: &Path,
        note: Option<PathBuf>,
        mut progress: impl FnMut(u64, u64) + Send,
    ) -> Result<Offer, StoreError> {
        self.alive()?;
        let path = path.to_path_buf();
        let (store, file) = (self.clone(), path.clone());
        let (hash, stamp, temporary) =
            self.work(tree::total_bytes(&path), &mut progress, move |report| store.build_tree(&file, report)).await?;
        let _turn = self.turn(&hash).await;
        self.blocking(move |store| {
            let shard = store.inner.layout.shard(&hash);
            store.place_tree(&temporary, &hash)?;
            if let Some(note) = note {
                fs::write(&note, hex(&hash)).map_err(|e| StoreError::io("write", &note, e, 1))?;
            }
            fs::rename(&path, &shard).map_err(|e| match e.kind() {
                io::ErrorKind::CrossesDevices => {
                    StoreError::OtherFileSystem { path: path.clone(), folder: store.inner.layout.shards.clone() }
                }
                _ => StoreError::io("move", &path, e, 1),
            })?;
            sync_folder(&store.inner.layout.shards).map_err(|e| StoreError::io("sync", &shard, e, 1))?;
            // What had arrived of it otherwise is not needed any more.
            for path in [store.inner.layout.partial(&hash), store.inner.layout.partial_tree(&hash)] {
                remove_if_there(&path).map_err(|e| StoreError::io("remove", &path, e, 1))?;
            }
            store.record(&hash, stamp)?;
            Ok(Offer { hash, bytes: stamp.bytes })
        })
        .await
    }

    /// A shard's path if it is complete and its size and time of change are as when it was verified. Cheap: one look
    /// at the file's metadata, so it does not notice a disk that rots; [`Store::local_verified`] does.
    pub fn local(&self, hash: &Hash) -> Option<PathBuf> {
        let verified = self.state().index.shards.get(hash).copied()?;
        let path = self.inner.layout.shard(hash);
        (Stamp::of(&path).ok()? == verified).then_some(path)
    }

    /// Like [`Store::local`], but the whole content has been hashed by this process at least once, and again after any
    /// change of size or time. A shard that does not match is taken out of `shards/` and `None` comes back: the next
    /// fetch repairs it by getting only its bad ranges. `progress(done, total)` counts bytes hashed; dropping the
    /// future ends the reading.
    pub async fn local_verified(
        &self,
        hash: &Hash,
        mut progress: impl FnMut(u64, u64) + Send,
    ) -> Result<Option<PathBuf>, StoreError> {
        self.alive()?;
        let turn = self.turn(hash).await;
        self.check(hash, false, &turn, &mut progress).await
    }

    /// Hashes the whole shard now, whatever was known of it. Otherwise like [`Store::local_verified`].
    pub async fn verify(&self, hash: &Hash) -> Result<Option<PathBuf>, StoreError> {
        self.alive()?;
        let turn = self.turn(hash).await;
        self.check(hash, true, &turn, &mut |_, _| {}).await
    }

    /// Deletes a shard, complete or partial; an offered file is left alone. Waits for a fetch of it that is under
    /// way. A process that has mapped the file keeps its pages until it lets go. Says whether there was anything.
    pub async fn remove(&self, hash: &Hash) -> Result<bool, StoreError> {
        self.alive()?;
        let hash = *hash;
        let _turn = self.turn(&hash).await;
        self.blocking(move |store| store.remove_files(&hash)).await
    }

    /// What [`Store::remove`] does; the caller holds the hash's turn.
    pub(crate) fn remove_files(&self, hash: &Hash) -> Result<bool, StoreError> {
        let layout = &self.inner.layout;
        let mut had = false;
        let files = [
            layout.shard(hash),
            layout.partial(hash),
            layout.partial_tree(hash),
            layout.assembly(hash),
            layout.assembly_done(hash),
        ];
        for path in files {
            had |= remove_if_there(&path).map_err(|e| StoreError::io("remove", &path, e, 1))?;
        }
        self.drop_tree_if_unused(hash)?;
        self.update(|state| {
            state.seen.remove(hash);
            state.index.used.remove(hash);
            state.index.shards.remove(hash)
        })?;
        Ok(had)
    }

    /// Complete shards whose files are as they were when verified, by hash.
    pub fn list(&self) -> Vec<Shard> {
        let known: Vec<(Hash, Stamp)> = self.state().index.shards.iter().map(|(hash, stamp)| (*hash, *stamp)).collect();
        let shard =
            |(hash, stamp): (Hash, Stamp)| self.local(&hash).map(|path| Shard { hash, bytes: stamp.bytes, path });
        known.into_iter().filter_map(shard).collect()
    }

    /// Disk space of the store in bytes, counted in blocks: shards, partials and trees, without offered files.
    pub fn bytes_used(&self) -> Result<u64, StoreError> {
        self.inner.layout.bytes_used().map_err(|e| StoreError::io("measure", &self.inner.layout.blobs, e, 1))
    }

    /// Ends transfers, waits until nothing writes any more and releases the folder. Partials stay resumable.
    pub async fn shutdown(&self) {
        self.inner.stop.cancel();
        self.inner.tracker.close();
        self.inner.tracker.wait().await;
        lock(&self.inner.folder_lock).take();
    }

    /// The file to serve for a hash: an offer, else a complete shard.
    pub(crate) fn source(&self, hash: &Hash) -> Option<Source> {
        let state = self.state();
        let layout = &self.inner.layout;
        let (path, stamp) = match state.index.offers.get(hash) {
            Some(offered) => (offered.path.clone(), offered.stamp),
            None => (layout.shard(hash), *state.index.shards.get(hash)?),
        };
        Some(Source { hash: *hash, path, tree_path: layout.tree(hash), stamp })
    }

    pub(crate) fn alive(&self) -> Result<(), StoreError> {
        if self.inner.stop.is_cancelled() { Err(StoreError::Closed) } else { Ok(()) }
    }

    /// Waits until nobody else works on this hash.
    pub(crate) async fn turn(&self, hash: &Hash) -> OwnedMutexGuard<()> {
        self.lock_of(hash).lock_owned().await
    }

    /// Like [`Store::turn`] where nobody works on this hash now.
    pub(crate) fn turn_now(&self, hash: &Hash) -> Option<OwnedMutexGuard<()>> {
        self.lock_of(hash).try_lock_owned().ok()
    }

    fn lock_of(&self, hash: &Hash) -> Arc<AsyncMutex<()>> {
        let mut state = self.state();
        state.locks.retain(|_, lock| Arc::strong_count(lock) > 1);
        Arc::clone(state.locks.entry(*hash).or_default())
    }

    /// The check behind [`Store::local_verified`]; the caller holds the hash's turn.
    pub(crate) async fn check(
        &self,
        hash: &Hash,
        always: bool,
        _turn: &OwnedMutexGuard<()>,
        progress: &mut (impl FnMut(u64, u64) + Send),
    ) -> Result<Option<PathBuf>, StoreError> {
        let path = self.inner.layout.shard(hash);
        let Ok(stamp) = Stamp::of(&path) else { return Ok(None) };
        let seen = self.state().seen.get(hash).copied();
        if !always && seen == Some(stamp) {
            let hash = *hash;
            // The order of use is a hint: that it could not be written must not stop who uses the shard.
            self.blocking(move |store| store.update(|state| state.touch(&hash))).await.ok();
            return Ok(Some(path));
        }
        let file = path.clone();
        let result = self.work(stamp.bytes, progress, move |report| tree::hash(&file, report)).await;
        let hash = *hash;
        match result {
            Ok((found, stamp)) if found == hash => {
                self.blocking(move |store| store.record(&hash, stamp)).await?;
                Ok(Some(path))
            }
            // An empty file is no shard either.
            Ok(_) | Err(StoreError::NotAFile { .. }) => {
                tracing::warn!(shard = %path.display(), "does not match its hash and is taken out of use");
                self.blocking(move |store| store.quarantine(&hash)).await?;
                Ok(None)
            }
            Err(e) => Err(e),
        }
    }

    /// Notes that a shard's whole content matched its hash.
    pub(crate) fn record(&self, hash: &Hash, stamp: Stamp) -> Result<(), StoreError> {
        self.update(|state| {
            state.seen.insert(*hash, stamp);
            state.index.shards.insert(*hash, stamp);
            state.touch(hash);
        })
    }

    /// Turns a shard that does not match into a partial, so that its good ranges are kept and the bad ones fetched.
    fn quarantine(&self, hash: &Hash) -> Result<(), StoreError> {
        self.update(|state| {
            state.seen.remove(hash);
            state.index.shards.remove(hash)
        })?;
        let layout = &self.inner.layout;
        let moved = fs::rename(layout.shard(hash), layout.partial(hash)).and_then(|()| {
            let offered = self.state().index.offers.contains_key(hash);
            let tree = (layout.tree(hash), layout.partial_tree(hash));
            match if offered { fs::copy(tree.0, tree.1).map(drop) } else { fs::rename(tree.0, tree.1) } {
                // Without its tree nothing of the file can be told good from bad; the fetch then gets all of it.
                Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
                other => other,
            }
        });
        moved.map_err(|e| StoreError::io("move", &layout.shard(hash), e, 1))
    }

    fn offer_still_good(&self, path: &Path) -> Option<Offer> {
        let stamp = Stamp::of(path).ok()?;
        let state = self.state();
        let (hash, _) = state.index.offers.iter().find(|(_, o)| o.path == path && o.stamp == stamp)?;
        self.inner.layout.tree(hash).exists().then_some(Offer { hash: *hash, bytes: stamp.bytes })
    }

    fn build_tree(&self, path: &Path, report: &Report) -> Result<(Hash, Stamp, Temporary), StoreError> {
        let number = self.inner.temporary_names.fetch_add(1, Ordering::Relaxed);
        let temporary = Temporary(self.inner.layout.blobs.join(format!("tree-{number}.tmp")));
        let (hash, stamp) = tree::build(path, &temporary.0, report)?;
        tracing::debug!(file = %path.display(), hash = %short(&hash), bytes = stamp.bytes, "hashed");
        Ok((hash, stamp, temporary))
    }

    fn place_tree(&self, temporary: &Temporary, hash: &Hash) -> Result<(), StoreError> {
        let target = self.inner.layout.tree(hash);
        fs::rename(&temporary.0, &target).map_err(|e| StoreError::io("write", &target, e, 1))
    }

    fn drop_tree_if_unused(&self, hash: &Hash) -> Result<(), StoreError> {
        let state = self.state();
        if state.index.offers.contains_key(hash) || self.inner.layout.shard(hash).exists() {
            return Ok(());
        }
        let tree = self.inner.layout.tree(hash);
        remove_if_there(&tree).map_err(|e| StoreError::io("remove", &tree, e, 1))?;
        Ok(())
    }

    /// Changes the state and writes the index, in that order: an index that could not be written is only out of date.
    fn update<T>(&self, change: impl FnOnce(&mut State) -> T) -> Result<T, StoreError> {
        let mut state = self.state();
        let result = change(&mut state);
        let layout = &self.inner.layout;
        state.index.save(layout).map_err(|e| StoreError::io("write", &layout.index(), e, 1))?;
        Ok(result)
    }

    pub(crate) fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.inner.state)
    }

    /// Short blocking work that runs to its end even if the caller goes away.
    pub(crate) async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Store) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, StoreError> {
        let store = self.clone();
        self.inner.tracker.spawn_blocking(move || work(&store)).await.unwrap_or(Err(StoreError::Closed))
    }

    /// Long blocking work with progress, which ends when the caller goes away or the store shuts down.
    pub(crate) async fn work<T: Send + 'static>(
        &self,
        total: u64,
        progress: &mut (impl FnMut(u64, u64) + Send),
        work: impl FnOnce(&Report) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, StoreError> {
        let (stop, token) = (self.inner.stop.clone(), self.inner.tracker.token());
        let work = move |report: &Report| {
            let _counted = token;
            work(report)
        };
        tree::run(move || stop.is_cancelled(), total, progress, work).await
    }
}

/// A temporary file that goes away unless it was renamed.
struct Temporary(PathBuf);

impl Drop for Temporary {
    fn drop(&mut self) {
        if let Err(e) = remove_if_there(&self.0) {
            tracing::debug!(file = %self.0.display(), error = %e, "left a temporary file behind");
        }
    }
}

/// The data behind these locks is replaced whole, so a panic elsewhere cannot leave it half-changed.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
