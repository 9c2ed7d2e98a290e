//! How large a model's compute buffers will be, by llama.cpp's own dry run, before its layers are placed.
//!
//! A stage's buffers depend on its widest layer and on whether it ends in the head, hardly on how many layers it has. So
//! the smallest window that leaves hidden states and the smallest that gives logits stand for all; a child is asked for
//! each, with a file of holes that has the right header. What it said is kept, for a warm load must not wait.
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use capstan_gguf::Model;
use capstan_planner::Buffers;
use capstan_proto::child::{Scheduling, StageSpec, WindowIo};
use capstan_proto::data::Rollback;
use capstan_proto::{DeploymentId, LayerRange};
use tokio::time::timeout;

use crate::cutter::OpenModel;
use crate::files;
use crate::node::Shared;

/// How long a dry run may take. A fraction of a second is usual; most of it goes into large vocabularies.
const TIMEOUT: Duration = Duration::from_secs(10);
/// Most answers that are kept; all are forgotten then.
const KEPT_MAX: usize = 1024;

/// What a model's stages are to hold.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Wanted {
    pub ctx: u32,
    pub slots: u32,
    pub spares_per_stage: u32,
    pub ubatch: u32,
    pub rollback: Rollback,
}

type Kept = HashMap<String, Buffers>;

fn kept(data_dir: &Path) -> PathBuf {
    data_dir.join("buffers.json")
}

/// The buffers of a model's stages, or none when they cannot be told: an allowance is planned for then.
pub(crate) async fn of(shared: &Shared, model: &OpenModel, wanted: Wanted) -> Option<Buffers> {
    let c = &shared.config;
    let key = format!("{} {wanted:?} {:?} {} {}", model.hash, c.threads, c.gpu_layers, shared.build);
    // What cannot be read is asked again.
    let mut known: Kept = files::read_json(&kept(&c.data_dir)).ok().flatten().unwrap_or_default();
    if let Some(buffers) = known.get(&key) {
        return Some(*buffers);
    }
    let (hidden, logits) = windows(&model.model)?;
    let (hidden, logits) = tokio::join!(ask(shared, model, wanted, hidden), ask(shared, model, wanted, logits));
    let buffers = match (hidden, logits) {
        (Ok(hidden_bytes), Ok(logits_bytes)) => Buffers { hidden_bytes, logits_bytes },
        (Err(reason), _) | (_, Err(reason)) => {
            tracing::debug!(reason, "the dry run gave no sizes; an allowance is planned for");
            return None;
        }
    };
    if known.len() >= KEPT_MAX {
        known.clear();
    }
    known.insert(key, buffers);
    if let Err(error) = files::write_json(&kept(&c.data_dir), &known) {
        tracing::debug!(%error, "what the dry run said could not be kept");
    }
    Some(buffers)
}

/// The smallest window at the start and at the end that may be stages; none for a model that runs whole.
fn windows(model: &Model) -> Option<(LayerRange, LayerRange)> {
    let n = model.n_layers();
    let allowed = |a, b| LayerRange::new(a, b).ok().filter(|r| model.window_problem(*r).is_none());
    if model.split_problem().is_some() {
        return None;
    }
    let first = (1..n).find_map(|end| allowed(0, end))?;
    let last = (1..n).rev().find_map(|start| allowed(start, n))?;
    Some((first, last))
}

/// Removes a file when it goes.
struct Gone(PathBuf);

impl Drop for Gone {
    fn drop(&mut self) {
        std::fs::remove_file(&self.0).ok();
    }
}

async fn ask(shared: &Shared, model: &OpenModel, wanted: Wanted, range: LayerRange) -> Result<u64, String> {
    let c = &shared.config;
    let (header, bytes) = model.model.shard_header(range).map_err(|e| e.to_string())?;
    let name = format!("dry-run-{:016x}.gguf", rand::random::<u64>());
    let file = Gone(c.data_dir.join(name));
    let path = file.0.clone();
    let write = move || -> std::io::Result<()> {
        std::fs::write(&path, &header)?;
        std::fs::OpenOptions::new().write(true).open(&path)?.set_len(bytes)
    };
    tokio::task::spawn_blocking(write).await.map_err(|e| e.to_string())?.map_err(|e| e.to_string())?;
    let io = model.model.window_io(range);
    let spec = spec(file.0.clone(), range, io, wanted, c.threads, c.gpu_layers);
    match timeout(TIMEOUT, capstan_compute::host::dry_run(&c.compute_command, &spec)).await {
        Ok(bytes) => bytes.map_err(|e| e.to_string()),
        Err(_) => Err(format!("the dry run took more than {} s", TIMEOUT.as_secs())),
    }
}

fn spec(
    shard: PathBuf,
    layers: LayerRange,
    io: WindowIo,
    wanted: Wanted,
    threads: Option<u32>,
    gpu_layers: i32,
) -> StageSpec {
    // Two stages: the fewest that a pipeline has.
    let stages = 2;
    let speculation_depth = if wanted.spares_per_stage > 0 { stages } else { 0 };
    StageSpec {
        deployment: DeploymentId(0),
        model_name: String::new(),
        shard,
        layers,
        stage: if io.capture.is_some() { 0 } else { stages - 1 },
        stages,
        io,
        ctx: wanted.ctx,
        slots: wanted.slots,
        ubatch: wanted.ubatch,
        decode_batch: wanted.slots,
        scheduling: Scheduling { speculation_depth, rollback: wanted.rollback, ..Scheduling::default() },
        threads,
        gpu_layers,
        sparse: false,
        bind: std::net::Ipv4Addr::LOCALHOST.into(),
    }
}
