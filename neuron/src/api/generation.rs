//! From checked requests to their answers, whole or as a stream: the one way for every endpoint.

use super::failure::{Failure, broken, rejected};
use super::running::Entry;
use super::{ApiState, RequestId, sse};
use crate::engine::request::{EngineError, Event, Events, Finish, Request};
use crate::residency::ServedModel;
use crate::text::output::{Delta, Scored};
use axum::body::Body;
use axum::http::{HeaderName, HeaderValue, header};
use axum::response::{IntoResponse, Response};
use protocol::chat::{FunctionCall, StreamOptions, ToolCall};
use protocol::ext::{PROMPT_TOKENS_HEADER, UNKNOWN_FIELDS_HEADER};
use protocol::usage::{CompletionTokensDetails, PromptTokensDetails, Timings, Usage};
use protocol::{ApiError, ErrorKind};
use std::future::poll_fn;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

/// How long the head of a stream waits for its first event: a request that fails at once gets a proper status, and
/// a client behind a long prefill still sees the stream open.
const HEAD_PATIENCE: Duration = Duration::from_secs(2);

/// How an endpoint spells its answers. `index` is the place of an answer among the request's.
pub(super) trait Answer: Send + 'static {
    /// Appends the events that open a stream.
    fn open(&mut self, out: &mut Vec<u8>);
    /// Appends the events of one delta.
    fn delta(&mut self, index: usize, delta: Delta, out: &mut Vec<u8>);
    /// Appends the last event of one answer.
    fn close(&mut self, index: usize, finish: &Finish, out: &mut Vec<u8>);
    /// Appends the event that has only usage.
    fn usage(&mut self, total: &Total, out: &mut Vec<u8>);
    /// All answers in one piece.
    fn whole(self, answers: Vec<(Whole, Finish)>, total: &Total) -> Response;
}

/// Where a request comes from, and until when it may take.
#[derive(Debug, Clone)]
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
    unknown_fields: u64,
}

impl Delivery {
    /// As the request asks for.
    ///
    /// # Errors
    /// 400 when stream options are given without a stream.
    pub(super) fn new(
        stream: Option<bool>,
        options: Option<StreamOptions>,
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
            unknown_fields,
        })
    }
}

/// What all answers of a request took together.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Total {
    /// Each prompt counts once, however many answers it has.
    pub(super) usage: Usage,
    /// Of each the longest.
    pub(super) timings: Timings,
}

impl Total {
    fn add(&mut self, finish: &Finish, first_of_its_prompt: bool) {
        let (one, all) = (&finish.usage, &mut self.usage);
        if first_of_its_prompt {
            all.prompt_tokens += one.prompt_tokens;
            all.prompt_tokens_details = Some(PromptTokensDetails {
                cached_tokens: all.cached_tokens() + one.cached_tokens(),
            });
        }
        all.completion_tokens += one.completion_tokens;
        all.total_tokens = all.prompt_tokens + all.completion_tokens;
        let before = all.completion_tokens_details.unwrap_or_default();
        let more = one.completion_tokens_details.unwrap_or_default();
        all.completion_tokens_details = Some(CompletionTokensDetails {
            reasoning_tokens: before.reasoning_tokens + more.reasoning_tokens,
            accepted_prediction_tokens: before.accepted_prediction_tokens
                + more.accepted_prediction_tokens,
            rejected_prediction_tokens: before.rejected_prediction_tokens
                + more.rejected_prediction_tokens,
        });
        let (one, all) = (&finish.timings, &mut self.timings);
        all.queue_ms = all.queue_ms.max(one.queue_ms);
        all.prefill_ms = all.prefill_ms.max(one.prefill_ms);
        all.decode_ms = all.decode_ms.max(one.decode_ms);
    }
}

/// One answer in one piece.
#[derive(Debug, Default)]
pub(super) struct Whole {
    pub(super) content: String,
    pub(super) reasoning: String,
    pub(super) calls: Vec<ToolCall>,
    /// Scores of the prompt's tokens, if wanted.
    pub(super) prompt: Vec<Option<Scored>>,
    /// Scores of the answer's tokens, if wanted.
    pub(super) scored: Vec<Scored>,
}

impl Whole {
    fn take(&mut self, delta: Delta) {
        match delta {
            Delta::Prompt(scores) => self.prompt = scores,
            Delta::Scored(scored) => self.scored.push(scored),
            Delta::Content(text) => self.content.push_str(&text),
            Delta::Reasoning(text) => self.reasoning.push_str(&text),
            Delta::ToolCall {
                name, arguments, ..
            } => self.calls.push(ToolCall {
                id: new_id("call_"),
                kind: "function".into(),
                function: FunctionCall { name, arguments },
            }),
        }
    }
}

/// The answers of one request as they come. Dropping it cancels them.
pub(super) struct Answers {
    events: Vec<Events>,
    per_prompt: usize,
    open: usize,
    /// Whose turn it is: none may starve the others.
    turn: usize,
    pub(super) total: Total,
    _entry: Entry,
}

