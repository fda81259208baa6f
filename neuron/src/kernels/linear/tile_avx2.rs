//! Many rows of x times panels of weights, on processors with AVX2, FMA and F16C.
//!
//! A panel is [`PANEL`] rows of weights over [`Panelled::DEPTH`] inputs, widened once and laid as the kernel reads it; x is
//! laid likewise, [`GROUP`] rows at a time. The kernel holds the sums of one group and one panel in registers (the
//! scheme of Goto and van de Geijn, "Anatomy of High-Performance Matrix Multiplication", 2008).
//!
//! Single numbers meet x in f32. Blocks meet it in whole numbers: the weights exactly, times the scales of their parts, and
//! x in 15 bits for every 32 inputs, so that a sum over these stays below 2³¹; from there on it is f32. That
//! multiplies twice as many numbers at once, and what x loses is far below what the weights have lost.
#![allow(unsafe_code)]

use super::Columns;
use super::dot_avx2::{Widen, widened};
use crate::kernels::vectorised;
use crate::quant::k_quants::{nearest, unpacked};
use crate::quant::{Q4K, Q5K, Q6K, Q8Block, Unit};
use half::{bf16, f16};
use rayon::prelude::*;
use std::arch::x86_64::*;
use std::ops::Range;

/// Rows of weights in a panel: two vectors.
const PANEL: usize = 16;
/// Rows of x that meet a panel at once: with two vectors each, twelve sums in sixteen registers.
const GROUP: usize = 6;
/// Numbers in a vector.
const LANES: usize = 8;
/// Inputs that share a scale in whole numbers.
const PART: usize = 32;
/// Pairs of inputs in a part: the processor adds two products of 16 bits at once.
const PAIRS: usize = PART / 2;
/// Largest whole number of x: 128 · 32, the largest of a weight times its scale, times this, times 32, is below 2³¹.
const TOP: f32 = 16383.0;

/// The products of a group with a panel: row of x, row of weights.
type Sums = [[f32; PANEL]; GROUP];

/// Rows of x that stand together.
#[derive(Clone, Copy)]
pub(super) struct Group {
    /// The first of them.
    first: usize,
    /// How many, at most [`GROUP`].
    count: usize,
}

/// Weights that a kernel meets in panels.
pub(super) trait Panelled: Unit {
    /// Inputs of a panel, such that it stays in the first cache; a multiple of [`Unit::LEN`].
    const DEPTH: usize;
    /// x as the kernel reads it.
    type Inputs: Sync;
    /// A panel as the kernel reads it.
    type Panel: Default + Send;

    /// x, (rows, width).
    fn pack(x: &[f32], rows: usize, width: usize) -> Self::Inputs;

    /// Fills `panel` with what `rows` have for `inputs`.
    ///
    /// # Safety
    /// The processor has AVX2, FMA and F16C.
    unsafe fn widen(rows: &[&[Self]; PANEL], inputs: Range<usize>, panel: &mut Self::Panel);

    /// The products of the panel, which is that of `inputs`, with a group.
    ///
    /// # Safety
    /// As [`Self::widen`].
    unsafe fn multiply(
        panel: &Self::Panel,
        x: &Self::Inputs,
        group: Group,
        inputs: Range<usize>,
        sums: &mut Sums,
    );
}

