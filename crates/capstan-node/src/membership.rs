//! Who is in the cluster, as this node knows it: the replicated state as far as it has come here, and until it has come,
//! what the node that let this one in said.
//!
//! Changes go through the log ([`Replica`]) and so need a majority of the voters; reading needs nobody.
use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use capstan_cluster::raft::{ProposeError, RaftId, Replica, Settings, Standing, Store, Transport};
use capstan_cluster::state::FIRST_LIFE;
use capstan_cluster::ticket::hash_of;
use capstan_cluster::{
    Change, Command, Detector, Member, Members, Newcomer, Proposal, Refusal, Response, State, Ticket, TicketBook,
    TicketError, Voucher,
};
use capstan_proto::control::Join;
use capstan_proto::manage::ManageError;
use capstan_proto::{ClusterId, DeploymentId, Epoch, NodeId};
use serde::{Deserialize, Serialize};
use tokio::time::{sleep, timeout};

use crate::error::NodeError;
use crate::files;

/// How long a change may take: two elections of up to three seconds, and the change.
const PROPOSE_LIMIT: Duration = Duration::from_secs(8);
/// How long a change that was made may take to come here as well.
const ARRIVE_LIMIT: Duration = Duration::from_secs(2);
/// How long a voter may be away before another takes its place: a reboot.
const PRESENT_MS: u64 = 120_000;
/// How long a node may be away that said goodbye before others do its work: it is being restarted, most likely, and
/// loading a model elsewhere and back again would take longer.
pub(crate) const GOODBYE_GRACE: Duration = Duration::from_secs(15);

/// Milliseconds since 1970.
pub(crate) fn now_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_millis() as u64)
}

/// Seconds since 1970.
pub(crate) fn now_s() -> u64 {
    now_ms() / 1000
}

/// `cluster.json`: where the log is, and what is known without it.
#[derive(Clone, Serialize, Deserialize)]
struct Saved {
    cluster: ClusterId,
    /// The name this node would like; the one it has is in its entry.
    name: String,
    /// As a list: JSON has no keys other than text.
    members: Vec<Member>,
    /// Of a cluster without a log.
    #[serde(default)]
    tickets: TicketBook,
    /// Which of this node's lives in the cluster; 0 in files of a capstan that had no log.
    #[serde(default)]
    life: u64,
    /// Whether this node begins the log.
    #[serde(default)]
    founder: bool,
    /// Whether the log has been begun here. Without it this node has forgotten what it promised to others.
    #[serde(default)]
    log: bool,
}

struct Seat {
    saved: Saved,
    /// The saved members, in use until the log has told who they are.
    seed: Members,
    replica: Option<Arc<Replica>>,
    detector: Detector,
    /// Who was heard in the time that a voter may be away.
    present: Detector,
    since: Instant,
    /// A name that was asked for at the start and is not this node's yet.
    rename: bool,
}

/// Who is in the cluster.
pub(crate) struct Membership {
    id: NodeId,
    version: String,
    dir: PathBuf,
    /// Whether a majority has told, since this node started, who is a member now. Before that it serves nobody: a node
    /// that was removed meanwhile must not find the one door that does not know.
    current: AtomicBool,
    seat: Mutex<Seat>,
}

impl Membership {
    /// Takes up what was saved, or makes a cluster of one. Its log is not open yet.
    pub(crate) fn open(
        data_dir: &Path,
        id: NodeId,
        name: Option<String>,
        addrs: Vec<SocketAddr>,
        version: &str,
    ) -> Result<Self, NodeError> {
        let asked = name.is_some();
        let mut saved = match files::read_json::<Saved>(&data_dir.join("cluster.json"))? {
            Some(saved) => saved,
            None => alone(name.clone().unwrap_or_else(crate::identity::machine_name)),
        };
        if let Some(name) = name {
            saved.name = name;
        }
        let mut seed = Members::default();
        seed.merge(std::mem::take(&mut saved.members));
        if seed.get(id).is_none() {
            let (name, version) = (saved.name.clone(), version.to_owned());
            seed.apply(Change::Admit { id, name, addrs, version }, now_ms())?;
        }
        if saved.life == 0 {
            // A folder of before the log. All who saved the same members agree who begins: the smallest key.
            saved.life = FIRST_LIFE;
            saved.founder = seed.active().map(|m| m.id).min() == Some(id);
        }
        let membership = Self {
            id,
            version: version.to_owned(),
            dir: data_dir.to_owned(),
            current: AtomicBool::new(false),
            seat: Mutex::new(Seat {
                saved,
                seed,
                replica: None,
                detector: Detector::default(),
                present: Detector::new(PRESENT_MS),
                since: Instant::now(),
                rename: asked,
            }),
        };
        membership.save().map_err(|source| NodeError::DataDir { path: data_dir.join("cluster.json"), source })?;
        Ok(membership)
    }

