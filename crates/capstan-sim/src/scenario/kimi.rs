//! Four Ryzen AI Max+ 395 with Kimi K2.5 over 5 GbE: what to expect, and what that rests on.
//!
//! Facts and published figures are those of the design (§7). What is not published is assumed, named in
//! [`ASSUMPTIONS`], and set so that a plain pipeline says what was published for llama.cpp's RPC: 8 to 9.5 tokens/s.
use capstan_engine::EngineConfig;

use super::guess::drafting;
use super::{Broken, Case, Options, config, free_request, prompt, seeds, steady_window};
use crate::bound::decode::best_equal;
use crate::bound::lone::plain_ns;
use crate::bound::prefill::best_cut;
use crate::cost::{DriverCost, LinkCost, Profile, RowCost, Shape, StageCost};
use crate::figure::{Figure, Wanted};
use crate::log::{Request, useful_share};
use crate::text::Text;
use crate::world::{Setup, World};

/// What the forecast rests on, for whoever reads the table.
pub const ASSUMPTIONS: &str = "\
Kimi K2.5, UD-Q2_K_XL, on four Ryzen AI Max+ 395 128 GB (figures marked * are assumed, the others are in the design):
  374.76 GB in 61 layers; 384 experts a layer, 8 used and 1 shared, 44.0 M weights each; 31.7 G weights active
  * weights outside of the routed experts have 6.56 bits (Q6_K), so the experts have 2.88 on average
  a token reads 16.3 GB: 7.6 GB of routed experts and 8.6 GB of the rest; more rows read more experts, 384 (1 - (1 - 8/384)^rows)
  212 GB/s reached of 256 nominal; * of that 70 % by matrix-vector kernels: 8.8 tok/s in a plain pipeline, 8 to 9.5 are published
  * 60 us a layer to launch kernels, 7.7 TFLOPS reached in prefill (from 99 tok/s published for GLM-4.6 on two machines)
  KV 70,272 bytes a token; attention 2 x 64 heads x (576 + 512) x 61 layers FLOP for each pair of a row and a position before it
  5 GbE: 587 MB/s; * 150 us one way through QUIC; hidden states of 7168 floats, 28.7 kB a row
  layers dealt so that the slowest stage is as fast as possible; the head weighs as much as four layers";

const LAYERS: usize = 61;
const EXPERTS: f64 = 384.0;
const EXPERTS_USED: f64 = 8.0;
const HIDDEN: f64 = 7168.0;
const EXPERT_WEIGHTS: f64 = 3.0 * HIDDEN * 2048.0;
const DENSE_FFN_WEIGHTS: f64 = 3.0 * HIDDEN * 18432.0;
const HEAD_WEIGHTS: f64 = 163_840.0 * HIDDEN;
const TOTAL_BYTES: f64 = 374_764_330_144.0;
/// MLA: down and up projections of queries, the latent and its two expansions, the output.
const ATTENTION_WEIGHTS: f64 =
    HIDDEN * 1536.0 + 1536.0 * 64.0 * 192.0 + HIDDEN * 576.0 + 512.0 * 64.0 * 256.0 + 64.0 * 128.0 * HIDDEN;
const ROUTER_WEIGHTS: f64 = HIDDEN * EXPERTS;
const REST_BYTES_PER_WEIGHT: f64 = 6.5625 / 8.0;
const BYTES_PER_S: f64 = 212e9 * 0.70;
const FLOP_PER_S: f64 = 7.7e12;
const LAUNCH_US: f64 = 60.0;
const KV_BYTES: f64 = 70_272.0;
const ATTENTION_FLOP: f64 = 2.0 * 64.0 * (576.0 + 512.0);
/// Rows of the largest chunk.
const CHUNK: u32 = 2048;

/// Weights of a layer that every row needs, and of all its routed experts.
fn layer_weights(layer: usize) -> (f64, f64) {
    match layer {
        0 => (ATTENTION_WEIGHTS + DENSE_FFN_WEIGHTS, 0.0),
        _ => (ATTENTION_WEIGHTS + ROUTER_WEIGHTS + EXPERT_WEIGHTS, EXPERTS * EXPERT_WEIGHTS),
    }
}

fn expert_bytes_per_weight() -> f64 {
    let rest: f64 = (0..LAYERS).map(|l| layer_weights(l).0).sum::<f64>() + 2.0 * HEAD_WEIGHTS;
    let routed: f64 = (0..LAYERS).map(|l| layer_weights(l).1).sum();
    (TOTAL_BYTES - rest * REST_BYTES_PER_WEIGHT) / routed
}

