//! Random runs of the schedule over a simulated fleet, and what must hold at every step.

use super::ledger::{Change, Reason};
use super::placement::{Use, World};
use super::plan::plan;
use super::schedule::{Ended, Hands, Refusal, Schedule};
use crate::config::{Config, Model, Replicas, Strategy};
use crate::fleet::{FleetView, Health, NodeView};
use filters::route::Endpoint;
use protocol::node::{DeviceInfo, ModelState, ModelStatus};
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Duration;

const SECOND: u64 = 1_000_000_000;

pub(super) fn config(models: BTreeMap<Arc<str>, Model>, strategy: Strategy) -> Config {
    let mut config = Config::read(None).unwrap_or_else(|_| panic!("defaults are fine"));
    config.models = models;
    config.eviction.strategy = strategy;
    config.eviction.defrag_after_cycles = 20;
    config.replicas = Replicas {
        above: 2,
        after: Duration::from_secs(5),
        retire_after: Duration::from_secs(30),
    };
    config
}

pub(super) fn model(memory: Option<u64>) -> Model {
    Model {
        source: "/m".into(),
        memory,
        tensor_parallel: 1,
        min_devices: 1,
        context_length: None,
        quant: None,
        pinned: false,
        pinned_on: Vec::new(),
        keep_alive: None,
        max_replicas: 1,
        priority: 0,
        aliases: Vec::new(),
    }
}

pub(super) fn node(name: &str, devices: &[u64]) -> NodeView {
    let endpoint = Endpoint {
        node: name.into(),
        address: ([127, 0, 0, 1], 1).into(),
        authority: "node:1".into(),
        tls: false,
        weight: 1,
        access: Arc::default(),
        load: Arc::default(),
    };
    let device = |(index, bytes): (usize, &u64)| DeviceInfo {
        id: format!("cuda:{index}"),
        name: "simulated".into(),
        total_bytes: *bytes,
        free_bytes: *bytes,
        many_ranks: false,
    };
    NodeView {
        name: name.into(),
        manages: true,
        health: Health::Up,
        endpoint: Some(Arc::new(endpoint)),
        devices: devices.iter().enumerate().map(device).collect(),
        version: String::new(),
        models: Vec::new(),
        foreign: 0,
        load: Arc::default(),
    }
}

pub(super) fn status(id: &str, state: ModelState, devices: &[String], bytes: u64) -> ModelStatus {
    ModelStatus {
        id: id.into(),
        state,
        progress: 1.0,
        reason: None,
        source: "/m".into(),
        devices: devices.to_vec(),
        ranks: Vec::new(),
        memory_bytes: bytes,
        context_length: 4096,
        capabilities: Vec::new(),
        in_flight: 0,
        since: 1,
    }
}

/// A change being carried out on a simulated node.
struct Running {
    change: Change,
    /// The victims have gone and the load has taken its memory.
    taken: bool,
}

/// What became of a waiter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fate {
    Waits,
    Served,
    Refused,
    TimedOut,
}

/// The fleet as it is, which is not always what was last seen of it.
struct Fleet {
    nodes: Vec<NodeView>,
    /// True sizes, some of which the catalogue does not say.
    sizes: HashMap<Arc<str>, u64>,
    widths: HashMap<Arc<str>, usize>,
    /// Requests in flight by node and model.
    requests: HashMap<(Arc<str>, Arc<str>), usize>,
    leaving: BTreeSet<(Arc<str>, Arc<str>)>,
    last_used: HashMap<(Arc<str>, Arc<str>), u64>,
    running: Vec<Running>,
    fates: Vec<Fate>,
    pinned: BTreeSet<Arc<str>>,
    now: u64,
    decisions: u64,
}

impl Fleet {
    fn in_flight(&self, node: &str, model: &str) -> usize {
        let key = (Arc::from(node), Arc::from(model));
        self.requests.get(&key).copied().unwrap_or(0)
    }

    fn serving(&self, model: &str) -> Vec<Arc<str>> {
        let nodes = self.nodes.iter().filter(|node| node.is_up());
        nodes
            .filter(|node| {
                let left = self.leaving.contains(&(node.name.clone(), model.into()));
                let loaded = node.model(model).map(|model| model.state);
                !left && loaded == Some(ModelState::Loaded)
            })
            .map(|node| node.name.clone())
            .collect()
    }

    fn node(&mut self, name: &str) -> &mut NodeView {
        let mut nodes = self.nodes.iter_mut();
        nodes.find(|node| *node.name == *name).expect("a node")
    }

