//! Full attention with an output gate.

use super::Pass;
use super::config::Config;
use crate::kernels::attention::{Cache, attention};
use crate::kernels::cuda::ops;
use crate::kernels::rows::{Rows, Vector};
use crate::kernels::{gate, with_f32};
use crate::memory::pool::KvShape;
use crate::memory::{LayerState, SequenceState};
use crate::model::LoadError;
use crate::model::layers::linear::{ColumnParallelLinear, RowParallelLinear};
use crate::model::layers::norm::RmsNorm;
use crate::model::layers::rope::RotaryEmbedding;
use crate::weights::Weights;
use candle_core::{Device, Result, Tensor};

/// Gated softmax attention (Qwen3_5Attention).
#[derive(Debug)]
pub(super) struct Attention {
    q_proj: ColumnParallelLinear,
    k_proj: ColumnParallelLinear,
    v_proj: ColumnParallelLinear,
    o_proj: RowParallelLinear,
    q_norm: RmsNorm,
    k_norm: RmsNorm,
    rope: RotaryEmbedding,
    /// The rotary embedding's frequencies, where kernels read them.
    frequencies: Vector,
    /// Query and kv heads held here.
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
}

/// Where the keys and values of layer `layer` are in blocks.
fn place(state: &SequenceState, layer: usize) -> Result<usize> {
    match state.layers[layer] {
        LayerState::Attention(place) => Ok(place),
        _ => candle_core::bail!("layer {layer} keeps keys and values, its state does not"),
    }
}

impl Attention {
    pub(super) fn load(
        config: &Config,
        weights: &Weights<'_>,
    ) -> std::result::Result<Self, LoadError> {
        let (hidden, dim) = (config.hidden_size, config.head_dim);
        let (heads, kv_heads) = (config.num_attention_heads, config.num_key_value_heads);
        if weights.place().gpu().is_some() {
            ops::suits_attention(dim, heads / kv_heads)?;
        }
        let norm = |name| RmsNorm::load(weights, name, dim, config.rms_norm_eps);
        let rope = RotaryEmbedding::new(config.rotated_dims, config.rope_theta);
        let q_proj = ColumnParallelLinear::load(weights, "q_proj", heads, 2 * dim, hidden)?; // query and gate of a head stay together
        let k_proj = ColumnParallelLinear::load(weights, "k_proj", kv_heads, dim, hidden)?;
        let v_proj = ColumnParallelLinear::load(weights, "v_proj", kv_heads, dim, hidden)?;
        Ok(Self {
            heads: q_proj.width() / (2 * dim),
            kv_heads: k_proj.width() / dim,
            head_dim: dim,
            q_proj,
            k_proj,
            v_proj,
            o_proj: RowParallelLinear::load(weights, "o_proj", hidden, heads, dim)?,
            q_norm: norm("q_norm")?,
            k_norm: norm("k_norm")?,
            frequencies: weights.vector(rope.inverse_frequencies().to_vec())?,
            rope,
        })
    }

    /// (t, hidden) → (t, hidden); appends the keys and values of every row to its sequence.
    pub(super) fn forward(&self, x: &Rows, layer: usize, pass: &mut Pass<'_, '_>) -> Result<Rows> {
        let projections = [&self.q_proj, &self.k_proj, &self.v_proj];
        let [both, keys, values] = ColumnParallelLinear::forward_all(projections, x)?;
        let attended = match (&both, &keys, &values) {
            (Rows::Host(both), Rows::Host(keys), Rows::Host(values)) => {
                Rows::Host(self.attend(both, keys, values, layer, pass)?)
            }
            (Rows::Device(both), Rows::Device(keys), Rows::Device(values)) => {
                let place = place(&*pass.states[0], layer)?;
                let full = ops::FullAttention {
                    heads: self.heads,
                    kv_heads: self.kv_heads,
                    dim: self.head_dim,
                    q_norm: self.q_norm.scale().on_device()?,
                    k_norm: self.k_norm.scale().on_device()?,
                    eps: self.q_norm.eps(),
                    frequencies: self.frequencies.on_device()?,
                    turning: self.frequencies.numbers().len(),
                    kv: pass.states[0].kv_numbers(),
                };
                let step = pass.step()?;
                Rows::Device(ops::attention([both, keys, values], &full, place, step)?)
            }
            _ => unreachable!("projections of the same rows are in the same place"),
        };
        self.o_proj.forward(&attended)
    }

    /// On the CPU: from projections (t, heads · 2 d), and twice (t, kv_heads · d), to (t, heads · d).
    fn attend(
        &self,
        both: &Tensor,
        keys: &Tensor,
        values: &Tensor,
        layer: usize,
        pass: &mut Pass<'_, '_>,
    ) -> Result<Tensor> {
        let dim = self.head_dim;
        let (mut queries, gates) = with_f32(both, |both| self.split_gate(both))?; // 2 × (t, heads, d)
        let mut keys = with_f32(keys, <[f32]>::to_vec)?; // (t, kv_heads, d)
        let values = with_f32(values, <[f32]>::to_vec)?; // (t, kv_heads, d)
        self.q_norm.in_place(&mut queries);
        self.k_norm.in_place(&mut keys);
        let (q_row, kv_row) = (self.heads * dim, self.kv_heads * dim);
        let mut attended = Vec::with_capacity(queries.len());
        for segment in &pass.batch.segments {
            let start = pass.starts[segment.state]; // positions count from 0 in each sequence
            let state = &mut *pass.states[segment.state];
            let place = place(state, layer)?;
            for (offset, row) in segment.rows.clone().enumerate() {
                let position = start + offset;
                self.rope
                    .rotate(&mut queries[row * q_row..][..q_row], dim, position);
                self.rope
                    .rotate(&mut keys[row * kv_row..][..kv_row], dim, position);
                for head in 0..self.kv_heads {
                    let own = row * kv_row + head * dim..row * kv_row + (head + 1) * dim;
                    state.put((place, head), position, &keys[own.clone()], &values[own]);
                }
            }
            let cache = Cache {
                blocks: state.blocks(),
                layer: place,
                len: start + segment.rows.len(),
                kv_heads: self.kv_heads,
            };
            let own = segment.rows.start * q_row..segment.rows.end * q_row;
            attended.extend(attention(&queries[own], cache, self.heads, dim)); // (rows, heads, d)
        }
        gate(&mut attended, &gates);
        Tensor::from_vec(attended, (pass.batch.ids.len(), q_row), &Device::Cpu)
    }

    /// `q_proj` gives for each head first the query and then its gate.
    fn split_gate(&self, both: &[f32]) -> (Vec<f32>, Vec<f32>) {
        let mut queries = Vec::with_capacity(both.len() / 2);
        let mut gates = Vec::with_capacity(both.len() / 2);
        for head in both.chunks_exact(2 * self.head_dim) {
            queries.extend_from_slice(&head[..self.head_dim]);
            gates.extend_from_slice(&head[self.head_dim..]);
        }
        (queries, gates)
    }

    /// What it keeps of a token, as the only layer.
    pub(super) fn kv_shape(&self) -> KvShape {
        KvShape {
            layers: 1,
            heads: self.kv_heads,
            dim: self.head_dim,
        }
    }
}
