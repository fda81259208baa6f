//! The nodes: who they are, how they are, what they hold. Requests read one immutable view from start to end.

use crate::config::{Neuron, Poll};
use crate::pingora::client::Client;
use arc_swap::ArcSwap;
use filters::route::{Candidate, Endpoint};
use prometheus::{IntGaugeVec, Opts, Registry};
use protocol::node::{DeviceInfo, ModelState, ModelStatus};
use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use tokio::sync::Notify;

mod node;
mod poll;
mod usage;

use node::Node;
pub(crate) use usage::ModelUse;

/// The fleet at one moment.
#[derive(Debug, Default)]
pub(crate) struct FleetView {
    /// In the order of the configuration.
    pub(crate) nodes: Vec<NodeView>,
    /// Models that some node serves.
    served: HashMap<Arc<str>, Served>,
}

/// One node at one moment.
#[derive(Debug, Clone)]
pub(crate) struct NodeView {
    pub(crate) name: Arc<str>,
    pub(crate) health: Health,
    /// Where it is, once its name has been resolved.
    pub(crate) endpoint: Option<Arc<Endpoint>>,
    pub(crate) devices: Vec<DeviceInfo>,
    pub(crate) version: String,
    pub(crate) models: Vec<ModelStatus>,
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

    pub(crate) fn model(&self, id: &str) -> Option<&ModelStatus> {
        self.models.iter().find(|model| model.id == id)
    }
}

impl FleetView {
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
}

struct Members {
    nodes: Vec<Arc<Node>>,
    poll: Poll,
    /// Counts of use by model; they outlive views, nodes and reloads.
    uses: HashMap<Arc<str>, Arc<ModelUse>>,
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
        let members = Members {
            nodes: Vec::new(),
            poll,
            uses: HashMap::new(),
        };
        let fleet = Self {
            client,
            view: ArcSwap::default(),
            members: Mutex::new(members),
            changed: Notify::new(),
            nodes_gauge,
        };
        fleet.set_members(neurons, poll);
        Arc::new(fleet)
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
        let nodes = neurons
            .iter()
            .map(|neuron| {
                let same = members.nodes.iter().find(|node| node.neuron == *neuron);
                same.cloned()
                    .unwrap_or_else(|| Arc::new(Node::new(neuron.clone())))
            })
            .collect();
        members.nodes = nodes;
        members.poll = poll;
        drop(members);
        self.publish();
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Members> {
        self.members.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes the view that requests see from now on.
    fn publish(&self) {
        let mut members = self.lock();
        let nodes: Vec<NodeView> = members.nodes.iter().map(|node| node.view()).collect();
        let mut served: HashMap<Arc<str>, Vec<Candidate>> = HashMap::new();
        for node in nodes.iter().filter(|node| node.is_up()) {
            let Some(endpoint) = &node.endpoint else {
                continue;
            };
            for model in node
                .models
                .iter()
                .filter(|model| model.state == ModelState::Loaded)
            {
                let reported = usize::try_from(model.in_flight).unwrap_or(usize::MAX);
                let candidate = Candidate {
                    endpoint: endpoint.clone(),
                    reported,
                };
                served
                    .entry(model.id.as_str().into())
                    .or_default()
                    .push(candidate);
            }
        }
        let served = served
            .into_iter()
            .map(|(id, candidates)| {
                let usage = members.uses.entry(id.clone()).or_default().clone();
                (
                    id,
                    Served {
                        candidates: candidates.into(),
                        usage,
                    },
                )
            })
            .collect();
        for (health, count) in [
            ("up", nodes.iter().filter(|node| node.is_up()).count()),
            (
                "down",
                nodes
                    .iter()
                    .filter(|node| matches!(node.health, Health::Down(_)))
                    .count(),
            ),
            (
                "unknown",
                nodes
                    .iter()
                    .filter(|node| node.health == Health::Unknown)
                    .count(),
            ),
        ] {
            self.nodes_gauge
                .with_label_values(&[health])
                .set(i64::try_from(count).unwrap_or(i64::MAX));
        }
        // stored under the lock, so that an older view never replaces a newer one
        self.view.store(Arc::new(FleetView { nodes, served }));
        drop(members);
        self.changed.notify_one();
    }

    /// The count of use of a model that may not be served yet.
    pub(crate) fn usage(&self, model: &Arc<str>) -> Arc<ModelUse> {
        self.lock().uses.entry(model.clone()).or_default().clone()
    }
}
