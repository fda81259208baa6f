//! The API in process, over a fake model.

use super::*;
use crate::config::Config;
use crate::engine::fake::{FakeModel, Gate, Script};
use crate::residency::{Hands, Loader};
use crate::text::tokenizer::tests::{fixture, tiny};
use axum::body::{Body, to_bytes};
use axum::http::{Method, StatusCode, header};
use futures::StreamExt;
use protocol::node::{LoadModel, ModelState, NodeInfo};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use serde_json::{Value, json};
use std::sync::Mutex;
use tower::ServiceExt;

struct Api {
    router: Router,
    state: Arc<ApiState>,
}

async fn api_with(model: FakeModel, change: impl FnOnce(&mut Config)) -> Api {
    let mut config = Config::default_on_this_host().unwrap();
    change(&mut config);
    let registry = Registry::new();
    let once = Mutex::new(Some(model));
    let load: Box<Loader> =
        Box::new(move |_, _, _, _| Ok(Box::new(once.lock().unwrap().take().expect("one load"))));
    let hands = Hands {
        free: Arc::new(|devices: &[String]| vec![None; devices.len()]),
        load,
        ..Hands::of_host()
    };
    let residency = Residency::with_hands(&config, &registry, hands);
    let wanted = LoadModel {
        id: "org/m".into(),
        source: fixture().to_str().unwrap().into(),
        context_length: None,
        quant: None,
        tensor_parallel: None,
        devices: Vec::new(),
    };
    residency.load(wanted).unwrap();
    residency
        .wait_until(|models| {
            models
                .iter()
                .all(|model| model.state != ModelState::Loading)
        })
        .await;
    let state = Arc::new(ApiState {
        name: "host".into(),
        residency,
        limits: config.limits,
        at_start: vec!["org/m".into()],
        running: Running::default(),
        stopping: AtomicBool::new(false),
        metrics: ApiMetrics::register(&registry),
        registry,
    });
    Api {
        router: router(state.clone()),
        state,
    }
}

async fn api() -> Api {
    api_with(FakeModel::new(Script::Hash), |_| {}).await
}

/// A model that answers `how` with `text` and ends its turn.
async fn saying(text: &str) -> Api {
    let tokenizer = tiny();
    let mut tokens = tokenizer.encode(text).unwrap();
    tokens.push(481);
    let prompt = "<|im_start|>user\nhow<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n";
    let prompt = tokenizer.encode(prompt).unwrap().len();
    api_with(FakeModel::new(Script::Say { prompt, tokens }), |_| {}).await
}

impl Api {
    async fn send(
        &self,
        method: Method,
        path: &str,
        body: impl Into<Body>,
        headers: &[(&str, &str)],
    ) -> Response {
        let mut request = Request::builder().method(method).uri(path);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let request = request.body(body.into()).unwrap();
        self.router.clone().oneshot(request).await.unwrap()
    }

    async fn post(&self, path: &str, body: &Value) -> (StatusCode, Value) {
        let response = self.send(Method::POST, path, body.to_string(), &[]).await;
        let status = response.status();
        (status, serde_json::from_str(&text(response).await).unwrap())
    }

    async fn get(&self, path: &str) -> (StatusCode, String) {
        let response = self.send(Method::GET, path, Body::empty(), &[]).await;
        (response.status(), text(response).await)
    }

    async fn stream(&self, path: &str, body: &Value, headers: &[(&str, &str)]) -> String {
        let response = self
            .send(Method::POST, path, body.to_string(), headers)
            .await;
        assert_eq!(response.status(), StatusCode::OK);
        assert!(
            response.headers()[header::CONTENT_TYPE]
                .to_str()
                .unwrap()
                .starts_with("text/event-stream")
        );
        text(response).await
    }
}

async fn text(response: Response) -> String {
    let bytes = to_bytes(response.into_body(), usize::MAX).await.unwrap();
    String::from_utf8(bytes.to_vec()).unwrap()
}

/// The `data:` lines of a stream.
fn events(stream: &str) -> Vec<&str> {
    stream
        .split("\n\n")
        .filter_map(|event| event.strip_prefix("data: "))
        .collect()
}

fn chat(extra: Value) -> Value {
    let mut body = json!({
        "model": "org/m", "temperature": 0, "max_tokens": 8,
        "messages": [{"role": "user", "content": "how"}],
    });
    for (name, value) in extra.as_object().unwrap() {
        body[name] = value.clone();
    }
    body
}

const CHAT: &str = "/v1/chat/completions";

