//! Tiny random models of every architecture of llama.cpp that generates text, 0.1 to 5 MB each.
//!
//! `data/tiny_models.json` holds metadata and tensor shapes, asked once from llama.cpp itself: `base` is metadata that
//! suits nearly every architecture; a model differs from it by `metadata` (`null` takes a key away, a key with `/` in
//! front has no architecture's prefix); `tensors` and `layers` are indices into `shapes`, name to dimensions. Sliding
//! windows, indexer choices and expert counts are small enough to matter within 40 tokens. A tensor's values follow from
//! its name, so the same model is the same bytes everywhere.
use std::collections::HashMap;
use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::Path;
use std::sync::LazyLock;

use capstan_gguf::synthetic::is_norm_or_scale;
use capstan_gguf::types;
use capstan_gguf::writer::{self, NewTensor};
use capstan_gguf::{Array, Metadata, Value};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};
use rand_distr::{Distribution, StandardNormal};
use serde::Deserialize;
use serde_json::{Map, Value as Json};

#[derive(Deserialize)]
struct Data {
    base: Map<String, Json>,
    models: Map<String, Json>,
    shapes: Vec<Map<String, Json>>,
}

#[derive(Deserialize)]
struct Entry {
    architecture: String,
    metadata: Map<String, Json>,
    tensors: usize,
    layers: Vec<usize>,
}

static DATA: LazyLock<Data> = LazyLock::new(|| {
    serde_json::from_str(include_str!("../data/tiny_models.json")).expect("data/tiny_models.json is well-formed")
});

static ENTRIES: LazyLock<HashMap<&'static str, Entry>> = LazyLock::new(|| {
    let parse = |v: &Json| Entry::deserialize(v).expect("data/tiny_models.json is well-formed");
    DATA.models.iter().map(|(name, v)| (name.as_str(), parse(v))).collect()
});

/// Architectures that the table promises to split; a test that skips one of them proves nothing.
pub const PROMISED: [&str; 13] = [
    "llama",
    "qwen2",
    "qwen3",
    "qwen3moe",
    "gemma3",
    "gpt-oss",
    "glm4moe",
    "minimax-m2",
    "deepseek2",
    "deepseek32",
    "qwen35moe",
    "kimi-linear",
    "llama4",
];

/// The models' names, in the file's order.
pub fn names() -> Vec<&'static str> {
    DATA.models.keys().map(String::as_str).collect()
}

/// The architecture of a model, if there is such a model.
pub fn architecture(name: &str) -> Option<&'static str> {
    ENTRIES.get(name).map(|e| e.architecture.as_str())
}

/// Write a model as F32. An unknown name is [`io::ErrorKind::InvalidInput`].
pub fn write(name: &str, path: &Path) -> io::Result<()> {
    let entry = ENTRIES
        .get(name)
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, format!("there is no tiny model {name}")))?;
    let shapes = shapes(entry);
    let tensors: Vec<NewTensor> = shapes
        .iter()
        .map(|(name, dims)| {
            let ggml_type = if is_table_of_experts(name) { types::I32 } else { types::F32 };
            NewTensor { name: name.clone(), dims: dims.clone(), ggml_type }
        })
        .collect();
    let mut out = BufWriter::new(File::create(path)?);
    writer::write(&mut out, &metadata(name, entry), &tensors, |i| values(&shapes[i].0, &shapes[i].1))?;
    out.flush()
}

fn metadata(name: &str, entry: &Entry) -> Metadata {
    let arch = &entry.architecture;
    let mut out = Metadata::new();
    out.insert("general.architecture", Value::String(arch.clone()));
    out.insert("general.name", Value::String(format!("tiny-{name}")));
    let differs = |key: &String| entry.metadata.get(key);
    let base = DATA.base.iter().map(|(k, v)| (k, differs(k).unwrap_or(v)));
    let own = entry.metadata.iter().filter(|(k, _)| !DATA.base.contains_key(*k));
    for (key, value) in base.chain(own).filter(|(_, v)| !v.is_null()) {
        let key = key.strip_prefix('/').map_or_else(|| format!("{arch}.{key}"), str::to_owned);
        out.insert(key, convert(value));
    }
    let n_vocab = out.get_u32(&format!("{arch}.vocab_size")).expect("every model has a vocabulary");
    // llama.cpp's own dummy vocabulary: chunks of text, ids as hex.
    out.insert("tokenizer.ggml.model", Value::String("test".into()));
    let first = ["<unk>", "<s>", "</s>", "<|endoftext|>"].map(String::from);
    let tokens = first.into_iter().chain((4..n_vocab).map(|i| format!("tok_{i}")));
    out.insert("tokenizer.ggml.tokens", Value::Array(Array::from_strings(tokens)));
    out.insert("tokenizer.ggml.scores", Value::Array(Array::from_f32((0..n_vocab).map(|_| 0.0))));
    out
}

