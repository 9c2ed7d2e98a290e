//! Rows computed in vain leave no trace: the proof of `Model::rollback`, for every tiny model, whole and in two stages.
//!
//! A sequence that guesses and takes the wrong guesses back has, bit for bit, the logits of one that never guessed; so
//! has a sequence beside it. A sequence that goes on from a copied or trimmed one, or from a snapshot, has those of one that
//! was computed. What
//! the table says is proved, and where it says that nothing works the obvious ways are seen to fail.
use capstan_engine::contract::{ContractParams, check_stage};
use capstan_gguf::Model;
use capstan_llama::{ContextOptions, LlamaStage, StageOptions};
use capstan_proto::LayerRange;
use capstan_proto::data::{KvOp, Rollback};
use capstan_testkit::{models, tiny};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use subject::{Piece, Pipeline, Subject, for_every_tiny_model, partition_at};

mod subject;

const PROMPT: usize = 13;
const SLOTS: u32 = 3;
/// The deepest guesses that are proved.
const DEPTH: u32 = 3;
/// Random models of these read memory that nobody wrote, so that they are neither right nor wrong for sure.
const UNPREDICTABLE: [&str; 2] = ["rwkv7", "arwkv7"];

/// Guesses after one token: first so many right ones, then so many wrong ones.
#[derive(Clone, Copy, Default)]
struct Guesses {
    right: usize,
    wrong: usize,
}

/// What is told: the same tokens for each story, with these guesses after each of them.
struct Story {
    prompt: Vec<i32>,
    text: Vec<i32>,
    other: Vec<i32>,
    guesses: Vec<Guesses>,
}

impl Story {
    fn new(n_vocab: usize, guesses: &[(usize, usize)]) -> Self {
        let mut rng = StdRng::seed_from_u64(11);
        let mut tokens = |n: usize| (0..n).map(|_| rng.random_range(4..n_vocab as i32)).collect::<Vec<i32>>();
        let (prompt, text, other) = (tokens(PROMPT), tokens(10), tokens(PROMPT + 12));
        let guesses = guesses.iter().map(|&(right, wrong)| Guesses { right, wrong }).collect();
        Self { prompt, text, other, guesses }
    }
}

/// Every mix of right and wrong guesses up to [`DEPTH`], the wrong ones several times in a row.
const GUESSES: [&[(usize, usize)]; 4] = [
    &[(0, 1), (0, 2), (0, 3), (0, 1)],
    &[(0, 0), (1, 1), (0, 0), (0, 0), (2, 1), (0, 0), (0, 3)],
    &[(1, 2), (0, 3), (0, 3), (0, 1), (1, 0), (0, 2)],
    &[(3, 0), (0, 0), (0, 0), (0, 1), (0, 1), (0, 1), (0, 1)],
];

fn one(slot: u32, pos: usize, tokens: &[i32]) -> [Piece<'_>; 1] {
    [Piece { slot, pos, tokens }]
}

/// The logits after each token of the story, and those of the sequence beside it.
type Told = (Vec<Vec<f32>>, Vec<Vec<f32>>);

/// Tells a story as an engine would: a guess is sent before it is known to be right, and what undoes wrong ones travels
/// with the next row.
fn tell(pipeline: &mut Pipeline, story: &Story, way: Rollback, beside: bool) -> Result<Told, String> {
    pipeline.reset()?;
    let mut told = vec![pipeline.send(vec![], &one(0, 0, &story.prompt))?];
    let mut other = Vec::new();
    if beside {
        other.push(pipeline.send(vec![], &one(1, 0, &story.other[..PROMPT]))?);
    }
    let mut undo = Vec::new();
    let mut spares: Vec<u32> = (SLOTS..SLOTS + DEPTH).rev().collect();
    let (mut sent, mut turn) = (0, 0);
    while sent < story.text.len() {
        told.push(pipeline.send(std::mem::take(&mut undo), &one(0, PROMPT + sent, &story.text[sent..=sent]))?);
        sent += 1;
        let Guesses { right, wrong } = story.guesses.get(turn).copied().unwrap_or_default();
        let right = right.min(story.text.len() - sent);
        turn += 1;
        let mut used = Vec::new();
        let mut void_from = usize::MAX;
        for i in 0..right + wrong {
            let real = story.text.get(sent + i).copied().unwrap_or(5);
            let token = if i < right { real } else { 4 + (real + 7 * i as i32) % 60 };
            let mut ops = Vec::new();
            if way == Rollback::Copy {
                let spare = spares.pop().ok_or("no spare is left")?;
                ops = vec![KvOp::Copy { from: 0, to: spare }];
                used.push(spare);
            }
            // A wrong one may be dropped wherever it is; those behind it are then dropped there at the latest.
            if i >= right {
                void_from = void_from.min([0, 1, usize::MAX, usize::MAX][(i + turn) % 4]);
            }
            let got = pipeline.send_void(ops, &one(0, PROMPT + sent + i, &[token]), void_from)?;
            if i < right {
                told.push(got);
            }
        }
        if wrong > 0 {
            undo = match way {
                Rollback::Trim => vec![KvOp::Trim { slot: 0, from: (PROMPT + sent + right) as u32 }],
                Rollback::Copy => vec![KvOp::Clear { slot: 0 }, KvOp::Copy { from: used[right], to: 0 }],
                Rollback::None => Vec::new(),
            };
        }
        // A snapshot that is not needed any more must go: it would keep what it shares with others in the cache.
        undo.extend(used.iter().map(|&slot| KvOp::Clear { slot }));
        spares.extend(used);
        sent += right;
        if beside {
            let pos = PROMPT + other.len() - 1;
            other.push(pipeline.send(vec![], &one(1, pos, &story.other[pos..=pos]))?);
        }
    }
    Ok((told, other))
}

