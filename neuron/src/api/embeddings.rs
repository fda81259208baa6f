//! `POST /v1/embeddings`: known, and refused with the reason.

use super::ApiState;
use super::body::{self, Field, is};
use super::failure::Failure;
use super::generation::loaded_model;
use axum::body::Body;
use axum::extract::State;
use axum::http::HeaderMap;
use protocol::ApiError;
use serde::Deserialize;
use std::sync::Arc;

const FIELDS: &[Field] = &[("model", is::<String>, "a string")];

#[derive(Deserialize)]
struct Wanted {
    model: String,
}

/// No architecture this daemon loads has a pooling of its hidden states that it was trained for.
pub(super) async fn refuse(
    State(state): State<Arc<ApiState>>,
    headers: HeaderMap,
    body: Body,
) -> Result<(), Failure> {
    let bytes = body::read(&headers, body, state.limits.max_body_bytes).await?;
    let wanted: Wanted = body::parse(&bytes, &[FIELDS])?;
    let model = loaded_model(&state, &wanted.model)?;
    let message = format!(
        "`{}` writes text and has no pooling: it gives no embeddings",
        model.id
    );
    Err(ApiError::invalid("model", message).into())
}