/// Any JSON, not deep, and what makes sense somewhere.
fn any_value(random: &mut StdRng, depth: usize) -> Value {
    let tool =
        json!({"type": "function", "function": {"name": "t", "parameters": {"type": "object"}}});
    let some = [
        json!(null),
        json!(true),
        json!(false),
        json!(0),
        json!(1),
        json!(-1),
        json!(2),
        json!(0.5),
        json!(1e300),
        json!(u64::MAX),
        json!(i64::MIN),
        json!(""),
        json!("x"),
        json!("auto"),
        json!("none"),
        json!("required"),
        json!("é\u{0}"),
        json!([]),
        json!({}),
        json!(["x"]),
        json!([1]),
        json!([tool]),
        json!({"type": "json_object"}),
        json!({"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "integer"}}}),
        json!({"type": "function", "function": {"name": "t"}}),
        json!({"include_usage": true}),
        json!({"1": 2}),
        json!({"role": "user", "content": "x"}),
        json!([{"role": "tool", "content": null}]),
        json!([[1, 2], [3]]),
    ];
    match random.random_range(0..10) {
        0 if depth > 0 => {
            let count = random.random_range(0..3);
            (0..count).map(|_| any_value(random, depth - 1)).collect()
        }
        1 if depth > 0 => {
            let name = some[random.random_range(11..17)].as_str().unwrap();
            json!({name: any_value(random, depth - 1), "type": any_value(random, depth - 1)})
        }
        _ => some[random.random_range(0..some.len())].clone(),
    }
}

#[tokio::test]
async fn any_request_is_answered_or_refused_with_a_reason() {
    let api = api().await;
    let own = [
        "messages",
        "prompt",
        "tokens",
        "model",
        "tools",
        "tool_choice",
        "parallel_tool_calls",
        "reasoning_effort",
        "enable_thinking",
        "thinking_budget",
        "chat_template_kwargs",
        "logprobs",
        "top_logprobs",
        "echo",
        "suffix",
        "response_format",
        "max_completion_tokens",
        "stream_options",
        "unknown",
    ];
    let names: Vec<&str> = fields::CONTROLS
        .iter()
        .map(|field| field.0)
        .chain(own)
        .collect();
    for seed in 0..1500 {
        let mut random = StdRng::seed_from_u64(seed);
        let mut body = chat(json!({"max_tokens": 2, "prompt": "x", "tokens": [1]}));
        let paths = [
            (CHAT, "prompt"),
            ("/v1/completions", "messages"),
            ("/tokenize", "prompt"),
            ("/detokenize", "x"),
        ];
        let (path, other) = paths[seed as usize % paths.len()];
        body.as_object_mut().unwrap().shift_remove(other);
        for _ in 0..random.random_range(1..4) {
            body[names[random.random_range(0..names.len())]] = any_value(&mut random, 2);
        }
        let (status, reply) = api.post(path, &body).await;
        match status.as_u16() {
            200 => {}
            400 | 404 => assert!(
                reply["error"]["message"].is_string(),
                "seed {seed}: {body} → {reply}"
            ),
            status => panic!("seed {seed}: {status} for {path} {body}: {reply}"),
        }
    }
}

#[tokio::test]
async fn a_whole_answer_has_text_reason_and_counts() {
    let api = saying("fine, thanks").await;
    let (status, reply) = api.post(CHAT, &chat(json!({"max_tokens": null}))).await;
    assert_eq!(status, StatusCode::OK, "{reply}");
    assert_eq!(reply["object"], "chat.completion");
    assert_eq!(
        reply["choices"][0]["message"],
        json!({"role": "assistant", "content": "fine, thanks"})
    );
    assert_eq!(reply["choices"][0]["finish_reason"], "stop");
    let usage = &reply["usage"];
    let tokens = tiny().encode("fine, thanks").unwrap().len() + 1;
    assert_eq!(
        usage["completion_tokens"], tokens,
        "the end of the turn counts"
    );
    assert_eq!(usage["completion_tokens_details"]["reasoning_tokens"], 0);
    assert!(reply["timings"]["queue_ms"].is_number());
}

#[tokio::test]
async fn a_stream_has_role_text_reason_usage_and_done_in_that_order() {
    let api = saying("fine, thanks").await;
    let body = chat(
        json!({"max_tokens": null, "stream": true, "stream_options": {"include_usage": true}}),
    );
    let stream = api.stream(CHAT, &body, &[]).await;
    let events = events(&stream);
    let chunks: Vec<Value> = events[..events.len() - 1]
        .iter()
        .map(|event| serde_json::from_str(event).unwrap())
        .collect();
    assert_eq!(*events.last().unwrap(), "[DONE]");
    assert_eq!(chunks[0]["choices"][0]["delta"]["role"], "assistant");
    let content: String = chunks
        .iter()
        .filter_map(|chunk| chunk["choices"][0]["delta"]["content"].as_str())
        .collect();
    assert_eq!(content, "fine, thanks");
    let [.., last, usage] = &chunks[..] else {
        panic!("{chunks:?}");
    };
    assert_eq!(last["choices"][0]["finish_reason"], "stop");
    assert_eq!(usage["choices"], json!([]));
    let tokens = tiny().encode("fine, thanks").unwrap().len() + 1;
    assert_eq!(usage["usage"]["completion_tokens"], tokens);
    assert!(stream.ends_with("\n\ndata: [DONE]\n\n"), "{stream}");
    let plain = api.stream(CHAT, &chat(json!({"stream": true})), &[]).await;
    assert!(!plain.contains("usage"), "{plain}");
    let body = body.to_string();
    let response = api.send(Method::POST, CHAT, body, &[]).await;
    let told = &response.headers()["x-prompt-tokens"];
    let told: u64 = told.to_str().unwrap().parse().unwrap();
    assert_eq!(usage["usage"]["prompt_tokens"], told, "told beforehand");
}

#[tokio::test]
async fn thinking_and_calls_come_in_their_own_fields() {
    let call =
        "<tool_call>\n<function=now>\n<parameter=zone>\n2\n</parameter>\n</function>\n</tool_call>";
    let tools = json!([{"type": "function", "function": {"name": "now",
        "parameters": {"properties": {"zone": {"type": "integer"}}}}}]);
    // The prompt with tools is longer: let the script find its length.
    let render = |thinking: bool| {
        let template = crate::residency::folder::ModelText::load(&fixture())
            .unwrap()
            .template;
        let messages =
            vec![serde_json::from_value(json!({"role": "user", "content": "how"})).unwrap()];
        let tools: Vec<protocol::chat::Tool> = serde_json::from_value(tools.clone()).unwrap();
        let variables = json!({"enable_thinking": thinking})
            .as_object()
            .unwrap()
            .clone();
        let conversation = crate::text::template::Conversation {
            messages: &messages,
            tools: &tools,
            add_generation_prompt: true,
            variables: &variables,
        };
        tiny()
            .encode(&template.render(&conversation).unwrap())
            .unwrap()
            .len()
    };
    let mut tokens = tiny().encode(&format!("hm\n</think>\n\n{call}")).unwrap();
    tokens.push(481);
    let script = Script::Say {
        prompt: render(true),
        tokens,
    };
    let api = api_with(FakeModel::new(script), |_| {}).await;
    let body = chat(json!({"tools": tools, "reasoning_effort": "high", "max_tokens": null}));
    let (status, reply) = api.post(CHAT, &body).await;
    assert_eq!(status, StatusCode::OK, "{reply}");
    let message = &reply["choices"][0]["message"];
    assert_eq!(message["reasoning_content"], "hm");
    assert_eq!(message["content"], Value::Null);
    assert_eq!(
        message["tool_calls"][0]["function"],
        json!({"name": "now", "arguments": "{\"zone\":2}"})
    );
    assert_eq!(reply["choices"][0]["finish_reason"], "tool_calls");
    assert!(
        reply["usage"]["completion_tokens_details"]["reasoning_tokens"]
            .as_u64()
            .unwrap()
            > 1
    );
    let mut streamed = body.clone();
    streamed["stream"] = true.into();
    let stream = api.stream(CHAT, &streamed, &[]).await;
    assert!(stream.contains("\"reasoning_content\":\"h"), "{stream}");
    assert!(
        stream.contains("\"arguments\":\"{\\\"zone\\\":2}\""),
        "{stream}"
    );
}

#[tokio::test]
async fn completions_take_text_and_ids_alike() {
    let api = api().await;
    let ids = tiny().encode("how").unwrap();
    let ask = |prompt: Value| json!({"model": "org/m", "prompt": prompt, "temperature": 0, "max_tokens": 5});
    let mut texts = Vec::new();
    for prompt in [json!("how"), json!(["how"]), json!(ids), json!([ids])] {
        let (status, reply) = api.post("/v1/completions", &ask(prompt)).await;
        assert_eq!(status, StatusCode::OK, "{reply}");
        assert_eq!(reply["object"], "text_completion");
        assert_eq!(reply["choices"][0]["finish_reason"], "length");
        texts.push(reply["choices"][0]["text"].clone());
    }
    assert!(texts.iter().all(|text| *text == texts[0]), "{texts:?}");
    let mut streamed = ask(json!("how"));
    streamed["stream"] = true.into();
    let stream = api.stream("/v1/completions", &streamed, &[]).await;
    let events = events(&stream);
    let content: String = events[..events.len() - 1]
        .iter()
        .map(|event| serde_json::from_str::<Value>(event).unwrap())
        .filter_map(|chunk| chunk["choices"][0]["text"].as_str().map(str::to_owned))
        .collect();
    assert_eq!(content, texts[0].as_str().unwrap());
}

#[tokio::test]
async fn every_bad_request_names_what_is_wrong() {
    let api = api().await;
    let long = "word ".repeat(3000);
    for (path, body, status, param, code) in [
        (CHAT, json!([]), 400, None, None),
        (CHAT, json!({"model": "org/m"}), 400, Some("messages"), None),
        (CHAT, chat(json!({"model": 5})), 400, Some("model"), None),
        (
            CHAT,
            chat(json!({"model": "x"})),
            404,
            Some("model"),
            Some("model_not_found"),
        ),
        (
            CHAT,
            chat(json!({"messages": []})),
            400,
            Some("messages"),
            None,
        ),
        (
            CHAT,
            chat(json!({"messages": [{"role": "user", "content": 5}]})),
            400,
            Some("messages[0].content"),
            None,
        ),
        (
            CHAT,
            chat(json!({"messages": [{"content": "a"}]})),
            400,
            Some("messages[0].role"),
            None,
        ),
        (
            CHAT,
            chat(json!({"messages": ["a"]})),
            400,
            Some("messages[0]"),
            None,
        ),
        (
            CHAT,
            chat(
                json!({"messages": [{"role": "wizard", "content": "a"}, {"role": "user", "content": "b"}]}),
            ),
            400,
            Some("messages"),
            None,
        ),
        (
            CHAT,
            chat(
                json!({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:"}}]}]}),
            ),
            400,
            Some("messages[0].content"),
            None,
        ),
        (
            CHAT,
            chat(json!({"messages": [{"role": "user", "content": long}]})),
            400,
            Some("messages"),
            Some("context_length_exceeded"),
        ),
        (
            CHAT,
            chat(json!({"temperature": "hot"})),
            400,
            Some("temperature"),
            None,
        ),
        (
            CHAT,
            chat(json!({"temperature": 3})),
            400,
            Some("temperature"),
            None,
        ),
        (
            CHAT,
            chat(json!({"max_tokens": -1})),
            400,
            Some("max_tokens"),
            None,
        ),
        (
            CHAT,
            chat(json!({"max_tokens": 0})),
            400,
            Some("max_tokens"),
            None,
        ),
        (CHAT, chat(json!({"stop": 5})), 400, Some("stop"), None),
        (
            CHAT,
            chat(json!({"frequency_penalty": 2.5})),
            400,
            Some("frequency_penalty"),
            None,
        ),
        (
            CHAT,
            chat(json!({"logit_bias": {"600": 1}})),
            400,
            Some("logit_bias"),
            None,
        ),
        (
            CHAT,
            chat(json!({"tool_choice": "required"})),
            400,
            Some("tool_choice"),
            None,
        ),
        (
            CHAT,
            chat(json!({"reasoning_effort": "utmost"})),
            400,
            Some("reasoning_effort"),
            None,
        ),
        (
            CHAT,
            chat(json!({"stream_options": {"include_usage": true}})),
            400,
            Some("stream_options"),
            None,
        ),
        (
            "/v1/completions",
            json!({"model": "org/m", "prompt": "a", "suffix": "b"}),
            400,
            Some("suffix"),
            None,
        ),
        (
            "/v1/completions",
            json!({"model": "org/m", "prompt": "a", "best_of": 2}),
            400,
            Some("best_of"),
            None,
        ),
        (
            "/v1/completions",
            json!({"model": "org/m", "prompt": ""}),
            400,
            Some("prompt"),
            None,
        ),
        (
            "/v1/completions",
            json!({"model": "org/m", "prompt": [1, 515]}),
            400,
            Some("prompt"),
            None,
        ),
        (
            "/v1/completions",
            json!({"model": "org/m", "prompt": long}),
            400,
            Some("prompt"),
            Some("context_length_exceeded"),
        ),
        (CHAT, chat(json!({"n": 0})), 400, Some("n"), None),
        (
            CHAT,
            chat(json!({"n": 1000000000000u64})),
            400,
            Some("n"),
            None,
        ),
        (
            CHAT,
            chat(json!({"top_logprobs": 2})),
            400,
            Some("top_logprobs"),
            None,
        ),
        (
            CHAT,
            chat(json!({"logprobs": true, "top_logprobs": 21})),
            400,
            Some("top_logprobs"),
            None,
        ),
        (
            CHAT,
            chat(json!({"logit_bias": {"x": 1}})),
            400,
            Some("logit_bias"),
            None,
        ),
        (
            CHAT,
            chat(json!({"logit_bias": {"5": "much"}})),
            400,
            Some("logit_bias"),
            None,
        ),
        (
            CHAT,
            chat(json!({"presence_penalty": -3})),
            400,
            Some("presence_penalty"),
            None,
        ),
        (
            CHAT,
            chat(json!({"repetition_penalty": 0})),
            400,
            Some("repetition_penalty"),
            None,
        ),
        (
            CHAT,
            chat(json!({"stop_token_ids": [512]})),
            400,
            Some("stop_token_ids"),
            None,
        ),
        (
            CHAT,
            chat(json!({"stop": vec!["x"; 17]})),
            400,
            Some("stop"),
            None,
        ),
        (
            CHAT,
            chat(json!({"min_tokens": 9})),
            400,
            Some("min_tokens"),
            None,
        ),
        (
            CHAT,
            chat(json!({"timeout": 0})),
            400,
            Some("timeout"),
            None,
        ),
        (
            CHAT,
            chat(json!({"priority": "high"})),
            400,
            Some("priority"),
            None,
        ),
        (
            CHAT,
            chat(json!({"cache_salt": ""})),
            400,
            Some("cache_salt"),
            None,
        ),
        (
            CHAT,
            chat(json!({"thinking_budget": -1})),
            400,
            Some("thinking_budget"),
            None,
        ),
        (
            CHAT,
            chat(json!({"enable_thinking": "yes"})),
            400,
            Some("enable_thinking"),
            None,
        ),
        (
            CHAT,
            chat(json!({"response_format": {"type": "xml"}})),
            400,
            Some("response_format"),
            None,
        ),
        (
            CHAT,
            chat(json!({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}})),
            400,
            Some("response_format.json_schema.schema"),
            None,
        ),
        (
            CHAT,
            chat(
                json!({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "nonsense"}}}}),
            ),
            400,
            Some("response_format.json_schema.schema"),
            None,
        ),
        (
            CHAT,
            chat(json!({"guided_regex": "("})),
            400,
            Some("guided_regex"),
            None,
        ),
        (
            CHAT,
            chat(json!({"guided_choice": []})),
            400,
            Some("guided_choice"),
            None,
        ),
        (
            CHAT,
            chat(json!({"guided_regex": "a", "grammar": "start: \"a\""})),
            400,
            Some("guided_regex"),
            None,
        ),
        (
            CHAT,
            chat(json!({"structured_outputs": {"xml": "a"}})),
            400,
            Some("structured_outputs"),
            None,
        ),
        (
            CHAT,
            chat(json!({"tool_choice": {"type": "function", "function": {"name": "x"}}})),
            400,
            Some("tool_choice"),
            None,
        ),
        (
            CHAT,
            chat(
                json!({"guided_regex": "a", "tools": [{"type": "function", "function": {"name": "f"}}]}),
            ),
            400,
            Some("guided_regex"),
            None,
        ),
        (CHAT, chat(json!({"echo": true})), 400, Some("echo"), None),
        (
            "/v1/completions",
            json!({"model": "org/m", "prompt": "a", "reasoning_effort": "high"}),
            400,
            Some("reasoning_effort"),
            None,
        ),
        (
            CHAT,
            chat(json!({"prompt_logprobs": 1})),
            400,
            Some("prompt_logprobs"),
            None,
        ),
        (
            "/v1/completions",
            json!({"model": "org/m", "prompt": "a", "logprobs": 21}),
            400,
            Some("logprobs"),
            None,
        ),
        (
            "/v1/completions",
            json!({"model": "org/m", "prompt": "a", "max_tokens": 0}),
            400,
            Some("max_tokens"),
            None,
        ),
        (
            "/v1/embeddings",
            json!({"model": "org/m", "input": "a"}),
            400,
            Some("model"),
            None,
        ),
        (
            "/v1/embeddings",
            json!({"model": "x", "input": "a"}),
            404,
            Some("model"),
            Some("model_not_found"),
        ),
        (
            "/tokenize",
            json!({"model": "org/m"}),
            400,
            Some("prompt"),
            None,
        ),
        (
            "/tokenize",
            json!({"model": "org/m", "prompt": 5}),
            400,
            Some("prompt"),
            None,
        ),
        (
            "/detokenize",
            json!({"model": "org/m", "tokens": [512]}),
            400,
            Some("tokens"),
            None,
        ),
        (
            "/apply-template",
            json!({"model": "org/m", "messages": []}),
            400,
            Some("messages"),
            None,
        ),
        (
            "/models/load",
            json!({"id": "a"}),
            400,
            Some("source"),
            None,
        ),
        (
            "/models/load",
            json!({"id": "a", "source": "b", "tensor_parallel": 0}),
            400,
            Some("tensor_parallel"),
            None,
        ),
        (
            "/models/load",
            json!({"id": "a", "source": "b", "tensor_parallel": 2, "devices": ["cuda:0", "cuda:1"]}),
            400,
            Some("devices"),
            None,
        ),
        (
            "/models/load",
            json!({"id": "org/m", "source": "elsewhere"}),
            409,
            Some("source"),
            Some("conflict"),
        ),
        (
            "/models/unload",
            json!({"id": "nobody"}),
            404,
            Some("id"),
            Some("model_not_found"),
        ),
    ] {
        let (got, reply) = api.post(path, &body).await;
        let error = &reply["error"];
        assert_eq!(got.as_u16(), status, "{body}: {reply}");
        assert_eq!(error["param"].as_str(), param, "{body}: {reply}");
        if code.is_some() {
            assert_eq!(error["code"].as_str(), code, "{body}: {reply}");
        }
        assert!(!error["message"].as_str().unwrap().is_empty());
    }
    let malformed = api.send(Method::POST, CHAT, "{\"model\": ", &[]).await;
    assert_eq!(malformed.status(), StatusCode::BAD_REQUEST);
    assert!(text(malformed).await.contains("not valid JSON"));
}

