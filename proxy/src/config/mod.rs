//! What the gateway is to do: the files as written ([`settings`]), and what they mean ([`Config`]).

use crate::responses::Bounds;
use filters::route::RoutingPolicy;
use http::HeaderValue;
use protocol::node::WeightFormat;
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

mod check;
pub(crate) mod settings;

pub(crate) use check::Fault;

/// Everything the gateway needs to know, checked. Durations and sizes are values here, names are resolved.
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
    /// Nodes asked for one request, the first included.
    pub(crate) attempts: usize,
    pub(crate) routing: Arc<dyn RoutingPolicy>,
    /// Pages that may talk to the gateway, if any.
    pub(crate) cors: Option<Cors>,
    pub(crate) timeouts: Timeouts,
    /// How long running requests may go on after SIGTERM.
    pub(crate) drain: Duration,
    pub(crate) poll: Poll,
    pub(crate) eviction: Eviction,
    pub(crate) responses: Responses,
    pub(crate) neurons: Vec<Neuron>,
    /// By id.
    pub(crate) models: BTreeMap<Arc<str>, Model>,
    /// The model `cortex up` loads.
    pub(crate) default_model: Option<Arc<str>>,
    /// Files it was read from, to be looked at again on reload.
    pub(crate) file: Option<PathBuf>,
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

/// How responses are kept, so that clients may go on from them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Responses {
    pub(crate) bounds: Bounds,
    /// The file they are in; `None` is memory.
    pub(crate) path: Option<PathBuf>,
}

/// A node by its address.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Neuron {
    pub(crate) name: Arc<str>,
    /// Host and port.
    pub(crate) authority: Arc<str>,
    pub(crate) tls: bool,
}

/// A model of the catalogue.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Model {
    /// A folder on the node, or a hub id.
    pub(crate) source: String,
    /// Bytes it takes on a device; `None` while nobody has said.
    pub(crate) memory: Option<u64>,
    pub(crate) context_length: Option<u64>,
    pub(crate) quant: Option<WeightFormat>,
    /// Loaded at start and never evicted.
    pub(crate) pinned: bool,
    /// Higher stays longer under the strategy `priority`.
    pub(crate) priority: i32,
    pub(crate) aliases: Vec<Arc<str>>,
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
        context_length: None,
        quant: None,
        pinned: false,
        priority: 0,
        aliases: Vec::new(),
    };
    settings::ModelsFile {
        default: Some(id),
        models: vec![entry],
    }
}

/// The filter for log lines, where the environment sets one.
#[allow(clippy::disallowed_methods)] // this is the place that reads the environment
pub(crate) fn log_filter() -> Option<String> {
    std::env::var("CORTEX_LOG").ok()
}

/// The cargo that started this process, if one did.
#[allow(clippy::disallowed_methods)] // this is the place that reads the environment
pub(crate) fn cargo() -> Option<PathBuf> {
    std::env::var("CARGO").ok().map(PathBuf::from)
}
