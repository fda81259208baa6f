//! The report: what a request costs direct, through nginx and through cortex, in one run.

mod report;

use crate::connection::{Ask, Connection};
use crate::load::{Clients, Figures};
use crate::machine::Machine;
use crate::mock::{EVENTS, MODEL, WHOLE};
use crate::processes::{Server, raise_open_files};
use crate::servers::{ProxyArgs, Servers, Via};
use anyhow::{Context as _, ensure};
use clap::Args;
use protocol::chat::ChatChunk;
use protocol::sse::{Decoder, Event};
use report::Report;
use serde::Serialize;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

/// What to measure and how often.
#[derive(Debug, Clone, Args)]
pub(crate) struct GatewayArgs {
    #[command(flatten)]
    proxies: ProxyArgs,
    /// Requests for whole replies a run; streams are an eighth of it, concurrency 1 takes a quarter.
    #[arg(long, value_name = "N", default_value_t = 10_000)]
    requests: u64,
    /// How often everything is measured; the proxies take turns within each round.
    #[arg(long, value_name = "N", default_value_t = 9, value_parser = clap::value_parser!(u64).range(1..))]
    rounds: u64,
    /// Connections at a time.
    #[arg(long, value_name = "N,…", value_delimiter = ',', default_values_t = [1, 64, 512], value_parser = clap::value_parser!(u64).range(1..))]
    concurrency: Vec<u64>,
    /// Milliseconds between two events of a stream.
    #[arg(long, value_name = "MS", default_value_t = 0)]
    pace_ms: u64,
    /// Two rounds of a tenth of the requests: to see that it works.
    #[arg(long)]
    quick: bool,
    /// Write every measurement to a file as well.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// What is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Reply {
    Whole,
    Stream,
}

/// One run of one load.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Sample {
    round: u64,
    reply: Reply,
    concurrency: u64,
    via: Via,
    #[serde(flatten)]
    figures: Figures,
    /// CPU time of the proxy for one request in microseconds; none when direct.
    proxy_cpu_us: Option<f64>,
    /// The same of the mock.
    mock_cpu_us: f64,
}

/// Measures, prints the table as Markdown, and writes the file if one was asked for.
///
/// # Errors
/// When a server does not start, or a proxy does not hand on what the mock says. Failed requests under load are
/// counted in the table instead.
pub(crate) async fn run(args: GatewayArgs, threads: usize) -> anyhow::Result<()> {
    let machine = Machine::here();
    let most = args.concurrency.iter().max().copied().unwrap_or(1);
    raise_open_files(2 * most + 256)?;
    let servers = Servers::start(&args.proxies, args.pace_ms, false, threads).await?;
    let samples = Bench {
        rounds: if args.quick { 2 } else { args.rounds },
        requests: if args.quick {
            args.requests / 10
        } else {
            args.requests
        },
        concurrency: args.concurrency,
        servers: &servers,
    }
    .measure()
    .await?;
    let report = Report {
        machine,
        versions: servers
            .proxies
            .iter()
            .map(|proxy| proxy.version.clone())
            .collect(),
        pace_ms: args.pace_ms,
        generator_threads: threads,
        samples,
    };
    servers.stop().await?;
    if let Some(path) = &args.json {
        std::fs::write(path, serde_json::to_vec_pretty(&report)?)
            .with_context(|| format!("cannot write {}", path.display()))?;
    }
    println!("{report}");
    Ok(())
}

struct Bench<'a> {
    rounds: u64,
    requests: u64,
    concurrency: Vec<u64>,
    servers: &'a Servers,
}

/// One way to the mock.
#[derive(Clone, Copy)]
struct Way<'a> {
    via: Via,
    address: SocketAddr,
    proxy: Option<&'a Server>,
}

