//! Load, status, tickets: what the command line and the daemon exchange, and what `--json` prints.
use std::net::SocketAddr;

use serde::{Deserialize, Serialize};

use crate::device::DeviceProfile;
use crate::{ClusterId, DeploymentId, Epoch, LayerRange, NodeId};

/// Serve this model.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct LoadRequest {
    /// Path of a GGUF on the node that is asked (of the first file, when it is split).
    pub path: String,
    /// Name to serve it by; none takes the file's name without `.gguf`.
    #[serde(default)]
    pub name: Option<String>,
    /// Nodes to use, by name or id, in pipeline order; empty lets the planner choose.
    #[serde(default)]
    pub nodes: Vec<String>,
    /// Which node holds which layers, in pipeline order; empty lets the planner choose.
    #[serde(default)]
    pub layers: Vec<(String, LayerRange)>,
    /// Tokens a slot holds; none takes the model's own context, at most 4096.
    #[serde(default)]
    pub ctx: Option<u32>,
    /// Sequences at once; none is 4.
    #[serde(default)]
    pub slots: Option<u32>,
    /// Most sequences decoded in one micro-batch; none is as many as there are slots.
    #[serde(default)]
    pub decode_batch: Option<u32>,
    /// Whether idle stages verify guessed tokens; none is yes.
    #[serde(default)]
    pub speculation: Option<bool>,
    /// Path of a draft model's GGUF on the node that is asked; its vocabulary must be the model's.
    #[serde(default)]
    pub draft: Option<String>,
    /// Whether a new prompt takes what an earlier sequence left in the caches; none is yes.
    #[serde(default)]
    pub prefix_cache: Option<bool>,
    /// How many times as long a decode step may take while prompts come in; none is 1.75.
    #[serde(default)]
    pub decode_slowdown: Option<f32>,
    /// What the placement is to be best at; none is [`Objective::Latency`].
    #[serde(default)]
    pub objective: Option<Objective>,
    /// Make up weights of the model's shape on each node instead of bringing its own there; none serves the model.
    #[serde(default)]
    pub rehearsal: Option<Rehearsal>,
}

/// What a placement is to be best at.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Objective {
    /// The shortest way of a token through all stages.
    #[default]
    Latency,
    /// The fastest slowest stage; among equals the shortest way.
    Throughput,
    /// The shortest way among those nearly as good for throughput.
    Balanced,
}

impl Objective {
    /// Its name, as people write it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Latency => "latency",
            Self::Throughput => "throughput",
            Self::Balanced => "balanced",
        }
    }
}

/// How a model is rehearsed: loaded and computed on as it would be, with weights that are made up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rehearsal {
    /// Take memory only for weights that are read, and let every token choose the same experts, so that a model can be
    /// loaded which is far larger than the memory. Says nothing about speed.
    #[serde(default)]
    pub sparse: bool,
}

/// How fast a placement will be, by what was measured of its nodes and links.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LoadForecast {
    /// By prompt length, on idle nodes.
    pub first_token: Vec<FirstTokenForecast>,
    /// By number of sequences and depth.
    pub decode: Vec<DecodeForecast>,
    /// By stage: the memory that its process will hold at most once a context was filled, in bytes; 0 where that is not
    /// known. What was planned for it is never less, for a stage may come to use all of that.
    #[serde(default)]
    pub resident_bytes: Vec<u64>,
    /// How long each stage's node reads its shard when the model is loaded again, the slowest one, in seconds.
    #[serde(default)]
    pub load_s: f64,
}

/// Time to the first token.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct FirstTokenForecast {
    /// Tokens of the prompt.
    pub prompt_tokens: u32,
    /// Until the first token of the answer.
    pub seconds: f64,
}

/// Tokens per second.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct DecodeForecast {
    /// Sequences at once.
    pub sequences: u32,
    /// Tokens before each.
    pub depth_tokens: u64,
    /// Of all of them together.
    pub tokens_per_s: f64,
}

/// How a load goes. The last event is `Ready` or `Failed`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum LoadEvent {
    /// The placement that was chosen, with its reasons.
    Planned {
        /// Stages in order.
        stages: Vec<PlannedStage>,
        /// For people: why it is so.
        explanation: Vec<String>,
        /// How fast it will be; none while a node or link was not measured.
        forecast: Option<LoadForecast>,
    },
    /// A stage's shard is being written on the node that has the model.
    Cutting {
        /// Which stage.
        stage: u16,
        /// Bytes written.
        done_bytes: u64,
        /// Bytes in all.
        total_bytes: u64,
    },
    /// A stage's shard is on its way to its node.
    Transfer {
        /// Which stage.
        stage: u16,
        /// Bytes there.
        done_bytes: u64,
        /// Bytes in all.
        total_bytes: u64,
    },
    /// A stage's compute process reads its weights.
    Loading {
        /// Which stage.
        stage: u16,
        /// 0 to 1000.
        permille: u16,
    },
    /// A stage is loaded.
    Loaded {
        /// Which stage.
        stage: u16,
    },
    /// Requests are answered.
    Ready {
        /// What serves them.
        deployment: DeploymentStatus,
    },
    /// Nothing was left behind.
    Failed {
        /// What happened and what to do.
        message: String,
    },
}

/// One stage of a placement.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlannedStage {
    /// Where.
    pub node: NodeId,
    /// Its name.
    pub node_name: String,
    /// What.
    pub layers: LayerRange,
    /// Size of its shard in bytes.
    pub shard_bytes: u64,
    /// Memory it is expected to take in bytes.
    pub memory_bytes: u64,
}

