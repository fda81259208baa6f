//! Kernels for CUDA devices: sources in `*.cu`, and beside each the PTX that a release of the compiler made of it, so that
//! neither a build nor a host needs a compiler (`make-ptx` makes it anew).

/// Every module: its name and its PTX.
pub const MODULES: &[(&str, &str)] = &[
    ("conv", include_str!("conv.ptx")),
    ("delta_rule", include_str!("delta_rule.ptx")),
    ("misc", include_str!("misc.ptx")),
    ("norm", include_str!("norm.ptx")),
];

#[cfg(test)]
mod attention_tests;
#[cfg(test)]
mod matrix_tests;
#[cfg(test)]
mod tests;
