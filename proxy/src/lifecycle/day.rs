//! A day of a fleet in half a minute: what hits, cold starts and decisions come to by policy of eviction and of routing.
//!
//! `cargo test --workspace --bin cortex -- --ignored a_day --nocapture` prints them for 1,000 nodes and 10,000 models.
//! Schedule, placement, eviction and the choice of a node are those of the daemon; time, nodes and requests are made up.

use super::ledger::{Change, Reason};
use super::placement::{Use, World};
use super::schedule::{Ended, Hands, Refusal, Schedule};
use super::tests::{config, model, node, status};
use crate::config::{Config, Replicas, Strategy};
use crate::fleet::NodeView;
use bytes::Bytes;
use filters::Request;
use filters::route::{Candidate, POLICIES, Routing, RoutingPolicy, seen_as};
use protocol::node::ModelState;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use std::cell::{Cell, RefCell};
use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap};
use std::fmt::Write;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

const SECOND: u64 = 1_000_000_000;
const HOUR: u64 = 3600 * SECOND;
const DAY: u64 = 24 * HOUR;
const GB: u64 = 1 << 30;
/// How long a request waits for a model.
const PATIENCE: u64 = 600 * SECOND;
/// How often nodes are asked and the schedule looks around on its own.
const TICK: u64 = 10 * SECOND;

/// How large the world is.
#[derive(Clone, Copy)]
struct Size {
    nodes: usize,
    models: usize,
    conversations: usize,
}

/// One request: a turn of a conversation.
#[derive(Clone, Copy)]
struct Turn {
    at: u64,
    model: usize,
    conversation: usize,
    /// Turns before it.
    before: usize,
}

/// A day's requests in their order. Conversations begin more by day than by night and have four turns on average, a minute
/// apart on average. The few most popular models get most of them (Zipf, exponent 1).
fn trace(size: Size, random: &mut StdRng) -> Vec<Turn> {
    let mut sum = 0.0;
    let weights = (1..=size.models).map(|rank| {
        sum += 1.0 / rank as f64;
        sum
    });
    let weights: Vec<f64> = weights.collect();
    let mut turns = Vec::new();
    for conversation in 0..size.conversations {
        let mut at = loop {
            let at = random.random_range(0.0..1.0f64);
            let busy = 0.6 - 0.4 * (std::f64::consts::TAU * at).cos();
            if random.random_range(0.0..1.0) < busy {
                break (at * DAY as f64) as u64;
            }
        };
        let point = random.random_range(0.0..weights[weights.len() - 1]);
        let model = weights.partition_point(|weight| *weight < point);
        for before in 0.. {
            turns.push(Turn {
                at,
                model,
                conversation,
                before,
            });
            if random.random_bool(0.25) {
                break;
            }
            at += after(60.0, random);
        }
    }
    turns.sort_unstable_by_key(|turn| (turn.at, turn.conversation));
    turns
}

/// A time by chance, so many seconds on average.
fn after(seconds: f64, random: &mut StdRng) -> u64 {
    let times = -random.random_range(1e-4..1.0f64).ln();
    (times * seconds * SECOND as f64) as u64
}

/// What happens next.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Event {
    Arrives { turn: usize },
    Ends { node: usize, model: usize },
    Changed { index: usize },
    Tick,
}

/// How the models are used, by model and node; a model has been on few nodes.
struct Usage {
    of: Vec<Vec<(usize, Use)>>,
}

impl Usage {
    fn there(&self, node: usize, model: usize) -> Use {
        let there = self.of[model].iter().find(|(other, _)| *other == node);
        there.map_or_else(Use::default, |(_, there)| *there)
    }

    fn there_mut(&mut self, node: usize, model: usize) -> &mut Use {
        let of = &mut self.of[model];
        let known = of.iter().position(|(other, _)| *other == node);
        let index = known.unwrap_or(of.len());
        if known.is_none() {
            of.push((node, Use::default()));
        }
        &mut of[index].1
    }

    fn active(&self, model: usize) -> usize {
        self.of[model].iter().map(|(_, there)| there.active).sum()
    }
}

