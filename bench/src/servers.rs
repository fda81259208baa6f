//! The servers of a report, each with a configuration of its own in a temporary folder.

use crate::mock::LISTENING;
use crate::processes::{Server, free_address};
use anyhow::Context as _;
use clap::Args;
use std::fs;
use std::io::ErrorKind;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Command as StdCommand, Stdio};
use tempfile::TempDir;
use tokio::process::Command;

const CORTEX: &str = "target/release/cortex";
/// Where nginx is looked for: distributions keep it out of the path of ordinary users.
const NGINX: [&str; 2] = ["nginx", "/usr/sbin/nginx"];

/// Which binaries stand between the load and the mock.
#[derive(Debug, Clone, Args)]
pub(crate) struct ProxyArgs {
    /// The gateway; target/release/cortex when it is there.
    #[arg(long, value_name = "PATH")]
    cortex: Option<PathBuf>,
    /// The proxy to compare with; an installed one when there is one.
    #[arg(long, value_name = "PATH")]
    nginx: Option<PathBuf>,
}

/// How a request gets to the mock.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Via {
    Direct,
    Nginx,
    Cortex,
}

impl Via {
    /// The word in tables.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Direct => "direct",
            Self::Nginx => "nginx",
            Self::Cortex => "cortex",
        }
    }
}

/// A proxy that answers.
pub(crate) struct Proxy {
    pub(crate) via: Via,
    pub(crate) address: SocketAddr,
    pub(crate) server: Server,
    /// What it says of itself, or where it came from.
    pub(crate) version: String,
}

/// The mock and the proxies before it. Dropping it ends them all.
pub(crate) struct Servers {
    pub(crate) mock: Server,
    pub(crate) mock_address: SocketAddr,
    pub(crate) proxies: Vec<Proxy>,
    folder: TempDir,
}

impl Servers {
    /// Starts everything and waits until each answers. A proxy that is not installed and was not asked for is left
    /// out, which stderr says.
    pub(crate) async fn start(
        args: &ProxyArgs,
        pace_ms: u64,
        idle: bool,
        threads: usize,
    ) -> anyhow::Result<Self> {
        let folder = tempfile::tempdir()?;
        let (mock, mock_address) = mock(folder.path(), pace_ms, idle, threads).await?;
        let mut servers = Self {
            mock,
            mock_address,
            proxies: Vec::new(),
            folder,
        };
        match nginx_version(args.nginx.as_deref())? {
            Some((path, version)) => servers.start_nginx(&path, version).await?,
            None => eprintln!("nginx is not installed: there will be no ratios"),
        }
        match &args.cortex {
            Some(path) => servers.start_cortex(path).await?,
            None if Path::new(CORTEX).exists() => servers.start_cortex(Path::new(CORTEX)).await?,
            None => eprintln!("there is no {CORTEX}: it is left out"),
        }
        Ok(servers)
    }

    /// Asks all to end and waits.
    pub(crate) async fn stop(self) -> anyhow::Result<()> {
        for proxy in self.proxies {
            proxy.server.stop().await?;
        }
        self.mock.stop().await
    }

    async fn start_nginx(&mut self, path: &Path, version: String) -> anyhow::Result<()> {
        let folder = self.folder.path();
        let address = free_address()?;
        let config = folder.join("nginx.conf");
        fs::write(
            &config,
            nginx_config(folder, address, self.mock_address, &version),
        )?;
        let mut command = Command::new(path);
        command.arg("-p").arg(folder).arg("-c").arg(&config);
        command.arg("-e").arg(folder.join("nginx-error.log"));
        let mut server = Server::start("nginx", command, folder)?;
        server.ready(address, "/health/live").await?;
        self.proxies.push(Proxy {
            via: Via::Nginx,
            address,
            server,
            version: version.lines().next().unwrap_or_default().to_owned(),
        });
        Ok(())
    }

