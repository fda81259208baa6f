//! One layer: `h += mixer(norm(h)); h += mlp(norm(h))`.

use super::Pass;
use super::attention::Attention;
use super::config::{Config, Layer, LayerKind};
use super::gated_delta_net::GatedDeltaNet;
use super::mlp::Mlp;
use super::moe::SparseMoeBlock;
use crate::memory::LayerState;
use crate::memory::pool::KvShape;
use crate::model::LoadError;
use crate::model::layers::norm::RmsNorm;
use crate::weights::Weights;
use candle_core::{Result, Tensor};

/// A decoder layer with either mixer (Qwen3_5DecoderLayer).
#[derive(Debug)]
pub(super) struct DecoderLayer {
    input_layernorm: RmsNorm,
    mixer: Mixer,
    post_attention_layernorm: RmsNorm,
    mlp: FeedForward,
}

/// What works on each token alone.
#[derive(Debug)]
enum FeedForward {
    Dense(Mlp),
    Sparse(SparseMoeBlock),
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
        layer: Layer,
        weights: &Weights<'_>,
    ) -> std::result::Result<Self, LoadError> {
        let norm = |name| RmsNorm::load(weights, name, config.hidden_size, config.rms_norm_eps);
        Ok(Self {
            input_layernorm: norm("input_layernorm")?,
            mixer: match layer.kind {
                LayerKind::FullAttention => {
                    Mixer::Full(Attention::load(config, &weights.pp("self_attn"))?)
                }
                LayerKind::LinearAttention => {
                    Mixer::Linear(GatedDeltaNet::load(config, &weights.pp("linear_attn"))?)
                }
            },
            post_attention_layernorm: norm("post_attention_layernorm")?,
            mlp: match config.experts {
                Some(sizes) if layer.sparse => {
                    let block = SparseMoeBlock::load(config, sizes, &weights.pp("mlp"))?;
                    FeedForward::Sparse(block)
                }
                _ => {
                    let width = config.intermediate_size;
                    FeedForward::Dense(Mlp::load(config, width, &weights.pp("mlp"))?)
                }
            },
        })
    }

    /// (t, hidden) → (t, hidden); `index` is the layer's own place in each state.
    pub(super) fn forward(
        &self,
        hidden: &Tensor,
        index: usize,
        pass: &mut Pass<'_, '_>,
    ) -> Result<Tensor> {
        let normed = self.input_layernorm.forward(hidden)?;
        let mixed = match &self.mixer {
            Mixer::Full(attention) => attention.forward(&normed, index, pass)?,
            Mixer::Linear(delta_net) => delta_net.forward(&normed, index, pass)?,
        };
        let hidden = (hidden + mixed)?;
        let normed = self.post_attention_layernorm.forward(&hidden)?;
        &hidden
            + match &self.mlp {
                FeedForward::Dense(mlp) => mlp.forward(&normed)?,
                FeedForward::Sparse(block) => block.forward(&normed, index, pass)?,
            }
    }

    /// What it remembers of a sequence that has not begun. `place` counts the layers with keys and values.
    pub(super) fn new_state(&self, place: &mut usize) -> LayerState {
        match &self.mixer {
            Mixer::Full(_) => {
                *place += 1;
                LayerState::Attention(*place - 1)
            }
            Mixer::Linear(delta_net) => delta_net.new_state(),
        }
    }

    /// What it keeps of each token, where it keeps keys and values.
    pub(super) fn kv_shape(&self) -> Option<KvShape> {
        match &self.mixer {
            Mixer::Full(attention) => Some(attention.kv_shape()),
            Mixer::Linear(_) => None,
        }
    }

    /// Numbers its state holds however long the sequence is.
    pub(super) fn state_floats(&self) -> usize {
        match &self.mixer {
            Mixer::Full(_) => 0,
            Mixer::Linear(delta_net) => delta_net.state_floats(),
        }
    }
}
