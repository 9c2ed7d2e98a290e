//! Mapping a file that is larger than the memory: llama.cpp asks the system to read all of a mapping at once
//! (`MAP_POPULATE`), which would fill the memory with the zeros of a file that is mostly holes.
//!
//! Linux leaves that out for memory that is to be locked when it is touched, so this asks for just that while a model is
//! loaded, and takes the locks back afterwards. Then it asks that pages which are read bring no others along, of which
//! disks with long read-ahead bring megabytes. They give way like those of any file.
use std::path::Path;

/// While this lives, what is mapped is not read ahead.
pub(crate) struct OnTouch;

#[cfg(target_os = "linux")]
impl OnTouch {
    /// For a file of so many bytes.
    pub(crate) fn begin(bytes: u64) -> Result<Self, String> {
        use rustix::mm::{MlockAllFlags, mlockall};
        use rustix::process::{Resource, geteuid, getrlimit};
        let limit = getrlimit(Resource::Memlock).current;
        if !geteuid().is_root() && limit.is_some_and(|limit| limit < bytes) {
            return Err(format!(
                "that takes the right to lock {bytes} bytes of memory; raise `ulimit -l`, or run the daemon with CAP_IPC_LOCK"
            ));
        }
        mlockall(MlockAllFlags::FUTURE | MlockAllFlags::ONFAULT)
            .map_err(|e| format!("memory cannot be locked when it is touched ({e}); raise `ulimit -l`"))?;
        Ok(Self)
    }
}

#[cfg(target_os = "linux")]
impl Drop for OnTouch {
    fn drop(&mut self) {
        if let Err(error) = rustix::mm::munlockall() {
            tracing::warn!(%error, "weights that were read stay locked in memory");
        }
    }
}

/// From now on what is mapped of a file comes page by page.
#[cfg(target_os = "linux")]
pub(crate) fn read_page_by_page(path: &Path) {
    let path = path.canonicalize().unwrap_or_else(|_| path.to_owned());
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap_or_default();
    for range in mapped(&maps, &path.to_string_lossy()) {
        let start = std::ptr::with_exposed_provenance_mut(range.start);
        // SAFETY: the range was mapped a moment ago and belongs to the model that the caller holds; advice of this kind
        // changes nothing of what it contains.
        if let Err(error) = unsafe { rustix::mm::madvise(start, range.len(), rustix::mm::Advice::Random) } {
            tracing::warn!(%error, "more than is needed is read of a sparse model");
        }
    }
}

#[cfg(not(target_os = "linux"))]
pub(crate) fn read_page_by_page(_path: &Path) {}

/// Where a file is mapped, by the lines of `/proc/self/maps`: `START-END PERMISSIONS OFFSET DEVICE INODE PATH`.
#[cfg(target_os = "linux")]
fn mapped(maps: &str, path: &str) -> Vec<std::ops::Range<usize>> {
    let range = |line: &str| {
        let at = line.find('/').filter(|at| &line[*at..] == path)?;
        let (start, end) = line[..at].split_whitespace().next()?.split_once('-')?;
        Some(usize::from_str_radix(start, 16).ok()?..usize::from_str_radix(end, 16).ok()?)
    };
    maps.lines().filter_map(range).collect()
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    #[test]
    fn a_files_mappings_are_found() {
        let maps = "1000-3000 r--s 00000000 fe:00 12 /a b/m.gguf\n4000-5000 rw-p 00000000 00:00 0 \n\
                    6000-7000 r--s 00002000 fe:00 12 /a b/m.gguf\n8000-9000 r-xp 00000000 fe:00 13 /a b/m.gguf2\n";
        assert_eq!(mapped(maps, "/a b/m.gguf"), [0x1000..0x3000, 0x6000..0x7000]);
        assert!(mapped(maps, "/m.gguf").is_empty() && mapped("x /m", "/m").is_empty());
    }
}

#[cfg(not(target_os = "linux"))]
impl OnTouch {
    /// Only Linux can.
    pub(crate) fn begin(_bytes: u64) -> Result<Self, String> {
        Err("only Linux can do that".into())
    }
}
