//! Every tiny model opens, its windows are those the table was proved with, and its shards hold each tensor once.
use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use capstan_gguf::{Model, Value};
use capstan_proto::LayerRange;
use capstan_testkit::tiny;

fn range(a: u32, b: u32) -> LayerRange {
    LayerRange::new(a, b).unwrap()
}

fn go_on(_: u64, _: u64) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

fn tiny_model(folder: &Path, name: &str) -> Model {
    let path = folder.join(format!("{name}.gguf"));
    tiny::write(name, &path).unwrap();
    Model::open(&path).unwrap_or_else(|e| panic!("{name}: {e}"))
}

/// Start layers of the finest partition but the first.
fn finest(model: &Model) -> Vec<u32> {
    model.finest_partition().iter().skip(1).map(|r| r.start()).collect()
}

/// What was proved to be exact, in the reference table's words: the cuts of the finest partition.
const FINEST: &[(&str, &[u32])] = &[
    ("llama", &[1, 2, 3, 4, 5, 6, 7]),
    ("qwen2", &[1, 2, 3, 4, 5, 6, 7]),
    ("qwen3", &[1, 2, 3, 4, 5, 6, 7]),
    ("qwen3moe", &[1, 2, 3, 4, 5, 6, 7]),
    ("glm4moe", &[1, 2, 3, 4, 5, 6, 7]),
    ("glm4moe-mtp", &[1, 2, 3, 4, 5, 6, 7]),
    ("minimax-m2", &[1, 2, 3, 4, 5, 6, 7]),
    ("deepseek2", &[1, 2, 3, 4, 5, 6, 7]),
    ("deepseek32", &[1, 2, 3, 4, 5, 6, 7]),
    ("deepseek32-mtp", &[1, 2, 3, 4, 5, 6, 7]),
    ("qwen3vl", &[1, 2, 3, 4, 5, 6, 7]),
    ("falcon-h1", &[1, 2, 3, 4, 5]),
    ("mamba", &[1, 2, 3, 4, 5]),
    ("gpt-oss", &[1, 3, 5]), // full attention in every second layer: each stage starts at or before a sliding one
    ("llama4", &[4]),
    ("smollm3", &[4]),
    ("smallthinker", &[8]),
    ("ernie4_5-moe-step2", &[2, 4, 6]),
    ("minimax-m3", &[3, 4, 5, 6, 7]),
    ("glm-dsa-shared", &[1, 4, 6]),
    ("gemma3-number", &[1, 2, 4, 5, 7]),
];

/// How many stages of at least so many the mixed models allow, where several partitions are equally fine.
const STAGES: &[(&str, usize)] = &[
    ("gpt-oss", 4),
    ("gemma3", 7),
    ("qwen35moe", 2),
    ("kimi-linear", 2),
    ("jamba", 2),
    ("nemotron_h", 2),
    ("lfm2", 2),
];

