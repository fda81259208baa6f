//! Vectors of processors with AVX2, FMA and F16C.
#![allow(unsafe_code)]

use super::lanes::{Lanes, Quads};
use crate::quant::panels::{PANEL, QUAD, QUADS, Quad};
use half::{bf16, f16};
use std::arch::x86_64::*;
use std::ops::Range;

/// Processors for which [`has_avx2`](super::super::has_avx2). A row is a lane of 32 bits in one of two vectors.
pub(super) struct Avx2;

/// Numbers in a vector.
const LANES: usize = 8;

#[target_feature(enable = "avx2,fma,f16c")]
fn compiled<T>(work: impl FnOnce() -> T) -> T {
    work()
}

/// A quad of x for every row.
#[inline(always)]
fn broadcast(quad: [i8; QUAD]) -> __m256i {
    // SAFETY: the type is used only where the processor has AVX2
    unsafe { _mm256_set1_epi32(i32::from_le_bytes(quad.map(|x| x as u8))) }
}

/// Sums of two products to sums of four.
#[inline(always)]
fn fours(pairs: __m256i) -> __m256i {
    // SAFETY: the type is used only where the processor has AVX2
    unsafe { _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)) }
}

// SAFETY (of all blocks below): the type is used only where the processor has what `compiled` names; loads and stores are of
// halves of arrays that have as many bytes.
impl Lanes for Avx2 {
    type F32 = [__m256; 2];
    type I32 = [__m256i; 2];
    type Part = [[__m256i; 2]; QUADS];
    /// Sizes, and the numbers whose signs go to the other factor: the instruction takes no sign on one side.
    type SignedPart = [[[__m256i; 2]; QUADS]; 2];

    const GROUP: usize = 6;
    const TWO_PANELS: bool = false;

    #[inline(always)]
    fn run<T>(work: impl FnOnce() -> T) -> T {
        // SAFETY: see above
        unsafe { compiled(work) }
    }

    #[inline(always)]
    fn fetch<T>(here: &T) {
        super::fetch(here);
    }

    #[inline(always)]
    fn splat(x: f32) -> Self::F32 {
        // SAFETY: see above
        unsafe { [_mm256_set1_ps(x); 2] }
    }

    #[inline(always)]
    fn load(from: &[f32; PANEL]) -> Self::F32 {
        let from = from.as_ptr();
        // SAFETY: see above
        unsafe { [_mm256_loadu_ps(from), _mm256_loadu_ps(from.add(LANES))] }
    }

    #[inline(always)]
    fn store(x: Self::F32, to: &mut [f32; PANEL]) {
        let to = to.as_mut_ptr();
        // SAFETY: see above
        unsafe {
            _mm256_storeu_ps(to, x[0]);
            _mm256_storeu_ps(to.add(LANES), x[1]);
        }
    }

    #[inline(always)]
    fn from_f16(numbers: &[f16; PANEL]) -> Self::F32 {
        let from: *const __m128i = numbers.as_ptr().cast();
        // SAFETY: see above
        unsafe {
            [
                _mm256_cvtph_ps(_mm_loadu_si128(from)),
                _mm256_cvtph_ps(_mm_loadu_si128(from.add(1))),
            ]
        }
    }

    #[inline(always)]
    fn from_bf16(numbers: &[bf16; PANEL]) -> Self::F32 {
        let from: *const __m128i = numbers.as_ptr().cast();
        // SAFETY: see above; a bf16 is the upper two bytes of an f32
        unsafe {
            let low = _mm256_cvtepu16_epi32(_mm_loadu_si128(from));
            let high = _mm256_cvtepu16_epi32(_mm_loadu_si128(from.add(1)));
            [
                _mm256_castsi256_ps(_mm256_slli_epi32(low, 16)),
                _mm256_castsi256_ps(_mm256_slli_epi32(high, 16)),
            ]
        }
    }

    #[inline(always)]
    fn from_u8(numbers: &[u8; PANEL]) -> Self::F32 {
        let from = numbers.as_ptr();
        // SAFETY: see above
        unsafe {
            Self::from_i32([
                _mm256_cvtepu8_epi32(_mm_loadl_epi64(from.cast())),
                _mm256_cvtepu8_epi32(_mm_loadl_epi64(from.add(LANES).cast())),
            ])
        }
    }

    #[inline(always)]
    fn from_i8(numbers: &[i8; PANEL]) -> Self::F32 {
        let from = numbers.as_ptr();
        // SAFETY: see above
        unsafe {
            Self::from_i32([
                _mm256_cvtepi8_epi32(_mm_loadl_epi64(from.cast())),
                _mm256_cvtepi8_epi32(_mm_loadl_epi64(from.add(LANES).cast())),
            ])
        }
    }

    #[inline(always)]
    fn from_i32(numbers: Self::I32) -> Self::F32 {
        // SAFETY: see above
        unsafe {
            [
                _mm256_cvtepi32_ps(numbers[0]),
                _mm256_cvtepi32_ps(numbers[1]),
            ]
        }
    }

    #[inline(always)]
    fn add(a: Self::F32, b: Self::F32) -> Self::F32 {
        // SAFETY: see above
        unsafe { [_mm256_add_ps(a[0], b[0]), _mm256_add_ps(a[1], b[1])] }
    }