/// A stage with these layers.
fn stage(layers: std::ops::Range<usize>) -> StageCost {
    let last = layers.end == LAYERS;
    let count = layers.len() as f64;
    let dense: f64 = layers.clone().map(|l| layer_weights(l).0).sum();
    let with_experts = layers.filter(|l| *l > 0).count() as f64;
    let routed_per_row = with_experts * EXPERTS_USED * EXPERT_WEIGHTS;
    let us = |seconds: f64| seconds * 1e6;
    let rows = RowCost::Experts {
        dense_us: us(dense * REST_BYTES_PER_WEIGHT / BYTES_PER_S),
        experts: EXPERTS,
        used: EXPERTS_USED,
        expert_us: us(with_experts * EXPERT_WEIGHTS * expert_bytes_per_weight() / BYTES_PER_S),
        row_us: us(2.0 * (dense + routed_per_row) / FLOP_PER_S),
    };
    // A decoding row is held up by reading its cache, a chunk's by computing with it; the larger of both counts here.
    let kv_us = us(KV_BYTES / LAYERS as f64 * count / BYTES_PER_S);
    let attention_us = us(ATTENTION_FLOP * count / FLOP_PER_S);
    let head_us = us(HEAD_WEIGHTS * REST_BYTES_PER_WEIGHT / BYTES_PER_S);
    StageCost {
        fixed_us: LAUNCH_US * count,
        rows,
        depth_us: kv_us.min(attention_us),
        head_us: if last { head_us } else { 0.0 },
        op_us: 5.0,
    }
}

/// Four machines, with the cut that makes the slowest stage of a decoded token fastest.
pub fn profile() -> Profile {
    let of = |cuts: &[usize; 5]| -> Vec<StageCost> { cuts.windows(2).map(|w| stage(w[0]..w[1])).collect() };
    let slowest = |stages: &[StageCost]| stages.iter().map(|s| s.ns(Shape::decode(&[1024]))).max().unwrap_or(0);
    let near = 12..=19;
    let mut best: Option<Vec<StageCost>> = None;
    for a in near.clone() {
        for b in near.clone() {
            for c in near.clone() {
                let stages = of(&[0, a, a + b, a + b + c, LAYERS]);
                if best.as_ref().is_none_or(|known| slowest(&stages) < slowest(known)) {
                    best = Some(stages);
                }
            }
        }
    }
    let stages = best.unwrap_or_default();
    let link = LinkCost { latency_us: 150.0, bytes_per_s: 587e6 };
    let driver = DriverCost { batch_us: 30.0, row_us: 3.0, output_us: 150.0, draft_us: 0.0 };
    Profile {
        links: vec![link; stages.len()],
        stages,
        driver,
        width: HIDDEN as u32,
        jitter: 0.0,
        mismeasured: 0.0,
        contention: 0.0,
    }
}

