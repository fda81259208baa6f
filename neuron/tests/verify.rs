//! The model against the golden numbers: whole, in pieces, token by token, alone, in a batch, on one rank and on many.

#![allow(missing_docs, clippy::unwrap_used)]

use candle_core::{Device, Tensor, safetensors};
use neuron::model::{self, Batch, CausalLm, LoadError, LoadOptions, LogitRows};
use neuron::parallel;
use neuron::quant::Format;
use neuron::verify::{self, VerifyArgs};
use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

const FIXTURES: [&str; 5] = [
    "qwen3_5_text",
    "qwen3_5_vl_tied",
    "qwen3_5_moe_vl",
    "qwen3_next_moe",
    "qwen3_next_dense",
];
const TOLERANCE: f32 = 3e-4;
/// Ranks that each fixture can be shared among: heads divide, or keys are copied where they are fewer than ranks.
const WORLDS: [(&str, &[usize]); 5] = [
    ("qwen3_5_text", &[2, 4]),
    ("qwen3_5_vl_tied", &[2]),
    ("qwen3_5_moe_vl", &[2]),
    ("qwen3_next_moe", &[2, 4]),
    ("qwen3_next_dense", &[2]),
];

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
        world_size: 1,
        device: "cpu".into(),
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
        // most rows of the fixtures are no whole number of blocks, and are held in 8 bits
        (Format::Q6K, 1.3e-2),
        (Format::Q5K, 3.3e-2),
        (Format::Q4K, 1.2e-1),
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
        let folder = Path::new(env!("CARGO_MANIFEST_DIR"));
        let report = verify::run(&VerifyArgs {
            model: folder.join("demo"),
            reference: fixture("demo").join("golden.safetensors"),
            quant: Some(quant),
            max_kl: Some(bound),
            ..args("demo")
        })
        .unwrap();
        assert!(report.passed(), "the demo model in {quant}:\n{report}");
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

/// Every fixture, on one rank and on each number of them that it can be shared among.
fn models() -> impl Iterator<Item = (&'static str, usize, Box<dyn CausalLm>)> {
    let worlds = WORLDS.into_iter();
    let worlds = worlds.flat_map(|(name, sizes)| {
        let sizes = std::iter::once(&1).chain(sizes);
        sizes.map(move |ranks| (name, *ranks))
    });
    worlds.map(|(name, ranks)| {
        let model = parallel::load(&fixture(name), &LoadOptions::cpu(), ranks, &|_| {});
        (name, ranks, model.unwrap())
    })
}

#[test]
fn alone_and_in_a_batch_are_equal_in_any_order() {
    for (name, ranks, model) in models() {
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
                    "{name} on {ranks}, prompt of {length} in {order:?}: {diff}"
                );
            }
        }
    }
}

#[test]
fn every_golden_number_is_met_by_any_number_of_ranks() {
    for (name, sizes) in WORLDS {
        for &world_size in sizes {
            for chunk in [None, Some(1), Some(5), Some(64)] {
                let args = VerifyArgs {
                    chunk,
                    world_size,
                    ..args(name)
                };
                let report = verify::run(&args).unwrap();
                let what = format!("{name} on {world_size} ranks in pieces of {chunk:?}");
                assert!(report.passed(), "{what}:\n{report}");
                assert_eq!(report.cases.len(), 7, "{what}");
                for case in &report.cases {
                    assert!(case.greedy.is_none_or(|greedy| greedy.is_ok()), "{what}");
                    if case.tokens == 65 {
                        assert!(case.hidden.is_some() && case.state.is_some(), "{what}");
                    }
                    assert_eq!(
                        case.drafts.is_some(),
                        name.contains("_vl") && [7, 65].contains(&case.tokens),
                        "{what}"
                    );
                }
            }
        }
    }
}

#[test]
fn rounded_weights_of_ranks_stay_within_the_bounds_of_one() {
    for (quant, bound) in [(Format::Q8_0, 1.3e-2), (Format::Q4K, 1.2e-1)] {
        for (name, sizes) in WORLDS {
            for &world_size in sizes {
                let report = verify::run(&VerifyArgs {
                    quant: Some(quant),
                    max_kl: Some(bound),
                    world_size,
                    ..args(name)
                })
                .unwrap();
                let what = format!("{name} in {quant} on {world_size} ranks");
                assert!(report.passed(), "{what}:\n{report}");
            }
        }
    }
}

