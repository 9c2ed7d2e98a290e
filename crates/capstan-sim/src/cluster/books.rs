//! What everybody saw, and the rules it must keep.
use std::collections::{BTreeMap, BTreeSet};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use capstan_cluster::raft::machine::Applied;
use capstan_cluster::{Command, Outcome, Placed, Proposal, Refusal, Response, TicketError, Voucher};
use capstan_proto::{DeploymentId, Epoch, NodeId};
use tokio::time::Instant;

/// What a run did: a test that nothing happened in proves nothing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Runs.
    pub runs: u64,
    /// Entries of the logs.
    pub entries: u64,
    /// Messages that were delivered.
    pub messages: u64,
    /// Messages that were lost.
    pub lost: u64,
    /// Messages that were delivered once more.
    pub doubled: u64,
    /// Times that the power of a node went.
    pub crashes: u64,
    /// Times that the network was cut.
    pub cuts: u64,
    /// Snapshots that came over the network.
    pub snapshots: u64,
    /// Placements that were committed.
    pub placed: u64,
    /// Placements that lost against another.
    pub outrun: u64,
    /// Epochs that began on all their stages.
    pub begun: u64,
    /// Pieces of work that stages took.
    pub worked: u64,
    /// Pieces of work that a fence refused.
    pub fenced: u64,
    /// Pieces of work that a node without a lease refused.
    pub no_lease: u64,
    /// Nodes that came in.
    pub admitted: u64,
    /// Tickets that were refused because another node had used them.
    pub used_tickets: u64,
    /// Nodes that left.
    pub left: u64,
    /// Nodes that were removed.
    pub removed: u64,
    /// Messages and requests of removed nodes that were refused.
    pub shut_out: u64,
    /// Changes that were given up for want of a majority.
    pub no_majority: u64,
}

impl Tally {
    /// Both together.
    pub fn plus(self, o: Self) -> Self {
        Self {
            runs: self.runs + o.runs,
            entries: self.entries + o.entries,
            messages: self.messages + o.messages,
            lost: self.lost + o.lost,
            doubled: self.doubled + o.doubled,
            crashes: self.crashes + o.crashes,
            cuts: self.cuts + o.cuts,
            snapshots: self.snapshots + o.snapshots,
            placed: self.placed + o.placed,
            outrun: self.outrun + o.outrun,
            begun: self.begun + o.begun,
            worked: self.worked + o.worked,
            fenced: self.fenced + o.fenced,
            no_lease: self.no_lease + o.no_lease,
            admitted: self.admitted + o.admitted,
            used_tickets: self.used_tickets + o.used_tickets,
            left: self.left + o.left,
            removed: self.removed + o.removed,
            shut_out: self.shut_out + o.shut_out,
            no_majority: self.no_majority + o.no_majority,
        }
    }
}

#[derive(Default)]
struct Inner {
    /// What was applied at an index, change and state, by whoever was first.
    log: BTreeMap<u64, u64>,
    epochs: BTreeMap<Epoch, (DeploymentId, Placed)>,
    /// Epochs that began on all their stages.
    active: BTreeMap<DeploymentId, BTreeSet<Epoch>>,
    removed: BTreeMap<NodeId, u64>,
    /// Who came in by which one-time ticket.
    once: BTreeMap<[u8; 32], BTreeSet<NodeId>>,
    reusable: BTreeSet<[u8; 32]>,
    /// Placements and removals that somebody was told are made.
    told_epochs: BTreeMap<Epoch, DeploymentId>,
    told_removed: BTreeSet<NodeId>,
    broken: Option<String>,
    fingerprint: DefaultHasher,
    started: Option<Instant>,
    trace: Option<Vec<String>>,
    tally: Tally,
}

/// What everybody saw.
#[derive(Clone, Default)]
pub struct Books(Arc<Mutex<Inner>>);

fn digest(value: &impl serde::Serialize) -> u64 {
    let mut hasher = DefaultHasher::new();
    postcard::to_stdvec(value).unwrap_or_default().hash(&mut hasher);
    hasher.finish()
}

