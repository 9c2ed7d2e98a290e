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
use capstan_proto::control::{Request, clip};
use capstan_proto::manage::ManageError;
use capstan_proto::weights::{
    AssembleOrder, Catalogue, ModelRecord, Part, PartKind, PartReply, PartRequest, Provider, PullEvent, PullRequest,
    PulledFile, REPLICAS_MAX, StoredFile,
};
use capstan_proto::{ContentHash, NodeId};
use capstan_store::remote::{ModelName, Remote};
use tokio::sync::{broadcast, mpsc};

use crate::assembling::{self, ask};
use crate::catalogue::pieces_of;
use crate::config::NodeConfig;
use crate::control_client::CALL_TIMEOUT;
use crate::deployments::{check_name, default_name, node_named};
use crate::digests::{self, Place};
use crate::files;
use crate::node::Shared;
use crate::plan_pull::{file_order, spans_order, stage_order};
use crate::pull_source::{Begun, Pending, from_file, from_remote};
use crate::throttle::Throttle;

/// Events of a pull that wait for whoever watches; one that reads slower misses progress, never the outcome.
const EVENTS: usize = 256;
/// Pulls at once: each has its connections and its progress.
const PULLS_MAX: usize = 8;

/// The pulls that are under way, by their source.
#[derive(Default)]
pub(crate) struct Pulls(Mutex<HashMap<String, Active>>);

struct Active {
    events: broadcast::Sender<PullEvent>,
    planned: Option<PullEvent>,
}

/// A file that a node puts together.
struct Job {
    node: NodeId,
    kind: PartKind,
    order: AssembleOrder,
}

/// Tells whoever watches.
pub(crate) struct Events<'a> {
    shared: &'a Shared,
    key: &'a str,
    events: broadcast::Sender<PullEvent>,
    /// Bytes from outside, by job.
    outside: Mutex<HashMap<usize, u64>>,
}

impl Events<'_> {
    pub(crate) fn tell(&self, event: PullEvent) {
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
        Ok(remote) => Some(Arc::new(remote.patient())),
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
