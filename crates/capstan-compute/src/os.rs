//! What depends on the operating system: standard output is kept for the protocol alone.
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
