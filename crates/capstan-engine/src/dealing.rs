//! Into which groups sequences are dealt: how long a step of given groups takes, and the groups with the shortest one.
//!
//! Groups are made of neighbouring slots. llama.cpp computes rows of a micro-batch together only where their KV streams
//! follow each other, so a *run* of consecutive slots costs what its rows cost together, and several runs cost their sum:
//!
//! ```text
//! slots 0 1 . . 4   as one group: decode(2) + decode(1)      as two groups: the same, and two stages work at once
//! ```
use crate::cost::{CostModel, Work};

/// What a micro-batch costs beyond its computing on every stage, in microseconds: framing, waking threads. It keeps
/// dealings and cuts from becoming finer than they can pay for.
pub const MICRO_BATCH_US: f64 = 50.0;
/// How much faster more groups must be to be preferred: a dealing that changes for less would only make sequences wait
/// for each other.
pub const WORTH_A_CHANGE: f64 = 0.99;
/// Of dealings whose steps differ by less than this the one with the shorter ways is taken: it leaves more room for
/// times that stray.
const ALIKE: f64 = 1.002;
/// More sequences than this are dealt in blocks of several, so that the search stays short.
const UNITS_MAX: usize = 64;

/// A sequence that decodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Member {
    /// Its slot.
    pub slot: u32,
    /// Its length in tokens.
    pub depth: u32,
}

/// The runs of consecutive slots of a group, whose slots ascend.
pub fn runs(group: &[Member]) -> impl Iterator<Item = Work> {
    let runs = group.chunk_by(|a, b| a.slot + 1 == b.slot);
    runs.map(|run| Work::decode(run.len() as u32, run.iter().map(|m| u64::from(m.depth)).sum()))
}

/// What a group takes in one step, in microseconds.
#[derive(Clone, Debug, PartialEq)]
pub struct Load {
    /// On each stage.
    pub stages: Vec<f64>,
    /// Through everything, when nothing is in its way.
    pub way: f64,
}

impl Load {
    /// That of a group, whose slots ascend.
    pub fn new(cost: &CostModel, group: &[Member]) -> Self {
        let runs: Vec<Work> = runs(group).collect();
        let stage = |s| runs.iter().map(|run| cost.stage_us(s, *run)).sum::<f64>();
        let stages: Vec<f64> = (0..cost.stages()).map(stage).collect();
        let way = stages.iter().sum::<f64>() + cost.hops_us(group.len() as u32);
        Self { stages: stages.into_iter().map(|us| us + MICRO_BATCH_US).collect(), way }
    }
}

/// How long one step of all groups takes, when a group's next step begins as soon as it is back: in microseconds.
///
/// Either a stage is never idle, and then the slowest one's time for all groups counts, or a group is never held up,
/// and then its way through all stages does.
pub fn step_us(loads: &[Load]) -> f64 {
    loads.iter().map(|l| l.way).fold(busiest_us(loads), f64::max)
}

/// How long the busiest stage computes in one step of all groups, in microseconds.
pub fn busiest_us(loads: &[Load]) -> f64 {
    let stages = loads.first().map_or(0, |l| l.stages.len());
    (0..stages).map(|s| stage_us(loads, s)).fold(0.0, f64::max)
}

/// How long a stage computes in one step of all groups, in microseconds.
pub fn stage_us(loads: &[Load], stage: usize) -> f64 {
    loads.iter().filter_map(|l| l.stages.get(stage)).sum()
}

/// Groups, with what they take.
#[derive(Clone, Debug, PartialEq)]
pub struct Dealing {
    /// Slots of each, ascending.
    pub groups: Vec<Vec<u32>>,
    /// What each takes.
    pub loads: Vec<Load>,
    /// How long a step of all of them takes, in microseconds.
    pub step_us: f64,
}

impl Dealing {
    fn new(groups: Vec<Vec<u32>>, loads: Vec<Load>) -> Self {
        let step_us = step_us(&loads);
        Self { groups, loads, step_us }
    }

    /// What these groups of these members, whose slots ascend, take.
    pub fn of(cost: &CostModel, groups: &[Vec<u32>], members: &[Member]) -> Self {
        let member = |slot: &u32| members.binary_search_by_key(slot, |m| m.slot).ok().and_then(|i| members.get(i));
        let load = |group: &Vec<u32>| Load::new(cost, &group.iter().filter_map(member).copied().collect::<Vec<_>>());
        Self::new(groups.to_vec(), groups.iter().map(load).collect())
    }

