//! `neuron verify`: does a checkpoint give the numbers it should, on this machine, in pieces of any size?
//!
//! The golden file is one as `reference/make_fixtures.py` of this project's design notes makes: for prompts `lenN` the
//! token ids, logits, a greedy continuation, and for some of them hidden states, the logits of routers, those of drafts
//! and the state after the prompt.

use crate::devices;
use crate::gpu::GpuError;
use crate::kernels::argmax;
use crate::kernels::rows::{Place, Rows};
use crate::memory::{LayerState, SequenceState};
use crate::model::{Batch, CausalLm, LoadError, LoadOptions, LogitRows, ModelError, Seen};
use crate::parallel;
use crate::quant::Format;
use candle_core::{DType, Device, Tensor, safetensors};
use std::collections::{BTreeSet, HashMap};
use std::fmt;
use std::path::PathBuf;

/// What to verify.
#[derive(Debug, Clone, clap::Args)]
pub struct VerifyArgs {
    /// The model folder; it needs no tokenizer.
    #[arg(long, value_name = "DIR")]
    pub model: PathBuf,
    /// The golden tensors to meet.
    #[arg(long, value_name = "FILE")]
    pub reference: PathBuf,
    /// Feed prompts in pieces of this many tokens; whole without it.
    #[arg(long, value_name = "N", value_parser = clap::builder::RangedU64ValueParser::<usize>::new().range(1..))]
    pub chunk: Option<usize>,
    /// Largest difference that passes.
    #[arg(long, value_name = "X", default_value_t = 3e-4)]
    pub tolerance: f32,
    /// Hold the weights in this number format: f32, f16, bf16, q8_0, q6_k, q5_k or q4_k; that of the files without it.
    #[arg(long, value_name = "FORMAT")]
    pub quant: Option<Format>,
    /// Share the model among this many ranks, each in threads of its own.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::builder::RangedU64ValueParser::<usize>::new().range(1..))]
    pub world_size: usize,
    /// Where the model is to be: `cpu`, or a device such as `cuda:0`. Ranks get a device each, from this one on.
    #[arg(long, value_name = "ID", default_value = "cpu")]
    pub device: String,
    /// Judge by averages, as fits weights that are rounded: pass when the mean divergence of the predicted
    /// distributions from the golden ones is at most this many nats.
    #[arg(long, value_name = "NATS")]
    pub max_kl: Option<f64>,
}

/// Verifying could not even begin, or could not go on.
#[derive(Debug, thiserror::Error)]
pub enum VerifyError {
    /// The model could not be loaded.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// There is no such device.
    #[error(transparent)]
    Gpu(#[from] GpuError),
    /// A step failed.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// The golden file cannot be read.
    #[error("{}: {source}", file.display())]
    Reference {
        /// The file.
        file: PathBuf,
        /// Why.
        source: candle_core::Error,
    },
    /// The golden file has no prompts.
    #[error("{} holds no prompts: a tensor `lenN/input_ids` is needed", .0.display())]
    NoCases(PathBuf),
    /// A golden tensor is not of the shape it should have.
    #[error("comparing with the golden tensors failed: {0}")]
    Tensor(#[from] candle_core::Error),
}

/// What was found.
#[derive(Debug, Clone)]
pub struct Report {
    /// One entry a prompt, shortest first.
    pub cases: Vec<Case>,
    /// Largest difference that passes.
    pub tolerance: f32,
    /// Largest mean divergence that passes, where that is what counts.
    pub max_kl: Option<f64>,
}

/// What was found with one prompt. A part that the golden file does not have is `None`.
#[derive(Debug, Clone, Default)]
pub struct Case {
    /// Tokens of the prompt.
    pub tokens: usize,
    /// Largest difference of any logit.
    pub logits: f32,
    /// How far the predicted distributions are from the golden ones, over the tokens whose golden logits are there.
    pub predictions: Predictions,
    /// Largest difference of hidden states, and the first layer where it is too large. Where a layer's numbers are larger
    /// than 16 it counts in proportion to them.
    pub hidden: Option<(f32, Option<usize>)>,
    /// Largest difference of the state after the prompt, and the first layer where it is too large. Of several ranks the
    /// convolution's tails are not compared, whose parts are interleaved.
    pub state: Option<(f32, Option<usize>)>,
    /// Largest difference of the logits of routers, and the first layer where it is too large.
    pub routers: Option<(f32, Option<usize>)>,
    /// Largest difference of the logits of drafts: the model's guess of the token after next.
    pub drafts: Option<f32>,
    /// The greedy continuation: `Ok(n)` tokens are equal, or `Err(i)` is the first that is not.
    pub greedy: Option<Result<usize, usize>>,
}

/// Predicted distributions against golden ones.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Predictions {
    /// Tokens compared.
    pub tokens: usize,
    /// Sum over them of the divergence KL(golden ‖ found) in nats.
    pub kl: f64,
    /// How many have the same likeliest next token.
    pub same_top: usize,
}

impl Predictions {
    /// Adds a token: the logits found and the golden ones.
    pub fn add(&mut self, found: &[f32], golden: &[f32]) {
        let (found_log, golden_log) = (log_softmax(found), log_softmax(golden));
        let pairs = golden_log.iter().zip(&found_log);
        let kl = pairs.map(|(p, q)| p.exp() * (p - q)).sum::<f64>();
        // no number is as far away as can be
        self.kl += if kl.is_nan() { f64::INFINITY } else { kl };
        self.same_top += usize::from(argmax(found) == argmax(golden));
        self.tokens += 1;
    }

