//! Split equals whole, to the last bit: every tiny model of every architecture that may be split, at its finest
//! partition and at each single cut.
//!
//! The whole model takes tokens. The stages take what they take in a cluster. A prompt of 21 tokens, then 23 tokens one
//! by one.
use std::sync::Mutex;

use capstan_llama::ContextOptions;
use capstan_proto::LayerRange;
use capstan_testkit::{models, tiny};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use subject::{Piece, Subject, for_every_tiny_model, partition_at};

mod subject;

const PROMPT: usize = 21;
const STEPS: u64 = 24;

/// What a comparison found.
struct Found {
    difference: f32,
    spread: f32,
}

/// The logits of every step.
fn run(subject: &mut Subject, partition: &[LayerRange]) -> Result<Vec<Vec<f32>>, String> {
    let context =
        ContextOptions { ctx_per_slot: 256, slots: 2, ubatch: 32, threads: Some(1), ..ContextOptions::default() };
    let mut pipeline = subject.pipeline(partition, &context)?;
    let mut rng = StdRng::seed_from_u64(1);
    let n_vocab = pipeline.n_vocab() as i32;
    let mut pos = 0;
    let mut step = |step| {
        let count = if step == 0 { PROMPT } else { 1 };
        let tokens: Vec<i32> = (0..count).map(|_| rng.random_range(4..n_vocab)).collect();
        let piece = Piece { slot: 1, pos, tokens: &tokens };
        pos += count;
        pipeline.send(Vec::new(), &[piece]).map_err(|e| format!("step {step}: {e}"))
    };
    (0..STEPS).map(&mut step).collect()
}

impl Found {
    fn compare(want: &[Vec<f32>], got: &[Vec<f32>]) -> Result<Self, String> {
        let mut found = Self { difference: 0.0, spread: 0.0 };
        for (step, (want, got)) in want.iter().zip(got).enumerate() {
            if want.len() != got.len() || want.is_empty() {
                return Err(format!("step {step}: {} logits instead of {}", got.len(), want.len()));
            }
            let difference = |(a, b): (&f32, &f32)| (a - b).abs();
            found.difference = want.iter().zip(got).map(difference).fold(found.difference, f32::max);
            let (min, max) = want.iter().fold((f32::MAX, f32::MIN), |(l, h), x| (l.min(*x), h.max(*x)));
            found.spread = found.spread.max(max - min);
        }
        Ok(found)
    }

    fn check(self) -> Result<(), String> {
        // Equal logits everywhere would make the comparison empty.
        if self.spread < 1e-3 {
            return Err(format!("the logits are all alike ({})", self.spread));
        }
        if self.difference == 0.0 { Ok(()) } else { Err(format!("difference {}", self.difference)) }
    }
}

fn names(partition: &[LayerRange]) -> String {
    partition.iter().map(|r| r.to_string()).collect::<Vec<_>>().join(" ")
}

/// Every partition of a model that must be exact.
fn prove(subject: &mut Subject) -> Result<String, String> {
    if let Some(reason) = subject.model.split_problem() {
        return Ok(format!("runs whole: {reason}"));
    }
    let n = subject.model.n_layers();
    let mut partitions = vec![subject.model.finest_partition()];
    partitions.extend(subject.model.single_cuts().into_iter().map(|c| partition_at(&[c], n)));
    partitions.dedup();
    let whole = run(subject, &partition_at(&[], n))?;
    let compare = |p: &Vec<LayerRange>| Found::compare(&whole, &run(subject, p)?).and_then(Found::check);
    let results: Vec<_> = partitions.iter().map(compare).collect();
    let wrong = partitions.iter().zip(results).filter_map(|(p, r)| Some(format!("[{}] {}", names(p), r.err()?)));
    let wrong: Vec<String> = wrong.collect();
    if !wrong.is_empty() {
        return Err(wrong.join(", "));
    }
    Ok(format!("0.0 at {} partitions, the finest {}", partitions.len(), names(&partitions[0])))
}

#[test]
fn every_tiny_model_is_exact_wherever_it_may_be_cut() {
    let split = Mutex::new(Vec::new());
    let limited = for_every_tiny_model(|name, subject| {
        let found = prove(subject)?;
        if subject.model.split_problem().is_none() {
            split.lock().unwrap().extend(tiny::architecture(name));
        }
        Ok(found)
    });
    if !limited {
        let split = split.into_inner().unwrap();
        let missing: Vec<_> = tiny::PROMISED.iter().filter(|a| !split.contains(*a)).collect();
        assert!(missing.is_empty(), "these architectures must be split and were not: {missing:?}");
    }
}

#[test]
fn smollm2_is_exact_in_two_three_five_and_thirty_stages() {
    let folder = tempfile::tempdir().unwrap();
    let mut subject = Subject::open(&models::smollm2(), folder.path()).unwrap();
    assert_eq!(subject.model.split_problem(), None);
    let whole = run(&mut subject, &partition_at(&[], 30)).unwrap();
    let finest: Vec<u32> = (1..30).collect();
    for cuts in [&[13][..], &[10, 20], &[1, 7, 15, 29], &finest] {
        let partition = partition_at(cuts, 30);
        let split = run(&mut subject, &partition).unwrap();
        Found::compare(&whole, &split).unwrap().check().unwrap_or_else(|e| panic!("{}: {e}", names(&partition)));
    }
}
