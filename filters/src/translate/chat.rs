//! OpenAI chat and text completions: the canonical dialect, whose bytes pass untouched.

use super::Dialect;
use bytes::Bytes;
use protocol::{ApiError, sse};

/// OpenAI's dialect.
#[derive(Debug, Clone, Copy)]
pub struct Chat;

impl Dialect for Chat {
    fn error(&self, error: &ApiError, _: &str) -> Bytes {
        serde_json::to_vec(&error.openai_body())
            .expect("wire types always serialise")
            .into()
    }

    fn error_event(&self, error: &ApiError, _: &str) -> Bytes {
        let mut event = Vec::new();
        sse::write_data(&mut event, &error.openai_body());
        event.into()
    }
}
