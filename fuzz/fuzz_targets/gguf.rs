//! Whatever a GGUF file's header says, it is read or refused with an error; nothing is allocated by what it claims.

#![no_main]

use libfuzzer_sys::fuzz_target;
use neuron::model::{LoadOptions, load};
use neuron::residency::folder::ModelText;
use neuron::weights::{config, gguf_files};
use std::sync::LazyLock;
use tempfile::TempDir;

static FOLDER: LazyLock<TempDir> = LazyLock::new(|| tempfile::tempdir().expect("a folder"));

fuzz_target!(|input: &[u8]| {
    let path = FOLDER.path().join("model.gguf");
    fuzz::files::write(input, &path);
    if let Ok((_, config)) = config(&path) {
        let config: Result<serde_json::Value, _> = serde_json::from_str(&config);
        assert!(config.is_ok(), "a configuration is JSON");
    }
    let _ = gguf_files(&path);
    let _ = ModelText::load(&path);
    let _ = load(&path, &LoadOptions::cpu(), &|_| {});
    fuzz::files::read(&path);
});
