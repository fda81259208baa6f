//! One rank beside the first: a thread that owns its part of the model, and the handle that tells it what to do.

use super::{Communicator, DEADLINE, GroupError};
use crate::memory::SequenceState;
use crate::memory::pool::KvPool;
use crate::model::{Batch, CausalLm, LoadError, ModelError};
use candle_core::Tensor;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};

/// Reads one rank's part of a model, and says how far it is.
pub(super) type LoadPart = dyn Fn(Arc<dyn Communicator>, &dyn Fn(f32)) -> Result<Box<dyn CausalLm>, LoadError>
    + Send
    + Sync;

/// What all ranks do next: the same rows, each with its own part of the states.
pub(super) struct Step {
    pub(super) work: Work,
    pub(super) batch: Arc<Batch>,
    /// This rank's parts, in the order of the batch's states; none of a sequence that has not begun.
    pub(super) states: Vec<Option<SequenceState>>,
}

/// Which of a model's passes.
#[derive(Debug, Clone)]
pub(super) enum Work {
    /// [`CausalLm::forward`].
    Forward,
    /// [`CausalLm::draft`], from these hidden states.
    Draft(Tensor),
    /// [`CausalLm::bound_blocks`].
    Bound(usize),
}

/// What a rank says of its part when it is there.
#[derive(Debug)]
pub(super) struct Part {
    pub(super) weight_bytes: u64,
    /// Bytes of a state that has not begun.
    pub(super) fixed_bytes: u64,
    pub(super) pool: KvPool,
}

/// The handle of a rank. When it is dropped, the rank ends.
#[derive(Debug)]
pub(super) struct RankHandle {
    rank: usize,
    communicator: Arc<dyn Communicator>,
    /// None when the rank has been told to end.
    steps: Option<Sender<Step>>,
    /// The states of each step, when it is done.
    done: Mutex<Receiver<Vec<SequenceState>>>,
    loaded: Mutex<Receiver<Result<Part, LoadError>>>,
    /// Bits of the f32 share of bytes read.
    progress: Arc<AtomicU32>,
}

impl RankHandle {
    /// Starts a rank of the group whose first rank is `first`. It reads its part in its own threads.
    pub(super) fn start(
        own: Arc<dyn Communicator>,
        first: &Arc<dyn Communicator>,
        load: Arc<LoadPart>,
    ) -> Self {
        let (steps, told) = channel();
        let (finished, done) = channel();
        let (ready, loaded) = channel();
        let progress = Arc::new(AtomicU32::new(0));
        let handle = Self {
            rank: own.rank(),
            communicator: first.clone(),
            steps: Some(steps),
            done: Mutex::new(done),
            loaded: Mutex::new(loaded),
            progress: progress.clone(),
        };
        let communicator = own.clone();
        // it lives in a thread of its own pool: from outside each kernel would have to wake the pool and wait
        own.pool()
            .expect("a rank of several has threads of its own")
            .spawn(move || live(communicator, &*load, &progress, &ready, &told, &finished));
        handle
    }

    /// Share of its part that has been read, 0 to 1.
    pub(super) fn progress(&self) -> f32 {
        f32::from_bits(self.progress.load(Ordering::Relaxed))
    }

    /// Waits until its part is read: as long as the disk takes.
    pub(super) fn loaded(&self) -> Result<Part, LoadError> {
        let loaded = self.loaded.lock().unwrap_or_else(PoisonError::into_inner);
        match loaded.recv() {
            Ok(outcome) => outcome,
            Err(_) => Err(self.gone().into()),
        }
    }

    /// Tells the rank what to do.
    pub(super) fn begin(&self, step: Step) -> Result<(), GroupError> {
        let told = self.steps.as_ref().map(|steps| steps.send(step));
        match told {
            Some(Ok(())) => Ok(()),
            _ => Err(self.gone()),
        }
    }

    /// Waits until the step that was begun is done.
    pub(super) fn end(&self) -> Result<Vec<SequenceState>, GroupError> {
        let done = self.done.lock().unwrap_or_else(PoisonError::into_inner);
        done.recv_timeout(DEADLINE).map_err(|error| match error {
            RecvTimeoutError::Disconnected => self.gone(),
            RecvTimeoutError::Timeout => {
                let (rank, deadline) = (self.rank, DEADLINE);
                let stalled = GroupError::Stalled { rank, deadline };
                self.communicator.abort(stalled.clone());
                self.communicator.fault().unwrap_or(stalled)
            }
        })
    }

    /// Why it answers no more.
    fn gone(&self) -> GroupError {
        let ended = GroupError::Ended { rank: self.rank };
        self.communicator.fault().unwrap_or(ended)
    }
}

impl Drop for RankHandle {
    /// Returns when the memory of the rank is free, or when it has not been heard of for as long as ranks wait.
    fn drop(&mut self) {
        self.steps = None;
        let stalls = matches!(self.communicator.fault(), Some(GroupError::Stalled { rank, .. }) if rank == self.rank);
        let done = self.done.get_mut().unwrap_or_else(PoisonError::into_inner);
        while !stalls && done.recv_timeout(DEADLINE).is_ok() {}
    }
}

/// The rank's life: reads its part, then does the steps it is told until nobody can tell it any more. Whatever ends it
/// before breaks the group.
fn live(
    communicator: Arc<dyn Communicator>,
    load: &LoadPart,
    progress: &AtomicU32,
    ready: &Sender<Result<Part, LoadError>>,
    steps: &Receiver<Step>,
    done: &Sender<Vec<SequenceState>>,
) {
    let rank = communicator.rank();
    let fail = |reason: String| communicator.abort(GroupError::Failed { rank, reason });
    let life = || {
        let _span = tracing::info_span!("rank", rank).entered();
        let tell = |share: f32| progress.store(share.to_bits(), Ordering::Relaxed);
        let model = match load(communicator.clone(), &tell) {
            Ok(model) => model,
            Err(error) => {
                fail(error.to_string());
                // whoever asked may be gone
                let _ = ready.send(Err(error));
                return;
            }
        };
        let part = Part {
            weight_bytes: model.weight_bytes(),
            fixed_bytes: model.state_bytes(0),
            pool: model.pool().clone(),
        };
        if ready.send(Ok(part)).is_err() {
            return;
        }
        for step in steps {
            let sent = match run(&*model, step) {
                Ok(states) => done.send(states),
                Err(error) => return fail(error.to_string()),
            };
            if sent.is_err() {
                return;
            }
        }
    };
    if let Err(panic) = catch_unwind(AssertUnwindSafe(life)) {
        let words = crate::engine::words(&*panic);
        fail(format!("it panicked: {words}"));
    }
}

fn run(model: &dyn CausalLm, step: Step) -> Result<Vec<SequenceState>, ModelError> {
    let states = step.states.into_iter();
    let mut states: Vec<SequenceState> = states
        .map(|state| state.unwrap_or_else(|| model.new_state()))
        .collect();
    let mut lent: Vec<&mut SequenceState> = states.iter_mut().collect();
    match step.work {
        Work::Forward => model.forward(&step.batch, &mut lent).map(drop)?,
        Work::Draft(hidden) => match model.draft(&step.batch, &hidden, &mut lent) {
            Some(drafted) => drafted.map(drop)?,
            None => return Err(ModelError::NoDrafts),
        },
        Work::Bound(blocks) => model.bound_blocks(blocks),
    }
    Ok(states)
}
