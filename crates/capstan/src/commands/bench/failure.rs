//! Why one request of a measurement failed; the measurement itself goes on.
use std::time::Duration;

/// How long a stream waits after "too busy" when the server names no time, and at most when it does: one full queue
/// must not turn into thousands of refusals, and one odd header must not stop the measurement.
const RETRY_DEFAULT: Duration = Duration::from_secs(1);
const RETRY_MAX: Duration = Duration::from_secs(30);

/// Why a request failed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Failure {
    /// No connection came about.
    #[error("nothing answers there ({0}); is the server running, and is its address right?")]
    Unreachable(String),
    /// The server answered with another status than success.
    #[error("HTTP {status}: {message}")]
    Refused {
        /// HTTP status.
        status: u16,
        /// What the server said.
        message: String,
        /// When it wants to be asked again.
        retry_after: Option<Duration>,
    },
    /// The connection ended before the answer did.
    #[error("the connection broke before the answer's end ({0})")]
    BrokenOff(String),
    /// The answer took longer than `--timeout`.
    #[error("no complete answer came in time; --timeout sets how long one may take")]
    TimedOut,
    /// The answer began and then turned into an error.
    #[error("an error came in the stream: {0}")]
    InStream(String),
    /// What came is no answer of an OpenAI-compatible server.
    #[error("the answer cannot be understood: {0}")]
    Malformed(String),
}

impl Failure {
    /// The kind in a word, for counting.
    pub fn kind(&self) -> String {
        match self {
            Self::Unreachable(_) => "unreachable".into(),
            Self::Refused { status, .. } => format!("http_{status}"),
            Self::BrokenOff(_) => "broken_off".into(),
            Self::TimedOut => "timed_out".into(),
            Self::InStream(_) => "error_in_stream".into(),
            Self::Malformed(_) => "malformed".into(),
        }
    }

    /// How long to wait before the next request.
    pub fn pause(&self) -> Duration {
        match self {
            // Too many requests, or not ready yet.
            Self::Refused { status: 429 | 503, retry_after, .. } => retry_after.unwrap_or(RETRY_DEFAULT).min(RETRY_MAX),
            _ => Duration::ZERO,
        }
    }
}

/// The seconds of a `Retry-After` header. Its other form, a date, is left alone: clocks differ.
pub fn retry_after(header: Option<&str>) -> Option<Duration> {
    header?.trim().parse::<u64>().ok().map(Duration::from_secs)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_are_the_servers_within_bounds() {
        let busy = |header| Failure::Refused { status: 429, message: String::new(), retry_after: retry_after(header) };
        assert_eq!(busy(Some(" 2 ")).pause(), Duration::from_secs(2));
        assert_eq!(busy(Some("0")).pause(), Duration::ZERO);
        assert_eq!(busy(Some("99999999")).pause(), RETRY_MAX);
        for none in [None, Some("Wed, 21 Oct 2026 07:28:00 GMT"), Some("-1"), Some("")] {
            assert_eq!(busy(none).pause(), RETRY_DEFAULT);
        }
        assert_eq!(Failure::TimedOut.pause(), Duration::ZERO);
        assert_eq!((busy(None).kind(), Failure::TimedOut.kind()), ("http_429".into(), "timed_out".into()));
    }
}
