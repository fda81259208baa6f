//! SIGHUP changes what comes next and nothing that runs; SIGTERM lets it end.

#![allow(missing_docs, clippy::unwrap_used)]

use futures::future::join_all;
use reqwest::StatusCode;
use serde_json::json;
use std::time::Duration;
use tests::daemon::{Cortex, free_address, root};
use tests::fake_node::{FakeNode, Script, words};
use tests::until;

#[tokio::test]
async fn a_reload_under_a_hundred_streams_loses_none_and_changes_the_next_request() {
    let old = FakeNode::start("old").await.holding("m", 100);
    let new = FakeNode::start("new").await.holding("m", 100);
    old.script(Script::Stepped(words(&["a", "b", "c"])));
    let mut cortex = Cortex::start(&[("old", old.address)], "", "").await;
    let stream = json!({"model": "m", "stream": true, "messages": []});
    let posts = join_all((0..100).map(|_| cortex.post("/v1/chat/completions", &stream)));
    let (streams, ()) = futures::future::join(posts, async {
        until("all streams are open", || async {
            (old.open() == 100).then_some(())
        })
        .await;
        old.step();
    })
    .await;
    let said = cortex.reload(&[("new", new.address)], "", "").await;
    assert!(said.contains("configuration reloaded"), "{said}");
    cortex.sees(&[("new", "up")]).await;
    let (status, body) = cortex
        .ask(
            "/v1/chat/completions",
            &json!({"model": "m", "messages": []}),
        )
        .await;
    assert_eq!(
        (status, &body["choices"][0]["message"]["content"]),
        (StatusCode::OK, &json!("new"))
    );
    let texts = join_all(streams.into_iter().map(reqwest::Response::text));
    let drive = until("the streams end", || async {
        old.step();
        (old.open() == 0).then_some(())
    });
    let (texts, ()) = futures::future::join(texts, drive).await;
    let whole = texts
        .iter()
        .filter(|text| text.as_ref().is_ok_and(|text| text.contains("[DONE]")))
        .count();
    assert_eq!(whole, 100, "every stream ends as it began");
    assert_eq!(
        cortex
            .metric("cortex_config_reloads_total{outcome=\"applied\"}")
            .await,
        Some(1.0)
    );
}

#[tokio::test]
async fn a_bad_file_changes_nothing_and_says_so() {
    let node = FakeNode::start("a").await.holding("m", 100);
    let mut cortex = Cortex::start(&[("a", node.address)], "", "").await;
    let said = cortex.reload(&[], "", "routing = \"wishful\"").await;
    assert!(
        said.contains("gateway.routing") && said.contains("not reloaded"),
        "{said}"
    );
    let (status, _) = cortex
        .ask(
            "/v1/chat/completions",
            &json!({"model": "m", "messages": []}),
        )
        .await;
    assert_eq!(status, StatusCode::OK, "the old configuration goes on");
    assert_eq!(
        cortex
            .metric("cortex_config_reloads_total{outcome=\"refused\"}")
            .await,
        Some(1.0)
    );
}

#[tokio::test]
async fn sigterm_refuses_what_is_new_and_lets_what_runs_end() {
    let node = FakeNode::start("a").await.holding("m", 100);
    node.script(Script::Stepped(words(&["a", "b"])));
    let mut cortex = Cortex::start(&[("a", node.address)], "", "").await;
    let stream = json!({"model": "m", "stream": true, "messages": []});
    let (reply, ()) = futures::future::join(cortex.post("/v1/chat/completions", &stream), async {
        node.asked(1).await;
        until("the stream is open", || async {
            node.step();
            (node.open() == 1).then_some(())
        })
        .await;
    })
    .await;
    cortex.daemon.signal("TERM");
    cortex.daemon.line("draining").await;
    let refused = cortex.post("/v1/chat/completions", &stream).await;
    assert_eq!(refused.status(), StatusCode::SERVICE_UNAVAILABLE);
    assert!(refused.headers().contains_key("retry-after"));
    let drive = until("the stream ends", || async {
        node.step();
        (node.open() == 0).then_some(())
    });
    let (text, ()) = futures::future::join(reply.text(), drive).await;
    assert!(text.unwrap().contains("[DONE]"), "what ran has ended well");
    assert_eq!(cortex.daemon.ended().await, Some(0));
}

#[tokio::test]
async fn a_file_that_changes_is_read_without_a_signal() {
    let old = FakeNode::start("old").await.holding("m", 100);
    let new = FakeNode::start("new").await.holding("m", 100);
    let mut cortex = Cortex::start(&[("old", old.address)], "", "watch = \"50ms\"").await;
    cortex.rewrite(&[("new", new.address)], "", "watch = \"50ms\"");
    cortex.daemon.line("configuration reloaded").await;
    cortex.sees(&[("new", "up")]).await;
}

#[tokio::test]
async fn a_file_from_the_past_or_the_future_is_a_change_like_any_other() {
    let (a, b) = (FakeNode::start("a").await, FakeNode::start("b").await);
    let of = |name: &str, node: &FakeNode| {
        format!("name = \"{name}\"\nendpoint = \"http://{}\"", node.address)
    };
    let (first, second) = (of("a", &a), of("b", &b));
    let cortex = Cortex::start(&[("a", a.address)], "", "watch = \"50ms\"").await;
    let [file, draft] = ["cortex.toml", "draft.toml"].map(|name| cortex.folder().join(name));
    let text = std::fs::read_to_string(&file).unwrap();
    assert!(text.contains(&first));
    let day = Duration::from_secs(86_400);
    let past = std::time::UNIX_EPOCH + day;
    let future = std::time::SystemTime::now() + 10_000 * day;
    // written on machines whose clocks were far behind and far ahead, and put in place at once
    for (name, node, time) in [("b", &second, past), ("a", &first, future)] {
        std::fs::write(&draft, text.replace(&first, node)).unwrap();
        let draft_file = std::fs::File::options().append(true).open(&draft);
        draft_file.unwrap().set_modified(time).unwrap();
        std::fs::rename(&draft, &file).unwrap();
        cortex.sees(&[(name, "up")]).await;
    }
}

