//! Which models are here: OpenAI's list, and the fleet's own with load and unload.

use super::ApiState;
use super::body::{self, Field, is};
use super::failure::{Failure, load_refused};
use super::health::asking_devices;
use crate::devices;
use axum::Json;
use axum::body::Body;
use axum::extract::{Path, State};
use axum::http::{HeaderMap, StatusCode};
use protocol::ApiError;
use protocol::models::{ModelCard, ModelList};
use protocol::node::{LoadModel, ModelStatus, NodeModels, UnloadModel, WeightFormat};
use std::num::NonZeroU32;
use std::sync::Arc;

const LOAD_FIELDS: &[Field] = &[
    ("id", is::<String>, "a string"),
    ("source", is::<String>, "a folder or a hub id"),
    (
        "context_length",
        is::<Option<u64>>,
        "a whole number, 1 or more",
    ),
    (
        "quant",
        is::<Option<WeightFormat>>,
        "one of f32, f16, bf16, q8_0, q6_k, q5_k, q4_k",
    ),
    (
        "tensor_parallel",
        is::<Option<NonZeroU32>>,
        "a whole number, 1 or more",
    ),
    (
        "devices",
        is::<Vec<String>>,
        "a list of ids of GET /discovery",
    ),
];

const UNLOAD_FIELDS: &[Field] = &[("id", is::<String>, "a string")];

/// `GET /v1/models`.
pub(super) async fn cards(State(state): State<Arc<ApiState>>) -> Json<ModelList> {
    let statuses = state.residency.statuses();
    Json(ModelList::new(statuses.into_iter().map(card_of).collect()))
}

/// `GET /v1/models/{id}`.
pub(super) async fn card(
    State(state): State<Arc<ApiState>>,
    Path(id): Path<String>,
) -> Result<Json<ModelCard>, Failure> {
    Ok(Json(card_of(find(&state, &id)?)))
}

/// `GET /models`.
pub(super) async fn statuses(State(state): State<Arc<ApiState>>) -> Json<NodeModels> {
    Json(NodeModels {
        models: state.residency.statuses(),
    })
}

/// `GET /models/{id}`.
pub(super) async fn status(
    State(state): State<Arc<ApiState>>,
    Path(id): Path<String>,
) -> Result<Json<ModelStatus>, Failure> {
    Ok(Json(find(&state, &id)?))
}

/// `POST /models/load`: answers at once.
pub(super) async fn load(
    State(state): State<Arc<ApiState>>,
    headers: HeaderMap,
    body: Body,
) -> Result<(StatusCode, Json<ModelStatus>), Failure> {
    let bytes = body::read(&headers, body, state.limits.max_body_bytes).await?;
    let wanted: LoadModel = body::parse(&bytes, &[LOAD_FIELDS])?;
    for (name, value) in [("id", &wanted.id), ("source", &wanted.source)] {
        if value.is_empty() {
            return Err(ApiError::invalid(name, format!("`{name}` is empty")).into());
        }
    }
    if wanted.context_length == Some(0) {
        let message = "`context_length` must be 1 or more";
        return Err(ApiError::invalid("context_length", message).into());
    }
    let (wanted, checked) = asking_devices(move || {
        let checked = check_devices(&wanted);
        (wanted, checked)
    })
    .await?;
    checked?;
    let status = state.residency.load(wanted).map_err(load_refused)?;
    Ok((StatusCode::ACCEPTED, Json(status)))
}

/// A model is loaded where the caller counts on it: on devices that are here, with a rank on each unless they hold many.
fn check_devices(wanted: &LoadModel) -> Result<(), ApiError> {
    let refuse = |(param, message): (&str, String)| Err(ApiError::invalid(param, message));
    devices::check(&wanted.devices, wanted.ranks()).or_else(|refused| {
        refuse(match refused {
            devices::Refused::Unknown { .. } | devices::Refused::Twice(_) => {
                ("devices", refused.to_string())
            }
            devices::Refused::TooFew { .. } => ("tensor_parallel", refused.to_string()),
        })
    })
}

/// `POST /models/unload`: answers at once.
pub(super) async fn unload(
    State(state): State<Arc<ApiState>>,
    headers: HeaderMap,
    body: Body,
) -> Result<Json<ModelStatus>, Failure> {
    let bytes = body::read(&headers, body, state.limits.max_body_bytes).await?;
    let wanted: UnloadModel = body::parse(&bytes, &[UNLOAD_FIELDS])?;
    let status = state
        .residency
        .unload(&wanted.id)
        .ok_or_else(|| unknown(&wanted.id))?;
    Ok(Json(status))
}

fn find(state: &ApiState, id: &str) -> Result<ModelStatus, Failure> {
    Ok(state.residency.status(id).ok_or_else(|| unknown(id))?)
}

fn unknown(id: &str) -> ApiError {
    ApiError {
        param: Some("id".into()),
        ..ApiError::model_not_found(id)
    }
}

fn card_of(status: ModelStatus) -> ModelCard {
    ModelCard {
        context_length: (status.context_length > 0).then_some(status.context_length),
        capabilities: Some(status.capabilities),
        state: Some(status.state.as_str().into()),
        ..ModelCard::new(status.id, "neuron", status.since)
    }
}
