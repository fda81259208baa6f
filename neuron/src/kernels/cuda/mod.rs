//! Kernels for CUDA devices: sources in `*.cu`, and beside each the PTX that a release of the compiler made of it, so that
//! neither a build nor a host needs a compiler (`docs/cuda.md` says how it is made anew).

/// Every module: its name and its PTX.
pub const MODULES: &[(&str, &str)] = &[];

#[cfg(test)]
mod tests;
