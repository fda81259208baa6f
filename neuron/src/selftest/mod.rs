//! `neuron selftest`: is a CUDA device right, and how fast is it? It needs nothing but the device: kernels are held to their
//! references, models of a few layers that are in the program to golden numbers, the ways of asking one of them to each
//! other, and models made up in the shape of releases are measured.

pub mod equalities;
mod peer;

use crate::gpu::{Gpu, GpuError, Peaks};
#[cfg(any(test, feature = "cuda"))]
use crate::kernels::cuda::checks;
use crate::kernels::rows::Place;
use crate::model::{self, CausalLm, LoadError, LoadOptions, ModelError, Shape};
use crate::parallel::Solo;
use crate::quant::Format;
use crate::verify::{self, VerifyArgs, VerifyError};
use crate::{bench, devices};
use equalities::Equality;
use serde::Serialize;
use std::fmt;
#[cfg(any(test, feature = "cuda"))]
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

/// What to test.
#[derive(Debug, Clone, clap::Args)]
pub struct SelftestArgs {
    /// The device.
    #[arg(long, value_name = "ID", default_value = "cuda:0")]
    pub device: String,
    /// Shapes of releases to measure, made up on the device in bf16; `--shape none` measures nothing.
    #[arg(
        long,
        value_name = "NAME,…",
        value_delimiter = ',',
        default_value = "0.8b,9b"
    )]
    pub shape: Vec<String>,
    /// Tokens of the prompts that are measured.
    #[arg(
        long,
        value_name = "N,…",
        value_delimiter = ',',
        default_value = "512,8192"
    )]
    pub prompt: Vec<usize>,
    /// Sequences that write at once.
    #[arg(
        long,
        value_name = "N,…",
        value_delimiter = ',',
        default_value = "1,8,64"
    )]
    pub batch: Vec<usize>,
    /// Measure transformers beside neuron, on the same shapes, with this Python [default: python3]; it needs torch with CUDA
    #[arg(long, value_name = "PYTHON", num_args = 0..=1, require_equals = true, default_missing_value = "python3")]
    pub peer: Option<PathBuf>,
    /// Seconds after which it is given up, for each shape
    #[arg(long, value_name = "SECONDS", default_value_t = 300)]
    pub peer_seconds: u64,
    /// Print JSON instead of tables.
    #[arg(long)]
    pub json: bool,
}

