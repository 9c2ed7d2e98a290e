//! A model's shape from its public configuration, and the profile that a quantisation of it has: what a GGUF's header
//! would tell, without the file.
use capstan_gguf::arch::windows::Windows;
use capstan_gguf::{Array, LayerProfile, Metadata, ModelProfile, Value};

use crate::quant::Quantisation;

/// Bytes of an element of the KV cache at f16.
const F16_BYTES: u64 = 2;
/// Bytes of an element of a norm, a bias or recurrent state: llama.cpp keeps them in f32.
const F32_BYTES: u64 = 4;

/// What a published configuration says of a model.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Shape {
    /// llama.cpp's name of the architecture.
    pub architecture: &'static str,
    /// Layers of the trunk, extra prediction layers not counted.
    pub n_layers: u32,
    /// Width of the hidden state.
    pub n_embd: u64,
    /// Tokens of the vocabulary.
    pub n_vocab: u64,
    /// Tokens of context that it was trained with.
    pub context_train: u32,
    /// The head is the embedding table.
    pub tied: bool,
    /// How its layers look back.
    pub attention: Attention,
    /// Which layers look back only a little.
    pub sliding: Option<Sliding>,
    /// Which layers are recurrent.
    pub recurrent: Option<Recurrent>,
    /// Width of the dense feed-forward network; 0 where there is none.
    pub dense_width: u64,
    /// Experts, where there are any.
    pub experts: Option<Experts>,
}

/// How a layer looks back.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Attention {
    /// Query heads share key and value heads.
    Grouped {
        /// Query heads.
        heads: u64,
        /// Key and value heads.
        kv_heads: u64,
        /// Width of a head.
        head: u64,
        /// The queries bring a gate of their own width.
        gated: bool,
    },
    /// Multi-head latent attention: one latent vector a token is cached for all heads.
    Latent {
        /// Query heads.
        heads: u64,
        /// Rank of the queries' projection.
        q_rank: u64,
        /// Width of the latent vector.
        kv_rank: u64,
        /// Width of a head's part without rope.
        nope: u64,
        /// Width of the shared part with rope.
        rope: u64,
        /// Width of a head's value.
        value: u64,
    },
}

/// Layers with a sliding window.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sliding {
    /// Tokens of the window.
    pub tokens: u32,
    /// Each so many-th layer looks at everything.
    pub period: u32,
}

/// Gated delta-net layers, as in Qwen3-Next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Recurrent {
    /// Each so many-th layer has attention instead.
    pub period: u32,
    /// Heads of keys.
    pub key_heads: u64,
    /// Heads of values.
    pub value_heads: u64,
    /// Width of both.
    pub head: u64,
    /// Width of the convolution.
    pub kernel: u64,
}

/// Experts of a layer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Experts {
    /// Routed ones.
    pub count: u32,
    /// How many of them a token uses.
    pub used: u32,
    /// Width of each.
    pub width: u64,
    /// Width of all shared ones together; 0 when there are none.
    pub shared_width: u64,
    /// So many layers at the start have a dense network instead.
    pub leading_dense: u32,
}

/// The weights of a layer, by what quantisations tell apart.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LayerWeights {
    /// Attention or its recurrent stand-in.
    pub attention: u64,
    /// Dense network and shared experts.
    pub dense: u64,
    /// All routed experts.
    pub routed: u64,
    /// Norms, biases and the router, which stay in f32.
    pub small: u64,
}

impl LayerWeights {
    fn all(&self) -> u64 {
        self.attention + self.dense + self.routed + self.small
    }
}

impl Shape {
    /// The weights of a layer.
    pub fn layer(&self, i: u32) -> LayerWeights {
        let d = self.n_embd;
        let attention = match self.recurrent.filter(|_| self.is_recurrent(i)) {
            Some(r) => {
                let (keys, values) = (r.key_heads * r.head, r.value_heads * r.head);
                d * (2 * keys + 2 * values + 2 * r.value_heads) + r.kernel * (2 * keys + values) + values * d
            }
            None => self.attention_weights(),
        };
        let mut of = LayerWeights { attention, small: 2 * d, ..LayerWeights::default() };
        match self.experts.filter(|e| i >= e.leading_dense) {
            Some(e) => {
                of.dense = 3 * d * e.shared_width;
                of.routed = 3 * d * e.width * u64::from(e.count);
                of.small += d * u64::from(e.count);
            }
            None => of.dense = 3 * d * self.dense_width,
        }
        of
    }

    fn attention_weights(&self) -> u64 {
        let d = self.n_embd;
        match self.attention {
            Attention::Grouped { heads, kv_heads, head, gated } => {
                d * head * (heads * if gated { 2 } else { 1 } + 2 * kv_heads) + heads * head * d
            }
            Attention::Latent { heads, q_rank, kv_rank, nope, rope, value } => {
                d * (q_rank + kv_rank + rope)
                    + q_rank * heads * (nope + rope)
                    + kv_rank * heads * (nope + value)
                    + heads * value * d
            }
        }
    }

    /// Whether a layer is recurrent.
    pub fn is_recurrent(&self, i: u32) -> bool {
        self.recurrent.is_some_and(|r| !(i + 1).is_multiple_of(r.period))
    }

    fn window(&self, i: u32) -> u32 {
        self.sliding.filter(|s| !(i + 1).is_multiple_of(s.period)).map_or(0, |s| s.tokens)
    }

    fn experts_of(&self, i: u32) -> Option<Experts> {
        self.experts.filter(|e| i >= e.leading_dense)
    }

