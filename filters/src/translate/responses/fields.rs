//! What becomes of each field of a responses request.

use crate::translate::fields::Fate::{Accepted, Becomes, Honoured, Refused};
use crate::translate::fields::{Field, Unsupported, is_empty};
use protocol::ApiError;
use serde_json::{Map, Value};

const UNSUPPORTED: [Unsupported; 9] = [
    Unsupported {
        name: "background",
        nothing: |value| *value == Value::Bool(false),
        why: "an answer is given while its client waits; stream it instead",
        sample: r#"{"background":true}"#,
    },
    Unsupported {
        name: "background_options",
        nothing: is_empty,
        why: "there are no background responses",
        sample: r#"{"background_options":{"completion_window":"2h"}}"#,
    },
    Unsupported {
        name: "conversation",
        nothing: is_empty,
        why: "there are no conversations here; use `previous_response_id`",
        sample: r#"{"conversation":"conv_1"}"#,
    },
    Unsupported {
        name: "prompt",
        nothing: is_empty,
        why: "no prompts are kept here",
        sample: r#"{"prompt":{"id":"pmpt_1"}}"#,
    },
    Unsupported {
        name: "truncation",
        nothing: |value| value == "disabled",
        why: "a conversation is read as it is sent, and refused where it is too long",
        sample: r#"{"truncation":"auto"}"#,
    },
    Unsupported {
        name: "context_management",
        nothing: is_empty,
        why: "a conversation is read as it is sent",
        sample: r#"{"context_management":[{"type":"compaction"}]}"#,
    },
    Unsupported {
        name: "moderation",
        nothing: is_empty,
        why: "nothing is moderated here",
        sample: r#"{"moderation":{"model":"x"}}"#,
    },
    Unsupported {
        name: "image",
        nothing: |value| value["context_compression"] != "enabled",
        why: "images are not compressed",
        sample: r#"{"image":{"context_compression":"enabled"}}"#,
    },
    Unsupported {
        name: "prompt_cache_options",
        nothing: is_hint,
        why: "with `prewarm` or `comparison_response_id`: nodes keep what they can by themselves and do not say why not",
        sample: r#"{"prompt_cache_options":{"prewarm":true}}"#,
    },
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
const SPELT: [(&str, &str); 7] = [
    ("messages", "input"),
    ("max_tokens", "max_output_tokens"),
    ("max_completion_tokens", "max_output_tokens"),
    ("response_format", "text.format"),
    ("reasoning_effort", "reasoning.effort"),
    ("functions", "tools"),
    ("logprobs", "include"),
];

/// Asks for the log probabilities of an answer's tokens.
pub(super) const LOGPROBS: &str = "message.output_text.logprobs";

/// What may be asked to be included; all but log probabilities always is.
const INCLUDED: [&str; 3] = [
    LOGPROBS,
    "message.input_image.image_url",
    // it serves to send thinking back; here thinking comes in the clear, and goes back in the clear
    "reasoning.encrypted_content",
];

/// Whether these options only say how long a cache may last.
fn is_hint(value: &Value) -> bool {
    value["prewarm"] != true && value["comparison_response_id"].is_null()
}

/// Refuses what cannot be honoured. What nobody here knows goes on to the node, which counts it or honours it.
///
/// # Errors
/// 400 that names the first field at fault.
pub(super) fn pass_on(mut extra: Map<String, Value>) -> Result<Map<String, Value>, ApiError> {
    for unsupported in UNSUPPORTED {
        let name = unsupported.name;
        let Some(value) = extra.shift_remove(name) else {
            continue;
        };
        if !value.is_null() && !(unsupported.nothing)(&value) {
            let message = format!("`{name}` is not supported: {}", unsupported.why);
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

/// Every field of a responses request.
#[must_use]
pub fn rows() -> Vec<Field> {
    let refused = UNSUPPORTED.map(|field| Field::new(field.name, Refused(field.why), field.sample));
    [ROWS, &refused].concat()
}

const ROWS: &[Field] = &[
    Field::new("model", Becomes("model"), r#"{"model":"x"}"#),
    Field::new(
        "input (a string)",
        Becomes("messages[].content"),
        r#"{"input":"other"}"#,
    ),
    Field::new(
        "input[] (`message`)",
        Becomes("messages[].role"),
        r#"{"input":[{"role":"developer","content":[{"type":"input_text","text":"x"}]}]}"#,
    ),
    Field::new(
        "input[].content[].type (`input_image`)",
        Becomes("messages[].content[].image_url"),
        r#"{"input":[{"role":"user","content":[{"type":"input_image","image_url":"https://x"}]}]}"#,
    ),
    Field::new(
        "input[0].content[0].image_url (by `file_id`)",
        Refused("no files are kept here"),
        r#"{"input":[{"role":"user","content":[{"type":"input_image","file_id":"f"}]}]}"#,
    ),
    Field::new(
        "input[0].content[0].type (`input_file`, `input_audio`)",
        Refused("only text and images are read"),
        r#"{"input":[{"role":"user","content":[{"type":"input_file","file_id":"f"}]}]}"#,
    ),
    Field::new(
        "input[] (`function_call`)",
        Becomes("messages[].tool_calls"),
        r#"{"input":[{"type":"function_call","call_id":"c","name":"t","arguments":"{}"}]}"#,
    ),
    Field::new(
        "input[] (`function_call_output`)",
        Becomes("messages[].tool_call_id"),
        r#"{"input":[{"type":"function_call_output","call_id":"c","output":"x"}]}"#,
    ),
    Field::new(
        "input[] (`reasoning`)",
        Becomes("messages[].reasoning_content"),
        r#"{"input":[{"type":"reasoning","id":"rs_1","summary":[{"type":"summary_text","text":"x"}]},{"role":"user","content":"y"}]}"#,
    ),
    Field::new(
        "input[] (`reasoning` with `encrypted_content` alone)",
        Accepted("only its vendor's models can read it"),
        r#"{"input":[{"type":"reasoning","id":"rs_1","summary":[],"encrypted_content":"x"},{"role":"user","content":"y"}]}"#,
    ),
    Field::new(
        "input[0].type (other items)",
        Refused("what tools on a vendor's servers wrote means nothing here"),
        r#"{"input":[{"type":"web_search_call","id":"ws_1"}]}"#,
    ),
    Field::new(
        "instructions",
        Becomes("messages[].role"),
        r#"{"instructions":"Be brief."}"#,
    ),
    Field::new(
        "previous_response_id",
        Honoured(
            "the conversation so far is put before `input`; `instructions` of earlier turns are not",
        ),
        r#"{"previous_response_id":"resp_1"}"#,
    ),
    Field::new(
        "store",
        Honoured("true where absent; see `[responses]` of `conf/cortex.toml`"),
        r#"{"store":false}"#,
    ),
    Field::new("stream", Becomes("stream"), r#"{"stream":true}"#),
    Field::new(
        "stream_options.include_obfuscation",
        Accepted("events are not padded"),
        r#"{"stream_options":{"include_obfuscation":true}}"#,
    ),
    Field::new(
        "max_output_tokens",
        Becomes("max_tokens"),
        r#"{"max_output_tokens":7}"#,
    ),
    Field::new(
        "max_tool_calls",
        Accepted("it bounds tools on a vendor's servers, of which there are none"),
        r#"{"max_tool_calls":3}"#,
    ),
    Field::new(
        "temperature",
        Becomes("temperature"),
        r#"{"temperature":0.5}"#,
    ),
    Field::new("top_p", Becomes("top_p"), r#"{"top_p":0.5}"#),
    Field::new(
        "tools[] (`function`)",
        Becomes("tools[].function.parameters"),
        r#"{"tools":[{"type":"function","name":"t","parameters":{"type":"object"}}]}"#,
    ),
    Field::new(
        "tools[].strict",
        Becomes("tools[].function.strict"),
        r#"{"tools":[{"type":"function","name":"t","parameters":{},"strict":true}]}"#,
    ),
    Field::new(
        "tools[0].type (other kinds)",
        Refused("only functions work here"),
        r#"{"tools":[{"type":"web_search"}]}"#,
    ),
    Field::new(
        "tool_choice (`auto`, `none`, `required`, a function)",
        Becomes("tool_choice"),
        r#"{"tool_choice":"required"}"#,
    ),
    Field::new(
        "tool_choice (`allowed_tools`)",
        Becomes("tools"),
        r#"{"tools":[{"type":"function","name":"t"},{"type":"function","name":"u"}],"tool_choice":{"type":"allowed_tools","mode":"auto","tools":[{"type":"function","name":"u"}]}}"#,
    ),
    Field::new(
        "tool_choice (other kinds)",
        Refused("only functions work here"),
        r#"{"tool_choice":{"type":"web_search_preview"}}"#,
    ),
    Field::new(
        "parallel_tool_calls",
        Becomes("parallel_tool_calls"),
        r#"{"parallel_tool_calls":false}"#,
    ),
    Field::new(
        "text.format (`text`)",
        Honoured(""),
        r#"{"text":{"format":{"type":"text"}}}"#,
    ),
    Field::new(
        "text.format (`json_object`, `json_schema`)",
        Becomes("response_format"),
        r#"{"text":{"format":{"type":"json_object"}}}"#,
    ),
    Field::new(
        "text.verbosity",
        Refused("other than `medium`: say in `instructions` how long answers are to be"),
        r#"{"text":{"verbosity":"low"}}"#,
    ),
    Field::new(
        "reasoning.effort",
        Becomes("reasoning_effort"),
        r#"{"reasoning":{"effort":"low"}}"#,
    ),
    Field::new(
        "reasoning.summary (`auto`, `detailed`)",
        Honoured("thinking comes as a summary, whole; without it, as `reasoning_text`"),
        r#"{"reasoning":{"summary":"auto"}}"#,
    ),
    Field::new(
        "reasoning.summary (`concise`)",
        Refused("nobody here can shorten thinking"),
        r#"{"reasoning":{"summary":"concise"}}"#,
    ),
    Field::new(
        "reasoning.mode",
        Refused("other than `standard`: there is one way of thinking"),
        r#"{"reasoning":{"mode":"pro"}}"#,
    ),
    Field::new(
        "metadata",
        Honoured("repeated in the answer"),
        r#"{"metadata":{"a":"b"}}"#,
    ),
    Field::new(
        "include (`reasoning.encrypted_content`)",
        Accepted("thinking comes in the clear, and goes back in the clear"),
        r#"{"include":["reasoning.encrypted_content"]}"#,
    ),
    Field::new(
        "include (`message.input_image.image_url`)",
        Honoured("it always is"),
        r#"{"include":["message.input_image.image_url"]}"#,
    ),
    Field::new(
        "include (`message.output_text.logprobs`)",
        Becomes("logprobs"),
        r#"{"include":["message.output_text.logprobs"]}"#,
    ),
    Field::new(
        "include",
        Refused("others: there is none of it"),
        r#"{"include":["file_search_call.results"]}"#,
    ),
    Field::new(
        "top_logprobs",
        Becomes("top_logprobs"),
        r#"{"top_logprobs":3}"#,
    ),
    Field::new("user", Becomes("user"), r#"{"user":"u"}"#),
    Field::new(
        "safety_identifier",
        Becomes("safety_identifier"),
        r#"{"safety_identifier":"s"}"#,
    ),
    Field::new(
        "prompt_cache_key",
        Becomes("prompt_cache_key"),
        r#"{"prompt_cache_key":"k"}"#,
    ),
    Field::new(
        "prompt_cache_retention",
        Accepted("nodes keep what they can by themselves"),
        r#"{"prompt_cache_retention":"24h"}"#,
    ),
    Field::new(
        "service_tier",
        Accepted("there is one tier"),
        r#"{"service_tier":"auto"}"#,
    ),
    Field::new(
        "access_programs",
        Accepted("there are none"),
        r#"{"access_programs":{"cyber":"standard"}}"#,
    ),
    Field::new(
        "unknown fields",
        Honoured(
            "they go on to the node, which may know them (`seed`, `min_p`); others it counts in `x-unknown-fields`",
        ),
        r#"{"seed":1}"#,
    ),
];
