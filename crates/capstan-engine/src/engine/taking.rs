//! How a request comes into the queue: new, or taken up again after its epoch was lost.
use capstan_proto::RequestId;

use super::Engine;
use crate::queue::Request;
use crate::report::SubmitError;

impl Engine {
    /// Takes a request into the queue. It gets a slot when micro-batches are polled.
    pub fn handle_submit(
        &mut self,
        id: RequestId,
        prompt: Vec<i32>,
        max_tokens: Option<u32>,
    ) -> Result<(), SubmitError> {
        self.handle_resume(id, prompt, 0, max_tokens)
    }

    /// The same for a request whose last `answered` tokens are an answer that was begun in a lost epoch; `max_tokens`
    /// counts those to come. Where shapes are fixed, these tokens are computed one by one, as they were the first time:
    /// then the answer goes on bit for bit as if nothing had happened.
    pub fn handle_resume(
        &mut self,
        id: RequestId,
        prompt: Vec<i32>,
        answered: u32,
        max_tokens: Option<u32>,
    ) -> Result<(), SubmitError> {
        let ctx = self.config.ctx;
        if prompt.is_empty() {
            return Err(SubmitError::Empty);
        }
        if max_tokens == Some(0) {
            return Err(SubmitError::NoTokens);
        }
        if prompt.len() >= ctx as usize {
            return Err(SubmitError::ContextExceeded { prompt: prompt.len(), ctx });
        }
        if self.slots.find(id).is_some() || self.queue.ids().any(|q| q == id) {
            return Err(SubmitError::Duplicate(id));
        }
        // Requests for which a slot is free do not wait; they only have not been polled yet.
        let free = (self.slots.len() - self.slots.used()) as usize;
        if self.queue.len() >= self.config.queue_max.saturating_add(free) {
            return Err(SubmitError::Busy { queue_max: self.config.queue_max });
        }
        self.queue.push(Request { id, prompt, answered, max_tokens });
        self.debug_check();
        Ok(())
    }
}
