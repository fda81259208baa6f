//! Models come when they are asked for, and go when others need the room.

#![allow(missing_docs, clippy::unwrap_used)]

use futures::future::join_all;
use reqwest::StatusCode;
use serde_json::{Value, json};
use tests::daemon::{Cortex, binary};
use tests::fake_node::{FakeNode, Loading, Script, words};
use tests::until;

fn model(id: &str, bytes: u64, more: &str) -> String {
    format!("[[models]]\nid = \"{id}\"\nsource = \"/models/{id}\"\nmemory = \"{bytes}B\"\n{more}\n")
}

fn request(model: &str) -> Value {
    json!({"model": model, "messages": []})
}

#[tokio::test]
async fn a_cold_model_is_loaded_once_for_ten_callers() {
    let node = FakeNode::start("a").await;
    node.loading(Loading::Held);
    let cortex = Cortex::start(&[("a", node.address)], &model("cold", 100, ""), "").await;
    let body = request("cold");
    let callers = join_all((0..10).map(|_| cortex.ask("/v1/chat/completions", &body)));
    let release = async {
        until("the load begins", || async {
            (!node.changes().is_empty()).then_some(())
        })
        .await;
        node.release();
    };
    let (answers, ()) = futures::future::join(callers, release).await;
    assert!(
        answers.iter().all(|(status, _)| *status == StatusCode::OK),
        "{answers:?}"
    );
    assert_eq!(node.changes(), ["load cold"]);
    let loads = "cortex_model_loads_total{model=\"cold\",node=\"a\",outcome=\"loaded\"}";
    until("the load is counted", || async {
        (cortex.metric(loads).await == Some(1.0)).then_some(())
    })
    .await;
}

#[tokio::test]
async fn a_node_is_told_among_how_many_ranks_to_share_a_model() {
    let node = FakeNode::start("a").await;
    let models = [
        model("one", 100, "tensor_parallel = 1"),
        model("two", 100, "tensor_parallel = 2"),
    ];
    let cortex = Cortex::start(&[("a", node.address)], &models.concat(), "").await;
    for id in ["one", "two"] {
        let (status, answer) = cortex.ask("/v1/chat/completions", &request(id)).await;
        assert_eq!(status, StatusCode::OK, "{id}: {answer}");
    }
    assert_eq!(node.changes(), ["load one", "load two on 2 ranks"]);
}

#[tokio::test]
async fn the_least_recently_used_model_makes_room_and_a_pinned_one_never() {
    let node = FakeNode::start("a")
        .await
        .sized("one", 400)
        .sized("two", 400)
        .sized("three", 400)
        .sized("pin", 100);
    let models = [
        model("one", 400, ""),
        model("two", 400, ""),
        model("three", 400, ""),
        model("pin", 100, "pinned = true"),
        model("huge", 950, ""),
        model("monster", 2000, ""),
    ];
    let cortex = Cortex::start(
        &[("a", node.address)],
        &models.concat(),
        "[timeouts]\nload = \"700ms\"\n",
    )
    .await;
    until("the pinned model is loaded unasked", || async {
        (node.changes() == ["load pin"]).then_some(())
    })
    .await;
    for id in ["one", "two", "one", "three"] {
        assert_eq!(
            cortex.ask("/v1/chat/completions", &request(id)).await.0,
            StatusCode::OK,
            "{id}"
        );
    }
    assert_eq!(
        node.changes(),
        [
            "load pin",
            "load one",
            "load two",
            "unload two",
            "load three"
        ]
    );
    assert_eq!(
        cortex
            .metric("cortex_model_evictions_total{model=\"two\",node=\"a\",reason=\"room\"}")
            .await,
        Some(1.0)
    );
    let (status, body) = cortex
        .ask("/v1/chat/completions", &request("monster"))
        .await;
    assert_eq!(status, StatusCode::SERVICE_UNAVAILABLE);
    assert!(
        body["error"]["message"]
            .as_str()
            .unwrap()
            .contains("largest in the fleet"),
        "{body}"
    );
    // beside the pinned model there is room for 900 only: it waits, in vain
    let (status, _) = cortex.ask("/v1/chat/completions", &request("huge")).await;
    assert_eq!(status, StatusCode::GATEWAY_TIMEOUT);
    assert!(!node.changes().contains(&"unload pin".to_owned()));
}

