//! What can go wrong with shards: each message says what happened and what to do next.

use std::io;
use std::path::{Path, PathBuf};

use iroh::EndpointId;

use crate::remote::RemoteError;
use crate::{Hash, hex};

/// Why a shard could not be offered, fetched, kept or removed. Nothing unverified is ever left in `shards/`, and a
/// fetch that failed keeps the ranges that did verify.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StoreError {
    /// Another process holds the folder.
    #[error("The shard folder {} is in use by another Capstan process; stop that one or choose another --data-dir.", .folder.display())]
    Busy {
        /// The folder that is locked.
        folder: PathBuf,
    },
    /// The store was shut down.
    #[error("The shard store is shut down; start the node again.")]
    Closed,
    /// The path is no regular file, or an empty one.
    #[error("{} is not a file with content; give the path of a GGUF file.", .path.display())]
    NotAFile {
        /// What was given.
        path: PathBuf,
    },
    /// A path that cannot be written into the index.
    #[error("The path {} is not valid UTF-8; rename the file.", .path.display())]
    PathNotText {
        /// What was given.
        path: PathBuf,
    },
    /// The file changed while it was being read.
    #[error("{} changed while it was being read; wait until nothing writes to it and try again.", .path.display())]
    Changing {
        /// The file.
        path: PathBuf,
    },
    /// The operating system said no.
    #[error("Could not {action} {}: {source}.", .path.display())]
    Io {
        /// What was tried, as a verb: "read", "write".
        action: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// Not enough room for the shard.
    #[error(
        "The disk that holds {} is short of {missing_bytes} bytes ({} MiB): free that much or move the data folder \
         (--data-dir), then try again; what has arrived is kept.", .folder.display(), .missing_bytes.div_ceil(1 << 20)
    )]
    DiskFull {
        /// The folder that the shard goes to.
        folder: PathBuf,
        /// Bytes that are missing, at least.
        missing_bytes: u64,
    },
    /// The limit that the user set leaves too little room.
    #[error(
        "The store in {} may take {} MiB (disk_limit), which is short of {missing_bytes} bytes ({} MiB): raise the limit, or \
         remove a model (`capstan disk` shows what lies there), then try again; what has arrived is kept.",
        .folder.display(), .limit_bytes >> 20, .missing_bytes.div_ceil(1 << 20)
    )]
    OverLimit {
        /// The folder of the store.
        folder: PathBuf,
        /// The limit.
        limit_bytes: u64,
        /// Bytes that are missing, at least.
        missing_bytes: u64,
    },
    /// The source outside of the cluster failed.
    #[error("{source}; what has arrived is kept: repeat the same command, and it goes on from there.")]
    Outside {
        /// How.
        #[from]
        source: RemoteError,
    },
    /// Bytes of a model that are nowhere.
    #[error(
        "{what} cannot be put together: {missing_bytes} bytes of it are on no node that answers{reason}. Start the nodes \
         that have them (`capstan models` shows which), or pull the model again."
    )]
    Nowhere {
        /// The file.
        what: String,
        /// How much is missing.
        missing_bytes: u64,
        /// What the last source said, in brackets, or nothing.
        reason: String,
    },
    /// A part that is here can no longer be used.
    #[error("{} can no longer be used: {reason}; `capstan model verify` checks and mends it.", .path.display())]
    PartRotten {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// No node has the shard.
    #[error("No node has shard {} any more; load or pull the model again.", short(.hash))]
    NobodyHas {
        /// The shard.
        hash: Hash,
    },
    /// A file that does not exist here.
    #[error("There is no file {} here; repeat the pull.", short(.id))]
    NotHere {
        /// What was asked for.
        id: Hash,
    },
    /// A move that would be a copy.
    #[error("{} lies on another file system than {}; write it into the data folder first.", .path.display(), .folder.display())]
    OtherFileSystem {
        /// The file to adopt.
        path: PathBuf,
        /// The folder it should be moved to.
        folder: PathBuf,
    },
    /// No connection to the node that has the shard.
    #[error("Node {} cannot be reached ({reason}); check that it is up and that its address is right.", .node.fmt_short())]
    Unreachable {
        /// The source.
        node: EndpointId,
        /// What the network said.
        reason: String,
    },
    /// The connection broke or went silent.
    #[error(
        "Node {} was lost while it sent a shard ({reason}); start it again and repeat the load, which goes on where it \
         stopped.", .node.fmt_short()
    )]
    SourceLost {
        /// The source.
        node: EndpointId,
        /// What the network said.
        reason: String,
    },
    /// The source does not talk to this node.
    #[error("Node {} refused to send a shard: {reason}.", .node.fmt_short())]
    Refused {
        /// The source.
        node: EndpointId,
        /// What it said.
        reason: String,
    },
    /// The source does not have the shard (any more).
    #[error("Node {} does not offer shard {}; load the model again.", .node.fmt_short(), short(.hash))]
    NotOffered {
        /// The source.
        node: EndpointId,
        /// The shard.
        hash: Hash,
    },
    /// The file changed or cannot be read on the source's disk.
    #[error("Node {} can no longer send shard {}: {reason}.", .node.fmt_short(), short(.hash))]
    SourceChanged {
        /// The source.
        node: EndpointId,
        /// The shard.
        hash: Hash,
        /// Which file, and what is wrong with it, in the source's words.
        reason: String,
    },
    /// The source sent something else.
    #[error(
        "Node {} sent data that is not shard {}; none of it was kept. Check the memory and disk of that machine, then \
         load the model again.", .node.fmt_short(), short(.hash)
    )]
    Corrupt {
        /// The source.
        node: EndpointId,
        /// The shard.
        hash: Hash,
    },
    /// A size that no shard has.
    #[error("Shard {} was announced with {bytes} bytes, which no shard has; load the model again.", short(.hash))]
    BadSize {
        /// The shard.
        hash: Hash,
        /// What the caller asked for.
        bytes: u64,
    },
    /// Announced and true size differ.
    #[error("Shard {} was announced with {expected_bytes} bytes but has {actual_bytes}; load the model again.", short(.hash))]
    WrongSize {
        /// The shard.
        hash: Hash,
        /// What the caller asked for.
        expected_bytes: u64,
        /// What there is.
        actual_bytes: u64,
    },
}

