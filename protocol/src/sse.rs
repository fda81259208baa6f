//! Server-sent events: a decoder for any chunking and an encoder without detours.

use bytes::{Bytes, BytesMut};
use serde::Serialize;

/// The event that ends an OpenAI stream.
pub const DONE: &[u8] = b"data: [DONE]\n\n";

/// One decoded event.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// An event with data; `name` is empty when the stream gave none.
    Message {
        /// The `event:` field.
        name: String,
        /// The `data:` lines, joined by newlines.
        data: Bytes,
    },
    /// A comment line without its leading colon and space.
    Comment(Bytes),
}

/// An event grew past the decoder's limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("an event of the stream is longer than {limit} bytes")]
pub struct EventTooLong {
    /// The limit in bytes.
    pub limit: usize,
}

/// Splits a byte stream into events, however it was cut. LF, CRLF and CR end a line.
#[derive(Debug)]
pub struct Decoder {
    /// Bytes of the line that has not ended yet.
    line: BytesMut,
    /// The last byte was a CR that ended a line, so an LF right after it belongs to it.
    after_cr: bool,
    name: String,
    data: BytesMut,
    has_data: bool,
    limit: usize,
}

impl Decoder {
    /// A decoder that refuses events of more than `limit` bytes.
    #[must_use]
    pub fn new(limit: usize) -> Self {
        Self {
            line: BytesMut::new(),
            after_cr: false,
            name: String::new(),
            data: BytesMut::new(),
            has_data: false,
            limit,
        }
    }

    /// Takes the next bytes and appends every event they complete to `events`.
    ///
    /// # Errors
    /// [`EventTooLong`] when a line or event passes the limit; the stream cannot be read further.
    pub fn feed(&mut self, mut bytes: &[u8], events: &mut Vec<Event>) -> Result<(), EventTooLong> {
        if self.after_cr && !bytes.is_empty() {
            self.after_cr = false;
            if bytes[0] == b'\n' {
                bytes = &bytes[1..];
            }
        }
        while let Some(end) = memchr::memchr2(b'\n', b'\r', bytes) {
            let (line, rest) = bytes.split_at(end);
            if self.line.is_empty() {
                self.end_line(line, events)?;
            } else {
                self.line.extend_from_slice(line);
                let whole = self.line.split();
                self.end_line(&whole, events)?;
            }
            bytes = &rest[1..];
            if rest[0] == b'\r' {
                match bytes.first() {
                    Some(b'\n') => bytes = &bytes[1..],
                    Some(_) => {}
                    None => self.after_cr = true,
                }
            }
        }
        self.line.extend_from_slice(bytes);
        self.check(self.line.len())
    }

    /// True when no event is half read.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.line.is_empty() && !self.has_data
    }

    fn end_line(&mut self, line: &[u8], events: &mut Vec<Event>) -> Result<(), EventTooLong> {
        self.check(line.len() + self.data.len())?;
        if line.is_empty() {
            let name = std::mem::take(&mut self.name);
            if std::mem::take(&mut self.has_data) {
                events.push(Event::Message {
                    name,
                    data: self.data.split().freeze(),
                });
            }
            return Ok(());
        }
        let (field, value) = match memchr::memchr(b':', line) {
            Some(at) => (&line[..at], &line[at + 1..]),
            None => (line, &line[line.len()..]),
        };
        let value = value.strip_prefix(b" ").unwrap_or(value);
        match field {
            b"" => events.push(Event::Comment(Bytes::copy_from_slice(value))),
            b"data" => {
                if self.has_data {
                    self.data.extend_from_slice(b"\n");
                }
                self.data.extend_from_slice(value);
                self.has_data = true;
            }
            b"event" => self.name = String::from_utf8_lossy(value).into_owned(),
            _ => {} // `id` and `retry` mean nothing here; the standard says to ignore the rest
        }
        Ok(())
    }

    fn check(&self, length: usize) -> Result<(), EventTooLong> {
        if length > self.limit {
            Err(EventTooLong { limit: self.limit })
        } else {
            Ok(())
        }
    }
}

