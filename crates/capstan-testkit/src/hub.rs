//! A server that speaks the hub's protocol, on loopback, and fails as it is told.
//!
//! It has one repository, `o/r`, whose files lie behind a redirect to a second address, as the hub's large files do. It
//! runs on threads of its own, so that [`Hub::kill`] ends it as a power cut would: every connection breaks at once.
//! It counts how often each byte of each file was sent.
use std::collections::HashMap;
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::extract::{Path, State};
use axum::http::{HeaderMap, Response, StatusCode};
use axum::routing::get;
use bytes::Bytes;
use futures::stream;
use sha2::{Digest, Sha256};
use tokio::runtime::Runtime;
use tokio::sync::Notify;

/// The commit that `main` points to.
pub const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
/// Bytes of a body that are sent in one piece.
const PIECE_BYTES: usize = 64 << 10;
/// How often an address is tried that was in use a moment ago.
const REBINDS: usize = 100;

/// How the server behaves. It can be changed while it runs.
#[derive(Default)]
pub struct Behaviour {
    /// The token that is wanted; none lets everybody in.
    pub token: Mutex<Option<String>>,
    /// So many requests for content are answered with 500 first.
    pub errors: AtomicU64,
    /// So many answers break off in the middle.
    pub cuts: AtomicU64,
    /// After so many bytes of content in all, nothing more is sent until it is raised; negative is no end.
    pub hold_after: AtomicI64,
    /// The byte at this place of every file is sent with a bit flipped; negative is none.
    pub flip: AtomicI64,
    /// Ranges are not understood.
    pub whole: AtomicBool,
}

struct Shared {
    files: Vec<(String, Arc<Vec<u8>>)>,
    behaviour: Behaviour,
    sent: Mutex<HashMap<String, Vec<u8>>>,
    total: AtomicU64,
    go_on: Notify,
    content: Mutex<Option<SocketAddr>>,
    strangers: AtomicU64,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The server.
pub struct Hub {
    shared: Arc<Shared>,
    addrs: [SocketAddr; 2],
    running: Option<Runtime>,
}

impl Hub {
    /// Serves these files of `o/r` on free ports.
    pub fn start(files: Vec<(&str, Vec<u8>)>) -> Hub {
        let files: Vec<_> = files.into_iter().map(|(name, bytes)| (name.to_owned(), Arc::new(bytes))).collect();
        let sent = files.iter().map(|(name, bytes)| (name.clone(), vec![0; bytes.len()])).collect();
        let behaviour = Behaviour { hold_after: AtomicI64::new(-1), flip: AtomicI64::new(-1), ..Behaviour::default() };
        let shared = Arc::new(Shared {
            files,
            behaviour,
            sent: Mutex::new(sent),
            total: AtomicU64::new(0),
            go_on: Notify::new(),
            content: Mutex::default(),
            strangers: AtomicU64::new(0),
        });
        let any: SocketAddr = ([127, 0, 0, 1], 0).into();
        let mut hub = Hub { shared, addrs: [any; 2], running: None };
        hub.run().expect("a server on loopback");
        hub
    }

    fn run(&mut self) -> io::Result<()> {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
        let listeners = [bind(self.addrs[0])?, bind(self.addrs[1])?];
        for (addr, listener) in self.addrs.iter_mut().zip(&listeners) {
            *addr = listener.local_addr()?;
        }
        *lock(&self.shared.content) = Some(self.addrs[1]);
        for (i, listener) in listeners.into_iter().enumerate() {
            let routes = if i == 0 {
                Router::new()
                    .route("/api/models/{owner}/{repo}/revision/{revision}", get(list))
                    .route("/{owner}/{repo}/resolve/{revision}/{*file}", get(resolve))
            } else {
                Router::new().route("/content/{*file}", get(content))
            };
            let app = routes.with_state(self.shared.clone());
            let guard = runtime.enter();
            let listener = tokio::net::TcpListener::from_std(listener)?;
            drop(guard);
            runtime.spawn(async move { axum::serve(listener, app).await });
        }
        self.running = Some(runtime);
        Ok(())
    }

