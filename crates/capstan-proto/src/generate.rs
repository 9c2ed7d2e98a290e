//! A request for tokens, and the events that answer it.
use serde::{Deserialize, Serialize};

use crate::limits;

/// What the model continues.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Prompt {
    /// A conversation, rendered by the model's chat template. JSON travels as text: postcard cannot carry it otherwise.
    Chat {
        /// JSON array of `{role, content, ...}`.
        messages: String,
        /// JSON array of tool definitions.
        tools: Option<String>,
        /// JSON object of further template variables.
        template_kwargs: Option<String>,
    },
    /// Plain text; special tokens in it are parsed, the beginning-of-text token is added where the model wants it.
    Text(String),
    /// Ready tokens, taken as they are.
    Tokens(Vec<i32>),
}

/// How a token is chosen from the logits. The defaults are OpenAI's: temperature 1, nothing else.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Sampling {
    /// 0 is greedy.
    pub temperature: f32,
    /// Keep the k likeliest; 0 keeps all.
    pub top_k: u32,
    /// Keep the likeliest whose probabilities sum to this; 1 keeps all.
    pub top_p: f32,
    /// Drop what is less likely than this share of the likeliest; 0 keeps all.
    pub min_p: f32,
    /// Divide the logits of recent tokens by this; 1 is off.
    pub repeat_penalty: f32,
    /// How many recent tokens the three penalties look at.
    pub repeat_last_n: u32,
    /// Subtracted from a recent token's logit for each occurrence.
    pub frequency_penalty: f32,
    /// Subtracted once from a recent token's logit.
    pub presence_penalty: f32,
    /// The same seed gives the same choices; none is drawn at random.
    pub seed: Option<u32>,
    /// Added to the logits of these tokens.
    pub logit_bias: Vec<(i32, f32)>,
}

impl Default for Sampling {
    fn default() -> Self {
        Self {
            temperature: 1.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repeat_penalty: 1.0,
            repeat_last_n: 64,
            frequency_penalty: 0.0,
            presence_penalty: 0.0,
            seed: None,
            logit_bias: Vec::new(),
        }
    }
}

/// A request for tokens.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct GenerateRequest {
    /// The deployment's name.
    pub model: String,
    /// What to continue.
    pub prompt: Prompt,
    /// At most this many tokens; none fills the context.
    pub max_tokens: Option<u32>,
    /// How to choose.
    pub sampling: Sampling,
    /// The answer ends before any of these.
    pub stop: Vec<String>,
    /// Go on after an end-of-generation token (benchmarks).
    pub ignore_eos: bool,
    /// Log-probabilities with each token, and of this many alternatives.
    pub logprobs: Option<u32>,
    /// Send the raw logits with each token. For proofs of exactness; it multiplies the traffic.
    pub raw_logits: bool,
    /// Tokens of this answer that were sent already, by a driver that was lost. The answer goes on behind them; none is
    /// sent again, and `max_tokens` counts them.
    pub resume: Vec<i32>,
}

impl GenerateRequest {
    /// A request with everything at its default.
    pub fn new(model: impl Into<String>, prompt: Prompt) -> Self {
        Self {
            model: model.into(),
            prompt,
            max_tokens: None,
            sampling: Sampling::default(),
            stop: Vec::new(),
            ignore_eos: false,
            logprobs: None,
            raw_logits: false,
            resume: Vec::new(),
        }
    }

    /// Size of the prompt as it was sent, in bytes.
    pub fn prompt_bytes(&self) -> usize {
        match &self.prompt {
            Prompt::Chat { messages, tools, template_kwargs } => {
                messages.len() + tools.as_ref().map_or(0, String::len) + template_kwargs.as_ref().map_or(0, String::len)
            }
            Prompt::Text(t) => t.len(),
            Prompt::Tokens(t) => t.len() * 4,
        }
    }

