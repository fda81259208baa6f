//! Which models are resident where. One loop owns every change; everybody else asks it and waits.

use crate::config::Config;
use crate::fleet::{Fleet, FleetView, Served};
use crate::pingora::client::Client;
use arc_swap::ArcSwap;
use effects::{Failed, Job};
use filters::residency::{Lease, Leasing, Residency};
use placement::Circumstances;
use prometheus::{Histogram, HistogramOpts, IntCounterVec, Opts, Registry};
use protocol::node::LoadModel;
use protocol::{ApiError, ErrorKind};
use schedule::{Decision, Refusal};
use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinSet;
use tokio::time::{Instant, interval, timeout};

mod effects;
mod eviction;
mod placement;
mod schedule;

/// After a failed load, how long the model is not tried on that node again.
const BACKOFF: Duration = Duration::from_secs(10);
/// How often the loop looks around on its own.
const TICK: Duration = Duration::from_secs(1);

/// The handle by which requests lease models.
pub(crate) struct Lifecycle {
    config: Arc<ArcSwap<Config>>,
    fleet: Arc<Fleet>,
    client: Client,
    wants: mpsc::UnboundedSender<Want>,
    /// Taken by the loop when it starts.
    inbox: Mutex<Option<mpsc::UnboundedReceiver<Want>>>,
    /// Requests that wait for a load; bounded by `gateway.max_waiting`.
    waiting: Arc<AtomicUsize>,
    metrics: Metrics,
}

/// A request that waits for a model.
struct Want {
    model: Arc<str>,
    reply: oneshot::Sender<Result<Lease, Refusal>>,
}

struct Metrics {
    loads: IntCounterVec,
    evictions: IntCounterVec,
    load_seconds: Histogram,
}

impl Metrics {
    fn new(registry: &Registry) -> Self {
        let counter = |name, help, labels: &[&str]| {
            let family = IntCounterVec::new(Opts::new(name, help), labels).expect("constants");
            registry
                .register(Box::new(family.clone()))
                .expect("one lifecycle a registry");
            family
        };
        let opts = HistogramOpts::new(
            "cortex_model_load_seconds",
            "From deciding to load a model to its being served",
        )
        .buckets(vec![
            0.1, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0,
        ]);
        let load_seconds = Histogram::with_opts(opts).expect("constants");
        registry
            .register(Box::new(load_seconds.clone()))
            .expect("one lifecycle a registry");
        Self {
            loads: counter(
                "cortex_model_loads_total",
                "Loads that this gateway asked for, by how they ended",
                &["model", "node", "outcome"],
            ),
            evictions: counter(
                "cortex_model_evictions_total",
                "Models this gateway had unloaded, for room or for defragmentation",
                &["model", "node", "reason"],
            ),
            load_seconds,
        }
    }
}

/// What the loop remembers between two looks.
#[derive(Default)]
struct State {
    /// Wanted models and who waits for them. Pinned ones are wanted by nobody in particular.
    wanted: HashMap<Arc<str>, Vec<oneshot::Sender<Result<Lease, Refusal>>>>,
    /// Nodes being changed, and the model that is to come there; one change a node at a time.
    changing: HashMap<Arc<str>, Option<Arc<str>>>,
    /// Model and node of lately failed loads, and until when they count.
    failed: HashMap<(Arc<str>, Arc<str>), (Instant, String)>,
    /// Loads by node since it was last cleared.
    cycles: HashMap<Arc<str>, u32>,
}

/// A change that has ended.
struct Done {
    job: Job,
    took: Duration,
    result: Result<(), Failed>,
}

impl Lifecycle {
    pub(crate) fn new(
        config: Arc<ArcSwap<Config>>,
        fleet: Arc<Fleet>,
        client: Client,
        registry: &Registry,
    ) -> Arc<Self> {
        let (wants, inbox) = mpsc::unbounded_channel();
        Arc::new(Self {
            config,
            fleet,
            client,
            wants,
            inbox: Mutex::new(Some(inbox)),
            waiting: Arc::default(),
            metrics: Metrics::new(registry),
        })
    }

    /// The loop. Runs until dropped; a second call returns at once.
    pub(crate) async fn run(self: &Arc<Self>) {
        let Some(mut inbox) = self
            .inbox
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take()
        else {
            return;
        };
        let mut state = State::default();
        let mut jobs: JoinSet<Done> = JoinSet::new();
        let mut tick = interval(TICK);
        loop {
            tokio::select! {
                Some(want) = inbox.recv() => {
                    state.wanted.entry(want.model).or_default().push(want.reply);
                }
                Some(done) = jobs.join_next() => self.finish(&mut state, done.expect("jobs do not panic")),
                () = self.fleet.changed() => {}
                _ = tick.tick() => {}
            }
            self.settle(&mut state, &mut jobs);
        }
    }

