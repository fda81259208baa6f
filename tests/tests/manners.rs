//! HTTP as clients speak it: encodings, versions, preflights, and what comes with every answer.

#![allow(missing_docs, clippy::unwrap_used)]

use bytes::Bytes;
use flate2::Compression;
use flate2::write::GzEncoder;
use http::{HeaderMap, Method, Request, StatusCode};
use reqwest::header::{HeaderName, HeaderValue};
use serde_json::{Value, json};
use std::io::Write;
use std::sync::Arc;
use tests::daemon::{Cortex, free_address, root};
use tests::fake_node::{FakeNode, Script, words};
use tests::until;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, ServerName};
use tokio_rustls::rustls::{ClientConfig, RootCertStore};

const CHAT: &str = "/v1/chat/completions";

async fn start(extra: &str) -> (FakeNode, Cortex) {
    let node = FakeNode::start("a").await.holding("m", 100);
    let cortex = Cortex::start(&[("a", node.address)], "", extra).await;
    (node, cortex)
}

async fn connect(cortex: &Cortex) -> TcpStream {
    TcpStream::connect(cortex.api.strip_prefix("http://").unwrap())
        .await
        .unwrap()
}

/// Reads until `text` has come.
async fn read_until(stream: &mut TcpStream, text: &str) -> String {
    let mut read = Vec::new();
    let reading = async {
        while !String::from_utf8_lossy(&read).contains(text) {
            let mut piece = [0; 4096];
            let length = stream.read(&mut piece).await.unwrap();
            assert!(length > 0, "it closed: {}", String::from_utf8_lossy(&read));
            read.extend_from_slice(&piece[..length]);
        }
    };
    tokio::time::timeout(tests::PATIENCE, reading)
        .await
        .expect("it comes");
    String::from_utf8_lossy(&read).into_owned()
}

fn gzip(plain: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
    encoder.write_all(plain).unwrap();
    encoder.finish().unwrap()
}

async fn post_packed(cortex: &Cortex, encoding: &str, body: Vec<u8>) -> reqwest::Response {
    cortex
        .client
        .post(format!("{}{CHAT}", cortex.api))
        .header("content-encoding", encoding)
        .body(body)
        .send()
        .await
        .unwrap()
}

#[tokio::test]
async fn packed_bodies_are_unpacked_and_bombs_stop_at_the_limit() {
    let (node, cortex) = start("max_body = \"64KiB\"").await;
    let body = json!({"model": "m", "messages": [], "pad": "x".repeat(60_000)});
    let packed = gzip(body.to_string().as_bytes());
    let reply = post_packed(&cortex, "gzip", packed).await;
    assert_eq!(reply.status(), StatusCode::OK);
    assert_eq!(node.seen()[0].body, body);
    let bomb = post_packed(&cortex, "gzip", gzip(&vec![b' '; 8 << 20])).await;
    assert_eq!(bomb.status(), StatusCode::PAYLOAD_TOO_LARGE);
    let unknown = post_packed(&cortex, "lzma", b"{}".to_vec()).await;
    assert_eq!(unknown.status(), StatusCode::UNSUPPORTED_MEDIA_TYPE);
    assert_eq!(
        unknown.headers()["accept-encoding"],
        "gzip, deflate, zstd, br"
    );
    let error: Value = unknown.json().await.unwrap();
    assert_eq!(error["error"]["code"], "unsupported_media_type");
}

#[tokio::test]
async fn a_client_that_waits_for_leave_to_send_gets_it_or_a_refusal() {
    let (_node, cortex) = start("max_body = \"1KiB\"").await;
    let head = |length: usize| {
        format!(
            "POST {CHAT} HTTP/1.1\r\nhost: x\r\nexpect: 100-continue\r\ncontent-length: {length}\r\n\r\n"
        )
    };
    let body = r#"{"model":"m","messages":[]}"#;
    let mut stream = connect(&cortex).await;
    stream.write_all(head(body.len()).as_bytes()).await.unwrap();
    assert!(
        read_until(&mut stream, "\r\n\r\n")
            .await
            .starts_with("HTTP/1.1 100")
    );
    stream.write_all(body.as_bytes()).await.unwrap();
    assert!(
        read_until(&mut stream, "chatcmpl-1")
            .await
            .starts_with("HTTP/1.1 200")
    );
    let mut stream = connect(&cortex).await;
    stream.write_all(head(5000).as_bytes()).await.unwrap();
    let refused = read_until(&mut stream, "request_too_large").await;
    assert!(refused.starts_with("HTTP/1.1 413"), "{refused}");
}