#[test]
fn windows_are_those_of_the_reference() {
    let folder = tempfile::tempdir().unwrap();
    for (name, cuts) in FINEST {
        let model = tiny_model(folder.path(), name);
        let found = finest(&model);
        assert_eq!(found.len(), cuts.len(), "{name}: {found:?}");
        // The same cuts as the reference are allowed, whichever partition of that size was found.
        let mut edges = vec![0];
        edges.extend(*cuts);
        edges.push(model.n_layers());
        for w in edges.windows(2) {
            assert_eq!(model.window_problem(range(w[0], w[1])), None, "{name} {w:?}");
        }
        assert_eq!(model.split_problem(), None, "{name}");
    }
    for (name, stages) in STAGES {
        let model = tiny_model(folder.path(), name);
        assert_eq!(model.finest_partition().len(), *stages, "{name}: {:?}", model.finest_partition());
    }
    let refused = [
        ("deepseek2-30", 0, 26, "26 layers"),
        ("deepseek2-30", 3, 30, "27 layers"),
        ("smallthinker", 0, 4, "4 layers"),
        ("qwen35moe", 0, 3, "hybrid"),
        ("gpt-oss", 1, 2, "sliding"),
        ("llama4", 0, 2, "4 layers"),
        ("glm-dsa-shared", 2, 8, "indexer"),
        ("glm-dsa-1m", 3, 10, "indexer"),
        ("minimax-m3", 0, 2, "sparse"),
        ("dots3note", 1, 3, "full-attention"),
        ("llama", 0, 9, "only the layers 0..8"),
    ];
    for (name, a, b, why) in refused {
        let model = tiny_model(folder.path(), name);
        let reason = model.window_problem(range(a, b)).unwrap_or_default();
        assert!(reason.contains(why), "{name} {a}..{b}: {reason:?}");
    }
    let whole = [
        "gemma",
        "gemma2",
        "afmoe",
        "bloom",
        "muse-glimmer",
        "hy_v4",
        "deepseek4",
        "qwen4exp",
        "glm5-next",
        "kimi-k3",
        "minimax-01",
        "rwkv7",
        "arwkv7",
        "gemma3n",
        "gemma4-e",
        "minicpm3",
        "talkie",
        "glm4",
        "exaone4-64",
        "gemma3-62",
        "command-r-64",
    ];
    for name in whole {
        let model = tiny_model(folder.path(), name);
        let reason = model.split_problem().unwrap_or_else(|| panic!("{name} should run whole"));
        assert!(reason.len() > 20 && model.single_cuts().is_empty(), "{name}: {reason}");
        assert_eq!(model.finest_partition(), [model.all_layers()], "{name}");
        assert_eq!(model.window_problem(model.all_layers()), None, "{name}");
    }
    assert_eq!(tiny_model(folder.path(), "glm4-mrope").split_problem(), None);
}

/// A tensor's bytes under its name in the whole model.
fn contents(model: &Model, start: u32) -> BTreeMap<String, Vec<u8>> {
    let whole_name = |t: &capstan_gguf::TensorInfo| match t.layer() {
        Some((i, rest)) => format!("blk.{}.{rest}", i + start),
        None => t.name.clone(),
    };
    model.tensors().iter().map(|t| (whole_name(t), model.tensor_data(t).to_vec())).collect()
}

#[test]
fn the_finest_shards_of_every_model_hold_each_layer_once() {
    let folder = tempfile::tempdir().unwrap();
    let shard_path: PathBuf = folder.path().join("shard.gguf");
    let mut split = 0;
    for name in tiny::names() {
        let model = tiny_model(folder.path(), name);
        let whole = contents(&model, 0);
        let parts = model.finest_partition();
        assert_eq!(parts.first().map(|r| r.start()), Some(0), "{name}");
        assert_eq!(parts.last().map(|r| r.end()), Some(model.n_layers()), "{name}");
        split += usize::from(parts.len() > 1);
        let mut seen = BTreeMap::new();
        for part in &parts {
            let info =
                model.write_shard(*part, &shard_path, &mut go_on).unwrap_or_else(|e| panic!("{name} {part}: {e}"));
            assert_eq!(info.bytes, model.shard_bytes(*part), "{name} {part}");
            let shard = Model::open(&shard_path).unwrap_or_else(|e| panic!("{name} {part}: {e}"));
            check_metadata(name, &model, &shard, *part);
            for (tensor, bytes) in contents(&shard, part.start()) {
                if tensor.starts_with("blk.") {
                    assert_eq!(whole.get(&tensor), Some(&bytes), "{name} {part} {tensor}");
                    assert_eq!(seen.insert(tensor.clone(), ()), None, "{name} {part} {tensor} is in two shards");
                } else if part.end() == model.n_layers() && tensor != "position_embd.weight" {
                    assert_eq!(whole.get(&tensor), Some(&bytes), "{name} {part} {tensor}");
                }
            }
        }
        let trunk = |t: &&String| match t.strip_prefix("blk.").and_then(|r| r.split('.').next()) {
            Some(i) => parts.len() == 1 || i.parse::<u32>().unwrap() < model.n_layers(),
            None => false,
        };
        assert!(whole.keys().filter(trunk).all(|t| seen.contains_key(t)), "{name}: a layer is in no shard");
        std::fs::remove_file(folder.path().join(format!("{name}.gguf"))).unwrap();
    }
    assert!(split >= 110, "only {split} models can be split");
}

