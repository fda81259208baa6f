//! Another node, when one fails before the first byte of its answer.

use crate::{Failure, Request, Response, ResponseFuture};
use prometheus::{IntCounter, IntCounterVec, Opts, Registry};
use rand::Rng;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::time::sleep;
use tower::{Layer, Service};

/// A retry costs this much of the budget.
const RETRY: i64 = 1000;
/// Retries that the budget holds at most.
const FULL: i64 = 100;

/// How often and when another node is asked.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Retries {
    /// Nodes asked for one request, the first included.
    pub attempts: usize,
    /// Retries to a request over many; beyond it failures are told as they are. A burst of 100 is free.
    pub budget: f64,
    /// Longest wait before the first retry; doubled for each further one. The wait itself is drawn by chance.
    pub backoff: Duration,
}

/// Counts of retries. Cheap to clone; lives as long as the process.
#[derive(Clone)]
pub struct RetryMetrics {
    made: IntCounter,
    unaffordable: IntCounter,
}

impl RetryMetrics {
    /// Makes the family and enters it in `registry`.
    ///
    /// # Panics
    /// If `registry` already has it.
    #[must_use]
    pub fn new(registry: &Registry) -> Self {
        let opts = Opts::new(
            "cortex_retries_total",
            "Failures that another node might have mended: asked, or left for want of budget",
        );
        let family = IntCounterVec::new(opts, &["outcome"]).expect("name and label are constants");
        registry
            .register(Box::new(family.clone()))
            .expect("entered once");
        Self {
            made: family.with_label_values(&["made"]),
            unaffordable: family.with_label_values(&["over_budget"]),
        }
    }
}

/// Puts [`Retry`] around a stack.
#[derive(Clone)]
pub struct RetryLayer {
    retries: Retries,
    budget: Arc<Budget>,
    metrics: RetryMetrics,
}

impl RetryLayer {
    /// Retries as `retries` says; all services of one layer share its budget.
    #[must_use]
    pub fn new(retries: Retries, metrics: RetryMetrics) -> Self {
        let budget = Arc::new(Budget {
            left: AtomicI64::new(FULL * RETRY),
            share: (retries.budget * RETRY as f64) as i64,
        });
        Self {
            retries,
            budget,
            metrics,
        }
    }
}

/// What retries may cost: each request pays in a little, each retry takes one out. When everything fails, requests are
/// so not multiplied.
struct Budget {
    left: AtomicI64,
    share: i64,
}

impl Budget {
    fn pay_in(&self) {
        // full is the usual case, and then nothing is written
        if self.left.load(Ordering::Relaxed) < FULL * RETRY {
            self.left.fetch_add(self.share, Ordering::Relaxed);
        }
    }

    fn take(&self) -> bool {
        let affordable = self.left.fetch_sub(RETRY, Ordering::Relaxed) >= RETRY;
        if !affordable {
            self.left.fetch_add(RETRY, Ordering::Relaxed);
        }
        affordable
    }
}

/// Tries other candidates while a failure says that another node may do better.
///
/// A response is final: whatever happens to its body is no longer seen here.
#[derive(Clone)]
pub struct Retry<S> {
    inner: S,
    shared: RetryLayer,
}

impl<S> Layer<S> for RetryLayer {
    type Service = Retry<S>;

    fn layer(&self, inner: S) -> Retry<S> {
        Retry {
            inner,
            shared: self.clone(),
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
        self.shared.budget.pay_in();
        let attempts = self.shared.retries.attempts.min(request.candidates.len());
        if attempts < 2 {
            return self.inner.call(request);
        }
        let mut inner = self.inner.clone();
        let shared = self.shared.clone();
        Box::pin(async move {
            let mut made = 0;
            loop {
                match inner.call(request.clone()).await {
                    Err(failure) if failure.elsewhere && made + 1 < attempts => {
                        if !shared.budget.take() {
                            shared.metrics.unaffordable.inc();
                            return Err(failure);
                        }
                        shared.metrics.made.inc();
                        let node = request.exchange.node();
                        tracing::debug!(id = &*request.exchange.id, node = node.as_deref(), %failure, "asking another node");
                        let longest = shared.retries.backoff * (1 << made.min(8));
                        let share = rand::rng().random_range(0.0..1.0);
                        sleep(longest.mul_f64(share)).await;
                        made += 1;
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
    use std::sync::Mutex;

    const RETRIES: Retries = Retries {
        attempts: 3,
        budget: 0.2,
        backoff: Duration::from_millis(25),
    };

    fn layer() -> RetryLayer {
        RetryLayer::new(RETRIES, RetryMetrics::new(&Registry::new()))
    }

    /// Which nodes are asked when those named in `dead` fail in the way `elsewhere` says.
    async fn asked(
        layer: &RetryLayer,
        dead: &'static [&'static str],
        elsewhere: bool,
    ) -> (Vec<Arc<str>>, bool) {
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
        let routing = route::example_routing("round_robin");
        let policy = routing.policy().expect("a policy");
        let metrics = route::RouteMetrics::new(&Registry::new());
        let route = route::RouteLayer::new(policy, routing, metrics);
        let answered = layer.layer(route.layer(upstream)).call(request).await;
        let nodes = asked.lock().expect("one thread").clone();
        (nodes, answered.is_ok())
    }

    #[tokio::test(start_paused = true)]
    async fn each_node_is_asked_once_until_one_answers() {
        let (nodes, answered) = asked(&layer(), &["a", "b"], true).await;
        assert!(answered);
        assert_eq!(nodes.last().map(|node| &**node), Some("c"));
        let mut distinct = nodes.clone();
        distinct.sort();
        distinct.dedup();
        assert_eq!(distinct.len(), nodes.len(), "{nodes:?}");
        assert!(!asked(&layer(), &["a", "b", "c"], true).await.1);
    }

    #[tokio::test]
    async fn what_is_the_clients_own_fault_is_not_tried_again() {
        let (nodes, answered) = asked(&layer(), &["a", "b", "c"], false).await;
        assert_eq!((nodes.len(), answered), (1, false));
    }

    #[tokio::test(start_paused = true)]
    async fn retries_end_with_their_budget_and_requests_pay_for_new_ones() {
        let layer = layer();
        let mut attempts = 0;
        for _ in 0..1000 {
            attempts += asked(&layer, &["a", "b", "c"], true).await.0.len();
        }
        let retries = attempts - 1000;
        assert!((295..=300).contains(&retries), "{retries}");
        assert!(layer.metrics.unaffordable.get() > 0);
        assert_eq!(layer.metrics.made.get(), retries as u64);
        for _ in 0..5000 {
            asked(&layer, &[], true).await;
        }
        let full = layer.budget.left.load(Ordering::Relaxed);
        assert!((FULL * RETRY..=FULL * RETRY + RETRY).contains(&full));
    }
}
