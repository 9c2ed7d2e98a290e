//! A model whose files are elsewhere: their first bytes are enough, for the header is at the start.
//!
//! How many bytes a header takes is known only when it is read, so this says what is missing and is asked again:
//!
//! ```text
//! first MiB of the first file ─▶ More: 10 MB of file 0 ─▶ Files: two other parts ─▶ ... ─▶ Model
//! ```
use std::path::PathBuf;

use crate::GgufError;
use crate::bytes::FileBytes;
use crate::model::{Model, check_part, other_parts, parts};
use crate::parse::{self, Header};

/// Bytes to begin with: most headers without a vocabulary, and a tenth of those with one.
pub const FIRST_BYTES: u64 = 1 << 20;
/// Longest header that is fetched, in bytes: vocabularies take about 10 MB, and merges seldom as much again.
pub const HEADER_BYTES_MAX: u64 = 256 << 20;

/// The first bytes of a file.
#[derive(Clone, Debug)]
pub struct Beginning {
    /// Its name, for messages and for the names of a split model's other parts.
    pub path: PathBuf,
    /// As many as are there.
    pub bytes: Vec<u8>,
    /// Size of the whole file in bytes.
    pub file_bytes: u64,
}

/// What beginnings amount to.
#[derive(Debug)]
pub enum Known {
    /// The model, but for its weights.
    Model(Box<Model>),
    /// More of this file is needed.
    More {
        /// Which of the files that were given.
        file: usize,
        /// So many bytes from its start.
        bytes: u64,
    },
    /// The model has these other files too.
    Files(Vec<PathBuf>),
}

/// What the beginnings of a model's files, the first part first, amount to.
pub fn read(beginnings: &[Beginning]) -> Result<Known, GgufError> {
    let mut contents = Vec::new();
    let mut headers = Vec::<Header>::new();
    let mut count = 1;
    for (no, beginning) in beginnings.iter().enumerate() {
        let Beginning { path, bytes, file_bytes } = beginning;
        let file = FileBytes::beginning(path, bytes.clone(), *file_bytes);
        let header = match parse::header(&file, no) {
            Ok(header) => header,
            Err(error) => return more(beginning, no, error),
        };
        if no == 0 {
            count = parts(&header.metadata, path)?;
        } else {
            check_part(&header.metadata, path, no as u32, count)?;
        }
        contents.push(file);
        headers.push(header);
    }
    let Some(first) = beginnings.first() else {
        return Err(GgufError::Split { path: PathBuf::new(), what: "no part of it was given".into() });
    };
    let missing = other_parts(&first.path, beginnings.len() as u32, count)?;
    match missing.is_empty() {
        true => Ok(Known::Model(Box::new(Model::assemble(contents, headers)?))),
        false => Ok(Known::Files(missing)),
    }
}

/// Whether an error only means that the header goes on beyond what is here.
fn more(beginning: &Beginning, file: usize, error: GgufError) -> Result<Known, GgufError> {
    let (here, all) = (beginning.bytes.len() as u64, beginning.file_bytes);
    let wanted = match error {
        GgufError::Truncated { end, .. } if here < all && end <= all => end,
        GgufError::NotGguf(_) if here < 4 && all >= 4 => 4,
        error => return Err(error),
    };
    if wanted > HEADER_BYTES_MAX {
        return Err(GgufError::Limit {
            path: beginning.path.clone(),
            what: "the length of its header".into(),
            found: wanted,
            max: HEADER_BYTES_MAX,
        });
    }
    // Twice as many each time: what is asked for is often the next string only.
    Ok(Known::More { file, bytes: wanted.max(here.saturating_mul(2)).max(FIRST_BYTES).min(all).min(HEADER_BYTES_MAX) })
}
