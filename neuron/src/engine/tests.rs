//! The engine with a fake model: what every request may rely on.

use super::fake::{FakeModel, Gate, Script};
use super::guide::{Guide, Scope, ThinkingBudget};
use super::metrics::EngineMetrics;
use super::request::{EngineError, Event, Events, Finish, Request};
use super::sampler::{SamplingFields, SamplingParams};
use super::scheduler::Bounds;
use super::{AdmissionLimits, Engine, EngineConfig, Rejected};
use crate::model::CausalLm;
use crate::parallel::fake::{Doomed, Fate, doomed_behind};
use crate::text::grammar::{Grammars, Shape};
use crate::text::output::{Delta, Output, OutputOptions};
use crate::text::tokenizer::Tokenizer;
use crate::text::tokenizer::tests::tiny;
use crate::text::tools::ToolForm;
use protocol::chat::FinishReason;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

const EOS: u32 = 481;

struct Bench {
    engine: Engine,
    tokenizer: Arc<Tokenizer>,
}

fn config() -> EngineConfig {
    EngineConfig {
        id: "m".into(),
        vocab: 512,
        admission: AdmissionLimits {
            max_waiting: 100,
            max_prompt_tokens: 10_000,
        },
        stretch: f64::INFINITY,
        bounds: Bounds {
            max_running: 8,
            prefill_tokens: 16,
            blocks: 1000,
            drafts: 0,
            snapshot_bytes: 1 << 20,
            host_snapshot_bytes: 0,
        },
        stall_limit: Duration::from_secs(3600),
    }
}

impl EngineConfig {
    fn with_nothing_kept(mut self) -> Self {
        self.bounds.snapshot_bytes = 0;
        self
    }
}

fn bench_with(model: FakeModel, config: EngineConfig) -> Bench {
    bench_of(Box::new(model), config)
}

fn bench_of(model: Box<dyn CausalLm>, config: EngineConfig) -> Bench {
    let metrics = EngineMetrics::register(&prometheus::Registry::new()).of("m");
    Bench {
        engine: Engine::start(model, config, metrics).unwrap(),
        tokenizer: tiny(),
    }
}

fn bench(script: Script) -> Bench {
    bench_with(FakeModel::new(script), config())
}

impl Bench {
    fn request(&self, prompt: &str, max_tokens: usize, sampling: SamplingParams) -> Request {
        self.request_with(prompt, max_tokens, sampling, &[])
    }

    fn request_with(
        &self,
        prompt: &str,
        max_tokens: usize,
        sampling: SamplingParams,
        stop: &[&str],
    ) -> Request {
        let options = OutputOptions {
            stop: stop.iter().map(ToString::to_string).collect(),
            ..OutputOptions::default()
        };
        Request {
            id: "test".into(),
            prompt: self.tokenizer.encode(prompt).unwrap(),
            max_tokens,
            sampling,
            ends: vec![EOS, 479],
            guide: Guide::default(),
            score_prompt: false,
            priority: 0,
            user: None,
            places: Vec::new(),
            salt: None,
            output: Output::new(self.tokenizer.clone(), options),
            arrived: Instant::now(),
            deadline: Instant::now() + Duration::from_secs(3600),
        }
    }

    fn submit(&self, prompt: &str, max_tokens: usize, sampling: SamplingParams) -> Events {
        self.engine
            .submit(self.request(prompt, max_tokens, sampling))
            .unwrap()
    }
}

/// Everything a request gave: its text and its one end.
async fn collect(events: &mut Events) -> (String, Result<Finish, EngineError>) {
    let (mut text, mut end) = (String::new(), None);
    while let Some(event) = events.next().await {
        assert!(end.is_none(), "an event after the end: {event:?}");
        match event {
            Event::Delta(Delta::Content(piece)) => text.push_str(&piece),
            Event::Delta(other) => panic!("unexpected {other:?}"),
            Event::End(given) => end = Some(given),
        }
    }
    (text, end.expect("every request has an end"))
}

async fn text_of(mut events: Events) -> String {
    let (text, end) = collect(&mut events).await;
    end.unwrap();
    text
}

fn warm(seed: u64) -> SamplingParams {
    let fields = SamplingFields {
        top_p: 0.95,
        seed,
        ..SamplingFields::default()
    };
    fields.checked().unwrap()
}

#[tokio::test]
async fn a_request_gets_its_text_and_one_end_with_true_counts() {
    let bench = bench(Script::Hash);
    let mut events = bench.submit("Hello, world!", 20, SamplingParams::greedy());
    let (text, end) = collect(&mut events).await;
    let finish = end.unwrap();
    assert!(!text.is_empty());
    assert_eq!(finish.reason, FinishReason::Length);
    assert_eq!(finish.usage.prompt_tokens, 10);
    assert_eq!(finish.usage.completion_tokens, 20);
    assert_eq!(finish.usage.total_tokens, 30);
    assert!(events.next().await.is_none(), "nothing comes after the end");
    assert_eq!(bench.engine.in_flight(), 0);
}

