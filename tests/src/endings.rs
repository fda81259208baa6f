//! How exchanges end, whatever happens to nodes and network, and that nothing is left of them.

use crate::daemon::Cortex;
use crate::until;
use serde_json::{Value, json};
use std::time::Duration;

/// Longer than any bound that the gateway is given where requests are to end.
const DEADLINE: Duration = Duration::from_secs(20);

/// How a chat with `model` ended, in a word; see [`ending_of`].
pub async fn ending(cortex: &Cortex, model: &str, stream: bool) -> String {
    let body = json!({"model": model, "stream": stream, "messages": []});
    ending_of(cortex, &body).await
}

/// How an exchange ended, in a word: `answer`, `error event`, the status of an error, `unreachable` or `cut`.
///
/// # Panics
/// If it did not end within its deadline, or an error had no type.
pub async fn ending_of(cortex: &Cortex, body: &Value) -> String {
    let exchange = async {
        let reply = cortex
            .client
            .post(format!("{}/v1/chat/completions", cortex.api))
            .body(body.to_string())
            .send()
            .await
            .map_err(|_| "unreachable")?;
        let status = reply.status().as_u16();
        let text = reply.text().await.map_err(|_| "cut")?;
        Ok::<_, &str>((status, text))
    };
    let ended = tokio::time::timeout(DEADLINE, exchange).await;
    let (status, text) = match ended.expect("every request ends within its deadline") {
        Ok(ended) => ended,
        Err(how) => return how.into(),
    };
    if status != 200 {
        let body: Value = serde_json::from_str(&text).expect("an error is one in JSON");
        assert!(body["error"]["type"].is_string(), "{status} {text}");
        return status.to_string();
    }
    // a node that answers with something else than a stream is believed; one that begins a stream has to end it
    let torn = text.contains("data: ") && !text.contains("[DONE]");
    if torn {
        assert!(
            text.contains("\"error\""),
            "a stream that breaks says so: {text}"
        );
        return "error event".into();
    }
    "answer".into()
}

/// Waits until everything that requests took has been given back.
///
/// # Panics
/// When something is not.
pub async fn nothing_is_left(cortex: &Cortex, files_before: usize, clients: usize) {
    until("nothing is in flight", || async {
        let gauge = "cortex_requests_in_flight{route=\"chat\"}";
        let waiting = cortex.metric("cortex_requests_waiting").await;
        let status = cortex.client.get(format!("{}/status", cortex.admin));
        let status: Value = status.send().await.ok()?.json().await.ok()?;
        let nodes = status["nodes"].as_array()?.iter();
        let held: u64 = nodes.filter_map(|node| node["in_flight"].as_u64()).sum();
        (cortex.metric(gauge).await == Some(0.0) && waiting == Some(0.0) && held == 0).then_some(())
    })
    .await;
    // connections that wait for their next request are kept: one for each client, and to each of at most two nodes
    let files = cortex.open_files();
    let most = files_before + 3 * clients + 20;
    assert!(files <= most, "{files_before} files became {files}");
}
