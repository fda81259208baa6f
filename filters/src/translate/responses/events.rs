//! Chat chunks → response events.

use super::scores::Scores;
use super::wire::{IncompleteDetails, Item, Part, Response, ResponseError, Status};
use crate::Exchange;
use crate::translate::Translator;
use protocol::chat::{ChatChunk, Delta, FinishReason, ToolCallDelta};
use protocol::sse::write_event;
use protocol::tokens::ChatLogprob;
use protocol::{ApiError, ErrorKind};
use serde::Serialize;
use serde_json::json;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

/// A comment: this API has no event for it.
const KEEP_ALIVE: &[u8] = b": keep-alive\n\n";

/// State of one streamed response.
pub(super) struct Events {
    /// The response as far as it has come.
    response: Response,
    /// What all ids of this response have in common.
    key: String,
    /// Learns of the whole response when it is over.
    exchange: Arc<Exchange>,
    events: Numbered,
    started: bool,
    /// The open item of thinking or text, as its place in the output.
    open: Option<usize>,
    /// Calls in the order they came. They stay open to the end: their pieces may come in turns.
    calls: Vec<Call>,
    /// The item that grew last: the one that a limit cut.
    grown: usize,
    /// Log probabilities whose text has not come yet.
    scores: Scores,
    finish: Option<FinishReason>,
}

/// Writes events with their numbers.
#[derive(Default)]
struct Numbered {
    next: u64,
}

/// One event.
#[derive(Serialize)]
struct Event<'a, T> {
    #[serde(rename = "type")]
    kind: &'a str,
    sequence_number: u64,
    #[serde(flatten)]
    body: T,
}

/// What every event about an item has.
#[derive(Serialize)]
struct Of<'a, T> {
    item_id: &'a str,
    output_index: usize,
    #[serde(flatten)]
    body: T,
}

/// What an event about a part of an item has.
#[derive(Default, Serialize)]
struct OfPart<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    content_index: Option<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    summary_index: Option<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    delta: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    text: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    logprobs: Option<&'a [ChatLogprob]>,
    #[serde(skip_serializing_if = "Option::is_none")]
    part: Option<&'a Part>,
}

/// An item where it begins and where it ends.
#[derive(Serialize)]
struct Whole<'a> {
    output_index: usize,
    item: &'a Item,
}

/// A call in the chat stream, and where it stands in the output once it has a name.
struct Call {
    index: u32,
    id: Option<String>,
    name: String,
    arguments: String,
    at: Option<usize>,
}

impl Numbered {
    fn write(&mut self, out: &mut Vec<u8>, kind: &str, body: impl Serialize) {
        let event = Event {
            kind,
            sequence_number: self.next,
            body,
        };
        write_event(out, kind, &event);
        self.next += 1;
    }
}

impl Events {
    /// The events of `response`, whose id ends in `key`.
    pub(super) fn new(response: Response, key: String, exchange: Arc<Exchange>) -> Self {
        Self {
            response,
            key,
            exchange,
            events: Numbered::default(),
            started: false,
            open: None,
            calls: Vec::new(),
            grown: 0,
            scores: Scores::default(),
            finish: None,
        }
    }

    /// The whole response, after the end.
    pub(super) fn into_response(self) -> Response {
        self.response
    }

    fn start(&mut self, created: u64, model: &str, out: &mut Vec<u8>) {
        if std::mem::replace(&mut self.started, true) {
            return;
        }
        self.response.created_at = if created == 0 { now() } else { created };
        if !model.is_empty() {
            model.clone_into(&mut self.response.model);
        }
        for kind in ["response.created", "response.in_progress"] {
            self.events
                .write(out, kind, json!({"response": &self.response}));
        }
    }

    fn delta(&mut self, delta: &Delta, out: &mut Vec<u8>) {
        if let Some(text) = delta
            .reasoning_content
            .as_deref()
            .filter(|text| !text.is_empty())
        {
            self.text(true, text, out);
        }
        if let Some(text) = delta.content.as_deref().filter(|text| !text.is_empty()) {
            self.text(false, text, out);
        }
        for call in delta.tool_calls.iter().flatten() {
            self.call(call, out);
        }
    }

