//! Many rows of x times panels of weights, on processors with AVX2, FMA and F16C.
//!
//! A panel is [`PANEL`] rows of weights over [`Panelled::DEPTH`] inputs, unpacked once and laid as the kernel reads it; x is
//! laid likewise, [`Panelled::GROUP`] rows at a time. The kernel holds the sums of one group and one panel in registers
//! (the scheme of Goto and van de Geijn, "Anatomy of High-Performance Matrix Multiplication", 2008).
//!
//! Single numbers meet x in f32. Blocks meet it in whole numbers, as where rows are few: x in 8 bits with a scale for every
//! 32 inputs, whole sums over these, and f32 from there on.
#![allow(unsafe_code)]

use super::Columns;
use super::dot_avx2::{Offsets, Widen, halves, widened};
use crate::quant::k_quants::unpacked;
use crate::quant::{Q4K, Q5K, Q6K, Q8Block, Unit};
use half::{bf16, f16};
use rayon::prelude::*;
use std::arch::x86_64::*;
use std::ops::Range;

/// Rows of weights in a panel: two vectors.
const PANEL: usize = 16;
/// The most rows of x that meet a panel at once: with two vectors each, twelve sums in sixteen registers.
const GROUP: usize = 6;
/// Numbers in a vector.
const LANES: usize = 8;
/// Inputs of x that share a scale in whole numbers.
const PART: usize = 32;
/// Inputs that lie together: a lane of 32 bits has as many weights of a row.
const QUAD: usize = 4;
/// Such of a part.
const QUADS: usize = PART / QUAD;

/// The products of a group with a panel: row of x, row of weights.
type Sums = [[f32; PANEL]; GROUP];

/// Rows of x that stand together.
#[derive(Clone, Copy)]
pub(super) struct Group {
    /// The first of them.
    first: usize,
    /// How many, at most [`Panelled::GROUP`].
    count: usize,
}

