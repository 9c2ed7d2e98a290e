use std::path::Path;
use std::sync::{Arc, Mutex};

use axum::Router;
use axum::body::Body;
use axum::extract::{Path as UrlPath, State};
use axum::http::{HeaderMap, Response, StatusCode};
use axum::routing::get;

use super::*;

const TOKEN: &str = "hf_secret";

/// A server that speaks the hub's protocol: files of one repository, the large ones behind a redirect to another server.
#[derive(Clone, Default)]
struct Hub {
    files: Arc<Vec<(String, Vec<u8>)>>,
    elsewhere: Option<String>,
    gated: bool,
    /// Ranges are not understood.
    whole: bool,
    /// (path, range, whether the token came along)
    seen: Arc<Mutex<Vec<(String, String, bool)>>>,
}

impl Hub {
    async fn serve(self) -> String {
        let app = Router::new()
            .route("/api/models/{owner}/{repo}/revision/{revision}", get(list))
            .route("/{owner}/{repo}/resolve/{revision}/{*file}", get(resolve))
            .route("/content/{*file}", get(content))
            .with_state(self);
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        tokio::spawn(async move { axum::serve(listener, app).await });
        address
    }

    fn note(&self, path: &str, headers: &HeaderMap) -> bool {
        let header = |name: &str| headers.get(name).and_then(|v| v.to_str().ok()).unwrap_or_default().to_owned();
        let known = header("authorization") == format!("Bearer {TOKEN}");
        self.seen.lock().unwrap().push((path.to_owned(), header("range"), known));
        known
    }
}

fn answer(status: StatusCode, body: impl Into<Body>) -> Response<Body> {
    Response::builder().status(status).body(body.into()).unwrap()
}

async fn list(
    State(hub): State<Hub>,
    UrlPath((owner, repo, revision)): UrlPath<(String, String, String)>,
    headers: HeaderMap,
) -> Response<Body> {
    if hub.gated && !hub.note("list", &headers) {
        return answer(StatusCode::UNAUTHORIZED, "");
    }
    if (owner.as_str(), repo.as_str(), revision.as_str()) != ("o", "r", "main") {
        return answer(StatusCode::NOT_FOUND, "");
    }
    let siblings: Vec<_> =
        hub.files.iter().map(|(name, bytes)| serde_json::json!({ "rfilename": name, "size": bytes.len() })).collect();
    answer(StatusCode::OK, serde_json::json!({ "sha": "abc", "siblings": siblings }).to_string())
}

async fn resolve(
    State(hub): State<Hub>,
    UrlPath((_, _, _, file)): UrlPath<(String, String, String, String)>,
    headers: HeaderMap,
) -> Response<Body> {
    match &hub.elsewhere {
        Some(other) => {
            hub.note(&file, &headers);
            let to = format!("{other}/content/{file}");
            Response::builder().status(StatusCode::FOUND).header("location", to).body(Body::empty()).unwrap()
        }
        None => content(State(hub), UrlPath(file), headers).await,
    }
}

async fn content(State(hub): State<Hub>, UrlPath(file): UrlPath<String>, headers: HeaderMap) -> Response<Body> {
    hub.note(&file, &headers);
    let Some((_, bytes)) = hub.files.iter().find(|(name, _)| *name == file) else {
        return answer(StatusCode::NOT_FOUND, "");
    };
    let range = headers.get("range").and_then(|r| r.to_str().ok()).and_then(|r| r.strip_prefix("bytes="));
    let Some((from, to)) = range.and_then(|r| r.split_once('-')).filter(|_| !hub.whole) else {
        return answer(StatusCode::OK, bytes.clone());
    };
    let (from, to): (usize, usize) = (from.parse().unwrap(), to.parse().unwrap());
    let to = to.min(bytes.len() - 1);
    Response::builder()
        .status(StatusCode::PARTIAL_CONTENT)
        .header("content-range", format!("bytes {from}-{to}/{}", bytes.len()))
        .body(bytes[from..=to].to_vec().into())
        .unwrap()
}

fn tiny(name: &str) -> Vec<u8> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m.gguf");
    capstan_testkit::tiny::write(name, &path).unwrap();
    std::fs::read(path).unwrap()
}

fn name(text: &str) -> ModelName {
    text.parse().unwrap()
}

#[tokio::test]
async fn a_model_is_known_from_its_first_bytes_and_the_token_stays_with_the_hub() {
    let file = tiny("deepseek2");
    let files = vec![("README.md".to_owned(), b"hello".to_vec()), ("x/Tiny-Q4_K_M.gguf".to_owned(), file.clone())];
    let far = Hub { files: Arc::new(files.clone()), ..Hub::default() };
    let there = far.clone().serve().await;
    let hub = Hub { files: Arc::new(files), elsewhere: Some(there), gated: true, ..Hub::default() };
    let address = hub.clone().serve().await;
    let remote = Remote::at(&address, Some(TOKEN.into())).unwrap();
    let model = remote.model(&name("hf:o/r")).await.unwrap();
    assert_eq!((model.architecture(), model.bytes()), ("deepseek2", file.len() as u64));
    assert!(hub.seen.lock().unwrap().iter().all(|(_, _, known)| *known));
    let far = far.seen.lock().unwrap().clone();
    assert!(!far.is_empty() && far.iter().all(|(_, range, known)| !known && range.starts_with("bytes=0-")), "{far:?}");

    let stranger = Remote::at(&address, None).unwrap();
    assert!(matches!(stranger.model(&name("hf:o/r")).await, Err(RemoteError::Forbidden { status: 401, .. })));
    assert!(matches!(remote.model(&name("hf:o/other")).await, Err(RemoteError::NotFound { .. })));
    assert!(matches!(remote.model(&name("hf:o/r:Q8_0")).await, Err(RemoteError::Name(NameError::None { .. }))));
}

