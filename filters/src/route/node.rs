//! What this gateway itself sees of nodes and of the models on them: requests in flight, and whether they go well.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use Ordering::{Relaxed, SeqCst};

/// Nanoseconds since this process first asked; never zero.
#[must_use]
pub fn now() -> u64 {
    static START: OnceLock<Instant> = OnceLock::new();
    let elapsed = START.get_or_init(Instant::now).elapsed().as_nanos();
    u64::try_from(elapsed).unwrap_or(u64::MAX).saturating_add(1)
}

fn nanos(length: Duration) -> u64 {
    u64::try_from(length.as_nanos()).unwrap_or(u64::MAX)
}

/// When a node is no longer asked while there is another.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Breaker {
    /// Failures in a row that open the circuit.
    pub failures: u32,
    /// Share of failed requests that opens it, once there were `least` of them lately.
    pub share: f64,
    /// See `share`.
    pub least: u32,
    /// How long it stays open the first time; doubled each time it opens again.
    pub open: Duration,
    /// The longest it stays open.
    pub longest: Duration,
}

/// Counts of one node that outlive any one view of the fleet.
#[derive(Debug, Default)]
pub struct NodeLoad {
    in_flight: AtomicUsize,
    failing: AtomicBool,
    circuit: Circuit,
}

/// Closed, open, or open with one trial due.
#[derive(Debug, Default)]
struct Circuit {
    in_a_row: AtomicU32,
    good: AtomicU32,
    bad: AtomicU32,
    /// When the next trial is due; zero while it is closed.
    trial_at: AtomicU64,
    /// How often it opened without a quiet time in between.
    times: AtomicU32,
    /// How often it opened at all.
    opened: AtomicU64,
}

/// How willingly a node is asked, best first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Standing {
    /// All is well, or it is time to see whether it is again.
    Good,
    /// The last contact failed.
    Failing,
    /// Its circuit is open.
    Open,
}

impl NodeLoad {
    /// Requests on their way there or being answered.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.in_flight.load(Relaxed)
    }

    /// Whether the last contact failed; such a node is asked only when there is no better one.
    #[must_use]
    pub fn is_failing(&self) -> bool {
        self.failing.load(Relaxed)
    }

    /// Notes how the last contact went. `true` if that is news. A node that can be reached again may be tried at once.
    pub fn set_failing(&self, failing: bool) -> bool {
        if self.failing.load(Relaxed) == failing {
            return false;
        }
        let news = self.failing.swap(failing, Relaxed) != failing;
        if news && !failing && self.is_open() {
            self.circuit.trial_at.store(1, Relaxed);
        }
        news
    }

    /// Whether its circuit is open: its requests went wrong lately.
    #[must_use]
    pub fn is_open(&self) -> bool {
        self.circuit.trial_at.load(Relaxed) != 0
    }

    /// How often its circuit has opened.
    #[must_use]
    pub fn times_opened(&self) -> u64 {
        self.circuit.opened.load(Relaxed)
    }

    /// Lets older outcomes count less; the fleet's polls do, each time.
    pub fn age(&self) {
        let circuit = &self.circuit;
        let (good, bad) = (circuit.good.load(Relaxed), circuit.bad.load(Relaxed));
        circuit.good.store(good / 2, Relaxed);
        circuit.bad.store(bad / 2, Relaxed);
        let times = circuit.times.load(Relaxed);
        if good > 0 && bad == 0 && times > 0 && !self.is_open() {
            circuit.times.store(times - 1, Relaxed);
        }
    }

    pub(super) fn standing(&self, now: impl FnOnce() -> u64) -> Standing {
        let trial_at = self.circuit.trial_at.load(Relaxed);
        if trial_at != 0 && now() < trial_at {
            Standing::Open
        } else if self.is_failing() {
            Standing::Failing
        } else {
            Standing::Good
        }
    }

    /// Takes the trial that is due, if one is. One request has it; to all others the circuit stays open meanwhile.
    pub(super) fn take_trial(&self, breaker: &Breaker) -> Trial {
        let due = self.circuit.trial_at.load(Relaxed);
        if due == 0 {
            return Trial::None;
        }
        let now = now();
        let next = now.saturating_add(nanos(breaker.open)).max(2);
        let taken = due <= now
            && self
                .circuit
                .trial_at
                .compare_exchange(due, next, Relaxed, Relaxed)
                .is_ok();
        if taken { Trial::Taken } else { Trial::Missed }
    }

    pub(super) fn succeeded(&self, trial: bool) {
        let circuit = &self.circuit;
        circuit.good.fetch_add(1, Relaxed);
        if circuit.in_a_row.load(Relaxed) != 0 {
            circuit.in_a_row.store(0, Relaxed);
        }
        if trial {
            circuit.trial_at.store(0, Relaxed);
        }
    }

    pub(super) fn failed(&self, trial: bool, breaker: &Breaker) {
        let circuit = &self.circuit;
        let in_a_row = circuit.in_a_row.fetch_add(1, Relaxed) + 1;
        let bad = circuit.bad.fetch_add(1, Relaxed) + 1;
        let all = bad.saturating_add(circuit.good.load(Relaxed));
        let too_many = all >= breaker.least && f64::from(bad) >= breaker.share * f64::from(all);
        // what began before the circuit opened says nothing new
        if trial || (!self.is_open() && (in_a_row >= breaker.failures || too_many)) {
            let times = circuit.times.fetch_add(1, Relaxed).min(16);
            let open = breaker.open.saturating_mul(1 << times).min(breaker.longest);
            circuit
                .trial_at
                .store(now().saturating_add(nanos(open)).max(2), Relaxed);
            circuit.opened.fetch_add(1, Relaxed);
            circuit.good.store(0, Relaxed);
            circuit.bad.store(0, Relaxed);
            circuit.in_a_row.store(0, Relaxed);
        }
    }
}

