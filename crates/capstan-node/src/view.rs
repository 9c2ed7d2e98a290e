//! What this node knows of the others: how they are and what they coordinate.
use std::collections::{HashMap, HashSet};
use std::sync::{Mutex, MutexGuard, PoisonError};

use capstan_cluster::{LinkWatch, Placed, SlowLink, State};
use capstan_proto::control::DeploymentList;
use capstan_proto::manage::{DeploymentStatus, Health, LinkStatus, NodeStatus};
use capstan_proto::{DeploymentId, NodeId};

use crate::node::Shared;
use crate::saved::Saved;

#[derive(Default)]
struct Heard {
    nodes: HashMap<NodeId, NodeStatus>,
    rtts: HashMap<NodeId, u64>,
    watch: LinkWatch,
    /// Links that were measured before they changed.
    changed: HashSet<NodeId>,
    /// Links that this node has measured.
    links: HashMap<NodeId, LinkStatus>,
    lists: HashMap<NodeId, DeploymentList>,
}

/// What this node knows of the others.
#[derive(Default)]
pub(crate) struct View {
    state: Mutex<Heard>,
}

impl View {
    fn state(&self) -> MutexGuard<'_, Heard> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes how a node is.
    pub(crate) fn put_node(&self, status: NodeStatus) {
        self.state().nodes.insert(status.id, status);
    }

    /// Notes a round trip in microseconds. Returns whether the link has become slow, or well again; then it has to be
    /// measured anew.
    pub(crate) fn put_rtt(&self, node: NodeId, rtt_us: u64) -> bool {
        let mut state = self.state();
        state.rtts.insert(node, rtt_us);
        let changed = state.watch.round_trip(node, rtt_us);
        if changed {
            state.changed.insert(node);
        }
        changed
    }

    /// The links from here that are slower than they were.
    pub(crate) fn slow_links(&self) -> Vec<SlowLink> {
        self.state().watch.slow().collect()
    }

    /// Notes a link that this node has measured. Returns what it was before.
    pub(crate) fn put_link(&self, link: LinkStatus) -> Option<LinkStatus> {
        let mut state = self.state();
        state.changed.remove(&link.to);
        state.links.insert(link.to, link)
    }

    /// Whether this node has measured the link to another since then, and it is as it was.
    pub(crate) fn has_link(&self, to: NodeId, since_unix_s: u64) -> bool {
        let state = self.state();
        state.links.get(&to).is_some_and(|l| l.measured_unix_s >= since_unix_s) && !state.changed.contains(&to)
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
        state.watch.forget(id);
        state.changed.remove(&id);
        state.lists.remove(&id);
    }

    /// Forgets everything: another cluster begins.
    pub(crate) fn clear(&self) {
        *self.state() = Heard::default();
    }
}

impl Shared {
    /// Deployments of the whole cluster, as this node knows them.
    pub(crate) fn all_deployments(&self) -> Vec<DeploymentStatus> {
        let mut all = self.deployments.list();
        let placed = self.membership.state();
        let coordinator = |id| placed.as_ref().and_then(|state| Some(state.placed(id)?.coordinator));
        // A node that is away is remembered with what was unloaded since.
        let mut told = self.view.deployments();
        told.retain(|d| placed.as_ref().is_none_or(|state| !state.is_withdrawn(d.id)));
        let (counting, overruled): (Vec<_>, Vec<_>) =
            told.into_iter().partition(|d| coordinator(d.id).is_none_or(|c| c == d.coordinator));
        all.extend(counting);
        // A node that was away still tells of a deployment that another has taken over; the other may not tell of it yet.
        let has = |all: &[DeploymentStatus], id: DeploymentId| all.iter().any(|d| d.id == id);
        for old in overruled {
            if let Some(coordinator) = coordinator(old.id)
                && !has(&all, old.id)
            {
                let detail = format!("node {} takes it over", self.membership.name_of(coordinator));
                all.push(DeploymentStatus { coordinator, health: Health::Recovering, detail, ..old });
            }
        }
        let mut orphans = placed.map(|state| self.orphans(&state)).unwrap_or_default();
        orphans.retain(|d| !has(&all, d.id));
        all.extend(orphans);
        all
    }

    /// What the log says is served, by a node that tells nobody of it: it is lost, and nobody has gone on with it yet.
    fn orphans(&self, state: &State) -> Vec<DeploymentStatus> {
        let silent = |p: &Placed| p.coordinator != self.id && !self.membership.online(p.coordinator);
        let orphan = |(id, placed): (&DeploymentId, &Placed)| {
            let node = self.membership.name_of(placed.coordinator);
            let detail = format!("node {node}, which looked after it, is lost; another goes on with it if it can");
            Some(Saved::read(&placed.recipe).ok()?.orphaned(*id, placed, detail))
        };
        state.deployments().filter(|(_, placed)| silent(placed)).filter_map(orphan).collect()
    }
}
