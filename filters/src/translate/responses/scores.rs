//! Which tokens a text is made of.
//!
//! A node tells the log probabilities of all tokens, of tags and thinking too, each no later than its text. This API
//! shows those of the answer alone, beside the text they are of.

use protocol::tokens::ChatLogprob;
use std::collections::VecDeque;

/// Tokens whose text, or the end of it, has not come yet.
#[derive(Debug, Default)]
pub(super) struct Scores {
    waiting: VecDeque<Waiting>,
}

/// A token, and what of its text has not come yet.
#[derive(Debug)]
struct Waiting {
    /// None once it has been told.
    score: Option<ChatLogprob>,
    left: Vec<u8>,
}

impl Scores {
    /// Tokens that came with a chunk.
    pub(super) fn add(&mut self, scores: &[ChatLogprob]) {
        self.waiting.extend(scores.iter().map(|score| Waiting {
            score: Some(score.clone()),
            left: match &score.bytes[..] {
                [] => score.token.clone().into_bytes(),
                bytes => bytes.to_vec(),
            },
        }));
    }

    /// The tokens that `text`, which has come now, is made of. Those before it were of no text: tags, or what a parser cut
    /// away. Where it cannot be found among them, all that wait are taken to be its.
    pub(super) fn take(&mut self, text: &str) -> Vec<ChatLogprob> {
        if self.waiting.is_empty() {
            return Vec::new();
        }
        let bytes: Vec<u8> = self
            .waiting
            .iter()
            .flat_map(|token| &token.left)
            .copied()
            .collect();
        let Some(start) = memchr::memmem::find(&bytes, text.as_bytes()) else {
            let all = self.waiting.drain(..);
            return all.filter_map(|token| token.score).collect();
        };
        let end = start + text.len();
        let (mut before, mut taken) = (0, Vec::new());
        while let Some(token) = self.waiting.front_mut() {
            let after = before + token.left.len();
            if after > start && before < end {
                taken.extend(token.score.take());
            }
            if after > end {
                token.left.drain(..end.saturating_sub(before));
                break;
            }
            self.waiting.pop_front();
            before = after;
        }
        taken
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scores(tokens: &[&str]) -> Scores {
        let mut scores = Scores::default();
        let tokens = tokens.iter().map(|token| ChatLogprob {
            token: (*token).into(),
            logprob: -1.0,
            bytes: token.as_bytes().to_vec(),
            top_logprobs: Vec::new(),
        });
        scores.add(&tokens.collect::<Vec<_>>());
        scores
    }

    fn check(tokens: &[&str], texts: &[(&str, &[&str])]) {
        let mut scores = scores(tokens);
        for (text, expected) in texts {
            let taken = scores.take(text);
            let taken: Vec<&str> = taken.iter().map(|score| &score.token[..]).collect();
            assert_eq!(taken, *expected, "{text} of {tokens:?}");
        }
    }

    #[test]
    fn a_text_has_its_tokens_and_tags_belong_to_none() {
        check(
            &["hm", "</think>", "\n\n", "Yes", ".", "<end>"],
            &[("hm", &["hm"]), ("Yes.", &["Yes", "."])],
        );
    }

    #[test]
    fn a_token_that_two_texts_share_is_told_with_the_first() {
        check(
            &["ab<", "x", "y"],
            &[("ab", &["ab<"]), ("<x", &["x"]), ("y", &["y"])],
        );
    }

    #[test]
    fn what_the_answer_repeats_of_the_thought_is_found_behind_it() {
        check(
            &["Yes", "!", "</think>", "Yes"],
            &[("Yes!", &["Yes", "!"]), ("Yes", &["Yes"])],
        );
    }

    #[test]
    fn tokens_that_spell_something_else_are_kept_all_the_same() {
        check(&["\u{fffd}", "x"], &[("é", &["\u{fffd}", "x"]), ("z", &[])]);
    }
}
