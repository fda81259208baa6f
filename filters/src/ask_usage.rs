//! Every stream is counted: where a client does not ask for usage, it is asked for on the way up and kept from the
//! client on the way down.

use crate::{Body, Failure, Request, Response, ResponseFuture};
use bytes::{Bytes, BytesMut};
use futures::{Stream, StreamExt};
use memchr::memmem;
use protocol::ApiError;
use serde::de::IgnoredAny;
use serde::{Deserialize, Deserializer};
use serde_json::value::RawValue;
use serde_json::{Map, Value};
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use tower::{Layer, Service};

/// An event longer than this is none that has only usage, and is not waited for.
const EVENT_LIMIT: usize = 64 << 10;

/// Puts [`AskUsage`] around a stack.
#[derive(Debug, Clone, Copy, Default)]
pub struct AskUsageLayer;

/// Asks for usage in streams whose client did not. All other bytes stay as they are, both ways.
#[derive(Debug, Clone)]
pub struct AskUsage<S> {
    inner: S,
}

impl<S> Layer<S> for AskUsageLayer {
    type Service = AskUsage<S>;

    fn layer(&self, inner: S) -> AskUsage<S> {
        AskUsage { inner }
    }
}

impl<S> Service<Request> for AskUsage<S>
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
        let exchange = &request.exchange;
        // a dialect that is translated asks by itself
        let asks = exchange.asks_usage() || exchange.dialect.translation().is_some();
        if asks || !exchange.is_stream() {
            return self.inner.call(request);
        }
        let Some(body) = asking(&request.body) else {
            return self.inner.call(request); // its `stream_options` are none: the node will say so
        };
        request.body = body;
        let response = self.inner.call(request);
        Box::pin(async move { Ok(response.await?.map(|body| body.map_stream(Untold::new))) })
    }
}

/// The body with `stream_options.include_usage`; `None` where `stream_options` is something else than an object.
fn asking(body: &Bytes) -> Option<Bytes> {
    #[derive(Deserialize)]
    struct Options<'a> {
        #[serde(borrow, default, deserialize_with = "null_as_well")]
        stream_options: Option<&'a RawValue>,
    }
    fn null_as_well<'de, D: Deserializer<'de>>(d: D) -> Result<Option<&'de RawValue>, D::Error> {
        <&RawValue>::deserialize(d).map(Some)
    }
    const ASK: &str = "\"stream_options\":{\"include_usage\":true}";
    let given = if memmem::find(body, b"stream_options").is_some() {
        serde_json::from_slice::<Options<'_>>(body)
            .ok()?
            .stream_options
    } else {
        None
    };
    let mut asking = Vec::with_capacity(body.len() + ASK.len() + 1);
    if let Some(given) = given {
        let options: Option<Map<String, Value>> = serde_json::from_str(given.get()).ok()?;
        let mut options = options.unwrap_or_default();
        options.insert("include_usage".into(), true.into());
        let start = given.get().as_ptr().addr() - body.as_ptr().addr();
        asking.extend_from_slice(&body[..start]);
        serde_json::to_writer(&mut asking, &options).expect("a map always serialises");
        asking.extend_from_slice(&body[start + given.get().len()..]);
    } else {
        // a body that names its model is an object that is not empty
        let open = memchr::memchr(b'{', body)?;
        asking.extend_from_slice(&body[..=open]);
        asking.extend_from_slice(ASK.as_bytes());
        asking.push(b',');
        asking.extend_from_slice(&body[open + 1..]);
    }
    Some(asking.into())
}

/// A stream without the event that has only usage.
struct Untold {
    body: Body,
    /// The event that has not ended yet.
    partial: BytesMut,
    /// The event that passes is too long to be one that is looked for.
    passing: bool,
    find_usage: memmem::Finder<'static>,
}

impl Untold {
    fn new(body: Body) -> Self {
        Self {
            body,
            partial: BytesMut::new(),
            passing: false,
            find_usage: memmem::Finder::new(b"\"usage\""),
        }
    }

    /// What of `bytes` and of what was held back can go on.
    fn pass(&mut self, bytes: Bytes) -> Bytes {
        let ends = bytes.ends_with(b"\n\n");
        if ends && self.partial.is_empty() && self.find_usage.find(&bytes).is_none() {
            self.passing = false;
            return bytes; // whole events, none of them of interest: most pieces are so
        }
        self.partial.extend_from_slice(&bytes);
        let mut out = BytesMut::new();
        while let Some(end) = event_end(&self.partial) {
            let event = self.partial.split_to(end);
            let passing = std::mem::take(&mut self.passing);
            if passing || !self.has_only_usage(&event) {
                out.unsplit(event);
            }
        }
        if self.partial.len() > EVENT_LIMIT || self.passing {
            self.passing = true;
            out.unsplit(self.partial.split());
        }
        out.freeze()
    }

    fn has_only_usage(&self, event: &[u8]) -> bool {
        #[derive(Deserialize)]
        struct Chunk {
            choices: Vec<IgnoredAny>,
            usage: Option<IgnoredAny>,
        }
        if self.find_usage.find(event).is_none() {
            return false;
        }
        let data = event
            .strip_prefix(b"data:")
            .map(<[u8]>::trim_ascii)
            .and_then(|data| serde_json::from_slice::<Chunk>(data).ok());
        data.is_some_and(|chunk| chunk.choices.is_empty() && chunk.usage.is_some())
    }
}

/// Where the first event ends: behind its empty line.
fn event_end(bytes: &[u8]) -> Option<usize> {
    memchr::memchr_iter(b'\n', bytes).find_map(|at| match &bytes[at + 1..] {
        [b'\n', ..] => Some(at + 2),
        [b'\r', b'\n', ..] => Some(at + 3),
        _ => None,
    })
}

