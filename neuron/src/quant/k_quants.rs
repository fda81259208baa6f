//! Blocks of 256 numbers in 4, 5 or 6 bits, bit for bit as GGUF files have them (`Q4_K`, `Q5_K`, `Q6_K`).
//!
//! A block has parts of 32 (16 in `Q6K`) numbers with a scale of their own, which is itself a small whole number times
//! the block's scale. Making one is a search: for each part a few dozen scales are tried around the one that just covers
//! its range, each is mended by least squares, and the one with the smallest error is kept.

use super::Unit;
use half::f16;

/// Numbers in a block.
pub(crate) const LEN: usize = 256;
/// Numbers that share a scale and an offset in [`Q4K`] and [`Q5K`].
const PART: usize = 32;
/// Such parts of a block.
const PARTS: usize = LEN / PART;
/// Numbers that share a scale in [`Q6K`].
const SMALL: usize = 16;
/// Largest scale and offset of a part.
const TOP: f32 = 63.0;

/// `scale · scaleₚ · q − offset · offsetₚ`, q from 0 to 15.
#[derive(Debug, Clone, Copy, PartialEq, bytemuck::NoUninit)]
#[repr(C)]
pub(crate) struct Q4K {
    pub(crate) scale: f16,
    pub(crate) offset: f16,
    /// Scales and offsets of the parts in 6 bits each, see [`unpacked`].
    pub(crate) parts: [u8; 12],
    /// 32 bytes for two parts: the first in the lower halves, the second in the upper.
    pub(crate) quants: [u8; LEN / 2],
}

/// `scale · scaleₚ · q − offset · offsetₚ`, q from 0 to 31.
#[derive(Debug, Clone, Copy, PartialEq, bytemuck::NoUninit)]
#[repr(C)]
pub(crate) struct Q5K {
    pub(crate) scale: f16,
    pub(crate) offset: f16,
    /// As in [`Q4K`].
    pub(crate) parts: [u8; 12],
    /// The fifth bits: bit p of byte i is that of number i of part p.
    pub(crate) high: [u8; PART],
    /// The lower four bits, as in [`Q4K`].
    pub(crate) quants: [u8; LEN / 2],
}

/// `scale · scaleₚ · q`, q from −32 to 31, kept as q + 32.
#[derive(Debug, Clone, Copy, PartialEq, bytemuck::NoUninit)]
#[repr(C)]
pub(crate) struct Q6K {
    /// The lower four bits. Half a block is four quarters of 32 numbers; its first 32 bytes have quarters 0 and 2, the
    /// next have 1 and 3.
    pub(crate) quants: [u8; LEN / 2],
    /// The upper two bits: byte i of half a block has those of number i of quarters 0 to 3.
    pub(crate) high: [u8; LEN / 4],
    pub(crate) parts: [i8; LEN / SMALL],
    pub(crate) scale: f16,
}

/// The scales and offsets of the eight parts, four at a time in a word.
#[inline(always)]
pub(crate) fn unpacked(parts: &[u8; 12]) -> ([u8; PARTS], [u8; PARTS]) {
    const LOWER: u32 = 0x3f3f_3f3f; // 6 bits of each byte
    const HALF: u32 = 0x0f0f_0f0f;
    const UPPER: u32 = 0x0303_0303;
    let word =
        |at: usize| u32::from_le_bytes([parts[at], parts[at + 1], parts[at + 2], parts[at + 3]]);
    let (scales, offsets, rest) = (word(0), word(4), word(8));
    // four of each in the lower 6 bits; their upper 2 are the upper bits of the other four
    let join = |low: u32, high: u32| {
        let both = u64::from(low) | u64::from(high) << 32;
        both.to_le_bytes()
    };
    (
        join(scales & LOWER, rest & HALF | (scales >> 6 & UPPER) << 4),
        join(
            offsets & LOWER,
            rest >> 4 & HALF | (offsets >> 6 & UPPER) << 4,
        ),
    )
}

pub(crate) fn packed(scales: &[u8; PARTS], offsets: &[u8; PARTS]) -> [u8; 12] {
    let mut parts = [0; 12];
    for part in 0..PARTS / 2 {
        parts[part] = scales[part] | scales[part + 4] >> 4 << 6;
        parts[part + 4] = offsets[part] | offsets[part + 4] >> 4 << 6;
        parts[part + 8] = scales[part + 4] & 15 | offsets[part + 4] << 4;
    }
    parts
}