impl Books {
    /// Empty ones; with a trace where one is wanted.
    pub fn new(trace: bool) -> Self {
        let inner = Inner { started: Some(Instant::now()), trace: trace.then(Vec::new), ..Inner::default() };
        Self(Arc::new(Mutex::new(inner)))
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes an event: it becomes part of the run's fingerprint, and of the trace.
    pub fn note(&self, event: impl FnOnce() -> String, mark: impl Hash) {
        let mut inner = self.inner();
        let at = inner.started.map_or(0, |s| s.elapsed().as_millis() as u64);
        (at, mark).hash(&mut inner.fingerprint);
        if let Some(trace) = &mut inner.trace {
            trace.push(format!("{at:>6} ms  {}", event()));
        }
    }

    /// Counts something.
    pub fn count(&self, what: impl FnOnce(&mut Tally)) {
        what(&mut self.inner().tally);
    }

    /// A rule was broken.
    pub fn broke(&self, rule: String) {
        self.note(|| format!("BROKEN {rule}"), 0);
        self.inner().broken.get_or_insert(rule);
    }

    /// The first rule that was broken.
    pub fn broken(&self) -> Option<String> {
        self.inner().broken.clone()
    }

    /// A number that differs as soon as anything in a run differs.
    pub fn fingerprint(&self) -> u64 {
        self.inner().fingerprint.finish()
    }

    /// What was counted, and the trace.
    pub fn close(&self) -> (Tally, Vec<String>) {
        let mut inner = self.inner();
        inner.tally.runs = 1;
        inner.tally.entries = inner.log.len() as u64;
        (inner.tally, inner.trace.take().unwrap_or_default())
    }

    /// A node applied an entry.
    pub fn applied(&self, node: NodeId, applied: &Applied, change: Option<(&Proposal, &Outcome)>) {
        let Some(index) = applied.index else { return };
        let state = digest(&*applied.state);
        let mark = digest(&(state, index));
        self.note(|| format!("{node:?} applies {index}: {change:?}"), mark);
        let mut found = Vec::new();
        let mut inner = self.inner();
        if *inner.log.entry(index).or_insert(mark) != mark {
            found.push(format!("two states after entry {index}, one of them on {node:?}"));
        }
        for (id, removal) in applied.state.all_removed() {
            inner.removed.entry(*id).or_insert(removal.version);
        }
        for (id, since) in &inner.removed {
            let state = &applied.state;
            if state.version() >= *since && (state.removed(*id).is_none() || state.members().get(*id).is_some()) {
                found.push(format!("{id:?} was removed and is back on {node:?}"));
            }
        }
        for (deployment, placed) in applied.state.deployments() {
            let known = inner.epochs.entry(placed.epoch).or_insert_with(|| (*deployment, placed.clone()));
            if known != &(*deployment, placed.clone()) {
                found.push(format!("two placements in epoch {}", placed.epoch));
            }
        }
        match change {
            Some((Proposal { command: Command::Issue { hash, reusable: true, .. }, .. }, Ok(_))) => {
                inner.reusable.insert(*hash);
            }
            Some((
                Proposal { command: Command::Admit { node, voucher: Voucher::Ticket(hash), .. }, .. },
                Ok(Response::Admitted { .. }),
            )) if !inner.reusable.contains(hash) => {
                let came = inner.once.entry(*hash).or_default();
                came.insert(node.id);
                if came.len() > 1 {
                    found.push("a one-time ticket let two nodes in".to_owned());
                }
            }
            _ => {}
        }
        drop(inner);
        found.into_iter().for_each(|rule| self.broke(rule));
    }

    /// Somebody was told what came of a change.
    pub fn told(&self, proposal: &Proposal, outcome: &Outcome) {
        let mut inner = self.inner();
        match (&proposal.command, outcome) {
            (Command::Place { deployment, .. }, Ok(Response::Epoch(epoch))) => {
                inner.told_epochs.insert(*epoch, *deployment);
                inner.tally.placed += 1;
            }
            (Command::Place { .. }, Err(Refusal::EpochMoved { .. })) => inner.tally.outrun += 1,
            (Command::Remove(id), Ok(_)) => {
                inner.told_removed.insert(*id);
                inner.tally.removed += 1;
            }
            (Command::Leave { .. }, Ok(_)) => inner.tally.left += 1,
            (Command::Admit { .. }, Ok(_)) => inner.tally.admitted += 1,
            (Command::Admit { .. }, Err(Refusal::Ticket(TicketError::Used))) => inner.tally.used_tickets += 1,
            (Command::Admit { .. }, Err(Refusal::Removed { .. })) => inner.tally.shut_out += 1,
            _ => {}
        }
    }

    /// An epoch has begun on all its stages.
    pub fn begun(&self, deployment: DeploymentId, epoch: Epoch) {
        let mut inner = self.inner();
        inner.active.entry(deployment).or_default().insert(epoch);
        inner.tally.begun += 1;
        let known = inner.epochs.contains_key(&epoch);
        drop(inner);
        if !known {
            self.broke(format!("epoch {epoch} began without being committed"));
        }
    }

    /// A stage took a piece of work.
    pub fn worked(&self, node: NodeId, from: NodeId, deployment: DeploymentId, epoch: Epoch) {
        let mut inner = self.inner();
        inner.tally.worked += 1;
        let newer = inner.active.get(&deployment).and_then(|a| a.last()).filter(|last| **last > epoch).copied();
        let wrong = match inner.epochs.get(&epoch) {
            _ if newer.is_some() => Some(format!("epoch {} had begun", newer.unwrap_or_default())),
            None => Some("it was never committed".to_owned()),
            Some((d, placed)) if *d != deployment || placed.coordinator != from => Some("it is another's".to_owned()),
            Some((_, placed)) if !placed.seats.iter().any(|s| s.node == node) => {
                Some("it has no seat there".to_owned())
            }
            Some(_) => None,
        };
        drop(inner);
        if let Some(why) = wrong {
            self.broke(format!("{node:?} worked for {from:?} in epoch {epoch} though {why}"));
        }
    }

    /// Whatever somebody was told is made must be in what all agree on.
    pub fn nothing_told_was_lost(&self) {
        let inner = self.inner();
        let lost = inner
            .told_epochs
            .iter()
            .find(|(epoch, deployment)| inner.epochs.get(epoch).is_none_or(|(d, _)| d != *deployment))
            .map(|(epoch, _)| format!("epoch {epoch} was told and is nowhere"));
        let back = inner.told_removed.iter().find(|id| !inner.removed.contains_key(id));
        let back = back.map(|id| format!("{id:?} was said to be removed and is not"));
        drop(inner);
        lost.into_iter().chain(back).for_each(|rule| self.broke(rule));
    }
}
