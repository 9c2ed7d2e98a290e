//! Events become one JSON object or a stream of chunks, in the shapes of OpenAI's chat and plain completions.
use std::collections::VecDeque;
use std::convert::Infallible;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use axum::{Json, http::StatusCode};
use capstan_proto::generate::{Alternative, FinishReason, GenerateEvent, TokenLogprob, Usage};
use futures::stream;
use serde_json::{Map, Value, json};
use tokio::sync::mpsc::Receiver;

use crate::error::ApiError;

/// How often a silent stream sends a comment, so that nothing between us and the client takes it for dead.
pub const KEEP_ALIVE: Duration = Duration::from_secs(15);
/// What stands for the logarithm of zero, which JSON cannot carry.
const LOGPROB_MIN: f32 = -9999.0;

/// Which of the two shapes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Chat,
    Completion,
}

/// What every chunk of one answer repeats.
#[derive(Clone, Debug)]
pub(crate) struct Answer {
    kind: Kind,
    id: String,
    model: String,
    created: u64,
    with_logprobs: bool,
    /// Characters of the tokens so far, for the offsets of plain completions.
    offset: usize,
}

impl Answer {
    pub fn new(kind: Kind, model: &str, with_logprobs: bool) -> Self {
        let prefix = if kind == Kind::Chat { "chatcmpl" } else { "cmpl" };
        Self {
            kind,
            id: format!("{prefix}-{}", uuid::Uuid::new_v4().simple()),
            model: model.to_owned(),
            created: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs()),
            with_logprobs,
            offset: 0,
        }
    }

    fn envelope(&self, chunk: bool, choices: Vec<Value>) -> Map<String, Value> {
        let object = match (self.kind, chunk) {
            (Kind::Chat, true) => "chat.completion.chunk",
            (Kind::Chat, false) => "chat.completion",
            (Kind::Completion, _) => "text_completion",
        };
        let mut map = Map::new();
        map.insert("id".into(), self.id.clone().into());
        map.insert("object".into(), object.into());
        map.insert("created".into(), self.created.into());
        map.insert("model".into(), self.model.clone().into());
        map.insert("system_fingerprint".into(), concat!("capstan-", env!("CARGO_PKG_VERSION")).into());
        map.insert("choices".into(), Value::Array(choices));
        map
    }

    /// One chunk's only choice.
    fn delta(&self, delta: Value, text: &str, logprobs: Value, reason: Option<&str>) -> Value {
        match self.kind {
            Kind::Chat => json!({"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": reason}),
            Kind::Completion => json!({"index": 0, "text": text, "logprobs": logprobs, "finish_reason": reason}),
        }
    }

    fn logprobs(&mut self, tokens: &[TokenLogprob]) -> Value {
        if !self.with_logprobs {
            return Value::Null;
        }
        match self.kind {
            Kind::Chat => json!({"content": tokens.iter().map(chat_logprob).collect::<Vec<_>>(), "refusal": null}),
            Kind::Completion => {
                let offsets: Vec<usize> = tokens
                    .iter()
                    .map(|t| {
                        let here = self.offset;
                        self.offset += text_of(&t.chosen).chars().count();
                        here
                    })
                    .collect();
                let top = |t: &TokenLogprob| -> Map<String, Value> {
                    t.top.iter().map(|a| (text_of(a), logprob_of(a).into())).collect()
                };
                json!({
                    "tokens": tokens.iter().map(|t| text_of(&t.chosen)).collect::<Vec<_>>(),
                    "token_logprobs": tokens.iter().map(|t| logprob_of(&t.chosen)).collect::<Vec<_>>(),
                    "top_logprobs": tokens.iter().map(top).collect::<Vec<_>>(),
                    "text_offset": offsets,
                })
            }
        }
    }
}

fn text_of(token: &Alternative) -> String {
    String::from_utf8_lossy(&token.bytes).into_owned()
}

fn logprob_of(token: &Alternative) -> f32 {
    // A NaN also becomes the minimum.
    token.logprob.max(LOGPROB_MIN)
}

fn chat_logprob(token: &TokenLogprob) -> Value {
    let one = |a: &Alternative| json!({"token": text_of(a), "logprob": logprob_of(a), "bytes": a.bytes});
    let mut value = one(&token.chosen);
    value["top_logprobs"] = token.top.iter().map(one).collect();
    value
}

fn usage_json(usage: &Usage) -> Value {
    json!({
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": u64::from(usage.prompt_tokens) + u64::from(usage.completion_tokens),
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
        "capstan": {
            "queue_us": usage.queue_us,
            "prefill_us": usage.prefill_us,
            "decode_us": usage.decode_us,
            "drafted_tokens": usage.drafted_tokens,
            "accepted_tokens": usage.accepted_tokens,
        },
    })
}

/// OpenAI's word for why an answer ended. One that we cut off is an error, as it is not what was asked for.
fn reason_of(reason: FinishReason) -> Result<&'static str, ApiError> {
    match reason {
        FinishReason::Stop => Ok("stop"),
        FinishReason::Length => Ok("length"),
        FinishReason::Cancelled => {
            let message = "the answer was cancelled on the node before it was complete; send the request again";
            Err(ApiError { retry_after_s: Some(1), ..ApiError::new(StatusCode::SERVICE_UNAVAILABLE, message) })
        }
    }
}

