//! One streamed chat answer: what is asked, the pieces as they come, and what they took.
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::client::{Client, ClientError, LineStream};
use crate::lines::Events;

/// A turn of a conversation.
#[derive(Clone, Debug, Serialize)]
pub struct Message {
    /// `system`, `user` or `assistant`.
    pub role: &'static str,
    /// What was said.
    pub content: String,
}

impl Message {
    /// A turn of `role`.
    pub fn new(role: &'static str, content: impl Into<String>) -> Self {
        Self { role, content: content.into() }
    }
}

/// Token counts and times, as the driver measured them.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
#[serde(default)]
pub struct Usage {
    /// Tokens of the prompt.
    pub prompt_tokens: u64,
    /// Tokens generated.
    pub completion_tokens: u64,
    /// Of the prompt's tokens, those that needed no work.
    pub prompt_tokens_details: PromptDetails,
    /// How long the parts took and what was guessed: Capstan's own addition to OpenAI's object.
    pub capstan: Timings,
}

/// More about a prompt's tokens.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
#[serde(default)]
pub struct PromptDetails {
    /// Found in the cache from an earlier request.
    pub cached_tokens: u64,
}

/// How long the parts of an answer took, in microseconds, and how many of its tokens were guessed.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
#[serde(default)]
pub struct Timings {
    /// Waiting for a slot.
    pub queue_us: u64,
    /// From the slot to the first token.
    pub prefill_us: u64,
    /// From the first token to the last.
    pub decode_us: u64,
    /// Tokens that were guessed ahead.
    pub drafted_tokens: u64,
    /// Guesses that the model confirmed.
    pub accepted_tokens: u64,
}

/// What an answer took.
#[derive(Clone, Debug, Serialize)]
pub struct Stats {
    /// From the request to the first text, in milliseconds, as seen here.
    pub ttft_ms: f64,
    /// Tokens of the prompt.
    pub prompt_tokens: u64,
    /// Tokens generated.
    pub completion_tokens: u64,
    /// Speed of the prefill; none when it was too short to tell.
    pub prefill_tokens_per_s: Option<f64>,
    /// Speed of the decode; none for a single token.
    pub decode_tokens_per_s: Option<f64>,
    /// Of the prompt's tokens, those found in the cache.
    pub cached_tokens: u64,
    /// Tokens that were guessed ahead.
    pub drafted_tokens: u64,
    /// Guesses that the model confirmed.
    pub accepted_tokens: u64,
}

impl Stats {
    fn new(usage: &Usage, ttft: Duration) -> Self {
        let rate = |tokens: u64, us: u64| (tokens > 0 && us > 0).then(|| tokens as f64 * 1e6 / us as f64);
        let computed = usage.prompt_tokens.saturating_sub(usage.prompt_tokens_details.cached_tokens);
        Self {
            ttft_ms: ttft.as_secs_f64() * 1000.0,
            prompt_tokens: usage.prompt_tokens,
            completion_tokens: usage.completion_tokens,
            prefill_tokens_per_s: rate(computed, usage.capstan.prefill_us),
            // The first token belongs to the prefill.
            decode_tokens_per_s: rate(usage.completion_tokens.saturating_sub(1), usage.capstan.decode_us),
            cached_tokens: usage.prompt_tokens_details.cached_tokens,
            drafted_tokens: usage.capstan.drafted_tokens,
            accepted_tokens: usage.capstan.accepted_tokens,
        }
    }

    /// One line for people.
    pub fn line(&self) -> String {
        let speed = |v: Option<f64>| v.map_or("–".to_string(), |v| format!("{v:.1} tokens/s"));
        let cached = match self.cached_tokens {
            0 => String::new(),
            n => format!(", {n} cached"),
        };
        let guessed = match self.drafted_tokens {
            0 => String::new(),
            n => format!(" · {} of {n} guesses right", self.accepted_tokens),
        };
        format!(
            "TTFT {:.0} ms · prefill {} ({} tokens{cached}) · decode {} ({} tokens){guessed}",
            self.ttft_ms,
            speed(self.prefill_tokens_per_s),
            self.prompt_tokens,
            speed(self.decode_tokens_per_s),
            self.completion_tokens
        )
    }
}

/// What an answer brings.
#[derive(Debug)]
pub enum Piece {
    /// More text.
    Text(String),
    /// The answer is complete.
    Done {
        /// `stop` or `length`.
        reason: Option<String>,
        /// What it took; none when the daemon did not say.
        stats: Option<Stats>,
    },
}

