//! Where a model goes: a pure decision over one view of the fleet.

use super::eviction::{self, Resident};
use crate::config::{Config, Model};
use crate::fleet::{FleetView, NodeView};
use protocol::node::ModelState;
use std::sync::Arc;

/// Where a model goes, or why nowhere.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Placement {
    /// On this node, once these models have left it.
    On {
        node: Arc<str>,
        evict: Vec<Arc<str>>,
    },
    /// A node has the room in principle, but it is in use now.
    Busy,
    /// No node that is up could ever hold it; the most any device has.
    TooLarge { need: u64, largest: u64 },
    /// No node is up, or it failed on all that are.
    NoNode,
}

/// What the decision looks at beside the fleet itself.
pub(crate) struct Circumstances<'a> {
    pub(crate) config: &'a Config,
    pub(crate) view: &'a FleetView,
    /// Requests that use a model, and when the last one did.
    pub(crate) usage: &'a dyn Fn(&str) -> (usize, u64),
    /// Nodes that may not be chosen now: one is being changed, or this model failed there lately.
    pub(crate) occupied: &'a dyn Fn(&str) -> bool,
    pub(crate) failed_on: &'a dyn Fn(&str) -> bool,
}

/// Chooses by what is free, then by what may be evicted.
pub(crate) fn place(model: &Model, circumstances: &Circumstances<'_>) -> Placement {
    let need = model.memory.unwrap_or(0);
    let possible: Vec<&NodeView> = circumstances
        .view
        .nodes
        .iter()
        .filter(|node| {
            node.is_up() && node.endpoint.is_some() && !(circumstances.failed_on)(&node.name)
        })
        .collect();
    if possible.is_empty() {
        return Placement::NoNode;
    }
    let largest = possible
        .iter()
        .filter_map(|node| largest_device(node))
        .max()
        .unwrap_or(0);
    if largest < need {
        return Placement::TooLarge { need, largest };
    }
    let open: Vec<&NodeView> = possible
        .into_iter()
        .filter(|node| !(circumstances.occupied)(&node.name))
        .collect();
    let roomy = open
        .iter()
        .filter_map(|node| Some((node, most_free(node)?)))
        .filter(|(_, free)| *free >= need)
        .max_by_key(|(_, free)| *free);
    if let Some((node, _)) = roomy {
        return Placement::On {
            node: node.name.clone(),
            evict: Vec::new(),
        };
    }
    let strategy = circumstances.config.eviction.strategy;
    let cleared = open.iter().filter_map(|node| {
        let residents = residents(node, circumstances);
        let evict = eviction::victims(strategy, need, most_free(node)?, &residents)?;
        let loss: u64 = evict
            .iter()
            .filter_map(|id| node.model(id))
            .map(|model| model.memory_bytes)
            .sum();
        Some((loss, node, evict))
    });
    match cleared.min_by_key(|(loss, ..)| *loss) {
        Some((_, node, evict)) => Placement::On {
            node: node.name.clone(),
            evict,
        },
        None => Placement::Busy,
    }
}

/// The models of a node as the eviction sees them.
pub(crate) fn residents(node: &NodeView, circumstances: &Circumstances<'_>) -> Vec<Resident> {
    let loaded = node
        .models
        .iter()
        .filter(|model| model.state == ModelState::Loaded);
    loaded
        .map(|model| {
            let entry = circumstances.config.models.get(model.id.as_str());
            let (active, last_used) = (circumstances.usage)(&model.id);
            let pinned = entry.is_some_and(|entry| entry.pinned);
            Resident {
                model: model.id.as_str().into(),
                bytes: model.memory_bytes,
                // requests that other gateways have there count as well
                kept: pinned || active > 0 || model.in_flight > 0,
                priority: entry.map_or(0, |entry| entry.priority),
                last_used,
            }
        })
        .collect()
}

fn most_free(node: &NodeView) -> Option<u64> {
    node.devices.iter().map(|device| device.free_bytes).max()
}

fn largest_device(node: &NodeView) -> Option<u64> {
    node.devices.iter().map(|device| device.total_bytes).max()
}