    /// Opens the log and takes part; a founder makes it. What was there of other logs goes.
    pub(crate) async fn take_part(&self, transport: Arc<dyn Transport>) -> Result<Arc<Replica>, NodeError> {
        let saved = self.seat().saved.clone();
        let dir = self.dir.join("raft");
        let io = |source| NodeError::DataDir { path: dir.clone(), source };
        std::fs::create_dir_all(&dir).map_err(io)?;
        let path = dir.join(format!("{}-{}.redb", saved.cluster.short(), saved.life));
        for entry in std::fs::read_dir(&dir).map_err(io)?.flatten() {
            if entry.path() != path {
                std::fs::remove_file(entry.path()).ok();
            }
        }
        if saved.log && !path.exists() {
            return Err(NodeError::Agreement(format!(
                "the log of the cluster's state is missing ({}); put it back, or move cluster.json away and join again",
                path.display()
            )));
        }
        let store = files::when_free(|| Store::open(&path, saved.cluster), |e| e.is_busy()).await;
        let store = store.map_err(|e| NodeError::Agreement(e.to_string()))?;
        self.seat().saved.log = true;
        self.save().map_err(|source| NodeError::DataDir { path: path.clone(), source })?;
        let agreement = |e: &dyn std::fmt::Display| NodeError::Agreement(e.to_string());
        let id = RaftId { node: self.id, life: saved.life };
        let replica = Replica::start(id, store, transport, Settings::default(), None).await;
        let replica = Arc::new(replica.map_err(|e| agreement(&e))?);
        if saved.founder && replica.state().cluster().is_none() {
            let members = self.seat().seed.entries().cloned().collect();
            let command = Command::Found { cluster: saved.cluster, members, tickets: saved.tickets };
            let first = Proposal { by: self.id, at_ms: now_ms(), command };
            replica.found(first, PROPOSE_LIMIT).await.map_err(|e| agreement(&e))?;
        }
        self.seat().replica = Some(replica.clone());
        Ok(replica)
    }

    // A panic elsewhere cannot leave the state half-changed: every change is one assignment or one pure call.
    fn seat(&self) -> MutexGuard<'_, Seat> {
        self.seat.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn save(&self) -> std::io::Result<()> {
        // Written under the lock, so that two changes cannot be saved in the wrong order. The file is small.
        let seat = self.seat();
        let saved = Saved { members: seat.seed.entries().cloned().collect(), ..seat.saved.clone() };
        files::write_json(&self.dir.join("cluster.json"), &saved)
    }

    fn save_or_warn(&self) {
        if let Err(error) = self.save() {
            tracing::error!(%error, "the member list could not be saved; after a restart this node may not find back");
        }
    }

    /// This node's copy of the state; none in the moments between two clusters.
    pub(crate) fn replica(&self) -> Option<Arc<Replica>> {
        self.seat().replica.clone()
    }

    /// The state, once the log has told it.
    pub(crate) fn state(&self) -> Option<Arc<State>> {
        Some(self.replica()?.state()).filter(|s| s.cluster().is_some())
    }

    fn read<T>(&self, read: impl FnOnce(&Members) -> T) -> T {
        match self.state() {
            Some(state) => read(state.members()),
            None => read(&self.seat().seed),
        }
    }

    pub(crate) fn cluster(&self) -> ClusterId {
        self.seat().saved.cluster
    }

    pub(crate) fn name(&self) -> String {
        self.get(self.id).map_or_else(|| self.seat().saved.name.clone(), |m| m.name)
    }

    pub(crate) fn get(&self, id: NodeId) -> Option<Member> {
        self.read(|m| m.get(id).cloned())
    }

    /// The name of a member, or the first digits of its key.
    pub(crate) fn name_of(&self, id: NodeId) -> String {
        self.get(id).map_or_else(|| id.short(), |m| m.name)
    }

