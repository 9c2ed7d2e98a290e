//! What must hold in every run: nothing starves, is lost, doubled or out of order; slots are conserved.
//!
//! Fairness is checked as two bounds that any sane policy keeps. A sequence whose token is ready is served before others
//! got many tokens, and within the time that a few rounds of everybody take. A prompt that has a slot goes on after at
//! most a few decode micro-batches, and is not overtaken without end by prompts that came later.
use std::collections::{BTreeMap, BTreeSet, VecDeque};

use capstan_engine::{BatchKind, Engine, EngineConfig, PlannedBatch, Started};
use capstan_proto::RequestId;

use crate::cost::{Ns, Profile, Shape};
use crate::station::Station;

/// Tokens that one other sequence may get while a ready one waits, beyond the guesses it may have under way: one each
/// for the round under way, the next one, and a change of the dealing in between.
const TOKENS_AHEAD_MAX: u32 = 4;
/// Rounds of everybody, one sequence a micro-batch and the largest chunks between them, after which a ready sequence
/// must have had its turn.
const ROUNDS_MAX: u64 = 3;
/// Rounds of everybody, one sequence a micro-batch, after which a row of a prompt that waits must have gone along.
const ROUNDS_BESIDE_MAX: u32 = 17;

/// The books on one request that has a slot.
#[derive(Clone, Debug)]
struct Life {
    slot: u32,
    /// Requests that got a slot before it.
    order: u64,
    prompt: Vec<i32>,
    /// Positions planned or cached.
    planned: u32,
    answer: Vec<i32>,
    /// Guesses under way that may still be right: token and step, in order.
    guesses: VecDeque<(i32, u64)>,
    /// Since when its token, or its first chunk, waits.
    ready: Option<Ns>,
    /// The most tokens that another one got meanwhile.
    others: BTreeMap<RequestId, u32>,
    /// Rows of prompts that came later, planned while its own waited.
    overtaken_rows: u64,
}

impl Life {
    fn prefills(&self) -> bool {
        self.planned < self.prompt.len() as u32
    }
}

/// The books on all requests.
#[derive(Debug)]
pub struct Checker {
    config: EngineConfig,
    wait_max_ns: Ns,
    lives: BTreeMap<RequestId, Life>,
    starts: u64,
    last_started: Option<RequestId>,
    steps: u64,
    /// Decode micro-batches since a chunk was planned, while a prompt waited.
    decodes_in_a_row: u32,
    /// Steps of guesses that are known to be wrong, or whose request ended.
    void: BTreeSet<u64>,
}

impl Checker {
    /// Nothing has happened yet.
    pub fn new(config: &EngineConfig, profile: &Profile) -> Self {
        let (slots, in_flight) = (u64::from(config.slots), u64::from(config.in_flight_max));
        // Few under way at once follow each other only when one is back.
        let pace = |shape| profile.slowest_ns(shape).max(profile.through_ns(shape) / in_flight);
        let each = pace(Shape::decode(&[config.ctx]));
        let chunk = pace(Shape::chunk(config.ctx.saturating_sub(config.chunk), config.chunk, 1));
        let guess = each + crate::cost::ns(profile.driver.draft_us);
        let round = slots * each
            + (slots + in_flight + 1) * chunk
            + u64::from(config.speculation_depth) * guess
            + profile.through_ns(Shape::decode(&[config.ctx]));
        let wait_max_ns = ((ROUNDS_MAX * round) as f64 * (1.0 + profile.jitter)) as Ns;
        Self {
            config: config.clone(),
            wait_max_ns,
            lives: BTreeMap::new(),
            starts: 0,
            last_started: None,
            steps: 0,
            decodes_in_a_row: 0,
            void: BTreeSet::new(),
        }
    }

    /// A request got a slot.
    pub fn started(&mut self, started: Started, prompt: &[i32], now: Ns) -> Result<(), String> {
        let Started { id, slot, cached, .. } = started;
        if self.lives.values().any(|l| l.slot == slot) {
            return Err(format!("request {id} got slot {slot}, which another one has"));
        }
        if slot >= self.config.slots {
            return Err(format!("request {id} got slot {slot} of {}", self.config.slots));
        }
        if self.last_started.is_some_and(|last| last.0 > id.0) {
            return Err(format!("request {id} got a slot after one that came later"));
        }
        if cached as usize >= prompt.len() {
            return Err(format!("{cached} of {} prompt tokens of request {id} are said to be cached", prompt.len()));
        }
        if cached > 0 && !self.config.prefix_cache {
            return Err(format!("request {id} took {cached} cached tokens though that is off"));
        }
        if self.config.fixed_shapes && !cached.is_multiple_of(self.config.chunk) {
            return Err(format!("request {id} took {cached} cached tokens, off the grid of {}", self.config.chunk));
        }
        self.last_started = Some(id);
        let life = Life {
            slot,
            order: self.starts,
            prompt: prompt.to_vec(),
            planned: cached,
            answer: Vec::new(),
            guesses: VecDeque::new(),
            ready: Some(now),
            others: BTreeMap::new(),
            overtaken_rows: 0,
        };
        self.starts += 1;
        self.lives.insert(id, life);
        Ok(())
    }

