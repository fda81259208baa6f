//! Reads tokens and the moment of the first one off a passing answer, without changing a byte.

use crate::{Body, Exchange, Failure, Request, Response, ResponseFuture};
use bytes::Bytes;
use futures::{Stream, StreamExt};
use memchr::memmem;
use protocol::ApiError;
use protocol::usage::Usage;
use serde::Deserialize;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use tower::{Layer, Service};

/// A line that has not ended after this many bytes is not looked at: usage and first tokens are short.
const LINE_LIMIT: usize = 64 << 10;

/// Puts [`Observe`] around a stack.
#[derive(Debug, Clone, Copy, Default)]
pub struct ObserveLayer;

/// Stands right above the upstream, where answers are chat or text completions whatever the client speaks.
#[derive(Debug, Clone)]
pub struct Observe<S> {
    inner: S,
}

impl<S> Layer<S> for ObserveLayer {
    type Service = Observe<S>;

    fn layer(&self, inner: S) -> Observe<S> {
        Observe { inner }
    }
}

impl<S> Service<Request> for Observe<S>
where
    S: Service<Request, Response = Response, Error = Failure, Future = ResponseFuture>,
{
    type Response = Response;
    type Error = Failure;
    type Future = ResponseFuture;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Failure>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Request) -> Self::Future {
        let exchange = request.exchange.clone();
        let response = self.inner.call(request);
        Box::pin(async move {
            let response = response.await?;
            if let Some(whole) = response.body().as_whole()
                && let Some(usage) = usage_in(whole)
            {
                exchange.set_usage(usage);
            }
            Ok(response.map(|body| {
                body.map_stream(|body| Observed {
                    body,
                    scanner: Scanner::new(exchange),
                })
            }))
        })
    }
}

/// A streamed answer being read along.
struct Observed {
    body: Body,
    scanner: Scanner,
}

impl Stream for Observed {
    type Item = Result<Bytes, ApiError>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let next = self.body.poll_next_unpin(cx);
        if let Poll::Ready(Some(Ok(bytes))) = &next {
            self.scanner.feed(bytes);
        }
        next
    }
}

/// Finds the first token and the usage in the lines of a stream, however it is cut.
struct Scanner {
    exchange: Arc<Exchange>,
    /// The line that has not ended yet, up to [`LINE_LIMIT`].
    partial: Vec<u8>,
    first_seen: bool,
    find_usage: memmem::Finder<'static>,
}

impl Scanner {
    fn new(exchange: Arc<Exchange>) -> Self {
        let find_usage = memmem::Finder::new(b"\"usage\":{");
        Self {
            exchange,
            partial: Vec::new(),
            first_seen: false,
            find_usage,
        }
    }

    fn feed(&mut self, bytes: &[u8]) {
        let mut rest = bytes;
        while let Some(end) = memchr::memchr(b'\n', rest) {
            let line = &rest[..end];
            rest = &rest[end + 1..];
            if self.partial.is_empty() {
                self.line(line);
            } else {
                let mut whole = std::mem::take(&mut self.partial);
                whole.extend_from_slice(line);
                self.line(&whole);
            }
        }
        if self.partial.len() + rest.len() <= LINE_LIMIT {
            self.partial.extend_from_slice(rest);
        }
    }

    fn line(&mut self, line: &[u8]) {
        if let Some(data) = line.strip_prefix(b"data:") {
            if !self.first_seen && has_output(data) {
                self.first_seen = true;
                self.exchange.mark_first_token();
            }
            if self.find_usage.find(data).is_some()
                && let Some(usage) = usage_in(data)
            {
                self.exchange.set_usage(usage);
            }
        }
    }
}

/// The usage that an answer or a chunk reports.
fn usage_in(json: &[u8]) -> Option<Usage> {
    #[derive(Deserialize)]
    struct UsageOnly {
        usage: Option<Usage>,
    }
    // Within a string its quotes would be escaped, so this is a key, or a string that is nothing else. Where there is
    // one alone, what is before it need not be parsed: most of an answer.
    const KEY: &[u8] = b"\"usage\"";
    let at = memmem::find(json, KEY)?;
    let behind = &json[at + KEY.len()..];
    if let Some(value) = behind.trim_ascii_start().strip_prefix(b":")
        && memmem::find(behind, KEY).is_none()
    {
        let mut values = serde_json::Deserializer::from_slice(value).into_iter::<Option<Usage>>();
        return values.next()?.ok()?;
    }
    serde_json::from_slice::<UsageOnly>(json).ok()?.usage
}

