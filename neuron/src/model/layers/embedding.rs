//! From token ids to vectors and from vectors to logits, over a table whose rows are shared among ranks.

use crate::kernels::cuda::Step;
use crate::kernels::rows::{Rows, Weight, linear};
use crate::memory::pool::KvNumbers;
use crate::model::LoadError;
use crate::parallel::{Communicator, all_reduce, gather};
use crate::quant::Matrix;
use crate::weights::Weights;
use candle_core::{Device, Result, Tensor};
use std::sync::Arc;

/// The embedding table: each rank holds some rows and adds nothing for the others.
#[derive(Debug)]
pub struct VocabParallelEmbedding {
    rows: Weight,
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

    /// The vectors of `ids`, which are in the vocabulary: (t, width). On a device they are those in the tables of `step`.
    ///
    /// # Errors
    /// When an operation on the device or between ranks fails.
    pub(crate) fn forward(&self, ids: &[u32], step: Option<&Step>) -> Result<Rows> {
        let vectors = match (&self.rows, step) {
            (Weight::Device(rows), Some(step)) => Rows::Device(rows.embed(step, self.start)?),
            (Weight::Host(rows), None) => Rows::Host(self.look_up(rows, ids)?),
            _ => candle_core::bail!("tables of a step are for a model on a device"),
        };
        all_reduce(&*self.communicator, vectors)
    }

    fn look_up(&self, rows: &Matrix, ids: &[u32]) -> Result<Tensor> {
        let width = rows.width();
        let mut vectors = vec![0.0; ids.len() * width];
        for (id, vector) in ids.iter().zip(vectors.chunks_exact_mut(width.max(1))) {
            // of another rank's rows this one adds nothing
            let row = (*id as usize).checked_sub(self.start);
            if let Some(row) = row.filter(|row| *row < rows.rows()) {
                rows.decode_row(row, vector);
            }
        }
        Tensor::from_vec(vectors, (ids.len(), width), &Device::Cpu)
    }

    /// What keys and values are to be held as on a device, beside such a table.
    pub(crate) fn kv_numbers(&self) -> KvNumbers {
        self.rows.kv_numbers()
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
    rows: Weight,
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

    /// Logits of every row for this rank's part of the vocabulary, where they are computed: (t, width) → (t, own vocabulary).
    ///
    /// # Errors
    /// When an operation on the device fails.
    pub(crate) fn project(&self, x: &Rows) -> Result<Rows> {
        linear(x, &self.rows)
    }

    /// Logits of every row in the host's memory, for the first rank, which samples; nothing for the others: (t, width) → (t, vocabulary).
    ///
    /// # Errors
    /// When an operation on the device or between ranks fails.
    pub fn forward(&self, x: &Rows) -> Result<Option<Tensor>> {
        gather(&*self.communicator, &self.project(x)?)
    }
}
