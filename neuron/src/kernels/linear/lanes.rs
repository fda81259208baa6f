//! A vector with a lane for each row of a panel: what [`super::tiles`] is written in, once for all processors.

use crate::quant::panels::{PANEL, QUAD, QUADS, Quad};
use half::{bf16, f16};
use std::ops::Range;

/// The quads of a part of x.
pub(super) type Quads = [[i8; QUAD]; QUADS];

/// Vectors of some kind of processor. What is inlined into [`Lanes::run`] is compiled for it, so all operations are to be
/// called from there; the type is used only where the processor is of that kind.
pub(super) trait Lanes {
    /// A number for each row.
    type F32: Copy;
    /// A whole number for each row.
    type I32: Copy;
    /// A part of inputs for each row, in a byte each, without signs.
    type Part: Copy;
    /// The same with signs.
    type SignedPart: Copy;

    /// The most rows of x whose sums stay in registers.
    const GROUP: usize;
    /// Whether two panels of them do.
    const TWO_PANELS: bool;

    /// Does `work`, compiled for the processor as far as it is inlined.
    fn run<T>(work: impl FnOnce() -> T) -> T;

    /// Begins to read what is some kilobytes behind `here`: the processor foresees that within a page of memory, not from one
    /// to the next.
    fn fetch<T>(here: &T);

    fn splat(x: f32) -> Self::F32;
    fn load(from: &[f32; PANEL]) -> Self::F32;
    fn store(x: Self::F32, to: &mut [f32; PANEL]);
    fn from_f16(numbers: &[f16; PANEL]) -> Self::F32;
    fn from_bf16(numbers: &[bf16; PANEL]) -> Self::F32;
    fn from_u8(numbers: &[u8; PANEL]) -> Self::F32;
    fn from_i8(numbers: &[i8; PANEL]) -> Self::F32;
    fn from_i32(numbers: Self::I32) -> Self::F32;
    fn add(a: Self::F32, b: Self::F32) -> Self::F32;
    fn mul(a: Self::F32, b: Self::F32) -> Self::F32;
    /// `a · b + c`.
    fn mul_add(a: Self::F32, b: Self::F32, c: Self::F32) -> Self::F32;
    /// `c − a · b`.
    fn neg_mul_add(a: Self::F32, b: Self::F32, c: Self::F32) -> Self::F32;

    fn part(quads: &[Quad<u8>; QUADS]) -> Self::Part;
    /// The lower four bits of every byte.
    fn low(part: Self::Part) -> Self::Part;
    /// The upper four bits of every byte.
    fn high(part: Self::Part) -> Self::Part;
    /// `part`, with those bits of `from` that `mask` takes when `from` is moved so many bits up (down where below 0).
    fn with_bits(part: Self::Part, from: Self::Part, up: i32, mask: u8) -> Self::Part;
    /// `start + Σ w · x` over some quads, for w below 2 to the `bits`, at most 6.
    fn dot(w: &Self::Part, x: &Quads, quads: Range<usize>, bits: u32, start: i32) -> Self::I32;

    fn signed(quads: &[Quad<i8>; QUADS]) -> Self::SignedPart;
    /// `Σ w · x`; `start` is −128 Σ x.
    fn dot_signed(w: &Self::SignedPart, x: &Quads, start: i32) -> Self::I32;
}

/// Any processor, in plain code: the reference of the others.
pub(super) struct Portable;

impl Lanes for Portable {
    type F32 = [f32; PANEL];
    type I32 = [i32; PANEL];
    type Part = [Quad<u8>; QUADS];
    type SignedPart = [Quad<i8>; QUADS];

    const GROUP: usize = 4;
    const TWO_PANELS: bool = false;

    #[inline(always)]
    fn run<T>(work: impl FnOnce() -> T) -> T {
        work()
    }

    #[inline(always)]
    fn fetch<T>(_: &T) {}

    #[inline(always)]
    fn splat(x: f32) -> Self::F32 {
        [x; PANEL]
    }

