//! A few thousand runs of the cluster's state in virtual time; `make sim-cluster` runs as many as one likes.
//!
//! `CAPSTAN_SIM_RUNS` and `CAPSTAN_SIM_SEED` choose others.
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use capstan_sim::cluster::{Mistake, Options, Tally, run};

/// Runs where nothing else is asked for: less than a minute of one core.
const RUNS: u64 = 4000;

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().map_or(default, |text| text.parse().unwrap_or_else(|_| panic!("{name} is a number")))
}

#[test]
fn all_rules_hold_whatever_fails() {
    let (runs, first) = (number("CAPSTAN_SIM_RUNS", RUNS), number("CAPSTAN_SIM_SEED", 1));
    // Each of these found a mistake once.
    let found = [2426, 4879, 11_147, 11_886, 25_097, 78_790];
    let mut seeds: Vec<u64> = (first..first + runs).collect();
    seeds.extend(found.into_iter().filter(|_| runs == RUNS));
    let next = AtomicUsize::new(0);
    let (all, broken) = (Mutex::new(Tally::default()), Mutex::new(Vec::new()));
    let threads = std::thread::available_parallelism().map_or(1, |n| n.get());
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                loop {
                    let Some(&seed) = seeds.get(next.fetch_add(1, Ordering::Relaxed)) else { return };
                    match run(Options { seed, ..Options::default() }) {
                        Ok((tally, _)) => {
                            let mut all = all.lock().unwrap();
                            *all = all.plus(tally);
                        }
                        Err(failure) => broken.lock().unwrap().push(failure.to_string()),
                    }
                }
            });
        }
    });
    let (t, broken) = (all.into_inner().unwrap(), broken.into_inner().unwrap());
    println!("{t:#?}");
    assert!(broken.is_empty(), "replay with CAPSTAN_SIM_RUNS=1 CAPSTAN_SIM_SEED=…: {broken:#?}");
    // Everything happened that the rules are about.
    let happened = [
        t.crashes,
        t.cuts,
        t.lost,
        t.doubled,
        t.snapshots,
        t.placed,
        t.outrun,
        t.begun,
        t.worked,
        t.fenced,
        t.no_lease,
        t.admitted,
        t.used_tickets,
        t.left,
        t.removed,
        t.shut_out,
        t.no_majority,
    ];
    assert!(runs < 100 || happened.iter().all(|n| *n > 0), "{t:#?}");
}

#[test]
fn a_seed_is_one_run() {
    for seed in 1..=20 {
        let once = || run(Options { seed, ..Options::default() }).map_err(|e| e.to_string()).unwrap();
        assert_eq!(once(), once(), "seed {seed}");
    }
}

#[test]
fn mistakes_are_found() {
    for mistake in [Mistake::LyingDisks, Mistake::NoFence, Mistake::NoLease] {
        let found = (1..=400).find_map(|seed| run(Options { seed, mistake: Some(mistake), trace: false }).err());
        println!("{mistake:?}: {}", found.unwrap_or_else(|| panic!("{mistake:?} was not found")));
    }
}
