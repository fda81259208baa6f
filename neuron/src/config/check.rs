//! [`Settings`] → [`Config`]: every rule about a value, one error for each.

use super::settings::Settings;
use super::{Config, HubConfig, Limits, LogFormat, ModelConfig, environment};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Most tokens guessed ahead: what holds of further ones does not pay for them.
const MOST_DRAFTS: u64 = 3;

/// A configuration that cannot be used: one line with the file, the key and what to change.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{file}: {key}: {remedy}")]
pub struct ConfigError {
    file: String,
    key: String,
    remedy: String,
}

impl ConfigError {
    pub(super) fn new(
        file: &Path,
        key: impl Into<String>,
        remedy: impl Into<String>,
    ) -> ConfigError {
        Self {
            file: file.display().to_string(),
            key: key.into(),
            remedy: remedy.into(),
        }
    }
}

pub(super) fn check(settings: Settings, file: &Path) -> Result<Config, ConfigError> {
    let wrong = |key: &str, remedy: String| ConfigError::new(file, key, remedy);
    let positive = |key: &str, value: u64| match usize::try_from(value) {
        Ok(value) if value > 0 => Ok(value),
        _ => Err(wrong(
            key,
            format!("{value} is out of range; use 1 or more"),
        )),
    };
    let listen = settings.listen.parse().map_err(|_| {
        wrong(
            "listen",
            format!(
                "`{}` is no address; write ADDRESS:PORT, for example 127.0.0.1:13131",
                settings.listen
            ),
        )
    })?;
    let log = match settings.log.format.as_str() {
        "text" => LogFormat::Text,
        "json" => LogFormat::Json,
        other => {
            let remedy = format!("`{other}` is no format; use `text` or `json`");
            return Err(wrong("log.format", remedy));
        }
    };
    let limits = Limits {
        max_body_bytes: positive("limits.max_body_bytes", settings.limits.max_body_bytes)?,
        max_running: positive("limits.max_running", settings.limits.max_running)?,
        max_waiting: positive("limits.max_waiting", settings.limits.max_waiting)?,
        max_queued_prompt_tokens: positive(
            "limits.max_queued_prompt_tokens",
            settings.limits.max_queued_prompt_tokens,
        )?,
        prefill_chunk_tokens: match settings.limits.prefill_chunk_tokens {
            Some(tokens) => Some(positive("limits.prefill_chunk_tokens", tokens)?),
            None => None,
        },
        state_bytes: match settings.limits.state_bytes {
            Some(bytes) => Some(positive("limits.state_bytes", bytes)? as u64),
            None => None,
        },
        host_snapshot_bytes: settings.limits.host_snapshot_bytes,
        prefix_cache: settings.limits.prefix_cache,
        draft_tokens: match settings.limits.draft_tokens {
            tokens @ 0..=MOST_DRAFTS => tokens as usize,
            tokens => {
                let remedy = format!("`{tokens}` is too many; use 0 to {MOST_DRAFTS}");
                return Err(wrong("limits.draft_tokens", remedy));
            }
        },
        request_deadline: Duration::from_secs(positive(
            "limits.request_deadline_seconds",
            settings.limits.request_deadline_seconds,
        )? as u64),
    };
    let mut ids = BTreeSet::new();
    let mut models = Vec::new();
    for (index, model) in settings.models.into_iter().enumerate() {
        let key = |name: &str| format!("models[{index}].{name}");
        if model.id.is_empty() {
            return Err(wrong(&key("id"), "is empty; give the model a name".into()));
        }
        if model.source.is_empty() {
            let remedy = "is empty; name a model folder or a hub id (owner/name)";
            return Err(wrong(&key("source"), remedy.into()));
        }
        if !ids.insert(model.id.clone()) {
            let remedy = format!("`{}` is used twice; give each model its own name", model.id);
            return Err(wrong(&key("id"), remedy));
        }
        if let Some(length) = model.context_length {
            positive(&key("context_length"), length)?;
        }
        models.push(ModelConfig {
            id: model.id,
            source: model.source,
            context_length: model.context_length,
            quant: model.quant,
            tensor_parallel: model.tensor_parallel,
        });
    }
    let cache_dir = settings.hub.cache_dir.map(PathBuf::from);
    let cache_dir = cache_dir.or_else(environment::hub_cache).ok_or_else(|| {
        let remedy = "there is no home folder to put the default in; name a folder";
        wrong("hub.cache_dir", remedy.into())
    })?;
    Ok(Config {
        listen,
        name: settings.name.unwrap_or_else(environment::host_name),
        drain: Duration::from_secs(settings.drain_seconds),
        models,
        limits,
        hub: HubConfig {
            token: environment::hub_token(&cache_dir),
            cache_dir,
            offline: settings.hub.offline || environment::hub_offline(),
            endpoint: environment::hub_endpoint(),
        },
        log,
        join: None,
    })
}
