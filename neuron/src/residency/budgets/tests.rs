//! How memory is shared: the sum, and whole hosts that load, unload and compute in little memory.

use super::*;
use crate::config::Config;
use crate::devices::CPU;
use crate::engine::fake::{FakeModel, Script};
use crate::engine::guide::Guide;
use crate::engine::request::{Event, Events, Request};
use crate::engine::sampler::SamplingParams;
use crate::residency::{Loader, Residency, Shared, held};
use crate::text::output::{Output, OutputOptions};
use crate::text::tokenizer::tests::fixture;
use prometheus::Registry;
use protocol::node::{LoadModel, ModelState, ModelStatus};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::sync::atomic::{AtomicU64, AtomicUsize};
use std::sync::{Mutex, OnceLock, Weak};
use std::time::{Duration, Instant};
use tempfile::TempDir;

impl Budgets {
    /// What every model that serves may take at most, as its engine was told, and its budget.
    pub(super) fn given(&self) -> Vec<(u64, u64)> {
        let given = self.members.values().filter_map(|member| match member {
            Member::Serving { demand, budget, .. } => {
                let bounds = demand.bounds(*budget);
                let states = bounds.max_running as u64 * demand.fixed;
                let blocks = bounds.blocks as u64 * demand.block;
                Some((states + blocks + bounds.snapshot_bytes, *budget))
            }
            Member::Reading { .. } => None,
        });
        given.collect()
    }
}

#[test]
fn what_is_beyond_the_floors_goes_in_equal_parts_to_those_who_want_it() {
    for (total, demands, expected) in [
        (100, &[][..], &[][..]),
        (100, &[(10, 1000)], &[100]),
        (100, &[(10, 60)], &[60]),
        (100, &[(10, 1000), (10, 1000)], &[50, 50]),
        (100, &[(30, 1000), (10, 1000)], &[60, 40]),
        (100, &[(10, 20), (10, 1000)], &[20, 80]),
        (100, &[(10, 1000), (10, 15), (20, 30)], &[55, 15, 30]),
        (100, &[(10, 1000), (10, 15), (20, 1000)], &[38, 15, 47]),
        (100, &[(40, 1000), (60, 1000)], &[40, 60]),
        (90, &[(40, 1000), (60, 1000)], &[40, 60]), // less is of no use to them
        (u64::MAX, &[(1, 7), (2, 9)], &[7, 9]),
    ] {
        assert_eq!(fair(total, demands), expected, "{total} among {demands:?}");
    }
}

#[test]
fn nobody_has_more_than_one_who_wants_more_and_nothing_is_lost() {
    for seed in 0..200 {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let demands: Vec<(u64, u64)> = (0..rng.random_range(1..6))
            .map(|_| {
                let floor = rng.random_range(0..100);
                (floor, floor + rng.random_range(0..500))
            })
            .collect();
        let total = rng.random_range(0..2000);
        let shares = fair(total, &demands);
        let (floors, most) = demands
            .iter()
            .fold((0, 0), |(floors, most), one| (floors + one.0, most + one.1));
        let sum: u64 = shares.iter().sum();
        assert_eq!(sum, total.clamp(floors, most), "seed {seed}");
        let beyond = |at: usize| shares[at] - demands[at].0;
        for (at, (share, (floor, most))) in shares.iter().zip(&demands).enumerate() {
            assert!((floor..=most).contains(&share), "seed {seed}");
            // a whole byte cannot be halved
            let envied = (0..shares.len()).any(|other| beyond(other) > beyond(at) + 1);
            assert!(share == most || !envied, "seed {seed}: {shares:?}");
        }
    }
}

#[test]
fn bounds_take_no_more_than_the_budget_and_always_hold_one_whole_sequence() {
    let model = FakeModel {
        fixed: 100,
        ..FakeModel::new(Script::Hash)
    };
    let limits = Config::default_on_this_host().unwrap().limits;
    let demand = Demand::of(&model, limits, &[CPU.into()]);
    assert_eq!(demand.floor, 4096 + 100);
    let most = 2 * limits.max_running as u64 * demand.floor;
    assert_eq!(demand.most, most);
    for budget in (demand.floor..=demand.most).step_by(7) {
        let bounds = demand.bounds(budget);
        let states = bounds.max_running as u64 * 100 + 16 * bounds.blocks as u64;
        assert!(states + bounds.snapshot_bytes <= budget, "{budget}");
        assert!((1..=limits.max_running).contains(&bounds.max_running));
        assert!(bounds.blocks >= 4096 / BLOCK, "{budget}: {bounds:?}");
    }
    let only_blocks = Demand::of(&FakeModel::new(Script::Hash), limits, &[CPU.into()]);
    assert_eq!(only_blocks.bounds(only_blocks.floor).blocks, 4096 / BLOCK);
    let all = demand.bounds(most);
    assert_eq!(all.max_running, limits.max_running);
    assert_eq!(all.snapshot_bytes, most / SNAPSHOT_SHARE);
    let bounded = Limits {
        state_bytes: Some(5000),
        prefix_cache: false,
        ..limits
    };
    let bounded = Demand::of(&model, bounded, &["cuda:0".into()]);
    assert_eq!(bounded.most, 5000, "no more than was allowed");
    assert_eq!(bounded.bounds(5000).snapshot_bytes, 0, "nothing is kept");
    assert_eq!(bounded.bounds(5000).host_snapshot_bytes, 0);
    let on_host = |limits, device: &str| {
        let demand = Demand::of(&model, limits, &[device.into()]);
        demand.bounds(demand.most).host_snapshot_bytes
    };
    let said = Limits {
        host_snapshot_bytes: Some(7),
        ..limits
    };
    assert_eq!((on_host(said, CPU), on_host(said, "cuda:0")), (0, 7));
    assert!(on_host(limits, "cuda:0") > 0, "a part of what is free");
}

