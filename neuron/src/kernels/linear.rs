//! `x · Wᵀ` for weights in any format, which lie in panels (`quant::panels`): few rows stream the weights once, many
//! rows meet some panels at a time, which stay in the caches meanwhile.

use super::{has_avx2, has_avx512, with_f32};
use crate::quant::panels::PANEL;
use crate::quant::{Matrix, Numbers, Unit, each_format};
use candle_core::{Result, Tensor};
use lanes::{Lanes, Portable};
use rayon::prelude::*;
use std::ops::Range;
use tiles::{Input, MOST_ROWS, Rounded, Sums, Tile, rows_at_once};

mod lanes;
#[cfg(target_arch = "x86_64")]
mod lanes_avx2;
#[cfg(target_arch = "x86_64")]
mod lanes_avx512;
mod tiles;

/// Multiplications below which a second thread costs more than it brings.
const PER_THREAD: usize = 1 << 16;
/// Panels that a group of rows of x meets while it is in the first cache; with blocks of 1,024 inputs they stay in the second.
const STRIPE: usize = 4;

/// The kinds of processors there are kernels for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Processor {
    /// Any.
    Portable,
    /// With AVX2, FMA and F16C.
    Avx2,
    /// With AVX-512 F, BW, VL, DQ and VNNI besides.
    Avx512,
}

impl Processor {
    /// All of them, the fastest last.
    const ALL: [Self; 3] = [Self::Portable, Self::Avx2, Self::Avx512];

    /// Those that this one is, the fastest last.
    pub fn available() -> impl DoubleEndedIterator<Item = Self> {
        Self::ALL.into_iter().filter(|kind| kind.is_here())
    }

    fn is_here(self) -> bool {
        match self {
            Self::Portable => true,
            Self::Avx2 => has_avx2(),
            Self::Avx512 => has_avx512(),
        }
    }

    fn fastest() -> Self {
        Self::available()
            .next_back()
            .expect("every processor is of some kind")
    }
}

/// `x · Wᵀ` for x `(rows, in)` and W `(out, in)`: `(rows, out)`.
///
/// # Errors
/// When shapes do not fit, or x is not on the CPU in f32.
pub fn linear(x: &Tensor, weight: &Matrix) -> Result<Tensor> {
    together(x, [weight]).map(|[product]| product)
}

/// [`linear`] for several weights that meet the same x: they share one preparation of it, and threads are woken once for all.
///
/// # Errors
/// As [`linear`].
pub fn together<const N: usize>(x: &Tensor, weights: [&Matrix; N]) -> Result<[Tensor; N]> {
    let (rows, width) = x.dims2()?;
    if let Some(other) = weights.iter().find(|weight| weight.width() != width) {
        candle_core::bail!(
            "a row of {width} numbers meets weights for {}",
            other.width()
        );
    }
    let products = with_f32(x, |x| multiply(x, rows, weights, Processor::fastest()))?;
    let mut tensors = Vec::with_capacity(N);
    for (product, weight) in products.into_iter().zip(weights) {
        tensors.push(Tensor::from_vec(
            product,
            (rows, weight.rows()),
            x.device(),
        )?);
    }
    Ok(tensors
        .try_into()
        .expect("a tensor for each of the weights"))
}

/// `x · Wᵀ` for `rows` rows of x and each of the weights, by the kernels for `processor`.
///
/// # Panics
/// When `x` has another length than the weights need, or the processor is not [available](Processor::available).
#[must_use]
pub fn multiply<const N: usize>(
    x: &[f32],
    rows: usize,
    weights: [&Matrix; N],
    processor: Processor,
) -> [Vec<f32>; N] {
    for weight in weights {
        assert_eq!(x.len(), rows * weight.width(), "rows of {}", weight.width());
    }
    match processor {
        Processor::Portable => products::<Portable, N>(x, rows, weights),
        #[cfg(target_arch = "x86_64")]
        Processor::Avx2 if processor.is_here() => products::<lanes_avx2::Avx2, N>(x, rows, weights),
        #[cfg(target_arch = "x86_64")]
        Processor::Avx512 if processor.is_here() => {
            products::<lanes_avx512::Avx512, N>(x, rows, weights)
        }
        other => panic!("this processor is no {other:?}"),
    }
}

