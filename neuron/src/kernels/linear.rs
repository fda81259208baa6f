//! `x · Wᵀ` for weights in any format. A few rows stream the weights once; many rows meet a panel of weights at a time, laid
//! out for the processor where there is a file for it, and else widened to f32 for a library.

use super::{vectorised, with_f32};
use crate::quant::{Matrix, Numbers, Q4K, Q5K, Q6K, Q8Block, each_format};
use candle_core::{Result, Tensor};
use dot::{Portable, Weight};
use half::{bf16, f16};
use rayon::prelude::*;

mod dot;
#[cfg(target_arch = "x86_64")]
mod dot_avx2;
#[cfg(target_arch = "x86_64")]
mod tile_avx2;

/// Up to this many rows are multiplied by streaming the weights.
const FEW: usize = 12;
/// Multiplications below which a second thread costs more than it brings.
const PER_THREAD: usize = 1 << 16;
/// Rows of weights that are widened together for any processor: with 2,048 inputs half a megabyte, which stays in the cache.
const PANEL: usize = 64;
/// Rows of x that meet a row of weights while it is in registers.
const TILE: usize = 4;

/// `x · Wᵀ` for x `(rows, in)` and W `(out, in)`: `(rows, out)`.
///
/// # Errors
/// When shapes do not fit, or x is not on the CPU in f32.
pub fn linear(x: &Tensor, weight: &Matrix) -> Result<Tensor> {
    let (rows, width) = x.dims2()?;
    if width != weight.width() {
        candle_core::bail!(
            "a row of {width} numbers meets weights for {}",
            weight.width()
        );
    }
    let product = with_f32(x, |x| multiply(x, rows, weight))?;
    Tensor::from_vec(product, (rows, weight.rows()), x.device())
}

/// Whether this processor has AVX2, FMA and F16C. The answer is cached by the standard library.
#[cfg(target_arch = "x86_64")]
pub(super) fn has_avx2() -> bool {
    is_x86_feature_detected!("avx2")
        && is_x86_feature_detected!("fma")
        && is_x86_feature_detected!("f16c")
}

fn multiply(x: &[f32], rows: usize, weight: &Matrix) -> Vec<f32> {
    #[cfg(target_arch = "x86_64")]
    if has_avx2() {
        return if rows > FEW {
            each_format!(weight.numbers(), all => tile_avx2::product(x, rows, all, weight.width()))
        } else {
            stream::<dot_avx2::Avx2>(x, rows, weight)
        };
    }
    if rows > FEW {
        many_rows(x, rows, weight)
    } else {
        stream::<Portable>(x, rows, weight)
    }
}

/// Each row of weights is read once and meets all rows of x while it is in the cache.
fn stream<D>(x: &[f32], rows: usize, weight: &Matrix) -> Vec<f32>
where
    D: Dot<f32> + Dot<f16> + Dot<bf16> + Dot<Q8Block> + Dot<Q6K> + Dot<Q5K> + Dot<Q4K>,
{
    each_format!(weight.numbers(), all => stream_as::<_, D>(x, rows, all, weight.width()))
}

/// The products of a row of weights with up to [`TILE`] rows of x, on some kind of processor.
trait Dot<W: Weight> {
    /// `out[i] = weights · xs[i]`; all of one length.
    fn rows(weights: &[W], xs: &[&[W::Input]], out: &mut [f32]);
}

fn stream_as<W: Weight, D: Dot<W>>(
    x: &[f32],
    rows: usize,
    weights: &[W],
    width: usize,
) -> Vec<f32> {
    let inputs: Vec<Vec<W::Input>> = x
        .chunks_exact(width.max(1))
        .map(|x| {
            vectorised(
                #[inline(always)]
                || W::inputs(x),
            )
        })
        .collect();
    let inputs: Vec<&[W::Input]> = inputs.iter().map(Vec::as_slice).collect();
    let units = width / W::LEN;
    let out = weights.len() / units.max(1);
    // (out, rows) first, as each thread owns rows of W; the transposition back is small
    let mut columns = vec![0.0; out * rows];
    let least = (PER_THREAD / (width * rows).max(1)).max(1);
    columns
        .par_chunks_exact_mut(rows.max(1))
        .zip(weights.par_chunks_exact(units.max(1)))
        .with_min_len(least)
        .for_each(|(column, weights)| {
            for (out, xs) in column.chunks_mut(TILE).zip(inputs.chunks(TILE)) {
                D::rows(weights, xs, out);
            }
        });
    if rows == 1 {
        return columns;
    }
    let mut product = vec![0.0; rows * out];
    for (o, column) in columns.chunks_exact(rows.max(1)).enumerate() {
        for (row, number) in column.iter().enumerate() {
            product[row * out + o] = *number;
        }
    }
    product
}

/// Where a thread writes its columns of the product.
#[derive(Clone, Copy)]
struct Columns(*mut f32);

// SAFETY: each thread writes other columns, see where one is made.
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

