//! OpenAI chat and text completions: the canonical dialect, whose bytes pass untouched.

use super::{Dialect, written};
use bytes::Bytes;
use protocol::models::{ModelCard, ModelList};
use protocol::{ApiError, sse};

/// OpenAI's dialect.
#[derive(Debug, Clone, Copy)]
pub struct Chat;

impl Dialect for Chat {
    fn error(&self, error: &ApiError, _: &str) -> Bytes {
        written(&error.openai_body())
    }

    fn error_event(&self, error: &ApiError, _: &str) -> Bytes {
        let mut event = Vec::new();
        sse::write_data(&mut event, &error.openai_body());
        event.into()
    }

    fn models(&self, cards: Vec<ModelCard>, _: &str) -> Result<Bytes, ApiError> {
        Ok(written(&ModelList::new(cards)))
    }

    fn model(&self, card: &ModelCard) -> Bytes {
        written(card)
    }
}
