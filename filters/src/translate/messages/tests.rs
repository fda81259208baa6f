//! The tables held true, and streams of every shape.

use super::accumulate::{Said, accumulate};
use super::{Messages, rows};
use crate::translate::fields::Fate;
use crate::translate::{Answer, Dialect, Translated, Translation, Translator};
use crate::{Body, Exchange};
use bytes::Bytes;
use futures::StreamExt;
use protocol::chat::{ChatChunk, ChatRequest};
use protocol::{ApiError, ErrorKind};
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};
use serde_json::{Map, Value, json};

pub(super) fn to_chat(request: &Value) -> Result<ChatRequest, ApiError> {
    let exchange = Exchange::open(&http::Request::new(()).into_parts().0);
    let (chat, _) = Messages.request(request.to_string().as_bytes(), &exchange)?;
    Ok(chat)
}

fn translate(request: &Value) -> Result<Value, ApiError> {
    let chat = to_chat(request)?;
    Ok(serde_json::to_value(chat).expect("it serialises"))
}

pub(super) fn plain() -> Value {
    json!({"model": "m", "max_tokens": 9, "messages": [{"role": "user", "content": "hi"}]})
}

/// Whether `name` is a key anywhere in `value`.
fn has_key(value: &Value, name: &str) -> bool {
    match value {
        Value::Object(map) => {
            map.contains_key(name) || map.values().any(|inner| has_key(inner, name))
        }
        Value::Array(list) => list.iter().any(|inner| has_key(inner, name)),
        _ => false,
    }
}

#[test]
fn every_row_of_the_table_is_true() {
    let before = translate(&plain()).expect("a plain request");
    for row in rows() {
        let sample: Map<String, Value> = serde_json::from_str(row.sample)
            .unwrap_or_else(|error| panic!("{}: {error}", row.name));
        let mut request = plain();
        request
            .as_object_mut()
            .expect("an object")
            .extend(sample.clone());
        let after = translate(&request);
        match row.fate {
            Fate::Honoured(_) | Fate::Accepted(_) => {
                after.unwrap_or_else(|error| panic!("{}: {error}", row.name));
            }
            Fate::Becomes(target) => {
                let after = after.unwrap_or_else(|error| panic!("{}: {error}", row.name));
                let key = target.rsplit('.').next().expect("a last word");
                assert_ne!(after, before, "{} changes nothing", row.name);
                assert!(has_key(&after, key), "{}: no {key} in {after}", row.name);
            }
            Fate::Refused(_) => {
                let error = after.expect_err(row.name);
                assert_eq!(error.kind, ErrorKind::InvalidRequest, "{}", row.name);
                let param = error.param.expect("a refusal names its field");
                assert!(
                    error.message.starts_with(&param),
                    "{}: {}",
                    row.name,
                    error.message
                );
            }
        }
    }
}

#[test]
fn what_is_wrong_is_named_by_its_place() {
    let cases = [
        (json!({"max_tokens": null}), "max_tokens"),
        (json!({"max_tokens": "x"}), "max_tokens"),
        (json!({"messages": null}), "messages"),
        (json!({"messages": "hi"}), "messages"),
        (
            json!({"messages": [{"role": "user", "content": 7}]}),
            "messages.0.content",
        ),
        (
            json!({"messages": [{"role": "robot", "content": "x"}]}),
            "messages.0.role",
        ),
        (
            json!({"messages": [{"role": "user", "content": [{"type": "text"}]}]}),
            "messages.0.content.0.text",
        ),
        (
            json!({"messages": [{"role": "user", "content": [{"type": "text", "text": 1}]}]}),
            "messages.0.content.0.text",
        ),
        (
            json!({"messages": [
                {"role": "assistant", "content": [{"type": "tool_use", "id": "c", "name": "t", "input": 3}]},
                {"role": "user", "content": "x"},
            ]}),
            "messages.0.content.0.input",
        ),
        (json!({"stop": ["x"]}), "stop"),
        (json!({"thinking": {"type": "sometimes"}}), "thinking.type"),
        (
            json!({"output_config": {"effort": "huge"}}),
            "output_config.effort",
        ),
    ];
    for (patch, place) in cases {
        let mut request = plain();
        request
            .as_object_mut()
            .expect("an object")
            .extend(patch.as_object().expect("an object").clone());
        let error = translate(&request).expect_err(place);
        assert_eq!(error.kind, ErrorKind::InvalidRequest, "{patch}");
        let param = error.param.as_deref().unwrap_or_default();
        assert!(
            place.starts_with(param) && !param.is_empty(),
            "{place}: {error}"
        );
        assert!(error.message.starts_with(param), "{error}");
    }
}

