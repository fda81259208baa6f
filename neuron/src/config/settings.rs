//! The configuration file as written. Knows no other type and checks nothing but spelling.

use super::ConfigError;
use protocol::node::WeightFormat;
use serde::{Deserialize, Serialize};
use std::num::NonZeroU32;
use std::path::Path;

/// The file. Absent keys have the value of [`Settings::default`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct Settings {
    /// `ADDRESS:PORT`.
    pub(super) listen: String,
    /// The host's own name when absent.
    pub(super) name: Option<String>,
    /// Bound on draining after SIGTERM.
    pub(super) drain_seconds: u64,
    /// See [`LimitSettings`].
    pub(super) limits: LimitSettings,
    /// See [`HubSettings`].
    pub(super) hub: HubSettings,
    /// See [`LogSettings`].
    pub(super) log: LogSettings,
    /// Models to load at start.
    pub(super) models: Vec<ModelSettings>,
}

/// `[limits]`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct LimitSettings {
    /// Longest request body.
    pub(super) max_body_bytes: u64,
    /// Sequences computed at the same time, for each model.
    pub(super) max_running: u64,
    /// Requests waiting, for each model.
    pub(super) max_waiting: u64,
    /// Prompt tokens waiting, for each model.
    pub(super) max_queued_prompt_tokens: u64,
    /// Prompt tokens in one step; what fits the device when absent.
    pub(super) prefill_chunk_tokens: Option<u64>,
    /// Bytes of keys, values and recurrent states, for each model; as much as is of use and free when absent.
    pub(super) state_bytes: Option<u64>,
    /// Bytes of the host's memory for saved states of a device; a quarter of what is free when absent.
    pub(super) host_snapshot_bytes: Option<u64>,
    /// Whether what sequences computed is kept for later ones that begin alike.
    pub(super) prefix_cache: bool,
    /// Tokens guessed ahead, 0 to 3.
    pub(super) draft_tokens: u64,
    /// Bound on a whole request.
    pub(super) request_deadline_seconds: u64,
}

/// `[hub]`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct HubSettings {
    /// `$HF_HOME/hub` or `~/.cache/huggingface/hub` when absent.
    pub(super) cache_dir: Option<String>,
    /// Use the cache alone.
    pub(super) offline: bool,
}

/// `[log]`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct LogSettings {
    /// `text` or `json`.
    pub(super) format: String,
}

/// `[[models]]`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct ModelSettings {
    /// The name requests use.
    pub(super) id: String,
    /// A folder or a hub id.
    pub(super) source: String,
    /// Upper bound on prompt plus answer.
    pub(super) context_length: Option<u64>,
    /// The number format of the weights in memory; that of the files when absent.
    pub(super) quant: Option<WeightFormat>,
    /// Ranks among which it is shared; one when absent.
    pub(super) tensor_parallel: Option<NonZeroU32>,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            listen: "127.0.0.1:13131".into(),
            name: None,
            drain_seconds: 30,
            limits: LimitSettings::default(),
            hub: HubSettings::default(),
            log: LogSettings::default(),
            models: Vec::new(),
        }
    }
}

impl Default for LimitSettings {
    fn default() -> Self {
        Self {
            max_body_bytes: 32 << 20,
            max_running: 16,
            max_waiting: 256,
            max_queued_prompt_tokens: 1_000_000,
            prefill_chunk_tokens: None,
            state_bytes: None,
            host_snapshot_bytes: None,
            prefix_cache: true,
            draft_tokens: 0,
            request_deadline_seconds: 3600,
        }
    }
}

impl Default for LogSettings {
    fn default() -> Self {
        Self {
            format: "text".into(),
        }
    }
}

impl Settings {
    /// Reads `file` as written.
    ///
    /// # Errors
    /// When it cannot be read or is not spelt as this type says.
    pub(super) fn read(file: &Path) -> Result<Self, ConfigError> {
        let text = std::fs::read_to_string(file)
            .map_err(|error| ConfigError::new(file, "the file", error.to_string()))?;
        toml::from_str(&text).map_err(|error| {
            let line = error
                .span()
                .map_or(1, |span| text[..span.start].matches('\n').count() + 1);
            let key = text
                .lines()
                .nth(line - 1)
                .and_then(|line| line.split_once('='))
                .map(|(key, _)| format!("`{}` ", key.trim()))
                .unwrap_or_default();
            let message = error.message().replace('\n', " ");
            ConfigError::new(file, format!("{key}on line {line}"), message)
        })
    }

    /// Settings with every optional key present, to learn the names of all keys from.
    #[cfg(test)]
    pub(super) fn sample() -> Self {
        Self {
            name: Some(String::new()),
            hub: HubSettings {
                cache_dir: Some(String::new()),
                offline: false,
            },
            limits: LimitSettings {
                state_bytes: Some(1),
                host_snapshot_bytes: Some(1),
                prefill_chunk_tokens: Some(1),
                ..LimitSettings::default()
            },
            models: vec![ModelSettings {
                id: String::new(),
                source: String::new(),
                context_length: Some(1),
                quant: Some(WeightFormat::Q8_0),
                tensor_parallel: Some(NonZeroU32::MIN),
            }],
            ..Self::default()
        }
    }
}
