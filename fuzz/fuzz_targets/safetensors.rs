//! Whatever a safetensors file's header says, it is read or refused with an error; nothing is allocated by what it claims.

#![no_main]

use libfuzzer_sys::fuzz_target;
use std::sync::LazyLock;
use tempfile::TempDir;

static FOLDER: LazyLock<TempDir> = LazyLock::new(|| tempfile::tempdir().expect("a folder"));

fuzz_target!(|input: &[u8]| {
    fuzz::files::write(input, &FOLDER.path().join("model.safetensors"));
    fuzz::files::read(FOLDER.path());
});
