//! A node: its disk, its replica, its lease and the fences of its stages.
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use capstan_cluster::fence::{Fence, Fenced, Lease};
use capstan_cluster::raft::machine::Observer;
use capstan_cluster::raft::{ProposeError, RaftId, Replica, Settings, Store};
use capstan_cluster::{Command, Newcomer, Proposal, Refusal, Response, State, TicketBook};
use capstan_proto::{ClusterId, DeploymentId, Epoch, NodeId};
use tokio::task::AbortHandle;
use tokio::time::{Instant, sleep};

use super::Mistake;
use super::books::Books;
use super::disk::Disk;
use super::net::{Link, Net};

/// The only cluster there is.
const CLUSTER: ClusterId = ClusterId([42; 32]);
/// Short times and small snapshots, so that much happens in a run.
const SETTINGS: Settings = Settings { heartbeat_ms: 100, election_ms: 500, snapshot_every: 12, keep_entries: 4 };
/// Between two looks of the keeper, and between two renewals of the lease.
const LOOK: Duration = Duration::from_millis(700);
/// How long a change may take.
pub const LIMIT: Duration = Duration::from_secs(4);

/// What all nodes of a run share.
#[derive(Clone)]
pub struct Shared {
    /// The network.
    pub net: Arc<Net>,
    /// What everybody saw.
    pub books: Books,
    /// What is built wrongly.
    pub mistake: Option<Mistake>,
    /// When the run began.
    pub started: Instant,
}

#[derive(Default)]
struct Inner {
    disk: Disk,
    life: u64,
    lived: u64,
    replica: Option<Arc<Replica>>,
    tasks: Vec<AbortHandle>,
    lease: Lease,
    fences: BTreeMap<DeploymentId, Fence>,
    /// The epochs that it began as a coordinator, newest of each deployment.
    begun: BTreeMap<DeploymentId, Epoch>,
}

/// A node.
pub struct Node {
    /// Its key.
    pub id: NodeId,
    /// See [`Shared`].
    pub shared: Shared,
    inner: Mutex<Inner>,
}

impl Node {
    /// One that is switched off and has never been in the cluster.
    pub fn new(number: u8, shared: Shared) -> Arc<Self> {
        Arc::new(Self { id: NodeId([number; 32]), shared, inner: Mutex::default() })
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What it says of itself.
    pub fn newcomer(&self) -> Newcomer {
        Newcomer { id: self.id, name: format!("n{}", self.id.0[0]), addrs: vec![], version: "1".into() }
    }

    /// Gives it an empty disk, for another life in the cluster.
    pub fn begin_life(&self, life: u64) {
        let mut inner = self.inner();
        inner.disk = Disk::new(self.shared.mistake == Some(Mistake::LyingDisks));
        inner.life = life;
        inner.lived = inner.lived.max(life);
    }

    /// Which of its lives in the cluster this is; 0 while it is in none.
    pub fn life(&self) -> u64 {
        self.inner().life
    }

    /// The last of its lives in the cluster so far. None is lived twice: what it promised in one went with its disk.
    pub fn lived(&self) -> u64 {
        self.inner().lived
    }

    /// Switches it on. Its disk says what it was in.
    pub async fn start(self: &Arc<Self>) {
        if self.replica().is_some() || self.life() == 0 {
            return;
        }
        let (books, id) = (self.shared.books.clone(), self.id);
        books.note(|| format!("{id:?} starts"), (1, id.0[0]));
        let life = self.life();
        let handle = self.inner().disk.open();
        let seen = books.clone();
        let observer: Observer = Arc::new(move |applied, change| seen.applied(id, applied, change));
        let link = Arc::new(Link { from: id, net: self.shared.net.clone() });
        let replica = async {
            let store = Store::on(handle, CLUSTER).map_err(|e| e.to_string())?;
            Replica::start(RaftId { node: id, life }, store, link, SETTINGS, Some(observer))
                .await
                .map_err(|e| e.to_string())
        };
        let replica = match replica.await {
            Ok(replica) => Arc::new(replica),
            Err(error) => return books.broke(format!("{id:?} does not start: {error}")),
        };
        self.shared.net.set_running(id, Some(replica.clone()));
        let tasks =
            [tokio::spawn(keep(self.clone(), replica.clone())), tokio::spawn(renew(self.clone(), replica.clone()))];
        let mut inner = self.inner();
        inner.tasks.extend(tasks.iter().map(|t| t.abort_handle()));
        inner.replica = Some(replica);
    }

    /// Switches it off, with or without a warning.
    pub async fn stop(&self, power_cut: bool) {
        let (books, id) = (&self.shared.books, self.id);
        let replica = {
            let mut inner = self.inner();
            let Some(replica) = inner.replica.take() else { return };
            inner.tasks.drain(..).for_each(|t| t.abort());
            inner.fences.clear();
            inner.begun.clear();
            inner.lease = Lease::default();
            replica
        };
        books.note(|| format!("{id:?} stops (power cut: {power_cut})"), (2, id.0[0], power_cut));
        self.shared.net.set_running(id, None);
        if power_cut {
            books.count(|t| t.crashes += 1);
            let disk = self.inner().disk.clone();
            self.shared.net.draw(|dice| disk.lose_power(dice));
        }
        replica.stop().await;
    }

    /// It began an epoch of a deployment, as its coordinator.
    pub fn note_begun(&self, deployment: DeploymentId, epoch: Epoch) {
        self.inner().begun.insert(deployment, epoch);
    }

    /// Whether it began this epoch itself, since it was switched on.
    pub fn has_begun(&self, deployment: DeploymentId, epoch: Epoch) -> bool {
        self.inner().begun.get(&deployment) == Some(&epoch)
    }

    /// Its replica while it is on.
    pub fn replica(&self) -> Option<Arc<Replica>> {
        self.inner().replica.clone()
    }

    /// What it knows of the state; nothing while it is off.
    pub fn state(&self) -> Option<Arc<State>> {
        Some(self.replica()?.state())
    }

    /// A task that ends with the node.
    pub fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        let task = tokio::spawn(task);
        let mut inner = self.inner();
        inner.tasks.retain(|t| !t.is_finished());
        inner.tasks.push(task.abort_handle());
    }

