//! Real models through the engine: an answer does not depend on who else is served, on what was kept of others, on how a
//! prompt was cut, or on having been set back.

#![allow(missing_docs, clippy::unwrap_used)]

use candle_core::{Device, safetensors};
use neuron::engine::admission::AdmissionLimits;
use neuron::engine::guide::Guide;
use neuron::engine::metrics::EngineMetrics;
use neuron::engine::request::{Event, Events, Request};
use neuron::engine::sampler::{SamplingFields, SamplingParams};
use neuron::engine::scheduler::Bounds;
use neuron::engine::{Engine, EngineConfig};
use neuron::model::{self, CausalLm, LoadOptions};
use neuron::parallel;
use neuron::text::output::{Delta, Output, OutputOptions};
use neuron::text::tokenizer::Tokenizer;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

const FIXTURES: [&str; 6] = [
    "qwen3_5_text",
    "qwen3_5_vl_tied",
    "qwen3_5_moe_vl",
    "qwen3_next_moe",
    "qwen3_next_dense",
    "demo",
];
/// Tokens of every answer.
const ANSWER: usize = 12;
/// Of log probabilities.
const TOLERANCE: f32 = 1e-3;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn fixture(name: &str) -> PathBuf {
    root().join("tests/fixtures/models").join(name)
}

fn load(name: &str, drafts: bool, ranks: usize) -> Box<dyn CausalLm> {
    let folder = match name {
        "demo" => root().join("neuron/demo"),
        name => fixture(name),
    };
    let options = LoadOptions {
        drafts,
        ..LoadOptions::cpu()
    };
    parallel::load(&folder, &options, ranks, &|_| {}).unwrap()
}

/// Prompts of several conversations that begin alike, the later turns of some of them, and some twice.
fn prompts(name: &str) -> Vec<Vec<u32>> {
    let golden = safetensors::load(fixture(name).join("golden.safetensors"), &Device::Cpu).unwrap();
    let ids = golden
        .iter()
        .filter(|(key, _)| key.ends_with("/input_ids"))
        .map(|(_, ids)| ids.to_dtype(candle_core::DType::U32).unwrap())
        .max_by_key(|ids| ids.dim(0).unwrap())
        .unwrap();
    let ids: Vec<u32> = ids.to_vec1().unwrap();
    let long: Vec<u32> = ids.iter().cycle().take(90).copied().collect();
    let part = |from: usize, to: usize| long[from..to].to_vec();
    vec![
        part(0, 65),
        part(0, 90),
        [part(0, 65), part(3, 20)].concat(),
        part(0, 65),
        [part(0, 40), part(50, 80)].concat(),
        [part(0, 40), part(10, 55)].concat(),
        part(20, 21),
        [part(0, 65), part(3, 20), part(30, 50)].concat(),
    ]
}

struct Serving {
    max_running: usize,
    prefill_tokens: usize,
    /// Blocks of keys and values, if not more than enough.
    blocks: Option<usize>,
    /// Saved states, so many of them.
    snapshots: u64,
    /// Tokens guessed ahead.
    drafts: usize,
    ranks: usize,
}

impl Serving {
    /// Where a saved state takes so many bytes.
    fn bounds(&self, saved: u64) -> Bounds {
        Bounds {
            max_running: self.max_running,
            prefill_tokens: self.prefill_tokens,
            blocks: self.blocks.unwrap_or(10_000),
            drafts: self.drafts,
            snapshot_bytes: self.snapshots * saved,
            host_snapshot_bytes: 0,
        }
    }
}

/// Starts the model as `serving` says, runs `order` of the prompts one after another or all at once, and gives the answers
/// in the order of the prompts: each token with its log probability.
async fn answers(
    name: &str,
    serving: &Serving,
    order: &[usize],
    at_once: bool,
    temperature: f64,
) -> (Vec<Vec<(u32, f32)>>, u64) {
    let model = load(name, serving.drafts > 0, serving.ranks);
    let engine = start(model, serving, f64::INFINITY);
    let tokenizer = tokenizer();
    let prompts = prompts(name);
    let submit = |index: usize| {
        let request = Request {
            places: vec![40, 62],
            ..request(
                &tokenizer,
                prompts[index].clone(),
                ANSWER,
                sampling(temperature, index as u64),
            )
        };
        engine.submit(request).unwrap()
    };
    let mut all = vec![Vec::new(); prompts.len()];
    let mut cached = 0;
    if at_once {
        let events: Vec<_> = order.iter().map(|index| submit(*index)).collect();
        for (index, events) in order.iter().zip(events) {
            all[*index] = read(events, &mut cached).await;
        }
    } else {
        for index in order {
            all[*index] = read(submit(*index), &mut cached).await;
        }
    }
    engine.drain(Duration::from_secs(60)).await;
    (all, cached)
}

