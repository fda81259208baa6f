//! `<tool_call>…</tool_call>` blocks out of text that comes in pieces.

use super::{Block, CLOSE, OPEN, Piece, ToolForm};
use crate::text::open_end;
use protocol::chat::Tool;
use std::sync::Arc;

/// Finds calls in text that comes in pieces. A block that is no call is given as text: nothing is lost.
#[derive(Debug)]
pub struct ToolCalls {
    form: ToolForm,
    tools: Arc<[Tool]>,
    /// Inside a block: how much of what is held was looked at for its end.
    inside: Option<usize>,
    /// White space before a call belongs to the form, not to the text, and so does all of it after the first.
    called: bool,
    /// The white space before the block, for when it is no call.
    gap: String,
    held: String,
}

impl ToolCalls {
    /// A parser of calls to `tools`.
    #[must_use]
    pub fn new(form: ToolForm, tools: Arc<[Tool]>) -> Self {
        Self {
            form,
            tools,
            inside: None,
            called: false,
            gap: String::new(),
            held: String::new(),
        }
    }

    /// Whether the text so far ends inside a block.
    #[must_use]
    pub fn is_inside(&self) -> bool {
        self.inside.is_some()
    }

    /// Takes the next piece and appends what it settles.
    pub fn push(&mut self, piece: &str, out: &mut Vec<Piece>) {
        self.held.push_str(piece);
        while self.advance(out) {}
    }

    /// Settles what was held back: the text has ended. A call that lacks only its last tag counts.
    pub fn finish(&mut self, out: &mut Vec<Piece>) {
        let held = std::mem::take(&mut self.held);
        if self.inside.take().is_some() {
            out.push(match self.form.parse(&held, &self.tools) {
                Block::Call(call) => Piece::Call(call),
                Block::Text | Block::Open => Piece::Content(format!("{}{OPEN}{held}", self.gap)),
            });
            return;
        }
        let belongs_to_the_form = self.called && held.trim().is_empty();
        if !held.is_empty() && !belongs_to_the_form {
            out.push(Piece::Content(held));
        }
    }

    /// One move of the machine over `held`; false when it needs more text.
    fn advance(&mut self, out: &mut Vec<Piece>) -> bool {
        if let Some(seen) = self.inside {
            return self.end_block(seen, out);
        }
        let tag = self.held.find(OPEN);
        let settled = match tag {
            Some(at) => at,
            None => self.held.len() - open_end(&self.held, OPEN),
        };
        let text = self.held[..settled].trim_end();
        if !text.is_empty() {
            out.push(Piece::Content(text.to_owned()));
        }
        match tag {
            Some(at) => {
                self.gap = self.held[text.len()..at].to_owned();
                self.held.drain(..at + OPEN.len());
                self.inside = Some(0);
                true
            }
            None => {
                // The white space stays: a call may follow it.
                self.held.drain(..text.len());
                false
            }
        }
    }

    /// Looks for the end of a block from `seen` on.
    fn end_block(&mut self, seen: usize, out: &mut Vec<Piece>) -> bool {
        let Some(at) = self.held[seen..].find(CLOSE).map(|at| seen + at) else {
            self.inside = Some(seen.max(self.held.len() - open_end(&self.held, CLOSE)));
            return false;
        };
        let end = at + CLOSE.len();
        match self.form.parse(&self.held[..at], &self.tools) {
            Block::Call(call) => {
                self.called = true;
                out.push(Piece::Call(call));
            }
            Block::Text => {
                let block = &self.held[..end];
                out.push(Piece::Content(format!("{}{OPEN}{block}", self.gap)));
            }
            // The tag is part of a value.
            Block::Open => {
                self.inside = Some(end);
                return true;
            }
        }
        self.held.drain(..end);
        self.inside = None;
        true
    }
}

#[cfg(test)]
mod tests {
    use super::ToolForm::{Hermes, QwenXml};
    use super::*;
    use crate::text::tokenizer::tests::{fixture, tiny};
    use rand::{Rng, SeedableRng};
    use rand_chacha::ChaCha8Rng;
    use serde_json::{Value, json};

