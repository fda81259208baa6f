//! How long a prompt is, where no node that has the model could count it: roughly, and marked as such.

use crate::residency::Residency;
use crate::resolve::Route;
use crate::{Body, Failure, Request, Response, ResponseFuture};
use http::HeaderValue;
use protocol::chat::{ChatRequest, Content, Part};
use protocol::ext::ESTIMATED_HEADER;
use protocol::{ApiError, ErrorKind};
use std::sync::Arc;
use std::task::{Context, Poll};
use tower::{Layer, Service};

/// Puts [`Estimate`] around a stack.
#[derive(Clone)]
pub struct EstimateLayer {
    residency: Arc<dyn Residency>,
}

impl EstimateLayer {
    /// Asks `residency` whether a node has the model.
    pub fn new(residency: Arc<dyn Residency>) -> Self {
        Self { residency }
    }
}

/// Lets a node count tokens where one has the model. To ask how long a prompt is loads nothing: otherwise, and where a
/// node has no `/tokenize`, the answer is an estimate with the header [`ESTIMATED_HEADER`].
#[derive(Clone)]
pub struct Estimate<S> {
    inner: S,
    residency: Arc<dyn Residency>,
}

impl<S> Layer<S> for EstimateLayer {
    type Service = Estimate<S>;

    fn layer(&self, inner: S) -> Estimate<S> {
        Estimate {
            inner,
            residency: self.residency.clone(),
        }
    }
}

impl<S> Service<Request> for Estimate<S>
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
        if request.exchange.route != Route::CountTokens {
            return self.inner.call(request);
        }
        let target = request.exchange.target().expect("`resolve` stands above");
        let body = request.body.clone();
        let Some(resident) = self.residency.resident(&target.model) else {
            return Box::pin(std::future::ready(estimate(&body).map_err(Failure::from)));
        };
        let response = self.inner.call(request);
        Box::pin(async move {
            let _resident = resident; // so that the model is not evicted between this look and the next
            match response.await {
                Err(failure) if unable(&failure) => Ok(estimate(&body)?),
                response => response,
            }
        })
    }
}

/// Whether the node has no such path, or has let the model go a moment ago.
fn unable(failure: &Failure) -> bool {
    matches!(
        failure.error.kind,
        ErrorKind::NotFound | ErrorKind::ModelNotFound
    )
}

/// A reply as a node's `/tokenize` would give it.
fn estimate(body: &[u8]) -> Result<Response, ApiError> {
    let chat: ChatRequest = serde_json::from_slice(body).map_err(|error| {
        ApiError::new(ErrorKind::Internal, "the request cannot be measured").caused_by(error)
    })?;
    let mut response = Response::new(Body::whole(format!("{{\"count\":{}}}", count(&chat))));
    response
        .headers_mut()
        .insert(ESTIMATED_HEADER, HeaderValue::from_static("true"));
    Ok(response)
}

/// Four bytes a token, and a few tokens around each message; a picture is taken for a thousand.
fn count(chat: &ChatRequest) -> u64 {
    const BYTES: usize = 4;
    const AROUND: usize = 5;
    const IMAGE: usize = 1000;
    let mut tokens = 0;
    let mut bytes = 0;
    for message in &chat.messages {
        tokens += AROUND;
        bytes += message.reasoning_content.as_ref().map_or(0, String::len);
        match &message.content {
            None => {}
            Some(Content::Text(text)) => bytes += text.len(),
            Some(Content::Parts(parts)) => {
                for part in parts {
                    match part {
                        Part::Text { text } => bytes += text.len(),
                        _ => tokens += IMAGE,
                    }
                }
            }
        }
        for call in message.tool_calls.iter().flatten() {
            tokens += AROUND;
            bytes += call.function.name.len() + call.function.arguments.len();
        }
    }
    for tool in chat.tools.iter().flatten() {
        bytes += serde_json::to_string(tool).map_or(0, |text| text.len());
    }
    (tokens + bytes.div_ceil(BYTES)) as u64
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::residency::{Lease, Leasing, Progress};
    use bytes::Bytes;

    struct Nodes {
        resident: bool,
    }

    impl Residency for Nodes {
        fn lease(&self, _: &Arc<str>) -> Leasing {
            panic!("to count loads nothing")
        }

        fn resident(&self, _: &Arc<str>) -> Option<Lease> {
            self.resident.then(|| Lease {
                candidates: Arc::from([]),
                guard: Box::new(()),
            })
        }

        fn progress(&self, _: &str) -> Option<Progress> {
            None
        }
    }

    /// The count, and whether it is an estimate, when a node answers like `node`.
    async fn ask(
        path: &str,
        resident: bool,
        node: fn() -> Result<Response, Failure>,
    ) -> (String, bool) {
        let (head, ()) = http::Request::post(path)
            .body(())
            .expect("a valid head")
            .into_parts();
        let body = r#"{"model":"m","messages":[{"role":"user","content":"12345678"}]}"#;
        let request = Request::new(head, Bytes::from_static(body.as_bytes()));
        request.exchange.set_target("m".into(), false);
        let inner = tower::service_fn(move |_: Request| -> ResponseFuture {
            Box::pin(std::future::ready(node()))
        });
        let response = EstimateLayer::new(Arc::new(Nodes { resident }))
            .layer(inner)
            .call(request)
            .await
            .expect("an answer");
        let estimated = response.headers().contains_key(ESTIMATED_HEADER);
        let body = response.into_body().collect(100).await.expect("whole");
        (String::from_utf8_lossy(&body).into_owned(), estimated)
    }

    fn counted() -> Result<Response, Failure> {
        Ok(Response::new(Body::whole("{\"count\":42}")))
    }

    fn lacking() -> Result<Response, Failure> {
        Err(ApiError::new(ErrorKind::NotFound, "no such path").into())
    }

    #[tokio::test]
    async fn a_node_counts_where_one_has_the_model_and_an_estimate_says_that_it_is_one() {
        const COUNT: &str = "/v1/messages/count_tokens";
        assert_eq!(
            ask(COUNT, true, counted).await,
            ("{\"count\":42}".into(), false)
        );
        assert_eq!(
            ask(COUNT, false, counted).await,
            ("{\"count\":7}".into(), true)
        );
        assert_eq!(
            ask(COUNT, true, lacking).await,
            ("{\"count\":7}".into(), true)
        );
    }

    #[tokio::test]
    async fn other_requests_pass() {
        let passed = ask("/v1/messages", false, counted).await;
        assert_eq!(passed, ("{\"count\":42}".into(), false));
    }
}
