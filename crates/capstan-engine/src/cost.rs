//! What a micro-batch costs on each stage: curves measured at the start of an epoch and corrected by every one since.
//!
//! A stage reads its weights once for a micro-batch, however many rows it has, and then computes a row after the other
//! in groups that suit its kernels; so the curve over rows is no straight line, differs from machine to machine, and is
//! measured instead of assumed. Between two measured sizes it is taken as straight.
use std::collections::BTreeMap;

/// Weight of a new observation against what was known: a quarter follows a change of load within a few micro-batches
/// and evens out single outliers.
const NEW_SHARE: f64 = 0.25;
/// The same of the first time that a size really comes up, against what was measured of it.
const FIRST_SHARE: f64 = 0.75;
/// Sizes above this are noted only where they are multiples of [`ROWS_STEP`], as chunks are but for a prompt's last.
const EXACT_ROWS_MAX: u32 = 16;
const ROWS_STEP: u32 = 8;
/// Cells a row beyond the shallowest observation from which one tells what a cell costs, and those that make it count
/// fully.
const DEPTH_MIN: f64 = 256.0;
const DEPTH_FULL: f64 = 1024.0;
/// Rows from which one tells what links take for a row: of fewer it is lost in the noise.
const HOPS_ROWS_MIN: u32 = 16;
/// Twice the rows must cost less than this share of twice the time to make still larger sizes worth a try.
const STILL_FALLING: f64 = 0.95;
/// Before anything was measured: reading the weights costs as much as computing four rows.
const ASSUMED_FIXED_US: f64 = 1000.0;
const ASSUMED_ROW_US: f64 = 250.0;

fn assumed_us(rows: f64) -> f64 {
    ASSUMED_FIXED_US + ASSUMED_ROW_US * rows
}

/// What a micro-batch asks of a stage.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Work {
    /// Rows.
    pub rows: u32,
    /// All of them want logits, one a sequence; else they are a piece of a prompt, of which none or one does.
    pub decode: bool,
    /// Rows of the KV cache that attention reads, summed over the rows.
    pub cells: u64,
}

impl Work {
    /// So many rows of a prompt, the first of them at position `start`.
    pub fn prefill(rows: u32, start: u32) -> Self {
        let n = u64::from(rows);
        Self { rows, decode: false, cells: n * u64::from(start) + n * (n + 1) / 2 }
    }

    /// One row each of so many sequences, whose lengths sum up to `cells`.
    pub fn decode(rows: u32, cells: u64) -> Self {
        Self { rows, decode: true, cells }
    }
}

/// What is known of one number of rows.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Point {
    us: f64,
    cells: f64,
    /// Time and cells of the observation with the fewest cells, against which deeper ones tell what a cell costs. Those
    /// of the measurement at the start do not count: nothing else ran beside them.
    shallow: Option<(f64, f64)>,
    /// The curve's count when it was observed last; 0 when it was only measured at the start.
    seen: u64,
}

/// Time over rows, and what attention adds.
#[derive(Clone, Debug, Default, PartialEq)]
struct Curve {
    points: BTreeMap<u32, Point>,
    slope_us: f64,
    /// Observations, those of the measurement left aside.
    count: u64,
}

impl Curve {
    fn observe(&mut self, work: Work, us: f64, measured: bool) {
        if work.rows > EXACT_ROWS_MAX && !work.rows.is_multiple_of(ROWS_STEP) {
            return;
        }
        let cells = work.cells as f64;
        let known = self.points.entry(work.rows).or_insert(Point { us, cells, shallow: None, seen: 0 });
        // Of what is measured twice the shorter time counts: another program, or another model that was being loaded, may
        // have had the processor. The first time that really comes up counts for more than all that was measured.
        let share = match (measured, known.seen) {
            (true, 0) if us >= known.us => 0.0,
            (true, 0) => 1.0,
            (false, 0) => FIRST_SHARE,
            _ => NEW_SHARE,
        };
        known.us += (us - known.us) * share;
        known.cells += (cells - known.cells) * share;
        if measured {
            return;
        }
        self.count += 1;
        known.seen = self.count;
        let (shallow_us, shallow_cells) = known.shallow.get_or_insert((us, cells));
        let deeper = cells - *shallow_cells;
        if deeper <= 0.0 {
            let share = if deeper < 0.0 { 1.0 } else { NEW_SHARE };
            *shallow_us += (us - *shallow_us) * share;
            *shallow_cells = cells;
        }
        let deeper_a_row = deeper / f64::from(work.rows);
        if deeper_a_row < DEPTH_MIN {
            return;
        }
        // The farther apart, the less noise there is in the slope. Noise may make it negative for a while; if that were
        // left out, noise alone would add up to a slope.
        let slope = (us - *shallow_us) / deeper;
        self.slope_us += (slope - self.slope_us) * (NEW_SHARE * deeper_a_row / (deeper_a_row + DEPTH_FULL));
    }

