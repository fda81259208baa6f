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
    health: Health,
    /// Polls that failed since the last one that did not.
    failures: u32,
    /// Polls that were answered since the last one that was not.
    answers: u32,
    endpoint: Option<Arc<Endpoint>>,
    info: Option<NodeInfo>,
    models: NodeModels,
    /// Requests that were there at the last poll and not ours.
    foreign: usize,
}

impl Node {
    /// A node; `load` is that of the one of its name before a reload.
    pub(super) fn new(
        neuron: Neuron,
        address: Option<SocketAddr>,
        load: Option<Arc<NodeLoad>>,
    ) -> Self {
        let known = Known {
            health: Health::Unknown,
            failures: 0,
            answers: 0,
            endpoint: None,
            info: None,
            models: NodeModels::default(),
            foreign: 0,
        };
        Self {
            neuron,
            address,
            load: load.unwrap_or_default(),
            known: Mutex::new(known),
        }
    }

    pub(super) fn load(&self) -> Arc<NodeLoad> {
        self.load.clone()
    }

    /// Where it listens, now that its name stands for `address`.
    pub(super) fn at(&self, address: SocketAddr) -> Arc<Endpoint> {
        let mut known = self.lock();
        if let Some(endpoint) = known
            .endpoint
            .as_ref()
            .filter(|known| known.address == address)
        {
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
        known.endpoint = Some(endpoint.clone());
        endpoint
    }

    /// Notes a poll that went well. After `up_after` of them in a row a node that was down counts as up.
    pub(super) fn answered(&self, info: NodeInfo, models: NodeModels, up_after: u32) {
        let mut known = self.lock();
        known.failures = 0;
        known.answers = known.answers.saturating_add(1);
        if matches!(known.health, Health::Down(_)) && known.answers < up_after {
            return;
        }
        self.load.set_failing(false);
        self.load.age();
        let all: u64 = models.models.iter().map(|model| model.in_flight).sum();
        let all = usize::try_from(all).unwrap_or(usize::MAX);
        known.foreign = all.saturating_sub(self.load.in_flight());
        if known.health != Health::Up {
            tracing::info!(
                node = &*self.neuron.name,
                version = info.version,
                "node is up"
            );
        }
        known.health = Health::Up;
        known.info = Some(info);
        known.models = models;
    }

    /// Notes a poll that did not. After `down_after` of them in a row the node counts as down.
    pub(super) fn failed(&self, reason: &str, down_after: u32) {
        let mut known = self.lock();
        self.load.set_failing(true);
        known.failures = known.failures.saturating_add(1);
        known.answers = 0;
        if known.failures < down_after && known.health == Health::Up {
            return;
        }
        if !matches!(known.health, Health::Down(_)) {
            tracing::warn!(node = &*self.neuron.name, reason, "node is down");
        }
        known.health = Health::Down(reason.into());
        known.models = NodeModels::default();
    }

    pub(super) fn view(&self) -> NodeView {
        let known = self.lock();
        NodeView {
            name: self.neuron.name.clone(),
            manages: self.neuron.kind == Kind::Neuron,
            health: known.health.clone(),
            endpoint: known.endpoint.clone(),
            devices: known
                .info
                .as_ref()
                .map_or_else(Vec::new, |info| info.devices.clone()),
            version: known
                .info
                .as_ref()
                .map_or_else(String::new, |info| info.version.clone()),
            models: known.models.models.clone(),
            foreign: known.foreign,
            load: self.load.clone(),
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
