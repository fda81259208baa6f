//! Anthropic messages.

use super::{Answer, Dialect, Translation, Translator, upstream, written};
use crate::Exchange;
use bytes::Bytes;
use protocol::chat::ChatRequest;
use protocol::models::ModelCard;
use protocol::{ApiError, ErrorKind, sse};
use serde::Deserialize;
use serde_json::json;
use std::sync::Arc;

#[cfg(test)]
mod accumulate;
mod events;
mod fields;
mod models;
mod reply;
mod request;
mod shown;
pub mod wire;

#[cfg(test)]
mod tests;
#[cfg(test)]
mod transcripts;

pub use fields::rows;

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

    fn models(&self, cards: Vec<ModelCard>, query: &str) -> Result<Bytes, ApiError> {
        Ok(written(&models::page(cards, query)?))
    }

    fn model(&self, card: &ModelCard) -> Bytes {
        written(&models::model(card))
    }

    fn translation(&self) -> Option<&dyn Translation> {
        Some(self)
    }
}

/// `param` is ours: this API names the field in the message alone.
fn error_value(error: &ApiError, request_id: &str) -> serde_json::Value {
    let mut inner = json!({"type": error.kind.anthropic_type(), "message": error.message});
    if let Some(param) = &error.param {
        inner["param"] = param.as_str().into();
        if param == "thread" {
            // told in these words, clients send the whole conversation instead
            let code = "thread_unsupported_request";
            inner["details"] = json!({"error_code": code, "unsupported": []});
        }
    }
    json!({"type": "error", "error": inner, "request_id": request_id})
}

impl Translation for Messages {
    fn request(
        &self,
        body: &[u8],
        _: &Arc<Exchange>,
    ) -> Result<(ChatRequest, Box<dyn Answer>), ApiError> {
        Ok((request::to_chat(parse(body)?)?, Box::new(*self)))
    }

    fn refusal(&self, error: ApiError) -> ApiError {
        named_here(error)
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

/// Anthropic's dialect where it asks for the length of a prompt.
#[derive(Debug, Clone, Copy)]
pub struct CountTokens;

impl Dialect for CountTokens {
    fn error(&self, error: &ApiError, request_id: &str) -> Bytes {
        Messages.error(error, request_id)
    }

    fn error_event(&self, error: &ApiError, request_id: &str) -> Bytes {
        Messages.error_event(error, request_id)
    }

    fn status(&self, error: &ApiError) -> u16 {
        Messages.status(error)
    }

    fn request_id_header(&self) -> Option<&'static str> {
        Messages.request_id_header()
    }

    fn models(&self, cards: Vec<ModelCard>, query: &str) -> Result<Bytes, ApiError> {
        Messages.models(cards, query)
    }

    fn model(&self, card: &ModelCard) -> Bytes {
        Messages.model(card)
    }

    fn translation(&self) -> Option<&dyn Translation> {
        Some(self)
    }
}

impl Translation for CountTokens {
    fn upstream_path(&self) -> &'static str {
        "/tokenize"
    }

    fn request(
        &self,
        body: &[u8],
        _: &Arc<Exchange>,
    ) -> Result<(ChatRequest, Box<dyn Answer>), ApiError> {
        Ok((request::to_tokenize(parse(body)?)?, Box::new(*self)))
    }

    fn refusal(&self, error: ApiError) -> ApiError {
        named_here(error)
    }
}

impl Answer for CountTokens {
    fn whole(self: Box<Self>, body: &Bytes) -> Result<Bytes, ApiError> {
        let tokens: Tokens = upstream(body)?;
        Ok(written(&json!({"input_tokens": tokens.count})))
    }

    fn stream(self: Box<Self>) -> Box<dyn Translator> {
        Box::new(events::Events::default()) // nodes answer this whole
    }
}

/// A node's answer to `/tokenize`, as far as it matters here.
#[derive(Debug, Deserialize)]
struct Tokens {
    count: u64,
}

fn parse(body: &[u8]) -> Result<wire::MessagesRequest<'_>, ApiError> {
    serde_json::from_slice(body).map_err(|error| fault(body, &error))
}

/// Where the request is wrong is found by reading it again with an eye on the path.
fn fault(body: &[u8], error: &serde_json::Error) -> ApiError {
    let mut reader = serde_json::Deserializer::from_slice(body);
    let traced: Result<wire::MessagesRequest<'_>, _> =
        serde_path_to_error::deserialize(&mut reader);
    let path = traced
        .err()
        .map(|error| error.path().to_string())
        .filter(|path| path != "." && !path.contains('?'));
    match path {
        Some(path) => {
            let at = path.replace('[', ".").replace(']', "");
            let message = format!("{at}: {error}");
            ApiError::invalid(at, message)
        }
        None => ApiError::new(
            ErrorKind::InvalidRequest,
            format!("the body is not a messages request: {error}"),
        ),
    }
}

/// A node names the fields of the chat request that it got.
fn named_here(mut error: ApiError) -> ApiError {
    if let Some(param) = &error.param {
        let here = fields::name_here(param);
        if here != *param {
            error.message = format!("{here}: {}", error.message);
            error.param = Some(here);
        }
    }
    error
}
