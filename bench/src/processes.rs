//! Servers as child processes, and what the kernel says they used.

use crate::connection::{Ask, Connection};
use anyhow::{Context as _, bail, ensure};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::{Signal, kill};
use nix::time::{clock_getcpuclockid, clock_gettime};
use nix::unistd::Pid;
use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;
use tokio::io::{AsyncBufReadExt as _, BufReader};
use tokio::process::{Child, Command};

const STARTS_WITHIN: Duration = Duration::from_secs(30);
const STOPS_WITHIN: Duration = Duration::from_secs(10);
const LOOKS_EVERY: Duration = Duration::from_millis(50);

/// A server of our own, ended with it: asked by SIGTERM when dropped, waited for by [`Server::stop`].
#[derive(Debug)]
pub(crate) struct Server {
    name: &'static str,
    child: Child,
    log: PathBuf,
}

impl Server {
    /// Starts `command`; what it says on stderr goes to a file in `folder`.
    pub(crate) fn start(
        name: &'static str,
        mut command: Command,
        folder: &Path,
    ) -> anyhow::Result<Self> {
        let log = folder.join(format!("{name}.log"));
        let child = command
            .stdin(Stdio::null())
            .stderr(fs::File::create(&log)?)
            .spawn()
            .with_context(|| {
                format!(
                    "cannot start {}",
                    command.as_std().get_program().to_string_lossy()
                )
            })?;
        Ok(Self { name, child, log })
    }

    /// The first line on stdout, which must have been piped.
    pub(crate) async fn first_line(&mut self) -> anyhow::Result<String> {
        let stdout = self.child.stdout.as_mut().context("stdout is not piped")?;
        let mut line = String::new();
        let mut stdout = BufReader::new(stdout);
        tokio::time::timeout(STARTS_WITHIN, stdout.read_line(&mut line))
            .await
            .with_context(|| format!("{} said nothing: {}", self.name, self.last_words()))??;
        Ok(line.trim_end().to_owned())
    }

    /// Returns when `path` at `address` is answered with 200.
    pub(crate) async fn ready(&mut self, address: SocketAddr, path: &str) -> anyhow::Result<()> {
        let ask = Ask::get(address, path);
        let wait = async {
            loop {
                if let Some(status) = self.child.try_wait()? {
                    bail!("it ended with {status}");
                }
                if let Ok(mut connection) = Connection::open(address).await
                    && connection.exchange(&ask, |_| {}).await.is_ok()
                {
                    return Ok(());
                }
                tokio::time::sleep(LOOKS_EVERY).await;
            }
        };
        tokio::time::timeout(STARTS_WITHIN, wait)
            .await
            .unwrap_or_else(|_| Err(anyhow::anyhow!("not within {STARTS_WITHIN:?}")))
            .with_context(|| format!("{} did not get ready; {}", self.name, self.last_words()))
    }

    /// CPU time in user and system that the process, its living children and all threads of theirs have used, ended
    /// threads included.
    pub(crate) fn cpu(&self) -> anyhow::Result<Duration> {
        let mut cpu = Duration::ZERO;
        for pid in tree(self.pid()?)? {
            let clock = clock_getcpuclockid(Pid::from_raw(i32::try_from(pid)?))?;
            cpu += Duration::from(clock_gettime(clock)?);
        }
        Ok(cpu)
    }

    /// Resident memory of the process and its living children.
    pub(crate) fn memory(&self) -> anyhow::Result<Memory> {
        let mut memory = Memory::default();
        for pid in tree(self.pid()?)? {
            let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
            memory.now_kib += field(&status, "VmRSS:")?;
            memory.peak_kib += field(&status, "VmHWM:")?;
        }
        Ok(memory)
    }

    /// Asks it to end and waits; a server that does not is killed.
    pub(crate) async fn stop(mut self) -> anyhow::Result<()> {
        self.terminate();
        if tokio::time::timeout(STOPS_WITHIN, self.child.wait())
            .await
            .is_err()
        {
            eprintln!("{} did not end on SIGTERM and is killed", self.name);
            self.child.kill().await?;
        }
        Ok(())
    }

