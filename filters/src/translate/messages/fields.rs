//! What becomes of each field of a messages request.

use crate::translate::fields::Fate::{Accepted, Becomes, Honoured, Refused};
use crate::translate::fields::{Field, Unsupported, is_empty};
use protocol::ApiError;
use serde_json::{Map, Value};

const UNSUPPORTED: [Unsupported; 12] = [
    Unsupported {
        name: "container",
        nothing: |_| false,
        why: "no code runs here",
        sample: r#"{"container":"c_1"}"#,
    },
    Unsupported {
        name: "mcp_servers",
        nothing: is_empty,
        why: "no other servers are asked",
        sample: r#"{"mcp_servers":[{"type":"url","url":"https://x","name":"x"}]}"#,
    },
    Unsupported {
        name: "context_management",
        nothing: edits_nothing,
        why: "a conversation is read as it is sent",
        sample: r#"{"context_management":{"edits":[{"type":"clear_tool_uses_20250919"}]}}"#,
    },
    Unsupported {
        name: "diagnostics",
        nothing: is_empty,
        why: "cache misses are not explained",
        sample: r#"{"diagnostics":{"previous_message_id":"msg_1"}}"#,
    },
    Unsupported {
        name: "inference_geo",
        nothing: |_| false,
        why: "where nodes stand is not known here",
        sample: r#"{"inference_geo":"eu"}"#,
    },
    Unsupported {
        name: "speed",
        nothing: |value| value == "standard",
        why: "there is one speed",
        sample: r#"{"speed":"fast"}"#,
    },
    Unsupported {
        name: "fallbacks",
        nothing: is_empty,
        why: "the model that is named answers; an alias can stand for another",
        sample: r#"{"fallbacks":[{"model":"other"}]}"#,
    },
    Unsupported {
        name: "fallback_credit_token",
        nothing: is_empty,
        why: "nothing is paid for",
        sample: r#"{"fallback_credit_token":"x"}"#,
    },
    Unsupported {
        name: "billing_policy",
        nothing: is_empty,
        why: "nothing is paid for",
        sample: r#"{"billing_policy":{"a":1}}"#,
    },
    Unsupported {
        name: "compaction",
        nothing: is_empty,
        why: "a conversation is read as it is sent",
        sample: r#"{"compaction":{"type":"auto"}}"#,
    },
    Unsupported {
        name: "thread",
        nothing: |value| *value == Value::Bool(false) || is_empty(value),
        why: "no conversation is kept here",
        sample: r#"{"thread":{"id":"t"}}"#,
    },
    Unsupported {
        name: "user_profile_id",
        nothing: is_empty,
        why: "there are no profiles; use `metadata.user_id`",
        sample: r#"{"user_profile_id":"uprof_1"}"#,
    },
];

/// Fields without a bearing on the answer.
const HARMLESS: [&str; 2] = ["cache_control", "service_tier"];

/// Fields of a chat request that this API spells otherwise; let through, they would stand there twice.
const SPELT: [(&str, &str); 9] = [
    ("stop", "stop_sequences"),
    ("user", "metadata.user_id"),
    ("reasoning_effort", "output_config.effort"),
    ("response_format", "output_config.format"),
    ("thinking_budget", "thinking.budget_tokens"),
    ("enable_thinking", "thinking"),
    ("chat_template_kwargs", "thinking"),
    (
        "parallel_tool_calls",
        "tool_choice.disable_parallel_tool_use",
    ),
    ("stream_options", "stream"),
];

/// Nothing is edited when every edit keeps everything.
fn edits_nothing(value: &Value) -> bool {
    value["edits"]
        .as_array()
        .is_none_or(|edits| edits.iter().all(|edit| edit["keep"] == "all"))
}