#[derive(Deserialize)]
struct Chunk {
    #[serde(default)]
    choices: Vec<Choice>,
    usage: Option<Usage>,
    error: Option<ApiError>,
}

#[derive(Deserialize)]
struct Choice {
    #[serde(default)]
    delta: Delta,
    finish_reason: Option<String>,
}

#[derive(Default, Deserialize)]
struct Delta {
    content: Option<String>,
}

#[derive(Deserialize)]
struct ApiError {
    message: String,
}

/// An answer on its way. Dropping it cancels it, which frees its slot.
#[derive(Debug)]
pub struct Answer {
    lines: LineStream,
    events: Events,
    asked: Instant,
    ttft: Option<Duration>,
    reason: Option<String>,
    usage: Option<Usage>,
    done: bool,
}

impl Answer {
    /// Asks `model` to continue a conversation. `sampling` holds further members of the request, as OpenAI names them.
    pub async fn ask(
        client: &Client,
        model: &str,
        messages: &[Message],
        sampling: &Map<String, Value>,
    ) -> Result<Self, ClientError> {
        let mut body = json!({
            "model": model,
            "messages": messages,
            "stream": true,
            "stream_options": { "include_usage": true },
        });
        if let Some(body) = body.as_object_mut() {
            body.extend(sampling.clone());
        }
        let asked = Instant::now();
        let lines = client.chat(body).await?;
        let events = Events::default();
        Ok(Self { lines, events, asked, ttft: None, reason: None, usage: None, done: false })
    }

    /// The next piece; none after [`Piece::Done`].
    pub async fn next(&mut self) -> Result<Option<Piece>, ClientError> {
        while !self.done {
            let Some(line) = self.lines.next_line().await? else {
                return Err(ClientError::Refused {
                    status: 502,
                    message: "the answer broke off before its end; ask again".into(),
                });
            };
            let Some(data) = self.events.line(&line) else { continue };
            if data == "[DONE]" {
                self.done = true;
                let ttft = self.ttft.unwrap_or_else(|| self.asked.elapsed());
                let stats = self.usage.as_ref().map(|usage| Stats::new(usage, ttft));
                return Ok(Some(Piece::Done { reason: self.reason.take(), stats }));
            }
            if let Some(text) = self.take(&data)? {
                self.ttft.get_or_insert_with(|| self.asked.elapsed());
                return Ok(Some(Piece::Text(text)));
            }
        }
        Ok(None)
    }

    fn take(&mut self, data: &str) -> Result<Option<String>, ClientError> {
        let chunk: Chunk = serde_json::from_str(data).map_err(|e| ClientError::Malformed(e.to_string()))?;
        if let Some(error) = chunk.error {
            return Err(ClientError::Refused { status: 500, message: crate::view::plain_text(&error.message) });
        }
        if chunk.usage.is_some() {
            self.usage = chunk.usage;
        }
        let mut text = String::new();
        for choice in chunk.choices {
            text.push_str(choice.delta.content.as_deref().unwrap_or_default());
            if choice.finish_reason.is_some() {
                self.reason = choice.finish_reason;
            }
        }
        Ok(Some(text).filter(|t| !t.is_empty()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn speeds_follow_from_counts_and_times() {
        let usage: Usage = serde_json::from_value(json!({
            "prompt_tokens": 100, "completion_tokens": 11, "total_tokens": 111,
            "capstan": { "queue_us": 0, "prefill_us": 500_000, "decode_us": 1_000_000 }
        }))
        .unwrap();
        let stats = Stats::new(&usage, Duration::from_millis(510));
        assert_eq!((stats.prefill_tokens_per_s, stats.decode_tokens_per_s), (Some(200.0), Some(10.0)));
        assert_eq!(
            stats.line(),
            "TTFT 510 ms · prefill 200.0 tokens/s (100 tokens) · decode 10.0 tokens/s (11 tokens)"
        );
        assert_eq!(Stats::new(&Usage::default(), Duration::ZERO).decode_tokens_per_s, None);
        let more = Stats { cached_tokens: 64, drafted_tokens: 8, accepted_tokens: 5, ..stats };
        assert_eq!(
            more.line(),
            "TTFT 510 ms · prefill 200.0 tokens/s (100 tokens, 64 cached) · decode 10.0 tokens/s (11 tokens) · \
             5 of 8 guesses right"
        );
    }
}
