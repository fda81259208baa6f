use super::*;
use serde_json::{Value, json};
use std::collections::HashMap;
use std::sync::Mutex;

/// A store that keeps everything.
#[derive(Default)]
struct All(Mutex<HashMap<String, Arc<Stored>>>);

impl All {
    fn kept(&self) -> std::sync::MutexGuard<'_, HashMap<String, Arc<Stored>>> {
        self.0.lock().expect("not poisoned")
    }
}

impl ResponseStore for All {
    fn keeps(&self) -> bool {
        true
    }

    fn put(&self, response: Stored) -> StoreFuture<()> {
        let id = response.id.to_string();
        self.kept().insert(id, Arc::new(response));
        Box::pin(std::future::ready(Ok(())))
    }

    fn get(&self, id: &str) -> StoreFuture<Option<Arc<Stored>>> {
        Box::pin(std::future::ready(Ok(self.kept().get(id).cloned())))
    }

    fn delete(&self, id: &str) -> StoreFuture<bool> {
        let found = self.kept().remove(id).is_some();
        Box::pin(std::future::ready(Ok(found)))
    }
}

/// A store that keeps nothing.
struct Nothing;

impl ResponseStore for Nothing {
    fn keeps(&self) -> bool {
        false
    }

    fn put(&self, _: Stored) -> StoreFuture<()> {
        panic!("nothing is put here")
    }

    fn get(&self, _: &str) -> StoreFuture<Option<Arc<Stored>>> {
        Box::pin(std::future::ready(Ok(None)))
    }

    fn delete(&self, _: &str) -> StoreFuture<bool> {
        Box::pin(std::future::ready(Ok(false)))
    }
}

fn id(number: usize) -> String {
    format!("resp_{number:032}")
}

/// What is below: answers with the response of that number, and gives its request's body back.
async fn send(
    store: &Arc<dyn ResponseStore>,
    method: &str,
    path: &str,
    body: Value,
    number: usize,
) -> Result<Value, ApiError> {
    let (head, ()) = http::Request::builder()
        .method(method)
        .uri(path)
        .body(())
        .expect("a valid head")
        .into_parts();
    let request = Request::new(head, Bytes::from(body.to_string()));
    let inner = tower::service_fn(move |request: Request| -> ResponseFuture {
        let id = id(number);
        let text = json!({"type": "message", "id": format!("msg_{number:032}00"), "role": "assistant", "status": "completed",
            "content": [{"type": "output_text", "text": format!("answer {number}")}]});
        let status = if number == 9 { "failed" } else { "completed" };
        let answer = json!({"id": id, "status": status, "output": [text]}).to_string();
        request.exchange.set_answer(&id, answer);
        Box::pin(async move { Ok(Response::new(Body::whole(request.body))) })
    });
    let response = RememberLayer::new(store.clone(), 10_000)
        .layer(inner)
        .call(request)
        .await
        .map_err(|failure| failure.error)?;
    let body = response.into_body().collect(1 << 20).await?;
    Ok(serde_json::from_slice(&body).expect("is JSON"))
}

async fn post(
    store: &Arc<dyn ResponseStore>,
    body: Value,
    number: usize,
) -> Result<Value, ApiError> {
    send(store, "POST", "/v1/responses", body, number).await
}

async fn get(store: &Arc<dyn ResponseStore>, path: &str) -> Result<Value, ApiError> {
    send(
        store,
        "GET",
        &format!("/v1/responses/{path}"),
        Value::Null,
        0,
    )
    .await
}

/// A store with a conversation of two turns.
async fn two_turns() -> (Arc<All>, Arc<dyn ResponseStore>) {
    let all = Arc::new(All::default());
    let store: Arc<dyn ResponseStore> = all.clone();
    post(&store, json!({"model": "m", "input": "question 1"}), 1)
        .await
        .expect("passes");
    let items = json!([{"role": "developer", "content": "rule"}, {"role": "user", "content": "question 2"}]);
    let second = json!({"model": "m", "input": items, "previous_response_id": id(1)});
    post(&store, second, 2).await.expect("passes");
    (all, store)
}