struct Day<'a> {
    now: u64,
    turns: &'a [Turn],
    random: StdRng,
    nodes: Vec<Arc<NodeView>>,
    sizes: &'a [u64],
    policy: Arc<dyn RoutingPolicy>,
    /// By model: nodes that serve it and are not being cleared of it.
    serving: Vec<Vec<Candidate>>,
    usage: Rc<RefCell<Usage>>,
    /// Requests at a node.
    in_flight: Vec<usize>,
    /// What the turn before was sent to, by conversation.
    homes: BTreeMap<usize, u32>,
    events: BinaryHeap<Reverse<(u64, usize, Event)>>,
    count: usize,
    changes: Vec<Change>,
    waits: Vec<u64>,
    outcome: Outcome,
}

/// What a day came to.
#[derive(Debug, Default)]
struct Outcome {
    hits: usize,
    /// Hits of models of the highest priority, and requests for them.
    dear: (usize, usize),
    loads: usize,
    evictions: usize,
    replicas: usize,
    refused: usize,
    unanswered: usize,
    /// Of those that waited, in seconds: median and 99th percentile.
    waits: (f64, f64),
    /// Turns that had one before and were sent where that was, and all that had one before.
    home: (usize, usize),
    /// Choices among several nodes, and the time they took.
    picks: (u32, Duration),
    /// Looks of the schedule at what is wanted, and the time they took.
    looks: (u32, Duration),
    /// The same of those that look at everything, now and then.
    ticks: (u32, Duration),
}

/// The number in `m17` or `n3`.
fn number(name: &str) -> usize {
    name[1..].parse().expect("a name of ours")
}

impl<'a> Day<'a> {
    fn new(
        nodes: Vec<Arc<NodeView>>,
        config: &Config,
        sizes: &'a [u64],
        turns: &'a [Turn],
    ) -> Self {
        let usage = Usage {
            of: vec![Vec::new(); sizes.len()],
        };
        Self {
            now: 0,
            turns,
            random: StdRng::seed_from_u64(3),
            in_flight: vec![0; nodes.len()],
            nodes,
            sizes,
            policy: config.routing.policy().expect("a policy"),
            serving: vec![Vec::new(); sizes.len()],
            usage: Rc::new(RefCell::new(usage)),
            homes: BTreeMap::new(),
            events: BinaryHeap::new(),
            count: 0,
            changes: Vec::new(),
            waits: Vec::new(),
            outcome: Outcome::default(),
        }
    }

    fn push(&mut self, at: u64, event: Event) {
        self.count += 1;
        self.events.push(Reverse((at, self.count, event)));
    }

    /// A request of some seconds begins on the node that the policy chooses.
    fn begin_request(&mut self, index: usize) {
        let turn = self.turns[index];
        let serving = &mut self.serving[turn.model];
        for candidate in serving.iter_mut() {
            candidate.foreign = self.in_flight[number(&candidate.endpoint.node)];
        }
        let chosen = match &serving[..] {
            [only] => only,
            several => {
                let request = prompt(turn);
                let candidates: Vec<&Candidate> = several.iter().collect();
                let began = Instant::now();
                let pick = self.policy.pick(&request, &candidates);
                self.outcome.picks.1 += began.elapsed();
                self.outcome.picks.0 += 1;
                candidates[pick.index]
            }
        };
        if let Some(home) = self.homes.insert(turn.conversation, chosen.seen_as) {
            self.outcome.home.1 += 1;
            self.outcome.home.0 += usize::from(home == chosen.seen_as);
        }
        let node = number(&chosen.endpoint.node);
        let mut usage = self.usage.borrow_mut();
        usage.there_mut(node, turn.model).active += 1;
        drop(usage);
        self.in_flight[node] += 1;
        let at = self.now + after(10.0, &mut self.random);
        let model = turn.model;
        self.push(at, Event::Ends { node, model });
    }

    fn end_request(&mut self, node: usize, model: usize) {
        let mut usage = self.usage.borrow_mut();
        let there = usage.there_mut(node, model);
        there.active -= 1;
        there.last_used = self.now;
        self.in_flight[node] -= 1;
    }

