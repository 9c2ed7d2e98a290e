//! Models that were pulled: what they are made of, who has which parts, and the messages by which parts move.
//!
//! A model's bytes are named in one way everywhere: a place in one of its original files ([`Span`]). A *part* is a file
//! of Capstan's store that holds some of these bytes in another order: an original file, the shard of a layer range, or
//! the model's head. Whoever needs a file writes down where each of its bytes is in the original ([`Piece`]); anything
//! that holds those bytes, a part of any shape on any node or the source itself, can then supply them.
mod people;

use serde::{Deserialize, Serialize};

use crate::control::OutOfBounds;
use crate::limits::{LAYERS_MAX, NAME_BYTES_MAX};
pub use crate::weights::people::*;
use crate::{ClusterId, ContentHash, LayerRange, ModelId, NodeId};

/// Most models of a cluster's catalogue, removed ones included.
pub const RECORDS_MAX: usize = 1024;
/// Most files of a model: as many as a split GGUF may have.
pub const FILES_MAX: usize = 1024;
/// Most parts of a model: shards of several placements, as fine as its layers.
pub const PARTS_MAX: usize = 8 * LAYERS_MAX as usize;
/// Most pieces of a file that is put together: a shard of 128 layers with 512 separate experts each has 200,000, and
/// each takes some 15 bytes of a message.
pub const PIECES_MAX: usize = 1 << 18;
/// Longest address, path or revision, in bytes.
pub const TEXT_BYTES_MAX: usize = 4096;
/// Most parts that a node holds: the models of a catalogue in shards.
pub const HELD_MAX: usize = 1 << 16;
/// Most copies of each layer that can be asked for.
pub const REPLICAS_MAX: u16 = 16;
/// Copies of each layer on disk where the user says nothing: one node may be lost.
pub const REPLICAS_DEFAULT: u16 = 2;

/// Bytes of one of a model's original files.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Span {
    /// Which file.
    pub file: u16,
    /// Where they begin.
    pub from: u64,
    /// How many there are.
    pub bytes: u64,
}

/// Bytes of a file that is put together, and where they are in the original.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Piece {
    /// Which original file.
    pub file: u16,
    /// Where they begin there.
    pub from: u64,
    /// Where they begin here.
    pub to: u64,
    /// How many there are.
    pub bytes: u64,
}

impl Piece {
    /// The end in the original.
    pub fn from_end(&self) -> u64 {
        self.from.saturating_add(self.bytes)
    }
}

/// An original file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileRecord {
    /// Its name in its repository, or its path.
    pub path: String,
    /// Size in bytes.
    pub bytes: u64,
    /// SHA-256 that the source states and that was verified.
    pub sha256: Option<ContentHash>,
    /// Where it can be read; none where it is a file of a node.
    pub url: Option<String>,
    /// The server is the hub, which may know us by a token.
    pub on_hub: bool,
    /// What the server calls this version of the file, where it says so.
    pub etag: Option<String>,
}

/// What a part holds.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PartKind {
    /// An original file, whole.
    File(u16),
    /// The shard of a layer range.
    Layers(LayerRange),
    /// These bytes one after the other: the beginnings of all files, which hold the header, and small tensors that every
    /// shard has.
    Head(Vec<Span>),
    /// The same for bytes that are in no shard.
    Rest(Vec<Span>),
}

/// A file of the store that holds bytes of a model.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Part {
    /// BLAKE3 of its content.
    pub hash: ContentHash,
    /// Size in bytes.
    pub bytes: u64,
    /// What it holds.
    pub kind: PartKind,
}

/// An exact version of a model that is in the catalogue.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ModelRecord {
    /// Which.
    pub id: ModelId,
    /// What it is called; unique in the catalogue.
    pub name: String,
    /// Where it came from, as a user would write it, without the revision.
    pub source: String,
    /// The commit that it was pinned to; none where the source has none.
    pub revision: Option<String>,
    /// Architecture.
    pub architecture: String,
    /// Layers in all.
    pub layers: u32,
    /// Its files, the first part first.
    pub files: Vec<FileRecord>,
    /// What it is kept in.
    pub parts: Vec<Part>,
    /// How many nodes are to have a copy of each layer.
    pub replicas: u16,
    /// When it came into the catalogue, in seconds since 1970.
    pub created_unix_s: u64,
    /// Grows with every change of what is not a part.
    pub stamp: u64,
    /// It was removed; the record stays so that an older one cannot bring it back.
    pub removed: bool,
}

impl ModelRecord {
    /// Bytes of all original files.
    pub fn bytes(&self) -> u64 {
        self.files.iter().map(|f| f.bytes).fold(0, u64::saturating_add)
    }

    /// Takes in what another node knows of it: all parts of both, and the rest from whichever changed last. Says whether
    /// anything is new.
    pub fn merge(&mut self, other: &ModelRecord) -> bool {
        let before = self.clone();
        let mut parts = std::mem::take(&mut self.parts);
        if (other.stamp, other.removed, &other.name) > (self.stamp, self.removed, &self.name) {
            *self = other.clone();
        }
        parts.extend(other.parts.iter().cloned());
        parts.sort();
        parts.dedup_by(|a, b| a.hash == b.hash);
        parts.truncate(PARTS_MAX);
        self.parts = if self.removed { Vec::new() } else { parts };
        *self != before
    }

