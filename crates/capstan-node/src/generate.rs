//! A request's way: find the deployment, hand it to the driver's node, bring the events back. When a stage is lost, the
//! answer waits until the stages stand again and goes on where it stopped.
//!
//! The log of a request's tokens ([`Transcript`]) is held here, in the daemon that took the call, and not in the child: a
//! crash of the child, or of the driver's whole node, loses none of it.
use std::sync::Arc;
use std::time::Duration;

use capstan_proto::control::{GenerateReply, Request};
use capstan_proto::generate::{ErrorKind, GenerateEvent, GenerateRequest, RequestError};
use capstan_proto::manage::{DeploymentStatus, Health};
use capstan_proto::{DeploymentId, NodeId, limits};
use iroh::endpoint::{RecvStream, SendStream, VarInt};
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep, timeout};

use crate::control_client::CALL_TIMEOUT;
use crate::frames;
use crate::node::Shared;
use crate::requests::{EventStream, is_last};
use crate::transcript::Transcript;

/// Stream code of a cancelled request.
const CANCELLED: VarInt = VarInt::from_u32(2);
/// How long a new request waits for a majority: two elections.
const MAJORITY_WAIT: Duration = Duration::from_secs(6);
/// How often a request that waits looks whether its model answers again.
const LOOK: Duration = Duration::from_millis(50);

/// Where a request's events come from.
enum Source {
    Here(EventStream),
    There { send: SendStream, recv: RecvStream, driver: NodeId, node: String },
}

impl Source {
    /// The next event; the last is always [`GenerateEvent::Finished`] or [`GenerateEvent::Failed`].
    async fn recv(&mut self) -> Option<GenerateEvent> {
        match self {
            Self::Here(stream) => stream.recv().await,
            Self::There { recv, node, .. } => {
                let lost = |reason: String| {
                    GenerateEvent::Failed(RequestError::new(
                        ErrorKind::StageLost,
                        format!("node {node}, which makes the answer, was lost ({reason}); try again in a moment"),
                    ))
                };
                Some(match frames::read(recv, limits::MESSAGE_BYTES_MAX).await {
                    Ok(Some(event)) => event,
                    Ok(None) => lost("it ended the conversation".into()),
                    Err(error) => lost(error.to_string()),
                })
            }
        }
    }

    /// The node whose word is waited for, if it is another.
    fn driver(&self) -> Option<NodeId> {
        match self {
            Self::Here(_) => None,
            Self::There { driver, .. } => Some(*driver),
        }
    }

    /// The client is gone, or goes elsewhere.
    fn cancel(self) {
        if let Self::There { mut send, mut recv, .. } = self {
            // Both fail only when the other side has ended the stream, which is what is wanted.
            send.reset(CANCELLED).ok();
            recv.stop(CANCELLED).ok();
        }
    }
}

/// Starts an answer. Dropping the receiver cancels it.
pub(crate) async fn generate(
    shared: &Arc<Shared>,
    request: GenerateRequest,
) -> Result<mpsc::Receiver<GenerateEvent>, RequestError> {
    request.check()?;
    if shared.draining.is_cancelled() {
        let message = "this node is being stopped; ask another node, or this one again when it is back";
        return Err(RequestError::new(ErrorKind::Unavailable, message));
    }
    let mut call = Call { shared: shared.clone(), transcript: Transcript::new(request) };
    // What is wrong with the request itself is said before anything is sent.
    let first = match call.attempt().await {
        Ok(source) => Ok(source),
        Err(refusal) if refusal.worth_waiting(&call.transcript) => Err(refusal.error),
        Err(refusal) => return Err(refusal.error),
    };
    let (events, receiver) = mpsc::channel(limits::EVENT_QUEUE);
    shared.calls.spawn(call.run(first, events));
    Ok(receiver)
}

/// Why an attempt did not begin.
struct Refusal {
    error: RequestError,
    /// The model is being mended, which ends by itself.
    mending: bool,
}

impl From<RequestError> for Refusal {
    fn from(error: RequestError) -> Self {
        Self { mending: false, error }
    }
}

impl Refusal {
    /// Whether the model will answer again without anybody's doing. A request that had begun waits for more than one
    /// that is new: its place in the queue was granted already.
    fn worth_waiting(&self, transcript: &Transcript) -> bool {
        let lost = matches!(self.error.kind, ErrorKind::Unavailable | ErrorKind::StageLost);
        self.mending || transcript.begun() && (lost || self.error.kind == ErrorKind::Busy)
    }
}

/// One request while it is being answered.
struct Call {
    shared: Arc<Shared>,
    transcript: Transcript,
}