fn check_metadata(name: &str, model: &Model, shard: &Model, part: LayerRange) {
    let arch = model.architecture();
    assert_eq!(shard.architecture(), arch);
    assert_eq!(shard.n_layers(), part.count(), "{name} {part}");
    assert_eq!(shard.metadata().get_str("general.name"), model.metadata().get_str("general.name"));
    if part.count() == model.n_layers() {
        return;
    }
    assert_eq!(shard.metadata().get(&format!("{arch}.nextn_predict_layers")), None);
    let last = part.end() == model.n_layers();
    let io = model.window_io(part);
    assert_eq!(io.capture.is_none(), last, "{name} {part}");
    assert_eq!(io.hidden_width, model.n_embd());
    let tokenizer = shard.metadata().get("tokenizer.ggml.model");
    if last {
        assert_eq!(tokenizer, Some(&Value::String("test".into())));
        assert_eq!(shard.n_vocab(), model.n_vocab());
    } else {
        assert_eq!(tokenizer, Some(&Value::String("none".into())));
        assert_eq!(shard.metadata().iter().filter(|(k, _)| k.starts_with("tokenizer.")).count(), 1, "{name} {part}");
        assert_eq!(shard.n_vocab(), 32);
        let table = shard.tensor("token_embd.weight").unwrap();
        assert!(shard.tensor_data(table).iter().all(|b| *b == 0));
    }
    for (key, value) in shard.metadata().iter() {
        if let (Some(cut), Some(old)) = (value.as_array(), model.metadata().get_array(key))
            && cut.len() != old.len()
        {
            assert_eq!(cut.len(), u64::from(part.count()), "{name} {part} {key}");
            for i in 0..cut.len() {
                assert_eq!(cut.get(i), old.get(i + u64::from(part.start())), "{name} {part} {key} {i}");
            }
        }
    }
}

#[test]
fn the_metadata_of_windows_says_what_was_implicit() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("shard.gguf");
    let cut = |name: &str, a: u32, b: u32| {
        tiny_model(folder.path(), name).write_shard(range(a, b), &path, &mut go_on).unwrap();
        Model::open(&path).unwrap()
    };
    let list = |m: &Model, key: &str| m.metadata().get_array(key).and_then(|a| a.integers()).unwrap_or_default();
    let gpt_oss = cut("gpt-oss", 1, 4);
    assert_eq!(list(&gpt_oss, "gpt-oss.attention.sliding_window_pattern"), [0, 1, 0]);
    assert_eq!(gpt_oss.metadata().get_u32("gpt-oss.leading_dense_block_count"), Some(0));
    assert_eq!(gpt_oss.tensor("output.weight").unwrap().dims[..2], [64, 32]);
    let qwen = cut("qwen35moe-mtp", 2, 6);
    assert_eq!(list(&qwen, "qwen35moe.attention.recurrent_layers"), [1, 0, 1, 1]);
    let glm = cut("glm4moe", 2, 6);
    assert_eq!(list(&glm, "glm4moe.rope.dimension_sections"), [6, 1, 1, 0]);
    assert_eq!(glm.metadata().get_u32("glm4moe.leading_dense_block_count"), Some(1));
    let granite = cut("granite", 1, 3);
    assert_eq!(granite.metadata().get_f32("granite.embedding_scale"), Some(1.0));
    assert_eq!(cut("granite", 0, 3).metadata().get_f32("granite.embedding_scale"), Some(12.0));
    assert_eq!(cut("grok", 1, 3).metadata().get_f32("grok.embedding_scale"), Some(1.0));
    assert_eq!(cut("grok", 0, 3).metadata().get_f32("grok.embedding_scale"), None);
    let minicpm = cut("minicpm-old", 1, 3).metadata().get_f32("minicpm.residual_scale").unwrap();
    assert_eq!(minicpm, 1.4 / 8f32.sqrt());
    let gpt2 = cut("gpt2", 3, 5);
    assert!(gpt2.tensor_data(gpt2.tensor("position_embd.weight").unwrap()).iter().all(|b| *b == 0));
    assert_eq!(cut("phi2", 0, 2).tensor("output.bias").unwrap().dims[0], 32);
    assert_eq!(list(&cut("apertus", 2, 4), "xielu.eps").len(), 0, "floats are not integers");
    assert_eq!(cut("apertus", 2, 4).metadata().get_array("xielu.beta").unwrap().get(1), Some(Value::F32(0.3)));
    assert!(cut("gemma4", 0, 3).tensor("rope_freqs.weight").is_none());
    let gemma = tiny_model(folder.path(), "gemma3");
    assert_eq!(gemma.window_io(range(0, 3)).embedding_scale, 8.0);
    assert_eq!(gemma.window_io(range(0, 3)).capture.as_deref(), Some("l_out-2"));
    let step = tiny_model(folder.path(), "step35");
    assert_eq!(step.window_io(range(0, 3)).capture.as_deref(), Some("h_nextn"));
}

