//! How long a machine computes a micro-batch, from its measured device profile: weight by weight of each type, from the
//! curve that was measured for it, plus what a layer takes besides and what a long context adds.
//!
//! `layer = Σ weights · c(type, rows) + o(rows) + attention`. Of experts each gets its share of the rows, so that many
//! experts take as long as so many small micro-batches. A model that the last-level cache holds is read from there.
use capstan_gguf::{LayerProfile, ModelProfile, Part, types};
use capstan_proto::device::{DeviceProfile, Point, TypeCurve};

use crate::timing::Batch;

/// llama.cpp computes attention over cells in multiples of this, also when fewer are in use.
const CELLS: u64 = 256;
/// Of the last-level cache so much may be a model's weights: the rest is for everything else that computes.
const CACHE_SHARE: u64 = 2;
/// Seconds in a femtosecond.
const FS: f64 = 1e-15;

/// A machine that computes a model.
#[derive(Clone, Copy)]
struct On<'a> {
    device: &'a DeviceProfile,
    /// Whether its last-level cache holds the model.
    cached: bool,
}

impl<'a> On<'a> {
    fn new(device: &'a DeviceProfile, profile: &ModelProfile) -> Self {
        Self { device, cached: profile.total_bytes.saturating_mul(CACHE_SHARE) <= device.cache_bytes }
    }

