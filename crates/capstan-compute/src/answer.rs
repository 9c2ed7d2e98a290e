//! One request inside the driver: its sampler, its text, its log-probabilities and its counts.
use std::time::Instant;

use capstan_engine::SequenceStats;
use capstan_llama::{LlamaError, Sampler, Vocab};
use capstan_proto::generate::{
    Alternative, ErrorKind, FinishReason, GenerateEvent, GenerateRequest, RequestError, TokenLogprob, Usage,
};
use capstan_text::TextStream;

/// A live request.
pub(crate) struct Answer {
    body: Box<GenerateRequest>,
    /// The prompt's tokens, until they are told.
    prompt: Vec<i32>,
    sampler: Sampler,
    text: TextStream,
    usage: Usage,
    submitted: Instant,
    admitted: Instant,
    first_token: Option<Instant>,
    /// What was sent before ended the answer: only the last event was lost.
    ended: Option<FinishReason>,
}

/// What a token does to its answer.
pub(crate) struct Step {
    /// The token, to be handed to the engine; none when it ends the answer and is not part of it.
    pub token: Option<i32>,
    /// For the client; none when the token ends the answer.
    pub event: Option<GenerateEvent>,
    /// Whether the model or a stop string ends the answer here.
    pub stopped: bool,
}

impl Answer {
    pub fn new(body: Box<GenerateRequest>, prompt: &[i32], vocab: &Vocab) -> Result<Self, RequestError> {
        let refused = |e: LlamaError| RequestError::new(ErrorKind::BadRequest, e.to_string());
        let mut sampler = Sampler::new(&body.sampling, vocab).map_err(refused)?;
        sampler.accept_prompt(prompt);
        let mut text = TextStream::new(body.stop.clone());
        // An answer that is taken up again: sampler and text become what they were, and nothing is said twice.
        for token in &body.resume {
            sampler.replay(*token);
            text.push(&vocab.piece(*token, false));
        }
        let sent = body.resume.len() as u32;
        let ended = match body.max_tokens {
            _ if text.is_stopped() => Some(FinishReason::Stop),
            Some(most) if sent >= most => Some(FinishReason::Length),
            _ => None,
        };
        let usage = Usage { prompt_tokens: prompt.len() as u32, completion_tokens: sent, ..Usage::default() };
        let now = Instant::now();
        let prompt = prompt.to_vec();
        Ok(Self { body, prompt, sampler, text, usage, submitted: now, admitted: now, first_token: None, ended })
    }

    /// Why there is nothing to add to what was sent before.
    pub fn ended(&self) -> Option<FinishReason> {
        self.ended
    }

    /// The tokens that may still come.
    pub fn tokens_left(&self) -> Option<u32> {
        self.body.max_tokens.map(|most| most.saturating_sub(self.usage.completion_tokens))
    }

    /// What was sent before.
    pub fn resumed(&self) -> &[i32] {
        &self.body.resume
    }

    /// A slot is free, and so many tokens of the prompt are in its caches already.
    pub fn started(&mut self, cached: u32) -> GenerateEvent {
        self.admitted = Instant::now();
        self.usage.queue_us = micros(self.submitted, self.admitted);
        self.usage.cached_tokens = cached.min(self.usage.prompt_tokens);
        GenerateEvent::Started { prompt: std::mem::take(&mut self.prompt) }
    }

    /// Chooses the next token from `logits`.
    pub fn step(&mut self, logits: &[f32], vocab: &Vocab) -> Result<Step, RequestError> {
        let internal = |e: LlamaError| RequestError::new(ErrorKind::Internal, e.to_string());
        let token = self.sampler.sample(logits).map_err(internal)?;
        self.sampler.accept(token);
        let now = Instant::now();
        let first = *self.first_token.get_or_insert(now);
        self.usage.prefill_us = micros(self.admitted, first);
        self.usage.decode_us = micros(first, now);
        if vocab.is_eog(token) && !self.body.ignore_eos {
            return Ok(Step { token: None, event: None, stopped: true });
        }
        self.usage.completion_tokens += 1;
        let piece = self.text.push(&vocab.piece(token, false));
        let scored = self.body.logprobs.map(|n| logprob(logits, token, n as usize, vocab));
        let logprob = scored.transpose().map_err(internal)?;
        let logits = self.body.raw_logits.then(|| logits.to_vec());
        let event = GenerateEvent::Token { token, text: piece.text, logprob, logits };
        Ok(Step { token: Some(token), event: Some(event), stopped: piece.stopped })
    }

    /// What speculation did for it, all in all.
    pub fn speculated(&mut self, stats: SequenceStats) {
        self.usage.drafted_tokens = stats.guessed;
        self.usage.accepted_tokens = stats.accepted;
    }

    /// The answer is complete.
    pub fn finish(mut self, reason: FinishReason) -> GenerateEvent {
        GenerateEvent::Finished { reason, text: self.text.finish(), usage: self.usage }
    }
}

fn micros(from: Instant, to: Instant) -> u64 {
    to.saturating_duration_since(from).as_micros() as u64
}

fn logprob(logits: &[f32], chosen: i32, n: usize, vocab: &Vocab) -> Result<TokenLogprob, LlamaError> {
    let alternative = |(token, logprob)| Alternative { token, bytes: vocab.piece(token, true), logprob };
    let (own, top) = capstan_llama::logprobs(logits, chosen, n)?;
    Ok(TokenLogprob { chosen: alternative((chosen, own)), top: top.into_iter().map(alternative).collect() })
}
