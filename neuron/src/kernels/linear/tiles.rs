//! The products of some rows of x with a panel of weights, for every format and every processor: sums stay in registers while
//! inputs pass (the scheme of Goto and van de Geijn, "Anatomy of High-Performance Matrix Multiplication", 2008).
//!
//! Single numbers meet x in f32. Blocks meet it in whole numbers: x in 8 bits with a scale for every [`PART`] inputs, whole sums
//! over these, and f32 from there on. Whatever the number of rows, a sum is made of the same numbers in the same order, so
//! that a row's products do not depend on which rows stand beside it.

use super::Inputs;
use super::lanes::{Lanes, Quads};
use crate::quant::Unit;
use crate::quant::k_quants::LEN;
use crate::quant::panels::{
    Bf16Block, Block, F16Block, F32Block, PANEL, PART, Q4KRows, Q5KRows, Q6KRows, Q8Rows, QUADS,
};
use half::{bf16, f16};

/// The most rows of x that a tile has on any processor.
pub(super) const MOST_ROWS: usize = 8;

/// Products of some rows of x with a panel.
pub(super) type Sums = [[f32; PANEL]; MOST_ROWS];

/// What x is made of where it meets weights.
pub(super) trait Input: Copy + Send + Sync {
    /// Numbers of x in one.
    const LEN: usize;

    /// `numbers` has [`Self::LEN`].
    fn new(numbers: &[f32]) -> Self;

    /// All of x in this form.
    fn of(inputs: &Inputs) -> &[Vec<Self>];
}

impl Input for f32 {
    const LEN: usize = 1;

    #[inline(always)]
    fn new(numbers: &[f32]) -> Self {
        numbers[0]
    }

    fn of(inputs: &Inputs) -> &[Vec<Self>] {
        &inputs.singles
    }
}

/// [`PART`] numbers of x, rounded to 8 bits.
#[derive(Clone, Copy)]
pub(super) struct Rounded {
    pub(super) values: Quads,
    pub(super) scale: f32,
    /// The sum of what it stands for: what an offset of weights is multiplied with.
    sum: f32,
    /// Where sums begin when weights are kept higher than they are: −32 times the sum of the values in each half, …
    starts: [i32; 2],
    /// … and −128 times that of all.
    start: i32,
}

impl Input for Rounded {
    const LEN: usize = PART;

    #[inline(always)]
    fn new(numbers: &[f32]) -> Self {
        /// 1.5 · 2²³: a sum with it has no digits behind the point, and whole numbers in its lowest bits.
        const SHIFT: f32 = 12_582_912.0;
        const LANES: usize = 16;
        let numbers: &[f32; PART] = numbers.try_into().expect("a whole part");
        let (halves, _) = numbers.as_chunks::<LANES>();
        let mut largest = [0f32; LANES];
        for half in halves {
            for (top, x) in largest.iter_mut().zip(half) {
                *top = if x.abs() > *top { x.abs() } else { *top };
            }
        }
        let largest = largest.into_iter().fold(0f32, f32::max);
        let inverse = if largest > 0.0 { 127.0 / largest } else { 0.0 };
        let mut values = [0; PART];
        let mut sums = [0; 2];
        for ((half, values), sum) in halves
            .iter()
            .zip(values.as_chunks_mut::<LANES>().0)
            .zip(&mut sums)
        {
            for (value, x) in values.iter_mut().zip(half) {
                *value = (x * inverse + SHIFT).to_bits() as i8;
            }
            *sum = values.iter().map(|value| i32::from(*value)).sum::<i32>();
        }
        let scale = largest / 127.0;
        let [first, second] = sums;
        Self {
            values: *values.as_chunks().0.first_chunk().expect("a whole part"),
            scale,
            sum: scale * (first + second) as f32,
            starts: [-32 * first, -32 * second],
            start: -128 * (first + second),
        }
    }

    fn of(inputs: &Inputs) -> &[Vec<Self>] {
        &inputs.rounded
    }
}

/// Weights that meet x in panels.
pub(super) trait Tile: Block {
    /// What x is made of for them.
    type Input: Input;
    /// What they are widened to where many rows will meet them.
    type Wide: Tile<Input = Self::Input>;

    /// Inputs of a panel that many rows meet, such that it stays in the caches: a multiple of [`Unit::LEN`].
    const DEPTH: usize;
    /// Panels of as many inputs that stay in the first cache beside a group of x.
    const TOGETHER: usize;

    /// The panels, all of one length, one after the other, widened; none where that is not worth while even for many rows.
    fn widened<L: Lanes>(panels: &[&[Self]]) -> Option<Vec<Self::Wide>> {
        let _ = panels;
        None
    }

    /// Adds the products of every panel with `rows` rows of x, which lie side by side for every input.
    fn multiply<L: Lanes>(panels: &[&[Self]], x: &[Self::Input], rows: usize, sums: &mut [Sums]);
}

