//! How long a driver that has requests may say nothing before it counts as stuck: what it did before is the forecast of
//! what it will do.
use std::time::Duration;

use tokio::time::Instant;

/// So much longer than the longest pause so far may a pause be: a larger chunk, a deeper context.
const LONGER: u32 = 10;
/// No pause shorter than this counts, whatever came before: the first chunk of a long prompt behind short answers.
const LIMIT_MIN: Duration = Duration::from_secs(60);

/// The rhythm of one driver.
pub(crate) struct Pulse {
    heard: Instant,
    longest: Option<Duration>,
    most: Duration,
}

impl Pulse {
    /// Nothing is known yet, so `most` is the limit; it always bounds it.
    pub(crate) fn new(now: Instant, most: Duration) -> Self {
        Self { heard: now, longest: None, most }
    }

    /// It got something to do.
    pub(crate) fn begin(&mut self, now: Instant) {
        self.heard = now;
    }

    /// It said something; while it had nothing to do, the pause before means nothing.
    pub(crate) fn beat(&mut self, now: Instant, busy: bool) {
        if busy {
            let pause = now.saturating_duration_since(self.heard);
            self.longest = Some(self.longest.map_or(pause, |longest| longest.max(pause)));
        }
        self.heard = now;
    }

    /// How long it may say nothing.
    pub(crate) fn limit(&self) -> Duration {
        self.longest.map_or(self.most, |longest| longest.saturating_mul(LONGER).max(LIMIT_MIN).min(self.most))
    }

    /// When it counts as stuck.
    pub(crate) fn due(&self) -> Instant {
        self.heard + self.limit()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_came_before_bounds_what_may_come() {
        let start = Instant::now();
        let s = Duration::from_secs;
        let mut p = Pulse::new(start, s(300));
        assert_eq!(p.due(), start + s(300));
        // Pauses of one who has nothing to do are no rhythm.
        p.beat(start + s(50), false);
        assert_eq!(p.due(), start + s(350));
        p.begin(start + s(100));
        p.beat(start + s(101), true);
        assert_eq!(p.limit(), LIMIT_MIN);
        p.beat(start + s(121), true);
        assert_eq!((p.limit(), p.due()), (s(200), start + s(321)));
        p.beat(start + s(200), true);
        assert_eq!(p.limit(), s(300));
    }
}
