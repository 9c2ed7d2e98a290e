//! The child's side: messages from standard input reach the compute thread, results reach standard output.
//!
//! The process ends when its standard input ends, so a daemon that dies leaves no child behind.
use std::collections::HashMap;
use std::fs::File;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::Duration;

use capstan_llama::{LlamaStage, StageOptions};
use capstan_proto::child::{CHILD_VERSION, ChildStats, FromChild, SnapshotSpec, StageInfo, StageSpec, ToChild, Wiring};
use capstan_proto::codec;
use capstan_proto::generate::{ErrorKind, GenerateEvent, GenerateRequest, RequestError};
use capstan_proto::{RequestId, limits};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::{Semaphore, mpsc, oneshot};
use tokio::task::JoinHandle;

use crate::counters::Counters;
use crate::driver::Driver;
use crate::link::IrohTransport;
use crate::middle;
use crate::os::take_stdout;
use crate::prompt::PromptMaker;
use crate::snapshots::Snapshots;
use crate::wire::{Input, Wire};

/// Inputs that wait for the compute thread. Micro-batches among them are bounded by `limits::STAGE_QUEUE`; the rest is
/// small.
const INPUT_QUEUE: usize = 256;
/// Prompts rendered and tokenized at once; each may take a core for seconds.
const PROMPTS_AT_ONCE: usize = 2;
/// Requests a driver takes before it answers `Busy`: all that can run and all that may wait.
const REQUESTS_MAX: usize = limits::QUEUE_MAX + limits::SLOTS_MAX as usize;
/// Stack of the compute thread, as large as a program's own; graphs are walked recursively.
const COMPUTE_STACK_BYTES: usize = 64 << 20;
/// Stack that tokenizing a run of equal characters takes for each; about 300 bytes were seen.
const STACK_BYTES_PER_CHAR: usize = 512;
/// How long the compute thread may finish its micro-batch after the end was asked for.
const STOP_GRACE: Duration = Duration::from_secs(2);

/// The `capstan compute` command: serves one stage until standard input ends. Gives the exit code.
pub fn run() -> i32 {
    let stdout = match take_stdout() {
        Ok(stdout) => stdout,
        Err(error) => {
            tracing::error!(%error, "standard output is not usable");
            return 1;
        }
    };
    capstan_llama::init();
    let runtime = match tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            tracing::error!(%error, "the async runtime could not be started");
            return 1;
        }
    };
    let code = runtime.block_on(serve(stdout));
    // Standard input is read on a thread that cannot be interrupted; it must not hold the process back.
    runtime.shutdown_background();
    code
}

async fn serve(stdout: File) -> i32 {
    let (events, queue) = mpsc::channel(limits::EVENT_QUEUE);
    let mut writer = tokio::spawn(write_events(queue, tokio::fs::File::from_std(stdout)));
    let mut session = Session::new(events.clone());
    let mut writer_ended = false;
    let mut stdin = tokio::io::stdin();
    if events.send(FromChild::Hello { version: CHILD_VERSION }).await.is_err() {
        return 1;
    }
    let code = loop {
        let message = tokio::select! {
            turn = session.next_turn() => match turn {
                Turn::Loaded(Ok((loaded, info))) => {
                    session.loaded(loaded, info).await;
                    continue;
                }
                Turn::Loaded(Err(reason)) => {
                    tracing::error!("{reason}");
                    session.send(FromChild::Failed { reason }).await;
                    break 1;
                }
                Turn::Ended => break 1,
            },
            // What is half read when another branch ends the loop is not needed any more.
            message = read_message(&mut stdin) => message,
            // Nobody listens any more.
            _ = &mut writer => {
                writer_ended = true;
                break 1;
            }
        };
        match message {
            Ok(Some(ToChild::Shutdown)) => break 0,
            Ok(None) => {
                session.orphaned = true;
                break 0;
            }
            Ok(Some(message)) => session.handle(message).await,
            Err(error) => {
                tracing::error!(%error, "the daemon sent something that is no message");
                break 1;
            }
        }
    };
    session.stop().await;
    session.clean_up();
    drop(session);
    drop(events);
    // What was still to be said (a `Failed`, say) goes out first.
    if !writer_ended {
        tokio::time::timeout(STOP_GRACE, writer).await.ok();
    }
    code
}

