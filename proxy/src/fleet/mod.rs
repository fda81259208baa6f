//! The nodes: who they are, how they are, what they hold. Requests read one immutable view from start to end.

use crate::config::{Config, Neuron, Poll};
use crate::pingora::client::Client;
use arc_swap::ArcSwap;
use filters::route::{Candidate, Endpoint, NodeLoad, Replica, seen_as};
use prometheus::core::Collector;
use prometheus::{IntCounterVec, IntGaugeVec, Opts, Registry};
use protocol::node::{DeviceInfo, ModelState, ModelStatus};
use std::collections::{BTreeMap, HashMap};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use tokio::sync::Notify;
use tokio::time::Instant;

mod join;
mod node;
mod poll;
mod usage;

use node::Node;
pub(crate) use usage::ModelUse;

/// The fleet at one moment.
#[derive(Debug, Default)]
pub(crate) struct FleetView {
    /// In the order of the configuration. A node about which nothing is new is the same one as in the view before.
    pub(crate) nodes: Vec<Arc<NodeView>>,
    /// Models that some node serves.
    served: HashMap<Arc<str>, Served>,
}

/// One node at one moment.
#[derive(Debug, Clone)]
pub(crate) struct NodeView {
    pub(crate) name: Arc<str>,
    /// Whether it loads and unloads as it is told.
    pub(crate) manages: bool,
    pub(crate) health: Health,
    /// Where it is, once its name has been resolved.
    pub(crate) endpoint: Option<Arc<Endpoint>>,
    pub(crate) devices: Vec<DeviceInfo>,
    pub(crate) version: String,
    pub(crate) models: Vec<ModelStatus>,
    /// Requests that were there at the last poll and not ours.
    pub(crate) foreign: usize,
    pub(crate) load: Arc<NodeLoad>,
}

/// Whether a node can be used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Health {
    /// Not asked yet.
    Unknown,
    /// Answered lately.
    Up,
    /// Failed several times in a row; why, last time.
    Down(String),
}

/// A model that some node serves.
#[derive(Debug, Clone)]
pub(crate) struct Served {
    pub(crate) candidates: Arc<[Candidate]>,
    pub(crate) usage: Arc<ModelUse>,
}

impl NodeView {
    pub(crate) fn is_up(&self) -> bool {
        self.health == Health::Up
    }

    /// Whether requests can be sent there.
    pub(crate) fn serves(&self) -> bool {
        self.is_up() && self.endpoint.is_some()
    }

    /// Whether it can be told to load and unload models.
    pub(crate) fn can_load(&self) -> bool {
        self.serves() && self.manages
    }

    pub(crate) fn model(&self, id: &str) -> Option<&ModelStatus> {
        self.models.iter().find(|model| model.id == id)
    }

    /// Whether nothing is new about it. Counts that it shares are not looked at.
    fn is_as(&self, other: &Self) -> bool {
        let endpoint = match (&self.endpoint, &other.endpoint) {
            (Some(own), Some(other)) => Arc::ptr_eq(own, other),
            (own, other) => own.is_none() && other.is_none(),
        };
        endpoint
            && self.health == other.health
            && self.devices == other.devices
            && self.version == other.version
            && self.models == other.models
            && self.foreign == other.foreign
    }
}

impl Members {
    /// Makes the nodes of what is configured, has joined, and stands in the name service.
    fn refill(&mut self) {
        let now = Instant::now();
        self.joined.retain(|_, (_, until)| *until > now);
        let own = self.configured.iter();
        let others = self.joined.values().map(|(neuron, _)| neuron);
        let mut wanted: Vec<(Neuron, Option<SocketAddr>)> = Vec::new();
        for neuron in own.chain(others) {
            let known = self.addresses.get(&neuron.name);
            let several = known.filter(|known| neuron.all_addresses && !known.is_empty());
            match several {
                None => wanted.push((neuron.clone(), None)),
                Some(addresses) => wanted.extend(addresses.iter().map(|address| {
                    let name = format!("{}/{address}", neuron.name).into();
                    let neuron = neuron.clone();
                    (Neuron { name, ..neuron }, Some(*address))
                })),
            }
        }
        let before = std::mem::take(&mut self.nodes).into_iter();
        let mut before: HashMap<Arc<str>, Arc<Node>> = before
            .map(|node| (node.neuron.name.clone(), node))
            .collect();
        for (neuron, address) in wanted {
            let named = before.remove(&neuron.name);
            let same = |node: &&Arc<Node>| node.neuron == neuron && node.address == address;
            let node = match named.as_ref().filter(same) {
                Some(node) => node.clone(),
                None => Arc::new(Node::new(neuron, address, named.map(|node| node.load()))),
            };
            self.nodes.push(node);
        }
        // those that are left have gone
        self.replicas
            .retain(|(name, _), _| !before.contains_key(name));
    }

