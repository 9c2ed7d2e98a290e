//! How often somebody failed to show a key, so that guessing is slow and does not fill the log.
//!
//! Each party has a bucket of failures that fills up again slowly; one that is empty is told to wait (429) instead of
//! being told that its key is wrong. A right key always passes: 256 bits leave a guesser nothing to hope for, and
//! whoever shares an address with one (behind a router, a proxy) must not be locked out by it.
use std::collections::HashMap;
use std::net::IpAddr;
use std::time::{Duration, Instant};

/// Failures that a party may have at once: a program with an old key that tries a few times, in a few tabs.
const BURST: u32 = 20;
/// How long until one more is allowed.
const REFILL: Duration = Duration::from_secs(3);
/// Most parties that are remembered. When more come, those who waited longest are forgotten.
const PARTIES_MAX: usize = 1024;

#[derive(Debug)]
struct Bucket {
    left: u32,
    /// From when on it fills up again.
    since: Instant,
}

/// The failures of everybody lately.
#[derive(Debug, Default)]
pub(crate) struct Attempts {
    parties: HashMap<IpAddr, Bucket>,
}

impl Attempts {
    /// Notes a failure. An error says after how many seconds the next attempt makes sense.
    pub(crate) fn failed(&mut self, party: IpAddr, now: Instant) -> Result<(), u32> {
        if !self.parties.contains_key(&party) && self.parties.len() >= PARTIES_MAX {
            self.make_room(now);
        }
        let bucket = self.parties.entry(party).or_insert(Bucket { left: BURST, since: now });
        let elapsed = now.saturating_duration_since(bucket.since);
        let refilled = (elapsed.as_millis() / REFILL.as_millis()).min(u128::from(BURST)) as u32;
        if bucket.left + refilled >= BURST {
            (bucket.left, bucket.since) = (BURST, now);
        } else if refilled > 0 {
            bucket.left += refilled;
            bucket.since += REFILL * refilled;
        }
        if bucket.left == 0 {
            let wait = REFILL.saturating_sub(now.saturating_duration_since(bucket.since));
            return Err(wait.as_secs() as u32 + 1);
        }
        bucket.left -= 1;
        Ok(())
    }

    fn make_room(&mut self, now: Instant) {
        // A full bucket is as good as none.
        self.parties.retain(|_, b| now.saturating_duration_since(b.since) < REFILL * (BURST - b.left));
        if self.parties.len() >= PARTIES_MAX {
            let oldest = self.parties.iter().min_by_key(|(_, b)| b.since).map(|(party, _)| *party);
            if let Some(party) = oldest {
                self.parties.remove(&party);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn party(n: u32) -> IpAddr {
        IpAddr::V4(n.into())
    }

    #[test]
    fn a_burst_passes_then_one_each_few_seconds() {
        let (mut attempts, start) = (Attempts::default(), Instant::now());
        assert!((0..BURST).all(|_| attempts.failed(party(1), start).is_ok()));
        assert_eq!(attempts.failed(party(1), start), Err(REFILL.as_secs() as u32 + 1));
        assert!(attempts.failed(party(2), start).is_ok(), "others are not held up");
        assert!(attempts.failed(party(1), start + REFILL).is_ok());
        assert!(attempts.failed(party(1), start + REFILL).is_err());
        // Waiting does not save up more than a burst.
        let late = start + REFILL * (10 * BURST);
        assert_eq!((0..2 * BURST).filter(|_| attempts.failed(party(1), late).is_ok()).count(), BURST as usize);
    }

    #[test]
    fn only_so_many_are_remembered() {
        let (mut attempts, start) = (Attempts::default(), Instant::now());
        for n in 0..2 * PARTIES_MAX as u32 {
            attempts.failed(party(n), start + Duration::from_millis(u64::from(n))).unwrap();
        }
        assert!(attempts.parties.len() <= PARTIES_MAX);
        let late = start + REFILL * (2 * BURST);
        attempts.make_room(late);
        assert!(attempts.parties.is_empty());
    }
}
