//! Shards move between real endpoints on loopback: whole, resumed, refused, altered, repaired.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::net::Ipv4Addr;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use capstan_store::{BLOBS_ALPN, Hash, ShardProtocol, Store, StoreError, hash_file, hex};
use iroh::endpoint::{Connection, ConnectionError, presets};
use iroh::protocol::{AcceptError, ProtocolHandler, Router};
use iroh::{Endpoint, EndpointAddr, RelayMode, TransportAddr};
use iroh_blobs::get::fsm;
use iroh_blobs::protocol::{ChunkRangesSeq, GetRequest, PushRequest};
use iroh_blobs::store::mem::MemStore;
use rand::{RngCore, SeedableRng};
use tempfile::TempDir;
use tokio::sync::Notify;

/// Not a multiple of the 16 KiB grain, so that the last range is a short one.
const SIZE: u64 = 20 * 1024 * 1024 + 4321;

async fn endpoint() -> Endpoint {
    Endpoint::builder(presets::Minimal)
        .relay_mode(RelayMode::Disabled)
        .clear_ip_transports()
        .bind_addr((Ipv4Addr::LOCALHOST, 0))
        .expect("a loopback address")
        .bind()
        .await
        .expect("an endpoint on loopback")
}

fn address(endpoint: &Endpoint) -> EndpointAddr {
    EndpointAddr::from_parts(endpoint.id(), endpoint.bound_sockets().into_iter().map(TransportAddr::Ip))
}

/// A node: a folder, a store in it, and a router that serves it.
struct Node {
    store: Store,
    router: Router,
}

impl Node {
    async fn start(folder: &Path) -> Node {
        Self::start_with(folder, |store| store.protocol(|_| true)).await
    }

    async fn start_with<P: ProtocolHandler>(folder: &Path, protocol: impl FnOnce(&Store) -> P) -> Node {
        let store = Store::open(folder).expect("the store opens");
        let router = Router::builder(endpoint().await).accept(BLOBS_ALPN, protocol(&store)).spawn();
        Node { store, router }
    }

    fn endpoint(&self) -> &Endpoint {
        self.router.endpoint()
    }

    fn address(&self) -> EndpointAddr {
        address(self.router.endpoint())
    }

    async fn fetch(&self, from: &Node, hash: Hash, seen: &mut Vec<u64>) -> Result<PathBuf, StoreError> {
        let progress = |done, total| {
            assert_eq!(total, SIZE);
            seen.push(done);
        };
        self.store.fetch(self.endpoint(), from.address(), hash, SIZE, progress).await
    }

    async fn stop(self) {
        self.store.shutdown().await;
        self.router.shutdown().await.expect("the router stops");
    }
}

fn write_random(path: &Path, size: u64, seed: u64) -> Vec<u8> {
    let mut bytes = vec![0; size as usize];
    rand::rngs::StdRng::seed_from_u64(seed).fill_bytes(&mut bytes);
    fs::write(path, &bytes).expect("the file is written");
    bytes
}

/// Changes one byte and leaves size and time of change as they were: what a failing disk does.
fn rot(path: &Path, offset: u64) {
    let modified = fs::metadata(path).and_then(|m| m.modified()).expect("a time of change");
    let file = File::options().read(true).write(true).open(path).expect("the file opens");
    let mut byte = [0];
    file.read_exact_at(&mut byte, offset).expect("a byte to change");
    file.write_all_at(&[byte[0] ^ 0xff], offset).expect("the byte changes");
    file.set_modified(modified).expect("the time of change is set back");
}

fn names(folder: &Path) -> BTreeSet<String> {
    let name =
        |entry: std::io::Result<fs::DirEntry>| entry.expect("an entry").file_name().to_string_lossy().into_owned();
    fs::read_dir(folder).expect("the folder").map(name).collect()
}

