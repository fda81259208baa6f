//! Events of the engine → an SSE body.

use super::failure::broken;
use super::generation::{Answer, Delivery};
use crate::engine::request::{EngineError, Event, Events, Finish};
use axum::body::Bytes;
use futures::Stream;
use protocol::ext::USAGE_COMMENT;
use protocol::sse::{DONE, write_data};
use std::convert::Infallible;
use std::time::Duration;

/// Longest silence on a stream: below the idle timeouts of the proxies people put in front.
const KEEP_ALIVE: Duration = Duration::from_secs(10);

/// The bytes of a stream. Whatever deltas wait already go out in one piece. Dropping it cancels the request.
pub(super) fn stream(
    answer: impl Answer,
    events: Events,
    first: Option<Event>,
    delivery: Delivery,
    request_id: String,
) -> impl Stream<Item = Result<Bytes, Infallible>> + Send {
    let writer = Writer {
        answer,
        events,
        first,
        delivery,
        request_id,
        opened: false,
        ended: false,
    };
    futures::stream::unfold(writer, |mut writer| async move {
        let piece = writer.next().await?;
        Some((Ok(Bytes::from(piece)), writer))
    })
}

struct Writer<A> {
    answer: A,
    events: Events,
    first: Option<Event>,
    delivery: Delivery,
    request_id: String,
    opened: bool,
    ended: bool,
}

impl<A: Answer> Writer<A> {
    async fn next(&mut self) -> Option<Vec<u8>> {
        if self.ended {
            return None;
        }
        let mut out = Vec::new();
        if !self.opened {
            self.opened = true;
            self.answer.open(&mut out);
            if self.first.is_none() {
                // A long prefill: the client should see that it was heard.
                return Some(out);
            }
        }
        let event = match self.first.take() {
            Some(event) => Ok(Some(event)),
            None => tokio::time::timeout(KEEP_ALIVE, self.events.next()).await,
        };
        match event {
            Err(_silence) => out.extend_from_slice(b": keep-alive\n\n"),
            Ok(None) => self.fail(EngineError::Gone, &mut out),
            Ok(Some(Event::End(end))) => self.end(end, &mut out),
            Ok(Some(Event::Delta(delta))) => {
                self.answer.delta(delta, &mut out);
                while let Some(delta) = self.events.try_next() {
                    self.answer.delta(delta, &mut out);
                }
            }
        }
        Some(out)
    }

    fn end(&mut self, end: Result<Finish, EngineError>, out: &mut Vec<u8>) {
        self.ended = true;
        let finish = match end {
            Ok(finish) => finish,
            Err(error) => return self.fail(error, out),
        };
        self.answer.close(&finish, self.delivery.usage_chunk, out);
        if self.delivery.usage_comment {
            out.extend_from_slice(USAGE_COMMENT.as_bytes());
            serde_json::to_writer(&mut *out, &finish.usage).expect("usage always serialises");
            out.extend_from_slice(b"\n\n");
        }
        out.extend_from_slice(DONE);
    }

    /// An error event and then the end: without `[DONE]` no client takes half an answer for a whole one.
    fn fail(&mut self, error: EngineError, out: &mut Vec<u8>) {
        self.ended = true;
        tracing::warn!(request = self.request_id, %error, "stream ended in an error");
        write_data(out, &broken(error).openai_body());
    }
}