#[tokio::test]
async fn harmless_fields_pass_and_unknown_ones_are_counted() {
    let api = api().await;
    let body = chat(json!({
        "n": 1, "logprobs": false, "frequency_penalty": 0, "response_format": {"type": "text"},
        "logit_bias": null, "metadata": {}, "user": "u", "wish": 1, "dream": [2],
    }));
    let response = api.send(Method::POST, CHAT, body.to_string(), &[]).await;
    assert_eq!(response.status(), StatusCode::OK);
    assert_eq!(response.headers()["x-unknown-fields"], "2");
    let (_, metrics) = api.get("/metrics").await;
    assert!(
        metrics.contains("neuron_unknown_request_fields_total 2"),
        "{metrics}"
    );
}

#[tokio::test]
async fn paths_methods_and_sizes_are_refused_in_the_same_shape() {
    let api = api_with(FakeModel::new(Script::Hash), |config| {
        config.limits.max_body_bytes = 1000
    })
    .await;
    let unknown = api.send(Method::GET, "/v2/chat", Body::empty(), &[]).await;
    assert_eq!(unknown.status(), StatusCode::NOT_FOUND);
    assert!(text(unknown).await.contains("\"code\":\"unknown_path\""));
    let method = api.send(Method::GET, CHAT, Body::empty(), &[]).await;
    assert_eq!(method.status(), StatusCode::METHOD_NOT_ALLOWED);
    assert_eq!(method.headers()[header::ALLOW], "POST");
    assert!(
        text(method)
            .await
            .contains("\"code\":\"method_not_allowed\"")
    );
    let large = chat(json!({"user": "x".repeat(1000)}));
    let (status, reply) = api.post(CHAT, &large).await;
    assert_eq!(status, StatusCode::PAYLOAD_TOO_LARGE, "{reply}");
    let pieces = futures::stream::iter(vec![Ok::<_, std::convert::Infallible>(vec![b' '; 600]); 2]);
    let chunked = api
        .send(Method::POST, CHAT, Body::from_stream(pieces), &[])
        .await;
    assert_eq!(
        chunked.status(),
        StatusCode::PAYLOAD_TOO_LARGE,
        "without a length too"
    );
}

