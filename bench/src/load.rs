//! A closed loop of requests: every connection sends its next one when its last was answered.

use crate::connection::{Ask, Connection, Failure, Times};
use crate::histogram::Histogram;
use anyhow::Context as _;
use clap::Args;
use serde::Serialize;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};
use tokio::task::JoinSet;

/// What to ask and how often.
#[derive(Debug, Clone, Args)]
pub(crate) struct LoadArgs {
    /// The server, as `http://HOST:PORT`; the path is always /v1/chat/completions.
    #[arg(long, value_name = "URL")]
    url: String,
    /// Connections that ask at the same time.
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = clap::value_parser!(u64).range(1..))]
    concurrency: u64,
    /// Requests in all.
    #[arg(long, value_name = "N", default_value_t = 10_000)]
    requests: u64,
    /// Ask for streams.
    #[arg(long)]
    stream: bool,
    /// The model to ask for.
    #[arg(long, value_name = "ID", default_value = "mock")]
    model: String,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// Runs one load and prints what came of it.
///
/// # Errors
/// When the server cannot be reached, or any request failed.
pub(crate) async fn run(args: LoadArgs) -> anyhow::Result<()> {
    crate::processes::raise_open_files(args.concurrency + 64)?;
    let ask = Ask::chat(resolve(&args.url).await?, &args.model, args.stream);
    let mut clients = Clients::connect(ask, usize::try_from(args.concurrency)?).await?;
    let figures = clients.run(args.requests).await.figures();
    if args.json {
        println!("{}", serde_json::to_string_pretty(&figures)?);
    } else {
        println!("{figures}");
    }
    match &figures.first_error {
        Some(error) => anyhow::bail!("{} requests failed, one so: {error}", figures.errors),
        None => Ok(()),
    }
}

/// The address of `http://HOST:PORT`.
pub(crate) async fn resolve(url: &str) -> anyhow::Result<SocketAddr> {
    let host = url
        .strip_prefix("http://")
        .map(|rest| rest.trim_end_matches('/'))
        .filter(|host| !host.contains('/'))
        .with_context(|| format!("{url}: only http://HOST:PORT is understood"))?;
    tokio::net::lookup_host(host)
        .await
        .with_context(|| url.to_owned())?
        .next()
        .with_context(|| format!("{url}: the host has no address"))
}

/// Connections that ask one thing.
pub(crate) struct Clients {
    ask: Arc<Ask>,
    connections: Vec<Connection>,
}

impl Clients {
    /// Opens all connections.
    pub(crate) async fn connect(ask: Ask, count: usize) -> Result<Self, Failure> {
        let mut connections = Vec::with_capacity(count);
        for _ in 0..count {
            connections.push(Connection::open(ask.server).await?);
        }
        Ok(Self {
            ask: Arc::new(ask),
            connections,
        })
    }

    /// Sends `requests` over all connections and waits for the last reply. The connections stay open.
    pub(crate) async fn run(&mut self, requests: u64) -> Tally {
        let taken = Arc::new(AtomicU64::new(0));
        let mut tasks = JoinSet::new();
        let begun = Instant::now();
        for mut connection in self.connections.drain(..) {
            let (ask, taken) = (Arc::clone(&self.ask), Arc::clone(&taken));
            tasks.spawn(async move {
                let mut tally = Tally::default();
                while taken.fetch_add(1, Ordering::Relaxed) < requests {
                    tally.count(connection.exchange(&ask, |_| {}).await);
                }
                (connection, tally)
            });
        }
        let mut all = Tally::default();
        while let Some(ended) = tasks.join_next().await {
            let (connection, tally) = ended.expect("a client does not panic");
            all.merge(tally);
            self.connections.push(connection);
        }
        all.took = begun.elapsed();
        all
    }
}

/// What came of many requests.
#[derive(Debug, Default)]
pub(crate) struct Tally {
    whole: Histogram,
    first_byte: Histogram,
    errors: u64,
    first_error: Option<Failure>,
    took: Duration,
}

impl Tally {
    fn count(&mut self, outcome: Result<Times, Failure>) {
        match outcome {
            Ok(times) => {
                self.whole.record(times.whole);
                self.first_byte.record(times.first_byte);
            }
            Err(failure) => {
                self.errors += 1;
                self.first_error.get_or_insert(failure);
            }
        }
    }

    fn merge(&mut self, other: Self) {
        self.whole.merge(&other.whole);
        self.first_byte.merge(&other.first_byte);
        self.errors += other.errors;
        self.first_error = self.first_error.take().or(other.first_error);
    }

    /// The figures of it. Rates and latencies count good replies only.
    #[expect(
        clippy::cast_precision_loss,
        reason = "counts of requests are far below 2^52"
    )]
    pub(crate) fn figures(&self) -> Figures {
        Figures {
            requests: self.whole.count(),
            errors: self.errors,
            first_error: self.first_error.as_ref().map(ToString::to_string),
            requests_per_second: self.whole.count() as f64 / self.took.as_secs_f64(),
            p50_ms: millis(self.whole.quantile(0.5)),
            p99_ms: millis(self.whole.quantile(0.99)),
            first_byte_p50_ms: millis(self.first_byte.quantile(0.5)),
            first_byte_p99_ms: millis(self.first_byte.quantile(0.99)),
        }
    }
}

fn millis(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}

/// One load in figures.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Figures {
    /// Good replies.
    pub(crate) requests: u64,
    /// Requests without one.
    pub(crate) errors: u64,
    /// What the first of those failed with.
    pub(crate) first_error: Option<String>,
    /// Good replies a second, over all connections.
    pub(crate) requests_per_second: f64,
    /// From the first byte sent to the last received, median.
    pub(crate) p50_ms: f64,
    /// The same, exceeded by one in a hundred.
    pub(crate) p99_ms: f64,
    /// From the first byte sent to the first of the reply's body, median.
    pub(crate) first_byte_p50_ms: f64,
    /// The same, exceeded by one in a hundred.
    pub(crate) first_byte_p99_ms: f64,
}

impl std::fmt::Display for Figures {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        writeln!(f, "requests    {}", self.requests)?;
        writeln!(f, "errors      {}", self.errors)?;
        writeln!(f, "req/s       {:.0}", self.requests_per_second)?;
        writeln!(
            f,
            "whole       p50 {:.3} ms, p99 {:.3} ms",
            self.p50_ms, self.p99_ms
        )?;
        write!(
            f,
            "first byte  p50 {:.3} ms, p99 {:.3} ms",
            self.first_byte_p50_ms, self.first_byte_p99_ms
        )
    }
}
