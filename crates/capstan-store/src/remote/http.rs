//! Ranges of files over HTTP: every answer is bounded, and every failure says what to do.
use std::time::Duration;

use futures::StreamExt;
use hf_hub::api::tokio::{Api, ApiBuilder};
use hf_hub::{Repo, RepoType};
use reqwest::header::{CONTENT_RANGE, ETAG, RANGE};
use reqwest::{Client, Response, StatusCode};
use serde::Deserialize;

use super::{ModelName, RemoteError, RemoteFile, choose};

/// Branch that is read when none is named.
const REVISION: &str = "main";
/// Largest list of a repository's files, in bytes: ten thousand files with their hashes.
const LIST_BYTES_MAX: u64 = 16 << 20;
/// Longest tag of a file's version that is compared, in bytes; the usual ones are hashes.
const TAG_BYTES_MAX: usize = 256;
/// Most time until a server begins to answer, and between two pieces of an answer.
const SILENCE_MAX: Duration = Duration::from_secs(30);

/// Failures in a row after which a patient reader gives up.
const TRIES: u32 = 7;
/// Its pause after the first of them; it doubles each time up to [`PAUSE_MAX`]. All together half a minute.
const PAUSE: Duration = Duration::from_millis(250);
/// See [`PAUSE`].
const PAUSE_MAX: Duration = Duration::from_secs(10);

/// Reads models that are elsewhere.
pub struct Remote {
    client: Client,
    hub: Api,
    tries: u32,
}

/// What a name means: files at one version.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Resolved {
    /// The commit that the files are pinned to; none where there are no commits.
    pub commit: Option<String>,
    /// The files of the model, the first part first. Of a split model at a URL only that is known.
    pub files: Vec<RemoteFile>,
}

#[derive(Deserialize)]
struct Listing {
    sha: Option<String>,
    siblings: Vec<Sibling>,
}

#[derive(Deserialize)]
struct Sibling {
    rfilename: String,
    size: Option<u64>,
    lfs: Option<Large>,
}

#[derive(Deserialize)]
struct Large {
    sha256: Option<String>,
}

impl Remote {
    /// As the environment says: `HF_ENDPOINT`, `HF_TOKEN` or the token that `hf auth login` has left in `HF_HOME`.
    pub fn from_env() -> Result<Self, RemoteError> {
        let mut builder = ApiBuilder::from_env();
        if let Ok(token) = std::env::var("HF_TOKEN")
            && !token.is_empty()
        {
            builder = builder.with_token(Some(token));
        }
        Self::with(builder)
    }

    /// A server of one's own that speaks Hugging Face's protocol.
    pub fn at(endpoint: &str, token: Option<String>) -> Result<Self, RemoteError> {
        Self::with(ApiBuilder::new().with_endpoint(endpoint.trim_end_matches('/').to_owned()).with_token(token))
    }

    fn with(builder: ApiBuilder) -> Result<Self, RemoteError> {
        let bad =
            |e: &dyn std::fmt::Display| RemoteError::Unreachable { url: "the network".into(), reason: e.to_string() };
        let hub = builder.with_progress(false).with_user_agent("capstan", env!("CARGO_PKG_VERSION")).build();
        // Addresses elsewhere must not learn the token.
        let client = Client::builder().connect_timeout(SILENCE_MAX).read_timeout(SILENCE_MAX).build();
        Ok(Self { client: client.map_err(|e| bad(&e))?, hub: hub.map_err(|e| bad(&e))?, tries: 1 })
    }

    /// The same, which asks again for half a minute where the server or the line fails: for work that nobody waits for.
    pub fn patient(self) -> Self {
        Self { tries: TRIES, ..self }
    }

    /// Whether to ask again after a failure; pauses before.
    async fn asks_again(&self, tries: &mut u32, error: &RemoteError) -> bool {
        *tries += 1;
        let again = error.is_retryable() && *tries < self.tries;
        if again {
            tracing::info!(%error, "asking again");
            tokio::time::sleep((PAUSE * 2u32.saturating_pow(*tries - 1)).min(PAUSE_MAX)).await;
        }
        again
    }

