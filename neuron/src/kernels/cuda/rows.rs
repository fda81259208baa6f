//! Rows of numbers on a device.

use crate::gpu::{Address, Arg, Gpu, GpuError, Scratch};
use std::sync::Arc;

/// Rows of f32 numbers without gaps, in the workspace of a device: (t, width). Copies are the same rows.
#[derive(Debug, Clone)]
pub struct DeviceRows {
    memory: Arc<Scratch>,
    count: usize,
    width: usize,
}

impl DeviceRows {
    /// Room for rows that a kernel is to write.
    ///
    /// # Errors
    /// When the device has none.
    pub fn new(gpu: &Gpu, count: usize, width: usize) -> Result<Self, GpuError> {
        Ok(Self {
            memory: Arc::new(gpu.scratch(4 * count * width)?),
            count,
            width,
        })
    }

    /// These numbers, copied to the device.
    ///
    /// # Errors
    /// When the device has no room.
    pub fn of(gpu: &Gpu, numbers: &[f32], width: usize) -> Result<Self, GpuError> {
        let rows = Self::new(gpu, numbers.len() / width.max(1), width)?;
        let bytes = bytemuck::cast_slice(numbers);
        gpu.driver().upload(rows.memory.address(), bytes)?;
        Ok(rows)
    }

    /// Writes these numbers over all of its own.
    ///
    /// # Errors
    /// When the device fails.
    pub fn write(&self, numbers: &[f32]) -> Result<(), GpuError> {
        assert_eq!(numbers.len(), self.count * self.width, "all numbers");
        let bytes = bytemuck::cast_slice(numbers);
        self.gpu().driver().upload(self.address(), bytes)
    }

    /// How many rows.
    #[must_use]
    pub fn count(&self) -> usize {
        self.count
    }

    /// Numbers in a row.
    #[must_use]
    pub fn width(&self) -> usize {
        self.width
    }

    /// The device they are on.
    #[must_use]
    pub fn gpu(&self) -> &Gpu {
        self.memory.gpu()
    }

    /// Where they are.
    #[must_use]
    pub fn address(&self) -> Address {
        self.memory.address()
    }

    /// The numbers, when all work so far is done.
    ///
    /// # Errors
    /// When the device fails.
    pub fn numbers(&self) -> Result<Vec<f32>, GpuError> {
        let mut numbers = vec![0.0; self.count * self.width];
        let bytes = bytemuck::cast_slice_mut(&mut numbers);
        self.gpu().driver().download(self.address(), bytes)?;
        Ok(numbers)
    }

    /// As the argument of a kernel.
    pub(super) fn arg(&self) -> Arg {
        Arg::Address(self.address())
    }

    /// The address of row `row`.
    pub(super) fn row(&self, row: usize) -> Address {
        self.address() + (4 * row * self.width) as u64
    }
}
