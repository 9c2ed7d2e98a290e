//! A pipeline in one thread: an engine, a ring of fake stages with queues between them, and a driver that is greedy.
//! Who acts next is drawn from a seed, so every delay that a network could cause is tried, and every run replays.
use std::collections::{BTreeMap, BTreeSet, VecDeque};

use capstan_engine::{
    BatchKind, Completed, Engine, EngineConfig, FakeModel, FakeSnapshot, FakeStage, FinishedBy, PlannedBatch, Saved,
    Stage, StageOutput, TokenOutcome,
};
use capstan_proto::data::{KvOp, MicroBatch, Payload};
use capstan_proto::{Epoch, RequestId};

/// The token that ends an answer.
pub const END: i32 = 0;

/// How a request went.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum End {
    /// The model said [`END`].
    Model,
    Length(FinishedBy),
    Cancelled,
    Lost,
}

pub fn greedy(logits: &[f32]) -> i32 {
    let best = logits.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1));
    best.map_or(END, |(i, _)| i as i32)
}

/// The answer of one request alone on a whole model: its tokens and how it ended. Written without the engine.
pub fn alone(model: FakeModel, prompt: &[i32], max_tokens: Option<u32>, ctx: u32) -> (Vec<i32>, End) {
    let mut stage = FakeStage::pipeline(model, 1).remove(0);
    let mut answer = Vec::new();
    let mut fed = prompt.to_vec();
    let mut pos = 0;
    for step in 0.. {
        let count = fed.len() as u32;
        let rows = (pos..pos + count).map(|pos| capstan_proto::data::Row {
            slot: 0,
            pos,
            output: pos + 1 >= prompt.len() as u32,
        });
        let rows = rows.collect();
        let batch = MicroBatch { epoch: Epoch(0), step, ops: vec![], rows, payload: Payload::Tokens(fed) };
        let Ok(StageOutput::Logits(logits)) = stage.forward(&batch) else { panic!("the whole model gives logits") };
        pos += count;
        let token = greedy(&logits);
        if token == END {
            return (answer, End::Model);
        }
        answer.push(token);
        if max_tokens == Some(answer.len() as u32) {
            return (answer, End::Length(FinishedBy::MaxTokens));
        }
        if prompt.len() + answer.len() == ctx as usize {
            return (answer, End::Length(FinishedBy::Context));
        }
        fed = vec![token];
    }
    unreachable!("a context ends")
}

/// A small generator of our own, so that a seed means the same on every machine.
pub struct Dice(pub u64);

impl Dice {
    pub fn below(&mut self, n: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut x = self.0;
        x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        ((x ^ (x >> 31)) % n.max(1) as u64) as usize
    }
}

/// What the checks on fairness need to know of a request.
#[derive(Default)]
struct Watch {
    prompt_rows_left: usize,
    /// How many micro-batches had been planned when its token became ready.
    ready_at: Option<u64>,
}

pub struct Ring {
    pub engine: Engine,
    pub model: FakeModel,
    pub answers: BTreeMap<RequestId, Vec<i32>>,
    pub ended: BTreeMap<RequestId, End>,
    /// Requests in the order they got a slot.
    pub started: Vec<RequestId>,
    /// Every micro-batch of this epoch, as planned.
    pub planned: Vec<PlannedBatch>,
    stages: Vec<FakeStage>,
    /// `links[i]` leads to stage `i`; the last one back to the driver.
    links: Vec<VecDeque<(MicroBatch, Option<Vec<f32>>)>>,
    epoch: Epoch,
    watched: BTreeMap<RequestId, Watch>,
    by_slot: BTreeMap<u32, RequestId>,
    decodes_in_a_row: u32,
    plans: u64,
    /// What the draft model knows, and how many of a hundred guesses it gets right; none has no draft model.
    pub draft: Option<usize>,
    /// What a row takes on every stage; none lets every time be another.
    pub row_us: Option<u32>,
    known: BTreeMap<RequestId, (usize, Vec<i32>)>,
    /// Guesses that are wrong: a stage may compute them or not, as it comes.
    dropped: BTreeSet<u64>,
    dice: Dice,
    /// Tokens of each prompt.
    prompts: BTreeMap<RequestId, usize>,
    /// Of each stage, by mark, if it keeps snapshots.
    snapshots: Option<Vec<BTreeMap<u64, FakeSnapshot>>>,
    /// What the driver has saved.
    saved: Vec<Saved>,
    /// Tokens that were in the caches when requests got their slots.
    pub cached: BTreeMap<RequestId, u32>,
}

