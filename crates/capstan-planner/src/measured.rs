//! How long a machine computes a micro-batch, from its measured device profile: weight by weight of each type, from the
//! curve that was measured for it, plus what a layer takes besides and what a long context adds.
//!
//! ```text
//! layer = Σ weights · c(type, rows) + o(rows) + attention
//! c     = cached + (from main memory - cached) · share(working set)
//! ```
//!
//! The working set is all that is read again and again: weights and KV cache of every stage on the machine. How much of
//! it caches hold was measured on models of a few sizes. Of experts each gets its share of the rows, so that many experts
//! take as long as so many small micro-batches.
use capstan_gguf::{LayerProfile, ModelProfile, Part, types};
use capstan_proto::device::{DeviceProfile, Point, TypeCurve};

use crate::timing::Batch;

/// llama.cpp computes attention over cells in multiples of this, also when fewer are in use.
const CELLS: u64 = 256;
/// Seconds in a femtosecond.
const FS: f64 = 1e-15;

/// A machine that computes, with a working set of some size.
#[derive(Clone, Copy)]
pub(crate) struct On<'a> {
    device: &'a DeviceProfile,
    /// How much of what main memory takes more than a cache is felt: 0 to 1.
    uncached: f64,
}

impl<'a> On<'a> {
    pub fn new(device: &'a DeviceProfile, working_set_bytes: u64) -> Self {
        Self { device, uncached: uncached(device, working_set_bytes) }
    }

    /// Seconds of a layer.
    pub fn layer_s(&self, n_embd: u32, layer: &LayerProfile, batch: Batch) -> f64 {
        let rows = batch.rows();
        let matrices = if layer.matrices.is_empty() {
            let (shared, experts) = (layer.shared_bytes(), layer.expert_bytes);
            self.of_type(None, shared, layer.shared_weights(), f64::from(rows))
                + self.routed_s(None, layer, experts, layer.expert_weights, rows)
        } else {
            let one = |m: &capstan_gguf::Matrices| match m.part {
                Part::Experts => self.routed_s(Some(m.ggml_type), layer, m.bytes, m.weights, rows),
                // Norms and biases are in what a layer takes besides.
                Part::Other if m.weights <= u64::from(n_embd) * 16 => 0.0,
                _ => self.of_type(Some(m.ggml_type), m.bytes, m.weights, f64::from(rows)),
            };
            layer.matrices.iter().map(one).sum()
        };
        matrices + self.besides_s(n_embd, batch) + self.attention_s(layer, batch)
    }

    /// Seconds of the head for so many rows of logits, and of drawing a token from each.
    pub fn head_s(&self, profile: &ModelProfile, rows: u32) -> f64 {
        let drawn = f64::from(rows) * f64::from(profile.n_vocab) * self.device.logit_fs as f64 * FS;
        drawn + self.of_type(profile.output_type, profile.output_bytes, profile.output_weights, f64::from(rows))
    }

    fn routed_s(&self, ggml_type: Option<u32>, l: &LayerProfile, bytes: u64, weights: u64, rows: u32) -> f64 {
        if l.experts == 0 || weights == 0 {
            return 0.0;
        }
        let chosen = l.distinct_experts(rows).max(1.0);
        let each = f64::from(rows) * f64::from(l.experts_used.max(1)) / chosen;
        chosen / f64::from(l.experts) * self.of_type(ggml_type, bytes, weights, each.max(1.0))
    }

    /// Seconds of all of some weights for so many rows.
    fn of_type(&self, ggml_type: Option<u32>, bytes: u64, weights: u64, rows: f64) -> f64 {
        if weights == 0 {
            return 0.0;
        }
        let wanted = bytes as f64 * 8.0 / weights as f64;
        let types = &self.device.types;
        let exact = types.iter().find(|c| Some(c.ggml_type) == ggml_type);
        let distance = |c: &&TypeCurve| bits(c.ggml_type).map_or(f64::INFINITY, |b| (b / wanted).ln().abs());
        let near = || types.iter().min_by(|a, b| distance(a).total_cmp(&distance(b)));
        exact.or_else(near).map_or(0.0, |c| weights as f64 * self.each(c, rows) * FS)
    }

    /// Femtoseconds for a weight.
    fn each(&self, curve: &TypeCurve, rows: f64) -> f64 {
        let (cached, all) = (at(&curve.per_cached_weight, rows), at(&curve.per_weight, rows));
        cached + (all - cached).max(0.0) * self.uncached
    }

