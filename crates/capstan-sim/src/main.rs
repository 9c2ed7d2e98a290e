//! Runs scenarios and random workloads, prints the table, writes the report, and fails when a rule or a threshold did.
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, bail};
use capstan_sim::figure::{Figure, table};
use capstan_sim::report::{Report, Workloads, efficiency};
use capstan_sim::scenario::{self, Options};
use capstan_sim::workload::{self, Tally};
use clap::Parser;

/// The name under which random workloads are chosen.
const RANDOM: &str = "random";

/// The scheduler in virtual time: efficiency against bounds, and checkers over random workloads.
#[derive(Parser)]
#[command(name = "capstan-sim")]
struct Args {
    /// Only this scenario (again for more); "random" is the random workloads
    #[arg(long, value_name = "NAME")]
    scenario: Vec<String>,
    /// Decides everything that chance does; for random workloads the first of their seeds
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// How many random workloads
    #[arg(long, default_value_t = 4000)]
    workloads: u64,
    /// Write events down of the cases whose "STAGES NAME" has this in it ("" is all), and print the last ones
    #[arg(long, value_name = "CASE")]
    trace: Option<String>,
    /// How many events are printed
    #[arg(long, default_value_t = 60)]
    events: usize,
    /// Where the report goes
    #[arg(long, default_value = "target/reports/sim.json")]
    report: PathBuf,
    /// List the scenarios and end
    #[arg(long)]
    list: bool,
}

fn main() -> anyhow::Result<ExitCode> {
    let args = Args::parse();
    let names: Vec<&str> = scenario::ALL.iter().map(|(name, _)| *name).chain([RANDOM]).collect();
    if args.list {
        println!("{}", names.join("\n"));
        return Ok(ExitCode::SUCCESS);
    }
    if let Some(unknown) = args.scenario.iter().find(|s| !names.contains(&s.as_str())) {
        bail!("there is no scenario {unknown:?}; choose from {}", names.join(", "));
    }
    let chosen = |name: &str| args.scenario.is_empty() || args.scenario.iter().any(|s| s == name);
    let options = Options { seed: args.seed, trace: args.trace.clone() };

    let (mut figures, mut broken): (Vec<Figure>, Vec<String>) = (Vec::new(), Vec::new());
    println!("seed {}", args.seed);
    for (name, run) in scenario::ALL.iter().filter(|(name, _)| chosen(name)) {
        if *name == "kimi" {
            println!("\n{}", scenario::kimi::ASSUMPTIONS);
        }
        match run(&options) {
            Ok(found) => {
                for figure in found.iter().filter(|f| !f.events.is_empty()) {
                    println!("\n{}, S = {}, {}:", figure.scenario, figure.stages, figure.case);
                    print_last(&figure.events, args.events);
                }
                println!("\n{}", table(&found).trim_end());
                figures.extend(found);
            }
            Err(e) => {
                print_last(&e.trace, args.events);
                let trace = format!("{} {}", e.stages, e.case);
                println!(
                    "\nBROKEN: {e}\n  replay: capstan-sim --scenario {name} --seed {} --trace {trace:?}",
                    args.seed
                );
                broken.push(e.to_string());
            }
        }
    }
    let workloads = if chosen(RANDOM) { random(&args) } else { Workloads::default() };
    let missed = figures.iter().filter(|f| !f.ok).count();
    let ok = missed == 0 && broken.is_empty() && workloads.failures.is_empty();

    let report = Report {
        command: std::env::args().collect::<Vec<_>>().join(" "),
        seed: args.seed,
        efficiency: efficiency(&figures),
        figures,
        workloads,
        broken,
        ok,
    };
    if let Some(folder) = args.report.parent() {
        std::fs::create_dir_all(folder).with_context(|| format!("{} could not be made", folder.display()))?;
    }
    let json = serde_json::to_string_pretty(&report)?;
    std::fs::write(&args.report, json + "\n").with_context(|| format!("{} not written", args.report.display()))?;
    println!("\n{} figures, {missed} missed; the report is in {}", report.figures.len(), args.report.display());
    Ok(if ok { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Runs the random workloads and says what they did.
fn random(args: &Args) -> Workloads {
    let mut all = Tally::default();
    let mut failures = Vec::new();
    for seed in args.seed..args.seed + args.workloads {
        match workload::run(seed, args.trace.is_some()) {
            Ok(tally) => all = all.plus(tally),
            Err((failure, trace)) => {
                print_last(&trace, args.events);
                println!("BROKEN: random workload, seed {seed}: {failure}");
                println!("  replay: capstan-sim --scenario random --workloads 1 --seed {seed} --trace \"\"");
                failures.push(format!("seed {seed}: {failure}"));
            }
        }
    }
    println!(
        "\n{} random workloads, seeds {}..{}: {} requests ({} given up, {} refused), {} tokens checked, {} micro-batches, \
         {} guesses ({} right), {} cached prompt tokens; {} broke a rule",
        args.workloads,
        args.seed,
        args.seed + args.workloads,
        all.requests,
        all.cancelled,
        all.refused,
        all.tokens,
        all.steps,
        all.guessed,
        all.accepted,
        all.cached,
        failures.len()
    );
    Workloads {
        count: args.workloads,
        first_seed: args.seed,
        requests: all.requests,
        cancelled: all.cancelled,
        tokens: all.tokens,
        micro_batches: all.steps,
        guessed: all.guessed,
        accepted: all.accepted,
        cached_tokens: all.cached,
        failures,
    }
}

fn print_last(trace: &[String], events: usize) {
    trace[trace.len().saturating_sub(events)..].iter().for_each(|line| println!("{line}"));
}
