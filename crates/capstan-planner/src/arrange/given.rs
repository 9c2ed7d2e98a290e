//! Stages that are settled beforehand: windows that a certain machine holds, and no other.
//!
//! A prefix that ends where such a window begins can go on in one way only, so it is taken at once: given stages are
//! bridges between prefixes and no choices of the search.
use super::search::Goal;
use super::{Kind, Problem};

/// The given stages of a problem.
pub(super) struct Given {
    /// Kind, start and end of each, by start.
    pub stages: Vec<(usize, usize, usize)>,
    /// Of each border between layers: the stage that begins there.
    from: Vec<Option<usize>>,
    /// Of each border: the stage that ends there.
    upto: Vec<Option<usize>>,
}

impl Given {
    /// None when two of them overlap, or one of them cannot be.
    pub fn new(problem: &Problem) -> Option<Self> {
        let n = problem.layers as usize;
        let held = |(k, kind): (usize, &Kind)| kind.holds.map(|r| (k, r.start() as usize, r.end() as usize));
        let mut stages: Vec<_> = problem.kinds.iter().enumerate().filter_map(held).collect();
        stages.sort_by_key(|s| s.1);
        let (mut from, mut upto) = (vec![None; n + 1], vec![None; n + 1]);
        for (i, &(k, start, end)) in stages.iter().enumerate() {
            let (kind, before) = (&problem.kinds[k], i.checked_sub(1).map_or(0, |i| stages[i].2));
            let range = kind.holds?;
            let may = range.count() == problem.layers || (problem.allowed)(range);
            if kind.count == 0 || end > n || start < before || !may || (problem.need_bytes)(range) > kind.usable_bytes {
                return None;
            }
            (from[start], upto[end]) = (Some(i), Some(i));
        }
        Some(Self { stages, from, upto })
    }

    /// The first start that a window with this end may have beside them.
    pub fn floor(&self, end: usize) -> usize {
        let of = |&(_, a, b): &(usize, usize, usize)| match end {
            end if end <= a => 0,
            end if end <= b => end,
            _ => b,
        };
        self.stages.iter().map(of).max().unwrap_or(0)
    }

    /// Where one is that has come to this border.
    pub fn after(&self, mut border: usize) -> usize {
        while let Some(i) = self.from.get(border).copied().flatten() {
            border = self.stages[i].2;
        }
        border
    }

    /// Where one must have come to, to be at this border.
    pub fn before(&self, mut border: usize) -> usize {
        while let Some((_, start)) = self.ending(border) {
            border = start;
        }
        border
    }

    /// Kind and start of the given stage that ends at a border.
    pub fn ending(&self, border: usize) -> Option<(usize, usize)> {
        self.upto.get(border).copied().flatten().map(|i| (self.stages[i].0, self.stages[i].1))
    }

    /// The given stage with which the pipeline begins.
    pub fn first(&self) -> Option<usize> {
        self.from[0].map(|i| self.stages[i].0)
    }

    /// Whether a layer is in one of them.
    pub fn holds(&self, layer: usize) -> Option<usize> {
        self.stages.iter().find(|&&(_, a, b)| (a..b).contains(&layer)).map(|s| s.0)
    }

    /// Takes prefixes of a row over the bridges. `cost` of a stage includes the hop to it; none where that may not be.
    pub fn bridge(&self, goal: Goal, row: &mut [f64], cost: impl Fn((usize, usize, usize)) -> Option<f64>) {
        for &stage in &self.stages {
            let (_, start, end) = stage;
            let prefix = std::mem::replace(&mut row[start], f64::INFINITY);
            if prefix.is_finite() {
                row[end] = cost(stage).map_or(f64::INFINITY, |c| goal.join(prefix, c));
            }
        }
    }
}
