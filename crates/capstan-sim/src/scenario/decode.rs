//! Saturated decode: tokens per second against the best of all dealings.
use super::{Broken, Case, Options, config, free_request, seeds, steady_window};
use crate::bound::decode::{DIFFERENT_MAX, Dealt, best_different, best_equal};
use crate::cost::{Ns, Profile};
use crate::figure::{Figure, Wanted};
use crate::log::useful_share;
use crate::profiles::{Machine, lan, slow, two_cores};
use crate::world::{Setup, World};

/// Tokens that each sequence says before its decoding counts as steady.
const SKIP: usize = 24;
/// Tokens of each answer: some ten dozen rounds are measured.
const ANSWER: u32 = 400;

/// Equal stages, all three machines, sequences in several numbers.
pub fn saturated(options: &Options) -> Result<Vec<Figure>, Broken> {
    let mut figures = Vec::new();
    for machine in Machine::ALL {
        for stages in [2, 4, 8] {
            let full = [stages, 2 * stages, 4 * stages];
            // Between: one more than there are stages, and half as many again.
            for sequences in full.into_iter().chain([stages + 1, stages * 3 / 2 + 1]) {
                let case = options.case("decode", stages, format!("{}, {sequences} sequences", machine.name()));
                let prompts = vec![64; sequences];
                figures.push(run(&case, machine.pipeline(stages), &prompts)?.wanted(Wanted::AtLeast(0.95)));
            }
        }
    }
    Ok(figures)
}

/// Two cores as they were measured, whose times stray: also after a measurement that was wrong, and with gaps between the
/// slots that are left when others have ended.
pub fn learnt(options: &Options) -> Result<Vec<Figure>, Broken> {
    let mut figures = Vec::new();
    let wanted = Wanted::AtLeast(0.95);
    for sequences in [2, 4, 6, 8, 16] {
        let case = options.case("decode-learnt", 2, format!("two cores, {sequences} sequences"));
        figures.push(run(&case, two_cores(), &vec![64; sequences])?.wanted(wanted));
    }
    for sequences in [4, 8] {
        for seed in 1..=4 {
            let seeded = Options { seed, ..options.clone() };
            let name = format!("two cores, {sequences} sequences, measured 20 % wrong, seed {seed}");
            let case = seeded.case("decode-learnt", 2, name);
            let profile = Profile { mismeasured: 0.2, ..two_cores() };
            figures.push(run(&case, profile, &vec![64; sequences])?.wanted(wanted));
        }
    }
    for slots in [&[0, 1, 4, 5][..], &[0, 1, 2, 6], &[0, 2, 4, 6], &[0, 1, 4, 5, 6, 7]] {
        let case = options.case("decode-learnt", 2, format!("two cores, slots {slots:?} of 8"));
        figures.push(run_in(&case, two_cores(), &[64; 8], slots)?.wanted(wanted));
    }
    Ok(figures)
}

/// Stages, links and sequences that differ.
pub fn unequal(options: &Options) -> Result<Vec<Figure>, Broken> {
    let mut figures = Vec::new();
    let wanted = Wanted::AtLeast(0.9);
    for (stages, factors) in
        [(2, &[1.0, 2.0][..]), (4, &[1.0, 1.5, 0.7, 1.0]), (8, &[1.0, 1.2, 0.8, 1.0, 0.6, 1.4, 1.0, 1.0])]
    {
        for machine in [Machine::Weights, Machine::Cpu] {
            let mut profile = machine.pipeline(stages);
            profile.stages = factors.iter().map(|f| machine.stage(stages).times(*f)).collect();
            let case = options.case("decode-unequal", stages, format!("{}, stages {factors:?}", machine.name()));
            figures.push(run(&case, profile, &vec![64; 2 * stages])?.wanted(wanted));
        }
        let mut profile = Machine::Weights.pipeline(stages);
        profile.links = (0..stages).map(|i| if i % 3 == 1 { slow() } else { lan() }).collect();
        let case = options.case("decode-unequal", stages, "weights, every third link 1 GbE and 1 ms");
        figures.push(run(&case, profile, &vec![64; 2 * stages])?.wanted(wanted));
        let mut profile = Machine::Weights.pipeline(stages);
        profile.jitter = 0.1;
        let case = options.case("decode-unequal", stages, "weights, times stray by 10 %");
        figures.push(run(&case, profile, &vec![64; 2 * stages])?.wanted(wanted));
    }
    for stages in [2, 4] {
        let depths: Vec<u32> = [1024, 512, 512, 256, 128, 64, 64, 64].to_vec();
        let mut profile = Machine::Weights.pipeline(stages);
        profile.stages.iter_mut().for_each(|s| s.depth_us = 4.0);
        let case = options.case("decode-unequal", stages, "weights, 8 sequences from 64 to 1024 deep");
        figures.push(run(&case, profile, &depths)?.wanted(wanted));
    }
    Ok(figures)
}

