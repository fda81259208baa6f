//! A network that falls apart: cortex and two real neurons, each in a network namespace of its own, and cables between
//! them that are pulled and put back. What is sent meanwhile is lost without a word, which loopback cannot do.

#![allow(missing_docs, clippy::unwrap_used)]

use futures::future::join_all;
use serde_json::{Value, json};
use std::fs::read_link;
use std::io::Write;
use std::net::SocketAddr;
use std::os::unix::process::parent_id;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use tests::daemon::{Cortex, Daemon, binary, root};
use tests::endings::{ending_of, nothing_is_left};
use tests::until;
use tokio::io::AsyncWriteExt;

const BOUNDS: &str = "[timeouts]\nhead = \"5s\"\nidle = \"2s\"\nload = \"60s\"\nconnect = \"300ms\"\n\
                      [routing]\nbreak_open = \"100ms\"\nbreak_longest = \"500ms\"\n\
                      [fleet]\npoll = \"200ms\"\npoll_timeout = \"1s\"\n";

/// Waits in its new namespace for its cable, and becomes the program that it is given.
const HOST: &str = "echo unplugged >&2; read -r address; ip link set lo up; ip addr add $address/24 dev cable; \
                    ip link set cable up; exec \"$@\"";

/// Runs `program` and gives what it says when it fails.
fn run(program: &[&str]) -> Result<(), String> {
    let ran = Command::new(program[0]).args(&program[1..]).output();
    let ran = ran.map_err(|error| format!("{}: {error}", program[0]))?;
    let said = String::from_utf8_lossy(&ran.stderr);
    let failed = || format!("{}: {}", program.join(" "), said.trim());
    ran.status.success().then_some(()).ok_or_else(failed)
}

/// How a program is run in a network namespace of its own, or why that cannot be here.
fn namespace() -> Result<Vec<&'static str>, String> {
    let ways: [&[&str]; 2] = [
        &["unshare", "--net"],
        &["unshare", "--map-root-user", "--net"],
    ];
    let cable = "ip link add name plug type veth peer name cable";
    let cable: Vec<&str> = cable.split(' ').collect();
    let tried = ways.map(|way| run(&[way, &cable[..]].concat()).map(|()| way.to_vec()));
    let [own, mapped] = tried;
    own.or_else(|why| mapped.map_err(|or| format!("{why}; {or}")))
}

#[test]
fn a_network_that_falls_apart_costs_no_request_its_end() {
    let way = match namespace() {
        Ok(way) => way,
        Err(why) => {
            // past the test's own output, which is shown only when it fails
            let mut stderr = std::io::stderr();
            writeln!(stderr, "SKIPPED: no network namespaces here: {why}").unwrap();
            return;
        }
    };
    let own = std::env::current_exe().unwrap();
    let inner = ["--exact", "in_a_namespace", "--ignored", "--nocapture"];
    let ran = Command::new(way[0])
        .args(&way[1..])
        .arg(own)
        .args(inner)
        .status()
        .unwrap();
    assert!(ran.success(), "see above");
}

/// A neuron at the end of a cable.
struct Host {
    daemon: Daemon,
    /// The gateway's end.
    plug: String,
    address: SocketAddr,
    neighbour: [String; 2],
}

impl Host {
    async fn start(number: u8) -> Self {
        let mut command = tokio::process::Command::new("unshare");
        let demo = root().join("neuron/demo");
        let address = SocketAddr::from(([10, 77, number, 2], 31313));
        command
            .args(["--net", "sh", "-c", HOST, "sh"])
            .arg(binary("neuron"))
            .args(["--id", "demo", "--listen", &address.to_string(), "--model"])
            .arg(demo);
        let mut daemon = Daemon::spawn(command);
        daemon.line("unplugged").await;
        let pid = daemon.child.id().unwrap().to_string();
        let plug = format!("plug{number}");
        let mac = format!("02:00:00:00:00:{number:02x}");
        let own_end = ["ip", "link", "add", "name", &plug, "type", "veth"];
        let its_end = ["peer", "name", "cable", "address", &mac, "netns", &pid];
        run(&[&own_end[..], &its_end].concat()).unwrap();
        let gateway = format!("10.77.{number}.1/24");
        run(&["ip", "addr", "add", &gateway, "dev", &plug]).unwrap();
        let host = Self {
            plug,
            address,
            neighbour: [address.ip().to_string(), mac],
            daemon,
        };
        host.connect();
        host
    }

    /// Tells it its address, whereupon it begins.
    async fn boot(&mut self) {
        let mut stdin = self.daemon.child.stdin.take().unwrap();
        let line = format!("{}\n", self.address.ip());
        stdin.write_all(line.as_bytes()).await.unwrap();
        self.daemon.line("listening on http://").await;
    }