/// `x · Wᵀ` for x `(rows, width)`: `(rows, out)`. Only where `has_avx2`.
pub(super) fn product<W: Panelled>(
    x: &[f32],
    rows: usize,
    weights: &[W],
    width: usize,
) -> Vec<f32> {
    let units = width / W::LEN;
    let out = weights.len() / units.max(1);
    let x = W::pack(x, rows, width);
    let mut product = vec![0.0; rows * out];
    let columns = Columns(product.as_mut_ptr());
    let tasks = (0..out.div_ceil(PANEL)).into_par_iter();
    tasks.for_each_init(W::Panel::default, |panel, index| {
        let first = index * PANEL;
        let count = PANEL.min(out - first);
        // what a panel lacks is filled up with its last row, whose products are then left out
        let own =
            std::array::from_fn(|row| &weights[(first + row.min(count - 1)) * units..][..units]);
        for start in (0..width).step_by(W::DEPTH) {
            let inputs = start..(start + W::DEPTH).min(width);
            // SAFETY: this function is called only where `has_avx2`
            unsafe { W::widen(&own, inputs.clone(), panel) };
            for group in (0..rows).step_by(GROUP).map(|first| Group::of(first, rows)) {
                let mut sums = [[0.0; PANEL]; GROUP];
                // SAFETY: as above
                unsafe { W::multiply(panel, &x, group, inputs.clone(), &mut sums) };
                for (row, sums) in sums.iter().take(group.count).enumerate() {
                    let to = columns.from((group.first + row) * out + first);
                    // SAFETY: the product is (rows, out), and this task alone touches its columns first..first + count
                    let to = unsafe { std::slice::from_raw_parts_mut(to, count) };
                    for (to, sum) in to.iter_mut().zip(sums) {
                        *to += sum;
                    }
                }
            }
        }
    });
    product
}

impl Group {
    fn of(first: usize, rows: usize) -> Self {
        Self {
            first,
            count: GROUP.min(rows - first),
        }
    }
}

/// Calls a kernel compiled for the number of rows in a group.
macro_rules! for_group {
    ($count:expr, $kernel:ident $(, $constant:expr)?; $arguments:tt) => {
        match $count {
            1 => $kernel::<1 $(, $constant)?> $arguments,
            2 => $kernel::<2 $(, $constant)?> $arguments,
            3 => $kernel::<3 $(, $constant)?> $arguments,
            4 => $kernel::<4 $(, $constant)?> $arguments,
            5 => $kernel::<5 $(, $constant)?> $arguments,
            GROUP => $kernel::<6 $(, $constant)?> $arguments,
            rows => unreachable!("a group of {rows} rows"),
        }
    };
}

/// x in f32: of each group, for every input, its rows side by side.
pub(super) struct WideInputs {
    numbers: Vec<f32>,
    width: usize,
}

macro_rules! panels_of_single_numbers {
    ($($kind:ty),*) => {$(
        impl Panelled for $kind {
            const DEPTH: usize = 256;
            type Inputs = WideInputs;
            /// For every input the weights of all rows.
            type Panel = Vec<f32>;

            fn pack(x: &[f32], rows: usize, width: usize) -> WideInputs {
                let mut numbers = vec![0.0; rows * width];
                let size = GROUP * width.max(1);
                numbers.par_chunks_mut(size).zip(x.par_chunks(size)).for_each(|(out, x)| {
                    let count = x.len() / width;
                    for (row, x) in x.chunks_exact(width).enumerate() {
                        for (out, x) in out.chunks_exact_mut(count).zip(x) {
                            out[row] = *x;
                        }
                    }
                });
                WideInputs { numbers, width }
            }

            unsafe fn widen(rows: &[&[Self]; PANEL], inputs: Range<usize>, panel: &mut Vec<f32>) {
                panel.resize(PANEL * Self::DEPTH, 0.0);
                // SAFETY: as this function asks
                unsafe { widen_single(rows, inputs, panel) };
            }

            unsafe fn multiply(
                panel: &Vec<f32>,
                x: &WideInputs,
                group: Group,
                inputs: Range<usize>,
                sums: &mut Sums,
            ) {
                let x = &x.numbers[group.first * x.width..];
                let x = &x[inputs.start * group.count..inputs.end * group.count];
                // SAFETY: as this function asks
                unsafe { for_group!(group.count, wide_tile; (panel, x, sums)) }
            }
        }
    )*};
}
panels_of_single_numbers!(f32, f16, bf16);

