//! Ranks for tests: each computes as the engine's fake model does, after it has met the others, and one of them has a fate.

use super::ranks::of_threads;
use super::{Communicator, Ranks, Threads};
use crate::engine::fake::{FakeModel, Gate, Script};
use crate::memory::SequenceState;
use crate::memory::pool::KvPool;
use crate::model::{Batch, CausalLm, Drafted, ModelError, Probe};
use candle_core::{Device, Tensor};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// What becomes of a rank.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fate {
    Fails,
    Panics,
    /// It waits until the test hangs up.
    Stalls,
}

struct FakeRank {
    model: FakeModel,
    /// Held by the test at the beginning of each step of the first rank.
    gate: Arc<Gate>,
    communicator: Arc<dyn Communicator>,
    /// What becomes of it, and in which step.
    fate: Option<(Fate, usize)>,
    steps: AtomicUsize,
    held: Arc<Mutex<Receiver<()>>>,
}

/// A model of ranks, and what tells of them.
pub(crate) struct Doomed {
    pub(crate) ranks: Ranks,
    /// Hanging up lets a stalled rank go on.
    pub(crate) hold: Sender<()>,
    /// Hangs up when all ranks have let their models go.
    pub(crate) gone: Receiver<()>,
}

/// A model of so many ranks, of which `rank` meets its fate in its step number `step`.
pub(crate) fn doomed(world_size: usize, deadline: Duration, fate: (usize, Fate, usize)) -> Doomed {
    doomed_behind(Arc::default(), world_size, deadline, fate)
}

/// As [`doomed`], whose first rank passes `gate` in each step.
pub(crate) fn doomed_behind(
    gate: Arc<Gate>,
    world_size: usize,
    deadline: Duration,
    (rank, fate, step): (usize, Fate, usize),
) -> Doomed {
    let (hold, held) = channel();
    let (dropped, gone) = channel();
    let (held, dropped) = (Arc::new(Mutex::new(held)), Mutex::new(Some(dropped)));
    let left = AtomicUsize::new(world_size);
    let load = move |communicator: Arc<dyn Communicator>, progress: &dyn Fn(f32)| {
        progress(1.0 / world_size as f32);
        let fate = (communicator.rank() == rank).then_some((fate, step));
        let mut dropped = dropped.lock().unwrap();
        let mine = dropped.clone();
        if left.fetch_sub(1, Ordering::SeqCst) == 1 {
            *dropped = None; // the models alone hold it now
        }
        Ok(Box::new(FakeRank {
            model: FakeModel {
                dropped: mine.map(|mine| Box::new(mine) as _),
                ..FakeModel::new(Script::Hash)
            },
            gate: match communicator.rank() {
                0 => gate.clone(),
                _ => Arc::default(),
            },
            communicator,
            fate,
            steps: AtomicUsize::new(0),
            held: held.clone(),
        }) as Box<dyn CausalLm>)
    };
    let group = of_threads(Threads::group(world_size, deadline).unwrap());
    let ranks = Ranks::start(group, Arc::new(load), &|_| {}).unwrap();
    Doomed { ranks, hold, gone }
}

impl FakeRank {
    fn meet(&self) -> Result<(), ModelError> {
        let step = self.steps.fetch_add(1, Ordering::SeqCst);
        match self.fate {
            Some((fate, at)) if at == step => match fate {
                Fate::Fails => {
                    return Err(candle_core::Error::Msg("a planted fault".into()).into());
                }
                Fate::Panics => panic!("a planted panic"),
                // it ends by the test's hanging up
                Fate::Stalls => drop(self.held.lock().unwrap().recv()),
            },
            _ => {}
        }
        let one = Tensor::ones((1, 1), candle_core::DType::F32, &Device::Cpu)?;
        let all = self.communicator.all_reduce(&one)?;
        let count: f32 = all.flatten_all()?.get(0)?.to_scalar()?;
        assert_eq!(count as usize, self.communicator.world_size());
        Ok(())
    }
}

impl CausalLm for FakeRank {
    fn vocab_size(&self) -> usize {
        self.model.vocab_size()
    }

    fn context_length(&self) -> usize {
        self.model.context_length()
    }

    fn weight_bytes(&self) -> u64 {
        self.model.weight_bytes()
    }

    fn state_bytes(&self, tokens: usize) -> u64 {
        self.model.state_bytes(tokens)
    }

    fn pool(&self) -> &KvPool {
        self.model.pool()
    }

    fn new_state(&self) -> SequenceState {
        self.model.new_state()
    }

    fn drafts(&self) -> bool {
        true
    }

    fn forward_probed(
        &self,
        batch: &Batch,
        states: &mut [&mut SequenceState],
        probe: &mut Probe<'_>,
    ) -> Result<Tensor, ModelError> {
        self.gate.pass();
        self.meet()?;
        self.model.forward_probed(batch, states, probe)
    }

    fn draft(
        &self,
        batch: &Batch,
        hidden: &Tensor,
        states: &mut [&mut SequenceState],
    ) -> Option<Result<Drafted, ModelError>> {
        match self.meet() {
            Ok(()) => self.model.draft(batch, hidden, states),
            Err(error) => Some(Err(error)),
        }
    }
}
