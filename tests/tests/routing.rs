//! Which node gets a request, and what happens when one fails.

#![allow(missing_docs, clippy::unwrap_used)]

use reqwest::StatusCode;
use serde_json::json;
use tests::daemon::{Cortex, free_address};
use tests::fake_node::{FakeNode, Script, words};

#[tokio::test]
async fn models_of_all_nodes_and_the_catalogue_are_one_list() {
    let a = FakeNode::start("a")
        .await
        .holding("m", 100)
        .holding("only-a", 100);
    let b = FakeNode::start("b").await.holding("m", 100);
    let models = "[[models]]\nid = \"cold\"\nsource = \"/models/cold\"\naliases = [\"frosty\"]";
    let cortex = Cortex::start(&[("a", a.address), ("b", b.address)], models, "").await;
    let list: serde_json::Value = cortex
        .client
        .get(format!("{}/v1/models", cortex.api))
        .send()
        .await
        .unwrap()
        .json()
        .await
        .unwrap();
    let rows: Vec<_> = list["data"]
        .as_array()
        .unwrap()
        .iter()
        .map(|card| format!("{} {} {}", card["id"], card["state"], card["nodes"]).replace('"', ""))
        .collect();
    assert_eq!(
        rows,
        ["cold available null", "m loaded [a,b]", "only-a loaded [a]"]
    );
    let card: serde_json::Value = cortex
        .client
        .get(format!("{}/v1/models/frosty", cortex.api))
        .send()
        .await
        .unwrap()
        .json()
        .await
        .unwrap();
    assert_eq!(card["id"], "cold", "an alias leads to its model");
}

#[tokio::test]
async fn requests_spread_over_idle_nodes_and_name_the_one_that_answered() {
    let a = FakeNode::start("a").await.holding("m", 100);
    let b = FakeNode::start("b").await.holding("m", 100);
    let nodes = [("a", a.address), ("b", b.address)];
    let cortex = Cortex::start(&nodes, "", "routing = \"round_robin\"").await;
    let request = json!({"model": "m", "messages": []});
    for _ in 0..4 {
        let reply = cortex.post("/v1/chat/completions", &request).await;
        let node = reply.headers()["x-cortex-node"]
            .to_str()
            .unwrap()
            .to_owned();
        let body: serde_json::Value = reply.json().await.unwrap();
        assert_eq!(body["choices"][0]["message"]["content"], node);
    }
    assert_eq!((a.seen().len(), b.seen().len()), (2, 2));
}

#[tokio::test]
async fn a_dead_node_costs_no_request() {
    let alive = FakeNode::start("alive").await.holding("m", 100);
    let dying = FakeNode::start("dying").await.holding("m", 100);
    let nodes = [("dying", dying.address), ("alive", alive.address)];
    // polls are too rare to notice: it has to show on the request itself
    let cortex = Cortex::start(&nodes, "", "[fleet]\npoll = \"1h\"\n").await;
    drop(dying);
    for _ in 0..6 {
        let (status, body) = cortex
            .ask(
                "/v1/chat/completions",
                &json!({"model": "m", "messages": []}),
            )
            .await;
        assert_eq!(
            (status, &body["choices"][0]["message"]["content"]),
            (StatusCode::OK, &json!("alive"))
        );
    }
}

#[tokio::test]
async fn a_full_or_draining_node_is_passed_over_and_its_refusal_told_when_all_are() {
    let full = FakeNode::start("full").await.holding("m", 100);
    let busy = json!({"error": {"message": "queue full", "type": "rate_limit_error", "code": "rate_limit_exceeded"}});
    full.script(Script::Refuse(429, busy.clone()));
    let other = FakeNode::start("other").await.holding("m", 100);
    let nodes = [("full", full.address), ("other", other.address)];
    let cortex = Cortex::start(&nodes, "", "").await;
    let request = json!({"model": "m", "messages": []});
    for _ in 0..4 {
        assert_eq!(
            cortex.ask("/v1/chat/completions", &request).await.0,
            StatusCode::OK
        );
    }
    other.script(Script::Refuse(429, busy));
    let (status, body) = cortex.ask("/v1/chat/completions", &request).await;
    assert_eq!(
        (status, &body["error"]["message"]),
        (StatusCode::TOO_MANY_REQUESTS, &json!("queue full"))
    );
}

/// What a client sees of a stream whose node dies once its words have come through.
async fn torn_stream(
    cortex: &Cortex,
    node: &FakeNode,
    path: &str,
    request: &serde_json::Value,
) -> String {
    let mut reply = cortex.post(path, request).await;
    let mut text = String::new();
    while let Some(piece) = reply.chunk().await.unwrap() {
        text += &String::from_utf8_lossy(&piece);
        if text.contains("two ") {
            node.step();
        }
    }
    text
}

