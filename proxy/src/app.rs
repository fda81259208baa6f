//! The gateway's parts and how they hang together: the table of contents.

use crate::catalogue::Catalogue;
use crate::config::{Config, Fault, Tls};
use crate::fleet::Fleet;
use crate::lifecycle::Lifecycle;
use crate::pingora::certificates::Certificates;
use crate::pingora::client::Client;
use crate::pingora::downstream::{Intake, Serving};
use crate::pingora::upstream::Upstream;
use crate::responses::Responses;
use crate::stack::{self, StackMetrics};
use arc_swap::ArcSwap;
use filters::remember::StoreError;
use prometheus::{IntCounterVec, Opts, Registry};
use std::path::PathBuf;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::Notify;
use tokio::time::sleep;

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
    /// What the TLS listener shows.
    pub(crate) certificates: Arc<Certificates>,
    /// The files as they were when they were read last.
    seen: Mutex<Vec<Stamp>>,
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
        let seen = stamps(&config.files);
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
            certificates: Arc::default(),
            seen: Mutex::new(seen),
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
            self.reload_on_hangup(),
            self.reload_on_change()
        );
    }

    async fn reload_on_hangup(&self) {
        let mut hangup = signal(SignalKind::hangup()).expect("a process may watch this signal");
        while hangup.recv().await.is_some() {
            self.reload();
        }
    }

    /// Reloads when a file has changed and is the same at two looks: then nobody is writing it any more.
    async fn reload_on_change(&self) {
        let mut last = self.seen();
        loop {
            let Some(period) = self.config().watch else {
                sleep(Duration::from_secs(60)).await; // a reload may have them watched
                continue;
            };
            sleep(period).await;
            let now = stamps(&self.config().files);
            if now != self.seen() && now == last {
                tracing::info!("a file of the configuration has changed");
                self.reload();
            }
            last = now;
        }
    }

    fn seen(&self) -> Vec<Stamp> {
        let seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        seen.clone()
    }

    /// Reads, checks, builds, swaps. A fault changes nothing.
    fn reload(&self) {
        let old = self.config();
        // before they are read: a change after this is seen as one
        *self.seen.lock().unwrap_or_else(PoisonError::into_inner) = stamps(&old.files);
        let read = Config::read(old.file.as_deref());
        match read.and_then(|new| self.show_certificate(new, &old)) {
            Ok(new) => {
                let files = stamps(&new.files);
                if new.files != old.files {
                    *self.seen.lock().unwrap_or_else(PoisonError::into_inner) = files;
                }
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

    /// Has the TLS listener show what `new` says, if there is one.
    fn show_certificate(&self, new: Config, old: &Config) -> Result<Config, Vec<Fault>> {
        if let (Some(tls), Some(_)) = (&new.tls, &old.tls) {
            self.certificates
                .read(tls)
                .map_err(|why| vec![Fault::new(&tls.certificate, why)])?;
        }
        Ok(new)
    }

    fn apply(&self, mut new: Config, old: &Config) {
        let fixed = [
            ("gateway.listen", new.listen != old.listen),
            (
                "gateway.metrics_listen",
                new.metrics_listen != old.metrics_listen,
            ),
            ("gateway.threads", new.threads != old.threads),
            (
                "tls.listen",
                new.tls.as_ref().map(|tls| tls.listen) != old.tls.as_ref().map(|tls| tls.listen),
            ),
            (
                "gateway.upgrade_socket",
                new.upgrade_socket != old.upgrade_socket,
            ),
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
        new.tls = match (new.tls, &old.tls) {
            (Some(new), Some(old)) => Some(Tls {
                listen: old.listen,
                ..new
            }),
            (_, old) => old.clone(),
        };
        new.upgrade_socket.clone_from(&old.upgrade_socket);
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

/// When a file was changed and how long it is; `None` where it is not.
type Stamp = Option<(SystemTime, u64)>;

fn stamps(files: &[PathBuf]) -> Vec<Stamp> {
    let stamp = |path: &PathBuf| {
        let there = std::fs::metadata(path).ok()?;
        Some((there.modified().ok()?, there.len()))
    };
    files.iter().map(stamp).collect()
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
