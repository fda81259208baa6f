//! How long a node may take: to begin its answer, and between two pieces of it.

use crate::{Body, Exchange, Failure, Request, Response, ResponseFuture};
use bytes::Bytes;
use futures::{Stream, StreamExt};
use protocol::{ApiError, ErrorKind};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::time::{Instant, Sleep, sleep, timeout};
use tower::{Layer, Service};

/// Puts [`Timeout`] around a stack.
#[derive(Debug, Clone, Copy)]
pub struct TimeoutLayer {
    head: Duration,
    idle: Duration,
}

impl TimeoutLayer {
    /// `head` until the answer begins (for a whole reply, until it is there), `idle` between two pieces of a stream.
    #[must_use]
    pub fn new(head: Duration, idle: Duration) -> Self {
        Self { head, idle }
    }
}

/// Gives up on a node that has gone quiet.
#[derive(Debug, Clone)]
pub struct Timeout<S> {
    inner: S,
    limits: TimeoutLayer,
}

impl<S> Layer<S> for TimeoutLayer {
    type Service = Timeout<S>;

    fn layer(&self, inner: S) -> Timeout<S> {
        Timeout {
            inner,
            limits: *self,
        }
    }
}

impl<S> Service<Request> for Timeout<S>
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
        let TimeoutLayer { head, idle } = self.limits;
        let exchange = request.exchange.clone();
        let response = self.inner.call(request);
        Box::pin(async move {
            // not retried elsewhere: the node may be working on it, and so would the next one be
            let response = timeout(head, response).await.map_err(|_| {
                late(format!(
                    "the node did not begin its answer within {} s",
                    head.as_secs()
                ))
            })??;
            Ok(response.map(|body| {
                body.map_stream(|body| Paced {
                    body,
                    idle,
                    timer: None,
                    exchange,
                })
            }))
        })
    }
}

fn late(message: String) -> ApiError {
    ApiError::new(ErrorKind::GatewayTimeout, message)
}

/// A body that fails when it has been silent for too long.
struct Paced {
    body: Body,
    idle: Duration,
    /// Made at the first wait, pushed back at the later ones.
    timer: Option<Pin<Box<Sleep>>>,
    /// Told when the answer does not end well.
    exchange: Arc<Exchange>,
}

impl Stream for Paced {
    type Item = Result<Bytes, ApiError>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = &mut *self;
        if let Poll::Ready(next) = this.body.poll_next_unpin(cx) {
            if let Some(timer) = &mut this.timer {
                timer.as_mut().reset(Instant::now() + this.idle);
            }
            if let Some(Err(_)) = &next {
                this.exchange.mark_torn();
            }
            return Poll::Ready(next);
        }
        let timer = this.timer.get_or_insert_with(|| Box::pin(sleep(this.idle)));
        timer.as_mut().poll(cx).map(|()| {
            timer.as_mut().reset(Instant::now() + this.idle);
            this.exchange.mark_torn();
            Some(Err(late(format!(
                "the node was silent for {} s",
                this.idle.as_secs()
            ))))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn ask(head: u64, gaps: &'static [u64]) -> Result<usize, ApiError> {
        let (parts, ()) = http::Request::new(()).into_parts();
        let inner = tower::service_fn(move |_: Request| -> ResponseFuture {
            Box::pin(async move {
                sleep(Duration::from_secs(head)).await;
                let pieces = futures::stream::iter(gaps).then(|gap| async move {
                    sleep(Duration::from_secs(*gap)).await;
                    Ok(Bytes::from_static(b"x"))
                });
                Ok(Response::new(Body::stream(pieces)))
            })
        });
        let limits = TimeoutLayer::new(Duration::from_secs(60), Duration::from_secs(10));
        let response = limits
            .layer(inner)
            .call(Request::new(parts, Bytes::new()))
            .await;
        Ok(response
            .map_err(|failure| failure.error)?
            .into_body()
            .collect(100)
            .await?
            .len())
    }

    #[tokio::test(start_paused = true)]
    async fn a_node_may_be_slow_but_not_silent() {
        assert_eq!(ask(59, &[9, 9, 9]).await.expect("in time"), 3);
        assert_eq!(
            ask(61, &[]).await.expect_err("late").kind,
            ErrorKind::GatewayTimeout
        );
        assert_eq!(
            ask(1, &[9, 11]).await.expect_err("silent").kind,
            ErrorKind::GatewayTimeout
        );
    }
}
