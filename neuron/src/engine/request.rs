//! What goes into the engine, what comes out, and the thread between: a bounded channel whose reader may be slow or leave.

use super::Command;
use super::guide::Guide;
use super::sampler::SamplingParams;
use super::sequence::SequenceId;
use crate::text::grammar::GrammarError;
use crate::text::output::{Delta, Output};
use protocol::chat::FinishReason;
use protocol::usage::{Timings, Usage};
use std::collections::VecDeque;
use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::Sender;
use std::task::{Context, Poll, ready};
use std::time::Instant;
use tokio::sync::mpsc::error::TrySendError;
use tokio::sync::{mpsc, oneshot};

/// Deltas that may wait for a reader before its sequence is paused.
const CAPACITY: usize = 64;

/// A complete, checked request: only `api` builds one, and the engine has nothing to refuse in it.
#[derive(Debug)]
pub struct Request {
    /// The id it is logged under.
    pub id: String,
    /// At least one token, and fewer than the context.
    pub prompt: Vec<u32>,
    /// Prompt and answer together fit the context; zero computes the prompt alone.
    pub max_tokens: usize,
    /// How to choose tokens.
    pub sampling: SamplingParams,
    /// Tokens that end the answer.
    pub ends: Vec<u32>,
    /// What holds the answer to its bounds.
    pub guide: Guide,
    /// Give the log probabilities of the prompt's tokens too.
    pub score_prompt: bool,
    /// Lower begins earlier.
    pub priority: i64,
    /// Who asks, where that is said: users of the same priority take turns.
    pub user: Option<Arc<str>>,
    /// Where in the prompt its state is worth keeping for others, rising.
    pub places: Vec<usize>,
    /// Who else may go on from what it leaves: those with the same salt.
    pub salt: Option<Arc<str>>,
    /// What becomes of them.
    pub output: Output,
    /// When its first byte was read: its times count from here.
    pub arrived: Instant,
    /// When it fails, done or not.
    pub deadline: Instant,
}

/// What a request's reader is told next.
#[derive(Debug)]
pub enum Event {
    /// A piece of the answer.
    Delta(Delta),
    /// The end: exactly one, after every delta.
    End(Result<Finish, EngineError>),
}

/// How an answer ended.
#[derive(Debug, Clone, PartialEq)]
pub struct Finish {
    /// Why.
    pub reason: FinishReason,
    /// The stop string that ended it.
    pub stop_string: Option<String>,
    /// Tokens in and out.
    pub usage: Usage,
    /// Where the time went.
    pub timings: Timings,
}

/// A request that was taken could not be finished.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum EngineError {
    /// The device or the model failed; the engine takes no more requests.
    #[error("the model failed: {0}")]
    Fault(String),
    /// This request's logits were no numbers.
    #[error("{0}")]
    Sampling(#[from] super::sampler::NotANumber),
    /// Its grammar took more work than is allowed.
    #[error("the grammar of the answer: {0}")]
    Grammar(#[from] GrammarError),
    /// Somebody cancelled it by its id.
    #[error("the request was cancelled")]
    Cancelled,
    /// It took longer than the configured deadline.
    #[error("the request was not done within its deadline")]
    Deadline,
    /// Its reader took nothing for too long.
    #[error("the reader of the answer took nothing for too long")]
    SlowReader,
    /// The model was unloaded or the daemon stopped before the answer was done.
    #[error("the model was unloaded before the answer was done")]
    Stopped,
    /// The engine's thread ended without a word.
    #[error("the engine is gone")]
    Gone,
}

impl EngineError {
    /// A word for metrics.
    #[must_use]
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Fault(_) => "fault",
            Self::Sampling(_) => "sampling",
            Self::Grammar(_) => "grammar",
            Self::Cancelled => "cancelled",
            Self::Deadline => "deadline",
            Self::SlowReader => "slow_reader",
            Self::Stopped => "stopped",
            Self::Gone => "gone",
        }
    }
}

/// The reader's side of a request. Dropping it cancels the request, whether it streams or not.
#[derive(Debug)]
pub struct Events {
    id: SequenceId,
    deltas: mpsc::Receiver<Delta>,
    end: Option<oneshot::Receiver<Result<Finish, EngineError>>>,
    behind: Arc<AtomicBool>,
    engine: Sender<Command>,
}

