//! One keep-alive connection of a client, and what is asked on it.

use crate::http1::{Malformed, Reader, ReplyHead};
use bytes::{Bytes, BytesMut};
use protocol::chat::{ChatRequest, Content, Message};
use std::net::SocketAddr;
use std::time::{Duration, Instant};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

/// A server that says nothing for this long has failed the exchange.
const SILENCE: Duration = Duration::from_secs(60);
/// A reply is read in pieces of about this many bytes.
const PIECE: usize = 16 << 10;

/// The same request, sent to the same server again and again.
#[derive(Debug, Clone)]
pub(crate) struct Ask {
    /// The server.
    pub(crate) server: SocketAddr,
    /// Head and body.
    request: Bytes,
    /// How the body of a good reply ends.
    ending: &'static [u8],
}

impl Ask {
    /// A chat completion of `model`, streamed or whole.
    pub(crate) fn chat(server: SocketAddr, model: &str, stream: bool) -> Self {
        let body = serde_json::to_vec(&ChatRequest {
            model: model.into(),
            messages: vec![
                message("system", "You answer in one short paragraph."),
                message("user", "What makes the sky blue, and the sunset red?"),
            ],
            stream: stream.then_some(true),
            max_tokens: Some(100),
            temperature: Some(0.0),
            ..ChatRequest::default()
        })
        .expect("wire types always serialise");
        let ending = if stream { protocol::sse::DONE } else { b"}" };
        Self::raw(server, "/v1/chat/completions", &body, ending)
    }

    /// A POST of `body`, whose reply ends with `ending`.
    pub(crate) fn post(
        server: SocketAddr,
        path: &str,
        body: &serde_json::Value,
        ending: &'static [u8],
    ) -> Self {
        Self::raw(server, path, body.to_string().as_bytes(), ending)
    }

    /// A POST of any bytes, whose reply ends with `ending`.
    pub(crate) fn raw(server: SocketAddr, path: &str, body: &[u8], ending: &'static [u8]) -> Self {
        let mut request = format!(
            "POST {path} HTTP/1.1\r\nhost: {server}\r\nuser-agent: bench\r\n\
             content-type: application/json\r\ncontent-length: {}\r\n\r\n",
            body.len()
        )
        .into_bytes();
        request.extend_from_slice(body);
        Self {
            server,
            request: request.into(),
            ending,
        }
    }

    /// A plain GET whose reply may be anything.
    pub(crate) fn get(server: SocketAddr, path: &str) -> Self {
        let request = format!("GET {path} HTTP/1.1\r\nhost: {server}\r\n\r\n");
        Self {
            server,
            request: request.into(),
            ending: b"",
        }
    }
}

fn message(role: &str, text: &str) -> Message {
    Message {
        role: role.into(),
        content: Some(Content::Text(text.into())),
        ..Message::default()
    }
}

/// Why an exchange counts as an error.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Failure {
    /// The socket failed.
    #[error("{doing}: {error}")]
    Socket {
        doing: &'static str,
        error: std::io::Error,
    },
    /// The server closed before the reply ended.
    #[error("the connection closed within a reply")]
    Closed,
    /// The server sent nothing for [`SILENCE`].
    #[error("nothing came for {} s", SILENCE.as_secs())]
    Silent,
    /// The reply is no HTTP.
    #[error(transparent)]
    Malformed(#[from] Malformed),
    /// The reply went on after its end.
    #[error("bytes came after the end of a reply")]
    Surplus,
    /// The status is not 200.
    #[error("status {0}")]
    Status(u16),
    /// The body does not end as it should.
    #[error("the body of a reply is cut short")]
    Ending,
}

fn socket(doing: &'static str) -> impl FnOnce(std::io::Error) -> Failure {
    move |error| Failure::Socket { doing, error }
}

/// How long a good exchange took.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Times {
    /// Until the first byte of the body.
    pub(crate) first_byte: Duration,
    /// Until its last.
    pub(crate) whole: Duration,
}

/// One connection, opened again when the server or a failure closed it.
#[derive(Debug)]
pub(crate) struct Connection {
    stream: Option<TcpStream>,
    buffer: BytesMut,
}

impl Connection {
    /// Connects.
    pub(crate) async fn open(server: SocketAddr) -> Result<Self, Failure> {
        Ok(Self {
            stream: Some(connect(server).await?),
            buffer: BytesMut::with_capacity(PIECE),
        })
    }