/// A management call that failed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct ManageError {
    /// HTTP status that says what kind of error: 400 the caller's, 404 no such thing, 409 not now, 500 ours, 502 a peer's.
    pub status: u16,
    /// What happened and what to do.
    pub message: String,
}

impl ManageError {
    /// An error with this HTTP status and sentence.
    pub fn new(status: u16, message: impl Into<String>) -> Self {
        Self { status, message: message.into() }
    }
}

/// What computes on a node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceStatus {
    /// As the backend names it.
    pub name: String,
    /// For people.
    pub description: String,
    /// `cpu`, `gpu`, `igpu` or `accel`.
    pub kind: String,
    /// Memory in bytes.
    pub memory_total_bytes: u64,
    /// Of which free.
    pub memory_free_bytes: u64,
}

/// A node as another sees it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeStatus {
    /// Its key.
    pub id: NodeId,
    /// Its name, unique in the cluster.
    pub name: String,
    /// Version of capstan it runs.
    pub version: String,
    /// Where its daemon is dialled.
    pub addrs: Vec<SocketAddr>,
    /// Whether it answered lately. The asked node itself always did.
    pub online: bool,
    /// Whether this is the node that was asked.
    pub is_self: bool,
    /// Round trip in microseconds, measured by the last poll; none for the asked node.
    pub rtt_us: Option<u64>,
    /// Main memory in bytes.
    pub memory_total_bytes: u64,
    /// Of which free for stages.
    pub memory_free_bytes: u64,
    /// What computes.
    pub devices: Vec<DeviceStatus>,
    /// What was measured of it; none before.
    #[serde(default)]
    pub profile: Option<DeviceProfile>,
    /// The links that it has measured, each by one of its ends.
    #[serde(default)]
    pub links: Vec<LinkStatus>,
    /// Whether it votes on what the cluster agrees on; the others learn it.
    #[serde(default)]
    pub votes: bool,
}

/// A link between two nodes, as the one that has this measured it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LinkStatus {
    /// The other end.
    pub to: NodeId,
    /// Round trip of a request, in microseconds.
    pub rtt_us: u64,
    /// Bytes per second to the other end.
    pub up_bytes_per_s: u64,
    /// Bytes per second from it.
    pub down_bytes_per_s: u64,
    /// When, in seconds since 1970.
    pub measured_unix_s: u64,
}

/// How a deployment is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Health {
    /// Being brought up.
    Loading,
    /// Answers.
    Ready,
    /// A stage was lost and is being started again.
    Recovering,
    /// It cannot be brought back by itself; the detail says why.
    Failed,
}

/// One stage of a deployment.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StageStatus {
    /// Index from 0; the last is the driver.
    pub stage: u16,
    /// Where.
    pub node: NodeId,
    /// Its name.
    pub node_name: String,
    /// What.
    pub layers: LayerRange,
    /// Process of the stage; none while it is down.
    pub pid: Option<u32>,
    /// Size of the shard in bytes.
    pub shard_bytes: u64,
    /// Weights, KV and compute buffers in bytes, as the process measured them.
    pub memory_bytes: u64,
    /// Of which KV cache and other memory of sequences.
    #[serde(default)]
    pub kv_bytes: u64,
    /// Of which compute buffers.
    #[serde(default)]
    pub compute_bytes: u64,
    /// The devices that compute, for people.
    pub device: String,
    /// How it is.
    pub health: Health,
    /// Counters of the stage.
    pub stats: crate::child::ChildStats,
}

/// A model being served.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeploymentStatus {
    /// Its number.
    pub id: DeploymentId,
    /// Its name: `model` in a request.
    pub name: String,
    /// BLAKE3 of what identifies the weights, hexadecimal; empty when unknown.
    pub model_hash: String,
    /// Architecture.
    pub architecture: String,
    /// Layers in all.
    pub layers: u32,
    /// The epoch applied.
    pub epoch: Epoch,
    /// How it is.
    pub health: Health,
    /// For people: the last trouble, or why it runs whole; empty when there is nothing to say.
    pub detail: String,
    /// Node that has the model and looks after the deployment.
    pub coordinator: NodeId,
    /// Tokens a slot holds.
    pub ctx: u32,
    /// Sequences at once.
    pub slots: u32,
    /// Stages in pipeline order.
    pub stages: Vec<StageStatus>,
    /// When it was loaded, in seconds since 1970.
    pub created_unix_s: u64,
}

/// The cluster as one node sees it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClusterStatus {
    /// Its number.
    pub cluster: ClusterId,
    /// Version of capstan of the node that answers.
    pub version: String,
    /// Members, the answering one first.
    pub nodes: Vec<NodeStatus>,
    /// What is served.
    pub deployments: Vec<DeploymentStatus>,
    /// Who votes, and why nothing can be changed if so; for people.
    #[serde(default)]
    pub agreement: String,
    /// What the answering node has noticed that somebody should look at; for people.
    #[serde(default)]
    pub warnings: Vec<String>,
}

/// A new ticket, and until when it is good.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TicketReply {
    /// What `capstan join` takes.
    pub ticket: String,
    /// In seconds since 1970.
    pub expires_unix_s: u64,
    /// Whether several nodes may use it.
    pub reusable: bool,
}

// Without the ticket: whoever has it may join.
impl std::fmt::Debug for TicketReply {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TicketReply")
            .field("expires_unix_s", &self.expires_unix_s)
            .field("reusable", &self.reusable)
            .finish_non_exhaustive()
    }
}