/// # Safety
/// The processor has AVX2, FMA and F16C.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn widen_single<W: Widen>(rows: &[&[W]; PANEL], inputs: Range<usize>, panel: &mut [f32]) {
    let depth = inputs.len();
    assert!(panel.len() >= depth * PANEL && rows.iter().all(|row| row.len() >= inputs.end));
    for (half, rows) in rows.as_chunks::<LANES>().0.iter().enumerate() {
        let mut at = 0;
        while at + LANES <= depth {
            // SAFETY: LANES numbers from there on are within each row
            let wide = std::array::from_fn(|row| unsafe {
                let numbers = W::widen(rows[row].as_ptr().add(inputs.start + at));
                _mm256_castps_si256(numbers)
            });
            for (input, column) in transposed(wide).into_iter().enumerate() {
                let to = panel[(at + input) * PANEL + half * LANES..][..LANES].as_mut_ptr();
                // SAFETY: there are LANES numbers
                unsafe { _mm256_storeu_ps(to, _mm256_castsi256_ps(column)) };
            }
            at += LANES;
        }
        for at in at..depth {
            for (row, numbers) in rows.iter().enumerate() {
                panel[at * PANEL + half * LANES + row] = numbers[inputs.start + at].to_f32();
            }
        }
    }
}

/// # Safety
/// The processor has AVX2 and FMA.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn wide_tile<const ROWS: usize>(panel: &[f32], x: &[f32], sums: &mut Sums) {
    let mut tile = [[_mm256_setzero_ps(); 2]; ROWS];
    let (x, _) = x.as_chunks::<ROWS>();
    let (panel, _) = panel.as_chunks::<PANEL>();
    for (x, weights) in x.iter().zip(panel) {
        // SAFETY: there are two vectors of weights
        let (low, high) = unsafe {
            (
                _mm256_loadu_ps(weights.as_ptr()),
                _mm256_loadu_ps(weights.as_ptr().add(LANES)),
            )
        };
        for (tile, x) in tile.iter_mut().zip(x) {
            let x = _mm256_set1_ps(*x);
            tile[0] = _mm256_fmadd_ps(low, x, tile[0]);
            tile[1] = _mm256_fmadd_ps(high, x, tile[1]);
        }
    }
    store(&tile, sums);
}

#[inline]
#[target_feature(enable = "avx2")]
fn store<const ROWS: usize>(tile: &[[__m256; 2]; ROWS], sums: &mut Sums) {
    for (sums, tile) in sums.iter_mut().zip(tile) {
        // SAFETY: there is room for two vectors
        unsafe {
            _mm256_storeu_ps(sums.as_mut_ptr(), tile[0]);
            _mm256_storeu_ps(sums.as_mut_ptr().add(LANES), tile[1]);
        }
    }
}

/// Rows become columns.
#[inline]
#[target_feature(enable = "avx2")]
fn transposed(rows: [__m256i; LANES]) -> [__m256i; LANES] {
    let [a, b, c, d, e, f, g, h] = rows;
    let pairs = |a, b| (_mm256_unpacklo_epi32(a, b), _mm256_unpackhi_epi32(a, b));
    let fours = |a, b| (_mm256_unpacklo_epi64(a, b), _mm256_unpackhi_epi64(a, b));
    let ((ab, ab_high), (cd, cd_high)) = (pairs(a, b), pairs(c, d));
    let ((ef, ef_high), (gh, gh_high)) = (pairs(e, f), pairs(g, h));
    let ((a, b), (c, d)) = (fours(ab, cd), fours(ab_high, cd_high)); // of rows 0 to 3: columns 0 and 4, 1 and 5, …
    let ((e, f), (g, h)) = (fours(ef, gh), fours(ef_high, gh_high));
    let low = |a, b| _mm256_permute2x128_si256(a, b, 0x20);
    let high = |a, b| _mm256_permute2x128_si256(a, b, 0x31);
    [
        low(a, e),
        low(b, f),
        low(c, g),
        low(d, h),
        high(a, e),
        high(b, f),
        high(c, g),
        high(d, h),
    ]
}

