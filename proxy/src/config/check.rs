//! From what is written to what it means: one fault per broken rule, each with a remedy.

use super::settings::{self, ModelsFile, Settings};
use super::{
    Config, Cors, Eviction, Joining, Kind, Model, Neuron, Poll, Replicas, Responses, Strategy,
    Timeouts, Tls,
};
use crate::responses::Bounds;
use filters::retry::Retries;
use filters::route::{self, Access, Breaker, Routing, Secret};
use filters::sampling::{Defaults, FIELDS};
use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::net::{SocketAddr, ToSocketAddrs};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

/// Something wrong with a file, said in one line.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Fault {
    file: PathBuf,
    what: String,
}

impl Fault {
    pub(crate) fn new(file: &Path, what: impl Into<String>) -> Self {
        Self {
            file: file.into(),
            what: what.into(),
        }
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.file.display(), self.what)
    }
}

/// Collects faults, so that a person sees all of them at once.
struct Checker {
    file: PathBuf,
    /// Files that were read on the way.
    files: Vec<PathBuf>,
    faults: Vec<Fault>,
}

impl Checker {
    fn fault(&mut self, what: impl Into<String>) {
        self.faults.push(Fault::new(&self.file, what));
    }

    /// The value `text` stands for; after a fault a stand-in, as the whole is refused anyway.
    fn parse<T: Default, E: fmt::Display>(
        &mut self,
        key: &str,
        text: &str,
        example: &str,
        parsed: Result<T, E>,
    ) -> T {
        parsed.unwrap_or_else(|error| {
            self.fault(format!(
                "{key} = \"{text}\": {error}; write it like \"{example}\""
            ));
            T::default()
        })
    }

    fn duration(&mut self, key: &str, text: &str) -> Duration {
        let parsed = humantime::parse_duration(text).map_err(|error| error.to_string());
        let parsed = parsed.and_then(|length| {
            if length.is_zero() {
                Err("must be longer than nothing".into())
            } else {
                Ok(length)
            }
        });
        self.parse(key, text, "30s", parsed)
    }

    fn bytes(&mut self, key: &str, text: &str) -> u64 {
        let parsed = bytesize::ByteSize::from_str(text).map(|size| size.as_u64());
        self.parse(key, text, "32MiB", parsed)
    }

    /// What a file holds, without the white space around it.
    fn secret(&mut self, key: &str, path: PathBuf) -> Secret {
        let read = std::fs::read_to_string(&path);
        let secret = match read.as_deref().map(str::trim) {
            Ok("") => {
                self.fault(format!("{key} = \"{}\" is empty", path.display()));
                String::new()
            }
            Ok(text) => text.to_owned(),
            Err(error) => {
                self.fault(format!(
                    "{key} = \"{}\" cannot be read: {error}",
                    path.display()
                ));
                String::new()
            }
        };
        self.files.push(path);
        Secret(secret)
    }

    fn at_least(&mut self, key: &str, value: f64, least: f64) -> f64 {
        if value.is_nan() || value < least {
            self.fault(format!("{key} = {value}: at least {least} is needed"));
        }
        value
    }

    fn address(&mut self, key: &str, text: &str) -> SocketAddr {
        let resolved = text
            .to_socket_addrs()
            .ok()
            .and_then(|mut addresses| addresses.next());
        resolved.unwrap_or_else(|| {
            self.fault(format!(
                "{key} = \"{text}\" is no address; write it like \"127.0.0.1:31313\""
            ));
            SocketAddr::from(([127, 0, 0, 1], 0))
        })
    }
}

