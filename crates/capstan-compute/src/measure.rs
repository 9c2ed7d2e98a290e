//! What this machine takes to compute, measured in seconds with llama.cpp itself on made-up models: the device profile.
//!
//! A layer's time is taken to be `Σ weights · c(type, rows) + o(rows)`. Two models of one type that differ only in the
//! width of their feed-forward part give both unknowns; with `o` known, one model gives `c` of every other type. What a
//! long context adds is the difference between the same micro-batch behind many tokens and behind none.
//!
//! It runs in a child, as all of llama.cpp does, and on as many threads as a stage would.
mod model;

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use capstan_engine::StageOutput;
use capstan_gguf::types;
use capstan_llama::{Context, ContextOptions, LlamaError, Model, ModelOptions};
use capstan_proto::Epoch;
use capstan_proto::data::{KvOp, MicroBatch, Payload, Row};
use capstan_proto::device::{DeviceProfile, Point, TypeCurve};

use self::model::Shape;
use crate::os;

/// Nothing new is begun after this: all of it stays below ten seconds.
const BUDGET: Duration = Duration::from_millis(8500);
/// Rows for which the first type is measured.
const ROWS: [u32; 10] = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512];
/// Rows for which the others are measured: what lies between is drawn as a line.
const FEWER_ROWS: [u32; 5] = [4, 8, 16, 64, 256];
/// Rows that are slow because of memory. They are measured on a model that no cache holds.
const FEW_ROWS: [u32; 2] = [1, 2];
/// Tokens it holds: its many layers need no more memory than that.
const FEW_ROWS_CTX: u32 = 256;
/// Bytes of its weights.
const UNCACHED_BYTES: u64 = 256 << 20;
/// Each micro-batch is repeated for so long and at most [`REPEATS`] times; the shortest counts, for nothing makes a
/// computation faster than it is.
const REPEAT_FOR: Duration = Duration::from_millis(80);
/// See [`REPEAT_FOR`].
const REPEATS: usize = 12;
/// Tokens behind which attention is measured again.
const DEEP: u32 = 2048;
/// Most rows of a micro-batch.
const UBATCH: u32 = 512;
/// `q8_0`, which every backend has a kernel for.
const FIRST: u32 = 8;
/// What follows, the most common types of published models first; those that the time does not reach are measured the next
/// time.
pub const OTHERS: [u32; 12] = [12, 14, 6, 3, 13, 2, 11, 10, types::F16, 23, 18, 39];
/// On a processor. The large one's matrices are larger than a core's own cache, as those of models are: large micro-batches
/// read them again and again.
const SMALL: Shape = Shape { width: 1024, inner: 256, layers: 2 };
const LARGE: Shape = Shape { width: 1024, inner: 5632, layers: 1 };
/// On a graphics unit, which small matrices do not fill.
const SMALL_GPU: Shape = Shape { width: 4096, inner: 256, layers: 2 };
const LARGE_GPU: Shape = Shape { width: 4096, inner: 11_264, layers: 2 };

/// On what to measure.
#[derive(Clone, Debug)]
pub struct MeasureOptions {
    /// Where the made-up models are written; they are removed again.
    pub folder: PathBuf,
    /// Compute threads; none takes every core that the process may use.
    pub threads: Option<u32>,
    /// Layers to offload to a GPU; negative is all.
    pub gpu_layers: i32,
    /// Types of weights that are known already.
    pub known: Vec<u32>,
}

