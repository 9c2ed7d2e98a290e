//! The scheduler as a state machine: requests go in, micro-batches come out, micro-batches return, tokens go in.
mod restoring;
mod taking;

use std::collections::{BTreeSet, VecDeque};

use capstan_proto::RequestId;
use capstan_proto::data::{KvOp, Rollback, Row};

use crate::config::{ConfigError, EngineConfig};
use crate::cost::{CostModel, Work};
use crate::dealer::{Dealer, Limits, Prompt};
use crate::dealing::{self, Dealing, Member};
use crate::flight::{BatchKind, CompletedError, Flight};
use crate::guess::{self, Source};
use crate::invariants::Parts;
use crate::measure::Measure;
use crate::prefix::{self, Rules};
use crate::queue::{Queue, Request};
use crate::report::{Completed, Counters, GuessWanted, PlannedBatch, SequenceStats, Started, TokenOutcome};
use crate::schedule;
use crate::sequence::{Guess, Next, Phase, Sequence};
use crate::slots::Slots;
use crate::turns::Turns;
use restoring::Snapshots;

/// Schedules sequences over a pipeline of stages.
///
/// The driver hands in whatever happens, samples **every** output of a completed micro-batch, and only then polls
/// micro-batches until there are none, so that sequences that decode together stay together:
///
/// ```text
/// submit ─▶ queue ─▶ slot: Prefill ─last chunk sent─▶ Decode: owed ─handle_token─▶ ready ─row sent─▶ owed ...
///                                                       └─ handle_finish, handle_cancel, a limit ─▶ Ending ─▶ free
/// ```
///
/// It knows no epoch: what arrives from an older one must be dropped before [`Engine::handle_completed`].
#[derive(Debug)]
pub struct Engine {
    config: EngineConfig,
    queue: Queue,
    slots: Slots,
    flight: Flight,
    dealer: Dealer,
    cost: CostModel,
    measure: Measure,
    /// Not yet polled; at most one a slot.
    started: VecDeque<Started>,
    /// To travel with the next micro-batch, before its rows; a few a slot at most.
    ops: Vec<KvOp>,
    /// Steps whose guesses are wrong, not yet polled; at most those under way.
    drops: Vec<u64>,
    /// Sequences beyond the slots that hold nothing of use.
    spares: Vec<u32>,
    /// Whose turn it is, chunks or groups.
    turns: Turns,
    /// The size of chunk that was tried last to see what it costs.
    exploring: Option<u32>,
    snapshots: Snapshots,
    /// Requests that ever got a slot.
    admissions: u64,
    /// Tokens that were ever taken in.
    tokens: u64,
    totals: Counters,
}

impl Engine {
    /// An engine without requests, in a fresh epoch.
    pub fn new(config: EngineConfig) -> Result<Self, ConfigError> {
        config.check()?;
        Ok(Self {
            queue: Queue::default(),
            slots: Slots::new(config.slots),
            flight: Flight::default(),
            dealer: Dealer::default(),
            cost: CostModel::new(config.stages),
            measure: Measure::new(&config),
            started: VecDeque::new(),
            ops: Vec::new(),
            drops: Vec::new(),
            spares: spares(&config),
            turns: Turns::default(),
            exploring: None,
            snapshots: Snapshots::default(),
            admissions: 0,
            tokens: 0,
            totals: Counters::default(),
            config,
        })
    }

    /// Gives a request up, wherever it is; no output of it comes afterwards. False when it is not known (any more).
    pub fn handle_cancel(&mut self, id: RequestId) -> bool {
        self.queue.remove(id) || self.handle_finish(id)
    }

    /// The driver ended a sequence: an end-of-generation token (instead of [`Engine::handle_token`]) or a stop string
    /// (before or after it). False when the request has no slot or is ending already.
    pub fn handle_finish(&mut self, id: RequestId) -> bool {
        let Some(slot) = self.slots.find(id) else { return false };
        if self.slots.get(slot).is_none_or(|s| s.phase == Phase::Ending) {
            return false;
        }
        self.end(slot);
        self.debug_check();
        true
    }

