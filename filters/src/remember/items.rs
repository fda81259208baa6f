//! The items of kept responses: as one conversation to go on from, and as pages to look at.
//!
//! A conversation is put together from the very bytes its parts were sent in; only what is shown is taken apart.

use super::{Query, ResponseStore, Stored};
use bytes::Bytes;
use memchr::memmem;
use protocol::{ApiError, ErrorKind};
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use serde_json::{Value, json};
use std::borrow::Cow;
use std::sync::Arc;

/// Items a page may have.
const PAGE: std::ops::RangeInclusive<usize> = 1..=100;

/// What of a kept response is looked at here.
#[derive(Deserialize)]
struct Answered<'a> {
    #[serde(borrow)]
    status: Cow<'a, str>,
    #[serde(borrow)]
    output: Vec<&'a RawValue>,
}

fn answered(stored: &Stored) -> Result<Answered<'_>, ApiError> {
    serde_json::from_slice(&stored.response).map_err(unreadable)
}

/// Whether a response ended in an error.
pub(super) fn is_failed(stored: &Stored) -> Result<bool, ApiError> {
    Ok(answered(stored)?.status == "failed")
}

fn unreadable(error: serde_json::Error) -> ApiError {
    let message = "a kept response cannot be read";
    ApiError::new(ErrorKind::Internal, message).caused_by(error)
}

/// The items of `input` as they stand there; text becomes a message.
fn split(input: &[u8]) -> Result<Vec<Cow<'_, str>>, serde_json::Error> {
    let raw: &RawValue = serde_json::from_slice(input)?;
    if raw.get().starts_with('[') {
        let items: Vec<&RawValue> = serde_json::from_slice(input)?;
        return Ok(items.into_iter().map(|item| item.get().into()).collect());
    }
    let message = format!(
        r#"{{"type":"message","role":"user","content":{}}}"#,
        raw.get()
    );
    Ok(vec![message.into()])
}

/// A list of everything that was said in `history`, and then `input`.
pub(super) fn joined(history: &[Arc<Stored>], input: &[u8]) -> Result<Vec<u8>, ApiError> {
    let mut list = vec![b'['];
    let mut push = |item: &str| {
        if list.len() > 1 {
            list.push(b',');
        }
        list.extend_from_slice(item.as_bytes());
    };
    for stored in history {
        for item in split(&stored.input).map_err(unreadable)? {
            push(&item);
        }
        for item in answered(stored)?.output {
            push(item.get());
        }
    }
    let own = split(input)
        .map_err(|error| ApiError::invalid("input", format!("`input` cannot be read: {error}")))?;
    for item in own {
        push(&item);
    }
    list.push(b']');
    Ok(list)
}

/// `input` with each reference to an item of a kept response replaced by that item. Others stay, to be refused below.
pub(super) async fn resolve(store: &dyn ResponseStore, input: Bytes) -> Result<Bytes, ApiError> {
    #[derive(Deserialize)]
    struct Reference<'a> {
        #[serde(rename = "type", borrow)]
        kind: Cow<'a, str>,
        #[serde(borrow)]
        id: Cow<'a, str>,
    }
    if memmem::find(&input, b"item_reference").is_none() {
        return Ok(input);
    }
    let Ok(items) = serde_json::from_slice::<Vec<&RawValue>>(&input) else {
        return Ok(input);
    };
    let mut resolved = Vec::with_capacity(items.len());
    for item in items {
        let reference = serde_json::from_str::<Reference<'_>>(item.get());
        let found = match reference {
            Ok(Reference { kind, id }) if kind == "item_reference" => find(store, &id).await?,
            _ => None,
        };
        resolved.push(found.unwrap_or_else(|| item.to_owned()));
    }
    Ok(serde_json::to_vec(&resolved)
        .expect("raw values always serialise")
        .into())
}

