//! The pipeline in virtual time: the same engine as in a driver, stages and links that take as long as they are told.
//!
//! ```text
//!            ┌───────────────── link S-1 ─────────────────┐
//!            ▼                                            │
//!        stage 0 ─ link 0 ─▶ stage 1 ─ … ─▶ stage S-1 + driver ◀─ requests
//! ```
//! One thread computes on each stage; the last stage's also plans, samples and sends, as the real one does. Whatever
//! happens next is the event with the least time, and of equal ones the one that was foreseen first, so a seed and a
//! setup decide a run to the last bit.
mod driver;

use std::collections::{BTreeMap, VecDeque};

use capstan_engine::{Engine, EngineConfig, FakeModel, FakeStage, GuessWanted};
use capstan_proto::RequestId;
use capstan_proto::data::MicroBatch;

use crate::check::Checker;
use crate::cost::{Ns, Profile};
use crate::link::Link;
use crate::log::{Request, RequestLog, StepLog};
use crate::station::{Clock, Frame, Station};
use crate::text::alone;

/// What is simulated.
#[derive(Clone, Debug)]
pub struct Setup {
    /// The scheduler's settings.
    pub config: EngineConfig,
    /// The machines.
    pub profile: Profile,
    /// Tokens of the vocabulary.
    pub n_vocab: usize,
    /// Decides how times stray and where drafts are wrong.
    pub seed: u64,
    /// How often the draft model guesses right, where the driver's cost names one.
    pub draft_right: f64,
    /// Whether to write down every event.
    pub trace: bool,
    /// Changes what each stage is given: to prove that mistakes are found.
    pub tamper: Option<Tamper>,
}

/// Changes a micro-batch before the stage of this number computes it.
pub type Tamper = fn(usize, &mut MicroBatch);

impl Setup {
    /// The usual settings around these machines.
    pub fn new(config: EngineConfig, profile: Profile, seed: u64) -> Self {
        Self { config, profile, n_vocab: 512, seed, draft_right: 0.0, trace: false, tamper: None }
    }
}

/// A rule was broken.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("at {} µs: {what}", at_ns / 1000)]
pub struct Failure {
    /// When.
    pub at_ns: Ns,
    /// How.
    pub what: String,
}

#[derive(Debug)]
enum Event {
    Submit(RequestId),
    Cancel(RequestId),
    /// The last byte left.
    Sent(usize),
    /// The last byte of a micro-batch arrived.
    Arrived(usize, Box<Frame>),
    /// Steps are named that need not be computed.
    Notice(usize, Vec<u64>),
    /// A stage, not the last, has computed what it had.
    Computed(usize),
    /// The driver's thread is done with what it did.
    Driver,
}

/// What the driver's thread is doing.
#[derive(Debug)]
enum Doing {
    Nothing,
    Sending(Frame),
    /// Computing and then sampling, which takes so long.
    Completing {
        frame: Frame,
        logits: Vec<f32>,
        sampling_ns: Ns,
    },
    Drafting(GuessWanted, i32),
    /// Sending, with no room on the link.
    Blocked(Frame),
}

enum Input {
    Submit(RequestId),
    Cancel(RequestId),
    Batch(Frame),
}

/// Everything.
pub struct World {
    setup: Setup,
    clock: Clock,
    model: FakeModel,
    now: Ns,
    /// By time, and then by how many were foreseen before.
    events: BTreeMap<(Ns, u64), Event>,
    foreseen: u64,
    engine: Engine,
    checker: Checker,
    stations: Vec<Station>,
    links: Vec<Link>,
    doing: Doing,
    inbox: VecDeque<Input>,
    /// Indexed by their ids.
    requests: Vec<RequestLog>,
    steps: Vec<StepLog>,
    trace: Vec<String>,
}