impl Ring {
    pub fn new(config: EngineConfig, model: FakeModel) -> Self {
        let model = FakeModel { slots: config.slots + config.spares, ..model };
        let stages = FakeStage::pipeline(model, config.stages);
        assert_eq!(stages.len(), usize::from(config.stages));
        Self {
            links: (0..=stages.len()).map(|_| VecDeque::new()).collect(),
            engine: Engine::new(config).unwrap(),
            model,
            answers: BTreeMap::new(),
            ended: BTreeMap::new(),
            started: Vec::new(),
            planned: Vec::new(),
            stages,
            epoch: Epoch(0),
            watched: BTreeMap::new(),
            by_slot: BTreeMap::new(),
            decodes_in_a_row: 0,
            plans: 0,
            draft: None,
            row_us: None,
            known: BTreeMap::new(),
            dropped: BTreeSet::new(),
            dice: Dice(7),
            prompts: BTreeMap::new(),
            snapshots: None,
            saved: Vec::new(),
            cached: BTreeMap::new(),
        }
    }

    /// From now on stages keep snapshots.
    pub fn keep_snapshots(&mut self) {
        self.snapshots = Some(vec![BTreeMap::new(); self.stages.len()]);
        self.engine.handle_epoch(true, 0, Vec::new());
    }

    /// Stage `i` has lost about so many of a hundred of its snapshots.
    pub fn forget(&mut self, i: usize, percent: usize) {
        let Some(kept) = self.snapshots.as_mut().and_then(|all| all.get_mut(i)) else { return };
        let dice = &mut self.dice;
        kept.retain(|_, _| dice.below(100) >= percent);
    }

    pub fn submit(&mut self, id: u64, prompt: Vec<i32>, max_tokens: Option<u32>) {
        self.resume(id, prompt, 0, max_tokens);
    }

    /// Of the prompt the last `answered` tokens were answered before.
    pub fn resume(&mut self, id: u64, prompt: Vec<i32>, answered: u32, max_tokens: Option<u32>) {
        let rows = prompt.len();
        self.prompts.insert(RequestId(id), rows);
        if self.draft.is_some() {
            let answer = alone(self.model, &prompt, max_tokens, self.engine.config().ctx).0;
            self.known.insert(RequestId(id), (rows, answer));
        }
        self.engine.handle_resume(RequestId(id), prompt, answered, max_tokens).unwrap();
        self.answers.insert(RequestId(id), Vec::new());
        self.watched.insert(RequestId(id), Watch { prompt_rows_left: rows, ready_at: None });
    }

    /// Gives a live request up.
    pub fn cancel(&mut self, id: RequestId) {
        let live = self.answers.contains_key(&id) && !self.ended.contains_key(&id);
        assert_eq!(self.engine.handle_cancel(id), live, "request {id}");
        if live {
            self.end(id, End::Cancelled);
        }
    }

    /// A stage dies, and the pipeline is wired again.
    pub fn lose(&mut self) {
        for id in self.engine.handle_lost() {
            self.end(id, End::Lost);
        }
        self.epoch = self.epoch.next();
        self.stages.iter_mut().for_each(|s| s.reset(self.epoch).unwrap());
        self.links.iter_mut().for_each(VecDeque::clear);
        let mark = self.epoch.0 << 32;
        self.engine.handle_epoch(self.snapshots.is_some(), mark, self.saved.clone());
        self.by_slot.clear();
        self.planned.clear();
        self.dropped.clear();
        self.decodes_in_a_row = 0;
    }