#[tokio::test]
async fn one_connection_carries_many_requests_chunked_or_not() {
    let (node, cortex) = start("").await;
    let mut stream = connect(&cortex).await;
    let chunked = "POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n\
        9\r\n{\"model\":\r\n12\r\n\"m\",\"messages\":[]}\r\n0\r\n\r\n";
    for count in 1..=3 {
        stream.write_all(chunked.as_bytes()).await.unwrap();
        let reply = read_until(&mut stream, "chatcmpl-1").await;
        assert!(reply.starts_with("HTTP/1.1 200"), "{reply}");
        assert_eq!(node.seen().len(), count);
    }
    stream
        .write_all(b"HEAD /v1/models HTTP/1.1\r\nhost: x\r\n\r\nGET /v1/models/m HTTP/1.1\r\nhost: x\r\n\r\n")
        .await
        .unwrap();
    let both = read_until(&mut stream, "\"id\":\"m\"").await;
    assert_eq!(both.matches("HTTP/1.1 200").count(), 2, "{both}");
    assert_eq!(
        both.matches("\"id\":\"m\"").count(),
        1,
        "a HEAD has no body: {both}"
    );
}

#[tokio::test]
async fn a_page_of_an_origin_that_may_come_in_is_let_in() {
    let (_node, cortex) = start("[cors]\norigins = [\"https://chat.example.com\"]").await;
    let ask = |method: Method, origin: &'static str| {
        cortex
            .client
            .request(method, format!("{}{CHAT}", cortex.api))
            .header("origin", origin)
            .header("access-control-request-method", "POST")
            .header("access-control-request-headers", "authorization")
            .body(r#"{"model":"nobody","messages":[]}"#)
            .send()
    };
    let preflight = ask(Method::OPTIONS, "https://chat.example.com")
        .await
        .unwrap();
    assert_eq!(preflight.status(), StatusCode::NO_CONTENT);
    assert_eq!(
        preflight.headers()["access-control-allow-headers"],
        "authorization"
    );
    assert!(preflight.headers().contains_key("x-request-id"));
    let refusal = ask(Method::POST, "https://chat.example.com").await.unwrap();
    assert_eq!(refusal.status(), StatusCode::NOT_FOUND);
    assert_eq!(
        refusal.headers()["access-control-allow-origin"],
        "https://chat.example.com",
        "a page may read why it was refused"
    );
    let other = ask(Method::OPTIONS, "https://evil.example.com")
        .await
        .unwrap();
    assert_eq!(
        other.headers()["allow"],
        "POST, OPTIONS",
        "that is all it is told"
    );
    assert!(!other.headers().contains_key("access-control-allow-origin"));
}

/// Sends one chat request over HTTP/2 and reads its whole answer.
async fn over_h2<T>(io: T, authority: &str, stream: bool) -> (StatusCode, HeaderMap, String)
where
    T: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let (send, connection) = h2::client::handshake(io).await.unwrap();
    tokio::spawn(connection);
    let mut send = send.ready().await.unwrap();
    let request = Request::post(format!("http://{authority}{CHAT}"))
        .body(())
        .unwrap();
    let (response, mut body) = send.send_request(request, false).unwrap();
    let text = json!({"model": "m", "stream": stream, "messages": []}).to_string();
    body.send_data(Bytes::from(text), true).unwrap();
    let response = tokio::time::timeout(tests::PATIENCE, response)
        .await
        .expect("an answer")
        .unwrap();
    let (head, mut body) = response.into_parts();
    let mut all = Vec::new();
    while let Some(piece) = body.data().await {
        let piece = piece.unwrap();
        let _ = body.flow_control().release_capacity(piece.len());
        all.extend_from_slice(&piece);
    }
    (head.status, head.headers, String::from_utf8(all).unwrap())
}

#[tokio::test]
async fn http_2_is_spoken_to_those_who_begin_with_it() {
    let (node, cortex) = start("").await;
    let (status, headers, body) = over_h2(connect(&cortex).await, "x", false).await;
    assert_eq!(
        (status, &headers["x-cortex-node"]),
        (StatusCode::OK, &HeaderValue::from_static("a"))
    );
    assert!(body.contains("chatcmpl-1"), "{body}");
    node.script(Script::Stream(words(&["one", "two"])));
    let (status, _, body) = over_h2(connect(&cortex).await, "x", true).await;
    assert!(
        status.is_success() && body.contains("two") && body.ends_with("data: [DONE]\n\n"),
        "{body}"
    );
    node.script(Script::Silent);
    let asked = node.seen().len();
    let asking = over_h2(connect(&cortex).await, "x", true);
    tokio::select! {
        _ = asking => panic!("it never ends by itself"),
        () = node.asked(asked + 1) => {}
    }
    node.left(1).await;
}

