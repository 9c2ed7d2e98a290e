//! A stage in virtual time: its contents, the micro-batches that wait for it, and what it knows to be dropped.
use std::collections::{BTreeSet, VecDeque};
use std::sync::Arc;

use capstan_engine::{BatchKind, FakeStage, Stage, StageOutput};
use capstan_proto::data::{KvOp, MicroBatch, Payload};
use capstan_proto::limits;

use crate::cost::{Ns, Profile, Shape};
use crate::dice::{mix, unit};
use crate::world::Tamper;

/// A micro-batch on its way, with what the simulator must know of it.
#[derive(Clone, Debug)]
pub struct Frame {
    /// What travels.
    pub batch: MicroBatch,
    /// The tokens behind its rows, for the books.
    pub tokens: Arc<[i32]>,
    /// What it is for.
    pub kind: BatchKind,
    /// When the driver began to send it.
    pub sent_ns: Ns,
    /// What each stage so far took.
    pub spent_ns: Vec<Ns>,
}

impl Frame {
    /// What it asks of the next stage: rows of slots that follow each other are computed together, others one run after
    /// the other, as llama.cpp does where each sequence has a KV stream of its own.
    pub fn runs(&self) -> impl Iterator<Item = Shape> {
        let runs = self.batch.rows.chunk_by(|a, b| a.slot == b.slot || a.slot + 1 == b.slot);
        runs.map(Shape::of)
    }

    /// All of it.
    pub fn shape(&self) -> Shape {
        Shape::of(&self.batch.rows)
    }
}

/// Which tokens each slot holds: what the stage's contents are made of, kept apart from them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shadow(Vec<Vec<i32>>);

impl Shadow {
    fn apply(&mut self, op: KvOp) {
        match op {
            KvOp::Clear { slot } => self.0[slot as usize].clear(),
            KvOp::Trim { slot, from } => self.0[slot as usize].truncate(from as usize),
            KvOp::Copy { from, to } => self.0[to as usize] = self.0[from as usize].clone(),
            // No process is lost here.
            KvOp::Save { .. } | KvOp::Restore { .. } => {}
        }
    }

    /// Takes the rows in; llama.cpp wants every position to follow the one before it, and so do we.
    fn push(&mut self, frame: &Frame) -> Result<(), String> {
        for (row, token) in frame.batch.rows.iter().zip(frame.tokens.iter()) {
            let held = &mut self.0[row.slot as usize];
            if held.len() != row.pos as usize {
                return Err(format!("slot {} holds {} positions, but {} comes next", row.slot, held.len(), row.pos));
            }
            held.push(*token);
        }
        Ok(())
    }

    /// What a slot holds.
    pub fn slot(&self, slot: u32) -> &[i32] {
        self.0.get(slot as usize).map_or(&[], Vec::as_slice)
    }

    /// How many slots.
    pub fn len(&self) -> u32 {
        self.0.len() as u32
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// A stage's process: the compute thread's queue, and what the reading task noted.
#[derive(Debug)]
pub struct Station {
    stage: FakeStage,
    /// What its caches should hold.
    pub shadow: Shadow,
    /// Read from the link, with a permit each; the one being computed keeps its own.
    pub waiting: VecDeque<Frame>,
    /// Permits taken: those waiting and the one being computed.
    pub permits: usize,
    /// Arrived, but not read yet: they wait for a permit in the link's window.
    pub unread: VecDeque<Frame>,
    /// Being computed, or computed and waiting for room on the link.
    pub current: Option<Frame>,
    /// Whether the current one is done and only waits for room.
    pub blocked: bool,
    /// Steps that need not be computed.
    pub marked: BTreeSet<u64>,
}

impl Station {
    /// An empty stage.
    pub fn new(stage: FakeStage, slots: u32) -> Self {
        Self {
            stage,
            shadow: Shadow(vec![Vec::new(); slots as usize]),
            waiting: VecDeque::new(),
            permits: 0,
            unread: VecDeque::new(),
            current: None,
            blocked: false,
            marked: BTreeSet::new(),
        }
    }

    /// Reads what arrived, as far as there are permits; gives what was read.
    pub fn read(&mut self) -> Vec<Frame> {
        let mut read = Vec::new();
        while self.permits < limits::STAGE_QUEUE {
            let Some(frame) = self.unread.pop_front() else { break };
            self.permits += 1;
            read.push(frame);
        }
        read
    }

    /// Computes a micro-batch: gives the time it takes, and the logits of the last stage. `void` rows are not computed,
    /// nor are those that a notice named; operations always are applied. `crowded` says whether other stages work at the same time.
    pub fn compute(
        &mut self,
        frame: &mut Frame,
        i: usize,
        (void, crowded): (bool, bool),
        on: &Clock,
    ) -> Result<(Ns, Vec<f32>), String> {
        let step = frame.batch.step;
        if self.marked.remove(&step) || void {
            frame.batch.rows.clear();
            // The kind of payload stays; a whole model takes tokens.
            match &mut frame.batch.payload {
                Payload::Tokens(tokens) => tokens.clear(),
                Payload::Hidden(hidden) => hidden.clear(),
            }
        }
        if let Some(tamper) = on.tamper {
            tamper(i, &mut frame.batch);
        }
        // Steps that passed before their notice came.
        self.marked = self.marked.split_off(&step);
        frame.batch.ops.iter().for_each(|&op| self.shadow.apply(op));
        self.shadow.push(frame).map_err(|e| format!("stage {i}, step {step}: {e}"))?;
        let logits = match self.stage.forward(&frame.batch).map_err(|e| format!("stage {i}: {e}"))? {
            StageOutput::Hidden(hidden) => {
                frame.batch.payload = Payload::Hidden(hidden);
                Vec::new()
            }
            StageOutput::Logits(logits) => logits,
        };
        let shape = frame.shape();
        let ops = frame.batch.ops.len() as f64 * on.profile.stages[i].op_us;
        let stray = 2.0 * unit(mix(mix(on.seed, step), i as u64)) - 1.0;
        let cost = &on.profile.stages[i];
        let own = if shape.rows == 0 { cost.ns(shape) } else { frame.runs().map(|run| cost.ns(run)).sum::<Ns>() };
        let crowded = if crowded { on.profile.contention } else { 0.0 };
        let mistaken = 2.0 * unit(mix(mix(on.seed, 0x3EA5), u64::from(shape.rows))) - 1.0;
        let mistaken = if frame.kind == BatchKind::Measure { on.profile.mismeasured * mistaken } else { 0.0 };
        let time = own as f64 * (1.0 + on.profile.jitter * stray) * (1.0 + mistaken) * (1.0 + crowded) + ops * 1000.0;
        let time = time.round() as Ns;
        frame.spent_ns.push(if shape.rows > 0 { time } else { 0 });
        Ok((time, logits))
    }
}

/// What times depend on.
#[derive(Clone, Debug)]
pub struct Clock {
    /// The machines.
    pub profile: Profile,
    /// Decides how times stray.
    pub seed: u64,
    /// Changes what is computed, in tests.
    pub tamper: Option<Tamper>,
}
