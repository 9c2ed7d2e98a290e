//! The leader keeps voters and learners in step with the members: who comes in learns first and votes when it has caught
//! up, who left or was removed is dropped, a voter that stays away is replaced.
use std::collections::{BTreeMap, BTreeSet};
use std::sync::PoisonError;
use std::time::Duration;

use capstan_proto::NodeId;
use openraft::{ChangeMembers, EmptyNode, Raft};
use tokio::time::timeout;

use super::{RaftId, RaftMessage, RaftReply, RaftRequest, Replica, Types};
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
    /// Whether the state has all that is in the log. An entry that is still under way may be that somebody leaves, who
    /// must not be given a vote meanwhile: nobody would talk to that voter any more.
    applied: bool,
}

/// While it lives, a replica neither says that it leads nor stands for election.
struct Quiet<'a>(&'a Raft<Types>);

impl<'a> Quiet<'a> {
    fn keep(raft: &'a Raft<Types>) -> Self {
        raft.runtime_config().heartbeat(false);
        raft.runtime_config().elect(false);
        Self(raft)
    }
}

impl Drop for Quiet<'_> {
    fn drop(&mut self) {
        self.0.runtime_config().heartbeat(true);
        self.0.runtime_config().elect(true);
    }
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
            applied: metrics.last_applied.is_some_and(|at| at.index >= last),
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
        if !now.applied {
            return false;
        }
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
    /// leader hands over to another voter, who takes its vote away when asked again. The caller holds
    /// [`Replica::changing`](super::Replica).
    pub(super) async fn free_of_vote(&self, node: NodeId) -> bool {
        let Some(now) = self.now() else { return false };
        if now.sets.iter().flatten().all(|id| id.node != node) {
            return true;
        }
        if !now.applied {
            return false;
        }
        let mut members = self.members();
        members.retain(|id| id.node != node);
        let mut wanted = self.wanted(&now, &members);
        if wanted.is_empty() {
            return false;
        }
        if node != self.id.node {
            return self.change(ChangeMembers::ReplaceAllVoters(wanted)).await && self.now().is_some();
        }
        // A leader that took its own vote away and was cut off before the others had that would leave them waiting for
        // it for ever: its log is the longest, and openraft lets nobody stand who does not vote by his own log. So
        // another leads first, and takes the vote away.
        let online = self.online.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let able = |id: &&RaftId| **id != self.id && online.contains(&id.node);
        let mut heirs: Vec<RaftId> = now.voters().iter().filter(able).copied().collect();
        if now.sets.len() > 1 || heirs.is_empty() {
            heirs = wanted.iter().filter(able).copied().collect();
            wanted.insert(self.id);
            if heirs.is_empty() || !self.change(ChangeMembers::ReplaceAllVoters(wanted)).await {
                return false;
            }
        }
        self.hand_over(&heirs).await;
        false
    }

    /// Has another voter lead, if it can.
    async fn hand_over(&self, heirs: &[RaftId]) {
        let _quiet = Quiet::keep(&self.raft);
        let limit = self.settings.patience();
        for to in heirs {
            let message = RaftMessage { to: *to, request: RaftRequest::Stand };
            // One of them may be off, or of a build that does not know the message.
            match timeout(limit / 4, self.transport.call(message, limit / 4)).await {
                Ok(Ok(RaftReply::Elsewhere(_))) => break,
                other => tracing::debug!(?other, "a voter could not be told to lead"),
            }
        }
        // Also without that message: whoever hears nothing from the leader for long enough stands by himself.
        let elsewhere = |m: &openraft::RaftMetrics<RaftId, EmptyNode>| m.current_leader.is_some_and(|l| l != self.id);
        timeout(2 * limit, self.raft.metrics().wait_for(elsewhere)).await.ok();
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
