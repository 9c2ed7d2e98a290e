//! One node's copy of the cluster's state: start it, propose changes, answer other replicas, make sure of the present.
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use capstan_proto::NodeId;
use openraft::error::{ClientWriteError, RaftError};
use openraft::{Config, EmptyNode, Raft, SnapshotPolicy, Vote};
use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout};

use super::machine::{Applied, Machine, Observer};
use super::wire::{ENTRIES_MAX, Peers, RaftReply, RaftRequest, Transport};
use super::{RaftId, RaftMessage, Store, StoreError, Types};
use crate::command::{Command, Outcome, Proposal, Refusal, Response};
use crate::state::State;
use crate::voters::majority;

/// Between two looks for a leader while there is none.
const LOOK_AGAIN: Duration = Duration::from_millis(50);

/// Times and sizes of a replica.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// Between two signs of life of the leader, in milliseconds; also how long a message may take.
    pub heartbeat_ms: u64,
    /// Least silence of the leader after which a voter stands for election, in milliseconds. Up to twice that is drawn.
    pub election_ms: u64,
    /// Entries after which the state is written down whole.
    pub snapshot_every: u64,
    /// Entries that stay after that, for those who are only a little behind.
    pub keep_entries: u64,
}

impl Default for Settings {
    /// For machines that are busy computing: a leader is missed after 1.5 to 3 seconds, a stage's process never is.
    fn default() -> Self {
        Self { heartbeat_ms: 300, election_ms: 1500, snapshot_every: 512, keep_entries: 128 }
    }
}

impl Settings {
    fn config(&self) -> Result<Config, ReplicaError> {
        Config {
            cluster_name: "capstan".to_owned(),
            heartbeat_interval: self.heartbeat_ms,
            election_timeout_min: self.election_ms,
            election_timeout_max: 2 * self.election_ms,
            install_snapshot_timeout: 4 * self.election_ms,
            max_payload_entries: ENTRIES_MAX,
            snapshot_policy: SnapshotPolicy::LogsSinceLast(self.snapshot_every),
            max_in_snapshot_log_to_keep: self.keep_entries,
            replication_lag_threshold: self.snapshot_every + self.keep_entries,
            ..Config::default()
        }
        .validate()
        .map_err(|e| ReplicaError::Stopped(e.to_string()))
    }

    /// How long silence may last before a majority counts as lost.
    pub(super) fn patience(&self) -> Duration {
        Duration::from_millis(2 * self.election_ms)
    }
}

/// Why a replica does not run.
#[derive(Debug, thiserror::Error)]
pub enum ReplicaError {
    /// Its disk.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// openraft gave up.
    #[error("the cluster's state cannot be kept on this node: {0}")]
    Stopped(String),
}

/// Why a change was not made.
#[derive(Clone, Debug, thiserror::Error)]
pub enum ProposeError {
    /// The state says no. Nothing changed.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// Too few voters answer. Whether the change was made is unknown where `sent`.
    #[error("the cluster cannot change now: {why}")]
    NoMajority {
        /// For people.
        why: String,
        /// Whether the change may have been made nevertheless.
        sent: bool,
    },
    /// The replica does not run any more. Whether the change was made is unknown.
    #[error("this node does not take part in the cluster's state any more: {0}")]
    Stopped(String),
}

/// How a replica stands.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Standing {
    /// Who leads, as far as is known here.
    pub leader: Option<RaftId>,
    /// Who votes.
    pub voters: BTreeSet<NodeId>,
    /// Who only learns.
    pub learners: BTreeSet<NodeId>,
}

impl Standing {
    /// Why nothing can be changed, as a sentence: who does not answer. `name` gives a node's name.
    pub fn why_not(&self, online: impl Fn(NodeId) -> bool, name: impl Fn(NodeId) -> String) -> String {
        let away: Vec<String> = self.voters.iter().filter(|id| !online(**id)).map(|id| name(*id)).collect();
        let voters = self.voters.len();
        match (away.len(), voters) {
            (_, 0) => "this node has not heard from the cluster yet; is a node that was in it before running?".into(),
            (0, _) => "the voters are choosing a leader; try again in a moment".into(),
            (1, 1) => format!("node {} alone votes in this cluster and does not answer; start it", away[0]),
            (n, _) if voters - n >= majority(voters) => {
                format!("{n} of {voters} voters do not answer ({}), and the others choose a leader", away.join(", "))
            }
            (n, _) => format!(
                "{n} of {voters} voters do not answer: {}; {} must, so start what is stopped",
                away.join(", "),
                majority(voters)
            ),
        }
    }
}

