//! What this node knows of the others: how they are and what they coordinate.
use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use capstan_proto::NodeId;
use capstan_proto::control::DeploymentList;
use capstan_proto::manage::{DeploymentStatus, LinkStatus, NodeStatus};

#[derive(Default)]
struct State {
    nodes: HashMap<NodeId, NodeStatus>,
    rtts: HashMap<NodeId, u64>,
    /// Links that this node has measured.
    links: HashMap<NodeId, LinkStatus>,
    lists: HashMap<NodeId, DeploymentList>,
}

/// What this node knows of the others.
#[derive(Default)]
pub(crate) struct View {
    state: Mutex<State>,
}

impl View {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes how a node is.
    pub(crate) fn put_node(&self, status: NodeStatus) {
        self.state().nodes.insert(status.id, status);
    }

    /// Notes a round trip in microseconds.
    pub(crate) fn put_rtt(&self, node: NodeId, rtt_us: u64) {
        self.state().rtts.insert(node, rtt_us);
    }

    /// Notes a link that this node has measured.
    pub(crate) fn put_link(&self, link: LinkStatus) {
        self.state().links.insert(link.to, link);
    }

    /// Whether this node has measured the link to another.
    pub(crate) fn has_link(&self, to: NodeId) -> bool {
        self.state().links.contains_key(&to)
    }

    /// The links that this node has measured, by their other end.
    pub(crate) fn links(&self) -> Vec<LinkStatus> {
        let mut links: Vec<_> = self.state().links.values().copied().collect();
        links.sort_by_key(|l| l.to);
        links
    }

    /// Notes what a node coordinates, unless newer news came before.
    pub(crate) fn put_list(&self, list: DeploymentList) {
        let mut state = self.state();
        let newer = state.lists.get(&list.coordinator).is_none_or(|known| known.stamp <= list.stamp);
        if newer {
            state.lists.insert(list.coordinator, list);
        }
    }

    /// How a node was when it was last heard, with the round trip in microseconds.
    pub(crate) fn node(&self, id: NodeId) -> (Option<NodeStatus>, Option<u64>) {
        let state = self.state();
        (state.nodes.get(&id).cloned(), state.rtts.get(&id).copied())
    }

    /// What others coordinate.
    pub(crate) fn deployments(&self) -> Vec<DeploymentStatus> {
        self.state().lists.values().flat_map(|l| l.deployments.iter().cloned()).collect()
    }

    /// Forgets a node.
    pub(crate) fn forget(&self, id: NodeId) {
        let mut state = self.state();
        state.nodes.remove(&id);
        state.rtts.remove(&id);
        state.links.remove(&id);
        state.lists.remove(&id);
    }

    /// Forgets everything: another cluster begins.
    pub(crate) fn clear(&self) {
        *self.state() = State::default();
    }
}
