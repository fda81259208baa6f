//! Where a model goes: a pure decision over one view of the fleet.

use super::eviction::{self, Resident};
use crate::config::{Config, Model};
use crate::fleet::NodeView;
use protocol::node::{ModelState, ModelStatus};
use std::collections::HashMap;
use std::fmt;
use std::sync::Arc;

/// Where a model goes, or why nowhere.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Placement {
    /// There.
    On(Spot),
    /// A node has the room in principle, but it is in use now.
    Busy,
    /// No node that is up could ever hold it; the most that one has on so many devices, each.
    TooLarge {
        devices: usize,
        share: u64,
        largest: u64,
    },
    /// No node is up that may have it, or it failed on all that are.
    NoNode,
}

/// A place for a model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Spot {
    pub(crate) node: Arc<str>,
    /// Devices that are to hold it, the same share on each.
    pub(crate) devices: Vec<Arc<str>>,
    pub(crate) share: u64,
    /// Models that have to leave first.
    pub(crate) evict: Vec<Arc<str>>,
    pub(crate) why: Why,
}

/// Why there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Why {
    /// It had the most room of all that had enough.
    MostRoom,
    /// Nobody had enough, and the least has to leave there.
    LeastLoss { bytes: u64 },
    /// Somebody else has it loaded there already.
    Joined,
}

impl fmt::Display for Why {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::MostRoom => f.write_str("the most room is there"),
            Self::LeastLoss { bytes } => {
                let bytes = bytesize::ByteSize(*bytes).display().iec();
                write!(f, "the least has to leave there: {bytes}")
            }
            Self::Joined => f.write_str("it is being loaded there already"),
        }
    }
}

/// How this gateway uses a model on a node.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Use {
    /// Requests that are there.
    pub(crate) active: usize,
    /// On `route::now`'s clock.
    pub(crate) last_used: u64,
}

/// What the decision looks at beside what the lifecycle itself has begun.
pub(crate) struct World<'a> {
    pub(crate) config: &'a Config,
    pub(crate) nodes: &'a [NodeView],
    /// On `route::now`'s clock.
    pub(crate) now: u64,
    /// How this gateway uses a model (second) on a node (first).
    pub(crate) usage: &'a dyn Fn(&str, &str) -> Use,
    /// Requests here that hold a lease on a model, wherever they go.
    pub(crate) leases: &'a dyn Fn(&str) -> usize,
}

/// What has been begun, so that nobody else counts on the same memory.
#[derive(Debug, Default)]
pub(crate) struct Begun {
    /// By node.
    changes: HashMap<Arc<str>, Vec<Change>>,
    /// Models that are served, and on how many nodes they stay.
    staying: HashMap<Arc<str>, usize>,
}

/// A change to one node: some models leave, then perhaps one comes.
#[derive(Debug, Clone)]
pub(crate) struct Change {
    pub(crate) node: Arc<str>,
    pub(crate) evict: Vec<Arc<str>>,
    pub(crate) load: Option<Arc<str>>,
    /// Devices it comes to and the bytes reserved on each. A load of unknown size has the node to itself.
    pub(crate) devices: Vec<Arc<str>>,
    pub(crate) share: Option<u64>,
    pub(crate) reason: Reason,
}

/// What a change is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Reason {
    /// Somebody wants a model.
    Room,
    /// One replica is not enough, or one more than enough.
    Replicas,
    /// Nobody has used it for as long as the catalogue says.
    Idle,
    /// Memory did not come back.
    Defragmentation,
}

impl Reason {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Room => "room",
            Self::Replicas => "replicas",
            Self::Idle => "idle",
            Self::Defragmentation => "defragmentation",
        }
    }
}

impl Begun {
    /// Counts what is served and stays.
    pub(crate) fn look(&mut self, nodes: &[NodeView]) {
        self.staying.values_mut().for_each(|count| *count = 0); // their names stay: there are many
        for node in nodes.iter().filter(|node| node.serves()) {
            for model in &node.models {
                if model.state == ModelState::Loaded && !self.is_leaving(&node.name, &model.id) {
                    match self.staying.get_mut(model.id.as_str()) {
                        Some(count) => *count += 1,
                        None => drop(self.staying.insert(model.id.as_str().into(), 1)),
                    }
                }
            }
        }
    }

    /// On how many nodes `model` is served and stays.
    pub(crate) fn staying(&self, model: &str) -> usize {
        self.staying.get(model).copied().unwrap_or(0)
    }

