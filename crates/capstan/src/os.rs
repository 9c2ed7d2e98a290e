//! What depends on the operating system: detached processes, living processes, signals, the host's name.
use std::process::Command;

use sysinfo::{Pid, ProcessRefreshKind, ProcessStatus, ProcessesToUpdate, System};

/// Where this system keeps files in memory: not on a disk, and gone when the machine goes down.
pub fn memory_dir() -> Option<std::path::PathBuf> {
    #[cfg(target_os = "linux")]
    {
        Some(std::path::PathBuf::from("/dev/shm")).filter(|dir| dir.is_dir())
    }
    #[cfg(not(target_os = "linux"))]
    {
        None
    }
}

/// This machine's name on its network, when it has one.
pub fn host_name() -> Option<String> {
    System::host_name()
}

/// Whether a process runs. A zombie, which only waits to be reaped, does not.
pub fn is_alive(pid: u32) -> bool {
    let pid = Pid::from_u32(pid);
    let mut system = System::new();
    system.refresh_processes_specifics(ProcessesToUpdate::Some(&[pid]), true, ProcessRefreshKind::nothing());
    system.process(pid).is_some_and(|p| !matches!(p.status(), ProcessStatus::Zombie | ProcessStatus::Dead))
}

/// Makes a command's process outlive this one and its terminal: Ctrl-C here does not reach it.
pub fn detach(command: &mut Command) {
    #[cfg(unix)]
    {
        use std::os::unix::process::CommandExt;
        command.process_group(0);
    }
    #[cfg(windows)]
    {
        use std::os::windows::process::CommandExt;
        /// CREATE_NEW_PROCESS_GROUP and DETACHED_PROCESS of the Windows API.
        const DETACHED: u32 = 0x0000_0200 | 0x0000_0008;
        command.creation_flags(DETACHED);
    }
}

/// Makes a folder (and its parents) that only its owner may enter.
pub fn create_private_dir(path: &std::path::Path) -> std::io::Result<()> {
    let mut builder = std::fs::DirBuilder::new();
    builder.recursive(true);
    #[cfg(unix)]
    {
        use std::os::unix::fs::DirBuilderExt;
        builder.mode(0o700);
    }
    builder.create(path)
}

/// Waits until this process is asked to end: Ctrl-C, or what a service manager sends. Returns its name.
///
/// From the first call on, a hang-up of the terminal no longer ends the process: a daemon outlives its terminal.
pub async fn shutdown_signal() -> std::io::Result<&'static str> {
    #[cfg(unix)]
    {
        use tokio::signal::unix::{SignalKind, signal};
        let mut interrupt = signal(SignalKind::interrupt())?;
        let mut terminate = signal(SignalKind::terminate())?;
        let _hangup = signal(SignalKind::hangup())?;
        tokio::select! {
            _ = interrupt.recv() => Ok("SIGINT"),
            _ = terminate.recv() => Ok("SIGTERM"),
        }
    }
    #[cfg(not(unix))]
    {
        tokio::signal::ctrl_c().await?;
        Ok("Ctrl-C")
    }
}

/// Lets Ctrl-C pass over this process from now on.
///
/// On a terminal Ctrl-C reaches every process of the foreground group. A stage must not die of it on its own: its
/// daemon decides, and the end of its standard input tells it.
pub fn ignore_interrupt() -> std::io::Result<()> {
    #[cfg(unix)]
    {
        use tokio::signal::unix::{SignalKind, signal};
        let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build()?;
        let _guard = runtime.enter();
        // The handler replaces the default action and is never taken away again, not even with the runtime.
        drop(signal(SignalKind::interrupt())?);
    }
    Ok(())
}
