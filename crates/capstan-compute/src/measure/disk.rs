//! What the disk below the data folder reads in a row, as a shard is read after a restart: past the system's page cache.
//!
//! A file is written, brought to the disk, and forgotten by the page cache (`posix_fadvise`) before it is read. A
//! hypervisor's cache or a disk's own cannot be passed by: behind those it may come out faster than the disk is.
use std::fs::File;
use std::io::{Read, Write};
use std::path::Path;
use std::time::{Duration, Instant};

use super::bench::Gone;

/// Bytes of the file, if the disk takes them in [`WRITE_FOR`].
const FILE_BYTES: usize = 96 << 20;
/// Bytes that are written and read at once.
const PIECE_BYTES: usize = 4 << 20;
/// No longer is written than this.
const WRITE_FOR: Duration = Duration::from_millis(400);
/// Nor read.
const READ_FOR: Duration = Duration::from_millis(400);

/// Bytes per second; none where the system cannot be told to forget a file.
pub(super) fn bytes_per_s(folder: &Path) -> Option<u64> {
    reading(folder, FILE_BYTES)
}

fn reading(folder: &Path, bytes: usize) -> Option<u64> {
    let path = folder.join(format!("disk-{}", std::process::id()));
    let _gone = Gone(&path);
    let mut file = File::create(&path).ok()?;
    // No disk compresses this: a byte is the top of a product with the golden ratio.
    let mut piece: Vec<u8> =
        (0..PIECE_BYTES as u64).map(|i| (i.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8).collect();
    let (began, mut written) = (Instant::now(), 0);
    while written < bytes && began.elapsed() < WRITE_FOR {
        file.write_all(&piece).ok()?;
        written += piece.len();
        // Nor stores it once.
        piece.rotate_left(1021);
    }
    file.sync_all().ok()?;
    let mut file = File::open(&path).ok()?;
    forget(&file).then_some(())?;
    let (began, mut read) = (Instant::now(), 0);
    while read < written && began.elapsed() < READ_FOR {
        match file.read(&mut piece).ok()? {
            0 => break,
            n => read += n,
        }
    }
    let seconds = began.elapsed().as_secs_f64();
    (read > 0 && seconds > 0.0).then(|| (read as f64 / seconds) as u64)
}

/// Takes a file's pages out of the page cache.
#[cfg(target_os = "linux")]
fn forget(file: &File) -> bool {
    rustix::fs::fadvise(file, 0, None, rustix::fs::Advice::DontNeed).is_ok()
}

/// Elsewhere the system cannot be asked to.
#[cfg(not(target_os = "linux"))]
fn forget(_: &File) -> bool {
    false
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    #[test]
    fn a_disk_reads_and_nothing_stays_behind() {
        let folder = tempfile::tempdir().unwrap();
        assert!(reading(folder.path(), 2 * PIECE_BYTES).unwrap() > 0);
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
        assert_eq!(bytes_per_s(&folder.path().join("missing")), None);
    }
}
