//! From the caller's dialect to chat completions and back.
//!
//! A dialect is one [`Dialect`] and, for streams, one [`Translator`]; which path speaks which stands in [`of_route`].

use crate::resolve::Route;
use crate::{Failure, Request, Response, ResponseFuture};
use bytes::Bytes;
use protocol::ApiError;
use protocol::chat::ChatChunk;
use std::fmt::Debug;
use std::task::{Context, Poll};
use tower::{Layer, Service};

pub mod chat;
pub mod messages;
mod stream;

pub use stream::Translated;

/// How one kind of client speaks.
pub trait Dialect: Debug + Send + Sync + 'static {
    /// The body of an error reply.
    fn error(&self, error: &ApiError, request_id: &str) -> Bytes;

    /// The event that tells a running stream's client of an error; the stream ends after it.
    fn error_event(&self, error: &ApiError, request_id: &str) -> Bytes;

    /// Status of an error reply.
    fn status(&self, error: &ApiError) -> u16 {
        error.status()
    }

    /// A second header that carries the request id, if this dialect's clients look for one.
    fn request_id_header(&self) -> Option<&'static str> {
        None
    }

    /// How to translate; `None` where the dialect is the canonical one and bytes pass untouched.
    fn translation(&self) -> Option<&dyn Translation> {
        None
    }
}

/// How a dialect that is not the canonical one becomes it.
pub trait Translation: Send + Sync {
    /// The chat request that asks for the same.
    ///
    /// # Errors
    /// 400 naming the field, where the meaning would be lost.
    fn request(&self, body: &Bytes) -> Result<Bytes, ApiError>;

    /// The reply that says what this whole chat reply says.
    ///
    /// # Errors
    /// 502 when the upstream's reply cannot be read.
    fn reply(&self, body: &Bytes) -> Result<Bytes, ApiError>;

    /// Translates one streamed answer.
    fn translator(&self) -> Box<dyn Translator>;
}

/// Translates one streamed answer, chunk by chunk. A state machine without I/O: any split of a stream gives the same events.
pub trait Translator: Send {
    /// Appends the events that `chunk` calls for.
    fn chunk(&mut self, chunk: &ChatChunk, out: &mut Vec<u8>);

    /// Appends what the end of the stream calls for.
    fn finish(&mut self, out: &mut Vec<u8>);

    /// Appends what keeps a silent stream alive.
    fn keep_alive(&mut self, out: &mut Vec<u8>);
}

/// The dialect spoken on a path.
#[must_use]
pub fn of_route(route: Route, headers: &http::HeaderMap) -> &'static dyn Dialect {
    match route {
        Route::Messages => &messages::Messages,
        // paths that several APIs have: Anthropic's clients always say which version they speak
        Route::Models | Route::Model | Route::Unknown
            if headers.contains_key("anthropic-version") =>
        {
            &messages::Messages
        }
        _ => &chat::Chat,
    }
}

/// Puts [`Translate`] around a stack.
#[derive(Debug, Clone, Copy, Default)]
pub struct TranslateLayer;

/// Below it there are only chat completions and text completions.
#[derive(Debug, Clone)]
pub struct Translate<S> {
    inner: S,
}

impl<S> Layer<S> for TranslateLayer {
    type Service = Translate<S>;

    fn layer(&self, inner: S) -> Translate<S> {
        Translate { inner }
    }
}

impl<S> Service<Request> for Translate<S>
where
    S: Service<Request, Response = Response, Error = Failure, Future = ResponseFuture>,
{
    type Response = Response;
    type Error = Failure;
    type Future = ResponseFuture;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Failure>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, mut request: Request) -> Self::Future {
        let Some(translation) = request.exchange.dialect.translation() else {
            return self.inner.call(request);
        };
        match translation.request(&request.body) {
            Ok(body) => request.body = body,
            Err(error) => return Box::pin(std::future::ready(Err(error.into()))),
        }
        request.head.uri = http::Uri::from_static("/v1/chat/completions");
        let response = self.inner.call(request);
        Box::pin(async move {
            let (head, body) = response.await?.into_parts();
            let body = body
                .try_map_whole(|bytes| translation.reply(bytes))?
                .map_stream(|body| Translated::new(body, translation.translator()));
            Ok(Response::from_parts(head, body))
        })
    }
}
