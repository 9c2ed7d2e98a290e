//! What is shown of a measurement: the same numbers as JSON for programs and as a table for people.
use std::collections::BTreeMap;
use std::time::Duration;

use serde::Serialize;

use crate::commands::bench::failure::Failure;
use crate::commands::bench::grid::Measured;
use crate::commands::bench::interference::Rounds;
use crate::commands::bench::server::{Endpoint, Sample};
use crate::commands::bench::stats::{Spread, median};
use crate::view::{self, Table};

/// Tokens a chunk above which a note says that ITL is not the time of a token.
const TOKENS_PER_CHUNK_NOTED: f64 = 1.1;
/// Share of prompt tokens from the server's cache above which a note says so. A few (the BOS, a template) always are.
const CACHED_SHARE_NOTED: f64 = 0.1;

/// A whole measurement.
#[derive(Debug, Serialize)]
pub struct Report {
    /// Whom and how.
    pub settings: Settings,
    /// The grid, in the order in which it was measured.
    pub combinations: Vec<Row>,
    /// What a long prompt does to a running stream.
    pub interference: Option<Interference>,
    /// What to know when reading the numbers.
    pub notes: Vec<String>,
    /// Whether Ctrl-C ended it early.
    pub interrupted: bool,
}

/// Whom and how.
#[derive(Debug, Serialize)]
pub struct Settings {
    /// Base URL of the server.
    pub url: String,
    /// The model's name.
    pub model: String,
    /// Whether Capstan serves it.
    pub is_capstan: bool,
    /// Which of OpenAI's two ways.
    pub endpoint: Endpoint,
    /// Most tokens of an answer.
    pub max_tokens: u32,
    /// How freely the model chooses.
    pub temperature: f64,
    /// Whether answers go on after the model's own end.
    pub ignore_eos: bool,
    /// Requests before each prompt length that are not counted.
    pub warmup: u32,
    /// Seed of prompts and choices.
    pub seed: u64,
    /// Longest time an answer may take.
    pub timeout_s: u64,
    /// Capstan's version.
    pub capstan_version: &'static str,
}

/// One combination.
#[derive(Debug, Serialize)]
pub struct Row {
    /// Requests on their way at once.
    pub concurrency: u32,
    /// Tokens a prompt was to have.
    pub prompt_tokens_wanted: u32,
    /// Tokens it had, as the server counted them: the median. None when it does not tell.
    pub prompt_tokens: Option<f64>,
    /// Of all prompts' tokens, those that the server had in its cache.
    pub cached_tokens: u64,
    /// Requests that were to be sent.
    pub requests: u32,
    /// Those that were answered.
    pub succeeded: usize,
    /// Those that were not, by kind.
    pub failed: BTreeMap<String, Failed>,
    /// Whether all were sent and ended.
    pub complete: bool,
    /// From the request to the first text.
    pub ttft_ms: Option<Spread>,
    /// Between a chunk with text and the next, over all answers.
    pub itl_ms: Option<Spread>,
    /// Tokens of all answers.
    pub output_tokens: u64,
    /// Who counted them: `usage` is the server, `chunks` is us, for a server that does not tell.
    pub output_tokens_from: &'static str,
    /// Tokens of all answers a second.
    pub output_tokens_per_s: Option<f64>,
    /// Tokens a second of one answer while it decodes: the median.
    pub stream_tokens_per_s: Option<f64>,
    /// Tokens a second of one prefill, as the server measured it: the median.
    pub prefill_tokens_per_s: Option<f64>,
    /// Tokens of all prompts a second.
    pub prompt_tokens_per_s: Option<f64>,
    /// Tokens a chunk with text carried: the mean.
    pub tokens_per_chunk: Option<f64>,
    /// From the first request to the last end.
    pub wall_s: f64,
}

/// Failed requests of one kind.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Failed {
    /// How many.
    pub count: u64,
    /// What the first of them said.
    pub first: String,
}

/// What a long prompt does to a running stream.
#[derive(Debug, Serialize)]
pub struct Interference {
    /// Tokens the long prompt was to have.
    pub prompt_tokens_wanted: u32,
    /// Tokens it had, as the server counted them: the median.
    pub prompt_tokens: Option<f64>,
    /// Rounds that were measured.
    pub rounds: usize,
    /// The long prompt's own time to its first text.
    pub ttft_ms: Option<Spread>,
    /// The stream's ITL before.
    pub itl_unloaded_ms: Option<Spread>,
    /// The stream's ITL while the long prompt was prefilled.
    pub itl_during_ms: Option<Spread>,
    /// The second by the first.
    pub ratio: Option<Ratio>,
    /// Rounds that failed, by kind.
    pub failed: BTreeMap<String, Failed>,
    /// Rounds whose stream ended before the long prompt was read.
    pub ended_early: u32,
}