impl World {
    /// A pipeline in a fresh epoch.
    pub fn new(mut setup: Setup) -> Result<Self, Failure> {
        setup.config.draft = setup.profile.driver.draft_us > 0.0;
        let failed = |what: String| Failure { at_ns: 0, what };
        let stages = setup.config.stages;
        if setup.profile.stages.len() != usize::from(stages) || setup.profile.links.len() != usize::from(stages) {
            return Err(failed(format!("{stages} stages are wanted, the profile has {}", setup.profile.stages.len())));
        }
        let slots = setup.config.slots + setup.config.spares;
        let model = FakeModel { layers: u32::from(stages), width: 4, n_vocab: setup.n_vocab, slots };
        let engine = Engine::new(setup.config.clone()).map_err(|e| failed(e.to_string()))?;
        Ok(Self {
            clock: Clock { profile: setup.profile.clone(), seed: setup.seed, tamper: setup.tamper },
            model,
            now: 0,
            events: BTreeMap::new(),
            foreseen: 0,
            engine,
            checker: Checker::new(&setup.config, &setup.profile),
            stations: FakeStage::pipeline(model, stages).into_iter().map(|s| Station::new(s, slots)).collect(),
            links: setup.profile.links.iter().map(|l| Link::new(*l)).collect(),
            doing: Doing::Nothing,
            inbox: VecDeque::new(),
            requests: Vec::new(),
            steps: Vec::new(),
            trace: Vec::new(),
            setup,
        })
    }

    /// Lets a client send a request at this time, which must not have passed.
    pub fn submit_at(&mut self, at: Ns, request: Request) -> RequestId {
        let id = RequestId(self.requests.len() as u64);
        let ctx = self.setup.config.ctx;
        let wanted = alone(self.model, &request.prompt, request.max_tokens, ctx, &request.text);
        self.requests.push(RequestLog::new(request, wanted));
        self.foresee(at.max(self.now), Event::Submit(id));
        id
    }

    /// Lets a client give a request up at this time.
    pub fn cancel_at(&mut self, at: Ns, id: RequestId) {
        self.foresee(at.max(self.now), Event::Cancel(id));
    }

    /// Runs until nothing happens any more, and checks that nothing is left.
    pub fn run(&mut self) -> Result<(), Failure> {
        self.run_while(|_| true)?;
        self.check_end().map_err(|what| self.failure(what))
    }

    /// Runs until this holds, or nothing happens any more.
    pub fn run_until(&mut self, holds: impl Fn(&Self) -> bool) -> Result<(), Failure> {
        self.run_while(|world| !holds(world))
    }

    fn run_while(&mut self, go_on: impl Fn(&Self) -> bool) -> Result<(), Failure> {
        self.drive().map_err(|what| self.failure(what))?;
        while go_on(self) {
            let Some(((at, _), event)) = self.events.pop_first() else { break };
            self.now = at;
            self.happen(event).map_err(|what| self.failure(what))?;
        }
        Ok(())
    }

    /// Now.
    pub fn now(&self) -> Ns {
        self.now
    }

    /// What became of the requests, by id.
    pub fn requests(&self) -> &[RequestLog] {
        &self.requests
    }

    /// Every micro-batch that came back.
    pub fn steps(&self) -> &[StepLog] {
        &self.steps
    }

    /// The engine.
    pub fn engine(&self) -> &Engine {
        &self.engine
    }

    /// Every event, where the setup asked for it.
    pub fn trace(&self) -> &[String] {
        &self.trace
    }

    fn failure(&self, what: String) -> Failure {
        Failure { at_ns: self.now, what }
    }

    fn note(&mut self, line: impl FnOnce() -> String) {
        if self.setup.trace {
            self.trace.push(format!("{:>10} µs  {}", self.now / 1000, line()));
        }
    }

    fn foresee(&mut self, at: Ns, event: Event) {
        self.foreseen += 1;
        self.events.insert((at, self.foreseen), event);
    }

    fn happen(&mut self, event: Event) -> Result<(), String> {
        match event {
            Event::Submit(id) => {
                if let Some(log) = self.requests.get_mut(id.0 as usize) {
                    log.arrived_ns = self.now;
                }
                self.inbox.push_back(Input::Submit(id));
                self.drive()
            }
            Event::Cancel(id) => {
                self.inbox.push_back(Input::Cancel(id));
                self.drive()
            }
            Event::Sent(link) => {
                self.links[link].sent();
                self.pump(link)
            }
            Event::Arrived(link, frame) => {
                let stage = (link + 1) % self.links.len();
                self.stations[stage].unread.push_back(*frame);
                self.read(stage)
            }
            Event::Notice(link, steps) => {
                self.noticed((link + 1) % self.links.len(), steps);
                Ok(())
            }
            Event::Computed(stage) => self.computed(stage),
            Event::Driver => self.driver_done(),
        }
    }

