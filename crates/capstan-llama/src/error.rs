//! Why llama.cpp could not do what was asked.
use std::path::PathBuf;

/// An error of this crate. Each says what happened and, where a person can do something, what.
#[derive(Debug, thiserror::Error)]
pub enum LlamaError {
    /// The file cannot be loaded as a model.
    #[error("{} cannot be loaded: {reason}; is the model damaged, or newer than this capstan?", path.display())]
    Load {
        /// The file.
        path: PathBuf,
        /// What llama.cpp or the operating system said.
        reason: String,
    },
    /// The system does not let a file be mapped without reading it ahead.
    #[error("{} cannot be loaded without reading all of it: {reason}", path.display())]
    Sparse {
        /// The file.
        path: PathBuf,
        /// Why not, and what to do.
        reason: String,
    },
    /// The progress callback asked to stop.
    #[error("loading {} was cancelled", .0.display())]
    Cancelled(PathBuf),
    /// The model is of a kind that is not served.
    #[error("this model is not supported: {0}")]
    Unsupported(String),
    /// No context could be made.
    #[error("the model is loaded but cannot be run: {0}")]
    Context(String),
    /// A micro-batch breaks a rule; nothing was changed.
    #[error("the micro-batch is refused: {0}")]
    Refused(String),
    /// A computation broke off; the KV cache may have changed in part.
    #[error("the computation failed: {0}")]
    Compute(String),
    /// A window does not behave as the architecture table says.
    #[error("the stage failed its check at the start and will not serve: {0}")]
    SelfCheck(String),
    /// A text cannot be tokenized.
    #[error("the text cannot be tokenized: {0}")]
    Tokenize(String),
    /// The logits or the sampling settings allow no choice.
    #[error("no token can be sampled: {0}")]
    Sampling(String),
    /// A tensor row cannot be read.
    #[error("a tensor row cannot be converted: {0}")]
    Row(String),
}
