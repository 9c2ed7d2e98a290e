//! Every door of a daemon, tried by who has no business there: a stranger, a used, an expired and a recorded ticket, a
//! node that was removed, frames that are too large, and garbage. Each is refused with its reason, and the daemon goes on.
//!
//! docs/security.md lists the doors and names the tests.
mod support;

use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;

use capstan_compute::link::{IrohTransport, Transport};
use capstan_node::{Node, Service};
use capstan_proto::control::{
    CLOSE_NOT_A_MEMBER, CLOSE_PROTOCOL, CLOSE_REMOVED, CONTROL_ALPN, DeploymentList, Hello, JOIN_ALPN, JoinReply,
    RAFT_ALPN, RESET_BAD_REQUEST, RESET_NOT_UNDERSTOOD, Request,
};
use capstan_proto::data::{DATA_ALPN, DATA_VERSION, DataHello};
use capstan_proto::keys::KeyNews;
use capstan_proto::pairing::{PAIR_ALPN, PairBegin, PairOffer, PairOutcome, PairProof};
use capstan_proto::{ClusterId, DeploymentId, Epoch, NodeId};
use capstan_store::BLOBS_ALPN;
use iroh::endpoint::Connection;
use spake2::{Ed25519Group, Identity, Password, Spake2};
use support::*;

/// A node that is attacked, and a member by whose eyes it is seen to live on.
struct Victim {
    node: Arc<Node>,
    member: Peer,
    line: Connection,
    _dir: tempfile::TempDir,
}

impl Victim {
    async fn new() -> Self {
        let (node, dir) = node("victim").await;
        let member = Peer::new().await;
        member.become_member(&node, "member").await;
        let line = member.control(&node).await;
        Self { node, member, line, _dir: dir }
    }

    /// The daemon answers its member, on the connection of before the attack and on a new one.
    async fn lives(&self) {
        assert_eq!(self.member.poll(&self.node, &self.line).await.node.id, self.node.id());
        let fresh = self.member.control(&self.node).await;
        assert_eq!(self.member.poll(&self.node, &fresh).await.cluster, self.node.cluster());
        fresh.close(0u32.into(), b"");
    }

