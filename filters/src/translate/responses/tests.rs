use super::accumulate::accumulate;
use super::*;
use crate::translate::fields::Fate;
use protocol::ErrorKind;
use protocol::chat::{
    ChatChunk, ChunkChoice, Delta, FinishReason, FunctionCallDelta, ToolCallDelta,
};
use protocol::usage::Usage;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};
use serde_json::{Value, json};

fn exchange() -> Arc<Exchange> {
    Exchange::open(&http::Request::new(()).into_parts().0)
}

/// `fields` over a plain request.
fn request(fields: Value) -> Result<(Value, Box<dyn Answer>), ApiError> {
    let mut request = json!({"model": "m", "input": "hi"});
    let base = request.as_object_mut().expect("an object");
    base.extend(fields.as_object().expect("an object").clone());
    let (chat, answer) = Responses.request(request.to_string().as_bytes(), &exchange())?;
    Ok((serde_json::to_value(chat).expect("serialises"), answer))
}

#[test]
fn what_cannot_be_honoured_is_refused_by_name() {
    let function = json!({"type": "function", "name": "f", "parameters": {}});
    let cases = [
        (json!({"background": true}), "background"),
        (json!({"conversation": "conv_1"}), "conversation"),
        (json!({"prompt": {"id": "pmpt_1"}}), "prompt"),
        (json!({"truncation": "auto"}), "truncation"),
        (json!({"logprobs": true}), "logprobs"),
        (
            json!({"context_management": [{"type": "compaction"}]}),
            "context_management",
        ),
        (json!({"moderation": {"model": "x"}}), "moderation"),
        (
            json!({"prompt_cache_options": {"prewarm": true}}),
            "prompt_cache_options",
        ),
        (json!({"include": ["file_search_call.results"]}), "include"),
        (json!({"messages": []}), "messages"),
        (json!({"max_tokens": 3}), "max_tokens"),
        (
            json!({"response_format": {"type": "text"}}),
            "response_format",
        ),
        (json!({"text": {"verbosity": "low"}}), "text.verbosity"),
        (
            json!({"text": {"format": {"type": "grammar"}}}),
            "text.format.type",
        ),
        (
            json!({"text": {"format": {"type": "json_schema", "name": "x"}}}),
            "text.format.schema",
        ),
        (
            json!({"reasoning": {"summary": "concise"}}),
            "reasoning.summary",
        ),
        (json!({"reasoning": {"mode": "pro"}}), "reasoning.mode"),
        (json!({"reasoning": {"effort": 3}}), "reasoning.effort"),
        (json!({"metadata": {"a": 1}}), "metadata"),
        (json!({"tools": [{"type": "web_search"}]}), "tools[0].type"),
        (
            json!({"tools": [function, {"type": "mcp", "server_label": "x"}]}),
            "tools[1].type",
        ),
        (json!({"tools": [{"type": "function"}]}), "tools[0].name"),
        (
            json!({"tool_choice": {"type": "web_search_preview"}}),
            "tool_choice",
        ),
        (
            json!({"tool_choice": {"type": "function", "name": "f"}}),
            "tool_choice",
        ),
        (
            json!({"tools": [function], "tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "g"}]}}),
            "tool_choice.tools",
        ),
        (json!({"temperature": "hot"}), "temperature"),
        (json!({"input": null}), "input"),
        (json!({"input": 7}), "input"),
        (
            json!({"input": [{"role": "robot", "content": ""}]}),
            "input[0].role",
        ),
        (json!({"input": [{"role": "user"}]}), "input[0].content"),
        (
            json!({"input": [{"role": "user", "content": [{"type": "input_file", "file_id": "f"}]}]}),
            "input[0].content[0].type",
        ),
        (
            json!({"input": [{"role": "user", "content": [{"type": "input_image", "file_id": "f"}]}]}),
            "input[0].content[0].image_url",
        ),
        (
            json!({"input": [{"role": "system", "content": [{"type": "input_image", "image_url": "u"}]}]}),
            "input[0].content[0].type",
        ),
        (
            json!({"input": [{"type": "web_search_call", "id": "ws_1"}]}),
            "input[0].type",
        ),
        (
            json!({"input": [{"type": "computer_call_output", "output": {"type": "computer_screenshot"}}]}),
            "input[0].type",
        ),
        (
            json!({"input": [{"type": "item_reference", "id": "rs_1"}]}),
            "input[0]",
        ),
        (
            json!({"input": [{"type": "function_call", "name": "f"}]}),
            "input[0].call_id",
        ),
        (
            json!({"input": [{"type": "function_call_output", "output": "x"}]}),
            "input[0].call_id",
        ),
    ];
    for (fields, param) in cases {
        let told = fields.to_string();
        let error = request(fields)
            .err()
            .unwrap_or_else(|| panic!("{told} was taken"));
        assert_eq!(error.kind, ErrorKind::InvalidRequest, "{told}");
        assert_eq!(error.param.as_deref(), Some(param), "{told}: {error}");
    }
}

#[test]
fn every_row_of_the_table_is_true() {
    let (before, _) = request(json!({})).expect("a plain request");
    for row in rows() {
        let sample = serde_json::from_str(row.sample).expect(row.name);
        let after = request(sample);
        match row.fate {
            Fate::Refused(_) => {
                let error = after.err().expect(row.name);
                let name = row.name.split(' ').next();
                assert_eq!(error.param.as_deref(), name, "{error}");
            }
            Fate::Becomes(target) => {
                let (after, _) = after.unwrap_or_else(|error| panic!("{}: {error}", row.name));
                let key = target.rsplit(['.', ']']).next().expect("a last word");
                assert_ne!(after, before, "{} changes nothing", row.name);
                let written = after.to_string();
                let found = written.contains(&format!("\"{key}\":"));
                assert!(found, "{}: no {key} in {written}", row.name);
            }
            Fate::Honoured(_) | Fate::Accepted(_) => {
                after.unwrap_or_else(|error| panic!("{}: {error}", row.name));
            }
        }
    }
}

#[test]
fn what_asks_for_nothing_is_taken_and_goes_no_further() {
    let harmless = json!({
        "background": false, "truncation": "disabled", "top_logprobs": 0, "store": true, "service_tier": "auto",
        "conversation": null, "prompt": null, "tools": [], "tool_choice": null, "text": {"format": {"type": "text"}},
        "include": ["reasoning.encrypted_content"], "stream_options": {"include_obfuscation": false},
        "reasoning": {"effort": null}, "previous_response_id": null, "max_tool_calls": 3, "metadata": {"a": "b"},
        "prompt_cache_options": {"mode": "implicit"}, "image": {"context_compression": "auto"},
    });
    let (chat, _) = request(harmless).expect("is taken");
    assert_eq!(
        chat,
        json!({"model": "m", "messages": [{"role": "user", "content": "hi"}]})
    );
}

#[test]
fn what_nobody_here_knows_is_for_the_node_to_judge() {
    let (chat, _) = request(json!({"top_k": 7, "seed": 1})).expect("is taken");
    assert_eq!((&chat["top_k"], &chat["seed"]), (&json!(7), &json!(1)));
}

#[test]
fn a_nodes_refusal_names_the_field_of_this_api() {
    for (theirs, here) in [
        ("messages[3].content", "input"),
        ("max_tokens", "max_output_tokens"),
        ("response_format", "text.format"),
        ("reasoning_effort", "reasoning.effort"),
        ("tools[2].function.strict", "tools[2].strict"),
        ("temperature", "temperature"),
    ] {
        let error = Responses.refusal(ApiError::invalid(theirs, "no"));
        assert_eq!(error.param.as_deref(), Some(here));
    }
}

fn events(fields: Value) -> (Box<Events>, Arc<Exchange>) {
    let exchange = exchange();
    let mut request = json!({"model": "m", "input": "hi", "stream": true});
    let base = request.as_object_mut().expect("an object");
    base.extend(fields.as_object().expect("an object").clone());
    let request = crate::translate::read(request.to_string().as_bytes()).expect("is a request");
    let key = "k".repeat(32);
    let (_, response) = request::to_chat(request, format!("resp_{key}")).expect("is fine");
    (
        Box::new(Events::new(response, key, exchange.clone())),
        exchange,
    )
}

fn chunk(delta: Delta, finish: Option<FinishReason>) -> ChatChunk {
    ChatChunk {
        id: "chatcmpl-1".into(),
        object: "chat.completion.chunk".into(),
        created: 5,
        model: "m".into(),
        choices: vec![ChunkChoice {
            index: 0,
            delta,
            logprobs: None,
            finish_reason: finish,
            stop_reason: None,
        }],
        usage: None,
        timings: None,
    }
}

fn word(random: &mut StdRng) -> String {
    let words = ["", "a", "{\"x\":", "1}", "é", "\n\n", "data: [DONE]"];
    (*words.choose(random).expect("some")).to_owned()
}

/// A chunk as some upstream might send it: pieces of any kind in any order, ids twice or not at all.
fn any_chunk(random: &mut StdRng) -> ChatChunk {
    let mut delta = Delta::default();
    if random.random_bool(0.4) {
        delta.content = Some(word(random));
    }
    if random.random_bool(0.3) {
        delta.reasoning_content = Some(word(random));
    }
    if random.random_bool(0.4) {
        let call = |random: &mut StdRng| ToolCallDelta {
            index: random.random_range(0..4),
            id: random
                .random_bool(0.5)
                .then(|| format!("call_{}", random.random_range(0..3))),
            kind: None,
            function: FunctionCallDelta {
                name: random.random_bool(0.5).then(|| word(random)),
                arguments: random.random_bool(0.7).then(|| word(random)),
            },
        };
        let count = random.random_range(0..3);
        delta.tool_calls = Some((0..count).map(|_| call(random)).collect());
    }
    let finish = [
        FinishReason::Stop,
        FinishReason::Length,
        FinishReason::ToolCalls,
        FinishReason::ContentFilter,
    ];
    let finish = random
        .random_bool(0.1)
        .then(|| *finish.choose(random).expect("some"));
    let mut chunk = chunk(delta, finish);
    if random.random_bool(0.1) {
        chunk.choices.clear();
        chunk.usage = Some(Usage::new(3, 4));
    }
    chunk
}

#[test]
fn any_sequence_of_chunks_gives_a_stream_that_fits_together() {
    for seed in 0..500 {
        let mut random = StdRng::seed_from_u64(seed);
        let fields = match seed % 2 {
            0 => json!({}),
            _ => json!({"reasoning": {"summary": "auto"}}),
        };
        let (mut events, exchange) = events(fields);
        let mut out = Vec::new();
        for _ in 0..random.random_range(0..30) {
            if random.random_bool(0.05) {
                events.keep_alive(&mut out);
            }
            events.chunk(&any_chunk(&mut random), &mut out);
        }
        if seed % 5 == 0 {
            events.fail(&ApiError::new(ErrorKind::BadGateway, "it broke"), &mut out);
        } else {
            events.finish(&mut out);
        }
        let said = String::from_utf8_lossy(&out).into_owned();
        let accumulated = std::panic::catch_unwind(|| accumulate(&out))
            .unwrap_or_else(|_| panic!("seed {seed}:\n{said}"));
        let answer = exchange.answer().expect("is noted");
        assert_eq!(&*answer.id, accumulated.response["id"], "seed {seed}");
        let kept: Value = serde_json::from_slice(&answer.body).expect("is JSON");
        assert_eq!(
            kept, accumulated.response,
            "seed {seed}: what is kept is what was said"
        );
    }
}

#[test]
fn a_stream_says_what_the_whole_reply_says() {
    let reply = json!({
        "id": "chatcmpl-1", "created": 5, "model": "m",
        "choices": [{"index": 0, "finish_reason": "tool_calls", "message": {
            "role": "assistant", "reasoning_content": "hm, let me see", "content": "I will look it up.",
            "tool_calls": [
                {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": "{\"a\":1}"}},
                {"id": "call_2", "type": "function", "function": {"name": "g", "arguments": ""}},
            ],
        }}],
        "usage": {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10,
            "prompt_tokens_details": {"cached_tokens": 4}, "completion_tokens_details": {"reasoning_tokens": 2}},
    });
    let whole = events(json!({}))
        .0
        .whole(&Bytes::from(reply.to_string()))
        .expect("is read");
    let whole: Value = serde_json::from_slice(&whole).expect("is JSON");
    assert_eq!(
        whole["usage"],
        json!({"input_tokens": 7, "input_tokens_details": {"cached_tokens": 4, "cache_write_tokens": 0},
            "output_tokens": 3, "output_tokens_details": {"reasoning_tokens": 2}, "total_tokens": 10})
    );
    let message = &reply["choices"][0]["message"];
    for seed in 0..50 {
        let mut random = StdRng::seed_from_u64(seed);
        let (mut events, _) = events(json!({}));
        let mut out = Vec::new();
        let mut say = |delta: Value, out: &mut Vec<u8>| {
            let delta = serde_json::from_value(delta).expect("is a delta");
            events.chunk(&chunk(delta, None), out);
        };
        for field in ["reasoning_content", "content"] {
            for piece in pieces(message[field].as_str().expect("text"), &mut random) {
                say(json!({field: piece}), &mut out);
            }
        }
        for (index, call) in message["tool_calls"]
            .as_array()
            .expect("calls")
            .iter()
            .enumerate()
        {
            let function = &call["function"];
            say(
                json!({"tool_calls": [{"index": index, "id": call["id"], "function": {"name": function["name"]}}]}),
                &mut out,
            );
            for piece in pieces(function["arguments"].as_str().expect("text"), &mut random) {
                say(
                    json!({"tool_calls": [{"index": index, "function": {"arguments": piece}}]}),
                    &mut out,
                );
            }
        }
        let mut end = chunk(Delta::default(), Some(FinishReason::ToolCalls));
        end.usage = serde_json::from_value(reply["usage"].clone()).expect("is usage");
        events.chunk(&end, &mut out);
        events.finish(&mut out);
        let streamed = accumulate(&out).response;
        assert_eq!(streamed, whole, "seed {seed}");
    }
}

#[test]
fn log_probabilities_stand_beside_the_text_they_are_of_streamed_as_whole() {
    let score = |token: &str| json!({"token": token, "logprob": -0.1, "bytes": token.as_bytes(), "top_logprobs": []});
    let tokens = ["hm", "</think>", "\n\n", "Yes", " sir", "<end>"];
    let all: Vec<Value> = tokens.iter().copied().map(score).collect();
    let asked = json!({"include": ["message.output_text.logprobs"], "top_logprobs": 2});
    let (chat, _) = request(asked.clone()).expect("is taken");
    assert_eq!(
        (&chat["logprobs"], &chat["top_logprobs"]),
        (&json!(true), &json!(2))
    );
    let reply = json!({"id": "chatcmpl-1", "created": 5, "model": "m", "choices": [{
        "index": 0, "finish_reason": "stop", "logprobs": {"content": all},
        "message": {"role": "assistant", "reasoning_content": "hm", "content": "Yes sir"},
    }]});
    let whole = events(asked.clone())
        .0
        .whole(&Bytes::from(reply.to_string()))
        .expect("is read");
    let whole: Value = serde_json::from_slice(&whole).expect("is JSON");
    assert_eq!(
        whole["output"][1]["content"][0]["logprobs"],
        json!([score("Yes"), score(" sir")])
    );
    assert_eq!(whole["top_logprobs"], 2);
    let (mut events, _) = events(asked);
    let mut out = Vec::new();
    for (delta, scores) in [
        (json!({"reasoning_content": "hm"}), &all[..1]),
        (json!({"content": "Yes"}), &all[1..4]),
        (json!({"content": " sir"}), &all[4..5]),
        (json!({}), &all[5..]),
    ] {
        let mut chunk = chunk(serde_json::from_value(delta).expect("is a delta"), None);
        chunk.choices[0].logprobs =
            serde_json::from_value(json!({"content": scores})).expect("are scores");
        events.chunk(&chunk, &mut out);
    }
    events.finish(&mut out);
    assert_eq!(accumulate(&out).response, whole);
    let said = String::from_utf8(out).expect("text");
    let delta = format!(r#""delta":" sir","logprobs":[{}]"#, score(" sir"));
    assert!(said.contains(&delta), "{said}");
}

fn pieces(text: &str, random: &mut StdRng) -> Vec<String> {
    let mut pieces = vec![String::new()];
    for letter in text.chars() {
        if random.random_bool(0.3) {
            pieces.push(String::new());
        }
        pieces.last_mut().expect("one").push(letter);
    }
    pieces
}

#[test]
fn what_was_answered_can_be_sent_back() {
    let reply = json!({
        "id": "chatcmpl-1", "created": 5, "model": "m",
        "choices": [{"index": 0, "finish_reason": "tool_calls", "message": {
            "role": "assistant", "reasoning_content": "hm", "content": "I look.",
            "tool_calls": [{"id": "call_1", "type": "function", "function": {"name": "f", "arguments": "{}"}}],
        }}],
    });
    for fields in [json!({}), json!({"reasoning": {"summary": "detailed"}})] {
        let whole = events(fields)
            .0
            .whole(&Bytes::from(reply.to_string()))
            .expect("is read");
        let whole: Value = serde_json::from_slice(&whole).expect("is JSON");
        let mut input = whole["output"].as_array().expect("items").clone();
        input.push(json!({"type": "function_call_output", "call_id": "call_1", "output": "done"}));
        let (chat, _) = request(json!({"input": input})).expect("is taken");
        let mut expected = reply["choices"][0]["message"].clone();
        assert_eq!(
            chat["messages"],
            json!([expected.take(), {"role": "tool", "tool_call_id": "call_1", "content": "done"}])
        );
    }
}

#[test]
fn counts_that_make_no_sense_do_no_harm() {
    let (mut events, _) = events(json!({}));
    let mut out = Vec::new();
    let mut end = chunk(Delta::default(), Some(FinishReason::Stop));
    let usage = json!({"prompt_tokens": u64::MAX, "completion_tokens": 1, "total_tokens": 0});
    end.usage = serde_json::from_value(usage).expect("is usage");
    events.chunk(&end, &mut out);
    events.finish(&mut out);
    assert_eq!(accumulate(&out).response["usage"]["total_tokens"], u64::MAX);
}

#[test]
fn a_stream_that_fails_before_it_began_still_begins() {
    let (mut events, _) = events(json!({}));
    let mut out = Vec::new();
    events.fail(&ApiError::new(ErrorKind::RateLimited, "too many"), &mut out);
    let accumulated = accumulate(&out);
    assert_eq!(
        accumulated.kinds,
        [
            "response.created",
            "response.in_progress",
            "error",
            "response.failed"
        ]
    );
    assert_eq!(accumulated.response["error"]["code"], "rate_limit_exceeded");
}

#[test]
fn the_item_that_a_limit_cut_is_incomplete_and_those_before_it_are_not() {
    let (mut events, _) = events(json!({}));
    let mut out = Vec::new();
    let thought = Delta {
        reasoning_content: Some("hm".into()),
        ..Delta::default()
    };
    let text = Delta {
        content: Some("I thi".into()),
        ..Delta::default()
    };
    events.chunk(&chunk(thought, None), &mut out);
    events.chunk(&chunk(text, Some(FinishReason::Length)), &mut out);
    events.finish(&mut out);
    let response = accumulate(&out).response;
    assert_eq!(
        response["incomplete_details"],
        json!({"reason": "max_output_tokens"})
    );
    let statuses: Vec<&Value> = (0..2).map(|at| &response["output"][at]["status"]).collect();
    assert_eq!(statuses, ["completed", "incomplete"]);
}