impl Bench<'_> {
    async fn measure(&self) -> anyhow::Result<Vec<Sample>> {
        let mut ways = self.ways();
        for way in &ways {
            verify(way.address)
                .await
                .with_context(|| format!("the replies by way of {}", way.via.as_str()))?;
        }
        let mut samples = Vec::new();
        for round in 0..self.rounds {
            for reply in [Reply::Whole, Reply::Stream] {
                for &concurrency in &self.concurrency {
                    for way in &ways {
                        samples.push(self.sample(round, reply, concurrency, *way).await?);
                    }
                }
            }
            eprintln!("round {} of {} done", round + 1, self.rounds);
            ways.rotate_left(1); // nobody is always measured after the same neighbour
        }
        Ok(samples)
    }

    fn ways(&self) -> Vec<Way<'_>> {
        let direct = Way {
            via: Via::Direct,
            address: self.servers.mock_address,
            proxy: None,
        };
        let proxied = self.servers.proxies.iter().map(|proxy| Way {
            via: proxy.via,
            address: proxy.address,
            proxy: Some(&proxy.server),
        });
        std::iter::once(direct).chain(proxied).collect()
    }

    async fn sample(
        &self,
        round: u64,
        reply: Reply,
        concurrency: u64,
        way: Way<'_>,
    ) -> anyhow::Result<Sample> {
        let requests = self.requests_of(reply, concurrency);
        let ask = Ask::chat(way.address, MODEL, reply == Reply::Stream);
        let mut clients = Clients::connect(ask, usize::try_from(concurrency)?).await?;
        // Connections on both sides of the proxy are opened before anything is counted.
        clients.run((requests / 10).max(2 * concurrency)).await;
        let before = self.cpu(way)?;
        let figures = clients.run(requests).await.figures();
        let after = self.cpu(way)?;
        Ok(Sample {
            round,
            reply,
            concurrency,
            via: way.via,
            figures,
            proxy_cpu_us: after
                .proxy
                .zip(before.proxy)
                .map(|(after, before)| micros_each(after - before, requests)),
            mock_cpu_us: micros_each(after.mock - before.mock, requests),
        })
    }

    fn requests_of(&self, reply: Reply, concurrency: u64) -> u64 {
        let requests = match reply {
            Reply::Whole => self.requests,
            Reply::Stream => self.requests / 8,
        };
        let requests = if concurrency == 1 {
            requests / 4
        } else {
            requests
        };
        requests.max(concurrency)
    }

    fn cpu(&self, way: Way<'_>) -> anyhow::Result<CpuTimes> {
        Ok(CpuTimes {
            proxy: way.proxy.map(Server::cpu).transpose()?,
            mock: self.servers.mock.cpu()?,
        })
    }
}

struct CpuTimes {
    proxy: Option<Duration>,
    mock: Duration,
}

#[expect(
    clippy::cast_precision_loss,
    reason = "counts of requests are far below 2^52"
)]
fn micros_each(time: Duration, requests: u64) -> f64 {
    time.as_secs_f64() * 1e6 / requests as f64
}

/// One whole reply and one stream, read to the last field: a proxy that drops events is not fast.
async fn verify(address: SocketAddr) -> anyhow::Result<()> {
    let mut connection = Connection::open(address).await?;
    let mut body = Vec::new();
    connection
        .exchange(&Ask::chat(address, MODEL, false), |piece| {
            body.extend_from_slice(piece);
        })
        .await?;
    ensure!(
        body.len() == WHOLE,
        "the whole reply has {} bytes, not {WHOLE}",
        body.len()
    );
    let (mut events, mut decoder) = (Vec::new(), Decoder::new(1 << 16));
    let mut fed = Ok(());
    connection
        .exchange(&Ask::chat(address, MODEL, true), |piece| {
            if fed.is_ok() {
                fed = decoder.feed(piece, &mut events);
            }
        })
        .await?;
    fed?;
    let deltas = events.iter().filter(|event| is_content(event)).count();
    ensure!(
        deltas == EVENTS,
        "the stream has {deltas} pieces of text, not {EVENTS}"
    );
    Ok(())
}

fn is_content(event: &Event) -> bool {
    let Event::Message { data, .. } = event else {
        return false;
    };
    serde_json::from_slice::<ChatChunk>(data)
        .ok()
        .and_then(|chunk| chunk.choices.into_iter().next())
        .is_some_and(|choice| choice.delta.content.is_some())
}
