//! What the HTTP layer asks about models on disks: pull, list, verify, remove, export, and what lies where.
use std::path::{Path, PathBuf};
use std::sync::Arc;

use async_trait::async_trait;
use capstan_proto::control::clip;
use capstan_proto::manage::ManageError;
use capstan_proto::weights::{
    DiskPart, ModelOutcome, ModelRecord, ModelStatus, NodeDisk, Part, PartKind, PartReply, PartRequest, PartStatus,
    PullEvent, PullRequest, StoredFile,
};
use capstan_proto::{ContentHash, NodeId};
use tokio::sync::mpsc;

use crate::assembling::{self, ask};
use crate::catalogue::{copies, pieces_of};
use crate::digests::{self, Place};
use crate::membership::now_ms;
use crate::node::{Node, Shared};
use crate::plan_pull::{file_order, spans_order, stage_order};
use crate::pulling;

/// What a node can be asked about models on disks.
#[async_trait]
pub trait Weights: Send + Sync + 'static {
    /// Starts to bring a model here, or joins whoever watches the same pull. Dropping the receiver does not stop it.
    async fn pull(&self, request: PullRequest) -> Result<mpsc::Receiver<PullEvent>, ManageError>;
    /// The models of the catalogue, and who has what of them.
    async fn models(&self) -> Vec<ModelStatus>;
    /// Reads all copies of a model again, on all nodes that answer, and mends what is wrong.
    async fn verify_model(&self, name: String) -> Result<ModelOutcome, ManageError>;
    /// Takes a model out of the catalogue and deletes it on all nodes; a file that was pulled from a disk stays.
    async fn remove_model(&self, name: String) -> Result<ModelOutcome, ManageError>;
    /// Writes a model as one ordinary GGUF to a path of this node, where there is no file yet.
    async fn export_model(&self, name: String, path: PathBuf) -> Result<ModelOutcome, ManageError>;
    /// What lies on which disk.
    async fn disk(&self) -> Vec<NodeDisk>;
}

#[async_trait]
impl Weights for Node {
    async fn pull(&self, request: PullRequest) -> Result<mpsc::Receiver<PullEvent>, ManageError> {
        pulling::pull(&self.shared, request).await
    }

    async fn models(&self) -> Vec<ModelStatus> {
        let shared = &self.shared;
        shared.models.list().iter().map(|record| status(shared, record)).collect()
    }

    async fn verify_model(&self, name: String) -> Result<ModelOutcome, ManageError> {
        verify(&self.shared, &find(&self.shared, &name)?).await
    }

    async fn remove_model(&self, name: String) -> Result<ModelOutcome, ManageError> {
        remove(&self.shared, &find(&self.shared, &name)?).await
    }

    async fn export_model(&self, name: String, path: PathBuf) -> Result<ModelOutcome, ManageError> {
        export(&self.shared, &find(&self.shared, &name)?, &path).await
    }

    async fn disk(&self) -> Vec<NodeDisk> {
        disk(&self.shared)
    }
}

fn find(shared: &Shared, name: &str) -> Result<ModelRecord, ManageError> {
    shared.models.find(name).ok_or_else(|| ManageError::new(404, shared.unknown(name)))
}

/// This node and the others that have said what they have, with whether they answer.
fn members(shared: &Shared) -> Vec<(NodeId, bool)> {
    let others = shared.membership.others().into_iter().map(|m| (m.id, shared.membership.online(m.id)));
    [(shared.id, true)].into_iter().chain(others).collect()
}

fn has(shared: &Shared, node: NodeId, hash: ContentHash) -> bool {
    match node == shared.id {
        true => shared.has_part(hash),
        false => shared.models.holdings_of(node).is_some_and(|h| h.parts.binary_search(&hash).is_ok()),
    }
}

fn what(record: &ModelRecord, kind: &PartKind) -> String {
    match kind {
        PartKind::File(i) => match record.files.get(usize::from(*i)) {
            Some(file) => format!("file {}", file.path),
            None => format!("file {i}"),
        },
        PartKind::Layers(range) => format!("layers {range}"),
        PartKind::Head(_) => "head".into(),
        PartKind::Rest(_) => "rest".into(),
    }
}

fn status(shared: &Shared, record: &ModelRecord) -> ModelStatus {
    let nodes: Vec<NodeId> = members(shared).into_iter().map(|(id, _)| id).collect();
    let part = |p: &Part| PartStatus {
        hash: p.hash,
        bytes: p.bytes,
        what: what(record, &p.kind),
        layers: record.layers_of(p),
        nodes: nodes.iter().filter(|n| has(shared, **n, p.hash)).map(|n| shared.membership.name_of(*n)).collect(),
    };
    let layers = copies(record, |node, hash| has(shared, node, hash), &nodes);
    ModelStatus {
        id: record.id,
        name: record.name.clone(),
        source: record.source.clone(),
        revision: record.revision.clone(),
        architecture: record.architecture.clone(),
        layers: record.layers,
        bytes: record.bytes(),
        files: record.files.clone(),
        replicas: record.replicas,
        copies: layers.iter().map(Vec::len).min().unwrap_or(0) as u16,
        parts: record.parts.iter().map(part).collect(),
    }
}

