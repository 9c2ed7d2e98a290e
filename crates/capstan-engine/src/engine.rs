//! The scheduler as a state machine: requests go in, micro-batches come out, micro-batches return, tokens go in.
use std::collections::VecDeque;

use capstan_proto::data::{KvOp, MicroBatch, Payload, Row};
use capstan_proto::{Epoch, RequestId};

use crate::config::{ConfigError, EngineConfig};
use crate::flight::{CompletedError, Flight};
use crate::queue::{Queue, Request};
use crate::schedule::{self, Turn};
use crate::sequence::{Phase, Sequence};
use crate::slots::Slots;

/// Schedules sequences over a pipeline of stages.
///
/// The driver hands in whatever happens, samples **every** output of a completed micro-batch, and only then polls
/// micro-batches until there are none, so that sequences that decode together stay together:
///
/// ```text
/// submit ─▶ queue ─▶ slot: Prefill ─last chunk sent─▶ Waiting ─handle_token─▶ Ready ─row sent─▶ Waiting ...
///                                                       └─ handle_finish, handle_cancel, a limit ─▶ slot free
/// ```
///
/// It knows no epoch: what arrives from an older one must be dropped before [`Engine::handle_completed`].
#[derive(Debug)]
pub struct Engine {
    config: EngineConfig,
    queue: Queue,
    slots: Slots,
    flight: Flight,
    /// Not yet polled; at most one a slot.
    started: VecDeque<Started>,
    decodes_since_prefill: u16,
    /// Requests that ever got a slot.
    admissions: u64,
    /// Tokens that were ever taken in.
    tokens: u64,
}

/// A micro-batch to send. The driver adds the epoch, and embeds the tokens where stages take hidden states.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PlannedBatch {
    /// Counts from 0 in an epoch, without gaps.
    pub step: u64,
    /// KV operations that precede the rows.
    pub ops: Vec<KvOp>,
    /// At least one: a chunk of one sequence, or one row each of several, slots ascending.
    pub rows: Vec<Row>,
    /// One a row.
    pub tokens: Vec<i32>,
}

impl PlannedBatch {
    /// The micro-batch with what its rows are computed on.
    pub fn into_micro_batch(self, epoch: Epoch, payload: Payload) -> MicroBatch {
        MicroBatch { epoch, step: self.step, ops: self.ops, rows: self.rows, payload }
    }
}

/// A request left the queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Started {
    /// Which.
    pub id: RequestId,
    /// The slot it got.
    pub slot: u32,
}

/// What a micro-batch that came back brought.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Completed {
    /// The requests that await a token now, each with the index of its row among those flagged `output`: its logits are
    /// `[index * n_vocab .. (index + 1) * n_vocab]`. Those cancelled meanwhile are left out.
    pub outputs: Vec<(RequestId, usize)>,
    /// Rows flagged `output` in all, so the micro-batch must have brought `output_rows * n_vocab` logits.
    pub output_rows: usize,
}

/// What became of a sequence with a new token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TokenOutcome {
    /// It goes on.
    Continue,
    /// That was its last token; its slot is free already.
    Finished(FinishedBy),
    /// The request awaits no token: it is unknown, or was cancelled or finished. Nothing changed.
    Ignored,
}

/// Which length ended a sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FinishedBy {
    /// The request's own `max_tokens`.
    MaxTokens,
    /// Prompt and answer together fill the context.
    Context,
}

/// Why a request was not taken. Nothing changed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SubmitError {
    /// There is nothing to continue.
    #[error("the prompt has no tokens; send at least one")]
    Empty,
    /// `max_tokens` is 0.
    #[error("max_tokens is 0; ask for at least one token")]
    NoTokens,
    /// The prompt leaves no room for an answer.
    #[error(
        "the prompt has {prompt} tokens, but the context holds {ctx}, answer included; shorten the prompt or load the \
         model with a larger context"
    )]
    ContextExceeded {
        /// Its tokens.
        prompt: usize,
        /// Tokens that a slot holds.
        ctx: u32,
    },
    /// All slots are taken and the queue is full.
    #[error("{queue_max} requests wait already; try again in a moment")]
    Busy {
        /// How many may wait.
        queue_max: usize,
    },
    /// The name is taken by a request that lives.
    #[error("request {0} is already being answered; every request needs a name of its own")]
    Duplicate(RequestId),
}

/// How much is going on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Counters {
    /// Slots in all.
    pub slots: u32,
    /// Those with a sequence, or whose last micro-batch is still under way.
    pub slots_used: u32,
    /// Requests without a slot.
    pub queued: usize,
    /// Micro-batches under way.
    pub in_flight: usize,
}