/// Checks settings and catalogue.
pub(super) fn check(
    settings: Settings,
    models: Option<(PathBuf, ModelsFile)>,
    file: Option<&Path>,
) -> Result<Config, Vec<Fault>> {
    let path = file.unwrap_or(Path::new("(defaults)"));
    let mut checker = Checker {
        file: path.into(),
        files: file.map(Path::to_path_buf).into_iter().collect(),
        faults: Vec::new(),
    };
    let config = build(settings, file, &mut checker);
    let catalogue = match models {
        Some((path, models)) => {
            checker.files.push(path.clone());
            let own = std::mem::replace(&mut checker.file, path);
            let built = self::catalogue(models, &config.neurons, &mut checker);
            checker.file = own;
            built
        }
        None => Catalogue::default(),
    };
    if checker.faults.is_empty() {
        Ok(Config {
            models: catalogue.models,
            fallbacks: catalogue.fallbacks,
            sampling: catalogue.sampling,
            default_model: catalogue.default,
            files: checker.files,
            ..config
        })
    } else {
        Err(checker.faults)
    }
}

fn build(settings: Settings, file: Option<&Path>, checker: &mut Checker) -> Config {
    let Settings {
        gateway,
        tls,
        cors,
        timeouts,
        routing,
        fleet,
        eviction,
        replicas,
        responses,
        neurons,
        models: _,
    } = settings;
    let retries = Retries {
        attempts: gateway.attempts,
        budget: checker.at_least("routing.retry_budget", routing.retry_budget, 0.0),
        backoff: checker.duration("routing.retry_backoff", &routing.retry_backoff),
    };
    let routing = routed(&gateway.routing, &routing, checker);
    let strategy = match eviction.strategy.as_str() {
        "lru" => Strategy::Lru,
        "priority" => Strategy::Priority,
        other => {
            checker.fault(format!(
                "eviction.strategy = \"{other}\" is unknown; use \"lru\" or \"priority\""
            ));
            Strategy::Lru
        }
    };
    for (key, value) in [
        ("gateway.attempts", gateway.attempts),
        ("gateway.max_waiting", gateway.max_waiting),
        ("fleet.up_after", fleet.up_after as usize),
        ("fleet.down_after", fleet.down_after as usize),
        ("replicas.above", replicas.above),
        ("routing.prefixes", routing.prefixes),
        ("routing.break_after", routing.breaker.failures as usize),
        ("routing.break_least", routing.breaker.least as usize),
    ] {
        if value == 0 {
            checker.fault(format!("{key} = 0: at least 1 is needed"));
        }
    }
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    Config {
        listen: checker.address("gateway.listen", &gateway.listen),
        metrics_listen: checker.address("gateway.metrics_listen", &gateway.metrics_listen),
        tls: listener(tls, file, checker),
        threads: if gateway.threads == 0 {
            cores
        } else {
            gateway.threads
        },
        max_body: usize::try_from(checker.bytes("gateway.max_body", &gateway.max_body))
            .unwrap_or(usize::MAX),
        max_waiting: gateway.max_waiting,
        retries,
        policy: routing.policy().expect("its name has been checked"),
        routing,
        cors: pages(&cors, checker),
        timeouts: Timeouts {
            connect: checker.duration("timeouts.connect", &timeouts.connect),
            request_body: checker.duration("timeouts.request_body", &timeouts.request_body),
            head: checker.duration("timeouts.head", &timeouts.head),
            idle: checker.duration("timeouts.idle", &timeouts.idle),
            load: checker.duration("timeouts.load", &timeouts.load),
            keep_alive: checker.duration("timeouts.keep_alive", &timeouts.keep_alive),
        },
        drain: checker.duration("timeouts.drain", &timeouts.drain),
        poll: Poll {
            period: checker.duration("fleet.poll", &fleet.poll),
            timeout: checker.duration("fleet.poll_timeout", &fleet.poll_timeout),
            jitter: checker.at_least("fleet.jitter", fleet.jitter, 0.0).min(1.0),
            up_after: fleet.up_after,
            down_after: fleet.down_after,
        },
        eviction: Eviction {
            strategy,
            defrag_after_cycles: eviction.defrag_after_cycles,
        },
        replicas: Replicas {
            above: replicas.above,
            after: checker.duration("replicas.after", &replicas.after),
            retire_after: checker.duration("replicas.retire_after", &replicas.retire_after),
        },
        responses: kept(responses, file, checker),
        neurons: nodes(neurons, file, checker),
        models: BTreeMap::new(),
        fallbacks: HashMap::new(),
        sampling: HashMap::new(),
        default_model: None,
        file: file.map(Path::to_path_buf),
        files: Vec::new(),
        watch: (!gateway.watch.is_empty())
            .then(|| checker.duration("gateway.watch", &gateway.watch)),
        upgrade_socket: folder_of(file).join(&gateway.upgrade_socket),
        joining: joining(&fleet, file, checker),
    }
}

