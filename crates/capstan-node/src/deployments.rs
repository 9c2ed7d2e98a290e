//! What this node coordinates: from a load request to a placement, and back after a restart.
use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use capstan_planner::{PlanOptions, StagePlan};
use capstan_proto::control::{DEPLOYMENTS_MAX, DeploymentList};
use capstan_proto::manage::{DeploymentStatus, LoadEvent, LoadRequest, ManageError, PlannedStage};
use capstan_proto::{DeploymentId, Epoch, NodeId, limits};
use tokio::sync::{mpsc, oneshot};

use crate::blueprint::{Blueprint, Choice};
use crate::catalogue;
use crate::coordinator::{Coordinator, Message, Outbox};
use crate::cutter::OpenModel;
use crate::error::NodeError;
use crate::files;
use crate::fleet;
use crate::membership::{now_ms, now_s};
use crate::node::Shared;
use crate::placing;
use crate::rehearsal::MadeUp;
use crate::saved::Saved;
use crate::scheduling::Wanted;

/// Load events that wait for whoever watches.
const LOAD_QUEUE: usize = 256;
/// Context of a slot where the user says nothing: enough for a chat, small enough for any machine.
const CTX_DEFAULT: u32 = 4096;
/// Longest context that may be asked for: beyond any model, so that products stay far from overflow.
pub(crate) const CTX_MAX: u32 = 1 << 24;
/// Least context: a token of the prompt and one of the answer.
const CTX_MIN: u32 = 2;
/// Slots where the user says nothing.
const SLOTS_DEFAULT: u32 = 4;
/// Most rows of a micro-batch: llama.cpp's own default.
pub(crate) const UBATCH: u32 = 512;

struct Entry {
    status: DeploymentStatus,
    /// See [`Movable`]; none for a placement that somebody chose.
    asked: Option<(OpenModel, LoadRequest)>,
    /// None while it is being set up or when its model could not be opened after a restart.
    outbox: Option<Outbox>,
}

/// A deployment whose placement was left to the planner, which may change it.
#[derive(Clone)]
pub(crate) struct Movable {
    pub(crate) status: DeploymentStatus,
    pub(crate) model: OpenModel,
    /// What was asked.
    pub(crate) request: LoadRequest,
}

/// What this node coordinates.
pub(crate) struct Deployments {
    path: PathBuf,
    entries: Mutex<HashMap<DeploymentId, Entry>>,
    saved: Mutex<Vec<Saved>>,
    /// What was ended here since the start: eight bytes for each load.
    ended: Mutex<HashSet<DeploymentId>>,
    stamp: AtomicU64,
}

impl Deployments {
    pub(crate) fn open(data_dir: &Path) -> Result<Self, NodeError> {
        let path = data_dir.join("deployments.json");
        let saved = files::read_json(&path)?.unwrap_or_default();
        Ok(Self {
            path,
            entries: Mutex::default(),
            saved: Mutex::new(saved),
            ended: Mutex::default(),
            stamp: AtomicU64::new(now_ms()),
        })
    }

    fn entries(&self) -> MutexGuard<'_, HashMap<DeploymentId, Entry>> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How this node's deployments are, oldest first.
    pub(crate) fn list(&self) -> Vec<DeploymentStatus> {
        let mut all: Vec<_> = self.entries().values().map(|e| e.status.clone()).collect();
        all.sort_by_key(|d| (d.created_unix_s, d.id));
        all
    }

