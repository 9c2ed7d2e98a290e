//! A driver: it gets an epoch by a committed placement, waits out the old one, begins its own on all stages, and works
//! until it is told that its time is over. A stubborn one goes on for a while nevertheless.
use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use capstan_cluster::fence::{Fenced, TAKEOVER_MS};
use capstan_cluster::{Command, Response, Seat};
use capstan_proto::{DeploymentId, Epoch, LayerRange, NodeId};
use tokio::time::{sleep, timeout};

use super::Mistake;
use super::node::Node;

/// How long a stage is asked to begin before the driver gives up.
const BEGIN: Duration = Duration::from_secs(3);
/// How long one message to a stage is waited for.
const PATIENCE: Duration = Duration::from_millis(300);

/// Places a deployment on some members and works as long as it may, at most `pieces` pieces.
pub async fn drive(nodes: Arc<Vec<Arc<Node>>>, node: Arc<Node>, deployment: DeploymentId, stubborn: bool, pieces: u32) {
    let Some(state) = node.state() else { return };
    let (net, books) = (node.shared.net.clone(), node.shared.books.clone());
    let members: Vec<NodeId> = state.members().active().map(|m| m.id).collect();
    if members.is_empty() {
        return;
    }
    let previous = state.placed(deployment);
    let old: BTreeSet<NodeId> = previous.iter().flat_map(|p| p.seats.iter().map(|s| s.node)).collect();
    let seats: Vec<Seat> = net.draw(|dice| {
        let stages = dice.between(1, 3) as u32;
        let seat = |i: u32| Some(Seat { node: *dice.pick(&members), layers: LayerRange::new(i, i + 1).ok()? });
        (0..stages).filter_map(seat).collect()
    });
    let command = Command::Place {
        deployment,
        previous: previous.map_or(Epoch(0), |p| p.epoch),
        seats: seats.clone(),
        recipe: vec![],
        attempt: net.draw(|dice| dice.bits()),
    };
    let Some(Ok(Response::Epoch(epoch))) = node.propose(command).await else { return };
    let committed = node.now_ms();

    let at = |id: NodeId| nodes.iter().find(|n| n.id == id).cloned();
    // Whoever served the old epoch hears that it is over, or its lease runs out. Where the old one may never have begun,
    // that of one before it may still run, at nodes that nobody here knows of.
    let began = previous.is_none_or(|p| node.has_begun(deployment, p.epoch));
    let mut silent = old;
    while (!silent.is_empty() || !began)
        && node.now_ms() < committed + TAKEOVER_MS
        && node.shared.mistake != Some(Mistake::NoLease)
    {
        for id in silent.clone() {
            if let Some(other) = at(id)
                && tell(&node, &other, deployment, epoch, false).await
            {
                silent.remove(&id);
            }
        }
        sleep(Duration::from_millis(100)).await;
    }
    let mut waiting: BTreeSet<NodeId> = seats.iter().map(|s| s.node).collect();
    let begin = async {
        while !waiting.is_empty() {
            for id in waiting.clone() {
                if let Some(other) = at(id)
                    && tell(&node, &other, deployment, epoch, true).await
                {
                    waiting.remove(&id);
                }
            }
            sleep(Duration::from_millis(50)).await;
        }
    };
    if timeout(BEGIN, begin).await.is_err() {
        return;
    }
    books.note(|| format!("{:?} begins epoch {epoch} of {deployment}", node.id), (3, epoch.0));
    books.begun(deployment, epoch);
    node.note_begun(deployment, epoch);

    for _ in 0..pieces {
        for seat in &seats {
            let Some(other) = at(seat.node) else { continue };
            let over = work(&node, &other, deployment, epoch).await;
            if over && !stubborn {
                return;
            }
        }
        let pause = net.draw(|dice| dice.between(50, 400));
        sleep(Duration::from_millis(pause)).await;
    }
}

/// Tells a node that an epoch has begun; true when it says that it knows now.
async fn tell(from: &Arc<Node>, to: &Arc<Node>, deployment: DeploymentId, epoch: Epoch, seat: bool) -> bool {
    let net = &from.shared.net;
    let talk = async {
        net.carry(from.id, to.id).await.ok()?;
        let knows = to.begin(deployment, epoch, seat);
        net.carry(to.id, from.id).await.ok()?;
        Some(knows)
    };
    timeout(PATIENCE, talk).await.ok().flatten().unwrap_or(false)
}

/// Sends a piece of work, which may come twice; true when the stage says that the epoch is over.
async fn work(from: &Arc<Node>, to: &Arc<Node>, deployment: DeploymentId, epoch: Epoch) -> bool {
    let net = &from.shared.net;
    if let Some(again) = net.doubled() {
        let (to, from) = (to.clone(), from.id);
        tokio::spawn(async move {
            sleep(again).await;
            to.work(from, deployment, epoch).ok();
        });
    }
    let talk = async {
        net.carry(from.id, to.id).await.ok()?;
        let done = to.work(from.id, deployment, epoch);
        net.carry(to.id, from.id).await.ok()?;
        Some(matches!(done, Err(Fenced::Old { .. })))
    };
    timeout(PATIENCE, talk).await.ok().flatten().unwrap_or(false)
}
