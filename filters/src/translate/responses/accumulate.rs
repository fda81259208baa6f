//! A streamed response taken as an SDK takes it, and more strictly: tests and fuzz targets hold streams against it.

use protocol::sse::{Decoder, Event};
use serde_json::{Value, json};
use std::collections::{BTreeMap, HashSet};

/// Everything a stream says.
pub(super) struct Accumulated {
    /// The response of the last event.
    pub(super) response: Value,
    /// The types of all events, in order.
    pub(super) kinds: Vec<String>,
}

/// # Panics
/// When something in it does not fit together.
pub(super) fn accumulate(stream: &[u8]) -> Accumulated {
    let mut events = Vec::new();
    let mut decoder = Decoder::new(1 << 20);
    decoder.feed(stream, &mut events).expect("is a stream");
    assert!(decoder.is_idle(), "the last event is whole");
    let mut kinds: Vec<String> = Vec::new();
    let mut id = Value::Null;
    let mut open: BTreeMap<u64, Value> = BTreeMap::new(); // as added, with what the deltas brought
    let mut done: BTreeMap<u64, Value> = BTreeMap::new();
    let mut last = Value::Null;
    for event in events {
        let Event::Message { name, data } = event else {
            continue;
        };
        let event: Value = serde_json::from_slice(&data).expect("is JSON");
        assert_eq!(event["type"], name.as_str());
        assert_eq!(event["sequence_number"], kinds.len(), "numbers have no gap");
        assert!(last.is_null(), "nothing comes after the end");
        let at = event["output_index"].as_u64();
        let item = at.and_then(|at| open.get_mut(&at));
        if let Some(item_id) = event.get("item_id") {
            let item = item.as_ref().expect("its item was added");
            assert_eq!(item["id"], *item_id);
            assert!(
                !done.contains_key(&at.unwrap_or_default()),
                "its item is not over"
            );
        }
        match name.as_str() {
            "response.created" => {
                assert!(kinds.is_empty(), "it comes first");
                id = event["response"]["id"].clone();
                assert_eq!(event["response"]["status"], "in_progress");
            }
            "response.in_progress" => assert_eq!(event["response"]["id"], id),
            "response.output_item.added" => {
                let at = at.expect("has a place");
                assert_eq!(at as usize, open.len(), "items are added in order");
                let mut item = event["item"].clone();
                assert_eq!(item["status"], "in_progress");
                for list in ["content", "summary"] {
                    if let Some(list) = item.get(list) {
                        assert_eq!(*list, json!([]));
                    }
                }
                item["text"] = "".into();
                open.insert(at, item);
            }
            "response.content_part.added" | "response.reasoning_summary_part.added" => {
                assert_eq!(event["part"]["text"], "");
                item.expect("was added")["part"] = event["part"].clone();
            }
            "response.output_text.delta"
            | "response.reasoning_text.delta"
            | "response.reasoning_summary_text.delta"
            | "response.function_call_arguments.delta" => {
                let item = item.expect("was added");
                let text = item["text"].as_str().expect("text").to_owned();
                let delta = event["delta"].as_str().expect("text");
                assert!(!delta.is_empty());
                item["text"] = (text + delta).into();
            }
            "response.output_text.done"
            | "response.reasoning_text.done"
            | "response.reasoning_summary_text.done" => {
                assert_eq!(event["text"], item.expect("was added")["text"]);
            }
            "response.content_part.done" | "response.reasoning_summary_part.done" => {
                assert_eq!(event["part"]["text"], item.expect("was added")["text"]);
            }
            "response.function_call_arguments.done" => {
                assert_eq!(event["arguments"], item.expect("was added")["text"]);
            }
            "response.output_item.done" => {
                let (item, whole) = (item.expect("was added"), &event["item"]);
                assert_eq!(item["id"], whole["id"]);
                assert_eq!(item["call_id"], whole["call_id"], "an item stays the same");
                let parts = [&whole["content"][0]["text"], &whole["summary"][0]["text"]];
                assert!(
                    parts.contains(&&item["text"]) || whole["arguments"] == item["text"],
                    "{whole} says what was streamed: {item}"
                );
                assert!(
                    done.insert(at.expect("has a place"), whole.clone())
                        .is_none()
                );
            }
            "response.completed" | "response.incomplete" => {
                last = event["response"].clone();
                let output: Vec<Value> = done.values().cloned().collect();
                assert_eq!(last["output"], Value::from(output), "all items are over");
                assert_eq!(
                    format!("response.{}", last["status"].as_str().unwrap_or("")),
                    name
                );
            }
            "error" => assert_eq!(event["message"], event["error"]["message"]),
            "response.failed" => {
                assert_eq!(kinds.last().map(String::as_str), Some("error"));
                last = event["response"].clone();
                assert_eq!(last["output"].as_array().map(Vec::len), Some(open.len()));
            }
            other => panic!("there is no event {other}"),
        }
        kinds.push(name);
    }
    assert_eq!(last["id"], id, "the stream has an end");
    let ids = open.values().map(|item| item["id"].to_string());
    let calls = open
        .values()
        .filter_map(|item| Some(item.get("call_id")?.to_string()));
    let all: Vec<String> = ids.chain(calls).collect();
    assert_eq!(
        all.iter().collect::<HashSet<_>>().len(),
        all.len(),
        "ids are unique: {all:?}"
    );
    Accumulated {
        response: last,
        kinds,
    }
}
