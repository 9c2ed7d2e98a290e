//! What depends on the operating system: standard output is kept for the protocol alone, and memory comes in large pages.
use std::fs::File;
use std::io;

/// Takes standard output for the caller alone. What libraries print from now on (GPU drivers do) goes to standard error
/// and does not break into the frames.
#[cfg(unix)]
pub(crate) fn take_stdout() -> io::Result<File> {
    use std::os::fd::AsFd;
    let own = io::stdout().as_fd().try_clone_to_owned()?;
    rustix::stdio::dup2_stdout(io::stderr())?;
    Ok(File::from(own))
}

/// Opens standard output anew; elsewhere nothing redirects what libraries print.
#[cfg(windows)]
pub(crate) fn take_stdout() -> io::Result<File> {
    use std::os::windows::io::AsHandle;
    Ok(File::from(io::stdout().as_handle().try_clone_to_owned()?))
}

/// What a compute process is given in its environment. KV caches are gigabytes that are filled with zeros at the start;
/// in pages of 2 MiB that takes half the time of pages of 4 KiB, and the C library asks for them only when it is told to.
/// What the user has set stands before.
#[cfg(target_os = "linux")]
pub(crate) fn child_environment() -> Option<(&'static str, String)> {
    const NAME: &str = "GLIBC_TUNABLES";
    const LARGE_PAGES: &str = "glibc.malloc.hugetlb=1";
    match std::env::var(NAME) {
        Ok(set) if set.contains("glibc.malloc.hugetlb") => None,
        Ok(set) if !set.is_empty() => Some((NAME, format!("{set}:{LARGE_PAGES}"))),
        _ => Some((NAME, LARGE_PAGES.to_owned())),
    }
}

/// Elsewhere the system chooses.
#[cfg(not(target_os = "linux"))]
pub(crate) fn child_environment() -> Option<(&'static str, String)> {
    None
}

/// Memory that this process has in use, in bytes, as far as the system tells.
#[cfg(target_os = "linux")]
pub(crate) fn resident_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|l| l.strip_prefix("VmRSS:"))?;
    line.trim().strip_suffix(" kB")?.trim().parse::<u64>().ok().map(|kib| kib << 10)
}

/// Elsewhere it is not asked.
#[cfg(not(target_os = "linux"))]
pub(crate) fn resident_bytes() -> Option<u64> {
    None
}
