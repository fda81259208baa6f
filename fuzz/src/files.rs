//! A file of weights on disk, as an input stands for it.

use neuron::parallel::Solo;
use neuron::weights::{GroupedHeads, Weights};
use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::sync::Arc;

/// Writes `input` but for its first byte, which says how many bytes without anything written on them come after it: so
/// much a header can speak of.
pub fn write(input: &[u8], path: &Path) {
    let (tail, head) = input.split_first().unwrap_or((&0, &[]));
    let mut file = File::create(path).expect("a file");
    file.write_all(head).expect("room for it");
    let length = head.len() as u64 + (u64::from(*tail) << 16);
    file.set_len(length).expect("room for it");
}

/// Reads what a checkpoint at `place` says of itself, and some of its tensors.
pub fn read(place: &Path) {
    for heads in [(2, 4), (4, 4), (16, 32)].map(|(key, value)| GroupedHeads {
        key,
        value,
        key_dim: 16,
        value_dim: 16,
    }) {
        let device = candle_core::Device::Cpu;
        let Ok(weights) = Weights::open(place, heads, &device, None, Arc::new(Solo), &|_| {})
        else {
            continue;
        };
        let layers = weights.pp("model").pp("layers").pp(0);
        let _ = weights
            .replicated("model.embed_tokens.weight", &[512, 64])
            .matrix();
        let _ = weights.replicated("model.norm.weight", &[64]).tensor();
        let _ = layers.replicated("linear_attn.A_log", &[4]).tensor();
        let _ = layers
            .replicated("linear_attn.conv1d.weight", &[128, 1, 4])
            .tensor();
        let _ = layers
            .column_parallel("linear_attn.in_proj_qkv.weight", 8, 16, &[64])
            .matrix();
        let _ = layers
            .row_parallel("linear_attn.out_proj.weight", 64, 4, 16)
            .matrix();
        let _ = weights.finish(&[]);
    }
}
