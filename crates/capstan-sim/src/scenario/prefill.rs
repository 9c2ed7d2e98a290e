//! One prompt alone: the time to its first token against the best cut that a search finds.
//!
//! The first prompt of an epoch meets a scheduler that has measured small micro-batches only; a later one meets one that
//! has seen more. Both are told, and both are judged.
use super::{Broken, Options, config, free_request};
use crate::bound::prefill::best_cut;
use crate::figure::{Figure, Wanted};
use crate::log::useful_share;
use crate::profiles::Machine;
use crate::world::{Setup, World};

/// Most rows of a chunk, as a deployment sets it.
const CHUNK: u32 = 512;
/// The first prompt, two more to learn from, and one that finds everything learnt.
const PROMPTS: u64 = 4;

/// Prompts of several lengths on all three machines.
pub fn alone(options: &Options) -> Result<Vec<Figure>, Broken> {
    let mut figures = Vec::new();
    for machine in Machine::ALL {
        for (stages, rows) in [(2, 512), (2, 2048), (2, 8192), (4, 128), (4, 512), (4, 2048), (4, 8192), (8, 8192)] {
            let case = options.case("prefill", stages, format!("{}, {rows} tokens", machine.name()));
            let profile = machine.pipeline(stages);
            let config = config(stages, 1, rows + 16, CHUNK);
            let setup = Setup { trace: case.trace, ..Setup::new(config, profile.clone(), case.seed) };
            let n_vocab = setup.n_vocab;
            let mut world = World::new(setup).map_err(|f| case.broken(f, &[]))?;
            case.run(&mut world)?;
            let (cut, best) = best_cut(&profile, rows, CHUNK);
            for i in 0..PROMPTS {
                let begin = world.now();
                let id = world.submit_at(begin, free_request(case.seed + i, rows, 4, n_vocab));
                case.run(&mut world)?;
                let took = world.requests()[id.0 as usize].ttft_ns().unwrap_or(u64::MAX / 2);
                let (what, wanted) = match i {
                    0 => ("TTFT of the first prompt", if rows < LONG { FIRST_SHORT } else { LEARNT }),
                    _ if i + 1 == PROMPTS => ("TTFT of a later one", LEARNT),
                    _ => continue,
                };
                let mut figure = case.figure().value(what, took as f64 / 1e6, "ms").against(best as f64 / 1e6, true);
                figure.case = format!("{} (best in {} chunks)", figure.case, cut.len());
                let busy = useful_share(world.steps(), stages, begin, begin + took + 1);
                figures.push(figure.busy(busy).wanted(wanted));
            }
        }
    }
    Ok(figures)
}

/// What is asked of a long first prompt, and of any later one.
const LEARNT: Wanted = Wanted::AtLeast(0.9);
/// What is asked of shorter first prompts: trying larger chunks than were measured is paid by a few thousand tokens.
const FIRST_SHORT: Wanted = Wanted::AtLeast(0.8);
/// From so many tokens on a prompt is long.
const LONG: u32 = 8192;
