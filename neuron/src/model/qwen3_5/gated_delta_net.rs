//! Linear attention: a gated delta net.

use super::Pass;
use super::config::Config;
use crate::kernels::causal_conv::causal_conv;
use crate::kernels::cuda::ops;
use crate::kernels::delta_rule::{Heads, delta_rule};
use crate::kernels::norm::gated_rms_norm;
use crate::kernels::rows::{Place, Rows, Vector};
use crate::kernels::{sigmoid, with_f32};
use crate::memory::slot::DeltaPlace;
use crate::memory::{DeltaState, LayerState, Trail};
use crate::model::LoadError;
use crate::model::layers::linear::{ColumnParallelLinear, RowParallelLinear};
use crate::weights::Weights;
use candle_core::{Device, Result, Tensor};

/// Convolution, gated delta rule, gated norm (Qwen3_5GatedDeltaNet).
#[derive(Debug)]
pub(super) struct GatedDeltaNet {
    in_proj_qkv: ColumnParallelLinear,
    in_proj_z: ColumnParallelLinear,
    in_proj_b: ColumnParallelLinear,
    in_proj_a: ColumnParallelLinear,
    /// `(taps, channels)`: channels lie side by side.
    conv1d: Vector,
    taps: usize,
    /// `exp(A_log)` by value head.
    decay_rate: Vector,
    dt_bias: Vector,
    /// The gated norm's weight; as it is, not one more.
    norm: Vector,
    eps: f32,
    out_proj: RowParallelLinear,
    /// Heads held here.
    heads: Heads,
    /// Where its state is in a slot, on a device.
    place: Option<DeltaPlace>,
}

impl GatedDeltaNet {
    pub(super) fn load(
        config: &Config,
        earlier: &[DeltaPlace],
        weights: &Weights<'_>,
    ) -> std::result::Result<Self, LoadError> {
        let hidden = config.hidden_size;
        let (key_heads, value_heads) = (config.linear_num_key_heads, config.linear_num_value_heads);
        let (key_dim, value_dim) = (config.linear_key_head_dim, config.linear_value_head_dim);
        let taps = config.linear_conv_kernel_dim;
        if weights.place().gpu().is_some() {
            ops::suits_delta_net(key_dim, taps)?;
        }
        let blocks = [
            (key_heads, key_dim),
            (key_heads, key_dim),
            (value_heads, value_dim),
        ]; // q, k, v
        let column =
            |name, width| ColumnParallelLinear::load(weights, name, value_heads, width, hidden);
        let by_head = |name| -> std::result::Result<Vec<f32>, LoadError> {
            Ok(weights
                .column_parallel(name, value_heads, 1, &[])
                .tensor()?
                .to_vec1()?)
        };
        let conv1d = weights
            .pp("conv1d")
            .split_columns("weight", &blocks, &[1, taps])
            .tensor()?; // (channels, 1, taps)
        let in_proj_z = column("in_proj_z", value_dim)?;
        let value = in_proj_z.width() / value_dim;
        let key = (conv1d.dims()[0] - value * value_dim) / (2 * key_dim);
        let heads = Heads {
            key,
            value,
            key_dim,
            value_dim,
        };
        let decay_rate = by_head("A_log")?.into_iter().map(f32::exp).collect();
        let norm = weights.pp("norm");
        let norm = norm.replicated("weight", &[value_dim]).tensor()?;
        let place = match weights.place() {
            Place::Cpu => None,
            Place::Gpu(_) => {
                let (tail, state) = (Self::tail(taps, heads), Self::state(heads));
                Some(DeltaPlace::after(earlier, tail, state, heads.channels()))
            }
        };
        Ok(Self {
            in_proj_qkv: ColumnParallelLinear::load_blocks(
                weights,
                "in_proj_qkv",
                &blocks,
                hidden,
            )?,
            in_proj_z,
            in_proj_b: column("in_proj_b", 1)?,
            in_proj_a: column("in_proj_a", 1)?,
            conv1d: weights.vector(conv1d.squeeze(1)?.t()?.flatten_all()?.to_vec1()?)?,
            taps,
            decay_rate: weights.vector(decay_rate)?,
            dt_bias: weights.vector(by_head("dt_bias")?)?,
            norm: weights.vector(norm.to_vec1()?)?,
            eps: config.rms_norm_eps,
            out_proj: RowParallelLinear::load(weights, "out_proj", hidden, value_heads, value_dim)?,
            heads,
            place,
        })
    }

    /// Numbers of the convolution's tail.
    fn tail(taps: usize, heads: Heads) -> usize {
        (taps - 1) * heads.channels()
    }

    /// Numbers of `S`.
    fn state(heads: Heads) -> usize {
        heads.value * heads.key_dim * heads.value_dim
    }

    /// Where its state is in a slot, where that is on a device.
    pub(super) fn place(&self) -> Option<DeltaPlace> {
        self.place
    }

