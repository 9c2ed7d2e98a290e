//! Files that lie, end early or contradict themselves: a typed error that names the file, never a panic.
use std::io::Write;
use std::ops::ControlFlow;
use std::path::Path;
use std::sync::LazyLock;

use capstan_gguf::writer::{self, NewTensor};
use capstan_gguf::{Array, GgufError, Metadata, Model, Value};
use capstan_proto::LayerRange;
use proptest::prelude::*;

fn metadata() -> Metadata {
    let mut m = Metadata::new();
    m.insert("general.architecture", Value::String("llama".into()));
    m.insert("llama.block_count", Value::U32(3));
    m.insert("llama.embedding_length", Value::U32(32));
    m.insert("llama.attention.head_count", Value::Array(Array::from_u32([4, 4, 4])));
    m.insert("tokenizer.ggml.tokens", Value::Array(Array::from_strings(["a", "b", "c", "d"])));
    for (i, value) in [Value::U8(1), Value::I8(-1), Value::U16(2), Value::I16(-2), Value::I32(-3), Value::F32(0.5)]
        .into_iter()
        .chain([Value::Bool(true), Value::U64(1 << 40), Value::I64(-1), Value::F64(0.25)])
        .enumerate()
    {
        m.insert(format!("every.kind.{i}"), value);
    }
    m
}

fn tensors() -> Vec<NewTensor> {
    let tensor = |name: &str, dims: &[u64], ggml_type| NewTensor { name: name.into(), dims: dims.to_vec(), ggml_type };
    let mut all = vec![tensor("token_embd.weight", &[32, 4], 8), tensor("output_norm.weight", &[32], 0)];
    for i in 0..3 {
        all.push(tensor(&format!("blk.{i}.attn_q.weight"), &[32, 3], 2));
        all.push(tensor(&format!("blk.{i}.attn_norm.weight"), &[32], 0));
    }
    all
}

fn file(metadata: &Metadata, tensors: &[NewTensor]) -> Vec<u8> {
    let mut out = Vec::new();
    let data = |i: usize| (0..tensors[i].bytes().unwrap()).map(|b| (b as usize * 7 + i) as u8).collect();
    writer::write(&mut out, metadata, tensors, data).unwrap();
    out
}

static GOOD: LazyLock<Vec<u8>> = LazyLock::new(|| file(&metadata(), &tensors()));

fn open(bytes: Vec<u8>) -> Result<Model, GgufError> {
    Model::from_memory(Path::new("some/model.gguf"), bytes)
}

fn refusal(bytes: Vec<u8>) -> String {
    let error = open(bytes).map(|_| ()).expect_err("the file is bad").to_string();
    assert!(error.contains("some/model.gguf"), "{error}");
    error
}

/// Header of a file with these counts, then whatever follows.
fn raw(version: u32, tensors: u64, keys: u64, rest: &[u8]) -> Vec<u8> {
    [b"GGUF".as_slice(), &version.to_le_bytes(), &tensors.to_le_bytes(), &keys.to_le_bytes(), rest].concat()
}

fn string(s: &str) -> Vec<u8> {
    [&(s.len() as u64).to_le_bytes(), s.as_bytes()].concat()
}

#[test]
fn a_good_file_opens_with_all_kinds_of_values() {
    let model = open(GOOD.clone()).unwrap();
    assert_eq!(model.metadata(), &metadata());
    assert_eq!((model.n_layers(), model.n_embd(), model.n_vocab()), (3, 32, 4));
    let tokens: Vec<&[u8]> = model.metadata().get_array("tokenizer.ggml.tokens").unwrap().strings().unwrap().collect();
    assert_eq!(tokens, [b"a", b"b", b"c", b"d"]);
    let t = model.tensor("token_embd.weight").unwrap();
    assert_eq!((t.row_bytes(), t.rows(), model.tensor_row(t, 3).unwrap().len()), (34, 4, 34));
    assert_eq!(model.tensor_row(t, 4), None);
}