/// Reads every copy again; one that is wrong is mended from another, or from the source.
async fn verify(shared: &Arc<Shared>, record: &ModelRecord) -> Result<ModelOutcome, ManageError> {
    let mut outcome = ModelOutcome { name: record.name.clone(), done: vec![], trouble: vec![] };
    let online: Vec<NodeId> = members(shared).into_iter().filter(|(_, online)| *online).map(|(id, _)| id).collect();
    let mut good: Vec<(NodeId, &Part)> = Vec::new();
    let mut wrong = Vec::new();
    for part in &record.parts {
        let holders = online.iter().filter(|n| has(shared, **n, part.hash));
        let checks =
            holders.map(|node| async { (*node, ask(shared, *node, PartRequest::Verify { part: part.hash }).await) });
        for (node, answer) in futures::future::join_all(checks).await {
            let name = shared.membership.name_of(node);
            match answer {
                Ok(PartReply::Yes) => good.push((node, part)),
                Ok(PartReply::No(reason)) => {
                    outcome.trouble.push(format!("{} on node {name}: {reason}", what(record, &part.kind)));
                    wrong.push((node, part));
                }
                Ok(_) => outcome.trouble.push(format!("node {name} answered something else; update capstan there")),
                Err(reason) => outcome.trouble.push(format!("node {name} could not be asked: {reason}")),
            }
        }
    }
    outcome.done.push(format!("{} copies of {} parts match their hashes", good.len(), record.parts.len()));
    for (node, part) in wrong {
        let holders: Vec<NodeId> = good.iter().filter(|(_, p)| p.hash == part.hash).map(|(n, _)| *n).collect();
        let (name, label) = (shared.membership.name_of(node), what(record, &part.kind));
        match mend(shared, record, part, node, holders).await {
            Ok(from) => outcome.done.push(format!("{label} on node {name} was mended from {from}")),
            Err(reason) => outcome.trouble.push(format!("{label} on node {name} could not be mended: {reason}")),
        }
    }
    states(shared, record, &good, &mut outcome).await;
    shared.models.changed.notify_one();
    Ok(outcome)
}

/// Compares the files as a whole with what their source states.
async fn states(shared: &Arc<Shared>, record: &ModelRecord, good: &[(NodeId, &Part)], outcome: &mut ModelOutcome) {
    if record.files.iter().all(|f| f.sha256.is_none()) {
        return;
    }
    let model = match shared.outline(record).await {
        Ok(model) => model,
        Err(reason) => return outcome.trouble.push(reason),
    };
    let place = |(node, part): &(NodeId, &Part)| Place {
        node: *node,
        file: StoredFile::Part(part.hash),
        pieces: pieces_of(record, &model, part),
    };
    let places: Vec<Place> = good.iter().map(place).collect();
    for (i, file) in record.files.iter().enumerate() {
        let Some(stated) = file.sha256 else { continue };
        match digests::of(shared, i as u16, file.bytes, &places, |_| {}).await {
            Ok(found) if found == stated.0 => {
                outcome.done.push(format!("{} has the SHA-256 that its source states", file.path))
            }
            Ok(_) => outcome.trouble.push(format!("{} has not the SHA-256 that its source states", file.path)),
            Err(reason) => outcome.trouble.push(format!("{} could not be compared as a whole: {reason}", file.path)),
        }
    }
}

/// Brings a part to a node again, and says from where.
async fn mend(
    shared: &Arc<Shared>,
    record: &ModelRecord,
    part: &Part,
    node: NodeId,
    holders: Vec<NodeId>,
) -> Result<String, String> {
    if !holders.is_empty() {
        let names: Vec<_> = holders.iter().map(|n| shared.membership.name_of(*n)).collect();
        let copy = PartRequest::Copy { part: part.hash, bytes: part.bytes, holders };
        return match ask(shared, node, copy).await? {
            PartReply::Yes => Ok(format!("node {}", names.join(", "))),
            PartReply::No(reason) => Err(reason),
            _ => Err("it answered something else".into()),
        };
    }
    let model = shared.outline(record).await?;
    let providers = shared.providers(record, &model).into_iter().filter(|p| p.hash != part.hash).collect();
    let order = match &part.kind {
        PartKind::File(i) => file_order(record, *i, providers),
        PartKind::Layers(range) => stage_order(record, &model, *range, providers)?.1,
        PartKind::Head(spans) | PartKind::Rest(spans) => spans_order(record, spans, providers),
    };
    let (assembly, outside_bytes) = assembling::on(shared, node, &order, |_| {}).await.map_err(|t| t.message)?;
    match ask(shared, node, PartRequest::Publish { assembly }).await? {
        PartReply::Published { hash, .. } if hash == part.hash && outside_bytes > 0 => Ok("its source".into()),
        PartReply::Published { hash, .. } if hash == part.hash => Ok("other parts of the model".into()),
        PartReply::Published { .. } => {
            ask(shared, node, PartRequest::Discard { assembly }).await.ok();
            Err("what its source has now is not what it was; pull the model again".into())
        }
        PartReply::No(reason) => Err(reason),
        _ => Err("it answered something else".into()),
    }
}

