//! The forms that the same model comes in: safetensors and GGUF, and every number format.

#![allow(missing_docs, clippy::unwrap_used)]

mod gguf_writer;

use candle_core::quantized::GgmlDType;
use candle_core::{Device, Tensor, safetensors};
use neuron::model::{self, Batch, LoadError, LoadOptions, LogitRows};
use neuron::parallel;
use neuron::quant::Format;
use neuron::residency::folder::{FolderError, ModelText};
use neuron::residency::preflight;
use neuron::verify::{self, Predictions, VerifyArgs};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use serde_json::json;
use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../tests/fixtures/models")
        .join(name)
}

fn demo() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("demo")
}

/// A model of random numbers whose rows are all whole blocks of 256, with two value heads to a key head.
fn wide() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let (hidden, width, vocab) = (256, 512, 512);
    let config = json!({
        "model_type": "qwen3_5_text", "vocab_size": vocab, "hidden_size": hidden, "intermediate_size": width,
        "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64,
        "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 64, "linear_value_head_dim": 64,
        "max_position_embeddings": 1024, "rms_norm_eps": 1e-6, "tie_word_embeddings": false,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000000, "partial_rotary_factor": 0.25},
    });
    fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
    let mut random = StdRng::seed_from_u64(5);
    let mut tensors = HashMap::new();
    let mut put = |name: &str, shape: &[usize], size: f64| {
        let count = shape.iter().product();
        // the sum of three is round enough, and has the tails that weights have
        let mut one = || (0..3).map(|_| random.random_range(-1.0..1.0)).sum::<f64>() * size;
        let numbers: Vec<f32> = (0..count).map(|_| one() as f32).collect();
        tensors.insert(
            name.to_owned(),
            Tensor::from_vec(numbers, shape, &Device::Cpu).unwrap(),
        );
    };
    let matrix = |width: usize| 1.2 / (width as f64).sqrt();
    put("model.embed_tokens.weight", &[vocab, hidden], 1.0);
    put("lm_head.weight", &[vocab, hidden], 1.6 * matrix(hidden));
    put("model.norm.weight", &[hidden], 0.1);
    for layer in 0..4 {
        let mut put = |name: &str, shape: &[usize], size: f64| {
            put(&format!("model.layers.{layer}.{name}"), shape, size);
        };
        put("input_layernorm.weight", &[hidden], 0.1);
        put("post_attention_layernorm.weight", &[hidden], 0.1);
        put("mlp.gate_proj.weight", &[width, hidden], matrix(hidden));
        put("mlp.up_proj.weight", &[width, hidden], matrix(hidden));
        put("mlp.down_proj.weight", &[hidden, width], matrix(width));
        if layer == 3 {
            put("self_attn.q_proj.weight", &[512, hidden], matrix(hidden));
            put("self_attn.k_proj.weight", &[128, hidden], matrix(hidden));
            put("self_attn.v_proj.weight", &[128, hidden], matrix(hidden));
            put("self_attn.o_proj.weight", &[hidden, 256], matrix(256));
            put("self_attn.q_norm.weight", &[64], 0.1);
            put("self_attn.k_norm.weight", &[64], 0.1);
        } else {
            put(
                "linear_attn.in_proj_qkv.weight",
                &[512, hidden],
                matrix(hidden),
            );
            put(
                "linear_attn.in_proj_z.weight",
                &[256, hidden],
                matrix(hidden),
            );
            put("linear_attn.in_proj_b.weight", &[4, hidden], matrix(hidden));
            put("linear_attn.in_proj_a.weight", &[4, hidden], matrix(hidden));
            put("linear_attn.conv1d.weight", &[512, 1, 4], 0.4);
            put("linear_attn.A_log", &[4], 0.7);
            put("linear_attn.dt_bias", &[4], 0.7);
            put("linear_attn.norm.weight", &[64], 0.6);
            put("linear_attn.out_proj.weight", &[hidden, 256], matrix(256));
        }
    }
    safetensors::save(&tensors, folder.path().join("model.safetensors")).unwrap();
    folder
}

