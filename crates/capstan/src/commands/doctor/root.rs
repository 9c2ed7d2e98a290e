//! What the operating system says, read with limits: files below a prefix (`/` unless a test has a tree of its own), and
//! the answers of a few programs. The only module of the doctor that depends on the operating system.
//!
//! Nothing here fails: what cannot be read is not known. The files are Linux's; elsewhere none is there, so the checks
//! that need them say that they do not know.
use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::str::FromStr;
use std::time::Duration;

/// Largest part of a file that is read, in bytes: `/proc/cpuinfo` of 256 threads has about 400,000.
const FILE_BYTES_MAX: u64 = 1 << 20;
/// Most names of a folder that are read; a machine with 1024 threads has that many clock policies.
const NAMES_MAX: usize = 4096;
/// Largest part of a package list that is searched, in bytes: a desktop's has about 5 million.
const LIST_BYTES_MAX: u64 = 64 << 20;
/// Longest line of such a list, in bytes; what is beyond belongs to the next.
const LINE_BYTES_MAX: u64 = 64 << 10;
/// How long a program that is asked something may take.
const ASK_TIMEOUT: Duration = Duration::from_secs(3);

/// Where the system's files are.
#[derive(Clone, Debug)]
pub struct Root {
    prefix: PathBuf,
}

/// Who may use a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Owner {
    /// Its permission bits.
    pub mode: u32,
    /// Its owner.
    pub uid: u32,
    /// Its group.
    pub gid: u32,
}

impl Root {
    /// The files below a prefix.
    pub fn new(prefix: PathBuf) -> Self {
        Self { prefix }
    }

    /// Whether this is the machine itself, whose programs may be asked.
    pub fn is_machine(&self) -> bool {
        self.prefix == Path::new("/")
    }

    /// Where a file of the system is.
    pub fn path(&self, path: &str) -> PathBuf {
        self.prefix.join(path.trim_start_matches('/'))
    }

    /// Whether there is such a file or folder.
    pub fn exists(&self, path: &str) -> bool {
        self.path(path).exists()
    }

    /// A file's text without the white space around it: at most its first MiB, with what is not UTF-8 replaced. None
    /// when nothing is left.
    pub fn text(&self, path: &str) -> Option<String> {
        let path = self.path(path);
        // A pipe would have us wait for its other end.
        if !std::fs::metadata(&path).ok()?.is_file() {
            return None;
        }
        let mut bytes = vec![];
        File::open(path).ok()?.take(FILE_BYTES_MAX).read_to_end(&mut bytes).ok()?;
        Some(String::from_utf8_lossy(&bytes).trim().to_owned()).filter(|text| !text.is_empty())
    }

    /// A file that holds one number.
    pub fn number<T: FromStr>(&self, path: &str) -> Option<T> {
        self.text(path)?.parse().ok()
    }

    /// A file that holds one hexadecimal number after `0x`.
    pub fn hex(&self, path: &str) -> Option<u32> {
        u32::from_str_radix(self.text(path)?.strip_prefix("0x")?, 16).ok()
    }

    /// The names in a folder, in order; none when it cannot be read.
    pub fn names(&self, folder: &str) -> Vec<String> {
        let Ok(entries) = std::fs::read_dir(self.path(folder)) else { return vec![] };
        let mut names: Vec<String> =
            entries.take(NAMES_MAX).flatten().filter_map(|e| e.file_name().into_string().ok()).collect();
        names.sort();
        names
    }

    /// The value after `field` in the paragraph of a package list that begins with the line `first`.
    pub fn paragraph_field(&self, path: &str, first: &str, field: &str) -> Option<String> {
        let path = self.path(path);
        if !std::fs::metadata(&path).ok()?.is_file() {
            return None;
        }
        let mut reader = BufReader::new(File::open(path).ok()?.take(LIST_BYTES_MAX));
        let (mut inside, mut line) = (false, vec![]);
        loop {
            line.clear();
            if reader.by_ref().take(LINE_BYTES_MAX).read_until(b'\n', &mut line).ok()? == 0 {
                return None;
            }
            let text = String::from_utf8_lossy(&line);
            let text = text.trim_end();
            if text == first {
                inside = true;
            } else if text.is_empty() {
                inside = false;
            } else if inside && let Some(value) = text.strip_prefix(field) {
                return Some(value.trim().to_owned());
            }
        }
    }

