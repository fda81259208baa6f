//! Full attention over blocks of keys and values against sums in f64.

use super::{Device, wide, worst};
use crate::gpu::{Address, Arg};
use crate::kernels::testing::numbers;
use half::bf16;

const TOKENS: usize = 16;
const LAYERS: usize = 2;
const LAYER: usize = 1;
const EPS: f32 = 1e-6;

#[derive(Debug, Clone, Copy)]
struct Shape {
    /// Keys and values are bf16, or else f32.
    bf16: bool,
    dim: usize,
    kv_heads: usize,
    group: usize,
    /// Tokens of a split of decoding.
    split: usize,
}

impl Shape {
    fn heads(&self) -> usize {
        self.kv_heads * self.group
    }

    fn kernel(&self, what: &str, with_dim: bool) -> &'static str {
        let numbers = if self.bf16 { "bf16" } else { "f32" };
        let dim = if with_dim {
            format!("_{}", self.dim)
        } else {
            String::new()
        };
        format!("attention_{what}_{numbers}{dim}").leak()
    }

    /// Where a token's key (0) or value (1) lies in its block.
    fn at(&self, head: usize, which: usize, token: usize) -> usize {
        ((2 * (LAYER * self.kv_heads + head) + which) * TOKENS + token % TOKENS) * self.dim
    }
}

/// A block as f32; what nobody wrote is not a number.
struct Block {
    address: Address,
    numbers: Vec<f32>,
}

impl Block {
    fn upload(device: &Device, bf16: bool, numbers: Vec<f32>) -> Self {
        let address = if bf16 {
            let narrow: Vec<u16> = numbers
                .iter()
                .map(|x| bf16::from_f32(*x).to_bits())
                .collect();
            device.put(&narrow)
        } else {
            device.put(&numbers)
        };
        Self { address, numbers }
    }

    fn download(&mut self, device: &Device, bf16: bool) {
        let count = self.numbers.len();
        self.numbers = if bf16 {
            let narrow: Vec<u16> = device.get(self.address, count);
            narrow
                .into_iter()
                .map(|bits| bf16::from_bits(bits).to_f32())
                .collect()
        } else {
            device.get(self.address, count)
        };
    }
}

/// RMS norm by head and rotation of a row at `position`.
fn ready(x: &[f32], scale: &[f32], frequencies: &[f32], position: usize) -> Vec<f64> {
    let mut x = wide(x);
    let mean = x.iter().map(|x| x * x).sum::<f64>() / x.len() as f64;
    for (x, scale) in x.iter_mut().zip(scale) {
        *x *= f64::from(*scale) / (mean + f64::from(EPS)).sqrt();
    }
    for (i, frequency) in frequencies.iter().enumerate() {
        let (sine, cosine) = f64::from(position as f32 * frequency).sin_cos();
        let (a, b) = (x[i], x[i + frequencies.len()]);
        x[i] = a * cosine - b * sine;
        x[i + frequencies.len()] = a * sine + b * cosine;
    }
    x
}

