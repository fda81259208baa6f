//! What the host says of itself.

use super::ApiState;
use crate::devices;
use axum::Json;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use prometheus::TextEncoder;
use protocol::node::{ModelState, NodeInfo};
use serde_json::{Value, json};
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// `GET /discovery`.
pub(super) async fn discovery(State(state): State<Arc<ApiState>>) -> Json<NodeInfo> {
    Json(NodeInfo {
        host: state.name.clone(),
        version: env!("CARGO_PKG_VERSION").into(),
        devices: devices::inventory(),
        features: devices::features(),
        cuda: devices::cuda(),
    })
}

/// `GET /health/live`: the process answers.
pub(super) async fn live() -> Json<Value> {
    Json(json!({"status": "live"}))
}

/// `GET /health/ready`: requests make sense. Not while stopping, and not before the models loaded at start have
/// settled; if all of those failed, never.
pub(super) async fn ready(State(state): State<Arc<ApiState>>) -> Response {
    let waiting_for = if state.stopping.load(Ordering::Acquire) {
        Some("the daemon is stopping")
    } else {
        unready_models(&state)
    };
    match waiting_for {
        None => Json(json!({"status": "ready"})).into_response(),
        Some(reason) => {
            let body = Json(json!({"status": "not ready", "reason": reason}));
            (StatusCode::SERVICE_UNAVAILABLE, body).into_response()
        }
    }
}

fn unready_models(state: &ApiState) -> Option<&'static str> {
    let states: Vec<ModelState> = state
        .at_start
        .iter()
        .filter_map(|id| Some(state.residency.status(id)?.state))
        .collect();
    if states.contains(&ModelState::Loading) {
        return Some("a model is being loaded");
    }
    // A model that was unloaded on purpose is no reason.
    let failed = |model: &ModelState| *model == ModelState::Failed;
    (!states.is_empty() && states.iter().all(failed)).then_some("every model failed to load")
}

/// `GET /metrics`.
pub(super) async fn metrics(State(state): State<Arc<ApiState>>) -> Response {
    match TextEncoder::new().encode_to_string(&state.registry.gather()) {
        Ok(text) => ([(header::CONTENT_TYPE, prometheus::TEXT_FORMAT)], text).into_response(),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()).into_response(),
    }
}
