//! Pairing: a machine that is told a short code becomes a member, without a ticket being copied.
//!
//! Both sides prove to each other that they know the code, by SPAKE2 (RFC 9382's predecessor, as magic-wormhole uses
//! it), and the member then issues a ticket for exactly this node, which redeems it like any other. What the proofs
//! cover: the code, both nodes' keys, the cluster, and this very TLS session. So a machine in the middle, a recording
//! played again, and an exchange with another cluster all end in a wrong proof.
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use capstan_cluster::{PairError, PairingCode, PairingDesk, Ticket};
use capstan_proto::control::{CLOSE_PROTOCOL, clip};
use capstan_proto::manage::ManageError;
use capstan_proto::pairing::{
    NearbyNode, PAIR_ALPN, PAIR_REPLY_BYTES_MAX, PAIR_REQUEST_BYTES_MAX, PairBegin, PairOffer, PairOutcome, PairProof,
    PairingReply,
};
use capstan_proto::{ClusterId, NodeId};
use iroh::endpoint::{Connection, RecvStream, SendStream, VarInt};
use iroh::protocol::{AcceptError, ProtocolHandler};
use spake2::{Ed25519Group, Identity, Password, Spake2};
use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use crate::control_client::connect;
use crate::control_server::hello;
use crate::endpoint::{self, node_id};
use crate::frames::{self, FrameError};
use crate::membership::{not_made, now_ms, now_s};
use crate::nearby::{self, Nearby};
use crate::node::Shared;

/// How long a whole exchange may take: it is four small messages.
const PAIR_TIMEOUT: Duration = Duration::from_secs(10);
/// How long the other side may take to close when it has the answer.
const GOODBYE_TIMEOUT: Duration = Duration::from_secs(2);
/// Strangers served at once: an exchange takes milliseconds of curve arithmetic, and guessing must not take the machine.
const STRANGERS_MAX: usize = 4;
/// How long the ticket that comes out of it is good, in seconds: it is redeemed at once.
const TICKET_TTL_S: u64 = 60;
/// Shortest and longest time that a code may be good, in seconds.
const TTL_S: std::ops::RangeInclusive<u64> = 10..=3600;
/// How long a machine with the right digits is looked for. It answers within a second; a busy network loses packets.
const FIND_WAIT: Duration = Duration::from_secs(8);
/// How long machines are looked for when all are wanted.
const LIST_WAIT: Duration = Duration::from_secs(3);
/// Close code of a connection that has done its work.
const CLOSE_DONE: u32 = 0;
/// What the proofs of the two sides are for, so that neither can be played back as the other.
const JOINER_PROOF: &str = "capstan 2026 pairing: proof of the joining node";
const MEMBER_PROOF: &str = "capstan 2026 pairing: proof of the member";
/// What the TLS session's own secret is asked for.
const CHANNEL_LABEL: &[u8] = b"EXPORTER-capstan-pairing";

/// The pairing that is open here, and what announces it.
#[derive(Default)]
pub(crate) struct Pairing {
    desk: Mutex<PairingDesk>,
    announcing: Mutex<Announcing>,
}

/// What tells others of the pairing of this number.
#[derive(Default)]
struct Announcing {
    number: u64,
    stop: CancellationToken,
    task: Option<JoinHandle<()>>,
}

impl Pairing {
    fn desk(&self) -> MutexGuard<'_, PairingDesk> {
        self.desk.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends the announcement of a pairing that is not open any more.
    fn hush(&self, number: u64) {
        let announcing = self.announcing();
        if announcing.number == number && !self.desk().is_open(number, now_ms()) {
            announcing.stop.cancel();
        }
    }

    fn announcing(&self) -> MutexGuard<'_, Announcing> {
        self.announcing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends the announcement there is, and waits until its port is free for the next.
    async fn fall_silent(&self) {
        let task = {
            let mut announcing = self.announcing();
            announcing.stop.cancel();
            announcing.task.take()
        };
        if let Some(task) = task {
            // It only waits, so it cannot have failed.
            task.await.ok();
        }
    }
}

