//! One error type for everything a client can be told.
//!
//! A module deep inside returns its own enum; at the border it becomes an [`ApiError`], whose `message` is
//! safe to show and whose `source` is for the log. The dialect decides how it is spelt.

use serde::{Deserialize, Serialize};
use std::sync::Arc;
use std::time::Duration;

/// What went wrong, as far as a client needs to tell cases apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ErrorKind {
    /// The request cannot be understood or asks for something impossible.
    InvalidRequest,
    /// Prompt plus answer do not fit the model's context.
    ContextLengthExceeded,
    /// A credential is missing or wrong.
    Unauthorized,
    /// The credential does not cover this.
    Forbidden,
    /// No such path.
    NotFound,
    /// No such model in the catalogue or on any node.
    ModelNotFound,
    /// No request of this id is running.
    RequestNotFound,
    /// No such response is kept.
    ResponseNotFound,
    /// The response to go on from is not kept.
    PreviousResponseNotFound,
    /// The path exists, the method does not.
    MethodNotAllowed,
    /// The client did not send its request in time.
    RequestTimeout,
    /// What is asked for contradicts what is there.
    Conflict,
    /// Somebody cancelled the request by its id.
    Cancelled,
    /// Body over the limit.
    PayloadTooLarge,
    /// A content type or encoding we do not read.
    UnsupportedMediaType,
    /// Request head over the limit.
    HeadersTooLarge,
    /// Queue or quota full; `retry_after` says when to come back.
    RateLimited,
    /// Our own fault.
    Internal,
    /// The upstream answered something that cannot be used, or died.
    BadGateway,
    /// Nothing can serve the request now.
    Unavailable,
    /// The upstream did not answer in time.
    GatewayTimeout,
}

impl ErrorKind {
    /// HTTP status code.
    #[must_use]
    pub fn status(self) -> u16 {
        match self {
            Self::InvalidRequest | Self::ContextLengthExceeded | Self::PreviousResponseNotFound => {
                400
            }
            Self::Unauthorized => 401,
            Self::Forbidden => 403,
            Self::NotFound
            | Self::ModelNotFound
            | Self::RequestNotFound
            | Self::ResponseNotFound => 404,
            Self::MethodNotAllowed => 405,
            Self::RequestTimeout => 408,
            Self::Conflict => 409,
            Self::PayloadTooLarge => 413,
            Self::UnsupportedMediaType => 415,
            Self::HeadersTooLarge => 431,
            Self::Cancelled => 499,
            Self::RateLimited => 429,
            Self::Internal => 500,
            Self::BadGateway => 502,
            Self::Unavailable => 503,
            Self::GatewayTimeout => 504,
        }
    }

    /// `error.type` as OpenAI spells it.
    #[must_use]
    pub fn openai_type(self) -> &'static str {
        match self {
            Self::Unauthorized => "authentication_error",
            Self::Forbidden => "permission_error",
            Self::RateLimited => "rate_limit_error",
            Self::Internal | Self::BadGateway | Self::Unavailable | Self::GatewayTimeout => {
                "server_error"
            }
            _ => "invalid_request_error",
        }
    }

    /// `error.type` as Anthropic spells it.
    #[must_use]
    pub fn anthropic_type(self) -> &'static str {
        match self {
            Self::Unauthorized => "authentication_error",
            Self::Forbidden => "permission_error",
            Self::NotFound
            | Self::ModelNotFound
            | Self::RequestNotFound
            | Self::ResponseNotFound => "not_found_error",
            Self::PayloadTooLarge => "request_too_large",
            Self::RateLimited => "rate_limit_error",
            Self::Unavailable => "overloaded_error",
            Self::GatewayTimeout => "timeout_error",
            Self::Internal | Self::BadGateway => "api_error",
            _ => "invalid_request_error",
        }
    }

    /// `error.code` as OpenAI spells it, where it has one.
    #[must_use]
    pub fn code(self) -> Option<&'static str> {
        match self {
            Self::ContextLengthExceeded => Some("context_length_exceeded"),
            Self::Unauthorized => Some("invalid_api_key"),
            Self::ModelNotFound => Some("model_not_found"),
            Self::PreviousResponseNotFound => Some("previous_response_not_found"),
            Self::RateLimited => Some("rate_limit_exceeded"),
            Self::PayloadTooLarge => Some("request_too_large"),
            Self::Unavailable => Some("service_unavailable"),
            Self::BadGateway => Some("upstream_error"),
            Self::GatewayTimeout => Some("upstream_timeout"),
            Self::NotFound => Some("unknown_path"),
            Self::RequestNotFound => Some("request_not_found"),
            Self::MethodNotAllowed => Some("method_not_allowed"),
            Self::Conflict => Some("conflict"),
            Self::UnsupportedMediaType => Some("unsupported_media_type"),
            Self::Cancelled => Some("request_cancelled"),
            Self::InvalidRequest
            | Self::Forbidden
            | Self::ResponseNotFound
            | Self::RequestTimeout
            | Self::HeadersTooLarge
            | Self::Internal => None,
        }
    }

    /// The kind that best fits an upstream's status and code.
    #[must_use]
    pub fn from_upstream(status: u16, code: Option<&str>) -> Self {
        match (status, code) {
            (400, Some("context_length_exceeded")) => Self::ContextLengthExceeded,
            (404, Some("model_not_found")) => Self::ModelNotFound,
            (400 | 422, _) => Self::InvalidRequest,
            (401, _) => Self::Unauthorized,
            (403, _) => Self::Forbidden,
            (404, _) => Self::NotFound,
            (405, _) => Self::MethodNotAllowed,
            (408, _) => Self::RequestTimeout,
            (409, _) => Self::Conflict,
            (413, _) => Self::PayloadTooLarge,
            (415, _) => Self::UnsupportedMediaType,
            (429, _) => Self::RateLimited,
            (499, _) => Self::Cancelled,
            (503 | 529, _) => Self::Unavailable,
            (504, _) => Self::GatewayTimeout,
            _ => Self::BadGateway,
        }
    }
}

