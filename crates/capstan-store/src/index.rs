//! Remembers across restarts which files were verified and which are offered, in one small JSON file.
//!
//! The index only saves work: a shard without a record is hashed before it is used, and an offer that is missing is
//! made again by the next load. So a lost or unreadable index costs time, never correctness.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::layout::{Layout, Stamp, sync_folder};
use crate::{Hash, hex, parse_hex};

/// An index larger than this is not ours: a record takes some 200 bytes, a node holds a few thousand at the very most.
const INDEX_BYTES_MAX: u64 = 16 << 20;

/// What is known of the files, by hash.
#[derive(Debug, Default)]
pub(crate) struct Index {
    /// Files in `shards/`, with their stamps when they were verified.
    pub shards: BTreeMap<Hash, Stamp>,
    /// When they were used last: a clock in milliseconds that never gives the same twice.
    pub used: BTreeMap<Hash, u64>,
    /// Files served from where they lie.
    pub offers: BTreeMap<Hash, Offered>,
}

/// A file that is served from where it lies.
#[derive(Debug, Clone)]
pub(crate) struct Offered {
    pub path: PathBuf,
    pub stamp: Stamp,
}

#[derive(Serialize, Deserialize)]
struct OnDisk {
    version: u32,
    shards: Vec<Row>,
    offers: Vec<Row>,
}

#[derive(Serialize, Deserialize)]
struct Row {
    hash: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    path: Option<PathBuf>,
    stamp: Stamp,
    #[serde(default)]
    used: u64,
}

const VERSION: u32 = 1;

impl Index {
    /// Reads the index; one that is missing or unreadable counts as empty, and records that no longer fit are dropped.
    pub fn load(layout: &Layout) -> Index {
        let path = layout.index();
        let Some(on_disk) = read(&path) else { return Index::default() };
        let mut index = Index::default();
        for row in on_disk.shards {
            if let Some(hash) = parse_hex(&row.hash).filter(|hash| layout.shard(hash).exists()) {
                index.shards.insert(hash, row.stamp);
                index.used.insert(hash, row.used);
            }
        }
        for row in on_disk.offers {
            let (Some(hash), Some(path)) = (parse_hex(&row.hash), row.path) else { continue };
            if Stamp::of(&path).is_ok_and(|stamp| stamp == row.stamp) && layout.tree(&hash).exists() {
                index.offers.insert(hash, Offered { path, stamp: row.stamp });
            } else {
                tracing::warn!(file = %path.display(), "no longer offered: the file changed or is gone");
            }
        }
        index
    }

    /// Replaces the file in one step.
    pub fn save(&self, layout: &Layout) -> io::Result<()> {
        let used = |hash: &Hash| self.used.get(hash).copied().unwrap_or(0);
        let row = |hash: &Hash, path: Option<PathBuf>, stamp| Row { hash: hex(hash), path, stamp, used: used(hash) };
        let on_disk = OnDisk {
            version: VERSION,
            shards: self.shards.iter().map(|(hash, stamp)| row(hash, None, *stamp)).collect(),
            offers: self.offers.iter().map(|(hash, o)| row(hash, Some(o.path.clone()), o.stamp)).collect(),
        };
        let temporary = layout.blobs.join("index.json.tmp");
        let mut file = File::create(&temporary)?;
        file.write_all(&serde_json::to_vec_pretty(&on_disk)?)?;
        file.sync_all()?;
        fs::rename(&temporary, layout.index())?;
        sync_folder(&layout.blobs)
    }
}

fn read(path: &Path) -> Option<OnDisk> {
    let size = fs::metadata(path).ok()?.len();
    let parsed = if size > INDEX_BYTES_MAX {
        Err("it is too large".to_string())
    } else {
        fs::read(path)
            .map_err(|e| e.to_string())
            .and_then(|bytes| serde_json::from_slice::<OnDisk>(&bytes).map_err(|e| e.to_string()))
            .and_then(|on_disk| match on_disk.version {
                VERSION => Ok(on_disk),
                other => Err(format!("it has version {other}")),
            })
    };
    match parsed {
        Ok(on_disk) => Some(on_disk),
        Err(reason) => {
            tracing::warn!(file = %path.display(), reason, "the shard index is unreadable; shards are verified anew");
            None
        }
    }
}
