//! What a node is told when it starts.
use std::ffi::OsString;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use capstan_proto::control::Hello;

/// One micro-batch of a large model may take a slow machine a minute; nothing healthy takes five.
const STALL_LIMIT: Duration = Duration::from_secs(300);
/// Service managers kill after 90 seconds what has not ended by itself.
const DRAIN_LIMIT: Duration = Duration::from_secs(60);
/// A machine that restarts is back within this time; whoever waits longer wants to know.
const RESUME_LIMIT: Duration = Duration::from_secs(600);

/// When a node looks whether a model would be better off elsewhere.
#[derive(Clone, Copy, Debug)]
pub struct Moves {
    /// Between two looks.
    pub look_every: Duration,
    /// A model is watched for so long before its use is believed.
    pub watched_min: Duration,
}

impl Default for Moves {
    /// Once a minute, after ten minutes.
    fn default() -> Self {
        Self { look_every: Duration::from_secs(60), watched_min: Duration::from_secs(600) }
    }
}

/// What a node is told when it starts.
#[derive(Clone, Debug)]
pub struct NodeConfig {
    /// Where it keeps its key, its cluster and its shards. Made when missing.
    pub data_dir: PathBuf,
    /// Its name; none takes the one it had, else the machine's.
    pub name: Option<String>,
    /// UDP address for other nodes. Port 0 takes the port of the last start if it is free, else any.
    pub bind_addr: SocketAddr,
    /// Compute threads of each stage; none takes every core.
    pub threads: Option<u32>,
    /// Most memory that stages may take here, in bytes; none is what the machine has free.
    pub memory_limit_bytes: Option<u64>,
    /// Layers to offload to a GPU; negative is all.
    pub gpu_layers: i32,
    /// Whether it measures its machine and links while nothing runs.
    pub measure: bool,
    /// Whether it may be found by multicast DNS while a pairing is open, and find others so.
    pub mdns: bool,
    /// The control protocols that it speaks: this build's, unless a test plays another build.
    pub speaks: Hello,
    /// When it looks whether a model would be better off elsewhere.
    pub moves: Moves,
    /// How long a driver may have requests and say nothing of them before its process counts as hung.
    pub stall_limit: Duration,
    /// How long a node that is stopped lets answers in progress finish.
    pub drain_limit: Duration,
    /// How long a request waits for a model whose stages were lost, before it fails.
    pub resume_limit: Duration,
    /// Most bytes that shards and models may take on the disk; none is what it has free.
    pub disk_limit_bytes: Option<u64>,
    /// Where the system keeps files in memory: KV snapshots go there. None keeps none.
    pub memory_dir: Option<PathBuf>,
    /// Most bytes of KV snapshots of each stage; none is a part of what is free, and 0 keeps none.
    pub snapshot_limit_bytes: Option<u64>,
    /// A server that speaks the hub's protocol, and the token that it wants; none is as the environment says.
    pub hub: Option<Hub>,
    /// Program and arguments of a compute child: usually this very binary and `compute`.
    pub compute_command: Vec<OsString>,
}

/// A server that speaks the hub's protocol.
#[derive(Clone)]
pub struct Hub {
    /// Its address.
    pub endpoint: String,
    /// What it knows us by.
    pub token: Option<String>,
}

impl std::fmt::Debug for Hub {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // Not the token: what is printed may be a log.
        f.debug_struct("Hub").field("endpoint", &self.endpoint).finish_non_exhaustive()
    }
}

impl NodeConfig {
    /// Everything at its default: all interfaces, any port.
    pub fn new(data_dir: PathBuf, compute_command: Vec<OsString>) -> Self {
        Self {
            data_dir,
            name: None,
            bind_addr: (Ipv4Addr::UNSPECIFIED, 0).into(),
            threads: None,
            memory_limit_bytes: None,
            gpu_layers: -1,
            measure: true,
            mdns: true,
            speaks: Hello::ours(env!("CARGO_PKG_VERSION")),
            moves: Moves::default(),
            stall_limit: STALL_LIMIT,
            drain_limit: DRAIN_LIMIT,
            resume_limit: RESUME_LIMIT,
            disk_limit_bytes: None,
            memory_dir: None,
            snapshot_limit_bytes: None,
            hub: None,
            compute_command,
        }
    }
}
