//! The scheduler's decisions as small pure functions of the cost model: how a prompt is cut, into which groups sequences
//! are dealt, and how much prefill goes between two decode steps.
use crate::cost::{CostModel, Work};

/// Rows that chunks are made of: kernels compute rows in groups of four or eight, so that other sizes waste some.
const CHUNK_STEP: u32 = 8;
/// What a micro-batch costs beyond its computing on every stage, in microseconds: framing, waking threads. It keeps the
/// cut from becoming finer than it can pay for.
const MICRO_BATCH_US: f64 = 50.0;
/// However dear a row of a prompt is, one goes in so many decode steps.
const EVERY_MAX: u32 = 16;
/// How much faster more groups must be to be preferred: a dealing that changes for less would only make sequences wait
/// for each other.
const WORTH_A_CHANGE: f64 = 0.99;

/// Rows of each chunk of a prompt of `rows` (at least one) that has the pipeline to itself: many, and all stages work
/// but each chunk reads the weights again; few, and stages wait for the first to arrive and the last to leave.
///
/// ```text
/// stage 0 | 0 | 1 | 2 | 3 |   |       all of a chunk's time on the slowest stage,
/// stage 1 |   | 0 | 1 | 2 | 3 |       and the first one's way there
/// ```
pub fn chunk_rows(cost: &CostModel, rows: u32, start: u32, chunk_max: u32) -> u32 {
    let whole = rows.clamp(1, chunk_max.max(1));
    let stages = cost.stages() as u32;
    let parts = (1..=stages * 4).map(|n| rows.div_ceil(n).next_multiple_of(CHUNK_STEP));
    let candidates = parts.chain(round_sizes()).filter(|c| *c < whole).chain([whole]);
    let us = |chunk| prefill_us(cost, rows, start, chunk);
    // Of equally good ones the largest: it has the fewest frames.
    let best = candidates.min_by(|a, b| us(*a).total_cmp(&us(*b)).then_with(|| b.cmp(a)));
    best.unwrap_or(whole)
}

/// Sizes of chunks worth a look: doublings and those halfway between, up to the most rows a micro-batch may have.
fn round_sizes() -> impl Iterator<Item = u32> {
    (0..10).flat_map(|i| [CHUNK_STEP << i, (CHUNK_STEP << i) / 2 * 3])
}

/// Time until the last of `rows` rows from position `start` on, sent in chunks of `chunk`, has left the last stage, in
/// microseconds.
pub fn prefill_us(cost: &CostModel, rows: u32, start: u32, chunk: u32) -> f64 {
    let (full, rest) = (rows / chunk.max(1), rows % chunk.max(1));
    // All chunks together read the same cells, however they are cut: each is reckoned at the mean depth.
    let depth = u64::from(start) + u64::from(rows / 2);
    let work = |rows: u32| Work { cells: u64::from(rows) * depth, ..Work::prefill(rows, 0) };
    let slowest = |rows| cost.slowest_us(work(rows)) + MICRO_BATCH_US;
    let first = if full > 0 { chunk } else { rest };
    let others = f64::from(full.saturating_sub(1)) * slowest(chunk);
    let last = if full > 0 && rest > 0 { slowest(rest) } else { 0.0 };
    cost.through_us(work(first)) + others + last
}

/// How long one step of all groups takes, when a group's next step begins as soon as it is back: in microseconds.
///
/// Either a stage is never idle, and then the slowest one's time for all groups counts, or a group is never held up,
/// and then its way through all stages does. Sequences are reckoned as equally long, `depth` tokens.
pub fn step_us(cost: &CostModel, groups: &[usize], depth: u32) -> f64 {
    busiest_us(cost, groups, depth).max(longest_way_us(cost, groups, depth))
}

/// The way of the slowest group through all stages, in microseconds.
fn longest_way_us(cost: &CostModel, groups: &[usize], depth: u32) -> f64 {
    groups.iter().map(|n| cost.through_us(group_work(*n, depth))).fold(0.0, f64::max)
}

/// How long the busiest stage computes in one step of all groups, in microseconds.
pub fn busiest_us(cost: &CostModel, groups: &[usize], depth: u32) -> f64 {
    let stage = |s| groups.iter().map(|n| cost.stage_us(s, group_work(*n, depth)) + MICRO_BATCH_US).sum::<f64>();
    (0..cost.stages()).map(stage).fold(0.0, f64::max)
}

fn group_work(sequences: usize, depth: u32) -> Work {
    Work::decode(sequences as u32, sequences as u64 * u64::from(depth))
}

