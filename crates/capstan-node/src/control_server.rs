//! Answers other nodes: members on the control protocol, strangers with a ticket on the join protocol.
use std::sync::{Arc, Weak};
use std::time::Duration;

use capstan_proto::control::{
    self, CLOSE_NOT_A_MEMBER, CLOSE_NOT_YET, CLOSE_PROTOCOL, CLOSE_REMOVED, Done, DrainReply, Hello, Join, JoinReply,
    MEASURE_BYTES, Request, StageOrder, UnloadReply, clip,
};
use capstan_proto::limits::{DECODE_SLOWDOWN_PERCENT_MAX, DECODE_SLOWDOWN_PERCENT_MIN};
use capstan_proto::manage::ManageError;
use capstan_proto::{NodeId, limits};
use iroh::endpoint::{Connection, RecvStream, SendStream, VarInt};
use iroh::protocol::{AcceptError, ProtocolHandler};
use tokio::sync::Semaphore;
use tokio::time::timeout;

use crate::endpoint::node_id;
use crate::frames::{self, FrameError};
use crate::membership::{Admitted, not_made};
use crate::node::Shared;
use crate::raft_link::REMOVED;
use crate::{assembling, generate, moving, session};

/// How long a peer may take for its hello, and a stranger for its request to join.
pub(crate) const HELLO_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a member may take to measure a link.
const MEASURE_TIMEOUT: Duration = Duration::from_secs(20);
/// Strangers served at once: joining takes milliseconds, and guessing a 128-bit secret must not take the machine.
const STRANGERS_MAX: usize = 8;
/// Close code of a connection that has done its work.
const CLOSE_DONE: u32 = 0;

/// The control protocol.
pub(crate) struct ControlProtocol(pub(crate) Weak<Shared>);

/// The join protocol.
pub(crate) struct JoinProtocol {
    shared: Weak<Shared>,
    turns: Semaphore,
}

impl JoinProtocol {
    pub(crate) fn new(shared: Weak<Shared>) -> Self {
        Self { shared, turns: Semaphore::new(STRANGERS_MAX) }
    }
}

impl std::fmt::Debug for ControlProtocol {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("ControlProtocol")
    }
}

impl std::fmt::Debug for JoinProtocol {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("JoinProtocol")
    }
}

pub(crate) fn close(connection: &Connection, code: u32, reason: &str) {
    connection.close(VarInt::from_u32(code), reason.as_bytes());
}

/// Answers the other side's hello and gives the version that both speak; a connection without one is closed with a
/// sentence.
pub(crate) async fn hello(connection: &Connection, ours: &Hello) -> Result<u32, String> {
    let exchange = async {
        let (mut send, mut recv) = connection.accept_bi().await.map_err(|e| e.to_string())?;
        let theirs: Hello = frames::expect(&mut recv, control::HELLO_BYTES_MAX).await.map_err(|e| e.to_string())?;
        frames::write(&mut send, ours, control::HELLO_BYTES_MAX).await.map_err(|e| e.to_string())?;
        send.finish().ok();
        let agreed = ours.agree(&theirs).map_err(|e| e.to_string());
        if agreed.is_err() {
            // Closing at once would overtake our hello, and the other side could not say what to upgrade.
            timeout(Duration::from_secs(1), connection.closed()).await.ok();
        }
        agreed
    };
    let result: Result<u32, String> =
        timeout(HELLO_TIMEOUT, exchange).await.unwrap_or_else(|_| Err("no hello came in time".into()));
    if let Err(reason) = &result {
        close(connection, CLOSE_PROTOCOL, reason);
    }
    result
}

impl ProtocolHandler for ControlProtocol {
    async fn accept(&self, connection: Connection) -> Result<(), AcceptError> {
        let Some(shared) = self.0.upgrade() else { return Ok(()) };
        let from = node_id(connection.remote_id());
        if shared.membership.is_removed(from) {
            tracing::info!(node = %from.short(), "a node that was removed was refused");
            close(&connection, CLOSE_REMOVED, REMOVED);
            return Ok(());
        }
        if !shared.membership.is_current() {
            const WHY: &str = "it has just started and asks the others who is in the cluster now";
            close(&connection, CLOSE_NOT_YET, WHY);
            return Ok(());
        }
        if !shared.membership.is_member(from) {
            tracing::info!(node = %from.short(), "a node that is no member was refused");
            close(
                &connection,
                CLOSE_NOT_A_MEMBER,
                "it does not have this node in its member list; join its cluster with a ticket from it",
            );
            return Ok(());
        }
        let id = shared.connections.add(from, &connection);
        match hello(&connection, &shared.config.speaks).await {
            Err(reason) => tracing::debug!(node = %from.short(), reason, "a connection ended at its hello"),
            Ok(agreed) => {
                while let Ok((send, recv)) = connection.accept_bi().await {
                    // Membership may have ended since the last stream.
                    if !shared.membership.is_member(from) {
                        close(&connection, CLOSE_NOT_A_MEMBER, "this node has left the cluster");
                        break;
                    }
                    let shared = shared.clone();
                    tokio::spawn(async move {
                        if let Err(error) = serve(shared, from, agreed, send, recv).await {
                            tracing::debug!(node = %from.short(), %error, "a request ended early");
                        }
                    });
                }
            }
        }
        shared.connections.remove(from, id);
        Ok(())
    }
}

