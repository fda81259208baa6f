//! Waits until some node can serve the model, and keeps the model there while it is used.

use crate::resolve::splice_model;
use crate::route::Candidate;
use crate::{Failure, Request, Response, ResponseFuture};
use protocol::{ApiError, ErrorKind};
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use tower::{Layer, Service};

/// Where a model is resident, and a promise that it stays so while this is held.
pub struct Lease {
    /// Nodes that serve it; never empty.
    pub candidates: Arc<[Candidate]>,
    /// Lets go when dropped.
    pub guard: Box<dyn Send>,
}

/// What asking for a lease gives.
pub enum Leasing {
    /// The model is resident.
    Ready(Lease),
    /// It has to be loaded, or its load is under way.
    Waiting(Pin<Box<dyn Future<Output = Result<Lease, ApiError>> + Send>>),
}

impl Leasing {
    async fn ready(self) -> Result<Lease, ApiError> {
        match self {
            Self::Ready(lease) => Ok(lease),
            Self::Waiting(wait) => wait.await,
        }
    }
}

/// How far a model is that somebody waits for.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Progress {
    /// No node is loading it yet.
    Queued,
    /// A node is; the share of its bytes that have been read, 0 to 1.
    Loading(f32),
}

/// Who knows where models are; fleet and lifecycle stay behind this trait.
pub trait Residency: Send + Sync + 'static {
    /// Asks for the use of `model`. Dropping a waiting lease gives up the wait.
    fn lease(&self, model: &Arc<str>) -> Leasing;

    /// The use of `model` if a node serves it now; never has it loaded.
    fn resident(&self, model: &Arc<str>) -> Option<Lease>;

    /// How far `model` is; `None` if a node serves it.
    fn progress(&self, model: &str) -> Option<Progress>;
}

/// Puts [`Resident`] around a stack.
#[derive(Clone)]
pub struct ResidencyLayer {
    residency: Arc<dyn Residency>,
}

impl ResidencyLayer {
    /// Leases from `residency`.
    pub fn new(residency: Arc<dyn Residency>) -> Self {
        Self { residency }
    }
}

/// Below it, a request has candidates, and its model is not evicted before its answer is over. Where other models may
/// answer in its place, they are asked in their order when it cannot be had or its nodes fail.
#[derive(Clone)]
pub struct Resident<S> {
    inner: S,
    residency: Arc<dyn Residency>,
}

impl<S> Layer<S> for ResidencyLayer {
    type Service = Resident<S>;

    fn layer(&self, inner: S) -> Resident<S> {
        Resident {
            inner,
            residency: self.residency.clone(),
        }
    }
}

impl<S> Service<Request> for Resident<S>
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
        let exchange = &request.exchange;
        let target = exchange.target().expect("`resolve` stands above");
        match self.residency.lease(&target.model) {
            Leasing::Ready(lease) if !exchange.may_fall_back() => {
                request.candidates = lease.candidates;
                let response = self.inner.call(request);
                Box::pin(async move { Ok(response.await?.map(|body| body.holding(lease.guard))) })
            }
            leasing => Box::pin(self.clone().answer(leasing, request)),
        }
    }
}

impl<S> Resident<S>
where
    S: Service<Request, Response = Response, Error = Failure, Future = ResponseFuture>,
{
    /// The answer of the first model that can give one.
    async fn answer(
        mut self,
        mut leasing: Leasing,
        mut request: Request,
    ) -> Result<Response, Failure> {
        loop {
            let failure = match leasing.ready().await {
                Ok(lease) => {
                    let mut own = request.clone();
                    own.candidates = lease.candidates;
                    match self.inner.call(own).await {
                        Ok(response) => return Ok(response.map(|body| body.holding(lease.guard))),
                        Err(failure) => failure,
                    }
                }
                Err(error) => error.into(),
            };
            let exchange = &request.exchange;
            if !is_the_models(&failure) {
                return Err(failure);
            }
            let Some(model) = exchange.fall_back() else {
                return Err(failure);
            };
            tracing::debug!(id = &*exchange.id, %failure, model = &*model, "asking another model");
            request.body = splice_model(&request.body, &model)?;
            leasing = self.residency.lease(&model);
        }
    }
}

