//! A pull, from its source to a record in the catalogue.
//!
//! ```text
//! source ─▶ header ─▶ placement ─▶ an order for each node ─▶ SHA-256 along the nodes ─▶ published ─▶ record, everywhere
//!              └──── head, kept ───────┘ noted on disk: a pull that was cut off goes on here
//! ```
//!
//! Nothing is visible before the last two steps: what a node puts together has no name that a load could find.
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use capstan_gguf::Model;
use capstan_planner::PlanOptions;
use capstan_proto::control::{Request, clip};
use capstan_proto::manage::ManageError;
use capstan_proto::weights::{
    AssembleOrder, Catalogue, FileRecord, ModelRecord, Part, PartKind, PartReply, PartRequest, Provider, PullEvent,
    PullRequest, PulledFile, REPLICAS_DEFAULT, REPLICAS_MAX, Span, StoredFile,
};
use capstan_proto::{ContentHash, LayerRange, ModelId, NodeId};
use capstan_store::remote::{Headers, ModelName, Remote, RemoteError, RemoteFile};
use serde::{Deserialize, Serialize};
use tokio::sync::{broadcast, mpsc};

use crate::assembling::{self, ask};
use crate::catalogue::{header_bytes, pieces_of};
use crate::config::NodeConfig;
use crate::control_client::CALL_TIMEOUT;
use crate::cutter::OpenModel;
use crate::deployments::{UBATCH, check_name, default_name, node_named};
use crate::digests::{self, Place};
use crate::files;
use crate::membership::{now_ms, now_s};
use crate::node::Shared;
use crate::placing;
use crate::plan_pull::{file_order, shared_and_rest, spans_order, stage_order};
use crate::throttle::Throttle;

/// Events of a pull that wait for whoever watches; one that reads slower misses progress, never the outcome.
const EVENTS: usize = 256;
/// Pulls at once: each has its connections and its progress.
const PULLS_MAX: usize = 8;
/// What a placement is made for before anybody says how the model will be used: as a load does that says nothing.
const CTX: u32 = 4096;
/// See [`CTX`].
const SLOTS: u32 = 4;

/// The pulls that are under way, by their source.
#[derive(Default)]
pub(crate) struct Pulls(Mutex<HashMap<String, Active>>);

struct Active {
    events: broadcast::Sender<PullEvent>,
    planned: Option<PullEvent>,
}

/// What is known of a pull that was begun, for whoever goes on with it.
#[derive(Clone, Serialize, Deserialize)]
struct Pending {
    request: PullRequest,
    /// With its head, and without what is being fetched.
    record: ModelRecord,
    /// Which node gets which layers.
    stages: Vec<(NodeId, LayerRange)>,
    /// What no shard holds.
    rest: Vec<Span>,
}

/// A file that a node puts together.
struct Job {
    node: NodeId,
    kind: PartKind,
    order: AssembleOrder,
}

/// Tells whoever watches.
struct Events<'a> {
    shared: &'a Shared,
    key: &'a str,
    events: broadcast::Sender<PullEvent>,
    /// Bytes from outside, by job.
    outside: Mutex<HashMap<usize, u64>>,
}

impl Events<'_> {
    fn tell(&self, event: PullEvent) {
        if matches!(event, PullEvent::Planned { .. })
            && let Some(active) = self.shared.pulls.table().get_mut(self.key)
        {
            active.planned = Some(event.clone());
        }
        // Nobody may be watching.
        self.events.send(event).ok();
    }

    fn outside_bytes(&self) -> u64 {
        self.outside.lock().unwrap_or_else(PoisonError::into_inner).values().sum()
    }

    fn note_outside(&self, job: usize, bytes: u64) {
        self.outside.lock().unwrap_or_else(PoisonError::into_inner).insert(job, bytes);
    }
}