/// Bytes of each model's weights.
const WEIGHTS: u64 = 1000;
/// Bytes of a state that has not begun.
const FIXED: u64 = 64;

/// A host whose memory is a number: weights and states of its models take from it what they say.
struct Host {
    residency: Residency,
    registry: Registry,
    memory: Memory,
    /// Loads that were begun.
    loads: Arc<AtomicUsize>,
    folder: TempDir,
}

#[derive(Clone)]
struct Memory {
    bytes: Arc<AtomicU64>,
    weights: Arc<AtomicU64>,
    engines: Arc<Mutex<Vec<Engine>>>,
}

/// The weights of a model while it is here.
struct Weights(Arc<AtomicU64>);

impl Drop for Weights {
    fn drop(&mut self) {
        self.0.fetch_sub(WEIGHTS, Ordering::SeqCst);
    }
}

impl Memory {
    fn beside_weights(&self) -> u64 {
        self.bytes.load(Ordering::SeqCst) - self.weights.load(Ordering::SeqCst)
    }

    fn free(&self) -> u64 {
        let engines = self.engines.lock().unwrap();
        let held: u64 = engines.iter().map(Engine::held_bytes).sum();
        self.beside_weights() - held
    }
}

fn host(bytes: u64, state_bytes: Option<u64>) -> Host {
    let folder = tempfile::tempdir().unwrap();
    for file in std::fs::read_dir(fixture()).unwrap() {
        let file = file.unwrap();
        std::fs::copy(file.path(), folder.path().join(file.file_name())).unwrap();
    }
    let weights = vec![0; WEIGHTS as usize]; // nobody reads them
    std::fs::write(folder.path().join("model.safetensors"), weights).unwrap();
    let mut config = Config::default_on_this_host().unwrap();
    config.limits.state_bytes = state_bytes;
    let memory = Memory {
        bytes: Arc::new(AtomicU64::new(bytes)),
        weights: Arc::default(),
        engines: Arc::default(),
    };
    let loads = Arc::new(AtomicUsize::new(0));
    let shared: Arc<OnceLock<Weak<Shared>>> = Arc::default();
    let (own, counted, looked_at) = (memory.clone(), loads.clone(), shared.clone());
    let loader: Box<Loader> = Box::new(move |_, options, _, progress| {
        counted.fetch_add(1, Ordering::SeqCst);
        let left = own.beside_weights() - WEIGHTS;
        let shared = looked_at.get().and_then(Weak::upgrade);
        let budgets = shared.unwrap().budgets(&[CPU.into()]);
        let budgets = held(&budgets).given();
        let promised: u64 = budgets.iter().map(|(_, budget)| budget).sum();
        assert!(
            promised <= for_states(left),
            "others have made room for the weights before they are read"
        );
        own.weights.fetch_add(WEIGHTS, Ordering::SeqCst);
        progress(1.0);
        Ok(Box::new(FakeModel {
            context: options.context_length.expect("tests say it"),
            fixed: FIXED,
            dropped: Some(Box::new(Weights(own.weights.clone()))),
            ..FakeModel::new(Script::Hash)
        }))
    });
    let registry = Registry::new();
    let free = {
        let memory = memory.clone();
        Arc::new(move |_: &[String]| Some(memory.free()))
    };
    let residency = Residency::with_loader(&config, &registry, loader, free);
    shared.set(Arc::downgrade(&residency.shared)).unwrap();
    Host {
        residency,
        registry,
        memory,
        loads,
        folder,
    }
}

impl Host {
    fn begin(&self, id: &str, context: u64) {
        let wanted = LoadModel {
            id: id.into(),
            source: self.folder.path().to_str().unwrap().into(),
            context_length: Some(context),
            quant: None,
            tensor_parallel: None,
            devices: Vec::new(),
        };
        self.residency.load(wanted).unwrap();
    }

