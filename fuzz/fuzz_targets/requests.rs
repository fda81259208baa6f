//! Whatever JSON is posted to a neuron, it answers, or refuses with an error that says why; it is never at fault itself.

#![no_main]
#![recursion_limit = "512"]

use arbitrary::{Arbitrary, Unstructured};
use axum::Router;
use axum::body::{Body, to_bytes};
use axum::http::Request;
use libfuzzer_sys::fuzz_target;
use neuron::api::{ApiMetrics, ApiState, Running, router};
use neuron::config::Config;
use neuron::residency::Residency;
use prometheus::Registry;
use protocol::error::OpenAiError;
use protocol::node::{LoadModel, ModelState};
use serde_json::{Map, Value, json};
use std::path::Path;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, LazyLock};
use tokio::runtime::Runtime;
use tower::ServiceExt;

const PATHS: [&str; 5] = [
    "/v1/chat/completions",
    "/v1/completions",
    "/tokenize",
    "/detokenize",
    "/apply-template",
];

/// Fields that are known somewhere, each with a value that makes sense.
static FIELDS: LazyLock<Map<String, Value>> = LazyLock::new(|| {
    let tool = json!({"type": "function", "function": {"name": "t", "parameters": {
        "type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": false}}});
    let call = json!({"id": "c", "type": "function", "function": {"name": "t", "arguments": "{\"a\": 1}"}});
    let fields = json!({
        "model": "m", "stream": true, "stream_options": {"include_usage": true}, "prompt": ["x", "y"],
        "messages": [
            {"role": "system", "content": "s"}, {"role": "user", "content": [{"type": "text", "text": "x"}]},
            {"role": "assistant", "content": null, "reasoning_content": "r", "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "c", "content": "y"},
        ],
        "temperature": 0.5, "top_p": 0.5, "top_k": 5, "min_p": 0.1, "seed": 1, "stop": ["x"], "n": 2,
        "tools": [tool], "tool_choice": {"type": "function", "function": {"name": "t"}}, "parallel_tool_calls": false,
        "reasoning_effort": "low", "enable_thinking": true, "thinking_budget": 1, "chat_template_kwargs": {"x": [1]},
        "logprobs": true, "top_logprobs": 3, "user": "u", "echo": true, "suffix": "", "best_of": 1,
        "response_format": {"type": "json_schema", "json_schema": {"name": "n", "strict": true, "schema": {
            "type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"], "additionalProperties": false}}},
        "logit_bias": {"1": 2}, "frequency_penalty": 1, "presence_penalty": -1, "repetition_penalty": 1.1,
        "min_tokens": 1, "ignore_eos": true, "stop_token_ids": [3], "priority": 1, "timeout": 30, "cache_salt": "x",
        "guided_choice": ["a", "b"], "guided_regex": "[a-z]+", "guided_grammar": "start: /[a-z]+/", "grammar": "x",
        "structured_outputs": {"regex": "a"}, "tokens": [1, 2], "add_special_tokens": false, "unknown": {},
    });
    match fields {
        Value::Object(fields) => fields,
        _ => unreachable!("an object was written"),
    }
});

/// A daemon with a model of random weights, whose context is short so that an answer takes no time.
static API: LazyLock<(Runtime, Router)> = LazyLock::new(|| {
    let runtime = Runtime::new().expect("a runtime");
    let fixture = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/../tests/fixtures/models/qwen3_5_text"
    );
    let router = runtime.block_on(async {
        let config = Config::default_on_this_host().expect("defaults");
        let registry = Registry::new();
        let residency = Residency::new(&config, &registry);
        let wanted = LoadModel {
            id: "m".into(),
            source: Path::new(fixture).to_str().expect("text").into(),
            context_length: Some(512),
            quant: None,
            tensor_parallel: None,
            devices: Vec::new(),
        };
        residency.load(wanted).expect("loads");
        residency
            .wait_until(|models| models.iter().all(|model| model.state == ModelState::Loaded))
            .await;
        router(Arc::new(ApiState {
            name: "host".into(),
            residency,
            limits: config.limits,
            at_start: Vec::new(),
            running: Running::default(),
            stopping: AtomicBool::new(false),
            metrics: ApiMetrics::register(&registry),
            registry,
        }))
    });
    (runtime, router)
});