    /// More thinking or more of the answer.
    fn text(&mut self, thinking: bool, text: &str, out: &mut Vec<u8>) {
        let at = self.open_text(thinking, out);
        self.grown = at;
        let scores = self.scores.take(text);
        let item = &mut self.response.output[at];
        let part = part_mut(item);
        part.text_mut().push_str(text);
        let body = OfPart {
            delta: Some(text),
            logprobs: matches!(part, Part::OutputText { .. }).then_some(&scores[..]),
            ..place_of(part)
        };
        let kind = words(part).delta;
        let body = of(&self.response.output, at, body);
        self.events.write(out, kind, body);
        if let Part::OutputText { logprobs, .. } = part_mut(&mut self.response.output[at]) {
            logprobs.extend(scores);
        }
    }

    /// The place of the open item of this kind, opened now if another kind was open.
    fn open_text(&mut self, thinking: bool, out: &mut Vec<u8>) -> usize {
        if let Some(at) = self.open {
            if matches!(self.response.output[at], Item::Reasoning { .. }) == thinking {
                return at;
            }
            self.close(at, Status::Completed, out);
        }
        let at = self.response.output.len();
        let status = Status::InProgress;
        let (item, part) = if thinking {
            let id = self.item_id("rs", at);
            let summary = Vec::new();
            let content = Vec::new();
            let part = match self.response.reasoning.summary {
                None => Part::ReasoningText {
                    text: String::new(),
                },
                Some(_) => Part::SummaryText {
                    text: String::new(),
                },
            };
            let item = Item::Reasoning {
                id,
                summary,
                content,
                status,
            };
            (item, part)
        } else {
            let item = Item::Message {
                id: self.item_id("msg", at),
                status,
                role: "assistant",
                content: Vec::new(),
            };
            let part = Part::OutputText {
                text: String::new(),
                annotations: [],
                logprobs: Vec::new(),
            };
            (item, part)
        };
        self.add(item, out);
        let body = OfPart {
            part: Some(&part),
            ..place_of(&part)
        };
        let kind = words(&part).added;
        self.events
            .write(out, kind, of(&self.response.output, at, body));
        match &mut self.response.output[at] {
            Item::Reasoning { summary, .. } if matches!(part, Part::SummaryText { .. }) => {
                summary.push(part);
            }
            Item::Reasoning { content, .. } | Item::Message { content, .. } => content.push(part),
            Item::FunctionCall { .. } => {}
        }
        self.open = Some(at);
        at
    }

    /// A piece of a call. Without a name there is nothing to show yet.
    fn call(&mut self, piece: &ToolCallDelta, out: &mut Vec<u8>) {
        let known = self.calls.iter().position(|call| call.index == piece.index);
        let number = known.unwrap_or_else(|| {
            self.calls.push(Call {
                index: piece.index,
                id: None,
                name: String::new(),
                arguments: String::new(),
                at: None,
            });
            self.calls.len() - 1
        });
        let call = &mut self.calls[number];
        let arguments = piece.function.arguments.as_deref().unwrap_or_default();
        let Some(at) = call.at else {
            if let Some(id) = piece.id.as_deref().filter(|id| !id.is_empty()) {
                call.id.get_or_insert_with(|| id.to_owned());
            }
            if let Some(name) = &piece.function.name {
                call.name.push_str(name);
            }
            call.arguments.push_str(arguments);
            if !call.name.is_empty() {
                self.open_call(number, out);
            }
            return;
        };
        self.grown = at;
        self.more_arguments(at, arguments, out);
    }

