//! The fence on a real model: text, greedy tokens, micro-batches that must be refused, and the engine's contract.
use std::sync::{Arc, LazyLock};

use capstan_engine::contract::{ContractParams, check_stage};
use capstan_engine::{Stage, StageError, StageOutput};
use capstan_llama::{
    Capture, Context, ContextOptions, LlamaError, LlamaStage, Model, ModelOptions, Sampler, StageInput, StageOptions,
};
use capstan_proto::Epoch;
use capstan_proto::data::{KvOp, MicroBatch, Payload, Row};
use capstan_proto::generate::Sampling;
use capstan_testkit::models::smollm2;

static MODEL: LazyLock<Arc<Model>> =
    LazyLock::new(|| Model::load(&smollm2(), ModelOptions::default()).expect("SmolLM2 loads"));

fn small(slots: u32) -> ContextOptions {
    // One thread: two that wait for each other are slow while other tests take the cores.
    ContextOptions { ctx_per_slot: 256, slots, ubatch: 64, threads: Some(1), ..ContextOptions::default() }
}

fn batch(ops: Vec<KvOp>, rows: Vec<(u32, u32, bool)>, payload: Payload) -> MicroBatch {
    let rows = rows.into_iter().map(|(slot, pos, output)| Row { slot, pos, output }).collect();
    MicroBatch { epoch: Epoch(0), step: 0, ops, rows, payload }
}

/// A micro-batch that appends tokens to slot 0 and wants the last row's logits.
fn tokens(from: u32, tokens: &[i32]) -> MicroBatch {
    let last = tokens.len() as u32 - 1;
    let rows = (0..=last).map(|i| (0, from + i, i == last)).collect();
    batch(vec![], rows, Payload::Tokens(tokens.to_vec()))
}

fn logits(output: StageOutput) -> Vec<f32> {
    match output {
        StageOutput::Logits(l) => l,
        StageOutput::Hidden(_) => panic!("hidden states came instead of logits"),
    }
}

#[test]
fn facts_and_devices() {
    assert_eq!((MODEL.n_layer(), MODEL.n_embd(), MODEL.n_embd_inp()), (30, 576, 576));
    assert_eq!((MODEL.n_vocab(), MODEL.positions_per_row()), (49152, 1));
    assert!(!MODEL.is_recurrent() && !MODEL.is_hybrid() && MODEL.size_bytes() > 50 << 20);
    let devices = capstan_llama::devices();
    let cpu = devices.iter().find(|d| d.kind.as_str() == "cpu").expect("there is a processor");
    assert!(cpu.memory_free_bytes > 0 && cpu.memory_free_bytes <= cpu.memory_total_bytes);
}

#[test]
fn text_becomes_tokens_and_text_again() {
    let vocab = MODEL.vocab();
    let text = "Grüße, 世界! 🦀\n  two  spaces\u{0}<|im_end|>";
    let plain = vocab.tokenize(text, false, false).unwrap();
    let back: Vec<u8> = plain.iter().flat_map(|t| vocab.piece(*t, true)).collect();
    assert_eq!(String::from_utf8(back).unwrap(), text);
    let special = vocab.tokenize("<|im_end|>", false, true).unwrap();
    assert_eq!((special.len(), vocab.is_eog(special[0])), (1, true));
    assert!(vocab.piece(special[0], false).is_empty());
    assert_eq!(vocab.piece(special[0], true), b"<|im_end|>");
    assert!(vocab.tokenize("", false, false).unwrap().is_empty());
    assert_eq!((vocab.bos_text().as_str(), vocab.eos_text().as_str()), ("<|im_start|>", "<|im_end|>"));
    for token in [-1, i32::MIN, i32::MAX, vocab.n_tokens() as i32] {
        assert!(vocab.piece(token, true).is_empty() && !vocab.is_eog(token) && !vocab.contains(token));
    }
}

#[test]
fn greedy_tokens_make_sense() {
    let vocab = MODEL.vocab();
    let mut context = Context::new(MODEL.clone(), &small(1)).unwrap();
    assert!(context.memory().kv_bytes > 1 << 20 && context.memory().compute_bytes > 0, "{:?}", context.memory());
    let mut sampler = Sampler::new(&Sampling { temperature: 0.0, ..Sampling::default() }, &vocab).unwrap();
    let mut current = vocab.tokenize("The capital of France is", vocab.add_bos(), true).unwrap();
    let (mut pos, mut text) = (0, Vec::new());
    for _ in 0..8 {
        let out = logits(context.decode(&tokens(pos, &current)).unwrap());
        pos += current.len() as u32;
        current = vec![sampler.sample(&out).unwrap()];
        text.extend(vocab.piece(current[0], false));
    }
    let text = String::from_utf8_lossy(&text).into_owned();
    assert!(text.contains("Paris"), "{text:?}");
}

