//! A deployment as it is written down: on this node's disk, so that it comes back after a restart, and as the recipe in
//! the replicated state, so that another node can take it over.
use std::path::PathBuf;
use std::sync::Arc;

use capstan_cluster::Placed;
use capstan_cluster::command::RECIPE_BYTES_MAX;
use capstan_planner::{Placement, StagePlan};
use capstan_proto::child::{ChildStats, Scheduling};
use capstan_proto::limits;
use capstan_proto::manage::{DeploymentStatus, Health, LoadRequest, StageStatus};
use capstan_proto::{DeploymentId, NodeId};
use serde::{Deserialize, Serialize};

use crate::blueprint::{Blueprint, Choice};
use crate::catalogue;
use crate::cutter::OpenModel;
use crate::deployments::CTX_MAX;
use crate::node::Shared;

/// Enough to bring a deployment back without planning again.
#[derive(Clone, Serialize, Deserialize)]
pub(crate) struct Saved {
    pub(crate) id: DeploymentId,
    pub(crate) name: String,
    path: PathBuf,
    ctx: u32,
    slots: u32,
    ubatch: u32,
    decode_batch: u32,
    /// None in files of a capstan before speculation.
    #[serde(default)]
    scheduling: Option<Scheduling>,
    created_unix_s: u64,
    stages: Vec<StagePlan>,
    /// What was asked, where the placement was left to the planner.
    #[serde(default)]
    request: Option<LoadRequest>,
    /// Files of a capstan that always waited for a node have none.
    #[serde(default)]
    choice: Choice,
}

impl Saved {
    /// A deployment written down; none for a rehearsal, which nobody misses, and for a model that is no file.
    pub(crate) fn of(b: &Blueprint) -> Option<Self> {
        if b.rehearsal.is_some() {
            return None;
        }
        Some(Self {
            id: b.id,
            name: b.name.clone(),
            path: b.model.path()?,
            ctx: b.ctx,
            slots: b.slots,
            ubatch: b.ubatch,
            decode_batch: b.decode_batch,
            scheduling: Some(b.scheduling.clone()),
            created_unix_s: b.created_unix_s,
            stages: b.stages.clone(),
            request: b.request.clone(),
            choice: b.choice.clone(),
        })
    }

    /// What another node needs to take a deployment over. Empty when none could: a file lies on this node alone, while a
    /// model of the catalogue is known to all and its parts are where they are.
    pub(crate) fn recipe(b: &Blueprint) -> Vec<u8> {
        let everywhere = |saved: &Self| catalogue::pulled_name(&saved.path).is_some();
        let written = Self::of(b).filter(everywhere).and_then(|saved| serde_json::to_vec(&saved).ok());
        written.filter(|bytes| bytes.len() <= RECIPE_BYTES_MAX).unwrap_or_default()
    }

    /// Reads a recipe. It comes from another node: every number has its bound.
    pub(crate) fn read(recipe: &[u8]) -> Result<Self, String> {
        let saved: Self = serde_json::from_slice(recipe).map_err(|e| format!("its recipe cannot be read: {e}"))?;
        let pulled = catalogue::pulled_name(&saved.path).is_some();
        let named = !saved.name.is_empty() && saved.name.len() <= limits::NAME_BYTES_MAX;
        let slots = (1..=limits::SLOTS_MAX).contains(&saved.slots) && (1..=saved.slots).contains(&saved.decode_batch);
        let sizes = (2..=CTX_MAX).contains(&saved.ctx) && (1..=1 << 16).contains(&saved.ubatch);
        if pulled && named && slots && sizes && saved.stages.len() <= limits::LAYERS_MAX as usize {
            Ok(saved)
        } else {
            Err("its recipe is out of bounds".to_owned())
        }
    }

    /// Whether anybody could go on with it, if these are the members.
    pub(crate) fn is_feasible(&self, is_member: impl Fn(NodeId) -> bool) -> bool {
        match &self.choice {
            Choice::Layers => self.stages.iter().all(|s| is_member(s.node)),
            Choice::Nodes(named) => named.iter().any(|node| is_member(*node)),
            Choice::Planner => true,
        }
    }

    /// How it is while nobody looks after it.
    pub(crate) fn orphaned(&self, id: DeploymentId, placed: &Placed, detail: String) -> DeploymentStatus {
        let stage = |(i, s): (usize, &StagePlan)| StageStatus {
            stage: i as u16,
            node: s.node,
            node_name: s.node_name.clone(),
            layers: s.layers,
            pid: None,
            shard_bytes: 0,
            memory_bytes: 0,
            kv_bytes: 0,
            compute_bytes: 0,
            device: String::new(),
            health: Health::Recovering,
            stats: ChildStats::default(),
        };
        DeploymentStatus {
            id,
            name: self.name.clone(),
            model_hash: String::new(),
            architecture: String::new(),
            layers: self.stages.last().map_or(0, |s| s.layers.end()),
            epoch: placed.epoch,
            health: Health::Recovering,
            detail,
            coordinator: placed.coordinator,
            ctx: self.ctx,
            slots: self.slots,
            stages: self.stages.iter().enumerate().map(stage).collect(),
            created_unix_s: self.created_unix_s,
        }
    }

