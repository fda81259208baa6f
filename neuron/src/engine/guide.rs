//! What holds an answer to its bounds token by token: the thinking budget and the grammar.

use crate::text::grammar::{Grammar, GrammarError, Mask};
use crate::text::output::Output;
use std::collections::VecDeque;
use std::sync::Arc;

/// How long a model may think, and how its block is closed when that is over.
#[derive(Debug, Clone)]
pub struct ThinkingBudget {
    /// Tokens inside the block.
    pub tokens: u64,
    /// The end of the block, as the model would write it.
    pub close: Arc<[u32]>,
}

/// Where a grammar holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scope {
    /// From the end of the thinking to the end of the answer.
    Answer,
    /// Inside each tool call, from its beginning to its end.
    Calls,
}

/// The bounds of one answer. Without any it lets every token pass.
#[derive(Debug, Clone, Default)]
pub struct Guide {
    budget: Option<ThinkingBudget>,
    grammar: Option<(Grammar, Scope)>,
    /// What stands between the thinking and the answer, for answers that a grammar would not let begin with it.
    gap: Arc<[u32]>,
    /// Tokens that come before anything else.
    forced: VecDeque<u32>,
    /// The grammar of the call the answer is in.
    call: Option<Grammar>,
    /// The next token is the grammar's.
    masked: bool,
    was_thinking: bool,
}

/// What is said of the next token.
#[derive(Default)]
pub struct Next {
    /// It is this one.
    pub forced: Option<u32>,
    /// It is one of these.
    pub mask: Option<Mask>,
}

impl Guide {
    /// An answer with these bounds. `gap` is what the model writes between thinking and answer.
    #[must_use]
    pub fn new(
        budget: Option<ThinkingBudget>,
        grammar: Option<(Grammar, Scope)>,
        gap: Arc<[u32]>,
    ) -> Self {
        Self {
            budget,
            grammar,
            gap,
            ..Self::default()
        }
    }

    /// What is said of the token after those `output` has taken.
    ///
    /// # Errors
    /// When the grammar has become too complex.
    pub(super) fn next(&mut self, output: &Output) -> Result<Next, GrammarError> {
        self.was_thinking = output.is_thinking();
        self.masked = false;
        if let Some(budget) = self
            .budget
            .take_if(|budget| output.is_thinking() && output.reasoning_tokens() >= budget.tokens)
        {
            self.forced.extend(budget.close.iter());
        }
        if let Some(token) = self.forced.pop_front() {
            return Ok(Next {
                forced: Some(token),
                mask: None,
            });
        }
        let grammar = match &mut self.grammar {
            Some((grammar, Scope::Answer)) if !output.is_thinking() => Some(grammar),
            Some((_, Scope::Calls)) => self.call.as_mut(),
            _ => None,
        };
        let mask = grammar.map(Grammar::mask).transpose()?;
        self.masked = mask.is_some();
        Ok(Next { forced: None, mask })
    }

    /// Takes in the token that came, which `output` has taken in too. True when the grammar says that the answer is whole.
    ///
    /// # Errors
    /// When the grammar does not allow it.
    pub(super) fn accept(&mut self, token: u32, output: &Output) -> Result<bool, GrammarError> {
        match &mut self.grammar {
            Some((grammar, Scope::Answer)) if self.masked => {
                grammar.accept(token)?;
                return Ok(grammar.is_complete());
            }
            Some((_, Scope::Answer))
                if self.was_thinking && !output.is_thinking() && self.forced.is_empty() =>
            {
                self.forced.extend(self.gap.iter());
            }
            Some((fresh, Scope::Calls)) => {
                if let Some(call) = &mut self.call {
                    call.accept(token)?;
                }
                if !output.is_inside_call() {
                    self.call = None;
                } else if self.call.is_none() {
                    self.call = Some(fresh.clone());
                }
            }
            Some((_, Scope::Answer)) | None => {}
        }
        Ok(false)
    }
}
