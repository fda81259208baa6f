//! What the mock says, written out once as bytes for the socket.

use bytes::Bytes;
use protocol::chat::{
    AssistantMessage, ChatChunk, ChatReply, Choice, ChunkChoice, Delta, FinishReason,
};
use protocol::completions::{CompletionChoice, CompletionReply};
use protocol::models::{ModelCard, ModelList};
use protocol::node::{DeviceInfo, ModelState, ModelStatus, NodeInfo, NodeModels};
use protocol::sse;
use protocol::usage::Usage;
use protocol::{ApiError, ErrorKind};
use serde::Serialize;
use std::collections::HashMap;

/// The one model the mock has.
pub(crate) const MODEL: &str = "mock";
/// Content events of a stream; the event with the finish reason follows them.
pub(crate) const EVENTS: usize = 100;
/// Length of a whole reply's body in bytes.
pub(crate) const WHOLE: usize = 1024;

const CREATED: u64 = 1_750_000_000;
const CONTEXT: u64 = 32_768;
const MEMORY: u64 = 1 << 30;

/// The two generating endpoints.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Api {
    Chat,
    Completions,
}

/// Every reply of the mock, head and body.
pub(crate) struct Replies {
    gets: HashMap<&'static str, Bytes>,
    not_found: Bytes,
    malformed: Bytes,
    chat: Generated,
    completions: Generated,
    end: Bytes,
}

struct Generated {
    whole: Bytes,
    /// Each framed as one chunk.
    events: Vec<Bytes>,
}

impl Replies {
    pub(crate) fn new() -> Self {
        let mut end = chunk(sse::DONE);
        end.extend_from_slice(b"0\r\n\r\n");
        Self {
            gets: HashMap::from([
                ("/discovery", json(200, &node_info())),
                ("/models", json(200, &node_models())),
                ("/models/mock", json(200, &model_status())),
                ("/v1/models", json(200, &model_list())),
                ("/health/live", json(200, &"live")),
                ("/health/ready", json(200, &"ready")),
            ]),
            not_found: error(ErrorKind::NotFound, "the mock does not know this path"),
            malformed: error(ErrorKind::InvalidRequest, "the body is not a JSON object"),
            chat: Generated {
                whole: json(200, &padded(chat_reply)),
                events: events(chat_chunk),
            },
            completions: Generated {
                whole: json(200, &padded(completion_reply)),
                events: events(completion_chunk),
            },
            end: end.into(),
        }
    }

    pub(crate) fn get(&self, path: &str) -> &Bytes {
        self.gets.get(path).unwrap_or(&self.not_found)
    }

    pub(crate) fn not_found(&self) -> &Bytes {
        &self.not_found
    }

    pub(crate) fn malformed(&self) -> &Bytes {
        &self.malformed
    }

    pub(crate) fn whole(&self, api: Api) -> &Bytes {
        &self.generated(api).whole
    }

    /// The head of every stream.
    pub(crate) fn stream_head(&self) -> &'static [u8] {
        b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ncache-control: no-cache\r\n\
          transfer-encoding: chunked\r\n\r\n"
    }

    /// The events with data of a stream, `[DONE]` not among them.
    pub(crate) fn events(&self, api: Api) -> &[Bytes] {
        &self.generated(api).events
    }

    /// `[DONE]` and the end of the body.
    pub(crate) fn stream_end(&self) -> &Bytes {
        &self.end
    }

    fn generated(&self, api: Api) -> &Generated {
        match api {
            Api::Chat => &self.chat,
            Api::Completions => &self.completions,
        }
    }
}

fn json(status: u16, body: &impl Serialize) -> Bytes {
    let body = serde_json::to_vec(body).expect("wire types always serialise");
    let reason = if status == 200 { "OK" } else { "Error" };
    let mut reply = format!(
        "HTTP/1.1 {status} {reason}\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n",
        body.len()
    )
    .into_bytes();
    reply.extend_from_slice(&body);
    reply.into()
}