    /// (t, hidden) → (t, hidden); advances the state of every segment by its rows.
    pub(super) fn forward(&self, x: &Rows, layer: usize, pass: &mut Pass<'_, '_>) -> Result<Rows> {
        // (t, channels), (t, value heads · value dim), 2 × (t, value heads)
        let [qkv, z, b, a] = ColumnParallelLinear::forward_all(
            [
                &self.in_proj_qkv,
                &self.in_proj_z,
                &self.in_proj_b,
                &self.in_proj_a,
            ],
            x,
        )?;
        let mixed = match (&qkv, &z, &b, &a) {
            (Rows::Host(qkv), Rows::Host(z), Rows::Host(b), Rows::Host(a)) => {
                Rows::Host(self.mix([qkv, z, b, a], layer, pass)?)
            }
            (Rows::Device(qkv), Rows::Device(z), Rows::Device(b), Rows::Device(a)) => {
                let net = ops::DeltaNet {
                    heads: self.heads,
                    taps: self.taps,
                    conv: self.conv1d.on_device()?,
                    rate: self.decay_rate.on_device()?,
                    dt_bias: self.dt_bias.on_device()?,
                    norm: self.norm.on_device()?,
                    eps: self.eps,
                };
                let place = self.place.expect("it is on a device");
                let step = pass.step()?;
                Rows::Device(ops::delta_net([qkv, z, b, a], &net, &place, step)?)
            }
            _ => unreachable!("projections of the same rows are in the same place"),
        };
        self.out_proj.forward(&mixed)
    }

    /// On the CPU: from projections (t, channels), (t, value heads · value dim) and twice (t, value heads) to
    /// (t, value heads · value dim).
    fn mix(
        &self,
        [qkv, z, b, a]: [&Tensor; 4],
        layer: usize,
        pass: &mut Pass<'_, '_>,
    ) -> Result<Tensor> {
        let heads = self.heads;
        let (value, channels) = (heads.value, heads.channels());
        let (decay_rate, dt_bias) = (self.decay_rate.numbers(), self.dt_bias.numbers());
        // β = sigmoid(b);  g = −exp(A_log) · softplus(a + dt_bias)
        let mut beta = with_f32(b, <[f32]>::to_vec)?;
        beta.iter_mut().for_each(|b| *b = sigmoid(*b));
        let mut decay = with_f32(a, <[f32]>::to_vec)?;
        for (index, a) in decay.iter_mut().enumerate() {
            let head = index % value;
            *a = -decay_rate[head] * softplus(*a + dt_bias[head]);
        }
        let mut mixed = Vec::with_capacity(pass.batch.ids.len() * value * heads.value_dim);
        for segment in &pass.batch.segments {
            let LayerState::Delta(state) = &mut pass.states[segment.state].layers[layer] else {
                candle_core::bail!("layer {layer} keeps a recurrent state, its state does not");
            };
            let rows = segment.rows.clone();
            let (convolved, trail) = with_f32(qkv, |qkv| {
                let inputs = &qkv[rows.start * channels..rows.end * channels];
                let trail = (segment.revocable && rows.len() > 1).then(|| Trail {
                    conv: [&state.conv, inputs].concat(),
                    recurrent: vec![0.0; state.recurrent.len() * (rows.len() - 1)],
                    rows: rows.len(),
                    heads: value,
                });
                let convolved =
                    causal_conv(inputs, self.conv1d.numbers(), &mut state.conv, channels);
                (convolved, trail)
            })?;
            state.trail = trail;
            let by_head = rows.start * value..rows.end * value;
            mixed.extend(delta_rule(
                &convolved,
                &decay[by_head.clone()],
                &beta[by_head],
                &mut state.recurrent,
                state
                    .trail
                    .as_mut()
                    .map_or(&mut [][..], |trail| &mut trail.recurrent),
                heads,
            ));
        }
        let norm = self.norm.numbers();
        with_f32(z, |z| gated_rms_norm(&mut mixed, z, norm, self.eps))?;
        Tensor::from_vec(mixed, z.shape(), &Device::Cpu)
    }

    pub(super) fn new_state(&self) -> LayerState {
        LayerState::Delta(DeltaState {
            conv: vec![0.0; Self::tail(self.taps, self.heads)],
            recurrent: vec![0.0; Self::state(self.heads)],
            trail: None,
        })
    }

    pub(super) fn state_floats(&self) -> usize {
        Self::tail(self.taps, self.heads) + Self::state(self.heads)
    }

    /// Numbers of its part of a trail; on the CPU it has one state less.
    pub(super) fn trail_floats(&self, rows: usize) -> usize {
        let row = self.heads.channels() + Self::state(self.heads);
        Self::tail(self.taps, self.heads) + rows * row
    }
}

/// `ln(1 + eˣ)`, without overflow.
fn softplus(x: f32) -> f32 {
    if x > 20.0 { x } else { x.exp().ln_1p() }
}