/// Opens a pairing and announces it until it is closed.
pub(crate) async fn open(shared: &Arc<Shared>, ttl_s: u64) -> Result<PairingReply, ManageError> {
    if !TTL_S.contains(&ttl_s) {
        let (least, most) = (TTL_S.start(), TTL_S.end());
        return Err(ManageError::new(
            400,
            format!("a pairing code is good for {least} to {most} seconds, not {ttl_s}"),
        ));
    }
    shared.pairing.fall_silent().await;
    let addrs = endpoint::addrs(&shared.endpoint);
    let listener = bind(shared).await;
    let at = listener.as_ref().and_then(|l| l.local_addr().ok()).map_or(0, |a| a.port());
    let at = if at == 0 { vec![] } else { addrs.iter().map(|a| SocketAddr::new(a.ip(), at)).collect() };

    let code = PairingCode::new(&rand::random());
    let number = shared.pairing.desk().open(code.clone(), ttl_s * 1000, now_ms());
    let stop = CancellationToken::new();
    let stopped = stop.clone();
    let (endpoint, plate, name) = (shared.endpoint.clone(), code.plate(), shared.membership.name());
    // On loopback nobody else is there to hear it.
    let public = addrs.iter().any(|a| !a.ip().is_loopback());
    let lookup = (shared.config.mdns && public).then(|| nearby::announce(&endpoint, &addrs, plate, &name)).flatten();
    let mdns = lookup.is_some();
    let stopping = shared.stop.clone();
    let task = tokio::spawn(async move {
        let telling = async {
            match listener {
                Some(listener) => nearby::tell(listener, endpoint, plate, name).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            () = telling => {}
            () = stopped.cancelled() => {}
            () = stopping.cancelled() => {}
            () = tokio::time::sleep(Duration::from_secs(ttl_s)) => {}
        }
        drop(lookup);
    });
    // Should two have been opened at the same moment, the later one counts.
    let earlier = std::mem::replace(&mut *shared.pairing.announcing(), Announcing { number, stop, task: Some(task) });
    earlier.stop.cancel();
    tracing::info!(ttl_s, mdns, "a pairing is open: one machine may join by the code that was shown");
    Ok(PairingReply { code: code.to_string(), expires_unix_s: now_s() + ttl_s, at, mdns })
}

/// A TCP port for those who ask at an address: the number of the node's UDP port where it is free, else any.
async fn bind(shared: &Shared) -> Option<TcpListener> {
    let udp = *shared.endpoint.bound_sockets().first()?;
    match TcpListener::bind(udp).await {
        Ok(listener) => Some(listener),
        Err(_) => TcpListener::bind(SocketAddr::new(udp.ip(), 0))
            .await
            .inspect_err(|error| tracing::warn!(%error, "no TCP port could be opened for `capstan join CODE --at`"))
            .ok(),
    }
}

/// Machines of the network that wait to be joined.
pub(crate) async fn list(shared: &Shared) -> Result<Vec<NearbyNode>, ManageError> {
    check_mdns(shared)?;
    let found = nearby::listen(&shared.endpoint, None, LIST_WAIT).await.map_err(|e| ManageError::new(502, e))?;
    Ok(found.into_iter().map(|n| NearbyNode { name: n.name, plate: n.plate, addrs: n.addrs }).collect())
}

fn check_mdns(shared: &Shared) -> Result<(), ManageError> {
    if shared.config.mdns {
        return Ok(());
    }
    let message = "multicast DNS is off here (no_mdns), so no machine is looked for; say where it is with \
                   `capstan join CODE --at HOST:PORT`, as `capstan pair` shows it there";
    Err(ManageError::new(409, message))
}

/// Finds the machine that a code is of.
async fn find(shared: &Shared, plate: u8, at: Option<SocketAddr>) -> Result<Nearby, ManageError> {
    if let Some(at) = at {
        return nearby::ask(at).await.map_err(|why| {
            ManageError::new(
                502,
                format!(
                    "at {at} nobody waits to be joined ({why}); is a pairing open there (`capstan pair`), and does a \
                     firewall let TCP and UDP through?"
                ),
            )
        });
    }
    check_mdns(shared)?;
    let found = nearby::listen(&shared.endpoint, Some(plate), FIND_WAIT).await.map_err(|e| ManageError::new(502, e))?;
    let mut right = found.into_iter().filter(|n| n.plate == plate);
    let say_where = "say where it is with --at HOST:PORT, as `capstan pair` shows it there";
    match (right.next(), right.next()) {
        (Some(one), None) => Ok(one),
        (Some(one), Some(other)) => Err(ManageError::new(
            409,
            format!("{} and {} both wait with a code that begins with {plate}; {say_where}", one.name, other.name),
        )),
        _ => Err(ManageError::new(
            404,
            format!(
                "no machine of this network waits with a code that begins with {plate}; is the pairing still open \
                 there? Where multicast DNS does not get through, {say_where}"
            ),
        )),
    }
}

/// Gets a ticket by a code.
pub(crate) async fn ticket(shared: &Shared, code: &str, at: Option<SocketAddr>) -> Result<Ticket, ManageError> {
    let code: PairingCode = code.parse().map_err(|e| ManageError::new(400, format!("{e}")))?;
    let found = find(shared, code.plate(), at).await?;
    let speaks = &shared.config.speaks;
    let (connection, _) = connect(&shared.endpoint, speaks, found.id, &found.name, &found.addrs, PAIR_ALPN).await?;
    let lost =
        |why: String| ManageError::new(502, format!("the pairing with {} broke off: {why}; try again", found.name));
    let result = match timeout(PAIR_TIMEOUT, ask(shared.id, &connection, found.id, &code)).await {
        Ok(result) => result.map_err(|e| lost(e.to_string()))?,
        Err(_) => return Err(lost(format!("nothing came within {} s", PAIR_TIMEOUT.as_secs()))),
    };
    connection.close(VarInt::from_u32(CLOSE_DONE), b"done");
    match result {
        Ok((cluster, secret, expires_unix_s)) => {
            Ok(Ticket { cluster, inviter: found.id, addrs: found.addrs, secret, expires_unix_s, reusable: false })
        }
        Err((status, message)) => {
            // Only what HTTP has a meaning for; a peer does not choose our status freely.
            let status = if matches!(status, 400 | 403 | 409 | 410 | 429) { status } else { 502 };
            Err(ManageError::new(status, message.chars().filter(|c| !c.is_control()).collect::<String>()))
        }
    }
}

type Answer<T> = Result<T, (u16, String)>;

/// The joining side of the exchange.
async fn ask(
    own: NodeId,
    connection: &Connection,
    member: NodeId,
    code: &PairingCode,
) -> Result<Answer<(ClusterId, [u8; 16], u64)>, FrameError> {
    let (mut send, mut recv) = connection.open_bi().await.map_err(|e| FrameError::Stream(e.to_string()))?;
    frames::write(&mut send, &PairBegin { plate: code.plate() }, PAIR_REQUEST_BYTES_MAX).await?;
    let (cluster, theirs) = match frames::expect(&mut recv, PAIR_REPLY_BYTES_MAX).await? {
        PairOffer::Offer { cluster, pake } => (cluster, pake),
        PairOffer::Refused { status, message } => return Ok(Err((status, message))),
    };
    let (joiner_id, member_id) = identities(connection, own, member, cluster)?;
    let (spake, pake) = Spake2::<Ed25519Group>::start_a(&Password::new(code.secret()), &joiner_id, &member_id);
    let nonsense = || FrameError::Stream("the other side's part of the key exchange is none".into());
    let key = spake.finish(&theirs).map_err(|_| nonsense())?;
    let proof = *proof(JOINER_PROOF, &key).as_bytes();
    frames::write(&mut send, &PairProof { pake, proof }, PAIR_REQUEST_BYTES_MAX).await?;
    send.finish().ok();
    match frames::expect(&mut recv, PAIR_REPLY_BYTES_MAX).await? {
        PairOutcome::Refused { status, message } => Ok(Err((status, message))),
        // Compared in constant time.
        PairOutcome::Paired { proof: theirs, secret, expires_unix_s } if proof_is(MEMBER_PROOF, &key, theirs) => {
            Ok(Ok((cluster, secret, expires_unix_s)))
        }
        PairOutcome::Paired { .. } => {
            let message = "the machine that answered does not know the code: it is not the one that showed it";
            Ok(Err((403, message.into())))
        }
    }
}

/// Who the two sides are, as the key exchange is to know them.
fn identities(
    connection: &Connection,
    joiner: NodeId,
    member: NodeId,
    cluster: ClusterId,
) -> Result<(Identity, Identity), FrameError> {
    let mut channel = [0; 32];
    connection
        .export_keying_material(&mut channel, CHANNEL_LABEL, &cluster.0)
        .map_err(|_| FrameError::Stream("the TLS session has no secret of its own".into()))?;
    let of = |role: &[u8], node: NodeId| Identity::new(&[role, &node.0, &cluster.0, &channel].concat());
    Ok((of(b"capstan pairing 1: joining node", joiner), of(b"capstan pairing 1: member", member)))
}

fn proof(what_for: &str, key: &[u8]) -> blake3::Hash {
    blake3::Hash::from(blake3::derive_key(what_for, key))
}

fn proof_is(what_for: &str, key: &[u8], shown: [u8; 32]) -> bool {
    // Comparing `blake3::Hash` takes the same time whatever differs.
    proof(what_for, key) == blake3::Hash::from(shown)
}

/// The pairing protocol.
pub(crate) struct PairProtocol {
    shared: Weak<Shared>,
    turns: Semaphore,
}

impl PairProtocol {
    pub(crate) fn new(shared: Weak<Shared>) -> Self {
        Self { shared, turns: Semaphore::new(STRANGERS_MAX) }
    }
}

impl std::fmt::Debug for PairProtocol {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("PairProtocol")
    }
}

