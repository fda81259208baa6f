//! The local neuron: found or built, started, watched, and stopped with us.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, ChildStdin, Command};
use tokio::sync::Notify;
use tokio::time::{sleep, timeout};

/// How the neuron says where it listens.
const LISTENING: &str = "listening on http://";
/// How long it may take to say so.
const START: Duration = Duration::from_secs(30);
/// How long it may take to end.
const END: Duration = Duration::from_secs(10);

/// Why there is no neuron.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ChildError {
    #[error("there is no neuron beside {}: build it with `cargo build --release`", .0.display())]
    Missing(PathBuf),
    #[error("building neuron failed; see above")]
    Build,
    #[error("cannot start {}: {source}", path.display())]
    Start {
        path: PathBuf,
        source: std::io::Error,
    },
    #[error("the neuron ended before it listened; see above")]
    Died,
}

/// A running neuron. Dropping it closes its standard input, at which it ends.
pub(super) struct Neuron {
    path: PathBuf,
    child: Child,
    /// Held apart from `child`, whose `wait` would close it.
    stdin: Option<ChildStdin>,
    address: SocketAddr,
    quiet: bool,
}

impl Neuron {
    /// Starts one on a free port of loopback; `quiet` keeps its log lines back unless something is wrong.
    pub(super) async fn start(quiet: bool) -> Result<Self, ChildError> {
        let path = locate().await?;
        let (mut child, address) =
            spawn(&path, SocketAddr::from(([127, 0, 0, 1], 0)), quiet).await?;
        Ok(Self {
            path,
            stdin: child.stdin.take(),
            child,
            address,
            quiet,
        })
    }

    pub(super) fn address(&self) -> SocketAddr {
        self.address
    }

    /// Starts it again, at the same address, whenever it ends; the gateway then loads its model again.
    /// Ends with it once `stop` is rung.
    pub(super) async fn supervise(mut self, stop: Arc<Notify>) {
        loop {
            let ended = tokio::select! {
                ended = self.child.wait() => ended,
                () = stop.notified() => return self.stop().await,
            };
            tracing::warn!(
                status = ended.map_or_else(|error| error.to_string(), |status| status.to_string()),
                "the neuron ended; starting it again"
            );
            loop {
                sleep(Duration::from_secs(1)).await;
                match spawn(&self.path, self.address, self.quiet).await {
                    Ok((mut child, _)) => {
                        self.stdin = child.stdin.take();
                        self.child = child;
                        break;
                    }
                    Err(error) => tracing::error!(%error, "the neuron cannot be started again"),
                }
            }
        }
    }

    /// Lets it end, and makes it end when it does not.
    async fn stop(mut self) {
        drop(self.stdin.take());
        if timeout(END, self.child.wait()).await.is_err() {
            let _ = self.child.kill().await; // it may have ended just now
        }
    }
}

/// Beside us; built first when cargo started us, so that a fresh clone needs one command.
async fn locate() -> Result<PathBuf, ChildError> {
    let own = std::env::current_exe().unwrap_or_default();
    let folder = own.parent().unwrap_or(Path::new("")).to_path_buf();
    if let Some(mut build) = crate::config::cargo() {
        // what cargo says stays in sight: the first time this takes minutes
        build.args(["build", "--package", "neuron", "--bin", "neuron"]);
        if folder.ends_with("release") {
            build.arg("--release");
        }
        let built = build.status().await.map_err(|_| ChildError::Build)?;
        if !built.success() {
            return Err(ChildError::Build);
        }
    }
    let path = folder.join("neuron");
    if path.is_file() {
        Ok(path)
    } else {
        Err(ChildError::Missing(folder))
    }
}

async fn spawn(
    path: &Path,
    listen: SocketAddr,
    quiet: bool,
) -> Result<(Child, SocketAddr), ChildError> {
    let mut child = Command::new(path)
        .args(["--listen", &listen.to_string(), "--exit-with-stdin"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .process_group(0) // Ctrl-C is ours: the gateway drains first
        .kill_on_drop(true)
        .spawn()
        .map_err(|source| ChildError::Start {
            path: path.into(),
            source,
        })?;
    let mut lines = BufReader::new(child.stderr.take().expect("piped above")).lines();
    let listening = async {
        while let Ok(Some(line)) = lines.next_line().await {
            let address = line
                .split_once(LISTENING)
                .and_then(|(_, rest)| rest.split_whitespace().next()?.parse().ok());
            if !quiet {
                eprintln!("neuron | {line}");
            }
            if address.is_some() {
                return address;
            }
        }
        None
    };
    let address = timeout(START, listening)
        .await
        .ok()
        .flatten()
        .ok_or(ChildError::Died)?;
    tokio::spawn(async move {
        while let Ok(Some(line)) = lines.next_line().await {
            if !quiet {
                eprintln!("neuron | {line}");
            }
        }
    });
    Ok((child, address))
}
