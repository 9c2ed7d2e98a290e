//! The daemon as a library: what a node is made of, how it starts and how it stops.
use std::collections::{HashMap, HashSet};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use capstan_cluster::SlowLink;
use capstan_proto::control::{
    CLOSE_NOT_A_MEMBER, CLOSE_REMOVED, CONTROL_ALPN, Done, Gossip, JOIN_ALPN, RAFT_ALPN, Request,
};
use capstan_proto::manage::{ClusterStatus, NodeStatus};
use capstan_proto::pairing::PAIR_ALPN;
use capstan_proto::{ClusterId, DeploymentId, Epoch, NodeId};
use capstan_store::remote::Remote;
use capstan_store::{Store, StoreError};
use iroh::Endpoint;
use iroh::endpoint::{Connection, VarInt};
use iroh::protocol::Router;
use tokio::sync::Notify;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::agreement;
use crate::assembling::Assemblies;
use crate::catalogue::Models;
use crate::config::NodeConfig;
use crate::control_client::{CALL_TIMEOUT, ControlClient};
use crate::control_server::{ControlProtocol, JoinProtocol};
use crate::cutter::Cutter;
use crate::deployments::Deployments;
use crate::endpoint;
use crate::error::{CallError, NodeError};
use crate::files;
use crate::identity;
use crate::keys::{self, KeyRing};
use crate::machine::Machine;
use crate::measuring;
use crate::membership::Membership;
use crate::moving;
use crate::pairing::{PairProtocol, Pairing};
use crate::pulling::{self, Pulls};
use crate::raft_link::{REMOVED, RaftProtocol};
use crate::rehearsal::Rehearsals;
use crate::replicas;
use crate::snapshots::SnapshotHost;
use crate::stages::StageHost;
use crate::takeover;
use crate::view::View;

/// How often members poll each other.
const POLL_INTERVAL: Duration = Duration::from_secs(1);
/// How long a poll may take before the next one is made.
const POLL_TIMEOUT: Duration = Duration::from_secs(3);
/// How long a caller waits for news to reach the others: those that are slower hear it by the next poll.
pub(crate) const PUSH_TIMEOUT: Duration = Duration::from_secs(2);
/// How long the endpoint may take to say goodbye.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(3);
/// Close code of a node that stops.
const CLOSE_STOPPING: u32 = 1;

/// Connections that other nodes made to this one, so that they can be closed when their node is no member any more.
#[derive(Default)]
pub(crate) struct Connections {
    open: Mutex<HashMap<NodeId, HashMap<u64, Connection>>>,
    next: AtomicU64,
}

impl Connections {
    pub(crate) fn add(&self, node: NodeId, connection: &Connection) -> u64 {
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        open.entry(node).or_default().insert(id, connection.clone());
        id
    }

    pub(crate) fn remove(&self, node: NodeId, id: u64) {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(of_node) = open.get_mut(&node) {
            of_node.remove(&id);
            if of_node.is_empty() {
                open.remove(&node);
            }
        }
    }

    /// Closes the connections of all nodes that are not wanted any more.
    fn close(&self, code: u32, reason: &str, wanted: impl Fn(NodeId) -> bool) {
        let open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        for (_, connections) in open.iter().filter(|(node, _)| !wanted(**node)) {
            for connection in connections.values() {
                connection.close(VarInt::from_u32(code), reason.as_bytes());
            }
        }
    }
}

