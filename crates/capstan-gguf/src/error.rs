//! Why a file is not a model we can use, or a shard could not be written: sentences that say what to do.
use std::io;
use std::path::{Path, PathBuf};

use capstan_proto::LayerRange;

/// Every way in which reading or writing a GGUF fails. Nothing half-written is left behind by any of them.
#[derive(Debug, thiserror::Error)]
pub enum GgufError {
    /// The operating system refused.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// Which file.
        path: PathBuf,
        /// What was tried, as a verb.
        action: &'static str,
        /// Why not.
        source: io::Error,
    },
    /// The first four bytes are not `GGUF`.
    #[error("{} is not a GGUF file; give the path of a model that ends in .gguf, and download it again if it does", .0.display())]
    NotGguf(PathBuf),
    /// A version that llama.cpp does not read either.
    #[error("{} has GGUF version {version}; only 2 and 3 can be read, convert the model again with a current llama.cpp", path.display())]
    Version {
        /// Which file.
        path: PathBuf,
        /// The version it says.
        version: u32,
    },
    /// Made for a machine of the other byte order.
    #[error("{} is a big-endian GGUF; download the little-endian file, or convert it with gguf_convert_endian.py", .0.display())]
    BigEndian(PathBuf),
    /// The file ends before what its header announces.
    #[error("{} is truncated: {what} would end at byte {end} but the file has {len}; download it again", path.display())]
    Truncated {
        /// Which file.
        path: PathBuf,
        /// What is cut off.
        what: String,
        /// Where that would end, in bytes.
        end: u64,
        /// Size of the file in bytes.
        len: u64,
    },
    /// Only the beginning of the file is here, and its header is longer. Fetch more and parse again.
    #[error("{} has a header longer than the {have} bytes that were read of it; read at least {need}", path.display())]
    HeadTooShort {
        /// Which file.
        path: PathBuf,
        /// Bytes that are here.
        have: u64,
        /// Bytes that are needed to get any further.
        need: u64,
    },
    /// A count or length beyond every honest file's. Nothing was allocated for it.
    #[error("{} is damaged or hostile: {what} is {found}, at most {max} is accepted; download it again from a source you trust", path.display())]
    Limit {
        /// Which file.
        path: PathBuf,
        /// What is too large.
        what: String,
        /// What the file says.
        found: u64,
        /// The limit.
        max: u64,
    },
    /// The bytes contradict the format.
    #[error("{} is damaged: {what}; download it again, or convert the model again", path.display())]
    Malformed {
        /// Which file.
        path: PathBuf,
        /// What is wrong.
        what: String,
    },
    /// A tensor type that this version of ggml does not have.
    #[error("{}: tensor {tensor} has the unknown type {id}; the model may need a newer version of capstan", path.display())]
    UnknownType {
        /// Which file.
        path: PathBuf,
        /// Which tensor.
        tensor: String,
        /// ggml's number of the type.
        id: u32,
    },
    /// A part of a split model that is not the first was opened.
    #[error("{} is part {} of {count} of a split model; give the path of the first part, {}", path.display(), no + 1, first.display())]
    NotFirst {
        /// Which file.
        path: PathBuf,
        /// Its number from 0.
        no: u32,
        /// How many parts there are.
        count: u32,
        /// The first part.
        first: PathBuf,
    },
    /// A part of a split model is not beside the first.
    #[error("{} is missing; put all {count} parts of the model into one folder", path.display())]
    MissingPart {
        /// Which file.
        path: PathBuf,
        /// How many parts there are.
        count: u32,
    },
    /// The parts do not belong together.
    #[error("{} does not fit the other parts of the model: {what}; download all parts from one place", path.display())]
    Split {
        /// Which file.
        path: PathBuf,
        /// What does not fit.
        what: String,
    },
    /// A GGUF, but not of a language model (a projector, an adapter, a vocabulary).
    #[error("{} is not a language model: {missing}; give the path of the model itself", path.display())]
    NotALanguageModel {
        /// Which file.
        path: PathBuf,
        /// What is missing.
        missing: String,
    },
    /// The layer range ends beyond the model.
    #[error("the layer range {range} is outside the model's {n_layers} layers (0..{n_layers})")]
    OutOfRange {
        /// What was asked.
        range: LayerRange,
        /// Layers of the model.
        n_layers: u32,
    },
    /// The layer range cannot be a stage of this model.
    #[error("layers {range} cannot be a stage: {reason}")]
    Window {
        /// What was asked.
        range: LayerRange,
        /// Why not.
        reason: String,
    },
    /// The file system is full; nothing was left there.
    #[error("{} does not fit: it takes {total_bytes} bytes and {missing_bytes} are missing in {}; free that much or choose another folder",
        path.display(), path.parent().unwrap_or(Path::new(".")).display())]
    DiskFull {
        /// The shard that was to be written.
        path: PathBuf,
        /// Its size in bytes.
        total_bytes: u64,
        /// How many bytes are missing on that file system.
        missing_bytes: u64,
    },
    /// The progress callback asked to stop; nothing was left behind.
    #[error("writing {} was cancelled", .0.display())]
    Cancelled(PathBuf),
}

impl GgufError {
    pub(crate) fn io(path: &Path, action: &'static str) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io { path, action, source }
    }
}
