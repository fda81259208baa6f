//! Which of the nodes that can serve a request gets it.

use crate::{Body, Exchange, Failure, Request, Response, ResponseFuture};
use http::{HeaderName, HeaderValue};
use node::{InFlight, Standing, Trial};
use prometheus::{IntCounter, IntCounterVec, Opts, Registry};
use protocol::{ApiError, ErrorKind};
use std::net::SocketAddr;
use std::sync::Arc;
use std::task::{Context, Poll};
use tower::{Layer, Service};

mod least_loaded;
mod node;
mod prefix_affinity;
mod prefix_tree;
mod round_robin;
mod session;

pub use node::{Breaker, NodeLoad, Replica, now};
pub use prefix_tree::owner as seen_as;

/// How requests get into a node.
#[derive(Debug, Default, PartialEq)]
pub struct Access {
    /// What stands before every path; empty for nodes of our own.
    pub prefix: String,
    /// The value of the `authorization` header, where one is needed.
    pub authorization: Option<Secret>,
    /// Whether it is a server of others, which knows no extension of ours.
    pub foreign: bool,
}

/// Text that is not to be logged.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(pub String);

impl std::fmt::Debug for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("***")
    }
}

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
    /// Its share of requests beside nodes of weight 1; at least 1.
    pub weight: u32,
    /// How requests get in.
    pub access: Arc<Access>,
    /// Counts that outlive any one view of the fleet.
    pub load: Arc<NodeLoad>,
}

/// A node that can serve a request, as seen when the request asked.
#[derive(Debug, Clone)]
pub struct Candidate {
    /// Where it is.
    pub endpoint: Arc<Endpoint>,
    /// The model there, as this gateway uses it.
    pub replica: Arc<Replica>,
    /// Requests of others that the node counted at the last poll.
    pub foreign: usize,
    /// What [`seen_as`] calls this node with this load of the model.
    pub seen_as: u32,
}

impl Candidate {
    fn load(&self) -> usize {
        self.endpoint.load.in_flight() + self.foreign
    }

    fn weight(&self) -> usize {
        self.endpoint.weight as usize
    }

    /// How full it will be with one more request.
    fn pressure(&self) -> f64 {
        (self.load() + 1) as f64 / self.weight() as f64
    }

    fn is_lighter_than(&self, other: &Self) -> bool {
        (self.load() + 1) * other.weight() < (other.load() + 1) * self.weight()
    }
}

/// Chooses among candidates.
pub trait RoutingPolicy: Send + Sync + 'static {
    /// The one to ask. There is always one.
    fn pick(&self, request: &Request, candidates: &[&Candidate]) -> Pick;
}

/// The choice of a policy.
#[derive(Debug, Clone, Copy)]
pub struct Pick {
    /// Which of the candidates.
    pub index: usize,
    /// Why that one.
    pub how: How,
}

/// Why a node was chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum How {
    /// There was no other.
    Only,
    /// It has the session.
    Session,
    /// It has seen the beginning of the prompt.
    Prefix,
    /// It was less loaded.
    Load,
    /// It was its turn.
    Turn,
}

impl How {
    const ALL: [Self; 5] = [
        Self::Only,
        Self::Session,
        Self::Prefix,
        Self::Load,
        Self::Turn,
    ];

    fn name(self) -> &'static str {
        match self {
            Self::Only => "only",
            Self::Session => "session",
            Self::Prefix => "prefix",
            Self::Load => "load",
            Self::Turn => "turn",
        }
    }
}

/// Names that configuration may use.
pub const POLICIES: [&str; 3] = ["least_loaded", "prefix_affinity", "round_robin"];

/// How nodes are chosen.
#[derive(Debug, Clone, PartialEq)]
pub struct Routing {
    /// One of [`POLICIES`].
    pub policy: String,
    /// The header whose value names a session; `None` looks for none.
    pub session_header: Option<HeaderName>,
    /// How many times fuller than the emptiest a node may be and still get its sessions and prompts.
    pub overload: f64,
    /// Pieces of prompts that `prefix_affinity` remembers.
    pub prefixes: usize,
    /// When a node is passed over.
    pub breaker: Breaker,
}