/// Logits of a fixed prompt.
fn logits(place: &Path, quant: Option<Format>) -> Vec<Vec<f32>> {
    logits_of(1, place, quant)
}

fn logits_of(ranks: usize, place: &Path, quant: Option<Format>) -> Vec<Vec<f32>> {
    let options = LoadOptions {
        quant,
        ..LoadOptions::cpu()
    };
    let model = parallel::load(place, &options, ranks, &|_| {}).unwrap();
    let mut random = StdRng::seed_from_u64(9);
    let ids: Vec<u32> = (0..130).map(|_| random.random_range(0..512)).collect();
    let mut state = model.new_state();
    // a few rows at a time, as weights are streamed then
    let pieces = ids.chunks(10).flat_map(|ids| {
        let batch = Batch::single(ids, LogitRows::All);
        let rows = model.forward(&batch, &mut [&mut state]).unwrap();
        rows.to_vec2::<f32>().unwrap()
    });
    pieces.collect()
}

fn divergence(found: &[Vec<f32>], golden: &[Vec<f32>]) -> Predictions {
    let mut all = Predictions::default();
    for (found, golden) in found.iter().zip(golden) {
        all.add(found, golden);
    }
    all
}

/// A file made of the model in `folder`.
fn converted(folder: &Path, kind: GgmlDType) -> (tempfile::TempDir, PathBuf) {
    let place = tempfile::tempdir().unwrap();
    let file = place.path().join("model.gguf");
    gguf_writer::convert(folder, kind, &file);
    (place, file)
}

/// Bounds on the mean KL where every row is whole blocks: twice what was measured.
#[test]
fn every_format_stays_near_f32_where_every_row_is_whole_blocks() {
    let folder = wide();
    let golden = logits(folder.path(), None);
    for (format, bound) in [
        (Format::F16, 4e-6),
        (Format::Bf16, 2.3e-4),
        (Format::Q8_0, 4.5e-3),
        (Format::Q6K, 2.7e-2),
        (Format::Q5K, 6e-2),
        (Format::Q4K, 1.9e-1),
    ] {
        let found = divergence(&logits(folder.path(), Some(format)), &golden);
        assert!(found.mean_kl() < bound, "{format}: {found:?}");
    }
}

#[test]
fn a_gguf_file_gives_the_golden_numbers_of_the_checkpoint_it_was_made_of() {
    for name in [
        "qwen3_5_text",
        "qwen3_5_vl_tied",
        "qwen3_5_moe_vl",
        "qwen3_next_moe",
        "qwen3_next_dense",
    ] {
        let (_place, file) = converted(&fixture(name), GgmlDType::F32);
        for world_size in [1, 2] {
            let report = verify::run(&VerifyArgs {
                device: "cpu".into(),
                model: file.clone(),
                reference: fixture(name).join("golden.safetensors"),
                chunk: Some(65),
                tolerance: 3e-4,
                quant: None,
                world_size,
                max_kl: None,
            })
            .unwrap();
            assert!(report.passed(), "{name} on {world_size} ranks:\n{report}");
            let drafts = report.cases.iter().any(|case| case.drafts.is_some());
            assert_eq!(
                drafts,
                name.contains("_vl"),
                "{name}: drafts are in the file"
            );
        }
    }
}

