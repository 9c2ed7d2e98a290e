//! The stages that this node runs: a compute child each, from the shard's arrival to the child's end.
//!
//! A stage is one task between two channels, the same whether its coordinator is this node or another: commands come
//! in, events go out, and when the commands' sender is gone the stage ends. Nothing in it waits for a slow reader, so
//! the child's messages are always taken at once.
use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use capstan_compute::host::{self, ChildReceiver, ChildSender, SpawnOptions};
use capstan_proto::child::{CHILD_VERSION, FromChild, ToChild};
use capstan_proto::control::{StageCommand, StageEvent, StageFile, StageOrder, clip};
use capstan_proto::generate::{ErrorKind, GenerateEvent, GenerateRequest, RequestError};
use capstan_proto::{DeploymentId, Epoch, RequestId, limits};
use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, sleep_until, timeout};

use crate::arrival::{Arrival, FileSource};
use crate::node::Shared;
use crate::pulse::Pulse;
use crate::requests::{EventSender, EventStream, is_last, request_queue};
use crate::runs::{self, Before, Orders, Runs, unless_stopped};
use crate::snapshots::Claim;

/// Commands and events that wait between a stage and its coordinator. Both sides take them at once; a queue that is
/// full means that the other side is gone.
pub(crate) const STAGE_QUEUE: usize = 256;
/// Requests that wait to be handed to a driver's stage; it takes them at once.
const SUBMIT_QUEUE: usize = 64;
/// Messages of a child that wait for the stage's task.
const CHILD_QUEUE: usize = 64;
/// How long a child may take to say hello: the time to start a process on a loaded machine.
const HELLO_TIMEOUT: Duration = Duration::from_secs(60);
/// How long a child may take to end by itself.
const SHUTDOWN_TIMEOUT: Duration = Duration::from_secs(3);
/// How long a child that could not load may take to end by itself.
const FAILED_GRACE: Duration = Duration::from_secs(3);
/// How long a child may leave its standard input unread before it counts as hung.
const CHILD_SEND_TIMEOUT: Duration = Duration::from_secs(10);
/// How often a child is asked for a sign of life, and how many it may leave out before it counts as frozen: its answer
/// needs neither the compute thread nor the network.
const PING_EVERY: Duration = Duration::from_secs(1);
/// See [`PING_EVERY`].
const PINGS_MISSED_MAX: u32 = 5;
/// How long the driver waits for the coordinator to say why the pipeline broke, before it tells clients only that.
const REASON_WAIT: Duration = Duration::from_millis(500);

struct Submit {
    body: Box<GenerateRequest>,
    reply: oneshot::Sender<Result<EventStream, RequestError>>,
}

/// The stages that this node runs, and the drivers among them.
#[derive(Default)]
pub(crate) struct StageHost {
    drivers: Mutex<HashMap<DeploymentId, (u64, mpsc::Sender<Submit>)>>,
    next: AtomicU64,
    runs: Runs,
}

impl StageHost {
    fn drivers(&self) -> MutexGuard<'_, HashMap<DeploymentId, (u64, mpsc::Sender<Submit>)>> {
        self.drivers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Hands a request to the driver here.
    pub(crate) async fn submit(
        &self,
        deployment: DeploymentId,
        body: Box<GenerateRequest>,
    ) -> Result<EventStream, RequestError> {
        let away = || RequestError::new(ErrorKind::Unavailable, "the model is being loaded; try again in a moment");
        let driver = self.drivers().get(&deployment).map(|(_, s)| s.clone()).ok_or_else(away)?;
        let (reply, answer) = oneshot::channel();
        driver.try_send(Submit { body, reply }).map_err(|e| match e {
            mpsc::error::TrySendError::Full(_) => busy(),
            mpsc::error::TrySendError::Closed(_) => away(),
        })?;
        answer.await.map_err(|_| away())?
    }
}

fn busy() -> RequestError {
    RequestError::new(ErrorKind::Busy, "too many requests wait already; try again in a few seconds")
}

/// Tells the coordinator. Essential events that cannot be told end the stage.
pub(crate) struct Events(mpsc::Sender<StageEvent>);

impl Events {
    pub(crate) fn must(&self, event: StageEvent) -> Result<(), String> {
        self.0.try_send(event).map_err(|_| "was stopped because its coordinator is gone".to_owned())
    }

    pub(crate) fn may(&self, event: StageEvent) {
        // Progress and counters: the next one says more, and while the coordinator reads slowly, essential events
        // need the room.
        if self.0.capacity() > STAGE_QUEUE / 2 {
            self.0.try_send(event).ok();
        }
    }
}

