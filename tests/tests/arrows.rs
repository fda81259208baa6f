//! The directions and absences that ARCHITECTURE.md states, held against manifests and source.

#![allow(missing_docs, clippy::unwrap_used)]

use std::fs;
use std::path::{Path, PathBuf};
use tests::daemon::root;

/// Rust files below a folder.
fn sources(folder: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            files.extend(sources(&path));
        } else if path.extension().is_some_and(|kind| kind == "rs") {
            files.push(path);
        }
    }
    files
}

/// Lines of code below `folder`, comments left out, that hold one of `words`; `except` are path parts that may.
fn naming(folder: &str, words: &[&str], except: &[&str]) -> Vec<String> {
    let mut found = Vec::new();
    for file in sources(&root().join(folder)) {
        let path = file.display().to_string();
        if except.iter().any(|part| path.contains(part)) {
            continue;
        }
        for line in fs::read_to_string(&file).unwrap().lines() {
            let code = line.trim_start();
            if !code.starts_with("//") && words.iter().any(|word| code.contains(word)) {
                found.push(format!("{path}: {code}"));
            }
        }
    }
    found
}

fn assert_absent(what: &str, found: Vec<String>) {
    assert!(found.is_empty(), "{what}:\n{}", found.join("\n"));
}

#[test]
fn packages_depend_in_one_direction() {
    let own = ["protocol", "filters", "proxy", "neuron", "tests", "bench"];
    let allowed: [(&str, &[&str]); 6] = [
        ("protocol", &[]),
        ("filters", &["protocol"]),
        ("proxy", &["protocol", "filters"]),
        ("neuron", &["protocol"]),
        ("bench", &["protocol"]),
        ("tests", &["protocol", "filters", "neuron"]),
    ];
    for (package, may) in allowed {
        let manifest = fs::read_to_string(root().join(package).join("Cargo.toml")).unwrap();
        let manifest: toml::Table = toml::from_str(&manifest).unwrap();
        for table in ["dependencies", "dev-dependencies"] {
            let names = manifest
                .get(table)
                .and_then(|table| table.as_table())
                .into_iter()
                .flat_map(|table| table.keys());
            for name in names.filter(|name| own.contains(&name.as_str())) {
                assert!(
                    may.contains(&name.as_str()),
                    "{package} must not depend on {name}"
                );
            }
        }
    }
}

/// Files that may look at the time of day.
const TELLING_TIME: [&str; 6] = [
    "proxy/src/app.rs",                          // whether a file has changed
    "proxy/src/catalogue.rs",                    // `created` of models
    "filters/src/translate/messages/models.rs",  // the same as a date
    "filters/src/translate/responses/events.rs", // `created_at` of responses
    "neuron/src/text/template/functions.rs",     // templates may ask for the date
    "neuron/src/residency/state.rs",             // `since` of states
];

#[test]
fn what_must_be_absent_is_absent() {
    assert_absent(
        "protocol has no I/O and no async",
        naming(
            "protocol/src",
            &["tokio", "std::net", "std::fs", "async fn"],
            &[],
        ),
    );
    assert_absent(
        "filters does not know Pingora",
        naming("filters/src", &["pingora"], &[]),
    );
    assert_absent(
        "Pingora is named only in proxy/src/pingora",
        naming(
            "proxy/src",
            &["pingora_core", "pingora_http"],
            &["/pingora/"],
        ),
    );
    assert_absent(
        "the environment is read only in config",
        [
            naming("proxy/src", &["env::var"], &["/config/"]),
            naming("neuron/src", &["env::var"], &["/config/"]),
            naming("filters/src", &["env::var"], &[]),
        ]
        .concat(),
    );
    assert_absent(
        "nothing is decided by the time of day, which may jump: it is only told, in answers and prompts, and of files it is \
         only asked whether their time is another one",
        ["filters/src", "proxy/src", "neuron/src", "protocol/src"]
            .iter()
            .flat_map(|folder| naming(folder, &["SystemTime", "UNIX_EPOCH"], &TELLING_TIME))
            .collect(),
    );
    assert_absent(
        "model/ knows neither rank, file format nor quantisation",
        naming(
            "neuron/src/model",
            &[
                "safetensors",
                "gguf",
                "world_size",
                ".rank()",
                "Quantisation",
            ],
            &[],
        ),
    );
    assert_absent("engine/scheduler.rs holds no tensor", {
        let mut found = naming("neuron/src/engine", &["Tensor", "candle"], &[]);
        found.retain(|line| line.contains("/scheduler.rs"));
        found
    });
    assert_absent(
        "api/ holds no candle",
        naming("neuron/src/api", &["candle"], &[]),
    );
    assert_absent(
        "unsafe is only in kernels, what calls CUDA's libraries and the mapping of weights",
        ["protocol/src", "filters/src", "proxy/src", "neuron/src"]
            .iter()
            .flat_map(|folder| {
                naming(
                    folder,
                    &["unsafe "],
                    &["/gpu/", "/kernels/", "/parallel/nccl.rs", "/weights/"],
                )
            })
            .collect(),
    );
    assert_absent(
        "nobody decides by an error's text",
        ["filters/src", "proxy/src", "neuron/src"]
            .iter()
            .flat_map(|folder| {
                naming(
                    folder,
                    &[
                        "to_string().contains(",
                        "to_string().starts_with(",
                        "message.contains(",
                    ],
                    &[],
                )
            })
            .filter(|line| !line.contains("assert"))
            .collect(),
    );
}