    /// Takes the token that was sampled from a request's output. It also decides about the next guess of the request.
    pub fn handle_token(&mut self, id: RequestId, token: i32) -> TokenOutcome {
        let (ctx, since) = (self.config.ctx, self.tokens);
        let Some(slot) = self.slots.find(id) else { return TokenOutcome::Ignored };
        let Some(sequence) = self.slots.get_mut(slot).filter(|s| s.awaits_token()) else {
            return TokenOutcome::Ignored;
        };
        self.tokens += 1;
        let accepted = sequence.record.accepted;
        let next = sequence.push_token(token, since, ctx);
        self.totals.accepted += u64::from(sequence.record.accepted - accepted);
        match next {
            Next::Ready => {
                self.give_up_guesses(slot);
                if !self.dealer.contains(slot) {
                    self.dealer.join(slot);
                }
            }
            Next::Confirmed(spare) => spare.into_iter().for_each(|spare| self.give_back(spare)),
            Next::Finished(by) => {
                self.end(slot);
                self.debug_check();
                return TokenOutcome::Finished(by);
            }
        }
        self.debug_check();
        TokenOutcome::Continue
    }

    /// How long each stage computed a micro-batch, the first stage first, and how long it was under way in all, in
    /// microseconds; to be said before [`Engine::handle_completed`]. A stage that computed no row of it says 0.
    pub fn handle_times(&mut self, step: u64, stage_us: &[u32], round_trip_us: u32) {
        let Some(sent) = self.flight.get(step).filter(|_| stage_us.len() == self.cost.stages()) else { return };
        if sent.kind == BatchKind::Restore {
            return;
        }
        if let (BatchKind::Measure, &[work]) = (sent.kind, &sent.runs[..]) {
            let us = stage_us.iter().map(|us| u64::from(*us)).sum();
            if self.measure.learn(work, us) {
                self.cost.measure(work, stage_us, round_trip_us);
            }
            return;
        }
        if sent.kind == BatchKind::Decode {
            let beside = self.flight.count(BatchKind::Prefill) > 0;
            let percent = beside.then_some(self.config.decode_slowdown_percent);
            self.dealer.returned(f64::from(round_trip_us), percent);
        }
        self.cost.observe_runs(&sent.runs, stage_us, sent.alone.then_some(round_trip_us));
    }

    /// Whether a micro-batch under way is a guess that is known to be wrong: then its rows need not be computed.
    pub fn is_void(&self, step: u64) -> bool {
        self.flight.get(step).is_some_and(|sent| sent.void)
    }

    /// A micro-batch came back from the last stage. Sample every output before polling again.
    pub fn handle_completed(&mut self, step: u64) -> Result<Completed, CompletedError> {
        let sent = self.flight.pop(step)?;
        let mut outputs = Vec::new();
        for (index, &slot) in sent.slots.iter().enumerate() {
            let Some(sequence) = self.slots.get_mut(slot) else { continue };
            sequence.in_flight -= 1;
            if sequence.phase == Phase::Ending {
                if sequence.in_flight == 0 {
                    self.release(slot);
                }
            } else if sent.outputs > 0 && !sent.void {
                sequence.owed = true;
                outputs.push((sequence.id, index));
            }
        }
        self.debug_check();
        Ok(Completed { kind: sent.kind, outputs, output_rows: if sent.void { 0 } else { sent.outputs as usize } })
    }

    /// The epoch is lost. Requests that had slots are given up and returned, in the order they got them; queued ones
    /// stay queued. Poll micro-batches again when the next epoch is wired; its steps start at 0, and its KV is empty.
    pub fn handle_lost(&mut self) -> Vec<RequestId> {
        let mut lost: Vec<_> =
            self.slots.iter().filter(|(_, s)| s.phase != Phase::Ending).map(|(_, s)| (s.admitted, s.id)).collect();
        lost.sort_unstable();
        self.slots = Slots::new(self.config.slots);
        self.flight = Flight::default();
        self.dealer = Dealer::default();
        self.started.clear();
        self.ops.clear();
        self.drops.clear();
        self.spares = spares(&self.config);
        self.turns = Turns::default();
        self.snapshots = Snapshots::default();
        self.debug_check();
        lost.into_iter().map(|(_, id)| id).collect()
    }

