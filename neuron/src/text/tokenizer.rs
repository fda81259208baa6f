//! Text to token ids, and token ids back to text as they come.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tokenizers::DecoderWrapper;

/// The tokenizer of one model. Reading it out of `tokenizer.json` is the slow part; everything else is cheap.
#[derive(Debug)]
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    /// What each id decodes to, one after another; special tokens decode to nothing.
    bytes: Vec<u8>,
    /// Where the bytes of each id end.
    ends: Vec<usize>,
    /// The special tokens by id, as they are spelt.
    special: BTreeMap<u32, String>,
}

/// A tokenizer that cannot be used, or text it cannot read.
#[derive(Debug, thiserror::Error)]
pub enum TokenizerError {
    /// The file is missing or is not a tokenizer.
    #[error("{path}: {reason}")]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// Decoding needs something else than a table of bytes.
    #[error(
        "{path}: its decoder is not ByteLevel, the only kind this daemon reads; use a checkpoint with a byte-level tokenizer"
    )]
    NotByteLevel {
        /// The file.
        path: PathBuf,
    },
    /// The text could not be encoded.
    #[error("the text cannot be tokenised: {0}")]
    Encode(String),
}

impl Tokenizer {
    /// Reads a `tokenizer.json`.
    ///
    /// # Errors
    /// When it is not a byte-level tokenizer.
    pub fn load(path: &Path) -> Result<Self, TokenizerError> {
        let bytes = std::fs::read(path).map_err(|error| TokenizerError::Unreadable {
            path: path.into(),
            reason: error.to_string(),
        })?;
        Self::from_json(&bytes, path)
    }

    /// What a `tokenizer.json` holds, taken from `path`.
    ///
    /// # Errors
    /// As [`Self::load`].
    pub fn from_json(bytes: &[u8], path: &Path) -> Result<Self, TokenizerError> {
        let inner = tokenizers::Tokenizer::from_bytes(bytes).map_err(|error| {
            TokenizerError::Unreadable {
                path: path.into(),
                reason: error.to_string(),
            }
        })?;
        if !matches!(inner.get_decoder(), Some(DecoderWrapper::ByteLevel(_))) {
            return Err(TokenizerError::NotByteLevel { path: path.into() });
        }
        let alphabet = byte_alphabet();
        let added = inner.get_added_tokens_decoder();
        let mut vocabulary = inner.get_vocab(true).into_iter().collect::<Vec<_>>();
        vocabulary.sort_unstable_by_key(|(_, id)| *id);
        let (mut bytes, mut ends) = (Vec::new(), Vec::new());
        for (token, id) in vocabulary {
            // Ids without a token, should there be any, decode to nothing.
            ends.resize(id as usize, bytes.len());
            if !added.get(&id).is_some_and(|token| token.special) {
                let start = bytes.len();
                for letter in token.chars() {
                    if let Some(byte) = alphabet.iter().position(|&known| known == letter) {
                        bytes.push(u8::try_from(byte).expect("the alphabet has 256 letters"));
                    } else {
                        // Not written in the alphabet: an added token that stands for itself.
                        bytes.truncate(start);
                        bytes.extend_from_slice(token.as_bytes());
                        break;
                    }
                }
            }
            ends.push(bytes.len());
        }
        let special = added.into_iter().filter(|(_, token)| token.special);
        let special = special.map(|(id, token)| (id, token.content)).collect();
        Ok(Self {
            inner,
            bytes,
            ends,
            special,
        })
    }

    /// The ids of `text`. Text that spells an added token becomes that token.
    ///
    /// # Errors
    /// When the tokenizer's own rules fail on it.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, TokenizerError> {
        let encoding = self
            .inner
            .encode_fast(text, false)
            .map_err(|error| TokenizerError::Encode(error.to_string()))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// Ids below this have a token. A model's logits have more entries, which must never be sampled.
    #[must_use]
    pub fn vocab_size(&self) -> usize {
        self.ends.len()
    }