    /// Whether so many rows were not observed for long, or never: since so many observations of other sizes.
    fn is_stale(&self, rows: u32, observations: u64) -> bool {
        self.points.get(&rows).is_none_or(|p| p.seen == 0 || p.seen + observations <= self.count)
    }

    /// Whether so many rows never really came up, measured or not.
    fn is_unseen(&self, rows: u32) -> bool {
        self.points.get(&rows).is_none_or(|p| p.seen == 0)
    }

    /// What attention takes for one cell.
    fn cell_us(&self) -> f64 {
        self.slope_us.max(0.0)
    }

    /// Time without attention, by the straight line between what is known of fewer and of more rows.
    fn base_us(&self, rows: u32) -> Option<f64> {
        // A slope that is a little too large must not make a micro-batch cost nothing.
        let base = |(n, p): (&u32, &Point)| (f64::from(*n), (p.us - p.cells * self.cell_us()).max(p.us / 8.0));
        let below = self.points.range(..=rows).next_back().map(base);
        let above = self.points.range(rows..).next().map(base);
        let n = f64::from(rows);
        Some(match (below, above) {
            (None, None) => return None,
            (Some((n0, us0)), Some((n1, us1))) if n1 > n0 => us0 + (us1 - us0) * (n - n0) / (n1 - n0),
            (Some((_, us0)), Some(_)) => us0,
            // Fewer rows than were ever measured: with the assumed share of what does not depend on them.
            (None, Some((n1, us1))) => us1 * assumed_us(n) / assumed_us(n1),
            // More: as the slope between the last two says, but never flatter than an eighth of the mean so far, for a
            // noisy pair of points must not promise rows for nothing.
            (Some((n0, us0)), None) => {
                let before = self.points.range(..n0 as u32).next_back().map(base);
                let mean = us0 / n0.max(1.0);
                let slope = match before {
                    Some((n1, us1)) => ((us0 - us1) / (n0 - n1)).max(mean / 8.0),
                    None => us0 * ASSUMED_ROW_US / assumed_us(n0),
                };
                us0 + slope * (n - n0)
            }
        })
    }

    fn us(&self, work: Work) -> Option<f64> {
        Some(self.base_us(work.rows)? + work.cells as f64 * self.cell_us())
    }

    /// The largest power of two that is known, if a row was cheaper in it than in half as many: then still larger sizes
    /// may be cheaper yet.
    fn falling(&self) -> Option<u32> {
        let most = self.largest();
        let (point, half) = (self.points.get(&most)?, self.points.get(&(most / 2))?);
        (point.us < half.us * 2.0 * STILL_FALLING).then_some(most)
    }

    /// The largest power of two that is known; 0 when none is.
    fn largest(&self) -> u32 {
        self.points.keys().rev().copied().find(|rows| rows.is_power_of_two()).unwrap_or(0)
    }
}

/// The cost of work on every stage of a pipeline.
#[derive(Clone, Debug, PartialEq)]
pub struct CostModel {
    stages: Vec<StageCost>,
    /// What a round through the pipeline takes beyond the stages' own time.
    hops_us: f64,
    /// What each row adds to that: links carry a large chunk in no short time.
    hops_row_us: f64,
}

#[derive(Clone, Debug, Default, PartialEq)]
struct StageCost {
    prefill: Curve,
    decode: Curve,
}

impl StageCost {
    /// Where such work is noted.
    fn curve(&mut self, work: Work) -> &mut Curve {
        if work.decode { &mut self.decode } else { &mut self.prefill }
    }

    fn us(&self, work: Work) -> f64 {
        let (own, other) = if work.decode { (&self.decode, &self.prefill) } else { (&self.prefill, &self.decode) };
        own.us(work).or_else(|| other.us(work)).unwrap_or_else(|| assumed_us(f64::from(work.rows)))
    }
}

impl CostModel {
    /// Nothing is known yet of so many stages.
    pub fn new(stages: u16) -> Self {
        Self { stages: vec![StageCost::default(); usize::from(stages.max(1))], hops_us: 0.0, hops_row_us: 0.0 }
    }

