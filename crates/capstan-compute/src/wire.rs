//! One epoch's place in the ring: accept the previous stage, dial the next, then carry frames and notices between links
//! and the compute thread.
//!
//! Micro-batches go through the compute thread, in order. Notices go past it: the task here marks the steps they name
//! and hands them on at once, up to the stage before the driver, which knows already what it said.
//!
//! ```text
//! previous ══ frames ══▶ queue ══▶ compute thread ══▶ queue ══ frames ══▶ next
//!          ── notices ─▶ marks ┄┄┄┄┄▲    └───────────▶ queue ── notices ─▶
//! ```
use std::sync::Arc;

use bytes::Bytes;
use capstan_proto::child::{FromChild, StageSpec, Wiring};
use capstan_proto::data::{BatchFrame, DATA_VERSION, DataHello, DropNotice};
use capstan_proto::limits;
use capstan_proto::{Epoch, RequestId, generate::GenerateRequest};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot};

use crate::counters::Counters;
use crate::drops::Drops;
use crate::link::{LaneReceiver, LaneSender, LinkError, Transport};

/// Notices that wait for the link. More wait only while nothing gets through, and then one that is left out costs
/// nothing but rows computed in vain.
const NOTICE_QUEUE: usize = 64;

/// What reaches the compute thread, through its one queue.
pub(crate) enum Input {
    /// A new epoch begins: empty the KV cache, and take and give micro-batches here from now on.
    Epoch { epoch: Epoch, links: Option<Links>, done: oneshot::Sender<()> },
    /// A micro-batch from the previous stage. The permit bounds how many wait here.
    Batch { frame: BatchFrame, permit: OwnedSemaphorePermit },
    /// A link of this epoch broke.
    Lost { epoch: Epoch, reason: String },
    /// Driver: a request, rendered and tokenized.
    Submit { request: RequestId, body: Box<GenerateRequest>, tokens: Vec<i32> },
    /// Driver: whether every stage keeps KV snapshots, from the next epoch on.
    Snapshots(bool),
    /// Driver: forget a request.
    Cancel { request: RequestId },
    /// End the thread.
    Stop,
}

/// An epoch's links as the compute thread sees them; a single stage has none.
pub(crate) struct Links {
    /// Micro-batch frames for the next stage.
    pub frames: mpsc::Sender<Bytes>,
    /// Driver: drop notices for the first stage.
    pub notices: mpsc::Sender<Bytes>,
    /// Other stages: which steps need not be computed.
    pub drops: Arc<Drops>,
}

/// What the tasks of an epoch share.
#[derive(Clone)]
pub(crate) struct Wire {
    pub transport: Arc<dyn Transport>,
    pub spec: Arc<StageSpec>,
    pub inputs: mpsc::Sender<Input>,
    pub events: mpsc::Sender<FromChild>,
    pub counters: Arc<Counters>,
}

impl Wire {
    /// Takes this place in the ring and serves it until a link breaks; the daemon hears `Connected` and at last `Lost`.
    /// Dropping the future lets the links go.
    pub async fn serve(self, wiring: Wiring) {
        let epoch = wiring.epoch;
        let reason = match self.serve_links(wiring).await {
            Ok(()) => return,
            Err(error) => error.to_string(),
        };
        // Both receivers outlive this task unless the process is ending, and then nobody needs the news.
        self.inputs.send(Input::Lost { epoch, reason: reason.clone() }).await.ok();
        self.events.send(FromChild::Lost { epoch, reason }).await.ok();
    }

