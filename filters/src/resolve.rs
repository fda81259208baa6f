//! Which path is meant, which model, and what cortex can answer by itself.

use crate::{Body, Failure, Request, Response, ResponseFuture, query};
use bytes::Bytes;
use http::{HeaderValue, Method, header};
use protocol::chat::RequestHead;
use protocol::models::ModelCard;
use protocol::{ApiError, ErrorKind};
use serde::Deserialize;
use serde_json::value::RawValue;
use std::sync::Arc;
use std::task::{Context, Poll};
use tower::{Layer, Service};

/// What a path leads to. A closed set, so that it can label a metric.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Route {
    /// `POST /v1/chat/completions`
    Chat,
    /// `POST /v1/completions`
    Completions,
    /// `POST /v1/messages`
    Messages,
    /// `POST /v1/messages/count_tokens`
    CountTokens,
    /// `POST /v1/responses`
    Responses,
    /// `GET` and `DELETE /v1/responses/{id}`
    Response,
    /// `GET /v1/responses/{id}/input_items`
    InputItems,
    /// `POST /v1/responses/{id}/cancel`
    CancelResponse,
    /// `GET /v1/models`
    Models,
    /// `GET /v1/models/{id}`
    Model,
    /// Anything else.
    Unknown,
}

impl Route {
    /// The route of a path; a trailing slash does not matter.
    #[must_use]
    pub fn of(path: &str) -> Self {
        match path.strip_suffix('/').unwrap_or(path) {
            "/v1/chat/completions" => Self::Chat,
            "/v1/completions" => Self::Completions,
            "/v1/messages" => Self::Messages,
            "/v1/messages/count_tokens" => Self::CountTokens,
            "/v1/models" => Self::Models,
            "/v1/responses" => Self::Responses,
            path if path.starts_with("/v1/models/") => Self::Model,
            path => match path
                .strip_prefix("/v1/responses/")
                .map(|id| id.split_once('/'))
            {
                Some(None) => Self::Response,
                Some(Some((_, "input_items"))) => Self::InputItems,
                Some(Some((_, "cancel"))) => Self::CancelResponse,
                _ => Self::Unknown,
            },
        }
    }

    /// Its name in metrics.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Chat => "chat",
            Self::Completions => "completions",
            Self::Messages => "messages",
            Self::CountTokens => "count_tokens",
            Self::Responses => "responses",
            Self::Response => "response",
            Self::InputItems => "input_items",
            Self::CancelResponse => "cancel_response",
            Self::Models => "models",
            Self::Model => "model",
            Self::Unknown => "unknown",
        }
    }

    fn methods(self) -> &'static str {
        match self {
            Self::Chat | Self::Completions | Self::Messages | Self::CountTokens => "POST, OPTIONS",
            Self::Responses | Self::CancelResponse => "POST, OPTIONS",
            Self::Response => "GET, HEAD, DELETE, OPTIONS",
            _ => "GET, HEAD, OPTIONS",
        }
    }
}

/// What a name stands for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Named {
    /// The model.
    pub id: Arc<str>,
    /// Models that may answer in its place when it cannot, in their order.
    pub others: Vec<Arc<str>>,
}

impl From<Arc<str>> for Named {
    fn from(id: Arc<str>) -> Self {
        let others = Vec::new();
        Self { id, others }
    }
}

/// What models there are; the fleet's state stays behind this trait.
pub trait Catalogue: Send + Sync + 'static {
    /// What `name` stands for: itself, or what the alias points to. `None` if there is nothing of that name.
    fn resolve(&self, name: &str) -> Option<Named>;

    /// Every model a client may ask for.
    fn cards(&self) -> Vec<ModelCard>;
}

/// Puts [`Resolve`] around a stack.
#[derive(Clone)]
pub struct ResolveLayer {
    catalogue: Arc<dyn Catalogue>,
}

impl ResolveLayer {
    /// Resolves names by `catalogue`.
    pub fn new(catalogue: Arc<dyn Catalogue>) -> Self {
        Self { catalogue }
    }
}

/// Finds path and model, answers `/v1/models`, and refuses what leads nowhere.
#[derive(Clone)]
pub struct Resolve<S> {
    inner: S,
    catalogue: Arc<dyn Catalogue>,
}

impl<S> Layer<S> for ResolveLayer {
    type Service = Resolve<S>;

    fn layer(&self, inner: S) -> Resolve<S> {
        Resolve {
            inner,
            catalogue: self.catalogue.clone(),
        }
    }
}

