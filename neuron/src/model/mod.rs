//! Models: what the engine may ask of one, and the table of architectures.
//!
//! Nothing here knows ranks, file formats or quantisation: those are words at the lines that load a weight.

pub mod batch;

pub use batch::{Batch, LogitRows, Segment};

use crate::memory::SequenceState;
use candle_core::{Device, Tensor};
use std::path::Path;

/// A decoder that predicts the next token.
///
/// Implementations are pure in the weights: everything a sequence remembers is in its [`SequenceState`], so one
/// model serves any number of sequences, and any split of a prompt over calls gives the same numbers.
pub trait CausalLm: Send {
    /// Entries of a row of logits. Larger than the tokenizer: the tail must never be sampled.
    fn vocab_size(&self) -> usize;

    /// Longest sequence in tokens.
    fn context_length(&self) -> usize;

    /// Bytes the weights hold.
    fn weight_bytes(&self) -> u64;

    /// Bytes one sequence's state holds at `tokens` tokens.
    fn state_bytes(&self, tokens: usize) -> u64;

    /// The state of a sequence that has not begun.
    ///
    /// # Errors
    /// When the device has no room for it.
    fn new_state(&self) -> Result<SequenceState, ModelError>;

    /// Runs the rows of `batch`, advancing the state of each segment by its rows.
    ///
    /// Returns the logits of [`Batch::logit_rows`] in that order: (rows, vocab), f32.
    ///
    /// # Errors
    /// On a fault of the device; the states of the batch are then unusable.
    fn forward(
        &self,
        batch: &Batch,
        states: &mut [&mut SequenceState],
    ) -> Result<Tensor, ModelError>;
}

/// How to load a model.
#[derive(Debug, Clone)]
pub struct LoadOptions {
    /// The device that is to hold it.
    pub device: Device,
    /// Upper bound on the sequence length, below the model's own.
    pub context_length: Option<usize>,
}

/// Loads the model in `folder` (Hugging Face layout). `progress` is told the share of bytes read, 0 to 1.
///
/// # Errors
/// One typed error that names file and tensor; see [`LoadError`].
pub fn load(
    folder: &Path,
    options: &LoadOptions,
    progress: &dyn Fn(f32),
) -> Result<Box<dyn CausalLm>, LoadError> {
    let _ = (folder, options, progress);
    unreachable!("replaced by the first real architecture")
}

/// A step could not be run.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// The device or its library refused an operation.
    #[error("device fault: {0}")]
    Device(#[from] candle_core::Error),
}

/// A model folder could not be loaded.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {}
