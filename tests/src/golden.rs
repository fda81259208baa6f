//! Golden folders of dialect cases: what the client sent, what went upstream, what came back, what the client saw.
//!
//! A case holds `path`, `request.json`, `upstream.json` (the canonical request it becomes) and either
//! `answer.json` → `reply.json` or `answer.sse` → `reply.sse`. Set `UPDATE_GOLDEN=1` to write what is seen instead.

use bytes::Bytes;
use filters::rescue::RescueLayer;
use filters::translate::TranslateLayer;
use filters::{Body, Request, Response, ResponseFuture};
use futures::StreamExt;
use http::header::CONTENT_TYPE;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use serde_json::Value;
use std::fs;
use std::path::Path;
use std::sync::{Arc, Mutex};
use tower::{Layer, Service};

/// Runs one case, its stream cut whole, byte by byte, and at seeded random places.
pub async fn check(case: &Path) {
    let name = case.file_name().unwrap().to_string_lossy().into_owned();
    let path = fs::read_to_string(case.join("path")).unwrap();
    let sent = fs::read(case.join("request.json")).unwrap();
    let streamed = case.join("answer.sse").is_file();
    let answer = fs::read(case.join(if streamed {
        "answer.sse"
    } else {
        "answer.json"
    }))
    .unwrap();
    for seed in 0..40 {
        let pieces = if streamed {
            cut(&answer, seed)
        } else {
            vec![answer.clone()]
        };
        let (upstream, reply) = run(path.trim(), &sent, pieces, streamed).await;
        compare_json(&case.join("upstream.json"), &upstream, &name);
        if streamed {
            compare_text(
                &case.join("reply.sse"),
                &reply,
                &format!("{name}, seed {seed}"),
            );
        } else {
            compare_json(&case.join("reply.json"), reply.as_bytes(), &name);
            break;
        }
    }
}

/// Seed 0 is one piece, seed 1 single bytes, the others random.
fn cut(answer: &[u8], seed: u64) -> Vec<Vec<u8>> {
    let mut random = StdRng::seed_from_u64(seed);
    let mut rest = answer;
    let mut pieces = Vec::new();
    while !rest.is_empty() {
        let length = match seed {
            0 => rest.len(),
            1 => 1,
            _ => random.random_range(1..=rest.len().min(90)),
        };
        let (piece, after) = rest.split_at(length);
        pieces.push(piece.to_vec());
        rest = after;
    }
    pieces
}

/// What went upstream, and what the client saw.
async fn run(path: &str, sent: &[u8], pieces: Vec<Vec<u8>>, streamed: bool) -> (Vec<u8>, String) {
    let request = http::Request::post(path).header("x-request-id", "golden");
    let (head, ()) = request.body(()).unwrap().into_parts();
    let request = Request::new(head, Bytes::copy_from_slice(sent));
    let seen = Arc::new(Mutex::new(Vec::new()));
    let kept = seen.clone();
    let node = tower::service_fn(move |request: Request| -> ResponseFuture {
        *kept.lock().unwrap() = request.body.to_vec();
        let pieces: Vec<Bytes> = pieces
            .iter()
            .map(|piece| Bytes::copy_from_slice(piece))
            .collect();
        let body = if streamed {
            Body::stream(futures::stream::iter(pieces).map(Ok))
        } else {
            Body::whole(pieces[0].clone())
        };
        let response = http::Response::builder()
            .header(CONTENT_TYPE, "text/event-stream")
            .body(body)
            .unwrap();
        Box::pin(std::future::ready(Ok::<Response, _>(response)))
    });
    // errors are part of what a client sees
    let mut stack = RescueLayer.layer(TranslateLayer.layer(node));
    let Ok(response) = stack.call(request).await;
    let reply = response.into_body().collect(1 << 20).await.unwrap();
    let upstream = seen.lock().unwrap().clone();
    (upstream, keyless(std::str::from_utf8(&reply).unwrap()))
}

/// The reply with a fixed key in the ids of a response, which are drawn at random.
fn keyless(reply: &str) -> String {
    let key = reply
        .split_once("\"resp_")
        .and_then(|(_, rest)| rest.get(..32));
    key.map_or_else(|| reply.into(), |key| reply.replace(key, "KEY"))
}

/// Whether what is seen is to be written down instead of compared.
#[must_use]
pub fn updating() -> bool {
    std::env::vars().any(|(name, _)| name == "UPDATE_GOLDEN")
}

fn compare_json(file: &Path, seen: &[u8], name: &str) {
    let seen: Value = serde_json::from_slice(seen).unwrap();
    if updating() {
        fs::write(file, format!("{seen:#}\n")).unwrap();
    }
    let expected: Value = serde_json::from_slice(&fs::read(file).unwrap()).unwrap();
    assert_eq!(seen, expected, "{name}: {}", file.display());
}

fn compare_text(file: &Path, seen: &str, name: &str) {
    if updating() {
        fs::write(file, seen).unwrap();
    }
    assert_eq!(
        seen,
        fs::read_to_string(file).unwrap(),
        "{name}: {}",
        file.display()
    );
}
