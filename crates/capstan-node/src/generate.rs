//! A request's way: find the deployment, hand it to the driver's node, bring the events back.
//!
//! The log of a request's tokens is held here, in the daemon that took the call, and not in the child: a crash of the
//! child loses none of it.
use std::sync::Arc;

use capstan_proto::control::{GenerateReply, Request};
use capstan_proto::generate::{ErrorKind, GenerateEvent, GenerateRequest, RequestError};
use capstan_proto::manage::{DeploymentStatus, Health};
use capstan_proto::{DeploymentId, NodeId, limits};
use iroh::endpoint::{RecvStream, SendStream, VarInt};
use tokio::sync::mpsc;
use tokio::time::timeout;

use crate::control_client::CALL_TIMEOUT;
use crate::frames;
use crate::node::Shared;
use crate::requests::{EventStream, is_last};

/// Stream code of a cancelled request.
const CANCELLED: VarInt = VarInt::from_u32(2);

/// Where a request's events come from.
enum Source {
    Here(EventStream),
    There { send: SendStream, recv: RecvStream, node: String },
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

    /// The client is gone.
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
    let deployment = find(shared, &request.model)?;
    let driver =
        deployment.stages.last().map(|s| s.node).ok_or_else(|| {
            RequestError::new(ErrorKind::Internal, "the deployment has no stages; load the model again")
        })?;
    let body = Box::new(request);
    let source = if driver == shared.id {
        Source::Here(shared.stages.submit(deployment.id, body).await?)
    } else {
        there(shared, deployment.id, driver, body).await?
    };
    let (events, receiver) = mpsc::channel(limits::EVENT_QUEUE);
    tokio::spawn(forward(source, events, deployment.name));
    Ok(receiver)
}

/// The deployment by this name that can answer, or why none can.
fn find(shared: &Shared, name: &str) -> Result<DeploymentStatus, RequestError> {
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
        ));
    };
    let unavailable = |why: String| Err(RequestError::new(ErrorKind::Unavailable, why));
    if !shared.membership.online(found.coordinator) {
        let node = shared.membership.name_of(found.coordinator);
        return unavailable(format!(
            "the model {name:?} is looked after by node {node}, which does not answer; start it again"
        ));
    }
    match found.health {
        Health::Ready => Ok(found.clone()),
        Health::Loading => unavailable(format!("the model {name:?} is still being loaded; try again in a moment")),
        Health::Recovering => {
            unavailable(format!("the model {name:?} is recovering ({}); try again in a moment", found.detail))
        }
        Health::Failed => {
            unavailable(format!("the model {name:?} has failed ({}); unload it and load it again", found.detail))
        }
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
        Ok(Ok(GenerateReply::Accepted)) => Ok(Source::There { send, recv, node }),
        Ok(Ok(GenerateReply::Refused(error))) => Err(error),
        Ok(Err(error)) => Err(away(format!("node {node} did not take the request: {error}"))),
        Err(_) => Err(away(format!("node {node} did not answer within {} s", CALL_TIMEOUT.as_secs()))),
    }
}

/// Brings events to the client. Only this request waits for it.
async fn forward(mut source: Source, events: mpsc::Sender<GenerateEvent>, model: String) {
    let mut tokens: Vec<i32> = Vec::new();
    loop {
        let event = tokio::select! {
            event = source.recv() => event,
            () = events.closed() => None,
        };
        let Some(event) = event else { break };
        if let GenerateEvent::Token { token, .. } = &event {
            tokens.push(*token);
        }
        if let GenerateEvent::Failed(error) = &event {
            tracing::warn!(model, tokens = tokens.len(), %error, "a request failed");
        }
        let last = is_last(&event);
        if events.send(event).await.is_err() || last {
            break;
        }
    }
    tracing::debug!(model, tokens = tokens.len(), "a request ended");
    source.cancel();
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