impl Routing {
    /// The policy it names; `None` if there is none of that name.
    #[must_use]
    pub fn policy(&self) -> Option<Arc<dyn RoutingPolicy>> {
        match self.policy.as_str() {
            "least_loaded" => Some(Arc::new(least_loaded::LeastLoaded)),
            "prefix_affinity" => Some(Arc::new(prefix_affinity::PrefixAffinity::new(
                self.prefixes,
                self.overload,
            ))),
            "round_robin" => Some(Arc::new(round_robin::RoundRobin::default())),
            _ => None,
        }
    }
}

/// Counts of choices. Cheap to clone; lives as long as the process.
#[derive(Clone)]
pub struct RouteMetrics {
    picks: [IntCounter; How::ALL.len()],
}

impl RouteMetrics {
    /// Makes the family and enters it in `registry`.
    ///
    /// # Panics
    /// If `registry` already has it.
    #[must_use]
    pub fn new(registry: &Registry) -> Self {
        let opts = Opts::new(
            "cortex_route_picks_total",
            "Choices of a node, by what decided",
        );
        let picks = IntCounterVec::new(opts, &["by"]).expect("name and label are constants");
        registry
            .register(Box::new(picks.clone()))
            .expect("entered once");
        Self {
            picks: How::ALL.map(|how| picks.with_label_values(&[how.name()])),
        }
    }
}

/// Puts [`Routed`] around a stack.
#[derive(Clone)]
pub struct RouteLayer {
    shared: Arc<Shared>,
}

struct Shared {
    policy: Arc<dyn RoutingPolicy>,
    routing: Routing,
    metrics: RouteMetrics,
}

impl RouteLayer {
    /// Chooses by `policy`, which is that of `routing` and may have been in use before.
    pub fn new(policy: Arc<dyn RoutingPolicy>, routing: Routing, metrics: RouteMetrics) -> Self {
        Self {
            shared: Arc::new(Shared {
                policy,
                routing,
                metrics,
            }),
        }
    }
}

/// Chooses a node not asked before, and counts the request in flight there until its body has gone.
#[derive(Clone)]
pub struct Routed<S> {
    inner: S,
    shared: Arc<Shared>,
}

impl<S> Layer<S> for RouteLayer {
    type Service = Routed<S>;

    fn layer(&self, inner: S) -> Routed<S> {
        Routed {
            inner,
            shared: self.shared.clone(),
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
        let Some(attempt) = self.shared.choose(&request) else {
            let error = ApiError::new(ErrorKind::Unavailable, "no node can serve this model now");
            return Box::pin(std::future::ready(Err(error.into())));
        };
        let endpoint = attempt.endpoint.clone();
        request.exchange.try_node(endpoint.node.clone());
        let node = HeaderValue::from_str(&endpoint.node);
        request.endpoint = Some(endpoint);
        let response = self.inner.call(request);
        Box::pin(async move {
            let response = response.await;
            attempt.note(response.as_ref().err());
            let mut response = response?;
            if let Ok(node) = node {
                response
                    .headers_mut()
                    .insert(protocol::ext::NODE_HEADER, node);
            }
            Ok(response.map(|body: Body| body.holding(attempt)))
        })
    }
}

impl Shared {
    /// A node that this request has not asked yet, with the request counted in flight there.
    fn choose(&self, request: &Request) -> Option<Attempt> {
        let exchange = &request.exchange;
        let untried = |candidate: &&Candidate| !exchange.has_tried(&candidate.endpoint.node);
        if let [only] = &*request.candidates {
            let pick = untried(&only).then_some(How::Only)?;
            return self.begin(exchange, only, pick, true);
        }
        let mut fresh: Vec<&Candidate> = request.candidates.iter().filter(untried).collect();
        let mut time = None;
        let mut standing = |candidate: &Candidate| {
            let now = || *time.get_or_insert_with(now);
            candidate.endpoint.load.standing(now)
        };
        let best = fresh.iter().map(|candidate| standing(candidate)).min()?;
        let mixed = fresh.iter().any(|candidate| standing(candidate) != best);
        let last_resort: Vec<&Candidate> = if mixed {
            let (better, worse) = fresh
                .into_iter()
                .partition(|candidate| standing(candidate) == best);
            fresh = better;
            worse
        } else {
            Vec::new() // if all are open: better to ask one than none
        };
        for (mut pool, desperate) in [(fresh, best == Standing::Open), (last_resort, true)] {
            while !pool.is_empty() {
                let Pick { index, how } = self.pick(request, &pool);
                if let Some(attempt) = self.begin(exchange, pool[index], how, desperate) {
                    return Some(attempt);
                }
                pool.swap_remove(index);
            }
        }
        None
    }

