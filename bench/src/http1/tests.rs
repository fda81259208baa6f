//! Tests of the readers.

use super::*;

/// The reader, the body and the bytes left over.
type Parts<H> = (Reader<H>, Vec<u8>, Vec<u8>);

/// Reads a message in the given pieces.
fn read<H: Head>(pieces: &[&[u8]]) -> Result<Parts<H>, Malformed> {
    let mut reader = Reader::default();
    let (mut body, mut left) = (Vec::new(), Vec::new());
    for piece in pieces {
        let taken = if reader.is_done() {
            0
        } else {
            reader.feed(piece, |bytes| body.extend_from_slice(bytes))?
        };
        left.extend_from_slice(&piece[taken..]);
    }
    Ok((reader, body, left))
}

fn every_split(message: &[u8], mut check: impl FnMut(&[&[u8]])) {
    for first in 0..=message.len() {
        for second in first..=message.len() {
            check(&[
                &message[..first],
                &message[first..second],
                &message[second..],
            ]);
        }
    }
    let bytes: Vec<_> = message.chunks(1).collect();
    check(&bytes);
}

#[test]
fn a_reply_with_a_length_is_read_at_every_split() {
    let message = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nserver: x\r\n\r\nhelloHTTP";
    every_split(message, |pieces| {
        let (reader, body, left) = read::<ReplyHead>(pieces).expect("well formed");
        assert!(reader.is_done(), "{pieces:?}");
        assert_eq!(reader.message().map(|head| head.status), Some(200));
        assert_eq!(body, b"hello");
        assert_eq!(left, b"HTTP", "the next message is left alone");
    });
}

#[test]
fn a_chunked_reply_is_read_at_every_split() {
    let message = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n\
        5\r\nhello\r\n00b;a=b\r\n, world: 11\r\n0\r\nx-trailer: 1\r\n\r\nrest";
    every_split(message, |pieces| {
        let (reader, body, left) = read::<ReplyHead>(pieces).expect("well formed");
        assert!(reader.is_done(), "{pieces:?}");
        assert_eq!(body, b"hello, world: 11");
        assert_eq!(left, b"rest");
    });
}

#[test]
fn a_reply_that_ends_at_close_is_read_at_every_split() {
    let message = b"HTTP/1.1 200 OK\r\n\r\nall of it";
    every_split(message, |pieces| {
        let (reader, body, _) = read::<ReplyHead>(pieces).expect("well formed");
        assert!(!reader.is_done() && reader.ends_at_close());
        assert!(reader.message().is_some_and(|head| head.close));
        assert_eq!(body, b"all of it");
    });
}

#[test]
fn a_request_is_read_at_every_split() {
    let message = b"POST /v1/chat/completions?x=1 HTTP/1.1\r\nHost: mock\r\n\
        Content-Length: 2\r\n\r\n{}GET";
    let expected = RequestHead {
        method: "POST".into(),
        path: "/v1/chat/completions".into(),
        close: false,
        framing: Framing::Length(2),
    };
    every_split(message, |pieces| {
        let (reader, body, left) = read::<RequestHead>(pieces).expect("well formed");
        assert!(reader.is_done(), "{pieces:?}");
        assert_eq!(reader.message(), Some(&expected));
        assert_eq!(body, b"{}");
        assert_eq!(left, b"GET");
    });
}

#[test]
fn a_request_without_a_length_has_no_body() {
    let (reader, body, left) =
        read::<RequestHead>(&[b"GET /models HTTP/1.1\r\n\r\nGET"]).expect("well formed");
    assert!(reader.is_done() && body.is_empty());
    assert_eq!(left, b"GET");
}

#[test]
fn chunks_win_over_a_length_in_either_order() {
    for message in [
        "HTTP/1.1 200 OK\r\ncontent-length: 9\r\ntransfer-encoding: chunked\r\n\r\n1\r\na\r\n0\r\n\r\n",
        "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\ncontent-length: 9\r\n\r\n1\r\na\r\n0\r\n\r\n",
    ] {
        let (reader, body, _) = read::<ReplyHead>(&[message.as_bytes()]).expect("well formed");
        assert!(reader.is_done());
        assert_eq!(body, b"a");
    }
}

#[test]
fn a_connection_closes_when_either_side_or_version_says_so() {
    for (message, closes) in [
        ("GET / HTTP/1.1\r\n\r\n", false),
        ("GET / HTTP/1.1\r\nConnection: Close\r\n\r\n", true),
        ("GET / HTTP/1.0\r\n\r\n", true),
        ("GET / HTTP/1.0\r\nconnection: keep-alive\r\n\r\n", false),
    ] {
        let (reader, ..) = read::<RequestHead>(&[message.as_bytes()]).expect("well formed");
        assert_eq!(
            reader.message().map(|head| head.close),
            Some(closes),
            "{message:?}"
        );
    }
}

#[test]
fn what_is_not_http_is_refused() {
    let chunked = "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n";
    for (message, expected) in [
        (
            "HTTP/1.1 200 OK\r\ncontent-length: five\r\n\r\n".to_owned(),
            Malformed::Length,
        ),
        (format!("{chunked}\r\n"), Malformed::Chunk),
        (format!("{chunked}xyz"), Malformed::Chunk),
        (format!("{chunked}1\r\nab"), Malformed::Chunk),
        (format!("{chunked}fffffffffffffffff"), Malformed::Chunk),
        (
            format!("HTTP/1.1 200 OK\r\nx: {}", "y".repeat(MAX_HEAD)),
            Malformed::HeadTooLong,
        ),
    ] {
        assert_eq!(
            read::<ReplyHead>(&[message.as_bytes()]).err(),
            Some(expected),
            "{message:.80}"
        );
    }
    assert!(matches!(
        read::<ReplyHead>(&[b"SSH-2.0-OpenSSH\r\n"]),
        Err(Malformed::Head(_))
    ));
}
