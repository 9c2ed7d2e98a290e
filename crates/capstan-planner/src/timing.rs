//! How long a machine computes a micro-batch on some layers, from what it must read and multiply.
//!
//! `time = bytes read / bandwidth + (rows - 1) · operations / rate + overhead`, layer by layer. What the first row
//! multiplies hides behind reading; what further rows multiply does not: gpt-oss-120b on a Ryzen AI Max+ 395 takes 0.20,
//! 0.25, 0.31, 0.41, 0.63 and 1.08 s for 16, 32, … 512 rows, which is the time to read the experts that so many rows
//! choose plus 1.5 ms a row, not the larger of the two (<https://github.com/lhl/strix-halo-testing>,
//! llm-bench/gpt-oss-120b-F16).
use std::ops::Range;

use capstan_gguf::{LayerProfile, ModelProfile};
use capstan_proto::LayerRange;

use crate::links::Link;
use crate::machines::Rates;
use crate::measured::On;

/// Of the rate of large matrices, what those of experts reach, each of which gets few rows. Fitted on a Ryzen AI Max+ 395
/// to prefill of 512 tokens by gpt-oss-120b (0.33), Qwen3-235B-A22B (0.27) and Qwen3-30B-A3B (0.21), with 16 to 32 rows
/// an expert (<https://github.com/lhl/strix-halo-testing>, llm-bench).
pub const EXPERT_GEMM_SHARE: f64 = 0.25;
/// Bytes of an element of a hidden state on the wire: f32.
const HIDDEN_BYTES: u64 = 4;
/// Bytes of a frame besides: header, QUIC, UDP, IP.
const FRAME_BYTES: u64 = 200;
/// What sending and receiving take besides the link, in seconds: wake-ups of two threads and a process at each end. An
/// assumption for an idle desktop machine; nodes measure theirs.
pub const HOP_S: f64 = 0.2e-3;

/// What goes through a stage at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Batch {
    /// One token for each of some sequences, all so deep.
    Decode {
        /// How many.
        sequences: u32,
        /// Tokens before each.
        depth_tokens: u64,
    },
    /// Tokens of one prompt.
    Chunk {
        /// How many.
        rows: u32,
        /// Tokens before the first.
        depth_tokens: u64,
    },
}

impl Batch {
    /// Rows of hidden state.
    pub fn rows(self) -> u32 {
        match self {
            Self::Decode { sequences, .. } => sequences,
            Self::Chunk { rows, .. } => rows,
        }
    }
    /// Rows of logits.
    fn outputs(self) -> u32 {
        match self {
            Self::Decode { sequences, .. } => sequences,
            Self::Chunk { .. } => 1,
        }
    }
}

/// How long a machine takes for each layer and for the head, in seconds.
#[derive(Clone, Debug, PartialEq)]
pub struct Times {
    /// Layer by layer.
    pub layers_s: Vec<f64>,
    /// The head, which the last stage computes.
    pub head_s: f64,
}

impl Times {
    /// Of a model on a machine, for one micro-batch.
    pub fn of(profile: &ModelProfile, rates: &Rates, batch: Batch) -> Self {
        if let Some(device) = &rates.measured {
            let on = On::new(device, read_bytes(profile, 0..profile.layers.len(), batch));
            let layer = |l: &LayerProfile| on.layer_s(profile.n_embd, l, batch) + state_s(l, rates, batch);
            let layers_s = profile.layers.iter().map(layer).collect();
            return Self { layers_s, head_s: on.head_s(profile, batch.outputs()) };
        }
        let layers_s = profile.layers.iter().map(|l| layer_s(l, rates, batch)).collect();
        let rows = f64::from(batch.outputs());
        let head_s = matrix_s(profile.output_bytes as f64, profile.output_weights as f64, rows, rates, 1.0);
        Self { layers_s, head_s }
    }

    /// Of a stage of these layers.
    pub fn stage_s(&self, range: LayerRange) -> f64 {
        let layers = self.layers_s.get(range.start() as usize..range.end() as usize).unwrap_or_default();
        let head = if range.end() as usize >= self.layers_s.len() { self.head_s } else { 0.0 };
        layers.iter().sum::<f64>() + head
    }
}

