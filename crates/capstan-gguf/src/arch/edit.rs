//! The metadata of a window: counts shifted, lists cut, patterns that were implicit written out.
use capstan_proto::LayerRange;

use super::windows::{Facts, Windows, glm_5_2_indexer, interval};
use super::{Mixer, Quirk, table};
use crate::metadata::{Array, Metadata, Value};

/// Rows of the embedding table of a stage that never reads it; llama.cpp wants one, and its head of 32 costs nothing.
pub const HEADLESS_VOCABULARY: u32 = 32;

/// The metadata of layers `range` of a model with `n` layers. `headless` drops the vocabulary.
pub fn window(meta: &Metadata, arch: &str, windows: &Windows, n: u32, range: LayerRange, headless: bool) -> Metadata {
    let f = Facts { meta, arch };
    let (a, b) = (range.start(), range.end());
    let mut out = meta.clone();
    let mut put = |bare: &str, value: Value| out.insert(f.key(bare), value);
    put("block_count", Value::U32(range.count()));
    if let Some(dense) = f.u32("leading_dense_block_count") {
        put("leading_dense_block_count", Value::U32(dense.min(b).saturating_sub(a)));
    }
    for (key, value) in meta.iter() {
        let bare = key.strip_prefix(arch).and_then(|k| k.strip_prefix('.'));
        let per_layer = bare.is_some_and(|k| table::PER_LAYER.contains(&k)) || table::PER_LAYER_BARE.contains(&key);
        if per_layer
            && let Some(array) = value.as_array()
            && let Some(cut) = array.select((a..b).map(u64::from))
        {
            out.insert(key, Value::Array(cut));
        }
    }
    rules(&f, windows, n, range, &mut out);
    out.remove(&f.key("nextn_predict_layers"));
    out.retain(|k| !k.starts_with("split."));
    if headless {
        out.retain(|k| !k.starts_with("tokenizer."));
        out.insert("tokenizer.ggml.model", Value::String("none".into()));
        out.insert(f.key("vocab_size"), Value::U32(HEADLESS_VOCABULARY));
    }
    out
}

fn rules(f: &Facts<'_>, windows: &Windows, n: u32, range: LayerRange, out: &mut Metadata) {
    let Some(rules) = windows.rules() else { return };
    let layers = range.start()..range.end();
    let first = range.start() == 0;
    let mut put = |bare: &str, value: Value| out.insert(f.key(bare), value);
    let bools = |values: Vec<bool>| Value::Array(Array::from_bool(values));

    let key = "attention.sliding_window_pattern";
    if let Some(swa) = rules.swa.filter(|_| f.list(key).is_none()) {
        let period = f.u32(key).unwrap_or(swa.period);
        put(key, bools(layers.clone().map(|i| swa.is_sliding(i, period)).collect()));
    }
    let key = "attention.recurrent_layers";
    if let Mixer::ByInterval(default) = rules.mixer
        && f.list(key).is_none()
    {
        let period = interval(f, default);
        put(key, bools(layers.clone().map(|i| (i + 1) % period != 0).collect()));
    }
    if !first && (f.has("embedding_scale") || rules.has(Quirk::ScaleByDefault)) {
        put("embedding_scale", Value::F32(1.0));
    }
    if rules.has(Quirk::WriteSections) && !f.has_sections() {
        let rot = f.u32("rope.dimension_count").or_else(|| f.u32("attention.key_length")).unwrap_or(64);
        put("rope.dimension_sections", Value::Array(Array::from_u32([(rot / 2).saturating_sub(2), 1, 1, 0])));
    }
    if rules.has(Quirk::IndexerTable)
        && f.list("attention.indexer.types").is_none()
        && f.u32("context_length").unwrap_or(0) >= 1 << 20
    {
        let types = layers.clone().map(|i| u32::from(glm_5_2_indexer(i)));
        put("attention.indexer.types", Value::Array(Array::from_u32(types)));
    }
    if rules.has(Quirk::ResidualScaleByCount) && f.f32("residual_scale").is_none() {
        put("residual_scale", Value::F32(1.4 / (n as f32).sqrt()));
    }
    if rules.has(Quirk::DeepSeekCounts) && f.u32("expert_gating_func").unwrap_or(0) == 0 {
        let sigmoid = matches!(n, 47 | 48) && f.vocabulary() == 154_880;
        put("expert_gating_func", Value::U32(if sigmoid { 2 } else { 1 }));
    }
    // Text only: what deepstack would add is zero, and without the key the input's rows have the plain width.
    out.remove(&f.key("n_deepstack_layers"));
}
