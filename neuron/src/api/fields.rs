//! Request fields: what both endpoints share, in range; of the rest what is refused, what is harmless, what is unknown.

use super::body::{Field, is};
use super::generation::Origin;
use super::{ApiMetrics, grammar};
use crate::engine::guide::Guide;
use crate::engine::prefix::places;
use crate::engine::request::Request;
use crate::engine::sampler::{SamplingFields, SamplingParams};
use crate::residency::ServedModel;
use crate::residency::folder::ModelText;
use crate::text::grammar::Shape;
use crate::text::output::{Output, OutputOptions};
use crate::text::tokenizer::Tokenizer;
use protocol::ApiError;
use protocol::chat::StopStrings;
use protocol::controls::{Controls, StructuredOutputs};
use serde_json::{Map, Value};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

/// A field that is known and not supported: its name, which values ask for nothing, and why others are refused.
type Unsupported = (&'static str, fn(&Value) -> bool, &'static str);

const CHAT_ONLY: &str = "ask /v1/chat/completions for it";

/// Refused rather than ignored: an answer that silently leaves them out would be wrong.
const UNSUPPORTED: &[Unsupported] = &[
    ("best_of", is_one, "ask for `n` answers and choose"),
    (
        "prompt_logprobs",
        is_off,
        "ask /v1/completions for `echo` with `logprobs`",
    ),
    ("suffix", is_empty, "there is no text after the answer"),
    ("use_beam_search", is_off, "tokens are sampled one by one"),
    ("length_penalty", is_one, "tokens are sampled one by one"),
    ("typical_p", is_one, "tokens are not chosen by typicality"),
    ("bad_words", is_empty, "use `logit_bias`"),
    ("allowed_token_ids", is_empty, "use `guided_regex`"),
    (
        "logits_processors",
        is_empty,
        "no code is taken from requests",
    ),
    ("truncate_prompt_tokens", never, "prompts are never cut"),
    (
        "include_stop_str_in_output",
        is_off,
        "a stop string is not part of the answer",
    ),
    ("skip_special_tokens", is_on, "special tokens are not text"),
    ("return_token_ids", is_off, "ask /tokenize for ids"),
    (
        "return_tokens_as_token_ids",
        is_off,
        "ask /tokenize for ids",
    ),
    (
        "chat_template",
        is_empty,
        "the model's own template is used",
    ),
    ("documents", is_empty, "put them into messages"),
    ("add_generation_prompt", is_on, "an answer is always begun"),
    (
        "continue_final_message",
        is_off,
        "an answer is always a new message",
    ),
    (
        "guided_whitespace_pattern",
        is_empty,
        "white space is free within bounds",
    ),
    ("verbosity", is_medium, "the model is not told of it"),
    // Fields of the other endpoint.
    ("echo", is_off, "ask /v1/completions for it"),
    ("prompt", never, "use `messages`"),
    ("messages", never, CHAT_ONLY),
    ("tools", is_empty, CHAT_ONLY),
    ("tool_choice", is_none_or_auto, CHAT_ONLY),
    ("parallel_tool_calls", Value::is_boolean, CHAT_ONLY),
    ("max_completion_tokens", never, "use `max_tokens`"),
    ("top_logprobs", never, "use `logprobs`"),
    ("reasoning_effort", is_none, CHAT_ONLY),
    ("enable_thinking", is_off, CHAT_ONLY),
    ("thinking_budget", never, CHAT_ONLY),
    ("chat_template_kwargs", is_empty, CHAT_ONLY),
    ("functions", is_empty, "use `tools`"),
    ("function_call", is_none_or_auto, "use `tool_choice`"),
    ("modalities", is_text_only, "answers are text"),
    ("audio", is_empty, "answers are text"),
    ("prediction", is_empty, "predicted outputs are not used"),
    ("web_search_options", is_empty, "there is no web search"),
    ("store", is_off, "nothing is stored"),
];

/// Known, and without a bearing on the answer.
const HARMLESS: &[&str] = &[
    "metadata",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_retention",
    "spaces_between_special_tokens",
    "add_special_tokens",
    "guided_decoding_backend",
];

fn is_one(value: &Value) -> bool {
    value.as_f64() == Some(1.0)
}

fn never(_: &Value) -> bool {
    false
}

fn is_off(value: &Value) -> bool {
    *value == Value::Bool(false)
}

fn is_on(value: &Value) -> bool {
    *value == Value::Bool(true)
}

fn is_empty(value: &Value) -> bool {
    match value {
        Value::String(text) => text.is_empty(),
        Value::Array(list) => list.is_empty(),
        Value::Object(map) => map.is_empty(),
        _ => false,
    }
}

fn is_none(value: &Value) -> bool {
    *value == "none"
}

fn is_medium(value: &Value) -> bool {
    *value == "medium"
}

