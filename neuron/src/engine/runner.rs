//! Plan → Batch → logits: the only place in the engine that knows tensors, and the owner of the states.

use super::plan::Plan;
use super::scheduler::Scheduler;
use super::sequence::SequenceId;
use crate::memory::SequenceState;
use crate::model::{Batch, CausalLm, LogitRows, ModelError};
use std::collections::HashMap;

/// The model and the state of every sequence that has begun.
pub(super) struct ModelRunner {
    model: Box<dyn CausalLm>,
    states: HashMap<SequenceId, SequenceState>,
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
    pub(super) fn new(model: Box<dyn CausalLm>) -> Self {
        Self {
            model,
            states: HashMap::new(),
        }
    }

    /// Bytes the state of a sequence of `tokens` tokens holds.
    pub(super) fn state_bytes(&self, tokens: usize) -> u64 {
        self.model.state_bytes(tokens)
    }

    /// Lets the state of a sequence go.
    pub(super) fn forget(&mut self, id: SequenceId) {
        self.states.remove(&id);
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
            states.push(match self.states.remove(&row.sequence) {
                Some(state) => state,
                None => self.model.new_state()?,
            });
        }
        let logits = self
            .model
            .forward(&batch, &mut states.iter_mut().collect::<Vec<_>>())?;
        for (row, state) in plan.rows.iter().zip(states) {
            self.states.insert(row.sequence, state);
        }
        Ok(Logits {
            values: logits.flatten_all()?.to_vec1()?,
            vocab: self.model.vocab_size(),
            counts,
        })
    }
}