    /// Where each model is served.
    fn served(&mut self, nodes: &[Arc<NodeView>]) -> HashMap<Arc<str>, Served> {
        let mut candidates: HashMap<Arc<str>, Vec<Candidate>> = HashMap::new();
        for node in nodes.iter().filter(|node| node.serves()) {
            let Some(endpoint) = &node.endpoint else {
                continue;
            };
            let loaded = |model: &&ModelStatus| model.state == ModelState::Loaded;
            for model in node.models.iter().filter(loaded) {
                let id: Arc<str> = model.id.as_str().into();
                let key = (node.name.clone(), id.clone());
                let candidate = Candidate {
                    endpoint: endpoint.clone(),
                    replica: self.replicas.entry(key).or_default().clone(),
                    foreign: node.foreign,
                    seen_as: seen_as(&node.name, &model.id, model.since),
                };
                candidates.entry(id).or_default().push(candidate);
            }
        }
        let served = candidates.into_iter().map(|(id, candidates)| {
            let usage = self.uses.entry(id.clone()).or_default().clone();
            let candidates = candidates.into();
            (id, Served { candidates, usage })
        });
        served.collect()
    }
}

impl FleetView {
    /// A fleet of these nodes, of which nobody has been told.
    #[cfg(test)]
    pub(crate) fn of(nodes: Vec<NodeView>) -> Self {
        let served = HashMap::new();
        let nodes = nodes.into_iter().map(Arc::new).collect();
        Self { nodes, served }
    }

    /// Where `model` is served, if anywhere.
    pub(crate) fn served(&self, model: &str) -> Option<&Served> {
        self.served.get(model)
    }

    /// The id under which a served model is known.
    pub(crate) fn served_id(&self, model: &str) -> Option<Arc<str>> {
        self.served.get_key_value(model).map(|(id, _)| id.clone())
    }
}

/// Owner of the nodes. Lives as long as the process; reloads change its members.
pub(crate) struct Fleet {
    client: Client,
    view: ArcSwap<FleetView>,
    members: Mutex<Members>,
    /// Rung after each new view.
    changed: Notify,
    nodes_gauge: IntGaugeVec,
    open_gauge: IntGaugeVec,
    ejections: IntCounterVec,
}

struct Members {
    nodes: Vec<Arc<Node>>,
    configured: Vec<Neuron>,
    /// Nodes that joined by themselves, and until when, by name.
    joined: BTreeMap<Arc<str>, (Neuron, Instant)>,
    /// What the names of nodes with `all_addresses` stand for.
    addresses: HashMap<Arc<str>, Vec<SocketAddr>>,
    poll: Poll,
    /// Counts of use by model; they outlive views, nodes and reloads.
    uses: HashMap<Arc<str>, Arc<ModelUse>>,
    /// The same by node and model, for nodes that are members.
    replicas: HashMap<(Arc<str>, Arc<str>), Arc<Replica>>,
}

