//! The scheduler over a whole pipeline: whatever runs beside a request, its answer is the one it gets alone.
mod sim;

use capstan_engine::{EngineConfig, FakeModel, SubmitError};
use capstan_proto::RequestId;
use capstan_proto::data::KvOp;
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
    let policy = (1..=6u16, 1..=8u32, 0..=1u16, 1..=4u16, 0..=8usize);
    (shape, policy).prop_map(|((stages, slots, ctx, chunk), (chunks_min, decode_batch, more, share, queue_max))| {
        EngineConfig {
            chunks_min,
            decode_batch,
            in_flight_max: stages + more,
            decodes_per_prefill: share,
            queue_max,
            ..EngineConfig::new(stages, slots, ctx, chunk)
        }
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 4000, ..ProptestConfig::default() })]

    #[test]
    fn every_answer_is_the_one_it_gets_alone(config in config(), events in events(), seed: u64) {
        let mut dice = Dice(seed);
        let model = FakeModel::small();
        let mut ring = Ring::new(config.clone(), model);
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
                Event::Lose => ring.lose(),
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

#[test]
fn chunks_of_one_prompt_fill_the_pipeline() {
    let mut ring = Ring::new(EngineConfig::new(3, 2, 256, 64), FakeModel::small());
    ring.submit(0, prompt(60), Some(1));
    ring.poll();
    let rows: Vec<usize> = ring.planned.iter().map(|b| b.rows.len()).collect();
    assert_eq!(rows, [20, 20, 20]);
    assert_eq!(ring.engine.counters().in_flight, 3);
}

#[test]
fn sequences_that_decode_are_dealt_over_the_stages() {
    for (sequences, decode_batch, groups) in
        [(1, 8, vec![1]), (3, 8, vec![1, 1, 1]), (7, 8, vec![3, 3, 1]), (7, 2, vec![2, 2, 2])]
    {
        // The prompts' chunks are sent alone, and no answer may end before all decode.
        let config = EngineConfig { decode_batch, decodes_per_prefill: 1, ..EngineConfig::new(3, 8, 4096, 64) };
        let model = FakeModel { n_vocab: 4096, ..FakeModel::small() };
        let mut ring = Ring::new(config, model);
        for id in 0..sequences {
            ring.submit(id, prompt(3), None);
        }
        ring.poll();
        for _ in 0..12 {
            round(&mut ring);
        }
        assert_eq!(ring.engine.counters().slots_used, sequences as u32, "an answer ended early");
        let in_flight = ring.engine.counters().in_flight;
        let mut sent: Vec<usize> =
            ring.planned[ring.planned.len() - in_flight..].iter().map(|b| b.rows.len()).collect();
        sent.sort_unstable_by(|a, b| b.cmp(a));
        assert_eq!(sent, groups, "{sequences} sequences, at most {decode_batch} together");
    }
}

#[test]
fn a_long_prompt_and_a_decoding_sequence_take_turns() {
    let config = EngineConfig { decodes_per_prefill: 2, ..EngineConfig::new(1, 2, 4096, 16) };
    let mut ring = Ring::new(config, FakeModel { n_vocab: 4096, ..FakeModel::small() });
    ring.submit(0, prompt(4), None);
    ring.poll();
    round(&mut ring);
    ring.submit(1, prompt(64), None);
    for _ in 0..12 {
        round(&mut ring);
    }
    let rows: Vec<usize> = ring.planned.iter().map(|b| b.rows.len()).collect();
    assert_eq!(rows[..13], [4, 1, 1, 1, 16, 1, 1, 16, 1, 1, 16, 1, 1]);
}

#[test]
fn a_cancelled_prompt_keeps_its_slot_until_its_chunks_are_back() {
    let mut ring = Ring::new(EngineConfig::new(2, 1, 256, 16), FakeModel::small());
    ring.submit(0, prompt(64), None);
    ring.poll();
    ring.submit(1, prompt(2), Some(1));
    ring.cancel(RequestId(0));
    ring.poll();
    assert_eq!((ring.engine.counters().slots_used, ring.engine.counters().queued), (1, 1));
    assert!(!ring.engine.handle_cancel(RequestId(0)), "it is cancelled already");
    round(&mut ring);
    // Its Clear travels with the first row of the next sequence in the slot.
    let last = ring.planned.last().unwrap();
    assert_eq!((last.step, &last.ops[..], last.rows.len()), (2, &[KvOp::Clear { slot: 0 }][..], 2));
    ring.drain(&mut Dice(0));
    assert!(ring.engine.is_idle());
}

#[test]
fn requests_that_cannot_be_taken_are_refused() {
    let config = EngineConfig { queue_max: 1, ..EngineConfig::new(1, 1, 8, 8) };
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
    let mut ring = Ring::new(EngineConfig::new(2, 2, 64, 16), FakeModel::small());
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
    let mut ring = Ring::new(EngineConfig::new(2, 2, 64, 16), FakeModel::small());
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
