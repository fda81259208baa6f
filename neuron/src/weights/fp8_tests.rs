//! Checkpoints whose matrices have 8 bits a number and scales of blocks, as some releases have them.

use super::Fault;
use super::checkpoint::{FP8_BLOCK, e4m3, scales_of};
use crate::gpu::emulated::emulated_gpu;
use crate::kernels::rows::Place;
use crate::model::{self, Batch, LoadError, LoadOptions, LogitRows};
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use std::fs;
use std::path::{Path, PathBuf};

fn fixture() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/models/qwen3_5_text")
}

/// A tensor to be written.
struct Written {
    name: String,
    dtype: Dtype,
    shape: Vec<usize>,
    bytes: Vec<u8>,
}

fn f32_tensor(name: &str, shape: &[usize], numbers: &[f32]) -> Written {
    Written {
        name: name.into(),
        dtype: Dtype::F32,
        shape: shape.to_vec(),
        bytes: bytemuck::cast_slice(numbers).to_vec(),
    }
}

/// The nearest of all 8-bit numbers.
fn encode(x: f32) -> u8 {
    let finite = (0..=255u8).filter(|byte| e4m3(*byte).is_finite());
    let near = |byte: &u8| (e4m3(*byte) - x).abs();
    finite.min_by(|a, b| near(a).total_cmp(&near(b))).unwrap()
}

/// A matrix in 8 bits with its scales, and its numbers then.
fn rounded(name: &str, shape: &[usize], numbers: &[f32]) -> (Vec<Written>, Vec<f32>) {
    let (rows, width) = (shape[0], shape[1]);
    let across = width.div_ceil(FP8_BLOCK);
    let block = |at: usize| at / width / FP8_BLOCK * across + at % width / FP8_BLOCK;
    let mut scales = vec![0f32; rows.div_ceil(FP8_BLOCK) * across];
    for (at, x) in numbers.iter().enumerate() {
        scales[block(at)] = scales[block(at)].max(x.abs() / 448.0);
    }
    let pairs = || numbers.iter().enumerate();
    let bytes: Vec<u8> = pairs()
        .map(|(at, x)| encode(x / scales[block(at)]))
        .collect();
    let numbers = bytes.iter().enumerate();
    let numbers = numbers
        .map(|(at, byte)| e4m3(*byte) * scales[block(at)])
        .collect();
    let scales_shape = [rows.div_ceil(FP8_BLOCK), across];
    let written = vec![
        Written {
            name: name.into(),
            dtype: Dtype::F8_E4M3,
            shape: shape.to_vec(),
            bytes,
        },
        f32_tensor(&scales_of(name), &scales_shape, &scales),
    ];
    (written, numbers)
}

fn write(folder: &Path, tensors: &[Written]) {
    fs::copy(fixture().join("config.json"), folder.join("config.json")).unwrap();
    let views = tensors.iter().map(|one| {
        let view = TensorView::new(one.dtype, one.shape.clone(), &one.bytes).unwrap();
        (one.name.clone(), view)
    });
    safetensors::serialize_to_file(views, None, &folder.join("model.safetensors")).unwrap();
}

/// The fixture with the matrices of its projections in 8 bits, and the same numbers in f32.
fn checkpoints() -> [tempfile::TempDir; 2] {
    let file = fs::read(fixture().join("model.safetensors")).unwrap();
    let stored = SafeTensors::deserialize(&file).unwrap();
    let (mut small, mut wide) = (Vec::new(), Vec::new());
    for (name, view) in stored.iter() {
        let numbers: Vec<f32> = match view.dtype() {
            Dtype::F32 => bytemuck::pod_collect_to_vec(view.data()),
            Dtype::BF16 => {
                let numbers: Vec<half::bf16> = bytemuck::pod_collect_to_vec(view.data());
                numbers.into_iter().map(half::bf16::to_f32).collect()
            }
            other => panic!("{name} is {other:?}"),
        };
        let shape = view.shape();
        let projection = shape.len() == 2 && name.contains("_proj") && !name.contains("_proj_");
        if projection || name.contains("in_proj_qkv") {
            let (written, numbers) = rounded(name, shape, &numbers);
            small.extend(written);
            wide.push(f32_tensor(name, shape, &numbers));
        } else {
            small.push(f32_tensor(name, shape, &numbers));
            wide.push(f32_tensor(name, shape, &numbers));
        }
    }
    [small, wide].map(|tensors| {
        let folder = tempfile::tempdir().unwrap();
        write(folder.path(), &tensors);
        folder
    })
}

fn logits(folder: &Path, place: Place) -> (Vec<f32>, u64) {
    let options = LoadOptions {
        places: vec![place],
        ..LoadOptions::cpu()
    };
    let model = model::load(folder, &options, &|_| {}).unwrap();
    let ids: Vec<u32> = (3..15).collect();
    let batch = Batch::single(&ids, LogitRows::All);
    let logits = model
        .forward(&batch, &mut [&mut model.new_state()])
        .unwrap();
    let logits = logits.flatten_all().unwrap().to_vec1().unwrap();
    (logits, model.weight_bytes())
}

fn apart(a: &[f32], b: &[f32]) -> f32 {
    let pairs = a.iter().zip(b);
    pairs.map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

#[test]
fn eight_bits_with_scales_are_read_on_the_cpu_and_multiplied_as_they_are_on_a_device() {
    let [small, wide] = checkpoints();
    let (exact, wide_bytes) = logits(wide.path(), Place::Cpu);
    let largest = exact.iter().fold(0f32, |top, x| top.max(x.abs()));
    let (on_cpu, _) = logits(small.path(), Place::Cpu);
    let found = apart(&on_cpu, &exact);
    assert!(
        found > 0.0 && found < 0.03 * largest,
        "{found} of {largest}"
    ); // in bf16
    let Some(gpu) = emulated_gpu() else { return };
    let (on_device, bytes) = logits(small.path(), Place::Gpu(gpu));
    let found = apart(&on_device, &exact);
    // keys and values are exact too, as the embedding is in f32
    assert!(found < 2e-4 * largest, "{found} of {largest}");
    assert!(bytes < wide_bytes, "{bytes} of {wide_bytes}");
}

#[test]
fn scales_that_are_missing_are_named() {
    let [small, _] = checkpoints();
    let file = fs::read(small.path().join("model.safetensors")).unwrap();
    let stored = SafeTensors::deserialize(&file).unwrap();
    let missing = "model.layers.0.mlp.up_proj.weight_scale_inv";
    let kept: Vec<Written> = stored
        .iter()
        .filter(|(name, _)| *name != missing)
        .map(|(name, view)| Written {
            name: name.into(),
            dtype: view.dtype(),
            shape: view.shape().to_vec(),
            bytes: view.data().to_vec(),
        })
        .collect();
    assert!(kept.len() < stored.len(), "it was there");
    let folder = tempfile::tempdir().unwrap();
    write(folder.path(), &kept);
    let error = model::load(folder.path(), &LoadOptions::cpu(), &|_| {}).err();
    let Some(LoadError::Tensors { faults, .. }) = &error else {
        panic!("{error:?}");
    };
    assert!(
        matches!(&faults[..], [Fault::Missing { name, .. }] if name == missing),
        "{faults:?}"
    );
}