    fn join(self, other: Self) -> Self {
        Self {
            tokens: self.tokens + other.tokens,
            kl: self.kl + other.kl,
            same_top: self.same_top + other.same_top,
        }
    }

    /// The mean divergence in nats; 0 of nothing.
    #[must_use]
    pub fn mean_kl(&self) -> f64 {
        self.kl / self.tokens.max(1) as f64
    }
}

fn log_softmax(logits: &[f32]) -> Vec<f64> {
    let highest = f64::from(logits.iter().copied().fold(f32::NEG_INFINITY, f32::max));
    let shifted = logits.iter().map(|x| f64::from(*x) - highest);
    let total = shifted.clone().map(f64::exp).sum::<f64>().ln();
    shifted.map(|x| x - total).collect()
}

impl Case {
    /// Whether everything compared is within `tolerance`.
    #[must_use]
    pub fn passed(&self, tolerance: f32) -> bool {
        let within =
            |part: Option<(f32, Option<usize>)>| part.is_none_or(|(diff, _)| diff <= tolerance);
        self.logits <= tolerance
            && within(self.hidden)
            && within(self.state)
            && within(self.routers)
            && self.drafts.is_none_or(|diff| diff <= tolerance)
            && self.greedy.is_none_or(|greedy| greedy.is_ok())
    }
}

impl Report {
    /// Whether the predictions are near enough on average, where that counts, or else every case passed.
    #[must_use]
    pub fn passed(&self) -> bool {
        match self.max_kl {
            Some(bound) => {
                let predictions = self.predictions();
                predictions.tokens > 0 && predictions.mean_kl() <= bound
            }
            None => self.cases.iter().all(|case| case.passed(self.tolerance)),
        }
    }

    /// The predictions of all cases.
    #[must_use]
    pub fn predictions(&self) -> Predictions {
        let all = self.cases.iter().map(|case| case.predictions);
        all.fold(Predictions::default(), Predictions::join)
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "{:>6}  {:>9}  {:>9}  {:>9}  {:>9}  {:>9}  {:<18}  result",
            "prompt", "logits", "hidden", "state", "routers", "drafts", "greedy"
        )?;
        for case in &self.cases {
            let part = |part: Option<(f32, Option<usize>)>| {
                part.map_or("-".into(), |(diff, _)| format!("{diff:.1e}"))
            };
            let greedy = match case.greedy {
                None => "-".into(),
                Some(Ok(count)) => format!("{count} equal"),
                Some(Err(at)) => format!("parts at token {at}"),
            };
            let result = if self.max_kl.is_some() {
                "" // what counts is the mean over all
            } else if case.passed(self.tolerance) {
                "passed"
            } else {
                "FAILED"
            };
            let (hidden, state) = (part(case.hidden), part(case.state));
            let routers = part(case.routers);
            let drafts = part(case.drafts.map(|diff| (diff, None)));
            write!(
                f,
                "{:>6}  {:>9.1e}  {hidden:>9}  {state:>9}  {routers:>9}  {drafts:>9}  {greedy:<18}  {result}",
                case.tokens, case.logits
            )?;
            for (what, found) in [
                ("hidden states", case.hidden),
                ("state", case.state),
                ("routers", case.routers),
            ] {
                if let Some((_, Some(layer))) = found {
                    write!(f, "; {what} part first at layer {layer}")?;
                }
            }
            writeln!(f)?;
        }
        let predictions = self.predictions();
        if predictions.tokens > 0 {
            writeln!(
                f,
                "over {} predictions: mean KL {:.1e}, the same likeliest token {:.1} %",
                predictions.tokens,
                predictions.mean_kl(),
                100.0 * predictions.same_top as f64 / predictions.tokens as f64
            )?;
        }
        if let Some(bound) = self.max_kl {
            let verdict = if self.passed() { "passed" } else { "FAILED" };
            return write!(f, "{verdict} at a mean KL of {bound:.1e}");
        }
        let passed = self
            .cases
            .iter()
            .filter(|case| case.passed(self.tolerance))
            .count();
        write!(
            f,
            "{passed} of {} passed at {:.1e}",
            self.cases.len(),
            self.tolerance
        )
    }
}