/// Sizes of the groups that `sequences` decode in, largest first: the dealing with the shortest step. More groups keep
/// more stages at work, larger ones read the weights for more rows at once; which is better is a matter of the measured
/// curves. At most `groups_max` groups of `group_max` sequences each, unless there are too many sequences for that.
pub fn deal(cost: &CostModel, sequences: usize, depth: u32, groups_max: usize, group_max: usize) -> Vec<usize> {
    let group_max = group_max.max(1);
    let fewest = sequences.div_ceil(group_max);
    let mut best: Option<(f64, Vec<usize>)> = None;
    for count in fewest.max(1)..=groups_max.max(fewest).min(sequences) {
        for sizes in dealings(sequences, count, group_max) {
            let us = step_us(cost, &sizes, depth);
            if best.as_ref().is_none_or(|(least, _)| us < least * WORTH_A_CHANGE) {
                best = Some((us, sizes));
            }
        }
    }
    best.map_or_else(Vec::new, |(_, sizes)| sizes)
}

/// Even groups, and those made of whole kernel widths with the rest in the last one.
fn dealings(sequences: usize, count: usize, group_max: usize) -> Vec<Vec<usize>> {
    let even = (0..count).map(|i| sequences * (count - i) / count - sequences * (count - i - 1) / count);
    let mut even: Vec<usize> = even.collect();
    even.sort_unstable_by(|a, b| b.cmp(a));
    let mut all = vec![even];
    for width in [2, 4, 8] {
        let size = sequences.div_ceil(count).next_multiple_of(width);
        if size <= group_max && size * (count - 1) < sequences {
            let mut sizes = vec![size; count - 1];
            sizes.push(sequences - size * (count - 1));
            if sizes != all[0] {
                all.push(sizes);
            }
        }
    }
    all
}

/// Sequences that decode, for the share of prefill: how many in each group, and how long they are on the mean.
#[derive(Clone, Copy, Debug)]
pub struct Decoding<'a> {
    /// Sizes of the groups.
    pub groups: &'a [usize],
    /// Tokens.
    pub depth: u32,
}

/// How much of a prompt travels between decode micro-batches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Share {
    /// Chunks under way at once.
    pub chunks: u32,
    /// Rows of each.
    pub rows: u32,
    /// Chunks that may be sent one after the other with no group between them: the next group waits behind them all.
    pub burst: u32,
    /// One chunk is sent in so many decode steps at most; 1 where every step may have them.
    pub every: u32,
}

