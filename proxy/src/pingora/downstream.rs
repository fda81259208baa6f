//! Where clients' requests enter the stack and answers leave it.

use crate::stack::Stack;
use arc_swap::ArcSwap;
use async_trait::async_trait;
use bytes::{Bytes, BytesMut};
use filters::{Body, Request, Response};
use futures::StreamExt;
use http::{HeaderValue, Method, StatusCode, Version, header};
use pingora_core::apps::{
    HttpPersistentSettings, HttpServerApp, HttpServerOptions, ReusedHttpStream,
};
use pingora_core::protocols::http::ServerSession;
use pingora_core::server::ShutdownWatch;
use pingora_core::{Error, ErrorType};
use pingora_http::ResponseHeader;
use protocol::{ApiError, ErrorKind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;
use tokio::time::timeout;
use tower::Service;

/// How long a refused body is read on, so that the client sees the refusal and not a reset connection.
const DRAIN: Duration = Duration::from_secs(2);
/// Room behind a body of several pieces, so that it can be rewritten in place with a little more in it.
const SLACK: usize = 16 << 10;
/// How long a client may take to accept what we write.
const WRITE: Duration = Duration::from_secs(60);

/// What the gateway takes from a client before the stack sees anything.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Intake {
    /// Longest body in bytes.
    pub(crate) max_body: usize,
    /// Longest time for a body to arrive.
    pub(crate) body_deadline: Duration,
}

/// What serves requests now; replaced whole on reload. A request keeps the one it began with.
pub(crate) struct Serving {
    pub(crate) stack: Stack,
    pub(crate) intake: Intake,
}

/// Hosts the stack as an application of Pingora's server. It is not one of Pingora's proxy, which picks the upstream
/// before the body may be read: a gateway that routes on the body answers every request itself.
pub(crate) struct Gateway {
    serving: Arc<ArcSwap<Serving>>,
    draining: Arc<AtomicBool>,
    open: Open,
    options: HttpServerOptions,
}

/// Requests from the end of their head to the end of their answer. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub(crate) struct Open(Arc<AtomicUsize>);

impl Open {
    pub(crate) fn count(&self) -> usize {
        self.0.load(Ordering::Relaxed)
    }

    fn enter(&self) -> Entered<'_> {
        self.0.fetch_add(1, Ordering::Relaxed);
        Entered(&self.0)
    }
}

struct Entered<'a>(&'a AtomicUsize);

impl Drop for Entered<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Gateway {
    pub(crate) fn new(
        serving: Arc<ArcSwap<Serving>>,
        draining: Arc<AtomicBool>,
        open: Open,
    ) -> Self {
        let mut options = HttpServerOptions::default();
        options.h2c = true; // clients that know it begin with HTTP/2's preface, others are spoken to as ever
        Self {
            serving,
            draining,
            open,
            options,
        }
    }

    /// Waits for a request's head. `None` where none comes: the connection is done with.
    async fn next_request(&self, session: &mut ServerSession) -> Option<()> {
        let refusal = match session.read_request().await {
            Ok(true) if session.req_header().method == Method::CONNECT => {
                StatusCode::METHOD_NOT_ALLOWED
            }
            Ok(true) => return Some(()),
            Ok(false) => return None,
            Err(error) if *error.etype() == ErrorType::InvalidHTTPHeader => {
                tracing::debug!(%error, "not a request");
                StatusCode::BAD_REQUEST
            }
            Err(error) => {
                tracing::debug!(%error, "client left");
                return None;
            }
        };
        if let Err(error) = session.respond_error(refusal.as_u16()).await {
            tracing::debug!(%error, "client left");
        }
        session.shutdown().await;
        None
    }

    async fn answer(&self, session: &mut ServerSession) -> pingora_core::Result<()> {
        let serving = self.serving.load_full();
        let read = self.intake(session, &serving.intake).await;
        let refused = read.is_err();
        let head = session.req_header().as_owned_parts();
        let request = match read {
            Ok(body) => Request::new(head, body),
            Err(error) => Request::refused(head, error),
        };
        let mut stack = serving.stack.clone();
        drop(serving);
        if refused {
            session.set_keepalive(None); // the rest of the request is in the way of the next
            let Ok(refusal) = stack.call(request).await;
            write(session, refusal).await?;
            let _ = timeout(DRAIN, session.drain_request_body()).await;
            return Ok(());
        }
        let response = tokio::select! {
            biased;
            response = stack.call(request) => response,
            gone = client_gone(session) => return Err(gone),
        };
        let Ok(response) = response;
        write(session, response).await
    }

