//! Request bodies that come compressed, unpacked within the size limit.

use crate::{Failure, Request, Response, ResponseFuture};
use bytes::Bytes;
use flate2::read::{DeflateDecoder, MultiGzDecoder, ZlibDecoder};
use http::header::CONTENT_ENCODING;
use protocol::{ApiError, ErrorKind};
use std::io::Read;
use std::task::{Context, Poll};
use tower::{Layer, Service};

/// What a client may send, as the header `Accept-Encoding` of a 415 tells it.
const ACCEPTED: &str = "gzip, deflate, zstd, br";
/// Largest zstd window in powers of two: the 8 MiB that every decoder has to have.
const ZSTD_WINDOW: u32 = 23;
/// Encodings on top of each other; more is nobody's honest wish.
const LAYERS: usize = 2;

/// Puts [`Decode`] around a stack.
#[derive(Debug, Clone, Copy)]
pub struct DecodeLayer {
    limit: usize,
}

impl DecodeLayer {
    /// Unpacks to at most `limit` bytes.
    #[must_use]
    pub fn new(limit: usize) -> Self {
        Self { limit }
    }
}

/// Below it, bodies are plain.
#[derive(Debug, Clone)]
pub struct Decode<S> {
    inner: S,
    limit: usize,
}

impl<S> Layer<S> for DecodeLayer {
    type Service = Decode<S>;

    fn layer(&self, inner: S) -> Decode<S> {
        Decode {
            inner,
            limit: self.limit,
        }
    }
}

impl<S> Service<Request> for Decode<S>
where
    S: Service<Request, Response = Response, Error = Failure, Future = ResponseFuture>
        + Clone
        + Send
        + 'static,
{
    type Response = Response;
    type Error = Failure;
    type Future = ResponseFuture;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Failure>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, mut request: Request) -> Self::Future {
        if request.refusal.is_some() || !request.head.headers.contains_key(CONTENT_ENCODING) {
            return self.inner.call(request);
        }
        let encodings = match encodings(&request.head.headers) {
            Ok(encodings) => encodings,
            Err(error) => return Box::pin(std::future::ready(Err(error.into()))),
        };
        let mut inner = self.inner.clone();
        let limit = self.limit;
        Box::pin(async move {
            let packed = std::mem::take(&mut request.body);
            // unpacking takes as long as the sender likes: not on the threads that serve everybody
            let unpacked = tokio::task::spawn_blocking(move || {
                encodings
                    .into_iter()
                    .rev()
                    .try_fold(packed, |packed, encoding| encoding.unpack(&packed, limit))
            });
            request.body = unpacked.await.map_err(|error| {
                ApiError::new(ErrorKind::Internal, "the body was not unpacked").caused_by(error)
            })??;
            request.head.headers.remove(CONTENT_ENCODING);
            inner.call(request).await
        })
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Encoding {
    Gzip,
    Deflate,
    Zstd,
    Brotli,
}

/// The encodings of a body, in the order in which they were put on.
fn encodings(headers: &http::HeaderMap) -> Result<Vec<Encoding>, ApiError> {
    let mut encodings = Vec::new();
    for value in headers.get_all(CONTENT_ENCODING) {
        for name in value.to_str().unwrap_or("?").split(',').map(str::trim) {
            encodings.push(match name.to_ascii_lowercase().as_str() {
                "" | "identity" => continue,
                "gzip" | "x-gzip" => Encoding::Gzip,
                "deflate" => Encoding::Deflate,
                "zstd" => Encoding::Zstd,
                "br" => Encoding::Brotli,
                _ => return Err(unknown(&format!("`{name}` cannot be unpacked here"))),
            });
        }
    }
    if encodings.len() > LAYERS {
        return Err(unknown("the body is packed too many times"));
    }
    Ok(encodings)
}

fn unknown(what: &str) -> ApiError {
    ApiError {
        allow: Some(ACCEPTED),
        ..ApiError::new(
            ErrorKind::UnsupportedMediaType,
            format!("{what}; use one of {ACCEPTED}, or none"),
        )
    }
}

impl Encoding {
    fn name(self) -> &'static str {
        match self {
            Self::Gzip => "gzip",
            Self::Deflate => "deflate",
            Self::Zstd => "zstd",
            Self::Brotli => "br",
        }
    }

    fn unpack(self, packed: &[u8], limit: usize) -> Result<Bytes, ApiError> {
        let read = match self {
            Self::Gzip => take(MultiGzDecoder::new(packed), limit),
            Self::Deflate if is_zlib(packed) => take(ZlibDecoder::new(packed), limit),
            Self::Deflate => take(DeflateDecoder::new(packed), limit), // what some clients mean by it
            Self::Zstd => {
                zstd::stream::read::Decoder::with_buffer(packed).and_then(|mut decoder| {
                    decoder.window_log_max(ZSTD_WINDOW)?;
                    take(decoder, limit)
                })
            }
            // a window beyond the standard's: up to a gigabyte
            Self::Brotli if packed.first().is_some_and(|first| first & 0x7f == 0x11) => {
                Err(std::io::ErrorKind::InvalidData.into())
            }
            Self::Brotli => take(brotli::Decompressor::new(packed, 4096), limit),
        };
        let unpacked = read.map_err(|error| {
            let message = format!("the body is not valid {}", self.name());
            ApiError::new(ErrorKind::InvalidRequest, message).caused_by(error)
        })?;
        if unpacked.len() > limit {
            let message = format!("the body is longer than {limit} bytes when it is unpacked");
            return Err(ApiError::new(ErrorKind::PayloadTooLarge, message));
        }
        Ok(unpacked.into())
    }
}

