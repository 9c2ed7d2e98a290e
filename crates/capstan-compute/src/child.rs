//! The child's side: messages from standard input reach the compute thread, results reach standard output.
//!
//! The process ends when its standard input ends, so a daemon that dies leaves no child behind.
use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use capstan_llama::{LlamaStage, StageOptions};
use capstan_proto::child::{CHILD_VERSION, ChildStats, FromChild, StageInfo, StageSpec, ToChild, Wiring};
use capstan_proto::codec;
use capstan_proto::generate::{ErrorKind, GenerateEvent, GenerateRequest, RequestError};
use capstan_proto::manage::DeviceStatus;
use capstan_proto::{RequestId, limits};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::{Semaphore, mpsc, oneshot};
use tokio::task::JoinHandle;

use crate::driver::Driver;
use crate::link::{IrohTransport, Transport};
use crate::middle;
use crate::prompt::PromptMaker;
use crate::wire::{Input, Wire};

/// Inputs that wait for the compute thread. Micro-batches among them are bounded by `limits::STAGE_QUEUE`; the rest is
/// small.
const INPUT_QUEUE: usize = 256;
/// Prompts rendered and tokenized at once; each may take a core for seconds.
const PROMPTS_AT_ONCE: usize = 2;
/// Requests a driver takes before it answers `Busy`: all that can run and all that may wait.
const REQUESTS_MAX: usize = limits::QUEUE_MAX + limits::SLOTS_MAX as usize;
/// How long the compute thread may finish its micro-batch after the end was asked for.
const STOP_GRACE: Duration = Duration::from_secs(2);

/// What a compute thread counts, read once a second.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    micro_batches: AtomicU64,
    rows: AtomicU64,
    busy_us: AtomicU64,
    pub slots_used: AtomicU32,
    pub queued: AtomicU32,
}

impl Counters {
    pub fn reset(&self) {
        self.micro_batches.store(0, Relaxed);
        self.rows.store(0, Relaxed);
        self.busy_us.store(0, Relaxed);
    }

    pub fn add(&self, rows: usize, busy: Duration) {
        self.micro_batches.fetch_add(1, Relaxed);
        self.rows.fetch_add(rows as u64, Relaxed);
        self.busy_us.fetch_add(busy.as_micros() as u64, Relaxed);
    }

    fn snapshot(&self) -> ChildStats {
        ChildStats {
            micro_batches: self.micro_batches.load(Relaxed),
            rows: self.rows.load(Relaxed),
            busy_us: self.busy_us.load(Relaxed),
            slots_used: self.slots_used.load(Relaxed),
            queued: self.queued.load(Relaxed),
        }
    }
}

/// The `capstan compute` command: serves one stage until standard input ends. Gives the exit code.
pub fn run() -> i32 {
    capstan_llama::init();
    let runtime = match tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            tracing::error!(%error, "the async runtime could not be started");
            return 1;
        }
    };
    let code = runtime.block_on(serve());
    // Standard input is read on a thread that cannot be interrupted; it must not hold the process back.
    runtime.shutdown_background();
    code
}

/// The `capstan compute --devices` command: prints what computes here, as JSON. Gives the exit code.
pub fn print_devices() -> i32 {
    capstan_llama::init();
    let devices: Vec<DeviceStatus> = capstan_llama::devices()
        .into_iter()
        .map(|d| DeviceStatus {
            name: d.name,
            description: d.description,
            kind: d.kind.as_str().to_owned(),
            memory_total_bytes: d.memory_total_bytes,
            memory_free_bytes: d.memory_free_bytes,
        })
        .collect();
    match serde_json::to_string(&devices) {
        Ok(json) => {
            println!("{json}");
            0
        }
        Err(error) => {
            tracing::error!(%error, "the devices could not be written as JSON");
            1
        }
    }
}

async fn serve() -> i32 {
    let (events, queue) = mpsc::channel(limits::EVENT_QUEUE);
    let mut writer = tokio::spawn(write_events(queue));
    let mut session = Session::new(events.clone());
    let mut stdin = tokio::io::stdin();
    if events.send(FromChild::Hello { version: CHILD_VERSION }).await.is_err() {
        return 1;
    }
    let code = loop {
        let message = tokio::select! {
            message = read_message(&mut stdin) => message,
            // Nobody listens any more.
            _ = &mut writer => break 1,
            () = session.thread_ended() => break 1,
        };
        match message {
            Ok(Some(ToChild::Shutdown) | None) => break 0,
            Ok(Some(message)) => session.handle(message).await,
            Err(error) => {
                tracing::error!(%error, "the daemon sent something that is no message");
                break 1;
            }
        }
    };
    session.stop().await;
    drop(session);
    drop(events);
    // What was still to be said (a `Failed`, say) goes out first.
    tokio::time::timeout(STOP_GRACE, writer).await.ok();
    code
}

