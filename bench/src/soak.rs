//! `bench soak`: a neuron under everything at once for a while: random arrivals, clients that leave, more of them than it takes, and
//! bad input. At its end nothing may be left of it.

use crate::connection::{Ask, Connection, Failure};
use crate::processes::{Server, free_address, raise_open_files};
use anyhow::{Context as _, ensure};
use clap::Args;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom as _;
use rand::{Rng as _, SeedableRng as _};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use tokio::process::Command;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

/// What to wear out, and for how long.
#[derive(Debug, Args)]
pub(crate) struct SoakArgs {
    /// The neuron's program.
    #[arg(long, default_value = "target/release/neuron")]
    neuron: PathBuf,
    /// The model it serves.
    #[arg(long, default_value = "neuron/demo")]
    model: PathBuf,
    /// Minutes.
    #[arg(long, default_value_t = 30.0)]
    minutes: f64,
    /// Clients; every fifth minute there are four times as many.
    #[arg(long, default_value_t = 24)]
    clients: usize,
    /// Where chance begins.
    #[arg(long, default_value_t = 1)]
    seed: u64,
}

/// How often memory is looked at.
const LOOKS_EVERY: Duration = Duration::from_secs(5);
/// What is running when the last client has gone ends within this.
const ENDS_WITHIN: Duration = Duration::from_secs(60);
/// Growth of the peak of memory in the last third of the time over that before.
const MOST_GROWTH: f64 = 1.05;

type Counts = Arc<Mutex<BTreeMap<String, u64>>>;

/// Runs it and prints what came of it.
///
/// # Errors
/// When an answer is one that should not be, or something is left at the end.
pub(crate) async fn run(args: SoakArgs) -> anyhow::Result<()> {
    raise_open_files(16 * args.clients as u64 + 256)?;
    let folder = tempfile::tempdir()?;
    let address = free_address()?;
    let mut command = Command::new(&args.neuron);
    command.args(["--listen", &address.to_string(), "--id", MODEL]);
    command.arg("--model").arg(&args.model);
    let mut server = Server::start("neuron", command, folder.path())?;
    server.ready(address, "/health/ready").await?;
    let counts = Counts::default();
    let until = Instant::now() + Duration::from_secs_f64(60.0 * args.minutes);
    let mut clients = JoinSet::new();
    for client in 0..4 * args.clients {
        let counts = Arc::clone(&counts);
        let chance = StdRng::seed_from_u64(args.seed.wrapping_mul(1000) + client as u64);
        let always = client < args.clients;
        clients.spawn(be_client(address, chance, always, until, counts));
    }
    let mut resident = Vec::new();
    while Instant::now() < until {
        sleep(LOOKS_EVERY.min(until - Instant::now())).await;
        resident.push(server.memory()?.now_kib);
        while let Some(ended) = clients.try_join_next() {
            ended.expect("a client does not panic")?;
        }
    }
    while let Some(ended) = clients.join_next().await {
        ended.expect("a client does not panic")?;
    }
    let left = timeout(ENDS_WITHIN, nothing_left(address))
        .await
        .unwrap_or_else(|_| Err(anyhow::anyhow!("something runs after {ENDS_WITHIN:?}")));
    for (what, count) in &*counts.lock().unwrap_or_else(PoisonError::into_inner) {
        println!("{what:32} {count:>9}");
    }
    // the allocator gives memory back when it likes: only peaks can be compared
    let (before, last) = resident.split_at(resident.len() * 2 / 3);
    let peak = |part: &[u64]| part.iter().max().copied().unwrap_or(0) as f64;
    for tenth in resident.chunks(resident.len().div_ceil(10).max(1)) {
        let least = tenth.iter().min().copied().unwrap_or(0) as f64;
        println!(
            "resident, least and most         {:>9.1} {:.1} MiB",
            least / 1024.0,
            peak(tenth) / 1024.0
        );
    }
    println!("{}", left?);
    ensure!(
        peak(last) <= MOST_GROWTH * peak(before),
        "memory has grown from at most {} to {} KiB",
        peak(before),
        peak(last)
    );
    server.stop().await
}

const MODEL: &str = "soak";

/// Waits until the neuron says that nothing runs, nothing waits and no sequence holds a block.
async fn nothing_left(address: SocketAddr) -> anyhow::Result<String> {
    const WATCHED: [&str; 3] = [
        "neuron_requests_running",
        "neuron_requests_waiting",
        "neuron_kv_blocks_in_sequences",
    ];
    loop {
        let mut text = Vec::new();
        let mut connection = Connection::open(address).await?;
        let ask = Ask::get(address, "/metrics");
        connection
            .exchange(&ask, |piece| text.extend_from_slice(piece))
            .await?;
        let text = String::from_utf8(text)?;
        let mut found = Vec::new();
        for name in WATCHED {
            let line = text.lines().find(|line| line.starts_with(name));
            let line = line.with_context(|| format!("no metric {name}"))?;
            found.push(line.to_owned());
        }
        if found.iter().all(|line| line.ends_with(" 0")) {
            return Ok(found.join("\n"));
        }
        sleep(Duration::from_millis(200)).await;
    }
}