#[test]
fn lies_are_refused_before_anything_is_allocated() {
    let huge_array =
        [string("k"), 9u32.to_le_bytes().into(), 4u32.to_le_bytes().into(), (1u64 << 60).to_le_bytes().into()];
    let many_strings =
        [string("k"), 9u32.to_le_bytes().into(), 8u32.to_le_bytes().into(), (1u64 << 29).to_le_bytes().into()];
    let huge_string = [string("k"), 8u32.to_le_bytes().into(), (1u64 << 50).to_le_bytes().into()];
    let nested = [
        string("k"),
        [9u32.to_le_bytes(); 2].concat(),
        [1u64.to_le_bytes().to_vec(), 9u32.to_le_bytes().into()].concat().repeat(20),
    ];
    assert!(refusal(raw(3, 0, 1, &huge_array.concat())).contains("number of elements"));
    assert!(refusal(raw(3, 0, 1, &many_strings.concat())).contains("truncated"));
    assert!(refusal(raw(3, 0, 1, &huge_string.concat())).contains("length of the value of k"));
    assert!(refusal(raw(3, 0, 1, &nested.concat())).contains("arrays in each other"));
    assert!(refusal(raw(3, 1 << 60, 0, &[])).contains("number of tensors"));
    assert!(refusal(raw(3, 1 << 17, 0, &[])).contains("truncated"));
    assert!(refusal(raw(3, 0, 1 << 60, &[])).contains("number of keys"));
    assert!(refusal(raw(1, 0, 0, &[])).contains("version 1"));
    assert!(refusal(raw(4, 0, 0, &[])).contains("version 4"));
    assert!(refusal(raw(3 << 24, 0, 0, &[])).contains("big-endian"));
    assert!(refusal(b"not a model at all, not at all".to_vec()).contains("not a GGUF"));
    assert!(refusal(Vec::new()).contains("not a GGUF"));
    assert!(refusal(raw(3, 0, 0, &[])).contains("no architecture"));
}

#[test]
fn contradictions_are_refused() {
    let key = |k: &str| [string(k), 7u32.to_le_bytes().into(), vec![1]].concat();
    assert!(refusal(raw(3, 0, 2, &[key("a"), key("a")].concat())).contains("twice"));
    assert!(
        refusal(raw(3, 0, 1, &key(""))).contains("no name") || refusal(raw(3, 0, 1, &key(""))).contains("truncated")
    );
    assert!(
        refusal(raw(3, 0, 1, &[string("k"), 99u32.to_le_bytes().into(), vec![0; 9]].concat()))
            .contains("unknown type 99")
    );

    let with = |edit: &dyn Fn(&mut Metadata)| {
        let mut m = metadata();
        edit(&mut m);
        file(&m, &tensors())
    };
    assert!(refusal(with(&|m| m.insert("general.alignment", Value::U32(48)))).contains("power of two"));
    assert!(refusal(with(&|m| m.insert("general.alignment", Value::U32(0)))).contains("power of two"));
    assert!(refusal(with(&|m| m.insert("general.alignment", Value::U64(32)))).contains("32-bit"));
    assert!(refusal(with(&|m| m.insert("llama.block_count", Value::U32(1 << 30)))).contains("block_count"));
    assert!(refusal(with(&|m| m.insert("llama.block_count", Value::U32(2)))).contains("blk.2."));
    assert!(refusal(with(&|m| m.insert("llama.nextn_predict_layers", Value::U32(3)))).contains("layers"));
    assert!(refusal(with(&|m| m.insert("llama.embedding_length", Value::U32(64)))).contains("token_embd"));
    assert!(refusal(with(&|m| m.remove("llama.block_count"))).contains("block_count"));
    assert!(refusal(with(&|m| m.insert("general.architecture", Value::String("a b".into())))).contains("architecture"));

    let with = |edit: &dyn Fn(&mut Vec<u8>, usize)| {
        // The first tensor's description starts with its name; dims, type and offset follow.
        let mut bytes = GOOD.clone();
        let name = b"token_embd.weight";
        let at = bytes.windows(name.len()).position(|w| w == name).unwrap() + name.len();
        edit(&mut bytes, at);
        bytes
    };
    let put = |at: usize, value: &[u8]| {
        let value = value.to_vec();
        with(&move |bytes, start| bytes[start + at..start + at + value.len()].copy_from_slice(&value))
    };
    assert!(refusal(put(0, &9u32.to_le_bytes())).contains("dimensions"));
    assert!(refusal(put(4, &33u64.to_le_bytes())).contains("whole blocks"));
    assert!(refusal(put(4, &(1u64 << 62).to_le_bytes())).contains("overflow"));
    assert!(refusal(put(12, &(1u64 << 40).to_le_bytes())).contains("truncated"));
    assert!(refusal(put(20, &4u32.to_le_bytes())).contains("unknown type 4"));
    assert!(refusal(put(24, &32u64.to_le_bytes())).contains("belongs at 0"));
    let mut twice = tensors();
    twice[3].name = twice[2].name.clone();
    assert!(refusal(file(&metadata(), &twice)).contains("twice"));
    let mut short = GOOD.clone();
    short.truncate(GOOD.len() - 100);
    assert!(refusal(short).contains("truncated"));
}

#[test]
fn what_is_no_file_or_no_whole_model_says_so() {
    let folder = tempfile::tempdir().unwrap();
    let error = |p: &Path| Model::open(p).map(|_| ()).expect_err("not a model").to_string();
    assert!(error(&folder.path().join("nothing.gguf")).contains("cannot open"));
    assert!(error(folder.path()).contains("regular file"));
    let empty = folder.path().join("empty.gguf");
    std::fs::write(&empty, b"").unwrap();
    assert!(error(&empty).contains("not a GGUF"));
}

