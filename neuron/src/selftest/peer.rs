//! What the same shape does beside neuron: transformers, where the host has it, in a program of its own.

use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::fmt;
use std::io::{Read, Write};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::{Duration, Instant};

/// What is run.
const PROGRAM: &str = include_str!("peer.py");
/// Of what a program that fails has said, so many characters at the end are told.
const SHOWN: usize = 2000;
/// How long the output of a program that was ended may take to come.
const GRACE: Duration = Duration::from_secs(5);

/// What is to be measured.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Asked {
    /// The model's `config.json`.
    pub(super) config: Value,
    pub(super) device: String,
    /// Tokens of each prompt.
    pub(super) prompts: Vec<usize>,
    /// Tokens before those that are written.
    pub(super) depth: usize,
    /// Tokens that one sequence writes.
    pub(super) generate: usize,
    pub(super) rounds: usize,
}

/// What the program answers.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(untagged)]
enum Answer {
    Absent { absent: String },
    Measured(Found),
}

/// What was measured.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
pub(super) struct Found {
    pub(super) transformers: String,
    pub(super) torch: String,
    /// Whether it has kernels for the delta rule; what it does without them is slow.
    pub(super) fla: bool,
    /// Of each prompt.
    pub(super) prefill_seconds: Vec<f64>,
    pub(super) decode_seconds: f64,
}

impl fmt::Display for Found {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            transformers,
            torch,
            ..
        } = self;
        let fla = if self.fla { "with" } else { "without" };
        write!(
            f,
            "transformers {transformers} on torch {torch}, {fla} flash-linear-attention"
        )
    }
}

/// There are no figures.
#[derive(Debug, thiserror::Error)]
pub(super) enum PeerError {
    /// The host has none.
    #[error("there is none on this host: {0}")]
    Absent(String),
    /// It failed, or said what cannot be read.
    #[error("it failed: {reason}{}", indented(said))]
    Failed { reason: String, said: String },
    /// It took too long.
    #[error("it was not done within {deadline:?}{}", indented(said))]
    Late { deadline: Duration, said: String },
}

/// The end of what a program has said, below the line that tells of it.
fn indented(said: &str) -> String {
    let from = said.char_indices().rev().nth(SHOWN - 1);
    let end = &said[from.map_or(0, |(at, _)| at)..];
    end.lines().map(|line| format!("\n  {line}")).collect()
}

/// Measures with the Python that `python` names, within `deadline`.
pub(super) fn measure(
    python: &Path,
    asked: &Asked,
    deadline: Duration,
) -> Result<Found, PeerError> {
    ask(python, PROGRAM, asked, deadline)
}

/// Runs `program`, tells it what is `asked`, and waits for its answer until `deadline` is over.
fn ask(
    python: &Path,
    program: &str,
    asked: &Asked,
    deadline: Duration,
) -> Result<Found, PeerError> {
    let began = Instant::now();
    let name = python.display();
    let mut child = Command::new(python)
        .args(["-c", program])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|error| PeerError::Absent(format!("{name}: {error}")))?;
    let input = serde_json::to_vec(asked).expect("these types always serialise");
    if let Some(mut stdin) = child.stdin.take() {
        // one that does not read it says why
        let _ = stdin.write_all(&input);
    }
    let (answer, said) = (all_of(child.stdout.take()), all_of(child.stderr.take()));
    let left = || deadline.saturating_sub(began.elapsed());
    let (answer, words) = match (answer.recv_timeout(left()), said.recv_timeout(left())) {
        (Ok(answer), Ok(words)) => (answer, words),
        (_, words) => {
            // it may have ended just now
            let _ = child.kill().and_then(|()| child.wait());
            // whoever it started may have the other end for longer
            let said = words.or_else(|_| said.recv_timeout(GRACE));
            let said = said.unwrap_or_default();
            return Err(PeerError::Late { deadline, said });
        }
    };
    let (ended, said) = (child.wait(), words);
    let failed = |reason: String| PeerError::Failed { reason, said };
    match ended {
        Ok(status) if status.success() => {}
        Ok(status) => return Err(failed(status.to_string())),
        Err(error) => return Err(failed(error.to_string())),
    }
    // libraries may have said something before
    let last = answer.lines().last().unwrap_or_default();
    match serde_json::from_str(last) {
        Ok(Answer::Absent { absent }) => Err(PeerError::Absent(absent)),
        Ok(Answer::Measured(found)) if found.prefill_seconds.len() == asked.prompts.len() => {
            Ok(found)
        }
        Ok(Answer::Measured(_)) => Err(failed("it has measured something else".into())),
        Err(error) => Err(failed(format!("its answer cannot be read: {error}"))),
    }
}

