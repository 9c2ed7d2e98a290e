//! Percentiles of samples: pure arithmetic, one definition for every number that is shown.
use serde::Serialize;

/// How samples are spread.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Spread {
    /// How many samples there are.
    pub count: usize,
    /// Their mean.
    pub mean: f64,
    /// The smallest.
    pub min: f64,
    /// The median; see [`percentile`].
    pub p50: f64,
    /// See [`percentile`].
    pub p95: f64,
    /// See [`percentile`].
    pub p99: f64,
    /// The largest.
    pub max: f64,
}

impl Spread {
    /// The spread of samples in any order; none of no samples.
    pub fn of(mut samples: Vec<f64>) -> Option<Self> {
        samples.sort_by(f64::total_cmp);
        let (min, max) = (*samples.first()?, *samples.last()?);
        Some(Self {
            count: samples.len(),
            mean: samples.iter().sum::<f64>() / samples.len() as f64,
            min,
            p50: percentile(&samples, 50)?,
            p95: percentile(&samples, 95)?,
            p99: percentile(&samples, 99)?,
            max,
        })
    }
}

/// The nearest-rank percentile: the smallest sample that at least `percent` of a hundred samples do not exceed.
///
/// With `n` sorted samples that is number `⌈percent · n / 100⌉`, counted from 1. It is always a value that was
/// measured, never one between two; with fewer than 100 samples the 99th is the largest. None of no samples.
pub fn percentile(sorted: &[f64], percent: u8) -> Option<f64> {
    let rank = (usize::from(percent) * sorted.len()).div_ceil(100).max(1);
    sorted.get(rank - 1).copied()
}

/// The median of samples in any order, by nearest rank; none of no samples.
pub fn median(samples: impl IntoIterator<Item = f64>) -> Option<f64> {
    let mut samples: Vec<f64> = samples.into_iter().collect();
    samples.sort_by(f64::total_cmp);
    percentile(&samples, 50)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_samples_of_the_nearest_rank() {
        let five = [15.0, 20.0, 35.0, 40.0, 50.0];
        for (percent, expected) in [(0, 15.0), (5, 15.0), (30, 20.0), (40, 20.0), (41, 35.0), (50, 35.0), (100, 50.0)] {
            assert_eq!(percentile(&five, percent), Some(expected), "percentile {percent}");
        }
        assert_eq!((percentile(&[7.0], 1), percentile(&[7.0], 99), percentile(&[], 50)), (Some(7.0), Some(7.0), None));
        let hundred: Vec<f64> = (1..=100).map(f64::from).collect();
        assert_eq!((percentile(&hundred, 95), percentile(&hundred, 99)), (Some(95.0), Some(99.0)));
        let ninety_nine = &hundred[..99];
        assert_eq!(percentile(ninety_nine, 99), Some(99.0), "the largest of fewer than 100");
    }

    #[test]
    fn a_spread_does_not_depend_on_the_order() {
        let spread = Spread::of(vec![3.0, 1.0, 2.0, 10.0]).unwrap();
        assert_eq!(spread, Spread::of(vec![10.0, 3.0, 2.0, 1.0]).unwrap());
        assert_eq!((spread.count, spread.mean, spread.min, spread.max), (4, 4.0, 1.0, 10.0));
        assert_eq!((spread.p50, spread.p95), (2.0, 10.0));
        assert_eq!((Spread::of(Vec::new()), median([]), median([2.0, 1.0, 9.0])), (None, None, Some(2.0)));
    }
}
