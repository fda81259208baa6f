//! The innermost service of the stack: sends a request to the node that `route` chose.

use super::client::{Client, ClientError, Outgoing};
use filters::{Failure, Request, Response, ResponseFuture};
use http::header;
use protocol::ext::REQUEST_ID_HEADER;
use protocol::{ApiError, ErrorKind};
use std::task::{Context, Poll};
use std::time::Duration;
use tower::Service;

/// Forwards to nodes. None of the client's own headers go along, its credentials least of all.
#[derive(Clone)]
pub(crate) struct Upstream {
    client: Client,
}

impl Upstream {
    pub(crate) fn new(client: Client) -> Self {
        Self { client }
    }

    /// Closes connections that have waited too long for a request. Never ends.
    pub(crate) async fn close_old(&self) {
        self.client.close_old().await;
    }
}

impl Service<Request> for Upstream {
    type Response = Response;
    type Error = Failure;
    type Future = ResponseFuture;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Failure>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request) -> Self::Future {
        let client = self.client.clone();
        Box::pin(async move {
            let endpoint = request.endpoint.expect("`route` stands above");
            let outgoing = Outgoing {
                method: request.head.method,
                path: request.head.uri.path(),
                headers: &[(REQUEST_ID_HEADER, &request.exchange.id)],
                body: request.body,
            };
            match client.send(&endpoint, &outgoing).await {
                Ok(response) => {
                    endpoint.load.set_failing(false);
                    accept(response)
                }
                Err(error) => {
                    if endpoint.load.set_failing(true) {
                        tracing::warn!(node = &*endpoint.node, %error, "node stopped answering");
                    }
                    Err(Failure::of_node(told(error)))
                }
            }
        })
    }
}

/// An answer that is one, or the failure that it tells of.
fn accept(response: Response) -> Result<Response, Failure> {
    let status = response.status();
    if status.is_success() {
        return Ok(response);
    }
    let retry_after = response
        .headers()
        .get(header::RETRY_AFTER)
        .and_then(|after| after.to_str().ok()?.parse().ok())
        .map(Duration::from_secs);
    let body = response.body().as_whole().cloned().unwrap_or_default();
    let error = ApiError::from_upstream(status.as_u16(), &body, retry_after);
    // a full or draining node, or one that has just let the model go: another may have room for the request
    let elsewhere =
        matches!(status.as_u16(), 429 | 502 | 503) || error.kind == ErrorKind::ModelNotFound;
    Err(Failure { error, elsewhere })
}

fn told(error: ClientError) -> ApiError {
    let message = match &error {
        ClientError::Connect { .. } => "the node cannot be reached",
        ClientError::Broken { .. } => "the node closed the connection before it answered",
        ClientError::Torn { .. } => "the node's answer broke off",
        ClientError::TooLong { .. } => "the node's answer is too long",
    };
    ApiError::new(ErrorKind::BadGateway, message).caused_by(error)
}