#[test]
fn blocks_of_a_gguf_file_are_held_as_they_are() {
    let folder = wide();
    let golden = logits(folder.path(), None);
    for (kind, bound) in [
        (GgmlDType::BF16, 2.3e-4),
        (GgmlDType::Q8_0, 4.5e-3),
        (GgmlDType::Q6K, 3.3e-2),
        (GgmlDType::Q5K, 1.2e-1),
        (GgmlDType::Q4K, 4.1e-1),
    ] {
        let (_place, file) = converted(folder.path(), kind);
        let found = divergence(&logits(&file, None), &golden);
        assert!(found.mean_kl() < bound, "{kind:?}: {found:?}");
        // a rank has whole blocks of the files' rows, or what is nearest to a part of one
        let shared = divergence(&logits_of(2, &file, None), &golden);
        assert!(
            shared.mean_kl() < bound,
            "{kind:?} on two ranks: {shared:?}"
        );
        // the same numbers widened: nothing but the kernels' rounding of x is between them
        let widened = divergence(&logits(&file, Some(Format::F32)), &golden);
        assert!(widened.mean_kl() < bound, "{kind:?}: {widened:?}");
    }
}

#[test]
fn tokenizer_and_template_of_a_gguf_file_are_those_of_the_folder() {
    for folder in [fixture("qwen3_5_text"), demo()] {
        let (_place, file) = converted(&folder, GgmlDType::BF16);
        let mut options = LoadOptions::cpu();
        let whole = preflight::weigh(&file, &options, 1).unwrap();
        preflight::check_weights(&file, whole[0], Some(1 << 30)).unwrap();
        assert_eq!(preflight::weigh(&file, &options, 2).unwrap().len(), 2);
        options.quant = Some(Format::Q8_0);
        let rounded = preflight::weigh(&file, &options, 1).unwrap();
        assert!(rounded[0] < whole[0]);
        preflight::check_weights(&file, rounded[0], Some(1000)).unwrap_err();
        let (wanted, found) = (
            ModelText::load(&folder).unwrap(),
            ModelText::load(&file).unwrap(),
        );
        assert_eq!(found.eos, wanted.eos);
        assert_eq!(found.tokenizer.vocab_size(), wanted.tokenizer.vocab_size());
        let texts = [
            "Hello, world! It's 12345 o'clock.\n\n  Two  spaces\tand tabs\r\n",
            "日本語 🦀 ñandú e\u{301} क्षि <|im_start|>user\nhi<|im_end|> <think>x</think><tool_call>",
            "",
        ];
        for text in texts {
            let ids = wanted.tokenizer.encode(text).unwrap();
            assert_eq!(found.tokenizer.encode(text).unwrap(), ids, "{text:?}");
            assert_eq!(found.tokenizer.spell(&ids), wanted.tokenizer.spell(&ids));
        }
    }
}

/// Changes a byte or a number of `header`, or all of them: to what is next to it, or to anything.
fn changed(header: &[u8], random: &mut StdRng) -> Vec<u8> {
    let mut bytes = header.to_vec();
    for _ in 0..random.random_range(1..4) {
        let at = random.random_range(0..bytes.len() - 8);
        match random.random_range(0..4) {
            0 => bytes[at] = random.random(),
            1 => bytes[at] = bytes[at].wrapping_add(1),
            2 => bytes[at..at + 8].fill(0xff),
            // a digit of a number in JSON
            _ => {
                let digit = bytes[at..].iter().position(u8::is_ascii_digit);
                bytes[at + digit.unwrap_or(0)] = b'0' + random.random_range(0..10u8);
            }
        }
    }
    bytes
}

