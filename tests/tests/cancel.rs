//! A client that leaves takes its work with it, however far that had come.

#![allow(missing_docs, clippy::unwrap_used)]

use serde_json::json;
use tests::daemon::Cortex;
use tests::fake_node::{FakeNode, Script, words};
use tests::until;

#[tokio::test]
async fn a_client_that_leaves_is_seen_by_the_node_in_every_phase() {
    let node = FakeNode::start("a").await.holding("m", 100);
    let cortex = Cortex::start(&[("a", node.address)], "", "").await;
    let mut begun = words(&["one"]);
    begun.truncate(2);
    let phases = [
        ("a silent prefill", Script::Silent, false),
        ("a silent prefill of a stream", Script::Silent, true),
        ("a stream that has begun", Script::Hang(begun), true),
    ];
    for (count, (phase, script, stream)) in phases.into_iter().enumerate() {
        node.script(script);
        let body = json!({"model": "m", "stream": stream, "messages": []});
        let asking = async {
            let mut reply = cortex.post("/v1/chat/completions", &body).await;
            while reply.chunk().await.unwrap().is_some() {}
        };
        tokio::select! {
            () = asking => panic!("{phase}: it never ends by itself"),
            () = node.asked(count + 1) => {}
        }
        node.left(count + 1).await;
        until("nothing is in flight", || async {
            (cortex
                .metric("cortex_requests_in_flight{route=\"chat\"}")
                .await
                == Some(0.0))
            .then_some(())
        })
        .await;
    }
    assert_eq!(
        cortex
            .metric("cortex_requests_total{route=\"chat\",status=\"499\"}")
            .await
            .unwrap_or(0.0),
        2.0
    );
}