/// The folder that paths in the file are relative to.
fn folder_of(file: Option<&Path>) -> &Path {
    file.and_then(Path::parent).unwrap_or(Path::new(""))
}

/// Whether and how nodes may join by themselves.
fn joining(fleet: &settings::Fleet, file: Option<&Path>, checker: &mut Checker) -> Option<Joining> {
    let lease = checker.duration("fleet.join_lease", &fleet.join_lease);
    let named = !fleet.join_token_file.as_os_str().is_empty();
    let token = named.then(|| {
        let path = folder_of(file).join(&fleet.join_token_file);
        checker.secret("fleet.join_token_file", path)
    });
    token.map(|token| Joining { token, lease })
}

/// How nodes are chosen, by the policy of this name.
fn routed(policy: &str, written: &settings::Routing, checker: &mut Checker) -> Routing {
    let known = route::POLICIES.contains(&policy);
    if !known {
        let known = route::POLICIES.join("\", \"");
        checker.fault(format!(
            "gateway.routing = \"{policy}\" is unknown; use one of \"{known}\""
        ));
    }
    let name = &written.session_header;
    let header = (!name.is_empty()).then(|| name.parse().ok());
    if header == Some(None) {
        checker.fault(format!(
            "routing.session_header = \"{name}\" is no name of a header; write it like \"x-session-id\""
        ));
    }
    Routing {
        policy: if known { policy } else { route::POLICIES[0] }.into(),
        session_header: header.flatten(),
        overload: checker.at_least("routing.overload", written.overload, 1.0),
        prefixes: written.prefixes,
        breaker: Breaker {
            failures: written.break_after,
            share: checker.at_least("routing.break_share", written.break_share, 0.01),
            least: written.break_least,
            open: checker.duration("routing.break_open", &written.break_open),
            longest: checker.duration("routing.break_longest", &written.break_longest),
        },
    }
}

fn kept(responses: settings::Responses, file: Option<&Path>, checker: &mut Checker) -> Responses {
    let settings::Responses {
        entries,
        bytes,
        path,
    } = responses;
    let bytes = checker.bytes("responses.bytes", &bytes);
    let folder = file.and_then(Path::parent).unwrap_or(Path::new(""));
    let path = (!path.is_empty()).then(|| folder.join(&path));
    if let Some(path) = &path {
        let parent = std::path::absolute(path).ok();
        let parent = parent.as_deref().and_then(Path::parent);
        if path.is_dir() || !parent.is_some_and(Path::is_dir) {
            checker.fault(format!(
                "responses.path = \"{}\" cannot be a file: name one in a folder that is there",
                path.display()
            ));
        }
    }
    Responses {
        bounds: Bounds { entries, bytes },
        path,
    }
}

/// The listener in TLS. Its files stand beside the configuration unless their paths are absolute.
fn listener(tls: settings::Tls, file: Option<&Path>, checker: &mut Checker) -> Option<Tls> {
    if tls.listen.is_empty() {
        return None;
    }
    let folder = file.and_then(Path::parent).unwrap_or(Path::new(""));
    let mut read = |key: &str, path: PathBuf, holds: &str| {
        let path = folder.join(path);
        match std::fs::read_to_string(&path) {
            Ok(text) if text.contains(holds) => {}
            Ok(_) => checker.fault(format!(
                "tls.{key} = \"{}\" holds no {holds}; give a file in PEM",
                path.display()
            )),
            Err(error) => checker.fault(format!(
                "tls.{key} = \"{}\" cannot be read: {error}",
                path.display()
            )),
        }
        path
    };
    let certificate = read("certificate", tls.certificate, "CERTIFICATE");
    let key = read("key", tls.key, "PRIVATE KEY");
    checker.files.extend([certificate.clone(), key.clone()]);
    Some(Tls {
        listen: checker.address("tls.listen", &tls.listen),
        certificate,
        key,
    })
}

