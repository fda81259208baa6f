//! The model against the golden numbers: whole, in pieces, token by token, alone, in a batch, on one rank and on two.

#![allow(missing_docs, clippy::unwrap_used)]

use candle_core::{Device, Tensor, safetensors};
use neuron::model::{self, Batch, LoadError, LoadOptions, LogitRows};
use neuron::parallel::{Communicator, Threads};
use neuron::quant::Format;
use neuron::verify::{self, VerifyArgs};
use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

const FIXTURES: [&str; 5] = [
    "qwen3_5_text",
    "qwen3_5_vl_tied",
    "qwen3_5_moe_vl",
    "qwen3_next_moe",
    "qwen3_next_dense",
];
const TOLERANCE: f32 = 3e-4;

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../tests/fixtures/models")
        .join(name)
}

fn args(name: &str) -> VerifyArgs {
    VerifyArgs {
        model: fixture(name),
        reference: fixture(name).join("golden.safetensors"),
        chunk: None,
        tolerance: TOLERANCE,
        quant: None,
        max_kl: None,
    }
}

fn golden(name: &str) -> HashMap<String, Tensor> {
    safetensors::load(fixture(name).join("golden.safetensors"), &Device::Cpu).unwrap()
}

fn prompt(golden: &HashMap<String, Tensor>, length: usize) -> Vec<u32> {
    golden[&format!("len{length}/input_ids")]
        .to_dtype(candle_core::DType::U32)
        .unwrap()
        .to_vec1()
        .unwrap()
}

fn max_diff(a: &Tensor, b: &Tensor) -> f32 {
    (a - b)
        .unwrap()
        .abs()
        .unwrap()
        .max_all()
        .unwrap()
        .to_scalar()
        .unwrap()
}

#[test]
fn every_golden_number_is_met_whole_and_in_pieces_of_any_size() {
    for name in FIXTURES {
        for chunk in [
            None,
            Some(1),
            Some(2),
            Some(3),
            Some(4),
            Some(5),
            Some(63),
            Some(64),
            Some(65),
        ] {
            let args = VerifyArgs {
                chunk,
                ..args(name)
            };
            let report = verify::run(&args).unwrap();
            assert!(report.passed(), "{name} in pieces of {chunk:?}:\n{report}");
            assert_eq!(report.cases.len(), 7, "all prompts were compared");
            let with_hidden = report.cases.iter().find(|case| case.tokens == 65).unwrap();
            assert!(
                with_hidden.hidden.is_some() && with_hidden.state.is_some(),
                "states were compared as well"
            );
            let with_trace = report.cases.iter().find(|case| case.tokens == 7).unwrap();
            assert_eq!(
                with_trace.routers.is_some(),
                name.contains("moe"),
                "{name}: routers were compared where there are any"
            );
            for case in &report.cases {
                assert_eq!(
                    case.drafts.is_some(),
                    name.contains("_vl") && [7, 65].contains(&case.tokens),
                    "{name}: drafts were compared where there are any"
                );
            }
        }
    }
}

#[test]
fn the_demo_model_gives_the_numbers_of_its_own_training_program() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR"));
    for chunk in [None, Some(1), Some(7), Some(64)] {
        let report = verify::run(&VerifyArgs {
            model: folder.join("demo"),
            reference: fixture("demo").join("golden.safetensors"),
            chunk,
            ..args("demo")
        })
        .unwrap();
        assert!(report.passed(), "in pieces of {chunk:?}:\n{report}");
        assert!(report.cases.iter().any(|case| case.drafts.is_some()));
    }
}

/// Bounds on the mean KL for weights that are rounded, over all fixtures: twice what was measured.
#[test]
fn rounded_weights_stay_near_the_golden_predictions() {
    for (quant, bound) in [
        (Format::F32, 1e-8),
        (Format::F16, 2e-5),
        (Format::Bf16, 1.5e-3),
        (Format::Q8_0, 1.3e-2),
    ] {
        for name in FIXTURES {
            let report = verify::run(&VerifyArgs {
                quant: Some(quant),
                max_kl: Some(bound),
                ..args(name)
            })
            .unwrap();
            assert!(report.passed(), "{name} in {quant}:\n{report}");
        }
    }
}

#[test]
fn a_wrong_number_fails_and_names_the_layer() {
    let folder = tempfile::tempdir().unwrap();
    let reference = folder.path().join("golden.safetensors");
    let mut golden = golden("qwen3_5_text");
    let hidden = golden.get_mut("len65/hidden/3").unwrap();
    *hidden = (&*hidden + 0.01).unwrap();
    safetensors::save(&golden, &reference).unwrap();
    let args = VerifyArgs {
        reference,
        ..args("qwen3_5_text")
    };
    let report = verify::run(&args).unwrap();
    assert!(!report.passed());
    assert!(
        report
            .to_string()
            .contains("hidden states part first at layer 3"),
        "{report}"
    );
}

#[test]
fn alone_and_in_a_batch_are_equal_in_any_order() {
    for name in FIXTURES {
        let model = model::load(&fixture(name), &LoadOptions::cpu(), &|_| {}).unwrap();
        let golden = golden(name);
        for order in [[1, 7, 63, 65], [65, 63, 7, 1], [7, 65, 1, 63]] {
            let mut states: Vec<_> = order.iter().map(|_| model.new_state()).collect();
            // the first half of every prompt in one step, then the second half together with single tokens of others
            let halves = |part: usize| {
                let mut batch = Batch::default();
                for (state, length) in order.iter().enumerate() {
                    let ids = prompt(&golden, *length);
                    let (first, second) = ids.split_at(ids.len() / 2);
                    let ids = [first, second][part];
                    if !ids.is_empty() {
                        let logits = if part == 1 {
                            LogitRows::Last
                        } else {
                            LogitRows::None
                        };
                        batch.push(state, ids, logits);
                    }
                }
                batch
            };
            model
                .forward(&halves(0), &mut states.iter_mut().collect::<Vec<_>>())
                .unwrap();
            let logits = model
                .forward(&halves(1), &mut states.iter_mut().collect::<Vec<_>>())
                .unwrap();
            for (row, length) in order.iter().enumerate() {
                let diff = max_diff(
                    &logits.get(row).unwrap(),
                    &golden[&format!("len{length}/last_logits")],
                );
                assert!(
                    diff <= TOLERANCE,
                    "{name}, prompt of {length} in {order:?}: {diff}"
                );
            }
        }
    }
}

