//! The process: listeners, background tasks, and how it ends.

use super::certificates::{Certificates, Shown};
use super::downstream::{Gateway, Open};
use crate::admin;
use crate::app::App;
use crate::config::Tls;
use async_trait::async_trait;
use pingora_core::apps::http_app::ServeHttp;
use pingora_core::listeners::tls::TlsSettings;
use pingora_core::protocols::http::ServerSession;
use pingora_core::server::configuration::{Opt, ServerConf};
use pingora_core::server::{
    ExecutionPhase, RunArgs, Server, ShutdownSignal, ShutdownSignalWatch, ShutdownWatch,
};
use pingora_core::services::background::{BackgroundService, background_service};
use pingora_core::services::listening::Service;
use std::net::{SocketAddr, TcpListener};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::Duration;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::broadcast::error::RecvError;
use tokio::time::{Instant, sleep};

/// Seconds that a new process waits for the sockets of the old one.
const HANDOVER: usize = 30;
/// How often a process that is to end looks whether it may.
const LOOK: Duration = Duration::from_millis(20);
/// Longest time from the last connection that a process accepts to the head of its request; after a hand-over.
const ARRIVING: Duration = Duration::from_secs(1);

/// Why the gateway cannot listen.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Unavailable {
    #[error("cannot listen on {address}: {source}")]
    Address {
        address: SocketAddr,
        source: std::io::Error,
    },
    #[error("cannot start: {0}")]
    System(std::io::Error),
    #[error("cannot speak TLS on {address} with {}: {why}", certificate.display())]
    Tls {
        address: SocketAddr,
        certificate: PathBuf,
        why: String,
    },
}

/// Runs the gateway until it is told to stop and has drained. With `upgrade` it waits for the listening sockets of one
/// that runs, which hands them over on SIGQUIT.
pub(crate) fn run(app: &Arc<App>, upgrade: bool) -> Result<(), Unavailable> {
    let config = app.config();
    let tls = config.tls.as_ref();
    let addresses = [config.listen, config.metrics_listen].into_iter();
    for address in addresses
        .chain(tls.map(|tls| tls.listen))
        .filter(|_| !upgrade)
    {
        // Pingora panics in a thread of its own when a port is taken; here it is one line instead
        drop(
            TcpListener::bind(address)
                .map_err(|source| Unavailable::Address { address, source })?,
        );
    }
    let conf = ServerConf {
        threads: config.threads,
        graceful_shutdown_timeout_seconds: Some(1),
        // after a hand-over, for what runs here; see `run_until_empty`
        grace_period_seconds: Some(config.drain.as_secs()),
        upgrade_sock: config.upgrade_socket.to_string_lossy().into_owned(),
        upgrade_sock_connect_accept_max_retries: Some(HANDOVER),
        ..ServerConf::default()
    };
    let opt = Opt {
        upgrade,
        ..Opt::default()
    };
    if upgrade {
        // from its first moment on it has to know what the old one knows
        let mut runtime = tokio::runtime::Builder::new_current_thread();
        let runtime = runtime.enable_all().build().map_err(Unavailable::System)?;
        runtime.block_on(app.fleet.look_before());
    }
    let mut server = Server::new_with_opt_and_conf(Some(opt), conf);
    server.bootstrap();

    let open = Open::default();
    let gateway = Gateway::new(app.serving.clone(), app.draining.clone(), open.clone());
    let mut gateway = Service::new("gateway".into(), gateway);
    gateway.add_tcp(&config.listen.to_string());
    if let Some(tls) = tls {
        gateway.add_tls_with_settings(
            &tls.listen.to_string(),
            None,
            settings(tls, &app.certificates)?,
        );
    }
    server.add_service(gateway);

    let mut admin = Service::new("admin".into(), Admin(app.clone()));
    admin.add_tcp(&config.metrics_listen.to_string());
    admin.threads = Some(1);
    server.add_service(admin);

    server.add_service(background_service("fleet", Background(app.clone())));
    tracing::info!(
        "API on http://{}, metrics on http://{}",
        config.listen,
        config.metrics_listen
    );
    drop(config);
    run_until_empty(server, app, open).map_err(Unavailable::System)
}