    fn pid(&self) -> anyhow::Result<u32> {
        self.child
            .id()
            .with_context(|| format!("{} has ended; {}", self.name, self.last_words()))
    }

    fn terminate(&self) {
        let pid = self.child.id().and_then(|pid| i32::try_from(pid).ok());
        if let Some(pid) = pid {
            // It fails only when the process has ended, which is what is wanted.
            let _ = kill(Pid::from_raw(pid), Signal::SIGTERM);
        }
    }

    fn last_words(&self) -> String {
        let log = fs::read_to_string(&self.log).unwrap_or_default();
        let lines: Vec<_> = log.lines().rev().take(5).collect();
        if lines.is_empty() {
            return "it logged nothing".into();
        }
        let lines: Vec<_> = lines.into_iter().rev().collect();
        format!("its last words:\n{}", lines.join("\n"))
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.terminate();
    }
}

/// Resident memory in KiB.
#[derive(Debug, Clone, Copy, Default, serde::Serialize)]
pub(crate) struct Memory {
    /// `VmRSS`.
    pub(crate) now_kib: u64,
    /// `VmHWM`.
    pub(crate) peak_kib: u64,
}

/// Lets this process and those it starts open at least `wanted` files.
///
/// # Errors
/// When the hard limit is lower.
pub(crate) fn raise_open_files(wanted: u64) -> anyhow::Result<()> {
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    if soft >= wanted {
        return Ok(());
    }
    ensure!(
        hard >= wanted,
        "{wanted} open files are needed, the hard limit is {hard} (ulimit -Hn)"
    );
    setrlimit(Resource::RLIMIT_NOFILE, wanted, hard).context("raising the limit of open files")
}

/// A loopback address that was free a moment ago.
pub(crate) fn free_address() -> anyhow::Result<SocketAddr> {
    Ok(std::net::TcpListener::bind("127.0.0.1:0")?.local_addr()?)
}

/// `root` and all that descend from it.
fn tree(root: u32) -> anyhow::Result<Vec<u32>> {
    let mut parents = Vec::new();
    for entry in fs::read_dir("/proc")? {
        let name = entry?.file_name();
        let Some(pid) = name.to_str().and_then(|name| name.parse::<u32>().ok()) else {
            continue;
        };
        // A process that ended meanwhile is not one of ours.
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        if let Some(parent) = parent(&stat) {
            parents.push((pid, parent));
        }
    }
    let mut tree = vec![root];
    let mut at = 0;
    while at < tree.len() {
        let parent = tree[at];
        tree.extend(parents.iter().filter(|(_, of)| *of == parent).map(|p| p.0));
        at += 1;
    }
    Ok(tree)
}

/// proc_pid_stat(5): the fourth field; the second is a name in brackets that may hold anything.
fn parent(stat: &str) -> Option<u32> {
    let (_, fields) = stat.rsplit_once(')')?;
    fields.split_ascii_whitespace().nth(1)?.parse().ok()
}

fn field(status: &str, name: &str) -> anyhow::Result<u64> {
    status
        .lines()
        .find_map(|line| line.strip_prefix(name))
        .and_then(|rest| rest.trim().trim_end_matches("kB").trim().parse().ok())
        .with_context(|| format!("/proc/PID/status has no {name}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_parent_is_read_past_any_name() {
        assert_eq!(parent("42 (a) b (c) S 7 42 42 0 -1 4194560"), Some(7));
        assert_eq!(parent("42 (a"), None, "a short line");
    }

    #[test]
    fn memory_is_read_from_its_line() {
        let status = "Name:\tx\nVmHWM:\t   2048 kB\nVmRSS:\t  1024 kB\n";
        assert_eq!(field(status, "VmRSS:").ok(), Some(1024));
        assert_eq!(field(status, "VmHWM:").ok(), Some(2048));
        assert!(field(status, "VmSwap:").is_err());
    }

    #[test]
    fn the_tree_of_this_process_begins_with_it() {
        let own = std::process::id();
        assert_eq!(tree(own).expect("/proc is there").first(), Some(&own));
    }
}