/// Calls a kernel compiled for the number of rows.
macro_rules! for_rows {
    ($rows:expr, $kernel:ident::<$lanes:ident, $block:ty> $arguments:tt) => {
        match $rows {
            1 => $kernel::<$lanes, $block, 1> $arguments,
            2 => $kernel::<$lanes, $block, 2> $arguments,
            3 => $kernel::<$lanes, $block, 3> $arguments,
            4 => $kernel::<$lanes, $block, 4> $arguments,
            6 => $kernel::<$lanes, $block, 6> $arguments,
            MOST_ROWS => $kernel::<$lanes, $block, MOST_ROWS> $arguments,
            rows => unreachable!("a tile of {rows} rows"),
        }
    };
}

/// How many rows of x meet a panel at once where `rows` are left: what [`for_rows`] has kernels for.
pub(super) fn rows_at_once<L: Lanes>(rows: usize) -> usize {
    match rows.min(L::GROUP) {
        5 => 4,
        7 => 6,
        rows => rows,
    }
}

/// Rows of x up to which weights are multiplied as fast as they are read, so that reading ahead pays. Blocks, which lie as they
/// are read, the processor itself foresees: there it costs a tenth of the rate. Single numbers come from several panels at once.
const FEW: usize = 4;

/// A block of one input.
trait Single: Block {
    fn wide<L: Lanes>(&self) -> L::F32;
}

macro_rules! single_numbers {
    ($($name:ident: $kind:ty => $from:ident $(, $widened:ident)?);*) => {$(
        impl Single for $name {
            #[inline(always)]
            fn wide<L: Lanes>(&self) -> L::F32 {
                let numbers: &[$kind; PANEL] = &self.0;
                L::$from(numbers)
            }
        }

        impl Tile for $name {
            type Input = f32;
            type Wide = F32Block;

            const DEPTH: usize = 128;
            const TOGETHER: usize = 2;

            $(
                fn widened<L: Lanes>(panels: &[&[Self]]) -> Option<Vec<F32Block>> {
                    Some($widened::<L, Self>(panels))
                }
            )?

            #[inline(always)]
            fn multiply<L: Lanes>(panels: &[&[Self]], x: &[f32], rows: usize, sums: &mut [Sums]) {
                for_rows!(rows, singles::<L, Self>(panels, x, sums));
            }
        }
    )*};
}
single_numbers!(
    F32Block: f32 => load;
    F16Block: f16 => from_f16, wide;
    Bf16Block: bf16 => from_bf16, wide
);

fn wide<L: Lanes, B: Single>(panels: &[&[B]]) -> Vec<F32Block> {
    L::run(
        #[inline(always)]
        || {
            let length = panels.first().map_or(0, |panel| panel.len()); // that of all
            let mut all: Vec<F32Block> = bytemuck::zeroed_vec(panels.len() * length);
            for (panel, wide) in panels.iter().zip(all.chunks_exact_mut(length.max(1))) {
                for (block, wide) in panel.iter().zip(wide) {
                    L::store(block.wide::<L>(), &mut wide.0);
                }
            }
            all
        },
    )
}

/// With few rows several panels at once, as additions to one sum wait for each other.
#[inline(always)]
fn singles<L: Lanes, B: Single, const ROWS: usize>(panels: &[&[B]], x: &[f32], sums: &mut [Sums]) {
    let (mut panels, mut sums) = (panels, sums);
    if ROWS == 1 {
        while panels.len() >= 4 {
            single::<L, B, ROWS, 4>(panels, x, sums);
            (panels, sums) = (&panels[4..], &mut sums[4..]);
        }
    }
    if ROWS <= 3 || L::TWO_PANELS {
        while panels.len() >= 2 {
            single::<L, B, ROWS, 2>(panels, x, sums);
            (panels, sums) = (&panels[2..], &mut sums[2..]);
        }
    }
    for (panel, sums) in panels.iter().zip(sums) {
        single::<L, B, ROWS, 1>(&[panel], x, std::slice::from_mut(sums));
    }
}

#[inline(always)]
fn single<L: Lanes, B: Single, const ROWS: usize, const PANELS: usize>(
    panels: &[&[B]],
    x: &[f32],
    sums: &mut [Sums],
) {
    let (x, _) = x.as_chunks::<ROWS>();
    let mut tile = [[L::splat(0.0); PANELS]; ROWS];
    let mut weights: [&[B]; PANELS] = [&[]; PANELS];
    for panel in 0..PANELS {
        weights[panel] = &panels[panel][..x.len()];
    }
    for (at, x) in x.iter().enumerate() {
        for panel in 0..PANELS {
            let block = &weights[panel][at];
            if ROWS <= FEW {
                L::fetch(block);
            }
            let wide = block.wide::<L>();
            for row in 0..ROWS {
                tile[row][panel] = L::mul_add(wide, L::splat(x[row]), tile[row][panel]);
            }
        }
    }
    for (panel, sums) in sums[..PANELS].iter_mut().enumerate() {
        for row in 0..ROWS {
            let sum = L::add(L::load(&sums[row]), tile[row][panel]);
            L::store(sum, &mut sums[row]);
        }
    }
}