#[tokio::test]
async fn a_node_that_dies_mid_stream_gives_an_error_event_and_the_next_request_goes_elsewhere() {
    let dying = FakeNode::start("dying").await.holding("m", 100);
    let mut torn = words(&["one ", "two "]);
    torn.truncate(3);
    dying.script(Script::Tear(torn));
    let spare = free_address();
    let cortex = Cortex::spawn(&[("dying", dying.address), ("spare", spare)], "", "").await;
    cortex.sees(&[("dying", "up"), ("spare", "down")]).await;
    let request = json!({"model": "m", "stream": true, "max_tokens": 9, "messages": []});
    let openai = torn_stream(&cortex, &dying, "/v1/chat/completions", &request).await;
    assert!(
        openai.contains("one ") && openai.contains("data: {\"error\":"),
        "{openai}"
    );
    assert!(
        !openai.contains("[DONE]"),
        "no stream ends well after a failure: {openai}"
    );
    let anthropic = torn_stream(&cortex, &dying, "/v1/messages", &request).await;
    assert!(
        anthropic.contains("two ") && anthropic.contains("event: error\n"),
        "{anthropic}"
    );
    assert!(!anthropic.contains("message_stop"), "{anthropic}");

    drop(dying);
    let fresh = FakeNode::start_at("spare", spare).await.holding("m", 100);
    cortex.sees(&[("dying", "down"), ("spare", "up")]).await;
    let (status, body) = cortex
        .ask(
            "/v1/chat/completions",
            &json!({"model": "m", "messages": []}),
        )
        .await;
    assert_eq!(
        (status, &body["choices"][0]["message"]["content"]),
        (StatusCode::OK, &json!("spare"))
    );
    assert_eq!(fresh.seen().len(), 1);
}

#[tokio::test]
async fn a_clients_credentials_stop_at_the_gateway() {
    let node = FakeNode::start("a").await.holding("m", 100);
    let cortex = Cortex::start(&[("a", node.address)], "", "").await;
    let reply = cortex
        .client
        .post(format!("{}/v1/chat/completions", cortex.api))
        .header("authorization", "Bearer secret")
        .header("x-api-key", "secret")
        .header("cookie", "secret")
        .header("x-request-id", "abc-1")
        .body(r#"{"model":"m","messages":[]}"#)
        .send()
        .await
        .unwrap();
    assert_eq!(reply.headers()["x-request-id"], "abc-1");
    let seen = &node.seen()[0];
    assert_eq!(seen.headers["x-request-id"], "abc-1", "one id on every hop");
    let leaked = seen
        .headers
        .values()
        .any(|value| value.as_bytes().windows(6).any(|part| part == b"secret"));
    assert!(!leaked, "{:?}", seen.headers);
    assert!(!cortex.daemon.log().join("\n").contains("secret"));
}

#[tokio::test]
async fn a_conversation_stays_where_its_beginning_was_read() {
    let nodes = [
        FakeNode::start("a").await.holding("m", 100),
        FakeNode::start("b").await.holding("m", 100),
        FakeNode::start("c").await.holding("m", 100),
    ];
    let at = [
        ("a", nodes[0].address),
        ("b", nodes[1].address),
        ("c", nodes[2].address),
    ];
    let cortex = Cortex::start(&at, "", "routing = \"prefix_affinity\"").await;
    for conversation in 0..6 {
        let mut messages = Vec::new();
        let mut homes = Vec::new();
        for turn in 0..4 {
            let text = format!("conversation {conversation}, turn {turn}. ").repeat(20);
            messages.push(json!({"role": "user", "content": text}));
            let request = json!({"model": "m", "messages": messages});
            let reply = cortex.post("/v1/chat/completions", &request).await;
            homes.push(reply.headers()["x-cortex-node"].clone());
        }
        assert!(homes.iter().all(|home| *home == homes[0]), "{homes:?}");
    }
    let by_prefix = cortex
        .metric("cortex_route_picks_total{by=\"prefix\"}")
        .await;
    assert_eq!(by_prefix, Some(18.0));
}

#[tokio::test]
async fn a_session_has_one_node() {
    let a = FakeNode::start("a").await.holding("m", 100);
    let b = FakeNode::start("b").await.holding("m", 100);
    let nodes = [("a", a.address), ("b", b.address)];
    let cortex = Cortex::start(&nodes, "", "").await;
    let mut homes = Vec::new();
    for _ in 0..8 {
        let reply = cortex
            .client
            .post(format!("{}/v1/chat/completions", cortex.api))
            .header("x-session-id", "s-1")
            .body(r#"{"model":"m","messages":[]}"#)
            .send()
            .await
            .unwrap();
        homes.push(reply.headers()["x-cortex-node"].clone());
    }
    assert!(homes.iter().all(|home| *home == homes[0]), "{homes:?}");
}