impl Call {
    /// Waits a moment, as an election takes, until this node knows what counts. Without a majority another node may
    /// answer for the same model, so this one does not.
    async fn may_serve(&self) -> Result<(), RequestError> {
        let until = Instant::now() + MAJORITY_WAIT;
        while let Some(why) = self.shared.membership.why_silent() {
            if Instant::now() > until {
                return Err(RequestError::new(ErrorKind::Unavailable, why));
            }
            sleep(LOOK).await;
        }
        Ok(())
    }

    /// Hands the request, as far as it has come, to the driver that is there now.
    async fn attempt(&mut self) -> Result<Source, Refusal> {
        let shared = &self.shared;
        self.may_serve().await?;
        let deployment = find(shared, self.transcript.model())?;
        let driver = deployment.stages.last().map(|s| s.node).ok_or_else(|| {
            RequestError::new(ErrorKind::Internal, "the deployment has no stages; load the model again")
        })?;
        let body = Box::new(self.transcript.request());
        let source = if driver == shared.id {
            shared.stages.submit(deployment.id, body).await.map(Source::Here)
        } else {
            there(shared, deployment.id, driver, body).await
        };
        // The news that a stage is lost may not have come this far yet; the driver's own word counts.
        let source = source.map_err(|error| Refusal { mending: error.kind == ErrorKind::Unavailable, error })?;
        self.transcript.taken();
        Ok(source)
    }

    /// Brings events to the client until the answer is complete. Only this request waits for it.
    async fn run(mut self, first: Result<Source, RequestError>, events: mpsc::Sender<GenerateEvent>) {
        let mut next = first;
        let last = loop {
            let trouble = match next {
                Ok(source) => match self.forward(source, &events).await {
                    Some(error) => error,
                    None => return,
                },
                Err(error) => error,
            };
            if !self.transcript.may_go_on() {
                break trouble;
            }
            let stop = self.shared.stop.clone();
            let because = trouble.clone();
            let resumed = tokio::select! {
                resumed = self.resume(trouble, &events) => resumed,
                () = events.closed() => return,
                () = stop.cancelled() => Err(because),
            };
            match resumed {
                Ok(source) => next = Ok(source),
                Err(error) => break error,
            }
        };
        tracing::warn!(model = self.transcript.model(), error = %last, "a request failed");
        events.send(GenerateEvent::Failed(last)).await.ok();
    }

    /// Forwards one attempt's events. An error is worth another attempt; none means that the client has its last event,
    /// or is gone.
    async fn forward(&mut self, mut source: Source, events: &mpsc::Sender<GenerateEvent>) -> Option<RequestError> {
        let (shared, driver) = (self.shared.clone(), source.driver());
        let silent = fell_silent(&shared, driver);
        tokio::pin!(silent);
        loop {
            let event = tokio::select! {
                event = source.recv() => event,
                () = events.closed() => None,
                // A machine that is gone says nothing; its connection would tell some seconds later.
                node = &mut silent => {
                    source.cancel();
                    let message = format!("node {node}, which makes the answer, does not answer any more");
                    return Some(RequestError::new(ErrorKind::StageLost, message));
                }
            };
            let event = match event {
                Some(GenerateEvent::Failed(error))
                    if matches!(error.kind, ErrorKind::StageLost | ErrorKind::Unavailable) =>
                {
                    return Some(error);
                }
                // Others were quicker to come back; its turn comes.
                Some(GenerateEvent::Failed(error)) if error.kind == ErrorKind::Busy && self.transcript.resumed() => {
                    self.transcript.sent_back();
                    return Some(error);
                }
                Some(event) => self.transcript.note(event),
                None => break,
            };
            let last = is_last(&event);
            if events.send(event).await.is_err() || last {
                break;
            }
        }
        tracing::debug!(model = self.transcript.model(), tokens = self.transcript.len(), "a request ended");
        source.cancel();
        None
    }

    /// Waits until the model answers again and hands the rest of the request to it.
    async fn resume(
        &mut self,
        trouble: RequestError,
        events: &mpsc::Sender<GenerateEvent>,
    ) -> Result<Source, RequestError> {
        let until = Instant::now() + self.shared.config.resume_limit;
        let reason = trouble.message.clone();
        tracing::info!(model = self.transcript.model(), tokens = self.transcript.len(), reason, "a request waits");
        // A client that reads slowly learns of the pause when it is over.
        events.try_send(GenerateEvent::Paused { reason }).ok();
        let mut last = trouble;
        loop {
            match self.attempt().await {
                Ok(source) => return Ok(source),
                Err(refusal) if refusal.worth_waiting(&self.transcript) => last = refusal.error,
                // It was unloaded: that is why it stopped, and what is loaded now does not matter.
                Err(refusal) if refusal.error.kind == ErrorKind::ModelNotFound => return Err(last),
                Err(refusal) => return Err(refusal.error),
            }
            if Instant::now() > until {
                let waited = self.shared.config.resume_limit.as_secs();
                let message = format!("the answer waited {waited} s for the model to come back: {}", last.message);
                return Err(RequestError::new(last.kind, message));
            }
            sleep(LOOK).await;
        }
    }
}