/// Compares a model with its golden tensors.
///
/// # Errors
/// When the model or the golden file cannot be read; a difference is no error, but in the report.
pub fn run(args: &VerifyArgs) -> Result<Report, VerifyError> {
    run_at(args, &devices::places(&args.device, args.world_size)?)
}

/// As [`run`], with the model at `places`.
///
/// # Errors
/// As [`run`].
pub fn run_at(args: &VerifyArgs, places: &[Place]) -> Result<Report, VerifyError> {
    let options = LoadOptions {
        places: places.to_vec(),
        drafts: true,
        quant: args.quant,
        ..LoadOptions::cpu()
    };
    let model = parallel::load(&args.model, &options, args.world_size, &|_| {})?;
    let golden = safetensors::load(&args.reference, &Device::Cpu).map_err(|source| {
        VerifyError::Reference {
            file: args.reference.clone(),
            source,
        }
    })?;
    let lengths: BTreeSet<usize> = golden
        .keys()
        .filter_map(|key| {
            key.strip_prefix("len")?
                .strip_suffix("/input_ids")?
                .parse()
                .ok()
        })
        .collect();
    if lengths.is_empty() {
        return Err(VerifyError::NoCases(args.reference.clone()));
    }
    let cases = lengths
        .into_iter()
        .map(|tokens| verify_case(&*model, &golden, tokens, args))
        .collect::<Result<_, _>>()?;
    Ok(Report {
        cases,
        tolerance: args.tolerance,
        max_kl: args.max_kl,
    })
}

/// The golden tensors of one prompt.
struct Golden<'a> {
    all: &'a HashMap<String, Tensor>,
    prefix: String,
}

impl Golden<'_> {
    fn get(&self, key: &str) -> Option<&Tensor> {
        self.all.get(&format!("{}/{key}", self.prefix))
    }

    fn ids(&self, key: &str) -> Result<Option<Vec<u32>>, candle_core::Error> {
        self.get(key)
            .map(|ids| ids.to_dtype(DType::U32)?.to_vec1())
            .transpose()
    }
}