    pub(crate) fn find(&self, name_or_id: &str) -> Option<Member> {
        self.read(|m| m.find(name_or_id).cloned())
    }

    pub(crate) fn is_member(&self, id: NodeId) -> bool {
        self.read(|m| m.get(id).is_some())
    }

    /// Whether a key is out for good.
    pub(crate) fn is_removed(&self, id: NodeId) -> bool {
        self.state().is_some_and(|s| s.removed(id).is_some())
    }

    /// Whether a node may speak about the log: a member, or a leader whom a member named and of whom the log will tell.
    pub(crate) fn may_speak(&self, id: NodeId) -> bool {
        let introduced = || self.replica().is_some_and(|r| r.was_introduced(id));
        !self.is_removed(id) && (self.is_member(id) || introduced())
    }

    /// Whether this node knows who is a member now.
    pub(crate) fn is_current(&self) -> bool {
        self.current.load(Ordering::Relaxed)
    }

    /// From now on this node serves.
    pub(crate) fn set_current(&self) {
        self.current.store(true, Ordering::Relaxed);
    }

    /// Asks until a majority has told what is agreed on now.
    pub(crate) async fn confirm(&self) {
        while !self.is_current() {
            let others: Vec<NodeId> = self.others().iter().map(|m| m.id).collect();
            match self.replica() {
                Some(replica) if replica.confirm(PROPOSE_LIMIT, &others).await => return,
                _ => sleep(Duration::from_millis(100)).await,
            }
        }
    }

    /// Why this node may not serve at the moment: it does not know what counts now.
    pub(crate) fn why_silent(&self) -> Option<String> {
        self.why_not().or_else(|| {
            let starting = "this node has just started and asks the others what has changed";
            (!self.is_current()).then(|| starting.to_owned())
        })
    }

    /// Returns when another than this member coordinates a deployment.
    pub(crate) async fn overruled(&self, deployment: DeploymentId, coordinator: NodeId) {
        self.once(|state| state.placed(deployment).is_some_and(|p| p.coordinator != coordinator)).await;
    }

    /// Returns when no other than this member coordinates a deployment.
    pub(crate) async fn counts(&self, deployment: DeploymentId, coordinator: NodeId) {
        self.once(|state| state.placed(deployment).is_none_or(|p| p.coordinator == coordinator)).await;
    }

    /// Returns when this is so, as far as the log has come here.
    async fn once(&self, so: impl Fn(&State) -> bool) {
        let Some(replica) = self.replica() else { return std::future::pending().await };
        let mut changes = replica.changes();
        // It must not be held here: its file is let go when the last hold is.
        drop(replica);
        if changes.wait_for(|a| so(&a.state)).await.is_err() {
            // The log has ended, and with it the stages of that cluster.
            std::future::pending::<()>().await;
        }
    }

    /// Whether an epoch of a deployment is over.
    pub(crate) fn is_over(&self, deployment: DeploymentId, epoch: Epoch) -> bool {
        self.state().is_some_and(|s| s.placed(deployment).is_some_and(|p| p.epoch > epoch))
    }

    /// Active members other than this node.
    pub(crate) fn others(&self) -> Vec<Member> {
        self.read(|m| m.active().filter(|m| m.id != self.id).cloned().collect())
    }

    pub(crate) fn heard(&self, id: NodeId) {
        let mut seat = self.seat();
        seat.detector.heard(id, now_ms());
        seat.present.heard(id, now_ms());
    }

    pub(crate) fn forget_heard(&self, id: NodeId) {
        self.seat().detector.forget(id);
    }

    pub(crate) fn online(&self, id: NodeId) -> bool {
        id == self.id || self.seat().detector.online(id, now_ms())
    }

    /// Whether a node stopped answering without a goodbye.
    pub(crate) fn fell_silent(&self, id: NodeId) -> bool {
        self.seat().detector.fell_silent(id, now_ms())
    }

    /// The members that were there lately, so that a reboot costs no vote.
    pub(crate) fn present(&self) -> BTreeSet<NodeId> {
        let others = self.others();
        let seat = self.seat();
        // Soon after the start nobody was heard yet.
        let early = seat.since.elapsed() < Duration::from_millis(PRESENT_MS);
        let voters = seat.replica.as_ref().map(|r| r.standing().voters).unwrap_or_default();
        let there = |id: &NodeId| seat.present.online(*id, now_ms()) || (early && voters.contains(id));
        others.iter().map(|m| m.id).filter(there).chain([self.id]).collect()
    }

