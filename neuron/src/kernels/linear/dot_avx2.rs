//! Rows of weights times rows of x on processors with AVX2, FMA and F16C.
#![allow(unsafe_code)]

use super::dot::{Q8Input, WideInput};
use super::{Dot, TILE};
use crate::quant::k_quants::unpacked;
use crate::quant::{Q4K, Q5K, Q6K, Q8Block};
use half::{bf16, f16};
use std::arch::x86_64::*;

/// Processors with AVX2, FMA and F16C: [`has_avx2`](super::has_avx2).
pub(super) struct Avx2;

/// Numbers in a vector.
const LANES: usize = 8;

/// Begins to read what is to be multiplied soon: the processor foresees it within a page of memory, not from one to the next.
#[inline(always)]
fn fetch<W>(weights: *const W) {
    const AHEAD: usize = 2048;
    // SAFETY: the processor has SSE; an address behind the weights is no fault, as nothing is read
    unsafe { _mm_prefetch(weights.cast::<i8>().wrapping_add(AHEAD), _MM_HINT_T0) };
}

/// The same for all of a long block.
#[inline(always)]
fn fetch_block<W>(block: &W) {
    const LINE: usize = 64;
    for at in (0..size_of::<W>()).step_by(LINE) {
        fetch(std::ptr::from_ref(block).cast::<u8>().wrapping_add(at));
    }
}

/// A number that eight of are widened to f32 at once.
pub(super) trait Widen: Copy {
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
                // SAFETY: this type is used only where `has_avx2`
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
        fetch(weights.as_ptr().wrapping_add(at));
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
        // SAFETY: this type is used only where `has_avx2`
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
        fetch(block);
        // SAFETY: a block has 32 values
        let w = unsafe { _mm256_loadu_si256(block.values.as_ptr().cast()) };
        let size = _mm256_abs_epi8(w); // one factor must be without sign: its sign goes to the other
        let scale = widened(block.scale);
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

macro_rules! dot_of_wide_blocks {
    ($($kind:ty => $kernel:ident),*) => {$(
        impl Dot<$kind> for Avx2 {
            fn rows(weights: &[$kind], xs: &[&[WideInput]], out: &mut [f32]) {
                // SAFETY: this type is used only where `has_avx2`
                unsafe {
                    match xs.len() {
                        1 => $kernel::<1>(weights, xs, out),
                        2 => $kernel::<2>(weights, xs, out),
                        3 => $kernel::<3>(weights, xs, out),
                        TILE => $kernel::<4>(weights, xs, out),
                        rows => unreachable!("a tile of {rows} rows"),
                    }
                }
            }
        }
    )*};
}
dot_of_wide_blocks!(Q4K => with_offsets, Q5K => with_offsets, Q6K => six_bits);

/// A block of 256 weights with scales and offsets of 6 bits.
pub(super) trait Offsets {
    fn scale(&self) -> f16;
    fn offset(&self) -> f16;
    fn parts(&self) -> &[u8; 12];

    /// The quants of parts `2 · pair` and `2 · pair + 1`, each from 0 to 31.
    ///
    /// # Safety
    /// `pair` is below 4, and the processor has AVX2.
    unsafe fn pair(&self, pair: usize) -> [__m256i; 2];
}

/// 32 bytes in their lower and their upper halves.
///
/// # Safety
/// The processor has AVX2.
#[inline(always)]
pub(super) unsafe fn halves(bytes: __m256i) -> [__m256i; 2] {
    // SAFETY: as this function asks
    unsafe {
        let low = _mm256_set1_epi8(15);
        [
            _mm256_and_si256(bytes, low),
            _mm256_and_si256(_mm256_srli_epi16(bytes, 4), low),
        ]
    }
}

impl Offsets for Q4K {
    fn scale(&self) -> f16 {
        self.scale
    }

    fn offset(&self) -> f16 {
        self.offset
    }

    fn parts(&self) -> &[u8; 12] {
        &self.parts
    }

    #[inline(always)]
    unsafe fn pair(&self, pair: usize) -> [__m256i; 2] {
        // SAFETY: as this function asks; there are 4 · 32 bytes
        unsafe {
            halves(_mm256_loadu_si256(
                self.quants.as_ptr().add(32 * pair).cast(),
            ))
        }
    }
}

impl Offsets for Q5K {
    fn scale(&self) -> f16 {
        self.scale
    }

