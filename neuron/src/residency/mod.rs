//! The models on this host as a state machine: loading → loaded | failed, and unloading → gone.

mod budgets;
pub mod folder;
pub mod hub;
pub mod preflight;
mod single_file;
mod state;
#[cfg(test)]
pub(crate) mod tests;

use crate::config::{Config, HubConfig, Limits};
use crate::devices;
use crate::engine::admission::AdmissionLimits;
use crate::engine::metrics::EngineMetrics;
use crate::engine::{Engine, EngineConfig};
use crate::gpu::GpuError;
use crate::kernels::choose::Rule;
use crate::kernels::rows::Place;
use crate::model::{Batch, CausalLm, LoadError, LoadOptions, LogitRows, ModelError};
use crate::parallel::{self, CollectiveMetrics};
use budgets::{Budgets, Demand, Spread};
use folder::{FolderError, ModelText};
use hub::HubError;
pub use state::{ServedModel, unix_seconds};

use preflight::PreflightError;
use prometheus::{HistogramOpts, HistogramVec, Registry};
use protocol::node::{LoadModel, ModelStatus};
use state::{Entry, Phase};
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::watch;

/// How long a step may take where sequences write and prompts are read, beside one in which sequences only write: the
/// readers of streams hardly notice, and prompts get on.
const STRETCH: f64 = 2.5;
/// How long a reader may take nothing before its request is cut: long enough for a laptop to change networks.
const STALL_LIMIT: Duration = Duration::from_secs(60);

/// Reads a model as so many ranks, see [`parallel::load`].
pub type Loader = dyn Fn(&Path, &LoadOptions, usize, &dyn Fn(f32)) -> Result<Box<dyn CausalLm>, LoadError>
    + Send
    + Sync;

/// Tells how many bytes of weights each of so many ranks would hold, see [`preflight::weigh`].
pub type Weigh =
    dyn Fn(&Path, &LoadOptions, usize) -> Result<Vec<u64>, PreflightError> + Send + Sync;

/// Opens devices, see [`devices::open`].
pub type Opener = dyn Fn(&[String]) -> Result<Vec<Place>, GpuError> + Send + Sync;

/// Tells how many bytes are free on each of these devices; none where the system does not tell.
pub type FreeBytes = dyn Fn(&[String]) -> Vec<Option<u64>> + Send + Sync;

/// What is done with the host: everything that takes long, or that tests have no devices for.
pub struct Hands {
    /// Looks at a model's files.
    pub weigh: Box<Weigh>,
    /// Opens the devices it is to be on.
    pub open: Box<Opener>,
    /// Looks at their memory.
    pub free: Arc<FreeBytes>,
    /// Reads the model.
    pub load: Box<Loader>,
}

impl Hands {
    /// The host as it is.
    #[must_use]
    pub fn of_host() -> Self {
        Self {
            weigh: Box::new(preflight::weigh),
            open: Box::new(devices::open),
            free: Arc::new(devices::free_bytes),
            load: Box::new(parallel::load),
        }
    }
}

/// Every model the host knows. Copies share one table.
#[derive(Clone)]
pub struct Residency {
    shared: Arc<Shared>,
}

struct Shared {
    table: Mutex<Table>,
    /// The memory of devices that models share. It is held while engines let go of memory, as long as a step: only by threads
    /// that may wait.
    budgets: Mutex<Budgets>,
    hands: Hands,
    changed: watch::Sender<()>,
    limits: Limits,
    hub: HubConfig,
    drain: Duration,
    engine_metrics: EngineMetrics,
    collectives: CollectiveMetrics,
    load_seconds: HistogramVec,
}

#[derive(Default)]
struct Table {
    models: BTreeMap<String, Entry>,
    /// Set once: nothing is loaded from then on.
    closed: bool,
    next_load: u64,
}

/// A model that cannot serve a request now.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum Unavailable {
    /// No such model.
    #[error("there is no such model here")]
    Unknown,
    /// It is being read.
    #[error("the model is being loaded ({:.0} % done)", progress * 100.0)]
    Loading {
        /// Share done, 0 to 1.
        progress: f32,
    },
    /// Loading or running it failed.
    #[error("the model failed: {reason}")]
    Failed {
        /// Why.
        reason: String,
    },
    /// It is going away.
    #[error("the model is being unloaded")]
    Unloading,
}

/// A load that was not begun.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LoadRefused {
    /// The id stands for something else.
    #[error(
        "`{id}` is already here from `{source_here}` with other settings; unload it first or use another id"
    )]
    Conflict {
        /// The id.
        id: String,
        /// Where the one that is here came from.
        source_here: String,
    },
    /// The id's last load is still going away.
    #[error("`{0}` is being unloaded; load it again when it is gone")]
    Unloading(String),
    /// The daemon is stopping.
    #[error("the daemon is stopping")]
    Stopping,
}

