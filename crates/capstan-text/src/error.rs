//! What may go wrong between a conversation and its prompt, as sentences for the one who sent it.
use capstan_proto::generate::{ErrorKind, RequestError};

/// Longest part of an error that a template or a client may have written, in characters.
const QUOTE_CHARS_MAX: usize = 400;

/// Why a conversation did not become a prompt. Nothing is left changed by any of them.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TextError {
    /// The template itself is no use, whatever is asked.
    #[error(
        "the model's chat template does not compile ({0}); send a ready prompt to /v1/completions, or load a GGUF with \
         a sound tokenizer.chat_template"
    )]
    Template(String),
    /// The messages, the tools or the template variables are malformed: the client can mend it.
    #[error("{0}")]
    Request(String),
    /// The template called `raise_exception`: it does not take such a conversation.
    #[error("the model's chat template refuses this conversation: {0}")]
    Refused(String),
    /// The template failed on this conversation.
    #[error(
        "the model's chat template failed on this conversation ({0}); the template may not know what was sent (tools, a \
         role), or send a ready prompt to /v1/completions"
    )]
    Render(String),
    /// The bound on a template's work was reached.
    #[error(
        "the model's chat template takes too much work on this conversation; shorten it, or send a ready prompt to /v1/completions"
    )]
    TooMuchWork,
    /// The date that was passed in is none.
    #[error("{0:?} is not a date like 2026-01-31; this is a fault of capstan")]
    Date(String),
}

impl From<TextError> for RequestError {
    fn from(error: TextError) -> Self {
        let kind = match error {
            TextError::Template(_) | TextError::Date(_) => ErrorKind::Internal,
            TextError::Request(_) | TextError::Refused(_) | TextError::Render(_) | TextError::TooMuchWork => {
                ErrorKind::BadRequest
            }
        };
        Self::new(kind, error.to_string())
    }
}

/// Foreign text, cut to a length that fits an error message.
pub(crate) fn quote(text: &str) -> String {
    match text.char_indices().nth(QUOTE_CHARS_MAX) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.to_owned(),
    }
}
