//! The files in `conf/` are documentation that runs.

#![allow(missing_docs, clippy::unwrap_used)]

use std::process::{Command, Output};
use tests::daemon::{binary, root};

fn check(file: &str) -> Output {
    Command::new(binary("cortex"))
        .args(["check", "--config", file])
        .current_dir(root())
        .output()
        .unwrap()
}

#[test]
fn the_sample_files_pass_the_check() {
    let output = check("conf/cortex.toml");
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    assert_eq!(
        String::from_utf8_lossy(&output.stdout),
        "fine: 1 nodes, 2 models\n"
    );
}

#[test]
fn a_bad_file_is_one_line_a_fault_and_exit_64() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("cortex.toml");
    let cases = [
        (
            "[gateway]\nlissten = \"x\"",
            "line 2: unknown field `lissten`",
        ),
        ("[gateway", "line 1:"),
        ("models = \"none.toml\"", "none.toml: cannot be read"),
        (
            "[eviction]\nstrategy = \"fifo\"\n[fleet]\npoll = \"soon\"",
            "eviction.strategy",
        ),
    ];
    for (text, said) in cases {
        std::fs::write(&file, text).unwrap();
        let output = check(file.to_str().unwrap());
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(64), "{text}: {stderr}");
        assert!(stderr.contains(said), "{text}: {stderr}");
        assert!(
            stderr.lines().all(|line| line.starts_with("cortex: ")),
            "{stderr}"
        );
    }
    assert_eq!(check("/nowhere/cortex.toml").status.code(), Some(64));
}

#[test]
fn the_sample_shows_every_key() {
    // a key that the sample lacks would be one that nobody can find: take each away and see that the check still
    // knows it, which an unknown key would fail
    let text = std::fs::read_to_string(root().join("conf/cortex.toml")).unwrap();
    let sample: toml::Table = toml::from_str(&text).unwrap();
    let settings = std::fs::read_to_string(root().join("proxy/src/config/settings.rs")).unwrap();
    let mut table = "";
    for line in settings
        .lines()
        .take_while(|line| !line.contains("`models.toml`"))
    {
        if let Some(name) = line.strip_prefix("pub(crate) struct ") {
            table = name.trim_end_matches(" {");
        }
        let Some(key) = line
            .trim()
            .strip_prefix("pub(crate) ")
            .and_then(|rest| rest.split_once(':'))
        else {
            continue;
        };
        let holder = match table {
            "Settings" => Some(&sample),
            "Neuron" => sample["neurons"][0].as_table(),
            other => sample[&other.to_lowercase()].as_table(),
        };
        assert!(
            holder.unwrap().contains_key(key.0),
            "conf/cortex.toml does not show {table}.{}",
            key.0
        );
    }
}
