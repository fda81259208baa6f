//! A scripted neuron: speaks the fleet protocol and answers requests as it was told.

use crate::until;
use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::{DefaultBodyLimit, State};
use axum::http::{HeaderMap, StatusCode, Uri};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use futures::StreamExt;
use protocol::node::{
    DeviceInfo, LoadModel, ModelState, ModelStatus, NodeInfo, NodeModels, UnloadModel,
};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::net::{SocketAddr, TcpListener};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::runtime::{Builder, Runtime};
use tokio::sync::Notify;

/// How the node answers a request.
#[derive(Clone)]
pub enum Script {
    /// A whole answer that says which node gave it.
    Answer,
    /// This status and body.
    Refuse(u16, Value),
    /// A stream of these events, ended properly.
    Stream(Vec<String>),
    /// These events, and at the next [`FakeNode::step`] the connection is cut.
    Tear(Vec<String>),
    /// These events, and then silence until the client goes.
    Hang(Vec<String>),
    /// Events that wait for [`FakeNode::step`], one step an event.
    Stepped(Vec<String>),
    /// No answer at all until the client goes.
    Silent,
    /// What no node should say, with status 200.
    Nonsense(String),
    /// So many at a time, each taking so long; more are refused with 429.
    Limited(usize, Duration),
    /// So many at a time, each until the next [`FakeNode::step`]; more are refused with 429.
    Places(usize),
}

/// How it loads models.
#[derive(Clone, Default)]
pub enum Loading {
    /// At once.
    #[default]
    Prompt,
    /// When [`FakeNode::release`] is called.
    Held,
    /// Never, for this reason.
    Fails(String),
}

/// How it answers a gateway that asks about the node itself and its models.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Manner {
    Honest,
    /// With more memory than there is.
    Boasting(u64),
    /// With what no node should say.
    Babbling,
    /// Not at all, until the gateway goes.
    Mute,
}

/// A request as the node saw it.
#[derive(Clone, Debug)]
pub struct Seen {
    pub path: String,
    pub headers: HeaderMap,
    pub body: Value,
}

struct Shared {
    name: String,
    total: u64,
    models: BTreeMap<String, ModelStatus>,
    sizes: BTreeMap<String, u64>,
    /// What `authorization` has to be to see the models.
    key: Option<Vec<u8>>,
    script: Script,
    loading: Loading,
    /// How it answers what is asked about itself.
    manner: Manner,
    seen: Vec<Seen>,
    /// Calls that change models, in order: `load a`, `unload a`.
    changes: Vec<String>,
    /// Answers that were dropped before their end.
    left: usize,
    /// Answers being given.
    open: usize,
}

/// A scripted neuron on loopback.
pub struct FakeNode {
    pub address: SocketAddr,
    shared: Arc<Mutex<Shared>>,
    step: Arc<Notify>,
    /// Its own, so that dropping the node cuts its connections as well.
    runtime: Option<Runtime>,
}

type Node = (Arc<Mutex<Shared>>, Arc<Notify>);

