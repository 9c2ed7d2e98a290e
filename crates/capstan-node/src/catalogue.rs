//! The models that this cluster has pulled: their records, who has which parts, and how one is opened.
//!
//! Every node keeps all records; they converge whoever changes them (see [`ModelRecord::merge`]). What the others hold is
//! what they said last, and is not kept over a restart.
use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use capstan_gguf::Model;
use capstan_gguf::beginnings::{self, Beginning, Known};
use capstan_proto::control::clip;
use capstan_proto::weights::{
    Catalogue, Holdings, ModelRecord, PARTS_MAX, Part, PartKind, Piece, Provider, RECORDS_MAX, Span,
};
use capstan_proto::{ContentHash, LayerRange, ModelId, NodeId};
use iroh::EndpointAddr;
use tokio::sync::Notify;

use crate::cutter::OpenModel;
use crate::endpoint::dial_addr;
use crate::error::NodeError;
use crate::files;
use crate::node::Shared;

/// How a load names a model of the catalogue where it could name a file.
const SCHEME: &str = "pulled:";
/// How long a node keeps a part that it has promised to keep, and stands by its own wish to delete one.
const PROMISE: Duration = Duration::from_secs(60);

/// The name of a model of the catalogue, if a load's path is one.
pub(crate) fn pulled_name(path: &Path) -> Option<&str> {
    path.to_str()?.strip_prefix(SCHEME)
}

/// What a load calls a model of the catalogue.
pub(crate) fn pulled_path(name: &str) -> PathBuf {
    PathBuf::from(format!("{SCHEME}{name}"))
}

#[derive(Default)]
struct State {
    records: BTreeMap<ModelId, ModelRecord>,
    others: HashMap<NodeId, Holdings>,
    /// Parts that this node has promised to keep, until when.
    promised: HashMap<ContentHash, Instant>,
    /// Parts that this node is about to delete, until when it stands by that.
    leaving: HashMap<ContentHash, Instant>,
    /// What belonged to models that were removed, until it is deleted.
    orphans: Vec<(ModelId, Vec<ContentHash>)>,
}

/// The records, and who has what.
pub(crate) struct Models {
    dir: PathBuf,
    state: Mutex<State>,
    /// Something changed: others should hear of it, and copies may be wanted.
    pub(crate) changed: Notify,
}

