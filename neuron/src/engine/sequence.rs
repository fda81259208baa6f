//! One request as the scheduler sees it: tokens and how far they are computed. No tensor, no text.

use std::sync::Arc;

/// Names a sequence within its engine; rises with arrival and is never used again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SequenceId(pub u64);

/// Where a sequence stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SequenceStatus {
    /// Not begun, or set back to make room: it holds no state.
    Waiting,
    /// Has a state and is computed in every step it fits in.
    Running,
    /// Has a state, but its reader is behind: not computed until that is over.
    Paused,
}

/// The tokens of one request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sequence {
    /// Its name.
    pub id: SequenceId,
    /// Prompt, then what was sampled.
    pub tokens: Vec<u32>,
    /// How many of `tokens` the state has taken in.
    pub computed: usize,
    /// Where it stands.
    pub status: SequenceStatus,
    /// Lower begins earlier.
    pub priority: i64,
    /// Who asks, where that is said: users of the same priority take turns.
    pub user: Option<Arc<str>>,
    /// Which turn it has; the scheduler deals them out.
    pub turn: u64,
    /// The logits of each of its tokens are wanted: its prompt is to be scored, and nothing may be skipped.
    pub every_logit: bool,
    /// Where its state is to be saved for others, rising: a step ends at each.
    pub places: Vec<usize>,
    /// Guesses of the tokens that follow, to be checked by the next step.
    pub drafts: Vec<u32>,
    /// What others must have in common with it, beside its beginning, to go on from what it leaves.
    pub salt: Option<Arc<str>>,
}

/// Tokens of a scored prompt in one step: a row of logits is as long as the vocabulary, so few fit in memory.
const SCORED_TOKENS: usize = 64;

impl Sequence {
    /// A sequence that has not begun. `prompt` must not be empty.
    #[must_use]
    pub fn new(id: SequenceId, prompt: Vec<u32>) -> Self {
        debug_assert!(!prompt.is_empty(), "the api refuses empty prompts");
        Self {
            id,
            tokens: prompt,
            computed: 0,
            status: SequenceStatus::Waiting,
            priority: 0,
            user: None,
            turn: 0,
            every_logit: false,
            places: Vec::new(),
            drafts: Vec::new(),
            salt: None,
        }
    }

    /// Tokens the state has still to take in before the next can be sampled: one while it is writing.
    #[must_use]
    pub fn remaining(&self) -> usize {
        self.tokens.len() - self.computed
    }

    /// How many of them one step with room for `budget` takes in.
    #[must_use]
    pub fn piece(&self, budget: usize) -> usize {
        let most = if self.every_logit {
            SCORED_TOKENS
        } else {
            usize::MAX
        };
        let place = self.places.iter().find(|place| **place > self.computed);
        let to_place = place.map_or(usize::MAX, |place| place - self.computed);
        self.remaining().min(budget).min(most).min(to_place)
    }

    /// Adds a place where its state is to be saved.
    pub fn save_at(&mut self, place: usize) {
        if let Err(at) = self.places.binary_search(&place) {
            self.places.insert(at, place);
        }
    }
}
