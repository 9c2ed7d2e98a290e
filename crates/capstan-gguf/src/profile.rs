//! What the planner needs to know of a model, from headers alone: bytes, and bytes per token, layer by layer.
use serde::{Deserialize, Serialize};

use crate::arch::windows::Facts;
use crate::arch::{Mixer, State};
use crate::model::Model;
use crate::parse::TensorInfo;

/// Bytes of an element of the KV cache at f16.
const F16_BYTES: u64 = 2;
/// Bytes of an element of recurrent state, which llama.cpp keeps in f32.
const F32_BYTES: u64 = 4;

/// A model in numbers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ModelProfile {
    /// llama.cpp's name of the architecture.
    pub architecture: String,
    /// Name for people; empty when the file has none.
    pub name: String,
    /// Layers of the trunk.
    pub n_layers: u32,
    /// Width of the hidden state in floats.
    pub n_embd: u32,
    /// Rows of the embedding table.
    pub n_vocab: u32,
    /// Attention heads, of the layer that has most.
    pub n_head: u32,
    /// Tokens of context that the model was trained with; 0 when the file does not say.
    pub context_train: u32,
    /// The trunk's layers in order.
    pub layers: Vec<LayerProfile>,
    /// Bytes of the embedding table; one row of it is read per token.
    pub embedding_bytes: u64,
    /// Bytes of the head that is read for each row of logits: the output matrix, or the embedding table when tied, and
    /// the norm before it.
    pub output_bytes: u64,
    /// How many weights these bytes are.
    pub output_weights: u64,
    /// ggml's number of their type; none when only sums are known.
    pub output_type: Option<u32>,
    /// Bytes of all tensors, extra prediction layers included.
    pub total_bytes: u64,
    /// How many weights these bytes are.
    pub total_weights: u64,
    /// The head is the embedding table.
    pub tied: bool,
}

/// What a matrix is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Part {
    /// Attention, or what mixes tokens in its place.
    Mixer,
    /// The feed-forward part that every token passes, shared experts included.
    FeedForward,
    /// Routed experts.
    Experts,
    /// Routers, norms, scales: small.
    Other,
}

/// Tensors of a layer that are for the same and of one type.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Matrices {
    /// What they are for.
    pub part: Part,
    /// ggml's number of their type.
    pub ggml_type: u32,
    /// Their bytes.
    pub bytes: u64,
    /// How many weights these are.
    pub weights: u64,
}

/// A layer in numbers.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayerProfile {
    /// Its tensors by what they are for and by type; empty when only sums are known, as of a model that is not there.
    pub matrices: Vec<Matrices>,
    /// Bytes of its tensors.
    pub weight_bytes: u64,
    /// Of which so many are read for one token: of experts only the share that a token uses.
    pub active_bytes: u64,
    /// How many weights these bytes are: with few bits a weight, unpacking them takes longer than reading them.
    pub active_weights: u64,
    /// Of [`LayerProfile::weight_bytes`] those of all routed experts: which of them a micro-batch reads depends on it.
    pub expert_bytes: u64,
    /// How many weights these bytes are.
    pub expert_weights: u64,
    /// Routed experts; 0 in a layer without.
    pub experts: u32,
    /// How many of them a token uses.
    pub experts_used: u32,
    /// Bytes of KV cache per token at f16; 0 for a recurrent layer.
    pub kv_bytes_per_token: u64,
    /// Bytes of state per slot of a recurrent layer; 0 for others.
    pub recurrent_state_bytes: u64,
    /// Floating-point operations of attention for one row and one position that it looks at.
    pub attention_flops_per_position: u64,
    /// How many positions back a row looks; 0 when it looks at all.
    pub window_tokens: u32,
}

impl LayerProfile {
    /// Bytes that every micro-batch reads, whichever experts its rows choose.
    pub fn shared_bytes(&self) -> u64 {
        self.weight_bytes.saturating_sub(self.expert_bytes)
    }
    /// How many weights these bytes are: what is active less what a token's experts have of it.
    pub fn shared_weights(&self) -> u64 {
        self.active_weights.saturating_sub(share(self.expert_weights, self.experts_used, self.experts))
    }
    /// How many different experts so many rows are expected to choose, each choosing evenly and on its own. Real routers
    /// are less even, and then it is fewer.
    pub fn distinct_experts(&self, rows: u32) -> f64 {
        if self.experts == 0 {
            return 0.0;
        }
        let (all, used) = (f64::from(self.experts), f64::from(self.experts_used.min(self.experts)));
        all * (1.0 - (1.0 - used / all).powf(f64::from(rows)))
    }
    /// How many positions a row at this depth looks at.
    pub fn visible_tokens(&self, depth_tokens: u64) -> u64 {
        if self.window_tokens == 0 { depth_tokens } else { depth_tokens.min(u64::from(self.window_tokens)) }
    }
}