/// Whether a chunk carries a piece of answer: text, thinking or a tool call, in either of OpenAI's two shapes.
fn has_output(data: &[u8]) -> bool {
    #[derive(Deserialize)]
    struct Chunk<'a> {
        #[serde(borrow, default)]
        choices: Vec<Choice<'a>>,
    }
    #[derive(Deserialize)]
    struct Choice<'a> {
        #[serde(borrow, default)]
        delta: Option<Delta<'a>>,
        #[serde(borrow, default)]
        text: Option<std::borrow::Cow<'a, str>>,
    }
    #[derive(Deserialize)]
    struct Delta<'a> {
        #[serde(borrow, default)]
        content: Option<std::borrow::Cow<'a, str>>,
        #[serde(borrow, default)]
        reasoning_content: Option<std::borrow::Cow<'a, str>>,
        #[serde(default)]
        tool_calls: Option<serde::de::IgnoredAny>,
    }
    let Ok(chunk) = serde_json::from_slice::<Chunk<'_>>(data) else {
        return false;
    };
    chunk.choices.iter().any(|choice| {
        let text = choice.text.as_ref().is_some_and(|text| !text.is_empty());
        text || choice.delta.as_ref().is_some_and(|delta| {
            let written = |text: &Option<std::borrow::Cow<'_, str>>| {
                text.as_ref().is_some_and(|text| !text.is_empty())
            };
            written(&delta.content)
                || written(&delta.reasoning_content)
                || delta.tool_calls.is_some()
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const STREAM: &str = concat!(
        "data: {\"choices\":[{\"index\":0,\"delta\":{\"role\":\"assistant\",\"content\":\"\"}}]}\n\n",
        ": keep-alive\n\n",
        "data: {\"choices\":[{\"index\":0,\"delta\":{\"content\":\"say \\\"usage\\\":{ aloud\"}}]}\n\n",
        "data: {\"choices\":[],\"usage\":{\"prompt_tokens\":7,\"completion_tokens\":3,\"total_tokens\":10}}\n\n",
        "data: [DONE]\n\n",
    );

    fn exchange() -> Arc<Exchange> {
        Exchange::open(&http::Request::new(()).into_parts().0)
    }

    #[test]
    fn tokens_are_found_at_every_split() {
        for cut in 0..=STREAM.len() {
            let exchange = exchange();
            let mut scanner = Scanner::new(exchange.clone());
            scanner.feed(&STREAM.as_bytes()[..cut]);
            scanner.feed(&STREAM.as_bytes()[cut..]);
            assert_eq!(exchange.usage(), Some(Usage::new(7, 3)), "cut at {cut}");
            assert!(exchange.time_to_first_token().is_some(), "cut at {cut}");
        }
    }

    #[test]
    fn a_role_is_not_a_token() {
        let exchange = exchange();
        let mut scanner = Scanner::new(exchange.clone());
        scanner.feed(
            STREAM
                .split_inclusive("\n\n")
                .next()
                .expect("a first event")
                .as_bytes(),
        );
        assert!(exchange.time_to_first_token().is_none());
    }

    #[test]
    fn usage_is_found_wherever_it_stands_in_an_answer() {
        const USAGE: &str = r#"{"prompt_tokens":7,"completion_tokens":3,"total_tokens":10}"#;
        for (json, found) in [
            (
                format!(r#"{{"choices":[],"usage" : {USAGE},"timings":{{}}}}"#),
                true,
            ),
            (
                format!(r#"{{"usage":{USAGE},"choices":[{{"text":"\"usage\":1"}}]}}"#),
                true,
            ),
            (
                format!(r#"{{"choices":[{{"text":"usage"}}],"usage":{USAGE}}}"#),
                true,
            ),
            (
                format!(r#"{{"details":{{"usage":2}},"usage":{USAGE}}}"#),
                true,
            ),
            (r#"{"choices":[],"usage":null}"#.to_owned(), false),
            (r#"{"choices":["usage"]}"#.to_owned(), false),
            (
                r#"{"choices":[],"usage":{"prompt_tokens":"#.to_owned(),
                false,
            ),
        ] {
            let expected = found.then(|| Usage::new(7, 3));
            assert_eq!(usage_in(json.as_bytes()), expected, "{json}");
        }
    }

    #[test]
    fn usage_may_come_in_the_last_chunk_as_well() {
        let exchange = exchange();
        let mut scanner = Scanner::new(exchange.clone());
        scanner.feed(b"data: {\"choices\":[],\"usage\":{\"prompt_tokens\":1,\"completion_tokens\":2,\"total_tokens\":3}}\n\n");
        assert_eq!(exchange.usage(), Some(Usage::new(1, 2)));
    }
}
