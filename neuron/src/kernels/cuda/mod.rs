//! Kernels for CUDA devices: sources in `*.cu`, and beside each the PTX that a release of the compiler made of it, so that
//! neither a build nor a host needs a compiler (`make-ptx` makes it anew).

/// Every module: its name and its PTX.
pub const MODULES: &[(&str, &str)] = &[
    ("attention", include_str!("attention.ptx")),
    ("conv", include_str!("conv.ptx")),
    ("delta_chunk", include_str!("delta_chunk.ptx")),
    ("delta_rule", include_str!("delta_rule.ptx")),
    ("matrix", include_str!("matrix.ptx")),
    ("misc", include_str!("misc.ptx")),
    ("norm", include_str!("norm.ptx")),
];

#[cfg(test)]
mod attention_tests;
#[cfg(test)]
mod matrix_tests;
#[cfg(test)]
mod tests;
