//! The form of Qwen3.5 and Qwen3-Coder:
//! `<tool_call>\n<function=NAME>\n<parameter=KEY>\nVALUE\n</parameter>\n</function>\n</tool_call>`.

use super::{Call, Piece};
use crate::text::open_end;
use protocol::chat::Tool;
use serde_json::{Map, Value};
use std::sync::Arc;

const OPEN: &str = "<tool_call>";
const CLOSE: &str = "</tool_call>";

/// Finds calls in text that comes in pieces. A block that is no call is given as text: nothing is lost.
#[derive(Debug)]
pub struct QwenXml {
    tools: Arc<[Tool]>,
    inside: bool,
    /// White space before a call belongs to the form, not to the text, and so does all of it after the first.
    called: bool,
    held: String,
}

impl QwenXml {
    /// A parser that types values by the schemas of `tools`.
    #[must_use]
    pub fn new(tools: Arc<[Tool]>) -> Self {
        Self {
            tools,
            inside: false,
            called: false,
            held: String::new(),
        }
    }

    /// Takes the next piece and appends what it settles.
    pub fn push(&mut self, piece: &str, out: &mut Vec<Piece>) {
        self.held.push_str(piece);
        while self.advance(out) {}
    }

    /// Settles what was held back: the text has ended. A call that lacks only its last tag counts.
    pub fn finish(&mut self, out: &mut Vec<Piece>) {
        let held = std::mem::take(&mut self.held);
        if self.inside {
            match self.parse(&held) {
                Some(call) => out.push(Piece::Call(call)),
                None => out.push(Piece::Content(format!("{OPEN}{held}"))),
            }
            return;
        }
        let belongs_to_the_form = self.called && held.trim().is_empty();
        if !held.is_empty() && !belongs_to_the_form {
            out.push(Piece::Content(held));
        }
    }

    /// One move of the machine over `held`; false when it needs more text.
    fn advance(&mut self, out: &mut Vec<Piece>) -> bool {
        if self.inside {
            let Some(at) = self.held.find(CLOSE) else {
                return false;
            };
            let block: String = self.held.drain(..at + CLOSE.len()).collect();
            self.inside = false;
            match self.parse(&block[..at]) {
                Some(call) => {
                    self.called = true;
                    out.push(Piece::Call(call));
                }
                None => out.push(Piece::Content(format!("{OPEN}{block}"))),
            }
            return true;
        }
        let tag = self.held.find(OPEN);
        let settled = match tag {
            Some(at) => at,
            None => self.held.len() - open_end(&self.held, OPEN),
        };
        let text = self.held[..settled].trim_end();
        if !text.is_empty() {
            out.push(Piece::Content(text.to_owned()));
        }
        match tag {
            Some(at) => {
                self.held.drain(..at + OPEN.len());
                self.inside = true;
                true
            }
            None => {
                // The white space stays: a call may follow it.
                self.held.drain(..text.len());
                false
            }
        }
    }

    /// The call in the inside of a block, if it is one of a tool we gave the model.
    fn parse(&self, block: &str) -> Option<Call> {
        let body = block.trim().strip_prefix("<function=")?;
        let (name, body) = body.split_once('>')?;
        let name = name.trim();
        let tool = self.tools.iter().find(|tool| tool.function.name == name)?;
        let mut body = body.trim_start();
        let mut arguments = Map::new();
        while let Some(rest) = body.strip_prefix("<parameter=") {
            let (key, rest) = rest.split_once('>')?;
            let (value, rest) = rest.split_once("</parameter>")?;
            // One line break on each side belongs to the form; the rest is the value's own.
            let value = value.strip_prefix('\n').unwrap_or(value);
            let value = value.strip_suffix('\n').unwrap_or(value);
            let schema = tool
                .function
                .parameters
                .as_ref()
                .and_then(|schema| schema.get("properties")?.get(key));
            arguments.insert(key.to_owned(), typed(value, schema));
            body = rest.trim_start();
        }
        (body.trim_end() == "</function>").then(|| Call {
            name: name.to_owned(),
            arguments: Value::Object(arguments).to_string(),
        })
    }
}

/// The value that `text` stands for under `schema`; the text itself where it fits no other type.
fn typed(text: &str, schema: Option<&Value>) -> Value {
    let mut types = Vec::new();
    if let Some(schema) = schema {
        allowed_types(schema, &mut types);
    }
    if types.is_empty() {
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
        Some(value) if types.iter().any(|kind| is_of_type(&value, kind)) => value,
        _ => Value::String(text.to_owned()),
    }
}

