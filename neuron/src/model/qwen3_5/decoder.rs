//! One layer: `h += mixer(norm(h)); h += mlp(norm(h))`.

use super::attention::Attention;
use super::config::{Config, LayerKind};
use super::gated_delta_net::GatedDeltaNet;
use super::mlp::Mlp;
use crate::memory::{LayerState, SequenceState};
use crate::model::layers::norm::RmsNorm;
use crate::model::{Batch, LoadError};
use crate::weights::Weights;
use candle_core::{Result, Tensor};

/// A decoder layer with either mixer (Qwen3_5DecoderLayer).
#[derive(Debug)]
pub(super) struct DecoderLayer {
    input_layernorm: RmsNorm,
    mixer: Mixer,
    post_attention_layernorm: RmsNorm,
    mlp: Mlp,
}

/// What mixes a token with those before it.
#[derive(Debug)]
enum Mixer {
    Full(Attention),
    Linear(GatedDeltaNet),
}

impl DecoderLayer {
    pub(super) fn load(
        config: &Config,
        index: usize,
        weights: &Weights<'_>,
    ) -> std::result::Result<Self, LoadError> {
        let norm = |name| RmsNorm::load(weights, name, config.hidden_size, config.rms_norm_eps);
        Ok(Self {
            input_layernorm: norm("input_layernorm")?,
            mixer: match config.kind(index) {
                LayerKind::FullAttention => {
                    Mixer::Full(Attention::load(config, &weights.pp("self_attn"))?)
                }
                LayerKind::LinearAttention => {
                    Mixer::Linear(GatedDeltaNet::load(config, &weights.pp("linear_attn"))?)
                }
            },
            post_attention_layernorm: norm("post_attention_layernorm")?,
            mlp: Mlp::load(config, &weights.pp("mlp"))?,
        })
    }

    /// (t, hidden) → (t, hidden); `index` is the layer's own place in each state.
    pub(super) fn forward(
        &self,
        hidden: &Tensor,
        index: usize,
        batch: &Batch,
        states: &mut [&mut SequenceState],
    ) -> Result<Tensor> {
        let normed = self.input_layernorm.forward(hidden)?;
        let mixed = match &self.mixer {
            Mixer::Full(attention) => attention.forward(&normed, index, batch, states)?,
            Mixer::Linear(delta_net) => delta_net.forward(&normed, index, batch, states)?,
        };
        let hidden = (hidden + mixed)?;
        let normed = self.post_attention_layernorm.forward(&hidden)?;
        &hidden + self.mlp.forward(&normed)?
    }

    pub(super) fn new_state(&self) -> LayerState {
        match &self.mixer {
            Mixer::Full(attention) => attention.new_state(),
            Mixer::Linear(delta_net) => delta_net.new_state(),
        }
    }

    /// Numbers its state holds at `tokens` tokens.
    pub(super) fn state_floats(&self, tokens: usize) -> usize {
        match &self.mixer {
            Mixer::Full(attention) => attention.state_floats(tokens),
            Mixer::Linear(delta_net) => delta_net.state_floats(),
        }
    }
}
