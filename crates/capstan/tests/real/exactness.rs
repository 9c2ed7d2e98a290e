//! Split equals whole, bit for bit, through real compute processes on real links.
use crate::pipeline::{Options, Pipeline, assert_same_bits, difference};
use capstan_gguf::Model;
use capstan_proto::generate::{GenerateRequest, Prompt, Sampling};
use capstan_testkit::{models, tiny};

/// A request for the likeliest tokens, so many, with their logits.
pub fn greedy(prompt: Prompt, max_tokens: u32) -> GenerateRequest {
    GenerateRequest {
        max_tokens: Some(max_tokens),
        sampling: Sampling { temperature: 0.0, ..Sampling::default() },
        ignore_eos: true,
        raw_logits: true,
        ..GenerateRequest::new("test", prompt)
    }
}

/// A conversation of one question.
pub fn chat(text: &str) -> Prompt {
    let messages = serde_json::json!([{ "role": "user", "content": text }]).to_string();
    Prompt::Chat { messages, tools: None, template_kwargs: None }
}

/// Cuts a model of `n` layers into `stages` windows as even as can be.
pub fn even_cuts(n: u32, stages: u32) -> Vec<u32> {
    (1..stages).map(|i| i * n / stages).collect()
}

#[tokio::test]
async fn smollm2_in_2_3_and_5_stages_is_the_whole_model() {
    let path = models::smollm2();
    let n_layers = Model::open(&path).unwrap().n_layers();
    let options = Options { ctx: 1024, ..Options::default() };
    let question = || greedy(chat("Tell me a short story about a lighthouse keeper and a lost whale."), 64);
    // Longer than a chunk, so that several micro-batches of one prompt are in flight.
    let long = || greedy(Prompt::Text("The tide comes in and the tide goes out. ".repeat(70)), 4);

    let mut whole = Pipeline::start(&path, &[], &options).await;
    let (story, tide) = (whole.answer(question()).await, whole.answer(long()).await);
    assert_eq!(story.tokens.len(), 64);
    assert!(tide.usage.prompt_tokens > 512, "{}", tide.usage.prompt_tokens);
    drop(whole);
    for stages in [2, 3, 5] {
        let mut split = Pipeline::start(&path, &even_cuts(n_layers, stages), &options).await;
        assert_same_bits(&story, &split.answer(question()).await, &format!("{stages} stages"));
        assert_same_bits(&tide, &split.answer(long()).await, &format!("{stages} stages, long prompt"));
    }
}

/// Cuts of every partition that is compared: each single one that the table allows, and the finest partition.
fn partitions(model: &Model) -> Vec<Vec<u32>> {
    let finest: Vec<u32> = model.finest_partition().iter().skip(1).map(|range| range.start()).collect();
    let mut all: Vec<Vec<u32>> = model.single_cuts().into_iter().map(|cut| vec![cut]).collect();
    if !all.contains(&finest) {
        all.push(finest);
    }
    all
}

#[tokio::test(flavor = "multi_thread")]
async fn every_architecture_of_the_table_splits_exactly() {
    let folder = tempfile::tempdir().unwrap();
    let mut split_architectures = std::collections::BTreeSet::new();
    let (mut compared, mut wrong) = (0, Vec::new());
    for name in tiny::names() {
        let path = folder.path().join(format!("{name}.gguf"));
        tiny::write(name, &path).unwrap();
        let model = Model::open(&path).unwrap();
        if model.split_problem().is_some() {
            continue;
        }
        let prompt: Vec<i32> = (0..21).map(|i| 4 + (i * 37 + 11) % 120).collect();
        let request = || greedy(Prompt::Tokens(prompt.clone()), 24);
        let options = Options { ctx: 256, ..Options::default() };
        let whole = Pipeline::start(&path, &[], &options).await.answer(request()).await;
        for cuts in partitions(&model) {
            let split = Pipeline::start(&path, &cuts, &options).await.answer(request()).await;
            wrong.extend(difference(&whole, &split).map(|d| format!("{name} cut at {cuts:?}: {d}")));
            split_architectures.insert(model.architecture().to_owned());
            compared += 1;
        }
        std::fs::remove_file(&path).unwrap();
    }
    assert!(wrong.is_empty(), "of {compared} partitions these differ:\n{}", wrong.join("\n"));
    println!("{compared} partitions of {} architectures: logit difference 0.0", split_architectures.len());
    for name in tiny::PROMISED {
        assert!(split_architectures.contains(name), "{name} was not split");
    }
}
