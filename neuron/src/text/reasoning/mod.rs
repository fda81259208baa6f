//! Thinking apart from the answer; one file per way a model marks it.

mod think_tags;
#[cfg(test)]
mod whole;

pub use think_tags::ThinkTags;

/// A piece of an answer, thinking told apart.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Piece {
    /// Inside the thinking block.
    Reasoning(String),
    /// The answer proper.
    Content(String),
    /// The end of a block that was never closed, from the marker on.
    Unclosed(String),
}