/// x in whole numbers: of each group, for every part and every pair of inputs, its rows side by side.
pub(super) struct WholeInputs {
    pairs: Vec<[i16; 2]>,
    /// Of every part: what one is worth.
    scales: Vec<f32>,
    /// Of every part: the sum of its inputs, as they were rounded.
    sums: Vec<f32>,
    width: usize,
}

/// A panel in whole numbers.
#[derive(Default)]
pub(super) struct WholePanel {
    /// For every pair of inputs the weights of all rows.
    pairs: Vec<[i16; 2]>,
    /// For every part, of all rows, what one is worth.
    scales: Vec<f32>,
    /// For every part, of all rows, what is to be taken from every weight.
    offsets: Vec<f32>,
}

/// Blocks in whole numbers: a weight is `scale · value − offset`.
trait Whole: Unit {
    /// Whether there are offsets.
    const OFFSETS: bool;

    /// The values of a block, and for each of its parts of 32 the scale and the offset.
    ///
    /// # Safety
    /// The processor has AVX2, FMA and F16C.
    unsafe fn whole(&self, values: &mut [i16], scales: &mut [f32], offsets: &mut [f32]);
}

impl Whole for Q8Block {
    const OFFSETS: bool = false;

    #[inline(always)]
    unsafe fn whole(&self, values: &mut [i16], scales: &mut [f32], _: &mut [f32]) {
        for (value, own) in values.iter_mut().zip(self.values) {
            *value = own.into();
        }
        // SAFETY: as this function asks
        scales[0] = unsafe { widened(self.scale) };
    }
}

impl Whole for Q6K {
    const OFFSETS: bool = false;

    #[inline(always)]
    unsafe fn whole(&self, values: &mut [i16], scales: &mut [f32], _: &mut [f32]) {
        let quants = self.quants();
        let parts = values.chunks_exact_mut(16).zip(quants.chunks_exact(16));
        for ((values, quants), part) in parts.zip(self.parts) {
            for (value, q) in values.iter_mut().zip(quants) {
                *value = i16::from(*q) * i16::from(part);
            }
        }
        // SAFETY: as this function asks
        scales.fill(unsafe { widened(self.scale) });
    }
}

macro_rules! whole_with_offsets {
    ($($kind:ty),*) => {$(
        impl Whole for $kind {
            const OFFSETS: bool = true;

            #[inline(always)]
            unsafe fn whole(&self, values: &mut [i16], scales: &mut [f32], offsets: &mut [f32]) {
                let quants = self.quants();
                let (parts, shifts) = unpacked(&self.parts);
                let both = values.chunks_exact_mut(PART).zip(quants.chunks_exact(PART));
                for ((values, quants), part) in both.zip(parts) {
                    for (value, q) in values.iter_mut().zip(quants) {
                        *value = i16::from(*q) * i16::from(part);
                    }
                }
                // SAFETY: as this function asks
                let (scale, offset) = unsafe { (widened(self.scale), widened(self.offset)) };
                scales.fill(scale);
                for (to, shift) in offsets.iter_mut().zip(shifts) {
                    *to = offset * f32::from(shift);
                }
            }
        }
    )*};
}
whole_with_offsets!(Q4K, Q5K);

macro_rules! panels_of_blocks {
    ($($kind:ty),*) => {$(
        impl Panelled for $kind {
            const DEPTH: usize = 512;
            type Inputs = WholeInputs;
            type Panel = WholePanel;

            fn pack(x: &[f32], rows: usize, width: usize) -> WholeInputs {
                WholeInputs::pack(x, rows, width)
            }

            unsafe fn widen(rows: &[&[Self]; PANEL], inputs: Range<usize>, panel: &mut WholePanel) {
                panel.pairs.resize(PANEL * Self::DEPTH / 2, [0; 2]);
                panel.scales.resize(PANEL * Self::DEPTH / PART, 0.0);
                panel.offsets.resize(PANEL * Self::DEPTH / PART, 0.0);
                // SAFETY: as this function asks
                unsafe { widen_blocks(rows, inputs, panel) };
            }

            unsafe fn multiply(
                panel: &WholePanel,
                x: &WholeInputs,
                group: Group,
                inputs: Range<usize>,
                sums: &mut Sums,
            ) {
                const OFFSETS: bool = <$kind as Whole>::OFFSETS;
                // SAFETY: as this function asks
                unsafe { for_group!(group.count, whole_tile, OFFSETS; (panel, x, group, inputs, sums)) }
            }
        }
    )*};
}
panels_of_blocks!(Q8Block, Q6K, Q5K, Q4K);

