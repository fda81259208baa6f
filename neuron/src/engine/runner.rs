//! Plan → Batch → logits: the only place in the engine that knows tensors, and the owner of the states.

use super::metrics::ModelMetrics;
use super::plan::Plan;
use super::prefix::{Found, PrefixTree, Spill};
use super::scheduler::{Begun, Bounds, Scheduler, Store};
use super::sequence::{Sequence, SequenceId};
use crate::kernels::argmax;
use crate::kernels::choose::Rule;
use crate::kernels::rows::Rows;
use crate::memory::pool::{BLOCK, KvPool, KvShape};
use crate::memory::{SequenceState, SharedBlock, Snapshot};
use crate::model::{Batch, CausalLm, LogitRows, ModelError, Seen};
use candle_core::{IndexOp, Tensor};
use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// The model, the state of every sequence that has begun, and what ended ones have left.
pub(super) struct ModelRunner {
    model: Box<dyn CausalLm>,
    pool: KvPool,
    states: HashMap<SequenceId, SequenceState>,
    /// None when nothing is kept.
    prefixes: Option<PrefixTree<SharedBlock, Snapshot>>,
    /// Most tokens guessed ahead of a sequence.
    drafts: usize,
    /// Bytes of a state that has not begun, and of one block of keys and values.
    fixed_bytes: u64,
    block_bytes: u64,
    /// Told to others: bytes of all states, blocks kept for later included.
    held: Arc<AtomicU64>,
    /// Of the last step, what the drafting layer works on.
    hidden: Option<Tensor>,
    metrics: ModelMetrics,
}

impl Spill for Snapshot {
    fn spill(&mut self) -> bool {
        self.move_to_host()
    }
}

