//! The report: efficiency by scenario and stages, every figure, every seed.
use std::collections::BTreeMap;

use serde::Serialize;

use crate::figure::Figure;

/// Efficiency of a scenario at a number of stages.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Efficiency {
    /// The least share of the bound that any case reached.
    pub of_bound_min: f64,
    /// The mean over the cases.
    pub of_bound_mean: f64,
    /// Mean useful stage time over available stage time.
    pub busy_mean: f64,
    /// Cases.
    pub cases: usize,
}

/// What random workloads did.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Workloads {
    /// How many.
    pub count: u64,
    /// Their seeds are this and the next ones.
    pub first_seed: u64,
    /// Requests in all.
    pub requests: u64,
    /// Of these, given up by their clients.
    pub cancelled: u64,
    /// Tokens said, each checked.
    pub tokens: u64,
    /// Micro-batches.
    pub micro_batches: u64,
    /// Tokens guessed.
    pub guessed: u64,
    /// Of these, right.
    pub accepted: u64,
    /// Prompt tokens taken from caches.
    pub cached_tokens: u64,
    /// Seeds that broke a rule, and which.
    pub failures: Vec<String>,
}

/// Everything.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// What was run.
    pub command: String,
    /// The scenarios' seed.
    pub seed: u64,
    /// By scenario and number of stages, where there is a bound and a stage's time was counted.
    pub efficiency: BTreeMap<&'static str, BTreeMap<String, Efficiency>>,
    /// Every line of the table.
    pub figures: Vec<Figure>,
    /// The random ones.
    pub workloads: Workloads,
    /// Rules that scenarios broke.
    pub broken: Vec<String>,
    /// Whether every rule held and every threshold was reached.
    pub ok: bool,
}

/// Groups the figures that have a bound and a share of busy stages.
pub fn efficiency(figures: &[Figure]) -> BTreeMap<&'static str, BTreeMap<String, Efficiency>> {
    let mut all: BTreeMap<&'static str, BTreeMap<String, Efficiency>> = BTreeMap::new();
    for figure in figures {
        let (Some(ratio), Some(busy), Some(_)) = (figure.ratio, figure.busy, figure.bound) else { continue };
        let of = all.entry(figure.scenario).or_default().entry(figure.stages.to_string()).or_default();
        let n = of.cases as f64;
        of.of_bound_min = if of.cases == 0 { ratio } else { of.of_bound_min.min(ratio) };
        of.of_bound_mean = (of.of_bound_mean * n + ratio) / (n + 1.0);
        of.busy_mean = (of.busy_mean * n + busy) / (n + 1.0);
        of.cases += 1;
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn efficiency_is_by_scenario_and_stages() {
        let figure = |stages, value| {
            Figure::new("decode", stages, "", 0).value("rate", value, "tok/s").against(100.0, false).busy(0.5)
        };
        let all = efficiency(&[figure(2, 90.0), figure(2, 100.0), figure(4, 80.0), Figure::new("x", 2, "", 0)]);
        assert_eq!(all.len(), 1);
        let two = &all["decode"]["2"];
        assert_eq!((two.of_bound_min, two.of_bound_mean, two.cases), (0.9, 0.95, 2));
        assert_eq!(all["decode"]["4"].of_bound_min, 0.8);
    }
}