#[test]
fn micro_batches_that_break_a_rule_are_refused_and_change_nothing() {
    let mut context = Context::new(MODEL.clone(), &small(3)).unwrap();
    context.decode(&tokens(0, &[10, 20, 30])).unwrap();
    let hidden = |n: usize| Payload::Hidden(vec![0.1; n]);
    let one = |ops: Vec<KvOp>| batch(ops, vec![], Payload::Tokens(vec![]));
    let row = |slot, pos| vec![(slot, pos, true)];
    let wrong = [
        ("a token out of range", tokens(3, &[49152])),
        ("a negative token", tokens(3, &[-1])),
        ("a gap", tokens(4, &[1])),
        ("a position again", tokens(2, &[1])),
        ("a slot that is empty", batch(vec![], row(1, 3), Payload::Tokens(vec![1]))),
        ("no such slot", batch(vec![], row(3, 0), Payload::Tokens(vec![1]))),
        ("too many rows", tokens(3, &[1; 65])),
        ("too wide", batch(vec![], row(0, 3), hidden(577))),
        ("a ragged payload", batch(vec![], vec![(0, 3, true), (0, 4, true)], Payload::Tokens(vec![1]))),
        ("too many outputs", batch(vec![], (3..7).map(|p| (0, p, true)).collect(), Payload::Tokens(vec![1; 4]))),
        (
            "different numbers of rows",
            batch(vec![], vec![(0, 3, true), (0, 4, false), (1, 0, true)], Payload::Tokens(vec![1; 3])),
        ),
        ("an operation on no slot", one(vec![KvOp::Clear { slot: 3 }])),
        ("a copy onto itself", one(vec![KvOp::Copy { from: 0, to: 0 }])),
        ("a copy onto a full slot", batch(vec![KvOp::Copy { from: 1, to: 0 }], row(1, 0), Payload::Tokens(vec![1]))),
        ("an operation before a wrong row", batch(vec![KvOp::Clear { slot: 0 }], row(0, 3), Payload::Tokens(vec![1]))),
    ];
    for (what, batch) in wrong {
        let error = context.decode(&batch).expect_err(what);
        assert!(matches!(error, LlamaError::Refused(_)), "{what}: {error}");
        assert_eq!([0, 1, 2].map(|s| context.next_pos(s)), [Some(3), Some(0), Some(0)], "{what}");
    }
    // The context is full at 256.
    for start in (3..256).step_by(60) {
        let n = (256 - start).min(60);
        context.decode(&tokens(start, &vec![7; n as usize])).unwrap();
    }
    assert!(matches!(context.decode(&tokens(256, &[1])), Err(LlamaError::Refused(_))));
}

#[test]
fn sequences_are_copied_trimmed_and_cleared() {
    let mut context = Context::new(MODEL.clone(), &small(3)).unwrap();
    let mut run = |ops, slot, pos, token| {
        logits(context.decode(&batch(ops, vec![(slot, pos, true)], Payload::Tokens(vec![token]))).unwrap())
    };
    let first = run(vec![], 0, 0, 100);
    let second = run(vec![], 0, 1, 200);
    assert_eq!(run(vec![KvOp::Copy { from: 0, to: 2 }, KvOp::Trim { slot: 2, from: 1 }], 2, 1, 200), second);
    assert_eq!(run(vec![KvOp::Trim { slot: 0, from: 1 }], 0, 1, 200), second);
    assert_eq!(run(vec![KvOp::Clear { slot: 0 }], 0, 0, 100), first);
    assert_eq!(run(vec![KvOp::Trim { slot: 2, from: 0 }], 2, 0, 100), first);
    context.clear();
    assert_eq!(logits(context.decode(&tokens(0, &[100])).unwrap()), first);
}

#[test]
fn context_options_are_checked() {
    for options in [
        ContextOptions { slots: 0, ..small(1) },
        ContextOptions { slots: 257, ..small(1) },
        ContextOptions { spares: 256, ..small(1) },
        ContextOptions { ubatch: 0, ..small(1) },
        ContextOptions { ctx_per_slot: 0, ..small(1) },
        ContextOptions { ctx_per_slot: u32::MAX, ..small(1) },
        ContextOptions { ctx_per_slot: 1 << 30, slots: 4, ..small(1) },
        ContextOptions { capture: Some(Capture { node: String::new(), width: 576 }), ..small(1) },
        ContextOptions { capture: Some(Capture { node: "x".repeat(64), width: 576 }), ..small(1) },
    ] {
        assert!(Context::new(MODEL.clone(), &options).is_err(), "{options:?}");
    }
}