#[test]
fn profiles_count_what_llama_cpp_allocates() {
    let folder = tempfile::tempdir().unwrap();
    let profile = |name: &str| tiny_model(folder.path(), name).profile();
    let llama = profile("llama");
    assert_eq!(llama.layers.len(), 8);
    assert!(llama.layers.iter().all(|l| l.kv_bytes_per_token == 2 * (16 + 16) * 2 && l.recurrent_state_bytes == 0));
    assert_eq!(llama.layers[0].active_bytes, llama.layers[0].weight_bytes);
    let moe = &profile("llama-moe").layers[3];
    assert!(moe.active_bytes < moe.weight_bytes && moe.active_bytes > moe.weight_bytes * 3 / 8);
    // Latent attention: 32 latent and 8 rope floats, no values.
    assert!(profile("deepseek2").layers.iter().all(|l| l.kv_bytes_per_token == 40 * 2));
    assert!(profile("deepseek32").layers.iter().all(|l| l.kv_bytes_per_token == (40 + 128) * 2));
    let hybrid = profile("qwen35moe");
    let kinds: Vec<bool> = hybrid.layers.iter().map(|l| l.kv_bytes_per_token == 0).collect();
    assert_eq!(kinds, [true, true, true, false, true, true, true, false]);
    assert!(hybrid.layers.iter().all(|l| (l.recurrent_state_bytes > 0) == (l.kv_bytes_per_token == 0)));
    let mamba = &profile("mamba").layers[0];
    assert_eq!((mamba.kv_bytes_per_token, mamba.recurrent_state_bytes > 0), (0, true));
    let tied = profile("gemma3");
    assert!(tied.tied && tied.output_bytes > tied.embedding_bytes);
}

#[test]
fn what_is_active_is_what_all_read_and_the_share_of_the_experts() {
    let mut with_experts = 0;
    for name in tiny::names() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.gguf");
        tiny::write(name, &path).unwrap();
        let profile = Model::open(&path).unwrap().profile();
        for (i, l) in profile.layers.iter().enumerate() {
            let used = l.expert_bytes.checked_div(u64::from(l.experts)).unwrap_or(0) * u64::from(l.experts_used);
            assert!(l.active_bytes.abs_diff(l.shared_bytes() + used) <= u64::from(l.experts), "{name} layer {i}");
            assert!((l.distinct_experts(1) - f64::from(l.experts_used)).abs() < 1e-6, "{name} layer {i}");
            assert!(l.shared_weights() > 0 && l.experts_used <= l.experts);
            with_experts += usize::from(l.experts > 0);
            // Whoever caches keys also looks at them.
            assert_eq!(l.kv_bytes_per_token > 0, l.attention_flops_per_position > 0, "{name} layer {i}");
        }
        assert!(profile.total_weights > 0);
    }
    assert!(with_experts > 50, "{with_experts}");
}