    fn free(&mut self, node: &str, model: &str) {
        let node = self.node(node);
        let Some(index) = node.models.iter().position(|held| held.id == model) else {
            return;
        };
        let gone = node.models.swap_remove(index);
        let each = gone.memory_bytes / gone.devices.len().max(1) as u64;
        for device in node
            .devices
            .iter_mut()
            .filter(|d| gone.devices.contains(&d.id))
        {
            device.free_bytes += each;
        }
    }

    /// Takes memory for a load; `false` when the node refuses it for want of room, as its preflight would.
    fn take(&mut self, change: &Change, model: &Arc<str>) -> bool {
        let (bytes, width) = (self.sizes[model], self.widths[model]);
        let each = bytes.div_ceil(width as u64);
        let node = self.node(&change.node);
        let devices: Vec<String> = change.devices.iter().map(ToString::to_string).collect();
        assert_eq!(devices.len(), width, "{change:?}: its devices");
        let mut held: Vec<_> = (node.devices.iter_mut())
            .filter(|device| devices.contains(&device.id))
            .collect();
        let fits = held.iter().all(|device| device.free_bytes >= each);
        assert!(
            fits || change.share.is_none(),
            "{change:?}: placed on memory that is not there"
        );
        if fits {
            held.iter_mut().for_each(|device| device.free_bytes -= each);
            let status = status(model, ModelState::Loading, &devices, each * width as u64);
            node.models.push(status);
        }
        fits
    }
}

impl Hands<usize> for Fleet {
    fn serve(&mut self, model: &Arc<str>, waiter: usize) -> Option<usize> {
        let Some(node) = self.serving(model).first().cloned() else {
            return Some(waiter); // the view was old
        };
        assert_ne!(self.fates[waiter], Fate::Served, "{waiter} is served twice");
        if self.fates[waiter] == Fate::Waits {
            self.fates[waiter] = Fate::Served;
            *self.requests.entry((node, model.clone())).or_default() += 1;
        }
        None
    }

    fn refuse(&mut self, _: &Arc<str>, waiters: Vec<usize>, _: &Refusal) {
        for waiter in waiters {
            if self.fates[waiter] == Fate::Waits {
                self.fates[waiter] = Fate::Refused;
            }
        }
    }

    fn has_left(&self, waiter: &usize) -> bool {
        self.fates[*waiter] != Fate::Waits
    }

    fn leave(&mut self, node: &Arc<str>, models: &[Arc<str>], drain: bool) -> bool {
        if !drain && models.iter().any(|model| self.in_flight(node, model) > 0) {
            return false;
        }
        for model in models {
            // a pinned model may have a replica too many, which is drained
            assert!(drain || !self.pinned.contains(model), "{model} is pinned");
            let new = self.leaving.insert((node.clone(), model.clone()));
            assert!(new, "{model} leaves {node} twice");
        }
        true
    }

    fn begin(&mut self, change: &Change) {
        self.decisions += 1;
        self.running.push(Running {
            change: change.clone(),
            taken: false,
        });
    }
}

struct Simulation {
    random: StdRng,
    config: Arc<Config>,
    fleet: Fleet,
    /// What was last seen.
    view: Vec<Arc<NodeView>>,
    schedule: Schedule<usize>,
    deadlines: Vec<u64>,
}

impl Simulation {
    fn new(seed: u64) -> Self {
        let mut random = StdRng::seed_from_u64(seed);
        let nodes: Vec<NodeView> = (0..random.random_range(1..6))
            .map(|index| {
                let devices = vec![random.random_range(40..100); random.random_range(1..5)];
                node(&format!("n{index}"), &devices)
            })
            .collect();
        let mut models = BTreeMap::new();
        let (mut sizes, mut widths) = (HashMap::new(), HashMap::new());
        for index in 0..random.random_range(2..14) {
            let id: Arc<str> = format!("m{index}").into();
            let size = random.random_range(2..70);
            let mut entry = model(random.random_bool(0.8).then_some(size));
            entry.tensor_parallel = *[1, 1, 1, 2, 4].choose(&mut random).expect("some");
            entry.max_replicas = random.random_range(1..4);
            entry.priority = random.random_range(0..3);
            entry.pinned = random.random_bool(0.05);
            entry.keep_alive = random
                .random_bool(0.3)
                .then_some(Duration::from_secs(20))
                .filter(|_| !entry.pinned);
            sizes.insert(id.clone(), size);
            widths.insert(id.clone(), entry.tensor_parallel);
            models.insert(id, entry);
        }
        let pinned = models.iter().filter(|(_, model)| model.pinned);
        let pinned = pinned.map(|(id, _)| id.clone()).collect();
        let strategy = if random.random_bool(0.5) {
            Strategy::Lru
        } else {
            Strategy::Priority
        };
        Self {
            random,
            config: Arc::new(config(models, strategy)),
            view: nodes.iter().cloned().map(Arc::new).collect(),
            fleet: Fleet {
                nodes,
                sizes,
                widths,
                requests: HashMap::new(),
                leaving: BTreeSet::new(),
                last_used: HashMap::new(),
                running: Vec::new(),
                fates: Vec::new(),
                pinned,
                now: SECOND,
                decisions: 0,
            },
            schedule: Schedule::default(),
            deadlines: Vec::new(),
        }
    }

