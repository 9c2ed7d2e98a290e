//! One prompt alone: the shortest time to its first token over cuts into chunks, as far as a search finds them.
//!
//! A cut is a flow shop with a fixed order: chunk `j` begins on a station when it has left the one before and chunk
//! `j - 1` has left this one. Filling and draining the pipeline is what a cut must trade against weights read again.
use crate::cost::{Ns, Profile, Shape};

/// Rounds of improvement after which the search stops in any case.
const ROUNDS_MAX: usize = 40;

/// Time from sending the first chunk to sampling the first token.
pub fn makespan_ns(profile: &Profile, chunks: &[u32]) -> Ns {
    let stages = profile.stages.len();
    // When the driver, each link and each stage is free again, in the order in which a chunk meets them.
    let mut free = vec![0; 2 * stages + 1];
    let mut from = 0;
    let mut done = 0;
    for (j, rows) in chunks.iter().enumerate() {
        let shape = Shape::chunk(from, *rows, u32::from(j + 1 == chunks.len()));
        from += rows;
        free[0] += profile.driver.send_ns(*rows);
        done = free[0];
        for i in 0..stages {
            if stages > 1 {
                let link = &profile.links[(i + stages - 1) % stages];
                let at = 1 + 2 * i;
                free[at] = done.max(free[at]) + link.sending_ns(profile.bytes(*rows));
                done = free[at] + link.latency_ns();
            }
            let sampling = if i + 1 == stages { profile.driver.sample_ns(shape.outputs) } else { 0 };
            let at = 2 + 2 * i;
            free[at] = done.max(free[at]) + profile.stages[i].ns(shape) + sampling;
            done = free[at];
        }
    }
    done
}

/// The best cut that was found, of chunks up to `chunk_max` rows.
pub fn best_cut(profile: &Profile, rows: u32, chunk_max: u32) -> (Vec<u32>, Ns) {
    let even = |count: u32| -> Vec<u32> {
        let cut = |i: u32| (u64::from(rows) * u64::from(i) / u64::from(count)) as u32;
        (0..count).map(|i| cut(i + 1) - cut(i)).collect()
    };
    let whole = |size: u32| -> Vec<u32> {
        let rest = Some(rows % size).filter(|rest| *rest > 0);
        std::iter::repeat_n(size, (rows / size) as usize).chain(rest).collect()
    };
    let fewest = rows.div_ceil(chunk_max.max(1)).max(1);
    let counts = (0..).map(|i| (f64::from(fewest) * 1.1f64.powi(i)).ceil() as u32);
    let counts = counts.take_while(|n| *n <= rows.min(fewest * 64));
    // Kernels like round sizes.
    let sizes = (1..=10).flat_map(|i| [1 << i, 3 << (i - 1)]).filter(|n| *n <= chunk_max.min(rows));
    let cuts = counts.map(even).chain(sizes.filter(|n| rows / n <= fewest * 64).map(whole));
    let mut starts: Vec<(Vec<u32>, Ns)> = cuts
        .map(|cut| {
            let ns = makespan_ns(profile, &cut);
            (cut, ns)
        })
        .collect();
    starts.sort_by_key(|(_, ns)| *ns);
    starts.dedup_by(|a, b| a.0 == b.0);
    starts.truncate(3);
    let improved = starts.into_iter().map(|(cut, ns)| improve(profile, cut, ns, chunk_max));
    improved.min_by_key(|(_, ns)| *ns).unwrap_or((vec![rows], Ns::MAX))
}

/// Moves rows from chunk to chunk, and whole chunks into their neighbours, as long as that helps.
fn improve(profile: &Profile, mut cut: Vec<u32>, mut best: Ns, chunk_max: u32) -> (Vec<u32>, Ns) {
    let mut step = cut.iter().copied().max().unwrap_or(1).div_ceil(2);
    for _ in 0..ROUNDS_MAX {
        let before = best;
        for j in 0..cut.len() {
            for to in [j.wrapping_sub(1), j + 1, 0, cut.len() - 1] {
                let moved = step.min(*cut.get(j).unwrap_or(&0));
                if j >= cut.len() || to >= cut.len() || to == j || moved == 0 || cut[to] + moved > chunk_max {
                    continue;
                }
                let mut tried = cut.clone();
                tried[j] -= moved;
                tried[to] += moved;
                tried.retain(|n| *n > 0);
                let ns = makespan_ns(profile, &tried);
                if ns < best {
                    (cut, best) = (tried, ns);
                }
            }
        }
        if best == before {
            if step == 1 {
                break;
            }
            step = step.div_ceil(2);
        }
    }
    (cut, best)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cost::{LinkCost, StageCost};

    fn all_cuts(rows: u32, chunk_max: u32) -> Vec<Vec<u32>> {
        if rows == 0 {
            return vec![vec![]];
        }
        let longer = |n| {
            all_cuts(rows - n, chunk_max).into_iter().map(move |mut cut| {
                cut.insert(0, n);
                cut
            })
        };
        (1..=rows.min(chunk_max)).flat_map(longer).collect()
    }

    #[test]
    fn the_search_finds_the_best_cut_of_small_prompts() {
        let link = LinkCost { latency_us: 20.0, bytes_per_s: 1e9 };
        for (stages, fixed, row, depth) in [(2, 100.0, 50.0, 0.0), (4, 30.0, 100.0, 5.0), (3, 500.0, 20.0, 1.0)] {
            let profile = Profile::even(stages, StageCost::linear(fixed, row, depth), link, 64);
            for (rows, chunk_max) in [(7, 7), (14, 14), (14, 5)] {
                let all = all_cuts(rows, chunk_max);
                let best = all.iter().map(|cut| makespan_ns(&profile, cut)).min().unwrap();
                let (cut, found) = best_cut(&profile, rows, chunk_max);
                assert_eq!(cut.iter().sum::<u32>(), rows);
                assert!(cut.iter().all(|n| *n <= chunk_max));
                assert_eq!(makespan_ns(&profile, &cut), found);
                assert!(found as f64 <= best as f64 * 1.01, "{rows} rows on {stages}: {found} against {best}");
            }
        }
    }

    #[test]
    fn one_chunk_takes_its_way_through() {
        let profile = Profile::even(3, StageCost::linear(10.0, 1.0, 0.0), LinkCost::loopback(), 64);
        let (way, span) = (profile.through_ns(Shape::chunk(0, 5, 1)), makespan_ns(&profile, &[5]));
        // Sending is counted with the last stage in a round, for there it competes; alone it comes first.
        assert_eq!(way, span);
    }
}