#[tokio::test]
async fn a_serving_model_is_not_evicted_until_its_answer_is_over() {
    let node = FakeNode::start("a")
        .await
        .holding("busy", 800)
        .sized("next", 800);
    node.script(Script::Stepped(words(&["word"])));
    let models = [model("busy", 800, ""), model("next", 800, "")].concat();
    let cortex = Cortex::start(&[("a", node.address)], &models, "").await;
    let stream = json!({"model": "busy", "stream": true, "messages": []});
    let streaming = cortex.post("/v1/chat/completions", &stream);
    let (reply, ()) = futures::future::join(streaming, async {
        node.asked(1).await;
        until("the stream begins", || async {
            node.step();
            (cortex
                .metric("cortex_requests_in_flight{route=\"chat\"}")
                .await
                == Some(1.0))
            .then_some(())
        })
        .await;
    })
    .await;
    let body = request("next");
    let waiting = cortex.ask("/v1/chat/completions", &body);
    let finishing = async {
        // the loop looks at least once a second; two ticks of polls say that it has looked and kept its hands off
        until("the request waits", || async {
            (cortex
                .metric("cortex_requests_in_flight{route=\"chat\"}")
                .await
                == Some(2.0))
            .then_some(())
        })
        .await;
        assert!(node.changes().is_empty(), "{:?}", node.changes());
        node.script(Script::Answer);
        let drive = async {
            until("the stream ends", || async {
                node.step();
                (node.open() == 0).then_some(())
            })
            .await;
        };
        let (text, ()) = futures::future::join(reply.text(), drive).await;
        assert!(text.unwrap().contains("[DONE]"));
    };
    let ((status, _), ()) = futures::future::join(waiting, finishing).await;
    assert_eq!(status, StatusCode::OK);
    assert_eq!(node.changes(), ["unload busy", "load next"]);
}

#[tokio::test]
async fn a_load_that_fails_is_told_to_all_who_wait() {
    let node = FakeNode::start("a").await;
    node.loading(Loading::Fails("model.safetensors is truncated".into()));
    let cortex = Cortex::start(&[("a", node.address)], &model("broken", 100, ""), "").await;
    let (status, body) = cortex
        .ask(
            "/v1/messages",
            &json!({"model": "broken", "max_tokens": 1, "messages": []}),
        )
        .await;
    assert_eq!(status.as_u16(), 529);
    assert!(
        body["error"]["message"]
            .as_str()
            .unwrap()
            .contains("model.safetensors is truncated"),
        "{body}"
    );
    let again = cortex
        .post("/v1/chat/completions", &request("broken"))
        .await;
    assert_eq!(
        (again.status().as_u16(), node.changes().len()),
        (503, 1),
        "it is not tried again at once"
    );
    assert!(again.headers().contains_key("retry-after"));
}

#[tokio::test]
async fn a_waiting_stream_is_kept_alive_in_its_own_dialect() {
    let node = FakeNode::start("a").await;
    node.loading(Loading::Held);
    node.script(Script::Stream(words(&["hi"])));
    let extra = "[timeouts]\nkeep_alive = \"20ms\"\n";
    let cortex = Cortex::start(&[("a", node.address)], &model("cold", 100, ""), extra).await;
    for (count, path, progress) in [
        (1.0, "/v1/chat/completions", ": loading cold 42 %\n\n"),
        (2.0, "/v1/messages", "event: ping\n"),
    ] {
        node.loading(Loading::Held);
        let body = json!({"model": "cold", "stream": true, "max_tokens": 5, "messages": []});
        let mut reply = cortex.post(path, &body).await; // answers before the model is there
        let mut said = String::new();
        while !said.contains(progress) {
            let comment = reply.chunk().await.unwrap().expect("it goes on until then");
            said += &String::from_utf8_lossy(&comment);
        }
        node.release();
        let rest = reply.text().await.unwrap();
        assert!(
            rest.contains("hi") && (rest.contains("[DONE]") || rest.contains("message_stop")),
            "{path}: {rest}"
        );
        let loads = "cortex_model_loads_total{model=\"cold\",node=\"a\",outcome=\"loaded\"}";
        until("the load is over", || async {
            (cortex.metric(loads).await == Some(count)).then_some(())
        })
        .await;
        let unload = json!({"id": "cold"});
        cortex
            .client
            .post(format!("http://{}/models/unload", node.address))
            .body(unload.to_string())
            .send()
            .await
            .unwrap();
        until("the model is gone from the view", || async {
            let status: Value = cortex
                .client
                .get(format!("{}/status", cortex.admin))
                .send()
                .await
                .unwrap()
                .json()
                .await
                .unwrap();
            status["nodes"][0]["models"]
                .as_array()
                .unwrap()
                .is_empty()
                .then_some(())
        })
        .await;
    }
}