#[tokio::test]
async fn tls_is_spoken_where_it_is_configured() {
    let address = free_address();
    let folder = root().join("tests/fixtures/tls");
    let extra = format!(
        "[tls]\nlisten = \"{address}\"\ncertificate = \"{0}/certificate.pem\"\nkey = \"{0}/key.pem\"",
        folder.display()
    );
    let (_node, _cortex) = start(&extra).await;
    let mut roots = RootCertStore::empty();
    roots
        .add(CertificateDer::from_pem_file(folder.join("certificate.pem")).unwrap())
        .unwrap();
    let mut config = ClientConfig::builder()
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.alpn_protocols = vec![b"h2".to_vec()];
    let connector = TlsConnector::from(Arc::new(config));
    let stream = until("TLS is listened for", || async {
        TcpStream::connect(address).await.ok()
    })
    .await;
    let name = ServerName::try_from("localhost").unwrap();
    let stream = connector.connect(name, stream).await.unwrap();
    assert_eq!(stream.get_ref().1.alpn_protocol(), Some(&b"h2"[..]));
    let (status, _, body) = over_h2(stream, "localhost", false).await;
    assert!(status.is_success() && body.contains("chatcmpl-1"), "{body}");
}

/// Bytes of the process that are in memory: now, or at most since the last [`forget_peak`].
fn memory(pid: u32, line: &str) -> usize {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status
        .lines()
        .find_map(|found| found.strip_prefix(line))
        .unwrap();
    line.trim()
        .trim_end_matches(" kB")
        .parse::<usize>()
        .unwrap()
        * 1024
}

fn forget_peak(pid: u32) {
    std::fs::write(format!("/proc/{pid}/clear_refs"), "5").unwrap();
}

