//! Talking to this machine's daemon over HTTP on loopback.
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use capstan_proto::keys::{KeyInfo, NewKey};
use capstan_proto::manage::{ClusterStatus, LoadEvent, LoadRequest, TicketReply};
use capstan_proto::pairing::{NearbyNode, PairingReply};
use capstan_proto::weights::{ModelOutcome, ModelStatus, NodeDisk, PullEvent, PullRequest};
use reqwest::{Method, Response, StatusCode};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use crate::daemon_file::{DaemonFile, Found};
use crate::lines::{LineTooLong, Lines};

/// How long a daemon on this machine may take to accept a connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);
/// How long a call may take that only looks something up.
const QUICK_TIMEOUT: Duration = Duration::from_secs(15);
/// How long a call may take that has to reach other nodes, or waits for processes to end.
const SLOW_TIMEOUT: Duration = Duration::from_secs(120);
/// How long a call may take that reads a whole model on all nodes: terabytes from slow disks.
const DISK_TIMEOUT: Duration = Duration::from_secs(8 * 3600);
/// Models are loaded anew, maybe several, and their shards may have to travel.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(2 * 3600);
/// Largest reply that is no stream, in bytes: a status of the largest cluster has about one million.
const REPLY_BYTES_MAX: usize = 16 << 20;

/// Why a call to the daemon failed.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// There is no daemon.
    #[error("no daemon is running here; start it with `capstan up`")]
    NotRunning,
    /// There was one.
    #[error("the daemon that ran here (process {pid}) has ended without tidying up; start it again with `capstan up`")]
    Stale {
        /// Its process.
        pid: u32,
    },
    /// `daemon.json` is there but of no use.
    #[error("{} cannot be read ({reason}); remove it and run `capstan up`", .path.display())]
    BadFile {
        /// The file.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// Nothing answers, or the connection broke.
    #[error("the daemon at {base} (process {pid}) does not answer: {reason}; its log may say why: {}", .log.display())]
    Unreachable {
        /// Its URL.
        base: String,
        /// Its process.
        pid: u32,
        /// What happened.
        reason: String,
        /// Where it logs.
        log: PathBuf,
    },
    /// The daemon answered with an error.
    #[error("{message}")]
    Refused {
        /// HTTP status.
        status: u16,
        /// The daemon's sentence.
        message: String,
    },
    /// What came is not what this version expects.
    #[error(
        "the daemon's answer cannot be understood ({0}); does it run another version? `capstan stop` and `capstan up` start it anew"
    )]
    Malformed(String),
    /// A line without end.
    #[error(transparent)]
    Line(#[from] LineTooLong),
}

/// A connection to this machine's daemon.
#[derive(Clone, Debug)]
pub struct Client {
    http: reqwest::Client,
    base: String,
    daemon: DaemonFile,
    data_dir: PathBuf,
}

impl Client {
    /// A client of the daemon that runs in a data folder.
    pub fn find(data_dir: &Path) -> Result<Self, ClientError> {
        match DaemonFile::find(data_dir) {
            Ok(Found::Running(daemon)) => Self::new(daemon, data_dir),
            Ok(Found::Stale(daemon)) => Err(ClientError::Stale { pid: daemon.pid }),
            Ok(Found::Nothing) => Err(ClientError::NotRunning),
            Err(e) => Err(ClientError::BadFile { path: data_dir.join("daemon.json"), reason: e.to_string() }),
        }
    }

    fn new(daemon: DaemonFile, data_dir: &Path) -> Result<Self, ClientError> {
        // No proxy: this is loopback, whatever the environment says about the rest of the world.
        let http = reqwest::Client::builder()
            .no_proxy()
            .connect_timeout(CONNECT_TIMEOUT)
            .build()
            .map_err(|e| ClientError::Malformed(e.to_string()))?;
        Ok(Self { http, base: format!("http://{}", daemon.api), daemon, data_dir: data_dir.into() })
    }