#[tokio::test]
async fn a_conversation_goes_on_from_where_it_was() {
    let (_, store) = two_turns().await;
    let third =
        json!({"previous_response_id": id(2), "model": "m", "input": "question 3", "x": 1.0});
    let sent = post(&store, third, 3).await.expect("passes");
    let said: Vec<String> = sent["input"]
        .as_array()
        .expect("a list")
        .iter()
        .map(|item| match &item["content"] {
            Value::String(text) => text.clone(),
            parts => parts[0]["text"].as_str().expect("text").to_owned(),
        })
        .collect();
    let expected = [
        "question 1",
        "answer 1",
        "rule",
        "question 2",
        "answer 2",
        "question 3",
    ];
    assert_eq!(said, expected);
    assert_eq!((&sent["x"], &sent["model"]), (&json!(1.0), &json!("m")));
}

#[tokio::test]
async fn a_request_that_goes_on_from_nothing_passes_as_it_is() {
    let (all, store) = two_turns().await;
    let plain = json!({"model": "m", "input": "alone", "store": false});
    assert_eq!(post(&store, plain.clone(), 3).await.expect("passes"), plain);
    assert_eq!(all.kept().len(), 2, "and is not kept where nobody wants it");
}

#[tokio::test]
async fn what_cannot_be_gone_on_from_is_refused() {
    let (_, store) = two_turns().await;
    let on = |id: String| json!({"model": "m", "input": "x", "previous_response_id": id});
    let error = post(&store, on("resp_none".into()), 3)
        .await
        .expect_err("unknown");
    assert_eq!(error.kind, ErrorKind::PreviousResponseNotFound);
    assert_eq!(error.param.as_deref(), Some("previous_response_id"));
    post(&store, on(id(2)), 9).await.expect("passes");
    let error = post(&store, on(id(9)), 3).await.expect_err("failed");
    assert_eq!(error.param.as_deref(), Some("previous_response_id"));
    store.delete(&id(1)).await.expect("deletes");
    let error = post(&store, on(id(2)), 3).await.expect_err("has a gap");
    assert_eq!(error.kind, ErrorKind::PreviousResponseNotFound);
    let long = json!({"model": "m", "input": "x".repeat(11_000)});
    post(&store, long, 4).await.expect("passes");
    let error = post(&store, on(id(4)), 5).await.expect_err("too long");
    assert_eq!(error.kind, ErrorKind::PayloadTooLarge);
}

#[tokio::test]
async fn where_nothing_is_kept_only_asking_for_it_is_refused() {
    let store: Arc<dyn ResponseStore> = Arc::new(Nothing);
    let plain = json!({"model": "m", "input": "x"});
    assert_eq!(post(&store, plain.clone(), 1).await.expect("passes"), plain);
    let asking = json!({"model": "m", "input": "x", "store": true});
    let error = post(&store, asking, 1).await.expect_err("refused");
    assert_eq!(error.param.as_deref(), Some("store"));
}

#[tokio::test]
async fn a_kept_response_is_given_and_forgotten() {
    let (_, store) = two_turns().await;
    let given = get(&store, &id(2)).await.expect("is there");
    assert_eq!(given["output"][0]["content"][0]["text"], "answer 2");
    let error = get(&store, &format!("{}?stream=true", id(2)))
        .await
        .expect_err("whole only");
    assert_eq!(error.param.as_deref(), Some("stream"));
    let path = format!("/v1/responses/{}", id(2));
    let gone = send(&store, "DELETE", &path, Value::Null, 0)
        .await
        .expect("is there");
    assert_eq!(
        gone,
        json!({"id": id(2), "object": "response", "deleted": true})
    );
    for method in ["DELETE", "GET"] {
        let error = send(&store, method, &path, Value::Null, 0)
            .await
            .expect_err("is gone");
        assert_eq!(error.kind, ErrorKind::ResponseNotFound);
    }
}