#[tokio::test]
async fn the_request_id_comes_back_or_is_made() {
    let api = api().await;
    let given = api
        .send(
            Method::GET,
            "/health/live",
            Body::empty(),
            &[("x-request-id", "mine-1")],
        )
        .await;
    assert_eq!(given.headers()["x-request-id"], "mine-1");
    let insane = api
        .send(
            Method::GET,
            "/nowhere",
            Body::empty(),
            &[("x-request-id", "a b")],
        )
        .await;
    assert_ne!(insane.headers()["x-request-id"], "a b");
}

#[tokio::test]
async fn models_are_listed_by_ids_with_slashes() {
    let api = api().await;
    let (_, cards) = api.get("/v1/models").await;
    assert!(
        cards.contains("\"id\":\"org/m\"") && cards.contains("\"state\":\"loaded\""),
        "{cards}"
    );
    for path in ["/models/org/m", "/models/org%2Fm"] {
        let (status, body) = api.get(path).await;
        assert_eq!(status, StatusCode::OK, "{path}: {body}");
        let body: Value = serde_json::from_str(&body).unwrap();
        assert_eq!(body["id"], "org/m");
        assert_eq!(body["context_length"], 4096);
        assert_eq!(body["memory_bytes"], 1000);
    }
    assert_eq!(api.get("/models/nobody").await.0, StatusCode::NOT_FOUND);
    let (_, node) = api.get("/discovery").await;
    assert!(
        node.contains("\"host\":\"host\"") && node.contains("\"id\":\"cpu\""),
        "{node}"
    );
    // What keeps CUDA from being used is told by a word; a build without it has nothing to tell.
    let node: NodeInfo = serde_json::from_str(&node).unwrap();
    assert_eq!(node.cuda.is_some(), cfg!(feature = "cuda"));
    let usable = node.features.iter().any(|feature| feature == "cuda");
    let amiss = node
        .cuda
        .as_ref()
        .is_some_and(|cuda| !cuda.faults.is_empty());
    assert!(node.cuda.is_none() || usable || amiss, "{node:?}");
}

