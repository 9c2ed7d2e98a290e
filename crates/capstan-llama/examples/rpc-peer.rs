//! The benchmark's peer: a worker and a head of llama.cpp's own RPC, and a tokenizer, for `scripts/bench` to drive.
//!
//! Reads one JSON command a line on standard input and answers one JSON line each on standard output.
use std::error::Error;
use std::io::{BufRead, Write};
use std::net::TcpListener;
use std::path::PathBuf;
use std::time::Instant;

use capstan_llama::rpc::{Head, HeadOptions, Workers, serve};
use capstan_llama::{Model, ModelOptions};
use capstan_proto::data::Row;
use clap::Parser;
use serde::{Deserialize, Serialize};

type Outcome<T> = Result<T, Box<dyn Error>>;

/// llama.cpp's RPC, as a peer to measure against
#[derive(Parser)]
enum Role {
    /// Lends this machine's processor to a head; prints its address first
    Worker {
        /// Port on loopback; 0 takes a free one
        #[arg(long, default_value_t = 0)]
        port: u16,
        /// Compute threads
        #[arg(long, default_value_t = 1)]
        threads: usize,
        /// Folder that keeps large tensors for the next head
        #[arg(long)]
        cache: Option<PathBuf>,
    },
    /// Loads a model over workers, says how long that took, and answers commands
    Head {
        /// The GGUF
        #[arg(long)]
        model: PathBuf,
        /// The workers' addresses, in pipeline order
        #[arg(long, value_delimiter = ',')]
        workers: Vec<String>,
        /// Size of the first context
        #[command(flatten)]
        size: Size,
    },
    /// Turns texts into tokens and back
    Vocab {
        /// The GGUF
        #[arg(long)]
        model: PathBuf,
    },
}

/// Size of a context.
#[derive(clap::Args, Clone, Copy, Deserialize)]
struct Size {
    /// Tokens a sequence may have
    #[arg(long, default_value_t = 3072)]
    ctx: u32,
    /// Sequences at once
    #[arg(long, default_value_t = 16)]
    slots: u32,
    /// Most rows given to llama.cpp at once (its default)
    #[arg(long, default_value_t = 2048)]
    batch: u32,
    /// Most rows that it computes at once (its default)
    #[arg(long, default_value_t = 512)]
    ubatch: u32,
    /// One cache for all sequences
    #[arg(long)]
    #[serde(default)]
    unified: bool,
    /// Attention writes its scores out: flash attention, llama.cpp's choice, is off
    #[arg(long)]
    #[serde(default)]
    scores: bool,
}

impl From<Size> for HeadOptions {
    fn from(s: Size) -> Self {
        Self {
            ctx_per_slot: s.ctx,
            slots: s.slots,
            batch: s.batch,
            ubatch: s.ubatch,
            kv_unified: s.unified,
            scores: s.scores,
        }
    }
}

#[derive(Deserialize)]
#[serde(tag = "do", rename_all = "snake_case")]
enum Command {
    /// Makes a context of another size, with an empty cache.
    Open(Size),
    /// Answers streams side by side, greedily.
    Run { streams: Vec<Stream> },
    /// Texts to tokens; special tokens in them are parsed.
    Tokenize { text: String },
    /// Tokens to text.
    Text { tokens: Vec<i32> },
    /// Ends.
    Quit,
}

/// A prompt and how many tokens follow it.
#[derive(Deserialize)]
struct Stream {
    prompt: Vec<i32>,
    tokens: usize,
    /// Comes once each stream that came at once has made so many tokens.
    #[serde(default)]
    after: usize,
    /// Ends the answer.
    #[serde(default)]
    stop: Vec<i32>,
    /// So does the first token of this other stream.
    #[serde(default)]
    until: Option<usize>,
    /// And so does the time when every stream that has this has made so many tokens.
    #[serde(default)]
    together: Option<usize>,
    /// Tokens that are never chosen.
    #[serde(default)]
    ban: Vec<i32>,
}

/// When a stream was asked and what it answered.
#[derive(Clone, Default, Serialize)]
struct Answer {
    asked_s: f64,
    tokens: Vec<i32>,
    at_s: Vec<f64>,
}

