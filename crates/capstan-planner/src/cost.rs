//! What a window needs in memory (weights, KV cache, an allowance for what llama.cpp allocates to compute) and how long
//! it takes to compute.
use capstan_gguf::ModelProfile;
use capstan_proto::LayerRange;
use capstan_proto::limits::scores_bytes;
use serde::{Deserialize, Serialize};

/// llama.cpp rounds the context of a sequence up to a multiple of this.
const CTX_STEP: u64 = 256;
/// What is reserved for a compute process besides its model and buffers: code, thread stacks, allocator, backend. One that
/// had loaded a small model held 41 MiB on x86-64 Linux.
const PROCESS_BYTES: u64 = 64 << 20;
/// What llama.cpp's tokenizer holds for each token of a vocabulary, in bytes: texts, merges, tables of both. Measured as
/// what the stage with the vocabulary holds more than others: 352 for the 49,152 tokens of SmolLM2, 315 for the 151,936
/// of Qwen2.5.
pub(crate) const TOKENIZER_BYTES_PER_TOKEN: u64 = 330;
/// Activations that are alive at once in one layer's graph, counted in hidden states: llama.cpp's allocator reuses
/// memory from layer to layer, and FFNs are three to four times as wide as the hidden state.
const ACTIVATIONS: u64 = 16;

/// Time to decode one row, in picoseconds for each byte of weights that is read and for each weight that is unpacked and
/// multiplied. Measured on two x86-64 cores that decode Qwen2.5-Coder-0.5B together: a 4-bit layer of 14.9 million weights
/// in 8.4 MB takes 2.1 ms, its 8-bit head of 136 million weights in 144 MB takes 18.5 ms. Another machine is faster or
/// slower at both; only their ratio matters here, as all nodes count as equally fast until they are measured.
const PS_PER_BYTE: u64 = 39;
/// See [`PS_PER_BYTE`].
const PS_PER_WEIGHT: u64 = 95;
/// The same for what a layer does besides: norms, attention over a short text.
const PS_PER_LAYER: u64 = 350_000_000;

/// Compute buffers of a stage, by llama.cpp's own reckoning.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Buffers {
    /// Of a stage that gives hidden states, in bytes.
    pub hidden_bytes: u64,
    /// Of the stage that gives logits, in bytes.
    pub logits_bytes: u64,
}

/// The sizes of a model that memory and time depend on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sizes {
    /// Of each layer in order: bytes of weights.
    pub weight_bytes: Vec<u64>,
    /// Of each layer in order: bytes of KV cache for one token.
    pub kv_bytes_per_token: Vec<u64>,
    /// Of each layer in order: bytes of recurrent state for one sequence.
    pub state_bytes_per_sequence: Vec<u64>,
    /// Of each layer in order: time to decode one row, in picoseconds of the core that was measured.
    pub work_ps: Vec<u64>,
    /// The same for the output head, which only the last stage computes.
    pub head_work_ps: u64,
    /// Token embedding, output head and output norm: what only the last stage has.
    pub ends_bytes: u64,
    /// Floats of a hidden state.
    pub n_embd: u32,
    /// Entries of the vocabulary.
    pub n_vocab: u32,
    /// Attention heads of a layer.
    pub n_head: u32,
    /// Compute buffers at the sizes that are asked for; an allowance is made without.
    pub buffers: Option<Buffers>,
}

/// How much of what a window needs, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Need {
    /// Weights.
    pub weights: u64,
    /// KV cache and recurrent state.
    pub kv: u64,
    /// Compute buffers, or an allowance for them.
    pub compute: u64,
    /// An allowance for the process itself.
    pub process: u64,
}

impl Need {
    /// What each stage needs whatever it holds.
    pub fn to_compute(&self) -> u64 {
        self.compute.saturating_add(self.process)
    }

    /// All of it.
    pub fn total(&self) -> u64 {
        self.weights.saturating_add(self.kv).saturating_add(self.to_compute())
    }
}