#[tokio::test]
async fn only_what_runs_in_the_background_could_be_cancelled() {
    let (_, store) = two_turns().await;
    for (id, kind) in [
        (id(2), ErrorKind::InvalidRequest),
        (id(7), ErrorKind::ResponseNotFound),
    ] {
        let path = format!("/v1/responses/{id}/cancel");
        let error = send(&store, "POST", &path, Value::Null, 0)
            .await
            .expect_err("refused");
        assert_eq!(error.kind, kind);
    }
}

#[tokio::test]
async fn input_items_come_in_pages_and_in_full() {
    let (_, store) = two_turns().await;
    let path = format!("{}/input_items", id(2));
    let page = get(&store, &format!("{path}?order=asc"))
        .await
        .expect("a page");
    let data = page["data"].as_array().expect("a list");
    assert_eq!(data.len(), 4, "everything the answer was made from: {page}");
    assert_eq!(
        data[0],
        json!({"type": "message", "role": "user", "content": [{"type": "input_text", "text": "question 1"}],
            "id": format!("msg_{:032}in00", 1), "status": "completed"})
    );
    assert_eq!(data[1]["role"], "assistant");
    assert_eq!(
        (&page["first_id"], &page["last_id"]),
        (&data[0]["id"], &data[3]["id"])
    );
    assert_eq!(page["has_more"], false);

    let mut seen = Vec::new();
    let mut after = String::new();
    loop {
        let page = get(&store, &format!("{path}?limit=3{after}"))
            .await
            .expect("a page");
        seen.extend(page["data"].as_array().expect("a list").clone());
        after = format!("&after={}", page["last_id"].as_str().expect("an id"));
        if page["has_more"] == false {
            break;
        }
    }
    seen.reverse();
    assert_eq!(seen, *data, "newest first, and no item twice");

    for (query, param) in [
        ("limit=0", "limit"),
        ("limit=many", "limit"),
        ("order=up", "order"),
        ("after=nothing", "after"),
        ("include[]=file_search_call.results", "include"),
    ] {
        let error = get(&store, &format!("{path}?{query}"))
            .await
            .expect_err("refused");
        assert_eq!(error.param.as_deref(), Some(param), "{query}");
    }
}

#[tokio::test]
async fn a_reference_stands_for_the_item_it_names() {
    let (_, store) = two_turns().await;
    let reference = |id: String| json!({"type": "item_reference", "id": id});
    let question = json!({"role": "user", "content": "say item_reference"});
    let items = json!([
        reference(format!("msg_{:032}in00", 1)),
        reference(format!("msg_{:032}00", 2)),
        reference("msg_none".into()),
        question,
    ]);
    let sent = post(&store, json!({"model": "m", "input": items}), 3)
        .await
        .expect("passes");
    assert_eq!(sent["input"][0]["content"][0]["text"], "question 1");
    assert_eq!(sent["input"][1]["content"][0]["text"], "answer 2");
    assert_eq!(
        sent["input"][2], items[2],
        "translation says what is wrong with it"
    );
    assert_eq!(sent["input"][3], question);
}

#[tokio::test]
async fn a_stream_is_kept_before_its_end_is_told() {
    let all = Arc::new(All::default());
    let (head, ()) = http::Request::builder()
        .method("POST")
        .uri("/v1/responses")
        .body(())
        .expect("a valid head")
        .into_parts();
    let request = Request::new(head, Bytes::from_static(br#"{"model":"m","input":"x"}"#));
    let inner = tower::service_fn(|request: Request| -> ResponseFuture {
        let exchange = request.exchange;
        let pieces = futures::stream::iter(["delta", "completed"]).map(move |piece| {
            if piece == "completed" {
                exchange.set_answer("resp_1", r#"{"id":"resp_1","output":[]}"#);
            }
            Ok(Bytes::from_static(piece.as_bytes()))
        });
        Box::pin(async move { Ok(Response::new(Body::stream(pieces))) })
    });
    let response = RememberLayer::new(all.clone(), 1000)
        .layer(inner)
        .call(request)
        .await
        .expect("streams");
    let mut body = response.into_body();
    let mut kept = Vec::new();
    while let Some(piece) = body.next().await {
        piece.expect("does not fail");
        kept.push(all.kept().len());
    }
    assert_eq!(kept, [0, 1]);
}