async fn write_events(mut queue: mpsc::Receiver<FromChild>, mut stdout: tokio::fs::File) {
    while let Some(event) = queue.recv().await {
        let frame = match codec::encode(&event, limits::MESSAGE_BYTES_MAX) {
            Ok(frame) => frame,
            Err(error) => {
                tracing::error!(%error, "an event is too large to be sent");
                continue;
            }
        };
        if stdout.write_all(&frame).await.is_err() || stdout.flush().await.is_err() {
            return;
        }
    }
}

async fn read_message(stdin: &mut tokio::io::Stdin) -> Result<Option<ToChild>, codec::CodecError> {
    let mut prefix = [0; codec::PREFIX];
    if stdin.read_exact(&mut prefix).await.is_err() {
        return Ok(None);
    }
    let mut body = vec![0; codec::frame_len(prefix, limits::MESSAGE_BYTES_MAX)?];
    match stdin.read_exact(&mut body).await {
        Ok(_) => codec::decode(&body).map(Some),
        Err(_) => Ok(None),
    }
}

/// A loaded stage and what belongs to it.
struct Loaded {
    wire: Wire,
    prompts: Option<Arc<PromptMaker>>,
}

/// How a load went.
type LoadResult = Result<(Loaded, StageInfo), String>;
/// A load under way.
type Loading = Pin<Box<dyn Future<Output = LoadResult> + Send>>;

/// What the compute thread did by itself.
enum Turn {
    /// It has loaded, or could not.
    Loaded(LoadResult),
    /// It is gone.
    Ended,
}

struct Session {
    events: mpsc::Sender<FromChild>,
    counters: Arc<Counters>,
    loading: Option<Loading>,
    loaded: Option<Loaded>,
    wiring: Option<JoinHandle<()>>,
    /// Where KV snapshots lie.
    snapshots: Option<PathBuf>,
    /// The daemon is gone.
    orphaned: bool,
    thread: Option<oneshot::Receiver<()>>,
    /// Cancel marks of requests whose prompts are being made or that run.
    live: HashMap<RequestId, Arc<AtomicBool>>,
    ended: mpsc::Receiver<RequestId>,
    ended_tx: mpsc::Sender<RequestId>,
    prompts_at_once: Arc<Semaphore>,
}

impl Session {
    fn new(events: mpsc::Sender<FromChild>) -> Self {
        let (ended_tx, ended) = mpsc::channel(REQUESTS_MAX);
        Self {
            events,
            counters: Arc::default(),
            loading: None,
            loaded: None,
            wiring: None,
            snapshots: None,
            orphaned: false,
            thread: None,
            live: HashMap::new(),
            ended,
            ended_tx,
            prompts_at_once: Arc::new(Semaphore::new(PROMPTS_AT_ONCE)),
        }
    }

    /// Waits for what the compute thread does by itself. Nothing is lost when this is dropped before it is ready.
    async fn next_turn(&mut self) -> Turn {
        if let Some(loading) = &mut self.loading {
            let result = loading.as_mut().await;
            self.loading = None;
            return Turn::Loaded(result);
        }
        let Some(thread) = &mut self.thread else { return std::future::pending().await };
        // Either way the compute thread is gone.
        thread.await.ok();
        Turn::Ended
    }

    async fn handle(&mut self, message: ToChild) {
        match message {
            ToChild::Load { spec, snapshots } => self.load(*spec, snapshots),
            ToChild::Snapshots(all_keep) => {
                if let Some(loaded) = &self.loaded {
                    // In order with what follows; a closed queue is noticed by the main loop.
                    loaded.wire.inputs.send(Input::Snapshots(all_keep)).await.ok();
                }
            }
            ToChild::Connect(wiring) => self.connect(wiring).await,
            ToChild::Submit { request, body } => self.submit(request, body).await,
            ToChild::Cancel { request } => self.cancel(request),
            ToChild::Ping => self.send(FromChild::Pong).await,
            ToChild::Shutdown => {}
        }
    }

    async fn send(&self, event: FromChild) {
        // A closed queue means that the daemon is gone; the main loop notices by itself.
        self.events.send(event).await.ok();
    }

    fn cancel(&self, request: RequestId) {
        let (Some(cancelled), Some(loaded)) = (self.live.get(&request), &self.loaded) else { return };
        cancelled.store(true, Relaxed);
        let inputs = loaded.wire.inputs.clone();
        // Beside the main loop: the compute thread may be busy for long, and the daemon must be heard meanwhile. There
        // is at most one such task a live request.
        tokio::spawn(async move { inputs.send(Input::Cancel { request }).await.ok() });
    }

