//! The second listener: what Prometheus, a load balancer and a person see.

#![allow(missing_docs, clippy::unwrap_used)]

use serde_json::json;
use tests::daemon::{Cortex, binary};
use tests::fake_node::{FakeNode, Script, words};
use tests::until;

#[tokio::test]
async fn tokens_and_times_are_counted_by_model_and_node() {
    let node = FakeNode::start("a").await.holding("m", 100);
    let cortex = Cortex::start(&[("a", node.address)], "", "").await;
    cortex
        .ask(
            "/v1/chat/completions",
            &json!({"model": "m", "messages": []}),
        )
        .await;
    node.script(Script::Stream(words(&["one", "two"])));
    let body = json!({"model": "m", "stream": true, "max_tokens": 5, "messages": []});
    let chat = cortex.post("/v1/chat/completions", &body).await;
    let chat = chat.text().await.unwrap();
    assert!(
        chat.contains("two") && chat.contains("[DONE]") && !chat.contains("usage"),
        "who did not ask for usage is not told: {chat}"
    );
    cortex
        .post("/v1/messages", &body)
        .await
        .text()
        .await
        .unwrap();
    let labels = "{model=\"m\",node=\"a\"}";
    until("all three are counted", || async {
        (cortex
            .metric(&format!("cortex_prompt_tokens_total{labels}"))
            .await
            == Some(21.0))
        .then_some(())
    })
    .await;
    assert_eq!(
        cortex
            .metric(&format!("cortex_generation_tokens_total{labels}"))
            .await,
        Some(9.0)
    );
    assert_eq!(
        cortex
            .metric(&format!("cortex_time_to_first_token_seconds_count{labels}"))
            .await,
        Some(2.0)
    );
    assert_eq!(
        cortex
            .metric(&format!("cortex_e2e_request_latency_seconds_count{labels}"))
            .await,
        Some(3.0)
    );
    assert_eq!(
        cortex
            .metric(&format!(
                "cortex_request_generation_tokens_per_second_count{labels}"
            ))
            .await,
        Some(3.0)
    );
    assert_eq!(
        cortex
            .metric("cortex_requests_total{route=\"chat\",status=\"200\"}")
            .await,
        Some(2.0)
    );
    assert_eq!(
        cortex
            .metric("cortex_requests_total{route=\"messages\",status=\"200\"}")
            .await,
        Some(1.0)
    );
    let asked = &node.seen()[1];
    assert_eq!(
        asked.body["stream_options"]["include_usage"], true,
        "usage is asked for all the same"
    );
}

#[tokio::test]
async fn readiness_follows_the_nodes_and_status_shows_them() {
    let node = FakeNode::start("a").await.holding("m", 123);
    let cortex = Cortex::start(&[("a", node.address)], "", "").await;
    let ready = || async {
        cortex
            .client
            .get(format!("{}/health/ready", cortex.admin))
            .send()
            .await
            .unwrap()
            .status()
    };
    assert_eq!(ready().await, 200);
    let address = cortex.admin.strip_prefix("http://").unwrap();
    let table = std::process::Command::new(binary("cortex"))
        .args(["status", "--address", address])
        .output()
        .unwrap();
    let table = String::from_utf8(table.stdout).unwrap();
    assert!(
        table.contains("a     up") && table.contains("m      loaded  a"),
        "{table}"
    );
    drop(node);
    until("not ready", || async {
        (ready().await == 503).then_some(())
    })
    .await;
    let json = std::process::Command::new(binary("cortex"))
        .args(["status", "--json", "--address", address])
        .output()
        .unwrap();
    let json: serde_json::Value = serde_json::from_slice(&json.stdout).unwrap();
    assert_eq!(json["nodes"][0]["health"], "down");
}
