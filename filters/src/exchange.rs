//! What is known about one exchange, from its first byte to its last.

use crate::resolve::Route;
use crate::translate::{self, Dialect};
use bytes::Bytes;
use protocol::usage::Usage;
use std::collections::hash_map::RandomState;
use std::hash::{BuildHasher, Hasher};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, PoisonError};
use std::sync::{Mutex, OnceLock};
use std::time::{Duration, Instant};

/// The facts of one exchange. Each is learnt once by one layer and read by the others.
#[derive(Debug)]
pub struct Exchange {
    /// Under which it is logged on every hop.
    pub id: Arc<str>,
    /// When its head had been read.
    pub started: Instant,
    /// What its path leads to.
    pub route: Route,
    /// How this client speaks; decided by the path.
    pub dialect: &'static dyn Dialect,
    target: OnceLock<Target>,
    usage_asked: OnceLock<()>,
    nodes: Mutex<Vec<Arc<str>>>,
    first_token: OnceLock<Instant>,
    usage: OnceLock<Usage>,
    answer: OnceLock<Answer>,
    torn: AtomicBool,
}

/// A whole answer as its dialect says it.
#[derive(Debug, Clone)]
pub struct Answer {
    /// Its id in that dialect.
    pub id: Arc<str>,
    /// The whole of it as JSON, also when it was streamed.
    pub body: Bytes,
}

/// What the client asked for, once the body has been looked at.
#[derive(Debug)]
pub struct Target {
    /// The model, aliases resolved.
    pub model: Arc<str>,
    /// Whether the answer is to be a stream.
    pub stream: bool,
    /// Models that may answer in its place, in their order.
    others: Vec<Arc<str>>,
    /// What took its place.
    instead: OnceLock<Box<Target>>,
}

impl Exchange {
    /// Opens an exchange for a request with this head.
    #[must_use]
    pub fn open(head: &http::request::Parts) -> Arc<Self> {
        let id = head
            .headers
            .get(protocol::ext::REQUEST_ID_HEADER)
            .and_then(|value| value.to_str().ok())
            .filter(|value| is_sane_id(value))
            .map_or_else(new_id, Arc::from);
        let route = Route::of(head.uri.path());
        Arc::new(Self {
            id,
            started: Instant::now(),
            route,
            dialect: translate::of_route(route, head),
            target: OnceLock::new(),
            usage_asked: OnceLock::new(),
            nodes: Mutex::new(Vec::new()),
            first_token: OnceLock::new(),
            usage: OnceLock::new(),
            answer: OnceLock::new(),
            torn: AtomicBool::new(false),
        })
    }

    /// Says which model is meant; `resolve` does, once.
    pub fn set_target(&self, model: Arc<str>, stream: bool) {
        self.set_targets(model, Vec::new(), stream);
    }

    /// The same where `others` may answer in its place, in their order.
    pub fn set_targets(&self, model: Arc<str>, others: Vec<Arc<str>>, stream: bool) {
        let _ = self.target.set(Target::new(model, others, stream));
    }

    /// Has the next of the models that may do so take the place of the one that is meant now. It has not been asked
    /// anywhere yet.
    pub fn fall_back(&self) -> Option<Arc<str>> {
        let target = self.target()?;
        let (next, others) = target.others.split_first()?;
        let instead = Target::new(next.clone(), others.to_vec(), target.stream);
        target.instead.set(Box::new(instead)).ok()?;
        let mut nodes = self.nodes.lock().unwrap_or_else(PoisonError::into_inner);
        nodes.clear();
        Some(next.clone())
    }

    /// What is asked for, once `resolve` has seen the body.
    #[must_use]
    pub fn target(&self) -> Option<&Target> {
        let mut target = self.target.get()?;
        while let Some(instead) = target.instead.get() {
            target = instead;
        }
        Some(target)
    }

    /// The model asked for; empty on paths that name none.
    #[must_use]
    pub fn model(&self) -> &str {
        self.target().map_or("", |target| &target.model)
    }

    /// Whether the client waits for a stream.
    #[must_use]
    pub fn is_stream(&self) -> bool {
        self.target.get().is_some_and(|target| target.stream)
    }

    /// Whether another model may answer in place of the one that is meant now.
    #[must_use]
    pub fn may_fall_back(&self) -> bool {
        self.target()
            .is_some_and(|target| !target.others.is_empty())
    }

