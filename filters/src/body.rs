//! A response body: whole, or still coming.

use bytes::{Bytes, BytesMut};
use futures::{Stream, StreamExt};
use protocol::{ApiError, ErrorKind};
use std::pin::Pin;
use std::task::{Context, Poll, ready};

/// Bytes on their way to the client. Dropping it cancels whatever makes them.
pub struct Body {
    inner: Inner,
    /// Let go when the body is: in-flight counts, leases.
    guards: Vec<Box<dyn Send>>,
}

enum Inner {
    Whole(Option<Bytes>),
    Stream(Pin<Box<dyn Stream<Item = Result<Bytes, ApiError>> + Send>>),
}

impl std::fmt::Debug for Body {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.inner {
            Inner::Whole(bytes) => f.debug_tuple("Whole").field(bytes).finish(),
            Inner::Stream(_) => f.write_str("Stream"),
        }
    }
}

impl Body {
    /// A body that is there already.
    #[must_use]
    pub fn whole(bytes: impl Into<Bytes>) -> Self {
        Self {
            inner: Inner::Whole(Some(bytes.into())),
            guards: Vec::new(),
        }
    }

    /// A body that is still coming.
    #[must_use]
    pub fn stream(stream: impl Stream<Item = Result<Bytes, ApiError>> + Send + 'static) -> Self {
        Self {
            inner: Inner::Stream(Box::pin(stream)),
            guards: Vec::new(),
        }
    }

    /// Keeps `guard` until the body is dropped.
    #[must_use]
    pub fn holding(mut self, guard: impl Send + 'static) -> Self {
        self.guards.push(Box::new(guard));
        self
    }

    /// The bytes, when they are all there.
    #[must_use]
    pub fn as_whole(&self) -> Option<&Bytes> {
        match &self.inner {
            Inner::Whole(bytes) => bytes.as_ref(),
            Inner::Stream(_) => None,
        }
    }

    /// Puts `wrap` around a body that is still coming; one that is whole stays as it is.
    #[must_use]
    pub fn map_stream<S>(self, wrap: impl FnOnce(Self) -> S) -> Self
    where
        S: Stream<Item = Result<Bytes, ApiError>> + Send + 'static,
    {
        match self.inner {
            Inner::Whole(_) => self,
            Inner::Stream(_) => Self::stream(wrap(self)),
        }
    }

    /// Replaces the bytes of a whole body, keeping its guards; a stream stays as it is.
    ///
    /// # Errors
    /// What `change` returns.
    pub fn try_map_whole(
        mut self,
        change: impl FnOnce(&Bytes) -> Result<Bytes, ApiError>,
    ) -> Result<Self, ApiError> {
        if let Inner::Whole(Some(bytes)) = &mut self.inner {
            *bytes = change(bytes)?;
        }
        Ok(self)
    }

    /// Waits for the rest of the body.
    ///
    /// # Errors
    /// What the stream failed with, or 502 when it grows past `limit` bytes.
    pub async fn collect(mut self, limit: usize) -> Result<Bytes, ApiError> {
        if let Inner::Whole(bytes) = &mut self.inner {
            return Ok(bytes.take().unwrap_or_default());
        }
        let mut all = BytesMut::new();
        while let Some(piece) = self.next().await {
            all.extend_from_slice(&piece?);
            if all.len() > limit {
                return Err(ApiError::new(
                    ErrorKind::BadGateway,
                    "the upstream's reply is too long",
                ));
            }
        }
        Ok(all.freeze())
    }
}

impl Stream for Body {
    type Item = Result<Bytes, ApiError>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        match &mut self.inner {
            Inner::Whole(bytes) => Poll::Ready(bytes.take().filter(|b| !b.is_empty()).map(Ok)),
            Inner::Stream(stream) => {
                let next = ready!(stream.as_mut().poll_next(cx));
                if next.is_none() {
                    self.inner = Inner::Whole(None); // whoever asks again is told the same
                }
                Poll::Ready(next)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_stream_that_has_ended_may_be_asked_again() {
        let once = futures::stream::unfold(Some("all"), |piece| async move {
            Some((Ok(Bytes::from_static(piece?.as_bytes())), None))
        });
        let mut body = Body::stream(once);
        let piece = body.next().await.map(|piece| piece.expect("no failure"));
        assert_eq!(piece, Some(Bytes::from_static(b"all")));
        assert!(body.next().await.is_none());
        assert!(body.next().await.is_none());
    }
}
