//! From the caller's dialect to chat completions and back.
//!
//! A dialect is one [`Dialect`] and, for streams, one [`Translator`]; which path speaks which stands in [`of_route`].

use crate::resolve::Route;
use crate::{Exchange, Failure, Request, Response, ResponseFuture};
use bytes::{BufMut, Bytes};
use protocol::chat::{ChatChunk, ChatRequest};
use protocol::models::ModelCard;
use protocol::{ApiError, ErrorKind};
use serde::{Deserialize, Serialize};
use std::fmt::Debug;
use std::sync::Arc;
use std::task::{Context, Poll};
use tower::{Layer, Service};

pub mod chat;
pub mod fields;
pub mod messages;
pub mod openai;
pub mod responses;
mod stream;

pub use stream::Translated;

/// How one kind of client speaks.
pub trait Dialect: Debug + Send + Sync + 'static {
    /// The body of an error reply.
    fn error(&self, error: &ApiError, request_id: &str) -> Bytes;

    /// The event that tells a running stream's client of an error; the stream ends after it. Empty where
    /// [`Translator::fail`] has told of it.
    fn error_event(&self, error: &ApiError, request_id: &str) -> Bytes;

    /// Status of an error reply.
    fn status(&self, error: &ApiError) -> u16 {
        error.status()
    }

    /// A second header that carries the request id, if this dialect's clients look for one.
    fn request_id_header(&self) -> Option<&'static str> {
        None
    }

    /// The reply of `GET /v1/models`: `cards`, as far as `query` asks for them.
    ///
    /// # Errors
    /// 400 naming the parameter, where the query makes no sense.
    fn models(&self, cards: Vec<ModelCard>, query: &str) -> Result<Bytes, ApiError>;

    /// The reply of `GET /v1/models/{id}`.
    fn model(&self, card: &ModelCard) -> Bytes;

    /// How to translate; `None` where the dialect is the canonical one and bytes pass untouched.
    fn translation(&self) -> Option<&dyn Translation> {
        None
    }
}

/// How a dialect that is not the canonical one becomes it.
pub trait Translation: Send + Sync {
    /// Where on a node the translated request goes.
    fn upstream_path(&self) -> &'static str {
        "/v1/chat/completions"
    }

    /// The chat request that asks for the same, and how its answer will be said.
    ///
    /// # Errors
    /// 400 naming the field, where the meaning would be lost.
    fn request(
        &self,
        body: &[u8],
        exchange: &Arc<Exchange>,
    ) -> Result<(ChatRequest, Box<dyn Answer>), ApiError>;

    /// An error that a node found in the translated request, with its field named as the caller knows it.
    fn refusal(&self, error: ApiError) -> ApiError {
        error
    }
}

/// How the answer to one request is said: it comes either whole or as a stream.
pub trait Answer: Send {
    /// The reply that says what this whole chat reply says.
    ///
    /// # Errors
    /// 502 when the upstream's reply cannot be read.
    fn whole(self: Box<Self>, body: &Bytes) -> Result<Bytes, ApiError>;

    /// Translates a streamed answer.
    fn stream(self: Box<Self>) -> Box<dyn Translator>;
}

/// Translates one streamed answer, chunk by chunk. A state machine without I/O: any split of a stream gives the same events.
pub trait Translator: Send {
    /// Learns how many tokens the prompt has, where the node says so before the stream begins.
    fn prompt(&mut self, _tokens: u64) {}

    /// Appends the events that `chunk` calls for.
    fn chunk(&mut self, chunk: &ChatChunk, out: &mut Vec<u8>);

    /// Appends what the end of the stream calls for.
    fn finish(&mut self, out: &mut Vec<u8>);

    /// Appends what keeps a silent stream alive.
    fn keep_alive(&mut self, out: &mut Vec<u8>);

    /// Appends what a failure calls for before [`Dialect::error_event`] ends the stream.
    fn fail(&mut self, _: &ApiError, _: &mut Vec<u8>) {}
}

/// A wire type as the bytes of a body.
pub(crate) fn written(value: &impl Serialize) -> Bytes {
    serde_json::to_vec(value)
        .expect("wire types always serialise")
        .into()
}

/// A request as JSON. Where it is wrong is found by reading it again with an eye on the path.
///
/// # Errors
/// 400 that names the field at fault.
pub(crate) fn read<'a, T: Deserialize<'a>>(body: &'a [u8]) -> Result<T, ApiError> {
    serde_json::from_slice(body).map_err(|error| {
        let mut reader = serde_json::Deserializer::from_slice(body);
        let path = serde_path_to_error::deserialize::<_, T>(&mut reader)
            .err()
            .map(|error| error.path().to_string())
            .filter(|path| path != "." && !path.contains('?'));
        match path {
            Some(path) => {
                let message = format!("`{path}`: {error}");
                ApiError::invalid(path, message)
            }
            None => ApiError::new(
                ErrorKind::InvalidRequest,
                format!("the body is not what this path takes: {error}"),
            ),
        }
    })
}

/// What an upstream has answered.
fn upstream<'a, T: Deserialize<'a>>(body: &'a [u8]) -> Result<T, ApiError> {
    serde_json::from_slice(body).map_err(|error| {
        ApiError::new(
            ErrorKind::BadGateway,
            "the upstream's reply is not what was asked for",
        )
        .caused_by(error)
    })
}

/// The same in the memory of `old`, which is no longer needed: a large image is then held twice, not thrice.
fn rewritten(old: Bytes, value: &impl Serialize) -> Bytes {
    let mut room = old.try_into_mut().unwrap_or_default();
    room.clear();
    let mut writer = room.writer();
    serde_json::to_writer(&mut writer, value).expect("wire types always serialise");
    writer.into_inner().freeze()
}

fn prompt_tokens(headers: &http::HeaderMap) -> Option<u64> {
    let value = headers.get(protocol::ext::PROMPT_TOKENS_HEADER)?;
    value.to_str().ok()?.parse().ok()
}

/// The dialect spoken on a path.
#[must_use]
pub fn of_route(route: Route, head: &http::request::Parts) -> &'static dyn Dialect {
    match route {
        Route::Messages => &messages::Messages,
        Route::CountTokens => &messages::CountTokens,
        Route::Responses => &responses::Responses,
        // paths that several APIs have: Anthropic's clients always say which version they speak
        Route::Models | Route::Model | Route::Unknown
            if head.headers.contains_key("anthropic-version") =>
        {
            &messages::Messages
        }
        Route::Unknown if head.uri.path().starts_with("/v1/messages/") => &messages::Messages,
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
        let (chat, answer) = match translation.request(&request.body, &request.exchange) {
            Ok(asked) => asked,
            Err(error) => return Box::pin(std::future::ready(Err(error.into()))),
        };
        request.body = rewritten(std::mem::take(&mut request.body), &chat);
        drop(chat);
        request.head.uri = http::Uri::from_static(translation.upstream_path());
        let response = self.inner.call(request);
        Box::pin(async move {
            let response = response.await.map_err(|failure| Failure {
                error: translation.refusal(failure.error),
                ..failure
            })?;
            let (head, body) = response.into_parts();
            let body = if body.as_whole().is_some() {
                body.try_map_whole(|bytes| answer.whole(bytes))?
            } else {
                let mut translator = answer.stream();
                if let Some(tokens) = prompt_tokens(&head.headers) {
                    translator.prompt(tokens);
                }
                body.map_stream(|body| Translated::new(body, translator))
            };
            Ok(Response::from_parts(head, body))
        })
    }
}