fn pages(cors: &settings::Cors, checker: &mut Checker) -> Option<Cors> {
    let max_age = checker.duration("cors.max_age", &cors.max_age);
    let mut origins = Vec::with_capacity(cors.origins.len());
    for (index, origin) in cors.origins.iter().enumerate() {
        let sane = origin == "*"
            || origin
                .split_once("://")
                .is_some_and(|(_, host)| !host.is_empty() && !host.contains('/'));
        match origin.parse() {
            Ok(value) if sane => origins.push(value),
            _ => checker.fault(format!(
                "cors.origins[{index}] = \"{origin}\" is no origin; write it like \"https://chat.example.com\", or \"*\" for any"
            )),
        }
    }
    (!cors.origins.is_empty()).then(|| Cors {
        origins: origins.into(),
        max_age,
    })
}

fn nodes(
    neurons: Vec<settings::Neuron>,
    file: Option<&Path>,
    checker: &mut Checker,
) -> Vec<Neuron> {
    let mut nodes: Vec<Neuron> = Vec::with_capacity(neurons.len());
    for (index, neuron) in neurons.into_iter().enumerate() {
        let key = format!("neurons[{index}]");
        if neuron.name.is_empty() || !neuron.name.bytes().all(|b| b.is_ascii_graphic()) {
            checker.fault(format!(
                "{key}.name = \"{}\": use letters, digits and dashes",
                neuron.name
            ));
        } else if nodes.iter().any(|node| *node.name == *neuron.name) {
            checker.fault(format!(
                "{key}.name = \"{}\" is taken by an earlier node",
                neuron.name
            ));
        }
        let foreign = neuron.kind == "openai";
        let (kind, authorization) = kind_of(&key, &neuron, file, checker);
        match endpoint(&neuron.endpoint, foreign) {
            Some((authority, tls, prefix)) => {
                if neuron.weight == 0 {
                    checker.fault(format!("{key}.weight = 0: at least 1 is needed; take the node out to send it nothing"));
                }
                nodes.push(Neuron {
                    name: neuron.name.into(),
                    authority: authority.into(),
                    tls,
                    weight: neuron.weight,
                    all_addresses: neuron.all_addresses,
                    kind,
                    access: Arc::new(Access { prefix, authorization, foreign }),
                });
            }
            None => checker.fault(format!(
                "{key}.endpoint = \"{}\" is no address of a node; write it like \"http://10.0.0.5:13131\"",
                neuron.endpoint
            )),
        }
    }
    nodes
}

/// What a node is, and the credential it asks for.
fn kind_of(
    key: &str,
    neuron: &settings::Neuron,
    file: Option<&Path>,
    checker: &mut Checker,
) -> (Kind, Option<Secret>) {
    let (env, path) = (&neuron.api_key_env, &neuron.api_key_file);
    let from_file = !path.as_os_str().is_empty();
    let kind = match neuron.kind.as_str() {
        "" | "neuron" => {
            if !env.is_empty() || from_file || !neuron.models.is_empty() {
                checker.fault(format!(
                    "{key}: `models`, `api_key_env` and `api_key_file` are for nodes of kind = \"openai\""
                ));
            }
            return (Kind::Neuron, None);
        }
        "openai" => Kind::OpenAi {
            models: neuron.models.iter().map(|id| id.as_str().into()).collect(),
        },
        other => {
            checker.fault(format!(
                "{key}.kind = \"{other}\" is unknown; use \"neuron\" or \"openai\""
            ));
            return (Kind::Neuron, None);
        }
    };
    let secret = match (env.is_empty(), from_file) {
        (true, false) => return (kind, None),
        (true, true) => checker.secret(&format!("{key}.api_key_file"), folder_of(file).join(path)),
        (false, _) => Secret(super::variable(env).unwrap_or_else(|| {
            checker.fault(format!(
                "{key}.api_key_env = \"{env}\" is not in the environment; set it, or use api_key_file"
            ));
            String::new()
        })),
    };
    if !secret.0.bytes().all(|b| b.is_ascii_graphic()) {
        checker.fault(format!(
            "{key}: its key is no key: one line of letters, digits and signs"
        ));
    }
    (kind, Some(Secret(format!("Bearer {}", secret.0))))
}