/// ITL during by ITL unloaded.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Ratio {
    /// Of the medians.
    pub p50: f64,
    /// Of the 95th percentiles.
    pub p95: f64,
    /// Of the 99th percentiles.
    pub p99: f64,
}

impl Row {
    /// What one combination comes to.
    pub fn new(measured: &Measured) -> Self {
        let samples = &measured.samples;
        let wall_s = measured.wall.as_secs_f64();
        let output_tokens: u64 = samples.iter().map(Sample::output_tokens).sum();
        let prompt_tokens: u64 = samples.iter().filter_map(|s| s.prompt_tokens).sum();
        let chunks: u64 = samples.iter().map(|s| s.chunks).sum();
        let per_second = |tokens: u64| (tokens > 0 && wall_s > 0.0).then(|| tokens as f64 / wall_s);
        let counted = !samples.is_empty() && samples.iter().all(|s| s.completion_tokens.is_some());
        Self {
            concurrency: measured.combination.streams,
            prompt_tokens_wanted: measured.combination.prompt_tokens,
            prompt_tokens: median_prompt(samples),
            cached_tokens: samples.iter().map(|s| s.cached_tokens).sum(),
            requests: measured.combination.requests,
            succeeded: samples.len(),
            failed: by_kind(&measured.failures),
            complete: measured.is_complete,
            ttft_ms: spread_ms(samples.iter().filter_map(|s| s.ttft)),
            itl_ms: spread_ms(samples.iter().flat_map(|s| s.gaps.iter().copied())),
            output_tokens,
            output_tokens_from: if counted { "usage" } else { "chunks" },
            output_tokens_per_s: per_second(output_tokens),
            stream_tokens_per_s: median(samples.iter().filter_map(Sample::decode_tokens_per_s)),
            prefill_tokens_per_s: median(samples.iter().filter_map(|s| s.prefill_tokens_per_s)),
            prompt_tokens_per_s: per_second(prompt_tokens),
            tokens_per_chunk: (chunks > 0).then(|| output_tokens as f64 / chunks as f64),
            wall_s,
        }
    }
}

impl Interference {
    /// What the rounds come to.
    pub fn new(prompt_tokens_wanted: u32, rounds: &Rounds) -> Self {
        let unloaded = spread_ms(rounds.unloaded.iter().copied());
        let during = spread_ms(rounds.during.iter().copied());
        let ratio = unloaded.zip(during).filter(|(u, _)| u.p50 > 0.0).map(|(u, d)| Ratio {
            p50: d.p50 / u.p50,
            p95: d.p95 / u.p95,
            p99: d.p99 / u.p99,
        });
        Self {
            prompt_tokens_wanted,
            prompt_tokens: median_prompt(&rounds.long),
            rounds: rounds.long.len(),
            ttft_ms: spread_ms(rounds.long.iter().filter_map(|s| s.ttft)),
            itl_unloaded_ms: unloaded,
            itl_during_ms: during,
            ratio,
            failed: by_kind(&rounds.failures),
            ended_early: rounds.ended_early,
        }
    }
}

/// Failures counted by kind.
pub fn by_kind(failures: &[Failure]) -> BTreeMap<String, Failed> {
    let mut kinds = BTreeMap::new();
    for failure in failures {
        let entry = kinds.entry(failure.kind()).or_insert_with(|| Failed { count: 0, first: failure.to_string() });
        entry.count += 1;
    }
    kinds
}

/// What to know when reading these rows.
pub fn notes(settings: &Settings, rows: &[Row]) -> Vec<String> {
    let mut notes = Vec::new();
    let answered: Vec<&Row> = rows.iter().filter(|r| r.succeeded > 0).collect();
    if answered.iter().any(|r| r.output_tokens_from == "chunks") {
        notes.push(
            "the server sent no token counts (usage), so each streamed chunk counts as one token of the answer".into(),
        );
    }
    let widest = answered.iter().filter_map(|r| r.tokens_per_chunk).fold(0.0, f64::max);
    if widest >= TOKENS_PER_CHUNK_NOTED {
        notes.push(format!("the server sends up to {widest:.1} tokens a chunk; ITL is the time from chunk to chunk"));
    }
    let shortest = answered.iter().map(|r| r.output_tokens as f64 / r.succeeded as f64).fold(f64::INFINITY, f64::min);
    if shortest < f64::from(settings.max_tokens) * 0.95 {
        let hint = if settings.ignore_eos { "" } else { "; --ignore-eos, where the server knows it, makes them equal" };
        notes.push(format!(
            "answers ended before {} tokens: {shortest:.1} on average at the least{hint}",
            settings.max_tokens
        ));
    }
    let prompts: f64 = answered.iter().map(|r| r.prompt_tokens.unwrap_or(0.0) * r.succeeded as f64).sum();
    let cached: u64 = answered.iter().map(|r| r.cached_tokens).sum();
    if prompts > 0.0 && cached as f64 > prompts * CACHED_SHARE_NOTED {
        let percent = 100.0 * cached as f64 / prompts;
        notes.push(format!("{percent:.0}% of the prompts' tokens came from the server's cache; another --seed helps"));
    }
    if answered.iter().any(|r| r.prompt_tokens.is_none()) {
        notes.push("the server does not count prompt tokens; the lengths with ~ are approximate".into());
    }
    notes
}