    /// Asks and reads the whole reply; `body` gets its pieces. After an error the next call connects anew.
    pub(crate) async fn exchange(
        &mut self,
        ask: &Ask,
        mut body: impl FnMut(&[u8]),
    ) -> Result<Times, Failure> {
        let mut stream = match self.stream.take() {
            Some(stream) => stream,
            None => connect(ask.server).await?,
        };
        let begun = Instant::now();
        let mut first_byte = None;
        let mut ending = Ending::default();
        let mut reader = Reader::<ReplyHead>::default();
        write(&mut stream, &ask.request).await?;
        while !reader.is_done() {
            if read(&mut stream, &mut self.buffer).await? == 0 {
                if reader.ends_at_close() {
                    break;
                }
                return Err(Failure::Closed);
            }
            let taken = reader.feed(&self.buffer, |piece| {
                first_byte.get_or_insert_with(|| begun.elapsed());
                ending.push(piece);
                body(piece);
            })?;
            if taken < self.buffer.len() {
                return Err(Failure::Surplus);
            }
        }
        let whole = begun.elapsed();
        let head = reader.message().expect("a reply that ended has a head");
        if head.status != 200 {
            return Err(Failure::Status(head.status));
        }
        if !ending.is(ask.ending) {
            return Err(Failure::Ending);
        }
        if !head.close {
            self.stream = Some(stream);
        }
        Ok(Times {
            first_byte: first_byte.unwrap_or(whole),
            whole,
        })
    }

    /// Asks, waits for the first event of the streamed reply, and leaves the rest to come.
    pub(crate) async fn first_event(&mut self, ask: &Ask) -> Result<(), Failure> {
        let stream = self.stream.as_mut().ok_or(Failure::Closed)?;
        let mut events = Vec::new();
        let mut reader = Reader::<ReplyHead>::default();
        write(stream, &ask.request).await?;
        while !events.windows(2).any(|pair| pair == b"\n\n") {
            if reader.is_done() || read(stream, &mut self.buffer).await? == 0 {
                return Err(Failure::Closed);
            }
            reader.feed(&self.buffer, |piece| events.extend_from_slice(piece))?;
            match reader.message() {
                Some(head) if head.status != 200 => return Err(Failure::Status(head.status)),
                _ => {}
            }
        }
        self.buffer = BytesMut::new(); // a thousand of these wait
        Ok(())
    }
}

async fn connect(server: SocketAddr) -> Result<TcpStream, Failure> {
    let stream = TcpStream::connect(server)
        .await
        .map_err(socket("connecting"))?;
    stream.set_nodelay(true).map_err(socket("connecting"))?;
    Ok(stream)
}

async fn write(stream: &mut TcpStream, request: &[u8]) -> Result<(), Failure> {
    stream.write_all(request).await.map_err(socket("writing"))
}

/// Fills `buffer` with what comes next; zero at the end.
async fn read(stream: &mut TcpStream, buffer: &mut BytesMut) -> Result<usize, Failure> {
    buffer.clear();
    buffer.reserve(PIECE);
    tokio::time::timeout(SILENCE, stream.read_buf(buffer))
        .await
        .map_err(|_| Failure::Silent)?
        .map_err(socket("reading"))
}

/// The last bytes of a body.
#[derive(Debug, Default)]
struct Ending {
    kept: [u8; Self::KEPT],
    length: usize,
}

impl Ending {
    const KEPT: usize = protocol::sse::DONE.len();

    fn push(&mut self, piece: &[u8]) {
        let piece = &piece[piece.len().saturating_sub(Self::KEPT)..];
        let stays = self.length.min(Self::KEPT - piece.len());
        self.kept.copy_within(self.length - stays..self.length, 0);
        self.kept[stays..stays + piece.len()].copy_from_slice(piece);
        self.length = stays + piece.len();
    }

    fn is(&self, ending: &[u8]) -> bool {
        self.kept[..self.length].ends_with(ending)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_end_of_a_body_is_known_at_every_split() {
        let body = b"data: {}\n\ndata: [DONE]\n\n";
        for first in 0..=body.len() {
            for second in first..=body.len() {
                let mut ending = Ending::default();
                for piece in [&body[..first], &body[first..second], &body[second..]] {
                    ending.push(piece);
                }
                assert!(
                    ending.is(protocol::sse::DONE),
                    "cut at {first} and {second}"
                );
                assert!(!ending.is(b"}"));
            }
        }
    }

    #[test]
    fn an_empty_body_has_only_the_empty_ending() {
        assert!(Ending::default().is(b"") && !Ending::default().is(b"}"));
    }
}