#[tokio::test]
async fn a_model_can_be_unloaded_and_then_is_unknown() {
    let api = api().await;
    assert_eq!(api.get("/health/ready").await.0, StatusCode::OK);
    let (status, reply) = api.post("/models/unload", &json!({"id": "org/m"})).await;
    assert_eq!(status, StatusCode::OK);
    assert_eq!(reply["state"], "unloading");
    api.state.residency.wait_until(<[_]>::is_empty).await;
    let (status, _) = api.post(CHAT, &chat(json!({}))).await;
    assert_eq!(status, StatusCode::NOT_FOUND);
    api.state
        .stopping
        .store(true, std::sync::atomic::Ordering::SeqCst);
    assert_eq!(
        api.get("/health/ready").await.0,
        StatusCode::SERVICE_UNAVAILABLE
    );
}

#[tokio::test]
async fn a_full_queue_is_429_with_a_time_to_come_back() {
    let gate = Gate::closed_after(0);
    let model = FakeModel {
        gate: gate.clone(),
        ..FakeModel::new(Script::Hash)
    };
    let api = api_with(model, |config| {
        config.limits.max_running = 1;
        config.limits.max_waiting = 1;
    })
    .await;
    // The first runs or is about to, the second waits: the third or fourth at the latest is one too many.
    let mut open = Vec::new();
    let refused = loop {
        assert!(open.len() < 4, "nothing was refused");
        let request = Request::builder()
            .method(Method::POST)
            .uri(CHAT)
            .body(Body::from(chat(json!({})).to_string()))
            .unwrap();
        let mut reply = tokio::spawn(api.router.clone().oneshot(request));
        let in_flight = open.len() as u64 + 1;
        let engine = api.state.residency.get("org/m").unwrap().engine.clone();
        let taken = async {
            while engine.in_flight() < in_flight {
                tokio::task::yield_now().await;
            }
        };
        tokio::select! {
            response = &mut reply => break response.unwrap().unwrap(),
            () = taken => open.push(reply),
        }
    };
    assert_eq!(refused.status(), StatusCode::TOO_MANY_REQUESTS);
    assert!(refused.headers().contains_key(header::RETRY_AFTER));
    gate.open();
    for reply in open {
        assert_eq!(reply.await.unwrap().unwrap().status(), StatusCode::OK);
    }
    let (_, metrics) = api.get("/metrics").await;
    assert!(
        metrics.contains("neuron_request_rejected_total{model=\"org/m\",reason=\"queue_full\"} 1"),
        "{metrics}"
    );
}

#[tokio::test]
async fn a_failure_mid_stream_is_an_error_event_and_no_done() {
    let gate = Gate::closed_after(1);
    let model = FakeModel {
        gate: gate.clone(),
        ..FakeModel::new(Script::FailAfter(1))
    };
    let api = api_with(model, |_| {}).await;
    let body = chat(json!({"stream": true, "max_tokens": 100})).to_string();
    let response = api.send(Method::POST, CHAT, body, &[]).await;
    assert_eq!(response.status(), StatusCode::OK);
    gate.open();
    let stream = text(response).await;
    assert!(!stream.contains("[DONE]"), "{stream}");
    let last: Value = serde_json::from_str(events(&stream).last().unwrap()).unwrap();
    assert_eq!(last["error"]["type"], "server_error", "{stream}");
    let (status, reply) = api.post(CHAT, &chat(json!({}))).await;
    assert_eq!(status, StatusCode::SERVICE_UNAVAILABLE, "{reply}");
    // the engine ends when its clients have been told
    let failed = async {
        loop {
            let (_, model) = api.get("/models/org/m").await;
            if model.contains("\"state\":\"failed\"") && model.contains("planted") {
                return;
            }
            tokio::task::yield_now().await;
        }
    };
    let waited = tokio::time::timeout(std::time::Duration::from_secs(60), failed).await;
    waited.expect("the model has failed, and says why");
}

#[tokio::test]
async fn a_failure_before_the_first_token_has_its_own_status() {
    let api = api_with(FakeModel::new(Script::FailAfter(0)), |_| {}).await;
    let (status, reply) = api.post(CHAT, &chat(json!({"stream": true}))).await;
    assert_eq!(status, StatusCode::SERVICE_UNAVAILABLE, "{reply}");
}

#[tokio::test]
async fn dropping_the_body_ends_the_generation() {
    let gate = Gate::closed_after(3);
    let model = FakeModel {
        gate: gate.clone(),
        ..FakeModel::new(Script::Hash)
    };
    let steps = model.steps.clone();
    let api = api_with(model, |_| {}).await;
    let body = chat(json!({"stream": true, "max_tokens": 3000})).to_string();
    let response = api.send(Method::POST, CHAT, body, &[]).await;
    let mut pieces = response.into_body().into_data_stream();
    assert!(pieces.next().await.is_some());
    drop(pieces);
    gate.open();
    api.state.residency.close().await;
    let steps = steps.load(std::sync::atomic::Ordering::SeqCst);
    assert!(steps <= 5, "{steps} steps");
}

