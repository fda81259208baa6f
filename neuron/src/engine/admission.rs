//! Who may wait for the engine. Decides at once and blocks nobody.

use super::metrics::ModelMetrics;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// The door of one engine.
#[derive(Debug)]
pub struct Admission {
    limits: AdmissionLimits,
    line: Mutex<Line>,
    metrics: ModelMetrics,
}

/// How much may wait.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AdmissionLimits {
    /// Requests that have not begun.
    pub max_waiting: usize,
    /// Prompt tokens of those requests.
    pub max_prompt_tokens: usize,
}

#[derive(Debug, Default)]
struct Line {
    closed: bool,
    waiting: usize,
    prompt_tokens: usize,
    in_flight: u64,
    /// When a request last left the line, and the smoothed seconds between two that do.
    last_start: Option<Instant>,
    seconds_per_start: f64,
}

/// A request that may not wait.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Rejected {
    /// As many requests wait as may.
    #[error("the queue is full: {waiting} requests are waiting")]
    QueueFull {
        /// How many wait.
        waiting: usize,
        /// When there should be room.
        retry_after: Duration,
    },
    /// As many prompt tokens wait as may.
    #[error("the queue is full: {tokens} prompt tokens are waiting")]
    TokensFull {
        /// How many wait.
        tokens: usize,
        /// When there should be room.
        retry_after: Duration,
    },
    /// The engine takes no more requests.
    #[error("the model is being unloaded")]
    Closed,
}

impl Rejected {
    /// A word for metrics.
    #[must_use]
    pub fn reason(&self) -> &'static str {
        match self {
            Self::QueueFull { .. } => "queue_full",
            Self::TokensFull { .. } => "queued_tokens_full",
            Self::Closed => "closed",
        }
    }
}

impl Admission {
    /// An open door.
    #[must_use]
    pub fn new(limits: AdmissionLimits, metrics: ModelMetrics) -> Self {
        Self {
            limits,
            line: Mutex::default(),
            metrics,
        }
    }

    /// Whether a request could wait now: asked before the work of making its prompt.
    ///
    /// # Errors
    /// Why it could not.
    pub fn check(&self) -> Result<(), Rejected> {
        self.fits(&self.line(), 0)
            .inspect_err(|rejected| self.metrics.rejected(rejected.reason()))
    }

    /// Takes a place in the line for a prompt of `tokens` tokens.
    ///
    /// # Errors
    /// Why there is none.
    pub fn admit(self: &Arc<Self>, tokens: usize) -> Result<Ticket, Rejected> {
        let mut line = self.line();
        self.fits(&line, tokens)
            .inspect_err(|rejected| self.metrics.rejected(rejected.reason()))?;
        line.waiting += 1;
        line.prompt_tokens += tokens;
        line.in_flight += 1;
        self.metrics.waiting.set(whole(line.waiting));
        Ok(Ticket {
            admission: self.clone(),
            tokens,
            waits: true,
        })
    }

    /// Takes no request from now on.
    pub fn close(&self) {
        self.line().closed = true;
    }

    /// Requests that wait or run.
    #[must_use]
    pub fn in_flight(&self) -> u64 {
        self.line().in_flight
    }

    fn fits(&self, line: &Line, tokens: usize) -> Result<(), Rejected> {
        let retry_after = || {
            let seconds = line.seconds_per_start * whole(line.waiting) as f64;
            Duration::from_secs(seconds.ceil().clamp(1.0, 60.0) as u64)
        };
        if line.closed {
            return Err(Rejected::Closed);
        }
        if line.waiting >= self.limits.max_waiting {
            return Err(Rejected::QueueFull {
                waiting: line.waiting,
                retry_after: retry_after(),
            });
        }
        // A prompt larger than the whole bound may still wait alone: its length is the context's business.
        let full = line.prompt_tokens.saturating_add(tokens) > self.limits.max_prompt_tokens;
        if full && line.waiting > 0 {
            return Err(Rejected::TokensFull {
                tokens: line.prompt_tokens,
                retry_after: retry_after(),
            });
        }
        Ok(())
    }

    fn line(&self) -> std::sync::MutexGuard<'_, Line> {
        // Counters stay true even if a holder panicked between two of them.
        self.line.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn whole(count: usize) -> i64 {
    i64::try_from(count).unwrap_or(i64::MAX)
}

/// A request's place: in the line until [`Ticket::start`], in flight until dropped.
#[derive(Debug)]
pub struct Ticket {
    admission: Arc<Admission>,
    tokens: usize,
    waits: bool,
}

impl Ticket {
    /// The request has begun and no longer waits.
    pub fn start(&mut self) {
        if !self.waits {
            return;
        }
        self.leave();
        let mut line = self.admission.line();
        let now = Instant::now();
        if let Some(last) = line.last_start.replace(now) {
            let seconds = now.duration_since(last).as_secs_f64();
            line.seconds_per_start += 0.2 * (seconds - line.seconds_per_start);
        }
    }

    fn leave(&mut self) {
        if std::mem::take(&mut self.waits) {
            let mut line = self.admission.line();
            line.waiting -= 1;
            line.prompt_tokens -= self.tokens;
            self.admission.metrics.waiting.set(whole(line.waiting));
        }
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        self.leave();
        self.admission.line().in_flight -= 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::metrics::EngineMetrics;

    fn admission(max_waiting: usize, max_prompt_tokens: usize) -> Arc<Admission> {
        let limits = AdmissionLimits {
            max_waiting,
            max_prompt_tokens,
        };
        let metrics = EngineMetrics::register(&prometheus::Registry::new()).of("m");
        Arc::new(Admission::new(limits, metrics))
    }

    #[test]
    fn a_full_line_says_when_to_come_back() {
        let admission = admission(1, 100);
        let mut first = admission.admit(5).unwrap();
        let Err(Rejected::QueueFull { retry_after, .. }) = admission.check().map(drop) else {
            panic!("the line holds one");
        };
        assert!(retry_after >= Duration::from_secs(1));
        first.start();
        assert!(admission.check().is_ok(), "the first no longer waits");
        assert_eq!(admission.in_flight(), 1);
        drop(first);
        assert_eq!(admission.in_flight(), 0);
    }

    #[test]
    fn prompt_tokens_fill_the_line_too() {
        let admission = admission(10, 100);
        let huge = admission.admit(1000).expect("alone it may wait");
        assert!(matches!(
            admission.admit(1),
            Err(Rejected::TokensFull { tokens: 1000, .. })
        ));
        drop(huge);
        assert!(
            admission.admit(100).is_ok(),
            "a request that left frees its tokens"
        );
    }

    #[test]
    fn a_closed_door_stays_closed() {
        let admission = admission(10, 100);
        admission.close();
        assert_eq!(admission.admit(1).unwrap_err(), Rejected::Closed);
    }
}
