//! What llama.cpp keeps of a sequence, as bytes. Measured against computing the sequence again (`make snapshots`); the
//! product computes it again.
use llama_cpp_sys_2 as sys;

use crate::{Context, LlamaError};

impl Context {
    /// The cache of a slot.
    pub fn save(&mut self, slot: u32) -> Result<Vec<u8>, LlamaError> {
        self.check_slot(slot)?;
        // SAFETY: the context lives, the sequence exists, and no decode is running.
        let size = unsafe { sys::llama_state_seq_get_size(self.as_ptr(), slot as i32) };
        let mut bytes = vec![0; size];
        // SAFETY: as above, and there is room for what it said it writes.
        let written =
            unsafe { sys::llama_state_seq_get_data(self.as_ptr(), bytes.as_mut_ptr(), bytes.len(), slot as i32) };
        if written == size { Ok(bytes) } else { Err(LlamaError::Context("its cache could not be read".into())) }
    }

    /// Fills an empty slot with what [`Self::save`] gave of one with so many tokens, in a context of the same model and
    /// size. The bytes must be this program's own: llama.cpp checks little of them.
    pub fn restore(&mut self, slot: u32, bytes: &[u8], tokens: u32) -> Result<(), LlamaError> {
        self.check_slot(slot)?;
        if self.next_pos(slot) != Some(0) {
            return Err(LlamaError::Refused(format!("slot {slot} is not empty")));
        }
        // SAFETY: the context lives, the sequence exists and is empty, and no decode is running.
        let read = unsafe { sys::llama_state_seq_set_data(self.as_ptr(), bytes.as_ptr(), bytes.len(), slot as i32) };
        if read != bytes.len() {
            return Err(LlamaError::Context("its cache could not be written".into()));
        }
        self.put_next(slot, tokens);
        Ok(())
    }

    fn check_slot(&self, slot: u32) -> Result<(), LlamaError> {
        match self.next_pos(slot) {
            Some(_) => Ok(()),
            None => Err(LlamaError::Refused(format!("slot {slot} does not exist"))),
        }
    }
}