/// How long a machine takes for a stage of these layers where what it reads again and again, for all of its stages, is so
/// many bytes.
pub(crate) fn stage_s(
    profile: &ModelProfile,
    rates: &Rates,
    batch: Batch,
    range: LayerRange,
    working_set_bytes: u64,
) -> f64 {
    let Some(device) = &rates.measured else { return Times::of(profile, rates, batch).stage_s(range) };
    let on = On::new(device, working_set_bytes);
    let layers = profile.layers.get(range.start() as usize..range.end() as usize).unwrap_or_default();
    let layer = |l: &LayerProfile| on.layer_s(profile.n_embd, l, batch) + state_s(l, rates, batch);
    let head = if range.end() as usize >= profile.layers.len() { on.head_s(profile, batch.outputs()) } else { 0.0 };
    layers.iter().map(layer).sum::<f64>() + head
}

/// Bytes that a micro-batch reads on some layers: weights, of experts those that are chosen, the KV cache, and the head
/// where the last layer is among them.
pub fn read_bytes(profile: &ModelProfile, layers: Range<usize>, batch: Batch) -> u64 {
    let (sequences, depth_tokens) = match batch {
        Batch::Decode { sequences, depth_tokens } => (sequences, depth_tokens),
        Batch::Chunk { depth_tokens, .. } => (1, depth_tokens),
    };
    let head = if layers.end >= profile.layers.len() { profile.output_bytes } else { 0 };
    let layer = |l: &LayerProfile| {
        let one = l.expert_bytes as f64 / f64::from(l.experts.max(1));
        let seen = l.visible_tokens(depth_tokens.saturating_add(1)).saturating_mul(l.kv_bytes_per_token);
        let kept = seen.saturating_add(l.recurrent_state_bytes).saturating_mul(u64::from(sequences));
        l.shared_bytes().saturating_add((one * l.distinct_experts(batch.rows())) as u64).saturating_add(kept)
    };
    let of = profile.layers.get(layers).unwrap_or_default();
    of.iter().map(layer).fold(head, u64::saturating_add)
}

/// Reading so many bytes, and multiplying so many weights with the rows after the first.
fn matrix_s(bytes: f64, weights: f64, rows: f64, rates: &Rates, share: f64) -> f64 {
    bytes / rates.weight_bytes_per_s + 2.0 * weights * (rows - 1.0).max(0.0) / (rates.gemm_flops_per_s * share)
}

fn layer_s(l: &LayerProfile, rates: &Rates, batch: Batch) -> f64 {
    let rows = f64::from(batch.rows());
    let shared = matrix_s(l.shared_bytes() as f64, l.shared_weights() as f64, rows, rates, 1.0);
    let mut overhead = rates.layer_overhead_s;
    let mut routed = 0.0;
    if l.experts > 0 {
        let one = 1.0 / f64::from(l.experts);
        let read = l.expert_bytes as f64 * one * l.distinct_experts(batch.rows());
        let used = l.expert_weights as f64 * one * f64::from(l.experts_used.min(l.experts));
        routed = matrix_s(read, used, rows, rates, EXPERT_GEMM_SHARE);
        overhead += rates.expert_overhead_s;
    }
    shared + routed + overhead + attention_s(l, rates, batch)
}

/// Reading the KV cache or the recurrent state, and multiplying with it: the larger of the two, for one kernel does both.
fn attention_s(l: &LayerProfile, rates: &Rates, batch: Batch) -> f64 {
    // Positions that are read, positions that rows look at.
    let (read, looked_at) = match batch {
        Batch::Decode { sequences, depth_tokens } => {
            let n = f64::from(sequences);
            let seen = l.visible_tokens(depth_tokens.saturating_add(1)) as f64;
            (n * seen, n * seen)
        }
        Batch::Chunk { rows, depth_tokens } => {
            let middle = depth_tokens.saturating_add(u64::from(rows) / 2);
            let read = l.visible_tokens(depth_tokens).saturating_add(u64::from(rows)) as f64;
            (read, f64::from(rows) * l.visible_tokens(middle) as f64)
        }
    };
    let reading = read * l.kv_bytes_per_token as f64 / rates.kv_bytes_per_s;
    state_s(l, rates, batch)
        + reading.max(looked_at * l.attention_flops_per_position as f64 / rates.attention_flops_per_s)
}

/// Reading and writing the recurrent state of each sequence.
fn state_s(l: &LayerProfile, rates: &Rates, batch: Batch) -> f64 {
    let sequences = match batch {
        Batch::Decode { sequences, .. } => f64::from(sequences),
        Batch::Chunk { .. } => 1.0,
    };
    2.0 * sequences * l.recurrent_state_bytes as f64 / rates.weight_bytes_per_s
}

