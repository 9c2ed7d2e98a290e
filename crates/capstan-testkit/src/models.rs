//! Where the real model lies that tests and the demo use. Nothing is downloaded here: `make model` does that.
use std::path::PathBuf;

/// File name of the small real model.
const SMOLLM2: &str = "SmolLM2-135M-Instruct.Q4_1.gguf";

/// Capstan's cache folder: `$CAPSTAN_CACHE`, else `$XDG_CACHE_HOME/capstan`, else `~/.cache/capstan`.
pub fn cache_folder() -> PathBuf {
    let set = |name: &str| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    set("CAPSTAN_CACHE")
        .or_else(|| set("XDG_CACHE_HOME").map(|p| p.join("capstan")))
        .or_else(|| std::env::home_dir().map(|p| p.join(".cache/capstan")))
        .unwrap_or_default()
}

/// SmolLM2-135M-Instruct: 30 layers, Q4_1, 98 MB.
///
/// # Panics
/// When it is not in the cache folder.
pub fn smollm2() -> PathBuf {
    let path = cache_folder().join("models").join(SMOLLM2);
    assert!(path.is_file(), "{} is missing: run `make model`", path.display());
    path
}
