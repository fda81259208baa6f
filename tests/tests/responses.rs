//! Responses: conversations that go on from what the gateway keeps, and what can be asked about it.

#![allow(missing_docs, clippy::unwrap_used)]

use reqwest::{Method, StatusCode};
use serde_json::{Value, json};
use tests::daemon::Cortex;
use tests::fake_node::{FakeNode, Script, words};

/// A gateway over one node that serves the model `m`.
async fn cortex(extra: &str) -> (FakeNode, Cortex) {
    let node = FakeNode::start("a").await.holding("m", 100);
    let cortex = Cortex::start(&[("a", node.address)], "", extra).await;
    (node, cortex)
}

async fn call(cortex: &Cortex, method: Method, path: &str) -> (StatusCode, Value) {
    let url = format!("{}/v1/responses/{path}", cortex.api);
    let reply = cortex.client.request(method, url).send().await.unwrap();
    (reply.status(), reply.json().await.unwrap())
}

/// Asks for a response and gives its id.
async fn create(cortex: &Cortex, body: Value) -> (String, Value) {
    let (status, response) = cortex.ask("/v1/responses", &body).await;
    assert_eq!(status, StatusCode::OK, "{response}");
    (response["id"].as_str().unwrap().into(), response)
}

/// The events of a stream, in order.
async fn events(cortex: &Cortex, body: Value) -> Vec<Value> {
    let text = cortex.post("/v1/responses", &body).await.text().await;
    text.unwrap()
        .lines()
        .filter_map(|line| line.strip_prefix("data: "))
        .map(|data| serde_json::from_str(data).unwrap())
        .collect()
}

#[tokio::test]
async fn a_conversation_goes_on_whole_and_streamed() {
    let (node, cortex) = cortex("").await;
    let (first, response) = create(&cortex, json!({"model": "m", "input": "one"})).await;
    assert_eq!(response["status"], "completed");
    assert_eq!(response["output"][0]["content"][0]["text"], "a");
    assert_eq!(response["usage"]["total_tokens"], 10);

    node.script(Script::Stream(words(&["b", "c"])));
    let second =
        json!({"model": "m", "stream": true, "input": "two", "previous_response_id": first});
    let events = events(&cortex, second).await;
    let kinds: Vec<&str> = events
        .iter()
        .map(|event| event["type"].as_str().unwrap())
        .collect();
    assert_eq!(
        kinds,
        [
            "response.created",
            "response.in_progress",
            "response.output_item.added",
            "response.content_part.added",
            "response.output_text.delta",
            "response.output_text.delta",
            "response.output_text.done",
            "response.content_part.done",
            "response.output_item.done",
            "response.completed",
        ]
    );
    let last = &events.last().unwrap()["response"];
    assert_eq!(last["previous_response_id"], first);

    node.script(Script::Answer);
    let third = json!({"model": "m", "input": "three", "previous_response_id": last["id"]});
    create(&cortex, third).await;
    let sent = node.seen();
    let said: Vec<(&str, &str)> = sent.last().unwrap().body["messages"]
        .as_array()
        .unwrap()
        .iter()
        .map(|message| {
            (
                message["role"].as_str().unwrap(),
                message["content"].as_str().unwrap(),
            )
        })
        .collect();
    let expected = [
        ("user", "one"),
        ("assistant", "a"),
        ("user", "two"),
        ("assistant", "bc"),
        ("user", "three"),
    ];
    assert_eq!(said, expected);
}

#[tokio::test]
async fn a_response_can_be_looked_up_until_it_is_deleted() {
    let (_node, cortex) = cortex("").await;
    let (id, response) = create(&cortex, json!({"model": "m", "input": "one"})).await;
    assert_eq!(cortex.metric("cortex_responses_kept").await, Some(1.0));
    assert_eq!(
        call(&cortex, Method::GET, &id).await,
        (StatusCode::OK, response)
    );
    let (status, items) = call(&cortex, Method::GET, &format!("{id}/input_items")).await;
    assert_eq!(status, StatusCode::OK);
    assert_eq!(items["data"][0]["content"][0]["text"], "one");
    let (status, error) = call(&cortex, Method::POST, &format!("{id}/cancel")).await;
    assert_eq!(status, StatusCode::BAD_REQUEST, "{error}");
    let (status, gone) = call(&cortex, Method::DELETE, &id).await;
    assert_eq!((status, &gone["deleted"]), (StatusCode::OK, &json!(true)));
    for (method, path) in [
        (Method::GET, id.clone()),
        (Method::DELETE, id.clone()),
        (Method::GET, format!("{id}/input_items")),
        (Method::POST, format!("{id}/cancel")),
    ] {
        let (status, error) = call(&cortex, method, &path).await;
        assert_eq!(status, StatusCode::NOT_FOUND, "{path}");
        assert_eq!(error["error"]["type"], "invalid_request_error", "{error}");
    }
    let on = json!({"model": "m", "input": "two", "previous_response_id": id});
    let (status, error) = cortex.ask("/v1/responses", &on).await;
    assert_eq!(status, StatusCode::BAD_REQUEST);
    assert_eq!(error["error"]["code"], "previous_response_not_found");
    assert_eq!(error["error"]["param"], "previous_response_id");
    assert_eq!(cortex.metric("cortex_responses_kept").await, Some(0.0));
    let (status, _) = call(&cortex, Method::PUT, &id).await;
    assert_eq!(status, StatusCode::METHOD_NOT_ALLOWED);
}

