//! What people ask about models on disks, and what they are told: these travel as JSON.
use serde::{Deserialize, Serialize};

use crate::weights::FileRecord;
use crate::{ContentHash, LayerRange, ModelId};

/// Bring a model here.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PullRequest {
    /// `hf:OWNER/REPO[:QUANT][@REVISION]`, an address, or `file:` and a path of the node that is asked.
    pub source: String,
    /// What to call it; none takes its file's name.
    #[serde(default)]
    pub name: Option<String>,
    /// Nodes that are to hold its layers, by name or id, in pipeline order; empty lets the planner choose.
    #[serde(default)]
    pub nodes: Vec<String>,
    /// Which node is to hold which layers; empty lets the planner choose.
    #[serde(default)]
    pub layers: Vec<(String, LayerRange)>,
    /// How many nodes are to have a copy of each layer; none is [`REPLICAS_DEFAULT`](super::REPLICAS_DEFAULT).
    #[serde(default)]
    pub replicas: Option<u16>,
}

/// A file that a pull writes on a node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PulledFile {
    /// Where.
    pub node_name: String,
    /// What, for people.
    pub what: String,
    /// Size in bytes.
    pub bytes: u64,
}

/// How a pull goes. The last event is `Done` or `Failed`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum PullEvent {
    /// What is pulled, and which node writes what.
    Planned {
        /// Its name in the catalogue.
        name: String,
        /// The commit that it is pinned to.
        revision: Option<String>,
        /// Bytes of the model.
        bytes: u64,
        /// What is written.
        files: Vec<PulledFile>,
    },
    /// A file grows.
    Progress {
        /// Which of the files.
        file: u16,
        /// Bytes there.
        done_bytes: u64,
        /// Bytes in all.
        total_bytes: u64,
        /// Bytes of all files that came from outside of the cluster, since this pull was begun or taken up again.
        outside_bytes: u64,
    },
    /// Hashes are computed and compared.
    Verifying {
        /// Bytes compared.
        done_bytes: u64,
        /// Bytes in all.
        total_bytes: u64,
    },
    /// It is in the catalogue.
    Done {
        /// Its name.
        name: String,
        /// Its exact version.
        id: ModelId,
        /// Bytes that came from outside of the cluster.
        outside_bytes: u64,
    },
    /// Nothing half-written is visible; what has arrived is kept where that helps.
    Failed {
        /// What happened and what to do.
        message: String,
    },
}

/// Who has which part of a model.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PartStatus {
    /// BLAKE3 of its content.
    pub hash: ContentHash,
    /// Size in bytes.
    pub bytes: u64,
    /// What it holds, for people.
    pub what: String,
    /// The layers in it.
    pub layers: Option<LayerRange>,
    /// The names of the nodes that have it.
    pub nodes: Vec<String>,
}

/// A model of the catalogue.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ModelStatus {
    /// Its exact version.
    pub id: ModelId,
    /// Its name.
    pub name: String,
    /// Where it came from.
    pub source: String,
    /// The commit.
    pub revision: Option<String>,
    /// Architecture.
    pub architecture: String,
    /// Layers.
    pub layers: u32,
    /// Bytes of the original files.
    pub bytes: u64,
    /// Its files and their hashes.
    pub files: Vec<FileRecord>,
    /// Copies of each layer that are wanted.
    pub replicas: u16,
    /// Copies of the layer that has fewest.
    pub copies: u16,
    /// Who has what.
    pub parts: Vec<PartStatus>,
}

/// What a check, a removal or an export came to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ModelOutcome {
    /// Its name.
    pub name: String,
    /// What was done, a sentence each.
    pub done: Vec<String>,
    /// What is wrong, a sentence each.
    pub trouble: Vec<String>,
}

/// What lies on a node's disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeDisk {
    /// Its name.
    pub node_name: String,
    /// Whether it answers.
    pub online: bool,
    /// Bytes of its store.
    pub used_bytes: u64,
    /// Bytes that it may still take.
    pub free_bytes: u64,
    /// The limit that was set there.
    pub limit_bytes: Option<u64>,
    /// What of it belongs to which model.
    pub parts: Vec<DiskPart>,
}

/// A part on a disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskPart {
    /// The model's name.
    pub model: String,
    /// What it holds, for people.
    pub what: String,
    /// Size in bytes.
    pub bytes: u64,
}