/// Appends `data: {json}\n\n`.
///
/// # Panics
/// If `value` cannot be written as JSON, which our wire types always can.
pub fn write_data(out: &mut Vec<u8>, value: &impl Serialize) {
    out.extend_from_slice(b"data: ");
    serde_json::to_writer(&mut *out, value).expect("wire types always serialise");
    out.extend_from_slice(b"\n\n");
}

/// Appends `event: {name}\ndata: {json}\n\n`.
///
/// # Panics
/// As [`write_data`].
pub fn write_event(out: &mut Vec<u8>, name: &str, value: &impl Serialize) {
    out.extend_from_slice(b"event: ");
    out.extend_from_slice(name.as_bytes());
    out.extend_from_slice(b"\n");
    write_data(out, value);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(name: &str, data: &str) -> Event {
        Event::Message {
            name: name.into(),
            data: Bytes::copy_from_slice(data.as_bytes()),
        }
    }

    fn decode(pieces: &[&[u8]]) -> Vec<Event> {
        let mut decoder = Decoder::new(1 << 20);
        let mut events = Vec::new();
        for piece in pieces {
            decoder.feed(piece, &mut events).expect("under the limit");
        }
        events
    }

    const SAMPLE: &[u8] =
        b": hello\n\ndata: one\n\nevent: ping\r\ndata: a\r\ndata:b\r\n\r\nid: 7\rdata: last\r\r";

    #[test]
    fn every_split_gives_the_same_events() {
        let expected = vec![
            Event::Comment(Bytes::from_static(b"hello")),
            message("", "one"),
            message("ping", "a\nb"),
            message("", "last"),
        ];
        for first in 0..=SAMPLE.len() {
            for second in first..=SAMPLE.len() {
                let pieces = [&SAMPLE[..first], &SAMPLE[first..second], &SAMPLE[second..]];
                assert_eq!(decode(&pieces), expected, "cut at {first} and {second}");
            }
        }
    }

    #[test]
    fn an_event_without_data_is_no_event() {
        assert_eq!(
            decode(&[b"event: ping\n\ndata:\n\n"]),
            vec![message("", "")]
        );
    }

    #[test]
    fn any_bytes_cut_anywhere_give_the_same_events_within_the_limit() {
        const PARTS: [&[u8]; 12] = [
            b"data:",
            b"data: ",
            b"event: x",
            b":",
            b"id",
            b"\n",
            b"\r",
            b"\r\n",
            b"\n\n",
            b"abc",
            b"\xff",
            b" ",
        ];
        let mut state = 1u64;
        let mut below = |most: usize| {
            // Knuth's generator: this crate has no other
            state = state
                .wrapping_mul(6364136223846793005)
                .wrapping_add(1442695040888963407);
            (state >> 33) as usize % most
        };
        for round in 0..5000 {
            let count = below(20);
            let stream: Vec<u8> = (0..count)
                .flat_map(|_| PARTS[below(PARTS.len())])
                .copied()
                .collect();
            let limit = 1 + below(20);
            let run = |size: usize| {
                let mut decoder = Decoder::new(limit);
                let mut events = Vec::new();
                let mut pieces = stream.chunks(size);
                let fed = pieces.try_for_each(|piece| decoder.feed(piece, &mut events));
                (events, fed.map(|()| decoder.is_idle()))
            };
            let whole = run(stream.len().max(1));
            let size = 1 + below(5);
            let cut = run(size);
            assert_eq!(cut, whole, "round {round}, pieces of {size}: {stream:?}");
            for event in whole.0 {
                let length = match &event {
                    Event::Message { data, .. } => data.len(),
                    Event::Comment(comment) => comment.len(),
                };
                assert!(
                    length <= limit,
                    "round {round}: {event:?} passed a limit of {limit}"
                );
            }
        }
    }

    #[test]
    fn an_endless_line_is_refused() {
        let mut decoder = Decoder::new(10);
        let mut events = Vec::new();
        assert_eq!(
            decoder.feed(b"data: 0123456789", &mut events),
            Err(EventTooLong { limit: 10 })
        );
    }
}
