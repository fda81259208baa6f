//! What the targets share: input is cut in ways that depend on it alone, so that a finding can be replayed.

pub mod files;
pub mod upstream;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use std::hash::{DefaultHasher, Hash, Hasher};

/// Random numbers that are the same whenever `input` is.
#[must_use]
pub fn seeded(input: &[u8]) -> StdRng {
    let mut hasher = DefaultHasher::new();
    input.hash(&mut hasher);
    StdRng::seed_from_u64(hasher.finish())
}

/// The pieces of `bytes`, cut at random: some short, some long, some empty.
#[must_use]
pub fn cut<'a>(bytes: &'a [u8], random: &mut StdRng) -> Vec<&'a [u8]> {
    let longest = [1, 4, 40, 400][random.random_range(0..4)];
    let mut rest = bytes;
    let mut pieces = Vec::new();
    while !rest.is_empty() {
        let (piece, after) = rest.split_at(random.random_range(0..=longest.min(rest.len())));
        pieces.push(piece);
        rest = after;
    }
    pieces
}

/// The same, cut between letters.
#[must_use]
pub fn cut_text<'a>(text: &'a str, random: &mut StdRng) -> Vec<&'a str> {
    let longest = [1, 4, 40, 400][random.random_range(0..4)];
    let mut rest = text;
    let mut pieces = Vec::new();
    while !rest.is_empty() {
        let mut end = random.random_range(0..=longest.min(rest.len()));
        while !rest.is_char_boundary(end) {
            end += 1;
        }
        let (piece, after) = rest.split_at(end);
        pieces.push(piece);
        rest = after;
    }
    pieces
}

/// `input`, in which letters below the number of `parts` stand for these.
#[must_use]
pub fn spelt(input: &str, parts: &[&str]) -> String {
    let mut text = String::new();
    for letter in input.chars() {
        match parts.get(letter as usize) {
            Some(part) => text.push_str(part),
            None => text.push(letter),
        }
    }
    text
}