fn is_none_or_auto(value: &Value) -> bool {
    matches!(value.as_str(), Some("none" | "auto"))
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

/// The shared fields with their types.
pub(super) const CONTROLS: &[Field] = &[
    ("temperature", is::<Option<f64>>, "a number"),
    ("top_p", is::<Option<f64>>, "a number"),
    ("top_k", is::<Option<i64>>, "a whole number"),
    ("min_p", is::<Option<f64>>, "a number"),
    ("seed", is::<Option<i64>>, "a whole number"),
    (
        "stop",
        is::<Option<StopStrings>>,
        "a string or a list of strings",
    ),
    ("user", is::<Option<String>>, "a string"),
    ("n", is::<Option<u64>>, "a whole number, 1 or more"),
    ("presence_penalty", is::<Option<f64>>, "a number"),
    ("frequency_penalty", is::<Option<f64>>, "a number"),
    ("repetition_penalty", is::<Option<f64>>, "a number"),
    (
        "logit_bias",
        is::<Option<BTreeMap<String, f64>>>,
        "an object of numbers by token id",
    ),
    ("min_tokens", is::<Option<u64>>, "a whole number"),
    ("ignore_eos", is::<Option<bool>>, "true or false"),
    (
        "stop_token_ids",
        is::<Option<Vec<u32>>>,
        "a list of token ids",
    ),
    ("priority", is::<Option<i64>>, "a whole number"),
    ("timeout", is::<Option<f64>>, "a number of seconds"),
    ("cache_salt", is::<Option<String>>, "a string"),
    ("grammar", is::<Option<String>>, "a string"),
    ("guided_grammar", is::<Option<String>>, "a string"),
    ("guided_regex", is::<Option<String>>, "a string"),
    (
        "guided_choice",
        is::<Option<Vec<String>>>,
        "a list of strings",
    ),
    (
        "structured_outputs",
        is::<Option<StructuredOutputs>>,
        "an object with one of `json`, `json_object`, `regex`, `choice`, `grammar`",
    ),
];

/// What a message begins with in the templates of this family.
const TURN: &str = "<|im_start|>";
/// Most answers to one request.
const MOST_ANSWERS: u64 = 128;

/// The shared fields of a request, as given.
#[derive(Debug)]
pub(super) struct Given {
    pub(super) temperature: Option<f64>,
    pub(super) top_p: Option<f64>,
    pub(super) top_k: Option<i64>,
    pub(super) min_p: Option<f64>,
    pub(super) seed: Option<i64>,
    pub(super) stop: Option<StopStrings>,
    pub(super) logprobs: Option<u64>,
    pub(super) user: Option<String>,
    pub(super) controls: Controls,
}

/// The shared fields of a request, in range and complete.
#[derive(Debug)]
pub(super) struct Checked {
    pub(super) sampling: SamplingParams,
    pub(super) stop: Vec<String>,
    /// Tokens that end an answer.
    pub(super) ends: Vec<u32>,
    /// Answers to each prompt.
    pub(super) count: usize,
    pub(super) priority: i64,
    pub(super) user: Option<Arc<str>>,
    pub(super) salt: Option<Arc<str>>,
    /// What an answer must look like, and the field that says so.
    pub(super) shape: Option<(Shape, &'static str)>,
    pub(super) origin: Origin,
}

impl Given {
    /// What the request says, then what the model advises; without a seed each request has its own.
    ///
    /// # Errors
    /// 400 that names the field that is out of range.
    pub(super) fn checked(self, text: &ModelText, mut origin: Origin) -> Result<Checked, ApiError> {
        let (defaults, controls) = (text.sampling, self.controls);
        let shape = grammar::shape(&controls)?;
        let sampling = SamplingFields {
            temperature: self.temperature.unwrap_or(defaults.temperature),
            top_k: self.top_k.unwrap_or(defaults.top_k),
            top_p: self.top_p.unwrap_or(defaults.top_p),
            min_p: self.min_p.unwrap_or(defaults.min_p),
            seed: self.seed.map_or_else(rand::random, i64::cast_unsigned),
            presence_penalty: controls.presence_penalty.unwrap_or(0.0),
            frequency_penalty: controls.frequency_penalty.unwrap_or(0.0),
            repetition_penalty: controls
                .repetition_penalty
                .unwrap_or(defaults.repetition_penalty),
            logit_bias: bias(controls.logit_bias.unwrap_or_default(), &text.tokenizer)?,
            min_tokens: controls.min_tokens.unwrap_or(0),
            logprobs: self.logprobs,
        };
        let count = controls.n.unwrap_or(1);
        if !(1..=MOST_ANSWERS).contains(&count) {
            let message = format!("`n` must be 1 to {MOST_ANSWERS}");
            return Err(ApiError::invalid("n", message));
        }
        if let Some(seconds) = controls.timeout {
            let timeout = Duration::try_from_secs_f64(seconds).ok();
            let Some(timeout) = timeout.filter(|timeout| !timeout.is_zero()) else {
                let message = "`timeout` must be a number of seconds above 0";
                return Err(ApiError::invalid("timeout", message));
            };
            let wanted = origin.arrived.checked_add(timeout);
            origin.deadline = wanted.map_or(origin.deadline, |wanted| wanted.min(origin.deadline));
        }
        let salt = controls.cache_salt;
        if salt.as_ref().is_some_and(String::is_empty) {
            return Err(ApiError::invalid("cache_salt", "`cache_salt` is empty"));
        }
        let more = controls.stop_token_ids.unwrap_or_default();
        known("stop_token_ids", &more, &text.tokenizer)?;
        let mut ends = more;
        if controls.ignore_eos != Some(true) {
            ends.extend(&text.eos);
        }
        Ok(Checked {
            sampling: sampling
                .checked()
                .map_err(|error| ApiError::invalid(error.field, error.to_string()))?,
            stop: stop_strings(self.stop)?,
            ends,
            count: usize::try_from(count).unwrap_or(usize::MAX),
            priority: controls.priority.unwrap_or(0),
            user: self.user.map(Arc::from),
            salt: salt.map(Arc::from),
            shape,
            origin,
        })
    }
}

impl Checked {
    /// The requests for all answers to one prompt: the same, but for what they draw.
    pub(super) fn requests(
        &self,
        model: &ServedModel,
        prompt: &[u32],
        max_tokens: usize,
        guide: &Guide,
        output: impl Fn() -> OutputOptions,
    ) -> Vec<Request> {
        let turn = model.text.tokenizer.id_of(TURN);
        let places = places(prompt, turn, self.count);
        (0..self.count)
            .map(|index| Request {
                id: self.origin.id.clone(),
                arrived: self.origin.arrived,
                deadline: self.origin.deadline,
                prompt: prompt.to_vec(),
                max_tokens,
                sampling: self.sampling.with_seed_moved_by(index as u64),
                ends: self.ends.clone(),
                guide: guide.clone(),
                score_prompt: false,
                priority: self.priority,
                user: self.user.clone(),
                places: places.clone(),
                salt: self.salt.clone(),
                output: Output::new(
                    model.text.tokenizer.clone(),
                    OutputOptions {
                        stop: self.stop.clone(),
                        min_tokens: self.sampling.min_tokens(),
                        ..output()
                    },
                ),
            })
            .collect()
    }
}

fn bias(given: BTreeMap<String, f64>, tokenizer: &Tokenizer) -> Result<Vec<(u32, f64)>, ApiError> {
    let mut bias = Vec::with_capacity(given.len());
    for (id, by) in given {
        let Ok(id) = id.parse() else {
            let message = format!("`logit_bias`: {id:?} is no token id");
            return Err(ApiError::invalid("logit_bias", message));
        };
        known("logit_bias", &[id], tokenizer)?;
        bias.push((id, by));
    }
    Ok(bias)
}

/// Refuses ids that no token has.
///
/// # Errors
/// 400 that names `param` and the id.
pub(super) fn known(param: &str, ids: &[u32], tokenizer: &Tokenizer) -> Result<(), ApiError> {
    let size = tokenizer.vocab_size();
    match ids.iter().find(|id| **id as usize >= size) {
        None => Ok(()),
        Some(id) => {
            let message = format!("there is no token {id}: ids go up to {}", size - 1);
            Err(ApiError::invalid(param, message))
        }
    }
}

/// How many tokens an answer may have, cut to what the context leaves.
///
/// # Errors
/// 400 when nothing is left, or less than the least length.
pub(super) fn max_tokens(
    wanted: Option<u64>,
    prompt_param: &'static str,
    prompt: usize,
    context: usize,
    least: u64,
) -> Result<usize, ApiError> {
    let left = context.saturating_sub(prompt);
    if left == 0 {
        let message = format!(
            "the prompt has {prompt} tokens and the context of this model is {context}, which must also hold the answer"
        );
        return Err(ApiError {
            kind: protocol::ErrorKind::ContextLengthExceeded,
            ..ApiError::invalid(prompt_param, message)
        });
    }
    let most = wanted.map_or(left, |wanted| {
        left.min(usize::try_from(wanted).unwrap_or(usize::MAX))
    });
    if least > most as u64 {
        let message = format!("`min_tokens` must be at most the {most} tokens an answer may have");
        return Err(ApiError::invalid("min_tokens", message));
    }
    Ok(most)
}

/// Refuses a bound of nothing.
///
/// # Errors
/// 400 that names the field.
pub(super) fn not_zero((param, wanted): (&'static str, Option<u64>)) -> Result<(), ApiError> {
    match wanted {
        Some(0) => Err(ApiError::invalid(
            param,
            format!("`{param}` must be 1 or more"),
        )),
        _ => Ok(()),
    }
}

/// Refuses more answers than may ever wait together.
///
/// # Errors
/// 400 that names `param`.
pub(super) fn not_too_many(param: &str, count: usize, most: usize) -> Result<(), ApiError> {
    if count > most {
        let message = format!("{count} answers are asked for, and {most} requests may wait here");
        return Err(ApiError::invalid(param, message));
    }
    Ok(())
}

/// Stop strings, at most as many as a stream can watch for without anybody noticing.
fn stop_strings(stop: Option<StopStrings>) -> Result<Vec<String>, ApiError> {
    const MOST: usize = 16;
    let stop = stop.map(StopStrings::into_vec).unwrap_or_default();
    if stop.len() > MOST {
        let message = format!("`stop` may have at most {MOST} strings");
        return Err(ApiError::invalid("stop", message));
    }
    Ok(stop)
}
