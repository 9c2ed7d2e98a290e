//! Small files that are there whole or not at all: written beside, flushed, renamed.
use std::io::Write;
use std::path::Path;
use std::time::{Duration, Instant};

use serde::{Serialize, de::DeserializeOwned};
use tokio::time::sleep;

use crate::error::NodeError;

/// Largest file of ours that is read back: far above a member list of [`capstan_proto::control::ENTRIES_MAX`].
const FILE_BYTES_MAX: u64 = 16 << 20;

/// Writes bytes that only the user may read.
pub(crate) fn write_private(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    let beside = path.with_extension("new");
    // A leftover of a crash may have other rights.
    std::fs::remove_file(&beside)
        .or_else(|e| if e.kind() == std::io::ErrorKind::NotFound { Ok(()) } else { Err(e) })?;
    let mut options = std::fs::OpenOptions::new();
    options.write(true).create_new(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    let mut file = options.open(&beside)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    std::fs::rename(&beside, path)
}

/// Writes a value as JSON that only the user may read.
pub(crate) fn write_json<T: Serialize>(path: &Path, value: &T) -> std::io::Result<()> {
    write_private(path, &serde_json::to_vec_pretty(value)?)
}

/// A folder with nothing in it: what an earlier run left there goes.
pub(crate) fn make_empty_dir(dir: &Path) -> Result<(), NodeError> {
    let io = |source| NodeError::DataDir { path: dir.to_owned(), source };
    if dir.exists() {
        std::fs::remove_dir_all(dir).map_err(io)?;
    }
    std::fs::create_dir_all(dir).map_err(io)
}

/// The same in a place where others may write, too: nobody else may enter it, and whatever another user has put there
/// under this name is an error.
pub(crate) fn make_private_dir(dir: &Path) -> std::io::Result<()> {
    match std::fs::remove_dir_all(dir) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(e),
        _ => {}
    }
    create_private_dir(dir)
}

/// A folder that nobody else may enter, in one that is there. One that is there already stays as it is.
pub(crate) fn private_dir(dir: &Path) -> std::io::Result<()> {
    match create_private_dir(dir) {
        Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => Ok(()),
        result => result,
    }
}

fn create_private_dir(dir: &Path) -> std::io::Result<()> {
    let mut builder = std::fs::DirBuilder::new();
    #[cfg(unix)]
    std::os::unix::fs::DirBuilderExt::mode(&mut builder, 0o700);
    builder.create(dir)
}

/// Reads a file of ours; none when it is not there.
pub(crate) fn read(path: &Path) -> Result<Option<Vec<u8>>, NodeError> {
    let io = |source| NodeError::DataDir { path: path.to_owned(), source };
    match std::fs::metadata(path) {
        Ok(meta) if meta.len() > FILE_BYTES_MAX => {
            Err(NodeError::Damaged { path: path.to_owned(), reason: "it is far too large".into() })
        }
        Ok(_) => std::fs::read(path).map(Some).map_err(io),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(io(e)),
    }
}

/// Reads a value from JSON; none when the file is not there.
pub(crate) fn read_json<T: DeserializeOwned>(path: &Path) -> Result<Option<T>, NodeError> {
    let Some(bytes) = read(path)? else { return Ok(None) };
    serde_json::from_slice(&bytes)
        .map(Some)
        .map_err(|e| NodeError::Damaged { path: path.to_owned(), reason: e.to_string() })
}

/// How long a daemon that ends may still hold its files.
const BUSY_LIMIT: Duration = Duration::from_secs(3);

/// Opens what a daemon that is about to end may still hold.
pub(crate) async fn when_free<T, E>(open: impl Fn() -> Result<T, E>, is_busy: impl Fn(&E) -> bool) -> Result<T, E> {
    let begun = Instant::now();
    loop {
        match open() {
            Err(error) if is_busy(&error) && begun.elapsed() < BUSY_LIMIT => sleep(Duration::from_millis(20)).await,
            other => return other,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whole_or_not_at_all_and_private() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.json");
        assert!(read_json::<Vec<u32>>(&path).unwrap().is_none());
        write_json(&path, &[1u32, 2]).unwrap();
        write_json(&path, &[3u32]).unwrap();
        assert_eq!(read_json::<Vec<u32>>(&path).unwrap().unwrap(), [3]);
        #[cfg(unix)]
        assert_eq!(
            std::os::unix::fs::PermissionsExt::mode(&std::fs::metadata(&path).unwrap().permissions()) & 0o777,
            0o600
        );
        std::fs::write(&path, b"{").unwrap();
        assert!(matches!(read_json::<Vec<u32>>(&path), Err(NodeError::Damaged { .. })));
    }
}