fn verify_case(
    model: &dyn CausalLm,
    golden: &HashMap<String, Tensor>,
    tokens: usize,
    args: &VerifyArgs,
) -> Result<Case, VerifyError> {
    let golden = Golden {
        all: golden,
        prefix: format!("len{tokens}"),
    };
    let prompt = golden.ids("input_ids")?.unwrap_or_default();
    let mut state = model.new_state();
    let mut logits = Vec::new();
    let mut seen: HashMap<Seen, Vec<Tensor>> = HashMap::new();
    for piece in prompt.chunks(args.chunk.unwrap_or(usize::MAX)) {
        let batch = Batch::single(piece, LogitRows::All);
        let mut fault = None;
        let keep = &mut |what, rows: &Rows| match rows.tensor() {
            Ok(rows) => seen.entry(what).or_default().push(rows),
            Err(error) => fault = Some(error),
        };
        logits.push(model.forward_probed(&batch, &mut [&mut state], keep)?);
        if let Some(error) = fault {
            return Err(error.into());
        }
    }
    let logits = Tensor::cat(&logits, 0)?; // (tokens, vocab)
    let mut case = Case {
        tokens,
        ..Case::default()
    };
    if let Some(expected) = golden.get("logits") {
        case.logits = case.logits.max(max_diff(&logits, expected)?);
        let expected = expected.to_dtype(DType::F32)?.to_vec2()?;
        for (found, golden) in logits.to_vec2::<f32>()?.iter().zip(&expected) {
            case.predictions.add(found, golden);
        }
    }
    if let Some(expected) = golden.get("last_logits") {
        case.logits = case
            .logits
            .max(max_diff(&logits.get(prompt.len() - 1)?, expected)?);
    }
    let seen: HashMap<Seen, Tensor> = seen
        .into_iter()
        .map(|(what, pieces)| Ok((what, Tensor::cat(&pieces, 0)?)))
        .collect::<Result<_, candle_core::Error>>()?;
    case.hidden = compare_hidden(&golden, &seen, args.tolerance)?;
    case.routers = compare_routers(&golden, &seen, args.tolerance)?;
    if let (Some(expected), Some(hidden)) = (golden.get("mtp_logits"), seen.get(&Seen::HeadInput))
        && let Some(drafts) = draft(model, &prompt, hidden, args.chunk)?
    {
        case.drafts = Some(max_diff(&drafts, expected)?);
    }
    case.state = compare_state(&golden, &state, args.tolerance)?;
    if let Some(expected) = golden.ids("greedy_ids")? {
        let (ids, chosen_from) = continue_greedily(
            model,
            &mut state,
            &logits.get(prompt.len() - 1)?,
            expected.len(),
        )?;
        let parts = ids
            .iter()
            .zip(&expected)
            .position(|(found, expected)| found != expected);
        case.greedy = Some(parts.map_or(Ok(expected.len()), Err));
        if let (Some(expected), None) = (golden.get("greedy_logits"), parts) {
            case.logits = case.logits.max(max_diff(&chosen_from, expected)?);
        }
    }
    Ok(case)
}

/// The logits that the drafting layer gives for every token of the prompt but the last, if the model has one.
fn draft(
    model: &dyn CausalLm,
    prompt: &[u32],
    hidden: &Tensor,
    chunk: Option<usize>,
) -> Result<Option<Tensor>, VerifyError> {
    let mut state = model.new_state();
    let mut logits = Vec::new();
    let mut start = 0;
    for piece in prompt[1..].chunks(chunk.unwrap_or(usize::MAX)) {
        let batch = Batch::single(piece, LogitRows::All);
        let hidden = hidden.narrow(0, start, piece.len())?;
        match model.draft(&batch, &hidden, &mut [&mut state]) {
            Some(drafted) => logits.push(drafted?.logits),
            None => return Ok(None),
        }
        start += piece.len();
    }
    Ok(Some(Tensor::cat(&logits, 0)?))
}

fn compare_hidden(
    golden: &Golden<'_>,
    seen: &HashMap<Seen, Tensor>,
    tolerance: f32,
) -> Result<Option<(f32, Option<usize>)>, candle_core::Error> {
    let layers = seen
        .keys()
        .filter(|what| matches!(what, Seen::Hidden(_)))
        .count();
    let named = (0..layers)
        .map(|index| (index, Seen::Hidden(index), format!("hidden/{index}")))
        .chain([(layers, Seen::HeadInput, "final_norm".into())]);
    let pairs =
        named.filter_map(|(index, what, key)| Some((index, golden.get(&key)?, seen.get(&what)?)));
    worst(
        pairs.map(|(index, expected, found)| {
            Ok((index, max_diff(found, expected)? / magnitude(expected)?))
        }),
        tolerance,
    )
}

/// By how much the numbers exceed those the tolerance is made for: 1 up to 16, where it leaves an f32 some hundred times its
/// own rounding. The residual stream of a trained model may run to thousands.
fn magnitude(expected: &Tensor) -> Result<f32, candle_core::Error> {
    let largest: f32 = expected
        .to_dtype(DType::F32)?
        .abs()?
        .max_all()?
        .to_scalar()?;
    Ok((largest / 16.0).max(1.0))
}

fn compare_routers(
    golden: &Golden<'_>,
    seen: &HashMap<Seen, Tensor>,
    tolerance: f32,
) -> Result<Option<(f32, Option<usize>)>, candle_core::Error> {
    let mut routers: Vec<(usize, &Tensor)> = seen
        .iter()
        .filter_map(|(what, found)| match what {
            Seen::Router(layer) => Some((*layer, found)),
            _ => None,
        })
        .collect();
    routers.sort_unstable_by_key(|(layer, _)| *layer);
    let differences = routers.into_iter().filter_map(|(layer, found)| {
        let expected = golden.get(&format!("trace/{layer}/router_logits"))?;
        Some(max_diff(found, expected).map(|diff| (layer, diff)))
    });
    worst(differences, tolerance)
}

