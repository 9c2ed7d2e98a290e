//! Files that nodes put together for a model: here, or on another node by its order; and what is done with them then.
use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use capstan_proto::control::{Request, clip};
use capstan_proto::weights::{AssembleEvent, AssembleOrder, PartReply, PartRequest};
use capstan_proto::{ContentHash, NodeId, limits};
use capstan_store::{AssemblyProgress, Hold, Sources, StoreError, assembly_id};
use iroh::endpoint::{RecvStream, SendStream};
use tokio::sync::watch;
use tokio::time::sleep;

use crate::error::CallError;
use crate::frames;
use crate::node::Shared;

/// How long hashing a file may take on another node: terabytes on a slow disk. A node that is lost is noticed at once.
const PART_TIMEOUT: Duration = Duration::from_secs(4 * 3600);
/// How often a node that was lost in the middle is asked again, and the pause before: long enough for a restart.
const TRIES: u32 = 30;
/// See [`TRIES`].
const PAUSE: Duration = Duration::from_secs(2);
/// Files put together and not yet published; more are not expected of all pulls together.
const HOLDS_MAX: usize = 4096;

/// What was put together here and waits to be published: it must not make way meanwhile.
#[derive(Default)]
pub(crate) struct Assemblies(Mutex<HashMap<ContentHash, Hold>>);

impl Assemblies {
    fn keep(&self, id: ContentHash, hold: Hold) {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if all.len() < HOLDS_MAX {
            all.insert(id, hold);
        }
    }

    fn release(&self, id: ContentHash) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).remove(&id);
    }
}

/// Why a file could not be put together.
#[derive(Debug)]
pub(crate) struct Trouble {
    /// For people.
    pub(crate) message: String,
    /// The source failed there; this node may reach it.
    pub(crate) outside: bool,
}

impl From<StoreError> for Trouble {
    fn from(error: StoreError) -> Self {
        Self { outside: matches!(error, StoreError::Outside { .. }), message: error.to_string() }
    }
}

/// Puts a file together here.
pub(crate) async fn here(
    shared: &Shared,
    order: &AssembleOrder,
    progress: impl FnMut(AssemblyProgress) + Send,
) -> Result<(ContentHash, u64), StoreError> {
    let id = ContentHash(assembly_id(order));
    let hold = shared.store.hold(&id.0);
    let holders = order.providers.iter().map(|p| shared.dial_addrs(&p.holders)).collect();
    let sources = Sources { endpoint: &shared.endpoint, holders, remote: shared.remote.clone() };
    let (_, outside_bytes) = shared.store.assemble(order, sources, progress).await?;
    shared.assemblies.keep(id, hold);
    Ok((id, outside_bytes))
}

/// Puts a file together on a node. One that is lost in the middle is asked again, and goes on with what it has.
pub(crate) async fn on(
    shared: &Shared,
    node: NodeId,
    order: &AssembleOrder,
    mut progress: impl FnMut(AssemblyProgress) + Send,
) -> Result<(ContentHash, u64), Trouble> {
    if node == shared.id {
        return here(shared, order, progress).await.map_err(Trouble::from);
    }
    let name = shared.membership.name_of(node);
    let (mut tries, mut outside_before, mut outside_now) = (0, 0, 0);
    loop {
        let ended = on_other(shared, node, order, |p: AssemblyProgress| {
            outside_now = p.outside_bytes;
            progress(AssemblyProgress { outside_bytes: outside_before + p.outside_bytes, ..p });
        })
        .await;
        let reason = match ended {
            Ok(Ok((id, outside_bytes))) => return Ok((id, outside_before + outside_bytes)),
            Ok(Err(trouble)) => return Err(trouble),
            Err(reason) => reason,
        };
        outside_before += std::mem::take(&mut outside_now);
        tries += 1;
        if tries >= TRIES || !shared.membership.is_member(node) {
            let message = format!(
                "node {name} was lost while it put its part together ({reason}); start it again and repeat the command, \
                 which goes on where it stopped"
            );
            return Err(Trouble { message, outside: false });
        }
        tracing::info!(node = name, reason, "a node was lost while it puts a file together; it is asked again");
        sleep(PAUSE).await;
    }
}

/// One attempt on another node; the outer error is a lost connection.
async fn on_other(
    shared: &Shared,
    node: NodeId,
    order: &AssembleOrder,
    mut progress: impl FnMut(AssemblyProgress) + Send,
) -> Result<Result<(ContentHash, u64), Trouble>, String> {
    let request = Request::Assemble(Box::new(order.clone()));
    let (mut send, mut recv) = match shared.client.open(node, &request).await {
        Ok(streams) => streams,
        // It will not be smaller next time.
        Err(e @ (CallError::Codec(_) | CallError::NotAMember(_) | CallError::Version(_))) => {
            return Ok(Err(Trouble { message: e.to_string(), outside: false }));
        }
        Err(e) => return Err(e.to_string()),
    };
    send.finish().ok();
    loop {
        match frames::expect(&mut recv, limits::MESSAGE_BYTES_MAX).await.map_err(|e| e.to_string())? {
            AssembleEvent::Progress { done_bytes, total_bytes, outside_bytes } => {
                progress(AssemblyProgress { done_bytes, total_bytes, outside_bytes });
            }
            AssembleEvent::Done { assembly, outside_bytes } => return Ok(Ok((assembly, outside_bytes))),
            AssembleEvent::Failed { message, retry } => {
                let name = shared.membership.name_of(node);
                return Ok(Err(Trouble { message: clip(format!("on node {name}: {message}")), outside: retry }));
            }
        }
    }
}

