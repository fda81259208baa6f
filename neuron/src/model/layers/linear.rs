//! Projections.

use crate::kernels::rows::{Rows, Weight, linear, together};
use crate::model::LoadError;
use crate::parallel::{Communicator, all_reduce};
use crate::weights::Weights;
use candle_core::Result;
use std::sync::Arc;

/// A projection that every rank holds and computes whole.
#[derive(Debug)]
pub struct ReplicatedLinear {
    weight: Weight,
}

impl ReplicatedLinear {
    /// Loads `name.weight`, `[output, input]`.
    ///
    /// # Errors
    /// As [`crate::weights::Part::matrix`].
    pub fn load(
        weights: &Weights<'_>,
        name: &str,
        output: usize,
        input: usize,
    ) -> std::result::Result<Self, LoadError> {
        let weight = weights
            .pp(name)
            .replicated("weight", &[output, input])
            .matrix()?;
        Ok(Self { weight })
    }

    /// `x · Wᵀ`: (t, input) → (t, output).
    ///
    /// # Errors
    /// When an operation on the device fails.
    pub fn forward(&self, x: &Rows) -> Result<Rows> {
        linear(x, &self.weight)
    }
}

/// A projection whose output is shared among ranks.
#[derive(Debug)]
pub struct ColumnParallelLinear {
    weight: Weight,
}

impl ColumnParallelLinear {
    /// Loads `name.weight`, `[parts · width, input]`, sharing whole parts.
    ///
    /// # Errors
    /// As [`crate::weights::Part::matrix`].
    pub fn load(
        weights: &Weights<'_>,
        name: &str,
        parts: usize,
        width: usize,
        input: usize,
    ) -> std::result::Result<Self, LoadError> {
        Self::load_blocks(weights, name, &[(parts, width)], input)
    }

    /// Loads `name.weight` made of several blocks of `(parts, width)`, each shared on its own.
    ///
    /// # Errors
    /// As [`crate::weights::Part::matrix`].
    pub fn load_blocks(
        weights: &Weights<'_>,
        name: &str,
        blocks: &[(usize, usize)],
        input: usize,
    ) -> std::result::Result<Self, LoadError> {
        let weight = weights
            .pp(name)
            .split_columns("weight", blocks, &[input])
            .matrix()?;
        Ok(Self { weight })
    }

    /// `x · Wᵀ`: (t, input) → (t, own output).
    ///
    /// # Errors
    /// When an operation on the device fails.
    pub fn forward(&self, x: &Rows) -> Result<Rows> {
        linear(x, &self.weight)
    }

    /// [`Self::forward`] of several with the same x, faster than one by one.
    ///
    /// # Errors
    /// When an operation on the device fails.
    pub fn forward_all<const N: usize>(all: [&Self; N], x: &Rows) -> Result<[Rows; N]> {
        together(x, all.map(|one| &one.weight))
    }

    /// Its weights.
    pub(crate) fn weight(&self) -> &Weight {
        &self.weight
    }

    /// Width of the own output.
    #[must_use]
    pub fn width(&self) -> usize {
        self.weight.rows()
    }
}

/// A projection whose input is shared among ranks; its partial results are summed over them.
#[derive(Debug)]
pub struct RowParallelLinear {
    weight: Weight,
    communicator: Arc<dyn Communicator>,
}

impl RowParallelLinear {
    /// Loads `name.weight`, `[output, parts · width]`, sharing whole parts.
    ///
    /// # Errors
    /// As [`crate::weights::Part::matrix`].
    pub fn load(
        weights: &Weights<'_>,
        name: &str,
        output: usize,
        parts: usize,
        width: usize,
    ) -> std::result::Result<Self, LoadError> {
        let weight = weights
            .pp(name)
            .row_parallel("weight", output, parts, width)
            .matrix()?;
        Ok(Self {
            weight,
            communicator: weights.communicator(),
        })
    }

    /// `x · Wᵀ`, summed over ranks: (t, own input) → (t, output).
    ///
    /// # Errors
    /// When an operation on the device or between ranks fails.
    pub fn forward(&self, x: &Rows) -> Result<Rows> {
        all_reduce(&*self.communicator, self.partial(x)?)
    }

    /// Its weights.
    pub(crate) fn weight(&self) -> &Weight {
        &self.weight
    }

    /// This rank's part of `x · Wᵀ`, to be summed over ranks: (t, own input) → (t, output).
    ///
    /// # Errors
    /// When an operation on the device fails.
    pub fn partial(&self, x: &Rows) -> Result<Rows> {
        linear(x, &self.weight)
    }
}