/// What all parts of a node share.
pub(crate) struct Shared {
    pub(crate) config: NodeConfig,
    /// Version of capstan.
    pub(crate) build: &'static str,
    pub(crate) id: NodeId,
    pub(crate) endpoint: Endpoint,
    pub(crate) membership: Arc<Membership>,
    pub(crate) keys: KeyRing,
    pub(crate) pairing: Pairing,
    pub(crate) client: Arc<ControlClient>,
    /// Connections for the messages of the log.
    pub(crate) raft_client: Arc<ControlClient>,
    pub(crate) connections: Connections,
    pub(crate) view: View,
    pub(crate) store: Store,
    pub(crate) machine: Arc<Machine>,
    pub(crate) stages: StageHost,
    pub(crate) cutter: Cutter,
    pub(crate) rehearsals: Rehearsals,
    pub(crate) snapshots: SnapshotHost,
    pub(crate) models: Models,
    pub(crate) assemblies: Assemblies,
    pub(crate) pulls: Pulls,
    /// Reads models that are elsewhere; none where the network cannot be used at all.
    pub(crate) remote: Option<Arc<Remote>>,
    pub(crate) deployments: Deployments,
    /// Something changed that every member should hear of now.
    pub(crate) deployments_changed: Notify,
    pub(crate) poll_now: Notify,
    /// Ends the stages that run here for the cluster of the moment.
    stages_stop: Mutex<CancellationToken>,
    /// Joining and leaving exclude each other.
    pub(crate) moving: tokio::sync::Mutex<()>,
    /// Answers that were asked of this node's API.
    pub(crate) calls: TaskTracker,
    /// No new answers are begun here: the node is being stopped.
    pub(crate) draining: CancellationToken,
    /// Whoever waits for answers to end waits no longer.
    pub(crate) hurry: CancellationToken,
    pub(crate) stop: CancellationToken,
    pub(crate) stopped: CancellationToken,
}

impl Shared {
    /// How this node is.
    pub(crate) fn own_status(&self) -> NodeStatus {
        let (memory_total_bytes, memory_free_bytes) = self.machine.memory();
        NodeStatus {
            id: self.id,
            name: self.membership.name(),
            version: self.build.into(),
            addrs: endpoint::addrs(&self.endpoint),
            online: true,
            is_self: true,
            rtt_us: None,
            memory_total_bytes,
            memory_free_bytes,
            devices: self.machine.devices(),
            profile: self.machine.profile(),
            links: self.view.links(),
            votes: self.membership.standing().voters.contains(&self.id),
        }
    }

    /// What this node tells others.
    pub(crate) fn gossip(&self) -> Gossip {
        Gossip {
            cluster: self.membership.cluster(),
            node: self.own_status(),
            deployments: self.deployments.stamped(self.id),
        }
    }

    /// Takes in what another member tells. It has been checked for its bounds.
    pub(crate) fn hear_gossip(&self, from: NodeId, gossip: Gossip) {
        // A node that moves to another cluster may still have a word for this one on its way.
        if gossip.cluster != self.membership.cluster()
            || gossip.node.id != from
            || gossip.deployments.coordinator != from
        {
            return;
        }
        self.membership.heard(from);
        self.view.put_node(gossip.node);
        self.view.put_list(gossip.deployments);
    }

    /// Acts on a changed member list.
    pub(crate) fn members_changed(&self) {
        const GONE: &str = "it has left the cluster";
        let membership = &self.membership;
        self.connections.close(CLOSE_REMOVED, REMOVED, |node| !membership.is_removed(node));
        self.connections.close(CLOSE_NOT_A_MEMBER, GONE, |node| membership.may_speak(node));
        let known: HashSet<NodeId> = self.client.known().into_iter().chain(self.raft_client.known()).collect();
        for node in known {
            if !self.membership.is_member(node) {
                let (code, why) =
                    if membership.is_removed(node) { (CLOSE_REMOVED, REMOVED) } else { (CLOSE_NOT_A_MEMBER, GONE) };
                self.client.forget(node, code, why);
                self.raft_client.forget(node, code, why);
                self.view.forget(node);
                self.membership.forget_heard(node);
                self.deployments.member_left(node);
            }
        }
        self.poll_now.notify_one();
        self.models.changed.notify_one();
    }

