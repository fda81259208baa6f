//! Which of the nodes that can serve a request gets it.

use crate::{Body, Exchange, Failure, Request, Response, ResponseFuture};
use http::HeaderValue;
use protocol::{ApiError, ErrorKind};
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::task::{Context, Poll};
use tower::{Layer, Service};

mod least_loaded;
mod round_robin;

/// A node as something to send requests to.
#[derive(Debug)]
pub struct Endpoint {
    /// The node's name.
    pub node: Arc<str>,
    /// Where it listens.
    pub address: SocketAddr,
    /// Host and port as its `Host` header has them.
    pub authority: Arc<str>,
    /// Whether to speak TLS.
    pub tls: bool,
    /// Counts that outlive any one view of the fleet.
    pub load: Arc<NodeLoad>,
}

/// What this gateway itself sees of a node.
#[derive(Debug, Default)]
pub struct NodeLoad {
    in_flight: AtomicUsize,
    failing: AtomicBool,
}

impl NodeLoad {
    /// Requests on their way there or being answered.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.in_flight.load(Ordering::Relaxed)
    }

    /// Whether the last contact failed; such a node is asked only when there is no other.
    #[must_use]
    pub fn is_failing(&self) -> bool {
        self.failing.load(Ordering::Relaxed)
    }

    /// Notes how the last contact went. `true` if that is news.
    pub fn set_failing(&self, failing: bool) -> bool {
        self.failing.swap(failing, Ordering::Relaxed) != failing
    }
}

/// A node that can serve a request, as seen when the request asked.
#[derive(Debug, Clone)]
pub struct Candidate {
    /// Where it is.
    pub endpoint: Arc<Endpoint>,
    /// Requests the node itself counted at the last poll, those of other gateways included.
    pub reported: usize,
}

impl Candidate {
    fn load(&self) -> (bool, usize) {
        let load = &self.endpoint.load;
        (load.is_failing(), load.in_flight().max(self.reported))
    }
}

/// Chooses among candidates.
pub trait RoutingPolicy: Send + Sync + 'static {
    /// The index of the one to ask; `None` when there is none to choose from.
    fn pick(&self, exchange: &Exchange, candidates: &[&Candidate]) -> Option<usize>;
}

/// Names that configuration may use.
pub const POLICIES: [&str; 2] = ["least_loaded", "round_robin"];

/// The policy with this name.
#[must_use]
pub fn by_name(name: &str) -> Option<Arc<dyn RoutingPolicy>> {
    match name {
        "least_loaded" => Some(Arc::new(least_loaded::LeastLoaded)),
        "round_robin" => Some(Arc::new(round_robin::RoundRobin::default())),
        _ => None,
    }
}

/// Puts [`Routed`] around a stack.
#[derive(Clone)]
pub struct RouteLayer {
    policy: Arc<dyn RoutingPolicy>,
}

impl RouteLayer {
    /// Chooses by `policy`.
    pub fn new(policy: Arc<dyn RoutingPolicy>) -> Self {
        Self { policy }
    }
}

/// Chooses a node not asked before, and counts the request in flight there until its body has gone.
#[derive(Clone)]
pub struct Routed<S> {
    inner: S,
    policy: Arc<dyn RoutingPolicy>,
}

impl<S> Layer<S> for RouteLayer {
    type Service = Routed<S>;

    fn layer(&self, inner: S) -> Routed<S> {
        Routed {
            inner,
            policy: self.policy.clone(),
        }
    }
}

impl<S> Service<Request> for Routed<S>
where
    S: Service<Request, Response = Response, Error = Failure, Future = ResponseFuture>,
{
    type Response = Response;
    type Error = Failure;
    type Future = ResponseFuture;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Failure>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, mut request: Request) -> Self::Future {
        let fresh: Vec<&Candidate> = request
            .candidates
            .iter()
            .filter(|candidate| !request.exchange.has_tried(&candidate.endpoint.node))
            .collect();
        let Some(picked) = self.policy.pick(&request.exchange, &fresh) else {
            let error = ApiError::new(ErrorKind::Unavailable, "no node can serve this model now");
            return Box::pin(std::future::ready(Err(error.into())));
        };
        let endpoint = fresh[picked].endpoint.clone();
        request.exchange.try_node(endpoint.node.clone());
        let in_flight = InFlight::new(endpoint.load.clone());
        let node = HeaderValue::from_str(&endpoint.node);
        request.endpoint = Some(endpoint);
        let response = self.inner.call(request);
        Box::pin(async move {
            let mut response = response.await?;
            if let Ok(node) = node {
                response
                    .headers_mut()
                    .insert(protocol::ext::NODE_HEADER, node);
            }
            Ok(response.map(|body: Body| body.holding(in_flight)))
        })
    }
}

/// Counts a request in flight while it is held.
struct InFlight(Arc<NodeLoad>);

impl InFlight {
    fn new(load: Arc<NodeLoad>) -> Self {
        load.in_flight.fetch_add(1, Ordering::Relaxed);
        Self(load)
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        self.0.in_flight.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
impl Candidate {
    /// A candidate for tests: a node with this name that is never reached.
    pub(crate) fn example(node: &str) -> Self {
        let endpoint = Endpoint {
            node: node.into(),
            address: SocketAddr::from(([127, 0, 0, 1], 1)),
            authority: "localhost:1".into(),
            tls: false,
            load: Arc::default(),
        };
        Self {
            endpoint: Arc::new(endpoint),
            reported: 0,
        }
    }
}
