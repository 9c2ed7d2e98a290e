//! The scheduler over a whole pipeline: whatever runs beside a request, its answer is the one it gets alone.
mod sim;

use capstan_engine::{BatchKind, EngineConfig, FakeModel, SubmitError};
use capstan_proto::RequestId;
use capstan_proto::data::{KvOp, Rollback};
use proptest::prelude::*;

use sim::{Dice, End, Ring, alone};

#[derive(Clone, Debug)]
enum Event {
    Submit {
        prompt: Vec<i32>,
        max_tokens: Option<u32>,
    },
    /// One of the requests so far.
    Cancel(usize),
    Lose,
    /// So many acts of stages and driver.
    Act(usize),
}

fn events() -> impl Strategy<Value = Vec<Event>> {
    let prompt = prop_oneof![3 => 1..12usize, 1 => 12..70usize];
    let submit = (prompt.prop_flat_map(|n| prop::collection::vec(0..17i32, n)), prop::option::of(1..30u32))
        .prop_map(|(prompt, max_tokens)| Event::Submit { prompt, max_tokens });
    let event = prop_oneof![
        12 => submit,
        3 => (0..64usize).prop_map(Event::Cancel),
        1 => Just(Event::Lose),
        12 => (1..40usize).prop_map(Event::Act),
    ];
    prop::collection::vec(event, 1..40)
}

fn config() -> impl Strategy<Value = EngineConfig> {
    let shape = (1..=5u16, 1..=8u32, 2..=80u32, 1..=40u32);
    let policy = (any::<bool>(), 1..=8u32, 0..=4u16, 100..=300u16, 0..=8usize);
    let memory = (any::<bool>(), any::<bool>(), 0..=4u16, 0..3usize, 0..=3u32);
    (shape, policy, memory).prop_map(
        |((stages, slots, ctx, chunk), (fixed_shapes, decode_batch, more, share, queue_max), memory)| {
            let (prefix_cache, measure, speculation_depth, rollback, spares) = memory;
            let rollback = [Rollback::Trim, Rollback::Copy, Rollback::None][rollback];
            EngineConfig {
                fixed_shapes,
                decode_batch,
                in_flight_max: stages + more,
                decode_slowdown_percent: share,
                queue_max,
                prefix_cache,
                measure,
                speculation_depth,
                rollback,
                spares: if rollback == Rollback::Copy { spares } else { 0 },
                ..EngineConfig::new(stages, slots, ctx, chunk)
            }
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 4000, ..ProptestConfig::default() })]

    #[test]
    fn every_answer_is_the_one_it_gets_alone(
        config in config(),
        events in events(),
        draft in prop::option::of(0..=100usize),
        snapshots: bool,
        seed: u64,
    ) {
        let mut dice = Dice(seed);
        let model = FakeModel::small();
        let mut ring = Ring::new(config.clone(), model);
        ring.draft = draft;
        if snapshots {
            ring.keep_snapshots();
        }
        let mut requests = Vec::new();
        for event in events {
            match event {
                Event::Submit { prompt, max_tokens } => {
                    let counters = ring.engine.counters();
                    let room = config.queue_max + (counters.slots - counters.slots_used) as usize;
                    let refused = if prompt.len() >= config.ctx as usize {
                        Some(SubmitError::ContextExceeded { prompt: prompt.len(), ctx: config.ctx })
                    } else if counters.queued >= room {
                        Some(SubmitError::Busy { queue_max: config.queue_max })
                    } else {
                        None
                    };
                    if let Some(error) = refused {
                        let id = RequestId(u64::MAX);
                        prop_assert_eq!(ring.engine.handle_submit(id, prompt, max_tokens), Err(error));
                        continue;
                    }
                    ring.submit(requests.len() as u64, prompt.clone(), max_tokens);
                    requests.push((prompt, max_tokens));
                }
                Event::Cancel(i) => ring.cancel(RequestId((i % requests.len().max(1)) as u64)),
                Event::Lose => {
                    // A stage whose process ends may have been about to save, or had no room.
                    ring.forget(dice.below(config.stages.into()), dice.below(50));
                    ring.lose();
                }
                Event::Act(times) => {
                    for _ in 0..times {
                        ring.poll();
                        let busy = ring.busy();
                        if !busy.is_empty() {
                            ring.act(busy[dice.below(busy.len())]);
                        }
                    }
                }
            }
            // A driver polls after whatever happened.
            ring.poll();
        }
        ring.drain(&mut dice);

        prop_assert!(ring.engine.is_idle(), "{:?}", ring.engine.counters());
        prop_assert_eq!(ring.engine.counters().slots_used, 0);
        prop_assert!(ring.started.is_sorted(), "first come, first served: {:?}", ring.started);
        for (id, (prompt, max_tokens)) in (0..).map(RequestId).zip(&requests) {
            let (wanted, wanted_end) = alone(model, prompt, *max_tokens, config.ctx);
            let got = &ring.answers[&id];
            match &ring.ended[&id] {
                End::Cancelled | End::Lost => prop_assert!(wanted.starts_with(got), "request {}", id),
                end => prop_assert_eq!((got, end), (&wanted, &wanted_end), "request {}", id),
            }
        }
    }
}