/// The forecast.
pub fn four_machines(options: &Options) -> Result<Vec<Figure>, Broken> {
    let mut figures = Vec::new();
    let plain = profile();
    let stages = plain.stages.len();
    let case = |name: String| options.case("kimi", stages, name);

    for rows in [512, 2048, 8192] {
        let case = case(format!("prompt of {rows} tokens"));
        let mut world = settled(&case, &plain, 1, rows + 16, 0.0, None)?;
        let best = best_cut(&plain, rows, CHUNK).1 as f64 / 1e9;
        for (i, what) in [(0, "TTFT of the first prompt"), (3, "TTFT of a later one")] {
            while world.requests().len() <= i {
                let begin = world.now();
                world.submit_at(begin, free_request(case.seed + world.requests().len() as u64, rows, 2, 512));
                case.run(&mut world)?;
            }
            let log = &world.requests()[i];
            let took = log.ttft_ns().unwrap_or(0);
            let busy = useful_share(world.steps(), stages, log.arrived_ns, log.arrived_ns + took + 1);
            figures.push(case.figure().value(what, took as f64 / 1e9, "s").against(best, true).busy(busy));
        }
    }

    for streams in [1, 2, 4, 8] {
        let case = case(format!("{streams} streams, nothing guessed"));
        let mut world = settled(&case, &plain, streams, 2048, 0.0, Some(0))?;
        let begin = world.now();
        for seed in seeds(case.seed).take(streams) {
            world.submit_at(begin, free_request(seed, 256, 700, 512));
        }
        case.run(&mut world)?;
        let Some((from, to)) = steady_window(world.requests().iter(), 64) else {
            figures.push(case.figure().value("total decode", 0.0, "tok/s").wanted(Wanted::AtLeast(1.0)));
            continue;
        };
        let (middle, count) = ((from + to) / 2, streams as u32);
        let before = world.requests().iter().flat_map(|r| &r.token_ns).filter(|t| **t < middle).count() as u32;
        let depth = 256 + before / count;
        let said = world.requests().iter().flat_map(|r| &r.token_ns).filter(|t| (from..to).contains(*t)).count();
        let rate = said as f64 * 1e9 / (to - from) as f64;
        let bound = streams as f64 * 1e9 / best_equal(&plain, streams, depth, streams).round_ns as f64;
        let busy = useful_share(world.steps(), stages, from, to);
        figures.push(
            case.figure()
                .value("total decode", rate, "tok/s")
                .against(bound, false)
                .busy(busy)
                .wanted(Wanted::AtLeast(0.95)),
        );
    }

    let passage = prompt(options.seed ^ 7, 256, 512);
    let repeated = |follow| Text { seed: options.seed, passage: passage.clone(), follow, ..Text::default() };
    let free = Text::free(options.seed);
    let with_draft = drafting(plain.clone(), 0.05);
    for (name, profile, text, right) in [
        ("1 stream, an edit that repeats 90 %", &plain, repeated(0.9), 0.0),
        ("1 stream, an edit that repeats 95 %", &plain, repeated(0.95), 0.0),
        ("1 stream, text that nothing guesses", &plain, free.clone(), 0.0),
        ("1 stream, a draft of 5 % right 7 in 10", &with_draft, free.clone(), 0.7),
        ("1 stream, a draft of 5 % right 8 in 10", &with_draft, free, 0.8),
    ] {
        let case = case(name.into());
        let mut world = settled(&case, profile, 1, 1024, right, None)?;
        let begin = world.now();
        world.submit_at(begin, Request { prompt: passage.clone(), max_tokens: 400, text });
        case.run(&mut world)?;
        let times = &world.requests()[0].token_ns;
        let (Some(first), Some(last)) = (times.first(), times.last()) else { continue };
        let rate = (times.len() - 1) as f64 * 1e9 / (last - first) as f64;
        let off = 1e9 / plain_ns(&plain, 256 + 200) as f64;
        figures.push(case.figure().value("decode", rate, "tok/s").against(off, false).wanted(Wanted::AtLeast(0.97)));
    }
    Ok(figures)
}

/// A pipeline whose stages are measured.
fn settled(
    case: &Case,
    profile: &Profile,
    slots: usize,
    ctx: u32,
    draft_right: f64,
    depth: Option<u16>,
) -> Result<World, Broken> {
    let usual = config(case.stages, slots, ctx, CHUNK);
    let speculation_depth = depth.unwrap_or(usual.speculation_depth);
    let config = EngineConfig { speculation_depth, ..usual };
    let setup = Setup { draft_right, trace: case.trace, ..Setup::new(config, profile.clone(), case.seed) };
    let mut world = World::new(setup).map_err(|f| case.broken(f, &[]))?;
    case.run(&mut world)?;
    Ok(world)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_weights_are_those_that_were_published() {
        let active: f64 = (0..LAYERS)
            .map(|l| layer_weights(l).0 + if l > 0 { EXPERTS_USED * EXPERT_WEIGHTS } else { 0.0 })
            .sum::<f64>()
            + HEAD_WEIGHTS;
        assert!((31.6e9..31.8e9).contains(&active), "{active}");
        let bits = expert_bytes_per_weight() * 8.0;
        assert!((2.8..2.95).contains(&bits), "{bits}");
    }

    #[test]
    fn a_plain_pipeline_says_what_was_published() {
        let profile = profile();
        let tokens_per_s = 1e9 / plain_ns(&profile, 1024) as f64;
        assert!((8.0..9.5).contains(&tokens_per_s), "{tokens_per_s}");
        let [least, most] = [f64::min, f64::max]
            .map(|f| profile.stages.iter().map(|s| s.ns(Shape::decode(&[1024])) as f64).reduce(f).unwrap_or(0.0));
        assert!(most / least < 1.05, "{least} {most}");
    }
}
