//! Real daemons on loopback, driven by the same commands and HTTP calls that a user has.
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use capstan_proto::manage::{ClusterStatus, DeploymentStatus, Health};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::process::{Child, Command};

/// A condition that has not come true after this long never will: loading SmolLM2 three times takes seconds.
const PATIENCE: Duration = Duration::from_secs(120);
/// Between two looks at a condition that nobody announces.
const LOOK_AGAIN: Duration = Duration::from_millis(50);

/// A daemon in a process of its own.
pub struct Daemon {
    pub name: String,
    pub data_dir: PathBuf,
    pub api: String,
    pub token: String,
    pub http: reqwest::Client,
    process: Child,
    place: Place,
}

/// Where a daemon runs: how a command is run there, and the addresses that it has for others, if it is not loopback.
#[derive(Clone, Default)]
pub struct Place {
    pub run: Vec<String>,
    pub addrs: Option<(String, String)>,
}

/// Daemons with data folders of their own, gone with everything they started when this is dropped.
pub struct Cluster {
    pub nodes: Vec<Daemon>,
    pub folder: TempDir,
}

/// Runs the command line tool: whether it succeeded, its output and its errors.
pub async fn try_capstan(data_dir: &Path, args: &[&str]) -> (bool, String, String) {
    let output = command(data_dir).args(args).stdin(Stdio::null()).output().await.expect("capstan starts");
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (output.status.success(), text(&output.stdout), text(&output.stderr))
}

/// The command line tool on a data folder, in a clean environment.
pub fn command(data_dir: &Path) -> Command {
    command_at(&Place::default(), data_dir)
}

fn command_at(place: &Place, data_dir: &Path) -> Command {
    const CAPSTAN: &str = env!("CARGO_BIN_EXE_capstan");
    let mut command = match place.run.split_first() {
        Some((program, args)) => {
            let mut command = Command::new(program);
            command.args(args).arg(CAPSTAN);
            command
        }
        None => Command::new(CAPSTAN),
    };
    // Nothing of the machine's own set-up may leak in.
    for (key, _) in std::env::vars_os() {
        if key.to_string_lossy().starts_with("CAPSTAN_") {
            command.env_remove(key);
        }
    }
    command
        .arg("--data-dir")
        .arg(data_dir)
        .env("XDG_CONFIG_HOME", data_dir)
        .env("CAPSTAN_API_ADDR", "127.0.0.1:0")
        .env("CAPSTAN_BIND_ADDR", "127.0.0.1:0")
        .env("CAPSTAN_THREADS", "1")
        // Several daemons on one machine would measure each other.
        .env("CAPSTAN_MEASURE", "off");
    if let Some((bind, listen)) = &place.addrs {
        command.env("CAPSTAN_BIND_ADDR", bind).env("CAPSTAN_LISTEN", listen).env("CAPSTAN_NO_AUTH", "true");
    }
    command
}

/// Looks until `look` gives something.
pub async fn wait_for<T, F: Future<Output = Option<T>>>(what: &str, mut look: impl FnMut() -> F) -> T {
    let patience = tokio::time::timeout(PATIENCE, async {
        let mut tick = tokio::time::interval(LOOK_AGAIN);
        loop {
            tick.tick().await;
            if let Some(found) = look().await {
                return found;
            }
        }
    });
    patience.await.unwrap_or_else(|_| panic!("never came true: {what}"))
}

impl Daemon {
    /// Starts a daemon and waits until its API answers.
    pub async fn start(name: &str, data_dir: &Path) -> Self {
        Self::start_with(name, data_dir, &[]).await
    }

    /// The same with these variables in its environment.
    pub async fn start_with(name: &str, data_dir: &Path, env: &[(&str, &str)]) -> Self {
        Self::start_at(Place::default(), name, data_dir, env).await
    }

    /// Starts this daemon's folder again where it was.
    pub async fn again(&self) -> Self {
        let mut daemon = Self::start_at(self.place.clone(), &self.name, &self.data_dir, &[]).await;
        if self.place.addrs.is_some() {
            daemon.token.clone_from(&self.token);
        }
        daemon
    }

