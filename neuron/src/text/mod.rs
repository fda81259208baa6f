//! Between text and tokens: prompt in (template, tokenizer), answer out (decode, stop, reasoning, tools).

pub mod grammar;
pub mod output;
pub mod reasoning;
pub mod stop;
pub mod template;
pub mod tokenizer;
pub mod tools;

/// Length in bytes of the longest end of `text` that is a beginning of `tag`, but not all of it: what has to be
/// held back because the next piece may complete the tag.
fn open_end(text: &str, tag: &str) -> usize {
    let longest = text.len().min(tag.len().saturating_sub(1));
    (1..=longest)
        .rev()
        .find(|&length| text.as_bytes().ends_with(&tag.as_bytes()[..length]))
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::open_end;

    #[test]
    fn only_the_beginning_of_a_tag_is_open() {
        assert_eq!(open_end("abc</th", "</think>"), 4);
        assert_eq!(open_end("abc</think>", "</think>"), 0);
        assert_eq!(open_end("abc<", "</think>"), 1);
        assert_eq!(open_end("", "</think>"), 0);
        assert_eq!(open_end("aa", "aab"), 2);
    }
}
