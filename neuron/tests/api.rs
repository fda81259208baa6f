//! The daemon as a process, over HTTP, with the tiny checkpoint.
#![allow(clippy::unwrap_used)] // all of it is tests, helpers included

use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::Duration;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;
use tokio::process::{Child, Command};
use tokio::sync::mpsc;

/// No wait in these tests is longer; reaching it means that something hangs.
const PATIENCE: Duration = Duration::from_secs(120);

const CHAT: &str = "/v1/chat/completions";

fn fixture() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/models/qwen3_5_text")
}

/// A running daemon; killed when dropped.
struct Neuron {
    child: Child,
    address: String,
    log: mpsc::UnboundedReceiver<String>,
}

struct Reply {
    status: u16,
    headers: BTreeMap<String, String>,
    body: String,
}

impl Reply {
    fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|error| panic!("{error}: {}", self.body))
    }
}

impl Neuron {
    async fn start(arguments: &[&str]) -> Self {
        let mut child = Command::new(env!("CARGO_BIN_EXE_neuron"))
            .args(arguments)
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
        let (sender, log) = mpsc::unbounded_channel();
        tokio::spawn(async move {
            while let Ok(Some(line)) = lines.next_line().await {
                // A test that is over reads no more.
                let _ = sender.send(line);
            }
        });
        let mut neuron = Self {
            child,
            address: String::new(),
            log,
        };
        let line = neuron.log_line("listening on http://").await;
        neuron.address = line.rsplit("http://").next().unwrap().to_owned();
        neuron
    }

    /// A daemon that serves the tiny checkpoint as `tiny`.
    async fn with_model() -> Self {
        let model = fixture();
        let model = model.to_str().unwrap();
        let arguments = ["--model", model, "--id", "tiny", "--listen", "127.0.0.1:0"];
        let mut neuron = Self::start(&arguments).await;
        neuron.log_line(" loaded ").await;
        neuron
    }

    /// The next log line that has `part` in it.
    async fn log_line(&mut self, part: &str) -> String {
        let found = async {
            while let Some(line) = self.log.recv().await {
                if line.contains(part) {
                    return line;
                }
            }
            panic!("the daemon ended without saying {part:?}")
        };
        tokio::time::timeout(PATIENCE, found).await.unwrap()
    }

    /// Sends raw bytes on a connection of its own.
    async fn open(&self, bytes: &[u8]) -> TcpStream {
        let mut stream = TcpStream::connect(&self.address).await.unwrap();
        stream.write_all(bytes).await.unwrap();
        stream
    }

    async fn raw(&self, bytes: &[u8]) -> Reply {
        let mut stream = self.open(bytes).await;
        let mut all = Vec::new();
        tokio::time::timeout(PATIENCE, stream.read_to_end(&mut all))
            .await
            .expect("the daemon answers")
            .unwrap();
        parse(&String::from_utf8(all).unwrap())
    }

    async fn get(&self, path: &str) -> Reply {
        self.raw(format!("GET {path} HTTP/1.1\r\nhost: n\r\nconnection: close\r\n\r\n").as_bytes())
            .await
    }

    async fn post(&self, path: &str, body: &Value) -> Reply {
        self.raw(post(path, body).as_bytes()).await
    }

    async fn signal(&self, name: &str) {
        let pid = self.child.id().expect("the daemon runs").to_string();
        let status = Command::new("kill").args([name, &pid]).status().await;
        assert!(status.unwrap().success());
    }

    async fn exit(mut self) -> ExitStatus {
        tokio::time::timeout(PATIENCE, self.child.wait())
            .await
            .expect("the daemon ends")
            .unwrap()
    }
}

