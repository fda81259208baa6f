//! What translation costs: a request of 4 KB, and each event of a streamed answer.
//!
//! `cargo bench -p filters`

#![allow(missing_docs, clippy::unwrap_used)] // criterion's macros make items of their own

use bytes::Bytes;
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use filters::translate::messages::Messages;
use filters::translate::{Answer, Translated, Translation};
use filters::{Body, Exchange};
use futures::StreamExt;
use serde_json::json;
use std::hint::black_box;
use tokio::runtime::{Builder, Runtime};

/// A conversation of about `size` bytes with a tool, a call and its result.
fn request(size: usize) -> Bytes {
    let text = "The quick brown fox \u{2014} jumps over \"the lazy dog\".\n".repeat(size / 110);
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
fn drain(runtime: &Runtime, pieces: &[Bytes]) -> usize {
    let body = Body::stream(futures::stream::iter(pieces.to_vec()).map(Ok));
    let translated = Translated::new(body, Box::new(Messages).stream());
    runtime.block_on(translated.fold(0, |sum, piece| async move {
        sum + piece.map_or(0, |bytes| bytes.len()) // it ends without [DONE], which is an error and counts nothing
    }))
}

fn translate(criterion: &mut Criterion) {
    let body = request(4096);
    let exchange = Exchange::open(&http::Request::new(()).into_parts().0);
    let mut group = criterion.benchmark_group("messages");
    group.bench_function(format!("request of {} bytes", body.len()), |bencher| {
        bencher.iter(|| {
            let (chat, _) = Messages.request(black_box(&body), &exchange).unwrap();
            serde_json::to_vec(&chat).unwrap()
        });
    });
    const EVENTS: usize = 500;
    let runtime = Builder::new_current_thread().build().unwrap();
    let apart = events(EVENTS);
    let together: Vec<Bytes> = apart.chunks(50).map(|some| some.concat().into()).collect();
    group.throughput(Throughput::Elements(EVENTS as u64));
    group.bench_function("500 events, one a piece", |bencher| {
        bencher.iter(|| drain(&runtime, black_box(&apart)));
    });
    group.bench_function("500 events, fifty a piece", |bencher| {
        bencher.iter(|| drain(&runtime, black_box(&together)));
    });
    group.finish();
}

criterion_group!(benches, translate);
criterion_main!(benches);
