//! An OpenAI-compatible server as the load generator sees it: its models, and one streamed answer with its times.
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use clap::ValueEnum;
use reqwest::header::{AUTHORIZATION, HeaderMap, HeaderValue, RETRY_AFTER};
use reqwest::{RequestBuilder, Response, Url};
use serde::Serialize;
use serde_json::{Value, json};

use crate::commands::bench::failure::{Failure, retry_after};
use crate::commands::bench::stream::EventStream;
use crate::view;

/// How long a server may take to accept a connection, or to list its models.
const QUICK_TIMEOUT: Duration = Duration::from_secs(10);
/// Largest list of models that is read, in bytes.
const MODELS_BYTES_MAX: usize = 4 << 20;
/// Largest error that is read, in bytes, and the longest part of it that is shown, in characters.
const ERROR_BYTES_MAX: usize = 64 << 10;
const MESSAGE_CHARS_MAX: usize = 300;

/// Which of OpenAI's two ways of asking.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Endpoint {
    /// /v1/completions: the prompt is all that the model sees
    Completions,
    /// /v1/chat/completions: the model's template stands around the prompt, the same in front of each
    Chat,
}

/// A model that a server lists.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Model {
    /// Its name in requests.
    pub id: String,
    /// Whether Capstan serves it.
    pub is_capstan: bool,
}

/// How every request of a measurement is asked.
#[derive(Clone, Debug)]
pub struct Form {
    /// The model's name.
    pub model: String,
    /// Which of OpenAI's two ways.
    pub endpoint: Endpoint,
    /// How freely the model chooses.
    pub temperature: f64,
    /// Whether the answer goes on after the model's own end: not in OpenAI's API, but in Capstan's and llama.cpp's.
    pub ignore_eos: bool,
    /// Longest time an answer may take.
    pub timeout: Duration,
}

/// What one request asks.
#[derive(Clone, Debug)]
pub struct Ask {
    /// The prompt.
    pub prompt: String,
    /// Most tokens of the answer.
    pub max_tokens: u32,
    /// Seed of the model's choices.
    pub seed: u32,
}

/// A server.
#[derive(Clone, Debug)]
pub struct Server {
    http: reqwest::Client,
    /// URL without a slash at its end; `/models` and the like follow.
    base: String,
}

impl Server {
    /// The server at a base URL such as `http://127.0.0.1:8080/v1`. Nothing is sent yet.
    pub fn new(url: &str, key: Option<&str>) -> Result<Self> {
        let base = base_url(url)?;
        let mut headers = HeaderMap::new();
        if let Some(key) = key {
            let Ok(mut value) = HeaderValue::try_from(format!("Bearer {key}")) else {
                bail!("the API key holds characters that no HTTP header can carry; was it copied with a line break?");
            };
            value.set_sensitive(true);
            headers.insert(AUTHORIZATION, value);
        }
        // Neither proxies nor redirects: what stands between us and the server would be measured with it.
        let http = reqwest::Client::builder()
            .no_proxy()
            .redirect(reqwest::redirect::Policy::none())
            .connect_timeout(QUICK_TIMEOUT)
            .default_headers(headers)
            .build()?;
        Ok(Self { http, base })
    }

    /// The base URL.
    pub fn url(&self) -> &str {
        &self.base
    }

    /// The models it serves.
    pub async fn models(&self) -> Result<Vec<Model>, Failure> {
        let mut response = send(self.http.get(format!("{}/models", self.base)).timeout(QUICK_TIMEOUT)).await?;
        let body = read(&mut response, MODELS_BYTES_MAX).await?;
        let list: Value = serde_json::from_slice(&body).map_err(|e| Failure::Malformed(format!("its models: {e}")))?;
        let Some(data) = list["data"].as_array() else {
            return Err(Failure::Malformed("its models: there is no array `data`".into()));
        };
        let model = |m: &Value| Some(Model { id: m["id"].as_str()?.into(), is_capstan: m["owned_by"] == "capstan" });
        Ok(data.iter().filter_map(model).collect())
    }