/// The part of a sequence in drafting.
pub(super) struct Drafting<'a> {
    pub(super) sequence: &'a Sequence,
    /// Which of the last step's rows were its own, those that were taken back not among them.
    pub(super) rows: Range<usize>,
    /// How many tokens to guess: none only lets the layer follow.
    pub(super) count: usize,
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
    /// What the states hold is kept in `held`.
    pub(super) fn new(
        model: Box<dyn CausalLm>,
        bounds: Bounds,
        held: Arc<AtomicU64>,
        metrics: ModelMetrics,
    ) -> Self {
        let fixed_bytes = model.state_bytes(0);
        let mut runner = Self {
            pool: model.pool().clone(),
            states: HashMap::new(),
            prefixes: None,
            drafts: bounds.drafts,
            fixed_bytes,
            block_bytes: model.state_bytes(BLOCK) - fixed_bytes,
            held,
            hidden: None,
            metrics,
            model,
        };
        runner.set_bounds(bounds);
        runner
    }

    /// Lets go of what is kept beyond the bounds. What runs must be within them already.
    pub(super) fn set_bounds(&mut self, bounds: Bounds) {
        match &mut self.prefixes {
            Some(prefixes) => {
                prefixes.set_budget(bounds.snapshot_bytes, bounds.host_snapshot_bytes);
            }
            None if bounds.snapshot_bytes > 0 => {
                let (near, far) = (bounds.snapshot_bytes, bounds.host_snapshot_bytes);
                self.prefixes = Some(PrefixTree::new(near, far));
            }
            None => {}
        }
        if let Some(prefixes) = &mut self.prefixes {
            let kept = |pool: &KvPool| pool.out() > bounds.blocks || bounds.snapshot_bytes == 0;
            while kept(&self.pool) && prefixes.evict(SharedBlock::is_last) {}
        }
        self.model.bound_blocks(bounds.blocks);
        self.metrics.blocks.set(whole(bounds.blocks));
        self.tell();
        if bounds.snapshot_bytes == 0 {
            self.prefixes = None;
        }
    }

    /// Lets the state of a sequence go.
    pub(super) fn forget(&mut self, id: SequenceId) {
        self.states.remove(&id);
        self.tell();
    }

    /// Keeps the state of a sequence as it is now for others that begin like it.
    pub(super) fn keep(&mut self, sequence: &Sequence) {
        let (Some(prefixes), Some(state)) = (&mut self.prefixes, self.states.get(&sequence.id))
        else {
            return;
        };
        let tokens = &sequence.tokens[..state.len()];
        // a device that has no room for it goes on without
        let snapshot = || {
            let snapshot = state.snapshot();
            let bytes = snapshot.bytes();
            snapshot.is_whole().then_some((snapshot, bytes))
        };
        let block = |at| state.block(at);
        if prefixes.keep(sequence.salt.as_ref(), tokens, block, snapshot) {
            self.metrics.snapshots_saved.inc();
        }
        self.tell();
    }

    /// Computes the rows of `plan`.
    pub(super) fn run(&mut self, plan: &Plan, scheduler: &Scheduler) -> Result<Logits, ModelError> {
        let (batch, counts, mut states) = self.begin(plan, scheduler);
        let (hidden, drafts) = (&mut self.hidden, self.drafts > 0);
        let mut fault = None;
        let mut keep = |seen, rows: &Rows| {
            if drafts && seen == Seen::Final {
                match rows.tensor() {
                    Ok(rows) => *hidden = Some(rows),
                    Err(error) => fault = Some(error),
                }
            }
        };
        let mut lent: Vec<&mut SequenceState> = states.iter_mut().collect();
        let logits = if drafts {
            self.model.forward_probed(&batch, &mut lent, &mut keep)?
        } else {
            self.model.forward(&batch, &mut lent)?
        };
        if let Some(fault) = fault {
            return Err(fault.into());
        }
        self.end(plan, states);
        Ok(Logits {
            values: logits.flatten_all()?.to_vec1()?,
            vocab: self.model.vocab_size(),
            counts,
        })
    }

    /// As [`Self::run`], where of each row that samples only the token is wanted that its rule chooses of the first `allowed`, see
    /// [`CausalLm::forward_chosen`].
    pub(super) fn run_chosen(
        &mut self,
        plan: &Plan,
        scheduler: &Scheduler,
        rules: &[Rule],
        allowed: usize,
    ) -> Result<Vec<Option<u32>>, ModelError> {
        let (batch, _, mut states) = self.begin(plan, scheduler);
        let mut lent: Vec<&mut SequenceState> = states.iter_mut().collect();
        let model = &self.model;
        let chosen = model.forward_chosen(&batch, &mut lent, rules, allowed)?;
        self.end(plan, states);
        Ok(chosen)
    }

    /// The rows of `plan` as the model takes them, how many tokens of each have logits, and their states, which have room.
    fn begin(
        &mut self,
        plan: &Plan,
        scheduler: &Scheduler,
    ) -> (Batch, Vec<usize>, Vec<SequenceState>) {
        let mut batch = Batch::default();
        let mut states = Vec::with_capacity(plan.rows.len());
        let mut counts = Vec::with_capacity(plan.rows.len());
        for (index, row) in plan.rows.iter().enumerate() {
            let sequence = scheduler
                .running(row.sequence)
                .expect("a planned sequence runs");
            let tokens = &sequence.tokens[row.tokens.clone()];
            if row.drafts > 0 {
                counts.push(row.count());
                batch.push_revocable(index, &[tokens, &sequence.drafts].concat());
            } else {
                let (logits, count) = match (row.every, row.sample) {
                    (true, _) => (LogitRows::All, row.tokens.len()),
                    (false, true) => (LogitRows::Last, 1),
                    (false, false) => (LogitRows::None, 0),
                };
                counts.push(count);
                batch.push(index, tokens, logits);
            }
            let state = self.states.remove(&row.sequence);
            states.push(state.expect("a sequence that runs has a state"));
        }
        self.free_blocks(plan, &states);
        (batch, counts, states)
    }

    /// Takes the states of a step back.
    fn end(&mut self, plan: &Plan, states: Vec<SequenceState>) {
        for (row, state) in plan.rows.iter().zip(states) {
            self.states.insert(row.sequence, state);
        }
        self.tell();
    }

    /// Takes back all rows of the last step but the first `rows` of its `of`.
    pub(super) fn keep_rows(&mut self, id: SequenceId, rows: usize, of: usize) {
        if let Some(state) = self.states.get_mut(&id) {
            state.keep_rows(rows, of);
        }
    }

    /// Lets the drafting layer follow the last step, and gives for each sequence what it guesses will come next. Only ids
    /// below `vocab` are guessed.
    pub(super) fn draft(
        &mut self,
        drafting: &[Drafting<'_>],
        vocab: usize,
    ) -> Result<Vec<Vec<u32>>, ModelError> {
        let mut guesses = vec![Vec::new(); drafting.len()];
        let Some(hidden) = self.hidden.take().filter(|_| !drafting.is_empty()) else {
            return Ok(guesses);
        };
        let mut batch = Batch::default();
        let (mut states, mut rows) = (Vec::new(), Vec::new());
        for (index, one) in drafting.iter().enumerate() {
            let state = self.states.remove(&one.sequence.id);
            let state = state.expect("a sequence that runs has a state");
            let end = state.len() + 1; // the layer sees each token together with the one before it
            let logits = match one.count {
                0 => LogitRows::None,
                _ => LogitRows::Last,
            };
            batch.push(
                index,
                &one.sequence.tokens[end - one.rows.len()..end],
                logits,
            );
            rows.push(hidden.i(one.rows.clone())?);
            states.push(state);
        }
        let mut hidden = Tensor::cat(&rows, 0)?;
        while !batch.ids.is_empty() {
            let mut refs: Vec<_> = states.iter_mut().collect();
            let Some(drafted) = self.model.draft(&batch, &hidden, &mut refs) else {
                break;
            };
            let drafted = drafted?;
            let (mut next, mut kept) = (Batch::default(), Vec::new());
            let wanting = batch.segments.iter().map(|segment| segment.state);
            let wanting = wanting.filter(|index| drafting[*index].count > 0);
            for (row, (index, logits)) in wanting.zip(drafted.logits.to_vec2::<f32>()?).enumerate()
            {
                let guess = argmax(&logits[..vocab.min(logits.len())]).unwrap_or(0) as u32;
                guesses[index].push(guess);
                if guesses[index].len() < drafting[index].count {
                    next.push(index, &[guess], LogitRows::Last);
                    kept.push(drafted.hidden.i(row..row + 1)?);
                }
            }
            batch = next;
            if !kept.is_empty() {
                hidden = Tensor::cat(&kept, 0)?;
            }
        }
        for (one, mut state) in drafting.iter().zip(states) {
            state.follow();
            self.states.insert(one.sequence.id, state);
        }
        Ok(guesses)
    }

    /// Lets go of what ended sequences have left until the rows of `plan` have room. What runs fits by itself: the
    /// scheduler has seen to that.
    fn free_blocks(&mut self, plan: &Plan, states: &[SequenceState]) {
        let wanted = |states: &[SequenceState]| -> usize {
            let rows = plan.rows.iter().zip(states);
            rows.map(|(row, state)| state.wanted_blocks(row.count() + self.drafts))
                .sum()
        };
        let Some(prefixes) = &mut self.prefixes else {
            return;
        };
        while self.pool.free() < wanted(states) {
            if !prefixes.evict(SharedBlock::is_last) {
                break;
            }
        }
    }

    fn tell(&mut self) {
        self.metrics.blocks_used.set(whole(self.pool.out()));
        let held = self.states.values().map(|state| state.blocks().len());
        self.metrics.blocks_in_sequences.set(whole(held.sum()));
        let blocks = self.pool.held() as u64 * self.block_bytes;
        let states = self.states.len() as u64 * self.fixed_bytes;
        let saved = self.prefixes.as_ref().map(PrefixTree::snapshot_bytes);
        let (saved, on_host) = saved.unwrap_or_default();
        let held = blocks + states + self.model.trails_held() + saved;
        self.held.store(held, Ordering::Relaxed);
        if let Some(prefixes) = &mut self.prefixes {
            self.metrics
                .snapshots_evicted
                .inc_by(prefixes.take_evicted());
            self.metrics
                .snapshots_spilled
                .inc_by(prefixes.take_spilled());
            let bytes = |bytes| i64::try_from(bytes).unwrap_or(i64::MAX);
            self.metrics.snapshot_bytes.set(bytes(saved));
            self.metrics.host_snapshot_bytes.set(bytes(on_host));
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
                // a device that has no room for a copy begins anew
                state = Some(snapshot.resume(blocks)).filter(SequenceState::is_whole);
                begun.computed = state.as_ref().map_or(0, |_| tokens);
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