    /// The next micro-batch to send, or none while nothing can be sent. Also gives free slots to queued requests.
    ///
    /// Sequences that decode and chunks of prompts take turns, each with its share; guesses and measurements only take
    /// what is idle.
    pub fn poll_micro_batch(&mut self) -> Option<PlannedBatch> {
        if self.snapshots.is_restoring() {
            return self.send_restore();
        }
        self.admit();
        self.deal();
        if self.flight.len() >= usize::from(self.config.in_flight_max) {
            return None;
        }
        let prefill = self.slots.next_prefill();
        if let Some(slot) = prefill.filter(|_| self.may_send_chunk()) {
            return self.send_chunk(slot);
        }
        if let Some(group) = self.ready_group() {
            return self.send_group(group);
        }
        if prefill.is_none() {
            self.turns.rest();
            return self.send_guess().or_else(|| self.send_measurement());
        }
        None
    }

    /// Steps under way that need not be computed any more, by no stage. Later ones follow them all the same.
    pub fn poll_drop(&mut self) -> Option<Vec<u64>> {
        (!self.drops.is_empty()).then(|| std::mem::take(&mut self.drops))
    }

    /// The next request that got a slot, if any. Those that ended before they were polled are left out.
    pub fn poll_started(&mut self) -> Option<Started> {
        self.started.pop_front()
    }

    /// Which guess the draft model may make, when everything that can be sent was polled. Only for a lone stream: a
    /// draft model follows one text at a time.
    pub fn wants_guess(&self) -> Option<GuessWanted> {
        let sequence = self.slots.get(self.drafted()?).filter(|s| s.proposed.is_none())?;
        if !self.may_guess(sequence) || !sequence.record.pays(Source::Model, sequence.guesses.len(), &self.cost) {
            return None;
        }
        let tokens = sequence.tokens.iter().copied().chain(sequence.ahead()).collect();
        let first = sequence.record.likely(Source::Model, sequence.guesses.len()) > guess::LIKELY;
        Some(GuessWanted { id: sequence.id, tokens, first })
    }

    /// The slot of the sequence that is alone, for which a draft model may guess.
    fn drafted(&self) -> Option<u32> {
        let [group] = self.dealer.groups() else { return None };
        let &[slot] = &group[..] else { return None };
        Some(slot)
    }

    /// The draft model's guess. It is ignored when the text has gone on meanwhile.
    pub fn handle_guess(&mut self, wanted: &GuessWanted, token: i32) {
        let Some(sequence) = self.slots.find(wanted.id).and_then(|slot| self.slots.get_mut(slot)) else { return };
        if sequence.tokens.len() + sequence.guesses.len() == wanted.tokens.len() {
            sequence.proposed = Some(token);
        }
    }

    /// The draft model guesses no more: n-grams need not wait for it.
    pub fn handle_draft_gone(&mut self) {
        self.config.draft = false;
    }

    /// What speculation did for a request that has a slot.
    pub fn sequence_stats(&self, id: RequestId) -> Option<SequenceStats> {
        let record = &self.slots.get(self.slots.find(id)?)?.record;
        Some(SequenceStats { guessed: record.guessed, accepted: record.accepted })
    }

    /// How much is going on.
    pub fn counters(&self) -> Counters {
        Counters {
            slots: self.slots.len(),
            slots_used: self.slots.used(),
            queued: self.queue.len(),
            in_flight: self.flight.len(),
            ..self.totals
        }
    }

    /// Whether nothing is queued, no slot is used and nothing is under way.
    pub fn is_idle(&self) -> bool {
        self.queue.len() == 0 && self.slots.used() == 0 && self.flight.len() == 0
    }

    /// The settings it was made with.
    pub fn config(&self) -> &EngineConfig {
        &self.config
    }

    /// What is known of the stages.
    pub fn cost(&self) -> &CostModel {
        &self.cost
    }

    /// The tokens whose KV each slot holds; of a slot in use those sent so far, without guesses.
    pub fn held(&self) -> Vec<(u32, Vec<i32>)> {
        self.slots.held().into_iter().map(|h| (h.slot, h.tokens.to_vec())).collect()
    }