    fn offset(&self) -> f16 {
        self.offset
    }

    fn parts(&self) -> &[u8; 12] {
        &self.parts
    }

    #[inline(always)]
    unsafe fn pair(&self, pair: usize) -> [__m256i; 2] {
        // SAFETY: as this function asks; there are 4 · 32 bytes, and 32 of fifth bits
        unsafe {
            let [first, second] = halves(_mm256_loadu_si256(
                self.quants.as_ptr().add(32 * pair).cast(),
            ));
            let high = _mm256_loadu_si256(self.high.as_ptr().cast());
            // the bits of this pair to the bottom: what the shift takes from neighbours is masked away
            let high = _mm256_srl_epi16(high, _mm_cvtsi32_si128(2 * pair as i32));
            let one = _mm256_set1_epi8(1);
            let fifth = _mm256_slli_epi16(_mm256_and_si256(high, one), 4);
            let next = _mm256_and_si256(_mm256_srli_epi16(high, 1), one);
            [
                _mm256_or_si256(first, fifth),
                _mm256_or_si256(second, _mm256_slli_epi16(next, 4)),
            ]
        }
    }
}

/// The sums of every 16 values of x, added two by two: one for each part of 32 weights.
///
/// # Safety
/// The processor has AVX2.
#[inline(always)]
unsafe fn part_sums(x: &WideInput) -> __m128i {
    // SAFETY: as this function asks; there are 16 sums of 2 bytes
    unsafe {
        let sums = _mm256_loadu_si256(x.sums.as_ptr().cast());
        _mm_hadd_epi16(
            _mm256_castsi256_si128(sums),
            _mm256_extracti128_si256(sums, 1),
        )
    }
}

/// `ROWS` products of blocks with offsets: whole numbers within a block, f32 over blocks.
///
/// # Safety
/// The processor has AVX2, FMA and F16C.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn with_offsets<const ROWS: usize>(
    weights: &[impl Offsets],
    xs: &[&[WideInput]],
    out: &mut [f32],
) {
    let count = weights.len();
    assert!(xs.len() == ROWS && out.len() == ROWS && xs.iter().all(|x| x.len() == count));
    let mut sums = [_mm256_setzero_ps(); ROWS];
    let mut shifts = [_mm_setzero_ps(); ROWS];
    for (index, block) in weights.iter().enumerate() {
        fetch_block(block);
        let (scales, offsets) = unpacked(block.parts());
        let (scale, offset) = (widened(block.scale()), widened(block.offset()));
        // SAFETY: there are 8 offsets
        let offsets = unsafe { _mm_cvtepu8_epi16(_mm_loadl_epi64(offsets.as_ptr().cast())) };
        let mut whole = [_mm256_setzero_si256(); ROWS];
        for pair in 0..4 {
            // SAFETY: pair is below 4
            let [first, second] = unsafe { block.pair(pair) };
            let first_scale = _mm256_set1_epi16(i16::from(scales[2 * pair]));
            let second_scale = _mm256_set1_epi16(i16::from(scales[2 * pair + 1]));
            for (whole, x) in whole.iter_mut().zip(xs) {
                let values = x[index].values.as_ptr();
                // SAFETY: 64 values from 64 · pair on, of 256
                let (x, next) = unsafe {
                    (
                        _mm256_loadu_si256(values.add(64 * pair).cast()),
                        _mm256_loadu_si256(values.add(64 * pair + 32).cast()),
                    )
                };
                // q ≤ 31, |x| ≤ 127: sums of two stay below 2¹³
                let pairs = _mm256_madd_epi16(_mm256_maddubs_epi16(first, x), first_scale);
                let more = _mm256_madd_epi16(_mm256_maddubs_epi16(second, next), second_scale);
                *whole = _mm256_add_epi32(*whole, _mm256_add_epi32(pairs, more));
            }
        }
        for row in 0..ROWS {
            let x = &xs[row][index];
            let step = _mm256_set1_ps(scale * x.scale);
            sums[row] = _mm256_fmadd_ps(step, _mm256_cvtepi32_ps(whole[row]), sums[row]);
            // SAFETY: the processor has AVX2, as this function asks
            let shifted = _mm_madd_epi16(offsets, unsafe { part_sums(x) });
            let step = _mm_set1_ps(offset * x.scale);
            shifts[row] = _mm_fmadd_ps(step, _mm_cvtepi32_ps(shifted), shifts[row]);
        }
    }
    for ((out, sum), shift) in out.iter_mut().zip(sums).zip(shifts) {
        let shift = _mm256_zextps128_ps256(shift);
        *out = horizontal(_mm256_sub_ps(sum, shift));
    }
}

