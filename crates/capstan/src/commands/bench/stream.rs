//! An event stream as it arrives: each event with the moment its bytes came, everything bounded.
use std::time::{Duration, Instant};

use reqwest::Response;

use crate::commands::bench::failure::Failure;
use crate::lines::{Events, LINE_BYTES_MAX, Lines};

/// Most bytes of one event's lines. A line has this bound, too; many lines without an empty one shall not get round it.
const EVENT_BYTES_MAX: usize = LINE_BYTES_MAX;
/// Most events of one answer: far more than the longest context has tokens.
const EVENTS_MAX: u64 = 4 << 20;
/// How long the end of a reply may take after its last event. It comes in the same packet, or the connection is given
/// up.
const DRAIN_TIMEOUT: Duration = Duration::from_millis(200);

/// Cuts bytes into events. Bytes come in, data of events comes out; it knows no network and no clock.
#[derive(Debug, Default)]
pub struct Decoder {
    lines: Lines,
    events: Events,
    event_bytes: usize,
    events_seen: u64,
}

impl Decoder {
    /// Takes bytes in, cut anywhere.
    pub fn push(&mut self, bytes: &[u8]) -> Result<(), Failure> {
        self.lines.push(bytes).map_err(|_| Failure::Malformed(format!("a line of more than {LINE_BYTES_MAX} bytes")))
    }

    /// The data of the next whole event.
    pub fn next_event(&mut self) -> Result<Option<String>, Failure> {
        while let Some(line) = self.lines.next_line() {
            if let Some(data) = self.line(&line)? {
                return Ok(Some(data));
            }
        }
        Ok(None)
    }

    /// The last event, when the stream ended without the empty line after it.
    pub fn last_event(&mut self) -> Result<Option<String>, Failure> {
        if let Some(line) = self.lines.rest() {
            // Not an event yet: only an empty line makes it one.
            self.line(&line)?;
        }
        self.line("")
    }

    fn line(&mut self, line: &str) -> Result<Option<String>, Failure> {
        // Older llama.cpp servers have a field of their own for errors.
        if let Some(error) = line.strip_prefix("error:") {
            return Err(Failure::InStream(super::server::message_of(error.trim().as_bytes())));
        }
        self.event_bytes = if line.is_empty() { 0 } else { self.event_bytes + line.len() };
        if self.event_bytes > EVENT_BYTES_MAX {
            return Err(Failure::Malformed(format!("an event of more than {EVENT_BYTES_MAX} bytes")));
        }
        let event = self.events.line(line);
        if event.is_some() {
            self.events_seen += 1;
            if self.events_seen > EVENTS_MAX {
                return Err(Failure::Malformed(format!("more than {EVENTS_MAX} events in one answer")));
            }
        }
        Ok(event)
    }
}

/// The events of a reply.
#[derive(Debug)]
pub struct EventStream {
    /// None at the end.
    response: Option<Response>,
    decoder: Decoder,
    arrived: Instant,
}

impl EventStream {
    /// The events of `response`.
    pub fn new(response: Response) -> Self {
        Self { response: Some(response), decoder: Decoder::default(), arrived: Instant::now() }
    }

    /// The next event's data and when its last bytes came; none at the end. Dropping the future loses nothing.
    pub async fn next(&mut self) -> Result<Option<(Instant, String)>, Failure> {
        loop {
            if let Some(data) = self.decoder.next_event()? {
                return Ok(Some((self.arrived, data)));
            }
            let Some(response) = &mut self.response else { return Ok(None) };
            let chunk = response.chunk().await.map_err(|e| super::server::broken(&e))?;
            self.arrived = Instant::now();
            match chunk {
                Some(chunk) => self.decoder.push(&chunk)?,
                None => {
                    self.response = None;
                    return Ok(self.decoder.last_event()?.map(|data| (self.arrived, data)));
                }
            }
        }
    }

    /// Reads what follows the last event of interest. Only a reply that was read to its end leaves a connection for
    /// the next request, and a new one's round trip would count as its TTFT.
    pub async fn drain(&mut self) {
        if let Some(mut response) = self.response.take() {
            let rest = async { while let Ok(Some(_)) = response.chunk().await {} };
            // Without an end in time the connection closes as `response` goes; that is all that there is to do.
            tokio::time::timeout(DRAIN_TIMEOUT, rest).await.ok();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn decode(stream: &[u8], chunk_bytes: usize) -> Result<Vec<String>, Failure> {
        let (mut decoder, mut got) = (Decoder::default(), Vec::new());
        for chunk in stream.chunks(chunk_bytes) {
            decoder.push(chunk)?;
            while let Some(data) = decoder.next_event()? {
                got.push(data);
            }
        }
        got.extend(decoder.last_event()?);
        Ok(got)
    }

    #[test]
    fn comments_borders_and_a_missing_end_change_nothing() {
        let stream = ": keep-alive\n\n: again\r\n\r\ndata: {\"é\":1}\r\n\r\nid: 7\ndata: two\n\ndata: [DONE]";
        for chunk_bytes in 1..=stream.len() {
            assert_eq!(decode(stream.as_bytes(), chunk_bytes).unwrap(), ["{\"é\":1}", "two", "[DONE]"]);
        }
        assert!(decode(b": only comments\n\n", 3).unwrap().is_empty());
        assert!(decode(b"", 1).unwrap().is_empty());
    }

    #[test]
    fn an_error_field_is_an_error() {
        let failure = decode(b"data: x\n\nerror: {\"error\":{\"message\":\"too long\"}}\n\n", 5).unwrap_err();
        assert_eq!(failure, Failure::InStream("too long".into()));
    }

    #[test]
    fn endless_lines_and_endless_events_are_refused() {
        let line = vec![b'x'; LINE_BYTES_MAX + (2 << 20)];
        assert!(matches!(decode(&line, 1 << 20), Err(Failure::Malformed(why)) if why.contains("a line")));
        let mut event = b"data: ".to_vec();
        event.extend_from_slice(&vec![b'x'; 1 << 20]);
        event.push(b'\n');
        let event = event.repeat(10);
        assert!(matches!(decode(&event, 1 << 20), Err(Failure::Malformed(why)) if why.contains("an event")));
    }
}
