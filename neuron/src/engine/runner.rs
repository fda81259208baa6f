//! Plan → Batch → logits: the only place in the engine that knows tensors, and the owner of the states.

use super::metrics::ModelMetrics;
use super::plan::Plan;
use super::prefix::{Found, PrefixTree};
use super::scheduler::{Begun, Scheduler, Store};
use super::sequence::{Sequence, SequenceId};
use crate::memory::pool::{Block, KvPool, KvShape};
use crate::memory::{SequenceState, Snapshot};
use crate::model::{Batch, CausalLm, LogitRows, ModelError};
use std::collections::HashMap;
use std::sync::Arc;

/// The model, the state of every sequence that has begun, and what ended ones have left.
pub(super) struct ModelRunner {
    model: Box<dyn CausalLm>,
    pool: KvPool,
    states: HashMap<SequenceId, SequenceState>,
    /// None when nothing is kept.
    prefixes: Option<PrefixTree<Arc<Block>, Snapshot>>,
    metrics: ModelMetrics,
}

/// The logits of one step.
pub(super) struct Logits {
    values: Vec<f32>,
    vocab: usize,
    /// How many tokens of each of the plan's rows have logits.
    counts: Vec<usize>,
}

impl Logits {
    /// Those of each of the plan's rows, in order: one token's after another's.
    pub(super) fn by_row(&mut self) -> impl Iterator<Item = &mut [f32]> {
        let (mut rest, vocab) = (self.values.as_mut_slice(), self.vocab);
        self.counts.iter().map(move |count| {
            let (row, after) = std::mem::take(&mut rest).split_at_mut(count * vocab);
            rest = after;
            row
        })
    }

    /// Length of one token's logits.
    pub(super) fn vocab(&self) -> usize {
        self.vocab
    }
}

impl ModelRunner {
    /// `blocks` is how many there may be, `snapshot_bytes` what saved states may hold; with zero nothing is kept.
    pub(super) fn new(
        model: Box<dyn CausalLm>,
        blocks: usize,
        snapshot_bytes: u64,
        metrics: ModelMetrics,
    ) -> Self {
        let pool = model.pool().clone();
        pool.set_capacity(blocks);
        metrics.blocks.set(whole(blocks));
        Self {
            model,
            pool,
            states: HashMap::new(),
            prefixes: (snapshot_bytes > 0).then(|| PrefixTree::new(snapshot_bytes)),
            metrics,
        }
    }

    /// Lets the state of a sequence go.
    pub(super) fn forget(&mut self, id: SequenceId) {
        self.states.remove(&id);
    }

    /// Keeps the state of a sequence as it is now for others that begin like it.
    pub(super) fn keep(&mut self, sequence: &Sequence) {
        let (Some(prefixes), Some(state)) = (&mut self.prefixes, self.states.get(&sequence.id))
        else {
            return;
        };
        let tokens = &sequence.tokens[..state.len()];
        let snapshot = || {
            let snapshot = state.snapshot();
            let bytes = snapshot.bytes();
            (snapshot, bytes)
        };
        if prefixes.keep(sequence.salt.as_ref(), tokens, state.blocks(), snapshot) {
            self.metrics.snapshots_saved.inc();
        }
        self.tell();
    }

    /// Computes the rows of `plan`.
    pub(super) fn run(&mut self, plan: &Plan, scheduler: &Scheduler) -> Result<Logits, ModelError> {
        let mut batch = Batch::default();
        let mut states = Vec::with_capacity(plan.rows.len());
        let mut counts = Vec::with_capacity(plan.rows.len());
        for (index, row) in plan.rows.iter().enumerate() {
            let sequence = scheduler
                .running(row.sequence)
                .expect("a planned sequence runs");
            let (logits, count) = match (row.every, row.sample) {
                (true, _) => (LogitRows::All, row.tokens.len()),
                (false, true) => (LogitRows::Last, 1),
                (false, false) => (LogitRows::None, 0),
            };
            counts.push(count);
            batch.push(index, &sequence.tokens[row.tokens.clone()], logits);
            let state = self.states.remove(&row.sequence);
            states.push(state.expect("a sequence that runs has a state"));
        }
        self.free_blocks(plan, &states);
        let logits = self
            .model
            .forward(&batch, &mut states.iter_mut().collect::<Vec<_>>())?;
        for (row, state) in plan.rows.iter().zip(states) {
            self.states.insert(row.sequence, state);
        }
        self.tell();
        Ok(Logits {
            values: logits.flatten_all()?.to_vec1()?,
            vocab: self.model.vocab_size(),
            counts,
        })
    }

    /// Lets go of what ended sequences have left until the rows of `plan` have room. What runs fits by itself: the
    /// scheduler has seen to that.
    fn free_blocks(&mut self, plan: &Plan, states: &[SequenceState]) {
        let wanted = |states: &[SequenceState]| -> usize {
            let rows = plan.rows.iter().zip(states);
            rows.map(|(row, state)| state.wanted_blocks(row.tokens.len()))
                .sum()
        };
        let Some(prefixes) = &mut self.prefixes else {
            return;
        };
        while self.pool.free() < wanted(states) {
            if !prefixes.evict(|block| Arc::strong_count(block) == 1) {
                break;
            }
        }
    }

    fn tell(&mut self) {
        self.metrics.blocks_used.set(whole(self.pool.out()));
        if let Some(prefixes) = &mut self.prefixes {
            self.metrics
                .snapshots_evicted
                .inc_by(prefixes.take_evicted());
            self.metrics
                .snapshot_bytes
                .set(i64::try_from(prefixes.snapshot_bytes()).unwrap_or(i64::MAX));
        }
    }
}

impl Store for ModelRunner {
    fn blocks(&self, tokens: usize) -> usize {
        KvShape::blocks(tokens)
    }

    fn begin(&mut self, sequence: &Sequence) -> Begun {
        let mut begun = Begun::default();
        let mut state = None;
        if let Some(prefixes) = &mut self.prefixes
            && !sequence.every_logit
        {
            let lookup = prefixes.find(sequence.salt.as_ref(), &sequence.tokens);
            begun.save_at = lookup.fork;
            if let Some(Found {
                blocks,
                snapshot,
                tokens,
            }) = lookup.found
            {
                begun.computed = tokens;
                state = Some(snapshot.resume(blocks, self.pool.clone()));
            }
            self.metrics
                .cache_queries
                .inc_by(sequence.tokens.len() as u64);
            self.metrics.cache_hits.inc_by(begun.computed as u64);
        }
        let state = state.unwrap_or_else(|| self.model.new_state());
        self.states.insert(sequence.id, state);
        begun
    }
}

fn whole(count: usize) -> i64 {
    i64::try_from(count).unwrap_or(i64::MAX)
}
