//! Who is in the cluster, kept on disk and in step with what other nodes tell.
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use capstan_cluster::{Change, Detector, Member, MemberError, Members, Ticket, TicketBook, TicketError};
use capstan_proto::{ClusterId, NodeId};
use serde::{Deserialize, Serialize};

use crate::error::NodeError;
use crate::files;

/// Milliseconds since 1970.
pub(crate) fn now_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_millis() as u64)
}

/// Seconds since 1970.
pub(crate) fn now_s() -> u64 {
    now_ms() / 1000
}

#[derive(Clone, Serialize, Deserialize)]
struct Saved {
    cluster: ClusterId,
    /// The name this node would like; the one it has is in its entry.
    name: String,
    /// As a list: JSON has no keys other than text.
    members: Vec<Member>,
    tickets: TicketBook,
}

struct State {
    cluster: ClusterId,
    name: String,
    members: Members,
    tickets: TicketBook,
    detector: Detector,
}

/// Who is in the cluster.
pub(crate) struct Membership {
    id: NodeId,
    version: String,
    path: PathBuf,
    state: Mutex<State>,
}

impl Membership {
    /// Takes up what was saved, or makes a cluster of one.
    pub(crate) fn open(
        data_dir: &std::path::Path,
        id: NodeId,
        name: Option<String>,
        addrs: Vec<SocketAddr>,
        version: &str,
    ) -> Result<Self, NodeError> {
        let path = data_dir.join("cluster.json");
        let saved = files::read_json::<Saved>(&path)?;
        let mut state = State {
            cluster: saved.as_ref().map_or_else(new_cluster, |s| s.cluster),
            name: name.or_else(|| saved.as_ref().map(|s| s.name.clone())).unwrap_or_else(crate::identity::machine_name),
            members: Members::default(),
            tickets: saved.as_ref().map(|s| s.tickets.clone()).unwrap_or_default(),
            detector: Detector::default(),
        };
        state.members.merge(saved.into_iter().flat_map(|s| s.members));
        let own = (state.name.clone(), version.to_owned());
        let command = match state.members.get(id) {
            Some(_) => Change::Refresh { id, name: own.0, addrs, version: own.1 },
            None => Change::Admit { id, name: own.0, addrs, version: own.1 },
        };
        state.members.apply(command, now_ms())?;
        let membership = Self { id, version: version.to_owned(), path, state: Mutex::new(state) };
        membership.save().map_err(|source| NodeError::DataDir { path: membership.path.clone(), source })?;
        Ok(membership)
    }

    // A panic elsewhere cannot leave the state half-changed: every change is one assignment or one pure call.
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn save(&self) -> std::io::Result<()> {
        // Written under the lock, so that two changes cannot be saved in the wrong order. The file is small.
        let state = self.state();
        let saved = Saved {
            cluster: state.cluster,
            name: state.name.clone(),
            members: state.members.entries().cloned().collect(),
            tickets: state.tickets.clone(),
        };
        files::write_json(&self.path, &saved)
    }

    fn save_or_warn(&self) {
        if let Err(error) = self.save() {
            tracing::error!(%error, "the member list could not be saved; after a restart this node may not find back");
        }
    }

    pub(crate) fn cluster(&self) -> ClusterId {
        self.state().cluster
    }

    pub(crate) fn name(&self) -> String {
        self.get(self.id).map(|m| m.name).unwrap_or_default()
    }

    pub(crate) fn get(&self, id: NodeId) -> Option<Member> {
        self.state().members.get(id).cloned()
    }

    /// The name of a member, or the first digits of its key.
    pub(crate) fn name_of(&self, id: NodeId) -> String {
        self.get(id).map_or_else(|| id.short(), |m| m.name)
    }

    pub(crate) fn find(&self, name_or_id: &str) -> Option<Member> {
        self.state().members.find(name_or_id).cloned()
    }

    pub(crate) fn is_member(&self, id: NodeId) -> bool {
        self.state().members.get(id).is_some()
    }

    /// Active members other than this node.
    pub(crate) fn others(&self) -> Vec<Member> {
        self.state().members.active().filter(|m| m.id != self.id).cloned().collect()
    }

    /// All entries, to be told to others.
    pub(crate) fn entries(&self) -> Vec<Member> {
        self.state().members.entries().cloned().collect()
    }

    pub(crate) fn heard(&self, id: NodeId) {
        self.state().detector.heard(id, now_ms());
    }

    pub(crate) fn forget_heard(&self, id: NodeId) {
        self.state().detector.forget(id);
    }

    pub(crate) fn online(&self, id: NodeId) -> bool {
        id == self.id || self.state().detector.online(id, now_ms())
    }

    /// Whether a node stopped answering without a goodbye.
    pub(crate) fn fell_silent(&self, id: NodeId) -> bool {
        self.state().detector.fell_silent(id, now_ms())
    }