    /// The same somewhere.
    pub async fn start_at(place: Place, name: &str, data_dir: &Path, env: &[(&str, &str)]) -> Self {
        std::fs::create_dir_all(data_dir).expect("a data folder");
        let log = std::fs::File::options().create(true).append(true).open(data_dir.join("test.log"));
        let log = log.expect("a log file");
        let mut process = command_at(&place, data_dir)
            .env("CAPSTAN_NAME", name)
            .envs(env.iter().copied())
            .args(["up", "--foreground"])
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("a log file"))
            .stderr(log)
            .kill_on_drop(true)
            .spawn()
            .expect("capstan starts");
        let http = reqwest::Client::new();
        let file = data_dir.join("daemon.json");
        let mut exited = None;
        let (api, token) = wait_for("a daemon's API answers", || {
            exited = exited.or(process.try_wait().ok().flatten());
            assert!(exited.is_none(), "{name} ended: {}", std::fs::read_to_string(data_dir.join("test.log")).unwrap());
            let (http, file, listen) = (http.clone(), file.clone(), place.addrs.clone().map(|(_, listen)| listen));
            async move {
                let info: Value = serde_json::from_slice(&std::fs::read(file).ok()?).ok()?;
                let api = listen.or_else(|| info["api"].as_str().map(str::to_owned))?;
                http.get(format!("http://{api}/health")).send().await.ok()?.error_for_status().ok()?;
                Some((api, info["token"].as_str()?.to_owned()))
            }
        })
        .await;
        Self { name: name.into(), data_dir: data_dir.into(), api, token, http, process, place }
    }

    /// The cluster as this node sees it.
    pub async fn status(&self) -> ClusterStatus {
        let url = format!("http://{}/capstan/v1/status", self.api);
        let reply = self.http.get(url).bearer_auth(&self.token).send().await.expect("the API answers");
        reply.json().await.expect("a status")
    }

    /// The deployment of this name, when this node knows it.
    pub async fn deployment(&self, name: &str) -> Option<DeploymentStatus> {
        self.status().await.deployments.into_iter().find(|d| d.name == name)
    }

    /// Waits until the deployment is ready in an epoch after `epoch`.
    pub async fn wait_ready(&self, name: &str, epoch: u64) -> DeploymentStatus {
        wait_for("the deployment is ready again", || async {
            self.deployment(name).await.filter(|d| d.health == Health::Ready && d.epoch.0 > epoch)
        })
        .await
    }

    /// POSTs JSON: the HTTP status and the JSON answer.
    pub async fn post(&self, path: &str, body: &Value) -> (u16, Value) {
        let reply = self.http.post(format!("http://{}{path}", self.api)).json(body).send().await.expect("an answer");
        (reply.status().as_u16(), reply.json().await.unwrap_or(Value::Null))
    }

    /// A streaming chat: all `data:` payloads, parsed, up to the end of the stream.
    pub async fn stream(&self, body: &Value) -> Vec<Value> {
        let url = format!("http://{}/v1/chat/completions", self.api);
        let reply = self.http.post(url).json(body).send().await.expect("an answer");
        assert_eq!(reply.status(), 200);
        let text = reply.text().await.expect("the stream ends");
        let payloads = text.lines().filter_map(|l| l.strip_prefix("data: ")).filter(|p| *p != "[DONE]");
        payloads.map(|p| serde_json::from_str(p).expect("JSON")).collect()
    }

    /// Runs the command line tool against this daemon and gives what it printed; panics when it fails.
    pub async fn cli(&self, args: &[&str]) -> String {
        let mut command = command_at(&self.place, &self.data_dir);
        let output = command.args(args).stdin(Stdio::null()).output().await.expect("capstan starts");
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let (stdout, stderr) = (text(&output.stdout), text(&output.stderr));
        assert!(output.status.success(), "capstan {args:?} failed:\n{stdout}\n{stderr}");
        stdout
    }

    /// Kills the daemon as a power cut would.
    pub async fn kill(&mut self) {
        self.process.kill().await.expect("the daemon lived");
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let log = std::fs::read_to_string(self.data_dir.join("test.log")).unwrap_or_default();
            let tail: Vec<&str> = log.lines().rev().take(40).collect();
            eprintln!("--- log of {}:", self.name);
            tail.iter().rev().for_each(|line| eprintln!("{line}"));
        }
    }
}

impl Cluster {
    /// Starts these daemons and joins all to the first by tickets.
    pub async fn start(names: &[&str]) -> Self {
        Self::start_at(names, &vec![Place::default(); names.len()]).await
    }

    /// The same with a place for each.
    pub async fn start_at(names: &[&str], places: &[Place]) -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let mut nodes = Vec::new();
        for (name, place) in names.iter().zip(places) {
            nodes.push(Daemon::start_at(place.clone(), name, &folder.path().join(name), &[]).await);
        }
        for node in &nodes[1..] {
            let ticket = nodes[0].cli(&["ticket", "--json"]).await;
            let ticket: Value = serde_json::from_str(&ticket).expect("a ticket as JSON");
            node.cli(&["join", ticket["ticket"].as_str().expect("a ticket")]).await;
        }
        if places[0].addrs.is_some() {
            // A token opens the door of its own machine only, a key all doors.
            let key = nodes[0].cli(&["key", "add", "test", "--manage"]).await;
            nodes.iter_mut().for_each(|node| node.token = key.trim().to_owned());
        }
        let cluster = Self { nodes, folder };
        for node in &cluster.nodes {
            wait_for("every node sees every other", || async {
                let nodes = node.status().await.nodes;
                (nodes.len() == names.len() && nodes.iter().all(|n| n.online)).then_some(())
            })
            .await;
        }
        cluster
    }

    /// Loads a model from the first node's disk as one stage on each node; its layers are not copied.
    pub async fn load(&self, path: &Path, name: &str, more: &[&str]) -> DeploymentStatus {
        let names: Vec<&str> = self.nodes.iter().map(|n| n.name.as_str()).collect();
        let (path, nodes) = (path.to_str().expect("UTF-8"), names.join(","));
        self.nodes[0]
            .cli(&[&["load", path, "--name", name, "--nodes", &nodes, "--replicas", "0"], more].concat())
            .await;
        self.nodes[0].deployment(name).await.expect("the deployment is there")
    }
}

/// A greedy chat request.
pub fn chat(model: &str, text: &str, max_tokens: u32) -> Value {
    json!({
        "model": model,
        // Without a system prompt this very small model answers in French.
        "messages": [
            { "role": "system", "content": "You are a helpful assistant." },
            { "role": "user", "content": text },
        ],
        "max_tokens": max_tokens,
        "temperature": 0,
    })
}