/// One node's copy of the cluster's state.
pub struct Replica {
    pub(super) id: RaftId,
    pub(super) raft: Raft<Types>,
    pub(super) settings: Settings,
    pub(super) transport: Arc<dyn Transport>,
    applied: watch::Receiver<Applied>,
    /// When the leader's word was last taken here.
    led_at: Mutex<Option<Instant>>,
    /// A leader of whom the log here tells only later: another member named it, or its word was taken.
    introduced: Mutex<Option<NodeId>>,
    /// Who leads in the words of each that was asked, and when it said so.
    named: Mutex<BTreeMap<NodeId, (NodeId, Instant)>>,
    /// When the leader asked this node to stand in its place.
    asked_to_stand: Mutex<Option<Instant>>,
    /// Who answered at the last look of the keeper.
    pub(super) online: Mutex<BTreeSet<NodeId>>,
    /// Voters are changed by one at a time.
    pub(super) changing: tokio::sync::Mutex<()>,
}

impl Replica {
    /// Starts where the store left off. A new one waits until it founds a cluster or hears from one.
    pub async fn start(
        id: RaftId,
        store: Store,
        transport: Arc<dyn Transport>,
        settings: Settings,
        observer: Option<Observer>,
    ) -> Result<Self, ReplicaError> {
        let (machine, applied) = Machine::open(store.clone(), observer)?;
        let config = Arc::new(settings.config()?);
        let raft = Raft::new(id, config, Peers(transport.clone()), store, machine)
            .await
            .map_err(|e| ReplicaError::Stopped(e.to_string()))?;
        Ok(Self {
            id,
            raft,
            settings,
            transport,
            applied,
            led_at: Mutex::default(),
            introduced: Mutex::default(),
            named: Mutex::default(),
            asked_to_stand: Mutex::default(),
            online: Mutex::default(),
            changing: tokio::sync::Mutex::default(),
        })
    }