fn prompt(len: usize) -> Vec<i32> {
    (0..len as i32).map(|i| 1 + i * 5 % 16).collect()
}

/// Lets everybody act, the driver last, until the micro-batches under way are back and what follows is sent.
fn round(ring: &mut Ring) {
    for _ in 0..ring.engine.counters().in_flight {
        let driver = usize::from(ring.engine.config().stages);
        (0..=driver).for_each(|i| ring.act(i));
    }
    ring.poll();
}

/// The usual settings, without measurements in between.
fn plain(stages: u16, slots: u32, ctx: u32, chunk: u32) -> EngineConfig {
    EngineConfig { measure: false, ..EngineConfig::new(stages, slots, ctx, chunk) }
}

#[test]
fn chunks_of_one_prompt_fill_the_pipeline() {
    let mut ring = Ring::new(plain(3, 2, 256, 64), FakeModel::small());
    ring.submit(0, prompt(60), Some(1));
    ring.poll();
    let rows: Vec<usize> = ring.planned.iter().map(|b| b.rows.len()).collect();
    assert!(rows.len() >= 3 && rows.iter().all(|n| *n <= 24), "{rows:?}");
    // On a fixed grid the number of stages does not matter.
    let mut ring = Ring::new(EngineConfig { fixed_shapes: true, ..plain(3, 2, 256, 64) }, FakeModel::small());
    ring.submit(0, prompt(150), Some(1));
    ring.poll();
    let rows: Vec<usize> = ring.planned.iter().map(|b| b.rows.len()).collect();
    assert_eq!(rows, [64, 64, 22]);
}

#[test]
fn an_answer_that_is_taken_up_again_is_computed_in_the_shapes_it_had() {
    let mut ring = Ring::new(EngineConfig { fixed_shapes: true, ..plain(2, 1, 256, 16) }, FakeModel::small());
    let (asked, whole) = (prompt(20), alone(FakeModel::small(), &prompt(20), Some(9), 256).0);
    let tokens: Vec<i32> = asked.iter().chain(&whole[..3]).copied().collect();
    ring.resume(1, tokens, 3, Some(6));
    ring.drain(&mut Dice(0));
    let rows: Vec<usize> = ring.planned.iter().take(5).map(|b| b.rows.len()).collect();
    assert_eq!(rows, [16, 4, 1, 1, 1]);
    // Only the last of them tells a new token.
    let outputs: Vec<usize> = ring.planned.iter().take(5).map(|b| b.rows.iter().filter(|r| r.output).count()).collect();
    assert_eq!(outputs, [0, 0, 0, 0, 1]);
    assert_eq!(ring.answers[&RequestId(1)], whole[3..]);
}

