//! A coordinator's hold on one stage: commands in, events out, wherever the stage runs.
use std::sync::Arc;
use std::time::Duration;

use capstan_proto::child::Wiring;
use capstan_proto::control::{ADDRS_MAX, Request, StageCommand, StageEvent, StageOrder};
use capstan_proto::{NodeId, limits};
use iroh::endpoint::{RecvStream, SendStream, VarInt};
use tokio::sync::mpsc;
use tokio::time::timeout;

use crate::arrival::FileSource;
use crate::frames;
use crate::node::Shared;
use crate::runs::Orders;
use crate::stages::{STAGE_QUEUE, run_stage};

/// Stream code of a side that gives up.
const GONE: VarInt = VarInt::from_u32(1);

/// How long what the cluster has agreed on may take to come here.
const LOG_LAG: Duration = Duration::from_secs(2);

/// What happens to a stage, as its coordinator sees it.
pub(crate) enum SessionEvent {
    /// It says so itself.
    Stage(StageEvent),
    /// Its node cannot be reached, or not any more. The last event.
    Away(String),
}

/// A stage's command side and event side. Dropping the commands ends the stage.
pub(crate) struct Session {
    pub(crate) commands: mpsc::Sender<StageCommand>,
    pub(crate) events: mpsc::Receiver<SessionEvent>,
}

/// Runs a stage on this node.
pub(crate) fn open_local(shared: &Arc<Shared>, order: StageOrder, files: FileSource) -> Session {
    let (commands, command_rx) = mpsc::channel(STAGE_QUEUE);
    let (stage_tx, mut stage_rx) = mpsc::channel(STAGE_QUEUE);
    let (event_tx, events) = mpsc::channel(STAGE_QUEUE);
    let orders = Orders { commands: command_rx, sender: commands.downgrade() };
    tokio::spawn(run_stage(shared.clone(), order, files, orders, stage_tx));
    tokio::spawn(async move {
        while let Some(event) = stage_rx.recv().await {
            if event_tx.send(SessionEvent::Stage(event)).await.is_err() {
                return;
            }
        }
    });
    Session { commands, events }
}

/// Asks another node to run a stage.
pub(crate) fn open_remote(shared: &Arc<Shared>, node: NodeId, order: StageOrder) -> Session {
    let (commands, command_rx) = mpsc::channel(STAGE_QUEUE);
    let (event_tx, events) = mpsc::channel(STAGE_QUEUE);
    let shared = shared.clone();
    tokio::spawn(async move {
        let away = match shared.client.open(node, &Request::Stage(Box::new(order))).await {
            Ok((send, recv)) => {
                let writer = tokio::spawn(write_commands(send, command_rx));
                let away = read_events(recv, &event_tx).await;
                writer.abort();
                away
            }
            Err(error) => Some(error.to_string()),
        };
        if let Some(reason) = away {
            event_tx.send(SessionEvent::Away(reason)).await.ok();
        }
    });
    Session { commands, events }
}

async fn write_commands(mut send: SendStream, mut commands: mpsc::Receiver<StageCommand>) {
    while let Some(command) = commands.recv().await {
        if frames::write(&mut send, &command, limits::MESSAGE_BYTES_MAX).await.is_err() {
            return; // The reading side says why.
        }
    }
    // The end of the stream ends the stage.
    send.finish().ok();
    send.stopped().await.ok();
}

/// Reads until the stage's last event; else gives why its node is away.
async fn read_events(mut recv: RecvStream, events: &mpsc::Sender<SessionEvent>) -> Option<String> {
    loop {
        let event = match frames::read::<StageEvent>(&mut recv, limits::MESSAGE_BYTES_MAX).await {
            Ok(Some(event)) => event,
            Ok(None) => return Some("its node ended the conversation".into()),
            Err(error) => return Some(error.to_string()),
        };
        if let StageEvent::Loaded { addr, .. } = &event
            && addr.addrs.len() > ADDRS_MAX
        {
            return Some("its node sent an oversized address list".into());
        }
        let last = matches!(event, StageEvent::Ended { .. });
        if events.send(SessionEvent::Stage(event)).await.is_err() || last {
            return None;
        }
    }
}

/// Serves a stage to a coordinator on another node, for as long as its stream lasts.
pub(crate) async fn serve(
    shared: Arc<Shared>,
    coordinator: NodeId,
    order: StageOrder,
    mut send: SendStream,
    mut recv: RecvStream,
) {
    let (commands, command_rx) = mpsc::channel(STAGE_QUEUE);
    let (event_tx, mut events) = mpsc::channel(STAGE_QUEUE);
    let orders = Orders { commands: command_rx, sender: commands.downgrade() };
    let (membership, deployment) = (shared.membership.clone(), order.spec.deployment);
    // Who has just taken the deployment over may be quicker than the log.
    if timeout(LOG_LAG, membership.counts(deployment, coordinator)).await.is_err() {
        let reason = "was refused because another node looks after the model now".to_owned();
        frames::write(&mut send, &StageEvent::Ended { reason }, limits::MESSAGE_BYTES_MAX).await.ok();
        send.finish().ok();
        return;
    }
    tokio::spawn(run_stage(shared, order, FileSource::There(coordinator), orders, event_tx));
    let reader = tokio::spawn(async move {
        let read = async {
            while let Ok(Some(command)) = frames::read(&mut recv, limits::MESSAGE_BYTES_MAX).await {
                if let StageCommand::Connect(Wiring { epoch, .. }) = &command
                    && membership.is_over(deployment, *epoch)
                {
                    tracing::warn!(%deployment, epoch = epoch.0, "an epoch that is over was refused");
                    return;
                }
                if commands.send(command).await.is_err() {
                    return;
                }
            }
        };
        // Whatever ends this drops `commands`, which ends the stage.
        tokio::select! {
            () = read => {}
            () = membership.overruled(deployment, coordinator) => {
                tracing::warn!(%deployment, "a coordinator was overruled, its stage ends");
            }
        }
    });
    while let Some(event) = events.recv().await {
        if let Err(error) = frames::write(&mut send, &event, limits::MESSAGE_BYTES_MAX).await {
            tracing::debug!(%error, "a coordinator is gone, its stage ends");
            send.reset(GONE).ok();
            break;
        }
    }
    send.finish().ok();
    reader.abort();
}
