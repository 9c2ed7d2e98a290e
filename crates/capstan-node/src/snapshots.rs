//! Where the stages of this node keep their KV snapshots: a folder each in memory, which outlives the stage's process, so
//! that the next one finds what the last one saved.
//!
//! A folder belongs to one stage of one deployment and to one process at a time. It goes when the stage is ended; when the
//! process was lost, or the coordinator was, it waits a while for a successor. What an earlier daemon left goes when this
//! one starts.
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use capstan_proto::NodeId;
use capstan_proto::child::{SnapshotSpec, StageSpec};
use tokio::time::sleep;

use crate::files;

/// How long a folder waits for its stage to be started again: longer than a node that fell silent is waited for.
const SUCCESSOR_WAIT: Duration = Duration::from_secs(120);
/// Of the memory that is free when a stage is loaded its snapshots may take this part.
const FREE_PART: u64 = 4;

/// How a folder is used.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Use {
    /// A process has it.
    Held,
    /// It waits for the successor of the process with this number.
    Waits(u64),
}

#[derive(Default)]
struct Table {
    uses: HashMap<PathBuf, Use>,
    claims: u64,
}

impl Table {
    /// A folder goes, and the one around it with the last.
    fn remove(&mut self, folder: &Path) {
        self.uses.remove(folder);
        std::fs::remove_dir_all(folder).ok();
        if let Some(root) = folder.parent().filter(|_| self.uses.is_empty()) {
            std::fs::remove_dir(root).ok();
        }
    }
}

/// The folders of this node.
pub(crate) struct SnapshotHost {
    /// None keeps none.
    root: Option<PathBuf>,
    limit_bytes: Option<u64>,
    table: Arc<Mutex<Table>>,
}

/// A stage's folder, which goes with this unless it is left to a successor.
pub(crate) struct Claim {
    folder: PathBuf,
    bytes_max: u64,
    table: Arc<Mutex<Table>>,
    left: bool,
}

fn lock(table: &Mutex<Table>) -> MutexGuard<'_, Table> {
    table.lock().unwrap_or_else(PoisonError::into_inner)
}

impl SnapshotHost {
    /// In this folder of the system's for what lies in memory; none, or a limit of nothing, keeps none.
    pub(crate) fn open(memory_dir: Option<&Path>, node: NodeId, limit_bytes: Option<u64>) -> Self {
        let ours = format!("capstan-{}-", node.short());
        for entry in memory_dir.map(std::fs::read_dir).into_iter().flatten().flatten().flatten() {
            if entry.file_name().to_str().is_some_and(|name| name.starts_with(&ours)) {
                // What belongs to somebody else stays as it is.
                std::fs::remove_dir_all(entry.path()).ok();
            }
        }
        // A name of its own: stages of the daemon before may still be ending, and clean up behind themselves.
        let name = format!("{ours}{:08x}", rand::random::<u32>());
        let root = memory_dir.filter(|_| limit_bytes != Some(0)).map(|dir| dir.join(name));
        Self { root, limit_bytes, table: Arc::default() }
    }

    /// Removes everything. Stages that still run save nothing any more.
    pub(crate) fn close(&self) {
        if let Some(root) = &self.root {
            std::fs::remove_dir_all(root).ok();
        }
    }

    /// The folder of a stage that is about to start, with what its predecessor left there.
    pub(crate) fn claim(&self, spec: &StageSpec, free_bytes: u64) -> Option<Claim> {
        let name = format!("{}-{}of{}-{}", spec.deployment, spec.stage, spec.stages, spec.layers);
        let root = self.root.as_ref()?;
        let mut folder = root.join(name.replace("..", "-"));
        let mut table = lock(&self.table);
        // The folder around them is there as long as one of them is.
        let made = if table.uses.is_empty() { files::make_private_dir(root) } else { Ok(()) };
        // The process of a coordinator that was lost may still be ending.
        if table.uses.get(&folder) == Some(&Use::Held) {
            table.claims += 1;
            folder.as_mut_os_string().push(format!("-{}", table.claims));
        }
        if let Err(error) = made.and_then(|()| files::private_dir(&folder)) {
            tracing::warn!(%error, "no KV snapshots are kept of a stage; what is lost is computed again");
            return None;
        }
        table.uses.insert(folder.clone(), Use::Held);
        let bytes_max = self.limit_bytes.unwrap_or(free_bytes / FREE_PART);
        Some(Claim { folder, bytes_max, table: self.table.clone(), left: false })
    }
}

impl Claim {
    /// What the process is told.
    pub(crate) fn spec(&self) -> SnapshotSpec {
        SnapshotSpec { folder: self.folder.clone(), bytes_max: self.bytes_max }
    }