/// 1.5 · 2²³: a sum with it has no digits behind the point, and whole numbers in its lowest bits.
const SHIFT: f32 = 12_582_912.0;

/// The nearest whole number, of those below 2²²: what rounding does, in two additions that need no call.
#[inline(always)]
fn nearest(x: f32) -> f32 {
    (x + SHIFT) - SHIFT
}

/// `x` where it is from `low` to `high`, else the nearer of them: in two instructions, which a NaN's rules are not.
#[inline(always)]
fn within(x: f32, low: f32, high: f32) -> f32 {
    let x = if x > low { x } else { low };
    if x < high { x } else { high }
}

/// The whole number nearest to `x`, held between two that are in the range of the smaller type that is wanted. Unlike a cast it
/// can be had of a whole vector.
#[inline(always)]
pub(crate) fn whole(x: f32, low: f32, high: f32) -> i32 {
    (within(x, low, high) + SHIFT).to_bits() as i32 - SHIFT.to_bits() as i32
}

/// The largest distance from 0.
#[inline(always)]
pub(crate) fn largest<const N: usize>(numbers: &[f32; N]) -> f32 {
    lanes(
        numbers,
        0.0,
        |top, x| if x.abs() > top { x.abs() } else { top },
    )
    .into_iter()
    .fold(0.0, f32::max)
}

/// Sums, or what else is taken over numbers, that run side by side.
const LANES: usize = 8;

/// A number for each lane. Written so, one operation at a time, the compiler makes vectors of them.
#[inline(always)]
fn each(number: impl Fn(usize) -> f32) -> [f32; LANES] {
    let mut numbers = [0.0; LANES];
    for (lane, own) in numbers.iter_mut().enumerate() {
        *own = number(lane);
    }
    numbers
}

/// The same. The compiler, where it sees that lanes are looked at one by one later, would also make them so: seven times slower.
#[inline(always)]
fn as_vectors<const N: usize>(vectors: [[f32; LANES]; N]) -> [[f32; LANES]; N] {
    std::hint::black_box(vectors)
}

/// Takes in every [`LANES`]-th number.
#[inline(always)]
fn lanes<const N: usize>(
    numbers: &[f32; N],
    start: f32,
    take: impl Fn(f32, f32) -> f32,
) -> [f32; LANES] {
    let mut taken = [start; LANES];
    for numbers in numbers.as_chunks::<LANES>().0 {
        for (own, x) in taken.iter_mut().zip(numbers) {
            *own = take(*own, *x);
        }
    }
    taken
}

#[inline(always)]
fn sum(lanes: [f32; LANES]) -> f32 {
    lanes.iter().sum()
}

/// Vectors of scales that are tried for a part, …
const TRIED: usize = 3;

/// … one more level, or less, by tenths: from 1.2 below to 1.1 above.
#[inline(always)]
fn tenths(vector: usize, lane: usize) -> f32 {
    0.1 * ((vector * LANES + lane) as f32 - 12.0)
}

