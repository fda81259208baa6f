//! Tokens on the wire: log probabilities in answers, and the requests that turn text into tokens and back.

use crate::chat::{Message, Tool};
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::{Map, Value};
use std::collections::BTreeMap;

/// Log probabilities of a chat answer, or of what is new in it.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct ChatLogprobs {
    /// One entry per token, thinking and the end of the turn included.
    #[serde(default, deserialize_with = "or_empty")]
    pub content: Vec<ChatLogprob>,
}

/// A token of a chat answer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ChatLogprob {
    /// Its text; what is no UTF-8 is shown as U+FFFD.
    pub token: String,
    /// Its log probability as the model computed it, before temperature, penalties and grammars.
    pub logprob: f32,
    /// Its text byte by byte; empty where an upstream does not say.
    #[serde(default, deserialize_with = "or_empty")]
    pub bytes: Vec<u8>,
    /// The likeliest tokens at this place, likeliest first.
    #[serde(default, deserialize_with = "or_empty")]
    pub top_logprobs: Vec<TopLogprob>,
}

/// One of the likeliest tokens at a place.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TopLogprob {
    /// Its text.
    pub token: String,
    /// Its log probability.
    pub logprob: f32,
    /// Its text byte by byte; empty where an upstream does not say.
    #[serde(default, deserialize_with = "or_empty")]
    pub bytes: Vec<u8>,
}

/// Null is none.
fn or_empty<'de, D: Deserializer<'de>, T: Deserialize<'de>>(list: D) -> Result<Vec<T>, D::Error> {
    Ok(Option::deserialize(list)?.unwrap_or_default())
}

/// Log probabilities of a text completion: four lists with an entry per token each.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct CompletionLogprobs {
    /// Where each token's text begins, in characters.
    pub text_offset: Vec<u64>,
    /// Its log probability; none for the first token of a prompt, which nothing precedes.
    pub token_logprobs: Vec<Option<f32>>,
    /// Its text; what is no UTF-8 is written `bytes:\xf0\x9f`.
    pub tokens: Vec<String>,
    /// The likeliest tokens at its place and itself.
    pub top_logprobs: Vec<Option<BTreeMap<String, f32>>>,
}

/// `POST /tokenize` and `POST /apply-template`: either a text or a conversation.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct TokenizeRequest {
    /// The model whose tokenizer and template are meant.
    pub model: String,
    /// A text.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prompt: Option<String>,
    /// A conversation.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub messages: Option<Vec<Message>>,
    /// Its tools.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tools: Option<Vec<Tool>>,
    /// Variables for the model's own chat template.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub chat_template_kwargs: Option<Map<String, Value>>,
    /// End with the beginning of an answer; true unless said otherwise.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub add_generation_prompt: Option<bool>,
    /// Also give the text of each token.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub return_token_strs: Option<bool>,
    /// Every other field of the request.
    #[serde(flatten)]
    pub extra: Map<String, Value>,
}

/// The answer to `POST /tokenize`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TokenizeReply {
    /// How many tokens.
    pub count: u64,
    /// Longest prompt plus answer of the model.
    pub max_model_len: u64,
    /// Their ids.
    pub tokens: Vec<u32>,
    /// Their texts, if asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub token_strs: Option<Vec<String>>,
}

/// `POST /detokenize`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct DetokenizeRequest {
    /// The model whose tokenizer is meant.
    pub model: String,
    /// Ids.
    pub tokens: Vec<u32>,
    /// Every other field of the request.
    #[serde(flatten)]
    pub extra: Map<String, Value>,
}

/// A text: the answer to `POST /detokenize` and `POST /apply-template`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PromptReply {
    /// The text, special tokens spelt out.
    pub prompt: String,
}