    async fn members(&self) -> usize {
        self.node.status().await.nodes.len()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stranger_is_cut_off_from_control_and_shards() {
    let victim = Victim::new().await;
    let stranger = Peer::new().await;
    let no_member = u64::from(CLOSE_NOT_A_MEMBER);
    for (alpn, code, words) in [
        (CONTROL_ALPN, no_member, "member list"),
        (RAFT_ALPN, no_member, "member list"),
        (BLOBS_ALPN, 1, "not a member"),
    ] {
        for bytes in [frame(&Request::Poll(Box::new(stranger.gossip(&victim.node)))), oversized(), garbage(), vec![]] {
            let connection = stranger.dial(&victim.node, alpn).await.unwrap();
            if let Ok((mut send, mut recv)) = connection.open_bi().await {
                send.write_all(&bytes).await.ok();
                assert!(recv.read_to_end(1 << 20).await.is_err(), "a stranger was answered");
            }
            let (closed_with, reason) = closed(&connection).await;
            assert_eq!(closed_with, code, "{reason}");
            assert!(reason.contains(words), "{reason}");
            victim.lives().await;
        }
    }
    // What the daemon does not speak it does not accept at all; a stage's links end at the stage.
    for alpn in [DATA_ALPN, b"h3", b"capstan/control/0"] {
        assert!(stranger.dial(&victim.node, alpn).await.is_err());
    }
    assert_eq!(victim.members().await, 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn garbage_and_oversized_frames_end_a_strangers_connection_and_nothing_else() {
    let victim = Victim::new().await;
    let stranger = Peer::new().await;
    let pairing = victim.node.open_pairing(600).await.unwrap();
    for alpn in [JOIN_ALPN, PAIR_ALPN] {
        for bytes in [oversized(), garbage()] {
            // Instead of a hello.
            let connection = stranger.dial(&victim.node, alpn).await.unwrap();
            send(&connection, &bytes).await;
            assert_eq!(closed(&connection).await.0, u64::from(CLOSE_PROTOCOL));
            // Instead of a request.
            let connection = stranger.greet(&victim.node, alpn).await;
            let (_, mut recv) = send(&connection, &bytes).await;
            assert!(recv.read_to_end(1 << 20).await.unwrap_or_default().is_empty(), "it was answered");
            connection.close(0u32.into(), b"");
            victim.lives().await;
        }
    }
    assert_eq!(victim.members().await, 2);
    // The code was not tried by any of that.
    let (new, _dir) = node("new").await;
    new.pair(pairing.code.clone(), at(&pairing)).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn tickets_that_are_no_good_let_nobody_in() {
    let victim = Victim::new().await;
    let (one, other) = (Peer::new().await, Peer::new().await);
    let is_refused = |reply: JoinReply, want: u16, words: &str| match reply {
        JoinReply::Refused { status, message } => {
            assert_eq!(status, want, "{message}");
            assert!(message.contains(words), "{message}");
        }
        JoinReply::Welcome { .. } => panic!("let in, but {words}"),
    };
    // Used by another.
    let ticket = victim.node.ticket(600, false).await.unwrap().ticket;
    assert!(matches!(victim.join(&one, &ticket).await, JoinReply::Welcome { .. }));
    is_refused(victim.join(&other, &ticket).await, 410, "used already");
    // Expired: one that may be used again and again is used until it is refused.
    let short = victim.node.ticket(1, true).await.unwrap().ticket;
    let expired = async || match victim.join(&one, &short).await {
        JoinReply::Refused { status: 410, message } if message.contains("expired") => true,
        JoinReply::Welcome { .. } => false,
        other => panic!("{other:?}"),
    };
    until("the ticket expires", expired).await;
    // Made up, and of another cluster.
    let mut forged: capstan_cluster::Ticket = ticket.parse().unwrap();
    forged.secret = [7; 16];
    is_refused(victim.join(&other, &forged.to_string()).await, 410, "does not know it");
    forged.cluster = ClusterId([7; 32]);
    is_refused(victim.join(&other, &forged.to_string()).await, 409, "another cluster");
    // A name that is no name, in the request itself.
    let bytes = other.join_frame(&victim.node.ticket(600, false).await.unwrap().ticket, &"x".repeat(100));
    is_refused(other.join(&victim.node, &bytes).await, 400, "limit");
    assert_eq!(victim.members().await, 3, "the victim, its member, and the one whose ticket was good");
    victim.lives().await;
}

impl Victim {
    async fn join(&self, peer: &Peer, ticket: &str) -> JoinReply {
        peer.join(&self.node, &peer.join_frame(ticket, "peer")).await
    }

    /// Somebody takes a member out.
    async fn remove(&self, name: &str) {
        self.node.remove_node(name.into()).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_recorded_request_to_join_is_worth_nothing() {
    let victim = Victim::new().await;
    let (honest, thief) = (Peer::new().await, Peer::new().await);
    let ticket = victim.node.ticket(600, false).await.unwrap().ticket;
    let recorded = honest.join_frame(&ticket, "honest");
    assert!(matches!(honest.join(&victim.node, &recorded).await, JoinReply::Welcome { .. }));
    // By another key: the ticket is used.
    let is_used = |reply: JoinReply| match reply {
        JoinReply::Refused { status, message } => assert!(status == 410 && message.contains("used"), "{message}"),
        JoinReply::Welcome { .. } => panic!("a recording let somebody in"),
    };
    is_used(thief.join(&victim.node, &recorded).await);
    // By its own key, while its answer may have been lost: that is what makes joining safe to repeat.
    assert!(matches!(honest.join(&victim.node, &recorded).await, JoinReply::Welcome { .. }));
    // By its own key when it was removed: who is out stays out, and no fresh ticket helps.
    victim.remove("honest").await;
    let fresh = victim.node.ticket(600, false).await.unwrap().ticket;
    for bytes in [recorded, honest.join_frame(&fresh, "honest")] {
        match honest.join(&victim.node, &bytes).await {
            JoinReply::Refused { status, message } => {
                assert!(status == 410 && message.contains("removed"), "{message}")
            }
            JoinReply::Welcome { .. } => panic!("a removed node was let in"),
        }
    }
    assert_eq!(victim.members().await, 2);
    victim.lives().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_removed_node_is_out_at_every_door_at_once() {
    let victim = Victim::new().await;
    let gone = Peer::new().await;
    gone.become_member(&victim.node, "gone").await;
    let line = gone.control(&victim.node).await;
    let shards = gone.dial(&victim.node, BLOBS_ALPN).await.unwrap();
    let log = gone.greet(&victim.node, RAFT_ALPN).await;
    assert_eq!(victim.members().await, 3);
    victim.remove("gone").await;
    // The connections of before.
    assert_eq!(closed(&line).await.0, u64::from(CLOSE_REMOVED));
    assert_eq!(closed(&log).await.0, u64::from(CLOSE_REMOVED));
    send(&shards, &[0; 40]).await;
    assert_eq!(closed(&shards).await.0, 1);
    // And new ones.
    let removed = u64::from(CLOSE_REMOVED);
    for (alpn, code) in [(CONTROL_ALPN, removed), (RAFT_ALPN, removed), (BLOBS_ALPN, 1)] {
        let connection = gone.dial(&victim.node, alpn).await.unwrap();
        assert_eq!(closed(&connection).await.0, code);
    }
    victim.lives().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_members_nonsense_ends_its_stream_and_not_its_connection() {
    let victim = Victim::new().await;
    let line = &victim.line;
    // Neither too large, nor torn, nor a known kind with nonsense in it, nor a kind of tomorrow.
    let torn = frame(&Request::Unload { deployment: DeploymentId(1) })[..5].to_vec();
    let newer = [&5u32.to_le_bytes()[..], &[Request::KINDS as u8, 1, 2, 3, 4]].concat();
    let nonsense = [&3u32.to_le_bytes()[..], &[0, 9, 9]].concat();
    for (bytes, code) in [
        (oversized(), RESET_BAD_REQUEST),
        (torn, RESET_BAD_REQUEST),
        (nonsense, RESET_BAD_REQUEST),
        (garbage(), RESET_BAD_REQUEST),
        (newer, RESET_NOT_UNDERSTOOD),
    ] {
        let (_send, mut recv) = send(line, &bytes).await;
        assert_eq!(reset_code(read_body(&mut recv).await.unwrap_err()), u64::from(code), "{bytes:?}");
        victim.lives().await;
    }
    // What a member may not say: of others, and beyond its bounds.
    let other = NodeId([9; 32]);
    let lie = DeploymentList { coordinator: other, stamp: u64::MAX, deployments: vec![] };
    let mut long = victim.member.gossip(&victim.node);
    long.node.addrs = vec![([127, 0, 0, 1], 1).into(); 1000];
    let foreign = KeyNews { cluster: ClusterId([1; 32]), digest: [0; 32], entries: vec![] };
    for request in [
        Request::Update(Box::new(lie)),
        Request::Poll(Box::new(long)),
        Request::Keys(Box::new(foreign)),
        Request::Wire { up_bytes: u32::MAX, down_bytes: 0 },
    ] {
        let (_send, mut recv) = send(line, &frame(&request)).await;
        assert!(read_body(&mut recv).await.is_err(), "{request:?} was answered");
        victim.lives().await;
    }
    assert_eq!(victim.members().await, 2);
    // Nor does nonsense about the log.
    let log = victim.member.greet(&victim.node, RAFT_ALPN).await;
    for bytes in [oversized(), garbage(), vec![], frame(&(ClusterId([1; 32]), 0u8))] {
        let (_send, mut recv) = send(&log, &bytes).await;
        assert!(recv.read_to_end(1 << 20).await.unwrap_or_default().is_empty(), "{bytes:?} was answered");
        victim.lives().await;
    }
    // A shard connection that asks for what is no request is closed; the next one is served.
    for bytes in [vec![0xff; 64], vec![0], [&[3u8][..], &[0xff; 1 << 16]].concat()] {
        let shards = victim.member.dial(&victim.node, BLOBS_ALPN).await.unwrap();
        send(&shards, &bytes).await;
        assert_eq!(closed(&shards).await.0, 1);
        victim.lives().await;
    }
}

/// The joining side of a pairing, byte by byte: what it would send as its proof, and the stream.
async fn prove(
    peer: &Peer,
    connection: &Connection,
    node: &Node,
    plate: u8,
    letters: &str,
) -> Result<(PairProof, iroh::endpoint::SendStream, iroh::endpoint::RecvStream), (u16, String)> {
    let (mut send, mut recv) = connection.open_bi().await.unwrap();
    send.write_all(&frame(&PairBegin { plate })).await.unwrap();
    let (cluster, theirs) = match read(&mut recv).await {
        PairOffer::Offer { cluster, pake } => (cluster, pake),
        PairOffer::Refused { status, message } => return Err((status, message)),
    };
    let mut channel = [0; 32];
    connection.export_keying_material(&mut channel, b"EXPORTER-capstan-pairing", &cluster.0).unwrap();
    let id = |role: &[u8], node: NodeId| Identity::new(&[role, &node.0, &cluster.0, &channel].concat());
    let (joiner, member) =
        (id(b"capstan pairing 1: joining node", peer.id()), id(b"capstan pairing 1: member", node.id()));
    let (spake, pake) = Spake2::<Ed25519Group>::start_a(&Password::new(letters), &joiner, &member);
    let key = spake.finish(&theirs).unwrap();
    let proof = blake3::derive_key("capstan 2026 pairing: proof of the joining node", &key);
    Ok((PairProof { pake, proof }, send, recv))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_recorded_pairing_is_worth_nothing() {
    let victim = Victim::new().await;
    let (honest, thief) = (Peer::new().await, Peer::new().await);
    let code = victim.node.open_pairing(600).await.unwrap().code;
    let (plate, letters) = (code[..2].parse().unwrap(), &code[3..]);
    let connection = honest.greet(&victim.node, PAIR_ALPN).await;
    let (recorded, mut send, mut recv) = prove(&honest, &connection, &victim.node, plate, letters).await.unwrap();
    send.write_all(&frame(&recorded)).await.unwrap();
    assert!(matches!(read(&mut recv).await, PairOutcome::Paired { .. }));
    connection.close(0u32.into(), b"");

    // The code is used up: not even who knows it is let in.
    let connection = thief.greet(&victim.node, PAIR_ALPN).await;
    let (status, message) = prove(&thief, &connection, &victim.node, plate, letters).await.unwrap_err();
    assert!(status == 410 && message.contains("capstan pair"), "{message}");
    connection.close(0u32.into(), b"");
    // The messages of a good pairing, played back to the next one on new connections, by its own key and by another.
    for peer in [&honest, &thief] {
        let next = victim.node.open_pairing(600).await.unwrap().code;
        let connection = peer.greet(&victim.node, PAIR_ALPN).await;
        let plate = next[..2].parse().unwrap();
        let (_, mut send, mut recv) = prove(peer, &connection, &victim.node, plate, letters).await.unwrap();
        send.write_all(&frame(&recorded)).await.unwrap();
        let PairOutcome::Refused { status, message } = read(&mut recv).await else { panic!("a recording was taken") };
        assert!(status == 403 && message.contains("wrong"), "{message}");
        connection.close(0u32.into(), b"");
    }
    victim.lives().await;
    assert_eq!(victim.members().await, 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn many_guesses_at_once_are_three_guesses() {
    let victim = Victim::new().await;
    let code = victim.node.open_pairing(600).await.unwrap().code;
    let plate = code[..2].parse().unwrap();
    // Guessers that all have begun before any of them is told that it is wrong.
    let guesser = Peer::new().await;
    let (mut wrong, mut told) = (0, vec![]);
    let guessing = async {
        while !told.iter().any(|m: &String| m.contains("useless now")) {
            let mut tries = vec![];
            for _ in 0..3 {
                let connection = guesser.dial(&victim.node, PAIR_ALPN).await.unwrap();
                if hello(&connection, &Hello::ours("test")).await.is_err() {
                    // Too many at once: those before have not been closed yet.
                    continue;
                }
                match prove(&guesser, &connection, &victim.node, plate, "AAAAAA").await {
                    Ok(begun) => tries.push((connection, begun)),
                    Err((_, message)) => told.push(message),
                }
            }
            for (connection, (proof, mut send, mut recv)) in tries {
                send.write_all(&frame(&proof)).await.unwrap();
                let PairOutcome::Refused { status, message } = read(&mut recv).await else { panic!("it was right") };
                wrong += usize::from(status == 403);
                told.push(message);
                connection.close(0u32.into(), b"");
            }
        }
    };
    tokio::time::timeout(PATIENCE, guessing).await.expect("the code becomes useless");
    assert!(wrong == 2 && told.iter().any(|m| m.contains("useless now")), "{wrong}: {told:?}");
    assert!(told.iter().any(|m| m.contains("wait a second")), "{told:?}");
    // Useless for who knows it, too.
    until("the right letters are refused", async || {
        let connection = guesser.dial(&victim.node, PAIR_ALPN).await.unwrap();
        if hello(&connection, &Hello::ours("test")).await.is_err() {
            return false;
        }
        let right = prove(&guesser, &connection, &victim.node, plate, &code[3..]).await;
        let (status, message) = right.expect_err("a code that is useless lets nobody in");
        connection.close(0u32.into(), b"");
        status == 410 && message.contains("useless now")
    })
    .await;
    victim.lives().await;
    assert_eq!(victim.members().await, 2);
}

#[tokio::test]
async fn a_stages_links_take_nothing_but_what_they_wait_for() {
    let loopback = IpAddr::V4(Ipv4Addr::LOCALHOST);
    let stage = Arc::new(IrohTransport::bind(loopback).await.unwrap());
    let (friend, stranger) = (Peer::new().await, Peer::new().await);
    let wanted = DataHello { version: DATA_VERSION, deployment: DeploymentId(1), epoch: Epoch(2), from_stage: 0 };
    let waiting = tokio::spawn({
        let (stage, key, hello) = (stage.clone(), friend.id().0, wanted.clone());
        async move { stage.accept(key, hello).await.is_ok() }
    });
    let knock = async |peer: &Peer, bytes: Vec<u8>| {
        let own = stage.addr();
        let id = iroh::EndpointId::from_bytes(&own.key).unwrap();
        let addr = iroh::EndpointAddr::from_parts(id, own.addrs.into_iter().map(iroh::TransportAddr::Ip));
        let Ok(connection) = peer.endpoint.connect(addr, DATA_ALPN).await else { return false };
        let Ok((mut send, mut recv)) = connection.open_bi().await else { return false };
        send.write_all(&bytes).await.ok();
        recv.read_exact(&mut [0]).await.is_ok()
    };
    let old = DataHello { epoch: Epoch(1), ..wanted.clone() };
    for bytes in [oversized(), garbage(), frame(&old)] {
        assert!(!knock(&friend, bytes.clone()).await, "the right key with the wrong words");
        assert!(!knock(&stranger, bytes).await);
    }
    assert!(!knock(&stranger, frame(&wanted)).await, "the right words with the wrong key");
    while !knock(&friend, frame(&wanted)).await {}
    assert!(waiting.await.unwrap());
    assert!(!knock(&friend, frame(&wanted)).await, "played back");
}