/// Segments have tokens before and rows of this step. Everything from made-ready queries to the output is held to f64,
/// once row by row as in decoding, once by segments.
fn attend(device: &Device, shape: Shape, segments: &[(usize, usize)]) {
    let Shape {
        bf16,
        dim,
        kv_heads,
        group,
        split,
    } = shape;
    let (heads, rows) = (shape.heads(), segments.iter().map(|(_, rows)| rows).sum());
    let width = 1 + segments
        .iter()
        .map(|(before, rows)| (before + rows).div_ceil(TOKENS))
        .max()
        .unwrap();
    let (mut row_segment, mut positions, mut starts) = (Vec::new(), Vec::new(), vec![0_i32]);
    let mut blocks: Vec<Block> = Vec::new();
    for (s, (before, rows)) in segments.iter().enumerate() {
        starts.push(starts[s] + *rows as i32);
        positions.extend((*before..before + rows).map(|position| position as i32));
        row_segment.extend((0..*rows).map(|_| s as i32));
        for block in 0..width {
            let mut given = vec![f32::NAN; 2 * LAYERS * kv_heads * TOKENS * dim];
            for token in block * TOKENS..(*before).min((block + 1) * TOKENS) {
                for head in 0..kv_heads {
                    for which in 0..2 {
                        let seed = ((s * 1000 + token) * kv_heads + head) * 2 + which;
                        given[shape.at(head, which, token)..][..dim]
                            .copy_from_slice(&numbers(seed as u64, dim));
                    }
                }
            }
            blocks.push(Block::upload(device, bf16, given));
        }
    }
    let table: Vec<u64> = blocks.iter().map(|block| block.address).collect();
    let half = dim / 8;
    let frequencies: Vec<f32> = (0..half)
        .map(|i| 1e4_f32.powf(-(i as f32) / half as f32))
        .collect();
    let q_gate = numbers(1, rows * heads * 2 * dim);
    let [k, v] = [2, 3].map(|seed| numbers(seed, rows * kv_heads * dim));
    // large enough for scores that differ
    let [q_scale, k_scale]: [Vec<f32>; 2] =
        [4, 5].map(|seed| numbers(seed, dim).iter().map(|x| 2.0 * x).collect());
    let queries = device.room(rows * heads * dim);
    let [gates, table, segment_of, at, first] = [
        device.put(&q_gate),
        device.put(&table),
        device.put(&row_segment),
        device.put(&positions),
        device.put(&starts),
    ]
    .map(Arg::Address);
    let given = [&k, &v, &q_scale, &k_scale, &frequencies].map(|x| Arg::Address(device.put(x)));
    let int = |x: usize| Arg::Int(x as i32);

    let mut args = vec![gates];
    args.extend(given);
    args.extend([Arg::Address(queries), table, int(width), segment_of, at]);
    args.extend([heads, kv_heads, dim, half, LAYER].map(int));
    args.push(Arg::Float(EPS));
    let kernel = shape.kernel("prepare", false);
    device.run(kernel, [rows, heads + kv_heads, 1], 64, &args);
    for block in &mut blocks {
        block.download(device, bf16);
    }
    let asked: Vec<f32> = device.get(queries, rows * heads * dim);
    // bf16 has 8 bits of fraction
    let rounding = if bf16 { 1.0 / 256.0 } else { 1e-5 };
    for row in 0..rows {
        let position = positions[row] as usize;
        let block = &blocks[row_segment[row] as usize * width + position / TOKENS].numbers;
        for head in 0..heads {
            let from = (row * heads + head) * dim;
            let expected = ready(&q_gate[2 * from..][..dim], &q_scale, &frequencies, position);
            assert!(worst(&asked[from..][..dim], &expected) < 1e-4);
        }
        for head in 0..kv_heads {
            let from = (row * kv_heads + head) * dim;
            let expected = ready(&k[from..][..dim], &k_scale, &frequencies, position);
            let largest = expected.iter().fold(1.0, |top: f64, x| top.max(x.abs()));
            let key = &block[shape.at(head, 0, position)..][..dim];
            assert!(worst(key, &expected) < rounding * largest, "{shape:?}");
            let value = &block[shape.at(head, 1, position)..][..dim];
            assert!(worst(value, &wide(&v[from..][..dim])) < rounding);
        }
    }

    // from what the device has made of keys and values
    let mut expected = Vec::new();
    for row in 0..rows {
        let segment = row_segment[row] as usize;
        for head in 0..heads {
            let of = |which, token: usize| {
                let block = &blocks[segment * width + token / TOKENS].numbers;
                wide(&block[shape.at(head / group, which, token)..][..dim])
            };
            let from = (row * heads + head) * dim;
            let query = wide(&asked[from..][..dim]);
            let scores: Vec<f64> = (0..=positions[row] as usize)
                .map(|token| {
                    let products = query.iter().zip(of(0, token)).map(|(q, k)| q * k);
                    products.sum::<f64>() / (dim as f64).sqrt()
                })
                .collect();
            let top = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let weights: Vec<f64> = scores.iter().map(|score| (score - top).exp()).collect();
            let total: f64 = weights.iter().sum();
            let mut sums = vec![0.0; dim];
            for (token, weight) in weights.iter().enumerate() {
                for (sum, value) in sums.iter_mut().zip(of(1, token)) {
                    *sum += weight / total * value;
                }
            }
            let gate = wide(&q_gate[2 * from + dim..][..dim]);
            let gated = sums.into_iter().zip(gate);
            expected.extend(gated.map(|(sum, gate)| sum / (1.0 + (-gate).exp())));
        }
    }
    let largest = expected.iter().fold(0.0, |top: f64, x| top.max(x.abs()));
    let allowed = largest * if bf16 { 1e-2 } else { 1e-5 };

    // one more split than any row needs
    let longest = *positions.iter().max().unwrap() as usize + 1;
    let splits = longest.div_ceil(split) + 1;
    let (partial, out) = (
        device.room(rows * heads * splits * (dim + 2)),
        device.room(expected.len()),
    );
    let mut args = vec![Arg::Address(queries), table, int(width), segment_of, at];
    args.push(Arg::Address(partial));
    args.extend([heads, kv_heads, LAYER, split].map(int));
    let kernel = shape.kernel("decode", true);
    device.run(kernel, [splits, kv_heads, rows], 128, &args);
    let mut args = vec![Arg::Address(partial), gates, Arg::Address(out)];
    args.extend([heads, dim, splits].map(int));
    device.run("attention_combine", [rows, heads, 1], 64, &args);
    let found = worst(&device.get(out, expected.len()), &expected);
    assert!(
        found < allowed,
        "{shape:?}, {segments:?}, decode: {found} of {largest}"
    );

    let out = device.room(expected.len());
    let most = segments.iter().map(|(_, rows)| *rows).max().unwrap();
    let mut args = vec![Arg::Address(queries), gates, table, int(width), first, at];
    args.push(Arg::Address(out));
    args.extend([heads, kv_heads, LAYER].map(int));
    let grid = [(most * group).div_ceil(64), kv_heads, segments.len()];
    device.run(shape.kernel("prefill", true), grid, 128, &args);
    let found = worst(&device.get(out, expected.len()), &expected);
    assert!(
        found < allowed,
        "{shape:?}, {segments:?}, prefill: {found} of {largest}"
    );
}