    /// Checks every number and length, so that what follows may rely on them.
    pub fn check(&self) -> Result<(), RequestError> {
        let bad = |m: String| Err(RequestError::new(ErrorKind::BadRequest, m));
        let s = &self.sampling;
        let bytes = self.prompt_bytes();
        if bytes > limits::PROMPT_BYTES_MAX {
            return bad(format!("the prompt has {bytes} bytes; at most {} are taken", limits::PROMPT_BYTES_MAX));
        }
        if self.resume.len() * 4 > limits::PROMPT_BYTES_MAX {
            return bad(format!("an answer of {} tokens is too long to be taken up again", self.resume.len()));
        }
        if self.max_tokens == Some(0) {
            return bad("max_tokens is 0; ask for at least one token".into());
        }
        for (name, value, low, high) in [
            ("temperature", s.temperature, 0.0, 100.0),
            ("top_p", s.top_p, 0.0, 1.0),
            ("min_p", s.min_p, 0.0, 1.0),
            ("repeat_penalty", s.repeat_penalty, 0.01, 100.0),
            ("frequency_penalty", s.frequency_penalty, -100.0, 100.0),
            ("presence_penalty", s.presence_penalty, -100.0, 100.0),
        ] {
            if !(low..=high).contains(&value) {
                return bad(format!("{name} is {value}; it must be between {low} and {high}"));
            }
        }
        if s.logit_bias.len() > 1024 || s.logit_bias.iter().any(|(_, b)| b.is_nan()) {
            return bad("logit_bias takes at most 1024 tokens, each with a number".into());
        }
        if self.stop.len() > limits::STOPS_MAX
            || self.stop.iter().any(|s| s.is_empty() || s.len() > limits::STOP_BYTES_MAX)
        {
            return bad(format!(
                "stop takes at most {} strings of 1 to {} bytes",
                limits::STOPS_MAX,
                limits::STOP_BYTES_MAX
            ));
        }
        if self.logprobs.is_some_and(|n| n > 20) {
            return bad("top_logprobs is at most 20".into());
        }
        Ok(())
    }
}

/// One alternative with its log-probability.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Alternative {
    /// The token.
    pub token: i32,
    /// Its bytes.
    pub bytes: Vec<u8>,
    /// Natural logarithm of its probability before any sampling rule.
    pub logprob: f32,
}

/// A chosen token's log-probability and the likeliest alternatives, likeliest first.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TokenLogprob {
    /// The chosen token.
    pub chosen: Alternative,
    /// The likeliest tokens.
    pub top: Vec<Alternative>,
}

/// Why an answer ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FinishReason {
    /// An end-of-generation token or a stop string.
    Stop,
    /// `max_tokens`, or the context is full.
    Length,
    /// The client went away or cancelled.
    Cancelled,
}

/// Tokens counted, and what they took.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Usage {
    /// Tokens of the prompt.
    pub prompt_tokens: u32,
    /// Of these, taken from a cached prefix.
    pub cached_tokens: u32,
    /// Tokens generated.
    pub completion_tokens: u32,
    /// Tokens that were guessed ahead.
    pub drafted_tokens: u32,
    /// Guesses that the model confirmed.
    pub accepted_tokens: u32,
    /// From admission to the driver's queue until a slot was free, in microseconds.
    pub queue_us: u64,
    /// From the slot until the first token was sampled, in microseconds.
    pub prefill_us: u64,
    /// From the first token until the last, in microseconds.
    pub decode_us: u64,
}

/// What happens to a request, in order: `Started`, `Token`*, then `Finished` or `Failed`. Where a stage is lost, the
/// daemon that took the request puts in `Paused` and goes on; a driver never sends that.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum GenerateEvent {
    /// A slot is free and the prompt is being prefilled.
    Started {
        /// The prompt's tokens, so that another driver can take the answer up if this one is lost.
        prompt: Vec<i32>,
    },
    /// One more token. `text` may be empty: the bytes wait for the rest of a character or of a possible stop string.
    Token {
        /// The token.
        token: i32,
        /// Text that is now certain.
        text: String,
        /// When asked for.
        logprob: Option<TokenLogprob>,
        /// When asked for: the logits the token was chosen from, one per vocabulary entry.
        logits: Option<Vec<f32>>,
    },
    /// The answer is complete; `text` is what was still held back.
    Finished {
        /// Why.
        reason: FinishReason,
        /// The rest of the text.
        text: String,
        /// Counts and times.
        usage: Usage,
    },
    /// The request ended without a complete answer.
    Failed(RequestError),
    /// The answer waits until the model's stages stand again, and then goes on.
    Paused {
        /// For people: what it waits for.
        reason: String,
    },
}

/// What a caller can do about a failed request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ErrorKind {
    /// The request is wrong: mend it. HTTP 400.
    BadRequest,
    /// The prompt does not fit the context. HTTP 400 with OpenAI's `context_length_exceeded`.
    ContextExceeded,
    /// No such model is loaded. HTTP 404.
    ModelNotFound,
    /// The queue is full: come back later. HTTP 429.
    Busy,
    /// A stage was lost while the answer was being made; it is being started again. HTTP 503.
    StageLost,
    /// The model is loading or its nodes are away. HTTP 503.
    Unavailable,
    /// A fault of ours. HTTP 500.
    Internal,
}

/// A failed request: what kind, and a sentence that says what happened and what to do.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct RequestError {
    /// What the caller can do.
    pub kind: ErrorKind,
    /// For people.
    pub message: String,
}

impl RequestError {
    /// An error of this kind with this sentence.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into() }
    }
}
