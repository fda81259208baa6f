//! Keeps responses, so that later requests can go on from them, and answers what clients ask about them.

use crate::exchange::Answer;
use crate::resolve::{Route, json};
use crate::translate::{self, responses::check_include, written};
use crate::{Body, Exchange, Failure, Request, Response, ResponseFuture, query};
use bytes::Bytes;
use futures::StreamExt;
use http::{HeaderValue, Method, header};
use protocol::{ApiError, ErrorKind};
use serde::Deserialize;
use serde_json::value::RawValue;
use std::borrow::Cow;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use tower::{Layer, Service};

mod items;

/// A response that is kept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stored {
    /// Its id.
    pub id: Arc<str>,
    /// The response it goes on from.
    pub previous: Option<Arc<str>>,
    /// Its own input as JSON: a string or a list of items. That of earlier responses is kept with them.
    pub input: Bytes,
    /// The response itself as JSON.
    pub response: Bytes,
}

impl Stored {
    /// About how many bytes it takes.
    #[must_use]
    pub fn size(&self) -> u64 {
        let names = self.id.len() + self.previous.as_ref().map_or(0, |id| id.len());
        (names + self.input.len() + self.response.len()) as u64
    }
}

/// The store could not do what it was asked.
#[derive(Debug, thiserror::Error)]
#[error("the store of responses failed")]
pub struct StoreError(#[source] pub Box<dyn std::error::Error + Send + Sync>);

impl From<StoreError> for ApiError {
    fn from(error: StoreError) -> Self {
        Self::new(ErrorKind::Internal, "kept responses cannot be read now").caused_by(error)
    }
}

/// What a store's methods give.
pub type StoreFuture<T> = Pin<Box<dyn Future<Output = Result<T, StoreError>> + Send>>;

/// Where responses are kept; memory and disk stay behind this trait.
pub trait ResponseStore: Send + Sync + 'static {
    /// Whether anything is kept at all.
    fn keeps(&self) -> bool;

    /// Keeps a response. When this has ended, it can be got.
    fn put(&self, response: Stored) -> StoreFuture<()>;

    /// The response of that id.
    fn get(&self, id: &str) -> StoreFuture<Option<Arc<Stored>>>;

    /// Forgets a response; `false` if there was none.
    fn delete(&self, id: &str) -> StoreFuture<bool>;
}

/// Puts [`Remember`] around a stack.
#[derive(Clone)]
pub struct RememberLayer {
    store: Arc<dyn ResponseStore>,
    limit: usize,
}

impl RememberLayer {
    /// Keeps responses in `store`; a conversation to go on from may have `limit` bytes.
    pub fn new(store: Arc<dyn ResponseStore>, limit: usize) -> Self {
        Self { store, limit }
    }
}

/// Below it a request for a response holds the whole conversation; above it nobody knows of conversations.
#[derive(Clone)]
pub struct Remember<S> {
    inner: S,
    store: Arc<dyn ResponseStore>,
    limit: usize,
}

impl<S> Layer<S> for RememberLayer {
    type Service = Remember<S>;

    fn layer(&self, inner: S) -> Remember<S> {
        Remember {
            inner,
            store: self.store.clone(),
            limit: self.limit,
        }
    }
}

impl<S> Service<Request> for Remember<S>
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

    fn call(&mut self, request: Request) -> Self::Future {
        let (store, limit) = (self.store.clone(), self.limit);
        match request.exchange.route {
            Route::Responses => {
                let inner = self.inner.clone();
                Box::pin(async move { create(store, limit, inner, request).await })
            }
            Route::Response | Route::InputItems | Route::CancelResponse => {
                Box::pin(async move { Ok(look_up(&*store, limit, &request).await?) })
            }
            _ => self.inner.call(request),
        }
    }
}

