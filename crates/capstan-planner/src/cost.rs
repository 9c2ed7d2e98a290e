//! What a window needs in memory: weights, KV cache, and an allowance for what llama.cpp allocates to compute.
use capstan_gguf::ModelProfile;
use capstan_proto::LayerRange;

/// llama.cpp rounds the context of a sequence up to a multiple of this.
const CTX_STEP: u64 = 256;
/// What a compute process takes besides its model and buffers: code, thread stacks, allocator, backend.
const PROCESS_BYTES: u64 = 48 << 20;
/// Activations that are alive at once in one layer's graph, counted in hidden states: llama.cpp's allocator reuses
/// memory from layer to layer, and FFNs are three to four times as wide as the hidden state.
const ACTIVATIONS: u64 = 16;

/// The sizes of a model that memory depends on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sizes {
    /// Of each layer in order: bytes of weights.
    pub weight_bytes: Vec<u64>,
    /// Of each layer in order: bytes of KV cache for one token.
    pub kv_bytes_per_token: Vec<u64>,
    /// Of each layer in order: bytes of recurrent state for one sequence.
    pub state_bytes_per_sequence: Vec<u64>,
    /// Token embedding, output head and output norm: what only the last stage has.
    pub ends_bytes: u64,
    /// Floats of a hidden state.
    pub n_embd: u32,
    /// Entries of the vocabulary.
    pub n_vocab: u32,
}

/// How much of what a window needs, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Need {
    /// Weights.
    pub weights: u64,
    /// KV cache and recurrent state.
    pub kv: u64,
    /// Compute buffers and the process itself: an allowance.
    pub compute: u64,
}

impl Need {
    /// All of it.
    pub fn total(&self) -> u64 {
        self.weights.saturating_add(self.kv).saturating_add(self.compute)
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
            ends_bytes: profile.embedding_bytes.saturating_add(head),
            n_embd: profile.n_embd,
            n_vocab: profile.n_vocab,
        }
    }

    /// How many layers.
    pub fn layers(&self) -> u32 {
        self.weight_bytes.len() as u32
    }

    /// What a stage with these layers needs at `ctx` tokens for each of `slots` sequences, with micro-batches of at most
    /// `ubatch` rows. Numbers may come from a hostile file: sums saturate, and what saturates fits nowhere.
    pub fn need(&self, range: LayerRange, ctx: u32, slots: u32, ubatch: u32) -> Need {
        let span = range.start() as usize..range.end() as usize;
        let sum = |of: &[u64]| of.get(span.clone()).unwrap_or(&[]).iter().fold(0u64, |a, &b| a.saturating_add(b));
        let tokens = u64::from(ctx).next_multiple_of(CTX_STEP) * u64::from(slots);
        let is_last = range.end() == self.layers();
        let head = if is_last { u64::from(self.n_vocab) * 4 * (u64::from(slots) + 1) } else { 0 };
        Need {
            weights: sum(&self.weight_bytes).saturating_add(if is_last { self.ends_bytes } else { 0 }),
            kv: (sum(&self.kv_bytes_per_token).saturating_mul(tokens))
                .saturating_add(sum(&self.state_bytes_per_sequence).saturating_mul(u64::from(slots))),
            compute: (u64::from(ubatch) * u64::from(self.n_embd) * 4).saturating_mul(ACTIVATIONS)
                + head
                + PROCESS_BYTES,
        }
    }
}