    /// The epoch of a deployment that this node coordinates as far as the cluster knows.
    pub(crate) fn placed_here(&self, id: DeploymentId) -> Option<Epoch> {
        let state = self.membership.state()?;
        state.placed(id).filter(|p| p.coordinator == self.id).map(|p| p.epoch)
    }

    /// Whether the cluster has agreed that another node coordinates this deployment.
    pub(crate) fn is_others(&self, id: DeploymentId) -> bool {
        let state = self.membership.state();
        state.and_then(|s| s.placed(id).map(|p| p.coordinator != self.id)).unwrap_or(false)
    }

    /// The cluster as this node sees it.
    pub(crate) fn cluster_status(&self) -> ClusterStatus {
        let standing = self.membership.standing();
        let mut nodes = vec![self.own_status()];
        for member in self.membership.others() {
            let (status, rtt_us) = self.view.node(member.id);
            let online = self.membership.online(member.id);
            let known = status.unwrap_or_else(|| NodeStatus {
                id: member.id,
                name: String::new(),
                version: String::new(),
                addrs: vec![],
                online: false,
                is_self: false,
                rtt_us: None,
                memory_total_bytes: 0,
                memory_free_bytes: 0,
                devices: vec![],
                profile: None,
                links: vec![],
                votes: false,
            });
            nodes.push(NodeStatus {
                name: member.name,
                version: member.version,
                addrs: member.addrs,
                online,
                is_self: false,
                votes: standing.voters.contains(&member.id),
                rtt_us: rtt_us.filter(|_| online),
                ..known
            });
        }
        ClusterStatus {
            cluster: self.membership.cluster(),
            version: self.build.into(),
            nodes,
            deployments: self.all_deployments(),
            agreement: agreement::describe(self, &standing),
            warnings: self.warnings(),
        }
    }

    /// The links from here that have become slow, as sentences.
    fn warnings(&self) -> Vec<String> {
        let there = |l: &SlowLink| self.membership.online(l.to);
        self.view.slow_links().into_iter().filter(there).map(|l| self.describe_slow(l)).collect()
    }

    fn describe_slow(&self, link: SlowLink) -> String {
        let ms = |us: u64| us as f64 / 1000.0;
        let (here, there) = (self.membership.name(), self.membership.name_of(link.to));
        let (now, least) = (ms(link.now_us), ms(link.least_us));
        format!("the link from {here} to {there} is slow: a round trip takes {now:.1} ms, it took {least:.1} ms")
    }

    /// Exchanges news with one member.
    async fn poll(&self, node: NodeId) -> Result<(), CallError> {
        let start = Instant::now();
        let request = Request::Poll(Box::new(self.gossip()));
        let gossip: Gossip = self.client.call(node, &request, POLL_TIMEOUT).await?;
        gossip.check()?;
        if self.view.put_rtt(node, start.elapsed().as_micros() as u64) {
            match self.view.slow_links().into_iter().find(|l| l.to == node) {
                Some(link) => tracing::warn!("{}", self.describe_slow(link)),
                None => tracing::info!(node = self.membership.name_of(node), "the link is as fast as before again"),
            }
        }
        self.hear_gossip(node, gossip);
        if let Err(error) = keys::exchange(self, node).await {
            tracing::debug!(node = %node.short(), %error, "API keys could not be compared");
        }
        Ok(())
    }

    /// Exchanges news with all members that answer.
    pub(crate) async fn poll_all(&self) {
        let polls = self.membership.others().into_iter().filter(|m| self.membership.online(m.id)).map(|m| async move {
            if let Err(error) = self.poll(m.id).await {
                tracing::debug!(node = m.name, %error, "a poll failed");
            }
        });
        futures::future::join_all(polls).await;
    }

    /// Exchanges news with all members, whether they seemed to be there or not.
    pub(crate) async fn meet_all(&self) {
        for member in self.membership.others() {
            self.membership.heard(member.id);
        }
        self.poll_all().await;
    }

