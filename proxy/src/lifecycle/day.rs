//! A day of 1,000 nodes and 10,000 models in a few minutes: hit rates, cold starts and decisions a second, by policy.
//!
//! `cargo test --workspace --bin cortex -- --ignored a_day --nocapture` prints them.

use super::placement::{Change, Use, World};
use super::schedule::{Ended, Hands, Refusal, Schedule};
use super::tests::{config, model, node, status};
use crate::config::{Config, Strategy};
use crate::fleet::NodeView;
use protocol::node::ModelState;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use std::cell::RefCell;
use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

const SECOND: u64 = 1_000_000_000;
const DAY: u64 = 86_400 * SECOND;
const GB: u64 = 1 << 30;

/// How large the world is.
struct Size {
    nodes: usize,
    models: usize,
    requests: usize,
}

/// What happens next.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Event {
    Arrives { model: usize },
    Ends { node: usize, model: usize },
    Changed { index: usize },
    Tick,
}

/// Models of a day and how often each is asked for: the few most popular get most requests (Zipf, exponent 1), more by
/// day than by night.
struct Trace {
    arrivals: Vec<(u64, usize)>,
}

impl Trace {
    fn new(size: &Size, random: &mut StdRng) -> Self {
        let mut sum = 0.0;
        let weights = (1..=size.models).map(|rank| {
            sum += 1.0 / rank as f64;
            sum
        });
        let weights: Vec<f64> = weights.collect();
        let mut arrivals: Vec<(u64, usize)> = (0..size.requests)
            .map(|_| {
                let at = loop {
                    let at = random.random_range(0.0..1.0f64);
                    let busy = 0.6 - 0.4 * (std::f64::consts::TAU * at).cos();
                    if random.random_range(0.0..1.0) < busy {
                        break (at * DAY as f64) as u64;
                    }
                };
                let point = random.random_range(0.0..weights[weights.len() - 1]);
                (at, weights.partition_point(|weight| *weight < point))
            })
            .collect();
        arrivals.sort_unstable();
        Self { arrivals }
    }
}

struct Day {
    now: u64,
    random: StdRng,
    sizes: Vec<u64>,
    /// By model: nodes that serve it and are not being cleared of it.
    serving: Vec<Vec<usize>>,
    /// By model: requests in flight and end of the last one, by node.
    used: Rc<RefCell<Vec<BTreeMap<usize, Use>>>>,
    events: BinaryHeap<Reverse<(u64, usize, Event)>>,
    count: usize,
    changes: Vec<Change>,
    waits: Vec<u64>,
    loads: usize,
    evictions: usize,
    refused: usize,
}

/// The number in `m17` or `n3`.
fn number(name: &str) -> usize {
    name[1..].parse().expect("a name of ours")
}

impl Day {
    fn push(&mut self, at: u64, event: Event) {
        self.count += 1;
        self.events.push(Reverse((at, self.count, event)));
    }

    /// A request of some seconds begins on the node with the fewest.
    fn begin_request(&mut self, model: usize) {
        let mut used = self.used.borrow_mut();
        let used = &mut used[model];
        let load = |node: &&usize| used.get(*node).map_or(0, |there| there.active);
        let node = *self.serving[model].iter().min_by_key(load).expect("served");
        used.entry(node).or_default().active += 1;
        let seconds = 10.0 * (-self.random.random_range(0.001..1.0f64).ln());
        self.count += 1;
        let at = self.now + (seconds * SECOND as f64) as u64;
        let ends = Event::Ends { node, model };
        self.events.push(Reverse((at, self.count, ends)));
    }

