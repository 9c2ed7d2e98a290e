//! Looks after one deployment: brings its stages up, wires them, and mends it when one is lost.
//!
//! One task a deployment, so there is nothing to lock: stages report by message, and after each message the task does
//! what the whole now needs.
//!
//! ```text
//! stages down ──sessions──▶ all loaded ──Connect, epoch + 1──▶ all connected = Ready
//!      ▲                        ▲                                   │
//!      │ one ended, away        │ a link broke, all live            │
//!      └────────────────────────┴───────────────────────────────────┘ Recovering
//! ```
//!
//! A node that stays away loses its layers to the others, if they can hold them ([`displace`]).
mod cuts;
mod displace;
mod ending;
mod wiring;

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use capstan_planner::{Placement, StagePlan};
use capstan_proto::child::{ChildStats, PeerAddr, StageInfo, WindowIo};
use capstan_proto::control::{StageCommand, StageEvent, StageFile, StageOrder, clip};
use capstan_proto::manage::{DeploymentStatus, Health, LoadEvent, StageStatus};
use capstan_proto::{Epoch, NodeId};
use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::{CancellationToken, DropGuard};

use crate::agreement::NotPlaced;
use crate::arrival::FileSource;
use crate::blueprint::Blueprint;
use crate::coordinator::cuts::{Cut, Supply};
use crate::coordinator::displace::Displacing;
use crate::coordinator::wiring::Agreed;
use crate::node::Shared;
use crate::session::{self, SessionEvent};

/// Messages that wait for a coordinator's task.
const QUEUE: usize = 1024;
/// Ends of one stage within [`CRASH_WINDOW`] after which it is not started again, if it does not even come up.
const CRASHES_MAX: usize = 5;
/// Broken links within [`CRASH_WINDOW`] after which a deployment counts as failed.
const REWIRES_MAX: usize = 20;
/// See [`CRASHES_MAX`].
const CRASH_WINDOW: Duration = Duration::from_secs(60);
/// How long a broken link waits for the news that a process has ended, which then is the reason.
const SETTLE: Duration = Duration::from_millis(300);
/// How long until a node that is away is tried again.
const AWAY_RETRY: Duration = Duration::from_secs(1);
/// How long all links may take to stand before they are made anew.
const WIRE_TIMEOUT: Duration = Duration::from_secs(20);

/// How long a stage may leave wirings unanswered; then its process hangs and is started again. More than one wiring,
/// because a healthy stage answers only when the micro-batch at hand is computed.
const HUNG_AFTER: Duration = Duration::from_secs(2 * WIRE_TIMEOUT.as_secs());

/// What a coordinator is told.
pub(crate) enum Message {
    /// A stage reports. The number tells its sessions apart.
    Session(usize, u64, SessionEvent),
    /// A session's events have ended.
    Closed(usize, u64),
    /// A stage's file is there for it, or could not be made. The first number tells the layouts apart.
    Cut(u64, usize, StageFile, Result<Cut, String>),
    /// Bytes of a shard that is being cut.
    Cutting(u64, usize, u64, u64),
    /// Where the layers could go now. The number tells the questions apart.
    Planned(u64, Result<Placement, String>),
    /// The cluster has agreed on the placement of this layout under this epoch, or has not.
    Placed(u64, Result<Agreed, NotPlaced>),
    /// A node is no member any more.
    MemberLeft(NodeId),
    /// Move the stages away from a node; answer when the model answers without it, or say why not.
    Vacate(NodeId, oneshot::Sender<Result<(), String>>),
    /// End the deployment; answer when it is gone.
    Unload(oneshot::Sender<()>),
}

struct Stage {
    plan: StagePlan,
    io: WindowIo,
    shard_bytes: u64,
    generation: u64,
    commands: Option<mpsc::Sender<StageCommand>>,
    loaded: Option<(PeerAddr, StageInfo)>,
    connected: bool,
    /// Since when it has said neither that its links stand nor that they do not.
    silent_since: Option<Instant>,
    stats: ChildStats,
    shard: Supply,
    draft: Supply,
    crashes: VecDeque<Instant>,
    retry_at: Option<Instant>,
    /// Since when its node does not answer.
    away_since: Option<Instant>,
}