    fn open_call(&mut self, number: usize, out: &mut Vec<u8>) {
        if let Some(open) = self.open.take() {
            self.close(open, Status::Completed, out);
        }
        let at = self.response.output.len();
        let item_id = self.item_id("fc", at);
        let made_up = self.item_id("call", at);
        let call = &mut self.calls[number];
        call.at = Some(at);
        let arguments = std::mem::take(&mut call.arguments);
        // an id that is there already would join this call to another's result
        let call_id =
            call.id
                .take()
                .filter(|id| {
                    !self.response.output.iter().any(
                        |item| matches!(item, Item::FunctionCall { call_id, .. } if call_id == id),
                    )
                })
                .unwrap_or(made_up);
        let item = Item::FunctionCall {
            id: item_id,
            status: Status::InProgress,
            call_id,
            name: std::mem::take(&mut call.name),
            arguments: String::new(),
        };
        self.add(item, out);
        self.grown = at;
        self.more_arguments(at, &arguments, out);
    }

    fn more_arguments(&mut self, at: usize, piece: &str, out: &mut Vec<u8>) {
        if piece.is_empty() {
            return;
        }
        if let Item::FunctionCall { arguments, .. } = &mut self.response.output[at] {
            arguments.push_str(piece);
        }
        let body = of(&self.response.output, at, json!({"delta": piece}));
        self.events
            .write(out, "response.function_call_arguments.delta", body);
    }

    fn add(&mut self, item: Item, out: &mut Vec<u8>) {
        let body = Whole {
            output_index: self.response.output.len(),
            item: &item,
        };
        self.events.write(out, "response.output_item.added", body);
        self.response.output.push(item);
    }

    /// Ends the item at this place.
    fn close(&mut self, at: usize, status: Status, out: &mut Vec<u8>) {
        *self.response.output[at].status_mut() = status;
        let output = &self.response.output;
        match &output[at] {
            Item::FunctionCall { arguments, .. } => {
                let body = of(output, at, json!({"arguments": arguments}));
                self.events
                    .write(out, "response.function_call_arguments.done", body);
            }
            item => {
                let part = part(item);
                let words = words(part);
                let done = OfPart {
                    text: Some(part.text()),
                    logprobs: match part {
                        Part::OutputText { logprobs, .. } => Some(logprobs),
                        Part::ReasoningText { .. } | Part::SummaryText { .. } => None,
                    },
                    ..place_of(part)
                };
                self.events.write(out, words.done, of(output, at, done));
                let body = OfPart {
                    part: Some(part),
                    ..place_of(part)
                };
                self.events
                    .write(out, words.part_done, of(output, at, body));
            }
        }
        let body = Whole {
            output_index: at,
            item: &output[at],
        };
        self.events.write(out, "response.output_item.done", body);
    }

    /// Ends what is open; the item that grew last ends as `last`.
    fn close_all(&mut self, last: Status, out: &mut Vec<u8>) {
        for number in 0..self.calls.len() {
            if self.calls[number].at.is_none() {
                self.open_call(number, out); // it never got a name, but what came of it is not kept back
            }
        }
        let calls = self.calls.iter().filter_map(|call| call.at);
        let open: Vec<usize> = self.open.take().into_iter().chain(calls).collect();
        for at in open {
            let status = if at == self.grown {
                last
            } else {
                Status::Completed
            };
            self.close(at, status, out);
        }
    }

    fn end(&mut self, kind: &str, out: &mut Vec<u8>) {
        let whole =
            serde_json::value::to_raw_value(&self.response).expect("wire types always serialise");
        self.exchange
            .set_answer(&self.response.id, whole.get().to_owned());
        #[derive(Serialize)]
        struct Ended<'a> {
            response: &'a serde_json::value::RawValue,
        }
        self.events.write(out, kind, Ended { response: &whole });
    }

    fn item_id(&self, prefix: &str, at: usize) -> String {
        format!("{prefix}_{}{at:02x}", self.key)
    }
}

impl Translator for Events {
    fn chunk(&mut self, chunk: &ChatChunk, out: &mut Vec<u8>) {
        if let Some(usage) = chunk.usage {
            self.response.usage = Some(usage.into());
        }
        self.start(chunk.created, &chunk.model, out);
        let Some(choice) = chunk.choices.first() else {
            return;
        };
        if let Some(logprobs) = &choice.logprobs {
            self.scores.add(&logprobs.content);
        }
        self.delta(&choice.delta, out);
        if let Some(finish) = choice.finish_reason {
            self.finish = Some(finish);
        }
    }

