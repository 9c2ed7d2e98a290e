//! Loads a model anew where another placement has become worth it: a machine came, was measured, or has more memory free.
//!
//! Only models whose placement was left to the planner move, only while nobody asks them anything, and only when what is
//! saved pays for the time in which they do not answer ([`capstan_planner::Move`]). The log and the model's detail say so.
use std::collections::HashMap;
use std::sync::Arc;

use capstan_gguf::ModelProfile;
use capstan_planner::{Move, Placement, StagePlan, machines};
use capstan_proto::manage::{DeploymentStatus, Health, LoadEvent, LoadRequest, ManageError};
use capstan_proto::{DeploymentId, NodeId};
use tokio::time::{Instant, sleep};

use crate::deployments::{self, Movable};
use crate::fleet::Fleet;
use crate::node::Shared;
use crate::placing;

/// What starting processes, caches and links takes besides reading and sending, in seconds.
const START_S: f64 = 3.0;

/// How much a model was used since it was first seen.
struct Watched {
    since: Instant,
    rows: u64,
    rows_at_last_look: u64,
}

/// Rows that the stages of a deployment have computed at most, and whether somebody asks it something.
pub(crate) fn usage(d: &DeploymentStatus) -> (u64, bool) {
    let rows = d.stages.iter().map(|s| s.stats.rows).max().unwrap_or(0);
    (rows, d.stages.iter().any(|s| s.stats.slots_used > 0 || s.stats.queued > 0))
}

/// Looks again and again whether a model would be better off elsewhere.
pub(crate) async fn move_loop(shared: Arc<Shared>) {
    let mut watched: HashMap<DeploymentId, Watched> = HashMap::new();
    loop {
        sleep(shared.config.moves.look_every).await;
        let movable = shared.deployments.movable();
        watched.retain(|id, _| movable.iter().any(|m| m.status.id == *id));
        for one in movable {
            let (rows, busy) = usage(&one.status);
            let now = Instant::now();
            let seen = watched.entry(one.status.id).or_insert(Watched { since: now, rows, rows_at_last_look: rows });
            let idle = !busy && rows == std::mem::replace(&mut seen.rows_at_last_look, rows);
            let watched_for = now - seen.since;
            if one.status.health != Health::Ready || !idle || watched_for < shared.config.moves.watched_min {
                continue;
            }
            // A new epoch counts from zero.
            let rows_per_s = rows.saturating_sub(seen.rows) as f64 / watched_for.as_secs_f64();
            if let Some((because, back)) = worth(&shared, &one, rows_per_s).await {
                watched.remove(&one.status.id);
                move_one(&shared, one, because, back).await;
            }
        }
    }
}

/// Why another placement pays, and a request for the present one, should that fail.
async fn worth(shared: &Arc<Shared>, one: &Movable, rows_per_s: f64) -> Option<(String, LoadRequest)> {
    let profile = one.model.model.profile();
    let stage = |s: &capstan_proto::manage::StageStatus| StagePlan {
        node: s.node,
        node_name: s.node_name.clone(),
        layers: s.layers,
        memory_bytes: s.memory_bytes,
    };
    let stages: Vec<_> = one.status.stages.iter().map(stage).collect();
    let held: Vec<(NodeId, u64)> = stages.iter().map(|s| (s.node, s.memory_bytes)).collect();
    let fleet = Fleet::of(shared).with_free(&held);
    let now = Placement::new(profile.n_layers, stages.clone(), vec![]).ok()?;
    let then = placing::again(shared, one, fleet.clone()).await?;
    if then.stages().iter().map(|s| (s.node, s.layers)).eq(stages.iter().map(|s| (s.node, s.layers))) {
        return None;
    }
    let (objective, slots) = (one.request.objective.unwrap_or_default(), one.status.slots);
    let row_s = |placement| fleet.row_s(&profile, placement, objective, slots);
    let (now_s, then_s) = (row_s(&now)?, row_s(&then)?);
    let found = Move { now_s, then_s, rows_per_s, reload_s: reload_s(&fleet, &profile, &stages, &then) };
    let because = found.pays()?;
    let layers = stages.iter().map(|s| (s.node_name.clone(), s.layers)).collect();
    Some((because, LoadRequest { layers, nodes: vec![], ..one.request.clone() }))
}

/// Moves what is coordinated here away from a node, while requests wait. Returns what could not be moved, and why.
pub(crate) async fn away_from(shared: &Arc<Shared>, node: NodeId) -> Vec<String> {
    let on_it = |d: &DeploymentStatus| d.stages.iter().any(|s| s.node == node);
    let there: Vec<_> = shared.deployments.list().into_iter().filter(on_it).collect();
    let mut trouble = Vec::new();
    // One after the other: the planner counts with what is free then.
    for d in there {
        if let Err(why) = shared.deployments.vacate(d.id, node).await {
            trouble.push(format!("model {} stays: {why}", d.name));
        }
    }
    trouble
}

/// How long the model does not answer: shards that a node does not have are sent, then every stage reads its own.
fn reload_s(fleet: &Fleet, profile: &ModelProfile, now: &[StagePlan], then: &Placement) -> f64 {
    let bytes = |s: &StagePlan| -> f64 {
        let span = s.layers.start() as usize..s.layers.end() as usize;
        profile.layers.get(span).unwrap_or_default().iter().map(|l| l.weight_bytes as f64).sum()
    };
    let new = |s: &&StagePlan| !now.iter().any(|old| (old.node, old.layers) == (s.node, s.layers));
    let sent: f64 = then.stages().iter().filter(new).map(bytes).sum();
    let read = then.stages().iter().map(|s| bytes(s) / fleet.disk_bytes_per_s(s.node)).fold(0.0, f64::max);
    let rate = fleet.links().map_or(machines::DISK_BYTES_PER_S, |l| l.usual.bytes_per_s);
    START_S + read + sent / rate
}

/// Loads a model anew elsewhere, or where it was if that does not work.
async fn move_one(shared: &Arc<Shared>, one: Movable, because: String, back: LoadRequest) {
    tracing::info!(model = one.status.name, because, "the model is loaded anew elsewhere");
    if let Err(error) = shared.deployments.unload(one.status.id).await {
        tracing::warn!(model = one.status.name, %error, "the model could not be moved");
        return;
    }
    let Err(reason) = load(shared, one.request, format!("moved by itself: {because}")).await else { return };
    tracing::warn!(model = one.status.name, reason, "the model could not be loaded elsewhere; it goes back");
    if let Err(reason) = load(shared, back, format!("it could not be moved: {reason}")).await {
        tracing::error!(model = one.status.name, reason, "the model could not be loaded where it was, either");
    }
}

async fn load(shared: &Arc<Shared>, request: LoadRequest, remark: String) -> Result<(), String> {
    let told = |e: ManageError| e.message;
    let mut events = deployments::load_because(shared, request, Some(remark)).await.map_err(told)?;
    while let Some(event) = events.recv().await {
        match event {
            LoadEvent::Ready { .. } => return Ok(()),
            LoadEvent::Failed { message, .. } => return Err(message),
            _ => {}
        }
    }
    Err("it ended before it was ready".to_owned())
}
