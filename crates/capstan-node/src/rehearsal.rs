//! Weights that are made up here, for a stage that only rehearses: a file by the header that the coordinator sends, gone
//! when the stage has ended.
//!
//! Their folder is emptied when the daemon starts, for a daemon that was killed could not tidy up.
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use capstan_gguf::synthetic::{self, Routing};
use capstan_gguf::{GgufError, Model};
use capstan_planner::StagePlan;
use capstan_proto::DeploymentId;
use capstan_proto::control::MadeUpShard;
use tokio_util::sync::CancellationToken;

use crate::error::NodeError;
use crate::files;

/// What a deployment's stages make up.
pub(crate) struct MadeUp {
    /// One a stage.
    pub(crate) shards: Vec<MadeUpShard>,
    /// Memory is taken only for what is read.
    pub(crate) sparse: bool,
}

impl MadeUp {
    /// The headers of a placement's shards; an error is for whoever asked for the rehearsal.
    pub(crate) fn of(model: &Model, stages: &[StagePlan], sparse: bool) -> Result<Self, String> {
        let shard = |stage: &StagePlan| {
            let (header, file_bytes) = model.shard_header(stage.layers).map_err(|e| e.to_string())?;
            let shard = MadeUpShard { header, file_bytes, same_experts: sparse };
            shard.check().map_err(|e| format!("layers {} cannot be rehearsed: {e}", stage.layers))?;
            Ok(shard)
        };
        Ok(Self { shards: stages.iter().map(shard).collect::<Result<_, String>>()?, sparse })
    }
}

/// Where made-up weights lie.
pub(crate) struct Rehearsals {
    dir: Arc<Path>,
    next: AtomicU64,
}

/// A file of made-up weights, removed when this is dropped.
#[derive(Debug)]
pub(crate) struct MadeUpFile(PathBuf);

impl MadeUpFile {
    pub(crate) fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for MadeUpFile {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_file(&self.0)
            && error.kind() != std::io::ErrorKind::NotFound
        {
            tracing::warn!(%error, path = ?self.0, "made-up weights could not be removed");
        }
    }
}

impl Rehearsals {
    /// Clears what an earlier run left behind.
    pub(crate) fn open(data_dir: &Path) -> Result<Self, NodeError> {
        let dir = data_dir.join("rehearsals");
        files::make_empty_dir(&dir)?;
        Ok(Self { dir: dir.into(), next: AtomicU64::new(0) })
    }

    /// Makes a shard's weights up. Dropped before it is done, it leaves nothing behind.
    pub(crate) async fn make(
        &self,
        deployment: DeploymentId,
        stage: u16,
        shard: MadeUpShard,
    ) -> Result<MadeUpFile, GgufError> {
        // Numbers alone: nothing that another node sends becomes part of a path.
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        let path = self.dir.join(format!("{deployment}-{stage}-{number}.gguf"));
        let cancelled = CancellationToken::new();
        let _guard = cancelled.clone().drop_guard();
        let failed = path.clone();
        let make = move || {
            let MadeUpShard { header, file_bytes, same_experts } = shard;
            let routing = if same_experts { Routing::Same } else { Routing::Spread };
            let mut go_on = |_, _| match cancelled.is_cancelled() {
                true => ControlFlow::Break(()),
                false => ControlFlow::Continue(()),
            };
            let file = MadeUpFile(path);
            synthetic::write(&header, file_bytes, routing, file.path(), &mut go_on)?;
            Ok(file)
        };
        tokio::task::spawn_blocking(make).await.unwrap_or(Err(GgufError::Cancelled(failed)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use capstan_proto::{LayerRange, NodeId};

    fn made_up(dir: &Path) -> MadeUpShard {
        let path = dir.join("tiny.gguf");
        capstan_testkit::tiny::write("deepseek2", &path).unwrap();
        let model = Model::open(&path).unwrap();
        let layers = LayerRange::new(0, model.n_layers()).unwrap();
        let stage = StagePlan { node: NodeId([1; 32]), node_name: "a".into(), layers, memory_bytes: 0 };
        MadeUp::of(&model, &[stage], false).unwrap().shards.remove(0)
    }

    fn files(dir: &Path) -> usize {
        std::fs::read_dir(dir.join("rehearsals")).unwrap().count()
    }

    #[tokio::test]
    async fn made_up_weights_are_there_as_long_as_they_are_used() {
        let dir = tempfile::tempdir().unwrap();
        let rehearsals = Rehearsals::open(dir.path()).unwrap();
        let shard = made_up(dir.path());
        let file = rehearsals.make(DeploymentId(1), 0, shard.clone()).await.unwrap();
        let model = Model::open(file.path()).unwrap();
        assert_eq!((model.architecture(), model.bytes()), ("deepseek2", shard.file_bytes));
        let leftover = rehearsals.make(DeploymentId(1), 0, shard).await.unwrap();
        assert_eq!(files(dir.path()), 2);
        drop(file);
        std::mem::forget(leftover);
        Rehearsals::open(dir.path()).unwrap();
        assert_eq!(files(dir.path()), 0);
    }

    #[tokio::test]
    async fn a_hostile_header_is_refused_and_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let rehearsals = Rehearsals::open(dir.path()).unwrap();
        let good = made_up(dir.path());
        let with = |change: fn(&mut MadeUpShard)| {
            let mut shard = good.clone();
            change(&mut shard);
            shard
        };
        let make = |shard| rehearsals.make(DeploymentId(u64::MAX), u16::MAX, shard);
        assert!(matches!(make(with(|s| s.header[0] = b'X')).await, Err(GgufError::NotGguf(_))));
        assert!(matches!(make(with(|s| s.header.truncate(100))).await, Err(GgufError::Malformed { .. })));
        assert!(matches!(make(with(|s| s.file_bytes = 1 << 43)).await, Err(GgufError::Malformed { .. })));
        assert!(matches!(make(with(|s| s.file_bytes -= 64)).await, Err(GgufError::Truncated { .. })));
        assert_eq!(files(dir.path()), 0);
        assert!(with(|s| s.file_bytes = 1 << 45).check().is_err() && with(|s| s.file_bytes = 1).check().is_err());
        assert!(with(|s| s.header.resize(16 << 20, 0)).check().is_err() && good.check().is_ok());
    }
}
