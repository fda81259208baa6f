//! The zero-centred root-mean-square norm.

use crate::kernels::norm;
use crate::kernels::rows::{Rows, Vector, add_rms_norm, rms_norm};
use crate::model::LoadError;
use crate::weights::Weights;
use candle_core::Result;

/// `y = x / sqrt(mean(x²) + eps) · (1 + w)`; the checkpoint holds `w` (Qwen3_5RMSNorm).
#[derive(Debug)]
pub struct RmsNorm {
    /// `1 + w`.
    scale: Vector,
    eps: f32,
}

impl RmsNorm {
    /// Loads `name.weight`, `[width]`.
    ///
    /// # Errors
    /// As [`crate::weights::Part::tensor`].
    pub fn load(
        weights: &Weights<'_>,
        name: &str,
        width: usize,
        eps: f32,
    ) -> std::result::Result<Self, LoadError> {
        let weight = weights.pp(name).replicated("weight", &[width]).tensor()?;
        let scale = weight
            .to_vec1::<f32>()?
            .into_iter()
            .map(|w| 1.0 + w)
            .collect();
        let scale = weights.vector(scale)?;
        Ok(Self { scale, eps })
    }

    /// Norms every row: (t, width) → (t, width).
    ///
    /// # Errors
    /// When an operation on the device fails.
    pub fn forward(&self, x: &Rows) -> Result<Rows> {
        rms_norm(x, &self.scale, self.eps)
    }

    /// `h ← h + x`, and the norm of that.
    ///
    /// # Errors
    /// As [`Self::forward`].
    pub fn add_forward(&self, h: &mut Rows, x: &Rows) -> Result<Rows> {
        add_rms_norm(h, x, &self.scale, self.eps)
    }

    /// Norms every `width` numbers where they are, in the host's memory.
    pub fn in_place(&self, x: &mut [f32]) {
        norm::rms_norm(x, self.scale.numbers(), self.eps);
    }

    /// `1 + w`.
    pub(crate) fn scale(&self) -> &Vector {
        &self.scale
    }

    /// What is added to the mean.
    #[must_use]
    pub fn eps(&self) -> f32 {
        self.eps
    }
}
