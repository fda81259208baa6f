//! How matrices lie in memory: in panels of [`PANEL`] rows, so that a vector of a processor takes the same inputs of all of
//! them at once, for one row of x as for many. Nothing is unpacked or moved when a kernel comes.
//!
//! A panel is a row of blocks, one for every [`Unit::LEN`] inputs. Numbers below 16 bits lie in fours of inputs ("quads"), as
//! processors multiply and add them; within a quad they are as the format has them.

use super::k_quants::{LEN, Q4K, Q5K, Q6K};
use super::{Q8Block, Unit, k_quants};
use bytemuck::Zeroable;
use half::{bf16, f16};

/// Rows of a panel.
pub(crate) const PANEL: usize = 16;
/// Inputs that lie together where they have less than 16 bits.
pub(crate) const QUAD: usize = 4;
/// Inputs that share a scale in most formats of blocks.
pub(crate) const PART: usize = 32;
/// Quads of a part.
pub(crate) const QUADS: usize = PART / QUAD;

/// The same quad of every row.
pub(crate) type Quad<T> = [[T; QUAD]; PANEL];

/// [`PANEL`] units that stand below each other.
pub(crate) trait Block: Zeroable + Copy + Send + Sync + 'static {
    type Unit: Unit;

    /// Lays down the unit of `row`.
    fn put(&mut self, row: usize, unit: &Self::Unit);

    /// The unit of `row`.
    fn get(&self, row: usize) -> Self::Unit;

    /// Lays down the units of rows, at most [`PANEL`], each of which has as many as there are blocks, as files have them.
    #[inline(always)]
    fn put_rows(blocks: &mut [Self], rows: &[&[u8]]) {
        let of_unit = Self::Unit::BYTES;
        // block by block: a panel may be larger than the first cache, which each row would fill anew
        for (at, block) in blocks.iter_mut().enumerate() {
            for (row, bytes) in rows.iter().enumerate() {
                block.put(row, &Self::Unit::read(&bytes[at * of_unit..][..of_unit]));
            }
        }
    }
}