    fn look(&mut self, node: usize) {
        let mut seen = self.fleet.nodes[node].clone();
        for model in &mut seen.models {
            model.in_flight = self.fleet.in_flight(&seen.name, &model.id) as u64;
        }
        self.view[node] = Arc::new(seen);
    }

    /// Something happens, and the schedule has its say.
    fn step(&mut self, arrivals: bool) {
        self.fleet.now += self.random.random_range(0..2 * SECOND);
        match self.random.random_range(0..10) {
            0..3 if arrivals => {
                let models = self.config.models.len();
                let model = format!("m{}", self.random.random_range(0..=models));
                self.fleet.fates.push(Fate::Waits);
                self.deadlines.push(self.fleet.now + 300 * SECOND);
                self.schedule
                    .want(model.as_str().into(), self.fleet.fates.len() - 1);
            }
            0..5 => self.advance(),
            5..7 => self.end_request(),
            7 if arrivals && self.random.random_bool(0.1) => self.crash_or_return(),
            _ => {
                let node = self.random.random_range(0..self.view.len());
                self.look(node);
            }
        }
        for (waiter, deadline) in self.deadlines.iter().enumerate() {
            if self.fleet.fates[waiter] == Fate::Waits && *deadline < self.fleet.now {
                self.fleet.fates[waiter] = Fate::TimedOut;
            }
        }
        self.decide();
        self.check();
    }

    fn decide(&mut self) {
        let (requests, used) = (self.fleet.requests.clone(), self.fleet.last_used.clone());
        let usage = |node: &str, model: &str| {
            let key = (Arc::from(node), Arc::from(model));
            Use {
                active: requests.get(&key).copied().unwrap_or(0),
                last_used: used.get(&key).copied().unwrap_or(0),
            }
        };
        let world = World {
            config: &self.config,
            nodes: &self.view,
            now: self.fleet.now,
            usage: &usage,
            leases: &|model| {
                let there = requests.iter().filter(|((_, id), _)| **id == *model);
                there.map(|(_, count)| count).sum()
            },
        };
        self.schedule.step(&world, &mut self.fleet);
        self.schedule.tidy(&world, &mut self.fleet);
        self.schedule.ledger().check(&world);
    }

    /// A change goes on, or ends well or badly.
    fn advance(&mut self) {
        if self.fleet.running.is_empty() {
            return;
        }
        let index = self.random.random_range(0..self.fleet.running.len());
        let change = self.fleet.running[index].change.clone();
        let up = self.fleet.node(&change.node).is_up();
        if !self.fleet.running[index].taken && up {
            let drained = |model| self.fleet.in_flight(&change.node, model) == 0;
            if !change.evict.iter().all(|model| drained(model)) {
                assert_eq!(change.reason, Reason::Replicas, "{change:?}: in use");
                return;
            }
            for model in &change.evict {
                self.fleet.free(&change.node, model);
            }
            let taken = match &change.load {
                Some(model) => self.fleet.take(&change, model),
                None => true,
            };
            self.fleet.running[index].taken = taken;
            if taken && change.load.is_some() {
                return;
            }
        }
        let running = self.fleet.running.swap_remove(index);
        let fails = !up || !running.taken || self.random.random_bool(0.1);
        if let Some(model) = &change.load {
            if fails {
                self.fleet.free(&change.node, model);
            } else {
                let held = self.fleet.node(&change.node).models.iter_mut();
                for held in held.filter(|held| held.id == **model) {
                    held.state = ModelState::Loaded;
                }
            }
        }
        for model in &change.evict {
            self.fleet
                .leaving
                .remove(&(change.node.clone(), model.clone()));
        }
        let node = self.view.iter().position(|node| node.name == change.node);
        self.look(node.expect("a node"));
        self.schedule.ended(Ended {
            node: &change.node,
            load: change.load.as_deref(),
            evict: &change.evict,
            failure: (fails && change.load.is_some()).then(|| "by chance".into()),
            now: self.fleet.now,
        });
    }

