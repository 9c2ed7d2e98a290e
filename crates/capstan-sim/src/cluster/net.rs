//! The network, and what a node's door lets in.
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use capstan_cluster::raft::{Lost, RaftMessage, RaftReply, RaftRequest, Replica, Transport};
use capstan_proto::NodeId;
use tokio::time::sleep;

use super::books::Books;
use crate::dice::Dice;

/// Longest that is waited for what never comes, in milliseconds: long enough for everybody to have given up.
const NEVER_MS: u64 = 2000;
/// Longest that a doubled message takes, in milliseconds.
const LATE_MS: u64 = 4000;
/// One message in so many also goes through the codec.
const CODED: f64 = 0.05;

/// How the network is at the moment.
#[derive(Clone, Copy, Debug)]
pub struct Weather {
    /// Share of messages that are lost, each way.
    pub lost: f64,
    /// Share of messages that come once more, later.
    pub doubled: f64,
    /// Longest way, in milliseconds.
    pub delay_ms: u64,
}

impl Weather {
    /// As on a LAN.
    pub const CALM: Self = Self { lost: 0.0, doubled: 0.0, delay_ms: 3 };
}

struct Inner {
    dice: Dice,
    weather: Weather,
    /// Ways that are cut, one direction each.
    cuts: BTreeSet<(NodeId, NodeId)>,
    running: BTreeMap<NodeId, Arc<Replica>>,
    /// Who was refused with the word that its key is out for good.
    told: BTreeSet<NodeId>,
}

/// The network.
pub struct Net {
    inner: Mutex<Inner>,
    books: Books,
}

/// What becomes of a message.
enum Fate {
    Lost,
    After(u64),
}

