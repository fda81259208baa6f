//! The daemon's entry: arguments → configuration → app → exit code.

use clap::Parser;
use neuron::app;
use neuron::cli::{Cli, Command, ServeArgs};
use neuron::config::{self, Config, ConfigError};
use neuron::{bench, kernels, selftest, telemetry, verify};
use serde::Serialize;
use std::fmt::Display;
use std::process::ExitCode;

/// glibc gives the memory of a step's tensors back to the system and takes it anew, page by page, in the next step.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// The configuration cannot be used: EX_USAGE of sysexits.
const BAD_CONFIG: u8 = 64;

fn main() -> ExitCode {
    kernels::keep_freed_memory();
    let cli = Cli::parse();
    match cli.command {
        Some(Command::Check { config }) => match Config::load(&config) {
            Ok(_) => {
                println!("{}: valid", config.display());
                ExitCode::SUCCESS
            }
            Err(error) => refuse(&error),
        },
        Some(Command::Verify(args)) => match verify::run(&args) {
            Ok(report) => {
                println!("{report}");
                if report.passed() {
                    ExitCode::SUCCESS
                } else {
                    ExitCode::FAILURE
                }
            }
            Err(error) => fail(&error.to_string()),
        },
        Some(Command::Bench(args)) => match bench::run(&args) {
            Ok(report) => print(&report, args.json, true),
            Err(error) => fail(&error.to_string()),
        },
        Some(Command::Selftest(args)) => match selftest::run(&args) {
            Ok(report) => print(&report, args.json, report.passed()),
            Err(error) => fail(&error.to_string()),
        },
        None => match cli.serve.config() {
            Ok(config) => serve(config, &cli.serve),
            Err(error) => refuse(&error),
        },
    }
}

fn serve(config: Config, args: &ServeArgs) -> ExitCode {
    telemetry::init(config.log, &config::log_filter());
    let runtime = match tokio::runtime::Runtime::new() {
        Ok(runtime) => runtime,
        Err(error) => return fail(&error.to_string()),
    };
    let outcome = runtime.block_on(app::serve(
        config,
        args.is_quick_start(),
        args.exit_with_stdin,
    ));
    // A model that is still being read cannot be interrupted, and its memory goes with the process.
    runtime.shutdown_background();
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => fail(&error.to_string()),
    }
}

/// Prints a report, as JSON or as it reads.
fn print<R: Serialize + Display>(report: &R, json: bool, passed: bool) -> ExitCode {
    if json {
        match serde_json::to_string_pretty(report) {
            Ok(text) => println!("{text}"),
            Err(error) => return fail(&error.to_string()),
        }
    } else {
        println!("{report}");
    }
    if passed {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

fn refuse(error: &ConfigError) -> ExitCode {
    eprintln!("{error}");
    ExitCode::from(BAD_CONFIG)
}

fn fail(message: &str) -> ExitCode {
    eprintln!("neuron: {message}");
    ExitCode::FAILURE
}
