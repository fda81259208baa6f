//! Tool calls out of text; one file per form models write them in.

mod qwen_xml;

pub use qwen_xml::QwenXml;

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
