//! What this machine takes to compute, measured in seconds with llama.cpp itself on made-up models: the device profile.
//!
//! A layer's time is taken to be `Σ weights · c(type, rows) + o(rows) + attention`. Two models of one type that differ only
//! in the width of their feed-forward part give both unknowns; with `o` known, one model gives `c` of every other type.
//! What a long context adds is the difference between the same micro-batch behind many tokens and behind none; what a
//! short one takes is then taken out of `o`.
//!
//! Few rows are slow because of memory, so `c` is measured twice: on a model that caches hold, and on one that none
//! does. Models in between tell how much of that difference a working set of their size feels.
//!
//! It runs in a child, as all of llama.cpp does, and on as many threads as a stage would.
//!
//! | module | idea |
//! |---|---|
//! | `model` | a made-up model |
//! | `bench` | how long its micro-batches take |
//! | `hop` | how long a hidden state takes from one compute thread to another |
//! | `disk` | what the disk reads |
mod bench;
mod disk;
mod hop;
mod model;

use std::path::PathBuf;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use capstan_gguf::types;
use capstan_llama::{LlamaError, Sampler};
use capstan_proto::device::{DeviceProfile, Point, TypeCurve, WorkingSet};
use capstan_proto::generate::Sampling;

use self::bench::{Bench, DEEP, Work, pair};
use self::model::Shape;
use crate::os;

/// Nothing new is begun after this: a type of weights takes two to three seconds on a slow core, and all of it stays below
/// ten.
const BUDGET: Duration = Duration::from_millis(6500);
/// Rows for which the first type is measured.
const ROWS: [u32; 10] = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512];
/// Rows for which the others are measured besides [`FEW_ROWS`]: what lies between is drawn as a line.
const MORE_ROWS: [u32; 3] = [16, 64, 256];
/// Rows that are slow because of memory. They are measured on a model that no cache holds, too.
const FEW_ROWS: [u32; 4] = [1, 2, 4, 8];
/// Tokens it holds: its many layers need no more memory than that.
const FEW_ROWS_CTX: u32 = 256;
/// Bytes of its weights.
const UNCACHED_BYTES: u64 = 256 << 20;
/// Bytes of models between those that caches hold and that one.
const BETWEEN_BYTES: [u64; 3] = [44 << 20, 88 << 20, 160 << 20];
/// All sizes are measured so many times over, and the least counts: what else runs for a moment then spoils but one.
const PASSES: usize = 2;
/// Times that differ by less than this share are alike.
const ALIKE: f64 = 0.05;
/// Sequences that decode at once, of which llama.cpp computes each one's attention by itself.
const SEQUENCES: [u32; 4] = [1, 2, 4, 8];
/// llama.cpp computes attention over cells in multiples of this, also when fewer are in use.
const CELLS: u32 = 256;
/// Entries of the vocabulary for which drawing a token is measured, and how often it is repeated.
const LOGITS: usize = 1 << 16;
const DRAWS: usize = 16;
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
    /// What was measured before: then only types of weights are measured that it lacks.
    pub known: Option<DeviceProfile>,
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
    let gpu = capstan_llama::offloads(options.gpu_layers);
    let (small, large) = if gpu { (SMALL_GPU, LARGE_GPU) } else { (SMALL, LARGE) };
    let mut profile = match &options.known {
        Some(known) => known.clone(),
        None => without_others(options, small, large)?,
    };
    let besides = besides(&profile, small)?;
    for ggml_type in OTHERS {
        if began.elapsed() > BUDGET {
            break;
        }
        if profile.types.iter().any(|t| t.ggml_type == ggml_type) {
            continue;
        }
        match type_curve(options, large, ggml_type, &besides) {
            Ok(curve) => profile.types.push(curve),
            // A backend without kernels for a type is no reason to know nothing of the others.
            Err(error) => tracing::warn!(%error, ggml_type, "this type of weights could not be measured"),
        }
    }
    Ok(DeviceProfile {
        took_ms: began.elapsed().as_millis().min(u128::from(u32::MAX)) as u32,
        measured_unix_s: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs()),
        ..profile
    })
}