impl WholeInputs {
    fn pack(x: &[f32], rows: usize, width: usize) -> Self {
        let (pairs, parts) = (width / 2, width / PART);
        let mut packed = Self {
            pairs: vec![[0; 2]; rows * pairs],
            scales: vec![0.0; rows * parts],
            sums: vec![0.0; rows * parts],
            width,
        };
        let groups = packed.pairs.par_chunks_mut(GROUP * pairs.max(1));
        let groups = groups
            .zip(packed.scales.par_chunks_mut(GROUP * parts.max(1)))
            .zip(packed.sums.par_chunks_mut(GROUP * parts.max(1)))
            .zip(x.par_chunks(GROUP * width.max(1)));
        groups.for_each(|(((pairs, scales), sums), x)| {
            let count = x.len() / width;
            for (row, x) in x.chunks_exact(width).enumerate() {
                for (part, x) in x.as_chunks::<PART>().0.iter().enumerate() {
                    let (scale, values) = vectorised(
                        #[inline(always)]
                        || fifteen_bits(x),
                    );
                    let at = part * count + row;
                    scales[at] = scale;
                    sums[at] =
                        scale * values.iter().map(|value| i32::from(*value)).sum::<i32>() as f32;
                    let to = &mut pairs[part * PAIRS * count..][..PAIRS * count];
                    for (to, pair) in to.chunks_exact_mut(count).zip(values.as_chunks::<2>().0) {
                        to[row] = *pair;
                    }
                }
            }
        });
        packed
    }
}

/// Numbers in 15 bits, and their scale.
#[inline(always)]
fn fifteen_bits(numbers: &[f32; PART]) -> (f32, [i16; PART]) {
    let mut largest = [0f32; LANES];
    for numbers in numbers.chunks_exact(LANES) {
        for (top, x) in largest.iter_mut().zip(numbers) {
            *top = top.max(x.abs());
        }
    }
    let largest = largest.into_iter().fold(0f32, f32::max);
    let inverse = if largest > 0.0 { TOP / largest } else { 0.0 };
    (
        largest / TOP,
        numbers.map(|x| nearest(x * inverse) as i32 as i16),
    )
}

/// # Safety
/// The processor has AVX2, FMA and F16C.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn widen_blocks<W: Whole>(
    rows: &[&[W]; PANEL],
    inputs: Range<usize>,
    panel: &mut WholePanel,
) {
    /// Numbers of the longest block.
    const LONGEST: usize = 256;
    let parts = W::LEN / PART;
    let units = inputs.start / W::LEN..inputs.end / W::LEN;
    for (index, unit) in units.enumerate() {
        for (half, rows) in rows.as_chunks::<LANES>().0.iter().enumerate() {
            let mut values = [[0; LONGEST]; LANES];
            for (row, (units, values)) in rows.iter().zip(&mut values).enumerate() {
                let (mut scales, mut offsets) = ([0.0; LONGEST / PART], [0.0; LONGEST / PART]);
                let (scales, offsets) = (&mut scales[..parts], &mut offsets[..parts]);
                // SAFETY: as this function asks
                unsafe { units[unit].whole(&mut values[..W::LEN], scales, offsets) };
                for part in 0..parts {
                    let at = (index * parts + part) * PANEL + half * LANES + row;
                    panel.scales[at] = scales[part];
                    if W::OFFSETS {
                        panel.offsets[at] = offsets[part];
                    }
                }
            }
            for at in (0..W::LEN).step_by(2 * LANES) {
                let wide = std::array::from_fn(|row| {
                    let values = values[row][at..][..2 * LANES].as_ptr();
                    // SAFETY: there are as many values
                    unsafe { _mm256_loadu_si256(values.cast()) }
                });
                for (pair, column) in transposed(wide).into_iter().enumerate() {
                    let pair = (index * W::LEN + at) / 2 + pair;
                    let to = panel.pairs[pair * PANEL + half * LANES..][..LANES].as_mut_ptr();
                    // SAFETY: there is room for LANES pairs of 2 · 16 bits
                    unsafe { _mm256_storeu_si256(to.cast(), column) };
                }
            }
        }
    }
}

