//! OpenAI's requests, checked, become a `GenerateRequest`. Fields that are not known are ignored.
use std::collections::BTreeMap;

use capstan_proto::generate::{GenerateRequest, Prompt, Sampling};
use serde::Deserialize;
use serde_json::Value;

use crate::error::ApiError;

/// One value or several.
#[derive(Clone, Debug, Deserialize)]
#[serde(untagged, expecting = "expected a string or an array of strings")]
pub(crate) enum OneOrMany {
    One(String),
    Many(Vec<String>),
}

/// The prompt of a completion.
#[derive(Clone, Debug, Deserialize)]
#[serde(untagged, expecting = "expected a string, an array with one string, or an array of token ids")]
pub(crate) enum CompletionPrompt {
    Text(String),
    Tokens(Vec<i32>),
    Texts(Vec<String>),
    TokenLists(Vec<Vec<i32>>),
}

/// How a stream is told.
#[derive(Clone, Copy, Debug, Default, Deserialize)]
pub(crate) struct StreamOptions {
    #[serde(default)]
    include_usage: Option<bool>,
}

/// What chat and plain completions share.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub(crate) struct Common {
    pub model: Option<String>,
    pub stream: Option<bool>,
    stream_options: Option<StreamOptions>,
    n: Option<u32>,
    max_tokens: Option<u32>,
    temperature: Option<f32>,
    top_p: Option<f32>,
    top_k: Option<i64>,
    min_p: Option<f32>,
    repeat_penalty: Option<f32>,
    repetition_penalty: Option<f32>,
    repeat_last_n: Option<u32>,
    frequency_penalty: Option<f32>,
    presence_penalty: Option<f32>,
    seed: Option<i64>,
    logit_bias: Option<BTreeMap<String, f32>>,
    stop: Option<OneOrMany>,
    ignore_eos: Option<bool>,
}

/// What is `POST /v1/chat/completions`' own.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub(crate) struct ChatRequest {
    messages: Option<Value>,
    max_completion_tokens: Option<u32>,
    logprobs: Option<bool>,
    top_logprobs: Option<u32>,
    tools: Option<Vec<Value>>,
    tool_choice: Option<Value>,
    response_format: Option<Value>,
    chat_template_kwargs: Option<Value>,
}

/// What is `POST /v1/completions`' own.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub(crate) struct CompletionRequest {
    prompt: Option<CompletionPrompt>,
    logprobs: Option<u32>,
    echo: Option<bool>,
    best_of: Option<u32>,
    suffix: Option<String>,
}

impl Common {
    /// Whether the answer is streamed, and whether its last chunk carries the usage.
    pub fn streaming(&self) -> (bool, bool) {
        (self.stream.unwrap_or(false), self.stream_options.and_then(|o| o.include_usage).unwrap_or(false))
    }

    fn generate(&self, model: &str, prompt: Prompt) -> Result<GenerateRequest, ApiError> {
        if self.n.is_some_and(|n| n != 1) {
            return Err(ApiError::bad(
                "n",
                "only one answer a request is made; leave n out and send the request again for another",
            ));
        }
        let defaults = Sampling::default();
        let top_k = match self.top_k {
            // Others use -1 for "all".
            None | Some(-1) => defaults.top_k,
            Some(k) => u32::try_from(k)
                .map_err(|_| ApiError::bad("top_k", "top_k must not be negative; 0 keeps all tokens"))?,
        };
        Ok(GenerateRequest {
            max_tokens: self.max_tokens,
            sampling: Sampling {
                temperature: self.temperature.unwrap_or(defaults.temperature),
                top_k,
                top_p: self.top_p.unwrap_or(defaults.top_p),
                min_p: self.min_p.unwrap_or(defaults.min_p),
                repeat_penalty: self.repeat_penalty.or(self.repetition_penalty).unwrap_or(defaults.repeat_penalty),
                repeat_last_n: self.repeat_last_n.unwrap_or(defaults.repeat_last_n),
                frequency_penalty: self.frequency_penalty.unwrap_or(defaults.frequency_penalty),
                presence_penalty: self.presence_penalty.unwrap_or(defaults.presence_penalty),
                // OpenAI's seeds have 64 bits; both halves count.
                seed: self.seed.map(|s| (s as u64 ^ (s as u64 >> 32)) as u32),
                logit_bias: self.biases()?,
            },
            stop: match self.stop.clone() {
                None => Vec::new(),
                Some(OneOrMany::One(stop)) => vec![stop],
                Some(OneOrMany::Many(stops)) => stops,
            },
            ignore_eos: self.ignore_eos.unwrap_or(false),
            ..GenerateRequest::new(model, prompt)
        })
    }