/// Serves one request of a member.
async fn serve(
    shared: Arc<Shared>,
    from: NodeId,
    agreed: u32,
    mut send: SendStream,
    mut recv: RecvStream,
) -> Result<(), FrameError> {
    let read = frames::expect_kind::<Request>(&mut recv, limits::MESSAGE_BYTES_MAX, Request::KINDS);
    let read = timeout(HELLO_TIMEOUT, read).await;
    let request: Request = match read.unwrap_or_else(|_| Err(FrameError::Stream("no request came in time".into()))) {
        Ok(request) if request.since() > agreed => {
            frames::refuse(&mut send, &mut recv, &FrameError::NotUnderstood);
            return Err(FrameError::NotUnderstood);
        }
        Ok(request) => request,
        Err(error) => {
            frames::refuse(&mut send, &mut recv, &error);
            return Err(error);
        }
    };
    let refused = |why: &str| Err(FrameError::Stream(format!("refused: {why}")));
    match request {
        Request::Poll(gossip) => {
            if let Err(error) = gossip.check() {
                return refused(&error.to_string());
            }
            shared.hear_gossip(from, *gossip);
            reply(&mut send, &shared.gossip()).await
        }
        Request::Stage(order) => match check_order(&order) {
            Ok(()) => {
                session::serve(shared, from, *order, send, recv).await;
                Ok(())
            }
            Err(why) => refused(why),
        },
        Request::Generate { deployment, body } => generate::serve(shared, deployment, body, send, recv).await,
        Request::Update(list) => {
            if list.coordinator != from || list.check().is_err() {
                return refused("a list of deployments that is not the sender's own");
            }
            shared.membership.heard(from);
            shared.view.put_list(*list);
            reply(&mut send, &Done).await
        }
        Request::Wire { up_bytes, down_bytes } => {
            if up_bytes > MEASURE_BYTES || down_bytes > MEASURE_BYTES {
                return refused("more bytes than a measurement sends");
            }
            let exchange = async {
                frames::skip(&mut recv, up_bytes).await?;
                frames::write(&mut send, &Done, limits::MESSAGE_BYTES_MAX).await?;
                frames::write_zeros(&mut send, down_bytes).await?;
                send.finish().ok();
                Ok(())
            };
            timeout(MEASURE_TIMEOUT, exchange).await.unwrap_or_else(|_| refused("a measurement took too long"))
        }
        Request::Drain { node } => {
            let trouble = moving::away_from(&shared, node).await.into_iter().map(clip).collect();
            reply(&mut send, &DrainReply(trouble)).await
        }
        Request::Unload { deployment } => {
            let result = shared.deployments.unload(deployment).await;
            reply(&mut send, &UnloadReply(result.err().map(|e| clip(e.message)))).await
        }
        Request::Keys(news) => {
            if let Err(error) = news.check() {
                return refused(&error.to_string());
            }
            match shared.keys.hear(*news) {
                Some(answer) => reply(&mut send, &answer).await,
                None => refused("keys of another cluster"),
            }
        }
        Request::Catalogue(told) => match told.check() {
            Ok(()) => reply(&mut send, &shared.hear_catalogue(from, *told)).await,
            Err(error) => refused(&error.to_string()),
        },
        Request::Assemble(order) => match order.check() {
            Ok(()) => assembling::serve(shared, *order, send, recv).await,
            Err(error) => refused(&error.to_string()),
        },
        Request::Part(request) => {
            let answer = assembling::part(&shared, *request).await;
            reply(&mut send, &answer).await
        }
    }
}

async fn reply<T: serde::Serialize>(send: &mut SendStream, message: &T) -> Result<(), FrameError> {
    frames::write(send, message, limits::MESSAGE_BYTES_MAX).await?;
    send.finish().ok();
    Ok(())
}

