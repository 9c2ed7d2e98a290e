//! The scheduler's decisions about prompts as small pure functions of the cost model: how one is cut that is alone, and
//! how much of it goes between decode steps.
use crate::cost::{CostModel, Work};
use crate::dealing::{self, Load, MICRO_BATCH_US};

/// Rows that chunks are made of: kernels compute rows in groups of four or eight, so that other sizes waste some.
const CHUNK_STEP: u32 = 8;
/// Rounds may have different numbers of chunks, so that their mean is just what is allowed, where a group's way behind a
/// chunk is no longer than this share of a round, and no round is this much too long. Where the way is longer, what one
/// round has more delays the group twice.
const LOOSE: f64 = 0.8;
const OVER: f64 = 1.06;
/// How much faster other sizes must be to be preferred to those there are: with each change some group waits.
const STEADY: f64 = 1.05;
/// A size that lies between those that were observed must promise so much more: kernels of given widths make the curve
/// between them lie above the straight line.
const DOUBT: f64 = 1.03;
/// However dear a row of a prompt is, one goes in so many decode steps.
const EVERY_MAX: u32 = 16;

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
    let doubt = |chunk| if cost.knows_chunk(chunk) { 1.0 } else { DOUBT };
    let us = |chunk| prefill_us(cost, rows, start, chunk) * doubt(chunk);
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

/// How much of a prompt travels between decode micro-batches.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Share {
    /// Chunks that go along in a round of all groups, on the mean.
    pub chunks: f64,
    /// Rows of each.
    pub rows: u32,
    /// They go along in one of so many rounds; 1 where every round may have them.
    pub every: u32,
    /// Rows that come in this way in a second.
    pub rows_per_s: f64,
}

/// What bounds the chunks that go along with groups.
#[derive(Clone, Copy, Debug)]
pub struct Chunk {
    /// Where the next one begins.
    pub start: u32,
    /// Most rows of one.
    pub rows_max: u32,
    /// Most of them in a round.
    pub count_max: u32,
    /// How many rows they have now, if any went along.
    pub rows_now: Option<u32>,
}

/// The most that may come in of a prompt while groups decode that take this: a round then takes at most `allowed_us`. At
/// least a row now and then: a prompt must come in.
///
/// Groups and chunks go round in the ring, each followed by the next. A chunk need not be back before the next one is
/// sent, so it is only in the way of the group that trails it:
///
/// ```text
/// stage 0 | A | c c c | A | c c c | A | ...      a round is the time of all groups and chunks on the busiest stage,
/// stage 1 | . | A |   | c c c | A | c c c | ...  and that in which a group is through all stages behind one chunk
/// ```
pub fn share(cost: &CostModel, groups: &[Load], allowed_us: f64, chunk: Chunk) -> Share {
    let Chunk { start, rows_max: chunk_max, count_max: chunks_max, rows_now } = chunk;
    let decode: Vec<f64> = (0..cost.stages()).map(|s| dealing::stage_us(groups, s)).collect();
    let alone = dealing::step_us(groups);
    let last = groups.iter().filter_map(|g| g.stages.last()).copied().fold(0.0, f64::max);
    // A stage's times for one chunk, and how long a round is when as many go along as the stage with the least room has
    // time for, but at least one.
    let round = |rows: u32| {
        let chunk = Work::prefill(rows, start);
        let stages: Vec<f64> = (0..cost.stages()).map(|s| cost.stage_us(s, chunk) + MICRO_BATCH_US).collect();
        let room = |us: f64| {
            let each = decode.iter().zip(&stages).map(|(d, c)| (us - d) / c.max(1.0));
            each.fold(f64::INFINITY, f64::min).clamp(1.0, f64::from(chunks_max.max(1)))
        };
        let trailing = stages.iter().skip(1).sum::<f64>() + last + cost.hops_us(rows);
        let loose = trailing <= allowed_us * LOOSE;
        let chunks = room(allowed_us).min(room(allowed_us * if loose { OVER } else { 1.0 }).floor());
        let busy = decode.iter().zip(&stages).map(|(d, c)| d + c * chunks).fold(0.0, f64::max);
        (chunks, alone.max(busy).max(trailing))
    };
    let all = share_sizes(chunk_max).map(|rows| {
        let (chunks, us) = round(rows);
        (us, Share { chunks, rows, every: 1, rows_per_s: chunks * f64::from(rows) * 1e6 / us.max(1.0) })
    });
    let fitting = all.filter(|(us, _)| *us <= allowed_us).map(|(_, share)| share);
    let worth = |s: &Share| s.rows_per_s * if Some(s.rows) == rows_now { STEADY } else { 1.0 };
    fitting.max_by(|a, b| worth(a).total_cmp(&worth(b))).unwrap_or_else(|| {
        // So seldom that the mean of all rounds keeps to what is allowed.
        let (over, room) = (round(1).1 - alone, (allowed_us - alone).max(alone / 100.0));
        let every = ((over / room).ceil() as u32).clamp(2, EVERY_MAX);
        Share { chunks: 1.0, rows: 1, every, rows_per_s: 1e6 / (alone * f64::from(every)).max(1.0) }
    })
}