#[tokio::test]
async fn a_request_in_a_batch_gets_what_it_gets_alone() {
    let prompts = [
        "one",
        "a much longer prompt than the others, over several steps of prefill",
        "x y z",
        "no",
    ];
    let mut alone = Vec::new();
    for (seed, prompt) in prompts.iter().enumerate() {
        let bench = bench(Script::Hash);
        alone.push(text_of(bench.submit(prompt, 30, warm(seed as u64))).await);
    }
    let bench = bench(Script::Hash);
    let together: Vec<Events> = prompts
        .iter()
        .enumerate()
        .map(|(seed, prompt)| bench.submit(prompt, 30, warm(seed as u64)))
        .collect();
    for (events, alone) in together.into_iter().zip(alone) {
        assert_eq!(text_of(events).await, alone);
    }
}

#[tokio::test]
async fn being_set_back_changes_no_text() {
    let reference = bench(Script::Hash);
    let mut tight = config();
    tight.bounds.blocks = 10; // of 16 tokens
    let model = FakeModel::new(Script::Hash);
    let steps = model.steps.clone();
    let tight = bench_with(model, tight);
    let both = [
        tight.submit("a b c", 100, warm(1)),
        tight.submit("d e f", 100, warm(2)),
    ];
    let prompts = ["a b c", "d e f"];
    for (seed, (events, prompt)) in both.into_iter().zip(prompts).enumerate() {
        let alone = text_of(reference.submit(prompt, 100, warm(seed as u64 + 1))).await;
        assert_eq!(text_of(events).await, alone);
    }
    assert!(
        steps.load(Ordering::SeqCst) > 110,
        "the second was set back"
    );
}

#[tokio::test]
async fn bounds_that_change_under_running_sequences_change_no_text() {
    let prompts: Vec<Vec<u32>> = (0..6)
        .map(|n| (10..40 + 7 * n).map(|token| token + n).collect())
        .collect();
    let request = |bench: &Bench, n: usize| {
        // each token is told, also those whose text is still to come
        let fields = SamplingFields {
            seed: n as u64,
            logprobs: Some(0),
            ..SamplingFields::default()
        };
        Request {
            prompt: prompts[n].clone(),
            places: vec![20],
            ..bench.request("x", 300, fields.checked().unwrap())
        }
    };
    let tokens = async |mut events: Events| {
        let mut tokens = Vec::new();
        while let Some(event) = events.next().await {
            match event {
                Event::Delta(Delta::Scored(scored)) => tokens.push(scored.token),
                Event::Delta(_) => {}
                Event::End(end) => drop(end.unwrap()),
            }
        }
        tokens
    };
    let reference = bench(Script::Hash);
    let mut alone = Vec::new();
    for n in 0..prompts.len() {
        let events = reference.engine.submit(request(&reference, n)).unwrap();
        alone.push(tokens(events).await);
    }
    let tight = Bounds {
        blocks: 26, // of 16 tokens; one sequence takes up to 24
        snapshot_bytes: 200,
        ..config().bounds
    };
    let single = Bounds {
        max_running: 1,
        ..config().bounds
    };
    let keeps_nothing = Bounds {
        snapshot_bytes: 0,
        ..tight
    };
    for (drafts, smaller) in [0, 3]
        .into_iter()
        .flat_map(|drafts| [tight, single, keeps_nothing].map(|smaller| (drafts, smaller)))
    {
        let with_drafts = |bounds: Bounds| Bounds { drafts, ..bounds };
        let model = FakeModel {
            fixed: 8,
            ..FakeModel::new(Script::Hash)
        };
        let pool = model.pool.clone();
        let metrics = EngineMetrics::register(&prometheus::Registry::new()).of("m");
        let wide = EngineConfig {
            bounds: with_drafts(config().bounds),
            ..config()
        };
        let bench = Bench {
            engine: Engine::start(Box::new(model), wide, metrics.clone()).unwrap(),
            tokenizer: tiny(),
        };
        run(&bench, of_tokens(&bench, &[400; 90], &[40])).await;
        assert!(metrics.snapshot_bytes.get() > 200, "something is kept");
        let mut all: Vec<Events> = (0..prompts.len())
            .map(|n| bench.engine.submit(request(&bench, n)).unwrap())
            .collect();
        let Some(Event::Delta(Delta::Scored(begun))) = all[5].next().await else {
            panic!("the last writes, and none has ended, whose readers take nothing");
        };
        // they go on until their readers are far enough behind, and hold more by then than may be held
        while metrics.blocks_in_sequences.get() <= tight.blocks as i64 {
            tokio::task::yield_now().await;
        }
        let within = bench.engine.set_bounds(with_drafts(smaller));
        within.recv().unwrap_err();
        assert!(pool.held() <= smaller.blocks, "{} blocks", pool.held());
        assert!(metrics.snapshot_bytes.get() as u64 <= smaller.snapshot_bytes);
        assert!(metrics.running.get() <= smaller.max_running as i64);
        assert_eq!(metrics.blocks.get(), smaller.blocks as i64);
        assert!(metrics.preemptions.get() > 0, "some were set back");
        let most = 16 * smaller.blocks + 8 * smaller.max_running;
        assert!(bench.engine.held_bytes() <= most as u64 + smaller.snapshot_bytes);
        let last = all.split_off(2);
        for (n, events) in all.into_iter().enumerate() {
            assert_eq!(tokens(events).await, alone[n], "answer {n}");
        }
        assert!(pool.held() <= smaller.blocks, "{} blocks", pool.held());
        // and more again
        let within = bench.engine.set_bounds(with_drafts(config().bounds));
        within.recv().unwrap_err();
        assert_eq!(pool.capacity(), 1000);
        for (n, events) in (2..).zip(last) {
            let read = if n == 5 {
                vec![begun.token]
            } else {
                Vec::new()
            };
            let found = [read, tokens(events).await].concat();
            assert_eq!(found, alone[n], "answer {n}");
        }
        bench.engine.drain(Duration::from_secs(60)).await;
        assert!(bench.engine.has_ended());
        assert_eq!((pool.out(), bench.engine.held_bytes()), (0, 0));
        let late = bench.engine.set_bounds(with_drafts(smaller));
        late.recv().unwrap_err(); // nobody waits for one that has ended
    }
}