/// One client: it waits, asks something, and now and then does not stay for the answer.
async fn be_client(
    address: SocketAddr,
    mut chance: StdRng,
    always: bool,
    until: Instant,
    counts: Counts,
) -> anyhow::Result<()> {
    let began = Instant::now();
    let count = |what: &str| {
        let mut counts = counts.lock().unwrap_or_else(PoisonError::into_inner);
        *counts.entry(what.to_owned()).or_default() += 1;
    };
    while Instant::now() < until {
        // arrivals that know nothing of each other
        let wait = -chance.random::<f64>().max(1e-9).ln() * 0.2;
        sleep(Duration::from_secs_f64(wait)).await;
        let minute = began.elapsed().as_secs() / 60;
        if !always && !minute.is_multiple_of(5) {
            continue;
        }
        let kind = chance.random_range(0..10);
        let stream = chance.random();
        let stays = chance.random_bool(0.8);
        let patience = Duration::from_millis(chance.random_range(0..400));
        let (body, good) = match kind {
            0 => (bad(&mut chance), false),
            _ => (good(&mut chance, stream), true),
        };
        let ending: &[u8] = if stream { protocol::sse::DONE } else { b"}" };
        let ask = Ask::raw(address, "/v1/chat/completions", body.as_bytes(), ending);
        let mut connection = Connection::open(address).await?;
        let answer = connection.exchange(&ask, |_| {});
        if !stays && good {
            match timeout(patience, answer).await {
                Err(_) => count("left before the end"),
                Ok(answer) => note(answer, good, &count)?,
            }
        } else {
            note(answer.await, good, &count)?;
        }
    }
    Ok(())
}

/// Counts an answer that may be, and fails with one that may not.
fn note<T>(answer: Result<T, Failure>, good: bool, count: &impl Fn(&str)) -> anyhow::Result<()> {
    match (answer, good) {
        (Ok(_), true) => count("answered"),
        (Err(Failure::Status(429)), _) => count("too many: 429"),
        (Err(Failure::Status(400..=422)), false) => count("bad input refused"),
        (Ok(_), false) => anyhow::bail!("bad input was answered"),
        (Err(failure), _) => return Err(failure).context("an answer that should not be"),
    }
    Ok(())
}

const WORDS: [&str; 12] = [
    "cortex", "is", "a", "gateway", "what", "neuron", "how", "models", "load", "évident", "日本",
    "\n",
];

fn good(chance: &mut StdRng, stream: bool) -> String {
    let words = chance.random_range(1..200);
    let text: Vec<&str> = (0..words)
        .map(|_| *WORDS.choose(chance).expect("there are words"))
        .collect();
    let mut messages = Vec::new();
    if chance.random() {
        messages.push(json!({"role": "system", "content": "You are the demo of cortex."}));
    }
    messages.push(json!({"role": "user", "content": text.join(" ")}));
    let mut body = json!({
        "model": MODEL,
        "messages": messages,
        "stream": stream,
        "max_tokens": chance.random_range(1..60),
        "temperature": chance.random_range(0.0..1.5),
        "seed": chance.random_range(0..1000),
        "n": if chance.random_bool(0.1) { 2 } else { 1 },
    });
    match chance.random_range(0..8) {
        0 => body["response_format"] = json!({"type": "json_object"}),
        1 => body["stop"] = json!(["cortex", "."]),
        2 => body["logprobs"] = json!(true),
        3 => body["cache_salt"] = json!(chance.random_range(0..4).to_string()),
        4 => body["user"] = json!(chance.random_range(0..9).to_string()),
        _ => {}
    }
    body.to_string()
}

fn bad(chance: &mut StdRng) -> String {
    let whole = good(chance, false);
    let with = |name: &str, value: Value| {
        let mut body: Value = serde_json::from_str(&whole).expect("our own JSON");
        body[name] = value;
        body.to_string()
    };
    match chance.random_range(0..6) {
        0 => whole.chars().take(whole.len() / 3).collect(),
        1 => with("messages", json!([])),
        2 => with("temperature", json!("warm")),
        3 => with("model", json!("nobody")),
        4 => with(
            "messages",
            json!([{"role": "user", "content": "long ".repeat(200_000)}]),
        ),
        _ => with("n", json!(-1)),
    }
}