fn products<L: Lanes, const N: usize>(
    x: &[f32],
    rows: usize,
    weights: [&Matrix; N],
) -> [Vec<f32>; N] {
    let inputs = Inputs::new::<L>(x, rows, &weights);
    let mut products = weights.map(|weight| Vec::with_capacity(rows * weight.rows()));
    let columns = products
        .each_mut()
        .map(|product: &mut Vec<f32>| Columns(product.as_mut_ptr()));
    let stripes = weights.map(|weight| weight.rows().div_ceil(STRIPE * PANEL));
    let least = PER_THREAD / (STRIPE * PANEL * x.len()).max(1);
    (0..stripes.iter().sum())
        .into_par_iter()
        .with_min_len(least.max(1))
        .for_each(|mut stripe: usize| {
            // each stripe of a product is that of one task
            let mut at = 0;
            while stripe >= stripes[at] {
                stripe -= stripes[at];
                at += 1;
            }
            each_format!(weights[at].numbers(), all => {
                multiply_stripe::<L, _>(&inputs, all, weights[at], stripe, columns[at]);
            });
        });
    for (product, weight) in products.iter_mut().zip(weights) {
        // SAFETY: there is room for as many, and the stripes, which are all columns, have written each row
        #[allow(unsafe_code)]
        unsafe {
            product.set_len(rows * weight.rows());
        }
    }
    products
}

/// x as kernels read it: of each group of rows, for every input, its rows side by side.
pub(super) struct Inputs {
    /// Rows that meet panels together.
    groups: Vec<Range<usize>>,
    /// For weights that are single numbers.
    singles: Vec<Vec<f32>>,
    /// For weights in blocks.
    rounded: Vec<Vec<Rounded>>,
}

impl Inputs {
    /// `rows` rows of x, in what these weights take.
    fn new<L: Lanes>(x: &[f32], rows: usize, weights: &[&Matrix]) -> Self {
        let mut groups = Vec::new();
        let mut first = 0;
        while first < rows {
            let count = rows_at_once::<L>(rows - first);
            groups.push(first..first + count);
            first += count;
        }
        let width = x.len() / rows.max(1);
        let in_blocks = |weight: &&Matrix| crate::quant::unit(weight.format()).0 > 1;
        Self {
            singles: if weights.iter().all(in_blocks) {
                Vec::new()
            } else {
                packed::<L, f32>(x, width, &groups)
            },
            rounded: if weights.iter().any(in_blocks) {
                packed::<L, Rounded>(x, width, &groups)
            } else {
                Vec::new()
            },
            groups,
        }
    }
}

/// x in one of the forms, a list for each group.
fn packed<L: Lanes, I: Input>(x: &[f32], width: usize, groups: &[Range<usize>]) -> Vec<Vec<I>> {
    let pack = |group: &Range<usize>| {
        L::run(
            #[inline(always)]
            || {
                let mut inputs = Vec::with_capacity(group.len() * (width / I::LEN));
                for from in (0..width).step_by(I::LEN) {
                    for row in group.clone() {
                        inputs.push(I::new(&x[row * width + from..][..I::LEN]));
                    }
                }
                inputs
            },
        )
    };
    if x.len() < PER_THREAD {
        groups.iter().map(pack).collect()
    } else {
        groups.par_iter().map(pack).collect()
    }
}

/// Where a thread writes its columns of the product.
#[derive(Clone, Copy)]
struct Columns(*mut f32);

// SAFETY: each thread writes other columns, see where one is used.
#[allow(unsafe_code)]
unsafe impl Send for Columns {}
// SAFETY: as above.
#[allow(unsafe_code)]
unsafe impl Sync for Columns {}

impl Columns {
    /// The number `at` behind the first.
    fn from(self, at: usize) -> *mut f32 {
        self.0.wrapping_add(at)
    }
}

