//! The memory for states, shared among all models on the host, anew whenever one comes or goes.
//!
//! States grow as they are used, so what is free now is not what may be promised: each model has a budget, and together
//! they are no more than there is. A model that takes less than before has given memory back before another takes it.

#[cfg(test)]
mod tests;

use super::FreeBytes;
use crate::config::Limits;
use crate::devices::{CPU, free_bytes};
use crate::engine::scheduler::Bounds;
use crate::engine::{Engine, MOST_GUESSED};
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
    members: BTreeMap<u64, Member>,
}

struct Member {
    spread: Spread,
    life: Life,
}

enum Life {
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

/// The devices a model is on, with as much of it on each.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Spread(Vec<String>);

impl Spread {
    pub(super) fn over(devices: &[String]) -> Self {
        Self(devices.to_vec())
    }

    fn count(&self) -> u64 {
        self.0.len().max(1) as u64
    }

    /// Bytes that a model takes whose ranks hold so many each: on several devices all are taken to be as large as the largest.
    pub(super) fn together(&self, ranks: &[u64]) -> u64 {
        match self.0.len() {
            0 | 1 => ranks.iter().sum(),
            count => ranks.iter().max().map_or(0, |most| most * count as u64),
        }
    }

    /// What the smallest of `rooms`, which are those on its devices, gives on all of them.
    fn within(&self, rooms: impl Iterator<Item = u64>) -> u64 {
        let least = rooms.min().unwrap_or(u64::MAX);
        least.saturating_mul(self.count())
    }
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
    /// Bytes of what a sequence keeps beside it for a step that can be taken back; [`MOST_GUESSED`] do so at once.
    trail: u64,
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
            None => free_bytes(&[CPU.into()])[0].unwrap_or(0) / HOST_SHARE,
        };
        let trail = match limits.draft_tokens {
            0 => 0,
            drafts if model.drafts() => model.trail_bytes(1 + drafts),
            _ => 0,
        };
        let whole = model.state_bytes(model.context_length());
        let floor = whole + trail;
        let most = whole.saturating_mul(limits.max_running as u64);
        let trails = trail * limits.max_running.min(MOST_GUESSED) as u64;
        let most = most.saturating_mul(KEPT).saturating_add(trails);
        Self {
            floor,
            most: most.min(limits.state_bytes.unwrap_or(u64::MAX)).max(floor),
            fixed: model.state_bytes(0),
            trail,
            block: (model.state_bytes(BLOCK) - model.state_bytes(0)).max(1),
            prefill_tokens,
            host_snapshots,
            max_running: limits.max_running,
            prefix_cache: limits.prefix_cache,
            draft_tokens: limits.draft_tokens,
        }
    }

    /// Bytes that one sequence of so many tokens must have.
    pub(super) fn sequence_bytes(&self, model: &dyn CausalLm, tokens: usize) -> u64 {
        model.state_bytes(tokens).saturating_add(self.trail)
    }

    /// Bytes that so many sequences take beside their blocks.
    fn states(&self, running: usize) -> u64 {
        running as u64 * self.fixed + running.min(MOST_GUESSED) as u64 * self.trail
    }

    /// How many sequences may run beside one that has all it can need, on `left` bytes beside those of that one.
    fn further(&self, left: u64) -> usize {
        let as_many = |bytes: u64, each: u64| {
            let count = bytes.checked_div(each).unwrap_or(u64::MAX);
            usize::try_from(count).unwrap_or(usize::MAX)
        };
        let guessed = as_many(left, self.fixed + self.trail).min(MOST_GUESSED - 1);
        if guessed < MOST_GUESSED - 1 {
            return guessed;
        }
        let left = left - guessed as u64 * (self.fixed + self.trail);
        as_many(left, self.fixed).saturating_add(guessed)
    }

    /// How many sequences may run on `budget` bytes, on how many blocks, and what saved states may hold. One sequence of full
    /// length takes all at the most.
    fn bounds(&self, budget: u64) -> Bounds {
        let snapshots = (budget / SNAPSHOT_SHARE).min(budget - self.floor);
        let left = budget - snapshots;
        let further = self.further(left - self.floor);
        let running = further.saturating_add(1).min(self.max_running);
        let blocks = (left - self.states(running)) / self.block;
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
    /// The memory of the devices of which `free` tells.
    pub(super) fn new(free: Arc<FreeBytes>) -> Self {
        Self {
            free,
            members: BTreeMap::new(),
        }
    }

    /// Bytes that the weights of a further model could take: all that is free, and what states hold beyond the least that
    /// their models must have. None when the system does not tell.
    pub(super) fn room_for_weights(&mut self, on: &Spread) -> Option<u64> {
        let beside_weights: Option<Vec<u64>> = self.beside_weights(&on.0).into_iter().collect();
        let rooms = beside_weights?.into_iter().zip(&on.0);
        Some(on.within(rooms.map(|(there, device)| {
            let floors = self.floors(device).div_ceil(STATE_PARTS).saturating_mul(10);
            there.saturating_sub(floors)
        })))
    }

    /// Sets memory aside for the weights of a model that is about to be read. States of others have left it when this
    /// returns.
    pub(super) fn reserve(
        &mut self,
        load: u64,
        spread: Spread,
        weights: u64,
        progress: Arc<AtomicU32>,
    ) {
        let life = Life::Reading { weights, progress };
        self.members.insert(load, Member { spread, life });
        self.share_out();
    }

    /// Bytes that states of the model could have, were all others to keep the least they must. Its weights are there: what was
    /// set aside for them is theirs.
    pub(super) fn room_for_states(&mut self, load: u64, on: &Spread) -> u64 {
        self.members.remove(&load);
        let totals = self.totals(&on.0).into_iter().zip(&on.0);
        on.within(totals.map(|(total, device)| total.saturating_sub(self.floors(device))))
    }

    /// Gives a model its part, whose weights are there. States of others have left it when this returns.
    pub(super) fn admit(&mut self, load: u64, spread: Spread, demand: Demand) -> Bounds {
        let life = Life::Serving {
            demand,
            budget: demand.floor,
            engine: None,
        };
        self.members.insert(load, Member { spread, life });
        self.share_out();
        match self.members.get(&load).map(|member| &member.life) {
            Some(Life::Serving { budget, .. }) => demand.bounds(*budget),
            _ => demand.bounds(demand.floor),
        }
    }

    /// The engine that lives within the bounds that [`Self::admit`] gave, to be told when they change.
    pub(super) fn started(&mut self, load: u64, started: Engine) {
        let life = self.members.get_mut(&load).map(|member| &mut member.life);
        if let Some(Life::Serving { engine, .. }) = life {
            *engine = Some(started);
        }
    }

    /// Shares the part of a model out that is gone, or that never came to serve.
    pub(super) fn leave(&mut self, load: u64) {
        self.members.remove(&load);
        self.share_out();
    }

    /// Bytes on each of `devices` for states and all else that is not weights. None where the system does not tell.
    fn beside_weights(&mut self, devices: &[String]) -> Vec<Option<u64>> {
        // an engine that has failed holds nothing and wants nothing
        self.members.retain(|_, member| match &member.life {
            Life::Serving {
                engine: Some(engine),
                ..
            } => !engine.has_ended(),
            _ => true,
        });
        // Engines go on meanwhile. Whether one takes or frees memory, the smaller of both counts does not make free what is not.
        let before = self.held(devices);
        let free = (self.free)(devices);
        let held = self.held(devices);
        let to_come = self.sums(devices, |member| match &member.life {
            Life::Reading { weights, progress } => {
                let there = f32::from_bits(progress.load(Ordering::Relaxed));
                let to_come = (*weights as f64 * (1.0 - f64::from(there.clamp(0.0, 1.0)))) as u64;
                to_come.div_ceil(member.spread.count())
            }
            Life::Serving { .. } => 0,
        });
        let held = before.into_iter().zip(held).map(|(a, b)| a.min(b));
        let free = free.into_iter().zip(held).zip(to_come);
        free.map(|((free, held), to_come)| {
            let there = free?.saturating_add(held);
            Some(there.saturating_sub(to_come))
        })
        .collect()
    }

    /// What states hold on each of `devices`.
    fn held(&self, devices: &[String]) -> Vec<u64> {
        self.sums(devices, |member| match &member.life {
            Life::Serving {
                engine: Some(engine),
                ..
            } => engine.held_bytes() / member.spread.count(),
            _ => 0,
        })
    }

    /// What `of` comes to on each of `devices`; it is asked once for each model, for any of its devices.
    fn sums(&self, devices: &[String], of: impl Fn(&Member) -> u64) -> Vec<u64> {
        let mut sums = vec![0_u64; devices.len()];
        for member in self.members.values() {
            let each = of(member);
            for (sum, device) in sums.iter_mut().zip(devices) {
                if member.spread.0.contains(device) {
                    *sum = sum.saturating_add(each);
                }
            }
        }
        sums
    }

    /// Bytes on each of `devices` that all budgets together may be.
    fn totals(&mut self, devices: &[String]) -> Vec<u64> {
        let beside_weights = self.beside_weights(devices).into_iter();
        beside_weights
            .map(|there| there.map_or(u64::MAX, for_states))
            .collect()
    }

    /// The least that all models together must have on `device`.
    fn floors(&self, device: &String) -> u64 {
        let floors = self.sums(std::slice::from_ref(device), |member| match &member.life {
            Life::Serving { demand, .. } => demand.floor.div_ceil(member.spread.count()),
            Life::Reading { .. } => 0,
        });
        floors[0]
    }

    /// What each model that serves can do with memory, in the order of the members. Its devices are told by their places in
    /// `devices`.
    fn wants(&self, devices: &[String]) -> Vec<Want> {
        let wants = self.members.values().filter_map(|member| {
            let Life::Serving { demand, .. } = &member.life else {
                return None;
            };
            let floor = demand.floor.div_ceil(member.spread.count());
            let most = demand.most / member.spread.count();
            let place = |id: &String| devices.iter().position(|device| device == id);
            Some(Want {
                floor,
                most: most.max(floor),
                devices: member.spread.0.iter().filter_map(place).collect(),
            })
        });
        wants.collect()
    }

    /// Gives every model its part of what there is now: first those get less that had more, and once they have let go the others
    /// get more.
    fn share_out(&mut self) {
        let spreads = self.members.values().map(|member| &member.spread.0);
        let mut devices: Vec<String> = spreads.flatten().cloned().collect();
        devices.sort_unstable();
        devices.dedup();
        let totals = self.totals(&devices);
        let mut shares = fair(&totals, &self.wants(&devices)).into_iter();
        let (mut giving, mut taking) = (Vec::new(), Vec::new());
        for member in self.members.values_mut() {
            if let Life::Serving {
                demand,
                budget,
                engine,
            } = &mut member.life
                && let Some(share) = shares.next()
            {
                let share = share.saturating_mul(member.spread.count());
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

/// What a model can do with memory on each of its devices.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Want {
    floor: u64,
    most: u64,
    devices: Vec<usize>,
}

/// What each of `wants` gets on each of its devices, where `totals` are there: everybody has the floor, even where that is more
/// than there is, and what is left beyond the floors goes in equal parts to those that have a use for it. Who can have less,
/// as one of its devices has little, leaves on its other devices what it cannot take.
fn fair(totals: &[u64], wants: &[Want]) -> Vec<u64> {
    let mut shares: Vec<u64> = wants.iter().map(|want| want.floor).collect();
    let mut left = totals.to_vec();
    let mut sharing = vec![0; totals.len()];
    for want in wants {
        for device in &want.devices {
            left[*device] = left[*device].saturating_sub(want.floor);
            sharing[*device] += 1;
        }
    }
    let mut open: Vec<usize> = (0..wants.len()).collect();
    // who gets least is served first: equal parts of what is left then never fall below that
    let part = |index: usize, left: &[u64], sharing: &[u64]| {
        let devices = wants[index].devices.iter();
        let wanted = wants[index].most - wants[index].floor;
        let given = devices.map(|device| left[*device] / sharing[*device]);
        (given.min().unwrap_or(u64::MAX).min(wanted), wanted, index)
    };
    while let Some((given, _, index)) = open.iter().map(|index| part(*index, &left, &sharing)).min()
    {
        open.retain(|other| *other != index);
        shares[index] += given;
        for device in &wants[index].devices {
            left[*device] -= given;
            sharing[*device] -= 1;
        }
    }
    shares
}
