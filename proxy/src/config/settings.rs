//! The configuration files as written: one struct per table, unknown keys refused, no other type known.

use super::check::Fault;
use protocol::node::WeightFormat;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// `cortex.toml`.
#[derive(Debug, Default, Deserialize, PartialEq)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Settings {
    pub(crate) gateway: Gateway,
    pub(crate) tls: Tls,
    pub(crate) cors: Cors,
    pub(crate) timeouts: Timeouts,
    pub(crate) routing: Routing,
    pub(crate) fleet: Fleet,
    pub(crate) eviction: Eviction,
    pub(crate) replicas: Replicas,
    pub(crate) responses: Responses,
    pub(crate) neurons: Vec<Neuron>,
    /// The catalogue's file, beside this one.
    pub(crate) models: Option<PathBuf>,
}

#[derive(Debug, Deserialize, PartialEq)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Gateway {
    pub(crate) listen: String,
    pub(crate) metrics_listen: String,
    /// 0: as many as there are cores.
    pub(crate) threads: usize,
    pub(crate) max_body: String,
    pub(crate) max_waiting: usize,
    pub(crate) attempts: usize,
    pub(crate) routing: String,
    /// Empty: never.
    pub(crate) watch: String,
    pub(crate) upgrade_socket: PathBuf,
}

#[derive(Debug, Default, Deserialize, PartialEq)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Tls {
    /// Empty: no such listener.
    pub(crate) listen: String,
    pub(crate) certificate: PathBuf,
    pub(crate) key: PathBuf,
}

#[derive(Debug, Deserialize, PartialEq)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Cors {
    /// Empty: none but the gateway's own.
    pub(crate) origins: Vec<String>,
    pub(crate) max_age: String,
}

#[derive(Debug, Deserialize, PartialEq)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Timeouts {
    pub(crate) connect: String,
    pub(crate) request_body: String,
    pub(crate) head: String,
    pub(crate) idle: String,
    pub(crate) load: String,
    pub(crate) keep_alive: String,
    pub(crate) drain: String,
}

#[derive(Debug, Deserialize, PartialEq)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Routing {
    /// Empty: sessions are not looked for.
    pub(crate) session_header: String,
    pub(crate) overload: f64,
    pub(crate) prefixes: usize,
    pub(crate) retry_budget: f64,
    pub(crate) retry_backoff: String,
    pub(crate) break_after: u32,
    pub(crate) break_share: f64,
    pub(crate) break_least: u32,
    pub(crate) break_open: String,
    pub(crate) break_longest: String,
}

#[derive(Debug, Deserialize, PartialEq)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Fleet {
    pub(crate) poll: String,
    pub(crate) poll_timeout: String,
    pub(crate) join_token_file: PathBuf,
    pub(crate) join_lease: String,
    pub(crate) jitter: f64,
    pub(crate) up_after: u32,
    pub(crate) down_after: u32,
}

#[derive(Debug, Deserialize, PartialEq)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Eviction {
    pub(crate) strategy: String,
    pub(crate) defrag_after_cycles: u32,
}

#[derive(Debug, Deserialize, PartialEq)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Replicas {
    pub(crate) above: usize,
    pub(crate) after: String,
    pub(crate) retire_after: String,
}

#[derive(Debug, Deserialize, PartialEq)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Responses {
    pub(crate) entries: usize,
    pub(crate) bytes: String,
    /// A file beside this one; empty: memory.
    pub(crate) path: String,
}

#[derive(Debug, Deserialize, PartialEq)]
#[serde(deny_unknown_fields)]
pub(crate) struct Neuron {
    pub(crate) name: String,
    pub(crate) endpoint: String,
    #[serde(default = "one")]
    pub(crate) weight: u32,
    #[serde(default)]
    pub(crate) all_addresses: bool,
    /// `neuron`, or `openai`: some server that speaks OpenAI and manages its own models.
    #[serde(default)]
    pub(crate) kind: String,
    #[serde(default)]
    pub(crate) models: Vec<String>,
    #[serde(default)]
    pub(crate) api_key_env: String,
    #[serde(default)]
    pub(crate) api_key_file: PathBuf,
}

fn one() -> u32 {
    1
}