impl Models {
    pub(crate) fn open(data_dir: &Path) -> Result<Self, NodeError> {
        let dir = data_dir.join("models");
        std::fs::create_dir_all(&dir).map_err(|source| NodeError::DataDir { path: dir.clone(), source })?;
        let records: Vec<ModelRecord> = files::read_json(&dir.join("catalogue.json"))?.unwrap_or_default();
        let records = records.into_iter().filter(|r| r.check().is_ok()).map(|r| (r.id, r)).collect();
        let state = Mutex::new(State { records, ..State::default() });
        Ok(Self { dir, state, changed: Notify::new() })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The folder of models.
    pub(crate) fn dir(&self) -> &Path {
        &self.dir
    }

    fn save(&self, state: &State) {
        let records: Vec<&ModelRecord> = state.records.values().collect();
        if let Err(error) = files::write_json(&self.dir.join("catalogue.json"), &records) {
            tracing::error!(%error, "the catalogue of models could not be saved; this node may forget its latest changes");
        }
    }

    /// All models that were not removed, by name.
    pub(crate) fn list(&self) -> Vec<ModelRecord> {
        let mut all: Vec<_> = self.state().records.values().filter(|r| !r.removed).cloned().collect();
        all.sort_by(|a, b| (&a.name, a.id).cmp(&(&b.name, b.id)));
        all
    }

    /// All records, removed ones too.
    pub(crate) fn records(&self) -> Vec<ModelRecord> {
        self.state().records.values().cloned().collect()
    }

    /// The model of this exact version, unless it was removed.
    pub(crate) fn get(&self, id: ModelId) -> Option<ModelRecord> {
        self.state().records.get(&id).filter(|r| !r.removed).cloned()
    }

    /// A model by its name, its version or its source.
    pub(crate) fn find(&self, text: &str) -> Option<ModelRecord> {
        let all = self.list();
        let is = |r: &&ModelRecord| {
            r.name == text || r.id.to_string() == text || r.source == text || pinned(r).as_deref() == Some(text)
        };
        all.iter().find(is).cloned()
    }

    /// Takes a record in; says whether it is new or changed.
    pub(crate) fn put(&self, record: ModelRecord) -> bool {
        let mut state = self.state();
        let before: Vec<_> =
            state.records.get(&record.id).iter().flat_map(|r| r.parts.iter().map(|p| p.hash)).collect();
        let (id, removed, full) = (record.id, record.removed, state.records.len() >= RECORDS_MAX);
        let changed = match state.records.get_mut(&record.id) {
            Some(known) => known.merge(&record),
            None if full => {
                tracing::warn!(model = record.name, "the catalogue is full; remove models that are not needed");
                false
            }
            None => {
                state.records.insert(record.id, record);
                true
            }
        };
        if changed {
            let gone = state.records.get(&id).is_some_and(|r| r.removed);
            if removed && gone {
                let others: HashSet<_> = state.records.values().flat_map(|r| r.parts.iter().map(|p| p.hash)).collect();
                state.orphans.push((id, before.into_iter().filter(|hash| !others.contains(hash)).collect()));
            }
            self.save(&state);
        }
        changed
    }

    /// What is to be deleted, because the models that it belonged to were removed.
    pub(crate) fn take_orphans(&self) -> Vec<(ModelId, Vec<ContentHash>)> {
        std::mem::take(&mut self.state().orphans)
    }

    /// Adds a part to a model.
    pub(crate) fn add_part(&self, id: ModelId, part: Part) {
        let mut state = self.state();
        let Some(record) = state.records.get_mut(&id).filter(|r| !r.removed) else { return };
        if record.parts.len() >= PARTS_MAX || record.parts.iter().any(|p| p.hash == part.hash) {
            return;
        }
        record.parts.push(part);
        record.parts.sort();
        self.save(&state);
        drop(state);
        self.changed.notify_one();
    }

    /// Takes in what another node has, and the records it knows; says whether a record was new or changed.
    pub(crate) fn hear(&self, from: NodeId, told: Catalogue) -> bool {
        self.state().others.insert(from, told.holdings);
        let mut changed = false;
        for record in told.records {
            changed |= self.put(record);
        }
        changed
    }

    /// Forgets what nodes have that are no members any more.
    pub(crate) fn forget_others(&self, is_member: impl Fn(NodeId) -> bool) {
        self.state().others.retain(|node, _| is_member(*node));
    }

    /// What another node said it has.
    pub(crate) fn holdings_of(&self, node: NodeId) -> Option<Holdings> {
        self.state().others.get(&node).cloned()
    }

    /// Whether this node keeps a part that another is about to delete.
    pub(crate) fn promise(&self, part: ContentHash) -> bool {
        let mut state = self.state();
        let now = Instant::now();
        state.leaving.retain(|_, until| *until > now);
        state.promised.retain(|_, until| *until > now);
        if state.leaving.contains_key(&part) {
            return false;
        }
        state.promised.insert(part, now + PROMISE);
        true
    }

    /// Whether this node may ask others to keep a part so that it can delete its own copy.
    fn begin_leaving(&self, part: ContentHash) -> bool {
        let mut state = self.state();
        let now = Instant::now();
        state.promised.retain(|_, until| *until > now);
        if state.promised.contains_key(&part) {
            return false;
        }
        state.leaving.insert(part, now + PROMISE);
        true
    }

    fn end_leaving(&self, part: ContentHash) {
        self.state().leaving.remove(&part);
    }
}

/// A model's source with its revision.
fn pinned(record: &ModelRecord) -> Option<String> {
    record.revision.as_ref().map(|revision| format!("{}@{revision}", record.source))
}

/// The end of a file's header in a model that is here.
pub(crate) fn header_bytes(model: &Model, file: usize, file_bytes: u64) -> u64 {
    model.tensors().iter().filter(|t| t.file == file).map(|t| t.offset).min().unwrap_or(file_bytes)
}

/// Where in a part which bytes of the original are.
pub(crate) fn pieces_of(record: &ModelRecord, model: &Model, part: &Part) -> Vec<Piece> {
    let in_a_row = |spans: &[Span]| {
        let mut to = 0;
        let piece = |span: &Span| {
            let piece = Piece { file: span.file, from: span.from, to, bytes: span.bytes };
            to += span.bytes;
            piece
        };
        spans.iter().map(piece).collect()
    };
    match &part.kind {
        PartKind::File(file) => {
            let bytes = record.files.get(usize::from(*file)).map_or(0, |f| f.bytes);
            vec![Piece { file: *file, from: 0, to: 0, bytes }]
        }
        // A record that names a range which cannot be a shard of its model holds nothing.
        PartKind::Layers(range) => match model.shard_recipe(*range) {
            Ok(recipe) if recipe.bytes == part.bytes => pieces(&recipe.runs),
            _ => Vec::new(),
        },
        PartKind::Head(spans) | PartKind::Rest(spans) => in_a_row(spans),
    }
}

/// A recipe's runs as they travel.
pub(crate) fn pieces(runs: &[capstan_gguf::Run]) -> Vec<Piece> {
    let piece = |r: &capstan_gguf::Run| Piece { file: r.file as u16, from: r.from, to: r.to, bytes: r.len };
    runs.iter().map(piece).collect()
}

impl Shared {
    /// What this node has, for others.
    pub(crate) fn holdings(&self) -> Holdings {
        let mut parts: Vec<_> = self
            .models
            .list()
            .iter()
            .flat_map(|r| r.parts.iter().map(|p| p.hash))
            .filter(|hash| self.has_part(*hash))
            .collect();
        parts.sort();
        parts.dedup();
        Holdings {
            parts,
            used_bytes: self.store.bytes_used().unwrap_or(0),
            free_bytes: self.store.free_bytes().unwrap_or(0),
            limit_bytes: self.store.limit(),
        }
    }

