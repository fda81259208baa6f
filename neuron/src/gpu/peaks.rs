//! What a device gives at best, measured: the limits that figures are held against.

use super::{Factor, Gpu, GpuError, Product};
use std::time::Instant;

/// The best of a device.
#[derive(Debug, Clone, Copy, serde::Serialize)]
pub struct Peaks {
    /// Bytes a second that a copy within its memory reads and writes together.
    pub bandwidth: f64,
    /// Multiplications and additions a second of bf16 matrices, each counted.
    pub bf16_rate: f64,
}

/// Times each is measured; the best counts.
const ROUNDS: usize = 5;

impl Peaks {
    /// Measures with `bytes` copied and square matrices of `side`.
    ///
    /// # Errors
    /// When the device has no room or fails.
    pub fn measure(gpu: &Gpu, bytes: usize, side: usize) -> Result<Self, GpuError> {
        let (from, to) = (gpu.buffer(bytes)?, gpu.buffer(bytes)?);
        gpu.driver().zero(from.address(), bytes)?;
        let copy = best(gpu, || {
            gpu.driver().copy(to.address(), from.address(), bytes)
        })?;
        drop((from, to));
        let [a, b] = [gpu.buffer(2 * side * side)?, gpu.buffer(2 * side * side)?];
        let c = gpu.buffer(4 * side * side)?;
        for zeros in [&a, &b] {
            gpu.driver().zero(zeros.address(), zeros.bytes())?;
        }
        let product = Product {
            factor: Factor::Bf16,
            a: a.address(),
            b: b.address(),
            c: c.address(),
            m: side,
            n: side,
            k: side,
        };
        let multiply = best(gpu, || gpu.driver().multiply(&product))?;
        Ok(Self {
            bandwidth: 2.0 * bytes as f64 / copy,
            bf16_rate: 2.0 * (side as f64).powi(3) / multiply,
        })
    }
}

/// Seconds that `work` takes at best.
fn best(gpu: &Gpu, work: impl Fn() -> Result<(), GpuError>) -> Result<f64, GpuError> {
    let mut best = f64::INFINITY;
    for _ in 0..=ROUNDS {
        gpu.driver().synchronize()?;
        let began = Instant::now();
        work()?;
        gpu.driver().synchronize()?;
        best = best.min(began.elapsed().as_secs_f64());
    }
    Ok(best)
}
