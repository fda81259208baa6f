//! Scores of the engine → log probabilities on the wire.

use crate::text::output::Scored;
use crate::text::tokenizer::Tokenizer;
use protocol::tokens::{ChatLogprob, ChatLogprobs, CompletionLogprobs, TopLogprob};
use std::fmt::Write;

/// JSON has no number for what is impossible.
const LEAST: f32 = -9999.0;

fn finite(logprob: f32) -> f32 {
    logprob.max(LEAST)
}

/// As chat completions spell them; none where there are none.
pub(super) fn chat(tokenizer: &Tokenizer, scored: &[Scored]) -> Option<ChatLogprobs> {
    let top = |(token, logprob): &(u32, f32)| {
        let bytes = tokenizer.spelling(*token);
        TopLogprob {
            token: String::from_utf8_lossy(bytes).into_owned(),
            logprob: finite(*logprob),
            bytes: bytes.to_vec(),
        }
    };
    let content: Vec<ChatLogprob> = scored
        .iter()
        .map(|scored| {
            let own = top(&(scored.token, scored.logprob));
            ChatLogprob {
                token: own.token,
                logprob: own.logprob,
                bytes: own.bytes,
                top_logprobs: scored.top.iter().map(top).collect(),
            }
        })
        .collect();
    (!content.is_empty()).then_some(ChatLogprobs { content })
}

/// Writes the scores of one text, and knows where in it the next token begins.
#[derive(Debug, Default, Clone)]
pub(super) struct TextScores {
    offset: u64,
}

impl TextScores {
    /// A prompt as text completions spell it; its first token has no score.
    pub(super) fn prompt(
        &mut self,
        tokenizer: &Tokenizer,
        ids: &[u32],
        scores: &[Option<Scored>],
    ) -> CompletionLogprobs {
        let mut out = CompletionLogprobs::default();
        for (id, score) in ids.iter().zip(scores) {
            self.add(tokenizer, *id, score.as_ref(), &mut out);
        }
        out
    }

    /// More of an answer as text completions spell it.
    pub(super) fn answer(
        &mut self,
        tokenizer: &Tokenizer,
        scored: &[Scored],
        out: &mut CompletionLogprobs,
    ) {
        for scored in scored {
            self.add(tokenizer, scored.token, Some(scored), out);
        }
    }

    fn add(
        &mut self,
        tokenizer: &Tokenizer,
        id: u32,
        scored: Option<&Scored>,
        out: &mut CompletionLogprobs,
    ) {
        out.text_offset.push(self.offset);
        out.tokens.push(spelt(tokenizer, id));
        out.token_logprobs
            .push(scored.map(|scored| finite(scored.logprob)));
        out.top_logprobs.push(scored.map(|scored| {
            let top = scored.top.iter().map(|(id, logprob)| (*id, *logprob));
            top.chain([(scored.token, scored.logprob)])
                .map(|(id, logprob)| (spelt(tokenizer, id), finite(logprob)))
                .collect()
        }));
        // Special tokens are no part of the text.
        if tokenizer.special(id).is_none() {
            let text = String::from_utf8_lossy(tokenizer.spelling(id));
            self.offset += text.chars().count() as u64;
        }
    }
}

/// A token's text, so that different tokens have different ones: those that are no UTF-8 byte by byte.
pub(super) fn spelt(tokenizer: &Tokenizer, id: u32) -> String {
    let bytes = tokenizer.spelling(id);
    match std::str::from_utf8(bytes) {
        Ok(text) => text.to_owned(),
        Err(_) => bytes.iter().fold("bytes:".to_owned(), |mut text, byte| {
            // Writing to a string cannot fail.
            let _ = write!(text, "\\x{byte:02x}");
            text
        }),
    }
}
