//! Quantisations: how many bits a weight takes, by what the weight is for; and files whose exact size is public.
use crate::shape::Shape;

/// How many bits the weights of a file take.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Quantisation {
    /// Its name, as in file names.
    pub name: &'static str,
    /// Bits of a weight of attention.
    pub attention_bits: f64,
    /// Bits of a weight of dense networks and shared experts.
    pub dense_bits: f64,
    /// Bits of a weight of routed experts.
    pub routed_bits: f64,
    /// Bits of a weight of the embedding table.
    pub embedding_bits: f64,
    /// Bits of a weight of the head.
    pub head_bits: f64,
    /// Bytes of all files, where they are public. What the kinds above leave is divided over the experts, or over all
    /// layers of a model without, and [`Quantisation::routed_bits`] (and the dense ones) are ignored.
    pub file_bytes: Option<u64>,
    /// Where this is from.
    pub source: &'static str,
}

/// ggml's bits a weight: bytes of a block over its weights.
const Q8_0: f64 = 8.5;
const Q6_K: f64 = 6.5625;
const Q4_K: f64 = 4.5;
const MXFP4: f64 = 4.25;
const F16: f64 = 16.0;
/// llama.cpp's mixes give some matrices more bits than their name says: means over the layers of a model, as its
/// documentation lists them for Llama 3.1 8B.
const MIXES: &str = "https://github.com/ggml-org/llama.cpp/blob/master/tools/quantize/README.md";

const fn mix(name: &'static str, layer_bits: f64, embedding_bits: f64, head_bits: f64) -> Quantisation {
    Quantisation {
        name,
        attention_bits: layer_bits,
        dense_bits: layer_bits,
        routed_bits: layer_bits,
        embedding_bits,
        head_bits,
        file_bytes: None,
        source: MIXES,
    }
}

/// Quantisations that any model can be had in.
pub const COMMON: &[Quantisation] = &[
    mix("Q4_K_M", 4.83, Q4_K, Q6_K),
    mix("Q2_K", 3.0, 2.625, Q6_K),
    mix("Q3_K_M", 3.9, 3.4375, Q6_K),
    mix("IQ4_XS", 4.3, 4.25, Q6_K),
    mix("Q4_0", 4.5, 4.5, Q6_K),
    mix("Q5_K_M", 5.67, 5.5, Q6_K),
    mix("Q6_K", Q6_K, Q6_K, Q6_K),
    mix("Q8_0", Q8_0, Q8_0, Q8_0),
    mix("F16", F16, F16, F16),
];

/// A file of exactly so many bytes of a mixture-of-experts model, of which the experts take what the rest leaves. What is
/// not an expert is assumed to be kept at Q6_K, as mixes of this kind spend their bits there; a file's own header says it
/// exactly.
pub const fn mixed_experts(name: &'static str, file_bytes: u64, source: &'static str) -> Quantisation {
    Quantisation { file_bytes: Some(file_bytes), source, ..mix(name, Q6_K, Q4_K, Q6_K) }
}

/// A file of exactly so many bytes of a dense model.
pub const fn dense_file(name: &'static str, file_bytes: u64, source: &'static str) -> Quantisation {
    mixed_experts(name, file_bytes, source)
}

/// OpenAI's own format: experts in 4 bits; in the GGUF by ggml-org the rest is Q8_0.
pub const fn mxfp4(file_bytes: u64, source: &'static str) -> Quantisation {
    Quantisation {
        attention_bits: Q8_0,
        dense_bits: Q8_0,
        routed_bits: MXFP4,
        file_bytes: Some(file_bytes),
        ..mix("MXFP4", Q8_0, Q8_0, Q8_0)
    }
    .from(source)
}

impl Quantisation {
    const fn from(self, source: &'static str) -> Self {
        Self { source, ..self }
    }

    /// The bits that make a file of the size that is known; this one itself where none is.
    pub fn fitted(&self, shape: &Shape) -> Self {
        let Some(file) = self.file_bytes else { return *self };
        let (table, head) = shape.ends();
        let (mut attention, mut dense, mut routed, mut small) = (0.0, 0.0, 0.0, shape.n_embd as f64);
        for i in 0..shape.n_layers {
            let w = shape.layer(i);
            attention += w.attention as f64;
            dense += w.dense as f64;
            routed += w.routed as f64;
            small += w.small as f64;
        }
        let mut fixed = table as f64 * self.embedding_bits + head as f64 * self.head_bits + small * 32.0;
        let file_bits = file as f64 * 8.0;
        if routed > 0.0 {
            fixed += attention * self.attention_bits + dense * self.dense_bits;
            return Self { routed_bits: ((file_bits - fixed) / routed).max(0.0), ..*self };
        }
        let bits = ((file_bits - fixed) / (attention + dense)).max(0.0);
        Self { attention_bits: bits, dense_bits: bits, ..*self }
    }
}