    /// Milliseconds since the run began.
    pub fn now_ms(&self) -> u64 {
        self.shared.started.elapsed().as_millis() as u64
    }

    /// The first node makes the cluster.
    pub async fn found(&self) {
        let mut members = capstan_cluster::Members::default();
        let Newcomer { id, name, addrs, version } = self.newcomer();
        let change = capstan_cluster::Change::Admit { id, name, addrs, version };
        members.apply(change, 0).expect("an empty list has room");
        let members = members.entries().cloned().collect();
        let command = Command::Found { cluster: CLUSTER, members, tickets: TicketBook::default() };
        let first = Proposal { by: self.id, at_ms: self.now_ms(), command };
        let replica = self.replica().expect("it was started");
        if let Err(error) = replica.found(first, LIMIT).await {
            self.shared.books.broke(format!("a lone node founds no cluster: {error}"));
        }
    }

    /// Asks for a change.
    pub async fn propose(&self, command: Command) -> Option<Result<Response, Refusal>> {
        let replica = self.replica()?;
        let proposal = Proposal { by: self.id, at_ms: self.now_ms(), command };
        let books = &self.shared.books;
        let outcome = match replica.propose(proposal.clone(), LIMIT, |_, _| String::new()).await {
            Ok(response) => Ok(response),
            Err(ProposeError::Refused(refusal)) => Err(refusal),
            Err(ProposeError::NoMajority { .. }) => {
                books.count(|t| t.no_majority += 1);
                return None;
            }
            Err(ProposeError::Stopped(_)) => return None,
        };
        books.told(&proposal, &outcome);
        Some(outcome)
    }

    /// A coordinator says that an epoch has begun. Where this node has a seat it must know so itself.
    pub fn begin(&self, deployment: DeploymentId, epoch: Epoch, seat: bool) -> bool {
        let Some(state) = self.state() else { return false };
        let now = self.now_ms();
        let mut inner = self.inner();
        let committed = state.placed(deployment).is_some_and(|p| p.epoch == epoch);
        let lease = self.shared.mistake == Some(Mistake::NoLease) || inner.lease.check(now).is_ok();
        if seat && !(committed && lease) {
            return false;
        }
        inner.fences.entry(deployment).or_default().begin(epoch).is_ok()
    }

    /// A piece of work arrives for the stage here.
    pub fn work(&self, from: NodeId, deployment: DeploymentId, epoch: Epoch) -> Result<(), Fenced> {
        let now = self.now_ms();
        let replica = self.replica();
        let mistake = self.shared.mistake;
        let checked = {
            let mut inner = self.inner();
            // What this node has applied is news of a new epoch as good as a message.
            let known = replica.as_ref().and_then(|r| r.state().placed(deployment).map(|p| p.epoch));
            let fence = inner.fences.entry(deployment).or_default();
            if let Some(known) = known.filter(|k| *k > fence.epoch() && fence.epoch() != Epoch(0)) {
                fence.begin(known).ok();
            }
            let fenced = if mistake == Some(Mistake::NoFence) { Ok(()) } else { fence.admit(epoch) };
            let lease = if mistake == Some(Mistake::NoLease) { Ok(()) } else { inner.lease.check(now) };
            fenced.and(lease)
        };
        let books = &self.shared.books;
        match checked {
            Ok(()) => books.worked(self.id, from, deployment, epoch),
            Err(Fenced::NoLease { .. }) => books.count(|t| t.no_lease += 1),
            Err(_) => books.count(|t| t.fenced += 1),
        }
        checked
    }
}

/// Keeps voters and learners while this node leads.
async fn keep(node: Arc<Node>, replica: Arc<Replica>) {
    loop {
        sleep(LOOK).await;
        let online: BTreeSet<NodeId> = node.shared.net.heard_by(node.id);
        replica.keep(&online, LIMIT).await;
    }
}

/// Renews the lease.
async fn renew(node: Arc<Node>, replica: Arc<Replica>) {
    loop {
        if node.shared.net.takes_told(node.id) {
            // As a daemon: it ends what it was in there. By a task of its own, for this one ends with it.
            tokio::spawn(async move {
                node.stop(false).await;
                node.begin_life(0);
            });
            return;
        }
        let asked = node.now_ms();
        let others: Vec<NodeId> =
            replica.state().members().active().map(|m| m.id).filter(|id| *id != node.id).collect();
        if replica.confirm(LOOK * 2, &others).await {
            node.inner().lease.renew(asked);
        }
        sleep(LOOK).await;
    }
}
