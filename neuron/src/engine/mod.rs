//! The engine of one model: a handle for everybody, and one thread that owns the model and everything on it.

pub mod admission;
mod drafts;
pub mod guide;
pub mod metrics;
pub mod pace;
pub mod plan;
pub mod prefix;
pub mod request;
mod runner;
pub mod sampler;
pub mod scheduler;
pub mod sequence;
mod worker;

#[cfg(test)]
pub(crate) mod fake;
#[cfg(test)]
mod tests;

use crate::model::CausalLm;
use admission::{Admission, AdmissionLimits, Rejected, Ticket};
use metrics::ModelMetrics;
use request::{Events, Request, Sink, channel};
use sequence::SequenceId;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel as inbox};
use std::sync::{Arc, OnceLock};
use std::time::Duration;
use tokio::sync::watch;
use worker::Worker;
pub(crate) use {drafts::MOST_GUESSED, worker::words};

/// What an engine needs to know beside its model.
#[derive(Debug, Clone)]
pub struct EngineConfig {
    /// The model's name, for logs.
    pub id: String,
    /// Only ids below this may be sampled.
    pub vocab: usize,
    /// How much may wait.
    pub admission: AdmissionLimits,
    /// Bounds on a step and on what runs.
    pub bounds: scheduler::Bounds,
    /// How long a step may take where sequences write and prompts are read, beside one in which sequences only write;
    /// infinite: prompts are read as if nobody wrote.
    pub stretch: f64,
    /// How long a reader may take nothing before its request is cut.
    pub stall_limit: Duration,
}

/// The handle of a running engine. All copies speak to the same thread.
#[derive(Debug, Clone)]
pub struct Engine {
    inbox: Sender<Command>,
    admission: Arc<Admission>,
    fault: Arc<OnceLock<String>>,
    ended: watch::Receiver<bool>,
    next: Arc<AtomicU64>,
    held: Arc<AtomicU64>,
}

/// What the thread can be told.
#[derive(Debug)]
enum Command {
    /// A request that was admitted.
    Submit(SequenceId, Box<Request>, Sink, Ticket),
    /// A reader left.
    Cancel(SequenceId),
    /// Somebody else wants a request to end; its reader is told.
    Abort(SequenceId),
    /// A reader that was behind has room again.
    Resume(SequenceId),
    /// Stay within other bounds from now on, and hang up when all is within them.
    Bound(scheduler::Bounds, Sender<()>),
    /// Finish what runs and waits, then end.
    Drain,
    /// End now; what runs fails.
    Stop,
}

impl Engine {
    /// Starts the thread that owns `model`.
    ///
    /// # Errors
    /// When the system gives no thread.
    pub fn start(
        model: Box<dyn CausalLm>,
        config: EngineConfig,
        metrics: ModelMetrics,
    ) -> std::io::Result<Self> {
        let (sender, receiver) = inbox();
        let (ended_sender, ended) = watch::channel(false);
        let admission = Arc::new(Admission::new(config.admission, metrics.clone()));
        let fault = Arc::new(OnceLock::new());
        let engine = Self {
            inbox: sender,
            admission: admission.clone(),
            fault: fault.clone(),
            ended,
            next: Arc::default(),
            held: Arc::default(),
        };
        let held = engine.held.clone();
        let blocks = config.bounds.blocks; // known before the thread begins
        metrics
            .blocks
            .set(i64::try_from(blocks).unwrap_or(i64::MAX));
        std::thread::Builder::new()
            .name(format!("engine {}", config.id))
            .spawn(move || {
                let id = config.id.clone();
                let worker = Worker::new(model, config, metrics, receiver, held.clone());
                if let Err(reason) = worker.run() {
                    tracing::error!(model = id, reason, "engine failed");
                    let _ = fault.set(reason);
                }
                admission.close();
                held.store(0, Ordering::Relaxed); // it went with the worker
                // The handles may be gone; then nobody waits.
                let _ = ended_sender.send(true);
            })?;
        Ok(engine)
    }

    /// Whether a request could be taken now; asked before the work of making its prompt.
    ///
    /// # Errors
    /// Why it could not.
    pub fn check(&self) -> Result<(), Rejected> {
        self.admission.check()
    }

    /// Takes a request. Dropping the [`Events`] cancels it.
    ///
    /// # Errors
    /// When it may not wait.
    pub fn submit(&self, request: Request) -> Result<Events, Rejected> {
        let ticket = self.admission.admit(request.prompt.len())?;
        let id = SequenceId(self.next.fetch_add(1, Ordering::Relaxed));
        let (sink, events) = channel(id, self.inbox.clone());
        self.inbox
            .send(Command::Submit(id, Box::new(request), sink, ticket))
            .map_err(|_| Rejected::Closed)?;
        Ok(events)
    }

    /// Requests that wait or run.
    #[must_use]
    pub fn in_flight(&self) -> u64 {
        self.admission.in_flight()
    }

    /// Bounds its states anew, from its next step on: what is kept for later goes first, then the youngest of those that
    /// run are set back and begin again when there is room. No answer changes. `bounds` must have room for one sequence of
    /// full length. The receiver hangs up when all is within them, or when the engine has ended.
    pub fn set_bounds(&self, bounds: scheduler::Bounds) -> Receiver<()> {
        let (done, within) = inbox();
        // A thread that is gone holds nothing, and has hung up.
        let _ = self.inbox.send(Command::Bound(bounds, done));
        within
    }

    /// Bytes its states held after its last step, memory for the next ones included.
    #[must_use]
    pub fn held_bytes(&self) -> u64 {
        self.held.load(Ordering::Relaxed)
    }

    /// Whether its thread has ended and all its memory is free.
    #[must_use]
    pub fn has_ended(&self) -> bool {
        *self.ended.borrow()
    }

    /// Why the engine failed, if it did.
    #[must_use]
    pub fn fault(&self) -> Option<&str> {
        self.fault.get().map(String::as_str)
    }

    /// Takes no more requests, lets those it has finish within `bound`, cuts the rest, and frees the model.
    pub async fn drain(&self, bound: Duration) {
        self.admission.close();
        let mut ended = self.ended.clone();
        // A thread that is gone has nothing to drain, and its watch says so.
        let _ = self.inbox.send(Command::Drain);
        let in_time = tokio::time::timeout(bound, ended.wait_for(|ended| *ended))
            .await
            .is_ok();
        if !in_time {
            let _ = self.inbox.send(Command::Stop);
            let _ = ended.wait_for(|ended| *ended).await;
        }
    }
}
