//! The binary as it is built. That this file is there makes `cargo test` build it, which the package `tests` needs.

#![allow(missing_docs)]

use std::process::Command;

#[test]
fn the_binary_finds_the_defaults_fine() {
    let output = Command::new(env!("CARGO_BIN_EXE_cortex"))
        .arg("check")
        .output()
        .expect("it runs");
    assert!(output.status.success());
    assert_eq!(
        String::from_utf8_lossy(&output.stdout),
        "fine: 0 nodes, 0 models\n"
    );
}