    /// Who may use a file; not known where files have no such owners.
    pub fn owner(&self, path: &str) -> Option<Owner> {
        #[cfg(unix)]
        {
            use std::os::unix::fs::MetadataExt;
            let meta = std::fs::metadata(self.path(path)).ok()?;
            Some(Owner { mode: meta.mode(), uid: meta.uid(), gid: meta.gid() })
        }
        #[cfg(not(unix))]
        {
            None::<Owner>.filter(|_| self.exists(path))
        }
    }

    /// What a program prints; none when it is missing, fails or takes too long. Never asked about a tree of files.
    pub async fn ask(&self, program: &str, args: &[&str]) -> Option<String> {
        if !self.is_machine() {
            return None;
        }
        let output = tokio::process::Command::new(program)
            .args(args)
            .env("LC_ALL", "C")
            .stdin(Stdio::null())
            .stderr(Stdio::null())
            .kill_on_drop(true)
            .output();
        let output = tokio::time::timeout(ASK_TIMEOUT, output).await.ok()?.ok()?;
        output.status.success().then(|| String::from_utf8_lossy(&output.stdout).trim().to_owned())
    }
}

/// Bytes that may still be written in a folder, and the bytes of its file system.
pub fn room(folder: &Path) -> Option<(u64, u64)> {
    #[cfg(unix)]
    {
        let stat = rustix::fs::statvfs(folder).ok()?;
        Some((stat.f_bavail.saturating_mul(stat.f_frsize), stat.f_blocks.saturating_mul(stat.f_frsize)))
    }
    #[cfg(not(unix))]
    {
        None::<(u64, u64)>.filter(|_| folder.exists())
    }
}

/// Has the system forget what it keeps of a file in memory, so that reading it asks the disk. Whether it could be told.
pub fn forget_cached(file: &File) -> bool {
    #[cfg(target_os = "linux")]
    {
        rustix::fs::fadvise(file, 0, None, rustix::fs::Advice::DontNeed).is_ok()
    }
    #[cfg(not(target_os = "linux"))]
    {
        let _ = file;
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hostile_files_are_cut_or_not_known() {
        let dir = tempfile::tempdir().unwrap();
        let root = Root::new(dir.path().into());
        let write = |name: &str, bytes: &[u8]| std::fs::write(dir.path().join(name), bytes).unwrap();
        write("huge", &vec![b'7'; (FILE_BYTES_MAX + 10) as usize]);
        write("binary", &[0, 255, 254, 10, 0]);
        write("negative", b"-1\n");
        write("hex", b"0x00000083\n");
        assert_eq!(root.text("/huge").map(|t| t.len() as u64), Some(FILE_BYTES_MAX));
        assert_eq!(root.number::<u64>("/huge"), None);
        assert!(root.text("/binary").is_some() && root.number::<u64>("/binary").is_none());
        assert_eq!((root.number::<u64>("negative"), root.number::<i64>("negative")), (None, Some(-1)));
        assert_eq!((root.hex("/hex"), root.hex("/negative")), (Some(0x83), None));
        assert_eq!((root.text("/"), root.text("/missing"), root.names("/missing")), (None, None, vec![]));
    }

    #[test]
    fn a_field_is_looked_for_in_its_own_paragraph_only() {
        let dir = tempfile::tempdir().unwrap();
        let root = Root::new(dir.path().into());
        let list = "Package: other\nVersion: 1\n\nPackage: firmware\nStatus: ok\nVersion: 20251125-1\n\nVersion: 3\n";
        std::fs::write(dir.path().join("status"), list).unwrap();
        let version = |first: &str| root.paragraph_field("/status", first, "Version:");
        assert_eq!(version("Package: firmware").as_deref(), Some("20251125-1"));
        assert_eq!((version("Package: other").as_deref(), version("Package: absent")), (Some("1"), None));
    }
}