/// The most that may come in of a prompt, from position `start` on, while sequences decode: a decode step then takes at
/// most `slowdown_percent` of what it takes without. At least a row now and then: a prompt must come in.
///
/// Groups and chunks go round in the ring, each followed by the next:
///
/// ```text
/// stage 0 | A | c c c | B | c c c | A | ...      a stage computes all groups and chunks of a round,
/// stage 1 | . | A | c c c | B | c c c | ...      and a group trails the chunk before it through all stages
/// ```
pub fn share(
    cost: &CostModel,
    decoding: Decoding,
    start: u32,
    slowdown_percent: u16,
    chunk_max: u32,
    chunks_max: u32,
) -> Share {
    let Decoding { groups, depth } = decoding;
    let alone = step_us(cost, groups, depth);
    let allowed = alone * f64::from(slowdown_percent) / 100.0;
    let largest = cost.slowest_us(group_work(groups.iter().copied().max().unwrap_or(0), depth));
    let round = |chunks: u32, rows: u32| {
        let chunk = Work::prefill(rows, start);
        let stage = |s: usize| {
            let decode: f64 = groups.iter().map(|n| cost.stage_us(s, group_work(*n, depth))).sum();
            decode + (cost.stage_us(s, chunk) + MICRO_BATCH_US) * f64::from(chunks)
        };
        let busiest = (0..cost.stages()).map(stage).fold(0.0, f64::max);
        busiest.max(cost.through_us(chunk) + MICRO_BATCH_US + largest)
    };
    let sizes = [1, 2, 3, 4, 6].into_iter().chain(round_sizes()).filter(|c| *c <= chunk_max);
    let best = sizes
        .filter_map(|rows| {
            // More than fit into the stages at once would only wait before the first.
            let chunk = Work::prefill(rows, start);
            let at_once = (cost.through_us(chunk) / cost.slowest_us(chunk).max(1.0)) as u32;
            let most = at_once.clamp(1, chunks_max.max(1));
            (1..=most).rev().find(|chunks| round(*chunks, rows) <= allowed).map(|chunks| (chunks, rows))
        })
        .max_by_key(|(chunks, rows)| (chunks * rows, *rows));
    match best {
        Some((chunks, rows)) => {
            // As many as the first stage is through with when the group that was sent before them is back; and each of
            // the groups has such a burst before it.
            let all = cost.slowest_us(Work::prefill(rows, start)) * groups.len() as f64;
            let burst = (longest_way_us(cost, groups, depth) / all.max(1.0)) as u32;
            Share { chunks, rows, burst: burst.clamp(1, chunks), every: 1 }
        }
        None => {
            // So seldom that the mean of all steps keeps to what is allowed.
            let (over, room) = (round(1, 1) - alone, (allowed - alone).max(alone / 100.0));
            Share { chunks: 1, rows: 1, burst: 1, every: ((over / room).ceil() as u32).clamp(2, EVERY_MAX) }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Stages that read weights for `fixed` and compute a row in `row` microseconds.
    fn linear(stages: &[(f64, f64)]) -> CostModel {
        let mut cost = CostModel::new(stages.len() as u16);
        for n in (0..13).map(|i| 1u32 << i) {
            let us: Vec<u32> = stages.iter().map(|(fixed, row)| (fixed + row * f64::from(n)) as u32).collect();
            cost.observe(Work::prefill(n, 0), &us, None);
            cost.observe(Work::decode(n, 0), &us, None);
        }
        cost
    }

    #[test]
    fn a_prompt_is_cut_where_it_keeps_stages_busy() {
        // Rows dominate: many chunks. Reading weights dominates: few.
        let rows = linear(&[(1000.0, 1000.0), (1000.0, 1000.0)]);
        assert!((8..=64).contains(&chunk_rows(&rows, 512, 0, 512)), "{}", chunk_rows(&rows, 512, 0, 512));
        let weights = linear(&[(1_000_000.0, 1000.0), (1_000_000.0, 1000.0)]);
        assert_eq!(chunk_rows(&weights, 512, 0, 512), 512);
        assert_eq!(chunk_rows(&rows, 512, 0, 16), 16);
        assert_eq!(chunk_rows(&linear(&[(1000.0, 1000.0)]), 512, 0, 512), 512);
        assert_eq!((chunk_rows(&rows, 1, 0, 512), chunk_rows(&rows, 3, 0, 512)), (1, 3));
    }

    #[test]
    fn the_cut_is_the_best_of_all_sizes_within_a_few_percent() {
        for stages in [&[(3000.0, 400.0); 2][..], &[(9000.0, 100.0); 4], &[(500.0, 900.0), (4000.0, 300.0)]] {
            let cost = linear(stages);
            for rows in [40, 129, 512, 2000] {
                let best = (1..=512).map(|c| prefill_us(&cost, rows, 0, c)).fold(f64::INFINITY, f64::min);
                let chosen = prefill_us(&cost, rows, 0, chunk_rows(&cost, rows, 0, 512));
                assert!(chosen <= best * 1.05, "{rows} rows: {chosen} against {best}");
            }
        }
    }

    #[test]
    fn sequences_are_dealt_by_what_is_faster() {
        // Every row costs the same: as many groups as stages. Rows are free: one group.
        let rows = linear(&[(10.0, 10_000.0), (10.0, 10_000.0)]);
        assert_eq!(deal(&rows, 8, 0, 2, 64), [4, 4]);
        assert_eq!(deal(&rows, 1, 0, 2, 64), [1]);
        let free = linear(&[(100_000.0, 1.0), (100_000.0, 1.0)]);
        assert_eq!(deal(&free, 8, 0, 2, 64), [8]);
        assert_eq!(deal(&free, 5, 0, 2, 2), [2, 2, 1]);
        assert_eq!(deal(&rows, 3, 0, 4, 1), [1, 1, 1]);
        assert_eq!(deal(&rows, 0, 0, 4, 1), [0usize; 0]);
    }

    #[test]
    fn kernel_widths_count() {
        // Four rows cost what one does: 20 sequences are 8, 8 and 4, not 7, 7 and 6.
        let mut cost = CostModel::new(2);
        for n in 1..=16u32 {
            let us = n.div_ceil(4) * 10_000;
            cost.observe(Work::decode(n, 0), &[us, us], None);
        }
        assert_eq!(deal(&cost, 16, 0, 2, 64), [8, 8]);
        assert_eq!(deal(&cost, 20, 0, 3, 64), [8, 8, 4]);
    }

    #[test]
    fn prefill_takes_no_more_than_its_share() {
        let cost = linear(&[(1000.0, 1000.0), (1000.0, 1000.0)]);
        let share = |groups: &[usize], percent, max| share(&cost, Decoding { groups, depth: 0 }, 0, percent, max, 4);
        // Alone a step takes two stages' time, 4 ms: 7 ms are allowed, in which a chunk passes both stages before it.
        assert_eq!(share(&[1], 175, 512), Share { chunks: 2, rows: 1, burst: 2, every: 1 });
        let several = share(&[8, 8], 175, 512);
        assert!(several.chunks * several.rows >= 8 && several.every == 1, "{several:?}");
        assert!(share(&[1, 1], 100, 512).every > 1);
        assert!(share(&[1], 1000, 4).rows <= 4);
    }
}