    fn pick(&self, request: &Request, candidates: &[&Candidate]) -> Pick {
        if candidates.len() == 1 {
            return Pick {
                index: 0,
                how: How::Only,
            };
        }
        let header = self.routing.session_header.as_ref();
        let session = header.and_then(|name| request.head.headers.get(name));
        if let Some(session) = session.filter(|session| !session.is_empty()) {
            let index = session::owner(session.as_bytes(), candidates);
            let lightest = candidates
                .iter()
                .map(|node| node.pressure())
                .fold(f64::INFINITY, f64::min);
            if candidates[index].pressure() <= self.routing.overload * lightest {
                let how = How::Session;
                return Pick { index, how };
            }
        }
        self.policy.pick(request, candidates)
    }

    /// Counts the request in. `None` when the model is leaving that node, or, unless `desperate`, when another request
    /// is the trial of its circuit.
    fn begin(
        &self,
        exchange: &Arc<Exchange>,
        candidate: &Candidate,
        how: How,
        desperate: bool,
    ) -> Option<Attempt> {
        let in_flight = InFlight::enter(candidate)?;
        let trial = candidate.endpoint.load.take_trial(&self.routing.breaker);
        if trial == Trial::Missed && !desperate {
            return None;
        }
        self.metrics.picks[how as usize].inc();
        Some(Attempt {
            endpoint: candidate.endpoint.clone(),
            exchange: exchange.clone(),
            breaker: self.routing.breaker,
            trial: trial == Trial::Taken,
            _in_flight: in_flight,
        })
    }
}

/// A request being answered by one node.
struct Attempt {
    endpoint: Arc<Endpoint>,
    exchange: Arc<Exchange>,
    breaker: Breaker,
    trial: bool,
    _in_flight: InFlight,
}

impl Attempt {
    /// Notes how the answer began. A full or draining node does its work, and so does one that refuses nonsense.
    fn note(&self, failure: Option<&Failure>) {
        let load = &self.endpoint.load;
        match failure.map(|failure| failure.error.kind) {
            Some(ErrorKind::BadGateway | ErrorKind::GatewayTimeout | ErrorKind::Internal) => {
                load.failed(self.trial, &self.breaker);
            }
            _ => load.succeeded(self.trial),
        }
    }
}

impl Drop for Attempt {
    fn drop(&mut self) {
        if self.exchange.is_torn() {
            self.endpoint.load.failed(false, &self.breaker);
        }
    }
}

/// How nodes are chosen in tests.
#[cfg(test)]
pub(crate) fn example_routing(policy: &str) -> Routing {
    Routing {
        policy: policy.into(),
        session_header: Some(HeaderName::from_static("x-session-id")),
        overload: 2.0,
        prefixes: 1000,
        breaker: Breaker {
            failures: 3,
            share: 0.5,
            least: 100,
            open: std::time::Duration::from_secs(3600),
            longest: std::time::Duration::from_secs(3600),
        },
    }
}

/// A chat request with this body, for tests.
#[cfg(test)]
pub(crate) fn example_request(body: &str) -> Request {
    let (head, ()) = http::Request::new(()).into_parts();
    let request = Request::new(head, bytes::Bytes::copy_from_slice(body.as_bytes()));
    request.exchange.set_target("m".into(), false);
    request
}

#[cfg(test)]
impl Candidate {
    /// A candidate for tests: a node with this name that is never reached.
    pub(crate) fn example(node: &str) -> Self {
        Self::weighing(node, 1)
    }

    pub(crate) fn weighing(node: &str, weight: u32) -> Self {
        let endpoint = Endpoint {
            node: node.into(),
            address: SocketAddr::from(([127, 0, 0, 1], 1)),
            authority: "localhost:1".into(),
            tls: false,
            weight,
            access: Arc::default(),
            load: Arc::default(),
        };
        Self {
            endpoint: Arc::new(endpoint),
            replica: Arc::default(),
            foreign: 0,
            seen_as: seen_as(node, "m", 1),
        }
    }
}

#[cfg(test)]
mod tests;