    #[inline(always)]
    fn load(from: &[f32; PANEL]) -> Self::F32 {
        *from
    }

    #[inline(always)]
    fn store(x: Self::F32, to: &mut [f32; PANEL]) {
        *to = x;
    }

    #[inline(always)]
    fn from_f16(numbers: &[f16; PANEL]) -> Self::F32 {
        numbers.map(f16::to_f32)
    }

    #[inline(always)]
    fn from_bf16(numbers: &[bf16; PANEL]) -> Self::F32 {
        numbers.map(bf16::to_f32)
    }

    #[inline(always)]
    fn from_u8(numbers: &[u8; PANEL]) -> Self::F32 {
        numbers.map(f32::from)
    }

    #[inline(always)]
    fn from_i8(numbers: &[i8; PANEL]) -> Self::F32 {
        numbers.map(f32::from)
    }

    #[inline(always)]
    fn from_i32(numbers: Self::I32) -> Self::F32 {
        numbers.map(|x| x as f32)
    }

    #[inline(always)]
    fn add(a: Self::F32, b: Self::F32) -> Self::F32 {
        std::array::from_fn(|row| a[row] + b[row])
    }

    #[inline(always)]
    fn mul(a: Self::F32, b: Self::F32) -> Self::F32 {
        std::array::from_fn(|row| a[row] * b[row])
    }

    #[inline(always)]
    fn mul_add(a: Self::F32, b: Self::F32, c: Self::F32) -> Self::F32 {
        std::array::from_fn(|row| a[row] * b[row] + c[row])
    }

    #[inline(always)]
    fn neg_mul_add(a: Self::F32, b: Self::F32, c: Self::F32) -> Self::F32 {
        std::array::from_fn(|row| c[row] - a[row] * b[row])
    }

    #[inline(always)]
    fn part(quads: &[Quad<u8>; QUADS]) -> Self::Part {
        *quads
    }

    #[inline(always)]
    fn low(part: Self::Part) -> Self::Part {
        each(part, |byte| byte & 15)
    }

    #[inline(always)]
    fn high(part: Self::Part) -> Self::Part {
        each(part, |byte| byte >> 4)
    }

    #[inline(always)]
    fn with_bits(mut part: Self::Part, from: Self::Part, up: i32, mask: u8) -> Self::Part {
        let from = from.as_flattened().as_flattened();
        let bytes = part.as_flattened_mut().as_flattened_mut();
        for (byte, from) in bytes.iter_mut().zip(from) {
            let moved = if up < 0 { from >> -up } else { from << up };
            *byte |= moved & mask;
        }
        part
    }

    #[inline(always)]
    fn dot(w: &Self::Part, x: &Quads, quads: Range<usize>, _: u32, start: i32) -> Self::I32 {
        let mut sums = [start; PANEL];
        for (w, x) in w[quads.clone()].iter().zip(&x[quads]) {
            for (sum, w) in sums.iter_mut().zip(w) {
                let pairs = w.iter().zip(x);
                *sum += pairs
                    .map(|(w, x)| i32::from(*w) * i32::from(*x))
                    .sum::<i32>();
            }
        }
        sums
    }

    #[inline(always)]
    fn signed(quads: &[Quad<i8>; QUADS]) -> Self::SignedPart {
        *quads
    }

    #[inline(always)]
    fn dot_signed(w: &Self::SignedPart, x: &Quads, _: i32) -> Self::I32 {
        let mut sums = [0; PANEL];
        for (w, x) in w.iter().zip(x) {
            for (sum, w) in sums.iter_mut().zip(w) {
                let pairs = w.iter().zip(x);
                *sum += pairs
                    .map(|(w, x)| i32::from(*w) * i32::from(*x))
                    .sum::<i32>();
            }
        }
        sums
    }
}

fn each(mut part: [Quad<u8>; QUADS], change: impl Fn(u8) -> u8) -> [Quad<u8>; QUADS] {
    for byte in part.as_flattened_mut().as_flattened_mut() {
        *byte = change(*byte);
    }
    part
}