    /// Takes over what another member knows better. Returns whether anything changed.
    pub(crate) fn merge(&self, entries: Vec<Member>) -> bool {
        let changed = {
            let mut state = self.state();
            let mut changed = state.members.merge(entries);
            if state.members.must_rename(self.id)
                && let Some(own) = state.members.get(self.id).cloned()
            {
                // Two inviters may have given the same name at the same time; the larger key gives way.
                let base = own.name.clone();
                let name = (2..1000)
                    .map(|n| format!("{base}-{n}"))
                    .find(|name| state.members.find(name).is_none())
                    .unwrap_or_else(|| self.id.short());
                let command = Change::Refresh { id: self.id, name, addrs: own.addrs, version: own.version };
                if let Err(error) = state.members.apply(command, now_ms()) {
                    tracing::warn!(%error, "this node's name is not unique");
                }
                changed = true;
            }
            changed
        };
        if changed {
            self.save_or_warn();
        }
        changed
    }

    /// Notes that this node is dialled elsewhere now. Returns whether that is news.
    pub(crate) fn set_own_addrs(&self, addrs: Vec<SocketAddr>) -> bool {
        let changed = {
            let mut state = self.state();
            match state.members.get(self.id).cloned() {
                Some(own) if own.addrs != addrs => {
                    let command = Change::Refresh { id: self.id, name: own.name, addrs, version: self.version.clone() };
                    state.members.apply(command, now_ms()).is_ok()
                }
                _ => false,
            }
        };
        if changed {
            self.save_or_warn();
        }
        changed
    }

    /// Issues a ticket for this cluster.
    pub(crate) fn issue(&self, ttl_s: u64, reusable: bool) -> Result<Ticket, TicketError> {
        let now = now_s();
        let ticket = {
            let mut state = self.state();
            let ticket = Ticket {
                cluster: state.cluster,
                inviter: self.id,
                addrs: state.members.get(self.id).map(|m| m.addrs.clone()).unwrap_or_default(),
                secret: rand::random(),
                expires_unix_s: now.saturating_add(ttl_s),
                reusable,
            };
            state.tickets.issue(&ticket, now)?;
            ticket
        };
        self.save_or_warn();
        Ok(ticket)
    }

    /// Lets a node in by a ticket, and gives the entries it should know.
    pub(crate) fn admit(
        &self,
        id: NodeId,
        join: capstan_proto::control::Join,
    ) -> Result<(Member, Vec<Member>), AdmitError> {
        let result = {
            let mut state = self.state();
            if join.cluster != state.cluster {
                return Err(TicketError::WrongCluster.into());
            }
            // Whether there is room is asked first, so that a full cluster does not use the ticket up.
            state.members.clone().apply(
                Change::Admit { id, name: join.name.clone(), addrs: join.addrs.clone(), version: join.version.clone() },
                now_ms(),
            )?;
            let is_member = state.members.get(id).is_some();
            state.tickets.redeem(&join.secret, id, is_member, now_s())?;
            let command = Change::Admit { id, name: join.name, addrs: join.addrs, version: join.version };
            let entry = state.members.apply(command, now_ms())?;
            state.detector.heard(id, now_ms());
            (entry, state.members.entries().cloned().collect())
        };
        self.save_or_warn();
        Ok(result)
    }

    /// Becomes a member of another cluster, as its inviter says.
    pub(crate) fn enter(&self, cluster: ClusterId, members: Vec<Member>) {
        {
            let mut state = self.state();
            state.cluster = cluster;
            state.members = Members::default();
            state.members.merge(members);
            state.tickets = TicketBook::default();
            state.detector = Detector::default();
        }
        self.save_or_warn();
    }

    /// The entry that tells the others that this node leaves. Nothing has changed here yet.
    pub(crate) fn leaving(&self) -> Result<Member, MemberError> {
        self.state().members.clone().apply(Change::Leave { id: self.id }, now_ms())
    }

    /// Leaves, into a new cluster of one.
    pub(crate) fn leave(&self) -> Result<(), MemberError> {
        {
            let mut state = self.state();
            let own = state.members.get(self.id).cloned().ok_or(MemberError::NotAMember(self.id))?;
            state.cluster = new_cluster();
            state.members = Members::default();
            state.tickets = TicketBook::default();
            state.detector = Detector::default();
            let command =
                Change::Admit { id: self.id, name: state.name.clone(), addrs: own.addrs, version: own.version };
            state.members.apply(command, now_ms())?;
        }
        self.save_or_warn();
        Ok(())
    }
}

fn new_cluster() -> ClusterId {
    ClusterId(rand::random())
}

/// Why a node was not let in.
#[derive(Debug, thiserror::Error)]
pub(crate) enum AdmitError {
    #[error(transparent)]
    Ticket(#[from] TicketError),
    #[error(transparent)]
    Member(#[from] MemberError),
}

impl AdmitError {
    /// The HTTP status that says what kind of error it is.
    pub(crate) fn status(&self) -> u16 {
        match self {
            Self::Ticket(TicketError::Damaged(_)) => 400,
            Self::Ticket(TicketError::Expired { .. } | TicketError::Used | TicketError::Unknown) => 410,
            Self::Ticket(TicketError::WrongCluster | TicketError::TooMany) => 409,
            Self::Member(MemberError::BadName(_)) => 400,
            Self::Member(_) => 409,
        }
    }
}
