//! Progress comes from disk and network by the megabyte; people read it a few times a second.
use std::time::{Duration, Instant};

/// Least time between two reports of the same progress.
const STEP: Duration = Duration::from_millis(100);

/// Lets through the first report, the last, and at most ten a second between them.
#[derive(Default)]
pub(crate) struct Throttle {
    last: Option<Instant>,
}

impl Throttle {
    /// Whether to report that `done` of `total` bytes are done.
    pub(crate) fn lets(&mut self, done: u64, total: u64) -> bool {
        let now = Instant::now();
        let lets = done >= total || self.last.is_none_or(|last| now.duration_since(last) >= STEP);
        if lets {
            self.last = Some(now);
        }
        lets
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_and_the_last_pass_and_few_between() {
        let mut throttle = Throttle::default();
        let begun = Instant::now();
        let passed: Vec<_> = (0..=100_000).filter(|&done| throttle.lets(done, 100_000)).collect();
        let most = 2 + begun.elapsed().as_millis() as usize / STEP.as_millis() as usize;
        assert_eq!((passed.first(), passed.last()), (Some(&0), Some(&100_000)));
        assert!(passed.len() <= most, "{} of {most}", passed.len());
    }
}