#[tokio::test]
async fn a_server_without_ranges_and_one_that_is_not_there() {
    let hub = Hub { files: Arc::new(vec![("m.gguf".to_owned(), tiny("llama"))]), whole: true, ..Hub::default() };
    let address = hub.serve().await;
    let remote = Remote::at(&address, None).unwrap();
    let model = remote.model(&name(&format!("{address}/content/m.gguf"))).await.unwrap();
    assert_eq!(model.architecture(), "llama");
    let missing = remote.model(&name(&format!("{address}/content/n.gguf"))).await;
    assert!(matches!(missing, Err(RemoteError::NotFound { .. })));
    // A port that was free a moment ago.
    let closed = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    let gone = remote.model(&name(&format!("http://{closed}/m.gguf"))).await;
    assert!(matches!(gone, Err(RemoteError::Unreachable { .. })), "{gone:?}");
}

#[tokio::test]
async fn ranges_are_those_that_were_asked_for() {
    let bytes: Vec<u8> = (0..=255).cycle().take(10_000).collect();
    for whole in [false, true] {
        let hub = Hub { files: Arc::new(vec![("m.gguf".to_owned(), bytes.clone())]), whole, ..Hub::default() };
        let address = hub.serve().await;
        let remote = Remote::at(&address, None).unwrap();
        let file = remote.resolve(&name(&format!("{address}/content/m.gguf"))).await.unwrap().files.remove(0);
        let (first, known) = remote.first(&file, 100).await.unwrap();
        assert_eq!((first, known.bytes), (bytes[..100].to_vec(), Some(10_000)));
        let mut all = Vec::new();
        match remote.pieces(&known, 300, 500).await {
            Ok(mut pieces) => {
                while let Some(piece) = pieces.next().await.unwrap() {
                    all.extend_from_slice(&piece);
                }
                assert!(!whole && all == bytes[300..800]);
            }
            Err(error) => assert!(whole && matches!(error, RemoteError::NoRanges { .. }), "{error}"),
        }
        assert_eq!(remote.range(&file, 300, 500).await.unwrap(), bytes[300..800]);
        assert!(matches!(remote.range(&file, 9_999, 2).await, Err(RemoteError::Nonsense { .. })));
    }
}

fn files(names: &[&str]) -> Vec<RemoteFile> {
    let file = |n: &&str| RemoteFile {
        path: n.into(),
        url: String::new(),
        on_hub: true,
        bytes: None,
        sha256: None,
        etag: None,
    };
    names.iter().map(file).collect()
}

#[test]
fn a_quantisation_means_one_model_of_a_repository() {
    let all = [
        "README.md",
        "mmproj-F16.gguf",
        "M-Q8_0.gguf",
        "M-Q4_K_M.gguf",
        "UD-Q2_K_XL/M-UD-Q2_K_XL-00002-of-00002.gguf",
        "UD-Q2_K_XL/M-UD-Q2_K_XL-00001-of-00002.gguf",
        "M-UD-Q4_K_M.gguf",
    ];
    let chosen = |wanted: Option<&str>| {
        let found = choose("o/r", wanted, files(&all))?;
        Ok::<_, NameError>(found.into_iter().map(|f| f.path.display().to_string()).collect::<Vec<_>>())
    };
    assert_eq!(chosen(Some("q8_0")).unwrap(), ["M-Q8_0.gguf"]);
    assert_eq!(chosen(Some("Q4_K_M")).unwrap(), ["M-Q4_K_M.gguf"]);
    assert_eq!(chosen(Some("UD-Q4_K_M")).unwrap(), ["M-UD-Q4_K_M.gguf"]);
    assert_eq!(chosen(None).unwrap(), ["M-Q4_K_M.gguf"]);
    let parts = chosen(Some("UD-Q2_K_XL")).unwrap();
    assert!(parts.len() == 2 && parts[0].ends_with("00001-of-00002.gguf"));
    let none = chosen(Some("Q4_K")).unwrap_err().to_string();
    assert!(none.contains("M-Q8_0"), "{none}");
    assert!(matches!(choose("o/r", None, files(&["a.gguf", "b.gguf"])), Err(NameError::Several { .. })));
    assert!(matches!(choose("o/r", None, files(&["a.safetensors"])), Err(NameError::None { .. })));
}

#[test]
fn names_are_read_and_written_alike() {
    for text in ["hf:o/r", "hf:o/r:Q4_K_M", "hf:o/r:Q4_K_M@v1.0", "hf:o/r@refs/pr/1", "https://h/m.gguf", "m.gguf"] {
        assert_eq!(name(text).to_string(), text);
    }
    assert_eq!(name("file:///m/x.gguf"), ModelName::File(Path::new("/m/x.gguf").into()));
    for bad in ["hf:", "hf:o", "hf:o/", "hf:o/../r", "hf:o/r:", "hf:o/r@", "hf:o/r@a/../b", "hf:o/r?x=1", "hf:o/r:a b"]
    {
        assert!(matches!(bad.parse::<ModelName>(), Err(NameError::Hub(_))), "{bad}");
    }
    assert!(matches!("ftp://h/m.gguf".parse::<ModelName>(), Err(NameError::Url(_))));
    assert_eq!("".parse::<ModelName>(), Err(NameError::Length));
}
