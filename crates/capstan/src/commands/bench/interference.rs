//! How much a running stream suffers while a long prompt comes in.
//!
//! ```text
//! stream  ─┬┬┬┬┬┬┬┬┬┬┬┬─┬───┬───┬───┬───┬──┬      each ┬ is a chunk of text
//! long                 asked ├── its prefill ──┤ first text; the stream is then dropped
//!          └ unloaded ┘└────── during ───────┘
//! ```
//!
//! Both parts come from the same stream, so that nothing else differs between them. A gap that only touches the
//! long prompt's prefill belongs to it: that is where a stall shows.
use std::time::{Duration, Instant};

use tokio::pin;

use crate::commands::bench::failure::Failure;
use crate::commands::bench::grid::Load;
use crate::commands::bench::interrupt::Interrupt;
use crate::commands::bench::server::{Ask, Sample};

/// How often it is measured, each time with other prompts.
const ROUNDS: u32 = 3;
/// Gaps of the running stream that are measured before the long prompt comes.
const UNLOADED_GAPS: usize = 48;
/// Words of the running stream's own prompt.
const STREAM_WORDS: usize = 32;
/// Most tokens of the running stream: enough for a prefill of minutes, and it is dropped when that ends.
const STREAM_TOKENS: u32 = 3072;

/// What all rounds gave.
#[derive(Debug, Default)]
pub struct Rounds {
    /// Gaps before the long prompts.
    pub unloaded: Vec<Duration>,
    /// Gaps while they were prefilled.
    pub during: Vec<Duration>,
    /// The long prompts' requests.
    pub long: Vec<Sample>,
    /// Rounds that failed.
    pub failures: Vec<Failure>,
    /// Rounds that gave nothing, because their stream ended before the long prompt was read.
    pub ended_early: u32,
}

impl Rounds {
    /// Whether no round came to its end, good or bad.
    pub fn is_empty(&self) -> bool {
        self.long.is_empty() && self.failures.is_empty() && self.ended_early == 0
    }
}

/// Measures [`ROUNDS`] times with prompts of `words` words; fewer when Ctrl-C comes.
pub async fn measure(load: &Load, words: usize, interrupt: &mut Interrupt) -> Rounds {
    let mut rounds = Rounds::default();
    for _ in 0..ROUNDS {
        let mut round = Round::default();
        let Some(outcome) = interrupt.unless(round.measure(load, words)).await else { break };
        if let Err(failure) = outcome {
            rounds.failures.push(failure);
            continue;
        }
        match round.long {
            // A stream that ended may have kept the long prompt waiting (a server of one slot), and then nothing ran
            // beside it.
            _ if round.ended_early => rounds.ended_early += 1,
            None => rounds.ended_early += 1,
            Some(Long { asked, first_text, sample }) => {
                let (unloaded, during) = split(&round.arrivals, asked, first_text);
                rounds.unloaded.extend(unloaded);
                rounds.during.extend(during);
                rounds.long.push(sample);
            }
        }
    }
    rounds
}

#[derive(Default)]
struct Round {
    arrivals: Vec<Instant>,
    long: Option<Long>,
    ended_early: bool,
}

struct Long {
    asked: Instant,
    first_text: Instant,
    sample: Sample,
}

impl Round {
    async fn measure(&mut self, load: &Load, words: usize) -> Result<(), Failure> {
        let running = Ask { max_tokens: STREAM_TOKENS, ..load.next_ask(STREAM_WORDS) };
        let mut stream = load.server.start(&load.form, &running).await?;
        while self.arrivals.len() <= UNLOADED_GAPS {
            match stream.next().await? {
                Some(arrived) => self.arrivals.push(arrived),
                None => {
                    self.ended_early = true;
                    return Ok(());
                }
            }
        }
        // Two tokens: a first one that has no text still leaves one that has.
        let long = Ask { max_tokens: 2, ..load.next_ask(words) };
        let asked = Instant::now();
        let answer = load.server.ask(&load.form, &long);
        pin!(answer);
        loop {
            tokio::select! {
                sample = &mut answer => {
                    let sample = sample?;
                    let first_text = sample.ttft.map_or_else(Instant::now, |ttft| asked + ttft);
                    self.long = Some(Long { asked, first_text, sample });
                    break;
                }
                arrived = stream.next(), if !self.ended_early => match arrived? {
                    Some(arrived) => self.arrivals.push(arrived),
                    None => self.ended_early = true,
                },
            }
        }
        // The gap in which the prefill ended.
        if !self.ended_early
            && let Some(arrived) = stream.next().await?
        {
            self.arrivals.push(arrived);
        }
        Ok(())
    }
}

/// The gaps between arrivals: those that ended before `from`, and those that overlap with `from..to`.
fn split(arrivals: &[Instant], from: Instant, to: Instant) -> (Vec<Duration>, Vec<Duration>) {
    let (mut before, mut during) = (Vec::new(), Vec::new());
    for pair in arrivals.windows(2) {
        let gap = pair[1] - pair[0];
        if pair[1] <= from {
            before.push(gap);
        } else if pair[0] < to {
            during.push(gap);
        }
    }
    (before, during)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gap_that_touches_the_prefill_belongs_to_it() {
        let zero = Instant::now();
        let at = |ms: u64| zero + Duration::from_millis(ms);
        let ms = |gaps: Vec<Duration>| gaps.iter().map(|g| g.as_millis()).collect::<Vec<_>>();
        let arrivals = [0, 10, 20, 35, 60, 95, 105].map(at);
        let (before, during) = split(&arrivals, at(22), at(70));
        assert_eq!((ms(before), ms(during)), (vec![10, 10], vec![15, 25, 35]));
        let (before, during) = split(&arrivals, at(20), at(20));
        assert_eq!((ms(before), ms(during)), (vec![10, 10], vec![]));
        assert_eq!(split(&[], zero, zero), (Vec::new(), Vec::new()));
    }
}