    /// Decides about every wanted model, and about nodes that are due for clearing.
    fn settle(self: &Arc<Self>, state: &mut State, jobs: &mut JoinSet<Done>) {
        let config = self.config.load_full();
        state.failed.retain(|_, (until, _)| *until > Instant::now());
        for (id, _) in config.models.iter().filter(|(_, model)| model.pinned) {
            state.wanted.entry(id.clone()).or_default();
        }
        let models: Vec<Arc<str>> = state.wanted.keys().cloned().collect();
        for model in models {
            let view = self.fleet.view();
            match self.decide(&model, state, &config, &view) {
                Decision::Serve => {
                    let served = view.served(&model).expect("the decision saw it served");
                    let waiters = state.wanted.remove(&model).unwrap_or_default();
                    for waiter in waiters {
                        match lease(served) {
                            Some(lease) => drop(waiter.send(Ok(lease))), // a waiter may have left
                            None => state.wanted.entry(model.clone()).or_default().push(waiter),
                        }
                    }
                }
                Decision::Load { node, evict } => {
                    self.begin(state, jobs, &config, &view, &node, evict, Some(&model));
                }
                Decision::Wait => {
                    if let Some(waiters) = state.wanted.get_mut(&model) {
                        waiters.retain(|waiter| !waiter.is_closed());
                        if waiters.is_empty() {
                            state.wanted.remove(&model); // nobody is interested any more
                        }
                    }
                }
                Decision::Refuse(refusal) => {
                    for waiter in state.wanted.remove(&model).unwrap_or_default() {
                        let _ = waiter.send(Err(refusal.clone())); // a waiter may have left
                    }
                }
            }
        }
        self.defragment(state, jobs, &config);
    }

    fn decide(
        &self,
        model: &Arc<str>,
        state: &State,
        config: &Config,
        view: &FleetView,
    ) -> Decision {
        let last_failure = state.failed.iter().find(|((failed, _), _)| failed == model);
        let circumstances = Circumstances {
            config,
            view,
            usage: &|id| usage(view, id),
            occupied: &|node| state.changing.contains_key(node),
            failed_on: &|node| state.failed.contains_key(&(model.clone(), node.into())),
        };
        let under_way = state
            .changing
            .values()
            .any(|coming| coming.as_ref() == Some(model));
        schedule::decide(
            model,
            &circumstances,
            under_way,
            last_failure.map(|(_, (_, reason))| reason.as_str()),
        )
    }

    /// Starts a change on `node`, if the models that have to go are still unused.
    #[allow(clippy::too_many_arguments)] // the loop's own variables, passed on
    fn begin(
        self: &Arc<Self>,
        state: &mut State,
        jobs: &mut JoinSet<Done>,
        config: &Config,
        view: &FleetView,
        node: &Arc<str>,
        evict: Vec<Arc<str>>,
        load: Option<&Arc<str>>,
    ) {
        let endpoint = view
            .nodes
            .iter()
            .find(|known| known.name == *node)
            .and_then(|known| known.endpoint.clone());
        let Some(endpoint) = endpoint else { return };
        for (index, model) in evict.iter().enumerate() {
            if !self.fleet.usage(model).try_leave() {
                evict[..index]
                    .iter()
                    .for_each(|model| self.fleet.usage(model).stay());
                return;
            }
        }
        state.changing.insert(node.clone(), load.cloned());
        let load = load.and_then(|id| {
            config.models.get(id).map(|model| LoadModel {
                id: id.to_string(),
                source: model.source.clone(),
                context_length: model.context_length,
                quant: model.quant,
            })
        });
        tracing::info!(
            node = &**node,
            load = load.as_ref().map(|load| load.id.as_str()),
            ?evict,
            "changing models"
        );
        let job = Job {
            node: node.clone(),
            endpoint,
            evict,
            load,
            deadline: config.timeouts.load,
        };
        let (client, fleet) = (self.client.clone(), self.fleet.clone());
        jobs.spawn(async move {
            let started = Instant::now();
            let result = effects::carry_out(&client, &fleet, &job).await;
            Done {
                job,
                took: started.elapsed(),
                result,
            }
        });
    }

