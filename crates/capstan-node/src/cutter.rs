//! Shards that this node cuts from a model for its deployments, and what it remembers of their hashes.
//!
//! A deployment's shards lie in a folder of their own under `shards-out/`, removed with it. The hash of each is
//! remembered by the model's content and the layer range, so that a node that still has the shard from an earlier load
//! needs no new copy, and this node need not cut it again.
use std::collections::HashMap;
use std::io::Read;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::UNIX_EPOCH;

use capstan_gguf::Model;
use capstan_proto::control::ShardRef;
use capstan_proto::data::Rollback;
use capstan_proto::{DeploymentId, LayerRange, ModelId};
use capstan_store::{Hold, Store};
use serde::{Deserialize, Serialize};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;

use crate::error::NodeError;
use crate::files;

/// Bytes of each file that go into a model's hash: the headers of the largest vocabularies take about 10 MB.
const HASHED_BYTES: u64 = 16 << 20;
/// Most hashes that are remembered; the oldest are not told apart, so all are forgotten then.
const HASHES_MAX: usize = 4096;
/// What became of a shard that nobody wants any more.
pub(crate) const CANCELLED: &str = "it was stopped";

/// A model file of this node, open.
#[derive(Clone)]
pub(crate) struct OpenModel {
    /// The GGUF.
    pub(crate) model: Arc<Model>,
    /// BLAKE3 of the first 16 MiB of each file (which hold the header) and of all sizes, hexadecimal. It tells models
    /// apart; a shard's own hash is what proves its bytes.
    pub(crate) hash: String,
    /// The hash and when the files were changed last: what the memory of shards goes by.
    key: String,
    /// Which model of the catalogue it is.
    pub(crate) pulled: Option<ModelId>,
    /// Only its header is here; shards are put together from parts instead of being cut.
    pub(crate) elsewhere: bool,
    /// Keeps its files in the store for as long as somebody has it open.
    _holds: Arc<Vec<Hold>>,
}

impl OpenModel {
    /// Opens and hashes a model. Blocks.
    pub(crate) fn open(path: &Path) -> Result<Self, String> {
        let model = Model::open(path).map_err(|e| e.to_string())?;
        let mut hasher = blake3::Hasher::new();
        let mut changed = String::new();
        for file in model.files() {
            let io = |e: std::io::Error| format!("{file:?} cannot be read: {e}");
            let open = std::fs::File::open(file).map_err(io)?;
            let meta = open.metadata().map_err(io)?;
            hasher.update(&meta.len().to_le_bytes());
            hasher.update_reader(open.take(HASHED_BYTES)).map_err(io)?;
            let when = meta.modified().ok().and_then(|t| t.duration_since(UNIX_EPOCH).ok());
            changed.push_str(&format!(":{}", when.map_or(0, |d| d.as_nanos())));
        }
        let hash = hasher.finalize().to_hex().to_string();
        let key = format!("{hash}{changed}");
        Ok(Self { model: Arc::new(model), key, hash, pulled: None, elsewhere: false, _holds: Arc::default() })
    }

    /// A model of the catalogue whose weights are not here.
    pub(crate) fn outline(model: Arc<Model>, id: ModelId) -> Self {
        let (key, hash) = (id.to_string(), id.to_string());
        Self { model, key, hash, pulled: Some(id), elsewhere: true, _holds: Arc::default() }
    }

    /// The same as a model of the catalogue whose files are here.
    pub(crate) fn pulled_as(self, id: ModelId, holds: Vec<Hold>) -> Self {
        Self { hash: id.to_string(), pulled: Some(id), _holds: Arc::new(holds), ..self }
    }

    /// What it is opened by again, after a restart.
    pub(crate) fn path(&self) -> Option<PathBuf> {
        match self.pulled {
            Some(id) => Some(crate::catalogue::pulled_path(&id.to_string())),
            None => self.model.files().first().cloned(),
        }
    }

    /// All of its layers; none for a model that has none.
    pub(crate) fn whole(&self) -> Option<LayerRange> {
        LayerRange::new(0, self.model.n_layers()).ok()
    }

    /// How rows that were computed in vain are taken back.
    pub(crate) fn rollback(&self) -> Rollback {
        self.model.rollback()
    }
}

#[derive(Clone, Serialize, Deserialize)]
struct Remembered {
    hash: String,
    bytes: u64,
}

/// Cuts shards, one at a time: they come from one disk.
pub(crate) struct Cutter {
    dir: PathBuf,
    memory: PathBuf,
    hashes: Mutex<HashMap<String, Remembered>>,
    turn: Semaphore,
}

impl Cutter {
    /// Clears what an earlier run left behind: its deployments cut anew.
    pub(crate) fn open(data_dir: &Path) -> Result<Self, NodeError> {
        let dir = data_dir.join("shards-out");
        files::make_empty_dir(&dir)?;
        let memory = data_dir.join("shard-hashes.json");
        // Without it shards are cut and hashed again, no more.
        let hashes = files::read_json(&memory).unwrap_or_default().unwrap_or_default();
        Ok(Self { dir, memory, hashes: Mutex::new(hashes), turn: Semaphore::new(1) })
    }

    fn key(model: &OpenModel, range: LayerRange) -> String {
        format!("{}:{range}", model.key)
    }

