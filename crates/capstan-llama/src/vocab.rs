//! Text to tokens and back.
use std::collections::HashSet;
use std::ffi::CStr;
use std::sync::Arc;

use llama_cpp_sys_2 as sys;

use crate::backend::owned;
use crate::{LlamaError, Model};

/// A model's vocabulary. Shards that are not the last have none: there every text is an error and every piece empty.
#[derive(Clone)]
pub struct Vocab {
    /// Keeps the pointer below valid.
    _model: Arc<Model>,
    ptr: *const sys::llama_vocab,
    n_tokens: i32,
    kind: sys::llama_vocab_type,
    /// Why texts cannot be tokenized, where calling llama.cpp would end the process.
    problem: Option<&'static str>,
}

// SAFETY: the vocabulary is only read, and lives as long as the model.
unsafe impl Send for Vocab {}
// SAFETY: as above.
unsafe impl Sync for Vocab {}

impl Vocab {
    pub(crate) fn new(model: &Arc<Model>) -> Self {
        // SAFETY: the model is loaded, and its vocabulary lives as long as it.
        let ptr = unsafe { sys::llama_model_get_vocab(model.as_ptr()) };
        // SAFETY: `ptr` is that vocabulary; both calls only read it.
        let (n_tokens, kind) = unsafe { (sys::llama_vocab_n_tokens(ptr), sys::llama_vocab_type(ptr)) };
        let mut vocab = Self { _model: model.clone(), ptr, n_tokens, kind, problem: None };
        vocab.problem = vocab.find_problem();
        vocab
    }

