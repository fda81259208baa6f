//! Request fields beyond the typed ones: what is refused, what is harmless, what is unknown.

use super::ApiMetrics;
use crate::engine::sampler::SamplingParams;
use crate::residency::folder::SamplingDefaults;
use protocol::ApiError;
use serde_json::{Map, Value};

/// A field that is known and not supported: its name, which values ask for nothing, and why others are refused.
type Unsupported = (&'static str, fn(&Value) -> bool, &'static str);

/// Refused rather than ignored: an answer that silently leaves them out would be wrong.
const UNSUPPORTED: &[Unsupported] = &[
    ("n", is_one, "one answer is given per request"),
    ("best_of", is_one, "one answer is given per request"),
    ("logprobs", is_off, "log probabilities are not given"),
    ("top_logprobs", is_zero, "log probabilities are not given"),
    ("prompt_logprobs", is_off, "log probabilities are not given"),
    ("logit_bias", is_empty, "tokens cannot be biased"),
    ("frequency_penalty", is_zero, "penalties are not applied"),
    ("presence_penalty", is_zero, "penalties are not applied"),
    ("repetition_penalty", is_one, "penalties are not applied"),
    (
        "response_format",
        is_text_format,
        "answers are not held to a format; only type `text` is accepted",
    ),
    ("grammar", is_empty, "answers are not held to a grammar"),
    (
        "structured_outputs",
        is_empty,
        "answers are not held to a grammar",
    ),
    ("guided_json", is_empty, "answers are not held to a grammar"),
    (
        "guided_regex",
        is_empty,
        "answers are not held to a grammar",
    ),
    (
        "guided_choice",
        is_empty,
        "answers are not held to a grammar",
    ),
    ("functions", is_empty, "use `tools`"),
    ("function_call", is_none_or_auto, "use `tool_choice`"),
    ("modalities", is_text_only, "answers are text"),
    ("audio", is_empty, "answers are text"),
    ("prediction", is_empty, "predicted outputs are not used"),
    ("web_search_options", is_empty, "there is no web search"),
    ("store", is_off, "nothing is stored"),
    ("echo", is_off, "the prompt is not repeated"),
    ("suffix", is_empty, "there is no text after the answer"),
    ("stop_token_ids", is_empty, "use `stop`"),
    ("ignore_eos", is_off, "the end of the turn is always heeded"),
    ("min_tokens", is_zero, "answers have no least length"),
];

/// Known, and without a bearing on the answer.
const HARMLESS: &[&str] = &[
    "metadata",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_retention",
];

fn is_one(value: &Value) -> bool {
    value.as_f64() == Some(1.0)
}

fn is_zero(value: &Value) -> bool {
    value.as_f64() == Some(0.0)
}

fn is_off(value: &Value) -> bool {
    *value == Value::Bool(false)
}

fn is_empty(value: &Value) -> bool {
    match value {
        Value::String(text) => text.is_empty(),
        Value::Array(list) => list.is_empty(),
        Value::Object(map) => map.is_empty(),
        _ => false,
    }
}

fn is_none_or_auto(value: &Value) -> bool {
    matches!(value.as_str(), Some("none" | "auto"))
}

fn is_text_format(value: &Value) -> bool {
    value["type"] == "text"
}

fn is_text_only(value: &Value) -> bool {
    value
        .as_array()
        .is_some_and(|kinds| kinds.iter().all(|kind| kind == "text"))
}

/// Refuses fields that are known and not supported; counts those that are not known.
///
/// # Errors
/// 400 that names the first refused field.
pub(super) fn check(extra: &Map<String, Value>, metrics: &ApiMetrics) -> Result<u64, ApiError> {
    let mut unknown = 0;
    for (name, value) in extra {
        match UNSUPPORTED.iter().find(|(known, ..)| known == name) {
            Some((_, asks_for_nothing, reason)) => {
                if !value.is_null() && !asks_for_nothing(value) {
                    let message = format!("`{name}` is not supported: {reason}");
                    return Err(ApiError::invalid(name, message));
                }
            }
            None if HARMLESS.contains(&name.as_str()) => {}
            None => unknown += 1,
        }
    }
    metrics.unknown_fields.inc_by(unknown);
    Ok(unknown)
}

/// The sampling fields of a request, as given.
#[derive(Debug, Clone, Copy)]
pub(super) struct Sampling {
    pub(super) temperature: Option<f64>,
    pub(super) top_p: Option<f64>,
    pub(super) top_k: Option<i64>,
    pub(super) min_p: Option<f64>,
    pub(super) seed: Option<i64>,
}

impl Sampling {
    /// What the request says, then what the model advises; without a seed each request has its own.
    ///
    /// # Errors
    /// 400 that names the field that is out of range.
    pub(super) fn checked(self, defaults: SamplingDefaults) -> Result<SamplingParams, ApiError> {
        SamplingParams::new(
            self.temperature.unwrap_or(defaults.temperature),
            self.top_k.unwrap_or(defaults.top_k),
            self.top_p.unwrap_or(defaults.top_p),
            self.min_p.unwrap_or(defaults.min_p),
            self.seed.map_or_else(rand::random, i64::cast_unsigned),
        )
        .map_err(|error| ApiError::invalid(error.field, error.to_string()))
    }
}

/// How many tokens an answer may have, cut to what the context leaves.
///
/// # Errors
/// 400 when nothing is left, or nothing is asked for.
pub(super) fn max_tokens(
    (param, wanted): (&'static str, Option<u64>),
    prompt: usize,
    context: usize,
) -> Result<usize, ApiError> {
    if wanted == Some(0) {
        return Err(ApiError::invalid(
            param,
            format!("`{param}` must be 1 or more"),
        ));
    }
    let left = context.saturating_sub(prompt);
    if left == 0 {
        let message = format!(
            "the prompt has {prompt} tokens and the context of this model is {context}, which must also hold the answer"
        );
        return Err(ApiError {
            kind: protocol::ErrorKind::ContextLengthExceeded,
            ..ApiError::invalid("messages", message)
        });
    }
    Ok(wanted.map_or(left, |wanted| {
        left.min(usize::try_from(wanted).unwrap_or(usize::MAX))
    }))
}

/// Stop strings, at most as many as a stream can watch for without anybody noticing.
///
/// # Errors
/// 400 when there are too many.
pub(super) fn stop_strings(
    stop: Option<protocol::chat::StopStrings>,
) -> Result<Vec<String>, ApiError> {
    const MOST: usize = 16;
    let stop = stop
        .map(protocol::chat::StopStrings::into_vec)
        .unwrap_or_default();
    if stop.len() > MOST {
        let message = format!("`stop` may have at most {MOST} strings");
        return Err(ApiError::invalid("stop", message));
    }
    Ok(stop)
}