    /// Who votes, and who leads.
    pub(crate) fn standing(&self) -> Standing {
        self.replica().map(|r| r.standing()).unwrap_or_default()
    }

    /// Why nothing can be changed; none while a majority is there.
    pub(crate) fn why_not(&self) -> Option<String> {
        let replica = self.replica()?;
        (!replica.has_majority()).then(|| self.explain(&replica.standing()))
    }

    fn explain(&self, standing: &Standing) -> String {
        standing.why_not(|id| self.online(id), |id| self.name_of(id))
    }

    /// Asks for a change and waits until it is made.
    pub(crate) async fn propose(&self, command: Command) -> Result<Response, ProposeError> {
        let Some(replica) = self.replica() else { return Err(ProposeError::Stopped("it is stopping".into())) };
        let proposal = Proposal { by: self.id, at_ms: now_ms(), command };
        replica.propose(proposal, PROPOSE_LIMIT, |standing, _| self.explain(standing)).await
    }

    /// Waits a moment until what was changed is known here as well.
    async fn arrives(&self, is_there: impl Fn(&State) -> bool) {
        let Some(replica) = self.replica() else { return };
        timeout(ARRIVE_LIMIT, replica.changes().wait_for(|a| is_there(&a.state))).await.ok();
    }

    /// Issues a ticket for this cluster.
    pub(crate) async fn issue(
        &self,
        ttl_s: u64,
        reusable: bool,
        addrs: Vec<SocketAddr>,
    ) -> Result<Ticket, ProposeError> {
        let (cluster, expires_unix_s) = (self.cluster(), now_s().saturating_add(ttl_s));
        let ticket = Ticket { cluster, inviter: self.id, addrs, secret: rand::random(), expires_unix_s, reusable };
        self.propose(Command::Issue { hash: hash_of(&ticket.secret), expires_unix_s, reusable }).await?;
        Ok(ticket)
    }

    /// Lets a node in by a ticket. See [`Self::admit`].
    pub(crate) async fn redeem(&self, id: NodeId, join: Join) -> Result<Admitted, ProposeError> {
        if join.cluster != self.cluster() {
            return Err(Refusal::from(TicketError::WrongCluster).into());
        }
        let voucher = Voucher::Ticket(hash_of(&join.secret));
        let node = Newcomer { id, name: join.name, addrs: join.addrs, version: join.version };
        self.admit(node, voucher, join.attempt).await
    }

    /// Lets a node in, and gives what it should know.
    pub(crate) async fn admit(&self, node: Newcomer, voucher: Voucher, attempt: u64) -> Result<Admitted, ProposeError> {
        let id = node.id;
        let Response::Admitted { entry, life } = self.propose(Command::Admit { node, voucher, attempt }).await? else {
            return Err(ProposeError::Stopped("the log answered something else".into()));
        };
        self.arrives(|s| s.life(id) == Some(life)).await;
        self.heard(id);
        let members = self.read(|m| m.active().filter(|m| m.id != id).cloned().chain([entry.clone()]).collect());
        Ok(Admitted { entry, life, members })
    }

    /// Takes a member out for good.
    pub(crate) async fn remove(&self, id: NodeId) -> Result<(), ProposeError> {
        self.propose(Command::Remove(id)).await?;
        self.arrives(|s| s.removed(id).is_some()).await;
        Ok(())
    }

    /// Tells the cluster where this node is dialled now, what it runs, and the name it would like, if that is news.
    pub(crate) async fn refresh(&self, addrs: Vec<SocketAddr>) {
        let Some(own) = self.state().and_then(|s| s.members().get(self.id).cloned()) else { return };
        let (wanted, rename) = {
            let seat = self.seat();
            (seat.saved.name.clone(), seat.rename)
        };
        // A name that was taken has got a number.
        let renamed = rename && own.name != wanted && !is_numbered(&own.name, &wanted);
        if (own.addrs == addrs && own.version == self.version && !renamed) || self.why_not().is_some() {
            return;
        }
        let name = if renamed { wanted } else { own.name };
        let node = Newcomer { id: self.id, name, addrs, version: self.version.clone() };
        match self.propose(Command::Refresh(node)).await {
            Ok(_) => self.seat().rename = false,
            Err(error @ ProposeError::Refused(_)) if renamed => {
                // Not again every second; the name that it has stays.
                tracing::warn!(%error, "this node cannot be renamed");
                self.seat().rename = false;
            }
            Err(error) => tracing::debug!(%error, "the cluster could not be told where this node is"),
        }
    }

