//! All ranks of a model as one model: the first computes in the thread of whoever asks, the others each in their own.
//!
//! What a step computes is told to all of them in one small value, the [`Batch`]; the logits come to the first alone. Each
//! rank's part of a sequence's state is in the state of the first between steps, and with the rank while it computes.

use super::rank::{LoadPart, Part, RankHandle, Step, Work};
use super::{Communicator, DEADLINE, GroupError, RankInfo, Threads, weight_bytes};
use crate::kernels::rows::Place;
use crate::memory::SequenceState;
use crate::memory::pool::{KvPool, KvShape};
use crate::model::{self, Batch, CausalLm, Drafted, LoadError, LoadOptions, ModelError, Probe};
use candle_core::Tensor;
use std::path::Path;
use std::sync::{Arc, OnceLock};

/// A model that is shared among ranks.
pub struct Ranks {
    first: Box<dyn CausalLm>,
    communicator: Arc<dyn Communicator>,
    others: Vec<(RankHandle, Part)>,
    /// Which rank has broken the group.
    failed: Arc<OnceLock<usize>>,
}

/// Loads the model in `folder` as so many ranks, which together are one model; see [`model::load`].
///
/// # Errors
/// As [`model::load`], when it cannot be shared among so many, and when there are no threads for them.
pub fn load(
    folder: &Path,
    options: &LoadOptions,
    ranks: usize,
    progress: &dyn Fn(f32),
) -> Result<Box<dyn CausalLm>, LoadError> {
    if ranks == 1 {
        return model::load(folder, options, progress);
    }
    weight_bytes(folder, options, ranks)?; // one error for all ranks, before they begin
    let (places, collectives) = (options.places.clone(), options.collectives.clone());
    let (folder, options) = (folder.to_path_buf(), options.clone());
    let part = move |communicator, progress: &dyn Fn(f32)| {
        model::load_rank(&folder, &options, communicator, progress)
    };
    let mut group = group(&places, ranks)?;
    if let Some(collectives) = collectives {
        group = collectives.around(group);
    }
    Ok(Box::new(Ranks::start(group, Arc::new(part), progress)?))
}

/// So many ranks that can be at `places`.
fn group(places: &[Place], ranks: usize) -> Result<Vec<Arc<dyn Communicator>>, GroupError> {
    #[cfg(feature = "nccl")]
    {
        let devices: Vec<_> = places
            .iter()
            .filter_map(|place| place.gpu()?.cuda())
            .collect();
        if devices.len() == ranks {
            let group = super::Nccl::group(devices, DEADLINE)?.into_iter();
            return Ok(group
                .map(|rank| Arc::new(rank) as Arc<dyn Communicator>)
                .collect());
        }
    }
    if places.iter().any(|place| place.gpu().is_some()) {
        tracing::warn!("without NCCL, ranks on devices are joined through the host, which is slow");
    } else if ranks > rayon::current_num_threads() {
        tracing::warn!(ranks, "there are more ranks than threads: they take turns");
    }
    Threads::group(ranks, DEADLINE).map(of_threads)
}

/// Ranks that are threads.
pub(super) fn of_threads(group: Vec<Threads>) -> Vec<Arc<dyn Communicator>> {
    let group = group.into_iter();
    group
        .map(|rank| Arc::new(rank) as Arc<dyn Communicator>)
        .collect()
}

impl Ranks {
    /// Has every rank of `group` read its part.
    pub(super) fn start(
        group: Vec<Arc<dyn Communicator>>,
        load: Arc<LoadPart>,
        progress: &dyn Fn(f32),
    ) -> Result<Self, LoadError> {
        let mut group = group.into_iter();
        let communicator = group.next().expect("a group has a first rank");
        let others: Vec<RankHandle> = group
            .map(|rank| RankHandle::start(rank, &communicator, load.clone()))
            .collect();
        // of all the bytes each rank reads a part
        let read = |own: f32| {
            let all = own + others.iter().map(RankHandle::progress).sum::<f32>();
            progress(all.min(1.0));
        };
        let first = load(communicator.clone(), &read)?;
        let others = others
            .into_iter()
            .map(|handle| {
                let part = handle.loaded()?;
                Ok((handle, part))
            })
            .collect::<Result<_, LoadError>>()?;
        Ok(Self {
            first,
            communicator,
            others,
            failed: Arc::default(),
        })
    }