/// All but the other types of weights.
fn without_others(options: &MeasureOptions, small: Shape, large: Shape) -> Result<DeviceProfile, MeasureError> {
    let hop = hop::half_round_trip().unwrap_or_else(|error| {
        tracing::warn!(error, "what a hidden state takes to another process could not be measured");
        Duration::ZERO
    });
    // Before large models leave their traces.
    let process_bytes = process_bytes(options, small)?;
    let (cached, layers, copied) = first_type(options, small, large)?;
    let (first, working_sets) = first_uncached(options, large, &cached, &layers)?;
    let gpu = capstan_llama::offloads(options.gpu_layers);
    Ok(DeviceProfile {
        hardware: String::new(),
        types: vec![TypeCurve { ggml_type: FIRST, per_weight: first, per_cached_weight: cached, copied }],
        working_sets,
        per_layer: layers.per_layer,
        per_decode_layer: layers.per_decode_layer,
        layer_width: small.width as u32,
        attention_decode_fs: layers.attention_decode_fs,
        attention_chunk_fs: layers.attention_chunk_fs,
        logit_fs: femtoseconds(draw_s()? / LOGITS as f64)?,
        hop_ns: u32::try_from(hop.as_nanos()).unwrap_or(u32::MAX),
        cache_bytes: if gpu { 0 } else { os::cache_bytes().unwrap_or(0) },
        process_bytes,
        disk_bytes_per_s: disk::bytes_per_s(&options.folder).unwrap_or(0),
        took_ms: 0,
        measured_unix_s: 0,
    })
}

/// What a layer of the made-up models takes beside its weights, a short context's attention included.
fn besides(profile: &DeviceProfile, small: Shape) -> Result<Vec<Point>, MeasureError> {
    let (decode_s, chunk_s) = (profile.attention_decode_fs as f64 * 1e-15, profile.attention_chunk_fs as f64 * 1e-15);
    let seconds = |p: &Point| p.fs as f64 * 1e-15 + attention_s(small, p.rows, decode_s, chunk_s);
    profile.per_layer.iter().map(|p| point(p.rows, seconds(p))).collect()
}

/// Attention of so many rows of one sequence with nothing before them.
fn attention_s(shape: Shape, rows: u32, decode_s: f64, chunk_s: f64) -> f64 {
    let cells = f64::from(rows) * f64::from(rows.next_multiple_of(CELLS)) * shape.attention_flops() as f64;
    cells * if rows == 1 { decode_s } else { chunk_s }
}

/// What this process holds beside a model and its buffers once all that a stage uses has run: code, the runtime's threads,
/// what llama.cpp keeps of graphs.
fn process_bytes(options: &MeasureOptions, small: Shape) -> Result<u64, MeasureError> {
    let bench = Bench::open(options, small, FIRST, (1, CELLS))?;
    Ok(os::rss_bytes().saturating_sub(bench.model_bytes()))
}

/// What layers take beside their weights.
struct Layers {
    /// With a short context's attention, as it was measured.
    besides: Vec<Point>,
    per_layer: Vec<Point>,
    per_decode_layer: Vec<Point>,
    attention_decode_fs: u64,
    attention_chunk_fs: u64,
}

