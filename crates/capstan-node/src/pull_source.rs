//! What is pulled: a source's header becomes a record, a head, and the layers that each node gets.
use std::path::{Path, PathBuf};
use std::sync::Arc;

use capstan_gguf::Model;
use capstan_planner::PlanOptions;
use capstan_proto::weights::{FileRecord, ModelRecord, Part, PartKind, PullEvent, PullRequest, REPLICAS_DEFAULT, Span};
use capstan_proto::{ContentHash, LayerRange, ModelId, NodeId};
use capstan_store::remote::{Headers, ModelName, RemoteError, RemoteFile};
use serde::{Deserialize, Serialize};

use crate::catalogue::header_bytes;
use crate::cutter::OpenModel;
use crate::deployments::{UBATCH, node_named};
use crate::membership::{now_ms, now_s};
use crate::node::Shared;
use crate::placing;
use crate::plan_pull::shared_and_rest;
use crate::pulling::Events;
use crate::throttle::Throttle;

/// What a placement is made for before anybody says how the model will be used: as a load does that says nothing.
const CTX: u32 = 4096;
/// See [`CTX`].
const SLOTS: u32 = 4;

/// What is known of a pull that was begun, for whoever goes on with it.
#[derive(Clone, Serialize, Deserialize)]
pub(crate) struct Pending {
    pub(crate) request: PullRequest,
    /// With its head, and without what is being fetched.
    pub(crate) record: ModelRecord,
    /// Which node gets which layers.
    pub(crate) stages: Vec<(NodeId, LayerRange)>,
    /// What no shard holds.
    pub(crate) rest: Vec<Span>,
}

/// What comes of looking at a source.
pub(crate) enum Begun {
    /// It is in the catalogue already, and nothing more was asked for.
    Known(ModelRecord),
    /// It is to be brought here.
    New(Pending),
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
pub(crate) async fn from_remote(
    shared: &Arc<Shared>,
    name: &ModelName,
    request: &PullRequest,
) -> Result<Begun, String> {
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
pub(crate) async fn from_file(
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
    let options = PlanOptions {
        ctx,
        slots: SLOTS,
        spares_per_stage: 0,
        draft_bytes: 0,
        ubatch: UBATCH,
        objective: Default::default(),
        nodes,
        layers,
    };
    let placed = match placing::place(shared, model, options.clone(), false).await {
        Err(error) if error.status == 409 => placing::place_idle(shared, model, options).await,
        other => other,
    };
    let (placement, _) = placed.map_err(|e| e.message)?;
    Ok(placement.stages().iter().map(|s| (s.node, s.layers)).collect())
}
