//! What only a model that makes sense can show: the demo model behind cortex, in every dialect.

#![allow(missing_docs, clippy::unwrap_used)]

use serde_json::{Value, json};
use tests::daemon::{Cortex, Daemon, demo};

async fn served() -> (Daemon, Cortex) {
    let (neuron, address) = demo().await;
    let cortex = Cortex::start(&[("a", address)], "", "").await;
    (neuron, cortex)
}

/// Asks greedily and gives the answer, which must be one.
async fn ask(cortex: &Cortex, path: &str, mut body: Value) -> Value {
    body["model"] = "demo".into();
    body["temperature"] = 0.into();
    let (status, answer) = cortex.ask(path, &body).await;
    assert_eq!(status, 200, "{answer}");
    answer
}

async fn chat(cortex: &Cortex, body: Value) -> Value {
    let mut answer = ask(cortex, "/v1/chat/completions", body).await;
    answer["choices"][0].take()
}

fn weather(schema: &str) -> Value {
    json!({
        "name": "get_weather",
        "description": "The weather in a city.",
        schema: {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    })
}

const QUESTION: &str = "What is the weather in Paris?";
const RESULT: &str = "sunny, 21 degrees";
const ANSWER: &str = "In Paris it is sunny and 21 degrees.";

#[tokio::test]
async fn a_tool_is_called_and_its_result_is_answered_from() {
    let (_neuron, cortex) = served().await;
    let tools = json!([{"type": "function", "function": weather("parameters")}]);
    let asked = json!({"role": "user", "content": QUESTION});
    let choice = chat(&cortex, json!({"messages": [asked], "tools": tools})).await;
    assert_eq!(choice["finish_reason"], "tool_calls", "{choice}");
    let call = &choice["message"]["tool_calls"][0];
    assert_eq!(call["function"]["name"], "get_weather");
    let arguments = call["function"]["arguments"].as_str().unwrap();
    let arguments: Value = serde_json::from_str(arguments).unwrap();
    assert_eq!(arguments, json!({"city": "Paris"}));
    let result = json!({"role": "tool", "tool_call_id": call["id"], "content": RESULT});
    let messages = json!([asked, choice["message"], result]);
    let choice = chat(&cortex, json!({"messages": messages, "tools": tools})).await;
    assert_eq!(choice["finish_reason"], "stop");
    assert_eq!(choice["message"]["content"], ANSWER);
}

#[tokio::test]
async fn messages_call_tools_in_blocks() {
    let (_neuron, cortex) = served().await;
    let tools = json!([weather("input_schema")]);
    let asked = json!({"role": "user", "content": QUESTION});
    let body = json!({"messages": [asked], "tools": tools, "max_tokens": 200});
    let answer = ask(&cortex, "/v1/messages", body).await;
    assert_eq!(answer["stop_reason"], "tool_use", "{answer}");
    let block = &answer["content"][0];
    assert_eq!(block["type"], "tool_use");
    assert_eq!(block["name"], "get_weather");
    assert_eq!(block["input"], json!({"city": "Paris"}));
    let result = json!({"type": "tool_result", "tool_use_id": block["id"], "content": RESULT});
    let messages = json!([
        asked,
        {"role": "assistant", "content": answer["content"]},
        {"role": "user", "content": [result]},
    ]);
    let body = json!({"messages": messages, "tools": tools, "max_tokens": 200});
    let answer = ask(&cortex, "/v1/messages", body).await;
    assert_eq!(answer["stop_reason"], "end_turn");
    assert_eq!(answer["content"], json!([{"type": "text", "text": ANSWER}]));
}

#[tokio::test]
async fn responses_call_functions_and_go_on_from_what_was_kept() {
    let (_neuron, cortex) = served().await;
    let mut tool = weather("parameters");
    tool["type"] = "function".into();
    let body = json!({"input": QUESTION, "tools": [tool]});
    let answer = ask(&cortex, "/v1/responses", body).await;
    let call = &answer["output"][0];
    assert_eq!(call["type"], "function_call", "{answer}");
    assert_eq!(call["arguments"], "{\"city\":\"Paris\"}");
    let result =
        json!({"type": "function_call_output", "call_id": call["call_id"], "output": RESULT});
    let body = json!({"input": [result], "tools": [tool], "previous_response_id": answer["id"]});
    let answer = ask(&cortex, "/v1/responses", body).await;
    assert_eq!(
        answer["output"][0]["content"][0]["text"], ANSWER,
        "{answer}"
    );
}

#[tokio::test]
async fn thinking_comes_before_the_answer_where_it_is_on() {
    let (_neuron, cortex) = served().await;
    let messages = json!([{"role": "user", "content": "What is cortex?"}]);
    let plain = chat(&cortex, json!({"messages": messages})).await;
    let text = plain["message"]["content"].as_str().unwrap();
    assert!(text.starts_with("Cortex is"), "{text}");
    assert_eq!(plain["message"].get("reasoning_content"), None);
    let thinking = json!({"enable_thinking": true});
    let body = json!({"messages": messages, "chat_template_kwargs": thinking});
    let choice = chat(&cortex, body).await;
    let thought = choice["message"]["reasoning_content"].as_str().unwrap();
    assert!(thought.contains("What is cortex?"), "{thought}");
    assert!(
        !choice["message"]["content"]
            .as_str()
            .unwrap()
            .contains("</think>")
    );
    let thinking = json!({"type": "enabled", "budget_tokens": 1024});
    let body =
        json!({"messages": messages, "thinking": thinking, "max_tokens": 2000, "temperature": 1});
    let (status, answer) = cortex.ask("/v1/messages", &with_model(body)).await;
    assert_eq!(status, 200, "{answer}");
    let kinds: Vec<_> = answer["content"].as_array().unwrap().iter().collect();
    assert_eq!(kinds[0]["type"], "thinking");
    assert_eq!(kinds[1]["type"], "text");
}

fn with_model(mut body: Value) -> Value {
    body["model"] = "demo".into();
    body["top_k"] = 1.into(); // as good as greedy
    body
}

#[tokio::test]
async fn a_schema_holds_the_answer_and_the_words_are_those_of_the_question() {
    let (_neuron, cortex) = served().await;
    let schema = json!({
        "type": "object",
        "properties": {"name": {"type": "string"}, "city": {"type": "string"}},
        "required": ["name", "city"],
        "additionalProperties": false,
    });
    let content = "Anna lives in Paris. Answer in JSON with the keys name, city.";
    let choice = chat(
        &cortex,
        json!({
            "messages": [{"role": "user", "content": content}],
            "response_format": {"type": "json_schema", "json_schema": {"name": "person", "schema": schema, "strict": true}},
        }),
    )
    .await;
    let text = choice["message"]["content"].as_str().unwrap();
    let found: Value = serde_json::from_str(text).unwrap();
    assert_eq!(found, json!({"name": "Anna", "city": "Paris"}));
}

#[tokio::test]
async fn a_stop_string_ends_the_answer_before_it_is_said() {
    let (_neuron, cortex) = served().await;
    let messages = json!([{"role": "user", "content": "Count from 1 to 9."}]);
    let whole = chat(&cortex, json!({"messages": messages})).await;
    assert_eq!(whole["message"]["content"], "1, 2, 3, 4, 5, 6, 7, 8, 9");
    let cut = chat(&cortex, json!({"messages": messages, "stop": [", 5"]})).await;
    assert_eq!(cut["message"]["content"], "1, 2, 3, 4");
    assert_eq!(cut["finish_reason"], "stop");
}

#[tokio::test]
async fn a_later_turn_knows_the_earlier_ones_and_does_not_compute_them_again() {
    let (_neuron, cortex) = served().await;
    let mut messages = vec![json!({"role": "system", "content": "You are a helpful assistant."})];
    let mut cached = Vec::new();
    for (question, expected) in [
        ("My name is Anna.", "Nice to meet you, Anna."),
        ("What is cortex?", "Cortex is"),
        ("What is my name?", "Your name is Anna."),
    ] {
        messages.push(json!({"role": "user", "content": question}));
        let answer = ask(
            &cortex,
            "/v1/chat/completions",
            json!({"messages": messages}),
        )
        .await;
        let message = &answer["choices"][0]["message"];
        let text = message["content"].as_str().unwrap();
        assert!(text.starts_with(expected), "{text}");
        messages.push(message.clone());
        let details = &answer["usage"]["prompt_tokens_details"];
        cached.push(details["cached_tokens"].as_u64().unwrap());
    }
    assert!(cached[2] > 0, "{cached:?}");
}

#[tokio::test]
async fn what_the_model_can_do_is_said_in_the_words_of_each_api() {
    let (_neuron, cortex) = served().await;
    let url = format!("{}/v1/models/demo", cortex.api);
    let openai = cortex.client.get(&url).send().await.unwrap();
    let openai: Value = openai.json().await.unwrap();
    let anthropic = cortex.client.get(&url).header("anthropic-version", "1");
    let anthropic: Value = anthropic.send().await.unwrap().json().await.unwrap();
    for (here, there) in [
        ("thinking", "thinking"),
        ("structured_outputs", "structured_outputs"),
    ] {
        let said = openai["capabilities"].as_array().unwrap();
        assert!(said.contains(&here.into()), "{openai}");
        let supported = &anthropic["capabilities"][there]["supported"];
        assert_eq!(*supported, Value::Bool(true), "{there}: {anthropic}");
    }
}

#[tokio::test]
async fn instructions_and_a_developers_words_go_together_at_any_place() {
    let (_neuron, cortex) = served().await;
    let words = json!({"role": "developer", "content": "Be brief."});
    let question = json!({"role": "user", "content": "Hello!"});
    let more = json!({"instructions": "Be kind.", "max_output_tokens": 5,
        "input": [words, question, words, question]});
    let answer = ask(&cortex, "/v1/responses", more).await;
    assert!(answer["usage"]["output_tokens"].as_u64().unwrap() > 0);
    let more =
        json!({"system": "Be kind.", "max_tokens": 5, "messages": [question, words, question]});
    ask(&cortex, "/v1/messages", more).await;
}
