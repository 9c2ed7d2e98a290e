//! Writing a shard: into a temporary sibling that is renamed when it is complete and on disk.
//!
//! Data goes from file to file with `copy_file_range`, which never enters this process and lets file systems with
//! shared extents (Btrfs, XFS, bcachefs) share them instead of copying. They can share whole blocks only, so a byte must
//! keep its place within a block of 4096. llama.cpp allows no gaps between tensors, but the length of the header is
//! free: it is padded so that as many bytes as possible keep their places. That is all of them where a shard is one run
//! of the model, or where the sizes of tensors are whole blocks, as in most large models. Tensors of zeros are holes.
use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::ops::ControlFlow;
use std::path::Path;

use capstan_proto::LayerRange;

use crate::GgufError;
use crate::cut::{self, Cut, Source};
use crate::model::Model;
use crate::writer::{self, Layout, NewTensor};

/// Block size that every file system with shared extents uses by default.
pub const BLOCK: u64 = 4096;
/// Bytes copied between two calls of the progress callback: small enough to stop soon, large enough to cost nothing.
pub const CHUNK: u64 = 32 << 20;

/// What was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ShardInfo {
    /// Size of the file in bytes.
    pub bytes: u64,
    /// Bytes that came from the model.
    pub copied_bytes: u64,
    /// Of which so many lie so that a file system can share them with the model instead of storing them again.
    pub shareable_bytes: u64,
    /// Number of tensors.
    pub tensors: u32,
}

/// A run of bytes from one of the model's files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// Which of the model's files.
    pub file: usize,
    /// Where it begins there.
    pub from: u64,
    /// Where it begins in the shard.
    pub to: u64,
    /// Bytes.
    pub len: u64,
}

/// How a shard is put together by someone who need not have the model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Recipe {
    /// Its first bytes.
    pub header: Vec<u8>,
    /// The model's bytes; what is in none is zeros.
    pub runs: Vec<Run>,
    /// Size of the file in bytes.
    pub bytes: u64,
}

impl Run {
    /// Bytes in whole blocks that keep their place within a block.
    fn shareable(&self) -> u64 {
        if self.from % BLOCK != self.to % BLOCK {
            return 0;
        }
        let first = self.to.next_multiple_of(BLOCK);
        ((self.to + self.len) / BLOCK * BLOCK).saturating_sub(first)
    }
}

/// A shard, laid out.
pub(crate) struct Plan {
    layout: Layout,
    runs: Vec<Run>,
    tensors: u32,
}

impl Plan {
    pub(crate) fn total(&self) -> u64 {
        self.layout.total
    }
    pub(crate) fn into_header(self) -> (Vec<u8>, u64) {
        (self.layout.header, self.layout.total)
    }
    /// The padding that follows a run in the model comes along, so that the shards of all layers hold all of its bytes.
    pub(crate) fn into_recipe(self, model: &Model) -> Recipe {
        let align = writer::alignment(model.metadata());
        let mut runs = self.runs;
        for run in &mut runs {
            let file_bytes = model.contents().get(run.file).map_or(0, |f| f.file_bytes());
            run.len = run.len.next_multiple_of(align).min(file_bytes.saturating_sub(run.from));
        }
        Recipe { header: self.layout.header, runs, bytes: self.layout.total }
    }
    fn copied(&self) -> u64 {
        self.runs.iter().map(|r| r.len).sum()
    }
}

pub(crate) fn plan(model: &Model, range: LayerRange) -> Result<Plan, GgufError> {
    let cut = cut::cut(model, range)?;
    let tensors: Vec<NewTensor> = cut.tensors.iter().map(|(t, _)| t.clone()).collect();
    let impossible = || GgufError::Malformed {
        path: model.files().first().cloned().unwrap_or_default(),
        what: "its tensors do not fit into one file".into(),
    };
    let plain = writer::layout(&cut.metadata, &tensors, None).ok_or_else(impossible)?;
    let place = best_remainder(&runs(model, &cut, &plain), plain.header.len() as u64)
        .filter(|r| r % writer::alignment(&cut.metadata) == 0)
        .map(|r| (BLOCK, r));
    let layout = writer::layout(&cut.metadata, &tensors, place).ok_or_else(impossible)?;
    let runs = runs(model, &cut, &layout);
    Ok(Plan { layout, runs, tensors: tensors.len() as u32 })
}

/// The place within a block at which data must start for the most bytes to keep theirs.
fn best_remainder(runs: &[Run], header: u64) -> Option<u64> {
    let mut bytes = BTreeMap::<u64, u64>::new();
    for run in runs {
        // Offsets after the header do not depend on its length.
        let inside = run.to - header;
        *bytes.entry((run.from % BLOCK + BLOCK - inside % BLOCK) % BLOCK).or_default() += run.len;
    }
    bytes.into_iter().max_by_key(|(_, len)| *len).map(|(remainder, _)| remainder)
}