/// Scale and offset, both 0 or more, with which `x ≈ scale · q − offset`, q from 0 to `levels`.
#[inline(always)]
fn fit_affine(x: &[f32; PART], levels: f32) -> (f32, f32) {
    let square = sum(lanes(x, 0.0, |sum, x| sum + x * x));
    let typical = (square / PART as f32).sqrt();
    let low = lanes(x, 0.0, |low, x| if x < low { x } else { low });
    let low = low.into_iter().fold(0f32, f32::min);
    let high = lanes(
        x,
        f32::NEG_INFINITY,
        |high, x| if x > high { x } else { high },
    );
    let high = high.into_iter().fold(f32::NEG_INFINITY, f32::max);
    if high <= low {
        return (0.0, -low);
    }
    // large numbers count more, as they do in a product
    let weights: [f32; PART] = std::array::from_fn(|i| typical + x[i].abs());
    let weighted: [f32; PART] = std::array::from_fn(|i| weights[i] * x[i]);
    let w = sum(lanes(&weights, 0.0, |sum, w| sum + w));
    let wx = sum(lanes(&weighted, 0.0, |sum, wx| sum + wx));
    let (mut best, mut kept) = (f32::INFINITY, ((high - low) / levels, -low));
    for vector in 0..TRIED {
        let inverse = each(|lane| (levels + tenths(vector, lane)) / (high - low));
        let (mut wq, mut wqq, mut wqx) = ([0.0; LANES], [0.0; LANES], [0.0; LANES]);
        for (x, weight) in x.iter().zip(&weights) {
            let above = x - low;
            let q = each(|lane| within(nearest(inverse[lane] * above), 0.0, levels));
            let weighted = each(|lane| weight * q[lane]);
            wq = each(|lane| wq[lane] + weighted[lane]);
            wqq = each(|lane| wqq[lane] + weighted[lane] * q[lane]);
            wqx = each(|lane| wqx[lane] + weighted[lane] * x);
        }
        let [wq, wqq, wqx] = as_vectors([wq, wqq, wqx]);
        let determinant = each(|lane| w * wqq[lane] - wq[lane] * wq[lane]);
        // the least squares for these q
        let shift = each(|lane| (wqq[lane] * wx - wq[lane] * wqx[lane]) / determinant[lane]);
        let free = each(|lane| (w * wqx[lane] - wx * wq[lane]) / determinant[lane]);
        let bound = each(|lane| wqx[lane] / wqq[lane]);
        let scale = each(|lane| {
            if shift[lane] > 0.0 {
                bound[lane]
            } else {
                free[lane]
            }
        });
        let shift = each(|lane| if shift[lane] > 0.0 { 0.0 } else { shift[lane] });
        // Σ w (scale q + shift − x)², less Σ w x²
        let of_scale =
            each(|lane| scale[lane] * wqq[lane] + 2.0 * (shift[lane] * wq[lane] - wqx[lane]));
        let of_shift = each(|lane| shift[lane] * w - 2.0 * wx);
        let error = each(|lane| scale[lane] * of_scale[lane] + shift[lane] * of_shift[lane]);
        let [error, determinant, scale, shift] = as_vectors([error, determinant, scale, shift]);
        for lane in 0..LANES {
            if error[lane] < best && determinant[lane] > 0.0 && scale[lane] > 0.0 {
                (best, kept) = (error[lane], (scale[lane], -shift[lane]));
            }
        }
    }
    kept
}

/// The scale, of either sign, with which `x ≈ scale · q`, q from −32 to 31.
#[inline(always)]
fn fit_symmetric(x: &[f32; SMALL]) -> f32 {
    let furthest = x
        .iter()
        .copied()
        .fold(0f32, |top, x| if x.abs() > top.abs() { x } else { top });
    if furthest == 0.0 {
        return 0.0;
    }
    let (mut best, mut kept) = (0.0, furthest / -32.0);
    for vector in 0..TRIED {
        let inverse = each(|lane| -(32.0 + tenths(vector, lane)) / furthest);
        let (mut qx, mut qq) = ([0.0; LANES], [0.0; LANES]);
        for x in x {
            let square = x * x;
            let q = each(|lane| within(nearest(inverse[lane] * x), -32.0, 31.0));
            let weighted = each(|lane| square * q[lane]);
            qx = each(|lane| qx[lane] + weighted[lane] * x);
            qq = each(|lane| qq[lane] + weighted[lane] * q[lane]);
        }
        let [qx, qq] = as_vectors([qx, qq]);
        for (qx, qq) in qx.into_iter().zip(qq) {
            if qq > 0.0 && qx * qx > best * qq {
                (best, kept) = (qx * qx / qq, qx / qq);
            }
        }
    }
    kept
}

/// What a block with offsets is made of before its quants are laid out.
struct Affine {
    scale: f16,
    offset: f16,
    parts: [u8; 12],
    quants: [u8; LEN],
}

#[inline(always)]
fn affine(numbers: &[f32], levels: f32) -> Affine {
    let (mut scales, mut offsets) = ([0f32; PARTS], [0f32; PARTS]);
    let (parts, _) = numbers.as_chunks::<PART>();
    for (part, numbers) in parts.iter().enumerate() {
        (scales[part], offsets[part]) = fit_affine(numbers, levels);
    }
    let scale = f16::from_f32(scales.iter().copied().fold(0.0, f32::max) / TOP);
    let offset = f16::from_f32(offsets.iter().copied().fold(0.0, f32::max) / TOP);
    let in_units = |of: &[f32; PARTS], unit: f16| -> [u8; PARTS] {
        let unit = unit.to_f32();
        std::array::from_fn(|part| match unit {
            0.0 => 0,
            unit => whole(of[part] / unit, 0.0, TOP) as u8,
        })
    };
    let (scales, offsets) = (in_units(&scales, scale), in_units(&offsets, offset));
    let mut quants = [0; LEN];
    for (part, numbers) in parts.iter().enumerate() {
        // by the scale that is kept
        let step = scale.to_f32() * f32::from(scales[part]);
        let shift = offset.to_f32() * f32::from(offsets[part]);
        let inverse = if step > 0.0 { 1.0 / step } else { 0.0 };
        let quants = &mut quants[part * PART..][..PART];
        for (q, x) in quants.iter_mut().zip(numbers) {
            *q = whole((x + shift) * inverse, 0.0, levels) as u8;
        }
    }
    Affine {
        scale,
        offset,
        parts: packed(&scales, &offsets),
        quants,
    }
}