impl Events {
    /// The next event; none after the end.
    pub async fn next(&mut self) -> Option<Event> {
        poll_fn(|context| self.poll_next(context)).await
    }

    /// As [`Self::next`], for who waits for several requests at once. Nothing is lost by not polling again.
    pub fn poll_next(&mut self, context: &mut Context<'_>) -> Poll<Option<Event>> {
        if let Some(delta) = ready!(self.deltas.poll_recv(context)) {
            return Poll::Ready(Some(self.took(delta)));
        }
        // The channel is closed only when the end is set or the engine is gone.
        let Some(end) = self.end.as_mut() else {
            return Poll::Ready(None);
        };
        let end = ready!(Pin::new(end).poll(context)).unwrap_or(Err(EngineError::Gone));
        self.end = None;
        Poll::Ready(Some(Event::End(end)))
    }

    /// A way to end the request from elsewhere.
    #[must_use]
    pub fn canceller(&self) -> Canceller {
        Canceller {
            id: self.id,
            engine: self.engine.clone(),
        }
    }

    /// A delta that is there already.
    pub fn try_next(&mut self) -> Option<Delta> {
        match self.deltas.try_recv().ok().map(|delta| self.took(delta)) {
            Some(Event::Delta(delta)) => Some(delta),
            _ => None,
        }
    }

    fn took(&self, delta: Delta) -> Event {
        if self.behind.swap(false, Ordering::AcqRel) {
            // An engine that is gone needs no telling.
            let _ = self.engine.send(Command::Resume(self.id));
        }
        Event::Delta(delta)
    }
}

impl Drop for Events {
    fn drop(&mut self) {
        if self.end.is_some() {
            let _ = self.engine.send(Command::Cancel(self.id));
        }
    }
}

/// Ends a request from elsewhere than its reader, which is told so.
#[derive(Debug, Clone)]
pub struct Canceller {
    id: SequenceId,
    engine: Sender<Command>,
}

impl Canceller {
    /// Asks for the end; a request that has ended already stays as it is.
    pub fn cancel(&self) {
        // An engine that is gone has ended its requests.
        let _ = self.engine.send(Command::Abort(self.id));
    }
}

/// The engine's side of a request. Never blocks: what the reader has no room for waits here.
#[derive(Debug)]
pub(super) struct Sink {
    deltas: mpsc::Sender<Delta>,
    end: oneshot::Sender<Result<Finish, EngineError>>,
    backlog: VecDeque<Delta>,
    behind: Arc<AtomicBool>,
}

pub(super) fn channel(id: SequenceId, engine: Sender<Command>) -> (Sink, Events) {
    let (deltas, receiver) = mpsc::channel(CAPACITY);
    let (end, end_receiver) = oneshot::channel();
    let behind = Arc::new(AtomicBool::new(false));
    let sink = Sink {
        deltas,
        end,
        backlog: VecDeque::new(),
        behind: behind.clone(),
    };
    let events = Events {
        id,
        deltas: receiver,
        end: Some(end_receiver),
        behind,
        engine,
    };
    (sink, events)
}

impl Sink {
    /// Hands `delta` on, or keeps it until the reader has room.
    pub(super) fn send(&mut self, delta: Delta) {
        self.backlog.push_back(delta);
        self.flush();
    }

    /// Hands on what the reader has room for; true when nothing is left.
    pub(super) fn flush(&mut self) -> bool {
        while let Some(delta) = self.backlog.pop_front() {
            let Err(refused) = self.deltas.try_send(delta) else {
                continue;
            };
            let TrySendError::Full(delta) = refused else {
                // The reader left; the cancel that says so is on its way.
                self.backlog.clear();
                return true;
            };
            self.backlog.push_front(delta);
            // Ask to be told of room, then look once more: the reader may have made some in between.
            if self.behind.swap(true, Ordering::AcqRel) || self.deltas.capacity() == 0 {
                return false;
            }
            self.behind.store(false, Ordering::Release);
        }
        true
    }

    /// True when the reader is behind.
    pub(super) fn is_behind(&self) -> bool {
        !self.backlog.is_empty()
    }

    /// The end. What the reader had no room for is lost: flush first where that matters.
    pub(super) fn end(self, end: Result<Finish, EngineError>) {
        // A reader that left needs no end.
        let _ = self.end.send(end);
    }
}
