//! What `docs/dialects.md` says of each field is what happens to it.

#![allow(missing_docs, clippy::unwrap_used)]

use filters::translate::fields::{Fate, Field, markdown};
use filters::translate::{messages, openai, responses};
use reqwest::StatusCode;
use serde_json::{Map, Value, json};
use tests::daemon::{neuron, root};
use tests::golden::updating;

/// The document, its tables from the code.
fn document() -> String {
    let tables = [
        ("TABLE: chat", markdown(&openai::chat())),
        ("TABLE: completions", markdown(&openai::completions())),
        ("TABLE: responses", markdown(&responses::rows())),
        ("TABLE: messages", markdown(&messages::rows())),
    ];
    let mut text = std::fs::read_to_string(root().join("docs/dialects.md")).unwrap();
    for (name, table) in tables {
        let (open, close) = (format!("<!-- {name} -->\n"), "<!-- END -->");
        let start = text.find(&open).expect(name) + open.len();
        let end = start + text[start..].find(close).expect("its end is marked");
        text.replace_range(start..end, &table);
    }
    text
}

#[test]
fn the_document_shows_the_tables_of_the_code() {
    let file = root().join("docs/dialects.md");
    let document = document();
    if updating() {
        std::fs::write(&file, &document).unwrap();
    }
    assert!(
        std::fs::read_to_string(&file).unwrap() == document,
        "docs/dialects.md is behind the code: UPDATE_GOLDEN=1 cargo test -p tests --test tables"
    );
}

/// The status of a request that uses the field, the parameter it is refused for, and how many fields were unknown.
async fn send(url: &str, plain: &Value, field: &Field) -> (StatusCode, String, String) {
    let sample: Map<String, Value> = serde_json::from_str(field.sample).expect(field.name);
    let mut request = plain.clone();
    request.as_object_mut().unwrap().extend(sample);
    let reply = reqwest::Client::builder()
        .no_proxy()
        .build()
        .unwrap()
        .post(url)
        .body(request.to_string())
        .header("content-type", "application/json")
        .send()
        .await
        .unwrap();
    let status = reply.status();
    let unknown = reply.headers().get("x-unknown-fields").cloned();
    let unknown = unknown.map_or_else(|| "0".into(), |count| count.to_str().unwrap().to_owned());
    let text = reply.text().await.unwrap();
    let body: Value = serde_json::from_str(&text).unwrap_or_default();
    let param = body["error"]["param"].as_str().unwrap_or_default();
    (status, param.to_owned(), unknown)
}

#[tokio::test]
async fn a_neuron_does_with_each_field_what_the_tables_say() {
    let (_daemon, address) = neuron("qwen3_5_text", "m").await;
    let chat =
        json!({"model": "m", "max_tokens": 1, "messages": [{"role": "user", "content": "hi"}]});
    let text = json!({"model": "m", "max_tokens": 1, "prompt": "hi"});
    for (path, plain, fields) in [
        ("chat/completions", &chat, openai::chat()),
        ("completions", &text, openai::completions()),
    ] {
        for field in fields {
            let url = format!("http://{address}/v1/{path}");
            let (status, param, unknown) = send(&url, plain, &field).await;
            let what = format!("{path}, {}", field.name);
            match field.fate {
                Fate::Refused(_) => {
                    assert_eq!(status, StatusCode::BAD_REQUEST, "{what}");
                    let name = field.name.split(' ').next().unwrap();
                    let same = param.replace("[0]", "[]") == name.replace("[0]", "[]");
                    assert!(same, "{what}: refused for `{param}`");
                }
                Fate::Accepted(why) if why.contains("unknown") => {
                    assert_eq!((status, unknown.as_str()), (StatusCode::OK, "1"), "{what}");
                }
                _ => assert_eq!((status, unknown.as_str()), (StatusCode::OK, "0"), "{what}"),
            }
        }
    }
}