    /// Has all ranks do `work` over `batch`, the first of them by `own`.
    fn together<T>(
        &self,
        work: &Work,
        batch: &Batch,
        states: &mut [&mut SequenceState],
        own: impl FnOnce(&mut [&mut SequenceState]) -> Result<T, ModelError>,
    ) -> Result<T, ModelError> {
        let outcome = self.step(work, batch, states, own);
        if let Err(error) = &outcome {
            let fault = self.communicator.fault();
            let told = match error {
                ModelError::Group(fault) => Some(fault.rank()),
                _ => None,
            };
            if let Some(rank) = fault.map(|fault| fault.rank()).or(told) {
                let _ = self.failed.set(rank); // the first counts
            }
        }
        outcome
    }

    /// As [`Self::together`], which keeps whom it failed by.
    fn step<T>(
        &self,
        work: &Work,
        batch: &Batch,
        states: &mut [&mut SequenceState],
        own: impl FnOnce(&mut [&mut SequenceState]) -> Result<T, ModelError>,
    ) -> Result<T, ModelError> {
        if let Some(fault) = self.communicator.fault() {
            return Err(fault.into());
        }
        let batch = Arc::new(batch.clone());
        for (place, (handle, _)) in self.others.iter().enumerate() {
            handle.begin(Step {
                work: work.clone(),
                batch: batch.clone(),
                states: states.iter_mut().map(|state| state.lend(place)).collect(),
            })?;
        }
        let unwinding = Unwinding(self);
        let outcome = own(states);
        std::mem::forget(unwinding);
        if let Err(error) = &outcome {
            // why the group is broken is also why this rank could not go on
            if let Some(fault) = self.communicator.fault() {
                return Err(fault.into());
            }
            let (rank, reason) = (self.communicator.rank(), error.to_string());
            self.communicator.abort(GroupError::Failed { rank, reason });
            return outcome;
        }
        for (place, (handle, _)) in self.others.iter().enumerate() {
            for (state, part) in states.iter_mut().zip(handle.end()?) {
                state.give_back(place, part);
            }
        }
        outcome
    }
}

/// Tells the others of a panic in this rank, for which they would wait otherwise.
struct Unwinding<'a>(&'a Ranks);

impl Drop for Unwinding<'_> {
    fn drop(&mut self) {
        let communicator = &self.0.communicator;
        let rank = communicator.rank();
        communicator.abort(GroupError::Failed {
            rank,
            reason: "it panicked".into(),
        });
        let rank = communicator.fault().map_or(rank, |fault| fault.rank());
        let _ = self.0.failed.set(rank);
    }
}

impl CausalLm for Ranks {
    fn vocab_size(&self) -> usize {
        self.first.vocab_size()
    }

    fn context_length(&self) -> usize {
        self.first.context_length()
    }

    fn weight_bytes(&self) -> u64 {
        let others = self.others.iter().map(|(_, part)| part.weight_bytes);
        self.first.weight_bytes() + others.sum::<u64>()
    }

    fn ranks(&self) -> RankInfo {
        let others = self.others.iter().map(|(_, part)| part.weight_bytes);
        RankInfo {
            weight_bytes: std::iter::once(self.first.weight_bytes())
                .chain(others)
                .collect(),
            failed: self.failed.clone(),
        }
    }

    fn step_bytes(&self, rows: usize) -> u64 {
        // every rank has the same part of each matrix
        let part = self.first.step_bytes(rows) as f64 / self.first.weight_bytes().max(1) as f64;
        (part * self.weight_bytes() as f64) as u64
    }