impl<S> Service<Request> for Resolve<S>
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
        let dialect = request.exchange.dialect;
        let uri = &request.head.uri;
        let answer = match route_of(&request) {
            Ok(route) if request.head.method == Method::OPTIONS => Ok(options(route)),
            Ok(Route::Models) => dialect
                .models(self.catalogue.cards(), uri.query().unwrap_or_default())
                .map(json),
            Ok(Route::Model) => self.card(uri.path()).map(|card| json(dialect.model(&card))),
            Ok(Route::Response | Route::InputItems | Route::CancelResponse) => {
                return self.inner.call(request); // about what is kept, whatever model made it
            }
            Ok(_) => match self.retarget(&mut request) {
                Ok(()) => return self.inner.call(request),
                Err(error) => Err(error),
            },
            Err(error) => Err(error),
        };
        Box::pin(std::future::ready(answer.map_err(Failure::from)))
    }
}

fn route_of(request: &Request) -> Result<Route, ApiError> {
    if let Some(refusal) = &request.refusal {
        return Err(refusal.clone());
    }
    let route = request.exchange.route;
    if route == Route::Unknown {
        return Err(ApiError::new(
            ErrorKind::NotFound,
            format!(
                "there is nothing at {} {}",
                request.head.method,
                request.head.uri.path()
            ),
        ));
    }
    let methods = route.methods();
    if request.head.method == Method::OPTIONS {
        return Ok(route);
    }
    if !methods
        .split(", ")
        .any(|method| method == request.head.method.as_str())
    {
        return Err(ApiError {
            allow: Some(methods),
            ..ApiError::new(
                ErrorKind::MethodNotAllowed,
                format!(
                    "{} takes {methods}, not {}",
                    request.head.uri.path(),
                    request.head.method
                ),
            )
        });
    }
    if request.head.method == Method::POST && !says_json(&request.head.headers) {
        return Err(ApiError::new(
            ErrorKind::UnsupportedMediaType,
            "the body must be application/json",
        ));
    }
    Ok(route)
}

/// Clients that say nothing are believed to send JSON; the parser has the last word.
fn says_json(headers: &http::HeaderMap) -> bool {
    headers.get(header::CONTENT_TYPE).is_none_or(|value| {
        value.to_str().is_ok_and(|kind| {
            let kind = kind.split(';').next().unwrap_or_default().trim();
            kind.eq_ignore_ascii_case("application/json") || kind.ends_with("+json")
        })
    })
}

impl<S> Resolve<S> {
    fn card(&self, path: &str) -> Result<ModelCard, ApiError> {
        let id = path
            .trim_end_matches('/')
            .strip_prefix("/v1/models/")
            .unwrap_or_default();
        let id = query::decode(id);
        let resolved = self.catalogue.resolve(&id);
        resolved
            .and_then(|named| {
                self.catalogue
                    .cards()
                    .into_iter()
                    .find(|card| *card.id == *named.id)
            })
            .ok_or_else(|| ApiError::model_not_found(&id))
    }

    /// Notes model and stream in the exchange, and writes the model's own id over an alias.
    fn retarget(&self, request: &mut Request) -> Result<(), ApiError> {
        let head: RequestHead<'_> = serde_json::from_slice(&request.body)
            .map_err(|error| ApiError::new(ErrorKind::InvalidRequest, bad_json(&error)))?;
        if head.asks_usage() {
            request.exchange.note_usage_asked();
        }
        let name = head
            .model
            .filter(|name| !name.is_empty())
            .ok_or_else(|| ApiError::invalid("model", "`model` is missing"))?;
        let Named { id, others } = self
            .catalogue
            .resolve(&name)
            .ok_or_else(|| ApiError::model_not_found(&name))?;
        let renamed = *name != *id;
        let stream = head.stream.unwrap_or(false);
        request.exchange.set_targets(id.clone(), others, stream);
        if renamed {
            request.body = splice_model(&request.body, &id)?;
        }
        Ok(())
    }
}

fn bad_json(error: &serde_json::Error) -> String {
    match error.classify() {
        serde_json::error::Category::Data => format!("the body is not a request: {error}"),
        _ => format!("the body is not valid JSON: {error}"),
    }
}