macro_rules! blocks {
    ($($name:ty),*) => {$(
        impl Tile for $name {
            type Input = Rounded;
            type Wide = Self;

            const DEPTH: usize = 1024;
            const TOGETHER: usize = 4;

            #[inline(always)]
            fn multiply<L: Lanes>(panels: &[&[Self]], x: &[Rounded], rows: usize, sums: &mut [Sums]) {
                for (panel, sums) in panels.iter().zip(sums) {
                    for_rows!(rows, in_blocks::<L, Self>(panel, x, sums));
                }
            }
        }
    )*};
}
blocks!(Q8Rows, Q6KRows, Q5KRows, Q4KRows);

/// A block of weights that meets x in whole numbers.
trait Whole: Block {
    /// Adds its products with the parts of x, `ROWS` for each.
    fn add<L: Lanes, const ROWS: usize>(&self, x: &[[Rounded; ROWS]], tile: &mut [L::F32; ROWS]);
}

#[inline(always)]
fn in_blocks<L: Lanes, B: Whole, const ROWS: usize>(panel: &[B], x: &[Rounded], sums: &mut Sums) {
    let (x, _) = x.as_chunks::<ROWS>();
    let mut tile = [L::splat(0.0); ROWS];
    for (tile, sums) in tile.iter_mut().zip(&*sums) {
        *tile = L::load(sums);
    }
    for (block, x) in panel.iter().zip(x.chunks_exact(B::Unit::LEN / PART)) {
        block.add::<L, ROWS>(x, &mut tile);
    }
    for (tile, sums) in tile.into_iter().zip(sums) {
        L::store(tile, sums);
    }
}

impl Whole for Q8Rows {
    #[inline(always)]
    fn add<L: Lanes, const ROWS: usize>(&self, x: &[[Rounded; ROWS]], tile: &mut [L::F32; ROWS]) {
        let scales = L::from_f16(&self.scales);
        let weights = L::signed(&self.values);
        for (x, tile) in x[0].iter().zip(tile) {
            let whole = L::from_i32(L::dot_signed(&weights, &x.values, x.start));
            *tile = L::mul_add(L::mul(scales, L::splat(x.scale)), whole, *tile);
        }
    }
}

impl Whole for Q6KRows {
    #[inline(always)]
    fn add<L: Lanes, const ROWS: usize>(&self, x: &[[Rounded; ROWS]], tile: &mut [L::F32; ROWS]) {
        const QUARTERS: usize = 4;
        let scale = L::from_f16(&self.scale);
        for (half, own) in self.halves.iter().enumerate() {
            let high = L::part(&own.high);
            for (low, quants) in own.quants.iter().enumerate() {
                let both = L::part(quants);
                for upper in 0..2 {
                    let quarter = low + 2 * upper;
                    let part = half * QUARTERS + quarter;
                    let low = if upper == 0 {
                        L::low(both)
                    } else {
                        L::high(both)
                    };
                    let weights = L::with_bits(low, high, 4 - 2 * quarter as i32, 0x30);
                    let first = L::mul(scale, L::from_i8(&self.scales[2 * part]));
                    let second = L::mul(scale, L::from_i8(&self.scales[2 * part + 1]));
                    for (x, tile) in x[part].iter().zip(&mut *tile) {
                        let a = L::dot(&weights, &x.values, 0..QUADS / 2, 6, x.starts[0]);
                        let b = L::dot(&weights, &x.values, QUADS / 2..QUADS, 6, x.starts[1]);
                        let whole = L::mul(first, L::from_i32(a));
                        let whole = L::mul_add(second, L::from_i32(b), whole);
                        *tile = L::mul_add(L::splat(x.scale), whole, *tile);
                    }
                }
            }
        }
    }
}

macro_rules! affine {
    ($($name:ident, $bits:literal $(, $high:ident)?);*) => {$(
        impl Whole for $name {
            #[inline(always)]
            fn add<L: Lanes, const ROWS: usize>(&self, x: &[[Rounded; ROWS]], tile: &mut [L::F32; ROWS]) {
                let scale = L::from_f16(&self.scale);
                let offset = L::from_f16(&self.offset);
                $(let $high = L::part(&self.$high);)?
                for part in 0..LEN / PART {
                    let quants = &self.quants[part / 2];
                    let weights = if part % 2 == 0 {
                        L::low(L::part(quants))
                    } else {
                        L::high(L::part(quants))
                    };
                    $(let weights = L::with_bits(weights, $high, 4 - part as i32, 0x10);)?
                    let scale = L::mul(scale, L::from_u8(&self.scales[part]));
                    let offset = L::mul(offset, L::from_u8(&self.offsets[part]));
                    for (x, tile) in x[part].iter().zip(&mut *tile) {
                        let whole = L::from_i32(L::dot(&weights, &x.values, 0..QUADS, $bits, 0));
                        let sum = L::mul_add(L::mul(scale, L::splat(x.scale)), whole, *tile);
                        *tile = L::neg_mul_add(offset, L::splat(x.sum), sum);
                    }
                }
            }
        }
    )*};
}
affine!(Q4KRows, 4; Q5KRows, 5, high);