impl Net {
    /// A calm network of nobody.
    pub fn new(dice: Dice, books: Books) -> Arc<Self> {
        let inner = Inner {
            dice,
            weather: Weather::CALM,
            cuts: BTreeSet::new(),
            running: BTreeMap::new(),
            told: BTreeSet::new(),
        };
        Arc::new(Self { inner: Mutex::new(inner), books })
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Draws from the run's dice.
    pub fn draw<T>(&self, draw: impl FnOnce(&mut Dice) -> T) -> T {
        draw(&mut self.inner().dice)
    }

    /// The weather changes.
    pub fn set_weather(&self, weather: Weather) {
        self.inner().weather = weather;
    }

    /// The cuts are these from now on.
    pub fn set_cuts(&self, cuts: BTreeSet<(NodeId, NodeId)>) {
        self.inner().cuts = cuts;
    }

    /// A node is there, or not any more.
    pub fn set_running(&self, node: NodeId, replica: Option<Arc<Replica>>) {
        let mut inner = self.inner();
        match replica {
            Some(replica) => inner.running.insert(node, replica),
            None => inner.running.remove(&node),
        };
    }

    /// Whether a node was told that its key is out for good, once.
    pub fn takes_told(&self, node: NodeId) -> bool {
        self.inner().told.remove(&node)
    }

    fn replica(&self, node: NodeId) -> Option<Arc<Replica>> {
        self.inner().running.get(&node).cloned()
    }

    /// Nodes that `from` could hear from now.
    pub fn heard_by(&self, from: NodeId) -> BTreeSet<NodeId> {
        let inner = self.inner();
        let open = |to: &NodeId| !inner.cuts.contains(&(from, *to)) && !inner.cuts.contains(&(*to, from));
        inner.running.keys().copied().filter(open).collect()
    }

    fn fate(&self, from: NodeId, to: NodeId) -> Fate {
        let mut inner = self.inner();
        let Weather { lost, delay_ms, .. } = inner.weather;
        if inner.cuts.contains(&(from, to)) || inner.dice.chance(lost) {
            return Fate::Lost;
        }
        // Mostly quick, now and then up to the longest.
        let quick = delay_ms.min(3);
        let most = if inner.dice.chance(0.1) { delay_ms } else { quick };
        Fate::After(inner.dice.between(0, most.max(1)))
    }

    fn comes_again(&self) -> Option<u64> {
        let mut inner = self.inner();
        let share = inner.weather.doubled;
        inner.dice.chance(share).then(|| inner.dice.between(1, LATE_MS))
    }

    /// One message's way; an error when it never comes.
    pub async fn carry(&self, from: NodeId, to: NodeId) -> Result<(), Lost> {
        match self.fate(from, to) {
            Fate::After(ms) => {
                sleep(Duration::from_millis(ms)).await;
                Ok(())
            }
            Fate::Lost => {
                self.books.count(|t| t.lost += 1);
                sleep(Duration::from_millis(NEVER_MS)).await;
                Err(Lost::Broken("it was lost".into()))
            }
        }
    }

    /// How long until a message comes once more, if it does.
    pub fn doubled(&self) -> Option<Duration> {
        let again = self.comes_again()?;
        self.books.count(|t| t.doubled += 1);
        Some(Duration::from_millis(again))
    }

    /// Whether a node talks with another about the log, as a daemon would: with members, or with a leader whom a member
    /// has named, and never with a removed key. One that has heard nothing of the log yet has only what let it in.
    pub fn talks(&self, at: &Replica, with: NodeId) -> bool {
        let state = at.state();
        if state.removed(with).is_some() {
            self.books.count(|t| t.shut_out += 1);
            return false;
        }
        state.cluster().is_none() || state.members().get(with).is_some() || at.was_introduced(with)
    }

    /// A message arrives.
    async fn deliver(&self, from: NodeId, message: RaftMessage) -> Result<RaftReply, Lost> {
        let to = message.to.node;
        let Some(replica) = self.replica(to) else {
            sleep(Duration::from_millis(20)).await;
            return Err(Lost::Unreachable("its daemon does not run".into()));
        };
        if !self.talks(&replica, from) {
            if replica.state().removed(from).is_some() {
                self.inner().told.insert(from);
            }
            return Err(Lost::Unreachable("it refuses who is no member".into()));
        }
        let kind = match &message.request {
            RaftRequest::Append(a) => a.entries.len(),
            RaftRequest::Vote(_) => 101,
            RaftRequest::Snapshot { .. } => 102,
            RaftRequest::Propose(_) => 103,
            RaftRequest::Confirm => 104,
            RaftRequest::Stand => 105,
        };
        let snapshot = matches!(message.request, RaftRequest::Snapshot { .. });
        self.books.note(|| format!("{from:?} -> {to:?} ({kind})"), (from.0[0], to.0[0], kind));
        let reply = replica.answer(from, message).await;
        self.books.count(|t| {
            t.messages += 1;
            t.snapshots += u64::from(snapshot && matches!(reply, RaftReply::Snapshot(_)));
        });
        Ok(reply)
    }
}

/// A node's side of the network.
pub struct Link {
    /// Whose.
    pub from: NodeId,
    /// The network.
    pub net: Arc<Net>,
}

#[async_trait]
impl Transport for Link {
    async fn call(&self, mut message: RaftMessage, _: Duration) -> Result<RaftReply, Lost> {
        let (net, from, to) = (&self.net, self.from, message.to.node);
        // One that left and did not hear so stands for election in vain, again and again: it must not be asked for what
        // would tell a leader of such a vote.
        if net.replica(from).is_some_and(|own| !net.talks(&own, to)) {
            return Err(Lost::Unreachable("it is no member".into()));
        }
        if net.draw(|d| d.chance(CODED)) {
            let bytes = postcard::to_stdvec(&message).map_err(|e| Lost::Broken(e.to_string()))?;
            message = postcard::from_bytes(&bytes).map_err(|e| Lost::Broken(e.to_string()))?;
        }
        if let Some(again) = net.doubled() {
            let (net, message) = (net.clone(), message.clone());
            tokio::spawn(async move {
                sleep(again).await;
                net.deliver(from, message).await.ok();
            });
        }
        net.carry(from, to).await?;
        let reply = net.deliver(from, message).await?;
        net.carry(to, from).await?;
        Ok(reply)
    }
}
