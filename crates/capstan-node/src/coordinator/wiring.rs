//! A placement gets its epoch from the cluster, and its stages their places in the ring.
use capstan_cluster::Seat;
use capstan_proto::Epoch;
use capstan_proto::child::Wiring;
use capstan_proto::control::StageCommand;
use tokio::time::Instant;

use super::{AWAY_RETRY, Coordinator, Message, WIRE_TIMEOUT};
use crate::agreement::{self, NotPlaced};
use crate::saved::Saved;

impl Coordinator {
    /// Asks the cluster for the next epoch: only a placement that it has agreed on gets one.
    pub(super) fn wire(&mut self) {
        if std::mem::replace(&mut self.placing, true) {
            return;
        }
        let seats = self.stages.iter().map(|s| Seat { node: s.plan.node, layers: s.plan.layers }).collect();
        let (shared, outbox, id, epoch) = (self.shared.clone(), self.outbox.clone(), self.blueprint.id, self.epoch);
        let (layout, recipe) = (self.displacing.layout, Saved::recipe(&self.blueprint));
        tokio::spawn(async move {
            let placed = agreement::place(&shared, id, epoch, seats, recipe).await;
            outbox.send(Message::Placed(layout, placed)).await.ok();
        });
    }

    pub(super) fn placed(&mut self, layout: u64, placed: Result<Epoch, NotPlaced>) -> Result<(), String> {
        self.placing = false;
        if layout != self.displacing.layout {
            // The layers have gone elsewhere since it was asked for; the next epoch follows on this one.
            self.epoch = placed.ok().unwrap_or(self.epoch);
            if self.stages.iter().all(|s| s.loaded.is_some()) {
                self.wire();
            }
            return Ok(());
        }
        match placed {
            Ok(epoch) => {
                self.epoch = epoch;
                // A stage that went away meanwhile asks for another epoch when it is back.
                if self.stages.iter().all(|s| s.loaded.is_some()) {
                    self.connect();
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
    fn connect(&mut self) {
        self.mending = false;
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
