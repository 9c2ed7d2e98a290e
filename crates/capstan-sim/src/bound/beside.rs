//! A prompt that comes in while others decode: the shortest time to its first token that the share leaves it.
//!
//! Groups and chunks go round the ring together. A round takes the time of all of them on the busiest stage, and a group
//! that leaves the first stage behind a chunk follows it through the others:
//!
//! ```text
//! round(n, r) = max( on any stage: sum of groups + n * chunk of r rows,
//!                    such a chunk on all stages but the first, and links + a group on the last stage,
//!                    round without chunks )
//! ```
//! The share allows each round to take so many percent of the shortest one without chunks. Within that, the dealing, the
//! number of chunks and their rows are those under which rows come in fastest.
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
    let Beside { sequences, slowdown_percent, .. } = beside;
    let (mut from, mut time) = (0, 0);
    let mut beside = beside;
    while from < rows {
        let alone = best_equal(profile, sequences, beside.depth, sequences).round_ns;
        let allowed = alone * u64::from(slowdown_percent) / 100;
        // A piece is enough to tell how attention grows dearer.
        let piece = (rows - from).min(PIECE);
        let rate = rows_per_ns(profile, from, allowed, beside);
        // Where not even one row fits into a round, one goes along in any case.
        let took = if rate > 0.0 { (f64::from(piece) / rate) as Ns } else { u64::from(piece) * allowed };
        // Those who decode grow deeper meanwhile, by a token a round at the least.
        beside.depth += (took / allowed.max(1)) as u32;
        (from, time) = (from + piece, time + took);
    }
    // What is reckoned is the first stage's time, or that of the busiest: the last row has yet to pass the others.
    let row = Shape::chunk(rows.saturating_sub(1), 1, 1);
    time + profile.through_ns(row) - profile.slowest_ns(row)
}

/// Rows that are reckoned at once.
const PIECE: u32 = 128;

/// The most rows in a nanosecond, from position `from` on.
fn rows_per_ns(profile: &Profile, from: u32, allowed: Ns, beside: Beside) -> f64 {
    let Beside { sequences, depth, chunk_max, .. } = beside;
    let last = profile.stages.len() - 1;
    let mut most = 0.0;
    // Even groups, as many as may be.
    for count in 1..=sequences {
        let size = |i: usize| sequences * (i + 1) / count - sequences * i / count;
        let groups: Vec<Shape> = (0..count).map(|i| Shape::decode(&vec![depth; size(i)])).collect();
        let plain = round_ns(profile, &groups);
        let decode: Vec<Ns> = (0..=last).map(|i| groups.iter().map(|g| profile.stage_ns(i, *g)).sum::<Ns>()).collect();
        let end = groups.iter().map(|g| profile.stage_ns(last, *g)).max().unwrap_or(0);
        for rows in 1..=chunk_max {
            let chunk = Shape::chunk(from, rows, 0);
            let each: Vec<Ns> = (0..=last).map(|i| profile.stage_ns(i, chunk)).collect();
            let trailing = each.iter().skip(1).sum::<Ns>() + profile.hops_ns(rows) + end;
            if trailing.max(plain) > allowed {
                continue;
            }
            let room = decode.iter().zip(&each).map(|(d, c)| allowed.saturating_sub(*d) as f64 / *c as f64);
            let chunks = room.fold(f64::INFINITY, f64::min).floor();
            if chunks >= 1.0 {
                let busy = decode.iter().zip(&each).map(|(d, c)| *d as f64 + chunks * *c as f64).fold(0.0, f64::max);
                most = f64::max(most, chunks * f64::from(rows) / busy.max(trailing.max(plain) as f64));
            }
        }
    }
    most
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cost::{LinkCost, StageCost};

    #[test]
    fn a_larger_share_is_faster_and_none_is_as_fast_as_alone() {
        let link = LinkCost { latency_us: 0.0, bytes_per_s: 1e12 };
        let profile = Profile::even(4, StageCost::linear(4000.0, 60.0, 0.0), link, 64);
        let time = |slowdown_percent| {
            let beside = Beside { sequences: 1, depth: 100, slowdown_percent, chunk_max: 512 };
            prompt_ns(&profile, 2048, beside)
        };
        assert!(time(175) < time(150) && time(300) < time(175));
        // Three chunks of some 68 rows in a round of 28.5 ms, and the last row has three stages to pass.
        assert!((280_000_000..330_000_000).contains(&time(175)), "{}", time(175));
    }
}
