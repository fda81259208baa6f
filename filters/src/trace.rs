//! Opens nothing and changes nothing: names the request on its reply and writes one line when it is over.

use crate::{Exchange, Request, Response};
use futures::{Stream, StreamExt};
use http::HeaderValue;
use std::convert::Infallible;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use tower::{Layer, Service};

/// Puts [`Trace`] around a stack.
#[derive(Debug, Clone, Copy, Default)]
pub struct TraceLayer;

/// Sets `x-request-id` on each reply and logs one access line when its body has gone.
///
/// It stands above everything, so the services below must not fail: [`crate::rescue`] sees to that.
#[derive(Debug, Clone)]
pub struct Trace<S> {
    inner: S,
}

impl<S> Layer<S> for TraceLayer {
    type Service = Trace<S>;

    fn layer(&self, inner: S) -> Trace<S> {
        Trace { inner }
    }
}

impl<S> Service<Request> for Trace<S>
where
    S: Service<Request, Response = Response, Error = Infallible>,
    S::Future: Send + 'static,
{
    type Response = Response;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Response, Infallible>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Request) -> Self::Future {
        let mut line = AccessLine {
            exchange: request.exchange.clone(),
            method: request.head.method.clone(),
            path: request.head.uri.path().into(),
            status: None,
            ended: false,
        };
        let response = self.inner.call(request);
        Box::pin(async move {
            let Ok(mut response) = response.await;
            line.status = Some(response.status());
            let exchange = &line.exchange;
            let id = HeaderValue::from_str(&exchange.id).expect("ids are printable");
            if let Some(name) = exchange.dialect.request_id_header() {
                response.headers_mut().insert(name, id.clone());
            }
            response
                .headers_mut()
                .insert(protocol::ext::REQUEST_ID_HEADER, id);
            let (head, body) = response.into_parts();
            let body = if body.as_whole().is_some() {
                line.ended = true;
                body.holding(line)
            } else {
                body.map_stream(|body| Watched { body, line })
            };
            Ok(Response::from_parts(head, body))
        })
    }
}

/// A body that knows whether it was read to its end.
struct Watched {
    body: crate::Body,
    line: AccessLine,
}

impl Stream for Watched {
    type Item = <crate::Body as Stream>::Item;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let next = self.body.poll_next_unpin(cx);
        if let Poll::Ready(None) = next {
            self.line.ended = true;
        }
        next
    }
}

/// Written when it is dropped: at the end of the body, or when the client has left.
struct AccessLine {
    exchange: Arc<Exchange>,
    method: http::Method,
    path: Box<str>,
    status: Option<http::StatusCode>,
    ended: bool,
}

impl Drop for AccessLine {
    fn drop(&mut self) {
        if !tracing::enabled!(target: "access", tracing::Level::INFO) {
            return;
        }
        let exchange = &self.exchange;
        let usage = exchange.usage().unwrap_or_default();
        let node = exchange.node();
        // 499 is what the field logs for a client that left before the answer was over
        let status = match self.status {
            Some(status) if self.ended => status.as_u16(),
            _ => 499,
        };
        tracing::info!(
            target: "access",
            id = &*exchange.id,
            method = %self.method,
            path = &*self.path,
            status,
            model = exchange.model(),
            node = node.as_deref().unwrap_or(""),
            tokens_in = usage.prompt_tokens,
            tokens_out = usage.completion_tokens,
            first_token_ms = exchange.time_to_first_token().map(|t| t.as_secs_f64() * 1e3),
            total_ms = exchange.started.elapsed().as_secs_f64() * 1e3,
        );
    }
}
