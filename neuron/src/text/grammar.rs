//! Grammars: what an answer must look like → which tokens may come next. The parsing is llguidance's.

use super::tokenizer::Tokenizer;
use llguidance::api::TopLevelGrammar;
use llguidance::toktrie::{SimpleVob, TokEnv, TokRxInfo, TokTrie, TokenId, TokenizerEnv};
use llguidance::{Matcher, ParserFactory};
use serde_json::{Value, json};
use std::sync::{Arc, OnceLock};

/// White space between two signs of JSON: a bound, because some models would go on with it for ever.
const JSON_SPACE: &str = r"[\x20\x0A\x0D\x09]{1,40}";

/// What an answer must look like.
#[derive(Debug, Clone, PartialEq)]
pub enum Shape {
    /// JSON that fits a schema.
    JsonSchema(Value),
    /// Text that a regular expression matches as a whole.
    Regex(String),
    /// One of some texts.
    Choice(Vec<String>),
    /// Text in a language described in Lark's notation.
    Lark(String),
}

/// A grammar that cannot be used, or has become too complex on the way.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct GrammarError(String);

/// Makes grammars over one tokenizer. The tables are made when the first is asked for.
pub struct Grammars {
    tokenizer: Arc<Tokenizer>,
    eos: Vec<u32>,
    factory: OnceLock<Result<ParserFactory, GrammarError>>,
}

impl Grammars {
    /// `eos` are the tokens that may end an answer.
    #[must_use]
    pub fn new(tokenizer: Arc<Tokenizer>, eos: Vec<u32>) -> Self {
        Self {
            tokenizer,
            eos,
            factory: OnceLock::new(),
        }
    }

    /// The grammar of `shape`, at its beginning. Takes a processor for a while.
    ///
    /// # Errors
    /// What in it is wrong or not supported.
    pub fn compile(&self, shape: Shape) -> Result<Grammar, GrammarError> {
        let grammar = match shape {
            Shape::JsonSchema(schema) => TopLevelGrammar::from_json_schema(bounded(schema)),
            Shape::Regex(regex) => TopLevelGrammar::from_regex(&regex),
            Shape::Choice(choices) => TopLevelGrammar::from_lark(any_of(&choices)),
            Shape::Lark(text) => TopLevelGrammar::from_lark(text),
        };
        let factory = self.factory.get_or_init(|| self.factory());
        let parser = factory
            .as_ref()
            .map_err(Clone::clone)?
            .create_parser(grammar);
        let mut matcher = Matcher::new(parser);
        // A grammar that compiles and allows nothing is as good as none.
        matcher.compute_mask_or_eos().map_err(told)?;
        Ok(Grammar { matcher })
    }

    fn factory(&self) -> Result<ParserFactory, GrammarError> {
        let tokenizer = &self.tokenizer;
        let size = tokenizer.vocab_size();
        let words: Vec<Vec<u8>> = (0..size)
            .map(|id| {
                let id = u32::try_from(id).expect("a vocabulary is smaller than u32");
                // The marker keeps special tokens out of every text.
                match tokenizer.special(id) {
                    Some(name) => [&[TokTrie::SPECIAL_TOKEN_MARKER], name.as_bytes()].concat(),
                    None => tokenizer.bytes_of(id).to_vec(),
                }
            })
            .collect();
        let eos: Vec<u32> = self
            .eos
            .iter()
            .copied()
            .filter(|&id| (id as usize) < size)
            .collect();
        let first = *eos.first().ok_or_else(|| {
            GrammarError("no token of the vocabulary can end an answer of this model".into())
        })?;
        let info = TokRxInfo::new(size as u32, first);
        let environment: TokEnv = Arc::new(Vocabulary {
            trie: TokTrie::from(&info, &words).with_eos_tokens(&eos),
        });
        let mut factory = ParserFactory::new_simple(&environment).map_err(told)?;
        factory.quiet().limits_mut().verbose_errors = false;
        Ok(factory)
    }
}

impl std::fmt::Debug for Grammars {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Grammars")
            .field("eos", &self.eos)
            .finish_non_exhaustive()
    }
}

fn told(error: impl std::fmt::Display) -> GrammarError {
    GrammarError(error.to_string())
}

/// The schema with bounded white space, unless it says itself how it is to be written.
fn bounded(mut schema: Value) -> Value {
    if let Some(schema) = schema.as_object_mut() {
        schema
            .entry("x-guidance")
            .or_insert_with(|| json!({"whitespace_pattern": JSON_SPACE}));
    }
    schema
}

/// A schema as a rule of a Lark grammar.
#[must_use]
pub fn lark_json(schema: Value) -> String {
    format!("%json {}", bounded(schema))
}

/// A text as a literal of a Lark grammar.
#[must_use]
pub fn lark_text(text: &str) -> String {
    Value::from(text).to_string()
}

fn any_of(choices: &[String]) -> String {
    let choices: Vec<String> = choices.iter().map(|choice| lark_text(choice)).collect();
    format!("start: {}", choices.join(" | "))
}

/// The vocabulary as llguidance wants it. It never asks us for ids of a text: nothing is forced, only masked.
struct Vocabulary {
    trie: TokTrie,
}

impl TokenizerEnv for Vocabulary {
    fn tok_trie(&self) -> &TokTrie {
        &self.trie
    }

    fn tokenize_bytes(&self, text: &[u8]) -> Vec<TokenId> {
        self.trie.greedy_tokenize(text)
    }

    fn tokenize_is_canonical(&self) -> bool {
        false
    }
}

/// A grammar and how far the answer has followed it.
#[derive(Clone)]
pub struct Grammar {
    matcher: Matcher,
}