impl Report {
    /// For people.
    pub fn text(&self) -> String {
        let s = &self.settings;
        let mut parts = vec![format!(
            "{} at {}, {} tokens an answer, temperature {}, seed {}",
            view::plain(&s.model),
            view::plain(&s.url),
            s.max_tokens,
            s.temperature,
            s.seed
        )];
        if !self.combinations.is_empty() {
            parts.push(format!(
                "{}\n\nTTFT and ITL in milliseconds. OUTPUT/S: tokens a second of all streams together; STREAM/S: of \
                 one while it\ndecodes; PREFILL/S: prompt tokens a second of one, as the server measured it.",
                self.table()
            ));
        }
        if let Some(interference) = &self.interference {
            parts.push(interference.text());
        }
        let failures = self.combinations.iter().flat_map(|r| {
            let at = format!("streams {}, prompt {}", r.concurrency, r.prompt_tokens_wanted);
            r.failed.iter().map(move |(kind, f)| failure_line(&at, kind, f))
        });
        let failures: Vec<String> = failures.collect();
        if !failures.is_empty() {
            parts.push(format!("Failed requests, which are in no other number:\n{}", failures.join("\n")));
        }
        if !self.notes.is_empty() {
            let notes: Vec<String> = self.notes.iter().map(|n| format!("note: {}", view::plain(n))).collect();
            parts.push(notes.join("\n"));
        }
        parts.join("\n\n")
    }

    fn table(&self) -> String {
        let heading = [
            "STREAMS",
            "PROMPT",
            "DONE",
            "TTFT p50",
            "p95",
            "p99",
            "ITL p50",
            "p95",
            "p99",
            "OUTPUT/S",
            "STREAM/S",
            "PREFILL/S",
        ];
        let mut table = Table::new(&heading, &[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]);
        for r in &self.combinations {
            let prompt = r.prompt_tokens.map_or_else(|| format!("~{}", r.prompt_tokens_wanted), |t| format!("{t:.0}"));
            let mut cells = vec![r.concurrency.to_string(), prompt, format!("{}/{}", r.succeeded, r.requests)];
            for spread in [r.ttft_ms, r.itl_ms] {
                cells.extend([spread.map(|s| s.p50), spread.map(|s| s.p95), spread.map(|s| s.p99)].map(number));
            }
            cells.extend([r.output_tokens_per_s, r.stream_tokens_per_s, r.prefill_tokens_per_s].map(number));
            table.row(cells);
        }
        table.render("")
    }
}

impl Interference {
    fn text(&self) -> String {
        let tokens = self.prompt_tokens.unwrap_or(self.prompt_tokens_wanted.into());
        let mut lines =
            vec![format!("A stream while a prompt of {tokens:.0} tokens comes in, {} rounds:", self.rounds)];
        if let (Some(unloaded), Some(during), Some(ratio)) = (self.itl_unloaded_ms, self.itl_during_ms, self.ratio) {
            let mut table = Table::new(&["ITL", "p50", "p95", "p99", "max", "CHUNKS"], &[1, 2, 3, 4, 5]);
            for (name, s) in [("unloaded", unloaded), ("during", during)] {
                let cells = [s.p50, s.p95, s.p99, s.max].map(|v| number(Some(v)));
                table.row([vec![name.to_string()], cells.to_vec(), vec![s.count.to_string()]].concat());
            }
            let ratios = [ratio.p50, ratio.p95, ratio.p99].map(|r| format!("{r:.2}"));
            table.row([vec!["ratio".to_string()], ratios.to_vec()].concat());
            lines.push(table.render("  "));
        }
        if let Some(ttft) = self.ttft_ms {
            lines.push(format!("  TTFT of the long prompt: {} ms", number(Some(ttft.p50))));
        }
        if self.ended_early > 0 {
            lines.push(format!(
                "  {} rounds gave nothing: the stream ended before the long prompt was read (has the server one slot, \
                 or a short context?)",
                self.ended_early
            ));
        }
        lines.extend(self.failed.iter().map(|(kind, f)| failure_line("rounds", kind, f)));
        lines.join("\n")
    }
}

fn failure_line(at: &str, kind: &str, failed: &Failed) -> String {
    format!("  {at}: {} × {kind}: {}", failed.count, view::plain(&failed.first))
}