/// The item of that id. The ids of a response's items begin like its own.
async fn find(store: &dyn ResponseStore, id: &str) -> Result<Option<Box<RawValue>>, ApiError> {
    let key = id.split_once('_').and_then(|(_, rest)| rest.get(..32));
    let Some(key) = key else {
        return Ok(None);
    };
    let Some(stored) = store.get(&format!("resp_{key}")).await? else {
        return Ok(None);
    };
    let shown = shown(&stored)?;
    let item = shown.into_iter().find(|item| item["id"] == id);
    Ok(item.map(|item| serde_json::value::to_raw_value(&item).expect("a value always serialises")))
}

/// A page of items, as this API's clients expect it.
#[derive(Serialize)]
pub(super) struct Page {
    object: &'static str,
    data: Vec<Value>,
    first_id: Value,
    last_id: Value,
    has_more: bool,
}

/// The items that the last response of `chain` was made from: newest first, unless `order` says otherwise.
pub(super) fn page(chain: &[Arc<Stored>], query: &Query) -> Result<Page, ApiError> {
    let mut items = Vec::new();
    for (index, stored) in chain.iter().enumerate() {
        let mut shown = shown(stored)?;
        if index + 1 == chain.len() {
            shown.truncate(shown.len() - answered(stored)?.output.len());
        }
        items.extend(shown);
    }
    match query.first("order") {
        None | Some("desc") => items.reverse(),
        Some("asc") => {}
        Some(_) => {
            let message = "`order` must be `asc` or `desc`";
            return Err(ApiError::invalid("order", message));
        }
    }
    if let Some(after) = query.first("after") {
        let place = items.iter().position(|item| item["id"] == after);
        let place = place.ok_or_else(|| {
            ApiError::invalid("after", format!("`after`: there is no item `{after}`"))
        })?;
        items.drain(..=place);
    }
    let limit = match query.first("limit").map(str::parse::<usize>) {
        None => 20,
        Some(Ok(limit)) if PAGE.contains(&limit) => limit,
        Some(_) => {
            let message = "`limit` must be a whole number, 1 to 100";
            return Err(ApiError::invalid("limit", message));
        }
    };
    let has_more = items.len() > limit;
    items.truncate(limit);
    let id = |item: Option<&Value>| item.map_or(Value::Null, |item| item["id"].clone());
    Ok(Page {
        object: "list",
        first_id: id(items.first()),
        last_id: id(items.last()),
        data: items,
        has_more,
    })
}

/// Input and output of a response in full: each item with its id and status.
fn shown(stored: &Stored) -> Result<Vec<Value>, ApiError> {
    let key = stored.id.strip_prefix("resp_").unwrap_or(&stored.id);
    let input = split(&stored.input).map_err(unreadable)?;
    let mut items = Vec::with_capacity(input.len());
    for (index, item) in input.iter().enumerate() {
        let item: Value = serde_json::from_str(item).map_err(unreadable)?;
        items.push(in_full(item, key, index));
    }
    for item in answered(stored)?.output {
        items.push(serde_json::from_str(item.get()).map_err(unreadable)?);
    }
    Ok(items)
}

/// An item of input with what a client may leave out.
fn in_full(mut item: Value, key: &str, index: usize) -> Value {
    let Some(fields) = item.as_object_mut() else {
        return item;
    };
    let kind = fields.entry("type").or_insert_with(|| "message".into());
    let prefix = match kind.as_str() {
        Some("message") => "msg",
        Some("function_call") => "fc",
        Some("function_call_output") => "fco",
        Some("reasoning") => "rs",
        _ => "item",
    };
    if !fields.get("id").is_some_and(Value::is_string) {
        fields.insert("id".into(), format!("{prefix}_{key}in{index:02x}").into());
    }
    if fields.get("status").is_none_or(Value::is_null) {
        fields.insert("status".into(), "completed".into());
    }
    let assistant = fields.get("role").is_some_and(|role| role == "assistant");
    if let Some(content) = fields.get_mut("content")
        && let Value::String(text) = content
    {
        let text = std::mem::take(text);
        *content = if assistant {
            json!([{"type": "output_text", "text": text, "annotations": []}])
        } else {
            json!([{"type": "input_text", "text": text}])
        };
    }
    item
}