/// The first type's weights as caches hold them, what a layer takes besides, and whether the weights are copies.
fn first_type(
    options: &MeasureOptions,
    small: Shape,
    large: Shape,
) -> Result<(Vec<Point>, Layers, bool), MeasureError> {
    let mut of_small = Bench::open(options, small, FIRST, (1, DEEP + UBATCH))?;
    let mut of_large = Bench::open(options, large, FIRST, (1, UBATCH))?;
    let copied = of_large.copied();
    let more = (large.weights() - small.weights()) as f64;
    let mut times = [(f64::INFINITY, f64::INFINITY); ROWS.len()];
    for _ in 0..PASSES {
        for (rows, least) in ROWS.into_iter().zip(&mut times) {
            let (s, l) = pair(&mut of_small, &mut of_large, rows)?;
            *least = (least.0.min(s), least.1.min(l));
        }
    }
    let (mut cached, mut bare) = (Vec::new(), Vec::new());
    let mut least = 0.0f64;
    for (rows, (s, l)) in ROWS.into_iter().zip(times) {
        let per_weight = at_most_in_parts(&cached, rows, (l - s) / more);
        // What is left can come out at next to nothing where a micro-batch is large and the clock coarse; more rows never
        // take less.
        least = (s - small.weights() as f64 * per_weight).max(s * 0.01).max(least);
        bare.push((rows, least));
        cached.push(point(rows, per_weight)?);
    }
    let (decode_s, chunk_s) = of_small.attention(small)?;
    drop((of_small, of_large));
    let flops = small.attention_flops() as f64;
    let per_layer = without(bare.iter().map(|&(rows, s)| (rows, s, attention_s(small, rows, decode_s, chunk_s))))?;
    let besides = bare.iter().map(|&(rows, s)| point(rows, s)).collect::<Result<Vec<_>, _>>()?;

    let slots = SEQUENCES.into_iter().max().unwrap_or(1);
    let mut of_small = Bench::open(options, small, FIRST, (slots, CELLS))?;
    let mut decoding = Vec::new();
    for n in SEQUENCES {
        let weights = small.weights() as f64 * seconds_at(&cached, n);
        let attention = f64::from(n) * f64::from(CELLS) * flops * decode_s;
        decoding.push((n, of_small.time(Work::Sequences(n))? - weights, attention));
    }
    let layers = Layers {
        besides,
        per_layer,
        per_decode_layer: without(decoding)?,
        attention_decode_fs: femtoseconds(decode_s)?,
        attention_chunk_fs: femtoseconds(chunk_s)?,
    };
    Ok((cached, layers, copied))
}

/// Points of times less what is known of them, never falling and never next to nothing.
fn without(times: impl IntoIterator<Item = (u32, f64, f64)>) -> Result<Vec<Point>, MeasureError> {
    let mut points: Vec<Point> = Vec::new();
    for (rows, seconds, known) in times {
        let least = points.last().map_or(0.0, |p| p.fs as f64 * 1e-15);
        let bare = (seconds - known).max(seconds.abs() * 0.05);
        points.push(point(rows, at_most_in_parts(&points, rows, bare).max(least))?);
    }
    Ok(points)
}

/// A time for so many rows that is no longer than what it takes to compute them in parts as large as the last size that was
/// measured: where it came out longer, something else had the processor.
fn at_most_in_parts(measured: &[Point], rows: u32, seconds: f64) -> f64 {
    let parts = |p: &Point| p.fs as f64 * 1e-15 * f64::from(rows.div_ceil(p.rows.max(1)));
    measured.last().map_or(seconds, |p| seconds.min(parts(p)))
}

/// The first type's weights from main memory, and what models between feel of it.
fn first_uncached(
    options: &MeasureOptions,
    large: Shape,
    cached: &[Point],
    layers: &Layers,
) -> Result<(Vec<Point>, Vec<WorkingSet>), MeasureError> {
    let few = few_rows(options, large, FIRST, UNCACHED_BYTES, &FEW_ROWS, &layers.besides)?;
    let at = |rows| seconds_at(cached, rows);
    let row_s = (at(1), few.first().copied().unwrap_or(0.0));
    let bytes = |layers: u32| types::row_bytes(FIRST, large.weights()).unwrap_or(0) * u64::from(layers);
    let mut sets = vec![WorkingSet { bytes: bytes(large.layers), uncached_permille: 0 }];
    // On a graphics unit the large one is beyond every cache already.
    for wanted in BETWEEN_BYTES.into_iter().filter(|&wanted| wanted > bytes(large.layers)) {
        let between = few_rows(options, large, FIRST, wanted, &FEW_ROWS[..1], &layers.besides)?;
        // Where both are alike it makes no difference; then nothing is promised of caches.
        let felt = match row_s.1 - row_s.0 {
            more if more > row_s.0 * ALIKE => (between.first().copied().unwrap_or(f64::INFINITY) - row_s.0) / more,
            _ => 1.0,
        };
        let before = sets.last().map_or(0, |s| s.uncached_permille);
        let uncached_permille = ((felt.clamp(0.0, 1.0) * 1000.0) as u16).max(before);
        sets.push(WorkingSet { bytes: bytes(layers_for(large, FIRST, wanted)), uncached_permille });
    }
    sets.push(WorkingSet { bytes: UNCACHED_BYTES.max(bytes(large.layers) + 1), uncached_permille: 1000 });
    Ok((with_uncached(cached, &few)?, sets))
}