    /// What a layer takes beside weights and attention. Its fixed part is the same for every width, what rows add grows
    /// with it.
    fn besides_s(&self, n_embd: u32, batch: Batch) -> f64 {
        let d = self.device;
        let points = match batch {
            Batch::Decode { .. } => &d.per_decode_layer,
            Batch::Chunk { .. } => &d.per_layer,
        };
        let (one, all) = (at(points, 1.0), at(points, f64::from(batch.rows())));
        let wider = f64::from(n_embd) / f64::from(d.layer_width.max(1));
        (one + (all - one).max(0.0) * wider) * FS
    }

    /// Attention: multiplying with every cell that it is computed over, and reading those that caches do not hold.
    fn attention_s(&self, l: &LayerProfile, batch: Batch) -> f64 {
        let d = self.device;
        let cells = |tokens: u64| l.visible_tokens(tokens).max(1).next_multiple_of(CELLS) as f64;
        let (read, multiplied, fs) = match batch {
            Batch::Decode { sequences, depth_tokens } => {
                let read = f64::from(sequences) * cells(depth_tokens.saturating_add(1));
                (read, read, d.attention_decode_fs)
            }
            Batch::Chunk { rows, depth_tokens } => {
                let read = cells(depth_tokens.saturating_add(u64::from(rows)));
                (read, f64::from(rows) * read, d.attention_chunk_fs)
            }
        };
        let reading = read * l.kv_bytes_per_token as f64 * self.byte_fs() * self.uncached;
        (multiplied * l.attention_flops_per_position as f64 * fs as f64 + reading) * FS
    }

    /// What a byte takes longer from main memory than from a cache, in femtoseconds: as weights of the first type do.
    fn byte_fs(&self) -> f64 {
        let of = |c: &TypeCurve| {
            let more = at(&c.per_weight, 1.0) - at(&c.per_cached_weight, 1.0);
            Some(more.max(0.0) * 8.0 / bits(c.ggml_type)?)
        };
        self.device.types.first().and_then(of).unwrap_or(0.0)
    }
}