#[tokio::test]
async fn a_client_that_hangs_up_is_cancelled_though_nothing_was_streamed() {
    let gate = Gate::closed_after(1);
    let model = FakeModel {
        gate: gate.clone(),
        ..FakeModel::new(Script::Hash)
    };
    let api = api_with(model, |_| {}).await;
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(axum::serve(listener, api.router.clone()).into_future());
    let engine = api.state.residency.get("org/m").unwrap().engine.clone();
    let in_flight = async |wanted| {
        let reached = async {
            while engine.in_flight() != wanted {
                tokio::task::yield_now().await;
            }
        };
        let patience = std::time::Duration::from_secs(60);
        tokio::time::timeout(patience, reached).await.unwrap();
    };
    let body = chat(json!({"max_tokens": 4000})).to_string();
    let head = format!(
        "POST {CHAT} HTTP/1.1\r\nhost: n\r\ncontent-length: {}\r\n\r\n",
        body.len()
    );
    let mut connection = tokio::net::TcpStream::connect(address).await.unwrap();
    tokio::io::AsyncWriteExt::write_all(&mut connection, format!("{head}{body}").as_bytes())
        .await
        .unwrap();
    in_flight(1).await;
    drop(connection);
    // Each step is let through alone, and the request must be gone before it has made its tokens.
    let cancelled = async {
        while engine.in_flight() != 0 {
            gate.let_through(1);
            tokio::task::yield_now().await;
        }
    };
    cancelled.await;
    let (_, metrics) = api.get("/metrics").await;
    assert!(
        metrics.contains("neuron_cancelled_total{model=\"org/m\""),
        "{metrics}"
    );
}