    /// Whether this node has a part, by its file's size and time of change.
    pub(crate) fn has_part(&self, hash: ContentHash) -> bool {
        self.store.local(&hash.0).is_some() || self.store.offered(&hash.0).is_some()
    }

    /// What this node tells others of models.
    pub(crate) fn catalogue(&self) -> Catalogue {
        Catalogue { cluster: self.membership.cluster(), records: self.models.records(), holdings: self.holdings() }
    }

    /// The other members that answer and have said that they have a part.
    pub(crate) fn holders(&self, hash: ContentHash) -> Vec<NodeId> {
        let others = self.membership.others().into_iter().filter(|m| self.membership.online(m.id));
        let has = |m: &capstan_cluster::Member| {
            self.models.state().others.get(&m.id).is_some_and(|h| h.parts.binary_search(&hash).is_ok())
        };
        others.filter(has).map(|m| m.id).collect()
    }

    /// Where nodes are dialled; those that are no members are left out.
    pub(crate) fn dial_addrs(&self, nodes: &[NodeId]) -> Vec<EndpointAddr> {
        let addr = |id: &NodeId| {
            let member = self.membership.get(*id).filter(|_| *id != self.id)?;
            dial_addr(*id, &member.addrs)
        };
        nodes.iter().filter_map(addr).collect()
    }

    /// The parts of a model that anybody here or elsewhere has now, and what they hold.
    pub(crate) fn providers(&self, record: &ModelRecord, model: &Model) -> Vec<Provider> {
        let provider = |part: &Part| {
            let mut holders = self.holders(part.hash);
            if self.has_part(part.hash) {
                holders.push(self.id);
            }
            let pieces = if holders.is_empty() { Vec::new() } else { pieces_of(record, model, part) };
            (!pieces.is_empty()).then_some(Provider { hash: part.hash, bytes: part.bytes, holders, pieces })
        };
        record.parts.iter().filter_map(provider).collect()
    }

