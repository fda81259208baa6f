//! `cortex up`: a neuron of one's own, a gateway in front of it, a model, and a word when all is ready.

use crate::app::{App, BuildError};
use crate::cli::UpArgs;
use crate::config::{Config, Fault};
use crate::pingora::client::{Client, ClientError, Outgoing};
use crate::pingora::server::{self, Unavailable};
use crate::status::endpoint;
use crate::telemetry;
use child::Neuron;
use filters::residency::{Leasing, Residency};
use futures::StreamExt;
use http::Method;
use protocol::ApiError;
use protocol::chat::ChatChunk;
use protocol::error::OpenAiError;
use protocol::sse::{Decoder, Event};
use serde_json::json;
use std::io::Write;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::Notify;
use tokio::time::{sleep, timeout};

mod child;

/// How long the neuron may take to be seen by the gateway.
const BOOT: Duration = Duration::from_secs(30);
/// The catalogue that names the default model, as seen from a checkout.
const CATALOGUE: &str = "conf/models.toml";

/// Why it did not come up.
#[derive(Debug, thiserror::Error)]
pub(crate) enum UpError {
    #[error("{}", .0.iter().map(ToString::to_string).collect::<Vec<_>>().join("\ncortex: "))]
    Config(Vec<Fault>),
    #[error("{CATALOGUE} is not here or names no default; give a model with --model DIR_OR_HUB_ID")]
    NoModel,
    #[error(transparent)]
    Child(#[from] child::ChildError),
    #[error(transparent)]
    Build(#[from] BuildError),
    #[error(transparent)]
    Listen(#[from] Unavailable),
    #[error("the neuron did not answer within {} s", BOOT.as_secs())]
    Silent,
    #[error("{0}")]
    Load(ApiError),
    #[error("{0}")]
    Ask(String),
    #[error("cannot start: {0}")]
    Runtime(#[from] std::io::Error),
}

impl From<ClientError> for UpError {
    fn from(error: ClientError) -> Self {
        Self::Ask(error.to_string())
    }
}

/// Runs until Ctrl-C, or until the one question has been answered.
pub(crate) fn run(args: UpArgs) -> Result<(), UpError> {
    telemetry::start(if args.ask.is_some() {
        "error"
    } else {
        "info,access=warn"
    });
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()?;
    let neuron = runtime.block_on(Neuron::start(args.ask.is_some()))?;
    let config = Config::local(
        args.listen,
        args.metrics_listen,
        neuron.address(),
        args.model.as_deref(),
        Path::new(CATALOGUE),
    )
    .map_err(UpError::Config)?;
    let model = config.default_model.clone().ok_or(UpError::NoModel)?;
    let app = App::build(config)?;
    let stop = Arc::new(Notify::new());
    let supervisor = runtime.spawn(neuron.supervise(stop.clone()));
    let companion = runtime.spawn(accompany(app.clone(), model, args.ask));
    server::run(&app, false)?;
    // the gateway has drained; now the neuron may go, and whoever accompanied has had their say
    companion.abort();
    let outcome = runtime.block_on(companion);
    stop.notify_one();
    let _ = runtime.block_on(supervisor); // it does not panic, and there is nobody left to tell
    match outcome {
        Ok(outcome) => outcome,
        Err(_) => Ok(()), // aborted: Ctrl-C came first
    }
}

/// Waits for the model, says so, asks the question if there is one, and stops the gateway when that is done.
async fn accompany(app: Arc<App>, model: Arc<str>, ask: Option<String>) -> Result<(), UpError> {
    let outcome = async {
        ready(&app, &model).await?;
        match &ask {
            Some(text) => question(&app, &model, text).await,
            None => {
                println!("{}", banner(&app, &model));
                std::future::pending().await
            }
        }
    };
    let outcome = outcome.await;
    app.stop.notify_one();
    outcome
}

async fn ready(app: &App, model: &Arc<str>) -> Result<(), UpError> {
    let seen = async {
        while !app.fleet.view().nodes.iter().any(|node| node.is_up()) {
            sleep(Duration::from_millis(20)).await;
        }
    };
    timeout(BOOT, seen).await.map_err(|_| UpError::Silent)?;
    match app.lifecycle.lease(model) {
        Leasing::Ready(_) => Ok(()),
        Leasing::Waiting(wait) => wait.await.map(drop).map_err(UpError::Load),
    }
}

async fn question(app: &App, model: &str, text: &str) -> Result<(), UpError> {
    let body =
        json!({"model": model, "stream": true, "messages": [{"role": "user", "content": text}]});
    let client = Client::new(Duration::from_secs(5), 1);
    let request = Outgoing {
        method: Method::POST,
        path: "/v1/chat/completions",
        headers: &[],
        body: body.to_string().into(),
    };
    let response = client
        .send(&endpoint(app.config().listen), &request)
        .await?;
    let status = response.status();
    let mut body = response.into_body();
    if !status.is_success() {
        let body = body.collect(1 << 20).await.unwrap_or_default();
        return Err(UpError::Ask(
            ApiError::from_upstream(status.as_u16(), &body, None).message,
        ));
    }
    let mut decoder = Decoder::new(1 << 20);
    let mut events = Vec::new();
    let mut out = std::io::stdout();
    while let Some(piece) = body.next().await {
        let piece = piece.map_err(|error| UpError::Ask(error.message))?;
        decoder
            .feed(&piece, &mut events)
            .map_err(|error| UpError::Ask(error.to_string()))?;
        for event in events.drain(..) {
            let Event::Message { data, .. } = event else {
                continue;
            };
            if let Ok(OpenAiError { error }) = serde_json::from_slice(&data) {
                return Err(UpError::Ask(error.message));
            }
            let chunk = serde_json::from_slice::<ChatChunk>(&data).ok();
            let delta = chunk
                .and_then(|chunk| chunk.choices.into_iter().next())
                .map(|choice| choice.delta);
            if let Some(text) = delta.and_then(|delta| delta.content) {
                out.write_all(text.as_bytes()).and_then(|()| out.flush())?;
            }
        }
    }
    println!();
    Ok(())
}

fn banner(app: &App, model: &str) -> String {
    let config = app.config();
    let (api, metrics) = (config.listen, config.metrics_listen);
    let chat = json!({"model": model, "messages": [{"role": "user", "content": "Hello!"}]});
    let messages = json!({"model": model, "max_tokens": 64, "stream": true, "messages": [{"role": "user", "content": "Hello!"}]});
    format!(
        "\ncortex is ready: {model} on http://{api} (metrics on http://{metrics}/metrics)\n\n\
         curl http://{api}/v1/models\n\
         curl http://{api}/v1/chat/completions -H 'content-type: application/json' -d '{chat}'\n\
         curl -N http://{api}/v1/messages -H 'content-type: application/json' -d '{messages}'\n\n\
         Ctrl-C stops both daemons."
    )
}