    /// The same for other nodes, newer than any list before.
    pub(crate) fn stamped(&self, coordinator: NodeId) -> DeploymentList {
        let now = now_ms();
        let last = self.stamp.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |s| Some(now.max(s + 1)));
        // The stamp is taken before the list: a list may be newer than its stamp says, never older.
        DeploymentList { coordinator, stamp: last.map_or(now, |s| now.max(s + 1)), deployments: self.list() }
    }

    /// The deployments here that may be placed anew.
    pub(crate) fn movable(&self) -> Vec<Movable> {
        let of = |e: &Entry| {
            let (model, request) = e.asked.clone()?;
            Some(Movable { status: e.status.clone(), model, request })
        };
        self.entries().values().filter_map(of).collect()
    }

    /// Whether a deployment is coordinated here.
    pub(crate) fn has(&self, id: DeploymentId) -> bool {
        self.entries().contains_key(&id)
    }

    /// Whether a deployment is noted on disk: after a restart it may not be open yet.
    pub(crate) fn comes_back(&self, id: DeploymentId) -> bool {
        self.saved.lock().unwrap_or_else(PoisonError::into_inner).iter().any(|s| s.id == id)
    }

    /// The deployments that are coordinated here.
    pub(crate) fn ids(&self) -> Vec<DeploymentId> {
        self.entries().keys().copied().collect()
    }

    /// Whether nothing is coordinated here.
    pub(crate) fn is_empty(&self) -> bool {
        self.entries().is_empty()
    }

    /// Notes how a deployment is; one that was removed stays removed.
    pub(crate) fn put(&self, status: DeploymentStatus) {
        if let Some(entry) = self.entries().get_mut(&status.id) {
            entry.status = status;
        }
    }

    /// Forgets a deployment, on disk too.
    pub(crate) fn remove(&self, id: DeploymentId) {
        self.note_ended(id);
        self.entries().remove(&id);
        self.save(|saved| saved.retain(|s| s.id != id));
    }

    fn ended(&self) -> MutexGuard<'_, HashSet<DeploymentId>> {
        self.ended.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A deployment is no more.
    pub(crate) fn note_ended(&self, id: DeploymentId) {
        self.ended().insert(id);
    }

    /// Whether a deployment was ended here since the start, by whoever or whatever.
    pub(crate) fn has_ended(&self, id: DeploymentId) -> bool {
        self.ended().contains(&id)
    }

    /// Forgets what would come back after a restart: it stays with a cluster that was left.
    pub(crate) fn forget_saved(&self) {
        self.save(Vec::clear);
    }

    /// Notes a deployment on disk, so that it comes back after a restart.
    pub(crate) fn keep(&self, b: &Blueprint) {
        if let Some(one) = Saved::of(b) {
            self.keep_saved(one);
        }
    }

    fn keep_saved(&self, one: Saved) {
        self.save(|saved| {
            saved.retain(|s| s.id != one.id);
            saved.push(one);
        });
    }

    fn save(&self, change: impl FnOnce(&mut Vec<Saved>)) {
        let mut saved = self.saved.lock().unwrap_or_else(PoisonError::into_inner);
        change(&mut saved);
        if let Err(error) = files::write_json(&self.path, &*saved) {
            tracing::error!(%error, "the deployments could not be saved; after a restart they may not come back");
        }
    }

    /// Tells every deployment that a node is no member any more.
    pub(crate) fn member_left(&self, node: NodeId) {
        for entry in self.entries().values() {
            if let Some(outbox) = &entry.outbox {
                outbox.try_send(Message::MemberLeft(node)).ok();
            }
        }
    }

    /// The placement of this deployment is not the planner's to change any more.
    pub(crate) fn pin(&self, id: DeploymentId) {
        if let Some(entry) = self.entries().get_mut(&id) {
            entry.asked = None;
        }
    }

    /// Has a deployment's stages moved away from a node, and waits until it answers without it.
    pub(crate) async fn vacate(&self, id: DeploymentId, node: NodeId) -> Result<(), String> {
        const GONE: &str = "it was unloaded meanwhile";
        let outbox = self.entries().get(&id).and_then(|entry| entry.outbox.clone()).ok_or(GONE)?;
        let (done, moved) = oneshot::channel();
        outbox.send(Message::Vacate(node, done)).await.map_err(|_| GONE)?;
        moved.await.unwrap_or_else(|_| Err(GONE.to_owned()))
    }

    /// Ends a deployment and waits until it is gone.
    pub(crate) async fn unload(&self, id: DeploymentId) -> Result<(), ManageError> {
        let outbox = match self.entries().get(&id) {
            Some(entry) => entry.outbox.clone(),
            None => return Err(ManageError::new(404, "there is no such deployment any more")),
        };
        let Some(outbox) = outbox else {
            self.remove(id);
            return Ok(());
        };
        let (done, gone) = oneshot::channel();
        // A coordinator that has ended in the meantime has removed its deployment itself.
        if outbox.send(Message::Unload(done)).await.is_ok() {
            gone.await.ok();
        }
        Ok(())
    }

    /// Ends all deployments of this node.
    pub(crate) async fn unload_all(&self) {
        futures::future::join_all(self.ids().into_iter().map(|id| self.unload(id))).await;
    }
}

