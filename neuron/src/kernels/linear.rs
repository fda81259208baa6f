//! `x · Wᵀ`. A few rows stream the weights once each through own code; many rows go to candle's blocked product, which
//! packs the whole weight first and is dearer than that below a dozen rows.

use super::{dot, with_f32};
use candle_core::{Result, Tensor};
use rayon::prelude::*;

/// Up to this many rows are multiplied here.
const FEW: usize = 12;
/// Multiplications below which a second thread costs more than it brings.
const PER_THREAD: usize = 1 << 16;

/// `x · Wᵀ` for x `(rows, in)` and W `(out, in)`, both contiguous f32: `(rows, out)`.
///
/// # Errors
/// When shapes do not fit, or the tensors are not on the CPU in f32.
pub fn linear(x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    let (rows, width) = x.dims2()?;
    let (out, weight_width) = weight.dims2()?;
    if width != weight_width {
        candle_core::bail!("a row of {width} numbers meets weights for {weight_width}");
    }
    if rows > FEW {
        return x.matmul(&weight.t()?);
    }
    let product = with_f32(x, |x| {
        with_f32(weight, |weight| few_rows(x, weight, rows, width, out))
    })??;
    Tensor::from_vec(product, (rows, out), x.device())
}

/// Each weight is read once and meets all rows while it is in the cache.
fn few_rows(x: &[f32], weight: &[f32], rows: usize, width: usize, out: usize) -> Vec<f32> {
    let mut product = vec![0.0; rows * out];
    // (out, rows) first, as each thread owns rows of W; the transposition back is small
    let mut columns = vec![0.0; out * rows];
    let least = (PER_THREAD / (width * rows).max(1)).max(1);
    columns
        .par_chunks_exact_mut(rows.max(1))
        .with_min_len(least)
        .zip(weight.par_chunks_exact(width))
        .for_each(|(column, weights)| {
            for (number, row) in column.iter_mut().zip(x.chunks_exact(width)) {
                *number = dot(row, weights);
            }
        });
    for (o, column) in columns.chunks_exact(rows.max(1)).enumerate() {
        for (row, number) in column.iter().enumerate() {
            product[row * out + o] = *number;
        }
    }
    product
}

#[cfg(test)]
mod tests {
    use super::super::testing::{max_diff, numbers};
    use super::*;
    use candle_core::Device;

    #[test]
    fn few_and_many_rows_meet_the_reference() {
        for (rows, width, out) in [
            (1, 7, 5),
            (2, 64, 33),
            (12, 100, 17),
            (13, 100, 17),
            (40, 31, 9),
        ] {
            let (x, weight) = (numbers(1, rows * width), numbers(2, out * width));
            let mut expected = Vec::new();
            for row in x.chunks(width) {
                for weights in weight.chunks(width) {
                    expected.push(
                        row.iter()
                            .zip(weights)
                            .map(|(x, w)| f64::from(*x) * f64::from(*w))
                            .sum(),
                    );
                }
            }
            let x = Tensor::from_vec(x, (rows, width), &Device::Cpu).expect("a tensor");
            let weight = Tensor::from_vec(weight, (out, width), &Device::Cpu).expect("a tensor");
            let found: Vec<f32> = linear(&x, &weight)
                .expect("fits")
                .flatten_all()
                .expect("flat")
                .to_vec1()
                .expect("numbers");
            assert!(
                max_diff(&found, &expected) < 1e-5,
                "{rows} x {width} x {out}"
            );
        }
    }
}