/// An error on its way to a client.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{message}")]
pub struct ApiError {
    /// What it is; decides status, type and code.
    pub kind: ErrorKind,
    /// What the client reads. Never holds a secret or an internal address.
    pub message: String,
    /// The request field at fault.
    pub param: Option<String>,
    /// When to come back.
    pub retry_after: Option<Duration>,
    /// What would be taken instead: methods for a 405, encodings of the body for a 415.
    pub allow: Option<&'static str>,
    /// The cause, for the log alone.
    #[source]
    pub source: Option<Arc<dyn std::error::Error + Send + Sync>>,
}

impl ApiError {
    /// An error with a message that is safe to show.
    #[must_use]
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self {
            kind,
            message: message.into(),
            param: None,
            retry_after: None,
            allow: None,
            source: None,
        }
    }

    /// A 400 that names the field at fault.
    #[must_use]
    pub fn invalid(param: impl Into<String>, message: impl Into<String>) -> Self {
        Self {
            param: Some(param.into()),
            ..Self::new(ErrorKind::InvalidRequest, message)
        }
    }

    /// A 404 for a model that is neither in the catalogue nor on a node.
    #[must_use]
    pub fn model_not_found(model: &str) -> Self {
        Self {
            param: Some("model".into()),
            ..Self::new(
                ErrorKind::ModelNotFound,
                format!(
                    "the model `{model}` does not exist here; GET /v1/models lists those that do"
                ),
            )
        }
    }

    /// Adds the cause for the log.
    #[must_use]
    pub fn caused_by(
        mut self,
        source: impl Into<Box<dyn std::error::Error + Send + Sync>>,
    ) -> Self {
        self.source = Some(Arc::from(source.into()));
        self
    }

    /// Adds when to come back.
    #[must_use]
    pub fn retry_after(mut self, after: Duration) -> Self {
        self.retry_after = Some(after);
        self
    }

    /// HTTP status code.
    #[must_use]
    pub fn status(&self) -> u16 {
        self.kind.status()
    }

    /// What an upstream's error reply means to our own client.
    ///
    /// A node that refuses our credential is our fault, not the client's, so 401 and 403 become 502.
    #[must_use]
    pub fn from_upstream(status: u16, body: &[u8], retry_after: Option<Duration>) -> Self {
        let told = serde_json::from_slice::<OpenAiError>(body)
            .ok()
            .map(|reply| reply.error);
        let code = told.as_ref().and_then(|error| error.code.as_deref());
        let kind = match ErrorKind::from_upstream(status, code) {
            ErrorKind::Unauthorized | ErrorKind::Forbidden => ErrorKind::BadGateway,
            kind => kind,
        };
        let (message, param) = match told {
            Some(error) => (error.message, error.param),
            None => (format!("the upstream answered {status}"), None),
        };
        Self {
            param,
            retry_after,
            ..Self::new(kind, message)
        }
    }

    /// The body OpenAI's clients expect: `{"error": {message, type, param, code}}`.
    #[must_use]
    pub fn openai_body(&self) -> OpenAiError {
        OpenAiError {
            error: OpenAiErrorBody {
                message: self.message.clone(),
                kind: self.kind.openai_type().into(),
                param: self.param.clone(),
                code: self.kind.code().map(Into::into),
            },
        }
    }
}

/// OpenAI's error reply, both to write and to read from an upstream.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct OpenAiError {
    /// The one field.
    pub error: OpenAiErrorBody,
}

/// Inside of [`OpenAiError`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct OpenAiErrorBody {
    /// For a person.
    pub message: String,
    /// The class of error.
    #[serde(rename = "type", default)]
    pub kind: String,
    /// The field at fault.
    #[serde(default)]
    pub param: Option<String>,
    /// For a program. Some servers send a number here, which is read as its digits.
    #[serde(default, deserialize_with = "code_as_text")]
    pub code: Option<String>,
}

fn code_as_text<'de, D: serde::Deserializer<'de>>(d: D) -> Result<Option<String>, D::Error> {
    Ok(match Option::<serde_json::Value>::deserialize(d)? {
        Some(serde_json::Value::String(text)) => Some(text),
        Some(serde_json::Value::Number(number)) => Some(number.to_string()),
        _ => None,
    })
}