    fn tools() -> Arc<[Tool]> {
        serde_json::from_value::<Vec<Tool>>(json!([{
            "type": "function",
            "function": {"name": "find", "parameters": {"type": "object", "properties": {
                "text": {"type": "string"},
                "limit": {"type": "integer"},
                "deep": {"type": ["boolean", "null"]},
                "where": {"anyOf": [{"type": "object"}, {"type": "array"}]},
            }}},
        }, {"type": "function", "function": {"name": "now"}}]))
        .unwrap()
        .into()
    }

    fn run(form: ToolForm, pieces: &[&str]) -> (String, Vec<(String, String)>) {
        let mut machine = ToolCalls::new(form, tools());
        let mut out = Vec::new();
        for piece in pieces {
            machine.push(piece, &mut out);
        }
        machine.finish(&mut out);
        let (mut text, mut calls) = (String::new(), Vec::new());
        for piece in out {
            match piece {
                Piece::Content(content) => text.push_str(&content),
                Piece::Call(call) => calls.push((call.name, call.arguments)),
            }
        }
        (text, calls)
    }

    fn check(form: ToolForm, source: &str, text: &str, calls: &[(&str, Value)]) {
        let cuts: Vec<usize> = (0..=source.len())
            .filter(|&at| source.is_char_boundary(at))
            .collect();
        for &first in &cuts {
            for &second in cuts.iter().filter(|&&cut| cut >= first) {
                let pieces = [&source[..first], &source[first..second], &source[second..]];
                let (got_text, got_calls) = run(form, &pieces);
                assert_eq!(got_text, text, "{pieces:?}");
                let wanted: Vec<_> = calls
                    .iter()
                    .map(|(name, arguments)| ((*name).to_owned(), arguments.to_string()))
                    .collect();
                assert_eq!(got_calls, wanted, "{pieces:?}");
            }
        }
        let letters: Vec<String> = source.chars().map(String::from).collect();
        let letters: Vec<&str> = letters.iter().map(String::as_str).collect();
        assert_eq!(
            run(form, &letters),
            run(form, &[source]),
            "letter by letter: {source}"
        );
    }

    #[test]
    fn a_call_is_found_at_every_split_and_its_values_are_typed() {
        check(
            QwenXml,
            "I look.\n\n<tool_call>\n<function=find>\n<parameter=text>\nline 1\n\nline <3>é\n</parameter>\n<parameter=limit>\n5\n</parameter>\n<parameter=deep>\nTrue\n</parameter>\n<parameter=where>\n{\"a\": [1]}\n</parameter>\n</function>\n</tool_call>",
            "I look.",
            &[(
                "find",
                json!({"text": "line 1\n\nline <3>é", "limit": 5, "deep": true, "where": {"a": [1]}}),
            )],
        );
    }

    #[test]
    fn several_calls_are_several_and_none_leaks() {
        let call = "<tool_call>\n<function=now>\n</function>\n</tool_call>";
        check(
            QwenXml,
            &format!("{call}\n{call}\n"),
            "",
            &[("now", json!({})), ("now", json!({}))],
        );
    }

    #[test]
    fn a_value_that_does_not_fit_its_type_stays_text() {
        check(
            QwenXml,
            "<tool_call><function=find><parameter=limit>many</parameter><parameter=text>5</parameter><parameter=other>7</parameter></function></tool_call>",
            "",
            &[("find", json!({"limit": "many", "text": "5", "other": "7"}))],
        );
    }

    #[test]
    fn what_is_no_call_is_given_as_text() {
        for text in [
            "<tool_call>\nnot a call\n</tool_call> and more",
            "<tool_call>\n<function=unknown>\n</function>\n</tool_call>",
            "<tool_call>\n<function=find>\n<parameter=text>\ncut",
            "a < b, <tool_c",
            "white space \n stays \n",
            "also before \n <tool_call>no call</tool_call> \n and after",
        ] {
            check(QwenXml, text, text, &[]);
        }
    }

    #[test]
    fn a_call_that_lacks_only_its_last_tag_counts() {
        check(
            QwenXml,
            "<tool_call>\n<function=now>\n</function>\n",
            "",
            &[("now", json!({}))],
        );
    }