/// The test could not go on.
#[derive(Debug, thiserror::Error)]
pub enum SelftestError {
    /// There is no such device, or it failed.
    #[error(transparent)]
    Gpu(#[from] GpuError),
    /// A model could not be made.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// A model failed.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// A golden file could not be compared with.
    #[error(transparent)]
    Verify(#[from] VerifyError),
    /// The fixtures could not be laid down to be read.
    #[error("no room for the fixtures: {0}")]
    Fixtures(#[from] std::io::Error),
    /// There is no such shape.
    #[error("there is no shape `{0}`; there are 0.8b, 2b, 4b, 9b, 27b, 35b-a3b and none")]
    Shape(String),
}

/// What was found.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    /// The device's name.
    pub device: String,
    /// What it gives at best, if it came to that.
    pub peaks: Option<Peaks>,
    /// One entry a kernel.
    pub kernels: Vec<Outcome>,
    /// One entry a fixture, number format and size of pieces.
    pub models: Vec<Outcome>,
    /// One entry a way of asking.
    pub equalities: Vec<Outcome>,
    /// What was measured.
    pub measurements: Vec<Measured>,
    /// What was measured beside neuron, or why nothing was; a line a shape.
    pub peer: Vec<String>,
}

/// Whether something was as it should be.
#[derive(Debug, Clone, Serialize)]
pub struct Outcome {
    /// What.
    pub what: String,
    /// Whether it was.
    pub passed: bool,
    /// What was found.
    pub found: String,
}

/// One measurement of a made-up model.
#[derive(Debug, Clone, Serialize)]
pub struct Measured {
    /// The model's shape.
    pub shape: String,
    /// Bytes of its weights.
    pub weight_bytes: u64,
    /// What was measured: `prefill` or `decode`.
    pub what: &'static str,
    /// Sequences at once.
    pub batch: usize,
    /// Tokens of each.
    pub tokens: usize,
    /// Over all sequences.
    pub tokens_per_second: f64,
    /// Of decoding: bytes of weights that a step would read if each were read once, over the device's bandwidth.
    pub bandwidth_share: Option<f64>,
    /// Of reading: what its matrices multiply, over the device's rate.
    pub rate_share: Option<f64>,
    /// What transformers does, where it was measured.
    pub peer_tokens_per_second: Option<f64>,
}

impl Report {
    /// Whether everything was right. Speed is not judged.
    #[must_use]
    pub fn passed(&self) -> bool {
        let all = [&self.kernels, &self.models, &self.equalities];
        all.into_iter().flatten().all(|one| one.passed)
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.device)?;
        if let Some(peaks) = self.peaks {
            write!(
                f,
                ": copies {:.0} GB/s, multiplies bf16 at {:.0} T/s",
                peaks.bandwidth / 1e9,
                peaks.bf16_rate / 1e12
            )?;
        }
        writeln!(f, "\n")?;
        for (name, part) in [
            ("kernels against f64", &self.kernels),
            ("models against golden numbers", &self.models),
            ("ways of asking against each other", &self.equalities),
        ] {
            let passed = part.iter().filter(|one| one.passed).count();
            writeln!(f, "{name}: {passed} of {} passed", part.len())?;
            for one in part.iter().filter(|one| !one.passed) {
                writeln!(f, "  FAILED {}: {}", one.what, one.found)?;
            }
        }
        if self.measurements.is_empty() {
            return Ok(());
        }
        writeln!(
            f,
            "\n| shape | | batch | tokens | tokens/s | of the bandwidth | of the bf16 rate | transformers tokens/s |"
        )?;
        write!(f, "|---|---|--:|--:|--:|--:|--:|--:|")?;
        let peer = |rate: Option<f64>| rate.map_or("–".into(), |rate| format!("{rate:.1}"));
        let share = |share: Option<f64>| {
            share.map_or("–".into(), |share| format!("{:.0} %", 100.0 * share))
        };
        for one in &self.measurements {
            write!(
                f,
                "\n| {} | {} | {} | {} | {:.1} | {} | {} | {} |",
                one.shape,
                one.what,
                one.batch,
                one.tokens,
                one.tokens_per_second,
                share(one.bandwidth_share),
                share(one.rate_share),
                peer(one.peer_tokens_per_second)
            )?;
        }
        if !self.peer.is_empty() {
            writeln!(f)?;
        }
        for line in &self.peer {
            write!(f, "\nbeside neuron: {line}")?;
        }
        Ok(())
    }
}

/// Tests and measures a device.
///
/// # Errors
/// When there is no such device, or measuring fails; what is wrong with it is in the report.
pub fn run(args: &SelftestArgs) -> Result<Report, SelftestError> {
    let shapes = args
        .shape
        .iter()
        .filter(|name| *name != "none")
        .map(|name| {
            <Shape as clap::ValueEnum>::from_str(name, true)
                .map_err(|_| SelftestError::Shape(name.clone()))
        })
        .collect::<Result<Vec<_>, _>>()?;
    let gpu = devices::open_gpu(&args.device)?;
    let name = gpu.driver().name();
    // the kernels first: where one is wrong, nothing after it says more
    let kernels = kernels(&gpu);
    let mut report = Report {
        device: name,
        peaks: None,
        kernels,
        models: Vec::new(),
        equalities: Vec::new(),
        measurements: Vec::new(),
        peer: Vec::new(),
    };
    if !usable(&gpu, "kernels", &mut report.kernels) {
        return Ok(report);
    }
    let peaks = Peaks::measure(&gpu, 1 << 30, 8192)?;
    report.peaks = Some(peaks);
    let fixtures = Fixtures::lay_down()?;
    for case in all_cases() {
        let folder = fixtures.folder.path();
        let (models, equalities) = (&mut report.models, &mut report.equalities);
        if let Err(error) = look_at(&gpu, folder, case, models, equalities) {
            models.push(Outcome {
                what: format!("{} in {}", case.fixture, case.format),
                passed: false,
                found: error.to_string(),
            });
        }
        if !usable(&gpu, case.fixture, &mut report.models) {
            return Ok(report);
        }
    }
    for shape in shapes {
        let mut measured = Vec::new();
        measure(&gpu, shape, args, peaks, &mut measured)?;
        if let Some(python) = &args.peer {
            let line = measure_peer(python, shape, args, &mut measured);
            report.peer.push(format!("{shape}: {line}"));
        }
        report.measurements.extend(measured);
    }
    Ok(report)
}

/// Whether the device can still be used after `what`. Where it cannot, that is added to `outcomes`: an error of a kernel shows
/// only when work is waited for, and stays.
fn usable(gpu: &Gpu, what: &str, outcomes: &mut Vec<Outcome>) -> bool {
    let waited = gpu.driver().synchronize();
    if let Err(error) = &waited {
        outcomes.push(Outcome {
            what: format!("the device after {what}"),
            passed: false,
            found: error.to_string(),
        });
    }
    waited.is_ok()
}

/// Every kernel against its reference. A program that cannot use a device has no checks for one.
fn kernels(gpu: &Gpu) -> Vec<Outcome> {
    #[cfg(any(test, feature = "cuda"))]
    return checks::ALL
        .iter()
        .map(|(what, check)| {
            let outcome = catch_unwind(AssertUnwindSafe(|| {
                checks::run(*check, gpu);
                let waited = gpu.driver().synchronize();
                waited.expect("the device has done all of it");
            }));
            Outcome {
                what: (*what).to_owned(),
                passed: outcome.is_ok(),
                found: outcome.err().map_or_else(
                    || "within its bound".into(),
                    |panic| crate::engine::words(&*panic).to_owned(),
                ),
            }
        })
        .collect();
    #[cfg(not(any(test, feature = "cuda")))]
    {
        let _ = gpu;
        Vec::new()
    }
}

/// Largest difference that passes with weights, keys and values in f32.
const TOLERANCE: f32 = 3e-4;
/// Mean divergence that passes with weights, keys and values in bf16.
const BF16_KL: f64 = 2e-3;
/// Largest difference of logits that passes between ways of asking.
const APART_F32: f32 = 3e-4;
/// The same in bf16, where what matrices are multiplied with is rounded or not by the number of rows.
const APART_BF16: f32 = 0.3;

/// How often each measurement is made.
const ROUNDS: usize = 3;
/// Tokens that each sequence writes, and tokens before them.
const WRITTEN: usize = 64;
const DEPTH: usize = 512;

/// What is looked at in a fixture.
#[derive(Debug, Clone, Copy)]
struct Case {
    fixture: &'static str,
    /// The number format of weights, keys and values.
    format: Format,
    /// Tokens of the pieces in which prompts are read; whole where there is none.
    chunks: &'static [Option<usize>],
    /// Whether ways of asking are compared.
    ways: bool,
}

/// Everything.
fn all_cases() -> Vec<Case> {
    let formats = [Format::F32, Format::Bf16];
    let of = |fixture| {
        formats.map(|format| Case {
            fixture,
            format,
            chunks: &[None, Some(7), Some(1)],
            ways: true,
        })
    };
    FIXTURES.into_iter().flat_map(of).collect()
}

/// Adds what `case` gives, with the fixtures in `folder`: whether the model is as it should be, and the same whatever way it
/// is asked.
fn look_at(
    gpu: &Gpu,
    folder: &Path,
    case: Case,
    models: &mut Vec<Outcome>,
    equalities: &mut Vec<Outcome>,
) -> Result<(), SelftestError> {
    let Case {
        fixture, format, ..
    } = case;
    let places = [Place::Gpu(gpu.clone())];
    for chunk in case.chunks {
        let args = VerifyArgs {
            model: folder.join(fixture),
            reference: folder.join(fixture).join("golden.safetensors"),
            chunk: *chunk,
            tolerance: TOLERANCE,
            quant: Some(format),
            world_size: 1,
            device: gpu.id().to_owned(),
            max_kl: (format == Format::Bf16).then_some(BF16_KL),
        };
        let report = verify::run_at(&args, &places)?;
        let pieces = chunk.map_or("whole".into(), |chunk| format!("in pieces of {chunk}"));
        models.push(Outcome {
            what: format!("{fixture} in {format}, {pieces}"),
            passed: report.passed(),
            found: report.to_string(),
        });
    }
    if !case.ways {
        return Ok(());
    }
    let options = LoadOptions {
        places: places.to_vec(),
        quant: Some(format),
        ..LoadOptions::cpu()
    };
    let model = model::load(&folder.join(fixture), &options, &|_| {})?;
    let apart = if format == Format::F32 {
        APART_F32
    } else {
        APART_BF16
    };
    for equality in equalities::compare(&*model)? {
        let Equality {
            what,
            difference,
            same_tokens,
        } = equality;
        equalities.push(Outcome {
            what: format!("{fixture} in {format}, {what}"),
            passed: difference <= apart && same_tokens,
            found: format!("logits {difference:.1e} apart, tokens the same: {same_tokens}"),
        });
    }
    Ok(())
}

/// Measures a made-up model.
fn measure(
    gpu: &Gpu,
    shape: Shape,
    args: &SelftestArgs,
    peaks: Peaks,
    measurements: &mut Vec<Measured>,
) -> Result<(), SelftestError> {
    let options = LoadOptions {
        places: vec![Place::Gpu(gpu.clone())],
        ..LoadOptions::cpu()
    };
    let model: Box<dyn CausalLm> = model::load_made_up(shape, &options, Arc::new(Solo), &|_| {})?;
    let mut add = |one: bench::Measurement| {
        let per_token = 2.0 * shape.layer_weights() as f64;
        let rate = one.tokens_per_second * per_token / peaks.bf16_rate;
        measurements.push(Measured {
            shape: shape.to_string(),
            weight_bytes: model.weight_bytes(),
            what: one.what,
            batch: one.batch,
            tokens: one.tokens,
            tokens_per_second: one.tokens_per_second,
            bandwidth_share: one.bandwidth_share,
            rate_share: (one.what == "prefill").then_some(rate),
            peer_tokens_per_second: None,
        });
    };
    for prompt in &args.prompt {
        let args = bench::Measure {
            prompt: *prompt,
            chunk: 8192,
            generate: 0,
            depth: 0,
            batch: Vec::new(),
            rounds: ROUNDS,
        };
        bench::measure(&*model, &args, peaks.bandwidth)?
            .into_iter()
            .for_each(&mut add);
    }
    let args = bench::Measure {
        prompt: 0,
        chunk: 8192,
        generate: WRITTEN,
        depth: DEPTH,
        batch: args.batch.clone(),
        rounds: ROUNDS,
    };
    bench::measure(&*model, &args, peaks.bandwidth)?
        .into_iter()
        .for_each(add);
    Ok(())
}

/// Measures transformers on the same device, and puts what it does beside what neuron `measured`: of what is read, and of one
/// sequence that writes. Tells what it is, or why there are no figures.
fn measure_peer(
    python: &Path,
    shape: Shape,
    args: &SelftestArgs,
    measured: &mut [Measured],
) -> String {
    let asked = peer::Asked {
        config: shape.config(),
        device: args.device.clone(),
        prompts: args.prompt.clone(),
        depth: DEPTH,
        generate: WRITTEN,
        rounds: ROUNDS,
    };
    match peer::measure(python, &asked, Duration::from_secs(args.peer_seconds)) {
        Ok(found) => {
            put_beside(&found, &args.prompt, measured);
            found.to_string()
        }
        Err(error) => error.to_string(),
    }
}

fn put_beside(found: &peer::Found, prompts: &[usize], measured: &mut [Measured]) {
    for one in measured {
        let seconds = match one.what {
            "prefill" => {
                let mut all = prompts.iter().zip(&found.prefill_seconds);
                let found = all.find(|(prompt, _)| **prompt == one.tokens);
                found.map(|(_, seconds)| *seconds)
            }
            _ if one.batch == 1 => Some(found.decode_seconds),
            _ => None,
        };
        one.peer_tokens_per_second = seconds.map(|seconds| one.tokens as f64 / seconds);
    }
}

/// The models that are in the program.
const FIXTURES: [&str; 5] = [
    "qwen3_5_text",
    "qwen3_5_vl_tied",
    "qwen3_5_moe_vl",
    "qwen3_next_moe",
    "qwen3_next_dense",
];

/// The fixtures as files; deleted when it is dropped.
struct Fixtures {
    folder: tempfile::TempDir,
}

impl Fixtures {
    fn lay_down() -> Result<Self, std::io::Error> {
        let folder = tempfile::tempdir()?;
        for (name, bytes) in embedded::FILES {
            let file = folder.path().join(name);
            if let Some(folder) = file.parent() {
                std::fs::create_dir_all(folder)?;
            }
            std::fs::write(file, bytes)?;
        }
        Ok(Self { folder })
    }
}

#[cfg(feature = "cuda")]
mod embedded {
    //! The files of the fixtures.

