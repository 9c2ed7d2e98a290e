//! One request's events between the driver's stage and whoever reads them: bounded, and never able to hold up others.
//!
//! The stage puts events without waiting. A reader that falls too far behind loses its request, not the stage its
//! pace. The reason of an early end travels beside the queue, so it arrives even when the queue is full.
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};

use capstan_proto::generate::{ErrorKind, GenerateEvent, RequestError};
use tokio::sync::mpsc;
use tokio_util::sync::{CancellationToken, DropGuard};

/// Events that may wait for a reader: an answer of this many tokens never overflows, whoever reads it.
const BEHIND_EVENTS_MAX: usize = 4096;
/// Bytes that may wait for a reader: raw logits of a large vocabulary are 600 KB a token, and 100 of those are enough.
const BEHIND_BYTES_MAX: usize = 64 << 20;

struct Shared {
    bytes: AtomicUsize,
    end: OnceLock<RequestError>,
}

/// The stage's end.
pub(crate) struct EventSender {
    queue: mpsc::Sender<GenerateEvent>,
    shared: Arc<Shared>,
}

/// The reader's end. Dropping it cancels the request.
pub(crate) struct EventStream {
    queue: mpsc::Receiver<GenerateEvent>,
    shared: Arc<Shared>,
    done: bool,
    _cancel: DropGuard,
}

/// The reader is gone or too slow: cancel its request.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Overflow;

/// A queue for one request, and the token that is cancelled when its reader is gone.
pub(crate) fn request_queue() -> (EventSender, EventStream, CancellationToken) {
    let (tx, rx) = mpsc::channel(BEHIND_EVENTS_MAX);
    let shared = Arc::new(Shared { bytes: AtomicUsize::new(0), end: OnceLock::new() });
    let token = CancellationToken::new();
    let stream = EventStream { queue: rx, shared: shared.clone(), done: false, _cancel: token.clone().drop_guard() };
    (EventSender { queue: tx, shared }, stream, token)
}

fn bytes(event: &GenerateEvent) -> usize {
    match event {
        GenerateEvent::Token { text, logits, .. } => text.len() + logits.as_ref().map_or(0, |l| l.len() * 4),
        GenerateEvent::Started { prompt } => prompt.len() * 4,
        _ => 0,
    }
}

/// Whether nothing follows this event.
pub(crate) fn is_last(event: &GenerateEvent) -> bool {
    matches!(event, GenerateEvent::Finished { .. } | GenerateEvent::Failed(_))
}

impl EventSender {
    /// Queues an event without waiting.
    pub(crate) fn put(&self, event: GenerateEvent) -> Result<(), Overflow> {
        let size = bytes(&event);
        let behind = self.shared.bytes.fetch_add(size, Ordering::Relaxed);
        if behind + size > BEHIND_BYTES_MAX || self.queue.try_send(event).is_err() {
            // A reader that is gone does not look at this any more.
            self.shared.end.set(too_slow()).ok();
            return Err(Overflow);
        }
        Ok(())
    }

    /// Ends the request with an error, after what is queued.
    pub(crate) fn fail(self, error: RequestError) {
        self.shared.end.set(error).ok();
    }
}

impl EventStream {
    /// The next event; none after the last.
    pub(crate) async fn recv(&mut self) -> Option<GenerateEvent> {
        if self.done {
            return None;
        }
        let event = match self.queue.recv().await {
            Some(event) => {
                self.shared.bytes.fetch_sub(bytes(&event), Ordering::Relaxed);
                event
            }
            None => {
                let unexplained = || {
                    RequestError::new(
                        ErrorKind::StageLost,
                        "the stage that made the answer ended; try again in a moment",
                    )
                };
                GenerateEvent::Failed(self.shared.end.get().cloned().unwrap_or_else(unexplained))
            }
        };
        self.done = is_last(&event);
        Some(event)
    }
}

fn too_slow() -> RequestError {
    RequestError::new(
        ErrorKind::Internal,
        "the answer was cancelled because it was read too slowly; read the stream as it comes",
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn token(bytes: usize) -> GenerateEvent {
        GenerateEvent::Token { token: 1, text: "x".repeat(bytes), logprob: None, logits: None }
    }

    #[tokio::test]
    async fn a_slow_reader_loses_its_request_and_learns_why() {
        let (tx, mut rx, _token) = request_queue();
        for _ in 0..BEHIND_EVENTS_MAX {
            tx.put(token(1)).unwrap();
        }
        assert_eq!(tx.put(token(1)), Err(Overflow));
        drop(tx);
        let mut events = 0;
        let mut last = None;
        while let Some(event) = rx.recv().await {
            events += 1;
            last = Some(event);
        }
        assert_eq!(events, BEHIND_EVENTS_MAX + 1);
        assert!(matches!(last, Some(GenerateEvent::Failed(e)) if e.message.contains("too slowly")));
    }

    #[tokio::test]
    async fn bytes_are_bounded_and_reading_makes_room() {
        let (tx, mut rx, _token) = request_queue();
        let half = BEHIND_BYTES_MAX / 2;
        tx.put(token(half)).unwrap();
        rx.recv().await.unwrap();
        tx.put(token(half)).unwrap();
        tx.put(token(half)).unwrap();
        assert_eq!(tx.put(token(1)), Err(Overflow));
    }

    #[tokio::test]
    async fn a_failure_comes_after_what_was_queued_and_dropping_cancels() {
        let (tx, mut rx, token_) = request_queue();
        tx.put(token(1)).unwrap();
        tx.fail(RequestError::new(ErrorKind::StageLost, "gone"));
        assert!(matches!(rx.recv().await, Some(GenerateEvent::Token { .. })));
        assert!(matches!(rx.recv().await, Some(GenerateEvent::Failed(e)) if e.message == "gone"));
        assert_eq!(rx.recv().await, None);
        assert!(!token_.is_cancelled());
        drop(rx);
        assert!(token_.is_cancelled());
    }
}
