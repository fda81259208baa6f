//! How nodes come to be known.

#![allow(missing_docs, clippy::unwrap_used)]

use reqwest::StatusCode;
use serde_json::{Value, json};
use tests::daemon::{Cortex, Daemon};
use tests::fake_node::FakeNode;
use tests::until;

fn request(model: &str) -> Value {
    json!({"model": model, "messages": []})
}

async fn nodes(cortex: &Cortex) -> Option<Vec<String>> {
    let status = cortex.client.get(format!("{}/status", cortex.admin));
    let status: Value = status.send().await.ok()?.json().await.ok()?;
    let nodes = status["nodes"].as_array()?.iter();
    Some(
        nodes
            .map(|node| format!("{} {}", node["name"], node["health"]).replace('"', ""))
            .collect(),
    )
}

#[tokio::test]
async fn a_foreign_server_serves_its_own_models_for_its_own_key_and_is_told_to_load_nothing() {
    let foreign = FakeNode::start("foreign")
        .await
        .holding("theirs", 0)
        .locked("key");
    let keys = tempfile::tempdir().unwrap();
    let key = keys.path().join("key");
    std::fs::write(&key, "key\n").unwrap();
    let extra = format!(
        "[[neurons]]\nname = \"far\"\nkind = \"openai\"\nendpoint = \"http://{}/v1\"\napi_key_file = \"{}\"\n",
        foreign.address,
        key.display()
    );
    let models = "[[models]]\nid = \"ours\"\nsource = \"/models/ours\"\n";
    let cortex = Cortex::spawn(&[], models, &extra).await;
    cortex.sees(&[("far", "up")]).await;
    let (status, body) = cortex.ask("/v1/chat/completions", &request("theirs")).await;
    assert_eq!(
        (status, &body["choices"][0]["message"]["content"]),
        (StatusCode::OK, &json!("foreign"))
    );
    assert_eq!(foreign.seen()[0].headers["authorization"], "Bearer key");
    let (status, _) = cortex.ask("/v1/chat/completions", &request("ours")).await;
    assert_eq!(status, StatusCode::SERVICE_UNAVAILABLE);
    assert!(foreign.changes().is_empty());
    assert!(!cortex.daemon.log().join("\n").contains("Bearer key"));
}

#[tokio::test]
async fn each_address_of_a_name_is_a_node_if_that_is_wanted() {
    let node = FakeNode::start("a").await.holding("m", 100);
    let port = node.address.port();
    let extra = format!(
        "[[neurons]]\nname = \"pool\"\nendpoint = \"http://127.0.0.1:{port}\"\nall_addresses = true\n"
    );
    let cortex = Cortex::spawn(&[], "", &extra).await;
    cortex
        .sees(&[(&format!("pool/127.0.0.1:{port}"), "up")])
        .await;
    let (status, _) = cortex.ask("/v1/chat/completions", &request("m")).await;
    assert_eq!(status, StatusCode::OK);
}

#[tokio::test]
async fn a_neuron_joins_by_itself_with_the_token_and_is_forgotten_when_it_is_gone() {
    let secrets = tempfile::tempdir().unwrap();
    let token = secrets.path().join("token");
    std::fs::write(&token, "open sesame").unwrap();
    let extra = format!(
        "[fleet]\npoll = \"100ms\"\njoin_lease = \"2s\"\njoin_token_file = \"{}\"\n",
        token.display()
    );
    let cortex = Cortex::spawn(&[], "", &extra).await;
    let start = |token| {
        let args = ["--listen", "127.0.0.1:0", "--join", &cortex.admin];
        Daemon::start("neuron", &[&args[..], &["--token", token]].concat())
    };
    let mut stranger = start("sesame");
    let refused = stranger.line("cannot join").await;
    assert!(
        refused.contains("not the token") && !refused.contains("open"),
        "{refused}"
    );
    assert_eq!(nodes(&cortex).await.unwrap(), [""; 0]);
    let mut neuron = start("open sesame");
    neuron.line("joined as").await;
    until("it is up", || async {
        let nodes = nodes(&cortex).await?;
        (nodes.len() == 1 && nodes[0].ends_with(" up")).then_some(())
    })
    .await;
    drop(neuron);
    until("it is forgotten", || async {
        nodes(&cortex).await?.is_empty().then_some(())
    })
    .await;
}