    /// Asks, and returns as soon as the answer begins.
    pub async fn start(&self, form: &Form, ask: &Ask) -> Result<Answer, Failure> {
        let path = match form.endpoint {
            Endpoint::Completions => "completions",
            Endpoint::Chat => "chat/completions",
        };
        let request = self.http.post(format!("{}/{path}", self.base)).timeout(form.timeout).json(&body(form, ask));
        let sent = Instant::now();
        Ok(Answer::new(EventStream::new(send(request).await?), sent))
    }

    /// Asks, and waits for the whole answer.
    pub async fn ask(&self, form: &Form, ask: &Ask) -> Result<Sample, Failure> {
        let mut answer = self.start(form, ask).await?;
        while answer.next().await?.is_some() {}
        Ok(answer.sample())
    }
}

fn body(form: &Form, ask: &Ask) -> Value {
    let mut body = json!({
        "model": form.model,
        "max_tokens": ask.max_tokens,
        "temperature": form.temperature,
        "seed": ask.seed,
        "stream": true,
        "stream_options": { "include_usage": true },
    });
    match form.endpoint {
        Endpoint::Completions => body["prompt"] = ask.prompt.as_str().into(),
        Endpoint::Chat => body["messages"] = json!([{ "role": "user", "content": ask.prompt }]),
    }
    if form.ignore_eos {
        body["ignore_eos"] = true.into();
    }
    body
}

fn base_url(text: &str) -> Result<String> {
    let Ok(url) = Url::parse(text) else {
        bail!("{text:?} is no URL; write one such as http://127.0.0.1:8080/v1");
    };
    match url.scheme() {
        "http" => {}
        "https" => bail!(
            "https is not supported: TLS would be measured with the server; run this beside the server and name its \
             http:// address, or a local proxy's that ends the TLS"
        ),
        other => bail!("the URL {text:?} begins with {other}://; only http:// is supported"),
    }
    if !url.username().is_empty() || url.password().is_some() {
        bail!("the URL holds a user's name or password, which would be printed; leave it out (--api-key takes a key)");
    }
    if url.query().is_some() || url.fragment().is_some() {
        bail!("the URL {text:?} has a query or fragment; name the base URL alone, such as http://127.0.0.1:8080/v1");
    }
    let base = url.as_str().trim_end_matches('/');
    // Where nothing is named, it is where OpenAI's clients look.
    Ok(if url.path() == "/" { format!("{base}/v1") } else { base.to_string() })
}

async fn send(request: RequestBuilder) -> Result<Response, Failure> {
    let mut response = request.send().await.map_err(|e| broken(&e))?;
    let status = response.status();
    if status.is_success() {
        return Ok(response);
    }
    let after = retry_after(response.headers().get(RETRY_AFTER).and_then(|v| v.to_str().ok()));
    // A message that breaks off is better than none; the status says the most.
    let body = read(&mut response, ERROR_BYTES_MAX).await.unwrap_or_default();
    let message = match message_of(&body) {
        empty if empty.is_empty() => status.canonical_reason().unwrap_or("no reason given").to_string(),
        message => message,
    };
    Err(Failure::Refused { status: status.as_u16(), message, retry_after: after })
}

async fn read(response: &mut Response, bytes_max: usize) -> Result<Vec<u8>, Failure> {
    let mut bytes = Vec::new();
    while let Some(chunk) = response.chunk().await.map_err(|e| broken(&e))? {
        bytes.extend_from_slice(&chunk);
        if bytes.len() > bytes_max {
            return Err(Failure::Malformed(format!("a reply of more than {bytes_max} bytes")));
        }
    }
    Ok(bytes)
}

/// What a transport error means here.
pub fn broken(error: &reqwest::Error) -> Failure {
    let mut innermost: &dyn std::error::Error = error;
    while let Some(source) = innermost.source() {
        innermost = source;
    }
    let reason = view::plain(&innermost.to_string());
    if error.is_connect() {
        Failure::Unreachable(reason)
    } else if error.is_timeout() {
        Failure::TimedOut
    } else {
        Failure::BrokenOff(reason)
    }
}

/// The sentence in an error's body, whichever of the usual shapes it has; else the body's beginning.
pub fn message_of(body: &[u8]) -> String {
    let value: Value = serde_json::from_slice(body).unwrap_or_default();
    let found = ["/error/message", "/error", "/message", "/detail"].iter().find_map(|p| value.pointer(p)?.as_str());
    let text = found.map_or_else(|| String::from_utf8_lossy(body).into_owned(), str::to_string);
    view::plain(text.trim()).chars().take(MESSAGE_CHARS_MAX).collect()
}

