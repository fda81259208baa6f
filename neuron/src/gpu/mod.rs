//! A CUDA device as neuron uses it: memory by address, one stream of work, kernels by name, one kind of matrix product.
//!
//! Everything above this line is the same for a real device ([`Driver`] over the CUDA driver, feature `cuda`) and for
//! the one that tests use, which runs the same kernels on the CPU.

#[cfg(test)]
pub(crate) mod emulated;

use std::fmt;

#[cfg(feature = "cuda")]
pub mod driver;
#[cfg(feature = "cuda")]
mod library;
mod memory;
mod peaks;
#[cfg(feature = "cuda")]
mod staging;

#[cfg(feature = "cuda")]
pub use driver::CudaDevice;
pub use memory::{Buffer, Gpu, Scratch};
pub use peaks::Peaks;

/// A place in the memory of a device.
pub type Address = u64;

/// What a kernel is given, in the order of its parameters.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Arg {
    /// A pointer.
    Address(Address),
    /// An `int`.
    Int(i32),
    /// A `long long`.
    Long(i64),
    /// A `float`.
    Float(f32),
}

/// One run of a kernel.
#[derive(Debug, Clone, Copy)]
pub struct Launch<'a> {
    /// Its name, as its source says it; unique among all kernels.
    pub kernel: &'static str,
    /// Blocks in each dimension.
    pub grid: [u32; 3],
    /// Threads of a block, in one dimension; a multiple of 32.
    pub block: u32,
    /// Bytes of dynamic shared memory.
    pub shared: u32,
    /// As many as it has parameters, of their types.
    pub args: &'a [Arg],
}

/// The numbers that a [`Product`] multiplies; sums are f32.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Factor {
    /// f32, without shortcuts that drop digits.
    F32,
    /// bf16.
    Bf16,
}

/// `c = a · bᵀ`: a `(m, k)`, b `(n, k)`, c `(m, n)` in f32, all row by row without gaps.
#[derive(Debug, Clone, Copy)]
pub struct Product {
    /// What a and b are.
    pub factor: Factor,
    /// Where a is.
    pub a: Address,
    /// Where b is.
    pub b: Address,
    /// Where c goes.
    pub c: Address,
    /// Rows of a.
    pub m: usize,
    /// Rows of b.
    pub n: usize,
    /// Width of both.
    pub k: usize,
}

/// Recorded work, to be run again with other numbers at the same addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Graph(pub usize);

/// Bytes of a device's memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeviceMemory {
    /// All of it.
    pub total: u64,
    /// What nobody has taken.
    pub free: u64,
}

/// One device. Work is done in the order in which it is asked for; only [`Driver::download`] and
/// [`Driver::synchronize`] wait for it.
///
/// # Errors
/// Every call gives the [`GpuError`] of the device; one that comes from work asked for earlier is given by a later call.
pub trait Driver: fmt::Debug + Send + Sync {
    /// What it is called.
    fn name(&self) -> String;

    /// Processors that run blocks side by side.
    fn processors(&self) -> u32;

    /// Its memory now.
    fn memory(&self) -> Result<DeviceMemory, GpuError>;

    /// Memory of its own, on a boundary of 256 bytes; what is in it is not to be read.
    fn allocate(&self, bytes: usize) -> Result<Address, GpuError>;

    /// Gives back what [`Driver::allocate`] gave, when all work asked for so far is done.
    fn release(&self, address: Address);

    /// Copies `bytes` to the device. They may be changed when it returns.
    fn upload(&self, to: Address, bytes: &[u8]) -> Result<(), GpuError>;

    /// Waits for all work and copies to the host.
    fn download(&self, from: Address, bytes: &mut [u8]) -> Result<(), GpuError>;

    /// Copies within the device.
    fn copy(&self, to: Address, from: Address, bytes: usize) -> Result<(), GpuError>;

    /// Makes all bytes zero.
    fn zero(&self, at: Address, bytes: usize) -> Result<(), GpuError>;

    /// Runs a kernel.
    fn launch(&self, launch: &Launch<'_>) -> Result<(), GpuError>;

    /// Multiplies matrices.
    fn multiply(&self, product: &Product) -> Result<(), GpuError>;

    /// Waits for all work.
    fn synchronize(&self) -> Result<(), GpuError>;

    /// From now on work is recorded and not done, until [`Driver::end_recording`].
    fn begin_recording(&self) -> Result<(), GpuError>;

    /// What was recorded. Nothing of it has been done.
    fn end_recording(&self) -> Result<Graph, GpuError>;

    /// Does recorded work.
    fn replay(&self, graph: Graph) -> Result<(), GpuError>;

    /// Gives back what a recording holds.
    fn forget(&self, graph: Graph);
}

/// A device, or a library for it, refused something.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum GpuError {
    /// The host has no driver, or a library that is needed is missing.
    #[error("{library} is not here: {reason}")]
    NoLibrary {
        /// Which one.
        library: &'static str,
        /// What the system says.
        reason: String,
    },
    /// The driver is of a version that does not read our kernels.
    #[error("the driver speaks version {found} of CUDA, and {needed} is needed")]
    OldDriver {
        /// What it speaks, as it counts: 12040 is 12.4.
        found: i32,
        /// What is needed.
        needed: i32,
    },
    /// There is no such device.
    #[error("there is no CUDA device {0}")]
    NoDevice(usize),
    /// No device is called so.
    #[error("`{0}` names no device; write `cpu`, or a CUDA device as `cuda:0`")]
    Name(String),
    /// The program was built without CUDA.
    #[error("this neuron was built without CUDA; build it with `--features cuda` (docs/cuda.md)")]
    NotBuilt,
    /// It has no memory left.
    #[error("the device has no room for {bytes} bytes")]
    OutOfMemory {
        /// What was asked for.
        bytes: usize,
    },
    /// A call failed.
    #[error("{call} failed with code {code} ({name})")]
    Call {
        /// The call.
        call: &'static str,
        /// The code, as the driver's or library's headers number it.
        code: i32,
        /// The code's name.
        name: String,
    },
    /// A kernel that is asked for is not there.
    #[error("there is no kernel `{0}`")]
    NoKernel(String),
    /// A kernel is given other values than it has parameters for.
    #[error("kernel `{0}` does not take these arguments")]
    Arguments(String),
    /// The model has sizes that no kernel is made for.
    #[error("no kernel is made for {what} of {found}, only for {made_for}")]
    Size {
        /// What has that size.
        what: &'static str,
        /// The size.
        found: usize,
        /// Sizes that there are kernels for.
        made_for: &'static str,
    },
}

impl From<GpuError> for candle_core::Error {
    fn from(error: GpuError) -> Self {
        Self::wrap(error)
    }
}