fn post(path: &str, body: &Value) -> String {
    let body = body.to_string();
    format!(
        "POST {path} HTTP/1.1\r\nhost: n\r\nconnection: close\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    )
}

fn parse(text: &str) -> Reply {
    let (head, body) = text.split_once("\r\n\r\n").unwrap_or((text, ""));
    let mut lines = head.split("\r\n");
    let status = lines.next().and_then(|line| line.split(' ').nth(1));
    let headers: BTreeMap<String, String> = lines
        .filter_map(|line| line.split_once(": "))
        .map(|(name, value)| (name.to_ascii_lowercase(), value.to_owned()))
        .collect();
    let chunked = headers
        .get("transfer-encoding")
        .is_some_and(|how| how == "chunked");
    Reply {
        status: status.and_then(|status| status.parse().ok()).unwrap_or(0),
        body: if chunked {
            dechunk(body)
        } else {
            body.to_owned()
        },
        headers,
    }
}

fn dechunk(mut text: &str) -> String {
    let mut out = String::new();
    while let Some((size, rest)) = text.split_once("\r\n") {
        let size = usize::from_str_radix(size, 16).unwrap();
        out.push_str(&rest[..size]);
        text = rest[size..].strip_prefix("\r\n").unwrap_or("");
    }
    out
}

fn chat(text: &str, extra: Value) -> Value {
    let mut body = json!({
        "model": "tiny", "temperature": 0, "max_tokens": 24,
        "messages": [{"role": "user", "content": text}],
    });
    for (name, value) in extra.as_object().unwrap() {
        body[name] = value.clone();
    }
    body
}

fn content(reply: &Reply) -> String {
    assert_eq!(reply.status, 200, "{}", reply.body);
    let content = &reply.json()["choices"][0]["message"]["content"];
    content.as_str().expect("an answer has content").to_owned()
}

/// The text of a stream that ended well.
fn streamed(reply: &Reply) -> String {
    assert_eq!(reply.status, 200, "{}", reply.body);
    assert!(reply.body.ends_with("data: [DONE]\n\n"), "{}", reply.body);
    reply
        .body
        .split("\n\n")
        .filter_map(|event| serde_json::from_str::<Value>(event.strip_prefix("data: ")?).ok())
        .filter_map(|chunk| Some(chunk["choices"][0]["delta"]["content"].as_str()?.to_owned()))
        .collect()
}

#[tokio::test]
async fn whole_and_streamed_answers_are_the_same() {
    let neuron = Neuron::with_model().await;
    let whole = neuron.post(CHAT, &chat("Hello", json!({}))).await;
    let text = content(&whole);
    assert_eq!(whole.json()["usage"]["completion_tokens"], 24);
    let stream = neuron
        .post(CHAT, &chat("Hello", json!({"stream": true})))
        .await;
    assert_eq!(streamed(&stream), text);
    assert!(stream.headers.contains_key("x-request-id"));
}

#[tokio::test]
async fn a_request_among_many_gets_what_it_gets_alone() {
    let neuron = Neuron::with_model().await;
    let prompts = [
        "a",
        "a longer prompt, so that lengths differ",
        "b c d",
        "one two three four five six",
    ];
    let ask = |index: usize| {
        let extra = json!({"temperature": if index < 4 { 0.0 } else { 0.8 }, "seed": index});
        chat(prompts[index % prompts.len()], extra)
    };
    let mut alone = Vec::new();
    for index in 0..8 {
        alone.push(content(&neuron.post(CHAT, &ask(index)).await));
    }
    let together = futures::future::join_all((0..8).map(|index| {
        let (neuron, body) = (&neuron, ask(index));
        async move { content(&neuron.post(CHAT, &body).await) }
    }));
    assert_eq!(together.await, alone);
}

#[tokio::test]
async fn the_length_of_a_prefill_step_changes_no_text() {
    let neuron = Neuron::with_model().await;
    let long = "The quick brown fox jumps over the lazy dog. ".repeat(6);
    let expected = content(&neuron.post(CHAT, &chat(&long, json!({}))).await);
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("neuron.toml");
    for chunk in [1, 63, 4096] {
        let config = format!(
            "listen = \"127.0.0.1:0\"\n[limits]\nprefill_chunk_tokens = {chunk}\n[[models]]\nid = \"tiny\"\nsource = {:?}\n",
            fixture()
        );
        std::fs::write(&file, config).unwrap();
        let mut neuron = Neuron::start(&["--config", file.to_str().unwrap()]).await;
        neuron.log_line(" loaded ").await;
        let text = content(&neuron.post(CHAT, &chat(&long, json!({}))).await);
        assert_eq!(text, expected, "steps of {chunk} tokens");
    }
}

#[tokio::test]
async fn a_client_that_leaves_stops_its_generation() {
    let mut neuron = Neuron::with_model().await;
    for stream in [true, false] {
        let body = chat(
            "Hello",
            json!({"stream": stream, "max_tokens": 3900, "stop": ["no such text"]}),
        );
        let mut connection = neuron.open(post(CHAT, &body).as_bytes()).await;
        if stream {
            let mut some = [0; 64];
            assert!(connection.read(&mut some).await.unwrap() > 0);
        } else {
            in_flight(&neuron, 1).await;
        }
        drop(connection);
        let line = neuron.log_line("client left").await;
        assert!(line.contains("tiny"), "{line}");
        in_flight(&neuron, 0).await;
    }
    let metrics = neuron.get("/metrics").await.body;
    assert!(metrics.contains("neuron_cancelled_total"), "{metrics}");
}

/// Waits until so many requests run or wait.
async fn in_flight(neuron: &Neuron, wanted: u64) {
    let reached = async { while neuron.get("/models/tiny").await.json()["in_flight"] != wanted {} };
    tokio::time::timeout(PATIENCE, reached).await.unwrap();
}

#[tokio::test]
async fn models_come_and_go_over_http() {
    let mut neuron = Neuron::start(&["--listen", "127.0.0.1:0"]).await;
    assert_eq!(neuron.get("/health/ready").await.status, 200);
    assert_eq!(neuron.post(CHAT, &chat("Hi", json!({}))).await.status, 404);
    let wanted = json!({"id": "tiny", "source": fixture(), "context_length": 256});
    let reply = neuron.post("/models/load", &wanted).await;
    assert_eq!(reply.status, 202);
    assert_eq!(
        neuron.post("/models/load", &wanted).await.status,
        202,
        "a second load joins"
    );
    neuron.log_line(" loaded ").await;
    let status = neuron.get("/models/tiny").await.json();
    assert_eq!(status["state"], "loaded");
    assert_eq!(status["context_length"], 256);
    content(&neuron.post(CHAT, &chat("Hi", json!({}))).await);
    let full = neuron
        .post(
            CHAT,
            &chat("Hi", json!({"max_tokens": 5000, "stop": ["no such text"]})),
        )
        .await;
    let reason = full.json()["choices"][0]["finish_reason"].clone();
    assert!(reason == "length" || reason == "stop", "{}", full.body);
    assert!(full.json()["usage"]["total_tokens"].as_u64().unwrap() <= 256);
    let long = neuron
        .post(CHAT, &chat(&"word ".repeat(300), json!({})))
        .await;
    assert_eq!(long.status, 400);
    assert_eq!(long.json()["error"]["code"], "context_length_exceeded");
    assert_eq!(
        neuron
            .post("/models/unload", &json!({"id": "tiny"}))
            .await
            .status,
        200
    );
    neuron.log_line(" unloaded ").await;
    assert_eq!(neuron.get("/models/tiny").await.status, 404);
}

#[tokio::test]
async fn a_model_in_ranks_answers_as_it_does_in_one() {
    let mut neuron = Neuron::start(&["--listen", "127.0.0.1:0"]).await;
    let device = neuron.get("/discovery").await.json()["devices"][0].clone();
    assert_eq!(
        (&device["id"], &device["many_ranks"]),
        (&json!("cpu"), &json!(true))
    );
    let mut answers = Vec::new();
    for ranks in [1, 2, 4] {
        let wanted = json!({
            "id": "tiny", "source": fixture(), "context_length": 256,
            "tensor_parallel": ranks, "devices": ["cpu"],
        });
        assert_eq!(neuron.post("/models/load", &wanted).await.status, 202);
        neuron.log_line(" loaded ").await;
        let status = neuron.get("/models/tiny").await.json();
        assert_eq!(status["devices"], json!(["cpu"]), "{status}");
        let body = chat(
            "Hi",
            json!({"temperature": 0, "max_tokens": 40, "ignore_eos": true}),
        );
        answers.push(content(&neuron.post(CHAT, &body).await));
        let metrics = neuron.get("/metrics").await.body;
        let written = format!(
            "neuron_generation_tokens_total{{model=\"tiny\"}} {}",
            40 * answers.len()
        );
        assert!(metrics.contains(&written), "{metrics}");
        neuron.post("/models/unload", &json!({"id": "tiny"})).await;
        neuron.log_line(" unloaded ").await;
    }
    assert_eq!(answers[0], answers[1]);
    assert_eq!(answers[0], answers[2]);
    let wanted = json!({"id": "tiny", "source": fixture(), "tensor_parallel": 3});
    assert_eq!(neuron.post("/models/load", &wanted).await.status, 202);
    neuron.log_line("loading failed").await;
    let status = neuron.get("/models/tiny").await.json();
    let reason = status["reason"].as_str().unwrap();
    assert!(reason.contains("1, 2 or 4 would do"), "{reason}");
}

#[tokio::test]
async fn a_broken_folder_is_a_failed_model_that_says_why() {
    let folder = tempfile::tempdir().unwrap();
    for file in [
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "generation_config.json",
        "model.safetensors",
    ] {
        std::fs::copy(fixture().join(file), folder.path().join(file)).unwrap();
    }
    let weights = folder.path().join("model.safetensors");
    let whole = std::fs::read(&weights).unwrap();
    std::fs::write(&weights, &whole[..whole.len() / 2]).unwrap();
    let mut neuron = Neuron::start(&["--listen", "127.0.0.1:0"]).await;
    neuron
        .post(
            "/models/load",
            &json!({"id": "half", "source": folder.path()}),
        )
        .await;
    neuron.log_line("loading failed").await;
    let status = neuron.get("/models/half").await.json();
    assert_eq!(status["state"], "failed");
    let reason = status["reason"].as_str().unwrap();
    assert!(reason.contains("model.safetensors"), "{reason}");
    let mut body = chat("Hi", json!({}));
    body["model"] = "half".into();
    assert_eq!(neuron.post(CHAT, &body).await.status, 503);
}

#[tokio::test]
async fn sigterm_lets_running_answers_end_and_exits_0() {
    let mut neuron = Neuron::with_model().await;
    let body = chat("Hello", json!({"stream": true, "max_tokens": 300}));
    let mut connection = neuron.open(post(CHAT, &body).as_bytes()).await;
    let mut all = vec![0; 16];
    connection.read_exact(&mut all).await.unwrap();
    neuron.signal("-TERM").await;
    neuron.log_line("stopping").await;
    connection.read_to_end(&mut all).await.unwrap();
    streamed(&parse(&String::from_utf8(all).unwrap()));
    assert!(neuron.exit().await.success());
}

#[tokio::test]
async fn nonsense_on_the_wire_harms_nobody() {
    let neuron = Neuron::start(&["--listen", "127.0.0.1:0"]).await;
    let flood: String = (0..500).map(|n| format!("x-{n}: y\r\n")).collect();
    let flood = format!("GET /health/live HTTP/1.1\r\nhost: n\r\n{flood}\r\n");
    assert_eq!(neuron.raw(flood.as_bytes()).await.status, 431);
    assert_eq!(
        neuron.raw(b"\x16\x03\x01 not http\r\n\r\n").await.status,
        400
    );
    // Half a request, and then the client is gone.
    let half = post(CHAT, &chat("Hello", json!({})));
    drop(neuron.open(&half.as_bytes()[..half.len() - 10]).await);
    assert_eq!(neuron.get("/health/live").await.status, 200);
    assert_eq!(neuron.get("/v1/nowhere").await.status, 404);
}

async fn output(arguments: &[&str]) -> (Option<i32>, String) {
    let output = Command::new(env!("CARGO_BIN_EXE_neuron"))
        .args(arguments)
        .output();
    let output = tokio::time::timeout(PATIENCE, output)
        .await
        .unwrap()
        .unwrap();
    let text = [output.stdout, output.stderr].concat();
    (output.status.code(), String::from_utf8(text).unwrap())
}

#[tokio::test]
async fn a_bad_config_is_one_line_and_exit_64() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("neuron.toml");
    std::fs::write(&file, "[limits]\nmax_running = 0\n").unwrap();
    let file = file.to_str().unwrap();
    for arguments in [vec!["--config", file], vec!["check", "--config", file]] {
        let (code, text) = output(&arguments).await;
        assert_eq!(code, Some(64));
        assert_eq!(text.lines().count(), 1, "{text}");
        assert!(text.contains("neuron.toml: limits.max_running: "), "{text}");
    }
    let sample = Path::new(env!("CARGO_MANIFEST_DIR")).join("../conf/neuron.toml");
    let (code, _) = output(&["check", "--config", sample.to_str().unwrap()]).await;
    assert_eq!(code, Some(0));
}