    /// Begins to load. Reading a large shard takes minutes, in which the daemon must be heard: [`Session::next_turn`]
    /// tells how it went.
    fn load(&mut self, spec: StageSpec, snapshots: Option<SnapshotSpec>) {
        let (events, counters, ended) = (self.events.clone(), self.counters.clone(), self.ended_tx.clone());
        let begun = self.loading.is_some() || self.thread.is_some();
        self.snapshots = snapshots.as_ref().map(|snapshots| snapshots.folder.clone());
        let (thread_ended, thread) = oneshot::channel();
        if !begun {
            self.thread = Some(thread);
        }
        self.loading = Some(Box::pin(async move {
            if begun {
                return Err("a second stage cannot be loaded into the same process".to_owned());
            }
            let transport = Arc::new(IrohTransport::bind(spec.bind).await.map_err(|e| e.to_string())?);
            let spec = Arc::new(spec);
            let (inputs, queue) = mpsc::channel(INPUT_QUEUE);
            let (ready_tx, ready) = oneshot::channel();
            let work = ComputeThread {
                spec: spec.clone(),
                snapshots,
                inputs: queue,
                events: events.clone(),
                counters: counters.clone(),
                ended,
            };
            std::thread::Builder::new()
                .name("compute".into())
                .stack_size(COMPUTE_STACK_BYTES)
                .spawn(move || {
                    work.run(ready_tx);
                    thread_ended.send(()).ok();
                })
                .map_err(|e| format!("the compute thread could not be started: {e}"))?;
            let (info, prompts) =
                ready.await.map_err(|_| "the compute thread ended while it was loading".to_owned())??;
            Ok((Loaded { wire: Wire { transport, spec, inputs, events, counters }, prompts }, info))
        }));
    }

    async fn loaded(&mut self, loaded: Loaded, info: StageInfo) {
        let addr = loaded.wire.transport.addr();
        self.loaded = Some(loaded);
        self.send(FromChild::Loaded { addr, info }).await;
        tokio::spawn(report_stats(self.counters.clone(), self.events.downgrade()));
    }

    async fn connect(&mut self, wiring: Wiring) {
        let Some(loaded) = &self.loaded else {
            let reason = "the stage is not loaded yet".to_owned();
            self.send(FromChild::Lost { epoch: wiring.epoch, reason }).await;
            return;
        };
        // Aborting lets the old epoch's links go before the new ones are made.
        if let Some(old) = self.wiring.take() {
            old.abort();
            old.await.ok();
        }
        self.wiring = Some(tokio::spawn(loaded.wire.clone().serve(wiring)));
    }

    async fn submit(&mut self, request: RequestId, body: Box<GenerateRequest>) {
        while let Ok(done) = self.ended.try_recv() {
            self.live.remove(&done);
        }
        let refuse = |kind, message: &str| FromChild::Event {
            request,
            event: Box::new(GenerateEvent::Failed(RequestError::new(kind, message))),
        };
        let Some((wire, prompts)) = self.loaded.as_ref().and_then(|l| Some((l.wire.clone(), l.prompts.clone()?)))
        else {
            self.send(refuse(ErrorKind::Internal, "this compute process holds no driver")).await;
            return;
        };
        if self.live.len() >= REQUESTS_MAX {
            self.send(refuse(ErrorKind::Busy, "too many requests wait for this model; try again in a moment")).await;
            return;
        }
        let cancelled = Arc::new(AtomicBool::new(false));
        self.live.insert(request, cancelled.clone());
        let (at_once, ended) = (self.prompts_at_once.clone(), self.ended_tx.clone());
        tokio::spawn(async move {
            let Ok(_permit) = at_once.acquire_owned().await else { return };
            if cancelled.load(Relaxed) {
                ended.send(request).await.ok();
                return;
            }
            let outcome = match make_prompt(prompts, body).await {
                Ok((Ok(tokens), body)) => {
                    wire.inputs.send(Input::Submit { request, body, tokens }).await.ok();
                    // The client may have gone while the prompt was made; the driver then never saw a request to
                    // cancel.
                    if cancelled.load(Relaxed) {
                        wire.inputs.send(Input::Cancel { request }).await.ok();
                    }
                    return;
                }
                Ok((Err(error), _)) => error,
                Err(error) => RequestError::new(ErrorKind::Internal, format!("the prompt could not be made: {error}")),
            };
            let event = Box::new(GenerateEvent::Failed(outcome));
            wire.events.send(FromChild::Event { request, event }).await.ok();
            ended.send(request).await.ok();
        });
    }