impl FakeNode {
    /// A node with 1000 bytes of memory that answers every request.
    pub async fn start(name: &str) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        Self::on(listener, name)
    }

    /// The same at a given address, as when a node comes back.
    pub async fn start_at(name: &str, address: SocketAddr) -> Self {
        Self::on(TcpListener::bind(address).unwrap(), name)
    }

    fn on(listener: TcpListener, name: &str) -> Self {
        let shared = Arc::new(Mutex::new(Shared {
            name: name.into(),
            total: 1000,
            models: BTreeMap::new(),
            sizes: BTreeMap::new(),
            key: None,
            script: Script::Answer,
            loading: Loading::Prompt,
            manner: Manner::Honest,
            seen: Vec::new(),
            changes: Vec::new(),
            left: 0,
            open: 0,
        }));
        let step = Arc::new(Notify::new());
        let router = Router::new()
            .route("/discovery", get(discovery))
            .route("/models", get(models))
            .route("/models/load", post(load))
            .route("/models/unload", post(unload))
            .layer(from_fn_with_state(shared.clone(), manners))
            .route("/v1/models", get(cards))
            .route("/v1/chat/completions", post(exchange))
            .route("/v1/completions", post(exchange))
            .route("/tokenize", post(tokenize))
            .layer(DefaultBodyLimit::disable())
            .with_state((shared.clone(), step.clone()));
        let address = listener.local_addr().unwrap();
        let runtime = Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap();
        listener.set_nonblocking(true).unwrap();
        runtime.spawn(async move {
            let listener = tokio::net::TcpListener::from_std(listener).unwrap();
            axum::serve(listener, router).await.unwrap();
        });
        Self {
            address,
            shared,
            step,
            runtime: Some(runtime),
        }
    }

    fn with<T>(&self, look: impl FnOnce(&mut Shared) -> T) -> T {
        look(&mut self.shared.lock().unwrap())
    }

    /// Has `model` loaded, taking `bytes`.
    #[must_use]
    pub fn holding(self, model: &str, bytes: u64) -> Self {
        self.with(|shared| {
            shared
                .models
                .insert(model.into(), status(model, ModelState::Loaded, bytes));
        });
        self
    }

    /// Says how large a model will be once it is loaded.
    #[must_use]
    pub fn sized(self, model: &str, bytes: u64) -> Self {
        self.with(|shared| shared.sizes.insert(model.into(), bytes));
        self
    }

    /// Wants to be told this as its key.
    #[must_use]
    pub fn locked(self, key: &str) -> Self {
        self.with(|shared| shared.key = Some(format!("Bearer {key}").into_bytes()));
        self
    }

    /// Forgets a model, as if somebody else had unloaded it.
    pub fn forget(&self, model: &str) {
        self.with(|shared| shared.models.remove(model));
    }

    /// From now on requests are answered like this.
    pub fn script(&self, script: Script) {
        self.with(|shared| shared.script = script);
    }

    /// From now on models are loaded like this.
    pub fn loading(&self, loading: Loading) {
        self.with(|shared| shared.loading = loading);
    }

    /// From now on it speaks like this about itself.
    pub fn manner(&self, manner: Manner) {
        self.with(|shared| shared.manner = manner);
    }

    /// Ends the loads that were held.
    pub fn release(&self) {
        self.with(|shared| {
            shared.loading = Loading::Prompt;
            for model in shared.models.values_mut() {
                model.state = ModelState::Loaded;
            }
        });
    }

    /// Lets stepped streams go on by one event.
    pub fn step(&self) {
        self.step.notify_waiters();
    }

    pub fn seen(&self) -> Vec<Seen> {
        self.with(|shared| shared.seen.clone())
    }

    pub fn changes(&self) -> Vec<String> {
        self.with(|shared| shared.changes.clone())
    }

    pub fn open(&self) -> usize {
        self.with(|shared| shared.open)
    }

    /// Waits until `count` requests have come.
    pub async fn asked(&self, count: usize) {
        until("requests at the node", || async {
            (self.seen().len() >= count).then_some(())
        })
        .await;
    }

    /// Waits until `count` answers have been dropped before their end.
    pub async fn left(&self, count: usize) {
        until("the client leaves", || async {
            (self.with(|shared| shared.left) >= count).then_some(())
        })
        .await;
    }
}