/// How much of the difference between a cache and main memory a working set feels. Between measured sizes it is a line
/// over their logarithms; what was not measured comes from main memory.
fn uncached(device: &DeviceProfile, bytes: u64) -> f64 {
    let sets = &device.working_sets;
    let share = |i: usize| f64::from(sets[i].uncached_permille) / 1000.0;
    match sets.iter().position(|s| bytes <= s.bytes) {
        None => 1.0,
        Some(0) => share(0),
        Some(i) => {
            let size = |bytes: u64| (bytes.max(1) as f64).ln();
            let (low, high) = (size(sets[i - 1].bytes), size(sets[i].bytes));
            share(i - 1) + (share(i) - share(i - 1)) * (size(bytes) - low) / (high - low)
        }
    }
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

fn bits(ggml_type: u32) -> Option<f64> {
    types::ggml_type(ggml_type).map(|t| t.block_bytes as f64 * 8.0 / t.block_elements as f64)
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
    use capstan_proto::device::WorkingSet;

    use super::*;

    fn device() -> DeviceProfile {
        let curve = |ggml_type, fs: [u64; 3]| TypeCurve {
            ggml_type,
            per_weight: [1, 8, 64].into_iter().zip(fs).map(|(rows, fs)| Point { rows, fs }).collect(),
            per_cached_weight: vec![Point { rows: 1, fs: fs[0] / 2 }, Point { rows: 64, fs: fs[2] - fs[0] / 2 }],
            copied: ggml_type == 12,
        };
        DeviceProfile {
            types: vec![curve(8, [100, 200, 1000]), curve(12, [60, 150, 950])],
            working_sets: vec![
                WorkingSet { bytes: 1 << 20, uncached_permille: 0 },
                WorkingSet { bytes: 4 << 20, uncached_permille: 500 },
                WorkingSet { bytes: 8 << 20, uncached_permille: 1000 },
            ],
            per_layer: vec![Point { rows: 1, fs: 1_000_000 }, Point { rows: 64, fs: 7_300_000 }],
            per_decode_layer: vec![Point { rows: 1, fs: 2_000_000 }, Point { rows: 2, fs: 2_500_000 }],
            layer_width: 1000,
            attention_decode_fs: 3,
            attention_chunk_fs: 1,
            logit_fs: 7,
            ..DeviceProfile::default()
        }
    }

    const LARGE: u64 = u64::MAX;

    #[test]
    fn between_sizes_it_is_a_line_and_beyond_the_last_it_goes_on() {
        let d = device();
        let q8 = |rows| at(&d.types[0].per_weight, rows);
        assert_eq!([q8(1.0), q8(8.0), q8(64.0)], [100.0, 200.0, 1000.0]);
        assert!((q8(36.0) - 600.0).abs() < 1e-9 && (q8(120.0) - 1800.0).abs() < 1e-9);
    }

    #[test]
    fn the_larger_a_working_set_the_less_of_it_caches_hold() {
        let d = device();
        let share = |bytes| uncached(&d, bytes);
        assert_eq!([share(0), share(1 << 20), share(4 << 20), share(8 << 20), share(LARGE)], [0.0, 0.0, 0.5, 1.0, 1.0]);
        assert!((share(2 << 20) - 0.25).abs() < 1e-9, "halfway between in the logarithm");
        assert_eq!(uncached(&DeviceProfile::default(), 1), 1.0, "what was not measured is read from memory");
        let each = |bytes| On::new(&d, bytes).each(&d.types[0], 1.0);
        assert_eq!([each(0), each(4 << 20), each(LARGE)], [50.0, 75.0, 100.0]);
    }

    #[test]
    fn a_layer_is_its_matrices_and_the_rest() {
        let d = device();
        let matrices = vec![
            capstan_gguf::Matrices { part: Part::Mixer, ggml_type: 8, bytes: 1_062_500, weights: 1_000_000 },
            capstan_gguf::Matrices { part: Part::FeedForward, ggml_type: 12, bytes: 562_500, weights: 1_000_000 },
        ];
        let layer = LayerProfile { matrices, attention_flops_per_position: 1000, ..LayerProfile::default() };
        let fs = |bytes, batch| On::new(&d, bytes).layer_s(2000, &layer, batch) / FS;
        let near = Batch::Decode { sequences: 1, depth_tokens: 0 };
        let attention = 256.0 * 1000.0 * 3.0;
        assert!((fs(LARGE, near) - (100e6 + 60e6 + 2e6 + attention)).abs() < 1.0);
        assert!((fs(0, near) - (50e6 + 30e6 + 2e6 + attention)).abs() < 1.0);
        let far = Batch::Decode { sequences: 2, depth_tokens: 1023 };
        let besides = 2e6 + 0.5e6 * 2.0;
        let wanted = 1e6 * (100.0 + 100.0 / 7.0 + 60.0 + 90.0 / 7.0) + besides + 2.0 * 4.0 * attention;
        assert!((fs(LARGE, far) - wanted).abs() < 1.0, "{} {wanted}", fs(LARGE, far));
        // A chunk looks at what is before it and at itself.
        let chunk = Batch::Chunk { rows: 64, depth_tokens: 300 };
        let wanted = 1e6 * 1950.0 + 1e6 + 6.3e6 * 2.0 + 64.0 * 512.0 * 1000.0;
        assert!((fs(LARGE, chunk) - wanted).abs() < 1.0, "{} {wanted}", fs(LARGE, chunk));
    }

    #[test]
    fn a_cache_of_keys_and_values_is_read_like_weights() {
        let d = device();
        let layer = LayerProfile { kv_bytes_per_token: 1 << 20, ..LayerProfile::default() };
        let fs = |bytes| On::new(&d, bytes).attention_s(&layer, Batch::Decode { sequences: 3, depth_tokens: 255 }) / FS;
        // 50 fs more for a weight of 8.5 bits.
        let each = 50.0 * 8.0 / 8.5;
        assert!((fs(LARGE) / (3.0 * 256.0 * f64::from(1 << 20) * each) - 1.0).abs() < 1e-9);
        assert_eq!(fs(0), 0.0);
    }

    #[test]
    fn a_token_is_drawn_from_each_row_of_logits() {
        let d = device();
        let profile = ModelProfile { n_vocab: 1000, ..model() };
        assert!((On::new(&d, 0).head_s(&profile, 3) / FS - 21_000.0).abs() < 1e-6);
    }

    fn model() -> ModelProfile {
        let (model, quantisation) = crate::models::find("gpt-oss-120b").unwrap();
        let profile = model.shape.profile(model.name, quantisation);
        ModelProfile { output_weights: 0, ..profile }
    }

    #[test]
    fn a_type_that_was_not_measured_takes_the_nearest() {
        let d = device();
        // 4.25 bits a weight: nearer to q4_K than to q8_0.
        assert_eq!(On::new(&d, LARGE).of_type(Some(39), 531_250, 1_000_000, 1.0), 1e6 * 60.0 * FS);
    }

    #[test]
    fn experts_share_the_rows() {
        let d = device();
        let on = On::new(&d, LARGE);
        let layer = LayerProfile { experts: 8, experts_used: 2, ..LayerProfile::default() };
        let one = on.routed_s(Some(12), &layer, 562_500, 1_000_000, 1);
        assert!((one / FS - 0.25e6 * 60.0).abs() < 1.0, "two of eight experts, a row each");
        let many = on.routed_s(Some(12), &layer, 562_500, 1_000_000, 4096);
        assert!(many > 8.0 * one);
    }
}
