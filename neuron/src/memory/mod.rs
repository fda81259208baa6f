//! What sequences remember, and who owns it.

/// Everything a model remembers of one sequence: keys and values, recurrent state, convolution tail.
#[derive(Debug)]
pub struct SequenceState {}