    /// What a name means now. A branch or tag is pinned to the commit that it points to.
    pub async fn resolve(&self, name: &ModelName) -> Result<Resolved, RemoteError> {
        let (repo, quantisation, revision) = match name {
            ModelName::Hub { repo, quantisation, revision } => (repo, quantisation, revision),
            ModelName::Url(url) => {
                let path =
                    reqwest::Url::parse(url).map(|u| u.path().trim_start_matches('/').into()).unwrap_or_default();
                let file = RemoteFile { path, url: url.clone(), on_hub: false, bytes: None, sha256: None, etag: None };
                return Ok(Resolved { commit: None, files: vec![file] });
            }
            ModelName::File(path) => {
                let url = path.display().to_string();
                return Err(RemoteError::Nonsense { url, what: "nothing: it is a file of this machine".into() });
            }
        };
        let revision = revision.as_deref().unwrap_or(REVISION);
        let hub = self.hub.repo(Repo::with_revision(repo.clone(), RepoType::Model, revision.to_owned()));
        let url = format!("hf:{repo}@{revision}");
        let mut tries = 0;
        let body = loop {
            let asked = hub.info_request().query(&[("blobs", "true")]).send();
            match listing(&url, asked).await {
                Ok(body) => break body,
                Err(error) => {
                    if !self.asks_again(&mut tries, &error).await {
                        return Err(error);
                    }
                }
            }
        };
        let listing: Listing = serde_json::from_slice(&body)
            .map_err(|e| RemoteError::Nonsense { url, what: format!("no list of files ({e})") })?;
        let commit = listing.sha.filter(|sha| is_plain(sha));
        let pinned = commit.as_deref().unwrap_or(revision);
        let hub = self.hub.repo(Repo::with_revision(repo.clone(), RepoType::Model, pinned.to_owned()));
        let file = |s: Sibling| RemoteFile {
            url: hub.url(&s.rfilename),
            on_hub: true,
            path: s.rfilename.into(),
            bytes: s.size,
            sha256: s.lfs.and_then(|l| l.sha256),
            etag: None,
        };
        let files = choose(repo, quantisation.as_deref(), listing.siblings.into_iter().map(file).collect())?;
        Ok(Resolved { commit, files })
    }

    /// Whether an address is the hub's, who may be shown the token.
    pub fn is_hub(&self, url: &str) -> bool {
        let origin = |u: &str| reqwest::Url::parse(u).ok().map(|u| u.origin());
        let base = self.hub.model("o/r".into()).url("f");
        origin(url).is_some_and(|theirs| origin(&base) == Some(theirs))
    }

    /// The first bytes of a file, at most so many, and what the answer says of the file.
    pub async fn first(&self, file: &RemoteFile, len: u64) -> Result<(Vec<u8>, RemoteFile), RemoteError> {
        let mut tries = 0;
        loop {
            match self.first_once(file, len).await {
                Err(error) => {
                    if !self.asks_again(&mut tries, &error).await {
                        return Err(error);
                    }
                }
                first => return first,
            }
        }
    }

    async fn first_once(&self, file: &RemoteFile, len: u64) -> Result<(Vec<u8>, RemoteFile), RemoteError> {
        let response = self.ask(file, 0, len).await?;
        let size = match response.status() {
            StatusCode::PARTIAL_CONTENT => total(&response),
            // The server does not know ranges: it sends all, of which the first bytes are read.
            _ => response.content_length(),
        };
        let what = || RemoteError::Nonsense { url: file.url.clone(), what: "no size of the file".into() };
        let size = size.or(file.bytes).ok_or_else(what)?;
        if file.bytes.is_some_and(|listed| listed != size) {
            let what = format!("a file of {size} bytes, where its list of files says {}", file.bytes.unwrap_or(0));
            return Err(RemoteError::Nonsense { url: file.url.clone(), what });
        }
        let etag = etag(&response).or_else(|| file.etag.clone());
        let bytes = body(&file.url, response, len, false).await?;
        Ok((bytes, RemoteFile { bytes: Some(size), etag, ..file.clone() }))
    }

