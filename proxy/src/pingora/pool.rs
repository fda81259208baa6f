//! Connections to nodes that wait for their next request.
//!
//! Pingora's own pool watches each waiting connection with a task of its own, which is made and woken for every
//! exchange. Here a connection is looked at when it is taken, and one task closes those that have waited too long.

use futures::FutureExt;
use pingora_core::protocols::Stream;
use std::collections::{HashMap, VecDeque};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tokio::io::AsyncReadExt;
use tokio::time::sleep;

/// Waiting connections, by the hash of their peer.
pub(crate) struct Pool {
    waiting: Mutex<Waiting>,
    /// Connections that may wait, over all peers.
    capacity: usize,
    /// How long one may wait.
    idle: Duration,
}

#[derive(Default)]
struct Waiting {
    by_peer: HashMap<u64, VecDeque<Idle>>,
    count: usize,
}

struct Idle {
    stream: Stream,
    since: Instant,
}

impl Pool {
    pub(crate) fn new(capacity: usize, idle: Duration) -> Self {
        Self {
            waiting: Mutex::default(),
            capacity,
            idle,
        }
    }

    /// The connection to `peer` that waits for the shortest time and is still open.
    pub(crate) fn take(&self, peer: u64) -> Option<Stream> {
        loop {
            let mut waiting = self.lock();
            let idle = waiting.by_peer.get_mut(&peer)?.pop_back()?;
            waiting.count -= 1;
            drop(waiting);
            let mut stream = idle.stream;
            if idle.since.elapsed() < self.idle && is_open(&mut stream) {
                return Some(stream);
            }
        }
    }

    /// Keeps a connection to `peer` for its next request.
    pub(crate) fn give(&self, peer: u64, stream: Stream) {
        let since = Instant::now();
        let mut waiting = self.lock();
        let own = waiting.by_peer.entry(peer).or_default();
        own.push_back(Idle { stream, since });
        waiting.count += 1;
        let surplus = (waiting.count > self.capacity)
            .then(|| waiting.take_oldest())
            .flatten();
        drop(waiting); // closing a connection takes a while
        drop(surplus);
    }

    /// Closes what has waited too long, again and again. Never ends.
    pub(crate) async fn close_old(&self) {
        loop {
            sleep(self.idle).await;
            drop(self.take_old());
        }
    }

    /// Takes out what has waited too long.
    fn take_old(&self) -> Vec<Idle> {
        let now = Instant::now();
        let mut old = Vec::new();
        let mut waiting = self.lock();
        waiting.by_peer.retain(|_, own| {
            while own
                .front()
                .is_some_and(|idle| now.duration_since(idle.since) >= self.idle)
            {
                old.extend(own.pop_front());
            }
            !own.is_empty()
        });
        waiting.count -= old.len();
        old
    }

    fn lock(&self) -> MutexGuard<'_, Waiting> {
        // nothing under this lock can panic half-way
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Waiting {
    /// Takes out the connection that has waited longest.
    fn take_oldest(&mut self) -> Option<Idle> {
        let fronts = self.by_peer.values_mut();
        let oldest = fronts
            .filter(|idle| !idle.is_empty())
            .min_by_key(|idle| idle[0].since)?;
        self.count -= 1;
        oldest.pop_front()
    }
}

/// Whether the other side has neither closed the connection nor said something that nobody asked for.
fn is_open(stream: &mut Stream) -> bool {
    stream.read(&mut [0]).now_or_never().is_none()
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncWriteExt, DuplexStream, duplex};

    /// A connection and its other end.
    fn connection() -> (Stream, DuplexStream) {
        let (own, other) = duplex(16);
        (Box::new(own), other)
    }

    #[tokio::test]
    async fn the_last_given_is_taken_first_and_only_by_its_peer() {
        let pool = Pool::new(8, Duration::from_secs(60));
        let (a, mut a_end) = connection();
        let (b, mut b_end) = connection();
        pool.give(1, a);
        pool.give(1, b);
        assert!(pool.take(2).is_none());
        for end in [&mut b_end, &mut a_end] {
            let mut stream = pool.take(1).expect("one waits");
            stream.write_all(b"x").await.expect("open");
            assert_eq!(end.read_u8().await.expect("open"), b'x');
        }
        assert!(pool.take(1).is_none());
    }

    #[tokio::test]
    async fn one_that_was_closed_or_speaks_unasked_is_not_given_out() {
        let pool = Pool::new(8, Duration::from_secs(60));
        let (closed, end) = connection();
        drop(end);
        let (speaks, mut end) = connection();
        end.write_all(b"x").await.expect("open");
        pool.give(1, closed);
        pool.give(1, speaks);
        assert!(pool.take(1).is_none());
    }

    #[tokio::test]
    async fn too_old_ones_and_too_many_are_closed() {
        let none_may_wait = Pool::new(8, Duration::ZERO);
        let (stream, _end) = connection();
        none_may_wait.give(1, stream);
        assert!(none_may_wait.take(1).is_none());
        let (stream, _end) = connection();
        none_may_wait.give(1, stream);
        assert_eq!(none_may_wait.take_old().len(), 1);
        assert_eq!(none_may_wait.lock().count, 0);

        let pool = Pool::new(2, Duration::from_secs(60));
        let mut ends = Vec::new();
        for peer in [1, 2, 2] {
            let (stream, end) = connection();
            pool.give(peer, stream);
            ends.push(end);
        }
        assert!(pool.take(1).is_none(), "the oldest had to go");
        assert!(pool.take(2).is_some() && pool.take(2).is_some());
        assert_eq!(pool.lock().count, 0);
    }
}