    /// How many neighbours are computed at once, for each run of them.
    pub fn run_sizes(&self) -> impl Iterator<Item = u32> {
        self.groups.iter().flat_map(|group| group.chunk_by(|a, b| a + 1 == *b)).map(|run| run.len() as u32)
    }
}

/// The best dealing into each number of groups: at most `groups_max` groups of `group_max` sequences each, unless there
/// are too many sequences for that. Slots ascend.
///
/// The search is exact where the same stage is the busiest for all groups, as it is but for odd pipelines: for each bound
/// on the longest way it finds the cut with the least work for that stage, and then the bound at which both are equal.
pub fn dealings(cost: &CostModel, members: &[Member], groups_max: usize, group_max: usize) -> Vec<Dealing> {
    if members.is_empty() {
        return Vec::new();
    }
    let table = Table::new(cost, members, group_max.max(1));
    let groups_max = groups_max.max(table.units.div_ceil(table.longest)).min(table.units);
    let mut found: Vec<Dealing> = Vec::new();
    for stage in table.busy_stages() {
        let mut cuts = Cuts::new(&table, stage, groups_max);
        for count in 1..=groups_max {
            let Some(cut) = cuts.best(count) else { continue };
            let groups = cut.windows(2).map(|w| table.slots(members, w[0], w[1])).collect();
            let loads = cut.windows(2).map(|w| table.load(w[0], w[1]).clone()).collect();
            let dealing = Dealing::new(groups, loads);
            match found.iter_mut().find(|d| d.groups.len() == count) {
                Some(other) if dealing.step_us < other.step_us => *other = dealing,
                Some(_) => {}
                None => found.push(dealing),
            }
        }
    }
    found
}

/// The dealing with the shortest step; of almost equal ones that with the fewest groups.
pub fn best(dealings: &[Dealing]) -> Option<&Dealing> {
    let least = dealings.iter().map(|d| d.step_us).fold(f64::INFINITY, f64::min);
    dealings.iter().filter(|d| d.step_us * WORTH_A_CHANGE <= least).min_by_key(|d| d.groups.len())
}

/// What every group costs that may be cut from the members.
struct Table {
    units: usize,
    /// Members of a unit.
    unit: usize,
    /// Units of the longest group.
    longest: usize,
    /// Row `i` has the groups that begin with unit `i`, the shortest first.
    loads: Vec<Vec<Load>>,
}

impl Table {
    fn new(cost: &CostModel, members: &[Member], group_max: usize) -> Self {
        let unit = members.len().div_ceil(UNITS_MAX).min(group_max);
        let units = members.len().div_ceil(unit);
        let longest = group_max / unit;
        let load = |from: usize, to: usize| {
            Load::new(cost, members.get(from * unit..(to * unit).min(members.len())).unwrap_or_default())
        };
        let row = |i: usize| (i + 1..=(i + longest).min(units)).map(|j| load(i, j)).collect();
        Self { units, unit, longest, loads: (0..units).map(row).collect() }
    }

    fn load(&self, from: usize, to: usize) -> &Load {
        &self.loads[from][to - from - 1]
    }

    fn slots(&self, members: &[Member], from: usize, to: usize) -> Vec<u32> {
        members[from * self.unit..(to * self.unit).min(members.len())].iter().map(|m| m.slot).collect()
    }

    /// The stages that are the busiest for the smallest and for the largest groups.
    fn busy_stages(&self) -> Vec<usize> {
        let busiest = |of: &dyn Fn(&Vec<Load>) -> Option<&Load>| {
            let loads: Vec<Load> = self.loads.iter().filter_map(of).cloned().collect();
            let stages = loads.first().map_or(0, |l| l.stages.len());
            (0..stages).max_by(|a, b| stage_us(&loads, *a).total_cmp(&stage_us(&loads, *b))).unwrap_or(0)
        };
        let mut stages = vec![busiest(&|row| row.first()), busiest(&|row| row.last())];
        stages.dedup();
        stages
    }
}

/// The cuts with the least work for one stage, by the longest way they may have and by the number of groups.
struct Cuts<'a> {
    table: &'a Table,
    stage: usize,
    groups_max: usize,
    /// Every way that a group may have, ascending.
    ways: Vec<f64>,
    /// What was reckoned for some of them. Entry `k * (units + 1) + j`: the least work of `k` groups of the first `j`
    /// units, and where the last of them begins.
    solved: std::collections::BTreeMap<usize, Vec<(f64, usize)>>,
}

