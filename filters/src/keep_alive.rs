//! A client that waits for a stream hears from us while nothing comes: a model is loading, a node is thinking.

use crate::residency::{Progress, Residency};
use crate::{Body, Exchange, Failure, Request, Response, ResponseFuture};
use bytes::Bytes;
use futures::StreamExt;
use futures::future::{Either, select};
use http::{HeaderValue, header};
use protocol::ApiError;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::time::sleep;
use tower::{Layer, Service};

/// Puts [`KeepAlive`] around a stack.
#[derive(Clone)]
pub struct KeepAliveLayer {
    period: Duration,
    residency: Arc<dyn Residency>,
}

impl KeepAliveLayer {
    /// Speaks after each `period` of silence; `residency` knows what is waited for.
    #[must_use]
    pub fn new(period: Duration, residency: Arc<dyn Residency>) -> Self {
        Self { period, residency }
    }
}

/// Begins the reply to a streaming request after a period without one, and fills the wait with comments.
///
/// Until then a failure has its proper status; after that it can only be told as an event.
#[derive(Clone)]
pub struct KeepAlive<S> {
    inner: S,
    layer: KeepAliveLayer,
}

impl<S> Layer<S> for KeepAliveLayer {
    type Service = KeepAlive<S>;

    fn layer(&self, inner: S) -> KeepAlive<S> {
        KeepAlive {
            inner,
            layer: self.clone(),
        }
    }
}

impl<S> Service<Request> for KeepAlive<S>
where
    S: Service<Request, Response = Response, Error = Failure, Future = ResponseFuture>,
{
    type Response = Response;
    type Error = Failure;
    type Future = ResponseFuture;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Failure>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Request) -> Self::Future {
        if !request.exchange.is_stream() {
            return self.inner.call(request);
        }
        let wait = Wait {
            layer: self.layer.clone(),
            exchange: request.exchange.clone(),
        };
        let response = self.inner.call(request);
        Box::pin(async move {
            match select(response, Box::pin(sleep(wait.layer.period))).await {
                Either::Left((response, _)) => response,
                Either::Right(((), response)) => Ok(begin(response, wait)),
            }
        })
    }
}

/// A client that waits.
struct Wait {
    layer: KeepAliveLayer,
    exchange: Arc<Exchange>,
}

impl Wait {
    /// What is said meanwhile: how far the model is, where that is what is waited for. Dialects with a form of their own
    /// for it translate it.
    fn comment(&self) -> Bytes {
        let model = self.exchange.model();
        // a line of its own must not become two, whatever a node calls its models
        let name = model.replace(char::is_control, " ");
        match self.layer.residency.progress(model) {
            None => Bytes::from_static(b": keep-alive\n\n"),
            Some(Progress::Queued) => format!(": waiting for {name}\n\n").into(),
            Some(Progress::Loading(share)) => {
                let share = 100.0 * share.clamp(0.0, 1.0);
                format!(": loading {name} {share:.0} %\n\n").into()
            }
        }
    }
}

/// Where a reply that has begun early stands.
enum Stage {
    /// The stack below has not answered yet.
    Waiting(ResponseFuture),
    /// Its body passes.
    Passing(Body),
    Over,
}

fn begin(response: ResponseFuture, wait: Wait) -> Response {
    let first = futures::stream::iter([Ok(wait.comment())]);
    let stages = (Stage::Waiting(response), wait);
    let body = futures::stream::unfold(stages, |(stage, wait)| next(stage, wait));
    let mut response = Response::new(Body::stream(first.chain(body)));
    response.headers_mut().insert(
        header::CONTENT_TYPE,
        HeaderValue::from_static("text/event-stream"),
    );
    response
}

async fn next(mut stage: Stage, wait: Wait) -> Option<(Result<Bytes, ApiError>, (Stage, Wait))> {
    let period = wait.layer.period;
    loop {
        stage = match stage {
            Stage::Waiting(response) => match select(response, Box::pin(sleep(period))).await {
                Either::Left((Ok(response), _)) => Stage::Passing(response.into_body()),
                Either::Left((Err(failure), _)) => {
                    return Some((Err(failure.error), (Stage::Over, wait)));
                }
                Either::Right(((), response)) => {
                    return Some((Ok(wait.comment()), (Stage::Waiting(response), wait)));
                }
            },
            Stage::Passing(mut body) => {
                let piece = body.next().await?;
                return Some((piece, (Stage::Passing(body), wait)));
            }
            Stage::Over => return None,
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::residency::{Lease, Leasing};
    use protocol::ErrorKind;
    use std::sync::atomic::{AtomicUsize, Ordering};

    /// A model that is waited for, then loaded, and then served.
    #[derive(Default)]
    struct Coming(AtomicUsize);

    impl Residency for Coming {
        fn lease(&self, _: &Arc<str>) -> Leasing {
            panic!("nobody asks here")
        }

        fn resident(&self, _: &Arc<str>) -> Option<Lease> {
            None
        }

        fn progress(&self, _: &str) -> Option<Progress> {
            match self.0.fetch_add(1, Ordering::Relaxed) {
                0 => Some(Progress::Queued),
                1 => Some(Progress::Loading(0.423)),
                _ => None,
            }
        }
    }

    /// Asks through the layer for an answer that takes `wait`.
    async fn ask(
        wait: Duration,
        stream: bool,
        answer: fn() -> Result<Response, Failure>,
    ) -> Result<Response, Failure> {
        let (head, ()) = http::Request::new(()).into_parts();
        let request = Request::new(head, Bytes::new());
        request.exchange.set_target("m\nn".into(), stream);
        let inner = tower::service_fn(move |_: Request| -> ResponseFuture {
            Box::pin(async move {
                sleep(wait).await;
                answer()
            })
        });
        KeepAliveLayer::new(Duration::from_secs(10), Arc::<Coming>::default())
            .layer(inner)
            .call(request)
            .await
    }

    fn answer() -> Result<Response, Failure> {
        Ok(Response::new(Body::stream(futures::stream::iter([Ok(
            Bytes::from_static(b"data: 1\n\n"),
        )]))))
    }

    fn refusal() -> Result<Response, Failure> {
        Err(ApiError::new(ErrorKind::Unavailable, "it would not load").into())
    }

    #[tokio::test(start_paused = true)]
    async fn a_silent_stream_is_told_what_it_waits_for_and_then_goes_on() {
        let response = ask(Duration::from_secs(35), true, answer)
            .await
            .expect("begins");
        let body = response.into_body().collect(1000).await.expect("goes on");
        let body = String::from_utf8_lossy(&body);
        let said = ": waiting for m n\n\n: loading m n 42 %\n\n: keep-alive\n\ndata: 1\n\n";
        assert_eq!(body, said);
    }

    #[tokio::test(start_paused = true)]
    async fn a_quick_failure_keeps_its_status_and_a_late_one_breaks_the_stream() {
        let quick = ask(Duration::from_secs(1), true, refusal)
            .await
            .expect_err("fails");
        assert_eq!(quick.error.kind, ErrorKind::Unavailable);
        let late = ask(Duration::from_secs(15), true, refusal)
            .await
            .expect("has begun");
        let error = late
            .into_body()
            .collect(1000)
            .await
            .expect_err("then fails");
        assert_eq!(error.kind, ErrorKind::Unavailable);
    }

    #[tokio::test(start_paused = true)]
    async fn a_whole_reply_is_waited_for_in_silence() {
        let response = ask(Duration::from_secs(60), false, answer)
            .await
            .expect("comes");
        let body = response.into_body().collect(1000).await.expect("whole");
        assert_eq!(&*body, b"data: 1\n\n");
    }
}