fn bad(message: impl Into<String>) -> ManageError {
    ManageError::new(400, message)
}

/// A number that JSON's readers keep exact: 53 bits are enough never to meet again.
fn new_id() -> DeploymentId {
    DeploymentId(rand::random::<u64>() >> 11)
}

pub(crate) fn default_name(path: &Path) -> String {
    let stem = path.file_stem().map(|s| s.to_string_lossy().into_owned()).unwrap_or_default();
    // The parts of a split model are called NAME-00001-of-00003.
    let digits = |s: &str| s.len() == 5 && s.bytes().all(|b| b.is_ascii_digit());
    let split = stem.rsplit_once("-of-").filter(|(_, n)| digits(n)).and_then(|(rest, _)| rest.rsplit_once('-'));
    match split {
        Some((name, part)) if digits(part) => name.to_owned(),
        _ => stem,
    }
}

pub(crate) fn check_name(name: &str) -> Result<(), ManageError> {
    if name.is_empty() || name.len() > limits::NAME_BYTES_MAX || name.chars().any(char::is_control) {
        return Err(bad(format!(
            "{:?} is no name for a model; take 1 to {} printable characters with --name",
            name.chars().take(80).collect::<String>(),
            limits::NAME_BYTES_MAX
        )));
    }
    Ok(())
}

pub(crate) fn node_named(shared: &Shared, name: &str) -> Result<NodeId, ManageError> {
    let Some(member) = shared.membership.find(name) else {
        let mut names: Vec<_> = shared.membership.others().into_iter().map(|m| m.name).collect();
        names.push(shared.membership.name());
        names.sort();
        return Err(bad(format!("there is no node {name:?} in this cluster; its nodes are {}", names.join(", "))));
    };
    if !shared.membership.online(member.id) {
        return Err(ManageError::new(
            409,
            format!("node {} does not answer; start it with `capstan up` or choose other nodes", member.name),
        ));
    }
    Ok(member.id)
}

/// Starts to load a model. What is wrong with the request itself is said here, the rest by the last event.
pub(crate) async fn load(shared: &Arc<Shared>, request: LoadRequest) -> Result<mpsc::Receiver<LoadEvent>, ManageError> {
    load_because(shared, request, None).await
}

