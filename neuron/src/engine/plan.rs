//! What one step computes: small, plain, decided once.

use super::sequence::SequenceId;
use std::ops::Range;

/// The rows of one step.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Plan {
    /// One entry per sequence in the step: those that write first, then pieces of prompts.
    pub rows: Vec<Row>,
    /// Sequences that begin with this step.
    pub started: Vec<SequenceId>,
    /// Sequences set back to make room; their states are to be let go before the step.
    pub preempted: Vec<SequenceId>,
}

/// The part of one sequence in a step.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Row {
    /// Whose tokens.
    pub sequence: SequenceId,
    /// Which of its tokens the state takes in.
    pub tokens: Range<usize>,
    /// These are the last it has, so the next one is sampled.
    pub sample: bool,
    /// The logits of each of them are wanted, not of the last alone.
    pub every: bool,
    /// The state after them is to be saved for others.
    pub save: bool,
}

impl Plan {
    /// Nothing to compute.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    /// Tokens of sequences that write, and of prompts.
    #[must_use]
    pub fn token_counts(&self) -> (usize, usize) {
        let (writing, reading): (Vec<_>, Vec<_>) =
            self.rows.iter().partition(|row| row.is_writing());
        let sum = |rows: Vec<&Row>| rows.iter().map(|row| row.tokens.len()).sum();
        (sum(writing), sum(reading))
    }
}

impl Row {
    /// One token in, one out.
    #[must_use]
    pub fn is_writing(&self) -> bool {
        self.sample && self.tokens.len() == 1
    }
}
