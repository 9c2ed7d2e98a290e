//! Random workloads: everything that may be set is drawn from a seed, and only the rules are checked.
use capstan_engine::EngineConfig;
use capstan_proto::data::Rollback;

use crate::cost::{DriverCost, LinkCost, Ns, Profile, RowCost, Shape, StageCost, ns};
use crate::dice::Dice;
use crate::log::Request;
use crate::text::Text;
use crate::world::{Failure, Setup, World};

/// What one workload did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Requests that arrived.
    pub requests: u64,
    /// Of these, given up by their clients.
    pub cancelled: u64,
    /// Of these, refused for want of room.
    pub refused: u64,
    /// Tokens said.
    pub tokens: u64,
    /// Micro-batches computed.
    pub steps: u64,
    /// Tokens guessed.
    pub guessed: u64,
    /// Of these, right.
    pub accepted: u64,
    /// Prompt tokens taken from caches.
    pub cached: u64,
}

impl Tally {
    /// Both together.
    pub fn plus(self, other: Self) -> Self {
        Self {
            requests: self.requests + other.requests,
            cancelled: self.cancelled + other.cancelled,
            refused: self.refused + other.refused,
            tokens: self.tokens + other.tokens,
            steps: self.steps + other.steps,
            guessed: self.guessed + other.guessed,
            accepted: self.accepted + other.accepted,
            cached: self.cached + other.cached,
        }
    }
}

/// Runs the workload that belongs to this seed. What led to a failure comes with it, where that is asked for.
pub fn run(seed: u64, trace: bool) -> Result<Tally, (Failure, Vec<String>)> {
    let mut dice = Dice::new(seed);
    let setup = Setup { trace, ..setup(&mut dice, seed) };
    let plan = Plan::draw(&mut dice, &setup);
    let mut world = World::new(setup).map_err(|f| (f, Vec::new()))?;
    for (at, request, give_up) in plan.requests {
        let id = world.submit_at(at, request);
        if let Some(at) = give_up {
            world.cancel_at(at, id);
        }
    }
    if let Err(failure) = world.run() {
        return Err((failure, world.trace().to_vec()));
    }
    let counters = world.engine().counters();
    let requests = world.requests();
    let count = |of: &dyn Fn(&crate::log::RequestLog) -> bool| requests.iter().filter(|r| of(r)).count() as u64;
    Ok(Tally {
        requests: requests.len() as u64,
        cancelled: count(&|r| r.end == Some(crate::text::End::Cancelled)),
        refused: count(&|r| r.refused),
        tokens: requests.iter().map(|r| r.tokens.len() as u64).sum(),
        steps: world.steps().len() as u64,
        guessed: counters.guessed,
        accepted: counters.accepted,
        cached: requests.iter().map(|r| u64::from(r.cached)).sum(),
    })
}

/// Who asks for what, when, and when they lose patience.
struct Plan {
    requests: Vec<(Ns, Request, Option<Ns>)>,
}

impl Plan {
    fn draw(dice: &mut Dice, setup: &Setup) -> Self {
        let EngineConfig { slots, ctx, chunk, .. } = setup.config;
        let vocab = setup.n_vocab as u64 - 1;
        let tokens = |dice: &mut Dice, n: u64| -> Vec<i32> { (0..n).map(|_| dice.between(0, vocab) as i32).collect() };
        let count = dice.between(1, 24);
        // Beginnings that several prompts share: system prompts, and conversations that go on.
        let mut pool: Vec<Vec<i32>> = (0..3).map(|_| tokens(dice, 40)).collect();
        // From far apart to all at once, in units of what a token takes.
        let token = setup.profile.through_ns(Shape::decode(&[ctx])) as f64;
        let mean = *dice.pick(&[0.0, 0.3, 2.0, 10.0, 60.0]) * token;
        let impatient = *dice.pick(&[0.0, 0.1, 0.5]);
        let mut at = 0.0;
        let requests = (0..count)
            .map(|_| {
                at += dice.exponential(mean.max(1.0));
                let long = dice.chance(0.2);
                let fresh = dice.between(1, if long { u64::from(3 * chunk.max(8)) } else { 12 });
                let mut prompt = if dice.chance(0.6) { dice.pick(&pool).clone() } else { Vec::new() };
                prompt.truncate(dice.between(0, prompt.len() as u64) as usize);
                prompt.extend(tokens(dice, fresh));
                prompt.truncate(ctx as usize - 1);
                if dice.chance(0.3) {
                    pool.push(prompt.clone());
                }
                let text = Text {
                    seed: dice.bits(),
                    passage: if dice.chance(0.5) { prompt.clone() } else { Vec::new() },
                    follow: *dice.pick(&[0.5, 0.9, 1.0]),
                    turn: *dice.pick(&[0, 0, 7]),
                    ends: *dice.pick(&[0, 10, 40]),
                };
                let max_tokens = dice.between(1, 60) as u32;
                let give_up = dice
                    .chance(impatient)
                    .then(|| ns(at / 1000.0 + dice.exponential(10.0 * token * f64::from(slots).sqrt()) / 1000.0));
                (ns(at / 1000.0), Request { prompt, max_tokens, text }, give_up)
            })
            .collect();
        Self { requests }
    }
}