/// What one answer took.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Sample {
    /// From the request to the first text; none when no text came.
    pub ttft: Option<Duration>,
    /// Between each chunk with text and the next.
    pub gaps: Vec<Duration>,
    /// Chunks with text.
    pub chunks: u64,
    /// Tokens of the prompt, as the server counted them.
    pub prompt_tokens: Option<u64>,
    /// Of these, those that came from its cache.
    pub cached_tokens: u64,
    /// Tokens of the answer, as the server counted them.
    pub completion_tokens: Option<u64>,
    /// Tokens a second of its prefill, where the server tells.
    pub prefill_tokens_per_s: Option<f64>,
}

impl Sample {
    /// Tokens of the answer: the server's count, else the chunks.
    pub fn output_tokens(&self) -> u64 {
        self.completion_tokens.filter(|t| *t > 0).unwrap_or(self.chunks)
    }

    /// Tokens a second from the first text to the last; none for a single chunk.
    ///
    /// The first chunk's tokens came before that time began. A chunk's share of the tokens is the same for all, as
    /// nothing tells them apart.
    pub fn decode_tokens_per_s(&self) -> Option<f64> {
        let span = self.gaps.iter().sum::<Duration>().as_secs_f64();
        let later = self.output_tokens() as f64 * self.gaps.len() as f64 / self.chunks.max(1) as f64;
        (span > 0.0 && later > 0.0).then(|| later / span)
    }
}

/// An answer on its way. Dropping it ends the call, which frees its slot on a server that looks.
#[derive(Debug)]
pub struct Answer {
    events: EventStream,
    sent: Instant,
    last: Option<Instant>,
    /// The server said that the answer is complete.
    finished: bool,
    ended: bool,
    sample: Sample,
}

impl Answer {
    fn new(events: EventStream, sent: Instant) -> Self {
        Self { events, sent, last: None, finished: false, ended: false, sample: Sample::default() }
    }

    /// Waits for the next chunk with text and returns when it came; none at the answer's end. Dropping the future
    /// loses nothing.
    pub async fn next(&mut self) -> Result<Option<Instant>, Failure> {
        while !self.ended {
            match self.events.next().await? {
                Some((_, data)) if data == "[DONE]" => {
                    self.ended = true;
                    self.events.drain().await;
                }
                Some((arrived, data)) => {
                    if self.take(&data)? {
                        self.count(arrived);
                        return Ok(Some(arrived));
                    }
                }
                // Some servers leave `[DONE]` out.
                None if self.finished => self.ended = true,
                None => return Err(Failure::BrokenOff("the stream ended without a finish reason".into())),
            }
        }
        Ok(None)
    }

    /// What it took so far.
    pub fn sample(self) -> Sample {
        self.sample
    }

    fn count(&mut self, arrived: Instant) {
        match self.last.replace(arrived) {
            Some(last) => self.sample.gaps.push(arrived - last),
            None => self.sample.ttft = Some(arrived - self.sent),
        }
        self.sample.chunks += 1;
    }

    /// Takes one event in and says whether it held text.
    fn take(&mut self, data: &str) -> Result<bool, Failure> {
        let chunk: Value = serde_json::from_str(data).map_err(|e| Failure::Malformed(format!("an event: {e}")))?;
        if chunk.get("error").is_some_and(|e| !e.is_null()) {
            return Err(Failure::InStream(message_of(data.as_bytes())));
        }
        self.note_usage(&chunk);
        let mut has_text = false;
        for choice in chunk["choices"].as_array().into_iter().flatten() {
            // A completion's text, a chat's, and what models that think aloud put beside it.
            let texts = ["/text", "/delta/content", "/delta/reasoning_content", "/delta/reasoning"];
            has_text |= texts.iter().any(|p| choice.pointer(p).and_then(Value::as_str).is_some_and(|t| !t.is_empty()));
            self.finished |= choice["finish_reason"].is_string();
        }
        Ok(has_text)
    }