#[tokio::test]
async fn a_quick_start_without_its_model_exits_1_and_says_why() {
    let (code, text) = output(&["--model", "/no/such/model", "--listen", "127.0.0.1:0"]).await;
    assert_eq!(code, Some(1));
    assert!(text.contains("/no/such/model"), "{text}");
}

#[tokio::test]
async fn a_scored_prompt_has_the_scores_it_has_alone() {
    let neuron = Neuron::with_model().await;
    let long = "The quick brown fox jumps over the lazy dog. ".repeat(6);
    let texts = ["one two three four", "a", long.as_str()];
    let ask = |prompt: Value| json!({"model": "tiny", "prompt": prompt, "echo": true, "logprobs": 1, "max_tokens": 1, "temperature": 0});
    let scores = |choice: &Value| -> Vec<f64> {
        let scores = choice["logprobs"]["token_logprobs"].as_array().unwrap();
        scores[1..]
            .iter()
            .map(|score| score.as_f64().unwrap())
            .collect()
    };
    let together = neuron
        .post("/v1/completions", &ask(json!(texts)))
        .await
        .json();
    for (at, text) in texts.iter().enumerate() {
        let alone = neuron
            .post("/v1/completions", &ask(json!(text)))
            .await
            .json();
        let (alone, among) = (
            scores(&alone["choices"][0]),
            scores(&together["choices"][at]),
        );
        assert_eq!(alone.len(), among.len());
        for (alone, among) in alone.iter().zip(&among) {
            assert!(
                (alone - among).abs() < 1e-3,
                "{alone} alone, {among} among others"
            );
        }
    }
}

#[tokio::test]
async fn a_schema_holds_a_real_models_answer_after_its_thinking() {
    let neuron = Neuron::with_model().await;
    let schema = json!({"type": "object", "properties": {"kind": {"enum": ["a", "b"]}}, "required": ["kind"], "additionalProperties": false});
    let extra = json!({"enable_thinking": true, "thinking_budget": 8, "max_tokens": 400, "guided_json": schema});
    let reply = neuron.post(CHAT, &chat("Hello", extra)).await;
    let kind = serde_json::from_str::<Value>(&content(&reply)).unwrap()["kind"].clone();
    assert!(kind == "a" || kind == "b", "{}", reply.body);
    let usage = &reply.json()["usage"]["completion_tokens_details"];
    assert!(
        usage["reasoning_tokens"].as_u64().unwrap() >= 8,
        "{}",
        reply.body
    );
}