/// A mistake in the scheduler itself.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the scheduler contradicts itself: {0}; this is a bug, please report it")]
pub struct InvariantBroken(String);

impl Engine {
    /// An engine without requests, in a fresh epoch.
    pub fn new(config: EngineConfig) -> Result<Self, ConfigError> {
        config.check()?;
        Ok(Self {
            queue: Queue::default(),
            slots: Slots::new(config.slots),
            flight: Flight::default(),
            started: VecDeque::new(),
            decodes_since_prefill: 0,
            admissions: 0,
            tokens: 0,
            config,
        })
    }

    /// Takes a request into the queue. It gets a slot when micro-batches are polled.
    pub fn handle_submit(
        &mut self,
        id: RequestId,
        prompt: Vec<i32>,
        max_tokens: Option<u32>,
    ) -> Result<(), SubmitError> {
        let ctx = self.config.ctx;
        if prompt.is_empty() {
            return Err(SubmitError::Empty);
        }
        if max_tokens == Some(0) {
            return Err(SubmitError::NoTokens);
        }
        if prompt.len() >= ctx as usize {
            return Err(SubmitError::ContextExceeded { prompt: prompt.len(), ctx });
        }
        if self.slots.find(id).is_some() || self.queue.ids().any(|q| q == id) {
            return Err(SubmitError::Duplicate(id));
        }
        // Requests for which a slot is free do not wait; they only have not been polled yet.
        let free = (self.slots.len() - self.slots.used()) as usize;
        if self.queue.len() >= self.config.queue_max.saturating_add(free) {
            return Err(SubmitError::Busy { queue_max: self.config.queue_max });
        }
        self.queue.push(Request { id, prompt, max_tokens });
        self.debug_check();
        Ok(())
    }

    /// Gives a request up, wherever it is; no output of it comes afterwards. False when it is not known (any more).
    pub fn handle_cancel(&mut self, id: RequestId) -> bool {
        self.queue.remove(id) || self.handle_finish(id)
    }

    /// The driver ended a sequence: an end-of-generation token (instead of [`Engine::handle_token`]) or a stop string
    /// (before or after it). False when the request has no slot or is ending already.
    pub fn handle_finish(&mut self, id: RequestId) -> bool {
        let Some(slot) = self.slots.find(id) else { return false };
        let Some(sequence) = self.slots.get_mut(slot) else { return false };
        if sequence.phase == Phase::Ending {
            return false;
        }
        sequence.phase = Phase::Ending;
        if sequence.in_flight == 0 {
            self.slots.release(slot);
        }
        self.started.retain(|s| s.id != id);
        self.debug_check();
        true
    }

