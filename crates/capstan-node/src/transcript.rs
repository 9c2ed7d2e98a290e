//! What a request has brought so far, so that another driver can go on with it.
use std::time::Instant;

use capstan_proto::generate::{GenerateEvent, GenerateRequest, Prompt, Usage};

/// Attempts without a single new token after which a request is given up: one that takes its stage down with it must
/// not do so for ever.
const FRUITLESS_MAX: u32 = 5;

/// A request's log: its prompt as tokens, and every token that was handed on to the client.
pub(crate) struct Transcript {
    request: GenerateRequest,
    tokens: Vec<i32>,
    /// Attempts that began, and those of them since the last token.
    attempts: u32,
    fruitless: u32,
    submitted: Instant,
    started: Option<Instant>,
    first_token: Option<Instant>,
    last_token: Option<Instant>,
}

impl Transcript {
    /// A new request. Its seed is fixed here: whoever goes on with it must draw the same numbers.
    pub(crate) fn new(mut request: GenerateRequest) -> Self {
        request.sampling.seed.get_or_insert_with(rand::random);
        // What was sent is known here and not by the caller.
        request.resume.clear();
        Self {
            request,
            tokens: Vec::new(),
            attempts: 0,
            fruitless: 0,
            submitted: Instant::now(),
            started: None,
            first_token: None,
            last_token: None,
        }
    }

    pub(crate) fn model(&self) -> &str {
        &self.request.model
    }

    /// Tokens that the client has.
    pub(crate) fn len(&self) -> usize {
        self.tokens.len()
    }

    /// Whether a driver had it already.
    pub(crate) fn begun(&self) -> bool {
        self.attempts > 0
    }

    /// The request that goes on where this one is.
    pub(crate) fn request(&self) -> GenerateRequest {
        GenerateRequest { resume: self.tokens.clone(), ..self.request.clone() }
    }

    /// A driver took it.
    pub(crate) fn taken(&mut self) {
        self.attempts += 1;
        self.fruitless += 1;
    }

    /// Whether it is on its second attempt at least.
    pub(crate) fn resumed(&self) -> bool {
        self.attempts > 1
    }

    /// A driver took it and had no room after all.
    pub(crate) fn sent_back(&mut self) {
        self.fruitless = self.fruitless.saturating_sub(1);
    }

    /// Whether another attempt makes sense.
    pub(crate) fn may_go_on(&self) -> bool {
        self.fruitless < FRUITLESS_MAX
    }

    /// Notes an event on its way to the client.
    pub(crate) fn note(&mut self, event: GenerateEvent) -> GenerateEvent {
        let now = Instant::now();
        match event {
            GenerateEvent::Started { prompt } => {
                self.started.get_or_insert(now);
                // A template may tell the date, which another driver would render otherwise after midnight.
                if !prompt.is_empty() {
                    self.request.prompt = Prompt::Tokens(prompt.clone());
                }
                GenerateEvent::Started { prompt }
            }
            GenerateEvent::Token { token, text, logprob, logits } => {
                self.tokens.push(token);
                self.fruitless = 0;
                self.first_token.get_or_insert(now);
                self.last_token = Some(now);
                GenerateEvent::Token { token, text, logprob, logits }
            }
            GenerateEvent::Finished { reason, text, usage } => {
                GenerateEvent::Finished { reason, text, usage: self.usage(usage) }
            }
            other => other,
        }
    }

    /// The last driver knows only its own part of the times.
    fn usage(&self, last: Usage) -> Usage {
        let (Some(started), Some(first), Some(end)) = (self.started, self.first_token, self.last_token) else {
            return last;
        };
        if !self.resumed() {
            return last;
        }
        let us = |from: Instant, to: Instant| to.saturating_duration_since(from).as_micros() as u64;
        Usage {
            queue_us: us(self.submitted, started),
            prefill_us: us(started, first),
            decode_us: us(first, end),
            ..last
        }
    }
}

#[cfg(test)]
mod tests {
    use capstan_proto::generate::FinishReason;

    use super::*;

    fn token(token: i32) -> GenerateEvent {
        GenerateEvent::Token { token, text: "x".into(), logprob: None, logits: None }
    }

    #[test]
    fn the_next_driver_gets_the_prompt_as_tokens_the_same_seed_and_what_was_sent() {
        let mut t = Transcript::new(GenerateRequest::new("m", Prompt::Text("hello".into())));
        let first = t.request();
        assert!(first.sampling.seed.is_some() && first.resume.is_empty() && !t.begun());
        t.taken();
        t.note(GenerateEvent::Started { prompt: vec![1, 2] });
        t.note(token(7));
        t.note(token(8));
        let next = t.request();
        assert_eq!((next.prompt, next.resume), (Prompt::Tokens(vec![1, 2]), vec![7, 8]));
        assert_eq!(next.sampling, first.sampling);
    }

    #[test]
    fn a_request_that_brings_nothing_is_given_up_and_one_that_brings_a_token_is_not() {
        let mut t = Transcript::new(GenerateRequest::new("m", Prompt::Tokens(vec![1])));
        for _ in 0..FRUITLESS_MAX - 1 {
            t.taken();
            assert!(t.may_go_on());
        }
        t.note(token(1));
        for _ in 0..FRUITLESS_MAX {
            assert!(t.may_go_on());
            t.taken();
        }
        assert!(!t.may_go_on());
    }

    #[test]
    fn times_span_all_attempts() {
        let mut t = Transcript::new(GenerateRequest::new("m", Prompt::Tokens(vec![1])));
        let usage = Usage { decode_us: 1, completion_tokens: 2, ..Usage::default() };
        let end = |t: &mut Transcript| match t.note(GenerateEvent::Finished {
            reason: FinishReason::Stop,
            text: String::new(),
            usage,
        }) {
            GenerateEvent::Finished { usage, .. } => usage,
            other => panic!("{other:?}"),
        };
        t.taken();
        t.note(GenerateEvent::Started { prompt: vec![1] });
        t.note(token(1));
        assert_eq!(end(&mut t), usage);
        t.taken();
        t.note(token(2));
        let whole = end(&mut t);
        assert_eq!(whole.completion_tokens, 2);
        assert_eq!(whole.decode_us, t.last_token.unwrap().duration_since(t.first_token.unwrap()).as_micros() as u64);
    }
}
