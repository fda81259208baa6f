//! Rows of weights times rows of x on processors with AVX2, FMA and F16C.
#![allow(unsafe_code)]

use super::dot::Q8Input;
use super::{Dot, TILE};
use crate::quant::Q8Block;
use half::{bf16, f16};
use std::arch::x86_64::*;

/// Processors with AVX2, FMA and F16C: [`is_supported`].
pub(super) struct Avx2;

/// Whether this processor is one. The answer is cached by the standard library.
pub(super) fn is_supported() -> bool {
    is_x86_feature_detected!("avx2")
        && is_x86_feature_detected!("fma")
        && is_x86_feature_detected!("f16c")
}

/// Numbers in a vector.
const LANES: usize = 8;

/// A number that eight of are widened to f32 at once.
trait Widen: Copy {
    /// Eight numbers from `at`.
    ///
    /// # Safety
    /// Eight numbers lie at `at`, and the processor has AVX2, FMA and F16C.
    unsafe fn widen(at: *const Self) -> __m256;

    fn to_f32(self) -> f32;
}

impl Widen for f32 {
    #[inline(always)]
    unsafe fn widen(at: *const Self) -> __m256 {
        // SAFETY: as this function asks
        unsafe { _mm256_loadu_ps(at) }
    }

    fn to_f32(self) -> f32 {
        self
    }
}

impl Widen for f16 {
    #[inline(always)]
    unsafe fn widen(at: *const Self) -> __m256 {
        // SAFETY: as this function asks; an f16 is two bytes
        unsafe { _mm256_cvtph_ps(_mm_loadu_si128(at.cast())) }
    }

    fn to_f32(self) -> f32 {
        f16::to_f32(self)
    }
}

impl Widen for bf16 {
    #[inline(always)]
    unsafe fn widen(at: *const Self) -> __m256 {
        // SAFETY: as this function asks; a bf16 is the upper two bytes of an f32
        unsafe {
            let upper = _mm256_cvtepu16_epi32(_mm_loadu_si128(at.cast()));
            _mm256_castsi256_ps(_mm256_slli_epi32(upper, 16))
        }
    }

    fn to_f32(self) -> f32 {
        bf16::to_f32(self)
    }
}

macro_rules! dot_of_single_numbers {
    ($($kind:ty),*) => {$(
        impl Dot<$kind> for Avx2 {
            fn rows(weights: &[$kind], xs: &[&[f32]], out: &mut [f32]) {
                // SAFETY: this type is used only where `is_supported`
                unsafe {
                    match xs.len() {
                        1 => wide::<$kind, 1, 4>(weights, xs, out),
                        2 => wide::<$kind, 2, 2>(weights, xs, out),
                        3 => wide::<$kind, 3, 2>(weights, xs, out),
                        TILE => wide::<$kind, 4, 2>(weights, xs, out),
                        rows => unreachable!("a tile of {rows} rows"),
                    }
                }
            }
        }
    )*};
}
dot_of_single_numbers!(f32, f16, bf16);

/// `ROWS` products with `UNROLL` sums each side by side, so that additions need not wait for each other.
///
/// # Safety
/// The processor has AVX2, FMA and F16C.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn wide<W: Widen, const ROWS: usize, const UNROLL: usize>(
    weights: &[W],
    xs: &[&[f32]],
    out: &mut [f32],
) {
    let count = weights.len();
    assert!(xs.len() == ROWS && out.len() == ROWS && xs.iter().all(|x| x.len() == count));
    let mut sums = [[_mm256_setzero_ps(); UNROLL]; ROWS];
    let step = LANES * UNROLL;
    let mut at = 0;
    while at + step <= count {
        for lane in 0..UNROLL {
            let here = at + lane * LANES;
            // SAFETY: here + LANES <= at + step <= count, the length of the weights and of every row
            let w = unsafe { W::widen(weights.as_ptr().add(here)) };
            for (sums, x) in sums.iter_mut().zip(xs) {
                // SAFETY: as above
                let x = unsafe { _mm256_loadu_ps(x.as_ptr().add(here)) };
                sums[lane] = _mm256_fmadd_ps(w, x, sums[lane]);
            }
        }
        at += step;
    }
    for ((out, x), sums) in out.iter_mut().zip(xs).zip(sums) {
        let sum = sums.into_iter().reduce(|a, b| _mm256_add_ps(a, b));
        let pairs = weights[at..].iter().zip(&x[at..]);
        let rest: f32 = pairs.map(|(w, x)| w.to_f32() * x).sum();
        *out = horizontal(sum.expect("at least one sum")) + rest;
    }
}

impl Dot<Q8Block> for Avx2 {
    fn rows(weights: &[Q8Block], xs: &[&[Q8Input]], out: &mut [f32]) {
        // SAFETY: this type is used only where `is_supported`
        unsafe {
            match xs.len() {
                1 => eight_bits::<1>(weights, xs, out),
                2 => eight_bits::<2>(weights, xs, out),
                3 => eight_bits::<3>(weights, xs, out),
                TILE => eight_bits::<4>(weights, xs, out),
                rows => unreachable!("a tile of {rows} rows"),
            }
        }
    }
}

/// `ROWS` products of 8-bit blocks: whole numbers within a block, f32 over blocks.
///
/// # Safety
/// The processor has AVX2, FMA and F16C.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn eight_bits<const ROWS: usize>(weights: &[Q8Block], xs: &[&[Q8Input]], out: &mut [f32]) {
    let count = weights.len();
    assert!(xs.len() == ROWS && out.len() == ROWS && xs.iter().all(|x| x.len() == count));
    let ones = _mm256_set1_epi16(1);
    let mut sums = [[_mm256_setzero_ps(); 2]; ROWS];
    for (index, block) in weights.iter().enumerate() {
        // SAFETY: a block has 32 values
        let w = unsafe { _mm256_loadu_si256(block.values.as_ptr().cast()) };
        let size = _mm256_abs_epi8(w); // one factor must be without sign: its sign goes to the other
        let scale = _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(i32::from(
            block.scale.to_bits(),
        ))));
        for (sums, x) in sums.iter_mut().zip(xs) {
            let input = &x[index];
            // SAFETY: an input has 32 values
            let x = unsafe { _mm256_loadu_si256(input.values.as_ptr().cast()) };
            let pairs = _mm256_maddubs_epi16(size, _mm256_sign_epi8(x, w)); // |w|, |x| ≤ 127: no overflow
            let fours = _mm256_cvtepi32_ps(_mm256_madd_epi16(pairs, ones));
            let sum = &mut sums[index % 2];
            *sum = _mm256_fmadd_ps(_mm256_set1_ps(scale * input.scale), fours, *sum);
        }
    }
    for (out, [even, odd]) in out.iter_mut().zip(sums) {
        *out = horizontal(_mm256_add_ps(even, odd));
    }
}

/// The sum of the eight numbers.
#[inline]
#[target_feature(enable = "avx2")]
fn horizontal(x: __m256) -> f32 {
    let four = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)))
}