    /// The daemon this client talks to.
    pub fn daemon(&self) -> &DaemonFile {
        &self.daemon
    }

    /// What an OpenAI client takes as its base URL.
    pub fn openai_url(&self) -> String {
        format!("{}/v1", self.base)
    }

    /// Whether the daemon answers.
    pub async fn healthy(&self) -> bool {
        let reply = self.http.get(format!("{}/health", self.base)).timeout(CONNECT_TIMEOUT).send().await;
        // Any answer of the daemon's will do: a node without a model is up, too.
        reply.is_ok_and(|r| r.status().is_success() || r.status() == StatusCode::SERVICE_UNAVAILABLE)
    }

    /// The cluster as this node sees it.
    pub async fn status(&self) -> Result<ClusterStatus, ClientError> {
        self.call(Method::GET, "/capstan/v1/status", None, QUICK_TIMEOUT).await
    }

    /// Another join ticket.
    pub async fn ticket(&self, ttl_s: u64, reusable: bool) -> Result<TicketReply, ClientError> {
        let body = json!({ "ttl_s": ttl_s, "reusable": reusable });
        self.call(Method::POST, "/capstan/v1/ticket", Some(body), QUICK_TIMEOUT).await
    }

    /// Joins the cluster of a ticket.
    pub async fn join(&self, ticket: &str) -> Result<ClusterStatus, ClientError> {
        self.call(Method::POST, "/capstan/v1/join", Some(json!({ "ticket": ticket })), SLOW_TIMEOUT).await
    }

    /// Opens a pairing.
    pub async fn open_pairing(&self, ttl_s: u64) -> Result<PairingReply, ClientError> {
        self.call(Method::POST, "/capstan/v1/pair", Some(json!({ "ttl_s": ttl_s })), QUICK_TIMEOUT).await
    }

    /// Joins the cluster of a pairing code.
    pub async fn join_by_code(&self, code: &str, at: Option<SocketAddr>) -> Result<ClusterStatus, ClientError> {
        let body = json!({ "code": code, "at": at });
        self.call(Method::POST, "/capstan/v1/pair/join", Some(body), SLOW_TIMEOUT).await
    }

    /// Machines of the network that wait to be joined.
    pub async fn nearby(&self) -> Result<Vec<NearbyNode>, ClientError> {
        self.call(Method::GET, "/capstan/v1/nearby", None, QUICK_TIMEOUT).await
    }

    /// The API keys.
    pub async fn keys(&self) -> Result<Vec<KeyInfo>, ClientError> {
        self.call(Method::GET, "/capstan/v1/keys", None, QUICK_TIMEOUT).await
    }

    /// Makes an API key.
    pub async fn add_key(&self, name: &str, manage: bool) -> Result<NewKey, ClientError> {
        let body = json!({ "name": name, "manage": manage });
        self.call(Method::POST, "/capstan/v1/keys", Some(body), QUICK_TIMEOUT).await
    }

    /// Revokes the API keys of this name. The name was checked: it has nothing that means something in a path.
    pub async fn revoke_key(&self, name: &str) -> Result<(), ClientError> {
        self.send(Method::DELETE, &format!("/capstan/v1/keys/{name}"), None, QUICK_TIMEOUT).await.map(drop)
    }

    /// Leaves the cluster.
    pub async fn leave(&self) -> Result<(), ClientError> {
        self.send(Method::POST, "/capstan/v1/leave", Some(json!({})), SLOW_TIMEOUT).await.map(drop)
    }

    /// Takes another node out of the cluster for good.
    pub async fn remove_node(&self, name: &str) -> Result<ClusterStatus, ClientError> {
        self.call(Method::POST, "/capstan/v1/nodes/remove", Some(json!({ "name": name })), SLOW_TIMEOUT).await
    }

