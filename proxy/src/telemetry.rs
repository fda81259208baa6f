//! Log lines on standard error.

use std::io::IsTerminal;
use tracing_subscriber::EnvFilter;

/// Sends events to standard error: `info` and above, unless the environment variable `CORTEX_LOG` says otherwise.
pub(crate) fn start(default: &str) {
    let filter = crate::config::log_filter().unwrap_or_else(|| default.into());
    let filter = EnvFilter::try_new(&filter).unwrap_or_else(|error| {
        eprintln!("cortex: CORTEX_LOG is ignored: {error}");
        EnvFilter::new(default)
    });
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .init();
}
