//! Hash trees over files: build one, find what of a file is valid, encode ranges of it for another node.

use std::fs::File;
use std::io::{self, BufReader, Read, Write};
use std::path::{Path, PathBuf};

use bao_tree::io::EncodeError;
use bao_tree::io::outboard::PreOrderOutboard;
use bao_tree::io::sync::{encode_ranges_validated, outboard, valid_ranges};
use bao_tree::{BaoTree, BlockSize, ChunkNum, ChunkRanges};
use tokio::sync::watch;

use crate::layout::Stamp;
use crate::{Hash, StoreError};

/// The protocol's grain: 2^4 BLAKE3 chunks of 1 KiB. A range is verified and kept in units of these 16 KiB.
pub(crate) const BLOCK_SIZE: BlockSize = iroh_blobs::store::IROH_BLOCK_SIZE;

/// Bytes read at once when a file is hashed: large enough for the disk and for BLAKE3's widest vectors.
const READ_BYTES: usize = 1 << 20;

/// Bytes between two reports of progress.
pub(crate) const PROGRESS_STEP_BYTES: u64 = 1 << 20;

/// A hash tree that lies in a file.
pub(crate) type FileTree = PreOrderOutboard<File>;

/// The tree of a file of `bytes` bytes, with the hash pairs in `data`.
pub(crate) fn file_tree(hash: &Hash, bytes: u64, data: File) -> FileTree {
    PreOrderOutboard { root: blake3::Hash::from_bytes(*hash), tree: BaoTree::new(bytes, BLOCK_SIZE), data }
}

/// Every chunk of a file of `bytes` bytes.
pub(crate) fn all_chunks(bytes: u64) -> ChunkRanges {
    ChunkRanges::from(ChunkNum(0)..ChunkNum::chunks(bytes))
}

/// Reads the file once, writes its hash tree to `tree_path`, returns its hash. Fails when the file changes meanwhile.
pub(crate) fn build(path: &Path, tree_path: &Path, report: &Report) -> Result<(Hash, Stamp), StoreError> {
    let (file, stamp) = open_stamped(path)?;
    let tree_file = File::create(tree_path).map_err(|e| StoreError::io("write", tree_path, e, stamp.bytes >> 8))?;
    let mut tree = file_tree(&Hash::default(), stamp.bytes, tree_file);
    let reader = BufReader::with_capacity(READ_BYTES, Counting { inner: file, done: 0, report });
    let geometry = tree.tree;
    let root = outboard(reader, geometry, &mut tree).map_err(|e| match e.kind() {
        _ if report.is_stopped() => StoreError::Closed,
        io::ErrorKind::UnexpectedEof => StoreError::Changing { path: path.to_path_buf() },
        io::ErrorKind::StorageFull => StoreError::io("write", tree_path, e, stamp.bytes >> 8),
        _ => StoreError::io("read", path, e, 1),
    })?;
    tree.data.sync_all().map_err(|e| StoreError::io("write", tree_path, e, stamp.bytes >> 8))?;
    unchanged(path, stamp)?;
    Ok((*root.as_bytes(), stamp))
}

/// Hashes a whole file without building a tree.
pub(crate) fn hash(path: &Path, report: &Report) -> Result<(Hash, Stamp), StoreError> {
    let (file, stamp) = open_stamped(path)?;
    let mut reader = Counting { inner: file, done: 0, report };
    let mut hasher = blake3::Hasher::new();
    let mut buffer = vec![0; READ_BYTES];
    loop {
        match reader.read(&mut buffer) {
            Ok(0) => break,
            Ok(n) => _ = hasher.update(&buffer[..n]),
            Err(_) if report.is_stopped() => return Err(StoreError::Closed),
            Err(e) => return Err(StoreError::io("read", path, e, 1)),
        }
    }
    unchanged(path, stamp)?;
    Ok((*hasher.finalize().as_bytes(), stamp))
}

fn open_stamped(path: &Path) -> Result<(File, Stamp), StoreError> {
    let stamp = Stamp::of(path).map_err(|e| match e.kind() {
        io::ErrorKind::InvalidInput => StoreError::NotAFile { path: path.to_path_buf() },
        _ => StoreError::io("read", path, e, 1),
    })?;
    if stamp.bytes == 0 {
        return Err(StoreError::NotAFile { path: path.to_path_buf() });
    }
    let file = File::open(path).map_err(|e| StoreError::io("open", path, e, 1))?;
    Ok((file, stamp))
}

fn unchanged(path: &Path, before: Stamp) -> Result<(), StoreError> {
    match Stamp::of(path) {
        Ok(after) if after == before => Ok(()),
        _ => Err(StoreError::Changing { path: path.to_path_buf() }),
    }
}

/// BLAKE3 hash of a file. `progress(done, total)` in bytes is called on the caller's task; dropping the future stops
/// the reading.
pub async fn hash_file(path: &Path, mut progress: impl FnMut(u64, u64) + Send) -> Result<Hash, StoreError> {
    let path = path.to_path_buf();
    let total = total_bytes(&path);
    let (hash, _) = run(|| false, total, &mut progress, move |report| hash(&path, report)).await?;
    Ok(hash)
}

/// Length of a file for a progress bar: zero when it cannot be told, the work itself then says why.
pub(crate) fn total_bytes(path: &Path) -> u64 {
    std::fs::metadata(path).map(|metadata| metadata.len()).unwrap_or(0)
}