/// Why a stage whose process was not lost ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    /// Its coordinator, or a later run, wanted it.
    Ordered,
    /// Its coordinator is gone.
    Orphaned,
}

/// Runs a stage until it is stopped, its child ends, or the node stops. The last event says how it ended.
pub(crate) async fn run_stage(
    shared: std::sync::Arc<Shared>,
    order: StageOrder,
    source: FileSource,
    orders: Orders,
    events: mpsc::Sender<StageEvent>,
) {
    let (deployment, stage, name) = (order.spec.deployment, order.spec.stage, order.spec.model_name.clone());
    let stop = shared.stop.clone();
    let stage_stop = shared.stages_stop();
    let last = events.clone();
    let coordinator = match source {
        FileSource::Here { .. } => shared.id,
        FileSource::There(coordinator) => coordinator,
    };
    let Orders { commands, sender } = orders;
    let (run, before) = shared.stages.runs.enter((coordinator, deployment, stage), sender);
    let mut claim = None;
    let task = StageTask::run(&shared, order, source, before, commands, Events(events), &mut claim);
    let reason = tokio::select! {
        end = task => {
            let for_good = end == Ok(End::Ordered) && !run.is_replaced();
            if let Some(claim) = claim.take().filter(|_| !for_good) {
                claim.leave();
            }
            end.err().unwrap_or_else(|| "was stopped".into())
        }
        () = run.cut_off.cancelled() => "was ended because its coordinator started it anew".into(),
        () = stop.cancelled() => "was stopped with its node".into(),
        () = stage_stop.cancelled() => "was stopped because its node left the cluster".into(),
    };
    tracing::info!(%deployment, stage, model = name, reason, "a stage ended");
    last.try_send(StageEvent::Ended { reason: clip(reason) }).ok();
}

/// Compute threads of a stage that shares this node with others of its deployment; none is every core. They must not
/// be more than there are cores: ggml's threads spin while they wait for each other, which costs ten times the speed
/// when one of them has no core.
fn threads(configured: Option<u32>, sharers: u16) -> Option<u32> {
    let sharers = u32::from(sharers.max(1));
    if sharers == 1 {
        return configured;
    }
    let cores = || std::thread::available_parallelism().map_or(1, |n| n.get() as u32);
    Some((configured.unwrap_or_else(cores) / sharers).max(1))
}

enum FromReader {
    Message(FromChild),
    Exit(String),
}

async fn read_child(mut receiver: ChildReceiver, out: mpsc::Sender<FromReader>) {
    let read = async {
        while let Some(message) = receiver.recv().await {
            if out.send(FromReader::Message(message)).await.is_err() {
                return;
            }
        }
        let reason = receiver.exit_reason().await;
        out.send(FromReader::Exit(reason)).await.ok();
    };
    tokio::select! {
        () = read => {}
        // The stage's task is gone: dropping the receiver ends the child.
        () = out.closed() => {}
    }
}

struct StageTask<'a> {
    shared: &'a Shared,
    order: &'a StageOrder,
    events: &'a Events,
    child: ChildSender,
    connected: Option<Epoch>,
    requests: HashMap<RequestId, EventSender>,
    /// Requests that the child gave up because a link broke; they wait a moment for a better reason.
    doomed: Vec<(EventSender, RequestError)>,
    doom_at: Option<Instant>,
    pulse: Pulse,
    /// Pings that the child has not answered.
    missed: u32,
    cancels: mpsc::Sender<RequestId>,
}

