//! A client that waits for a stream hears from us while nothing comes: a model is loading, a node is thinking.

use crate::{Body, Failure, Request, Response, ResponseFuture};
use bytes::Bytes;
use futures::StreamExt;
use futures::future::{Either, select};
use http::{HeaderValue, header};
use protocol::ApiError;
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::time::sleep;
use tower::{Layer, Service};

/// The comment itself. Dialects with a form of their own for it translate it.
const COMMENT: &[u8] = b": keep-alive\n\n";

/// Puts [`KeepAlive`] around a stack.
#[derive(Debug, Clone, Copy)]
pub struct KeepAliveLayer {
    period: Duration,
}

impl KeepAliveLayer {
    /// Speaks after each `period` of silence.
    #[must_use]
    pub fn new(period: Duration) -> Self {
        Self { period }
    }
}

/// Begins the reply to a streaming request after a period without one, and fills the wait with comments.
///
/// Until then a failure has its proper status; after that it can only be told as an event.
#[derive(Debug, Clone)]
pub struct KeepAlive<S> {
    inner: S,
    period: Duration,
}

impl<S> Layer<S> for KeepAliveLayer {
    type Service = KeepAlive<S>;

    fn layer(&self, inner: S) -> KeepAlive<S> {
        KeepAlive {
            inner,
            period: self.period,
        }
    }
}

impl<S> Service<Request> for KeepAlive<S>
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
        let stream = request.exchange.is_stream();
        let response = self.inner.call(request);
        if !stream {
            return response;
        }
        let period = self.period;
        Box::pin(async move {
            match select(response, Box::pin(sleep(period))).await {
                Either::Left((response, _)) => response,
                Either::Right(((), response)) => Ok(begin(response, period)),
            }
        })
    }
}

/// Where a reply that has begun early stands.
enum Stage {
    /// The stack below has not answered yet.
    Waiting(ResponseFuture),
    /// Its body passes.
    Passing(Body),
    Over,
}

fn begin(response: ResponseFuture, period: Duration) -> Response {
    let body = futures::stream::unfold(Stage::Waiting(response), move |stage| next(stage, period));
    let first = futures::stream::iter([Ok(Bytes::from_static(COMMENT))]);
    let mut response = Response::new(Body::stream(first.chain(body)));
    response.headers_mut().insert(
        header::CONTENT_TYPE,
        HeaderValue::from_static("text/event-stream"),
    );
    response
}

async fn next(mut stage: Stage, period: Duration) -> Option<(Result<Bytes, ApiError>, Stage)> {
    loop {
        stage = match stage {
            Stage::Waiting(response) => match select(response, Box::pin(sleep(period))).await {
                Either::Left((Ok(response), _)) => Stage::Passing(response.into_body()),
                Either::Left((Err(failure), _)) => return Some((Err(failure.error), Stage::Over)),
                Either::Right(((), response)) => {
                    return Some((Ok(Bytes::from_static(COMMENT)), Stage::Waiting(response)));
                }
            },
            Stage::Passing(mut body) => {
                let piece = body.next().await?;
                return Some((piece, Stage::Passing(body)));
            }
            Stage::Over => return None,
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use protocol::ErrorKind;

    /// Asks through the layer for an answer that takes `wait`.
    async fn ask(
        wait: Duration,
        stream: bool,
        answer: fn() -> Result<Response, Failure>,
    ) -> Result<Response, Failure> {
        let (head, ()) = http::Request::new(()).into_parts();
        let request = Request::new(head, Bytes::new());
        request.exchange.set_target("m".into(), stream);
        let inner = tower::service_fn(move |_: Request| -> ResponseFuture {
            Box::pin(async move {
                sleep(wait).await;
                answer()
            })
        });
        KeepAliveLayer::new(Duration::from_secs(10))
            .layer(inner)
            .call(request)
            .await
    }

    fn answer() -> Result<Response, Failure> {
        Ok(Response::new(Body::stream(futures::stream::iter([Ok(
            Bytes::from_static(b"data: 1\n\n"),
        )]))))
    }

    fn refusal() -> Result<Response, Failure> {
        Err(ApiError::new(ErrorKind::Unavailable, "it would not load").into())
    }

    #[tokio::test(start_paused = true)]
    async fn a_silent_stream_is_kept_alive_and_then_goes_on() {
        let response = ask(Duration::from_secs(25), true, answer)
            .await
            .expect("begins");
        let body = response.into_body().collect(1000).await.expect("goes on");
        assert_eq!(&*body, b": keep-alive\n\n: keep-alive\n\ndata: 1\n\n");
    }

    #[tokio::test(start_paused = true)]
    async fn a_quick_failure_keeps_its_status_and_a_late_one_breaks_the_stream() {
        let quick = ask(Duration::from_secs(1), true, refusal)
            .await
            .expect_err("fails");
        assert_eq!(quick.error.kind, ErrorKind::Unavailable);
        let late = ask(Duration::from_secs(15), true, refusal)
            .await
            .expect("has begun");
        let error = late
            .into_body()
            .collect(1000)
            .await
            .expect_err("then fails");
        assert_eq!(error.kind, ErrorKind::Unavailable);
    }

    #[tokio::test(start_paused = true)]
    async fn a_whole_reply_is_waited_for_in_silence() {
        let response = ask(Duration::from_secs(60), false, answer)
            .await
            .expect("comes");
        let body = response.into_body().collect(1000).await.expect("whole");
        assert_eq!(&*body, b"data: 1\n\n");
    }
}
