//! `neuron bench`: how fast this machine computes a model, and how near that is to what its memory gives.
//!
//! The model alone is measured, without the engine, the tokenizer and HTTP around it.

use crate::devices;
use crate::gpu::{GpuError, Peaks};
use crate::kernels::choose::Rule;
use crate::kernels::peaks::{self, read_bandwidth};
use crate::kernels::rows::Place;
use crate::memory::SequenceState;
use crate::model::{
    Batch, CausalLm, LoadError, LoadOptions, LogitRows, ModelError, Shape, load_made_up,
};
use crate::parallel::{self, Solo};
use crate::quant::Format;
use serde::Serialize;
use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

/// Numbers that no cache has room for: half a gigabyte.
const MORE_THAN_CACHES: usize = 1 << 27;

/// What to measure.
#[derive(Debug, Clone, clap::Args)]
pub struct BenchArgs {
    /// The model: a folder in Hugging Face layout or a GGUF file; it needs no tokenizer.
    #[arg(long, value_name = "DIR", required_unless_present = "shape")]
    pub model: Option<PathBuf>,
    /// Measure a model made up in the shape of a release instead; it needs no files.
    #[arg(long, value_name = "NAME", conflicts_with_all = ["model", "tensor_parallel"])]
    pub shape: Option<Shape>,
    /// Where the model is to be: `cpu`, or a device such as `cuda:0`. Ranks get a device each, from this one on.
    #[arg(long, value_name = "ID", default_value = "cpu")]
    pub device: String,
    /// Hold its weights in this number format: f32, f16, bf16, q8_0, q6_k, q5_k or q4_k [default: that of its files]
    #[arg(long, value_name = "FORMAT")]
    pub quant: Option<Format>,
    /// Tokens of a prompt.
    #[arg(long, value_name = "N", default_value_t = 512)]
    pub prompt: usize,
    /// The prompt is computed in pieces of this many tokens, as the engine does.
    #[arg(long, value_name = "N", default_value_t = 512, value_parser = clap::builder::RangedU64ValueParser::<usize>::new().range(1..))]
    pub chunk: usize,
    /// Tokens that each sequence writes.
    #[arg(long, value_name = "N", default_value_t = 32)]
    pub generate: usize,
    /// Tokens that are before the first one written.
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub depth: usize,
    /// Sequences that write at once, one measurement for each number.
    #[arg(long, value_name = "N,…", value_delimiter = ',', default_value = "1,8")]
    pub batch: Vec<usize>,
    /// Threads that compute [default: as many as there are processors]
    #[arg(long, value_name = "N")]
    pub threads: Option<usize>,
    /// Share the model among this many ranks, each in threads of its own.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::builder::RangedU64ValueParser::<usize>::new().range(1..))]
    pub tensor_parallel: usize,
    /// How often each measurement is made; the median counts.
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::builder::RangedU64ValueParser::<usize>::new().range(1..))]
    pub rounds: usize,
    /// Print JSON.
    #[arg(long)]
    pub json: bool,
}

/// What is measured of a model, as [`BenchArgs`] have it.
#[derive(Debug, Clone)]
pub struct Measure {
    /// Tokens of a prompt.
    pub prompt: usize,
    /// Tokens of a piece of it.
    pub chunk: usize,
    /// Tokens that each sequence writes.
    pub generate: usize,
    /// Tokens before them.
    pub depth: usize,
    /// Numbers of sequences at once.
    pub batch: Vec<usize>,
    /// How often each is measured.
    pub rounds: usize,
}

impl BenchArgs {
    fn measure(&self) -> Measure {
        Measure {
            prompt: self.prompt,
            chunk: self.chunk,
            generate: self.generate,
            depth: self.depth,
            batch: self.batch.clone(),
            rounds: self.rounds,
        }
    }
}

