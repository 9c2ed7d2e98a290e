//! Models come into a cluster of several nodes in one process: from a server that speaks the hub's protocol and fails, and
//! from each other.
mod support;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use capstan_gguf::Model;
use capstan_node::{Hub as HubConfig, Node, NodeConfig, Service, Weights};
use capstan_proto::LayerRange;
use capstan_proto::manage::{LoadEvent, LoadRequest};
use capstan_proto::weights::{ModelStatus, PullEvent, PullRequest};
use capstan_testkit::hub::{COMMIT, Hub};
use support::{config, join, node_with, until};
use tempfile::TempDir;

const FILE: &str = "q4/Smol-Q4_1.gguf";

struct Member {
    node: Arc<Node>,
    dir: TempDir,
}

fn with_hub(mut config: NodeConfig, hub: &Hub) -> NodeConfig {
    config.hub = Some(HubConfig { endpoint: hub.endpoint(), token: None });
    config
}

async fn start(name: &str, hub: &Hub) -> Member {
    let (node, dir) = node_with(name, |config| *config = with_hub(config.clone(), hub)).await;
    Member { node, dir }
}

/// Nodes `a`, `b`, … of one cluster.
async fn cluster(n: usize, hub: &Hub) -> Vec<Member> {
    let mut members: Vec<Member> = Vec::new();
    for name in ["a", "b", "c", "d"].into_iter().take(n) {
        let member = start(name, hub).await;
        if let Some(first) = members.first() {
            join(&first.node, &member.node).await;
        }
        members.push(member);
    }
    for member in &members {
        until("all see all", || async { member.node.status().await.nodes.iter().filter(|m| m.online).count() == n })
            .await;
    }
    members
}

fn smol() -> Vec<u8> {
    std::fs::read(capstan_testkit::models::smollm2()).unwrap()
}

fn request(source: &str, layers: &[(&str, u32, u32)]) -> PullRequest {
    PullRequest {
        source: source.into(),
        layers: layers.iter().map(|(n, a, b)| (n.to_string(), LayerRange::new(*a, *b).unwrap())).collect(),
        replicas: Some(1),
        ..PullRequest::default()
    }
}

async fn pulled(node: &Node, request: PullRequest) -> Vec<PullEvent> {
    let mut events = node.pull(request).await.unwrap();
    let mut all = Vec::new();
    while let Some(event) = events.recv().await {
        all.push(event);
    }
    all
}

/// Bytes that came from outside, of a pull that went well.
fn outside(events: &[PullEvent]) -> u64 {
    match events.last() {
        Some(PullEvent::Done { outside_bytes, .. }) => *outside_bytes,
        other => panic!("{other:?}"),
    }
}

fn failure(events: &[PullEvent]) -> &str {
    match events.last() {
        Some(PullEvent::Failed { message }) => message,
        other => panic!("{other:?}"),
    }
}

/// The files in a node's `shards` folder, by content.
fn shards(member: &Member) -> Vec<Vec<u8>> {
    let files = std::fs::read_dir(member.dir.path().join("shards")).unwrap();
    // One that goes between the listing and the reading is gone.
    files.filter_map(|f| std::fs::read(f.unwrap().path()).ok()).collect()
}

/// The shard of a range as one who has the whole file cuts it.
fn cut(dir: &Path, range: (u32, u32)) -> Vec<u8> {
    let model = Model::open(&capstan_testkit::models::smollm2()).unwrap();
    let path = dir.join(format!("{}.gguf", range.0));
    let range = LayerRange::new(range.0, range.1).unwrap();
    model.write_shard(range, &path, &mut |_, _| std::ops::ControlFlow::Continue(())).unwrap();
    std::fs::read(path).unwrap()
}

fn holders(model: &ModelStatus) -> BTreeMap<String, Vec<String>> {
    model.parts.iter().map(|p| (p.what.clone(), p.nodes.clone())).collect()
}

const THIRDS: [(&str, u32, u32); 3] = [("a", 0, 10), ("b", 10, 20), ("c", 20, 30)];

