//! Where a model goes: a pure decision over one view of the fleet.

use super::eviction::{self, Resident};
use super::ledger::{Account, Change, Held, Ledger, sorted};
use crate::config::{Config, Model};
use crate::fleet::NodeView;
use protocol::node::{ModelState, ModelStatus};
use std::cmp::Reverse;
use std::collections::BinaryHeap;
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
    pub(crate) config: &'a Arc<Config>,
    pub(crate) nodes: &'a [Arc<NodeView>],
    /// On `route::now`'s clock.
    pub(crate) now: u64,
    /// How this gateway uses a model (second) on a node (first).
    pub(crate) usage: &'a dyn Fn(&str, &str) -> Use,
    /// Requests here that hold a lease on a model, wherever they go.
    pub(crate) leases: &'a dyn Fn(&str) -> usize,
}

/// Chooses by what is free, then by what may be evicted. `not_on` are nodes that may not have it now.
pub(crate) fn place(
    id: &str,
    model: &Model,
    world: &World<'_>,
    ledger: &Ledger,
    survey: &mut Survey,
    not_on: &dyn Fn(&str) -> bool,
) -> Placement {
    let size = ledger.size(id, Some(model));
    let needs = |node: &NodeView| {
        let count = devices_needed(model, node);
        (count, size.unwrap_or(0).div_ceil(count as u64))
    };
    let (there, comes) = (ledger.there(id), ledger.coming(id) > 0);
    let (mut possible, mut large) = (false, false);
    // the most that a node has, with what it would need there
    let mut largest: (u64, (usize, u64)) = (0, (model.tensor_parallel, 0));
    let mut roomiest: Option<(u64, usize)> = None;
    // nodes that have to be cleared first, by the least that has to leave there whatever it is
    let mut tight: Vec<Reverse<(u64, usize)>> = Vec::new();
    for (at, account) in ledger.accounts().iter().enumerate() {
        let node = &account.node;
        let allowed = model.pinned_on.is_empty() || model.pinned_on.contains(&node.name);
        let (count, share) = needs(node);
        let enough = node.devices.len() >= count.max(model.min_devices);
        if !node.can_load() || !allowed || !enough || not_on(&node.name) {
            continue;
        }
        let possible_before = std::mem::replace(&mut possible, true);
        let total = account.totals[count - 1];
        if !possible_before || total > largest.0 {
            largest = (total, (count, share));
        }
        if total < share {
            continue;
        }
        large = true;
        // it is there, it comes or it goes: not twice on one node
        let is_there = |held: &Held| held.node == at && held.state != ModelState::Failed;
        let comes_there = |change: &Change| change.load.as_deref() == Some(id);
        if there.iter().any(is_there)
            || (comes && ledger.on(&node.name).iter().any(comes_there))
            || (size.is_none() && account.changing)
            || account.closed
        {
            continue;
        }
        let room = account.rooms[count - 1];
        if room >= share {
            if roomiest.is_none_or(|(most, _)| room > most) {
                roomiest = Some((room, at));
            }
        } else if roomiest.is_none() {
            let best = account.rooms[..count].iter();
            tight.push(Reverse((
                best.map(|room| share.saturating_sub(*room)).sum(),
                at,
            )));
        }
    }
    let spot = |at: usize, free: &[u64], evict, why| {
        let node = &ledger.accounts()[at].node;
        let (count, share) = needs(node);
        Spot {
            node: node.name.clone(),
            devices: emptiest(node, free, count),
            share,
            evict,
            why,
        }
    };
    if let Some((_, at)) = roomiest {
        let free = &ledger.accounts()[at].free;
        return Placement::On(spot(at, free, Vec::new(), Why::MostRoom));
    }
    match cheapest(&needs, tight, world, ledger, survey) {
        Some((bytes, at)) => {
            let (account, residents) = (&ledger.accounts()[at], survey.of(at, world, ledger));
            let strategy = world.config.eviction.strategy;
            let victims =
                eviction::victims(strategy, needs(&account.node), &account.free, residents);
            let victims = victims.expect("it could be cleared a moment ago");
            let mut after = account.free.clone();
            for resident in victims.iter().map(|&victim| &residents[victim]) {
                let devices = resident.devices.iter();
                devices.for_each(|&device| after[device] += resident.bytes);
            }
            let evict = victims
                .iter()
                .map(|&victim| residents[victim].model.clone());
            let evict = evict.collect();
            Placement::On(spot(at, &after, evict, Why::LeastLoss { bytes }))
        }
        None if !possible => Placement::NoNode,
        None if !large => {
            let (largest, (devices, share)) = largest;
            Placement::TooLarge {
                devices,
                share,
                largest,
            }
        }
        None => Placement::Busy,
    }
}