#[test]
fn what_nobody_here_knows_goes_on_to_the_node() {
    let mut request = plain();
    request["seed"] = 7.into();
    request["mirostat"] = json!({"tau": 1});
    let chat = translate(&request).expect("translates");
    assert_eq!(
        (&chat["seed"], &chat["mirostat"]),
        (&json!(7), &json!({"tau": 1}))
    );
}

#[test]
fn a_nodes_refusal_names_the_field_as_the_caller_knows_it() {
    for (chat, here) in [
        ("response_format", "output_config.format"),
        ("stop", "stop_sequences"),
        ("tools[2].function.strict", "tools.2.strict"),
        ("messages[3].content", "messages"),
        ("temperature", "temperature"),
    ] {
        let error = Messages.refusal(ApiError::invalid(chat, "no"));
        assert_eq!(error.param.as_deref(), Some(here));
    }
}

// === streams

fn word(random: &mut StdRng) -> String {
    let words = [
        "Bern",
        "snow \"deep\"",
        "ü🦀",
        "a\nb",
        "<think>",
        "x\\y",
        " ",
        "{}",
    ];
    (*words.choose(random).expect("some")).to_owned()
}

fn text_chunk(key: &str, text: &str) -> Value {
    json!({"id": "chatcmpl-1", "model": "m", "choices": [{"index": 0, "delta": {key: text}}]})
}

fn call_chunk(index: u32, head: Option<(&str, &str)>, arguments: &str) -> Value {
    let mut call = json!({"index": index, "function": {"arguments": arguments}});
    if let Some((id, name)) = head {
        call["id"] = id.into();
        call["function"]["name"] = name.into();
    }
    json!({"id": "chatcmpl-1", "model": "m", "choices": [{"index": 0, "delta": {"tool_calls": [call]}}]})
}

