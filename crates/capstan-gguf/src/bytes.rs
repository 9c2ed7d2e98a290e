//! A file's bytes, memory-mapped through a crate with a safe interface; the one place that knows how.
//!
//! The mapping is read-only and private to this process. As with every mapping, another program that truncates the file
//! while it is open ends this process with SIGBUS; models are replaced by renaming, not by writing into them.
use std::fs::File;
use std::ops::Deref;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use mmap_io::{MemoryMappedFile, MmapMode};

use crate::GgufError;

/// The bytes of one file, cheap to clone, shared between threads.
#[derive(Clone)]
pub struct FileBytes(Arc<Inner>);

struct Inner {
    path: PathBuf,
    backing: Backing,
}

enum Backing {
    // The second handle is for copy_file_range; the mapping keeps its own to itself.
    Map(MemoryMappedFile, File),
    Memory(Vec<u8>),
    // The beginning of a file that is elsewhere, and how long it is there.
    Head(Vec<u8>, u64),
}

impl FileBytes {
    /// Map a regular file. An empty file has no bytes.
    pub fn open(path: &Path) -> Result<Self, GgufError> {
        let file = File::open(path).map_err(GgufError::io(path, "open"))?;
        let meta = file.metadata().map_err(GgufError::io(path, "read"))?;
        if !meta.is_file() {
            let what = std::io::Error::new(std::io::ErrorKind::InvalidInput, "it is not a regular file");
            return Err(GgufError::io(path, "open")(what));
        }
        let backing = if meta.len() == 0 {
            Backing::Memory(Vec::new())
        } else {
            let second = file.try_clone().map_err(GgufError::io(path, "open"))?;
            let map = MemoryMappedFile::from_file(file, MmapMode::ReadOnly, path)
                .map_err(|e| GgufError::io(path, "map")(std::io::Error::other(e.to_string())))?;
            Backing::Map(map, second)
        };
        Ok(Self(Arc::new(Inner { path: path.to_owned(), backing })))
    }

    /// Bytes that are already in memory, under a name for messages.
    pub fn from_memory(path: &Path, bytes: Vec<u8>) -> Self {
        Self(Arc::new(Inner { path: path.to_owned(), backing: Backing::Memory(bytes) }))
    }

    /// The first bytes of a file of `file_len` bytes that is elsewhere, under a name for messages.
    pub fn from_head(path: &Path, head: Vec<u8>, file_len: u64) -> Self {
        Self(Arc::new(Inner { path: path.to_owned(), backing: Backing::Head(head, file_len) }))
    }

    /// How long the file is, whether or not all of it is here.
    pub fn file_len(&self) -> u64 {
        match &self.0.backing {
            Backing::Head(_, len) => *len,
            _ => self.len() as u64,
        }
    }

    /// Where they come from.
    pub fn path(&self) -> &Path {
        &self.0.path
    }

    /// The open file behind the mapping, for copies that never enter this process.
    pub(crate) fn file(&self) -> Option<&File> {
        match &self.0.backing {
            Backing::Map(_, file) => Some(file),
            Backing::Memory(_) | Backing::Head(..) => None,
        }
    }

    /// `len` bytes from `offset`, or none when they are not all there.
    pub fn slice(&self, offset: u64, len: u64) -> Option<&[u8]> {
        let start = usize::try_from(offset).ok()?;
        self.get(start..start.checked_add(usize::try_from(len).ok()?)?)
    }
}

impl Deref for FileBytes {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        match &self.0.backing {
            // A read-only mapping of a whole file always has its whole length.
            Backing::Map(map, _) => map.as_slice_bytes(0, map.len()).unwrap_or_default(),
            Backing::Memory(bytes) | Backing::Head(bytes, _) => bytes,
        }
    }
}

impl std::fmt::Debug for FileBytes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "FileBytes({}, {} bytes)", self.0.path.display(), self.len())
    }
}