/// Host and port, whether to speak TLS, and, where one is allowed, the path before all others without `/v1`.
pub(crate) fn endpoint(text: &str, with_path: bool) -> Option<(String, bool, String)> {
    let uri: http::Uri = text.parse().ok()?;
    let tls = match uri.scheme_str()? {
        "http" => false,
        "https" => true,
        _ => return None,
    };
    let path = uri.path().trim_end_matches('/');
    let plain = (with_path || path.is_empty()) && uri.query().is_none();
    let prefix = path.strip_suffix("/v1").unwrap_or(path).to_owned();
    let authority = uri.authority().filter(|_| plain)?;
    let port = authority.port_u16().unwrap_or(if tls { 443 } else { 80 });
    Some((format!("{}:{port}", authority.host()), tls, prefix))
}

/// What `models.toml` says.
#[derive(Default)]
struct Catalogue {
    models: BTreeMap<Arc<str>, Model>,
    fallbacks: HashMap<Arc<str>, Vec<Arc<str>>>,
    sampling: Defaults,
    default: Option<Arc<str>>,
}

fn catalogue(file: ModelsFile, neurons: &[Neuron], checker: &mut Checker) -> Catalogue {
    let mut models = BTreeMap::new();
    let mut sampling = HashMap::new();
    let mut names: HashMap<String, &str> = HashMap::new();
    for (index, model) in file.models.iter().enumerate() {
        let key = format!("models[{index}]");
        for name in std::iter::once(&model.id).chain(&model.aliases) {
            if name.is_empty() || name.chars().any(char::is_control) {
                checker.fault(format!("{key}: \"{name}\" cannot name a model"));
            }
            if let Some(other) = names.insert(name.clone(), &model.id) {
                checker.fault(format!(
                    "{key}: the name \"{name}\" is already that of \"{other}\""
                ));
            }
        }
        if model.source.is_empty() {
            checker.fault(format!(
                "{key}.source is empty; give a folder or a hub id like \"owner/name\""
            ));
        }
        let memory = model
            .memory
            .as_deref()
            .map(|text| checker.bytes(&format!("{key}.memory"), text));
        for (name, value) in [
            ("tensor_parallel", model.tensor_parallel),
            ("min_devices", model.min_devices),
            ("max_replicas", model.max_replicas),
        ] {
            if value == 0 {
                checker.fault(format!("{key}.{name} = 0: at least 1 is needed"));
            }
        }
        for node in &model.pinned_on {
            if !neurons.iter().any(|neuron| *neuron.name == **node) {
                checker.fault(format!(
                    "{key}.pinned_on: there is no node \"{node}\"; name one of [[neurons]]"
                ));
            }
        }
        let keep_alive = model
            .keep_alive
            .as_deref()
            .map(|text| checker.duration(&format!("{key}.keep_alive"), text));
        if keep_alive.is_some() && (model.pinned || !model.pinned_on.is_empty()) {
            checker.fault(format!(
                "{key}.keep_alive: a pinned model is never let go; take one of the two away"
            ));
        }
        let entry = Model {
            tensor_parallel: model.tensor_parallel as usize,
            min_devices: model.min_devices as usize,
            pinned_on: (model.pinned_on.iter())
                .map(|node| node.as_str().into())
                .collect(),
            keep_alive,
            max_replicas: model.max_replicas as usize,
            source: local_source(&checker.file, &model.source),
            memory,
            context_length: model.context_length,
            quant: model.quant,
            pinned: model.pinned,
            priority: model.priority,
            aliases: model
                .aliases
                .iter()
                .map(|alias| alias.as_str().into())
                .collect(),
        };
        let id: Arc<str> = model.id.as_str().into();
        for field in model.sampling.keys() {
            if !FIELDS.contains(&field.as_str()) {
                checker.fault(format!(
                    "{key}.sampling.{field} cannot have a default; these can: {}",
                    FIELDS.join(", ")
                ));
            }
        }
        if !model.sampling.is_empty() {
            let fields = model.sampling.iter();
            let fields = fields.map(|(field, value)| (field.clone(), value.to_string()));
            sampling.insert(id.clone(), fields.collect());
        }
        models.insert(id, entry);
    }
    let mut fallbacks = HashMap::new();
    for (index, alias) in file.aliases.iter().enumerate() {
        let key = format!("aliases[{index}]");
        if alias.name.is_empty() || alias.models.is_empty() {
            checker.fault(format!("{key}: give it a name, and one model or more"));
        }
        if let Some(other) = names.get(&alias.name) {
            checker.fault(format!(
                "{key}: the name \"{}\" is already that of \"{other}\"",
                alias.name
            ));
        }
        for model in alias
            .models
            .iter()
            .filter(|id| !models.contains_key(id.as_str()))
        {
            checker.fault(format!("{key}: there is no model \"{model}\" in this file"));
        }
        let order = alias.models.iter().map(|id| Arc::from(id.as_str()));
        let name: Arc<str> = alias.name.as_str().into();
        if fallbacks.insert(name, order.collect::<Vec<_>>()).is_some() {
            checker.fault(format!("{key}: there is another alias \"{}\"", alias.name));
        }
    }
    let default = file.default.as_deref().and_then(|name| {
        let id = names.get(name).map(|id| Arc::from(*id));
        if id.is_none() {
            let known: Vec<&str> = file.models.iter().map(|model| model.id.as_str()).collect();
            checker.fault(format!(
                "default = \"{name}\" is no model here; there are: {}",
                known.join(", ")
            ));
        }
        id
    });
    Catalogue {
        models,
        fallbacks,
        sampling,
        default,
    }
}