/// Writes the columns of stripe `stripe` of the product with `weight`, whose numbers are `all`: each of every row, once. Nobody
/// else may touch them meanwhile.
fn multiply_stripe<L: Lanes, B: Tile>(
    inputs: &Inputs,
    all: &[B],
    weight: &Matrix,
    stripe: usize,
    columns: Columns,
) {
    let (out, width) = (weight.rows(), weight.width());
    let groups = &inputs.groups;
    let count = width / B::Unit::LEN; // blocks of a panel
    // one group reads panels from end to end, as they lie; single numbers are summed in pieces, which keeps more digits
    let depth = if groups.len() > 1 || B::Unit::LEN == 1 {
        B::DEPTH / B::Unit::LEN
    } else {
        count
    };
    let first = stripe * STRIPE * PANEL; // column
    let held = STRIPE.min((out - first).div_ceil(PANEL));
    let all = &all[stripe * STRIPE * count..][..held * count];
    // sums stay here until they are whole: rows of the product may lie so that they push each other out of the caches
    let mut few = [[[0.0; PANEL]; MOST_ROWS]; STRIPE];
    let mut many = Vec::new();
    let sums = if groups.len() > 1 {
        many.resize(groups.len() * held, few[0]);
        &mut many[..]
    } else {
        &mut few[..held]
    };
    for start in (0..count).step_by(depth.max(1)) {
        let end = count.min(start + depth);
        let mut panels: [&[B]; STRIPE] = [&[]; STRIPE];
        for (own, panel) in panels.iter_mut().zip(all.chunks_exact(count)) {
            *own = &panel[start..end];
        }
        let panels = &panels[..held];
        let wide = if groups.len() >= WIDEN {
            B::widened::<L>(panels)
        } else {
            None
        };
        match &wide {
            Some(wide) => {
                let mut panels: [&[B::Wide]; STRIPE] = [&[]; STRIPE];
                for (panel, wide) in panels.iter_mut().zip(wide.chunks(end - start)) {
                    *panel = wide;
                }
                add_products::<L, B::Wide>(inputs, start..end, &panels[..held], sums);
            }
            None => add_products::<L, B>(inputs, start..end, panels, sums),
        }
    }
    for (group, sums) in groups.iter().zip(sums.chunks_exact(held)) {
        for (at, row) in group.clone().enumerate() {
            for (panel, sums) in sums.iter().enumerate() {
                let from = first + panel * PANEL;
                let to = columns.from(row * out + from);
                // SAFETY: there is room for (rows, out), and nobody else touches the columns of this stripe
                #[allow(unsafe_code)]
                unsafe {
                    match out - from {
                        // mostly all of a panel, which takes an instruction or two
                        PANEL.. => to.cast::<[f32; PANEL]>().write_unaligned(sums[at]),
                        left => to.copy_from_nonoverlapping(sums[at].as_ptr(), left),
                    }
                }
            }
        }
    }
}

/// Adds the products of all rows with the inputs `own`, counted in units of weights, of some panels. `sums` has those of each group,
/// for each panel.
fn add_products<L: Lanes, B: Tile>(
    inputs: &Inputs,
    own: Range<usize>,
    panels: &[&[B]],
    sums: &mut [Sums],
) {
    let groups = &inputs.groups;
    // many rows meet as many panels as stay in the first cache, one group after another
    let together = if groups.len() > 1 {
        B::TOGETHER
    } else {
        STRIPE
    };
    let of_input = B::Unit::LEN / B::Input::LEN;
    let of_group = panels.len();
    for (at, panels) in panels.chunks(together).enumerate() {
        let all = groups.iter().zip(B::Input::of(inputs));
        for ((group, x), sums) in all.zip(sums.chunks_exact_mut(of_group)) {
            let x = &x[own.start * of_input * group.len()..own.end * of_input * group.len()];
            let sums = &mut sums[at * together..][..panels.len()];
            run_tiles::<L, B>(panels, x, group.len(), sums);
        }
    }
}

/// Groups of rows from which on it pays to widen a panel once for all of them.
const WIDEN: usize = 3;

fn run_tiles<L: Lanes, B: Tile>(panels: &[&[B]], x: &[B::Input], rows: usize, sums: &mut [Sums]) {
    L::run(
        #[inline(always)]
        || B::multiply::<L>(panels, x, rows, sums),
    );
}

