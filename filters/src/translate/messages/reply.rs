//! Whole chat reply → message.

use super::wire::{OutputBlock, OutputMessage, OutputUsage};
use protocol::chat::{ChatReply, FinishReason};
use protocol::{ApiError, ErrorKind};
use serde_json::Value;

/// The message that says what `chat` says.
pub(super) fn from_chat(chat: ChatReply) -> Result<OutputMessage, ApiError> {
    let choice = chat.choices.into_iter().next().ok_or_else(|| {
        ApiError::new(
            ErrorKind::BadGateway,
            "the upstream's reply holds no answer",
        )
    })?;
    let answer = choice.message;
    let mut content = Vec::new();
    if let Some(thinking) = answer.reasoning_content.filter(|text| !text.is_empty()) {
        content.push(OutputBlock::Thinking {
            thinking,
            signature: String::new(),
        });
    }
    if let Some(text) = answer.content.filter(|text| !text.is_empty()) {
        content.push(OutputBlock::Text { text });
    }
    for call in answer.tool_calls.into_iter().flatten() {
        content.push(OutputBlock::ToolUse {
            id: call.id,
            name: call.function.name,
            input: arguments(&call.function.arguments),
        });
    }
    let (stop_reason, stop_sequence) = stop(choice.finish_reason, choice.stop_reason);
    Ok(OutputMessage {
        id: message_id(&chat.id),
        kind: "message",
        role: "assistant",
        model: chat.model,
        content,
        stop_reason,
        stop_sequence,
        usage: chat.usage.map(OutputUsage::from).unwrap_or_default(),
    })
}

/// Arguments as the object this API promises. A model may have written something else: it is kept under `arguments`.
fn arguments(json: &str) -> Value {
    match serde_json::from_str(json) {
        Ok(object @ Value::Object(_)) => object,
        _ if json.trim().is_empty() => Value::Object(serde_json::Map::new()),
        _ => serde_json::json!({"arguments": json}),
    }
}

/// The id under which this API's clients know the answer.
pub(super) fn message_id(chat_id: &str) -> String {
    format!(
        "msg_{}",
        chat_id.strip_prefix("chatcmpl-").unwrap_or(chat_id)
    )
}

/// `stop_reason` and `stop_sequence`.
pub(super) fn stop(
    finish: Option<FinishReason>,
    sequence: Option<String>,
) -> (Option<&'static str>, Option<String>) {
    match (finish, sequence) {
        (None, _) => (None, None),
        (Some(FinishReason::Stop), Some(sequence)) => (Some("stop_sequence"), Some(sequence)),
        (Some(FinishReason::Stop), None) => (Some("end_turn"), None),
        (Some(FinishReason::Length), _) => (Some("max_tokens"), None),
        (Some(FinishReason::ToolCalls), _) => (Some("tool_use"), None),
        (Some(FinishReason::ContentFilter), _) => (Some("refusal"), None),
    }
}