/// Bytes of disk that everything below a folder takes.
fn disk_bytes(folder: &Path) -> u64 {
    let size = |entry: std::io::Result<fs::DirEntry>| {
        let entry = entry.expect("an entry");
        let metadata = entry.metadata().expect("metadata");
        if metadata.is_dir() { disk_bytes(&entry.path()) } else { metadata.blocks() * 512 }
    };
    fs::read_dir(folder).expect("the folder").map(size).sum()
}

fn rising(seen: &[u64]) -> bool {
    seen.windows(2).all(|pair| pair[0] <= pair[1])
}

struct Folders {
    _root: TempDir,
    file: PathBuf,
    source: PathBuf,
    target: PathBuf,
}

fn folders() -> Folders {
    let root = TempDir::new().expect("a temporary folder");
    let at = |name: &str| root.path().join(name);
    Folders { file: at("cut.gguf"), source: at("source"), target: at("target"), _root: root }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_shard_arrives_once_on_the_disk_and_stays() {
    let f = folders();
    let content = write_random(&f.file, SIZE, 1);
    let (a, b) = (Node::start(&f.source).await, Node::start(&f.target).await);
    let mut hashed = 0;
    let offer = a.store.offer(&f.file, |done, _| hashed = done).await.expect("the file is offered");
    assert_eq!((offer.bytes, hashed), (SIZE, SIZE));
    assert_eq!(offer.hash, hash_file(&f.file, |_, _| {}).await.expect("the file is hashed"));
    assert_eq!(&offer.hash, blake3_of(&content).as_bytes());
    assert!(disk_bytes(&f.source) < SIZE / 50, "an offer copies nothing");
    assert_eq!(a.store.offered(&offer.hash), Some(fs::canonicalize(&f.file).expect("a path")));

    let mut seen = Vec::new();
    let path = b.fetch(&a, offer.hash, &mut seen).await.expect("the shard arrives");
    assert!(seen.first() == Some(&0) && seen.last() == Some(&SIZE) && rising(&seen), "{seen:?}");
    assert!(fs::read(&path).expect("the shard") == content);
    assert_eq!(names(&f.target.join("shards")), BTreeSet::from([format!("{}.gguf", hex(&offer.hash))]));
    let used = disk_bytes(&f.target);
    assert!(used < SIZE + SIZE / 50, "{used} bytes on disk for a shard of {SIZE}");
    assert_eq!(b.store.bytes_used().expect("a size"), used);

    // What was fetched can be fetched on from there, and is still known after a restart, with nobody else up.
    let folder = TempDir::new().expect("a temporary folder");
    let c = Node::start(folder.path()).await;
    a.stop().await;
    c.fetch(&b, offer.hash, &mut Vec::new()).await.expect("the shard is handed on");
    let gone = b.address();
    b.stop().await;
    c.stop().await;
    let b = Node::start(&f.target).await;
    assert_eq!(b.store.local(&offer.hash), Some(path.clone()));
    assert_eq!(
        b.store.list().iter().map(|s| (s.hash, s.bytes, s.path.clone())).collect::<Vec<_>>(),
        [(offer.hash, SIZE, path.clone())]
    );
    assert_eq!(b.store.local_verified(&offer.hash, |_, _| {}).await.expect("a check"), Some(path.clone()));
    let again = b.store.fetch(b.endpoint(), gone, offer.hash, SIZE, |done, _| assert_eq!(done, SIZE)).await;
    assert_eq!(again.expect("no network is needed"), path);

    assert!(b.store.remove(&offer.hash).await.expect("it is removed"));
    assert!(b.store.list().is_empty() && b.store.local(&offer.hash).is_none());
    assert!(disk_bytes(&f.target) < 64 << 10);
    assert!(!b.store.remove(&offer.hash).await.expect("there is nothing to remove"));
}

fn blake3_of(content: &[u8]) -> iroh_blobs::Hash {
    iroh_blobs::Hash::new(content)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dropped_fetch_goes_on_after_both_ends_restart() {
    let f = folders();
    let content = write_random(&f.file, SIZE, 2);
    let (a, b) = (Node::start(&f.source).await, Node::start(&f.target).await);
    let offer = a.store.offer(&f.file, |_, _| {}).await.expect("the file is offered");
    let enough = Notify::new();
    let progress = |done, _| {
        if done >= SIZE / 4 {
            enough.notify_one();
        }
    };
    tokio::select! {
        biased;
        () = enough.notified() => {}
        result = b.store.fetch(b.endpoint(), a.address(), offer.hash, SIZE, progress) => panic!("not dropped: {result:?}"),
    }
    assert!(names(&f.target.join("shards")).is_empty(), "nothing half-written is visible");
    a.stop().await;
    b.stop().await;

    let (a, b) = (Node::start(&f.source).await, Node::start(&f.target).await);
    assert_eq!(b.store.local(&offer.hash), None);
    let mut seen = Vec::new();
    let path = b.fetch(&a, offer.hash, &mut seen).await.expect("the rest arrives, the offer survived too");
    assert!(seen[0] >= SIZE / 8 && seen[0] < SIZE && rising(&seen), "{seen:?}");
    assert!(fs::read(path).expect("the shard") == content);
    assert!(names(&f.target.join("blobs")).iter().all(|name| !name.contains("partial")));
}

/// Remembers the connections it serves, so that a test can cut one.
#[derive(Debug)]
struct Watched {
    inner: ShardProtocol,
    connections: Arc<Mutex<Vec<Connection>>>,
}

impl ProtocolHandler for Watched {
    async fn accept(&self, connection: Connection) -> Result<(), AcceptError> {
        self.connections.lock().expect("no panic").push(connection.clone());
        self.inner.accept(connection).await
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_broken_connection_is_made_anew_and_goes_on() {
    let f = folders();
    let content = write_random(&f.file, SIZE, 3);
    let connections = Arc::new(Mutex::new(Vec::<Connection>::new()));
    let kept = connections.clone();
    let a = Node::start_with(&f.source, |store| Watched { inner: store.protocol(|_| true), connections }).await;
    let b = Node::start(&f.target).await;
    let offer = a.store.offer(&f.file, |_, _| {}).await.expect("the file is offered");
    let mut seen = Vec::new();
    let progress = |done, _| {
        seen.push(done);
        if seen.len() == 3 {
            // Closed here and now: of the rest, only what the network had taken already can still arrive.
            kept.lock().expect("no panic")[0].close(77u32.into(), b"cut");
        }
    };
    let path = b.store.fetch(b.endpoint(), a.address(), offer.hash, SIZE, progress).await.expect("it arrives");
    assert!(rising(&seen), "a retry starts from what is there: {seen:?}");
    assert_eq!(kept.lock().expect("no panic").len(), 2, "one connection was cut, one finished");
    assert!(fs::read(path).expect("the shard") == content);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn several_nodes_send_one_shard_and_make_up_for_one_that_lies() {
    let f = folders();
    let content = write_random(&f.file, SIZE, 8);
    let (a, c) = (Node::start(&f.source.join("a")).await, Node::start(&f.source.join("c")).await);
    let offer = a.store.offer(&f.file, |_, _| {}).await.expect("the file is offered");
    let copy = f.source.join("copy.gguf");
    fs::copy(&f.file, &copy).expect("a copy");
    c.store.offer(&copy, |_, _| {}).await.expect("the copy is offered");
    let liar = Node::start_with(&f.source.join("liar"), |_| Liar).await;
    let b = Node::start(&f.target).await;
    // The second copy is taken away in the middle; the liar is found out at once.
    let mut seen = Vec::new();
    let progress = |done: u64, _| {
        if seen.is_empty() {
            fs::write(&copy, b"gone").expect("the copy is overwritten");
        }
        seen.push(done);
    };
    let from = vec![liar.address(), c.address(), a.address()];
    let path = b.store.fetch_from(b.endpoint(), from, offer.hash, SIZE, progress).await.expect("it arrives");
    assert!(fs::read(path).expect("the shard") == content && rising(&seen), "{seen:?}");
    let none = b.store.fetch_from(b.endpoint(), vec![], [3; 32], SIZE, |_, _| {}).await;
    assert!(matches!(none, Err(StoreError::NobodyHas { .. })), "{none:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn strangers_and_writers_are_refused() {
    let f = folders();
    write_random(&f.file, SIZE, 4);
    let b = Node::start(&f.target).await;
    let (member, open) = (b.endpoint().id(), Arc::new(AtomicBool::new(true)));
    let door = open.clone();
    let allow = move |id| id == member && door.load(Ordering::SeqCst);
    let a = Node::start_with(&f.source, |store| store.protocol(allow)).await;
    let offer = a.store.offer(&f.file, |_, _| {}).await.expect("the file is offered");

    let stranger = endpoint().await;
    let refused = b.store.fetch(&stranger, a.address(), offer.hash, SIZE, |_, _| {}).await;
    assert!(
        matches!(&refused, Err(StoreError::Refused { node, reason }) if *node == a.endpoint().id()
        && reason.contains("not a member")),
        "{refused:?}"
    );

    // A member may read, not write.
    let memory = MemStore::new();
    let pushed = memory.blobs().add_slice(b"unasked").await.expect("a blob");
    let connection = b.endpoint().connect(a.address(), BLOBS_ALPN).await.expect("a member connects");
    let push = PushRequest::new(pushed.hash, ChunkRangesSeq::root());
    _ = memory.remote().execute_push(connection.clone(), push).await;
    assert_eq!(closed_code(&connection).await, 1);
    assert!(a.store.list().is_empty() && names(&f.source.join("shards")).is_empty());

    // Nor have a shard read as a list of hashes, nor go on once it is no member any more.
    for request in [GetRequest::all(offer.hash), GetRequest::blob(offer.hash)] {
        let connection = b.endpoint().connect(a.address(), BLOBS_ALPN).await.expect("a member connects");
        open.store(request.ranges.is_infinite(), Ordering::SeqCst);
        let connected = fsm::start(connection.clone(), request, Default::default()).next().await.expect("a stream");
        _ = connected.next().await;
        assert_eq!(closed_code(&connection).await, 1);
    }
    open.store(true, Ordering::SeqCst);

    let unknown = b.store.fetch(b.endpoint(), a.address(), [7; 32], SIZE, |_, _| {}).await;
    assert!(matches!(unknown, Err(StoreError::NotOffered { hash, .. }) if hash == [7; 32]), "{unknown:?}");
    assert!(a.store.withdraw(&offer.hash).await.expect("it is withdrawn"));
    let withdrawn = b.store.fetch(b.endpoint(), a.address(), offer.hash, SIZE, |_, _| {}).await;
    assert!(matches!(withdrawn, Err(StoreError::NotOffered { .. })), "{withdrawn:?}");
    assert!(f.file.exists() && disk_bytes(&f.source) < 64 << 10, "the file stays, its tree does not");
}

async fn closed_code(connection: &Connection) -> u64 {
    match connection.closed().await {
        ConnectionError::ApplicationClosed(close) => close.error_code.into_inner(),
        other => panic!("expected a reason, got {other}"),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_file_altered_after_the_offer_is_never_accepted() {
    let f = folders();
    let content = write_random(&f.file, SIZE, 5);
    let (a, b) = (Node::start(&f.source).await, Node::start(&f.target).await);
    let offer = a.store.offer(&f.file, |_, _| {}).await.expect("the file is offered");
    rot(&f.file, SIZE / 2);
    let altered = b.fetch(&a, offer.hash, &mut Vec::new()).await;
    let Err(error @ StoreError::SourceChanged { .. }) = altered else { panic!("{altered:?}") };
    let sentence = error.to_string();
    assert!(
        sentence.contains("cut.gguf") && sentence.contains(&a.endpoint().id().fmt_short().to_string()),
        "{sentence}"
    );
    assert!(!error.is_retryable() && names(&f.target.join("shards")).is_empty());

    // Put right again, the rest comes.
    rot(&f.file, SIZE / 2);
    let mut seen = Vec::new();
    let path = b.fetch(&a, offer.hash, &mut seen).await.expect("the shard arrives");
    assert!(fs::read(path).expect("the shard") == content);
    b.store.remove(&offer.hash).await.expect("it is removed");

    // A change that shows in the metadata is refused before anything is sent, and ends the offer at a restart.
    File::options().append(true).open(&f.file).and_then(|file| file.set_len(SIZE - 1)).expect("the file shrinks");
    let shrunk = b.fetch(&a, offer.hash, &mut Vec::new()).await;
    assert!(matches!(shrunk, Err(StoreError::SourceChanged { .. })), "{shrunk:?}");
    assert_eq!(a.store.offered(&offer.hash), None);
    a.stop().await;
    let a = Node::start(&f.source).await;
    let forgotten = b.fetch(&a, offer.hash, &mut Vec::new()).await;
    assert!(matches!(forgotten, Err(StoreError::NotOffered { .. })), "{forgotten:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rotten_shard_is_noticed_and_repaired() {
    let f = folders();
    let content = write_random(&f.file, SIZE, 6);
    let (a, b) = (Node::start(&f.source).await, Node::start(&f.target).await);
    let offer = a.store.offer(&f.file, |_, _| {}).await.expect("the file is offered");
    let path = b.fetch(&a, offer.hash, &mut Vec::new()).await.expect("the shard arrives");
    rot(&path, 12_345_678);
    assert_eq!(b.store.verify(&offer.hash).await.expect("a check"), None);
    assert!(b.store.local(&offer.hash).is_none() && names(&f.target.join("shards")).is_empty());
    let mut seen = Vec::new();
    b.fetch(&a, offer.hash, &mut seen).await.expect("it is repaired");
    assert_eq!(seen[0], SIZE - (16 << 10), "only one range of 16 KiB was bad");
    assert!(fs::read(&path).expect("the shard") == content);

    // A change that shows in the metadata is noticed without being asked to read everything.
    fs::write(&path, &content[..1000]).expect("the shard is overwritten");
    assert_eq!(b.store.local(&offer.hash), None);
    assert_eq!(b.store.local_verified(&offer.hash, |_, _| {}).await.expect("a check"), None);
    b.fetch(&a, offer.hash, &mut Vec::new()).await.expect("it is fetched again");
    assert!(fs::read(&path).expect("the shard") == content);
}

/// Answers every request with the right size and the wrong content.
#[derive(Debug)]
struct Liar;

impl ProtocolHandler for Liar {
    async fn accept(&self, connection: Connection) -> Result<(), AcceptError> {
        let (mut send, mut receive) = connection.accept_bi().await?;
        _ = receive.read_to_end(1 << 20).await;
        _ = send.write_all(&SIZE.to_le_bytes()).await;
        _ = send.write_all(&vec![42; 1 << 20]).await;
        connection.closed().await;
        Ok(())
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lying_source_an_impossible_size_and_a_second_process_are_turned_down() {
    let f = folders();
    let b = Node::start(&f.target).await;
    let liar = Node::start_with(&f.source, |_| Liar).await;
    let lie = b.fetch(&liar, [9; 32], &mut Vec::new()).await;
    assert!(matches!(lie, Err(StoreError::Corrupt { hash, .. }) if hash == [9; 32]), "{lie:?}");
    let size = b.store.fetch(b.endpoint(), liar.address(), [9; 32], SIZE + 1, |_, _| {}).await;
    assert!(matches!(size, Err(StoreError::WrongSize { actual_bytes: SIZE, .. })), "{size:?}");
    let huge = b.store.fetch(b.endpoint(), liar.address(), [9; 32], 1 << 49, |_, _| {}).await;
    assert!(matches!(&huge, Err(StoreError::DiskFull { missing_bytes, .. }) if *missing_bytes > 1 << 40), "{huge:?}");
    let none = b.store.fetch(b.endpoint(), liar.address(), [9; 32], 0, |_, _| {}).await;
    assert!(matches!(none, Err(StoreError::BadSize { .. })), "{none:?}");
    assert!(b.store.remove(&[9; 32]).await.expect("the empty partial goes"));
    assert!(b.store.list().is_empty() && names(&f.target.join("shards")).is_empty());

    assert!(matches!(Store::open(&f.target), Err(StoreError::Busy { .. })));
    let missing = b.store.offer(&f.file, |_, _| {}).await;
    assert!(matches!(missing, Err(StoreError::Io { .. })), "{missing:?}");
    b.store.shutdown().await;
    let closed = b.store.fetch(b.endpoint(), liar.address(), [9; 32], SIZE, |_, _| {}).await;
    assert!(matches!(closed, Err(StoreError::Closed)), "{closed:?}");
    drop(Store::open(&f.target).expect("free again"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_adopted_file_is_moved_and_small_shards_work() {
    let f = folders();
    // One chunk, one group, one group and a byte: the shapes in which a tree has no or one pair of hashes.
    for (seed, size) in [(1, 1), (2, 1024), (3, 16 << 10), (4, (16 << 10) + 1)] {
        let (source, target) = (f.source.join(size.to_string()), f.target.join(size.to_string()));
        let (a, b) = (Node::start(&source).await, Node::start(&target).await);
        let content = write_random(&f.file, size, seed);
        let offer = a.store.adopt(&f.file, |_, _| {}).await.expect("the file is adopted");
        assert!(!f.file.exists() && a.store.local(&offer.hash).is_some());
        let path = b.store.fetch(b.endpoint(), a.address(), offer.hash, size, |_, _| {}).await.expect("it arrives");
        assert_eq!(fs::read(path).expect("the shard"), content);
    }
}

#[tokio::test]
async fn unused_shards_make_way_the_least_recently_used_first() {
    let folder = tempfile::tempdir().expect("a folder");
    let store = Store::open(folder.path()).expect("the store opens");
    let mut hashes = Vec::new();
    for seed in 0..4 {
        let path = folder.path().join(format!("{seed}.gguf"));
        write_random(&path, 1 << 20, seed);
        hashes.push(store.adopt(&path, |_, _| {}).await.expect("an adopted file").hash);
    }
    let left = || store.list().into_iter().map(|s| s.hash).collect::<BTreeSet<_>>();
    let of = |which: &[usize]| which.iter().map(|&i| hashes[i]).collect::<BTreeSet<_>>();
    // The oldest is used again, the second is held.
    store.local_verified(&hashes[0], |_, _| {}).await.expect("a check").expect("it is here");
    let hold = store.hold(&hashes[1]);

    assert_eq!(store.drop_unused(0).await.expect("nothing to do"), 0);
    assert_eq!(store.drop_unused(1 << 40).await.expect("all would not be enough"), 0);
    assert_eq!(left().len(), 4);
    assert!(store.drop_unused(1).await.expect("room is made") >= 1 << 20);
    assert_eq!(left(), of(&[0, 1, 3]));
    assert!(store.drop_unused((1 << 20) + (1 << 19)).await.expect("room is made") >= 2 << 20);
    assert_eq!(left(), of(&[1]));
    assert_eq!(store.drop_unused(1).await.expect("it is held"), 0);
    drop(hold);
    assert!(store.drop_unused(1).await.expect("room is made") >= 1 << 20);
    assert_eq!(left(), of(&[]));
    assert!(store.bytes_used().expect("a size") < 1 << 20, "its tree goes with it");
    store.shutdown().await;
}
