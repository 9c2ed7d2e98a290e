//! A placement gets its epoch from the cluster, and its stages their places in the ring.
use std::collections::BTreeSet;

use capstan_cluster::Seat;
use capstan_proto::child::Wiring;
use capstan_proto::control::{SNAPSHOTS_SINCE, StageCommand};
use capstan_proto::{Epoch, NodeId};
use tokio::time::Instant;

use super::{AWAY_RETRY, Coordinator, Message, WIRE_TIMEOUT};
use crate::agreement::{self, NotPlaced};
use crate::node::Shared;
use crate::saved::Saved;

/// A placement that the cluster has agreed on.
pub(crate) struct Agreed {
    epoch: Epoch,
    /// Every stage keeps KV snapshots.
    all_keep: bool,
}

/// Whether the builds of all these nodes keep KV snapshots. One that does not know what they are would break the ring.
async fn all_keep_snapshots(shared: &Shared, seats: &[Seat]) -> bool {
    let nodes: BTreeSet<NodeId> = seats.iter().map(|seat| seat.node).filter(|node| *node != shared.id).collect();
    for node in nodes {
        if shared.client.agreed(node).await.is_ok_and(|version| version >= SNAPSHOTS_SINCE) {
            continue;
        }
        return false;
    }
    shared.config.speaks.max >= SNAPSHOTS_SINCE
}

impl Coordinator {
    /// Asks the cluster for the next epoch: only a placement that it has agreed on gets one.
    pub(super) fn wire(&mut self) {
        if std::mem::replace(&mut self.placing, true) {
            return;
        }
        let seats: Vec<Seat> = self.stages.iter().map(|s| Seat { node: s.plan.node, layers: s.plan.layers }).collect();
        let (shared, outbox, id, epoch) = (self.shared.clone(), self.outbox.clone(), self.blueprint.id, self.epoch);
        let (layout, recipe) = (self.displacing.layout, Saved::recipe(&self.blueprint));
        tokio::spawn(async move {
            let all_keep = all_keep_snapshots(&shared, &seats).await;
            let placed = agreement::place(&shared, id, epoch, seats, recipe).await;
            let placed = placed.map(|epoch| Agreed { epoch, all_keep });
            outbox.send(Message::Placed(layout, placed)).await.ok();
        });
    }

    pub(super) fn placed(&mut self, layout: u64, placed: Result<Agreed, NotPlaced>) -> Result<(), String> {
        self.placing = false;
        if layout != self.displacing.layout {
            // The layers have gone elsewhere since it was asked for; the next epoch follows on this one.
            self.epoch = placed.map_or(self.epoch, |agreed| agreed.epoch);
            if self.stages.iter().all(|s| s.loaded.is_some()) {
                self.wire();
            }
            return Ok(());
        }
        match placed {
            Ok(Agreed { epoch, all_keep }) => {
                self.epoch = epoch;
                // A stage that went away meanwhile asks for another epoch when it is back.
                if self.stages.iter().all(|s| s.loaded.is_some()) {
                    self.connect(all_keep);
                }
                Ok(())
            }
            Err(NotPlaced::ForNow(why)) if !self.initial => {
                self.trouble(why);
                self.rewire_at = Some(Instant::now() + AWAY_RETRY);
                Ok(())
            }
            Err(NotPlaced::ForNow(why) | NotPlaced::ForGood(why)) => Err(why),
        }
    }

    /// Gives every stage its place in the ring, under the new epoch.
    fn connect(&mut self, all_keep: bool) {
        self.mending = false;
        if let Some(driver) = self.stages.last().and_then(|s| s.commands.as_ref()).filter(|_| all_keep) {
            driver.try_send(StageCommand::Snapshots(true)).ok();
        }
        let n = self.stages.len();
        let addr = |i: usize| (n > 1).then(|| self.stages[i % n].loaded.as_ref().map(|(a, _)| a.clone())).flatten();
        let wirings: Vec<_> =
            (0..n).map(|i| Wiring { epoch: self.epoch, prev: addr(i + n - 1), next: addr(i + 1) }).collect();
        for (stage, wiring) in self.stages.iter_mut().zip(wirings) {
            stage.connected = false;
            stage.silent_since.get_or_insert_with(Instant::now);
            if let Some(commands) = &stage.commands {
                commands.try_send(StageCommand::Connect(wiring)).ok();
            }
        }
        self.rewire_at = Some(Instant::now() + WIRE_TIMEOUT);
        self.publish();
    }
}
