//! Text on both sides of the model: a conversation becomes a prompt, and bytes of tokens become text.
//!
//! Pure: no clock (today's date is an argument), no sockets, no tokio.
//!
//! | module | idea |
//! |---|---|
//! | [`template`] | a model's chat template, compiled once and rendered within bounds |
//! | [`stream`] | bytes in, text that is certain out; stop strings |
//! | [`error`] | what may go wrong, as sentences |
#![forbid(unsafe_code)]

pub mod error;
mod json;
mod messages;
mod methods;
pub mod stream;
pub mod template;

pub use error::TextError;
pub use stream::{Piece, TextStream};
pub use template::ChatTemplate;