    fn finish(&self, state: &mut State, done: Done) {
        let Done { job, took, result } = done;
        state.changing.remove(&job.node);
        let reason = if job.load.is_some() {
            "room"
        } else {
            "defragmentation"
        };
        for model in &job.evict {
            self.fleet.usage(model).stay();
            self.metrics
                .evictions
                .with_label_values(&[&**model, &job.node, reason])
                .inc();
        }
        let outcome = if result.is_ok() { "loaded" } else { "failed" };
        if let Some(load) = &job.load {
            self.metrics
                .loads
                .with_label_values(&[&*load.id, &job.node, outcome])
                .inc();
            *state.cycles.entry(job.node.clone()).or_default() += 1;
        }
        match (result, job.load) {
            (Ok(()), Some(load)) => {
                self.metrics.load_seconds.observe(took.as_secs_f64());
                tracing::info!(
                    node = &*job.node,
                    model = load.id,
                    seconds = took.as_secs_f64(),
                    "model loaded"
                );
            }
            (Ok(()), None) => tracing::info!(node = &*job.node, "node cleared"),
            (Err(error), load) => {
                let model = load.map(|load| load.id).unwrap_or_default();
                tracing::warn!(node = &*job.node, model, %error, "change failed");
                let until = Instant::now() + BACKOFF;
                state
                    .failed
                    .insert((model.into(), job.node), (until, error.to_string()));
            }
        }
    }

    /// Clears nodes that have seen many loads and serve nobody now, so that the next loads find unbroken memory.
    fn defragment(self: &Arc<Self>, state: &mut State, jobs: &mut JoinSet<Done>, config: &Config) {
        let limit = config.eviction.defrag_after_cycles;
        if limit == 0 {
            return;
        }
        let view = self.fleet.view();
        let due: Vec<Arc<str>> = state
            .cycles
            .iter()
            .filter(|(_, cycles)| **cycles >= limit)
            .map(|(node, _)| node.clone())
            .collect();
        for name in due {
            let Some(node) = view.nodes.iter().find(|node| node.name == name) else {
                state.cycles.remove(&name);
                continue;
            };
            let circumstances = Circumstances {
                config,
                view: &view,
                usage: &|id| usage(&view, id),
                occupied: &|_| false,
                failed_on: &|_| false,
            };
            let residents = placement::residents(node, &circumstances);
            let idle = residents.iter().all(|resident| !resident.kept);
            if !idle
                || residents.is_empty()
                || state.changing.contains_key(&name)
                || !state.wanted.is_empty()
            {
                continue;
            }
            state.cycles.remove(&name);
            let all = residents
                .into_iter()
                .map(|resident| resident.model)
                .collect();
            self.begin(state, jobs, config, &view, &name, all, None);
        }
    }
}

/// Requests that use `model` here, and when the last one ended.
fn usage(view: &FleetView, model: &str) -> (usize, u64) {
    view.served(model).map_or((0, 0), |served| {
        (served.usage.active(), served.usage.last_used())
    })
}

/// A lease on a served model; `None` while it is being evicted.
fn lease(served: &Served) -> Option<Lease> {
    let guard = Box::new(served.usage.enter()?);
    Some(Lease {
        candidates: served.candidates.clone(),
        guard,
    })
}

impl Residency for Lifecycle {
    fn resident(&self, model: &Arc<str>) -> Option<Lease> {
        self.fleet.view().served(model).and_then(lease)
    }

    fn lease(&self, model: &Arc<str>) -> Leasing {
        if let Some(lease) = self.resident(model) {
            return Leasing::Ready(lease);
        }
        let config = self.config.load();
        let deadline = config.timeouts.load;
        let Some(place) = Waiting::enter(&self.waiting, config.max_waiting) else {
            let message = "too many requests wait for models to load";
            let full =
                ApiError::new(ErrorKind::RateLimited, message).retry_after(Duration::from_secs(5));
            return Leasing::Waiting(Box::pin(std::future::ready(Err(full))));
        };
        let (reply, answer) = oneshot::channel();
        let sent = self.wants.send(Want {
            model: model.clone(),
            reply,
        });
        Leasing::Waiting(Box::pin(async move {
            let _place = place; // held while waiting
            sent.map_err(|_| {
                ApiError::new(ErrorKind::Unavailable, "this gateway is shutting down")
            })?;
            match timeout(deadline, answer).await {
                Ok(Ok(answer)) => answer.map_err(ApiError::from),
                Ok(Err(_)) => Err(ApiError::new(
                    ErrorKind::Unavailable,
                    "this gateway is shutting down",
                )),
                Err(_) => {
                    let seconds = deadline.as_secs();
                    let message = format!("the model was not ready within {seconds} s");
                    Err(ApiError::new(ErrorKind::GatewayTimeout, message))
                }
            }
        }))
    }
}

/// A place among the requests that wait; given back when dropped.
struct Waiting(Arc<AtomicUsize>);

impl Waiting {
    fn enter(count: &Arc<AtomicUsize>, limit: usize) -> Option<Self> {
        let place = Self(count.clone());
        (count.fetch_add(1, Ordering::Relaxed) < limit).then_some(place)
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}