#[test]
fn an_answer_goes_on_behind_what_was_saved_of_it() {
    for fixed_shapes in [false, true] {
        let model = FakeModel { n_vocab: 4096, ..FakeModel::small() };
        let config = EngineConfig { fixed_shapes, ..plain(3, 2, 1024, 16) };
        let (asked, want) = ([prompt(20), prompt(90)], 150);
        let whole: Vec<Vec<i32>> = asked.iter().map(|p| alone(model, p, Some(want), 1024).0).collect();
        assert!(whole.iter().all(|answer| answer.len() == want as usize), "an answer ended early");
        let mut ring = Ring::new(config, model);
        ring.keep_snapshots();
        for (id, prompt) in (0..).zip(&asked) {
            ring.submit(id, prompt.clone(), Some(want));
        }
        ring.poll();
        while ring.answers.values().any(|answer| answer.len() < 100) {
            round(&mut ring);
        }
        // What one stage has lost is computed again from the beginning.
        for (attempt, lost) in [(1, false), (2, true)] {
            let so_far: Vec<Vec<i32>> = (0..2)
                .map(|i| (0..=attempt - 1).flat_map(|a| ring.answers[&RequestId(10 * a + i)].clone()).collect())
                .collect();
            if lost {
                ring.forget(1, 100);
            }
            ring.lose();
            for (i, said) in (0..2u64).zip(&so_far) {
                assert_eq!(said[..], whole[i as usize][..said.len()]);
                let tokens: Vec<i32> = asked[i as usize].iter().chain(said).copied().collect();
                ring.resume(10 * attempt + i, tokens, said.len() as u32, Some(want - said.len() as u32));
            }
            ring.poll();
            while ring.answers[&RequestId(10 * attempt)].is_empty()
                || ring.answers[&RequestId(10 * attempt + 1)].is_empty()
            {
                round(&mut ring);
            }
            for (i, said) in (0..2u64).zip(&so_far) {
                let (cached, all) = (ring.cached[&RequestId(10 * attempt + i)], asked[i as usize].len() + said.len());
                assert_eq!(cached == 0, lost);
                assert!(lost || all - cached as usize <= 40, "{cached} of {all}, fixed shapes: {fixed_shapes}");
            }
        }
        ring.drain(&mut Dice(5));
        for (i, whole) in (0..2).zip(&whole) {
            let said: Vec<i32> = (0..3).flat_map(|a| ring.answers[&RequestId(10 * a + i)].clone()).collect();
            assert_eq!(&said, whole, "fixed shapes: {fixed_shapes}");
        }
    }
}

#[test]
fn sequences_that_decode_are_dealt_over_the_stages() {
    for (sequences, decode_batch, groups) in [(1, 8, 1), (3, 8, 3), (7, 8, 3), (7, 2, 4)] {
        let config = EngineConfig { decode_batch, speculation_depth: 0, ..plain(3, 8, 4096, 64) };
        let model = FakeModel { n_vocab: 4096, ..FakeModel::small() };
        let mut ring = Ring::new(config, model);
        ring.row_us = Some(1000);
        for id in 0..sequences {
            ring.submit(id, prompt(3), None);
        }
        ring.poll();
        for _ in 0..120 {
            round(&mut ring);
        }
        assert_eq!(ring.engine.counters().slots_used, sequences as u32, "an answer ended early");
        let in_flight = ring.engine.counters().in_flight;
        let sent: Vec<usize> = ring.planned[ring.planned.len() - in_flight..].iter().map(|b| b.rows.len()).collect();
        assert!((groups..=4).contains(&sent.len()), "{sequences} sequences, at most {decode_batch} together: {sent:?}");
        assert!(sent.iter().all(|n| *n <= decode_batch as usize), "{sent:?}");
        assert_eq!(sent.iter().sum::<usize>(), sequences as usize, "{sent:?}");
    }
}

#[test]
fn a_long_prompt_and_a_decoding_sequence_take_turns() {
    let mut ring = Ring::new(plain(1, 2, 4096, 16), FakeModel { n_vocab: 4096, ..FakeModel::small() });
    ring.submit(0, prompt(4), None);
    ring.poll();
    round(&mut ring);
    ring.submit(1, prompt(64).into_iter().rev().collect(), None);
    for _ in 0..12 {
        round(&mut ring);
    }
    let kinds: Vec<BatchKind> = ring.planned.iter().map(|b| b.kind).skip(2).take(10).collect();
    use BatchKind::{Decode as D, Prefill as P};
    assert_eq!(kinds, [P, D, P, D, P, D, P, D, P, D]);
}

#[test]
fn a_prompt_takes_over_what_is_in_the_caches() {
    for live in [false, true] {
        let mut ring = Ring::new(plain(2, 3, 256, 64), FakeModel { n_vocab: 4096, ..FakeModel::small() });
        let long = prompt(90);
        ring.submit(0, long.clone(), Some(if live { 100 } else { 3 }));
        ring.poll();
        (0..if live { 6 } else { 40 }).for_each(|_| round(&mut ring));
        let mut next = long[..40].to_vec();
        next.extend([7, 7, 7]);
        ring.submit(1, next.clone(), Some(3));
        ring.drain(&mut Dice(1));
        let counters = ring.engine.counters();
        assert_eq!((counters.prompt_tokens, counters.cached_tokens), (133, 40), "live: {live}");
        for (id, prompt, max) in [(0, &long, if live { 100 } else { 3 }), (1, &next, 3)] {
            assert_eq!(ring.answers[&RequestId(id)], alone(ring.model, prompt, Some(max), 256).0, "live: {live}");
        }
    }
}