/// Whether another model may do better: this one cannot be had, or the nodes that have it fail. One that has too much to
/// do is asked again later; to load another instead would make room for it at the expense of all.
fn is_the_models(failure: &Failure) -> bool {
    match failure.error.kind {
        ErrorKind::Unavailable | ErrorKind::ModelNotFound => true,
        ErrorKind::RateLimited => false,
        _ => failure.elsewhere,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Body;
    use bytes::Bytes;
    use std::sync::Mutex;

    /// A fleet that has only models whose names begin with "had".
    struct Fleet;

    impl Residency for Fleet {
        fn lease(&self, model: &Arc<str>) -> Leasing {
            Leasing::Waiting(Box::pin(std::future::ready(match self.resident(model) {
                Some(lease) => Ok(lease),
                None => Err(ApiError::new(ErrorKind::Unavailable, "it would not load")),
            })))
        }

        fn resident(&self, model: &Arc<str>) -> Option<Lease> {
            model.starts_with("had").then(|| Lease {
                candidates: Arc::from([]),
                guard: Box::new(()),
            })
        }

        fn progress(&self, _: &str) -> Option<Progress> {
            None
        }
    }

    /// Which bodies nodes see when the first of `models` is asked for and nodes answer "had-it" alone; all others fail
    /// with `kind`. And how it ends.
    async fn ask(models: &[&str], kind: ErrorKind) -> (Vec<Bytes>, Result<(), ErrorKind>) {
        let (head, ()) = http::Request::new(()).into_parts();
        let body = format!(r#"{{"model":"{}","x":1}}"#, models[0]);
        let request = Request::new(head, Bytes::from(body));
        let mut names = models.iter().map(|name| Arc::from(*name));
        let first = names.next().expect("a model");
        request.exchange.set_targets(first, names.collect(), false);
        let exchange = request.exchange.clone();
        let seen = Arc::new(Mutex::new(Vec::new()));
        let sees = seen.clone();
        let inner = tower::service_fn(move |request: Request| -> ResponseFuture {
            sees.lock().expect("one thread").push(request.body.clone());
            let answer = match request.exchange.model() {
                "had-it" => Ok(Response::new(Body::whole("fine"))),
                _ => Err(Failure::of_node(ApiError::new(kind, "no"))),
            };
            Box::pin(std::future::ready(answer))
        });
        let layer = ResidencyLayer::new(Arc::new(Fleet));
        let answer = layer.layer(inner).call(request).await;
        let answer = answer.map_err(|failure| failure.error.kind).map(drop);
        assert!(answer.is_err() || exchange.model() == "had-it");
        let seen = seen.lock().expect("one thread").clone();
        (seen, answer)
    }

    #[tokio::test]
    async fn the_next_model_answers_when_one_cannot_be_had_or_its_nodes_fail() {
        let had = Bytes::from_static(br#"{"model":"had-it","x":1}"#);
        let broken = Bytes::from_static(br#"{"model":"had-but-broken","x":1}"#);
        let dead = ErrorKind::BadGateway;
        let asked = ask(&["none", "had-it", "had-too"], dead).await;
        assert_eq!(asked, (vec![had.clone()], Ok(())));
        let asked = ask(&["had-but-broken", "none", "had-it"], dead).await;
        assert_eq!(asked, (vec![broken.clone(), had], Ok(())));
        let asked = ask(&["had-but-broken", "none"], dead).await;
        let told = Err(ErrorKind::Unavailable);
        assert_eq!(asked, (vec![broken.clone()], told), "the last one's reason");
        let asked = ask(&["had-but-broken", "had-it"], ErrorKind::RateLimited).await;
        let told = Err(ErrorKind::RateLimited);
        assert_eq!(asked, (vec![broken], told), "one that is busy is not left");
    }
}
