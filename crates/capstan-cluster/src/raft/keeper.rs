//! The leader keeps voters and learners in step with the members: who comes in learns first and votes when it has caught
//! up, who left or was removed is dropped, a voter that stays away is replaced.
use std::collections::{BTreeMap, BTreeSet};
use std::sync::PoisonError;
use std::time::Duration;

use capstan_proto::NodeId;
use openraft::{ChangeMembers, EmptyNode};
use tokio::time::timeout;

use super::{RaftId, Replica};
use crate::voters::voters;

/// How far a learner may be behind to become a voter, in entries: it is through with them in one message.
const BEHIND_MAX: u64 = super::wire::ENTRIES_MAX;

/// How the log's membership is, for the node that leads.
struct Now {
    /// More than one set while voters are being changed.
    sets: Vec<BTreeSet<RaftId>>,
    nodes: BTreeSet<RaftId>,
    /// Who has nearly all of the log.
    caught_up: BTreeSet<RaftId>,
}

impl Now {
    fn voters(&self) -> BTreeSet<RaftId> {
        self.sets.last().cloned().unwrap_or_default()
    }
}

impl Replica {
    /// One look; does nothing where this node does not lead. `online` are the members that answer, with the patience
    /// that [`voters`] wants. Returns whether everything is as it should be.
    pub async fn keep(&self, online: &BTreeSet<NodeId>, limit: Duration) -> bool {
        self.online.lock().unwrap_or_else(PoisonError::into_inner).clone_from(online);
        let look = async {
            let _turn = self.changing.lock().await;
            self.keep_once().await
        };
        // What is left undone, because a message was lost or leadership went, the next look does.
        timeout(limit, look).await.unwrap_or(false)
    }

    /// None where this node does not lead.
    fn now(&self) -> Option<Now> {
        let metrics = self.raft.metrics();
        let metrics = metrics.borrow();
        if metrics.current_leader != Some(self.id) {
            return None;
        }
        let last = metrics.last_log_index.unwrap_or(0);
        let near = |at: &Option<super::LogId>| at.is_some_and(|at| at.index + BEHIND_MAX >= last);
        let replication = metrics.replication.iter().flatten();
        let membership = metrics.membership_config.membership();
        Some(Now {
            sets: membership.get_joint_config().clone(),
            nodes: membership.nodes().map(|(id, _)| *id).collect(),
            caught_up: replication.filter(|(_, at)| near(at)).map(|(id, _)| *id).collect(),
        })
    }

    fn members(&self) -> BTreeSet<RaftId> {
        let state = self.state();
        let member = |id: NodeId| Some(RaftId { node: id, life: state.life(id)? });
        state.members().active().filter_map(|m| member(m.id)).collect()
    }

    /// Who should vote if these were the members.
    fn wanted(&self, now: &Now, members: &BTreeSet<RaftId>) -> BTreeSet<RaftId> {
        let voting = now.voters();
        let nodes =
            |ids: &BTreeSet<RaftId>| -> BTreeSet<NodeId> { ids.intersection(members).map(|id| id.node).collect() };
        let (may, caught_up) = (nodes(&voting), nodes(&now.caught_up));
        let online = self.online.lock().unwrap_or_else(PoisonError::into_inner);
        let able = online.iter().copied().filter(|id| may.contains(id) || caught_up.contains(id)).collect();
        let chosen = voters(&nodes(members), &may, &able, self.id.node);
        members.iter().copied().filter(|id| chosen.contains(&id.node)).collect()
    }

    async fn keep_once(&self) -> bool {
        let Some(now) = self.now() else { return true };
        let members = self.members();
        let new: BTreeMap<_, _> = members.difference(&now.nodes).map(|id| (*id, EmptyNode::new())).collect();
        if !new.is_empty() && !self.change(ChangeMembers::AddNodes(new)).await {
            return false;
        }
        let wanted = self.wanted(&now, &members);
        if wanted.is_empty() {
            return false;
        }
        // A change in two steps that was cut short is finished, or taken back, by asking for the set that is right now.
        let settled = now.sets.len() == 1 && wanted == now.voters();
        if !settled && !self.change(ChangeMembers::ReplaceAllVoters(wanted)).await {
            return false;
        }
        let gone: BTreeSet<RaftId> = now.nodes.difference(&members).copied().collect();
        gone.is_empty() || self.change(ChangeMembers::RemoveNodes(gone)).await
    }

    /// Takes a node's vote away. False when nobody can take it over, or this node does not lead, or not any more: a
    /// leader that takes its own vote away steps down. The caller holds [`Replica::changing`](super::Replica).
    pub(super) async fn free_of_vote(&self, node: NodeId) -> bool {
        let Some(now) = self.now() else { return false };
        if now.sets.iter().flatten().all(|id| id.node != node) {
            return true;
        }
        let mut members = self.members();
        members.retain(|id| id.node != node);
        let wanted = self.wanted(&now, &members);
        !wanted.is_empty() && self.change(ChangeMembers::ReplaceAllVoters(wanted)).await && self.now().is_some()
    }

    async fn change(&self, change: ChangeMembers<RaftId, EmptyNode>) -> bool {
        // Voters that step down go on as learners; RemoveNodes takes those away who are no members.
        match self.raft.change_membership(change, true).await {
            Ok(_) => true,
            Err(error) => {
                tracing::debug!(%error, "voters or learners could not be changed yet");
                false
            }
        }
    }
}
