//! Qwen3.5 and Qwen3-Next: embed → (norm → gated delta net | gated attention → norm → MLP | experts)ⁿ → norm → head.

use super::layers::embedding::{ParallelLmHead, VocabParallelEmbedding};
use super::layers::norm::RmsNorm;
use super::{
    Batch, CausalLm, Drafted, LoadError, LoadOptions, LogitRows, ModelError, Probe, Seen, Segment,
    chosen,
};
use crate::gpu::GpuError;
use crate::kernels::choose::Rule;
use crate::kernels::cuda::graphs::{self, Graphs};
use crate::kernels::cuda::step::StepMemory;
use crate::kernels::cuda::{Step, ops};
use crate::kernels::rows::{Place, Rows};
use crate::memory::SequenceState;
use crate::memory::pool::{KvPool, KvShape};
use crate::memory::slot::SlotPool;
use crate::parallel::{Communicator, brought, in_pool, is_alone, settle};
use crate::weights::Weights;
use candle_core::{DType, Device, Result, Tensor};
use config::Config;
use decoder::{DecoderLayer, Places};
use mtp::MultiTokenPredictor;
use std::sync::Arc;

mod attention;
pub(crate) mod config;
mod decoder;
mod gated_delta_net;
mod mlp;
mod moe;
mod mtp;
pub(crate) mod shapes;
#[cfg(test)]
mod tests;

/// What a forward pass works on, handed down through the layers.
struct Pass<'a, 's> {
    batch: &'a Batch,
    states: &'a mut [&'s mut SequenceState],
    /// Where the rows of each state begin in its sequence.
    starts: Vec<usize>,
    probe: Option<&'a mut Probe<'a>>,
    /// Tables of the step, where the model is on a device.
    step: Option<Step>,
}

impl Pass<'_, '_> {
    /// The tables of the step.
    fn step(&self) -> Result<&Step> {
        let step = self.step.as_ref();
        step.ok_or_else(|| candle_core::Error::Msg("a step on a device has tables".into()))
    }