fn every_dim(device: &Device, bf16: bool) {
    // lone rows at the start of a block and at its end, rows that cross blocks, whole blocks, more rows than a tile
    let segments = [(0, 1), (15, 1), (37, 19), (16, 16), (0, 33)];
    for (dim, kv_heads, group, split) in [
        (32, 1, 1, 48),
        (32, 2, 2, 48),
        (32, 1, 4, 16),
        (32, 2, 6, 48),
        (32, 1, 16, 48),
        (64, 1, 4, 16),
        (64, 2, 2, 48),
        (128, 1, 8, 48),
        (128, 2, 1, 32),
        (256, 1, 1, 48),
        (256, 2, 2, 48),
        (256, 1, 4, 16),
        (256, 1, 8, 48),
        (256, 1, 12, 48),
    ] {
        let shape = Shape {
            bf16,
            dim,
            kv_heads,
            group,
            split,
        };
        attend(device, shape, &segments);
    }
    let shape = Shape {
        bf16,
        dim: 32,
        kv_heads: 1,
        group: 2,
        split: 128,
    };
    attend(device, shape, &[(100, 3), (0, 70), (250, 2)]);
    // every split of the same 35 tokens into what was there and what comes
    for before in 0..35 {
        attend(device, shape, &[(before, 35 - before)]);
    }
}

pub(super) fn attention_over_f32(device: &Device) {
    every_dim(device, false);
}

pub(super) fn attention_over_bf16(device: &Device) {
    every_dim(device, true);
}
