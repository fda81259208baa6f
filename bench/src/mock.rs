//! A mock neuron: the answers of a real one at next to no cost.

mod replies;

use crate::http1::{Reader, RequestHead};
use anyhow::Context as _;
use bytes::{Buf as _, BytesMut};
use clap::Args;
use replies::{Api, Replies};
pub(crate) use replies::{EVENTS, MODEL, WHOLE};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};

/// What the mock prints before its address when it is ready.
pub(crate) const LISTENING: &str = "listening on ";

/// How the mock behaves.
#[derive(Debug, Clone, Args)]
pub(crate) struct MockArgs {
    /// Where to listen; port 0 takes a free one. The address is printed once it is open.
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:13131")]
    pub(crate) listen: SocketAddr,
    /// Milliseconds between two events of a stream; 0 writes them as fast as the socket takes them.
    #[arg(long, value_name = "MS", default_value_t = 0)]
    pub(crate) pace_ms: u64,
    /// Streams send one event and then nothing until the client goes.
    #[arg(long)]
    pub(crate) idle: bool,
}

/// Listens and answers until the process ends.
///
/// # Errors
/// When the address cannot be listened on.
pub(crate) async fn serve(args: MockArgs) -> anyhow::Result<()> {
    let listener = TcpListener::bind(args.listen)
        .await
        .with_context(|| format!("cannot listen on {}", args.listen))?;
    println!("{LISTENING}{}", listener.local_addr()?);
    let mock = Arc::new(Mock {
        replies: Replies::new(),
        streams: match (args.idle, args.pace_ms) {
            (true, _) => Streams::Idle,
            (false, 0) => Streams::Unpaced,
            (false, millis) => Streams::Paced(Duration::from_millis(millis)),
        },
    });
    loop {
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                // Out of descriptors or a client that left in the backlog: the others are to be served still.
                eprintln!("accept failed: {error}");
                tokio::time::sleep(Duration::from_millis(10)).await;
                continue;
            }
        };
        let mock = Arc::clone(&mock);
        tokio::spawn(async move {
            // A client that leaves is no news: the load generator counts what it missed.
            let _ = mock.connection(stream).await;
        });
    }
}

struct Mock {
    replies: Replies,
    streams: Streams,
}

#[derive(Clone, Copy)]
enum Streams {
    Unpaced,
    Paced(Duration),
    Idle,
}

/// A request as it was read.
struct Request {
    head: RequestHead,
    body: Vec<u8>,
}

impl Mock {
    async fn connection(&self, mut stream: TcpStream) -> anyhow::Result<()> {
        stream.set_nodelay(true)?;
        let mut unread = BytesMut::with_capacity(4096);
        while let Some(request) = read(&mut stream, &mut unread).await? {
            self.answer(&request, &mut stream).await?;
            if request.head.close {
                break;
            }
        }
        Ok(())
    }

    async fn answer(&self, request: &Request, stream: &mut TcpStream) -> anyhow::Result<()> {
        let api = match (request.head.method.as_str(), request.head.path.as_str()) {
            ("POST", "/v1/chat/completions") => Api::Chat,
            ("POST", "/v1/completions") => Api::Completions,
            ("GET", path) => return Ok(stream.write_all(self.replies.get(path)).await?),
            _ => return Ok(stream.write_all(self.replies.not_found()).await?),
        };
        match serde_json::from_slice::<protocol::chat::RequestHead<'_>>(&request.body) {
            Err(_) => stream.write_all(self.replies.malformed()).await?,
            Ok(body) if body.stream == Some(true) => {
                self.stream(api, stream).await?;
            }
            Ok(_) => stream.write_all(self.replies.whole(api)).await?,
        }
        Ok(())
    }

    async fn stream(&self, api: Api, stream: &mut TcpStream) -> anyhow::Result<()> {
        stream.write_all(self.replies.stream_head()).await?;
        let mut pace = match self.streams {
            Streams::Paced(pace) => Some(tokio::time::interval(pace)),
            Streams::Unpaced | Streams::Idle => None,
        };
        for event in self.replies.events(api) {
            if let Some(pace) = &mut pace {
                pace.tick().await;
            }
            stream.write_all(event).await?;
            if matches!(self.streams, Streams::Idle) {
                stream.read_u8().await?; // ends when the client goes
                anyhow::bail!("the client sent a request before its reply ended");
            }
        }
        Ok(stream.write_all(self.replies.stream_end()).await?)
    }
}

/// The next request, or none when the client closed between two.
async fn read(stream: &mut TcpStream, unread: &mut BytesMut) -> anyhow::Result<Option<Request>> {
    let mut reader = Reader::<RequestHead>::default();
    let mut body = Vec::new();
    loop {
        let taken = reader.feed(unread, |piece| body.extend_from_slice(piece))?;
        unread.advance(taken);
        if reader.is_done() {
            let head = reader.message().expect("a request that ended has a head");
            return Ok(Some(Request {
                head: head.clone(),
                body,
            }));
        }
        unread.reserve(4096);
        if stream.read_buf(unread).await? == 0 {
            return Ok(None);
        }
    }
}
