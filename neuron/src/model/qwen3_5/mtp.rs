//! Multi-token prediction: one more layer that drafts the token after next.

use super::Pass;
use super::config::{Config, Layer, LayerKind};
use super::decoder::{DecoderLayer, Places};
use crate::kernels::rows::{Rows, side_by_side};
use crate::memory::LayerState;
use crate::memory::pool::KvShape;
use crate::model::LoadError;
use crate::model::layers::linear::ReplicatedLinear;
use crate::model::layers::norm::RmsNorm;
use crate::weights::Weights;
use candle_core::Result;

/// `norm( layer( fc · [ norm(embedding of token i + 1) | norm(hidden state i) ] ) )`, to go to the model's own head.
/// The hidden state is the one after the model's final norm. It has keys and values of its own.
#[derive(Debug)]
pub(super) struct MultiTokenPredictor {
    pre_fc_norm_embedding: RmsNorm,
    pre_fc_norm_hidden: RmsNorm,
    fc: ReplicatedLinear,
    layer: DecoderLayer,
    norm: RmsNorm,
}

impl MultiTokenPredictor {
    pub(super) fn load(
        config: &Config,
        weights: &Weights<'_>,
    ) -> std::result::Result<Self, LoadError> {
        let hidden = config.hidden_size;
        let norm = |name| RmsNorm::load(weights, name, hidden, config.rms_norm_eps);
        let kind = Layer {
            kind: LayerKind::FullAttention,
            sparse: config.experts.is_some(), // its block is as those of the model
        };
        Ok(Self {
            pre_fc_norm_embedding: norm("pre_fc_norm_embedding")?,
            pre_fc_norm_hidden: norm("pre_fc_norm_hidden")?,
            fc: ReplicatedLinear::load(weights, "fc", hidden, 2 * hidden)?,
            layer: DecoderLayer::load(config, kind, &[], &weights.pp("layers").pp(0))?,
            norm: norm("norm")?,
        })
    }

    /// Embeddings of the tokens i + 1 and hidden states i, both (t, hidden) → (t, hidden), input of the head;
    /// `index` is the layer's place in each state.
    pub(super) fn forward(
        &self,
        embeddings: &Rows,
        hidden: &Rows,
        index: usize,
        pass: &mut Pass<'_, '_>,
    ) -> Result<Rows> {
        let embeddings = self.pre_fc_norm_embedding.forward(embeddings)?;
        let hidden = self.pre_fc_norm_hidden.forward(hidden)?;
        let x = self.fc.forward(&side_by_side(&embeddings, &hidden)?)?;
        self.norm.forward(&self.layer.forward(x, index, pass)?)
    }

    /// What it remembers of a sequence that has not begun; `places` as for the model's own layers.
    pub(super) fn new_state(&self, places: &mut Places) -> LayerState {
        self.layer.new_state(places)
    }

    /// What it keeps of each token.
    pub(super) fn kv_shape(&self) -> Option<KvShape> {
        self.layer.kv_shape()
    }
}