    /// The layers that a part holds; none for what holds no whole layer.
    pub fn layers_of(&self, part: &Part) -> Option<LayerRange> {
        match &part.kind {
            // A model in several files has its layers in several, so each counts only together with the others.
            PartKind::File(_) => LayerRange::new(0, self.layers).ok().filter(|_| self.files.len() == 1),
            PartKind::Layers(range) => Some(*range),
            PartKind::Head(_) | PartKind::Rest(_) => None,
        }
    }

    /// Refuses what exceeds a bound.
    pub fn check(&self) -> Result<(), OutOfBounds> {
        if self.name.is_empty() || self.name.len() > NAME_BYTES_MAX || self.architecture.len() > NAME_BYTES_MAX {
            return Err(OutOfBounds("the length of a model's name"));
        }
        if self.files.len() > FILES_MAX || self.parts.len() > PARTS_MAX || self.layers > LAYERS_MAX {
            return Err(OutOfBounds("the number of a model's files"));
        }
        let texts = self.files.iter().flat_map(|f| [Some(&f.path), f.url.as_ref(), f.etag.as_ref()]);
        if texts.chain([Some(&self.source), self.revision.as_ref()]).flatten().any(|t| t.len() > TEXT_BYTES_MAX) {
            return Err(OutOfBounds("the length of an address"));
        }
        let spans = |p: &Part| match &p.kind {
            PartKind::Head(spans) | PartKind::Rest(spans) => spans.len(),
            PartKind::File(_) | PartKind::Layers(_) => 0,
        };
        if self.parts.iter().map(spans).sum::<usize>() > PIECES_MAX || self.replicas > REPLICAS_MAX {
            return Err(OutOfBounds("the number of a part's pieces"));
        }
        Ok(())
    }
}

/// What a node has on its disk.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Holdings {
    /// The parts of models that it has whole, by BLAKE3 hash, sorted.
    pub parts: Vec<ContentHash>,
    /// Bytes that the store takes.
    pub used_bytes: u64,
    /// Bytes that it may still take, by the disk and by its limit.
    pub free_bytes: u64,
    /// The limit that the user set.
    pub limit_bytes: Option<u64>,
}

/// What a node tells another about models, and asks for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Catalogue {
    /// The cluster meant.
    pub cluster: ClusterId,
    /// All records.
    pub records: Vec<ModelRecord>,
    /// What the sender has.
    pub holdings: Holdings,
}

impl Catalogue {
    /// Refuses what exceeds a bound.
    pub fn check(&self) -> Result<(), OutOfBounds> {
        if self.records.len() > RECORDS_MAX || self.holdings.parts.len() > HELD_MAX {
            return Err(OutOfBounds("the number of models"));
        }
        self.records.iter().try_for_each(ModelRecord::check)
    }
}

/// A part that some nodes have, and where in it bytes of the original are.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Provider {
    /// BLAKE3 of its content.
    pub hash: ContentHash,
    /// Size in bytes.
    pub bytes: u64,
    /// Who has it.
    pub holders: Vec<NodeId>,
    /// Where in it which bytes of the original are.
    pub pieces: Vec<Piece>,
}

/// A file to be put together.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AssembleOrder {
    /// The model whose bytes they are.
    pub model: ModelId,
    /// For messages: what it will be.
    pub what: String,
    /// Size of the file.
    pub bytes: u64,
    /// Its first bytes, which are in no original file.
    pub header: Vec<u8>,
    /// The others; what no piece holds is zeros.
    pub pieces: Vec<Piece>,
    /// The original files and where they can be read.
    pub files: Vec<FileRecord>,
    /// What nodes have of them.
    pub providers: Vec<Provider>,
}

impl AssembleOrder {
    /// Refuses what exceeds a bound, and pieces that lie outside of their files.
    pub fn check(&self) -> Result<(), OutOfBounds> {
        let pieces = self.providers.iter().map(|p| p.pieces.len()).sum::<usize>() + self.pieces.len();
        if pieces > PIECES_MAX || self.files.len() > FILES_MAX || self.what.len() > TEXT_BYTES_MAX {
            return Err(OutOfBounds("the number of pieces"));
        }
        if self.header.len() as u64 > self.bytes {
            return Err(OutOfBounds("the length of a header"));
        }
        let fits = |p: &Piece, bytes: u64| {
            let of_file = self.files.get(usize::from(p.file)).map_or(0, |f| f.bytes);
            let within = |at: u64, end: u64| at.checked_add(p.bytes).is_some_and(|e| e <= end);
            within(p.from, of_file) && within(p.to, bytes)
        };
        let own = self.pieces.iter().all(|p| fits(p, self.bytes));
        let others = self.providers.iter().all(|provider| provider.pieces.iter().all(|p| fits(p, provider.bytes)));
        if own && others { Ok(()) } else { Err(OutOfBounds("the place of a piece")) }
    }
}

