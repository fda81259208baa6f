//! From token ids to vectors and from vectors to logits, over a table whose rows are shared among ranks.

use crate::kernels::linear::linear;
use crate::model::LoadError;
use crate::parallel::Communicator;
use crate::quant::Matrix;
use crate::weights::Weights;
use candle_core::{Device, Result, Tensor};
use std::sync::Arc;

/// The embedding table: each rank holds some rows and adds nothing for the others.
#[derive(Debug)]
pub struct VocabParallelEmbedding {
    rows: Matrix,
    start: usize,
    communicator: Arc<dyn Communicator>,
}

impl VocabParallelEmbedding {
    /// Loads `name.weight`, `[vocabulary, width]`.
    ///
    /// # Errors
    /// As [`crate::weights::Part::matrix`].
    pub fn load(
        weights: &Weights<'_>,
        name: &str,
        vocabulary: usize,
        width: usize,
    ) -> std::result::Result<Self, LoadError> {
        let weights = weights.pp(name);
        let (rows, start) = weights.vocab_parallel("weight", vocabulary, width);
        Ok(Self {
            rows: rows.matrix()?,
            start,
            communicator: weights.communicator(),
        })
    }

    /// The vectors of `ids`, which are in the vocabulary: (t, width).
    ///
    /// # Errors
    /// When an operation between ranks fails.
    pub fn forward(&self, ids: &[u32]) -> Result<Tensor> {
        let width = self.rows.width();
        let mut vectors = vec![0.0; ids.len() * width];
        for (id, vector) in ids.iter().zip(vectors.chunks_exact_mut(width.max(1))) {
            // of another rank's rows this one adds nothing
            let row = (*id as usize).checked_sub(self.start);
            if let Some(row) = row.filter(|row| *row < self.rows.rows()) {
                self.rows.decode_row(row, vector);
            }
        }
        let vectors = Tensor::from_vec(vectors, (ids.len(), width), &Device::Cpu)?;
        Ok(self.communicator.all_reduce(&vectors)?)
    }

    /// A head that uses the same table.
    #[must_use]
    pub fn tied_head(&self) -> ParallelLmHead {
        ParallelLmHead {
            rows: self.rows.clone(),
            communicator: self.communicator.clone(),
        }
    }
}

/// From the last hidden state to logits: each rank computes those of its rows.
#[derive(Debug)]
pub struct ParallelLmHead {
    rows: Matrix,
    communicator: Arc<dyn Communicator>,
}

impl ParallelLmHead {
    /// Loads `name.weight`, `[vocabulary, width]`.
    ///
    /// # Errors
    /// As [`crate::weights::Part::matrix`].
    pub fn load(
        weights: &Weights<'_>,
        name: &str,
        vocabulary: usize,
        width: usize,
    ) -> std::result::Result<Self, LoadError> {
        let weights = weights.pp(name);
        let (rows, _) = weights.vocab_parallel("weight", vocabulary, width);
        Ok(Self {
            rows: rows.matrix()?,
            communicator: weights.communicator(),
        })
    }

    /// Logits of every row, for the first rank, which samples; nothing for the others: (t, width) → (t, vocabulary).
    ///
    /// # Errors
    /// When an operation on the device or between ranks fails.
    pub fn forward(&self, x: &Tensor) -> Result<Option<Tensor>> {
        Ok(self.communicator.gather(&linear(x, &self.rows)?, 1)?)
    }
}