    /// Notes the members as the log has them, for the next start. Returns whether they are others than before.
    pub(crate) fn remember(&self, state: &State) -> bool {
        let changed = {
            let mut seat = self.seat();
            let changed = seat.seed != *state.members();
            seat.seed = state.members().clone();
            changed
        };
        if changed {
            self.save_or_warn();
        }
        changed
    }

    /// Tells the cluster that this node leaves.
    pub(crate) async fn say_goodbye(&self) -> Result<(), ProposeError> {
        let life = self.seat().saved.life;
        self.propose(Command::Leave { life }).await.map(|_| ())
    }

    /// Becomes a member of another cluster, as a member of it says. Returns the old one's replica, which has to be ended.
    pub(crate) fn enter(&self, cluster: ClusterId, life: u64, members: Vec<Member>) -> Option<Arc<Replica>> {
        let name = self.seat().saved.name.clone();
        self.change(Saved { cluster, name, members, tickets: TicketBook::default(), life, founder: false, log: false })
    }

    /// Becomes the only member of a new cluster. Returns the old one's replica, which has to be ended.
    pub(crate) fn be_alone(&self, addrs: Vec<SocketAddr>) -> Option<Arc<Replica>> {
        let name = self.seat().saved.name.clone();
        let mut members = Members::default();
        let change = Change::Admit { id: self.id, name: name.clone(), addrs, version: self.version.clone() };
        if let Err(error) = members.apply(change, now_ms()) {
            tracing::error!(%error, "this node has no name");
        }
        self.change(Saved { members: members.entries().cloned().collect(), ..alone(name) })
    }

    fn change(&self, mut saved: Saved) -> Option<Arc<Replica>> {
        let old = {
            let mut seat = self.seat();
            seat.seed = Members::default();
            seat.seed.merge(std::mem::take(&mut saved.members));
            seat.saved = saved;
            seat.detector = Detector::default();
            seat.present = Detector::new(PRESENT_MS);
            seat.since = Instant::now();
            seat.rename = false;
            seat.replica.take()
        };
        self.save_or_warn();
        // Who has just come in was told by a majority; who is alone is one.
        self.current.store(true, Ordering::Relaxed);
        old
    }

    /// Ends the part in the log, in order.
    pub(crate) async fn close(&self) {
        let replica = self.seat().replica.take();
        if let Some(replica) = replica {
            replica.stop().await;
        }
    }
}

/// What a node that was let in should know.
pub(crate) struct Admitted {
    pub(crate) entry: Member,
    pub(crate) life: u64,
    pub(crate) members: Vec<Member>,
}

/// Whether a name is another with the number that makes it unique.
fn is_numbered(name: &str, wanted: &str) -> bool {
    let number = name.strip_prefix(wanted).and_then(|rest| rest.strip_prefix('-'));
    number.is_some_and(|number| number.parse::<u32>().is_ok())
}

fn alone(name: String) -> Saved {
    let cluster = ClusterId(rand::random());
    Saved {
        cluster,
        name,
        members: vec![],
        tickets: TicketBook::default(),
        life: FIRST_LIFE,
        founder: true,
        log: false,
    }
}

/// What a change that was not made is over HTTP.
pub(crate) fn not_made(error: ProposeError) -> ManageError {
    let status = match &error {
        ProposeError::Refused(refusal) => match refusal {
            Refusal::Ticket(TicketError::Damaged(_)) => 400,
            Refusal::Ticket(TicketError::WrongCluster | TicketError::TooMany) => 409,
            Refusal::Ticket(_) | Refusal::Removed { .. } => 410,
            Refusal::Member(capstan_cluster::MemberError::BadName(_)) | Refusal::OutOfBounds(_) => 400,
            _ => 409,
        },
        ProposeError::NoMajority { .. } => 503,
        ProposeError::Stopped(_) => 500,
    };
    ManageError::new(status, error.to_string())
}
