//! Any cutting of a stream gives the same events as all of it at once, and no event passes the limit.

#![no_main]

use fuzz::{cut, seeded};
use libfuzzer_sys::fuzz_target;
use protocol::sse::{Decoder, Event, EventTooLong};

fn decode<'a>(
    limit: usize,
    pieces: impl IntoIterator<Item = &'a [u8]>,
) -> (Vec<Event>, Result<bool, EventTooLong>) {
    let mut decoder = Decoder::new(limit);
    let mut events = Vec::new();
    for piece in pieces {
        if let Err(error) = decoder.feed(piece, &mut events) {
            return (events, Err(error));
        }
    }
    let idle = decoder.is_idle();
    (events, Ok(idle))
}

fuzz_target!(|input: &[u8]| {
    let Some((&limit, stream)) = input.split_first() else {
        return;
    };
    let limit = (usize::from(limit) + 1) * 16;
    let whole = decode(limit, [stream]);
    let mut random = seeded(input);
    assert_eq!(
        decode(limit, cut(stream, &mut random)),
        whole,
        "cut at random"
    );
    assert_eq!(decode(limit, stream.chunks(1)), whole, "byte by byte");
    for event in &whole.0 {
        let length = match event {
            Event::Message { data, .. } => data.len(),
            Event::Comment(comment) => comment.len(),
        };
        assert!(length <= limit, "{length} bytes passed a limit of {limit}");
    }
});
