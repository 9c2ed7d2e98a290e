//! Two stages that hash, on threads of their own, and a test that plays the driver, over links in memory.
use std::net::{IpAddr, Ipv4Addr};
use std::path::Path;
use std::sync::{Condvar, Mutex};

use async_trait::async_trait;
use capstan_engine::{FakeModel, FakeStage, Stage, StageError, StageOutput};
use capstan_proto::child::{PeerAddr, WindowIo};
use capstan_proto::codec::PREFIX;
use capstan_proto::data::{KvOp, MicroBatch, Payload, Row};
use capstan_proto::{DeploymentId, LayerRange};

use super::*;
use crate::link::{Incoming, Outgoing};
use crate::middle;
use crate::snapshots::{Keeps, Snapshots};

const STAGES: usize = 3;
const DRIVER: usize = STAGES - 1;
const EPOCH: Epoch = Epoch(4);

/// A link's ends that nobody has taken yet.
struct Ends {
    sending: Option<[mpsc::Sender<Bytes>; 2]>,
    receiving: Option<[mpsc::Receiver<Bytes>; 2]>,
}

/// The links of a ring: the one at index `i` leads from stage `i` to the next.
struct Hub {
    links: Mutex<Vec<Ends>>,
    /// Grows when a stage asks for the next notice, so when it has dealt with the one before.
    asked: Vec<Semaphore>,
}

impl Hub {
    fn new() -> Arc<Self> {
        let link = |_| {
            let ((frames, frames_end), (notices, notices_end)) = (mpsc::channel(64), mpsc::channel(64));
            Ends { sending: Some([frames, notices]), receiving: Some([frames_end, notices_end]) }
        };
        let asked = (0..STAGES).map(|_| Semaphore::new(0)).collect();
        Arc::new(Self { links: Mutex::new((0..STAGES).map(link).collect()), asked })
    }
}

struct Memory {
    hub: Arc<Hub>,
    stage: usize,
}

struct Sends(mpsc::Sender<Bytes>);

struct Receives {
    lane: mpsc::Receiver<Bytes>,
    asked: Option<(Arc<Hub>, usize)>,
}

#[async_trait]
impl LaneSender for Sends {
    async fn send(&mut self, frame: Bytes) -> Result<(), LinkError> {
        self.0.send(frame).await.map_err(|_| LinkError::Closed)
    }
}

#[async_trait]
impl LaneReceiver for Receives {
    async fn recv(&mut self) -> Result<Vec<u8>, LinkError> {
        if let Some((hub, stage)) = &self.asked {
            hub.asked[*stage].add_permits(1);
        }
        self.lane.recv().await.map(|frame| frame[PREFIX..].to_vec()).ok_or(LinkError::Closed)
    }
}

#[async_trait]
impl Transport for Memory {
    fn addr(&self) -> PeerAddr {
        peer()
    }

    async fn accept(&self, _: [u8; 32], _: DataHello) -> Result<Incoming, LinkError> {
        let before = (self.stage + STAGES - 1) % STAGES;
        let [frames, notices] = self.hub.links.lock().unwrap()[before].receiving.take().ok_or(LinkError::Closed)?;
        let asked = Some((self.hub.clone(), self.stage));
        Ok(Incoming {
            frames: Box::new(Receives { lane: frames, asked: None }),
            notices: Box::new(Receives { lane: notices, asked }),
        })
    }

    async fn dial(&self, _: &PeerAddr, _: &DataHello) -> Result<Outgoing, LinkError> {
        let [frames, notices] = self.hub.links.lock().unwrap()[self.stage].sending.take().ok_or(LinkError::Closed)?;
        Ok(Outgoing { frames: Box::new(Sends(frames)), notices: Box::new(Sends(notices)) })
    }
}

fn peer() -> PeerAddr {
    PeerAddr { key: [0; 32], addrs: Vec::new() }
}

/// Holds a stage before a step until it is opened.
#[derive(Default)]
struct Gate {
    open_below: Mutex<u64>,
    moved: Condvar,
}

impl Gate {
    fn open_below(&self, step: u64) {
        *self.open_below.lock().unwrap() = step;
        self.moved.notify_all();
    }
}

struct Gated {
    inside: FakeStage,
    gate: Arc<Gate>,
}

impl Stage for Gated {
    fn forward(&mut self, batch: &MicroBatch) -> Result<StageOutput, StageError> {
        let mut open_below = self.gate.open_below.lock().unwrap();
        while batch.step >= *open_below {
            open_below = self.gate.moved.wait(open_below).unwrap();
        }
        drop(open_below);
        self.inside.forward(batch)
    }

