//! What a user may write for a model, and which of a repository's files that means.
use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use super::RemoteFile;

/// Longest name that is looked at, in bytes.
const NAME_BYTES_MAX: usize = 4096;
/// The quantisation that is taken when several are there and none is named.
const USUAL: &str = "Q4_K_M";

/// A model, as a user names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ModelName {
    /// A file of this machine.
    File(PathBuf),
    /// A GGUF by its address; of a split model the first part.
    Url(String),
    /// A repository on Hugging Face.
    Hub {
        /// `OWNER/REPO`.
        repo: String,
        /// Part of the file's name, such as `Q4_K_M`.
        quantisation: Option<String>,
        /// Branch, tag or commit.
        revision: Option<String>,
    },
}

/// Why a name means no model.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum NameError {
    /// It begins with `hf:` and goes on wrongly.
    #[error(
        "{0:?} is no name of a repository; write hf:OWNER/REPO, hf:OWNER/REPO:Q4_K_M or hf:OWNER/REPO:Q4_K_M@REVISION"
    )]
    Hub(String),
    /// An address of another kind.
    #[error(
        "{0:?} is no address that can be read; take one that begins with https:// or http:// and holds no password"
    )]
    Url(String),
    /// Nothing, or too much.
    #[error("a model is named by a path, an address or hf:OWNER/REPO, in at most {NAME_BYTES_MAX} bytes")]
    Length,
    /// The repository has no such file.
    #[error("{repo} has no GGUF file {}; {}", .wanted.as_ref().map_or("at all".into(), |w| format!("for {w}")), there(.names))]
    None {
        /// The repository.
        repo: String,
        /// What was asked for.
        wanted: Option<String>,
        /// What there is.
        names: Vec<String>,
    },
    /// It has several.
    #[error("{repo} has several models{}; name one of them after a colon: {}", .wanted.as_ref().map_or(String::new(), |w| format!(" for {w}")), .names.join(", "))]
    Several {
        /// The repository.
        repo: String,
        /// What was asked for.
        wanted: Option<String>,
        /// Which.
        names: Vec<String>,
    },
}

fn there(names: &[String]) -> String {
    if names.is_empty() { "choose a repository with GGUF files".into() } else { format!("it has {}", names.join(", ")) }
}

impl FromStr for ModelName {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        if text.is_empty() || text.len() > NAME_BYTES_MAX {
            return Err(NameError::Length);
        }
        if let Some(name) = text.strip_prefix("hf:") {
            return hub(name).ok_or_else(|| NameError::Hub(text.to_owned()));
        }
        if let Some(path) = text.strip_prefix("file:") {
            return Ok(Self::File(path.strip_prefix("//").unwrap_or(path).into()));
        }
        if !text.contains("://") {
            return Ok(Self::File(text.into()));
        }
        let bad = || NameError::Url(text.to_owned());
        let url = reqwest::Url::parse(text).map_err(|_| bad())?;
        // A name and a password would end up in lists and logs.
        let secret = !url.username().is_empty() || url.password().is_some();
        if !matches!(url.scheme(), "http" | "https") || url.host_str().is_none() || secret {
            return Err(bad());
        }
        Ok(Self::Url(url.into()))
    }
}

impl fmt::Display for ModelName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(path) => path.display().fmt(f),
            Self::Url(url) => f.write_str(url),
            Self::Hub { repo, quantisation, revision } => {
                write!(f, "hf:{repo}")?;
                quantisation.iter().try_for_each(|q| write!(f, ":{q}"))?;
                revision.iter().try_for_each(|r| write!(f, "@{r}"))
            }
        }
    }
}

