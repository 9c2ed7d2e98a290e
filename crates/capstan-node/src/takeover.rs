//! A coordinator that is lost does not take its deployments with it: another node goes on with them.
//!
//! The leader of the log looks, for whom a majority hears counts, not whom some other node happens to hear. It has the
//! recipe (that travels in the log) and places the deployment anew, by compare and set on the epoch of before. A node that
//! comes back finds in the log that its deployment is another's now, and lets it go.
//!
//! A model of the catalogue can be taken over, for its header is known to all and its layers are where they were copied
//! to. One that was loaded from a file lies on its coordinator alone: it waits for that node.
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use capstan_cluster::fence::{LEASE_MS, TAKEOVER_MS};
use capstan_cluster::{Placed, Seat};
use capstan_planner::StagePlan;
use capstan_proto::{DeploymentId, NodeId};
use tokio::time::{Instant, sleep};

use crate::agreement::{self, NotPlaced};
use crate::blueprint::{Blueprint, Choice};
use crate::deployments;
use crate::fleet::Fleet;
use crate::membership::{GOODBYE_GRACE, Membership};
use crate::node::Shared;
use crate::placing;
use crate::saved::Saved;
use crate::scheduling::Wanted;

/// How often coordinators are looked at.
const LOOK_EVERY: Duration = Duration::from_millis(250);
/// How long after an attempt that failed the next one is made.
const TRY_AGAIN: Duration = Duration::from_secs(5);

/// Looks again and again whether a coordinator is lost.
pub(crate) async fn takeover_loop(shared: Arc<Shared>) {
    let mut away: HashMap<NodeId, Instant> = HashMap::new();
    let mut tried: HashMap<DeploymentId, Instant> = HashMap::new();
    loop {
        sleep(LOOK_EVERY).await;
        let now = Instant::now();
        tried.retain(|_, at| now < *at + TRY_AGAIN);
        set_right(&shared, &mut tried).await;
        let Some(state) = shared.membership.state().filter(|_| may_act(&shared)) else {
            away.clear();
            continue;
        };
        let coordinators: Vec<NodeId> = state.deployments().map(|(_, p)| p.coordinator).collect();
        away.retain(|node, _| coordinators.contains(node) && !shared.membership.online(*node));
        for node in coordinators {
            if !shared.membership.online(node) {
                away.entry(node).or_insert(now);
            }
        }
        for (id, placed) in state.deployments() {
            if is_nobodys(&shared.membership, placed) && !tried.contains_key(id) {
                tracing::error!(%id, "a deployment is given up: those who could go on with it are no members any more");
                agreement::withdraw(&shared, *id, placed.epoch);
                tried.insert(*id, now);
            }
            let lost =
                away.get(&placed.coordinator).is_some_and(|since| lost(&shared, placed.coordinator, *since, now));
            if !lost || placed.recipe.is_empty() || shared.deployments.has(*id) || tried.contains_key(id) {
                continue;
            }
            if let Err(reason) = take_over(&shared, *id, placed).await {
                let coordinator = shared.membership.name_of(placed.coordinator);
                tracing::warn!(coordinator, reason, "a deployment of a lost node could not be taken over");
                tried.insert(*id, Instant::now());
            }
        }
    }
}

/// Whether nobody who is a member can go on with a deployment, now or later.
fn is_nobodys(membership: &Membership, placed: &Placed) -> bool {
    let feasible = || Saved::read(&placed.recipe).is_ok_and(|saved| saved.is_feasible(|n| membership.is_member(n)));
    !membership.is_member(placed.coordinator) && !feasible()
}

/// What the log says is coordinated here and is not: it was ended, and the log has not heard; it could not be brought
/// back after a restart; or the log's answer to a takeover was lost.
async fn set_right(shared: &Arc<Shared>, tried: &mut HashMap<DeploymentId, Instant>) {
    let membership = &shared.membership;
    let Some(state) = membership.state().filter(|_| membership.is_current() && membership.why_not().is_none()) else {
        return;
    };
    for (id, placed) in state.deployments().filter(|(_, p)| p.coordinator == shared.id) {
        if shared.deployments.has(*id) || shared.deployments.comes_back(*id) || tried.contains_key(id) {
            continue;
        }
        tried.insert(*id, Instant::now());
        let taken_up = if shared.deployments.has_ended(*id) || placed.recipe.is_empty() {
            Err("it was ended".to_owned())
        } else {
            take_up(shared, *id, placed).await
        };
        if let Err(reason) = taken_up {
            tracing::info!(deployment = %id, reason, "a deployment that is no more is taken out of the log");
            agreement::withdraw(shared, *id, placed.epoch);
        }
    }
}

