//! A prompt takes over what an earlier one left in the caches, and its answer is the one it would have got anyway.
use crate::exactness::greedy;
use crate::pipeline::{Answer, Options, Pipeline, assert_same_bits};
use capstan_proto::generate::{GenerateEvent, GenerateRequest, Prompt};
use capstan_testkit::models;

const CUTS: [u32; 1] = [15];

fn options(prefix_cache: bool) -> Options {
    // Only whole chunks are taken over where bits must be the same; small ones, so that a prompt has several.
    Options { ctx: 1024, slots: 2, ubatch: 64, prefix_cache, ..Options::default() }
}

/// A question after a long text that all questions share.
fn question(text: &str) -> GenerateRequest {
    let system = "You are a lighthouse keeper who answers briefly. The lamp is lit at dusk. ".repeat(12);
    let messages = serde_json::json!([{ "role": "system", "content": system }, { "role": "user", "content": text }]);
    greedy(Prompt::Chat { messages: messages.to_string(), tools: None, template_kwargs: None }, 24)
}

const QUESTIONS: [&str; 3] = ["Who are you?", "When is the lamp lit?", "What do you see at night?"];

/// Each question's answer by a pipeline that keeps nothing.
async fn alone() -> Vec<Answer> {
    let mut pipeline = Pipeline::start(&models::smollm2(), &CUTS, &options(false)).await;
    let mut answers = Vec::new();
    for text in QUESTIONS {
        let answer = pipeline.answer(question(text)).await;
        assert_eq!(answer.usage.cached_tokens, 0);
        answers.push(answer);
    }
    answers
}

#[tokio::test]
async fn a_shared_beginning_is_computed_once() {
    let alone = alone().await;
    let mut pipeline = Pipeline::start(&models::smollm2(), &CUTS, &options(true)).await;
    for (i, (text, alone)) in QUESTIONS.iter().zip(&alone).enumerate() {
        let answer = pipeline.answer(question(text)).await;
        assert_same_bits(alone, &answer, text);
        let usage = &answer.usage;
        assert_eq!(usage.cached_tokens > 0, i > 0, "{usage:?}");
        assert!(usage.cached_tokens < usage.prompt_tokens && usage.cached_tokens % 64 == 0, "{usage:?}");
    }
}

#[tokio::test]
async fn a_beginning_is_shared_with_an_answer_that_is_still_being_made() {
    let alone = alone().await;
    let mut pipeline = Pipeline::start(&models::smollm2(), &CUTS, &options(true)).await;
    let mut ids = vec![pipeline.submit(question(QUESTIONS[0])).await];
    let mut answers = vec![Answer::default(), Answer::default()];
    while answers.iter().any(|a| a.finish.is_none()) {
        let (id, event) = pipeline.event().await;
        let answer = &mut answers[ids.iter().position(|i| *i == id).expect("a known request")];
        match event {
            GenerateEvent::Started { .. } | GenerateEvent::Paused { .. } => {}
            GenerateEvent::Token { token, logits, .. } => {
                answer.tokens.push(token);
                answer.logits.extend(logits);
                // The first one is in the middle of its answer.
                if ids.len() == 1 {
                    ids.push(pipeline.submit(question(QUESTIONS[1])).await);
                }
            }
            GenerateEvent::Finished { reason, usage, .. } => {
                answer.finish = Some(reason);
                answer.usage = usage;
            }
            GenerateEvent::Failed(error) => panic!("the request failed: {error}"),
        }
    }
    for (i, (alone, answer)) in alone.iter().zip(&answers).enumerate() {
        assert_same_bits(alone, answer, QUESTIONS[i]);
        assert_eq!(answer.usage.cached_tokens > 0, i > 0, "{:?}", answer.usage);
    }
}

#[tokio::test]
async fn a_conversation_goes_on_where_it_was_left() {
    // Not on the grid: all that is left is taken, and rounding may differ.
    let options = Options { decode_batch: 2, ..options(true) };
    let mut pipeline = Pipeline::start(&models::smollm2(), &CUTS, &options).await;
    let mut tokens: Vec<i32> = (0..100).map(|i| 1000 + i * 7).collect();
    for turn in 0..3 {
        let answer = pipeline.answer(greedy(Prompt::Tokens(tokens.clone()), 8)).await;
        // Of the former turn everything but its last token was computed.
        let want = if turn == 0 { 0 } else { tokens.len() as u32 - 1 - 20 };
        assert_eq!(answer.usage.cached_tokens, want, "turn {turn}: {:?}", answer.usage);
        tokens.extend(&answer.tokens);
        tokens.extend((0..20).map(|i| 2000 + turn * 50 + i));
    }
}