    /// Tells all members what is coordinated here now.
    pub(crate) async fn push_deployments(&self) {
        let request = Request::Update(Box::new(self.deployments.stamped(self.id)));
        let pushes = self.membership.others().into_iter().filter(|m| self.membership.online(m.id)).map(|m| {
            let request = &request;
            async move {
                if let Err(error) = self.client.call::<Done>(m.id, request, PUSH_TIMEOUT).await {
                    tracing::debug!(node = m.name, %error, "a change could not be told at once");
                }
            }
        });
        futures::future::join_all(pushes).await;
    }

    /// What ends the stages that run here.
    pub(crate) fn stages_stop(&self) -> CancellationToken {
        self.stages_stop.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Ends the stages that run here for others; later ones are not affected.
    pub(crate) fn end_stages(&self) {
        let fresh = CancellationToken::new();
        let old = std::mem::replace(&mut *self.stages_stop.lock().unwrap_or_else(PoisonError::into_inner), fresh);
        old.cancel();
    }

    /// Forgets the others after this node has left them.
    pub(crate) fn alone_again(&self) {
        const LEFT: &str = "this node has left the cluster";
        self.connections.close(CLOSE_NOT_A_MEMBER, LEFT, |_| false);
        for client in [&self.client, &self.raft_client] {
            for node in client.known() {
                client.forget(node, CLOSE_NOT_A_MEMBER, LEFT);
            }
        }
        self.view.clear();
    }
}

/// A node: a daemon's state and tasks. Dropping it ends its tasks; [`Service::stop`](crate::Service::stop)
/// also says goodbye.
pub struct Node {
    pub(crate) shared: Arc<Shared>,
    router: Router,
}

impl Node {
    /// Starts a node: opens its folder, binds its socket, and takes up its cluster and deployments where it left them.
    pub async fn start(config: NodeConfig) -> Result<Arc<Node>, NodeError> {
        let build = env!("CARGO_PKG_VERSION");
        identity::make_data_dir(&config.data_dir)?;
        // The store's lock also tells a second daemon on the same folder that it is one.
        let busy = |e: &StoreError| matches!(e, StoreError::Busy { .. });
        let store = files::when_free(|| Store::open(&config.data_dir), busy).await?;
        let key = identity::load_key(&config.data_dir)?;
        let id = NodeId(*key.public().as_bytes());
        let endpoint = endpoint::bind(key, config.bind_addr, &config.data_dir).await?;
        let addrs = endpoint::addrs(&endpoint);
        let membership = Arc::new(Membership::open(&config.data_dir, id, config.name.clone(), addrs, build)?);
        let client =
            |alpn| Arc::new(ControlClient::new(endpoint.clone(), membership.clone(), config.speaks.clone(), alpn));
        let shared = Arc::new(Shared {
            client: client(CONTROL_ALPN),
            raft_client: client(RAFT_ALPN),
            keys: KeyRing::open(&config.data_dir, membership.clone())?,
            pairing: Pairing::default(),
            machine: Arc::new(Machine::new(config.memory_limit_bytes, config.gpu_layers)),
            cutter: Cutter::open(&config.data_dir)?,
            rehearsals: Rehearsals::open(&config.data_dir)?,
            snapshots: SnapshotHost::open(config.memory_dir.as_deref(), id, config.snapshot_limit_bytes),
            models: Models::open(&config.data_dir)?,
            assemblies: Assemblies::default(),
            pulls: Pulls::default(),
            remote: pulling::remote(&config),
            deployments: Deployments::open(&config.data_dir)?,
            config,
            build,
            id,
            endpoint: endpoint.clone(),
            membership: membership.clone(),
            connections: Connections::default(),
            view: View::default(),
            store: store.clone(),
            stages: StageHost::default(),
            deployments_changed: Notify::new(),
            poll_now: Notify::new(),
            stages_stop: Mutex::new(CancellationToken::new()),
            moving: tokio::sync::Mutex::new(()),
            calls: TaskTracker::new(),
            draining: CancellationToken::new(),
            hurry: CancellationToken::new(),
            stop: CancellationToken::new(),
            stopped: CancellationToken::new(),
        });
        replicas::guard(&shared);
        if let Some(profile) = measuring::known(&shared.config.data_dir) {
            shared.machine.set_profile(profile);
        }
        agreement::take_part(&shared).await?;
        let may_fetch =
            move |peer: iroh::EndpointId| membership.is_current() && membership.is_member(endpoint::node_id(peer));
        let router = Router::builder(endpoint)
            .accept(CONTROL_ALPN, ControlProtocol(Arc::downgrade(&shared)))
            .accept(RAFT_ALPN, RaftProtocol::new(Arc::downgrade(&shared)))
            .accept(JOIN_ALPN, JoinProtocol::new(Arc::downgrade(&shared)))
            .accept(PAIR_ALPN, PairProtocol::new(Arc::downgrade(&shared)))
            .accept(capstan_store::BLOBS_ALPN, store.protocol(may_fetch))
            .spawn();
        tracing::info!(
            node = shared.membership.name(),
            key = %id.short(),
            addrs = ?endpoint::addrs(&shared.endpoint),
            "the node is up"
        );
        tokio::spawn(until_stopped(shared.clone(), agreement::become_current(shared.clone())));
        tokio::spawn(until_stopped(shared.clone(), agreement::keep_loop(shared.clone())));
        tokio::spawn(until_stopped(shared.clone(), agreement::refresh_loop(shared.clone())));
        tokio::spawn(until_stopped(shared.clone(), takeover::takeover_loop(shared.clone())));
        tokio::spawn(close_when_stopped(shared.clone()));
        tokio::spawn(until_stopped(shared.clone(), poll_loop(shared.clone())));
        tokio::spawn(until_stopped(shared.clone(), push_loop(shared.clone())));
        tokio::spawn(until_stopped(shared.clone(), list_devices(shared.clone())));
        if shared.config.measure {
            tokio::spawn(until_stopped(shared.clone(), measuring::device_loop(shared.clone())));
            tokio::spawn(until_stopped(shared.clone(), measuring::link_loop(shared.clone())));
        }
        tokio::spawn(until_stopped(shared.clone(), replicas::exchange_loop(shared.clone())));
        tokio::spawn(until_stopped(shared.clone(), replicas::copy_loop(shared.clone())));
        tokio::spawn(until_stopped(shared.clone(), pulling::resume(shared.clone())));
        // Without what was measured, now or before, nothing moves.
        tokio::spawn(until_stopped(shared.clone(), moving::move_loop(shared.clone())));
        Ok(Arc::new(Node { shared, router }))
    }

