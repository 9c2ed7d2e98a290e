//! Lines and server-sent events, out of byte chunks that break anywhere.

/// Longest line that is kept, in bytes: an answer's chunk has hundreds, a load's last event some kilobytes.
pub const LINE_BYTES_MAX: usize = 8 << 20;

/// A line longer than [`LINE_BYTES_MAX`].
#[derive(Debug, thiserror::Error)]
#[error("the daemon sent a line of more than {LINE_BYTES_MAX} bytes; is something else listening on its port?")]
pub struct LineTooLong;

/// Cuts a byte stream into lines. Characters that a chunk border divides come out whole.
#[derive(Debug, Default)]
pub struct Lines {
    buffer: Vec<u8>,
    /// Bytes of `buffer` that were searched for a line's end already.
    searched: usize,
}

impl Lines {
    /// Takes another chunk in.
    pub fn push(&mut self, chunk: &[u8]) -> Result<(), LineTooLong> {
        self.buffer.extend_from_slice(chunk);
        if self.buffer.len() > LINE_BYTES_MAX + chunk.len() { Err(LineTooLong) } else { Ok(()) }
    }

    /// The next whole line, without its end (`\n` or `\r\n`).
    pub fn next_line(&mut self) -> Option<String> {
        let Some(end) = self.buffer[self.searched..].iter().position(|b| *b == b'\n') else {
            self.searched = self.buffer.len();
            return None;
        };
        let mut line: Vec<u8> = self.buffer.drain(..=self.searched + end).collect();
        self.searched = 0;
        line.pop();
        if line.last() == Some(&b'\r') {
            line.pop();
        }
        Some(String::from_utf8_lossy(&line).into_owned())
    }

    /// What follows the last line's end, once the stream has ended; none when there is nothing.
    pub fn rest(&mut self) -> Option<String> {
        self.searched = 0;
        let rest = std::mem::take(&mut self.buffer);
        if rest.is_empty() { None } else { Some(String::from_utf8_lossy(&rest).into_owned()) }
    }
}

/// Gathers the lines of a `text/event-stream` into events. Only their data matters here: names, ids and comments
/// are passed over, as the standard has it for what a client does not use.
#[derive(Debug, Default)]
pub struct Events {
    data: Option<String>,
}

impl Events {
    /// Takes a line in; an event's data comes out at the empty line that ends it.
    pub fn line(&mut self, line: &str) -> Option<String> {
        if line.is_empty() {
            return self.data.take();
        }
        if let Some(value) = line.strip_prefix("data:") {
            let value = value.strip_prefix(' ').unwrap_or(value);
            match &mut self.data {
                Some(data) => {
                    data.push('\n');
                    data.push_str(value);
                }
                None => self.data = Some(value.to_string()),
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whatever the chunks, the same events.
    #[test]
    fn chunk_borders_do_not_matter() {
        let stream = ": comment\r\nevent: x\ndata: {\"a\":\"é\"}\n\ndata:one\ndata:  two\n\n\ndata: [DONE]\n\n";
        for size in 1..stream.len() {
            let (mut lines, mut events, mut got) = (Lines::default(), Events::default(), Vec::new());
            for chunk in stream.as_bytes().chunks(size) {
                lines.push(chunk).unwrap();
                while let Some(line) = lines.next_line() {
                    got.extend(events.line(&line));
                }
            }
            assert_eq!(got, ["{\"a\":\"é\"}", "one\n two", "[DONE]"], "chunks of {size}");
            assert_eq!(lines.rest(), None);
        }
    }

    #[test]
    fn a_line_without_end_is_refused() {
        let (mut lines, chunk) = (Lines::default(), vec![b'x'; 1 << 20]);
        let refused = (0..20).any(|_| {
            let full = lines.push(&chunk).is_err();
            full || lines.next_line().is_some()
        });
        assert!(refused);
    }
}
