//! The real model: its shards are small, share its blocks, and hold no vocabulary.
use std::ops::ControlFlow;

use capstan_gguf::{Model, types};
use capstan_proto::LayerRange;
use capstan_testkit::models;

#[test]
fn shards_of_smollm2_keep_their_places_within_blocks() {
    let model = Model::open(&models::smollm2()).unwrap();
    assert_eq!((model.architecture(), model.n_layers(), model.n_embd()), ("llama", 30, 576));
    let profile = model.profile();
    assert_eq!(profile.context_train, 8192);
    assert!(profile.layers.iter().all(|l| l.kv_bytes_per_token == 3 * (64 + 64) * 2));
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("shard.gguf");
    for (a, b) in [(0, 10), (10, 20), (20, 30), (7, 8), (0, 30)] {
        let range = LayerRange::new(a, b).unwrap();
        let info = model.write_shard(range, &path, &mut |_, _| ControlFlow::Continue(())).unwrap();
        let shard = Model::open(&path).unwrap();
        assert_eq!(shard.n_layers(), b - a);
        for t in shard.tensors().iter().filter(|t| t.layer().is_some()) {
            let (i, rest) = t.layer().unwrap();
            let old = model.tensor(&format!("blk.{}.{rest}", i + a)).unwrap();
            assert_eq!(shard.tensor_data(t), model.tensor_data(old), "{}", t.name);
        }
        let weights: u64 = profile.layers[a as usize..b as usize].iter().map(|l| l.weight_bytes).sum();
        let extra = if b == 30 { 40 << 20 } else { 64 << 10 };
        assert!(info.bytes < weights + extra, "{range}: {} bytes for {weights}", info.bytes);
        // This file orders its layers 0, 1, 10, 11, …, so most shards are several runs; one run shares everything.
        let least = if b - a == 10 { 40 } else { 98 };
        assert!(info.shareable_bytes * 100 > info.copied_bytes * least, "{range}: {info:?}");
        if b < 30 {
            let table = shard.tensor("token_embd.weight").unwrap();
            assert_eq!((table.dims[1], table.ggml_type), (32, types::F16));
            assert!(shard.metadata().get("tokenizer.chat_template").is_none());
        } else {
            assert!(shard.metadata().get_str("tokenizer.chat_template").is_some());
        }
    }
}