fn stage(input: StageInput, node: &str, width: usize) -> Result<LlamaStage, LlamaError> {
    let capture = Some(Capture { node: node.into(), width });
    let context = ContextOptions { capture, ..small(4) };
    LlamaStage::new(StageOptions { input, ..StageOptions::whole(smollm2(), context) })
}

#[test]
fn the_check_at_the_start_refuses_what_the_table_gets_wrong() {
    assert!(stage(StageInput::Tokens, "l_out-29", 576).is_ok());
    for (input, node, width, says) in [
        (StageInput::Tokens, "l_out-30", 576, "no node l_out-30"),
        (StageInput::Tokens, "l_out-29", 577, "576 floats, not 577"),
        (StageInput::Tokens, "l_out-29", 288, "576 floats, not 288"),
        (StageInput::Hidden { width: 577 }, "l_out-29", 576, "577"),
    ] {
        let error = stage(input, node, width).err().expect(says).to_string();
        assert!(error.contains(says), "{error}");
    }
    let layers = StageOptions { layers: Some(29), ..StageOptions::whole(smollm2(), small(1)) };
    assert!(matches!(LlamaStage::new(layers), Err(LlamaError::SelfCheck(_))));
}

#[test]
fn stages_keep_the_engines_contract() {
    let params = ContractParams {
        n_vocab: 49152,
        width: 576,
        takes_tokens: true,
        gives_logits: true,
        slots: 4,
        copy: true,
        trim: true,
        // Rounding depends on how many rows go through a kernel at once.
        batch_tolerance: 0.05,
    };
    // The suite flags every row of a micro-batch of 8.
    let whole = || LlamaStage::new(StageOptions::whole(smollm2(), ContextOptions { outputs_max: Some(8), ..small(4) }));
    check_stage(|| Box::new(whole().unwrap()), &params);
    let middle = || stage(StageInput::Hidden { width: 576 }, "l_out-29", 576);
    let params = ContractParams { takes_tokens: false, gives_logits: false, ..params };
    check_stage(|| Box::new(middle().unwrap()), &params);
}

#[test]
fn a_failed_epoch_is_over_until_reset() {
    let mut stage = LlamaStage::new(StageOptions::whole(smollm2(), small(1))).unwrap();
    stage.reset(Epoch(4)).unwrap();
    let of_epoch = |epoch, step| MicroBatch { epoch: Epoch(epoch), step, ..tokens(step as u32, &[5]) };
    assert!(matches!(stage.forward(&of_epoch(3, 0)), Err(StageError::WrongEpoch { .. })));
    let first = stage.forward(&of_epoch(4, 0)).unwrap();
    assert!(matches!(stage.forward(&of_epoch(4, 0)), Err(StageError::OutOfOrder { .. })));
    stage.forward(&of_epoch(4, 1)).unwrap();
    stage.reset(Epoch(5)).unwrap();
    assert_eq!(stage.forward(&of_epoch(5, 0)).unwrap(), first);
    assert!(stage.info().kv_bytes > 0 && !stage.info().device.is_empty());
}

#[test]
fn files_that_are_no_models_give_a_sentence() {
    let dir = tempfile::tempdir().unwrap();
    let whole = std::fs::read(smollm2()).unwrap();
    let cases: [(&str, &[u8]); 5] = [
        ("empty", b""),
        ("text", b"this is not a model"),
        ("header", &whole[..64]),
        ("metadata", &whole[..100_000]),
        ("tensors", &whole[..whole.len() / 2]),
    ];
    for (name, bytes) in cases {
        let path = dir.path().join(format!("{name}.gguf"));
        std::fs::write(&path, bytes).unwrap();
        let error = Model::load(&path, ModelOptions::default()).err().expect(name);
        assert!(matches!(&error, LlamaError::Load { reason, .. } if !reason.is_empty()), "{name}: {error}");
    }
    assert!(Model::load(&dir.path().join("absent.gguf"), ModelOptions::default()).is_err());
}

#[test]
fn a_load_reports_progress_and_can_be_cancelled() {
    let (send, receive) = std::sync::mpsc::sync_channel(4096);
    let report = move |share: f32| send.try_send(share).is_ok();
    Model::load(&smollm2(), ModelOptions { progress: Some(Box::new(report)), ..ModelOptions::default() }).unwrap();
    let shares: Vec<f32> = receive.iter().collect();
    assert_eq!(shares.last(), Some(&1.0));
    assert!(shares.is_sorted());
    let stop = ModelOptions { progress: Some(Box::new(|_| false)), ..ModelOptions::default() };
    assert!(matches!(Model::load(&smollm2(), stop), Err(LlamaError::Cancelled(_))));
    let panics = ModelOptions { progress: Some(Box::new(|_| panic!("from the callback"))), ..ModelOptions::default() };
    assert!(matches!(Model::load(&smollm2(), panics), Err(LlamaError::Cancelled(_))));
}