    /// The shard's hash, if it was cut before from the same file.
    pub(crate) fn known(&self, model: &OpenModel, range: LayerRange) -> Option<ShardRef> {
        let hashes = self.hashes.lock().unwrap_or_else(PoisonError::into_inner);
        let known = hashes.get(&Self::key(model, range))?;
        Some(ShardRef { hash: capstan_store::parse_hex(&known.hash)?, bytes: known.bytes })
    }

    /// Remembers a shard's hash.
    pub(crate) fn remember(&self, model: &OpenModel, range: LayerRange, shard: ShardRef) {
        let mut hashes = self.hashes.lock().unwrap_or_else(PoisonError::into_inner);
        if hashes.len() >= HASHES_MAX {
            hashes.clear();
        }
        let known = Remembered { hash: capstan_store::hex(&shard.hash), bytes: shard.bytes };
        hashes.insert(Self::key(model, range), known);
        if let Err(error) = files::write_json(&self.memory, &*hashes) {
            tracing::warn!(%error, "a shard's hash could not be noted; it will be cut again next time");
        }
    }

    /// Writes the shard of a range for a deployment and gives its path. A model of one file that stays whole is its own
    /// shard. Shards in the store that no stage uses make way for it. Cancelled, it leaves nothing behind.
    pub(crate) async fn cut(
        &self,
        deployment: DeploymentId,
        model: &OpenModel,
        range: LayerRange,
        store: &Store,
        cancelled: &CancellationToken,
        mut progress: impl FnMut(u64, u64) + Send + 'static,
    ) -> Result<PathBuf, String> {
        if let [only] = model.model.files()
            && range.count() == model.model.n_layers()
        {
            return Ok(only.clone());
        }
        let dir = self.dir.join(deployment.to_string());
        let path = dir.join(format!("{}-{}.gguf", range.start(), range.end()));
        let _turn = tokio::select! {
            turn = self.turn.acquire() => turn.map_err(|e| e.to_string())?,
            () = cancelled.cancelled() => return Err(CANCELLED.into()),
        };
        if path.exists() {
            return Ok(path);
        }
        if let Err(error) = store.make_room(model.model.shard_bytes(range)).await {
            tracing::warn!(%error, "no room could be made for a shard that is to be cut");
        }
        let (model, cancelled) = (model.model.clone(), cancelled.clone());
        let cut = move || {
            if cancelled.is_cancelled() {
                return Err(CANCELLED.into());
            }
            std::fs::create_dir_all(&dir).map_err(|e| format!("the folder {dir:?} cannot be made: {e}"))?;
            let mut go_on = |done, total| {
                progress(done, total);
                if cancelled.is_cancelled() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
            };
            model.write_shard(range, &path, &mut go_on).map_err(|e| e.to_string())?;
            Ok(path)
        };
        tokio::task::spawn_blocking(cut).await.map_err(|e| format!("cutting a shard failed: {e}"))?
    }

    /// Whether this file was cut here, and is not somebody's model.
    pub(crate) fn made(&self, path: &Path) -> bool {
        path.starts_with(&self.dir)
    }

    /// Removes a shard that was cut; a model that is its own shard is left alone.
    pub(crate) async fn discard(&self, path: &Path) {
        if self.made(path)
            && let Err(error) = tokio::fs::remove_file(path).await
            && error.kind() != std::io::ErrorKind::NotFound
        {
            tracing::warn!(%error, ?path, "a shard that is not needed any more could not be removed");
        }
    }

    /// Removes what was cut for a deployment.
    pub(crate) async fn clear(&self, deployment: DeploymentId) {
        let dir = self.dir.join(deployment.to_string());
        if let Err(error) = tokio::fs::remove_dir_all(&dir).await
            && error.kind() != std::io::ErrorKind::NotFound
        {
            tracing::warn!(%error, ?dir, "shards that are not needed any more could not be removed");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_cut_that_is_cancelled_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("tiny.gguf");
        capstan_testkit::tiny::write("llama", &path).unwrap();
        let model = OpenModel::open(&path).unwrap();
        let (cutter, store) = (Cutter::open(dir.path()).unwrap(), Store::open(dir.path()).unwrap());
        let (id, range) = (DeploymentId(1), LayerRange::new(0, 1).unwrap());
        let files = || std::fs::read_dir(dir.path().join("shards-out").join(id.to_string())).map_or(0, Iterator::count);

        let stop = CancellationToken::new();
        let at_once = stop.clone();
        let cut = cutter.cut(id, &model, range, &store, &stop, move |_, _| at_once.cancel()).await;
        assert!(cut.is_err() && files() == 0, "{cut:?}");
        let fresh = CancellationToken::new();
        let cut = cutter.cut(id, &model, range, &store, &fresh, |_, _| {}).await.unwrap();
        assert!(cut.exists() && files() == 1);
        // One that waits for its turn does not come to it.
        let turn = cutter.turn.acquire().await.unwrap();
        assert_eq!(cutter.cut(id, &model, range, &store, &stop, |_, _| {}).await, Err(CANCELLED.into()));
        drop(turn);
        cutter.discard(&path).await;
        assert!(path.exists(), "a model is not a shard that was cut");
        cutter.discard(&cut).await;
        assert_eq!(files(), 0);
        store.shutdown().await;
    }
}