/// Begins to bring what lies some kilobytes behind `here` into the second cache: where a few panels are read at once, that
/// makes 24 GB/s of 20. The first cache is no place for it, as a core waits there for a few lines only.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
fn fetch<T>(here: &T) {
    use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
    const AHEAD: usize = 4096;
    let here: *const i8 = std::ptr::from_ref(here).cast();
    // SAFETY: every x86-64 has SSE; an address behind the weights is no fault, as nothing is read
    #[allow(unsafe_code)]
    unsafe {
        _mm_prefetch(here.wrapping_add(AHEAD), _MM_HINT_T1);
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{max_diff, numbers};
    use super::*;
    use crate::quant::panels::PART;
    use crate::quant::{Format, unit};
    use candle_core::Device;

    const SHAPES: [(usize, usize, usize); 15] = [
        (1, 7, 5),
        (1, 96, 70),
        (2, 64, 33),
        (3, 32, 1),
        (7, 160, 9),
        (12, 100, 17),
        (13, 100, 17),
        (40, 64, 131),
        (1, 768, 11),
        (2, 256, 3),
        (7, 1280, 5),
        (13, 512, 66),
        (6, 1024, 16),
        (23, 1792, 40),
        (5, 3, 1),
    ];

    fn matrix(format: Format, out: usize, width: usize) -> Matrix {
        let values = numbers(2, out * width);
        Matrix::from_rows(
            format,
            out,
            width,
            &|row, numbers: &mut [f32]| {
                numbers.copy_from_slice(&values[row * width..][..width]);
            },
            |_| {},
        )
        .expect("they fit")
    }

    /// In f64, with the numbers that the matrix holds.
    fn reference(x: &[f32], weight: &Matrix) -> Vec<f64> {
        let mut weights = vec![0.0; weight.width()];
        let mut columns = Vec::new();
        for row in 0..weight.rows() {
            weight.decode_row(row, &mut weights);
            columns.push(weights.clone());
        }
        let mut expected = Vec::new();
        for row in x.chunks(weight.width()) {
            expected.extend(columns.iter().map(|weights| {
                let pairs = row.iter().zip(weights);
                pairs
                    .map(|(x, w)| f64::from(*x) * f64::from(*w))
                    .sum::<f64>()
            }));
        }
        expected
    }

    /// x as it meets blocks: rounded to 8 bits in parts.
    fn rounded(x: &[f32]) -> Vec<f32> {
        x.chunks_exact(PART)
            .map(Rounded::new)
            .flat_map(|part| {
                let values = part.values.into_iter().flatten();
                values.map(move |value| part.scale * f32::from(value))
            })
            .collect()
    }

    #[test]
    fn every_processor_meets_the_reference_in_every_format() {
        for format in Format::ALL {
            for (rows, width, out) in SHAPES {
                if !width.is_multiple_of(unit(format).0) {
                    continue;
                }
                let weight = matrix(format, out, width);
                let x = numbers(1, rows * width);
                let in_blocks = unit(format).0 > 1;
                let met = if in_blocks { rounded(&x) } else { x.clone() };
                let expected = reference(&met, &weight);
                for processor in Processor::available() {
                    let [found] = multiply(&x, rows, [&weight], processor);
                    let diff = max_diff(&found, &expected);
                    assert!(
                        diff < 6e-5,
                        "{processor:?} {format}, {rows} x {width} x {out}: {diff}"
                    );
                }
                // what rounding x costs is small
                let diff = max_diff(&met, &x.iter().map(|x| f64::from(*x)).collect::<Vec<_>>());
                assert!(diff < 0.5 / 127.0 + 1e-6, "{diff}");
            }
        }
    }

    #[test]
    fn a_row_is_the_same_to_the_bit_whatever_stands_beside_it() {
        for processor in Processor::available() {
            for format in Format::ALL {
                let (rows, width, out) = (23, 1792, 40);
                let weight = matrix(format, out, width);
                let x = numbers(3, rows * width);
                let alone: Vec<Vec<f32>> = x
                    .chunks(width)
                    .flat_map(|x| multiply(x, 1, [&weight], processor))
                    .collect();
                for rows in 1..=rows {
                    let [together] = multiply(&x[..rows * width], rows, [&weight], processor);
                    let same = together.chunks(out).zip(&alone).all(|(a, b)| a == b);
                    assert!(same, "{processor:?} {format}: {rows} rows");
                }
            }
        }
    }

    #[test]
    fn weights_together_give_what_each_gives_alone() {
        let (rows, width) = (5, 256);
        let weights = [(Format::Q8_0, 70), (Format::Bf16, 3), (Format::Q4K, 130)]
            .map(|(format, out)| matrix(format, out, width));
        let x = Tensor::from_vec(numbers(6, rows * width), (rows, width), &Device::Cpu);
        let x = x.expect("fits");
        let [a, b, c] = &weights;
        let all = together(&x, [a, b, c]).expect("fit");
        for (found, weight) in all.iter().zip(&weights) {
            let alone = linear(&x, weight).expect("fits");
            assert_eq!(found.dims(), [rows, weight.rows()]);
            let numbers = |tensor: &Tensor| tensor.to_vec2::<f32>().expect("two dimensions");
            assert_eq!(numbers(found), numbers(&alone));
        }
    }

    #[test]
    fn a_row_of_another_width_is_refused() {
        let x = Tensor::zeros((1, 5), candle_core::DType::F32, &Device::Cpu).expect("fits");
        assert!(linear(&x, &matrix(Format::F32, 3, 4)).is_err());
    }
}
