//! Anthropic messages.

use super::{Answer, Dialect, Translation, Translator, upstream, written};
use crate::Exchange;
use bytes::Bytes;
use protocol::chat::ChatRequest;
use protocol::{ApiError, ErrorKind, sse};
use serde_json::json;
use std::sync::Arc;

mod events;
mod reply;
mod request;
pub mod wire;

/// Anthropic's dialect.
#[derive(Debug, Clone, Copy)]
pub struct Messages;

impl Dialect for Messages {
    fn error(&self, error: &ApiError, request_id: &str) -> Bytes {
        error_value(error, request_id).to_string().into()
    }

    fn error_event(&self, error: &ApiError, request_id: &str) -> Bytes {
        let mut event = Vec::new();
        sse::write_event(&mut event, "error", &error_value(error, request_id));
        event.into()
    }

    fn status(&self, error: &ApiError) -> u16 {
        match error.kind {
            ErrorKind::Unavailable => 529, // what this API answers when it is overloaded
            kind => kind.status(),
        }
    }

    fn request_id_header(&self) -> Option<&'static str> {
        Some("request-id")
    }

    fn translation(&self) -> Option<&dyn Translation> {
        Some(self)
    }
}

fn error_value(error: &ApiError, request_id: &str) -> serde_json::Value {
    json!({
        "type": "error",
        "error": {"type": error.kind.anthropic_type(), "message": error.message},
        "request_id": request_id,
    })
}

impl Translation for Messages {
    fn request(
        &self,
        body: &[u8],
        _: &Arc<Exchange>,
    ) -> Result<(ChatRequest, Box<dyn Answer>), ApiError> {
        let request: wire::MessagesRequest = serde_json::from_slice(body).map_err(|error| {
            ApiError::new(
                ErrorKind::InvalidRequest,
                format!("the body is not a messages request: {error}"),
            )
        })?;
        Ok((request::to_chat(request)?, Box::new(*self)))
    }
}

impl Answer for Messages {
    fn whole(self: Box<Self>, body: &Bytes) -> Result<Bytes, ApiError> {
        let message = reply::from_chat(upstream(body)?)?;
        Ok(written(&message))
    }

    fn stream(self: Box<Self>) -> Box<dyn Translator> {
        Box::new(events::Events::default())
    }
}
