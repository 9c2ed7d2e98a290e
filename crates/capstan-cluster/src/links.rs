//! Which links have become slow: round trips are compared with the shortest one of before, which is forgotten slowly: after
//! half a day a link is what it has become.
//!
//! A machine that computes answers late now and then, so a link counts as slow only when all of the last round trips were
//! long, and as well again when one was short.
use std::collections::{BTreeMap, VecDeque};

use capstan_proto::NodeId;

/// Round trips that must all be long: ten seconds of polls.
const LAST: usize = 10;
/// So many times the shortest round trip is long.
const LONGER: f64 = 8.0;
/// No shorter round trip is long, in microseconds: a token goes round in some tens of milliseconds.
const LONG_US: f64 = 10_000.0;
/// Round trips in which most of the difference is forgotten: four days of polls.
const FORGOTTEN: f64 = 4.0 * 86_400.0;

#[derive(Clone, Debug, Default)]
struct Watched {
    least_us: Option<f64>,
    last: VecDeque<u64>,
    slow: bool,
}

impl Watched {
    fn now_us(&self) -> u64 {
        self.last.iter().copied().min().unwrap_or(0)
    }
}

/// A link that is slower than it was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SlowLink {
    /// Its other end.
    pub to: NodeId,
    /// The shortest round trip so far, in microseconds.
    pub least_us: u64,
    /// The shortest of the last ones, in microseconds.
    pub now_us: u64,
}

/// The links of one node.
#[derive(Clone, Debug, Default)]
pub struct LinkWatch {
    links: BTreeMap<NodeId, Watched>,
}

impl LinkWatch {
    /// A round trip took so long. Returns whether the link has become slow, or well again.
    pub fn round_trip(&mut self, to: NodeId, rtt_us: u64) -> bool {
        let link = self.links.entry(to).or_default();
        let now = rtt_us as f64;
        let least_us = link.least_us.map_or(now, |least| now.min(least + (now - least) / FORGOTTEN));
        link.least_us = Some(least_us);
        if link.last.len() == LAST {
            link.last.pop_front();
        }
        link.last.push_back(rtt_us);
        let long = (least_us * LONGER).max(LONG_US);
        let slow = link.last.len() == LAST && link.now_us() as f64 > long;
        std::mem::replace(&mut link.slow, slow) != slow
    }

    /// The links that are slow.
    pub fn slow(&self) -> impl Iterator<Item = SlowLink> {
        let slow = self.links.iter().filter(|(_, l)| l.slow);
        slow.map(|(to, l)| SlowLink { to: *to, least_us: l.least_us.unwrap_or(0.0) as u64, now_us: l.now_us() })
    }

    /// Forgets a node.
    pub fn forget(&mut self, node: NodeId) {
        self.links.remove(&node);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TO: NodeId = NodeId([1; 32]);

    fn after(round_trips: impl IntoIterator<Item = u64>) -> LinkWatch {
        let mut watch = LinkWatch::default();
        round_trips.into_iter().for_each(|us| _ = watch.round_trip(TO, us));
        watch
    }

    #[test]
    fn a_link_is_slow_when_all_of_the_last_round_trips_were_long() {
        let mut watch = after([300; 20]);
        for i in 1..=LAST {
            assert_eq!(watch.round_trip(TO, 40_000), i == LAST, "{i}");
        }
        let slow: Vec<_> = watch.slow().collect();
        assert!(matches!(slow[..], [SlowLink { to: TO, least_us: 300..310, now_us: 40_000 }]), "{slow:?}");
        assert!(watch.round_trip(TO, 500), "well again");
        assert!(!watch.round_trip(TO, 40_000) && watch.slow().next().is_none());
    }

    #[test]
    fn a_busy_machine_and_a_link_that_was_always_long_are_none() {
        // One short one in ten is enough.
        assert!(after((0..100).map(|i| if i % 9 == 0 { 900 } else { 50_000 })).slow().next().is_none());
        assert!(after([80_000; 40]).slow().next().is_none());
        assert!(after([100; 20].into_iter().chain([9_000; 40])).slow().next().is_none(), "too short to be felt");
        let mut watch = after([100; 20].into_iter().chain([90_000; 40]));
        watch.forget(TO);
        assert!(watch.slow().next().is_none());
    }

    #[test]
    fn after_a_day_a_link_is_what_it_has_become() {
        let hours = |n: usize| after([300; 20].into_iter().chain(std::iter::repeat_n(40_000, n * 3600)));
        assert_eq!(hours(6).slow().count(), 1);
        assert_eq!(hours(24).slow().count(), 0);
    }
}
