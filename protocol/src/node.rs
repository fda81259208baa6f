//! The fleet protocol: what a neuron tells cortex about itself and what it can be told to do.
//!
//! `GET /discovery` → [`NodeInfo`] · `GET /models` → [`NodeModels`] · `GET /models/{id}` → [`ModelStatus`] ·
//! `POST /models/load` takes [`LoadModel`] and answers 202 with a [`ModelStatus`] ·
//! `POST /models/unload` takes [`UnloadModel`] and answers 200 with a [`ModelStatus`].

use serde::{Deserialize, Serialize};

/// A host as it describes itself.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct NodeInfo {
    /// Host name.
    pub host: String,
    /// Version of the daemon.
    pub version: String,
    /// Devices that can hold a model, the CPU included.
    pub devices: Vec<DeviceInfo>,
    /// What this build and host can do: `cpu`, `cuda`, …
    #[serde(default)]
    pub features: Vec<String>,
}

/// One device that can hold a model.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceInfo {
    /// `cpu`, `cuda:0`, …
    pub id: String,
    /// What a person calls it.
    pub name: String,
    /// Memory in bytes that models may use.
    pub total_bytes: u64,
    /// Bytes of it free now.
    pub free_bytes: u64,
}

/// Where a model stands on a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ModelState {
    /// Being read; requests are answered 503.
    Loading,
    /// Serves requests.
    Loaded,
    /// Loading or running it failed; `reason` says why. Holds no memory.
    Failed,
    /// Takes no new requests; goes away when the running ones have ended.
    Unloading,
}

impl ModelState {
    /// The word used on the wire.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Loading => "loading",
            Self::Loaded => "loaded",
            Self::Failed => "failed",
            Self::Unloading => "unloading",
        }
    }
}

/// One model on a node.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ModelStatus {
    /// The name requests use.
    pub id: String,
    /// Where it stands.
    pub state: ModelState,
    /// Share of the load done, 0 to 1.
    #[serde(default)]
    pub progress: f32,
    /// Why it failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// The folder or hub id it was loaded from.
    #[serde(default)]
    pub source: String,
    /// Devices that hold it.
    #[serde(default)]
    pub devices: Vec<String>,
    /// Bytes it holds on them: weights and state.
    #[serde(default)]
    pub memory_bytes: u64,
    /// Longest prompt plus answer in tokens; zero while unknown.
    #[serde(default)]
    pub context_length: u64,
    /// What it can do: `chat`, `completions`, `tools`, `thinking`, `images`, `structured_outputs`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub capabilities: Vec<String>,
    /// Requests running or waiting on it.
    #[serde(default)]
    pub in_flight: u64,
    /// Unix seconds since which it has been in this state.
    #[serde(default)]
    pub since: u64,
}

/// The reply of `GET /models`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct NodeModels {
    /// Every model the node knows, sorted by id.
    pub models: Vec<ModelStatus>,
}

/// Asks a node to load a model. Idempotent: a second call joins the first.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LoadModel {
    /// The name requests will use.
    pub id: String,
    /// A folder in Hugging Face layout, or a hub id (`owner/name`).
    pub source: String,
    /// Upper bound on prompt plus answer in tokens; the model's own limit when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub context_length: Option<u64>,
}

/// Asks a node to let a model go once its requests have ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct UnloadModel {
    /// The model's name.
    pub id: String,
}