/// Refuses what cannot be honoured. What nobody here knows goes on to the node, which counts it or honours it.
///
/// # Errors
/// 400 that names the first field at fault.
pub(super) fn pass_on(mut extra: Map<String, Value>) -> Result<Map<String, Value>, ApiError> {
    for name in HARMLESS {
        extra.shift_remove(name);
    }
    for unsupported in UNSUPPORTED {
        let Some(value) = extra.shift_remove(unsupported.name) else {
            continue;
        };
        if !value.is_null() && !(unsupported.nothing)(&value) {
            let message = format!("{}: {}", unsupported.name, unsupported.why);
            return Err(ApiError::invalid(unsupported.name, message));
        }
    }
    for (name, here) in SPELT {
        if extra.contains_key(name) {
            let message = format!("{name}: is no field of this API; use `{here}`");
            return Err(ApiError::invalid(name, message));
        }
    }
    Ok(extra)
}

/// What this API calls the field that a node has found fault with.
pub(super) fn name_here(param: &str) -> String {
    let top = param.split(['.', '[']).next().unwrap_or(param);
    if let Some((_, here)) = SPELT.iter().find(|(chat, _)| *chat == top) {
        return (*here).to_owned();
    }
    match top {
        "max_completion_tokens" => "max_tokens".into(),
        "messages" => "messages".into(), // a turn may be several messages there: its place would mislead
        "tools" => param
            .replace(".function", "")
            .replace('[', ".")
            .replace(']', "")
            .replace("parameters", "input_schema"),
        _ => param.into(),
    }
}

/// Every field of a messages request.
#[must_use]
pub fn rows() -> Vec<Field> {
    let refused = UNSUPPORTED.map(|field| Field::new(field.name, Refused(field.why), field.sample));
    [ROWS, &refused].concat()
}