fn error(kind: ErrorKind, message: &str) -> Bytes {
    json(kind.status(), &ApiError::new(kind, message).openai_body())
}

fn chunk(data: &[u8]) -> Vec<u8> {
    let mut chunk = format!("{:x}\r\n", data.len()).into_bytes();
    chunk.extend_from_slice(data);
    chunk.extend_from_slice(b"\r\n");
    chunk
}

/// The reply with as much text as makes it [`WHOLE`] bytes long.
fn padded<T: Serialize>(reply: impl Fn(String) -> T) -> T {
    let empty = serde_json::to_vec(&reply(String::new())).expect("wire types always serialise");
    reply(
        "lorem ipsum "
            .chars()
            .cycle()
            .take(WHOLE - empty.len())
            .collect(),
    )
}

/// [`EVENTS`] pieces of text and the finish, each an SSE event in a chunk of its own.
fn events<T: Serialize>(event: impl Fn(Option<usize>) -> T) -> Vec<Bytes> {
    (0..EVENTS)
        .map(Some)
        .chain([None])
        .map(|piece| {
            let mut data = Vec::new();
            sse::write_data(&mut data, &event(piece));
            chunk(&data).into()
        })
        .collect()
}

fn usage() -> Usage {
    Usage::new(24, EVENTS as u64)
}

fn chat_reply(text: String) -> ChatReply {
    ChatReply {
        id: "chatcmpl-0123456789abcdef".into(),
        object: "chat.completion".into(),
        created: CREATED,
        model: MODEL.into(),
        choices: vec![Choice {
            index: 0,
            message: AssistantMessage {
                role: "assistant".into(),
                content: Some(text),
                ..AssistantMessage::default()
            },
            logprobs: None,
            finish_reason: Some(FinishReason::Stop),
            stop_reason: None,
        }],
        usage: Some(usage()),
        timings: None,
    }
}

/// A content event, or with no piece the one with the finish reason.
fn chat_chunk(piece: Option<usize>) -> ChatChunk {
    ChatChunk {
        id: "chatcmpl-0123456789abcdef".into(),
        object: "chat.completion.chunk".into(),
        created: CREATED,
        model: MODEL.into(),
        choices: vec![ChunkChoice {
            index: 0,
            delta: Delta {
                role: (piece == Some(0)).then(|| "assistant".into()),
                content: piece.map(|number| format!(" word{number}")),
                ..Delta::default()
            },
            logprobs: None,
            finish_reason: piece.is_none().then_some(FinishReason::Stop),
            stop_reason: None,
        }],
        usage: None,
        timings: None,
    }
}

fn completion_reply(text: String) -> CompletionReply {
    CompletionReply {
        id: "cmpl-0123456789abcdef".into(),
        object: "text_completion".into(),
        created: CREATED,
        model: MODEL.into(),
        choices: vec![CompletionChoice {
            index: 0,
            text,
            logprobs: None,
            finish_reason: Some(FinishReason::Stop),
        }],
        usage: Some(usage()),
        timings: None,
    }
}

fn completion_chunk(piece: Option<usize>) -> CompletionReply {
    let mut chunk = completion_reply(piece.map_or_else(String::new, |n| format!(" word{n}")));
    chunk.choices[0].finish_reason = piece.is_none().then_some(FinishReason::Stop);
    chunk.usage = None;
    chunk
}

fn node_info() -> NodeInfo {
    NodeInfo {
        host: "mock".into(),
        version: env!("CARGO_PKG_VERSION").into(),
        devices: vec![DeviceInfo {
            id: "cpu".into(),
            name: "mock".into(),
            total_bytes: 16 * MEMORY,
            free_bytes: 15 * MEMORY,
            many_ranks: false,
        }],
        features: vec!["cpu".into()],
        cuda: None,
    }
}

fn model_status() -> ModelStatus {
    ModelStatus {
        id: MODEL.into(),
        state: ModelState::Loaded,
        progress: 1.0,
        reason: None,
        source: MODEL.into(),
        devices: vec!["cpu".into()],
        ranks: Vec::new(),
        memory_bytes: MEMORY,
        context_length: CONTEXT,
        capabilities: Vec::new(),
        in_flight: 0,
        since: CREATED,
    }
}