impl ProtocolHandler for PairProtocol {
    async fn accept(&self, connection: Connection) -> Result<(), AcceptError> {
        let close = |code: u32, reason: &str| connection.close(VarInt::from_u32(code), reason.as_bytes());
        let Some(shared) = self.shared.upgrade() else { return Ok(()) };
        let Ok(_turn) = self.turns.try_acquire() else {
            close(CLOSE_PROTOCOL, "too many nodes pair at once; try again in a moment");
            return Ok(());
        };
        if hello(&connection, &shared.config.speaks).await.is_err() {
            return Ok(());
        }
        let answer = async {
            let (send, recv) = connection.accept_bi().await.map_err(|e| FrameError::Stream(e.to_string()))?;
            pair(&shared, &connection, send, recv).await
        };
        match timeout(PAIR_TIMEOUT, answer).await {
            Ok(Ok(())) => {
                // The other side closes when it has the answer; one that does not is closed.
                timeout(GOODBYE_TIMEOUT, connection.closed()).await.ok();
                close(CLOSE_DONE, "done");
            }
            Ok(Err(error)) => {
                tracing::debug!(%error, "a pairing broke off");
                close(CLOSE_PROTOCOL, "this was no pairing");
            }
            Err(_) => close(CLOSE_PROTOCOL, "the pairing took too long"),
        }
        Ok(())
    }
}