    /// The id of `token`, if it is in the vocabulary.
    #[must_use]
    pub fn id_of(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// How a special token is spelt; none for all others.
    #[must_use]
    pub fn special(&self, id: u32) -> Option<&str> {
        self.special.get(&id).map(String::as_str)
    }

    /// What `id` stands for where special tokens are to be seen.
    #[must_use]
    pub fn spelling(&self, id: u32) -> &[u8] {
        self.special(id)
            .map_or_else(|| self.bytes_of(id), str::as_bytes)
    }

    /// The text of `ids`, special tokens spelt out; bytes that are no UTF-8 become U+FFFD.
    #[must_use]
    pub fn spell(&self, ids: &[u32]) -> String {
        let bytes: Vec<u8> = ids
            .iter()
            .flat_map(|&id| self.spelling(id))
            .copied()
            .collect();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// What `id` decodes to; nothing for special tokens.
    pub(super) fn bytes_of(&self, id: u32) -> &[u8] {
        let id = id as usize;
        let Some(&end) = self.ends.get(id) else {
            return &[];
        };
        let start = if id == 0 { 0 } else { self.ends[id - 1] };
        &self.bytes[start..end]
    }
}

/// The letter that stands for each byte in a byte-level vocabulary: printable Latin-1 for itself, the rest from U+0100 on.
fn byte_alphabet() -> [char; 256] {
    let mut next = 256;
    std::array::from_fn(|byte| {
        let code = match byte {
            0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff => byte as u32,
            _ => {
                next += 1;
                next - 1
            }
        };
        char::from_u32(code).expect("all below U+0200, where every code is a character")
    })
}

/// Turns ids into text as they come, never half a character. Each id costs the length of its own bytes.
#[derive(Debug)]
pub struct Detokenizer {
    tokenizer: Arc<Tokenizer>,
    /// The beginning of a character: at most three bytes between calls.
    pending: Vec<u8>,
}

impl Detokenizer {
    /// A decoder at the beginning of a text.
    #[must_use]
    pub fn new(tokenizer: Arc<Tokenizer>) -> Self {
        Self {
            tokenizer,
            pending: Vec::new(),
        }
    }

    /// Appends to `text` every character that `id` completes. Bytes that are no UTF-8 become U+FFFD.
    pub fn push(&mut self, id: u32, text: &mut String) {
        self.pending.extend_from_slice(self.tokenizer.bytes_of(id));
        let mut rest = self.pending.as_slice();
        let open = loop {
            match std::str::from_utf8(rest) {
                Ok(valid) => {
                    text.push_str(valid);
                    break 0;
                }
                Err(error) => {
                    let (valid, after) = rest.split_at(error.valid_up_to());
                    text.push_str(std::str::from_utf8(valid).expect("checked just above"));
                    let Some(bad) = error.error_len() else {
                        break after.len();
                    };
                    text.push(char::REPLACEMENT_CHARACTER);
                    rest = &after[bad..];
                }
            }
        };
        self.pending.drain(..self.pending.len() - open);
    }

    /// Appends what is left of a character that was never completed.
    pub fn finish(&mut self, text: &mut String) {
        if !self.pending.is_empty() {
            self.pending.clear();
            text.push(char::REPLACEMENT_CHARACTER);
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn fixture() -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/models/qwen3_5_text")
    }

    pub(crate) fn tiny() -> Arc<Tokenizer> {
        Arc::new(Tokenizer::load(&fixture().join("tokenizer.json")).unwrap())
    }

    pub(crate) fn decode(tokenizer: &Arc<Tokenizer>, ids: &[u32]) -> String {
        let mut text = String::new();
        let mut decoder = Detokenizer::new(tokenizer.clone());
        for &id in ids {
            decoder.push(id, &mut text);
        }
        decoder.finish(&mut text);
        text
    }

    // The samples were written by the Hugging Face tokenizers package (make_tokenizer.py of the reference).
    #[test]
    fn the_golden_encodings_are_met_both_ways() {
        let golden = std::fs::read(fixture().join("golden_encodings.json")).unwrap();
        let golden: serde_json::Value = serde_json::from_slice(&golden).unwrap();
        let tokenizer = tiny();
        let samples = golden["samples"].as_array().unwrap();
        assert!(samples.len() > 5);
        for sample in samples {
            let ids: Vec<u32> = serde_json::from_value(sample["ids"].clone()).unwrap();
            let text = sample["text"].as_str().unwrap();
            assert_eq!(tokenizer.encode(text).unwrap(), ids, "{text:?}");
            assert_eq!(
                decode(&tokenizer, &ids),
                sample["decoded_skipping_special"].as_str().unwrap()
            );
        }
        for (token, id) in golden["added_tokens"].as_object().unwrap() {
            assert_eq!(
                tokenizer.id_of(token).map(u64::from),
                id.as_u64(),
                "{token}"
            );
        }
    }

    #[test]
    fn a_character_comes_whole_though_its_bytes_come_one_by_one() {
        let tokenizer = tiny();
        let ids = tokenizer.encode("日本 🦀!").unwrap();
        let mut decoder = Detokenizer::new(tokenizer.clone());
        let mut seen = String::new();
        for id in ids {
            let mut piece = String::new();
            decoder.push(id, &mut piece);
            assert!(!piece.contains(char::REPLACEMENT_CHARACTER), "{piece:?}");
            assert!(decoder.pending.len() < 4);
            seen.push_str(&piece);
        }
        assert_eq!(seen, "日本 🦀!");
    }

    #[test]
    fn broken_bytes_are_replaced_as_soon_as_they_cannot_be_mended() {
        let tokenizer = tiny();
        let crab = tokenizer.encode("🦀").unwrap();
        let letter = tokenizer.encode("a").unwrap()[0];
        assert!(crab.len() > 1, "the tiny vocabulary has no crab");
        assert_eq!(decode(&tokenizer, &[crab[0], letter]), "\u{fffd}a");
        assert_eq!(decode(&tokenizer, &crab[..crab.len() - 1]), "\u{fffd}");
    }

    #[test]
    fn an_id_past_the_vocabulary_decodes_to_nothing() {
        let tokenizer = tiny();
        assert_eq!(tokenizer.vocab_size(), 512);
        assert_eq!(decode(&tokenizer, &[100_000]), "");
    }
}