    fn note_usage(&mut self, chunk: &Value) {
        let sample = &mut self.sample;
        let number = |path: &str| chunk.pointer(path).and_then(Value::as_u64);
        // Some servers repeat the usage in every chunk; the last one counts.
        sample.prompt_tokens = number("/usage/prompt_tokens").or(sample.prompt_tokens);
        sample.completion_tokens = number("/usage/completion_tokens").or(sample.completion_tokens);
        if let Some(cached) = number("/usage/prompt_tokens_details/cached_tokens") {
            sample.cached_tokens = cached;
        }
        let computed = sample.prompt_tokens.map(|t| t.saturating_sub(sample.cached_tokens));
        let rate = |tokens: u64, seconds: f64| (tokens > 0 && seconds > 0.0).then(|| tokens as f64 / seconds);
        if let (Some(tokens), Some(us)) = (computed, number("/usage/capstan/prefill_us")) {
            sample.prefill_tokens_per_s = rate(tokens, us as f64 / 1e6);
        }
        // llama.cpp's server tells it so; `prompt_n` leaves out what was cached.
        let ms = chunk.pointer("/timings/prompt_ms").and_then(Value::as_f64);
        if let (Some(tokens), Some(ms)) = (number("/timings/prompt_n"), ms) {
            sample.prefill_tokens_per_s = rate(tokens, ms / 1e3);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base_urls() {
        for (url, base) in [
            ("http://127.0.0.1:8080", "http://127.0.0.1:8080/v1"),
            ("http://127.0.0.1:8080/", "http://127.0.0.1:8080/v1"),
            ("http://127.0.0.1:8080/v1/", "http://127.0.0.1:8080/v1"),
            ("http://box.lan/openai/v1", "http://box.lan/openai/v1"),
            ("http://[::1]:9/v1", "http://[::1]:9/v1"),
        ] {
            assert_eq!(base_url(url).unwrap(), base);
        }
        let refused = |url| base_url(url).unwrap_err().to_string();
        assert!(refused("https://api.example/v1").starts_with("https is not supported"));
        assert!(refused("127.0.0.1:8080").contains("is no URL"));
        assert!(refused("ftp://x/").contains("only http://"));
        assert!(refused("http://x/v1?key=1").contains("query"));
    }

    #[test]
    fn other_servers_get_only_openais_fields() {
        let form = Form {
            model: "m".into(),
            endpoint: Endpoint::Chat,
            temperature: 0.0,
            ignore_eos: false,
            timeout: QUICK_TIMEOUT,
        };
        let ask = Ask { prompt: "Why?".into(), max_tokens: 5, seed: 7 };
        let keys = |body: Value| body.as_object().unwrap().keys().cloned().collect::<Vec<_>>();
        let standard = ["model", "max_tokens", "temperature", "seed", "stream", "stream_options", "messages"];
        assert_eq!(keys(body(&form, &ask)), standard);
        let ours = body(&Form { ignore_eos: true, endpoint: Endpoint::Completions, ..form }, &ask);
        assert_eq!((&ours["ignore_eos"], &ours["prompt"]), (&true.into(), &"Why?".into()));
    }

    #[test]
    fn messages_of_every_shape_are_found() {
        for body in [
            &br#"{"error":{"message":"no"}}"#[..],
            br#"{"error":"no"}"#,
            br#"{"message":"no"}"#,
            br#"{"detail":"no"}"#,
            b" no\n",
        ] {
            assert_eq!(message_of(body), "no");
        }
        assert_eq!(message_of(&[b'x'; 5000]).len(), MESSAGE_CHARS_MAX);
        assert!(!message_of(b"\x1b[2J").contains('\u{1b}'));
    }

    #[test]
    fn speed_counts_tokens_not_chunks() {
        let second = Duration::from_secs(1);
        let sample = Sample { gaps: vec![second; 4], chunks: 5, completion_tokens: Some(20), ..Sample::default() };
        assert_eq!(sample.decode_tokens_per_s(), Some(4.0), "four chunks of four tokens in four seconds");
        let uncounted = Sample { completion_tokens: None, ..sample.clone() };
        assert_eq!((uncounted.output_tokens(), uncounted.decode_tokens_per_s()), (5, Some(1.0)));
        assert_eq!(Sample { chunks: 1, ..Sample::default() }.decode_tokens_per_s(), None);
    }
}