    /// The change is over: memory and models are as it wanted them.
    fn carry_out(&mut self, change: &Change, nodes: &mut [NodeView]) {
        let index = number(&change.node);
        let node = &mut nodes[index];
        for gone in &change.evict {
            let at = node.models.iter().position(|held| *held.id == **gone);
            let gone = node.models.swap_remove(at.expect("it was there"));
            for device in node
                .devices
                .iter_mut()
                .filter(|d| gone.devices.contains(&d.id))
            {
                device.free_bytes += gone.memory_bytes / gone.devices.len() as u64;
            }
        }
        if let Some(id) = &change.load {
            let devices: Vec<String> = change.devices.iter().map(ToString::to_string).collect();
            let bytes = self.sizes[number(id)];
            let each = bytes.div_ceil(devices.len() as u64);
            for device in node.devices.iter_mut().filter(|d| devices.contains(&d.id)) {
                device.free_bytes -= each;
            }
            let held = each * devices.len() as u64;
            node.models
                .push(status(id, ModelState::Loaded, &devices, held));
            self.serving[number(id)].push(index);
        }
    }
}

impl Hands<u64> for Day {
    fn serve(&mut self, model: &Arc<str>, since: u64) -> Option<u64> {
        self.waits.push(self.now - since);
        self.begin_request(number(model));
        None
    }

    fn refuse(&mut self, _: &Arc<str>, waiters: Vec<u64>, _: &Refusal) {
        self.refused += waiters.len();
    }

    fn has_left(&self, since: &u64) -> bool {
        self.now - since > 600 * SECOND
    }

    fn leave(&mut self, node: &Arc<str>, models: &[Arc<str>], _: bool) -> bool {
        let node = number(node);
        for model in models {
            self.serving[number(model)].retain(|other| *other != node);
        }
        true
    }

    fn begin(&mut self, change: &Change) {
        self.evictions += change.evict.len();
        let mut took = 2 * SECOND * change.evict.len() as u64;
        if let Some(model) = &change.load {
            self.loads += 1;
            // 3 s to start and 2 GiB a second
            took += 3 * SECOND + self.sizes[number(model)] / (2 * GB) * SECOND;
        }
        self.changes.push(change.clone());
        let index = self.changes.len() - 1;
        self.push(self.now + took, Event::Changed { index });
    }
}

/// What a day came to.
struct Outcome {
    hits: f64,
    loads: usize,
    evictions: usize,
    /// Of those that waited, in seconds: median and 99th percentile.
    waits: (f64, f64),
    refused: usize,
    unanswered: usize,
    decisions: f64,
}

fn live(size: &Size, config: &Config, sizes: Vec<u64>, trace: &Trace) -> Outcome {
    let mut random = StdRng::seed_from_u64(2);
    let nodes = (0..size.nodes).map(|index| {
        let device = [24, 48, 80][random.random_range(0..3)] * GB;
        let count = [1, 2, 4][random.random_range(0..3)];
        node(&format!("n{index}"), &vec![device; count])
    });
    let mut nodes: Vec<NodeView> = nodes.collect();
    let used = Rc::new(RefCell::new(vec![
        BTreeMap::<usize, Use>::new();
        size.models
    ]));
    let mut day = Day {
        now: 0,
        serving: vec![Vec::new(); size.models],
        used: used.clone(),
        sizes,
        random,
        events: BinaryHeap::new(),
        count: 0,
        changes: Vec::new(),
        waits: Vec::new(),
        loads: 0,
        evictions: 0,
        refused: 0,
    };
    for (at, model) in &trace.arrivals {
        day.push(*at, Event::Arrives { model: *model });
    }
    day.push(0, Event::Tick);
    let mut schedule: Schedule<u64> = Schedule::default();
    let (mut hits, mut steps, mut spent) = (0, 0u32, Duration::ZERO);
    while let Some(Reverse((at, _, event))) = day.events.pop() {
        day.now = at;
        match event {
            Event::Arrives { model } if !day.serving[model].is_empty() => {
                hits += 1;
                day.begin_request(model);
                continue;
            }
            Event::Arrives { model } => schedule.want(format!("m{model}").as_str().into(), at),
            Event::Ends { node, model } => {
                let mut used = used.borrow_mut();
                let used = used[model].entry(node).or_default();
                used.active -= 1;
                used.last_used = at;
                continue; // the loop looks at its next tick
            }
            Event::Changed { index } => {
                let change = day.changes[index].clone();
                day.carry_out(&change, &mut nodes);
                schedule.ended(Ended {
                    node: &change.node,
                    load: change.load.as_deref(),
                    evict: &change.evict,
                    failure: None,
                    now: at,
                });
            }
            Event::Tick if at < DAY + 3600 * SECOND => day.push(at + 10 * SECOND, Event::Tick),
            Event::Tick => {}
        }
        let world = World {
            config,
            nodes: &nodes,
            now: at,
            usage: &|node, model| {
                let used = used.borrow();
                let there = used[number(model)].get(&number(node));
                there.copied().unwrap_or_default()
            },
            leases: &|model| {
                let used = used.borrow();
                used[number(model)].values().map(|there| there.active).sum()
            },
        };
        let began = Instant::now();
        schedule.step(&world, &mut day);
        spent += began.elapsed();
        steps += 1;
    }
    day.waits.sort_unstable();
    let wait = |share: f64| {
        let index = (day.waits.len() as f64 * share) as usize;
        day.waits
            .get(index)
            .map_or(0.0, |wait| *wait as f64 / SECOND as f64)
    };
    Outcome {
        hits: f64::from(hits) / trace.arrivals.len() as f64,
        loads: day.loads,
        evictions: day.evictions,
        waits: (wait(0.5), wait(0.99)),
        refused: day.refused,
        unanswered: trace.arrivals.len() - hits as usize - day.waits.len() - day.refused,
        decisions: f64::from(steps) / spent.as_secs_f64(),
    }
}

