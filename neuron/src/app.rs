//! The daemon as a whole: builds the parts, listens, and stops in order.

use crate::api::{ApiMetrics, ApiState, Running, router};
use crate::config::Config;
use crate::devices;
use crate::residency::Residency;
use axum::serve::ListenerExt;
use prometheus::Registry;
use protocol::node::{LoadModel, ModelState};
use std::future::Future;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tokio::io::AsyncReadExt;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};

/// After the models have drained: for the last bytes to reach their readers.
const LAST_BYTES: Duration = Duration::from_secs(2);

/// A daemon that could not start or go on.
#[derive(Debug, thiserror::Error)]
pub enum AppError {
    /// The address cannot be listened on.
    #[error(
        "cannot listen on {address}: {source}; is another daemon there? `--listen` takes another address"
    )]
    Listen {
        /// The address.
        address: SocketAddr,
        /// Why.
        source: std::io::Error,
    },
    /// The system refused something else.
    #[error("{0}")]
    System(#[from] std::io::Error),
    /// The model of a quick start could not be loaded.
    #[error("{0}")]
    Model(String),
}

/// Serves until SIGTERM or Ctrl-C, then drains. With `quick_start`, a model that fails to load ends the daemon; with
/// `exit_with_stdin`, so does the end of standard input, drained like the signals.
///
/// # Errors
/// When it cannot start.
pub async fn serve(
    config: Config,
    quick_start: bool,
    exit_with_stdin: bool,
) -> Result<(), AppError> {
    let registry = Registry::new();
    devices::register(&registry);
    devices::log();
    let residency = Residency::new(&config, &registry);
    let stop = stop_signal(exit_with_stdin)?;
    let listener = TcpListener::bind(config.listen)
        .await
        .map_err(|source| AppError::Listen {
            address: config.listen,
            source,
        })?;
    // Written whatever the log filter: whoever started us with port 0 reads the port here.
    let address = listener.local_addr()?;
    eprintln!("listening on http://{address}");
    for model in &config.models {
        let wanted = LoadModel {
            id: model.id.clone(),
            source: model.source.clone(),
            context_length: model.context_length,
            quant: model.quant,
            tensor_parallel: model.tensor_parallel,
            devices: Vec::new(),
        };
        residency
            .load(wanted)
            .map_err(|error| AppError::Model(error.to_string()))?;
    }
    let failed = {
        let residency = residency.clone();
        async move {
            if !quick_start {
                std::future::pending::<()>().await;
            }
            failure_at_start(&residency).await
        }
    };
    let state = Arc::new(ApiState {
        name: config.name.clone(),
        residency: residency.clone(),
        limits: config.limits,
        running: Running::default(),
        at_start: config.models.iter().map(|model| model.id.clone()).collect(),
        stopping: AtomicBool::new(false),
        metrics: ApiMetrics::register(&registry),
        registry,
    });
    let joined = async {
        match &config.join {
            Some(gateway) => gateway.keep_joined(&config.name, address).await,
            None => std::future::pending().await,
        }
    };
    tokio::select! {
        () = joined => Ok(()),
        reason = failed => Err(AppError::Model(reason)),
        outcome = listen(listener, state, residency, stop) => Ok(outcome?),
    }
}

/// Waits for the reason why a model failed to load, for ever if none does.
async fn failure_at_start(residency: &Residency) -> String {
    let loading = |state| state == ModelState::Loading;
    residency
        .wait_until(|models| !models.iter().any(|model| loading(model.state)))
        .await;
    let failed = residency
        .statuses()
        .into_iter()
        .find_map(|model| model.reason);
    match failed {
        Some(reason) => reason,
        None => std::future::pending().await,
    }
}

/// Serves `listener` until `stop`; then takes no connection, lets running requests end, and frees the models.
async fn listen(
    listener: TcpListener,
    state: Arc<ApiState>,
    residency: Residency,
    stop: impl Future<Output = ()> + Send + 'static,
) -> std::io::Result<()> {
    let (stopping, mut is_stopping) = tokio::sync::watch::channel(false);
    let app = router(state.clone());
    // A token is a few bytes: they should leave when they are written.
    let listener = listener.tap_io(|stream| {
        if let Err(error) = stream.set_nodelay(true) {
            tracing::debug!(%error, "cannot set TCP_NODELAY");
        }
    });
    let server = axum::serve(listener, app)
        .with_graceful_shutdown(async move {
            stop.await;
            tracing::info!("stopping: running requests may finish");
            state.stopping.store(true, Ordering::Release);
            stopping.send_replace(true);
        })
        .into_future();
    let drained = async move {
        // The sender is gone only when the server is.
        let _ = is_stopping.wait_for(|stopping| *stopping).await;
        residency.close().await;
        tokio::time::sleep(LAST_BYTES).await;
    };
    tokio::select! {
        outcome = server => outcome,
        () = drained => Ok(()),
    }
}

/// SIGTERM, Ctrl-C, or the end of standard input.
fn stop_signal(
    exit_with_stdin: bool,
) -> std::io::Result<impl Future<Output = ()> + Send + 'static> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    Ok(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
            () = stdin_closed(), if exit_with_stdin => {}
        }
    })
}

/// Waits until nobody can write to standard input any more.
async fn stdin_closed() {
    let mut nothing = [0; 64];
    let mut stdin = tokio::io::stdin();
    while stdin.read(&mut nothing).await.is_ok_and(|count| count > 0) {}
}
