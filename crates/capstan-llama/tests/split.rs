//! Split equals whole, to the last bit: every tiny model of every architecture that may be split, at its finest
//! partition and at each single cut.
//!
//! The whole model takes tokens. The stages take what they take in a cluster: the first one rows looked up in the
//! whole model's embeddings, the others what the one before captured. A prompt of 21 tokens, then 23 tokens one by one.
//! `CAPSTAN_TINY=llama,qwen3` limits the run to these models.
use std::collections::HashMap;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use capstan_engine::{Stage, StageOutput};
use capstan_gguf::Model;
use capstan_llama::{Capture, ContextOptions, LlamaStage, StageInput, StageOptions, dequantize_row};
use capstan_proto::data::{MicroBatch, Payload, Row};
use capstan_proto::{Epoch, LayerRange};
use capstan_testkit::{models, tiny};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

const PROMPT: usize = 21;
const STEPS: u64 = 24;
const EPOCH: Epoch = Epoch(1);
fn context(capture: Option<Capture>) -> ContextOptions {
    ContextOptions { ctx_per_slot: 256, slots: 2, ubatch: 32, threads: Some(1), capture, ..ContextOptions::default() }
}

fn load(options: StageOptions) -> Result<LlamaStage, String> {
    let path = options.path.display().to_string();
    LlamaStage::new(options).map_err(|e| format!("{path}: {e}"))
}

/// The whole model, its stages' shards (written once a range), and its embeddings.
struct Subject {
    model: Model,
    folder: PathBuf,
    whole: LlamaStage,
    shards: HashMap<LayerRange, PathBuf>,
}

/// What a comparison found.
struct Found {
    difference: f32,
    spread: f32,
}

impl Subject {
    fn open(path: &Path, folder: &Path) -> Result<Self, String> {
        let model = Model::open(path).map_err(|e| e.to_string())?;
        let whole = load(StageOptions::whole(path.to_owned(), context(None)))?;
        Ok(Self { model, folder: folder.to_owned(), whole, shards: HashMap::new() })
    }

    fn shard(&mut self, range: LayerRange) -> Result<PathBuf, String> {
        if let Some(path) = self.shards.get(&range) {
            return Ok(path.clone());
        }
        let path = self.folder.join(format!("{}-{}.gguf", range.start(), range.end()));
        self.model.write_shard(range, &path, &mut |_, _| ControlFlow::Continue(())).map_err(|e| e.to_string())?;
        self.shards.insert(range, path.clone());
        Ok(path)
    }

    fn stage(&mut self, range: LayerRange) -> Result<LlamaStage, String> {
        let io = self.model.window_io(range);
        let width = io.hidden_width as usize;
        load(StageOptions {
            path: self.shard(range)?,
            layers: Some(range.count()),
            input: StageInput::Hidden { width },
            context: context(io.capture.map(|node| Capture { node, width })),
            gpu_layers: 0,
            progress: None,
        })
    }

    fn embed(&self, tokens: &[i32], scale: f32) -> Vec<f32> {
        let table = self.model.tensor("token_embd.weight").expect("the model has embeddings");
        let data = self.model.tensor_data(table);
        let bytes = table.row_bytes() as usize;
        let row = |t: &i32| {
            let row = &data[*t as usize * bytes..][..bytes];
            dequantize_row(table.ggml_type, row, table.dims[0] as usize).expect("the row can be read")
        };
        tokens.iter().flat_map(row).map(|x| x * scale).collect()
    }

    /// The largest difference between whole and split.
    fn compare(&mut self, partition: &[LayerRange]) -> Result<Found, String> {
        let mut stages = partition.iter().map(|r| self.stage(*r)).collect::<Result<Vec<_>, _>>()?;
        let scale = self.model.window_io(partition[0]).embedding_scale;
        let all = stages.iter_mut().chain([&mut self.whole]);
        all.map(|s| s.reset(EPOCH)).collect::<Result<Vec<_>, _>>().map_err(|e| e.to_string())?;
        let mut rng = StdRng::seed_from_u64(1);
        let n_vocab = self.whole.model().n_vocab() as i32;
        let (mut pos, mut found) = (0, Found { difference: 0.0, spread: 0.0 });
        for step in 0..STEPS {
            let count = if step == 0 { PROMPT } else { 1 };
            let tokens: Vec<i32> = (0..count).map(|_| rng.random_range(4..n_vocab)).collect();
            let row = |i: usize| Row { slot: 1, pos: (pos + i) as u32, output: i + 1 == count };
            let rows: Vec<Row> = (0..count).map(row).collect();
            let batch = |payload| MicroBatch { epoch: EPOCH, step, ops: vec![], rows: rows.clone(), payload };
            let want = self.whole.forward(&batch(Payload::Tokens(tokens.clone()))).map_err(|e| e.to_string())?;
            let mut hidden = StageOutput::Hidden(self.embed(&tokens, scale));
            for (i, stage) in stages.iter_mut().enumerate() {
                let StageOutput::Hidden(h) = hidden else { return Err(format!("stage {} gave logits", i - 1)) };
                hidden = stage.forward(&batch(Payload::Hidden(h))).map_err(|e| format!("stage {i}: {e}"))?;
            }
            let (StageOutput::Logits(want), StageOutput::Logits(got)) = (want, hidden) else {
                return Err("logits are missing".into());
            };
            found.add(&want, &got).map_err(|e| format!("step {step}: {e}"))?;
            pos += count;
        }
        Ok(found)
    }
}