/// A curve of weights that caches hold, made one of weights that come from main memory: measured for few rows; more take
/// longer by as much as the last of these.
fn with_uncached(cached: &[Point], few: &[f64]) -> Result<Vec<Point>, MeasureError> {
    let slower = |rows: u32, s: f64| s - seconds_at(cached, rows);
    let mut more = 0.0f64;
    let points = cached.iter().enumerate().map(|(i, p)| {
        let s = seconds_at(cached, p.rows);
        more = few.get(i).map_or(more, |&uncached| slower(p.rows, uncached).max(0.0));
        point(p.rows, s + more)
    });
    points.collect()
}

/// So many layers take so many bytes at least.
fn layers_for(shape: Shape, ggml_type: u32, bytes: u64) -> u32 {
    let each = types::row_bytes(ggml_type, shape.weights()).unwrap_or(shape.weights()).max(1);
    (bytes.div_ceil(each) as u32).max(shape.layers)
}

/// Seconds for a weight of a model of so many bytes, for few rows; a layer's other work is taken off.
fn few_rows(
    options: &MeasureOptions,
    shape: Shape,
    ggml_type: u32,
    bytes: u64,
    rows: &[u32],
    besides: &[Point],
) -> Result<Vec<f64>, MeasureError> {
    let shape = Shape { layers: layers_for(shape, ggml_type, bytes), ..shape };
    let mut bench = Bench::open(options, shape, ggml_type, (1, FEW_ROWS_CTX))?;
    let mut least = vec![f64::INFINITY; rows.len()];
    for _ in 0..PASSES {
        for (&rows, least) in rows.iter().zip(&mut least) {
            let time = bench.usual_time(Work::Rows(rows, 0))?;
            *least = of_weight(time, shape, rows, besides).min(*least);
        }
    }
    Ok(least)
}

fn each_weight(bench: &mut Bench, shape: Shape, rows: u32, besides: &[Point]) -> Result<f64, MeasureError> {
    Ok(of_weight(bench.time(Work::Rows(rows, 0))?, shape, rows, besides))
}

/// What is left for a weight of a layer's time.
fn of_weight(time: f64, shape: Shape, rows: u32, besides: &[Point]) -> f64 {
    (time - seconds_at(besides, rows)).max(time * 0.1) / shape.weights() as f64
}

fn type_curve(
    options: &MeasureOptions,
    shape: Shape,
    ggml_type: u32,
    besides: &[Point],
) -> Result<TypeCurve, MeasureError> {
    let mut bench = Bench::open(options, shape, ggml_type, (1, UBATCH))?;
    let mut cached = Vec::new();
    for rows in FEW_ROWS.into_iter().chain(MORE_ROWS) {
        let each = each_weight(&mut bench, shape, rows, besides)?;
        cached.push(point(rows, at_most_in_parts(&cached, rows, each))?);
    }
    let copied = bench.copied();
    drop(bench);
    let few = few_rows(options, shape, ggml_type, UNCACHED_BYTES, &FEW_ROWS, besides)?;
    Ok(TypeCurve { ggml_type, per_weight: with_uncached(&cached, &few)?, per_cached_weight: cached, copied })
}

/// Seconds to take logits out and draw a token among them.
fn draw_s() -> Result<f64, MeasureError> {
    // Of a draw at temperature 1 every entry's power counts, whatever it is.
    let logits: Vec<f32> = (0..LOGITS).map(|i| (i % 97) as f32 * 0.05).collect();
    let mut sampler = Sampler::with_vocab_size(&Sampling::default(), LOGITS)?;
    let mut least = f64::INFINITY;
    for _ in 0..DRAWS {
        let began = Instant::now();
        let taken = std::hint::black_box(logits.clone());
        std::hint::black_box(sampler.sample(&taken)?);
        least = least.min(began.elapsed().as_secs_f64());
    }
    Ok(least)
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
