//! `<think>…</think>`: the block before the answer, opened by the prompt or by the model itself.

use super::Piece;
use crate::text::open_end;

const OPEN: &str = "<think>";
const CLOSE: &str = "</think>";

/// Cuts text that comes in pieces at the tags. The tags and the line breaks around them belong to neither side.
#[derive(Debug)]
pub struct ThinkTags {
    place: Place,
    held: String,
    /// From here on a thought is held until it is closed: without that it may have been something else.
    marker: Option<&'static str>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    /// Nothing but white space so far: the model may open the block itself.
    Start,
    /// Just after the opening tag, where line breaks mean nothing.
    Opened,
    /// Inside the block.
    Inside,
    /// Just after the closing tag, where line breaks mean nothing.
    Closed,
    /// In the answer: tags are text from here on.
    After,
}

impl ThinkTags {
    /// `open`: the prompt ended with the opening tag. A block that is never closed ends before `marker`.
    #[must_use]
    pub fn new(open: bool, marker: Option<&'static str>) -> Self {
        Self {
            place: if open { Place::Opened } else { Place::Start },
            held: String::new(),
            marker,
        }
    }

    /// Whether a prompt that ends with `text` has opened the block.
    #[must_use]
    pub fn opened_by(text: &str) -> bool {
        text.trim_end().ends_with(OPEN)
    }

    /// Whether the text so far ends inside the block.
    #[must_use]
    pub fn is_inside(&self) -> bool {
        matches!(self.place, Place::Opened | Place::Inside)
    }

    /// Takes the next piece and appends what it settles.
    pub fn push(&mut self, piece: &str, out: &mut Vec<Piece>) {
        if self.place == Place::After {
            if !piece.is_empty() {
                out.push(Piece::Content(piece.to_owned()));
            }
            return;
        }
        self.held.push_str(piece);
        while self.advance(out) {}
    }

    /// Settles what was held back: the text has ended.
    pub fn finish(&mut self, out: &mut Vec<Piece>) {
        let held = std::mem::take(&mut self.held);
        if held.is_empty() {
            return;
        }
        out.push(match self.place {
            Place::Opened | Place::Inside => match self.marker {
                Some(marker) if held.trim_start().starts_with(marker) => Piece::Unclosed(held),
                _ => Piece::Reasoning(held),
            },
            Place::Start | Place::Closed | Place::After => Piece::Content(held),
        });
    }