    async fn serve_links(&self, wiring: Wiring) -> Result<(), LinkError> {
        let Wiring { epoch, prev, next } = wiring;
        let (Some(prev), Some(next)) = (prev, next) else {
            self.begin(epoch, None).await?;
            return Ok(());
        };
        let (stage, stages) = (self.spec.stage, self.spec.stages);
        let hello =
            |from_stage| DataHello { version: DATA_VERSION, deployment: self.spec.deployment, epoch, from_stage };
        let before = (stage + stages - 1) % stages;
        let own = hello(stage);
        let (incoming, outgoing) =
            tokio::try_join!(self.transport.accept(prev.key, hello(before)), self.transport.dial(&next, &own))?;
        let (frames, frames_out) = mpsc::channel(limits::STAGE_QUEUE);
        let (notices, notices_out) = mpsc::channel(NOTICE_QUEUE);
        let drops = Arc::new(Drops::default());
        // The stage before the driver does not hand notices on: it was the driver that said them.
        let hand_on = (stage + 2 < stages).then(|| notices.clone());
        self.begin(epoch, Some(Links { frames, notices, drops: drops.clone() })).await?;
        let notices_end = async {
            send(outgoing.notices, notices_out, &self.counters).await?;
            // Nobody has notices for the next stage; the frames say when the epoch is over.
            std::future::pending().await
        };
        let frames_end = async {
            send(outgoing.frames, frames_out, &self.counters).await?;
            Err(LinkError::Broken("this stage gave the epoch up".into()))
        };
        tokio::select! {
            result = self.receive(incoming.frames) => result,
            result = receive_notices(incoming.notices, epoch, &drops, hand_on) => result,
            result = frames_end => result,
            result = notices_end => result,
        }
    }

    async fn begin(&self, epoch: Epoch, links: Option<Links>) -> Result<(), LinkError> {
        let (done, wait) = oneshot::channel();
        self.inputs.send(Input::Epoch { epoch, links, done }).await.map_err(|_| LinkError::Closed)?;
        wait.await.map_err(|_| LinkError::Broken("the compute thread could not begin the epoch".into()))?;
        self.events.send(FromChild::Connected { epoch }).await.map_err(|_| LinkError::Closed)
    }

    async fn receive(&self, mut lane: Box<dyn LaneReceiver>) -> Result<(), LinkError> {
        let room = Arc::new(Semaphore::new(limits::STAGE_QUEUE));
        loop {
            // Room first, so that a peer that sends too much is held up by QUIC's flow control and not by our memory.
            let permit = room.clone().acquire_owned().await.map_err(|_| LinkError::Closed)?;
            let body = lane.recv().await?;
            let frame = BatchFrame::decode(&body).map_err(|e| LinkError::Broken(e.to_string()))?;
            self.inputs.send(Input::Batch { frame, permit }).await.map_err(|_| LinkError::Closed)?;
        }
    }
}

/// Marks what notices name, and hands them on.
async fn receive_notices(
    mut lane: Box<dyn LaneReceiver>,
    epoch: Epoch,
    drops: &Drops,
    hand_on: Option<mpsc::Sender<Bytes>>,
) -> Result<(), LinkError> {
    let broken = |m: String| LinkError::Broken(m);
    loop {
        let notice = DropNotice::decode(&lane.recv().await?).map_err(|e| broken(e.to_string()))?;
        if notice.epoch != epoch {
            return Err(broken(format!("a drop notice of epoch {} came in epoch {epoch}", notice.epoch)));
        }
        drops.mark(&notice.steps).map_err(|_| broken("more steps were dropped than can be under way".into()))?;
        if let Some(next) = &hand_on {
            let frame = notice.encode().map_err(|e| broken(e.to_string()))?;
            if next.try_send(frame.into()).is_err() {
                tracing::debug!("a drop notice found no room and is left out");
            }
        }
    }
}

/// Sends until nobody has anything to send any more.
async fn send(
    mut lane: Box<dyn LaneSender>,
    mut frames: mpsc::Receiver<Bytes>,
    counters: &Counters,
) -> Result<(), LinkError> {
    while let Some(frame) = frames.recv().await {
        let bytes = frame.len();
        lane.send(frame).await?;
        counters.add_sent(bytes);
    }
    Ok(())
}

#[cfg(test)]
mod tests;
