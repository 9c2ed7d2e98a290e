//! One epoch's place in the ring: accept the previous stage, dial the next, then carry frames between links and the
//! compute thread.
use std::sync::Arc;

use capstan_proto::child::{FromChild, StageSpec, Wiring};
use capstan_proto::data::{DATA_VERSION, DataHello, MicroBatch};
use capstan_proto::limits;
use capstan_proto::{Epoch, RequestId, generate::GenerateRequest};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot};

use crate::link::{LinkError, LinkReceiver, LinkSender, Transport};

/// What reaches the compute thread, through its one queue.
pub(crate) enum Input {
    /// A new epoch begins: empty the KV cache, send to `out` (none for a single stage) from now on.
    Epoch { epoch: Epoch, out: Option<mpsc::Sender<Vec<u8>>>, done: oneshot::Sender<()> },
    /// A micro-batch from the previous stage. The permit bounds how many wait here.
    Batch { batch: MicroBatch, permit: OwnedSemaphorePermit },
    /// A link of this epoch broke.
    Lost { epoch: Epoch, reason: String },
    /// Driver: a request, rendered and tokenized.
    Submit { request: RequestId, body: Box<GenerateRequest>, tokens: Vec<i32> },
    /// Driver: forget a request.
    Cancel { request: RequestId },
    /// End the thread.
    Stop,
}

/// What the tasks of an epoch share.
#[derive(Clone)]
pub(crate) struct Wire {
    pub transport: Arc<dyn Transport>,
    pub spec: Arc<StageSpec>,
    pub inputs: mpsc::Sender<Input>,
    pub events: mpsc::Sender<FromChild>,
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
        let stages = self.spec.stages;
        let hello =
            |from_stage| DataHello { version: DATA_VERSION, deployment: self.spec.deployment, epoch, from_stage };
        let before = (self.spec.stage + stages - 1) % stages;
        let own = hello(self.spec.stage);
        let (receiver, sender) =
            tokio::try_join!(self.transport.accept(prev.key, hello(before)), self.transport.dial(&next, &own))?;
        let (out, frames) = mpsc::channel(limits::STAGE_QUEUE);
        self.begin(epoch, Some(out)).await?;
        tokio::select! {
            result = self.receive(receiver) => result,
            result = send(sender, frames) => result,
        }
    }

    async fn begin(&self, epoch: Epoch, out: Option<mpsc::Sender<Vec<u8>>>) -> Result<(), LinkError> {
        let (done, wait) = oneshot::channel();
        self.inputs.send(Input::Epoch { epoch, out, done }).await.map_err(|_| LinkError::Closed)?;
        wait.await.map_err(|_| LinkError::Broken("the compute thread could not begin the epoch".into()))?;
        self.events.send(FromChild::Connected { epoch }).await.map_err(|_| LinkError::Closed)
    }

    async fn receive(&self, mut link: Box<dyn LinkReceiver>) -> Result<(), LinkError> {
        let room = Arc::new(Semaphore::new(limits::STAGE_QUEUE));
        loop {
            // Room first, so that a peer that sends too much is held up by QUIC's flow control and not by our memory.
            let permit = room.clone().acquire_owned().await.map_err(|_| LinkError::Closed)?;
            let body = link.recv().await?;
            let batch = MicroBatch::decode(&body).map_err(|e| LinkError::Broken(e.to_string()))?;
            self.inputs.send(Input::Batch { batch, permit }).await.map_err(|_| LinkError::Closed)?;
        }
    }
}

async fn send(mut link: Box<dyn LinkSender>, mut frames: mpsc::Receiver<Vec<u8>>) -> Result<(), LinkError> {
    while let Some(frame) = frames.recv().await {
        link.send(&frame).await?;
    }
    Err(LinkError::Broken("this stage gave the epoch up".into()))
}
