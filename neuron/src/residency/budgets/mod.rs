//! The memory for states, shared among all models on the host, anew whenever one comes or goes.
//!
//! States grow as they are used, so what is free now is not what may be promised: each model has a budget, and together
//! they are no more than there is. A model that takes less than before has given memory back before another takes it.

#[cfg(test)]
mod tests;

use super::FreeBytes;
use crate::config::Limits;
use crate::devices::{CPU, free_bytes};
use crate::engine::Engine;
use crate::engine::scheduler::Bounds;
use crate::memory::pool::BLOCK;
use crate::model::CausalLm;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

/// Of ten parts of the memory there is beside the weights, those that states may take: the rest is for activations and
/// everything else on the host.
const STATE_PARTS: u64 = 9;
/// What is kept of ended sequences takes as much again as the running ones can, and no more.
const KEPT: u64 = 2;
/// Share of a model's budget that saved recurrent states may take; the rest is for keys and values.
const SNAPSHOT_SHARE: u64 = 4;

/// Share of the host's free memory that saved states of a model on devices may be moved to, where it is not said.
const HOST_SHARE: u64 = 4;

/// Every model that has a part of the memory, by the number of its load.
pub(super) struct Budgets {
    free: Arc<FreeBytes>,
    /// Whose memory it is.
    devices: Vec<String>,
    members: BTreeMap<u64, Member>,
}

enum Member {
    /// Its weights are being read: so many bytes, of which the share in `progress`, bits of an f32, are there.
    Reading {
        weights: u64,
        progress: Arc<AtomicU32>,
    },
    /// It has a budget. None as its engine until that has started.
    Serving {
        demand: Demand,
        budget: u64,
        engine: Option<Engine>,
    },
}

/// What a model can do with memory for states.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Demand {
    /// Bytes of one sequence of full length: what it always has.
    floor: u64,
    /// Bytes beyond which more is of no use to it, or not allowed.
    most: u64,
    /// Bytes of the state of a sequence that has not begun.
    fixed: u64,
    /// Bytes of a block of keys and values.
    block: u64,
    /// Prompt tokens of a step.
    pub(super) prefill_tokens: usize,
    /// Bytes of the host's memory that saved states of a device may be moved to.
    host_snapshots: u64,
    max_running: usize,
    prefix_cache: bool,
    draft_tokens: usize,
}

impl Demand {
    pub(super) fn of(model: &dyn CausalLm, limits: Limits, devices: &[String]) -> Self {
        // a CPU is busy with few, and shall see soon that a client has left; a device needs many to be busy
        let on_host = devices.iter().all(|id| id == CPU);
        let prefill_tokens =
            limits
                .prefill_chunk_tokens
                .unwrap_or(if on_host { 128 } else { 2048 });
        let host_snapshots = match limits.host_snapshot_bytes {
            _ if on_host || !limits.prefix_cache => 0,
            Some(bytes) => bytes,
            None => free_bytes(&[CPU.into()]).unwrap_or(0) / HOST_SHARE,
        };
        let floor = model.state_bytes(model.context_length());
        let most = floor.saturating_mul(limits.max_running as u64);
        let most = most.saturating_mul(KEPT);
        Self {
            floor,
            most: most.min(limits.state_bytes.unwrap_or(u64::MAX)).max(floor),
            fixed: model.state_bytes(0),
            block: (model.state_bytes(BLOCK) - model.state_bytes(0)).max(1),
            prefill_tokens,
            host_snapshots,
            max_running: limits.max_running,
            prefix_cache: limits.prefix_cache,
            draft_tokens: limits.draft_tokens,
        }
    }

    /// How many sequences may run on `budget` bytes, on how many blocks, and what saved states may hold. One sequence of full
    /// length takes all at the most.
    fn bounds(&self, budget: u64) -> Bounds {
        let snapshots = (budget / SNAPSHOT_SHARE).min(budget - self.floor);
        let left = budget - snapshots;
        let most = self.max_running;
        let further = (left - self.floor).checked_div(self.fixed);
        let further = further.map_or(most, |count| usize::try_from(count).unwrap_or(most));
        let running = further.saturating_add(1).min(most);
        let blocks = (left - running as u64 * self.fixed) / self.block;
        let kept = if self.prefix_cache { snapshots } else { 0 };
        Bounds {
            max_running: running,
            prefill_tokens: self.prefill_tokens,
            blocks: usize::try_from(blocks).unwrap_or(usize::MAX),
            drafts: self.draft_tokens,
            snapshot_bytes: kept,
            host_snapshot_bytes: self.host_snapshots,
        }
    }
}

impl Budgets {
    /// The memory of `devices`, of which `free` tells.
    pub(super) fn new(free: Arc<FreeBytes>, devices: Vec<String>) -> Self {
        Self {
            free,
            devices,
            members: BTreeMap::new(),
        }
    }

    /// Bytes that the weights of a further model could take: all that is free, and what states hold beyond the least that
    /// their models must have. None when the system does not tell.
    pub(super) fn room_for_weights(&mut self) -> Option<u64> {
        let beside_weights = self.beside_weights()?;
        let floors = self.floors().div_ceil(STATE_PARTS).saturating_mul(10);
        Some(beside_weights.saturating_sub(floors))
    }

    /// Sets memory aside for the weights of a model that is about to be read. States of others have left it when this
    /// returns.
    pub(super) fn reserve(&mut self, load: u64, weights: u64, progress: Arc<AtomicU32>) {
        let member = Member::Reading { weights, progress };
        self.members.insert(load, member);
        self.share_out();
    }

