//! The feed-forward block.

use super::config::Config;
use crate::kernels::cuda::DeviceMatrix;
use crate::kernels::rows::{Rows, swiglu};
use crate::model::LoadError;
use crate::model::layers::linear::{ColumnParallelLinear, RowParallelLinear};
use crate::weights::Weights;
use candle_core::Result;

/// SwiGLU (Qwen3_5MLP).
#[derive(Debug)]
pub(super) struct Mlp {
    gate_proj: ColumnParallelLinear,
    up_proj: ColumnParallelLinear,
    down_proj: RowParallelLinear,
}

impl Mlp {
    /// Loads a block of `width` in the middle.
    pub(super) fn load(
        config: &Config,
        width: usize,
        weights: &Weights<'_>,
    ) -> std::result::Result<Self, LoadError> {
        let hidden = config.hidden_size;
        Ok(Self {
            gate_proj: ColumnParallelLinear::load(weights, "gate_proj", width, 1, hidden)?,
            up_proj: ColumnParallelLinear::load(weights, "up_proj", width, 1, hidden)?,
            down_proj: RowParallelLinear::load(weights, "down_proj", hidden, width, 1)?,
        })
    }

    /// (t, hidden) → (t, hidden)
    pub(super) fn forward(&self, x: &Rows) -> Result<Rows> {
        self.down_proj.forward(&self.gated(x)?)
    }

    /// This rank's part of [`Mlp::forward`], to be summed over ranks.
    pub(super) fn partial(&self, x: &Rows) -> Result<Rows> {
        self.down_proj.partial(&self.gated(x)?)
    }

    /// Bytes of its weights.
    pub(super) fn bytes(&self) -> u64 {
        let [gate, up] = [&self.gate_proj, &self.up_proj].map(ColumnParallelLinear::weight);
        gate.bytes() + up.bytes() + self.down_proj.weight().bytes()
    }

    /// Its matrices (gate, up and down) where they are on a device.
    pub(super) fn on_device(&self) -> Option<[&DeviceMatrix; 3]> {
        let [gate, up] = [&self.gate_proj, &self.up_proj].map(ColumnParallelLinear::weight);
        let down = self.down_proj.weight();
        Some([gate.on_device()?, up.on_device()?, down.on_device()?])
    }

    /// (t, hidden) → (t, own width)
    fn gated(&self, x: &Rows) -> Result<Rows> {
        // down( silu(gate x) ∘ (up x) )
        let projections = [&self.gate_proj, &self.up_proj];
        let [gate, up] = ColumnParallelLinear::forward_all(projections, x)?;
        swiglu(&gate, &up)
    }
}