/// `used` of `all` equal parts of a number.
fn share(of_all: u64, used: u32, all: u32) -> u64 {
    if all == 0 || used >= all {
        return of_all;
    }
    (u128::from(of_all) * u128::from(used) / u128::from(all)) as u64
}

pub(crate) fn profile(model: &Model) -> ModelProfile {
    let f = Facts { meta: model.metadata(), arch: model.architecture() };
    let mut layers: Vec<LayerProfile> = (0..model.n_layers())
        .map(|i| LayerProfile {
            kv_bytes_per_token: kv_bytes(model, &f, i),
            recurrent_state_bytes: state_bytes(model, &f, i),
            attention_flops_per_position: attention_flops(model, &f, i),
            window_tokens: window_tokens(model, &f, i),
            ..LayerProfile::default()
        })
        .collect();
    let (mut total_bytes, mut total_weights) = (0u64, 0u64);
    for t in model.tensors() {
        total_bytes = total_bytes.saturating_add(t.bytes);
        total_weights = total_weights.saturating_add(weights(t));
        let Some((i, name)) = t.layer() else { continue };
        let Some(layer) = layers.get_mut(i as usize) else { continue };
        layer.weight_bytes = layer.weight_bytes.saturating_add(t.bytes);
        add(&mut layer.matrices, part(name), t);
        let (used, all) = experts(&f, i);
        let routed = name.contains("exps") && all > 0;
        if routed {
            (layer.experts_used, layer.experts) = (used, all);
            layer.expert_bytes = layer.expert_bytes.saturating_add(t.bytes);
            layer.expert_weights = layer.expert_weights.saturating_add(weights(t));
        }
        let active = |of_all| if routed { share(of_all, used, all) } else { of_all };
        layer.active_bytes = layer.active_bytes.saturating_add(active(t.bytes));
        layer.active_weights = layer.active_weights.saturating_add(active(weights(t)));
    }
    let bytes = |name: &str| model.tensor(name).map_or(0, |t| t.bytes);
    let tied = model.tensor("output.weight").is_none();
    let head = model.tensor(if tied { "token_embd.weight" } else { "output.weight" });
    ModelProfile {
        architecture: model.architecture().to_owned(),
        name: model.name().unwrap_or_default().to_owned(),
        n_layers: model.n_layers(),
        n_embd: model.n_embd(),
        n_vocab: model.n_vocab(),
        n_head: (0..model.n_layers()).filter_map(|i| number(&f, "attention.head_count", i)).max().unwrap_or(0) as u32,
        context_train: f.u32("context_length").unwrap_or(0),
        layers,
        embedding_bytes: bytes("token_embd.weight"),
        output_bytes: head.map_or(0, |t| t.bytes) + bytes("output_norm.weight"),
        output_weights: head.map_or(0, weights),
        output_type: head.map(|t| t.ggml_type),
        total_bytes,
        total_weights,
        tied,
    }
}

fn part(name: &str) -> Part {
    match name {
        _ if name.contains("norm") || name.contains("gate_inp") || name.ends_with(".bias") => Part::Other,
        _ if name.contains("exps") => Part::Experts,
        _ if name.starts_with("ffn_") => Part::FeedForward,
        _ => Part::Mixer,
    }
}

fn add(all: &mut Vec<Matrices>, part: Part, tensor: &TensorInfo) {
    let new = Matrices { part, ggml_type: tensor.ggml_type, bytes: tensor.bytes, weights: weights(tensor) };
    match all.iter_mut().find(|m| m.part == part && m.ggml_type == tensor.ggml_type) {
        Some(same) => {
            same.bytes = same.bytes.saturating_add(new.bytes);
            same.weights = same.weights.saturating_add(new.weights);
        }
        None => all.push(new),
    }
}

fn weights(tensor: &TensorInfo) -> u64 {
    tensor.dims.iter().fold(1, |product: u64, &dim| product.saturating_mul(dim))
}