/// Machines and settings.
fn setup(dice: &mut Dice, seed: u64) -> Setup {
    let stages = *dice.pick(&[1, 2, 2, 4, 4, 8]);
    let slots = dice.between(1, 12) as u32;
    let ctx = dice.between(16, 300) as u32;
    let chunk = dice.between(1, 64) as u32;
    let usual = EngineConfig::new(stages, slots, ctx, chunk);
    let rollback = *dice.pick(&[Rollback::Trim, Rollback::Trim, Rollback::Copy, Rollback::None]);
    let speculation_depth = *dice.pick(&[0, usual.speculation_depth, usual.speculation_depth, 1]);
    let config = EngineConfig {
        fixed_shapes: dice.chance(0.15),
        decode_batch: if dice.chance(0.7) { slots } else { dice.between(1, u64::from(slots)) as u32 },
        in_flight_max: if dice.chance(0.7) {
            usual.in_flight_max
        } else {
            dice.between(1, 2 * u64::from(stages) + 1) as u16
        },
        decode_slowdown_percent: *dice.pick(&[100, 130, 175, 175, 400, 1000]),
        queue_max: if dice.chance(0.8) { usual.queue_max } else { dice.between(0, 8) as usize },
        prefix_cache: dice.chance(0.7),
        measure: dice.chance(0.5),
        speculation_depth,
        rollback,
        spares: if rollback == Rollback::Copy { u32::from(speculation_depth) } else { 0 },
        ..usual
    };
    let n_vocab = if dice.chance(0.3) { dice.between(2, 12) } else { dice.between(64, 512) } as usize;
    let drafts = dice.chance(0.3);
    let draft_right = dice.unit();
    let profile = profile(dice, usize::from(stages), drafts);
    Setup { n_vocab, draft_right, ..Setup::new(config, profile, seed) }
}

fn profile(dice: &mut Dice, stages: usize, drafts: bool) -> Profile {
    let kind = dice.between(0, 2);
    let cost = |dice: &mut Dice| {
        let fixed = dice.log_between(10.0, 3000.0);
        let row = dice.log_between(5.0, 1000.0);
        let rows = match kind {
            0 => RowCost::Linear(row),
            1 => RowCost::Tiles(vec![(32, 12.0 * row), (4, 2.0 * row), (1, row)]),
            _ => {
                RowCost::Experts { dense_us: fixed, experts: 64.0, used: 4.0, expert_us: row / 4.0, row_us: row / 10.0 }
            }
        };
        StageCost { fixed_us: fixed, rows, depth_us: row / 500.0, head_us: 0.0, op_us: 1.0 }
    };
    let first = cost(dice);
    let even = dice.chance(0.5);
    let machines: Vec<StageCost> = (0..stages).map(|_| if even { first.clone() } else { cost(dice) }).collect();
    let link = |dice: &mut Dice| LinkCost {
        latency_us: dice.log_between(10.0, 5000.0),
        bytes_per_s: dice.log_between(10e6, 5e9),
    };
    let links = (0..stages).map(|_| link(dice)).collect();
    let token: f64 = machines.iter().map(|s| s.ns(Shape::decode(&[1])) as f64 / 1000.0).sum();
    let driver = DriverCost {
        batch_us: dice.log_between(1.0, 100.0),
        row_us: 1.0,
        output_us: dice.log_between(1.0, 300.0),
        draft_us: if drafts { token * dice.log_between(0.01, 0.5) } else { 0.0 },
    };
    Profile {
        stages: machines,
        links,
        driver,
        width: *dice.pick(&[64, 1024, 7168]),
        jitter: *dice.pick(&[0.0, 0.05, 0.3]),
        mismeasured: 0.0,
        contention: 0.0,
    }
}