    /// The process is gone, and the stage may be started again.
    pub(crate) fn leave(mut self) {
        self.left = true;
        let (folder, shared) = (self.folder.clone(), self.table.clone());
        let waits = {
            let mut table = lock(&shared);
            table.claims += 1;
            let waits = Use::Waits(table.claims);
            table.uses.insert(folder.clone(), waits);
            waits
        };
        tokio::spawn(async move {
            sleep(SUCCESSOR_WAIT).await;
            let mut table = lock(&shared);
            if table.uses.get(&folder) == Some(&waits) {
                table.remove(&folder);
            }
        });
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        if !self.left {
            lock(&self.table).remove(&self.folder);
        }
    }
}

#[cfg(test)]
mod tests {
    use capstan_proto::child::WindowIo;
    use capstan_proto::{DeploymentId, LayerRange};

    use super::*;

    fn spec(stage: u16) -> StageSpec {
        StageSpec {
            deployment: DeploymentId(7),
            model_name: "m".into(),
            shard: PathBuf::new(),
            layers: LayerRange::new(3, 9).unwrap(),
            stage,
            stages: 2,
            io: WindowIo { capture: None, hidden_width: 1, embedding_scale: 1.0 },
            ctx: 8,
            slots: 1,
            ubatch: 8,
            decode_batch: 1,
            scheduling: Default::default(),
            threads: None,
            gpu_layers: 0,
            bind: std::net::Ipv4Addr::LOCALHOST.into(),
            sparse: false,
        }
    }

    fn open(dir: &Path) -> SnapshotHost {
        SnapshotHost::open(Some(dir), NodeId([1; 32]), None)
    }

    #[tokio::test]
    async fn a_successor_finds_the_folder_and_nobody_else_does() {
        let dir = tempfile::tempdir().unwrap();
        let host = open(dir.path());
        let first = host.claim(&spec(0), 400).unwrap();
        assert_eq!(first.spec().bytes_max, 100);
        let (folder, mark) = (first.spec().folder, "saved");
        std::fs::write(folder.join(mark), "").unwrap();
        // One whose predecessor still ends gets another.
        let beside = host.claim(&spec(0), 400).unwrap();
        assert!(!beside.spec().folder.join(mark).exists());
        drop(beside);
        first.leave();
        assert!(!host.claim(&spec(1), 400).unwrap().spec().folder.join(mark).exists());
        let second = host.claim(&spec(0), 400).unwrap();
        assert!(second.spec().folder.join(mark).exists());
        // It was stopped: nothing of it stays.
        drop(second);
        assert!(!folder.exists());
    }

    #[tokio::test(start_paused = true)]
    async fn what_nobody_takes_over_goes_after_a_while() {
        let dir = tempfile::tempdir().unwrap();
        let host = open(dir.path());
        let first = host.claim(&spec(0), 400).unwrap();
        let folder = first.spec().folder;
        first.leave();
        sleep(SUCCESSOR_WAIT / 2).await;
        // Taken over and left again, it waits anew.
        host.claim(&spec(0), 400).unwrap().leave();
        sleep(SUCCESSOR_WAIT * 3 / 4).await;
        assert!(folder.exists());
        sleep(SUCCESSOR_WAIT / 2).await;
        assert!(!folder.exists());
    }

    #[test]
    fn what_an_earlier_daemon_left_goes_and_what_is_not_ours_stays() {
        let dir = tempfile::tempdir().unwrap();
        let names = || std::fs::read_dir(dir.path()).unwrap().count();
        let first = open(dir.path()).claim(&spec(0), 4).unwrap();
        let left = first.spec().folder;
        std::mem::forget(first);
        let other = SnapshotHost::open(Some(dir.path()), NodeId([2; 32]), None).claim(&spec(0), 4).unwrap();
        assert_eq!(names(), 2);
        let host = open(dir.path());
        assert!(!left.exists() && other.spec().folder.exists());
        let claim = host.claim(&spec(0), 4).unwrap();
        let root = claim.spec().folder.parent().unwrap().to_owned();
        assert_ne!(Some(&*root), left.parent());
        // Nobody else may look.
        #[cfg(unix)]
        for folder in [&root, &claim.spec().folder] {
            use std::os::unix::fs::PermissionsExt;
            assert_eq!(std::fs::metadata(folder).unwrap().permissions().mode() & 0o777, 0o700);
        }
        drop(claim);
        assert!(!root.exists());
        // Whatever another user has put there under the name is not used.
        #[cfg(unix)]
        {
            let theirs = dir.path().join("theirs");
            std::fs::create_dir(&theirs).unwrap();
            std::fs::write(theirs.join("file"), "").unwrap();
            std::os::unix::fs::symlink(&theirs, &root).unwrap();
            drop(host.claim(&spec(0), 4));
            assert!(theirs.join("file").exists() && std::fs::read_dir(&theirs).unwrap().count() == 1);
        }
        drop(other);
        let off = SnapshotHost::open(Some(dir.path()), NodeId([2; 32]), Some(0));
        assert!(off.claim(&spec(0), 400).is_none() && open(&dir.path().join("missing")).claim(&spec(0), 1).is_none());
    }
}