    fn reset(&mut self, epoch: Epoch) -> Result<(), StageError> {
        self.inside.reset(epoch)
    }
}

/// Nothing is saved here.
impl Keeps for Gated {
    fn snapshot_bytes(&mut self, _: u32) -> Result<u64, String> {
        Err("it is not asked for".into())
    }

    fn save(&mut self, _: u32, _: &Path) -> Result<(u64, u32), String> {
        Err("it is not asked for".into())
    }

    fn restore(&mut self, _: u32, _: &Path, _: u32) -> Result<(), String> {
        Err("it is not asked for".into())
    }
}

fn model() -> FakeModel {
    FakeModel::small()
}

fn spec(stage: usize) -> StageSpec {
    StageSpec {
        deployment: DeploymentId(1),
        model_name: "fake".into(),
        shard: "fake.gguf".into(),
        layers: LayerRange::new(0, 2).unwrap(),
        stage: stage as u16,
        stages: STAGES as u16,
        io: WindowIo { capture: None, hidden_width: 4, embedding_scale: 1.0 },
        ctx: 64,
        slots: 8,
        ubatch: 16,
        decode_batch: 8,
        scheduling: Default::default(),
        threads: None,
        gpu_layers: 0,
        bind: IpAddr::V4(Ipv4Addr::LOCALHOST),
        sparse: false,
    }
}

/// Stages 0 and 1 at work, and the driver's ends of the ring.
struct Ring {
    hub: Arc<Hub>,
    gates: Vec<Arc<Gate>>,
    outgoing: Outgoing,
    incoming: Incoming,
    counters: Vec<Arc<Counters>>,
    events: mpsc::Receiver<FromChild>,
    threads: Vec<std::thread::JoinHandle<()>>,
}

impl Ring {
    async fn start() -> Self {
        let hub = Hub::new();
        let (events, mut seen) = mpsc::channel(64);
        let (mut gates, mut all_counters, mut threads) = (Vec::new(), Vec::new(), Vec::new());
        for (stage, inside) in FakeStage::pipeline(model(), STAGES as u16).into_iter().take(DRIVER).enumerate() {
            let (inputs, mut queue) = mpsc::channel(16);
            let (counters, gate) = (Arc::new(Counters::default()), Arc::new(Gate::default()));
            gate.open_below(u64::MAX);
            let wire = Wire {
                transport: Arc::new(Memory { hub: hub.clone(), stage }),
                spec: Arc::new(spec(stage)),
                inputs,
                events: events.clone(),
                counters: counters.clone(),
            };
            let mut stage = Gated { inside, gate: gate.clone() };
            let (own_events, own_counters) = (events.clone(), counters.clone());
            threads.push(std::thread::spawn(move || {
                let mut snapshots = Snapshots::open(None, STAGES as u16);
                middle::run(&mut stage, &mut snapshots, &mut queue, &own_events, &own_counters);
            }));
            tokio::spawn(wire.serve(Wiring { epoch: EPOCH, prev: Some(peer()), next: Some(peer()) }));
            gates.push(gate);
            all_counters.push(counters);
        }
        let own = Memory { hub: hub.clone(), stage: DRIVER };
        let hello = DataHello { version: DATA_VERSION, deployment: DeploymentId(1), epoch: EPOCH, from_stage: 2 };
        let outgoing = own.dial(&peer(), &hello).await.unwrap();
        let incoming = own.accept([0; 32], hello).await.unwrap();
        for _ in 0..DRIVER {
            assert_eq!(seen.recv().await, Some(FromChild::Connected { epoch: EPOCH }));
        }
        Self { hub, gates, outgoing, incoming, counters: all_counters, events: seen, threads }
    }

    async fn send(&mut self, batch: &MicroBatch) {
        self.outgoing.frames.send(batch.encode(&[]).unwrap().into()).await.unwrap();
    }

    async fn notice(&mut self, epoch: Epoch, steps: Vec<u64>) {
        let frame = DropNotice { epoch, steps }.encode().unwrap();
        self.outgoing.notices.send(frame.into()).await.unwrap();
    }

    /// Waits until every stage has dealt with its first notice.
    async fn notice_is_read(&self) {
        for asked in &self.hub.asked[..DRIVER] {
            asked.acquire_many(2).await.unwrap().forget();
        }
    }

    async fn back(&mut self) -> BatchFrame {
        BatchFrame::decode(&self.incoming.frames.recv().await.unwrap()).unwrap()
    }

