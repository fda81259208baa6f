//! Qwen3.5, dense: embed → (norm → gated delta net | gated attention → norm → MLP)ⁿ → norm → head.

use super::layers::embedding::{ParallelLmHead, VocabParallelEmbedding};
use super::layers::norm::RmsNorm;
use super::{Batch, CausalLm, LoadError, ModelError};
use crate::memory::SequenceState;
use crate::weights::Weights;
use candle_core::{Device, Result, Tensor};
use config::{Config, LayerKind};
use decoder::DecoderLayer;

mod attention;
pub(crate) mod config;
mod decoder;
mod gated_delta_net;
mod mlp;

/// The whole model, or one rank's part of it (Qwen3_5ForCausalLM).
#[derive(Debug)]
pub struct Qwen3_5ForCausalLm {
    config: Config,
    embed_tokens: VocabParallelEmbedding,
    layers: Vec<DecoderLayer>,
    norm: RmsNorm,
    lm_head: ParallelLmHead,
    weight_bytes: u64,
    device: Device,
}

impl Qwen3_5ForCausalLm {
    /// Loads the model that `config` describes.
    ///
    /// # Errors
    /// Every missing or mis-shaped tensor at once.
    pub(crate) fn load(
        config: Config,
        weights: &Weights<'_>,
        device: &Device,
    ) -> std::result::Result<Self, LoadError> {
        let (hidden, vocab) = (config.hidden_size, config.vocab_size);
        // multimodal files keep the text model one level down
        let text = if weights.has("model.language_model.embed_tokens.weight") {
            weights.pp("model.language_model")
        } else {
            weights.pp("model")
        };
        let embed_tokens = VocabParallelEmbedding::load(&text, "embed_tokens", vocab, hidden)?;
        let layers = (0..config.layers.len())
            .map(|index| DecoderLayer::load(&config, index, &text.pp("layers").pp(index)))
            .collect::<std::result::Result<_, _>>()?;
        let norm = RmsNorm::load(&text, "norm", hidden, config.rms_norm_eps)?;
        let lm_head = if config.tie_word_embeddings || !weights.has("lm_head.weight") {
            embed_tokens.tied_head()
        } else {
            ParallelLmHead::load(weights, "lm_head", vocab, hidden)?
        };
        let weight_bytes = weights.finish(&["model.visual.", "mtp."])?;
        Ok(Self {
            config,
            embed_tokens,
            layers,
            norm,
            lm_head,
            weight_bytes,
            device: device.clone(),
        })
    }

    fn run(
        &self,
        batch: &Batch,
        states: &mut [&mut SequenceState],
        probe: &mut dyn FnMut(usize, &Tensor),
    ) -> Result<Tensor> {
        let mut hidden = self.embed_tokens.forward(&batch.ids)?; // (t, hidden)
        probe(0, &hidden);
        for (index, layer) in self.layers.iter().enumerate() {
            hidden = layer.forward(&hidden, index, batch, states)?;
            probe(index + 1, &hidden);
        }
        for segment in &batch.segments {
            states[segment.state].len += segment.rows.len();
        }
        let wanted = batch.logit_rows();
        let count = wanted.len();
        if count == 0 {
            return Tensor::zeros((0, self.config.vocab_size), hidden.dtype(), &self.device);
        }
        if count < batch.ids.len() {
            hidden = hidden.index_select(&Tensor::new(wanted, &self.device)?, 0)?;
        }
        let hidden = self.norm.forward(&hidden)?; // (wanted, hidden)
        probe(self.layers.len() + 1, &hidden);
        self.lm_head.forward(&hidden) // (wanted, vocab)
    }
}

impl CausalLm for Qwen3_5ForCausalLm {
    fn vocab_size(&self) -> usize {
        self.config.vocab_size
    }

    fn context_length(&self) -> usize {
        self.config.context_length
    }

    fn weight_bytes(&self) -> u64 {
        self.weight_bytes
    }

    fn state_bytes(&self, tokens: usize) -> u64 {
        let per_layer = |layer: &DecoderLayer| layer.state_floats(tokens);
        4 * self.layers.iter().map(per_layer).sum::<usize>() as u64
    }

    fn new_state(&self) -> std::result::Result<SequenceState, ModelError> {
        Ok(SequenceState {
            len: 0,
            layers: self.layers.iter().map(DecoderLayer::new_state).collect(),
        })
    }

    fn forward(
        &self,
        batch: &Batch,
        states: &mut [&mut SequenceState],
    ) -> std::result::Result<Tensor, ModelError> {
        Ok(self.run(batch, states, &mut |_, _| {})?)
    }

    fn forward_probed(
        &self,
        batch: &Batch,
        states: &mut [&mut SequenceState],
        probe: &mut dyn FnMut(usize, &Tensor),
    ) -> std::result::Result<Tensor, ModelError> {
        Ok(self.run(batch, states, probe)?)
    }
}

impl Config {
    /// Which mixer layer `index` has.
    pub(crate) fn kind(&self, index: usize) -> LayerKind {
        self.layers[index]
    }
}