fn compare_state(
    golden: &Golden<'_>,
    state: &SequenceState,
    tolerance: f32,
) -> Result<Option<(f32, Option<usize>)>, candle_core::Error> {
    let mut differences = Vec::new();
    for (layer, own) in state.layers.iter().enumerate() {
        let parts: Vec<(&str, Vec<f32>)> = match own {
            LayerState::Attention(place) => {
                let heads = 0..state.kv_shape().heads;
                let parts = state.parts();
                let all = parts.flat_map(|part| heads.clone().map(move |head| (part, head)));
                let both = all.map(|(part, head)| part.keys_and_values(*place, head));
                let (keys, values): (Vec<_>, Vec<_>) =
                    both.map(|[keys, values]| (keys, values)).unzip();
                vec![("k", keys.concat()), ("v", values.concat())]
            }
            LayerState::Delta(_) | LayerState::InSlot(_) => {
                let mut recurrent = Vec::new();
                let mut tail = Vec::new();
                for part in state.parts() {
                    let found = part.delta_state(layer).map_err(candle_core::Error::wrap)?;
                    recurrent.extend(found.recurrent);
                    tail = found.tail;
                }
                let mut parts = vec![("recurrent", recurrent)];
                if state.parts().count() == 1 {
                    parts.push(("conv", tail));
                }
                parts
            }
        };
        for (part, mut own) in parts {
            let Some(expected) = golden.get(&format!("state/{layer}/{part}")) else {
                continue;
            };
            // the golden tail is (channels, taps), ours (taps, channels)
            let expected = if part == "conv" {
                expected.t()?.contiguous()?
            } else {
                expected.clone()
            };
            if part != "conv" {
                own = without_copies(own, expected.elem_count(), expected.dim(0)?);
            }
            let own = Tensor::from_vec(own, expected.shape(), &Device::Cpu)?;
            differences.push(Ok((layer, max_diff(&own, &expected)?)));
        }
    }
    worst(differences.into_iter(), tolerance)
}

/// Neighbouring ranks hold copies of a head where there are fewer heads than ranks: each of the `heads` once.
fn without_copies(numbers: Vec<f32>, count: usize, heads: usize) -> Vec<f32> {
    let copies = (numbers.len() / count.max(1)).max(1);
    if copies == 1 {
        return numbers;
    }
    let each = numbers.chunks(count / heads.max(1)).step_by(copies);
    each.flatten().copied().collect()
}

/// The largest difference, and the first place where it is too large; `None` when nothing was compared.
fn worst(
    differences: impl Iterator<Item = Result<(usize, f32), candle_core::Error>>,
    tolerance: f32,
) -> Result<Option<(f32, Option<usize>)>, candle_core::Error> {
    let mut worst: Option<(f32, Option<usize>)> = None;
    for difference in differences {
        let (place, difference) = difference?;
        let (largest, first) = worst.get_or_insert((0.0, None));
        *largest = largest.max(difference);
        if difference > tolerance {
            first.get_or_insert(place);
        }
    }
    Ok(worst)
}

/// `count` likeliest tokens one after the other, and the logits each was chosen from.
fn continue_greedily(
    model: &dyn CausalLm,
    state: &mut SequenceState,
    logits: &Tensor,
    count: usize,
) -> Result<(Vec<u32>, Tensor), VerifyError> {
    let mut rows = vec![logits.unsqueeze(0)?];
    let mut ids = vec![likeliest(logits)?];
    while ids.len() < count {
        let batch = Batch::single(&ids[ids.len() - 1..], LogitRows::Last);
        let logits = model.forward(&batch, &mut [state])?;
        ids.push(likeliest(&logits.get(0)?)?);
        rows.push(logits);
    }
    Ok((ids, Tensor::cat(&rows, 0)?))
}

fn likeliest(logits: &Tensor) -> Result<u32, candle_core::Error> {
    logits.argmax(0)?.to_scalar()
}

/// NaN counts as infinitely far.
fn max_diff(found: &Tensor, expected: &Tensor) -> Result<f32, candle_core::Error> {
    let difference = (found - expected.to_dtype(DType::F32)?)?
        .abs()?
        .flatten_all()?
        .to_vec1::<f32>()?;
    let number = |x: f32| if x.is_nan() { f32::INFINITY } else { x };
    Ok(difference.into_iter().map(number).fold(0.0, f32::max))
}
