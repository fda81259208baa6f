//! Fields of a Responses request that have no place in a chat request: which are refused, and which have no bearing here.

use protocol::ApiError;
use serde_json::{Map, Value};

/// A field that cannot be honoured: its name, whether a value asks for nothing, and why others are refused.
type Unsupported = (&'static str, fn(&Value) -> bool, &'static str);

const UNSUPPORTED: [Unsupported; 10] = [
    (
        "background",
        |value| *value == Value::Bool(false),
        "an answer is given while its client waits; stream it instead",
    ),
    (
        "background_options",
        is_empty,
        "there are no background responses",
    ),
    (
        "conversation",
        is_empty,
        "there are no conversations here; use `previous_response_id`",
    ),
    ("prompt", is_empty, "no prompts are kept here"),
    (
        "top_logprobs",
        |value| value.as_f64() == Some(0.0),
        "log probabilities are not given",
    ),
    (
        "truncation",
        |value| value == "disabled",
        "a conversation is read as it is sent, and refused where it is too long",
    ),
    (
        "context_management",
        is_empty,
        "a conversation is read as it is sent",
    ),
    ("moderation", is_empty, "nothing is moderated here"),
    (
        "image",
        |value| value["context_compression"] != "enabled",
        "images are not compressed",
    ),
    ("prompt_cache_options", is_hint, "there is no such cache"),
];

/// Fields without a bearing on the answer.
const HARMLESS: [&str; 5] = [
    "store", // the layer above sees to it
    "service_tier",
    "stream_options",
    "access_programs",
    "prompt_cache_retention",
];

/// Fields of a chat request that this API spells otherwise; let through, they would stand there twice.
const SPELT: [(&str, &str); 6] = [
    ("messages", "input"),
    ("max_tokens", "max_output_tokens"),
    ("max_completion_tokens", "max_output_tokens"),
    ("response_format", "text.format"),
    ("reasoning_effort", "reasoning.effort"),
    ("functions", "tools"),
];

/// What may be asked to be included, as it always is.
const INCLUDED: [&str; 2] = [
    "message.input_image.image_url",
    // it serves to send thinking back; here thinking comes in the clear, and goes back in the clear
    "reasoning.encrypted_content",
];

fn is_empty(value: &Value) -> bool {
    match value {
        Value::String(text) => text.is_empty(),
        Value::Array(list) => list.is_empty(),
        Value::Object(map) => map.values().all(Value::is_null),
        _ => false,
    }
}

/// Whether these options only say how long a cache may last.
fn is_hint(value: &Value) -> bool {
    value["prewarm"] != true && value["comparison_response_id"].is_null()
}

/// Refuses what cannot be honoured. What nobody here knows goes on to the node, which counts it or honours it.
///
/// # Errors
/// 400 that names the first field at fault.
pub(super) fn pass_on(mut extra: Map<String, Value>) -> Result<Map<String, Value>, ApiError> {
    for (name, asks_for_nothing, why) in UNSUPPORTED {
        let Some(value) = extra.shift_remove(name) else {
            continue;
        };
        if !value.is_null() && !asks_for_nothing(&value) {
            let message = format!("`{name}` is not supported: {why}");
            return Err(ApiError::invalid(name, message));
        }
    }
    for (name, here) in SPELT {
        if extra.contains_key(name) {
            let message = format!("`{name}` is no field of this API; use `{here}`");
            return Err(ApiError::invalid(name, message));
        }
    }
    extra.retain(|name, _| !HARMLESS.contains(&name.as_str()));
    Ok(extra)
}

/// Checks what is to be included in a reply.
///
/// # Errors
/// 400 for what there is not.
pub fn check_include<'a>(include: impl IntoIterator<Item = &'a str>) -> Result<(), ApiError> {
    for what in include {
        if !INCLUDED.contains(&what) {
            let message = format!("`{what}` cannot be included: there is none here");
            return Err(ApiError::invalid("include", message));
        }
    }
    Ok(())
}

/// What this API calls the field that a node has found fault with.
pub(super) fn name_here(param: &str) -> String {
    let top = param.split(['.', '[']).next().unwrap_or(param);
    match SPELT.iter().find(|(chat, _)| *chat == top) {
        Some((_, here)) => (*here).to_owned(), // an item may be several messages there: a place would mislead
        None => param.replace(".function", ""),
    }
}
