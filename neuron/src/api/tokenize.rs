//! Text to tokens and back, and what a conversation becomes: `POST /tokenize`, `/detokenize`, `/apply-template`.

use super::ApiState;
use super::body::{self, Field, is};
use super::chat::{check_messages, template_variables};
use super::failure::{Failure, template};
use super::fields;
use super::generation::{in_background, loaded_model};
use super::scores::spelt;
use crate::residency::ServedModel;
use crate::text::template::Conversation;
use axum::Json;
use axum::body::Body;
use axum::extract::State;
use axum::http::HeaderMap;
use protocol::ApiError;
use protocol::chat::{Message, Tool};
use protocol::tokens::{DetokenizeRequest, PromptReply, TokenizeReply, TokenizeRequest};
use serde_json::{Map, Value};
use std::sync::Arc;

const TOKENIZE_FIELDS: &[Field] = &[
    ("model", is::<String>, "a string"),
    ("prompt", is::<Option<String>>, "a string"),
    ("messages", is::<Option<Vec<Message>>>, "a list of messages"),
    (
        "tools",
        is::<Option<Vec<Tool>>>,
        "a list of tools of type `function`",
    ),
    (
        "chat_template_kwargs",
        is::<Option<Map<String, Value>>>,
        "an object",
    ),
    ("add_generation_prompt", is::<Option<bool>>, "true or false"),
    ("return_token_strs", is::<Option<bool>>, "true or false"),
];

const DETOKENIZE_FIELDS: &[Field] = &[
    ("model", is::<String>, "a string"),
    ("tokens", is::<Vec<u32>>, "a list of token ids"),
];

/// `POST /tokenize`: the tokens of a text or of a conversation.
pub(super) async fn tokenize(
    State(state): State<Arc<ApiState>>,
    headers: HeaderMap,
    body: Body,
) -> Result<Json<TokenizeReply>, Failure> {
    let (wire, model) = read(&state, &headers, body).await?;
    let reply = in_background(move || {
        let tokenizer = &model.text.tokenizer;
        let (text, param) = match (&wire.prompt, &wire.messages) {
            (Some(prompt), None) => (prompt.clone(), "prompt"),
            (None, Some(_)) => (rendered(&wire, &model)?, "messages"),
            _ => {
                let message = "there must be either `prompt` or `messages`";
                return Err(ApiError::invalid("prompt", message));
            }
        };
        let tokens = tokenizer
            .encode(&text)
            .map_err(|error| ApiError::invalid(param, error.to_string()))?;
        let strings = || tokens.iter().map(|id| spelt(tokenizer, *id)).collect();
        Ok(TokenizeReply {
            count: tokens.len() as u64,
            max_model_len: model.context_length as u64,
            token_strs: (wire.return_token_strs == Some(true)).then(strings),
            tokens,
        })
    });
    Ok(Json(reply.await?))
}

/// `POST /detokenize`: the text of tokens, special ones spelt out.
pub(super) async fn detokenize(
    State(state): State<Arc<ApiState>>,
    headers: HeaderMap,
    body: Body,
) -> Result<Json<PromptReply>, Failure> {
    let bytes = body::read(&headers, body, state.limits.max_body_bytes).await?;
    let wire: DetokenizeRequest = body::parse(&bytes, &[DETOKENIZE_FIELDS])?;
    fields::check(&wire.extra, &state.metrics)?;
    let model = loaded_model(&state, &wire.model)?;
    let tokenizer = &model.text.tokenizer;
    fields::known("tokens", &wire.tokens, tokenizer)?;
    Ok(Json(PromptReply {
        prompt: tokenizer.spell(&wire.tokens),
    }))
}

/// `POST /apply-template`: the prompt that a conversation becomes.
pub(super) async fn apply_template(
    State(state): State<Arc<ApiState>>,
    headers: HeaderMap,
    body: Body,
) -> Result<Json<PromptReply>, Failure> {
    let (wire, model) = read(&state, &headers, body).await?;
    let prompt = in_background(move || rendered(&wire, &model)).await?;
    Ok(Json(PromptReply { prompt }))
}

async fn read(
    state: &ApiState,
    headers: &HeaderMap,
    body: Body,
) -> Result<(TokenizeRequest, Arc<ServedModel>), ApiError> {
    let bytes = body::read(headers, body, state.limits.max_body_bytes).await?;
    let wire: TokenizeRequest = body::parse(&bytes, &[TOKENIZE_FIELDS])?;
    fields::check(&wire.extra, &state.metrics)?;
    let model = loaded_model(state, &wire.model)?;
    Ok((wire, model))
}

fn rendered(wire: &TokenizeRequest, model: &ServedModel) -> Result<String, ApiError> {
    let messages = wire.messages.as_deref().unwrap_or_default();
    check_messages(messages)?;
    let variables = template_variables(wire.chat_template_kwargs.clone(), None, None)?;
    model
        .text
        .template
        .render(&Conversation {
            messages,
            tools: wire.tools.as_deref().unwrap_or_default(),
            add_generation_prompt: wire.add_generation_prompt.unwrap_or(true),
            variables: &variables,
        })
        .map_err(template)
}
