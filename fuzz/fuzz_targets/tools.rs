//! However an answer is cut, the same calls are found in it, and what is no call is text.

#![no_main]

use fuzz::{cut_text, seeded, spelt};
use libfuzzer_sys::fuzz_target;
use neuron::text::tools::{OPEN, Piece, ToolCalls, ToolForm};
use protocol::chat::Tool;
use serde_json::{Value, json};
use std::sync::{Arc, LazyLock};

const CLOSE: &str = "</tool_call>";
const PARTS: [&str; 28] = [
    OPEN,
    CLOSE,
    "<function=find>",
    "<function=now>",
    "<function=",
    "</function>",
    "<parameter=limit>",
    "<parameter=text>",
    "\n",
    "\r",
    "<parameter=where>",
    "<parameter=circle>",
    "</parameter>",
    "{\"name\": \"find\", \"arguments\": {\"limit\": ",
    "{\"name\": \"now\"",
    "\"arguments\": ",
    "{",
    "}",
    "\"",
    ", ",
    "\\",
    "5",
    "[1, null]",
    "true",
    ">",
    "</tool_ca",
    "<tool",
    "1e999",
];

static TOOLS: LazyLock<Arc<[Tool]>> = LazyLock::new(|| {
    let find = json!({
        "type": "object",
        "properties": {
            "limit": {"type": "integer"}, "text": {"type": "string"},
            "where": {"anyOf": [{"type": "object"}, {"type": "array"}]}, "circle": {"$ref": "#/$defs/circle"},
        },
        "$defs": {"circle": {"anyOf": [{"$ref": "#/$defs/circle"}, {"type": "integer"}]}},
    });
    let tools = json!([
        {"type": "function", "function": {"name": "find", "parameters": find}},
        {"type": "function", "function": {"name": "now"}},
    ]);
    serde_json::from_value::<Vec<Tool>>(tools)
        .expect("tools")
        .into()
});

fn told_apart(form: ToolForm, pieces: &[&str]) -> Vec<Piece> {
    let mut machine = ToolCalls::new(form, TOOLS.clone());
    let mut out = Vec::new();
    for piece in pieces {
        machine.push(piece, &mut out);
    }
    machine.finish(&mut out);
    let mut joined: Vec<Piece> = Vec::new();
    for piece in out {
        match (joined.last_mut(), piece) {
            (Some(Piece::Content(sum)), Piece::Content(text)) => sum.push_str(&text),
            (_, piece) => joined.push(piece),
        }
    }
    joined
}

/// Whether `text` is these pieces one after the other, each call a block with white space before it.
fn is_made_of(text: &str, pieces: &[Piece]) -> bool {
    match pieces {
        [] => text.trim().is_empty(),
        [Piece::Content(content), rest @ ..] => text
            .strip_prefix(content.as_str())
            .is_some_and(|text| is_made_of(text, rest)),
        [Piece::Call(_), rest @ ..] => {
            let Some(block) = text.trim_start().strip_prefix(OPEN) else {
                return false;
            };
            let mut ends = block.match_indices(CLOSE).map(|(at, _)| at + CLOSE.len());
            ends.any(|end| is_made_of(&block[end..], rest)) || rest.is_empty()
        }
    }
}

fuzz_target!(|input: (bool, &str)| {
    let form = if input.0 {
        ToolForm::QwenXml
    } else {
        ToolForm::Hermes
    };
    let text = spelt(input.1, &PARTS);
    let whole = told_apart(form, &[&text]);
    let pieces = cut_text(&text, &mut seeded(text.as_bytes()));
    assert_eq!(told_apart(form, &pieces), whole, "{pieces:?}");
    assert!(is_made_of(&text, &whole), "{text:?} became {whole:?}");
    for piece in &whole {
        let Piece::Call(call) = piece else { continue };
        assert!(
            TOOLS.iter().any(|tool| tool.function.name == call.name),
            "{call:?}"
        );
        let arguments: Value = serde_json::from_str(&call.arguments).expect("arguments are JSON");
        assert!(arguments.is_object(), "{call:?}");
    }
    if !whole.iter().any(|piece| matches!(piece, Piece::Call(_))) && !text.is_empty() {
        assert_eq!(
            whole,
            [Piece::Content(text)],
            "without a call it stays as it is"
        );
    }
});
