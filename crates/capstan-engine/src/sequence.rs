//! One request that has a slot: its tokens, how far they were sent, what is guessed of it, and what it waits for.
use std::collections::VecDeque;

use capstan_proto::RequestId;
use capstan_proto::data::Row;

use crate::guess::{Record, Source};
use crate::ngram::Ngrams;
use crate::report::FinishedBy;

/// What a sequence does next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Phase {
    /// Chunks of its prompt have yet to be sent.
    Prefill,
    /// Its next token is being computed or sampled, or can be sent.
    Decode,
    /// Cancelled or finished; it keeps its slot until nothing of it is under way.
    Ending,
}

/// A token that is being verified.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Guess {
    pub token: i32,
    pub step: u64,
    pub source: Source,
    /// Where the state before it was put, if it cannot be trimmed.
    pub spare: Option<u32>,
}

/// A stream of tokens with its KV state.
///
/// ```text
/// tokens   | prompt ............ | answer ....... |
/// kv_rows  | sent .............................|          ready: the last token is not sent yet
/// guesses                                         | g | g |   under way beyond the last token
/// ```
#[derive(Debug)]
pub(crate) struct Sequence {
    pub id: RequestId,
    /// The engine's count of admissions: prompts are prefilled in this order.
    pub admitted: u64,
    pub phase: Phase,
    /// Micro-batches under way that have rows of it.
    pub in_flight: u32,
    /// Prompt and answer.
    pub tokens: Vec<i32>,
    /// Of `tokens` so many were sent.
    pub kv_rows: u32,
    /// Of these the first ones went in chunks of the fixed grid.
    pub grid_rows: u32,
    /// Rows of its chunks, and the largest size that was known when they were chosen.
    pub chunk_rows: Option<(u32, u32)>,
    /// Its logits came back, and the driver owes it a token.
    pub owed: bool,
    /// Its last token can be sent; who waits longest goes first.
    pub ready_since: Option<u64>,
    /// Under way, in order.
    pub guesses: VecDeque<Guess>,
    /// The draft model's next guess.
    pub proposed: Option<i32>,
    pub record: Record,
    pub ngrams: Ngrams,
    /// Of the prompt so many were asked; the rest was answered in a lost epoch.
    pub asked: u32,
    /// Of `tokens` so many are in its last snapshot.
    pub saved_rows: u32,
    prompt: u32,
    tokens_max: u32,
}

/// What a token does to a sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Next {
    /// It can be sent.
    Ready,
    /// It was guessed and is under way already.
    Confirmed(Option<u32>),
    /// It was the last one.
    Finished(FinishedBy),
}

impl Sequence {
    /// `cached` tokens of the prompt are in its slot already. The prompt is neither empty nor as long as the context.
    pub fn new(id: RequestId, prompt: Vec<i32>, tokens_max: u32, admitted: u64, cached: u32) -> Self {
        Self {
            id,
            admitted,
            phase: Phase::Prefill,
            in_flight: 0,
            kv_rows: cached,
            grid_rows: cached,
            chunk_rows: None,
            owed: false,
            ready_since: None,
            guesses: VecDeque::new(),
            proposed: None,
            record: Record::default(),
            ngrams: Ngrams::default(),
            asked: prompt.len() as u32,
            saved_rows: 0,
            prompt: prompt.len() as u32,
            tokens_max,
            tokens: prompt,
        }
    }

    /// Rows of the prompt that were not sent yet.
    pub fn prompt_left(&self) -> u32 {
        self.prompt.saturating_sub(self.kv_rows)
    }

    /// Takes the next `count` rows of the prompt; whether they were the last.
    pub fn take_chunk(&mut self, slot: u32, count: u32, grid: u32) -> (Vec<Row>, Vec<i32>, bool) {
        let (start, end) = (self.kv_rows, self.kv_rows + count.clamp(1, self.prompt_left()));
        self.kv_rows = end;
        self.in_flight += 1;
        if start == self.grid_rows && end % grid.max(1) == 0 && end - start == grid {
            self.grid_rows = end;
        }
        let last = end == self.prompt;
        if last {
            self.phase = Phase::Decode;
        }
        // Only the prompt's very last row tells the first token of the answer.
        let rows = (start..end).map(|pos| Row { slot, pos, output: last && pos + 1 == end }).collect();
        (rows, self.tokens[start as usize..end as usize].to_vec(), last)
    }

    /// Takes the token that is ready, as a row.
    pub fn take_token(&mut self, slot: u32) -> Option<(Row, i32)> {
        self.ready_since.take()?;
        let pos = self.kv_rows;
        self.kv_rows += 1;
        self.in_flight += 1;
        Some((Row { slot, pos, output: true }, *self.tokens.get(pos as usize)?))
    }

    /// Takes a guess as a row.
    pub fn take_guess(&mut self, slot: u32, guess: Guess) -> (Row, i32) {
        let pos = self.kv_rows + self.guesses.len() as u32;
        self.guesses.push_back(guess);
        self.record.sent(guess.source);
        self.proposed = None;
        self.in_flight += 1;
        (Row { slot, pos, output: true }, guess.token)
    }

    /// Whether one more guess may be made: its last token is under way, and its end is not in sight.
    pub fn may_guess(&self, depth: u16, ctx: u32) -> bool {
        let ahead = self.guesses.len() as u32;
        // The token that is owed now, the guesses, and what follows them.
        let after = u64::from(self.generated()) + u64::from(ahead) + 1;
        self.phase == Phase::Decode
            && self.ready_since.is_none()
            && self.kv_rows as usize == self.tokens.len()
            && self.guesses.len() < usize::from(depth)
            && after < u64::from(self.tokens_max)
            && u64::from(self.prompt) + after < u64::from(ctx)
    }

    /// The token that an n-gram says comes after the guesses, and on what ground.
    pub fn look_up(&mut self) -> Option<(i32, Source)> {
        let ahead = self.ahead();
        self.ngrams.guess(&self.tokens, &ahead).map(|(token, ground)| (token, Source::Ngram(ground)))
    }

    /// The guesses under way.
    pub fn ahead(&self) -> Vec<i32> {
        self.guesses.iter().map(|g| g.token).collect()
    }

    fn generated(&self) -> u32 {
        self.tokens.len() as u32 - self.prompt
    }

    /// Takes a sampled token in. Guesses that it proves wrong stay until [`Sequence::take_guesses`].
    pub fn push_token(&mut self, token: i32, since: u64, ctx: u32) -> Next {
        self.owed = false;
        self.proposed = None;
        self.tokens.push(token);
        self.record.token();
        self.ngrams.learn(self.tokens.len() - 1, token, &self.tokens);
        let right = self.guesses.front().map(|g| (g.token == token, *g));
        if let Some((right, guess)) = right {
            self.record.learn(guess.source, right);
        }
        if self.generated() >= self.tokens_max {
            return Next::Finished(FinishedBy::MaxTokens);
        }
        if self.tokens.len() as u64 >= u64::from(ctx) {
            return Next::Finished(FinishedBy::Context);
        }
        if let Some((true, guess)) = right {
            self.guesses.pop_front();
            self.kv_rows += 1;
            return Next::Confirmed(guess.spare);
        }
        self.ready_since = Some(since);
        Next::Ready
    }

    /// Gives all guesses up.
    pub fn take_guesses(&mut self) -> VecDeque<Guess> {
        std::mem::take(&mut self.guesses)
    }

    /// Whether its logits came back and the driver owes it a token.
    pub fn awaits_token(&self) -> bool {
        self.phase == Phase::Decode && self.owed
    }
}