    /// Moves all stages away from a node, which takes as long as loading them elsewhere.
    pub async fn drain_node(&self, name: &str) -> Result<ClusterStatus, ClientError> {
        self.call(Method::POST, "/capstan/v1/nodes/drain", Some(json!({ "name": name })), DRAIN_TIMEOUT).await
    }

    /// Stops serving a model.
    pub async fn unload(&self, name: &str) -> Result<(), ClientError> {
        self.send(Method::POST, "/capstan/v1/unload", Some(json!({ "name": name })), SLOW_TIMEOUT).await.map(drop)
    }

    /// Asks the daemon to end. Its process may outlive the answer a little.
    pub async fn stop(&self, now: bool) -> Result<(), ClientError> {
        let path = if now { "/capstan/v1/stop?now=true" } else { "/capstan/v1/stop" };
        self.send(Method::POST, path, Some(json!({})), SLOW_TIMEOUT).await.map(drop)
    }

    /// Starts a load; its events follow one by one.
    pub async fn load(&self, request: &LoadRequest) -> Result<LoadEvents, ClientError> {
        let body = serde_json::to_value(request).map_err(|e| ClientError::Malformed(e.to_string()))?;
        let response = self.send(Method::POST, "/capstan/v1/load", Some(body), None).await?;
        Ok(LoadEvents(self.stream(response)))
    }

    /// Starts a pull, or watches one that is under way; its events follow one by one.
    pub async fn pull(&self, request: &PullRequest) -> Result<PullEvents, ClientError> {
        let body = serde_json::to_value(request).map_err(|e| ClientError::Malformed(e.to_string()))?;
        let response = self.send(Method::POST, "/capstan/v1/pull", Some(body), None).await?;
        Ok(PullEvents(self.stream(response)))
    }

    /// The models that were pulled.
    pub async fn models(&self) -> Result<Vec<ModelStatus>, ClientError> {
        self.call(Method::GET, "/capstan/v1/models", None, QUICK_TIMEOUT).await
    }

    /// Verifies, removes or exports a model that was pulled: it takes as long as reading it.
    pub async fn act_on_model(&self, act: &str, name: &str, path: Option<&str>) -> Result<ModelOutcome, ClientError> {
        let body = json!({ "name": name, "path": path });
        self.call(Method::POST, &format!("/capstan/v1/models/{act}"), Some(body), DISK_TIMEOUT).await
    }

    /// What lies on which disk.
    pub async fn disk(&self) -> Result<Vec<NodeDisk>, ClientError> {
        self.call(Method::GET, "/capstan/v1/disk", None, QUICK_TIMEOUT).await
    }

    /// Asks for a whole completion.
    pub async fn complete(&self, body: Value, timeout: Duration) -> Result<Value, ClientError> {
        self.call(Method::POST, "/v1/completions", Some(body), timeout).await
    }

    /// Asks for a streamed chat answer; the lines of its event stream follow.
    pub async fn chat(&self, body: Value) -> Result<LineStream, ClientError> {
        let response = self.send(Method::POST, "/v1/chat/completions", Some(body), None).await?;
        Ok(self.stream(response))
    }

    fn stream(&self, response: Response) -> LineStream {
        LineStream { response: Some(response), lines: Lines::default(), client: self.clone() }
    }