impl StoreError {
    /// Whether calling `fetch` again as it is may help: the network failed, not the content, the rules or the disk.
    pub fn is_retryable(&self) -> bool {
        matches!(self, Self::Unreachable { .. } | Self::SourceLost { .. })
    }

    /// An I/O error with its file; a full disk becomes [`StoreError::DiskFull`] with `still_missing` bytes.
    pub(crate) fn io(action: &'static str, path: &Path, source: io::Error, still_missing: u64) -> Self {
        if is_disk_full(&source) {
            let folder = path.parent().unwrap_or(path).to_path_buf();
            return Self::DiskFull { folder, missing_bytes: still_missing.max(1) };
        }
        Self::Io { action, path: path.to_path_buf(), source }
    }
}

/// Whether the system said that there is no room: a full file system or a used-up quota.
fn is_disk_full(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}

/// The first digits of a hash: enough for a person to tell shards apart.
pub(crate) fn short(hash: &Hash) -> String {
    let mut text = hex(hash);
    text.truncate(10);
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_disk_is_told_from_other_errors() {
        let file = Path::new("/data/blobs/x.partial");
        let full = StoreError::io("write", file, io::Error::from(io::ErrorKind::StorageFull), 5 << 20);
        assert!(matches!(&full, StoreError::DiskFull { missing_bytes, .. } if *missing_bytes == 5 << 20));
        assert!(full.to_string().contains("/data/blobs") && full.to_string().contains("5 MiB"), "{full}");
        let denied = StoreError::io("write", file, io::Error::from(io::ErrorKind::PermissionDenied), 1);
        assert!(matches!(denied, StoreError::Io { .. }));
    }
}