#[tokio::test(flavor = "multi_thread")]
async fn each_node_fetches_its_layers_and_each_byte_comes_from_outside_once() {
    let content = smol();
    let hub = Hub::start(vec![("README.md", b"hello".to_vec()), (FILE, content.clone())]);
    *hub.behaviour().token.lock().unwrap() = Some("hf_secret".into());
    let members = cluster(3, &hub).await;
    let refused = pulled(&members[0].node, request("hf:o/r", &THIRDS)).await;
    assert!(failure(&refused).contains("HF_TOKEN"), "{refused:?}");
    *hub.behaviour().token.lock().unwrap() = None;

    let events = pulled(&members[0].node, request("hf:o/r", &THIRDS)).await;
    let Some(PullEvent::Planned { revision, files, .. }) = events.first() else { panic!("{events:?}") };
    assert_eq!((revision.as_deref(), files.len()), (Some(COMMIT), 3), "pinned to a commit, a file for each node");
    let sent = hub.sent(FILE);
    assert!(sent.iter().all(|n| *n == 1), "{} bytes were not sent once", sent.iter().filter(|n| **n != 1).count());
    assert_eq!(hub.sent_bytes(), content.len() as u64);
    for (member, (_, from, to)) in members.iter().zip(THIRDS) {
        assert!(shards(member).contains(&cut(member.dir.path(), (from, to))), "layers {from}..{to}, byte by byte");
    }

    // Every node knows who has what, and writes the very file that was pulled.
    for member in &members {
        until("every node knows", || async {
            let models = member.node.models().await;
            let all = [("layers 0..10", "a"), ("layers 10..20", "b"), ("layers 20..30", "c")];
            models.first().is_some_and(|m| {
                let who = holders(m);
                m.copies >= 1 && all.iter().all(|(part, node)| who[*part].contains(&node.to_string()))
            })
        })
        .await;
    }
    let out = members[1].dir.path().join("out.gguf");
    let exported = members[1].node.export_model("Smol-Q4_1".into(), out.clone()).await.unwrap();
    assert!(exported.done.iter().any(|d| d.contains("SHA-256")), "{exported:?}");
    assert!(std::fs::read(&out).unwrap() == content, "byte by byte");
    assert!(members[1].node.export_model("Smol-Q4_1".into(), out).await.is_err(), "nothing is overwritten");
    assert_eq!(hub.sent_bytes(), content.len() as u64, "that came from the nodes alone");
    assert_eq!(hub.tokens_leaked(), 0);

    // Other layers on other nodes come from nodes, too.
    let halves = [("c", 0, 15), ("a", 15, 30)];
    assert_eq!(outside(&pulled(&members[2].node, request("hf:o/r", &halves)).await), 0);
    assert!(shards(&members[2]).contains(&cut(members[2].dir.path(), (0, 15))));
    assert_eq!(hub.sent_bytes(), content.len() as u64);

    let removed = members[0].node.remove_model("Smol-Q4_1".into()).await.unwrap();
    assert!(removed.trouble.is_empty());
    for member in &members {
        until("it is gone everywhere", || async { member.node.models().await.is_empty() && shards(member).is_empty() })
            .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_source_that_fails_breaks_off_and_is_killed_costs_nothing_but_time() {
    let content = smol();
    let mut hub = Hub::start(vec![(FILE, content.clone())]);
    let members = cluster(2, &hub).await;
    hub.behaviour().errors.store(3, Ordering::SeqCst);
    hub.behaviour().cuts.store(3, Ordering::SeqCst);
    hub.hold_after(content.len() as i64 / 3);
    let mut events = members[0].node.pull(request("hf:o/r@main", &[("a", 0, 15), ("b", 15, 30)])).await.unwrap();
    until("a third was sent", || async { hub.sent_bytes() >= content.len() as u64 / 3 }).await;
    hub.kill();
    assert!(shards(&members[1]).is_empty(), "nothing half-written is visible");
    hub.hold_after(-1);
    hub.restart();
    let mut last = None;
    while let Some(event) = events.recv().await {
        last = Some(event);
    }
    let Some(PullEvent::Done { outside_bytes, .. }) = last else { panic!("{last:?}") };
    let head = 1 << 20;
    assert!(
        outside_bytes <= content.len() as u64 - head,
        "{outside_bytes}: a byte that arrived is not asked for again"
    );
    assert!(shards(&members[0]).contains(&cut(members[0].dir.path(), (0, 15))));
    assert!(shards(&members[1]).contains(&cut(members[1].dir.path(), (15, 30))));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_daemon_that_ends_in_the_middle_goes_on_with_what_it_has() {
    let content = smol();
    let hub = Hub::start(vec![(FILE, content.clone())]);
    let a = start("a", &hub).await;
    hub.hold_after(content.len() as i64 / 2);
    let events = a.node.pull(request("hf:o/r", &[])).await.unwrap();
    until("half was sent", || async { hub.sent_bytes() >= content.len() as u64 / 2 }).await;
    // What has arrived is noted once a second.
    let noted = || {
        let blobs = std::fs::read_dir(a.dir.path().join("blobs")).unwrap();
        let path = blobs.map(|e| e.unwrap().path()).find(|p| p.extension().is_some_and(|e| e == "assembly-done"));
        let ranges: Vec<(u64, u64)> =
            path.and_then(|p| serde_json::from_slice(&std::fs::read(p).ok()?).ok()).unwrap_or_default();
        ranges.iter().map(|(from, end)| end - from).sum::<u64>()
    };
    until("most of it is noted", || async { noted() > content.len() as u64 * 2 / 5 }).await;
    let Member { node, dir } = a;
    node.stop().await;
    drop((node, events));
    assert!(std::fs::read_dir(dir.path().join("shards")).unwrap().count() <= 1, "the head, and nothing half-written");

    hub.hold_after(-1);
    let node = Node::start(with_hub(config(dir.path(), "a"), &hub)).await.unwrap();
    until("it went on by itself", || async { !node.models().await.is_empty() }).await;
    let a = Member { node, dir };
    assert!(shards(&a).contains(&content), "byte by byte");
    assert!(hub.sent_bytes() < content.len() as u64 * 5 / 4, "{} bytes were sent", hub.sent_bytes());
    let status = &a.node.models().await[0];
    assert_eq!((status.revision.as_deref(), status.copies), (Some(COMMIT), 1));
    assert!(a.node.verify_model(status.name.clone()).await.unwrap().trouble.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_flipped_bit_is_noticed_and_nothing_of_it_stays() {
    let content = smol();
    let hub = Hub::start(vec![(FILE, content.clone())]);
    let members = cluster(2, &hub).await;
    let halves = [("a", 0, 15), ("b", 15, 30)];
    hub.behaviour().flip.store(content.len() as i64 / 2, Ordering::SeqCst);
    let events = pulled(&members[0].node, request("hf:o/r", &halves)).await;
    let message = failure(&events);
    assert!(message.contains("SHA-256") && message.contains(FILE) && message.contains("pull it again"), "{message}");
    for member in &members {
        assert!(shards(member).is_empty() && member.node.models().await.is_empty());
        let left = std::fs::read_dir(member.dir.path().join("blobs")).unwrap();
        let left: Vec<_> =
            left.map(|e| e.unwrap().path()).filter(|p| p.extension().is_some_and(|e| e == "assembly")).collect();
        assert!(left.is_empty(), "{left:?}");
    }
    hub.behaviour().flip.store(-1, Ordering::SeqCst);
    assert!(outside(&pulled(&members[0].node, request("hf:o/r", &halves)).await) > 0);
    assert!(shards(&members[1]).contains(&cut(members[1].dir.path(), (15, 30))));

    // On a disk that rots it is noticed, too, and mended from the source.
    let path = std::fs::read_dir(members[1].dir.path().join("shards"))
        .unwrap()
        .map(|e| e.unwrap().path())
        .find(|p| std::fs::metadata(p).unwrap().len() > 20 << 20)
        .unwrap();
    rot(&path, 30 << 20);
    let verified = members[0].node.verify_model("Smol-Q4_1".into()).await.unwrap();
    assert!(verified.trouble.iter().any(|t| t.contains("layers 15..30 on node b")), "{verified:?}");
    assert!(verified.done.iter().any(|d| d.contains("was mended from")), "{verified:?}");
    assert!(members[0].node.verify_model("Smol-Q4_1".into()).await.unwrap().trouble.is_empty());
}

/// Changes one bit and leaves size and time of change as they were: what a failing disk does.
fn rot(path: &Path, offset: u64) {
    use std::os::unix::fs::FileExt;
    let modified = std::fs::metadata(path).and_then(|m| m.modified()).unwrap();
    let file = std::fs::File::options().read(true).write(true).open(path).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, offset).unwrap();
    file.write_all_at(&[byte[0] ^ 1], offset).unwrap();
    file.set_modified(modified).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_that_is_full_says_so_and_a_pull_goes_on_when_there_is_room() {
    let content = smol();
    let hub = Hub::start(vec![(FILE, content.clone())]);
    let dir = tempfile::tempdir().unwrap();
    let mut small = with_hub(config(dir.path(), "a"), &hub);
    small.disk_limit_bytes = Some(50 << 20);
    let node = Node::start(small).await.unwrap();
    let events = pulled(&node, request("hf:o/r", &[])).await;
    let message = failure(&events);
    assert!(message.contains("disk_limit") && message.contains("short of"), "{message}");
    assert!(hub.sent_bytes() <= 2 << 20, "the room is looked at before: {} bytes came", hub.sent_bytes());
    assert!(node.models().await.is_empty());
    node.stop().await;
    drop(node);
    let node = Node::start(with_hub(config(dir.path(), "a"), &hub)).await.unwrap();
    until("it goes on by itself", || async { !node.models().await.is_empty() }).await;
    assert!(shards(&Member { node, dir }).contains(&content));
    assert!(hub.sent(FILE).iter().all(|n| *n == 1), "the head was kept");
}

#[tokio::test(flavor = "multi_thread")]
async fn layers_are_copied_and_a_model_outlives_a_node_without_the_source() {
    let content = smol();
    let mut hub = Hub::start(vec![(FILE, content.clone())]);
    let mut members = cluster(3, &hub).await;
    let two = PullRequest { replicas: None, ..request("hf:o/r", &[("a", 0, 15), ("b", 15, 30)]) };
    pulled(&members[0].node, two).await;
    hub.kill();
    until("every layer has two copies", || async {
        members[2].node.models().await.first().is_some_and(|m| m.copies == 2)
    })
    .await;
    // The one that pulled it is gone for good.
    let first = members.remove(0);
    first.node.stop().await;
    drop(first);
    let out = members[0].dir.path().join("out.gguf");
    until("the others notice", || async {
        members[0].node.status().await.nodes.iter().filter(|n| n.online).count() == 2
    })
    .await;
    members[0].node.export_model("Smol-Q4_1".into(), out.clone()).await.unwrap();
    assert!(std::fs::read(out).unwrap() == content);

    // A load on another placement gets its shards from what is here; the processes of this test do not start.
    let layers = [("c", 0, 12), ("b", 12, 30)].map(|(n, from, to)| (n.into(), LayerRange::new(from, to).unwrap()));
    let path = "pulled:Smol-Q4_1".into();
    let load = LoadRequest { path, layers: layers.into(), ctx: Some(64), slots: Some(1), ..LoadRequest::default() };
    let mut events = members[0].node.load(load).await.unwrap();
    while let Some(event) = events.recv().await {
        if let LoadEvent::Failed { message } = event {
            assert!(message.contains("exit code 1"), "{message}");
        }
    }
    // The stage whose process failed last may have been stopped before its shard came.
    let made = [(0, &members[1], (0, 12)), (1, &members[0], (12, 30))];
    let there = made.iter().filter(|(_, m, range)| shards(m).contains(&cut(m.dir.path(), *range))).count();
    assert!(there >= 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_split_model_at_an_address_and_a_file_of_a_disk() {
    let (dir, parts) = split("llama");
    let named: Vec<(&str, Vec<u8>)> = parts.iter().map(|(n, b)| (n.as_str(), b.clone())).collect();
    let hub = Hub::start(named);
    let a = start("a", &hub).await;
    let url = hub.url(&parts[0].0);
    let events = pulled(&a.node, request(&url, &[])).await;
    let Some(PullEvent::Done { name, .. }) = events.last() else { panic!("{events:?}") };
    assert_eq!(name, "tiny");
    let status = &a.node.models().await[0];
    assert_eq!((status.files.len(), status.copies), (2, 1));
    let out = a.dir.path().join("whole.gguf");
    a.node.export_model("tiny".into(), out.clone()).await.unwrap();
    let (joined, split) = (Model::open(&out).unwrap(), Model::open(&dir.path().join(&parts[0].0)).unwrap());
    assert_eq!((joined.files().len(), joined.n_layers()), (1, split.n_layers()));
    for tensor in split.tensors() {
        let same = joined.tensor(&tensor.name).unwrap();
        assert!(joined.tensor_data(same) == split.tensor_data(tensor), "{}", tensor.name);
    }
    // Known already: nothing is asked for again but its first bytes.
    assert_eq!(outside(&pulled(&a.node, request(&url, &[])).await), 0);

    // A file stays where it is, and a model of its name does not take its place.
    let file = dir.path().join("own.gguf");
    capstan_testkit::tiny::write("qwen2", &file).unwrap();
    let source = format!("file:{}", file.display());
    pulled(&a.node, request(&source, &[])).await;
    let taken = PullRequest { name: Some("tiny".into()), ..request(&format!("file:{}", file.display()), &[]) };
    assert_eq!(a.node.models().await.len(), 2);
    let again = pulled(&a.node, taken).await;
    assert!(matches!(again.last(), Some(PullEvent::Done { name, .. }) if name == "own"), "{again:?}");
    a.node.remove_model("own".into()).await.unwrap();
    assert!(file.exists(), "a file of the user's is never deleted");
    assert!(a.node.remove_model("own".into()).await.is_err());
}

/// A tiny model in two files.
fn split(name: &str) -> (TempDir, Vec<(String, Vec<u8>)>) {
    use capstan_gguf::Value;
    use capstan_gguf::writer::{NewTensor, write};
    let dir = tempfile::tempdir().unwrap();
    let whole = dir.path().join("whole.gguf");
    capstan_testkit::tiny::write(name, &whole).unwrap();
    let model = Model::open(&whole).unwrap();
    let half = model.tensors().len() / 2;
    let mut parts = Vec::new();
    for no in 0..2u16 {
        let tensors = if no == 0 { &model.tensors()[..half] } else { &model.tensors()[half..] };
        let mut metadata = if no == 0 { model.metadata().clone() } else { capstan_gguf::Metadata::new() };
        metadata.insert("split.no", Value::U16(no));
        metadata.insert("split.count", Value::U16(2));
        metadata.insert("split.tensors.count", Value::I32(model.tensors().len() as i32));
        let new: Vec<NewTensor> = tensors
            .iter()
            .map(|t| NewTensor {
                name: t.name.clone(),
                dims: t.dims[..t.n_dims as usize].to_vec(),
                ggml_type: t.ggml_type,
            })
            .collect();
        let mut out = Vec::new();
        write(&mut out, &metadata, &new, |i| model.tensor_data(&tensors[i]).to_vec()).unwrap();
        let name = format!("tiny-{:05}-of-00002.gguf", no + 1);
        std::fs::write(dir.path().join(&name), &out).unwrap();
        parts.push((name, out));
    }
    (dir, parts)
}

#[tokio::test(flavor = "multi_thread")]
async fn space_is_made_by_what_has_a_copy_elsewhere_and_never_by_the_last() {
    let tiny = |name: &str| {
        let dir = tempfile::tempdir().unwrap();
        let path: PathBuf = dir.path().join("m.gguf");
        capstan_testkit::tiny::write(name, &path).unwrap();
        std::fs::read(path).unwrap()
    };
    let small = [("B-F16.gguf", "qwen2"), ("C-Q8_0.gguf", "gemma3"), ("D-Q2_K.gguf", "qwen3")];
    let mut files: Vec<_> = small.iter().map(|(file, name)| (*file, tiny(name))).collect();
    files.push((FILE, smol()));
    let hub = Hub::start(files);
    let mut members = cluster(2, &hub).await;
    let pull = |what: &str, replicas: u16| PullRequest {
        source: format!("hf:o/r:{what}"),
        replicas: Some(replicas),
        nodes: vec!["a".into()],
        ..PullRequest::default()
    };
    // The first, which is large, gets a copy on the other node; the second does not.
    outside(&pulled(&members[0].node, pull("Q4_1", 2)).await);
    outside(&pulled(&members[0].node, pull("F16", 1)).await);
    until("the first has two copies", || async {
        members[0].node.models().await.iter().any(|m| m.name == "Smol-Q4_1" && m.copies == 2)
    })
    .await;
    let disk = members[0].node.disk().await;
    assert!(disk.iter().all(|n| n.online && n.used_bytes > 0) && disk[0].parts.iter().any(|p| p.model == "B-F16"));

    let restart = async |member: Member, limit: u64| {
        let Member { node, dir } = member;
        node.stop().await;
        drop(node);
        let mut tight = with_hub(config(dir.path(), "a"), &hub);
        tight.disk_limit_bytes = Some(limit);
        Member { node: Node::start(tight).await.unwrap(), dir }
    };
    let a = restart(members.remove(0), disk[0].used_bytes + (64 << 10)).await;
    let b = members.remove(0);
    until("it hears what the other has", || async {
        a.node.models().await.iter().any(|m| m.name == "Smol-Q4_1" && m.copies == 2)
    })
    .await;
    outside(&pulled(&a.node, pull("Q8_0", 1)).await);
    let copies = async || {
        let models = a.node.models().await;
        models.into_iter().map(|m| (m.name, m.copies)).collect::<BTreeMap<_, _>>()
    };
    let now = copies().await;
    assert_eq!((now["Smol-Q4_1"], now["B-F16"], now["C-Q8_0"]), (1, 1, 1), "only what is elsewhere went");
    assert!(shards(&b).contains(&smol()) && !shards(&a).contains(&smol()));

    // With the other node gone nothing more may go.
    b.node.stop().await;
    let used = a.node.disk().await[0].used_bytes;
    let a = restart(a, used + (64 << 10)).await;
    let events = pulled(&a.node, pull("Q2_K", 1)).await;
    assert!(failure(&events).contains("disk_limit"), "{events:?}");
    let models = a.node.models().await;
    assert!(models.iter().filter(|m| m.name != "Smol-Q4_1").all(|m| m.copies == 1), "{models:?}");
}
