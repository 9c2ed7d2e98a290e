//! Eight conversations at once: each gets the answer it would have got alone.
use crate::daemons::{Cluster, chat, wait_for};
use crate::pipeline::{Answer, Options, Pipeline, assert_same_bits};
use capstan_proto::generate::{GenerateRequest, Prompt, Sampling};
use capstan_testkit::models;

/// Rounding depends on a micro-batch's shape, which depends on the stages' speed, so where two logits are closer than
/// this either may win. llama.cpp alone, unsplit, moves logits of these prompts by up to 0.8 when they are computed in
/// chunks of 48 rows instead of 512.
const NEAR_TIE: f32 = 0.8;

fn requests() -> Vec<GenerateRequest> {
    let topics = ["the sea", "a clock", "winter", "bread", "a small robot", "two rivers", "paper", "the moon"];
    topics
        .iter()
        .enumerate()
        .map(|(i, topic)| {
            // Prompts from a few to a few hundred tokens, answers from 12 to 40.
            let context = format!("Once there was a story about {topic}. ").repeat(1 + i * i);
            GenerateRequest {
                max_tokens: Some(12 + 4 * i as u32),
                sampling: Sampling { temperature: 0.0, ..Sampling::default() },
                ignore_eos: true,
                raw_logits: true,
                ..GenerateRequest::new("test", Prompt::Text(context))
            }
        })
        .collect()
}

/// Checks that two answers agree up to a near tie of the first's two best logits.
fn assert_same_but_for_ties(alone: &Answer, together: &Answer, what: &str) {
    assert_eq!(alone.tokens.len(), together.tokens.len(), "{what}");
    let Some(step) = (0..alone.tokens.len()).find(|i| alone.tokens[*i] != together.tokens[*i]) else { return };
    let logits = &alone.logits[step];
    let gap = logits[alone.tokens[step] as usize] - logits[together.tokens[step] as usize];
    assert!(gap < NEAR_TIE, "{what}: step {step} differs, though the logits are {gap} apart");
}

#[tokio::test]
async fn eight_at_once_are_each_as_alone() {
    let path = models::smollm2();
    let cuts = [8, 20];
    let options = |decode_batch| Options { ctx: 1024, slots: 8, decode_batch, ..Options::default() };
    let mut pipeline = Pipeline::start(&path, &cuts, &options(1)).await;
    let mut alone = Vec::new();
    for request in requests() {
        alone.push(pipeline.answer(request).await);
    }
    let together = pipeline.answer_all(requests()).await;
    for (i, (alone, together)) in alone.iter().zip(&together).enumerate() {
        assert_same_bits(alone, together, &format!("conversation {i}, one sequence a micro-batch"));
    }
    drop(pipeline);
    let batched = Pipeline::start(&path, &cuts, &options(8)).await.answer_all(requests()).await;
    for (i, (alone, batched)) in alone.iter().zip(&batched).enumerate() {
        assert_same_but_for_ties(alone, batched, &format!("conversation {i}, batched"));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn eight_chats_over_three_nodes_all_finish_and_free_their_slots() {
    let cluster = Cluster::start(&["alpha", "beta", "gamma"]).await;
    cluster.load(&models::smollm2(), "smol", &["--ctx", "1024", "--slots", "4"]).await;
    let chats = (0..8).map(|i| {
        let node = &cluster.nodes[i % 3];
        let text = "Tell me something about lighthouses. ".repeat(1 + 3 * i);
        let max_tokens = 8 + 5 * i as u32;
        async move { (max_tokens, node.post("/v1/chat/completions", &chat("smol", &text, max_tokens)).await) }
    });
    for (max_tokens, (status, answer)) in futures::future::join_all(chats).await {
        assert_eq!(status, 200, "{answer}");
        let usage = &answer["usage"];
        let tokens = usage["completion_tokens"].as_u64().expect("usage");
        let stopped = answer["choices"][0]["finish_reason"] == "stop";
        assert!(tokens == u64::from(max_tokens) || stopped, "{answer}");
    }
    wait_for("all slots are free", || async {
        let driver = cluster.nodes[2].deployment("smol").await?.stages.pop()?;
        (driver.stats.slots_used == 0 && driver.stats.queued == 0).then_some(())
    })
    .await;
}