fn main() -> Outcome<()> {
    tracing_subscriber::fmt()
        .with_env_filter(tracing_subscriber::EnvFilter::from_default_env())
        .with_writer(std::io::stderr)
        .with_ansi(false)
        .init();
    match Role::parse() {
        Role::Worker { port, threads, cache } => {
            // llama.cpp cannot tell which port it was given, so one is chosen first; whoever starts this sees a
            // collision as an early end and tries again.
            let port = if port == 0 { TcpListener::bind(("127.0.0.1", 0))?.local_addr()?.port() } else { port };
            let address = format!("127.0.0.1:{port}");
            say(&serde_json::json!({ "address": address }))?;
            Err(serve(&address, threads, cache.as_deref()).into())
        }
        Role::Head { model, workers, size } => {
            let started = Instant::now();
            let workers = Workers::connect(&workers)?;
            let names = workers.names();
            let mut head = Head::load(&model, workers)?;
            let loaded_s = started.elapsed().as_secs_f64();
            head.open(size.into())?;
            head.decode(&[Row { slot: 0, pos: 0, output: true }], &[0], &[&[]])?;
            let ready_s = started.elapsed().as_secs_f64();
            say(&serde_json::json!({ "ready_s": ready_s, "loaded_s": loaded_s, "devices": names }))?;
            answer_commands(|command| run_command(&mut head, command))
        }
        Role::Vocab { model } => {
            let vocab = Model::load(&model, ModelOptions::default())?.vocab();
            say(&serde_json::json!({ "n_tokens": vocab.n_tokens() }))?;
            answer_commands(|command| match command {
                Command::Tokenize { text } => Ok(serde_json::json!({ "tokens": vocab.tokenize(&text, false, true)? })),
                Command::Text { tokens } => {
                    let bytes: Vec<u8> = tokens.iter().flat_map(|t| vocab.piece(*t, true)).collect();
                    Ok(serde_json::json!({ "text": String::from_utf8_lossy(&bytes) }))
                }
                _ => Err("a vocabulary only knows tokenize and text".into()),
            })
        }
    }
}

fn say(value: &serde_json::Value) -> Outcome<()> {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{value}")?;
    Ok(out.flush()?)
}

fn answer_commands(mut answer: impl FnMut(Command) -> Outcome<serde_json::Value>) -> Outcome<()> {
    for line in std::io::stdin().lock().lines() {
        match serde_json::from_str(&line?)? {
            Command::Quit => break,
            command => say(&answer(command)?)?,
        }
    }
    Ok(())
}

fn run_command(head: &mut Head, command: Command) -> Outcome<serde_json::Value> {
    match command {
        Command::Open(size) => {
            let started = Instant::now();
            head.open(size.into())?;
            Ok(serde_json::json!({ "seconds": started.elapsed().as_secs_f64() }))
        }
        Command::Run { streams } => Ok(serde_json::json!({ "streams": run(head, &streams)? })),
        _ => Err("a head only knows open and run".into()),
    }
}

/// What llama.cpp's server does: each step is one batch with a token of every sequence that decodes, and then as much
/// of the prompts as fits.
fn run(head: &mut Head, streams: &[Stream]) -> Outcome<Vec<Answer>> {
    let batch = head.clear()?.batch as usize;
    let mut answers = vec![Answer::default(); streams.len()];
    // Tokens of each prompt that are in the cache; none before the stream is asked.
    let mut fed: Vec<Option<usize>> = streams.iter().map(|s| (s.after == 0).then_some(0)).collect();
    let started = Instant::now();
    loop {
        let done: Vec<bool> = (0..streams.len()).map(|i| is_done(&answers, streams, i)).collect();
        let early = (0..streams.len()).filter(|i| streams[*i].after == 0);
        let made = early.map(|i| if done[i] { usize::MAX } else { answers[i].tokens.len() }).min().unwrap_or(0);
        let now_s = started.elapsed().as_secs_f64();
        for (i, stream) in streams.iter().enumerate() {
            if fed[i].is_none() && made >= stream.after {
                fed[i] = Some(0);
                answers[i].asked_s = now_s;
            }
        }
        let (mut rows, mut tokens, mut output_of) = (Vec::new(), Vec::new(), Vec::new());
        for (i, answer) in answers.iter().enumerate().filter(|(i, _)| !done[*i]) {
            if let Some(last) = answer.tokens.last() {
                let pos = (streams[i].prompt.len() + answer.tokens.len() - 1) as u32;
                rows.push(Row { slot: i as u32, pos, output: true });
                tokens.push(*last);
                output_of.push(i);
            }
        }
        for (i, stream) in streams.iter().enumerate() {
            let Some(fed) = fed[i].as_mut().filter(|fed| **fed < stream.prompt.len()) else { continue };
            let end = stream.prompt.len().min(*fed + batch.saturating_sub(rows.len()));
            for pos in *fed..end {
                let output = pos + 1 == stream.prompt.len();
                rows.push(Row { slot: i as u32, pos: pos as u32, output });
                tokens.push(stream.prompt[pos]);
                output_of.extend(output.then_some(i));
            }
            *fed = end;
        }
        if rows.is_empty() {
            return Ok(answers);
        }
        let banned: Vec<&[i32]> = output_of.iter().map(|i| &streams[*i].ban[..]).collect();
        let chosen = head.decode(&rows, &tokens, &banned)?;
        let at_s = started.elapsed().as_secs_f64();
        for (i, token) in output_of.into_iter().zip(chosen) {
            answers[i].tokens.push(token);
            answers[i].at_s.push(at_s);
        }
    }
}

fn is_done(answers: &[Answer], streams: &[Stream], index: usize) -> bool {
    let (answer, stream) = (&answers[index], &streams[index]);
    let awaited = stream.until.and_then(|other| answers.get(other));
    let mut all = answers.iter().zip(streams).filter_map(|(a, s)| Some((a.tokens.len(), s.together?)));
    answer.tokens.len() >= stream.tokens
        || stream.together.is_some() && all.all(|(made, wanted)| made >= wanted)
        || answer.tokens.last().is_some_and(|t| stream.stop.contains(t))
        || awaited.is_some_and(|other| !other.tokens.is_empty())
}
