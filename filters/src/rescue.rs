//! Any failure becomes a reply in the caller's dialect, also when the stream has already begun.

use crate::{Body, Exchange, Failure, Request, Response};
use bytes::Bytes;
use futures::{Stream, StreamExt};
use http::{HeaderValue, header};
use protocol::{ApiError, ErrorKind};
use std::convert::Infallible;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;
use tower::{Layer, Service};

/// When to come back, where nobody knows better.
const SOON: Duration = Duration::from_secs(1);

/// Puts [`Rescue`] around a stack.
#[derive(Debug, Clone, Copy, Default)]
pub struct RescueLayer;

/// The only place that makes HTTP of an error, and the one that logs its cause.
#[derive(Debug, Clone)]
pub struct Rescue<S> {
    inner: S,
}

impl<S> Layer<S> for RescueLayer {
    type Service = Rescue<S>;

    fn layer(&self, inner: S) -> Rescue<S> {
        Rescue { inner }
    }
}

impl<S> Service<Request> for Rescue<S>
where
    S: Service<Request, Response = Response, Error = Failure>,
    S::Future: Send + 'static,
{
    type Response = Response;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Response, Infallible>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(())) // the layers of this stack are always ready; limits answer, they do not block
    }

    fn call(&mut self, request: Request) -> Self::Future {
        let exchange = request.exchange.clone();
        let response = self.inner.call(request);
        Box::pin(async move {
            Ok(match response.await {
                Ok(response) => response.map(|body| {
                    body.map_stream(|body| Guarded {
                        body: Some(body),
                        exchange,
                    })
                }),
                Err(failure) => {
                    log(&exchange, &failure.error, false);
                    reply(&exchange, &failure.error)
                }
            })
        })
    }
}

/// The reply that tells the client of `error`, in the dialect of its path.
fn reply(exchange: &Exchange, error: &ApiError) -> Response {
    let mut response = Response::new(Body::whole(exchange.dialect.error(error, &exchange.id)));
    *response.status_mut() = http::StatusCode::from_u16(exchange.dialect.status(error))
        .unwrap_or(http::StatusCode::INTERNAL_SERVER_ERROR);
    let headers = response.headers_mut();
    headers.insert(
        header::CONTENT_TYPE,
        HeaderValue::from_static("application/json"),
    );
    let busy = matches!(error.kind, ErrorKind::RateLimited | ErrorKind::Unavailable);
    // who is busy says when to come back, also where nobody knows better than soon
    if let Some(after) = error.retry_after.or(busy.then_some(SOON)) {
        headers.insert(header::RETRY_AFTER, after.as_secs().max(1).into());
    }
    if let Some(instead) = error.allow {
        let name = match error.kind {
            ErrorKind::UnsupportedMediaType => header::ACCEPT_ENCODING,
            _ => header::ALLOW,
        };
        headers.insert(name, HeaderValue::from_static(instead));
    }
    response
}

/// A streamed body whose failure is told as an event, after which it ends.
struct Guarded {
    body: Option<Body>,
    exchange: Arc<Exchange>,
}

impl Stream for Guarded {
    type Item = Result<Bytes, ApiError>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let Some(body) = self.body.as_mut() else {
            return Poll::Ready(None);
        };
        let next = ready!(body.poll_next_unpin(cx));
        Poll::Ready(match next {
            Some(Err(error)) => {
                log(&self.exchange, &error, true);
                self.body = None;
                let exchange = &self.exchange;
                let event = exchange.dialect.error_event(&error, &exchange.id);
                (!event.is_empty()).then_some(Ok(event))
            }
            other => other,
        })
    }
}

/// Faults of ours and of nodes are worth a warning; those of clients are told to the client alone.
fn log(exchange: &Exchange, error: &ApiError, midstream: bool) {
    if error.status() < 500 {
        return tracing::debug!(id = &*exchange.id, %error, midstream, "request refused");
    }
    let node = exchange.node();
    tracing::warn!(
        id = &*exchange.id,
        model = exchange.model(),
        node = node.as_deref().unwrap_or(""),
        %error,
        cause = error.source.as_ref().map(|cause| cause.to_string()),
        midstream,
        "request failed",
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    fn service(
        make: impl Fn() -> Result<Response, Failure> + Clone + Send + 'static,
    ) -> impl Service<Request, Response = Response, Error = Infallible> {
        RescueLayer.layer(tower::service_fn(move |_: Request| {
            let made = make();
            async move { made }
        }))
    }

    async fn ask(
        path: &str,
        make: impl Fn() -> Result<Response, Failure> + Clone + Send + 'static,
    ) -> (u16, String) {
        let (head, ()) = http::Request::builder()
            .uri(path)
            .body(())
            .expect("a valid head")
            .into_parts();
        let request = Request::new(head, Bytes::new());
        let Ok(response) = service(make).call(request).await;
        let status = response.status().as_u16();
        let body = response
            .into_body()
            .collect(1 << 20)
            .await
            .expect("rescued bodies do not fail");
        (status, String::from_utf8_lossy(&body).into_owned())
    }

    #[tokio::test]
    async fn an_error_is_spelt_in_the_dialect_of_the_path() {
        let make = || Err(ApiError::new(ErrorKind::Unavailable, "no node has it").into());
        let (status, body) = ask("/v1/chat/completions", make).await;
        assert_eq!(status, 503);
        assert!(
            body.starts_with(r#"{"error":{"message":"no node has it","type":"server_error""#),
            "{body}"
        );
        let (status, body) = ask("/v1/messages", make).await;
        assert_eq!(
            status, 529,
            "Anthropic's clients know an overloaded server by 529"
        );
        assert!(body.contains(r#""type":"overloaded_error""#), "{body}");
    }

    #[tokio::test]
    async fn a_stream_that_breaks_ends_with_an_error_event() {
        let make = || {
            Ok(Response::new(Body::stream(futures::stream::iter([
                Ok(Bytes::from_static(b"data: 1\n\n")),
                Err(ApiError::new(ErrorKind::BadGateway, "the node died")),
                Ok(Bytes::from_static(b"data: never\n\n")),
            ]))))
        };
        let (_, body) = ask("/v1/chat/completions", make).await;
        assert!(
            body.starts_with("data: 1\n\ndata: {\"error\":{\"message\":\"the node died\""),
            "{body}"
        );
        assert!(
            !body.contains("never") && !body.contains("[DONE]"),
            "{body}"
        );
        let (_, body) = ask("/v1/messages", make).await;
        assert!(
            body.contains("event: error\ndata: {\"type\":\"error\""),
            "{body}"
        );
    }
}