async fn remove(shared: &Arc<Shared>, record: &ModelRecord) -> Result<ModelOutcome, ManageError> {
    let id = record.id.to_string();
    if let Some(served) = shared.all_deployments().into_iter().find(|d| d.model_hash == id) {
        let message = format!("{} is served as {:?}; `capstan unload` it first", record.name, served.name);
        return Err(ManageError::new(409, message));
    }
    let stamp = now_ms().max(record.stamp + 1);
    let bytes: u64 = record.parts.iter().filter(|p| shared.store.local(&p.hash.0).is_some()).map(|p| p.bytes).sum();
    shared.models.put(ModelRecord { removed: true, stamp, parts: Vec::new(), ..record.clone() });
    crate::replicas::drop_removed(shared).await;
    pulling::tell_all(shared).await;
    let mut done = vec![format!("{} left the catalogue; {bytes} bytes were deleted on this node", record.name)];
    let away: Vec<_> = members(shared).into_iter().filter(|(_, online)| !online).collect();
    if !away.is_empty() {
        let names: Vec<_> = away.iter().map(|(n, _)| shared.membership.name_of(*n)).collect();
        done.push(format!("{} will delete it when it answers again", names.join(", ")));
    }
    Ok(ModelOutcome { name: record.name.clone(), done, trouble: vec![] })
}

/// Writes the original file where it was one, else the whole model in one file.
async fn export(shared: &Arc<Shared>, record: &ModelRecord, path: &Path) -> Result<ModelOutcome, ManageError> {
    let failed = |message: String| ManageError::new(500, clip(message));
    if !path.is_absolute() {
        return Err(ManageError::new(400, "name the file by its whole path"));
    }
    if path.exists() {
        return Err(ManageError::new(409, format!("{} exists already; choose another name", path.display())));
    }
    let model = shared.outline(record).await.map_err(failed)?;
    let providers = shared.providers(record, &model);
    let (kind, order) = stage_order(record, &model, model.all_layers(), providers).map_err(failed)?;
    let (id, _) = assembling::here(shared, &order, |_| {}).await.map_err(|e| failed(e.to_string()))?;
    let mut done = Vec::new();
    if let (PartKind::File(0), Some(stated)) = (&kind, record.files.first().and_then(|f| f.sha256)) {
        let place = Place { node: shared.id, file: StoredFile::Assembly(id), pieces: order.pieces.clone() };
        let found = digests::of(shared, 0, order.bytes, &[place], |_| {}).await.map_err(failed)?;
        if found != stated.0 {
            shared.store.discard(&id.0).await.ok();
            let message =
                "what was put together is not the original file; `capstan model verify` finds out what is wrong";
            return Err(failed(message.into()));
        }
        done.push("it has the SHA-256 that its source states".into());
    }
    let written = shared.store.take_out(&id.0, path).await;
    assembling::settled(shared, id);
    let bytes = written.map_err(|e| failed(e.to_string()))?;
    done.insert(0, format!("{bytes} bytes were written to {}", path.display()));
    if record.files.len() > 1 {
        done.push(format!("its {} files were joined into one", record.files.len()));
    }
    Ok(ModelOutcome { name: record.name.clone(), done, trouble: vec![] })
}

fn disk(shared: &Shared) -> Vec<NodeDisk> {
    let records = shared.models.list();
    let of = |(node, online): (NodeId, bool)| {
        let holdings = if node == shared.id { Some(shared.holdings()) } else { shared.models.holdings_of(node) };
        let holdings = holdings.unwrap_or_default();
        let mut parts = Vec::new();
        for record in &records {
            let here = record.parts.iter().filter(|p| holdings.parts.binary_search(&p.hash).is_ok());
            parts.extend(here.map(|p| DiskPart {
                model: record.name.clone(),
                what: what(record, &p.kind),
                bytes: p.bytes,
            }));
        }
        NodeDisk {
            node_name: shared.membership.name_of(node),
            online,
            used_bytes: holdings.used_bytes,
            free_bytes: holdings.free_bytes,
            limit_bytes: holdings.limit_bytes,
            parts,
        }
    };
    members(shared).into_iter().map(of).collect()
}
