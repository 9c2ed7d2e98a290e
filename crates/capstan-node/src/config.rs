//! What a node is told when it starts.
use std::ffi::OsString;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

/// One micro-batch of a large model may take a slow machine a minute; nothing healthy takes five.
const STALL_LIMIT: Duration = Duration::from_secs(300);

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
    /// When it looks whether a model would be better off elsewhere.
    pub moves: Moves,
    /// How long a driver may have requests and say nothing of them before its process counts as hung.
    pub stall_limit: Duration,
    /// Program and arguments of a compute child: usually this very binary and `compute`.
    pub compute_command: Vec<OsString>,
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
            moves: Moves::default(),
            stall_limit: STALL_LIMIT,
            compute_command,
        }
    }
}
