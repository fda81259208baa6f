//! Very many streams at once: what a proxy holds in memory for one, and whether each gets what is its own in time.

use crate::connection::{Ask, Connection, Failure};
use crate::histogram::Histogram;
use crate::machine::Machine;
use crate::mock::MODEL;
use crate::processes::{Memory, raise_open_files};
use crate::servers::{Proxy, ProxyArgs, Servers, Via};
use anyhow::{Context as _, ensure};
use clap::Args;
use serde::Serialize;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

/// Streams that are being opened at the same time.
const OPENING: usize = 64;

/// How many streams, how slow, through what.
#[derive(Debug, Clone, Args)]
pub(crate) struct StreamsArgs {
    #[command(flatten)]
    proxies: ProxyArgs,
    /// Streams that run at the same time.
    #[arg(long, value_name = "N", default_value_t = 5000)]
    streams: usize,
    /// Milliseconds between two events of a stream. A stream has about 100 of them, and all have to be open before the
    /// first has ended.
    #[arg(long, value_name = "MS", default_value_t = 500)]
    pace_ms: u64,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Serialize)]
struct Ran {
    via: Via,
    streams: usize,
    /// Streams that were open at the same time.
    at_once: usize,
    before: Memory,
    after: Memory,
    /// CPU time that the proxy used for all of them, in seconds.
    cpu_seconds: f64,
    took_seconds: f64,
    /// Between two pieces of a stream, the longest of each stream: median over the streams, 99th percentile, largest.
    gaps_ms: [f64; 3],
    /// From the first piece of a stream to its last: the quickest and the slowest.
    lasted_seconds: [f64; 2],
}

#[derive(Debug, Serialize)]
struct StreamsReport {
    machine: Machine,
    pace_ms: u64,
    ran: Vec<Ran>,
}

/// Runs the streams through each proxy in turn, whole, and prints what that took and how even it was.
///
/// # Errors
/// When a server does not start, a stream breaks or is not the same as the others, or not all ran at the same time.
pub(crate) async fn run(args: StreamsArgs, threads: usize) -> anyhow::Result<()> {
    raise_open_files(2 * args.streams as u64 + 256)?;
    let machine = Machine::here();
    let servers = Servers::start(&args.proxies, args.pace_ms, false, threads).await?;
    let mut ran = Vec::new();
    for proxy in &servers.proxies {
        let via = proxy.via.as_str();
        ran.push(through(proxy, args.streams).await.context(via)?);
    }
    servers.stop().await?;
    let report = StreamsReport {
        machine,
        pace_ms: args.pace_ms,
        ran,
    };
    if args.json {
        println!("{}", serde_json::to_string_pretty(&report)?);
    } else {
        print!("{report}");
    }
    Ok(())
}

/// One stream as its client saw it.
struct Seen {
    bytes: usize,
    longest_gap: Duration,
    lasted: Duration,
}

async fn through(proxy: &Proxy, streams: usize) -> anyhow::Result<Ran> {
    let ask = Arc::new(Ask::chat(proxy.address, MODEL, true));
    let opening = Arc::new(Semaphore::new(OPENING));
    let (open, at_once) = <(Arc<AtomicUsize>, Arc<AtomicUsize>)>::default();
    let (before, cpu) = (proxy.server.memory()?, proxy.server.cpu()?);
    let begun = Instant::now();
    let mut running = JoinSet::new();
    for _ in 0..streams {
        let (ask, opening) = (Arc::clone(&ask), Arc::clone(&opening));
        let (open, at_once) = (Arc::clone(&open), Arc::clone(&at_once));
        running.spawn(async move {
            let mut permit = Some(opening.acquire_owned().await.expect("it is never closed"));
            let mut connection = Connection::open(ask.server).await?;
            let (mut first, mut last) = (None, Instant::now());
            let (mut bytes, mut longest_gap) = (0, Duration::ZERO);
            connection
                .exchange(&ask, |piece| {
                    let now = Instant::now();
                    if permit.take().is_some() {
                        first = Some(now);
                        at_once
                            .fetch_max(open.fetch_add(1, Ordering::Relaxed) + 1, Ordering::Relaxed);
                    } else {
                        longest_gap = longest_gap.max(now - last);
                    }
                    last = now;
                    bytes += piece.len();
                })
                .await?;
            open.fetch_sub(1, Ordering::Relaxed);
            Ok::<_, Failure>(Seen {
                bytes,
                longest_gap,
                lasted: last - first.unwrap_or(last),
            })
        });
    }
    let mut all = Vec::with_capacity(streams);
    while let Some(ended) = running.join_next().await {
        let ended = ended.expect("a client does not panic");
        all.push(ended.with_context(|| format!("after {} whole streams", all.len()))?);
    }
    let took = begun.elapsed();
    let at_once = at_once.load(Ordering::Relaxed);
    ensure!(
        at_once == streams,
        "only {at_once} of {streams} streams were open at once: they have to be slower"
    );
    let other = all.iter().position(|seen| seen.bytes != all[0].bytes);
    ensure!(other.is_none(), "a stream has other bytes than the first");
    let mut gaps = Histogram::default();
    all.iter().for_each(|seen| gaps.record(seen.longest_gap));
    let lasted = all.iter().map(|seen| seen.lasted);
    let ends = [lasted.clone().min(), lasted.max()];
    Ok(Ran {
        via: proxy.via,
        streams,
        at_once,
        before,
        after: proxy.server.memory()?,
        cpu_seconds: (proxy.server.cpu()? - cpu).as_secs_f64(),
        took_seconds: took.as_secs_f64(),
        gaps_ms: [0.5, 0.99, 1.0].map(|q| gaps.quantile(q).as_secs_f64() * 1e3),
        lasted_seconds: ends.map(|end| end.unwrap_or_default().as_secs_f64()),
    })
}

impl std::fmt::Display for StreamsReport {
    #[expect(clippy::cast_precision_loss, reason = "KiB of a process")]
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Machine {
            cpu, cores, date, ..
        } = &self.machine;
        let pace = self.pace_ms;
        writeln!(
            f,
            "{cpu}, {cores} cores; {date}; an event every {pace} ms.\n"
        )?;
        writeln!(
            f,
            "| via | streams at once | before MiB | peak MiB | KiB a stream | longest gap of a stream, ms: p50 | p99 | \
             largest | quickest stream s | slowest s | CPU s |"
        )?;
        writeln!(f, "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|")?;
        for ran in &self.ran {
            let grown = ran.after.peak_kib.saturating_sub(ran.before.now_kib);
            let [half, most, largest] = ran.gaps_ms;
            let [quickest, slowest] = ran.lasted_seconds;
            writeln!(
                f,
                "| {} | {} | {:.1} | {:.1} | {:.1} | {half:.0} | {most:.0} | {largest:.0} | {quickest:.1} | {slowest:.1} | {:.1} |",
                ran.via.as_str(),
                ran.at_once,
                ran.before.now_kib as f64 / 1024.0,
                ran.after.peak_kib as f64 / 1024.0,
                grown as f64 / ran.streams.max(1) as f64,
                ran.cpu_seconds,
            )?;
        }
        Ok(())
    }
}