fn start(model: Box<dyn CausalLm>, serving: &Serving, stretch: f64) -> Engine {
    let config = EngineConfig {
        id: "test".into(),
        vocab: 400,
        admission: AdmissionLimits {
            max_waiting: 100,
            max_prompt_tokens: 100_000,
        },
        stretch,
        bounds: serving.bounds(model.state_bytes(0)),
        stall_limit: Duration::from_secs(3600),
    };
    let metrics = EngineMetrics::register(&prometheus::Registry::new()).of("test");
    Engine::start(model, config, metrics).unwrap()
}

fn tokenizer() -> Arc<Tokenizer> {
    let file = fixture("qwen3_5_text").join("tokenizer.json");
    Arc::new(Tokenizer::load(&file).unwrap())
}

fn request(
    tokenizer: &Arc<Tokenizer>,
    prompt: Vec<u32>,
    max_tokens: usize,
    sampling: SamplingParams,
) -> Request {
    Request {
        id: "test".into(),
        prompt,
        max_tokens,
        sampling,
        ends: Vec::new(),
        guide: Guide::default(),
        score_prompt: false,
        priority: 0,
        user: None,
        places: Vec::new(),
        salt: None,
        output: Output::new(tokenizer.clone(), OutputOptions::default()),
        arrived: Instant::now(),
        deadline: Instant::now() + Duration::from_secs(3600),
    }
}

fn sampling(temperature: f64, seed: u64) -> SamplingParams {
    let fields = SamplingFields {
        temperature,
        seed,
        logprobs: Some(0),
        ..SamplingFields::default()
    };
    fields.checked().unwrap()
}

async fn read(mut events: Events, cached: &mut u64) -> Vec<(u32, f32)> {
    let mut tokens = Vec::new();
    while let Some(event) = events.next().await {
        match event {
            Event::Delta(Delta::Scored(scored)) => tokens.push((scored.token, scored.logprob)),
            Event::Delta(_) => {}
            Event::End(end) => *cached += end.unwrap().usage.cached_tokens(),
        }
    }
    assert_eq!(tokens.len(), ANSWER);
    tokens
}

fn assert_equal(found: &[Vec<(u32, f32)>], expected: &[Vec<(u32, f32)>], what: &str) {
    for (prompt, (found, expected)) in found.iter().zip(expected).enumerate() {
        for (at, (found, expected)) in found.iter().zip(expected).enumerate() {
            assert!(
                found.0 == expected.0 && (found.1 - expected.1).abs() <= TOLERANCE,
                "{what}: token {at} of prompt {prompt} is {found:?}, not {expected:?}"
            );
        }
    }
}

const FORWARDS: [usize; 8] = [0, 1, 2, 3, 4, 5, 6, 7];
const OTHERWISE: [usize; 8] = [7, 5, 3, 1, 6, 4, 2, 0];

