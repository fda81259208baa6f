//! However an answer is cut, the same of it is thinking, and nothing of it is lost.

#![no_main]

#[path = "../../neuron/src/text/reasoning/whole.rs"]
mod whole;

use fuzz::{cut_text, seeded, spelt};
use libfuzzer_sys::fuzz_target;
use neuron::text::reasoning::{Piece, ThinkTags};

const MARKER: &str = "<tool_call>";
const PARTS: [&str; 8] = [
    "<think>", "</think>", MARKER, "\n", "<", "</think", " ", "\r\n",
];

/// Thinking, what a thought that was never closed may have been instead, and the answer.
fn heard(open: bool, marker: Option<&'static str>, pieces: &[&str]) -> [String; 3] {
    let mut machine = ThinkTags::new(open, marker);
    let mut out = Vec::new();
    for piece in pieces {
        machine.push(piece, &mut out);
    }
    machine.finish(&mut out);
    let mut sums = [const { String::new() }; 3];
    for piece in out {
        match piece {
            Piece::Reasoning(text) => sums[0] += &text,
            Piece::Unclosed(text) => sums[1] += &text,
            Piece::Content(text) => sums[2] += &text,
        }
    }
    sums
}

fuzz_target!(|input: (bool, bool, &str)| {
    let (open, marker, input) = input;
    let text = spelt(input, &PARTS);
    let marker = marker.then_some(MARKER);
    let expected = whole::told_apart(open, marker, &text);
    let pieces = cut_text(&text, &mut seeded(text.as_bytes()));
    for pieces in [vec![&text[..]], pieces] {
        assert_eq!(heard(open, marker, &pieces), expected, "{pieces:?}");
    }
});