    macro_rules! files {
        ($($name:literal: $($file:literal)*;)*) => {
            &[$($((
                concat!($name, "/", $file),
                include_bytes!(concat!("../../../tests/fixtures/models/", $name, "/", $file)),
            ),)*)*]
        };
    }

    pub(super) const FILES: &[(&str, &[u8])] = files! {
        "qwen3_5_text": "config.json" "golden.safetensors" "model.safetensors";
        "qwen3_5_vl_tied": "config.json" "golden.safetensors" "model.safetensors.index.json"
            "model-00001-of-00002.safetensors" "model-00002-of-00002.safetensors";
        "qwen3_5_moe_vl": "config.json" "golden.safetensors" "model.safetensors";
        "qwen3_next_moe": "config.json" "golden.safetensors" "model.safetensors";
        "qwen3_next_dense": "config.json" "golden.safetensors" "model.safetensors";
    };
}

#[cfg(not(feature = "cuda"))]
mod embedded {
    //! A program that cannot use a device has no fixtures to test it with.

    pub(super) const FILES: &[(&str, &[u8])] = &[];
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gpu::emulated::emulated_gpu;

    fn folder() -> std::path::PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/models")
    }

    fn all_pass(outcomes: &[Outcome]) {
        assert!(!outcomes.is_empty());
        for one in outcomes {
            assert!(one.passed, "{}: {}", one.what, one.found);
        }
    }

