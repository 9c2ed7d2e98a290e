//! A link in virtual time: a bounded queue, a sender that takes one micro-batch at a time, a window on what is unread.
//!
//! ```text
//! compute thread ─▶ queue (STAGE_QUEUE) ─▶ sending (bytes / bandwidth) ─ latency ─▶ unread (window) ─▶ stage's queue
//!                   drop notices, in a lane of their own ─ latency ─▶ marks
//! ```
use std::collections::VecDeque;

use capstan_proto::limits;

use crate::cost::{LinkCost, Ns, Profile};
use crate::station::Frame;

/// Bytes that a receiver lets a sender have under way: the window of the transport's streams.
const WINDOW_BYTES: u64 = 16 << 20;

/// From one stage to the next.
#[derive(Debug)]
pub struct Link {
    cost: LinkCost,
    queue: VecDeque<Frame>,
    sending: bool,
    /// Sent, and not yet read at the other end.
    window_used: u64,
}

impl Link {
    /// An idle link.
    pub fn new(cost: LinkCost) -> Self {
        Self { cost, queue: VecDeque::new(), sending: false, window_used: 0 }
    }

    /// Whether the compute thread can hand over one more micro-batch without waiting.
    pub fn has_room(&self) -> bool {
        self.queue.len() < limits::STAGE_QUEUE
    }

    /// Takes a micro-batch; there must be room.
    pub fn push(&mut self, frame: Frame) {
        debug_assert!(self.has_room());
        self.queue.push_back(frame);
    }

    /// Begins to send the next micro-batch, if it can: gives it, and how long it takes the link up.
    pub fn begin(&mut self, profile: &Profile) -> Option<(Frame, Ns)> {
        if self.sending {
            return None;
        }
        let bytes = profile.bytes(self.queue.front()?.batch.rows.len() as u32);
        // What is larger than the whole window flows through it piece by piece, when nothing else is in it.
        if self.window_used > 0 && self.window_used + bytes > WINDOW_BYTES {
            return None;
        }
        self.sending = true;
        self.window_used += bytes;
        Some((self.queue.pop_front()?, self.cost.sending_ns(bytes)))
    }

    /// What was being sent has left.
    pub fn sent(&mut self) {
        self.sending = false;
    }

    /// A micro-batch was read at the other end.
    pub fn was_read(&mut self, frame: &Frame, profile: &Profile) {
        self.window_used = self.window_used.saturating_sub(profile.bytes(frame.batch.rows.len() as u32));
    }

    /// Whether nothing is on it or waits for it.
    pub fn is_idle(&self) -> bool {
        !self.sending && self.queue.is_empty()
    }

    /// Time from leaving to arriving.
    pub fn latency_ns(&self) -> Ns {
        self.cost.latency_ns()
    }
}