    /// Opens a model: a file of this node, or one of the catalogue, whose weights need not be here.
    pub(crate) async fn open_model(&self, path: PathBuf) -> Result<OpenModel, String> {
        let open = |path: PathBuf| async move {
            let opened = tokio::task::spawn_blocking(move || OpenModel::open(&path)).await;
            opened.map_err(|e| format!("reading the model failed: {e}"))?
        };
        let Some(name) = pulled_name(&path) else { return open(path).await };
        let record = self.models.find(name).ok_or_else(|| self.unknown(name))?;
        let files = record.parts.iter().filter(|p| matches!(p.kind, PartKind::File(_)));
        let holds = files.map(|p| self.store.hold(&p.hash.0)).collect();
        if let Some(first) = self.whole_files(&record)? {
            return Ok(open(first).await?.pulled_as(record.id, holds));
        }
        let model = self.outline(&record).await?;
        Ok(OpenModel::outline(Arc::new(model), record.id))
    }

    /// Why a name means no model of the catalogue.
    pub(crate) fn unknown(&self, name: &str) -> String {
        let names: Vec<_> = self.models.list().into_iter().map(|r| r.name).collect();
        let have = if names.is_empty() { "it is empty".into() } else { format!("it has {}", names.join(", ")) };
        let name: String = name.chars().take(100).collect();
        format!("the catalogue has no model {name:?}; {have}. `capstan pull` brings one")
    }

    /// The first of a model's original files, where this node has them all.
    fn whole_files(&self, record: &ModelRecord) -> Result<Option<PathBuf>, String> {
        let file = |i: usize| {
            let part = record.parts.iter().find(|p| p.kind == PartKind::File(i as u16))?;
            self.store.offered(&part.hash.0).or_else(|| self.store.local(&part.hash.0))
        };
        let Some(paths) = (0..record.files.len()).map(file).collect::<Option<Vec<_>>>() else { return Ok(None) };
        if let ([only], false) = (paths.as_slice(), paths.is_empty()) {
            return Ok(Some(only.clone()));
        }
        // The parts of a split model are found by their names, and the store has them under their hashes.
        let dir = self.models.dir.join(record.id.short());
        let sorry = |e: std::io::Error| format!("the folder {} cannot be used: {e}", dir.display());
        std::fs::create_dir_all(&dir).map_err(sorry)?;
        let mut first = None;
        for (file, path) in record.files.iter().zip(paths) {
            let Some(name) = Path::new(&file.path).file_name() else { return Ok(None) };
            let link = dir.join(name);
            if std::fs::read_link(&link).ok().as_ref() != Some(&path) {
                std::fs::remove_file(&link).ok();
                std::os::unix::fs::symlink(&path, &link).map_err(sorry)?;
            }
            first.get_or_insert(link);
        }
        Ok(first)
    }

    /// A model without its weights, from its head, which is brought here if need be.
    pub(crate) async fn outline(&self, record: &ModelRecord) -> Result<Model, String> {
        let heads = record.parts.iter().filter_map(|p| match &p.kind {
            PartKind::Head(spans) => Some((p, spans.clone())),
            _ => None,
        });
        let mut last = "its record names no head; pull it again".to_owned();
        for (part, spans) in heads {
            let from = self.dial_addrs(&self.holders(part.hash));
            let got = match self.store.local_verified(&part.hash.0, |_, _| {}).await {
                Ok(Some(path)) => Ok(path),
                Ok(None) if from.is_empty() => Err("no node that answers has its head".to_owned()),
                Ok(None) => {
                    let fetched = self.store.fetch_from(&self.endpoint, from, part.hash.0, part.bytes, |_, _| {}).await;
                    fetched.map_err(|e| e.to_string())
                }
                Err(error) => Err(error.to_string()),
            };
            let opened = match got {
                Ok(path) => {
                    let record = record.clone();
                    let read = tokio::task::spawn_blocking(move || from_head(&record, &path, &spans)).await;
                    read.map_err(|e| format!("reading the model's head failed: {e}")).flatten()
                }
                Err(reason) => Err(reason),
            };
            match opened {
                Ok(model) => return Ok(model),
                Err(reason) => last = reason,
            }
        }
        Err(clip(format!("the model {} cannot be opened: {last}", record.name)))
    }

