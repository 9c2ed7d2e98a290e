//! llama.cpp's log lines become `tracing` events, and the sentences of our errors.
//!
//! llama.cpp returns a null pointer and says why only in its log, so the last error lines of each thread are kept to be
//! attached to the error that follows. It also tells the sizes of its buffers nowhere else: the C API has no call for
//! them (the C++ one returns a `std::map`), so they are read from the lines that announce them.
use std::cell::RefCell;
use std::collections::VecDeque;
use std::ffi::{CStr, c_char, c_void};
use std::panic::{AssertUnwindSafe, catch_unwind};

use llama_cpp_sys_2 as sys;

/// Error lines kept per thread: a failed load says its reason in the last two or three.
const ERROR_LINES_MAX: usize = 4;
/// Longest line kept while it waits for its end; longer ones are cut into events of this size.
const LINE_BYTES_MAX: usize = 16 << 10;

/// What was announced of buffers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct BufferSizes {
    /// Weights that are not the file's own mapped pages.
    pub copied_bytes: u64,
    /// KV caches and recurrent states.
    pub kv_bytes: u64,
    /// Compute and output buffers.
    pub compute_bytes: u64,
}

#[derive(Default)]
struct Thread {
    /// A line whose end has not come yet.
    partial: String,
    level: sys::ggml_log_level,
    errors: VecDeque<String>,
    sizes: BufferSizes,
}

thread_local! {
    static THREAD: RefCell<Thread> = RefCell::default();
}

/// Makes llama.cpp and ggml log here.
pub(crate) fn install() {
    // SAFETY: the callback is a plain function that lives as long as the program, takes no user data and never unwinds.
    unsafe { sys::llama_log_set(Some(on_log), std::ptr::null_mut()) };
}

/// Forgets what this thread has logged so far; the next call is about to be made.
pub(crate) fn forget() {
    THREAD.with_borrow_mut(|t| {
        t.errors.clear();
        t.sizes = BufferSizes::default();
    });
}

/// The error lines since [`forget`], or `otherwise` when there were none.
pub(crate) fn errors(otherwise: &str) -> String {
    THREAD.with_borrow_mut(|t| match t.errors.is_empty() {
        true => otherwise.to_owned(),
        false => t.errors.drain(..).collect::<Vec<_>>().join("; "),
    })
}

/// The buffer sizes announced since [`forget`].
pub(crate) fn sizes() -> BufferSizes {
    THREAD.with_borrow(|t| t.sizes)
}

unsafe extern "C" fn on_log(level: sys::ggml_log_level, text: *const c_char, _: *mut c_void) {
    if text.is_null() {
        return;
    }
    // SAFETY: llama.cpp passes a null-terminated string that stays valid during the call.
    let text = unsafe { CStr::from_ptr(text) }.to_string_lossy();
    // A panic (of a tracing subscriber, say) must not unwind into C++. It is dropped: there is nowhere to report it.
    let _ = catch_unwind(AssertUnwindSafe(|| take(level, &text)));
}

fn take(level: sys::ggml_log_level, text: &str) {
    // The thread may be ending, or be inside another line: then the line is passed on as it is.
    let lines = THREAD.try_with(|thread| {
        let mut thread = thread.try_borrow_mut().ok()?;
        if level != sys::GGML_LOG_LEVEL_CONT {
            let unfinished = std::mem::take(&mut thread.partial);
            let lines = thread.split(text, level);
            return Some(if unfinished.is_empty() { lines } else { [vec![(level, unfinished)], lines].concat() });
        }
        let level = thread.level;
        Some(thread.split(text, level))
    });
    match lines {
        Ok(Some(lines)) => lines.iter().for_each(|(level, line)| emit(*level, line)),
        _ => emit(level, text.trim_end()),
    }
}

impl Thread {
    fn split(&mut self, text: &str, level: sys::ggml_log_level) -> Vec<(sys::ggml_log_level, String)> {
        self.level = level;
        self.partial.push_str(text);
        let mut lines = Vec::new();
        while let Some(end) = self.partial.find('\n') {
            let rest = self.partial.split_off(end + 1);
            let line = std::mem::replace(&mut self.partial, rest);
            lines.push(line.trim_end().to_owned());
        }
        if self.partial.len() > LINE_BYTES_MAX {
            lines.push(std::mem::take(&mut self.partial));
        }
        lines.retain(|l| !l.is_empty());
        for line in &lines {
            self.note(level, line);
        }
        lines.into_iter().map(|l| (level, l)).collect()
    }

    fn note(&mut self, level: sys::ggml_log_level, line: &str) {
        if level == sys::GGML_LOG_LEVEL_ERROR {
            if self.errors.len() == ERROR_LINES_MAX {
                self.errors.pop_front();
            }
            self.errors.push_back(line.to_owned());
        }
        let Some((what, bytes)) = buffer_size(line) else { return };
        if what.ends_with("_Mapped model") {
            // The file's own pages.
        } else if what.ends_with(" model") {
            self.sizes.copied_bytes += bytes;
        } else if what.ends_with(" KV") || what.ends_with(" RS") || what.ends_with(" state") {
            self.sizes.kv_bytes += bytes;
        } else if what.ends_with(" compute") || what.ends_with(" output") {
            self.sizes.compute_bytes += bytes;
        }
    }
}

/// `("…: CPU KV", bytes)` of a line `…: CPU KV buffer size = 1.88 MiB`.
fn buffer_size(line: &str) -> Option<(&str, u64)> {
    let (what, size) = line.split_once(" buffer size = ")?;
    let mib: f64 = size.trim().split_once(" MiB")?.0.parse().ok()?;
    Some((what, (mib * 1048576.0) as u64))
}

/// llama.cpp's "info" is a hundred lines for each load, which only matter when something is being looked for.
fn emit(level: sys::ggml_log_level, line: &str) {
    match level {
        sys::GGML_LOG_LEVEL_ERROR => tracing::error!(target: "llama.cpp", "{line}"),
        sys::GGML_LOG_LEVEL_WARN => tracing::warn!(target: "llama.cpp", "{line}"),
        sys::GGML_LOG_LEVEL_INFO => tracing::debug!(target: "llama.cpp", "{line}"),
        _ => tracing::trace!(target: "llama.cpp", "{line}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn continued_lines_are_joined_and_errors_and_sizes_kept() {
        forget();
        take(sys::GGML_LOG_LEVEL_ERROR, "load: bad ");
        take(sys::GGML_LOG_LEVEL_CONT, "tensor\n");
        take(sys::GGML_LOG_LEVEL_INFO, "llama_kv_cache:        CPU KV buffer size =     1.50 MiB\n");
        take(sys::GGML_LOG_LEVEL_INFO, "load_tensors:   CPU_Mapped model buffer size =   108.27 MiB\n");
        take(sys::GGML_LOG_LEVEL_INFO, "load_tensors:   CPU_REPACK model buffer size =     1.00 MiB\n");
        take(sys::GGML_LOG_LEVEL_INFO, "sched_reserve:        CPU compute buffer size =     2.00 MiB\n");
        assert_eq!(sizes(), BufferSizes { copied_bytes: 1 << 20, kv_bytes: 3 << 19, compute_bytes: 2 << 20 });
        assert_eq!(errors("none"), "load: bad tensor");
        assert_eq!(errors("none"), "none");
    }
}
