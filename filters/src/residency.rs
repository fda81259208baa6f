//! Waits until some node can serve the model, and keeps the model there while it is used.

use crate::route::Candidate;
use crate::{Failure, Request, Response, ResponseFuture};
use protocol::ApiError;
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

/// Who knows where models are; fleet and lifecycle stay behind this trait.
pub trait Residency: Send + Sync + 'static {
    /// Asks for the use of `model`. Dropping a waiting lease gives up the wait.
    fn lease(&self, model: &Arc<str>) -> Leasing;

    /// The use of `model` if a node serves it now; never has it loaded.
    fn resident(&self, model: &Arc<str>) -> Option<Lease>;
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

/// Below it, a request has candidates, and its model is not evicted before its answer is over.
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
        let model = &request
            .exchange
            .target()
            .expect("`resolve` stands above")
            .model;
        match self.residency.lease(model) {
            Leasing::Ready(lease) => {
                request.candidates = lease.candidates;
                let response = self.inner.call(request);
                Box::pin(async move { Ok(response.await?.map(|body| body.holding(lease.guard))) })
            }
            Leasing::Waiting(wait) => {
                let mut inner = self.inner.clone();
                Box::pin(async move {
                    let lease = wait.await?;
                    request.candidates = lease.candidates;
                    let response = inner.call(request).await?;
                    Ok(response.map(|body| body.holding(lease.guard)))
                })
            }
        }
    }
}