impl Grammar {
    /// The tokens that may come next; those that end the answer among them where it may end.
    ///
    /// # Errors
    /// When finding out takes more work than is allowed for one token.
    pub fn mask(&mut self) -> Result<Mask, GrammarError> {
        self.matcher.compute_mask_or_eos().map(Mask).map_err(told)
    }

    /// Takes the next token in.
    ///
    /// # Errors
    /// When the grammar does not allow it.
    pub fn accept(&mut self, token: u32) -> Result<(), GrammarError> {
        self.matcher.consume_token(token).map_err(told)
    }

    /// Nothing can follow what there is.
    #[must_use]
    pub fn is_complete(&self) -> bool {
        self.matcher.is_stopped()
    }
}

impl std::fmt::Debug for Grammar {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Grammar")
            .field("complete", &self.is_complete())
            .finish_non_exhaustive()
    }
}

/// Which tokens may come next: a bit each.
pub struct Mask(SimpleVob);

impl Mask {
    /// A bit for each token, in words from the lowest up; tokens past the end are not allowed.
    #[must_use]
    pub fn into_words(self) -> Vec<u32> {
        self.0.as_slice().to_vec()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::text::tokenizer::tests::tiny;

    const EOS: u32 = 481;

    fn grammars() -> Grammars {
        Grammars::new(tiny(), vec![EOS, 479])
    }

    /// Whether a grammar lets `text` pass token by token, and whether it may end there.
    fn follows(shape: Shape, text: &str) -> (bool, bool) {
        let mut grammar = grammars().compile(shape).unwrap();
        for id in tiny().encode(text).unwrap() {
            let mut logits = vec![0.0; 512];
            crate::kernels::choose::forbid(&grammar.mask().unwrap().into_words(), &mut logits);
            if logits[id as usize] != 0.0 {
                return (false, false);
            }
            grammar.accept(id).unwrap();
        }
        let mut logits = vec![0.0; 512];
        crate::kernels::choose::forbid(&grammar.mask().unwrap().into_words(), &mut logits);
        (true, logits[EOS as usize] == 0.0)
    }

    fn schema() -> Shape {
        Shape::JsonSchema(json!({
            "type": "object",
            "properties": {"a": {"type": "integer"}, "b": {"$ref": "#/$defs/word"}},
            "required": ["a"],
            "additionalProperties": false,
            "$defs": {"word": {"enum": ["x", "é"]}},
        }))
    }

    #[test]
    fn a_schema_lets_pass_what_fits_it_and_nothing_else() {
        for (text, passes, may_end) in [
            ("{\"a\": 1, \"b\": \"é\"}", true, true),
            ("{\n  \"a\": 12\n}", true, true),
            ("{\"a\": 1", true, false),
            ("{\"a\": \"1", false, false),
            ("{\"b\"", false, false),
            ("{\"a\": 1, \"c\"", false, false),
            ("Sure", false, false),
        ] {
            assert_eq!(follows(schema(), text), (passes, may_end), "{text}");
        }
    }

    #[test]
    fn the_other_shapes_hold_too() {
        for (shape, text, outcome) in [
            (Shape::Regex("[a-c]{2,3}/d".into()), "abc/d", (true, true)),
            (Shape::Regex("[a-c]{2,3}/d".into()), "abd", (false, false)),
            (
                Shape::Choice(vec!["yes".into(), "yes \"no\"".into()]),
                "yes",
                (true, true),
            ),
            (
                Shape::Choice(vec!["yes".into(), "yes \"no\"".into()]),
                "yes \"n",
                (true, false),
            ),
            (Shape::Choice(vec!["yes".into()]), "no", (false, false)),
            (
                Shape::Lark("start: \"a\" INNER \"c\"\nINNER: /b+/".into()),
                "abbc",
                (true, true),
            ),
        ] {
            assert_eq!(follows(shape.clone(), text), outcome, "{shape:?}: {text}");
        }
    }

    #[test]
    fn what_ends_is_complete_at_once_and_only_then() {
        let mut grammar = grammars()
            .compile(Shape::Choice(vec!["ab".into()]))
            .unwrap();
        for id in tiny().encode("ab").unwrap() {
            assert!(!grammar.is_complete());
            grammar.accept(id).unwrap();
        }
        assert!(grammar.is_complete());
        assert!(grammar.accept(5).is_err(), "nothing may follow");
    }

    #[test]
    fn what_cannot_be_held_to_is_refused_with_a_reason() {
        for shape in [
            Shape::JsonSchema(json!({"type": "nonsense"})),
            Shape::JsonSchema(json!({"$ref": "https://example.com/schema"})),
            Shape::JsonSchema(json!({"type": "object", "not": {"required": ["a"]}})),
            Shape::Regex("(".into()),
            Shape::Lark("start: nowhere".into()),
        ] {
            let error = grammars().compile(shape.clone()).unwrap_err();
            assert!(!error.to_string().is_empty(), "{shape:?}");
        }
    }

    #[test]
    fn special_tokens_are_no_text() {
        // `<|im_start|>` is a special token and, spelt out, also a text that a regex could match.
        let mut grammar = grammars().compile(Shape::Regex("(?s:.*)".into())).unwrap();
        let mut logits = vec![0.0; 520];
        crate::kernels::choose::forbid(&grammar.mask().unwrap().into_words(), &mut logits);
        let start = tiny().id_of("<|im_start|>").unwrap();
        assert_ne!(logits[start as usize], 0.0);
        assert_ne!(logits[515], 0.0, "past the vocabulary nothing is allowed");
        assert_eq!(logits[tiny().id_of("<tool_call>").unwrap() as usize], 0.0);
    }
}
