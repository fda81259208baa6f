//! What a proxy holds in memory for streams on which nothing happens.

use crate::connection::{Ask, Connection};
use crate::machine::Machine;
use crate::mock::MODEL;
use crate::processes::{Memory, raise_open_files};
use crate::servers::{Proxy, ProxyArgs, Servers, Via};
use anyhow::Context as _;
use clap::Args;
use futures::{StreamExt as _, TryStreamExt as _};
use serde::Serialize;

/// Streams that are being opened at the same time.
const OPENING: usize = 32;

/// How many streams, through what.
#[derive(Debug, Clone, Args)]
pub(crate) struct IdleArgs {
    #[command(flatten)]
    proxies: ProxyArgs,
    /// Streams to hold open.
    #[arg(long, value_name = "N", default_value_t = 1000)]
    streams: u64,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Serialize)]
struct Held {
    via: Via,
    streams: u64,
    before: Memory,
    with: Memory,
}

#[derive(Debug, Serialize)]
struct IdleReport {
    machine: Machine,
    held: Vec<Held>,
}

/// Opens the streams through each proxy in turn, waits for the first event of each, and prints what the proxy holds.
///
/// # Errors
/// When a server does not start or a stream does not open.
pub(crate) async fn run(args: IdleArgs, threads: usize) -> anyhow::Result<()> {
    raise_open_files(2 * args.streams + 256)?;
    let machine = Machine::here();
    let servers = Servers::start(&args.proxies, 0, true, threads).await?;
    let mut held = Vec::new();
    for proxy in &servers.proxies {
        let via = proxy.via.as_str();
        held.push(hold(proxy, args.streams).await.context(via)?);
    }
    servers.stop().await?;
    let report = IdleReport { machine, held };
    if args.json {
        println!("{}", serde_json::to_string_pretty(&report)?);
    } else {
        print!("{report}");
    }
    Ok(())
}

async fn hold(proxy: &Proxy, streams: u64) -> anyhow::Result<Held> {
    let ask = Ask::chat(proxy.address, MODEL, true);
    let before = proxy.server.memory()?;
    let open: Vec<Connection> = futures::stream::iter(0..streams)
        .map(|_| async {
            let mut connection = Connection::open(ask.server).await?;
            connection.first_event(&ask).await.map(|()| connection)
        })
        .buffer_unordered(OPENING)
        .try_collect()
        .await?;
    let with = proxy.server.memory()?;
    drop(open); // not before the memory was read
    Ok(Held {
        via: proxy.via,
        streams,
        before,
        with,
    })
}

impl std::fmt::Display for IdleReport {
    #[expect(clippy::cast_precision_loss, reason = "KiB of a process")]
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let machine = &self.machine;
        writeln!(
            f,
            "{}, {} cores; {}.\n",
            machine.cpu, machine.cores, machine.date
        )?;
        writeln!(
            f,
            "| via | idle streams | VmRSS before MiB | VmRSS with MiB | VmHWM MiB | KiB a stream |"
        )?;
        writeln!(f, "|---|--:|--:|--:|--:|--:|")?;
        for held in &self.held {
            let grown = held.with.now_kib.saturating_sub(held.before.now_kib);
            writeln!(
                f,
                "| {} | {} | {:.1} | {:.1} | {:.1} | {:.1} |",
                held.via.as_str(),
                held.streams,
                held.before.now_kib as f64 / 1024.0,
                held.with.now_kib as f64 / 1024.0,
                held.with.peak_kib as f64 / 1024.0,
                grown as f64 / held.streams.max(1) as f64,
            )?;
        }
        Ok(())
    }
}