/// What of a partial file is already right: the valid chunks and how many bytes they are. Reads only where the tree
/// has entries, so an empty partial costs nothing.
pub(crate) fn valid(data: &File, tree: &FileTree) -> io::Result<(ChunkRanges, u64)> {
    let bytes = tree.tree.size();
    let mut ranges = ChunkRanges::empty();
    let mut valid_bytes = 0;
    let wanted = all_chunks(bytes);
    for range in valid_ranges(tree, data, &wanted) {
        let range = range?;
        valid_bytes += range.end.to_bytes().min(bytes) - range.start.to_bytes().min(bytes);
        ranges |= ChunkRanges::from(range);
    }
    Ok((ranges, valid_bytes))
}

/// Which of the wanted chunks are right. Reads only these.
pub(crate) fn valid_in(data: &File, tree: &FileTree, wanted: &ChunkRanges) -> io::Result<ChunkRanges> {
    let mut right = ChunkRanges::empty();
    for range in valid_ranges(tree, data, wanted) {
        right |= ChunkRanges::from(range?);
    }
    Ok(right)
}

/// A file that may be served: data, tree, and the stamp it had when the tree was built.
#[derive(Debug, Clone)]
pub(crate) struct Source {
    pub hash: Hash,
    pub path: PathBuf,
    pub tree_path: PathBuf,
    pub stamp: Stamp,
}

impl Source {
    /// What is wrong with the file, if its size or time of change differ from when it was hashed.
    pub fn problem(&self) -> Option<String> {
        match Stamp::of(&self.path) {
            Ok(stamp) if stamp == self.stamp => None,
            Ok(_) => Some(self.changed()),
            Err(e) => {
                Some(format!("the file {} cannot be read any more ({e}); load the model again", self.path.display()))
            }
        }
    }

    /// Writes the size and the verified encoding of the ranges. Nothing that does not match the hash is written.
    pub fn encode(&self, ranges: &ChunkRanges, mut out: impl Write) -> Result<(), EncodeFailure> {
        let open = |path: &Path| {
            File::open(path).map_err(|e| {
                EncodeFailure::Source(format!(
                    "the file {} cannot be opened ({e}); load the model again",
                    path.display()
                ))
            })
        };
        let data = open(&self.path)?;
        let tree = file_tree(&self.hash, self.stamp.bytes, open(&self.tree_path)?);
        out.write_all(&self.stamp.bytes.to_le_bytes()).map_err(|_| EncodeFailure::Receiver)?;
        let mut out = Marked { inner: out, failed: false };
        let result = encode_ranges_validated(&data, &tree, ranges, &mut out);
        if out.failed {
            return Err(EncodeFailure::Receiver);
        }
        result.and_then(|()| out.flush().map_err(EncodeError::Io)).map_err(|e| {
            EncodeFailure::Source(match e {
                EncodeError::LeafHashMismatch(_) => self.changed(),
                EncodeError::ParentHashMismatch(_) => {
                    format!("the hash tree {} is damaged; load the model again", self.tree_path.display())
                }
                EncodeError::Io(e) if e.kind() == io::ErrorKind::UnexpectedEof => self.changed(),
                other => format!("the file {} cannot be read ({other}); check its disk", self.path.display()),
            })
        })
    }

    fn changed(&self) -> String {
        format!(
            "the file {} changed on that node's disk after it was offered; load the model again",
            self.path.display()
        )
    }
}

/// Why ranges could not be encoded.
#[derive(Debug)]
pub(crate) enum EncodeFailure {
    /// The file is no longer what was offered; the sentence goes to the other side.
    Source(String),
    /// Nobody takes the data any more.
    Receiver,
}

/// Tells a writer that failed from a reader that failed: both arrive as the same kind of error.
struct Marked<W> {
    inner: W,
    failed: bool,
}

impl<W: Write> Write for Marked<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.inner.write(bytes).inspect_err(|_| self.failed = true)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush().inspect_err(|_| self.failed = true)
    }
}

/// Where blocking work says how far it is, and learns that nobody waits for it any more.
pub(crate) struct Report {
    done: watch::Sender<u64>,
    stopped: Box<dyn Fn() -> bool + Send>,
}

impl Report {
    pub(crate) fn is_stopped(&self) -> bool {
        self.done.is_closed() || (self.stopped)()
    }
}

/// A reader that reports its progress, and fails when told to stop.
struct Counting<'a> {
    inner: File,
    done: u64,
    report: &'a Report,
}

impl Read for Counting<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let n = self.inner.read(buffer)?;
        let before = self.done;
        self.done += n as u64;
        if n == 0 || before / PROGRESS_STEP_BYTES != self.done / PROGRESS_STEP_BYTES {
            self.report.done.send_replace(self.done);
            if self.report.is_stopped() {
                // Not `Interrupted`: readers take that as "try again".
                return Err(io::Error::other("stopped"));
            }
        }
        Ok(n)
    }
}

/// Runs blocking work on its own thread and reports its progress on the caller's task. Dropping the future stops it.
pub(crate) async fn run<T: Send + 'static>(
    stopped: impl Fn() -> bool + Send + 'static,
    total: u64,
    progress: &mut (impl FnMut(u64, u64) + Send),
    work: impl FnOnce(&Report) -> Result<T, StoreError> + Send + 'static,
) -> Result<T, StoreError> {
    let (done, mut seen) = watch::channel(0);
    let report = Report { done, stopped: Box::new(stopped) };
    let mut task = tokio::task::spawn_blocking(move || work(&report));
    let result = loop {
        tokio::select! {
            result = &mut task => break result,
            Ok(()) = seen.changed() => {
                let done = *seen.borrow_and_update();
                progress(done, total.max(done));
            }
        }
    };
    // The work does not panic and is never aborted; a runtime that shuts down under us is the one cause left.
    let value = result.unwrap_or(Err(StoreError::Closed))?;
    progress(total, total);
    Ok(value)
}