/// Write the model as three parts, as llama-gguf-split does.
fn split(folder: &Path, total: Option<i32>) -> std::path::PathBuf {
    let all = tensors();
    let mut parts = vec![&all[..2], &all[2..4], &all[4..]].into_iter();
    let source = open(GOOD.clone()).unwrap();
    for no in 0..3u16 {
        let mut m = if no == 0 { metadata() } else { Metadata::new() };
        m.insert("split.no", Value::U16(no));
        m.insert("split.count", Value::U16(3));
        m.insert("split.tensors.count", Value::I32(total.unwrap_or(8)));
        let part = parts.next().unwrap();
        let mut out = std::fs::File::create(folder.join(format!("m-{:05}-of-00003.gguf", no + 1))).unwrap();
        let data = |i: usize| source.tensor_data(source.tensor(&part[i].name).unwrap()).to_vec();
        writer::write(&mut out, &m, part, data).unwrap();
        out.flush().unwrap();
    }
    folder.join("m-00001-of-00003.gguf")
}

#[test]
fn splits_open_as_one_and_are_joined() {
    let folder = tempfile::tempdir().unwrap();
    let first = split(folder.path(), None);
    let model = Model::open(&first).unwrap();
    let single = open(GOOD.clone()).unwrap();
    assert_eq!(model.files().len(), 3);
    let joined_path = folder.path().join("joined.gguf");
    let go_on = &mut |_, _| ControlFlow::Continue(());
    model.write_shard(model.all_layers(), &joined_path, go_on).unwrap();
    let joined = Model::open(&joined_path).unwrap();
    assert_eq!(joined.tensors().len(), single.tensors().len());
    for t in single.tensors() {
        assert_eq!(model.tensor_data(model.tensor(&t.name).unwrap()), single.tensor_data(t), "{}", t.name);
        assert_eq!(joined.tensor_data(joined.tensor(&t.name).unwrap()), single.tensor_data(t), "{}", t.name);
    }
    assert!(joined.metadata().iter().all(|(k, _)| !k.starts_with("split.")));

    let error = |p: &Path| Model::open(p).map(|_| ()).expect_err("a part").to_string();
    let second = folder.path().join("m-00002-of-00003.gguf");
    assert!(error(&second).contains("m-00001-of-00003.gguf"));
    let renamed = folder.path().join("renamed.gguf");
    std::fs::copy(&first, &renamed).unwrap();
    assert!(error(&renamed).contains("name"));
    std::fs::copy(folder.path().join("m-00003-of-00003.gguf"), &second).unwrap();
    assert!(error(&first).contains("split.no 2"));
    std::fs::remove_file(&second).unwrap();
    assert!(error(&first).contains("m-00002-of-00003.gguf is missing"));
    split(folder.path(), Some(9));
    assert!(error(&first).contains("8 tensors, not 9"));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, ..ProptestConfig::default() })]

    /// Whatever a few changed bytes do, the parser answers, and what opens can be read and cut.
    #[test]
    fn mutated_files_never_panic(edits in prop::collection::vec((0..GOOD.len(), any::<u8>()), 1..6), cut in 0..=GOOD.len(), truncate in any::<bool>()) {
        let mut bytes = GOOD.clone();
        for (at, value) in edits {
            bytes[at] = value;
        }
        if truncate {
            bytes.truncate(cut);
        }
        exercise(bytes);
    }

    /// Counts and lengths are where a parser breaks: put extreme numbers anywhere.
    #[test]
    fn extreme_numbers_never_panic(at in 0..GOOD.len() - 8, shift in 0u32..64, less in any::<bool>()) {
        let mut bytes = GOOD.clone();
        let value = (1u64 << shift).wrapping_sub(u64::from(less));
        bytes[at..at + 8].copy_from_slice(&value.to_le_bytes());
        exercise(bytes);
    }

    #[test]
    fn random_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..400), version in 0u32..5) {
        exercise(bytes.clone());
        exercise([b"GGUF".as_slice(), &version.to_le_bytes(), &bytes].concat());
    }
}

