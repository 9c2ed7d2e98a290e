//! What this node does about the replicated state: it keeps voters while it leads, acts on changes, tells where it is, and
//! takes part in another log when it joins, leaves, or is put out.
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use capstan_cluster::raft::{ProposeError, Replica, Standing};
use capstan_cluster::{Command, Refusal, Response, Seat};
use capstan_proto::{DeploymentId, Epoch};
use tokio::time::{sleep, timeout};

use crate::deployments;
use crate::endpoint;
use crate::error::{CallError, NodeError};
use crate::node::{Shared, until_stopped};
use crate::raft_link::RaftLink;

/// Between two looks of the leader at voters and learners.
const KEEP_EVERY: Duration = Duration::from_millis(500);
/// How long the start waits until the models of before are open.
const RESUME_WAIT: Duration = Duration::from_secs(10);
/// How long the leader is looked for at a time.
const ASK_LIMIT: Duration = Duration::from_secs(2);
/// How long one look may take.
const KEEP_LIMIT: Duration = Duration::from_secs(10);
/// Between two looks whether this node is dialled elsewhere now.
const REFRESH_EVERY: Duration = Duration::from_secs(1);

/// Takes part in the log of the cluster of the moment, and acts on its changes.
pub(crate) async fn take_part(shared: &Arc<Shared>) -> Result<(), NodeError> {
    let link = RaftLink { client: shared.raft_client.clone(), cluster: shared.membership.cluster() };
    let replica = shared.membership.take_part(Arc::new(link)).await?;
    tokio::spawn(until_stopped(shared.clone(), follow(shared.clone(), replica)));
    Ok(())
}

/// Goes over from the log of one cluster to that of another, after the membership has.
pub(crate) async fn go_over(shared: &Arc<Shared>, old: Option<Arc<Replica>>) -> Result<(), NodeError> {
    if let Some(old) = old {
        old.stop().await;
    }
    take_part(shared).await
}

/// Acts on changes until the replica ends. Boxed, because being put out of one cluster begins to follow another.
fn follow(shared: Arc<Shared>, replica: Arc<Replica>) -> Pin<Box<dyn Future<Output = ()> + Send>> {
    Box::pin(follow_changes(shared, replica))
}

async fn follow_changes(shared: Arc<Shared>, replica: Arc<Replica>) {
    let mut changes = replica.changes();
    // It must not be held here: its file is let go when the last hold is.
    drop(replica);
    loop {
        let state = changes.borrow_and_update().state.clone();
        if state.removed(shared.id).is_some() {
            tokio::spawn(until_stopped(shared.clone(), put_out(shared.clone())));
            return;
        }
        // An entry of another cluster's log, which has just ended, is nobody's business any more.
        let ours = state.cluster() == Some(shared.membership.cluster());
        if ours && shared.membership.remember(&state) {
            shared.members_changed();
        }
        let over = |id: &DeploymentId| {
            state.is_withdrawn(*id) || state.placed(*id).is_some_and(|p| p.coordinator != shared.id)
        };
        for id in shared.deployments.ids().into_iter().filter(over).filter(|_| ours) {
            tracing::warn!(%id, "this deployment is another node's now, or was unloaded while this one was away");
            let shared = shared.clone();
            tokio::spawn(async move { shared.deployments.unload(id).await });
        }
        if changes.changed().await.is_err() {
            return;
        }
    }
}

/// Keeps voters and learners while this node leads, and looks for the leader while it hears of none.
pub(crate) async fn keep_loop(shared: Arc<Shared>) {
    loop {
        sleep(KEEP_EVERY).await;
        let Some(replica) = shared.membership.replica() else { continue };
        replica.keep(&shared.membership.present(), KEEP_LIMIT).await;
        if !replica.has_majority() {
            // The leader may have come in while this node was cut off: a member that it knows has to name it first.
            let others: Vec<_> = shared.membership.others().iter().map(|m| m.id).collect();
            replica.confirm(ASK_LIMIT, &others).await;
            for other in others {
                if let Err(CallError::Removed { .. }) = shared.client.stand(other).await {
                    tokio::spawn(until_stopped(shared.clone(), put_out(shared.clone())));
                    break;
                }
            }
        }
    }
}

/// Interfaces come and go; others must know where this node is now.
pub(crate) async fn refresh_loop(shared: Arc<Shared>) {
    loop {
        shared.membership.refresh(endpoint::addrs(&shared.endpoint)).await;
        sleep(REFRESH_EVERY).await;
    }
}