    async fn start_cortex(&mut self, path: &Path) -> anyhow::Result<()> {
        let folder = self.folder.path();
        let (address, metrics) = (free_address()?, free_address()?);
        let config = folder.join("cortex.toml");
        fs::write(&config, cortex_config(address, metrics, self.mock_address))?;
        let mut command = Command::new(path);
        command.arg("serve").arg("--config").arg(&config);
        command.stdout(Stdio::null());
        command.env("CORTEX_LOG", "info,access=warn"); // as nginx runs here: without an access log
        let mut server = Server::start("cortex", command, folder)?;
        server.ready(metrics, "/health/ready").await?;
        self.proxies.push(Proxy {
            via: Via::Cortex,
            address,
            server,
            version: path.display().to_string(),
        });
        Ok(())
    }
}

async fn mock(
    folder: &Path,
    pace_ms: u64,
    idle: bool,
    threads: usize,
) -> anyhow::Result<(Server, SocketAddr)> {
    let mut command = Command::new(std::env::current_exe()?);
    command.args(["--threads", &threads.to_string()]);
    command.args(["mock", "--listen", "127.0.0.1:0"]);
    command.args(["--pace-ms", &pace_ms.to_string()]);
    if idle {
        command.arg("--idle");
    }
    command.stdout(Stdio::piped());
    let mut server = Server::start("mock", command, folder)?;
    let line = server.first_line().await?;
    let address = line
        .strip_prefix(LISTENING)
        .and_then(|address| address.parse().ok())
        .with_context(|| format!("the mock said {line:?}"))?;
    Ok((server, address))
}

/// The binary and what its `-V` says; none when it was not named and is not installed.
fn nginx_version(named: Option<&Path>) -> anyhow::Result<Option<(PathBuf, String)>> {
    let places = match named {
        Some(path) => vec![path],
        None => NGINX.map(Path::new).to_vec(),
    };
    for path in places {
        match StdCommand::new(path).arg("-V").output() {
            Ok(output) => {
                let version = String::from_utf8_lossy(&output.stderr).into_owned();
                return Ok(Some((path.to_owned(), version)));
            }
            Err(error) if error.kind() == ErrorKind::NotFound && named.is_none() => {}
            Err(error) => {
                return Err(error).with_context(|| format!("cannot run {}", path.display()));
            }
        }
    }
    Ok(None)
}

/// Threads of each proxy: a small machine has to have room for the load and the mock.
fn workers() -> usize {
    match crate::machine::cores() {
        0..4 => 1,
        _ => 2,
    }
}

/// nginx as one sets it up before a server that streams: nothing buffered, nothing logged, upstream kept alive.
fn nginx_config(folder: &Path, listen: SocketAddr, upstream: SocketAddr, version: &str) -> String {
    let folder = folder.display();
    // Left to itself a root master gives its workers to a user who may not enter the folder.
    let user = match nix::unistd::geteuid().is_root() {
        true => "user root;",
        false => "",
    };
    let workers = workers();
    let temp_paths: String = ["fastcgi", "uwsgi", "scgi"]
        .iter()
        .filter(|module| !version.contains(&format!("--without-http_{module}_module")))
        .map(|module| format!("    {module}_temp_path \"{folder}/{module}\";\n"))
        .collect();
    format!(
        r#"daemon off;
{user}
worker_processes {workers};
error_log "{folder}/nginx-error.log" crit;
pid "{folder}/nginx.pid";
events {{
    worker_connections 32768;
}}
http {{
    access_log off;
    client_body_temp_path "{folder}/body";
    proxy_temp_path "{folder}/proxy";
{temp_paths}
    keepalive_timeout 600s;
    keepalive_requests 1000000000;
    upstream mock {{
        server {upstream};
        keepalive 1024;
        keepalive_timeout 600s;
        keepalive_requests 1000000000;
    }}
    server {{
        listen {listen} backlog=4096;
        location / {{
            proxy_pass http://mock;
            proxy_http_version 1.1;
            proxy_set_header Connection "";
            proxy_buffering off;
            proxy_read_timeout 600s;
        }}
    }}
}}
"#
    )
}

fn cortex_config(listen: SocketAddr, metrics: SocketAddr, upstream: SocketAddr) -> String {
    let workers = workers();
    format!(
        r#"[gateway]
listen = "{listen}"
metrics_listen = "{metrics}"
threads = {workers}

[[neurons]]
name = "mock"
endpoint = "http://{upstream}"
"#
    )
}