/// The same, with a remark that the model's detail shows.
pub(crate) async fn load_because(
    shared: &Arc<Shared>,
    request: LoadRequest,
    remark: Option<String>,
) -> Result<mpsc::Receiver<LoadEvent>, ManageError> {
    let slots = request.slots.unwrap_or(SLOTS_DEFAULT);
    if slots == 0 || slots > limits::SLOTS_MAX {
        return Err(bad(format!("slots is {slots}; take 1 to {}", limits::SLOTS_MAX)));
    }
    let decode_batch = request.decode_batch.unwrap_or(slots);
    if decode_batch == 0 || decode_batch > slots {
        return Err(bad(format!("decode_batch is {decode_batch}; take 1 to the number of slots, {slots}")));
    }
    if request.ctx.is_some_and(|c| !(CTX_MIN..=CTX_MAX).contains(&c)) {
        return Err(bad(format!("ctx is {}; take {CTX_MIN} to {CTX_MAX} tokens", request.ctx.unwrap_or(0))));
    }
    if request.nodes.len() > limits::MEMBERS_MAX || request.layers.len() > limits::LAYERS_MAX as usize {
        return Err(bad("more nodes are named than a cluster can have"));
    }
    let asked = PathBuf::from(&request.path);
    let pulled = catalogue::pulled_name(&asked).and_then(|name| shared.models.find(name)).map(|record| record.name);
    let path = match catalogue::pulled_name(&asked) {
        Some(_) => asked,
        None => std::fs::canonicalize(&asked).map_err(|e| {
            bad(format!("the model {:?} cannot be read on node {}: {e}", request.path, shared.membership.name()))
        })?,
    };
    let name = request.name.clone().or(pulled).unwrap_or_else(|| default_name(&path));
    check_name(&name)?;
    refuse_taken(shared, &name)?;
    let model = shared.open_model(path).await.map_err(bad)?;
    let (asked, rollback, node) = (request.clone(), model.rollback(), shared.membership.name());
    let wanted = tokio::task::spawn_blocking(move || Wanted::new(&asked, rollback, &node))
        .await
        .map_err(|e| ManageError::new(500, format!("reading the draft model failed: {e}")))??;

    // What the others have free is asked now, not taken from a second ago.
    shared.poll_all().await;
    let nodes = request.nodes.iter().map(|n| node_named(shared, n)).collect::<Result<Vec<_>, _>>()?;
    let mut layers = Vec::new();
    for (node, range) in &request.layers {
        layers.push((node_named(shared, node)?, *range));
    }
    if !nodes.is_empty() && !layers.is_empty() && layers.iter().any(|(n, _)| !nodes.contains(n)) {
        return Err(bad("--layers names a node that --nodes does not; give one of the two"));
    }
    let ctx_train = model.model.profile().context_train;
    let ctx_default = if ctx_train == 0 { CTX_DEFAULT } else { ctx_train.min(CTX_DEFAULT) };
    let (ctx, ubatch) = (request.ctx.unwrap_or(ctx_default), UBATCH);
    let spares_per_stage = wanted.spares_per_stage();
    let draft_bytes = wanted.draft_bytes(ctx, ubatch);
    let choice = match (nodes.is_empty(), layers.is_empty()) {
        (_, false) => Choice::Layers,
        (false, true) => Choice::Nodes(nodes.clone()),
        (true, true) => Choice::Planner,
    };
    let objective = request.objective.unwrap_or_default();
    let options = PlanOptions { ctx, slots, spares_per_stage, draft_bytes, ubatch, objective, nodes, layers };
    let sparse = request.rehearsal.is_some_and(|r| r.sparse);
    let (placement, forecast) = placing::place(shared, &model, options, sparse).await?;
    let count = placement.stages().len();
    let unused_draft = wanted.remark(count);
    let (scheduling, draft) = wanted.scheduling(count);
    check_sequences(ctx, slots, scheduling.spares())?;

    let rehearsal = request.rehearsal.map(|r| MadeUp::of(&model.model, placement.stages(), r.sparse)).transpose();
    let rehearsal = rehearsal.map_err(bad)?.map(Arc::new);
    let whole = model.model.split_problem().filter(|_| count == 1).map(|reason| format!("it runs whole: {reason}"));
    let remarks: Vec<_> = whole.into_iter().chain(unused_draft.map(str::to_owned)).chain(remark).collect();
    // Who named nodes or layers wants them kept, a draft model belongs to the node that has it, and a rehearsal ends soon.
    let named = !request.nodes.is_empty() || !request.layers.is_empty();
    let movable = !named && request.draft.is_none() && request.rehearsal.is_none();
    let request = movable.then(|| LoadRequest { name: Some(name.clone()), ..request });
    let blueprint = Blueprint {
        id: new_id(),
        name,
        stages: placement.stages().to_vec(),
        ctx,
        slots,
        ubatch,
        decode_batch,
        scheduling,
        draft,
        created_unix_s: now_s(),
        remark: remarks.join("; "),
        rehearsal,
        model,
        choice,
        request,
    };
    let planned = LoadEvent::Planned {
        stages: placement
            .stages()
            .iter()
            .map(|s| PlannedStage {
                node: s.node,
                node_name: s.node_name.clone(),
                layers: s.layers,
                shard_bytes: blueprint.model.model.shard_bytes(s.layers),
                memory_bytes: s.memory_bytes,
            })
            .collect(),
        explanation: placement.explanation().iter().cloned().chain(forecast.as_ref().map(fleet::sentence)).collect(),
        forecast,
    };
    let (progress, events) = mpsc::channel(LOAD_QUEUE);
    // The queue is empty, so there is room.
    progress.try_send(planned).ok();
    launch(shared, blueprint, Some(progress))?;
    Ok(events)
}

/// Refuses more sequences than llama.cpp counts, and more cells for them than it counts in 32 bits, each sequence's
/// rounded up.
fn check_sequences(ctx: u32, slots: u32, spares: u32) -> Result<(), ManageError> {
    let sequences = u64::from(slots) + u64::from(spares);
    if sequences > u64::from(limits::SLOTS_MAX) {
        let most = limits::SLOTS_MAX.saturating_sub(spares);
        return Err(bad(format!("{slots} slots leave no room for guesses; take at most {most}, or --speculation off")));
    }
    if u64::from(ctx).next_multiple_of(256) * sequences > i32::MAX as u64 {
        return Err(bad(format!(
            "{sequences} sequences of {ctx} tokens are too many; their product must stay below 2^31"
        )));
    }
    Ok(())
}

