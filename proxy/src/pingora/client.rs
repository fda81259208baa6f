//! An HTTP/1.1 client over Pingora's connections: requests leave whole, answers come whole or as a stream.
//!
//! It writes the request's head itself, in one piece with the body, and keeps its peers: both showed in the
//! CPU time of a small exchange.

use super::pool::Pool;
use bytes::{Bytes, BytesMut};
use filters::Body;
use filters::route::Endpoint;
use futures::{FutureExt, Stream};
use http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, header};
use pingora_core::connectors::TransportConnector;
use pingora_core::protocols::Stream as Connection;
use pingora_core::protocols::http::v1::client::HttpSession;
use pingora_core::upstreams::peer::{HttpPeer, Peer};
use protocol::{ApiError, ErrorKind};
use std::collections::HashMap;
use std::net::SocketAddr;
use std::pin::{Pin, pin};
use std::sync::{Arc, PoisonError, RwLock};
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::io::AsyncWriteExt;

/// What is already buffered is taken along, up to this many bytes: one write per wake-up, not one per event.
const COALESCE: usize = 32 << 10;
/// A whole reply longer than this is refused.
const WHOLE_LIMIT: usize = 64 << 20;
/// Headers of an answer that somebody here reads or a client is told; all others stop here.
const KEPT: [HeaderName; 4] = [
    header::CONTENT_TYPE,
    header::RETRY_AFTER,
    HeaderName::from_static(protocol::ext::PROMPT_TOKENS_HEADER),
    HeaderName::from_static(protocol::ext::UNKNOWN_FIELDS_HEADER),
];
/// An unused connection is closed after this long.
const IDLE: Duration = Duration::from_secs(60);

/// A request to an [`Endpoint`].
#[derive(Debug)]
pub(crate) struct Outgoing<'a> {
    pub(crate) method: Method,
    pub(crate) path: &'a str,
    /// Beside `host`, `content-length` and `content-type`, which the client writes itself.
    pub(crate) headers: &'a [(&'static str, &'a str)],
    /// JSON, or empty.
    pub(crate) body: Bytes,
}

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ClientError {
    #[error("cannot connect to {address}: {source}")]
    Connect {
        address: SocketAddr,
        source: Box<pingora_core::Error>,
    },
    #[error("the connection to {address} broke before the answer began: {source}")]
    Broken {
        address: SocketAddr,
        source: Box<pingora_core::Error>,
    },
    #[error("the answer of {address} broke off: {source}")]
    Torn {
        address: SocketAddr,
        source: Box<pingora_core::Error>,
    },
    #[error("the answer of {address} is longer than {WHOLE_LIMIT} bytes")]
    TooLong { address: SocketAddr },
}

/// Connections to nodes, kept for reuse. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Client {
    shared: Arc<Shared>,
}

struct Shared {
    connector: TransportConnector,
    pool: Pool,
    connect_timeout: Duration,
    /// Making a peer hashes and allocates, so there is one for each address ever seen.
    peers: RwLock<HashMap<PeerKey, Arc<HttpPeer>>>,
}

/// Address, whether TLS, and authority.
type PeerKey = (SocketAddr, bool, Arc<str>);

/// A connection on which a request has been sent and a head received.
struct Answering {
    /// In a box: it is a kilobyte that is handed on many times.
    session: Box<HttpSession>,
    peer: Arc<HttpPeer>,
    address: SocketAddr,
    shared: Arc<Shared>,
}

impl Client {
    /// A client that keeps up to `pool` idle connections.
    pub(crate) fn new(connect_timeout: Duration, pool: usize) -> Self {
        Self {
            shared: Arc::new(Shared {
                connector: TransportConnector::new(None),
                pool: Pool::new(pool, IDLE),
                connect_timeout,
                peers: RwLock::default(),
            }),
        }
    }

    /// Closes connections that have waited too long for a request. Never ends.
    pub(crate) async fn close_old(&self) {
        self.shared.pool.close_old().await;
    }

