//! Models: what the engine may ask of one, and the table of architectures.
//!
//! Nothing here knows ranks, file formats or quantisation: those are words at the lines that load a weight.

pub mod batch;
pub mod layers;
pub mod qwen3_5;

pub use batch::{Batch, LogitRows, Segment};

use crate::gpu::GpuError;
use crate::kernels::choose::Rule;
use crate::kernels::rows::{Place, Rows};
use crate::kernels::with_f32;
use crate::memory::pool::KvPool;
use crate::memory::{NoBlocks, SequenceState};
use crate::parallel::{
    self, Communicator, GroupError, Indivisible, ModelCollectives, RankInfo, Solo,
};
use crate::quant::Format;
use crate::weights::{self, Fault, Weights};
use candle_core::Tensor;
use qwen3_5::Qwen3_5ForCausalLm;
use qwen3_5::config::Config;
pub use qwen3_5::shapes::Shape;
use serde::Deserialize;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Is shown what passes by in a forward pass.
pub type Probe<'a> = dyn FnMut(Seen, &Rows) + Send + 'a;

/// A decoder that predicts the next token.
///
/// Implementations are pure in the weights: everything a sequence remembers is in its [`SequenceState`], so one
/// model serves any number of sequences, and any split of a prompt over calls gives the same numbers.
pub trait CausalLm: Send {
    /// Entries of a row of logits. Larger than the tokenizer: the tail must never be sampled.
    fn vocab_size(&self) -> usize;

    /// Longest sequence in tokens.
    fn context_length(&self) -> usize;

    /// Bytes the weights hold.
    fn weight_bytes(&self) -> u64;

    /// The ranks it is shared among; one where it is whole.
    fn ranks(&self) -> RankInfo {
        RankInfo {
            weight_bytes: vec![self.weight_bytes()],
            ..RankInfo::default()
        }
    }

    /// Bytes of weights that a step of so many rows reads, if each is read once: of experts, those that a row is likely to go to.
    fn step_bytes(&self, _rows: usize) -> u64 {
        self.weight_bytes()
    }

    /// Bytes one sequence's state holds at `tokens` tokens.
    fn state_bytes(&self, tokens: usize) -> u64;

    /// Bytes that a sequence's state holds beside these while a step of `rows` rows can be taken back.
    fn trail_bytes(&self, rows: usize) -> u64 {
        let _ = rows;
        0
    }

    /// Bytes that are held for that between steps.
    fn trails_held(&self) -> u64 {
        0
    }

    /// Where the keys and values of all its sequences lie.
    fn pool(&self) -> &KvPool;

    /// Bounds the blocks that all sequences may hold together, and gives back what is only kept for later steps.
    fn bound_blocks(&self, blocks: usize) {
        self.pool().set_capacity(blocks);
    }

    /// The state of a sequence that has not begun.
    fn new_state(&self) -> SequenceState;

    /// Runs the rows of `batch`, advancing the state of each segment by its rows.
    ///
    /// Returns the logits of [`Batch::logit_rows`] in that order: (rows, vocab), f32. Of a part of a model, only the first
    /// has them; the others return no rows.
    ///
    /// # Errors
    /// On a fault of the device; the states of the batch are then unusable.
    fn forward(
        &self,
        batch: &Batch,
        states: &mut [&mut SequenceState],
    ) -> Result<Tensor, ModelError> {
        self.forward_probed(batch, states, &mut |_, _| {})
    }

    /// As [`CausalLm::forward`], where of each row of logits nothing is wanted but the token that its rule chooses of the first
    /// `allowed` entries: none where an entry is not a number, or none finite. There is a rule for each row.
    ///
    /// # Errors
    /// As [`CausalLm::forward`].
    fn forward_chosen(
        &self,
        batch: &Batch,
        states: &mut [&mut SequenceState],
        rules: &[Rule],
        allowed: usize,
    ) -> Result<Vec<Option<u32>>, ModelError> {
        Ok(chosen(&self.forward(batch, states)?, rules, allowed)?)
    }

    /// As [`CausalLm::forward`], showing `probe` what passes by, where it is: what it wants it brings to the host itself.
    ///
    /// # Errors
    /// As [`CausalLm::forward`].
    fn forward_probed(
        &self,
        batch: &Batch,
        states: &mut [&mut SequenceState],
        probe: &mut Probe<'_>,
    ) -> Result<Tensor, ModelError>;

    /// Whether it can [`draft`](CausalLm::draft).
    fn drafts(&self) -> bool {
        false
    }