impl Answers {
    /// The next event and whose it is; none after the last end.
    pub(super) async fn next(&mut self) -> Option<(usize, Event)> {
        poll_fn(|context| self.poll_next(context)).await
    }

    fn poll_next(&mut self, context: &mut Context<'_>) -> Poll<Option<(usize, Event)>> {
        if self.open == 0 {
            return Poll::Ready(None);
        }
        let count = self.events.len();
        for step in 0..count {
            let index = (self.turn + step) % count;
            if let Poll::Ready(Some(event)) = self.events[index].poll_next(context) {
                self.turn = (index + 1) % count;
                if let Event::End(end) = &event {
                    self.open -= 1;
                    if let Ok(finish) = end {
                        self.total
                            .add(finish, index.is_multiple_of(self.per_prompt));
                    }
                }
                return Poll::Ready(Some((index, event)));
            }
        }
        Poll::Pending
    }

    /// True once every answer has ended.
    pub(super) fn is_over(&self) -> bool {
        self.open == 0
    }

    /// Deltas of answer `index` that are there already.
    pub(super) fn ready(&mut self, index: usize) -> impl Iterator<Item = Delta> {
        std::iter::from_fn(move || self.events[index].try_next())
    }
}

/// The model a request asks for, if it can serve now and has room for one more.
///
/// # Errors
/// 404, 503 or 429.
pub(super) fn find_model(state: &ApiState, id: &str) -> Result<Arc<ServedModel>, ApiError> {
    let model = loaded_model(state, id)?;
    // Before the prompt is made: a full queue should cost nothing.
    model.engine.check().map_err(rejected)?;
    Ok(model)
}

/// The model `id`, if it is loaded.
///
/// # Errors
/// 404 or 503.
pub(super) fn loaded_model(state: &ApiState, id: &str) -> Result<Arc<ServedModel>, ApiError> {
    state
        .residency
        .get(id)
        .map_err(|error| super::failure::unavailable(id, error))
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

/// Hands `requests` to the engine and answers with what comes back. They are `per_prompt` answers to one prompt after
/// another.
///
/// # Errors
/// As long as nothing has been sent; later ones are events of the stream.
pub(super) async fn answer(
    state: &ApiState,
    model: &ServedModel,
    (requests, per_prompt): (Vec<Request>, usize),
    answer: impl Answer,
    delivery: Delivery,
    request_id: &RequestId,
) -> Result<Response, Failure> {
    let prompts = requests.iter().step_by(per_prompt);
    let prompt_tokens: usize = prompts.map(|request| request.prompt.len()).sum();
    let events: Vec<Events> = requests
        .into_iter()
        .map(|request| model.engine.submit(request))
        .collect::<Result<_, _>>()
        .map_err(rejected)?;
    let cancellers = events.iter().map(Events::canceller).collect();
    let mut answers = Answers {
        open: events.len(),
        events,
        per_prompt,
        turn: 0,
        total: Total::default(),
        _entry: state.running.enter(&request_id.0, cancellers),
    };
    let mut response = if delivery.stream {
        let first = tokio::time::timeout(HEAD_PATIENCE, answers.next()).await;
        let first = match first.ok().flatten() {
            Some((_, Event::End(Err(error)))) => return Err(broken(error).into()),
            first => first,
        };
        let body = sse::stream(answer, answers, first, delivery, request_id.0.clone());
        let headers = [
            (
                header::CONTENT_TYPE,
                HeaderValue::from_static("text/event-stream; charset=utf-8"),
            ),
            (header::CACHE_CONTROL, HeaderValue::from_static("no-cache")),
            (
                HeaderName::from_static(PROMPT_TOKENS_HEADER),
                prompt_tokens.into(),
            ),
        ];
        (headers, Body::from_stream(body)).into_response()
    } else {
        let ends = collect(&mut answers).await.map_err(broken)?;
        answer.whole(ends, &answers.total)
    };
    if delivery.unknown_fields > 0 {
        response.headers_mut().insert(
            HeaderName::from_static(UNKNOWN_FIELDS_HEADER),
            HeaderValue::from(delivery.unknown_fields),
        );
    }
    Ok(response)
}

async fn collect(answers: &mut Answers) -> Result<Vec<(Whole, Finish)>, EngineError> {
    let mut all: Vec<(Whole, Option<Finish>)> = Vec::new();
    all.resize_with(answers.events.len(), Default::default);
    while let Some((index, event)) = answers.next().await {
        match event {
            Event::Delta(delta) => all[index].0.take(delta),
            Event::End(end) => all[index].1 = Some(end?),
        }
    }
    all.into_iter()
        .map(|(whole, finish)| Ok((whole, finish.ok_or(EngineError::Gone)?)))
        .collect()
}

/// A random id with a prefix that says what it names.
pub(super) fn new_id(prefix: &str) -> String {
    format!("{prefix}{:016x}", rand::random::<u64>())
}