    fn admit(&mut self) {
        let rules = Rules {
            on: self.config.prefix_cache,
            rollback: self.config.rollback,
            grid: self.config.fixed_shapes.then_some(self.config.chunk),
        };
        while let Some(request) = self.queue.front() {
            let asked = request.asked();
            let Some(seat) = prefix::seat(&self.slots.held(), &request.prompt, asked, rules) else { return };
            let Some(Request { id, prompt, max_tokens, .. }) = self.queue.pop() else { return };
            self.ops.extend(seat.ops);
            self.totals.prompt_tokens += prompt.len() as u64;
            self.totals.cached_tokens += u64::from(seat.cached);
            self.started.push_back(Started { id, slot: seat.slot, cached: seat.cached });
            let tokens_max = max_tokens.unwrap_or(u32::MAX);
            let mut sequence = Sequence::new(id, prompt, tokens_max, self.admissions, seat.cached);
            sequence.asked = asked;
            sequence.grid_rows = seat.grid_rows;
            sequence.saved_rows = seat.saved_rows;
            self.slots.occupy(seat.slot, sequence);
            self.admissions += 1;
        }
    }

    fn deal(&mut self) {
        let prefill = self.slots.next_prefill();
        let beside = prefill.is_some() || self.flight.count(BatchKind::Prefill) > 0;
        if !self.dealer.is_due(beside) {
            return;
        }
        // More groups than stages hide the links and even out what does not divide, where that is worth smaller groups.
        let groups_max = if self.config.stages == 1 { 1 } else { 2 * self.cost.stages() };
        let group_max = self.config.decode_batch.min(self.config.chunk) as usize;
        let limits = Limits { groups_max, group_max, trials: !self.config.fixed_shapes };
        let members = self.members();
        // Shapes that are fixed leave nothing to choose.
        let prompt = prefill.filter(|_| !self.config.fixed_shapes).and_then(|slot| self.prompt(slot));
        self.dealer.look(&self.cost, &members, limits, prompt, beside);
        self.turns.set(prompt.map(|p| self.dealer.share_now(&self.cost, &members, p)), self.dealer.groups().len());
    }

    /// The sequences that decode, by slot.
    fn members(&self) -> Vec<Member> {
        let depth = |slot: u32| self.slots.get(slot).map_or(0, |s| s.kv_rows);
        self.dealer.slots().into_iter().map(|slot| Member { slot, depth: depth(slot) }).collect()
    }

    /// What is to come of the prompt in this slot.
    fn prompt(&self, slot: u32) -> Option<Prompt> {
        let sequence = self.slots.get(slot)?;
        Some(Prompt {
            start: sequence.kv_rows,
            left: sequence.prompt_left(),
            chunk_max: self.config.chunk,
            in_flight_max: u32::from(self.config.in_flight_max),
            slowdown_percent: self.config.decode_slowdown_percent,
            rows_now: self.turns.rows_now(),
        })
    }

    /// The group that waits longest among those whose members all have their tokens.
    fn ready_group(&self) -> Option<Vec<u32>> {
        let since = |group: &Vec<u32>| {
            let each = group.iter().map(|slot| self.slots.get(*slot)?.ready_since);
            each.collect::<Option<Vec<u64>>>()?.into_iter().min()
        };
        let ready = self.dealer.groups().iter().filter_map(|g| Some((since(g)?, g)));
        ready.min_by_key(|(since, _)| *since).map(|(_, group)| group.clone())
    }

    /// Whether a chunk may be sent now, if there is one: one a stage and one more, which is there when the first stage is
    /// free again; but beside decoding sequences when it is its turn, and only while there is room for all groups.
    fn may_send_chunk(&self) -> bool {
        let (chunks, groups) = (self.flight.count(BatchKind::Prefill), self.dealer.groups().len());
        if groups == 0 {
            return chunks <= self.cost.stages();
        }
        let room = usize::from(self.config.in_flight_max).saturating_sub(groups);
        chunks < room.max(1) && self.turns.chunk_is_due()
    }