    /// Logits of the tokens after next, by a layer of their own, where the model has one and it was loaded: the rows of
    /// `batch` are the tokens i + 1 and `hidden`, (t, hidden), is what [`Seen::Final`] showed at the tokens i. A sequence's
    /// rows must come in order and without gaps, as those of [`CausalLm::forward`]; a layer that is behind leaves no gap,
    /// and one that was ahead begins where the sequence is.
    ///
    /// # Errors
    /// As [`CausalLm::forward`].
    fn draft(
        &self,
        batch: &Batch,
        hidden: &Tensor,
        states: &mut [&mut SequenceState],
    ) -> Option<Result<Drafted, ModelError>> {
        let _ = (batch, hidden, states);
        None
    }
}

/// [`CausalLm::forward_chosen`] from logits on the host.
fn chosen(
    logits: &Tensor,
    rules: &[Rule],
    allowed: usize,
) -> candle_core::Result<Vec<Option<u32>>> {
    let (_, vocab) = logits.dims2()?;
    with_f32(logits, |logits| {
        let rows = logits.chunks_exact(vocab.max(1)).zip(rules);
        rows.map(|(row, rule)| rule.choose(&mut row[..allowed.min(vocab)].to_vec()))
            .collect()
    })
}

/// What the drafting layer says.
#[derive(Debug, Clone)]
pub struct Drafted {
    /// Of [`Batch::logit_rows`], in that order: (rows, vocab), f32.
    pub logits: Tensor,
    /// What the head saw there, to draft a further token from: (rows, hidden).
    pub hidden: Tensor,
}

/// What a probe is shown in a forward pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Seen {
    /// The residual stream: 0 the embeddings, `i` after layer `i - 1`; (t, hidden).
    Hidden(usize),
    /// The router's logits in this layer: (t, experts).
    Router(usize),
    /// The last rows after the final norm, those that need logits: (rows, hidden).
    HeadInput,
    /// All rows after the final norm, of a model that was loaded with its drafting layer: (t, hidden).
    Final,
}

/// How to load a model.
#[derive(Debug, Clone)]
pub struct LoadOptions {
    /// Where it is to be; the places of its ranks in their order, which begins anew where there are fewer.
    pub places: Vec<Place>,
    /// Upper bound on the sequence length, below the model's own.
    pub context_length: Option<usize>,
    /// Whether to load the layer that drafts tokens, where there is one.
    pub drafts: bool,
    /// The number format weight matrices are held in, see [`format_of`](crate::quant::format_of); that of the files when absent.
    pub quant: Option<Format>,
    /// What ranks tell of the calls that join them; nothing when absent.
    pub collectives: Option<ModelCollectives>,
}

impl LoadOptions {
    /// A model on the CPU as its files describe it, for serving.
    #[must_use]
    pub fn cpu() -> Self {
        Self {
            places: vec![Place::Cpu],
            context_length: None,
            drafts: false,
            quant: None,
            collectives: None,
        }
    }
}

/// Loads the model in `folder` (Hugging Face layout), or in a single file that has everything. `progress` is told the share of bytes read, 0 to 1.
///
/// # Errors
/// One typed error that names file and tensor; see [`LoadError`].
pub fn load(
    folder: &Path,
    options: &LoadOptions,
    progress: &dyn Fn(f32),
) -> Result<Box<dyn CausalLm>, LoadError> {
    load_rank(folder, options, Arc::new(Solo), progress)
}

/// Loads one rank's part of the model in `folder`.
///
/// # Errors
/// As [`load`].
pub fn load_rank(
    folder: &Path,
    options: &LoadOptions,
    communicator: Arc<dyn Communicator>,
    progress: &dyn Fn(f32),
) -> Result<Box<dyn CausalLm>, LoadError> {
    let (config, weights) = open(folder, options, communicator, progress)?;
    Ok(Box::new(Qwen3_5ForCausalLm::load(
        config, &weights, options,
    )?))
}

/// One rank's part of a model of the shape of a release, with weights that mean nothing: to measure with, without files.
///
/// # Errors
/// When the device has no room.
pub fn load_made_up(
    shape: Shape,
    options: &LoadOptions,
    communicator: Arc<dyn Communicator>,
    progress: &dyn Fn(f32),
) -> Result<Box<dyn CausalLm>, LoadError> {
    let name = format!("made up in the shape of {shape}");
    let text = shape.config().to_string();
    let config = Config::parse(PathBuf::from(&name), &text, options.context_length)?;
    let place = parallel::place(&*communicator, &options.places);
    let weights = Weights::made_up(&name, place, options.quant, communicator, progress);
    Ok(Box::new(Qwen3_5ForCausalLm::load(
        config, &weights, options,
    )?))
}

