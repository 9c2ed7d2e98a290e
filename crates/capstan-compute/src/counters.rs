//! What a compute process counts, read once a second.
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use capstan_proto::child::ChildStats;

/// Counts of the current epoch. The compute thread and the sending tasks write, the reporter reads.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    micro_batches: AtomicU64,
    rows: AtomicU64,
    busy_us: AtomicU64,
    bytes_sent: AtomicU64,
    slots_used: AtomicU32,
    queued: AtomicU32,
    guessed: AtomicU64,
    accepted: AtomicU64,
    dropped: AtomicU64,
    prompt_tokens: AtomicU64,
    cached_tokens: AtomicU64,
}

impl Counters {
    /// A new epoch begins. What the engine counts is set anew by [`Counters::set_engine`].
    pub fn reset(&self) {
        for counter in [&self.micro_batches, &self.rows, &self.busy_us, &self.bytes_sent] {
            counter.store(0, Relaxed);
        }
    }

    /// A micro-batch was computed.
    pub fn add(&self, rows: usize, busy: Duration) {
        self.micro_batches.fetch_add(1, Relaxed);
        self.rows.fetch_add(rows as u64, Relaxed);
        self.busy_us.fetch_add(busy.as_micros() as u64, Relaxed);
    }

    /// So many bytes went to the next stage.
    pub fn add_sent(&self, bytes: usize) {
        self.bytes_sent.fetch_add(bytes as u64, Relaxed);
    }

    /// Driver: what its engine counts now, and what it had counted when the epoch began.
    pub fn set_engine(&self, now: &capstan_engine::Counters, before: &capstan_engine::Counters) {
        self.slots_used.store(now.slots_used, Relaxed);
        self.queued.store(now.queued as u32, Relaxed);
        for (counter, now, before) in [
            (&self.guessed, now.guessed, before.guessed),
            (&self.accepted, now.accepted, before.accepted),
            (&self.dropped, now.dropped, before.dropped),
            (&self.prompt_tokens, now.prompt_tokens, before.prompt_tokens),
            (&self.cached_tokens, now.cached_tokens, before.cached_tokens),
        ] {
            counter.store(now.saturating_sub(before), Relaxed);
        }
    }

    /// All of it, for the daemon.
    pub fn snapshot(&self) -> ChildStats {
        ChildStats {
            micro_batches: self.micro_batches.load(Relaxed),
            rows: self.rows.load(Relaxed),
            busy_us: self.busy_us.load(Relaxed),
            slots_used: self.slots_used.load(Relaxed),
            queued: self.queued.load(Relaxed),
            guessed: self.guessed.load(Relaxed),
            accepted: self.accepted.load(Relaxed),
            dropped: self.dropped.load(Relaxed),
            prompt_tokens: self.prompt_tokens.load(Relaxed),
            cached_tokens: self.cached_tokens.load(Relaxed),
            bytes_sent: self.bytes_sent.load(Relaxed),
            peak_rss_bytes: crate::os::peak_rss_bytes(),
        }
    }
}
