//! One combination of streams and prompt length, measured: a fixed number of streams that each ask, read, and ask again.
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use indicatif::ProgressBar;
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use crate::commands::bench::failure::Failure;
use crate::commands::bench::interrupt::Interrupt;
use crate::commands::bench::prompts::Prompts;
use crate::commands::bench::server::{Ask, Form, Sample, Server};

/// What every request of a measurement shares.
pub struct Load {
    /// Whom to ask.
    pub server: Server,
    /// How.
    pub form: Form,
    /// Most tokens of an answer.
    pub max_tokens: u32,
    /// Where the prompts come from.
    pub prompts: Prompts,
    /// Number of the next prompt; each is used once.
    next: AtomicU64,
    seed: u64,
}

impl Load {
    /// A load whose prompts and choices follow from a seed.
    pub fn new(server: Server, form: Form, max_tokens: u32, seed: u64) -> Self {
        Self { server, form, max_tokens, prompts: Prompts::new(seed), next: AtomicU64::new(0), seed }
    }

    /// The next request, with a prompt of `words` words.
    pub fn next_ask(&self, words: usize) -> Ask {
        let index = self.next.fetch_add(1, Ordering::Relaxed);
        Ask {
            prompt: self.prompts.text(index, words),
            max_tokens: self.max_tokens,
            // Servers differ in how many bits of a seed they take; 31 are enough for all.
            seed: (self.seed.wrapping_add(index) & 0x7FFF_FFFF) as u32,
        }
    }
}

/// One point of the grid.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Combination {
    /// Requests on their way at once.
    pub streams: u32,
    /// Tokens a prompt shall have.
    pub prompt_tokens: u32,
    /// Requests in all.
    pub requests: u32,
}

/// What a combination gave.
#[derive(Debug)]
pub struct Measured {
    /// What was measured.
    pub combination: Combination,
    /// Answers that came whole.
    pub samples: Vec<Sample>,
    /// The other requests.
    pub failures: Vec<Failure>,
    /// From the first request to the last end.
    pub wall: Duration,
    /// Whether every request came to its end; else Ctrl-C came first.
    pub is_complete: bool,
}

/// Measures one combination with prompts of `words` words. Each ended request moves the bar.
pub async fn measure(
    load: &Arc<Load>,
    combination: Combination,
    words: usize,
    bar: &ProgressBar,
    interrupt: &mut Interrupt,
) -> Result<Measured> {
    let left = Arc::new(AtomicU64::new(combination.requests.into()));
    // An outcome a stream: nobody waits for the one who counts, except when it lags by a whole round.
    let (outcomes, mut results) = mpsc::channel(combination.streams as usize);
    let mut streams = JoinSet::new();
    let started = Instant::now();
    for _ in 0..combination.streams {
        streams.spawn(stream(load.clone(), left.clone(), words, outcomes.clone()));
    }
    drop(outcomes);

    let mut measured =
        Measured { combination, samples: Vec::new(), failures: Vec::new(), wall: Duration::ZERO, is_complete: false };
    while let Some(received) = interrupt.unless(results.recv()).await {
        let Some(outcome) = received else {
            measured.is_complete = true;
            break;
        };
        measured.take(outcome, started);
        bar.inc(1);
    }
    if !measured.is_complete {
        streams.shutdown().await;
        while let Ok(outcome) = results.try_recv() {
            measured.take(outcome, started);
        }
        return Ok(measured);
    }
    while let Some(ended) = streams.join_next().await {
        ended.context("a stream of requests stopped; please report this")?;
    }
    Ok(measured)
}

impl Measured {
    fn take(&mut self, (ended, outcome): Outcome, started: Instant) {
        self.wall = self.wall.max(ended - started);
        match outcome {
            Ok(sample) => self.samples.push(sample),
            Err(failure) => self.failures.push(failure),
        }
    }
}

/// When a request ended, and how.
type Outcome = (Instant, Result<Sample, Failure>);

async fn stream(load: Arc<Load>, left: Arc<AtomicU64>, words: usize, outcomes: mpsc::Sender<Outcome>) {
    let take = |n: u64| n.checked_sub(1);
    let mut pause = Duration::ZERO;
    while left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, take).is_ok() {
        tokio::time::sleep(pause).await;
        let outcome = load.server.ask(&load.form, &load.next_ask(words)).await;
        pause = outcome.as_ref().err().map_or(Duration::ZERO, Failure::pause);
        if outcomes.send((Instant::now(), outcome)).await.is_err() {
            // Nobody counts any more.
            return;
        }
    }
}