impl Stage {
    fn new(plan: &StagePlan, model: &capstan_gguf::Model, generation: u64) -> Self {
        Self {
            io: model.window_io(plan.layers),
            shard_bytes: model.shard_bytes(plan.layers),
            plan: plan.clone(),
            generation,
            commands: None,
            loaded: None,
            connected: false,
            silent_since: None,
            stats: ChildStats::default(),
            shard: Supply::default(),
            draft: Supply::default(),
            crashes: VecDeque::new(),
            retry_at: None,
            away_since: None,
        }
    }

    fn supply(&mut self, file: StageFile) -> &mut Supply {
        match file {
            StageFile::Shard => &mut self.shard,
            StageFile::Draft => &mut self.draft,
        }
    }
}

/// The task of a deployment.
pub(crate) struct Coordinator {
    shared: Arc<Shared>,
    blueprint: Blueprint,
    stages: Vec<Stage>,
    epoch: Epoch,
    /// An epoch was asked for.
    placing: bool,
    health: Health,
    detail: String,
    inbox: mpsc::Receiver<Message>,
    outbox: mpsc::Sender<Message>,
    /// Who watches the load; none once it is over.
    progress: Option<mpsc::Sender<LoadEvent>>,
    /// Nothing has answered yet: any trouble ends the load.
    initial: bool,
    /// When the links are to be made anew: soon after one broke, or when they do not stand in time.
    rewire_at: Option<Instant>,
    /// A link of this epoch broke; what else breaks follows from it.
    mending: bool,
    rewires: VecDeque<Instant>,
    /// Ends what is being cut; when the coordinator is gone, too.
    cuts_stop: CancellationToken,
    _cuts_stop: DropGuard,
    displacing: Displacing,
    /// Who waits until the deployment is unloaded.
    unloads: Vec<oneshot::Sender<()>>,
}

/// How to reach a coordinator's task.
pub(crate) type Outbox = mpsc::Sender<Message>;

impl Coordinator {
    /// A coordinator for a new load (with `progress`), or one that goes on with a deployment (without): its
    /// own after a restart, or another node's, in this epoch and with those stages before.
    pub(crate) fn new(
        shared: Arc<Shared>,
        blueprint: Blueprint,
        progress: Option<mpsc::Sender<LoadEvent>>,
        taken: Option<(Epoch, Vec<StagePlan>)>,
    ) -> (Self, Outbox) {
        let (outbox, inbox) = mpsc::channel(QUEUE);
        let model = &blueprint.model.model;
        let stages = blueprint.stages.iter().map(|plan| Stage::new(plan, model, 0)).collect();
        let initial = progress.is_some();
        let cuts_stop = CancellationToken::new();
        let (epoch, before) = taken.unwrap_or_default();
        let coordinator = Self {
            shared,
            stages,
            epoch,
            placing: false,
            health: if initial { Health::Loading } else { Health::Recovering },
            detail: if initial {
                blueprint.remark.clone()
            } else if epoch == Epoch(0) {
                "its node was restarted; it is being loaded again".into()
            } else {
                "the node that looked after it was lost; it is being loaded again".into()
            },
            inbox,
            outbox: outbox.clone(),
            progress,
            initial,
            rewire_at: None,
            mending: false,
            rewires: VecDeque::new(),
            _cuts_stop: cuts_stop.clone().drop_guard(),
            cuts_stop,
            displacing: Displacing::new(&blueprint, before),
            unloads: Vec::new(),
            blueprint,
        };
        (coordinator, outbox)
    }

    /// Runs until the deployment is unloaded, its load fails, or the node stops.
    pub(crate) async fn run(mut self) {
        let stop = self.shared.stop.clone();
        for i in 0..self.stages.len() {
            self.start(i);
        }
        self.publish();
        loop {
            let looks = self.displacing.look_at();
            let due = self.stages.iter().filter_map(|s| s.retry_at).chain(self.rewire_at).fold(looks, Instant::min);
            let outcome = tokio::select! {
                // The inbox never closes: the coordinator holds a sender itself.
                message = self.inbox.recv() => match message {
                    Some(Message::Unload(done)) => {
                        self.unloads.push(done);
                        self.end_stages().await;
                        self.remove().await;
                        return;
                    }
                    Some(message) => self.handle(message),
                    None => return,
                },
                () = sleep_until(due) => self.tick(),
                () = stop.cancelled() => return,
            };
            if let Err(failure) = outcome {
                if self.initial {
                    self.fail_load(failure).await;
                    return;
                }
                self.fail(failure).await;
                if !self.unloads.is_empty() {
                    self.remove().await;
                    return;
                }
            }
        }
    }

