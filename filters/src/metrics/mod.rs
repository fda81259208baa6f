//! What Prometheus sees of each exchange: families, labels, and the layer that moves them.

use crate::resolve::Route;
use crate::{Exchange, Request, Response};
use http::StatusCode;
use prometheus::core::Collector;
use prometheus::{
    Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts,
    Registry,
};
use std::collections::HashMap;
use std::convert::Infallible;
use std::future::Future;
use std::hash::Hash;
use std::pin::Pin;
use std::sync::{Arc, PoisonError, RwLock};
use std::task::{Context, Poll};
use tower::{Layer, Service};

mod observe;

pub use observe::{Observe, ObserveLayer};

/// Seconds, from a cache hit to a long answer.
const SECONDS: [f64; 14] = [
    0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0,
];
/// Tokens per second of one answer.
const RATES: [f64; 10] = [1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0];

/// The families of the gateway's exchanges. Cheap to clone; lives as long as the process.
#[derive(Clone)]
pub struct Metrics {
    families: Arc<Families>,
}

struct Families {
    requests: IntCounterVec,
    in_flight: IntGaugeVec,
    latency: HistogramVec,
    first_token: HistogramVec,
    rate: HistogramVec,
    prompt_tokens: IntCounterVec,
    cached_tokens: IntCounterVec,
    generation_tokens: IntCounterVec,
    by_route: Handles<Route, IntGauge>,
    by_status: Handles<(Route, StatusCode), IntCounter>,
    served: Handles<(Arc<str>, Arc<str>), Arc<Served>>,
}

/// What labels stand for, so that a request does not put them together again.
struct Handles<K, H>(RwLock<HashMap<K, H>>);

impl<K, H> Default for Handles<K, H> {
    fn default() -> Self {
        Self(RwLock::default())
    }
}

impl<K: Eq + Hash, H: Clone> Handles<K, H> {
    fn get(&self, key: K, make: impl FnOnce(&K) -> H) -> H {
        let known = self.0.read().unwrap_or_else(PoisonError::into_inner);
        if let Some(handle) = known.get(&key) {
            return handle.clone();
        }
        drop(known);
        let handle = make(&key);
        let mut all = self.0.write().unwrap_or_else(PoisonError::into_inner);
        all.insert(key, handle.clone());
        handle
    }
}

/// The families of one model on one node.
struct Served {
    latency: Histogram,
    first_token: Histogram,
    rate: Histogram,
    prompt_tokens: IntCounter,
    cached_tokens: IntCounter,
    generation_tokens: IntCounter,
}

impl Metrics {
    /// Makes the families and enters them in `registry`.
    ///
    /// # Panics
    /// If `registry` already has one of them.
    #[must_use]
    pub fn new(registry: &Registry) -> Self {
        fn enter<C: Collector + Clone + 'static>(
            registry: &Registry,
            family: prometheus::Result<C>,
        ) -> C {
            let family = family.expect("names and labels are constants");
            registry
                .register(Box::new(family.clone()))
                .expect("each family is entered once");
            family
        }
        let counter = |name, help, labels: &[&str]| {
            enter(registry, IntCounterVec::new(Opts::new(name, help), labels))
        };
        let histogram = |name, help, buckets: &[f64]| {
            let opts = HistogramOpts::new(name, help).buckets(buckets.to_vec());
            enter(registry, HistogramVec::new(opts, &["model", "node"]))
        };
        let served = &["model", "node"];
        Self {
            families: Arc::new(Families {
                requests: counter(
                    "cortex_requests_total",
                    "Requests answered, by route and status; 499 is a client that left",
                    &["route", "status"],
                ),
                in_flight: enter(
                    registry,
                    IntGaugeVec::new(
                        Opts::new("cortex_requests_in_flight", "Requests being answered"),
                        &["route"],
                    ),
                ),
                latency: histogram(
                    "cortex_e2e_request_latency_seconds",
                    "From the request's head to the last byte of its answer",
                    &SECONDS,
                ),
                first_token: histogram(
                    "cortex_time_to_first_token_seconds",
                    "From the request's head to the first piece of a streamed answer",
                    &SECONDS,
                ),
                rate: histogram(
                    "cortex_request_generation_tokens_per_second",
                    "Tokens of an answer over the time it took from its first token on (whole answers: from the request)",
                    &RATES,
                ),
                prompt_tokens: counter(
                    "cortex_prompt_tokens_total",
                    "Prompt tokens, as nodes report them",
                    served,
                ),
                cached_tokens: counter(
                    "cortex_cached_prompt_tokens_total",
                    "Prompt tokens that came from a node's cache, as nodes report them",
                    served,
                ),
                generation_tokens: counter(
                    "cortex_generation_tokens_total",
                    "Generated tokens, as nodes report them",
                    served,
                ),
                by_route: Handles::default(),
                by_status: Handles::default(),
                served: Handles::default(),
            }),
        }
    }

    /// Requests being answered now.
    #[must_use]
    pub fn in_flight(&self) -> i64 {
        self.families
            .in_flight
            .collect()
            .iter()
            .flat_map(|family| family.get_metric())
            .map(|metric| metric.get_gauge().get_value() as i64)
            .sum()
    }

    fn served(&self, model: &Arc<str>, node: &Arc<str>) -> Arc<Served> {
        let families = &self.families;
        let key = (model.clone(), node.clone());
        families.served.get(key, |(model, node)| {
            let labels: &[&str] = &[model, node];
            Arc::new(Served {
                latency: families.latency.with_label_values(labels),
                first_token: families.first_token.with_label_values(labels),
                rate: families.rate.with_label_values(labels),
                prompt_tokens: families.prompt_tokens.with_label_values(labels),
                cached_tokens: families.cached_tokens.with_label_values(labels),
                generation_tokens: families.generation_tokens.with_label_values(labels),
            })
        })
    }
}

