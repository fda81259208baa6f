//! What a GGUF file has beside weights: tokenizer, chat template, and advice on sampling.

use super::folder::{FolderError, ModelText, SamplingDefaults, TemplateSource};
use crate::text::tokenizer::Tokenizer;
use crate::weights::{Gguf, open_gguf};
use serde_json::{Map, Value, json};
use std::path::Path;
use std::sync::Arc;

/// Everything a request needs to become tokens and its answer to become text.
pub(super) fn text(path: &Path) -> Result<ModelText, FolderError> {
    let file = open_gguf(path)?;
    let json = tokenizer(&file, path)?.to_string();
    let tokenizer = Arc::new(Tokenizer::from_json(json.as_bytes(), path)?);
    let spelt = |key: &str| {
        let id = u32::try_from(file.whole(key)?).ok()?;
        tokenizer.special(id).map(str::to_owned)
    };
    let begins = file.flag("tokenizer.ggml.add_bos_token") == Some(true);
    let source = TemplateSource {
        text: needed(path, "tokenizer.chat_template", |key| file.text(key))?.to_owned(),
        bos_token: begins
            .then(|| spelt("tokenizer.ggml.bos_token_id"))
            .flatten(),
        eos_token: spelt("tokenizer.ggml.eos_token_id"),
    };
    let eos = eos(&file, &tokenizer);
    if eos.is_empty() {
        return Err(FolderError::Value {
            path: path.into(),
            key: "tokenizer.ggml.eos_token_id",
            what: "is missing; without one no answer would end".into(),
        });
    }
    let advice = |key: &str| file.real(&format!("general.sampling.{key}"));
    let sampling = SamplingDefaults {
        temperature: advice("temp").unwrap_or(1.0),
        top_p: advice("top_p").unwrap_or(1.0),
        top_k: advice("top_k").unwrap_or(0.0) as i64,
        min_p: advice("min_p").unwrap_or(0.0),
        repetition_penalty: advice("penalty_repeat").unwrap_or(1.0),
    };
    ModelText::new(path, tokenizer, source, eos, sampling)
}

/// The value of `key`, which must be there.
fn needed<T>(
    path: &Path,
    key: &'static str,
    value: impl Fn(&str) -> Option<T>,
) -> Result<T, FolderError> {
    value(key).ok_or_else(|| FolderError::Value {
        path: path.into(),
        key,
        what: "is missing or of the wrong kind".into(),
    })
}

/// Tokens that end an answer. A file names one; the releases' generation_config.json has both that end a turn and a text.
fn eos(file: &Gguf, tokenizer: &Tokenizer) -> Vec<u32> {
    let named = ["tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id"];
    let named = named
        .iter()
        .filter_map(|key| u32::try_from(file.whole(key)?).ok());
    let known = ["<|im_end|>", "<|endoftext|>"];
    let known = known.iter().filter_map(|token| tokenizer.id_of(token));
    let mut all: Vec<u32> = Vec::new();
    for id in named.chain(known) {
        if !all.contains(&id) {
            all.push(id);
        }
    }
    all
}

/// A token of a text, as others.
const NORMAL: i64 = 1;
/// A special token.
const CONTROL: i64 = 3;
/// A token that is added, but no special one.
const USER_DEFINED: i64 = 4;
/// A row of the embedding without a token.
const UNUSED: i64 = 5;

/// `tokenizer.json` of a release with the same tokens.
fn tokenizer(file: &Gguf, path: &Path) -> Result<Value, FolderError> {
    let wrong = |key: &'static str, what: String| {
        let path = path.into();
        Err(FolderError::Value { path, key, what })
    };
    let model = needed(path, "tokenizer.ggml.model", |key| file.text(key))?;
    if model != "gpt2" {
        let what = format!("is \"{model}\"; only \"gpt2\", byte-level pairs, is read");
        return wrong("tokenizer.ggml.model", what);
    }
    // which letters make a word: from llama.cpp's table of tokenizers and the releases' tokenizer.json
    let letters = match needed(path, "tokenizer.ggml.pre", |key| file.text(key))? {
        "qwen2" => r"\p{L}",
        "qwen35" => r"\p{L}\p{M}",
        other => {
            let what = format!("is \"{other}\"; read are \"qwen2\" and \"qwen35\"");
            return wrong("tokenizer.ggml.pre", what);
        }
    };
    let word = match letters {
        r"\p{L}" => letters.to_owned(),
        _ => format!("[{letters}]"),
    };
    let pattern = format!(
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?{word}+|\p{{N}}| ?[^\s{letters}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    );
    let tokens = needed(path, "tokenizer.ggml.tokens", |key| file.texts(key))?;
    let kinds = needed(path, "tokenizer.ggml.token_type", |key| file.wholes(key))?;
    let merges = needed(path, "tokenizer.ggml.merges", |key| file.texts(key))?;
    if kinds.len() != tokens.len() {
        let what = format!("has {} entries for {} tokens", kinds.len(), tokens.len());
        return wrong("tokenizer.ggml.token_type", what);
    }
    let (mut vocabulary, mut added) = (Map::new(), Vec::new());
    for (id, (token, kind)) in tokens.iter().zip(kinds).enumerate() {
        match kind {
            UNUSED => {}
            CONTROL | USER_DEFINED => added.push(json!({
                "id": id,
                "content": token,
                "single_word": false,
                "lstrip": false,
                "rstrip": false,
                "normalized": false,
                "special": kind == CONTROL,
            })),
            NORMAL if added.is_empty() && vocabulary.len() == id => {
                vocabulary.insert((*token).to_owned(), id.into());
            }
            kind => {
                let what = format!("is {kind} of token {id}: added tokens must come last");
                return wrong("tokenizer.ggml.token_type", what);
            }
        }
    }
    Ok(json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": added,
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false},
            {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false},
        ]},
        "post_processor": null,
        "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
        "model": {
            "type": "BPE",
            "dropout": null,
            "unk_token": null,
            "continuing_subword_prefix": null,
            "end_of_word_suffix": null,
            "fuse_unk": false,
            "byte_fallback": false,
            "ignore_merges": false,
            "vocab": vocabulary,
            "merges": merges,
        },
    }))
}
