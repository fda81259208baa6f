//! Rows of weights times rows of x, in plain code: the reference of the others, and what other processors run.

use super::Dot;
use crate::quant::k_quants::{LEN, unpacked};
use crate::quant::{Q4K, Q5K, Q6K, Q8Block, Unit};
use half::{bf16, f16};

/// What a row of weights is made of.
pub(super) trait Weight: Unit {
    /// What a row of x is made of when it meets them.
    type Input: Send + Sync;

    /// A row of x as these weights take it.
    fn inputs(x: &[f32]) -> Vec<Self::Input>;
}

macro_rules! single_number {
    ($($kind:ty),*) => {$(
        impl Weight for $kind {
            type Input = f32;

            fn inputs(x: &[f32]) -> Vec<f32> {
                x.to_vec()
            }
        }
    )*};
}
single_number!(f32, f16, bf16);

/// 32 numbers of x, rounded to 8 bits.
#[derive(Debug, Clone, Copy)]
pub(super) struct Q8Input {
    pub(super) scale: f32,
    pub(super) values: [i8; 32],
}

impl Weight for Q8Block {
    type Input = Q8Input;

    #[inline(always)]
    fn inputs(x: &[f32]) -> Vec<Q8Input> {
        let (blocks, _) = x.as_chunks();
        let input = |numbers| {
            let (scale, values) = eight_bits(numbers);
            Q8Input { scale, values }
        };
        blocks.iter().map(input).collect()
    }
}

/// Numbers in 8 bits, and their scale.
#[inline(always)]
fn eight_bits<const N: usize>(numbers: &[f32; N]) -> (f32, [i8; N]) {
    /// 1.5 · 2²³: a sum with it has no digits behind the point, and whole numbers in its lowest bits.
    const SHIFT: f32 = 12_582_912.0;
    const LANES: usize = 16;
    let mut largest = [0f32; LANES];
    for numbers in numbers.chunks_exact(LANES) {
        for (top, x) in largest.iter_mut().zip(numbers) {
            *top = if x.abs() > *top { x.abs() } else { *top };
        }
    }
    let largest = largest.into_iter().fold(0f32, f32::max);
    let inverse = if largest > 0.0 { 127.0 / largest } else { 0.0 };
    let mut values = [0; N];
    for (value, x) in values.iter_mut().zip(numbers) {
        *value = (x * inverse + SHIFT).to_bits() as i8;
    }
    (largest / 127.0, values)
}

/// 256 numbers of x, rounded to 8 bits, as blocks of as many weights meet them.
#[derive(Debug, Clone, Copy)]
pub(super) struct WideInput {
    pub(super) scale: f32,
    pub(super) values: [i8; LEN],
    /// Of every 16 values: what the offset of a part of weights is multiplied with.
    pub(super) sums: [i16; LEN / 16],
}

macro_rules! k_quant {
    ($($kind:ty),*) => {$(
        impl Weight for $kind {
            type Input = WideInput;

            #[inline(always)]
            fn inputs(x: &[f32]) -> Vec<WideInput> {
                let (blocks, _) = x.as_chunks();
                let input = |numbers| {
                    let (scale, values) = eight_bits::<LEN>(numbers);
                    let (parts, _) = values.as_chunks::<16>();
                    let sums = std::array::from_fn(|part| parts[part].iter().map(|x| i16::from(*x)).sum());
                    WideInput { scale, values, sums }
                };
                blocks.iter().map(input).collect()
            }
        }
    )*};
}
k_quant!(Q4K, Q5K, Q6K);

/// Any processor.
pub(super) struct Portable;

impl Dot<f32> for Portable {
    fn rows(weights: &[f32], xs: &[&[f32]], out: &mut [f32]) {
        for (out, x) in out.iter_mut().zip(xs) {
            *out = super::super::dot(weights, x);
        }
    }
}

