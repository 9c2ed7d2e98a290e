//! Where things lie on the disk, how much room there is, and how a changed file is recognised.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::{Hash, StoreError, hex, parse_hex};

/// The paths below one data folder.
#[derive(Debug, Clone)]
pub(crate) struct Layout {
    pub blobs: PathBuf,
    pub shards: PathBuf,
}

impl Layout {
    /// Creates the folders.
    pub fn create(data_dir: &Path) -> Result<Layout, StoreError> {
        let data_dir = std::path::absolute(data_dir).map_err(|e| StoreError::io("find", data_dir, e, 1))?;
        let layout = Layout { blobs: data_dir.join("blobs"), shards: data_dir.join("shards") };
        for folder in [&layout.blobs, &layout.shards] {
            fs::create_dir_all(folder).map_err(|e| StoreError::io("create", folder, e, 1))?;
        }
        Ok(layout)
    }

    /// Takes the folder for this process; the lock ends with the returned file.
    pub fn lock(&self) -> Result<File, StoreError> {
        let path = self.blobs.join("lock");
        let file = open_for_update(&path).map_err(|e| StoreError::io("open", &path, e, 1))?;
        match file.try_lock() {
            Ok(()) => Ok(file),
            Err(TryLockError::WouldBlock) => Err(StoreError::Busy { folder: self.blobs.clone() }),
            Err(TryLockError::Error(e)) => Err(StoreError::io("lock", &path, e, 1)),
        }
    }

    pub fn index(&self) -> PathBuf {
        self.blobs.join("index.json")
    }

    pub fn tree(&self, hash: &Hash) -> PathBuf {
        self.blobs.join(format!("{}.tree", hex(hash)))
    }

    pub fn partial(&self, hash: &Hash) -> PathBuf {
        self.blobs.join(format!("{}.partial", hex(hash)))
    }

    pub fn partial_tree(&self, hash: &Hash) -> PathBuf {
        self.blobs.join(format!("{}.partial-tree", hex(hash)))
    }

    /// A file that is being put together, by the name of what was asked for.
    pub fn assembly(&self, id: &Hash) -> PathBuf {
        self.blobs.join(format!("{}.assembly", hex(id)))
    }

    /// Which of its bytes are there.
    pub fn assembly_done(&self, id: &Hash) -> PathBuf {
        self.blobs.join(format!("{}.assembly-done", hex(id)))
    }

    /// Which shard it has become.
    pub fn assembled(&self, id: &Hash) -> PathBuf {
        self.blobs.join(format!("{}.assembled", hex(id)))
    }

    pub fn shard(&self, hash: &Hash) -> PathBuf {
        self.shards.join(format!("{}.gguf", hex(hash)))
    }

    /// The shard that something put together has become, if it is there.
    pub fn became(&self, id: &Hash) -> Option<Hash> {
        let text = fs::read_to_string(self.assembled(id)).ok()?;
        parse_hex(text.trim()).filter(|hash| self.shard(hash).exists())
    }

    /// Removes what a crash may have left in `blobs/`: unfinished files, and trees whose file is neither offered nor
    /// in `shards/`. Partials stay, they are worth resuming.
    pub fn sweep(&self, offered: impl Fn(&Hash) -> bool) -> io::Result<()> {
        for entry in fs::read_dir(&self.blobs)? {
            let path = entry?.path();
            let hash = path.file_stem().and_then(|stem| stem.to_str()).and_then(parse_hex);
            let stale = match path.extension().and_then(|extension| extension.to_str()) {
                Some("tmp") => true,
                Some("tree") => hash.is_some_and(|hash| !offered(&hash) && !self.shard(&hash).exists()),
                Some("partial-tree") => hash.is_some_and(|hash| !self.partial(&hash).exists()),
                Some("assembly-done") => hash.is_some_and(|id| !self.assembly(&id).exists()),
                Some("assembled") => hash.is_some_and(|id| self.became(&id).is_none()),
                _ => false,
            };
            if stale {
                fs::remove_file(&path)?;
            }
        }
        Ok(())
    }

    /// Disk space of both folders in bytes, counted in blocks, so that holes in a partial do not count.
    pub fn bytes_used(&self) -> io::Result<u64> {
        let mut bytes = 0;
        for folder in [&self.blobs, &self.shards] {
            for entry in fs::read_dir(folder)? {
                match entry?.metadata() {
                    Ok(metadata) => bytes += blocks_bytes(&metadata),
                    Err(e) if e.kind() == io::ErrorKind::NotFound => {}
                    Err(e) => return Err(e),
                }
            }
        }
        Ok(bytes)
    }
}

/// Size and time of change of a file: the cheap sign that its content is still what was verified.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Stamp {
    pub bytes: u64,
    pub modified_s: i64,
    pub modified_ns: i64,
}

impl Stamp {
    /// The file's stamp now; an error when it is gone or is no regular file.
    pub fn of(path: &Path) -> io::Result<Stamp> {
        let metadata = fs::metadata(path)?;
        if !metadata.is_file() {
            return Err(io::Error::from(io::ErrorKind::InvalidInput));
        }
        Ok(Stamp { bytes: metadata.len(), modified_s: metadata.mtime(), modified_ns: metadata.mtime_nsec() })
    }
}

/// Opens for reading and writing, creates if need be, never truncates.
pub(crate) fn open_for_update(path: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path)
}

/// Removes a file and says whether there was one.
pub(crate) fn remove_if_there(path: &Path) -> io::Result<bool> {
    match fs::remove_file(path) {
        Ok(()) => Ok(true),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(e) => Err(e),
    }
}

/// Makes renames in a folder survive a power cut.
pub(crate) fn sync_folder(folder: &Path) -> io::Result<()> {
    File::open(folder)?.sync_all()
}

/// Bytes that a process without privileges may still write on the folder's file system.
pub(crate) fn free_bytes(folder: &Path) -> io::Result<u64> {
    let stat = rustix::fs::statvfs(folder)?;
    Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
}

/// What a file occupies on the disk, in bytes; zero for one that is not there.
pub(crate) fn occupied_bytes(path: &Path) -> u64 {
    fs::metadata(path).map(|metadata| blocks_bytes(&metadata)).unwrap_or(0)
}

fn blocks_bytes(metadata: &fs::Metadata) -> u64 {
    // POSIX counts st_blocks in units of 512 bytes, whatever the file system's own block size is.
    metadata.blocks() * 512
}