fn convert(value: &Json) -> Value {
    let int = |v: &Json| v.as_u64().and_then(|n| u32::try_from(n).ok()).expect("integers are u32");
    match value {
        Json::Bool(b) => Value::Bool(*b),
        Json::String(s) => Value::String(s.clone()),
        Json::Number(n) if n.is_f64() => Value::F32(value.as_f64().expect("it is a float") as f32),
        Json::Number(_) => Value::U32(int(value)),
        Json::Array(list) => Value::Array(match list.first() {
            Some(Json::Bool(_)) => Array::from_bool(list.iter().map(|v| v.as_bool() == Some(true))),
            Some(Json::Number(n)) if n.is_f64() => {
                Array::from_f32(list.iter().map(|v| v.as_f64().expect("it is a float") as f32))
            }
            _ => Array::from_u32(list.iter().map(int)),
        }),
        Json::Null | Json::Object(_) => unreachable!("data/tiny_models.json has no such value"),
    }
}

/// Names and dimensions of all tensors.
fn shapes(entry: &Entry) -> Vec<(String, Vec<u64>)> {
    let list = |set: usize, prefix: String| {
        DATA.shapes[set].iter().map(move |(name, dims)| {
            let dims = dims.as_array().expect("dimensions").iter().map(|d| d.as_u64().expect("a dimension"));
            (format!("{prefix}{name}"), dims.collect())
        })
    };
    let layers = entry.layers.iter().enumerate().flat_map(|(i, set)| list(*set, format!("blk.{i}.")));
    list(entry.tensors, String::new()).chain(layers).collect()
}

/// deepseek4's table of experts by token id holds numbers, not weights.
fn is_table_of_experts(name: &str) -> bool {
    name.contains("tid2eid")
}

/// A sensible size for the tensor's role; the seed is its name.
fn values(name: &str, dims: &[u64]) -> Vec<u8> {
    let seed = name.bytes().fold(0xcbf2_9ce4_8422_2325, |h: u64, b| (h ^ u64::from(b)).wrapping_mul(0x100_0000_01b3));
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let n: u64 = dims.iter().product();
    if is_table_of_experts(name) {
        let (used, rows) = (dims[0] as usize, dims.get(1).copied().unwrap_or(1));
        return (0..rows)
            .flat_map(|_| permutation(&mut rng, 8).into_iter().take(used))
            .flat_map(i32::to_le_bytes)
            .collect();
    }
    let role: fn(f64) -> f64 = if name.contains("ssm_a") {
        |x| -(0.5 * x).exp()
    } else if name.contains("rope_freqs") || name.contains("rope_factors") {
        |x| 1.0 + x.abs()
    } else if is_norm_or_scale(name) {
        |x| 1.0 + 0.1 * x
    } else if dims.len() == 1 {
        |x| 0.1 * x
    } else {
        |x| x
    };
    // Matrices keep the size of what they multiply.
    let matrix = dims.len() > 1 && role(2.0) == 2.0;
    let divisor = if matrix { (dims[0] as f64).sqrt() } else { 1.0 };
    (0..n)
        .flat_map(|_| {
            let x: f64 = StandardNormal.sample(&mut rng);
            ((role(x) / divisor) as f32).to_le_bytes()
        })
        .collect()
}

fn permutation(rng: &mut ChaCha8Rng, n: i32) -> Vec<i32> {
    let mut all: Vec<i32> = (0..n).collect();
    for i in (1..all.len()).rev() {
        all.swap(i, (rng.next_u64() % (i as u64 + 1)) as usize);
    }
    all
}