/// What became of asking for the trial.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Trial {
    /// The circuit is closed.
    None,
    /// This request is the trial.
    Taken,
    /// Another one is, or none is due.
    Missed,
}

/// One model on one node, as this gateway uses it.
#[derive(Debug, Default)]
pub struct Replica {
    in_flight: AtomicUsize,
    leaving: AtomicBool,
    last_used: AtomicU64,
}

impl Replica {
    /// Requests on their way there or being answered.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.in_flight.load(SeqCst)
    }

    /// When its last request ended, on [`now`]'s clock; zero if there was none.
    #[must_use]
    pub fn last_used(&self) -> u64 {
        self.last_used.load(SeqCst)
    }

    /// Whether it takes no new requests.
    #[must_use]
    pub fn is_leaving(&self) -> bool {
        self.leaving.load(SeqCst)
    }

    /// Marks it as leaving if nobody uses it. Between this and `enter` nobody slips through: each first says
    /// what it does and then looks at the other.
    #[must_use]
    pub fn try_leave(&self) -> bool {
        self.leaving.store(true, SeqCst);
        let free = self.in_flight() == 0;
        if !free {
            self.leaving.store(false, SeqCst);
        }
        free
    }

    /// Takes no new requests from now on; those that are there may end.
    pub fn retire(&self) {
        self.leaving.store(true, SeqCst);
    }

    /// It stays after all, or has gone and may come again.
    pub fn stay(&self) {
        self.leaving.store(false, SeqCst);
    }

    /// Begins a use, unless it is leaving.
    fn enter(&self) -> bool {
        self.in_flight.fetch_add(1, SeqCst);
        let stays = !self.is_leaving();
        if !stays {
            self.in_flight.fetch_sub(1, SeqCst);
        }
        stays
    }

    fn exit(&self) {
        self.last_used.store(now(), SeqCst);
        self.in_flight.fetch_sub(1, SeqCst);
    }
}

/// Counts a request in flight while it is held.
#[derive(Debug)]
pub(super) struct InFlight {
    candidate: super::Candidate,
}

impl InFlight {
    /// `None` when the model is on its way off that node.
    pub(super) fn enter(candidate: &super::Candidate) -> Option<Self> {
        if !candidate.replica.enter() {
            return None;
        }
        candidate.endpoint.load.in_flight.fetch_add(1, Relaxed);
        Some(Self {
            candidate: candidate.clone(),
        })
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        self.candidate.replica.exit();
        self.candidate.endpoint.load.in_flight.fetch_sub(1, Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BREAKER: Breaker = Breaker {
        failures: 3,
        share: 0.5,
        least: 10,
        open: Duration::from_secs(3600),
        longest: Duration::from_secs(7200),
    };

    #[test]
    fn failures_in_a_row_open_the_circuit_and_a_trial_closes_it() {
        let node = NodeLoad::default();
        node.failed(false, &BREAKER);
        node.failed(false, &BREAKER);
        node.succeeded(false);
        node.failed(false, &BREAKER);
        node.failed(false, &BREAKER);
        assert!(!node.is_open(), "never three in a row");
        node.failed(false, &BREAKER);
        assert_eq!(node.standing(now), Standing::Open);
        node.failed(false, &BREAKER);
        assert_eq!(node.times_opened(), 1, "what began before counts no more");
        assert_eq!(node.take_trial(&BREAKER), Trial::Missed, "not yet");
        let later = || now() + nanos(BREAKER.longest);
        assert_eq!(node.standing(later), Standing::Good, "a trial is due");
        node.succeeded(false);
        assert!(node.is_open(), "so does a late success");
        node.succeeded(true);
        assert_eq!(node.standing(now), Standing::Good);
    }

    #[test]
    fn a_share_of_failures_opens_it_too() {
        let node = NodeLoad::default();
        for _ in 0..5 {
            node.succeeded(false);
            node.failed(false, &BREAKER);
        }
        assert!(node.is_open());
        let aged = NodeLoad::default();
        for _ in 0..50 {
            aged.succeeded(false);
            aged.failed(false, &BREAKER);
            aged.age();
        }
        assert!(!aged.is_open(), "too few at a time to say");
    }

    #[test]
    fn a_node_that_is_reachable_again_is_tried_at_once_by_one_request() {
        let node = NodeLoad::default();
        node.set_failing(true);
        for _ in 0..3 {
            node.failed(false, &BREAKER);
        }
        assert!(node.set_failing(false));
        assert_eq!(node.take_trial(&BREAKER), Trial::Taken);
        assert_eq!(node.take_trial(&BREAKER), Trial::Missed);
        node.failed(true, &BREAKER);
        assert_eq!((node.times_opened(), node.is_open()), (2, true));
    }

    #[test]
    fn a_replica_in_use_does_not_leave_and_a_leaving_one_is_not_entered() {
        let candidate = super::super::Candidate::example("a");
        let guard = InFlight::enter(&candidate).expect("free to use");
        assert!(!candidate.replica.try_leave(), "in use");
        drop(guard);
        assert!(candidate.replica.try_leave());
        assert!(InFlight::enter(&candidate).is_none(), "leaving");
        assert_eq!(candidate.replica.in_flight(), 0, "no count is left behind");
        candidate.replica.stay();
        assert!(InFlight::enter(&candidate).is_some());
        assert!(candidate.replica.last_used() > 0);
    }
}