impl Sizes {
    /// The sizes that a model's profile tells.
    pub fn of(profile: &ModelProfile) -> Self {
        let each = |of: fn(&capstan_gguf::LayerProfile) -> u64| profile.layers.iter().map(of).collect();
        // A tied head is the embedding table, which is there once.
        let head = profile.output_bytes.saturating_sub(if profile.tied { profile.embedding_bytes } else { 0 });
        Self {
            weight_bytes: each(|l| l.weight_bytes),
            kv_bytes_per_token: each(|l| l.kv_bytes_per_token),
            state_bytes_per_sequence: each(|l| l.recurrent_state_bytes),
            work_ps: profile
                .layers
                .iter()
                .map(|l| PS_PER_LAYER.saturating_add(work_ps(l.active_bytes, l.active_weights)))
                .collect(),
            head_work_ps: work_ps(profile.output_bytes, profile.output_weights),
            ends_bytes: profile.embedding_bytes.saturating_add(head),
            n_embd: profile.n_embd,
            n_vocab: profile.n_vocab,
            n_head: profile.n_head,
            buffers: None,
        }
    }

    /// How many layers.
    pub fn layers(&self) -> u32 {
        self.weight_bytes.len() as u32
    }

    /// How long a stage with these layers decodes one row, in picoseconds of the core that was measured. What attention
    /// adds as a context grows is left out: it grows alike with the layers of every stage.
    pub fn work(&self, range: LayerRange) -> u64 {
        let head = if range.end() == self.layers() { self.head_work_ps } else { 0 };
        sum(&self.work_ps, range).saturating_add(head)
    }

    /// What a stage with these layers needs at `ctx` tokens for each of `slots` sequences, with micro-batches of at most
    /// `ubatch` rows. Numbers may come from a hostile file: sums saturate, and what saturates fits nowhere.
    pub fn need(&self, range: LayerRange, ctx: u32, slots: u32, ubatch: u32) -> Need {
        let tokens = u64::from(ctx).next_multiple_of(CTX_STEP) * u64::from(slots);
        let is_last = range.end() == self.layers();
        let buffers = self.buffers.map(|b| if is_last { b.logits_bytes } else { b.hidden_bytes });
        let head = if is_last { u64::from(self.n_vocab) * 4 * (u64::from(slots) + 1) } else { 0 };
        let cells = u64::from(ctx).next_multiple_of(CTX_STEP).min(u64::from(u32::MAX)) as u32;
        // The nodes' devices are not asked: where scores are not written out, a little is left over.
        let scores = scores_bytes(ubatch, cells, self.n_head).unwrap_or(0);
        Need {
            weights: sum(&self.weight_bytes, range).saturating_add(if is_last { self.ends_bytes } else { 0 }),
            kv: (sum(&self.kv_bytes_per_token, range).saturating_mul(tokens))
                .saturating_add(sum(&self.state_bytes_per_sequence, range).saturating_mul(u64::from(slots))),
            compute: buffers.unwrap_or(
                (u64::from(ubatch) * u64::from(self.n_embd) * 4).saturating_mul(ACTIVATIONS) + head + scores,
            ),
            process: PROCESS_BYTES + if is_last { u64::from(self.n_vocab) * TOKENIZER_BYTES_PER_TOKEN } else { 0 },
        }
    }
}

/// The sum over the layers of a range; it saturates.
fn sum(of: &[u64], range: LayerRange) -> u64 {
    let span = range.start() as usize..range.end() as usize;
    of.get(span).unwrap_or(&[]).iter().fold(0u64, |a, &b| a.saturating_add(b))
}

fn work_ps(bytes: u64, weights: u64) -> u64 {
    bytes.saturating_mul(PS_PER_BYTE).saturating_add(weights.saturating_mul(PS_PER_WEIGHT))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_measured_times_come_out() {
        let ms = |bytes, weights| work_ps(bytes, weights) as f64 / 1e9;
        assert!((ms(8_400_000, 14_900_000) + PS_PER_LAYER as f64 / 1e9 - 2.1).abs() < 0.02);
        assert!((ms(144_000_000, 136_000_000) - 18.5).abs() < 0.1);
    }
}