    /// The change is over, unless somebody is still answered by what leaves: memory and models are as it wanted them.
    fn carry_out(&mut self, change: &Change) -> bool {
        let index = number(&change.node);
        let usage = self.usage.borrow();
        let used = |model: &Arc<str>| usage.there(index, number(model)).active > 0;
        if change.evict.iter().any(used) {
            return false;
        }
        let node = Arc::make_mut(&mut self.nodes[index]);
        for gone in &change.evict {
            let at = node.models.iter().position(|held| *held.id == **gone);
            let gone = node.models.swap_remove(at.expect("it was there"));
            let each = gone.memory_bytes / gone.devices.len() as u64;
            let devices = node.devices.iter_mut();
            for device in devices.filter(|d| gone.devices.contains(&d.id)) {
                device.free_bytes += each;
            }
        }
        let Some(id) = &change.load else { return true };
        let devices: Vec<String> = change.devices.iter().map(ToString::to_string).collect();
        let each = self.sizes[number(id)].div_ceil(devices.len() as u64);
        for device in node.devices.iter_mut().filter(|d| devices.contains(&d.id)) {
            let left = device.free_bytes.checked_sub(each);
            device.free_bytes = left.expect("placed on memory that is there");
        }
        let held = each * devices.len() as u64;
        let mut loaded = status(id, ModelState::Loaded, &devices, held);
        loaded.since = self.now / SECOND;
        assert!(node.model(id).is_none(), "{id} is twice on {index}");
        self.serving[number(id)].push(Candidate {
            endpoint: node.endpoint.clone().expect("nodes have addresses"),
            replica: Arc::default(),
            foreign: 0,
            seen_as: seen_as(&node.name, id, loaded.since),
        });
        node.models.push(loaded);
        true
    }

    /// Nodes are asked what they are doing.
    fn poll(&mut self) {
        let usage = self.usage.borrow();
        for (index, node) in self.nodes.iter_mut().enumerate() {
            let now = |id: &str| usage.there(index, number(id)).active as u64;
            if node.models.iter().any(|m| m.in_flight != now(&m.id)) {
                for model in &mut Arc::make_mut(node).models {
                    model.in_flight = now(&model.id);
                }
            }
        }
    }
}