/// The same day under each policy.
fn days(size: &Size) -> Vec<(&'static str, Outcome)> {
    let mut random = StdRng::seed_from_u64(1);
    let trace = Trace::new(size, &mut random);
    let sizes: Vec<u64> = (0..size.models)
        .map(|_| ((2.0f64).powf(random.random_range(1.0..6.6)) * GB as f64) as u64)
        .collect();
    let of = |strategy, keep_alive: Option<Duration>| {
        let models = sizes.iter().enumerate().map(|(rank, bytes)| {
            let mut entry = model(Some(*bytes));
            entry.tensor_parallel = if *bytes > 70 * GB { 2 } else { 1 };
            entry.priority = match rank * 10 / size.models {
                0 => 2,
                1..4 => 1,
                _ => 0,
            };
            entry.keep_alive = keep_alive;
            (Arc::from(format!("m{rank}")), entry)
        });
        let mut config = config(models.collect(), strategy);
        config.eviction.defrag_after_cycles = 0;
        config
    };
    let policies = [
        ("lru", of(Strategy::Lru, None)),
        ("priority", of(Strategy::Priority, None)),
        (
            "lru, keep_alive 10m",
            of(Strategy::Lru, Some(Duration::from_secs(600))),
        ),
    ];
    let live = |(name, config)| (name, live(size, &config, sizes.clone(), &trace));
    policies.into_iter().map(live).collect()
}

#[test]
fn an_hour_of_a_small_fleet_answers_everybody() {
    let size = Size {
        nodes: 20,
        models: 100,
        requests: 1500,
    };
    for (name, outcome) in days(&size) {
        assert_eq!((outcome.refused, outcome.unanswered), (0, 0), "{name}");
        assert!(outcome.hits > 0.1 && outcome.loads > 50, "{name}");
    }
}

#[test]
#[ignore = "takes many minutes; `.ci/run --long` runs it"]
fn a_day_of_a_thousand_nodes() {
    let size = Size {
        nodes: 1000,
        models: 10_000,
        requests: 100_000,
    };
    println!(
        "| policy | hits | cold starts | evictions | wait p50 | wait p99 | refused | unanswered | looks a second |"
    );
    println!("|---|---|---|---|---|---|---|---|---|");
    for (name, outcome) in days(&size) {
        println!(
            "| {name} | {:.1} % | {} | {} | {:.1} s | {:.1} s | {} | {} | {:.0} |",
            outcome.hits * 100.0,
            outcome.loads,
            outcome.evictions,
            outcome.waits.0,
            outcome.waits.1,
            outcome.refused,
            outcome.unanswered,
            outcome.decisions
        );
    }
}
