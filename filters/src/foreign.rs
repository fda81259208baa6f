//! A server of others gets no field that a strict one would refuse a whole conversation for.

use crate::Request;
use bytes::Bytes;
use memchr::memmem;
use serde::Deserialize;
use serde_json::value::RawValue;

/// Takes thinking blocks out of what was translated for a server of others; for `map_request` below `route`. They are there
/// for whoever keeps a conversation, no model reads them, and some servers refuse a message with a field that OpenAI does
/// not have. A client that sent them in a chat of its own means them: that passes as it is.
#[must_use]
pub fn fit(mut request: Request) -> Request {
    let endpoint = request.endpoint.as_ref();
    if endpoint.is_some_and(|endpoint| endpoint.access.foreign)
        && request.exchange.dialect.translation().is_some()
        && let Some(body) = without_thinking_blocks(&request.body)
    {
        request.body = body;
    }
    request
}

/// The body, all other bytes as they are; `None` where it has no such blocks.
fn without_thinking_blocks(body: &Bytes) -> Option<Bytes> {
    /// As translation writes it: a message begins with its role.
    const KEY: &[u8] = b",\"thinking_blocks\":";
    #[derive(Deserialize)]
    struct Asked<'a> {
        #[serde(borrow)]
        messages: Vec<Message<'a>>,
    }
    #[derive(Deserialize)]
    struct Message<'a> {
        #[serde(borrow, default)]
        thinking_blocks: Option<&'a RawValue>,
    }
    memmem::find(body, KEY)?;
    let asked: Asked<'_> = serde_json::from_slice(body).ok()?;
    let mut kept = Vec::with_capacity(body.len());
    let mut seen = 0;
    for blocks in asked
        .messages
        .iter()
        .filter_map(|said| said.thinking_blocks)
    {
        let start = blocks.get().as_ptr().addr() - body.as_ptr().addr();
        kept.extend_from_slice(body[seen..start].strip_suffix(KEY)?);
        seen = start + blocks.get().len();
    }
    if seen == 0 {
        return None;
    }
    kept.extend_from_slice(&body[seen..]);
    Some(kept.into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::translate::TranslateLayer;
    use crate::{Body, Response, ResponseFuture, route::Access, route::Candidate, route::Endpoint};
    use serde_json::{Value, json};
    use std::sync::{Arc, Mutex};
    use tower::{ServiceBuilder, ServiceExt};

    /// What a node gets of `asked`, once it is translated.
    async fn sent(path: &str, asked: &Value, foreign: bool) -> Bytes {
        let seen: Arc<Mutex<Bytes>> = Arc::default();
        let node = seen.clone();
        let upstream = tower::service_fn(move |request: Request| -> ResponseFuture {
            *node.lock().expect("no panic") = request.body;
            let reply = json!({"id": "1", "model": "m", "choices": [
                {"index": 0, "message": {"role": "assistant", "content": "x"}, "finish_reason": "stop"},
            ]});
            let reply = Response::new(Body::whole(reply.to_string()));
            Box::pin(std::future::ready(Ok(reply)))
        });
        let endpoint = Endpoint {
            access: Arc::new(Access {
                foreign,
                ..Access::default()
            }),
            ..Arc::into_inner(Candidate::example("far").endpoint).expect("nobody else has it")
        };
        let endpoint = Arc::new(endpoint);
        let stack = ServiceBuilder::new()
            .layer(TranslateLayer)
            .map_request(move |mut request: Request| {
                request.endpoint = Some(endpoint.clone());
                request
            })
            .map_request(fit)
            .service(upstream);
        let head = http::Request::post(path).body(()).expect("a request");
        let request = Request::new(head.into_parts().0, asked.to_string().into());
        stack.oneshot(request).await.expect("it is answered");
        let body = seen.lock().expect("no panic");
        body.clone()
    }

    #[tokio::test]
    async fn only_a_server_of_others_gets_no_thinking_blocks_and_only_where_they_were_translated() {
        let said = "a \",\"thinking_blocks\":[1]\" b"; // a text that looks like one
        let messages = json!([
            {"role": "user", "content": said},
            {"role": "assistant", "content": [
                {"type": "thinking", "thinking": "hm", "signature": "s"},
                {"type": "redacted_thinking", "data": "d"},
                {"type": "text", "text": "yes"},
            ]},
            {"role": "user", "content": "And?"},
        ]);
        let asked = json!({"model": "m", "max_tokens": 9, "messages": messages});
        let ours: Value =
            serde_json::from_slice(&sent("/v1/messages", &asked, false).await).expect("JSON");
        assert_eq!(ours["messages"][1]["thinking_blocks"][0]["signature"], "s");
        assert_eq!(ours["messages"][1]["thinking_blocks"][1]["data"], "d");
        let mut without = ours;
        without["messages"][1]
            .as_object_mut()
            .expect("a message")
            .shift_remove("thinking_blocks");
        let theirs = sent("/v1/messages", &asked, true).await;
        assert_eq!(
            serde_json::from_slice::<Value>(&theirs).expect("JSON"),
            without
        );
        assert_eq!(without["messages"][1]["reasoning_content"], "hm");
        let chat =
            json!({"model": "m", "messages": [{"role": "assistant", "thinking_blocks": []}]});
        let passed = sent("/v1/chat/completions", &chat, true).await;
        assert_eq!(passed, chat.to_string());
    }
}
