//! Models by hub id: the cache first, then the hub.

use super::preflight::weight_files;
use crate::config::HubConfig;
use hf_hub::api::Progress;
use hf_hub::api::sync::{ApiBuilder, ApiError};
use hf_hub::{Cache, Repo};
use indicatif::{ProgressBar, ProgressStyle};
use std::io::IsTerminal;
use std::path::{Path, PathBuf};

/// A hub model that could not be had.
#[derive(Debug, thiserror::Error)]
pub enum HubError {
    /// Neither a folder nor a file nor the form of a hub id.
    #[error("`{0}` is neither a folder or a .gguf file here nor a hub id (owner/name)")]
    NoSource(String),
    /// The cache is all there is, and it is not there.
    #[error(
        "{id} is not in the cache {cache} and hub.offline is set; fetch it once with the hub reachable"
    )]
    NotCached {
        /// The hub id.
        id: String,
        /// The cache.
        cache: PathBuf,
    },
    /// The hub did not give it.
    #[error("{id} cannot be fetched: {reason}")]
    Fetch {
        /// The hub id.
        id: String,
        /// Why.
        reason: String,
    },
}

/// The folder or GGUF file that `source` names: itself, or where the hub model is cached, fetched first if need be.
///
/// # Errors
/// When there is none and none can be had.
pub fn resolve(source: &str, hub: &HubConfig) -> Result<PathBuf, HubError> {
    let folder = Path::new(source);
    let single = folder.extension().is_some_and(|kind| kind == "gguf");
    if folder.is_dir() || (single && folder.is_file()) {
        return Ok(folder.into());
    }
    let mut parts = source.split('/');
    let named = parts
        .by_ref()
        .take(2)
        .filter(|part| !part.is_empty() && !part.starts_with('.'));
    if named.count() != 2 || parts.next().is_some() {
        return Err(HubError::NoSource(source.into()));
    }
    if let Some(folder) = cached(source, hub) {
        return Ok(folder);
    }
    if hub.offline {
        return Err(HubError::NotCached {
            id: source.into(),
            cache: hub.cache_dir.clone(),
        });
    }
    fetch(source, hub).map_err(|error| HubError::Fetch {
        id: source.into(),
        reason: error.to_string(),
    })
}

/// The snapshot in the cache, if every file that is needed is in it.
fn cached(id: &str, hub: &HubConfig) -> Option<PathBuf> {
    let repo = Cache::new(hub.cache_dir.clone()).repo(Repo::model(id.into()));
    let folder = repo.get("config.json")?.parent()?.to_path_buf();
    let weights = weight_files(&folder).ok()?;
    let whole = weights
        .iter()
        .map(String::as_str)
        .chain(["tokenizer.json"])
        .all(|file| folder.join(file).is_file());
    whole.then_some(folder)
}

fn fetch(id: &str, hub: &HubConfig) -> Result<PathBuf, ApiError> {
    let mut builder = ApiBuilder::from_cache(Cache::new(hub.cache_dir.clone()))
        .with_progress(false)
        .with_token(hub.token.clone());
    if let Some(endpoint) = &hub.endpoint {
        builder = builder.with_endpoint(endpoint.clone());
    }
    let repo = builder.build()?.model(id.into());
    tracing::info!(model = id, "fetching from the hub");
    let files = repo.info()?.siblings.into_iter();
    let mut files: Vec<String> = files.map(|file| file.rfilename).collect();
    // The tokenizer comes last, so that a cache that has it has everything.
    files.sort_by_key(|file| file == "tokenizer.json");
    for file in files.iter().filter(|file| is_needed(file)) {
        repo.download_with_progress(file, Bar::new())?;
    }
    let config = repo.get("config.json")?;
    Ok(config.parent().unwrap_or(Path::new("/")).into())
}

/// Configuration, tokenizer, template and safetensors of the top folder; not other formats of the same weights.
fn is_needed(file: &str) -> bool {
    let kinds = [".json", ".jinja", ".safetensors"];
    !file.contains('/') && kinds.iter().any(|kind| file.ends_with(kind))
}

/// A bar where a person watches, nothing where a log is written.
struct Bar(ProgressBar);

impl Bar {
    fn new() -> Self {
        Self(if std::io::stderr().is_terminal() {
            ProgressBar::no_length()
        } else {
            ProgressBar::hidden()
        })
    }
}

impl Progress for Bar {
    fn init(&mut self, size: usize, filename: &str) {
        let style = ProgressStyle::with_template("{msg} {bar:30} {bytes}/{total_bytes} {eta}");
        if let Ok(style) = style {
            self.0.set_style(style);
        }
        self.0.set_length(size as u64);
        self.0.set_message(filename.to_owned());
    }

    fn update(&mut self, size: usize) {
        self.0.inc(size as u64);
    }

    fn finish(&mut self) {
        self.0.finish_and_clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hub(cache_dir: &Path) -> HubConfig {
        HubConfig {
            cache_dir: cache_dir.into(),
            offline: true,
            endpoint: None,
            token: None,
        }
    }

    #[test]
    fn a_cached_model_is_found_without_the_hub() {
        let cache = tempfile::tempdir().unwrap();
        let repo = cache.path().join("models--owner--name");
        let snapshot = repo.join("snapshots/abc");
        std::fs::create_dir_all(&snapshot).unwrap();
        std::fs::create_dir_all(repo.join("refs")).unwrap();
        std::fs::write(repo.join("refs/main"), "abc").unwrap();
        for file in ["config.json", "tokenizer.json"] {
            std::fs::write(snapshot.join(file), "{}").unwrap();
        }
        let hub = hub(cache.path());
        assert!(
            matches!(resolve("owner/name", &hub), Err(HubError::NotCached { .. })),
            "half a model is none"
        );
        std::fs::write(snapshot.join("model.safetensors"), "").unwrap();
        assert_eq!(resolve("owner/name", &hub).unwrap(), snapshot);
    }

    #[test]
    fn what_is_no_source_is_said_to_be_none() {
        let cache = tempfile::tempdir().unwrap();
        for source in ["name", "/no/such/folder", "a/b/c", "./name", ""] {
            let error = resolve(source, &hub(cache.path())).unwrap_err();
            assert!(matches!(error, HubError::NoSource(_)), "{source}: {error}");
        }
        let folder = cache.path().to_str().unwrap();
        assert_eq!(resolve(folder, &hub(cache.path())).unwrap(), cache.path());
    }
}