    fn name_stage(&self, i: usize) -> String {
        // The node may have been renamed since the placement was made.
        format!("stage {i} on node {}", self.shared.membership.name_of(self.stages[i].plan.node))
    }

    /// Acts on a message; an error is why the deployment cannot go on.
    fn handle(&mut self, message: Message) -> Result<(), String> {
        if self.health == Health::Failed {
            // Only an unload ends this state.
            if let Message::Vacate(_, done) = message {
                // Its stages are gone.
                done.send(Ok(())).ok();
            }
            return Ok(());
        }
        // An earlier placement may have had more stages.
        let current = |s: &Self, i: usize, generation| s.stages.get(i).is_some_and(|s| s.generation == generation);
        match message {
            Message::Session(i, generation, event) if current(self, i, generation) => match event {
                SessionEvent::Stage(event) => self.heard(i, event)?,
                SessionEvent::Away(reason) => self.away(i, reason)?,
            },
            Message::Closed(i, generation) if current(self, i, generation) && self.stages[i].commands.is_some() => {
                self.ended(i, "ended without a word".into())?;
            }
            Message::Session(..) | Message::Closed(..) => {}
            Message::Cutting(layout, i, done_bytes, total_bytes) if layout == self.displacing.layout => {
                self.tell(LoadEvent::Cutting { stage: i as u16, done_bytes, total_bytes });
            }
            Message::Cutting(..) => {}
            Message::Cut(layout, i, file, result) => {
                if layout == self.displacing.layout {
                    self.was_cut(i, file, result)?;
                } else if let Ok(cut) = result {
                    self.discard(cut);
                }
            }
            Message::Planned(question, result) => self.planned(question, result)?,
            Message::Vacate(node, done) => self.vacate(node, done),
            Message::Placed(layout, placed) => self.placed(layout, placed)?,
            Message::MemberLeft(node) => {
                for i in 0..self.stages.len() {
                    if self.stages[i].plan.node == node {
                        self.away(i, "it left the cluster".to_owned())?;
                    }
                }
            }
            Message::Unload(_) => {}
        }
        Ok(())
    }

    /// Opens a session for a stage.
    fn start(&mut self, i: usize) {
        let node = self.stages[i].plan.node;
        self.stages[i].retry_at = None;
        let order = self.order(i);
        let session = if node == self.shared.id {
            // llama.cpp reads a whole model from wherever it lies, in however many files.
            let own = self.stages.len() == 1 && self.blueprint.rehearsal.is_none() && !self.blueprint.model.elsewhere;
            let whole = if own { self.blueprint.model.model.files().first().cloned() } else { None };
            let draft = self.blueprint.scheduling.draft.clone();
            session::open_local(&self.shared, order, FileSource::Here { shard: whole, draft })
        } else {
            session::open_remote(&self.shared, node, order)
        };
        let stage = &mut self.stages[i];
        stage.generation += 1;
        stage.connected = false;
        stage.commands = Some(session.commands);
        let (outbox, generation, mut events) = (self.outbox.clone(), stage.generation, session.events);
        tokio::spawn(async move {
            while let Some(event) = events.recv().await {
                if outbox.send(Message::Session(i, generation, event)).await.is_err() {
                    return;
                }
            }
            outbox.send(Message::Closed(i, generation)).await.ok();
        });
    }

    fn order(&self, i: usize) -> StageOrder {
        let stage = &self.stages[i];
        let (cutter, draft) = (&self.shared.cutter, self.blueprint.draft.as_ref());
        let sharers = self.stages.iter().filter(|s| s.plan.node == stage.plan.node).count();
        let rehearsal = self.blueprint.rehearsal.as_ref();
        StageOrder {
            spec: self.blueprint.spec(i, stage.io.clone()),
            made_up: rehearsal.and_then(|r| r.shards.get(i).cloned()),
            shard: cutter.known(&self.blueprint.model, stage.plan.layers).filter(|_| rehearsal.is_none()),
            draft: draft.and_then(|draft| cutter.known(draft, draft.whole()?)),
            sharers: sharers as u16,
            memory_bytes: stage.plan.memory_bytes,
        }
    }

