//! The zero-centred root-mean-square norm.

use crate::kernels::norm::rms_norm;
use crate::kernels::with_f32;
use crate::model::LoadError;
use crate::weights::Weights;
use candle_core::{Result, Tensor};

/// `y = x / sqrt(mean(x²) + eps) · (1 + w)`; the checkpoint holds `w` (Qwen3_5RMSNorm).
#[derive(Debug)]
pub struct RmsNorm {
    /// `1 + w`.
    scale: Vec<f32>,
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
        Ok(Self { scale, eps })
    }

    /// Norms every row: (t, width) → (t, width).
    ///
    /// # Errors
    /// When the tensor is not on the CPU in f32.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let mut y = with_f32(x, <[f32]>::to_vec)?;
        self.in_place(&mut y);
        Tensor::from_vec(y, x.shape(), x.device())
    }

    /// Norms every `width` numbers where they are.
    pub fn in_place(&self, x: &mut [f32]) {
        rms_norm(x, &self.scale, self.eps);
    }
}
