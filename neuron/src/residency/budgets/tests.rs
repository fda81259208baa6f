//! How memory is shared: the sum, and whole hosts that load, unload and compute in little memory.

use super::*;
use crate::config::Config;
use crate::devices::CPU;
use crate::engine::fake::{FakeModel, Script};
use crate::engine::guide::Guide;
use crate::engine::request::{Event, Events, Request};
use crate::engine::sampler::SamplingParams;
use crate::gpu::emulated::emulated_gpu;
use crate::kernels::rows::Place;
use crate::memory::SequenceState;
use crate::model::{self, Batch, LoadOptions, LogitRows};
use crate::residency::{Hands, Loader, Residency, Shared};
use crate::text::output::{Output, OutputOptions};
use crate::text::tokenizer::tests::fixture;
use prometheus::Registry;
use protocol::node::{LoadModel, ModelState, ModelStatus};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::num::NonZeroU32;
use std::path::Path;
use std::sync::atomic::AtomicUsize;
use std::sync::{Mutex, OnceLock, Weak};
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// What a model that serves was promised.
pub(super) struct Given {
    spread: Spread,
    budget: u64,
    /// What it may take at most, as its engine was told.
    most: u64,
}

impl Budgets {
    /// Of every model that serves, in the order of the loads.
    pub(super) fn given(&self) -> Vec<Given> {
        let given = self.members.values().filter_map(|member| {
            let Life::Serving { demand, budget, .. } = &member.life else {
                return None;
            };
            let bounds = demand.bounds(*budget);
            let states = demand.states(bounds.max_running);
            let blocks = bounds.blocks as u64 * demand.block;
            Some(Given {
                spread: member.spread.clone(),
                budget: *budget,
                most: states + blocks + bounds.snapshot_bytes,
            })
        });
        given.collect()
    }
}

/// Bytes on `device` of what the models were promised.
fn promised(given: &[Given], device: &String) -> u64 {
    let there = given.iter().filter(|one| one.spread.0.contains(device));
    there
        .map(|one| one.budget.div_ceil(one.spread.count()))
        .sum()
}

fn want(floor: u64, most: u64, devices: &[usize]) -> Want {
    Want {
        floor,
        most,
        devices: devices.to_vec(),
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
        let wants = demands
            .iter()
            .map(|(floor, most)| want(*floor, *most, &[0]));
        let shares = fair(&[total], &wants.collect::<Vec<_>>());
        assert_eq!(shares, expected, "{total} among {demands:?}");
    }
}

#[test]
fn a_model_on_several_devices_has_what_the_fullest_of_them_gives_and_leaves_the_rest() {
    let shared = [want(10, 1000, &[0, 1]), want(10, 1000, &[1])];
    assert_eq!(fair(&[100, 100], &shared), [50, 50]);
    assert_eq!(fair(&[30, 100], &shared), [30, 70]);
    assert_eq!(fair(&[100, 30], &shared), [15, 15]);
    // a chain: who is bound on the first device makes room on the second, and so for who is on the third
    let chain = [
        want(0, 1000, &[0]),
        want(0, 1000, &[0, 1]),
        want(0, 1000, &[1, 2]),
        want(0, 1000, &[2]),
    ];
    assert_eq!(fair(&[20, 100, 300], &chain), [10, 10, 90, 210]);
    assert_eq!(fair(&[u64::MAX, 100, 300], &chain), [1000, 50, 50, 250]);
}

