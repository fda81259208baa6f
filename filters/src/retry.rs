//! Another node, when one fails before the first byte of its answer.

use crate::{Failure, Request, Response, ResponseFuture};
use std::task::{Context, Poll};
use tower::{Layer, Service};

/// Puts [`Retry`] around a stack.
#[derive(Debug, Clone, Copy)]
pub struct RetryLayer {
    attempts: usize,
}

impl RetryLayer {
    /// Asks at most `attempts` nodes, the first included.
    #[must_use]
    pub fn new(attempts: usize) -> Self {
        Self { attempts }
    }
}

/// Tries other candidates while a failure says that another node may do better.
///
/// A response is final: whatever happens to its body is no longer seen here.
#[derive(Debug, Clone)]
pub struct Retry<S> {
    inner: S,
    attempts: usize,
}

impl<S> Layer<S> for RetryLayer {
    type Service = Retry<S>;

    fn layer(&self, inner: S) -> Retry<S> {
        Retry {
            inner,
            attempts: self.attempts,
        }
    }
}

impl<S> Service<Request> for Retry<S>
where
    S: Service<Request, Response = Response, Error = Failure, Future = ResponseFuture>
        + Clone
        + Send
        + 'static,
{
    type Response = Response;
    type Error = Failure;
    type Future = ResponseFuture;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Failure>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Request) -> Self::Future {
        let attempts = self.attempts.min(request.candidates.len());
        if attempts < 2 {
            return self.inner.call(request);
        }
        let mut inner = self.inner.clone();
        Box::pin(async move {
            let mut left = attempts - 1;
            loop {
                match inner.call(request.clone()).await {
                    Err(failure) if failure.elsewhere && left > 0 => {
                        left -= 1;
                        let node = request.exchange.node();
                        tracing::debug!(id = &*request.exchange.id, node = node.as_deref(), %failure, "asking another node");
                    }
                    answer => return answer,
                }
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Body;
    use crate::route::{self, Candidate};
    use bytes::Bytes;
    use protocol::{ApiError, ErrorKind};
    use std::sync::{Arc, Mutex};

    /// Which nodes are asked when those named in `dead` fail in the way `kind` says.
    async fn asked(dead: &'static [&'static str], elsewhere: bool) -> (Vec<Arc<str>>, bool) {
        let (head, ()) = http::Request::new(()).into_parts();
        let mut request = Request::new(head, Bytes::new());
        request.candidates = ["a", "b", "c"].map(Candidate::example).into();
        let asked = Arc::new(Mutex::new(Vec::new()));
        let seen = asked.clone();
        let upstream = tower::service_fn(move |request: Request| -> ResponseFuture {
            let node = request.endpoint.expect("routed").node.clone();
            seen.lock().expect("one thread").push(node.clone());
            let error = ApiError::new(ErrorKind::BadGateway, "down");
            Box::pin(std::future::ready(if dead.contains(&&*node) {
                Err(Failure { error, elsewhere })
            } else {
                Ok(Response::new(Body::whole("fine")))
            }))
        });
        let policy = route::by_name("round_robin").expect("a policy");
        let mut stack = RetryLayer::new(3).layer(route::RouteLayer::new(policy).layer(upstream));
        let answered = stack.call(request).await.is_ok();
        (asked.lock().expect("one thread").clone(), answered)
    }

    #[tokio::test]
    async fn each_node_is_asked_once_until_one_answers() {
        let (nodes, answered) = asked(&["a", "b"], true).await;
        assert!(answered);
        assert_eq!(nodes.last().map(|node| &**node), Some("c"));
        let mut distinct = nodes.clone();
        distinct.sort();
        distinct.dedup();
        assert_eq!(distinct.len(), nodes.len(), "{nodes:?}");
        assert!(!asked(&["a", "b", "c"], true).await.1);
    }

    #[tokio::test]
    async fn what_is_the_clients_own_fault_is_not_tried_again() {
        let (nodes, answered) = asked(&["a", "b", "c"], false).await;
        assert_eq!((nodes.len(), answered), (1, false));
    }
}
