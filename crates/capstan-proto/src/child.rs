//! The daemon and its compute child, over the child's standard input and output.
//!
//! The order: the child says [`FromChild::Hello`]; the daemon sends [`ToChild::Load`] once; the child answers
//! `LoadProgress`* and `Loaded` or `Failed`; then [`ToChild::Connect`] wires it into a pipeline, as often as the
//! placement's epoch changes, without loading again. When standard input ends, the child ends: a dead daemon leaves no
//! child behind.
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::data::Rollback;
use crate::generate::{GenerateEvent, GenerateRequest};
use crate::{DeploymentId, Epoch, LayerRange, RequestId};

/// Version of this protocol. Daemon and child are the same binary, so they differ only while it is being replaced.
pub const CHILD_VERSION: u32 = 5;

/// Where a stage can be reached, and the key it must prove to hold.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PeerAddr {
    /// The ed25519 public key of the child's endpoint, made anew for each process.
    pub key: [u8; 32],
    /// Where to dial.
    pub addrs: Vec<SocketAddr>,
}

/// How hidden states enter and leave a stage; what the architecture table says of a window.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct WindowIo {
    /// Name of the graph node that holds the window's last hidden state; none for the last window.
    pub capture: Option<String>,
    /// Floats of a hidden state between stages.
    pub hidden_width: u32,
    /// What a looked-up embedding row is multiplied by before it enters the first stage.
    pub embedding_scale: f32,
}

/// How a deployment schedules. Every stage is told, for snapshots of guesses take room in its caches.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Scheduling {
    /// Most guessed tokens of a sequence that are under way; 0 turns speculation off.
    pub speculation_depth: u16,
    /// Driver only: the draft model's GGUF, whole.
    pub draft: Option<PathBuf>,
    /// Whether a new prompt takes what an earlier sequence left in the caches.
    pub prefix_cache: bool,
    /// How long a decode step may take while prompts come in, in percent of what it takes without them.
    pub decode_slowdown_percent: u16,
    /// How guesses and cached prefixes are taken back.
    pub rollback: Rollback,
}

impl Scheduling {
    /// Sequences that every stage keeps beyond the slots: snapshots before guesses, where guesses cannot be trimmed.
    pub fn spares(&self) -> u32 {
        if self.rollback == Rollback::Copy { u32::from(self.speculation_depth) } else { 0 }
    }
}

impl Default for Scheduling {
    /// Everything on but a draft model; guesses two deep; a decode step takes at most 1.75 times as long.
    fn default() -> Self {
        Self {
            speculation_depth: 2,
            draft: None,
            prefix_cache: true,
            decode_slowdown_percent: 175,
            rollback: Rollback::Trim,
        }
    }
}

/// What a child loads and how large it makes its caches.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StageSpec {
    /// The deployment.
    pub deployment: DeploymentId,
    /// Its name, for messages to people.
    pub model_name: String,
    /// The GGUF to load: a shard, or the whole model when `stages` is 1.
    pub shard: PathBuf,
    /// The layers in it.
    pub layers: LayerRange,
    /// Index of the stage, from 0; the last one is the driver.
    pub stage: u16,
    /// How many stages.
    pub stages: u16,
    /// How hidden states enter and leave.
    pub io: WindowIo,
    /// Tokens that a slot holds.
    pub ctx: u32,
    /// Sequences at once.
    pub slots: u32,
    /// Most rows of a micro-batch.
    pub ubatch: u32,
    /// Most sequences decoded in one micro-batch; 1 makes every answer independent of what runs beside it, bit for bit.
    pub decode_batch: u32,
    /// Speculation, prefix reuse, the share of prefill.
    pub scheduling: Scheduling,
    /// Compute threads; none takes every core that the process may use.
    pub threads: Option<u32>,
    /// Layers to offload to a GPU; negative is all.
    pub gpu_layers: i32,
    /// Address to listen on for the previous stage.
    pub bind: IpAddr,
    /// Take memory only for weights that are read: nothing is read ahead, and none are copied into another form. For a
    /// rehearsal of a model that is larger than the memory.
    pub sparse: bool,
}