    /// Whether a shard may be deleted here to make room: not the last copy of a layer. Another node that has the same
    /// part has to promise that it keeps it meanwhile.
    pub(crate) async fn may_delete(&self, hash: ContentHash) -> bool {
        let records = self.models.list();
        let mut of: Vec<(&ModelRecord, &Part)> = Vec::new();
        for record in &records {
            of.extend(record.parts.iter().filter(|p| p.hash == hash).map(|p| (record, p)));
        }
        if of.is_empty() {
            return true;
        }
        // Heads are small, and whoever has one can open its model.
        if of.iter().any(|(_, part)| matches!(part.kind, PartKind::Head(_))) {
            return false;
        }
        if !self.models.begin_leaving(hash) {
            return false;
        }
        for (record, part) in of {
            if !self.kept_elsewhere(record, part).await {
                self.models.end_leaving(hash);
                return false;
            }
        }
        true
    }

    async fn kept_elsewhere(&self, record: &ModelRecord, part: &Part) -> bool {
        use capstan_proto::control::Request;
        use capstan_proto::weights::{PartReply, PartRequest};
        for holder in self.holders(part.hash) {
            let request = Request::Part(Box::new(PartRequest::Keep { part: part.hash }));
            let reply = self.client.call::<PartReply>(holder, &request, crate::control_client::CALL_TIMEOUT).await;
            if matches!(reply, Ok(PartReply::Yes)) {
                return true;
            }
        }
        // A larger part that lies here holds the same layers.
        let Some(layers) = record.layers_of(part) else { return false };
        let holds = |p: &Part| {
            let Some(range) = record.layers_of(p) else { return false };
            range.start() <= layers.start() && range.end() >= layers.end() && p.bytes > part.bytes
        };
        record.parts.iter().any(|p| p.hash != part.hash && holds(p) && self.has_part(p.hash))
    }
}

/// A model without its weights from the beginnings of its files.
fn from_head(record: &ModelRecord, path: &Path, spans: &[Span]) -> Result<Model, String> {
    let bytes = std::fs::read(path).map_err(|e| format!("its head cannot be read: {e}"))?;
    let mut at = 0usize;
    let mut files = Vec::new();
    for span in spans {
        let end = at.saturating_add(usize::try_from(span.bytes).unwrap_or(usize::MAX));
        let here = bytes.get(at..end).ok_or("its head is shorter than its record says")?;
        at = end;
        if span.from == 0 && usize::from(span.file) == files.len() {
            let file = record.files.get(files.len()).ok_or("its head has more files than the model")?;
            files.push(Beginning { path: PathBuf::from(&file.path), bytes: here.to_vec(), file_bytes: file.bytes });
        }
    }
    match beginnings::read(&files) {
        Ok(Known::Model(model)) => Ok(*model),
        Ok(_) => Err("its head is not whole".into()),
        Err(error) => Err(error.to_string()),
    }
}

/// The layers of a model that nodes have, as sets of nodes.
pub(crate) fn copies(
    record: &ModelRecord,
    has: impl Fn(NodeId, ContentHash) -> bool,
    nodes: &[NodeId],
) -> Vec<Vec<NodeId>> {
    let mut layers: Vec<HashSet<NodeId>> = vec![HashSet::new(); record.layers as usize];
    for node in nodes {
        let mine: Vec<&Part> = record.parts.iter().filter(|p| has(*node, p.hash)).collect();
        let files = |i: usize| mine.iter().any(|p| p.kind == PartKind::File(i as u16));
        let whole = !record.files.is_empty() && (0..record.files.len()).all(files);
        let ranges = mine.iter().filter_map(|p| record.layers_of(p));
        let all = LayerRange::new(0, record.layers).ok().filter(|_| whole);
        for range in ranges.chain(all) {
            for layer in layers.iter_mut().take(range.end() as usize).skip(range.start() as usize) {
                layer.insert(*node);
            }
        }
    }
    layers.into_iter().map(|l| l.into_iter().collect()).collect()
}
