//! Token ids → what the client reads. The only place that states the order: decode → stop → reasoning → tools → [`Delta`].

use super::reasoning::{self, ThinkTags};
use super::stop::{StopStrings, Stopped};
use super::tokenizer::{Detokenizer, Tokenizer};
use super::tools::{self, ToolCalls, ToolForm};
use protocol::chat::Tool;
use std::sync::Arc;

/// A piece of an answer.
#[derive(Debug, Clone, PartialEq)]
pub enum Delta {
    /// The scores of the prompt's tokens; before everything else. The first has none: nothing precedes it.
    Prompt(Vec<Option<Scored>>),
    /// A token of the answer with its score; before what it adds to the text.
    Scored(Scored),
    /// More of the answer.
    Content(String),
    /// More of the thinking.
    Reasoning(String),
    /// A whole call.
    ToolCall {
        /// Its place among the calls of the answer.
        index: u32,
        /// The function's name.
        name: String,
        /// A JSON object.
        arguments: String,
    },
}

/// A token with its log probability as the model computed it: before temperature, penalties, bias and grammar.
#[derive(Debug, Clone, PartialEq)]
pub struct Scored {
    /// Which.
    pub token: u32,
    /// Its log probability.
    pub logprob: f32,
    /// The likeliest tokens at its place, likeliest first.
    pub top: Vec<(u32, f32)>,
}

/// The text itself asks for the end of the answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ending {
    /// By this stop string.
    StopString(String),
    /// By the first call, where the request wants one at most.
    OneCall,
}

/// What to look for in an answer.
#[derive(Debug, Default)]
pub struct OutputOptions {
    /// Strings that end the answer.
    pub stop: Vec<String>,
    /// Tell thinking apart; true inside: the prompt has opened the block.
    pub thinking: Option<bool>,
    /// Tell calls of these tools apart.
    pub tools: Option<(ToolForm, Arc<[Tool]>)>,
    /// No stop string ends the answer before it has so many tokens.
    pub min_tokens: u64,
    /// End the answer after its first call.
    pub one_call: bool,
}

/// The way of one answer from ids to deltas.
#[derive(Debug)]
pub struct Output {
    decode: Detokenizer,
    stop: StopStrings,
    reasoning: Option<ThinkTags>,
    tools: Option<ToolCalls>,
    one_call: bool,
    calls: u32,
    /// Tokens to come before stop strings are looked for.
    unstoppable: u64,
    reasoning_tokens: u64,
}

impl Output {
    /// The way of an answer that has not begun.
    #[must_use]
    pub fn new(tokenizer: Arc<Tokenizer>, options: OutputOptions) -> Self {
        Self {
            decode: Detokenizer::new(tokenizer),
            stop: StopStrings::new(options.stop),
            reasoning: options.thinking.map(|open| {
                let marker = options.tools.as_ref().map(|_| tools::OPEN);
                ThinkTags::new(open, marker)
            }),
            tools: options
                .tools
                .map(|(form, tools)| ToolCalls::new(form, tools)),
            unstoppable: options.min_tokens,
            one_call: options.one_call,
            calls: 0,
            reasoning_tokens: 0,
        }
    }

    /// Takes the next id and appends what it settles. After an [`Ending`] nothing more may be pushed.
    pub fn push(&mut self, id: u32, out: &mut Vec<Delta>) -> Option<Ending> {
        let was_inside = self.is_thinking();
        let mut decoded = String::new();
        self.decode.push(id, &mut decoded);
        let mut text = String::new();
        let stopped = if self.unstoppable > 0 {
            self.unstoppable -= 1;
            text = decoded;
            Stopped::No
        } else {
            self.stop.push(&decoded, &mut text)
        };
        self.emit(&text, false, out);
        if was_inside || self.is_thinking() {
            self.reasoning_tokens += 1;
        }
        match stopped {
            Stopped::By(stop) => {
                self.emit("", true, out);
                Some(Ending::StopString(stop))
            }
            Stopped::No if self.one_call && self.calls > 0 => Some(Ending::OneCall),
            Stopped::No => None,
        }
    }

