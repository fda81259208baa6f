//! What a node may send: chunks of any content in any order, comments, garbage, and an end or none.

use crate::{cut, seeded};
use arbitrary::{Arbitrary, Unstructured};
use bytes::Bytes;
use filters::translate::{Translated, Translation};
use filters::{Body, Exchange};
use futures::{FutureExt, StreamExt};
use protocol::ApiError;
use rand::Rng;
use serde_json::{Value, json};

/// A piece of a stream as it is made up.
#[derive(Debug, Arbitrary)]
enum Piece {
    Chunk(Chunk),
    Usage(u64, u64, Option<u64>),
    Comment,
    Error,
    Done,
    Raw(Vec<u8>),
}

/// A chunk as some server might send it: ids twice or not at all, names in pieces, calls in turns.
#[derive(Debug, Arbitrary)]
struct Chunk {
    content: Option<Word>,
    reasoning: Option<Word>,
    calls: Option<Vec<Call>>,
    finish: Option<Finish>,
}

#[derive(Debug, Arbitrary)]
struct Call {
    index: u8,
    id: Option<Word>,
    name: Option<Word>,
    arguments: Option<Word>,
}

#[derive(Debug, Arbitrary)]
enum Word {
    Empty,
    Open,
    Close,
    Letters,
    Id(u8),
    Any(String),
}

#[derive(Debug, Arbitrary)]
enum Finish {
    Stop,
    StopAt(Word),
    Length,
    ToolCalls,
    ContentFilter,
}

impl Word {
    fn text(&self) -> String {
        match self {
            Self::Empty => String::new(),
            Self::Open => "{\"x\":".into(),
            Self::Close => "1}".into(),
            Self::Letters => "né\n\n".into(),
            Self::Id(number) => format!("call_{}", number % 4),
            Self::Any(text) => text.clone(),
        }
    }
}

fn text(word: &Option<Word>) -> Value {
    word.as_ref().map(Word::text).into()
}

impl Chunk {
    fn json(&self) -> Value {
        let call = |call: &Call| {
            let function = json!({"name": text(&call.name), "arguments": text(&call.arguments)});
            json!({"index": call.index % 4, "id": text(&call.id), "function": function})
        };
        let calls: Option<Vec<Value>> = self
            .calls
            .as_ref()
            .map(|calls| calls.iter().map(call).collect());
        let delta = json!({
            "content": text(&self.content), "reasoning_content": text(&self.reasoning), "tool_calls": calls,
        });
        let (finish, stop) = match &self.finish {
            None => (Value::Null, Value::Null),
            Some(Finish::Stop) => ("stop".into(), Value::Null),
            Some(Finish::StopAt(word)) => ("stop".into(), word.text().into()),
            Some(Finish::Length) => ("length".into(), Value::Null),
            Some(Finish::ToolCalls) => ("tool_calls".into(), Value::Null),
            Some(Finish::ContentFilter) => ("content_filter".into(), Value::Null),
        };
        let choice =
            json!({"index": 0, "delta": delta, "finish_reason": finish, "stop_reason": stop});
        json!({"id": "chatcmpl-1", "created": 5, "model": "m", "choices": [choice]})
    }
}

/// The bytes of a stream that `input` stands for: after a zero it is the rest as it is, otherwise made up of pieces.
/// Made-up streams have now and then a byte changed.
fn stream(input: &[u8]) -> Vec<u8> {
    let Some((&kind, rest)) = input.split_first() else {
        return Vec::new();
    };
    if kind == 0 {
        return rest.to_vec();
    }
    let mut unstructured = Unstructured::new(rest);
    let mut bytes = Vec::new();
    while let Ok(piece) = Piece::arbitrary(&mut unstructured) {
        match piece {
            Piece::Chunk(chunk) => bytes.extend(format!("data: {}\n\n", chunk.json()).bytes()),
            Piece::Usage(prompt, completion, cached) => {
                let usage = json!({
                    "prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": 0,
                    "prompt_tokens_details": cached.map(|cached| json!({"cached_tokens": cached})),
                });
                bytes.extend(
                    format!("data: {}\n\n", json!({"choices": [], "usage": usage})).bytes(),
                );
            }
            Piece::Comment => bytes.extend(b": keep-alive\n\n"),
            Piece::Error => bytes.extend(b"data: {\"error\":{\"message\":\"it broke\"}}\n\n"),
            Piece::Done => bytes.extend(b"data: [DONE]\n\n"),
            Piece::Raw(raw) => bytes.extend(raw),
        }
        if unstructured.is_empty() {
            break;
        }
    }
    if kind.is_multiple_of(8) && !bytes.is_empty() {
        let at = seeded(input).random_range(0..bytes.len());
        bytes[at] ^= 1 << (kind / 8 % 8);
    }
    bytes
}

/// What a client gets of the stream that `input` stands for, all at once and cut at random: the bytes, and the error
/// that ended them.
pub fn both_ways(
    input: &[u8],
    dialect: &dyn Translation,
    request: &Value,
) -> [(Vec<u8>, Option<ApiError>); 2] {
    let stream = stream(input);
    let request = request.to_string();
    let pieces = cut(&stream, &mut seeded(input));
    [vec![&stream[..]], pieces].map(|pieces| {
        let exchange = Exchange::open(&http::Request::new(()).into_parts().0);
        let (_, answer) = dialect
            .request(request.as_bytes(), &exchange)
            .expect("is a request");
        let pieces: Vec<_> = pieces
            .into_iter()
            .map(|piece| Ok(Bytes::copy_from_slice(piece)))
            .collect();
        let mut translated =
            Translated::new(Body::stream(futures::stream::iter(pieces)), answer.stream());
        let (mut out, mut failed) = (Vec::new(), None);
        while let Some(piece) = translated
            .next()
            .now_or_never()
            .expect("nothing is waited for")
        {
            assert!(failed.is_none(), "nothing follows a failure");
            match piece {
                Ok(bytes) => out.extend_from_slice(&bytes),
                Err(error) => failed = Some(error),
            }
        }
        (out, failed)
    })
}