impl Pulls {
    fn table(&self) -> std::sync::MutexGuard<'_, HashMap<String, Active>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What reads models that are elsewhere.
pub(crate) fn remote(config: &NodeConfig) -> Option<Arc<Remote>> {
    let remote = match &config.hub {
        Some(hub) => Remote::at(&hub.endpoint, hub.token.clone()),
        None => Remote::from_env(),
    };
    match remote {
        Ok(remote) => Some(Arc::new(remote)),
        Err(error) => {
            tracing::warn!(%error, "models elsewhere cannot be read");
            None
        }
    }
}

fn bad(message: impl Into<String>) -> ManageError {
    ManageError::new(400, message)
}

/// Starts a pull, or joins whoever watches the same one.
pub(crate) async fn pull(shared: &Arc<Shared>, request: PullRequest) -> Result<mpsc::Receiver<PullEvent>, ManageError> {
    request.source.parse::<ModelName>().map_err(|e| bad(e.to_string()))?;
    if let Some(name) = &request.name {
        check_name(name)?;
    }
    if request.replicas.is_some_and(|n| n == 0 || n > REPLICAS_MAX) {
        return Err(bad(format!("replicas is {}; take 1 to {REPLICAS_MAX}", request.replicas.unwrap_or(0))));
    }
    for node in request.nodes.iter().chain(request.layers.iter().map(|(node, _)| node)) {
        node_named(shared, node)?;
    }
    let mut events = begin(shared, request)?;
    let (forward, receiver) = mpsc::channel(EVENTS);
    if let Some(planned) = events.1.take() {
        forward.try_send(planned).ok();
    }
    tokio::spawn(async move {
        loop {
            match events.0.recv().await {
                Ok(event) => {
                    if forward.send(event).await.is_err() {
                        return;
                    }
                }
                Err(broadcast::error::RecvError::Lagged(_)) => {}
                Err(broadcast::error::RecvError::Closed) => return,
            }
        }
    });
    Ok(receiver)
}

/// Goes on with the pulls that the daemon was at when it ended.
pub(crate) async fn resume(shared: Arc<Shared>) {
    let Ok(entries) = std::fs::read_dir(shared.models.dir()) else { return };
    for path in entries.flatten().map(|e| e.path()) {
        let is_pending = path.file_name().and_then(|n| n.to_str()).is_some_and(|n| n.starts_with("pulling-"));
        if !is_pending {
            continue;
        }
        if let Ok(Some(pending)) = files::read_json::<Pending>(&path) {
            tracing::info!(source = pending.request.source, "going on with a pull");
            if let Err(error) = begin(&shared, pending.request) {
                tracing::warn!(%error, "a pull could not be taken up again");
            }
        }
    }
}

fn pending_path(shared: &Shared, key: &str) -> PathBuf {
    shared.models.dir().join(format!("pulling-{key}.json"))
}

type Watched = (broadcast::Receiver<PullEvent>, Option<PullEvent>);

fn begin(shared: &Arc<Shared>, request: PullRequest) -> Result<Watched, ManageError> {
    let key = blake3::hash(request.source.as_bytes()).to_hex()[..16].to_owned();
    let mut table = shared.pulls.table();
    if let Some(active) = table.get(&key) {
        return Ok((active.events.subscribe(), active.planned.clone()));
    }
    if table.len() >= PULLS_MAX {
        return Err(ManageError::new(409, format!("{PULLS_MAX} pulls are under way already; wait for one to end")));
    }
    let (events, watched) = broadcast::channel(EVENTS);
    table.insert(key.clone(), Active { events: events.clone(), planned: None });
    drop(table);
    let shared = shared.clone();
    tokio::spawn(async move {
        let told = Events { shared: &shared, key: &key, events, outside: Mutex::default() };
        let outcome = tokio::select! {
            outcome = work(&shared, &key, &request, &told) => outcome,
            () = shared.stop.cancelled() => Err("the daemon is stopping; the pull goes on when it is started again".into()),
        };
        let last = match outcome {
            Ok(record) => {
                tracing::info!(model = record.name, source = record.source, "a model was pulled");
                PullEvent::Done { name: record.name, id: record.id, outside_bytes: told.outside_bytes() }
            }
            Err(message) => {
                tracing::warn!(source = request.source, message, "a pull failed");
                PullEvent::Failed { message: clip(message) }
            }
        };
        // Whoever asks from now on starts anew.
        shared.pulls.table().remove(&key);
        told.tell(last);
    });
    Ok((watched, None))
}

async fn work(
    shared: &Arc<Shared>,
    key: &str,
    request: &PullRequest,
    events: &Events<'_>,
) -> Result<ModelRecord, String> {
    let name: ModelName = request.source.parse().map_err(|e: capstan_store::remote::NameError| e.to_string())?;
    let path = pending_path(shared, key);
    let noted = files::read_json::<Pending>(&path).ok().flatten();
    let usable = noted.filter(|p| {
        let same = p.request.nodes == request.nodes && p.request.layers == request.layers;
        same && p.stages.iter().all(|(node, _)| shared.membership.is_member(*node) || *node == shared.id)
    });
    let pending = match usable {
        Some(pending) => Pending { request: request.clone(), ..pending },
        None => {
            let begun = match &name {
                ModelName::File(path) => from_file(shared, path, request, events).await?,
                name => from_remote(shared, name, request).await?,
            };
            match begun {
                Begun::Known(record) => return Ok(record),
                Begun::New(pending) => pending,
            }
        }
    };
    let mut pending = pending;
    pending.record.name = name_for(shared, &pending.record, request)?;
    pending.record.replicas = request.replicas.unwrap_or(pending.record.replicas);
    files::write_json(&path, &pending).map_err(|e| format!("the pull cannot be noted in {}: {e}", path.display()))?;
    let fetched = fetch(shared, &pending, events).await;
    match fetched {
        Ok(record) => {
            std::fs::remove_file(&path).ok();
            Ok(record)
        }
        Err(Failure::Useless(message)) => {
            std::fs::remove_file(&path).ok();
            Err(message)
        }
        Err(Failure::ForNow(message)) => Err(message),
    }
}

/// How a pull failed.
enum Failure {
    /// What has arrived is good for another try.
    ForNow(String),
    /// What has arrived was thrown away.
    Useless(String),
}

impl From<String> for Failure {
    fn from(message: String) -> Self {
        Self::ForNow(message)
    }
}

enum Begun {
    Known(ModelRecord),
    New(Pending),
}

/// The name that a model gets, if it is free.
fn name_for(shared: &Shared, record: &ModelRecord, request: &PullRequest) -> Result<String, String> {
    let first = record.files.first().map(|f| f.path.clone()).unwrap_or_default();
    let name = request.name.clone().unwrap_or_else(|| default_name(Path::new(&first)));
    check_name(&name).map_err(|e| e.message)?;
    match shared.models.list().into_iter().find(|r| r.name == name && r.id != record.id) {
        Some(other) => Err(format!(
            "the catalogue has another model {name:?} ({}); choose another name with --name, or remove that one with \
             `capstan model remove {name}`",
            other.source
        )),
        None => Ok(name),
    }
}

fn model_id(source: &str, revision: Option<&str>, files: &[FileRecord], contents: &[ContentHash]) -> ModelId {
    let mut hasher = blake3::Hasher::new_derive_key("capstan 2026 model");
    let mut text = |t: &str| {
        hasher.update(&(t.len() as u64).to_le_bytes());
        hasher.update(t.as_bytes());
    };
    text(source);
    text(revision.unwrap_or_default());
    for file in files {
        text(&file.path);
        text(&file.bytes.to_string());
        text(&file.sha256.map(|s| s.to_string()).unwrap_or_default());
        text(file.etag.as_deref().filter(|_| file.sha256.is_none()).unwrap_or_default());
    }
    contents.iter().for_each(|c| text(&c.to_string()));
    ModelId(*hasher.finalize().as_bytes())
}

fn new_record(shared_stamp: u64, source: String, model: &Model, files: Vec<FileRecord>) -> ModelRecord {
    ModelRecord {
        id: ModelId([0; 32]),
        name: String::new(),
        source,
        revision: None,
        architecture: model.architecture().to_owned(),
        layers: model.n_layers(),
        files,
        parts: Vec::new(),
        replicas: REPLICAS_DEFAULT,
        created_unix_s: now_s(),
        stamp: shared_stamp,
        removed: false,
    }
}

/// A record for files of this node; their contents are not hashed.
pub(crate) fn record_of_file(path: &Path, model: &Model, name: &str, stamp: u64) -> ModelRecord {
    let file = |path: &PathBuf| FileRecord {
        path: path.display().to_string(),
        bytes: std::fs::metadata(path).map_or(0, |m| m.len()),
        sha256: None,
        url: None,
        on_hub: false,
        etag: None,
    };
    let files = model.files().iter().map(file).collect();
    ModelRecord { name: name.into(), ..new_record(stamp, format!("file:{}", path.display()), model, files) }
}

/// Newer than what the catalogue knows of it, and than its removal.
fn stamp_after(shared: &Shared, id: ModelId) -> u64 {
    let known = shared.models.records().into_iter().find(|r| r.id == id).map_or(0, |r| r.stamp);
    now_ms().max(known + 1)
}

/// What a model at the source is, and who gets what of it.
async fn from_remote(shared: &Arc<Shared>, name: &ModelName, request: &PullRequest) -> Result<Begun, String> {
    let say = |e: RemoteError| e.to_string();
    let remote = shared.remote.clone().ok_or("this node cannot use the network; see its log")?;
    let resolved = remote.resolve(name).await.map_err(say)?;
    let source = match name {
        ModelName::Hub { repo, quantisation, .. } => {
            ModelName::Hub { repo: repo.clone(), quantisation: quantisation.clone(), revision: None }.to_string()
        }
        other => other.to_string(),
    };
    if resolved.files.iter().all(|f| f.bytes.is_some() && f.sha256.is_some()) {
        let files: Vec<_> = resolved.files.iter().map(file_record).collect();
        let id = model_id(&source, resolved.commit.as_deref(), &files, &[]);
        if let Some(begun) = again(shared, id, request).await? {
            return Ok(begun);
        }
    }
    let Headers { commit, files, beginnings, model } = remote.headers(resolved).await.map_err(say)?;
    let mut record = new_record(0, source, &model, files.iter().map(file_record).collect());
    record.id = model_id(&record.source, commit.as_deref(), &record.files, &[]);
    record.revision = commit;
    record.stamp = stamp_after(shared, record.id);
    if let Some(begun) = again(shared, record.id, request).await? {
        return Ok(begun);
    }
    let model = Arc::new(model);
    let stages = place(shared, &OpenModel::outline(model.clone(), record.id), request).await?;
    let mut head: Vec<Span> = (beginnings.iter().enumerate())
        .map(|(i, b)| Span { file: i as u16, from: 0, bytes: b.bytes.len() as u64 })
        .collect();
    let mut bytes: Vec<u8> = beginnings.into_iter().flat_map(|b| b.bytes).collect();
    let (common, rest) = beyond(&record, &model, &stages, &head)?;
    for span in common {
        let Some(file) = files.get(usize::from(span.file)) else { continue };
        bytes.extend(remote.range(file, span.from, span.bytes).await.map_err(say)?);
        head.push(span);
    }
    record.parts = vec![keep_head(shared, head, &bytes).await?];
    Ok(Begun::New(Pending { request: request.clone(), record, stages, rest }))
}

fn file_record(f: &RemoteFile) -> FileRecord {
    FileRecord {
        path: f.path.display().to_string(),
        bytes: f.bytes.unwrap_or(0),
        sha256: f.sha256.as_ref().and_then(|s| s.parse().ok()),
        url: Some(f.url.clone()),
        on_hub: f.on_hub,
        etag: f.etag.clone(),
    }
}

/// A pull of a model that is in the catalogue already: done, or other nodes are to get layers of it.
async fn again(shared: &Arc<Shared>, id: ModelId, request: &PullRequest) -> Result<Option<Begun>, String> {
    let Some(record) = shared.models.get(id) else { return Ok(None) };
    if let Some(known) = known(shared, &record, request) {
        return Ok(Some(Begun::Known(known)));
    }
    let model = match shared.outline(&record).await {
        Ok(model) => OpenModel::outline(Arc::new(model), id),
        Err(reason) => {
            tracing::info!(reason, "a model of the catalogue is pulled anew");
            return Ok(None);
        }
    };
    let stages = place(shared, &model, request).await?;
    // What no shard holds is kept already.
    Ok(Some(Begun::New(Pending { request: request.clone(), record, stages, rest: Vec::new() })))
}

/// What a model of this node's disk is, and who gets what of it.
async fn from_file(
    shared: &Arc<Shared>,
    path: &Path,
    request: &PullRequest,
    events: &Events<'_>,
) -> Result<Begun, String> {
    let path = std::fs::canonicalize(path).map_err(|e| format!("{} cannot be read: {e}", path.display()))?;
    let model = shared.open_model(path.clone()).await?;
    let mut record = record_of_file(&path, &model.model, "", 0);
    let total_bytes = record.bytes();
    let mut before = 0;
    for (i, file) in model.model.files().iter().enumerate() {
        let mut throttle = Throttle::default();
        let progress = |done: u64, _| {
            if throttle.lets(before + done, total_bytes) {
                events.tell(PullEvent::Verifying { done_bytes: before + done, total_bytes });
            }
        };
        let offer = shared.store.offer(file, progress).await.map_err(|e| e.to_string())?;
        record.parts.push(Part { hash: ContentHash(offer.hash), bytes: offer.bytes, kind: PartKind::File(i as u16) });
        before += offer.bytes;
    }
    let contents: Vec<_> = record.parts.iter().map(|p| p.hash).collect();
    // Where a file lies says nothing about what it is.
    let nameless: Vec<_> = record.files.iter().map(|f| FileRecord { path: String::new(), ..f.clone() }).collect();
    record.id = model_id("file", None, &nameless, &contents);
    record.stamp = stamp_after(shared, record.id);
    if let Some(known) = known(shared, &record, request) {
        return Ok(Begun::Known(known));
    }
    let stages = place(shared, &model, request).await?;
    let of = |i: usize, bytes: u64| Span { file: i as u16, from: 0, bytes: header_bytes(&model.model, i, bytes) };
    let head: Vec<Span> = record.files.iter().enumerate().map(|(i, f)| of(i, f.bytes)).collect();
    let (files, spans) = (model.model.files().to_vec(), head.clone());
    let read = move || {
        let mut bytes = Vec::new();
        for (path, span) in files.iter().zip(spans) {
            use std::io::Read;
            std::fs::File::open(path)?.take(span.bytes).read_to_end(&mut bytes)?;
        }
        Ok::<_, std::io::Error>(bytes)
    };
    let bytes = tokio::task::spawn_blocking(read).await.map_err(|e| e.to_string())?.map_err(|e| e.to_string())?;
    let head = keep_head(shared, head, &bytes).await?;
    record.parts.push(head);
    record.parts.sort();
    Ok(Begun::New(Pending { request: request.clone(), record, stages, rest: Vec::new() }))
}

/// The model as it is in the catalogue already, where nothing more was asked for.
fn known(shared: &Shared, record: &ModelRecord, request: &PullRequest) -> Option<ModelRecord> {
    let known = shared.models.get(record.id)?;
    let more = !request.nodes.is_empty() || !request.layers.is_empty();
    let here = known.parts.iter().all(|p| shared.has_part(p.hash) || !shared.holders(p.hash).is_empty());
    if more || !here {
        return None;
    }
    if let Some(replicas) = request.replicas.filter(|n| *n != known.replicas) {
        shared.models.put(ModelRecord { replicas, stamp: stamp_after(shared, known.id), ..known.clone() });
        shared.models.changed.notify_one();
    }
    shared.models.get(record.id)
}

/// What several of the shards need, and what none holds; nothing where the files stay whole.
fn beyond(
    record: &ModelRecord,
    model: &Model,
    stages: &[(NodeId, LayerRange)],
    head: &[Span],
) -> Result<(Vec<Span>, Vec<Span>), String> {
    match stages {
        [_] => Ok((Vec::new(), Vec::new())),
        stages => shared_and_rest(record, model, &stages.iter().map(|(_, range)| *range).collect::<Vec<_>>(), head),
    }
}

/// Puts a model's head into the store.
async fn keep_head(shared: &Shared, spans: Vec<Span>, bytes: &[u8]) -> Result<Part, String> {
    let file = tempfile_in(shared.models.dir(), bytes)?;
    let offer = shared.store.adopt(&file, |_, _| {}).await.map_err(|e| e.to_string())?;
    Ok(Part { hash: ContentHash(offer.hash), bytes: offer.bytes, kind: PartKind::Head(spans) })
}

fn tempfile_in(dir: &Path, bytes: &[u8]) -> Result<PathBuf, String> {
    let path = dir.join(format!("head-{:016x}.tmp", rand::random::<u64>()));
    std::fs::write(&path, bytes)
        .map_err(|e| format!("the model's head cannot be written to {}: {e}", dir.display()))?;
    Ok(path)
}

/// Which node gets which layers: as a load would place them now, else as if nothing else were loaded.
async fn place(
    shared: &Arc<Shared>,
    model: &OpenModel,
    request: &PullRequest,
) -> Result<Vec<(NodeId, LayerRange)>, String> {
    let named = |node: &String| node_named(shared, node).map_err(|e| e.message);
    let nodes = request.nodes.iter().map(named).collect::<Result<Vec<_>, _>>()?;
    let mut layers = Vec::new();
    for (node, range) in &request.layers {
        layers.push((named(node)?, *range));
    }
    if nodes.is_empty() && layers.is_empty() && shared.membership.others().is_empty() {
        return Ok(vec![(shared.id, model.model.all_layers())]);
    }
    shared.poll_all().await;
    let train = model.model.profile().context_train;
    let ctx = if train == 0 { CTX } else { train.min(CTX) };
    let options = PlanOptions { ctx, slots: SLOTS, spares_per_stage: 0, draft_bytes: 0, ubatch: UBATCH, nodes, layers };
    let placed = match placing::place(shared, model, options.clone(), false).await {
        Err(error) if error.status == 409 => placing::place_idle(shared, model, options).await,
        other => other,
    };
    let (placement, _) = placed.map_err(|e| e.message)?;
    Ok(placement.stages().iter().map(|s| (s.node, s.layers)).collect())
}

/// Brings what is missing, compares hashes, publishes, and puts the record into the catalogue.
async fn fetch(shared: &Arc<Shared>, pending: &Pending, events: &Events<'_>) -> Result<ModelRecord, Failure> {
    let mut record = pending.record.clone();
    let model = shared.outline(&record).await?;
    let jobs = jobs(shared, pending, &model)?;
    let files = jobs.iter().map(|job| PulledFile {
        node_name: shared.membership.name_of(job.node),
        what: job.order.what.clone(),
        bytes: job.order.bytes,
    });
    events.tell(PullEvent::Planned {
        name: record.name.clone(),
        revision: record.revision.clone(),
        bytes: record.bytes(),
        files: files.collect(),
    });
    let all = jobs.iter().enumerate().map(|(i, job)| run(shared, i, job, events));
    let assembled = match futures::future::try_join_all(all).await {
        Ok(assembled) => assembled,
        Err(message) => return Err(Failure::ForNow(message)),
    };
    let mut places: Vec<Place> = (jobs.iter().zip(&assembled))
        .map(|(job, id)| Place { node: job.node, file: StoredFile::Assembly(*id), pieces: job.order.pieces.clone() })
        .collect();
    for part in &record.parts {
        let node =
            if shared.has_part(part.hash) { Some(shared.id) } else { shared.holders(part.hash).first().copied() };
        let Some(node) = node else { continue };
        places.push(Place { node, file: StoredFile::Part(part.hash), pieces: pieces_of(&record, &model, part) });
    }
    if let Err(message) = compare(shared, &record, &places, events).await {
        let message = message?;
        for (job, assembly) in jobs.iter().zip(&assembled) {
            ask(shared, job.node, PartRequest::Discard { assembly: *assembly }).await.ok();
        }
        for part in &record.parts {
            if matches!(part.kind, PartKind::Head(_)) && shared.models.get(record.id).is_none() {
                shared.store.remove(&part.hash.0).await.ok();
            }
        }
        return Err(Failure::Useless(message));
    }
    for (job, assembly) in jobs.into_iter().zip(assembled) {
        let name = shared.membership.name_of(job.node);
        match ask(shared, job.node, PartRequest::Publish { assembly }).await? {
            PartReply::Published { hash, bytes } => record.parts.push(Part { hash, bytes, kind: job.kind }),
            PartReply::No(reason) => return Err(Failure::ForNow(format!("on node {name}: {reason}"))),
            _ => return Err(Failure::ForNow(format!("node {name} answered something else; update capstan there"))),
        }
    }
    record.parts.sort();
    record.parts.dedup_by(|a, b| a.hash == b.hash);
    record.check().map_err(|e| format!("its record breaks a limit: {e}"))?;
    shared.models.put(record.clone());
    for part in &record.parts {
        assembling::settled(shared, part.hash);
    }
    tell_all(shared).await;
    shared.models.changed.notify_one();
    Ok(record)
}

/// What each node is to put together.
fn jobs(shared: &Shared, pending: &Pending, model: &Model) -> Result<Vec<Job>, String> {
    let record = &pending.record;
    // What is in the catalogue already need not come from outside again.
    let known = shared.models.get(record.id);
    let mut providers = shared.providers(record, model);
    for provider in known.iter().flat_map(|k| shared.providers(k, model)) {
        if providers.iter().all(|p| p.hash != provider.hash) {
            providers.push(provider);
        }
    }
    let whole_here = (0..record.files.len())
        .all(|i| record.parts.iter().any(|p| p.kind == PartKind::File(i as u16) && shared.has_part(p.hash)));
    let mut jobs = Vec::new();
    for (node, range) in &pending.stages {
        if *node == shared.id && whole_here {
            continue;
        }
        if pending.stages.len() == 1 && *node == shared.id {
            for i in 0..record.files.len() as u16 {
                jobs.push(Job {
                    node: *node,
                    kind: PartKind::File(i),
                    order: file_order(record, i, providers.clone()),
                });
            }
            continue;
        }
        let (kind, order) = stage_order(record, model, *range, providers.clone())?;
        jobs.push(Job { node: *node, kind, order });
    }
    if !pending.rest.is_empty() {
        let kind = PartKind::Rest(pending.rest.clone());
        jobs.push(Job { node: shared.id, kind, order: spans_order(record, &pending.rest, providers) });
    }
    Ok(jobs)
}

/// Has one file put together. Where its node cannot reach the source, this one fetches it and hands it on.
async fn run(shared: &Shared, i: usize, job: &Job, events: &Events<'_>) -> Result<ContentHash, String> {
    let mut throttle = Throttle::default();
    let mut tell = |p: capstan_store::AssemblyProgress| {
        events.note_outside(i, p.outside_bytes);
        if throttle.lets(p.done_bytes, p.total_bytes) {
            events.tell(PullEvent::Progress {
                file: i as u16,
                done_bytes: p.done_bytes,
                total_bytes: p.total_bytes,
                outside_bytes: events.outside_bytes(),
            });
        }
    };
    let trouble = match assembling::on(shared, job.node, &job.order, &mut tell).await {
        Ok((id, outside_bytes)) => {
            events.note_outside(i, outside_bytes);
            return Ok(id);
        }
        Err(trouble) => trouble,
    };
    if job.node == shared.id || !trouble.outside {
        return Err(trouble.message);
    }
    tracing::info!(reason = trouble.message, "a node cannot reach the source; its part comes by way of this one");
    let (id, outside_bytes) = assembling::here(shared, &job.order, &mut tell).await.map_err(|e| e.to_string())?;
    events.note_outside(i, outside_bytes);
    let offer = shared.store.publish(&id.0).await.map_err(|e| e.to_string())?;
    let hash = ContentHash(offer.hash);
    let _hold = shared.store.hold(&offer.hash);
    let provider = Provider { hash, bytes: offer.bytes, holders: vec![shared.id], pieces: job.order.pieces.clone() };
    let order = AssembleOrder { providers: vec![provider], ..job.order.clone() };
    let handed = assembling::on(shared, job.node, &order, |_| {}).await.map_err(|t| t.message);
    // What was only handed on is no copy that anybody knows of; the copies of layers are made later.
    shared.store.discard(&id.0).await.ok();
    assembling::settled(shared, id);
    handed.map(|(id, _)| id)
}

/// Compares each file with the SHA-256 that its source states. The outer error is that it differs, the inner that it
/// could not be told.
async fn compare(
    shared: &Shared,
    record: &ModelRecord,
    places: &[Place],
    events: &Events<'_>,
) -> Result<(), Result<String, Failure>> {
    let wanted = || record.files.iter().enumerate().filter_map(|(i, f)| Some((i, f, f.sha256?)));
    let total_bytes = wanted().map(|(_, f, _)| f.bytes).sum();
    let mut before = 0;
    for (i, file, stated) in wanted() {
        let told = |done: u64| events.tell(PullEvent::Verifying { done_bytes: before + done, total_bytes });
        let found = digests::of(shared, i as u16, file.bytes, places, told).await;
        let found = found.map_err(|e| Err(Failure::ForNow(format!("{} could not be verified: {e}", file.path))))?;
        if found != stated.0 {
            return Err(Ok(format!(
                "{} does not have the SHA-256 that its source states ({stated}, but what came has {}): it was altered on \
                 the server or on its way. All of it was thrown away; pull it again, and if that fails in the same way, \
                 from another source",
                file.path,
                ContentHash(found)
            )));
        }
        before += file.bytes;
    }
    Ok(())
}

/// Tells every member that answers what this node knows of models, and hears what it knows.
pub(crate) async fn tell_all(shared: &Arc<Shared>) {
    let request = Request::Catalogue(Box::new(shared.catalogue()));
    let others = shared.membership.others().into_iter().filter(|m| shared.membership.online(m.id));
    let calls = others.map(|m| {
        let request = &request;
        async move {
            match shared.client.call::<Catalogue>(m.id, request, CALL_TIMEOUT).await {
                Ok(told) if told.check().is_ok() => _ = shared.hear_catalogue(m.id, told),
                Ok(_) => tracing::debug!(node = m.name, "a catalogue breaks a limit"),
                Err(error) => tracing::debug!(node = m.name, %error, "a catalogue could not be exchanged"),
            }
        }
    });
    futures::future::join_all(calls).await;
}
