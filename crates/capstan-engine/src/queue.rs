//! Requests that wait for a slot, first come, first served.
use std::collections::VecDeque;

use capstan_proto::RequestId;

/// A request without a slot.
#[derive(Debug)]
pub(crate) struct Request {
    pub id: RequestId,
    pub prompt: Vec<i32>,
    /// Of the prompt so many last tokens were answered in a lost epoch.
    pub answered: u32,
    pub max_tokens: Option<u32>,
}

impl Request {
    /// Tokens of the prompt that were asked.
    pub fn asked(&self) -> u32 {
        (self.prompt.len() as u32).saturating_sub(self.answered)
    }
}

/// The line before the slots. Its bound is the engine's to keep: it depends on how many slots are free.
#[derive(Debug, Default)]
pub(crate) struct Queue {
    requests: VecDeque<Request>,
}

impl Queue {
    pub fn push(&mut self, request: Request) {
        self.requests.push_back(request);
    }

    pub fn front(&self) -> Option<&Request> {
        self.requests.front()
    }

    pub fn pop(&mut self) -> Option<Request> {
        self.requests.pop_front()
    }

    /// Whether it was there.
    pub fn remove(&mut self, id: RequestId) -> bool {
        let before = self.requests.len();
        self.requests.retain(|r| r.id != id);
        self.requests.len() < before
    }

    pub fn len(&self) -> usize {
        self.requests.len()
    }

    pub fn ids(&self) -> impl Iterator<Item = RequestId> {
        self.requests.iter().map(|r| r.id)
    }
}