    /// A micro-batch is being sent.
    pub fn planned(&mut self, batch: &PlannedBatch, in_flight: usize, now: Ns) -> Result<(), String> {
        let PlannedBatch { step, rows, tokens, .. } = batch;
        if *step != self.steps {
            return Err(format!("step {step} came where {} was next", self.steps));
        }
        self.steps += 1;
        if in_flight > usize::from(self.config.in_flight_max) {
            return Err(format!("{in_flight} micro-batches are under way, {} may be", self.config.in_flight_max));
        }
        if rows.len() != tokens.len() || (rows.is_empty() && batch.ops.is_empty()) {
            return Err(format!("step {step} has {} rows and {} tokens", rows.len(), tokens.len()));
        }
        match batch.kind {
            BatchKind::Measure => {
                let taken = rows.iter().find(|r| self.lives.values().any(|l| l.slot == r.slot));
                taken.map_or(Ok(()), |r| Err(format!("step {step} measures in slot {}, which is taken", r.slot)))
            }
            BatchKind::Prefill => self.planned_chunk(batch, now),
            BatchKind::Decode => self.planned_decode(batch, now),
            BatchKind::Guess => self.planned_guess(batch),
            BatchKind::Restore => Err(format!("step {step} restores what nobody saved")),
        }
    }

    fn planned_chunk(&mut self, batch: &PlannedBatch, now: Ns) -> Result<(), String> {
        let step = batch.step;
        let rows = &batch.rows;
        self.decodes_in_a_row = 0;
        if rows.len() > self.config.chunk as usize || rows.windows(2).any(|w| w[0].slot != w[1].slot) {
            return Err(format!("step {step} has {} rows of a prompt, or rows of two", rows.len()));
        }
        let Some(first) = rows.first() else { return Ok(()) };
        let Some((id, life)) = self.lives.iter_mut().find(|(_, l)| l.slot == first.slot) else {
            return Err(format!("step {step} has rows of slot {}, which nobody has", first.slot));
        };
        let (start, end) = (life.planned as usize, life.planned as usize + rows.len());
        if first.pos as usize != start || life.prompt.get(start..end) != Some(&batch.tokens[..]) {
            return Err(format!("step {step} has other rows of request {id} than {start}..{end} of its prompt"));
        }
        let wrong = (start..end).zip(rows).any(|(pos, r)| r.output != (pos + 1 == life.prompt.len()));
        if wrong {
            return Err(format!("step {step} flags other rows of request {id} than its prompt's last"));
        }
        life.planned = end as u32;
        life.ready = if life.prefills() { Some(now) } else { None };
        life.others.clear();
        let (order, count) = (life.order, rows.len() as u64);
        let overtaken_max = u64::from(self.config.slots) * u64::from(self.config.chunk);
        for (id, other) in self.lives.iter_mut().filter(|(_, l)| l.prefills() && l.order < order) {
            other.overtaken_rows += count;
            if other.overtaken_rows > overtaken_max {
                return Err(format!("the prompt of request {id} is overtaken by {} rows", other.overtaken_rows));
            }
        }
        Ok(())
    }

    fn planned_decode(&mut self, batch: &PlannedBatch, now: Ns) -> Result<(), String> {
        let (step, rows) = (batch.step, &batch.rows);
        if rows.len() > self.config.decode_batch as usize || rows.windows(2).any(|w| w[0].slot >= w[1].slot) {
            return Err(format!("step {step} has {} rows, or two of a slot: {rows:?}", rows.len()));
        }
        for (row, token) in rows.iter().zip(&batch.tokens) {
            let Some((id, life)) = self.lives.iter_mut().find(|(_, l)| l.slot == row.slot) else {
                return Err(format!("step {step} has a row of slot {}, which nobody has", row.slot));
            };
            let pos = life.prompt.len() + life.answer.len();
            if row.pos as usize + 1 != pos || life.answer.last() != Some(token) || !row.output {
                return Err(format!("step {step} has {row:?} with token {token} for request {id}, which is at {pos}"));
            }
            let Some(since) = life.ready.take() else {
                return Err(format!("step {step} sends a token of request {id} again"));
            };
            life.others.clear();
            if now - since > self.wait_max_ns {
                let (waited, most) = ((now - since) / 1000, self.wait_max_ns / 1000);
                return Err(format!("a token of request {id} waited for {waited} µs, {most} is the most"));
            }
        }
        let waits = self.lives.values().any(Life::prefills);
        self.decodes_in_a_row = if waits { self.decodes_in_a_row + 1 } else { 0 };
        let most = ROUNDS_BESIDE_MAX * self.config.slots + u32::from(self.config.in_flight_max);
        if self.decodes_in_a_row > most {
            return Err(format!("{} decode micro-batches went by while a prompt waited", self.decodes_in_a_row));
        }
        Ok(())
    }