#[tokio::test]
async fn an_engine_that_has_nothing_to_do_makes_room_at_once() {
    let model = FakeModel::new(Script::Hash);
    let pool = model.pool.clone();
    let bench = bench_with(model, config());
    run(
        &bench,
        of_tokens(&bench, &(10..400).collect::<Vec<_>>(), &[]),
    )
    .await;
    let kept = bench.engine.held_bytes();
    assert!(pool.out() > 20 && kept > 20 * 16, "{kept} bytes");
    let smaller = Bounds {
        blocks: 7,
        ..config().bounds
    };
    bench.engine.set_bounds(smaller).recv().unwrap_err();
    assert!(pool.held() <= 7, "{} blocks", pool.held());
    assert!(bench.engine.held_bytes() < kept);
}

/// Runs a request to its end: its text and how much of its prompt was not computed again.
async fn run(bench: &Bench, request: Request) -> (String, u64) {
    let mut events = bench.engine.submit(request).unwrap();
    let (text, end) = collect(&mut events).await;
    (text, end.unwrap().usage.cached_tokens())
}

/// A request with these prompt tokens, that wants its state saved at `places`.
fn of_tokens(bench: &Bench, prompt: &[u32], places: &[usize]) -> Request {
    Request {
        prompt: prompt.to_vec(),
        places: places.to_vec(),
        ..bench.request("x", 20, warm(7))
    }
}

#[tokio::test]
async fn what_others_left_is_used_and_changes_no_text() {
    let first: Vec<u32> = (10..110).collect();
    let cold = config().with_nothing_kept();
    for (places, shared, expected) in [
        (&[40, 96][..], 100, 96), // the same again
        (&[40, 96], 60, 40),      // only the head is the same
        (&[40, 96], 39, 0),       // not even that
        (&[33], 100, 33),
    ] {
        let second = [&first[..shared], &[200, 201, 202]].concat();
        let reference = bench_with(FakeModel::new(Script::Hash), cold.clone());
        let alone = run(&reference, of_tokens(&reference, &second, &[])).await;
        assert_eq!(alone.1, 0, "nothing is kept");
        let model = FakeModel::new(Script::Hash);
        let rows = model.rows.clone();
        let bench = bench_with(model, config());
        assert_eq!(run(&bench, of_tokens(&bench, &first, places)).await.1, 0);
        let before = rows.load(Ordering::SeqCst);
        let warm = run(&bench, of_tokens(&bench, &second, &[])).await;
        assert_eq!(warm, (alone.0, expected), "{shared} shared");
        let computed = rows.load(Ordering::SeqCst) - before;
        let new = second.len() - expected as usize;
        assert_eq!(computed, new + 19, "new tokens and those written");
    }
}

#[tokio::test]
async fn the_next_turn_computes_only_what_is_new() {
    let bench = bench(Script::Hash);
    let prompt: Vec<u32> = (0..2000).map(|n| 10 + n % 300).collect();
    let mut first = bench
        .engine
        .submit(of_tokens(&bench, &prompt, &[]))
        .unwrap();
    let (text, end) = collect(&mut first).await;
    assert_eq!(end.unwrap().usage.completion_tokens, 20);
    let answer = bench.tokenizer.encode(&text).unwrap();
    // the last token of the answer was never computed, and text need not encode as it was sampled
    let next = [&prompt[..], &answer, &[5; 30]].concat();
    let (_, cached) = run(&bench, of_tokens(&bench, &next, &[])).await;
    assert!(cached == 0 || cached == 2019, "{cached}");
    let at_prompt = of_tokens(&bench, &prompt, &[1996]);
    run(&bench, at_prompt).await;
    let (_, cached) = run(&bench, of_tokens(&bench, &next, &[])).await;
    assert!(cached >= 1996, "{cached}");
}