fn hub(name: &str) -> Option<ModelName> {
    let (name, revision) = match name.split_once('@') {
        Some((name, revision)) => (name, Some(revision)),
        None => (name, None),
    };
    let (repo, quantisation) = match name.split_once(':') {
        Some((repo, quantisation)) => (repo, Some(quantisation)),
        None => (name, None),
    };
    let (owner, model) = repo.split_once('/')?;
    // What ends up in an address must not lead out of its place there.
    let plain = |s: &str| {
        !s.is_empty() && s != "." && s != ".." && s.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c))
    };
    let revision_is_plain = |r: &str| r.split('/').all(plain);
    let good = plain(owner) && plain(model) && quantisation.is_none_or(plain) && revision.is_none_or(revision_is_plain);
    good.then(|| ModelName::Hub {
        repo: repo.to_owned(),
        quantisation: quantisation.map(str::to_owned),
        revision: revision.map(str::to_owned),
    })
}

/// The files of the one model in a repository that a quantisation means, in the order of their parts.
pub fn choose(repo: &str, quantisation: Option<&str>, files: Vec<RemoteFile>) -> Result<Vec<RemoteFile>, NameError> {
    let mut models = BTreeMap::<String, Vec<RemoteFile>>::new();
    for file in files {
        let Some(name) = file.path.to_str().and_then(|p| p.strip_suffix(".gguf")) else { continue };
        // Projectors for pictures and importance matrices are no models.
        let last = name.rsplit('/').next().unwrap_or(name).to_ascii_lowercase();
        if last.contains("mmproj") || last.contains("imatrix") {
            continue;
        }
        models.entry(without_part(name).to_owned()).or_default().push(file);
    }
    let names = |of: &BTreeMap<String, Vec<RemoteFile>>| of.keys().cloned().collect::<Vec<_>>();
    let all = names(&models);
    let wanted = quantisation.map(str::to_owned);
    let mut fitting: BTreeMap<_, _> =
        models.into_iter().filter(|(name, _)| quantisation.is_none_or(|q| has_word(name, q))).collect();
    if fitting.len() > 1 {
        // "Q4_K_M" is part of "UD-Q4_K_M" too; the shorter name is what was meant. Without a wish the usual one is.
        let meant = match quantisation {
            Some(_) => shortest(&fitting),
            None => fitting.keys().filter(|name| has_word(name, USUAL)).min_by_key(|n| n.len()).cloned(),
        };
        if let Some(meant) = meant {
            fitting.retain(|name, _| *name == meant);
        }
    }
    let repo = repo.to_owned();
    match fitting.len() {
        0 => Err(NameError::None { repo, wanted, names: all }),
        1 => {
            let mut parts = fitting.into_values().next().unwrap_or_default();
            parts.sort_by(|a, b| a.path.cmp(&b.path));
            Ok(parts)
        }
        _ => Err(NameError::Several { repo, wanted, names: names(&fitting) }),
    }
}

/// The one name that is shorter than all others.
fn shortest<T>(of: &BTreeMap<String, T>) -> Option<String> {
    let least = of.keys().map(String::len).min()?;
    let mut found = of.keys().filter(|name| name.len() == least);
    found.next().filter(|_| found.next().is_none()).cloned()
}

/// A name without the number of its part.
fn without_part(name: &str) -> &str {
    let digits = |s: &str| s.len() == 5 && s.bytes().all(|b| b.is_ascii_digit());
    let parts = name.rsplit_once("-of-").filter(|(_, count)| digits(count)).and_then(|(rest, _)| rest.rsplit_once('-'));
    parts.filter(|(_, no)| digits(no)).map_or(name, |(name, _)| name)
}

/// Whether a word stands in a name, in any spelling of case, with nothing that goes on with it.
fn has_word(name: &str, word: &str) -> bool {
    let (name, word) = (name.to_ascii_lowercase(), word.to_ascii_lowercase());
    let goes_on = |c: Option<char>| c.is_some_and(|c| c.is_ascii_alphanumeric() || c == '_');
    name.match_indices(&word)
        .any(|(at, _)| !goes_on(name[..at].chars().next_back()) && !goes_on(name[at + word.len()..].chars().next()))
}
