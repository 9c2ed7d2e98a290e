//! A made-up model, loaded, and how long its micro-batches take.
use std::path::Path;
use std::time::{Duration, Instant};

use capstan_engine::StageOutput;
use capstan_llama::{Context, ContextOptions, Model, ModelOptions};
use capstan_proto::Epoch;
use capstan_proto::data::{KvOp, MicroBatch, Payload, Row};

use super::model::Shape;
use super::{MeasureError, MeasureOptions, UBATCH};

/// Each micro-batch is repeated for so long and at most [`REPEATS`] times; the shortest counts, for nothing makes a
/// computation faster than it is.
const REPEAT_FOR: Duration = Duration::from_millis(50);
/// See [`REPEAT_FOR`].
const REPEATS: usize = 8;
/// Tokens behind which attention is measured again.
pub(super) const DEEP: u32 = 2048;

/// A made-up model, loaded.
pub(super) struct Bench {
    context: Context,
    layers: f64,
    step: u64,
}

/// A file that goes with this.
pub(super) struct Gone<'a>(pub(super) &'a Path);

impl Drop for Gone<'_> {
    fn drop(&mut self) {
        std::fs::remove_file(self.0).ok();
    }
}

/// What a micro-batch consists of.
#[derive(Clone, Copy)]
pub(super) enum Work {
    /// So many rows of one sequence, the first of them behind so many tokens, which are there.
    Rows(u32, u32),
    /// A row each of so many sequences, with nothing before them.
    Sequences(u32),
}

impl Bench {
    /// Made up in this shape, with weights of this type and room for so many sequences of so many tokens.
    pub fn open(
        options: &MeasureOptions,
        shape: Shape,
        ggml_type: u32,
        (slots, ctx): (u32, u32),
    ) -> Result<Self, MeasureError> {
        let path = options.folder.join(format!("measure-{}-{ggml_type}.gguf", std::process::id()));
        let _gone = Gone(&path);
        shape.write(ggml_type, &path)?;
        let model = ModelOptions { gpu_layers: options.gpu_layers, ..ModelOptions::default() };
        let context = ContextOptions {
            ctx_per_slot: ctx,
            slots,
            ubatch: UBATCH,
            threads: options.threads,
            outputs_max: Some(UBATCH),
            ..ContextOptions::default()
        };
        let context = Context::new(Model::load(&path, model)?, &context)?;
        let mut bench = Self { context, layers: f64::from(shape.layers), step: 0 };
        // The first ones find cold caches and are not counted.
        bench.run(Work::Rows(1, 0))?;
        bench.run(Work::Rows(16, 0))?;
        Ok(bench)
    }

    /// Whether its weights are held in memory of their own beside the file.
    pub fn copied(&self) -> bool {
        self.context.model().copied_bytes() > 0
    }

    /// Bytes of its weights and its cache.
    pub fn model_bytes(&self) -> u64 {
        let model = self.context.model();
        model.size_bytes() + model.copied_bytes() + self.context.memory().kv_bytes
    }

    /// Seconds that attention takes for one operation: in decode, and in a chunk.
    pub fn attention(&mut self, shape: Shape) -> Result<(f64, f64), MeasureError> {
        let (near, chunk) = (self.time(Work::Rows(1, 0))?, self.time(Work::Rows(UBATCH, 0))?);
        for start in (0..DEEP - UBATCH).step_by(UBATCH as usize) {
            self.run(Work::Rows(UBATCH, start))?;
        }
        let deep_chunk = self.time(Work::Rows(UBATCH, DEEP - UBATCH))?;
        self.run(Work::Rows(UBATCH, DEEP - UBATCH))?;
        let far = self.time(Work::Rows(1, DEEP))?;
        let flops = shape.attention_flops() as f64;
        let decode = (far - near) / (flops * f64::from(DEEP));
        let rows = f64::from(UBATCH) * f64::from(DEEP - UBATCH);
        Ok((decode, (deep_chunk - chunk) / (flops * rows)))
    }

    /// Seconds of a layer.
    pub fn time(&mut self, work: Work) -> Result<f64, MeasureError> {
        let began = Instant::now();
        let (mut least, mut times) = (f64::INFINITY, 0);
        while times == 0 || (times < REPEATS && began.elapsed() < REPEAT_FOR) {
            least = self.run(work)?.min(least);
            times += 1;
        }
        Ok(least / self.layers)
    }

    /// Seconds of a layer, the middle of several: what shared caches hold differs from moment to moment, and the best
    /// moment is not what a stage will find.
    pub fn usual_time(&mut self, work: Work) -> Result<f64, MeasureError> {
        let began = Instant::now();
        let mut times = Vec::with_capacity(REPEATS);
        while times.is_empty() || (times.len() < REPEATS && began.elapsed() < REPEAT_FOR) {
            times.push(self.run(work)?);
        }
        times.sort_unstable_by(f64::total_cmp);
        Ok(times[times.len() / 2] / self.layers)
    }

    /// Computes once and says how long all layers took; what was there from its first position on is forgotten.
    fn run(&mut self, work: Work) -> Result<f64, MeasureError> {
        // Rows whose logits nobody wants leave the last layer half-way.
        let row = |slot, pos| Row { slot, pos, output: true };
        let (ops, rows): (Vec<KvOp>, Vec<Row>) = match work {
            Work::Rows(n, 0) => (vec![KvOp::Clear { slot: 0 }], (0..n).map(|i| row(0, i)).collect()),
            Work::Rows(n, start) => {
                (vec![KvOp::Trim { slot: 0, from: start }], (start..start + n).map(|i| row(0, i)).collect())
            }
            Work::Sequences(n) => {
                ((0..n).map(|slot| KvOp::Clear { slot }).collect(), (0..n).map(|slot| row(slot, 0)).collect())
            }
        };
        let payload = Payload::Tokens(vec![3; rows.len()]);
        let batch = MicroBatch { epoch: Epoch::default(), step: self.step, ops, rows, payload };
        self.step += 1;
        let began = Instant::now();
        match self.context.decode(&batch)? {
            StageOutput::Logits(_) => Ok(began.elapsed().as_secs_f64()),
            StageOutput::Hidden(_) => Err(MeasureError::Nonsense("a whole model gave hidden states")),
        }
    }
}

/// Seconds of a layer of two models for so many rows, measured in turns: whatever slows the machine slows both.
pub(super) fn pair(a: &mut Bench, b: &mut Bench, rows: u32) -> Result<(f64, f64), MeasureError> {
    let began = Instant::now();
    let work = Work::Rows(rows, 0);
    let (mut least, mut times) = ((f64::INFINITY, f64::INFINITY), 0);
    while times == 0 || (times < REPEATS && began.elapsed() < 2 * REPEAT_FOR) {
        least = (a.run(work)?.min(least.0), b.run(work)?.min(least.1));
        times += 1;
    }
    Ok((least.0 / a.layers, least.1 / b.layers))
}