    /// Puts the gateway's end in. Who is there is written down, so that nobody has to ask on a cable that is dead.
    fn connect(&self) {
        let [ip, mac] = &self.neighbour;
        run(&["ip", "link", "set", &self.plug, "up"]).unwrap();
        let neighbour = ["ip", "neigh", "replace", ip, "lladdr", mac];
        run(&[&neighbour[..], &["dev", &self.plug, "nud", "permanent"]].concat()).unwrap();
    }

    /// Pulls the gateway's end: the gateway's system knows at once that there is no way.
    fn disconnect(&self) {
        run(&["ip", "link", "set", &self.plug, "down"]).unwrap();
    }

    /// Turns the host's end on or off: the gateway sends into the void.
    fn far_end(&self, state: &str) {
        let space = format!("--net=/proc/{}/ns/net", self.daemon.child.id().unwrap());
        run(&["nsenter", &space, "ip", "link", "set", "cable", state]).unwrap();
    }
}

/// A short question, or one whose answer goes on until it is cut.
fn question(long: bool) -> Value {
    json!({
        "model": "demo", "messages": [{"role": "user", "content": "Hello!"}],
        "stream": long, "max_tokens": if long { 1500 } else { 2 }, "ignore_eos": long,
    })
}

/// Which node answers a short question; `None` where none does.
async fn answers(cortex: &Cortex) -> Option<String> {
    let reply = cortex.post("/v1/chat/completions", &question(false)).await;
    let node = reply
        .headers()
        .get("x-cortex-node")?
        .to_str()
        .ok()?
        .to_owned();
    reply.status().is_success().then_some(node)
}

/// Waits until `node` answers.
async fn until_answered_by(cortex: &Cortex, node: &str) {
    until(&format!("{node} answers"), || async {
        (answers(cortex).await? == node).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "the test above runs it, in a namespace that it makes"]
async fn in_a_namespace() {
    let space = |pid: u32| read_link(format!("/proc/{pid}/ns/net")).unwrap();
    let own = space(std::process::id());
    assert_ne!(own, space(parent_id()), "not in the machine's own network");
    run(&["ip", "link", "set", "lo", "up"]).unwrap();
    let mut hosts = [Host::start(1).await, Host::start(2).await];
    for host in &mut hosts {
        host.boot().await;
    }
    let [a, b] = &hosts;
    let cortex = Cortex::start(&[("a", a.address), ("b", b.address)], "", BOUNDS).await;
    until_answered_by(&cortex, "a").await;
    until_answered_by(&cortex, "b").await;
    let files = cortex.open_files();
    for silently in [true, false] {
        let cut = || match silently {
            true => a.far_end("down"),
            false => a.disconnect(),
        };
        let heal = || match silently {
            true => a.far_end("up"),
            false => a.connect(),
        };
        let over = AtomicBool::new(false);
        let ask = |_| async {
            let mut endings = Vec::new();
            while !over.load(Ordering::Relaxed) {
                endings.push(ending_of(&cortex, &question(false)).await);
            }
            endings
        };
        let disturb = async {
            let mut long = Vec::new();
            // some are at the node that is cut off, and all have begun
            while !long.iter().any(|(node, _)| node == "a") || long.len() < 4 {
                let mut reply = cortex.post("/v1/chat/completions", &question(true)).await;
                let node = reply.headers()["x-cortex-node"]
                    .to_str()
                    .unwrap()
                    .to_owned();
                reply.chunk().await.unwrap().expect("it begins");
                long.push((node, reply));
            }
            cut();
            let ends = long.into_iter().map(|(node, reply)| async move {
                let text = reply.text().await.unwrap();
                let torn = text.contains("\"error\"");
                assert!(torn || text.contains("[DONE]"), "{node}: {text}");
                assert!(node == "b" || torn, "what was at {node} is told of its end");
                assert!(node == "a" || !torn, "what was at {node} goes on: {text}");
            });
            join_all(ends).await;
            cortex.sees(&[("a", "down"), ("b", "up")]).await;
            for _ in 0..10 {
                assert_eq!(
                    answers(&cortex).await.as_deref(),
                    Some("b"),
                    "it takes over"
                );
            }
            heal();
            cortex.sees(&[("a", "up"), ("b", "up")]).await;
            until_answered_by(&cortex, "a").await;
            over.store(true, Ordering::Relaxed);
        };
        let (endings, ()) = futures::future::join(join_all((0..3).map(ask)), disturb).await;
        let endings = endings.concat();
        let known = ["answer", "502", "503", "504"];
        assert!(
            endings.iter().all(|ending| known.contains(&&**ending)),
            "{endings:?}"
        );
        let answered = endings.iter().filter(|ending| *ending == "answer").count();
        assert!(answered * 10 >= endings.len() * 9, "{endings:?}");
        nothing_is_left(&cortex, files, 8).await;
        for host in &hosts {
            until("the neuron has nothing left either", || async {
                let models = cortex.client.get(format!("http://{}/models", host.address));
                let models: Value = models.send().await.ok()?.json().await.ok()?;
                (models["models"][0]["in_flight"] == 0).then_some(())
            })
            .await;
        }
    }
}
