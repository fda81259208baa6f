//! What the gateway is to do: the files as written ([`settings`]), and what they mean ([`Config`]).

use crate::responses::Bounds;
use filters::retry::Retries;
use filters::route::{Access, Routing, RoutingPolicy, Secret};
use filters::sampling::Defaults;
use http::HeaderValue;
use protocol::node::WeightFormat;
use std::collections::{BTreeMap, HashMap};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio::process::Command;

mod check;
pub(crate) mod settings;

pub(crate) use check::{Fault, endpoint};

/// Everything the gateway needs to know, checked. Durations and sizes are values here, names are resolved.
#[derive(Clone)]
pub(crate) struct Config {
    pub(crate) listen: SocketAddr,
    pub(crate) metrics_listen: SocketAddr,
    /// Where clients are spoken to in TLS, if anywhere.
    pub(crate) tls: Option<Tls>,
    /// Threads that serve requests.
    pub(crate) threads: usize,
    /// Longest request body in bytes.
    pub(crate) max_body: usize,
    /// Requests that may wait for models to load.
    pub(crate) max_waiting: usize,
    pub(crate) retries: Retries,
    pub(crate) routing: Routing,
    /// That of `routing`; a reload keeps it where `routing` stays as it was, with all it remembers.
    pub(crate) policy: Arc<dyn RoutingPolicy>,
    /// Pages that may talk to the gateway, if any.
    pub(crate) cors: Option<Cors>,
    pub(crate) timeouts: Timeouts,
    /// How long running requests may go on after SIGTERM.
    pub(crate) drain: Duration,
    pub(crate) poll: Poll,
    /// `None`: nodes may not join by themselves.
    pub(crate) joining: Option<Joining>,
    pub(crate) eviction: Eviction,
    pub(crate) replicas: Replicas,
    pub(crate) responses: Responses,
    pub(crate) neurons: Vec<Neuron>,
    /// By id.
    pub(crate) models: BTreeMap<Arc<str>, Model>,
    /// Names that stand for the first of several models that can be had.
    pub(crate) fallbacks: HashMap<Arc<str>, Vec<Arc<str>>>,
    /// What holds for a model where a request does not say.
    pub(crate) sampling: Defaults,
    /// The model `cortex up` loads.
    pub(crate) default_model: Option<Arc<str>>,
    /// The file it was read from, to be read again on reload.
    pub(crate) file: Option<PathBuf>,
    /// All files that it depends on.
    pub(crate) files: Vec<PathBuf>,
    /// How often these are looked at for changes, if ever.
    pub(crate) watch: Option<Duration>,
    /// Where listening sockets are handed to the next process.
    pub(crate) upgrade_socket: PathBuf,
}

/// A listener in TLS.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Tls {
    pub(crate) listen: SocketAddr,
    /// A chain in PEM, the host's own certificate first.
    pub(crate) certificate: PathBuf,
    /// Its key in PEM.
    pub(crate) key: PathBuf,
}

/// Origins whose pages may talk to the gateway.
#[derive(Debug, Clone)]
pub(crate) struct Cors {
    /// `*` is any.
    pub(crate) origins: Arc<[HeaderValue]>,
    /// How long a browser may keep a permission.
    pub(crate) max_age: Duration,
}

/// Deadlines on everything that waits.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Timeouts {
    pub(crate) connect: Duration,
    pub(crate) request_body: Duration,
    pub(crate) head: Duration,
    pub(crate) idle: Duration,
    pub(crate) load: Duration,
    pub(crate) keep_alive: Duration,
}

/// How nodes are watched.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Poll {
    pub(crate) period: Duration,
    pub(crate) timeout: Duration,
    /// Share of the period by which each one is longer or shorter, by chance.
    pub(crate) jitter: f64,
    /// Polls in a row that a node that was down has to answer to count as up.
    pub(crate) up_after: u32,
    /// Failed polls in a row after which a node counts as down.
    pub(crate) down_after: u32,
}

/// Who has to go when there is no room.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Eviction {
    pub(crate) strategy: Strategy,
    /// Loads on a node after which its idle models are let go, so that the next ones find unbroken memory; 0 is never.
    pub(crate) defrag_after_cycles: u32,
}

/// The order in which idle models are evicted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Strategy {
    /// Least recently used first.
    Lru,
    /// Lowest priority first, then least recently used.
    Priority,
}

/// When a model that may have several replicas gets another one, and when one goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Replicas {
    /// Requests in flight to a replica above which there are too few of them.
    pub(crate) above: usize,
    /// How long that has to last.
    pub(crate) after: Duration,
    /// How long the others have to be able to do its work at half of `above`.
    pub(crate) retire_after: Duration,
}

/// How responses are kept, so that clients may go on from them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Responses {
    pub(crate) bounds: Bounds,
    /// The file they are in; `None` is memory.
    pub(crate) path: Option<PathBuf>,
}

/// How nodes join by themselves.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Joining {
    /// What they have to know.
    pub(crate) token: Secret,
    /// How long they stay without joining again.
    pub(crate) lease: Duration,
}

/// What a node is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Kind {
    /// One of ours: it can be told to load and unload.
    Neuron,
    /// A server that speaks OpenAI and has these models whatever we do; those that it lists where there are none.
    OpenAi { models: Vec<Arc<str>> },
}

/// A node by its address.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Neuron {
    pub(crate) name: Arc<str>,
    /// Host and port.
    pub(crate) authority: Arc<str>,
    pub(crate) tls: bool,
    /// Its share of requests beside nodes of weight 1.
    pub(crate) weight: u32,
    /// Every address that its name stands for is a node.
    pub(crate) all_addresses: bool,
    pub(crate) kind: Kind,
    pub(crate) access: Arc<Access>,
}

