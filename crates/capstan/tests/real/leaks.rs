//! After a thousand requests, many of them given up, everything is back where it was.
use std::collections::HashMap;

use crate::exactness::greedy;
use crate::pipeline::{Options, Pipeline};
use capstan_gguf::Model;
use capstan_proto::RequestId;
use capstan_proto::generate::{GenerateEvent, GenerateRequest, Prompt, Sampling};
use capstan_testkit::tiny;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

const REQUESTS: usize = 1000;
/// By then every buffer has grown to what it needs.
const WARM: usize = 200;
const AT_ONCE: usize = 8;
/// What allocators and threads keep for themselves.
const SLACK_BYTES: u64 = 6 << 20;

/// Long and short prompts, some of which begin alike, greedy and drawn answers.
fn request(rng: &mut StdRng) -> GenerateRequest {
    let shared = rng.random_range(0..4) * 40;
    let own = rng.random_range(1..60);
    let prompt = (0..shared).map(|i| 4 + i % 90).chain((0..own).map(|_| rng.random_range(4..120))).collect();
    let mut request = greedy(Prompt::Tokens(prompt), rng.random_range(1..25));
    request.raw_logits = false;
    if rng.random_bool(0.3) {
        request.sampling = Sampling { seed: Some(rng.random()), ..Sampling::default() };
    }
    request
}

#[cfg(target_os = "linux")]
fn resident_bytes(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).expect("the process lives");
    let line = status.lines().find_map(|l| l.strip_prefix("VmRSS:")).expect("it has memory");
    let kib: u64 = line.trim().trim_end_matches(" kB").parse().expect("a number");
    kib << 10
}

#[cfg(not(target_os = "linux"))]
fn resident_bytes(_: u32) -> u64 {
    0
}

/// Runs `count` requests, [`AT_ONCE`] at a time, and cancels about every fifth in the middle of its answer.
async fn serve(pipeline: &mut Pipeline, rng: &mut StdRng, count: usize) {
    // How many events of a request come before it is cancelled.
    let mut live: HashMap<RequestId, Option<u32>> = HashMap::new();
    let (mut sent, mut cancelled) = (0, 0);
    while sent < count || !live.is_empty() {
        while sent < count && live.len() < AT_ONCE {
            let patience = rng.random_bool(0.2).then(|| rng.random_range(1..12));
            live.insert(pipeline.submit(request(rng)).await, patience);
            sent += 1;
        }
        let (id, event) = pipeline.event().await;
        match event {
            GenerateEvent::Started { .. } | GenerateEvent::Token { .. } | GenerateEvent::Paused { .. } => {
                let patience = live.get_mut(&id).expect("a live request");
                if let Some(left) = patience {
                    *left -= 1;
                    if *left == 0 {
                        *patience = None;
                        cancelled += 1;
                        pipeline.cancel(id).await;
                    }
                }
            }
            GenerateEvent::Finished { .. } => {
                live.remove(&id).expect("a live request");
            }
            GenerateEvent::Failed(error) => panic!("a request failed: {error}"),
        }
    }
    assert!(cancelled > count / 20, "{cancelled} of {count} were cancelled");
    loop {
        let stats = pipeline.stats().await;
        if stats.slots_used == 0 && stats.queued == 0 {
            return;
        }
    }
}

#[tokio::test]
async fn a_thousand_requests_leave_nothing_behind() {
    let folder = tempfile::tempdir().unwrap();
    for name in ["llama", "jamba"] {
        let path = folder.path().join(format!("{name}.gguf"));
        tiny::write(name, &path).unwrap();
        let cuts = [Model::open(&path).unwrap().single_cuts()[1]];
        let seed = 20_250_301;
        println!("{name}, seed {seed}");
        let mut rng = StdRng::seed_from_u64(seed);
        let options = Options { ctx: 256, slots: 4, ubatch: 64, decode_batch: 4, ..Options::default() };
        let mut pipeline = Pipeline::start(&path, &cuts, &options).await;
        serve(&mut pipeline, &mut rng, WARM).await;
        let resident = |p: &Pipeline| -> Vec<u64> { p.pids().into_iter().map(resident_bytes).collect() };
        let before = resident(&pipeline);
        serve(&mut pipeline, &mut rng, REQUESTS - WARM).await;
        let after = resident(&pipeline);
        println!("{name}: resident {before:?} bytes, then {after:?}");
        for (before, after) in before.iter().zip(&after) {
            assert!(*after < before + SLACK_BYTES, "{name}: memory grew from {before} to {after} bytes");
        }
    }
}
