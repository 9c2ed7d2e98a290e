//! Several nodes in one process, over loopback: joining, leaving, refusing, placing, and bringing shards.
//!
//! No compute process is needed here: the command that should start one ends at once, or says by rote what a test needs.
mod support;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use capstan_node::config::Moves;
use capstan_node::{Node, NodeError, Service};
use capstan_proto::child::{CHILD_VERSION, ChildStats, FromChild, PeerAddr, StageInfo};
use capstan_proto::control::{CLOSE_REMOVED, CONTROL_ALPN, Hello, RAFT_ALPN};
use capstan_proto::device::{DeviceProfile, Point, TypeCurve};
use capstan_proto::generate::{ErrorKind, GenerateEvent, GenerateRequest, Prompt};
use capstan_proto::manage::{Health, LoadEvent, LoadRequest};
use capstan_proto::{Epoch, LayerRange, codec, limits};
use support::*;
use tempfile::TempDir;

async fn joined(inviter: &Node, name: &str) -> (Arc<Node>, TempDir) {
    let (new, dir) = node(name).await;
    join(inviter, &new).await;
    (new, dir)
}

async fn names(node: &Node) -> Vec<String> {
    let mut names: Vec<_> = node.status().await.nodes.into_iter().filter(|n| n.online).map(|n| n.name).collect();
    names.sort();
    names
}

fn tiny_model(dir: &Path) -> PathBuf {
    let path = dir.join("tiny.gguf");
    let name = capstan_testkit::tiny::names().into_iter().find(|n| *n == "llama").expect("a tiny llama");
    capstan_testkit::tiny::write(name, &path).unwrap();
    path
}

fn request(path: &Path) -> LoadRequest {
    let path = path.to_string_lossy().into_owned();
    LoadRequest { path, ctx: Some(64), slots: Some(1), ..LoadRequest::default() }
}

async fn outcome(node: &Node, request: LoadRequest) -> Vec<LoadEvent> {
    let mut events = node.load(request).await.unwrap();
    let mut all = vec![];
    while let Some(event) = events.recv().await {
        all.push(event);
    }
    all
}