/// A source that starts with a dot is a folder beside the catalogue; nodes get its full path.
fn local_source(file: &Path, source: &str) -> String {
    if !source.starts_with("./") && !source.starts_with("../") {
        return source.into();
    }
    let path = file.parent().unwrap_or(Path::new("")).join(source);
    std::path::absolute(&path)
        .unwrap_or(path)
        .display()
        .to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn faults(cortex: &str, models: &str) -> Vec<String> {
        let settings = toml::from_str(cortex).expect("well formed");
        let models = toml::from_str(models).expect("well formed");
        check(
            settings,
            Some(("models.toml".into(), models)),
            Some(Path::new("cortex.toml")),
        )
        .err()
        .unwrap_or_default()
        .iter()
        .map(ToString::to_string)
        .collect()
    }

    #[test]
    fn every_fault_is_one_line_with_file_key_and_remedy() {
        let cortex = r#"
            [gateway]
            listen = "nowhere"
            max_body = "much"
            routing = "best"
            attempts = 0
            [routing]
            session_header = "x y"
            overload = 0.5
            [tls]
            listen = "127.0.0.1:0"
            certificate = "none.pem"
            key = "Cargo.toml"
            [cors]
            origins = ["*", "https://a/b"]
            [timeouts]
            head = "0s"
            [eviction]
            strategy = "fifo"
            [responses]
            bytes = "lots"
            path = "nowhere/kept"
            [[neurons]]
            name = "a"
            endpoint = "10.0.0.5"
            [[neurons]]
            name = "b"
            endpoint = "http://10.0.0.5"
            weight = 0
            kind = "ollama"
            [[neurons]]
            name = "b"
            endpoint = "http://10.0.0.6"
        "#;
        let models = r#"
            default = "c"
            [[models]]
            id = "a"
            source = ""
            [[models]]
            id = "b"
            source = "x/y"
            aliases = ["a"]
            tensor_parallel = 0
            pinned_on = ["nowhere"]
            keep_alive = "5m"
            sampling = { temperature = 0.6, logit_bias = 1 }
            [[aliases]]
            name = "b"
            models = ["d"]
        "#;
        let faults = faults(cortex, models);
        let expected = [
            "cortex.toml: gateway.routing = \"best\" is unknown; use one of \"least_loaded\", \"prefix_affinity\", \"round_robin\"",
            "cortex.toml: routing.session_header = \"x y\" is no name of a header; write it like \"x-session-id\"",
            "cortex.toml: routing.overload = 0.5: at least 1 is needed",
            "cortex.toml: eviction.strategy = \"fifo\" is unknown; use \"lru\" or \"priority\"",
            "cortex.toml: gateway.attempts = 0: at least 1 is needed",
            "cortex.toml: gateway.listen = \"nowhere\" is no address; write it like \"127.0.0.1:31313\"",
            "cortex.toml: tls.certificate = \"none.pem\" cannot be read: ",
            "cortex.toml: tls.key = \"Cargo.toml\" holds no PRIVATE KEY; give a file in PEM",
            "cortex.toml: gateway.max_body = \"much\":",
            "cortex.toml: cors.origins[1] = \"https://a/b\" is no origin; write it like \"https://chat.example.com\"",
            "cortex.toml: timeouts.head = \"0s\": must be longer than nothing; write it like \"30s\"",
            "cortex.toml: responses.bytes = \"lots\":",
            "cortex.toml: responses.path = \"nowhere/kept\" cannot be a file: name one in a folder that is there",
            "cortex.toml: neurons[0].endpoint = \"10.0.0.5\" is no address of a node; write it like \"http://10.0.0.5:13131\"",
            "cortex.toml: neurons[1].kind = \"ollama\" is unknown; use \"neuron\" or \"openai\"",
            "cortex.toml: neurons[1].weight = 0: at least 1 is needed",
            "cortex.toml: neurons[2].name = \"b\" is taken by an earlier node",
            "models.toml: models[0].source is empty; give a folder or a hub id like \"owner/name\"",
            "models.toml: models[1]: the name \"a\" is already that of \"a\"",
            "models.toml: models[1].tensor_parallel = 0: at least 1 is needed",
            "models.toml: models[1].pinned_on: there is no node \"nowhere\"; name one of [[neurons]]",
            "models.toml: models[1].keep_alive: a pinned model is never let go",
            "models.toml: models[1].sampling.logit_bias cannot have a default; these can: temperature,",
            "models.toml: aliases[0]: the name \"b\" is already that of \"b\"",
            "models.toml: aliases[0]: there is no model \"d\" in this file",
            "models.toml: default = \"c\" is no model here; there are: a, b",
        ];
        assert_eq!(faults.len(), expected.len(), "{faults:#?}");
        for (fault, start) in faults.iter().zip(expected) {
            assert!(
                fault.starts_with(start),
                "{fault}\nshould start with\n{start}"
            );
        }
    }

    #[test]
    fn a_plain_file_has_no_faults() {
        assert_eq!(
            faults(
                "[[neurons]]\nname = \"a\"\nendpoint = \"https://gpu.lan\"",
                ""
            ),
            [""; 0]
        );
        assert_eq!(
            endpoint("https://gpu.lan", false),
            Some(("gpu.lan:443".into(), true, String::new()))
        );
        assert_eq!(endpoint("https://api.example.com/v1", false), None);
        assert_eq!(
            endpoint("https://api.example.com/x/v1/", true),
            Some(("api.example.com:443".into(), true, "/x".into()))
        );
    }
}
