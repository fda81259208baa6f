//! Responses that clients may go on from: in memory, or in a file that outlives the process.

use bounded::Bounded;
use disk::Disk;
use filters::remember::{ResponseStore, StoreError, StoreFuture, Stored};
use prometheus::{IntCounter, IntGauge, Registry};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

mod bounded;
mod disk;
#[cfg(test)]
mod tests;

pub(crate) use bounded::Bounds;

/// The store of one process. Outlives reloads.
pub(crate) struct Responses {
    place: Place,
    counts: Counts,
}

enum Place {
    Memory(Mutex<Bounded<Arc<Stored>>>),
    Disk(Disk),
}

/// What Prometheus sees of the store.
#[derive(Clone)]
struct Counts {
    entries: IntGauge,
    bytes: IntGauge,
    evicted: IntCounter,
    failures: IntCounter,
}

impl Counts {
    fn new(registry: &Registry) -> Self {
        let counts = Self {
            entries: gauge("cortex_responses_kept", "Responses kept to go on from"),
            bytes: gauge("cortex_responses_kept_bytes", "What they take together"),
            evicted: counter(
                "cortex_responses_evicted_total",
                "Responses forgotten to stay within bounds",
            ),
            failures: counter(
                "cortex_responses_write_failures_total",
                "Writes of responses to the disk that failed",
            ),
        };
        for gauge in [&counts.entries, &counts.bytes] {
            registry
                .register(Box::new(gauge.clone()))
                .expect("entered once");
        }
        for counter in [&counts.evicted, &counts.failures] {
            registry
                .register(Box::new(counter.clone()))
                .expect("entered once");
        }
        counts
    }

    fn show<V: Clone>(&self, kept: &Bounded<V>) {
        self.entries
            .set(i64::try_from(kept.len()).unwrap_or(i64::MAX));
        self.bytes
            .set(i64::try_from(kept.bytes()).unwrap_or(i64::MAX));
    }

    fn evicted(&self, count: usize) {
        self.evicted.inc_by(count as u64);
    }

    fn failed(&self) {
        self.failures.inc();
    }
}

fn gauge(name: &str, help: &str) -> IntGauge {
    IntGauge::new(name, help).expect("names are constants")
}

fn counter(name: &str, help: &str) -> IntCounter {
    IntCounter::new(name, help).expect("names are constants")
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Responses {
    /// A store within `bounds`: in the file at `path`, or without one in memory.
    ///
    /// # Errors
    /// When the file cannot be opened.
    pub(crate) fn open(
        path: Option<&Path>,
        bounds: Bounds,
        registry: &Registry,
    ) -> Result<Arc<Self>, StoreError> {
        let counts = Counts::new(registry);
        let place = match path {
            None => Place::Memory(Mutex::new(Bounded::new(bounds))),
            Some(path) => Place::Disk(Disk::open(path, bounds, counts.clone())?),
        };
        Ok(Arc::new(Self { place, counts }))
    }

    /// New bounds; they hold from the next response on.
    pub(crate) fn set_bounds(&self, bounds: Bounds) {
        match &self.place {
            Place::Memory(kept) => lock(kept).set_bounds(bounds),
            Place::Disk(disk) => disk.set_bounds(bounds),
        }
    }
}

impl ResponseStore for Responses {
    fn keeps(&self) -> bool {
        let bounds = match &self.place {
            Place::Memory(kept) => lock(kept).bounds(),
            Place::Disk(disk) => disk.bounds(),
        };
        bounds.entries > 0
    }

    fn put(&self, response: Stored) -> StoreFuture<()> {
        match &self.place {
            Place::Memory(kept) => {
                let mut kept = lock(kept);
                let (id, size) = (response.id.clone(), response.size());
                let gone = kept.put(id, size, Arc::new(response));
                self.counts.evicted(gone.len());
                self.counts.show(&kept);
                Box::pin(std::future::ready(Ok(())))
            }
            Place::Disk(disk) => {
                let put = disk.put(response);
                Box::pin(async move { put.await.map(drop) })
            }
        }
    }

    fn get(&self, id: &str) -> StoreFuture<Option<Arc<Stored>>> {
        match &self.place {
            Place::Memory(kept) => Box::pin(std::future::ready(Ok(lock(kept).get(id)))),
            Place::Disk(disk) => Box::pin(disk.get(id)),
        }
    }

    fn delete(&self, id: &str) -> StoreFuture<bool> {
        match &self.place {
            Place::Memory(kept) => {
                let mut kept = lock(kept);
                let found = kept.remove(id).is_some();
                self.counts.show(&kept);
                Box::pin(std::future::ready(Ok(found)))
            }
            Place::Disk(disk) => Box::pin(disk.delete(id)),
        }
    }
}
