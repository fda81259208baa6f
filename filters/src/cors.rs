//! Lets pages of other origins talk to the gateway, where the configuration says so.

use crate::{Body, Request, Response};
use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Method, StatusCode, header};
use std::convert::Infallible;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;
use tower::{Layer, Service};

/// Headers of an answer that a page may read.
const EXPOSED: &str = "x-request-id, request-id, retry-after, x-cortex-node, x-cortex-estimated, x-prompt-tokens, x-unknown-fields";

/// Puts [`Cors`] around a stack.
#[derive(Debug, Clone)]
pub struct CorsLayer {
    origins: Arc<[HeaderValue]>,
    max_age: HeaderValue,
}

impl CorsLayer {
    /// Lets pages of `origins` in; `*` is every one. A browser may keep a permission for `max_age`.
    #[must_use]
    pub fn new(origins: Arc<[HeaderValue]>, max_age: Duration) -> Self {
        Self {
            origins,
            max_age: max_age.as_secs().into(),
        }
    }

    /// What to call the origin of a request in its answer, if it may come in.
    fn allow(&self, headers: &HeaderMap) -> Option<HeaderValue> {
        let origin = headers.get(header::ORIGIN)?;
        let any = |allowed: &&HeaderValue| *allowed == "*" || *allowed == origin;
        self.origins.iter().find(any).cloned()
    }
}

/// Answers preflights and marks answers. Credentials of browsers are not asked for: keys travel in headers here.
#[derive(Debug, Clone)]
pub struct Cors<S> {
    inner: S,
    layer: CorsLayer,
}

impl<S> Layer<S> for CorsLayer {
    type Service = Cors<S>;

    fn layer(&self, inner: S) -> Cors<S> {
        Cors {
            inner,
            layer: self.clone(),
        }
    }
}

impl<S> Service<Request> for Cors<S>
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
        let Some(origin) = self.layer.allow(&request.head.headers) else {
            return Box::pin(self.inner.call(request));
        };
        let asked = &request.head.headers;
        if request.head.method == Method::OPTIONS
            && asked.contains_key(header::ACCESS_CONTROL_REQUEST_METHOD)
        {
            let mut response = Response::new(Body::whole(Bytes::new()));
            *response.status_mut() = StatusCode::NO_CONTENT;
            let headers = response.headers_mut();
            headers.insert(
                header::ACCESS_CONTROL_ALLOW_METHODS,
                HeaderValue::from_static("GET, HEAD, POST, DELETE, OPTIONS"),
            );
            // clients of these APIs send many headers of their own, and none of them is a secret of ours
            if let Some(wanted) = asked.get(header::ACCESS_CONTROL_REQUEST_HEADERS) {
                headers.insert(header::ACCESS_CONTROL_ALLOW_HEADERS, wanted.clone());
            }
            headers.insert(header::ACCESS_CONTROL_MAX_AGE, self.layer.max_age.clone());
            mark(headers, origin);
            return Box::pin(std::future::ready(Ok(response)));
        }
        let response = self.inner.call(request);
        Box::pin(async move {
            let Ok(mut response) = response.await;
            let headers = response.headers_mut();
            headers.insert(
                header::ACCESS_CONTROL_EXPOSE_HEADERS,
                HeaderValue::from_static(EXPOSED),
            );
            mark(headers, origin);
            Ok(response)
        })
    }
}

fn mark(headers: &mut HeaderMap, origin: HeaderValue) {
    if origin != "*" {
        headers.insert(header::VARY, HeaderValue::from_static("origin"));
    }
    headers.insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, origin);
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn ask(origins: &[&'static str], origin: &str, preflight: bool) -> Response {
        let mut head = http::Request::builder()
            .uri("/v1/models")
            .header("origin", origin);
        if preflight {
            head = head
                .method("OPTIONS")
                .header("access-control-request-method", "POST")
                .header("access-control-request-headers", "authorization,x-api-key");
        }
        let (head, ()) = head.body(()).expect("a valid head").into_parts();
        let inner = tower::service_fn(|_: Request| async {
            Ok::<_, Infallible>(Response::new(Body::whole("inner")))
        });
        let origins = origins
            .iter()
            .copied()
            .map(HeaderValue::from_static)
            .collect();
        CorsLayer::new(origins, Duration::from_secs(600))
            .layer(inner)
            .call(Request::new(head, Bytes::new()))
            .await
            .expect("cannot fail")
    }

    #[tokio::test]
    async fn a_preflight_is_answered_and_an_answer_marked_for_origins_that_may_come_in() {
        let preflight = ask(&["https://a"], "https://a", true).await;
        assert_eq!(preflight.status(), StatusCode::NO_CONTENT);
        let headers = preflight.headers();
        assert_eq!(headers["access-control-allow-origin"], "https://a");
        assert_eq!(
            headers["access-control-allow-headers"],
            "authorization,x-api-key"
        );
        assert_eq!(
            (&headers["access-control-max-age"], &headers["vary"]),
            (
                &"600".parse().expect("fine"),
                &"origin".parse().expect("fine")
            )
        );
        let answer = ask(&["*"], "https://b", false).await;
        assert_eq!(answer.headers()["access-control-allow-origin"], "*");
        assert!(
            answer
                .headers()
                .contains_key("access-control-expose-headers")
        );
    }

    #[tokio::test]
    async fn other_origins_get_no_permission() {
        for preflight in [true, false] {
            let answer = ask(&["https://a"], "https://b", preflight).await;
            assert!(!answer.headers().contains_key("access-control-allow-origin"));
            assert_eq!(answer.status(), StatusCode::OK, "it passed on");
        }
    }
}