#[tokio::test]
async fn the_metrics_move() {
    let api = api().await;
    api.post(CHAT, &chat(json!({}))).await;
    let (_, metrics) = api.get("/metrics").await;
    for line in [
        "neuron_generation_tokens_total{model=\"org/m\"} 8",
        "neuron_request_success_total{finished_reason=\"length\",model=\"org/m\"} 1",
        "neuron_time_to_first_token_seconds_count{model=\"org/m\"} 1",
        "neuron_inter_token_latency_seconds_count{model=\"org/m\"} 7",
        "neuron_e2e_request_latency_seconds_count{model=\"org/m\"} 1",
        "neuron_model_load_seconds_count{model=\"org/m\",outcome=\"loaded\"} 1",
        "neuron_http_requests_total{route=\"/v1/chat/completions\",status=\"200\"} 1",
        "neuron_step_tokens_total{kind=\"decode\",model=\"org/m\"} 7",
        "neuron_request_prefill_time_seconds_count{model=\"org/m\"} 1",
        "neuron_request_decode_time_seconds_count{model=\"org/m\"} 1",
        "neuron_request_prompt_tokens_count{model=\"org/m\"} 1",
        "neuron_request_generation_tokens_sum{model=\"org/m\"} 8",
        "neuron_reasoning_tokens_total{model=\"org/m\"} 0",
    ] {
        assert!(metrics.contains(line), "{line} is not in\n{metrics}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_silent_stream_opens_and_is_kept_alive() {
    let gate = Gate::closed_after(0);
    let model = FakeModel {
        gate: gate.clone(),
        ..FakeModel::new(Script::Hash)
    };
    let api = api_with(model, |_| {}).await;
    let body = chat(json!({"stream": true})).to_string();
    let response = api.send(Method::POST, CHAT, body, &[]).await;
    let mut pieces = response.into_body().into_data_stream();
    let first = pieces.next().await.unwrap().unwrap();
    assert!(
        first.starts_with(b"data: "),
        "the role comes before the long prefill: {first:?}"
    );
    let second = pieces.next().await.unwrap().unwrap();
    assert_eq!(&second[..], b": keep-alive\n\n");
    gate.open();
    let mut rest = Vec::new();
    while let Some(piece) = pieces.next().await {
        rest.extend_from_slice(&piece.unwrap());
    }
    assert!(rest.ends_with(b"data: [DONE]\n\n"));
}

const TEXT: &str = "/v1/completions";

async fn whole(api: &Api, path: &str, body: Value) -> Value {
    let (status, reply) = api.post(path, &body).await;
    assert_eq!(status, StatusCode::OK, "{body}: {reply}");
    reply
}

#[tokio::test]
async fn several_answers_are_drawn_apart_and_each_is_what_its_seed_gives_alone() {
    let api = api().await;
    let warm = |extra: Value| {
        let mut body = chat(extra);
        body["temperature"] = 1.0.into();
        body
    };
    let together = whole(&api, CHAT, warm(json!({"n": 3, "seed": 5}))).await;
    let texts: Vec<&Value> = (0..3)
        .map(|index| {
            let choice = &together["choices"][index];
            assert_eq!(choice["index"], index);
            &choice["message"]["content"]
        })
        .collect();
    assert_ne!(texts[0], texts[1]);
    for (index, text) in texts.iter().enumerate() {
        let alone = whole(&api, CHAT, warm(json!({"seed": 5 + index}))).await;
        assert_eq!(&alone["choices"][0]["message"]["content"], *text);
        assert_eq!(
            alone["usage"]["prompt_tokens"], together["usage"]["prompt_tokens"],
            "a prompt counts once"
        );
    }
    assert_eq!(together["usage"]["completion_tokens"], 24);
    let body =
        warm(json!({"n": 3, "seed": 5, "stream": true, "stream_options": {"include_usage": true}}));
    let stream = api.stream(CHAT, &body, &[]).await;
    let events = events(&stream);
    let mut streamed = [const { String::new() }; 3];
    for event in &events[..events.len() - 1] {
        let chunk: Value = serde_json::from_str(event).unwrap();
        if let Some(text) = chunk["choices"][0]["delta"]["content"].as_str() {
            let index = chunk["choices"][0]["index"].as_u64().unwrap();
            streamed[index as usize].push_str(text);
        }
    }
    assert_eq!(
        streamed
            .each_ref()
            .map(|text| json!(text))
            .iter()
            .collect::<Vec<_>>(),
        texts
    );
    assert_eq!(stream.matches("\"finish_reason\":\"length\"").count(), 3);
    assert_eq!(stream.matches("[DONE]").count(), 1);
}

#[tokio::test]
async fn several_prompts_are_answered_in_order_with_what_each_gets_alone() {
    let api = api().await;
    let ask = |prompt: Value| json!({"model": "org/m", "prompt": prompt, "temperature": 0, "max_tokens": 5, "n": 2});
    let ids = tiny().encode("and").unwrap();
    let reply = whole(&api, TEXT, ask(json!(["how", "and", "why not"]))).await;
    let choices = reply["choices"].as_array().unwrap();
    assert_eq!(choices.len(), 6);
    for (at, prompt) in [json!("how"), json!([ids]), json!("why not")]
        .iter()
        .enumerate()
    {
        let alone = whole(&api, TEXT, ask(prompt.clone())).await;
        for n in 0..2 {
            assert_eq!(choices[2 * at + n]["index"], 2 * at + n);
            assert_eq!(choices[2 * at + n]["text"], alone["choices"][n]["text"]);
        }
    }
}

#[tokio::test]
async fn log_probabilities_come_with_every_token_whole_and_streamed() {
    let api = api().await;
    let ask = json!({"logprobs": true, "top_logprobs": 3});
    let reply = whole(&api, CHAT, chat(ask.clone())).await;
    let content = reply["choices"][0]["logprobs"]["content"].clone();
    let tokens = content.as_array().unwrap();
    assert_eq!(tokens.len(), 8);
    for token in tokens {
        assert!(token["logprob"].as_f64().unwrap() <= 0.0);
        assert_eq!(token["top_logprobs"].as_array().unwrap().len(), 3);
        assert_eq!(token["top_logprobs"][0]["token"], token["token"], "greedy");
    }
    let text: String = tokens
        .iter()
        .map(|token| token["token"].as_str().unwrap())
        .collect();
    assert_eq!(text, reply["choices"][0]["message"]["content"]);
    let mut streamed = chat(ask);
    streamed["stream"] = true.into();
    let stream = api.stream(CHAT, &streamed, &[]).await;
    let events = events(&stream);
    let mut all = Vec::new();
    for event in &events[..events.len() - 1] {
        let chunk: Value = serde_json::from_str(event).unwrap();
        all.extend(
            chunk["choices"][0]["logprobs"]["content"]
                .as_array()
                .cloned()
                .unwrap_or_default(),
        );
    }
    assert_eq!(Value::from(all), content);
}

#[tokio::test]
async fn an_echoed_prompt_is_scored_as_the_harness_reads_it() {
    let api = api().await;
    let ids = tiny().encode("how are you").unwrap();
    let ask = |extra: Value| {
        let mut body = json!({"model": "org/m", "prompt": ids, "temperature": 0, "max_tokens": 1, "logprobs": 1, "echo": true});
        for (name, value) in extra.as_object().unwrap() {
            body[name] = value.clone();
        }
        body
    };
    let reply = whole(&api, TEXT, ask(json!({}))).await;
    let choice = &reply["choices"][0];
    let logprobs = &choice["logprobs"];
    let scores = logprobs["token_logprobs"].as_array().unwrap();
    assert_eq!(
        scores.len(),
        ids.len() + 1,
        "every token of the prompt and the one written"
    );
    assert_eq!(scores[0], Value::Null);
    assert_eq!(logprobs["top_logprobs"][0], Value::Null);
    for (at, score) in scores.iter().enumerate().skip(1) {
        let best = logprobs["top_logprobs"][at].as_object().unwrap().values();
        let best = best
            .map(|value| value.as_f64().unwrap())
            .fold(f64::MIN, f64::max);
        assert!(score.as_f64().unwrap() <= best);
    }
    let text = choice["text"].as_str().unwrap();
    assert!(text.starts_with("how are you"), "{text}");
    let joined: String = logprobs["tokens"]
        .as_array()
        .unwrap()
        .iter()
        .map(|token| token.as_str().unwrap())
        .collect();
    assert_eq!(joined, text);
    assert_eq!(logprobs["text_offset"][0], 0);
    let last = logprobs["text_offset"][ids.len()].as_u64().unwrap();
    assert_eq!(last, "how are you".len() as u64);
    let alone = whole(&api, TEXT, ask(json!({"max_tokens": 0}))).await;
    assert_eq!(alone["choices"][0]["text"], "how are you");
    assert_eq!(
        alone["choices"][0]["logprobs"]["token_logprobs"]
            .as_array()
            .unwrap()[..],
        scores[..ids.len()]
    );
    let mut streamed = ask(json!({"stream": true}));
    let stream = api.stream(TEXT, &streamed, &[]).await;
    let first: Value = serde_json::from_str(events(&stream)[0]).unwrap();
    assert_eq!(first["choices"][0]["text"], "how are you");
    assert_eq!(
        first["choices"][0]["logprobs"]["token_logprobs"]
            .as_array()
            .unwrap()[..],
        scores[..ids.len()]
    );
    streamed["logprobs"] = Value::Null;
    let stream = api.stream(TEXT, &streamed, &[]).await;
    let first: Value = serde_json::from_str(events(&stream)[0]).unwrap();
    assert_eq!(first["choices"][0]["text"], "how are you");
}

#[tokio::test]
async fn answers_end_where_they_are_told_to() {
    let api = saying("fine, thanks").await;
    let text = |reply: &Value| {
        reply["choices"][0]["message"]["content"]
            .as_str()
            .unwrap()
            .to_owned()
    };
    let comma = tiny().encode("fine,").unwrap().len();
    let ids = tiny().encode("fine, thanks").unwrap();
    let ended = whole(
        &api,
        CHAT,
        chat(json!({"max_tokens": 30, "stop_token_ids": [ids[comma - 1]]})),
    )
    .await;
    assert!(
        "fine,".starts_with(&text(&ended)) && text(&ended).len() < 5,
        "{ended}"
    );
    assert_eq!(ended["choices"][0]["finish_reason"], "stop");
    let on = whole(
        &api,
        CHAT,
        chat(json!({"max_tokens": 30, "ignore_eos": true})),
    )
    .await;
    assert_eq!(on["usage"]["completion_tokens"], 30);
    assert_eq!(on["choices"][0]["finish_reason"], "length");
    let least = whole(
        &api,
        CHAT,
        chat(json!({"max_tokens": 30, "min_tokens": 20})),
    )
    .await;
    assert!(
        least["usage"]["completion_tokens"].as_u64().unwrap() >= 20,
        "{least}"
    );
}

#[tokio::test]
async fn an_answer_has_the_shape_that_was_asked_for() {
    let api = api().await;
    let ask = |extra: Value| {
        let mut body = chat(extra);
        body["max_tokens"] = 400.into();
        body
    };
    let content = async |extra: Value| {
        let reply = whole(&api, CHAT, ask(extra)).await;
        assert_eq!(reply["choices"][0]["finish_reason"], "stop", "{reply}");
        reply["choices"][0]["message"]["content"]
            .as_str()
            .unwrap()
            .to_owned()
    };
    let schema = json!({"type": "object", "properties": {"ok": {"type": "boolean"}, "kind": {"enum": ["a", "b"]}},
        "required": ["ok", "kind"], "additionalProperties": false});
    for extra in [
        json!({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "strict": true, "schema": schema}}}),
        json!({"guided_json": schema}),
        json!({"guided_json": schema.to_string()}),
        json!({"structured_outputs": {"json": schema}}),
    ] {
        let value: Value = serde_json::from_str(&content(extra).await).unwrap();
        assert!(
            value["ok"].is_boolean() && value["kind"].is_string(),
            "{value}"
        );
    }
    assert!(
        ["red", "blue"].contains(
            &content(json!({"guided_choice": ["red", "blue"]}))
                .await
                .as_str()
        )
    );
    assert_eq!(content(json!({"guided_regex": "a{3}b"})).await, "aaab");
    assert_eq!(
        content(json!({"grammar": "start: \"x\" \"y\""})).await,
        "xy"
    );
    let text = whole(
        &api,
        TEXT,
        json!({"model": "org/m", "prompt": "a", "max_tokens": 9, "guided_regex": "[0-9]{4}"}),
    )
    .await;
    let text = text["choices"][0]["text"].as_str().unwrap();
    assert!(text.len() == 4 && text.parse::<u32>().is_ok(), "{text}");
    let (_, metrics) = api.get("/metrics").await;
    let masks = "neuron_grammar_mask_seconds_count{model=\"org/m\"} ";
    let (_, count) = metrics.split_once(masks).unwrap();
    assert!(!count.starts_with("0\n"), "{metrics}");
}

