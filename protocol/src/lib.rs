//! What cortex and neuron say to each other, and what both say to clients.
//!
//! OpenAI chat completions are the canonical dialect between the two daemons, so that a foreign
//! OpenAI-compatible server can be an upstream too. What that dialect cannot carry rides in the
//! named extensions of [`ext`]. This crate has no I/O and no async.

pub mod chat;
pub mod completions;
pub mod controls;
pub mod error;
pub mod ext;
pub mod models;
pub mod node;
pub mod sse;
pub mod tokens;
pub mod usage;

pub use error::{ApiError, ErrorKind};