    fn curve(&self, of: &'a TypeCurve) -> &'a [Point] {
        if self.cached { &of.per_cached_weight } else { &of.per_weight }
    }
}

/// Seconds of each layer.
pub(crate) fn layers_s(device: &DeviceProfile, profile: &ModelProfile, batch: Batch) -> Vec<f64> {
    let on = On::new(device, profile);
    profile.layers.iter().map(|l| layer_s(on, profile.n_embd, l, batch)).collect()
}

fn layer_s(on: On, n_embd: u32, layer: &LayerProfile, batch: Batch) -> f64 {
    let rows = batch.rows();
    let d = on.device;
    let matrices = if layer.matrices.is_empty() {
        let (shared, experts) = (layer.shared_bytes(), layer.expert_bytes);
        of_type(on, None, shared, layer.shared_weights(), f64::from(rows))
            + routed_s(on, None, layer, experts, layer.expert_weights, rows)
    } else {
        let one = |m: &capstan_gguf::Matrices| match m.part {
            Part::Experts => routed_s(on, Some(m.ggml_type), layer, m.bytes, m.weights, rows),
            // Norms and biases are in what a layer takes besides.
            Part::Other if m.weights <= u64::from(n_embd) * 16 => 0.0,
            _ => of_type(on, Some(m.ggml_type), m.bytes, m.weights, f64::from(rows)),
        };
        layer.matrices.iter().map(one).sum()
    };
    matrices + besides_s(d, n_embd, rows) + attention_s(d, layer, batch)
}

/// Seconds of the head for so many rows of logits.
pub(crate) fn head_s(d: &DeviceProfile, profile: &ModelProfile, rows: u32) -> f64 {
    of_type(On::new(d, profile), profile.output_type, profile.output_bytes, profile.output_weights, f64::from(rows))
}

/// Bytes of weights per second that decoding a single row reaches, for people and for what is not measured.
pub(crate) fn weight_bytes_per_s(d: &DeviceProfile) -> f64 {
    let rate = |c: &TypeCurve| Some(bits(c.ggml_type)? / 8.0 / (at(&c.per_weight, 1.0) * FS));
    let q4 = d.types.iter().find(|c| c.ggml_type == 12).or(d.types.first());
    q4.and_then(rate).filter(|r| r.is_finite() && *r > 0.0).unwrap_or(1e9)
}

/// Multiplications and additions per second that large micro-batches reach.
pub(crate) fn gemm_flops_per_s(d: &DeviceProfile) -> f64 {
    let rate = |c: &TypeCurve| c.per_weight.last().map(|p| 2.0 * f64::from(p.rows) / (p.fs as f64 * FS));
    d.types.first().and_then(rate).filter(|r| r.is_finite() && *r > 0.0).unwrap_or(1e9)
}

fn routed_s(on: On, ggml_type: Option<u32>, l: &LayerProfile, bytes: u64, weights: u64, rows: u32) -> f64 {
    if l.experts == 0 || weights == 0 {
        return 0.0;
    }
    let chosen = l.distinct_experts(rows).max(1.0);
    let each = f64::from(rows) * f64::from(l.experts_used.max(1)) / chosen;
    chosen / f64::from(l.experts) * of_type(on, ggml_type, bytes, weights, each.max(1.0))
}

/// Seconds of all of some weights for so many rows.
fn of_type(on: On, ggml_type: Option<u32>, bytes: u64, weights: u64, rows: f64) -> f64 {
    if weights == 0 {
        return 0.0;
    }
    let wanted = bytes as f64 * 8.0 / weights as f64;
    let types = &on.device.types;
    let exact = types.iter().find(|c| Some(c.ggml_type) == ggml_type);
    let distance = |c: &&TypeCurve| bits(c.ggml_type).map_or(f64::INFINITY, |b| (b / wanted).ln().abs());
    let near = || types.iter().min_by(|a, b| distance(a).total_cmp(&distance(b)));
    exact.or_else(near).map_or(0.0, |c| weights as f64 * at(on.curve(c), rows) * FS)
}

fn bits(ggml_type: u32) -> Option<f64> {
    types::ggml_type(ggml_type).map(|t| t.block_bytes as f64 * 8.0 / t.block_elements as f64)
}

/// What a layer takes besides. Its fixed part is the same for every width, what rows add grows with it.
fn besides_s(d: &DeviceProfile, n_embd: u32, rows: u32) -> f64 {
    let (one, all) = (at(&d.per_layer, 1.0), at(&d.per_layer, f64::from(rows)));
    let wider = f64::from(n_embd) / f64::from(d.layer_width.max(1));
    (one + (all - one).max(0.0) * wider) * FS
}

/// Attention beyond the few cells that are in [`besides_s`].
fn attention_s(d: &DeviceProfile, l: &LayerProfile, batch: Batch) -> f64 {
    let (positions, fs) = match batch {
        Batch::Decode { sequences, depth_tokens } => {
            let cells = l.visible_tokens(depth_tokens.saturating_add(1)).next_multiple_of(CELLS);
            (f64::from(sequences) * cells.saturating_sub(CELLS) as f64, d.attention_decode_fs)
        }
        Batch::Chunk { rows, depth_tokens } => {
            (f64::from(rows) * l.visible_tokens(depth_tokens) as f64, d.attention_chunk_fs)
        }
    };
    positions * l.attention_flops_per_position as f64 * fs as f64 * FS
}

/// Femtoseconds at so many rows: on the line between two measured sizes, and beyond the last on the line that it ends.
fn at(points: &[Point], rows: f64) -> f64 {
    let value = |p: &Point| (f64::from(p.rows), p.fs as f64);
    let line = |a: (f64, f64), b: (f64, f64)| a.1 + (rows - a.0) * (b.1 - a.1) / (b.0 - a.0);
    match points {
        [] => 0.0,
        [only] => value(only).1 * (rows / value(only).0).max(1.0),
        [.., a, b] if rows >= f64::from(a.rows) => line(value(a), value(b)).max(value(a).1),
        [first, ..] if rows <= f64::from(first.rows) => value(first).1,
        _ => points.windows(2).find(|w| rows <= f64::from(w[1].rows)).map_or(0.0, |w| line(value(&w[0]), value(&w[1]))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn device() -> DeviceProfile {
        let curve = |ggml_type, fs: [u64; 3]| TypeCurve {
            ggml_type,
            per_weight: [1, 8, 64].into_iter().zip(fs).map(|(rows, fs)| Point { rows, fs }).collect(),
            per_cached_weight: vec![Point { rows: 1, fs: fs[0] / 2 }],
            copied: ggml_type == 12,
        };
        DeviceProfile {
            types: vec![curve(8, [100, 200, 1000]), curve(12, [60, 150, 950])],
            per_layer: vec![Point { rows: 1, fs: 1_000_000 }, Point { rows: 64, fs: 7_300_000 }],
            layer_width: 1000,
            attention_decode_fs: 3,
            attention_chunk_fs: 1,
            ..DeviceProfile::default()
        }
    }

    #[test]
    fn between_sizes_it_is_a_line_and_beyond_the_last_it_goes_on() {
        let d = device();
        let q8 = |rows| at(&d.types[0].per_weight, rows);
        assert_eq!([q8(1.0), q8(8.0), q8(64.0)], [100.0, 200.0, 1000.0]);
        assert!((q8(36.0) - 600.0).abs() < 1e-9 && (q8(120.0) - 1800.0).abs() < 1e-9);
    }

    #[test]
    fn a_layer_is_its_matrices_and_the_rest() {
        let d = device();
        let matrices = vec![
            capstan_gguf::Matrices { part: Part::Mixer, ggml_type: 8, bytes: 1_062_500, weights: 1_000_000 },
            capstan_gguf::Matrices { part: Part::FeedForward, ggml_type: 12, bytes: 562_500, weights: 1_000_000 },
        ];
        let layer = LayerProfile { matrices, attention_flops_per_position: 1000, ..LayerProfile::default() };
        let near = Batch::Decode { sequences: 1, depth_tokens: 0 };
        let on = On { device: &d, cached: false };
        let fs = |batch| layer_s(on, 2000, &layer, batch) / FS;
        assert!(layer_s(On { cached: true, ..on }, 2000, &layer, near) / FS < fs(near) * 0.6);
        assert!((fs(near) - (100e6 + 60e6 + 1e6)).abs() < 1.0);
        let far = Batch::Decode { sequences: 2, depth_tokens: 1023 };
        let besides = 1e6 + 0.1e6 * 2.0;
        let wanted = 1e6 * (100.0 + 100.0 / 7.0 + 60.0 + 90.0 / 7.0) + besides + 2.0 * 768.0 * 1000.0 * 3.0;
        assert!((fs(far) - wanted).abs() < 1.0, "{} {wanted}", fs(far));
    }

    #[test]
    fn a_type_that_was_not_measured_takes_the_nearest() {
        let d = device();
        let on = On { device: &d, cached: false };
        // 4.25 bits a weight: nearer to q4_K than to q8_0.
        assert_eq!(of_type(on, Some(39), 531_250, 1_000_000, 1.0), 1e6 * 60.0 * FS);
    }

    #[test]
    fn experts_share_the_rows() {
        let d = device();
        let on = On { device: &d, cached: false };
        let layer = LayerProfile { experts: 8, experts_used: 2, ..LayerProfile::default() };
        let one = routed_s(on, Some(12), &layer, 562_500, 1_000_000, 1);
        assert!((one / FS - 0.25e6 * 60.0).abs() < 1.0, "two of eight experts, a row each");
        let many = routed_s(on, Some(12), &layer, 562_500, 1_000_000, 4096);
        assert!(many > 8.0 * one);
    }
}
