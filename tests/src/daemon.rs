//! cortex and neuron as child processes on loopback.

use crate::until;
use reqwest::{Client, StatusCode};
use serde_json::Value;
use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::{Arc, Mutex};
use tempfile::TempDir;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, Command};
use tokio::sync::watch;

/// The folder of this package.
#[must_use]
pub fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .unwrap()
        .to_path_buf()
}

/// A model folder under `tests/fixtures/models`.
#[must_use]
pub fn model(name: &str) -> PathBuf {
    root().join("tests/fixtures/models").join(name)
}

/// A binary of the workspace, built by `cargo test --workspace` before any test runs.
#[must_use]
pub fn binary(name: &str) -> PathBuf {
    let own = std::env::current_exe().unwrap();
    let path = own.parent().and_then(Path::parent).unwrap().join(name);
    assert!(
        path.is_file(),
        "{} is not there: run `cargo test --workspace`",
        path.display()
    );
    path
}

/// An address on loopback that nobody uses now.
#[must_use]
pub fn free_address() -> SocketAddr {
    TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap()
}

/// A child process whose log lines can be waited for. Killed when dropped.
pub struct Daemon {
    pub child: Child,
    lines: Arc<Mutex<Vec<String>>>,
    grown: watch::Receiver<usize>,
}

impl Daemon {
    /// Starts `name` with `args`; its standard error is kept.
    #[must_use]
    pub fn start(name: &str, args: &[&str]) -> Self {
        let mut command = Command::new(binary(name));
        command.args(args);
        Self::spawn(command)
    }

    /// Starts any program in the same way.
    #[must_use]
    pub fn spawn(mut command: Command) -> Self {
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        let lines = Arc::new(Mutex::new(Vec::new()));
        let (grow, grown) = watch::channel(0);
        let mut stderr = BufReader::new(child.stderr.take().unwrap()).lines();
        let kept = lines.clone();
        tokio::spawn(async move {
            while let Ok(Some(line)) = stderr.next_line().await {
                let mut kept = kept.lock().unwrap();
                kept.push(line);
                let _ = grow.send(kept.len());
            }
        });
        Self {
            child,
            lines,
            grown,
        }
    }

    /// Waits for a log line that contains `text`.
    pub async fn line(&mut self, text: &str) -> String {
        loop {
            if let Some(line) = self.log().into_iter().find(|line| line.contains(text)) {
                return line;
            }
            let grown = tokio::time::timeout(crate::PATIENCE, self.grown.changed()).await;
            assert!(
                matches!(grown, Ok(Ok(()))),
                "no line says {text:?}:\n{}",
                self.log().join("\n")
            );
        }
    }

    /// Every log line so far.
    #[must_use]
    pub fn log(&self) -> Vec<String> {
        self.lines.lock().unwrap().clone()
    }

    /// Sends a signal by its name, as `kill` knows it.
    pub fn signal(&self, name: &str) {
        let pid = self.child.id().expect("it runs").to_string();
        let sent = std::process::Command::new("kill")
            .args([&format!("-{name}"), &pid])
            .status();
        assert!(sent.unwrap().success());
    }

    /// Waits for its end and gives the exit code.
    pub async fn ended(&mut self) -> Option<i32> {
        tokio::time::timeout(crate::PATIENCE, self.child.wait())
            .await
            .expect("it ends")
            .unwrap()
            .code()
    }
}

/// A running gateway.
pub struct Cortex {
    pub daemon: Daemon,
    /// Where clients talk to it.
    pub api: String,
    /// Where its metrics are.
    pub admin: String,
    pub client: Client,
    folder: TempDir,
    head: String,
}

/// A node of the configuration: name and address.
pub type NodeAt<'a> = (&'a str, SocketAddr);

