//! What the fleet has, and what of it is promised, kept from one look to the next: only nodes that have changed are read
//! again.

use super::placement::{World, devices_of};
use super::schedule::nanos;
use crate::config::{Config, Model};
use crate::fleet::NodeView;
use protocol::node::ModelState;
use std::cmp::Reverse;
use std::collections::HashMap;
use std::sync::Arc;

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

/// See the module. Nodes go by their place in the view, models by a number that they keep.
#[derive(Default)]
pub(crate) struct Ledger {
    accounts: Vec<Account>,
    by_name: HashMap<Arc<str>, usize>,
    holdings: Vec<Holding>,
    numbers: HashMap<Arc<str>, usize>,
    /// What has been begun, by node, so that nobody else counts on the same memory. A node may leave the view meanwhile.
    changes: HashMap<Arc<str>, Vec<Change>>,
    /// The configuration that accounts were made under.
    config: Option<Arc<Config>>,
}

/// One node as far as placing models is concerned.
#[derive(Debug)]
pub(crate) struct Account {
    pub(crate) node: Arc<NodeView>,
    /// The numbers of its models, in the view's order.
    pub(crate) models: Vec<usize>,
    /// Bytes that devices have at all, the largest first.
    pub(crate) totals: Vec<u64>,
    /// Bytes free on each device, less what is reserved there for loads that others or we have begun.
    pub(crate) free: Vec<u64>,
    /// The same, the most first.
    pub(crate) rooms: Vec<u64>,
    /// A load of unknown size has it to itself.
    pub(crate) closed: bool,
    /// Something has been begun there.
    pub(crate) changing: bool,
    /// Changes have ended since it was reckoned.
    stale: bool,
}

/// One model, across nodes.
#[derive(Debug)]
pub(crate) struct Holding {
    pub(crate) name: Arc<str>,
    pub(crate) rule: Rule,
    /// Where it is, in whatever state.
    pub(crate) there: Vec<Held>,
    /// Loads of it that have been begun.
    coming: usize,
    /// Nodes that it is on its way off.
    pub(crate) leaving: Vec<Arc<str>>,
    /// The most that a node has reported of it, for models of which the catalogue does not say.
    measured: u64,
}

/// What the catalogue says of a model.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Rule {
    pub(crate) pinned: bool,
    pub(crate) priority: i32,
    /// In nanoseconds.
    pub(crate) keep_alive: Option<u64>,
    /// It may have several replicas.
    pub(crate) several: bool,
}

impl Rule {
    fn of(config: &Config, model: &str) -> Self {
        let Some(model) = config.models.get(model) else {
            return Self::default();
        };
        let keep_alive = model.keep_alive.filter(|_| !model.is_pinned());
        Self {
            pinned: model.is_pinned(),
            priority: model.priority,
            keep_alive: keep_alive.map(nanos),
            several: model.max_replicas > 1 && model.pinned_on.is_empty(),
        }
    }
}

/// A model on a node.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Held {
    pub(crate) node: usize,
    pub(crate) state: ModelState,
}

impl Ledger {
    /// Takes in what is new about the fleet.
    pub(crate) fn see(&mut self, world: &World<'_>) {
        let nodes = world.nodes;
        let same_config = (self.config.as_ref()).is_some_and(|old| Arc::ptr_eq(old, world.config));
        let same = |(account, node): (&Account, &Arc<NodeView>)| {
            Arc::ptr_eq(&account.node, node) || account.node.name == node.name
        };
        let same_nodes =
            self.accounts.len() == nodes.len() && self.accounts.iter().zip(nodes).all(same);
        if !same_nodes {
            self.accounts.clear();
            self.holdings.iter_mut().for_each(|h| h.there.clear());
            let names = nodes.iter().enumerate();
            self.by_name = names.map(|(at, node)| (node.name.clone(), at)).collect();
        }
        if !same_config {
            self.config = Some(world.config.clone());
            self.accounts.iter_mut().for_each(|a| a.stale = true);
            for holding in &mut self.holdings {
                holding.rule = Rule::of(world.config, &holding.name);
            }
        }
        let mut learned = false;
        for (at, node) in nodes.iter().enumerate() {
            match self.accounts.get_mut(at) {
                Some(account) if Arc::ptr_eq(&account.node, node) => continue,
                Some(account) => {
                    account.node = node.clone();
                    account.stale = true;
                    for number in std::mem::take(&mut account.models) {
                        let there = &mut self.holdings[number].there;
                        there.retain(|held| held.node != at);
                    }
                }
                None => self.accounts.push(Account::new(node.clone())),
            }
            learned |= self.note(at, node, world.config);
        }
        for at in 0..self.accounts.len() {
            // what others load may be of a size that has just become known
            if self.accounts[at].stale || learned {
                self.reckon(at, world.config);
            }
        }
    }

