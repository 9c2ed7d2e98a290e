//! Models that are elsewhere: at a URL, or on Hugging Face or a server that speaks its protocol.
//!
//! ```text
//! hf:OWNER/REPO[:QUANT][@REVISION] ─▶ list of files ─▶ those of one model ─▶ first bytes ─▶ header
//! https://HOST/model.gguf ────────────────────────────▶       〃
//! ```
//!
//! | module | idea |
//! |---|---|
//! | `name` | what a user may write, and which of a repository's files that means |
//! | `http` | ranges of files, bounded, with errors that say what to do |
mod http;
mod name;

use std::path::PathBuf;

use capstan_gguf::beginnings::{self, Beginning, FIRST_BYTES, Known};
use capstan_gguf::{GgufError, Model};

pub use http::{Pieces, Remote, Resolved};
pub use name::{ModelName, NameError, choose};

/// A file of a model, elsewhere.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RemoteFile {
    /// Its name, for messages and for the names of a split model's other parts.
    pub path: PathBuf,
    /// Where it can be read.
    pub url: String,
    /// The server is the hub, which may know us by a token.
    pub on_hub: bool,
    /// Its size in bytes, where the server has told.
    pub bytes: Option<u64>,
    /// SHA-256 of its content, where the server has told: hexadecimal.
    pub sha256: Option<String>,
    /// What the server calls this version of the file, where it has told.
    pub etag: Option<String>,
}

/// A model elsewhere, as far as its headers say it.
#[derive(Debug)]
pub struct Headers {
    /// The commit that its files are pinned to; none where there are no commits.
    pub commit: Option<String>,
    /// Its files, the first part first, with their sizes.
    pub files: Vec<RemoteFile>,
    /// The first bytes of each.
    pub beginnings: Vec<Beginning>,
    /// The model; its weights are not there.
    pub model: Model,
}

/// Why a model elsewhere could not be read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RemoteError {
    /// The server cannot be reached, or the connection broke.
    #[error("{url} cannot be reached: {reason}; is this machine connected, and the address right?")]
    Unreachable {
        /// What was asked for.
        url: String,
        /// Why not.
        reason: String,
    },
    /// The server wants to know who asks.
    #[error(
        "{url} may not be read (status {status}); if the model is gated, accept its terms on its page and set HF_TOKEN"
    )]
    Forbidden {
        /// What was asked for.
        url: String,
        /// 401 or 403.
        status: u16,
    },
    /// There is no such thing.
    #[error("{url} does not exist; check the name and the revision")]
    NotFound {
        /// What was asked for.
        url: String,
    },
    /// Any other answer that is no success.
    #[error("{url} answered with status {status}; try again later")]
    Status {
        /// What was asked for.
        url: String,
        /// The status.
        status: u16,
    },
    /// The server does not send parts of files.
    #[error(
        "{url} cannot be read in parts, so a pull could not be taken up again; download the file by other means, then \
         pull file:PATH"
    )]
    NoRanges {
        /// What was asked for.
        url: String,
    },
    /// The file is not what it was when the pull began.
    #[error("{url} has changed since the pull began ({what}); pull it anew, under the revision it has now")]
    Changed {
        /// What was asked for.
        url: String,
        /// What differs.
        what: String,
    },
    /// The server sent something that makes no sense.
    #[error("{url} answered with {what}")]
    Nonsense {
        /// What was asked for.
        url: String,
        /// What is wrong.
        what: String,
    },
    /// The name fits no model, or several.
    #[error(transparent)]
    Name(#[from] NameError),
    /// The file is no model.
    #[error(transparent)]
    Gguf(#[from] GgufError),
}

impl RemoteError {
    /// Whether asking again may help: the network or the server failed, not the name, the rules or the content.
    pub fn is_retryable(&self) -> bool {
        match self {
            Self::Unreachable { .. } => true,
            Self::Status { status, .. } => *status == 408 || *status == 429 || *status >= 500,
            _ => false,
        }
    }
}

impl Remote {
    /// The model of a name, from its headers alone; its weights are not there.
    pub async fn model(&self, name: &ModelName) -> Result<Model, RemoteError> {
        Ok(self.headers(self.resolve(name).await?).await?.model)
    }

    /// What the first bytes of files say. Of a split model at a URL the other files are found by their names.
    pub async fn headers(&self, resolved: Resolved) -> Result<Headers, RemoteError> {
        let Resolved { commit, files: known } = resolved;
        let first = known.first().ok_or_else(|| nonsense(None, "no file"))?;
        let (file, beginning) = self.beginning(first).await?;
        let (mut files, mut beginnings) = (vec![file], vec![beginning]);
        loop {
            match beginnings::read(&beginnings)? {
                Known::Model(model) => return Ok(Headers { commit, files, beginnings, model: *model }),
                Known::More { file, bytes } => {
                    let (Some(beginning), Some(file)) = (beginnings.get_mut(file), files.get(file)) else {
                        return Err(nonsense(Some(first), "fewer files than the model has"));
                    };
                    let have = beginning.bytes.len() as u64;
                    beginning.bytes.extend(self.range(file, have, bytes - have).await?);
                }
                Known::Files(others) => {
                    for path in others {
                        let file = known.iter().find(|f| f.path == path).cloned().or_else(|| first.beside(&path));
                        let file = file.ok_or_else(|| nonsense(Some(first), "a file without a name"))?;
                        let (file, beginning) = self.beginning(&file).await?;
                        beginnings.push(beginning);
                        files.push(file);
                    }
                }
            }
        }
    }

    async fn beginning(&self, file: &RemoteFile) -> Result<(RemoteFile, Beginning), RemoteError> {
        let (bytes, file) = self.first(file, FIRST_BYTES).await?;
        let file_bytes = file.bytes.unwrap_or(0);
        Ok((file.clone(), Beginning { path: file.path, bytes, file_bytes }))
    }
}

impl RemoteFile {
    /// Another file in the same folder.
    fn beside(&self, path: &std::path::Path) -> Option<Self> {
        let mut url = reqwest::Url::parse(&self.url).ok()?;
        let name = path.file_name()?.to_str()?;
        url.path_segments_mut().ok()?.pop().push(name);
        Some(Self {
            path: path.to_owned(),
            url: url.into(),
            on_hub: self.on_hub,
            bytes: None,
            sha256: None,
            etag: None,
        })
    }
}

fn nonsense(file: Option<&RemoteFile>, what: &str) -> RemoteError {
    RemoteError::Nonsense { url: file.map(|f| f.url.clone()).unwrap_or_default(), what: what.into() }
}

#[cfg(test)]
mod tests;