    /// Shows `rows` to the probe, where there is one. It may wait for the device.
    fn show(&mut self, what: Seen, rows: &Rows, communicator: &dyn Communicator) -> Result<()> {
        if let Some(probe) = &mut self.probe {
            settle(communicator)?;
            probe(what, rows);
        }
        Ok(())
    }
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
    slots: Option<SlotPool>,
    weight_bytes: u64,
    place: Place,
    step_memory: StepMemory,
    graphs: Graphs,
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
        let mut layers = Vec::with_capacity(config.layers.len());
        let mut delta_places = Vec::new();
        for (index, layer) in config.layers.iter().enumerate() {
            let weights = text.pp("layers").pp(index);
            let layer = DecoderLayer::load(&config, *layer, &delta_places, &weights)?;
            delta_places.extend(layer.delta_place());
            layers.push(layer);
        }
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
        let kept = together(kept);
        let (pool, slots) = match weights.place() {
            Place::Cpu => (KvPool::new(kept), None),
            Place::Gpu(gpu) => {
                let pool = KvPool::on_device(kept, embed_tokens.kv_numbers(), gpu);
                (pool, Some(SlotPool::new(gpu, delta_places)))
            }
        };
        Ok(Self {
            pool,
            slots,
            config,
            embed_tokens,
            layers,
            norm,
            lm_head,
            mtp,
            weight_bytes,
            place: weights.place().clone(),
            step_memory: StepMemory::default(),
            graphs: Graphs::default(),
            communicator: weights.communicator(),
        })
    }

    fn run(&self, pass: &mut Pass<'_, '_>) -> Result<Tensor> {
        let wanted = self.last_rows(pass)?; // (wanted, hidden)
        for segment in &pass.batch.segments {
            pass.states[segment.state].len += segment.rows.len();
        }
        let logits = match wanted.count() {
            0 => None,
            _ => {
                pass.show(Seen::HeadInput, &wanted, &*self.communicator)?;
                self.lm_head.forward(&wanted)? // (wanted, vocab)
            }
        };
        // what is done after the step may wait for the device
        settle(&*self.communicator)?;
        logits.map_or_else(|| self.no_logits(), Ok)
    }

    /// From tokens to what the head is given: (wanted, hidden).
    fn last_rows(&self, pass: &mut Pass<'_, '_>) -> Result<Rows> {
        let ids = &pass.batch.ids;
        let mut hidden = self.embed_tokens.forward(ids, pass.step.as_ref())?; // (t, hidden)
        pass.show(Seen::Hidden(0), &hidden, &*self.communicator)?;
        for (index, layer) in self.layers.iter().enumerate() {
            hidden = layer.forward(hidden, index, pass)?;
            pass.show(Seen::Hidden(index + 1), &hidden, &*self.communicator)?;
        }
        if self.mtp.is_some() {
            let all = self.norm.forward(&hidden)?; // (t, hidden): the drafting layer follows every token
            pass.show(Seen::Final, &all, &*self.communicator)?;
            wanted(all, pass)
        } else {
            self.norm.forward(&wanted(hidden, pass)?)
        }
    }

    fn run_draft(
        &self,
        mtp: &MultiTokenPredictor,
        hidden: &Tensor,
        pass: &mut Pass<'_, '_>,
    ) -> Result<Drafted> {
        let ids = &pass.batch.ids;
        let embeddings = self.embed_tokens.forward(ids, pass.step.as_ref())?; // (t, hidden)
        let hidden = Rows::placed(hidden.clone(), &self.place)?;
        let x = mtp.forward(&embeddings, &hidden, self.layers.len(), pass)?;
        let hidden = wanted(x, pass)?;
        let logits = match hidden.count() {
            0 => None,
            _ => self.lm_head.forward(&hidden)?, // (wanted, vocab)
        };
        Ok(Drafted {
            logits: logits.map_or_else(|| self.no_logits(), Ok)?,
            hidden: brought(&*self.communicator, &hidden)?,
        })
    }

    fn draft_with(
        &self,
        mtp: &MultiTokenPredictor,
        batch: &Batch,
        hidden: &Tensor,
        states: &mut [&mut SequenceState],
    ) -> std::result::Result<Drafted, ModelError> {
        let starts: Vec<usize> = states.iter().map(|state| state.drafted).collect();
        for segment in &batch.segments {
            states[segment.state].make_room_for_drafts(segment.rows.len())?;
        }
        let step = self.step(batch, &starts, states, None)?;
        let mut pass = Pass {
            batch,
            states,
            starts,
            probe: None,
            step,
        };
        let drafts = in_pool(&*self.communicator, || {
            self.run_draft(mtp, hidden, &mut pass)
        })?;
        for segment in &batch.segments {
            states[segment.state].drafted += segment.rows.len();
        }
        Ok(drafts)
    }

    /// Whether a step over `batch` can be done by [`Self::forward_on_device`]: on one device, with rows to look at at its end.
    fn is_whole_on_device(&self, batch: &Batch) -> bool {
        let wanted = |segment: &Segment| segment.logits != LogitRows::None;
        self.place.gpu().is_some()
            && is_alone(&*self.communicator)
            && batch.segments.iter().any(wanted)
    }

    /// Whether steps like `batch` come again and again, in a model that can record them.
    fn is_recorded(&self, batch: &Batch) -> bool {
        let row_each = |segment: &Segment| {
            segment.rows.len() == 1 && segment.logits != LogitRows::None && !segment.revocable
        };
        batch.segments.len() <= graphs::MOST_ROWS
            && batch.segments.iter().all(row_each)
            && !self.layers.iter().any(DecoderLayer::needs_host)
    }

    /// What is before a step: room for its rows, and its tables where the model is on a device. Gives with them how many tokens
    /// each state has seen.
    fn begin(
        &self,
        batch: &Batch,
        states: &mut [&mut SequenceState],
        rules: Option<(&[Rule], usize)>,
    ) -> std::result::Result<(Vec<usize>, Option<Step>), ModelError> {
        let starts: Vec<usize> = states.iter().map(|state| state.len).collect();
        for segment in &batch.segments {
            states[segment.state].make_room(segment.rows.len())?;
        }
        Self::begin_trails(batch, states)?;
        let step = self.step(batch, &starts, states, rules)?;
        Ok((starts, step))
    }

    /// [`CausalLm::forward`], with a probe or without.
    fn forward_shown(
        &self,
        batch: &Batch,
        states: &mut [&mut SequenceState],
        probe: Option<&mut Probe<'_>>,
    ) -> std::result::Result<Tensor, ModelError> {
        let (starts, step) = self.begin(batch, states, None)?;
        let mut pass = Pass {
            batch,
            states,
            starts,
            probe: probe.map(|probe| probe as &mut Probe<'_>),
            step,
        };
        Ok(in_pool(&*self.communicator, || self.run(&mut pass))?)
    }

    /// A step of a model that is whole on a device, without probes: the logits, or where the step has rules the tokens, as
    /// [`ops::choose`] has them.
    fn forward_on_device(
        &self,
        batch: &Batch,
        states: &mut [&mut SequenceState],
        step: Step,
    ) -> std::result::Result<Vec<f32>, ModelError> {
        let mut pass = Pass {
            batch,
            states,
            starts: Vec::new(), // the tables have them
            probe: None,
            step: Some(step.clone()),
        };
        let mut work = || {
            let wanted = self.last_rows(&mut pass)?;
            match self.lm_head.project(&wanted)? {
                Rows::Device(logits) if step.shape.choices.rules == 0 => Ok(logits),
                Rows::Device(logits) => Ok(ops::choose(&logits, &step)?),
                Rows::Host(_) => candle_core::bail!("the head is on the device"),
            }
        };
        let found = if self.is_recorded(batch) {
            self.graphs.run(&step, work)?
        } else {
            work()?.numbers()?
        };
        for segment in &batch.segments {
            states[segment.state].len += segment.rows.len();
        }
        Ok(found)
    }

    /// The tables of a step, where the model is on a device.
    fn step(
        &self,
        batch: &Batch,
        starts: &[usize],
        states: &[&mut SequenceState],
        rules: Option<(&[Rule], usize)>,
    ) -> std::result::Result<Option<Step>, GpuError> {
        let gpu = self.place.gpu();
        gpu.map(|gpu| Step::new(gpu, &self.step_memory, batch, starts, states, rules))
            .transpose()
    }

    /// Has states on a device leave a trail where rows of the step may be taken back.
    fn begin_trails(
        batch: &Batch,
        states: &mut [&mut SequenceState],
    ) -> std::result::Result<(), GpuError> {
        let revocable = |segment: &Segment| segment.revocable && segment.rows.len() > 1;
        let several = batch.segments.iter().filter(|segment| revocable(segment));
        let most = several.map(|segment| segment.rows.len()).max();
        for segment in &batch.segments {
            if let Some(slot) = states[segment.state].slot_mut() {
                slot.begin_trail(most.filter(|_| revocable(segment)))?;
            }
        }
        Ok(())
    }

    fn no_logits(&self) -> Result<Tensor> {
        Tensor::zeros((0, self.config.vocab_size), DType::F32, &Device::Cpu)
    }
}