impl Drop for FakeNode {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

fn status(id: &str, state: ModelState, bytes: u64) -> ModelStatus {
    ModelStatus {
        id: id.into(),
        state,
        progress: 1.0,
        reason: None,
        source: format!("/models/{id}"),
        devices: vec!["cpu".into()],
        ranks: Vec::new(),
        memory_bytes: bytes,
        context_length: 4096,
        capabilities: vec!["chat".into(), "completions".into()],
        in_flight: 0,
        since: 1,
    }
}

/// Stands before all that a node says of itself.
async fn manners(
    State(shared): State<Arc<Mutex<Shared>>>,
    request: axum::extract::Request,
    next: Next,
) -> Response {
    let manner = shared.lock().unwrap().manner;
    match manner {
        Manner::Honest | Manner::Boasting(_) => next.run(request).await,
        Manner::Babbling => "<html>".into_response(),
        Manner::Mute => std::future::pending().await,
    }
}

async fn discovery(State((shared, _)): State<Node>) -> Response {
    let shared = shared.lock().unwrap();
    let used: u64 = shared.models.values().map(|model| model.memory_bytes).sum();
    let total = match shared.manner {
        Manner::Boasting(total) => total,
        _ => shared.total,
    };
    let info = NodeInfo {
        host: shared.name.clone(),
        version: "fake".into(),
        devices: vec![DeviceInfo {
            id: "cpu".into(),
            name: "scripted".into(),
            total_bytes: total,
            free_bytes: total.saturating_sub(used),
            many_ranks: true,
        }],
        features: vec!["cpu".into()],
        cuda: None,
    };
    axum::Json(info).into_response()
}

async fn models(State((shared, _)): State<Node>) -> Response {
    let models = shared.lock().unwrap().models.values().cloned().collect();
    axum::Json(NodeModels { models }).into_response()
}

/// OpenAI's list, for gateways to which this is some server; only those that know the key get it.
async fn cards(State((shared, _)): State<Node>, headers: HeaderMap) -> Response {
    let shared = shared.lock().unwrap();
    let known = headers
        .get("authorization")
        .map(|value| value.as_bytes().to_vec());
    if shared.key.is_some() && known != shared.key {
        return StatusCode::UNAUTHORIZED.into_response();
    }
    let cards = shared
        .models
        .keys()
        .map(|id| json!({"id": id, "object": "model"}));
    axum::Json(json!({"object": "list", "data": cards.collect::<Vec<_>>()})).into_response()
}

async fn load(State((shared, _)): State<Node>, body: Bytes) -> Response {
    let load: LoadModel = serde_json::from_slice(&body).unwrap();
    let mut shared = shared.lock().unwrap();
    let ranks = match load.ranks() {
        1 => String::new(),
        ranks => format!(" on {ranks} ranks"),
    };
    shared.changes.push(format!("load {}{ranks}", load.id));
    let bytes = shared.sizes.get(&load.id).copied().unwrap_or(100);
    let mut model = status(&load.id, ModelState::Loaded, bytes);
    let used: u64 = shared.models.values().map(|model| model.memory_bytes).sum();
    let lacks = used + bytes > shared.total; // whatever it says
    match &shared.loading {
        Loading::Prompt if lacks => {
            (model.state, model.memory_bytes) = (ModelState::Failed, 0);
            model.reason = Some("out of memory".into());
        }
        Loading::Prompt => {}
        Loading::Held => (model.state, model.progress) = (ModelState::Loading, 0.42),
        Loading::Fails(reason) => {
            (model.state, model.memory_bytes) = (ModelState::Failed, 0);
            model.reason = Some(reason.clone());
        }
    }
    shared.models.insert(load.id, model.clone());
    (StatusCode::ACCEPTED, axum::Json(model)).into_response()
}

async fn unload(State((shared, _)): State<Node>, body: Bytes) -> Response {
    let unload: UnloadModel = serde_json::from_slice(&body).unwrap();
    let mut shared = shared.lock().unwrap();
    shared.changes.push(format!("unload {}", unload.id));
    match shared.models.remove(&unload.id) {
        Some(model) => axum::Json(model).into_response(),
        None => StatusCode::NOT_FOUND.into_response(),
    }
}

async fn exchange(
    State((shared, step)): State<Node>,
    uri: Uri,
    headers: HeaderMap,
    body: Bytes,
) -> Response {
    let body: Value = serde_json::from_slice(&body).unwrap();
    let model = body["model"].as_str().unwrap().to_owned();
    let (script, name, loaded) = {
        let mut shared = shared.lock().unwrap();
        shared.seen.push(Seen {
            path: uri.path().into(),
            headers,
            body,
        });
        let loaded = shared
            .models
            .get(&model)
            .is_some_and(|model| model.state == ModelState::Loaded);
        (shared.script.clone(), shared.name.clone(), loaded)
    };
    if !loaded {
        let error = json!({"error": {"message": "not here", "type": "invalid_request_error", "code": "model_not_found"}});
        return (StatusCode::NOT_FOUND, axum::Json(error)).into_response();
    }
    let stepped = step.clone().notified_owned(); // before it is seen to be open: the step that follows is meant for it
    let places = match script {
        Script::Limited(places, _) | Script::Places(places) => places,
        _ => usize::MAX,
    };
    let Some(guard) = Guard::open(&shared, places) else {
        let error = json!({"error": {"message": "full", "type": "rate_limit_error", "code": "rate_limit_exceeded"}});
        return (StatusCode::TOO_MANY_REQUESTS, axum::Json(error)).into_response();
    };
    match script {
        Script::Answer => {
            guard.end();
            axum::Json(answer(&model, &name)).into_response()
        }
        Script::Refuse(status, body) => {
            guard.end();
            (StatusCode::from_u16(status).unwrap(), axum::Json(body)).into_response()
        }
        Script::Stream(events) => stream(events, guard, End::Well, None),
        Script::Tear(events) => stream(events, guard, End::Torn, Some(step)),
        Script::Hang(events) => stream(events, guard, End::Never, None),
        Script::Stepped(events) => stream(events, guard, End::Well, Some(step)),
        Script::Nonsense(text) => {
            guard.end();
            text.into_response()
        }
        Script::Places(_) => {
            stepped.await;
            guard.end();
            axum::Json(answer(&model, &name)).into_response()
        }
        Script::Limited(_, time) => {
            tokio::time::sleep(time).await; // the work that it does
            guard.end();
            axum::Json(answer(&model, &name)).into_response()
        }
        Script::Silent => {
            let _guard = guard;
            std::future::pending().await
        }
    }
}

/// Counts as no tokenizer does, so that nobody takes the number for an estimate: a token a character and 1000 more.
async fn tokenize(
    State((shared, _)): State<Node>,
    uri: Uri,
    headers: HeaderMap,
    body: Bytes,
) -> Response {
    let body: Value = serde_json::from_slice(&body).unwrap();
    let contents = body["messages"].as_array().unwrap().iter();
    let count = 1000
        + contents
            .map(|message| {
                message["content"]
                    .as_str()
                    .unwrap_or_default()
                    .chars()
                    .count()
            })
            .sum::<usize>();
    shared.lock().unwrap().seen.push(Seen {
        path: uri.path().into(),
        headers,
        body,
    });
    axum::Json(json!({"count": count, "max_model_len": 4096, "tokens": []})).into_response()
}

/// A whole answer whose text is the node's name.
fn answer(model: &str, node: &str) -> Value {
    json!({
        "id": "chatcmpl-1", "object": "chat.completion", "created": 1, "model": model,
        "choices": [{"index": 0, "message": {"role": "assistant", "content": node}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10},
    })
}

/// The events of a short streamed answer in `words`, as a neuron sends them when it is asked for usage.
#[must_use]
pub fn words(words: &[&str]) -> Vec<String> {
    let chunk = |delta: Value, finish: Value| {
        let chunk = json!({
            "id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "m",
            "choices": [{"index": 0, "delta": delta, "finish_reason": finish}],
        });
        format!("data: {chunk}\n\n")
    };
    let mut events = vec![chunk(
        json!({"role": "assistant", "content": ""}),
        Value::Null,
    )];
    events.extend(
        words
            .iter()
            .map(|word| chunk(json!({"content": word}), Value::Null)),
    );
    events.push(chunk(json!({}), "stop".into()));
    let usage = json!({
        "id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [],
        "usage": {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10},
    });
    events.push(format!("data: {usage}\n\n"));
    events.push("data: [DONE]\n\n".into());
    events
}

enum End {
    Well,
    Torn,
    Never,
}

fn stream(events: Vec<String>, guard: Guard, end: End, step: Option<Arc<Notify>>) -> Response {
    let body = futures::stream::unfold(
        (events.into_iter(), guard, end, step),
        |(mut events, guard, end, step)| async move {
            match (events.next(), &end) {
                (Some(event), how) => {
                    if let (Some(step), End::Well) = (&step, how) {
                        step.notified().await;
                    }
                    Some((Ok(event), (events, guard, end, step)))
                }
                (None, End::Well) => {
                    guard.end();
                    None
                }
                (None, End::Torn) => {
                    step.as_ref()
                        .expect("a tear waits for a step")
                        .notified()
                        .await;
                    Some((
                        Err(std::io::Error::other("torn")),
                        (events, guard, end, step),
                    ))
                }

                (None, End::Never) => std::future::pending().await,
            }
        },
    );
    Response::builder()
        .header("content-type", "text/event-stream")
        .body(Body::from_stream(body.map(|event| event.map(Bytes::from))))
        .unwrap()
}

/// Knows whether an answer was given to its end.
struct Guard {
    shared: Arc<Mutex<Shared>>,
    ended: bool,
}

impl Guard {
    /// None where as many are open as there are places. Who is refused is never counted: whoever sees all places taken may
    /// count on it.
    fn open(shared: &Arc<Mutex<Shared>>, places: usize) -> Option<Self> {
        let mut held = shared.lock().unwrap();
        if held.open >= places {
            return None;
        }
        held.open += 1;
        Some(Self {
            shared: shared.clone(),
            ended: false,
        })
    }

    fn end(mut self) {
        self.ended = true;
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        let mut shared = self.shared.lock().unwrap();
        shared.open -= 1;
        shared.left += usize::from(!self.ended);
    }
}
