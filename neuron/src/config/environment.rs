//! Every environment variable the daemon reads, in one list.
#![allow(clippy::disallowed_methods)] // this is the place the lint points to

use std::env;
use std::path::{Path, PathBuf};

/// `NEURON_LOG`, else `RUST_LOG`, else `info`: the filter of the log, as tracing-subscriber writes them.
#[must_use]
pub fn log_filter() -> String {
    env::var("NEURON_LOG")
        .or_else(|_| env::var("RUST_LOG"))
        .unwrap_or_else(|_| "info".into())
}

/// `HF_HUB_CACHE`, else `$HF_HOME/hub`, else `~/.cache/huggingface/hub`, as all Hugging Face tools do.
pub(super) fn hub_cache() -> Option<PathBuf> {
    if let Some(path) = env::var_os("HF_HUB_CACHE") {
        return Some(path.into());
    }
    if let Some(home) = env::var_os("HF_HOME") {
        return Some(PathBuf::from(home).join("hub"));
    }
    env::home_dir().map(|home| home.join(".cache/huggingface/hub"))
}

/// `HF_TOKEN`, else the file `token` beside the cache.
pub(super) fn hub_token(cache: &Path) -> Option<String> {
    let from_file = || std::fs::read_to_string(cache.parent()?.join("token")).ok();
    let token = env::var("HF_TOKEN").ok().or_else(from_file)?;
    let token = token.trim();
    (!token.is_empty()).then(|| token.to_owned())
}

/// `NEURON_JOIN_TOKEN`: what a gateway wants to be told by who joins it. Arguments can be seen by every user of a host.
pub(super) fn join_token() -> Option<String> {
    env::var("NEURON_JOIN_TOKEN").ok()
}

/// `HF_HUB_OFFLINE`, true for anything but `0` and nothing.
pub(super) fn hub_offline() -> bool {
    env::var("HF_HUB_OFFLINE").is_ok_and(|value| !matches!(value.as_str(), "" | "0"))
}

/// `HF_ENDPOINT`.
pub(super) fn hub_endpoint() -> Option<String> {
    env::var("HF_ENDPOINT").ok().filter(|url| !url.is_empty())
}

/// The host's name, `localhost` when the system does not tell.
pub(super) fn host_name() -> String {
    std::fs::read_to_string("/proc/sys/kernel/hostname")
        .map(|name| name.trim().to_owned())
        .ok()
        .filter(|name| !name.is_empty())
        .or_else(|| env::var("HOSTNAME").ok())
        .unwrap_or_else(|| "localhost".into())
}
