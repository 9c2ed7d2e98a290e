//! `capstan bench`: a load generator for any OpenAI-compatible server, ours by default.
//!
//! | module | idea |
//! |---|---|
//! | [`prompts`] | prompts that share no beginning |
//! | [`server`] | one streamed answer and its times |
//! | [`stream`] | the events of a reply, bounded |
//! | [`failure`] | why a request failed |
//! | [`grid`] | one combination of streams and prompt length |
//! | [`interference`] | a running stream while a long prompt comes in |
//! | [`stats`] | percentiles |
//! | [`report`] | JSON for programs, a table for people |
//! | [`interrupt`] | Ctrl-C |
use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};

use crate::client::Client;
use crate::commands::INTERRUPTED;
use crate::config::Config;
use crate::view;
use failure::Failure;
use grid::{Combination, Load};
use interrupt::Interrupt;
use report::{Interference, Report, Row, Settings};
use server::{Endpoint, Form, Model, Server};

mod failure;
mod grid;
mod interference;
pub(crate) mod interrupt;
mod prompts;
mod report;
mod server;
mod stats;
mod stream;

/// Shown by `capstan bench --help`.
pub const EXAMPLES: &str = "\
Measures over HTTP, streaming: time to first token (TTFT), time between tokens (ITL) and throughput.
Prompts share no beginning, so a prefix cache does not help. Ctrl-C shows what was measured so far.

Examples:
  capstan bench
  capstan bench --concurrency 1,16 --prompt-tokens 2048 --output bench.json
  capstan bench --interference 2048        also: a stream while a long prompt comes in
  capstan bench --url http://127.0.0.1:8080/v1 --ignore-eos        llama-server";

/// Most streams at once: beyond that, one machine measures itself.
const STREAMS_MAX: i64 = 1024;
/// Most tokens of a prompt.
const PROMPT_TOKENS_MAX: i64 = 1 << 20;
/// Least requests of a combination when none is asked for: one alone says nothing about the spread.
const REQUESTS_MIN: u32 = 4;
/// How often the bar moves by itself.
const TICK: Duration = Duration::from_millis(120);

/// Arguments of `capstan bench`.
#[derive(Args, Debug)]
pub struct BenchArgs {
    /// Base URL of another OpenAI-compatible server, such as http://127.0.0.1:8080/v1 [default: this machine's daemon]
    #[arg(long)]
    pub url: Option<String>,
    /// API key for the server of --url
    #[arg(long, value_name = "KEY", env = "OPENAI_API_KEY", hide_env_values = true)]
    pub api_key: Option<String>,
    /// The model [default: the only one that is served]
    #[arg(long, value_name = "NAME")]
    pub model: Option<String>,
    /// Requests on their way at once
    #[arg(long, value_name = "N,N", value_delimiter = ',', default_value = "1,2,4,8",
          value_parser = clap::value_parser!(u32).range(1..=STREAMS_MAX))]
    pub concurrency: Vec<u32>,
    /// Lengths of the prompts; approximate, what the server counted is reported
    #[arg(long, value_name = "N,N", value_delimiter = ',', default_value = "128,512",
          value_parser = clap::value_parser!(u32).range(1..=PROMPT_TOKENS_MAX))]
    pub prompt_tokens: Vec<u32>,
    /// Most tokens of an answer
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..))]
    pub max_tokens: u32,
    /// Requests of each combination, at least one a stream [default: two a stream, at least 4]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub requests: Option<u32>,
    /// Requests before each prompt length that are not counted; they also tell how long a word is in tokens
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(0..=1000))]
    pub warmup: u32,
    /// The same seed gives the same prompts [default: random, so that a second run meets no cache]
    #[arg(long, value_name = "N")]
    pub seed: Option<u64>,
    /// How freely the model chooses; 0 always takes the likeliest token
    #[arg(long, value_name = "T", default_value_t = 0.0, value_parser = parse_temperature)]
    pub temperature: f64,
    /// Longest time that an answer may take, in seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 600, value_parser = clap::value_parser!(u64).range(1..=86_400))]
    pub timeout: u64,
    /// How to ask
    #[arg(long, value_enum, default_value_t = Endpoint::Completions)]
    pub endpoint: Endpoint,
    /// Let answers go on to --max-tokens; Capstan is always asked to, other servers may know it or not
    #[arg(long)]
    pub ignore_eos: bool,
    /// Also measure the ITL of a running stream while a prompt of N tokens comes in
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=PROMPT_TOKENS_MAX))]
    pub interference: Option<u32>,
    /// Also write the JSON report to this file
    #[arg(long, value_name = "FILE")]
    pub output: Option<PathBuf>,
}

impl BenchArgs {
    /// What is measured, in order.
    fn combinations(&self) -> Vec<Combination> {
        let lengths = self.prompt_tokens.iter();
        let all = lengths.flat_map(|&prompt_tokens| {
            self.concurrency.iter().map(move |&streams| {
                let requests = self.requests.unwrap_or((2 * streams).max(REQUESTS_MIN)).max(streams);
                Combination { streams, prompt_tokens, requests }
            })
        });
        all.collect()
    }
}

