//! The form of Hermes, Qwen2.5 and Qwen3: `<tool_call>\n{"name": NAME, "arguments": {…}}\n</tool_call>`.

use super::{Block, Call};
use crate::text::grammar::{lark_json, lark_text};
use protocol::chat::Tool;
use serde::Deserialize;
use serde_json::{Map, Value, json};

#[derive(Deserialize)]
struct Written {
    name: String,
    #[serde(default)]
    arguments: Value,
}

/// What the inside of a block is.
pub(super) fn parse(block: &str, tools: &[Tool]) -> Block {
    let written: Written = match serde_json::from_str(block.trim()) {
        Ok(written) => written,
        // A string in it may hold the tag that would end the block.
        Err(error) if error.is_eof() => return Block::Open,
        Err(_) => return Block::Text,
    };
    let arguments = match written.arguments {
        Value::Object(arguments) => arguments,
        Value::Null => Map::new(),
        // Some models write the object as a string.
        Value::String(text) => match serde_json::from_str(&text) {
            Ok(arguments) => arguments,
            Err(_) => return Block::Text,
        },
        _ => return Block::Text,
    };
    if !tools.iter().any(|tool| tool.function.name == written.name) {
        return Block::Text;
    }
    Block::Call(Call {
        name: written.name,
        arguments: Value::Object(arguments).to_string(),
    })
}

/// The inside of a block as a rule of a Lark grammar.
pub(super) fn rules(start: &str, tool: &Tool) -> String {
    let parameters = tool.function.parameters.clone();
    let mut arguments = parameters.unwrap_or_else(
        || json!({"type": "object", "properties": {}, "additionalProperties": false}),
    );
    let definitions = arguments
        .as_object_mut()
        .and_then(|arguments| arguments.remove("$defs"));
    let mut schema = json!({
        "type": "object",
        "properties": {"name": {"const": tool.function.name}, "arguments": arguments},
        "required": ["name", "arguments"],
        "additionalProperties": false,
    });
    if let Some(definitions) = definitions {
        schema["$defs"] = definitions;
    }
    let line = lark_text("\n");
    format!(
        "{start}: {line} {start}_json {line}\n{start}_json: {}\n",
        lark_json(schema)
    )
}