/// Why a load failed: one line that names the file and what to change.
#[derive(Debug, thiserror::Error)]
enum LoadFailed {
    #[error(transparent)]
    Hub(#[from] HubError),
    #[error(transparent)]
    Preflight(#[from] PreflightError),
    #[error(transparent)]
    Folder(#[from] FolderError),
    #[error(transparent)]
    Model(#[from] LoadError),
    #[error(transparent)]
    Device(#[from] GpuError),
    #[error("the first step failed: {0}")]
    FirstStep(#[from] ModelError),
    #[error("no thread for the engine: {0}")]
    Thread(std::io::Error),
}

impl Residency {
    /// An empty host.
    #[must_use]
    pub fn new(config: &Config, registry: &Registry) -> Self {
        Self::with_hands(config, registry, Hands::of_host())
    }

    /// An empty host on which all is done by `hands`.
    ///
    /// # Panics
    /// When the metrics are registered twice in one registry.
    #[must_use]
    pub fn with_hands(config: &Config, registry: &Registry, hands: Hands) -> Self {
        let buckets = vec![
            0.1, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0,
        ];
        let options = HistogramOpts::new(
            "neuron_model_load_seconds",
            "From the request to load a model until it serves or has failed.",
        );
        let load_seconds = HistogramVec::new(options.buckets(buckets), &["model", "outcome"])
            .expect("names and labels are valid constants");
        registry
            .register(Box::new(load_seconds.clone()))
            .expect("each family is registered once");
        Self {
            shared: Arc::new(Shared {
                table: Mutex::default(),
                budgets: Mutex::new(Budgets::new(hands.free.clone())),
                hands,
                changed: watch::channel(()).0,
                limits: config.limits,
                hub: config.hub.clone(),
                drain: config.drain,
                engine_metrics: EngineMetrics::register(registry),
                collectives: CollectiveMetrics::register(registry),
                load_seconds,
            }),
        }
    }

    /// The model `id`, if it serves.
    ///
    /// # Errors
    /// Why it does not.
    pub fn get(&self, id: &str) -> Result<Arc<ServedModel>, Unavailable> {
        let table = self.shared.table();
        let entry = table.models.get(id).ok_or(Unavailable::Unknown)?;
        match &entry.phase {
            Phase::Loading => Err(Unavailable::Loading {
                progress: entry.progress(),
            }),
            Phase::Failed(reason) => Err(Unavailable::Failed {
                reason: reason.clone(),
            }),
            Phase::Unloading(_) => Err(Unavailable::Unloading),
            Phase::Loaded(model) => match model.engine.fault() {
                Some(reason) => Err(Unavailable::Failed {
                    reason: reason.to_owned(),
                }),
                None => Ok(model.clone()),
            },
        }
    }

    /// Begins to load a model and returns at once; joins a load of the same that is on its way or done.
    /// Must be called within a tokio runtime.
    ///
    /// # Errors
    /// When the id is taken by something else.
    pub fn load(&self, wanted: LoadModel) -> Result<ModelStatus, LoadRefused> {
        let mut table = self.shared.table();
        if table.closed {
            return Err(LoadRefused::Stopping);
        }
        if let Some(entry) = table.models.get(&wanted.id) {
            match entry.phase {
                Phase::Unloading(_) => return Err(LoadRefused::Unloading(wanted.id)),
                Phase::Failed(_) => {}
                Phase::Loaded(ref model) if model.engine.fault().is_some() => {}
                Phase::Loading | Phase::Loaded(_) => {
                    let same_length = wanted.context_length.is_none()
                        || wanted.context_length == entry.wanted.context_length;
                    let same_format = wanted.quant.is_none() || wanted.quant == entry.wanted.quant;
                    let same_ranks = wanted.tensor_parallel.is_none()
                        || wanted.tensor_parallel == entry.wanted.tensor_parallel;
                    let same_devices =
                        wanted.devices.is_empty() || wanted.devices == entry.wanted.devices;
                    let same = same_length && same_format && same_ranks && same_devices;
                    if wanted.source == entry.wanted.source && same {
                        return Ok(entry.status());
                    }
                    return Err(LoadRefused::Conflict {
                        id: wanted.id,
                        source_here: entry.wanted.source.clone(),
                    });
                }
            }
        }
        table.next_load += 1;
        let entry = Entry {
            load: table.next_load,
            wanted: wanted.clone(),
            phase: Phase::Loading,
            since: unix_seconds(),
            progress: Arc::default(),
        };
        let (load, progress, status) = (entry.load, entry.progress.clone(), entry.status());
        table.models.insert(wanted.id.clone(), entry);
        drop(table);
        tracing::info!(model = wanted.id, source = wanted.source, "loading");
        let shared = self.shared.clone();
        tokio::spawn(async move { shared.carry_out(load, wanted, progress).await });
        Ok(status)
    }

    /// Lets a model go once its requests have ended, at the latest after the configured time to drain.
    /// None when there is no such model. Must be called within a tokio runtime.
    #[must_use]
    pub fn unload(&self, id: &str) -> Option<ModelStatus> {
        let mut table = self.shared.table();
        let entry = table.models.get_mut(id)?;
        let load = entry.load;
        match &entry.phase {
            Phase::Unloading(_) => {}
            Phase::Loading => {
                // The load sees it when it is done.
                entry.begin_unloading(None);
            }
            Phase::Failed(_) => {
                entry.begin_unloading(None);
                let status = entry.status();
                table.models.remove(id);
                return Some(status);
            }
            Phase::Loaded(model) => {
                let model = model.clone();
                entry.begin_unloading(Some(model.clone()));
                let shared = self.shared.clone();
                tokio::spawn(async move {
                    model.engine.drain(shared.drain).await;
                    shared.share_without(load).await;
                    shared.forget(&model.id, load);
                });
            }
        }
        let status = entry.status();
        drop(table);
        tracing::info!(model = id, "unloading");
        self.shared.changed.send_replace(());
        Some(status)
    }

    /// Every model, sorted by id.
    #[must_use]
    pub fn statuses(&self) -> Vec<ModelStatus> {
        self.shared
            .table()
            .models
            .values()
            .map(Entry::status)
            .collect()
    }

    /// One model.
    #[must_use]
    pub fn status(&self, id: &str) -> Option<ModelStatus> {
        self.shared.table().models.get(id).map(Entry::status)
    }

    /// Waits until `done` is true of the models; looks again at each change of state.
    pub async fn wait_until(&self, mut done: impl FnMut(&[ModelStatus]) -> bool) {
        let mut changed = self.shared.changed.subscribe();
        while !done(&self.statuses()) {
            if changed.changed().await.is_err() {
                return;
            }
        }
    }

    /// Loads nothing from now on, and drains every model.
    pub async fn close(&self) {
        let ids: Vec<String> = {
            let mut table = self.shared.table();
            table.closed = true;
            table.models.keys().cloned().collect()
        };
        for id in ids {
            // Gone in between is gone.
            let _ = self.unload(&id);
        }
        // A load that is still reading cannot be interrupted: the process may end under it.
        self.wait_until(|models| models.iter().all(|model| model.devices.is_empty()))
            .await;
    }
}

/// Runs the largest step that reads a prompt, and one that writes, where the model is on devices: after them all memory that
/// results pass through is taken, so that what is free is free, and kernels are compiled before the first request.
fn warm_up(model: &dyn CausalLm, rows: usize) -> Result<(), ModelError> {
    if !model.pool().is_on_device() {
        return Ok(());
    }
    let mut state = model.new_state();
    let ids = vec![0; rows.min(model.context_length() - 1).max(1)];
    for ids in [&ids[..], &[0]] {
        let batch = Batch::single(ids, LogitRows::Last);
        let vocab = model.vocab_size();
        model.forward_chosen(&batch, &mut [&mut state], &[Rule::likeliest()], vocab)?;
    }
    Ok(())
}

impl Shared {
    fn table(&self) -> MutexGuard<'_, Table> {
        // Each change to the table is a single assignment, so a panic cannot leave it half done.
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The budgets, held.
    fn budgets(&self) -> MutexGuard<'_, Budgets> {
        // A budget that was not told to its engine is told with the next change.
        self.budgets.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Shares out among the others what a load had that is over.
    async fn share_without(self: &Arc<Self>, load: u64) {
        let shared = self.clone();
        let leave = move || shared.budgets().leave(load);
        let shared_out = tokio::task::spawn_blocking(leave).await;
        if let Err(error) = shared_out {
            tracing::error!(%error, "memory was not shared anew");
        }
    }

    async fn carry_out(self: Arc<Self>, load: u64, wanted: LoadModel, progress: Arc<AtomicU32>) {
        let began = Instant::now();
        let id = wanted.id.clone();
        let shared = self.clone();
        let outcome = tokio::task::spawn_blocking(move || {
            shared
                .read(load, &wanted, &progress)
                .map_err(|error| error.to_string())
        })
        .await
        .unwrap_or_else(|error| Err(format!("loading panicked: {error}")));
        let seconds = began.elapsed().as_secs_f64();
        let label = if outcome.is_ok() { "loaded" } else { "failed" };
        self.load_seconds
            .with_label_values(&[id.as_str(), label])
            .observe(seconds);
        let told = outcome.as_ref().map(|model| model.context_length);
        let told = told.map_err(Clone::clone);
        let phase = match outcome {
            Ok(model) => Phase::Loaded(Arc::new(model)),
            Err(reason) => {
                self.share_without(load).await;
                Phase::Failed(reason)
            }
        };
        let settled = self.settle(&id, load, phase);
        // said when it is so: whoever reads it may ask for the model
        match (&settled, told) {
            (None, Ok(context_length)) => {
                tracing::info!(model = id, seconds, context_length, "loaded");
            }
            (_, Err(reason)) => tracing::error!(model = id, reason, "loading failed"),
            (Some(_), Ok(_)) => {}
        }
        if let Some(unwanted) = settled {
            if let Phase::Loaded(model) = unwanted {
                model.engine.drain(Duration::ZERO).await; // it has no request
                self.share_without(load).await;
            }
            self.forget(&id, load);
        }
        self.changed.send_replace(());
    }

    /// Takes in where a load has led. Gives it back when the model is to be unloaded meanwhile.
    fn settle(&self, id: &str, load: u64, phase: Phase) -> Option<Phase> {
        let mut table = self.table();
        let entry = table.models.get_mut(id);
        let entry = entry.filter(|entry| entry.load == load);
        let Some(entry) = entry.filter(|entry| matches!(entry.phase, Phase::Loading)) else {
            return Some(phase);
        };
        entry.since = unix_seconds();
        entry.phase = phase;
        None
    }

    /// Everything between an id and an engine. Takes as long as the disk, or the hub.
    fn read(
        &self,
        load: u64,
        wanted: &LoadModel,
        progress: &Arc<AtomicU32>,
    ) -> Result<ServedModel, LoadFailed> {
        let folder = hub::resolve(&wanted.source, &self.hub)?;
        let ranks = wanted.ranks();
        let devices = devices::choose(&wanted.devices, ranks);
        let options = LoadOptions {
            places: (self.hands.open)(&devices)?,
            context_length: wanted
                .context_length
                .map(|length| usize::try_from(length).unwrap_or(usize::MAX)),
            drafts: self.limits.draft_tokens > 0,
            quant: wanted.quant,
            collectives: Some(self.collectives.of(&wanted.id)),
        };
        let parts = (self.hands.weigh)(&folder, &options, ranks)?;
        let spread = Spread::over(&devices);
        let weights = spread.together(&parts);
        {
            let mut budgets = self.budgets();
            let room = budgets.room_for_weights(&spread);
            preflight::check_weights(&folder, weights, room)?;
            budgets.reserve(load, spread.clone(), weights, progress.clone());
        }
        let text = ModelText::load(&folder)?;
        let model = (self.hands.load)(&folder, &options, ranks, &|share| {
            progress.store(share.to_bits(), Ordering::Relaxed);
        })?;
        let context_length = model.context_length();
        let (weight_bytes, ranks) = (model.weight_bytes(), model.ranks());
        let demand = Demand::of(&*model, self.limits, &devices);
        warm_up(&*model, demand.prefill_tokens)?;
        // nobody else may be given what this model is until its engine is known
        let mut budgets = self.budgets();
        let room = budgets.room_for_states(load, &spread);
        let room = room.min(self.limits.state_bytes.unwrap_or(u64::MAX));
        preflight::check_context(&folder, context_length, room, |tokens| {
            demand.sequence_bytes(&*model, tokens)
        })?;
        let bounds = budgets.admit(load, spread, demand);
        let engine_config = EngineConfig {
            id: wanted.id.clone(),
            vocab: text.tokenizer.vocab_size(),
            admission: AdmissionLimits {
                max_waiting: self.limits.max_waiting,
                max_prompt_tokens: self.limits.max_queued_prompt_tokens,
            },
            bounds,
            stretch: STRETCH,
            stall_limit: STALL_LIMIT,
        };
        let metrics = self.engine_metrics.of(&wanted.id);
        let engine = Engine::start(model, engine_config, metrics).map_err(LoadFailed::Thread)?;
        budgets.started(load, engine.clone());
        drop(budgets);
        Ok(ServedModel {
            id: wanted.id.clone(),
            text,
            engine,
            context_length,
            weight_bytes,
            devices,
            ranks,
            created: unix_seconds(),
        })
    }

    fn forget(&self, id: &str, load: u64) {
        let mut table = self.table();
        if table.models.get(id).is_some_and(|entry| entry.load == load) {
            table.models.remove(id);
        }
        drop(table);
        tracing::info!(model = id, "unloaded");
        self.changed.send_replace(());
    }
}