    fn state_bytes(&self, tokens: usize) -> u64 {
        let others = self.others.iter().map(|(_, part)| {
            let blocks = KvShape::blocks(tokens) * part.pool.block_bytes();
            part.fixed_bytes + blocks as u64
        });
        self.first.state_bytes(tokens) + others.sum::<u64>()
    }

    /// Heads are shared equally: every rank's part of a trail is as long.
    fn trail_bytes(&self, rows: usize) -> u64 {
        self.first.trail_bytes(rows) * (1 + self.others.len() as u64)
    }

    fn trails_held(&self) -> u64 {
        self.first.trails_held() * (1 + self.others.len() as u64)
    }

    /// That of the first rank: the others take and give back when it does.
    fn pool(&self) -> &KvPool {
        self.first.pool()
    }

    fn bound_blocks(&self, blocks: usize) {
        self.first.bound_blocks(blocks);
        for (handle, _) in &self.others {
            let step = Step {
                work: Work::Bound(blocks),
                batch: Arc::default(),
                states: Vec::new(),
            };
            // whoever is gone holds nothing, and the next step says so
            let _ = handle.begin(step).and_then(|()| handle.end());
        }
    }

    fn new_state(&self) -> SequenceState {
        self.first.new_state().shared_among(self.others.len())
    }

    fn forward_probed(
        &self,
        batch: &Batch,
        states: &mut [&mut SequenceState],
        probe: &mut Probe<'_>,
    ) -> Result<Tensor, ModelError> {
        self.together(&Work::Forward, batch, states, |states| {
            self.first.forward_probed(batch, states, probe)
        })
    }

    fn draft(
        &self,
        batch: &Batch,
        hidden: &Tensor,
        states: &mut [&mut SequenceState],
    ) -> Option<Result<Drafted, ModelError>> {
        if !self.first.drafts() {
            return None;
        }
        let work = Work::Draft(hidden.clone());
        Some(self.together(&work, batch, states, |states| {
            let drafted = self.first.draft(batch, hidden, states);
            drafted.unwrap_or(Err(ModelError::NoDrafts))
        }))
    }

    fn drafts(&self) -> bool {
        self.first.drafts()
    }
}

#[cfg(test)]
mod tests {
    use super::super::fake::{Doomed, Fate, doomed};
    use super::*;
    use crate::memory::pool::BLOCK;
    use crate::model::LogitRows;
    use crate::text::tokenizer::tests::fixture;
    use std::panic::{AssertUnwindSafe, catch_unwind};
    use std::sync::mpsc::{Receiver, TryRecvError};
    use std::time::Duration;

    const PATIENT: Duration = Duration::from_secs(3600);

    fn step(ranks: &Ranks, state: &mut SequenceState) -> Result<Tensor, ModelError> {
        ranks.forward(&Batch::single(&[3, 4], LogitRows::Last), &mut [state])
    }

    #[test]
    fn a_rank_that_cannot_go_on_ends_the_step_and_every_later_one_with_its_reason() {
        for fate in [Fate::Fails, Fate::Panics] {
            for rank in [1, 2] {
                let Doomed { ranks, gone, .. } = doomed(3, PATIENT, (rank, fate, 1));
                let mut state = ranks.new_state();
                step(&ranks, &mut state).unwrap();
                let error = step(&ranks, &mut state).unwrap_err();
                let ModelError::Group(fault) = &error else {
                    panic!("{error}");
                };
                let GroupError::Failed {
                    rank: found,
                    reason,
                } = fault
                else {
                    panic!("{error}");
                };
                assert_eq!(*found, rank, "{error}");
                assert!(reason.contains("a planted"), "{error}");
                let again = step(&ranks, &mut ranks.new_state()).unwrap_err();
                assert!(matches!(&again, ModelError::Group(later) if later == fault));
                drop(ranks);
                assert_eq!(gone.try_recv(), Err(TryRecvError::Disconnected));
            }
        }
    }

    /// A later step says that the first rank has failed, and no rank keeps its model.
    fn all_end_with_the_first(ranks: Ranks, gone: &Receiver<()>) {
        let again = step(&ranks, &mut ranks.new_state()).unwrap_err();
        assert!(
            matches!(
                &again,
                ModelError::Group(GroupError::Failed { rank: 0, .. })
            ),
            "{again}"
        );
        drop(ranks);
        assert_eq!(gone.try_recv(), Err(TryRecvError::Disconnected));
    }