/// The body with `id` as its model and every other byte as it was.
pub(crate) fn splice_model(body: &Bytes, id: &str) -> Result<Bytes, ApiError> {
    #[derive(Deserialize)]
    struct ModelOnly<'a> {
        #[serde(borrow)]
        model: &'a RawValue,
    }
    let parsed: ModelOnly<'_> = serde_json::from_slice(body)
        .map_err(|error| ApiError::new(ErrorKind::InvalidRequest, bad_json(&error)))?;
    let old = parsed.model.get();
    let start = old.as_ptr().addr() - body.as_ptr().addr();
    let mut spliced = Vec::with_capacity(body.len() + id.len());
    spliced.extend_from_slice(&body[..start]);
    serde_json::to_writer(&mut spliced, id).expect("a string always serialises");
    spliced.extend_from_slice(&body[start + old.len()..]);
    Ok(spliced.into())
}

/// What may be done at a path, for those who ask.
fn options(route: Route) -> Response {
    let mut response = Response::new(Body::whole(Bytes::new()));
    *response.status_mut() = http::StatusCode::NO_CONTENT;
    response
        .headers_mut()
        .insert(header::ALLOW, HeaderValue::from_static(route.methods()));
    response
}

pub(crate) fn json(body: Bytes) -> Response {
    let mut response = Response::new(Body::whole(body));
    response.headers_mut().insert(
        header::CONTENT_TYPE,
        HeaderValue::from_static("application/json"),
    );
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Fixed;

    impl Catalogue for Fixed {
        fn resolve(&self, name: &str) -> Option<Named> {
            let id: Arc<str> = "a/big-model".into();
            matches!(name, "a/big-model" | "fast").then(|| id.into())
        }

        fn cards(&self) -> Vec<ModelCard> {
            vec![ModelCard::new("a/big-model", "fleet", 1)]
        }
    }

    /// The status and what the layer below got, or what the client got instead.
    async fn ask(method: &str, path: &str, body: &'static str) -> Result<String, ApiError> {
        let (head, ()) = http::Request::builder()
            .method(method)
            .uri(path)
            .body(())
            .expect("a valid head")
            .into_parts();
        let request = Request::new(head, Bytes::from_static(body.as_bytes()));
        let inner = tower::service_fn(|request: Request| -> ResponseFuture {
            Box::pin(async move { Ok(Response::new(Body::whole(request.body))) })
        });
        let response = ResolveLayer::new(Arc::new(Fixed))
            .layer(inner)
            .call(request)
            .await
            .map_err(|failure| failure.error)?;
        let body = response.into_body().collect(1 << 20).await?;
        Ok(String::from_utf8_lossy(&body).into_owned())
    }

    #[tokio::test]
    async fn an_alias_is_replaced_and_all_other_bytes_stay() {
        let body =
            r#"{ "messages" : [ {"role":"user","content":"\u00e9"} ],  "model":"fast", "x":1.0 }"#;
        let sent = ask("POST", "/v1/chat/completions", body)
            .await
            .expect("resolves");
        assert_eq!(sent, body.replace("\"fast\"", "\"a/big-model\""));
        let same = r#"{"model":"a\/big-model","stream" : true}"#;
        assert_eq!(
            ask("POST", "/v1/chat/completions", same)
                .await
                .expect("resolves"),
            same
        );
    }

    #[tokio::test]
    async fn what_leads_nowhere_is_refused_by_kind() {
        let cases = [
            (
                "POST",
                "/v1/chat/completions",
                "{",
                ErrorKind::InvalidRequest,
            ),
            (
                "POST",
                "/v1/chat/completions",
                "[]",
                ErrorKind::InvalidRequest,
            ),
            (
                "POST",
                "/v1/chat/completions",
                "{}",
                ErrorKind::InvalidRequest,
            ),
            (
                "POST",
                "/v1/chat/completions",
                r#"{"model":7}"#,
                ErrorKind::InvalidRequest,
            ),
            (
                "POST",
                "/v1/chat/completions",
                r#"{"model":"none"}"#,
                ErrorKind::ModelNotFound,
            ),
            (
                "GET",
                "/v1/chat/completions",
                "",
                ErrorKind::MethodNotAllowed,
            ),
            ("DELETE", "/v1/models", "", ErrorKind::MethodNotAllowed),
            ("POST", "/v1/chat", "", ErrorKind::NotFound),
            ("GET", "/v1/models/none", "", ErrorKind::ModelNotFound),
        ];
        for (method, path, body, kind) in cases {
            let error = ask(method, path, body).await.expect_err("refused");
            assert_eq!(error.kind, kind, "{method} {path} {body}");
        }
    }

    #[tokio::test]
    async fn a_model_with_a_slash_in_its_name_has_a_page() {
        for path in ["/v1/models/a/big-model", "/v1/models/a%2Fbig-model"] {
            let card = ask("GET", path, "").await.expect("is there");
            assert!(card.contains(r#""id":"a/big-model""#), "{card}");
        }
    }
}
