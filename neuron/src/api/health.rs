//! What the host says of itself.

use super::ApiState;
use super::failure::Failure;
use crate::devices;
use axum::Json;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use prometheus::TextEncoder;
use protocol::node::{ModelState, NodeInfo};
use protocol::{ApiError, ErrorKind};
use serde_json::{Value, json};
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// `GET /discovery`.
pub(super) async fn discovery(
    State(state): State<Arc<ApiState>>,
) -> Result<Json<NodeInfo>, Failure> {
    let info = move || {
        let devices = devices::inventory();
        NodeInfo {
            host: state.name.clone(),
            version: env!("CARGO_PKG_VERSION").into(),
            features: devices::features(&devices),
            devices,
            cuda: devices::cuda(),
        }
    };
    Ok(Json(asking_devices(info).await?))
}

/// Does `work`, which asks drivers: they may take their time, in which others are to be answered.
pub(super) async fn asking_devices<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, Failure> {
    let done = tokio::task::spawn_blocking(work).await;
    done.map_err(|error| ApiError::new(ErrorKind::Internal, error.to_string()).into())
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
pub(super) async fn metrics(State(state): State<Arc<ApiState>>) -> Result<Response, Failure> {
    let families = asking_devices(move || state.registry.gather()).await?;
    let text = TextEncoder::new()
        .encode_to_string(&families)
        .map_err(|error| ApiError::new(ErrorKind::Internal, error.to_string()))?;
    Ok(([(header::CONTENT_TYPE, prometheus::TEXT_FORMAT)], text).into_response())
}
