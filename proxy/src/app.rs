//! The gateway's parts and how they hang together: the table of contents.

use crate::catalogue::Catalogue;
use crate::config::{Config, Fault};
use crate::fleet::Fleet;
use crate::lifecycle::Lifecycle;
use crate::pingora::client::Client;
use crate::pingora::downstream::{Intake, Serving};
use crate::pingora::upstream::Upstream;
use crate::responses::Responses;
use crate::stack::{self, StackMetrics};
use arc_swap::ArcSwap;
use filters::remember::StoreError;
use prometheus::{IntCounterVec, Opts, Registry};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::Notify;

/// Idle connections kept to nodes.
const POOL: usize = 1024;

/// Everything that outlives a reload, and the one pointer that a reload swaps.
pub(crate) struct App {
    /// What serves requests now.
    pub(crate) serving: Arc<ArcSwap<Serving>>,
    pub(crate) metrics: StackMetrics,
    pub(crate) registry: Registry,
    pub(crate) fleet: Arc<Fleet>,
    /// Set when no new requests are taken.
    pub(crate) draining: Arc<AtomicBool>,
    /// Rung to stop the process from inside.
    pub(crate) stop: Arc<Notify>,
    config: Arc<ArcSwap<Config>>,
    pub(crate) lifecycle: Arc<Lifecycle>,
    upstream: Upstream,
    responses: Arc<Responses>,
    reloads: IntCounterVec,
}

/// Why the parts could not be put together.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BuildError {
    #[error("responses.path = \"{}\" cannot be opened: {}", .0.display(), .1.0)]
    Responses(PathBuf, StoreError),
}

impl App {
    /// Puts the parts together. Nothing runs yet.
    ///
    /// # Errors
    /// When the file of responses cannot be opened.
    pub(crate) fn build(config: Config) -> Result<Arc<Self>, BuildError> {
        let registry = Registry::new();
        let metrics = StackMetrics::new(&registry);
        let reloads = IntCounterVec::new(
            Opts::new("cortex_config_reloads_total", "Reloads, by how they ended"),
            &["outcome"],
        )
        .expect("name and label are constants");
        registry
            .register(Box::new(reloads.clone()))
            .expect("entered once");
        for outcome in ["applied", "refused"] {
            reloads.with_label_values(&[outcome]); // shown from the start, at zero
        }
        // nodes are asked and told over connections of their own: those of requests live on other threads
        let control = Client::new(config.timeouts.connect, 64);
        let upstream = Upstream::new(Client::new(config.timeouts.connect, POOL));
        let fleet = Fleet::new(control.clone(), &config.neurons, config.poll, &registry);
        let kept = &config.responses;
        let responses = Responses::open(kept.path.as_deref(), kept.bounds, &registry)
            .map_err(|error| BuildError::Responses(kept.path.clone().unwrap_or_default(), error))?;
        let config = Arc::new(ArcSwap::from_pointee(config));
        let lifecycle = Lifecycle::new(config.clone(), fleet.clone(), control, &registry);
        let serving = serving(
            &config.load_full(),
            &metrics,
            &fleet,
            &lifecycle,
            &responses,
            &upstream,
        );
        Ok(Arc::new(Self {
            serving: Arc::new(ArcSwap::from_pointee(serving)),
            metrics,
            registry,
            fleet,
            draining: Arc::default(),
            stop: Arc::default(),
            config,
            lifecycle,
            upstream,
            responses,
            reloads,
        }))
    }

    /// The configuration in force.
    pub(crate) fn config(&self) -> Arc<Config> {
        self.config.load_full()
    }

    /// Polls the fleet, keeps models where they are wanted, and reloads on SIGHUP. Never ends.
    pub(crate) async fn run_background(&self) {
        tokio::join!(
            self.fleet.run(),
            self.lifecycle.run(),
            self.upstream.close_old(),
            self.reload_on_hangup()
        );
    }

    async fn reload_on_hangup(&self) {
        let mut hangup = signal(SignalKind::hangup()).expect("a process may watch this signal");
        while hangup.recv().await.is_some() {
            self.reload();
        }
    }

    /// Reads, checks, builds, swaps. A fault changes nothing.
    fn reload(&self) {
        let old = self.config();
        match Config::read(old.file.as_deref()) {
            Ok(new) => {
                self.apply(new, &old);
                self.reloads.with_label_values(&["applied"]).inc();
                tracing::info!("configuration reloaded");
            }
            Err(faults) => {
                self.reloads.with_label_values(&["refused"]).inc();
                let faults: Vec<String> = faults.iter().map(Fault::to_string).collect();
                tracing::warn!(
                    faults = faults.join("; "),
                    "configuration not reloaded, the old one stays"
                );
            }
        }
    }

    fn apply(&self, mut new: Config, old: &Config) {
        let fixed = [
            ("gateway.listen", new.listen != old.listen),
            (
                "gateway.metrics_listen",
                new.metrics_listen != old.metrics_listen,
            ),
            ("gateway.threads", new.threads != old.threads),
            ("tls", new.tls != old.tls),
            (
                "timeouts.connect",
                new.timeouts.connect != old.timeouts.connect,
            ),
            ("responses.path", new.responses.path != old.responses.path),
        ];
        for (key, _) in fixed.iter().filter(|(_, changed)| *changed) {
            tracing::warn!("{key} needs a restart to change");
        }
        (new.listen, new.metrics_listen, new.threads) =
            (old.listen, old.metrics_listen, old.threads);
        new.tls.clone_from(&old.tls);
        if new.routing == old.routing {
            new.policy = old.policy.clone(); // it remembers
        }
        new.responses.path.clone_from(&old.responses.path);
        self.responses.set_bounds(new.responses.bounds);
        let new = Arc::new(new);
        self.fleet.set_members(&new.neurons, new.poll);
        let serving = serving(
            &new,
            &self.metrics,
            &self.fleet,
            &self.lifecycle,
            &self.responses,
            &self.upstream,
        );
        self.config.store(new);
        self.serving.store(Arc::new(serving));
    }
}

/// What serves requests under one configuration.
fn serving(
    config: &Arc<Config>,
    metrics: &StackMetrics,
    fleet: &Arc<Fleet>,
    lifecycle: &Arc<Lifecycle>,
    responses: &Arc<Responses>,
    upstream: &Upstream,
) -> Serving {
    let catalogue = Arc::new(Catalogue::new(
        config.clone(),
        fleet.clone(),
        lifecycle.clone(),
    ));
    Serving {
        stack: stack::build(
            config,
            metrics,
            catalogue,
            responses.clone(),
            lifecycle.clone(),
            upstream.clone(),
        ),
        intake: Intake {
            max_body: config.max_body,
            body_deadline: config.timeouts.request_body,
        },
    }
}