    /// Notes what a node holds; `true` if a model is larger than was known.
    fn note(&mut self, at: usize, node: &NodeView, config: &Config) -> bool {
        let mut learned = false;
        for model in &node.models {
            let number = self.number(&model.id, config);
            self.accounts[at].models.push(number);
            let holding = &mut self.holdings[number];
            let state = model.state;
            holding.there.push(Held { node: at, state });
            if state == ModelState::Loaded && model.memory_bytes > holding.measured {
                holding.measured = model.memory_bytes;
                learned = true;
            }
        }
        learned
    }

    /// The number of a model, which it gets now if it has none.
    fn number(&mut self, model: &str, config: &Config) -> usize {
        if let Some(number) = self.numbers.get(model) {
            return *number;
        }
        let name: Arc<str> = model.into();
        self.numbers.insert(name.clone(), self.holdings.len());
        self.holdings.push(Holding {
            rule: Rule::of(config, &name),
            name,
            there: Vec::new(),
            coming: 0,
            leaving: Vec::new(),
            measured: 0,
        });
        self.holdings.len() - 1
    }

    /// Works out again what is free on a node.
    fn reckon(&mut self, at: usize, config: &Config) {
        let node = self.accounts[at].node.clone();
        let changes = self.on(&node.name);
        let mut free: Vec<u64> = node.devices.iter().map(|d| d.free_bytes).collect();
        let mut take =
            |device: usize, bytes: u64| free[device] = free[device].saturating_sub(bytes);
        for change in changes {
            for (index, device) in node.devices.iter().enumerate() {
                if change.devices.iter().any(|taken| **taken == *device.id) {
                    take(index, change.share.unwrap_or(u64::MAX));
                }
            }
        }
        let loading = |state| state == ModelState::Loading;
        for model in node.models.iter().filter(|model| loading(model.state)) {
            let ours = (changes.iter()).any(|change| change.load.as_deref() == Some(&*model.id));
            if !ours {
                let entry = config.models.get(model.id.as_str());
                let devices = devices_of(&node, model);
                let bytes = self.size(&model.id, entry).unwrap_or(0) / devices.len().max(1) as u64;
                devices.iter().for_each(|&device| take(device, bytes));
            }
        }
        let closed = |change: &Change| change.load.is_some() && change.share.is_none();
        let (closed, changing) = (changes.iter().any(closed), !changes.is_empty());
        let account = &mut self.accounts[at];
        account.totals = sorted(node.devices.iter().map(|device| device.total_bytes));
        account.rooms = sorted(free.iter().copied());
        account.free = free;
        (account.closed, account.changing, account.stale) = (closed, changing, false);
    }

    pub(crate) fn accounts(&self) -> &[Account] {
        &self.accounts
    }

    /// The node's place in the view.
    pub(crate) fn find(&self, node: &str) -> Option<usize> {
        self.by_name.get(node).copied()
    }

    /// The model of this number.
    pub(crate) fn holding(&self, number: usize) -> &Holding {
        &self.holdings[number]
    }

    fn named(&self, model: &str) -> Option<&Holding> {
        Some(&self.holdings[*self.numbers.get(model)?])
    }

    /// The numbers of models that are somewhere, each once, in an order that is the same for the same view.
    pub(crate) fn somewhere(&self) -> impl Iterator<Item = usize> {
        let accounts = self.accounts.iter().enumerate();
        accounts.flat_map(move |(at, account)| {
            let first = move |number: &usize| self.holdings[*number].there[0].node == at;
            account.models.iter().copied().filter(first)
        })
    }

    /// Where `model` is, in whatever state.
    pub(crate) fn there(&self, model: &str) -> &[Held] {
        self.named(model).map_or(&[], |h| &h.there)
    }

    /// Bytes that a model takes, if anybody knows.
    pub(crate) fn size(&self, id: &str, model: Option<&Model>) -> Option<u64> {
        let said = model.and_then(|model| model.memory);
        said.or_else(|| {
            let measured = self.named(id)?.measured;
            (measured > 0).then_some(measured)
        })
    }

    /// On which nodes a model is served and stays.
    pub(crate) fn staying_on(&self, holding: &Holding) -> impl Iterator<Item = &Account> {
        let served = (holding.there.iter()).filter(|held| held.state == ModelState::Loaded);
        let nodes = served.map(|held| &self.accounts[held.node]);
        nodes.filter(|a| a.node.serves() && !holding.leaving.contains(&a.node.name))
    }

