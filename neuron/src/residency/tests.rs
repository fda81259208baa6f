//! The life of models, with a loader the test holds in its hand.

use super::*;
use crate::engine::fake::{FakeModel, Script};
use crate::engine::guide::Guide;
use crate::engine::request::{EngineError, Event, Finish, Request};
use crate::engine::sampler::SamplingParams;
use crate::parallel::fake::{Fate, doomed};
use crate::text::output::{Output, OutputOptions};
use crate::text::tokenizer::tests::fixture;
use protocol::node::{ModelState, RankState};
use std::num::NonZeroU32;
use std::sync::atomic::AtomicUsize;

/// A host whose loads wait for a message each: an error to fail with, or a model.
pub(crate) struct Host {
    pub(crate) residency: Residency,
    pub(crate) loads: Arc<AtomicUsize>,
    release: std::sync::mpsc::Sender<FakeModel>,
}

pub(crate) fn host() -> Host {
    let (release, releases) = std::sync::mpsc::channel::<FakeModel>();
    let releases = Mutex::new(releases);
    let loads = Arc::new(AtomicUsize::new(0));
    let counted = loads.clone();
    let config = Config::default_on_this_host().unwrap();
    let loader: Box<Loader> = Box::new(move |_, _, _, progress| {
        counted.fetch_add(1, Ordering::SeqCst);
        progress(0.5);
        let model = releases
            .lock()
            .unwrap()
            .recv()
            .expect("the test releases each load");
        Ok(Box::new(model) as Box<dyn CausalLm>)
    });
    let hands = Hands {
        free: Arc::new(|devices: &[String]| vec![None; devices.len()]),
        load: loader,
        ..Hands::of_host()
    };
    Host {
        residency: Residency::with_hands(&config, &Registry::new(), hands),
        loads,
        release,
    }
}

fn wanted(id: &str, source: &str) -> LoadModel {
    LoadModel {
        id: id.into(),
        source: source.into(),
        context_length: None,
        quant: None,
        tensor_parallel: None,
        devices: Vec::new(),
    }
}

fn from_fixture(id: &str) -> LoadModel {
    wanted(id, fixture().to_str().unwrap())
}

impl Host {
    fn release(&self) {
        self.release.send(FakeModel::new(Script::Hash)).unwrap();
    }

    async fn settled(&self) {
        self.residency
            .wait_until(|models| {
                models
                    .iter()
                    .all(|model| model.state != ModelState::Loading)
            })
            .await;
    }

    async fn gone(&self, id: &str) {
        self.residency
            .wait_until(|models| models.iter().all(|model| model.id != id))
            .await;
    }
}

#[tokio::test]
async fn a_second_load_joins_the_first() {
    let host = host();
    let first = host.residency.load(from_fixture("a")).unwrap();
    let second = host.residency.load(from_fixture("a")).unwrap();
    assert_eq!(first.state, ModelState::Loading);
    assert_eq!(second.state, ModelState::Loading);
    assert!(matches!(
        host.residency.get("a"),
        Err(Unavailable::Loading { .. })
    ));
    host.release();
    host.settled().await;
    let third = host.residency.load(from_fixture("a")).unwrap();
    assert_eq!(third.state, ModelState::Loaded);
    assert_eq!(third.context_length, 4096);
    assert_eq!(host.loads.load(Ordering::SeqCst), 1);
    assert!(host.residency.get("a").is_ok());
}

#[tokio::test]
async fn the_same_id_with_another_source_is_a_conflict() {
    let host = host();
    host.residency.load(from_fixture("a")).unwrap();
    let other = host.residency.load(wanted("a", "elsewhere"));
    assert!(
        matches!(other, Err(LoadRefused::Conflict { .. })),
        "{other:?}"
    );
    let longer = LoadModel {
        context_length: Some(7),
        ..from_fixture("a")
    };
    assert!(matches!(
        host.residency.load(longer),
        Err(LoadRefused::Conflict { .. })
    ));
    let shared = LoadModel {
        tensor_parallel: NonZeroU32::new(2),
        ..from_fixture("a")
    };
    assert!(matches!(
        host.residency.load(shared),
        Err(LoadRefused::Conflict { .. })
    ));
    host.release();
}

#[tokio::test]
async fn ranks_that_do_not_divide_are_refused_before_anything_is_read() {
    let host = host();
    let wanted = LoadModel {
        tensor_parallel: NonZeroU32::new(3),
        ..from_fixture("a")
    };
    host.residency.load(wanted).unwrap();
    host.settled().await;
    let status = host.residency.status("a").unwrap();
    assert_eq!(status.state, ModelState::Failed);
    let reason = status.reason.unwrap();
    assert!(reason.contains("1, 2 or 4 would do"), "{reason}");
    assert_eq!(host.loads.load(Ordering::SeqCst), 0);
}

#[tokio::test]
async fn a_failed_load_says_why_and_can_be_tried_again() {
    let host = host();
    host.residency.load(wanted("a", "/no/such/folder")).unwrap();
    host.settled().await;
    let status = host.residency.status("a").unwrap();
    assert_eq!(status.state, ModelState::Failed);
    assert!(status.reason.unwrap().contains("/no/such/folder"));
    assert_eq!(status.memory_bytes, 0);
    assert!(matches!(
        host.residency.get("a"),
        Err(Unavailable::Failed { .. })
    ));
    host.residency.load(from_fixture("a")).unwrap();
    host.release();
    host.settled().await;
    assert!(host.residency.get("a").is_ok());
}