    /// `len` bytes of a file from `from` on, piece by piece as they come. The server has to know ranges, and the file has
    /// to be the one whose size and tag are given.
    pub async fn pieces(&self, file: &RemoteFile, from: u64, len: u64) -> Result<Pieces, RemoteError> {
        let response = self.ask(file, from, len).await?;
        let url = file.url.clone();
        if response.status() != StatusCode::PARTIAL_CONTENT {
            return Err(RemoteError::NoRanges { url });
        }
        let (begins, size) = (start(&response), total(&response));
        if let (Some(size), Some(known)) = (size, file.bytes)
            && size != known
        {
            return Err(RemoteError::Changed { url, what: format!("it has {size} bytes instead of {known}") });
        }
        // Behind a redirect the tag may be another server's and differ from answer to answer; the hash tells then.
        if let (None, Some(now), Some(known)) = (&file.sha256, etag(&response), &file.etag)
            && now != *known
        {
            return Err(RemoteError::Changed { url, what: format!("it is {now} instead of {known}") });
        }
        if begins != Some(from) {
            return Err(RemoteError::Nonsense { url, what: "another range than it was asked for".into() });
        }
        Ok(Pieces { url, left: len, stream: Box::pin(response.bytes_stream()) })
    }

    /// `len` bytes of a file from `from` on.
    pub async fn range(&self, file: &RemoteFile, from: u64, len: u64) -> Result<Vec<u8>, RemoteError> {
        let mut tries = 0;
        loop {
            match self.range_once(file, from, len).await {
                Err(error) => {
                    if !self.asks_again(&mut tries, &error).await {
                        return Err(error);
                    }
                }
                range => return range,
            }
        }
    }

    async fn range_once(&self, file: &RemoteFile, from: u64, len: u64) -> Result<Vec<u8>, RemoteError> {
        let response = self.ask(file, from, len).await?;
        let whole = response.status() != StatusCode::PARTIAL_CONTENT;
        let skip = if whole { from } else { 0 };
        let mut bytes = body(&file.url, response, skip.saturating_add(len), false).await?;
        bytes.drain(..(skip as usize).min(bytes.len()));
        if bytes.len() as u64 != len {
            let what = format!("{} bytes instead of {len}", bytes.len());
            return Err(RemoteError::Nonsense { url: file.url.clone(), what });
        }
        Ok(bytes)
    }

    async fn ask(&self, file: &RemoteFile, from: u64, len: u64) -> Result<Response, RemoteError> {
        // The hub's client sends the token; where a redirect leads elsewhere, it is left out.
        let client = if file.on_hub { self.hub.client() } else { &self.client };
        let last = from.saturating_add(len).saturating_sub(1);
        let asked = client.get(&file.url).header(RANGE, format!("bytes={from}-{last}")).send();
        checked(&file.url, within(&file.url, asked).await?)
    }
}

/// The bytes of a range, as they come.
pub struct Pieces {
    url: String,
    left: u64,
    stream: std::pin::Pin<Box<dyn futures::Stream<Item = reqwest::Result<bytes::Bytes>> + Send>>,
}

impl Pieces {
    /// The next bytes; none when all have come. A stream that ends before is an error, and so is one that does not end.
    pub async fn next(&mut self) -> Result<Option<bytes::Bytes>, RemoteError> {
        if self.left == 0 {
            return Ok(None);
        }
        let next = tokio::time::timeout(SILENCE_MAX, self.stream.next()).await.map_err(|_| silent(&self.url))?;
        let cut = || RemoteError::Unreachable {
            url: self.url.clone(),
            reason: format!("the connection ended {} bytes too early", self.left),
        };
        let piece = next.ok_or_else(cut)?.map_err(|e| unreachable(&self.url, &e))?;
        if piece.len() as u64 > self.left {
            let what = "more bytes than it was asked for".into();
            return Err(RemoteError::Nonsense { url: self.url.clone(), what });
        }
        self.left -= piece.len() as u64;
        Ok(Some(piece))
    }
}

