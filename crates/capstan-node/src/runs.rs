//! One run of a stage after another: a new one first ends the one before, and waits for its memory.
//!
//! A coordinator that was cut off, or was started again, orders its stages anew before this node has noticed that the
//! old ones are orphans. The old run must not be counted against the new one.
use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use capstan_proto::control::StageCommand;
use capstan_proto::{DeploymentId, NodeId};
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;

use crate::machine::Reservation;
use crate::node::Shared;

/// How long the run before may take to end in order: a child is asked, then killed. Then its task is cut off.
const END_WAIT: Duration = Duration::from_secs(10);
/// How long a run waits for memory: what ended just now still gives it back, and unmapping a large model takes long.
/// Long enough, too, that a coordinator's retries never add up to a crash loop.
const MEMORY_WAIT: Duration = Duration::from_secs(20);
/// How often it looks whether there is enough.
const MEMORY_LOOK: Duration = Duration::from_millis(250);

/// Which stage: whose, of what, and which one.
pub(crate) type Place = (NodeId, DeploymentId, u16);

/// A coordinator's commands, and a way for a later run of the same stage to add the last one.
pub(crate) struct Orders {
    pub(crate) commands: mpsc::Receiver<StageCommand>,
    /// Weak, because the coordinator's end of the channel is what keeps the stage alive.
    pub(crate) sender: mpsc::WeakSender<StageCommand>,
}

struct Running {
    key: u64,
    sender: mpsc::WeakSender<StageCommand>,
    cut_off: CancellationToken,
    replaced: CancellationToken,
    over: CancellationToken,
}

/// The runs of this node.
#[derive(Default)]
pub(crate) struct Runs(Mutex<(u64, HashMap<Place, Running>)>);

/// A run's place in the table, given back when it is over.
pub(crate) struct Run<'a> {
    runs: &'a Runs,
    place: Place,
    key: u64,
    /// Cancelled when a later run cannot wait any longer.
    pub(crate) cut_off: CancellationToken,
    replaced: CancellationToken,
    over: CancellationToken,
}

/// The run before, which has been told to stop.
pub(crate) struct Before {
    cut_off: CancellationToken,
    over: CancellationToken,
}

impl Runs {
    fn table(&self) -> MutexGuard<'_, (u64, HashMap<Place, Running>)> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes the place and tells the run that had it to stop.
    pub(crate) fn enter(&self, place: Place, sender: mpsc::WeakSender<StageCommand>) -> (Run<'_>, Option<Before>) {
        let mut table = self.table();
        table.0 += 1;
        let key = table.0;
        let (cut_off, replaced, over) = Default::default();
        let run = Run { runs: self, place, key, cut_off, replaced, over };
        let Run { cut_off, replaced, over, .. } = &run;
        let (cut_off, replaced, over) = (cut_off.clone(), replaced.clone(), over.clone());
        let running = Running { key, sender, cut_off, replaced, over };
        let before = table.1.insert(place, running).map(|old| {
            if let Some(sender) = old.sender.upgrade() {
                // A queue that is full belongs to a run that hangs; it is cut off after a while.
                sender.try_send(StageCommand::Stop).ok();
            }
            old.replaced.cancel();
            Before { cut_off: old.cut_off, over: old.over }
        });
        (run, before)
    }
}

impl Run<'_> {
    /// Whether a later run takes its place.
    pub(crate) fn is_replaced(&self) -> bool {
        self.replaced.is_cancelled()
    }
}

impl Drop for Run<'_> {
    fn drop(&mut self) {
        self.over.cancel();
        let mut table = self.runs.table();
        if table.1.get(&self.place).is_some_and(|r| r.key == self.key) {
            table.1.remove(&self.place);
        }
    }
}

impl Before {
    /// Returns when it is over.
    pub(crate) async fn ended(self) {
        if timeout(END_WAIT, self.over.cancelled()).await.is_err() {
            self.cut_off.cancel();
            self.over.cancelled().await;
        }
    }
}

/// Waits for work, but not past an order to stop: then there is none. Other commands mean nothing before a stage has
/// its process.
pub(crate) async fn unless_stopped<T>(
    commands: &mut mpsc::Receiver<StageCommand>,
    work: impl Future<Output = T>,
) -> Option<T> {
    tokio::pin!(work);
    loop {
        tokio::select! {
            done = &mut work => return Some(done),
            command = commands.recv() => if matches!(command, Some(StageCommand::Stop) | None) { return None },
        }
    }
}

/// Sets memory aside for a stage, as soon as there is enough; the error is how many bytes are free after a while.
pub(crate) async fn reserve(shared: &Shared, bytes: u64) -> Result<Reservation, u64> {
    let until = Instant::now() + MEMORY_WAIT;
    loop {
        match shared.machine.reserve(bytes) {
            Err(_) if Instant::now() < until => sleep(MEMORY_LOOK).await,
            result => return result,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn orders() -> (mpsc::Sender<StageCommand>, Orders) {
        let (tx, commands) = mpsc::channel(1);
        let sender = tx.downgrade();
        (tx, Orders { commands, sender })
    }

    #[tokio::test]
    async fn a_new_run_stops_the_one_before_and_waits_for_its_end() {
        let runs = Runs::default();
        let place = (NodeId([1; 32]), DeploymentId(1), 0);
        let (_tx1, mut first) = orders();
        let (run1, before) = runs.enter(place, first.sender.clone());
        assert!(before.is_none());
        let (tx2, second) = orders();
        let (run2, before) = runs.enter(place, second.sender.clone());
        assert_eq!(first.commands.recv().await, Some(StageCommand::Stop));
        let before = before.expect("there was one");
        assert!(!before.over.is_cancelled());
        drop(run1);
        before.ended().await;

        // One that is stopped while it waits does not wait on.
        let (_tx3, third) = orders();
        let (_run3, before) = runs.enter(place, third.sender.clone());
        let mut commands = second.commands;
        assert_eq!(unless_stopped(&mut commands, std::future::pending::<()>()).await, None);
        drop((run2, tx2));
        before.expect("there was one").ended().await;
        // The later run keeps its place.
        assert!(runs.table().1.contains_key(&place));
    }
}
