//! Vectors of processors with AVX-512 and its multiplication of bytes (VNNI).
#![allow(unsafe_code)]

use super::lanes::{Lanes, Quads};
use crate::quant::panels::{PANEL, QUAD, QUADS, Quad};
use half::{bf16, f16};
use std::arch::x86_64::*;
use std::ops::Range;

/// Processors for which [`has_avx512`](super::super::has_avx512). A row is a lane of 32 bits.
pub(super) struct Avx512;

#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
fn compiled<T>(work: impl FnOnce() -> T) -> T {
    work()
}

/// A quad of x for every row.
#[inline(always)]
fn broadcast(quad: [i8; QUAD]) -> __m512i {
    // SAFETY: the type is used only where the processor has AVX-512
    unsafe { _mm512_set1_epi32(i32::from_le_bytes(quad.map(|x| x as u8))) }
}

// SAFETY (of all blocks below): the type is used only where the processor has what `compiled` names; loads and stores are of
// arrays that have as many bytes.
impl Lanes for Avx512 {
    type F32 = __m512;
    type I32 = __m512i;
    type Part = [__m512i; QUADS];
    type SignedPart = [__m512i; QUADS];

    const GROUP: usize = 8;
    const TWO_PANELS: bool = true;

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
    fn splat(x: f32) -> __m512 {
        // SAFETY: see above
        unsafe { _mm512_set1_ps(x) }
    }

    #[inline(always)]
    fn load(from: &[f32; PANEL]) -> __m512 {
        // SAFETY: see above
        unsafe { _mm512_loadu_ps(from.as_ptr()) }
    }

    #[inline(always)]
    fn store(x: __m512, to: &mut [f32; PANEL]) {
        // SAFETY: see above
        unsafe { _mm512_storeu_ps(to.as_mut_ptr(), x) }
    }

    #[inline(always)]
    fn from_f16(numbers: &[f16; PANEL]) -> __m512 {
        // SAFETY: see above
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(numbers.as_ptr().cast())) }
    }

    #[inline(always)]
    fn from_bf16(numbers: &[bf16; PANEL]) -> __m512 {
        // SAFETY: see above; a bf16 is the upper two bytes of an f32
        unsafe {
            let wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(numbers.as_ptr().cast()));
            _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16))
        }
    }

    #[inline(always)]
    fn from_u8(numbers: &[u8; PANEL]) -> __m512 {
        // SAFETY: see above
        unsafe {
            _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(
                numbers.as_ptr().cast(),
            )))
        }
    }

    #[inline(always)]
    fn from_i8(numbers: &[i8; PANEL]) -> __m512 {
        // SAFETY: see above
        unsafe {
            _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(
                numbers.as_ptr().cast(),
            )))
        }
    }

    #[inline(always)]
    fn from_i32(numbers: __m512i) -> __m512 {
        // SAFETY: see above
        unsafe { _mm512_cvtepi32_ps(numbers) }
    }

    #[inline(always)]
    fn add(a: __m512, b: __m512) -> __m512 {
        // SAFETY: see above
        unsafe { _mm512_add_ps(a, b) }
    }

    #[inline(always)]
    fn mul(a: __m512, b: __m512) -> __m512 {
        // SAFETY: see above
        unsafe { _mm512_mul_ps(a, b) }
    }

    #[inline(always)]
    fn mul_add(a: __m512, b: __m512, c: __m512) -> __m512 {
        // SAFETY: see above
        unsafe { _mm512_fmadd_ps(a, b, c) }
    }

    #[inline(always)]
    fn neg_mul_add(a: __m512, b: __m512, c: __m512) -> __m512 {
        // SAFETY: see above
        unsafe { _mm512_fnmadd_ps(a, b, c) }
    }

    #[inline(always)]
    fn part(quads: &[Quad<u8>; QUADS]) -> Self::Part {
        // SAFETY: see above
        unsafe {
            let mut part = [_mm512_setzero_si512(); QUADS];
            for (part, quad) in part.iter_mut().zip(quads) {
                *part = _mm512_loadu_si512(quad.as_ptr().cast());
            }
            part
        }
    }

    #[inline(always)]
    fn low(mut part: Self::Part) -> Self::Part {
        // SAFETY: see above
        unsafe {
            for quad in &mut part {
                *quad = _mm512_and_si512(*quad, _mm512_set1_epi8(15));
            }
        }
        part
    }

    #[inline(always)]
    fn high(mut part: Self::Part) -> Self::Part {
        // SAFETY: see above
        unsafe {
            for quad in &mut part {
                *quad = _mm512_and_si512(_mm512_srli_epi16(*quad, 4), _mm512_set1_epi8(15));
            }
        }
        part
    }

    #[inline(always)]
    fn with_bits(mut part: Self::Part, from: Self::Part, up: i32, mask: u8) -> Self::Part {
        // SAFETY: see above; what a move brings from the byte beside is masked away
        unsafe {
            let by = _mm_cvtsi32_si128(up.abs());
            for (quad, from) in part.iter_mut().zip(from) {
                let moved = if up < 0 {
                    _mm512_srl_epi16(from, by)
                } else {
                    _mm512_sll_epi16(from, by)
                };
                let bits = _mm512_and_si512(moved, _mm512_set1_epi8(mask as i8));
                *quad = _mm512_or_si512(*quad, bits);
            }
        }
        part
    }

    #[inline(always)]
    fn dot(w: &Self::Part, x: &Quads, quads: Range<usize>, _: u32, start: i32) -> __m512i {
        // SAFETY: see above
        unsafe {
            let mut sum = _mm512_set1_epi32(start);
            for quad in quads {
                sum = _mm512_dpbusd_epi32(sum, w[quad], broadcast(x[quad]));
            }
            sum
        }
    }

    /// The instruction takes no sign on one side: weights are kept 128 higher, and sums begin lower by as much.
    #[inline(always)]
    fn signed(quads: &[Quad<i8>; QUADS]) -> Self::SignedPart {
        // SAFETY: see above
        unsafe {
            let mut part = [_mm512_setzero_si512(); QUADS];
            for (part, quad) in part.iter_mut().zip(quads) {
                let quad = _mm512_loadu_si512(quad.as_ptr().cast());
                *part = _mm512_xor_si512(quad, _mm512_set1_epi8(i8::MIN));
            }
            part
        }
    }

    #[inline(always)]
    fn dot_signed(w: &Self::SignedPart, x: &Quads, start: i32) -> __m512i {
        Self::dot(w, x, 0..QUADS, 8, start)
    }
}
