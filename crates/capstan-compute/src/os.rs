//! What depends on the operating system: standard output is kept for the protocol alone, memory comes in large pages, and
//! how much of it was held.
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

/// The largest cache of the first processor, in bytes, as far as the system tells.
#[cfg(target_os = "linux")]
pub(crate) fn cache_bytes() -> Option<u64> {
    let size = |i: u32| {
        let text = std::fs::read_to_string(format!("/sys/devices/system/cpu/cpu0/cache/index{i}/size")).ok()?;
        text.trim().strip_suffix('K')?.parse::<u64>().ok()?.checked_mul(1024)
    };
    (0..8).filter_map(size).max()
}

/// Elsewhere it is not known.
#[cfg(not(target_os = "linux"))]
pub(crate) fn cache_bytes() -> Option<u64> {
    None
}

/// Most memory that this process has held at once, mapped files included, in bytes; 0 where the system does not tell.
#[cfg(target_os = "linux")]
pub(crate) fn peak_rss_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    bytes_of(&status, "VmHWM:").unwrap_or(0)
}

/// Elsewhere it is not known.
#[cfg(not(target_os = "linux"))]
pub(crate) fn peak_rss_bytes() -> u64 {
    0
}

/// The memory that this process holds now, mapped files included, in bytes; 0 where the system does not tell.
#[cfg(target_os = "linux")]
pub(crate) fn rss_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    bytes_of(&status, "VmRSS:").unwrap_or(0)
}

/// Elsewhere it is not known.
#[cfg(not(target_os = "linux"))]
pub(crate) fn rss_bytes() -> u64 {
    0
}

/// A size in a `/proc/PID/status`, in bytes.
#[cfg(target_os = "linux")]
fn bytes_of(status: &str, name: &str) -> Option<u64> {
    let rest = status.lines().find_map(|line| line.strip_prefix(name))?;
    rest.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    #[test]
    fn sizes_of_a_process_are_read() {
        let status = "VmPeak:\t 9 kB\nVmHWM:\t    1234 kB\nVmRSS:\t 1 kB\n";
        assert_eq!((bytes_of(status, "VmHWM:"), bytes_of(status, "VmRSS:")), (Some(1234 * 1024), Some(1024)));
        for bad in ["", "VmHWM: many kB", "VmHWM: 18446744073709551615 kB"] {
            assert_eq!(bytes_of(bad, "VmHWM:"), None, "{bad}");
        }
        // Each apart: between two reads other tests allocate and free, and the kernel's own counts of a peak are rough.
        assert!(rss_bytes() > 1 << 20 && peak_rss_bytes() > 1 << 20);
    }
}
