//! `bench`: what the gateway costs, as a ratio measured in one run against a mock neuron.

mod connection;
mod gateway;
mod histogram;
mod http1;
mod idle;
mod load;
mod machine;
mod mock;
mod model;
mod peers;
mod processes;
mod servers;
mod soak;
mod streams;

use clap::{Parser, Subcommand};
use std::process::ExitCode;
use tokio::runtime::{Builder, Runtime};
use tokio::signal::unix::{SignalKind, signal};

/// What the gateway costs: a load generator, a mock neuron, and a report that compares.
#[derive(Debug, Parser)]
#[command(name = "bench", version)]
struct Cli {
    /// Threads of the load generator or the mock; a quarter of the cores, at most 4, when not given.
    #[arg(long, global = true, value_name = "N")]
    threads: Option<usize>,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Play a neuron that has the model `mock` and answers at next to no cost.
    Mock(mock::MockArgs),
    /// Send chat requests in a closed loop and print rate and latency.
    Load(load::LoadArgs),
    /// Measure direct, through nginx and through cortex, and print a table.
    Gateway(gateway::GatewayArgs),
    /// Hold idle streams through nginx and cortex and print what they take in memory.
    Idle(idle::IdleArgs),
    /// Run thousands of slow streams at once and print what they take and how even they are.
    Streams(streams::StreamsArgs),
    /// Measure servers of the same model beside each other.
    Peers(peers::PeersArgs),
    /// Wear a neuron out and look at what is left.
    Soak(soak::SoakArgs),
    /// Write a checkpoint of random numbers in the shape of a release.
    Model(model::ModelArgs),
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let threads = cli
        .threads
        .unwrap_or_else(|| machine::cores() / 4)
        .clamp(1, 4);
    match runtime(threads).and_then(|runtime| runtime.block_on(until_signal(cli.command, threads)))
    {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn runtime(threads: usize) -> anyhow::Result<Runtime> {
    let mut builder = match threads {
        1 => Builder::new_current_thread(),
        _ => Builder::new_multi_thread(),
    };
    Ok(builder.worker_threads(threads).enable_all().build()?)
}

/// A signal drops what runs, and so ends the servers it started.
async fn until_signal(command: Command, threads: usize) -> anyhow::Result<()> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    tokio::select! {
        result = run(command, threads) => result,
        _ = terminate.recv() => anyhow::bail!("ended by SIGTERM"),
        _ = interrupt.recv() => anyhow::bail!("ended by SIGINT"),
    }
}

async fn run(command: Command, threads: usize) -> anyhow::Result<()> {
    match command {
        Command::Mock(args) => mock::serve(args).await,
        Command::Load(args) => load::run(args).await,
        Command::Gateway(args) => gateway::run(args, threads).await,
        Command::Idle(args) => idle::run(args, threads).await,
        Command::Streams(args) => streams::run(args, threads).await,
        Command::Peers(args) => peers::run(args).await,
        Command::Soak(args) => soak::run(args).await,
        Command::Model(args) => model::write(&args),
    }
}