    /// Its key.
    pub fn id(&self) -> NodeId {
        self.shared.id
    }

    /// Its name, which joining may change to make it unique.
    pub fn name(&self) -> String {
        self.shared.membership.name()
    }

    /// The cluster it is in.
    pub fn cluster(&self) -> ClusterId {
        self.shared.membership.cluster()
    }

    /// Where other nodes dial it.
    pub fn addrs(&self) -> Vec<SocketAddr> {
        endpoint::addrs(&self.shared.endpoint)
    }

    /// Whether it is its cluster's only member.
    pub fn is_alone(&self) -> bool {
        self.shared.membership.others().is_empty()
    }

    /// Returns when the node has been stopped.
    pub async fn stopped(&self) {
        self.shared.stopped.cancelled().await;
    }

    /// Lets answers in progress here finish, for as long as the configuration allows; new ones are refused.
    pub(crate) async fn drain(&self) {
        let shared = &self.shared;
        shared.draining.cancel();
        shared.calls.close();
        if !shared.calls.is_empty() {
            tracing::info!(answers = shared.calls.len(), "waiting for answers in progress");
        }
        tokio::select! {
            () = shared.calls.wait() => {}
            () = sleep(shared.config.drain_limit) => {
                tracing::warn!(answers = shared.calls.len(), "answers are still in progress and are cut off");
            }
            () = shared.hurry.cancelled() => {}
            () = shared.stop.cancelled() => {}
        }
    }

