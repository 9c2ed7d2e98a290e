//! What a deployment is made of, as its coordinator, its stages and its status need it.
use std::path::PathBuf;
use std::sync::Arc;

use capstan_planner::StagePlan;
use capstan_proto::child::{Scheduling, StageSpec, WindowIo};
use capstan_proto::manage::{DeploymentStatus, Health, LoadRequest, StageStatus};
use capstan_proto::{DeploymentId, Epoch, NodeId};
use serde::{Deserialize, Serialize};

use crate::cutter::OpenModel;
use crate::membership::Membership;
use crate::rehearsal::MadeUp;

/// Who chose the placement.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Choice {
    /// Somebody said which layers go where: it stays so.
    #[default]
    Layers,
    /// Somebody named the nodes.
    Nodes(Vec<NodeId>),
    /// The planner.
    Planner,
}

impl Choice {
    /// The nodes that were named and are there; none leaves the choice to the planner.
    pub(crate) fn there(&self, membership: &Membership) -> Vec<NodeId> {
        match self {
            Self::Nodes(named) => named.iter().copied().filter(|n| membership.online(*n)).collect(),
            Self::Planner | Self::Layers => vec![],
        }
    }
}

/// What a deployment is made of.
#[derive(Clone)]
pub(crate) struct Blueprint {
    pub(crate) id: DeploymentId,
    pub(crate) name: String,
    pub(crate) model: OpenModel,
    pub(crate) stages: Vec<StagePlan>,
    pub(crate) ctx: u32,
    pub(crate) slots: u32,
    pub(crate) ubatch: u32,
    pub(crate) decode_batch: u32,
    pub(crate) scheduling: Scheduling,
    /// The draft model that `scheduling` names, open.
    pub(crate) draft: Option<OpenModel>,
    pub(crate) created_unix_s: u64,
    /// Why it runs whole; empty when there is nothing to say.
    pub(crate) remark: String,
    /// Who chose the nodes and layers.
    pub(crate) choice: Choice,
    /// What was asked, where the placement was left to the planner.
    pub(crate) request: Option<LoadRequest>,
    /// Weights that are made up, for a rehearsal.
    pub(crate) rehearsal: Option<Arc<MadeUp>>,
}

impl Blueprint {
    /// What stage `i` loads. What is the node's own to decide, it replaces.
    pub(crate) fn spec(&self, i: usize, io: WindowIo) -> StageSpec {
        let is_driver = i + 1 == self.stages.len();
        StageSpec {
            deployment: self.id,
            model_name: self.name.clone(),
            shard: Default::default(),
            layers: self.stages[i].layers,
            stage: i as u16,
            stages: self.stages.len() as u16,
            io,
            ctx: self.ctx,
            slots: self.slots,
            ubatch: self.ubatch,
            decode_batch: self.decode_batch,
            scheduling: Scheduling {
                // Where it lies is the node's to say.
                draft: self.draft.as_ref().filter(|_| is_driver).map(|_| PathBuf::new()),
                ..self.scheduling.clone()
            },
            threads: None,
            gpu_layers: -1,
            bind: std::net::Ipv4Addr::UNSPECIFIED.into(),
            sparse: self.rehearsal.as_ref().is_some_and(|r| r.sparse),
        }
    }

    /// How the deployment is, for everyone.
    pub(crate) fn status(
        &self,
        coordinator: NodeId,
        epoch: Epoch,
        health: Health,
        detail: String,
        stages: Vec<StageStatus>,
    ) -> DeploymentStatus {
        DeploymentStatus {
            id: self.id,
            name: self.name.clone(),
            model_hash: self.model.hash.clone(),
            architecture: self.model.model.architecture().to_owned(),
            layers: self.model.model.n_layers(),
            epoch,
            health,
            detail,
            coordinator,
            ctx: self.ctx,
            slots: self.slots,
            stages,
            created_unix_s: self.created_unix_s,
        }
    }

    /// How it is before anything has happened.
    pub(crate) fn status_before(&self, coordinator: NodeId) -> DeploymentStatus {
        let stages = self.stages.iter().enumerate().map(|(i, s)| StageStatus {
            stage: i as u16,
            node: s.node,
            node_name: s.node_name.clone(),
            layers: s.layers,
            pid: None,
            shard_bytes: self.model.model.shard_bytes(s.layers),
            memory_bytes: 0,
            kv_bytes: 0,
            compute_bytes: 0,
            device: String::new(),
            health: Health::Loading,
            stats: Default::default(),
        });
        self.status(coordinator, Epoch(0), Health::Loading, self.remark.clone(), stages.collect())
    }
}
