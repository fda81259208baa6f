//! Request bodies: read within bounds, and errors that name the field at fault.

use axum::body::Body;
use axum::http::{HeaderMap, header};
use futures::StreamExt;
use protocol::{ApiError, ErrorKind};
use serde::de::DeserializeOwned;
use serde_json::Value;
use std::time::Duration;

/// Between two pieces of a body. A client that sends half a request must not hold a place for ever.
const PIECE_TIMEOUT: Duration = Duration::from_secs(30);

/// One field of a request: its name, whether a value is of its type, and how the type is called.
pub(super) type Field = (&'static str, fn(&Value) -> bool, &'static str);

/// Whether `value` can be read as `T`; absent fields read as null.
pub(super) fn is<T: DeserializeOwned>(value: &Value) -> bool {
    T::deserialize(value).is_ok()
}

/// The whole body, if it is no longer than `limit` bytes.
///
/// # Errors
/// 413, 408, or 400 when the client went away half-way.
pub(super) async fn read(
    headers: &HeaderMap,
    body: Body,
    limit: usize,
) -> Result<Vec<u8>, ApiError> {
    let too_large = || {
        let message = format!("the body is longer than the {limit} bytes allowed here");
        ApiError::new(ErrorKind::PayloadTooLarge, message)
    };
    let announced = headers
        .get(header::CONTENT_LENGTH)
        .and_then(|length| length.to_str().ok()?.parse::<usize>().ok());
    if announced.is_some_and(|length| length > limit) {
        return Err(too_large());
    }
    let mut bytes = Vec::with_capacity(announced.unwrap_or(0));
    let mut pieces = body.into_data_stream();
    loop {
        let piece = tokio::time::timeout(PIECE_TIMEOUT, pieces.next())
            .await
            .map_err(|_| {
                ApiError::new(ErrorKind::RequestTimeout, "the body did not arrive in time")
            })?;
        let Some(piece) = piece else {
            return Ok(bytes);
        };
        let piece = piece.map_err(|error| {
            ApiError::new(
                ErrorKind::InvalidRequest,
                "the body ended before it was whole",
            )
            .caused_by(error)
        })?;
        if bytes.len() + piece.len() > limit {
            return Err(too_large());
        }
        bytes.extend_from_slice(&piece);
    }
}

/// The body as `T`. The fields of `lists` are asked which of them is at fault when it is not.
///
/// # Errors
/// 400 with `param` set where one field is wrong.
pub(super) fn parse<T: DeserializeOwned>(bytes: &[u8], lists: &[&[Field]]) -> Result<T, ApiError> {
    let error = match serde_json::from_slice(bytes) {
        Ok(request) => return Ok(request),
        Err(error) => error,
    };
    let value: Value = serde_json::from_slice(bytes).map_err(|error| {
        ApiError::new(
            ErrorKind::InvalidRequest,
            format!("the body is not valid JSON: {error}"),
        )
    })?;
    if !value.is_object() {
        let message = "the body must be a JSON object";
        return Err(ApiError::new(ErrorKind::InvalidRequest, message));
    }
    for (name, fits, kind) in lists.iter().copied().flatten() {
        if fits(&value[*name]) {
            continue;
        }
        if let Some(error) = fault_in_messages(name, &value[*name]) {
            return Err(error);
        }
        let message = match &value[*name] {
            Value::Null => format!("`{name}` is missing; it must be {kind}"),
            _ => format!("`{name}` must be {kind}"),
        };
        return Err(ApiError::invalid(*name, message));
    }
    Err(ApiError::new(ErrorKind::InvalidRequest, error.to_string()))
}

/// Which message is at fault, and what in it.
fn fault_in_messages(name: &str, value: &Value) -> Option<ApiError> {
    use protocol::chat::{Content, Message, ThinkingBlock, ToolCall};
    let messages = value.as_array().filter(|_| name == "messages")?;
    let (index, message) = messages
        .iter()
        .enumerate()
        .find(|(_, message)| !is::<Message>(message))?;
    let parts: [Field; 5] = [
        ("role", is::<String>, "a string"),
        (
            "content",
            is::<Option<Content>>,
            "a string or a list of parts of type `text` or `image_url`",
        ),
        ("reasoning_content", is::<Option<String>>, "a string"),
        (
            "thinking_blocks",
            is::<Option<Vec<ThinkingBlock>>>,
            "a list of blocks with `type`",
        ),
        (
            "tool_calls",
            is::<Option<Vec<ToolCall>>>,
            "a list of calls with `id` and `function`: `name` and `arguments`, both strings",
        ),
    ];
    let part = parts.iter().find(|(part, fits, _)| !fits(&message[*part]));
    Some(match part {
        Some((part, _, kind)) if message.is_object() => {
            let param = format!("messages[{index}].{part}");
            let message = format!("`{param}` must be {kind}");
            ApiError::invalid(param, message)
        }
        _ => {
            let param = format!("messages[{index}]");
            let message =
                format!("`{param}` must be a message: an object with `role` and `content`");
            ApiError::invalid(param, message)
        }
    })
}