/// Widens the weights once for all rows of x.
fn widened<W: Copy>(
    weights: &[W],
    xs: &[&[f32]],
    out: &mut [f32],
    widen: impl Fn(W) -> f32 + Copy,
) {
    const PIECE: usize = 256;
    let mut piece = [0.0; PIECE];
    out.fill(0.0);
    for (index, weights) in weights.chunks(PIECE).enumerate() {
        let piece = &mut piece[..weights.len()];
        for (wide, weight) in piece.iter_mut().zip(weights) {
            *wide = widen(*weight);
        }
        for (out, x) in out.iter_mut().zip(xs) {
            *out += super::super::dot(piece, &x[index * PIECE..][..weights.len()]);
        }
    }
}

impl Dot<f16> for Portable {
    fn rows(weights: &[f16], xs: &[&[f32]], out: &mut [f32]) {
        widened(weights, xs, out, f16::to_f32);
    }
}

impl Dot<bf16> for Portable {
    fn rows(weights: &[bf16], xs: &[&[f32]], out: &mut [f32]) {
        widened(weights, xs, out, bf16::to_f32);
    }
}

impl Dot<Q8Block> for Portable {
    fn rows(weights: &[Q8Block], xs: &[&[Q8Input]], out: &mut [f32]) {
        for (out, x) in out.iter_mut().zip(xs) {
            *out = weights
                .iter()
                .zip(*x)
                .map(|(w, x)| {
                    let pairs = w.values.iter().zip(&x.values);
                    let sum: i32 = pairs.map(|(w, x)| i32::from(*w) * i32::from(*x)).sum();
                    w.scale.to_f32() * x.scale * sum as f32
                })
                .sum();
        }
    }
}

/// A block with offsets times 256 numbers: Σₚ scaleₚ Σ q x and Σₚ offsetₚ Σ x.
fn with_offsets(parts: &[u8; 12], quants: &[u8; LEN], x: &WideInput) -> (i32, i32) {
    let (scales, offsets) = unpacked(parts);
    let (mut scaled, mut shifted) = (0, 0);
    for (part, (quants, values)) in quants
        .chunks_exact(32)
        .zip(x.values.chunks_exact(32))
        .enumerate()
    {
        let pairs = quants.iter().zip(values);
        let sum: i32 = pairs.map(|(q, x)| i32::from(*q) * i32::from(*x)).sum();
        scaled += i32::from(scales[part]) * sum;
        let sums = i32::from(x.sums[2 * part]) + i32::from(x.sums[2 * part + 1]);
        shifted += i32::from(offsets[part]) * sums;
    }
    (scaled, shifted)
}

macro_rules! dot_with_offsets {
    ($($kind:ty),*) => {$(
        impl Dot<$kind> for Portable {
            fn rows(weights: &[$kind], xs: &[&[WideInput]], out: &mut [f32]) {
                out.fill(0.0);
                for (index, block) in weights.iter().enumerate() {
                    let quants = block.quants();
                    for (out, x) in out.iter_mut().zip(xs) {
                        let x = &x[index];
                        let (scaled, shifted) = with_offsets(&block.parts, &quants, x);
                        *out += x.scale * block.scale.to_f32() * scaled as f32;
                        *out -= x.scale * block.offset.to_f32() * shifted as f32;
                    }
                }
            }
        }
    )*};
}
dot_with_offsets!(Q4K, Q5K);

impl Dot<Q6K> for Portable {
    fn rows(weights: &[Q6K], xs: &[&[WideInput]], out: &mut [f32]) {
        out.fill(0.0);
        for (index, block) in weights.iter().enumerate() {
            let quants = block.quants();
            for (out, x) in out.iter_mut().zip(xs) {
                let x = &x[index];
                let parts = quants.chunks_exact(16).zip(x.values.chunks_exact(16));
                let sums = parts.map(|(quants, values)| {
                    let pairs = quants.iter().zip(values);
                    pairs
                        .map(|(q, x)| i32::from(*q) * i32::from(*x))
                        .sum::<i32>()
                });
                let scaled: i32 = sums
                    .zip(block.parts)
                    .map(|(sum, scale)| sum * i32::from(scale))
                    .sum();
                *out += x.scale * block.scale.to_f32() * scaled as f32;
            }
        }
    }
}
