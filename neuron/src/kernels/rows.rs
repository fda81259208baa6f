//! Rows of numbers on their way through a model, and the operations that models are made of, wherever they are done.
//!
//! Each operation is one function with a path for the CPU and one for CUDA devices.

use super::cuda::{self, DeviceMatrix, DeviceRows};
use super::{linear as cpu, norm, with_f32};
use crate::gpu::{Buffer, Gpu, GpuError};
use crate::memory::pool::KvNumbers;
use crate::quant::{Format, Matrix};
use candle_core::{Device, Result, Tensor};
use std::sync::Arc;

/// Where a model, or a rank's part of it, is.
#[derive(Debug, Clone)]
pub enum Place {
    /// In the host's memory, computed by its processors.
    Cpu,
    /// On a CUDA device.
    Gpu(Gpu),
}

impl Place {
    /// The device, where it is one.
    #[must_use]
    pub fn gpu(&self) -> Option<&Gpu> {
        match self {
            Self::Cpu => None,
            Self::Gpu(gpu) => Some(gpu),
        }
    }
}

/// Rows of f32 numbers where they are computed: (t, width).
#[derive(Debug, Clone)]
pub enum Rows {
    /// A contiguous tensor on the CPU.
    Host(Tensor),
    /// On a CUDA device.
    Device(DeviceRows),
}

impl Rows {
    /// These numbers, brought to `place`.
    ///
    /// # Errors
    /// When the device fails.
    pub fn placed(numbers: Tensor, place: &Place) -> Result<Self> {
        match place {
            Place::Cpu => Ok(Self::Host(numbers)),
            Place::Gpu(gpu) => {
                let (_, width) = numbers.dims2()?;
                let rows = with_f32(&numbers, |numbers| DeviceRows::of(gpu, numbers, width))??;
                Ok(Self::Device(rows))
            }
        }
    }

    /// How many rows.
    #[must_use]
    pub fn count(&self) -> usize {
        match self {
            Self::Host(tensor) => tensor.dims()[0],
            Self::Device(rows) => rows.count(),
        }
    }

    /// Numbers in a row.
    #[must_use]
    pub fn width(&self) -> usize {
        match self {
            Self::Host(tensor) => tensor.dims()[1],
            Self::Device(rows) => rows.width(),
        }
    }

    /// The numbers on the host; from a device this waits and copies.
    ///
    /// # Errors
    /// When the device fails.
    pub fn tensor(&self) -> Result<Tensor> {
        match self {
            Self::Host(tensor) => Ok(tensor.clone()),
            Self::Device(rows) => {
                let shape = (rows.count(), rows.width());
                Tensor::from_vec(rows.numbers()?, shape, &Device::Cpu)
            }
        }
    }
}

/// Where operands are in different places: a model's parts are all in one.
fn apart() -> candle_core::Error {
    candle_core::Error::Msg("rows and what they meet are in different places".into()).bt()
}

/// A weight matrix where it is used.
#[derive(Debug, Clone)]
pub enum Weight {
    /// In the host's memory.
    Host(Matrix),
    /// On a device.
    Device(DeviceMatrix),
}

impl Weight {
    /// Its rows: outputs of a projection.
    #[must_use]
    pub fn rows(&self) -> usize {
        match self {
            Self::Host(matrix) => matrix.rows(),
            Self::Device(matrix) => matrix.rows(),
        }
    }

    /// Numbers in a row: inputs of a projection.
    #[must_use]
    pub fn width(&self) -> usize {
        match self {
            Self::Host(matrix) => matrix.width(),
            Self::Device(matrix) => matrix.width(),
        }
    }

    /// The matrix on the device, where it is there.
    pub(crate) fn on_device(&self) -> Option<&DeviceMatrix> {
        match self {
            Self::Host(_) => None,
            Self::Device(matrix) => Some(matrix),
        }
    }

    /// The format of its numbers.
    #[must_use]
    pub fn format(&self) -> Format {
        match self {
            Self::Host(matrix) => matrix.format(),
            Self::Device(matrix) => matrix.format(),
        }
    }

    /// What keys and values are to be held as on a device, beside weights like this one: whoever has weights in f32 wants to see
    /// every digit.
    pub(crate) fn kv_numbers(&self) -> KvNumbers {
        match self.format() {
            Format::F32 => KvNumbers::F32,
            _ => KvNumbers::Bf16,
        }
    }

    /// Bytes its numbers hold.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        match self {
            Self::Host(matrix) => matrix.bytes(),
            Self::Device(matrix) => matrix.bytes(),
        }
    }
}

/// A few numbers that a layer keeps, such as the scales of a norm.
#[derive(Debug, Clone)]
pub struct Vector {
    numbers: Vec<f32>,
    device: Option<Arc<Buffer>>,
}

