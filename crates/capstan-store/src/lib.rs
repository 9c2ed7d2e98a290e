//! Holds shards on a node's disk and moves them between nodes, verified range by range and resumable.
//!
//! The wire is the iroh-blobs protocol: a shard is named by its BLAKE3 hash, and every 16 KiB that arrive are checked
//! against the hash tree before they touch the disk. The disk is laid out so that a shard is there exactly once:
//!
//! ```text
//! <data>/blobs/index.json             which files were verified, and their size and time of change
//! <data>/blobs/lock                   one process a folder
//! <data>/blobs/<hash>.tree            hash tree of a shard that can be served (0.4 % of its size)
//! <data>/blobs/<hash>.partial         what has arrived of a shard so far, with its <hash>.partial-tree
//! <data>/blobs/<id>.assembly          a file that is put together, with <id>.assembly-done, which of it is there, and
//!                                     afterwards <id>.assembled, what it has become
//! <data>/shards/<hash>.gguf           complete, verified shards and nothing else, for llama.cpp to map
//! ```
//!
//! A fetch writes into `.partial` and renames the file into `shards/` when every range has been verified: no second
//! copy, and nothing half-written is ever visible there. What a partial holds is found out by hashing it against its
//! tree, so a crash at any moment costs only the last unverified ranges. The data store that comes with iroh-blobs
//! is not used: it deletes only by a periodic sweep and keeps the truth in a database beside the files, where a crash
//! between the two needs repair; here the files are the truth.
//!
//! | module | idea |
//! |---|---|
//! | `store` | what a node holds: offer, adopt, look up, verify, remove |
//! | `fetch` | get a shard from another node, resuming |
//! | `serve` | answer other nodes, read-only, members only |
//! | `partial` | a shard that is still arriving |
//! | `assembly` | a file put together from bytes in parts here, in parts elsewhere, and at the source |
//! | [`sha256`] | a SHA-256 that is handed on from node to node |
//! | `room` | which shards are in use, which go when the disk is full, and the limit |
//! | `tree` | hash trees: build, read a file against, encode from |
//! | [`remote`] | models at a URL or on Hugging Face, by ranges |
//! | `index` | the small file that remembers what was verified |
//! | `ranges` | a set of byte ranges |
//! | `layout` | paths, free space, file stamps, the lock |
//! | `error` | what can go wrong, as sentences |
#![forbid(unsafe_code)]

mod assembly;
mod error;
mod fetch;
mod index;
mod layout;
mod partial;
mod ranges;
pub mod remote;
mod room;
mod serve;
pub mod sha256;
mod store;
mod tree;

use std::path::PathBuf;

pub use assembly::{AssemblyProgress, Sources, assembly_id};
pub use error::StoreError;
pub use room::Hold;
pub use serve::{BLOBS_ALPN, ShardProtocol};
pub use store::Store;
pub use tree::hash_file;

/// BLAKE3 hash of a file's whole content: a shard's name everywhere.
pub type Hash = [u8; 32];

/// A file that this node serves: what another node needs to fetch it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Offer {
    /// BLAKE3 hash of the content.
    pub hash: Hash,
    /// Length of the file in bytes.
    pub bytes: u64,
}

/// A complete shard in this node's `shards/` folder.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shard {
    /// BLAKE3 hash of the content.
    pub hash: Hash,
    /// Length of the file in bytes.
    pub bytes: u64,
    /// Where it lies, ready to be mapped.
    pub path: PathBuf,
}

/// The hash as 64 lower-case hexadecimal digits, as in file names.
pub fn hex(hash: &Hash) -> String {
    ::hex::encode(hash)
}

/// The opposite of [`hex()`]; `None` for anything but 64 hexadecimal digits.
pub fn parse_hex(text: &str) -> Option<Hash> {
    let mut hash = Hash::default();
    ::hex::decode_to_slice(text, &mut hash).ok()?;
    Some(hash)
}
