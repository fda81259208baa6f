//! Whatever a node streams, a client of the Responses API gets a stream whose items end and whose numbers rise by one,
//! and one end.

#![no_main]

#[path = "../../filters/src/translate/responses/accumulate.rs"]
mod accumulate;

use filters::translate::responses::Responses;
use fuzz::upstream::both_ways;
use libfuzzer_sys::fuzz_target;
use serde_json::json;

fuzz_target!(|input: &[u8]| {
    let mut request = json!({"model": "m", "stream": true, "input": "hi"});
    if input.len() % 2 == 1 {
        request["reasoning"] = json!({"summary": "auto"});
    }
    let [whole, cut] = both_ways(input, &Responses, &request).map(|(out, failed)| {
        let accumulated = accumulate::accumulate(&out);
        let last = accumulated.kinds.last().map(String::as_str);
        assert_eq!(
            last == Some("response.failed"),
            failed.is_some(),
            "an error is told"
        );
        let out = String::from_utf8(out).expect("JSON is text");
        let id = accumulated.response["id"].as_str().expect("an id");
        let created = format!("\"created_at\":{}", accumulated.response["created_at"]);
        out.replace(&id["resp_".len()..], "KEY")
            .replace(&created, "")
    });
    assert_eq!(whole, cut);
});
