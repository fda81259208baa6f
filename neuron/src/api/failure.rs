//! Errors of every module → [`ApiError`] → a reply in OpenAI's shape.

use crate::engine::admission::Rejected;
use crate::engine::request::EngineError;
use crate::residency::{LoadRefused, Unavailable};
use crate::text::template::TemplateError;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use protocol::{ApiError, ErrorKind};
use std::sync::Arc;
use std::time::Duration;

/// An error on its way out.
#[derive(Debug)]
pub(super) struct Failure(pub(super) ApiError);

/// The error a reply was made of, for the log.
#[derive(Clone)]
pub(super) struct Logged(pub(super) Arc<ApiError>);

impl From<ApiError> for Failure {
    fn from(error: ApiError) -> Self {
        Self(error)
    }
}

impl IntoResponse for Failure {
    fn into_response(self) -> Response {
        let Self(error) = self;
        let status =
            StatusCode::from_u16(error.status()).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let mut response = (status, axum::Json(error.openai_body())).into_response();
        if let Some(after) = error.retry_after {
            let seconds = after.as_secs_f64().ceil().max(1.0) as u64;
            response
                .headers_mut()
                .insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        response.extensions_mut().insert(Logged(Arc::new(error)));
        response
    }
}

/// A model that cannot serve now.
pub(super) fn unavailable(model: &str, error: Unavailable) -> ApiError {
    let message = match &error {
        Unavailable::Unknown => return ApiError::model_not_found(model),
        Unavailable::Loading { .. } => format!("`{model}` is still being loaded"),
        Unavailable::Failed { .. } => {
            let message = format!("`{model}` has failed; GET /models/{model} says why");
            return ApiError::new(ErrorKind::Unavailable, message).caused_by(error);
        }
        Unavailable::Unloading => format!("`{model}` is being unloaded"),
    };
    ApiError::new(ErrorKind::Unavailable, message)
        .caused_by(error)
        .retry_after(Duration::from_secs(2))
}

/// A request that may not wait.
pub(super) fn rejected(error: Rejected) -> ApiError {
    match error {
        Rejected::QueueFull { retry_after, .. } | Rejected::TokensFull { retry_after, .. } => {
            ApiError::new(ErrorKind::RateLimited, error.to_string()).retry_after(retry_after)
        }
        Rejected::Closed => ApiError::new(ErrorKind::Unavailable, error.to_string())
            .retry_after(Duration::from_secs(2)),
    }
}

/// A request that was taken and could not be finished.
pub(super) fn broken(error: EngineError) -> ApiError {
    let (kind, message) = match &error {
        EngineError::Fault(_) => (ErrorKind::Unavailable, "the model failed while answering"),
        EngineError::Gone => (ErrorKind::Unavailable, "the model is gone"),
        EngineError::Stopped => (
            ErrorKind::Unavailable,
            "the model was unloaded before the answer was done",
        ),
        EngineError::Sampling(_) => (ErrorKind::Internal, "the model computed no usable numbers"),
        EngineError::Grammar(_) => (
            ErrorKind::Internal,
            "the grammar of the answer became too complex to follow",
        ),
        EngineError::Cancelled => (ErrorKind::Cancelled, "the request was cancelled"),
        EngineError::Deadline => (
            ErrorKind::GatewayTimeout,
            "the answer was not done within its deadline",
        ),
        EngineError::SlowReader => (
            ErrorKind::RequestTimeout,
            "the reader of the answer took nothing for too long",
        ),
    };
    ApiError::new(kind, message).caused_by(error)
}

/// Messages the chat template did not render.
pub(super) fn template(error: TemplateError) -> ApiError {
    let param = match &error {
        TemplateError::Arguments { message, call, .. } => {
            format!("messages[{message}].tool_calls[{call}].function.arguments")
        }
        _ => "messages".to_owned(),
    };
    ApiError::invalid(param, error.to_string())
}

/// A load that was not begun.
pub(super) fn load_refused(error: LoadRefused) -> ApiError {
    match error {
        LoadRefused::Conflict { .. } => ApiError {
            param: Some("source".into()),
            ..ApiError::new(ErrorKind::Conflict, error.to_string())
        },
        LoadRefused::Unloading(_) => ApiError::new(ErrorKind::Unavailable, error.to_string())
            .retry_after(Duration::from_secs(2)),
        LoadRefused::Stopping => ApiError::new(ErrorKind::Unavailable, error.to_string()),
    }
}