    /// Makes this node the only voter of a new cluster, and applies its first change. Does nothing in one that exists.
    pub async fn found(&self, first: Proposal, limit: Duration) -> Result<(), ProposeError> {
        let stopped = |e: &dyn std::fmt::Display| ProposeError::Stopped(e.to_string());
        if !self.raft.is_initialized().await.map_err(|e| stopped(&e))? {
            self.raft
                .initialize(std::collections::BTreeMap::from([(self.id, EmptyNode::new())]))
                .await
                .map_err(|e| stopped(&e))?;
        } else if self.standing().voters != BTreeSet::from([self.id.node]) {
            return Ok(());
        }
        match self.propose(first, limit, |_, _| String::new()).await {
            Ok(_) | Err(ProposeError::Refused(Refusal::Founded)) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// The state as far as it has come here.
    pub fn state(&self) -> Arc<State> {
        self.applied.borrow().state.clone()
    }

    /// Tells of every change.
    pub fn changes(&self) -> watch::Receiver<Applied> {
        self.applied.clone()
    }

    /// Who leads, votes and learns, as far as is known here.
    pub fn standing(&self) -> Standing {
        let metrics = self.raft.metrics();
        let metrics = metrics.borrow();
        let membership = metrics.membership_config.membership();
        Standing {
            leader: metrics.current_leader,
            voters: membership.voter_ids().map(|id| id.node).collect(),
            learners: membership.learner_ids().map(|id| id.node).collect(),
        }
    }

    /// Whether a majority was there a moment ago, as far as is known here without asking.
    pub fn has_majority(&self) -> bool {
        let patience = self.settings.patience();
        let metrics = self.raft.metrics();
        let metrics = metrics.borrow();
        if metrics.current_leader == Some(self.id) {
            let alone = metrics.membership_config.membership().voter_ids().eq([self.id]);
            return alone || metrics.millis_since_quorum_ack.is_some_and(|ms| u128::from(ms) < patience.as_millis());
        }
        let led_at = *self.led_at.lock().unwrap_or_else(PoisonError::into_inner);
        led_at.is_some_and(|at| at.elapsed() < patience)
    }

    /// Asks for a change and waits until it is applied here, or says why it was not made. `why` explains who is missing.
    pub async fn propose(
        &self,
        proposal: Proposal,
        limit: Duration,
        why: impl Fn(&Standing, &str) -> String,
    ) -> Result<Response, ProposeError> {
        proposal.check().map_err(Refusal::from)?;
        let mut sent = false;
        let mut trouble = String::new();
        let ask = async {
            loop {
                match self.standing().leader {
                    Some(leader) if leader == self.id => {
                        sent = true;
                        match self.write(proposal.clone()).await? {
                            Some(outcome) => return Ok(outcome?),
                            None => sleep(LOOK_AGAIN).await,
                        }
                    }
                    Some(leader) => {
                        sent = true;
                        let request = RaftRequest::Propose(proposal.clone());
                        match self.transport.call(RaftMessage { to: leader, request }, limit).await {
                            Ok(RaftReply::Proposed(outcome)) => return Ok(outcome?),
                            Ok(RaftReply::Unable(reason)) => trouble = reason,
                            Ok(_) => {}
                            Err(error) => trouble = error.to_string(),
                        }
                        sleep(LOOK_AGAIN).await;
                    }
                    None => sleep(LOOK_AGAIN).await,
                }
            }
        };
        match timeout(limit, ask).await {
            Ok(done) => done,
            Err(_) => Err(ProposeError::NoMajority { why: why(&self.standing(), &trouble), sent }),
        }
    }

    /// Writes as the leader; none when this node does not lead, or not yet.
    async fn write(&self, proposal: Proposal) -> Result<Option<Outcome>, ProposeError> {
        let _turn = match &proposal.command {
            // Who goes gives its vote away first: a cluster must never wait for one that is gone for good.
            Command::Leave { .. } | Command::Remove(_) => {
                let goes = if let Command::Remove(id) = proposal.command { id } else { proposal.by };
                let turn = self.changing.lock().await;
                if !self.free_of_vote(goes).await {
                    return Ok(None);
                }
                Some(turn)
            }
            _ => None,
        };
        match self.raft.client_write(proposal).await {
            Ok(written) => Ok(Some(written.data)),
            Err(RaftError::APIError(ClientWriteError::ForwardToLeader(_))) => Ok(None),
            Err(error) => Err(ProposeError::Stopped(error.to_string())),
        }
    }

    /// Answers another replica. `from` is who the link proves; whether it is a member is for the caller to know.
    pub async fn answer(&self, from: NodeId, message: RaftMessage) -> RaftReply {
        let RaftMessage { to, request } = message;
        if to != self.id && !matches!(request, RaftRequest::Confirm) {
            return RaftReply::Unable("it is meant for an earlier life of this node".into());
        }
        if let Err(bad) = request.check(from) {
            tracing::warn!(node = %from.short(), %bad, "a message about the cluster's state was refused");
            return RaftReply::Unable(bad.to_string());
        }
        let unable = |e: &dyn std::fmt::Display| RaftReply::Unable(e.to_string());
        match request {
            RaftRequest::Append(append) => match self.raft.append_entries(append).await {
                Ok(answer) => {
                    if answer.is_success() {
                        *self.led_at.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
                        self.introduce(from);
                    }
                    RaftReply::Append(answer)
                }
                Err(error) => unable(&error),
            },
            // One that left and did not hear so stands again and again. Where the log has not come as far as to know that,
            // such a vote would undo the leader who brings it.
            RaftRequest::Vote(mut vote) => {
                if self.leads_another(from) {
                    // Of a term that is over: refused, with how long the log here is. A candidate with a shorter one gives
                    // others more time before it stands again.
                    vote.vote = Vote::new(0, vote.vote.leader_id.node_id);
                }
                match self.raft.vote(vote).await {
                    Ok(answer) => RaftReply::Vote(answer),
                    Err(error) => unable(&error),
                }
            }
            RaftRequest::Snapshot { vote, meta, bytes } => {
                let snapshot = openraft::Snapshot { meta, snapshot: Box::new(bytes) };
                match self.raft.install_full_snapshot(vote, snapshot).await {
                    Ok(answer) => {
                        // It may be of a time before its sender came in.
                        if answer.vote == vote {
                            self.introduce(from);
                        }
                        RaftReply::Snapshot(answer.vote)
                    }
                    Err(error) => unable(&error),
                }
            }
            RaftRequest::Propose(proposal) => {
                let leader = self.standing().leader;
                if leader != Some(self.id) {
                    return RaftReply::Elsewhere(leader);
                }
                match timeout(self.settings.patience(), self.write(proposal)).await {
                    Ok(Ok(Some(outcome))) => RaftReply::Proposed(outcome),
                    Ok(Ok(None)) => RaftReply::Elsewhere(self.standing().leader),
                    Ok(Err(error)) => unable(&error),
                    Err(_) => RaftReply::Unable("a majority of the voters does not answer the leader".into()),
                }
            }
            RaftRequest::Confirm => match self.lead().await {
                Some(index) => RaftReply::Confirmed(index),
                None => RaftReply::Elsewhere(self.standing().leader.filter(|l| *l != self.id && self.has_majority())),
            },
            RaftRequest::Stand => {
                let leader = self.standing().leader;
                if leader.is_some_and(|l| l.node == from) {
                    *self.asked_to_stand.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
                    if let Err(error) = self.raft.trigger().elect().await {
                        return unable(&error);
                    }
                }
                RaftReply::Elsewhere(leader)
            }
        }
    }

    /// What is committed, if this node leads and a majority says so now.
    async fn lead(&self) -> Option<Option<u64>> {
        let asked = timeout(self.settings.patience(), self.raft.get_read_log_id()).await;
        Some(asked.ok()?.ok()?.0.map(|id| id.index))
    }

    fn introduce(&self, leader: NodeId) {
        // Once the log tells of it, the log alone decides how long.
        let known = self.state().members().get(leader).is_some();
        *self.introduced.lock().unwrap_or_else(PoisonError::into_inner) = (!known).then_some(leader);
    }

    /// Whether this node leads, as another member said or as it was taken to, and the log has not come as far yet as to
    /// say that it is a member.
    pub fn was_introduced(&self, node: NodeId) -> bool {
        let introduced = *self.introduced.lock().unwrap_or_else(PoisonError::into_inner);
        introduced == Some(node) && self.standing().leader != Some(self.id)
    }

    /// Makes sure that everything that was committed before this call is applied here. False when a majority could not
    /// be reached in time; then what is known here may be old. `others` are asked for the leader where it is not known.
    pub async fn confirm(&self, limit: Duration, others: &[NodeId]) -> bool {
        let ask = async {
            let mut others = others.iter().cycle();
            let index = loop {
                let leader = self.standing().leader;
                if leader.is_some_and(|l| l == self.id) {
                    if let Some(index) = self.lead().await {
                        break index;
                    }
                } else if let Some(leader) = leader
                    && let Some(RaftReply::Confirmed(index)) = self.ask_for_leader(leader, limit).await
                {
                    break index;
                } else if let Some(other) = others.next() {
                    // Its life does not matter: it answers for whoever asks.
                    self.ask_for_leader(RaftId { node: *other, life: 0 }, limit).await;
                }
                sleep(LOOK_AGAIN).await;
            };
            let mut applied = self.applied.clone();
            applied.wait_for(|a| a.index >= index).await.is_ok()
        };
        timeout(limit, ask).await.unwrap_or(false)
    }

    async fn ask_for_leader(&self, to: RaftId, limit: Duration) -> Option<RaftReply> {
        let message = RaftMessage { to, request: RaftRequest::Confirm };
        let reply = self.transport.call(message, limit).await.ok()?;
        let leads = match reply {
            RaftReply::Confirmed(_) => Some(to.node),
            RaftReply::Elsewhere(leader) => leader.map(|l| l.node),
            _ => None,
        };
        let mut named = self.named.lock().unwrap_or_else(PoisonError::into_inner);
        match leads {
            Some(leads) => _ = named.insert(to.node, (leads, Instant::now())),
            None => _ = named.remove(&to.node),
        }
        drop(named);
        if let Some(leads) = leads {
            self.introduce(leads);
        }
        Some(reply)
    }

    /// How long ago the leader asked this node to stand in its place. A leader that was elected otherwise knows that nobody
    /// has heard of another for a while; this one does not.
    pub fn handed_over(&self) -> Option<Duration> {
        self.asked_to_stand.lock().unwrap_or_else(PoisonError::into_inner).map(|at| at.elapsed())
    }

    /// Whether another leads: it has just said so itself, which it does with a majority only, or so many voters have that
    /// with its own vote they are one.
    fn leads_another(&self, candidate: NodeId) -> bool {
        let fresh = Duration::from_millis(self.settings.election_ms);
        let voters = self.standing().voters;
        let named = self.named.lock().unwrap_or_else(PoisonError::into_inner);
        let mut votes: BTreeMap<NodeId, usize> = BTreeMap::new();
        for (by, (leads, _)) in named.iter().filter(|(_, (leads, at))| *leads != candidate && at.elapsed() < fresh) {
            if by == leads {
                return true;
            }
            *votes.entry(*leads).or_default() += usize::from(voters.contains(by));
        }
        votes.values().any(|n| n + 1 >= majority(voters.len()))
    }

    /// Ends it. What was promised is on disk.
    pub async fn stop(&self) {
        if let Err(error) = self.raft.shutdown().await {
            tracing::warn!(%error, "the cluster's state did not end in order");
        }
    }
}