impl Fleet {
    pub(crate) fn new(
        client: Client,
        neurons: &[Neuron],
        poll: Poll,
        registry: &Registry,
    ) -> Arc<Self> {
        let nodes_gauge = IntGaugeVec::new(
            Opts::new("cortex_nodes", "Nodes of the configuration, by health"),
            &["health"],
        )
        .expect("name and label are constants");
        registry
            .register(Box::new(nodes_gauge.clone()))
            .expect("one fleet a registry");
        let open_gauge = IntGaugeVec::new(
            Opts::new(
                "cortex_node_circuit_open",
                "1 while a node is passed over because its requests failed",
            ),
            &["node"],
        )
        .expect("name and label are constants");
        let ejections = IntCounterVec::new(
            Opts::new(
                "cortex_node_ejections_total",
                "Times that a node's circuit opened",
            ),
            &["node"],
        )
        .expect("name and label are constants");
        for family in [
            Box::new(open_gauge.clone()) as Box<dyn Collector>,
            Box::new(ejections.clone()),
        ] {
            registry.register(family).expect("one fleet a registry");
        }
        let members = Members {
            nodes: Vec::new(),
            configured: Vec::new(),
            joined: BTreeMap::new(),
            addresses: HashMap::new(),
            poll,
            uses: HashMap::new(),
            replicas: HashMap::new(),
        };
        let fleet = Self {
            client,
            view: ArcSwap::default(),
            members: Mutex::new(members),
            changed: Notify::new(),
            nodes_gauge,
            open_gauge,
            ejections,
        };
        fleet.set_members(neurons, poll);
        Arc::new(fleet)
    }

    /// The nodes of a configuration, to be looked at by a command.
    pub(crate) fn once(config: &Config) -> Arc<Self> {
        let client = Client::new(config.timeouts.connect, 1);
        Self::new(client, &config.neurons, config.poll, &Registry::new())
    }

    /// The fleet as it is now; hold on to it for the length of one decision.
    pub(crate) fn view(&self) -> Arc<FleetView> {
        self.view.load_full()
    }

    /// Waits for the next view.
    pub(crate) async fn changed(&self) {
        self.changed.notified().await;
    }

    /// Takes the configured nodes as a difference: those that stay keep their counts and connections.
    pub(crate) fn set_members(&self, neurons: &[Neuron], poll: Poll) {
        let mut members = self.lock();
        members.configured = neurons.to_vec();
        members.poll = poll;
        members.refill();
        drop(members);
        self.publish();
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Members> {
        self.members.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes the view that requests see from now on, if anything is new.
    fn publish(&self) {
        let mut members = self.lock();
        let nodes: Vec<Arc<NodeView>> = members.nodes.iter().map(|node| node.view()).collect();
        self.count(&nodes);
        let old = self.view.load();
        let same = |(old, new): (&Arc<NodeView>, &Arc<NodeView>)| Arc::ptr_eq(old, new);
        if old.nodes.len() == nodes.len() && old.nodes.iter().zip(&nodes).all(same) {
            return;
        }
        let served = members.served(&nodes);
        // stored under the lock, so that an older view never replaces a newer one
        self.view.store(Arc::new(FleetView { nodes, served }));
        drop(members);
        self.changed.notify_one();
    }

    fn count(&self, nodes: &[Arc<NodeView>]) {
        let of = |is: fn(&Health) -> bool| nodes.iter().filter(|node| is(&node.health)).count();
        for (health, count) in [
            ("up", of(|health| *health == Health::Up)),
            ("down", of(|health| matches!(health, Health::Down(_)))),
            ("unknown", of(|health| *health == Health::Unknown)),
        ] {
            self.nodes_gauge
                .with_label_values(&[health])
                .set(i64::try_from(count).unwrap_or(i64::MAX));
        }
        self.open_gauge.reset();
        for node in nodes {
            let label = &[&*node.name];
            let open = i64::from(node.load.is_open());
            self.open_gauge.with_label_values(label).set(open);
            let counted = self.ejections.with_label_values(label);
            counted.inc_by(node.load.times_opened().saturating_sub(counted.get()));
        }
    }

    /// The count of use of a model on a node.
    pub(crate) fn replica(&self, node: &Arc<str>, model: &Arc<str>) -> Arc<Replica> {
        let id = (node.clone(), model.clone());
        self.lock().replicas.entry(id).or_default().clone()
    }

    /// The count of use of a model that may not be served yet.
    pub(crate) fn usage(&self, model: &Arc<str>) -> Arc<ModelUse> {
        self.lock().uses.entry(model.clone()).or_default().clone()
    }
}
