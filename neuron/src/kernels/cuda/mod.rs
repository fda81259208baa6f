//! Kernels for CUDA devices: sources in `*.cu`, and beside each the PTX that a release of the compiler made of it, so that
//! neither a build nor a host needs a compiler (`docs/cuda.md` says how it is made anew). And what launches them.
//!
//! Sums are f32; rows between operations are f32. Weights are in any [`Format`](crate::quant::Format), keys and values in
//! bf16 or f32.

#[cfg(any(test, feature = "cuda"))]
pub(crate) mod checks;
pub(crate) mod experts;
pub(crate) mod graphs;
pub(crate) mod matrix;
pub(crate) mod ops;
mod rows;
pub(crate) mod step;

pub use matrix::DeviceMatrix;
pub use rows::DeviceRows;
pub(crate) use step::Step;

use crate::gpu::{Arg, Gpu, GpuError, Launch};

/// Every module: its name and its PTX.
pub const MODULES: &[(&str, &str)] = &[
    ("attention", include_str!("attention.ptx")),
    ("choose", include_str!("choose.ptx")),
    ("conv", include_str!("conv.ptx")),
    ("delta_chunk", include_str!("delta_chunk.ptx")),
    ("delta_rule", include_str!("delta_rule.ptx")),
    ("experts", include_str!("experts.ptx")),
    ("matrix", include_str!("matrix.ptx")),
    ("misc", include_str!("misc.ptx")),
    ("norm", include_str!("norm.ptx")),
];

/// Threads of a block where a kernel leaves the choice.
const BLOCK: u32 = 256;

/// Runs `kernel`, which takes no dynamic shared memory; nothing where a dimension of the grid is zero.
fn launch(
    gpu: &Gpu,
    kernel: &'static str,
    grid: [usize; 3],
    block: u32,
    args: &[Arg],
) -> Result<(), GpuError> {
    launch_shared(gpu, kernel, grid, (block, 0), args)
}

/// As [`launch`], with bytes of dynamic shared memory beside the threads of a block.
fn launch_shared(
    gpu: &Gpu,
    kernel: &'static str,
    grid: [usize; 3],
    (block, shared): (u32, u32),
    args: &[Arg],
) -> Result<(), GpuError> {
    if grid.contains(&0) {
        return Ok(());
    }
    gpu.driver().launch(&Launch {
        kernel,
        grid: grid.map(|blocks| u32::try_from(blocks).unwrap_or(u32::MAX)),
        block,
        shared,
        args,
    })
}

/// An `int` argument.
fn int(value: usize) -> Arg {
    Arg::Int(i32::try_from(value).unwrap_or(i32::MAX))
}

/// A `long long` argument.
fn long(value: usize) -> Arg {
    Arg::Long(i64::try_from(value).unwrap_or(i64::MAX))
}

#[cfg(test)]
mod tests;
