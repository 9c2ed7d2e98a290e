//! A GGUF header made from a shape: the tensors that llama.cpp expects of its architecture, in types that come to the
//! bits of a quantisation. With it a model of the catalogue can be rehearsed of which nothing was downloaded.
//!
//! A file's quantisation is known by its bits a weight, and ggml has only some types. Between two of them tensors are
//! given the one or the other so that what is spent so far stays as near as can be to what is wanted so far:
//!
//! ```text
//! 2.9 bits wanted   Q2_K  Q2_K  Q3_K  Q2_K  Q2_K  Q3_K   (2.625 and 3.4375)
//! ```
use std::path::Path;

use capstan_gguf::types::{self, ggml_type};
use capstan_gguf::writer::{self, NewTensor};
use capstan_gguf::{GgufError, Metadata, Model, Value, synthetic};

use crate::quant::Quantisation;
use crate::shape::{Attention, Experts, Shape};

/// Architectures whose tensors are known here.
pub const ARCHITECTURES: &[&str] = &["deepseek2", "llama", "qwen2", "qwen3moe", "glm4moe", "minimax-m2", "gpt-oss"];

/// Types for rows of whole blocks of 256, by bits: `IQ2_XXS`, `Q2_K`, `Q3_K`, `IQ4_XS`, `Q4_K`, `Q5_K`, `Q6_K`, `Q8_0`,
/// `F16`.
const TYPES: &[u32] = &[16, 10, 11, 23, 12, 13, 14, 8, types::F16];
/// The same for rows of whole blocks of 32 only: `Q4_0`, `Q5_0`, `Q8_0`, `F16`.
const NARROW_TYPES: &[u32] = &[2, 6, 8, types::F16];
/// The same for OpenAI's experts, which it publishes in `MXFP4`.
const NARROW_EXPERT_TYPES: &[u32] = &[39, 6, 8, types::F16];
/// What GGUFs of these architectures say of norms. It has no bearing on time or memory.
const NORM_EPSILON: f32 = 1e-6;
/// The weight of the chosen experts, as DeepSeek V3 has it. It has no bearing on time or memory either.
const EXPERT_SCALE: f32 = 2.5;
/// llama.cpp's number of the gate that DeepSeek V3 and its like choose experts by.
const SIGMOID: u32 = 2;

/// Why no header can be made.
#[derive(Debug, thiserror::Error)]
pub enum HeaderError {
    /// The architecture's tensors are not known here.
    #[error(
        "no header can be made up for the architecture {architecture}, only for {}; give a file, an address or an hf: name, \
         of which the header is read", ARCHITECTURES.join(", ")
    )]
    Unknown {
        /// llama.cpp's name of it.
        architecture: String,
    },
    /// A tensor larger than a file can be.
    #[error("the shape of {0} is larger than any file")]
    TooLarge(String),
    /// What was made is no model, which is a mistake here.
    #[error("the header that was made up for {name} cannot be read: {source}")]
    Unreadable {
        /// Name of the model.
        name: String,
        /// Why not.
        source: GgufError,
    },
}

/// The model of a shape in a quantisation, without weights: what the header of its file would tell.
pub fn model(shape: &Shape, name: &str, quantisation: &Quantisation) -> Result<Model, HeaderError> {
    if !ARCHITECTURES.contains(&shape.architecture) || shape.recurrent.is_some() {
        return Err(HeaderError::Unknown { architecture: shape.architecture.to_owned() });
    }
    let layout = writer::layout(&metadata(shape, name), &tensors(shape, quantisation), None)
        .ok_or_else(|| HeaderError::TooLarge(name.to_owned()))?;
    let path = Path::new(name).with_extension("gguf");
    synthetic::model(&layout.header, layout.total, &path)
        .map_err(|source| HeaderError::Unreadable { name: name.to_owned(), source })
}