impl Cortex {
    /// Starts a gateway over `nodes`, with `models` as its catalogue and `extra` lines of `cortex.toml`,
    /// and waits until it has seen every node.
    pub async fn start(nodes: &[NodeAt<'_>], models: &str, extra: &str) -> Self {
        let cortex = Self::spawn(nodes, models, extra).await;
        cortex
            .sees(
                &nodes
                    .iter()
                    .map(|(name, _)| (*name, "up"))
                    .collect::<Vec<_>>(),
            )
            .await;
        cortex
    }

    /// Waits until these nodes are all it has, in this health.
    pub async fn sees(&self, expected: &[(&str, &str)]) {
        until(&format!("the fleet is {expected:?}"), || async {
            let status: Value = self
                .client
                .get(format!("{}/status", self.admin))
                .send()
                .await
                .ok()?
                .json()
                .await
                .ok()?;
            let nodes = status["nodes"].as_array()?;
            let seen: Vec<_> = nodes
                .iter()
                .filter_map(|node| Some((node["name"].as_str()?, node["health"].as_str()?)))
                .collect();
            (seen == expected).then_some(())
        })
        .await;
    }

    /// As [`Cortex::start`], but only waits until it listens. A port may be taken by another test between being found
    /// free and being listened on; then it is started at others.
    pub async fn spawn(nodes: &[NodeAt<'_>], models: &str, extra: &str) -> Self {
        loop {
            let cortex = Self::spawn_once(nodes, models, extra);
            if cortex.listens().await {
                return cortex;
            }
        }
    }

    /// Waits until both its ports answer; false if it found one of them taken.
    async fn listens(&self) -> bool {
        let api = &self.api["http://".len()..];
        until("cortex listens", || async {
            if (self.daemon.log().iter()).any(|line| line.contains("cannot listen on")) {
                return Some(false);
            }
            let live = self.client.get(format!("{}/health/live", self.admin));
            let open = tokio::net::TcpStream::connect(api).await;
            (live.send().await.is_ok() && open.is_ok()).then_some(true)
        })
        .await
    }

    fn spawn_once(nodes: &[NodeAt<'_>], models: &str, extra: &str) -> Self {
        let (api, admin) = (free_address(), free_address());
        let folder = TempDir::new().unwrap();
        let head = format!(
            "listen = \"{api}\"\nmetrics_listen = \"{admin}\"\nupgrade_socket = \"upgrade.sock\"\n"
        );
        write_config(folder.path(), &head, nodes, models, extra);
        let file = folder.path().join("cortex.toml");
        let daemon = Daemon::start("cortex", &["serve", "--config", file.to_str().unwrap()]);
        let client = Client::builder().no_proxy().build().unwrap();
        Self {
            daemon,
            api: format!("http://{api}"),
            admin: format!("http://{admin}"),
            client,
            folder,
            head,
        }
    }

    /// Writes other files and has them read; waits until the gateway has said what it thinks of them.
    pub async fn reload(&mut self, nodes: &[NodeAt<'_>], models: &str, extra: &str) -> String {
        write_config(self.folder.path(), &self.head, nodes, models, extra);
        let before = self.daemon.log().len();
        self.daemon.signal("HUP");
        let daemon = &self.daemon;
        until("a word about the reload", || async {
            daemon.log()[before..]
                .iter()
                .find(|line| line.contains("configuration"))
                .cloned()
        })
        .await
    }

    /// Kills it without a word and starts another one in its place, which listens when this returns.
    pub async fn replace(&mut self) {
        self.daemon.child.kill().await.unwrap();
        let file = self.folder.path().join("cortex.toml");
        loop {
            self.daemon = Daemon::start("cortex", &["serve", "--config", file.to_str().unwrap()]);
            // a port may be held for a moment by a connection of another test that was given it
            if self.listens().await {
                return;
            }
        }
    }

    /// Files and sockets that it has open.
    #[must_use]
    pub fn open_files(&self) -> usize {
        let pid = self.daemon.child.id().unwrap();
        std::fs::read_dir(format!("/proc/{pid}/fd"))
            .unwrap()
            .count()
    }

    /// The folder of its configuration.
    #[must_use]
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// Writes other files and leaves it to the gateway to see that they have changed.
    pub fn rewrite(&self, nodes: &[NodeAt<'_>], models: &str, extra: &str) {
        write_config(self.folder.path(), &self.head, nodes, models, extra);
    }

    /// Starts a second gateway that waits for the sockets of this one, which is then told to hand them over.
    /// Gives the old one.
    pub async fn upgrade(&mut self) -> Daemon {
        let file = self.folder.path().join("cortex.toml");
        let args = ["serve", "--upgrade", "--config", file.to_str().unwrap()];
        let new = Daemon::start("cortex", &args);
        let socket = self.folder.path().join("upgrade.sock");
        until("the new gateway waits", || async {
            socket.exists().then_some(())
        })
        .await;
        self.daemon.signal("QUIT");
        std::mem::replace(&mut self.daemon, new)
    }

    /// Posts JSON.
    pub async fn post(&self, path: &str, body: &Value) -> reqwest::Response {
        self.client
            .post(format!("{}{path}", self.api))
            .body(body.to_string())
            .header("content-type", "application/json")
            .send()
            .await
            .unwrap()
    }

    /// Posts JSON and reads JSON.
    pub async fn ask(&self, path: &str, body: &Value) -> (StatusCode, Value) {
        let reply = self.post(path, body).await;
        (reply.status(), reply.json().await.unwrap())
    }

    /// One line of the metrics, found by its name and labels; its value.
    pub async fn metric(&self, name: &str) -> Option<f64> {
        let text = self
            .client
            .get(format!("{}/metrics", self.admin))
            .send()
            .await
            .unwrap()
            .text()
            .await
            .unwrap();
        let line = text
            .lines()
            .find(|line| line.starts_with(name) && line[name.len()..].starts_with(' '))?;
        line.rsplit(' ').next()?.parse().ok()
    }
}

fn write_config(folder: &Path, head: &str, nodes: &[NodeAt<'_>], models: &str, extra: &str) {
    let mut text = String::from("models = \"models.toml\"\n");
    let (gateway, rest) = extra
        .split_once('[')
        .map_or((extra, String::new()), |(own, rest)| {
            (own, format!("[{rest}"))
        });
    text += &format!("[gateway]\n{head}{gateway}\n{rest}\n");
    if !rest.contains("[fleet]") {
        text += "[fleet]\npoll = \"100ms\"\n";
    }
    for (name, address) in nodes {
        text += &format!("[[neurons]]\nname = \"{name}\"\nendpoint = \"http://{address}\"\n");
    }
    // whole or not at all: the gateway may read them at any moment
    for (file, text) in [("models.toml", models), ("cortex.toml", &text)] {
        let written = folder.join(format!("{file}.new"));
        std::fs::write(&written, text).unwrap();
        std::fs::rename(written, folder.join(file)).unwrap();
    }
}

/// Starts a real neuron with a fixture model and waits until it serves it.
pub async fn neuron(fixture: &str, id: &str) -> (Daemon, SocketAddr) {
    serving(&model(fixture), id).await
}

/// Starts a real neuron with the demo model, whose answers make sense, and waits until it serves it.
pub async fn demo() -> (Daemon, SocketAddr) {
    serving(&root().join("neuron/demo"), "demo").await
}

async fn serving(folder: &Path, id: &str) -> (Daemon, SocketAddr) {
    let args = [
        "--model",
        folder.to_str().unwrap(),
        "--id",
        id,
        "--listen",
        "127.0.0.1:0",
    ];
    let mut daemon = Daemon::start("neuron", &args);
    let line = daemon.line("listening on http://").await;
    let address = line
        .split("http://")
        .nth(1)
        .unwrap()
        .split_whitespace()
        .next()
        .unwrap();
    let address: SocketAddr = address.parse().unwrap();
    let client = Client::builder().no_proxy().build().unwrap();
    until("the model is loaded", || async {
        let ready = client
            .get(format!("http://{address}/health/ready"))
            .send()
            .await
            .ok()?;
        ready.status().is_success().then_some(())
    })
    .await;
    (daemon, address)
}