/// A model of the catalogue.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Model {
    /// A folder on the node, or a hub id.
    pub(crate) source: String,
    /// Bytes it takes, over all its devices; `None` where nobody has said.
    pub(crate) memory: Option<u64>,
    /// Devices of one node that share it, evenly.
    pub(crate) tensor_parallel: usize,
    /// Devices that a node must have to get it.
    pub(crate) min_devices: usize,
    pub(crate) context_length: Option<u64>,
    pub(crate) quant: Option<WeightFormat>,
    /// Loaded at start and never evicted.
    pub(crate) pinned: bool,
    /// Nodes that have it loaded at start and never evict it; no other gets it. Empty is wherever there is room.
    pub(crate) pinned_on: Vec<Arc<str>>,
    /// It is let go when nobody has used it for so long; `None` is never, as long as nobody needs the room.
    pub(crate) keep_alive: Option<Duration>,
    /// Nodes that may serve it at a time.
    pub(crate) max_replicas: usize,
    /// Higher stays longer under the strategy `priority`.
    pub(crate) priority: i32,
    pub(crate) aliases: Vec<Arc<str>>,
}

impl Model {
    /// Whether it is loaded at start and never evicted.
    pub(crate) fn is_pinned(&self) -> bool {
        self.pinned || !self.pinned_on.is_empty()
    }
}

impl Config {
    /// Reads and checks a file; without one, the defaults on loopback.
    ///
    /// # Errors
    /// Every fault found, each naming file and key.
    pub(crate) fn read(file: Option<&Path>) -> Result<Self, Vec<Fault>> {
        let (settings, file) = match file {
            Some(path) => (
                settings::read(path).map_err(|fault| vec![fault])?,
                Some(path),
            ),
            None => (settings::Settings::default(), None),
        };
        let models = match (&settings.models, file) {
            (Some(models), Some(file)) => {
                let path = file.parent().unwrap_or(Path::new("")).join(models);
                let read: settings::ModelsFile =
                    settings::read(&path).map_err(|fault| vec![fault])?;
                Some((path, read))
            }
            _ => None,
        };
        check::check(settings, models, file)
    }

    /// The configuration of `cortex up`: one local neuron, and either `model` or the catalogue at `catalogue`.
    ///
    /// # Errors
    /// Every fault of the catalogue.
    pub(crate) fn local(
        listen: SocketAddr,
        metrics_listen: SocketAddr,
        neuron: SocketAddr,
        model: Option<&str>,
        catalogue: &Path,
    ) -> Result<Self, Vec<Fault>> {
        let mut settings = settings::Settings::default();
        settings.gateway.listen = listen.to_string();
        settings.gateway.metrics_listen = metrics_listen.to_string();
        settings.fleet.poll = "500ms".into();
        settings.neurons = vec![settings::Neuron {
            name: "local".into(),
            endpoint: format!("http://{neuron}"),
            weight: 1,
            all_addresses: false,
            kind: String::new(),
            models: Vec::new(),
            api_key_env: String::new(),
            api_key_file: PathBuf::new(),
        }];
        let models = match model {
            Some(model) => Some((PathBuf::from("--model"), one_model(model))),
            None if catalogue.is_file() => {
                let read = settings::read(catalogue).map_err(|fault| vec![fault])?;
                Some((catalogue.to_path_buf(), read))
            }
            None => None,
        };
        check::check(settings, models, None)
    }
}

/// A catalogue of the one model that the command line names: a folder that is here, or a hub id.
fn one_model(model: &str) -> settings::ModelsFile {
    let folder = Path::new(model)
        .canonicalize()
        .ok()
        .filter(|path| path.is_dir());
    let (id, source) = match &folder {
        Some(path) => {
            let name = path.file_name().map_or_else(
                || "model".into(),
                |name| name.to_string_lossy().into_owned(),
            );
            (name, path.display().to_string())
        }
        None => (model.to_owned(), model.to_owned()),
    };
    let entry = settings::Model {
        id: id.clone(),
        source,
        memory: None,
        tensor_parallel: 1,
        min_devices: 1,
        context_length: None,
        quant: None,
        pinned: false,
        pinned_on: Vec::new(),
        keep_alive: None,
        max_replicas: 1,
        priority: 0,
        aliases: Vec::new(),
        sampling: BTreeMap::new(),
    };
    settings::ModelsFile {
        default: Some(id),
        models: vec![entry],
        aliases: Vec::new(),
    }
}

/// The filter for log lines, where the environment sets one.
#[allow(clippy::disallowed_methods)] // this is the place that reads the environment
pub(crate) fn log_filter() -> Option<String> {
    std::env::var("CORTEX_LOG").ok()
}

/// What the environment holds under this name, for keys of foreign servers.
#[allow(clippy::disallowed_methods)] // this is the place that reads the environment
fn variable(name: &str) -> Option<String> {
    std::env::var(name).ok()
}

/// The cargo that started this process, if one did, ready to build another part of the same checkout.
#[allow(clippy::disallowed_methods)] // this is the place that reads the environment
pub(crate) fn cargo() -> Option<Command> {
    let mut cargo = Command::new(std::env::var_os("CARGO")?);
    // what it said of our package would make build scripts that look at it run again, and all that depends on them
    for (name, _) in std::env::vars_os() {
        let text = name.to_string_lossy();
        if text.starts_with("CARGO_PKG_") || text.starts_with("CARGO_MANIFEST_") {
            cargo.env_remove(&name);
        }
    }
    Some(cargo)
}
