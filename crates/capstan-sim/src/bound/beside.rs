//! A prompt that comes in while others decode: the shortest time to its first token that the share leaves it.
//!
//! Groups and chunks go round the ring together. A round takes the time of all of them on the busiest stage, and no
//! group comes round faster than the chunk before it:
//!
//! ```text
//! round(n, r) = max( on any stage: sum of groups + n * chunk of r rows,  way of such a chunk + a group on the last stage )
//! ```
//! The share allows a round to take so many percent of what it takes without chunks. Within that, as many rows as
//! possible go along, in as many chunks as suits.
use crate::bound::decode::{best_equal, round_ns};
use crate::cost::{Ns, Profile, Shape};

/// Others that decode.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Beside {
    /// How many sequences.
    pub sequences: usize,
    /// How deep each is.
    pub depth: u32,
    /// How long a round may take, in percent of what it takes without chunks.
    pub slowdown_percent: u16,
    /// Most rows of a chunk.
    pub chunk_max: u32,
}

/// Time in which a prompt of `rows` comes in beside others.
pub fn prompt_ns(profile: &Profile, rows: u32, beside: Beside) -> Ns {
    let Beside { sequences, depth, slowdown_percent, chunk_max } = beside;
    let dealt = best_equal(profile, sequences, depth, sequences);
    let groups: Vec<Shape> = dealt.sizes.iter().map(|n| Shape::decode(&vec![depth; *n])).collect();
    let allowed = round_ns(profile, &groups) * u64::from(slowdown_percent) / 100;
    let last = profile.stages.len() - 1;
    let trailing = groups.iter().map(|g| profile.stage_ns(last, *g)).max().unwrap_or(0);
    let fits = |from: u32, count: u32, size: u32| {
        let chunk = Shape::chunk(from, size, 0);
        let busy = |i: usize| {
            groups.iter().map(|g| profile.stage_ns(i, *g)).sum::<Ns>() + u64::from(count) * profile.stage_ns(i, chunk)
        };
        (0..profile.stages.len()).all(|i| busy(i) <= allowed) && profile.through_ns(chunk) + trailing <= allowed
    };
    let (mut from, mut time) = (0, 0);
    while from < rows {
        let most =
            (1..=2 * profile.stages.len() as u32).map(|count| count * largest(chunk_max, |r| fits(from, count, r)));
        // Where not even one row fits into a round, one goes along in any case.
        from += most.max().unwrap_or(0).max(1);
        time += allowed;
    }
    time
}

/// The largest number up to `max` for which it holds, 0 if for none; it must hold for all below, too.
fn largest(max: u32, holds: impl Fn(u32) -> bool) -> u32 {
    let (mut low, mut high) = (0, max);
    while low < high {
        let middle = (low + high).div_ceil(2);
        if holds(middle) { low = middle } else { high = middle - 1 }
    }
    low
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cost::{LinkCost, StageCost};

    #[test]
    fn the_largest_is_found() {
        assert_eq!([0, 1, 7, 8].map(|n| largest(8, |r| r <= n)), [0, 1, 7, 8]);
    }

    #[test]
    fn a_larger_share_is_faster_and_none_is_as_fast_as_alone() {
        let link = LinkCost { latency_us: 0.0, bytes_per_s: 1e12 };
        let profile = Profile::even(4, StageCost::linear(4000.0, 60.0, 0.0), link, 64);
        let time = |slowdown_percent| {
            let beside = Beside { sequences: 1, depth: 100, slowdown_percent, chunk_max: 512 };
            prompt_ns(&profile, 2048, beside)
        };
        assert!(time(175) < time(150) && time(300) < time(175));
        // Four chunks of some 34 rows in each of 16 rounds of 28.5 ms.
        assert!((440_000_000..470_000_000).contains(&time(175)), "{}", time(175));
    }
}
