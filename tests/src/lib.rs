//! What the black-box tests share: the two daemons as child processes, a scripted node, golden folders.

#![allow(clippy::unwrap_used, missing_docs)] // test code: a broken expectation is a failed test

pub mod daemon;
pub mod endings;
pub mod fake_node;
pub mod golden;

use std::future::Future;
use std::time::Duration;
use tokio::time::{interval, timeout};

/// Long enough for any machine; only a broken test waits it out.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// Waits until `check` gives something.
///
/// # Panics
/// When it does not within [`PATIENCE`]; `what` says what was waited for.
pub async fn until<T, F: Future<Output = Option<T>>>(
    what: &str,
    mut check: impl FnMut() -> F,
) -> T {
    let mut tick = interval(Duration::from_millis(10));
    let found = async {
        loop {
            tick.tick().await;
            if let Some(found) = check().await {
                return found;
            }
        }
    };
    timeout(PATIENCE, found)
        .await
        .unwrap_or_else(|_| panic!("waited in vain: {what}"))
}