    async fn load(&self, id: &str, context: u64) -> ModelStatus {
        self.begin(id, context);
        self.settled(id).await
    }

    async fn settled(&self, id: &str) -> ModelStatus {
        let loading = |model: &ModelStatus| model.id == id && model.state == ModelState::Loading;
        self.residency
            .wait_until(|models| !models.iter().any(loading))
            .await;
        if let Ok(served) = self.residency.get(id) {
            self.memory
                .engines
                .lock()
                .unwrap()
                .push(served.engine.clone());
        }
        self.residency.status(id).unwrap()
    }

    async fn unload(&self, id: &str) {
        self.residency.unload(id).unwrap();
        self.residency
            .wait_until(|models| models.iter().all(|model| model.id != id))
            .await;
        let mut engines = self.memory.engines.lock().unwrap();
        engines.retain(|engine| !engine.has_ended());
    }

    /// The budget of each model, in the order of their loads.
    fn budgets(&self) -> Vec<u64> {
        let budgets = self.residency.shared.budgets(&[CPU.into()]);
        let given = held(&budgets).given();
        given.into_iter().map(|(_, budget)| budget).collect()
    }

    /// No more is promised than there is, and nobody holds more than was promised.
    fn check(&self, when: &str) {
        let budgets = self.residency.shared.budgets(&[CPU.into()]);
        let given = held(&budgets).given();
        let promised: u64 = given.iter().map(|(_, budget)| budget).sum();
        let there = for_states(self.memory.beside_weights());
        assert!(promised <= there, "{promised} of {there}: {when}");
        for (most, budget) in given {
            assert!(most <= budget, "{when}");
        }
        let engines = self.memory.engines.lock().unwrap();
        let held: u64 = engines.iter().map(Engine::held_bytes).sum();
        assert!(held <= promised, "{held} of {promised}: {when}");
    }

    /// What the metrics say of the blocks that a model may have.
    fn blocks(&self, id: &str) -> u64 {
        let families = self.registry.gather();
        let family = families.iter().find(|one| one.name() == "neuron_kv_blocks");
        let mut metrics = family.unwrap().get_metric().iter();
        let labelled = metrics.find(|one| one.get_label()[0].value() == id);
        labelled.unwrap().get_gauge().get_value() as u64
    }

    /// Asks a model to go on from a prompt of so many tokens.
    fn submit(&self, id: &str, prompt: std::ops::Range<u32>) -> Events {
        let served = self.residency.get(id).unwrap();
        let request = Request {
            id: "test".into(),
            prompt: prompt.collect(),
            max_tokens: 8,
            sampling: SamplingParams::greedy(),
            ends: Vec::new(),
            guide: Guide::default(),
            score_prompt: false,
            priority: 0,
            user: None,
            places: Vec::new(),
            salt: None,
            output: Output::new(served.text.tokenizer.clone(), OutputOptions::default()),
            arrived: Instant::now(),
            deadline: Instant::now() + Duration::from_secs(3600),
        };
        served.engine.submit(request).unwrap()
    }
}

async fn finished(mut events: Events) {
    loop {
        if let Event::End(end) = events.next().await.expect("every request has an end") {
            assert_eq!(end.unwrap().usage.completion_tokens, 8);
            return;
        }
    }
}

#[tokio::test]
async fn models_share_what_there_is_anew_with_each_load_and_unload() {
    let host = host(100_000, None);
    // less than either of the first two has a use for
    let states = |models: u64| for_states(100_000 - models * WEIGHTS);
    host.load("a", 4096).await;
    assert_eq!(host.budgets(), [states(1)]);
    let alone = host.blocks("a");
    host.load("b", 4096).await;
    assert_eq!(host.budgets(), [states(2) / 2, states(2).div_ceil(2)]);
    assert!(host.blocks("a") < alone, "its engine was told");
    // one that wants little gets it, and the others share the rest
    host.load("c", 64).await;
    let budgets = host.budgets();
    let running = Config::default_on_this_host().unwrap().limits.max_running as u64;
    let little = KEPT * running * (64 + FIXED);
    assert_eq!(budgets[2], little);
    assert_eq!(budgets.iter().sum::<u64>(), states(3));
    assert!(budgets[0].abs_diff(budgets[1]) <= 1, "{budgets:?}");
    host.unload("b").await;
    assert_eq!(host.budgets(), [states(2) - little, little]);
    host.unload("c").await;
    assert_eq!(host.budgets(), [states(1)]);
    // whoever gets more is not waited for, but has been told before it is told to end
    let served = host.residency.get("a").unwrap();
    served.engine.drain(Duration::from_secs(60)).await;
    assert_eq!(host.blocks("a"), alone);
}