/// The member's side of the exchange.
async fn pair(
    shared: &Shared,
    connection: &Connection,
    mut send: SendStream,
    mut recv: RecvStream,
) -> Result<(), FrameError> {
    let joiner = node_id(connection.remote_id());
    let PairBegin { plate } = frames::expect(&mut recv, PAIR_REQUEST_BYTES_MAX).await?;
    let begun = shared.pairing.desk().begin(plate, now_ms());
    let tried = match begun {
        Ok(tried) => tried,
        Err(error) => {
            let refused = PairOffer::Refused { status: error.status(), message: error.to_string() };
            return reply(&mut send, &refused).await;
        }
    };
    let cluster = shared.membership.cluster();
    let (joiner_id, member_id) = identities(connection, joiner, shared.id, cluster)?;
    let (spake, pake) = Spake2::<Ed25519Group>::start_b(&Password::new(tried.code.secret()), &joiner_id, &member_id);
    frames::write(&mut send, &PairOffer::Offer { cluster, pake }, PAIR_REPLY_BYTES_MAX).await?;

    let PairProof { pake, proof: theirs } = frames::expect(&mut recv, PAIR_REQUEST_BYTES_MAX).await?;
    // What is no point of the curve is no guess either, and does not count as one.
    let nonsense = || FrameError::Stream("its part of the key exchange is none".into());
    let key = spake.finish(&pake).map_err(|_| nonsense())?;
    let right = proof_is(JOINER_PROOF, &key, theirs);
    let ended = shared.pairing.desk().end(&tried, right, now_ms());
    shared.pairing.hush(tried.number());
    let ticket = match ended {
        Ok(()) => issue(shared).await,
        Err(error) => Err(refused(error)),
    };
    let outcome = match ticket {
        Ok(ticket) => {
            tracing::info!(key = %joiner.short(), "a machine knew the pairing code");
            let proof = *proof(MEMBER_PROOF, &key).as_bytes();
            PairOutcome::Paired { proof, secret: ticket.secret, expires_unix_s: ticket.expires_unix_s }
        }
        Err(error) => {
            tracing::warn!(key = %joiner.short(), error = error.message, "a pairing was refused");
            PairOutcome::Refused { status: error.status, message: clip(error.message) }
        }
    };
    reply(&mut send, &outcome).await
}

async fn reply<T: serde::Serialize>(send: &mut SendStream, message: &T) -> Result<(), FrameError> {
    frames::write(send, message, PAIR_REPLY_BYTES_MAX).await?;
    send.finish().ok();
    Ok(())
}

fn refused(error: PairError) -> ManageError {
    ManageError::new(error.status(), error.to_string())
}

async fn issue(shared: &Shared) -> Result<Ticket, ManageError> {
    let addrs = endpoint::addrs(&shared.endpoint);
    shared.membership.issue(TICKET_TTL_S, false, addrs).await.map_err(not_made)
}