/// Bytes of weights that the rank of `communicator` would hold of the model in `folder`. Of its files only what they say
/// of themselves is read.
///
/// # Errors
/// [`LoadError::Tensors`] with all that cannot be shared so; as [`load`] when the folder cannot be read.
pub fn planned_weight_bytes(
    folder: &Path,
    options: &LoadOptions,
    communicator: Arc<dyn Communicator>,
) -> Result<u64, LoadError> {
    let (config, weights) = open(folder, options, communicator, &|_| {})?;
    let model = Qwen3_5ForCausalLm::load(config, &weights.planned(), options)?;
    Ok(model.weight_bytes())
}

/// The configuration and the weights of the model in `folder`.
fn open<'a>(
    folder: &Path,
    options: &LoadOptions,
    communicator: Arc<dyn Communicator>,
    progress: &'a dyn Fn(f32),
) -> Result<(Config, Weights<'a>), LoadError> {
    let model_type = model_type(folder)?;
    if !qwen3_5::config::MODEL_TYPES.contains(&model_type.as_str()) {
        return Err(LoadError::UnknownArchitecture {
            folder: folder.to_path_buf(),
            model_type,
        });
    }
    let config = Config::read(folder, options.context_length)?;
    let weights = Weights::open(
        folder,
        config.grouped_heads(),
        parallel::place(&*communicator, &options.places),
        options.quant,
        communicator,
        progress,
    )?;
    Ok((config, weights))
}

/// What the checkpoint calls the architecture.
fn model_type(folder: &Path) -> Result<String, LoadError> {
    #[derive(Deserialize)]
    struct Named {
        model_type: String,
    }
    let (file, text) = weights::config(folder)?;
    let named: Named =
        serde_json::from_str(&text).map_err(|source| LoadError::Json { file, source })?;
    Ok(named.model_type)
}

/// A step could not be run.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// The device or its library refused an operation.
    #[error("device fault: {0}")]
    Device(#[from] candle_core::Error),
    /// The same of a CUDA device.
    #[error("device fault: {0}")]
    Gpu(#[from] GpuError),
    /// More tokens than the blocks of the pool hold.
    #[error(transparent)]
    NoBlocks(#[from] NoBlocks),
    /// The parts of the model can no longer work together.
    #[error(transparent)]
    Group(#[from] GroupError),
    /// Drafts were asked of a model that has no layer for them.
    #[error("the model has no layer that drafts")]
    NoDrafts,
}

/// A model folder could not be loaded.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// A file is not there or cannot be read.
    #[error("{} cannot be read: {source}", file.display())]
    Io {
        /// The file.
        file: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A JSON file is not what it should be.
    #[error("{}: {source}", file.display())]
    Json {
        /// The file.
        file: PathBuf,
        /// Where and why.
        source: serde_json::Error,
    },
    /// A weights file is cut short or something else.
    #[error("{} is cut short or holds no weights: {source}", file.display())]
    Weights {
        /// The file.
        file: PathBuf,
        /// Why.
        source: crate::weights::FormatError,
    },
    /// The architecture is not one of ours.
    #[error("{}: model_type \"{model_type}\" is not supported; supported are {}", folder.display(), qwen3_5::config::MODEL_TYPES.join(", "))]
    UnknownArchitecture {
        /// The folder.
        folder: PathBuf,
        /// What its configuration says.
        model_type: String,
    },
    /// The configuration asks for something that is not built.
    #[error("{}: {key} {what}", file.display())]
    Config {
        /// The file.
        file: PathBuf,
        /// The key.
        key: &'static str,
        /// What is wrong with it.
        what: String,
    },
    /// Tensors are missing or not as the configuration says.
    #[error("{}: {}", folder.display(), list(faults))]
    Tensors {
        /// The folder.
        folder: PathBuf,
        /// All of them.
        faults: Vec<Fault>,
    },
    /// The device has no room, or refused an operation.
    #[error("device fault while loading: {0}")]
    Device(#[from] candle_core::Error),
    /// The same of a CUDA device.
    #[error("device fault while loading: {0}")]
    Gpu(#[from] GpuError),
    /// The parts of the model cannot be brought together.
    #[error(transparent)]
    Group(#[from] GroupError),
    /// The model has no such parts.
    #[error(transparent)]
    Indivisible(#[from] Indivisible),
}

/// Faults in one line; a checkpoint of another model has thousands, of which the first tell enough.
fn list(faults: &[Fault]) -> String {
    const SHOWN: usize = 20;
    let mut shown: Vec<String> = faults.iter().take(SHOWN).map(Fault::to_string).collect();
    if faults.len() > SHOWN {
        shown.push(format!("and {} more", faults.len() - SHOWN));
    }
    shown.join("; ")
}

impl LoadError {
    pub(crate) fn io(file: &Path, source: std::io::Error) -> Self {
        Self::Io {
            file: file.to_path_buf(),
            source,
        }
    }
}