/// # Safety
/// The processor has AVX2 and FMA.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn whole_tile<const ROWS: usize, const OFFSETS: bool>(
    panel: &WholePanel,
    x: &WholeInputs,
    group: Group,
    inputs: Range<usize>,
    sums: &mut Sums,
) {
    let (pairs, parts) = (x.width / 2, x.width / PART);
    let own = inputs.start / PART * ROWS..inputs.end / PART * ROWS;
    let (x_scales, _) = x.scales[group.first * parts..][own.clone()].as_chunks::<ROWS>();
    let (x_sums, _) = x.sums[group.first * parts..][own].as_chunks::<ROWS>();
    let own = inputs.start / 2 * ROWS..inputs.end / 2 * ROWS;
    let (x, _) = x.pairs[group.first * pairs..][own].as_chunks::<ROWS>();
    let (x, _) = x.as_chunks::<PAIRS>();
    let (weights, _) = panel.pairs.as_chunks::<PANEL>();
    let (weights, _) = weights.as_chunks::<PAIRS>();
    let (scales, _) = panel.scales.as_chunks::<PANEL>();
    let (offsets, _) = panel.offsets.as_chunks::<PANEL>();
    let count = x.len();
    assert!(x_scales.len() == count && x_sums.len() == count);
    assert!(weights.len() >= count && scales.len() >= count && offsets.len() >= count);
    let mut tile = [[_mm256_setzero_ps(); 2]; ROWS];
    for part in 0..count {
        let mut whole = [[_mm256_setzero_si256(); 2]; ROWS];
        for (x, weights) in x[part].iter().zip(&weights[part]) {
            // SAFETY: there are PANEL pairs of weights: two vectors
            let (low, high) = unsafe {
                let weights: *const __m256i = weights.as_ptr().cast();
                (
                    _mm256_loadu_si256(weights),
                    _mm256_loadu_si256(weights.add(1)),
                )
            };
            for (whole, [even, odd]) in whole.iter_mut().zip(x) {
                let both = i32::from(*even) & 0xffff | i32::from(*odd) << 16;
                let x = _mm256_set1_epi32(both);
                whole[0] = _mm256_add_epi32(whole[0], _mm256_madd_epi16(low, x));
                whole[1] = _mm256_add_epi32(whole[1], _mm256_madd_epi16(high, x));
            }
        }
        for half in 0..2 {
            // SAFETY: there are PANEL scales and offsets: two vectors
            let (scale, offset) = unsafe {
                (
                    _mm256_loadu_ps(scales[part].as_ptr().add(half * LANES)),
                    _mm256_loadu_ps(offsets[part].as_ptr().add(half * LANES)),
                )
            };
            for row in 0..ROWS {
                let sum = &mut tile[row][half];
                let step = _mm256_mul_ps(scale, _mm256_set1_ps(x_scales[part][row]));
                *sum = _mm256_fmadd_ps(step, _mm256_cvtepi32_ps(whole[row][half]), *sum);
                if OFFSETS {
                    *sum = _mm256_fnmadd_ps(offset, _mm256_set1_ps(x_sums[part][row]), *sum);
                }
            }
        }
    }
    store(&tile, sums);
}