/// All that comes out of `pipe`, once it is closed.
fn all_of(pipe: Option<impl Read + Send + 'static>) -> Receiver<String> {
    let (sender, all) = channel();
    thread::spawn(move || {
        let mut bytes = Vec::new();
        if let Some(mut pipe) = pipe {
            // what came before an error is told
            let _ = pipe.read_to_end(&mut bytes);
        }
        // nobody may wait for it any more
        let _ = sender.send(String::from_utf8_lossy(&bytes).into_owned());
    });
    all
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::text::tokenizer::tests::fixture;

    const PATIENT: Duration = Duration::from_secs(600);

    fn asked() -> Asked {
        let config = std::fs::read_to_string(fixture().join("config.json")).unwrap();
        Asked {
            config: serde_json::from_str(&config).unwrap(),
            device: "cpu".into(),
            prompts: vec![16, 40],
            depth: 8,
            generate: 4,
            rounds: 1,
        }
    }

    /// What comes of a program of the shell in Python's place.
    fn shell(program: &str, deadline: Duration) -> Result<Found, PeerError> {
        ask(Path::new("/bin/sh"), program, &asked(), deadline)
    }

    #[test]
    fn figures_are_taken_from_the_last_line() {
        let program = r#"read asked
            case "$asked" in *'"prompts":[16,40]'*) ;; *) exit 9;; esac
            echo 'a library says hello'
            echo '{"transformers": "5.1", "torch": "2.9", "fla": false, "prefill_seconds": [0.5, 1.5], "decode_seconds": 2.0}'"#;
        let found = shell(program, PATIENT).unwrap();
        assert_eq!(found.prefill_seconds, [0.5, 1.5]);
        assert_eq!(
            found.to_string(),
            "transformers 5.1 on torch 2.9, without flash-linear-attention"
        );
    }

    #[test]
    fn one_that_is_not_there_says_so_in_one_line() {
        let absent = shell("echo '{\"absent\": \"No module named torch\"}'", PATIENT).unwrap_err();
        let nowhere = ask(Path::new("/no/such/python"), "", &asked(), PATIENT).unwrap_err();
        for (error, why) in [
            (absent, "No module named torch"),
            (nowhere, "/no/such/python"),
        ] {
            assert!(matches!(error, PeerError::Absent(_)), "{error}");
            let said = error.to_string();
            assert!(said.contains(why) && !said.contains('\n'), "{said}");
        }
    }

    #[test]
    fn one_that_fails_is_told_with_what_it_said() {
        for (program, why) in [
            ("echo 'out of memory' >&2; exit 3", "exit status: 3"),
            ("echo 'out of memory' >&2; echo what", "cannot be read"),
            (
                "echo 'out of memory' >&2; echo '{\"transformers\": \"\", \"torch\": \"\", \"fla\": true, \"prefill_seconds\": [], \"decode_seconds\": 1}'",
                "something else",
            ),
        ] {
            let error = shell(program, PATIENT).unwrap_err();
            assert!(matches!(error, PeerError::Failed { .. }), "{error}");
            let said = error.to_string();
            assert!(said.contains(why), "{said}");
            assert!(said.contains("\n  out of memory"), "{said}");
        }
        let long = indented(&"ä".repeat(3 * SHOWN));
        assert_eq!(long.chars().filter(|one| *one == 'ä').count(), SHOWN);
    }

    #[test]
    fn one_that_takes_too_long_is_ended() {
        let deadline = Duration::from_millis(200);
        let program = "echo 'still at it' >&2; exec tail -f /dev/null";
        let error = shell(program, deadline).unwrap_err();
        assert!(matches!(error, PeerError::Late { .. }), "{error}");
        assert!(error.to_string().contains("\n  still at it"), "{error}");
    }

    #[test]
    fn the_program_measures_a_model_of_a_few_layers() {
        match measure(Path::new("python3"), &asked(), PATIENT) {
            Ok(found) => {
                let all = found.prefill_seconds.iter().chain([&found.decode_seconds]);
                assert_eq!(all.filter(|seconds| **seconds > 0.0).count(), 3);
            }
            Err(PeerError::Absent(why)) => eprintln!("skipped: {why}"),
            Err(error) => panic!("{error}"),
        }
    }
}