/// What of a request is looked at here.
#[derive(Deserialize)]
struct Asked<'a> {
    #[serde(borrow, default)]
    input: Option<&'a RawValue>,
    #[serde(borrow, default)]
    previous_response_id: Option<Cow<'a, str>>,
    #[serde(default)]
    store: Option<bool>,
}

async fn create<S>(
    store: Arc<dyn ResponseStore>,
    limit: usize,
    mut inner: S,
    mut request: Request,
) -> Result<Response, Failure>
where
    S: Service<Request, Response = Response, Error = Failure, Future = ResponseFuture>,
{
    let whole = request.body.clone();
    let asked: Asked<'_> = translate::read(&whole)?;
    if asked.store == Some(true) && !store.keeps() {
        let message = "`store`: nothing is kept here; send the conversation with each request";
        return Err(ApiError::invalid("store", message).into());
    }
    let history = match asked.previous_response_id.as_deref() {
        None => Vec::new(),
        Some(id) => history(&*store, id, limit).await?,
    };
    let input = match asked.input {
        Some(input) => items::resolve(&*store, slice(&whole, input.get())).await?,
        None => Bytes::new(), // refused below, where everything is checked
    };
    if let Some(old) = asked.input
        && (!history.is_empty() || input != old.get())
    {
        request.body = spliced(&whole, old.get(), &items::joined(&history, &input)?);
    }
    let keep = (asked.store.unwrap_or(true) && store.keeps()).then(|| Keeping {
        store,
        exchange: request.exchange.clone(),
        previous: asked.previous_response_id.map(|id| Arc::from(&*id)),
        input,
    });
    drop(whole);
    let response = inner.call(request).await?;
    let Some(keep) = keep else {
        return Ok(response);
    };
    if response.body().as_whole().is_some() {
        keep.put().await;
        return Ok(response);
    }
    Ok(response.map(|body| body.map_stream(|body| watched(body, keep))))
}

/// The part of `body` that `text` is.
fn slice(body: &Bytes, text: &str) -> Bytes {
    body.slice_ref(text.as_bytes())
}

/// `body` with `new` in the place of `old`, which is a part of it.
fn spliced(body: &Bytes, old: &str, new: &[u8]) -> Bytes {
    let start = old.as_ptr().addr() - body.as_ptr().addr();
    [&body[..start], new, &body[start + old.len()..]]
        .concat()
        .into()
}

/// A response that will be kept when it is whole.
struct Keeping {
    store: Arc<dyn ResponseStore>,
    exchange: Arc<Exchange>,
    previous: Option<Arc<str>>,
    input: Bytes,
}

impl Keeping {
    async fn put(self) {
        let Some(Answer { id, body }) = self.exchange.answer().cloned() else {
            return;
        };
        let stored = Stored {
            id,
            previous: self.previous,
            // a slice would hold on to the whole body it came in
            input: Bytes::copy_from_slice(&self.input),
            response: body,
        };
        if let Err(error) = self.store.put(stored).await {
            let cause = error.0.to_string();
            tracing::warn!(id = &*self.exchange.id, cause, "response not kept");
        }
    }
}

/// `body`, whose response is kept before its client hears that it is whole.
fn watched(
    body: Body,
    keep: Keeping,
) -> impl futures::Stream<Item = Result<Bytes, ApiError>> + Send {
    futures::stream::unfold((body, Some(keep)), |(mut body, mut keep)| async move {
        let piece = body.next().await?;
        if let Some(keeping) = keep.take_if(|keep| keep.exchange.answer().is_some()) {
            keeping.put().await;
        }
        Some((piece, (body, keep)))
    })
}