#[tokio::test]
async fn the_configured_bound_holds_for_each_model() {
    let host = host(100_000, Some(20_000));
    host.load("a", 4096).await;
    host.load("b", 4096).await;
    assert_eq!(host.budgets(), [20_000, 20_000]);
    let too_long = host.load("c", 1 << 15).await;
    assert_eq!(too_long.state, ModelState::Failed, "{too_long:?}");
}

#[tokio::test]
async fn a_load_that_leaves_others_too_little_is_refused_and_changes_nothing() {
    let host = host(20_000, None);
    let first = host.load("a", 8192).await;
    assert_eq!(first.state, ModelState::Loaded, "{first:?}");
    let before = host.budgets();
    let second = host.load("b", 8192).await;
    assert_eq!(second.state, ModelState::Failed);
    let reason = second.reason.unwrap();
    assert!(reason.contains("unload another model"), "{reason}");
    let (_, fits) = reason.split_once("set context_length to ").unwrap();
    let fits: u64 = fits.split(' ').next().unwrap().parse().unwrap();
    assert_eq!(host.budgets(), before);
    host.unload("b").await;
    let third = host.load("b", fits).await;
    assert_eq!(third.state, ModelState::Loaded, "{third:?}");
    let floor = 8192 + FIXED;
    assert!((floor..floor + 16).contains(&host.budgets()[0]));
    host.check("both have their floors");
    host.unload("b").await;
    assert_eq!(host.budgets(), before);
    // weights that would push the first below its floor are not even read
    host.memory.bytes.fetch_sub(9000, Ordering::SeqCst);
    let loads = host.loads.load(Ordering::SeqCst);
    let refused = host.load("c", 16).await;
    let reason = refused.reason.unwrap();
    assert!(reason.contains("unload another model"), "{reason}");
    assert_eq!(host.loads.load(Ordering::SeqCst), loads);
}

#[tokio::test]
async fn what_a_model_keeps_of_the_past_makes_room_for_another() {
    let host = host(8000, None);
    host.load("a", 512).await;
    for round in 0..20 {
        finished(host.submit("a", round * 10..round * 10 + 300)).await;
    }
    let engine = host.residency.get("a").unwrap().engine.clone();
    let held = engine.held_bytes();
    assert!(held > 4000, "{held}");
    let second = host.load("b", 2000).await;
    assert_eq!(second.state, ModelState::Loaded, "{second:?}");
    assert!(engine.held_bytes() <= host.budgets()[0]);
    assert!(host.budgets()[0] < held);
    host.check("a has let go");
    host.unload("b").await;
    assert!(host.budgets()[0] > held);
}

#[tokio::test]
async fn random_lives_never_take_or_promise_more_than_there_is() {
    let (mut loaded, mut refused, mut answered) = (0, 0, 0);
    for seed in 0..12 {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let bound = rng.random_bool(0.3).then_some(3000);
        let host = host(rng.random_range(4000..20_000), bound);
        let mut here: Vec<(String, u64)> = Vec::new();
        let mut running = Vec::new();
        for round in 0..40 {
            let when = format!("seed {seed}, round {round}");
            match rng.random_range(0..10) {
                0..4 => {
                    // at times two at once
                    let count = rng.random_range(1..3);
                    let both: Vec<_> = (0..count)
                        .map(|n| (format!("m{round}.{n}"), rng.random_range(32..2000)))
                        .collect();
                    for (id, context) in &both {
                        host.begin(id, *context);
                    }
                    for (id, context) in both {
                        let status = host.settled(&id).await;
                        if status.state == ModelState::Loaded {
                            loaded += 1;
                            here.push((id, context));
                        } else {
                            refused += 1;
                            let reason = status.reason.unwrap();
                            assert!(reason.contains("unload another"), "{when}: {reason}");
                            host.unload(&id).await;
                        }
                    }
                }
                4 | 5 if !here.is_empty() => {
                    let (id, _) = here.swap_remove(rng.random_range(0..here.len()));
                    host.unload(&id).await;
                }
                _ => {
                    for (id, context) in &here {
                        let from = rng.random_range(10..200);
                        let length = rng.random_range(1..(*context as u32 - 8).min(250));
                        running.push(host.submit(id, from..from + length));
                    }
                }
            }
            host.check(&when);
            if rng.random_bool(0.3) {
                for events in running.drain(..) {
                    finished(events).await;
                    answered += 1;
                }
                host.check(&when);
            }
        }
        for events in running {
            finished(events).await;
        }
        for (id, _) in here {
            host.unload(&id).await;
        }
        assert!(host.budgets().is_empty(), "seed {seed}");
        assert_eq!(host.memory.weights.load(Ordering::SeqCst), 0);
    }
    assert!(
        loaded > 50 && refused > 20 && answered > 100,
        "{loaded} loads, {refused} refused, {answered} answers"
    );
}