    /// Takes in how long each stage, the first one first, computed such a micro-batch, in microseconds. A stage that
    /// computed nothing of it says 0. `round_trip_us` is the whole way from the driver to the driver, if nothing else
    /// was under way.
    pub fn observe(&mut self, work: Work, stage_us: &[u32], round_trip_us: Option<u32>) {
        self.take_in(work, stage_us, round_trip_us, false);
    }

    /// As [`CostModel::observe`], of a micro-batch that stages compute in several runs one after the other. Each run gets
    /// the share of the time that it was expected to take.
    pub fn observe_runs(&mut self, runs: &[Work], stage_us: &[u32], round_trip_us: Option<u32>) {
        if let [run] = runs {
            return self.observe(*run, stage_us, round_trip_us);
        }
        for (stage, us) in self.stages.iter_mut().zip(stage_us).filter(|(_, us)| **us > 0) {
            let expected: Vec<f64> = runs.iter().map(|run| stage.us(*run)).collect();
            let all: f64 = expected.iter().sum::<f64>().max(1.0);
            for (run, of) in runs.iter().zip(expected) {
                stage.curve(*run).observe(*run, f64::from(*us) * of / all, false);
            }
        }
    }

    /// As [`CostModel::observe`], of a micro-batch that was sent only to be measured.
    pub fn measure(&mut self, work: Work, stage_us: &[u32], round_trip_us: u32) {
        self.take_in(work, stage_us, Some(round_trip_us), true);
    }

    fn take_in(&mut self, work: Work, stage_us: &[u32], round_trip_us: Option<u32>, measured: bool) {
        for (stage, us) in self.stages.iter_mut().zip(stage_us).filter(|(_, us)| **us > 0) {
            stage.curve(work).observe(work, f64::from(*us), measured);
        }
        let computed: u64 = stage_us.iter().map(|us| u64::from(*us)).sum();
        if let Some(all) = round_trip_us
            && stage_us.len() == self.stages.len()
        {
            let hops = u64::from(all).saturating_sub(computed) as f64;
            let learn = |known: &mut f64, new: f64| {
                *known = if *known == 0.0 { new } else { *known + (new - *known) * NEW_SHARE };
            };
            if work.rows == 1 {
                learn(&mut self.hops_us, hops);
            } else if work.rows >= HOPS_ROWS_MIN && self.hops_us > 0.0 {
                learn(&mut self.hops_row_us, (hops - self.hops_us).max(0.0) / f64::from(work.rows));
            }
        }
    }

    /// A size of chunk that has not been tried and may be cheaper a row than all that have.
    pub fn unexplored(&self) -> Option<u32> {
        let most = self.stages.iter().map(|s| s.prefill.falling()).collect::<Option<Vec<u32>>>()?.into_iter().min()?;
        most.checked_mul(2)
    }

    /// The largest chunk, a power of two, whose cost is known on every stage.
    pub fn explored(&self) -> u32 {
        self.stages.iter().map(|s| s.prefill.largest()).min().unwrap_or(0)
    }

    /// Whether micro-batches of so many sequences never decoded since the start.
    pub fn is_unseen(&self, rows: u32) -> bool {
        self.stages.first().is_some_and(|s| s.decode.is_unseen(rows))
    }

    /// Whether decoding so many rows at once was not observed within the last so many micro-batches of other sizes.
    pub fn is_stale(&self, rows: u32, observations: u64) -> bool {
        self.stages.first().is_some_and(|s| s.decode.is_stale(rows, observations))
    }

    /// What a round of so many rows through the pipeline takes beyond the stages' own time, in microseconds.
    pub fn hops_us(&self, rows: u32) -> f64 {
        self.hops_us + self.hops_row_us * f64::from(rows)
    }

    /// Whether chunks of so many rows were observed, on every stage.
    pub fn knows_chunk(&self, rows: u32) -> bool {
        self.stages.iter().all(|s| s.prefill.points.contains_key(&rows))
    }

    /// How many stages.
    pub fn stages(&self) -> usize {
        self.stages.len()
    }

    /// Time on one stage, in microseconds.
    pub fn stage_us(&self, stage: usize, work: Work) -> f64 {
        self.stages.get(stage).map_or(0.0, |s| s.us(work))
    }

