//! What becomes of each field of each API. Every dialect has a table of these; `docs/dialects.md` is written from them,
//! and tests send each row's sample.

use serde_json::Value;

/// A field of a request that no chat request can carry.
pub(super) struct Unsupported {
    pub(super) name: &'static str,
    /// Whether a value asks for nothing, so that it can be let pass.
    pub(super) nothing: fn(&Value) -> bool,
    pub(super) why: &'static str,
    pub(super) sample: &'static str,
}

/// Whether a value has nothing in it that could be asked for.
pub(super) fn is_empty(value: &Value) -> bool {
    match value {
        Value::String(text) => text.is_empty(),
        Value::Array(list) => list.is_empty(),
        Value::Object(map) => map.values().all(Value::is_null),
        _ => false,
    }
}

/// One row: a field as its API names it.
#[derive(Debug, Clone, Copy)]
pub struct Field {
    /// Where it stands: `thinking.budget_tokens`, `messages[].role`. Values, where they matter, follow in brackets.
    pub name: &'static str,
    /// What becomes of it.
    pub fate: Fate,
    /// A JSON object whose keys, put into a plain request, use the field.
    pub sample: &'static str,
}

/// What becomes of a field.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fate {
    /// Does what its API says. With what there is to add.
    Honoured(&'static str),
    /// Reaches the node as this field of a chat request.
    Becomes(&'static str),
    /// Has no bearing on an answer here; why that is no loss.
    Accepted(&'static str),
    /// Is answered 400, with its name as `param`; why.
    Refused(&'static str),
}

impl Field {
    /// A row of a table.
    #[must_use]
    pub const fn new(name: &'static str, fate: Fate, sample: &'static str) -> Self {
        Self { name, fate, sample }
    }
}

/// The table as Markdown, a row a field.
#[must_use]
pub fn markdown(fields: &[Field]) -> String {
    let mut text = String::from("| Field | | |\n|---|---|---|\n");
    for field in fields {
        let (word, note) = match field.fate {
            Fate::Honoured(note) => ("honoured", note.to_owned()),
            Fate::Becomes(target) => ("translated", format!("to `{target}`")),
            Fate::Accepted(why) => ("accepted", why.to_owned()),
            Fate::Refused(why) => ("**refused**", why.to_owned()),
        };
        let (name, values) = field.name.split_once(" (").unwrap_or((field.name, ""));
        let values = if values.is_empty() {
            String::new()
        } else {
            format!(" ({values}")
        };
        text += &format!("| `{name}`{values} | {word} | {note} |\n");
    }
    text
}