/// Why a machine could not be measured.
#[derive(Debug, thiserror::Error)]
pub enum MeasureError {
    /// A made-up model could not be written.
    #[error("a model to measure with could not be written: {0}")]
    Write(#[from] capstan_gguf::GgufError),
    /// llama.cpp refused it.
    #[error("a model to measure with could not be computed: {0}")]
    Compute(#[from] LlamaError),
    /// The clock stood still, or times came out that cannot be.
    #[error("the times that were measured make no sense ({0}); measure again when the machine is quiet")]
    Nonsense(&'static str),
}

/// Measures.
pub fn measure(options: &MeasureOptions) -> Result<DeviceProfile, MeasureError> {
    let began = Instant::now();
    capstan_llama::init();
    let process_bytes = os::peak_rss_bytes();
    let gpu = capstan_llama::offloads(options.gpu_layers);
    let (small, large) = if gpu { (SMALL_GPU, LARGE_GPU) } else { (SMALL, LARGE) };

    let mut of_small = Bench::open(options, small, FIRST, DEEP + UBATCH)?;
    let mut of_large = Bench::open(options, large, FIRST, UBATCH)?;
    let copied = of_large.copied();
    let more = (large.weights() - small.weights()) as f64;
    let (mut first, mut rest) = (Vec::new(), Vec::new());
    let mut least = 0.0f64;
    for rows in ROWS {
        let (s, l) = pair(&mut of_small, &mut of_large, rows)?;
        let per_weight = (l - s) / more;
        // What is left can come out at next to nothing where a micro-batch is large and the clock coarse; more rows never
        // take less.
        least = (s - small.weights() as f64 * per_weight).max(s * 0.01).max(least);
        rest.push(point(rows, least)?);
        first.push(per_weight);
    }
    let attention = of_small.attention(small)?;
    drop((of_small, of_large));
    let few = uncached(options, large, FIRST, |rows| seconds_at(&rest, rows))?;
    let mut floor = 0.0f64;
    let cached = ROWS.iter().zip(&first).map(|(&rows, &each)| point(rows, each)).collect::<Result<Vec<_>, _>>()?;
    let first = ROWS.iter().zip(first).enumerate().map(|(i, (&rows, each))| {
        floor = floor.max(few.get(i).copied().unwrap_or(0.0));
        point(rows, if i < few.len() { floor } else { each.max(floor) })
    });
    let first = first.collect::<Result<Vec<_>, _>>()?;
    let mut curves = vec![TypeCurve { ggml_type: FIRST, per_weight: first, per_cached_weight: cached, copied }];
    for ggml_type in OTHERS.into_iter().filter(|t| !options.known.contains(t)) {
        if began.elapsed() > BUDGET {
            break;
        }
        match type_curve(options, large, ggml_type, &rest) {
            Ok(curve) => curves.push(curve),
            // A backend without kernels for a type is no reason to know nothing of the others.
            Err(error) => tracing::warn!(%error, ggml_type, "this type of weights could not be measured"),
        }
    }
    Ok(DeviceProfile {
        hardware: String::new(),
        types: curves,
        per_layer: rest,
        layer_width: small.width as u32,
        attention_decode_fs: femtoseconds(attention.0)?,
        attention_chunk_fs: femtoseconds(attention.1)?,
        cache_bytes: if gpu { 0 } else { os::cache_bytes().unwrap_or(0) },
        process_bytes,
        took_ms: began.elapsed().as_millis().min(u128::from(u32::MAX)) as u32,
        measured_unix_s: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs()),
    })
}

/// Seconds for a weight that comes from main memory, for few rows; a layer's other work is taken off.
fn uncached(
    options: &MeasureOptions,
    shape: Shape,
    ggml_type: u32,
    other: impl Fn(u32) -> f64,
) -> Result<[f64; FEW_ROWS.len()], MeasureError> {
    let bytes = types::row_bytes(ggml_type, shape.weights()).unwrap_or(shape.weights()).max(1);
    let shape = Shape { layers: (UNCACHED_BYTES.div_ceil(bytes) as u32).max(shape.layers), ..shape };
    let mut bench = Bench::open(options, shape, ggml_type, FEW_ROWS_CTX)?;
    let mut each = [0.0; FEW_ROWS.len()];
    for (rows, each) in FEW_ROWS.into_iter().zip(&mut each) {
        let time = bench.time(rows, 0)?;
        *each = (time - other(rows)).max(time * 0.1) / shape.weights() as f64;
    }
    Ok(each)
}

/// Seconds of a layer of two models for so many rows, measured in turns: whatever slows the machine slows both.
fn pair(a: &mut Bench, b: &mut Bench, rows: u32) -> Result<(f64, f64), MeasureError> {
    let began = Instant::now();
    let (mut least, mut times) = ((f64::INFINITY, f64::INFINITY), 0);
    while times == 0 || (times < REPEATS && began.elapsed() < 2 * REPEAT_FOR) {
        least = (a.run(rows, 0)?.min(least.0), b.run(rows, 0)?.min(least.1));
        times += 1;
    }
    Ok((least.0 / a.layers, least.1 / b.layers))
}

fn type_curve(
    options: &MeasureOptions,
    shape: Shape,
    ggml_type: u32,
    rest: &[Point],
) -> Result<TypeCurve, MeasureError> {
    let other = |rows| seconds_at(rest, rows);
    let (mut per_weight, mut floor) = (Vec::new(), 0.0f64);
    for (rows, each) in FEW_ROWS.into_iter().zip(uncached(options, shape, ggml_type, other)?) {
        floor = floor.max(each);
        per_weight.push(point(rows, floor)?);
    }
    let mut bench = Bench::open(options, shape, ggml_type, UBATCH)?;
    let mut cached = Vec::new();
    for rows in FEW_ROWS.into_iter().chain(FEWER_ROWS) {
        let time = bench.time(rows, 0)?;
        let each = (time - other(rows)).max(time * 0.1) / shape.weights() as f64;
        cached.push(point(rows, each)?);
        if FEWER_ROWS.contains(&rows) {
            // What comes out of a cache is not faster for more rows than what comes out of memory for one.
            per_weight.push(point(rows, each.max(floor))?);
        }
    }
    Ok(TypeCurve { ggml_type, per_weight, per_cached_weight: cached, copied: bench.copied() })
}

fn seconds_at(points: &[Point], rows: u32) -> f64 {
    points.iter().find(|p| p.rows == rows).map_or(0.0, |p| p.fs as f64 * 1e-15)
}

fn point(rows: u32, seconds: f64) -> Result<Point, MeasureError> {
    Ok(Point { rows, fs: femtoseconds(seconds)? })
}

fn femtoseconds(seconds: f64) -> Result<u64, MeasureError> {
    let fs = seconds * 1e15;
    if fs.is_finite() && (1.0..1e15).contains(&fs) {
        Ok(fs.round() as u64)
    } else {
        Err(MeasureError::Nonsense("more weights took less time"))
    }
}

/// A made-up model, loaded.
struct Bench {
    context: Context,
    layers: f64,
    step: u64,
}

/// A file that goes with this.
struct Gone<'a>(&'a Path);

impl Drop for Gone<'_> {
    fn drop(&mut self) {
        std::fs::remove_file(self.0).ok();
    }
}