fn refuse_taken(shared: &Shared, name: &str) -> Result<(), ManageError> {
    if shared.all_deployments().iter().any(|d| d.name == name) {
        return Err(taken(name));
    }
    Ok(())
}

fn taken(name: &str) -> ManageError {
    ManageError::new(
        409,
        format!("a model is served as {name:?} already; unload it, or choose another name with --name"),
    )
}

/// Enters a deployment in the table and starts its coordinator.
fn launch(
    shared: &Arc<Shared>,
    blueprint: Blueprint,
    progress: Option<mpsc::Sender<LoadEvent>>,
) -> Result<(), ManageError> {
    launch_at(shared, blueprint, progress, None)
}

/// The same after an epoch that the deployment has, and stages that it had before.
fn launch_at(
    shared: &Arc<Shared>,
    blueprint: Blueprint,
    progress: Option<mpsc::Sender<LoadEvent>>,
    from: Option<(Epoch, Vec<StagePlan>)>,
) -> Result<(), ManageError> {
    let id = blueprint.id;
    let status = blueprint.status_before(shared.id);
    let movable = blueprint.request.clone().filter(|_| blueprint.choice == Choice::Planner);
    let asked = movable.map(|request| (blueprint.model.clone(), request));
    let (coordinator, outbox) = Coordinator::new(shared.clone(), blueprint, progress, from);
    {
        // Checked again under the lock: two loads by the same name may have come at once.
        let mut entries = shared.deployments.entries();
        if entries.values().any(|e| e.status.name == status.name) {
            return Err(taken(&status.name));
        }
        if entries.len() >= DEPLOYMENTS_MAX {
            return Err(ManageError::new(
                409,
                format!("this node looks after {DEPLOYMENTS_MAX} models already; unload one first"),
            ));
        }
        entries.insert(id, Entry { status, asked, outbox: Some(outbox) });
    }
    tokio::spawn(coordinator.run());
    Ok(())
}

/// Brings back what was served before the node was restarted, but for what another node has taken over since.
pub(crate) async fn resume(shared: Arc<Shared>) {
    let saved = shared.deployments.saved.lock().unwrap_or_else(PoisonError::into_inner).clone();
    for one in saved {
        let opened = if shared.is_others(one.id) {
            Err("another node has taken it over".to_owned())
        } else if shared.membership.state().is_some_and(|s| s.is_withdrawn(one.id)) {
            Err("it was unloaded while this node was away".to_owned())
        } else {
            one.open(&shared, one.id).await
        };
        let brought = opened.and_then(|blueprint| launch(&shared, blueprint, None).map_err(|e| e.message));
        if let Err(reason) = brought {
            shared.deployments.save(|saved| saved.retain(|s| s.id != one.id));
            tracing::error!(model = one.name, reason, "a deployment was not brought back");
        }
    }
}

/// Goes on with a deployment that another node coordinated, in an epoch that the cluster has agreed on. It had these
/// stages before.
pub(crate) fn take_up(
    shared: &Arc<Shared>,
    blueprint: Blueprint,
    epoch: Epoch,
    before: Vec<StagePlan>,
) -> Result<(), ManageError> {
    let (id, saved) = (blueprint.id, Saved::of(&blueprint));
    shared.deployments.ended().remove(&id);
    launch_at(shared, blueprint, None, Some((epoch, before)))?;
    if let Some(one) = saved {
        shared.deployments.keep_saved(one);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_model_is_called_by_its_file() {
        assert_eq!(default_name(Path::new("/m/Smol-Q8_0.gguf")), "Smol-Q8_0");
        assert_eq!(default_name(Path::new("/m/Kimi-Q2-00001-of-00008.gguf")), "Kimi-Q2");
        assert_eq!(default_name(Path::new("/m/one-of-us.gguf")), "one-of-us");
        assert!(check_name("a\nb").is_err() && check_name("").is_err() && check_name("a b").is_ok());
    }
}