/// Sizes of chunks that may go along with groups: all that the cost model keeps apart while they are small.
fn share_sizes(chunk_max: u32) -> impl Iterator<Item = u32> {
    let small = (1..=2 * CHUNK_STEP).chain((3..=2 * CHUNK_STEP).map(|i| i * CHUNK_STEP));
    let large = round_sizes().filter(|rows| *rows > 2 * CHUNK_STEP * CHUNK_STEP);
    small.chain(large).filter(move |rows| *rows <= chunk_max)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dealing::Member;

    fn load(cost: &CostModel, sequences: u32) -> Load {
        let members: Vec<Member> = (0..sequences).map(|slot| Member { slot, depth: 0 }).collect();
        Load::new(cost, &members)
    }

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
    fn a_size_between_known_ones_must_promise_more() {
        // Kernels 32 rows wide: 48 rows take what 64 do.
        let mut cost = CostModel::new(2);
        for (rows, us) in [(1, 45_000), (16, 158_000), (32, 158_000), (64, 298_000), (256, 1_150_000)] {
            cost.observe(Work::prefill(rows, 0), &[us; 2], None);
        }
        // By the straight line 48 would be the best by half a percent.
        assert_eq!(chunk_rows(&cost, 512, 0, 512), 64);
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

    fn chunk(rows_max: u32) -> Chunk {
        Chunk { start: 0, rows_max, count_max: 4, rows_now: None }
    }

    #[test]
    fn prefill_takes_no_more_than_its_share() {
        let cost = linear(&[(1000.0, 1000.0), (1000.0, 1000.0)]);
        let share = |groups: &[u32], percent: f64, max| {
            let loads: Vec<Load> = groups.iter().map(|n| load(&cost, *n)).collect();
            share(&cost, &loads, dealing::step_us(&loads) * percent / 100.0, chunk(max))
        };
        // Alone a step takes two stages' time, 4 ms: 7 ms are allowed, in which each stage has 5 left.
        let one = share(&[1], 175.0, 512);
        assert_eq!((one.chunks, one.rows, one.every), (1.0, 3, 1));
        // Beside them there is no room in 100 %, and much in 1000.
        assert!(share(&[1, 1], 100.0, 512).every > 1);
        assert!(share(&[1], 1000.0, 4).rows <= 4);
        let several = share(&[8, 8], 175.0, 512);
        assert!(several.chunks * f64::from(several.rows) >= 11.0 && several.every == 1, "{several:?}");
    }

    #[test]
    fn on_a_slow_processor_a_prompt_gets_what_is_left() {
        // Two cores: a step of one row takes 60 ms, of 4 rows 110; prefill takes 20 ms a row in chunks of 8, 14 in large
        // ones.
        let mut cost = CostModel::new(2);
        for (rows, us) in [(1, 30_000), (2, 47_000), (4, 56_000), (8, 66_000)] {
            cost.observe(Work::decode(rows, 0), &[us; 2], None);
        }
        for (rows, us) in [(1, 30_000), (2, 40_000), (4, 55_000), (8, 80_000), (16, 140_000), (32, 240_000)] {
            cost.observe(Work::prefill(rows, 0), &[us; 2], None);
        }
        let four = [load(&cost, 4)];
        let share = share(&cost, &four, 94_000.0 * 1.75, chunk(512));
        assert!(share.chunks * f64::from(share.rows) >= 10.0, "{share:?}");
        assert!(512.0 / share.rows_per_s < 9.0, "{share:?}");
        // One stream: what a stage has left of 105 ms.
        let one = super::share(&cost, &[load(&cost, 1)], 105_000.0, chunk(512));
        assert_eq!((one.chunks as u32, one.rows), (1, 7));
    }
}