/// `models.toml`.
#[derive(Debug, Default, Deserialize, PartialEq)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct ModelsFile {
    pub(crate) default: Option<String>,
    pub(crate) models: Vec<Model>,
    pub(crate) aliases: Vec<Alias>,
}

#[derive(Debug, Deserialize, PartialEq)]
#[serde(deny_unknown_fields)]
pub(crate) struct Alias {
    pub(crate) name: String,
    pub(crate) models: Vec<String>,
}

#[derive(Debug, Deserialize, PartialEq)]
#[serde(deny_unknown_fields)]
pub(crate) struct Model {
    pub(crate) id: String,
    pub(crate) source: String,
    #[serde(default, alias = "vram")]
    pub(crate) memory: Option<String>,
    #[serde(default = "one")]
    pub(crate) tensor_parallel: u32,
    #[serde(default = "one")]
    pub(crate) min_devices: u32,
    #[serde(default)]
    pub(crate) context_length: Option<u64>,
    #[serde(default)]
    pub(crate) quant: Option<WeightFormat>,
    #[serde(default)]
    pub(crate) pinned: bool,
    #[serde(default)]
    pub(crate) pinned_on: Vec<String>,
    #[serde(default)]
    pub(crate) keep_alive: Option<String>,
    #[serde(default = "one")]
    pub(crate) max_replicas: u32,
    #[serde(default)]
    pub(crate) priority: i32,
    #[serde(default)]
    pub(crate) aliases: Vec<String>,
    #[serde(default)]
    pub(crate) sampling: BTreeMap<String, f64>,
}

impl Default for Gateway {
    fn default() -> Self {
        Self {
            listen: "127.0.0.1:31313".into(),
            metrics_listen: "127.0.0.1:31314".into(),
            threads: 0,
            max_body: "32MiB".into(),
            max_waiting: 1024,
            attempts: 3,
            routing: "least_loaded".into(),
            watch: "5s".into(),
            upgrade_socket: "/tmp/cortex_upgrade.sock".into(),
        }
    }
}

impl Default for Cors {
    fn default() -> Self {
        Self {
            origins: Vec::new(),
            max_age: "10m".into(),
        }
    }
}

impl Default for Timeouts {
    fn default() -> Self {
        Self {
            connect: "2s".into(),
            request_body: "30s".into(),
            head: "10m".into(),
            idle: "2m".into(),
            load: "10m".into(),
            keep_alive: "10s".into(),
            drain: "30s".into(),
        }
    }
}

impl Default for Routing {
    fn default() -> Self {
        Self {
            session_header: "x-session-id".into(),
            overload: 2.0,
            prefixes: 200_000,
            retry_budget: 0.2,
            retry_backoff: "25ms".into(),
            break_after: 5,
            break_share: 0.5,
            break_least: 20,
            break_open: "5s".into(),
            break_longest: "5m".into(),
        }
    }
}

impl Default for Fleet {
    fn default() -> Self {
        Self {
            poll: "2s".into(),
            poll_timeout: "2s".into(),
            join_token_file: PathBuf::new(),
            join_lease: "30s".into(),
            jitter: 0.1,
            up_after: 1,
            down_after: 2,
        }
    }
}

impl Default for Eviction {
    fn default() -> Self {
        Self {
            strategy: "lru".into(),
            defrag_after_cycles: 0,
        }
    }
}

impl Default for Replicas {
    fn default() -> Self {
        Self {
            above: 16,
            after: "5s".into(),
            retire_after: "5m".into(),
        }
    }
}

impl Default for Responses {
    fn default() -> Self {
        Self {
            entries: 10_000,
            bytes: "256MiB".into(),
            path: String::new(),
        }
    }
}

/// Reads a file of settings.
///
/// # Errors
/// One fault naming the file and, where the parser knows it, the line.
pub(crate) fn read<T: DeserializeOwned>(path: &Path) -> Result<T, Fault> {
    let text = std::fs::read_to_string(path)
        .map_err(|error| Fault::new(path, format!("cannot be read: {error}")))?;
    toml::from_str(&text).map_err(|error| {
        let line = error
            .span()
            .map_or(0, |span| text[..span.start].matches('\n').count() + 1);
        Fault::new(
            path,
            format!("line {line}: {}", error.message().replace('\n', " ")),
        )
    })
}