/// A compute child that says these messages, then neither answers nor ends. Each start adds its number to the file.
/// From where it says that it is connected on, it waits for orders first, and says it again after each.
fn rote_child(dir: &Path, says: &[FromChild]) -> (Vec<std::ffi::OsString>, PathBuf) {
    let (frames, pids) = (dir.join("frames"), dir.join("frames.pids"));
    let write = |path: &Path, says: &[FromChild]| {
        let bytes = says.iter().flat_map(|m| codec::encode(m, limits::MESSAGE_BYTES_MAX).unwrap()).collect::<Vec<_>>();
        std::fs::write(path, bytes).unwrap();
    };
    let unasked = says.iter().position(|m| matches!(m, FromChild::Connected { .. })).unwrap_or(says.len());
    write(&frames, &says[..unasked]);
    write(&dir.join("frames.asked"), &says[unasked..]);
    let order =
        r#"set -- $(dd bs=1 count=4 2>/dev/null | od -An -tu1); dd bs=1 count=$(($1 + $2 * 256)) >/dev/null 2>&1"#;
    let listen = format!(r#"while {order}; do cat "$0.asked"; done 2>/dev/null"#);
    let script = format!(
        r#"case "$1" in --*) exit 1;; esac; echo $$ >> "$0.pids"; cat "$0"; if [ -s "$0.asked" ]; then {listen}; fi; exec sleep 600"#
    );
    (vec!["sh".into(), "-c".into(), script.into(), frames.into()], pids)
}

/// A child says that it is connected, whichever of the first epochs is meant.
fn connected() -> impl Iterator<Item = FromChild> {
    (1..8).map(|epoch| FromChild::Connected { epoch: Epoch(epoch) })
}

fn started(pids: &Path) -> Vec<String> {
    std::fs::read_to_string(pids).unwrap_or_default().lines().map(str::to_owned).collect()
}

fn lives(pid: &str) -> bool {
    std::process::Command::new("sh").args(["-c", "kill -0 \"$0\" 2>/dev/null", pid]).status().unwrap().success()
}

#[tokio::test(flavor = "multi_thread")]
async fn nodes_join_by_ticket_and_leave() {
    let (a, _a) = node("alpha").await;
    let (b, _b) = joined(&a, "alpha").await;
    assert_eq!(b.name(), "alpha-2");
    assert_eq!(b.cluster(), a.cluster());
    assert_eq!(names(&b).await, ["alpha", "alpha-2"]);
    // A node that joins by one member is soon known to all.
    let (c, _c) = joined(&b, "gamma").await;
    until("all know all", || async {
        names(&a).await.len() == 3 && names(&b).await.len() == 3 && names(&c).await.len() == 3
    })
    .await;

    refused(c.join(a.ticket(600, false).await.unwrap().ticket).await, 409, "already");
    let (other, _other) = node("other").await;
    refused(c.join(other.ticket(600, false).await.unwrap().ticket).await, 409, "leave");

    b.leave().await.unwrap();
    assert!(b.is_alone() && b.cluster() != a.cluster());
    assert_eq!(b.status().await.nodes.len(), 1);
    until("it is forgotten", || async { names(&a).await == ["alpha", "gamma"] && names(&c).await.len() == 2 }).await;
    // It may come back, under a name that is free.
    b.join(c.ticket(600, false).await.unwrap().ticket).await.unwrap();
    until("it is back", || async { names(&a).await.len() == 3 }).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn tickets_are_refused_with_the_reason() {
    let (a, _a) = node("a").await;
    let once = a.ticket(600, false).await.unwrap().ticket;
    let (b, _b) = node("b").await;
    b.join(once.clone()).await.unwrap();
    let (c, _c) = node("c").await;
    refused(c.join(once.clone()).await, 410, "used already");
    let mut wrong = once.clone();
    wrong.pop();
    refused(c.join(wrong).await, 400, "no whole ticket");
    refused(c.join("hello".into()).await, 400, "no whole ticket");
    refused(c.ticket(0, false).await, 400, "seconds");

    // A ticket of a cluster that its issuer has left.
    let stale = b.ticket(600, true).await.unwrap().ticket;
    b.leave().await.unwrap();
    refused(c.join(stale).await, 409, "another cluster");

    // An issuer that is gone.
    let (d, _d) = node("d").await;
    let lost = d.ticket(600, true).await.unwrap().ticket;
    d.stop().await;
    refused(c.join(lost).await, 502, "cannot be reached");

    let many = a.ticket(600, true).await.unwrap().ticket;
    b.join(many.clone()).await.unwrap();
    c.join(many).await.unwrap();
    until("all are there", || async { names(&c).await.len() == 3 }).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_that_is_no_member_is_refused() {
    let (a, _a) = node("a").await;
    let stranger = iroh::Endpoint::builder(iroh::endpoint::presets::Minimal)
        .relay_mode(iroh::RelayMode::Disabled)
        .clear_ip_transports()
        .bind_addr("127.0.0.1:0")
        .unwrap()
        .bind()
        .await
        .unwrap();
    let key = iroh::EndpointId::from_bytes(&a.id().0).unwrap();
    for alpn in [CONTROL_ALPN, RAFT_ALPN, capstan_store::BLOBS_ALPN] {
        let addrs = a.addrs().into_iter().map(iroh::TransportAddr::Ip);
        let addr = iroh::EndpointAddr::from_parts(key, addrs);
        // It may be closed during the handshake already, or right after it.
        let Ok(connection) = stranger.connect(addr, alpn).await else { continue };
        if let Ok((mut send, mut recv)) = connection.open_bi().await {
            let hello = capstan_proto::codec::encode(&Hello::ours("x"), 1024).unwrap();
            send.write_all(&hello).await.ok();
            assert!(recv.read_to_end(1024).await.is_err(), "a stranger was answered");
        }
        connection.closed().await;
    }
    stranger.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_comes_back_to_its_cluster() {
    let (a, _a) = node("a").await;
    let (b, dir) = joined(&a, "b").await;
    let (id, cluster, addrs) = (b.id(), b.cluster(), b.addrs());
    assert!(matches!(Node::start(config(dir.path(), "b")).await, Err(NodeError::Store(_))), "one daemon a folder");
    b.stop().await;
    b.stopped().await;
    drop(b);
    until("a notices", || async { names(&a).await == ["a"] }).await;
    let b = Node::start(config(dir.path(), "b")).await.unwrap();
    assert_eq!((b.id(), b.cluster(), b.addrs()), (id, cluster, addrs));
    until("both meet again", || async { names(&a).await.len() == 2 && names(&b).await.len() == 2 }).await;
}

async fn voters(node: &Node) -> usize {
    node.status().await.nodes.into_iter().filter(|n| n.votes).count()
}

async fn stop(node: Arc<Node>) {
    node.stop().await;
    node.stopped().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn one_votes_of_two_and_three_of_three() {
    let (a, _a) = node("a").await;
    assert_eq!(a.status().await.agreement, "");
    let (b, _b) = joined(&a, "b").await;
    until("it learns", || async { b.status().await.agreement.contains("node a votes alone") }).await;
    assert_eq!(voters(&b).await, 1);
    let (c, _c) = joined(&b, "c").await;
    until("all vote", || async { voters(&a).await == 3 && voters(&c).await == 3 }).await;
    // Whoever goes gives its vote away first.
    a.leave().await.unwrap();
    until("one is left", || async { voters(&b).await == 1 && voters(&c).await == 1 }).await;
    b.ticket(600, false).await.unwrap();
    c.ticket(600, false).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_restarts_alone_reads_and_says_why_it_changes_nothing() {
    let (a, a_dir) = node("a").await;
    let (b, b_dir) = joined(&a, "b").await;
    let (c, _c) = joined(&a, "c").await;
    until("all vote", || async { voters(&b).await == 3 && voters(&c).await == 3 }).await;
    let cluster = a.cluster();
    stop(a).await;
    stop(b).await;
    stop(c).await;

    let b = Node::start(config(b_dir.path(), "b")).await.unwrap();
    let status = b.status().await;
    let mut all: Vec<_> = status.nodes.iter().map(|n| n.name.as_str()).collect();
    all.sort();
    assert_eq!((all, status.cluster), (vec!["a", "b", "c"], cluster));
    refused(b.ticket(600, false).await, 503, "2 of 3 voters do not answer");
    refused(b.remove_node("c".into()).await, 503, "2 must");
    assert!(b.status().await.agreement.contains("nothing can be changed now"));
    // With a second one it is a majority.
    let a = Node::start(config(a_dir.path(), "a")).await.unwrap();
    until("it may change again", || async { b.ticket(600, false).await.is_ok() }).await;
    a.ticket(600, false).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_removed_key_is_refused_everywhere_also_by_who_was_away() {
    let (a, _a) = node("a").await;
    let (b, b_dir) = joined(&a, "b").await;
    let (c, c_dir) = joined(&a, "c").await;
    until("all vote", || async { voters(&a).await == 3 && voters(&b).await == 3 && voters(&c).await == 3 }).await;
    stop(b).await;
    refused(a.remove_node("a".into()).await, 409, "capstan leave");
    refused(a.remove_node("zeta".into()).await, 404, "no node");
    a.remove_node("c".into()).await.unwrap();
    assert_eq!(a.status().await.nodes.len(), 2);
    until("it is alone", || async { c.is_alone() && c.cluster() != a.cluster() }).await;
    refused(c.join(a.ticket(600, true).await.unwrap().ticket).await, 410, "removed from this cluster");

    // It comes with its key when the one that was away is back.
    let key = std::fs::read_to_string(c_dir.path().join("node.key")).unwrap();
    stop(c).await;
    let b = Node::start(config(b_dir.path(), "b")).await.unwrap();
    until("it is back", || async { names(&b).await == ["a", "b"] }).await;
    refused(b.remove_node("c".into()).await, 404, "no node");
    let key: [u8; 32] = hex::decode(key.trim()).unwrap().try_into().unwrap();
    let removed = iroh::Endpoint::builder(iroh::endpoint::presets::Minimal)
        .secret_key(iroh::SecretKey::from_bytes(&key))
        .relay_mode(iroh::RelayMode::Disabled)
        .clear_ip_transports()
        .bind_addr("127.0.0.1:0")
        .unwrap()
        .bind()
        .await
        .unwrap();
    for (node, alpn) in [&a, &b].into_iter().flat_map(|n| [(n, CONTROL_ALPN), (n, RAFT_ALPN)]) {
        let id = iroh::EndpointId::from_bytes(&node.id().0).unwrap();
        let addrs = node.addrs().into_iter().map(iroh::TransportAddr::Ip);
        let connection = match removed.connect(iroh::EndpointAddr::from_parts(id, addrs), alpn).await {
            Ok(connection) => connection,
            // It was closed during the handshake already.
            Err(error) => {
                assert!(format!("{error:?}").contains("was removed"), "{error:?}");
                continue;
            }
        };
        let iroh::endpoint::ConnectionError::ApplicationClosed(close) = connection.closed().await else {
            panic!("it was not refused")
        };
        assert_eq!(close.error_code, iroh::endpoint::VarInt::from_u32(CLOSE_REMOVED));
    }
    removed.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_folder_of_before_the_log_is_taken_up() {
    let dir = tempfile::tempdir().unwrap();
    // A key is made first: the file names it.
    let a = Node::start(config(dir.path(), "a")).await.unwrap();
    let id = a.id();
    stop(a).await;
    std::fs::remove_dir_all(dir.path().join("raft")).unwrap();
    let (cluster, other) = ("cd".repeat(32), "ff".repeat(32));
    let member = |id: &str, name: &str| {
        serde_json::json!({
            "id": id, "name": name, "addrs": ["127.0.0.1:9"], "version": "0.1.0", "state": "active", "stamp": 1,
        })
    };
    let old = serde_json::json!({
        "cluster": cluster, "name": "a", "tickets": { "issued": [] },
        "members": [member(&id.to_string(), "a"), member(&other, "z")],
    });
    std::fs::write(dir.path().join("cluster.json"), old.to_string()).unwrap();
    let a = Node::start(config(dir.path(), "a")).await.unwrap();
    assert_eq!(a.cluster().to_string(), cluster);
    let names: Vec<_> = a.status().await.nodes.into_iter().map(|n| n.name).collect();
    assert_eq!(names, ["a", "z"]);
    a.remove_node("z".into()).await.unwrap();
    assert!(a.is_alone());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_taken_port_is_said() {
    let (a, _a) = node("a").await;
    let dir = tempfile::tempdir().unwrap();
    let mut config = config(dir.path(), "b");
    config.bind_addr = a.addrs()[0];
    let error = Node::start(config).await.err().expect("the port is taken");
    assert!(matches!(error, NodeError::PortTaken { .. }), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn loads_that_cannot_be_are_refused() {
    let (a, dir) = node("a").await;
    let path = tiny_model(dir.path());
    let with = |change: &dyn Fn(&mut LoadRequest)| {
        let mut r = request(&path);
        change(&mut r);
        r
    };
    refused(a.load(with(&|r| r.path.push_str(".missing"))).await, 400, "cannot be read");
    refused(a.load(with(&|r| r.slots = Some(0))).await, 400, "slots");
    refused(a.load(with(&|r| r.decode_slowdown = Some(0.5))).await, 400, "take 1 to 10 times");
    refused(a.load(with(&|r| r.decode_slowdown = Some(f32::NAN))).await, 400, "take 1 to 10 times");
    refused(a.load(with(&|r| r.draft = Some("/no/such.gguf".into()))).await, 400, "cannot be read on node a");
    let pointless = |r: &mut LoadRequest| (r.speculation, r.draft) = (Some(false), Some(r.path.clone()));
    refused(a.load(with(&pointless)).await, 400, "with speculation off");
    refused(a.load(with(&|r| r.name = Some("\n".into()))).await, 400, "no name");
    refused(a.load(with(&|r| r.nodes = vec!["zeta".into()])).await, 400, "no node \"zeta\"");
    let half = LayerRange::new(0, 1).unwrap();
    refused(a.load(with(&|r| r.layers = vec![("a".into(), half)])).await, 400, "on no node");
    std::fs::write(dir.path().join("bad.gguf"), b"GGUFxxxx").unwrap();
    refused(a.load(request(&dir.path().join("bad.gguf"))).await, 400, "bad.gguf");

    let error = a.generate(GenerateRequest::new("x", Prompt::Text("hi".into()))).await.unwrap_err();
    assert_eq!(error.kind, ErrorKind::ModelNotFound);
    refused(a.unload("x".into()).await, 404, "no model");

    let small_dir = tempfile::tempdir().unwrap();
    let mut small = config(small_dir.path(), "small");
    small.memory_limit_bytes = Some(1 << 20);
    let small = Node::start(small).await.unwrap();
    refused(small.load(request(&path)).await, 409, "small lacks");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_shard_reaches_its_node_and_a_dead_child_ends_the_load() {
    let (a, a_dir) = node("a").await;
    let (_b, b_dir) = joined(&a, "b").await;
    let path = tiny_model(a_dir.path());
    let mut r = request(&path);
    r.nodes = vec!["b".into(), "a".into()];
    let events = outcome(&a, r.clone()).await;
    let Some(LoadEvent::Planned { stages, .. }) = events.first() else { panic!("{events:?}") };
    let Some(LoadEvent::Failed { message }) = events.last() else { panic!("{events:?}") };
    assert!(message.contains("stage ") && message.contains("exit code 1"), "{message}");
    assert!(a.status().await.deployments.is_empty());
    // Nothing that was cut is left behind.
    assert_eq!(std::fs::read_dir(a_dir.path().join("shards-out")).unwrap().count(), 0);

    // The stage elsewhere may have been stopped before its shard came; alone it must come.
    let model = capstan_gguf::Model::open(&path).unwrap();
    r.nodes = vec!["b".into()];
    let events = outcome(&a, r).await;
    let Some(LoadEvent::Failed { message }) = events.last() else { panic!("{events:?}") };
    assert!(message.contains("stage 0 on node b"), "{message}");
    let whole: Vec<_> = std::fs::read_dir(b_dir.path().join("shards"))
        .unwrap()
        .map(|e| e.unwrap().metadata().unwrap().len())
        .filter(|&len| len == model.bytes())
        .collect();
    assert_eq!(whole.len(), 1);
    assert!(path.exists(), "the model itself is never taken for a shard");
    assert_eq!(stages.len(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_draft_model_reaches_the_driver_and_a_second_load_cuts_nothing() {
    // They load, and are never wired: nothing more is needed of them.
    let says = [
        FromChild::Hello { version: CHILD_VERSION },
        FromChild::Loaded { addr: PeerAddr { key: [7; 32], addrs: vec![] }, info: StageInfo::default() },
    ];
    let rote = async |name: &str| {
        let dir = tempfile::tempdir().unwrap();
        let mut config = config(dir.path(), name);
        config.compute_command = rote_child(dir.path(), &says).0;
        (Node::start(config).await.unwrap(), dir)
    };
    let ((a, a_dir), (b, b_dir)) = (rote("a").await, rote("b").await);
    b.join(a.ticket(600, false).await.unwrap().ticket).await.unwrap();
    let path = tiny_model(a_dir.path());
    let draft = a_dir.path().join("draft.gguf");
    capstan_testkit::tiny::write("qwen2", &draft).unwrap();
    let mut r = request(&path);
    (r.nodes, r.draft) = (vec!["a".into(), "b".into()], Some(draft.to_string_lossy().into_owned()));
    let shards = |dir: &Path| {
        let files = std::fs::read_dir(dir.join("shards")).unwrap().map(|e| e.unwrap().path());
        files.map(|p| std::fs::read(p).unwrap()).collect::<Vec<_>>()
    };
    // How often it told of a cut until both stages were loaded.
    let cuts = async |r: LoadRequest| {
        let (mut events, mut cuts, mut loaded) = (a.load(r).await.unwrap(), 0, 0);
        while loaded < 2 {
            match events.recv().await.expect("the load goes on") {
                LoadEvent::Cutting { .. } => cuts += 1,
                LoadEvent::Loaded { .. } => loaded += 1,
                LoadEvent::Failed { message } => panic!("{message}"),
                _ => {}
            }
        }
        a.unload("tiny".into()).await.unwrap();
        cuts
    };

    assert!(cuts(r.clone()).await > 0);
    assert_eq!((shards(a_dir.path()).len(), shards(b_dir.path()).len()), (1, 2));
    assert!(shards(b_dir.path()).contains(&std::fs::read(&draft).unwrap()), "the draft model as it is");
    assert!(path.exists() && draft.exists(), "a model is never taken for a shard");
    assert_eq!(cuts(r).await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_child_that_cannot_load_is_ended_and_ends_the_load() {
    let dir = tempfile::tempdir().unwrap();
    let hello = FromChild::Hello { version: CHILD_VERSION };
    let (command, pids) = rote_child(dir.path(), &[hello, FromChild::Failed { reason: "a bad tensor".into() }]);
    let mut config = config(dir.path(), "a");
    config.compute_command = command;
    let a = Node::start(config).await.unwrap();
    let events = outcome(&a, request(&tiny_model(dir.path()))).await;
    let Some(LoadEvent::Failed { message }) = events.last() else { panic!("{events:?}") };
    assert!(message.contains("could not load: a bad tensor"), "{message}");
    let pids = started(&pids);
    assert!(pids.len() == 1 && !lives(&pids[0]), "{pids:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_driver_that_says_nothing_of_its_requests_is_started_again() {
    let dir = tempfile::tempdir().unwrap();
    let says = [
        FromChild::Hello { version: CHILD_VERSION },
        FromChild::Loaded { addr: PeerAddr { key: [7; 32], addrs: vec![] }, info: StageInfo::default() },
    ];
    let (command, pids) = rote_child(dir.path(), &says.into_iter().chain(connected()).collect::<Vec<_>>());
    let mut config = config(dir.path(), "a");
    (config.compute_command, config.stall_limit) = (command, Duration::from_millis(200));
    let a = Node::start(config).await.unwrap();
    let events = outcome(&a, request(&tiny_model(dir.path()))).await;
    assert!(matches!(events.last(), Some(LoadEvent::Ready { .. })), "{events:?}");
    let mut answer = a.generate(GenerateRequest::new("tiny", Prompt::Text("hi".into()))).await.unwrap();
    // The request itself is not lost: it waits for the next one.
    let Some(GenerateEvent::Paused { reason }) = answer.recv().await else { panic!("it said something else") };
    assert!(reason.contains("made no progress"), "{reason}");
    until("it is started again", || async { started(&pids).len() == 2 }).await;
    assert!(!lives(&started(&pids)[0]));
    a.unload("tiny".into()).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_coordinator_that_comes_back_gets_its_stage_though_the_old_one_still_ends() {
    let (a, a_dir) = node("a").await;
    let path = tiny_model(a_dir.path());
    let events = outcome(&a, request(&path)).await;
    let Some(LoadEvent::Planned { stages, .. }) = events.first() else { panic!("{events:?}") };
    let need = stages[0].memory_bytes;

    // A node with memory for one stage, whose process does not end when it is asked to.
    let b_dir = tempfile::tempdir().unwrap();
    let says = [
        FromChild::Hello { version: CHILD_VERSION },
        FromChild::Loaded {
            addr: PeerAddr { key: [7; 32], addrs: vec![] },
            info: StageInfo { kv_bytes: need, ..StageInfo::default() },
        },
    ];
    let says: Vec<_> = says.into_iter().chain(connected()).collect();
    let (command, pids) = rote_child(b_dir.path(), &says);
    let mut b_config = config(b_dir.path(), "b");
    b_config.compute_command = command;
    b_config.memory_limit_bytes = Some(need + need / 2);
    let b = Node::start(b_config).await.unwrap();
    b.join(a.ticket(600, false).await.unwrap().ticket).await.unwrap();
    let mut on_b = request(&path);
    on_b.nodes = vec!["b".into()];
    let events = outcome(&a, on_b).await;
    assert!(matches!(events.last(), Some(LoadEvent::Ready { .. })), "{events:?}");

    a.stop().await;
    a.stopped().await;
    drop(a);
    let a = Node::start(config(a_dir.path(), "a")).await.unwrap();
    let health = || async { a.status().await.deployments.first().map(|d| d.health) };
    until("it is ready again", || async { health().await == Some(Health::Ready) }).await;
    let detail = a.status().await.deployments[0].detail.clone();
    assert!(!detail.contains("memory"), "{detail}");
    assert_eq!(a.status().await.deployments[0].epoch, Epoch(2), "an epoch never comes twice");
    let pids = started(&pids);
    assert!(pids.len() == 2 && !lives(&pids[0]) && lives(&pids[1]), "{pids:?}");
    let name = a.status().await.deployments[0].name.clone();
    a.unload(name).await.unwrap();
    assert!(!lives(&pids[1]), "unload waits for the process's end");
}

/// A device profile with which a layer takes so long for a row, whatever its weights.
fn device(layer_s: f64) -> DeviceProfile {
    let point = |fs| vec![Point { rows: 1, fs }];
    let fs = (layer_s * 1e15) as u64;
    let curve = TypeCurve { ggml_type: 0, per_weight: point(1), per_cached_weight: point(1), copied: false };
    DeviceProfile {
        hardware: "a test".into(),
        types: vec![curve],
        per_layer: point(fs),
        per_decode_layer: point(fs),
        layer_width: 64,
        attention_decode_fs: 1,
        attention_chunk_fs: 1,
        logit_fs: 1,
        ..DeviceProfile::default()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_model_moves_by_itself_to_a_node_that_is_faster_and_says_why() {
    // Ready at once; then rows are computed, ever more of them, with pauses in which nobody asks anything.
    let says = [
        FromChild::Hello { version: CHILD_VERSION },
        FromChild::Loaded { addr: PeerAddr { key: [7; 32], addrs: vec![] }, info: StageInfo::default() },
    ];
    let says: Vec<_> = says.into_iter().chain(connected()).collect();
    let start = async |name: &str, layer_s: f64| {
        let dir = tempfile::tempdir().unwrap();
        let mut config = config(dir.path(), name);
        let (mut command, _) = rote_child(dir.path(), &says);
        for i in 0..10 {
            let stats = FromChild::Stats(ChildStats { rows: 1000 * (i + 1), ..ChildStats::default() });
            let frame = codec::encode(&stats, limits::MESSAGE_BYTES_MAX).unwrap();
            std::fs::write(dir.path().join(format!("frames.{i}")), frame).unwrap();
        }
        // After each order, of which a ping comes every second.
        let rows = r#"cat "$0.asked"; cat "$0.$((i))"; i=$((i + 1))"#;
        command[2] = command[2].to_str().unwrap().replace(r#"cat "$0.asked""#, rows).into();
        config.compute_command = command;
        config.moves = Moves { look_every: Duration::from_millis(50), watched_min: Duration::ZERO };
        let profile = serde_json::to_vec(&device(layer_s)).unwrap();
        std::fs::write(dir.path().join("device.json"), profile).unwrap();
        (Node::start(config).await.unwrap(), dir)
    };
    let (slow, slow_dir) = start("slow", 0.2).await;
    let events = outcome(&slow, request(&tiny_model(slow_dir.path()))).await;
    assert!(matches!(events.last(), Some(LoadEvent::Ready { .. })), "{events:?}");
    let served_by = || async {
        let deployment = slow.status().await.deployments.into_iter().next();
        deployment.filter(|d| d.health == Health::Ready).map(|d| (d.stages[0].node_name.clone(), d.detail))
    };
    assert_eq!(served_by().await, Some(("slow".into(), String::new())));

    let (fast, _dir) = start("fast", 0.001).await;
    fast.join(slow.ticket(600, false).await.unwrap().ticket).await.unwrap();
    until("it is served by the fast node", || async { served_by().await.is_some_and(|(node, _)| node == "fast") })
        .await;
    let (_, detail) = served_by().await.unwrap();
    assert!(detail.contains("moved by itself") && detail.contains("% faster"), "{detail}");
    slow.unload("tiny".into()).await.unwrap();
}
