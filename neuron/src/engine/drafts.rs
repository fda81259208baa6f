//! How many tokens to guess ahead of a sequence: as many as its own past says will hold.

/// With so many sequences writing, a step has enough to do without guesses.
const BUSY: usize = 8;
/// Sequences of a step that may have guesses.
pub(crate) const MOST_GUESSED: usize = BUSY - 1;
/// Weight of one step in the share of guesses that held.
const WEIGHT: f64 = 0.2;
/// Below this share a guess costs more than it brings.
const LEAST: f64 = 0.3;
/// Every so many steps it is tried again.
const AGAIN: u32 = 32;

/// What became of the guesses for one sequence.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Drafter {
    /// The smoothed share of guesses that held.
    held: f64,
    /// Steps without a guess since the last one.
    without: u32,
    accepted: u64,
    rejected: u64,
}

impl Default for Drafter {
    fn default() -> Self {
        Self {
            held: 1.0,
            without: 0,
            accepted: 0,
            rejected: 0,
        }
    }
}

impl Drafter {
    /// How many tokens to guess now, `most` at the most, while so many sequences write.
    pub(super) fn count(&mut self, most: usize, writers: usize) -> usize {
        if most == 0 || writers >= BUSY {
            return 0;
        }
        if self.held >= LEAST {
            // the chance that a guess is of use falls with each before it
            let useful = (1..=most).take_while(|n| self.held.powi(*n as i32) >= LEAST);
            return useful.count();
        }
        self.without += 1;
        if self.without < AGAIN {
            return 0;
        }
        self.without = 0;
        1
    }

    /// Takes in that `accepted` of `drafted` guesses held.
    pub(super) fn learn(&mut self, drafted: usize, accepted: usize) {
        self.accepted += accepted as u64;
        self.rejected += (drafted - accepted) as u64;
        // behind the first that fails nothing is known
        let known = drafted.min(accepted + 1);
        for guess in 0..known {
            let held = if guess < accepted { 1.0 } else { 0.0 };
            self.held += WEIGHT * (held - self.held);
        }
    }

    /// Guesses that held.
    pub(super) fn accepted(&self) -> u64 {
        self.accepted
    }

    /// Guesses that did not.
    pub(super) fn rejected(&self) -> u64 {
        self.rejected
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guesses_that_fail_are_given_up_and_tried_again_now_and_then() {
        let mut drafter = Drafter::default();
        assert_eq!(drafter.count(3, 1), 3);
        let mut steps = 0;
        while drafter.count(3, 1) > 0 {
            drafter.learn(3, 0);
            steps += 1;
        }
        assert!((3..20).contains(&steps), "{steps}");
        let tries = (0..2 * AGAIN).filter(|_| drafter.count(3, 1) > 0).count();
        assert_eq!(tries, 2);
        for _ in 0..10 {
            drafter.learn(1, 1);
        }
        assert_eq!(drafter.count(3, 1), 3);
        assert_eq!((drafter.accepted(), drafter.rejected()), (10, 3 * steps));
    }

    #[test]
    fn nothing_is_guessed_for_a_busy_model_or_beyond_the_end() {
        let mut drafter = Drafter::default();
        assert_eq!(drafter.count(3, BUSY), 0);
        assert_eq!(drafter.count(0, 1), 0);
        assert_eq!(drafter.count(1, 1), 1);
    }
}
