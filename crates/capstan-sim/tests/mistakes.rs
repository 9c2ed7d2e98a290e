//! The checkers find mistakes: pipelines that break one rule each do not get through.
use capstan_engine::EngineConfig;
use capstan_proto::data::{KvOp, MicroBatch, Rollback};
use capstan_sim::cost::{LinkCost, Profile, StageCost};
use capstan_sim::log::Request;
use capstan_sim::text::Text;
use capstan_sim::world::{Failure, Setup, Tamper, World};

/// Requests that share beginnings, repeat themselves and reuse slots, one after the other and side by side.
fn busy(tamper: Option<Tamper>, rollback: Rollback) -> Result<(), Failure> {
    let profile = Profile::even(3, StageCost::linear(500.0, 50.0, 0.1), LinkCost::loopback(), 64);
    let spares = if rollback == Rollback::Copy { 3 } else { 0 };
    let config = EngineConfig { rollback, spares, ..EngineConfig::new(3, 2, 256, 16) };
    let mut world = World::new(Setup { tamper, n_vocab: 64, ..Setup::new(config, profile, 9) })?;
    let prompt: Vec<i32> = (0..40).map(|i| i * 7 % 64).collect();
    for at in [0, 20_000_000, 40_000_000, 40_000_000, 150_000_000, 151_000_000, 152_000_000u64] {
        let mut own = prompt[..(30 + at as usize / 20_000_000 % 10).min(40)].to_vec();
        own.extend([at as i32 / 1_000_000 % 64, 3]);
        let text = Text { seed: at, passage: prompt.clone(), follow: 0.8, ..Text::default() };
        world.submit_at(at, Request { prompt: own, max_tokens: 30, text });
    }
    world.run()
}

#[test]
fn each_mistake_is_found() {
    for rollback in [Rollback::Trim, Rollback::Copy] {
        assert_eq!(busy(None, rollback), Ok(()), "without a mistake it goes through");
    }
    let mistakes: [(&str, Rollback, Tamper); 7] = [
        ("Clear lost", Rollback::None, |_, b| b.ops.retain(|op| !matches!(op, KvOp::Clear { .. }))),
        ("Trim lost by one stage", Rollback::Trim, |i, b| {
            b.ops.retain(|op| i != 1 || !matches!(op, KvOp::Trim { .. }));
        }),
        ("Copy lost", Rollback::Copy, |_, b| b.ops.retain(|op| !matches!(op, KvOp::Copy { .. }))),
        ("Trim a position too far", Rollback::Trim, |_, b| {
            for op in &mut b.ops {
                if let KvOp::Trim { from, .. } = op {
                    *from -= 1;
                }
            }
        }),
        ("two slots in one place", Rollback::Trim, |i, b| {
            b.rows.iter_mut().filter(|_| i == 2).for_each(|r| r.slot = 0);
        }),
        ("a row lost by one stage", Rollback::Trim, |i, b: &mut MicroBatch| {
            if i == 0 && b.step == 25 {
                b.rows.clear();
                b.payload = capstan_proto::data::Payload::Hidden(vec![]);
            }
        }),
        ("a step doubled", Rollback::Trim, |_, b| b.step = b.step.min(30)),
    ];
    for (what, rollback, tamper) in mistakes {
        assert!(busy(Some(tamper), rollback).is_err(), "{what} was not found");
    }
}