/// What a client sends as this turn: all that was said before, and something new.
fn prompt(turn: Turn) -> Request {
    let mut body = String::from(r#"{"messages":["#);
    for before in 0..=turn.before {
        let comma = if before > 0 { "," } else { "" };
        let name = turn.conversation * 1000 + before;
        // a String takes all
        let _ = write!(body, r#"{comma}{{"role":"user","content":"{name:0200}"}}"#);
    }
    body.push_str("]}");
    let (head, ()) = http::Request::new(()).into_parts();
    let request = Request::new(head, Bytes::from(body));
    let model = format!("m{}", turn.model).as_str().into();
    request.exchange.set_target(model, false);
    request
}

impl Hands<usize> for Day<'_> {
    fn serve(&mut self, model: &Arc<str>, turn: usize) -> Option<usize> {
        if self.serving[number(model)].is_empty() {
            return Some(turn); // it is on its way off
        }
        self.waits.push(self.now - self.turns[turn].at);
        self.begin_request(turn);
        None
    }

    fn refuse(&mut self, _: &Arc<str>, waiters: Vec<usize>, _: &Refusal) {
        self.outcome.refused += waiters.len();
    }

    fn has_left(&self, turn: &usize) -> bool {
        self.now - self.turns[*turn].at > PATIENCE
    }

    fn leave(&mut self, node: &Arc<str>, models: &[Arc<str>], drain: bool) -> bool {
        let index = number(node);
        let usage = self.usage.borrow();
        let used = |model: &Arc<str>| usage.there(index, number(model)).active > 0;
        if !drain && models.iter().any(used) {
            return false;
        }
        for model in models {
            self.serving[number(model)].retain(|other| other.endpoint.node != *node);
        }
        true
    }

    fn begin(&mut self, change: &Change) {
        self.outcome.evictions += change.evict.len();
        let mut took = 2 * SECOND * change.evict.len() as u64;
        if let Some(model) = &change.load {
            self.outcome.loads += 1;
            self.outcome.replicas += usize::from(change.reason == Reason::Replicas);
            // 3 s to start and 2 GiB a second
            took += 3 * SECOND + self.sizes[number(model)] / (2 * GB) * SECOND;
        }
        self.changes.push(change.clone());
        let index = self.changes.len() - 1;
        self.push(self.now + took, Event::Changed { index });
    }
}

/// One day of `turns` under `config`, from a fleet that is empty in the morning.
fn live(size: Size, config: &Arc<Config>, sizes: &[u64], turns: &[Turn]) -> Outcome {
    let mut random = StdRng::seed_from_u64(2);
    let nodes = (0..size.nodes).map(|index| {
        let device = [24, 48, 80][random.random_range(0..3)] * GB;
        let count = [1, 2, 4][random.random_range(0..3)];
        Arc::new(node(&format!("n{index}"), &vec![device; count]))
    });
    let nodes = nodes.collect();
    let mut day = Day::new(nodes, config, sizes, turns);
    let usage = day.usage.clone();
    for (turn, Turn { at, .. }) in turns.iter().enumerate() {
        day.push(*at, Event::Arrives { turn });
    }
    day.push(0, Event::Tick);
    let mut schedule: Schedule<usize> = Schedule::default();
    while let Some(Reverse((at, _, event))) = day.events.pop() {
        day.now = at;
        let is_tick = event == Event::Tick;
        match event {
            Event::Arrives { turn } => {
                let model = turns[turn].model;
                let hit = !day.serving[model].is_empty();
                if config.models[&*format!("m{model}")].priority == DEAR {
                    day.outcome.dear.0 += usize::from(hit);
                    day.outcome.dear.1 += 1;
                }
                if hit {
                    day.outcome.hits += 1;
                    day.begin_request(turn);
                    continue;
                }
                schedule.want(format!("m{model}").as_str().into(), turn);
            }
            Event::Ends { node, model } => {
                day.end_request(node, model);
                continue; // the loop looks at its next tick
            }
            Event::Changed { index } => {
                let change = day.changes[index].clone();
                if !day.carry_out(&change) {
                    day.push(at + SECOND, Event::Changed { index });
                    continue;
                }
                schedule.ended(Ended {
                    node: &change.node,
                    load: change.load.as_deref(),
                    evict: &change.evict,
                    failure: None,
                    now: at,
                });
            }
            Event::Tick => {
                day.poll();
                if at < DAY + HOUR || !day.events.is_empty() {
                    day.push(at + TICK, Event::Tick);
                }
            }
        }
        let nodes = day.nodes.clone();
        let world = World {
            config,
            nodes: &nodes,
            now: at,
            usage: &|node, model| usage.borrow().there(number(node), number(model)),
            leases: &|model| usage.borrow().active(number(model)),
        };
        let began = Instant::now();
        schedule.step(&world, &mut day);
        if is_tick {
            schedule.tidy(&world, &mut day);
        }
        let looks = match is_tick {
            true => &mut day.outcome.ticks,
            false => &mut day.outcome.looks,
        };
        looks.0 += 1;
        looks.1 += began.elapsed();
    }
    let mut waits = day.waits;
    waits.sort_unstable();
    let wait = |share: f64| {
        let index = (waits.len() as f64 * share) as usize;
        waits.get(index).map_or(0.0, |w| *w as f64 / SECOND as f64)
    };
    let outcome = day.outcome;
    Outcome {
        waits: (wait(0.5), wait(0.99)),
        unanswered: turns.len() - outcome.hits - waits.len() - outcome.refused,
        ..outcome
    }
}

/// The priority of the models that are asked for most.
const DEAR: i32 = 2;

/// A world of this size: how large models are, and who asks for them when.
fn world(size: Size) -> (Vec<u64>, Vec<Turn>) {
    let mut random = StdRng::seed_from_u64(1);
    let turns = trace(size, &mut random);
    let sizes = (0..size.models).map(|_| {
        let gigabytes = (2.0f64).powf(random.random_range(1.0..6.6));
        (gigabytes * GB as f64) as u64
    });
    (sizes.collect(), turns)
}

/// Every tenth model, whether it is asked for much or not, is dear and a third is worth something.
fn policies(
    sizes: &[u64],
    strategy: Strategy,
    routing: &str,
    keep_alive: Option<Duration>,
) -> Arc<Config> {
    let models = sizes.iter().enumerate().map(|(index, bytes)| {
        let mut entry = model(Some(*bytes));
        entry.tensor_parallel = if *bytes > 70 * GB { 2 } else { 1 };
        entry.priority = match index % 10 {
            0 => DEAR,
            1..4 => 1,
            _ => 0,
        };
        entry.keep_alive = keep_alive;
        entry.max_replicas = 4;
        (Arc::from(format!("m{index}")), entry)
    });
    let mut config = config(models.collect(), strategy);
    config.eviction.defrag_after_cycles = 20;
    config.replicas = Replicas {
        above: 1,
        after: Duration::from_secs(30),
        retire_after: Duration::from_secs(600),
    };
    config.routing = Routing {
        policy: routing.into(),
        ..config.routing
    };
    Arc::new(config)
}

fn share((part, all): (usize, usize)) -> f64 {
    part as f64 / all.max(1) as f64
}

fn a_second((count, time): (u32, Duration)) -> f64 {
    f64::from(count) / time.as_secs_f64()
}

/// A day of a fleet that has room for half of what is asked for: nobody is left without an answer, and (by the assertions
/// of the simulated fleet) memory is never promised twice, nobody in use leaves, and no model is twice on a node.
#[test]
fn a_day_of_a_small_fleet_answers_everybody_and_policies_do_what_they_are_for() {
    let size = Size {
        nodes: 20,
        models: 200,
        conversations: 1500,
    };
    let (sizes, turns) = world(size);
    let of = |strategy, routing, keep_alive| {
        let config = policies(&sizes, strategy, routing, keep_alive);
        let outcome = live(size, &config, &sizes, &turns);
        let ends = (outcome.refused, outcome.unanswered);
        assert_eq!(ends, (0, 0), "{strategy:?} {routing}: {outcome:?}");
        outcome
    };
    let lru = of(Strategy::Lru, "least_loaded", None);
    assert!(lru.evictions > 100 && lru.hits > turns.len() / 2, "{lru:?}");
    let waits = turns.len() - lru.hits;
    assert!(lru.loads - lru.replicas <= waits, "{lru:?}");
    let dear = of(Strategy::Priority, "least_loaded", None);
    assert!(share(dear.dear) > share(lru.dear), "{dear:?} {lru:?}");
    let idle = of(Strategy::Lru, "least_loaded", Some(Duration::from_secs(60)));
    assert!(
        idle.hits < lru.hits,
        "what leaves early is missed: {idle:?}"
    );
}

/// Where there is room for all, a model is loaded once and stays, and affinity finds the turn before.
#[test]
fn with_room_for_all_each_model_is_loaded_once_and_conversations_stay_where_they_are() {
    let size = Size {
        nodes: 40,
        models: 30,
        conversations: 15_000,
    };
    let (sizes, turns) = world(size);
    let asked: BTreeSet<usize> = turns.iter().map(|turn| turn.model).collect();
    let of = |routing| {
        let config = policies(&sizes, Strategy::Lru, routing, None);
        let outcome = live(size, &config, &sizes, &turns);
        assert_eq!((outcome.refused, outcome.unanswered), (0, 0), "{outcome:?}");
        assert_eq!(outcome.loads - outcome.replicas, asked.len(), "{outcome:?}");
        assert!(
            outcome.picks.0 > 500,
            "hot models have replicas: {outcome:?}"
        );
        share(outcome.home)
    };
    let [least_loaded, prefix_affinity, round_robin] = POLICIES.map(of);
    assert!(prefix_affinity > least_loaded.max(round_robin));
}

/// A look at a large fleet where nothing is new asks for the use of no model, and a model that needs room asks for those
/// of few nodes.
#[test]
fn decisions_look_only_where_they_have_to() {
    const NODES: usize = 1000;
    const EACH: usize = 5;
    let wanted = NODES * EACH;
    let sizes = vec![10 * GB; wanted + 1];
    let config = policies(&sizes, Strategy::Lru, POLICIES[0], None);
    let nodes = (0..NODES).map(|index| {
        let mut node = node(&format!("n{index}"), &[15 * GB]);
        let free = index as u64 % 100 * GB / 10;
        let device = [node.devices[0].id.clone()];
        node.devices[0].free_bytes = free;
        node.models.extend((0..EACH).map(|model| {
            let id = format!("m{}", index * EACH + model);
            let bytes = (15 * GB - free) / EACH as u64;
            status(&id, ModelState::Loaded, &device, bytes)
        }));
        Arc::new(node)
    });
    let nodes: Vec<Arc<NodeView>> = nodes.collect();
    let asked = Cell::new(0);
    let usage = |_: &str, _: &str| {
        asked.set(asked.get() + 1);
        Use::default()
    };
    let world = |now| World {
        config: &config,
        nodes: &nodes,
        now,
        usage: &usage,
        leases: &|_| 0,
    };
    let turns = [Turn {
        at: 0,
        model: wanted,
        conversation: 0,
        before: 0,
    }];
    let mut day = Day::new(nodes.clone(), &config, &sizes, &turns);
    let mut schedule: Schedule<usize> = Schedule::default();
    schedule.step(&world(1), &mut day); // looks at all
    asked.set(0);
    for now in 2..1000 {
        schedule.step(&world(now), &mut day);
    }
    assert_eq!(asked.get(), 0, "nothing is new and nobody wants anything");
    schedule.want(format!("m{wanted}").as_str().into(), 0);
    schedule.step(&world(1000), &mut day);
    let change = day.changes.first().expect("there is room to be made");
    assert_eq!(
        (&*change.node, change.evict.len()),
        ("n99", 1),
        "{change:?}"
    );
    assert!(
        asked.get() <= wanted / 5,
        "{} models were looked at",
        asked.get()
    );
}

#[test]
#[ignore = "takes minutes; `.ci/run --long` runs it"]
fn a_day_of_a_thousand_nodes() {
    let size = Size {
        nodes: 1000,
        models: 10_000,
        conversations: 50_000,
    };
    let (sizes, turns) = world(size);
    println!(
        "{} requests of {} conversations",
        turns.len(),
        size.conversations
    );
    println!(
        "| eviction | routing | hits | of dear ones | cold starts | replicas | evictions | wait p50 | p99 | turns at home | choices/s | decisions/s | tick |"
    );
    println!("|---|---|---|---|---|---|---|---|---|---|---|---|---|");
    let (lru, priority) = (Strategy::Lru, Strategy::Priority);
    let cases = [
        ("lru", lru, POLICIES[0], None),
        ("lru", lru, POLICIES[1], None),
        ("lru", lru, POLICIES[2], None),
        ("priority", priority, POLICIES[0], None),
        ("priority", priority, POLICIES[1], None),
        ("priority", priority, POLICIES[2], None),
        (
            "lru, keep_alive 10m",
            lru,
            POLICIES[0],
            Some(Duration::from_secs(600)),
        ),
    ];
    for (name, strategy, routing, keep_alive) in cases {
        let config = policies(&sizes, strategy, routing, keep_alive);
        let outcome = live(size, &config, &sizes, &turns);
        assert_eq!((outcome.refused, outcome.unanswered), (0, 0), "{outcome:?}");
        println!(
            "| {name} | {routing} | {:.1} % | {:.1} % | {} | {} | {} | {:.1} s | {:.1} s | {:.1} % | {:.0} | {:.0} | {:.0} µs |",
            100.0 * share((outcome.hits, turns.len())),
            100.0 * share(outcome.dear),
            outcome.loads - outcome.replicas,
            outcome.replicas,
            outcome.evictions,
            outcome.waits.0,
            outcome.waits.1,
            100.0 * share(outcome.home),
            a_second(outcome.picks),
            a_second(outcome.looks),
            1e6 / a_second(outcome.ticks),
        );
    }
}