/// Measures a server.
pub async fn run(config: &Config, args: &BenchArgs, json: bool) -> Result<ExitCode> {
    if let Some(path) = &args.output {
        check_output(path)?;
    }
    let server = match &args.url {
        Some(url) => Server::new(url, args.api_key.as_deref())?,
        // The key is another server's; ours takes none.
        None => Server::new(&Client::find(&config.data_dir.value)?.openai_url(), None)?,
    };
    let mut interrupt = Interrupt::new();
    let Some(model) = interrupt.unless(choose_model(&server, args)).await else {
        return Ok(ExitCode::from(INTERRUPTED));
    };
    let model = model?;
    let seed = args.seed.unwrap_or_else(|| rand::random::<u32>().into());
    let form = Form {
        model: model.id,
        endpoint: args.endpoint,
        temperature: args.temperature,
        ignore_eos: args.ignore_eos || model.is_capstan,
        timeout: Duration::from_secs(args.timeout),
    };
    let settings = Settings {
        url: server.url().into(),
        model: form.model.clone(),
        is_capstan: model.is_capstan,
        endpoint: args.endpoint,
        max_tokens: args.max_tokens,
        temperature: args.temperature,
        ignore_eos: form.ignore_eos,
        warmup: args.warmup,
        seed,
        timeout_s: args.timeout,
        capstan_version: env!("CARGO_PKG_VERSION"),
    };
    let load = Arc::new(Load::new(server, form, args.max_tokens, seed));
    let measurement = measure(&load, args, &mut interrupt).await?;
    finish(measurement, settings, args, json, interrupt.came())
}

/// What came of it.
#[derive(Default)]
struct Measurement {
    rows: Vec<Row>,
    interference: Option<Interference>,
    warmup_failures: Vec<Failure>,
    first_failure: Option<Failure>,
}

async fn measure(load: &Arc<Load>, args: &BenchArgs, interrupt: &mut Interrupt) -> Result<Measurement> {
    let combinations = args.combinations();
    let bar = progress_bar(combinations.iter().map(|c| u64::from(c.requests)).sum());
    let mut done = Measurement::default();
    let mut warm = None;
    for combination in combinations {
        let wanted = combination.prompt_tokens;
        let words = match warm {
            Some((tokens, words)) if tokens == wanted => words,
            _ => {
                bar.set_message(format!("warming up with prompts of {wanted} tokens"));
                let warming = warm_up(load, wanted, args.warmup, &mut done.warmup_failures);
                let Some(words) = interrupt.unless(warming).await else { break };
                warm = Some((wanted, words));
                words
            }
        };
        bar.set_message(format!("streams {}, prompts of {wanted} tokens", combination.streams));
        let measured = grid::measure(load, combination, words, &bar, interrupt).await?;
        done.first_failure = done.first_failure.or_else(|| measured.failures.first().cloned());
        if !measured.samples.is_empty() || !measured.failures.is_empty() {
            done.rows.push(Row::new(&measured));
        }
        if interrupt.came() {
            break;
        }
    }
    if let Some(wanted) = args.interference.filter(|_| !interrupt.came()) {
        bar.set_message(format!("a stream while a prompt of {wanted} tokens comes in"));
        let warming = warm_up(load, wanted, args.warmup, &mut done.warmup_failures);
        if let Some(words) = interrupt.unless(warming).await {
            let rounds = interference::measure(load, words, interrupt).await;
            done.first_failure = done.first_failure.or_else(|| rounds.failures.first().cloned());
            done.interference = (!rounds.is_empty()).then(|| Interference::new(wanted, &rounds));
        }
    }
    bar.finish_and_clear();
    Ok(done)
}

/// Sends the requests that are not counted, and returns how many words make a prompt of `wanted` tokens.
async fn warm_up(load: &Load, wanted: u32, requests: u32, failures: &mut Vec<Failure>) -> usize {
    let mut words = wanted as usize;
    for _ in 0..requests {
        match load.server.ask(&load.form, &load.next_ask(words)).await {
            Ok(sample) => {
                if let Some(tokens) = sample.prompt_tokens {
                    words = prompts::words_for(wanted, words, tokens);
                }
            }
            Err(failure) => {
                tokio::time::sleep(failure.pause()).await;
                failures.push(failure);
            }
        }
    }
    words
}