/// Text that may stand in an address.
fn is_plain(sha: &str) -> bool {
    !sha.is_empty() && sha.len() <= 64 && sha.bytes().all(|b| b.is_ascii_alphanumeric())
}

async fn listing(url: &str, asked: impl Future<Output = reqwest::Result<Response>>) -> Result<Vec<u8>, RemoteError> {
    let response = checked(url, within(url, asked).await?)?;
    body(url, response, LIST_BYTES_MAX, true).await
}

async fn within(url: &str, asked: impl Future<Output = reqwest::Result<Response>>) -> Result<Response, RemoteError> {
    match tokio::time::timeout(SILENCE_MAX, asked).await {
        Ok(answer) => answer.map_err(|e| unreachable(url, &e)),
        Err(_) => Err(silent(url)),
    }
}

fn checked(url: &str, response: Response) -> Result<Response, RemoteError> {
    let url = url.to_owned();
    match response.status().as_u16() {
        200..=299 => Ok(response),
        status @ (401 | 403) => Err(RemoteError::Forbidden { url, status }),
        404 => Err(RemoteError::NotFound { url }),
        status => Err(RemoteError::Status { url, status }),
    }
}

/// The size of the whole file, as an answer with a part of it says.
fn total(response: &Response) -> Option<u64> {
    response.headers().get(CONTENT_RANGE)?.to_str().ok()?.rsplit('/').next()?.parse().ok()
}

/// Where the part of a file that an answer holds begins.
fn start(response: &Response) -> Option<u64> {
    let range = response.headers().get(CONTENT_RANGE)?.to_str().ok()?.strip_prefix("bytes ")?;
    range.split('-').next()?.trim().parse().ok()
}

/// What the server calls this version of a file; a weak tag says too little.
fn etag(response: &Response) -> Option<String> {
    let tag = response.headers().get(ETAG)?.to_str().ok()?;
    (!tag.starts_with("W/") && tag.len() <= TAG_BYTES_MAX).then(|| tag.trim_matches('"').to_owned())
}

/// At most `most` bytes of an answer; where more of it is an error, or else is left unread.
async fn body(url: &str, response: Response, most: u64, all: bool) -> Result<Vec<u8>, RemoteError> {
    let mut bytes = Vec::new();
    let mut pieces = response.bytes_stream();
    loop {
        let piece = tokio::time::timeout(SILENCE_MAX, pieces.next()).await.map_err(|_| silent(url))?;
        let Some(piece) = piece else { return Ok(bytes) };
        let piece = piece.map_err(|e| unreachable(url, &e))?;
        let room = (most - bytes.len() as u64).min(piece.len() as u64) as usize;
        bytes.extend_from_slice(&piece[..room]);
        if room < piece.len() && all {
            return Err(RemoteError::Nonsense { url: url.to_owned(), what: format!("more than {most} bytes") });
        }
        if bytes.len() as u64 >= most && !all {
            return Ok(bytes);
        }
    }
}

fn silent(url: &str) -> RemoteError {
    let reason = format!("nothing came for {} s", SILENCE_MAX.as_secs());
    RemoteError::Unreachable { url: url.to_owned(), reason }
}

/// What lies at the bottom of an error says more than its surface.
fn unreachable(url: &str, error: &reqwest::Error) -> RemoteError {
    let mut reason: &dyn std::error::Error = error;
    while let Some(deeper) = reason.source() {
        reason = deeper;
    }
    RemoteError::Unreachable { url: url.to_owned(), reason: reason.to_string() }
}