    fn heard(&mut self, i: usize, event: StageEvent) -> Result<(), String> {
        let stage = i as u16;
        match event {
            StageEvent::Need(file) => self.supply(i, file),
            StageEvent::Fetching { done_bytes, total_bytes } => {
                self.tell(LoadEvent::Transfer { stage, done_bytes, total_bytes });
            }
            StageEvent::Fetched(file) => self.drop_cut(i, file),
            StageEvent::Loading { permille } => self.tell(LoadEvent::Loading { stage, permille: permille.min(1000) }),
            StageEvent::Loaded { addr, info } => {
                self.stages[i].loaded = Some((addr, info));
                self.stages[i].away_since = None;
                self.tell(LoadEvent::Loaded { stage });
                self.publish();
                if self.stages.iter().all(|s| s.loaded.is_some()) {
                    self.wire();
                }
            }
            StageEvent::Connected { epoch } if epoch == self.epoch => {
                self.stages[i].connected = true;
                self.stages[i].silent_since = None;
                if self.stages.iter().all(|s| s.connected) {
                    self.ready();
                }
            }
            StageEvent::Lost { epoch, reason } if epoch == self.epoch => {
                tracing::warn!(model = self.blueprint.name, stage = i, reason, "a link broke");
                self.stages[i].silent_since = None;
                // While a stage is down, broken links only follow from that.
                if self.stages.iter().all(|s| s.loaded.is_some()) && !self.mending {
                    self.mending = true;
                    self.trouble(format!("{} lost a link: {reason}", self.name_stage(i)));
                    self.rewire_at = Some(Instant::now() + SETTLE);
                }
            }
            StageEvent::Connected { .. } | StageEvent::Lost { .. } => {}
            StageEvent::Stats(stats) => {
                self.stages[i].stats = stats;
                self.note();
            }
            StageEvent::Ended { reason } => self.ended(i, reason)?,
        }
        Ok(())
    }

    fn down(&mut self, i: usize) {
        let stage = &mut self.stages[i];
        stage.commands = None;
        stage.loaded = None;
        stage.connected = false;
        stage.silent_since = None;
        stage.stats = ChildStats::default();
        // What waits for this stage is wired when it is back.
        self.rewire_at = None;
    }

    fn ended(&mut self, i: usize, reason: String) -> Result<(), String> {
        let had_served = self.stages[i].connected;
        self.down(i);
        let what = format!("{} {reason}", self.name_stage(i));
        if self.initial {
            return Err(what);
        }
        let now = Instant::now();
        let crashes = &mut self.stages[i].crashes;
        crashes.push_back(now);
        while crashes.front().is_some_and(|&t| now.duration_since(t) > CRASH_WINDOW) {
            crashes.pop_front();
        }
        let times = crashes.len();
        // A stage that comes up and is killed again and again is worth starting once more; one that does not come up is
        // not.
        if times >= CRASHES_MAX && !had_served {
            if self.go_home() {
                return Ok(());
            }
            return Err(format!(
                "{what}, for the {times}th time within a minute; unload the model and see the node's log"
            ));
        }
        // At once the first time, then ever more patiently.
        self.stages[i].retry_at = Some(now + Duration::from_millis([50, 500, 1000, 2000][(times - 1).min(3)]));
        self.abort_requests(&format!("{what}; it is being started again, try again in a moment"));
        self.trouble(what);
        Ok(())
    }

    fn away(&mut self, i: usize, reason: String) -> Result<(), String> {
        self.down(i);
        let node = self.stages[i].plan.node;
        let name = self.shared.membership.name_of(node);
        if self.initial {
            return Err(format!("stage {i} could not be brought up on node {name}: {reason}"));
        }
        if !self.shared.membership.is_member(node) && !self.displacing.may() {
            return Err(format!("stage {i} is gone because node {name} left the cluster; load the model again"));
        }
        let now = Instant::now();
        self.stages[i].retry_at = Some(now + AWAY_RETRY);
        self.stages[i].away_since.get_or_insert(now);
        self.displacing.look_soon();
        self.abort_requests(&format!("node {name}, which runs stage {i}, does not answer; try again in a moment"));
        self.trouble(format!("waiting for node {name}, which runs stage {i}: {reason}"));
        Ok(())
    }

    fn trouble(&mut self, detail: String) {
        if self.detail != detail || self.health != Health::Recovering {
            tracing::warn!(model = self.blueprint.name, detail, "a deployment needs mending");
        }
        if !self.initial {
            self.health = Health::Recovering;
        }
        self.detail = clip(detail);
        self.publish();
    }