impl Found {
    fn add(&mut self, want: &[f32], got: &[f32]) -> Result<(), String> {
        if want.len() != got.len() || want.is_empty() {
            return Err(format!("{} logits instead of {}", got.len(), want.len()));
        }
        if want.iter().chain(got).any(|x| !x.is_finite()) {
            return Err("logits are not finite".into());
        }
        let difference = |(a, b): (&f32, &f32)| (a - b).abs();
        self.difference = want.iter().zip(got).map(difference).fold(self.difference, f32::max);
        let (min, max) = want.iter().fold((f32::MAX, f32::MIN), |(l, h), x| (l.min(*x), h.max(*x)));
        self.spread = self.spread.max(max - min);
        Ok(())
    }

    fn check(self) -> Result<(), String> {
        // Equal logits everywhere would make the comparison empty.
        if self.spread < 1e-3 {
            return Err(format!("the logits are all alike ({})", self.spread));
        }
        if self.difference == 0.0 { Ok(()) } else { Err(format!("difference {}", self.difference)) }
    }
}

fn partition_at(cuts: &[u32], layers: u32) -> Vec<LayerRange> {
    let starts = [0].iter().chain(cuts);
    let ends = cuts.iter().chain([&layers]);
    starts.zip(ends).map(|(a, b)| LayerRange::new(*a, *b).expect("cuts ascend")).collect()
}

fn names(partition: &[LayerRange]) -> String {
    partition.iter().map(|r| r.to_string()).collect::<Vec<_>>().join(" ")
}

/// Every partition of a model that must be exact: `Ok(none)` when it cannot be split.
fn prove(name: &str) -> Result<Option<usize>, String> {
    let folder = tempfile::tempdir().map_err(|e| e.to_string())?;
    let path = folder.path().join("whole.gguf");
    tiny::write(name, &path).map_err(|e| e.to_string())?;
    let model = Model::open(&path).map_err(|e| e.to_string())?;
    if let Some(reason) = model.split_problem() {
        eprintln!("{name}: runs whole: {reason}");
        return Ok(None);
    }
    let mut partitions = vec![model.finest_partition()];
    partitions.extend(model.single_cuts().into_iter().map(|c| partition_at(&[c], model.n_layers())));
    partitions.dedup();
    let mut subject = Subject::open(&path, folder.path())?;
    let wrong: Vec<String> = partitions
        .iter()
        .filter_map(|p| subject.compare(p).and_then(Found::check).err().map(|e| format!("[{}] {e}", names(p))))
        .collect();
    if !wrong.is_empty() {
        return Err(wrong.join(", "));
    }
    eprintln!("{name}: 0.0 at {} partitions, the finest {}", partitions.len(), names(&partitions[0]));
    Ok(Some(partitions.len()))
}

#[test]
fn every_tiny_model_is_exact_wherever_it_may_be_cut() {
    let only = std::env::var("CAPSTAN_TINY").ok();
    let wanted = |n: &&str| only.as_ref().is_none_or(|o| o.split(',').any(|x| x == *n));
    let models: Vec<&str> = tiny::names().into_iter().filter(wanted).collect();
    let (next, failures, split) = (AtomicUsize::new(0), Mutex::new(Vec::new()), Mutex::new(Vec::new()));
    let workers = std::thread::available_parallelism().map_or(1, |n| n.get());
    std::thread::scope(|scope| {
        for _ in 0..workers {
            scope.spawn(|| {
                while let Some(name) = models.get(next.fetch_add(1, Ordering::Relaxed)) {
                    match prove(name) {
                        Ok(Some(_)) => split.lock().unwrap().extend(tiny::architecture(name)),
                        Ok(None) => {}
                        Err(e) => {
                            eprintln!("{name}: FAILED {e}");
                            failures.lock().unwrap().push(format!("{name}: {e}"));
                        }
                    }
                }
            });
        }
    });
    let (failures, split) = (failures.into_inner().unwrap(), split.into_inner().unwrap());
    assert!(failures.is_empty(), "{} models are not exact:\n{}", failures.len(), failures.join("\n"));
    if only.is_none() {
        let missing: Vec<_> = tiny::PROMISED.iter().filter(|a| !split.contains(*a)).collect();
        assert!(missing.is_empty(), "these architectures must be split and were not: {missing:?}");
    }
}

#[test]
fn smollm2_is_exact_in_two_three_five_and_thirty_stages() {
    let folder = tempfile::tempdir().unwrap();
    let mut subject = Subject::open(&models::smollm2(), folder.path()).unwrap();
    assert_eq!(subject.model.split_problem(), None);
    let finest: Vec<u32> = (1..30).collect();
    for cuts in [&[13][..], &[10, 20], &[1, 7, 15, 29], &finest] {
        let partition = partition_at(cuts, 30);
        let found = subject.compare(&partition).unwrap();
        found.check().unwrap_or_else(|e| panic!("{}: {e}", names(&partition)));
    }
}
