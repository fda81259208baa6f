//! One layer: `h += mixer(norm(h)); h += mlp(norm(h))`.

use super::Pass;
use super::attention::Attention;
use super::config::{Config, Layer, LayerKind};
use super::gated_delta_net::GatedDeltaNet;
use super::mlp::Mlp;
use super::moe::SparseMoeBlock;
use crate::kernels::rows::{Rows, add};
use crate::memory::LayerState;
use crate::memory::pool::KvShape;
use crate::memory::slot::DeltaPlace;
use crate::model::LoadError;
use crate::model::layers::norm::RmsNorm;
use crate::weights::Weights;
use candle_core::Result;

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
    Sparse(Box<SparseMoeBlock>),
}

/// What mixes a token with those before it.
#[derive(Debug)]
enum Mixer {
    Full(Attention),
    Linear(GatedDeltaNet),
}

/// Layers of either kind so far.
#[derive(Debug, Default)]
pub(super) struct Places {
    attention: usize,
    delta: usize,
}

impl DecoderLayer {
    pub(super) fn load(
        config: &Config,
        layer: Layer,
        earlier: &[DeltaPlace],
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
                    let weights = weights.pp("linear_attn");
                    Mixer::Linear(GatedDeltaNet::load(config, earlier, &weights)?)
                }
            },
            post_attention_layernorm: norm("post_attention_layernorm")?,
            mlp: match config.experts {
                Some(sizes) if layer.sparse => {
                    let block = SparseMoeBlock::load(config, sizes, &weights.pp("mlp"))?;
                    FeedForward::Sparse(Box::new(block))
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
        mut hidden: Rows,
        index: usize,
        pass: &mut Pass<'_, '_>,
    ) -> Result<Rows> {
        let normed = self.input_layernorm.forward(&hidden)?;
        let mixed = match &self.mixer {
            Mixer::Full(attention) => attention.forward(&normed, index, pass)?,
            Mixer::Linear(delta_net) => delta_net.forward(&normed, index, pass)?,
        };
        let normed = self
            .post_attention_layernorm
            .add_forward(&mut hidden, &mixed)?;
        let fed = match &self.mlp {
            FeedForward::Dense(mlp) => mlp.forward(&normed)?,
            FeedForward::Sparse(block) => block.forward(&normed, index, pass)?,
        };
        add(&mut hidden, &fed)?;
        Ok(hidden)
    }

    /// What it remembers of a sequence that has not begun; `places` counts the layers before it.
    pub(super) fn new_state(&self, places: &mut Places) -> LayerState {
        match &self.mixer {
            Mixer::Full(_) => {
                places.attention += 1;
                LayerState::Attention(places.attention - 1)
            }
            Mixer::Linear(delta_net) => match delta_net.place() {
                None => delta_net.new_state(),
                Some(_) => {
                    places.delta += 1;
                    LayerState::InSlot(places.delta - 1)
                }
            },
        }
    }

    /// Where its state is in a slot, where that is on a device.
    pub(super) fn delta_place(&self) -> Option<DeltaPlace> {
        match &self.mixer {
            Mixer::Full(_) => None,
            Mixer::Linear(delta_net) => delta_net.place(),
        }
    }

    /// Whether it can only be computed with the host's help, between two of its kernels.
    pub(super) fn needs_host(&self) -> bool {
        match &self.mlp {
            FeedForward::Dense(_) => false,
            FeedForward::Sparse(block) => block.needs_host(),
        }
    }

    /// Bytes of weights that a step of so many rows is likely not to read.
    pub(super) fn idle_bytes(&self, rows: usize) -> u64 {
        match &self.mlp {
            FeedForward::Dense(_) => 0,
            FeedForward::Sparse(block) => block.idle_bytes(rows),
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

    /// Numbers it keeps beside them of a step of `rows` rows that can be taken back.
    pub(super) fn trail_floats(&self, rows: usize) -> usize {
        match &self.mixer {
            Mixer::Full(_) => 0,
            Mixer::Linear(delta_net) => delta_net.trail_floats(rows),
        }
    }
}