    fn end_request(&mut self) {
        let mut keys: Vec<_> = self.fleet.requests.keys().cloned().collect();
        keys.sort();
        let Some(key) = keys.choose(&mut self.random).cloned() else {
            return;
        };
        self.fleet.last_used.insert(key.clone(), self.fleet.now);
        let count = self.fleet.requests.get_mut(&key).expect("a key");
        *count -= 1;
        if *count == 0 {
            self.fleet.requests.remove(&key);
        }
    }

    /// A node dies and loses all it held, or comes back empty.
    fn crash_or_return(&mut self) {
        let index = self.random.random_range(0..self.fleet.nodes.len());
        let node = &mut self.fleet.nodes[index];
        if node.is_up() {
            node.health = Health::Down("by chance".into());
            node.models.clear();
            for device in &mut node.devices {
                device.free_bytes = device.total_bytes;
            }
            let name = node.name.clone();
            self.fleet.requests.retain(|(node, _), _| *node != name);
            let changes = self.fleet.running.iter_mut();
            for change in changes.filter(|running| running.change.node == name) {
                change.taken = false;
            }
        } else {
            let name = node.name.clone();
            // those who asked for a change find out before they are told of another
            if self.fleet.running.iter().all(|r| r.change.node != name) {
                node.health = Health::Up;
                self.look(index);
            }
        }
    }

    fn check(&self) {
        for node in &self.fleet.nodes {
            for device in &node.devices {
                let held: u64 = (node.models.iter())
                    .filter(|model| model.devices.contains(&device.id))
                    .map(|model| model.memory_bytes / model.devices.len() as u64)
                    .sum();
                assert_eq!(
                    held + device.free_bytes,
                    device.total_bytes,
                    "{}",
                    node.name
                );
            }
            let mut ids: Vec<&str> = node.models.iter().map(|m| m.id.as_str()).collect();
            ids.sort_unstable();
            assert!(ids.windows(2).all(|two| two[0] != two[1]), "{ids:?}");
        }
        for (id, model) in &self.config.models {
            let changes = self.fleet.running.iter();
            let coming = changes.filter(|r| r.change.load.as_ref() == Some(id) && !r.taken);
            let there = |node: &&NodeView| node.model(id).is_some();
            let there = self.fleet.nodes.iter().filter(there).count();
            assert!(
                there <= model.max_replicas + coming.count().max(2),
                "{id}: {there} replicas"
            );
        }
    }

    /// No more requests come: everything settles, and everybody has had an answer.
    fn settle(&mut self) {
        for _ in 0..20_000 {
            self.step(false);
            let waits = self.fleet.fates.contains(&Fate::Waits);
            if !waits && self.fleet.running.is_empty() && self.fleet.requests.is_empty() {
                return;
            }
        }
        panic!("it does not settle: {:?}", self.fleet.requests);
    }
}

/// 200 fleets of chance, 500 steps each: nobody in use or pinned is evicted, no memory is promised twice (both by the
/// simulated fleet's own assertions), no model is twice on a node, and every waiter has one answer.
#[test]
fn random_runs_keep_every_promise() {
    let mut fates: BTreeMap<String, usize> = BTreeMap::new();
    let mut decisions = 0;
    for seed in 0..200 {
        let mut simulation = Simulation::new(seed);
        for _ in 0..500 {
            simulation.step(true);
        }
        simulation.settle();
        for fate in &simulation.fleet.fates {
            *fates.entry(format!("{fate:?}")).or_default() += 1;
        }
        decisions += simulation.fleet.decisions;
    }
    assert!(!fates.contains_key("Waits"), "{fates:?}");
    assert!(
        fates["Served"] > 10_000 && decisions > 5_000,
        "{fates:?} {decisions}"
    );
}

/// One look of a fresh schedule at a fleet; what it begins.
fn begun(config: &Config, nodes: &[NodeView], wanted: &[&str]) -> Vec<Change> {
    let mut simulation = Simulation::new(0);
    simulation.config = Arc::new(config.clone());
    simulation.fleet.nodes = nodes.to_vec();
    simulation.fleet.pinned.clear();
    simulation.view = nodes.iter().cloned().map(Arc::new).collect();
    for model in wanted {
        simulation.fleet.fates.push(Fate::Waits);
        let waiter = simulation.fleet.fates.len() - 1;
        simulation.schedule.want((*model).into(), waiter);
    }
    simulation.decide();
    let changes = simulation.fleet.running.into_iter();
    changes.map(|running| running.change).collect()
}

