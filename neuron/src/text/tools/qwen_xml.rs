//! The form of Qwen3.5 and Qwen3-Coder:
//! `<tool_call>\n<function=NAME>\n<parameter=KEY>\nVALUE\n</parameter>\n</function>\n</tool_call>`.

use super::{Block, Call};
use crate::text::grammar::{lark_json, lark_text};
use protocol::chat::Tool;
use serde_json::{Map, Value};

/// What the inside of a block is.
pub(super) fn parse(block: &str, tools: &[Tool]) -> Block {
    let Some(body) = block.trim().strip_prefix("<function=") else {
        return Block::Text;
    };
    let Some((name, body)) = body.split_once('>') else {
        return Block::Text;
    };
    let name = name.trim();
    let Some(tool) = tools.iter().find(|tool| tool.function.name == name) else {
        return Block::Text;
    };
    let mut body = body.trim_start();
    let mut arguments = Map::new();
    while let Some(rest) = body.strip_prefix("<parameter=") {
        let Some((key, rest)) = rest.split_once('>') else {
            return Block::Text;
        };
        let Some((value, rest)) = rest.split_once("</parameter>") else {
            // A value may hold the tag that would end the block.
            return Block::Open;
        };
        // One line break on each side belongs to the form; the rest is the value's own.
        let value = value.strip_prefix('\n').unwrap_or(value);
        let value = value.strip_suffix('\n').unwrap_or(value);
        arguments.insert(key.to_owned(), typed(value, &kinds_of(tool, key)));
        body = rest.trim_start();
    }
    if body.trim_end() != "</function>" {
        return Block::Text;
    }
    Block::Call(Call {
        name: name.to_owned(),
        arguments: Value::Object(arguments).to_string(),
    })
}

fn properties(tool: &Tool) -> Option<&Map<String, Value>> {
    let parameters = tool.function.parameters.as_ref()?;
    parameters.get("properties")?.as_object()
}

/// The types that the schema of parameter `key` allows; none where it says nothing.
fn kinds_of<'a>(tool: &'a Tool, key: &str) -> Vec<&'a str> {
    let mut kinds = Vec::new();
    if let (Some(root), Some(properties)) = (&tool.function.parameters, properties(tool))
        && let Some(schema) = properties.get(key)
    {
        add_kinds(schema, root, &mut Vec::new(), &mut kinds);
    }
    kinds
}

/// The inside of a block as rules of a Lark grammar, of which `start` is the name of the first. Parameters come in the
/// schema's order; those it does not require may be left out.
pub(super) fn rules(start: &str, tool: &Tool) -> String {
    let schema = tool.function.parameters.as_ref();
    let required: Vec<&str> = schema
        .and_then(|schema| schema.get("required")?.as_array())
        .into_iter()
        .flatten()
        .filter_map(Value::as_str)
        .collect();
    let close = lark_text("</function>\n");
    if schema.is_some_and(|schema| schema.get("properties").is_none()) {
        // Any object: parameters of any name, each with text of any kind.
        let open = lark_text(&format!("\n<function={}>\n", tool.function.name));
        return format!(
            "{start}: {open} {start}_any* {close}\n\
             {start}_any[suffix=\"\\n</parameter>\\n\"]: /<parameter=[^>\\n]+>\\n(?s:.*)/\n"
        );
    }
    let mut body = lark_text(&format!("\n<function={}>\n", tool.function.name));
    let mut rules = String::new();
    for (index, (key, value)) in properties(tool).into_iter().flatten().enumerate() {
        let name = format!("{start}_{index}");
        let open = lark_text(&format!("<parameter={key}>\n"));
        let optional = if required.contains(&key.as_str()) {
            ""
        } else {
            "?"
        };
        body.push_str(&format!(" {name}{optional}"));
        let close = lark_text("\n</parameter>\n");
        let kinds = kinds_of(tool, key);
        let root = schema.unwrap_or(&Value::Null);
        if let Some(values) = literals(resolved(value, root)) {
            rules.push_str(&format!("{name}: {open} ({values}) {close}\n"));
        } else if kinds.is_empty() || kinds.contains(&"string") {
            // Text is written without quotes: whatever it is, up to the closing tag.
            rules.push_str(&format!(
                "{name}: {open} {name}_value\n{name}_value[suffix={close}]: /(?s:.*)/\n"
            ));
        } else {
            let value = lark_json(with_definitions(value, schema));
            rules.push_str(&format!(
                "{name}: {open} {name}_value {close}\n{name}_value: {value}\n"
            ));
        }
    }
    format!("{start}: {body} {close}\n{rules}")
}