/// Measuring could not begin, or could not go on.
#[derive(Debug, thiserror::Error)]
pub enum BenchError {
    /// The model could not be loaded.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// There is no such device, or it failed.
    #[error(transparent)]
    Gpu(#[from] GpuError),
    /// A step failed.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// The threads cannot be had.
    #[error("threads: {0}")]
    Threads(#[from] rayon::ThreadPoolBuildError),
}

/// What was measured.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    /// Threads that computed.
    pub threads: usize,
    /// Ranks among which the model and these threads were shared.
    pub ranks: usize,
    /// Bytes of the weights in memory.
    pub weight_bytes: u64,
    /// Seconds until they were there.
    pub load_seconds: f64,
    /// Bytes a second that these threads read from memory.
    pub read_bandwidth: f64,
    /// One entry a measurement.
    pub measurements: Vec<Measurement>,
}

/// One measurement.
#[derive(Debug, Clone, Serialize)]
pub struct Measurement {
    /// What: `prefill` or `decode`.
    pub what: &'static str,
    /// Sequences at once.
    pub batch: usize,
    /// Tokens of each.
    pub tokens: usize,
    /// Tokens a second over all sequences; the median of the rounds.
    pub tokens_per_second: f64,
    /// Of decoding: bytes of weights that a step would read if each were read once, over the read bandwidth.
    pub bandwidth_share: Option<f64>,
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "{:.3} GB of weights on {} rank{}, loaded in {:.1} s; {} threads read {:.1} GB/s\n",
            self.weight_bytes as f64 / 1e9,
            self.ranks,
            if self.ranks == 1 { "" } else { "s" },
            self.load_seconds,
            self.threads,
            self.read_bandwidth / 1e9
        )?;
        writeln!(f, "| | batch | tokens | tokens/s | of the read bandwidth |")?;
        write!(f, "|---|--:|--:|--:|--:|")?;
        for one in &self.measurements {
            let share = one
                .bandwidth_share
                .map_or("–".into(), |share| format!("{:.0} %", 100.0 * share));
            write!(
                f,
                "\n| {} | {} | {} | {:.1} | {share} |",
                one.what, one.batch, one.tokens, one.tokens_per_second
            )?;
        }
        Ok(())
    }
}

/// Measures.
///
/// # Errors
/// When the model cannot be loaded or a step fails.
pub fn run(args: &BenchArgs) -> Result<Report, BenchError> {
    if let Some(threads) = args.threads {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads);
        pool.build_global()?;
    }
    let began = Instant::now();
    let places = devices::places(&args.device, args.tensor_parallel)?;
    let options = LoadOptions {
        places: places.clone(),
        quant: args.quant,
        ..LoadOptions::cpu()
    };
    let model = match (&args.model, args.shape) {
        (Some(model), _) => parallel::load(model, &options, args.tensor_parallel, &|_| {})?,
        (None, shape) => {
            let shape = shape.expect("one of them is there");
            load_made_up(shape, &options, Arc::new(Solo), &|_| {})?
        }
    };
    let load_seconds = began.elapsed().as_secs_f64();
    let read_bandwidth = match places.first() {
        Some(Place::Gpu(gpu)) => Peaks::measure(gpu, 1 << 30, 4096)?.bandwidth,
        _ => read_bandwidth(&peaks::numbers(MORE_THAN_CACHES), args.rounds + 2),
    };
    let ranks = args.tensor_parallel;
    let args = &args.measure();
    let measurements = measure(&*model, args, read_bandwidth)?;
    Ok(Report {
        threads: rayon::current_num_threads(),
        ranks,
        weight_bytes: model.weight_bytes(),
        load_seconds,
        read_bandwidth,
        measurements,
    })
}

/// The prompt, and then each number of sequences; without tokens to read or to write there is nothing to measure.
///
/// # Errors
/// When a step fails.
pub fn measure(
    model: &dyn CausalLm,
    args: &Measure,
    read_bandwidth: f64,
) -> Result<Vec<Measurement>, ModelError> {
    let mut measurements = Vec::new();
    if args.prompt > 0 {
        let seconds = median(args.rounds, || prefill(model, args))?;
        measurements.push(Measurement {
            what: "prefill",
            batch: 1,
            tokens: args.prompt,
            tokens_per_second: args.prompt as f64 / seconds,
            bandwidth_share: None,
        });
    }
    let written = |batch: &usize| *batch > 0 && args.generate > 0;
    for batch in args.batch.iter().copied().filter(written) {
        let seconds = median(args.rounds, || decode(model, batch, args))?;
        let steps_per_second = args.generate as f64 / seconds;
        let bytes_per_second = steps_per_second * model.step_bytes(batch) as f64;
        measurements.push(Measurement {
            what: "decode",
            batch,
            tokens: args.generate,
            tokens_per_second: batch as f64 * steps_per_second,
            bandwidth_share: Some(bytes_per_second / read_bandwidth),
        });
    }
    Ok(measurements)
}