    /// Takes the token that was sampled from a request's output.
    pub fn handle_token(&mut self, id: RequestId, token: i32) -> TokenOutcome {
        let (ctx, since) = (self.config.ctx, self.tokens);
        let Some(slot) = self.slots.find(id) else { return TokenOutcome::Ignored };
        let Some(sequence) = self.slots.get_mut(slot).filter(|s| s.awaits_token()) else {
            return TokenOutcome::Ignored;
        };
        let finished = sequence.push_token(token, since, ctx);
        self.tokens += 1;
        if let Some(by) = finished {
            self.slots.release(slot);
            self.started.retain(|s| s.id != id);
            self.debug_check();
            return TokenOutcome::Finished(by);
        }
        self.debug_check();
        TokenOutcome::Continue
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
                    self.slots.release(slot);
                }
            } else if sent.outputs {
                outputs.push((sequence.id, index));
            }
        }
        self.debug_check();
        Ok(Completed { outputs, output_rows: if sent.outputs { sent.slots.len() } else { 0 } })
    }

    /// The epoch is lost. Requests that had slots are given up and returned, in the order they got them; queued ones
    /// stay queued. Poll micro-batches again when the next epoch is wired; its steps start at 0, and its KV is empty.
    pub fn handle_lost(&mut self) -> Vec<RequestId> {
        let mut lost: Vec<_> =
            self.slots.iter().filter(|(_, s)| s.phase != Phase::Ending).map(|(_, s)| (s.admitted, s.id)).collect();
        lost.sort_unstable();
        self.slots = Slots::new(self.config.slots);
        self.flight = Flight::default();
        self.started.clear();
        self.decodes_since_prefill = 0;
        self.debug_check();
        lost.into_iter().map(|(_, id)| id).collect()
    }

    /// The next micro-batch to send, or none while nothing can be sent. Also gives free slots to queued requests.
    pub fn poll_micro_batch(&mut self) -> Option<PlannedBatch> {
        self.admit();
        if self.flight.len() >= usize::from(self.config.in_flight_max) {
            return None;
        }
        let prefill = self.slots.next_prefill();
        let ready = self.slots.ready();
        let (since, share) = (self.decodes_since_prefill, self.config.decodes_per_prefill);
        let (rows, tokens, outputs) = match schedule::turn(prefill.is_some(), !ready.is_empty(), since, share)? {
            Turn::Prefill => {
                self.decodes_since_prefill = 0;
                let slot = prefill?;
                self.slots.get_mut(slot)?.take_chunk(slot)?
            }
            Turn::Decode => {
                // It only counts while a prompt waits: otherwise nothing is held up.
                self.decodes_since_prefill = if prefill.is_some() { since.saturating_add(1) } else { 0 };
                let (rows, tokens) = self.deal(ready);
                (rows, tokens, true)
            }
        };
        let ops = self.slots.take_clears();
        let mut slots: Vec<u32> = rows.iter().map(|r| r.slot).collect();
        slots.dedup();
        slots.iter().for_each(|&slot| self.slots.mark_dirty(slot));
        let step = self.flight.push(slots, outputs);
        self.debug_check();
        Some(PlannedBatch { step, ops, rows, tokens })
    }

    /// The next request that got a slot, if any. Those that ended before they were polled are left out.
    pub fn poll_started(&mut self) -> Option<Started> {
        self.started.pop_front()
    }

    /// How much is going on.
    pub fn counters(&self) -> Counters {
        Counters {
            slots: self.slots.len(),
            slots_used: self.slots.used(),
            queued: self.queue.len(),
            in_flight: self.flight.len(),
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

    /// Checks what must always hold. It costs a walk over all slots; debug builds do it after every call.
    pub fn check_invariants(&self) -> Result<(), InvariantBroken> {
        let broken = |m: String| Err(InvariantBroken(m));
        if self.flight.len() > usize::from(self.config.in_flight_max) {
            return broken(format!("{} micro-batches are under way", self.flight.len()));
        }
        if self.queue.len() > self.config.queue_max.saturating_add(self.slots.len() as usize) {
            return broken(format!("{} requests are queued", self.queue.len()));
        }
        let mut under_way = vec![0; self.slots.len() as usize];
        for &slot in self.flight.iter().flat_map(|sent| &sent.slots) {
            match under_way.get_mut(slot as usize) {
                Some(n) => *n += 1,
                None => return broken(format!("a micro-batch names slot {slot}")),
            }
        }
        for (slot, sequence) in self.slots.iter() {
            let counted = std::mem::take(&mut under_way[slot as usize]);
            if counted != sequence.in_flight {
                return broken(format!("slot {slot} counts {}, but {counted} are under way", sequence.in_flight));
            }
            let right = match sequence.phase {
                Phase::Ready { .. } => counted == 0,
                Phase::Ending => counted > 0,
                Phase::Prefill | Phase::Waiting => true,
            };
            if !right {
                return broken(format!("slot {slot} is {:?} with {counted} under way", sequence.phase));
            }
            if self.slots.find(sequence.id) != Some(slot) || self.queue.ids().any(|id| id == sequence.id) {
                return broken(format!("request {} is in two places", sequence.id));
            }
        }
        // What is left belongs to slots without a sequence.
        if let Some(slot) = under_way.iter().position(|&n| n > 0) {
            return broken(format!("slot {slot} is free while rows of it are under way"));
        }
        match self.slots.leaked() {
            Some(slot) => broken(format!("slot {slot} is free but would never be cleared")),
            None => Ok(()),
        }
    }

    fn debug_check(&self) {
        debug_assert_eq!(self.check_invariants(), Ok(()));
    }

    fn admit(&mut self) {
        while let Some(slot) = self.slots.free() {
            let Some(request) = self.queue.pop() else { return };
            self.started.push_back(Started { id: request.id, slot });
            self.slots.occupy(slot, Sequence::new(request, self.admissions, &self.config));
            self.admissions += 1;
        }
    }

    /// A decode micro-batch from those that wait longest, in slot order.
    fn deal(&mut self, mut ready: Vec<u32>) -> (Vec<Row>, Vec<i32>) {
        let EngineConfig { stages, decode_batch, chunk, .. } = self.config;
        let decoding = self.slots.iter().filter(|(_, s)| s.decodes()).count();
        ready.truncate(schedule::group_size(decoding, stages, decode_batch, chunk));
        ready.sort_unstable();
        ready.into_iter().filter_map(|slot| self.slots.get_mut(slot)?.take_token(slot)).unzip()
    }
}