#[test]
fn one_rank_and_many_are_equal() {
    // (fixture, ranks): heads divide, or are copied where there are fewer than ranks
    let worlds = [
        ("qwen3_5_text", &[2, 4][..]),
        ("qwen3_5_vl_tied", &[2]),
        ("qwen3_5_moe_vl", &[2]),
        ("qwen3_next_moe", &[2, 4]),
        ("qwen3_next_dense", &[2]),
    ];
    for (name, sizes) in worlds {
        for &world_size in sizes {
            for logits in logits_of_ranks(name, world_size) {
                let diff = max_diff(&logits, &golden(name)["len65/logits"]);
                assert!(
                    diff <= TOLERANCE,
                    "{name}: {world_size} ranks differ from the golden logits by {diff}"
                );
            }
        }
    }
}

/// The logits that every rank has of the prompt of 65 tokens, run in two pieces.
fn logits_of_ranks(name: &str, world_size: usize) -> Vec<Tensor> {
    let ids = prompt(&golden(name), 65);
    std::thread::scope(|scope| {
        let ranks: Vec<_> = Threads::group(world_size)
            .into_iter()
            .map(|rank| {
                let ids = &ids;
                scope.spawn(move || {
                    let rank: Arc<dyn Communicator> = Arc::new(rank);
                    let folder = fixture(name);
                    let model =
                        model::load_rank(&folder, &LoadOptions::cpu(), rank, &|_| {}).unwrap();
                    let mut state = model.new_state();
                    let batch = |ids| Batch::single(ids, LogitRows::All);
                    let first = model
                        .forward(&batch(&ids[..40]), &mut [&mut state])
                        .unwrap();
                    let second = model
                        .forward(&batch(&ids[40..]), &mut [&mut state])
                        .unwrap();
                    Tensor::cat(&[first, second], 0).unwrap()
                })
            })
            .collect();
        ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
    })
}

/// A copy of the text fixture that may be broken.
fn copy() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for file in ["config.json", "model.safetensors"] {
        fs::copy(fixture("qwen3_5_text").join(file), folder.path().join(file)).unwrap();
    }
    folder
}

fn refusal(folder: &Path) -> (LoadError, String) {
    let error = model::load(folder, &LoadOptions::cpu(), &|_| {})
        .map(|_| ())
        .unwrap_err();
    let text = error.to_string();
    assert!(!text.contains('\n'), "one line: {text}");
    (error, text)
}

#[test]
fn a_broken_folder_is_refused_by_file_and_tensor() {
    let folder = copy();
    let path = folder.path().join("model.safetensors");
    let mut tensors = safetensors::load(&path, &Device::Cpu).unwrap();
    tensors.remove("model.layers.1.mlp.up_proj.weight");
    let norm = Tensor::zeros(3, candle_core::DType::F32, &Device::Cpu).unwrap();
    tensors.insert("model.norm.weight".into(), norm);
    safetensors::save(&tensors, &path).unwrap();
    let (error, text) = refusal(folder.path());
    assert!(
        matches!(error, LoadError::Tensors { ref faults, .. } if faults.len() == 2),
        "both at once: {text}"
    );
    assert!(
        text.contains("model.layers.1.mlp.up_proj.weight [80, 64] is missing"),
        "{text}"
    );
    assert!(
        text.contains("model.norm.weight in model.safetensors has shape [3], needed is [64]"),
        "{text}"
    );

    let folder = copy();
    let path = folder.path().join("model.safetensors");
    let bytes = fs::read(&path).unwrap();
    for length in [0, 4, 100, bytes.len() / 2, bytes.len() - 1] {
        fs::write(&path, &bytes[..length]).unwrap();
        let (error, text) = refusal(folder.path());
        let io = length == 0 && matches!(error, LoadError::Io { .. });
        assert!(
            io || matches!(error, LoadError::Weights { .. }),
            "cut at {length}: {text}"
        );
        assert!(text.contains("model.safetensors"), "{text}");
    }

    let folder = copy();
    let path = folder.path().join("config.json");
    let config = fs::read_to_string(&path).unwrap();
    for (from, to, said) in [
        (
            "qwen3_5_text",
            "llama",
            "model_type \"llama\" is not supported; supported are qwen3_5, qwen3_5_text",
        ),
        ("\"rope_theta\": 10000000,", "", "rope_theta is missing"),
        (
            "\"rope_type\": \"default\"",
            "\"rope_type\": \"yarn\"",
            "\"yarn\" is not built",
        ),
        (
            "\"attention_bias\": false",
            "\"attention_bias\": true",
            "attention_bias",
        ),
        ("\"silu\"", "\"gelu\"", "hidden_act"),
        ("\"hidden_size\": 64,", "", "missing field `hidden_size`"),
    ] {
        fs::write(&path, config.replace(from, to)).unwrap();
        let (_, text) = refusal(folder.path());
        assert!(
            text.contains(said) && text.contains(folder.path().to_str().unwrap()),
            "{text}"
        );
    }
}