    fn send_chunk(&mut self, slot: u32) -> Option<PlannedBatch> {
        let EngineConfig { stages, chunk, fixed_shapes, .. } = self.config;
        let share = (!fixed_shapes && !self.dealer.groups().is_empty()).then(|| self.prompt(slot)).flatten();
        let share = share.map(|prompt| self.dealer.share_now(&self.cost, &self.members(), prompt));
        self.turns.set(share, self.dealer.groups().len());
        let cost = &self.cost;
        let sequence = self.slots.get_mut(slot)?;
        let (start, left) = (sequence.kv_rows, sequence.prompt_left());
        let count = if fixed_shapes {
            // What was answered before went token by token.
            if start < sequence.asked { (chunk - start % chunk).min(sequence.asked - start) } else { 1 }
        } else if let Some(share) = share {
            self.turns.rows(share.rows)
        } else {
            // Larger sizes than any so far are tried once each, where the prompt is long enough to fill all stages with
            // them.
            let most = chunk.min(left / u32::from(stages.max(2)));
            match cost.unexplored().filter(|rows| *rows <= most && self.exploring != Some(*rows)) {
                Some(rows) => {
                    self.exploring = Some(rows);
                    rows
                }
                None => {
                    // One cut for all of a prompt; its rest would by itself be cut finer, as if the pipeline were empty.
                    let known = sequence.chunk_rows.filter(|(_, explored)| *explored == cost.explored());
                    let rows = known.map_or_else(|| schedule::chunk_rows(cost, left, start, chunk), |(rows, _)| rows);
                    sequence.chunk_rows = Some((rows, cost.explored()));
                    rows
                }
            }
        };
        let (rows, tokens, last) = sequence.take_chunk(slot, count, chunk);
        self.turns.sent_chunk();
        let work = Work::prefill(rows.len() as u32, start);
        let saved = self.save(&[slot]);
        let planned = self.plan(BatchKind::Prefill, vec![slot], u32::from(last), vec![work], rows, tokens);
        Some(PlannedBatch { saved, ..planned })
    }

    fn send_group(&mut self, group: Vec<u32>) -> Option<PlannedBatch> {
        self.turns.sent_group();
        self.dealer.sent();
        let taken = group.iter().filter_map(|&slot| self.slots.get_mut(slot)?.take_token(slot));
        let (rows, tokens): (Vec<Row>, Vec<i32>) = taken.unzip();
        let members: Vec<Member> = rows.iter().map(|r| Member { slot: r.slot, depth: r.pos + 1 }).collect();
        let runs = dealing::runs(&members).collect();
        let saved = self.save(&group);
        let planned = self.plan(BatchKind::Decode, group, rows.len() as u32, runs, rows, tokens);
        Some(PlannedBatch { saved, ..planned })
    }

    fn may_guess(&self, sequence: &Sequence) -> bool {
        self.config.rollback != Rollback::None
            && self.flight.len() <= self.cost.stages()
            && sequence.may_guess(self.config.speculation_depth, self.config.ctx)
            && (self.config.rollback == Rollback::Trim || !self.spares.is_empty())
    }

    /// Whether stages rest in every step of the sequences that decode for as long as one more guess takes. What a lone
    /// sequence loses by a wrong guess is weighed by itself; here it would be others who lose.
    fn stages_rest(&self) -> bool {
        if self.dealer.groups().len() < 2 {
            return true;
        }
        let members = self.members();
        let dealing = Dealing::of(&self.cost, self.dealer.groups(), &members);
        let cells: u64 = members.iter().map(|m| u64::from(m.depth)).sum();
        let guess = self.cost.slowest_us(Work::decode(1, cells / members.len().max(1) as u64));
        let guesses = (self.flight.count(BatchKind::Guess) + 1) as f64 * guess;
        dealing::busiest_us(&dealing.loads) + guesses <= dealing.step_us
    }

    /// One guess of the sequence that has the fewest under way. Sequences that share a micro-batch have none: batching
    /// was found to be better there.
    fn send_guess(&mut self) -> Option<PlannedBatch> {
        let lone = self.dealer.groups().iter().filter(|g| g.len() == 1).filter_map(|g| g.first().copied());
        let mut lone: Vec<(usize, u32)> = lone
            .filter_map(|slot| self.slots.get(slot).filter(|s| self.may_guess(s)).map(|s| (s.guesses.len(), slot)))
            .collect();
        lone.sort_unstable();
        if lone.is_empty() || !self.stages_rest() {
            return None;
        }
        // The draft model follows a text that is alone.
        let drafted = self.config.draft && self.drafted().is_some();
        for (ahead, slot) in lone {
            let Some(sequence) = self.slots.get_mut(slot) else { continue };
            let found = sequence.proposed.map(|token| (token, Source::Model)).or_else(|| sequence.look_up());
            let Some((token, source)) = found else { continue };
            let waits = drafted && sequence.record.leaves_to_model(source, ahead, &self.cost);
            if source == Source::Model || !waits && sequence.record.pays(source, ahead, &self.cost) {
                return self.guess(slot, token, source);
            }
        }
        None
    }