/// How many routed experts a token uses in a layer, and how many there are; twice 0 when the file does not say.
fn experts(f: &Facts<'_>, layer: u32) -> (u32, u32) {
    let count = |bare| f.per_layer(bare, layer).and_then(|n| u32::try_from(n).ok()).filter(|n| *n > 0);
    match (count("expert_used_count"), count("expert_count")) {
        (Some(used), Some(all)) => (used.min(all), all),
        _ => (0, 0),
    }
}

/// A number of the metadata, or 0; bounded so that products of three stay far from overflow.
fn number(f: &Facts<'_>, bare: &str, layer: u32) -> Option<u64> {
    f.per_layer(bare, layer).and_then(|n| u64::try_from(n).ok()).map(|n| n.min(1 << 20))
}

fn is(kinds: Option<&[bool]>, layer: u32) -> bool {
    kinds.and_then(|k| k.get(layer as usize)).copied().unwrap_or(false)
}

fn kv_bytes(model: &Model, f: &Facts<'_>, layer: u32) -> u64 {
    let windows = model.windows();
    let both = windows.rules().is_some_and(|r| r.mixer == Mixer::Both);
    if is(windows.recurrent(), layer) && !both {
        return 0;
    }
    let heads = number(f, "attention.head_count", layer).unwrap_or(0);
    let kv_heads = number(f, "attention.head_count_kv", layer).unwrap_or(heads);
    let default = u64::from(model.n_embd()).checked_div(heads).unwrap_or(0);
    let length = |bare: &str| {
        let swa = is(windows.sliding(), layer).then(|| number(f, &format!("{bare}_swa"), layer)).flatten();
        swa.or_else(|| number(f, bare, layer)).unwrap_or(default)
    };
    // Latent attention caches the latent vector with its rope part as keys, and no values.
    let latent = f.has("attention.key_length_mla") && f.has("attention.value_length_mla");
    let values = if latent { 0 } else { length("attention.value_length") };
    let own = windows.own_indexer().is_none_or(|o| o.get(layer as usize).copied().unwrap_or(true));
    let indexer = if own { number(f, "attention.indexer.key_length", layer).unwrap_or(0) } else { 0 };
    (kv_heads * (length("attention.key_length") + values) + indexer) * F16_BYTES
}

/// Scores and the weighted sum: a multiplication and an addition for each element of key and value, in every head. None
/// where nothing is cached to look at.
fn attention_flops(model: &Model, f: &Facts<'_>, layer: u32) -> u64 {
    if kv_bytes(model, f, layer) == 0 {
        return 0;
    }
    let heads = number(f, "attention.head_count", layer).unwrap_or(0);
    let default = u64::from(model.n_embd()).checked_div(heads).unwrap_or(0);
    let length = |bare| number(f, bare, layer).unwrap_or(default);
    2 * heads * (length("attention.key_length") + length("attention.value_length"))
}

fn window_tokens(model: &Model, f: &Facts<'_>, layer: u32) -> u32 {
    if !is(model.windows().sliding(), layer) {
        return 0;
    }
    number(f, "attention.sliding_window", layer).map_or(0, |n| n as u32)
}

/// What llama.cpp allocates for a recurrent layer and slot: the tail of a convolution, and the state itself.
fn state_bytes(model: &Model, f: &Facts<'_>, layer: u32) -> u64 {
    let windows = model.windows();
    if !is(windows.recurrent(), layer) {
        return 0;
    }
    let n = |bare: &str| number(f, bare, layer).unwrap_or(0);
    let width = u64::from(model.n_embd());
    let tail = |kernel: u64| kernel.saturating_sub(1);
    let elements = match windows.rules().map_or(State::Ssm, |r| r.state) {
        State::ShortConv => width * tail(n("shortconv.l_cache")),
        State::Kda => {
            let (size, kernel) = (n("kda.head_dim"), n("ssm.conv_kernel"));
            let heads = n("attention.head_count");
            3 * tail(if kernel > 0 { kernel } else { 4 }) * heads * size + size.saturating_mul(size * heads)
        }
        State::Wkv => width * (n("token_shift_count") + n("wkv.head_size")),
        State::Ssm => {
            let (inner, state) = (n("ssm.inner_size"), n("ssm.state_size"));
            tail(n("ssm.conv_kernel")) * (inner + 2 * n("ssm.group_count") * state) + state * inner
        }
    };
    elements.saturating_mul(F32_BYTES)
}