fn metadata(shape: &Shape, name: &str) -> Metadata {
    let arch = shape.architecture;
    let mut out = Metadata::new();
    out.insert("general.architecture", Value::String(arch.into()));
    out.insert("general.name", Value::String(name.into()));
    // Requests come as token ids.
    out.insert("tokenizer.ggml.model", Value::String("none".into()));
    let mut put = |key: &str, value: Value| out.insert(format!("{arch}.{key}"), value);
    let number = |n: u64| Value::U32(u32::try_from(n).unwrap_or(u32::MAX));
    let experts = shape.experts.unwrap_or_default();
    put("block_count", Value::U32(shape.n_layers));
    put("context_length", Value::U32(shape.context_train));
    put("embedding_length", number(shape.n_embd));
    put("vocab_size", number(shape.n_vocab));
    // Where no layer is dense, some architectures mean the experts by this.
    let some_dense = shape.experts.is_none_or(|e| e.leading_dense > 0);
    put("feed_forward_length", number(if some_dense { shape.dense_width } else { experts.width }));
    put("attention.layer_norm_rms_epsilon", Value::F32(NORM_EPSILON));
    match shape.attention {
        Attention::Grouped { heads, kv_heads, head, .. } => {
            put("attention.head_count", number(heads));
            put("attention.head_count_kv", number(kv_heads));
            put("attention.key_length", number(head));
            put("attention.value_length", number(head));
            // Of these two only half of a head is turned.
            let half = matches!(arch, "glm4moe" | "minimax-m2");
            put("rope.dimension_count", number(if half { head / 2 } else { head }));
        }
        Attention::Latent { heads, q_rank, kv_rank, nope, rope, value } => {
            put("attention.head_count", number(heads));
            put("attention.head_count_kv", Value::U32(1));
            put("attention.q_lora_rank", number(q_rank));
            put("attention.kv_lora_rank", number(kv_rank));
            put("attention.key_length", number(kv_rank + rope));
            put("attention.value_length", number(kv_rank));
            put("attention.key_length_mla", number(nope + rope));
            put("attention.value_length_mla", number(value));
            put("rope.dimension_count", number(rope));
        }
    }
    if let Some(sliding) = shape.sliding {
        put("attention.sliding_window", Value::U32(sliding.tokens));
    }
    if let Some(e) = shape.experts {
        put("expert_count", Value::U32(e.count));
        put("expert_used_count", Value::U32(e.used));
        put("expert_feed_forward_length", number(e.width));
        if matches!(arch, "deepseek2" | "glm4moe") {
            put("leading_dense_block_count", Value::U32(e.leading_dense));
            put("expert_shared_count", number(e.shared_width.checked_div(e.width).unwrap_or(0)));
            put("expert_weights_scale", Value::F32(EXPERT_SCALE));
            put("expert_weights_norm", Value::Bool(true));
        }
        if has_choice_bias(arch) {
            put("expert_gating_func", Value::U32(SIGMOID));
        }
    }
    out
}

/// Whether experts are chosen by their gate and a bias that is learned apart.
fn has_choice_bias(arch: &str) -> bool {
    matches!(arch, "deepseek2" | "glm4moe" | "minimax-m2")
}

/// What a tensor is for, as quantisations tell it apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Use {
    Attention,
    Dense,
    Routed,
    /// Norms, biases, routers: f32.
    Small,
}

/// Bits wanted and spent so far for one use.
struct Budget {
    bits: f64,
    wanted: f64,
    spent: f64,
}

impl Budget {
    fn new(bits: f64) -> Self {
        Self { bits, wanted: 0.0, spent: 0.0 }
    }

    /// The type after which what is spent is nearest to what is wanted.
    fn choose(&mut self, dims: &[u64], types: &[u32]) -> u32 {
        let weights = dims.iter().product::<u64>() as f64;
        self.wanted += self.bits * weights;
        let after = |t: &u32| self.spent + bits(*t) * weights;
        let miss = |t: &u32| (after(t) - self.wanted).abs();
        let best = types.iter().copied().min_by(|a, b| miss(a).total_cmp(&miss(b))).unwrap_or(types::F16);
        self.spent = after(&best);
        best
    }
}

fn bits(id: u32) -> f64 {
    ggml_type(id).map_or(0.0, |t| t.block_bytes as f64 * 8.0 / t.block_elements as f64)
}

/// The types that a row's length allows.
fn allowed(shape: &Shape, row: u64, of: Use) -> &'static [u32] {
    match (row.is_multiple_of(256), row.is_multiple_of(32), of) {
        (true, ..) => TYPES,
        (_, true, Use::Routed) if shape.architecture == "gpt-oss" => NARROW_EXPERT_TYPES,
        (_, true, _) => NARROW_TYPES,
        _ => &[types::F16],
    }
}

/// The two types that a number of bits lies between, and no others: a tensor among its like is not to be far worse or
/// far better than they are.
fn beside(types: &[u32], wanted: f64) -> &[u32] {
    let above = types.iter().position(|t| bits(*t) >= wanted).unwrap_or(types.len() - 1);
    let exact = (bits(types[above]) - wanted).abs() < 1e-6;
    &types[above.saturating_sub(usize::from(!exact))..=above]
}

fn tensors(shape: &Shape, quantisation: &Quantisation) -> Vec<NewTensor> {
    let q = quantisation.fitted(shape);
    let (d, vocab) = (shape.n_embd, shape.n_vocab);
    let alone = |name: &str, dims: &[u64], bits: f64| NewTensor {
        name: name.into(),
        dims: dims.to_vec(),
        ggml_type: Budget::new(bits).choose(dims, allowed(shape, dims[0], Use::Dense)),
    };
    let mut out = vec![alone("token_embd.weight", &[d, vocab], q.embedding_bits)];
    let mut budgets = [q.attention_bits, q.dense_bits, q.routed_bits].map(Budget::new);
    for i in 0..shape.n_layers {
        for (name, dims, of) in layer(shape, i) {
            let budget = match of {
                Use::Attention => Some(&mut budgets[0]),
                Use::Dense => Some(&mut budgets[1]),
                Use::Routed => Some(&mut budgets[2]),
                Use::Small => None,
            };
            let choose = |b: &mut Budget| {
                let types = beside(allowed(shape, dims[0], of), b.bits);
                b.choose(&dims, types)
            };
            let ggml_type = budget.map_or(types::F32, choose);
            out.push(NewTensor { name: format!("blk.{i}.{name}"), dims, ggml_type });
        }
    }
    out.push(NewTensor { name: "output_norm.weight".into(), dims: vec![d], ggml_type: types::F32 });
    if !shape.tied {
        out.push(alone("output.weight", &[d, vocab], q.head_bits));
    }
    out
}