    async fn stop(&mut self) {
        if let Some(wiring) = self.wiring.take() {
            wiring.abort();
        }
        // Dropping the queue, or what waits for a load, tells the compute thread too.
        self.loading = None;
        if let (Some(loaded), Some(thread)) = (&self.loaded, self.thread.take()) {
            loaded.wire.inputs.try_send(Input::Stop).ok();
            if tokio::time::timeout(STOP_GRACE, thread).await.is_err() {
                tracing::warn!("the compute thread did not end in time; the process ends without it");
            }
        }
    }
}

impl Session {
    /// Nobody else will remove what lies in memory when the daemon is gone.
    fn clean_up(&self) {
        if let Some(folder) = self.snapshots.as_ref().filter(|_| self.orphaned) {
            std::fs::remove_dir_all(folder).ok();
            // The last of the daemon's stages takes the folder around it along.
            folder.parent().map(std::fs::remove_dir);
        }
    }
}

/// Renders and tokenizes on a thread whose stack grows with the text: llama.cpp splits words by `std::regex` for many
/// vocabularies, which recurses once a character. Stacks are committed only where they are touched.
async fn make_prompt(
    prompts: Arc<PromptMaker>,
    body: Box<GenerateRequest>,
) -> Result<(Result<Vec<i32>, RequestError>, Box<GenerateRequest>), String> {
    let (made, wait) = oneshot::channel();
    std::thread::Builder::new()
        .name("prompt".into())
        .stack_size(COMPUTE_STACK_BYTES + STACK_BYTES_PER_CHAR * body.prompt_bytes())
        .spawn(move || {
            let tokens = prompts.tokens(&body);
            made.send((tokens, body)).ok();
        })
        .map_err(|e| e.to_string())?;
    wait.await.map_err(|_| "the thread that makes it ended".to_owned())
}

/// Until nobody else says anything any more: by itself this must not keep the process from ending.
async fn report_stats(counters: Arc<Counters>, events: mpsc::WeakSender<FromChild>) {
    let mut last = ChildStats::default();
    let mut tick = tokio::time::interval(Duration::from_secs(1));
    loop {
        tick.tick().await;
        let now = counters.snapshot();
        let Some(events) = events.upgrade() else { return };
        if now != last && events.send(FromChild::Stats(now.clone())).await.is_err() {
            return;
        }
        last = now;
    }
}

type Ready = Result<(StageInfo, Option<Arc<PromptMaker>>), String>;

struct ComputeThread {
    spec: Arc<StageSpec>,
    snapshots: Option<SnapshotSpec>,
    inputs: mpsc::Receiver<Input>,
    events: mpsc::Sender<FromChild>,
    counters: Arc<Counters>,
    ended: mpsc::Sender<RequestId>,
}

impl ComputeThread {
    fn run(mut self, ready: oneshot::Sender<Ready>) {
        let stage = match load_stage(&self.spec, self.events.clone()) {
            Ok(stage) => stage,
            Err(reason) => {
                ready.send(Err(reason)).ok();
                return;
            }
        };
        let info = stage.info();
        let mut snapshots = Snapshots::open(self.snapshots, self.spec.stages);
        if self.spec.stage + 1 == self.spec.stages {
            match Driver::new(stage, &self.spec, snapshots, self.events, self.counters, self.ended) {
                Ok((mut driver, prompts)) => {
                    ready.send(Ok((info, Some(Arc::new(prompts))))).ok();
                    driver.run(&mut self.inputs);
                }
                Err(reason) => {
                    ready.send(Err(reason)).ok();
                }
            }
        } else {
            let mut stage = stage;
            ready.send(Ok((info, None))).ok();
            middle::run(&mut stage, &mut snapshots, &mut self.inputs, &self.events, &self.counters);
        }
    }
}

fn load_stage(spec: &StageSpec, events: mpsc::Sender<FromChild>) -> Result<LlamaStage, String> {
    let mut options = StageOptions::from_spec(spec).map_err(|e| e.to_string())?;
    let mut last = None;
    options.progress = Some(Box::new(move |share| {
        let permille = (share * 1000.0).clamp(0.0, 1000.0) as u16;
        // llama.cpp calls for every tensor; a person sees no more than a hundred steps.
        if last.is_none_or(|l| permille >= l + 10 || permille == 1000 && l != 1000) {
            last = Some(permille);
            return events.blocking_send(FromChild::LoadProgress { permille }).is_ok();
        }
        true
    }));
    LlamaStage::new(options).map_err(|e| e.to_string())
}
