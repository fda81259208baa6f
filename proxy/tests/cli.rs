//! The command line of `cortex`. These tests also make `cargo test --workspace` build the binary, which the black-box
//! tests of package `tests` start: cargo builds a binary for its own package's tests alone.

#![allow(missing_docs, clippy::unwrap_used)]

use std::process::{Command, Output};

fn cortex(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_cortex"))
        .args(args)
        .output()
        .unwrap()
}

#[test]
fn the_help_names_every_command_of_the_readme() {
    let output = cortex(&["--help"]);
    assert!(output.status.success());
    let help = String::from_utf8(output.stdout).unwrap();
    for command in ["serve", "check", "plan", "status", "up"] {
        assert!(
            help.lines()
                .any(|line| line.trim_start().starts_with(command)),
            "{command} is missing: {help}"
        );
    }
}

#[test]
fn an_unknown_command_is_refused_in_a_line_that_names_it() {
    let output = cortex(&["fly"]);
    assert_eq!(output.status.code(), Some(2));
    assert!(String::from_utf8(output.stderr).unwrap().contains("'fly'"));
}
