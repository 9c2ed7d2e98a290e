//! A shard that is still arriving: its data, its tree, and which ranges of it are verified.

use std::fs::{self, File};
use std::io;

use bao_tree::io::BaoContentItem;
use bao_tree::io::sync::{OutboardMut, WriteAt};
use bao_tree::{BaoTree, ChunkNum, ChunkRanges};
use tokio::sync::{OwnedMutexGuard, mpsc};

use crate::layout::{Layout, open_for_update, sync_folder};
use crate::tree::{BLOCK_SIZE, FileTree, all_chunks, file_tree, valid};
use crate::{Hash, StoreError};

/// Most separate ranges in one request. An interrupted transfer leaves one hole, a repaired shard a few; past this
/// the request is widened to one range, since a request has a bounded size and each range its own hashes.
const RANGES_MAX: usize = 1024;

/// Items between the network and the disk: 64 × 16 KiB is one MiB, enough to keep both busy.
pub(crate) const WRITE_QUEUE: usize = 64;

/// The files of a shard that is still arriving. Whoever has it holds the shard's lock.
#[derive(Debug)]
pub(crate) struct Partial {
    pub hash: Hash,
    pub bytes: u64,
    /// Bytes on the disk that match the hash. Ranges that came twice count twice, so it may pass `bytes`.
    pub have_bytes: u64,
    have: ChunkRanges,
    data: File,
    tree: FileTree,
    layout: Layout,
    _lock: OwnedMutexGuard<()>,
}

impl Partial {
    /// Opens or creates the files and hashes what is there. Blocking: reads everything that arrived so far.
    pub fn open(layout: &Layout, hash: &Hash, bytes: u64, lock: OwnedMutexGuard<()>) -> Result<Partial, StoreError> {
        let path = layout.partial(hash);
        let failed = |e| StoreError::io("open", &path, e, bytes);
        let data = open_for_update(&path).map_err(failed)?;
        if data.metadata().map_err(failed)?.len() > bytes {
            data.set_len(bytes).map_err(failed)?;
        }
        let tree_path = layout.partial_tree(hash);
        let tree_file = open_for_update(&tree_path).map_err(|e| StoreError::io("open", &tree_path, e, bytes))?;
        let tree = file_tree(hash, bytes, tree_file);
        let (have, have_bytes) = valid(&data, &tree).map_err(|e| StoreError::io("read", &path, e, bytes))?;
        Ok(Partial { hash: *hash, bytes, have_bytes, have, data, tree, layout: layout.clone(), _lock: lock })
    }

    /// Bytes of disk that a shard of this size takes: the file and its tree.
    pub fn disk_bytes(bytes: u64) -> u64 {
        bytes.saturating_add(BaoTree::new(bytes, BLOCK_SIZE).outboard_size())
    }

    /// The chunks to ask for.
    pub fn missing(&self) -> ChunkRanges {
        let missing = all_chunks(self.bytes) - &self.have;
        let boundaries = missing.boundaries();
        match boundaries.first() {
            Some(first) if boundaries.len() > 2 * RANGES_MAX => ChunkRanges::from(*first..ChunkNum::chunks(self.bytes)),
            _ => missing,
        }
    }

    /// Whether every chunk is there and verified.
    pub fn is_complete(&self) -> bool {
        self.missing().is_empty()
    }

    /// Writes what arrives until the sender hangs up. The items are verified: the decoder hands out nothing else.
    /// Gives itself back whatever happens, so that a retry need not hash the file again.
    pub fn receive(mut self, mut items: mpsc::Receiver<BaoContentItem>) -> (Partial, Result<(), StoreError>) {
        while let Some(item) = items.blocking_recv() {
            if let Err(e) = self.write(item) {
                let missing = self.bytes.saturating_sub(self.have_bytes);
                let error = StoreError::io("write", &self.layout.partial(&self.hash), e, missing);
                return (self, Err(error));
            }
        }
        (self, Ok(()))
    }

    fn write(&mut self, item: BaoContentItem) -> io::Result<()> {
        match item {
            BaoContentItem::Parent(parent) => self.tree.save(parent.node, &parent.pair),
            BaoContentItem::Leaf(leaf) => {
                self.data.write_all_at(leaf.offset, &leaf.data)?;
                let end = leaf.offset + leaf.data.len() as u64;
                self.have |= ChunkRanges::from(ChunkNum::full_chunks(leaf.offset)..ChunkNum::chunks(end));
                self.have_bytes += leaf.data.len() as u64;
                Ok(())
            }
        }
    }

    /// Moves the complete file into `shards/` and keeps its tree for serving. The rename is the moment from which the
    /// shard exists; a crash before it leaves a complete partial.
    pub fn finish(self) -> Result<OwnedMutexGuard<()>, StoreError> {
        let (layout, hash) = (&self.layout, &self.hash);
        let step = |result: io::Result<()>| result.map_err(|e| StoreError::io("finish", &layout.shard(hash), e, 1));
        step(self.data.sync_all())?;
        step(self.tree.data.sync_all())?;
        step(fs::rename(layout.partial_tree(hash), layout.tree(hash)))?;
        step(fs::rename(layout.partial(hash), layout.shard(hash)))?;
        step(sync_folder(&layout.blobs))?;
        step(sync_folder(&layout.shards))?;
        Ok(self._lock)
    }
}