    /// Takes the driver's ends away, and waits for the threads.
    async fn end(self) {
        drop((self.outgoing, self.incoming));
        for thread in self.threads {
            tokio::task::spawn_blocking(|| thread.join().unwrap()).await.unwrap();
        }
    }
}

fn batch(step: u64, ops: Vec<KvOp>, pos: u32, tokens: &[i32]) -> MicroBatch {
    let rows = (pos..).take(tokens.len()).map(|pos| Row { slot: 0, pos, output: true }).collect();
    let hidden = tokens.iter().flat_map(|t| model().embedding(*t)).collect();
    MicroBatch { epoch: EPOCH, step, ops, rows, payload: Payload::Hidden(hidden) }
}

/// What the first two stages make of these micro-batches without anything in between.
fn plainly(batches: &[MicroBatch]) -> Vec<MicroBatch> {
    let mut stages = FakeStage::pipeline(model(), STAGES as u16);
    stages.iter_mut().for_each(|s| s.reset(EPOCH).unwrap());
    let through = |batch: &MicroBatch| {
        stages[..DRIVER].iter_mut().fold(batch.clone(), |batch, stage| match stage.forward(&batch).unwrap() {
            StageOutput::Hidden(hidden) => MicroBatch { payload: Payload::Hidden(hidden), ..batch },
            StageOutput::Logits(_) => panic!("a middle stage gave logits"),
        })
    };
    batches.iter().map(through).collect()
}

/// Holds one stage while two guesses and the notice that drops them are on their way.
async fn drop_before(held: usize) {
    let mut ring = Ring::start().await;
    let (prompt, row) = (batch(0, vec![], 0, &[1, 2, 3]), batch(1, vec![], 3, &[4]));
    let guesses = [batch(2, vec![KvOp::Clear { slot: 5 }], 4, &[9]), batch(3, vec![], 5, &[8])];
    let next = batch(4, vec![KvOp::Trim { slot: 0, from: 4 }], 4, &[5]);

    ring.gates[held].open_below(1);
    for b in [&prompt, &row, &guesses[0], &guesses[1]] {
        ring.send(b).await;
    }
    // The notice overtakes whatever waits at the stage that is held.
    ring.notice(EPOCH, vec![2, 3]).await;
    ring.notice_is_read().await;
    ring.gates[held].open_below(u64::MAX);
    ring.send(&next).await;

    let want = plainly(&[prompt, row, MicroBatch { step: 2, ..next.clone() }]);
    let got = [ring.back().await, ring.back().await, ring.back().await, ring.back().await, ring.back().await];
    assert_eq!((&got[0].batch, &got[1].batch), (&want[0], &want[1]));
    for (got, guess) in got[2..4].iter().zip(&guesses) {
        assert_eq!(got.batch, guess.clone().without_rows(), "its operations go on");
        assert_eq!(got.stage_us.len(), DRIVER);
        assert_eq!(got.stage_us[held], 0, "it was not computed here");
    }
    assert_eq!(got[4].batch, MicroBatch { step: 4, ..want[2].clone() }, "nothing is left of the guesses");
    assert!(ring.counters.iter().all(|c| c.snapshot().micro_batches == 5));
    assert_eq!(ring.counters[held].snapshot().rows, 5);
    ring.end().await;
}

#[tokio::test]
async fn dropped_steps_go_on_without_rows_and_leave_no_trace() {
    drop_before(0).await;
    drop_before(1).await;
}

#[tokio::test]
async fn what_is_sent_is_counted() {
    let mut ring = Ring::start().await;
    let prompt = batch(0, vec![], 0, &[1, 2, 3]);
    ring.send(&prompt).await;
    let bytes = ring.back().await.batch.encode(&[1, 1]).unwrap().len() as u64;
    let sent = ring.counters[0].clone();
    ring.end().await;
    let sent = sent.snapshot().bytes_sent;
    assert!(sent.abs_diff(bytes) < 16, "{sent} of {bytes}");
}

#[tokio::test]
async fn notices_that_break_a_rule_end_the_epoch() {
    for (epoch, steps, says) in [
        (EPOCH.next(), vec![vec![1]], "a drop notice of epoch 5"),
        (EPOCH, vec![(0..limits::IN_FLIGHT_MAX as u64).collect(), vec![u64::MAX]], "more steps were dropped"),
    ] {
        let mut ring = Ring::start().await;
        for steps in steps {
            ring.notice(epoch, steps).await;
        }
        let Some(FromChild::Lost { epoch, reason }) = ring.events.recv().await else { panic!("the epoch goes on") };
        assert_eq!(epoch, EPOCH);
        assert!(reason.contains(says), "{reason}");
        ring.end().await;
    }
}
