//! What the second listener answers: health, metrics, and the fleet as a person or a script wants to see it.

use crate::app::App;
use crate::fleet::Health;
use http::{Method, Response, StatusCode, header};
use prometheus::{Encoder, TextEncoder};
use protocol::node::{DeviceInfo, ModelStatus};
use protocol::{ApiError, ErrorKind};
use serde::{Deserialize, Serialize};
use std::net::IpAddr;
use std::sync::atomic::Ordering;

/// The reply of `GET /status`.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Status {
    pub(crate) version: String,
    /// Requests being answered by this gateway.
    pub(crate) in_flight: i64,
    pub(crate) nodes: Vec<NodeStatus>,
}

/// One node of [`Status`].
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct NodeStatus {
    pub(crate) name: String,
    pub(crate) address: Option<String>,
    /// `up`, `down` or `unknown`.
    pub(crate) health: String,
    pub(crate) reason: Option<String>,
    pub(crate) version: String,
    /// Requests this gateway has there.
    pub(crate) in_flight: usize,
    pub(crate) devices: Vec<DeviceInfo>,
    pub(crate) models: Vec<ModelStatus>,
}

/// Longest body that is read here.
pub(crate) const MAX_BODY: usize = 64 << 10;

/// The answer to a request on the second listener; `from` is who asks.
pub(crate) fn respond(
    app: &App,
    head: &http::request::Parts,
    body: &[u8],
    from: Option<IpAddr>,
) -> Response<Vec<u8>> {
    let (method, path) = (&head.method, head.uri.path());
    if *method == Method::POST && path == "/nodes" {
        return join(app, head, body, from);
    }
    if *method != Method::GET && *method != Method::HEAD {
        let error = ApiError::new(
            ErrorKind::MethodNotAllowed,
            "this listener only tells: GET, and POST to /nodes",
        );
        return json(405, &error.openai_body());
    }
    match path {
        "/health/live" => reply(200, "text/plain", b"live\n".to_vec()),
        "/health/ready" => match unready(app) {
            None => reply(200, "text/plain", b"ready\n".to_vec()),
            Some(why) => reply(503, "text/plain", format!("{why}\n").into_bytes()),
        },
        "/metrics" => {
            let mut text = Vec::new();
            let encoder = TextEncoder::new();
            encoder
                .encode(&app.registry.gather(), &mut text)
                .expect("gathered families are consistent");
            reply(200, encoder.format_type(), text)
        }
        "/status" => json(200, &status(app)),
        _ => {
            let error = ApiError::new(
                ErrorKind::NotFound,
                "here are /health/live, /health/ready, /metrics, /status and, to join, /nodes",
            );
            json(404, &error.openai_body())
        }
    }
}

fn join(
    app: &App,
    head: &http::request::Parts,
    body: &[u8],
    from: Option<IpAddr>,
) -> Response<Vec<u8>> {
    let credential = head.headers.get(header::AUTHORIZATION);
    let credential = credential.and_then(|value| value.to_str().ok());
    let config = app.config();
    let joined = serde_json::from_slice(body)
        .map_err(|error| ApiError::new(ErrorKind::InvalidRequest, error.to_string()))
        .and_then(|join| {
            let joining = config.joining.as_ref();
            app.fleet.join(joining, credential, from, &join)
        });
    match joined {
        Ok(joined) => json(200, &joined),
        Err(error) => json(error.status(), &error.openai_body()),
    }
}

/// Why requests should not be sent here now.
fn unready(app: &App) -> Option<&'static str> {
    if app.draining.load(Ordering::Relaxed) {
        return Some("draining");
    }
    let up = app.fleet.view().nodes.iter().any(|node| node.is_up());
    (!up).then_some("no node is up")
}

fn status(app: &App) -> Status {
    let view = app.fleet.view();
    let nodes = view.nodes.iter().map(|node| {
        let (health, reason) = match &node.health {
            Health::Unknown => ("unknown", None),
            Health::Up => ("up", None),
            Health::Down(reason) => ("down", Some(reason.clone())),
        };
        NodeStatus {
            name: node.name.to_string(),
            address: node
                .endpoint
                .as_ref()
                .map(|endpoint| endpoint.authority.to_string()),
            health: health.into(),
            reason,
            version: node.version.clone(),
            in_flight: node
                .endpoint
                .as_ref()
                .map_or(0, |endpoint| endpoint.load.in_flight()),
            devices: node.devices.clone(),
            models: node.models.clone(),
        }
    });
    Status {
        version: env!("CARGO_PKG_VERSION").into(),
        in_flight: app.metrics.exchanges.in_flight(),
        nodes: nodes.collect(),
    }
}

fn json(status: u16, value: &impl Serialize) -> Response<Vec<u8>> {
    let body = serde_json::to_vec(value).expect("these types always serialise");
    reply(status, "application/json", body)
}

fn reply(status: u16, kind: &str, body: Vec<u8>) -> Response<Vec<u8>> {
    let mut response = Response::new(body);
    *response.status_mut() = StatusCode::from_u16(status).expect("a constant");
    let length = response.body().len();
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, kind.parse().expect("a constant"));
    headers.insert(header::CONTENT_LENGTH, length.into());
    response
}
