//! A made-up model of one type of weights, to be measured.
use std::path::Path;

use capstan_gguf::metadata::Array;
use capstan_gguf::writer::{self, NewTensor};
use capstan_gguf::{GgufError, Metadata, Value, synthetic, types};

/// Size of each head.
const HEAD: u64 = 64;
/// Query heads that share a key and value head, as in most models of today.
const HEADS_PER_KV: u64 = 4;
/// Entries of the vocabulary: next to none, so that the head takes no time.
const VOCABULARY: u32 = 32;

/// How large it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Shape {
    /// Floats of a hidden state: a multiple of 256, which every type's blocks divide.
    pub width: u64,
    /// Width of the feed-forward part: the same.
    pub inner: u64,
    /// Layers, all alike.
    pub layers: u32,
}

impl Shape {
    fn kv_width(self) -> u64 {
        self.width / HEADS_PER_KV
    }

    /// Weights of a layer's matrices.
    pub fn weights(self) -> u64 {
        let attention = 2 * self.width * self.width + 2 * self.width * self.kv_width();
        attention + 3 * self.width * self.inner
    }

    /// Multiplications and additions of attention, for one row and one position in one layer.
    pub fn attention_flops(self) -> u64 {
        4 * self.width
    }

    /// Writes it with weights of one type. They are zeros, which take as long to multiply as any others.
    pub fn write(self, ggml_type: u32, path: &Path) -> Result<(), GgufError> {
        let mut metadata = Metadata::new();
        let mut put = |key: &str, value| {
            metadata.insert(key.to_owned(), value);
        };
        put("general.architecture", Value::String("llama".into()));
        put("llama.block_count", Value::U32(self.layers));
        put("llama.context_length", Value::U32(1 << 16));
        put("llama.embedding_length", Value::U32(self.width as u32));
        put("llama.feed_forward_length", Value::U32(self.inner as u32));
        put("llama.attention.head_count", Value::U32((self.width / HEAD) as u32));
        put("llama.attention.head_count_kv", Value::U32((self.kv_width() / HEAD) as u32));
        put("llama.attention.layer_norm_rms_epsilon", Value::F32(1e-5));
        put("llama.rope.dimension_count", Value::U32(HEAD as u32));
        put("llama.vocab_size", Value::U32(VOCABULARY));
        put("tokenizer.ggml.model", Value::String("llama".into()));
        let tokens = ["<unk>", "<s>", "</s>"].map(String::from).into_iter();
        let tokens = tokens.chain((3..VOCABULARY).map(|i| format!("<0x{i:02X}>")));
        put("tokenizer.ggml.tokens", Value::Array(Array::from_strings(tokens)));
        // Unknown, two of control, bytes.
        let kinds = [2, 3, 3].into_iter().chain((3..VOCABULARY).map(|_| 6));
        put("tokenizer.ggml.token_type", Value::Array(Array::from_i32(kinds)));
        put("tokenizer.ggml.scores", Value::Array(Array::from_f32((0..VOCABULARY).map(|_| 0.0))));

        let tensor = |name: String, dims: &[u64], ggml_type| NewTensor { name, dims: dims.to_vec(), ggml_type };
        let (width, kv, inner) = (self.width, self.kv_width(), self.inner);
        let mut tensors = vec![
            tensor("token_embd.weight".into(), &[width, VOCABULARY.into()], types::F32),
            tensor("output_norm.weight".into(), &[width], types::F32),
        ];
        for i in 0..self.layers {
            let mut add = |name: &str, dims: &[u64], ggml_type| {
                tensors.push(tensor(format!("blk.{i}.{name}.weight"), dims, ggml_type));
            };
            add("attn_norm", &[width], types::F32);
            add("attn_q", &[width, width], ggml_type);
            add("attn_k", &[width, kv], ggml_type);
            add("attn_v", &[width, kv], ggml_type);
            add("attn_output", &[width, width], ggml_type);
            add("ffn_norm", &[width], types::F32);
            add("ffn_gate", &[width, inner], ggml_type);
            add("ffn_up", &[width, inner], ggml_type);
            add("ffn_down", &[inner, width], ggml_type);
        }
        let impossible = || GgufError::Malformed { path: path.to_owned(), what: "a tensor has no such shape".into() };
        let layout = writer::layout(&metadata, &tensors, None).ok_or_else(impossible)?;
        let on = &mut |_, _| std::ops::ControlFlow::Continue(());
        synthetic::write(&layout.header, layout.total, synthetic::Routing::Spread, path, on)?;
        Ok(())
    }
}
