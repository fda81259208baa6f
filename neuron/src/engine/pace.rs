//! How much of prompts a step takes in while others write: so much that their readers hardly notice.

/// Tokens of prompts that are always taken in, so that everybody gets on.
const LEAST: usize = 4;
/// The weight of the newest step.
const NEWEST: f64 = 0.2;

/// What steps have taken so far.
#[derive(Debug)]
pub struct Pace {
    /// How long a step may take, beside one in which sequences only write.
    stretch: f64,
    /// Seconds of a step in which sequences only write.
    writing: Option<f64>,
    /// Seconds that a token of a prompt adds.
    reading: Option<f64>,
    /// What the last step with both took in of prompts: what was seen of one kind of step says little of another, so the
    /// next takes in at most twice as much.
    last: usize,
}

impl Pace {
    /// Nothing is known yet. With an infinite `stretch` nothing needs to be.
    #[must_use]
    pub fn new(stretch: f64) -> Self {
        Self {
            stretch,
            writing: None,
            reading: None,
            last: 0,
        }
    }

    /// Takes a step in: tokens of sequences that write, tokens of prompts, and the seconds it took.
    pub fn learn(&mut self, written: usize, read: usize, seconds: f64) {
        let tokens = read as f64;
        match (written, read) {
            (0, 0) => {}
            (_, 0) => {
                smooth(&mut self.writing, seconds);
                self.last = 0;
            }
            // what a token costs alone is a first guess of what it adds
            (0, _) => _ = self.reading.get_or_insert(seconds / tokens),
            _ => {
                self.last = read;
                match self.writing {
                    Some(writing) => {
                        smooth(&mut self.reading, (seconds - writing).max(0.0) / tokens)
                    }
                    None => self.writing = Some(seconds), // the least is read: hardly longer than without
                }
            }
        }
    }

    /// Tokens of prompts that a step may take in beside sequences that write.
    #[must_use]
    pub fn beside(&self) -> usize {
        if self.stretch.is_infinite() {
            return usize::MAX;
        }
        match (self.writing, self.reading) {
            (Some(writing), Some(reading)) => {
                let tokens = (self.stretch - 1.0) * writing / reading;
                // a float too large for it becomes the largest
                (tokens as usize).min(2 * self.last).max(LEAST)
            }
            _ => LEAST,
        }
    }
}

fn smooth(value: &mut Option<f64>, newest: f64) {
    *value = Some(value.map_or(newest, |old| old + NEWEST * (newest - old)));
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Steps as a machine takes them that needs `writing` seconds for those that write and `reading` for each token.
    fn settled(writing: f64, reading: f64, alone_first: bool) -> (Pace, f64) {
        let mut pace = Pace::new(2.5);
        if alone_first {
            pace.learn(0, 128, 128.0 * reading);
            pace.learn(8, 0, writing);
        }
        let mut seconds = 0.0;
        for _ in 0..200 {
            let tokens = pace.beside().min(8192);
            seconds = writing + reading * tokens as f64;
            pace.learn(8, tokens, seconds);
        }
        (pace, seconds)
    }

    #[test]
    fn a_step_with_prompts_takes_so_much_longer_and_no_more() {
        for (writing, reading) in [(0.2, 0.003), (0.01, 0.000_1), (1.0, 0.02)] {
            let (_, seconds) = settled(writing, reading, true);
            let stretch = seconds / writing;
            assert!(
                (2.2..2.6).contains(&stretch),
                "{writing} {reading}: {stretch}"
            );
        }
    }

    #[test]
    fn what_was_cheap_alone_is_not_trusted_beside_others() {
        let mut pace = Pace::new(2.5);
        pace.learn(0, 128, 128.0 * 0.000_01);
        pace.learn(8, 0, 0.01);
        let mut longest: f64 = 0.0;
        for _ in 0..50 {
            let tokens = pace.beside();
            let seconds = 0.01 + 0.000_5 * tokens as f64; // fifty times as dear as it seemed
            longest = longest.max(seconds);
            pace.learn(8, tokens, seconds);
        }
        assert!(longest < 0.05, "{longest}");
    }

    #[test]
    fn where_every_token_is_dear_a_few_are_read_all_the_same() {
        let (pace, _) = settled(0.01, 0.01, true);
        assert_eq!(pace.beside(), LEAST);
    }

    #[test]
    fn it_settles_also_where_nothing_was_ever_seen_alone() {
        let (pace, seconds) = settled(0.2, 0.003, false);
        assert!(pace.beside() >= LEAST);
        assert!(seconds / 0.2 < 4.0, "{seconds}");
    }
}
