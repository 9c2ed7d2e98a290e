//! A lone stream: what guesses gain by how often they are right, and that they never cost.
use capstan_engine::EngineConfig;

use super::{Broken, Case, Options, config, prompt};
use crate::bound::lone::{guessed_ns, plain_ns};
use crate::cost::{Ns, Profile, Shape};
use crate::figure::{Figure, Wanted};
use crate::log::Request;
use crate::profiles::Machine;
use crate::text::Text;
use crate::world::{Setup, World};

/// Tokens of the answer.
const ANSWER: u32 = 600;
/// Tokens of the passage that an answer follows.
const PASSAGE: u32 = 300;
/// How many guesses are right when all of a draft model are.
const DRAFT_RIGHT: Wanted = Wanted::AtLeast(0.97);
/// How much slower than without guesses an answer may be that cannot be guessed.
const NEVER_SLOWER: Wanted = Wanted::AtLeast(0.97);

/// Who says what.
#[derive(Clone, Copy)]
struct Stream<'a> {
    text: &'a Text,
    n_vocab: usize,
    draft_right: f64,
    streams: usize,
}

/// One stream without a draft model; what it says is to be set.
const ONE: Stream<'static> = Stream { text: &SILENT, n_vocab: 512, draft_right: 0.0, streams: 1 };
const SILENT: Text = Text { seed: 0, passage: Vec::new(), follow: 0.0, turn: 0, ends: 0 };

/// How the answers went.
struct Run {
    /// Mean time of a token, of any stream, once all have begun.
    token_ns: f64,
    /// Share of tokens whose row was under way as a guess.
    right: f64,
    /// Share of guesses that were right.
    accepted: f64,
}

/// A lone stream with the guesses that its own text suggests.
pub fn ngram(options: &Options) -> Result<Vec<Figure>, Broken> {
    let mut figures = Vec::new();
    for machine in [Machine::Weights, Machine::Cpu] {
        for stages in [2, 4, 8] {
            for percent in [50, 70, 80, 90, 95, 100] {
                let case = options.case("ngram", stages, format!("{}, {percent} % repeated", machine.name()));
                let text = Text { follow: f64::from(percent) / 100.0, ..repeating(options.seed, 512) };
                figures
                    .push(gain(&case, machine.pipeline(stages), Stream { text: &text, ..ONE })?.wanted(NEVER_SLOWER));
            }
            for streams in [2, 3] {
                let case =
                    options.case("ngram", stages, format!("{}, {streams} streams, 90 % repeated", machine.name()));
                let text = Text { follow: 0.9, ..repeating(options.seed, 512) };
                let stream = Stream { text: &text, streams, ..ONE };
                figures.push(gain(&case, machine.pipeline(stages), stream)?.wanted(NEVER_SLOWER));
            }
        }
    }
    Ok(figures)
}

/// A draft model of the same vocabulary, by what it costs and how often it is right.
pub fn draft(options: &Options) -> Result<Vec<Figure>, Broken> {
    let mut figures = Vec::new();
    for stages in [2, 4, 8] {
        for cost in [2, 5, 10] {
            for percent in [50, 60, 70, 80, 90] {
                let name = format!("a guess costs {cost} %, {percent} % are right");
                let case = options.case("draft", stages, name);
                let profile = drafting(Machine::Weights.pipeline(stages), f64::from(cost) / 100.0);
                let stream = Stream { text: &Text::free(options.seed), draft_right: f64::from(percent) / 100.0, ..ONE };
                figures.push(gain(&case, profile, stream)?.wanted(NEVER_SLOWER));
            }
        }
        // Where n-grams mislead a draft that is always right, it must have the word.
        for percent in [50, 70, 90] {
            let case = options.case("draft", stages, format!("all drafts are right, {percent} % repeated"));
            let profile = drafting(Machine::Weights.pipeline(stages), 0.05);
            let text = Text { follow: f64::from(percent) / 100.0, ..repeating(options.seed, 512) };
            let stream = Stream { text: &text, draft_right: 1.0, ..ONE };
            let config = config(stages, 1, PASSAGE + ANSWER + 2, 512);
            let run = run(&case, config, &profile, stream)?;
            figures.push(case.figure().value("guesses that are right", run.accepted, "").wanted(DRAFT_RIGHT));
        }
    }
    Ok(figures)
}