/// Compares as many rows as both have: who guesses right has fewer turns, and the sequence beside it fewer rows.
fn same(want: &[Vec<f32>], got: &[Vec<f32>], what: &str) -> Result<(), String> {
    for (i, (a, b)) in want.iter().zip(got).enumerate() {
        if a.is_empty() || a.len() != b.len() {
            return Err(format!("{what}: row {i} has {} logits instead of {}", b.len(), a.len()));
        }
        if a.iter().zip(b).any(|(a, b)| a.to_bits() != b.to_bits()) {
            let most = a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            return Err(format!("{what}: row {i} differs by {most}"));
        }
    }
    Ok(())
}

/// Guesses that were taken back leave no trace.
fn prove_guesses(pipeline: &mut Pipeline, way: Rollback, beside: bool) -> Result<(), String> {
    let plain = Story::new(pipeline.n_vocab(), &[]);
    let want = tell(pipeline, &plain, way, beside)?;
    same(&want.0, &tell(pipeline, &plain, way, beside)?.0, "the same once more")?;
    for guesses in GUESSES {
        let got = tell(pipeline, &Story::new(pipeline.n_vocab(), guesses), way, beside)?;
        if got.0.len() != want.0.len() {
            return Err(format!("{} rows came instead of {}", got.0.len(), want.0.len()));
        }
        same(&want.0, &got.0, &format!("{way:?} after {guesses:?}"))?;
        same(&want.1, &got.1, &format!("{way:?} beside {guesses:?}"))?;
    }
    Ok(())
}

/// The logits of these tokens one by one, from `pos` on.
fn go_on(
    pipeline: &mut Pipeline,
    ops: Vec<KvOp>,
    slot: u32,
    pos: usize,
    text: &[i32],
) -> Result<Vec<Vec<f32>>, String> {
    let mut ops = Some(ops);
    let each = text
        .iter()
        .enumerate()
        .map(|(i, t)| pipeline.send(ops.take().unwrap_or_default(), &one(slot, pos + i, std::slice::from_ref(t))));
    each.collect()
}