/// The lower four bits of every quant, two parts to 32 bytes.
fn halves(quants: &[u8; LEN]) -> [u8; LEN / 2] {
    let mut bytes = [0; LEN / 2];
    for (pair, bytes) in bytes.chunks_exact_mut(PART).enumerate() {
        let both = &quants[pair * 2 * PART..];
        for (i, byte) in bytes.iter_mut().enumerate() {
            *byte = both[i] & 15 | both[PART + i] << 4;
        }
    }
    bytes
}

impl Q4K {
    /// Every quant, 0 to 15.
    #[inline(always)]
    pub(crate) fn quants(&self) -> [u8; LEN] {
        let mut quants = [0; LEN];
        for (bytes, both) in self
            .quants
            .chunks_exact(PART)
            .zip(quants.chunks_exact_mut(2 * PART))
        {
            for (i, byte) in bytes.iter().enumerate() {
                both[i] = byte & 15;
                both[PART + i] = byte >> 4;
            }
        }
        quants
    }
}

impl Q5K {
    /// Every quant, 0 to 31.
    #[inline(always)]
    pub(crate) fn quants(&self) -> [u8; LEN] {
        let mut quants = [0; LEN];
        for (pair, both) in quants.chunks_exact_mut(2 * PART).enumerate() {
            for i in 0..PART {
                let (byte, high) = (self.quants[pair * PART + i], self.high[i] >> (2 * pair));
                both[i] = byte & 15 | (high & 1) << 4;
                both[PART + i] = byte >> 4 | (high >> 1 & 1) << 4;
            }
        }
        quants
    }
}

impl Q6K {
    /// Every quant, −32 to 31.
    #[inline(always)]
    pub(crate) fn quants(&self) -> [i8; LEN] {
        let mut quants = [0; LEN];
        for (half, own) in quants.chunks_exact_mut(LEN / 2).enumerate() {
            let (low, high) = (&self.quants[64 * half..], &self.high[32 * half..]);
            for i in 0..32 {
                let q = [
                    low[i] & 15 | (high[i] & 3) << 4,
                    low[i + 32] & 15 | (high[i] >> 2 & 3) << 4,
                    low[i] >> 4 | (high[i] >> 4 & 3) << 4,
                    low[i + 32] >> 4 | (high[i] >> 6) << 4,
                ];
                for (quarter, q) in q.into_iter().enumerate() {
                    own[32 * quarter + i] = q as i8 - 32;
                }
            }
        }
        quants
    }
}

/// The numbers of a block with offsets.
#[inline(always)]
fn decode_affine(scale: f16, offset: f16, parts: &[u8; 12], quants: &[u8; LEN], out: &mut [f32]) {
    let (scales, offsets) = unpacked(parts);
    let (scale, offset) = (scale.to_f32(), offset.to_f32());
    for (part, (out, quants)) in out
        .chunks_exact_mut(PART)
        .zip(quants.chunks_exact(PART))
        .enumerate()
    {
        let step = scale * f32::from(scales[part]);
        let shift = offset * f32::from(offsets[part]);
        for (x, q) in out.iter_mut().zip(quants) {
            *x = step * f32::from(*q) - shift;
        }
    }
}

/// Takes `N` bytes off the front.
fn take<const N: usize>(bytes: &mut &[u8]) -> [u8; N] {
    let (own, rest) = bytes.split_first_chunk().expect("a whole block");
    *bytes = rest;
    *own
}

fn take_f16(bytes: &mut &[u8]) -> f16 {
    f16::from_le_bytes(take(bytes))
}