/// A response to go on from and those before it, oldest first.
async fn history(
    store: &dyn ResponseStore,
    id: &str,
    limit: usize,
) -> Result<Vec<Arc<Stored>>, ApiError> {
    let chain = chain(store, id, limit).await?;
    let chain = chain.ok_or_else(|| {
        let param = Some("previous_response_id".into());
        let message =
            format!("the previous response `{id}`, or one that it goes on from, is not kept here");
        ApiError {
            param,
            ..ApiError::new(ErrorKind::PreviousResponseNotFound, message)
        }
    })?;
    if let Some(last) = chain.last()
        && items::is_failed(last)?
    {
        let message = format!("the response `{id}` failed: there is nothing to go on from");
        return Err(ApiError::invalid("previous_response_id", message));
    }
    Ok(chain)
}

/// `None` where one of them is not kept.
async fn chain(
    store: &dyn ResponseStore,
    id: &str,
    limit: usize,
) -> Result<Option<Vec<Arc<Stored>>>, ApiError> {
    let mut chain: Vec<Arc<Stored>> = Vec::new();
    let mut size = 0;
    let mut next: Option<Arc<str>> = Some(id.into());
    while let Some(id) = next {
        let Some(stored) = store.get(&id).await? else {
            return Ok(None);
        };
        size += stored.size();
        if size > limit as u64 {
            return Err(ApiError::new(
                ErrorKind::PayloadTooLarge,
                format!("the conversation so far is longer than {limit} bytes"),
            ));
        }
        next = stored.previous.clone();
        chain.push(stored);
    }
    chain.reverse();
    Ok(Some(chain))
}

/// Answers what is asked about a response that is kept.
async fn look_up(
    store: &dyn ResponseStore,
    limit: usize,
    request: &Request,
) -> Result<Response, ApiError> {
    let path = request.head.uri.path().trim_end_matches('/');
    let rest = path.strip_prefix("/v1/responses/").unwrap_or_default();
    let id = query::decode(rest.split('/').next().unwrap_or_default());
    let none = || {
        ApiError::new(
            ErrorKind::ResponseNotFound,
            format!("there is no response `{id}` here"),
        )
    };
    let asked = Query::of(&request.head.uri);
    check_include(asked.all("include"))?;
    match request.exchange.route {
        Route::Response if request.head.method == Method::DELETE => {
            if !store.delete(&id).await? {
                return Err(none());
            }
            let gone = serde_json::json!({"id": id, "object": "response", "deleted": true});
            Ok(json(written(&gone)))
        }
        Route::InputItems => {
            let chain = chain(store, &id, limit).await?.ok_or_else(none)?;
            items::page(&chain, &asked).map(|page| json(written(&page)))
        }
        Route::CancelResponse => {
            store.get(&id).await?.ok_or_else(none)?;
            Err(ApiError::new(
                ErrorKind::InvalidRequest,
                format!("the response `{id}` is over: only background responses can be cancelled"),
            ))
        }
        _ => {
            for name in ["stream", "starting_after"] {
                if asked.first(name).is_some_and(|value| value != "false") {
                    let message = format!(
                        "`{name}`: a response that is over is given whole, not as a stream"
                    );
                    return Err(ApiError::invalid(name, message));
                }
            }
            let stored = store.get(&id).await?.ok_or_else(none)?;
            let mut response = Response::new(Body::whole(stored.response.clone()));
            let json = HeaderValue::from_static("application/json");
            response.headers_mut().insert(header::CONTENT_TYPE, json);
            Ok(response)
        }
    }
}

/// The parameters behind a path.
struct Query(Vec<(String, String)>);

impl Query {
    fn of(uri: &http::Uri) -> Self {
        let pairs = query::pairs(uri.query().unwrap_or_default());
        // clients write lists as `name[]=a&name[]=b`
        let pairs = pairs.map(|(name, value)| (name.trim_end_matches("[]").to_owned(), value));
        Self(pairs.collect())
    }

    fn all<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a str> {
        self.0
            .iter()
            .filter(move |(given, _)| given == name)
            .map(|(_, value)| value.as_str())
    }

    fn first<'a>(&'a self, name: &'a str) -> Option<&'a str> {
        self.all(name).next()
    }
}

#[cfg(test)]
mod tests;