/// A sequence that takes over what another left, whole or in part, is as if it had been computed.
fn prove_prefixes(pipeline: &mut Pipeline, way: Rollback) -> Result<(), String> {
    let story = Story::new(pipeline.n_vocab(), &[]);
    let (prompt, text, next) = (&story.prompt, &story.text[..6], &story.other[..5]);
    let end = PROMPT + text.len();
    let begin = |pipeline: &mut Pipeline, text: &[i32]| -> Result<(), String> {
        pipeline.reset()?;
        pipeline.send(vec![], &one(0, 0, prompt))?;
        go_on(pipeline, vec![], 0, PROMPT, text).map(|_| ())
    };
    // So many tokens of the answer are kept with the prompt. Less than the prompt would not be like for like: its rows
    // were computed at once, and rounding depends on how many there are.
    let kept: &[usize] = if way == Rollback::Trim { &[0, 2, 6] } else { &[6] };
    for &kept in kept {
        let from = PROMPT + kept;
        begin(pipeline, &text[..kept])?;
        let want = go_on(pipeline, vec![], 0, from, next)?;
        let trim = |slot| (from < end).then_some(KvOp::Trim { slot, from: from as u32 });
        // In place.
        begin(pipeline, text)?;
        let got = go_on(pipeline, trim(0).into_iter().collect(), 0, from, next)?;
        same(&want, &got, &format!("going on after {from} of {end} tokens"))?;
        // In a copy, while the first one goes on too.
        begin(pipeline, text)?;
        let own = go_on(pipeline, vec![], 0, end, next)?;
        begin(pipeline, text)?;
        let copy = [KvOp::Copy { from: 0, to: 2 }].into_iter().chain(trim(2)).collect();
        let got = go_on(pipeline, copy, 2, from, next)?;
        same(&want, &got, &format!("going on in a copy after {from} of {end} tokens"))?;
        same(&own, &go_on(pipeline, vec![], 0, end, next)?, "going on beside a copy")?;
        // In a copy of the copy, after the first one is gone.
        begin(pipeline, text)?;
        let clear = [KvOp::Copy { from: 0, to: 2 }, KvOp::Clear { slot: 0 }, KvOp::Copy { from: 2, to: 0 }];
        let got = go_on(pipeline, clear.into_iter().chain(trim(0)).collect(), 0, from, next)?;
        same(&want, &got, "going on after a copy there and back")?;
    }
    Ok(())
}

/// A sequence that goes on from a snapshot, whole, trimmed or copied, is as if it had never been away.
fn prove_snapshots(pipeline: &mut Pipeline, way: Rollback) -> Result<(), String> {
    let folder = tempfile::tempdir().map_err(|e| e.to_string())?;
    let story = Story::new(pipeline.n_vocab(), &[]);
    let (prompt, text, next) = (&story.prompt, &story.text[..6], &story.other[..5]);
    let end = PROMPT + text.len();
    let begin = |pipeline: &mut Pipeline, text: &[i32]| -> Result<(), String> {
        pipeline.reset()?;
        pipeline.send(vec![], &one(1, 0, &story.other[..PROMPT]))?;
        pipeline.send(vec![], &one(0, 0, prompt))?;
        go_on(pipeline, vec![], 0, PROMPT, text).map(|_| ())
    };
    let file = |i: usize| folder.path().join(i.to_string());
    let restore = |pipeline: &mut Pipeline, slot: u32| -> Result<(), String> {
        pipeline.reset()?;
        let mut stages = pipeline.stages.iter_mut().enumerate();
        stages.try_for_each(|(i, s)| s.context_mut().restore(slot, &file(i), end as u32).map_err(|e| e.to_string()))
    };
    begin(pipeline, text)?;
    for (i, stage) in pipeline.stages.iter_mut().enumerate() {
        let (saved, told) = (stage.context_mut().save(0, &file(i)), stage.context_mut().snapshot_bytes(0));
        let (saved, told) = (saved.map_err(|e| e.to_string())?, told.map_err(|e| e.to_string())?);
        if saved.abs_diff(told) > 64 {
            return Err(format!("a snapshot takes {saved} bytes, and {told} were told"));
        }
    }
    let want = go_on(pipeline, vec![], 0, end, next)?;
    for slot in [0, 2] {
        restore(pipeline, slot)?;
        same(&want, &go_on(pipeline, vec![], slot, end, next)?, &format!("going on from a snapshot in slot {slot}"))?;
    }
    restore(pipeline, 0)?;
    let copy = vec![KvOp::Copy { from: 0, to: 2 }];
    same(&want, &go_on(pipeline, copy, 2, end, next)?, "going on from a copy of a snapshot")?;
    for kept in if way == Rollback::Trim { &[0, 2][..] } else { &[] } {
        let from = PROMPT + kept;
        begin(pipeline, &text[..*kept])?;
        let want = go_on(pipeline, vec![], 0, from, next)?;
        restore(pipeline, 0)?;
        let trim = vec![KvOp::Trim { slot: 0, from: from as u32 }];
        same(&want, &go_on(pipeline, trim, 0, from, next)?, &format!("going on after {from} tokens of a snapshot"))?;
    }
    Ok(())
}

fn context(way: Rollback, kv_unified: bool) -> ContextOptions {
    ContextOptions {
        ctx_per_slot: 256,
        slots: SLOTS,
        spares: if way == Rollback::Copy { DEPTH } else { 0 },
        ubatch: 32,
        threads: Some(1),
        kv_unified,
        ..ContextOptions::default()
    }
}