    /// Ends everything in order: stages, goodbyes, sockets, the store's lock.
    pub(crate) async fn shut_down(&self) {
        if self.shared.stop.is_cancelled() {
            return self.stopped().await;
        }
        // Cancelling ends the stages' tasks, which drops and so kills their children.
        self.shared.stop.cancel();
        const STOPPING: &str = "its daemon was stopped";
        self.shared.connections.close(CLOSE_STOPPING, STOPPING, |_| false);
        for client in [&self.shared.client, &self.shared.raft_client] {
            for node in client.known() {
                client.forget(node, CLOSE_STOPPING, STOPPING);
            }
        }
        self.shared.membership.close().await;
        if timeout(CLOSE_TIMEOUT, self.router.shutdown()).await.is_err() {
            tracing::debug!("some connections did not end in time");
        }
        self.shared.store.shutdown().await;
        self.shared.snapshots.close();
        tracing::info!(node = self.name(), "the node has stopped");
        self.shared.stopped.cancel();
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        self.shared.stop.cancel();
        self.shared.stopped.cancel();
    }
}

/// A node that is dropped without a goodbye lets its log go as well.
async fn close_when_stopped(shared: Arc<Shared>) {
    shared.stop.cancelled().await;
    shared.membership.close().await;
}

pub(crate) async fn until_stopped(shared: Arc<Shared>, task: impl Future<Output = ()>) {
    tokio::select! {
        () = task => {}
        () = shared.stop.cancelled() => {}
    }
}

/// Exchanges news with every member once a second, each on its own: one that is slow holds up none.
async fn poll_loop(shared: Arc<Shared>) {
    let busy: Arc<Mutex<std::collections::HashSet<NodeId>>> = Arc::default();
    let mut ticks = tokio::time::interval(POLL_INTERVAL);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            _ = ticks.tick() => {}
            () = shared.poll_now.notified() => {}
        }
        if !shared.membership.is_current() {
            continue;
        }
        for member in shared.membership.others() {
            if !busy.lock().unwrap_or_else(PoisonError::into_inner).insert(member.id) {
                continue;
            }
            let (shared, busy) = (shared.clone(), busy.clone());
            tokio::spawn(until_stopped(shared.clone(), async move {
                if let Err(error) = shared.poll(member.id).await {
                    tracing::debug!(node = member.name, %error, "a poll failed");
                    if matches!(error, CallError::Removed { .. }) {
                        tokio::spawn(until_stopped(shared.clone(), agreement::put_out(shared.clone())));
                    }
                    // A daemon that says goodbye, or is not there, is offline now and not in three seconds.
                    if matches!(error, CallError::Refused { .. } | CallError::Lost { .. }) {
                        shared.membership.forget_heard(member.id);
                    }
                }
                busy.lock().unwrap_or_else(PoisonError::into_inner).remove(&member.id);
            }));
        }
    }
}

/// Tells members at once when something about the deployments here has changed.
async fn push_loop(shared: Arc<Shared>) {
    loop {
        shared.deployments_changed.notified().await;
        let push = shared.clone();
        tokio::spawn(until_stopped(shared.clone(), async move { push.push_deployments().await }));
    }
}

async fn list_devices(shared: Arc<Shared>) {
    match timeout(CALL_TIMEOUT * 6, capstan_compute::host::devices(&shared.config.compute_command)).await {
        Ok(Ok(devices)) => shared.machine.set_devices(devices),
        Ok(Err(error)) => tracing::warn!(%error, "the devices of this machine are not known"),
        Err(_) => tracing::warn!("listing the devices of this machine took too long; they are not known"),
    }
}