#[test]
fn nobody_has_more_than_one_who_wants_more_and_nothing_is_lost() {
    let mut overlapping = 0;
    for seed in 0..500 {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let devices = rng.random_range(1..5);
        let wants: Vec<Want> = (0..rng.random_range(1..8))
            .map(|_| {
                let floor = rng.random_range(0..100);
                let most = floor + rng.random_range(0..500);
                let first = rng.random_range(0..devices);
                let end = rng.random_range(first..devices) + 1;
                want(floor, most, &(first..end).collect::<Vec<_>>())
            })
            .collect();
        let totals: Vec<u64> = (0..devices).map(|_| rng.random_range(0..2000)).collect();
        let shares = fair(&totals, &wants);
        let on = |device: usize| {
            let all = wants.iter().zip(&shares);
            all.filter(move |(want, _)| want.devices.contains(&device))
        };
        for (device, total) in totals.iter().enumerate() {
            let taken: u64 = on(device).map(|(_, share)| share).sum();
            let floors: u64 = on(device).map(|(want, _)| want.floor).sum();
            assert!(
                taken <= floors.max(*total),
                "seed {seed}: {taken} of {total}"
            );
        }
        for (own, share) in wants.iter().zip(&shares) {
            assert!((own.floor..=own.most).contains(share), "seed {seed}");
            overlapping += usize::from(own.devices.len() > 1);
            // a device that is full, where nobody has more beyond the floor; a whole byte cannot be halved
            let bound = |device: &usize| {
                let count = on(*device).count() as u64;
                let taken: u64 = on(*device).map(|(_, share)| share).sum();
                let beyond = share - own.floor;
                taken + count > totals[*device]
                    && on(*device).all(|(want, share)| share - want.floor <= beyond + count)
            };
            let bound = own.devices.iter().any(bound);
            assert!(*share == own.most || bound, "seed {seed}: {shares:?}");
        }
    }
    assert!(overlapping > 500);
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
/// Bytes of a row of a trail.
const TRAIL: u64 = 16;

#[test]
fn trails_take_their_part_of_a_budget_of_as_many_sequences_as_may_have_guesses() {
    let model = FakeModel {
        fixed: 100,
        trail: 25,
        ..FakeModel::new(Script::Hash)
    };
    let limits = Limits {
        draft_tokens: 3,
        max_running: 20,
        ..Config::default_on_this_host().unwrap().limits
    };
    let demand = Demand::of(&model, limits, &["cuda:0".into()]);
    let without = Limits {
        draft_tokens: 0,
        ..limits
    };
    let without = Demand::of(&model, without, &["cuda:0".into()]);
    assert_eq!(demand.floor - without.floor, 4 * 25, "one of four rows");
    assert_eq!(demand.most - without.most, 7 * 100);
    let mut seen = Vec::new();
    for budget in demand.floor..demand.floor + 6000 {
        let bounds = demand.bounds(budget);
        let running = bounds.max_running as u64;
        let trails = running.min(7) * 100;
        let taken = running * 100 + trails + bounds.blocks as u64 * demand.block;
        assert!(taken + bounds.snapshot_bytes <= budget, "{budget}");
        assert!(bounds.blocks >= 4096 / BLOCK, "{budget}: {bounds:?}");
        // one more would not fit beside one of full length
        let further = running * 100 + running.min(6) * 100;
        let left = budget - bounds.snapshot_bytes - demand.floor;
        assert!(running == 20 || further > left, "{budget}: {bounds:?}");
        seen.push(running);
    }
    seen.dedup();
    assert_eq!(seen, (1..=20).collect::<Vec<_>>());
}

#[test]
fn what_is_promised_to_a_model_on_a_device_covers_the_trails_it_holds() {
    let Some(gpu) = emulated_gpu() else { return };
    let options = LoadOptions {
        places: vec![Place::Gpu(gpu.clone())],
        drafts: true,
        ..LoadOptions::cpu()
    };
    let folder = fixture().with_file_name("qwen3_5_vl_tied");
    let model = model::load(&folder, &options, &|_| {}).unwrap();
    let limits = Limits {
        draft_tokens: 3,
        max_running: 2,
        ..Config::default_on_this_host().unwrap().limits
    };
    let demand = Demand::of(&*model, limits, &["cuda:0".into()]);
    let budget = demand.most;
    let bounds = demand.bounds(budget);
    assert_eq!(bounds.max_running, 2);
    model.bound_blocks(bounds.blocks);
    let mut states = [model.new_state(), model.new_state()];
    let taken = || {
        let memory = gpu.driver().memory().unwrap();
        memory.total - memory.free
    };
    let step = |states: &mut [SequenceState; 2], revocable: bool| {
        let mut batch = Batch::default();
        for state in 0..2 {
            match revocable {
                true => batch.push_revocable(state, &[5, 6, 7, 8]),
                false => batch.push(state, &[1, 2, 3, 4], LogitRows::All),
            }
        }
        let mut lent: Vec<_> = states.iter_mut().collect();
        model.forward(&batch, &mut lent).unwrap();
    };
    step(&mut states, false); // all else that a step takes is there after it
    let before = taken();
    step(&mut states, true);
    let trails = taken() - before;
    assert_eq!(trails, 2 * demand.trail, "on the device");
    assert_eq!(trails, model.trails_held(), "as it says");
    for state in &mut states {
        state.keep_rows(2, 4);
    }
    step(&mut states, true);
    assert_eq!(taken() - before, trails, "kept for the next step");
    let blocks = model.pool().held() as u64 * demand.block;
    assert!(2 * demand.fixed + trails + blocks <= demand.states(2) + blocks);
    assert!(demand.states(2) + bounds.blocks as u64 * demand.block <= budget);
    for state in &mut states {
        state.keep_rows(1, 4);
    }
    model.bound_blocks(bounds.blocks);
    assert_eq!((taken(), model.trails_held()), (before, 0), "given back");
}

/// A host whose memory is a number for each device: weights and states of its models take from it what they say.
struct Host {
    residency: Residency,
    registry: Registry,
    memory: Memory,
    /// Loads that were begun.
    loads: Arc<AtomicUsize>,
    folder: TempDir,
}

#[derive(Clone, Default)]
struct Memory {
    devices: Arc<Mutex<BTreeMap<String, Device>>>,
    engines: Arc<Mutex<Vec<(Spread, Engine)>>>,
}

struct Device {
    bytes: u64,
    weights: u64,
}

/// The weights of a model while it is here.
struct Weights {
    memory: Memory,
    spread: Spread,
}

impl Weights {
    fn put(memory: Memory, spread: Spread) -> Self {
        let mut devices = memory.devices.lock().unwrap();
        for id in &spread.0 {
            devices.get_mut(id).unwrap().weights += WEIGHTS / spread.count();
        }
        drop(devices);
        Self { memory, spread }
    }
}

impl Drop for Weights {
    fn drop(&mut self) {
        let mut devices = self.memory.devices.lock().unwrap();
        for id in &self.spread.0 {
            devices.get_mut(id).unwrap().weights -= WEIGHTS / self.spread.count();
        }
    }
}

impl Memory {
    fn ids(&self) -> Vec<String> {
        self.devices.lock().unwrap().keys().cloned().collect()
    }

    fn beside_weights(&self, id: &String) -> u64 {
        let devices = self.devices.lock().unwrap();
        devices[id].bytes - devices[id].weights
    }

    fn held(&self, id: &String) -> u64 {
        let engines = self.engines.lock().unwrap();
        let there = engines.iter().filter(|(spread, _)| spread.0.contains(id));
        let held = there.map(|(spread, engine)| engine.held_bytes().div_ceil(spread.count()));
        held.sum()
    }

    fn free(&self, id: &String) -> u64 {
        self.beside_weights(id) - self.held(id)
    }
}

/// A host with a CPU alone.
fn host(bytes: u64, state_bytes: Option<u64>) -> Host {
    host_of(&[(CPU, bytes)], state_bytes, 0)
}

fn host_of(devices: &[(&str, u64)], state_bytes: Option<u64>, draft_tokens: usize) -> Host {
    let folder = tempfile::tempdir().unwrap();
    for file in std::fs::read_dir(fixture()).unwrap() {
        let file = file.unwrap();
        std::fs::copy(file.path(), folder.path().join(file.file_name())).unwrap();
    }
    std::fs::write(folder.path().join("model.safetensors"), []).unwrap(); // nobody reads it
    let mut config = Config::default_on_this_host().unwrap();
    config.limits.state_bytes = state_bytes;
    config.limits.draft_tokens = draft_tokens;
    let memory = Memory::default();
    for (id, bytes) in devices {
        let (bytes, weights) = (*bytes, 0);
        let mut devices = memory.devices.lock().unwrap();
        devices.insert((*id).into(), Device { bytes, weights });
    }
    let loads = Arc::new(AtomicUsize::new(0));
    let shared: Arc<OnceLock<Weak<Shared>>> = Arc::default();
    let (own, counted, looked_at) = (memory.clone(), loads.clone(), shared.clone());
    let load: Box<Loader> = Box::new(move |source, options, _, progress| {
        counted.fetch_add(1, Ordering::SeqCst);
        let spread = spread_of(source);
        let shared = looked_at.get().and_then(Weak::upgrade);
        let given = shared.unwrap().budgets().given();
        for id in &spread.0 {
            let left = own.beside_weights(id) - WEIGHTS / spread.count();
            assert!(
                promised(&given, id) <= for_states(left),
                "others have made room for the weights before they are read"
            );
        }
        let weights = Weights::put(own.clone(), spread);
        progress(1.0);
        Ok(Box::new(FakeModel {
            context: options.context_length.expect("tests say it"),
            fixed: FIXED,
            trail: TRAIL,
            dropped: Some(Box::new(weights)),
            ..FakeModel::new(Script::Hash)
        }))
    });
    let registry = Registry::new();
    let free = memory.clone();
    let hands = Hands {
        weigh: Box::new(|_, _, ranks| Ok(vec![WEIGHTS / ranks as u64; ranks])),
        open: Box::new(|devices| Ok(vec![Place::Cpu; devices.len()])),
        free: Arc::new(move |devices: &[String]| {
            devices.iter().map(|id| Some(free.free(id))).collect()
        }),
        load,
    };
    let residency = Residency::with_hands(&config, &registry, hands);
    shared.set(Arc::downgrade(&residency.shared)).unwrap();
    Host {
        residency,
        registry,
        memory,
        loads,
        folder,
    }
}

/// Which devices a model is to be on: loaders are not told, and in these tests the name of its folder says it.
fn spread_of(source: &Path) -> Spread {
    let name = source.file_name().unwrap().to_str().unwrap();
    Spread(name.split('+').map(str::to_owned).collect())
}

impl Host {
    fn begin(&self, id: &str, context: u64) {
        self.begin_on(&[CPU.into()], id, context);
    }

    fn begin_on(&self, devices: &[String], id: &str, context: u64) {
        let source = self.folder.path().join(devices.join("+"));
        if !source.exists() {
            std::os::unix::fs::symlink(self.folder.path(), &source).unwrap();
        }
        let wanted = LoadModel {
            id: id.into(),
            source: source.to_str().unwrap().into(),
            context_length: Some(context),
            quant: None,
            tensor_parallel: NonZeroU32::new(devices.len() as u32),
            devices: devices.to_vec(),
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
            let one = (Spread::over(&served.devices), served.engine.clone());
            self.memory.engines.lock().unwrap().push(one);
        }
        self.residency.status(id).unwrap()
    }

    async fn unload(&self, id: &str) {
        self.residency.unload(id).unwrap();
        self.residency
            .wait_until(|models| models.iter().all(|model| model.id != id))
            .await;
        let mut engines = self.memory.engines.lock().unwrap();
        engines.retain(|(_, engine)| !engine.has_ended());
    }

    /// The budget of each model, in the order of their loads.
    fn budgets(&self) -> Vec<u64> {
        let given = self.residency.shared.budgets().given();
        given.into_iter().map(|one| one.budget).collect()
    }

    /// On no device is more promised than there is, and nobody holds more than was promised.
    fn check(&self, when: &str) {
        let given = self.residency.shared.budgets().given();
        for id in self.memory.ids() {
            let promised = promised(&given, &id);
            let there = for_states(self.memory.beside_weights(&id));
            assert!(promised <= there, "{promised} of {there} on {id}: {when}");
            let held = self.memory.held(&id);
            assert!(held <= promised, "{held} of {promised} on {id}: {when}");
        }
        for one in given {
            assert!(one.most <= one.budget, "{when}");
        }
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
    host.memory
        .devices
        .lock()
        .unwrap()
        .get_mut(CPU)
        .unwrap()
        .bytes -= 9000;
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

/// What random lives came to.
#[derive(Debug, Default)]
struct Lived {
    loaded: usize,
    refused: usize,
    answered: usize,
}

/// Models come, go and answer on `host`, each on one of `sets` of its devices.
async fn live(host: &Host, sets: &[Vec<String>], rng: &mut ChaCha8Rng, seed: u64) -> Lived {
    let mut lived = Lived::default();
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
                    let devices = &sets[rng.random_range(0..sets.len())];
                    host.begin_on(devices, id, *context);
                }
                for (id, context) in both {
                    let status = host.settled(&id).await;
                    if status.state == ModelState::Loaded {
                        lived.loaded += 1;
                        here.push((id, context));
                    } else {
                        lived.refused += 1;
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
                lived.answered += 1;
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
    for (id, device) in host.memory.devices.lock().unwrap().iter() {
        assert_eq!(device.weights, 0, "{id}");
    }
    lived
}

#[tokio::test]
async fn random_lives_never_take_or_promise_more_than_there_is() {
    let mut all = Lived::default();
    for seed in 0..12 {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let bound = rng.random_bool(0.3).then_some(3000);
        let host = host(rng.random_range(4000..20_000), bound);
        let lived = live(&host, &[vec![CPU.into()]], &mut rng, seed).await;
        all.loaded += lived.loaded;
        all.refused += lived.refused;
        all.answered += lived.answered;
    }
    let Lived {
        loaded,
        refused,
        answered,
    } = all;
    assert!(loaded > 50 && refused > 20 && answered > 100, "{all:?}");
}

#[tokio::test]
async fn random_lives_on_sets_of_devices_that_overlap_leave_no_device_with_more_promised_than_it_has()
 {
    let ids: Vec<String> = (0..4).map(|ordinal| format!("cuda:{ordinal}")).collect();
    // each alone, neighbours, and all
    let single = ids.chunks(1);
    let sets = single.chain(ids.windows(2)).chain(ids.chunks(4));
    let sets: Vec<Vec<String>> = sets.map(<[String]>::to_vec).collect();
    let mut all = Lived::default();
    for seed in 0..12 {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let devices: Vec<_> = ids
            .iter()
            .map(|id| (id.as_str(), rng.random_range(2000..10_000)))
            .collect();
        let drafts = if seed % 2 == 0 { 3 } else { 0 };
        let host = host_of(&devices, None, drafts);
        let lived = live(&host, &sets, &mut rng, seed).await;
        all.loaded += lived.loaded;
        all.refused += lived.refused;
        all.answered += lived.answered;
    }
    let Lived {
        loaded,
        refused,
        answered,
    } = all;
    assert!(loaded > 50 && refused > 20 && answered > 100, "{all:?}");
}

#[tokio::test]
async fn a_model_on_two_devices_and_one_on_one_of_them_share_that_one() {
    let devices = ["cuda:0", "cuda:1"].map(String::from);
    let host = host_of(&[("cuda:0", 10_000), ("cuda:1", 6000)], None, 0);
    host.begin_on(&devices, "both", 4096);
    assert_eq!(host.settled("both").await.state, ModelState::Loaded);
    let alone = for_states(6000 - WEIGHTS / 2);
    assert_eq!(
        host.budgets(),
        [2 * alone],
        "as much on each as the smaller has"
    );
    host.begin_on(&devices[1..], "second", 512);
    assert_eq!(host.settled("second").await.state, ModelState::Loaded);
    let shared = for_states(6000 - WEIGHTS / 2 - WEIGHTS);
    let floors = [(4096 + FIXED) / 2, 512 + FIXED];
    let beyond = (shared - floors[0] - floors[1]) / 2;
    let expected = [2 * (floors[0] + beyond), floors[1] + beyond];
    for (budget, expected) in host.budgets().iter().zip(expected) {
        assert!(budget.abs_diff(expected) <= 2, "{budget} {expected}");
    }
    host.check("they share the second");
    // one on the first takes what the others have no use for
    host.begin_on(&devices[..1], "first", 512);
    assert_eq!(host.settled("first").await.state, ModelState::Loaded);
    let budgets = host.budgets();
    let first = for_states(10_000 - WEIGHTS / 2 - WEIGHTS) - budgets[0] / 2;
    assert_eq!(budgets[2], first);
    host.check("and the first");
    host.unload("second").await;
    assert!(
        host.budgets()[0] > budgets[0],
        "its part of the second device"
    );
}
