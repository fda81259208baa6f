//! The operations that models are made of, on the CPU in f32 and on CUDA devices; [`rows`] has what is common to both.
//!
//! Each has a plain reference beside it in its tests, and is held to it on shapes that do not divide evenly.

use candle_core::{CpuStorage, DType, Result, Storage, Tensor};
use rayon::prelude::*;

pub mod attention;
pub mod causal_conv;
pub mod choose;
pub mod cuda;
pub mod delta_rule;
pub mod linear;
pub mod norm;
pub(crate) mod pages;
pub mod peaks;
pub mod rows;
mod vector;

pub use pages::keep_freed_memory;

/// Gives `read` the numbers of a contiguous f32 tensor on the CPU, without copying them.
///
/// # Errors
/// When the tensor is of another kind, or not contiguous.
pub fn with_f32<T>(tensor: &Tensor, read: impl FnOnce(&[f32]) -> T) -> Result<T> {
    let (storage, layout) = tensor.storage_and_layout();
    match &*storage {
        Storage::Cpu(CpuStorage::F32(numbers)) => match layout.contiguous_offsets() {
            Some((start, end)) => Ok(read(&numbers[start..end])),
            None => {
                candle_core::bail!("a kernel needs a contiguous tensor, this one is {layout:?}")
            }
        },
        Storage::Cpu(_) => candle_core::bail!(
            "a CPU kernel needs {:?}, got {:?}",
            DType::F32,
            tensor.dtype()
        ),
        _ => candle_core::bail!(
            "this kernel is for the CPU, the tensor is on {:?}",
            tensor.device().location()
        ),
    }
}

/// Whether this processor has AVX2, FMA and F16C. The answer is cached by the standard library.
pub(crate) fn has_avx2() -> bool {
    #[cfg(target_arch = "x86_64")]
    {
        is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("f16c")
    }
    #[cfg(not(target_arch = "x86_64"))]
    false
}

/// Whether it has AVX-512 F, BW, VL, DQ and VNNI besides.
pub(crate) fn has_avx512() -> bool {
    #[cfg(target_arch = "x86_64")]
    {
        has_avx2()
            && is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512vnni")
    }
    #[cfg(not(target_arch = "x86_64"))]
    false
}

/// Runs `work` compiled for the widest vectors this processor has, as far as it is inlined: loops over slices gain
/// two to four times. What it computes is the same.
#[inline]
pub(crate) fn vectorised<T>(work: impl FnOnce() -> T) -> T {
    #[cfg(target_arch = "x86_64")]
    {
        #[target_feature(enable = "avx2,fma,f16c")]
        fn with_avx2<T>(work: impl FnOnce() -> T) -> T {
            work()
        }
        if has_avx2() {
            // SAFETY: the processor has what the function is compiled for
            #[allow(unsafe_code)]
            return unsafe { with_avx2(work) };
        }
    }
    work()
}

/// `eˣ` within 2 · 10⁻⁷ of it, for x from −87 to 88 and as at the nearer end beyond. Unlike the standard library's it can
/// be computed for a vector at once: 2ⁿ times a polynomial of what is left of x (Cephes, `expf`).
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    const SHIFT: f32 = 12_582_912.0; // 1.5 · 2²³: the sum has no digits behind the point
    const LN_2: [f32; 2] = [0.693_359_4, -2.121_944_4e-4]; // the first has few digits, so that n times it is exact
    let x = x.clamp(-87.33, 88.37);
    let shifted = x * std::f32::consts::LOG2_E + SHIFT;
    let n = shifted - SHIFT;
    let r = x - n * LN_2[0] - n * LN_2[1];
    let mut y = 1.987_569_1e-4;
    for coefficient in [
        1.398_199_9e-3,
        8.333_452e-3,
        4.166_58e-2,
        1.666_666_5e-1,
        0.5,
    ] {
        y = y * r + coefficient;
    }
    let y = y * r * r + r + 1.0;
    // n is in the last digits of the sum
    let power = (shifted.to_bits() << 23).wrapping_add(1f32.to_bits());
    y * f32::from_bits(power)
}

/// The logistic function.
#[inline(always)]
#[must_use]
pub fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

/// `x · sigmoid(x)`.
#[inline(always)]
#[must_use]
pub fn silu(x: f32) -> f32 {
    x * sigmoid(x)
}

/// Numbers below which a second thread costs more than it brings.
const PER_THREAD: usize = 1 << 15;

/// Does `work` with pieces of `numbers` of a whole number of rows of `width`: a few for each thread where there are many
/// numbers, or one. `work` is told the first row of its piece.
pub(crate) fn by_rows(numbers: &mut [f32], width: usize, work: impl Fn(usize, &mut [f32]) + Sync) {
    let work = |first, piece: &mut [f32]| {
        vectorised(
            #[inline(always)]
            || work(first, piece),
        );
    };
    if numbers.len() < 2 * PER_THREAD {
        return work(0, numbers);
    }
    let rows = (PER_THREAD / width.max(1)).max(1);
    let pieces = numbers.par_chunks_mut(rows * width).enumerate();
    pieces.for_each(|(index, piece)| work(index * rows, piece));
}

