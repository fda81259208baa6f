//! One node, across polls.

use super::{Health, NodeView};
use crate::config::Neuron;
use filters::route::{Endpoint, NodeLoad};
use protocol::node::{NodeInfo, NodeModels};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};

/// A node of the configuration and what is known of it.
#[derive(Debug)]
pub(super) struct Node {
    pub(super) neuron: Neuron,
    load: Arc<NodeLoad>,
    known: Mutex<Known>,
}

#[derive(Debug)]
struct Known {
    health: Health,
    /// Polls that failed since the last one that did not.
    failures: u32,
    endpoint: Option<Arc<Endpoint>>,
    info: Option<NodeInfo>,
    models: NodeModels,
}

impl Node {
    pub(super) fn new(neuron: Neuron) -> Self {
        let known = Known {
            health: Health::Unknown,
            failures: 0,
            endpoint: None,
            info: None,
            models: NodeModels::default(),
        };
        Self {
            neuron,
            load: Arc::default(),
            known: Mutex::new(known),
        }
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
            load: self.load.clone(),
        });
        known.endpoint = Some(endpoint.clone());
        endpoint
    }

    /// Notes a poll that went well.
    pub(super) fn answered(&self, info: NodeInfo, models: NodeModels) {
        let mut known = self.lock();
        self.load.set_failing(false);
        if known.health != Health::Up {
            tracing::info!(
                node = &*self.neuron.name,
                version = info.version,
                "node is up"
            );
        }
        known.health = Health::Up;
        known.failures = 0;
        known.info = Some(info);
        known.models = models;
    }

    /// Notes a poll that did not. After `down_after` of them in a row the node counts as down.
    pub(super) fn failed(&self, reason: &str, down_after: u32) {
        let mut known = self.lock();
        self.load.set_failing(true);
        known.failures = known.failures.saturating_add(1);
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
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