    /// The whole body, within its limits.
    async fn intake(
        &self,
        session: &mut ServerSession,
        limits: &Intake,
    ) -> Result<Bytes, ApiError> {
        if self.draining.load(Ordering::Relaxed) {
            let error = ApiError::new(ErrorKind::Unavailable, "this gateway is shutting down");
            return Err(error.retry_after(Duration::from_secs(1)));
        }
        let headers = &session.req_header().headers;
        let announced = headers
            .get(header::CONTENT_LENGTH)
            .and_then(|length| length.to_str().ok()?.parse::<usize>().ok());
        if announced.is_some_and(|length| length > limits.max_body) {
            return Err(too_large(limits.max_body));
        }
        // HTTP/2 has no need of it, and Pingora would take it for the answer
        let http_1_1 = session.req_header().version == Version::HTTP_11;
        if http_1_1
            && headers
                .get(header::EXPECT)
                .is_some_and(|what| what.as_bytes().eq_ignore_ascii_case(b"100-continue"))
        {
            session
                .write_continue_response()
                .await
                .map_err(unreadable)?;
        }
        let reading = read_body(session, announced.unwrap_or(0), limits.max_body);
        timeout(limits.body_deadline, reading)
            .await
            .unwrap_or_else(|_| {
                let seconds = limits.body_deadline.as_secs();
                let message = format!("the request's body did not arrive within {seconds} s");
                Err(ApiError::new(ErrorKind::RequestTimeout, message))
            })
    }
}

/// Reads a body that was announced to be so long, or not at all; it may not be longer than `limit`.
async fn read_body(
    session: &mut ServerSession,
    announced: usize,
    limit: usize,
) -> Result<Bytes, ApiError> {
    let Some(first) = session.read_request_body().await.map_err(unreadable)? else {
        return Ok(Bytes::new());
    };
    if first.len() > limit {
        return Err(too_large(limit));
    }
    let Some(second) = session.read_request_body().await.map_err(unreadable)? else {
        return Ok(first); // most requests come in one piece, which is not copied
    };
    let mut all = BytesMut::with_capacity(announced.max(first.len() + second.len()) + SLACK);
    all.extend_from_slice(&first);
    drop(first);
    let mut next = Some(second);
    while let Some(piece) = next {
        if all.len() + piece.len() > limit {
            return Err(too_large(limit));
        }
        all.extend_from_slice(&piece);
        next = session.read_request_body().await.map_err(unreadable)?;
    }
    Ok(all.freeze())
}

fn too_large(limit: usize) -> ApiError {
    ApiError::new(
        ErrorKind::PayloadTooLarge,
        format!("the body is longer than {limit} bytes"),
    )
}

fn unreadable(error: Box<Error>) -> ApiError {
    ApiError::new(
        ErrorKind::InvalidRequest,
        "the request's body could not be read",
    )
    .caused_by(error)
}

/// Ends when the client has closed its connection. A further request that comes early is kept for later.
async fn client_gone(session: &mut ServerSession) -> Box<Error> {
    loop {
        match session.read_body_or_idle(true).await {
            Ok(_) => {}
            Err(gone) => return gone,
        }
    }
}

async fn write(session: &mut ServerSession, response: Response) -> pingora_core::Result<()> {
    session.set_write_timeout(Some(WRITE));
    let (head, mut body) = response.into_parts();
    let status = head.status;
    let mut header = ResponseHeader::from(head); // the map moves; names are written as the field writes them
    let bodyless = session.req_header().method == Method::HEAD;
    if let Some(whole) = body.as_whole().cloned() {
        if status != StatusCode::NO_CONTENT {
            header.insert_header(header::CONTENT_LENGTH, whole.len())?;
        }
        session.write_response_header(Box::new(header)).await?;
        let rest = if bodyless { Bytes::new() } else { whole };
        return session.write_response_body(rest, true).await;
    }
    header.insert_header(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"))?;
    header.insert_header("x-accel-buffering", HeaderValue::from_static("no"))?;
    match session.req_header().version {
        Version::HTTP_11 => {
            header.insert_header(
                header::TRANSFER_ENCODING,
                HeaderValue::from_static("chunked"),
            )?;
        }
        Version::HTTP_10 => session.set_keepalive(None),
        _ => {}
    }
    session.write_response_header(Box::new(header)).await?;
    pass(session, &mut body).await
}

/// Writes the pieces of a stream as they come. Returning drops the body, which cancels whatever makes it.
async fn pass(session: &mut ServerSession, body: &mut Body) -> pingora_core::Result<()> {
    loop {
        let piece = tokio::select! {
            biased;
            piece = body.next() => piece,
            gone = client_gone(session) => return Err(gone),
        };
        match piece {
            Some(Ok(bytes)) => session.write_response_body(bytes, false).await?,
            None => return session.write_response_body(Bytes::new(), true).await,
            // `rescue` tells the client of every failure, so this would be a fault of ours: cut, do not end well
            Some(Err(error)) => {
                return Error::e_because(ErrorType::InternalError, "unrescued body", error);
            }
        }
    }
}

#[async_trait]
impl HttpServerApp for Gateway {
    async fn process_new_http(
        self: &Arc<Self>,
        mut session: ServerSession,
        shutdown: &ShutdownWatch,
    ) -> Option<ReusedHttpStream> {
        self.next_request(&mut session).await?;
        let _entered = self.open.enter();
        if *shutdown.borrow() {
            session.set_keepalive(None);
        }
        session.set_pipelining_enabled(true);
        if let Err(error) = self.answer(&mut session).await {
            tracing::debug!(%error, "client left");
            session.shutdown().await;
            return None;
        }
        let settings = HttpPersistentSettings::for_session(&session);
        let reusable = session.finish().await.ok()??;
        Some(ReusedHttpStream::from_reusable_stream(reusable, settings))
    }

    fn server_options(&self) -> Option<&HttpServerOptions> {
        Some(&self.options)
    }
}