impl<'a> Cuts<'a> {
    fn new(table: &'a Table, stage: usize, groups_max: usize) -> Self {
        let mut ways: Vec<f64> = table.loads.iter().flatten().map(|l| l.way).collect();
        ways.sort_unstable_by(f64::total_cmp);
        ways.dedup();
        Self { table, stage, groups_max, ways, solved: std::collections::BTreeMap::new() }
    }

    fn solve(&mut self, bound: usize) -> &[(f64, usize)] {
        let Self { table, stage, groups_max, ways, solved } = self;
        solved.entry(bound).or_insert_with(|| {
            let most = ways.get(bound).copied().unwrap_or(f64::INFINITY);
            let wide = table.units + 1;
            let mut least = vec![(f64::INFINITY, 0); (*groups_max + 1) * wide];
            least[0] = (0.0, 0);
            for k in 1..=*groups_max {
                for i in 0..table.units {
                    let before = least[(k - 1) * wide + i].0;
                    if before.is_infinite() {
                        continue;
                    }
                    for (n, load) in table.loads[i].iter().enumerate().filter(|(_, l)| l.way <= most) {
                        let (sum, entry) = (before + load.stages[*stage], &mut least[k * wide + i + n + 1]);
                        if sum < entry.0 {
                            *entry = (sum, i);
                        }
                    }
                }
            }
            least
        })
    }

    fn work(&mut self, bound: usize, count: usize) -> f64 {
        let all = count * (self.table.units + 1) + self.table.units;
        self.solve(bound)[all].0
    }

    /// The first bound at which so many groups have no more work than this allows for it; it allows ever more.
    fn first(&mut self, count: usize, allows: impl Fn(f64) -> f64) -> usize {
        let (mut low, mut high) = (0, self.ways.len() - 1);
        while low < high {
            let middle = (low + high) / 2;
            if self.work(middle, count) <= allows(self.ways[middle]) { high = middle } else { low = middle + 1 }
        }
        low
    }