    /// What `HF_ENDPOINT` is to be.
    pub fn endpoint(&self) -> String {
        format!("http://{}", self.addrs[0])
    }

    /// A file's address without the hub's protocol.
    pub fn url(&self, file: &str) -> String {
        format!("http://{}/content/{file}", self.addrs[1])
    }

    /// How it behaves.
    pub fn behaviour(&self) -> &Behaviour {
        &self.shared.behaviour
    }

    /// Sends at most so many bytes of content in all from now on, then falls silent; negative lifts that.
    pub fn hold_after(&self, bytes: i64) {
        let sent = self.sent_bytes() as i64;
        self.shared.behaviour.hold_after.store(if bytes < 0 { -1 } else { sent + bytes }, Ordering::SeqCst);
        self.shared.go_on.notify_waiters();
    }

    /// Bytes of content that were sent in all.
    pub fn sent_bytes(&self) -> u64 {
        self.shared.total.load(Ordering::SeqCst)
    }

    /// How often each byte of a file was sent.
    pub fn sent(&self, file: &str) -> Vec<u8> {
        lock(&self.shared.sent).get(file).cloned().unwrap_or_default()
    }

    /// How often the token came to the server that has the content, which must not know it.
    pub fn tokens_leaked(&self) -> u64 {
        self.shared.strangers.load(Ordering::SeqCst)
    }

    /// Ends it in the middle of whatever it does.
    pub fn kill(&mut self) {
        if let Some(runtime) = self.running.take() {
            runtime.shutdown_background();
        }
    }

    /// Starts it again where it was.
    pub fn restart(&mut self) {
        self.kill();
        self.run().expect("its ports are free again");
    }
}

impl Drop for Hub {
    fn drop(&mut self) {
        self.kill();
    }
}

/// The port may still be held by the threads of a server that was killed a moment ago.
fn bind(addr: SocketAddr) -> io::Result<TcpListener> {
    let mut tries = 0;
    loop {
        match TcpListener::bind(addr) {
            Ok(listener) => {
                listener.set_nonblocking(true)?;
                return Ok(listener);
            }
            Err(e) if e.kind() == io::ErrorKind::AddrInUse && tries < REBINDS => {
                tries += 1;
                std::thread::sleep(Duration::from_millis(20));
            }
            Err(e) => return Err(e),
        }
    }
}

fn answer(status: StatusCode, body: impl Into<Body>) -> Response<Body> {
    Response::builder().status(status).body(body.into()).expect("a response")
}

fn header(headers: &HeaderMap, name: &str) -> String {
    headers.get(name).and_then(|v| v.to_str().ok()).unwrap_or_default().to_owned()
}

fn admitted(hub: &Shared, headers: &HeaderMap) -> bool {
    match &*lock(&hub.behaviour.token) {
        Some(token) => header(headers, "authorization") == format!("Bearer {token}"),
        None => true,
    }
}

fn is_there(owner: &str, repo: &str, revision: &str) -> bool {
    (owner, repo) == ("o", "r") && (revision == "main" || revision == COMMIT)
}

type HubState = State<Arc<Shared>>;

async fn list(
    State(hub): HubState,
    Path((owner, repo, revision)): Path<(String, String, String)>,
    headers: HeaderMap,
) -> Response<Body> {
    if !admitted(&hub, &headers) {
        return answer(StatusCode::UNAUTHORIZED, "");
    }
    if !is_there(&owner, &repo, &revision) {
        return answer(StatusCode::NOT_FOUND, "");
    }
    let sibling = |(name, bytes): &(String, Arc<Vec<u8>>)| {
        let sha256 = hex::encode(Sha256::digest(bytes.as_slice()));
        serde_json::json!({ "rfilename": name, "size": bytes.len(), "lfs": { "sha256": sha256, "size": bytes.len() } })
    };
    let siblings: Vec<_> = hub.files.iter().map(sibling).collect();
    answer(StatusCode::OK, serde_json::json!({ "sha": COMMIT, "siblings": siblings }).to_string())
}

async fn resolve(
    State(hub): HubState,
    Path((owner, repo, revision, file)): Path<(String, String, String, String)>,
    headers: HeaderMap,
) -> Response<Body> {
    if !admitted(&hub, &headers) {
        return answer(StatusCode::UNAUTHORIZED, "");
    }
    let Some((_, bytes)) = hub.files.iter().find(|(name, _)| *name == file) else {
        return answer(StatusCode::NOT_FOUND, "");
    };
    if !is_there(&owner, &repo, &revision) {
        return answer(StatusCode::NOT_FOUND, "");
    }
    let Some(content) = *lock(&hub.content) else { return answer(StatusCode::BAD_GATEWAY, "") };
    Response::builder()
        .status(StatusCode::FOUND)
        .header("location", format!("http://{content}/content/{file}"))
        .header("x-repo-commit", COMMIT)
        .header("x-linked-size", bytes.len())
        .header("x-linked-etag", format!("\"{}\"", hex::encode(Sha256::digest(bytes.as_slice()))))
        .body(Body::empty())
        .expect("a response")
}

/// Takes one of a number of failures.
fn take(failures: &AtomicU64) -> bool {
    failures.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |n| n.checked_sub(1)).is_ok()
}

