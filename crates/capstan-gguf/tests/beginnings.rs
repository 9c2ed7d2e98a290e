//! Models whose files are elsewhere, and weights that are made up for their headers.
use std::ops::ControlFlow;
use std::path::Path;

use capstan_gguf::beginnings::{Beginning, FIRST_BYTES, Known, read};
use capstan_gguf::synthetic::Routing;
use capstan_gguf::writer::{self, NewTensor};
use capstan_gguf::{GgufError, Metadata, Model, Value, synthetic, types};
use capstan_proto::LayerRange;
use capstan_testkit::tiny;
use proptest::prelude::*;

fn tiny(dir: &Path, name: &str) -> Vec<u8> {
    let path = dir.join("tiny.gguf");
    tiny::write(name, &path).unwrap();
    std::fs::read(path).unwrap()
}

fn beginning(bytes: &[u8], here: usize) -> Beginning {
    Beginning { path: "there.gguf".into(), bytes: bytes[..here].to_vec(), file_bytes: bytes.len() as u64 }
}

/// A model that asks for more of its header than [`FIRST_BYTES`], in parts.
fn parts(count: u32) -> Vec<Vec<u8>> {
    let part = |no: u32| {
        let mut metadata = Metadata::new();
        metadata.insert("split.no", Value::U16(no as u16));
        metadata.insert("split.count", Value::U16(count as u16));
        if no == 0 {
            metadata.insert("general.architecture", Value::String("llama".into()));
            metadata.insert("llama.block_count", Value::U32(count));
            metadata.insert("tokenizer.chat_template", Value::String(" ".repeat(3 * FIRST_BYTES as usize)));
        }
        let name = if no == 0 { "token_embd.weight".to_owned() } else { format!("blk.{no}.attn_norm.weight") };
        let tensors = [NewTensor { name, dims: vec![64, 4], ggml_type: types::F32 }];
        let mut out = Vec::new();
        writer::write(&mut out, &metadata, &tensors, |_| vec![0; 1024]).unwrap();
        out
    };
    (0..count).map(part).collect()
}

#[test]
fn a_header_is_asked_for_until_it_is_whole() {
    let dir = tempfile::tempdir().unwrap();
    let file = tiny(dir.path(), "deepseek2");
    let whole = Model::open(&dir.path().join("tiny.gguf")).unwrap();
    let (mut here, mut asked) = (3, 0);
    let model = loop {
        match read(&[beginning(&file, here)]).unwrap() {
            Known::Model(model) => break model,
            Known::More { file: 0, bytes } => {
                assert!(bytes > here as u64 && bytes <= file.len() as u64);
                // As if a server gave no more than was asked for, and at first far less.
                here = if asked < 6 { here * 4 } else { bytes as usize };
                asked += 1;
            }
            other => panic!("{other:?}"),
        }
    };
    assert!(asked > 2);
    assert_eq!((model.tensors(), model.profile()), (whole.tensors(), whole.profile()));
    assert_eq!(model.bytes(), file.len() as u64);
}

#[test]
fn the_other_parts_are_named_and_read() {
    let all = parts(3);
    let part = |no: usize, here: usize| Beginning {
        path: format!("hf/m-{:05}-of-00003.gguf", no + 1).into(),
        ..beginning(&all[no], here.min(all[no].len()))
    };
    let Known::More { file: 0, bytes } = read(&[part(0, FIRST_BYTES as usize)]).unwrap() else { panic!() };
    assert!(bytes >= 2 * FIRST_BYTES);
    let first = part(0, usize::MAX);
    let Known::Files(others) = read(std::slice::from_ref(&first)).unwrap() else { panic!() };
    assert_eq!(others, ["hf/m-00002-of-00003.gguf", "hf/m-00003-of-00003.gguf"].map(std::path::PathBuf::from));
    let Known::More { file: 2, .. } = read(&[first.clone(), part(1, usize::MAX), part(2, 8)]).unwrap() else {
        panic!()
    };
    let Known::Model(model) = read(&[first.clone(), part(1, usize::MAX), part(2, usize::MAX)]).unwrap() else {
        panic!()
    };
    assert_eq!((model.n_layers(), model.tensors().len()), (3, 3));
    let nameless = Beginning { path: "m.gguf".into(), ..first.clone() };
    assert!(matches!(read(&[nameless]), Err(GgufError::Split { .. })));
    assert!(matches!(read(&[first, part(2, usize::MAX)]), Err(GgufError::Split { .. })));
}

#[test]
fn a_file_that_is_too_short_is_an_error_and_no_reason_to_ask_for_more() {
    let dir = tempfile::tempdir().unwrap();
    let file = tiny(dir.path(), "llama");
    let lies = |file_bytes: u64| Beginning { file_bytes, ..beginning(&file, file.len() / 2) };
    assert!(matches!(read(&[lies(file.len() as u64 - 1)]), Err(GgufError::Truncated { .. })));
    assert!(matches!(read(&[Beginning { bytes: b"GGML".to_vec(), ..lies(100) }]), Err(GgufError::NotGguf(_))));
    let mut endless = b"GGUF\x03\0\0\0\0\0\0\0\0\0\0\0\x01\0\0\0\0\0\0\0\x01\0\0\0\0\0\0\0k".to_vec();
    endless.extend(9u32.to_le_bytes());
    endless.extend(10u32.to_le_bytes());
    endless.extend((1u64 << 28).to_le_bytes());
    let endless = Beginning { path: "e".into(), bytes: endless, file_bytes: 1 << 40 };
    assert!(matches!(read(&[endless]), Err(GgufError::Limit { .. })));
    assert!(read(&[]).is_err());
}