    /// On how many nodes `model` is served and stays.
    pub(crate) fn staying(&self, model: &str) -> usize {
        let holding = self.named(model);
        holding.map_or(0, |holding| self.staying_on(holding).count())
    }

    /// Whether `model` is served by `node` and stays there.
    pub(crate) fn stays_on(&self, node: &str, model: &str) -> bool {
        let holding = self.named(model);
        holding.is_some_and(|h| {
            self.staying_on(h)
                .any(|account| *account.node.name == *node)
        })
    }

    /// Nodes to which `model` is coming.
    pub(crate) fn coming(&self, model: &str) -> usize {
        self.named(model).map_or(0, |h| h.coming)
    }

    pub(crate) fn on(&self, node: &str) -> &[Change] {
        self.changes.get(node).map_or(&[], Vec::as_slice)
    }

    /// Notes a change that has been begun.
    pub(crate) fn begin(&mut self, change: Change, config: &Config) {
        for model in &change.evict {
            let number = self.number(model, config);
            self.holdings[number].leaving.push(change.node.clone());
        }
        if let Some(model) = &change.load {
            let number = self.number(model, config);
            self.holdings[number].coming += 1;
        }
        let at = self.find(&change.node);
        let changes = self.changes.entry(change.node.clone()).or_default();
        changes.push(change);
        if let Some(at) = at {
            self.reckon(at, config);
        }
    }

    /// Forgets a change that has ended.
    pub(crate) fn end(&mut self, node: &Arc<str>, load: Option<&str>, evict: &[Arc<str>]) {
        let Some(changes) = self.changes.get_mut(node) else {
            return;
        };
        let same = |change: &Change| change.load.as_deref() == load && change.evict == evict;
        let Some(index) = changes.iter().position(same) else {
            return;
        };
        let change = changes.swap_remove(index);
        if changes.is_empty() {
            self.changes.remove(node);
        }
        for model in &change.evict {
            let leaving = &mut self.holdings[self.numbers[model]].leaving;
            if let Some(index) = leaving.iter().position(|name| name == node) {
                leaving.swap_remove(index);
            }
        }
        if let Some(model) = &change.load {
            self.holdings[self.numbers[model]].coming -= 1;
        }
        if let Some(at) = self.find(node) {
            self.accounts[at].stale = true;
        }
    }
}

impl Account {
    fn new(node: Arc<NodeView>) -> Self {
        Self {
            node,
            models: Vec::new(),
            totals: Vec::new(),
            free: Vec::new(),
            rooms: Vec::new(),
            closed: false,
            changing: false,
            stale: true,
        }
    }
}

/// These numbers, the largest first.
pub(crate) fn sorted(numbers: impl Iterator<Item = u64>) -> Vec<u64> {
    let mut numbers: Vec<u64> = numbers.collect();
    numbers.sort_unstable_by_key(|number| Reverse(*number));
    numbers
}

#[cfg(test)]
impl Ledger {
    /// Asserts that what was kept is what a fresh look would give.
    pub(super) fn check(&self, world: &World<'_>) {
        let mut fresh = Self::default();
        for holding in &self.holdings {
            let number = fresh.number(&holding.name, world.config);
            fresh.holdings[number].measured = holding.measured;
        }
        fresh.see(world);
        for change in self.changes.values().flatten() {
            fresh.begin(change.clone(), world.config);
        }
        for (kept, fresh) in self.accounts.iter().zip(&fresh.accounts) {
            assert!(Arc::ptr_eq(&kept.node, &fresh.node), "{}", kept.node.name);
            let seen = |a: &Account| (a.totals.clone(), a.free.clone(), a.rooms.clone());
            assert_eq!(seen(kept), seen(fresh), "{}", kept.node.name);
            let state = |a: &Account| (a.closed, a.changing);
            assert_eq!(state(kept), state(fresh), "{}", kept.node.name);
        }
        for kept in &self.holdings {
            let of = |ledger: &Self| {
                let holding = ledger.named(&kept.name).expect("named above");
                let there = holding.there.iter();
                let mut there: Vec<_> =
                    there.map(|held| (held.node, held.state.as_str())).collect();
                let mut leaving = holding.leaving.clone();
                there.sort_unstable();
                leaving.sort_unstable();
                (there, leaving, holding.coming)
            };
            assert_eq!(of(self), of(&fresh), "{kept:?}");
        }
    }
}
