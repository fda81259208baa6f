//! Reading HTTP/1.1 messages from bytes that come in any pieces. No sockets here.

use std::ops::ControlFlow;

/// A head longer than this is refused.
const MAX_HEAD: usize = 64 << 10;
const MAX_HEADERS: usize = 64;

/// The peer does not speak HTTP/1.1 as we read it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Malformed {
    /// The parser refused the head.
    #[error("the head is not HTTP/1.1: {0}")]
    Head(#[from] httparse::Error),
    /// The head did not end within [`MAX_HEAD`].
    #[error("the head is longer than {MAX_HEAD} bytes")]
    HeadTooLong,
    /// `content-length` is no number.
    #[error("content-length is no number")]
    Length,
    /// A chunk does not begin with its size or end with a line break.
    #[error("the body is not chunked as it should be")]
    Chunk,
}

/// How much of a body is still to come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Framing {
    /// This many bytes.
    Length(u64),
    /// Chunks, until an empty one.
    Chunked(Chunk),
    /// Everything until the peer closes.
    UntilClose,
}

/// Where a chunked body stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Chunk {
    /// In the line with the size; `digits` of it were read.
    Size { size: u64, digits: u8 },
    /// In the rest of that line.
    Extension { size: u64 },
    /// In the data; this many bytes are to come.
    Data(u64),
    /// In the line break after the data.
    DataEnd,
    /// In the lines after the last chunk; whether the current one has any bytes.
    Trailer { blank: bool },
    /// Past the end.
    Ended,
}

impl Chunk {
    const START: Self = Self::Size { size: 0, digits: 0 };
}

/// The first part of a message.
pub(crate) trait Head: Sized {
    /// The head and its length when `bytes` holds the whole of it.
    fn parse(bytes: &[u8]) -> Result<Option<(Self, usize)>, Malformed>;
    /// How long the body is.
    fn framing(&self) -> Framing;
}

/// Reads one message, however it was cut.
#[derive(Debug)]
pub(crate) struct Reader<H> {
    /// Bytes of a head that has not ended yet.
    partial: Vec<u8>,
    state: Option<(H, Framing)>,
}

impl<H> Default for Reader<H> {
    fn default() -> Self {
        Self {
            partial: Vec::new(),
            state: None,
        }
    }
}

impl<H: Head> Reader<H> {
    /// Takes bytes up to the end of the message, hands the pieces of its body to `body`, and returns how many it
    /// took: fewer than given only when the message ended.
    pub(crate) fn feed(
        &mut self,
        bytes: &[u8],
        mut body: impl FnMut(&[u8]),
    ) -> Result<usize, Malformed> {
        let mut at = 0;
        if self.state.is_none() {
            match self.head(bytes)? {
                ControlFlow::Break(taken) => return Ok(taken),
                ControlFlow::Continue(taken) => at = taken,
            }
        }
        let (_, framing) = self.state.as_mut().expect("the head was just read");
        while at < bytes.len() && !ended(*framing) {
            at += step(framing, &bytes[at..], &mut body)?;
        }
        Ok(at)
    }

    /// The head, once it was read.
    pub(crate) fn message(&self) -> Option<&H> {
        self.state.as_ref().map(|(head, _)| head)
    }

    /// True when the last byte of the message was read.
    pub(crate) fn is_done(&self) -> bool {
        self.state
            .as_ref()
            .is_some_and(|(_, framing)| ended(*framing))
    }

    /// True when the message ends where the peer closes.
    pub(crate) fn ends_at_close(&self) -> bool {
        matches!(self.state, Some((_, Framing::UntilClose)))
    }

    /// `Break` when the head goes on after `bytes`; either way how many bytes were taken.
    fn head(&mut self, bytes: &[u8]) -> Result<ControlFlow<usize, usize>, Malformed> {
        let before = self.partial.len();
        let parsed = if before == 0 {
            H::parse(bytes)?
        } else {
            self.partial.extend_from_slice(bytes);
            H::parse(&self.partial)?
        };
        let Some((head, length)) = parsed else {
            if before == 0 {
                self.partial.extend_from_slice(bytes);
            }
            if self.partial.len() > MAX_HEAD {
                return Err(Malformed::HeadTooLong);
            }
            return Ok(ControlFlow::Break(bytes.len()));
        };
        let framing = head.framing();
        self.state = Some((head, framing));
        Ok(ControlFlow::Continue(length - before))
    }
}

fn ended(framing: Framing) -> bool {
    matches!(framing, Framing::Length(0) | Framing::Chunked(Chunk::Ended))
}

/// Moves past some of `bytes`, which is not empty, and returns how many.
fn step(
    framing: &mut Framing,
    bytes: &[u8],
    body: &mut impl FnMut(&[u8]),
) -> Result<usize, Malformed> {
    match framing {
        Framing::UntilClose => {
            body(bytes);
            Ok(bytes.len())
        }
        Framing::Length(left) => {
            let taken = upto(*left, bytes);
            body(&bytes[..taken]);
            *left -= taken as u64;
            Ok(taken)
        }
        Framing::Chunked(chunk) => {
            if let Chunk::Data(left) = chunk {
                let taken = upto(*left, bytes);
                body(&bytes[..taken]);
                *left -= taken as u64;
                if *left == 0 {
                    *chunk = Chunk::DataEnd;
                }
                return Ok(taken);
            }
            *chunk = after(*chunk, bytes[0])?;
            Ok(1)
        }
    }
}