/// Any JSON, not deep.
fn any(unstructured: &mut Unstructured<'_>, depth: u8) -> arbitrary::Result<Value> {
    let kinds = if depth == 0 { 7 } else { 10 };
    Ok(match unstructured.int_in_range(0..=kinds - 1)? {
        0 => Value::Null,
        1 => bool::arbitrary(unstructured)?.into(),
        2 => i64::from(i8::arbitrary(unstructured)?).into(),
        3 => i64::arbitrary(unstructured)?.into(),
        4 => f64::arbitrary(unstructured)?.into(),
        5 => String::arbitrary(unstructured)?.into(),
        // a value that makes sense somewhere, but perhaps not here
        6 => known(unstructured)?.1,
        7 => {
            let count = unstructured.int_in_range(0..=3)?;
            let list: arbitrary::Result<Vec<Value>> =
                (0..count).map(|_| any(unstructured, depth - 1)).collect();
            list?.into()
        }
        _ => {
            let mut map = Map::new();
            for _ in 0..unstructured.int_in_range(0..=3)? {
                let name = match bool::arbitrary(unstructured)? {
                    true => known(unstructured)?.0,
                    false => String::arbitrary(unstructured)?,
                };
                map.insert(name, any(unstructured, depth - 1)?);
            }
            map.into()
        }
    })
}

fn known(unstructured: &mut Unstructured<'_>) -> arbitrary::Result<(String, Value)> {
    let at = unstructured.choose_index(FIELDS.len())?;
    let (name, value) = FIELDS.iter().nth(at).expect("below their number");
    Ok((name.clone(), value.clone()))
}

/// Puts something else at some place in `value`.
fn change(value: &mut Value, unstructured: &mut Unstructured<'_>) -> arbitrary::Result<()> {
    let inside = bool::arbitrary(unstructured)?;
    match value {
        Value::Array(list) if inside && !list.is_empty() => {
            let at = unstructured.choose_index(list.len())?;
            change(&mut list[at], unstructured)
        }
        Value::Object(map) if inside && !map.is_empty() => {
            let at = unstructured.choose_index(map.len())?;
            let (_, value) = map.iter_mut().nth(at).expect("below their number");
            change(value, unstructured)
        }
        value => {
            *value = any(unstructured, 2)?;
            Ok(())
        }
    }
}

/// A request with a few known fields, one or the other of them changed.
fn made_up(path: &str, unstructured: &mut Unstructured<'_>) -> arbitrary::Result<Value> {
    let mut body = json!({"model": "m", "max_tokens": 2});
    let needed = match path {
        "/v1/completions" => "prompt",
        "/detokenize" => "tokens",
        _ => "messages",
    };
    body[needed] = FIELDS[needed].clone();
    for _ in 0..unstructured.int_in_range(0..=4)? {
        let (name, value) = known(unstructured)?;
        body[name] = value;
    }
    for _ in 0..unstructured.int_in_range(0..=2)? {
        change(&mut body, unstructured)?;
    }
    Ok(body)
}

/// Long answers are no finding: they would only take the time of other inputs.
fn bounded(mut body: Value) -> Value {
    let Value::Object(fields) = &mut body else {
        return body;
    };
    for name in ["max_tokens", "max_completion_tokens"] {
        let long = |value: &Value| value.is_null() || value.as_u64().is_some_and(|count| count > 3);
        if fields.get(name).is_some_and(long) {
            fields.insert(name.into(), 3.into());
        }
    }
    fields.entry("max_tokens").or_insert(3.into());
    if fields
        .get("n")
        .and_then(Value::as_u64)
        .is_some_and(|count| (5..200).contains(&count))
    {
        fields.insert("n".into(), 4.into());
    }
    body
}

fuzz_target!(|input: &[u8]| {
    let Some((&kind, rest)) = input.split_first() else {
        return;
    };
    let path = PATHS[usize::from(kind / 2) % PATHS.len()];
    let body = match kind % 2 {
        0 => match serde_json::from_slice(rest) {
            Ok(body) => bounded(body).to_string().into_bytes(),
            Err(_) => rest.to_vec(),
        },
        _ => match made_up(path, &mut Unstructured::new(rest)) {
            Ok(body) => bounded(body).to_string().into_bytes(),
            Err(_) => return,
        },
    };
    let (runtime, router) = &*API;
    let request = Request::post(path)
        .header("content-type", "application/json")
        .body(Body::from(body.clone()))
        .expect("a request");
    let (status, reply) = runtime.block_on(async {
        let response = router.clone().oneshot(request).await.expect("never fails");
        let status = response.status().as_u16();
        (
            status,
            to_bytes(response.into_body(), usize::MAX)
                .await
                .expect("ends"),
        )
    });
    let told = || {
        format!(
            "{path} {}\n{}",
            String::from_utf8_lossy(&body),
            String::from_utf8_lossy(&reply)
        )
    };
    match status {
        200 if reply.starts_with(b"data: ") => {
            assert!(
                reply.ends_with(b"data: [DONE]\n\n"),
                "a stream ends: {}",
                told()
            );
        }
        200 => assert!(
            serde_json::from_slice::<Value>(&reply).is_ok(),
            "{}",
            told()
        ),
        400 | 404 => {
            let error: OpenAiError =
                serde_json::from_slice(&reply).unwrap_or_else(|_| panic!("{}", told()));
            assert!(!error.error.message.is_empty(), "{}", told());
        }
        _ => panic!("{status}: {}", told()),
    }
});
