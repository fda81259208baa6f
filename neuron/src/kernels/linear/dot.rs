//! Rows of weights times rows of x, in plain code: the reference of the others, and what other processors run.

use super::Dot;
use crate::quant::Q8Block;
use half::{bf16, f16};

/// What a row of weights is made of.
pub(super) trait Weight: Copy + Send + Sync {
    /// Numbers in one.
    const LEN: usize;
    /// What a row of x is made of when it meets them.
    type Input: Send + Sync;

    /// A row of x as these weights take it.
    fn inputs(x: &[f32]) -> Vec<Self::Input>;
}

macro_rules! single_number {
    ($($kind:ty),*) => {$(
        impl Weight for $kind {
            const LEN: usize = 1;
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
    pub(super) values: [i8; Q8Block::LEN],
}

impl Weight for Q8Block {
    const LEN: usize = Self::LEN;
    type Input = Q8Input;

    fn inputs(x: &[f32]) -> Vec<Q8Input> {
        x.chunks_exact(Self::LEN)
            .map(|numbers| {
                let largest = numbers.iter().fold(0f32, |top, x| top.max(x.abs()));
                let inverse = if largest > 0.0 { 127.0 / largest } else { 0.0 };
                let mut values = [0; Self::LEN];
                for (value, x) in values.iter_mut().zip(numbers) {
                    *value = (x * inverse).round() as i8;
                }
                Q8Input {
                    scale: largest / 127.0,
                    values,
                }
            })
            .collect()
    }
}

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