/// A stage's place in the ring: it dials `next` and accepts `prev`. The driver's `next` is stage 0. Both are none for a
/// single stage.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Wiring {
    /// The new epoch. KV caches are emptied, and requests in flight fail with `StageLost`.
    pub epoch: Epoch,
    /// Who sends to this stage.
    pub prev: Option<PeerAddr>,
    /// Whom this stage sends to.
    pub next: Option<PeerAddr>,
}

/// Where a stage keeps KV snapshots, so that its successor finds them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotSpec {
    /// A folder in memory that belongs to this stage of this deployment alone.
    pub folder: PathBuf,
    /// Most bytes in it.
    pub bytes_max: u64,
}

/// Daemon to child.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum ToChild {
    /// Load the shard. Once.
    Load {
        /// What, and how.
        spec: Box<StageSpec>,
        /// Where KV snapshots go; none keeps none.
        snapshots: Option<SnapshotSpec>,
    },
    /// Driver only, before each `Connect`: whether every stage of that ring keeps KV snapshots. Without this none does.
    Snapshots(bool),
    /// Take this place from now on.
    Connect(Wiring),
    /// Driver only: answer this request.
    Submit {
        /// Named by the daemon, unique among the child's live requests.
        request: RequestId,
        /// What is asked.
        body: Box<GenerateRequest>,
    },
    /// Driver only: the client is gone; free its slot.
    Cancel {
        /// Which.
        request: RequestId,
    },
    /// End.
    Shutdown,
    /// Answer with [`FromChild::Pong`]: a process that is frozen does not.
    Ping,
}

/// What a loaded stage measures.
#[derive(Clone, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct StageInfo {
    /// Operating-system process.
    pub pid: u32,
    /// The devices that compute, for people.
    pub device: String,
    /// Bytes of weights.
    pub weights_bytes: u64,
    /// Of which so many are held in memory of their own beside the mapped file: rearranged for the processor, or on a
    /// device.
    pub copied_bytes: u64,
    /// Bytes of KV cache and other memory of sequences.
    pub kv_bytes: u64,
    /// Bytes of compute buffers.
    pub compute_bytes: u64,
}

/// Counters of a running child, sent about once a second.
#[derive(Clone, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct ChildStats {
    /// Micro-batches computed in this epoch.
    pub micro_batches: u64,
    /// Rows computed in this epoch.
    pub rows: u64,
    /// Time spent computing in this epoch, in microseconds.
    pub busy_us: u64,
    /// Driver only: slots in use.
    pub slots_used: u32,
    /// Driver only: requests that wait for a slot.
    pub queued: u32,
    /// Driver only: tokens guessed in this epoch.
    pub guessed: u64,
    /// Driver only: guesses that were right.
    pub accepted: u64,
    /// Driver only: guesses that were not computed by every stage, for they were known to be wrong before.
    pub dropped: u64,
    /// Driver only: tokens of the prompts that were admitted in this epoch.
    pub prompt_tokens: u64,
    /// Driver only: of these, tokens taken from a cached prefix.
    pub cached_tokens: u64,
    /// Bytes sent to the next stage in this epoch.
    pub bytes_sent: u64,
    /// Most memory that the process has held at once since it started, weights that are mapped included, in bytes; 0
    /// where the system does not tell.
    #[serde(default)]
    pub peak_rss_bytes: u64,
}

/// Child to daemon.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum FromChild {
    /// Right after the start.
    Hello {
        /// [`CHILD_VERSION`].
        version: u32,
    },
    /// Weights read so far, in thousandths.
    LoadProgress {
        /// 0 to 1000.
        permille: u16,
    },
    /// Ready to be wired.
    Loaded {
        /// Where this stage listens.
        addr: PeerAddr,
        /// What it measures.
        info: StageInfo,
    },
    /// Both links of this epoch stand. Micro-batches may flow.
    Connected {
        /// Which.
        epoch: Epoch,
    },
    /// Something happened to a request.
    Event {
        /// Which.
        request: RequestId,
        /// What.
        event: Box<GenerateEvent>,
    },
    /// The epoch cannot go on: a link broke or a computation failed. The child lives and waits for another `Connect`.
    Lost {
        /// Which.
        epoch: Epoch,
        /// For people.
        reason: String,
    },
    /// Loading failed; the child ends.
    Failed {
        /// For people: what happened and what to do.
        reason: String,
    },
    /// Counters.
    Stats(ChildStats),
    /// The answer to [`ToChild::Ping`].
    Pong,
}
