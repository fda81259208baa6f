//! What sequences remember, and who owns it.

/// Everything a model remembers of one sequence: keys and values, recurrent state, convolution tail.
#[derive(Debug)]
pub struct SequenceState {
    /// The tokens taken in, for the fake model of the engine's tests.
    #[cfg(test)]
    pub(crate) seen: Vec<u32>,
}

#[cfg(test)]
impl SequenceState {
    /// The state of a fake model's sequence.
    pub(crate) fn of_fake() -> Self {
        Self { seen: Vec::new() }
    }
}
