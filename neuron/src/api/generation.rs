//! From a checked request to its answer, whole or as a stream: the one way for every endpoint.

use super::failure::{Failure, broken, rejected};
use super::{ApiState, RequestId, sse};
use crate::engine::request::{EngineError, Event, Events, Finish, Request};
use crate::residency::ServedModel;
use crate::text::output::Delta;
use axum::body::Body;
use axum::http::{HeaderMap, HeaderName, HeaderValue, header};
use axum::response::{IntoResponse, Response};
use protocol::chat::{FunctionCall, StreamOptions, ToolCall};
use protocol::ext::{UNKNOWN_FIELDS_HEADER, USAGE_COMMENT_HEADER};
use protocol::{ApiError, ErrorKind};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How long the head of a stream waits for its first event: a request that fails at once gets a proper status, and
/// a client behind a long prefill still sees the stream open.
const HEAD_PATIENCE: Duration = Duration::from_secs(2);

/// How an endpoint spells an answer.
pub(super) trait Answer: Send + 'static {
    /// Appends the events that open a stream.
    fn open(&mut self, out: &mut Vec<u8>);
    /// Appends the events of one delta.
    fn delta(&mut self, delta: Delta, out: &mut Vec<u8>);
    /// Appends the last event of the answer, and its usage in one more if `usage`.
    fn close(&mut self, finish: &Finish, usage: bool, out: &mut Vec<u8>);
    /// The answer in one piece.
    fn whole(self, whole: Whole) -> Response;
}

/// Where a request comes from, and until when it may take.
pub(super) struct Origin {
    pub(super) id: String,
    pub(super) arrived: Instant,
    pub(super) deadline: Instant,
}

/// How the answer is to be given.
#[derive(Debug, Clone, Copy)]
pub(super) struct Delivery {
    stream: bool,
    pub(super) usage_chunk: bool,
    pub(super) usage_comment: bool,
    unknown_fields: u64,
}

impl Delivery {
    /// As the request and its headers ask for.
    ///
    /// # Errors
    /// 400 when stream options are given without a stream.
    pub(super) fn new(
        stream: Option<bool>,
        options: Option<StreamOptions>,
        headers: &HeaderMap,
        unknown_fields: u64,
    ) -> Result<Self, ApiError> {
        let stream = stream.unwrap_or(false);
        if options.is_some() && !stream {
            let message = "`stream_options` is only for `stream: true`";
            return Err(ApiError::invalid("stream_options", message));
        }
        Ok(Self {
            stream,
            usage_chunk: options.unwrap_or_default().include_usage,
            usage_comment: headers.contains_key(USAGE_COMMENT_HEADER),
            unknown_fields,
        })
    }
}

/// An answer in one piece.
#[derive(Debug)]
pub(super) struct Whole {
    pub(super) content: String,
    pub(super) reasoning: String,
    pub(super) calls: Vec<ToolCall>,
    pub(super) finish: Finish,
}

/// The model a request asks for, if it can serve now and has room for one more.
///
/// # Errors
/// 404, 503 or 429.
pub(super) fn find_model(state: &ApiState, id: &str) -> Result<Arc<ServedModel>, ApiError> {
    let model = state
        .residency
        .get(id)
        .map_err(|error| super::failure::unavailable(id, error))?;
    // Before the prompt is made: a full queue should cost nothing.
    model.engine.check().map_err(rejected)?;
    Ok(model)
}

/// Runs work that takes a processor for a while away from the tasks that serve connections.
///
/// # Errors
/// What the work returns; 500 when it panicked.
pub(super) async fn in_background<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, ApiError> + Send + 'static,
) -> Result<T, ApiError> {
    tokio::task::spawn_blocking(work)
        .await
        .unwrap_or_else(|error| {
            Err(ApiError::new(ErrorKind::Internal, "the prompt could not be made").caused_by(error))
        })
}

/// Hands `request` to the engine and answers with what comes back.
///
/// # Errors
/// As long as nothing has been sent; later ones are events of the stream.
pub(super) async fn answer(
    model: &ServedModel,
    request: Request,
    answer: impl Answer,
    delivery: Delivery,
    request_id: &RequestId,
) -> Result<Response, Failure> {
    let mut events = model.engine.submit(request).map_err(rejected)?;
    let mut response = if delivery.stream {
        let first = tokio::time::timeout(HEAD_PATIENCE, events.next()).await;
        let first = match first.ok().flatten() {
            Some(Event::End(Err(error))) => return Err(broken(error).into()),
            first => first,
        };
        let body = sse::stream(answer, events, first, delivery, request_id.0.clone());
        let headers = [
            (header::CONTENT_TYPE, "text/event-stream; charset=utf-8"),
            (header::CACHE_CONTROL, "no-cache"),
        ];
        (headers, Body::from_stream(body)).into_response()
    } else {
        answer.whole(collect(events).await.map_err(broken)?)
    };
    if delivery.unknown_fields > 0 {
        response.headers_mut().insert(
            HeaderName::from_static(UNKNOWN_FIELDS_HEADER),
            HeaderValue::from(delivery.unknown_fields),
        );
    }
    Ok(response)
}

async fn collect(mut events: Events) -> Result<Whole, EngineError> {
    let (mut content, mut reasoning, mut calls) = (String::new(), String::new(), Vec::new());
    while let Some(event) = events.next().await {
        match event {
            Event::Delta(Delta::Content(text)) => content.push_str(&text),
            Event::Delta(Delta::Reasoning(text)) => reasoning.push_str(&text),
            Event::Delta(Delta::ToolCall {
                name, arguments, ..
            }) => calls.push(ToolCall {
                id: new_id("call_"),
                kind: "function".into(),
                function: FunctionCall { name, arguments },
            }),
            Event::End(end) => {
                return end.map(|finish| Whole {
                    content,
                    reasoning,
                    calls,
                    finish,
                });
            }
        }
    }
    Err(EngineError::Gone)
}

/// A random id with a prefix that says what it names.
pub(super) fn new_id(prefix: &str) -> String {
    format!("{prefix}{:016x}", rand::random::<u64>())
}