    #[inline(always)]
    fn mul(a: Self::F32, b: Self::F32) -> Self::F32 {
        // SAFETY: see above
        unsafe { [_mm256_mul_ps(a[0], b[0]), _mm256_mul_ps(a[1], b[1])] }
    }

    #[inline(always)]
    fn mul_add(a: Self::F32, b: Self::F32, c: Self::F32) -> Self::F32 {
        // SAFETY: see above
        unsafe {
            [
                _mm256_fmadd_ps(a[0], b[0], c[0]),
                _mm256_fmadd_ps(a[1], b[1], c[1]),
            ]
        }
    }

    #[inline(always)]
    fn neg_mul_add(a: Self::F32, b: Self::F32, c: Self::F32) -> Self::F32 {
        // SAFETY: see above
        unsafe {
            [
                _mm256_fnmadd_ps(a[0], b[0], c[0]),
                _mm256_fnmadd_ps(a[1], b[1], c[1]),
            ]
        }
    }

    #[inline(always)]
    fn part(quads: &[Quad<u8>; QUADS]) -> Self::Part {
        // SAFETY: see above
        unsafe {
            let mut part = [[_mm256_setzero_si256(); 2]; QUADS];
            for (part, quad) in part.iter_mut().zip(quads) {
                let from: *const __m256i = quad.as_ptr().cast();
                *part = [_mm256_loadu_si256(from), _mm256_loadu_si256(from.add(1))];
            }
            part
        }
    }

    #[inline(always)]
    fn low(mut part: Self::Part) -> Self::Part {
        // SAFETY: see above
        unsafe {
            for vector in part.as_flattened_mut() {
                *vector = _mm256_and_si256(*vector, _mm256_set1_epi8(15));
            }
        }
        part
    }

    #[inline(always)]
    fn high(mut part: Self::Part) -> Self::Part {
        // SAFETY: see above
        unsafe {
            for vector in part.as_flattened_mut() {
                *vector = _mm256_and_si256(_mm256_srli_epi16(*vector, 4), _mm256_set1_epi8(15));
            }
        }
        part
    }

    #[inline(always)]
    fn with_bits(mut part: Self::Part, from: Self::Part, up: i32, mask: u8) -> Self::Part {
        // SAFETY: see above; what a move brings from the byte beside is masked away
        unsafe {
            let by = _mm_cvtsi32_si128(up.abs());
            let from = from.as_flattened();
            for (vector, from) in part.as_flattened_mut().iter_mut().zip(from) {
                let moved = if up < 0 {
                    _mm256_srl_epi16(*from, by)
                } else {
                    _mm256_sll_epi16(*from, by)
                };
                let bits = _mm256_and_si256(moved, _mm256_set1_epi8(mask as i8));
                *vector = _mm256_or_si256(*vector, bits);
            }
        }
        part
    }

    #[inline(always)]
    fn dot(w: &Self::Part, x: &Quads, quads: Range<usize>, bits: u32, start: i32) -> Self::I32 {
        // so many sums of two products of x, at most 127, stay below 2¹⁵
        let added = match bits {
            ..=4 => 8,
            5 => 4,
            _ => 2,
        };
        // SAFETY: see above
        unsafe {
            let mut sums = [_mm256_set1_epi32(start); 2];
            for first in quads.clone().step_by(added) {
                let mut pairs = [_mm256_setzero_si256(); 2];
                for quad in first..quads.end.min(first + added) {
                    let x = broadcast(x[quad]);
                    for half in 0..2 {
                        let products = _mm256_maddubs_epi16(w[quad][half], x);
                        pairs[half] = _mm256_add_epi16(pairs[half], products);
                    }
                }
                for half in 0..2 {
                    sums[half] = _mm256_add_epi32(sums[half], fours(pairs[half]));
                }
            }
            sums
        }
    }

    #[inline(always)]
    fn signed(quads: &[Quad<i8>; QUADS]) -> Self::SignedPart {
        // SAFETY: see above
        unsafe {
            let mut part = [[[_mm256_setzero_si256(); 2]; QUADS]; 2];
            for (at, quad) in quads.iter().enumerate() {
                let from: *const __m256i = quad.as_ptr().cast();
                let numbers = [_mm256_loadu_si256(from), _mm256_loadu_si256(from.add(1))];
                part[0][at] = [_mm256_abs_epi8(numbers[0]), _mm256_abs_epi8(numbers[1])];
                part[1][at] = numbers;
            }
            part
        }
    }

    #[inline(always)]
    fn dot_signed([sizes, signs]: &Self::SignedPart, x: &Quads, _: i32) -> Self::I32 {
        // SAFETY: see above
        unsafe {
            let mut sums = [_mm256_setzero_si256(); 2];
            for (at, x) in x.iter().enumerate() {
                let x = broadcast(*x);
                for half in 0..2 {
                    // sizes are at most 128, and those of x 127: sums of two stay below 2¹⁵
                    let signed = _mm256_sign_epi8(x, signs[at][half]);
                    let pairs = _mm256_maddubs_epi16(sizes[at][half], signed);
                    sums[half] = _mm256_add_epi32(sums[half], fours(pairs));
                }
            }
            sums
        }
    }
}
