//! A model cut into stages that run in this process, fed as a driver would: rows looked up in its embeddings enter the
//! first stage, what each stage captured enters the next.
// Each test binary uses its own part of this.
#![allow(dead_code)]
use std::collections::HashMap;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use capstan_engine::{Stage, StageOutput};
use capstan_gguf::Model;
use capstan_llama::{Capture, ContextOptions, LlamaStage, StageInput, StageOptions, dequantize_row};
use capstan_proto::data::{KvOp, MicroBatch, Payload, Row};
use capstan_proto::{Epoch, LayerRange};
use capstan_testkit::tiny;

const EPOCH: Epoch = Epoch(1);

/// A model, and its stages' shards, written once a range.
pub struct Subject {
    pub model: Model,
    path: PathBuf,
    folder: PathBuf,
    shards: HashMap<LayerRange, PathBuf>,
}

impl Subject {
    pub fn open(path: &Path, folder: &Path) -> Result<Self, String> {
        let model = Model::open(path).map_err(|e| e.to_string())?;
        Ok(Self { model, path: path.to_owned(), folder: folder.to_owned(), shards: HashMap::new() })
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

    fn stage(&mut self, range: LayerRange, context: &ContextOptions) -> Result<LlamaStage, String> {
        let io = self.model.window_io(range);
        let width = io.hidden_width as usize;
        load(StageOptions {
            path: self.shard(range)?,
            layers: Some(range.count()),
            input: StageInput::Hidden { width },
            context: ContextOptions { capture: io.capture.map(|node| Capture { node, width }), ..context.clone() },
            gpu_layers: 0,
            sparse: false,
            progress: None,
        })
    }

    /// The model in these windows; the whole range alone takes tokens.
    pub fn pipeline(&mut self, partition: &[LayerRange], context: &ContextOptions) -> Result<Pipeline<'_>, String> {
        let stages = if partition.len() == 1 {
            vec![load(StageOptions::whole(self.path.clone(), context.clone()))?]
        } else {
            partition.iter().map(|r| self.stage(*r, context)).collect::<Result<_, _>>()?
        };
        let mut pipeline = Pipeline { model: &self.model, first: partition[0], stages, step: 0 };
        pipeline.reset()?;
        Ok(pipeline)
    }
}

fn load(options: StageOptions) -> Result<LlamaStage, String> {
    let path = options.path.display().to_string();
    LlamaStage::new(options).map_err(|e| format!("{path}: {e}"))
}

/// Consecutive tokens of one sequence; the last one's logits are wanted.
#[derive(Clone, Copy)]
pub struct Piece<'a> {
    pub slot: u32,
    pub pos: usize,
    pub tokens: &'a [i32],
}

/// Stages one behind the other.
pub struct Pipeline<'a> {
    model: &'a Model,
    first: LayerRange,
    pub stages: Vec<LlamaStage>,
    step: u64,
}

impl Pipeline<'_> {
    pub fn n_vocab(&self) -> usize {
        self.stages.last().map_or(0, |s| s.model().n_vocab())
    }

    /// Empties every cache.
    pub fn reset(&mut self) -> Result<(), String> {
        self.step = 0;
        self.stages.iter_mut().try_for_each(|s| s.reset(EPOCH)).map_err(|e| e.to_string())
    }

    /// Sends a micro-batch through all stages; the last logits, which must be finite.
    pub fn send(&mut self, ops: Vec<KvOp>, pieces: &[Piece]) -> Result<Vec<f32>, String> {
        self.send_void(ops, pieces, usize::MAX)
    }

    /// As [`Pipeline::send`], but the stages from `void_from` on apply the operations alone.
    pub fn send_void(&mut self, ops: Vec<KvOp>, pieces: &[Piece], void_from: usize) -> Result<Vec<f32>, String> {
        let row = |p: &Piece, i: usize| Row { slot: p.slot, pos: (p.pos + i) as u32, output: i + 1 == p.tokens.len() };
        let rows = pieces.iter().flat_map(|p| (0..p.tokens.len()).map(move |i| row(p, i))).collect();
        let tokens: Vec<i32> = pieces.iter().flat_map(|p| p.tokens.iter().copied()).collect();
        let payload =
            if self.stages.len() == 1 { Payload::Tokens(tokens) } else { Payload::Hidden(self.embed(&tokens)) };
        let mut batch = MicroBatch { epoch: EPOCH, step: self.step, ops, rows, payload };
        self.step += 1;
        for (i, stage) in self.stages.iter_mut().enumerate() {
            if i >= void_from {
                batch = batch.without_rows();
            }
            match stage.forward(&batch).map_err(|e| format!("stage {i}: {e}"))? {
                StageOutput::Hidden(hidden) => batch.payload = Payload::Hidden(hidden),
                StageOutput::Logits(logits) if logits.iter().all(|x| x.is_finite()) => return Ok(logits),
                StageOutput::Logits(_) => return Err("logits are not finite".into()),
            }
        }
        Err("logits are missing".into())
    }

    fn embed(&self, tokens: &[i32]) -> Vec<f32> {
        let scale = self.model.window_io(self.first).embedding_scale;
        let table = self.model.tensor("token_embd.weight").expect("the model has embeddings");
        let data = self.model.tensor_data(table);
        let bytes = table.row_bytes() as usize;
        let row = |t: &i32| {
            let row = &data[*t as usize * bytes..][..bytes];
            dequantize_row(table.ggml_type, row, table.dims[0] as usize).expect("the row can be read")
        };
        tokens.iter().flat_map(row).map(|x| x * scale).collect()
    }
}

/// The windows between these cuts.
pub fn partition_at(cuts: &[u32], layers: u32) -> Vec<LayerRange> {
    let starts = [0].iter().chain(cuts);
    let ends = cuts.iter().chain([&layers]);
    starts.zip(ends).map(|(a, b)| LayerRange::new(*a, *b).expect("cuts ascend")).collect()
}

/// Runs a proof for every tiny model, on all cores, and panics with those that fail. `CAPSTAN_TINY=llama,qwen3` limits
/// the run to these models; whether it was.
pub fn for_every_tiny_model(proof: impl Fn(&str, &mut Subject) -> Result<String, String> + Sync) -> bool {
    let only = std::env::var("CAPSTAN_TINY").ok();
    let wanted = |n: &&str| only.as_ref().is_none_or(|o| o.split(',').any(|x| x == *n));
    let models: Vec<&str> = tiny::names().into_iter().filter(wanted).collect();
    let (next, failures) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
    let prove = |name: &str| {
        let folder = tempfile::tempdir().map_err(|e| e.to_string())?;
        let path = folder.path().join("whole.gguf");
        tiny::write(name, &path).map_err(|e| e.to_string())?;
        proof(name, &mut Subject::open(&path, folder.path())?)
    };
    let workers = std::thread::available_parallelism().map_or(1, |n| n.get());
    std::thread::scope(|scope| {
        for _ in 0..workers {
            scope.spawn(|| {
                while let Some(name) = models.get(next.fetch_add(1, Ordering::Relaxed)) {
                    match prove(name) {
                        Ok(found) => eprintln!("{name}: {found}"),
                        Err(e) => {
                            eprintln!("{name}: FAILED {e}");
                            failures.lock().unwrap().push(format!("{name}: {e}"));
                        }
                    }
                }
            });
        }
    });
    let failures = failures.into_inner().unwrap();
    assert!(failures.is_empty(), "{} models fail:\n{}", failures.len(), failures.join("\n"));
    only.is_some()
}
