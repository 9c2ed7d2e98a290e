//! Ctrl-C as something to wait for beside the work, any number of times.
use std::future::{Future, pending};
use std::io;
use std::pin::Pin;

/// Waits for Ctrl-C. Once it came, it stays.
pub struct Interrupt {
    signal: Pin<Box<dyn Future<Output = io::Result<()>>>>,
    came: bool,
}

impl Interrupt {
    /// From the first [`Interrupt::unless`] on, Ctrl-C no longer ends the process by itself.
    pub fn new() -> Self {
        Self { signal: Box::pin(tokio::signal::ctrl_c()), came: false }
    }

    /// Whether Ctrl-C came while something was waited for.
    pub fn came(&self) -> bool {
        self.came
    }

    /// Does `work` unless Ctrl-C comes first; then none.
    pub async fn unless<T>(&mut self, work: impl Future<Output = T>) -> Option<T> {
        if self.came {
            return None;
        }
        tokio::select! {
            biased;
            () = self.wait() => None,
            done = work => Some(done),
        }
    }

    async fn wait(&mut self) {
        if let Err(e) = self.signal.as_mut().await {
            // Ctrl-C then ends the process as it always does; the measurement need not suffer.
            tracing::warn!("Ctrl-C cannot be caught: {e}");
            return pending().await;
        }
        self.came = true;
    }
}
