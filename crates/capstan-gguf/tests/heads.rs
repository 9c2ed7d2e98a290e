//! A model that is elsewhere is profiled from the beginnings of its parts, without a byte of its tensors.
use std::path::{Path, PathBuf};

use capstan_gguf::{GgufError, Head, Model};
use capstan_proto::LayerRange;
use capstan_testkit::tiny;

/// What is fetched at once.
const STEP_BYTES: u64 = 2048;

fn written(name: &str) -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    tiny::write(name, &path).unwrap();
    (folder, path)
}

/// Reads a header as over HTTP: a little at first, then as much as is asked for. Returns how much it took.
fn fetch(path: &Path, first: u64) -> (Model, u64) {
    let file = std::fs::read(path).unwrap();
    let (mut have, mut turns) = (first, 0);
    loop {
        let head = Head { path: path.to_owned(), bytes: file[..have as usize].to_vec(), file_bytes: file.len() as u64 };
        match Model::from_heads(vec![head]) {
            Ok(model) => return (model, have),
            Err(GgufError::HeadTooShort { have: had, need, .. }) => {
                assert!(had == have && need > have && need <= file.len() as u64);
                have = (need + STEP_BYTES).min(file.len() as u64);
            }
            Err(other) => panic!("{other}"),
        }
        turns += 1;
        assert!(turns < 100_000, "each turn gets further");
    }
}

#[test]
fn the_profile_is_the_same_as_that_of_the_file() {
    for name in tiny::names() {
        let (_folder, path) = written(name);
        let whole = Model::open(&path).unwrap();
        let (remote, fetched) = fetch(&path, 1);
        assert_eq!(remote.profile(), whole.profile(), "{name}");
        assert_eq!((remote.bytes(), remote.n_layers()), (whole.bytes(), whole.n_layers()));
        let first_data = whole.tensors().iter().map(|t| t.offset).min().unwrap();
        assert!(fetched <= first_data + STEP_BYTES, "{name}: {fetched} bytes were read, tensors begin at {first_data}");
        if let Ok(range) = LayerRange::new(0, whole.n_layers()) {
            let folder = tempfile::tempdir().unwrap();
            let shard = folder.path().join("shard.gguf");
            assert!(
                remote.write_shard(range, &shard, &mut |_, _| std::ops::ControlFlow::Continue(())).is_err(),
                "{name}"
            );
            assert!(!shard.exists());
        }
    }
}

#[test]
fn a_head_that_lies_about_its_file_is_refused() {
    let (_folder, path) = written(tiny::names()[0]);
    let file = std::fs::read(&path).unwrap();
    let head = |bytes: &[u8], file_bytes| {
        Model::from_heads(vec![Head { path: path.clone(), bytes: bytes.to_vec(), file_bytes }]).map(|_| ()).unwrap_err()
    };
    // The tensors do not fit a file so short.
    assert!(matches!(head(&file, file.len() as u64 / 2), GgufError::Truncated { .. }));
    assert!(matches!(head(&file[..100], 100), GgufError::Truncated { .. }));
    assert!(matches!(head(b"GG", 2), GgufError::NotGguf(_)));
    assert!(matches!(head(b"GG", 2000), GgufError::HeadTooShort { need: 4, .. }));
    assert!(matches!(head(b"GGML0000", 2000), GgufError::NotGguf(_)));
    assert!(matches!(Model::from_heads(vec![]), Err(GgufError::Split { .. })));
}

#[test]
fn parts_are_named_by_the_first() {
    let (_folder, path) = written(tiny::names()[0]);
    let bytes = std::fs::read(&path).unwrap();
    let file_bytes = bytes.len() as u64;
    let head = Head { path: path.clone(), bytes, file_bytes };
    assert_eq!(head.parts().unwrap(), [path]);
    let error = Model::from_heads(vec![head.clone(), head]).map(|_| ()).unwrap_err().to_string();
    assert!(error.contains("1 parts, and the beginnings of 2"), "{error}");
}