    fn passes(case: Case) {
        let Some(gpu) = emulated_gpu() else { return };
        let (mut models, mut equalities) = (Vec::new(), Vec::new());
        look_at(&gpu, &folder(), case, &mut models, &mut equalities).unwrap();
        all_pass(&models);
        if case.ways {
            all_pass(&equalities);
        }
    }

    #[test]
    fn figures_of_a_peer_stand_beside_what_they_are_of() {
        let one = |what, batch, tokens| Measured {
            shape: "9b".into(),
            weight_bytes: 0,
            what,
            batch,
            tokens,
            tokens_per_second: 7.0,
            bandwidth_share: None,
            rate_share: None,
            peer_tokens_per_second: None,
        };
        let mut measured = vec![
            one("prefill", 1, 512),
            one("prefill", 1, 8192),
            one("decode", 1, 64),
            one("decode", 8, 64),
        ];
        let prompts = [512, 8192];
        let found = peer::Found {
            prefill_seconds: vec![0.25, 2.0],
            decode_seconds: 0.5,
            ..peer::Found::default()
        };
        put_beside(&found, &prompts, &mut measured);
        let beside = measured.iter().map(|one| one.peer_tokens_per_second);
        let expected = [Some(2048.0), Some(4096.0), Some(128.0), None];
        assert_eq!(beside.collect::<Vec<_>>(), expected);
        let report = Report {
            device: "a device".into(),
            peaks: None,
            kernels: Vec::new(),
            models: Vec::new(),
            equalities: Vec::new(),
            measurements: measured,
            peer: vec!["9b: transformers".into()],
        };
        let shown = report.to_string();
        let last = "| 9b | decode | 8 | 64 | 7.0 | – | – | – |\n\nbeside neuron: 9b: transformers";
        assert!(shown.ends_with(last), "{shown}");
        assert!(shown.contains("| 9b | prefill | 1 | 512 | 7.0 | – | – | 2048.0 |"));
    }