async fn content(State(hub): HubState, Path(file): Path<String>, headers: HeaderMap) -> Response<Body> {
    if headers.contains_key("authorization") {
        hub.strangers.fetch_add(1, Ordering::SeqCst);
    }
    if take(&hub.behaviour.errors) {
        return answer(StatusCode::INTERNAL_SERVER_ERROR, "");
    }
    let Some((_, bytes)) = hub.files.iter().find(|(name, _)| *name == file).cloned() else {
        return answer(StatusCode::NOT_FOUND, "");
    };
    let range = header(&headers, "range");
    let range = range
        .strip_prefix("bytes=")
        .and_then(|r| r.split_once('-'))
        .filter(|_| !hub.behaviour.whole.load(Ordering::SeqCst));
    let wanted = range.and_then(|(from, to)| Some((from.parse::<usize>().ok()?, to.parse::<usize>().ok()?)));
    let all = bytes.len();
    let (from, end) = wanted.map_or((0, all), |(from, to)| (from.min(all), to.saturating_add(1).min(all)));
    let mut response = Response::builder().header("etag", "\"of-the-content\"").header("content-length", end - from);
    if wanted.is_some() {
        response = response
            .status(StatusCode::PARTIAL_CONTENT)
            .header("content-range", format!("bytes {from}-{}/{all}", end.saturating_sub(1)));
    }
    let cut = take(&hub.behaviour.cuts).then_some(from + (end - from) / 2);
    let body = stream::try_unfold(from, move |at| {
        let (hub, file, bytes) = (hub.clone(), file.clone(), bytes.clone());
        async move {
            if at >= end {
                return Ok(None);
            }
            let mut next = (at + PIECE_BYTES).min(end);
            if let Some(cut) = cut {
                if at >= cut {
                    return Err(io::Error::from(io::ErrorKind::ConnectionReset));
                }
                next = next.min(cut.max(at + 1));
            }
            loop {
                let go_on = hub.go_on.notified();
                tokio::pin!(go_on);
                go_on.as_mut().enable();
                let most = hub.behaviour.hold_after.load(Ordering::SeqCst);
                if most < 0 || hub.total.load(Ordering::SeqCst) < most as u64 {
                    break;
                }
                go_on.await;
            }
            let mut piece = bytes[at..next].to_vec();
            let flip = hub.behaviour.flip.load(Ordering::SeqCst);
            if let Some(byte) = usize::try_from(flip).ok().and_then(|f| piece.get_mut(f.checked_sub(at)?)) {
                *byte ^= 1;
            }
            hub.total.fetch_add(piece.len() as u64, Ordering::SeqCst);
            if let Some(sent) = lock(&hub.sent).get_mut(&file) {
                sent[at..next].iter_mut().for_each(|n| *n = n.saturating_add(1));
            }
            Ok(Some((Bytes::from(piece), next)))
        }
    });
    response.body(Body::from_stream(body)).expect("a response")
}