    async fn call<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: Option<Value>,
        timeout: Duration,
    ) -> Result<T, ClientError> {
        let response = self.send(method, path, body, timeout).await?;
        let bytes = self.body(response).await?;
        serde_json::from_slice(&bytes).map_err(|e| ClientError::Malformed(e.to_string()))
    }

    async fn send(
        &self,
        method: Method,
        path: &str,
        body: Option<Value>,
        timeout: impl Into<Option<Duration>>,
    ) -> Result<Response, ClientError> {
        let mut request = self.http.request(method, format!("{}{path}", self.base)).bearer_auth(&self.daemon.token);
        if let Some(body) = body {
            request = request.json(&body);
        }
        if let Some(timeout) = timeout.into() {
            request = request.timeout(timeout);
        }
        let response = request.send().await.map_err(|e| self.unreachable(e))?;
        let status = response.status();
        if status.is_success() {
            return Ok(response);
        }
        let body = self.body(response).await?;
        let sentence = serde_json::from_slice::<Value>(&body)
            .ok()
            .and_then(|v| v.pointer("/error/message")?.as_str().map(crate::view::plain_text));
        let message = sentence.unwrap_or_else(|| format!("the daemon answered {path} with HTTP {status}"));
        Err(ClientError::Refused { status: status.as_u16(), message })
    }

    async fn body(&self, mut response: Response) -> Result<Vec<u8>, ClientError> {
        let mut bytes = Vec::new();
        while let Some(chunk) = response.chunk().await.map_err(|e| self.unreachable(e))? {
            bytes.extend_from_slice(&chunk);
            if bytes.len() > REPLY_BYTES_MAX {
                return Err(ClientError::Malformed(format!("more than {REPLY_BYTES_MAX} bytes")));
            }
        }
        Ok(bytes)
    }

    fn unreachable(&self, error: reqwest::Error) -> ClientError {
        let reason = if error.is_timeout() {
            "it took too long".to_string()
        } else if error.is_connect() {
            "nothing listens there".to_string()
        } else {
            let mut innermost: &dyn std::error::Error = &error;
            while let Some(source) = innermost.source() {
                innermost = source;
            }
            format!("the connection broke ({innermost})")
        };
        ClientError::Unreachable {
            base: self.base.clone(),
            pid: self.daemon.pid,
            reason,
            log: crate::daemon_file::log_path(&self.data_dir),
        }
    }
}

/// Lines of a streamed reply, as they come. Dropping it ends the call.
#[derive(Debug)]
pub struct LineStream {
    response: Option<Response>,
    lines: Lines,
    client: Client,
}

impl LineStream {
    /// The next line; none at the end.
    pub async fn next_line(&mut self) -> Result<Option<String>, ClientError> {
        loop {
            if let Some(line) = self.lines.next_line() {
                return Ok(Some(line));
            }
            let Some(response) = &mut self.response else {
                return Ok(self.lines.rest());
            };
            match response.chunk().await.map_err(|e| self.client.unreachable(e))? {
                Some(chunk) => self.lines.push(&chunk)?,
                None => self.response = None,
            }
        }
    }
}

/// The events of a load, as they come.
#[derive(Debug)]
pub struct LoadEvents(LineStream);

impl LoadEvents {
    /// The next event; none at the end. Kinds that a newer daemon may add are passed over.
    pub async fn next(&mut self) -> Result<Option<LoadEvent>, ClientError> {
        self.0.next_event().await
    }
}

/// The events of a pull, as they come.
#[derive(Debug)]
pub struct PullEvents(LineStream);

impl PullEvents {
    /// The next event; none at the end. Kinds that a newer daemon may add are passed over.
    pub async fn next(&mut self) -> Result<Option<PullEvent>, ClientError> {
        self.0.next_event().await
    }
}

impl LineStream {
    async fn next_event<T: DeserializeOwned>(&mut self) -> Result<Option<T>, ClientError> {
        while let Some(line) = self.next_line().await? {
            if line.trim().is_empty() {
                continue;
            }
            match serde_json::from_str(&line) {
                Ok(event) => return Ok(Some(event)),
                Err(e) => {
                    let value: Value =
                        serde_json::from_str(&line).map_err(|e| ClientError::Malformed(e.to_string()))?;
                    if let Some(message) = value.pointer("/error/message").and_then(Value::as_str) {
                        return Err(ClientError::Refused { status: 500, message: crate::view::plain_text(message) });
                    }
                    tracing::debug!("an event was not understood and passed over: {e}");
                }
            }
        }
        Ok(None)
    }
}