const ROWS: &[Field] = &[
    Field::new("model", Becomes("model"), r#"{"model":"x"}"#),
    Field::new("max_tokens", Becomes("max_tokens"), r#"{"max_tokens":7}"#),
    Field::new("stream", Becomes("stream"), r#"{"stream":true}"#),
    Field::new(
        "system",
        Becomes("messages[].role"),
        r#"{"system":[{"type":"text","text":"Be brief."}]}"#,
    ),
    Field::new(
        "temperature",
        Becomes("temperature"),
        r#"{"temperature":0.5}"#,
    ),
    Field::new("top_p", Becomes("top_p"), r#"{"top_p":0.5}"#),
    Field::new("top_k", Becomes("top_k"), r#"{"top_k":5}"#),
    Field::new(
        "stop_sequences",
        Becomes("stop"),
        r#"{"stop_sequences":["x"]}"#,
    ),
    Field::new(
        "metadata.user_id",
        Becomes("user"),
        r#"{"metadata":{"user_id":"u"}}"#,
    ),
    Field::new(
        "thinking (`enabled`, `adaptive`, `disabled`)",
        Becomes("chat_template_kwargs.enable_thinking"),
        r#"{"thinking":{"type":"adaptive"}}"#,
    ),
    Field::new(
        "thinking.budget_tokens",
        Becomes("thinking_budget"),
        r#"{"thinking":{"type":"enabled","budget_tokens":2048}}"#,
    ),
    Field::new(
        "thinking.type (`between_tools`)",
        Refused("a model thinks before each answer or not at all"),
        r#"{"thinking":{"type":"between_tools"}}"#,
    ),
    Field::new(
        "thinking.display (`summarized`)",
        Accepted("thinking is shown whole"),
        r#"{"thinking":{"type":"adaptive","display":"summarized"}}"#,
    ),
    Field::new(
        "thinking.display (`omitted`)",
        Refused("there is no signature that could stand for the thinking"),
        r#"{"thinking":{"type":"adaptive","display":"omitted"}}"#,
    ),
    Field::new(
        "output_config.effort",
        Becomes("reasoning_effort"),
        r#"{"output_config":{"effort":"low"}}"#,
    ),
    Field::new(
        "output_config.format",
        Becomes("response_format"),
        r#"{"output_config":{"format":{"type":"json_schema","schema":{"type":"object"}}}}"#,
    ),
    Field::new(
        "output_format",
        Becomes("response_format"),
        r#"{"output_format":{"type":"json_schema","schema":{"type":"object"}}}"#,
    ),
    Field::new(
        "tools[].name, description, input_schema",
        Becomes("tools[].function.parameters"),
        r#"{"tools":[{"name":"t","description":"d","input_schema":{"type":"object"}}]}"#,
    ),
    Field::new(
        "tools[].strict",
        Becomes("tools[].function.strict"),
        r#"{"tools":[{"name":"t","input_schema":{},"strict":true}]}"#,
    ),
    Field::new(
        "tools[].input_examples",
        Becomes("tools[].function.description"),
        r#"{"tools":[{"name":"t","input_schema":{},"input_examples":[{"a":1}]}]}"#,
    ),
    Field::new(
        "tools[].eager_input_streaming",
        Accepted("arguments are streamed as the node sends them"),
        r#"{"tools":[{"name":"t","input_schema":{},"eager_input_streaming":true}]}"#,
    ),
    Field::new(
        "tools[].defer_loading",
        Refused("there is no search for tools"),
        r#"{"tools":[{"name":"t","input_schema":{},"defer_loading":true}]}"#,
    ),
    Field::new(
        "tools[].allowed_callers",
        Refused("only `direct` is possible: no code runs here"),
        r#"{"tools":[{"name":"t","input_schema":{},"allowed_callers":["code_execution_20250825"]}]}"#,
    ),
    Field::new(
        "tools[].type",
        Refused("other than `custom`: its vendor's own"),
        r#"{"tools":[{"name":"web_search","type":"web_search_20250305"}]}"#,
    ),
    Field::new(
        "tool_choice (`auto`, `any`, `tool`, `none`)",
        Becomes("tool_choice"),
        r#"{"tool_choice":{"type":"any"}}"#,
    ),
    Field::new(
        "tool_choice.disable_parallel_tool_use",
        Becomes("parallel_tool_calls"),
        r#"{"tool_choice":{"type":"auto","disable_parallel_tool_use":true}}"#,
    ),
    Field::new(
        "messages[].role",
        Honoured("`user`, `assistant`, `system`; `developer` is `system`"),
        r#"{"messages":[{"role":"developer","content":"x"}]}"#,
    ),
    Field::new(
        "messages[] (an `assistant` turn at the end)",
        Refused("answers are begun here, not continued"),
        r#"{"messages":[{"role":"user","content":"x"},{"role":"assistant","content":"y"}]}"#,
    ),
    Field::new(
        "messages[].content (null or a string)",
        Becomes("messages[].content"),
        r#"{"messages":[{"role":"assistant","content":null},{"role":"user","content":"x"}]}"#,
    ),
    Field::new(
        "text.text",
        Becomes("messages[].content[].text"),
        r#"{"messages":[{"role":"user","content":[{"type":"text","text":"x"}]}]}"#,
    ),
    Field::new(
        "text.citations",
        Accepted("where an earlier answer had its words from does not change them"),
        r#"{"messages":[{"role":"user","content":[{"type":"text","text":"x","citations":[]}]}]}"#,
    ),
    Field::new(
        "image.source (`base64`, `url`)",
        Becomes("messages[].content[].image_url"),
        r#"{"messages":[{"role":"user","content":[{"type":"image","source":{"type":"base64","media_type":"image/png","data":"AA=="}}]}]}"#,
    ),
    Field::new(
        "image.source.type (`file`)",
        Refused("there is no store of files"),
        r#"{"messages":[{"role":"user","content":[{"type":"image","source":{"type":"file","file_id":"f"}}]}]}"#,
    ),
    Field::new(
        "image.transformations",
        Refused("images are handed on as they are"),
        r#"{"messages":[{"role":"user","content":[{"type":"image","source":{"type":"url","url":"https://x"},"transformations":{"oversized_image":"error"}}]}]}"#,
    ),
    Field::new(
        "document.source (`text`, `content`), title, context",
        Becomes("messages[].content[].text"),
        r#"{"messages":[{"role":"user","content":[{"type":"document","title":"T","source":{"type":"text","media_type":"text/plain","data":"x"}}]}]}"#,
    ),
    Field::new(
        "document.source (`base64`, `url`)",
        Refused("PDFs cannot be read here; send their text"),
        r#"{"messages":[{"role":"user","content":[{"type":"document","source":{"type":"base64","media_type":"application/pdf","data":"AA=="}}]}]}"#,
    ),
    Field::new(
        "document.citations",
        Refused("when enabled: answers here cite nothing"),
        r#"{"messages":[{"role":"user","content":[{"type":"document","citations":{"enabled":true},"source":{"type":"text","data":"x"}}]}]}"#,
    ),
    Field::new(
        "search_result.source, title, content",
        Becomes("messages[].content[].text"),
        r#"{"messages":[{"role":"user","content":[{"type":"search_result","title":"T","source":"https://x","content":[{"type":"text","text":"x"}]}]}]}"#,
    ),
    Field::new(
        "tool_use.id, name, input",
        Becomes("messages[].tool_calls"),
        r#"{"messages":[{"role":"assistant","content":[{"type":"tool_use","id":"c","name":"t","input":{"a":1}}]},{"role":"user","content":"x"}]}"#,
    ),
    Field::new(
        "tool_use.toolset_name",
        Refused("toolsets run on their vendor's servers"),
        r#"{"messages":[{"role":"assistant","content":[{"type":"tool_use","id":"c","name":"t","input":{},"toolset_name":"browser"}]},{"role":"user","content":"x"}]}"#,
    ),
    Field::new(
        "tool_result.tool_use_id, content, is_error",
        Becomes("messages[].tool_call_id"),
        r#"{"messages":[{"role":"user","content":[{"type":"tool_result","tool_use_id":"c","is_error":true,"content":[{"type":"text","text":"x"}]}]}]}"#,
    ),
    Field::new(
        "thinking.thinking (in history)",
        Becomes("messages[].reasoning_content"),
        r#"{"messages":[{"role":"assistant","content":[{"type":"thinking","thinking":"x","signature":""}]},{"role":"user","content":"x"}]}"#,
    ),
    Field::new(
        "thinking.signature (in history)",
        Becomes("messages[].thinking_blocks"),
        r#"{"messages":[{"role":"assistant","content":[{"type":"thinking","thinking":"x","signature":"s"}]},{"role":"user","content":"x"}]}"#,
    ),
    Field::new(
        "redacted_thinking.data",
        Becomes("messages[].thinking_blocks"),
        r#"{"messages":[{"role":"assistant","content":[{"type":"redacted_thinking","data":"x"}]},{"role":"user","content":"x"}]}"#,
    ),
    Field::new(
        "other blocks",
        Refused("what tools on a vendor's servers wrote means nothing here"),
        r#"{"messages":[{"role":"user","content":[{"type":"container_upload","file_id":"f"}]}]}"#,
    ),
    Field::new(
        "cache_control",
        Accepted("at any place: nodes keep what they can by themselves"),
        r#"{"cache_control":{"type":"ephemeral"},"messages":[{"role":"user","content":[{"type":"text","text":"x","cache_control":{"type":"ephemeral","ttl":"1h"}}]}]}"#,
    ),
    Field::new(
        "service_tier",
        Accepted("there is one tier"),
        r#"{"service_tier":"auto"}"#,
    ),
    Field::new(
        "unknown fields",
        Honoured(
            "they go on to the node, which may know them (`seed`, `min_p`); others it counts in `x-unknown-fields`",
        ),
        r#"{"mirostat":2}"#,
    ),
];