proptest! {
    #[test]
    fn any_beginning_is_a_model_or_asks_for_more(cut in 0.0f64..1.0, flip in 0usize..400, with in any::<u8>()) {
        let mut file = parts(1).remove(0);
        file[flip] ^= with;
        let here = (file.len() as f64 * cut) as usize;
        if let Ok(Known::More { bytes, .. }) = read(&[beginning(&file, here)]) {
            prop_assert!(bytes > here as u64 && bytes <= file.len() as u64);
        }
    }
}

#[test]
fn made_up_weights_make_a_file_of_the_right_size_and_shape_that_is_mostly_holes() {
    let dir = tempfile::tempdir().unwrap();
    // Wide enough that its experts are worth leaving out.
    let mut metadata = Metadata::new();
    metadata.insert("general.architecture", Value::String("llama".into()));
    metadata.insert("llama.block_count", Value::U32(1));
    let tensor = |name: &str, dims: &[u64], ggml_type| NewTensor { name: name.into(), dims: dims.to_vec(), ggml_type };
    let tensors = [
        tensor("token_embd.weight", &[256, 100], 12),
        tensor("blk.0.attn_norm.weight", &[256], types::F32),
        tensor("blk.0.ffn_gate_inp.weight", &[256, 8], types::F32),
        tensor("blk.0.ffn_down_exps.weight", &[2048, 2048, 8], 10),
    ];
    let layout = writer::layout(&metadata, &tensors, None).unwrap();
    let path = dir.path().join("made-up.gguf");
    let mut go_on = |_, _| ControlFlow::Continue(());
    let written = synthetic::write(&layout.header, layout.total, Routing::Spread, &path, &mut go_on).unwrap();
    let model = Model::open(&path).unwrap();
    assert_eq!(model.bytes(), layout.total);
    assert!(written < layout.total / 50);
    #[cfg(unix)]
    assert!(std::os::unix::fs::MetadataExt::blocks(&std::fs::metadata(&path).unwrap()) * 512 < layout.total / 10);
    let data = |name: &str| model.tensor_data(model.tensor(name).unwrap());
    let floats = |name: &str| data(name).chunks_exact(4).map(|c| f32::from_le_bytes(c.try_into().unwrap())).collect();
    let (norm, router): (Vec<f32>, Vec<f32>) = (floats("blk.0.attn_norm.weight"), floats("blk.0.ffn_gate_inp.weight"));
    assert!(norm.iter().all(|x| *x == 1.0));
    assert!(router.iter().all(|x| x.abs() <= 1.0 / 16.0) && router.iter().any(|x| *x < 0.0) && router[0] != router[1]);
    assert!(data("token_embd.weight").iter().all(|b| (0x08..=0x2f).contains(b)));
    assert!(data("blk.0.ffn_down_exps.weight").iter().all(|b| *b == 0));

    // With the same experts for every token the routers are holes, too.
    let same = synthetic::write(&layout.header, layout.total, Routing::Same, &path, &mut go_on).unwrap();
    assert_eq!(written - same, 256 * 8 * 4);

    let stopped = dir.path().join("stopped.gguf");
    let stop =
        synthetic::write(&layout.header, layout.total, Routing::Spread, &stopped, &mut |_, _| ControlFlow::Break(()));
    assert!(matches!(stop, Err(GgufError::Cancelled(_))));
    let half = &layout.header[..layout.header.len() / 2];
    let long = synthetic::write(&layout.header, 1 << 50, Routing::Spread, &stopped, &mut go_on);
    assert!(matches!(long, Err(GgufError::Malformed { .. })), "more than its tensors account for");
    let norm = [tensor("token_embd.weight", &[256, 100], 12), tensor("blk.0.attn_norm.weight", &[1 << 40], types::F32)];
    let greedy = writer::layout(&metadata, &norm, None).unwrap();
    let greedy = synthetic::write(&greedy.header, greedy.total, Routing::Spread, &stopped, &mut go_on);
    assert!(matches!(greedy, Err(GgufError::Limit { .. })), "a norm must not fill the disk");
    assert!(matches!(
        synthetic::write(half, layout.total, Routing::Spread, &stopped, &mut go_on),
        Err(GgufError::Malformed { .. })
    ));
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1, "nothing half-written is left");
}

#[test]
fn a_shards_header_is_that_of_the_shard() {
    let dir = tempfile::tempdir().unwrap();
    tiny(dir.path(), "qwen3moe");
    let model = Model::open(&dir.path().join("tiny.gguf")).unwrap();
    for range in [LayerRange::new(0, 1).unwrap(), LayerRange::new(1, model.n_layers()).unwrap()] {
        let path = dir.path().join("shard.gguf");
        let info = model.write_shard(range, &path, &mut |_, _| ControlFlow::Continue(())).unwrap();
        let (header, file_bytes) = model.shard_header(range).unwrap();
        assert_eq!(file_bytes, info.bytes);
        assert!(std::fs::read(&path).unwrap().starts_with(&header));
    }
}