#[tokio::test]
async fn a_call_that_is_required_is_made_as_its_schema_says() {
    let api = api().await;
    let tools = json!([
        {"type": "function", "function": {"name": "now", "parameters": {"type": "object",
            "properties": {"zone": {"enum": [1, 2]}}, "required": ["zone"]}}},
        {"type": "function", "function": {"name": "stop", "parameters": {"type": "object", "properties": {}}}},
    ]);
    let named = json!({"type": "function", "function": {"name": "now"}});
    for (choice, parallel) in [(json!("required"), false), (named, false)] {
        let body = chat(
            json!({"tools": tools, "tool_choice": choice, "parallel_tool_calls": parallel, "max_tokens": 300}),
        );
        let reply = whole(&api, CHAT, body).await;
        let choice = &reply["choices"][0];
        assert_eq!(choice["finish_reason"], "tool_calls", "{reply}");
        let calls = choice["message"]["tool_calls"].as_array().unwrap();
        assert_eq!(calls.len(), 1);
        let arguments: Value =
            serde_json::from_str(calls[0]["function"]["arguments"].as_str().unwrap()).unwrap();
        match calls[0]["function"]["name"].as_str().unwrap() {
            "now" => assert!(
                arguments["zone"] == 1 || arguments["zone"] == 2,
                "{arguments}"
            ),
            other => assert_eq!(other, "stop"),
        }
    }
}

#[tokio::test]
async fn a_request_is_cancelled_by_its_id_and_its_client_is_told() {
    let gate = Gate::closed_after(1);
    let model = FakeModel {
        gate: gate.clone(),
        ..FakeModel::new(Script::Hash)
    };
    let api = api_with(model, |_| {}).await;
    let body = chat(json!({"stream": true, "max_tokens": 3000, "n": 2})).to_string();
    let response = api
        .send(Method::POST, CHAT, body, &[("x-request-id", "mine/1")])
        .await;
    let cancel = || api.send(Method::DELETE, "/requests/mine/1", Body::empty(), &[]);
    let cancelled = cancel().await;
    assert_eq!(cancelled.status(), StatusCode::OK);
    assert_eq!(text(cancelled).await, "{\"id\":\"mine/1\",\"cancelled\":1}");
    gate.open();
    let stream = text(response).await;
    assert!(!stream.contains("[DONE]"), "{stream}");
    assert!(
        stream.contains("\"code\":\"request_cancelled\""),
        "{stream}"
    );
    let late = cancel().await;
    assert_eq!(late.status(), StatusCode::NOT_FOUND);
    assert!(text(late).await.contains("request_not_found"));
    let (_, metrics) = api.get("/metrics").await;
    assert!(
        metrics.contains("neuron_cancelled_total{model=\"org/m\""),
        "{metrics}"
    );
}

#[tokio::test]
async fn text_becomes_tokens_and_back() {
    let api = api().await;
    let ids = tiny().encode("how are you").unwrap();
    let reply = whole(
        &api,
        "/tokenize",
        json!({"model": "org/m", "prompt": "how are you", "return_token_strs": true}),
    )
    .await;
    assert_eq!(reply["tokens"], json!(ids));
    assert_eq!(reply["count"], ids.len());
    assert_eq!(reply["max_model_len"], 4096);
    assert_eq!(reply["token_strs"].as_array().unwrap().len(), ids.len());
    let messages = json!([{"role": "user", "content": "how"}]);
    let prompt = whole(
        &api,
        "/apply-template",
        json!({"model": "org/m", "messages": messages}),
    )
    .await;
    let prompt = prompt["prompt"].as_str().unwrap();
    assert!(
        prompt.ends_with("<|im_start|>assistant\n<think>\n\n</think>\n\n"),
        "{prompt}"
    );
    let tokens = whole(
        &api,
        "/tokenize",
        json!({"model": "org/m", "messages": messages}),
    )
    .await;
    assert_eq!(tokens["tokens"], json!(tiny().encode(prompt).unwrap()));
    let back = whole(
        &api,
        "/detokenize",
        json!({"model": "org/m", "tokens": tokens["tokens"]}),
    )
    .await;
    assert_eq!(back["prompt"], prompt);
    let bare = whole(
        &api,
        "/apply-template",
        json!({"model": "org/m", "messages": messages, "add_generation_prompt": false}),
    )
    .await;
    assert!(
        bare["prompt"]
            .as_str()
            .unwrap()
            .ends_with("how<|im_end|>\n"),
        "{bare}"
    );
    let thinking = json!({"model": "org/m", "messages": messages, "chat_template_kwargs": {"enable_thinking": true}});
    let thinking = whole(&api, "/apply-template", thinking).await;
    assert!(
        thinking["prompt"].as_str().unwrap().ends_with("<think>\n"),
        "{thinking}"
    );
}

#[tokio::test]
async fn a_timeout_of_the_request_ends_it() {
    let gate = Gate::closed_after(0);
    let model = FakeModel {
        gate: gate.clone(),
        ..FakeModel::new(Script::Hash)
    };
    let api = api_with(model, |_| {}).await;
    let ask = chat(json!({"timeout": 1e-9}));
    let reply = async { api.post(CHAT, &ask).await };
    let open = async { gate.open() };
    let ((status, reply), ()) = tokio::join!(reply, open);
    assert_eq!(status, StatusCode::GATEWAY_TIMEOUT, "{reply}");
}
