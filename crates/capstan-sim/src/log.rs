//! What happened in a run, for the figures: requests with the times of their tokens, micro-batches with what they took.
use capstan_engine::BatchKind;

use crate::cost::Ns;
use crate::text::{Alone, End, Text};

/// What a client asks for.
#[derive(Clone, Debug, PartialEq)]
pub struct Request {
    /// Its tokens.
    pub prompt: Vec<i32>,
    /// Most tokens of the answer.
    pub max_tokens: u32,
    /// How the answer goes.
    pub text: Text,
}

/// A request and what became of it.
#[derive(Clone, Debug)]
pub struct RequestLog {
    /// What was asked for.
    pub request: Request,
    /// What it gets alone.
    pub wanted: Alone,
    /// When it reached the driver.
    pub arrived_ns: Ns,
    /// When it got a slot.
    pub started_ns: Option<Ns>,
    /// Prompt tokens that were in the cache already.
    pub cached: u32,
    /// Whether there was no room for it.
    pub refused: bool,
    /// The answer.
    pub tokens: Vec<i32>,
    /// When each token was sampled.
    pub token_ns: Vec<Ns>,
    /// How it ended.
    pub end: Option<End>,
    /// When.
    pub end_ns: Option<Ns>,
}

impl RequestLog {
    /// A request that has not arrived yet.
    pub fn new(request: Request, wanted: Alone) -> Self {
        Self {
            request,
            wanted,
            arrived_ns: 0,
            started_ns: None,
            cached: 0,
            refused: false,
            tokens: Vec::new(),
            token_ns: Vec::new(),
            end: None,
            end_ns: None,
        }
    }

    /// Time to the first token.
    pub fn ttft_ns(&self) -> Option<Ns> {
        Some(self.token_ns.first()? - self.arrived_ns)
    }

    /// Times between tokens of which the later one was sampled within `from..to`.
    pub fn gaps_ns(&self, from: Ns, to: Ns) -> Vec<Ns> {
        let pairs = self.token_ns.windows(2).filter(|w| (from..to).contains(&w[1]));
        pairs.map(|w| w[1] - w[0]).collect()
    }

    /// No token may be lost, doubled or out of order: the answer is the one it gets alone, or its beginning.
    pub fn check(&self) -> Result<(), String> {
        let whole = self.tokens == self.wanted.tokens && self.end == Some(self.wanted.end);
        let cut = self.end == Some(End::Cancelled) && self.wanted.tokens.starts_with(&self.tokens);
        if whole || cut {
            return Ok(());
        }
        let (got, want) = (self.tokens.len(), self.wanted.tokens.len());
        Err(format!("{got} tokens and {:?} instead of {want} and {:?}", self.end, self.wanted.end))
    }
}

/// A micro-batch that came back.
#[derive(Clone, Debug)]
pub struct StepLog {
    /// Its number.
    pub step: u64,
    /// What it was for.
    pub kind: BatchKind,
    /// Rows that were planned.
    pub rows: u32,
    /// Outputs that a token was sampled from.
    pub outputs: u32,
    /// Whether it was in vain.
    pub void: bool,
    /// When the driver began to send it.
    pub sent_ns: Ns,
    /// When its tokens were sampled.
    pub done_ns: Ns,
    /// What each stage took; 0 where it was not computed.
    pub spent_ns: Vec<Ns>,
}

/// The value below which this share of the values lies, 0 for none.
pub fn quantile(values: &mut [Ns], share: f64) -> Ns {
    values.sort_unstable();
    let last = values.len().saturating_sub(1);
    values.get((last as f64 * share).round() as usize).copied().unwrap_or(0)
}

/// Share of the stages' time within `from..to` that was spent on micro-batches whose result was used.
///
/// A micro-batch counts with all its stages when its tokens were sampled within: over a window that is long against a
/// round trip the error at both ends is small.
pub fn useful_share(steps: &[StepLog], stages: usize, from: Ns, to: Ns) -> f64 {
    let within = steps.iter().filter(|s| (from..to).contains(&s.done_ns));
    let used = within.filter(|s| !s.void && s.kind != BatchKind::Measure);
    let spent: Ns = used.flat_map(|s| &s.spent_ns).sum();
    spent as f64 / (stages as f64 * (to - from) as f64)
}