    /// Opens the model, and makes of it all what a coordinator needs.
    pub(crate) async fn open(&self, shared: &Arc<Shared>, id: DeploymentId) -> Result<Blueprint, String> {
        let model = shared.open_model(self.path.clone()).await?;
        let stages = self.stages.clone();
        // The file may have been replaced meanwhile.
        Placement::new(model.model.n_layers(), stages.clone(), vec![]).map_err(|e| e.to_string())?;
        let (scheduling, draft) = self.scheduling(shared, &model).await;
        Ok(Blueprint {
            id,
            name: self.name.clone(),
            model,
            stages,
            ctx: self.ctx,
            slots: self.slots,
            ubatch: self.ubatch,
            decode_batch: self.decode_batch,
            scheduling,
            draft,
            created_unix_s: self.created_unix_s,
            remark: String::new(),
            choice: self.choice.clone(),
            request: self.request.clone(),
            rehearsal: None,
        })
    }

    async fn scheduling(&self, shared: &Shared, model: &OpenModel) -> (Scheduling, Option<OpenModel>) {
        let mut scheduling = self.scheduling.clone().unwrap_or_else(unguessed);
        let mut draft = None;
        if let Some(path) = scheduling.draft.clone() {
            match shared.open_model(path).await {
                Ok(model) => draft = Some(model),
                Err(reason) => {
                    tracing::warn!(model = self.name, reason, "a deployment comes back without its draft model");
                    scheduling.draft = None;
                }
            }
        }
        // How rows are taken back is the model's to say, whatever was noted of an earlier file.
        let rollback = model.rollback();
        if rollback == scheduling.rollback {
            (scheduling, draft)
        } else {
            (Scheduling { rollback, ..unguessed() }, None)
        }
    }
}

/// How a deployment goes on that was noted before there was anything to choose: its memory has no room for guesses.
fn unguessed() -> Scheduling {
    Scheduling { speculation_depth: 0, prefix_cache: false, ..Scheduling::default() }
}

#[cfg(test)]
mod tests {
    use capstan_proto::LayerRange;

    use super::*;

    const OLD: &str = r#"{"id":1,"name":"m","path":"PATH","ctx":64,"slots":1,"ubatch":512,"decode_batch":1,
                          "created_unix_s":1,"stages":[]}"#;

    #[test]
    fn deployments_noted_before_there_was_speculation_come_back() {
        let saved: Saved = serde_json::from_str(OLD).unwrap();
        assert!(saved.scheduling.is_none() && unguessed().speculation_depth == 0);
        assert_eq!(saved.choice, Choice::Layers);
    }

    #[test]
    fn fixed_layers_need_all_their_nodes_and_named_nodes_one_of_them() {
        let (here, gone) = (NodeId([1; 32]), NodeId([2; 32]));
        let stage =
            |node| StagePlan { node, node_name: "n".into(), layers: LayerRange::new(0, 1).unwrap(), memory_bytes: 0 };
        let saved = |choice, nodes: &[NodeId]| Saved {
            choice,
            stages: nodes.iter().copied().map(stage).collect(),
            ..serde_json::from_str(OLD).unwrap()
        };
        let feasible = |choice, nodes: &[NodeId]| saved(choice, nodes).is_feasible(|node| node == here);
        assert!(feasible(Choice::Layers, &[here]) && !feasible(Choice::Layers, &[here, gone]));
        assert!(feasible(Choice::Nodes(vec![gone, here]), &[gone]) && !feasible(Choice::Nodes(vec![gone]), &[here]));
        assert!(feasible(Choice::Planner, &[gone]));
    }

    #[test]
    fn recipes_are_of_models_that_all_know_and_within_bounds() {
        let pulled = OLD.replace("PATH", &catalogue::pulled_path("m").display().to_string());
        assert!(Saved::read(pulled.as_bytes()).is_ok());
        for bad in [
            OLD.replace("PATH", "/etc/passwd"),
            pulled.replace("\"slots\":1", "\"slots\":0"),
            pulled.replace("\"slots\":1", "\"slots\":4000000000"),
            pulled.replace("\"decode_batch\":1", "\"decode_batch\":2"),
            pulled.replace("\"ctx\":64", "\"ctx\":4000000000"),
            pulled.replace("\"ubatch\":512", "\"ubatch\":0"),
            pulled.replace("\"name\":\"m\"", "\"name\":\"\""),
            pulled[..20].to_owned(),
        ] {
            assert!(Saved::read(bad.as_bytes()).is_err(), "{bad}");
        }
    }
}