/// Whether this way of taking rows back is right for the model, whole and in two stages.
fn prove(subject: &mut Subject, way: Rollback) -> Result<usize, String> {
    let (n, subject_keeps) = (subject.model.n_layers(), subject.model.keeps_snapshots());
    let cuts = subject.model.single_cuts();
    let split = cuts.get(cuts.len() / 2).map(|cut| partition_at(&[*cut], n));
    let partitions: Vec<Vec<LayerRange>> = [partition_at(&[], n)].into_iter().chain(split).collect();
    for partition in &partitions {
        let mut pipeline = subject.pipeline(partition, &context(way, false))?;
        prove_guesses(&mut pipeline, way, true)?;
        prove_prefixes(&mut pipeline, way)?;
        let windows = !pipeline.stages.iter().all(|stage| stage.model().keeps_snapshots());
        let keeps = !windows && subject_keeps;
        if keeps {
            prove_snapshots(&mut pipeline, way)?;
        } else if !windows && prove_snapshots(&mut pipeline, way).is_ok() {
            return Err("its snapshots are exact, and the table says that they are not".into());
        }
        // One cache for all is only chosen where copies of a cache would be the price of a guess. There a stream is the
        // same as long as nothing else comes and goes.
        if way == Rollback::Copy {
            let mut pipeline = subject.pipeline(partition, &context(way, true))?;
            prove_guesses(&mut pipeline, way, false)?;
            prove_prefixes(&mut pipeline, way)?;
            if keeps {
                prove_snapshots(&mut pipeline, way)?;
            }
        }
    }
    Ok(partitions.len())
}

#[test]
fn every_tiny_model_takes_rows_back_as_the_table_says() {
    for_every_tiny_model(|name, subject| {
        let says = subject.model.rollback();
        match says {
            Rollback::Trim | Rollback::Copy => {
                let partitions = prove(subject, says)?;
                if says == Rollback::Copy && prove(subject, Rollback::Trim).is_ok() {
                    return Err("a trim would do, and costs nothing".into());
                }
                Ok(format!("{says:?} is exact in {partitions} partitions"))
            }
            Rollback::None if UNPREDICTABLE.contains(&name) => Ok("not even the same twice".into()),
            Rollback::None => {
                for way in [Rollback::Trim, Rollback::Copy] {
                    if prove(subject, way).is_ok() {
                        return Err(format!("{way:?} is exact, and the table says that nothing is"));
                    }
                }
                Ok("nothing is exact".into())
            }
        }
    });
}

#[test]
fn smollm2_takes_rows_back_by_trims() {
    let folder = tempfile::tempdir().unwrap();
    let mut subject = Subject::open(&models::smollm2(), folder.path()).unwrap();
    assert_eq!(subject.model.rollback(), Rollback::Trim);
    assert_eq!(prove(&mut subject, Rollback::Trim), Ok(2));
}

#[test]
fn each_kind_of_memory_keeps_the_engines_contract() {
    let folder = tempfile::tempdir().unwrap();
    // Plain, latent, sliding windows, recurrent, and several kinds of hybrid.
    for name in ["llama", "deepseek2", "gemma3", "mamba", "jamba", "qwen35moe", "kimi-linear", "lfm2"] {
        let path = folder.path().join(format!("{name}.gguf"));
        tiny::write(name, &path).unwrap();
        let model = Model::open(&path).unwrap();
        let params = ContractParams {
            n_vocab: model.n_vocab() as usize,
            width: model.n_embd() as usize,
            takes_tokens: true,
            gives_logits: true,
            slots: SLOTS,
            copy: true,
            trim: model.rollback() == Rollback::Trim,
            batch_tolerance: 0.05,
        };
        // The suite flags every row of a micro-batch of 8.
        let options = || ContextOptions { outputs_max: Some(8), ..context(model.rollback(), false) };
        let make = || LlamaStage::new(StageOptions::whole(path.clone(), options())).expect("it loads");
        check_stage(|| Box::new(make()), &params);
    }
}

#[test]
fn snapshots_take_no_rows() {
    let folder = tempfile::tempdir().unwrap();
    let mut subject = Subject::open(&models::smollm2(), folder.path()).unwrap();
    let options = context(Rollback::Copy, false);
    let mut pipeline = subject.pipeline(&partition_at(&[], 30), &options).unwrap();
    pipeline.send(vec![], &one(0, 0, &[10, 20])).unwrap();
    let copy = vec![KvOp::Copy { from: 0, to: SLOTS }];
    let error = pipeline.send(copy, &one(SLOTS, 2, &[30])).unwrap_err();
    assert!(error.contains("snapshots"), "{error}");
}