/// Puts [`Metered`] around a stack.
#[derive(Clone)]
pub struct MetricsLayer {
    metrics: Metrics,
}

impl MetricsLayer {
    /// Moves `metrics`.
    #[must_use]
    pub fn new(metrics: Metrics) -> Self {
        Self { metrics }
    }
}

/// What the field counts where no answer got through.
const CLIENT_LEFT: StatusCode = match StatusCode::from_u16(499) {
    Ok(status) => status,
    Err(_) => unreachable!(),
};

/// Counts each exchange when its body has gone, with what the layers below learnt about it.
#[derive(Clone)]
pub struct Metered<S> {
    inner: S,
    metrics: Metrics,
}

impl<S> Layer<S> for MetricsLayer {
    type Service = Metered<S>;

    fn layer(&self, inner: S) -> Metered<S> {
        Metered {
            inner,
            metrics: self.metrics.clone(),
        }
    }
}

impl<S> Service<Request> for Metered<S>
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
        let mut record = Record::open(self.metrics.clone(), request.exchange.clone());
        let response = self.inner.call(request);
        Box::pin(async move {
            let Ok(response) = response.await;
            record.status = Some(response.status());
            Ok(response.map(|body| body.holding(record)))
        })
    }
}

/// One exchange being counted; entered when dropped.
struct Record {
    metrics: Metrics,
    exchange: Arc<Exchange>,
    in_flight: IntGauge,
    status: Option<StatusCode>,
}

impl Record {
    fn open(metrics: Metrics, exchange: Arc<Exchange>) -> Self {
        let families = &metrics.families;
        let in_flight = families.by_route.get(exchange.route, |route| {
            families.in_flight.with_label_values(&[route.name()])
        });
        in_flight.inc();
        Self {
            metrics,
            exchange,
            in_flight,
            status: None,
        }
    }
}

impl Drop for Record {
    fn drop(&mut self) {
        self.in_flight.dec();
        let exchange = &self.exchange;
        let families = &self.metrics.families;
        let answered = (exchange.route, self.status.unwrap_or(CLIENT_LEFT));
        let answered = families.by_status.get(answered, |(route, status)| {
            families
                .requests
                .with_label_values(&[route.name(), status.as_str()])
        });
        answered.inc();
        let (Some(target), Some(node)) = (exchange.target(), exchange.node()) else {
            return;
        };
        if exchange.route == Route::CountTokens {
            return; // nothing was generated, so it says nothing of how quick that is
        }
        let served = self.metrics.served(&target.model, &node);
        let total = exchange.started.elapsed();
        served.latency.observe(total.as_secs_f64());
        let first = exchange.time_to_first_token();
        if let Some(first) = first {
            served.first_token.observe(first.as_secs_f64());
        }
        if let Some(usage) = exchange.usage() {
            served.prompt_tokens.inc_by(usage.prompt_tokens);
            served.cached_tokens.inc_by(usage.cached_tokens());
            served.generation_tokens.inc_by(usage.completion_tokens);
            let writing = total - first.unwrap_or_default();
            if usage.completion_tokens > 0 && !writing.is_zero() {
                served
                    .rate
                    .observe(usage.completion_tokens as f64 / writing.as_secs_f64());
            }
        }
    }
}