/// On how many devices of the node the model would lie: one for each rank, or one for all where devices hold many.
fn devices_needed(model: &Model, node: &NodeView) -> usize {
    let many = !node.devices.is_empty() && node.devices.iter().all(|device| device.many_ranks);
    if many { 1 } else { model.tensor_parallel }
}

/// The node where the fewest bytes have to leave, and how many; the first of several. `tight` says of each how many it
/// are at least, so that most need not be looked at; `needs` on how many devices of a node how much.
fn cheapest(
    needs: &dyn Fn(&NodeView) -> (usize, u64),
    tight: Vec<Reverse<(u64, usize)>>,
    world: &World<'_>,
    ledger: &Ledger,
    survey: &mut Survey,
) -> Option<(u64, usize)> {
    let strategy = world.config.eviction.strategy;
    let mut cheapest: Option<(u64, usize)> = None;
    let mut tight = BinaryHeap::from(tight);
    while let Some(Reverse((least, at))) = tight.pop() {
        if cheapest.is_some_and(|(bytes, _)| bytes < least) {
            break;
        }
        let account = &ledger.accounts()[at];
        let (count, share) = needs(&account.node);
        if survey.most(at, world, ledger)[count - 1] < share {
            continue;
        }
        let residents = survey.of(at, world, ledger);
        let victims = eviction::victims(strategy, (count, share), &account.free, residents);
        let Some(victims) = victims else { continue };
        let bytes = victims.iter().map(|&victim| {
            let resident = &residents[victim];
            resident.bytes * resident.devices.len() as u64
        });
        let bytes: u64 = bytes.sum();
        if cheapest.is_none_or(|best| (bytes, at) < best) {
            cheapest = Some((bytes, at));
        }
    }
    cheapest
}

/// The models of nodes as the eviction sees them, looked up when somebody asks. Holds for as long as nobody begins or
/// ends a use: for one round of decisions.
#[derive(Debug, Default)]
pub(crate) struct Survey {
    nodes: Vec<Option<Surveyed>>,
}

#[derive(Debug)]
struct Surveyed {
    residents: Vec<Resident>,
    /// Bytes that each device would have free if all left that may, the most first.
    most: Vec<u64>,
}

impl Survey {
    pub(crate) fn of(&mut self, at: usize, world: &World<'_>, ledger: &Ledger) -> &[Resident] {
        &self.look(at, world, ledger).residents
    }

    fn most(&mut self, at: usize, world: &World<'_>, ledger: &Ledger) -> &[u64] {
        &self.look(at, world, ledger).most
    }

    fn look(&mut self, at: usize, world: &World<'_>, ledger: &Ledger) -> &Surveyed {
        if self.nodes.is_empty() {
            self.nodes.resize_with(world.nodes.len(), || None);
        }
        self.nodes[at].get_or_insert_with(|| {
            let account = &ledger.accounts()[at];
            let residents = residents(account, world, ledger);
            let mut most = account.free.clone();
            for resident in residents.iter().filter(|resident| !resident.kept) {
                let devices = resident.devices.iter();
                devices.for_each(|&device| most[device] += resident.bytes);
            }
            let most = sorted(most.into_iter());
            Surveyed { residents, most }
        })
    }

    /// Something has been begun there.
    pub(crate) fn forget(&mut self, at: usize) {
        if let Some(surveyed) = self.nodes.get_mut(at) {
            *surveyed = None;
        }
    }
}

/// The models of a node as the eviction sees them.
fn residents(account: &Account, world: &World<'_>, ledger: &Ledger) -> Vec<Resident> {
    let node = &account.node;
    let models = node.models.iter().zip(&account.models);
    let loaded = models.filter(|(model, _)| model.state == ModelState::Loaded);
    loaded
        .map(|(model, &number)| {
            let holding = ledger.holding(number);
            let Use { active, last_used } = (world.usage)(&node.name, &model.id);
            let devices = devices_of(node, model);
            let last = || ledger.staying_on(holding).nth(1).is_none();
            Resident {
                model: holding.name.clone(),
                bytes: model.memory_bytes / devices.len().max(1) as u64,
                devices,
                // requests that other gateways have there count as well
                kept: holding.rule.pinned
                    || active > 0
                    || model.in_flight > 0
                    || holding.leaving.contains(&node.name)
                    || ((world.leases)(&model.id) > 0 && last()),
                priority: holding.rule.priority,
                last_used,
            }
        })
        .collect()
}

/// Which of the node's devices hold the model; all, where it does not say.
pub(super) fn devices_of(node: &NodeView, model: &ModelStatus) -> Vec<usize> {
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
