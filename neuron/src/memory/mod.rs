//! What sequences remember.

/// Everything a model remembers of one sequence, on the CPU in f32.
///
/// It grows with the sequence only in its keys and values, and it cannot be cut back to an earlier position.
#[derive(Debug, Clone)]
pub struct SequenceState {
    /// Tokens whose effect is in it.
    pub(crate) len: usize,
    pub(crate) layers: Vec<LayerState>,
}

/// What one layer remembers.
#[derive(Debug, Clone)]
pub(crate) enum LayerState {
    /// Of full attention: keys and values.
    Attention(KvCache),
    /// Of the gated delta net: a convolution tail and the recurrent state.
    Delta(DeltaState),
}

/// Keys, after norm and rope, and values, by head: `(kv heads)(len, head_dim)`.
#[derive(Debug, Clone)]
pub(crate) struct KvCache {
    pub(crate) keys: Vec<Vec<f32>>,
    pub(crate) values: Vec<Vec<f32>>,
}

/// State of a gated delta net.
#[derive(Debug, Clone)]
pub(crate) struct DeltaState {
    /// Inputs of the convolution for the last tokens, oldest first: `(kernel - 1, channels)`.
    pub(crate) conv: Vec<f32>,
    /// `S`: `(value heads, key dim, value dim)`. It stays f32: lower precision drifts over long sequences.
    pub(crate) recurrent: Vec<f32>,
}

impl SequenceState {
    /// Tokens whose effect is in it.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether the sequence has not begun.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Bytes it holds now.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        let floats: usize = self
            .layers
            .iter()
            .map(|layer| match layer {
                LayerState::Attention(cache) => cache
                    .keys
                    .iter()
                    .chain(&cache.values)
                    .map(Vec::capacity)
                    .sum(),
                LayerState::Delta(state) => state.conv.len() + state.recurrent.len(),
            })
            .sum();
        4 * floats as u64
    }

    /// The state of a fake model in tests: one layer, in which the fake keeps the tokens it has seen.
    #[cfg(test)]
    pub(crate) fn of_fake() -> Self {
        let seen = DeltaState {
            conv: Vec::new(),
            recurrent: Vec::new(),
        };
        Self {
            len: 0,
            layers: vec![LayerState::Delta(seen)],
        }
    }
}

impl KvCache {
    pub(crate) fn new(heads: usize) -> Self {
        Self {
            keys: vec![Vec::new(); heads],
            values: vec![Vec::new(); heads],
        }
    }

    /// Tokens whose keys and values are in it, for heads of `head_dim`.
    pub(crate) fn len(&self, head_dim: usize) -> usize {
        self.keys[0].len() / head_dim
    }
}
