//! Runs the cluster's state in virtual time, many seeds on all cores, and says which rule a seed broke.
use std::process::ExitCode;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use capstan_sim::cluster::{Options, Tally, run};
use clap::Parser;

/// What a cluster agrees on, in virtual time: failing disks, a failing network, and the rules that hold nevertheless
#[derive(Parser)]
#[command(name = "capstan-sim-cluster")]
struct Args {
    /// How many runs
    #[arg(long, default_value_t = 2000)]
    runs: u64,
    /// The first seed
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Print what happened in a run that broke a rule
    #[arg(long)]
    trace: bool,
    /// How many events are printed
    #[arg(long, default_value_t = 80)]
    events: usize,
    /// Threads; 0 takes every core
    #[arg(long, default_value_t = 0)]
    threads: usize,
}

fn main() -> ExitCode {
    let args = Args::parse();
    let cores = std::thread::available_parallelism().map_or(1, |n| n.get());
    let threads = if args.threads == 0 { cores } else { args.threads };
    let next = AtomicU64::new(args.seed);
    let end = args.seed + args.runs;
    let all = Mutex::new((Tally::default(), 0u64));
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= end {
                        return;
                    }
                    let outcome = run(Options { seed, trace: args.trace, mistake: None });
                    let mut all = all.lock().unwrap_or_else(PoisonError::into_inner);
                    match outcome {
                        Ok((tally, _)) => all.0 = all.0.plus(tally),
                        Err(failure) => {
                            all.1 += 1;
                            let from = failure.trace.len().saturating_sub(args.events);
                            failure.trace[from..].iter().for_each(|line| println!("{line}"));
                            println!("BROKEN: {failure}\n  replay: capstan-sim-cluster --runs 1 --seed {seed} --trace");
                        }
                    }
                }
            });
        }
    });
    let (tally, broken) = all.into_inner().unwrap_or_else(PoisonError::into_inner);
    println!("{} runs, seeds {}..{end}, on {threads} threads; {broken} broke a rule\n{tally:#?}", args.runs, args.seed);
    if broken == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
