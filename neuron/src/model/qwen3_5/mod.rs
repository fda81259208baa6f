//! Qwen3.5 and Qwen3-Next: embed → (norm → gated delta net | gated attention → norm → MLP | experts)ⁿ → norm → head.

use super::layers::embedding::{ParallelLmHead, VocabParallelEmbedding};
use super::layers::norm::RmsNorm;
use super::{Batch, CausalLm, Drafted, LoadError, LoadOptions, ModelError, Seen};
use crate::memory::SequenceState;
use crate::memory::pool::{KvPool, KvShape};
use crate::parallel::{Communicator, in_pool};
use crate::weights::Weights;
use candle_core::{Device, Result, Tensor};
use config::Config;
use decoder::DecoderLayer;
use mtp::MultiTokenPredictor;
use std::sync::Arc;

mod attention;
pub(crate) mod config;
mod decoder;
mod gated_delta_net;
mod mlp;
mod moe;
mod mtp;

/// What a forward pass works on, handed down through the layers.
struct Pass<'a, 's> {
    batch: &'a Batch,
    states: &'a mut [&'s mut SequenceState],
    /// Where the rows of each state begin in its sequence.
    starts: Vec<usize>,
    probe: &'a mut (dyn FnMut(Seen, &Tensor) + Send),
}

/// The whole model, or one rank's part of it (Qwen3_5ForCausalLM).
#[derive(Debug)]
pub struct Qwen3_5ForCausalLm {
    config: Config,
    embed_tokens: VocabParallelEmbedding,
    layers: Vec<DecoderLayer>,
    norm: RmsNorm,
    lm_head: ParallelLmHead,
    mtp: Option<MultiTokenPredictor>,
    pool: KvPool,
    weight_bytes: u64,
    device: Device,
    communicator: Arc<dyn Communicator>,
}

impl Qwen3_5ForCausalLm {
    /// Loads the model that `config` describes.
    ///
    /// # Errors
    /// Every missing or mis-shaped tensor at once.
    pub(crate) fn load(
        config: Config,
        weights: &Weights<'_>,
        options: &LoadOptions,
    ) -> std::result::Result<Self, LoadError> {
        let (hidden, vocab) = (config.hidden_size, config.vocab_size);
        // multimodal files keep the text model one level down
        let text = if weights.has("model.language_model.embed_tokens.weight") {
            weights.pp("model.language_model")
        } else {
            weights.pp("model")
        };
        let embed_tokens = VocabParallelEmbedding::load(&text, "embed_tokens", vocab, hidden)?;
        let layers = config
            .layers
            .iter()
            .enumerate()
            .map(|(index, layer)| DecoderLayer::load(&config, *layer, &text.pp("layers").pp(index)))
            .collect::<std::result::Result<Vec<_>, _>>()?;
        let norm = RmsNorm::load(&text, "norm", hidden, config.rms_norm_eps)?;
        let lm_head = if config.tie_word_embeddings || !weights.has("lm_head.weight") {
            embed_tokens.tied_head()
        } else {
            ParallelLmHead::load(weights, "lm_head", vocab, hidden)?
        };
        let mtp = if options.drafts && config.drafts && weights.has("mtp.fc.weight") {
            Some(MultiTokenPredictor::load(&config, &weights.pp("mtp"))?)
        } else {
            None
        };
        let weight_bytes = weights.finish(&["model.visual.", "mtp."])?;
        let kept = layers.iter().filter_map(DecoderLayer::kv_shape);
        let kept = kept.chain(mtp.iter().filter_map(MultiTokenPredictor::kv_shape));
        Ok(Self {
            pool: KvPool::new(together(kept)),
            config,
            embed_tokens,
            layers,
            norm,
            lm_head,
            mtp,
            weight_bytes,
            device: options.device.clone(),
            communicator: weights.communicator(),
        })
    }

    fn run(&self, pass: &mut Pass<'_, '_>) -> Result<Tensor> {
        let mut hidden = self.embed_tokens.forward(&pass.batch.ids)?; // (t, hidden)
        (pass.probe)(Seen::Hidden(0), &hidden);
        for (index, layer) in self.layers.iter().enumerate() {
            hidden = layer.forward(&hidden, index, pass)?;
            (pass.probe)(Seen::Hidden(index + 1), &hidden);
        }
        for segment in &pass.batch.segments {
            pass.states[segment.state].len += segment.rows.len();
        }
        let hidden = if self.mtp.is_some() {
            let all = self.norm.forward(&hidden)?; // (t, hidden): the drafting layer follows every token
            (pass.probe)(Seen::Final, &all);
            self.wanted(all, pass.batch)?
        } else {
            self.norm.forward(&self.wanted(hidden, pass.batch)?)?
        }; // (wanted, hidden)
        if hidden.dim(0)? == 0 {
            return self.no_logits(&hidden);
        }
        (pass.probe)(Seen::HeadInput, &hidden);
        match self.lm_head.forward(&hidden)? {
            Some(logits) => Ok(logits), // (wanted, vocab)
            None => self.no_logits(&hidden),
        }
    }

