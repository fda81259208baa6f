//! What translation costs: a request of 4 KB, and each event of a streamed answer.
//!
//! `cargo bench -p filters`

#![allow(missing_docs, clippy::unwrap_used)] // criterion's macros make items of their own

use bytes::Bytes;
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use filters::translate::messages::Messages;
use filters::translate::responses::Responses;
use filters::translate::{Translated, Translation};
use filters::{Body, Exchange};
use futures::StreamExt;
use serde_json::json;
use std::hint::black_box;
use tokio::runtime::{Builder, Runtime};

/// Fills a request of about `size` bytes.
fn filler(size: usize) -> String {
    "The quick brown fox \u{2014} jumps over \"the lazy dog\".\n".repeat(size / 110)
}

/// A conversation of about `size` bytes with a tool, a call and its result, as Anthropic's clients send it.
fn messages_request(size: usize) -> Bytes {
    let text = filler(size);
    json!({
        "model": "demo", "max_tokens": 1000, "stream": true, "temperature": 0.7,
        "system": [{"type": "text", "text": &text[..text.len() / 2], "cache_control": {"type": "ephemeral"}}],
        "tools": [{"name": "weather", "description": "Weather at a place", "input_schema": {
            "type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"],
        }}],
        "messages": [
            {"role": "user", "content": text},
            {"role": "assistant", "content": [
                {"type": "thinking", "thinking": "Two places.", "signature": ""},
                {"type": "tool_use", "id": "call_1", "name": "weather", "input": {"place": "Bern"}},
            ]},
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "call_1", "content": "sunny"}]},
        ],
    })
    .to_string()
    .into()
}

/// The same as clients of the Responses API send it.
fn responses_request(size: usize) -> Bytes {
    let text = filler(size);
    json!({
        "model": "demo", "max_output_tokens": 1000, "stream": true, "temperature": 0.7,
        "instructions": &text[..text.len() / 2],
        "tools": [{"type": "function", "name": "weather", "description": "Weather at a place", "parameters": {
            "type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"],
        }}],
        "input": [
            {"role": "user", "content": [{"type": "input_text", "text": text}]},
            {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "Two places."}]},
            {"type": "function_call", "call_id": "call_1", "name": "weather", "arguments": "{\"place\":\"Bern\"}"},
            {"type": "function_call_output", "call_id": "call_1", "output": "sunny"},
        ],
    })
    .to_string()
    .into()
}

/// The events of an answer in `count` tokens, as a neuron writes them.
fn events(count: usize) -> Vec<Bytes> {
    let chunk = |delta: serde_json::Value| {
        let chunk = json!({
            "id": "chatcmpl-0123456789abcdef", "object": "chat.completion.chunk", "created": 1_700_000_000,
            "model": "demo", "choices": [{"index": 0, "delta": delta, "finish_reason": null}],
        });
        Bytes::from(format!("data: {chunk}\n\n"))
    };
    let mut events = vec![chunk(json!({"role": "assistant", "content": ""}))];
    events.extend((1..count).map(|_| chunk(json!({"content": " token"}))));
    events
}

/// Reads a translated stream that comes in these pieces to its end.
fn drain(runtime: &Runtime, dialect: &dyn Translation, request: &[u8], pieces: &[Bytes]) -> usize {
    let exchange = Exchange::open(&http::Request::new(()).into_parts().0);
    let (_, answer) = dialect.request(request, &exchange).unwrap();
    let body = Body::stream(futures::stream::iter(pieces.to_vec()).map(Ok));
    let translated = Translated::new(body, answer.stream());
    runtime.block_on(translated.fold(0, |sum, piece| async move {
        sum + piece.map_or(0, |bytes| bytes.len()) // it ends without [DONE], which is an error and counts nothing
    }))
}

/// One dialect's request of about 4 KB, and its answer in 500 tokens.
fn measure(
    criterion: &mut Criterion,
    name: &str,
    dialect: &dyn Translation,
    body: &Bytes,
    small: &[u8],
) {
    const EVENTS: usize = 500;
    let exchange = Exchange::open(&http::Request::new(()).into_parts().0);
    let mut group = criterion.benchmark_group(name);
    group.bench_function(format!("request of {} bytes", body.len()), |bencher| {
        bencher.iter(|| {
            let (chat, _) = dialect.request(black_box(body), &exchange).unwrap();
            serde_json::to_vec(&chat).unwrap()
        });
    });
    let runtime = Builder::new_current_thread().build().unwrap();
    let apart = events(EVENTS);
    let together: Vec<Bytes> = apart.chunks(50).map(|some| some.concat().into()).collect();
    group.throughput(Throughput::Elements(EVENTS as u64));
    for (pieces, how) in [(&apart, "one a piece"), (&together, "fifty a piece")] {
        group.bench_function(format!("{EVENTS} events, {how}"), |bencher| {
            bencher.iter(|| drain(&runtime, dialect, small, black_box(pieces)));
        });
    }
    group.finish();
}

fn messages(criterion: &mut Criterion) {
    let small = br#"{"model":"m","max_tokens":9,"stream":true,"messages":[{"role":"user","content":"hi"}]}"#;
    measure(
        criterion,
        "messages",
        &Messages,
        &messages_request(4096),
        small,
    );
}

fn responses(criterion: &mut Criterion) {
    let small = br#"{"model":"m","stream":true,"input":"hi"}"#;
    measure(
        criterion,
        "responses",
        &Responses,
        &responses_request(4096),
        small,
    );
}

criterion_group!(benches, messages, responses);
criterion_main!(benches);