/// Reads to the end, or one byte past the limit: a bomb goes off no further.
fn take(reader: impl Read, limit: usize) -> std::io::Result<Vec<u8>> {
    let mut unpacked = Vec::new();
    reader.take(limit as u64 + 1).read_to_end(&mut unpacked)?;
    Ok(unpacked)
}

/// Whether the two bytes of a zlib header are there.
fn is_zlib(packed: &[u8]) -> bool {
    matches!(packed, [first, second, ..]
        if first & 0x0f == 8 && (u16::from(*first) << 8 | u16::from(*second)) % 31 == 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Body;
    use flate2::Compression;
    use std::io::Write;

    fn pack(name: &str, plain: &[u8]) -> Vec<u8> {
        use flate2::write::{DeflateEncoder, GzEncoder, ZlibEncoder};
        let level = Compression::fast();
        match name {
            "gzip" => {
                let mut encoder = GzEncoder::new(Vec::new(), level);
                encoder.write_all(plain).expect("a vector takes all");
                encoder.finish().expect("it ends")
            }
            "deflate" => {
                let mut encoder = ZlibEncoder::new(Vec::new(), level);
                encoder.write_all(plain).expect("a vector takes all");
                encoder.finish().expect("it ends")
            }
            "raw deflate" => {
                let mut encoder = DeflateEncoder::new(Vec::new(), level);
                encoder.write_all(plain).expect("a vector takes all");
                encoder.finish().expect("it ends")
            }
            "zstd" => zstd::encode_all(plain, 1).expect("it packs"),
            "br" => {
                let mut packed = Vec::new();
                brotli::CompressorWriter::new(&mut packed, 4096, 1, 20)
                    .write_all(plain)
                    .expect("a vector takes all");
                packed
            }
            _ => plain.to_vec(),
        }
    }

    /// What the layer below gets.
    async fn ask(encoding: &str, body: Vec<u8>) -> Result<Bytes, ApiError> {
        let (head, ()) = http::Request::post("/v1/messages")
            .header("content-encoding", encoding)
            .body(())
            .expect("a valid head")
            .into_parts();
        let inner = tower::service_fn(|request: Request| -> ResponseFuture {
            assert!(!request.head.headers.contains_key(CONTENT_ENCODING));
            Box::pin(async move { Ok(Response::new(Body::whole(request.body))) })
        });
        let response = DecodeLayer::new(1000)
            .layer(inner)
            .call(Request::new(head, body.into()))
            .await
            .map_err(|failure| failure.error)?;
        response.into_body().collect(2000).await
    }

    #[tokio::test]
    async fn every_encoding_is_unpacked() {
        let plain = "{\"model\": \"m\"} ".repeat(60).into_bytes();
        for name in ["gzip", "deflate", "zstd", "br"] {
            let got = ask(name, pack(name, &plain)).await.expect(name);
            assert_eq!(got, plain, "{name}");
        }
        assert_eq!(
            ask("deflate", pack("raw deflate", &plain))
                .await
                .expect("raw"),
            plain
        );
        let twice = pack("gzip", &pack("br", &plain));
        assert_eq!(ask("br, gzip", twice).await.expect("both"), plain);
        let members = [pack("gzip", b"one "), pack("gzip", b"two")].concat();
        assert_eq!(ask("X-GZIP", members).await.expect("members"), "one two");
    }

    #[tokio::test]
    async fn a_bomb_stops_at_the_limit() {
        let bomb = vec![b' '; 10 << 20];
        for name in ["gzip", "deflate", "zstd", "br"] {
            let packed = pack(name, &bomb);
            assert!(packed.len() < 100_000, "{name} packs well");
            let error = ask(name, packed).await.expect_err(name);
            assert_eq!(error.kind, ErrorKind::PayloadTooLarge, "{name}");
        }
    }

    #[tokio::test]
    async fn what_cannot_be_unpacked_is_refused_by_kind() {
        for name in ["compress", "gzip, br, gzip", "\u{e9}"] {
            let error = ask(name, b"{}".to_vec()).await.expect_err(name);
            assert_eq!(error.kind, ErrorKind::UnsupportedMediaType, "{name}");
            assert_eq!(error.allow, Some(ACCEPTED));
        }
        for name in ["gzip", "deflate", "zstd", "br"] {
            let mut torn = pack(name, &b"plain text, as it was written. ".repeat(9));
            torn.truncate(torn.len() / 2);
            let error = ask(name, torn).await.expect_err(name);
            assert_eq!(error.kind, ErrorKind::InvalidRequest, "{name}");
        }
        let window = ask("br", b"\x11\x1e\xff".to_vec())
            .await
            .expect_err("too wide");
        assert_eq!(window.kind, ErrorKind::InvalidRequest);
    }
}
