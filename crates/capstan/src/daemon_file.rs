//! `daemon.json`: how a command finds this machine's daemon, and the locks that keep it the only one.
use std::fs::{File, TryLockError};
use std::io::{self, Write};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

const DAEMON_JSON: &str = "daemon.json";
/// Largest `daemon.json` that is read, in bytes; an honest one has about 150.
const DAEMON_JSON_BYTES_MAX: u64 = 64 << 10;

/// What a running daemon leaves in its data folder for the commands. Readable by its owner only.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DaemonFile {
    /// The daemon's process.
    pub pid: u32,
    /// Where its API listens, as a command on this machine dials it.
    pub api: SocketAddr,
    /// Where it listens for other machines; none where it does not.
    #[serde(default)]
    pub listen: Option<SocketAddr>,
    /// The bearer token of the management calls.
    pub token: String,
    /// Version of capstan it runs.
    pub version: String,
}

// Without the token.
impl std::fmt::Debug for DaemonFile {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut shown = f.debug_struct("DaemonFile");
        shown.field("pid", &self.pid).field("api", &self.api).field("version", &self.version).finish_non_exhaustive()
    }
}

/// What a data folder says about its daemon.
#[derive(Debug)]
pub enum Found {
    /// There is none.
    Nothing,
    /// One was here and ended without tidying up.
    Stale(DaemonFile),
    /// Its process runs.
    Running(DaemonFile),
}

impl DaemonFile {
    /// Looks for a daemon in a data folder. A file that cannot be understood is an error.
    pub fn find(data_dir: &Path) -> io::Result<Found> {
        let path = data_dir.join(DAEMON_JSON);
        let bytes = match std::fs::metadata(&path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Found::Nothing),
            Err(e) => return Err(e),
            Ok(meta) if meta.len() > DAEMON_JSON_BYTES_MAX => {
                return Err(io::Error::new(io::ErrorKind::InvalidData, "it is too large to be a daemon.json"));
            }
            Ok(_) => match std::fs::read(&path) {
                Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Found::Nothing),
                other => other?,
            },
        };
        let file: Self = serde_json::from_slice(&bytes)?;
        Ok(if crate::os::is_alive(file.pid) { Found::Running(file) } else { Found::Stale(file) })
    }

    /// Writes the file at once and whole: a reader sees the old one or the new one. Mode 0600.
    pub fn write(&self, data_dir: &Path) -> io::Result<()> {
        // A temporary file is made readable by its owner only.
        let mut file = tempfile::Builder::new().prefix(".daemon-").tempfile_in(data_dir)?;
        file.write_all(&serde_json::to_vec(self)?)?;
        file.as_file().sync_all()?;
        file.persist(data_dir.join(DAEMON_JSON))?;
        Ok(())
    }

    /// Removes the file, unless another daemon has written it since.
    pub fn remove(&self, data_dir: &Path) -> io::Result<()> {
        match Self::find(data_dir)? {
            Found::Running(found) | Found::Stale(found) if found == *self => {
                std::fs::remove_file(data_dir.join(DAEMON_JSON))
            }
            _ => Ok(()),
        }
    }
}

/// Where the daemon of a data folder logs when it runs in the background.
pub fn log_path(data_dir: &Path) -> PathBuf {
    data_dir.join("logs").join("daemon.log")
}

/// Who may do something that only one process at a time may do in a data folder.
#[derive(Clone, Copy, Debug)]
pub enum Lock {
    /// Starting a daemon: held by `capstan up` until it answers.
    Start,
    /// Being the daemon: held as long as it lives.
    Daemon,
}

impl Lock {
    fn file(self, data_dir: &Path) -> io::Result<File> {
        let name = match self {
            Self::Start => "start.lock",
            Self::Daemon => "daemon.lock",
        };
        File::options().create(true).truncate(false).write(true).open(data_dir.join(name))
    }

    /// Takes the lock if nobody has it. It ends with the returned file, or with this process, however it ends.
    pub fn try_take(self, data_dir: &Path) -> io::Result<Option<File>> {
        let file = self.file(data_dir)?;
        match file.try_lock() {
            Ok(()) => Ok(Some(file)),
            Err(TryLockError::WouldBlock) => Ok(None),
            Err(TryLockError::Error(e)) => Err(e),
        }
    }

    /// Takes the lock, waiting for whoever has it.
    pub fn take(self, data_dir: &Path) -> io::Result<File> {
        let file = self.file(data_dir)?;
        file.lock()?;
        Ok(file)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(pid: u32) -> DaemonFile {
        DaemonFile {
            pid,
            api: "127.0.0.1:8420".parse().unwrap(),
            listen: None,
            token: "00".into(),
            version: "0.1.0".into(),
        }
    }

    #[test]
    fn a_dead_daemon_is_stale_and_a_strangers_file_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        assert!(matches!(DaemonFile::find(dir.path()).unwrap(), Found::Nothing));
        let ours = sample(std::process::id());
        ours.write(dir.path()).unwrap();
        assert!(matches!(DaemonFile::find(dir.path()).unwrap(), Found::Running(f) if f == ours));
        // Above any pid that a kernel gives out.
        let dead = sample(u32::MAX >> 1);
        dead.write(dir.path()).unwrap();
        assert!(matches!(DaemonFile::find(dir.path()).unwrap(), Found::Stale(_)));
        ours.remove(dir.path()).unwrap();
        assert!(dir.path().join(DAEMON_JSON).exists());
        dead.remove(dir.path()).unwrap();
        assert!(!dir.path().join(DAEMON_JSON).exists());
    }

    #[test]
    fn debug_output_has_no_token() {
        let file = DaemonFile { token: "hush".into(), ..sample(1) };
        assert!(!format!("{:?}", Found::Running(file)).contains("hush"));
    }

    #[cfg(unix)]
    #[test]
    fn only_the_owner_may_read_the_token() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        sample(1).write(dir.path()).unwrap();
        assert_eq!(std::fs::metadata(dir.path().join(DAEMON_JSON)).unwrap().permissions().mode() & 0o777, 0o600);
    }

    #[test]
    fn a_lock_has_one_holder() {
        let dir = tempfile::tempdir().unwrap();
        let held = Lock::Daemon.try_take(dir.path()).unwrap();
        assert!(held.is_some() && Lock::Daemon.try_take(dir.path()).unwrap().is_none());
        assert!(Lock::Start.try_take(dir.path()).unwrap().is_some());
        drop(held);
        assert!(Lock::Daemon.try_take(dir.path()).unwrap().is_some());
    }
}