impl Unit for Q4K {
    const LEN: usize = LEN;
    const BYTES: usize = 144;
    const EMPTY: Self = Self {
        scale: f16::ZERO,
        offset: f16::ZERO,
        parts: [0; 12],
        quants: [0; LEN / 2],
    };

    #[inline(always)]
    fn encode(numbers: &[f32]) -> Self {
        let made = affine(numbers, 15.0);
        Self {
            scale: made.scale,
            offset: made.offset,
            parts: made.parts,
            quants: halves(&made.quants),
        }
    }

    #[inline(always)]
    fn decode(&self, out: &mut [f32]) {
        decode_affine(self.scale, self.offset, &self.parts, &self.quants(), out);
    }

    fn is_finite(&self) -> bool {
        self.scale.is_finite() && self.offset.is_finite()
    }

    fn read(mut bytes: &[u8]) -> Self {
        Self {
            scale: take_f16(&mut bytes),
            offset: take_f16(&mut bytes),
            parts: take(&mut bytes),
            quants: take(&mut bytes),
        }
    }
}

impl Unit for Q5K {
    const LEN: usize = LEN;
    const BYTES: usize = 176;
    const EMPTY: Self = Self {
        scale: f16::ZERO,
        offset: f16::ZERO,
        parts: [0; 12],
        high: [0; PART],
        quants: [0; LEN / 2],
    };

    #[inline(always)]
    fn encode(numbers: &[f32]) -> Self {
        let made = affine(numbers, 31.0);
        let mut high = [0; PART];
        for (part, quants) in made.quants.chunks_exact(PART).enumerate() {
            for (high, q) in high.iter_mut().zip(quants) {
                *high |= (q >> 4) << part;
            }
        }
        Self {
            scale: made.scale,
            offset: made.offset,
            parts: made.parts,
            high,
            quants: halves(&made.quants),
        }
    }

    #[inline(always)]
    fn decode(&self, out: &mut [f32]) {
        decode_affine(self.scale, self.offset, &self.parts, &self.quants(), out);
    }

    fn is_finite(&self) -> bool {
        self.scale.is_finite() && self.offset.is_finite()
    }

    fn read(mut bytes: &[u8]) -> Self {
        Self {
            scale: take_f16(&mut bytes),
            offset: take_f16(&mut bytes),
            parts: take(&mut bytes),
            high: take(&mut bytes),
            quants: take(&mut bytes),
        }
    }
}

impl Unit for Q6K {
    const LEN: usize = LEN;
    const BYTES: usize = 210;
    const EMPTY: Self = Self {
        quants: [0; LEN / 2],
        high: [0; LEN / 4],
        parts: [0; LEN / SMALL],
        scale: f16::ZERO,
    };

    #[inline(always)]
    fn encode(numbers: &[f32]) -> Self {
        let (small, _) = numbers.as_chunks::<SMALL>();
        let mut scales = [0f32; LEN / SMALL];
        for (scale, numbers) in scales.iter_mut().zip(small) {
            *scale = fit_symmetric(numbers);
        }
        let furthest = scales
            .iter()
            .copied()
            .fold(0f32, |top, x| if x.abs() > top.abs() { x } else { top });
        let mut block = Self {
            scale: f16::from_f32(furthest / -128.0),
            ..Self::EMPTY
        };
        let scale = block.scale.to_f32();
        if scale == 0.0 || !scale.is_finite() {
            // nothing to scale: every number is 0 times something, kept as the middle
            block.quants = [0; LEN / 2];
            block.high = [0b1010_1010; LEN / 4];
            return block;
        }
        for (part, own) in block.parts.iter_mut().zip(&scales) {
            *part = whole(own / scale, -128.0, 127.0) as i8;
        }
        for (at, numbers) in small.iter().enumerate() {
            let step = scale * f32::from(block.parts[at]);
            let inverse = if step == 0.0 { 0.0 } else { 1.0 / step };
            for (i, x) in numbers.iter().enumerate() {
                let q = whole(x * inverse, -32.0, 31.0) + 32;
                block.put(at * SMALL + i, q as u8);
            }
        }
        block
    }

    #[inline(always)]
    fn decode(&self, out: &mut [f32]) {
        let (scale, quants) = (self.scale.to_f32(), self.quants());
        for (at, (out, quants)) in out
            .chunks_exact_mut(SMALL)
            .zip(quants.chunks_exact(SMALL))
            .enumerate()
        {
            let step = scale * f32::from(self.parts[at]);
            for (x, q) in out.iter_mut().zip(quants) {
                *x = step * f32::from(*q);
            }
        }
    }

