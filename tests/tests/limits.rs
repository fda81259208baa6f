//! Bad input gets a typed error in the caller's dialect, and never a panic or a hang.

#![allow(missing_docs, clippy::unwrap_used)]

use reqwest::StatusCode;
use serde_json::{Value, json};
use tests::daemon::Cortex;
use tests::fake_node::{FakeNode, Script};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// Sends bytes as they are and reads whatever comes until the connection closes.
async fn raw(cortex: &Cortex, bytes: &[u8]) -> String {
    let mut stream = TcpStream::connect(cortex.api.strip_prefix("http://").unwrap())
        .await
        .unwrap();
    let (mut read, mut write) = stream.split();
    let mut reply = Vec::new();
    let send = async {
        let _ = write.write_all(bytes).await; // a refusal may come before all is sent
    };
    let receive = async {
        let _ = read.read_to_end(&mut reply).await; // a reset after the refusal is fine
    };
    tokio::time::timeout(tests::PATIENCE, futures::future::join(send, receive))
        .await
        .expect("it does not hang");
    String::from_utf8_lossy(&reply).into_owned()
}

#[tokio::test]
async fn every_bad_request_is_refused_in_its_dialect() {
    let node = FakeNode::start("a").await.holding("m", 100);
    let cortex = Cortex::start(&[("a", node.address)], "", "max_body = \"1KiB\"").await;
    let long = format!(
        "{{\"model\":\"m\",\"messages\":[],\"pad\":\"{}\"}}",
        "x".repeat(2000)
    );
    let cases: [(&str, &str, &str, u16); 9] = [
        ("POST", "/v1/chat/completions", "{\"model\":", 400),
        (
            "POST",
            "/v1/chat/completions",
            "{\"model\":7,\"messages\":[]}",
            400,
        ),
        ("POST", "/v1/chat/completions", "{\"messages\":[]}", 400),
        ("POST", "/v1/chat/completions", "", 400),
        (
            "POST",
            "/v1/chat/completions",
            "{\"model\":\"nobody\",\"messages\":[]}",
            404,
        ),
        ("POST", "/v1/nothing", "{}", 404),
        ("GET", "/v1/chat/completions", "", 405),
        (
            "POST",
            "/v1/messages",
            "{\"model\":\"m\",\"messages\":\"no list\",\"max_tokens\":1}",
            400,
        ),
        ("POST", "/v1/chat/completions", &long, 413),
    ];
    for (method, path, body, status) in cases {
        let url = format!("{}{path}", cortex.api);
        let reply = cortex
            .client
            .request(method.parse().unwrap(), url)
            .body(body.to_owned())
            .send()
            .await
            .unwrap();
        assert_eq!(
            reply.status().as_u16(),
            status,
            "{method} {path} {body:.60}"
        );
        assert!(reply.headers().contains_key("x-request-id"));
        assert_eq!(reply.headers().contains_key("allow"), status == 405);
        let body: Value = reply.json().await.unwrap();
        let anthropic = path == "/v1/messages";
        assert_eq!(body["type"] == "error", anthropic, "{body}");
        assert!(
            !body["error"]["message"].as_str().unwrap().is_empty(),
            "{body}"
        );
    }
    assert_eq!(node.seen().len(), 0, "none of it reached a node");
}

#[tokio::test]
async fn what_is_not_http_is_refused_and_the_gateway_lives_on() {
    let node = FakeNode::start("a").await.holding("m", 100);
    let extra = "max_body = \"1KiB\"\n[timeouts]\nrequest_body = \"300ms\"\n";
    let cortex = Cortex::start(&[("a", node.address)], "", extra).await;
    let garbage = raw(&cortex, b"\x16\x03\x01 this is not http\r\n\r\n").await;
    assert!(
        garbage.starts_with("HTTP/1.1 400") || garbage.is_empty(),
        "{garbage}"
    );
    let mut flood = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\n".to_vec();
    for index in 0..5000 {
        flood.extend_from_slice(format!("x-flood-{index}: {}\r\n", "y".repeat(300)).as_bytes());
    }
    flood.extend_from_slice(b"\r\n");
    let flooded = raw(&cortex, &flood).await;
    assert!(
        flooded.starts_with("HTTP/1.1 4") || flooded.is_empty(),
        "{flooded:.200}"
    );
    let half = raw(
        &cortex,
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{\"mod",
    )
    .await;
    assert!(half.starts_with("HTTP/1.1 408"), "{half}");
    assert!(half.contains("\"error\""), "{half}");
    let chunked = format!(
        "POST /v1/messages HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n7d0\r\n{}\r\n0\r\n\r\n",
        "x".repeat(2000)
    );
    let chunked = raw(&cortex, chunked.as_bytes()).await;
    assert!(
        chunked.starts_with("HTTP/1.1 413") && chunked.contains("request_too_large"),
        "{chunked}"
    );
    let (status, _) = cortex
        .ask(
            "/v1/chat/completions",
            &json!({"model": "m", "messages": []}),
        )
        .await;
    assert_eq!(status, StatusCode::OK);
}

#[tokio::test]
async fn a_silent_node_is_given_up_on() {
    let node = FakeNode::start("a").await.holding("m", 100);
    let extra = "[timeouts]\nhead = \"200ms\"\nidle = \"200ms\"\n";
    let cortex = Cortex::start(&[("a", node.address)], "", extra).await;
    node.script(Script::Silent);
    let (status, body) = cortex
        .ask(
            "/v1/chat/completions",
            &json!({"model": "m", "messages": []}),
        )
        .await;
    assert_eq!(
        (status, &body["error"]["code"]),
        (StatusCode::GATEWAY_TIMEOUT, &json!("upstream_timeout"))
    );
    node.left(1).await;
    node.script(Script::Hang(vec!["data: {\"choices\":[]}\n\n".into()]));
    let stream = json!({"model": "m", "stream": true, "messages": []});
    let text = cortex
        .post("/v1/chat/completions", &stream)
        .await
        .text()
        .await
        .unwrap();
    assert!(
        text.contains("was silent") && !text.contains("[DONE]"),
        "{text}"
    );
    node.left(2).await;
}

#[tokio::test]
async fn a_nodes_garbage_becomes_a_502() {
    let node = FakeNode::start("a").await.holding("m", 100);
    let cortex = Cortex::start(&[("a", node.address)], "", "").await;
    node.script(Script::Refuse(
        500,
        json!({"error": {"message": "engine poisoned", "type": "server_error", "code": null}}),
    ));
    let (status, body) = cortex
        .ask(
            "/v1/messages",
            &json!({"model": "m", "max_tokens": 1, "messages": []}),
        )
        .await;
    assert_eq!(
        (status, &body["error"]["message"]),
        (StatusCode::BAD_GATEWAY, &json!("engine poisoned"))
    );
    node.script(Script::Stream(vec!["data: nonsense\n\n".into()]));
    let stream = json!({"model": "m", "stream": true, "max_tokens": 1, "messages": []});
    let text = cortex
        .post("/v1/messages", &stream)
        .await
        .text()
        .await
        .unwrap();
    assert!(text.starts_with("event: error\n"), "{text}");
}
