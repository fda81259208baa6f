//! Root-mean-square norms over the rows of a matrix.

use super::{by_rows, silu};

/// `y = x / sqrt(mean(x²) + eps) · w` for every `w.len()` numbers of `x`.
pub fn rms_norm(x: &mut [f32], weight: &[f32], eps: f32) {
    by_rows(x, weight.len(), |_, x| {
        for row in x.chunks_exact_mut(weight.len()) {
            let scale = inverse_rms(row, eps);
            for (x, w) in row.iter_mut().zip(weight) {
                *x = *x * scale * w;
            }
        }
    });
}

/// `y = w · x / sqrt(mean(x²) + eps) · silu(z)`: the norm comes before the gate.
pub fn gated_rms_norm(x: &mut [f32], z: &[f32], weight: &[f32], eps: f32) {
    let width = weight.len();
    by_rows(x, width, |first, x| {
        let z = &z[first * width..];
        for (row, z) in x.chunks_exact_mut(width).zip(z.chunks_exact(width)) {
            let scale = inverse_rms(row, eps);
            for ((x, w), z) in row.iter_mut().zip(weight).zip(z) {
                *x = *x * scale * w * silu(*z);
            }
        }
    });
}

#[inline(always)]
fn inverse_rms(row: &[f32], eps: f32) -> f32 {
    let mean = super::dot(row, row) / row.len() as f32;
    1.0 / (mean + eps).sqrt()
}

#[cfg(test)]
mod tests {
    use super::super::testing::{max_diff, numbers};
    use super::*;

    fn reference(x: &[f32], gate: impl Fn(usize) -> f64, weight: &[f32], eps: f64) -> Vec<f64> {
        let width = weight.len();
        let mut y = Vec::new();
        for (r, row) in x.chunks(width).enumerate() {
            let mean = row.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>() / width as f64;
            for (c, x) in row.iter().enumerate() {
                y.push(
                    f64::from(*x) / (mean + eps).sqrt()
                        * f64::from(weight[c])
                        * gate(r * width + c),
                );
            }
        }
        y
    }

    #[test]
    fn both_norms_meet_the_reference() {
        for width in [1, 7, 16, 65] {
            let (x, z, weight) = (
                numbers(1, 3 * width),
                numbers(2, 3 * width),
                numbers(3, width),
            );
            let mut plain = x.clone();
            rms_norm(&mut plain, &weight, 1e-6);
            assert!(
                max_diff(&plain, &reference(&x, |_| 1.0, &weight, 1e-6)) < 1e-5,
                "width {width}"
            );
            let mut gated = x.clone();
            gated_rms_norm(&mut gated, &z, &weight, 1e-6);
            let gate = |i: usize| f64::from(z[i]) / (1.0 + (-f64::from(z[i])).exp());
            assert!(
                max_diff(&gated, &reference(&x, gate, &weight, 1e-6)) < 1e-5,
                "width {width}"
            );
        }
    }
}
