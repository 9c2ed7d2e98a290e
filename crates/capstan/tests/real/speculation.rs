//! Guesses change nothing but the time: a lone stream has the same tokens and the same logits, bit for bit, with and
//! without them.
use crate::exactness::{chat, even_cuts, greedy};
use crate::pipeline::{Answer, Options, Pipeline, assert_same_bits};
use capstan_gguf::Model;
use capstan_proto::generate::{GenerateRequest, Prompt, Sampling};
use capstan_testkit::{models, tiny};

fn options() -> Options {
    Options { ctx: 1024, slots: 1, ..Options::default() }
}

/// A text that repeats itself, so that many guesses are right.
fn repeating() -> GenerateRequest {
    let function = "fn area(width: u32, height: u32) -> u32 {\n    let total = width * height;\n    total\n}\n\n";
    greedy(Prompt::Text(function.repeat(3)), 60)
}

/// A text that cannot be guessed from itself.
fn fresh() -> GenerateRequest {
    greedy(chat("Write a short poem about a lighthouse, a whale and a clock that runs backwards."), 60)
}

fn sampled(mut request: GenerateRequest) -> GenerateRequest {
    request.sampling = Sampling { temperature: 0.8, seed: Some(42), ..Sampling::default() };
    request
}

fn requests() -> [(&'static str, GenerateRequest); 4] {
    [
        ("repeating", repeating()),
        ("fresh", fresh()),
        ("repeating, sampled", sampled(repeating())),
        ("fresh, sampled", sampled(fresh())),
    ]
}

async fn answers(pipeline: &mut Pipeline) -> Vec<Answer> {
    let mut all = Vec::new();
    for (_, request) in requests() {
        all.push(pipeline.answer(request).await);
    }
    all
}

#[tokio::test]
async fn a_lone_stream_is_the_same_with_and_without_guesses() {
    let path = models::smollm2();
    let n = Model::open(&path).unwrap().n_layers();
    for stages in [2, 3] {
        let cuts = even_cuts(n, stages);
        let without = answers(&mut Pipeline::start(&path, &cuts, &options().without_guesses()).await).await;
        assert!(without.iter().all(|a| a.usage.drafted_tokens == 0));
        let mut pipeline = Pipeline::start(&path, &cuts, &options()).await;
        let with = answers(&mut pipeline).await;
        for ((name, _), (without, with)) in requests().iter().zip(without.iter().zip(&with)) {
            assert_same_bits(without, with, &format!("{name}, {stages} stages"));
            let usage = &with.usage;
            println!("{name}, {stages} stages: {} of {} guesses", usage.accepted_tokens, usage.drafted_tokens);
        }
        let usage = &with[0].usage;
        assert!(usage.accepted_tokens > 20 && usage.accepted_tokens <= usage.drafted_tokens, "{usage:?}");
        let total: u32 = with.iter().map(|a| a.usage.drafted_tokens).sum();
        loop {
            let stats = pipeline.stats().await;
            if stats.guessed == u64::from(total) {
                assert!(stats.accepted > 20 && stats.bytes_sent > 0, "{stats:?}");
                break;
            }
        }
    }
}

/// What cannot be trimmed is copied before each guess.
#[tokio::test]
async fn recurrent_and_hybrid_models_guess_too() {
    let folder = tempfile::tempdir().unwrap();
    for name in ["mamba2", "jamba", "qwen35moe", "kimi-linear", "lfm2", "falcon-h1"] {
        let path = folder.path().join(format!("{name}.gguf"));
        tiny::write(name, &path).unwrap();
        let cut = Model::open(&path).unwrap().single_cuts()[0];
        // Random models say what nobody can guess, unless only a few tokens are left to them.
        let prompt: Vec<i32> = (0..40).map(|i| 10 + i % 3).collect();
        let request = || {
            let mut request = greedy(Prompt::Tokens(prompt.clone()), 60);
            request.sampling.logit_bias = (10..13).map(|token| (token, 100.0)).collect();
            request
        };
        // Both ways of keeping snapshots: caches of their own, and one for all.
        for decode_batch in [1, 2] {
            let options = Options { ctx: 256, ubatch: 64, decode_batch, ..Options::default() };
            let without = Pipeline::start(&path, &[cut], &options.without_guesses()).await.answer(request()).await;
            let with = Pipeline::start(&path, &[cut], &options).await.answer(request()).await;
            let usage = &with.usage;
            println!("{name}: {} of {} guesses", usage.accepted_tokens, usage.drafted_tokens);
            assert!(0 < usage.accepted_tokens && usage.accepted_tokens < usage.drafted_tokens, "{name}: {usage:?}");
            if decode_batch == 1 {
                assert_same_bits(&without, &with, name);
            } else {
                // Prompts are cut as the stages' times suggest, so not in the same shapes.
                assert_eq!(without.tokens.len(), with.tokens.len(), "{name}");
            }
        }
    }
}

#[tokio::test]
async fn a_draft_model_guesses_and_changes_nothing() {
    let path = models::smollm2();
    let cuts = even_cuts(Model::open(&path).unwrap().n_layers(), 2);
    let without = answers(&mut Pipeline::start(&path, &cuts, &options().without_guesses()).await).await;
    let drafting = Options { draft: Some(path.clone()), ..options() };
    let with = answers(&mut Pipeline::start(&path, &cuts, &drafting).await).await;
    let usages = requests().into_iter().zip(with.iter().map(|a| a.usage));
    for ((name, _), usage) in usages {
        println!("{name}: {} of {} guesses of a draft model", usage.accepted_tokens, usage.drafted_tokens);
    }
    for ((name, _), (without, with)) in requests().iter().zip(without.iter().zip(&with)) {
        assert_same_bits(without, with, &format!("{name}, with a draft model"));
    }
    // It is the same model, so it knows; n-grams guess too, and what stands behind a wrong guess is wrong.
    let of_fresh_text = with[1].usage;
    let share = f64::from(of_fresh_text.accepted_tokens) / f64::from(of_fresh_text.drafted_tokens);
    assert!(of_fresh_text.accepted_tokens > 40 && share > 0.6, "{of_fresh_text:?}");
}

#[tokio::test]
async fn a_draft_model_with_another_vocabulary_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = models::smollm2();
    let refused = async |draft: &str| {
        let draft_path = folder.path().join(format!("{draft}.gguf"));
        tiny::write(draft, &draft_path).unwrap();
        let options = Options { draft: Some(draft_path), ..options() };
        Pipeline::try_start(&path, &[15], &options).await.err().expect("it is refused")
    };
    let reason = refused("llama").await;
    assert!(reason.contains("another vocabulary") && reason.contains("tokens instead of 49152"), "{reason}");
    // Of two tiny models the vocabularies are the same; but a state cannot follow a text that turns out otherwise.
    let target = folder.path().join("target.gguf");
    tiny::write("llama", &target).unwrap();
    let draft = folder.path().join("mamba.gguf");
    tiny::write("mamba", &draft).unwrap();
    let small = |draft| Options { ctx: 256, draft: Some(draft), ..options() };
    let reason = Pipeline::try_start(&target, &[4], &small(draft)).await.err().expect("it is refused");
    assert!(reason.contains("recurrent"), "{reason}");
    let missing = folder.path().join("nowhere.gguf");
    let reason = Pipeline::try_start(&target, &[4], &small(missing)).await.err().expect("it is refused");
    assert!(reason.contains("draft model"), "{reason}");
}
