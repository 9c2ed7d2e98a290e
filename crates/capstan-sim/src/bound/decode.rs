//! Saturated decode: the shortest round over all dealings of the sequences into micro-batches.
//!
//! In a round every sequence gets one token. A stage must compute all micro-batches, a link must carry them all, and
//! none can begin its next round before it is back:
//!
//! ```text
//! round >= sum over micro-batches of their time on any one stage or link
//! round >= any one micro-batch's way through everything
//! ```
use crate::cost::{Ns, Profile, Shape};

/// Most sequences whose dealings are enumerated where they are alike: partitions of 32 are 8349.
pub const EQUAL_MAX: usize = 32;
/// Most sequences whose dealings are enumerated where they differ: partitions of a set of 9 are 21147.
pub const DIFFERENT_MAX: usize = 9;

/// A dealing and the round it makes possible.
#[derive(Clone, Debug, PartialEq)]
pub struct Dealt {
    /// Rows of each micro-batch, largest first.
    pub sizes: Vec<usize>,
    /// The shortest time in which every sequence can get a token.
    pub round_ns: Ns,
}

/// The shortest round of these micro-batches.
pub fn round_ns(profile: &Profile, batches: &[Shape]) -> Ns {
    let stages = 0..profile.stages.len();
    let busiest = stages.map(|i| batches.iter().map(|b| profile.stage_ns(i, *b)).sum::<Ns>()).max().unwrap_or(0);
    let links = profile.links.iter().filter(|_| profile.stages.len() > 1);
    let links = links.map(|l| batches.iter().map(|b| l.sending_ns(profile.bytes(b.rows))).sum::<Ns>());
    let through = batches.iter().map(|b| profile.through_ns(*b));
    links.chain(through).fold(busiest, Ns::max)
}

/// The same of micro-batches that stages compute in runs, one after the other.
fn round_runs_ns(profile: &Profile, batches: &[Vec<Shape>]) -> Ns {
    let of = |i: usize| batches.iter().map(move |b| profile.stage_runs_ns(i, b));
    let busiest = (0..profile.stages.len()).map(|i| of(i).sum::<Ns>()).max().unwrap_or(0);
    let rows = |b: &[Shape]| b.iter().map(|run| run.rows).sum::<u32>();
    let links = profile.links.iter().filter(|_| profile.stages.len() > 1);
    let links = links.map(|l| batches.iter().map(|b| l.sending_ns(profile.bytes(rows(b)))).sum::<Ns>());
    let own = |b: &Vec<Shape>| (0..profile.stages.len()).map(|i| profile.stage_runs_ns(i, b)).sum::<Ns>();
    let through = batches.iter().map(|b| own(b) + profile.hops_ns(rows(b)));
    links.chain(through).fold(busiest, Ns::max)
}

/// The runs of consecutive slots of a group of slots and depths.
fn runs(group: &[(u32, u32)]) -> Vec<Shape> {
    let runs = group.chunk_by(|a, b| a.0 + 1 == b.0);
    runs.map(|run| Shape::decode(&run.iter().map(|(_, depth)| *depth).collect::<Vec<_>>())).collect()
}

/// The best dealing of so many sequences of one depth, at most `batch_max` in a micro-batch.
pub fn best_equal(profile: &Profile, sequences: usize, depth: u32, batch_max: usize) -> Dealt {
    assert!(sequences <= EQUAL_MAX, "too many dealings to try");
    let shape = |n: usize| Shape::decode(&vec![depth; n]);
    let shapes: Vec<Shape> = (0..=sequences).map(shape).collect();
    let mut best = Dealt { sizes: Vec::new(), round_ns: Ns::MAX };
    let mut sizes = Vec::new();
    partitions(sequences, batch_max.min(sequences), &mut sizes, &mut |sizes| {
        let batches: Vec<Shape> = sizes.iter().map(|n| shapes[*n]).collect();
        let round_ns = round_ns(profile, &batches);
        if round_ns < best.round_ns {
            best = Dealt { sizes: sizes.to_vec(), round_ns };
        }
    });
    best
}

