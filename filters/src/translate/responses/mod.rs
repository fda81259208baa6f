//! OpenAI responses.

use super::chat::Chat;
use super::{Answer, Dialect, Translation, Translator};
use crate::Exchange;
use bytes::Bytes;
use events::Events;
use protocol::ApiError;
use protocol::chat::ChatRequest;
use protocol::models::ModelCard;
use std::sync::Arc;

#[cfg(test)]
mod accumulate;
mod events;
mod fields;
mod reply;
mod request;
mod scores;
#[cfg(test)]
mod tests;
pub mod wire;

pub use fields::{check_include, rows};

/// OpenAI's dialect where it asks for a response.
#[derive(Debug, Clone, Copy)]
pub struct Responses;

impl Dialect for Responses {
    fn error(&self, error: &ApiError, request_id: &str) -> Bytes {
        Chat.error(error, request_id)
    }

    fn error_event(&self, _: &ApiError, _: &str) -> Bytes {
        Bytes::new() // events are numbered, so the translator has told of it
    }

    fn models(&self, cards: Vec<ModelCard>, query: &str) -> Result<Bytes, ApiError> {
        Chat.models(cards, query)
    }

    fn model(&self, card: &ModelCard) -> Bytes {
        Chat.model(card)
    }

    fn translation(&self) -> Option<&dyn Translation> {
        Some(self)
    }
}

impl Translation for Responses {
    fn request(
        &self,
        body: &[u8],
        exchange: &Arc<Exchange>,
    ) -> Result<(ChatRequest, Box<dyn Answer>), ApiError> {
        let request = super::read(body)?;
        let key = format!("{:032x}", rand::random::<u128>());
        let (chat, response) = request::to_chat(request, format!("resp_{key}"))?;
        let events = Events::new(response, key, exchange.clone());
        Ok((chat, Box::new(events)))
    }

    fn refusal(&self, mut error: ApiError) -> ApiError {
        if let Some(param) = &error.param {
            let here = fields::name_here(param);
            if here != *param {
                error.message = format!("`{here}`: {}", error.message);
                error.param = Some(here);
            }
        }
        error
    }
}

impl Answer for Events {
    fn whole(self: Box<Self>, body: &Bytes) -> Result<Bytes, ApiError> {
        let chat = super::upstream(body)?;
        let response = reply::from_chat(chat, *self)?;
        Ok(super::written(&response))
    }

    fn stream(self: Box<Self>) -> Box<dyn Translator> {
        self
    }
}
