//! The kernels on the emulator, and their PTX.

use super::{MODULES, checks};
use crate::gpu::emulated::emulated_gpu;
use std::fs;
use std::path::Path;

#[test]
fn every_kernel_meets_its_reference() {
    let Some(gpu) = emulated_gpu() else { return };
    for (name, check) in checks::ALL {
        eprintln!("{name}");
        checks::run(*check, &gpu);
    }
}

#[test]
fn each_source_has_a_module_made_of_it() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/kernels/cuda");
    let read = |name: &str| fs::read(folder.join(name)).expect("it is there");
    let mut sources: Vec<String> = fs::read_dir(&folder)
        .expect("it is there")
        .map(|entry| entry.expect("it is read").file_name())
        .filter_map(|name| Some(name.to_str()?.strip_suffix(".cu")?.to_owned()))
        .collect();
    sources.sort();
    let modules: Vec<&str> = MODULES.iter().map(|(name, _)| *name).collect();
    assert_eq!(modules, sources);
    for (name, ptx) in MODULES {
        let source = [read("common.cuh"), read(&format!("{name}.cu"))].concat();
        let sum = format!("{} {}", cksum(&source), source.len());
        let line = ptx.lines().next().unwrap_or_default();
        assert!(
            line.ends_with(&format!(": {sum}")),
            "{name}.cu was changed since its PTX was made: run make-ptx"
        );
    }
}

/// The checksum of POSIX's `cksum`.
fn cksum(bytes: &[u8]) -> u32 {
    let length = bytes.len().to_le_bytes();
    let length = &length[..length
        .iter()
        .rposition(|byte| *byte > 0)
        .map_or(0, |at| at + 1)];
    let sum = bytes.iter().chain(length).fold(0, |sum: u32, byte| {
        (0..8).fold(sum ^ u32::from(*byte) << 24, |sum, _| {
            let over = sum >> 31;
            (sum << 1) ^ (over * 0x04c1_1db7)
        })
    });
    !sum
}
