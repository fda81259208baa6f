//! Which models are resident where. One loop owns every change; everybody else asks it and waits.

use crate::config::Config;
use crate::fleet::{Fleet, FleetView, Served};
use crate::pingora::client::Client;
use arc_swap::ArcSwap;
use effects::{Failed, Job};
use filters::residency::{Lease, Leasing, Progress, Residency};
use filters::route::{self, Replica};
use ledger::Change;
use placement::{Use, World};
use prometheus::core::Collector;
use prometheus::{Histogram, HistogramOpts, IntCounterVec, IntGauge, Opts, Registry};
use protocol::node::{LoadModel, ModelState};
use protocol::{ApiError, ErrorKind};
use schedule::{Ended, Hands, Refusal, Schedule};
use std::collections::HashMap;
use std::num::NonZeroU32;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinSet;
use tokio::time::{Instant, interval, timeout};

#[cfg(test)]
mod day;
mod effects;
mod eviction;
mod ledger;
mod placement;
pub(crate) mod plan;
mod schedule;
#[cfg(test)]
mod tests;

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
    /// Models that were refused lately, and until when that counts.
    hopeless: Mutex<HashMap<Arc<str>, Instant>>,
    metrics: Metrics,
}

/// A request that waits for a model.
struct Want {
    model: Arc<str>,
    reply: Waiter,
}

type Waiter = oneshot::Sender<Result<Lease, Refusal>>;

struct Metrics {
    loads: IntCounterVec,
    evictions: IntCounterVec,
    load_seconds: Histogram,
    waiting: IntGauge,
}

impl Metrics {
    fn new(registry: &Registry) -> Self {
        fn enter<C: Collector + Clone + 'static>(
            registry: &Registry,
            family: prometheus::Result<C>,
        ) -> C {
            let family = family.expect("names and labels are constants");
            registry
                .register(Box::new(family.clone()))
                .expect("one lifecycle a registry");
            family
        }
        let counter = |name, help, labels: &[&str]| {
            enter(registry, IntCounterVec::new(Opts::new(name, help), labels))
        };
        let opts = HistogramOpts::new(
            "cortex_model_load_seconds",
            "From deciding to load a model to its being served",
        )
        .buckets(vec![
            0.1, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0,
        ]);
        Self {
            loads: counter(
                "cortex_model_loads_total",
                "Loads that this gateway asked for, by how they ended",
                &["model", "node", "outcome"],
            ),
            evictions: counter(
                "cortex_model_evictions_total",
                "Models this gateway had unloaded: for room, when idle, as a replica too many, for defragmentation",
                &["model", "node", "reason"],
            ),
            load_seconds: enter(registry, Histogram::with_opts(opts)),
            waiting: enter(
                registry,
                IntGauge::new(
                    "cortex_requests_waiting",
                    "Requests that wait for a model to be loaded",
                ),
            ),
        }
    }
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
            hopeless: Mutex::default(),
            metrics: Metrics::new(registry),
        })
    }

    /// Whether `model` was asked for lately and could not be had.
    pub(crate) fn is_hopeless(&self, model: &str) -> bool {
        let mut hopeless = self.hopeless.lock().unwrap_or_else(PoisonError::into_inner);
        hopeless.retain(|_, until| *until > Instant::now());
        hopeless.contains_key(model)
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
        let mut schedule: Schedule<Waiter> = Schedule::default();
        let mut jobs: JoinSet<Done> = JoinSet::new();
        let mut tick = interval(TICK);
        loop {
            let mut tidy = false;
            tokio::select! {
                Some(want) = inbox.recv() => {
                    schedule.want(want.model, want.reply);
                    // all that came together are decided about together
                    while let Ok(want) = inbox.try_recv() {
                        schedule.want(want.model, want.reply);
                    }
                }
                Some(done) = jobs.join_next() => {
                    self.finish(&mut schedule, done.expect("jobs do not panic"));
                }
                () = self.fleet.changed() => {}
                _ = tick.tick() => tidy = true,
            }
            let (config, view) = (self.config.load_full(), self.fleet.view());
            let world = World {
                config: &config,
                nodes: &view.nodes,
                now: route::now(),
                usage: &|node, model| usage(&view, node, model),
                leases: &|model| view.served(model).map_or(0, |served| served.usage.active()),
            };
            let mut hands = Reach {
                lifecycle: self,
                config: &config,
                view: &view,
                jobs: &mut jobs,
            };
            schedule.step(&world, &mut hands);
            if tidy {
                schedule.tidy(&world, &mut hands);
            }
        }
    }

    fn finish(&self, schedule: &mut Schedule<Waiter>, done: Done) {
        let Done { job, took, result } = done;
        let node = &*job.node;
        for (model, replica) in &job.evict {
            replica.stay();
            // the model as a whole may still be leaving: another node's change says so when it ends
            let view = self.fleet.view();
            let leaves = view.served(model).is_some_and(|served| {
                let mut replicas = served.candidates.iter();
                replicas.any(|candidate| candidate.replica.is_leaving())
            });
            if !leaves {
                self.fleet.usage(model).stay();
            }
            let labels = &[&**model, node, job.reason.name()];
            self.metrics.evictions.with_label_values(labels).inc();
        }
        let loaded = job.load.as_ref().map(|load| load.id.as_str());
        if let Some(model) = loaded {
            let outcome = if result.is_ok() { "loaded" } else { "failed" };
            let labels = &[model, node, outcome];
            self.metrics.loads.with_label_values(labels).inc();
        }
        let seconds = took.as_secs_f64();
        let model = loaded.unwrap_or_default();
        match &result {
            Ok(()) if loaded.is_some() => {
                self.metrics.load_seconds.observe(seconds);
                tracing::info!(node, model, seconds, "model loaded");
            }
            Ok(()) => tracing::info!(node, reason = job.reason.name(), "models unloaded"),
            Err(error) => tracing::warn!(node, model, %error, "change failed"),
        }
        let evict: Vec<Arc<str>> = job.evict.iter().map(|(model, _)| model.clone()).collect();
        schedule.ended(Ended {
            node: &job.node,
            load: loaded,
            evict: &evict,
            failure: result.err().map(|error| error.to_string()),
            now: route::now(),
        });
    }
}