impl Bench {
    fn open(options: &MeasureOptions, shape: Shape, ggml_type: u32, ctx: u32) -> Result<Self, MeasureError> {
        let path = options.folder.join(format!("measure-{}-{ggml_type}.gguf", std::process::id()));
        let _gone = Gone(&path);
        shape.write(ggml_type, &path)?;
        let model = ModelOptions { gpu_layers: options.gpu_layers, ..ModelOptions::default() };
        let context = ContextOptions {
            ctx_per_slot: ctx,
            ubatch: UBATCH,
            threads: options.threads,
            outputs_max: Some(UBATCH),
            ..ContextOptions::default()
        };
        let context = Context::new(Model::load(&path, model)?, &context)?;
        let mut bench = Self { context, layers: f64::from(shape.layers), step: 0 };
        // The first ones find cold caches and are not counted.
        bench.run(1, 0)?;
        bench.run(16, 0)?;
        Ok(bench)
    }

    fn copied(&self) -> bool {
        self.context.model().copied_bytes() > 0
    }

    /// Seconds that attention takes for one operation: in decode, and in a chunk.
    fn attention(&mut self, shape: Shape) -> Result<(f64, f64), MeasureError> {
        let (near, chunk) = (self.time(1, 0)?, self.time(UBATCH, 0)?);
        for start in (0..DEEP - UBATCH).step_by(UBATCH as usize) {
            self.run(UBATCH, start)?;
        }
        let deep_chunk = self.time(UBATCH, DEEP - UBATCH)?;
        self.run(UBATCH, DEEP - UBATCH)?;
        let far = self.time(1, DEEP)?;
        let flops = shape.attention_flops() as f64;
        let decode = (far - near) / (flops * f64::from(DEEP));
        let rows = f64::from(UBATCH) * f64::from(DEEP - UBATCH);
        Ok((decode, (deep_chunk - chunk) / (flops * rows)))
    }

    /// Seconds of a layer for so many rows behind `start` tokens, which are there.
    fn time(&mut self, rows: u32, start: u32) -> Result<f64, MeasureError> {
        let began = Instant::now();
        let (mut least, mut times) = (f64::INFINITY, 0);
        while times == 0 || (times < REPEATS && began.elapsed() < REPEAT_FOR) {
            least = self.run(rows, start)?.min(least);
            times += 1;
        }
        Ok(least / self.layers)
    }

    /// Computes rows at `start` and says how long it took; what was there from `start` on is forgotten.
    fn run(&mut self, rows: u32, start: u32) -> Result<f64, MeasureError> {
        // Rows whose logits nobody wants leave the last layer half-way.
        let row = |i| Row { slot: 0, pos: start + i, output: true };
        let batch = MicroBatch {
            epoch: Epoch::default(),
            step: self.step,
            ops: vec![if start == 0 { KvOp::Clear { slot: 0 } } else { KvOp::Trim { slot: 0, from: start } }],
            rows: (0..rows).map(row).collect(),
            payload: Payload::Tokens(vec![3; rows as usize]),
        };
        self.step += 1;
        let began = Instant::now();
        match self.context.decode(&batch)? {
            StageOutput::Logits(_) => Ok(began.elapsed().as_secs_f64()),
            StageOutput::Hidden(_) => Err(MeasureError::Nonsense("a whole model gave hidden states")),
        }
    }
}
