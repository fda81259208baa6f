//! One model's place in the life of models, and what it says of itself there.

use super::folder::ModelText;
use crate::engine::Engine;
use crate::parallel::RankInfo;
use protocol::node::{LoadModel, ModelState, ModelStatus, RankState, RankStatus};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

/// What every model that is served here can do.
const CAPABILITIES: [&str; 6] = [
    "chat",
    "completions",
    "tools",
    "thinking",
    "structured_outputs",
    "logprobs",
];

/// What the table holds of one model.
pub(super) struct Entry {
    /// Tells this load from an earlier or later one of the same id.
    pub(super) load: u64,
    pub(super) wanted: LoadModel,
    pub(super) phase: Phase,
    pub(super) since: u64,
    /// Bits of the f32 share of bytes read.
    pub(super) progress: Arc<AtomicU32>,
}

/// Where it stands.
pub(super) enum Phase {
    Loading,
    Loaded(Arc<ServedModel>),
    Failed(String),
    /// The model that is still serving its last requests; none when it was still being read.
    Unloading(Option<Arc<ServedModel>>),
}

/// A model that serves requests.
#[derive(Debug)]
pub struct ServedModel {
    /// The name requests use.
    pub id: String,
    /// Its tokenizer, template and advice.
    pub text: ModelText,
    /// What computes it.
    pub engine: Engine,
    /// Longest prompt plus answer in tokens.
    pub context_length: usize,
    /// Bytes of its weights.
    pub weight_bytes: u64,
    /// Devices that hold it.
    pub devices: Vec<String>,
    /// The ranks it is shared among.
    pub ranks: RankInfo,
    /// Unix seconds at which it was loaded.
    pub created: u64,
}

impl Entry {
    pub(super) fn progress(&self) -> f32 {
        f32::from_bits(self.progress.load(Ordering::Relaxed))
    }

    pub(super) fn begin_unloading(&mut self, model: Option<Arc<ServedModel>>) {
        self.phase = Phase::Unloading(model);
        self.since = unix_seconds();
    }

    pub(super) fn status(&self) -> ModelStatus {
        let mut status = ModelStatus {
            id: self.wanted.id.clone(),
            state: ModelState::Loading,
            progress: self.progress(),
            reason: None,
            source: self.wanted.source.clone(),
            devices: Vec::new(),
            ranks: Vec::new(),
            memory_bytes: 0,
            context_length: self.wanted.context_length.unwrap_or(0),
            capabilities: CAPABILITIES.map(String::from).into(),
            in_flight: 0,
            since: self.since,
        };
        let fail = |status: &mut ModelStatus, reason: &str| {
            status.state = ModelState::Failed;
            status.reason = Some(reason.to_owned());
        };
        let hold = |status: &mut ModelStatus, model: &ServedModel| {
            status.progress = 1.0;
            status.devices.clone_from(&model.devices);
            status.ranks = model.ranks(false);
            status.memory_bytes = model.weight_bytes;
            status.context_length = model.context_length as u64;
            status.in_flight = model.engine.in_flight();
        };
        match &self.phase {
            Phase::Loading => {}
            Phase::Unloading(model) => {
                status.state = ModelState::Unloading;
                if let Some(model) = model {
                    hold(&mut status, model);
                }
            }
            Phase::Failed(reason) => fail(&mut status, reason),
            Phase::Loaded(model) => match model.engine.fault() {
                Some(reason) => {
                    fail(&mut status, reason);
                    status.ranks = model.ranks(true);
                }
                None => {
                    status.state = ModelState::Loaded;
                    hold(&mut status, model);
                }
            },
        }
        status
    }
}

impl ServedModel {
    /// Each rank, of a model that has failed or not.
    fn ranks(&self, failed: bool) -> Vec<RankStatus> {
        let all = &self.ranks.weight_bytes;
        let culprit = match all.len() {
            1 => Some(0),
            _ => self.ranks.failed.get().copied(),
        };
        let rank = |(rank, weight_bytes): (usize, &u64)| {
            let (state, weight_bytes) = match failed {
                false => (RankState::Loaded, *weight_bytes),
                true if culprit == Some(rank) => (RankState::Failed, 0),
                true => (RankState::Ended, 0),
            };
            let device = rank % self.devices.len().max(1); // as their places are given to them
            RankStatus {
                rank: rank as u32,
                state,
                device: self.devices.get(device).cloned().unwrap_or_default(),
                weight_bytes,
            }
        };
        all.iter().enumerate().map(rank).collect()
    }
}

/// Seconds since 1970.
#[must_use]
pub fn unix_seconds() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |elapsed| elapsed.as_secs())
}