    fn planned_guess(&mut self, batch: &PlannedBatch) -> Result<(), String> {
        let (step, rows) = (batch.step, &batch.rows);
        let ([row], [token]) = (&rows[..], &batch.tokens[..]) else {
            return Err(format!("step {step} is a guess of {} rows", rows.len()));
        };
        let Some((id, life)) = self.lives.iter_mut().find(|(_, l)| l.slot == row.slot) else {
            return Err(format!("step {step} guesses in slot {}, which nobody has", row.slot));
        };
        let pos = life.prompt.len() + life.answer.len() + life.guesses.len();
        if row.pos as usize != pos || !row.output || life.prefills() || life.ready.is_some() {
            return Err(format!("step {step} guesses {row:?} for request {id}, which is at {pos}"));
        }
        if life.guesses.len() >= usize::from(self.config.speculation_depth) {
            return Err(format!("step {step} is one guess too many for request {id}"));
        }
        life.guesses.push_back((*token, step));
        Ok(())
    }

    /// Whether the engine may say that this step is void, and whether it must.
    pub fn void(&mut self, step: u64, said: bool) -> Result<(), String> {
        match (self.void.remove(&step), said) {
            (true, false) => Err(format!("step {step} is a wrong guess, but is to be computed")),
            (false, true) => Err(format!("step {step} is called void, but may be right")),
            _ => Ok(()),
        }
    }

    /// Steps that are to be dropped wherever they are.
    pub fn dropped(&self, steps: &[u64]) -> Result<(), String> {
        match steps.iter().find(|step| !self.void.contains(step)) {
            Some(step) => Err(format!("step {step} is to be dropped, but may be right")),
            None => Ok(()),
        }
    }

    /// A token was sampled for a request that goes on.
    pub fn token(&mut self, id: RequestId, token: i32, now: Ns) -> Result<(), String> {
        let most = TOKENS_AHEAD_MAX + u32::from(self.config.speculation_depth);
        for (other, life) in self.lives.iter_mut().filter(|(o, l)| **o != id && l.ready.is_some() && !l.prefills()) {
            let count = life.others.entry(id).or_default();
            *count += 1;
            if *count > most {
                return Err(format!("request {id} got {count} tokens while one of request {other} waited"));
            }
        }
        let Some(life) = self.lives.get_mut(&id) else { return Err(format!("request {id} got a token, but is gone")) };
        life.answer.push(token);
        life.others.clear();
        life.ready = None;
        match life.guesses.pop_front() {
            Some((guess, _)) if guess == token => {}
            Some((_, step)) => {
                life.ready = Some(now);
                self.void.insert(step);
                self.void.extend(life.guesses.drain(..).map(|(_, step)| step));
            }
            None => life.ready = Some(now),
        }
        Ok(())
    }

    /// A request ended; whatever of it is under way was in vain.
    pub fn ended(&mut self, id: RequestId) {
        if let Some(life) = self.lives.remove(&id) {
            self.void.extend(life.guesses.into_iter().map(|(_, step)| step));
        }
    }

    /// Nothing is under way any more: nothing may be left behind, and all stages must hold the same.
    pub fn idle(&self, engine: &Engine, stations: &[Station]) -> Result<(), String> {
        let counters = engine.counters();
        if !engine.is_idle() {
            return Err(format!("nothing is under way, but the engine is not idle: {counters:?}"));
        }
        if counters.slots_used != 0 || counters.in_flight != 0 || counters.queued != 0 {
            return Err(format!("an idle engine counts {counters:?}"));
        }
        if let Some(id) = self.lives.keys().next() {
            return Err(format!("request {id} never ended"));
        }
        for (slot, tokens) in engine.held() {
            // Beyond them there may be void rows, whose Trim travels with what comes next.
            let held = |s: &Station| s.shadow.slot(slot).starts_with(&tokens);
            if let Some(i) = stations.iter().position(|s| !held(s)) {
                return Err(format!("slot {slot} of stage {i} does not hold the {} tokens it should", tokens.len()));
            }
        }
        let Some((first, others)) = stations.split_first() else { return Ok(()) };
        for slot in 0..first.shadow.len() {
            for (i, other) in others.iter().enumerate() {
                // Rows that were void may have been computed by one stage and not by the next; they are the last ones.
                let (a, b) = (first.shadow.slot(slot), other.shadow.slot(slot));
                if !(a.starts_with(b) || b.starts_with(a)) {
                    return Err(format!("stages 0 and {} hold different sequences in slot {slot}", i + 1));
                }
            }
        }
        Ok(())
    }
}