async fn write_events(mut queue: mpsc::Receiver<FromChild>) {
    let mut stdout = tokio::io::stdout();
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

struct Session {
    events: mpsc::Sender<FromChild>,
    counters: Arc<Counters>,
    loaded: Option<Loaded>,
    wiring: Option<JoinHandle<()>>,
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
            loaded: None,
            wiring: None,
            thread: None,
            live: HashMap::new(),
            ended,
            ended_tx,
            prompts_at_once: Arc::new(Semaphore::new(PROMPTS_AT_ONCE)),
        }
    }

    async fn thread_ended(&mut self) {
        match &mut self.thread {
            Some(thread) => {
                // Either way the compute thread is gone.
                thread.await.ok();
            }
            None => std::future::pending().await,
        }
    }

    async fn handle(&mut self, message: ToChild) {
        match message {
            ToChild::Load(spec) => {
                if let Err(reason) = self.load(*spec).await {
                    tracing::error!("{reason}");
                    self.send(FromChild::Failed { reason }).await;
                }
            }
            ToChild::Connect(wiring) => self.connect(wiring).await,
            ToChild::Submit { request, body } => self.submit(request, body).await,
            ToChild::Cancel { request } => {
                if let Some(cancelled) = self.live.get(&request) {
                    cancelled.store(true, Relaxed);
                }
                self.input(Input::Cancel { request }).await;
            }
            ToChild::Shutdown => {}
        }
    }

    async fn send(&self, event: FromChild) {
        // A closed queue means that the daemon is gone; the main loop notices by itself.
        self.events.send(event).await.ok();
    }

    async fn input(&self, input: Input) {
        if let Some(loaded) = &self.loaded {
            // A closed queue means that the compute thread has ended; the main loop notices by itself.
            loaded.wire.inputs.send(input).await.ok();
        }
    }

    async fn load(&mut self, spec: StageSpec) -> Result<(), String> {
        if self.thread.is_some() {
            return Err("a second stage cannot be loaded into the same process".into());
        }
        let transport = Arc::new(IrohTransport::bind(spec.bind).await.map_err(|e| e.to_string())?);
        let spec = Arc::new(spec);
        let (inputs, queue) = mpsc::channel(INPUT_QUEUE);
        let (ready_tx, ready) = oneshot::channel();
        let (ended_tx, ended) = oneshot::channel();
        let work = ComputeThread {
            spec: spec.clone(),
            inputs: queue,
            events: self.events.clone(),
            counters: self.counters.clone(),
            ended: self.ended_tx.clone(),
        };
        std::thread::Builder::new()
            .name("compute".into())
            .spawn(move || {
                work.run(ready_tx);
                ended_tx.send(()).ok();
            })
            .map_err(|e| format!("the compute thread could not be started: {e}"))?;
        let (info, prompts) = ready.await.map_err(|_| "the compute thread ended while it was loading".to_owned())??;
        let addr = transport.addr();
        let wire = Wire { transport, spec, inputs, events: self.events.clone() };
        self.loaded = Some(Loaded { wire, prompts });
        self.thread = Some(ended);
        self.send(FromChild::Loaded { addr, info }).await;
        tokio::spawn(report_stats(self.counters.clone(), self.events.clone()));
        Ok(())
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
            let made = tokio::task::spawn_blocking(move || {
                let tokens = prompts.tokens(&body);
                (tokens, body)
            });
            let outcome = match made.await {
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
        if let (Some(loaded), Some(thread)) = (&self.loaded, self.thread.take()) {
            loaded.wire.inputs.try_send(Input::Stop).ok();
            if tokio::time::timeout(STOP_GRACE, thread).await.is_err() {
                tracing::warn!("the compute thread did not end in time; the process ends without it");
            }
        }
    }
}

async fn report_stats(counters: Arc<Counters>, events: mpsc::Sender<FromChild>) {
    let mut last = ChildStats::default();
    let mut tick = tokio::time::interval(Duration::from_secs(1));
    loop {
        tick.tick().await;
        let now = counters.snapshot();
        if now != last && events.send(FromChild::Stats(now.clone())).await.is_err() {
            return;
        }
        last = now;
    }
}

type Ready = Result<(StageInfo, Option<Arc<PromptMaker>>), String>;

struct ComputeThread {
    spec: Arc<StageSpec>,
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
        if self.spec.stage + 1 == self.spec.stages {
            match Driver::new(stage, &self.spec, self.events, self.counters, self.ended) {
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
            middle::run(&mut stage, &mut self.inputs, &self.events, &self.counters);
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