    fn guess(&mut self, slot: u32, token: i32, source: Source) -> Option<PlannedBatch> {
        let spare = match self.config.rollback {
            Rollback::Copy => Some(self.spares.pop()?),
            Rollback::Trim | Rollback::None => None,
        };
        if let Some(spare) = spare {
            self.ops.push(KvOp::Copy { from: slot, to: spare });
        }
        let step = self.flight.next_step();
        let (row, token) = self.slots.get_mut(slot)?.take_guess(slot, Guess { token, step, source, spare });
        self.totals.guessed += 1;
        let work = Work::decode(1, u64::from(row.pos) + 1);
        Some(self.plan(BatchKind::Guess, vec![slot], 1, vec![work], vec![row], vec![token]))
    }

    fn send_measurement(&mut self) -> Option<PlannedBatch> {
        if !self.is_idle() {
            return None;
        }
        let (work, rows) = self.measure.take(&self.slots.empty())?;
        let used: BTreeSet<u32> = rows.iter().map(|row| row.slot).collect();
        let (outputs, tokens) = (if work.decode { work.rows } else { 0 }, vec![0; rows.len()]);
        let planned = self.plan(BatchKind::Measure, Vec::new(), outputs, vec![work], rows, tokens);
        self.ops.extend(used.into_iter().map(|slot| KvOp::Clear { slot }));
        Some(planned)
    }

    fn plan(
        &mut self,
        kind: BatchKind,
        slots: Vec<u32>,
        outputs: u32,
        runs: Vec<Work>,
        rows: Vec<Row>,
        tokens: Vec<i32>,
    ) -> PlannedBatch {
        let step = self.flight.push(kind, slots, outputs, runs);
        let ops = std::mem::take(&mut self.ops);
        self.debug_check();
        PlannedBatch { step, kind, ops, rows, tokens, saved: None }
    }

    /// The guesses of a sequence are wrong: none of them need be computed, and what was is taken back.
    fn give_up_guesses(&mut self, slot: u32) {
        let Some(sequence) = self.slots.get_mut(slot) else { return };
        let (from, guesses) = (sequence.kv_rows, sequence.take_guesses());
        let Some(first) = guesses.front() else { return };
        match first.spare {
            None => self.ops.push(KvOp::Trim { slot, from }),
            Some(spare) => self.ops.extend([KvOp::Clear { slot }, KvOp::Copy { from: spare, to: slot }]),
        }
        for guess in guesses {
            self.flight.void(guess.step);
            self.drops.push(guess.step);
            self.totals.dropped += 1;
            guess.spare.into_iter().for_each(|spare| self.give_back(spare));
        }
    }

    /// What a spare sequence holds is not needed any more. It is cleared at once: until then it keeps cells of the
    /// cache that the rows to come would otherwise have, and their place decides the order of sums.
    fn give_back(&mut self, spare: u32) {
        self.ops.push(KvOp::Clear { slot: spare });
        self.spares.push(spare);
    }

    fn end(&mut self, slot: u32) {
        self.give_up_guesses(slot);
        self.dealer.leave(slot);
        let Some(sequence) = self.slots.get_mut(slot) else { return };
        sequence.phase = Phase::Ending;
        sequence.ready_since = None;
        sequence.owed = false;
        let (id, in_flight) = (sequence.id, sequence.in_flight);
        self.started.retain(|s| s.id != id);
        if in_flight == 0 {
            self.release(slot);
        }
    }

    fn release(&mut self, slot: u32) {
        let keep = self.config.prefix_cache && self.config.rollback != Rollback::None;
        let sequence = self.slots.release(slot, keep);
        if !keep && sequence.is_some_and(|s| s.kv_rows > 0) {
            self.ops.push(KvOp::Clear { slot });
        }
    }

    pub(crate) fn parts(&self) -> Parts<'_> {
        let Self { config, queue, slots, flight, dealer, spares, .. } = self;
        Parts { config, queue, slots, flight, dealer, spares }
    }

    fn debug_check(&self) {
        debug_assert_eq!(self.check_invariants(), Ok(()));
    }
}

/// All sequences beyond the slots, the lowest to be taken first.
fn spares(config: &EngineConfig) -> Vec<u32> {
    (config.slots..config.slots + config.spares).rev().collect()
}
