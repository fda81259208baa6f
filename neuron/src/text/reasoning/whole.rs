//! Thinking and answer of a whole text, as plainly as it can be said: tests and fuzz targets hold the machine against it.

const OPEN: &str = "<think>";
const CLOSE: &str = "</think>";

/// Thinking, what stands from the marker on in a thought that was never closed, and the answer.
pub(super) fn told_apart(open: bool, marker: Option<&str>, text: &str) -> [String; 3] {
    let breaks = ['\n', '\r'];
    let inside = match open {
        true => Some(text),
        false => text.trim_start().strip_prefix(OPEN),
    };
    let Some(inside) = inside.map(|inside| inside.trim_start_matches(breaks)) else {
        return [String::new(), String::new(), text.into()];
    };
    if let Some((thought, answer)) = inside.split_once(CLOSE) {
        let thought = thought.trim_end_matches(breaks);
        let answer = answer.trim_start_matches(breaks);
        return [thought.into(), String::new(), answer.into()];
    }
    let end = match marker.and_then(|marker| inside.find(marker)) {
        Some(at) => inside[..at].trim_end_matches(breaks).len(),
        None => inside.len(),
    };
    let (thought, unclosed) = inside.split_at(end);
    [thought.into(), unclosed.into(), String::new()]
}
