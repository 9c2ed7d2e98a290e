//! Bytes in, certain text out: what may still change with the next token is held back.
//!
//! Two things are uncertain at the end of what is known: an incomplete UTF-8 character, and text that may be the
//! beginning of a stop string. The stop string that is complete first ends the text, so the result does not depend on
//! how the bytes were cut into tokens.

/// What one push brought.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Piece {
    /// Text that is now certain; often empty.
    pub text: String,
    /// Whether a stop string is complete. Nothing follows.
    pub stopped: bool,
}

/// A stream of token bytes that becomes text.
#[derive(Clone, Debug, Default)]
pub struct TextStream {
    /// Non-empty stop strings.
    stops: Vec<String>,
    /// The beginning of a character: at most three bytes between two calls.
    bytes: Vec<u8>,
    /// Decoded text that may be the beginning of a stop string: shorter than the longest stop string between two calls.
    held: String,
    stopped: bool,
}

impl TextStream {
    /// A stream that ends before any of `stops`. Empty stop strings mean nothing and are left out.
    pub fn new(stops: Vec<String>) -> Self {
        Self { stops: stops.into_iter().filter(|s| !s.is_empty()).collect(), ..Self::default() }
    }

    /// Takes a token's bytes. Bytes that cannot become a character turn into U+FFFD as soon as that is certain.
    pub fn push(&mut self, bytes: &[u8]) -> Piece {
        if self.stopped {
            return Piece { text: String::new(), stopped: true };
        }
        self.bytes.extend_from_slice(bytes);
        self.decode();
        if let Some(start) = self.complete_stop() {
            self.stopped = true;
            self.bytes.clear();
            let mut text = std::mem::take(&mut self.held);
            text.truncate(start);
            return Piece { text, stopped: true };
        }
        let rest = self.held.split_off(self.held.len() - self.uncertain());
        Piece { text: std::mem::replace(&mut self.held, rest), stopped: false }
    }

    /// Ends the stream: what was held back. An incomplete character becomes U+FFFD.
    pub fn finish(&mut self) -> String {
        if !self.bytes.is_empty() {
            self.bytes.clear();
            self.held.push(char::REPLACEMENT_CHARACTER);
        }
        if let Some(start) = self.complete_stop() {
            self.held.truncate(start);
        }
        self.stopped = true;
        std::mem::take(&mut self.held)
    }

    /// Whether a stop string was complete, or the stream was finished.
    pub fn is_stopped(&self) -> bool {
        self.stopped
    }

    /// Moves what is certain of the bytes into `held`.
    fn decode(&mut self) {
        let mut rest = self.bytes.as_slice();
        let kept = loop {
            match std::str::from_utf8(rest) {
                Ok(text) => {
                    self.held.push_str(text);
                    break 0;
                }
                Err(error) => {
                    let (valid, after) = rest.split_at(error.valid_up_to());
                    self.held.push_str(&String::from_utf8_lossy(valid));
                    match error.error_len() {
                        Some(len) => {
                            self.held.push(char::REPLACEMENT_CHARACTER);
                            rest = &after[len..];
                        }
                        None => break after.len(),
                    }
                }
            }
        };
        self.bytes.drain(..self.bytes.len() - kept);
    }

    /// Where the stop string starts that is complete first; of several that end together, the longest.
    fn complete_stop(&self) -> Option<usize> {
        let found = self.stops.iter().filter_map(|stop| {
            let start = self.held.find(stop.as_str())?;
            Some((start + stop.len(), start))
        });
        found.min().map(|(_, start)| start)
    }

    /// Bytes at the end of `held` that may be the beginning of a stop string.
    fn uncertain(&self) -> usize {
        let held = self.held.as_bytes();
        let longest = |stop: &String| {
            let stop = stop.as_bytes();
            (1..stop.len().min(held.len() + 1))
                .rev()
                .find(|&n| held.ends_with(&stop[..n]) && self.held.is_char_boundary(held.len() - n))
        };
        self.stops.iter().filter_map(longest).max().unwrap_or(0)
    }
}
