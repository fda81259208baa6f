//! From token ids to vectors and from vectors to logits, over a table whose rows are shared among ranks.

use crate::kernels::linear::linear;
use crate::model::LoadError;
use crate::parallel::Communicator;
use crate::weights::Weights;
use candle_core::{Result, Tensor};
use std::sync::Arc;

/// The embedding table: each rank holds some rows and adds nothing for the others.
#[derive(Debug)]
pub struct VocabParallelEmbedding {
    rows: Tensor,
    start: usize,
    communicator: Arc<dyn Communicator>,
}

impl VocabParallelEmbedding {
    /// Loads `name.weight`, `[vocabulary, width]`.
    ///
    /// # Errors
    /// As [`Weights::replicated`].
    pub fn load(
        weights: &Weights<'_>,
        name: &str,
        vocabulary: usize,
        width: usize,
    ) -> std::result::Result<Self, LoadError> {
        let (rows, start) = weights
            .pp(name)
            .vocab_parallel("weight", vocabulary, width)?;
        Ok(Self {
            rows,
            start,
            communicator: weights.communicator(),
        })
    }

    /// The vectors of `ids`: (t, width).
    ///
    /// # Errors
    /// When an id is not in the vocabulary of any rank's table, or an operation on the device fails.
    pub fn forward(&self, ids: &[u32]) -> Result<Tensor> {
        let (count, _) = self.rows.dims2()?;
        let own = |id: u32| {
            (id as usize)
                .checked_sub(self.start)
                .filter(|row| *row < count)
        };
        let device = self.rows.device();
        let rows: Vec<u32> = ids.iter().map(|id| own(*id).unwrap_or(0) as u32).collect();
        let found = self.rows.index_select(&Tensor::new(rows, device)?, 0)?;
        if ids.iter().all(|id| own(*id).is_some()) {
            return self.communicator.all_reduce(&found);
        }
        let mask: Vec<f32> = ids
            .iter()
            .map(|id| if own(*id).is_some() { 1.0 } else { 0.0 })
            .collect();
        let mask = Tensor::from_vec(mask, (ids.len(), 1), device)?;
        self.communicator.all_reduce(&found.broadcast_mul(&mask)?)
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
    rows: Tensor,
    communicator: Arc<dyn Communicator>,
}

impl ParallelLmHead {
    /// Loads `name.weight`, `[vocabulary, width]`.
    ///
    /// # Errors
    /// As [`Weights::replicated`].
    pub fn load(
        weights: &Weights<'_>,
        name: &str,
        vocabulary: usize,
        width: usize,
    ) -> std::result::Result<Self, LoadError> {
        let (rows, _) = weights
            .pp(name)
            .vocab_parallel("weight", vocabulary, width)?;
        Ok(Self {
            rows,
            communicator: weights.communicator(),
        })
    }

    /// Logits of every row: (t, width) → (t, vocabulary).
    ///
    /// # Errors
    /// When an operation on the device or between ranks fails.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.communicator.all_gather(&linear(x, &self.rows)?, 1)
    }
}