impl Stream for Untold {
    type Item = Result<Bytes, ApiError>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        loop {
            match ready!(self.body.poll_next_unpin(cx)) {
                Some(Ok(bytes)) => {
                    let out = self.pass(bytes);
                    if !out.is_empty() {
                        return Poll::Ready(Some(Ok(out)));
                    }
                }
                None if !self.partial.is_empty() => {
                    return Poll::Ready(Some(Ok(self.partial.split().freeze())));
                }
                end => return Poll::Ready(end),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;
    use std::sync::{Arc, Mutex};

    #[test]
    fn usage_is_asked_for_and_all_other_bytes_stay() {
        let cases = [
            (
                r#" {"model" : "m","stream":true}"#,
                r#" {"stream_options":{"include_usage":true},"model" : "m","stream":true}"#,
            ),
            (
                r#"{"stream_options":{"include_usage":false, "x":1} ,"a":1.0}"#,
                r#"{"stream_options":{"include_usage":true,"x":1} ,"a":1.0}"#,
            ),
            (
                r#"{"a":1,"stream_options":null}"#,
                r#"{"a":1,"stream_options":{"include_usage":true}}"#,
            ),
            (
                r#"{"messages":["stream_options"],"model":"m"}"#,
                r#"{"stream_options":{"include_usage":true},"messages":["stream_options"],"model":"m"}"#,
            ),
        ];
        for (body, expected) in cases {
            let asked = asking(&Bytes::from_static(body.as_bytes())).expect("an object");
            assert_eq!(String::from_utf8_lossy(&asked), expected);
        }
        assert!(asking(&Bytes::from_static(br#"{"stream_options":7}"#)).is_none());
    }

    const STREAM: &str = concat!(
        "data: {\"choices\":[{\"delta\":{\"content\":\"\\\"usage\\\"\"}}],\"usage\":null}\n\n",
        ": keep-alive\n\n",
        "data: {\"choices\":[{\"delta\":{},\"finish_reason\":\"stop\"}],\"usage\":{\"prompt_tokens\":1}}\r\n\r\n",
        "data: {\"choices\":[],\"usage\":{\"prompt_tokens\":1,\"completion_tokens\":2,\"total_tokens\":3}}\n\n",
        "data: [DONE]\n\n",
    );

    async fn heard(pieces: Vec<&'static str>) -> String {
        let stream =
            futures::stream::iter(pieces).map(|piece| Ok(Bytes::from_static(piece.as_bytes())));
        let untold = Untold::new(Body::stream(stream));
        let all = Body::stream(untold).collect(1 << 20).await.expect("whole");
        String::from_utf8_lossy(&all).into_owned()
    }

    #[tokio::test]
    async fn only_the_event_that_has_only_usage_is_left_out_at_every_split() {
        let mut events: Vec<&str> = STREAM.split_inclusive("\n\n").collect();
        let told = events.remove(2); // the CRLF event and the one with usage: only LF LF splits here
        let expected = format!(
            "{}{}{}{}",
            events[0],
            events[1],
            &told[..told.find("\r\n\r\n").expect("it ends so") + 4],
            events[2]
        );
        for cut in 0..=STREAM.len() {
            assert_eq!(
                heard(vec![&STREAM[..cut], &STREAM[cut..]]).await,
                expected,
                "cut at {cut}"
            );
        }
        let bytes = (0..STREAM.len()).map(|at| &STREAM[at..=at]).collect();
        assert_eq!(heard(bytes).await, expected);
    }

    #[tokio::test]
    async fn an_event_without_end_is_not_held_for_ever() {
        let long: &'static str = Box::leak("x".repeat(3 * EVENT_LIMIT).into_boxed_str());
        let text = heard(vec![
            &long[..EVENT_LIMIT + 1],
            &long[EVENT_LIMIT + 1..],
            "\n\ndata: 1\n\n",
        ])
        .await;
        assert_eq!(text.len(), long.len() + 11);
    }

    #[tokio::test]
    async fn a_client_that_asks_gets_its_own_bytes_up_and_the_nodes_down() {
        for (path, stream, usage, touched) in [
            ("/v1/chat/completions", true, false, true),
            ("/v1/completions", true, false, true),
            ("/v1/chat/completions", true, true, false),
            ("/v1/chat/completions", false, false, false),
            ("/v1/messages", true, false, false),
        ] {
            let (head, ()) = http::Request::post(path)
                .body(())
                .expect("a valid head")
                .into_parts();
            let body = Bytes::from(json!({"model": "m"}).to_string());
            let request = Request::new(head, body.clone());
            request.exchange.set_target("m".into(), stream);
            if usage {
                request.exchange.note_usage_asked();
            }
            let seen = Arc::new(Mutex::new(Bytes::new()));
            let kept = seen.clone();
            let inner = tower::service_fn(move |request: Request| -> ResponseFuture {
                *kept.lock().expect("one thread") = request.body;
                let body = Body::stream(futures::stream::iter([Ok(Bytes::from_static(
                    STREAM.as_bytes(),
                ))]));
                Box::pin(std::future::ready(Ok(Response::new(body))))
            });
            let response = AskUsageLayer
                .layer(inner)
                .call(request)
                .await
                .expect("answers");
            let told = response.into_body().collect(1 << 20).await.expect("whole");
            assert_eq!(
                *seen.lock().expect("one thread") != body,
                touched,
                "{path} {stream} {usage}"
            );
            assert_eq!(
                told.len() != STREAM.len(),
                touched,
                "{path} {stream} {usage}"
            );
        }
    }
}
