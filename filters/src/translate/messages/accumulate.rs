//! A streamed message put together as the SDKs do, and more strictly: tests and fuzz targets hold streams against it.

use protocol::sse::{Decoder, Event};
use serde_json::Value;
use std::collections::HashSet;

/// What a stream says in the end: each block's kind, and its text or arguments.
pub(super) type Said = Vec<(String, String)>;

/// Everything a stream says; `Err` with what it said before where an error ended it.
///
/// # Panics
/// When something in it does not fit together.
pub(super) fn accumulate(stream: &[u8]) -> Result<Said, Said> {
    let mut events = Vec::new();
    let mut decoder = Decoder::new(1 << 20);
    decoder.feed(stream, &mut events).expect("short events");
    assert!(decoder.is_idle(), "the last event is whole");
    let mut said: Said = Vec::new();
    let mut ids = HashSet::new();
    let mut open = false;
    let mut last = String::new();
    for event in events {
        let Event::Message { name, data } = event else {
            panic!("a comment: {event:?}");
        };
        let event: Value = serde_json::from_slice(&data).expect("JSON");
        assert_eq!(event["type"], name.as_str());
        assert!(
            last != "message_stop" && last != "error",
            "nothing comes after the end"
        );
        match name.as_str() {
            "message_start" => assert_eq!(last, "", "it comes first, once"),
            "content_block_start" => {
                assert!(!open && !last.is_empty(), "blocks follow one another");
                assert_ne!(last, "message_delta", "and come before the end");
                assert_eq!(event["index"], said.len());
                open = true;
                let block = &event["content_block"];
                let mut kind = block["type"].as_str().expect("a type").to_owned();
                if kind == "tool_use" {
                    let id = block["id"].as_str().expect("an id");
                    assert!(ids.insert(id.to_owned()), "a result would answer two calls");
                    kind += &format!(" {id} {}", block["name"].as_str().expect("a name"));
                }
                said.push((kind, String::new()));
            }
            "content_block_delta" => {
                assert!(open, "a piece is of an open block");
                assert_eq!(event["index"], said.len() - 1);
                let (block, sum) = said.last_mut().expect("one is open");
                let delta = &event["delta"];
                let piece = match delta["type"].as_str().expect("a type") {
                    "text_delta" if block == "text" => &delta["text"],
                    "thinking_delta" if block == "thinking" => &delta["thinking"],
                    "signature_delta" if block == "thinking" => &delta["signature"],
                    "input_json_delta" if block.starts_with("tool_use") => &delta["partial_json"],
                    other => panic!("a {other} in a {block} block"),
                };
                *sum += piece.as_str().expect("a string");
            }
            "content_block_stop" => {
                assert!(std::mem::replace(&mut open, false));
                assert_eq!(event["index"], said.len() - 1);
            }
            "message_delta" => assert!(!open && !last.is_empty() && last != "message_delta"),
            "message_stop" => assert_eq!(last, "message_delta"),
            "error" => assert!(event["error"]["message"].is_string()),
            "ping" => continue, // it may come anywhere
            other => panic!("an event of type {other}"),
        }
        last = name;
    }
    match last.as_str() {
        "message_stop" => Ok(said),
        "error" => Err(said),
        other => panic!("the last event is {other:?}"),
    }
}