/// Serves an order of another node, for as long as it listens.
pub(crate) async fn serve(
    shared: Arc<Shared>,
    order: AssembleOrder,
    mut send: SendStream,
    mut recv: RecvStream,
) -> Result<(), frames::FrameError> {
    let (tell, mut told) = watch::channel(AssemblyProgress::default());
    let work = here(&shared, &order, |p| _ = tell.send_replace(p));
    tokio::pin!(work);
    let mut nothing = [0; 1];
    let end = loop {
        tokio::select! {
            done = &mut work => break done,
            Ok(()) = told.changed() => {
                let AssemblyProgress { done_bytes, total_bytes, outside_bytes } = *told.borrow_and_update();
                let event = AssembleEvent::Progress { done_bytes, total_bytes, outside_bytes };
                frames::write(&mut send, &event, limits::MESSAGE_BYTES_MAX).await?;
            }
            // The other side has finished its own direction; an error means that it is gone.
            Err(error) = recv.read(&mut nothing) => return Err(frames::FrameError::Stream(error.to_string())),
        }
    };
    let event = match end {
        Ok((assembly, outside_bytes)) => AssembleEvent::Done { assembly, outside_bytes },
        Err(error) => {
            let retry = matches!(error, StoreError::Outside { .. });
            AssembleEvent::Failed { message: clip(error.to_string()), retry }
        }
    };
    frames::write(&mut send, &event, limits::MESSAGE_BYTES_MAX).await?;
    send.finish().ok();
    Ok(())
}

/// Does something with a file of this node.
pub(crate) async fn part(shared: &Shared, request: PartRequest) -> PartReply {
    let store = &shared.store;
    let no = |e: StoreError| PartReply::No(clip(e.to_string()));
    match request {
        PartRequest::Digest { file, ranges, state } => {
            store.digest(file, ranges, &state).await.map_or_else(no, PartReply::State)
        }
        PartRequest::Publish { assembly } => match store.publish(&assembly.0).await {
            Ok(offer) => {
                let hash = ContentHash(offer.hash);
                // Until its record is everywhere, the part is known to nobody, and must not make way.
                shared.assemblies.keep(hash, store.hold(&hash.0));
                shared.assemblies.release(assembly);
                PartReply::Published { hash, bytes: offer.bytes }
            }
            Err(error) => no(error),
        },
        PartRequest::Discard { assembly } => {
            shared.assemblies.release(assembly);
            store.discard(&assembly.0).await.map_or_else(no, |()| PartReply::Yes)
        }
        PartRequest::Keep { part } if shared.has_part(part) && shared.models.promise(part) => PartReply::Yes,
        PartRequest::Keep { .. } => PartReply::No("it is not here, or about to go".into()),
        PartRequest::Verify { part } => match store.verify(&part.0).await {
            Ok(Some(_)) => PartReply::Yes,
            // A file that is offered from its own place is no shard.
            Ok(None) => match store.offered(&part.0) {
                Some(path) => match capstan_store::hash_file(&path, |_, _| {}).await {
                    Ok(hash) if hash == part.0 => PartReply::Yes,
                    Ok(_) => PartReply::No(format!("{} does not match its hash any more", path.display())),
                    Err(error) => no(error),
                },
                None => PartReply::No("it did not match its hash and was taken out of use".into()),
            },
            Err(error) => no(error),
        },
        PartRequest::Copy { part, bytes, holders } => {
            let from = shared.dial_addrs(&holders);
            let fetched = store.fetch_from(&shared.endpoint, from, part.0, bytes, |_, _| {}).await;
            fetched.map_or_else(no, |_| PartReply::Yes)
        }
    }
}

/// A part that was published is in the catalogue now, and makes way like any other.
pub(crate) fn settled(shared: &Shared, part: ContentHash) {
    shared.assemblies.release(part);
}

/// Asks a node, this one or another, to do something with a file of its own.
pub(crate) async fn ask(shared: &Shared, node: NodeId, request: PartRequest) -> Result<PartReply, String> {
    if node == shared.id {
        return Ok(part(shared, request).await);
    }
    let request = Request::Part(Box::new(request));
    shared.client.call(node, &request, PART_TIMEOUT).await.map_err(|e| e.to_string())
}