    /// Sends all that the engine gives, and checks it.
    pub fn poll(&mut self) {
        loop {
            let batch = self.engine.poll_micro_batch();
            while let Some(started) = self.engine.poll_started() {
                self.started.push(started.id);
                self.cached.insert(started.id, started.cached);
                self.by_slot.insert(started.slot, started.id);
                self.watched.get_mut(&started.id).unwrap().prompt_rows_left -= started.cached as usize;
            }
            self.dropped.extend(self.engine.poll_drop().into_iter().flatten());
            let Some(batch) = batch else { if self.draft_guess() { continue } else { break } };
            self.check_plan(&batch);
            self.planned.push(batch.clone());
            let payload = match self.stages.len() {
                1 => Payload::Tokens(batch.tokens.clone()),
                _ => Payload::Hidden(batch.tokens.iter().flat_map(|&t| self.model.embedding(t)).collect()),
            };
            self.links[0].push_back((batch.into_micro_batch(self.epoch, payload), None));
        }
        self.engine.check_invariants().unwrap();
    }

    /// The draft model guesses, rightly or not, if it may.
    fn draft_guess(&mut self) -> bool {
        let (Some(right), Some(wanted)) = (self.draft, self.engine.wants_guess()) else { return false };
        let (prompt, answer) = &self.known[&wanted.id];
        let next = answer.get(wanted.tokens.len() - prompt).copied().unwrap_or(END);
        let token = if self.dice.below(100) < right { next } else { self.dice.below(self.model.n_vocab) as i32 };
        self.engine.handle_guess(&wanted, token);
        true
    }

    /// The stages, and the driver as the last one, that have something to do.
    pub fn busy(&self) -> Vec<usize> {
        (0..self.links.len()).filter(|&i| !self.links[i].is_empty()).collect()
    }

    /// Lets stage `i`, or the driver, take one micro-batch.
    pub fn act(&mut self, i: usize) {
        let Some((mut batch, logits)) = self.links[i].pop_front() else { return };
        if i < self.stages.len() {
            let void = self.dropped.contains(&batch.step) && self.dice.below(3) > 0;
            if void {
                batch.rows.clear();
                batch.payload = match self.stages.len() {
                    1 => Payload::Tokens(vec![]),
                    _ => Payload::Hidden(vec![]),
                };
            }
            self.restore(i, &mut batch);
            let forwarded = self.stages[i].forward(&batch).unwrap();
            self.save(i, &batch);
            let logits = match forwarded {
                StageOutput::Hidden(hidden) => {
                    batch.payload = Payload::Hidden(hidden);
                    None
                }
                StageOutput::Logits(logits) => Some(logits),
            };
            self.links[i + 1].push_back((batch, logits));
            return;
        }
        let n_vocab = self.model.n_vocab;
        let logits = logits.unwrap();
        let void = self.engine.is_void(batch.step);
        assert_eq!(void, self.dropped.contains(&batch.step));
        let rows = batch.rows.len() as u32;
        let us: Vec<u32> =
            self.stages.iter().map(|_| self.row_us.map_or(1 + self.dice.below(1000) as u32, |us| us * rows)).collect();
        self.engine.handle_times(batch.step, &us, us.iter().sum());
        if self.engine.restores(batch.step) {
            let restored = batch.ops.iter().filter_map(|op| match op {
                KvOp::Restore { slot, .. } => Some(*slot),
                _ => None,
            });
            self.engine.handle_restored(&restored.collect::<Vec<_>>());
        }
        let Completed { outputs, output_rows, .. } = self.engine.handle_completed(batch.step).unwrap();
        assert!(void && output_rows == 0 && outputs.is_empty() || logits.len() == output_rows * n_vocab);
        for (id, index) in outputs {
            assert!(!self.ended.contains_key(&id), "request {id} ended, but an output of it came");
            let token = greedy(&logits[index * n_vocab..(index + 1) * n_vocab]);
            if token == END {
                assert!(self.engine.handle_finish(id));
                self.end(id, End::Model);
                continue;
            }
            self.answers.get_mut(&id).unwrap().push(token);
            match self.engine.handle_token(id, token) {
                TokenOutcome::Continue => {
                    let slot = *self.by_slot.iter().rfind(|(_, of)| **of == id).unwrap().0;
                    let sent = self.engine.held()[slot as usize].1.len();
                    let all = self.prompts[&id] + self.answers[&id].len();
                    // Otherwise it was guessed and is under way.
                    self.watched.get_mut(&id).unwrap().ready_at = (sent < all).then_some(self.plans);
                }
                TokenOutcome::Finished(by) => self.end(id, End::Length(by)),
                TokenOutcome::Ignored => panic!("the token of request {id} was ignored"),
            }
        }
        self.engine.check_invariants().unwrap();
    }