    pub(crate) fn begin(&mut self, change: Change) {
        for model in &change.evict {
            if let Some(count) = self.staying.get_mut(model) {
                *count = count.saturating_sub(1);
            }
        }
        let node = self.changes.entry(change.node.clone()).or_default();
        node.push(change);
    }

    /// Forgets a change that has ended.
    pub(crate) fn end(&mut self, node: &Arc<str>, load: Option<&str>, evict: &[Arc<str>]) {
        if let Some(changes) = self.changes.get_mut(node) {
            let same = |change: &Change| change.load.as_deref() == load && change.evict == evict;
            if let Some(index) = changes.iter().position(same) {
                changes.swap_remove(index);
            }
            if changes.is_empty() {
                self.changes.remove(node);
            }
        }
    }

    pub(crate) fn on(&self, node: &str) -> &[Change] {
        self.changes.get(node).map_or(&[], Vec::as_slice)
    }

    /// Nodes to which `model` is coming.
    pub(crate) fn coming(&self, model: &str) -> usize {
        let all = self.changes.values().flatten();
        all.filter(|change| change.load.as_deref() == Some(model))
            .count()
    }

    /// Whether `model` is on its way off `node`.
    pub(crate) fn is_leaving(&self, node: &str, model: &str) -> bool {
        let mut changes = self.on(node).iter();
        changes.any(|change| change.evict.iter().any(|leaving| **leaving == *model))
    }

    fn is_closed(&self, node: &str) -> bool {
        let mut changes = self.on(node).iter();
        changes.any(|change| change.load.is_some() && change.share.is_none())
    }
}

/// What is known of the sizes of models.
#[derive(Debug, Default)]
pub(crate) struct Sizes {
    /// As nodes have reported them, for models of which the catalogue does not say.
    measured: HashMap<String, u64>,
}

impl Sizes {
    pub(crate) fn learn(&mut self, nodes: &[NodeView]) {
        for model in nodes.iter().flat_map(|node| &node.models) {
            if model.state == ModelState::Loaded
                && model.memory_bytes > self.measured.get(&model.id).copied().unwrap_or(0)
            {
                self.measured.insert(model.id.clone(), model.memory_bytes);
            }
        }
    }

    pub(crate) fn of(&self, id: &str, model: Option<&Model>) -> Option<u64> {
        let said = model.and_then(|model| model.memory);
        said.or_else(|| self.measured.get(id).copied())
    }
}

/// Chooses by what is free, then by what may be evicted. `failed_on` are nodes that may not have it now.
pub(crate) fn place(
    id: &str,
    model: &Model,
    world: &World<'_>,
    begun: &Begun,
    sizes: &Sizes,
    failed_on: &dyn Fn(&str) -> bool,
) -> Placement {
    let size = sizes.of(id, Some(model));
    let count = model.tensor_parallel;
    let share = size.unwrap_or(0).div_ceil(count as u64);
    let (mut possible, mut large, mut largest) = (false, false, 0);
    let mut roomiest: Option<(u64, Spot)> = None;
    let mut cheapest: Option<(u64, Spot)> = None;
    for node in world.nodes {
        let allowed = model.pinned_on.is_empty() || model.pinned_on.contains(&node.name);
        let enough = node.devices.len() >= count.max(model.min_devices);
        if !node.can_load() || !allowed || !enough || failed_on(&node.name) {
            continue;
        }
        possible = true;
        let total = nth_largest(node.devices.iter().map(|device| device.total_bytes), count);
        largest = largest.max(total);
        if total < share {
            continue;
        }
        large = true;
        // it is there, it comes or it goes: not twice on one node
        let there = node
            .model(id)
            .is_some_and(|model| model.state != ModelState::Failed);
        let comes = (begun.on(&node.name).iter()).any(|change| change.load.as_deref() == Some(id));
        let alone = size.is_some() || begun.on(&node.name).is_empty();
        if there || comes || !alone || begun.is_closed(&node.name) {
            continue;
        }
        let free = free(node, world, begun, sizes);
        let room = nth_largest(free.iter().copied(), count);
        let spot = |evict, free: &[u64], why| Spot {
            node: node.name.clone(),
            devices: emptiest(node, free, count),
            share,
            evict,
            why,
        };
        if room >= share {
            if roomiest.as_ref().is_none_or(|(most, _)| room > *most) {
                roomiest = Some((room, spot(Vec::new(), &free, Why::MostRoom)));
            }
        } else if roomiest.is_none() {
            let residents = residents(node, world, begun);
            let strategy = world.config.eviction.strategy;
            let Some(evict) = eviction::victims(strategy, (count, share), &free, &residents) else {
                continue;
            };
            let gone = |resident: &&Resident| evict.contains(&resident.model);
            let bytes = (residents.iter().filter(gone))
                .map(|resident| resident.bytes * resident.devices.len() as u64)
                .sum();
            if cheapest.as_ref().is_none_or(|(least, _)| bytes < *least) {
                let mut after = free.clone();
                for resident in residents.iter().filter(gone) {
                    resident
                        .devices
                        .iter()
                        .for_each(|&device| after[device] += resident.bytes);
                }
                cheapest = Some((bytes, spot(evict, &after, Why::LeastLoss { bytes })));
            }
        }
    }
    match roomiest.or(cheapest) {
        Some((_, spot)) => Placement::On(spot),
        None if !possible => Placement::NoNode,
        None if !large => Placement::TooLarge {
            devices: count,
            share,
            largest,
        },
        None => Placement::Busy,
    }
}