/// The tensors of a layer: name, dimensions, use.
type Layer = Vec<(&'static str, Vec<u64>, Use)>;

fn layer(shape: &Shape, i: u32) -> Layer {
    let (d, arch) = (shape.n_embd, shape.architecture);
    let mut out = vec![("attn_norm.weight", vec![d], Use::Small)];
    attention(shape, &mut out);
    let norm = if matches!(arch, "glm4moe" | "gpt-oss") { "post_attention_norm.weight" } else { "ffn_norm.weight" };
    out.push((norm, vec![d], Use::Small));
    match shape.experts.filter(|e| i >= e.leading_dense) {
        Some(e) => routed(shape, e, &mut out),
        None => {
            let width = shape.dense_width;
            out.push(("ffn_gate.weight", vec![d, width], Use::Dense));
            out.push(("ffn_up.weight", vec![d, width], Use::Dense));
            out.push(("ffn_down.weight", vec![width, d], Use::Dense));
        }
    }
    out
}

fn attention(shape: &Shape, out: &mut Layer) {
    let d = shape.n_embd;
    let mut matrix = |name, dims: &[u64]| out.push((name, dims.to_vec(), Use::Attention));
    match shape.attention {
        Attention::Latent { heads, q_rank, kv_rank, nope, rope, value } => {
            matrix("attn_q_a.weight", &[d, q_rank]);
            matrix("attn_q_b.weight", &[q_rank, heads * (nope + rope)]);
            matrix("attn_kv_a_mqa.weight", &[d, kv_rank + rope]);
            matrix("attn_k_b.weight", &[nope, kv_rank, heads]);
            matrix("attn_v_b.weight", &[kv_rank, value, heads]);
            matrix("attn_output.weight", &[heads * value, d]);
            out.push(("attn_q_a_norm.weight", vec![q_rank], Use::Small));
            out.push(("attn_kv_a_norm.weight", vec![kv_rank], Use::Small));
        }
        Attention::Grouped { heads, kv_heads, head, .. } => {
            matrix("attn_q.weight", &[d, heads * head]);
            matrix("attn_k.weight", &[d, kv_heads * head]);
            matrix("attn_v.weight", &[d, kv_heads * head]);
            matrix("attn_output.weight", &[heads * head, d]);
            let mut small = |name, len| out.push((name, vec![len], Use::Small));
            if matches!(shape.architecture, "qwen2" | "glm4moe" | "gpt-oss") {
                small("attn_q.bias", heads * head);
                small("attn_k.bias", kv_heads * head);
                small("attn_v.bias", kv_heads * head);
            }
            match shape.architecture {
                "qwen3moe" | "glm4moe" => {
                    small("attn_q_norm.weight", head);
                    small("attn_k_norm.weight", head);
                }
                "minimax-m2" => {
                    small("attn_q_norm.weight", heads * head);
                    small("attn_k_norm.weight", kv_heads * head);
                }
                "gpt-oss" => {
                    small("attn_output.bias", d);
                    small("attn_sinks.weight", heads);
                }
                _ => {}
            }
        }
    }
}

fn routed(shape: &Shape, e: Experts, out: &mut Layer) {
    let (d, n) = (shape.n_embd, u64::from(e.count));
    let mut push = |name, dims: &[u64], of| out.push((name, dims.to_vec(), of));
    push("ffn_gate_inp.weight", &[d, n], Use::Small);
    if has_choice_bias(shape.architecture) {
        push("exp_probs_b.bias", &[n], Use::Small);
    }
    push("ffn_gate_exps.weight", &[d, e.width, n], Use::Routed);
    push("ffn_up_exps.weight", &[d, e.width, n], Use::Routed);
    push("ffn_down_exps.weight", &[e.width, d, n], Use::Routed);
    if shape.architecture == "gpt-oss" {
        push("ffn_gate_inp.bias", &[n], Use::Small);
        push("ffn_gate_exps.bias", &[e.width, n], Use::Small);
        push("ffn_up_exps.bias", &[e.width, n], Use::Small);
        push("ffn_down_exps.bias", &[d, n], Use::Small);
    }
    if e.shared_width > 0 {
        push("ffn_gate_shexp.weight", &[d, e.shared_width], Use::Dense);
        push("ffn_up_shexp.weight", &[d, e.shared_width], Use::Dense);
        push("ffn_down_shexp.weight", &[e.shared_width, d], Use::Dense);
    }
}