/// Weights that a kernel meets in panels.
pub(super) trait Panelled: Unit {
    /// Inputs of a panel, such that it stays in the first cache; a multiple of [`Unit::LEN`].
    const DEPTH: usize;
    /// Rows of x that meet a panel at once, at most [`GROUP`].
    const GROUP: usize;
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
            for row in (first + PANEL..out).take(PANEL) {
                let row = &weights[row * units..][..units];
                fetch(&row[inputs.start / W::LEN..inputs.end / W::LEN]);
            }
            for begin in (0..rows).step_by(W::GROUP) {
                let group = Group {
                    first: begin,
                    count: W::GROUP.min(rows - begin),
                };
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

/// Begins to bring `weights` into the second cache: panels jump from row to row, which the processor does not foresee.
fn fetch<W>(weights: &[W]) {
    const LINE: usize = 64;
    let start: *const i8 = weights.as_ptr().cast();
    for at in (0..size_of_val(weights)).step_by(LINE) {
        // SAFETY: the address is within the weights, and nothing is read
        unsafe { _mm_prefetch(start.wrapping_add(at), _MM_HINT_T1) };
    }
}

/// Calls a kernel compiled for the number of rows in a group.
macro_rules! for_group {
    ($count:expr, $kernel:ident $(, $type:ty)?; $arguments:tt) => {
        match $count {
            1 => $kernel::<1 $(, $type)?> $arguments,
            2 => $kernel::<2 $(, $type)?> $arguments,
            3 => $kernel::<3 $(, $type)?> $arguments,
            4 => $kernel::<4 $(, $type)?> $arguments,
            5 => $kernel::<5 $(, $type)?> $arguments,
            GROUP => $kernel::<6 $(, $type)?> $arguments,
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
            const GROUP: usize = GROUP;
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

/// x in whole numbers: of each group, for every part and every quad of inputs, its rows side by side.
pub(super) struct WholeInputs {
    quads: Vec<[i8; QUAD]>,
    /// Of every part: what one is worth.
    scales: Vec<f32>,
    /// Of every part: the sum of its inputs, as they were rounded.
    sums: Vec<f32>,
    width: usize,
}

/// A panel in whole numbers.
#[derive(Default)]
pub(super) struct WholePanel {
    /// For every quad of inputs the weights of all rows.
    quads: Vec<[u8; QUAD]>,
    /// For every part, of all rows, what one is worth.
    scales: Vec<f32>,
    /// For every part, of all rows, what is to be taken from every weight.
    offsets: Vec<f32>,
    /// For every half of a part, of all rows, twice what its weights are multiplied with, where halves differ.
    halves: Vec<[i16; 2]>,
}

/// Blocks in whole numbers: a weight is `scale · half · value − offset`.
trait Whole: Unit {
    /// Whether values have signs, with sizes of at most 128; else they are below 32.
    const SIGNED: bool;
    /// How many sums of two products with x of 8 bits, of at most 127, stay below 2¹⁵: 1, 4 or 8.
    const ADDED: usize;
    /// Whether the halves of a part have factors of their own.
    const HALVES: bool;
    /// Whether there are offsets.
    const OFFSETS: bool;

    /// The values of a part of 32, in a byte each.
    ///
    /// # Safety
    /// The block has that part, and the processor has AVX2, FMA and F16C.
    unsafe fn part(&self, part: usize) -> __m256i;

    /// For each part its scale, its offset and the factors of its halves.
    ///
    /// # Safety
    /// The processor has AVX2, FMA and F16C.
    unsafe fn factors(&self, factors: &mut [Factors]);
}

/// What a part's values are multiplied with and what is taken from them.
#[derive(Clone, Copy, Default)]
struct Factors {
    scale: f32,
    offset: f32,
    halves: [i16; 2],
}

impl Whole for Q8Block {
    const SIGNED: bool = true;
    const ADDED: usize = 1;
    const HALVES: bool = false;
    const OFFSETS: bool = false;

    #[inline(always)]
    unsafe fn part(&self, _: usize) -> __m256i {
        // SAFETY: there are 32 values
        unsafe { _mm256_loadu_si256(self.values.as_ptr().cast()) }
    }

    #[inline(always)]
    unsafe fn factors(&self, factors: &mut [Factors]) {
        // SAFETY: as this function asks
        factors[0].scale = unsafe { widened(self.scale) };
    }
}

impl Whole for Q6K {
    const SIGNED: bool = true; // from −32 to 31
    const ADDED: usize = 4;
    const HALVES: bool = true;
    const OFFSETS: bool = false;

    #[inline(always)]
    unsafe fn part(&self, part: usize) -> __m256i {
        let (half, quarter) = (part / 4, part % 4);
        // SAFETY: half a block has 64 bytes of lower bits, of which quarters 0 and 2 share the first 32, and 32 of upper ones
        unsafe {
            let low = self.quants.as_ptr().add(64 * half + 32 * (quarter % 2));
            let high = self.high.as_ptr().add(32 * half);
            let shift = _mm_cvtsi32_si128(2 * quarter as i32);
            let high = _mm256_srl_epi16(_mm256_loadu_si256(high.cast()), shift);
            let high = _mm256_slli_epi16(_mm256_and_si256(high, _mm256_set1_epi8(3)), 4);
            let low = halves(_mm256_loadu_si256(low.cast()))[quarter / 2];
            _mm256_sub_epi8(_mm256_or_si256(low, high), _mm256_set1_epi8(32))
        }
    }

    #[inline(always)]
    unsafe fn factors(&self, factors: &mut [Factors]) {
        // SAFETY: as this function asks
        let scale = unsafe { widened(self.scale) };
        for (factors, halves) in factors.iter_mut().zip(self.parts.as_chunks::<2>().0) {
            factors.scale = scale;
            factors.halves = halves.map(i16::from);
        }
    }
}

macro_rules! whole_with_offsets {
    ($($kind:ty => $added:literal),*) => {$(
        impl Whole for $kind {
            const SIGNED: bool = false;
            const ADDED: usize = $added;
            const HALVES: bool = false;
            const OFFSETS: bool = true;

            #[inline(always)]
            unsafe fn part(&self, part: usize) -> __m256i {
                // SAFETY: as this function asks; the other of the pair costs little and is mostly not computed
                unsafe { self.pair(part / 2)[part % 2] }
            }

            #[inline(always)]
            unsafe fn factors(&self, factors: &mut [Factors]) {
                let (scales, offsets) = unpacked(&self.parts);
                // SAFETY: as this function asks
                let (scale, offset) = unsafe { (widened(self.scale), widened(self.offset)) };
                for ((factors, part), shift) in factors.iter_mut().zip(scales).zip(offsets) {
                    factors.scale = scale * f32::from(part);
                    factors.offset = offset * f32::from(shift);
                }
            }
        }
    )*};
}
// 2 · 15 · 127 · 8 and 2 · 31 · 127 · 4 are below 2¹⁵
whole_with_offsets!(Q4K => 8, Q5K => 4);

macro_rules! panels_of_blocks {
    ($($kind:ty),*) => {$(
        impl Panelled for $kind {
            const DEPTH: usize = 1024;
            const GROUP: usize = 4;
            type Inputs = WholeInputs;
            type Panel = WholePanel;

            fn pack(x: &[f32], rows: usize, width: usize) -> WholeInputs {
                WholeInputs::pack(x, rows, width, Self::GROUP)
            }

            unsafe fn widen(rows: &[&[Self]; PANEL], inputs: Range<usize>, panel: &mut WholePanel) {
                let parts = PANEL * Self::DEPTH / PART;
                panel.quads.resize(parts * QUADS, [0; QUAD]);
                panel.scales.resize(parts, 0.0);
                panel.offsets.resize(parts, 0.0);
                panel.halves.resize(2 * parts, [1; 2]);
                // SAFETY: as this function asks
                unsafe { unpack(rows, inputs, panel) };
            }

            unsafe fn multiply(
                panel: &WholePanel,
                x: &WholeInputs,
                group: Group,
                inputs: Range<usize>,
                sums: &mut Sums,
            ) {
                // SAFETY: as this function asks
                unsafe { for_group!(group.count, whole_tile, Self; (panel, x, group, inputs, sums)) }
            }
        }
    )*};
}
panels_of_blocks!(Q8Block, Q6K, Q5K, Q4K);

impl WholeInputs {
    fn pack(x: &[f32], rows: usize, width: usize, group: usize) -> Self {
        let (quads, parts) = (width / QUAD, width / PART);
        let mut packed = Self {
            quads: vec![[0; QUAD]; rows * quads],
            scales: vec![0.0; rows * parts],
            sums: vec![0.0; rows * parts],
            width,
        };
        let groups = packed.quads.par_chunks_mut(group * quads.max(1));
        let groups = groups
            .zip(packed.scales.par_chunks_mut(group * parts.max(1)))
            .zip(packed.sums.par_chunks_mut(group * parts.max(1)))
            .zip(x.par_chunks(group * width.max(1)));
        groups.for_each(|(((quads, scales), sums), x)| {
            let count = x.len() / width;
            for (row, x) in x.chunks_exact(width).enumerate() {
                for (part, x) in x.as_chunks::<PART>().0.iter().enumerate() {
                    // SAFETY: panels are used only where `has_avx2`
                    let (scale, sum, values) = unsafe { eight_bits(x) };
                    let at = part * count + row;
                    scales[at] = scale;
                    sums[at] = scale * sum as f32;
                    let to = &mut quads[part * QUADS * count..][..QUADS * count];
                    for (to, quad) in to.chunks_exact_mut(count).zip(values.as_chunks().0) {
                        to[row] = *quad;
                    }
                }
            }
        });
        packed
    }
}

/// Numbers in 8 bits: their scale, their sum and themselves; the same as `dot::Weight::inputs` of `Q8_0` gives. With that one, which
/// any processor can run, sixteen sequences decoded 8 % slower.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn eight_bits(numbers: &[f32; PART]) -> (f32, i32, [i8; PART]) {
    let (vectors, _) = numbers.as_chunks::<LANES>();
    // SAFETY: there are eight numbers in each
    let load = |at: usize| unsafe { _mm256_loadu_ps(vectors[at].as_ptr()) };
    let all = [load(0), load(1), load(2), load(3)];
    let size = |x| _mm256_andnot_ps(_mm256_set1_ps(-0.0), x);
    let larger = |a, b| _mm256_max_ps(size(a), size(b));
    let mut largest = [0f32; LANES];
    let top = _mm256_max_ps(larger(all[0], all[1]), larger(all[2], all[3]));
    // SAFETY: there is room for eight numbers
    unsafe { _mm256_storeu_ps(largest.as_mut_ptr(), top) };
    let largest = largest.into_iter().fold(0f32, f32::max);
    let inverse = _mm256_set1_ps(if largest > 0.0 { 127.0 / largest } else { 0.0 });
    let nearest = |x| _mm256_cvtps_epi32(_mm256_mul_ps(x, inverse));
    let low = _mm256_packs_epi32(nearest(all[0]), nearest(all[1]));
    let high = _mm256_packs_epi32(nearest(all[2]), nearest(all[3]));
    // packing works within halves of a vector: fours of numbers 0, 2, 4, 6 and then 1, 3, 5, 7
    let order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    let packed = _mm256_permutevar8x32_epi32(_mm256_packs_epi16(low, high), order);
    let pairs = _mm256_madd_epi16(_mm256_add_epi16(low, high), _mm256_set1_epi16(1));
    let (mut values, mut sums) = ([0; PART], [0; LANES]);
    // SAFETY: there is room for 32 bytes in both
    unsafe {
        _mm256_storeu_si256(values.as_mut_ptr().cast(), packed);
        _mm256_storeu_si256(sums.as_mut_ptr().cast(), pairs);
    }
    (largest / 127.0, sums.iter().sum(), values)
}

/// # Safety
/// The processor has AVX2, FMA and F16C.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn unpack<W: Whole>(rows: &[&[W]; PANEL], inputs: Range<usize>, panel: &mut WholePanel) {
    /// Parts of the longest block.
    const MOST: usize = 8;
    let parts = W::LEN / PART;
    let units = inputs.start / W::LEN..inputs.end / W::LEN;
    for (index, unit) in units.enumerate() {
        for (half, rows) in rows.as_chunks::<LANES>().0.iter().enumerate() {
            for (row, units) in rows.iter().enumerate() {
                let mut factors = [Factors::default(); MOST];
                // SAFETY: as this function asks
                unsafe { units[unit].factors(&mut factors[..parts]) };
                for (part, factors) in factors[..parts].iter().enumerate() {
                    let part = index * parts + part;
                    let at = part * PANEL + half * LANES + row;
                    panel.scales[at] = factors.scale;
                    if W::OFFSETS {
                        panel.offsets[at] = factors.offset;
                    }
                    if W::HALVES {
                        let at = 2 * part * PANEL + half * LANES + row;
                        panel.halves[at] = [factors.halves[0]; 2];
                        panel.halves[at + PANEL] = [factors.halves[1]; 2];
                    }
                }
            }
            for part in 0..parts {
                let mut values = [_mm256_setzero_si256(); LANES];
                for (values, units) in values.iter_mut().zip(rows) {
                    // SAFETY: part is one of the block
                    *values = unsafe { units[unit].part(part) };
                }
                let first = (index * parts + part) * QUADS;
                for (quad, column) in transposed(values).into_iter().enumerate() {
                    let to = (first + quad) * PANEL + half * LANES;
                    let to = panel.quads[to..][..LANES].as_mut_ptr();
                    // SAFETY: there is room for LANES quads of bytes
                    unsafe { _mm256_storeu_si256(to.cast(), column) };
                }
            }
        }
    }
}

/// # Safety
/// The processor has AVX2 and FMA.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn whole_tile<const ROWS: usize, W: Whole>(
    panel: &WholePanel,
    x: &WholeInputs,
    group: Group,
    inputs: Range<usize>,
    sums: &mut Sums,
) {
    let (quads, parts) = (x.width / QUAD, x.width / PART);
    let own = inputs.start / PART * ROWS..inputs.end / PART * ROWS;
    let (x_scales, _) = x.scales[group.first * parts..][own.clone()].as_chunks::<ROWS>();
    let (x_sums, _) = x.sums[group.first * parts..][own].as_chunks::<ROWS>();
    let own = inputs.start / QUAD * ROWS..inputs.end / QUAD * ROWS;
    let (x, _) = x.quads[group.first * quads..][own].as_chunks::<ROWS>();
    let (x, _) = x.as_chunks::<QUADS>();
    let (weights, _) = panel.quads.as_chunks::<PANEL>();
    let (weights, _) = weights.as_chunks::<QUADS>();
    let (scales, _) = panel.scales.as_chunks::<PANEL>();
    let (offsets, _) = panel.offsets.as_chunks::<PANEL>();
    let (halves, _) = panel.halves.as_chunks::<PANEL>();
    let count = x.len();
    assert!(x_scales.len() == count && x_sums.len() == count && halves.len() >= 2 * count);
    assert!(weights.len() >= count && scales.len() >= count && offsets.len() >= count);
    let ones = [_mm256_set1_epi16(1); 2];
    let mut tile = [[_mm256_setzero_ps(); 2]; ROWS];
    for part in 0..count {
        let mut whole = [[_mm256_setzero_si256(); 2]; ROWS];
        for first in (0..QUADS).step_by(W::ADDED) {
            let mut pairs = [[_mm256_setzero_si256(); 2]; ROWS];
            for quad in first..first + W::ADDED {
                // SAFETY: there are PANEL quads of weights: two vectors
                let weights = unsafe { both(weights[part][quad].as_ptr().cast()) };
                for (pairs, x) in pairs.iter_mut().zip(&x[part][quad]) {
                    let x = _mm256_set1_epi32(i32::from_le_bytes(x.map(|x| x as u8)));
                    for (pairs, weights) in pairs.iter_mut().zip(weights) {
                        let products = if W::SIGNED {
                            let sizes = _mm256_abs_epi8(weights);
                            _mm256_maddubs_epi16(sizes, _mm256_sign_epi8(x, weights))
                        } else {
                            _mm256_maddubs_epi16(weights, x)
                        };
                        *pairs = _mm256_add_epi16(*pairs, products);
                    }
                }
            }
            let factors = if W::HALVES {
                // SAFETY: there are PANEL pairs of factors for each half: two vectors
                unsafe { both(halves[2 * part + 2 * first / QUADS].as_ptr().cast()) }
            } else {
                ones
            };
            for (whole, pairs) in whole.iter_mut().zip(pairs) {
                for half in 0..2 {
                    let fours = _mm256_madd_epi16(pairs[half], factors[half]);
                    whole[half] = _mm256_add_epi32(whole[half], fours);
                }
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
                if W::OFFSETS {
                    *sum = _mm256_fnmadd_ps(offset, _mm256_set1_ps(x_sums[part][row]), *sum);
                }
            }
        }
    }
    store(&tile, sums);
}

/// Two vectors.
///
/// # Safety
/// They lie there, and the processor has AVX2.
#[inline(always)]
unsafe fn both(from: *const __m256i) -> [__m256i; 2] {
    // SAFETY: as this function asks
    unsafe { [_mm256_loadu_si256(from), _mm256_loadu_si256(from.add(1))] }
}