    fn is_finite(&self) -> bool {
        self.scale.is_finite()
    }

    fn read(mut bytes: &[u8]) -> Self {
        Self {
            quants: take(&mut bytes),
            high: take(&mut bytes),
            parts: take::<{ LEN / SMALL }>(&mut bytes).map(|byte| byte as i8),
            scale: take_f16(&mut bytes),
        }
    }
}

impl Q6K {
    /// Lays the quant `q`, 0 to 63, of number `at` into a block that is still empty there.
    #[inline(always)]
    fn put(&mut self, at: usize, q: u8) {
        let (half, within) = (at / 128, at % 128);
        let (quarter, i) = (within / 32, within % 32);
        self.quants[64 * half + 32 * (quarter % 2) + i] |= (q & 15) << (4 * (quarter / 2));
        self.high[32 * half + i] |= (q >> 4) << (2 * quarter);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::testing::numbers;
    use candle_core::quantized::{GgmlDType, QTensor};
    use candle_core::{Device, Tensor};

    /// Numbers whose size changes from part to part, as those of trained weights do.
    fn uneven(seed: u64) -> Vec<f32> {
        let mut all = numbers(seed, 8 * LEN);
        for (part, numbers) in all.chunks_mut(SMALL).enumerate() {
            let size = 0.01 * (1 + part * 7 % 11) as f32;
            numbers.iter_mut().for_each(|x| *x *= size * x.abs());
        }
        all
    }

    fn ours<U: Unit>(numbers: &[f32]) -> Vec<f32> {
        let mut out = vec![0.0; numbers.len()];
        for (numbers, out) in numbers.chunks(LEN).zip(out.chunks_mut(LEN)) {
            U::encode(numbers).decode(out);
        }
        out
    }

    fn square_error(found: &[f32], wanted: &[f32]) -> f64 {
        let pairs = found.iter().zip(wanted);
        pairs.map(|(x, y)| f64::from(x - y).powi(2)).sum()
    }

    /// candle has the layout of GGUF files and the search of llama.cpp: what it makes of numbers, as bytes and back.
    fn check<U: Unit>(kind: GgmlDType) {
        assert_eq!(size_of::<U>(), U::BYTES);
        for seed in 0..4 {
            let numbers = uneven(seed);
            let tensor = Tensor::from_slice(&numbers, numbers.len(), &Device::Cpu).unwrap();
            let theirs = QTensor::quantize(&tensor, kind).unwrap();
            let wanted: Vec<f32> = theirs.dequantize(&Device::Cpu).unwrap().to_vec1().unwrap();
            let bytes = theirs.data().unwrap();
            let mut found = vec![0.0; numbers.len()];
            for (bytes, out) in bytes.chunks(U::BYTES).zip(found.chunks_mut(LEN)) {
                U::read(bytes).decode(out);
            }
            assert_eq!(found, wanted, "the same bytes are the same numbers");
            let (own, their) = (
                square_error(&ours::<U>(&numbers), &numbers),
                square_error(&wanted, &numbers),
            );
            assert!(own <= 1.05 * their, "{kind:?}: error {own}, theirs {their}");
        }
    }

    #[test]
    fn blocks_are_laid_out_as_in_files_and_made_as_well_as_there() {
        check::<Q4K>(GgmlDType::Q4K);
        check::<Q5K>(GgmlDType::Q5K);
        check::<Q6K>(GgmlDType::Q6K);
    }

    #[test]
    fn blocks_of_nothing_and_of_one_number_are_kept() {
        for value in [0.0, 0.5, -0.5] {
            let numbers = [value; LEN];
            for found in [
                ours::<Q4K>(&numbers),
                ours::<Q5K>(&numbers),
                ours::<Q6K>(&numbers),
            ] {
                for x in found {
                    assert!((x - value).abs() <= 0.01 * value.abs(), "{x} for {value}");
                }
            }
        }
    }

    #[test]
    fn scales_come_out_of_their_bits_as_they_went_in() {
        let scales = [0, 63, 17, 32, 48, 5, 15, 16];
        let offsets = [63, 0, 33, 1, 62, 47, 31, 8];
        assert_eq!(unpacked(&packed(&scales, &offsets)), (scales, offsets));
    }
}