#[tokio::test]
async fn an_answer_is_the_same_alone_and_in_company_with_and_without_what_others_left() {
    for name in FIXTURES {
        for temperature in [0.0, 0.8] {
            let alone = Serving {
                max_running: 1,
                prefill_tokens: 1000,
                blocks: None,
                snapshots: 0,
                drafts: 0,
                ranks: 1,
            };
            let (expected, cached) = answers(name, &alone, &FORWARDS, false, temperature).await;
            assert_eq!(cached, 0);
            for (what, order, at_once, serving) in [
                ("in turn, warm", FORWARDS, false, (8, 1000, None, 100, 0)),
                ("otherwise, warm", OTHERWISE, false, (8, 9, None, 100, 0)),
                ("few states kept", FORWARDS, false, (8, 64, None, 2, 0)),
                ("at once", FORWARDS, true, (8, 7, None, 100, 0)),
                (
                    "at once, nothing kept",
                    OTHERWISE,
                    true,
                    (3, 33, None, 0, 0),
                ),
                ("with little room", OTHERWISE, true, (8, 16, Some(14), 5, 0)),
                ("guessing one", FORWARDS, false, (8, 1000, None, 0, 1)),
                (
                    "guessing three, warm",
                    OTHERWISE,
                    false,
                    (8, 9, None, 100, 3),
                ),
                (
                    "guessing two, at once",
                    FORWARDS,
                    true,
                    (8, 16, Some(18), 5, 2),
                ),
            ] {
                let (max_running, prefill_tokens, blocks, snapshots, drafts) = serving;
                let serving = Serving {
                    max_running,
                    prefill_tokens,
                    blocks,
                    snapshots,
                    drafts,
                    ranks: 1,
                };
                let (found, cached) = answers(name, &serving, &order, at_once, temperature).await;
                let what = format!("{name} at temperature {temperature}, {what}");
                assert_equal(&found, &expected, &what);
                assert_eq!(
                    cached > 0,
                    snapshots > 0,
                    "{what}: {cached} tokens were cached"
                );
            }
        }
    }
}

#[tokio::test]
async fn an_answer_does_not_depend_on_the_number_of_ranks() {
    let worlds = [
        ("qwen3_5_text", &[2, 4][..]),
        ("qwen3_5_vl_tied", &[2]),
        ("qwen3_5_moe_vl", &[2]),
        ("qwen3_next_moe", &[2, 4]),
        ("qwen3_next_dense", &[2]),
        ("demo", &[2, 4]),
    ];
    for (name, sizes) in worlds {
        let serving = |ranks, blocks, snapshots, drafts| Serving {
            max_running: 8,
            prefill_tokens: 16,
            blocks,
            snapshots,
            drafts,
            ranks,
        };
        let alone = serving(1, None, 0, 0);
        let (expected, _) = answers(name, &alone, &FORWARDS, false, 0.8).await;
        for &ranks in sizes {
            for (what, order, at_once, serving) in [
                ("in turn", FORWARDS, false, serving(ranks, None, 0, 0)),
                ("warm", OTHERWISE, false, serving(ranks, None, 100, 0)),
                (
                    "with little room",
                    OTHERWISE,
                    true,
                    serving(ranks, Some(14), 5, 0),
                ),
                ("guessing", FORWARDS, true, serving(ranks, Some(18), 5, 2)),
            ] {
                let (found, cached) = answers(name, &serving, &order, at_once, 0.8).await;
                let what = format!("{name} on {ranks} ranks, {what}");
                assert_equal(&found, &expected, &what);
                assert_eq!(cached > 0, serving.snapshots > 0, "{what}");
            }
        }
    }
}

#[tokio::test]
async fn bounds_that_change_all_the_time_change_no_answer() {
    for (name, ranks, drafts) in [
        ("qwen3_5_text", 1, 0),
        ("qwen3_5_text", 2, 2),
        ("qwen3_next_moe", 2, 0),
        ("qwen3_next_dense", 1, 2),
    ] {
        let serving = |max_running, blocks, snapshots| Serving {
            max_running,
            prefill_tokens: 16,
            blocks,
            snapshots,
            drafts,
            ranks,
        };
        let alone = Serving {
            drafts: 0,
            ranks: 1,
            ..serving(1, None, 0)
        };
        let (expected, _) = answers(name, &alone, &FORWARDS, false, 0.8).await;
        let changes = [
            serving(8, Some(40), 100),
            serving(8, Some(12), 2), // one sequence has up to nine
            serving(3, Some(60), 0),
            serving(8, Some(25), 1),
            serving(1, None, 5),
        ];
        let model = load(name, drafts > 0, ranks);
        let (pool, saved) = (model.pool().clone(), model.state_bytes(0));
        let engine = start(model, &serving(8, None, 100), f64::INFINITY);
        let tokenizer = tokenizer();
        let submit = |(index, prompt): (usize, Vec<u32>)| {
            let sampling = sampling(0.8, index as u64);
            let request = Request {
                places: vec![40, 62],
                ..request(&tokenizer, prompt, ANSWER, sampling)
            };
            engine.submit(request).unwrap()
        };
        let all: Vec<Events> = prompts(name).into_iter().enumerate().map(submit).collect();
        let mut changes = changes.iter().cycle();
        let mut found = Vec::new();
        for mut events in all {
            let mut tokens = Vec::new();
            while let Some(event) = events.next().await {
                match event {
                    Event::Delta(Delta::Scored(scored)) => {
                        tokens.push((scored.token, scored.logprob));
                        let bounds = changes.next().expect("it repeats").bounds(saved);
                        engine.set_bounds(bounds).recv().unwrap_err();
                        assert!(pool.held() <= bounds.blocks, "{name}");
                    }
                    Event::Delta(_) => {}
                    Event::End(end) => drop(end.unwrap()),
                }
            }
            found.push(tokens);
        }
        engine.drain(Duration::from_secs(60)).await;
        assert_equal(&found, &expected, &format!("{name} on {ranks} ranks"));
        assert_eq!(pool.out(), 0, "{name}");
    }
}