fn run(case: &Case, profile: Profile, prompts: &[u32]) -> Result<Figure, Broken> {
    run_in(case, profile, prompts, &(0..prompts.len() as u32).collect::<Vec<_>>())
}

/// A sequence in every slot, of which those that are not in these slots end at once.
fn run_in(case: &Case, profile: Profile, prompts: &[u32], slots: &[u32]) -> Result<Figure, Broken> {
    let stays = |slot: &usize| slots.contains(&(*slot as u32));
    let sequences = slots.len();
    let deepest = prompts.iter().copied().max().unwrap_or(1);
    // Those that come in last must find the first ones still talking.
    let answer = ANSWER + deepest;
    let config = config(case.stages, prompts.len(), deepest + answer + 1, 512);
    let setup = Setup { trace: case.trace, ..Setup::new(config, profile.clone(), case.seed) };
    let n_vocab = setup.n_vocab;
    let mut world = World::new(setup).map_err(|f| case.broken(f, &[]))?;
    case.run(&mut world)?;
    let begin = world.now();
    for ((slot, prompt), seed) in prompts.iter().enumerate().zip(seeds(case.seed)) {
        let answer = if stays(&slot) { answer } else { 2 };
        world.submit_at(begin, free_request(seed, *prompt, answer, n_vocab));
    }
    case.run(&mut world)?;
    let requests: Vec<_> = world.requests().iter().enumerate().filter(|(i, _)| stays(i)).map(|(_, r)| r).collect();
    let Some((from, to)) = steady_window(requests.iter().copied(), SKIP) else {
        return Ok(case.figure().value("total decode", 0.0, "tok/s").against(1.0, false));
    };
    let tokens: usize = requests.iter().map(|r| r.token_ns.iter().filter(|t| (from..to).contains(*t)).count()).sum();
    let rate = tokens as f64 * 1e9 / (to - from) as f64;
    // How deep the sequences were on the mean of all tokens in the window. In the middle of its time they are deeper, for
    // the first tokens come faster.
    let said = |r: &crate::log::RequestLog, at: Ns| r.token_ns.iter().filter(|t| **t < at).count() as u32;
    let mean = |r: &crate::log::RequestLog| r.request.prompt.len() as u32 + (said(r, from) + said(r, to)) / 2;
    let depths: Vec<u32> = requests.iter().map(|r| mean(r)).collect();
    let Dealt { sizes, round_ns } = if prompts.iter().all(|p| *p == deepest) && sequences == prompts.len() {
        best_equal(&profile, sequences, depths.iter().sum::<u32>() / sequences as u32, sequences)
    } else {
        debug_assert!(sequences <= DIFFERENT_MAX);
        best_different(&profile, &slots.iter().copied().zip(depths).collect::<Vec<_>>(), sequences)
    };
    let bound = sequences as f64 * 1e9 / round_ns as f64;
    let mut figure = case.figure().value("total decode", rate, "tok/s").against(bound, false);
    figure.case = format!("{} (best {})", figure.case, dealing(&sizes));
    Ok(figure.busy(useful_share(world.steps(), case.stages, from, to)))
}

/// `3×4 + 1×2` for 4, 4, 4, 2.
fn dealing(sizes: &[usize]) -> String {
    let mut runs: Vec<(usize, usize)> = Vec::new();
    for size in sizes {
        match runs.last_mut().filter(|(_, of)| of == size) {
            Some((count, _)) => *count += 1,
            None => runs.push((1, *size)),
        }
    }
    runs.iter().map(|(count, of)| format!("{count}x{of}")).collect::<Vec<_>>().join(" + ")
}