    /// Lets the driver tell its clients why their answers end.
    fn abort_requests(&self, reason: &str) {
        if let Some(commands) = self.stages.last().and_then(|s| s.commands.as_ref()) {
            commands.try_send(StageCommand::Abort { reason: clip(reason.to_owned()) }).ok();
        }
    }

    fn tick(&mut self) -> Result<(), String> {
        let now = Instant::now();
        if self.displacing.look_at() <= now {
            self.look_after_nodes()?;
        }
        for i in 0..self.stages.len() {
            if self.stages[i].retry_at.is_some_and(|t| t <= now) {
                self.start(i);
            }
        }
        if self.rewire_at.is_some_and(|t| t <= now) {
            self.rewire_at = None;
            self.abort_requests(
                "the pipeline broke while the answer was being made; it is being mended, try again in a moment",
            );
            self.rewires.push_back(now);
            while self.rewires.front().is_some_and(|&t| now.duration_since(t) > CRASH_WINDOW) {
                self.rewires.pop_front();
            }
            if self.rewires.len() > REWIRES_MAX || (self.initial && self.rewires.len() > 2) {
                return Err(format!(
                    "its stages cannot reach each other ({}); does a firewall block UDP between the nodes?",
                    self.detail
                ));
            }
            let hangs = |s: &Stage| s.silent_since.is_some_and(|t| now.duration_since(t) > HUNG_AFTER);
            let hung = self.stages.iter().position(hangs);
            if let Some(i) = hung {
                // Without its commands the session ends, and with it the process, by force if need be.
                self.ended(i, "hangs: it does not answer when it is to be connected".to_owned())?;
            } else if self.stages.iter().all(|s| s.loaded.is_some()) {
                self.wire();
            }
        }
        Ok(())
    }

    fn ready(&mut self) {
        self.rewire_at = None;
        let was = std::mem::replace(&mut self.health, Health::Ready);
        let first = std::mem::take(&mut self.initial);
        if first {
            self.detail = self.blueprint.remark.clone();
        } else if was == Health::Recovering && !self.detail.starts_with("mended: ") {
            self.detail = clip(format!("mended: {}", self.detail));
        }
        tracing::info!(model = self.blueprint.name, epoch = self.epoch.0, "a deployment is ready");
        self.publish();
        if first {
            self.shared.deployments.keep(&self.blueprint);
        }
        self.vacated();
        if let Some(progress) = self.progress.take() {
            let (shared, deployment) = (self.shared.clone(), self.status());
            tokio::spawn(async move {
                // When the caller hears that it is ready, every node's API knows the model.
                shared.push_deployments().await;
                progress.send(LoadEvent::Ready { deployment }).await.ok();
            });
        }
    }

    fn tell(&self, event: LoadEvent) {
        if let Some(progress) = &self.progress {
            // A watcher that is slow or gone misses progress, never the outcome.
            progress.try_send(event).ok();
        }
    }

    fn status(&self) -> DeploymentStatus {
        let b = &self.blueprint;
        let stages = self.stages.iter().enumerate().map(|(i, s)| {
            let info = s.loaded.as_ref().map(|(_, info)| info);
            StageStatus {
                stage: i as u16,
                node: s.plan.node,
                node_name: self.shared.membership.name_of(s.plan.node),
                layers: s.plan.layers,
                pid: info.map(|info| info.pid),
                shard_bytes: s.shard_bytes,
                memory_bytes: info
                    .map_or(0, |i| i.weights_bytes.saturating_add(i.kv_bytes).saturating_add(i.compute_bytes)),
                kv_bytes: info.map_or(0, |i| i.kv_bytes),
                compute_bytes: info.map_or(0, |i| i.compute_bytes),
                device: info.map(|info| info.device.chars().take(200).collect()).unwrap_or_default(),
                health: match (s.connected, self.health) {
                    (true, _) => Health::Ready,
                    (false, Health::Ready) => Health::Recovering,
                    (false, health) => health,
                },
                stats: s.stats.clone(),
            }
        });
        b.status(self.shared.id, self.epoch, self.health, self.detail.clone(), stages.collect())
    }

    /// Lets this node's own status know.
    fn note(&self) {
        self.shared.deployments.put(self.status());
    }

    /// Lets every node know.
    fn publish(&self) {
        self.note();
        self.shared.deployments_changed.notify_one();
    }
}