impl Vector {
    /// These numbers, for use at `place`.
    ///
    /// # Errors
    /// When the device has no room.
    pub fn new(numbers: Vec<f32>, place: &Place) -> std::result::Result<Self, GpuError> {
        let device = match place {
            Place::Cpu => None,
            Place::Gpu(gpu) => Some(Arc::new(gpu.buffer_of(&numbers)?)),
        };
        Ok(Self { numbers, device })
    }

    /// The numbers.
    #[must_use]
    pub fn numbers(&self) -> &[f32] {
        &self.numbers
    }

    /// Where they are on the device.
    pub(crate) fn on_device(&self) -> Result<&Buffer> {
        self.device.as_deref().ok_or_else(apart)
    }
}

/// `x · Wᵀ`: (t, input) → (t, output).
///
/// # Errors
/// When an operation on the device fails.
pub fn linear(x: &Rows, weight: &Weight) -> Result<Rows> {
    together(x, [weight]).map(|[product]| product)
}

/// [`linear`] for several weights that meet the same x, faster than one by one.
///
/// # Errors
/// As [`linear`].
pub fn together<const N: usize>(x: &Rows, weights: [&Weight; N]) -> Result<[Rows; N]> {
    match x {
        Rows::Host(x) => {
            let matrices = weights.map(|weight| match weight {
                Weight::Host(matrix) => Some(matrix),
                Weight::Device(_) => None,
            });
            if matrices.iter().any(Option::is_none) {
                return Err(apart());
            }
            let products = cpu::together(x, matrices.map(|matrix| matrix.expect("it is here")))?;
            Ok(products.map(Rows::Host))
        }
        Rows::Device(x) => {
            let matrices = weights.map(|weight| match weight {
                Weight::Device(matrix) => Some(matrix),
                Weight::Host(_) => None,
            });
            if matrices.iter().any(Option::is_none) {
                return Err(apart());
            }
            let matrices = matrices.map(|matrix| matrix.expect("it is here"));
            let products = cuda::matrix::together(x, matrices)?;
            Ok(products.map(Rows::Device))
        }
    }
}

/// `y = x / sqrt(mean(x²) + eps) · scale`, row by row.
///
/// # Errors
/// When an operation on the device fails.
pub fn rms_norm(x: &Rows, scale: &Vector, eps: f32) -> Result<Rows> {
    match x {
        Rows::Host(x) => {
            let mut y = with_f32(x, <[f32]>::to_vec)?;
            norm::rms_norm(&mut y, &scale.numbers, eps);
            Ok(Rows::Host(Tensor::from_vec(y, x.shape(), x.device())?))
        }
        Rows::Device(x) => Ok(Rows::Device(cuda::ops::rms_norm(
            x,
            scale.on_device()?,
            eps,
        )?)),
    }
}

/// `h ← h + x`, and [`rms_norm`] of that.
///
/// # Errors
/// As [`rms_norm`].
pub fn add_rms_norm(h: &mut Rows, x: &Rows, scale: &Vector, eps: f32) -> Result<Rows> {
    if let (Rows::Device(h), Rows::Device(x)) = (&*h, x) {
        let normed = cuda::ops::add_rms_norm(h, x, scale.on_device()?, eps)?;
        return Ok(Rows::Device(normed));
    }
    add(h, x)?;
    rms_norm(h, scale, eps)
}

/// `h ← h + x`.
///
/// # Errors
/// When an operation on the device fails.
pub fn add(h: &mut Rows, x: &Rows) -> Result<()> {
    match (h, x) {
        (Rows::Host(h), Rows::Host(x)) => *h = (&*h + x)?,
        (Rows::Device(h), Rows::Device(x)) => cuda::ops::add(h, x)?,
        _ => return Err(apart()),
    }
    Ok(())
}

/// `silu(gate) ∘ up`.
///
/// # Errors
/// When an operation on the device fails.
pub fn swiglu(gate: &Rows, up: &Rows) -> Result<Rows> {
    match (gate, up) {
        (Rows::Host(gate), Rows::Host(up)) => Ok(Rows::Host(super::swiglu(gate, up)?)),
        (Rows::Device(gate), Rows::Device(up)) => Ok(Rows::Device(cuda::ops::swiglu(gate, up)?)),
        _ => Err(apart()),
    }
}

/// `[x | y]`, row by row.
///
/// # Errors
/// When an operation on the device fails.
pub fn side_by_side(x: &Rows, y: &Rows) -> Result<Rows> {
    match (x, y) {
        (Rows::Host(x), Rows::Host(y)) => Ok(Rows::Host(Tensor::cat(&[x, y], 1)?)),
        (Rows::Device(x), Rows::Device(y)) => Ok(Rows::Device(cuda::ops::side_by_side(x, y)?)),
        _ => Err(apart()),
    }
}