    /// Settles everything held back: the model has ended the answer, or its length has.
    pub fn finish(&mut self, out: &mut Vec<Delta>) {
        let mut decoded = String::new();
        self.decode.finish(&mut decoded);
        let mut text = String::new();
        // A broken character cannot complete a stop string: it was not there when the string was written.
        let _ = self.stop.push(&decoded, &mut text);
        self.stop.finish(&mut text);
        self.emit(&text, true, out);
    }

    /// Calls found so far.
    #[must_use]
    pub fn calls(&self) -> u32 {
        self.calls
    }

    /// Tokens inside the thinking block so far, the tags included.
    #[must_use]
    pub fn reasoning_tokens(&self) -> u64 {
        self.reasoning_tokens
    }

    /// Whether the text so far ends inside the thinking block.
    #[must_use]
    pub fn is_thinking(&self) -> bool {
        self.reasoning.as_ref().is_some_and(ThinkTags::is_inside)
    }

    /// Whether the text so far ends inside a call.
    #[must_use]
    pub fn is_inside_call(&self) -> bool {
        self.tools.as_ref().is_some_and(ToolCalls::is_inside)
    }

    /// Reasoning, then tools. `last`: no more text will come.
    fn emit(&mut self, text: &str, last: bool, out: &mut Vec<Delta>) {
        let mut pieces = Vec::new();
        match &mut self.reasoning {
            Some(machine) => {
                machine.push(text, &mut pieces);
                if last {
                    machine.finish(&mut pieces);
                }
            }
            None if text.is_empty() => {}
            None => pieces.push(reasoning::Piece::Content(text.to_owned())),
        }
        for piece in pieces {
            match piece {
                reasoning::Piece::Reasoning(text) => out.push(Delta::Reasoning(text)),
                reasoning::Piece::Content(text) => self.emit_content(&text, out),
                reasoning::Piece::Unclosed(text) => self.emit_unclosed(text, out),
            }
        }
        if last && let Some(machine) = &mut self.tools {
            let mut pieces = Vec::new();
            machine.finish(&mut pieces);
            self.emit_pieces(pieces, out);
        }
    }

    /// A thought that ends in a call and was never closed was no thought any more; without a call in it, it is one.
    fn emit_unclosed(&mut self, text: String, out: &mut Vec<Delta>) {
        let mut pieces = Vec::new();
        if let Some(machine) = &mut self.tools {
            machine.push(&text, &mut pieces);
            machine.finish(&mut pieces);
        }
        if pieces
            .iter()
            .any(|piece| matches!(piece, tools::Piece::Call(_)))
        {
            self.emit_pieces(pieces, out);
        } else {
            out.push(Delta::Reasoning(text));
        }
    }

    fn emit_content(&mut self, text: &str, out: &mut Vec<Delta>) {
        let mut pieces = Vec::new();
        match &mut self.tools {
            Some(machine) => machine.push(text, &mut pieces),
            None => pieces.push(tools::Piece::Content(text.to_owned())),
        }
        self.emit_pieces(pieces, out);
    }