/// The only values a schema allows, if it lists them, as alternatives of a rule.
fn literals(schema: &Value) -> Option<String> {
    let values = match (schema.get("const"), schema.get("enum")) {
        (Some(value), _) => std::slice::from_ref(value),
        (None, Some(values)) => values.as_array()?.as_slice(),
        (None, None) => return None,
    };
    let written = values.iter().map(|value| match value {
        Value::String(text) => lark_text(text),
        other => lark_text(&other.to_string()),
    });
    let written: Vec<String> = written.collect();
    (!written.is_empty()).then(|| written.join(" | "))
}

/// A parameter's schema, together with what the tool's schema defines for it.
fn with_definitions(value: &Value, tool: Option<&Value>) -> Value {
    let mut value = value.clone();
    for name in ["$defs", "definitions"] {
        if let (Some(value), Some(definitions)) = (
            value.as_object_mut(),
            tool.and_then(|schema| schema.get(name)),
        ) {
            value.insert(name.into(), definitions.clone());
        }
    }
    value
}

/// The value that `text` stands for where these types are allowed; the text itself where it is of none of them.
fn typed(text: &str, kinds: &[&str]) -> Value {
    if kinds.iter().all(|kind| *kind == "string") {
        return Value::String(text.to_owned());
    }
    let parsed = match text.trim() {
        // Python's words: older templates show them to the model.
        "True" => Some(Value::Bool(true)),
        "False" => Some(Value::Bool(false)),
        "None" => Some(Value::Null),
        other => serde_json::from_str(other).ok(),
    };
    match parsed {
        // A string has no quotes in this form, so what parses as one is not meant as one.
        Some(value) if !value.is_string() && kinds.iter().any(|kind| is_of(&value, kind)) => value,
        _ => Value::String(text.to_owned()),
    }
}

/// What a reference within `root` stands for; a schema without one is itself.
fn resolved<'a>(mut schema: &'a Value, root: &'a Value) -> &'a Value {
    /// A reference to a reference and so on; past this it is a circle.
    const MOST_STEPS: usize = 16;
    for _ in 0..MOST_STEPS {
        let reference = schema.get("$ref").and_then(Value::as_str);
        let target = reference.and_then(|reference| root.pointer(reference.strip_prefix('#')?));
        match target {
            Some(target) => schema = target,
            None => break,
        }
    }
    schema
}

/// Adds the types that `schema` allows. What was `seen` is not looked at again: schemas may refer to each other in circles.
fn add_kinds<'a>(
    schema: &'a Value,
    root: &'a Value,
    seen: &mut Vec<&'a Value>,
    kinds: &mut Vec<&'a str>,
) {
    let schema = resolved(schema, root);
    if seen.iter().any(|known| std::ptr::eq(*known, schema)) {
        return;
    }
    seen.push(schema);
    match schema.get("type") {
        Some(Value::String(kind)) => kinds.push(kind),
        Some(Value::Array(all)) => kinds.extend(all.iter().filter_map(Value::as_str)),
        _ => {
            let listed = schema.get("enum").and_then(Value::as_array);
            let listed = listed.into_iter().flatten().chain(schema.get("const"));
            kinds.extend(listed.map(|value| -> &'a str { kind_of(value) }));
        }
    }
    for choice in ["anyOf", "oneOf"] {
        let schemas = schema.get(choice).and_then(Value::as_array);
        for schema in schemas.into_iter().flatten() {
            add_kinds(schema, root, seen, kinds);
        }
    }
}

fn kind_of(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "boolean",
        Value::Number(_) => "number",
        Value::String(_) => "string",
        Value::Array(_) => "array",
        Value::Object(_) => "object",
    }
}

fn is_of(value: &Value, kind: &str) -> bool {
    match kind {
        "integer" => value.is_i64() || value.is_u64(),
        kind => kind_of(value) == kind,
    }
}
