//! The HTTP API: every route in one list. Checks and refuses; knows no tensor.

mod body;
mod chat;
mod completions;
mod embeddings;
mod failure;
mod fields;
mod generation;
mod grammar;
mod health;
mod models;
mod running;
mod scores;
mod sse;
mod tokenize;

#[cfg(test)]
mod tests;

use crate::config::Limits;
use crate::residency::Residency;
use axum::Router;
use axum::extract::{MatchedPath, Request, State};
use axum::http::{HeaderName, HeaderValue};
use axum::middleware::{self, Next};
use axum::response::Response;
use axum::routing::{delete, get, post};
use failure::{Failure, Logged};
use prometheus::{IntCounter, IntCounterVec, Opts, Registry};
use protocol::ext::REQUEST_ID_HEADER;
use protocol::{ApiError, ErrorKind};
pub use running::Running;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

/// What the handlers share.
pub struct ApiState {
    /// The host's name.
    pub name: String,
    /// The models.
    pub residency: Residency,
    /// Bounds on requests.
    pub limits: Limits,
    /// Ids of the models loaded at start: readiness waits for them.
    pub at_start: Vec<String>,
    /// Requests that run, to be cancelled by id.
    pub running: Running,
    /// Set when the daemon is stopping: not ready any more.
    pub stopping: AtomicBool,
    /// Everything `GET /metrics` shows.
    pub registry: Registry,
    /// What the API itself counts.
    pub metrics: ApiMetrics,
}

/// What the API itself counts.
pub struct ApiMetrics {
    requests: IntCounterVec,
    unknown_fields: IntCounter,
}

impl ApiMetrics {
    /// Registers the families.
    ///
    /// # Panics
    /// When they are registered twice in one registry.
    #[must_use]
    pub fn register(registry: &Registry) -> Self {
        let requests = Opts::new("neuron_http_requests_total", "HTTP requests answered.");
        let requests = IntCounterVec::new(requests, &["route", "status"])
            .expect("names and labels are valid constants");
        let unknown_fields = IntCounter::new(
            "neuron_unknown_request_fields_total",
            "Request fields that were accepted without being known.",
        )
        .expect("the name is a valid constant");
        registry
            .register(Box::new(requests.clone()))
            .and_then(|()| registry.register(Box::new(unknown_fields.clone())))
            .expect("each family is registered once");
        Self {
            requests,
            unknown_fields,
        }
    }
}

/// The whole API.
pub fn router(state: Arc<ApiState>) -> Router {
    Router::new()
        .route("/v1/chat/completions", post(chat::complete))
        .route("/v1/completions", post(completions::complete))
        .route("/v1/embeddings", post(embeddings::refuse))
        .route("/tokenize", post(tokenize::tokenize))
        .route("/detokenize", post(tokenize::detokenize))
        .route("/apply-template", post(tokenize::apply_template))
        .route("/requests/{*id}", delete(running::cancel))
        .route("/v1/models", get(models::cards))
        .route("/v1/models/{*id}", get(models::card))
        .route("/models", get(models::statuses))
        .route("/models/load", post(models::load))
        .route("/models/unload", post(models::unload))
        .route("/models/{*id}", get(models::status))
        .route("/discovery", get(health::discovery))
        .route("/health/live", get(health::live))
        .route("/health/ready", get(health::ready))
        .route("/metrics", get(health::metrics))
        .fallback(unknown_path)
        .method_not_allowed_fallback(wrong_method)
        .layer(middleware::from_fn_with_state(state.clone(), observe))
        .with_state(state)
}

async fn unknown_path(request: Request) -> Failure {
    let message = format!("there is no path {} here", request.uri().path());
    Failure(ApiError::new(ErrorKind::NotFound, message))
}

async fn wrong_method(request: Request) -> Failure {
    let message = format!(
        "{} does not take {}; the Allow header lists what it takes",
        request.uri().path(),
        request.method()
    );
    Failure(ApiError::new(ErrorKind::MethodNotAllowed, message))
}

/// The id a request is logged under, on every hop.
#[derive(Debug, Clone)]
struct RequestId(String);

/// Outermost: names the request, counts it, and logs what failed with its cause.
async fn observe(State(state): State<Arc<ApiState>>, mut request: Request, next: Next) -> Response {
    let id = request
        .headers()
        .get(REQUEST_ID_HEADER)
        .and_then(|id| id.to_str().ok())
        .filter(|id| {
            (1..=128).contains(&id.len()) && id.bytes().all(|byte| byte.is_ascii_graphic())
        })
        .map_or_else(
            || format!("req-{:016x}", rand::random::<u64>()),
            str::to_owned,
        );
    request.extensions_mut().insert(RequestId(id.clone()));
    let route = request.extensions().get::<MatchedPath>();
    let route = route.map_or("none", MatchedPath::as_str).to_owned();
    let mut response = next.run(request).await;
    let status = response.status();
    state
        .metrics
        .requests
        .with_label_values(&[route.as_str(), status.as_str()])
        .inc();
    if let Some(Logged(error)) = response.extensions_mut().remove() {
        let cause = error.source.as_ref().map(ToString::to_string);
        if status.is_server_error() {
            tracing::warn!(request = id, route, status = status.as_u16(), %error, cause, "refused");
        } else {
            tracing::info!(request = id, route, status = status.as_u16(), %error, cause, "refused");
        }
    }
    if let Ok(id) = HeaderValue::from_str(&id) {
        let name = HeaderName::from_static(REQUEST_ID_HEADER);
        response.headers_mut().insert(name, id);
    }
    response
}
