//! KV snapshots: what llama.cpp keeps of a sequence, as a file. `make snapshots` measures them against computing the
//! sequence again.
use std::ffi::CString;
use std::path::Path;

use llama_cpp_sys_2 as sys;

use crate::{Context, LlamaError, log};

impl Context {
    /// Bytes that [`Self::save`] would write for a slot, to a few.
    pub fn snapshot_bytes(&mut self, slot: u32) -> Result<u64, LlamaError> {
        self.check_slot(slot)?;
        // SAFETY: the context lives, the sequence exists, and no decode is running.
        Ok(unsafe { sys::llama_state_seq_get_size(self.as_ptr(), slot as i32) } as u64)
    }

    /// Writes what the cache holds of a slot to this file; gives its bytes.
    pub fn save(&mut self, slot: u32, path: &Path) -> Result<u64, LlamaError> {
        self.check_slot(slot)?;
        let name = c_path(path)?;
        log::forget();
        // SAFETY: the context lives, the sequence exists, and no decode is running; the name is a C string that lives
        // until the call returns, and no tokens are read when there are none.
        let written =
            unsafe { sys::llama_state_seq_save_file(self.as_ptr(), name.as_ptr(), slot as i32, std::ptr::null(), 0) };
        // Bytes that were still buffered when the file was closed may have found no room, which llama.cpp does not see.
        match std::fs::metadata(path) {
            Ok(meta) if written > 0 && meta.len() == written as u64 => Ok(meta.len()),
            Ok(_) => Err(LlamaError::Context(format!("slot {slot} was not saved: {}", log::errors("no room")))),
            Err(e) => Err(LlamaError::Context(format!("slot {slot} was not saved: {e}"))),
        }
    }

    /// Fills an empty slot with what [`Self::save`] wrote of one with so many tokens, in a context of the same model and
    /// size. The file must be this program's own: llama.cpp checks little of it. After an error the slot is empty.
    pub fn restore(&mut self, slot: u32, path: &Path, tokens: u32) -> Result<(), LlamaError> {
        self.check_slot(slot)?;
        if self.next_pos(slot) != Some(0) {
            return Err(LlamaError::Refused(format!("slot {slot} is not empty")));
        }
        if self.copies_wait() {
            return Err(LlamaError::Refused(format!("slot {slot} may be copied over")));
        }
        if tokens > self.ctx_per_slot() {
            return Err(LlamaError::Refused(format!("slot {slot} does not hold {tokens} tokens")));
        }
        let name = c_path(path)?;
        let (mut token, mut count) = (0, 0);
        log::forget();
        // SAFETY: the context lives, the sequence exists and is empty, and no decode is running; the name is a C string,
        // there is room for one token and for their number, and all live until the call returns.
        let read = unsafe {
            sys::llama_state_seq_load_file(self.as_ptr(), name.as_ptr(), slot as i32, &mut token, 1, &mut count)
        };
        if read == 0 {
            return Err(LlamaError::Context(format!("slot {slot} was not restored: {}", log::errors("no reason"))));
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

fn c_path(path: &Path) -> Result<CString, LlamaError> {
    let name = path.to_str().and_then(|name| CString::new(name).ok());
    name.ok_or_else(|| LlamaError::Context(format!("{} is no name that llama.cpp takes", path.display())))
}