/// The schedule's hands on the real fleet.
struct Reach<'a> {
    lifecycle: &'a Lifecycle,
    config: &'a Config,
    view: &'a FleetView,
    jobs: &'a mut JoinSet<Done>,
}

impl Reach<'_> {
    /// Whether another node goes on serving `model` when `node` does not.
    fn stays_elsewhere(&self, node: &str, model: &str) -> bool {
        self.view.served(model).is_some_and(|served| {
            let mut others = served.candidates.iter();
            others.any(|other| *other.endpoint.node != *node && !other.replica.is_leaving())
        })
    }

    fn leave_one(&self, node: &Arc<str>, model: &Arc<str>, drain: bool) -> bool {
        let fleet = &self.lifecycle.fleet;
        let replica = fleet.replica(node, model);
        if self.stays_elsewhere(node, model) {
            if drain {
                replica.retire();
                return true;
            }
            return replica.try_leave();
        }
        let usage = fleet.usage(model);
        let free = usage.try_leave();
        if free && !replica.try_leave() {
            usage.stay();
            return false;
        }
        free
    }
}

impl Hands<Waiter> for Reach<'_> {
    fn serve(&mut self, model: &Arc<str>, waiter: Waiter) -> Option<Waiter> {
        match self.view.served(model).and_then(lease) {
            Some(lease) => {
                drop(waiter.send(Ok(lease))); // a waiter may have left
                None
            }
            None => Some(waiter),
        }
    }

    fn refuse(&mut self, model: &Arc<str>, waiters: Vec<Waiter>, refusal: &Refusal) {
        let lifecycle = self.lifecycle;
        let until = Instant::now() + schedule::BACKOFF;
        lifecycle
            .hopeless
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .insert(model.clone(), until);
        for waiter in waiters {
            let _ = waiter.send(Err(refusal.clone())); // a waiter may have left
        }
    }

    fn has_left(&self, waiter: &Waiter) -> bool {
        waiter.is_closed()
    }

    fn leave(&mut self, node: &Arc<str>, models: &[Arc<str>], drain: bool) -> bool {
        for (index, model) in models.iter().enumerate() {
            if !self.leave_one(node, model, drain) {
                for left in &models[..index] {
                    self.lifecycle.fleet.usage(left).stay();
                    self.lifecycle.fleet.replica(node, left).stay();
                }
                return false;
            }
        }
        true
    }

    fn begin(&mut self, change: &Change) {
        let fleet = &self.lifecycle.fleet;
        let view = self.view.nodes.iter().find(|node| node.name == change.node);
        let (view, endpoint) = view
            .and_then(|node| Some((node, node.endpoint.clone()?)))
            .expect("changes are made to nodes that can be reached");
        let model = change.load.as_ref();
        let load = model.and_then(|id| {
            let model = self.config.models.get(id)?;
            // where there is no choice, none is made: older nodes know of none
            let devices = if view.devices.len() > 1 && change.share.is_some() {
                change.devices.iter().map(ToString::to_string).collect()
            } else {
                Vec::new()
            };
            Some(LoadModel {
                id: id.to_string(),
                source: model.source.clone(),
                context_length: model.context_length,
                quant: model.quant,
                // as with devices: who shares nothing need not know that it could
                tensor_parallel: u32::try_from(model.tensor_parallel)
                    .ok()
                    .and_then(NonZeroU32::new)
                    .filter(|ranks| ranks.get() > 1),
                devices,
            })
        });
        let evict = change.evict.iter();
        let evict: Vec<(Arc<str>, Arc<Replica>)> = evict
            .map(|model| (model.clone(), fleet.replica(&change.node, model)))
            .collect();
        tracing::info!(
            node = &*change.node,
            load = model.map(|id| &**id),
            evict = ?change.evict,
            devices = ?change.devices,
            reason = change.reason.name(),
            "changing models"
        );
        let job = Job {
            node: change.node.clone(),
            endpoint,
            evict,
            load,
            reason: change.reason,
            deadline: self.config.timeouts.load,
        };
        let (client, fleet) = (self.lifecycle.client.clone(), fleet.clone());
        self.jobs.spawn(async move {
            let started = Instant::now();
            let result = effects::carry_out(&client, &fleet, &job).await;
            let took = started.elapsed();
            Done { job, took, result }
        });
    }
}