#[test]
fn any_change_of_a_header_is_read_or_refused() {
    let source = fixture("qwen3_next_moe");
    let (_place, file) = converted(&source, GgmlDType::F32);
    let gguf = fs::read(&file).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let safetensors = folder.path().join("model.safetensors");
    fs::copy(
        source.join("config.json"),
        folder.path().join("config.json"),
    )
    .unwrap();
    let plain = fs::read(source.join("model.safetensors")).unwrap();
    let length = u64::from_le_bytes(plain[..8].try_into().unwrap()) as usize + 8;
    let load = |place: &Path| {
        model::load(place, &LoadOptions::cpu(), &|_| {})
            .err()
            .map(|error| error.to_string())
    };
    for seed in 0..150 {
        let mut random = StdRng::seed_from_u64(seed);
        let bytes = [&changed(&gguf[..8192], &mut random), &gguf[8192..]].concat();
        fs::write(&file, bytes).unwrap();
        let bytes = [&changed(&plain[..length], &mut random), &plain[length..]].concat();
        fs::write(&safetensors, bytes).unwrap();
        for place in [&file, folder.path()] {
            let loaded = std::panic::catch_unwind(|| load(place));
            let refused = loaded.unwrap_or_else(|_| panic!("seed {seed}: {}", place.display()));
            assert!(refused.is_none_or(|why| !why.is_empty()), "seed {seed}");
        }
        let text = std::panic::catch_unwind(|| ModelText::load(&file).is_ok());
        assert!(text.is_ok(), "seed {seed}");
    }
}

#[test]
fn sizes_that_no_model_has_are_refused_by_name() {
    let text = fs::read_to_string(fixture("qwen3_next_moe").join("config.json")).unwrap();
    let folder = tempfile::tempdir().unwrap();
    for key in [
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "head_dim",
        "num_attention_heads",
        "linear_num_value_heads",
        "linear_conv_kernel_dim",
        "num_experts",
        "max_position_embeddings",
    ] {
        let mut config: serde_json::Value = serde_json::from_str(&text).unwrap();
        config[key] = (1u64 << 40).into();
        fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
        let loaded = model::load(folder.path(), &LoadOptions::cpu(), &|_| {});
        let error = loaded.map(|_| ()).unwrap_err().to_string();
        assert!(error.contains(key) && error.contains("at most"), "{error}");
    }
}

#[test]
fn a_gguf_file_that_cannot_be_used_is_refused_by_name() {
    let (_place, file) = converted(&fixture("qwen3_5_text"), GgmlDType::F32);
    let bytes = fs::read(&file).unwrap();
    let refusal = || match model::load(&file, &LoadOptions::cpu(), &|_| {}) {
        Ok(_) => panic!("loaded"),
        Err(error) => (error.to_string(), error),
    };
    for length in [1, 7, 30, 400, 20_000, bytes.len() / 2, bytes.len() - 1] {
        fs::write(&file, &bytes[..length]).unwrap();
        let (text, error) = refusal();
        assert!(
            matches!(error, LoadError::Weights { .. }),
            "cut at {length}: {text}"
        );
        assert!(
            text.contains("model.gguf") && !text.contains('\n'),
            "{text}"
        );
    }
    // names of one length, so that nothing else moves
    for (from, to, said) in [
        ("qwen35", "llama9", "model_type \"llama9\" is not supported"),
        (
            "qwen35.embedding_length",
            "qwen35.embedding_lengtX",
            "`qwen35.embedding_length` is missing",
        ),
        (
            "blk.1.ffn_up.weight",
            "blk.1.ffn_uq.weight",
            "model.layers.1.mlp.up_proj.weight [80, 64] is missing",
        ),
    ] {
        let at = bytes
            .windows(from.len())
            .position(|window| window == from.as_bytes())
            .unwrap();
        let mut changed = bytes.clone();
        changed[at..at + from.len()].copy_from_slice(to.as_bytes());
        fs::write(&file, changed).unwrap();
        let (text, _) = refusal();
        assert!(text.contains(said), "{text}");
    }
    let (_place, file) = converted(&fixture("qwen3_5_text"), GgmlDType::Q4_0);
    let error = model::load(&file, &LoadOptions::cpu(), &|_| {})
        .map(|_| ())
        .unwrap_err();
    assert!(
        error.to_string().contains("ggml's type 2; read are"),
        "{error}"
    );
    let (_place, file) = converted(wide().path(), GgmlDType::F32);
    let error = ModelText::load(&file).unwrap_err();
    assert!(
        matches!(
            error,
            FolderError::Value {
                key: "tokenizer.ggml.model",
                ..
            }
        ),
        "{error}"
    );
}
