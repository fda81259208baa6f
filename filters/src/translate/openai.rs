//! What becomes of each field of OpenAI's chat and text completions. They pass as they are, so it is a node that honours or
//! refuses them: these tables say what a neuron does, and a test asks one.

use super::fields::Fate::{Accepted, Honoured, Refused};
use super::fields::Field;

/// Every field of chat completions.
#[must_use]
pub fn chat() -> Vec<Field> {
    [CHAT, BOTH].concat()
}

/// Every field of text completions.
#[must_use]
pub fn completions() -> Vec<Field> {
    [COMPLETIONS, BOTH].concat()
}

/// What chat completions alone have, or have otherwise.
const CHAT: &[Field] = &[
    Field::new(
        "messages",
        Honoured(
            "roles system, developer (both at any place), user, assistant, tool; content null, a string or text parts",
        ),
        r#"{"messages":[{"role":"user","content":[{"type":"text","text":"x"}]},{"role":"assistant","content":null,"tool_calls":[{"id":"c","type":"function","function":{"name":"t","arguments":"{}"}}]},{"role":"tool","tool_call_id":"c","content":"y"}]}"#,
    ),
    Field::new(
        "messages[].content",
        Refused("other parts than text: images, sounds and files are not read yet"),
        r#"{"messages":[{"role":"user","content":[{"type":"image_url","image_url":{"url":"data:image/png;base64,AA=="}}]}]}"#,
    ),
    Field::new(
        "messages[].reasoning_content",
        Honoured(
            "an extension: the thinking of an earlier turn, as far as the model's template shows it",
        ),
        r#"{"messages":[{"role":"user","content":"x"},{"role":"assistant","content":"y","reasoning_content":"z"},{"role":"user","content":"x"}]}"#,
    ),
    Field::new(
        "messages[].thinking_blocks",
        Accepted(
            "an extension: signatures and encrypted thinking say nothing to the models here, which read `reasoning_content`",
        ),
        r#"{"messages":[{"role":"user","content":"x"},{"role":"assistant","content":"y","thinking_blocks":[{"type":"thinking","thinking":"z","signature":null},{"type":"redacted_thinking","data":"d"}]},{"role":"user","content":"x"}]}"#,
    ),
    Field::new("max_tokens", Honoured(""), r#"{"max_tokens":2}"#),
    Field::new(
        "max_completion_tokens",
        Honoured(""),
        r#"{"max_completion_tokens":2}"#,
    ),
    Field::new(
        "tools",
        Honoured("functions; an empty list is none"),
        r#"{"tools":[{"type":"function","function":{"name":"t","parameters":{"type":"object"}}}]}"#,
    ),
    Field::new(
        "tool_choice (`auto`, `none`)",
        Honoured(""),
        r#"{"tool_choice":"auto"}"#,
    ),
    Field::new(
        "parallel_tool_calls",
        Honoured(""),
        r#"{"parallel_tool_calls":false}"#,
    ),
    Field::new(
        "reasoning_effort",
        Honoured("`none` switches thinking off, others on"),
        r#"{"reasoning_effort":"low"}"#,
    ),
    Field::new(
        "chat_template_kwargs",
        Honoured("an extension"),
        r#"{"chat_template_kwargs":{"enable_thinking":false}}"#,
    ),
    Field::new(
        "tools[0].function.strict",
        Honoured("arguments follow the schema"),
        r#"{"tools":[{"type":"function","function":{"name":"t","parameters":{"type":"object","properties":{},"additionalProperties":false},"strict":true}}]}"#,
    ),
    Field::new(
        "tool_choice (`required`, by name)",
        Honoured("by a grammar"),
        r#"{"tools":[{"type":"function","function":{"name":"t","parameters":{"type":"object","properties":{},"additionalProperties":false}}}],"tool_choice":"required"}"#,
    ),
    Field::new(
        "response_format",
        Honoured("`text`, `json_object`, `json_schema`; after the thinking block"),
        r#"{"response_format":{"type":"json_object"}}"#,
    ),
    Field::new("logprobs", Honoured(""), r#"{"logprobs":true}"#),
    Field::new(
        "top_logprobs",
        Honoured("up to 20, with `logprobs`"),
        r#"{"logprobs":true,"top_logprobs":3}"#,
    ),
    Field::new(
        "thinking_budget",
        Honoured("an extension: the thinking block is closed after so many tokens"),
        r#"{"thinking_budget":5}"#,
    ),
    Field::new(
        "functions",
        Refused("use `tools`"),
        r#"{"functions":[{"name":"t"}]}"#,
    ),
    Field::new(
        "function_call",
        Refused("use `tool_choice`"),
        r#"{"function_call":{"name":"t"}}"#,
    ),
    Field::new(
        "modalities",
        Refused("other than text: answers are text"),
        r#"{"modalities":["audio"]}"#,
    ),
    Field::new(
        "audio",
        Refused("answers are text"),
        r#"{"audio":{"voice":"x","format":"wav"}}"#,
    ),
    Field::new(
        "prediction",
        Refused("predicted outputs are not used"),
        r#"{"prediction":{"type":"content","content":"x"}}"#,
    ),
    Field::new(
        "web_search_options",
        Refused("there is no web search"),
        r#"{"web_search_options":{"search_context_size":"low"}}"#,
    ),
    Field::new(
        "store",
        Refused("when true: nothing is stored"),
        r#"{"store":true}"#,
    ),
    Field::new(
        "metadata",
        Accepted("it goes with what is stored, and nothing is"),
        r#"{"metadata":{"a":"b"}}"#,
    ),
    Field::new(
        "service_tier",
        Accepted("there is one tier"),
        r#"{"service_tier":"auto"}"#,
    ),
    Field::new(
        "safety_identifier",
        Accepted("nothing depends on it"),
        r#"{"safety_identifier":"x"}"#,
    ),
    Field::new(
        "prompt_cache_key",
        Accepted("nodes keep what they can by themselves"),
        r#"{"prompt_cache_key":"x"}"#,
    ),
    Field::new(
        "prompt_cache_retention",
        Accepted("nodes keep what they can by themselves"),
        r#"{"prompt_cache_retention":"24h"}"#,
    ),
    Field::new(
        "prompt_cache_options",
        Accepted("as an unknown field"),
        r#"{"prompt_cache_options":{}}"#,
    ),
    Field::new(
        "moderation",
        Accepted("as an unknown field"),
        r#"{"moderation":{}}"#,
    ),
    Field::new(
        "verbosity",
        Refused("other than `medium`: the model is not told of it"),
        r#"{"verbosity":"low"}"#,
    ),
];

/// What text completions alone have, or have otherwise.
const COMPLETIONS: &[Field] = &[
    Field::new(
        "prompt",
        Honoured("a string, a list of strings, token ids or a list of lists of them"),
        r#"{"prompt":["x","y"]}"#,
    ),
    Field::new(
        "max_tokens",
        Honoured("16 when absent"),
        r#"{"max_tokens":2}"#,
    ),
    Field::new(
        "logprobs",
        Honoured("up to 20; with `echo` those of the prompt too"),
        r#"{"logprobs":3}"#,
    ),
    Field::new("echo", Honoured(""), r#"{"echo":true}"#),
    Field::new(
        "best_of",
        Refused("one answer is given per request"),
        r#"{"best_of":2}"#,
    ),
    Field::new(
        "suffix",
        Refused("there is no text after the answer"),
        r#"{"suffix":"x"}"#,
    ),
];

/// What both have.
const BOTH: &[Field] = &[
    Field::new(
        "model",
        Honoured("an alias is replaced by its model's id"),
        "{}",
    ),
    Field::new("stream", Honoured(""), r#"{"stream":true}"#),
    Field::new(
        "stream_options.include_usage",
        Honoured("asked of the node in any case; told to those who ask"),
        r#"{"stream":true,"stream_options":{"include_usage":true}}"#,
    ),
    Field::new("temperature", Honoured(""), r#"{"temperature":0.5}"#),
    Field::new("top_p", Honoured(""), r#"{"top_p":0.5}"#),
    Field::new("top_k", Honoured("an extension"), r#"{"top_k":5}"#),
    Field::new("min_p", Honoured("an extension"), r#"{"min_p":0.1}"#),
    Field::new("seed", Honoured(""), r#"{"seed":1}"#),
    Field::new(
        "stop",
        Honoured("a string or up to 16"),
        r#"{"stop":["x"]}"#,
    ),
    Field::new(
        "user",
        Honoured("requests that wait begin in turns, a user's one after another user's"),
        r#"{"user":"u"}"#,
    ),
    Field::new("n", Honoured("the prompt is computed once"), r#"{"n":2}"#),
    Field::new("logit_bias", Honoured(""), r#"{"logit_bias":{"1":2}}"#),
    Field::new(
        "frequency_penalty",
        Honoured(""),
        r#"{"frequency_penalty":1}"#,
    ),
    Field::new(
        "presence_penalty",
        Honoured(""),
        r#"{"presence_penalty":1}"#,
    ),
    Field::new(
        "repetition_penalty",
        Honoured("an extension"),
        r#"{"repetition_penalty":1.1}"#,
    ),
    Field::new(
        "min_tokens",
        Honoured("an extension"),
        r#"{"min_tokens":1}"#,
    ),
    Field::new(
        "ignore_eos",
        Honoured("an extension"),
        r#"{"ignore_eos":true}"#,
    ),
    Field::new(
        "stop_token_ids",
        Honoured("an extension"),
        r#"{"stop_token_ids":[3]}"#,
    ),
    Field::new("priority", Honoured("an extension"), r#"{"priority":1}"#),
    Field::new(
        "timeout",
        Honoured("an extension: seconds"),
        r#"{"timeout":30}"#,
    ),
    Field::new(
        "cache_salt",
        Honoured("an extension"),
        r#"{"cache_salt":"x"}"#,
    ),
    Field::new(
        "guided_choice",
        Honoured("an extension"),
        r#"{"guided_choice":["a","b"]}"#,
    ),
    Field::new(
        "guided_regex",
        Honoured("an extension"),
        r#"{"guided_regex":"[a-z]+"}"#,
    ),
    Field::new(
        "guided_grammar",
        Honoured("an extension, as `grammar`: Lark"),
        r#"{"guided_grammar":"start: /[a-z]+/"}"#,
    ),
    Field::new(
        "unknown fields",
        Accepted("counted in the header `x-unknown-fields`"),
        r#"{"mirostat":2}"#,
    ),
];