    /// Bytes that states of the model could have, were all others to keep the least they must. Its weights are there: what was
    /// set aside for them is theirs.
    pub(super) fn room_for_states(&mut self, load: u64) -> u64 {
        self.members.remove(&load);
        self.total().saturating_sub(self.floors())
    }

    /// Gives a model its part, whose weights are there. States of others have left it when this returns.
    pub(super) fn admit(&mut self, load: u64, demand: Demand) -> Bounds {
        let member = Member::Serving {
            demand,
            budget: demand.floor,
            engine: None,
        };
        self.members.insert(load, member);
        self.share_out();
        match self.members.get(&load) {
            Some(Member::Serving { budget, .. }) => demand.bounds(*budget),
            _ => demand.bounds(demand.floor),
        }
    }

    /// The engine that lives within the bounds that [`Self::admit`] gave, to be told when they change.
    pub(super) fn started(&mut self, load: u64, started: Engine) {
        if let Some(Member::Serving { engine, .. }) = self.members.get_mut(&load) {
            *engine = Some(started);
        }
    }

    /// Shares the part of a model out that is gone, or that never came to serve.
    pub(super) fn leave(&mut self, load: u64) {
        self.members.remove(&load);
        self.share_out();
    }

    /// Bytes for states and all else that is not weights. None when the system does not tell.
    fn beside_weights(&mut self) -> Option<u64> {
        // an engine that has failed holds nothing and wants nothing
        self.members.retain(|_, member| match member {
            Member::Serving {
                engine: Some(engine),
                ..
            } => !engine.has_ended(),
            _ => true,
        });
        let engines = || {
            self.members.values().filter_map(|member| match member {
                Member::Serving { engine, .. } => engine.as_ref(),
                Member::Reading { .. } => None,
            })
        };
        // Engines go on meanwhile. Whether one takes or frees memory, the smaller of both counts does not make free what is not.
        let held = || engines().map(Engine::held_bytes).sum::<u64>();
        let before = held();
        let free = (self.free)(&self.devices)?;
        let held = before.min(held());
        let to_come = self.members.values().map(|member| match member {
            Member::Reading { weights, progress } => {
                let there = f32::from_bits(progress.load(Ordering::Relaxed));
                (*weights as f64 * (1.0 - f64::from(there.clamp(0.0, 1.0)))) as u64
            }
            Member::Serving { .. } => 0,
        });
        Some(free.saturating_add(held).saturating_sub(to_come.sum()))
    }

    /// Bytes that all budgets together may be.
    fn total(&mut self) -> u64 {
        self.beside_weights().map_or(u64::MAX, for_states)
    }

    /// What each model that serves can do with memory, in the order of the members.
    fn demands(&self) -> impl Iterator<Item = (u64, u64)> {
        self.members.values().filter_map(|member| match member {
            Member::Serving { demand, .. } => Some((demand.floor, demand.most)),
            Member::Reading { .. } => None,
        })
    }

    /// The least that all models together must have.
    fn floors(&self) -> u64 {
        let floors = self.demands().map(|(floor, _)| floor);
        floors.fold(0, u64::saturating_add)
    }

    /// Gives every model its part of what there is now: first those get less that had more, and once they have let go the others
    /// get more.
    fn share_out(&mut self) {
        let total = self.total();
        let demands: Vec<_> = self.demands().collect();
        let mut shares = fair(total, &demands).into_iter();
        let (mut giving, mut taking) = (Vec::new(), Vec::new());
        for member in self.members.values_mut() {
            if let Member::Serving {
                demand,
                budget,
                engine,
            } = member
                && let Some(share) = shares.next()
            {
                let before = std::mem::replace(budget, share);
                let bounds = demand.bounds(share);
                match engine {
                    Some(engine) if share < before => giving.push((engine.clone(), bounds)),
                    Some(engine) if share > before => taking.push((engine.clone(), bounds)),
                    _ => {}
                }
            }
        }
        let given = giving
            .iter()
            .map(|(engine, bounds)| engine.set_bounds(*bounds));
        // all are told before the first is waited for
        for within in given.collect::<Vec<_>>() {
            // it hangs up after its step at the latest
            let _ = within.recv();
        }
        for (engine, bounds) in taking {
            // whoever has more room need not be waited for
            drop(engine.set_bounds(bounds));
        }
    }
}

/// What of the memory beside the weights is for states.
fn for_states(beside_weights: u64) -> u64 {
    beside_weights / 10 * STATE_PARTS
}

/// Shares `total` among demands of a floor and a most each: everybody has the floor, even where that is more than there is, and
/// what is left beyond the floors goes in equal parts to those that have a use for it.
fn fair(total: u64, demands: &[(u64, u64)]) -> Vec<u64> {
    let mut shares: Vec<u64> = demands.iter().map(|(floor, _)| *floor).collect();
    let floors = shares.iter().copied().fold(0, u64::saturating_add);
    let mut left = total.saturating_sub(floors);
    let wants = demands.iter().map(|(floor, most)| most - floor);
    let mut wants: Vec<(u64, usize)> = wants.zip(0..).collect();
    // who wants least is served first: what it leaves of its equal part is the others'
    wants.sort_unstable();
    for (at, (want, index)) in wants.iter().enumerate() {
        let given = (*want).min(left / (wants.len() - at) as u64);
        shares[*index] += given;
        left -= given;
    }
    shares
}