/// How much longer the readers of eight streams wait for a token while a prompt of 8,192 tokens comes in.
#[tokio::test]
#[ignore = "wants a machine that does nothing else; `.ci/run --long` runs it"]
async fn a_long_prompt_hardly_delays_those_that_write() {
    const LONG: usize = 8192;
    /// Tokens of each stream before the prompt comes.
    const ALONE: usize = 500;
    let folder = tempfile::tempdir().unwrap();
    for file in std::fs::read_dir(root().join("neuron/demo")).unwrap() {
        let file = file.unwrap();
        std::fs::copy(file.path(), folder.path().join(file.file_name())).unwrap();
    }
    let config = folder.path().join("config.json");
    let text = std::fs::read_to_string(&config).unwrap();
    let mut wider: serde_json::Value = serde_json::from_str(&text).unwrap();
    wider["max_position_embeddings"] = (2 * LONG).into();
    std::fs::write(&config, wider.to_string()).unwrap();
    let model = model::load(folder.path(), &LoadOptions::cpu(), &|_| {}).unwrap();
    let serving = Serving {
        max_running: 16,
        prefill_tokens: 128,
        blocks: Some(100_000),
        snapshots: 0,
        drafts: 0,
        ranks: 1,
    };
    let engine = start(model, &serving, 2.5);
    let tokenizer = tokenizer();
    let submit = |prompt, max_tokens| {
        let request = request(&tokenizer, prompt, max_tokens, sampling(1.0, 1));
        engine.submit(request).unwrap()
    };
    let (writes, mut written) = tokio::sync::mpsc::channel(8);
    let streams = (0..8u32).map(|index| {
        let mut events = submit(vec![index + 5; 20], 4096);
        let writes = writes.clone();
        tokio::spawn(async move {
            let mut times = Vec::new();
            while let Some(event) = events.next().await {
                if matches!(event, Event::Delta(Delta::Scored(_))) {
                    times.push(Instant::now());
                    if times.len() == ALONE {
                        writes.send(()).await.unwrap();
                    }
                }
            }
            times
        })
    });
    let streams: Vec<_> = streams.collect();
    for _ in &streams {
        written.recv().await.unwrap();
    }
    let came = Instant::now();
    let long = (0..LONG as u32).map(|at| 5 + at % 300).collect();
    let mut long = submit(long, 1);
    while long.next().await.is_some() {}
    let read = Instant::now();
    drop(long);
    let (mut before, mut during) = (Vec::new(), Vec::new());
    for stream in streams {
        for pair in stream.await.unwrap().windows(2) {
            let gap = pair[1] - pair[0];
            if pair[1] < came {
                before.push(gap);
            } else if pair[0] > came && pair[1] < read {
                during.push(gap);
            }
        }
    }
    let quantiles = |gaps: &mut Vec<Duration>| {
        gaps.sort();
        [50, 90, 99].map(|percent| gaps[gaps.len() * percent / 100])
    };
    let (before, during) = (quantiles(&mut before), quantiles(&mut during));
    println!(
        "p50, p90, p99 between two tokens: {before:?} before, {during:?} beside {LONG} tokens read in {:?}",
        read - came
    );
    assert!(during[2] < 3 * before[2]);
}
