//! One request that has a slot: its tokens, how far they were sent, and what it waits for.
use std::ops::Range;

use capstan_proto::RequestId;
use capstan_proto::data::Row;

use crate::config::EngineConfig;
use crate::engine::FinishedBy;
use crate::queue::Request;
use crate::schedule::ChunkPlan;

/// What a sequence does next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Phase {
    /// Chunks of its prompt have yet to be sent.
    Prefill,
    /// Its next token is being computed or sampled.
    Waiting,
    /// This token can be sent.
    Ready {
        token: i32,
        /// The engine's count of tokens when this one came: who waits longest goes first.
        since: u64,
    },
    /// Cancelled or finished; it keeps its slot until nothing of it is under way.
    Ending,
}

/// A stream of tokens with its KV state. Every position follows from three lengths: the prompt's, the chunks sent, and
/// the tokens generated.
#[derive(Debug)]
pub(crate) struct Sequence {
    pub id: RequestId,
    /// The engine's count of admissions: prompts are prefilled in this order.
    pub admitted: u64,
    pub phase: Phase,
    /// Micro-batches under way that have rows of it.
    pub in_flight: u32,
    prompt: Vec<i32>,
    tokens_max: u32,
    plan: ChunkPlan,
    chunks_sent: u32,
    generated: u32,
}

impl Sequence {
    /// The request must have passed the engine's checks: its prompt is neither empty nor as long as the context.
    pub fn new(request: Request, admitted: u64, config: &EngineConfig) -> Self {
        let rows = request.prompt.len() as u32;
        Self {
            id: request.id,
            admitted,
            phase: Phase::Prefill,
            in_flight: 0,
            tokens_max: request.max_tokens.unwrap_or(u32::MAX),
            plan: ChunkPlan::new(rows, config.chunk, config.chunks_min),
            chunks_sent: 0,
            generated: 0,
            prompt: request.prompt,
        }
    }

    /// Takes the next chunk of the prompt: its rows and tokens, and whether it is the last one. None when all are sent.
    pub fn take_chunk(&mut self, slot: u32) -> Option<(Vec<Row>, Vec<i32>, bool)> {
        if self.phase != Phase::Prefill || self.chunks_sent >= self.plan.count() {
            return None;
        }
        let Range { start, end } = self.plan.chunk(self.chunks_sent);
        let tokens = self.prompt.get(start as usize..end as usize)?.to_vec();
        self.chunks_sent += 1;
        self.in_flight += 1;
        let last = self.chunks_sent == self.plan.count();
        if last {
            self.phase = Phase::Waiting;
        }
        // Only the prompt's very last row tells the first token of the answer.
        let rows = (start..end).map(|pos| Row { slot, pos, output: last && pos + 1 == end }).collect();
        Some((rows, tokens, last))
    }

    /// Takes the token that is ready, as a row. None when there is none.
    pub fn take_token(&mut self, slot: u32) -> Option<(Row, i32)> {
        let Phase::Ready { token, .. } = self.phase else { return None };
        self.phase = Phase::Waiting;
        self.in_flight += 1;
        Some((Row { slot, pos: self.prompt.len() as u32 + self.generated - 1, output: true }, token))
    }

    /// Whether its logits came back and the driver owes it a token.
    pub fn awaits_token(&self) -> bool {
        self.phase == Phase::Waiting && self.in_flight == 0
    }

    /// Whether it is past its prompt and goes on.
    pub fn decodes(&self) -> bool {
        matches!(self.phase, Phase::Waiting | Phase::Ready { .. })
    }

    /// Takes a sampled token in; says whether it is the last one.
    pub fn push_token(&mut self, token: i32, since: u64, ctx: u32) -> Option<FinishedBy> {
        self.generated += 1;
        if self.generated >= self.tokens_max {
            return Some(FinishedBy::MaxTokens);
        }
        if self.prompt.len() as u64 + u64::from(self.generated) >= u64::from(ctx) {
            return Some(FinishedBy::Context);
        }
        self.phase = Phase::Ready { token, since };
        None
    }
}