/// `ROWS` products of blocks of 6 bits.
///
/// # Safety
/// The processor has AVX2, FMA and F16C.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn six_bits<const ROWS: usize>(weights: &[Q6K], xs: &[&[WideInput]], out: &mut [f32]) {
    let count = weights.len();
    assert!(xs.len() == ROWS && out.len() == ROWS && xs.iter().all(|x| x.len() == count));
    let two_bits = _mm256_set1_epi8(0x30);
    let mut sums = [_mm256_setzero_ps(); ROWS];
    for (index, block) in weights.iter().enumerate() {
        fetch_block(block);
        // SAFETY: there are 16 scales
        let parts = unsafe { _mm256_cvtepi8_epi16(_mm_loadu_si128(block.parts.as_ptr().cast())) };
        let mut scales = [0i16; 16];
        // SAFETY: room for 16 numbers of 2 bytes
        unsafe { _mm256_storeu_si256(scales.as_mut_ptr().cast(), parts) };
        let mut whole = [_mm256_setzero_si256(); ROWS];
        for half in 0..2 {
            // SAFETY: half a block has 64 bytes of lower bits and 32 of upper ones
            let (low, next, high) = unsafe {
                let low = block.quants.as_ptr().add(64 * half);
                (
                    halves(_mm256_loadu_si256(low.cast())),
                    halves(_mm256_loadu_si256(low.add(32).cast())),
                    _mm256_loadu_si256(block.high.as_ptr().add(32 * half).cast()),
                )
            };
            let quarters = [
                _mm256_or_si256(
                    low[0],
                    _mm256_and_si256(_mm256_slli_epi16(high, 4), two_bits),
                ),
                _mm256_or_si256(
                    next[0],
                    _mm256_and_si256(_mm256_slli_epi16(high, 2), two_bits),
                ),
                _mm256_or_si256(low[1], _mm256_and_si256(high, two_bits)),
                _mm256_or_si256(
                    next[1],
                    _mm256_and_si256(_mm256_srli_epi16(high, 2), two_bits),
                ),
            ];
            for (quarter, q) in quarters.into_iter().enumerate() {
                let part = 8 * half + 2 * quarter;
                let scale = _mm256_set_m128i(
                    _mm_set1_epi16(scales[part + 1]),
                    _mm_set1_epi16(scales[part]),
                );
                for (whole, x) in whole.iter_mut().zip(xs) {
                    let values = x[index].values.as_ptr();
                    // SAFETY: 32 values from 16 · part on, of 256
                    let x = unsafe { _mm256_loadu_si256(values.add(16 * part).cast()) };
                    // q ≤ 63, |x| ≤ 127: sums of two stay below 2¹⁴
                    let pairs = _mm256_madd_epi16(_mm256_maddubs_epi16(q, x), scale);
                    *whole = _mm256_add_epi32(*whole, pairs);
                }
            }
        }
        let step = widened(block.scale);
        for row in 0..ROWS {
            let x = &xs[row][index];
            // SAFETY: 16 sums of 2 bytes
            let sixteens = unsafe { _mm256_loadu_si256(x.sums.as_ptr().cast()) };
            // each quant is kept 32 too large
            let excess = _mm256_slli_epi32(_mm256_madd_epi16(parts, sixteens), 5);
            let whole = _mm256_cvtepi32_ps(_mm256_sub_epi32(whole[row], excess));
            sums[row] = _mm256_fmadd_ps(_mm256_set1_ps(step * x.scale), whole, sums[row]);
        }
    }
    for (out, sum) in out.iter_mut().zip(sums) {
        *out = horizontal(sum);
    }
}

/// An f16 in f32.
#[inline]
#[target_feature(enable = "f16c")]
pub(super) fn widened(x: f16) -> f32 {
    _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(i32::from(x.to_bits()))))
}

/// The sum of the eight numbers.
#[inline]
#[target_feature(enable = "avx2")]
fn horizontal(x: __m256) -> f32 {
    let four = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)))
}