#[tokio::test]
async fn where_prompts_part_a_state_is_saved_for_the_third() {
    let bench = bench(Script::Hash);
    let head: Vec<u32> = (10..90).collect();
    let with = |tail: u32| [&head[..], &[tail; 30]].concat();
    let mut cached = Vec::new();
    for tail in 300..304 {
        cached.push(run(&bench, of_tokens(&bench, &with(tail), &[])).await.1);
    }
    assert_eq!(cached, [0, 0, 80, 80]);
}

#[tokio::test]
async fn who_has_another_salt_shares_nothing() {
    let bench = bench(Script::Hash);
    let prompt: Vec<u32> = (10..110).collect();
    let salted = |salt: Option<&str>| Request {
        salt: salt.map(Arc::from),
        ..of_tokens(&bench, &prompt, &[99])
    };
    let mut cached = Vec::new();
    for salt in [Some("a"), Some("b"), None, Some("a"), None] {
        cached.push(run(&bench, salted(salt)).await.1);
    }
    assert_eq!(cached, [0, 0, 0, 99, 99]);
}

#[tokio::test]
async fn guesses_change_no_text_but_the_number_of_steps() {
    let prompts = [
        "one",
        "a longer prompt than the others, over several steps",
        "x y z",
    ];
    let reference = bench(Script::Hash);
    for sampling in [SamplingParams::greedy(), warm(3)] {
        let mut expected = Vec::new();
        for prompt in prompts {
            expected.push(text_of(reference.submit(prompt, 40, sampling.clone())).await);
        }
        for drafts in 1..=3 {
            let mut guessing = config();
            guessing.bounds.drafts = drafts;
            let model = FakeModel::new(Script::Hash);
            let steps = model.steps.clone();
            let bench = bench_with(model, guessing);
            let together: Vec<Events> = prompts
                .iter()
                .map(|prompt| bench.submit(prompt, 40, sampling.clone()))
                .collect();
            let mut accepted = 0;
            for (mut events, expected) in together.into_iter().zip(&expected) {
                let (text, end) = collect(&mut events).await;
                let usage = end.unwrap().usage;
                assert_eq!((&text, usage.completion_tokens), (expected, 40));
                let details = usage.completion_tokens_details.unwrap();
                accepted += details.accepted_prediction_tokens;
                assert!(details.rejected_prediction_tokens > 0);
            }
            if sampling == SamplingParams::greedy() {
                assert!(accepted > 30, "{accepted}");
                // without guesses 120, one prompt after the other
                assert!(steps.load(Ordering::SeqCst) < 100, "{steps:?}");
            }
        }
    }
}

#[tokio::test]
async fn guesses_never_need_more_room_than_there_is() {
    let reference = bench(Script::Hash);
    // long enough that both write at once, whatever the room for their prompts
    let request = |bench: &Bench, prompt: &[u32]| Request {
        prompt: prompt.to_vec(),
        ..bench.request("x", 90, warm(7))
    };
    // each of the first four lengths ends elsewhere in a block after steps of four tokens
    for (blocks, longer) in (11..=21).flat_map(|blocks| (0..4).map(move |longer| (blocks, longer)))
    {
        let mut tight = config().with_nothing_kept();
        tight.bounds.blocks = blocks; // of 16 tokens; one sequence takes up to ten
        tight.bounds.drafts = 3;
        let prompts: Vec<Vec<u32>> = (0..2)
            .map(|n| (10..66 + longer + 4 * n).collect())
            .collect();
        // every guess holds, so that each step goes as far as it can
        let said = Script::Say {
            prompt: 0,
            tokens: vec![65],
        };
        for script in [said, Script::Hash] {
            let hashed = matches!(script, Script::Hash);
            let gate = Gate::closed_after(0);
            let model = FakeModel {
                gate: gate.clone(),
                ..FakeModel::new(script)
            };
            let bench = bench_with(model, tight.clone());
            let all: Vec<Events> = prompts
                .iter()
                .map(|prompt| bench.engine.submit(request(&bench, prompt)).unwrap())
                .collect();
            gate.open();
            for (prompt, mut events) in prompts.iter().zip(all) {
                let (text, end) = collect(&mut events).await;
                end.unwrap();
                if hashed {
                    let alone = run(&reference, request(&reference, prompt)).await.0;
                    assert_eq!(text, alone, "{blocks} blocks");
                }
            }
        }
    }
}

#[tokio::test]
async fn guesses_stop_at_the_end_of_an_answer() {
    let tokenizer = tiny();
    let prompt = tokenizer.encode("how").unwrap().len();
    let mut tokens = tokenizer.encode("one two three four").unwrap();
    tokens.push(EOS);
    for drafts in 0..=3 {
        let mut guessing = config();
        guessing.bounds.drafts = drafts;
        let script = Script::Say {
            prompt,
            tokens: tokens.clone(),
        };
        let bench = bench_with(FakeModel::new(script), guessing);
        let (text, end) = collect(&mut bench.submit("how", 50, SamplingParams::greedy())).await;
        assert_eq!(text, "one two three four");
        let usage = end.unwrap().usage;
        assert_eq!(usage.completion_tokens, tokens.len() as u64);
        let request = bench.request_with("how", 50, SamplingParams::greedy(), &["wo th"]);
        let (text, _) = collect(&mut bench.engine.submit(request).unwrap()).await;
        assert_eq!(text, "one t");
        for most in 1..5 {
            let mut events = bench.submit("how", most, SamplingParams::greedy());
            let (_, end) = collect(&mut events).await;
            assert_eq!(end.unwrap().usage.completion_tokens, most as u64);
        }
    }
}