/// Finds out who is a member now and what is whose, and takes up what this node coordinated before. Only then it serves.
pub(crate) async fn become_current(shared: Arc<Shared>) {
    let cluster = shared.membership.cluster();
    shared.membership.confirm().await;
    if shared.membership.cluster() != cluster {
        // It has left meanwhile, and what it coordinated stays behind.
        return;
    }
    let resumed = tokio::spawn(until_stopped(shared.clone(), deployments::resume(shared.clone())));
    // One may lie on a disk that does not answer.
    if timeout(RESUME_WAIT, resumed).await.is_err() {
        tracing::warn!("models of before the start take long to open; they come back later");
    }
    if let Some(state) = shared.membership.state() {
        let here = |id| shared.deployments.has(id) || shared.deployments.comes_back(id);
        for (id, placed) in state.deployments().filter(|(id, p)| p.coordinator == shared.id && !here(**id)) {
            // It was unloaded, and the log has not heard: what is not on this node's disk is no more.
            withdraw(&shared, *id, placed.epoch);
            shared.deployments.note_ended(*id);
        }
    }
    shared.membership.set_current();
    shared.poll_now.notify_one();
}

/// The cluster has removed this node: it ends what it runs there and is alone in a cluster of its own.
pub(crate) async fn put_out(shared: Arc<Shared>) {
    let cluster = shared.membership.cluster();
    let _moving = shared.moving.lock().await;
    if shared.membership.cluster() != cluster {
        return;
    }
    tracing::error!(
        "this node was removed from its cluster; it is alone in a new one and cannot go back with this key"
    );
    shared.deployments.unload_all().await;
    if let Err(error) = be_alone(&shared).await {
        tracing::error!(%error, "this node cannot found a cluster of its own");
    }
}

/// Forgets the cluster; this node is the only member of a new one.
pub(crate) async fn be_alone(shared: &Arc<Shared>) -> Result<(), NodeError> {
    let old = shared.membership.be_alone(endpoint::addrs(&shared.endpoint));
    shared.deployments.forget_saved();
    shared.end_stages();
    shared.alone_again();
    go_over(shared, old).await
}

/// Why a placement has no epoch.
pub(crate) enum NotPlaced {
    /// A majority does not answer.
    ForNow(String),
    /// The cluster says no.
    ForGood(String),
}

/// Has the cluster agree on a placement, which gives it its epoch. `epoch` is the one before, as far as it is known.
pub(crate) async fn place(
    shared: &Shared,
    deployment: DeploymentId,
    epoch: Epoch,
    seats: Vec<Seat>,
    recipe: Vec<u8>,
) -> Result<Epoch, NotPlaced> {
    // After a restart the log knows better than the coordinator, as long as nobody else has placed it since.
    let placed = shared.membership.state().and_then(|s| s.placed(deployment).cloned());
    let own = placed.filter(|p| p.coordinator == shared.id).map_or(epoch, |p| p.epoch.max(epoch));
    let command = Command::Place { deployment, previous: own, seats, recipe, attempt: rand::random() };
    match shared.membership.propose(command).await {
        Ok(Response::Epoch(epoch)) => Ok(epoch),
        Ok(_) => Err(NotPlaced::ForGood("the log answered something else; update capstan on all nodes".into())),
        // An answer that was lost, or a node that is being removed. If it is another's, the log says so in a moment.
        Err(error @ ProposeError::Refused(Refusal::EpochMoved { .. } | Refusal::SeatOutside(_))) => {
            Err(NotPlaced::ForNow(error.to_string()))
        }
        Err(error @ ProposeError::Refused(_)) => Err(NotPlaced::ForGood(error.to_string())),
        Err(error) => Err(NotPlaced::ForNow(error.to_string())),
    }
}

/// Lets the cluster know that a deployment is no more. Nobody waits for it: what was not heard is said again
/// ([`crate::takeover`]).
pub(crate) fn withdraw(shared: &Arc<Shared>, deployment: DeploymentId, epoch: Epoch) {
    let membership = shared.membership.clone();
    tokio::spawn(until_stopped(shared.clone(), async move {
        let command = Command::Withdraw { deployment, previous: epoch };
        if let Err(error) = membership.propose(command).await {
            tracing::warn!(%error, "the cluster could not be told that a model was unloaded");
        }
    }));
}

/// Who votes, as a sentence.
pub(crate) fn describe(shared: &Shared, standing: &Standing) -> String {
    if let Some(why) = shared.membership.why_not() {
        return format!("nothing can be changed now: {why}");
    }
    let names: Vec<String> = standing.voters.iter().map(|id| shared.membership.name_of(*id)).collect();
    match (names.as_slice(), standing.learners.len()) {
        ([], _) | ([_], 0) => String::new(),
        ([one], _) => {
            format!("node {one} votes alone: while it is away nothing can be changed; three nodes can spare one")
        }
        (names, 0) => format!("all {} nodes vote", names.len()),
        (names, learners) => format!("{} vote, {learners} more learn", names.join(", ")),
    }
}