/// How it goes. The last event is `Done` or `Failed`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum AssembleEvent {
    /// Bytes here of bytes in all, and how many of them came from outside of the cluster since the order.
    Progress {
        /// Bytes here.
        done_bytes: u64,
        /// Bytes in all.
        total_bytes: u64,
        /// Of which from the source.
        outside_bytes: u64,
    },
    /// It is complete, by this name for now; nobody else sees it before it is published.
    Done {
        /// What to call it in a [`PartRequest`].
        assembly: ContentHash,
        /// Bytes that came from the source.
        outside_bytes: u64,
    },
    /// What happened and what to do.
    Failed {
        /// For people.
        message: String,
        /// Repeating the same order may help.
        retry: bool,
    },
}

/// A file of a node's store.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum StoredFile {
    /// One that was put together and is not published.
    Assembly(ContentHash),
    /// A part, by its hash.
    Part(ContentHash),
}

/// SHA-256 of the bytes so far, to be taken on by whoever has the next ones.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HashState {
    /// The state between two blocks.
    pub words: [u32; 8],
    /// Bytes since the last whole block, fewer than 64.
    pub tail: Vec<u8>,
    /// Bytes in all.
    pub bytes: u64,
}

/// What is to be done with a file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum PartRequest {
    /// Take a SHA-256 on over these bytes (where they begin, how many) of the file.
    Digest {
        /// Which file.
        file: StoredFile,
        /// Offsets and lengths, in order.
        ranges: Vec<(u64, u64)>,
        /// Of what came before.
        state: HashState,
    },
    /// Publish what was put together: it becomes a part.
    Publish {
        /// Which.
        assembly: ContentHash,
    },
    /// Give up what was put together: it does not match.
    Discard {
        /// Which.
        assembly: ContentHash,
    },
    /// I am about to delete my copy: promise to keep yours for a while.
    Keep {
        /// The part.
        part: ContentHash,
    },
    /// Read this part again and compare it with its hash.
    Verify {
        /// The part.
        part: ContentHash,
    },
    /// Fetch this part from a node that has it.
    Copy {
        /// The part.
        part: ContentHash,
        /// Size in bytes.
        bytes: u64,
        /// Who has it.
        holders: Vec<NodeId>,
    },
}

/// What came of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum PartReply {
    /// The hash after these bytes.
    State(HashState),
    /// The part that it has become.
    Published {
        /// BLAKE3 of its content.
        hash: ContentHash,
        /// Size in bytes.
        bytes: u64,
    },
    /// Yes, or it is done.
    Yes,
    /// No; a sentence that says why.
    No(String),
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record() -> ModelRecord {
        ModelRecord {
            id: ModelId([1; 32]),
            name: "m".into(),
            source: "hf:o/r".into(),
            revision: Some("abc".into()),
            architecture: "llama".into(),
            layers: 4,
            files: vec![],
            parts: vec![],
            replicas: 2,
            created_unix_s: 1,
            stamp: 1,
            removed: false,
        }
    }

    fn part(n: u8, layers: (u32, u32)) -> Part {
        let range = LayerRange::new(layers.0, layers.1).unwrap();
        Part { hash: ContentHash([n; 32]), bytes: 1, kind: PartKind::Layers(range) }
    }

    #[test]
    fn records_converge_in_any_order_and_a_removal_wins() {
        let mut a = ModelRecord { parts: vec![part(2, (0, 2))], ..record() };
        let mut b = ModelRecord { parts: vec![part(1, (2, 4))], name: "n".into(), stamp: 2, ..record() };
        let (first, second) = (a.clone(), b.clone());
        assert!(a.merge(&second) && b.merge(&first));
        assert_eq!(a, b);
        assert!(a.parts.len() == 2 && a.name == "n" && !a.merge(&first));
        let gone = ModelRecord { removed: true, stamp: 3, parts: vec![], ..record() };
        assert!(a.merge(&gone) && a.removed && a.parts.is_empty());
        assert!(!a.merge(&second) && a.parts.is_empty());
    }

    #[test]
    fn an_order_that_reaches_beyond_its_files_is_refused() {
        let file = FileRecord { path: "m".into(), bytes: 100, sha256: None, url: None, on_hub: false, etag: None };
        let piece = |from, to, bytes| Piece { file: 0, from, to, bytes };
        let order = |pieces: Vec<Piece>| AssembleOrder {
            model: ModelId([1; 32]),
            what: "m".into(),
            bytes: 50,
            header: vec![0; 10],
            pieces,
            files: vec![file.clone()],
            providers: vec![],
        };
        assert_eq!(order(vec![piece(60, 10, 40)]).check(), Ok(()));
        for bad in [piece(61, 10, 40), piece(0, 11, 40), piece(u64::MAX, 0, 2), Piece { file: 1, ..piece(0, 0, 1) }] {
            assert!(order(vec![bad]).check().is_err(), "{bad:?}");
        }
    }
}