/// Texts on which every guess is in vain, or that mislead.
pub fn unguessable(options: &Options) -> Result<Vec<Figure>, Broken> {
    let mut figures = Vec::new();
    for machine in Machine::ALL {
        for stages in [2, 4, 8] {
            let free = Text::free(options.seed);
            let turns = Text { follow: 1.0, turn: 40, ..repeating(options.seed, 512) };
            let cases = [
                ("random", Stream { text: &free, ..ONE }, 0.0),
                // Every run of tokens stood there before, and went on otherwise five times of six.
                ("random, 6 tokens in all", Stream { text: &free, n_vocab: 6, ..ONE }, 0.0),
                ("random, 6 tokens in all, 2 streams", Stream { text: &free, n_vocab: 6, streams: 2, ..ONE }, 0.0),
                ("random, 2 tokens in all", Stream { text: &free, n_vocab: 2, ..ONE }, 0.0),
                ("40 repeated, 40 random, in turn", Stream { text: &turns, ..ONE }, 0.0),
                ("a draft that is never right", Stream { text: &free, ..ONE }, 0.05),
                ("a draft of 10 % right one time in five", Stream { text: &free, draft_right: 0.2, ..ONE }, 0.1),
            ];
            for (name, stream, draft_cost) in cases {
                let case = options.case("unguessable", stages, format!("{}, {name}", machine.name()));
                let mut profile = machine.pipeline(stages);
                if draft_cost > 0.0 {
                    profile = drafting(profile, draft_cost);
                }
                figures.push(gain(&case, profile, stream)?.wanted(NEVER_SLOWER));
            }
        }
    }
    Ok(figures)
}

/// An answer that goes over and over through the prompt's passage, if it follows it.
fn repeating(seed: u64, n_vocab: usize) -> Text {
    Text { seed, passage: prompt(seed ^ 1, PASSAGE, n_vocab), ..Text::default() }
}

/// With a draft model that takes this share of the pipeline's own time for a token.
pub(crate) fn drafting(mut profile: Profile, share: f64) -> Profile {
    let token: Ns = profile.stages.iter().map(|s| s.ns(Shape::decode(&[PASSAGE]))).sum();
    profile.driver.draft_us = token as f64 * share / 1000.0;
    profile
}

/// Speed with guesses over speed without; of a lone stream also the best that guesses as good as these could make of
/// the pipeline.
fn gain(case: &Case, profile: Profile, stream: Stream) -> Result<Figure, Broken> {
    let on = config(case.stages, stream.streams, PASSAGE + ANSWER + 2, 512);
    let off = EngineConfig { speculation_depth: 0, ..on.clone() };
    let without = run(case, off, &profile, Stream { draft_right: 0.0, ..stream })?;
    let with = run(case, on, &profile, stream)?;
    let gain = without.token_ns / with.token_ns;
    let mut figure = case.figure().value("speed-up by guesses", gain, "x");
    figure.case = format!("{} ({:.0} % of guesses right)", figure.case, with.accepted * 100.0);
    if stream.streams == 1 {
        let depth = PASSAGE + ANSWER / 2;
        figure.bound = Some(plain_ns(&profile, depth) as f64 / guessed_ns(&profile, depth, with.right) as f64);
    }
    Ok(figure.ratio(gain))
}

fn run(case: &Case, config: EngineConfig, profile: &Profile, stream: Stream) -> Result<Run, Broken> {
    let Stream { text, n_vocab, draft_right, streams } = stream;
    let setup = Setup { trace: case.trace, n_vocab, draft_right, ..Setup::new(config, profile.clone(), case.seed) };
    let mut world = World::new(setup).map_err(|f| case.broken(f, &[]))?;
    case.run(&mut world)?;
    let begin = world.now();
    for i in 0..streams as u64 {
        let prompt =
            if text.passage.is_empty() { prompt(case.seed + i, PASSAGE, n_vocab) } else { text.passage.clone() };
        let text = Text { seed: text.seed + i, ..text.clone() };
        world.submit_at(begin, Request { prompt, max_tokens: ANSWER, text });
    }
    case.run(&mut world)?;
    let times = world.requests().iter().flat_map(|r| &r.token_ns);
    let first = world.requests().iter().filter_map(|r| r.token_ns.first()).max();
    let last = times.max();
    let counters = world.engine().counters();
    let tokens = f64::from(ANSWER - 1) * streams as f64;
    Ok(Run {
        token_ns: (last.unwrap_or(&1) - first.unwrap_or(&0)) as f64 / tokens,
        right: counters.accepted as f64 / tokens,
        accepted: counters.accepted as f64 / (counters.guessed as f64).max(1.0),
    })
}