    /// Time on the slowest stage, in microseconds: what such micro-batches take each when many follow one another.
    pub fn slowest_us(&self, work: Work) -> f64 {
        self.stages.iter().map(|s| s.us(work)).fold(0.0, f64::max)
    }

    /// Time through all stages and links, in microseconds: what one takes that nothing is in the way of.
    pub fn through_us(&self, work: Work) -> f64 {
        self.stages.iter().map(|s| s.us(work)).sum::<f64>() + self.hops_us(work.rows)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn between_measured_sizes_the_line_is_straight() {
        let mut cost = CostModel::new(2);
        assert_eq!(cost.stage_us(0, Work::prefill(4, 0)), 2000.0);
        cost.observe(Work::prefill(1, 0), &[100, 200], Some(350));
        cost.observe(Work::prefill(5, 0), &[300, 600], None);
        assert_eq!(cost.stage_us(0, Work::prefill(3, 0)), 200.0);
        assert_eq!(cost.slowest_us(Work::prefill(3, 0)), 400.0);
        assert_eq!(cost.through_us(Work::prefill(1, 0)), 350.0);
        // Beyond them it goes on as before, and what was not measured is taken from the other kind.
        assert_eq!(cost.stage_us(0, Work::prefill(9, 0)), 500.0);
        assert_eq!(cost.stage_us(0, Work::decode(9, 0)), 500.0);
        // Links take their time for large chunks.
        cost.observe(Work::prefill(16, 0), &[700, 1400], Some(2310));
        assert_eq!((cost.hops_us(0), cost.hops_us(32)), (50.0, 370.0));
    }

    #[test]
    fn observations_correct_slowly_and_odd_sizes_are_not_kept() {
        let mut cost = CostModel::new(1);
        let two = Work::decode(2, 0);
        cost.observe(two, &[100], None);
        cost.observe(two, &[200], None);
        assert_eq!(cost.stage_us(0, two), 125.0);
        cost.observe(Work::decode(99, 0), &[9999], None);
        cost.observe(two, &[0], None);
        assert_eq!(cost.stage_us(0, two), 125.0);
        assert!(cost.stage_us(0, Work::decode(99, 0)) < 9999.0);
    }

    #[test]
    fn runs_share_the_time_of_their_micro_batch() {
        let mut cost = CostModel::new(1);
        cost.observe(Work::decode(1, 0), &[1000], None);
        cost.observe(Work::decode(2, 0), &[3000], None);
        assert!(cost.is_stale(4, 9) && !cost.is_stale(1, 9) && cost.is_stale(1, 1));
        let runs = [Work::decode(2, 0), Work::decode(1, 0)];
        for _ in 0..40 {
            cost.observe_runs(&runs, &[8000], None);
        }
        let us = runs.map(|run| cost.stage_us(0, run));
        assert!((us[0] - 6000.0).abs() < 10.0 && (us[1] - 2000.0).abs() < 10.0, "{us:?}");
    }

    #[test]
    fn attention_is_told_apart_from_rows() {
        let mut cost = CostModel::new(1);
        let us = |rows: u32, cells: u64| 1000 + 100 * rows + cells as u32 / 2;
        for depth in (0..4000).step_by(7) {
            cost.observe(Work::decode(1, depth), &[us(1, depth)], None);
        }
        cost.observe(Work::decode(4, 100), &[us(4, 100)], None);
        for (rows, cells) in [(1, 0), (1, 8000), (4, 20_000)] {
            let (got, want) = (cost.stage_us(0, Work::decode(rows, cells)), f64::from(us(rows, cells)));
            assert!((got / want - 1.0).abs() < 0.1, "{rows} rows, {cells} cells: {got} for {want}");
        }
    }

    #[test]
    fn what_grows_cheaper_with_size_is_explored() {
        let mut cost = CostModel::new(1);
        assert_eq!(cost.unexplored(), None);
        for n in [1, 2, 4, 8] {
            cost.observe(Work::prefill(n, 0), &[1000 + n * 10], None);
        }
        assert_eq!(cost.unexplored(), Some(16));
        cost.observe(Work::prefill(16, 0), &[2160], None);
        assert_eq!(cost.unexplored(), None);
    }

    #[test]
    fn more_rows_never_come_for_nothing() {
        let mut cost = CostModel::new(1);
        cost.observe(Work::prefill(8, 0), &[800], None);
        cost.observe(Work::prefill(16, 0), &[700], None);
        assert!(cost.stage_us(0, Work::prefill(64, 0)) > 700.0);
    }
}