fn node_models() -> NodeModels {
    NodeModels {
        models: vec![model_status()],
    }
}

fn model_list() -> ModelList {
    ModelList::new(vec![ModelCard {
        context_length: Some(CONTEXT),
        state: Some(ModelState::Loaded.as_str().into()),
        ..ModelCard::new(MODEL, MODEL, CREATED)
    }])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::http1::{Reader, ReplyHead};
    use protocol::sse::{Decoder, Event};

    fn body(reply: &[u8]) -> Vec<u8> {
        let mut reader = Reader::<ReplyHead>::default();
        let mut body = Vec::new();
        let taken = reader
            .feed(reply, |piece| body.extend_from_slice(piece))
            .expect("our own reply");
        assert!(reader.is_done() && taken == reply.len(), "one whole reply");
        body
    }

    fn stream(api: Api) -> Vec<Event> {
        let replies = Replies::new();
        let mut bytes = replies.stream_head().to_vec();
        for event in replies.events(api) {
            bytes.extend_from_slice(event);
        }
        bytes.extend_from_slice(replies.stream_end());
        let mut events = Vec::new();
        Decoder::new(1 << 16)
            .feed(&body(&bytes), &mut events)
            .expect("short events");
        events
    }

    fn data(event: &Event) -> &[u8] {
        match event {
            Event::Message { data, .. } => data,
            Event::Comment(comment) => panic!("a comment where data should be: {comment:?}"),
        }
    }

    #[test]
    fn a_whole_reply_is_one_kibibyte_of_the_protocol() {
        let replies = Replies::new();
        let chat = body(replies.whole(Api::Chat));
        let text = body(replies.whole(Api::Completions));
        assert_eq!((chat.len(), text.len()), (WHOLE, WHOLE));
        let chat: ChatReply = serde_json::from_slice(&chat).expect("a chat reply");
        let text: CompletionReply = serde_json::from_slice(&text).expect("a completion reply");
        assert_eq!((chat.usage, text.usage), (Some(usage()), Some(usage())));
    }

    #[test]
    fn a_chat_stream_is_a_hundred_deltas_a_finish_and_done() {
        let events = stream(Api::Chat);
        let [deltas @ .., finish, done] = events.as_slice() else {
            panic!("a stream of {} events", events.len());
        };
        assert_eq!(deltas.len(), EVENTS);
        for event in deltas {
            let chunk: ChatChunk = serde_json::from_slice(data(event)).expect("a chat chunk");
            assert!(chunk.choices[0].delta.content.is_some());
        }
        let finish: ChatChunk = serde_json::from_slice(data(finish)).expect("a chat chunk");
        assert_eq!(finish.choices[0].finish_reason, Some(FinishReason::Stop));
        assert_eq!(data(done), b"[DONE]");
    }

    #[test]
    fn a_completion_stream_has_the_same_shape() {
        let events = stream(Api::Completions);
        assert_eq!(events.len(), EVENTS + 2);
        let last: CompletionReply =
            serde_json::from_slice(data(&events[EVENTS])).expect("a completion");
        assert_eq!(last.choices[0].finish_reason, Some(FinishReason::Stop));
    }

    #[test]
    fn the_fleet_protocol_says_that_the_model_is_loaded() {
        let replies = Replies::new();
        let _: NodeInfo =
            serde_json::from_slice(&body(replies.get("/discovery"))).expect("node info");
        let models: NodeModels =
            serde_json::from_slice(&body(replies.get("/models"))).expect("models");
        assert_eq!(models.models, [model_status()]);
        for path in [
            "/models/mock",
            "/v1/models",
            "/health/live",
            "/health/ready",
        ] {
            assert!(
                replies.get(path).starts_with(b"HTTP/1.1 200 "),
                "{path} is answered"
            );
        }
        assert!(replies.get("/").starts_with(b"HTTP/1.1 404 "));
    }
}