#[tokio::test]
async fn several_answers_compute_their_prompt_once() {
    let model = FakeModel::new(Script::Hash);
    let rows = model.rows.clone();
    let bench = bench_with(model, config());
    let prompt: Vec<u32> = (10..110).collect();
    let all: Vec<Events> = (0..4)
        .map(|_| {
            bench
                .engine
                .submit(of_tokens(&bench, &prompt, &[99]))
                .unwrap()
        })
        .collect();
    let mut cached = Vec::new();
    for mut events in all {
        cached.push(collect(&mut events).await.1.unwrap().usage.cached_tokens());
    }
    assert_eq!(cached, [0, 99, 99, 99]);
    assert_eq!(rows.load(Ordering::SeqCst), 100 + 3 + 4 * 19);
}

#[tokio::test]
async fn what_was_left_makes_room_for_what_runs() {
    let mut tight = config();
    tight.bounds.blocks = 20; // of 16 tokens
    let reference = bench_with(FakeModel::new(Script::Hash), config().with_nothing_kept());
    let bench = bench_with(FakeModel::new(Script::Hash), tight);
    for round in 0..12 {
        let prompts = [(round * 37) % 5, round % 3].map(|n| -> Vec<u32> {
            let head: Vec<u32> = (0..60).map(|at| 10 + n * 60 + at).collect();
            [&head[..], &[400 + round; 40]].concat()
        });
        let places = [50, 80];
        let mut both = Vec::new();
        for prompt in &prompts {
            both.push(
                bench
                    .engine
                    .submit(of_tokens(&bench, prompt, &places))
                    .unwrap(),
            );
        }
        for (prompt, mut events) in prompts.iter().zip(both) {
            let alone = run(&reference, of_tokens(&reference, prompt, &[])).await;
            let (text, end) = collect(&mut events).await;
            end.unwrap();
            assert_eq!(text, alone.0, "round {round}");
        }
    }
}

#[tokio::test]
async fn a_seed_repeats_its_text_and_another_does_not() {
    let bench = bench(Script::Hash);
    let first = text_of(bench.submit("same", 30, warm(1))).await;
    let second = text_of(bench.submit("same", 30, warm(1))).await;
    let third = text_of(bench.submit("same", 30, warm(2))).await;
    assert_eq!(first, second);
    assert_ne!(first, third);
}

#[tokio::test]
async fn every_eos_ends_the_answer_and_is_counted_but_not_shown() {
    let tokenizer = tiny();
    let mut tokens = tokenizer.encode("fine").unwrap();
    for eos in [EOS, 479] {
        tokens.push(eos);
        let prompt = tokenizer.encode("how").unwrap().len();
        let bench = bench(Script::Say {
            prompt,
            tokens: tokens.clone(),
        });
        let (text, end) = collect(&mut bench.submit("how", 50, SamplingParams::greedy())).await;
        let finish = end.unwrap();
        assert_eq!(text, "fine");
        assert_eq!(finish.reason, FinishReason::Stop);
        assert_eq!(finish.usage.completion_tokens, tokens.len() as u64);
        tokens.pop();
    }
}

#[tokio::test]
async fn a_stop_string_ends_the_answer_before_itself() {
    let tokenizer = tiny();
    let prompt = tokenizer.encode("how").unwrap().len();
    let bench = bench(Script::Say {
        prompt,
        tokens: tokenizer.encode("one two three four").unwrap(),
    });
    let request = bench.request_with("how", 50, SamplingParams::greedy(), &["wo th"]);
    let (text, end) = collect(&mut bench.engine.submit(request).unwrap()).await;
    let finish = end.unwrap();
    assert_eq!(text, "one t");
    assert_eq!(finish.reason, FinishReason::Stop);
    assert_eq!(finish.stop_string.as_deref(), Some("wo th"));
}

#[tokio::test]
async fn a_reader_that_leaves_frees_its_sequence_within_a_step() {
    let gate = Gate::closed_after(2);
    let model = FakeModel {
        gate: gate.clone(),
        ..FakeModel::new(Script::Hash)
    };
    let steps = model.steps.clone();
    let bench = bench_with(model, config());
    let mut events = bench.submit("Hello", 1000, SamplingParams::greedy());
    assert!(events.next().await.is_some());
    drop(events);
    gate.open();
    // Draining ends as soon as nothing is left to do: it would take 1000 steps if the request went on.
    bench.engine.drain(Duration::from_secs(60)).await;
    assert_eq!(bench.engine.in_flight(), 0);
    assert!(steps.load(Ordering::SeqCst) <= 4, "{steps:?}");
}