async fn take_up(shared: &Arc<Shared>, id: DeploymentId, placed: &Placed) -> Result<(), String> {
    let blueprint = Saved::read(&placed.recipe)?.open(shared, id).await?;
    deployments::take_up(shared, blueprint, placed.epoch, vec![]).map_err(|e| e.message)
}

/// Whether this node leads, with a majority, and is not about to end.
fn may_act(shared: &Shared) -> bool {
    let membership = &shared.membership;
    let leads = membership.standing().leader.is_some_and(|l| l.node == shared.id);
    // Until then a node that is cut off from this one may still believe what the leader before said.
    let recent = |ago: Duration| ago < Duration::from_millis(TAKEOVER_MS);
    let handed_over = membership.replica().and_then(|r| r.handed_over()).is_some_and(recent);
    leads
        && !handed_over
        && membership.is_current()
        && membership.why_not().is_none()
        && !shared.draining.is_cancelled()
}

/// Whether a coordinator has been away for so long that it does not serve any more.
fn lost(shared: &Shared, node: NodeId, since: Instant, now: Instant) -> bool {
    let membership = &shared.membership;
    let away = now.duration_since(since);
    let wait = if !membership.is_member(node) {
        Duration::from_millis(TAKEOVER_MS)
    } else if membership.fell_silent(node) {
        // Its lease was running while it was silent; what is left of it is the difference of two clocks.
        Duration::from_millis(TAKEOVER_MS - LEASE_MS)
    } else {
        GOODBYE_GRACE
    };
    away > wait
}

/// Goes on with a deployment on the nodes that are there.
async fn take_over(shared: &Arc<Shared>, id: DeploymentId, placed: &Placed) -> Result<(), String> {
    let saved = Saved::read(&placed.recipe)?;
    if shared.deployments.list().iter().any(|d| d.name == saved.name) {
        return Err(format!("another model is served as {:?} here", saved.name));
    }
    let mut blueprint = saved.open(shared, id).await?;
    let before = std::mem::take(&mut blueprint.stages);
    blueprint.stages = stages(shared, &blueprint, &before).await?;
    let wanted = Wanted::of(&blueprint);
    (blueprint.scheduling, blueprint.draft) = wanted.scheduling(blueprint.stages.len());
    let seats = blueprint.stages.iter().map(|s| Seat { node: s.node, layers: s.layers }).collect();
    let recipe = Saved::recipe(&blueprint);
    let epoch = match agreement::place(shared, id, placed.epoch, seats, recipe).await {
        Ok(epoch) => epoch,
        // Another was faster.
        Err(_) if shared.membership.state().is_none_or(|s| s.placed(id) != Some(placed)) => {
            return Ok(());
        }
        Err(NotPlaced::ForNow(why) | NotPlaced::ForGood(why)) => return Err(why),
    };
    let coordinator = shared.membership.name_of(placed.coordinator);
    tracing::warn!(model = saved.name, coordinator, epoch = epoch.0, "a deployment of a lost node goes on from here");
    deployments::take_up(shared, blueprint, epoch, before).map_err(|e| e.message)
}

/// Where the layers go: where they are, if all those nodes are there; else as the planner says.
async fn stages(shared: &Arc<Shared>, blueprint: &Blueprint, before: &[StagePlan]) -> Result<Vec<StagePlan>, String> {
    let membership = &shared.membership;
    let there = |s: &&StagePlan| membership.online(s.node);
    if before.iter().all(|s| membership.online(s.node)) {
        return Ok(before.to_vec());
    }
    let nodes = match &blueprint.choice {
        Choice::Layers => {
            let missing: Vec<_> = before.iter().filter(|s| !there(s)).map(|s| membership.name_of(s.node)).collect();
            return Err(format!("somebody fixed its layers, and of its nodes {} are missing", missing.join(", ")));
        }
        choice => choice.there(membership),
    };
    if nodes.is_empty() && blueprint.choice != Choice::Planner {
        return Err("none of the nodes that were named for it is there".to_owned());
    }
    let options = Wanted::of(blueprint).options(blueprint, nodes);
    let held: Vec<_> = before.iter().filter(there).map(|s| (s.node, s.memory_bytes)).collect();
    let fleet = Fleet::of(shared).with_free(&held);
    let placed = placing::place_on(shared, fleet, &blueprint.model, options, false).await;
    placed.map(|(placement, _)| placement.stages().to_vec()).map_err(|e| e.message)
}