/// The models of a node as the eviction sees them.
pub(crate) fn residents(node: &NodeView, world: &World<'_>, begun: &Begun) -> Vec<Resident> {
    let loaded = node
        .models
        .iter()
        .filter(|model| model.state == ModelState::Loaded);
    loaded
        .map(|model| {
            let entry = world.config.models.get(model.id.as_str());
            let Use { active, last_used } = (world.usage)(&node.name, &model.id);
            let pinned = entry.is_some_and(|entry| entry.is_pinned());
            let devices = devices_of(node, model);
            Resident {
                model: model.id.as_str().into(),
                bytes: model.memory_bytes / devices.len().max(1) as u64,
                devices,
                // requests that other gateways have there count as well
                kept: pinned
                    || active > 0
                    || ((world.leases)(&model.id) > 0 && begun.staying(&model.id) < 2)
                    || model.in_flight > 0
                    || begun.is_leaving(&node.name, &model.id),
                priority: entry.map_or(0, |entry| entry.priority),
                last_used,
            }
        })
        .collect()
}

/// Bytes free on each device, less what is reserved there for loads that others or we have begun.
fn free(node: &NodeView, world: &World<'_>, begun: &Begun, sizes: &Sizes) -> Vec<u64> {
    let mut free: Vec<u64> = (node.devices.iter())
        .map(|device| device.free_bytes)
        .collect();
    let mut take = |device: usize, bytes: u64| free[device] = free[device].saturating_sub(bytes);
    for change in begun.on(&node.name) {
        for (index, device) in node.devices.iter().enumerate() {
            if change.devices.iter().any(|taken| **taken == *device.id) {
                take(index, change.share.unwrap_or(u64::MAX));
            }
        }
    }
    for model in &node.models {
        let ours =
            (begun.on(&node.name).iter()).any(|change| change.load.as_deref() == Some(&*model.id));
        if model.state == ModelState::Loading && !ours {
            let entry = world.config.models.get(model.id.as_str());
            let devices = devices_of(node, model);
            let bytes = sizes.of(&model.id, entry).unwrap_or(0) / devices.len().max(1) as u64;
            devices.iter().for_each(|&device| take(device, bytes));
        }
    }
    free
}

/// Which of the node's devices hold the model; all, where it does not say.
fn devices_of(node: &NodeView, model: &ModelStatus) -> Vec<usize> {
    let all = 0..node.devices.len();
    if model.devices.is_empty() {
        return all.collect();
    }
    all.filter(|&index| model.devices.contains(&node.devices[index].id))
        .collect()
}

/// The `count` devices with the most free.
fn emptiest(node: &NodeView, free: &[u64], count: usize) -> Vec<Arc<str>> {
    let mut order: Vec<usize> = (0..free.len()).collect();
    order.sort_by_key(|&index| std::cmp::Reverse(free[index]));
    let taken = order.into_iter().take(count);
    taken
        .map(|index| node.devices[index].id.as_str().into())
        .collect()
}

/// The `n`th of these numbers by size; zero if there are fewer.
fn nth_largest(numbers: impl Iterator<Item = u64>, n: usize) -> u64 {
    if n == 1 {
        return numbers.max().unwrap_or(0);
    }
    let mut numbers: Vec<u64> = numbers.collect();
    numbers.sort_unstable_by(|a, b| b.cmp(a));
    numbers.get(n - 1).copied().unwrap_or(0)
}