#[tokio::test]
async fn a_waiting_request_is_cancelled_too() {
    let gate = Gate::closed_after(0);
    let mut one = config();
    one.bounds.max_running = 1;
    let model = FakeModel {
        gate: gate.clone(),
        ..FakeModel::new(Script::Hash)
    };
    let bench = bench_with(model, one);
    let first = bench.submit("Hello", 3, SamplingParams::greedy());
    let second = bench.submit("Hello", 3, SamplingParams::greedy());
    drop(second);
    gate.open();
    text_of(first).await;
    bench.engine.drain(Duration::from_secs(60)).await;
    assert_eq!(bench.engine.in_flight(), 0);
}

#[tokio::test]
async fn a_slow_reader_is_paused_and_loses_nothing() {
    let reference = bench(Script::Hash);
    let expected = text_of(reference.submit("Hello", 500, SamplingParams::greedy())).await;
    let bench = bench(Script::Hash);
    let mut slow = bench.submit("Hello", 500, SamplingParams::greedy());
    // While nobody reads the slow one, another is served to its end.
    let quick = text_of(bench.submit("Hello", 500, SamplingParams::greedy())).await;
    assert_eq!(quick, expected);
    let (text, end) = collect(&mut slow).await;
    assert_eq!(text, expected);
    assert_eq!(end.unwrap().usage.completion_tokens, 500);
}

#[tokio::test]
async fn a_reader_that_takes_nothing_is_cut() {
    let mut strict = config();
    strict.stall_limit = Duration::ZERO;
    let bench = bench_with(FakeModel::new(Script::Hash), strict);
    let mut slow = bench.submit("Hello", 4000, SamplingParams::greedy());
    bench.engine.drain(Duration::from_secs(60)).await;
    let (_, end) = collect(&mut slow).await;
    assert_eq!(end.unwrap_err(), EngineError::SlowReader);
}

#[tokio::test]
async fn a_fault_ends_every_request_at_once_and_closes_the_door() {
    for script in [Script::FailAfter(3), Script::PanicAfter(3)] {
        let gate = Gate::closed_after(0);
        let model = FakeModel {
            gate: gate.clone(),
            ..FakeModel::new(script)
        };
        let bench = bench_with(model, config());
        let mut all: Vec<Events> = (0..3)
            .map(|_| bench.submit("Hello", 100, SamplingParams::greedy()))
            .collect();
        gate.open();
        for events in &mut all {
            let (_, end) = collect(events).await;
            let error = end.unwrap_err();
            assert!(
                matches!(&error, EngineError::Fault(reason) if reason.contains("planted")),
                "{error:?}"
            );
        }
        bench.engine.drain(Duration::from_secs(60)).await;
        assert!(bench.engine.fault().unwrap().contains("planted"));
        let again = bench.request("Hello", 1, SamplingParams::greedy());
        assert_eq!(bench.engine.submit(again).unwrap_err(), Rejected::Closed);
        assert_eq!(bench.engine.in_flight(), 0);
    }
}

#[tokio::test]
async fn a_rank_that_dies_or_stalls_ends_every_request_and_closes_the_door() {
    let patient = Duration::from_secs(3600);
    for (fate, deadline, said) in [
        (
            Fate::Fails,
            patient,
            "rank 1 failed: device fault: a planted fault",
        ),
        (
            Fate::Panics,
            patient,
            "rank 1 failed: it panicked: a planted panic",
        ),
        (
            Fate::Stalls,
            Duration::from_millis(1),
            "rank 1 did not come within 1ms",
        ),
    ] {
        let first_step = usize::from(fate != Fate::Stalls); // whoever is in a hurry must not have to come in time
        let gate = Gate::closed_after(0);
        let doomed = doomed_behind(gate.clone(), 2, deadline, (1, fate, first_step));
        let Doomed { ranks, hold, .. } = doomed;
        let bench = bench_of(Box::new(ranks), config());
        let mut all: Vec<Events> = (0..3)
            .map(|_| bench.submit("Hello", 100, SamplingParams::greedy()))
            .collect();
        gate.open();
        for events in &mut all {
            let (_, end) = collect(events).await;
            let error = end.unwrap_err();
            let fault = EngineError::Fault(said.into());
            assert_eq!(error.to_string(), fault.to_string());
        }
        bench.engine.drain(Duration::from_secs(60)).await;
        assert_eq!(bench.engine.fault(), Some(said));
        let again = bench.request("Hello", 1, SamplingParams::greedy());
        assert_eq!(bench.engine.submit(again).unwrap_err(), Rejected::Closed);
        drop(hold);
    }
}

#[tokio::test]
async fn logits_that_are_no_numbers_fail_one_request_alone() {
    let tokenizer = tiny();
    let bad = tokenizer.encode("bad").unwrap()[0];
    let bench = bench(Script::NanFor(bad));
    let mut good = bench.submit("Hello", 10, SamplingParams::greedy());
    let mut poisoned = bench.submit("bad", 10, SamplingParams::greedy());
    assert!(matches!(
        collect(&mut poisoned).await.1,
        Err(EngineError::Sampling(_))
    ));
    assert!(collect(&mut good).await.1.is_ok());
}

