//! What happens to a request on its way through cortex: one tower layer per file.
//!
//! The order is stated once, in `proxy/src/stack.rs`. Here is what each layer may count on:
//! a [`Request`] arrives whole, a [`Response`] leaves as a stream, facts about the exchange are typed in
//! [`Exchange`], and whatever fails rises as a [`Failure`] until [`rescue`] spells it in the caller's dialect.
//! Nothing here knows Pingora or owns fleet state.

use bytes::Bytes;
use protocol::ApiError;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;

pub mod ask_usage;
pub mod body;
pub mod cors;
pub mod decode;
pub mod estimate;
pub mod exchange;
pub mod foreign;
pub mod keep_alive;
pub mod metrics;
mod query;
pub mod remember;
pub mod rescue;
pub mod residency;
pub mod resolve;
pub mod retry;
pub mod route;
pub mod sampling;
pub mod timeout;
pub mod trace;
pub mod translate;

pub use body::Body;
pub use exchange::Exchange;
use route::{Candidate, Endpoint};

/// A request with its whole body.
#[derive(Debug, Clone)]
pub struct Request {
    /// Method, path and headers as the client sent them.
    pub head: http::request::Parts,
    /// The body as the next layer is to see it.
    pub body: Bytes,
    /// Why the host could not read the request whole; `resolve` refuses it with that.
    pub refusal: Option<ApiError>,
    /// What is known about the exchange so far.
    pub exchange: Arc<Exchange>,
    /// Nodes that can serve it; filled by `residency`.
    pub candidates: Arc<[Candidate]>,
    /// The one it goes to; chosen by `route`.
    pub endpoint: Option<Arc<Endpoint>>,
}

impl Request {
    /// A request as the client sent it; opens its exchange.
    #[must_use]
    pub fn new(head: http::request::Parts, body: Bytes) -> Self {
        let exchange = Exchange::open(&head);
        Self {
            head,
            body,
            refusal: None,
            exchange,
            candidates: Arc::from([]),
            endpoint: None,
        }
    }

    /// A request that could not be read whole. It passes the stack all the same, so that it is logged, counted and
    /// refused in its dialect like any other.
    #[must_use]
    pub fn refused(head: http::request::Parts, error: ApiError) -> Self {
        Self {
            refusal: Some(error),
            ..Self::new(head, Bytes::new())
        }
    }
}

/// A response whose body may still be coming.
pub type Response = http::Response<Body>;

/// What a layer's future looks like.
pub type ResponseFuture = Pin<Box<dyn Future<Output = Result<Response, Failure>> + Send>>;

/// Why a request could not be answered, and whether asking another node could help.
#[derive(Debug, thiserror::Error)]
#[error("{error}")]
pub struct Failure {
    /// What the client is told.
    #[source]
    pub error: ApiError,
    /// Nothing has reached the client and the fault may be that of one node alone.
    pub elsewhere: bool,
}

impl Failure {
    /// A failure of the node that was asked; another may do better.
    #[must_use]
    pub fn of_node(error: ApiError) -> Self {
        Self {
            error,
            elsewhere: true,
        }
    }
}

impl From<ApiError> for Failure {
    /// A failure that is the same wherever the request goes.
    fn from(error: ApiError) -> Self {
        Self {
            error,
            elsewhere: false,
        }
    }
}
