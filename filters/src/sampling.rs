//! What the catalogue says of a model's sampling holds where the request says nothing.

use crate::{Failure, Request, Response, ResponseFuture};
use bytes::Bytes;
use serde::de::{IgnoredAny, MapAccess, Visitor};
use serde::{Deserialize, Deserializer};
use std::collections::HashMap;
use std::fmt;
use std::sync::Arc;
use std::task::{Context, Poll};
use tower::{Layer, Service};

/// Fields that may have a default, as chat and text completions call them.
pub const FIELDS: [&str; 8] = [
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "max_tokens",
];

/// By model: fields of [`FIELDS`] and their values as JSON.
pub type Defaults = HashMap<Arc<str>, Vec<(String, String)>>;

/// Puts [`Sampling`] around a stack.
#[derive(Clone)]
pub struct SamplingLayer {
    defaults: Arc<Defaults>,
}

impl SamplingLayer {
    /// Completes requests by `defaults`.
    #[must_use]
    pub fn new(defaults: Defaults) -> Self {
        Self {
            defaults: Arc::new(defaults),
        }
    }
}

/// Adds what a request leaves open, below translation: one place for all dialects. All other bytes stay as they are.
#[derive(Clone)]
pub struct Sampling<S> {
    inner: S,
    defaults: Arc<Defaults>,
}

impl<S> Layer<S> for SamplingLayer {
    type Service = Sampling<S>;

    fn layer(&self, inner: S) -> Sampling<S> {
        Sampling {
            inner,
            defaults: self.defaults.clone(),
        }
    }
}

impl<S> Service<Request> for Sampling<S>
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
        if let Some(defaults) = self.defaults.get(request.exchange.model())
            && let Some(body) = completed(&request.body, defaults)
        {
            request.body = body;
        }
        self.inner.call(request)
    }
}

/// The body with what it lacks; `None` where it lacks nothing, or is no object and the node will say so.
fn completed(body: &Bytes, defaults: &[(String, String)]) -> Option<Bytes> {
    let Keys(given) = serde_json::from_slice(body).ok()?;
    let says = |field: &str| given.iter().any(|key| key == field);
    let lacks = |field: &&(String, String)| match field.0.as_str() {
        "max_tokens" => !says("max_tokens") && !says("max_completion_tokens"),
        name => !says(name),
    };
    let mut added = String::new();
    for (field, value) in defaults.iter().filter(lacks) {
        added += &format!("\"{field}\":{value},");
    }
    if added.is_empty() {
        return None;
    }
    if given.is_empty() {
        added.pop(); // the comma
    }
    let open = memchr::memchr(b'{', body)?;
    let mut whole = Vec::with_capacity(body.len() + added.len());
    whole.extend_from_slice(&body[..=open]);
    whole.extend_from_slice(added.as_bytes());
    whole.extend_from_slice(&body[open + 1..]);
    Some(whole.into())
}

/// The names of an object's fields.
struct Keys(Vec<String>);

impl<'de> Deserialize<'de> for Keys {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Names;
        impl<'de> Visitor<'de> for Names {
            type Value = Keys;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Keys, A::Error> {
                let mut names = Vec::new();
                while let Some((name, IgnoredAny)) = map.next_entry()? {
                    names.push(name);
                }
                Ok(Keys(names))
            }
        }
        deserializer.deserialize_map(Names)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_missing_is_added() {
        let defaults = [("temperature", "0.6"), ("max_tokens", "100")]
            .map(|(field, value)| (field.to_owned(), value.to_owned()));
        let complete = |body: &'static str| {
            let whole = completed(&Bytes::from_static(body.as_bytes()), &defaults)?;
            Some(String::from_utf8_lossy(&whole).into_owned())
        };
        let cases = [
            (
                r#" {"model":"m"}"#,
                Some(r#" {"temperature":0.6,"max_tokens":100,"model":"m"}"#),
            ),
            (
                r#"{"temperature":1,"model":"m"}"#,
                Some(r#"{"max_tokens":100,"temperature":1,"model":"m"}"#),
            ),
            (r#"{"temperature":0,"max_completion_tokens":5}"#, None),
            (r#"{}"#, Some(r#"{"temperature":0.6,"max_tokens":100}"#)),
            ("[]", None),
        ];
        for (body, expected) in cases {
            assert_eq!(complete(body).as_deref(), expected, "{body}");
        }
    }
}
