//! The configuration file as written. Knows no other type and checks nothing but spelling.

use super::ConfigError;
use serde::{Deserialize, Serialize};
use std::path::Path;

/// The file. Absent keys have the value of [`Settings::default`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Settings {
    /// `ADDRESS:PORT`.
    pub listen: String,
    /// The host's own name when absent.
    pub name: Option<String>,
    /// Bound on draining after SIGTERM.
    pub drain_seconds: u64,
    /// See [`LimitSettings`].
    pub limits: LimitSettings,
    /// See [`HubSettings`].
    pub hub: HubSettings,
    /// See [`LogSettings`].
    pub log: LogSettings,
    /// Models to load at start.
    pub models: Vec<ModelSettings>,
}

/// `[limits]`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LimitSettings {
    /// Longest request body.
    pub max_body_bytes: u64,
    /// Sequences computed at the same time, for each model.
    pub max_running: u64,
    /// Requests waiting, for each model.
    pub max_waiting: u64,
    /// Prompt tokens waiting, for each model.
    pub max_queued_prompt_tokens: u64,
    /// Prompt tokens in one step.
    pub prefill_chunk_tokens: u64,
    /// Bound on a whole request.
    pub request_deadline_seconds: u64,
}

/// `[hub]`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct HubSettings {
    /// `$HF_HOME/hub` or `~/.cache/huggingface/hub` when absent.
    pub cache_dir: Option<String>,
    /// Use the cache alone.
    pub offline: bool,
}

/// `[log]`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LogSettings {
    /// `text` or `json`.
    pub format: String,
}

/// `[[models]]`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelSettings {
    /// The name requests use.
    pub id: String,
    /// A folder or a hub id.
    pub source: String,
    /// Upper bound on prompt plus answer.
    pub context_length: Option<u64>,
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
            prefill_chunk_tokens: 128,
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
    pub fn read(file: &Path) -> Result<Self, ConfigError> {
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
            models: vec![ModelSettings {
                id: String::new(),
                source: String::new(),
                context_length: Some(1),
            }],
            ..Self::default()
        }
    }
}