/// `silu(gate) ∘ up`, for tensors of one shape.
///
/// # Errors
/// When they are not on the CPU in f32.
pub fn swiglu(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    let mut gated = with_f32(up, <[f32]>::to_vec)?;
    with_f32(gate, |gate| {
        by_rows(&mut gated, 1, |first, up| {
            for (up, gate) in up.iter_mut().zip(&gate[first..]) {
                *up *= silu(*gate);
            }
        });
    })?;
    Tensor::from_vec(gated, gate.shape(), gate.device())
}

/// `x ← x ∘ sigmoid(gate)`; both of one length.
pub fn gate(x: &mut [f32], gate: &[f32]) {
    by_rows(x, 1, |first, x| {
        for (x, gate) in x.iter_mut().zip(&gate[first..]) {
            *x *= sigmoid(*gate);
        }
    });
}

/// Where the largest finite number is: of equals the first, as in every other implementation.
#[must_use]
pub fn argmax(numbers: &[f32]) -> Option<usize> {
    let mut best: Option<(usize, f32)> = None;
    for (at, &number) in numbers.iter().enumerate() {
        if number.is_finite() && best.is_none_or(|(_, peak)| number > peak) {
            best = Some((at, number));
        }
    }
    best.map(|(at, _)| at)
}

/// The sum of products. Sixteen sums run side by side, so that the compiler may use vectors.
#[inline]
#[must_use]
pub fn dot(a: &[f32], b: &[f32]) -> f32 {
    const LANES: usize = 16;
    let mut sums = [0.0; LANES];
    let (a_chunks, b_chunks) = (a.chunks_exact(LANES), b.chunks_exact(LANES));
    let tail: f32 = a_chunks
        .remainder()
        .iter()
        .zip(b_chunks.remainder())
        .map(|(x, y)| x * y)
        .sum();
    for (x, y) in a_chunks.zip(b_chunks) {
        for lane in 0..LANES {
            sums[lane] += x[lane] * y[lane];
        }
    }
    sums.iter().sum::<f32>() + tail
}

/// `y ← y + a · x`.
#[inline]
pub fn add_scaled(y: &mut [f32], a: f32, x: &[f32]) {
    for (y, x) in y.iter_mut().zip(x) {
        *y += a * x;
    }
}

#[cfg(test)]
mod tests {
    use super::testing::{max_diff, numbers};
    use super::*;
    use candle_core::Device;

    #[test]
    fn powers_of_e_are_near_enough() {
        for step in -87_000..=88_000 {
            let x = step as f32 / 1000.0;
            let expected = f64::from(x).exp();
            let error = (f64::from(exp(x)) - expected).abs() / expected;
            assert!(error < 2e-7, "{x}: {error}");
        }
        assert!(exp(f32::NAN).is_nan());
        assert!(exp(f32::NEG_INFINITY) < 1e-37 && exp(f32::INFINITY) > 1e38);
        assert!(sigmoid(-1e9) < 1e-37 && sigmoid(1e9) == 1.0);
    }

    #[test]
    fn gates_meet_the_reference_on_few_and_many_numbers() {
        for count in [1, 37, 3 * PER_THREAD + 5] {
            let (x, gates) = (numbers(1, count), numbers(2, count));
            let logistic = |x: f32| 1.0 / (1.0 + (-f64::from(x)).exp());
            let both = x.iter().zip(&gates);
            let expected: Vec<f64> = both
                .clone()
                .map(|(x, g)| f64::from(*x) * logistic(*g))
                .collect();
            let mut gated = x.clone();
            gate(&mut gated, &gates);
            assert!(max_diff(&gated, &expected) < 1e-6, "{count}");
            let expected: Vec<f64> = both
                .map(|(x, g)| f64::from(*x) * f64::from(*g) * logistic(*g))
                .collect();
            let tensor = |numbers: &[f32]| Tensor::new(numbers, &Device::Cpu).unwrap();
            let gated = swiglu(&tensor(&gates), &tensor(&x)).unwrap();
            assert!(
                max_diff(&gated.to_vec1().unwrap(), &expected) < 1e-6,
                "{count}"
            );
        }
    }
}

#[cfg(any(test, feature = "cuda"))]
pub(crate) mod testing {
    //! Numbers for tests, and for the checks of a device.

    use rand::rngs::StdRng;
    use rand::{Rng, SeedableRng};

    /// `count` numbers between -1 and 1, the same for the same seed.
    pub(crate) fn numbers(seed: u64, count: usize) -> Vec<f32> {
        let mut random = StdRng::seed_from_u64(seed);
        (0..count).map(|_| random.random_range(-1.0..1.0)).collect()
    }

    /// Largest difference between numbers and what they should be.
    #[cfg(test)]
    pub(crate) fn max_diff(found: &[f32], expected: &[f64]) -> f64 {
        assert_eq!(found.len(), expected.len(), "as many numbers as expected");
        found
            .iter()
            .zip(expected)
            .map(|(x, y)| (f64::from(*x) - y).abs())
            .fold(0.0, f64::max)
    }
}