fn exercise(bytes: Vec<u8>) {
    match open(bytes) {
        Err(e) => assert!(!e.to_string().is_empty()),
        Ok(model) => {
            model.profile();
            model.split_problem();
            for part in model.finest_partition() {
                model.shard_bytes(part);
            }
            let _ = model.tensors().iter().map(|t| model.tensor_data(t).len()).sum::<usize>();
            for (_, value) in model.metadata().iter() {
                if let Some(strings) = value.as_array().and_then(|a| a.strings()) {
                    strings.count();
                }
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    /// Any cuts: together the shards hold every layer's tensors once, with the same bytes.
    #[test]
    fn partitions_cover_every_tensor_once(layers in 1u32..12, cuts in prop::collection::btree_set(1u32..12, 0..6), alignment in prop::sample::select(vec![1u32, 8, 32, 64, 4096]), rows in 1u64..200) {
        let mut m = metadata();
        m.insert("llama.block_count", Value::U32(layers));
        m.insert("llama.attention.head_count", Value::Array(Array::from_u32((0..layers).map(|i| i + 1))));
        m.insert("general.alignment", Value::U32(alignment));
        let mut all = vec![NewTensor { name: "token_embd.weight".into(), dims: vec![32, rows], ggml_type: 2 }];
        for i in 0..layers {
            all.push(NewTensor { name: format!("blk.{i}.a"), dims: vec![32, rows + u64::from(i)], ggml_type: 3 });
            all.push(NewTensor { name: format!("blk.{i}.b"), dims: vec![7], ggml_type: 0 });
        }
        let folder = tempfile::tempdir().unwrap();
        let source = folder.path().join("model.gguf");
        std::fs::write(&source, file(&m, &all)).unwrap();
        let model = Model::open(&source).unwrap();
        let mut edges: Vec<u32> = cuts.into_iter().filter(|c| *c < layers).collect();
        edges.insert(0, 0);
        edges.push(layers);
        let mut seen = 0;
        for edge in edges.windows(2) {
            let part = LayerRange::new(edge[0], edge[1]).unwrap();
            let path = folder.path().join("shard.gguf");
            let mut last = 0;
            let info = model.write_shard(part, &path, &mut |done, total| { assert!(done >= last && done <= total); last = done; ControlFlow::Continue(()) }).unwrap();
            prop_assert_eq!(last, info.bytes);
            prop_assert_eq!(std::fs::metadata(&path).unwrap().len(), info.bytes);
            let shard = Model::open(&path).unwrap();
            for t in shard.tensors() {
                let Some((i, rest)) = t.layer() else { continue };
                let old = model.tensor(&format!("blk.{}.{rest}", i + part.start())).unwrap();
                prop_assert_eq!(shard.tensor_data(t), model.tensor_data(old));
                prop_assert_eq!((t.dims, t.ggml_type), (old.dims, old.ggml_type));
                seen += 1;
            }
        }
        prop_assert_eq!(seen, 2 * layers);
    }
}

#[test]
fn a_stopped_write_leaves_nothing_behind() {
    let folder = tempfile::tempdir().unwrap();
    let model = open(GOOD.clone()).unwrap();
    let path = folder.path().join("shard.gguf");
    let mut calls = 0;
    let stopped = model.write_shard(LayerRange::new(0, 2).unwrap(), &path, &mut |_, _| {
        calls += 1;
        if calls < 2 { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
    });
    assert!(matches!(stopped, Err(GgufError::Cancelled(_))));
    let nowhere = model
        .write_shard(model.all_layers(), &folder.path().join("no/such/folder"), &mut |_, _| ControlFlow::Continue(()));
    assert!(matches!(nowhere, Err(GgufError::Io { .. })));
    let outside = model.write_shard(LayerRange::new(1, 9).unwrap(), &path, &mut |_, _| ControlFlow::Continue(()));
    assert!(matches!(outside, Err(GgufError::OutOfRange { n_layers: 3, .. })));
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
}

#[test]
fn zeros_between_copied_tensors_stay_zeros() {
    let tensor = |name: &str, rows| NewTensor { name: name.into(), dims: vec![32, rows], ggml_type: 0 };
    let all = [
        tensor("token_embd.weight", 4),
        tensor("output_norm.weight", 1),
        tensor("position_embd.weight", 9),
        tensor("output_norm.bias", 1),
        tensor("blk.0.a.weight", 2),
        tensor("blk.1.a.weight", 2),
    ];
    let mut m = metadata();
    m.remove("llama.attention.head_count");
    m.insert("general.architecture", Value::String("gpt2".into()));
    m.insert("gpt2.block_count", Value::U32(2));
    let model = open(file(&m, &all)).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("shard.gguf");
    model.write_shard(LayerRange::new(1, 2).unwrap(), &path, &mut |_, _| ControlFlow::Continue(())).unwrap();
    let shard = Model::open(&path).unwrap();
    for t in shard.tensors() {
        let old = model.tensor(&t.name.replace("blk.0", "blk.1")).unwrap();
        let zeros = shard.tensor_data(t).iter().all(|b| *b == 0);
        assert_eq!(zeros, t.name == "position_embd.weight", "{}", t.name);
        assert!(zeros || shard.tensor_data(t) == model.tensor_data(old), "{}", t.name);
    }
}