    // Each member of the family once, and between them every way of reading a prompt: the whole is for a device.

    #[test]
    fn a_dense_model_is_right_on_a_device_whatever_way_it_is_asked() {
        passes(Case {
            fixture: "qwen3_5_text",
            format: Format::F32,
            chunks: &[None],
            ways: true,
        });
    }

    #[test]
    fn a_model_in_bf16_is_near_enough_on_a_device() {
        passes(Case {
            fixture: "qwen3_5_text",
            format: Format::Bf16,
            chunks: &[None],
            ways: true,
        });
    }

    #[test]
    fn a_model_with_heads_of_a_release_is_right_on_a_device() {
        passes(Case {
            fixture: "qwen3_5_vl_tied",
            format: Format::F32,
            chunks: &[None, Some(7)],
            ways: false,
        });
    }

    #[test]
    fn a_model_with_experts_is_right_on_a_device() {
        passes(Case {
            fixture: "qwen3_5_moe_vl",
            format: Format::F32,
            chunks: &[None, Some(7)],
            ways: true,
        });
    }

    #[test]
    fn experts_of_the_family_before_are_right_on_a_device() {
        passes(Case {
            fixture: "qwen3_next_moe",
            format: Format::F32,
            chunks: &[Some(1)],
            ways: false,
        });
    }