    fn run_draft(
        &self,
        mtp: &MultiTokenPredictor,
        hidden: &Tensor,
        pass: &mut Pass<'_, '_>,
    ) -> Result<Drafted> {
        let embeddings = self.embed_tokens.forward(&pass.batch.ids)?; // (t, hidden)
        let x = mtp.forward(&embeddings, hidden, self.layers.len(), pass)?;
        let hidden = self.wanted(x, pass.batch)?;
        let logits = match hidden.dim(0)? {
            0 => None,
            _ => self.lm_head.forward(&hidden)?, // (wanted, vocab)
        };
        let logits = match logits {
            Some(logits) => logits,
            None => self.no_logits(&hidden)?,
        };
        Ok(Drafted { logits, hidden })
    }

    fn draft_with(
        &self,
        mtp: &MultiTokenPredictor,
        batch: &Batch,
        hidden: &Tensor,
        states: &mut [&mut SequenceState],
    ) -> std::result::Result<Drafted, ModelError> {
        let starts = states.iter().map(|state| state.drafted).collect();
        for segment in &batch.segments {
            states[segment.state].make_room_for_drafts(segment.rows.len())?;
        }
        let probe = &mut |_, _: &Tensor| {};
        let mut pass = Pass {
            batch,
            states,
            starts,
            probe,
        };
        let drafts = in_pool(&*self.communicator, || {
            self.run_draft(mtp, hidden, &mut pass)
        })?;
        for segment in &batch.segments {
            states[segment.state].drafted += segment.rows.len();
        }
        Ok(drafts)
    }

    /// The rows of `hidden` that need logits.
    fn wanted(&self, hidden: Tensor, batch: &Batch) -> Result<Tensor> {
        let wanted = batch.logit_rows();
        if wanted.len() == batch.ids.len() {
            return Ok(hidden);
        }
        hidden.index_select(&Tensor::new(wanted, &self.device)?, 0)
    }

    fn no_logits(&self, like: &Tensor) -> Result<Tensor> {
        Tensor::zeros((0, self.config.vocab_size), like.dtype(), &self.device)
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
        let fixed: usize = self.layers.iter().map(DecoderLayer::state_floats).sum();
        let blocks = KvShape::blocks(tokens) * self.pool.shape().block_floats();
        4 * (fixed + blocks) as u64
    }

    fn pool(&self) -> &KvPool {
        &self.pool
    }

    fn drafts(&self) -> bool {
        self.mtp.is_some()
    }

    fn new_state(&self) -> SequenceState {
        let mut place = 0;
        let layers = self.layers.iter().map(|layer| layer.new_state(&mut place));
        let mut layers: Vec<_> = layers.collect();
        layers.extend(self.mtp.iter().map(|mtp| mtp.new_state(&mut place)));
        SequenceState::new(layers, self.pool.clone())
    }

    fn forward_probed(
        &self,
        batch: &Batch,
        states: &mut [&mut SequenceState],
        probe: &mut (dyn FnMut(Seen, &Tensor) + Send),
    ) -> std::result::Result<Tensor, ModelError> {
        let starts = states.iter().map(|state| state.len).collect();
        for segment in &batch.segments {
            states[segment.state].make_room(segment.rows.len())?;
        }
        let mut pass = Pass {
            batch,
            states,
            starts,
            probe,
        };
        Ok(in_pool(&*self.communicator, || self.run(&mut pass))?)
    }

    fn draft(
        &self,
        batch: &Batch,
        hidden: &Tensor,
        states: &mut [&mut SequenceState],
    ) -> Option<std::result::Result<Drafted, ModelError>> {
        let mtp = self.mtp.as_ref()?;
        Some(self.draft_with(mtp, batch, hidden, states))
    }
}

/// What all of `layers` keep of a token; every layer of the family keeps the same.
fn together(layers: impl Iterator<Item = KvShape>) -> KvShape {
    let nothing = KvShape {
        layers: 0,
        heads: 0,
        dim: 0,
    };
    layers.fold(nothing, |sum, layer| KvShape {
        layers: sum.layers + 1,
        ..layer
    })
}