/// Returns when the node that makes the answer does not answer others any more.
async fn fell_silent(shared: &Shared, driver: Option<NodeId>) -> String {
    let Some(driver) = driver else { return std::future::pending().await };
    while shared.membership.online(driver) {
        sleep(LOOK).await;
    }
    shared.membership.name_of(driver)
}

/// The deployment by this name that can answer, or why none can.
fn find(shared: &Shared, name: &str) -> Result<DeploymentStatus, Refusal> {
    let all = shared.all_deployments();
    let Some(found) =
        all.iter().filter(|d| d.name == name).min_by_key(|d| (d.health != Health::Ready, d.created_unix_s))
    else {
        let mut names: Vec<_> = all.iter().map(|d| format!("{:?}", d.name)).collect();
        names.sort();
        names.dedup();
        let have = if names.is_empty() {
            "no model is loaded; load one with `capstan load`".to_owned()
        } else {
            format!("loaded are {}", names.join(", "))
        };
        return Err(RequestError::new(
            ErrorKind::ModelNotFound,
            format!("there is no model {:?}; {have}", name.chars().take(100).collect::<String>()),
        )
        .into());
    };
    let unavailable =
        |mending, why: String| Err(Refusal { mending, error: RequestError::new(ErrorKind::Unavailable, why) });
    if !shared.membership.online(found.coordinator) {
        let node = shared.membership.name_of(found.coordinator);
        return unavailable(
            true,
            format!("the model {name:?} is looked after by node {node}, which does not answer; start it again"),
        );
    }
    match found.health {
        Health::Ready => Ok(found.clone()),
        Health::Loading => {
            unavailable(false, format!("the model {name:?} is still being loaded; try again in a moment"))
        }
        Health::Recovering => {
            unavailable(true, format!("the model {name:?} is recovering ({}); try again in a moment", found.detail))
        }
        // Only a person can mend that, so nobody waits for it.
        Health::Failed => Err(RequestError::new(
            ErrorKind::Internal,
            format!("the model {name:?} has failed ({}); unload it and load it again", found.detail),
        )
        .into()),
    }
}

async fn there(
    shared: &Shared,
    deployment: DeploymentId,
    driver: NodeId,
    body: Box<GenerateRequest>,
) -> Result<Source, RequestError> {
    let node = shared.membership.name_of(driver);
    let away = |why: String| RequestError::new(ErrorKind::Unavailable, format!("{why}; try again in a moment"));
    let (send, mut recv) =
        shared.client.open(driver, &Request::Generate { deployment, body }).await.map_err(|e| away(e.to_string()))?;
    let reply = timeout(CALL_TIMEOUT, frames::expect::<GenerateReply>(&mut recv, limits::MESSAGE_BYTES_MAX)).await;
    match reply {
        Ok(Ok(GenerateReply::Accepted)) => Ok(Source::There { send, recv, driver, node }),
        Ok(Ok(GenerateReply::Refused(error))) => Err(error),
        Ok(Err(error)) => Err(away(format!("node {node} did not take the request: {error}"))),
        Err(_) => Err(away(format!("node {node} did not answer within {} s", CALL_TIMEOUT.as_secs()))),
    }
}

/// Serves a request that another node's daemon hands to the driver here.
pub(crate) async fn serve(
    shared: Arc<Shared>,
    deployment: DeploymentId,
    body: Box<GenerateRequest>,
    mut send: SendStream,
    mut recv: RecvStream,
) -> Result<(), frames::FrameError> {
    let started = match body.check() {
        Ok(()) => shared.stages.submit(deployment, body).await,
        Err(error) => Err(error),
    };
    let mut stream = match started {
        Ok(stream) => stream,
        Err(error) => {
            frames::write(&mut send, &GenerateReply::Refused(error), limits::MESSAGE_BYTES_MAX).await?;
            send.finish().ok();
            return Ok(());
        }
    };
    frames::write(&mut send, &GenerateReply::Accepted, limits::MESSAGE_BYTES_MAX).await?;
    let mut byte = [0];
    loop {
        tokio::select! {
            event = stream.recv() => {
                let Some(event) = event else { break };
                frames::write(&mut send, &event, limits::MESSAGE_BYTES_MAX).await?;
            }
            // The client's side says nothing more; whatever comes is its end. Leaving drops the stream and cancels.
            _ = recv.read(&mut byte) => return Ok(()),
        }
    }
    send.finish().ok();
    // Waiting lets the last event arrive before the stream's handle goes.
    send.stopped().await.ok();
    Ok(())
}