/// Runs the server to its end. After a hand-over it would wait for the whole of its grace period; here it is done with
/// as soon as nothing is open any more.
fn run_until_empty(server: Server, app: &Arc<App>, open: Open) -> std::io::Result<()> {
    let mut phases = server.watch_execution_phase();
    let stop = Stop {
        app: app.clone(),
        open: open.clone(),
    };
    let (says, hears) = mpsc::channel();
    let ended = says.clone();
    let run = move || {
        server.run(RunArgs {
            shutdown_signal: Box::new(stop),
        });
        let _ = ended.send(End::Come); // it may have come already
    };
    let watch = move || {
        loop {
            match phases.blocking_recv() {
                Ok(ExecutionPhase::ShutdownGracePeriod) => break,
                Ok(_) | Err(RecvError::Lagged(_)) => {}
                Err(RecvError::Closed) => return,
            }
        }
        let _ = says.send(End::Near);
    };
    let server = thread::Builder::new().name("server".into()).spawn(run)?;
    thread::Builder::new()
        .name("hand-over".into())
        .spawn(watch)?;
    let mut end = hears.recv().map_err(|_| RecvTimeoutError::Disconnected);
    if end == Ok(End::Near) {
        end = hears.recv_timeout(ARRIVING);
    }
    while end == Err(RecvTimeoutError::Timeout) && open.count() > 0 {
        end = hears.recv_timeout(LOOK);
    }
    if end == Err(RecvTimeoutError::Disconnected) {
        // both have gone without a word, which is a panic of the server's
        let Ok(()) = server.join().map_err(std::panic::resume_unwind);
    }
    Ok(())
}

/// How far the server is from its end.
#[derive(Debug, PartialEq, Eq)]
enum End {
    /// It takes nothing new any more.
    Near,
    Come,
}

/// What a TLS listener needs.
fn settings(tls: &Tls, certificates: &Arc<Certificates>) -> Result<TlsSettings, Unavailable> {
    let broken = |why: String| Unavailable::Tls {
        address: tls.listen,
        certificate: tls.certificate.clone(),
        why,
    };
    certificates.read(tls).map_err(&broken)?;
    let (certificate, key) = (tls.certificate.to_string_lossy(), tls.key.to_string_lossy());
    let mut settings =
        TlsSettings::intermediate(&certificate, &key).map_err(|error| broken(error.to_string()))?;
    settings.set_cert_resolver(Arc::new(Shown(certificates.clone())));
    settings.enable_h2();
    Ok(settings)
}

/// The second listener.
struct Admin(Arc<App>);

#[async_trait]
impl ServeHttp for Admin {
    async fn response(&self, session: &mut ServerSession) -> http::Response<Vec<u8>> {
        let head = session.req_header().as_owned_parts();
        let from = session.client_addr().and_then(|address| address.as_inet());
        let from = from.map(std::net::SocketAddr::ip);
        let mut body = Vec::new();
        while let Ok(Some(piece)) = session.read_request_body().await {
            body.extend_from_slice(&piece);
            if body.len() > admin::MAX_BODY {
                body.clear(); // nobody has so much to say here
                break;
            }
        }
        admin::respond(&self.0, &head, &body, from)
    }
}

/// Polls the fleet, runs the lifecycle and listens for reloads, on a thread of its own.
struct Background(Arc<App>);

#[async_trait]
impl BackgroundService for Background {
    async fn start(&self, _: ShutdownWatch) {
        // until the process ends: what is being answered needs it to the last
        self.0.run_background().await;
    }
}

/// SIGTERM and the first SIGINT drain: new requests are refused, running ones may end within the bound.
/// A second SIGINT does not wait. SIGQUIT hands the listening sockets to a process that waits for them.
struct Stop {
    app: Arc<App>,
    open: Open,
}

#[async_trait]
impl ShutdownSignalWatch for Stop {
    async fn recv(&self) -> ShutdownSignal {
        let mut terminate = watch(SignalKind::terminate());
        let mut interrupt = watch(SignalKind::interrupt());
        let mut quit = watch(SignalKind::quit());
        loop {
            tokio::select! {
                _ = terminate.recv() => break,
                _ = interrupt.recv() => break,
                () = self.app.stop.notified() => break,
                _ = quit.recv() => {}
            }
            let socket = &self.app.config().upgrade_socket;
            if socket.exists() {
                tracing::info!("handing the listening sockets over");
                return ShutdownSignal::GracefulUpgrade;
            }
            tracing::warn!(
                "SIGQUIT, but no `cortex serve --upgrade` waits at {}: going on",
                socket.display()
            );
        }
        self.app.draining.store(true, Ordering::Relaxed);
        let bound = self.app.config().drain;
        tracing::info!(
            in_flight = self.open.count(),
            "draining for at most {} s",
            bound.as_secs()
        );
        let deadline = Instant::now() + bound;
        while self.open.count() > 0 && Instant::now() < deadline {
            tokio::select! {
                () = sleep(LOOK) => {}
                _ = interrupt.recv() => break,
            }
        }
        ShutdownSignal::FastShutdown
    }
}

fn watch(kind: SignalKind) -> Signal {
    signal(kind).expect("a process may watch these signals")
}
