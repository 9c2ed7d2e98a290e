//! Where logs go and what they look like: standard error, as text or JSON, by `tracing`.
use std::io::IsTerminal;

use tracing_subscriber::EnvFilter;

use crate::config::LogFormat;

/// Starts logging for this process. Only the first call has an effect.
///
/// A bare level is meant for Capstan's own crates; what its libraries log stays at warnings, for their debug output
/// would bury ours. Not even that of openraft: it calls every message to a machine that is off an error, several times a
/// second, and what matters of it our own crates say. A filter with targets is taken as it is.
pub fn init(level: &str, format: LogFormat) {
    let filter = match level.parse::<tracing::Level>() {
        Ok(own) if own > tracing::Level::WARN => format!("warn,openraft=off,capstan={level}"),
        _ => level.to_string(),
    };
    // The text was checked when the setting was parsed.
    let filter = EnvFilter::try_new(filter).unwrap_or_else(|_| EnvFilter::new("info"));
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal());
    // An error means that logging was started before, which is what is wanted.
    let _started = match format {
        LogFormat::Text => builder.try_init(),
        LogFormat::Json => builder.json().try_init(),
    };
}