#[tokio::test]
async fn a_deadline_ends_a_request_that_waits() {
    let gate = Gate::closed_after(1);
    let model = FakeModel {
        gate: gate.clone(),
        ..FakeModel::new(Script::Hash)
    };
    let bench = bench_with(model, config());
    let mut request = bench.request("Hello", 100, SamplingParams::greedy());
    request.deadline = Instant::now();
    let mut events = bench.engine.submit(request).unwrap();
    assert_eq!(
        collect(&mut events).await.1.unwrap_err(),
        EngineError::Deadline
    );
}

#[tokio::test]
async fn draining_finishes_what_runs_and_frees_the_model() {
    let (dropped, is_dropped) = std::sync::mpsc::channel::<()>();
    let model = FakeModel {
        dropped: Some(Box::new(dropped)),
        ..FakeModel::new(Script::Hash)
    };
    let bench = bench_with(model, config());
    let events = bench.submit("Hello", 50, SamplingParams::greedy());
    let reader = tokio::spawn(text_of(events));
    bench.engine.drain(Duration::from_secs(60)).await;
    assert!(!reader.await.unwrap().is_empty());
    assert!(is_dropped.recv().is_err(), "the model is freed");
    let late = bench.request("Hello", 1, SamplingParams::greedy());
    assert_eq!(bench.engine.submit(late).unwrap_err(), Rejected::Closed);
}

#[tokio::test]
async fn a_drain_that_takes_too_long_cuts_what_is_left() {
    let gate = Gate::closed_after(1);
    let model = FakeModel {
        gate: gate.clone(),
        ..FakeModel::new(Script::Hash)
    };
    let bench = bench_with(model, config());
    let mut events = bench.submit("Hello", 3000, SamplingParams::greedy());
    let first = events.next().await;
    assert!(matches!(first, Some(Event::Delta(_))));
    let engine = bench.engine.clone();
    let drain = tokio::spawn(async move { engine.drain(Duration::ZERO).await });
    tokio::task::yield_now().await;
    gate.let_through(1);
    gate.open();
    drain.await.unwrap();
    assert_eq!(
        collect(&mut events).await.1.unwrap_err(),
        EngineError::Stopped
    );
}

#[tokio::test]
async fn the_tail_past_the_tokenizer_is_never_sampled() {
    // The fake makes the ids past the vocabulary the likeliest of all.
    let bench = bench(Script::Hash);
    for seed in 0..5 {
        let (_, end) = collect(&mut bench.submit("Hello", 40, warm(seed))).await;
        assert_eq!(end.unwrap().usage.completion_tokens, 40);
    }
}

#[tokio::test]
async fn a_prompt_is_scored_alike_in_any_pieces_and_need_not_be_answered() {
    let prompt =
        "a prompt that is a good deal longer than one step takes in, to be scored as a whole";
    let mut all = Vec::new();
    for prefill_tokens in [16, 1, 4096] {
        let mut config = config();
        config.bounds.prefill_tokens = prefill_tokens;
        let bench = bench_with(FakeModel::new(Script::Hash), config);
        let fields = SamplingFields {
            logprobs: Some(2),
            ..SamplingFields::default()
        };
        let mut request = bench.request(prompt, 0, fields.checked().unwrap());
        request.score_prompt = true;
        let count = request.prompt.len();
        let mut events = bench.engine.submit(request).unwrap();
        let Some(Event::Delta(Delta::Prompt(scores))) = events.next().await else {
            panic!("the scores come first");
        };
        assert_eq!(scores.len(), count);
        assert!(scores[0].is_none(), "nothing precedes the first");
        for scored in scores[1..].iter().flatten() {
            assert_eq!(scored.top.len(), 2);
            assert!(scored.logprob <= scored.top[0].1);
        }
        assert!(scores[1..].iter().all(Option::is_some));
        let Some(Event::End(Ok(finish))) = events.next().await else {
            panic!("then the end");
        };
        assert_eq!(finish.reason, FinishReason::Length);
        assert_eq!(finish.usage.completion_tokens, 0);
        all.push(scores);
    }
    assert_eq!(all[0], all[1]);
    assert_eq!(all[0], all[2]);
}

#[tokio::test]
async fn a_cancelled_request_is_told_and_frees_its_sequence() {
    let gate = Gate::closed_after(2);
    let model = FakeModel {
        gate: gate.clone(),
        ..FakeModel::new(Script::Hash)
    };
    let bench = bench_with(model, config());
    let mut events = bench.submit("Hello", 1000, SamplingParams::greedy());
    let canceller = events.canceller();
    canceller.cancel();
    gate.open();
    let (_, end) = collect(&mut events).await;
    assert_eq!(end.unwrap_err(), EngineError::Cancelled);
    canceller.cancel();
    assert_eq!(bench.engine.in_flight(), 0);
}