/// Writes and prints what was measured, and says how it ended.
fn finish(done: Measurement, settings: Settings, args: &BenchArgs, json: bool, interrupted: bool) -> Result<ExitCode> {
    let mut notes = report::notes(&settings, &done.rows);
    notes.extend(report::by_kind(&done.warmup_failures).into_values().map(|f| {
        let (count, first) = (f.count, f.first);
        format!("{count} of the uncounted requests before a prompt length failed: {first}")
    }));
    let answered = done.rows.iter().any(|r| r.succeeded > 0)
        || done.interference.as_ref().is_some_and(|i| i.itl_during_ms.is_some());
    let report = Report { settings, combinations: done.rows, interference: done.interference, notes, interrupted };
    // The file first: standard output may be a pipe that closes early.
    let written = args.output.as_deref().map_or(Ok(()), |path| write(path, &report));
    if json {
        view::print_json(&report)?;
    } else if !report.combinations.is_empty() || report.interference.is_some() {
        view::print_line(report.text())?;
    }
    written?;
    if interrupted {
        let what = if answered { "what was measured so far is shown" } else { "nothing was measured yet" };
        eprintln!("interrupted; {what}");
        return Ok(ExitCode::from(INTERRUPTED));
    }
    match done.first_failure {
        Some(first) if !answered => bail!("every request failed; the first: {first}"),
        _ => Ok(ExitCode::SUCCESS),
    }
}

async fn choose_model(server: &Server, args: &BenchArgs) -> Result<Model> {
    let url = server.url();
    let is_ours = args.url.is_none();
    let models = match (server.models().await, &args.model) {
        (Ok(models), _) => models,
        (Err(failure @ (Failure::Unreachable(_) | Failure::TimedOut)), _) => bail!("{url}: {failure}"),
        // A server need not list its models.
        (Err(_), Some(name)) => return Ok(Model { id: name.clone(), is_capstan: is_ours }),
        (Err(failure), None) => {
            bail!("{url}/models does not tell which models there are ({failure}); name one with --model")
        }
    };
    let names = || models.iter().map(|m| view::plain(&m.id)).collect::<Vec<_>>().join(", ");
    match &args.model {
        Some(name) => match models.iter().find(|m| m.id == *name) {
            Some(model) => Ok(model.clone()),
            None if is_ours || models.iter().any(|m| m.is_capstan) => {
                bail!(
                    "{name:?} is not served at {url}; served are: {}",
                    if models.is_empty() { "none".into() } else { names() }
                )
            }
            // Other servers take names that they do not list.
            None => Ok(Model { id: name.clone(), is_capstan: false }),
        },
        None => match models.as_slice() {
            [model] => Ok(model.clone()),
            [] if is_ours => bail!("no model is served; load one with `capstan load MODEL.gguf`"),
            [] => bail!("no model is served at {url}"),
            _ => bail!("several models are served at {url}; choose one with --model: {}", names()),
        },
    }
}

fn progress_bar(requests: u64) -> ProgressBar {
    if !std::io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let bar = ProgressBar::new(requests);
    // The template is a constant, so the plain style is never what is seen.
    let style = ProgressStyle::with_template("[{bar:30}] {pos}/{len} requests {elapsed} {spinner} {msg}");
    bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()).progress_chars("=> "));
    bar.enable_steady_tick(TICK);
    bar
}

/// A report that cannot be written is noticed before the minutes that it takes to measure one.
fn check_output(path: &Path) -> Result<()> {
    if path.is_dir() {
        bail!("{} is a folder; name a file with --output", path.display());
    }
    match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() && !folder.is_dir() => {
            bail!("there is no folder {}, so --output cannot be written", folder.display())
        }
        _ => Ok(()),
    }
}

fn write(path: &Path, report: &Report) -> Result<()> {
    let text = serde_json::to_string_pretty(report)? + "\n";
    std::fs::write(path, text).with_context(|| format!("the report cannot be written to {}", path.display()))
}

fn parse_temperature(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(t) if t.is_finite() && t >= 0.0 => Ok(t),
        _ => Err("write a number that is not negative".into()),
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Alone {
        #[command(flatten)]
        args: BenchArgs,
    }

    fn combinations(args: &[&str]) -> Vec<(u32, u32, u32)> {
        let parsed = Alone::parse_from([&["bench"], args].concat()).args;
        parsed.combinations().iter().map(|c| (c.prompt_tokens, c.streams, c.requests)).collect()
    }

    #[test]
    fn every_stream_has_a_request() {
        let small = ["--concurrency", "1,8", "--prompt-tokens", "100,50"];
        assert_eq!(combinations(&small), [(100, 1, 4), (100, 8, 16), (50, 1, 4), (50, 8, 16)]);
        assert_eq!(
            combinations(&[&small[..2], &["--prompt-tokens", "9", "--requests", "3"]].concat()),
            [(9, 1, 3), (9, 8, 8)]
        );
        assert_eq!(combinations(&[]).len(), 8);
    }

    #[test]
    fn temperatures_are_numbers() {
        assert_eq!(parse_temperature("0.7"), Ok(0.7));
        for bad in ["-1", "NaN", "inf", "hot"] {
            assert!(parse_temperature(bad).is_err(), "{bad}");
        }
    }
}