impl StageTask<'_> {
    async fn run(
        shared: &Shared,
        mut order: StageOrder,
        source: FileSource,
        before: Option<Before>,
        mut commands: mpsc::Receiver<StageCommand>,
        events: Events,
        claim: &mut Option<Claim>,
    ) -> Result<End, String> {
        let room = async {
            if let Some(before) = before {
                before.ended().await;
            }
            runs::reserve(shared, order.memory_bytes).await
        };
        let Some(room) = unless_stopped(&mut commands, room).await else { return Ok(End::Ordered) };
        let reservation = room.map_err(|free| {
            format!(
                "has not enough memory: it needs {} and {} are free there, so {} are missing",
                capstan_planner::human_bytes(order.memory_bytes),
                capstan_planner::human_bytes(free),
                capstan_planner::human_bytes(order.memory_bytes.saturating_sub(free))
            )
        })?;
        let arrival = Arrival { shared, source, events: &events };
        let Some(shard) = arrival.shard(&mut order, &mut commands).await? else { return Ok(End::Ordered) };
        order.spec.shard = shard.path.clone();
        let mut draft = None;
        if order.spec.scheduling.draft.is_some() {
            draft = arrival.file(StageFile::Draft, order.draft, &mut commands).await?;
            if draft.is_none() {
                return Ok(End::Ordered);
            }
        }
        order.spec.scheduling.draft = draft.as_ref().map(|file| file.path.clone());
        let draft_bytes =
            draft.as_ref().and_then(|file| std::fs::metadata(&file.path).ok()).map_or(0, |meta| meta.len());
        order.spec.threads = threads(shared.config.threads, order.sharers);
        order.spec.gpu_layers = shared.config.gpu_layers;
        order.spec.bind = shared.config.bind_addr.ip();
        let spec = &order.spec;

        let label = format!("{} stage {}", spec.model_name, spec.stage);
        let options = SpawnOptions { command: shared.config.compute_command.clone(), label };
        let (child, receiver) = host::spawn(options).map_err(|e| format!("could not be started: {e}"))?;
        tracing::info!(model = spec.model_name, stage = spec.stage, layers = %spec.layers, pid = child.pid(), "a stage starts");
        let (out, mut messages) = mpsc::channel(CHILD_QUEUE);
        tokio::spawn(read_child(receiver, out));
        let Some(hello) = unless_stopped(&mut commands, timeout(HELLO_TIMEOUT, messages.recv())).await else {
            return Ok(End::Ordered);
        };
        match hello {
            Ok(Some(FromReader::Message(FromChild::Hello { version: CHILD_VERSION }))) => {}
            Ok(Some(FromReader::Message(FromChild::Hello { version }))) => {
                return Err(format!(
                    "speaks version {version} with its daemon, which speaks {CHILD_VERSION}; capstan was replaced while \
                     it ran, restart the daemon with `capstan stop` and `capstan up`"
                ));
            }
            Ok(Some(FromReader::Exit(reason))) => return Err(reason),
            Ok(_) => return Err("did not speak our protocol".into()),
            Err(_) => return Err(format!("did not start within {} s", HELLO_TIMEOUT.as_secs())),
        }

        let (cancels, mut cancelled) = mpsc::channel(SUBMIT_QUEUE);
        let (submit, mut submitted) = mpsc::channel(SUBMIT_QUEUE);
        let is_driver = spec.stage + 1 == spec.stages;
        let _registered = is_driver.then(|| Registered::new(&shared.stages, spec.deployment, submit));
        let mut task = StageTask {
            shared,
            order: &order,
            events: &events,
            child,
            connected: None,
            requests: HashMap::new(),
            doomed: Vec::new(),
            doom_at: None,
            pulse: Pulse::new(Instant::now(), shared.config.stall_limit),
            missed: 0,
            cancels,
        };
        *claim = shared.snapshots.claim(spec, shared.machine.spare_bytes());
        let snapshots = claim.as_ref().map(Claim::spec);
        task.tell_child(ToChild::Load { spec: Box::new(spec.clone()), snapshots }).await?;
        let (mut failure, mut hung) = (None, None);
        let mut kill_at = None;
        let mut pings = tokio::time::interval_at(Instant::now() + PING_EVERY, PING_EVERY);
        // A daemon that was held up itself must not count what its child could not answer meanwhile.
        pings.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let end = loop {
            let doom_at = task.doom_at;
            let stalled_at = (!task.requests.is_empty()).then(|| task.pulse.due());
            tokio::select! {
                message = messages.recv() => match message {
                    Some(FromReader::Message(FromChild::Failed { reason })) => {
                        // It ends by itself; but the load must end whatever it does.
                        failure = Some(reason);
                        kill_at = Some(Instant::now() + FAILED_GRACE);
                    }
                    Some(FromReader::Message(FromChild::Loaded { addr, info })) => {
                        reservation.measured(&info, draft_bytes);
                        events.must(StageEvent::Loaded { addr, info })?;
                    }
                    Some(FromReader::Message(FromChild::Pong)) => task.missed = 0,
                    Some(FromReader::Message(message)) => {
                        task.pulse.beat(Instant::now(), !task.requests.is_empty());
                        task.heard(message).await?;
                    }
                    end @ (Some(FromReader::Exit(_)) | None) => {
                        let how = match end {
                            Some(FromReader::Exit(reason)) => reason,
                            _ => "ended".into(),
                        };
                        let failed = failure.map(|f| format!("could not load: {f}"));
                        let reason = hung.or(failed).unwrap_or(how);
                        task.fail_all(ErrorKind::StageLost, &task.sentence(&reason));
                        return Err(reason);
                    }
                },
                command = commands.recv() => match command {
                    Some(StageCommand::Connect(wiring)) => {
                        task.connected = None;
                        task.tell_child(ToChild::Connect(wiring)).await?;
                    }
                    Some(StageCommand::Abort { reason }) => task.abort(&reason).await?,
                    Some(StageCommand::Snapshots(all_keep)) => task.tell_child(ToChild::Snapshots(all_keep)).await?,
                    Some(StageCommand::Fetch(..)) => {}
                    Some(StageCommand::Stop) => break End::Ordered,
                    None => break End::Orphaned,
                },
                Some(Submit { body, reply }) = submitted.recv() => {
                    let answer = task.submit(body).await;
                    // A caller that is gone drops the stream, which cancels the request.
                    reply.send(answer).ok();
                }
                Some(request) = cancelled.recv() => {
                    if task.requests.remove(&request).is_some() {
                        task.tell_child(ToChild::Cancel { request }).await?;
                    }
                }
                () = sleep_until(doom_at.unwrap_or_else(Instant::now)), if doom_at.is_some() => task.flush_doomed(),
                () = sleep_until(stalled_at.unwrap_or_else(Instant::now)), if stalled_at.is_some() => {
                    let reason = format!("made no progress for {} s and was killed", task.pulse.limit().as_secs());
                    task.fail_all(ErrorKind::StageLost, &task.sentence(&reason));
                    hung = Some(reason);
                    // Its end comes as a message, and only then is its memory free for the next start.
                    task.child.kill();
                }
                _ = pings.tick(), if hung.is_none() => {
                    if task.missed >= PINGS_MISSED_MAX {
                        let reason = format!("gave no sign of life for {PINGS_MISSED_MAX} s and was killed");
                        task.fail_all(ErrorKind::StageLost, &task.sentence(&reason));
                        hung = Some(reason);
                        task.child.kill();
                    } else {
                        task.missed += 1;
                        task.tell_child(ToChild::Ping).await?;
                    }
                }
                () = sleep_until(kill_at.unwrap_or_else(Instant::now)), if kill_at.is_some() => {
                    kill_at = None;
                    task.child.kill();
                }
            }
        };
        task.fail_all(
            ErrorKind::Unavailable,
            "the model was unloaded, or its node is stopping, while the answer was being made; see `capstan status`",
        );
        task.tell_child(ToChild::Shutdown).await.ok();
        let ended = async { while !matches!(messages.recv().await, Some(FromReader::Exit(_)) | None) {} };
        if timeout(SHUTDOWN_TIMEOUT, ended).await.is_err() {
            task.child.kill();
            let killed = async { while !matches!(messages.recv().await, Some(FromReader::Exit(_)) | None) {} };
            timeout(SHUTDOWN_TIMEOUT, killed).await.ok();
        }
        Ok(end)
    }

    fn sentence(&self, reason: &str) -> String {
        format!(
            "stage {} on node {} {reason}; it is being started again, try again in a moment",
            self.order.spec.stage,
            self.shared.membership.name()
        )
    }

    async fn tell_child(&self, message: ToChild) -> Result<(), String> {
        match timeout(CHILD_SEND_TIMEOUT, self.child.send(message)).await {
            // An ended child is told by its reader, with the reason.
            Ok(_) => Ok(()),
            Err(_) => {
                self.child.kill();
                Err(format!("hung for {} s and was killed", CHILD_SEND_TIMEOUT.as_secs()))
            }
        }
    }

    async fn heard(&mut self, message: FromChild) -> Result<(), String> {
        match message {
            FromChild::LoadProgress { permille } => self.events.may(StageEvent::Loading { permille }),
            FromChild::Connected { epoch } => {
                self.connected = Some(epoch);
                self.events.must(StageEvent::Connected { epoch })?;
            }
            FromChild::Stats(stats) => self.events.may(StageEvent::Stats(stats)),
            FromChild::Lost { epoch, reason } => {
                self.connected = None;
                let error = RequestError::new(ErrorKind::StageLost, self.broken(&reason));
                let all: Vec<_> = self.requests.drain().map(|(_, queue)| (queue, error.clone())).collect();
                self.doom(all);
                self.events.must(StageEvent::Lost { epoch, reason: clip(reason) })?;
            }
            FromChild::Event { request, event } => self.forward(request, *event).await?,
            FromChild::Hello { .. } | FromChild::Loaded { .. } | FromChild::Failed { .. } | FromChild::Pong => {}
        }
        Ok(())
    }

    fn broken(&self, reason: &str) -> String {
        format!(
            "the pipeline broke while the answer was being made ({reason}); it is being mended, try again in a moment"
        )
    }

    async fn forward(&mut self, request: RequestId, event: GenerateEvent) -> Result<(), String> {
        if let GenerateEvent::Failed(error) = &event
            && error.kind == ErrorKind::StageLost
        {
            if let Some(queue) = self.requests.remove(&request) {
                self.doom(vec![(queue, error.clone())]);
            }
            return Ok(());
        }
        let last = is_last(&event);
        let Some(queue) = self.requests.get(&request) else {
            // Events of a request that was cancelled may still arrive. One that was given up while its prompt was
            // still being made reached the driver afterwards: nobody reads it, so it must not hold a slot.
            return if last { Ok(()) } else { self.tell_child(ToChild::Cancel { request }).await };
        };
        let put = queue.put(event);
        if last {
            self.requests.remove(&request);
        } else if put.is_err() {
            self.requests.remove(&request);
            self.tell_child(ToChild::Cancel { request }).await?;
        }
        Ok(())
    }

    fn doom(&mut self, requests: Vec<(EventSender, RequestError)>) {
        if !requests.is_empty() {
            self.doomed.extend(requests);
            self.doom_at.get_or_insert_with(|| Instant::now() + REASON_WAIT);
        }
    }

    fn flush_doomed(&mut self) {
        self.doom_at = None;
        for (queue, error) in self.doomed.drain(..) {
            queue.fail(error);
        }
    }

    fn fail_all(&mut self, kind: ErrorKind, reason: &str) {
        self.doom_at = None;
        let doomed = self.doomed.drain(..).map(|(queue, _)| queue);
        for queue in doomed.chain(self.requests.drain().map(|(_, queue)| queue)) {
            queue.fail(RequestError::new(kind, reason));
        }
    }

    async fn abort(&mut self, reason: &str) -> Result<(), String> {
        self.connected = None;
        let live: Vec<_> = self.requests.keys().copied().collect();
        self.fail_all(ErrorKind::StageLost, reason);
        for request in live {
            self.tell_child(ToChild::Cancel { request }).await?;
        }
        Ok(())
    }

    async fn submit(&mut self, body: Box<GenerateRequest>) -> Result<EventStream, RequestError> {
        if self.connected.is_none() {
            let name = &self.order.spec.model_name;
            let message = format!("the model {name:?} is being brought up; try again in a moment");
            return Err(RequestError::new(ErrorKind::Unavailable, message));
        }
        if self.requests.len() >= self.order.spec.slots as usize + limits::QUEUE_MAX {
            return Err(busy());
        }
        let request = RequestId(self.shared.stages.next.fetch_add(1, Ordering::Relaxed));
        let (queue, stream, gone) = request_queue();
        let cancels = self.cancels.clone();
        tokio::spawn(async move {
            gone.cancelled().await;
            // A stage that has ended needs no cancelling.
            cancels.send(request).await.ok();
        });
        let sent = timeout(CHILD_SEND_TIMEOUT, self.child.send(ToChild::Submit { request, body })).await;
        match sent {
            Ok(Ok(())) => {}
            Ok(Err(host::HostError::Codec(e))) => return Err(RequestError::new(ErrorKind::BadRequest, e.to_string())),
            Ok(Err(_)) | Err(_) => {
                return Err(RequestError::new(ErrorKind::Unavailable, self.sentence("has just ended")));
            }
        }
        if self.requests.is_empty() {
            self.pulse.begin(Instant::now());
        }
        self.requests.insert(request, queue);
        Ok(stream)
    }
}

/// A driver's place in the table, given back when its stage ends.
struct Registered<'a> {
    host: &'a StageHost,
    deployment: DeploymentId,
    key: u64,
}

impl<'a> Registered<'a> {
    fn new(host: &'a StageHost, deployment: DeploymentId, submit: mpsc::Sender<Submit>) -> Self {
        let key = host.next.fetch_add(1, Ordering::Relaxed);
        host.drivers().insert(deployment, (key, submit));
        Self { host, deployment, key }
    }
}

impl Drop for Registered<'_> {
    fn drop(&mut self) {
        let mut drivers = self.host.drivers();
        // A later stage of the same deployment may have taken the place already.
        if drivers.get(&self.deployment).is_some_and(|(key, _)| *key == self.key) {
            drivers.remove(&self.deployment);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stages_of_one_node_share_its_cores() {
        assert_eq!((threads(None, 1), threads(Some(8), 1), threads(Some(8), 0)), (None, Some(8), Some(8)));
        assert_eq!((threads(Some(8), 3), threads(Some(2), 5)), (Some(2), Some(1)));
        let cores = std::thread::available_parallelism().unwrap().get() as u32;
        assert_eq!(threads(None, 2), Some((cores / 2).max(1)));
    }
}
