//! The only list of filters, outermost first, with a reason each.

use crate::config::Config;
use crate::pingora::upstream::Upstream;
use filters::ask_usage::AskUsageLayer;
use filters::cors::CorsLayer;
use filters::decode::DecodeLayer;
use filters::estimate::EstimateLayer;
use filters::foreign;
use filters::keep_alive::KeepAliveLayer;
use filters::metrics::{Metrics, MetricsLayer, ObserveLayer};
use filters::remember::{RememberLayer, ResponseStore};
use filters::rescue::RescueLayer;
use filters::residency::{Residency, ResidencyLayer};
use filters::resolve::{Catalogue, ResolveLayer};
use filters::retry::{RetryLayer, RetryMetrics};
use filters::route::{RouteLayer, RouteMetrics};
use filters::sampling::SamplingLayer;
use filters::timeout::TimeoutLayer;
use filters::trace::TraceLayer;
use filters::translate::TranslateLayer;
use filters::{Request, Response};
use prometheus::Registry;
use std::convert::Infallible;
use std::sync::Arc;
use tower::ServiceBuilder;
use tower::util::BoxCloneSyncService;

/// What a request passes through.
pub(crate) type Stack = BoxCloneSyncService<Request, Response, Infallible>;

/// What the layers count. Cheap to clone; lives as long as the process.
#[derive(Clone)]
pub(crate) struct StackMetrics {
    pub(crate) exchanges: Metrics,
    retry: RetryMetrics,
    route: RouteMetrics,
}

impl StackMetrics {
    pub(crate) fn new(registry: &Registry) -> Self {
        Self {
            exchanges: Metrics::new(registry),
            retry: RetryMetrics::new(registry),
            route: RouteMetrics::new(registry),
        }
    }
}

/// Builds the stack for one configuration.
pub(crate) fn build(
    config: &Config,
    metrics: &StackMetrics,
    catalogue: Arc<dyn Catalogue>,
    responses: Arc<dyn ResponseStore>,
    residency: Arc<dyn Residency>,
    upstream: Upstream,
) -> Stack {
    let timeouts = &config.timeouts;
    let cors = config.cors.clone();
    let stack = ServiceBuilder::new()
        .layer(TraceLayer) // first: every reply has an id and every exchange its line, whatever happens below
        .layer(MetricsLayer::new(metrics.exchanges.clone())) // above rescue, so that it counts the status the client saw
        .option_layer(cors.map(|cors| CorsLayer::new(cors.origins, cors.max_age))) // above rescue: a page may read refusals too
        .layer(RescueLayer) // above all that can fail: from here up nothing does
        .layer(DecodeLayer::new(config.max_body)) // above all that reads the body
        .layer(ResolveLayer::new(catalogue)) // before anything that costs: no model, no work
        .layer(RememberLayer::new(responses, config.max_body)) // above translation: what it adds is translated like the rest
        .layer(TranslateLayer) // below it there are only chat and text completions
        .layer(AskUsageLayer) // below translation, which asks by itself; above retry, so that a body is changed once
        .layer(KeepAliveLayer::new(timeouts.keep_alive, residency.clone())) // above all that waits, below translation, so that comments become pings
        .layer(EstimateLayer::new(residency.clone())) // above residency, which would load a model just to count
        .layer(ResidencyLayer::new(residency)) // above retry: all attempts share one lease
        .layer(SamplingLayer::new(config.sampling.clone())) // below residency, which has the last word on the model
        .layer(RetryLayer::new(config.retries, metrics.retry.clone())) // above route: each attempt chooses anew
        .layer(RouteLayer::new(
            config.policy.clone(),
            config.routing.clone(),
            metrics.route.clone(),
        )) // counts in flight for exactly one node
        .map_request(foreign::fit) // below route, which knows whom it speaks to
        .layer(TimeoutLayer::new(timeouts.head, timeouts.idle)) // one node's own time, not that of the wait before it
        .layer(ObserveLayer) // sees the node's answer before anybody changes it
        .service(upstream);
    BoxCloneSyncService::new(stack)
}
