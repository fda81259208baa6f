//! Stop strings over token borders.

use super::open_end;

/// Looks for stop strings in text that comes in pieces, holding back only what may be the start of one.
///
/// The match that ends first wins, and of those the longest, so the result does not depend on how the text was cut.
#[derive(Debug)]
pub struct StopStrings {
    stops: Vec<String>,
    held: String,
}

/// What a piece of text turned out to hold.
#[derive(Debug, PartialEq, Eq)]
pub enum Stopped {
    /// No stop string so far.
    No,
    /// This stop string; it and all after it is not part of the answer.
    By(String),
}

impl StopStrings {
    /// Looks for `stops`; empty strings are not looked for.
    #[must_use]
    pub fn new(stops: Vec<String>) -> Self {
        Self {
            stops: stops.into_iter().filter(|stop| !stop.is_empty()).collect(),
            held: String::new(),
        }
    }

    /// Takes the next piece and appends to `out` what is certainly part of the answer.
    pub fn push(&mut self, piece: &str, out: &mut String) -> Stopped {
        self.held.push_str(piece);
        let first = self
            .stops
            .iter()
            .filter_map(|stop| Some((self.held.find(stop.as_str())?, stop)))
            .min_by_key(|(start, stop)| (start + stop.len(), *start));
        if let Some((start, stop)) = first {
            out.push_str(&self.held[..start]);
            self.held.clear();
            return Stopped::By(stop.clone());
        }
        let open = self.stops.iter().map(|stop| open_end(&self.held, stop));
        let safe = self.held.len() - open.max().unwrap_or(0);
        out.extend(self.held.drain(..safe));
        Stopped::No
    }

    /// Appends what was held back: the text has ended without a stop string.
    pub fn finish(&mut self, out: &mut String) {
        out.push_str(&std::mem::take(&mut self.held));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(stops: &[&str], pieces: &[&str]) -> (String, Option<String>) {
        let mut machine = StopStrings::new(stops.iter().map(ToString::to_string).collect());
        let mut out = String::new();
        for piece in pieces {
            if let Stopped::By(stop) = machine.push(piece, &mut out) {
                return (out, Some(stop));
            }
        }
        machine.finish(&mut out);
        (out, None)
    }

    #[test]
    fn every_split_gives_the_same_text_and_the_same_stop() {
        let cases: &[(&[&str], &str, &str, Option<&str>)] = &[
            (&["END"], "say ENE ENDED", "say ENE ", Some("END")),
            (&["\n\n", "User:"], "a\nb\n\nUser: c", "a\nb", Some("\n\n")),
            (&["abcd", "c"], "xabcd", "xab", Some("c")),
            (&["aab"], "aaab!", "a", Some("aab")),
            (&["bc", "abc"], "abc", "", Some("abc")),
            (&["é!"], "aéé!b", "aé", Some("é!")),
            (&["xyz"], "all of xy", "all of xy", None),
            (&[""], "free", "free", None),
        ];
        for &(stops, text, wanted, by) in cases {
            let cuts: Vec<usize> = (0..=text.len())
                .filter(|&at| text.is_char_boundary(at))
                .collect();
            for &first in &cuts {
                for &second in cuts.iter().filter(|&&cut| cut >= first) {
                    let pieces = [&text[..first], &text[first..second], &text[second..]];
                    let (out, stop) = run(stops, &pieces);
                    assert_eq!(out, wanted, "{pieces:?}");
                    assert_eq!(stop.as_deref(), by, "{pieces:?}");
                }
            }
        }
    }

    #[test]
    fn only_a_possible_start_is_held_back() {
        let mut machine = StopStrings::new(vec!["END".into()]);
        let mut out = String::new();
        assert_eq!(machine.push("the EN", &mut out), Stopped::No);
        assert_eq!(out, "the ");
        assert_eq!(machine.push("X", &mut out), Stopped::No);
        assert_eq!(out, "the ENX");
    }
}