/// The model's bytes in a shard, neighbours joined where they also were neighbours in the model.
fn runs(model: &Model, cut: &Cut, layout: &Layout) -> Vec<Run> {
    let mut runs: Vec<Run> = Vec::new();
    let mut neighbours = false; // zeros in between end a run, or the model's bytes would fill them
    for ((_, source), to) in cut.tensors.iter().zip(&layout.offsets) {
        let joins = std::mem::replace(&mut neighbours, matches!(source, Source::Model(_)));
        let Source::Model(i) = source else { continue };
        let t = &model.tensors()[*i];
        if let Some(run) = runs.last_mut().filter(|_| joins)
            && run.file == t.file
            && t.offset.checked_sub(run.from) == to.checked_sub(run.to)
        {
            run.len = to - run.to + t.bytes; // the padding between them comes along
            continue;
        }
        runs.push(Run { file: t.file, from: t.offset, to: *to, len: t.bytes });
    }
    runs
}

pub(crate) fn write(
    model: &Model,
    plan: &Plan,
    path: &Path,
    progress: &mut dyn FnMut(u64, u64) -> ControlFlow<()>,
) -> Result<ShardInfo, GgufError> {
    create(path, plan.total(), |out| fill(model, plan, out, progress))?;
    Ok(ShardInfo {
        bytes: plan.total(),
        copied_bytes: plan.copied(),
        shareable_bytes: plan.runs.iter().map(Run::shareable).sum(),
        tensors: plan.tensors,
    })
}

/// Makes a file that `filled` fills with about `total` bytes: beside its place, and renamed when it is complete and on
/// disk. Nothing is left behind when that fails or breaks off.
pub(crate) fn create(
    path: &Path,
    total: u64,
    filled: impl FnOnce(&File) -> io::Result<ControlFlow<()>>,
) -> Result<(), GgufError> {
    let folder = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let full = |e: io::Error| match is_full(&e) {
        true => disk_full(path, folder, total),
        false => GgufError::Io { path: path.to_owned(), action: "write", source: e },
    };
    refuse_what_cannot_fit(path, folder, total)?;
    let mut builder = tempfile::Builder::new();
    builder.prefix(".shard-").suffix(".part");
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666)); // less the umask, like any new file
    let temporary = builder.tempfile_in(folder).map_err(GgufError::io(path, "create"))?;
    // An error inside removes the temporary file first, so that what is missing is counted without it.
    match filled(temporary.as_file()) {
        Ok(ControlFlow::Continue(())) => {}
        Ok(ControlFlow::Break(())) => return Err(GgufError::Cancelled(path.to_owned())),
        Err(e) => {
            drop(temporary);
            return Err(full(e));
        }
    }
    temporary.persist(path).map_err(|e| GgufError::io(path, "rename the finished file to")(e.error))?;
    #[cfg(unix)] // the name is on disk only when its folder is
    File::open(folder).and_then(|f| f.sync_all()).map_err(GgufError::io(folder, "write"))?;
    Ok(())
}

fn fill(
    model: &Model,
    plan: &Plan,
    out: &File,
    progress: &mut dyn FnMut(u64, u64) -> ControlFlow<()>,
) -> io::Result<ControlFlow<()>> {
    let total = plan.total();
    out.set_len(total)?; // what is not written below is zeros, and takes no space
    write_at(out, &plan.layout.header, 0)?;
    let (mut done, copied) = (plan.layout.header.len() as u64, plan.copied());
    let offset = total - copied - done; // zeros, which are done at once
    done += offset;
    if progress(done, total).is_break() {
        return Ok(ControlFlow::Break(()));
    }
    let mut kernel = true;
    for run in &plan.runs {
        let mut at = 0;
        while at < run.len {
            let len = chunk(run, at);
            let Some(bytes) = model.contents().get(run.file) else { return Err(io::ErrorKind::UnexpectedEof.into()) };
            let mut copied = 0;
            if let Some(source) = bytes.file().filter(|_| kernel) {
                (copied, kernel) = copy(source, run.from + at, out, run.to + at, len)?;
            }
            if copied < len {
                let rest = bytes.slice(run.from + at + copied, len - copied);
                write_at(out, rest.ok_or(io::ErrorKind::UnexpectedEof)?, run.to + at + copied)?;
            }
            at += len;
            done += len;
            if progress(done, total).is_break() {
                return Ok(ControlFlow::Break(()));
            }
        }
    }
    out.sync_all()?;
    Ok(ControlFlow::Continue(()))
}

/// Length of the piece of a run that starts at `at`. Where blocks can be shared, a piece is either whole blocks or the
/// rest of one, because the kernel shares a request only when all of it can be.
fn chunk(run: &Run, at: u64) -> u64 {
    let rest = run.len - at;
    if run.from % BLOCK != run.to % BLOCK {
        return rest.min(CHUNK);
    }
    let head = (run.to + at).next_multiple_of(BLOCK) - (run.to + at);
    let blocks = rest / BLOCK * BLOCK;
    match (head, blocks) {
        (1.., _) => head.min(rest),
        (0, 1..) => blocks.min(CHUNK),
        (0, 0) => rest,
    }
}

