//! The feed-forward block.

use super::config::Config;
use crate::kernels::{silu, with_f32};
use crate::model::LoadError;
use crate::model::layers::linear::{ColumnParallelLinear, RowParallelLinear};
use crate::weights::Weights;
use candle_core::{Result, Tensor};

/// SwiGLU (Qwen3_5MLP).
#[derive(Debug)]
pub(super) struct Mlp {
    gate_proj: ColumnParallelLinear,
    up_proj: ColumnParallelLinear,
    down_proj: RowParallelLinear,
}

impl Mlp {
    pub(super) fn load(
        config: &Config,
        weights: &Weights<'_>,
    ) -> std::result::Result<Self, LoadError> {
        let (hidden, width) = (config.hidden_size, config.intermediate_size);
        Ok(Self {
            gate_proj: ColumnParallelLinear::load(weights, "gate_proj", width, 1, hidden)?,
            up_proj: ColumnParallelLinear::load(weights, "up_proj", width, 1, hidden)?,
            down_proj: RowParallelLinear::load(weights, "down_proj", hidden, width, 1)?,
        })
    }

    /// (t, hidden) → (t, hidden)
    pub(super) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        // down( silu(gate x) ∘ (up x) )
        let (gate, up) = (self.gate_proj.forward(x)?, self.up_proj.forward(x)?); // (t, intermediate)
        let mut gated = with_f32(&gate, <[f32]>::to_vec)?;
        with_f32(&up, |up| {
            gated
                .iter_mut()
                .zip(up)
                .for_each(|(g, up)| *g = silu(*g) * up)
        })?;
        self.down_proj
            .forward(&Tensor::from_vec(gated, gate.shape(), x.device())?)
    }
}