/// Any sequence of chunks an upstream may send, and what it says: text and thinking in turns, calls one after the other
/// or in each other's way, empty pieces, usage early or late.
fn chunks(random: &mut StdRng) -> (Vec<Value>, Said) {
    let mut chunks = vec![text_chunk("role", "assistant")];
    let mut said: Said = Vec::new();
    for _ in 0..random.random_range(0..6) {
        let (key, kind) = *[("content", "text"), ("reasoning_content", "thinking")]
            .choose(random)
            .expect("two");
        for _ in 0..random.random_range(1..4) {
            let text = if random.random_bool(0.2) {
                String::new()
            } else {
                word(random)
            };
            chunks.push(text_chunk(key, &text));
            match said.last_mut().filter(|(last, _)| last == kind) {
                _ if text.is_empty() => {}
                Some((_, sum)) => *sum += &text,
                None => said.push((kind.into(), text)),
            }
        }
        if random.random_bool(0.1) {
            chunks.push(json!({"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 1, "total_tokens": 6}}));
        }
    }
    let calls = random.random_range(0..4u32);
    let mut pieces: Vec<Vec<Value>> = (0..calls)
        .map(|index| {
            let arguments = json!({"a": word(random), "b": [1, {"c": null}]}).to_string();
            let (id, name) = (format!("call_{index}"), format!("tool{index}"));
            said.push((format!("tool_use {id} {name}"), arguments.clone()));
            let mut pieces = vec![call_chunk(index, Some((&id, &name)), "")];
            let mut rest = arguments.as_str();
            while !rest.is_empty() {
                let mut end = random.random_range(1..=rest.len());
                while !rest.is_char_boundary(end) {
                    end += 1;
                }
                pieces.push(call_chunk(index, None, &rest[..end]));
                rest = &rest[end..];
            }
            pieces.reverse();
            pieces
        })
        .collect();
    let mixed = random.random_bool(0.4);
    // calls begin in order; mixed ones go on in any
    let mut begun = 0;
    while pieces.iter().any(|pieces| !pieces.is_empty()) {
        let open: Vec<usize> = (0..pieces.len())
            .filter(|at| !pieces[*at].is_empty())
            .collect();
        let mut at = open[0];
        if mixed {
            at = *open.choose(random).expect("some");
            at = at.min(begun);
            if pieces[at].is_empty() {
                at = open[0];
            }
        }
        begun = begun.max(at + 1);
        chunks.extend(pieces[at].pop());
    }
    let finish = if calls > 0 { "tool_calls" } else { "stop" };
    chunks.push(json!({"choices": [{"index": 0, "delta": {}, "finish_reason": finish}]}));
    chunks.push(json!({"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 4, "total_tokens": 13}}));
    (chunks, said)
}

/// The chunks as an upstream may write them, cut anywhere.
fn pieces(random: &mut StdRng, chunks: &[Value]) -> Vec<Bytes> {
    let mut text = Vec::new();
    for chunk in chunks {
        let end = *["\n", "\r\n"].choose(random).expect("two");
        if random.random_bool(0.1) {
            text.extend_from_slice(b": keep-alive\n\n");
        }
        text.extend_from_slice(format!("data: {chunk}{end}{end}").as_bytes());
    }
    text.extend_from_slice(b"data: [DONE]\n\n");
    let mut rest = Bytes::from(text);
    let mut pieces = Vec::new();
    while !rest.is_empty() {
        let longest = rest
            .len()
            .min(*[3, 90, 2000].choose(random).expect("three"));
        pieces.push(rest.split_to(random.random_range(1..=longest)));
    }
    pieces
}

#[tokio::test]
async fn any_sequence_of_chunks_gives_a_stream_in_order_that_says_the_same() {
    for seed in 0..2000 {
        let mut random = StdRng::seed_from_u64(seed);
        let (chunks, said) = chunks(&mut random);
        let pieces = pieces(&mut random, &chunks).into_iter().map(Ok);
        let upstream = Body::stream(futures::stream::iter(pieces));
        let translated = Translated::new(upstream, Box::new(Messages).stream());
        let out = Body::stream(translated)
            .collect(1 << 20)
            .await
            .unwrap_or_else(|error| panic!("seed {seed}: {error}"));
        let heard = std::panic::catch_unwind(|| accumulate(&out))
            .unwrap_or_else(|_| panic!("seed {seed}: {}", String::from_utf8_lossy(&out)));
        assert_eq!(heard, Ok(said), "seed {seed}");
    }
}

/// A chunk as some upstream might send it: pieces of any kind in any order, ids twice or not at all, or no chunk.
fn any_event(random: &mut StdRng) -> String {
    let words = ["", "a", "{\"x\":", "1}", "é", "call_1"];
    let mut delta = Map::new();
    for key in ["content", "reasoning_content"] {
        if random.random_bool(0.3) {
            delta.insert(key.into(), (*words.choose(random).expect("some")).into());
        }
    }
    if random.random_bool(0.4) {
        let mut word = |share| {
            random
                .random_bool(share)
                .then(|| *words.choose(random).expect("some"))
        };
        let (id, name, arguments) = (word(0.5), word(0.5), word(0.7));
        let function = json!({"name": name, "arguments": arguments});
        let index = random.random_range(0..4);
        delta.insert(
            "tool_calls".into(),
            json!([{"index": index, "id": id, "function": function}]),
        );
    }
    let finish = random.random_bool(0.1).then_some("stop");
    let chunk = json!({"choices": [{"index": 0, "delta": delta, "finish_reason": finish}]});
    match random.random_range(0..60) {
        0 => "data: {\"error\":{\"message\":\"it broke\"}}\n\n".into(),
        1 => "data: garbage\n\n".into(),
        2 => "data: [DONE]\n\n".into(),
        3 => ": silence\n\n".into(),
        _ => format!("data: {chunk}\n\n"),
    }
}

#[tokio::test]
async fn whatever_an_upstream_sends_fits_together_and_ends_once() {
    for seed in 0..2000 {
        let mut random = StdRng::seed_from_u64(seed);
        let events: String = (0..random.random_range(0..30))
            .map(|_| any_event(&mut random))
            .collect();
        let longest = events.len().clamp(1, 200);
        let pieces: Vec<_> = events
            .as_bytes()
            .chunks(random.random_range(1..=longest))
            .map(|piece| Ok(Bytes::copy_from_slice(piece)))
            .collect();
        let mut translated = Translated::new(
            Body::stream(futures::stream::iter(pieces)),
            Box::new(Messages).stream(),
        );
        let mut out = Vec::new();
        let mut failed = false;
        while let Some(piece) = translated.next().await {
            match piece {
                Ok(bytes) => out.extend_from_slice(&bytes),
                Err(error) => {
                    failed = true;
                    out.extend_from_slice(&Messages.error_event(&error, "req-1"));
                }
            }
        }
        let heard = std::panic::catch_unwind(|| accumulate(&out))
            .unwrap_or_else(|_| panic!("seed {seed}: {}", String::from_utf8_lossy(&out)));
        assert_eq!(heard.is_err(), failed, "seed {seed}: an error is told");
    }
}

#[test]
fn a_message_starts_with_the_prompts_tokens_where_a_node_tells_them() {
    let mut translator = Box::new(Messages).stream();
    translator.prompt(7);
    let mut out = Vec::new();
    let chunk = serde_json::from_value(text_chunk("content", "x")).expect("a chunk");
    translator.chunk(&chunk, &mut out);
    let start = String::from_utf8_lossy(&out).into_owned();
    assert!(start.contains(r#""input_tokens":7"#), "{start}");
}

#[test]
fn calls_that_came_under_one_id_are_told_apart() {
    let mut translator = Box::new(Messages).stream();
    let mut out = Vec::new();
    for index in [0, 1] {
        let chunk = call_chunk(index, Some(("call_1", "look")), "{}");
        translator.chunk(&serde_json::from_value(chunk).expect("a chunk"), &mut out);
    }
    translator.finish(&mut out);
    let said = accumulate(&out).expect("it ends well");
    let kinds: Vec<&str> = said.iter().map(|(kind, _)| &kind[..]).collect();
    assert_eq!(kinds, ["tool_use call_1 look", "tool_use call_1_2 look"]);
}

#[test]
fn a_call_is_streamed_as_it_comes() {
    let mut translator = Box::new(Messages).stream();
    let mut out = Vec::new();
    let mut feed = |chunk: Value, translator: &mut Box<dyn Translator>| {
        out.clear();
        let chunk: ChatChunk = serde_json::from_value(chunk).expect("a chunk");
        translator.chunk(&chunk, &mut out);
        String::from_utf8_lossy(&out).into_owned()
    };
    feed(call_chunk(0, Some(("a", "t")), ""), &mut translator);
    let piece = feed(call_chunk(0, None, "{\"x\":"), &mut translator);
    assert!(piece.contains(r#""partial_json":"{\"x\":""#), "{piece}");
    let early = feed(call_chunk(1, Some(("b", "t")), "{}"), &mut translator);
    assert!(early.is_empty(), "the first call is not complete: {early}");
    let late = feed(call_chunk(0, None, "1}"), &mut translator);
    assert!(
        late.contains("content_block_stop") && late.contains(r#""id":"b""#),
        "{late}"
    );
}