    /// Notes that the client wants to be told of usage at the end of its stream.
    pub fn note_usage_asked(&self) {
        let _ = self.usage_asked.set(());
    }

    /// Whether the client wants to be told of usage at the end of its stream.
    #[must_use]
    pub fn asks_usage(&self) -> bool {
        self.usage_asked.get().is_some()
    }

    /// Notes that the request is being sent to `node`.
    pub fn try_node(&self, node: Arc<str>) {
        self.nodes
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(node);
    }

    /// Whether `node` has been asked already.
    #[must_use]
    pub fn has_tried(&self, node: &str) -> bool {
        let nodes = self.nodes.lock().unwrap_or_else(PoisonError::into_inner);
        nodes.iter().any(|tried| **tried == *node)
    }

    /// The node asked last.
    #[must_use]
    pub fn node(&self) -> Option<Arc<str>> {
        self.nodes
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .last()
            .cloned()
    }

    /// Notes that the first piece of the answer has come.
    pub fn mark_first_token(&self) {
        let _ = self.first_token.set(Instant::now());
    }

    /// From the request's start to its first piece of answer.
    #[must_use]
    pub fn time_to_first_token(&self) -> Option<Duration> {
        self.first_token
            .get()
            .map(|at| at.duration_since(self.started))
    }

    /// Notes that the node's answer broke off or went silent after it had begun.
    pub fn mark_torn(&self) {
        self.torn.store(true, Ordering::Relaxed);
    }

    /// Whether the node's answer broke off or went silent after it had begun.
    #[must_use]
    pub fn is_torn(&self) -> bool {
        self.torn.load(Ordering::Relaxed)
    }

    /// Notes the tokens the upstream reported.
    pub fn set_usage(&self, usage: Usage) {
        let _ = self.usage.set(usage);
    }

    /// Tokens as the upstream reported them.
    #[must_use]
    pub fn usage(&self) -> Option<Usage> {
        self.usage.get().copied()
    }

    /// Notes the whole answer, in a dialect whose answers can be asked for later.
    pub fn set_answer(&self, id: &str, body: impl Into<Bytes>) {
        let _ = self.answer.set(Answer {
            id: id.into(),
            body: body.into(),
        });
    }

    /// The whole answer, once it is there.
    #[must_use]
    pub fn answer(&self) -> Option<&Answer> {
        self.answer.get()
    }
}

impl Target {
    fn new(model: Arc<str>, others: Vec<Arc<str>>, stream: bool) -> Self {
        Self {
            model,
            stream,
            others,
            instead: OnceLock::new(),
        }
    }
}

/// Short, printable and without anything that could forge a log line.
fn is_sane_id(id: &str) -> bool {
    (1..=128).contains(&id.len())
        && id
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.' | b':'))
}

/// An id no other request of this process has, and hardly one of another process.
fn new_id() -> Arc<str> {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    static KEY: OnceLock<RandomState> = OnceLock::new();
    let count = COUNT.fetch_add(1, Ordering::Relaxed);
    let mut hasher = KEY.get_or_init(RandomState::new).build_hasher();
    hasher.write_u64(count);
    // by hand: formatting was two parts in a hundred of a small exchange's CPU time
    let mut id = *b"req_000000000000000000000000";
    let digits = id[4..].iter_mut().rev();
    let number = u128::from(hasher.finish()) << 32 | u128::from(count & 0xffff_ffff);
    for (place, digit) in digits.enumerate() {
        *digit = b"0123456789abcdef"[(number >> (4 * place)) as usize & 0xf];
    }
    std::str::from_utf8(&id).expect("digits").into()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn head(id: Option<&str>) -> http::request::Parts {
        let mut request = http::Request::builder().uri("/v1/chat/completions");
        if let Some(id) = id {
            request = request.header("x-request-id", id);
        }
        request.body(()).expect("a valid head").into_parts().0
    }

    #[test]
    fn a_sane_request_id_is_kept_and_others_are_replaced() {
        assert_eq!(&*Exchange::open(&head(Some("abc-1"))).id, "abc-1");
        for bad in ["", "a b", "x\ty", &"x".repeat(129)] {
            assert!(
                Exchange::open(&head(Some(bad))).id.starts_with("req_"),
                "{bad:?} was kept"
            );
        }
    }

    #[test]
    fn made_up_ids_differ() {
        assert_ne!(
            Exchange::open(&head(None)).id,
            Exchange::open(&head(None)).id
        );
    }
}
