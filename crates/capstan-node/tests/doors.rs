//! The doors of a cluster as they are meant to be used: pairing codes, API keys that are good everywhere, and builds of
//! different versions side by side.
mod support;

use capstan_node::{Node, NodeConfig, Service};
use capstan_proto::ClusterId;
use capstan_proto::control::{
    CONTROL_VERSION_MAX, CONTROL_VERSION_MIN, Hello, KEYS_SINCE, RESET_NOT_UNDERSTOOD, Request,
};
use capstan_proto::keys::{KeyNews, KeyScope};
use capstan_proto::pairing::{PAIR_ALPN, PairBegin, PairOffer, PairOutcome, PairProof};
use spake2::{Ed25519Group, Identity, Password, Spake2};
use support::*;
use tokio::io::AsyncWriteExt;

async fn online(node: &Node) -> usize {
    node.status().await.nodes.iter().filter(|n| n.online).count()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_short_code_makes_a_member() {
    let ((a, _a), (b, _b), (c, _c)) = (node("alpha").await, node("beta").await, node("gamma").await);
    let opened = a.open_pairing(600).await.unwrap();
    assert!(!opened.mdns && opened.at.iter().all(|at| at.ip().is_loopback()), "{opened:?}");
    // As a person types it.
    let typed = opened.code.to_lowercase().replace('-', " ");
    let status = b.pair(typed, at(&opened)).await.unwrap();
    assert_eq!((status.nodes.len(), b.cluster()), (2, a.cluster()));
    until("both see each other", || async { online(&a).await == 2 && online(&b).await == 2 }).await;
    // It works once, and then nobody answers at the address any more.
    until("nobody answers for it", async || {
        let error = c.pair(opened.code.clone(), at(&opened)).await.unwrap_err();
        assert!(matches!(error.status, 410 | 502) && error.message.contains("capstan pair"), "{error}");
        error.status == 502
    })
    .await;
    refused(b.pair(opened.code.clone(), at(&opened)).await, 409, "capstan leave");
    // A member that came by a code shows codes itself.
    let next = b.open_pairing(600).await.unwrap();
    c.pair(next.code.clone(), at(&next)).await.unwrap();
    until("all see all", || async { online(&a).await == 3 && online(&c).await == 3 }).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn codes_that_are_wrong_late_or_nonsense_are_refused_with_the_reason() {
    let ((a, _a), (b, _b)) = (node("alpha").await, node("beta").await);
    refused(a.open_pairing(5).await, 400, "10 to 3600 seconds");
    refused(b.pair("hello".into(), None).await, 400, "no pairing code");
    // Without multicast DNS nobody is looked for.
    refused(b.pair("42-ABCDEF".into(), None).await, 409, "--at");
    refused(b.nearby().await, 409, "--at");
    let opened = a.open_pairing(600).await.unwrap();
    let (plate, letters) = opened.code.split_once('-').unwrap();
    let wrong: String = letters.chars().map(|c| if c == 'A' { 'B' } else { 'A' }).collect();
    let other = if plate == "42" { "43" } else { "42" };
    refused(b.pair(format!("{other}-{letters}"), at(&opened)).await, 403, "first two digits");
    // Each wrong try is slowed down, and the third ends the code.
    let guess = async || b.pair(format!("{plate}-{wrong}"), at(&opened)).await.unwrap_err();
    let first = guess().await;
    assert!(first.status == 403 && first.message.contains("2 more tries"), "{first}");
    let second = guess().await;
    assert!(second.status == 429 && second.message.contains("wait a second"), "{second}");
    until("the code is useless", async || {
        let error = guess().await;
        assert!(matches!(error.status, 403 | 410 | 429), "{error}");
        error.status == 410
    })
    .await;
    // Nobody answers for it any more, not even who knows it is let in.
    until("the announcement ends", async || {
        let error = b.pair(opened.code.clone(), at(&opened)).await.unwrap_err();
        assert!(b.is_alone());
        error.status == 502
    })
    .await;
    // A fresh one works.
    let fresh = a.open_pairing(600).await.unwrap();
    b.pair(fresh.code.clone(), at(&fresh)).await.unwrap();
}

/// A machine that says it waits with a code of these digits, answers as if it knew the letters, and reports the proof
/// that it was given.
async fn impostor(plate: u8) -> (std::net::SocketAddr, tokio::task::JoinHandle<PairProof>) {
    let builder = iroh::Endpoint::builder(iroh::endpoint::presets::Minimal).relay_mode(iroh::RelayMode::Disabled);
    let builder = builder.alpns(vec![PAIR_ALPN.to_vec()]).clear_ip_transports().bind_addr("127.0.0.1:0").unwrap();
    let endpoint = builder.bind().await.unwrap();
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let asked_at = listener.local_addr().unwrap();
    let (port, key) = (endpoint.bound_sockets()[0].port(), hex::encode(endpoint.id().as_bytes()));
    let line = format!("capstan-pair 1 {plate} at {port} {key} impostor\n");
    let task = tokio::spawn(async move {
        let (mut asker, _) = listener.accept().await.unwrap();
        asker.write_all(line.as_bytes()).await.unwrap();
        drop(asker);
        let connection = endpoint.accept().await.unwrap().await.unwrap();
        let (mut send, mut recv) = connection.accept_bi().await.unwrap();
        read::<Hello>(&mut recv).await;
        send.write_all(&frame(&Hello::ours("0.1.0"))).await.unwrap();
        let (mut send, mut recv) = connection.accept_bi().await.unwrap();
        read::<PairBegin>(&mut recv).await;
        let (guess, id) = (Password::new("AAAAAA"), Identity::new(b"any"));
        let (_, pake) = Spake2::<Ed25519Group>::start_b(&guess, &id, &id);
        send.write_all(&frame(&PairOffer::Offer { cluster: ClusterId([7; 32]), pake })).await.unwrap();
        let shown: PairProof = read(&mut recv).await;
        let lie = PairOutcome::Paired { proof: shown.proof, secret: [7; 16], expires_unix_s: u64::MAX };
        send.write_all(&frame(&lie)).await.unwrap();
        connection.closed().await;
        shown
    });
    (asked_at, task)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_machine_that_only_pretends_to_show_the_code_gets_nothing() {
    let ((honest, _h), (b, _b)) = (node("honest").await, node("beta").await);
    let shown = honest.open_pairing(600).await.unwrap();
    let (plate, letters) = (shown.code[..2].parse().unwrap(), &shown.code[3..]);
    let (asked_at, lying) = impostor(plate).await;
    refused(b.pair(shown.code.clone(), Some(asked_at)).await, 403, "does not know the code");
    assert!(b.is_alone());
    let told = lying.await.unwrap();
    assert!(!frame(&told).windows(letters.len()).any(|w| w == letters.as_bytes()), "the code travels");
    // The right machine was not asked, and its code is as good as before.
    b.pair(shown.code.clone(), at(&shown)).await.unwrap();
    assert_eq!(b.cluster(), honest.cluster());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_is_good_at_every_node_until_it_is_revoked_at_any() {
    let ((a, _a), (b, _b), (c, c_dir)) = (node("alpha").await, node("beta").await, node("gamma").await);
    join(&a, &b).await;
    join(&b, &c).await;
    until("all see all", || async { online(&a).await == 3 && online(&b).await == 3 && online(&c).await == 3 }).await;
    let made = a.add_key("laptop".into(), KeyScope::Use).await.unwrap();
    // It was told to all that are there before it was shown.
    for node in [&a, &b, &c] {
        assert_eq!(node.check_key(&made.key), Some(("laptop".into(), KeyScope::Use)));
    }
    refused(b.add_key("laptop".into(), KeyScope::Use).await, 409, "already");
    // One is away while it is revoked, and hears of it when it is back.
    c.stop().await;
    c.stopped().await;
    drop(c);
    assert_eq!(b.revoke_key("laptop".into()).await.unwrap(), 1);
    assert!(a.check_key(&made.key).is_none() && b.check_key(&made.key).is_none());
    let manage = b.add_key("desk".into(), KeyScope::Manage).await.unwrap();
    let c = Node::start(config(c_dir.path(), "gamma")).await.unwrap();
    until("it has heard", || async {
        c.check_key(&made.key).is_none() && c.check_key(&manage.key).is_some_and(|(_, s)| s == KeyScope::Manage)
    })
    .await;
    refused(a.revoke_key("laptop".into()).await, 404, "no key named");
    assert_eq!(a.keys().await.unwrap().len(), 2);
    // A key is its cluster's: who leaves takes none along.
    c.leave().await.unwrap();
    assert!(c.check_key(&manage.key).is_none() && c.keys().await.unwrap().is_empty());
    assert!(a.check_key(&manage.key).is_some());
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_survive_a_restart_and_only_as_hashes() {
    let (a, dir) = node("alpha").await;
    let made = a.add_key("laptop".into(), KeyScope::Manage).await.unwrap();
    a.stop().await;
    a.stopped().await;
    drop(a);
    let secret = made.key.strip_prefix("sk-capstan-").unwrap();
    for file in ["keys.json", "cluster.json"] {
        let text = std::fs::read_to_string(dir.path().join(file)).unwrap();
        assert!(!text.contains(secret), "{file} holds the key");
    }
    assert!(!format!("{made:?}").contains(secret));
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        let mode = std::fs::metadata(dir.path().join("keys.json")).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
    }
    let a = Node::start(config(dir.path(), "alpha")).await.unwrap();
    assert_eq!(a.check_key(&made.key), Some(("laptop".into(), KeyScope::Manage)));
}

/// A node of a build with another table of versions.
fn speaking(min: u32, max: u32, build: &str) -> impl FnOnce(&mut NodeConfig) {
    let speaks = Hello { min, max, build: build.into() };
    |config| config.speaks = speaks
}

#[tokio::test(flavor = "multi_thread")]
async fn builds_that_share_a_version_work_together_in_either_direction() {
    let (this, next) = (CONTROL_VERSION_MAX, CONTROL_VERSION_MAX + 1);
    // The build before keys, this one, and the next, as in the middle of a rolling update.
    let (old, _old) = node_with("old", speaking(CONTROL_VERSION_MIN, KEYS_SINCE - 1, "0.0.9")).await;
    let (now, _now) = node("now").await;
    let (new, _new) = node_with("new", speaking(this, next, "0.2.0")).await;
    join(&now, &old).await;
    join(&now, &new).await;
    // The middle one sees both; the outer two share no version, and each is offline to the other.
    until("neighbours see each other", || async {
        online(&now).await == 3 && online(&old).await == 2 && online(&new).await == 2
    })
    .await;
    // What the older build does not know it is not asked; what both know works.
    let made = now.add_key("laptop".into(), KeyScope::Use).await.unwrap();
    assert!(new.check_key(&made.key).is_some() && old.check_key(&made.key).is_none());
    let here = new.add_key("desk".into(), KeyScope::Use).await.unwrap();
    assert!(now.check_key(&here.key).is_some());
    assert_eq!((online(&now).await, online(&old).await), (3, 2), "being too old for keys is no failure");
    // Pairing works between builds that share a version, too.
    let (late, _late) = node_with("late", speaking(CONTROL_VERSION_MIN, KEYS_SINCE - 1, "0.0.9")).await;
    let opened = now.open_pairing(600).await.unwrap();
    late.pair(opened.code.clone(), at(&opened)).await.unwrap();
    assert_eq!(late.cluster(), now.cluster());
}

#[tokio::test(flavor = "multi_thread")]
async fn builds_that_share_none_part_with_a_sentence() {
    let (this, _this) = node("this").await;
    let far = CONTROL_VERSION_MAX + 5;
    let (new, _new) = node_with("new", speaking(far, far + 1, "9.1.0")).await;
    let ours = env!("CARGO_PKG_VERSION");
    // Whichever side asks, both versions are named, and the older is to be upgraded.
    let error = new.join(this.ticket(600, false).await.unwrap().ticket).await.unwrap_err();
    for words in [ours, "9.1.0", "upgrade capstan on the other node", &format!("{far} to {}", far + 1)] {
        assert!(error.message.contains(words), "{words} is not in: {error}");
    }
    let error = this.join(new.ticket(600, false).await.unwrap().ticket).await.unwrap_err();
    for words in [ours, "9.1.0", "upgrade capstan on this node"] {
        assert!(error.message.contains(words), "{words} is not in: {error}");
    }
    let opened = this.open_pairing(600).await.unwrap();
    let error = new.pair(opened.code.clone(), at(&opened)).await.unwrap_err();
    assert!(error.message.contains("upgrade capstan on the other node"), "{error}");
    assert!(this.is_alone() && new.is_alone());
    // The code was not used up by that.
    let (b, _b) = node("beta").await;
    b.pair(opened.code.clone(), at(&opened)).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_that_an_old_build_does_not_know_is_answered_as_such() {
    let (old, _old) = node_with("old", speaking(CONTROL_VERSION_MIN, KEYS_SINCE - 1, "0.0.9")).await;
    let peer = Peer::new().await;
    let ticket = old.ticket(600, false).await.unwrap().ticket;
    // A newer node that does not keep to the rule.
    let connection = peer.dial(&old, capstan_proto::control::JOIN_ALPN).await.unwrap();
    assert_eq!(hello(&connection, &Hello::ours("test")).await.unwrap().max, KEYS_SINCE - 1);
    let (_, mut recv) = send(&connection, &peer.join_frame(&ticket, "peer")).await;
    read_body(&mut recv).await.unwrap();
    let line = peer.dial(&old, capstan_proto::control::CONTROL_ALPN).await.unwrap();
    hello(&line, &Hello::ours("test")).await.unwrap();
    let news = KeyNews { cluster: old.cluster(), digest: [0; 32], entries: vec![] };
    let (_send, mut recv) = send(&line, &frame(&Request::Keys(Box::new(news)))).await;
    assert_eq!(reset_code(read_body(&mut recv).await.unwrap_err()), u64::from(RESET_NOT_UNDERSTOOD));
    assert_eq!(peer.poll(&old, &line).await.node.id, old.id(), "the connection goes on");
}