    /// What stage `i` does about snapshots before a micro-batch.
    fn restore(&mut self, i: usize, batch: &mut MicroBatch) {
        for op in &mut batch.ops {
            let KvOp::Restore { slot, mark } = *op else { continue };
            match self.snapshots.as_ref().unwrap()[i].get(&mark) {
                Some(snapshot) => self.stages[i].restore(slot, snapshot),
                None => *op = KvOp::Clear { slot },
            }
        }
    }

    /// And behind it; the last stage is the driver's own.
    fn save(&mut self, i: usize, batch: &MicroBatch) {
        for op in &batch.ops {
            let KvOp::Save { slot, mark } = *op else { continue };
            self.snapshots.as_mut().unwrap()[i].insert(mark, self.stages[i].save(slot));
            if i + 1 == self.stages.len() {
                let saved = self.planned[batch.step as usize].saved.clone().unwrap();
                assert_eq!((saved.slot, saved.mark), (slot, mark));
                self.saved.push(saved);
            }
        }
    }

    /// Lets everybody act in a random order until nothing is left to do.
    pub fn drain(&mut self, dice: &mut Dice) {
        loop {
            self.poll();
            let busy = self.busy();
            if busy.is_empty() {
                break;
            }
            self.act(busy[dice.below(busy.len())]);
        }
    }

    fn end(&mut self, id: RequestId, end: End) {
        self.watched.remove(&id);
        assert_eq!(self.ended.insert(id, end), None, "request {id} ended twice");
    }

    /// Shape, share and fairness of a planned micro-batch.
    fn check_plan(&mut self, batch: &PlannedBatch) {
        let config = self.engine.config().clone();
        assert_eq!(batch.step, self.planned.len() as u64, "steps have no gaps");
        assert_eq!(batch.rows.len(), batch.tokens.len());
        assert!(batch.rows.len() <= config.chunk.max(config.slots) as usize);
        assert_eq!(batch.rows.is_empty(), batch.kind == BatchKind::Restore);
        let prompts_wait = self.by_slot.values().any(|id| self.watched.get(id).is_some_and(|w| w.prompt_rows_left > 0));
        match batch.kind {
            BatchKind::Prefill => {
                self.decodes_in_a_row = 0;
                let left = &mut self.watched.get_mut(&self.by_slot[&batch.rows[0].slot]).unwrap().prompt_rows_left;
                *left -= batch.rows.len();
                let (last, others) = batch.rows.split_last().unwrap();
                assert!(others.iter().all(|r| !r.output));
                assert_eq!(last.output, *left == 0, "only the prompt's last row has an output");
            }
            BatchKind::Decode => {
                assert!(batch.rows.len() <= config.decode_batch as usize);
                assert!(batch.rows.windows(2).all(|w| w[0].slot < w[1].slot), "one row a slot, slots ascend");
                assert!(batch.rows.iter().all(|r| r.output));
                self.decodes_in_a_row = if prompts_wait { self.decodes_in_a_row + 1 } else { 0 };
                // A chunk in 16 steps at the least, and each group has one micro-batch a step.
                assert!(self.decodes_in_a_row <= 17 * config.slots + 2, "a prompt starves");
                for row in &batch.rows {
                    self.watched.get_mut(&self.by_slot[&row.slot]).unwrap().ready_at = None;
                }
            }
            BatchKind::Guess => {
                assert!(!prompts_wait && config.speculation_depth > 0);
                assert!(matches!(batch.rows[..], [row] if row.output));
            }
            BatchKind::Measure => assert!(self.watched.is_empty()),
            BatchKind::Restore => assert_eq!(batch.step, 0, "first, or what is there would be overwritten"),
        }
        // Before its turn come at most all others, each alone, and chunks and guesses between them.
        let bound = 4 * u64::from(config.slots) + 2 * u64::from(config.in_flight_max);
        for (id, watch) in &self.watched {
            let waited = watch.ready_at.map_or(0, |at| self.plans - at);
            assert!(waited <= bound, "request {id} waited for {waited}");
        }
        self.plans += 1;
    }
}