/// Bounds of an order from another node: each becomes an allocation of the child.
fn check_order(order: &StageOrder) -> Result<(), &'static str> {
    let s = &order.spec;
    if s.stages == 0 || s.stage >= s.stages || u32::from(s.stages) > limits::LAYERS_MAX {
        return Err("a stage's index");
    }
    if s.layers.end() > limits::LAYERS_MAX {
        return Err("a stage's layers");
    }
    let sequences = s.slots.saturating_add(s.scheduling.spares());
    if s.slots == 0 || sequences > limits::SLOTS_MAX || s.decode_batch == 0 || s.decode_batch > s.slots {
        return Err("a stage's slots");
    }
    let (slowdown, bounds) =
        (s.scheduling.decode_slowdown_percent, DECODE_SLOWDOWN_PERCENT_MIN..=DECODE_SLOWDOWN_PERCENT_MAX);
    if s.scheduling.speculation_depth > limits::SPECULATION_DEPTH_MAX || !bounds.contains(&slowdown) {
        return Err("a stage's scheduling");
    }
    if s.scheduling.draft.is_some() && s.stage + 1 != s.stages {
        return Err("a draft model for a stage that is not the driver's");
    }
    if s.ubatch == 0 || s.ubatch as usize > limits::ROWS_MAX || s.ctx == 0 {
        return Err("a stage's micro-batch or context");
    }
    if s.model_name.len() > limits::NAME_BYTES_MAX || s.io.hidden_width as usize > limits::HIDDEN_WIDTH_MAX {
        return Err("a stage's name or width");
    }
    if order.made_up.as_ref().is_some_and(|m| m.check().is_err()) {
        return Err("the size of a made-up shard");
    }
    Ok(())
}

impl ProtocolHandler for JoinProtocol {
    async fn accept(&self, connection: Connection) -> Result<(), AcceptError> {
        let Some(shared) = self.shared.upgrade() else { return Ok(()) };
        let Ok(_turn) = self.turns.try_acquire() else {
            close(&connection, CLOSE_PROTOCOL, "too many nodes join at once; try again in a moment");
            return Ok(());
        };
        if hello(&connection, &shared.config.speaks).await.is_err() {
            return Ok(());
        }
        let from = node_id(connection.remote_id());
        match timeout(HELLO_TIMEOUT, welcome(&shared, from, &connection)).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::debug!(%error, "a request to join ended early"),
            Err(_) => close(&connection, CLOSE_PROTOCOL, "no request to join came in time"),
        }
        // The other side closes when it has the answer; one that does not is closed.
        timeout(Duration::from_secs(2), connection.closed()).await.ok();
        close(&connection, CLOSE_DONE, "done");
        Ok(())
    }
}

async fn welcome(shared: &Arc<Shared>, from: NodeId, connection: &Connection) -> Result<(), FrameError> {
    let (mut send, mut recv) = connection.accept_bi().await.map_err(|e| FrameError::Stream(e.to_string()))?;
    let join: Join = frames::expect(&mut recv, control::JOIN_REQUEST_BYTES_MAX).await?;
    let answer = match join.check() {
        Err(error) => JoinReply::Refused { status: 400, message: error.to_string() },
        Ok(()) => match shared.membership.redeem(from, join).await {
            Ok(Admitted { entry, life, members }) => {
                tracing::info!(node = entry.name, key = %from.short(), "a node has joined");
                shared.members_changed();
                let cluster = shared.membership.cluster();
                JoinReply::Welcome { cluster, life, members }
            }
            Err(error) => {
                tracing::info!(key = %from.short(), %error, "a node was not let in");
                let ManageError { status, message } = not_made(error);
                JoinReply::Refused { status, message }
            }
        },
    };
    frames::write(&mut send, &answer, control::JOIN_BYTES_MAX).await?;
    send.finish().ok();
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use capstan_proto::child::{StageSpec, WindowIo};
    use capstan_proto::control::{MADE_UP_FILE_BYTES_MAX, MADE_UP_HEADER_BYTES_MAX, MadeUpShard};
    use capstan_proto::{DeploymentId, LayerRange};

    #[test]
    fn an_order_beyond_its_bounds_is_refused_before_anything_is_made() {
        let spec = StageSpec {
            deployment: DeploymentId(1),
            model_name: "m".into(),
            // Ignored, like all paths of an order.
            shard: "../../etc/passwd".into(),
            layers: LayerRange::new(0, 2).unwrap(),
            stage: 0,
            stages: 1,
            io: WindowIo { capture: None, hidden_width: 4, embedding_scale: 1.0 },
            ctx: 64,
            slots: 1,
            ubatch: 16,
            decode_batch: 1,
            scheduling: Default::default(),
            threads: None,
            gpu_layers: 0,
            bind: std::net::Ipv4Addr::LOCALHOST.into(),
            sparse: false,
        };
        let order = |header: usize, file_bytes: u64| StageOrder {
            spec: spec.clone(),
            shard: None,
            draft: None,
            sharers: 1,
            memory_bytes: 0,
            made_up: Some(MadeUpShard { header: vec![0; header], file_bytes, same_experts: false }),
        };
        assert_eq!(check_order(&order(1000, 1 << 40)), Ok(()));
        assert!(check_order(&order(MADE_UP_HEADER_BYTES_MAX + 1, 1 << 40)).is_err());
        assert!(check_order(&order(1000, MADE_UP_FILE_BYTES_MAX + 1)).is_err());
        assert!(check_order(&order(1000, 999)).is_err());
        assert!(check_order(&StageOrder { spec: StageSpec { slots: 0, ..spec.clone() }, ..order(1, 1) }).is_err());
    }
}