    #[test]
    fn a_call_in_json_is_found_at_every_split() {
        check(
            Hermes,
            "I look.\n<tool_call>\n{\"name\": \"find\", \"arguments\": {\"text\": \"é \\\"</tool_call>\\\"\", \"limit\": 5}}\n</tool_call>\n<tool_call>{\"name\": \"now\"}</tool_call>\n",
            "I look.",
            &[
                ("find", json!({"text": "é \"</tool_call>\"", "limit": 5})),
                ("now", json!({})),
            ],
        );
    }

    #[test]
    fn arguments_that_are_json_in_a_string_are_read() {
        check(
            Hermes,
            "<tool_call>\n{\"name\": \"find\", \"arguments\": \"{\\\"limit\\\": 5}\"}\n</tool_call>",
            "",
            &[("find", json!({"limit": 5}))],
        );
    }

    #[test]
    fn json_that_is_no_call_is_given_as_text() {
        for text in [
            "<tool_call>\n{\"name\": \"unknown\", \"arguments\": {}}\n</tool_call>",
            "<tool_call>\n{\"name\": \"find\", \"arguments\": [1]}\n</tool_call> and more",
            "<tool_call>\n{\"name\": find}\n</tool_call>",
            "<tool_call>\n{\"name\": \"find\", \"arguments\": {\"text\": \"cut</tool_call>",
            "<tool_call>\n[]\n</tool_call>",
        ] {
            check(Hermes, text, text, &[]);
        }
    }

    #[test]
    fn types_are_found_behind_references_and_lists() {
        let tool = json!([{"type": "function", "function": {"name": "f", "parameters": {
            "properties": {
                "size": {"enum": [1, 2]}, "place": {"$ref": "#/$defs/place"}, "word": {"enum": ["5"]},
                "either": {"type": ["string", "null"]}, "circle": {"$ref": "#/$defs/circle"},
            },
            "$defs": {
                "place": {"anyOf": [{"type": "object"}, {"type": "null"}]},
                "circle": {"anyOf": [{"$ref": "#/$defs/circle"}, {"$ref": "#/$defs/circle"}, {"type": "integer"}]},
            },
        }}}]);
        let tools: Arc<[Tool]> = serde_json::from_value::<Vec<Tool>>(tool).unwrap().into();
        let mut machine = ToolCalls::new(QwenXml, tools);
        let mut out = Vec::new();
        let parameter = |(name, value)| format!("<parameter={name}>\n{value}\n</parameter>\n");
        let given = [
            ("size", "2"),
            ("place", "{\"x\": 1}"),
            ("word", "5"),
            ("either", "\"quoted\""),
            ("circle", "5"),
        ];
        let body: String = given.map(parameter).concat();
        machine.push(
            &format!("<tool_call><function=f>{body}</function></tool_call>"),
            &mut out,
        );
        let [Piece::Call(call)] = &out[..] else {
            panic!("{out:?}");
        };
        assert_eq!(
            serde_json::from_str::<Value>(&call.arguments).unwrap(),
            json!({"size": 2, "place": {"x": 1}, "word": "5", "either": "\"quoted\"", "circle": 5})
        );
    }

    #[test]
    fn a_value_may_hold_the_tag_that_ends_a_block() {
        check(
            QwenXml,
            "<tool_call>\n<function=find>\n<parameter=text>\na </tool_call> b\n</parameter>\n</function>\n</tool_call>",
            "",
            &[("find", json!({"text": "a </tool_call> b"}))],
        );
    }

    /// Follows the grammar of a call token by token.
    fn follows(form: ToolForm, named: Option<&str>, text: &str) -> bool {
        passes(form.shape(&tools(), named, true).unwrap(), text)
    }

    fn passes(shape: crate::text::grammar::Shape, text: &str) -> bool {
        let grammars = crate::text::grammar::Grammars::new(tiny(), vec![481]);
        let mut grammar = grammars.compile(shape).unwrap();
        tiny().encode(text).unwrap().into_iter().all(|id| {
            let mut logits = vec![0.0; 512];
            crate::kernels::choose::forbid(&grammar.mask().unwrap().into_words(), &mut logits);
            logits[id as usize] == 0.0 && grammar.accept(id).is_ok()
        })
    }