#[tokio::test]
async fn a_model_that_nobody_uses_goes_after_its_time() {
    let node = FakeNode::start("a").await;
    let models = model("brief", 100, "keep_alive = \"300ms\"") + &model("stays", 100, "");
    let cortex = Cortex::start(&[("a", node.address)], &models, "").await;
    for id in ["brief", "stays"] {
        let (status, _) = cortex.ask("/v1/chat/completions", &request(id)).await;
        assert_eq!(status, StatusCode::OK);
    }
    let idle = "cortex_model_evictions_total{model=\"brief\",node=\"a\",reason=\"idle\"}";
    until("it is unloaded", || async {
        (cortex.metric(idle).await == Some(1.0)).then_some(())
    })
    .await;
    assert_eq!(node.changes(), ["load brief", "load stays", "unload brief"]);
}

#[tokio::test]
async fn a_hot_model_gets_a_second_replica_and_loses_it_when_it_has_cooled() {
    let a = FakeNode::start("a").await.holding("hot", 100);
    let b = FakeNode::start("b").await;
    a.script(Script::Silent);
    b.script(Script::Silent);
    let extra = "[replicas]\nabove = 2\nafter = \"100ms\"\nretire_after = \"300ms\"\n";
    let models = model("hot", 100, "max_replicas = 2");
    let nodes = [("a", a.address), ("b", b.address)];
    let cortex = Cortex::start(&nodes, &models, extra).await;
    let body = request("hot");
    let three = join_all((0..3).map(|_| cortex.ask("/v1/chat/completions", &body)));
    let loaded = until("another replica comes", || async {
        (b.changes() == ["load hot"]).then_some(())
    });
    tokio::select! {
        _ = three => panic!("nobody answers"),
        () = loaded => {}
    }
    // the three have left: one replica is enough
    let retired = "reason=\"replicas\"}";
    until("one replica goes", || async {
        let text = cortex.client.get(format!("{}/metrics", cortex.admin));
        let text = text.send().await.ok()?.text().await.ok()?;
        text.contains(retired).then_some(())
    })
    .await;
    let unloads = |node: &FakeNode| node.changes().contains(&"unload hot".to_owned());
    assert_ne!(unloads(&a), unloads(&b), "one, and one only");
}

#[tokio::test]
async fn an_alias_goes_to_the_next_model_when_the_first_cannot_be_had() {
    let node = FakeNode::start("a").await;
    let models = [
        model("large", 5000, ""),
        model("small", 100, "sampling = { temperature = 0.5 }"),
        "[[aliases]]\nname = \"any\"\nmodels = [\"large\", \"small\"]\n".into(),
    ];
    let cortex = Cortex::start(&[("a", node.address)], &models.concat(), "").await;
    for _ in 0..2 {
        let (status, body) = cortex.ask("/v1/chat/completions", &request("any")).await;
        assert_eq!((status, &body["model"]), (StatusCode::OK, &json!("small")));
        assert_eq!(node.seen()[0].body["temperature"], 0.5);
    }
    let (status, _) = cortex.ask("/v1/chat/completions", &request("large")).await;
    assert_eq!(status, StatusCode::SERVICE_UNAVAILABLE, "by its own name");
}

#[tokio::test]
async fn a_plan_is_told_and_not_carried_out() {
    let node = FakeNode::start("a").await.holding("here", 900);
    let models = model("here", 900, "") + &model("next", 500, "");
    let cortex = Cortex::start(&[("a", node.address)], &models, "").await;
    let file = cortex.folder().join("cortex.toml");
    let plan = std::process::Command::new(binary("cortex"))
        .args(["plan", "--config", file.to_str().unwrap()])
        .output()
        .unwrap();
    let plan = String::from_utf8(plan.stdout).unwrap();
    assert!(
        plan.contains("here    the least has to leave there"),
        "{plan}"
    );
    assert!(node.changes().is_empty());
}