    fn biases(&self) -> Result<Vec<(i32, f32)>, ApiError> {
        let bad = |_| ApiError::bad("logit_bias", "logit_bias maps token ids to numbers; each key must be a token id");
        let entries = self.logit_bias.iter().flatten();
        entries.map(|(token, bias)| Ok((token.parse::<i32>().map_err(bad)?, *bias))).collect()
    }
}

impl ChatRequest {
    /// The request for tokens, for the deployment `model`.
    pub fn generate(self, common: &Common, model: &str) -> Result<GenerateRequest, ApiError> {
        let messages = match self.messages {
            Some(Value::Array(list)) if !list.is_empty() => Value::Array(list).to_string(),
            Some(Value::Array(_)) => {
                return Err(ApiError::bad("messages", "messages is empty; send at least one message"));
            }
            _ => return Err(ApiError::bad("messages", "messages must be an array of objects with a role and content")),
        };
        let with_tools = match self.tool_choice.as_ref().map(|c| (c, c.as_str())) {
            None | Some((Value::Null, _) | (_, Some("auto"))) => true,
            Some((_, Some("none"))) => false,
            Some(_) => {
                return Err(ApiError::bad(
                    "tool_choice",
                    "tool_choice is \"auto\" or \"none\"; forcing a tool is not supported yet",
                ));
            }
        };
        let format = self.response_format.as_ref().filter(|f| !f.is_null());
        if format.is_some_and(|f| f.get("type").and_then(Value::as_str) != Some("text")) {
            let message = "response_format other than {\"type\": \"text\"} is not supported yet; ask for the format in the prompt";
            return Err(ApiError::bad("response_format", message));
        }
        let logprobs = match (self.logprobs.unwrap_or(false), self.top_logprobs) {
            (true, top) => Some(top.unwrap_or(0)),
            (false, None | Some(0)) => None,
            (false, _) => return Err(ApiError::bad("top_logprobs", "top_logprobs needs \"logprobs\": true")),
        };
        let prompt = Prompt::Chat {
            messages,
            tools: self.tools.filter(|t| with_tools && !t.is_empty()).map(|t| Value::Array(t).to_string()),
            template_kwargs: self.chat_template_kwargs.filter(|k| !k.is_null()).map(|k| k.to_string()),
        };
        let request = common.generate(model, prompt)?;
        let max_tokens = self.max_completion_tokens.or(request.max_tokens);
        checked(GenerateRequest { logprobs, max_tokens, ..request })
    }
}

impl CompletionRequest {
    /// The request for tokens, for the deployment `model`.
    pub fn generate(self, common: &Common, model: &str) -> Result<GenerateRequest, ApiError> {
        let one =
            "prompt must be a string, an array of one string, or an array of token ids; send a request for each prompt";
        let prompt = match self.prompt {
            Some(CompletionPrompt::Text(text)) => Prompt::Text(text),
            Some(CompletionPrompt::Tokens(tokens)) if !tokens.is_empty() => Prompt::Tokens(tokens),
            Some(CompletionPrompt::Texts(texts)) => {
                let [text] = <[String; 1]>::try_from(texts).map_err(|_| ApiError::bad("prompt", one))?;
                Prompt::Text(text)
            }
            Some(CompletionPrompt::TokenLists(lists)) => {
                let [tokens] = <[Vec<i32>; 1]>::try_from(lists).map_err(|_| ApiError::bad("prompt", one))?;
                Prompt::Tokens(tokens)
            }
            _ => return Err(ApiError::bad("prompt", one)),
        };
        if self.echo.unwrap_or(false) {
            return Err(ApiError::bad("echo", "echo is not supported; put the prompt before the answer yourself"));
        }
        if self.best_of.is_some_and(|n| n != 1) {
            return Err(ApiError::bad("best_of", "only one answer a request is made; leave best_of out"));
        }
        if self.suffix.is_some_and(|s| !s.is_empty()) {
            return Err(ApiError::bad("suffix", "suffix is not supported; leave it out"));
        }
        checked(GenerateRequest { logprobs: self.logprobs, ..common.generate(model, prompt)? })
    }
}

fn checked(request: GenerateRequest) -> Result<GenerateRequest, ApiError> {
    request.check()?;
    Ok(request)
}
