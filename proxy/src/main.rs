//! cortex: the gateway. Flags, then configuration, then the app; the rest is in the modules.

mod admin;
mod app;
mod catalogue;
mod cli;
mod config;
mod fleet;
mod lifecycle;
mod pingora;
mod responses;
mod stack;
mod status;
mod telemetry;
mod up;

use clap::Parser;
use cli::{Cli, Command};
use config::Config;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;

/// Requests come and go in buffers of 64 KiB, at which size the system's allocator tidies up on every release.
/// Without huge pages (`no_thp`): with them a waiting stream keeps all of its buffers in memory, not only what it has written to.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// A fault of the configuration, as sysexits.h has it.
const USAGE: u8 = 64;

fn main() -> ExitCode {
    match Cli::parse().command {
        Command::Serve(args) => serve(args.file.config.as_deref(), args.upgrade),
        Command::Check(file) => match read(file.config.as_deref()) {
            Ok(config) => {
                println!(
                    "fine: {} nodes, {} models",
                    config.neurons.len(),
                    config.models.len()
                );
                ExitCode::SUCCESS
            }
            Err(code) => code,
        },
        Command::Plan(file) => match read(file.config.as_deref()) {
            Ok(config) => report(plan(&Arc::new(config))),
            Err(code) => code,
        },
        Command::Status(args) => report(status::run(&args)),
        Command::Up(args) => report(up::run(args)),
    }
}

fn serve(file: Option<&Path>, upgrade: bool) -> ExitCode {
    match read(file) {
        Ok(config) => {
            telemetry::start("info");
            match app::App::build(config) {
                Ok(app) => report(pingora::server::run(&app, upgrade)),
                Err(error) => report(Err(error)),
            }
        }
        Err(code) => code,
    }
}

/// Asks the nodes once and prints what would be placed where.
fn plan(config: &Arc<Config>) -> std::io::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let fleet = fleet::Fleet::once(config);
    runtime.block_on(fleet.look_before());
    print!("{}", lifecycle::plan::plan(config, &fleet.view()));
    Ok(())
}

/// The configuration, or its faults on standard error, one line each.
fn read(file: Option<&Path>) -> Result<Config, ExitCode> {
    Config::read(file).map_err(|faults| {
        for fault in faults {
            eprintln!("cortex: {fault}");
        }
        ExitCode::from(USAGE)
    })
}

fn report<E: std::fmt::Display>(result: Result<(), E>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("cortex: {error}");
            ExitCode::FAILURE
        }
    }
}