    #[test]
    fn a_fault_of_the_first_rank_is_its_own_and_ends_the_others() {
        let Doomed { ranks, gone, .. } = doomed(3, PATIENT, (0, Fate::Fails, 0));
        let error = step(&ranks, &mut ranks.new_state()).unwrap_err();
        assert!(matches!(error, ModelError::Device(_)), "{error}");
        all_end_with_the_first(ranks, &gone);
    }

    #[test]
    fn a_panic_of_the_first_rank_ends_the_others_at_once() {
        let Doomed { ranks, gone, .. } = doomed(3, PATIENT, (0, Fate::Panics, 0));
        let mut state = ranks.new_state();
        catch_unwind(AssertUnwindSafe(|| step(&ranks, &mut state))).unwrap_err();
        all_end_with_the_first(ranks, &gone);
    }

    #[test]
    fn a_rank_that_stalls_is_given_up_and_not_waited_for() {
        let deadline = Duration::from_millis(1);
        let Doomed { ranks, hold, gone } = doomed(2, deadline, (1, Fate::Stalls, 0));
        let error = step(&ranks, &mut ranks.new_state()).unwrap_err();
        let stalled = GroupError::Stalled { rank: 1, deadline };
        assert!(
            matches!(&error, ModelError::Group(fault) if *fault == stalled),
            "{error}"
        );
        drop(ranks);
        assert_eq!(gone.try_recv(), Err(TryRecvError::Empty), "it still hangs");
        drop(hold);
        gone.recv().unwrap_err(); // and ends when it can
    }

    #[test]
    fn every_rank_takes_and_gives_back_the_same_blocks() {
        let ranks = {
            let folder = fixture();
            let load = move |communicator, progress: &dyn Fn(f32)| {
                model::load_rank(&folder, &LoadOptions::cpu(), communicator, progress)
            };
            let group = of_threads(Threads::group(2, PATIENT).unwrap());
            Ranks::start(group, Arc::new(load), &|_| {}).unwrap()
        };
        ranks.bound_blocks(20);
        let out = || {
            let others = ranks.others.iter().map(|(_, part)| part.pool.out());
            std::iter::once(ranks.pool().out()).chain(others)
        };
        let all_have = |count: usize| assert!(out().all(|out| out == count), "{count} blocks");
        let read = |state: &mut SequenceState, count: usize| {
            let ids: Vec<u32> = (0..count as u32).collect();
            ranks
                .forward(&Batch::single(&ids, LogitRows::Last), &mut [state])
                .unwrap()
        };
        let mut first = ranks.new_state();
        let nothing = first.snapshot();
        read(&mut first, 3 * BLOCK + 5);
        all_have(4);
        let (snapshot, full) = (first.snapshot(), (0..3).map(|at| first.block(at)));
        let full: Vec<_> = full.collect();
        let straight = read(&mut first, 20);
        all_have(6); // the fourth is the snapshot's and was copied
        let mut second = snapshot.clone().resume(full.clone());
        let resumed = read(&mut second, 20);
        all_have(8);
        let difference = (straight - resumed).unwrap().abs().unwrap();
        let difference: f32 = difference.max_all().unwrap().to_scalar().unwrap();
        assert!(difference == 0.0, "{difference}");
        assert!(!full[0].is_last());
        drop((first, second, snapshot));
        all_have(3);
        assert!(full[0].is_last());
        drop(full);
        all_have(0);
        let mut third = nothing.resume(Vec::new());
        read(&mut third, 20 * BLOCK);
        all_have(20);
        let one_more = Batch::single(&[1], LogitRows::Last);
        let error = ranks.forward(&one_more, &mut [&mut third]).unwrap_err();
        assert!(
            matches!(error, ModelError::NoBlocks(_) | ModelError::Group(_)),
            "{error}"
        );
    }
}