#[tokio::test]
async fn what_is_not_to_be_kept_is_not() {
    let (_node, cortex) = cortex("").await;
    let (id, _) = create(
        &cortex,
        json!({"model": "m", "input": "one", "store": false}),
    )
    .await;
    assert_eq!(
        call(&cortex, Method::GET, &id).await.0,
        StatusCode::NOT_FOUND
    );
}

#[tokio::test]
async fn a_stream_that_breaks_fails_with_numbers_and_ids_that_fit() {
    let (node, cortex) = cortex("").await;
    node.script(Script::Tear(words(&["b"])[..2].to_vec()));
    let ask = json!({"model": "m", "stream": true, "input": "one"});
    let stream = events(&cortex, ask);
    let step = async {
        node.asked(1).await;
        tests::until("the tear", || async {
            node.step();
            (node.open() == 0).then_some(())
        })
        .await;
    };
    let (events, ()) = tokio::join!(stream, step);
    for (number, event) in events.iter().enumerate() {
        assert_eq!(event["sequence_number"], number, "{event}");
    }
    let [.., error, failed] = &events[..] else {
        panic!("there are events");
    };
    assert_eq!(
        (&error["type"], &error["code"]),
        (&json!("error"), &json!("upstream_error"))
    );
    assert_eq!(error["error"]["message"], error["message"]);
    let response = &failed["response"];
    assert_eq!(failed["type"], "response.failed");
    assert_eq!(
        (&response["status"], &response["error"]["code"]),
        (&json!("failed"), &json!("server_error"))
    );
    assert_eq!(response["output"][0]["content"][0]["text"], "b");
    assert_eq!(response["id"], events[0]["response"]["id"]);
    let id = response["id"].as_str().unwrap();
    assert_eq!(
        call(&cortex, Method::GET, id).await,
        (StatusCode::OK, response.clone())
    );
}

#[tokio::test]
async fn a_nodes_refusal_is_told_with_this_apis_name_of_the_field() {
    let (node, cortex) = cortex("").await;
    let refusal = json!({"error": {"message": "no formats", "type": "invalid_request_error", "param": "response_format", "code": null}});
    node.script(Script::Refuse(400, refusal));
    let format = json!({"format": {"type": "json_object"}});
    let (status, error) = cortex
        .ask(
            "/v1/responses",
            &json!({"model": "m", "input": "x", "text": format}),
        )
        .await;
    assert_eq!(status, StatusCode::BAD_REQUEST);
    assert_eq!(error["error"]["param"], "text.format");
    let background = json!({"model": "m", "input": "x", "background": true});
    let (status, error) = cortex.ask("/v1/responses", &background).await;
    assert_eq!(
        (status, &error["error"]["param"]),
        (StatusCode::BAD_REQUEST, &json!("background"))
    );
}

#[tokio::test]
async fn responses_on_disk_outlive_the_gateway() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("responses");
    let extra = format!("[responses]\npath = \"{}\"\nentries = 2\n", path.display());
    let (node, first) = cortex(&extra).await;
    let (id, response) = create(&first, json!({"model": "m", "input": "one"})).await;
    let mut daemon = first.daemon;
    daemon.signal("TERM");
    daemon.ended().await;

    let second = Cortex::start(&[("a", node.address)], "", &extra).await;
    assert_eq!(
        call(&second, Method::GET, &id).await,
        (StatusCode::OK, response)
    );
    let on = json!({"model": "m", "input": "two", "previous_response_id": id});
    create(&second, on).await;
    let sent = node.seen();
    let messages = &sent.last().unwrap().body["messages"];
    assert_eq!(messages.as_array().unwrap().len(), 3);
    create(&second, json!({"model": "m", "input": "three"})).await;
    create(&second, json!({"model": "m", "input": "four"})).await;
    assert_eq!(
        call(&second, Method::GET, &id).await.0,
        StatusCode::NOT_FOUND
    );
    assert_eq!(second.metric("cortex_responses_kept").await, Some(2.0));
    assert_eq!(
        second.metric("cortex_responses_evicted_total").await,
        Some(2.0)
    );
}

#[tokio::test]
async fn a_file_that_cannot_be_opened_is_said_at_the_start() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("responses");
    std::fs::write(&path, "this is no store of responses").unwrap();
    let config = folder.path().join("cortex.toml");
    std::fs::write(&config, "[responses]\npath = \"responses\"\n").unwrap();
    let mut daemon =
        tests::daemon::Daemon::start("cortex", &["serve", "--config", config.to_str().unwrap()]);
    daemon.line("responses.path = ").await;
    assert_eq!(daemon.ended().await, Some(1));
}

#[tokio::test]
async fn bounds_follow_a_reload() {
    let (node, mut cortex) = cortex("").await;
    let (id, _) = create(&cortex, json!({"model": "m", "input": "one"})).await;
    let none = "[responses]\nentries = 0\n";
    cortex.reload(&[("a", node.address)], "", none).await;
    let (_, _) = create(&cortex, json!({"model": "m", "input": "two"})).await;
    assert_eq!(
        call(&cortex, Method::GET, &id).await.0,
        StatusCode::OK,
        "what is kept stays"
    );
    let asking = json!({"model": "m", "input": "x", "store": true});
    let (status, error) = cortex.ask("/v1/responses", &asking).await;
    assert_eq!(
        (status, &error["error"]["param"]),
        (StatusCode::BAD_REQUEST, &json!("store"))
    );
}