macro_rules! single_numbers {
    ($($name:ident: $kind:ty, $align:literal $(, $put_rows:item)?);*) => {$(
        #[doc = concat!("A `", stringify!($kind), "` of every row.")]
        #[derive(Debug, Clone, Copy, Zeroable)]
        #[repr(C, align($align))]
        pub(crate) struct $name(pub(crate) [$kind; PANEL]);

        impl Block for $name {
            type Unit = $kind;

            #[inline(always)]
            fn put(&mut self, row: usize, unit: &$kind) {
                self.0[row] = *unit;
            }

            #[inline(always)]
            fn get(&self, row: usize) -> $kind {
                self.0[row]
            }

            $(#[inline(always)] $put_rows)?
        }
    )*};
}
single_numbers!(
    F32Block: f32, 64;
    F16Block: f16, 32, fn put_rows(blocks: &mut [Self], rows: &[&[u8]]) {
        put_words(blocks, rows, |block, words| block.0 = words.map(f16::from_bits));
    };
    Bf16Block: bf16, 32, fn put_rows(blocks: &mut [Self], rows: &[&[u8]]) {
        put_words(blocks, rows, |block, words| block.0 = words.map(bf16::from_bits));
    }
);

/// [`Block::put_rows`] for numbers of 16 bits, `put` being given those of all rows: whole panels a square at a time.
#[inline(always)]
fn put_words<B: Block>(blocks: &mut [B], rows: &[&[u8]], put: impl Fn(&mut B, [u16; PANEL])) {
    let mut done = 0;
    if let Ok(rows) = <&[&[u8]; PANEL]>::try_from(rows) {
        for square in blocks.as_chunks_mut::<PANEL>().0 {
            let lines = rows.map(|row| {
                let (words, _) = row[2 * done..][..2 * PANEL].as_chunks();
                std::array::from_fn(|at| u16::from_le_bytes(words[at]))
            });
            for (block, words) in square.iter_mut().zip(transposed(lines)) {
                put(block, words);
            }
            done += PANEL;
        }
    }
    for (at, block) in blocks.iter_mut().enumerate().skip(done) {
        for (row, bytes) in rows.iter().enumerate() {
            block.put(row, &B::Unit::read(&bytes[2 * at..][..2]));
        }
    }
}

/// The columns of a square. Shuffling its rows like cards, four times, is something that vectors of a processor do.
#[inline(always)]
fn transposed(mut lines: [[u16; PANEL]; PANEL]) -> [[u16; PANEL]; PANEL] {
    const HALF: usize = PANEL / 2;
    for _ in 0..PANEL.ilog2() {
        let mut shuffled = [[0; PANEL]; PANEL];
        for line in 0..HALF {
            for at in 0..HALF {
                for upper in 0..2 {
                    let from = upper * HALF + at;
                    shuffled[2 * line + upper][2 * at] = lines[line][from];
                    shuffled[2 * line + upper][2 * at + 1] = lines[line + HALF][from];
                }
            }
        }
        lines = shuffled;
    }
    lines
}

/// [`Q8Block`] of every row.
#[derive(Debug, Clone, Copy, Zeroable)]
#[repr(C, align(32))]
pub(crate) struct Q8Rows {
    pub(crate) scales: [f16; PANEL],
    pub(crate) values: [Quad<i8>; QUADS],
}

impl Block for Q8Rows {
    type Unit = Q8Block;

    #[inline(always)]
    fn put(&mut self, row: usize, unit: &Q8Block) {
        self.scales[row] = unit.scale;
        spread(&mut self.values, row, &unit.values);
    }

    #[inline(always)]
    fn get(&self, row: usize) -> Q8Block {
        Q8Block {
            scale: self.scales[row],
            values: gathered(&self.values, row),
        }
    }
}

/// Pairs of parts in a block of [`LEN`].
const PAIRS: usize = LEN / PART / 2;

macro_rules! affine_rows {
    ($(#[$doc:meta])* $name:ident: $kind:ident $(, $high:ident)?) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, Zeroable)]
        #[repr(C, align(32))]
        pub(crate) struct $name {
            pub(crate) scale: [f16; PANEL],
            pub(crate) offset: [f16; PANEL],
            /// Of each part, a byte for each row.
            pub(crate) scales: [[u8; PANEL]; 2 * PAIRS],
            pub(crate) offsets: [[u8; PANEL]; 2 * PAIRS],
            /// The fifth bits: bit p of a byte is that of part p.
            $(pub(crate) $high: [Quad<u8>; QUADS],)?
            /// Of each pair of parts the first in the lower halves, the second in the upper.
            pub(crate) quants: [[Quad<u8>; QUADS]; PAIRS],
        }

        impl Block for $name {
            type Unit = $kind;

            #[inline(always)]
            fn put(&mut self, row: usize, unit: &$kind) {
                self.scale[row] = unit.scale;
                self.offset[row] = unit.offset;
                let (scales, offsets) = k_quants::unpacked(&unit.parts);
                for part in 0..2 * PAIRS {
                    self.scales[part][row] = scales[part];
                    self.offsets[part][row] = offsets[part];
                }
                $(spread(&mut self.$high, row, &unit.$high);)?
                for (own, quants) in self.quants.iter_mut().zip(unit.quants.as_chunks().0) {
                    spread(own, row, quants);
                }
            }

            #[inline(always)]
            fn get(&self, row: usize) -> $kind {
                let scales = self.scales.map(|part| part[row]);
                let offsets = self.offsets.map(|part| part[row]);
                let mut unit = $kind {
                    scale: self.scale[row],
                    offset: self.offset[row],
                    parts: k_quants::packed(&scales, &offsets),
                    $($high: gathered(&self.$high, row),)?
                    quants: [0; LEN / 2],
                };
                for (own, quants) in self.quants.iter().zip(unit.quants.as_chunks_mut().0) {
                    *quants = gathered(own, row);
                }
                unit
            }
        }
    };
}
affine_rows!(
    /// [`Q4K`] of every row; scales and offsets of parts have a byte each.
    Q4KRows: Q4K
);
affine_rows!(
    /// [`Q5K`] of every row; scales and offsets of parts have a byte each.
    Q5KRows: Q5K, high
);

/// [`Q6K`] of every row.
#[derive(Debug, Clone, Copy, Zeroable)]
#[repr(C, align(32))]
pub(crate) struct Q6KRows {
    pub(crate) scale: [f16; PANEL],
    /// Of every 16 inputs.
    pub(crate) scales: [[i8; PANEL]; LEN / 16],
    pub(crate) halves: [Q6KHalf; 2],
}

/// Half the inputs of a block, as a kernel reads them: from front to back.
#[derive(Debug, Clone, Copy, Zeroable)]
#[repr(C)]
pub(crate) struct Q6KHalf {
    /// The upper two bits of quarters 0 to 3.
    pub(crate) high: [Quad<u8>; QUADS],
    /// The lower four bits: those of quarters 0 and 2, then those of 1 and 3.
    pub(crate) quants: [[Quad<u8>; QUADS]; 2],
}

impl Block for Q6KRows {
    type Unit = Q6K;

    #[inline(always)]
    fn put(&mut self, row: usize, unit: &Q6K) {
        self.scale[row] = unit.scale;
        for (own, scale) in self.scales.iter_mut().zip(unit.parts) {
            own[row] = scale;
        }
        let own = self.halves.iter_mut().flat_map(|half| &mut half.quants);
        for (own, quants) in own.zip(unit.quants.as_chunks().0) {
            spread(own, row, quants);
        }
        for (half, high) in self.halves.iter_mut().zip(unit.high.as_chunks().0) {
            spread(&mut half.high, row, high);
        }
    }

    #[inline(always)]
    fn get(&self, row: usize) -> Q6K {
        let mut unit = Q6K::EMPTY;
        unit.scale = self.scale[row];
        unit.parts = self.scales.map(|part| part[row]);
        let own = self.halves.iter().flat_map(|half| &half.quants);
        for (own, quants) in own.zip(unit.quants.as_chunks_mut().0) {
            *quants = gathered(own, row);
        }
        for (half, high) in self.halves.iter().zip(unit.high.as_chunks_mut().0) {
            *high = gathered(&half.high, row);
        }
        unit
    }
}

/// Lays numbers of a row into quads.
#[inline(always)]
fn spread<T: Copy>(quads: &mut [Quad<T>; QUADS], row: usize, numbers: &[T; PART]) {
    for (quad, own) in quads.iter_mut().zip(numbers.as_chunks().0) {
        quad[row] = *own;
    }
}

/// The numbers of a row out of quads.
#[inline(always)]
fn gathered<T: Copy + Default>(quads: &[Quad<T>; QUADS], row: usize) -> [T; PART] {
    let mut numbers = [T::default(); PART];
    for (quad, own) in quads.iter().zip(numbers.as_chunks_mut().0) {
        *own = quad[row];
    }
    numbers
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::testing::numbers;

    /// Units of rows, laid down one by one and all together, are there again.
    fn check<B: Block>()
    where
        B::Unit: PartialEq + std::fmt::Debug,
    {
        for (count, units) in [(PANEL, 37), (PANEL, 16), (PANEL - 3, 20), (1, 1)] {
            let values = numbers(3, count * units * B::Unit::LEN);
            let mut rows = vec![vec![B::Unit::EMPTY; units]; count];
            for (row, values) in rows.iter_mut().zip(values.chunks(units * B::Unit::LEN)) {
                B::Unit::encode_all(values, row);
            }
            let bytes: Vec<&[u8]> = rows.iter().map(|row| bytemuck::cast_slice(row)).collect();
            let mut blocks = vec![B::zeroed(); units];
            B::put_rows(&mut blocks, &bytes);
            for (at, together) in blocks.iter().enumerate() {
                let mut alone = B::zeroed();
                for (index, row) in rows.iter().enumerate() {
                    alone.put(index, &row[at]);
                }
                for (index, row) in rows.iter().enumerate() {
                    let which = format!("row {index}, unit {at} of {units}");
                    assert_eq!(alone.get(index), row[at], "{which}");
                    assert_eq!(together.get(index), row[at], "{which}");
                }
            }
        }
    }

    #[test]
    fn what_is_laid_into_blocks_is_there_again() {
        check::<F32Block>();
        check::<F16Block>();
        check::<Bf16Block>();
        check::<Q8Rows>();
        check::<Q4KRows>();
        check::<Q5KRows>();
        check::<Q6KRows>();
    }
}