/// The types, strings apart, that `schema` allows: strings need no parsing.
fn allowed_types<'a>(schema: &'a Value, types: &mut Vec<&'a str>) {
    match schema.get("type") {
        Some(Value::String(kind)) => types.push(kind),
        Some(Value::Array(kinds)) => types.extend(kinds.iter().filter_map(Value::as_str)),
        _ => {}
    }
    for choice in ["anyOf", "oneOf"] {
        if let Some(Value::Array(schemas)) = schema.get(choice) {
            for schema in schemas {
                allowed_types(schema, types);
            }
        }
    }
    types.retain(|kind| *kind != "string");
}

fn is_of_type(value: &Value, kind: &str) -> bool {
    match kind {
        "integer" => value.is_i64() || value.is_u64(),
        "number" => value.is_number(),
        "boolean" => value.is_boolean(),
        "null" => value.is_null(),
        "array" => value.is_array(),
        "object" => value.is_object(),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn tools() -> Arc<[Tool]> {
        serde_json::from_value::<Vec<Tool>>(json!([{
            "type": "function",
            "function": {"name": "find", "parameters": {"type": "object", "properties": {
                "text": {"type": "string"},
                "limit": {"type": "integer"},
                "deep": {"type": ["boolean", "null"]},
                "where": {"anyOf": [{"type": "object"}, {"type": "array"}]},
            }}},
        }, {"type": "function", "function": {"name": "now"}}]))
        .unwrap()
        .into()
    }

    fn run(pieces: &[&str]) -> (String, Vec<(String, String)>) {
        let mut machine = QwenXml::new(tools());
        let mut out = Vec::new();
        for piece in pieces {
            machine.push(piece, &mut out);
        }
        machine.finish(&mut out);
        let (mut text, mut calls) = (String::new(), Vec::new());
        for piece in out {
            match piece {
                Piece::Content(content) => text.push_str(&content),
                Piece::Call(call) => calls.push((call.name, call.arguments)),
            }
        }
        (text, calls)
    }

    fn check(source: &str, text: &str, calls: &[(&str, Value)]) {
        for first in 0..=source.len() {
            for second in [first, first + 1, first + 7, source.len()] {
                let second = second.min(source.len());
                if !source.is_char_boundary(first) || !source.is_char_boundary(second) {
                    continue;
                }
                let pieces = [&source[..first], &source[first..second], &source[second..]];
                let (got_text, got_calls) = run(&pieces);
                assert_eq!(got_text, text, "{pieces:?}");
                let wanted: Vec<_> = calls
                    .iter()
                    .map(|(name, arguments)| ((*name).to_owned(), arguments.to_string()))
                    .collect();
                assert_eq!(got_calls, wanted, "{pieces:?}");
            }
        }
        let letters: Vec<String> = source.chars().map(String::from).collect();
        let letters: Vec<&str> = letters.iter().map(String::as_str).collect();
        assert_eq!(run(&letters), run(&[source]), "letter by letter: {source}");
    }

    #[test]
    fn a_call_is_found_at_every_split_and_its_values_are_typed() {
        check(
            "I look.\n\n<tool_call>\n<function=find>\n<parameter=text>\nline 1\n\nline <3>é\n</parameter>\n<parameter=limit>\n5\n</parameter>\n<parameter=deep>\nTrue\n</parameter>\n<parameter=where>\n{\"a\": [1]}\n</parameter>\n</function>\n</tool_call>",
            "I look.",
            &[(
                "find",
                json!({"text": "line 1\n\nline <3>é", "limit": 5, "deep": true, "where": {"a": [1]}}),
            )],
        );
    }

    #[test]
    fn several_calls_are_several_and_none_leaks() {
        let call = "<tool_call>\n<function=now>\n</function>\n</tool_call>";
        check(
            &format!("{call}\n{call}\n"),
            "",
            &[("now", json!({})), ("now", json!({}))],
        );
    }

    #[test]
    fn a_value_that_does_not_fit_its_type_stays_text() {
        check(
            "<tool_call><function=find><parameter=limit>many</parameter><parameter=text>5</parameter><parameter=other>7</parameter></function></tool_call>",
            "",
            &[("find", json!({"limit": "many", "text": "5", "other": "7"}))],
        );
    }

    #[test]
    fn what_is_no_call_is_given_as_text() {
        for text in [
            "<tool_call>\nnot a call\n</tool_call> and more",
            "<tool_call>\n<function=unknown>\n</function>\n</tool_call>",
            "<tool_call>\n<function=find>\n<parameter=text>\ncut",
            "a < b, <tool_c",
            "white space \n stays \n",
        ] {
            check(text, text, &[]);
        }
    }

    #[test]
    fn a_call_that_lacks_only_its_last_tag_counts() {
        check(
            "<tool_call>\n<function=now>\n</function>\n",
            "",
            &[("now", json!({}))],
        );
    }
}
