//! The operations that candle does not have or that cost too much there, on the CPU in f32.
//!
//! Each has a plain reference beside it in its tests, and is held to it on shapes that do not divide evenly.

use candle_core::{CpuStorage, DType, Result, Storage, Tensor};

pub mod attention;
pub mod causal_conv;
pub mod delta_rule;
pub mod linear;
pub mod norm;

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
        if linear::has_avx2() {
            // SAFETY: the processor has what the function is compiled for
            #[allow(unsafe_code)]
            return unsafe { with_avx2(work) };
        }
    }
    work()
}

/// The logistic function.
#[inline]
#[must_use]
pub fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + (-x).exp())
}

/// `x · sigmoid(x)`.
#[inline]
#[must_use]
pub fn silu(x: f32) -> f32 {
    x * sigmoid(x)
}

/// `silu(gate) ∘ up`, for tensors of one shape.
///
/// # Errors
/// When they are not on the CPU in f32.
pub fn swiglu(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    let gated = with_f32(gate, |gate| {
        with_f32(up, |up| {
            let pairs = gate.iter().zip(up);
            pairs.map(|(gate, up)| silu(*gate) * up).collect::<Vec<_>>()
        })
    })??;
    Tensor::from_vec(gated, gate.shape(), gate.device())
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
pub(crate) mod testing {
    //! Numbers for tests.

    use rand::rngs::StdRng;
    use rand::{Rng, SeedableRng};

    /// `count` numbers between -1 and 1, the same for the same seed.
    pub(crate) fn numbers(seed: u64, count: usize) -> Vec<f32> {
        let mut random = StdRng::seed_from_u64(seed);
        (0..count).map(|_| random.random_range(-1.0..1.0)).collect()
    }

    /// Largest difference between numbers and what they should be.
    pub(crate) fn max_diff(found: &[f32], expected: &[f64]) -> f64 {
        assert_eq!(found.len(), expected.len(), "as many numbers as expected");
        found
            .iter()
            .zip(expected)
            .map(|(x, y)| (f64::from(*x) - y).abs())
            .fold(0.0, f64::max)
    }
}