    /// Weights of the embedding table, and of the head where it is a matrix of its own.
    pub fn ends(&self) -> (u64, u64) {
        let table = self.n_embd * self.n_vocab;
        (table, if self.tied { 0 } else { table })
    }

    /// All weights.
    pub fn total_weights(&self) -> u64 {
        let (table, head) = self.ends();
        table + head + self.n_embd + (0..self.n_layers).map(|i| self.layer(i).all()).sum::<u64>()
    }

    /// The weights that one token uses, the head included, the table that it is looked up in not.
    pub fn active_weights(&self) -> u64 {
        let layer = |i| {
            let w = self.layer(i);
            let routed = self.experts_of(i).map_or(0, |e| w.routed / u64::from(e.count) * u64::from(e.used));
            w.attention + w.dense + w.small + routed
        };
        self.n_embd * self.n_vocab + (0..self.n_layers).map(layer).sum::<u64>()
    }

    /// Bytes of KV cache of a layer for one token, and floating-point operations of attention for a row and a position.
    fn looks_back(&self, i: u32) -> (u64, u64) {
        if self.is_recurrent(i) {
            return (0, 0);
        }
        match self.attention {
            Attention::Grouped { heads, kv_heads, head, .. } => (2 * kv_heads * head * F16_BYTES, 4 * heads * head),
            // llama.cpp caches the latent vector with its rope part as keys, and absorbs the projections.
            Attention::Latent { heads, kv_rank, rope, .. } => {
                ((kv_rank + rope) * F16_BYTES, 2 * heads * (2 * kv_rank + rope))
            }
        }
    }

    fn state_bytes(&self, i: u32) -> u64 {
        let Some(r) = self.recurrent.filter(|_| self.is_recurrent(i)) else { return 0 };
        let mixed = (2 * r.key_heads + r.value_heads) * r.head;
        ((r.kernel - 1) * mixed + r.value_heads * r.head * r.head) * F32_BYTES
    }

    /// What the header of a file in this quantisation would tell.
    pub fn profile(&self, name: &str, quantisation: &Quantisation) -> ModelProfile {
        let q = quantisation.fitted(self);
        let layers: Vec<_> = (0..self.n_layers)
            .map(|i| {
                let w = self.layer(i);
                let e = self.experts_of(i).unwrap_or_default();
                let (routed, small) = (bytes(w.routed, q.routed_bits), w.small * F32_BYTES);
                let shared = bytes(w.attention, q.attention_bits) + bytes(w.dense, q.dense_bits) + small;
                let used = |of: u64| if e.count == 0 { 0 } else { of / u64::from(e.count) * u64::from(e.used) };
                let (kv_bytes_per_token, attention_flops_per_position) = self.looks_back(i);
                LayerProfile {
                    matrices: Vec::new(),
                    weight_bytes: shared + routed,
                    active_bytes: shared + used(routed),
                    active_weights: w.attention + w.dense + w.small + used(w.routed),
                    expert_bytes: routed,
                    expert_weights: w.routed,
                    experts: e.count,
                    experts_used: e.used,
                    kv_bytes_per_token,
                    recurrent_state_bytes: self.state_bytes(i),
                    attention_flops_per_position,
                    window_tokens: self.window(i),
                }
            })
            .collect();
        let (table, head) = self.ends();
        let embedding_bytes = bytes(table, q.embedding_bits);
        let norm = self.n_embd * F32_BYTES;
        let own = bytes(head, q.head_bits);
        ModelProfile {
            architecture: self.architecture.to_owned(),
            name: name.to_owned(),
            n_layers: self.n_layers,
            n_embd: self.n_embd as u32,
            n_vocab: self.n_vocab as u32,
            n_head: match self.attention {
                Attention::Grouped { heads, .. } | Attention::Latent { heads, .. } => heads as u32,
            },
            context_train: self.context_train,
            total_bytes: layers.iter().map(|l| l.weight_bytes).sum::<u64>() + embedding_bytes + own + norm,
            layers,
            embedding_bytes,
            output_bytes: norm + if self.tied { embedding_bytes } else { own },
            output_weights: table,
            output_type: None,
            total_weights: self.total_weights(),
            tied: self.tied,
        }
    }

    /// Which windows of its layers may be stages, by the rules that its file would be subject to.
    pub fn windows(&self) -> Windows {
        let mut meta = Metadata::new();
        let mut put = |key: &str, value| meta.insert(format!("{}.{key}", self.architecture), value);
        put("block_count", Value::U32(self.n_layers));
        put("vocab_size", Value::U32(self.n_vocab as u32));
        put("context_length", Value::U32(self.context_train));
        put("leading_dense_block_count", Value::U32(self.experts.map_or(0, |e| e.leading_dense)));
        if let Attention::Grouped { heads, kv_heads, .. } = self.attention {
            put("attention.head_count", Value::U32(heads as u32));
            put("attention.head_count_kv", Value::U32(kv_heads as u32));
        }
        if let Some(s) = self.sliding {
            put("attention.sliding_window", Value::U32(s.tokens));
            put("attention.sliding_window_pattern", self.flags(|i| self.window(i) > 0));
        }
        if let Some(r) = self.recurrent {
            put("full_attention_interval", Value::U32(r.period));
            put("attention.recurrent_layers", self.flags(|i| self.is_recurrent(i)));
        }
        Windows::new(&meta, self.architecture, self.n_layers)
    }

    fn flags(&self, of: impl Fn(u32) -> bool) -> Value {
        Value::Array(Array::from_bool((0..self.n_layers).map(of)))
    }
}

/// Bytes of so many weights at so many bits each.
pub(crate) fn bytes(weights: u64, bits: f64) -> u64 {
    (weights as f64 * bits / 8.0).round() as u64
}