    fn finish(&mut self, out: &mut Vec<u8>) {
        self.start(0, "", out);
        let reason = match self.finish {
            Some(FinishReason::Length) => Some("max_output_tokens"),
            Some(FinishReason::ContentFilter) => Some("content_filter"),
            Some(FinishReason::Stop | FinishReason::ToolCalls) | None => None,
        };
        let (status, kind) = match reason {
            Some(_) => (Status::Incomplete, "response.incomplete"),
            None => (Status::Completed, "response.completed"),
        };
        self.close_all(status, out);
        self.response.status = status;
        self.response.incomplete_details = reason.map(|reason| IncompleteDetails { reason });
        self.end(kind, out);
    }

    fn keep_alive(&mut self, out: &mut Vec<u8>) {
        out.extend_from_slice(KEEP_ALIVE);
    }

    fn fail(&mut self, error: &ApiError, out: &mut Vec<u8>) {
        self.start(0, "", out);
        let told = error.openai_body().error;
        // the API's description has these fields flat, its servers nest them, and clients look for either
        let body =
            json!({"code": told.code, "message": told.message, "param": told.param, "error": told});
        self.events.write(out, "error", body);
        for item in &mut self.response.output {
            if *item.status_mut() == Status::InProgress {
                *item.status_mut() = Status::Incomplete;
            }
        }
        self.response.status = Status::Failed;
        self.response.error = Some(ResponseError {
            code: failure_code(error.kind),
            message: error.message.clone(),
        });
        self.end("response.failed", out);
    }
}

/// How the events of a part are called.
struct Words {
    added: &'static str,
    delta: &'static str,
    done: &'static str,
    part_done: &'static str,
}

fn words(part: &Part) -> Words {
    match part {
        Part::OutputText { .. } => Words {
            added: "response.content_part.added",
            delta: "response.output_text.delta",
            done: "response.output_text.done",
            part_done: "response.content_part.done",
        },
        Part::ReasoningText { .. } => Words {
            added: "response.content_part.added",
            delta: "response.reasoning_text.delta",
            done: "response.reasoning_text.done",
            part_done: "response.content_part.done",
        },
        Part::SummaryText { .. } => Words {
            added: "response.reasoning_summary_part.added",
            delta: "response.reasoning_summary_text.delta",
            done: "response.reasoning_summary_text.done",
            part_done: "response.reasoning_summary_part.done",
        },
    }
}

/// An item of text has one part.
fn place_of(part: &Part) -> OfPart<'static> {
    match part {
        Part::OutputText { .. } | Part::ReasoningText { .. } => OfPart {
            content_index: Some(0),
            ..OfPart::default()
        },
        Part::SummaryText { .. } => OfPart {
            summary_index: Some(0),
            ..OfPart::default()
        },
    }
}

fn of<T: Serialize>(output: &[Item], at: usize, body: T) -> Of<'_, T> {
    Of {
        item_id: output[at].id(),
        output_index: at,
        body,
    }
}

/// The one part of an item of thinking or text.
fn part(item: &Item) -> &Part {
    let parts = match item {
        Item::Reasoning {
            summary, content, ..
        } => content.first().or(summary.first()),
        Item::Message { content, .. } => content.first(),
        Item::FunctionCall { .. } => None,
    };
    parts.expect("an item of text is opened with its part")
}

fn part_mut(item: &mut Item) -> &mut Part {
    let parts = match item {
        Item::Reasoning {
            summary, content, ..
        } => content.first_mut().or(summary.first_mut()),
        Item::Message { content, .. } => content.first_mut(),
        Item::FunctionCall { .. } => None,
    };
    parts.expect("an item of text is opened with its part")
}

/// `error.code` of a failed response, of the few that there are.
fn failure_code(kind: ErrorKind) -> &'static str {
    match kind {
        ErrorKind::RateLimited => "rate_limit_exceeded",
        ErrorKind::InvalidRequest | ErrorKind::ContextLengthExceeded => "invalid_prompt",
        _ => "server_error",
    }
}

fn now() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |time| time.as_secs())
}