    /// Sends `request`. An event stream is returned as it comes, any other body when it is complete; of the headers
    /// only [`KEPT`] are.
    pub(crate) async fn send(
        &self,
        endpoint: &Endpoint,
        request: &Outgoing<'_>,
    ) -> Result<http::Response<Body>, ClientError> {
        let answering = self.exchange(endpoint, request).await?;
        let head = answering
            .session
            .resp_header()
            .expect("a head has been read");
        let status = head.status;
        let mut headers = HeaderMap::with_capacity(KEPT.len() + 2); // room for what layers above add
        for name in KEPT {
            if let Some(value) = head.headers.get(&name) {
                headers.insert(name, value.clone());
            }
        }
        let body = if is_event_stream(&headers) {
            Body::stream(Incoming {
                answering: Some(answering),
                failed: None,
            })
        } else {
            Body::whole(answering.collect().await?)
        };
        let mut response = http::Response::new(body);
        *response.status_mut() = status;
        *response.headers_mut() = headers;
        Ok(response)
    }

    /// A pooled connection may have been closed by the node a moment ago. That shows before any byte of an answer,
    /// and then a fresh connection is tried once.
    async fn exchange(
        &self,
        endpoint: &Endpoint,
        request: &Outgoing<'_>,
    ) -> Result<Answering, ClientError> {
        let peer = self.shared.peer(endpoint);
        let wire = to_wire(endpoint, request);
        let address = endpoint.address;
        if let Some(connection) = self.shared.pool.take(peer.reuse_hash())
            && let Ok(answering) = self.ask(connection, &peer, address, &wire).await
        {
            return Ok(answering);
        }
        // seldom needed and large: without a box every exchange would carry 40 KB of it from layer to layer
        let connection = Box::pin(self.shared.connector.new_stream(&*peer))
            .await
            .map_err(|source| ClientError::Connect { address, source })?;
        self.ask(connection, &peer, address, &wire).await
    }

    async fn ask(
        &self,
        mut connection: Connection,
        peer: &Arc<HttpPeer>,
        address: SocketAddr,
        wire: &[Bytes; 2],
    ) -> Result<Answering, ClientError> {
        let broken = |source| ClientError::Broken { address, source };
        let written = async {
            for piece in wire {
                connection.write_all(piece).await?;
            }
            connection.flush().await
        };
        written.await.map_err(|error: std::io::Error| {
            broken(pingora_core::Error::because(
                pingora_core::ErrorType::WriteError,
                "writing the request",
                error,
            ))
        })?;
        let mut session = Box::new(HttpSession::new_with_options(connection, &**peer));
        loop {
            session.read_response().await.map_err(broken)?;
            let status = session.get_status().unwrap_or(StatusCode::BAD_GATEWAY);
            if !status.is_informational() {
                break;
            }
        }
        Ok(Answering {
            session,
            peer: peer.clone(),
            address,
            shared: self.shared.clone(),
        })
    }
}

impl Shared {
    fn peer(&self, endpoint: &Endpoint) -> Arc<HttpPeer> {
        let key = (endpoint.address, endpoint.tls, endpoint.authority.clone());
        if let Some(peer) = self
            .peers
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .get(&key)
        {
            return peer.clone();
        }
        let host = endpoint
            .authority
            .rsplit_once(':')
            .map_or(&*endpoint.authority, |(host, _)| host);
        let mut peer = HttpPeer::new(endpoint.address, endpoint.tls, host.to_owned());
        peer.options.connection_timeout = Some(self.connect_timeout);
        peer.options.total_connection_timeout = Some(self.connect_timeout);
        let peer = Arc::new(peer);
        self.peers
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .insert(key, peer.clone());
        peer
    }
}

impl Answering {
    /// The rest of the body; the connection goes back to the pool.
    async fn collect(mut self) -> Result<Bytes, ClientError> {
        let head = self.session.resp_header();
        let expected = head
            .and_then(|head| head.headers.get(header::CONTENT_LENGTH))
            .and_then(|length| length.to_str().ok()?.parse::<usize>().ok())
            .unwrap_or(0);
        let mut all = BytesMut::with_capacity(expected.min(WHOLE_LIMIT));
        let address = self.address;
        while let Some(piece) = self
            .session
            .read_body_ref()
            .await
            .map_err(|source| ClientError::Torn { address, source })?
        {
            if all.len() + piece.len() > WHOLE_LIMIT {
                return Err(ClientError::TooLong { address });
            }
            all.extend_from_slice(piece);
        }
        self.release();
        Ok(all.freeze())
    }