fn median(
    rounds: usize,
    mut seconds: impl FnMut() -> Result<f64, ModelError>,
) -> Result<f64, ModelError> {
    let mut all = (0..rounds)
        .map(|_| seconds())
        .collect::<Result<Vec<_>, _>>()?;
    all.sort_by(f64::total_cmp);
    Ok(all[all.len() / 2])
}

/// Token ids that are not all the same.
fn ids(model: &dyn CausalLm, count: usize) -> Vec<u32> {
    let entries = model.vocab_size().max(1);
    (0..count).map(|at| (at * 7919 % entries) as u32).collect()
}

/// Runs `count` tokens of one sequence in pieces.
fn read(
    model: &dyn CausalLm,
    state: &mut SequenceState,
    count: usize,
    chunk: usize,
) -> Result<(), ModelError> {
    let ids = ids(model, count);
    let mut pieces = ids.chunks(chunk).peekable();
    while let Some(piece) = pieces.next() {
        let logits = match pieces.peek() {
            Some(_) => LogitRows::None,
            None => LogitRows::Last,
        };
        model.forward(&Batch::single(piece, logits), &mut [&mut *state])?;
    }
    Ok(())
}

fn prefill(model: &dyn CausalLm, args: &Measure) -> Result<f64, ModelError> {
    let mut state = model.new_state();
    let began = Instant::now();
    read(model, &mut state, args.prompt, args.chunk)?;
    Ok(began.elapsed().as_secs_f64())
}

fn decode(model: &dyn CausalLm, batch: usize, args: &Measure) -> Result<f64, ModelError> {
    let mut states: Vec<SequenceState> = (0..batch).map(|_| model.new_state()).collect();
    for state in &mut states {
        read(model, state, args.depth, args.chunk)?;
    }
    let written = ids(model, args.generate);
    let step = |states: &mut [SequenceState], id: u32| {
        let mut rows = Batch::default();
        let vocab = model.vocab_size();
        for state in 0..states.len() {
            // each writes its own, or all would go to the same experts
            let own = (id as usize + 104_729 * state) % vocab.max(1);
            rows.push(state, &[own as u32], LogitRows::Last);
        }
        let mut states: Vec<&mut SequenceState> = states.iter_mut().collect();
        // as the engine does where the likeliest token is taken
        let rules = vec![Rule::likeliest(); states.len()];
        let chosen = model.forward_chosen(&rows, &mut states, &rules, vocab);
        chosen.map(drop)
    };
    step(&mut states, 0)?; // memory is touched for the first time
    let began = Instant::now();
    for id in written {
        step(&mut states, id)?;
    }
    Ok(began.elapsed().as_secs_f64())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_asked_for_is_measured_and_nothing_else() {
        let folder = concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/../tests/fixtures/models/qwen3_5_text"
        );
        let mut args = Measure {
            prompt: 20,
            chunk: 8,
            generate: 2,
            depth: 3,
            batch: vec![1, 0, 3],
            rounds: 1,
        };
        let model = parallel::load(folder.as_ref(), &LoadOptions::cpu(), 1, &|_| {}).unwrap();
        let bandwidth = 1e9;
        let found = measure(&*model, &args, bandwidth).unwrap();
        let asked: Vec<_> = found.iter().map(|m| (m.what, m.batch, m.tokens)).collect();
        assert_eq!(
            asked,
            [("prefill", 1, 20), ("decode", 1, 2), ("decode", 3, 2)]
        );
        for one in &found[1..] {
            let steps = one.tokens_per_second / one.batch as f64;
            let share = steps * model.weight_bytes() as f64 / bandwidth;
            assert!((one.bandwidth_share.unwrap() / share - 1.0).abs() < 1e-9);
        }
        // of eight experts three: a step of one token reads less than all, and one of many hardly less
        let folder = concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/../tests/fixtures/models/qwen3_5_moe_vl"
        );
        for ranks in [1, 2] {
            let sparse = parallel::load(folder.as_ref(), &LoadOptions::cpu(), ranks, &|_| {});
            let sparse = sparse.unwrap();
            let share = |rows| sparse.step_bytes(rows) as f64 / sparse.weight_bytes() as f64;
            assert!(share(1) < 0.8, "{}", share(1));
            assert!((0.99..=1.0).contains(&share(64)), "{}", share(64));
            assert!(share(1) < share(2));
        }
        (args.prompt, args.generate) = (0, 0);
        assert!(measure(&*model, &args, bandwidth).unwrap().is_empty());
    }
}