fn broken_off() -> ApiError {
    let message =
        "the answer broke off without a reason; send the request again, and see the node's log if it persists";
    ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, message).with_code("internal_error")
}

/// Waits for the whole answer. Dropping the future drops the receiver, which cancels.
pub(crate) async fn whole(mut answer: Answer, mut events: Receiver<GenerateEvent>) -> Result<Response, ApiError> {
    let (mut content, mut logprobs) = (String::new(), Vec::new());
    while let Some(event) = events.recv().await {
        match event {
            GenerateEvent::Started { .. } | GenerateEvent::Paused { .. } => {}
            GenerateEvent::Token { text, logprob, .. } => {
                content.push_str(&text);
                logprobs.extend(logprob);
            }
            GenerateEvent::Finished { reason, text, usage } => {
                content.push_str(&text);
                let reason = reason_of(reason)?;
                let logprobs = answer.logprobs(&logprobs);
                let choice = match answer.kind {
                    Kind::Chat => json!({
                        "index": 0,
                        "message": {"role": "assistant", "content": content, "refusal": null},
                        "logprobs": logprobs,
                        "finish_reason": reason,
                    }),
                    Kind::Completion => answer.delta(Value::Null, &content, logprobs, Some(reason)),
                };
                let mut body = answer.envelope(false, vec![choice]);
                body.insert("usage".into(), usage_json(&usage));
                return Ok(Json(Value::Object(body)).into_response());
            }
            GenerateEvent::Failed(error) => return Err(error.into()),
        }
    }
    Err(broken_off())
}

/// Streams the answer. Dropping the response drops the receiver, which cancels.
///
/// The status is decided by the first event, so that a request that fails at once fails with a status. A request that
/// waits in the queue for longer than [`KEEP_ALIVE`] gets its headers and comments, and errors become events.
pub(crate) async fn streamed(
    answer: Answer,
    mut events: Receiver<GenerateEvent>,
    with_usage: bool,
) -> Result<Response, ApiError> {
    let first = match tokio::time::timeout(KEEP_ALIVE, events.recv()).await {
        Ok(Some(GenerateEvent::Failed(error))) => return Err(error.into()),
        Ok(None) => return Err(broken_off()),
        Ok(Some(event)) => Some(event),
        Err(_) => None,
    };
    let mut chunks = Chunks { answer, with_usage, ready: VecDeque::new(), done: false };
    chunks.open();
    if let Some(event) = first {
        chunks.take(Some(event));
    }
    let stream = stream::unfold((chunks, events), |(mut chunks, mut events)| async move {
        loop {
            if let Some(data) = chunks.ready.pop_front() {
                return Some((Ok::<_, Infallible>(data), (chunks, events)));
            }
            if chunks.done {
                return None;
            }
            let event = events.recv().await;
            chunks.take(event);
        }
    });
    Ok(Sse::new(stream).keep_alive(KeepAlive::new().interval(KEEP_ALIVE)).into_response())
}

/// Turns events into server-sent events.
struct Chunks {
    answer: Answer,
    with_usage: bool,
    ready: VecDeque<Event>,
    done: bool,
}

impl Chunks {
    fn data(&mut self, data: String) {
        self.ready.push_back(Event::default().data(data));
    }

    fn push(&mut self, choices: Vec<Value>, usage: Option<&Usage>) {
        let mut body = self.answer.envelope(true, choices);
        if self.with_usage {
            body.insert("usage".into(), usage.map_or(Value::Null, usage_json));
        }
        self.data(Value::Object(body).to_string());
    }

    /// A chat begins with the role.
    fn open(&mut self) {
        if self.answer.kind == Kind::Chat {
            let choice =
                self.answer.delta(json!({"role": "assistant", "content": "", "refusal": null}), "", Value::Null, None);
            self.push(vec![choice], None);
        }
    }

    fn text(&mut self, text: &str, logprob: Option<TokenLogprob>) {
        if text.is_empty() && logprob.is_none() {
            return;
        }
        let logprobs = logprob.map_or(Value::Null, |l| self.answer.logprobs(&[l]));
        let choice = self.answer.delta(json!({"content": text}), text, logprobs, None);
        self.push(vec![choice], None);
    }

    fn fail(&mut self, error: &ApiError) {
        self.data(error.body().to_string());
        self.done = true;
    }

    fn take(&mut self, event: Option<GenerateEvent>) {
        match event {
            Some(GenerateEvent::Started { .. }) => {}
            // A comment: clients pass over it, people who look see what is waited for. It must stay on one line.
            Some(GenerateEvent::Paused { reason }) => {
                let reason: String = reason.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
                self.ready.push_back(Event::default().comment(format!("waiting: {reason}")));
            }
            Some(GenerateEvent::Token { text, logprob, .. }) => self.text(&text, logprob),
            Some(GenerateEvent::Finished { reason, text, usage }) => {
                self.text(&text, None);
                match reason_of(reason) {
                    Ok(reason) => {
                        let choice = self.answer.delta(json!({}), "", Value::Null, Some(reason));
                        self.push(vec![choice], None);
                        if self.with_usage {
                            self.push(Vec::new(), Some(&usage));
                        }
                        self.data("[DONE]".into());
                        self.done = true;
                    }
                    Err(error) => self.fail(&error),
                }
            }
            Some(GenerateEvent::Failed(error)) => self.fail(&error.into()),
            None => self.fail(&broken_off()),
        }
    }
}