#[tokio::test]
async fn sigquit_hands_the_sockets_over_and_no_request_is_lost() {
    let node = FakeNode::start("a").await.holding("m", 100);
    node.script(Script::Stepped(words(&["a", "b"])));
    // the old one ends with its last request, not with this bound, which the test would not wait for
    let extra = "[timeouts]\ndrain = \"10m\"\n";
    let mut cortex = Cortex::start(&[("a", node.address)], "", extra).await;
    let stream = json!({"model": "m", "stream": true, "messages": []});
    let (reply, ()) = futures::future::join(cortex.post("/v1/chat/completions", &stream), async {
        node.asked(1).await;
        until("the stream is open", || async {
            node.step();
            (node.open() == 1).then_some(())
        })
        .await;
    })
    .await;
    let old_pid = cortex.daemon.child.id();
    let mut old = cortex.upgrade().await;
    assert_ne!(cortex.daemon.child.id(), old_pid);
    cortex.daemon.line("API on").await;
    node.script(Script::Answer);
    let asking = async {
        let mut answered = 0;
        let mut ended = Box::pin(old.ended());
        loop {
            // each on a connection of its own, as those that are kept may be the old gateway's
            let client = reqwest::Client::builder().no_proxy().build().unwrap();
            let url = format!("{}/v1/chat/completions", cortex.api);
            let request = client.post(url).body(r#"{"model":"m","messages":[]}"#);
            let status = request.send().await.unwrap().status();
            assert_eq!(status, StatusCode::OK, "after {answered} answers");
            answered += 1;
            if let Some(code) = futures::FutureExt::now_or_never(&mut ended) {
                break (answered, code);
            }
        }
    };
    let drive = async {
        until("the stream ends", || async {
            node.step();
            (node.open() == 0).then_some(())
        })
        .await;
    };
    let text = async { futures::future::join(reply.text(), drive).await.0 };
    let (text, (answered, code)) = futures::future::join(text, asking).await;
    assert!(text.unwrap().contains("[DONE]"), "what ran has ended well");
    assert_eq!(code, Some(0));
    assert!(answered > 1);
}

#[tokio::test]
async fn sigquit_without_a_successor_changes_nothing() {
    let node = FakeNode::start("a").await.holding("m", 100);
    let mut cortex = Cortex::start(&[("a", node.address)], "", "").await;
    cortex.daemon.signal("QUIT");
    cortex.daemon.line("going on").await;
    let request = json!({"model": "m", "messages": []});
    let (status, _) = cortex.ask("/v1/chat/completions", &request).await;
    assert_eq!(status, StatusCode::OK);
}

/// The certificate that is shown at `address`, as it is sent.
async fn shown(address: std::net::SocketAddr, trusted: &[&std::path::Path]) -> Option<Vec<u8>> {
    use tokio_rustls::rustls::pki_types::pem::PemObject;
    use tokio_rustls::rustls::pki_types::{CertificateDer, ServerName};
    use tokio_rustls::rustls::{ClientConfig, RootCertStore};
    let mut roots = RootCertStore::empty();
    for path in trusted {
        roots.add(CertificateDer::from_pem_file(path).ok()?).ok()?;
    }
    let config = ClientConfig::builder()
        .with_root_certificates(roots)
        .with_no_client_auth();
    let connector = tokio_rustls::TlsConnector::from(std::sync::Arc::new(config));
    let stream = tokio::net::TcpStream::connect(address).await.ok()?;
    let name = ServerName::try_from("localhost").ok()?;
    let stream = connector.connect(name, stream).await.ok()?;
    let chain = stream.get_ref().1.peer_certificates()?;
    Some(chain[0].to_vec())
}

#[tokio::test]
async fn a_certificate_is_changed_while_the_gateway_runs_and_a_bad_one_is_not_taken() {
    let fixtures = root().join("tests/fixtures/tls");
    let folder = tempfile::tempdir().unwrap();
    let [certificate, key] = ["certificate.pem", "key.pem"].map(|name| folder.path().join(name));
    for (from, to) in [("certificate.pem", &certificate), ("key.pem", &key)] {
        std::fs::copy(fixtures.join(from), to).unwrap();
    }
    let address = free_address();
    let extra = format!(
        "[tls]\nlisten = \"{address}\"\ncertificate = \"{}\"\nkey = \"{}\"",
        certificate.display(),
        key.display()
    );
    let node = FakeNode::start("a").await.holding("m", 100);
    let nodes = [("a", node.address)];
    let mut cortex = Cortex::start(&nodes, "", &extra).await;
    let [old, new] = ["certificate.pem", "next_certificate.pem"].map(|name| fixtures.join(name));
    let trusted = [&*old, &*new];
    let first = until("TLS is spoken", || shown(address, &trusted)).await;
    std::fs::copy(&new, &certificate).unwrap();
    let said = cortex.reload(&nodes, "", &extra).await;
    assert!(
        said.contains("not reloaded"),
        "its key is that of the old one: {said}"
    );
    assert_eq!(shown(address, &trusted).await, Some(first.clone()));
    std::fs::copy(fixtures.join("next_key.pem"), &key).unwrap();
    let said = cortex.reload(&nodes, "", &extra).await;
    assert!(said.contains("configuration reloaded"), "{said}");
    let second = shown(address, &trusted).await;
    assert!(second.is_some() && second != Some(first));
}