/// Bytes of so many rows of hidden state on the wire.
pub fn hidden_bytes(profile: &ModelProfile, rows: u32) -> u64 {
    hidden_of_bytes(profile.n_embd, rows)
}

fn hidden_of_bytes(n_embd: u32, rows: u32) -> u64 {
    u64::from(n_embd) * HIDDEN_BYTES * u64::from(rows) + FRAME_BYTES
}

/// How long so many rows take from one stage to the next.
pub fn hop_s(profile: &ModelProfile, link: Link, rows: u32) -> f64 {
    hop_of_s(profile.n_embd, link, rows)
}

/// The same for rows of so many floats.
pub(crate) fn hop_of_s(n_embd: u32, link: Link, rows: u32) -> f64 {
    link.ends_s + link.way_s(hidden_of_bytes(n_embd, rows) as f64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{machines, models};

    fn ryzen() -> Rates {
        machines::find("Ryzen AI Max+ 395 128GB").unwrap().rates
    }

    fn tokens_per_s(model: &str, quantisation: &str, batch: Batch) -> f64 {
        let (model, _) = models::find(model).unwrap();
        let profile = model.shape.profile(model.name, model.quantisation(quantisation).unwrap());
        let whole = LayerRange::new(0, profile.n_layers).unwrap();
        f64::from(batch.rows()) / Times::of(&profile, &ryzen(), batch).stage_s(whole)
    }

    /// The figures that the constants were fitted to come out again within a quarter: one formula for all, so none of them
    /// exactly.
    #[test]
    fn one_machine_is_as_fast_as_was_measured() {
        let decode = Batch::Decode { sequences: 1, depth_tokens: 64 };
        let chunk = Batch::Chunk { rows: 512, depth_tokens: 0 };
        // Model, quantisation, batch, measured tok/s on one Ryzen AI Max+ 395.
        let cases = [
            ("Llama 3.1 8B", "Q4_K_M", decode, 42.0),
            ("Llama 3.1 8B", "Q4_K_M", chunk, 878.0),
            ("Llama 3.1 70B", "Q4_K_M", decode, 5.0),
            ("Llama 3.1 70B", "Q4_K_M", chunk, 94.7),
            ("Qwen3-30B-A3B", "Q4_K_M", decode, 78.0),
            ("Qwen3-235B-A22B", "Q3_K_M", decode, 15.1),
            ("Qwen3-235B-A22B", "Q3_K_M", chunk, 117.0),
        ];
        for (model, quantisation, batch, measured) in cases {
            let got = tokens_per_s(model, quantisation, batch);
            let ratio = got / measured;
            println!("{model} {quantisation} {batch:?}: {got:.1} tok/s, measured {measured}, ratio {ratio:.2}");
            assert!((0.75..1.25).contains(&ratio), "{model} {batch:?}: {got:.1} against {measured}");
        }
    }

    #[test]
    fn more_costs_more() {
        let (model, q) = models::find("Kimi K2.5").unwrap();
        let profile = model.shape.profile(model.name, q);
        let time = |batch| Times::of(&profile, &ryzen(), batch).stage_s(LayerRange::new(0, 61).unwrap());
        let decode = |sequences, depth_tokens| time(Batch::Decode { sequences, depth_tokens });
        let chunk = |rows, depth_tokens| time(Batch::Chunk { rows, depth_tokens });
        assert!(decode(1, 0) < decode(1, 4096) && decode(1, 4096) < decode(1, 131_072));
        assert!(decode(1, 0) < decode(2, 0) && decode(2, 0) < 2.0 * decode(1, 0), "rows share what they read");
        assert!(chunk(128, 0) < chunk(512, 0) && chunk(512, 0) < 4.0 * chunk(128, 0));
        assert!(chunk(512, 0) < chunk(512, 32_768));
    }

    #[test]
    fn a_window_bounds_what_a_row_looks_at() {
        let (model, q) = models::find("gpt-oss-120b").unwrap();
        let profile = model.shape.profile(model.name, q);
        let times = |depth_tokens| Times::of(&profile, &ryzen(), Batch::Decode { sequences: 1, depth_tokens }).layers_s;
        let (near, far) = (times(1000), times(100_000));
        assert_eq!(near[0], far[0], "a sliding layer");
        assert!(near[1] * 2.0 < far[1], "a full one");
    }
}