    /// Gives the connection back, if both sides want to keep it.
    fn release(mut self) {
        self.session.respect_keepalive();
        // ready at once for a connection that is kept; closing one may wait, and is left to the drop
        if let Some(Some(connection)) = self.session.reuse().now_or_never() {
            self.shared.pool.give(self.peer.reuse_hash(), connection);
        }
    }
}

/// A streamed answer. Dropping it closes the connection, which is how a node learns that nobody listens.
struct Incoming {
    /// `None` once the stream has ended.
    answering: Option<Answering>,
    /// A failure that came right behind bytes that are still to be given out.
    failed: Option<ApiError>,
}

impl Stream for Incoming {
    type Item = Result<Bytes, ApiError>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        if let Some(error) = self.failed.take() {
            return Poll::Ready(Some(Err(error)));
        }
        let mut taken = BytesMut::new();
        while let Some(answering) = self.answering.as_mut() {
            // `read_body_ref` keeps its state in the session, so a future that is not ready can be dropped
            let polled = pin!(answering.session.read_body_ref())
                .poll(cx)
                .map(|read| {
                    read.map(|piece| piece.map(|piece| taken.extend_from_slice(piece)).is_some())
                });
            match polled {
                Poll::Ready(Ok(true)) if taken.len() < COALESCE => {}
                Poll::Ready(Ok(true)) => break,
                Poll::Ready(Ok(false)) => {
                    self.answering
                        .take()
                        .expect("it was there to be read")
                        .release();
                }
                Poll::Ready(Err(source)) => {
                    let address = answering.address;
                    self.answering = None;
                    let error = torn(ClientError::Torn { address, source });
                    if taken.is_empty() {
                        return Poll::Ready(Some(Err(error)));
                    }
                    self.failed = Some(error);
                }
                Poll::Pending if taken.is_empty() => return Poll::Pending,
                Poll::Pending => break,
            }
        }
        Poll::Ready((!taken.is_empty()).then(|| Ok(taken.freeze())))
    }
}

/// What a client is told when an answer breaks off: addresses stay in the log.
fn torn(error: ClientError) -> ApiError {
    ApiError::new(ErrorKind::BadGateway, "the node's answer broke off").caused_by(error)
}

fn is_event_stream(headers: &HeaderMap) -> bool {
    headers
        .get(header::CONTENT_TYPE)
        .is_some_and(|kind: &HeaderValue| kind.as_bytes().starts_with(b"text/event-stream"))
}

/// Head and body in one piece where the body is small; a large one is not copied to save a write.
fn to_wire(endpoint: &Endpoint, request: &Outgoing<'_>) -> [Bytes; 2] {
    let (joined, apart) = if request.body.len() > COALESCE {
        (Bytes::new(), request.body.clone())
    } else {
        (request.body.clone(), Bytes::new())
    };
    let mut wire = Vec::with_capacity(256 + joined.len());
    let mut put = |text: &str| wire.extend_from_slice(text.as_bytes());
    put(request.method.as_str());
    put(" ");
    put(&endpoint.access.prefix);
    put(request.path);
    put(" HTTP/1.1\r\nhost: ");
    put(&endpoint.authority);
    if let Some(credential) = &endpoint.access.authorization {
        put("\r\nauthorization: ");
        put(&credential.0);
    }
    for (name, value) in request.headers {
        put("\r\n");
        put(name);
        put(": ");
        put(value);
    }
    if request.method == Method::POST {
        put("\r\ncontent-type: application/json\r\ncontent-length: ");
        put(itoa::Buffer::new().format(request.body.len()));
    }
    put("\r\n\r\n");
    wire.extend_from_slice(&joined);
    [wire.into(), apart]
}
