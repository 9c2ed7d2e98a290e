//! What is settled about machines beforehand is kept, and is the same as naming other machines.
use capstan_planner::links::{self, Links};
use capstan_planner::{Answer, Machine, Objective, Question, Subject, Unfit, Wish, answer, machines, models};
use capstan_proto::LayerRange;
use proptest::prelude::*;

/// Three machines of two kinds of which no one holds the model.
fn machines(gib: [u64; 3]) -> Vec<Machine> {
    let (small, large) = (machines::find("RTX 4090").unwrap(), machines::find("M4 Pro 24GB").unwrap());
    [&small, &small, &large]
        .into_iter()
        .zip(gib)
        .map(|(machine, gib)| Machine { usable_bytes: gib << 30, ..machine.clone() })
        .collect()
}

fn ask(
    machines: &[Machine],
    headroom_gib: u64,
    objective: Objective,
    wishes: &[(usize, Wish)],
) -> Result<Answer, Unfit> {
    let (model, quantisation) = models::find("gpt-oss-20b").unwrap();
    let subject = Subject::known(model, quantisation);
    let links = Links::all(links::parse("10GbE").unwrap());
    answer(&Question {
        subject: &subject,
        machines,
        links: &links,
        ctx: 4096,
        slots: 2,
        ubatch: 512,
        headroom_bytes: headroom_gib << 30,
        objective,
        wishes,
    })
}

/// Machine by machine, in pipeline order, and the speed.
fn shape(a: &Answer) -> (Vec<(usize, String)>, f64) {
    (a.stages.clone(), a.forecast.alone(0).unwrap())
}

/// How long a token of the micro-batch that layers are dealt out for is on its way.
fn way_s(a: &Answer) -> f64 {
    a.work.iter().map(|w| w.compute_s + w.hop_s).sum()
}

fn objective() -> impl Strategy<Value = Objective> {
    prop::sample::select(vec![Objective::Latency, Objective::Balanced, Objective::Throughput])
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn an_excluded_machine_is_one_that_is_not_there(
        gib in prop::array::uniform3(2u64..14),
        out in 0usize..3,
        objective in objective(),
    ) {
        let all = machines(gib);
        let others: Vec<Machine> = (0..3).filter(|&i| i != out).map(|i| all[i].clone()).collect();
        let (with, without) = (ask(&all, 0, objective, &[(out, Wish::Unused)]), ask(&others, 0, objective, &[]));
        prop_assert_eq!(with.is_ok(), without.is_ok());
        let (Ok(with), Ok(without)) = (with, without) else { return Ok(()) };
        prop_assert!(with.stages.iter().all(|s| s.0 != out));
        prop_assert!(with.rejected[0].contains("is left out, as was asked"));
        let moved = |place: usize| if place >= out { place + 1 } else { place };
        let stages: Vec<_> = without.stages.iter().map(|(place, layers)| (moved(*place), layers.clone())).collect();
        prop_assert_eq!(shape(&with), (stages, shape(&without).1));
        prop_assert_eq!((with.ctx_max, with.slots_max), (without.ctx_max, without.slots_max));
    }

    #[test]
    fn headroom_is_memory_that_is_not_there(
        gib in prop::array::uniform3(4u64..16),
        headroom in 0u64..4,
        objective in objective(),
    ) {
        let less = ask(&machines(gib.map(|g| g - headroom)), 0, objective, &[]);
        prop_assert_eq!(ask(&machines(gib), headroom, objective, &[]), less);
    }

    /// A machine that must be used, and one that holds given layers: as good as the best that keeps to it, which is no
    /// better than the best of all; and what the best of all does anyway costs nothing to settle.
    #[test]
    fn what_is_settled_is_kept(
        gib in prop::array::uniform3(5u64..16),
        place in 0usize..3,
        start in 0u32..24,
        count in 1u32..12,
        objective in objective(),
    ) {
        let all = machines(gib);
        let free = ask(&all, 0, objective, &[]);
        let used = ask(&all, 0, objective, &[(place, Wish::Used)]);
        if let Ok(used) = &used {
            prop_assert!(used.stages.iter().any(|s| s.0 == place));
            prop_assert!(free.is_ok());
        }
        let layers = LayerRange::new(start, (start + count).min(24)).unwrap();
        let held = ask(&all, 0, objective, &[(place, Wish::Holds(layers))]);
        if let Ok(held) = &held {
            let has = |s: &(usize, String)| s.0 == place && s.1 == layers.to_string();
            prop_assert!(held.stages.iter().any(has), "{:?}", held.stages);
        }
        let Ok(free) = free else { return Ok(()) };
        for (place, layers) in &free.stages {
            let again = ask(&all, 0, objective, &[(*place, Wish::Holds(layers.parse().unwrap()))]).unwrap();
            // `balanced` measures itself against the best slowest stage, which is no faster where something is settled.
            let ratio = way_s(&again) / way_s(&free);
            let same = if objective == Objective::Balanced { ratio < 1.0 + 1e-9 } else { (ratio - 1.0).abs() < 1e-9 };
            prop_assert!(same, "{:?} {:?}", again.stages, free.stages);
        }
    }
}

#[test]
fn what_cannot_be_is_said_why() {
    let all = machines([12, 12, 12]);
    let said = |wishes: &[(usize, Wish)]| ask(&all, 0, Objective::Latency, wishes).unwrap_err().to_string();
    let holds = |a, b| Wish::Holds(LayerRange::new(a, b).unwrap());
    assert!(said(&[(3, Wish::Used)]).contains("no machine no. 4"));
    assert!(said(&[(0, Wish::Used), (0, Wish::Unused)]).contains("twice"));
    assert!(said(&[(0, holds(20, 25))]).contains("has 24 layers"));
    assert!(said(&[(0, holds(0, 4)), (1, holds(3, 6))]).contains("overlap"));
    assert!(said(&[(0, holds(1, 2))]).contains("cannot be pinned"), "{}", said(&[(0, holds(1, 2))]));
    assert!(said(&[(0, Wish::Unused), (1, Wish::Unused), (2, Wish::Unused)]).contains("leave at least one"));
    assert!(said(&[(0, holds(0, 23))]).contains("does not fit"), "{}", said(&[(0, holds(0, 23))]));
}