    fn find_problem(&self) -> Option<&'static str> {
        if self.kind == sys::LLAMA_VOCAB_TYPE_NONE {
            return Some("the model has no tokenizer; send token ids");
        }
        // SAFETY: the vocabulary is alive; the calls only read it.
        let (add_bos, add_eos) =
            unsafe { (sys::llama_vocab_get_add_bos(self.ptr), sys::llama_vocab_get_add_eos(self.ptr)) };
        if add_bos && self.bos().is_none() || add_eos && self.eos().is_none() {
            return Some("the model wants tokens around a text that its vocabulary lacks");
        }
        // This kind falls back to bytes, and throws through C when one is missing.
        (self.kind == sys::LLAMA_VOCAB_TYPE_SPM && !self.has_all_bytes())
            .then_some("the model's vocabulary has no tokens for single bytes; send token ids")
    }

    fn has_all_bytes(&self) -> bool {
        let mut seen = HashSet::new();
        for token in 0..self.n_tokens {
            let text = self.raw_text(token);
            if let [byte] = text {
                seen.insert(*byte);
            }
            let hex = text.strip_prefix(b"<0x").and_then(|t| t.strip_suffix(b">")).filter(|h| h.len() == 2);
            let byte = hex.and_then(|h| u8::from_str_radix(std::str::from_utf8(h).ok()?, 16).ok());
            seen.extend(byte);
        }
        seen.len() == 256
    }

    /// How many tokens there are.
    pub fn n_tokens(&self) -> usize {
        self.n_tokens.max(0) as usize
    }

    /// Whether texts can be tokenized.
    pub fn has_tokenizer(&self) -> bool {
        self.problem.is_none()
    }

    /// The tokens of a text. `add_special` adds what the model wants around it (such as a beginning-of-text token),
    /// `parse_special` reads special tokens written out in it.
    pub fn tokenize(&self, text: &str, add_special: bool, parse_special: bool) -> Result<Vec<i32>, LlamaError> {
        if let Some(problem) = self.problem {
            return Err(LlamaError::Tokenize(problem.into()));
        }
        let too_long = || LlamaError::Tokenize(format!("it has {} bytes, which is too many", text.len()));
        let len = i32::try_from(text.len()).map_err(|_| too_long())?;
        // Almost always a token is at least a byte; when it is not, llama.cpp says how many there are.
        let mut tokens = vec![0i32; text.len().saturating_add(16)];
        for _ in 0..2 {
            let room = i32::try_from(tokens.len()).map_err(|_| too_long())?;
            // SAFETY: `text` has `len` bytes, `tokens` has `room` entries, and the vocabulary has a tokenizer with the
            // tokens it needs (see `find_problem`).
            let n = unsafe {
                sys::llama_tokenize(
                    self.ptr,
                    text.as_ptr().cast(),
                    len,
                    tokens.as_mut_ptr(),
                    room,
                    add_special,
                    parse_special,
                )
            };
            if n >= 0 {
                tokens.truncate(n as usize);
                return Ok(tokens);
            }
            tokens.resize(n.checked_neg().ok_or_else(too_long)? as usize, 0);
        }
        Err(LlamaError::Tokenize("llama.cpp counted its tokens differently each time".into()))
    }

    /// The bytes of a token, which need not be whole characters. Empty for a token that does not exist, and for
    /// special tokens unless `special`.
    pub fn piece(&self, token: i32, special: bool) -> Vec<u8> {
        if !self.contains(token) || self.kind == sys::LLAMA_VOCAB_TYPE_NONE {
            return Vec::new();
        }
        let mut bytes = vec![0u8; 32];
        for _ in 0..2 {
            let room = i32::try_from(bytes.len()).unwrap_or(i32::MAX);
            // SAFETY: the token is in range, the vocabulary has a tokenizer, and `bytes` has at least `room` bytes.
            let n = unsafe { sys::llama_token_to_piece(self.ptr, token, bytes.as_mut_ptr().cast(), room, 0, special) };
            if n >= 0 {
                bytes.truncate(n as usize);
                return bytes;
            }
            bytes.resize(n.unsigned_abs() as usize, 0);
        }
        Vec::new()
    }

    /// Whether generation ends at this token.
    pub fn is_eog(&self, token: i32) -> bool {
        // SAFETY: the vocabulary is alive, and the token is in range.
        self.contains(token) && unsafe { sys::llama_vocab_is_eog(self.ptr, token) }
    }

    /// Whether this is one of the vocabulary's tokens.
    pub fn contains(&self, token: i32) -> bool {
        (0..self.n_tokens).contains(&token)
    }

    /// The beginning-of-text token.
    pub fn bos(&self) -> Option<i32> {
        // SAFETY: the vocabulary is alive.
        Some(unsafe { sys::llama_vocab_bos(self.ptr) }).filter(|t| self.contains(*t))
    }

    /// The end-of-text token.
    pub fn eos(&self) -> Option<i32> {
        // SAFETY: the vocabulary is alive.
        Some(unsafe { sys::llama_vocab_eos(self.ptr) }).filter(|t| self.contains(*t))
    }

    /// The beginning-of-text token as a chat template writes it; empty when there is none.
    pub fn bos_text(&self) -> String {
        self.bos().map(|t| self.text(t)).unwrap_or_default()
    }

    /// The end-of-text token as a chat template writes it; empty when there is none.
    pub fn eos_text(&self) -> String {
        self.eos().map(|t| self.text(t)).unwrap_or_default()
    }

    /// Whether [`Vocab::tokenize`] with `add_special` begins with [`Vocab::bos`].
    pub fn add_bos(&self) -> bool {
        // SAFETY: the vocabulary is alive.
        unsafe { sys::llama_vocab_get_add_bos(self.ptr) }
    }

    fn text(&self, token: i32) -> String {
        if !self.contains(token) || self.kind == sys::LLAMA_VOCAB_TYPE_NONE {
            return String::new();
        }
        // SAFETY: the token is in range, and its text lives as long as the vocabulary.
        unsafe { owned(sys::llama_vocab_get_text(self.ptr, token)) }
    }

    /// A token's text as the file has it. Only for a token in range of a vocabulary with a tokenizer.
    fn raw_text(&self, token: i32) -> &[u8] {
        // SAFETY: the caller checked range and kind; the text lives as long as the vocabulary.
        let text = unsafe { sys::llama_vocab_get_text(self.ptr, token) };
        if text.is_null() {
            return &[];
        }
        // SAFETY: not null, and null-terminated by llama.cpp.
        unsafe { CStr::from_ptr(text) }.to_bytes()
    }
}