    /// Lets a link send what it can, and lets whoever waited for room go on.
    fn pump(&mut self, link: usize) -> Result<(), String> {
        if let Some((frame, sending)) = self.links[link].begin(&self.clock.profile) {
            let arrival = self.now + sending + self.links[link].latency_ns();
            self.foresee(self.now + sending, Event::Sent(link));
            self.foresee(arrival, Event::Arrived(link, Box::new(frame)));
        }
        if !self.links[link].has_room() {
            return Ok(());
        }
        if link + 1 < self.stations.len() {
            let station = &mut self.stations[link];
            if station.blocked
                && let Some(frame) = station.current.take()
            {
                station.blocked = false;
                self.links[link].push(frame);
                self.pump(link)?;
                self.start(link)?;
            }
        } else if let Doing::Blocked(_) = self.doing {
            let Doing::Blocked(frame) = std::mem::replace(&mut self.doing, Doing::Nothing) else { return Ok(()) };
            self.links[link].push(frame);
            self.pump(link)?;
            self.drive()?;
        }
        Ok(())
    }

    /// A stage's reading task hears of steps that need not be computed, and hands the notice on, but not to the driver,
    /// which knows what it said.
    fn noticed(&mut self, stage: usize, steps: Vec<u64>) {
        if stage + 1 == self.stations.len() {
            return;
        }
        self.note(|| format!("stage {stage} hears that {steps:?} need not be computed"));
        self.stations[stage].marked.extend(steps.iter().copied());
        self.send_notice(stage, steps);
    }

    fn send_notice(&mut self, link: usize, steps: Vec<u64>) {
        self.foresee(self.now + self.links[link].latency_ns(), Event::Notice(link, steps));
    }

    /// Lets a stage's reading task take what there are permits for.
    fn read(&mut self, stage: usize) -> Result<(), String> {
        let before = (stage + self.links.len() - 1) % self.links.len();
        let read = self.stations[stage].read();
        if read.is_empty() {
            return Ok(());
        }
        for frame in read {
            self.links[before].was_read(&frame, &self.clock.profile);
            if stage + 1 == self.stations.len() {
                self.inbox.push_back(Input::Batch(frame));
            } else {
                self.stations[stage].waiting.push_back(frame);
            }
        }
        self.pump(before)?;
        self.start(stage)
    }

    /// Lets a stage that has nothing to do begin with what waits.
    fn start(&mut self, stage: usize) -> Result<(), String> {
        if stage + 1 == self.stations.len() {
            return self.drive();
        }
        let crowded = self.is_crowded();
        let station = &mut self.stations[stage];
        if station.current.is_some() {
            return Ok(());
        }
        let Some(mut frame) = station.waiting.pop_front() else { return Ok(()) };
        let (time, _) = station.compute(&mut frame, stage, (false, crowded), &self.clock)?;
        let (step, rows) = (frame.batch.step, frame.batch.rows.len());
        station.current = Some(frame);
        self.note(|| format!("stage {stage} computes step {step}, {rows} rows, {} µs", time / 1000));
        self.foresee(self.now + time, Event::Computed(stage));
        Ok(())
    }

    /// Whether stages work at the same time, as they do when more than one micro-batch is under way.
    fn is_crowded(&self) -> bool {
        self.engine.counters().in_flight > 1
    }

    fn computed(&mut self, stage: usize) -> Result<(), String> {
        let station = &mut self.stations[stage];
        station.permits -= 1;
        if self.links[stage].has_room() {
            if let Some(frame) = station.current.take() {
                self.links[stage].push(frame);
            }
            self.pump(stage)?;
        } else {
            station.blocked = true;
        }
        self.read(stage)?;
        self.start(stage)
    }

    fn check_end(&mut self) -> Result<(), String> {
        if !matches!(self.doing, Doing::Nothing) || !self.inbox.is_empty() {
            return Err("the driver is stuck".into());
        }
        for (i, link) in self.links.iter().enumerate() {
            if !link.is_idle() || self.stations[i].current.is_some() || !self.stations[i].waiting.is_empty() {
                return Err(format!("micro-batches are stuck at stage {i} or its link"));
            }
        }
        self.engine.check_invariants().map_err(|e| e.to_string())?;
        self.checker.idle(&self.engine, &self.stations)?;
        match self.requests.iter().position(|r| r.end.is_none() && !r.refused) {
            Some(i) => Err(format!("request {i} never ended")),
            None => Ok(()),
        }
    }
}
