//! Drives a [`Translator`] over the events of an upstream's stream.

use super::Translator;
use crate::Body;
use bytes::Bytes;
use futures::{Stream, StreamExt};
use protocol::chat::ChatChunk;
use protocol::error::OpenAiError;
use protocol::sse::{Decoder, Event};
use protocol::{ApiError, ErrorKind};
use std::pin::Pin;
use std::task::{Context, Poll, ready};

/// No event of a sane upstream is longer, a data URL in a tool call included.
const EVENT_LIMIT: usize = 8 << 20;

/// An upstream's stream in another dialect.
pub struct Translated {
    /// `None` once the stream has ended, well or not.
    body: Option<Body>,
    decoder: Decoder,
    translator: Box<dyn Translator>,
    events: Vec<Event>,
    out: Vec<u8>,
    /// What the stream failed with, told after the events that came before it.
    failed: Option<ApiError>,
}

impl Translated {
    /// The events of `body`, as `translator` says them.
    #[must_use]
    pub fn new(body: Body, translator: Box<dyn Translator>) -> Self {
        Self {
            body: Some(body),
            decoder: Decoder::new(EVENT_LIMIT),
            translator,
            events: Vec::new(),
            out: Vec::new(),
            failed: None,
        }
    }

    /// Translates what `bytes` complete. `true` when that was the end.
    fn feed(&mut self, bytes: &[u8]) -> Result<bool, ApiError> {
        self.decoder
            .feed(bytes, &mut self.events)
            .map_err(|error| unreadable("an event is too long").caused_by(error))?;
        for event in self.events.drain(..) {
            match event {
                Event::Message { data, .. } if &*data == b"[DONE]" => {
                    self.translator.finish(&mut self.out);
                    return Ok(true);
                }
                Event::Message { data, .. } => {
                    self.translator.chunk(&parse(&data)?, &mut self.out);
                }
                // a comment only says that somebody is there
                Event::Comment(_) => self.translator.keep_alive(&mut self.out),
            }
        }
        Ok(false)
    }
}

fn unreadable(what: &str) -> ApiError {
    ApiError::new(
        ErrorKind::BadGateway,
        format!("the upstream's stream cannot be read: {what}"),
    )
}

/// A chunk, or the error that the upstream sent in place of one.
fn parse(data: &[u8]) -> Result<ChatChunk, ApiError> {
    if memchr::memmem::find(data, b"\"error\"").is_some()
        && let Ok(OpenAiError { error }) = serde_json::from_slice(data)
    {
        return Err(ApiError::new(ErrorKind::BadGateway, error.message));
    }
    serde_json::from_slice(data)
        .map_err(|error| unreadable("a chunk is no chat completion chunk").caused_by(error))
}

impl Stream for Translated {
    type Item = Result<Bytes, ApiError>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = &mut *self;
        loop {
            let Some(body) = this.body.as_mut() else {
                return Poll::Ready(this.failed.take().map(Err));
            };
            let fed = match ready!(body.poll_next_unpin(cx)) {
                Some(Ok(bytes)) => this.feed(&bytes),
                Some(Err(error)) => Err(error),
                None => Err(unreadable("it ended before the answer did")),
            };
            match fed {
                Ok(false) => {}
                Ok(true) => this.body = None,
                Err(error) => {
                    this.body = None;
                    this.translator.fail(&error, &mut this.out);
                    this.failed = Some(error);
                }
            }
            if !this.out.is_empty() {
                return Poll::Ready(Some(Ok(std::mem::take(&mut this.out).into())));
            }
        }
    }
}
