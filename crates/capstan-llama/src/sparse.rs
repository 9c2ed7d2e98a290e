//! Mapping a file that is larger than the memory: llama.cpp asks the system to read all of a mapping at once
//! (`MAP_POPULATE`), which would fill the memory with the zeros of a file that is mostly holes.
//!
//! Linux leaves that out for memory that is to be locked when it is touched, so this asks for just that while a model is
//! loaded, and takes the locks back afterwards. Pages that are read then come one by one, and give way like those of any
//! file.

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

#[cfg(not(target_os = "linux"))]
impl OnTouch {
    /// Only Linux can.
    pub(crate) fn begin(_bytes: u64) -> Result<Self, String> {
        Err("only Linux can do that".into())
    }
}
