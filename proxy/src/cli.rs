//! The command line.

use clap::{Args, Parser, Subcommand};
use std::net::SocketAddr;
use std::path::PathBuf;

/// cortex: one OpenAI and Anthropic surface over a fleet of neurons.
#[derive(Debug, Parser)]
#[command(name = "cortex", version)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Serve as the configuration says.
    Serve(ServeArgs),
    /// Check a configuration and say what is wrong with it, one line a fault.
    Check(File),
    /// Say where each model of the catalogue would be loaded if it were asked for now, and why. Nothing is loaded.
    Plan(File),
    /// Show nodes, devices, memory, models and requests in flight of a running gateway.
    Status(StatusArgs),
    /// Start a local neuron and a gateway in front of it, load a model and wait until both are ready.
    Up(UpArgs),
}

#[derive(Debug, Args)]
pub(crate) struct File {
    /// The configuration file; without one, the defaults on loopback.
    #[arg(long, value_name = "FILE")]
    pub(crate) config: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub(crate) struct ServeArgs {
    #[command(flatten)]
    pub(crate) file: File,
    /// Take the listening sockets over from a gateway that runs: start this one, then send SIGQUIT to that one.
    #[arg(long)]
    pub(crate) upgrade: bool,
}

#[derive(Debug, Args)]
pub(crate) struct StatusArgs {
    /// The gateway's metrics listener.
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:31314")]
    pub(crate) address: SocketAddr,
    /// Print JSON.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct UpArgs {
    /// A model folder, a GGUF file or a hub id; without one, the default of conf/models.toml.
    #[arg(long, value_name = "DIR_OR_HUB_ID")]
    pub(crate) model: Option<String>,
    /// Send one prompt, print the answer as it comes, and stop.
    #[arg(long, value_name = "TEXT")]
    pub(crate) ask: Option<String>,
    /// Where the gateway listens.
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:31313")]
    pub(crate) listen: SocketAddr,
    /// Where its metrics are.
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:31314")]
    pub(crate) metrics_listen: SocketAddr,
}