    fn emit_pieces(&mut self, pieces: Vec<tools::Piece>, out: &mut Vec<Delta>) {
        for piece in pieces {
            if self.one_call && self.calls > 0 {
                return;
            }
            out.push(match piece {
                tools::Piece::Content(text) => Delta::Content(text),
                tools::Piece::Call(call) => {
                    self.calls += 1;
                    Delta::ToolCall {
                        index: self.calls - 1,
                        name: call.name,
                        arguments: call.arguments,
                    }
                }
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::text::tokenizer::tests::tiny;
    use serde_json::json;

    fn run(text: &str, options: OutputOptions) -> (Vec<Delta>, Option<Ending>, u64) {
        let tokenizer = tiny();
        let mut output = Output::new(tokenizer.clone(), options);
        let mut out = Vec::new();
        for id in tokenizer.encode(text).unwrap() {
            if let Some(ending) = output.push(id, &mut out) {
                return (out, Some(ending), output.reasoning_tokens());
            }
        }
        output.finish(&mut out);
        (out, None, output.reasoning_tokens())
    }

    fn join(deltas: &[Delta]) -> (String, String, Vec<&str>) {
        let (mut reasoning, mut content, mut calls) = (String::new(), String::new(), Vec::new());
        for delta in deltas {
            match delta {
                Delta::Reasoning(text) => reasoning.push_str(text),
                Delta::Content(text) => content.push_str(text),
                Delta::ToolCall { arguments, .. } => calls.push(arguments.as_str()),
                Delta::Prompt(_) | Delta::Scored(_) => unreachable!("scores are the engine's"),
            }
        }
        (reasoning, content, calls)
    }

    fn tools() -> Option<(ToolForm, Arc<[Tool]>)> {
        let tools = json!([{"type": "function", "function": {"name": "now", "parameters": {
            "properties": {"zone": {"type": "integer"}}}}}]);
        let tools = serde_json::from_value::<Vec<Tool>>(tools).unwrap();
        Some((ToolForm::QwenXml, tools.into()))
    }

    const CALL: &str =
        "<tool_call>\n<function=now>\n<parameter=zone>\n2\n</parameter>\n</function>\n</tool_call>";

    #[test]
    fn thinking_answer_and_call_come_apart() {
        let (deltas, ending, reasoning_tokens) = run(
            &format!("hm\n</think>\n\nI look.\n\n{CALL}"),
            OutputOptions {
                thinking: Some(true),
                tools: tools(),
                ..OutputOptions::default()
            },
        );
        assert_eq!(
            join(&deltas),
            ("hm".into(), "I look.".into(), vec!["{\"zone\":2}"])
        );
        assert_eq!(ending, None);
        let expected = tiny().encode("hm\n</think>").unwrap().len() as u64;
        assert_eq!(reasoning_tokens, expected);
    }

    #[test]
    fn a_stop_string_over_token_borders_ends_the_answer_and_is_not_in_it() {
        let (deltas, ending, _) = run(
            "one two three",
            OutputOptions {
                stop: vec!["wo th".into()],
                thinking: Some(false),
                tools: tools(),
                ..OutputOptions::default()
            },
        );
        assert_eq!(ending, Some(Ending::StopString("wo th".into())));
        assert_eq!(join(&deltas).1, "one t");
    }

    #[test]
    fn a_call_inside_thinking_is_a_call_only_where_the_thinking_was_never_closed() {
        let options = || OutputOptions {
            thinking: Some(true),
            tools: tools(),
            ..OutputOptions::default()
        };
        let (deltas, ..) = run(&format!("hm\n{CALL}"), options());
        assert_eq!(
            join(&deltas),
            ("hm".into(), String::new(), vec!["{\"zone\":2}"])
        );
        let (deltas, ..) = run(&format!("hm\n{CALL}\n</think>\n\nDone."), options());
        assert_eq!(
            join(&deltas),
            (format!("hm\n{CALL}"), "Done.".into(), vec![])
        );
        let (deltas, ..) = run("hm, <tool_call> opens one", options());
        assert_eq!(
            join(&deltas),
            ("hm, <tool_call> opens one".into(), String::new(), vec![])
        );
    }

    #[test]
    fn stop_strings_wait_for_the_least_length() {
        let (deltas, ending, _) = run(
            "a b a b",
            OutputOptions {
                stop: vec!["b".into()],
                min_tokens: tiny().encode("a b").unwrap().len() as u64,
                ..OutputOptions::default()
            },
        );
        assert_eq!(ending, Some(Ending::StopString("b".into())));
        assert_eq!(join(&deltas).1, "a b a ");
    }

    #[test]
    fn one_call_at_most_ends_at_the_first() {
        let (deltas, ending, _) = run(
            &format!("{CALL}\n{CALL}"),
            OutputOptions {
                tools: tools(),
                one_call: true,
                ..OutputOptions::default()
            },
        );
        assert_eq!(ending, Some(Ending::OneCall));
        assert_eq!(join(&deltas).2.len(), 1);
    }
}
