//! `/v1/models`: what a client may ask for.

use serde::{Deserialize, Serialize};

/// One model as OpenAI lists it, with limits and state as extra fields.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ModelCard {
    /// The name a request puts in `model`.
    pub id: String,
    /// Always `"model"`.
    pub object: String,
    /// Unix seconds; when the model became known to this daemon.
    pub created: u64,
    /// Who serves it.
    pub owned_by: String,
    /// Longest prompt plus answer in tokens, once known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub context_length: Option<u64>,
    /// What it can do, in the words of `ModelStatus::capabilities`; unknown until a node has told.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub capabilities: Option<Vec<String>>,
    /// `loaded`, `loading`, `available` (in the catalogue, loaded on demand), `failed`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub state: Option<String>,
    /// Nodes that have it loaded; filled by cortex alone.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub nodes: Vec<String>,
}

impl ModelCard {
    /// A card with the fields OpenAI's clients need.
    #[must_use]
    pub fn new(id: impl Into<String>, owned_by: impl Into<String>, created: u64) -> Self {
        Self {
            id: id.into(),
            object: "model".into(),
            created,
            owned_by: owned_by.into(),
            context_length: None,
            capabilities: None,
            state: None,
            nodes: Vec::new(),
        }
    }

    /// Whether a node has said that it can do `what`.
    #[must_use]
    pub fn can(&self, what: &str) -> bool {
        self.capabilities
            .as_ref()
            .is_some_and(|known| known.iter().any(|known| known == what))
    }
}

/// The reply of `GET /v1/models`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ModelList {
    /// Always `"list"`.
    pub object: String,
    /// The models, sorted by id.
    pub data: Vec<ModelCard>,
}

impl ModelList {
    /// A list of `data`, sorted by id.
    #[must_use]
    pub fn new(mut data: Vec<ModelCard>) -> Self {
        data.sort_by(|a, b| a.id.cmp(&b.id));
        Self {
            object: "list".into(),
            data,
        }
    }
}