fn catalogue(models: &[(&str, Model)]) -> Config {
    let models = models
        .iter()
        .map(|(id, model)| ((*id).into(), model.clone()));
    config(models.collect(), Strategy::Lru)
}

#[test]
fn a_model_in_shares_takes_devices_of_one_node_and_what_is_reserved_is_not_free() {
    let mut wide = model(Some(60));
    wide.tensor_parallel = 2;
    let config = catalogue(&[("wide", wide), ("one", model(Some(70)))]);
    let nodes = [node("single", &[100]), node("double", &[80, 100])];
    let changes = begun(&config, &nodes, &["wide", "one"]);
    let places: Vec<_> = changes
        .iter()
        .map(|change| format!("{} {:?} {:?}", change.node, change.devices, change.share))
        .collect();
    assert_eq!(
        places,
        [
            "double [\"cuda:1\", \"cuda:0\"] Some(30)",
            "single [\"cuda:0\"] Some(70)"
        ]
    );
}

#[test]
fn where_a_device_holds_many_ranks_a_model_in_shares_takes_one_as_a_whole() {
    let mut wide = model(Some(60));
    wide.tensor_parallel = 2;
    let config = catalogue(&[("wide", wide)]);
    let host = |name, bytes| {
        let mut node = node(name, &[bytes]);
        node.devices[0].many_ranks = true;
        node
    };
    let spots = |nodes: &[NodeView]| {
        let changes = begun(&config, nodes, &["wide"]);
        let spots = changes.iter();
        let spots: Vec<_> = spots
            .map(|change| format!("{} {:?} {:?}", change.node, change.devices, change.share))
            .collect();
        spots
    };
    let whole = ["host [\"cuda:0\"] Some(60)"];
    assert_eq!(spots(&[node("single", &[100]), host("host", 100)]), whole);
    assert_eq!(spots(&[host("host", 40)]), [""; 0], "half of it is no room");
    let shares = ["double [\"cuda:0\", \"cuda:1\"] Some(30)"];
    let both = [host("host", 40), node("double", &[50, 50])];
    assert_eq!(spots(&both), shares);
}

#[test]
fn a_model_pinned_on_nodes_comes_to_each_of_them() {
    let mut pinned = model(Some(10));
    pinned.pinned_on = vec!["b".into(), "c".into()];
    let config = catalogue(&[("pinned", pinned)]);
    let nodes = ["a", "b", "c"].map(|name| node(name, &[100]));
    let changes = begun(&config, &nodes, &[]);
    let names: Vec<&str> = changes.iter().map(|change| &*change.node).collect();
    assert_eq!(names, ["b", "c"]);
}

#[test]
fn a_model_of_unknown_size_has_a_node_to_itself_until_its_size_is_known() {
    let config = catalogue(&[("known", model(Some(10))), ("unknown", model(None))]);
    let nodes = [node("a", &[100])];
    assert_eq!(begun(&config, &nodes, &["unknown", "known"]).len(), 1);
    let mut other = node("b", &[100]);
    let held = status("unknown", ModelState::Loaded, &["cuda:0".into()], 40);
    other.models.push(held);
    other.health = Health::Down("gone".into());
    let changes = begun(&config, &[nodes[0].clone(), other], &["unknown", "known"]);
    assert_eq!((changes.len(), changes[0].share), (2, Some(40)));
}

#[test]
fn a_plan_says_where_and_why() {
    let mut wide = model(Some(64 << 30));
    wide.tensor_parallel = 4;
    let mut pinned = model(Some(60 << 30));
    pinned.pinned = true;
    let config = catalogue(&[
        ("here", model(Some(20 << 30))),
        ("next", model(Some(50 << 30))),
        ("pinned", pinned),
        ("wide", wide),
    ]);
    let mut gpu = node("gpu-1", &[80 << 30, 80 << 30]);
    let held = status("here", ModelState::Loaded, &["cuda:0".into()], 20 << 30);
    gpu.models.push(held);
    gpu.devices[0].free_bytes = 30 << 30;
    let view = FleetView::of(vec![gpu]);
    let expected = "\
MODEL   NODE   DEVICES  EACH      EVICTS  WHY
pinned  gpu-1  cuda:1   60.0 GiB          the most room is there
here    gpu-1                             it is served there
next    gpu-1  cuda:0   50.0 GiB  here    the least has to leave there: 20.0 GiB
wide                                      no node is up that may have it
";
    assert_eq!(plan(&Arc::new(config), &view), expected);
}