/// About three digits: more would be noise.
fn number(value: Option<f64>) -> String {
    match value {
        None => "–".into(),
        Some(v) if v >= 100.0 => format!("{v:.0}"),
        Some(v) if v >= 10.0 => format!("{v:.1}"),
        Some(v) => format!("{v:.2}"),
    }
}

fn spread_ms(durations: impl Iterator<Item = Duration>) -> Option<Spread> {
    Spread::of(durations.map(|d| d.as_secs_f64() * 1e3).collect())
}

fn median_prompt(samples: &[Sample]) -> Option<f64> {
    median(samples.iter().filter_map(|s| s.prompt_tokens).map(|t| t as f64))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::commands::bench::grid::Combination;

    fn measured(samples: Vec<Sample>, failures: Vec<Failure>) -> Measured {
        let combination = Combination { streams: 2, prompt_tokens: 100, requests: 4 };
        Measured { combination, samples, failures, wall: Duration::from_secs(2), is_complete: true }
    }

    fn settings() -> Settings {
        Settings {
            url: "http://127.0.0.1:1/v1".into(),
            model: "m".into(),
            is_capstan: false,
            endpoint: Endpoint::Completions,
            max_tokens: 10,
            temperature: 0.0,
            ignore_eos: false,
            warmup: 1,
            seed: 1,
            timeout_s: 60,
            capstan_version: "0",
        }
    }

    fn sample(completion_tokens: Option<u64>) -> Sample {
        let ms = Duration::from_millis;
        Sample {
            ttft: Some(ms(100)),
            gaps: vec![ms(10), ms(20), ms(30), ms(40)],
            chunks: 5,
            prompt_tokens: Some(101),
            completion_tokens,
            ..Sample::default()
        }
    }

    #[test]
    fn throughput_is_of_tokens_and_failures_are_counted_apart() {
        let busy = || Failure::Refused { status: 429, message: "full".into(), retry_after: None };
        let row = Row::new(&measured(vec![sample(Some(10)); 2], vec![busy(), busy(), Failure::TimedOut]));
        assert_eq!((row.output_tokens, row.output_tokens_per_s, row.tokens_per_chunk), (20, Some(10.0), Some(2.0)));
        assert_eq!((row.prompt_tokens, row.prompt_tokens_per_s), (Some(101.0), Some(101.0)));
        assert_eq!(row.stream_tokens_per_s, Some(80.0), "eight tokens in 100 ms");
        assert_eq!(row.failed["http_429"], Failed { count: 2, first: "HTTP 429: full".into() });
        assert_eq!((row.failed.len(), row.itl_ms.unwrap().count, row.itl_ms.unwrap().p50), (2, 8, 20.0));
        let notes = notes(&settings(), &[row]);
        assert_eq!(notes.len(), 1);
        assert!(notes[0].contains("2.0 tokens a chunk"), "{notes:?}");
    }

    #[test]
    fn what_was_guessed_is_said() {
        let mut uncounted = sample(None);
        uncounted.prompt_tokens = None;
        let row = Row::new(&measured(vec![uncounted], Vec::new()));
        assert_eq!((row.output_tokens, row.output_tokens_from), (5, "chunks"));
        let notes = notes(&settings(), &[row]);
        for word in ["usage", "--ignore-eos", "approximate"] {
            assert!(notes.iter().any(|n| n.contains(word)), "{word} in {notes:?}");
        }
        let mut cached = sample(Some(5));
        cached.cached_tokens = 90;
        let row = Row::new(&measured(vec![cached], Vec::new()));
        assert!(super::notes(&Settings { max_tokens: 5, ..settings() }, &[row])[0].starts_with("89%"));
    }

    #[test]
    fn nothing_measured_is_no_number() {
        let row = Row::new(&measured(Vec::new(), vec![Failure::TimedOut]));
        assert_eq!((row.ttft_ms, row.itl_ms, row.output_tokens_per_s), (None, None, None));
        let report = Report {
            settings: settings(),
            combinations: vec![row],
            interference: Some(Interference::new(500, &Rounds { ended_early: 3, ..Rounds::default() })),
            notes: Vec::new(),
            interrupted: false,
        };
        let text = report.text();
        assert!(text.contains("0/4") && text.contains("1 × timed_out") && text.contains("one slot"), "{text}");
    }

    #[test]
    fn the_ratio_is_during_by_unloaded() {
        let ms = Duration::from_millis;
        let rounds = Rounds {
            unloaded: vec![ms(10); 20],
            during: vec![ms(15), ms(15), ms(40)],
            long: vec![sample(Some(1))],
            ..Rounds::default()
        };
        let ratio = Interference::new(500, &rounds).ratio.unwrap();
        assert_eq!((ratio.p50, ratio.p95, ratio.p99), (1.5, 4.0, 4.0));
    }
}