#[tokio::test]
async fn a_large_image_costs_less_than_three_times_its_size() {
    const IMAGE: usize = 10 << 20;
    let (node, cortex) = start("").await;
    let data = "A".repeat(IMAGE);
    let anthropic = json!({"model": "m", "max_tokens": 5, "messages": [{"role": "user", "content": [
        {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": data}},
        {"type": "text", "text": "What is it?"},
    ]}]});
    let openai = json!({"model": "m", "messages": [{"role": "user", "content": [
        {"type": "image_url", "image_url": {"url": format!("data:image/png;base64,{data}")}},
    ]}]});
    let small =
        json!({"model": "m", "max_tokens": 5, "messages": [{"role": "user", "content": "hi"}]});
    let pid = cortex.daemon.child.id().unwrap();
    for (path, image) in [(CHAT, &openai), ("/v1/messages", &anthropic)] {
        assert_eq!(cortex.ask(path, &small).await.0, StatusCode::OK);
        forget_peak(pid);
        let before = memory(pid, "VmRSS:");
        let (status, reply) = cortex.ask(path, image).await;
        assert_eq!(status, StatusCode::OK, "{reply}");
        let peak = memory(pid, "VmHWM:").saturating_sub(before);
        println!(
            "{path}: {:.2} times the image at most",
            peak as f64 / IMAGE as f64
        );
        assert!(peak < 3 * IMAGE, "{path}: {peak} bytes");
    }
    let seen = node.seen().pop().unwrap().body;
    let url = seen["messages"][0]["content"][0]["image_url"]["url"]
        .as_str()
        .unwrap();
    assert_eq!(url.len(), "data:image/png;base64,".len() + IMAGE);
}

#[tokio::test]
async fn every_answer_names_its_request_in_the_words_of_its_path() {
    let (node, cortex) = start("").await;
    node.script(Script::Refuse(
        503,
        json!({"error": {"message": "draining", "type": "server_error", "code": null}}),
    ));
    let body = r#"{"model":"m","max_tokens":5,"messages":[{"role":"user","content":"x"}]}"#;
    let cases = [
        ("GET", "/nowhere", None, 404, "invalid_request_error"),
        (
            "GET",
            "/nowhere",
            Some("2023-06-01"),
            404,
            "not_found_error",
        ),
        ("PUT", "/v1/messages", None, 405, "invalid_request_error"),
        ("DELETE", "/v1/models/m", None, 405, "invalid_request_error"),
        ("POST", CHAT, None, 503, "server_error"),
        ("POST", "/v1/messages", None, 529, "overloaded_error"),
        ("POST", "/v1/messages/batches", None, 404, "not_found_error"),
    ];
    for (method, path, version, status, kind) in cases {
        let mut request = cortex
            .client
            .request(method.parse().unwrap(), format!("{}{path}", cortex.api))
            .header("x-request-id", "mine-1")
            .body(body);
        if let Some(version) = version {
            request = request.header("anthropic-version", version);
        }
        let reply = request.send().await.unwrap();
        let headers = reply.headers().clone();
        assert_eq!(reply.status().as_u16(), status, "{method} {path}");
        let error: Value = reply.json().await.unwrap();
        assert_eq!(error["error"]["type"], kind, "{method} {path}");
        assert_eq!(headers["x-request-id"], "mine-1");
        let anthropic = error["type"] == "error";
        assert_eq!(
            headers.contains_key("request-id"),
            anthropic,
            "{method} {path}"
        );
        assert_eq!(headers.contains_key("allow"), status == 405);
        assert_eq!(
            headers.contains_key("retry-after"),
            status > 500,
            "{method} {path}"
        );
    }
    let text = cortex
        .client
        .post(format!("{}{CHAT}", cortex.api))
        .header("content-type", "text/plain")
        .body(body)
        .send()
        .await
        .unwrap();
    assert_eq!(text.status(), StatusCode::UNSUPPORTED_MEDIA_TYPE);
}

async fn get(cortex: &Cortex, path: &str, headers: &[(&'static str, &'static str)]) -> Value {
    let headers: HeaderMap = headers
        .iter()
        .map(|(name, value)| {
            (
                HeaderName::from_static(name),
                HeaderValue::from_static(value),
            )
        })
        .collect();
    let request = cortex.client.get(format!("{}{path}", cortex.api));
    request
        .headers(headers)
        .send()
        .await
        .unwrap()
        .json()
        .await
        .unwrap()
}

#[tokio::test]
async fn models_are_listed_in_the_shape_of_who_asks() {
    let node = FakeNode::start("a").await.holding("m", 100);
    let models = "[[models]]\nid = \"cold\"\nsource = \"/models/cold\"\naliases = [\"frosty\"]";
    let cortex = Cortex::start(&[("a", node.address)], models, "").await;
    let openai = get(&cortex, "/v1/models", &[]).await;
    assert_eq!(openai["object"], "list");
    let loaded = &openai["data"][1];
    assert_eq!(
        (
            &loaded["id"],
            &loaded["state"],
            &loaded["context_length"],
            &loaded["capabilities"]
        ),
        (
            &json!("m"),
            &json!("loaded"),
            &json!(4096),
            &json!(["chat", "completions"])
        )
    );
    let anthropic = [("anthropic-version", "2023-06-01")];
    let page = get(&cortex, "/v1/models?limit=1", &anthropic).await;
    assert_eq!(
        (&page["first_id"], &page["last_id"], &page["has_more"]),
        (&json!("cold"), &json!("cold"), &json!(true))
    );
    let next = get(&cortex, "/v1/models?limit=1&after_id=cold", &anthropic).await;
    assert_eq!(
        (&next["data"][0]["id"], &next["has_more"]),
        (&json!("m"), &json!(false))
    );
    let card = get(&cortex, "/v1/models/frosty", &anthropic).await;
    assert_eq!(
        (&card["type"], &card["id"]),
        (&json!("model"), &json!("cold"))
    );
    let bad = get(&cortex, "/v1/models?limit=0", &anthropic).await;
    assert_eq!(bad["error"]["param"], "limit");
}

#[tokio::test]
async fn tokens_are_counted_by_a_node_that_has_the_model_and_estimated_where_none_has() {
    let node = FakeNode::start("a").await.holding("m", 100);
    let models = "[[models]]\nid = \"cold\"\nsource = \"/models/cold\"";
    let cortex = Cortex::start(&[("a", node.address)], models, "").await;
    let ask = |model: &str| {
        let body = json!({
            "model": model, "system": "Be brief.", "messages": [{"role": "user", "content": "hello"}],
            "tools": [{"name": "t", "input_schema": {"type": "object"}}],
            "thinking": {"type": "enabled", "budget_tokens": 2000},
        });
        let cortex = &cortex;
        async move { cortex.post("/v1/messages/count_tokens", &body).await }
    };
    let exact = ask("m").await;
    assert!(!exact.headers().contains_key("x-cortex-estimated"));
    let count: Value = exact.json().await.unwrap();
    assert_eq!(count, json!({"input_tokens": 1014}));
    let seen = &node.seen()[0];
    assert_eq!(seen.path, "/tokenize");
    assert_eq!(
        (
            &seen.body["chat_template_kwargs"],
            &seen.body["add_generation_prompt"],
            &seen.body["tools"][0]["function"]["name"]
        ),
        (&json!({"enable_thinking": true}), &json!(true), &json!("t"))
    );
    let rough = ask("cold").await;
    assert_eq!(rough.headers()["x-cortex-estimated"], "true");
    let count: Value = rough.json().await.unwrap();
    assert!(count["input_tokens"].as_u64().unwrap() > 10, "{count}");
    assert_eq!(node.changes(), [""; 0], "to count loads nothing");
    let wrong = cortex
        .ask("/v1/messages/count_tokens", &json!({"model": "m"}))
        .await;
    assert_eq!(
        (wrong.0, &wrong.1["error"]["param"]),
        (StatusCode::BAD_REQUEST, &json!("messages"))
    );
}