/// Copy within the kernel: how many bytes were copied, and whether it is worth asking again.
#[cfg(target_os = "linux")]
fn copy(source: &File, from: u64, out: &File, to: u64, len: u64) -> io::Result<(u64, bool)> {
    use rustix::io::Errno;
    let mut copied = 0;
    while copied < len {
        let (mut a, mut b) = (from + copied, to + copied);
        match rustix::fs::copy_file_range(source, Some(&mut a), out, Some(&mut b), (len - copied) as usize) {
            // Nothing left: the model was truncated, or this file system cannot say; the mapping can only be read when
            // the file still has the bytes.
            Ok(0) if source.metadata()?.len() < from + len => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(0) => return Ok((copied, false)),
            Ok(n) => copied += n as u64,
            Err(Errno::INTR) => {}
            // Two file systems, or one that cannot: write what is mapped instead.
            Err(Errno::XDEV | Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP | Errno::PERM | Errno::BADF) => {
                return Ok((copied, false));
            }
            Err(e) => return Err(e.into()),
        }
    }
    Ok((copied, true))
}

#[cfg(not(target_os = "linux"))]
fn copy(_: &File, _: u64, _: &File, _: u64, _: u64) -> io::Result<(u64, bool)> {
    Ok((0, false))
}

#[cfg(unix)]
pub(crate) fn write_at(out: &File, bytes: &[u8], at: u64) -> io::Result<()> {
    std::os::unix::fs::FileExt::write_all_at(out, bytes, at)
}

#[cfg(not(unix))]
pub(crate) fn write_at(mut out: &File, bytes: &[u8], at: u64) -> io::Result<()> {
    use std::io::{Seek, Write};
    out.seek(io::SeekFrom::Start(at))?;
    out.write_all(bytes)
}

fn is_full(e: &io::Error) -> bool {
    matches!(e.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded | io::ErrorKind::FileTooLarge)
}

/// Bytes that may still be written in a folder; none when the system does not say.
fn free_bytes(folder: &Path) -> Option<u64> {
    #[cfg(unix)]
    return rustix::fs::statvfs(folder).ok().map(|s| s.f_bavail.saturating_mul(s.f_frsize));
    #[cfg(not(unix))]
    return None::<u64>.filter(|_| folder.exists());
}

fn disk_full(path: &Path, folder: &Path, total: u64) -> GgufError {
    // A quota can be exhausted while the disk has room; then all of it counts as missing.
    let missing = total.saturating_sub(free_bytes(folder).unwrap_or(0));
    let missing = if missing == 0 { total } else { missing };
    GgufError::DiskFull { path: path.to_owned(), total_bytes: total, missing_bytes: missing }
}

/// Refuse at once what cannot fit, rather than after writing for minutes; unless extents may be shared, when a shard
/// may take next to no space.
fn refuse_what_cannot_fit(path: &Path, folder: &Path, total: u64) -> Result<(), GgufError> {
    if shares_extents(folder) {
        return Ok(());
    }
    match free_bytes(folder) {
        Some(free) if free < total => Err(disk_full(path, folder, total)),
        _ => Ok(()),
    }
}

#[cfg(target_os = "linux")]
fn shares_extents(folder: &Path) -> bool {
    const SHARING: [i64; 4] = [0x9123_683e, 0x5846_5342, 0xca45_1a4e_u32 as i64, 0x7461_636f]; // Btrfs, XFS, bcachefs, OCFS2
    rustix::fs::statfs(folder).is_ok_and(|s| SHARING.contains(&(s.f_type as u32 as i64)))
}

#[cfg(not(target_os = "linux"))]
fn shares_extents(_: &Path) -> bool {
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_disk_says_how_much_is_missing_and_where() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("shard.gguf");
        let error = disk_full(&path, folder.path(), u64::MAX);
        let GgufError::DiskFull { total_bytes, missing_bytes, .. } = &error else { panic!("{error}") };
        assert!(*total_bytes == u64::MAX && *missing_bytes > 0 && missing_bytes < total_bytes);
        let said = error.to_string();
        assert!(
            said.contains(&missing_bytes.to_string()) && said.contains(&folder.path().display().to_string()),
            "{said}"
        );
        if !shares_extents(folder.path()) {
            assert!(refuse_what_cannot_fit(&path, folder.path(), u64::MAX).is_err());
        }
        assert!(refuse_what_cannot_fit(&path, folder.path(), 1).is_ok());
    }

    #[test]
    fn pieces_of_a_shareable_run_are_whole_blocks() {
        let run = Run { file: 0, from: 100, to: 3 * BLOCK + 100, len: 2 * CHUNK + 500 };
        let (mut at, mut pieces) = (0, Vec::new());
        while at < run.len {
            let len = chunk(&run, at);
            pieces.push(len);
            at += len;
        }
        assert_eq!(at, run.len);
        assert_eq!(pieces.first(), Some(&(BLOCK - 100)));
        let shared: u64 = pieces.iter().filter(|p| *p % BLOCK == 0).sum();
        assert_eq!(shared, run.shareable());
        assert_eq!(Run { to: run.to + 1, ..run }.shareable(), 0);
    }
}