/// The best dealing of sequences in these slots, ascending, of these depths.
pub fn best_different(profile: &Profile, sequences: &[(u32, u32)], batch_max: usize) -> Dealt {
    assert!(sequences.len() <= DIFFERENT_MAX, "too many dealings to try");
    let mut best = Dealt { sizes: Vec::new(), round_ns: Ns::MAX };
    let mut groups: Vec<Vec<(u32, u32)>> = Vec::new();
    set_partitions(sequences, batch_max, &mut groups, &mut |groups| {
        let batches: Vec<Vec<Shape>> = groups.iter().map(|g| runs(g)).collect();
        let round_ns = round_runs_ns(profile, &batches);
        if round_ns < best.round_ns {
            let mut sizes: Vec<usize> = groups.iter().map(Vec::len).collect();
            sizes.sort_unstable_by(|a, b| b.cmp(a));
            best = Dealt { sizes, round_ns };
        }
    });
    best
}

/// Every way to write `left` as a sum of numbers up to `max`, largest first.
fn partitions(left: usize, max: usize, sizes: &mut Vec<usize>, visit: &mut dyn FnMut(&[usize])) {
    if left == 0 {
        return visit(sizes);
    }
    for n in (1..=max.min(left)).rev() {
        sizes.push(n);
        partitions(left - n, n, sizes, visit);
        sizes.pop();
    }
}

/// Every way to put these into groups: the next one joins each group there is, or opens one.
fn set_partitions<T: Copy>(left: &[T], max: usize, groups: &mut Vec<Vec<T>>, visit: &mut dyn FnMut(&[Vec<T>])) {
    let Some((first, rest)) = left.split_first() else { return visit(groups) };
    for i in 0..groups.len() {
        if groups[i].len() < max {
            groups[i].push(*first);
            set_partitions(rest, max, groups, visit);
            groups[i].pop();
        }
    }
    groups.push(vec![*first]);
    set_partitions(rest, max, groups, visit);
    groups.pop();
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cost::{DriverCost, LinkCost, RowCost, StageCost};

    fn free_driver(stages: usize, cost: StageCost) -> Profile {
        let link = LinkCost { latency_us: 0.0, bytes_per_s: 1e15 };
        let driver = DriverCost { batch_us: 0.0, row_us: 0.0, output_us: 0.0, draft_us: 0.0 };
        Profile { driver, ..Profile::even(stages, cost, link, 1) }
    }

    #[test]
    fn all_partitions_are_visited_once() {
        let mut count = 0;
        partitions(10, 10, &mut Vec::new(), &mut |_| count += 1);
        assert_eq!(count, 42);
        count = 0;
        set_partitions(&[1; 6], 6, &mut Vec::new(), &mut |_| count += 1);
        assert_eq!(count, 203);
    }

    #[test]
    fn rows_that_cost_alike_are_dealt_over_the_stages() {
        let profile = free_driver(4, StageCost::linear(0.0, 100.0, 0.0));
        let dealt = best_equal(&profile, 8, 10, 64);
        assert_eq!(dealt.round_ns, 800_000);
        assert!(dealt.sizes[0] <= 2);
        let lone = best_equal(&profile, 1, 10, 64);
        assert_eq!((lone.sizes, lone.round_ns), (vec![1], 400_000));
    }

    #[test]
    fn kernels_want_whole_widths() {
        let rows = RowCost::Tiles(vec![(4, 107.0), (1, 53.0)]);
        let cost = StageCost { fixed_us: 36.0, rows, depth_us: 0.0, head_us: 0.0, op_us: 0.0 };
        let dealt = best_equal(&free_driver(2, cost), 6, 10, 64);
        assert_eq!(dealt.sizes, [4, 2]);
    }

    #[test]
    fn depths_are_balanced() {
        let profile = free_driver(2, StageCost::linear(0.0, 1.0, 1.0));
        let dealt = best_different(&profile, &[(0, 300), (1, 100), (2, 100), (3, 100)], 64);
        // On each stage all depths count; the deepest micro-batch alone is 2 x 301.
        assert_eq!(dealt.round_ns, 604_000);
        // Slots that do not follow each other are computed one after the other.
        let cost = StageCost::linear(100.0, 10.0, 0.0);
        let dealt = best_different(&free_driver(2, cost), &[(0, 9), (1, 9), (5, 9), (6, 9)], 64);
        assert_eq!((dealt.sizes, dealt.round_ns), (vec![2, 2], 240_000));
    }
}