    #[test]
    fn the_grammar_of_a_form_lets_its_calls_pass_and_nothing_else() {
        let xml = "<tool_call>\n<function=find>\n<parameter=text>\na <b>\n</parameter>\n<parameter=limit>\n5\n</parameter>\n</function>\n</tool_call>\n<tool_call>\n<function=now>\n</function>\n</tool_call>";
        let json = "<tool_call>\n{\"name\": \"find\", \"arguments\": {\"text\": \"a\", \"limit\": 5}}\n</tool_call>\n<tool_call>\n{\"name\": \"now\", \"arguments\": {}}\n</tool_call>";
        for (form, text) in [(QwenXml, xml), (Hermes, json)] {
            assert!(follows(form, None, text), "{text}");
            assert!(!follows(form, Some("now"), text), "only now: {text}");
            assert!(
                !follows(form, None, &text.replace('5', "\"5\"")),
                "a typed value"
            );
            assert!(!follows(form, None, "Sure"));
        }
    }

    #[test]
    fn an_answer_may_be_calls_or_json() {
        let schema = json!({"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]});
        let xml = "<tool_call>\n<function=find>\n<parameter=any>\nthing\n</parameter>\n</function>\n</tool_call>";
        let json =
            "<tool_call>\n{\"name\": \"find\", \"arguments\": {\"any\": \"thing\"}}\n</tool_call>";
        for (form, call) in [(QwenXml, xml), (Hermes, json)] {
            let shape = form.shape_or_json(&tools(), true, schema.clone()).unwrap();
            assert!(
                passes(shape.clone(), call),
                "tools that are not strict take anything: {call}"
            );
            assert!(passes(shape.clone(), "{\"ok\": true}"));
            assert!(!passes(shape.clone(), "{\"ok\": 5"));
            assert!(!passes(shape, "Sure"));
        }
    }

    #[test]
    fn random_text_is_cut_alike_at_random_and_never_lost() {
        const PARTS: [&str; 18] = [
            OPEN,
            CLOSE,
            "<function=find>",
            "<function=now>",
            "<function=",
            "</function>",
            "<parameter=limit>",
            "<parameter=text>",
            "</parameter>",
            "{\"name\": \"find\", \"arguments\": {\"limit\": ",
            "{\"name\": \"now\"",
            "}",
            "\"",
            "\n",
            " ",
            "5",
            "é",
            "<",
        ];
        for seed in 0..3000 {
            let mut random = ChaCha8Rng::seed_from_u64(seed);
            let count = random.random_range(1..14);
            let parts = (0..count).map(|_| PARTS[random.random_range(0..PARTS.len())]);
            let text: String = parts.collect();
            let cuts = (0..=text.len()).filter(|&at| text.is_char_boundary(at));
            let cuts: Vec<usize> = cuts.collect();
            let mut cut = || cuts[random.random_range(0..cuts.len())];
            let (first, second) = (cut(), cut());
            let (first, second) = (first.min(second), first.max(second));
            let pieces = [&text[..first], &text[first..second], &text[second..]];
            for form in [QwenXml, Hermes] {
                let (content, calls) = run(form, &[&text]);
                assert_eq!(
                    run(form, &pieces),
                    (content.clone(), calls.clone()),
                    "seed {seed}: {pieces:?}"
                );
                if calls.is_empty() {
                    assert_eq!(
                        content, text,
                        "seed {seed}: text without a call stays as it is"
                    );
                }
            }
        }
    }

    #[test]
    fn the_template_shows_the_form() {
        let fixture = std::fs::read_to_string(fixture().join("chat_template.jinja")).unwrap();
        assert_eq!(ToolForm::of_template(&fixture), QwenXml);
        let json = "For each call return <tool_call>\n{\"name\": <function-name>, \"arguments\": <args>}\n</tool_call>";
        assert_eq!(ToolForm::of_template(json), Hermes);
        assert_eq!(ToolForm::of_template("no tools"), QwenXml);
    }
}