/// Three ranks divide the heads of no fixture: a checkpoint with half as many heads again, and other numbers.
#[test]
fn three_ranks_and_six_are_equal_to_one() {
    let folder = tempfile::tempdir().unwrap();
    let from = fixture("qwen3_5_text");
    let mut config: serde_json::Value =
        serde_json::from_slice(&fs::read(from.join("config.json")).unwrap()).unwrap();
    for key in [
        "num_attention_heads",
        "num_key_value_heads",
        "linear_num_key_heads",
        "linear_num_value_heads",
        "intermediate_size",
    ] {
        config[key] = (config[key].as_u64().unwrap() * 3 / 2).into();
    }
    fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
    let tensors = safetensors::load(from.join("model.safetensors"), &Device::Cpu).unwrap();
    let wider = tensors.iter().map(|(name, tensor)| {
        let mut shape = tensor.dims().to_vec();
        let has = |modules: &[&str]| modules.iter().any(|module| name.contains(module));
        if has(&["o_proj", "out_proj", "down_proj"]) {
            shape[1] = shape[1] * 3 / 2;
        } else if has(&["_proj", "conv1d", "A_log", "dt_bias"]) {
            shape[0] = shape[0] * 3 / 2;
        }
        let seed = name.bytes().map(f32::from).sum::<f32>();
        let count = shape.iter().product::<usize>();
        let numbers = (0..count).map(|at| 0.2 * (at as f32 * 12.9898 + seed).sin());
        let numbers = Tensor::from_iter(numbers, &Device::Cpu).unwrap();
        (name.clone(), numbers.reshape(shape).unwrap())
    });
    let wider: HashMap<String, Tensor> = wider.collect();
    safetensors::save(&wider, folder.path().join("model.safetensors")).unwrap();
    let ids = prompt(&golden("qwen3_5_text"), 65);
    let logits = |ranks| {
        let model = parallel::load(folder.path(), &LoadOptions::cpu(), ranks, &|_| {}).unwrap();
        let mut state = model.new_state();
        let pieces = [&ids[..40], &ids[40..41], &ids[41..]];
        let logits = pieces.map(|ids| {
            let batch = Batch::single(ids, LogitRows::All);
            model.forward(&batch, &mut [&mut state]).unwrap()
        });
        Tensor::cat(&logits, 0).unwrap()
    };
    let one = logits(1);
    assert!(
        max_diff(&one, &one.zeros_like().unwrap()) > 0.1,
        "they are numbers"
    );
    for ranks in [3, 6] {
        let diff = max_diff(&one, &logits(ranks));
        assert!(diff <= TOLERANCE, "{ranks} ranks differ by {diff}");
    }
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

#[test]
fn rows_that_are_taken_back_leave_no_trace() {
    for (name, ranks, model) in models() {
        let ids = prompt(&golden(name), 65);
        let forward = |batch: &Batch, state: &mut _| model.forward(batch, &mut [state]).unwrap();
        for start in [1, 15, 16, 40] {
            for (rows, kept) in [(2, 1), (4, 1), (4, 3), (4, 4)] {
                let mut straight = model.new_state();
                forward(
                    &Batch::single(&ids[..start + kept], LogitRows::None),
                    &mut straight,
                );
                let mut back = model.new_state();
                forward(&Batch::single(&ids[..start], LogitRows::None), &mut back);
                let mut batch = Batch::default();
                let wrong = [&ids[start..start + kept], &[3, 4, 5][..rows - kept]].concat();
                batch.push_revocable(0, &wrong);
                forward(&batch, &mut back);
                back.keep_rows(kept, rows);
                let rest = Batch::single(&ids[start + kept..], LogitRows::All);
                let diff = max_diff(&forward(&rest, &mut straight), &forward(&rest, &mut back));
                assert!(
                    diff <= TOLERANCE,
                    "{name} on {ranks}: {kept} of {rows} from {start}: {diff}"
                );
            }
        }
    }
}