    #[test]
    fn the_family_before_is_right_on_a_device() {
        passes(Case {
            fixture: "qwen3_next_dense",
            format: Format::F32,
            chunks: &[Some(1)],
            ways: false,
        });
    }

    #[test]
    fn two_ranks_on_two_devices_are_one_model() {
        let (Some(one), Some(other)) = (emulated_gpu(), emulated_gpu()) else {
            return;
        };
        for name in ["qwen3_5_text", "qwen3_5_moe_vl"] {
            let fixture = folder().join(name);
            let args = VerifyArgs {
                reference: fixture.join("golden.safetensors"),
                model: fixture,
                chunk: Some(40),
                tolerance: TOLERANCE,
                quant: Some(Format::F32),
                world_size: 2,
                device: "cuda:0".into(),
                max_kl: None,
            };
            let places = [&one, &other].map(|gpu| Place::Gpu(gpu.clone()));
            let report = verify::run_at(&args, &places).unwrap();
            assert!(report.passed(), "{name}: {report}");
        }
    }

    #[test]
    #[ignore = "ten minutes on two cores; a device does it in seconds by `neuron selftest`"]
    fn every_fixture_is_right_on_a_device_in_every_way() {
        all_cases().into_iter().for_each(passes);
    }

    #[test]
    fn the_cpu_keeps_the_same_equalities() {
        for name in FIXTURES {
            let model = model::load(&folder().join(name), &LoadOptions::cpu(), &|_| {}).unwrap();
            for equality in equalities::compare(&*model).unwrap() {
                assert!(equality.difference <= APART_F32, "{name}: {equality:?}");
                assert!(equality.same_tokens, "{name}: {equality:?}");
            }
        }
    }
}
