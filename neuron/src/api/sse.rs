//! Events of the engine → an SSE body.

use super::failure::broken;
use super::generation::{Answer, Answers, Delivery};
use crate::engine::request::{EngineError, Event, Finish};
use axum::body::Bytes;
use futures::Stream;
use protocol::sse::{DONE, write_data};
use std::convert::Infallible;
use std::time::Duration;

/// Longest silence on a stream: below the idle timeouts of the proxies people put in front.
const KEEP_ALIVE: Duration = Duration::from_secs(10);

/// The bytes of a stream. Whatever deltas wait already go out in one piece. Dropping it cancels the request.
pub(super) fn stream(
    answer: impl Answer,
    answers: Answers,
    first: Option<(usize, Event)>,
    delivery: Delivery,
    request_id: String,
) -> impl Stream<Item = Result<Bytes, Infallible>> + Send {
    let writer = Writer {
        answer,
        answers,
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
    answers: Answers,
    first: Option<(usize, Event)>,
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
            None => tokio::time::timeout(KEEP_ALIVE, self.answers.next()).await,
        };
        match event {
            Err(_silence) => out.extend_from_slice(b": keep-alive\n\n"),
            Ok(None) => self.fail(EngineError::Gone, &mut out),
            Ok(Some((index, Event::End(end)))) => self.end(index, end, &mut out),
            Ok(Some((index, Event::Delta(delta)))) => {
                self.answer.delta(index, delta, &mut out);
                for delta in self.answers.ready(index) {
                    self.answer.delta(index, delta, &mut out);
                }
            }
        }
        Some(out)
    }

    fn end(&mut self, index: usize, end: Result<Finish, EngineError>, out: &mut Vec<u8>) {
        match end {
            Ok(finish) => self.answer.close(index, &finish, out),
            Err(error) => return self.fail(error, out),
        }
        if !self.answers.is_over() {
            return;
        }
        self.ended = true;
        let total = self.answers.total;
        if self.delivery.usage_chunk {
            self.answer.usage(&total, out);
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
