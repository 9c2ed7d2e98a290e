//! What is said: a sampler that follows a given passage with a given chance, and the answer that each request gets alone.
//!
//! A hash for a model says nothing that could be guessed. So the sampler puts a rule on top of the logits: where the
//! rule says *follow*, the next token is the passage's, else it is the logits' best. The logits are checked all the
//! same, bit by bit, so that a mistake in a KV cache shows at any token.
use capstan_engine::{BatchKind, FakeModel, FakeStage, FinishedBy, PlannedBatch, Stage, StageOutput};
use capstan_proto::Epoch;
use capstan_proto::data::{Payload, Row};
use capstan_proto::limits;

use crate::dice::{mix, unit};

/// Rows in which a prompt is fed that runs alone: as many as a micro-batch may have.
const PIECE_ROWS: usize = limits::ROWS_MAX;

/// How an answer goes.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Text {
    /// Decides where it strays.
    pub seed: u64,
    /// What it follows, over and over.
    pub passage: Vec<i32>,
    /// The chance of each token to be the passage's.
    pub follow: f64,
    /// Tokens after which it changes between following as said and not at all; 0 is never.
    pub turn: u32,
    /// One in so many tokens ends the answer; 0 is none.
    pub ends: u32,
}

impl Text {
    /// What the logits say and nothing else.
    pub fn free(seed: u64) -> Self {
        Self { seed, ..Self::default() }
    }

    /// The token at this index of the answer; none when the model ends it.
    pub fn next(&self, index: usize, logits: &[f32]) -> Option<i32> {
        if self.ends > 0 && mix(digest(logits), self.seed).is_multiple_of(u64::from(self.ends)) {
            return None;
        }
        let in_turn = self.turn == 0 || (index as u32 / self.turn).is_multiple_of(2);
        if in_turn && !self.passage.is_empty() && unit(mix(self.seed, index as u64)) < self.follow {
            return Some(self.passage[index % self.passage.len()]);
        }
        let best = logits.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1));
        best.map(|(i, _)| i as i32)
    }
}

/// All bits of some logits as one number.
pub fn digest(logits: &[f32]) -> u64 {
    logits.iter().fold(logits.len() as u64, |d, x| mix(d, u64::from(x.to_bits())))
}

/// How a request went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// The model ended it.
    Model,
    /// A length did.
    Length(FinishedBy),
    /// The client gave it up.
    Cancelled,
}

/// The answer of one request that has a whole model to itself.
#[derive(Clone, Debug, PartialEq)]
pub struct Alone {
    /// Its tokens.
    pub tokens: Vec<i32>,
    /// Of the logits that each token, and at last the end, was drawn from.
    pub digests: Vec<u64>,
    /// How it ended.
    pub end: End,
}

/// Runs a request on one stage, token by token, without a scheduler.
pub fn alone(model: FakeModel, prompt: &[i32], max_tokens: u32, ctx: u32, text: &Text) -> Alone {
    let mut stage = FakeStage::pipeline(FakeModel { slots: 1, ..model }, 1).remove(0);
    let mut answer = Alone { tokens: Vec::new(), digests: Vec::new(), end: End::Model };
    let mut step = 0;
    let mut feed = |tokens: &[i32], from: u32, output: bool| -> Vec<f32> {
        let last = from + tokens.len() as u32 - 1;
        let rows = (from..=last).map(|pos| Row { slot: 0, pos, output: output && pos == last }).collect();
        let planned = PlannedBatch { step, kind: BatchKind::Prefill, ops: vec![], rows, tokens: vec![], saved: None };
        step += 1;
        match stage.forward(&planned.into_micro_batch(Epoch(0), Payload::Tokens(tokens.to_vec()))) {
            Ok(StageOutput::Logits(logits)) => logits,
            other => unreachable!("a whole model gives logits to the next rows of a sequence: {other:?}"),
        }
    };
    let (early, last) = prompt.split_at(prompt.len().saturating_sub(1));
    for (i, piece) in early.chunks(PIECE_ROWS).enumerate() {
        feed(piece, (i * PIECE_ROWS) as u32, false);
    }
    let mut fed = last.first().copied().unwrap_or(0);
    for pos in early.len() as u32.. {
        let logits = feed(&[fed], pos, true);
        answer.digests.push(digest(&logits));
        let Some(token) = text.next(answer.tokens.len(), &logits) else { break };
        answer.tokens.push(token);
        if answer.tokens.len() as u32 >= max_tokens {
            answer.end = End::Length(FinishedBy::MaxTokens);
            break;
        }
        if prompt.len() + answer.tokens.len() >= ctx as usize {
            answer.end = End::Length(FinishedBy::Context);
            break;
        }
        fed = token;
    }
    answer
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_follows_its_passage_as_often_as_it_is_told() {
        let model = FakeModel { n_vocab: 500, ..FakeModel::small() };
        let passage: Vec<i32> = (0..40).collect();
        for (follow, low, high) in [(0.0, 0, 10), (0.8, 280, 360), (1.0, 400, 400)] {
            let text = Text { seed: 5, passage: passage.clone(), follow, ..Text::default() };
            let answer = alone(model, &[1, 2, 3], 400, 4096, &text);
            let same = answer.tokens.iter().enumerate().filter(|(i, t)| **t == (*i % 40) as i32).count();
            assert!((low..=high).contains(&same), "{follow}: {same}");
            assert_eq!((answer.tokens.len(), answer.end), (400, End::Length(FinishedBy::MaxTokens)));
        }
    }

    #[test]
    fn answers_end_by_themselves_when_told_to() {
        let text = Text { ends: 8, ..Text::free(1) };
        let answer = alone(FakeModel::small(), &[1], 10_000, 100_000, &text);
        assert_eq!(answer.end, End::Model);
        assert_eq!(answer.digests.len(), answer.tokens.len() + 1);
        let full = alone(FakeModel::small(), &[1, 2], 100, 12, &Text::free(1));
        assert_eq!((full.tokens.len(), full.end), (10, End::Length(FinishedBy::Context)));
    }
}
