//! One node, across polls.

use super::{Health, NodeView};
use crate::config::{Kind, Neuron};
use filters::route::{Endpoint, NodeLoad};
use protocol::node::{NodeInfo, NodeModels};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};

/// A node of the configuration and what is known of it.
#[derive(Debug)]
pub(super) struct Node {
    pub(super) neuron: Neuron,
    /// The one address it has, where its name stands for several.
    pub(super) address: Option<SocketAddr>,
    load: Arc<NodeLoad>,
    known: Mutex<Known>,
}

#[derive(Debug)]
struct Known {
    /// Polls that failed since the last one that did not.
    failures: u32,
    /// Polls that were answered since the last one that was not.
    answers: u32,
    /// Replaced when something is new, and only then.
    view: Arc<NodeView>,
}

impl Known {
    fn change(&mut self, change: impl FnOnce(&mut NodeView)) {
        let mut view = NodeView::clone(&self.view);
        change(&mut view);
        if !view.is_as(&self.view) {
            self.view = Arc::new(view);
        }
    }
}

impl Node {
    /// A node; `load` is that of the one of its name before a reload.
    pub(super) fn new(
        neuron: Neuron,
        address: Option<SocketAddr>,
        load: Option<Arc<NodeLoad>>,
    ) -> Self {
        let load = load.unwrap_or_default();
        let view = NodeView {
            name: neuron.name.clone(),
            manages: neuron.kind == Kind::Neuron,
            health: Health::Unknown,
            endpoint: None,
            devices: Vec::new(),
            version: String::new(),
            models: Vec::new(),
            foreign: 0,
            load: load.clone(),
        };
        let known = Known {
            failures: 0,
            answers: 0,
            view: Arc::new(view),
        };
        Self {
            neuron,
            address,
            load,
            known: Mutex::new(known),
        }
    }

    pub(super) fn load(&self) -> Arc<NodeLoad> {
        self.load.clone()
    }

    /// Where it listens, now that its name stands for `address`.
    pub(super) fn at(&self, address: SocketAddr) -> Arc<Endpoint> {
        let mut known = self.lock();
        let endpoint = known.view.endpoint.as_ref();
        if let Some(endpoint) = endpoint.filter(|known| known.address == address) {
            return endpoint.clone();
        }
        let endpoint = Arc::new(Endpoint {
            node: self.neuron.name.clone(),
            address,
            authority: self.neuron.authority.clone(),
            tls: self.neuron.tls,
            weight: self.neuron.weight,
            access: self.neuron.access.clone(),
            load: self.load.clone(),
        });
        known.change(|view| view.endpoint = Some(endpoint.clone()));
        endpoint
    }

    /// Notes a poll that went well. After `up_after` of them in a row a node that was down counts as up.
    pub(super) fn answered(&self, info: NodeInfo, models: NodeModels, up_after: u32) {
        let mut known = self.lock();
        known.failures = 0;
        known.answers = known.answers.saturating_add(1);
        let health = &known.view.health;
        if matches!(health, Health::Down(_)) && known.answers < up_after {
            return;
        }
        self.load.set_failing(false);
        self.load.age();
        let all: u64 = models.models.iter().map(|model| model.in_flight).sum();
        let all = usize::try_from(all).unwrap_or(usize::MAX);
        let foreign = all.saturating_sub(self.load.in_flight());
        if *health != Health::Up {
            tracing::info!(
                node = &*self.neuron.name,
                version = info.version,
                "node is up"
            );
        }
        known.change(|view| {
            view.health = Health::Up;
            (view.devices, view.version) = (info.devices, info.version);
            (view.models, view.foreign) = (models.models, foreign);
        });
    }

    /// Notes a poll that did not. After `down_after` of them in a row the node counts as down.
    pub(super) fn failed(&self, reason: &str, down_after: u32) {
        let mut known = self.lock();
        self.load.set_failing(true);
        known.failures = known.failures.saturating_add(1);
        known.answers = 0;
        let health = &known.view.health;
        if known.failures < down_after && *health == Health::Up {
            return;
        }
        if !matches!(health, Health::Down(_)) {
            tracing::warn!(node = &*self.neuron.name, reason, "node is down");
        }
        known.change(|view| {
            view.health = Health::Down(reason.into());
            view.models.clear();
        });
    }

    pub(super) fn view(&self) -> Arc<NodeView> {
        self.lock().view.clone()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