    /// The cut into so many groups with the shortest step: where each begins, and the end.
    fn best(&mut self, count: usize) -> Option<Vec<usize>> {
        let equal = self.first(count, |way| way);
        let step = |cuts: &mut Self, bound: usize| cuts.work(bound, count).max(cuts.ways[bound]);
        let least = step(self, equal).min(step(self, equal.saturating_sub(1)));
        if least.is_infinite() {
            return None;
        }
        let bound = self.first(count, |_| least * ALIKE);
        let wide = self.table.units + 1;
        let solved = self.solve(bound);
        let mut cut = vec![wide - 1];
        for k in (1..=count).rev() {
            cut.push(solved[k * wide + cut[cut.len() - 1]].1);
        }
        cut.reverse();
        Some(cut)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Stages that take so many microseconds for a number of rows.
    fn curve(stages: usize, points: &[(u32, u32)]) -> CostModel {
        let mut cost = CostModel::new(stages as u16);
        for (rows, us) in points {
            cost.observe(Work::decode(*rows, 0), &vec![*us; stages], None);
        }
        cost
    }

    fn linear(stages: usize, fixed: u32, row: u32) -> CostModel {
        let points: Vec<_> = (0..9).map(|i| (1 << i, fixed + (row << i))).collect();
        curve(stages, &points)
    }

    fn members(slots: impl IntoIterator<Item = u32>) -> Vec<Member> {
        slots.into_iter().map(|slot| Member { slot, depth: 0 }).collect()
    }

    fn sizes(
        cost: &CostModel,
        slots: impl IntoIterator<Item = u32>,
        groups_max: usize,
        group_max: usize,
    ) -> Vec<usize> {
        let found = dealings(cost, &members(slots), groups_max, group_max);
        best(&found).map_or_else(Vec::new, |d| d.groups.iter().map(Vec::len).collect())
    }

    #[test]
    fn sequences_are_dealt_by_what_is_faster() {
        // Every row costs the same: as many groups as stages. Rows are free: one group.
        let rows = linear(2, 10, 10_000);
        assert_eq!(sizes(&rows, 0..8, 2, 64), [4, 4]);
        assert_eq!(sizes(&rows, 0..1, 2, 64), [1]);
        let free = linear(2, 100_000, 1);
        assert_eq!(sizes(&free, 0..8, 2, 64), [8]);
        assert_eq!(sizes(&free, 0..5, 2, 2).len(), 3);
        assert_eq!(sizes(&rows, 0..3, 4, 1), [1, 1, 1]);
        assert_eq!(sizes(&rows, 0..0, 4, 1), [0usize; 0]);
        // Many sequences are dealt in blocks, and none is left out.
        for (n, group_max) in [(256, 256), (200, 7), (256, 1), (65, 64)] {
            let dealt = sizes(&linear(8, 500, 100), 0..n, 16, group_max);
            assert_eq!(dealt.iter().sum::<usize>(), n as usize);
            assert!(dealt.iter().all(|n| *n <= group_max), "{dealt:?}");
        }
    }

    #[test]
    fn kernel_widths_count() {
        // Four rows cost what one does: 20 sequences are 8, 8 and 4, not 7, 7 and 6.
        let points: Vec<_> = (1..=16).map(|n: u32| (n, n.div_ceil(4) * 10_000)).collect();
        let cost = curve(2, &points);
        assert_eq!(sizes(&cost, 0..16, 2, 64), [8, 8]);
        let mut dealt = sizes(&cost, 0..20, 3, 64);
        dealt.sort_unstable();
        assert_eq!(dealt, [4, 8, 8]);
    }

    #[test]
    fn groups_are_cut_at_gaps() {
        let cost = curve(2, &[(1, 30_000), (2, 47_000), (4, 56_000), (8, 66_000), (16, 130_000)]);
        let groups =
            |slots: &[u32]| best(&dealings(&cost, &members(slots.iter().copied()), 4, 64)).unwrap().groups.clone();
        assert_eq!(groups(&[0, 1, 2, 3]), [[0, 1], [2, 3]]);
        // Two and two of these would be a run of two and two lone ones, one after the other.
        assert_eq!(groups(&[0, 1, 2, 7]), [vec![0, 1, 2], vec![7]]);
        assert_eq!(groups(&[0, 4, 5, 6, 7]), [vec![0], vec![4, 5, 6, 7]]);
        let runs: Vec<Work> = runs(&members([0, 1, 4])).collect();
        assert_eq!(runs, [Work::decode(2, 0), Work::decode(1, 0)]);
    }

    #[test]
    fn deep_sequences_make_small_groups() {
        let mut cost = CostModel::new(2);
        for depth in (0..4000).step_by(7) {
            cost.observe(Work::decode(1, depth), &[1000 + depth as u32 * 4; 2], None);
        }
        let depths = [1024, 512, 512, 256, 128, 64, 64, 64];
        let members: Vec<Member> = (0..).zip(depths).map(|(slot, depth)| Member { slot, depth }).collect();
        let dealt = best(&dealings(&cost, &members, 2, 64)).cloned().unwrap();
        assert!(dealt.groups.len() == 2 && dealt.groups[0].len() < 4, "{dealt:?}");
        let even = Dealing::of(&cost, &[vec![0, 1, 2, 3], vec![4, 5, 6, 7]], &members);
        assert!(dealt.step_us < even.step_us * 0.9);
    }

    #[test]
    fn the_best_of_all_cuts_is_found() {
        let curves = [
            curve(2, &[(1, 30_000), (2, 47_000), (4, 56_000), (8, 66_000), (16, 130_000)]),
            linear(4, 4000, 60),
            linear(3, 200, 800),
        ];
        for cost in &curves {
            for slots in [vec![0, 1, 2, 3], vec![0, 1, 2, 3, 4, 5, 6], vec![0, 2, 3, 4, 8, 9, 11]] {
                let members = members(slots);
                let n = members.len();
                let mut least = f64::INFINITY;
                for bits in 0..1u32 << (n - 1) {
                    let mut groups = vec![Vec::new()];
                    for (i, member) in members.iter().enumerate() {
                        if i > 0 && bits >> (i - 1) & 1 == 1 {
                            groups.push(Vec::new());
                        }
                        groups.last_mut().unwrap().push(member.slot);
                    }
                    least = least.min(Dealing::of(cost, &groups, &members).step_us);
                }
                let found = best(&dealings(cost, &members, n, 64)).cloned().unwrap();
                assert!(found.step_us * 0.985 <= least, "{found:?} against {least}");
            }
        }
    }
}