#[tokio::test]
async fn an_unloaded_model_goes_away_and_can_come_back() {
    let host = host();
    assert!(host.residency.unload("a").is_none());
    host.residency.load(from_fixture("a")).unwrap();
    host.release();
    host.settled().await;
    let status = host.residency.unload("a").unwrap();
    assert_eq!(status.state, ModelState::Unloading);
    host.gone("a").await;
    host.residency.load(from_fixture("a")).unwrap();
    host.release();
    host.settled().await;
    assert!(host.residency.get("a").is_ok());
}

#[tokio::test]
async fn a_model_unloaded_while_it_loads_never_serves() {
    let host = host();
    host.residency.load(from_fixture("a")).unwrap();
    assert_eq!(
        host.residency.unload("a").unwrap().state,
        ModelState::Unloading
    );
    assert!(matches!(
        host.residency.load(from_fixture("a")),
        Err(LoadRefused::Unloading(_))
    ));
    host.release();
    host.gone("a").await;
    assert_eq!(host.residency.get("a").unwrap_err(), Unavailable::Unknown);
}

#[tokio::test]
async fn a_closed_host_drains_and_loads_nothing() {
    let host = host();
    host.residency.load(from_fixture("a")).unwrap();
    host.release();
    host.settled().await;
    host.residency.close().await;
    assert_eq!(
        host.residency.load(from_fixture("b")),
        Err(LoadRefused::Stopping)
    );
}

/// What is told of the calls that join ranks, over all of them.
fn joined(registry: &Registry) -> u64 {
    let families = registry.gather();
    let mut families = families.iter();
    let family = families.find(|one| one.name() == "neuron_collective_seconds");
    let metrics = family.into_iter().flat_map(|one| one.get_metric());
    metrics
        .map(|one| one.get_histogram().get_sample_count())
        .sum()
}

#[tokio::test]
async fn a_model_tells_of_its_ranks_and_of_what_joins_them() {
    let config = Config::default_on_this_host().unwrap();
    for ranks in [1, 2] {
        let registry = Registry::new();
        let hands = Hands {
            free: Arc::new(|devices: &[String]| vec![None; devices.len()]),
            ..Hands::of_host()
        };
        let residency = Residency::with_hands(&config, &registry, hands);
        let model = LoadModel {
            tensor_parallel: NonZeroU32::new(ranks),
            devices: vec!["cpu".into()],
            ..from_fixture("a")
        };
        let begun = residency.load(model).unwrap();
        assert_eq!((begun.ranks.len(), begun.state), (0, ModelState::Loading));
        let loading = |model: &ModelStatus| model.state == ModelState::Loading;
        residency
            .wait_until(|models| !models.iter().any(loading))
            .await;
        let status = residency.status("a").unwrap();
        let numbers: Vec<u32> = status.ranks.iter().map(|rank| rank.rank).collect();
        assert_eq!(numbers, (0..ranks).collect::<Vec<_>>());
        for rank in &status.ranks {
            assert_eq!((rank.state, &*rank.device), (RankState::Loaded, "cpu"));
        }
        let weights = status.ranks.iter().map(|rank| rank.weight_bytes);
        assert_eq!(weights.sum::<u64>(), status.memory_bytes);
        let before = joined(&registry);
        let served = residency.get("a").unwrap();
        ask(&served).await.unwrap();
        assert_eq!(joined(&registry) > before, ranks > 1, "{ranks} ranks");
        let unloading = residency.unload("a").unwrap();
        assert_eq!(unloading.ranks, status.ranks);
        residency.close().await;
    }
}

#[tokio::test]
async fn a_rank_that_a_model_fails_by_is_told() {
    let registry = Registry::new();
    let config = Config::default_on_this_host().unwrap();
    let hands = Hands {
        free: Arc::new(|devices: &[String]| vec![None; devices.len()]),
        load: Box::new(|_, _, ranks, _| {
            let doomed = doomed(ranks, Duration::from_secs(3600), (1, Fate::Fails, 2));
            Ok(Box::new(doomed.ranks))
        }),
        ..Hands::of_host()
    };
    let residency = Residency::with_hands(&config, &registry, hands);
    let model = LoadModel {
        tensor_parallel: NonZeroU32::new(2),
        devices: vec!["cpu".into()],
        ..from_fixture("a")
    };
    residency.load(model).unwrap();
    let loading = |model: &ModelStatus| model.state == ModelState::Loading;
    residency
        .wait_until(|models| !models.iter().any(loading))
        .await;
    let served = residency.get("a").unwrap();
    ask(&served).await.unwrap_err();
    served.engine.drain(Duration::from_secs(60)).await;
    let status = residency.status("a").unwrap();
    assert_eq!(status.state, ModelState::Failed);
    let ranks = status.ranks.iter();
    let ranks: Vec<_> = ranks.map(|rank| (rank.state, rank.weight_bytes)).collect();
    assert_eq!(ranks, [(RankState::Ended, 0), (RankState::Failed, 0)]);
}

/// Asks for five tokens after three.
async fn ask(served: &ServedModel) -> Result<Finish, EngineError> {
    let request = Request {
        id: "test".into(),
        prompt: vec![11, 12, 13],
        max_tokens: 5,
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
    let mut events = served.engine.submit(request).unwrap();
    loop {
        if let Event::End(end) = events.next().await.expect("every request has an end") {
            return end;
        }
    }
}