    /// One move of the machine over `held`; false when it needs more text.
    fn advance(&mut self, out: &mut Vec<Piece>) -> bool {
        match self.place {
            Place::Start => {
                let text = self.held.trim_start();
                if let Some(rest) = text.strip_prefix(OPEN) {
                    self.held = rest.to_owned();
                    self.place = Place::Opened;
                } else if OPEN.starts_with(text) {
                    return false;
                } else {
                    self.place = Place::After;
                }
                true
            }
            Place::Opened | Place::Closed => {
                let text = self.held.trim_start_matches(['\n', '\r']);
                self.held.drain(..self.held.len() - text.len());
                if self.held.is_empty() {
                    return false;
                }
                self.place = match self.place {
                    Place::Opened => Place::Inside,
                    _ => Place::After,
                };
                true
            }
            Place::Inside => {
                if let Some(at) = self.held.find(CLOSE) {
                    let thought = self.held[..at].trim_end_matches(['\n', '\r']);
                    if !thought.is_empty() {
                        out.push(Piece::Reasoning(thought.to_owned()));
                    }
                    self.held.drain(..at + CLOSE.len());
                    self.place = Place::Closed;
                    return true;
                }
                // Line breaks are held with the tag they may precede.
                let mut end = self.held.len() - open_end(&self.held, CLOSE);
                if let Some(marker) = self.marker {
                    let begun = self.held.len() - open_end(&self.held, marker);
                    end = end.min(self.held.find(marker).unwrap_or(begun));
                }
                let settled = &self.held[..end];
                let settled = settled.trim_end_matches(['\n', '\r']).len();
                if settled > 0 {
                    out.push(Piece::Reasoning(self.held.drain(..settled).collect()));
                }
                false
            }
            Place::After => {
                if !self.held.is_empty() {
                    out.push(Piece::Content(std::mem::take(&mut self.held)));
                }
                false
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::whole::told_apart;
    use super::*;
    use rand::{Rng, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    fn run(open: bool, pieces: &[&str]) -> (String, String) {
        run_with(None, open, pieces)
    }

    fn run_with(marker: Option<&'static str>, open: bool, pieces: &[&str]) -> (String, String) {
        let mut machine = ThinkTags::new(open, marker);
        let mut out = Vec::new();
        for piece in pieces {
            machine.push(piece, &mut out);
        }
        machine.finish(&mut out);
        let (mut reasoning, mut content) = (String::new(), String::new());
        for piece in out {
            match piece {
                Piece::Reasoning(text) => {
                    assert!(content.is_empty(), "reasoning after content: {text:?}");
                    reasoning.push_str(&text);
                }
                Piece::Content(text) => content.push_str(&text),
                Piece::Unclosed(text) => {
                    assert!(marker.is_some(), "only with a marker");
                    content.push_str("[unclosed]");
                    content.push_str(&text);
                }
            }
        }
        (reasoning, content)
    }

    #[test]
    fn a_thought_is_held_from_the_marker_on_until_it_is_closed() {
        for (text, reasoning, content) in [
            ("hm <call> x</think>y", "hm <call> x", "y"),
            ("hm\n<call> x", "hm", "[unclosed]\n<call> x"),
            ("hm <cal", "hm <cal", ""),
            ("<call>", "", "[unclosed]<call>"),
        ] {
            for first in 0..=text.len() {
                for second in first..=text.len() {
                    let pieces = [&text[..first], &text[first..second], &text[second..]];
                    let got = run_with(Some("<call>"), true, &pieces);
                    assert_eq!(got, (reasoning.into(), content.into()), "{pieces:?}");
                }
            }
        }
    }

    #[test]
    fn every_split_tells_thinking_and_answer_apart() {
        for (open, text, reasoning, content) in [
            (true, "\nhm\n\nso\n</think>\n\nyes", "hm\n\nso", "yes"),
            (true, "hm</think><tool_call>", "hm", "<tool_call>"),
            (true, "a < b </thin </think>c", "a < b </thin ", "c"),
            (true, "</think>\n\nyes", "", "yes"),
            (true, "never closed\n", "never closed\n", ""),
            (true, "cut </thi", "cut </thi", ""),
            (false, "<think>\nhm\n</think>\n\nyes", "hm", "yes"),
            (false, "\n<think>hm</think>yes", "hm", "yes"),
            (
                false,
                " plain <think>x</think>",
                "",
                " plain <think>x</think>",
            ),
            (false, "<thin air", "", "<thin air"),
            (false, "ünï\n\n", "", "ünï\n\n"),
            (false, "", "", ""),
        ] {
            for first in 0..=text.len() {
                for second in first..=text.len() {
                    if !text.is_char_boundary(first) || !text.is_char_boundary(second) {
                        continue;
                    }
                    let pieces = [&text[..first], &text[first..second], &text[second..]];
                    let got = run(open, &pieces);
                    assert_eq!(got, (reasoning.into(), content.into()), "{pieces:?}");
                }
            }
        }
    }

    #[test]
    fn random_text_is_told_apart_as_the_whole_of_it_says() {
        const PARTS: [&str; 10] = [
            OPEN, CLOSE, "<call>", "\n", "\r\n", " ", "<", "</think", "a", "é",
        ];
        for seed in 0..3000 {
            let mut random = ChaCha8Rng::seed_from_u64(seed);
            let count = random.random_range(0..12);
            let parts = (0..count).map(|_| PARTS[random.random_range(0..PARTS.len())]);
            let text: String = parts.collect();
            let letters: Vec<String> = text.chars().map(String::from).collect();
            let letters: Vec<&str> = letters.iter().map(String::as_str).collect();
            for open in [true, false] {
                let marker = random.random_bool(0.5).then_some("<call>");
                let (reasoning, content) = run_with(marker, open, &[&text]);
                let cut = run_with(marker, open, &letters);
                assert_eq!(
                    cut,
                    (reasoning.clone(), content.clone()),
                    "seed {seed}: {text:?}"
                );
                let [thought, unclosed, mut answer] = told_apart(open, marker, &text);
                if !unclosed.is_empty() {
                    answer = format!("[unclosed]{unclosed}");
                }
                let expected = (thought, answer);
                assert_eq!((reasoning, content), expected, "seed {seed}: {text:?}");
            }
        }
    }

    #[test]
    fn the_prompt_opens_the_block_only_when_it_ends_with_the_tag() {
        assert!(ThinkTags::opened_by("<|im_start|>assistant\n<think>\n"));
        assert!(!ThinkTags::opened_by("assistant\n<think>\n\n</think>\n\n"));
    }
}