/// How this gateway uses `model` on `node`.
fn usage(view: &FleetView, node: &str, model: &str) -> Use {
    let Some(served) = view.served(model) else {
        return Use::default();
    };
    let there = |candidate: &&route::Candidate| *candidate.endpoint.node == *node;
    let replica = served.candidates.iter().find(there);
    replica.map_or_else(Use::default, |candidate| Use {
        active: candidate.replica.in_flight(),
        last_used: candidate.replica.last_used(),
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

    fn progress(&self, model: &str) -> Option<Progress> {
        let view = self.fleet.view();
        if view.served(model).is_some() {
            return None;
        }
        let held = view.nodes.iter().filter_map(|node| node.model(model));
        let loading = held.filter(|status| status.state == ModelState::Loading);
        let furthest = loading.map(|status| status.progress).reduce(f32::max);
        Some(furthest.map_or(Progress::Queued, Progress::Loading))
    }

    fn lease(&self, model: &Arc<str>) -> Leasing {
        if let Some(lease) = self.resident(model) {
            return Leasing::Ready(lease);
        }
        let config = self.config.load();
        let deadline = config.timeouts.load;
        let gauge = self.metrics.waiting.clone();
        let Some(place) = Waiting::enter(&self.waiting, gauge, config.max_waiting) else {
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
struct Waiting {
    count: Arc<AtomicUsize>,
    gauge: IntGauge,
}

impl Waiting {
    fn enter(count: &Arc<AtomicUsize>, gauge: IntGauge, limit: usize) -> Option<Self> {
        gauge.inc();
        let place = Self {
            count: count.clone(),
            gauge,
        };
        (count.fetch_add(1, Ordering::Relaxed) < limit).then_some(place)
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        self.gauge.dec();
        self.count.fetch_sub(1, Ordering::Relaxed);
    }
}