/// The state after one byte that is not data.
fn after(chunk: Chunk, byte: u8) -> Result<Chunk, Malformed> {
    match (chunk, byte) {
        (Chunk::Size { digits: 1.., size } | Chunk::Extension { size }, b'\n') => {
            Ok(if size == 0 {
                Chunk::Trailer { blank: true }
            } else {
                Chunk::Data(size)
            })
        }
        (Chunk::Size { digits: 1.., size }, b'\r' | b';' | b' ' | b'\t') => {
            Ok(Chunk::Extension { size })
        }
        (Chunk::Size { size, digits }, _) if digits < 15 => {
            let digit = char::from(byte).to_digit(16).ok_or(Malformed::Chunk)?;
            Ok(Chunk::Size {
                size: size * 16 + u64::from(digit),
                digits: digits + 1,
            })
        }
        (Chunk::Size { .. }, _) => Err(Malformed::Chunk),
        (Chunk::Extension { .. } | Chunk::DataEnd, b'\r') | (Chunk::Trailer { .. }, b'\r') => {
            Ok(chunk)
        }
        (Chunk::Extension { .. }, _) => Ok(chunk),
        (Chunk::DataEnd, b'\n') => Ok(Chunk::START),
        (Chunk::DataEnd, _) => Err(Malformed::Chunk),
        (Chunk::Trailer { blank: true }, b'\n') => Ok(Chunk::Ended),
        (Chunk::Trailer { .. }, _) => Ok(Chunk::Trailer {
            blank: byte == b'\n',
        }),
        (Chunk::Data(_) | Chunk::Ended, _) => Ok(chunk), // `step` and `ended` keep these away
    }
}

fn upto(left: u64, bytes: &[u8]) -> usize {
    usize::try_from(left).unwrap_or(usize::MAX).min(bytes.len())
}

/// What the mock needs to know of a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct RequestHead {
    /// `GET`, `POST`, …
    pub(crate) method: String,
    /// The path without its query.
    pub(crate) path: String,
    /// The client wants the connection closed afterwards.
    pub(crate) close: bool,
    framing: Framing,
}

impl Head for RequestHead {
    fn parse(bytes: &[u8]) -> Result<Option<(Self, usize)>, Malformed> {
        let mut headers = [httparse::EMPTY_HEADER; MAX_HEADERS];
        let mut request = httparse::Request::new(&mut headers);
        let httparse::Status::Complete(length) = request.parse(bytes)? else {
            return Ok(None);
        };
        let path = request.path.unwrap_or_default();
        let fields = Fields::read(request.headers)?;
        let head = Self {
            method: request.method.unwrap_or_default().to_owned(),
            path: path.split('?').next().unwrap_or(path).to_owned(),
            close: fields.closes(request.version),
            framing: fields.framing.unwrap_or(Framing::Length(0)),
        };
        Ok(Some((head, length)))
    }

    fn framing(&self) -> Framing {
        self.framing
    }
}

/// What the load generator needs to know of a reply.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct ReplyHead {
    /// The status code.
    pub(crate) status: u16,
    /// The server closes the connection afterwards.
    pub(crate) close: bool,
    framing: Framing,
}

impl Head for ReplyHead {
    fn parse(bytes: &[u8]) -> Result<Option<(Self, usize)>, Malformed> {
        let mut headers = [httparse::EMPTY_HEADER; MAX_HEADERS];
        let mut reply = httparse::Response::new(&mut headers);
        let httparse::Status::Complete(length) = reply.parse(bytes)? else {
            return Ok(None);
        };
        let fields = Fields::read(reply.headers)?;
        let status = reply.code.unwrap_or_default();
        let framing = match status {
            204 | 304 => Framing::Length(0),
            _ => fields.framing.unwrap_or(Framing::UntilClose),
        };
        let head = Self {
            status,
            close: fields.closes(reply.version) || framing == Framing::UntilClose,
            framing,
        };
        Ok(Some((head, length)))
    }

    fn framing(&self) -> Framing {
        self.framing
    }
}

/// The header fields either side acts on.
#[derive(Default)]
struct Fields {
    framing: Option<Framing>,
    close: bool,
    keep_alive: bool,
}

impl Fields {
    fn read(headers: &[httparse::Header<'_>]) -> Result<Self, Malformed> {
        let mut fields = Self::default();
        for header in headers {
            let (name, value) = (header.name, header.value.trim_ascii());
            if name.eq_ignore_ascii_case("content-length") {
                let length = std::str::from_utf8(value)
                    .ok()
                    .and_then(|text| text.parse().ok())
                    .ok_or(Malformed::Length)?;
                // Chunked wins over a length, whichever came first.
                fields.framing.get_or_insert(Framing::Length(length));
            } else if name.eq_ignore_ascii_case("transfer-encoding") {
                fields.framing = Some(Framing::Chunked(Chunk::START));
            } else if name.eq_ignore_ascii_case("connection") {
                fields.close |= value.eq_ignore_ascii_case(b"close");
                fields.keep_alive |= value.eq_ignore_ascii_case(b"keep-alive");
            }
        }
        Ok(fields)
    }

    fn closes(&self, version: Option<u8>) -> bool {
        self.close || (version == Some(0) && !self.keep_alive)
    }
}

#[cfg(test)]
mod tests;
