//! A prompt comes in while others decode: how much longer they wait for a token, and how long the prompt takes.
use capstan_proto::RequestId;

use super::{Broken, Case, Options, config, free_request, seeds};
use crate::bound::beside::{Beside, prompt_ns};
use crate::cost::{Ns, Profile};
use crate::figure::{Figure, Wanted};
use crate::log::quantile;
use crate::profiles::{Machine, two_cores};
use crate::world::{Setup, World};

/// The prompts that come in.
const PROMPT: u32 = 2048;
const SHORT: u32 = 512;
/// What each of the others has said before its time between tokens counts, and before the prompt comes.
const SETTLED: usize = 64;
const CALM: usize = 160;
/// How near a prompt must come to the time that the share leaves it.
const PROMPT_SHARE: Wanted = Wanted::AtLeast(0.8);
/// Whoever decodes waits for a token less than twice as long.
const DECODE_SHARE: Wanted = Wanted::Below(2.0);

/// One and four decoders, with the default share.
pub fn prompt_beside_decode(options: &Options) -> Result<Vec<Figure>, Broken> {
    let mut figures = Vec::new();
    for machine in Machine::ALL {
        for stages in [2, 4, 8] {
            for (decoders, of) in [(1, "1 decodes"), (4, "4 decode")] {
                let case = options.case("mixed", stages, format!("{}, {of}", machine.name()));
                figures.extend(run(&case, machine.pipeline(stages), decoders, PROMPT)?);
            }
        }
    }
    for prompt in [SHORT, PROMPT] {
        for (decoders, of) in [(1, "1 decodes"), (4, "4 decode"), (8, "8 decode")] {
            figures.extend(run(&options.case("mixed", 2, format!("two cores, {of}")), two_cores(), decoders, prompt)?);
        }
    }
    // How long the prompt takes is not judged here: its bound knows nothing of cores that slow each other down.
    let crowded = Profile { contention: 0.2, ..two_cores() };
    for (decoders, of) in [(1, "1 decodes"), (4, "4 decode")] {
        let case = options.case("mixed", 2, format!("two cores that share their memory, {of}"));
        let [waits, comes] = run(&case, crowded.clone(), decoders, PROMPT)?;
        figures.extend([waits, Figure { wanted: None, ok: true, ..comes }]);
    }
    Ok(figures)
}

fn run(case: &Case, profile: Profile, decoders: usize, rows: u32) -> Result<[Figure; 2], Broken> {
    let config = config(case.stages, decoders + 1, 16384, 512);
    let beside = Beside {
        sequences: decoders,
        depth: 64 + CALM as u32,
        slowdown_percent: config.decode_slowdown_percent,
        chunk_max: config.chunk,
    };
    let setup = Setup { trace: case.trace, ..Setup::new(config, profile.clone(), case.seed) };
    let alone = ttft_alone(case, setup.clone(), rows)? as f64 / 1e6;
    let n_vocab = setup.n_vocab;
    let mut world = World::new(setup).map_err(|f| case.broken(f, &[]))?;
    case.run(&mut world)?;
    let begin = world.now();
    let mut seeds = seeds(case.seed);
    // Nobody ends before the prompt is in.
    let decoding: Vec<RequestId> = (0..decoders)
        .map(|_| world.submit_at(begin, free_request(seeds.next().unwrap_or(1), 64, 12_000, n_vocab)))
        .collect();
    let said = |world: &World, count: usize| world.requests().iter().all(|r| r.token_ns.len() >= count);
    world.run_until(|w| said(w, SETTLED)).map_err(|f| case.broken(f, world.trace()))?;
    let settled = world.now();
    world.run_until(|w| said(w, CALM)).map_err(|f| case.broken(f, world.trace()))?;
    let calm = world.now();
    let prompt = world.submit_at(calm, free_request(seeds.next().unwrap_or(2), rows, 1, n_vocab));
    let ended = |w: &World| w.requests()[prompt.0 as usize].end.is_some();
    world.run_until(ended).map_err(|f| case.broken(f, world.trace()))?;
    let end = world.now();
    // What they say after that does not count.
    decoding.iter().for_each(|id| world.cancel_at(end, *id));
    case.run(&mut world)?;

    let p95 = |from: Ns, to: Ns| {
        let logs = decoding.iter().map(|id| &world.requests()[id.0 as usize]);
        let mut gaps: Vec<Ns> = logs.flat_map(|log| log.gaps_ns(from, to)).collect();
        quantile(&mut gaps, 0.95) as f64 / 1e6
    };
    let (unloaded, loaded) = (p95(settled, calm), p95(calm, end));
    let waits = case
        .figure()
        .value(if rows == PROMPT { "ITL p95 beside 2048" } else { "ITL p95 beside 512" }, loaded, "ms")
        .against(unloaded, false);
    let best = prompt_ns(&profile, rows, beside) as f64 / 1e6;
    let took = (end - calm) as f64 / 1e6;
    let mut comes = case.figure().value("TTFT beside them", took, "ms").against(best, true);
    comes.case = format!("{}, {rows} tokens ({alone:.0} ms alone)", comes.case);
    Ok([waits.wanted(DECODE_SHARE), comes.wanted(PROMPT_SHARE)])
}

/// Time to the first token of the prompt when nobody else is there.
fn ttft_alone(case: &Case, setup: Setup, rows: u32) -> Result<Ns, Broken> {
    let n_vocab = setup.n_vocab;
    let mut world = World::new(setup).map_err(|f| case.broken(f, &[]))?;
    case.run(&mut world)?;
    let begin = world.now();
    world.submit_at(begin, free_request(case.seed, rows, 1, n_vocab));
    case.run(&mut world)?;
    Ok(world.requests()[0].ttft_ns().unwrap_or(0))
}
