//! Whatever a node streams, an Anthropic client gets a stream whose blocks follow one another, and one end or an error.

#![no_main]

#[path = "../../filters/src/translate/messages/accumulate.rs"]
mod accumulate;

use filters::translate::Dialect;
use filters::translate::messages::Messages;
use fuzz::upstream::both_ways;
use libfuzzer_sys::fuzz_target;
use serde_json::json;

fuzz_target!(|input: &[u8]| {
    let request = json!({"model": "m", "max_tokens": 9, "stream": true, "messages": [{"role": "user", "content": "hi"}]});
    let [whole, cut] = both_ways(input, &Messages, &request).map(|(mut out, failed)| {
        if let Some(error) = &failed {
            out.extend_from_slice(&Messages.error_event(error, "req-1"));
        }
        let said = accumulate::accumulate(&out);
        assert_eq!(said.is_err(), failed.is_some(), "an error is told");
        String::from_utf8(out).expect("JSON is text")
    });
    assert_eq!(whole, cut);
});
