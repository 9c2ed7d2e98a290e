//! What the shard of a layer range contains: its metadata, and for each tensor where its data comes from.
//!
//! A stage that is not the last has no head and no vocabulary: the graph ends before them, and hidden states enter as
//! embeddings, also at the first stage. llama.cpp still wants the tensors, so it gets small ones of zeros.
use capstan_proto::LayerRange;

use crate::arch::edit::{self, HEADLESS_VOCABULARY};
use crate::arch::{Quirk, Rules};
use crate::model::Model;
use crate::parse::TensorInfo;
use crate::types;
use crate::writer::NewTensor;
use crate::{GgufError, Metadata};

/// Where a tensor's data comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// The model's tensor with this index.
    Model(usize),
    /// Zeros.
    Zeros,
}

/// The contents of a shard.
#[derive(Clone, Debug)]
pub struct Cut {
    /// Keys and values.
    pub metadata: Metadata,
    /// Tensors in file order.
    pub tensors: Vec<(NewTensor, Source)>,
}

/// What the shard of `range` contains; an error when the range cannot be a stage.
pub fn cut(model: &Model, range: LayerRange) -> Result<Cut, GgufError> {
    cut_as(model, range, range.end() < model.n_layers())
}

/// A smaller model: only the layers of `range`, with the vocabulary and the head. Under the same rules as a stage.
pub fn excerpt(model: &Model, range: LayerRange) -> Result<Cut, GgufError> {
    cut_as(model, range, false)
}

fn cut_as(model: &Model, range: LayerRange, headless: bool) -> Result<Cut, GgufError> {
    let n = model.n_layers();
    if range.end() > n {
        return Err(GgufError::OutOfRange { range, n_layers: n });
    }
    if let Some(reason) = model.window_problem(range) {
        return Err(GgufError::Window { range, reason });
    }
    let source = |i: usize, t: &TensorInfo, name: String| {
        let dims = t.dims[..t.n_dims.max(1) as usize].to_vec();
        (NewTensor { name, dims, ggml_type: t.ggml_type }, Source::Model(i))
    };
    let (true, Some(rules)) = (range.count() < n, model.windows().rules()) else {
        // The whole model as it is, extra prediction layers included; only the splits are joined.
        let mut metadata = model.metadata().clone();
        metadata.retain(|k| !k.starts_with("split."));
        let tensors = model.tensors().iter().enumerate().map(|(i, t)| source(i, t, t.name.clone())).collect();
        return Ok(Cut { metadata, tensors });
    };
    let metadata = edit::window(model.metadata(), model.architecture(), model.windows(), n, range, headless);
    let mut tensors = Vec::new();
    for (i, t) in model.tensors().iter().enumerate() {
        let Some((layer, rest)) = t.layer() else {
            if !unused(&t.name, rules, model, range, headless) {
                let mut tensor = source(i, t, t.name.clone());
                if t.name == "position_embd.weight" && range.start() > 0 && rules.has(Quirk::ZeroPositions) {
                    tensor.1 = Source::Zeros;
                }
                tensors.push(tensor);
            }
            continue;
        };
        if range.contains(layer) {
            tensors.push(source(i, t, format!("blk.{}.{rest}", layer - range.start())));
        }
    }
    if headless {
        let (rows, width) = (u64::from(HEADLESS_VOCABULARY), u64::from(model.n_embd()));
        let mut zeros = |name: &str, dims: Vec<u64>, ggml_type| {
            tensors.push((NewTensor { name: name.into(), dims, ggml_type }, Source::Zeros));
        };
        zeros("token_embd.weight", vec![width, rows], types::F16);
        if rules.output_required && model.tensor("output.weight").is_some() {
            zeros("output.weight", vec![width, rows], types::F16);
        }
        if rules.has(Quirk::ZeroOutputBias) {
            zeros("output.bias", vec![rows], types::F32);
        }
    }
    Ok(Cut { metadata, tensors })
}

/// Whether a tensor outside the layers has no place in the shard. An unused tensor is a load error.
fn unused(name: &str, rules: &Rules, model: &Model, range: LayerRange, headless: bool) -> bool {
    if headless && (name.starts_with("token_embd.") || name.starts_with("output.")) {
        return true;
    }
    let window = range.start() as usize..range.end() as usize;
    name == "rope_freqs.weight"
        && rules.has(Quirk::FreqsOnlyWithFull)
        && model.windows().sliding().and_then(|s| s.get(window)).is_some_and(|s| s.iter().all(|s| *s))
}