/// A panel of weights is widened once and meets all rows of x, on any processor.
fn many_rows(x: &[f32], rows: usize, weight: &Matrix) -> Vec<f32> {
    let (width, out) = (weight.width(), weight.rows());
    let mut product = vec![0.0; rows * out];
    let columns = Columns(product.as_mut_ptr());
    (0..out.div_ceil(PANEL)).into_par_iter().for_each_init(
        || vec![0.0; PANEL * width],
        |widened, panel| {
            let first = panel * PANEL;
            let count = PANEL.min(out - first);
            let panel: &[f32] = match weight.numbers() {
                Numbers::F32(all) => &all[first * width..(first + count) * width],
                _ => {
                    for (row, out) in widened.chunks_exact_mut(width).take(count).enumerate() {
                        weight.decode_row(first + row, out);
                    }
                    &widened[..count * width]
                }
            };
            debug_assert!(x.len() == rows * width && panel.len() == count * width);
            // product[r, first + c] = Σₖ x[r, k] · panel[c, k]
            // SAFETY: x is (rows, width) and the panel (count, width), both contiguous, and live for the call; the
            // product is (rows, out) and this thread alone writes its columns first..first + count.
            #[allow(unsafe_code)]
            unsafe {
                gemm::gemm(
                    rows,
                    count,
                    width,
                    columns.from(first),
                    1,
                    out as isize,
                    false, // what is there is not read
                    x.as_ptr(),
                    1,
                    width as isize,
                    panel.as_ptr(),
                    width as isize,
                    1,
                    0.0,
                    1.0,
                    false,
                    false,
                    false,
                    gemm::Parallelism::None,
                );
            }
        },
    );
    product
}

#[cfg(test)]
mod tests {
    use super::super::testing::{max_diff, numbers};
    use super::*;
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

    #[test]
    fn few_and_many_rows_meet_the_reference_in_every_format() {
        for format in Format::ALL {
            for (rows, width, out) in SHAPES {
                if !width.is_multiple_of(unit(format).0) {
                    continue;
                }
                let weight = matrix(format, out, width);
                let x = numbers(1, rows * width);
                let expected = reference(&x, &weight);
                // weights in blocks meet x in 8 bits, but for the panels of any processor
                let exact = 4e-5;
                let eight_bits = if unit(format).0 > 1 {
                    0.02 * (width as f64).sqrt()
                } else {
                    exact
                };
                let streamed = stream::<Portable>(&x, rows, &weight);
                let panels = many_rows(&x, rows, &weight);
                let dispatched = {
                    let x = Tensor::from_vec(x, (rows, width), &Device::Cpu).expect("fits");
                    let product = linear(&x, &weight).expect("fits");
                    with_f32(&product, <[f32]>::to_vec).expect("on the CPU")
                };
                for (path, found, bound) in [
                    ("streamed", streamed, eight_bits),
                    ("panels", panels, exact),
                    ("dispatched", dispatched, eight_bits),
                ] {
                    let diff = max_diff(&found, &expected);
                    assert!(
                        diff < bound,
                        "{path} {format}, {rows} x {width} x {out}: {diff}"
                    );
                }
            }
        }
    }

    #[test]
    fn every_processor_gives_the_same_numbers_for_blocks() {
        // products within a block are whole numbers: only the order in which blocks are summed may differ
        for format in [Format::Q8_0, Format::Q6K, Format::Q5K, Format::Q4K] {
            for rows in 1..=FEW {
                let (width, out) = (1792, 9);
                let weight = matrix(format, out, width);
                let x = numbers(3, rows * width);
                let portable: Vec<f64> = stream::<Portable>(&x, rows, &weight)
                    .into_iter()
                    .map(f64::from)
                    .collect();
                let diff = max_diff(&multiply(&x, rows, &weight), &portable);
                assert!(diff < 2e-5, "{format}, {rows} rows: {diff}");
            }
        }
    }

    #[test]
    fn rounded_rows_of_x_lose_no_more_than_their_bits() {
        // weights of blocks of 256 meet x in 8 bits: held to f64 with x as it was rounded
        for format in [Format::Q6K, Format::Q5K, Format::Q4K] {
            let (width, out) = (768, 6);
            let weight = matrix(format, out, width);
            let x = numbers(4, width);
            let inputs = <Q4K as Weight>::inputs(&x);
            let rounded: Vec<f32> = inputs
                .iter()
                .flat_map(|input| input.values.map(|value| input.scale * f32::from(value)))
                .collect();
            let expected = reference(&rounded, &weight);
            let diff = max_diff(&multiply(&x, 1, &weight), &expected);
            assert!(diff < 2e-5, "{format}: {diff}");
        }
    }

    #[cfg(target_arch = "x86_64")]
    #[test]
    fn panels_of_blocks_lose_no_more_than_the_bits_of_x() {
        if !has_avx2() {
            return; // there are none
        }
        for format in [Format::Q8_0, Format::Q6K, Format::Q5K, Format::Q4K] {
            for rows in [1, 4, 7, 10] {
                let (width, out) = (1792, 21);
                let weight = matrix(format, out, width);
                let x = numbers(4, rows * width);
                let inputs = <Q8Block as Weight>::inputs(&x);
                let rounded: Vec<f32> = inputs
                    .iter()
                    .flat_map(|input| input.values.map(|value| input.scale * f32::from(value)))
                    .collect();
                let expected = reference(&rounded, &weight);
                let found =
                    each_format!(weight.numbers(), all => tile_avx2::product(&x, rows, all, width));
                let diff = max_diff(&found, &expected);
                assert!(diff < 6e-5, "{format}, {rows} rows: {diff}");
            }
        }
    }

    #[test]
    fn a_row_of_another_width_is_refused() {
        let x = Tensor::zeros((1, 5), candle_core::DType::F32, &Device::Cpu).expect("fits");
        assert!(linear(&x, &matrix(Format::F32, 3, 4)).is_err());
    }
}