#[test]
fn right_guesses_fill_idle_stages_and_wrong_ones_change_nothing() {
    for (rollback, spares) in [(Rollback::Trim, 0), (Rollback::Copy, 3)] {
        let config = EngineConfig { rollback, spares, speculation_depth: 3, ..plain(3, 1, 512, 64) };
        let mut ring = Ring::new(config, FakeModel { n_vocab: 4096, ..FakeModel::small() });
        ring.draft = Some(80);
        ring.row_us = Some(1000);
        ring.submit(0, prompt(20), Some(200));
        ring.drain(&mut Dice(3));
        let counters = ring.engine.counters();
        assert_eq!(ring.answers[&RequestId(0)], alone(ring.model, &prompt(20), Some(200), 512).0);
        assert!(counters.accepted > 80 && counters.dropped > 5, "{rollback:?}: {counters:?}");
        assert!(counters.accepted + counters.dropped == counters.guessed, "{counters:?}");
    }
}

#[test]
fn a_cancelled_prompt_keeps_its_slot_until_its_chunks_are_back() {
    let mut ring = Ring::new(plain(2, 1, 256, 16), FakeModel::small());
    ring.submit(0, prompt(64), None);
    ring.poll();
    ring.submit(1, prompt(2), Some(1));
    ring.cancel(RequestId(0));
    ring.poll();
    assert_eq!((ring.engine.counters().slots_used, ring.engine.counters().queued), (1, 1));
    assert!(!ring.engine.handle_cancel(RequestId(0)), "it is cancelled already");
    round(&mut ring);
    // What is cleared or trimmed travels with the first row of the next sequence in the slot.
    let last = ring.planned.last().unwrap();
    assert_eq!((&last.ops[..], last.rows.len()), (&[KvOp::Clear { slot: 0 }][..], 2));
    ring.drain(&mut Dice(0));
    assert!(ring.engine.is_idle());
}

#[test]
fn requests_that_cannot_be_taken_are_refused() {
    let config = EngineConfig { queue_max: 1, ..plain(1, 1, 8, 8) };
    let mut ring = Ring::new(config, FakeModel::small());
    let engine = &mut ring.engine;
    assert_eq!(engine.handle_submit(RequestId(0), vec![], None), Err(SubmitError::Empty));
    assert_eq!(engine.handle_submit(RequestId(0), prompt(1), Some(0)), Err(SubmitError::NoTokens));
    let long = SubmitError::ContextExceeded { prompt: 8, ctx: 8 };
    assert_eq!(engine.handle_submit(RequestId(0), prompt(8), None), Err(long));
    ring.submit(0, prompt(7), None);
    ring.submit(1, prompt(7), None);
    let engine = &mut ring.engine;
    assert_eq!(engine.handle_submit(RequestId(1), prompt(1), None), Err(SubmitError::Duplicate(RequestId(1))));
    assert_eq!(engine.handle_submit(RequestId(2), prompt(1), None), Err(SubmitError::Busy { queue_max: 1 }));
    ring.drain(&mut Dice(0));
    assert!(ring.ended.len() == 2 && ring.engine.is_idle());
}

#[test]
fn a_micro_batch_out_of_order_is_an_error_and_changes_nothing() {
    let mut ring = Ring::new(plain(2, 2, 64, 16), FakeModel::small());
    ring.submit(0, prompt(32), None);
    ring.poll();
    let error = ring.engine.handle_completed(1).unwrap_err();
    assert_eq!((error.want, error.got), (Some(0), 1));
    ring.drain(&mut Dice(0));
    assert!(ring.engine.is_idle());
    assert_eq!(ring.engine.handle_completed(0).unwrap_err().want, None);
}

#[test]
fn a_lost_epoch_fails_those_with_slots_and_keeps_the_queue() {
    let mut ring = Ring::new(plain(2, 2, 64, 16), FakeModel::small());
    for id in 0..3 {
        ring.submit(id, prompt(20), Some(3));
    }
    ring.poll();
    ring.lose();
    assert_eq!(ring.ended.keys().copied().collect::<Vec<_>>(), [RequestId(0), RequestId(1)]);
    assert_eq!((ring.engine.counters().slots_used, ring.engine.counters().queued), (0, 1));
    ring.poll();
    assert_eq!((ring.planned[0].step, &ring.planned[0].ops[..]), (0, &[][..]));
    ring.drain(&mut Dice(0));
    assert!(ring.engine.is_idle() && ring.ended.len() == 3);
}
