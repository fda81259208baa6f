//! The fields that say what an answer must look like: at most one of them, as a [`Shape`].

use crate::residency::folder::ModelText;
use crate::text::grammar::{Grammar, Shape};
use protocol::ApiError;
use protocol::controls::Controls;
use serde_json::{Value, json};

/// A shape and the field that asked for it.
pub(super) type Asked = (Shape, &'static str);

/// What the request asks for.
///
/// # Errors
/// 400 for two at once, or for one that cannot be meant.
pub(super) fn shape(controls: &Controls) -> Result<Option<Asked>, ApiError> {
    let mut asked = Vec::new();
    if let Some(format) = &controls.response_format {
        asked.extend(response_format(format)?);
    }
    for (text, field) in [
        (&controls.grammar, "grammar"),
        (&controls.guided_grammar, "guided_grammar"),
    ] {
        asked.extend(text.clone().map(|text| (Shape::Lark(text), field)));
    }
    if let Some(schema) = controls
        .guided_json
        .clone()
        .filter(|schema| !schema.is_null())
    {
        asked.push((json_schema(schema, "guided_json")?, "guided_json"));
    }
    let regex = controls.guided_regex.clone();
    asked.extend(regex.map(|regex| (Shape::Regex(regex), "guided_regex")));
    if let Some(choices) = controls.guided_choice.clone() {
        asked.push((choice(choices, "guided_choice")?, "guided_choice"));
    }
    if let Some(outputs) = controls.structured_outputs.clone() {
        const FIELD: &str = "structured_outputs";
        if let Some(schema) = outputs.json {
            asked.push((json_schema(schema, FIELD)?, FIELD));
        }
        if outputs.json_object == Some(true) {
            asked.push((any_object(), FIELD));
        }
        asked.extend(outputs.regex.map(|regex| (Shape::Regex(regex), FIELD)));
        if let Some(choices) = outputs.choice {
            asked.push((choice(choices, FIELD)?, FIELD));
        }
        asked.extend(outputs.grammar.map(|text| (Shape::Lark(text), FIELD)));
    }
    if let [(_, first), (_, second), ..] = asked[..] {
        let message = format!("an answer can be held to one shape, not to `{first}` and another");
        return Err(ApiError::invalid(second, message));
    }
    Ok(asked.pop())
}

/// The grammar of a shape.
///
/// # Errors
/// 400 with what in it is not supported.
pub(super) fn compile(text: &ModelText, (shape, field): Asked) -> Result<Grammar, ApiError> {
    text.grammars.compile(shape).map_err(|error| {
        ApiError::invalid(
            field,
            format!("an answer cannot be held to `{field}`: {error}"),
        )
    })
}

fn any_object() -> Shape {
    Shape::JsonSchema(json!({"type": "object"}))
}

fn response_format(format: &Value) -> Result<Option<Asked>, ApiError> {
    const FIELD: &str = "response_format";
    const SCHEMA: &str = "response_format.json_schema.schema";
    match format["type"].as_str() {
        _ if format.is_null() => Ok(None),
        Some("text") => Ok(None),
        Some("json_object") => Ok(Some((any_object(), FIELD))),
        Some("json_schema") => {
            let schema = format["json_schema"]["schema"].clone();
            if schema.is_null() {
                let message = format!("`{SCHEMA}` is missing; it must be a JSON schema");
                return Err(ApiError::invalid(SCHEMA, message));
            }
            Ok(Some((json_schema(schema, SCHEMA)?, SCHEMA)))
        }
        _ => {
            let message = "`response_format.type` must be text, json_object or json_schema";
            Err(ApiError::invalid(FIELD, message))
        }
    }
}

/// A schema as it is, or written as a string.
fn json_schema(schema: Value, field: &'static str) -> Result<Shape, ApiError> {
    let schema = match schema {
        Value::String(text) => serde_json::from_str(&text).map_err(|error| {
            ApiError::invalid(field, format!("`{field}` is no JSON schema: {error}"))
        })?,
        schema => schema,
    };
    if !schema.is_object() {
        let message = format!("`{field}` must be a JSON schema: an object");
        return Err(ApiError::invalid(field, message));
    }
    Ok(Shape::JsonSchema(schema))
}

fn choice(choices: Vec<String>, field: &'static str) -> Result<Shape, ApiError> {
    if choices.is_empty() || choices.iter().any(String::is_empty) {
        let message = format!("`{field}` must be a list of texts, none of them empty");
        return Err(ApiError::invalid(field, message));
    }
    Ok(Shape::Choice(choices))
}