/// The rows of `hidden` that need logits.
fn wanted(hidden: Rows, pass: &Pass<'_, '_>) -> Result<Rows> {
    let wanted = pass.batch.logit_rows();
    if wanted.len() == pass.batch.ids.len() {
        return Ok(hidden);
    }
    match &hidden {
        Rows::Host(hidden) => {
            let wanted = Tensor::new(wanted, &Device::Cpu)?;
            Ok(Rows::Host(hidden.index_select(&wanted, 0)?))
        }
        Rows::Device(hidden) => Ok(Rows::Device(ops::wanted(hidden, pass.step()?)?)),
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

    fn step_bytes(&self, rows: usize) -> u64 {
        let idle = self.layers.iter().map(|layer| layer.idle_bytes(rows));
        self.weight_bytes - idle.sum::<u64>()
    }

    fn state_bytes(&self, tokens: usize) -> u64 {
        let fixed: usize = self.layers.iter().map(DecoderLayer::state_floats).sum();
        (4 * fixed + KvShape::blocks(tokens) * self.pool.block_bytes()) as u64
    }

    fn trail_bytes(&self, rows: usize) -> u64 {
        let floats = self.layers.iter().map(|layer| layer.trail_floats(rows));
        4 * floats.sum::<usize>() as u64
    }

    fn trails_held(&self) -> u64 {
        self.slots.as_ref().map_or(0, SlotPool::trails_held)
    }

    fn pool(&self) -> &KvPool {
        &self.pool
    }

    fn bound_blocks(&self, blocks: usize) {
        self.pool.set_capacity(blocks);
        self.slots.iter().for_each(SlotPool::free_trails);
    }

    fn drafts(&self) -> bool {
        self.mtp.is_some()
    }

    fn new_state(&self) -> SequenceState {
        let mut places = Places::default();
        let layers = self.layers.iter().map(|layer| layer.new_state(&mut places));
        let mut layers: Vec<_> = layers.collect();
        layers.extend(self.mtp.iter().map(|mtp| mtp.new_state(&mut places)));
        let slot = self.slots.as_ref().map(SlotPool::empty);
        SequenceState::new(layers, self.pool.clone()).with_slot(slot)
    }

    fn forward(
        &self,
        batch: &Batch,
        states: &mut [&mut SequenceState],
    ) -> std::result::Result<Tensor, ModelError> {
        if !self.is_whole_on_device(batch) {
            return self.forward_shown(batch, states, None);
        }
        let (_, step) = self.begin(batch, states, None)?;
        let step = step.expect("a model on a device has tables");
        let logits = self.forward_on_device(batch, states, step)?;
        let shape = (batch.logit_rows().len(), self.config.vocab_size);
        Ok(Tensor::from_vec(logits, shape, &Device::Cpu)?)
    }

    fn forward_chosen(
        &self,
        batch: &Batch,
        states: &mut [&mut SequenceState],
        rules: &[Rule],
        allowed: usize,
    ) -> std::result::Result<Vec<Option<u32>>, ModelError> {
        const NONE: u32 = u32::MAX;
        if !self.is_whole_on_device(batch) {
            let logits = self.forward(batch, states)?;
            return Ok(chosen(&logits, rules, allowed)?);
        }
        let (_, step) = self.begin(batch, states, Some((rules, allowed)))?;
        let step = step.expect("a model on a device has tables");
        let ids = self.forward_on_device(batch, states, step)?;
        let ids = ids.into_iter().map(f32::to_bits);
        Ok(ids.map(|id| Some(id).filter(|id| *id != NONE)).collect())
    }

    fn forward_probed(
        &self,
        batch: &Batch,
        states: &mut [&mut SequenceState],
        probe: &mut Probe<'_>,
    ) -> std::result::Result<Tensor, ModelError> {
        self.forward_shown(batch, states, Some(probe))
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
