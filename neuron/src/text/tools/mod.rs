//! Tool calls out of text; one file per form models write them in.

mod blocks;
mod hermes;
mod qwen_xml;

pub use blocks::ToolCalls;

use super::grammar::{Shape, lark_json, lark_text};
use protocol::chat::Tool;
use serde_json::{Value, json};

/// Opens a block.
pub const OPEN: &str = "<tool_call>";
const CLOSE: &str = "</tool_call>";

/// A piece of an answer, calls told apart.
#[derive(Debug, Clone, PartialEq)]
pub enum Piece {
    /// Text.
    Content(String),
    /// A whole call.
    Call(Call),
}

/// A call as the model wrote it, values typed by the tool's schema.
#[derive(Debug, Clone, PartialEq)]
pub struct Call {
    /// The function's name.
    pub name: String,
    /// A JSON object, keys in the order written.
    pub arguments: String,
}

/// What the inside of a block is.
enum Block {
    /// A call of a tool we gave the model.
    Call(Call),
    /// Anything else.
    Text,
    /// It has not ended yet, though the tag that would end it is there.
    Open,
}

/// How a model writes calls.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ToolForm {
    /// As Qwen3.5 does: tags for function and parameters.
    QwenXml,
    /// As Hermes does: a JSON object.
    Hermes,
}

impl ToolForm {
    /// The form that a chat template shows its model.
    #[must_use]
    pub fn of_template(source: &str) -> Self {
        // A template that writes earlier calls as JSON has the key it writes the arguments under.
        if source.contains("<function=") || !source.contains(OPEN) {
            Self::QwenXml
        } else {
            Self::Hermes
        }
    }

    fn parse(self, block: &str, tools: &[Tool]) -> Block {
        match self {
            Self::QwenXml => qwen_xml::parse(block, tools),
            Self::Hermes => hermes::parse(block, tools),
        }
    }

    /// What an answer looks like that is one call of a tool, or more where `several`; of the one `named`, if any is.
    /// None when there is no such tool.
    #[must_use]
    pub fn shape(self, tools: &[Tool], named: Option<&str>, several: bool) -> Option<Shape> {
        let calls = self.calls(tools, named, several)?;
        Some(Shape::Lark(format!("start: calls\n{calls}")))
    }

    /// What an answer looks like that is either calls or JSON of a schema.
    #[must_use]
    pub fn shape_or_json(self, tools: &[Tool], several: bool, schema: Value) -> Option<Shape> {
        let tools: Vec<Tool> = tools.iter().map(held_if_strict).collect();
        let calls = self.calls(&tools, None, several)?;
        let json = lark_json(schema);
        Some(Shape::Lark(format!(
            "start: answer | calls\nanswer: {json}\n{calls}"
        )))
    }

    /// What comes between the tags where calls of tools that are `strict` are to follow their schemas.
    #[must_use]
    pub fn block_shape(self, tools: &[Tool]) -> Option<Shape> {
        let tools: Vec<Tool> = tools.iter().map(held_if_strict).collect();
        let (inside, rules) = self.inside(&tools, None)?;
        let close = lark_text(CLOSE);
        Some(Shape::Lark(format!("start: ({inside}) {close}\n{rules}")))
    }

    /// The rule `calls` and those it names.
    fn calls(self, tools: &[Tool], named: Option<&str>, several: bool) -> Option<String> {
        let (inside, rules) = self.inside(tools, named)?;
        let (open, close, next) = (lark_text(OPEN), lark_text(CLOSE), lark_text("\n"));
        let more = if several {
            format!(" ({next} call)*")
        } else {
            String::new()
        };
        Some(format!(
            "calls: call{more}\ncall: {open} ({inside}) {close}\n{rules}"
        ))
    }

    /// Alternatives and the rules they name.
    fn inside(self, tools: &[Tool], named: Option<&str>) -> Option<(String, String)> {
        let wanted = |tool: &&Tool| named.is_none_or(|name| tool.function.name == name);
        let (mut names, mut rules) = (Vec::new(), String::new());
        for (index, tool) in tools.iter().filter(wanted).enumerate() {
            let name = format!("tool{index}");
            rules.push_str(&match self {
                Self::QwenXml => qwen_xml::rules(&name, tool),
                Self::Hermes => hermes::rules(&name, tool),
            });
            names.push(name);
        }
        (!names.is_empty()).then(|| (names.join(" | "), rules))
    }
}

/// The tool, with a schema only if calls are to follow it.
fn held_if_strict(tool: &Tool) -> Tool {
    let mut tool = tool.clone();
    if tool.function.strict != Some(true) {
        tool.function.parameters = Some(json!({"type": "object"}));
    }
    tool
}
