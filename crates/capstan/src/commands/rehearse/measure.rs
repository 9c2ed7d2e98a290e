//! Time to the first token and tokens per second, over HTTP like any client's. Prompts are random token ids: no two begin
//! alike, and no tokenizer is needed. Tokens are drawn at temperature 1, so that they and their experts differ.
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use futures::future::try_join_all;
use serde::Serialize;
use serde_json::{Value, json};

use super::RehearseArgs;
use crate::client::Client;

/// Tokens of the prompts of answers whose speed is measured: enough to fill a first micro-batch, quick to prefill.
pub(super) const SHORT_PROMPT: u32 = 16;
/// Tokens of the answer that warms everything up.
const WARM_TOKENS: u32 = 2;
/// Longest time of one answer: a trillion weights on a small machine take minutes.
const TIMEOUT: Duration = Duration::from_secs(3600);

/// A prompt length and how long its first token took.
#[derive(Clone, Debug, Serialize)]
pub(super) struct FirstToken {
    /// Length of the prompt.
    pub(super) prompt_tokens: u32,
    /// From the request to the answer of one token, over HTTP, in seconds.
    pub(super) ttft_s: f64,
}

/// How fast so many answers are made at once.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Decode {
    /// Answers at once.
    pub(super) concurrency: u32,
    /// Tokens of all answers.
    pub(super) tokens: u64,
    /// Tokens a second of all answers together, first tokens left out.
    pub(super) tokens_per_s: f64,
}

/// What was measured.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Measured {
    pub(super) first_token: Vec<FirstToken>,
    pub(super) decode: Vec<Decode>,
}

/// What is asked of a loaded rehearsal.
pub(super) struct Trial<'a> {
    client: &'a Client,
    name: &'a str,
    n_vocab: u32,
    args: &'a RehearseArgs,
}

impl<'a> Trial<'a> {
    pub(super) fn new(client: &'a Client, name: &'a str, n_vocab: u32, args: &'a RehearseArgs) -> Self {
        Self { client, name, n_vocab, args }
    }

    /// Measures one thing after another.
    pub(super) async fn measure(&self) -> Result<Measured> {
        self.ask(SHORT_PROMPT, WARM_TOKENS).await?;
        let mut first_token = Vec::new();
        for &prompt_tokens in &self.args.prompt_tokens {
            let asked = Instant::now();
            self.ask(prompt_tokens, 1).await?;
            first_token.push(FirstToken { prompt_tokens, ttft_s: asked.elapsed().as_secs_f64() });
        }
        let mut decode = Vec::new();
        for &concurrency in &self.args.concurrency {
            decode.push(self.decode(concurrency).await?);
        }
        Ok(Measured { first_token, decode })
    }

    async fn decode(&self, concurrency: u32) -> Result<Decode> {
        let usages = try_join_all((0..concurrency).map(|_| self.ask(SHORT_PROMPT, self.args.tokens))).await?;
        let number = |usage: &Value, path: &str| usage.pointer(path).and_then(Value::as_u64).unwrap_or(0);
        let tokens = usages.iter().map(|u| number(u, "/completion_tokens")).sum::<u64>();
        let span_us = usages.iter().map(|u| number(u, "/capstan/decode_us")).max().unwrap_or(0);
        let later = tokens.saturating_sub(u64::from(concurrency)) as f64;
        Ok(Decode { concurrency, tokens, tokens_per_s: later / (span_us.max(1) as f64 / 1e6) })
    }

    /// One answer's usage.
    async fn ask(&self, prompt_tokens: u32, max_tokens: u32) -> Result<Value> {
        let most = i32::try_from(self.n_vocab).unwrap_or(i32::MAX).max(1);
        let prompt: Vec<i32> = (0..prompt_tokens).map(|_| rand::random_range(0..most)).collect();
        let body = json!({
            "model": self.name,
            "prompt": prompt,
            "max_tokens": max_tokens,
            "temperature": 1.0,
            "ignore_eos": true,
        });
        let mut answer = self.client.complete(body, TIMEOUT).await.context("the rehearsal could not answer")?;
        Ok(answer["usage"].take())
    }
}