/// What a request says and thinks under a guide, and its end.
async fn guided(say: &str, guide: Guide, max_tokens: usize) -> (String, String, Finish) {
    let tokenizer = tiny();
    let prompt = tokenizer.encode("how").unwrap().len();
    let mut tokens = tokenizer.encode(say).unwrap();
    tokens.push(EOS);
    let bench = bench(Script::Say { prompt, tokens });
    let options = OutputOptions {
        thinking: Some(true),
        ..OutputOptions::default()
    };
    let request = Request {
        guide,
        output: Output::new(tokenizer, options),
        ..bench.request("how", max_tokens, SamplingParams::greedy())
    };
    let mut events = bench.engine.submit(request).unwrap();
    let (mut thought, mut said) = (String::new(), String::new());
    loop {
        match events.next().await.expect("an end comes") {
            Event::Delta(Delta::Reasoning(text)) => thought.push_str(&text),
            Event::Delta(Delta::Content(text)) => said.push_str(&text),
            Event::Delta(other) => panic!("unexpected {other:?}"),
            Event::End(end) => return (thought, said, end.unwrap()),
        }
    }
}

fn ids(text: &str) -> Arc<[u32]> {
    tiny().encode(text).unwrap().into()
}

#[tokio::test]
async fn a_thinking_budget_closes_the_thought_and_the_answer_follows() {
    let budget = |tokens| ThinkingBudget {
        tokens,
        close: ids("\n</think>\n\n"),
    };
    let thought = "one two three four five six seven eight nine ten";
    for tokens in [0, 5] {
        let guide = Guide::new(Some(budget(tokens)), None, ids("\n\n"));
        let (thought, said, finish) = guided(thought, guide, 40).await;
        let close = ids("\n</think>\n\n").len() as u64;
        let details = finish.usage.completion_tokens_details.unwrap();
        assert!(details.reasoning_tokens <= tokens + close, "{details:?}");
        assert_eq!(thought.is_empty(), tokens == 0, "{thought:?}");
        assert!(!said.is_empty(), "the model goes on outside the block");
    }
    let guide = Guide::new(Some(budget(1000)), None, ids("\n\n"));
    let (whole, ..) = guided(thought, guide, 1000).await;
    assert_eq!(whole, thought, "a budget that is not spent changes nothing");
}

#[tokio::test]
async fn a_grammar_holds_from_the_end_of_the_thinking_on() {
    let grammars = Grammars::new(tiny(), vec![EOS, 479]);
    let shape = Shape::Choice(vec!["yes".into(), "no".into()]);
    let grammar = grammars.compile(shape).unwrap();
    let guide = Guide::new(None, Some((grammar, Scope::Answer)), ids("\n\n"));
    let (thought, said, finish) = guided("hm, what?\n</think>\n\nno idea", guide, 40).await;
    assert_eq!(
        thought, "hm, what?",
        "the grammar does not touch the thought"
    );
    assert!(said == "yes" || said == "no", "{said:?}");
    assert_eq!(finish.reason, FinishReason::Stop);
}

#[tokio::test]
async fn a_strict_tool_is_called_as_its_schema_says_and_text_before_is_free() {
    let tools = serde_json::json!([{"type": "function", "function": {"name": "now", "strict": true,
        "parameters": {"type": "object", "properties": {"zone": {"enum": [1, 2]}}, "required": ["zone"], "additionalProperties": false}}}]);
    let tools: Vec<protocol::chat::Tool> = serde_json::from_value(tools).unwrap();
    let call = "I look. <tool_call>\n<function=never>\n<parameter=zone>\nmany\n</parameter>\n</function>\n</tool_call>";
    for form in [ToolForm::QwenXml, ToolForm::Hermes] {
        let shape = form.block_shape(&tools).unwrap();
        let grammar = Grammars::new(tiny(), vec![EOS]).compile(shape).unwrap();
        let prompt = tiny().encode("how").unwrap().len();
        let mut tokens = tiny().encode(call).unwrap();
        tokens.push(EOS);
        let bench = bench(Script::Say { prompt, tokens });
        let options = OutputOptions {
            tools: Some((form, tools.clone().into())),
            ..OutputOptions::default()
        };
        let request = Request {
            guide: Guide::new(None, Some((grammar, Scope::Calls)), Arc::default()),
            output: Output::new(tiny(), options),
            ..bench.request("how", 300, SamplingParams::greedy())
        };
        let mut events = bench.engine.submit(request).unwrap();
        let (mut said, mut calls) = (String::new(), Vec::new());
        loop {
            match events.next().await.expect("an end comes") {
                Event::Delta(Delta::Content(text)) => said.push_str(&text),
                Event::Delta(Delta::ToolCall {
                    name, arguments, ..
                }) => {
                    calls.push((name, arguments));
                }
                Event::Delta(other) => panic!("unexpected {other:?}"),
                Event::End(end) => {
                    assert_eq!(
                        end.unwrap().reason,
                        FinishReason::ToolCalls,
                        "{form:?}: {said}"
                    );
                    break;
                }
            }
        }
        assert!(said.starts_with("I look."), "{said}");
        let (name, arguments) = &calls[0];
        let zone = &serde_json::from_str::<serde_json::Value>(arguments).unwrap()["zone"];
        assert_eq!(name, "now", "{form:?}");
        assert!(*zone == 1 || *zone == 2, "{form:?}: {arguments}");
    }
}
