//! A map that forgets what was not asked for longest, so that it stays within bounds.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

/// How much is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Bounds {
    pub(crate) entries: usize,
    pub(crate) bytes: u64,
}

/// Values by id, with their sizes and the order in which they were last asked for.
pub(super) struct Bounded<V> {
    bounds: Bounds,
    by_id: HashMap<Arc<str>, Entry<V>>,
    /// Ids by the moment of their last use.
    by_use: BTreeMap<u64, Arc<str>>,
    clock: u64,
    bytes: u64,
}

struct Entry<V> {
    value: V,
    size: u64,
    used: u64,
}

impl<V: Clone> Bounded<V> {
    pub(super) fn new(bounds: Bounds) -> Self {
        Self {
            bounds,
            by_id: HashMap::new(),
            by_use: BTreeMap::new(),
            clock: 0,
            bytes: 0,
        }
    }

    pub(super) fn len(&self) -> usize {
        self.by_id.len()
    }

    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }

    pub(super) fn bounds(&self) -> Bounds {
        self.bounds
    }

    /// New bounds; they hold from the next [`Bounded::put`] on.
    pub(super) fn set_bounds(&mut self, bounds: Bounds) {
        self.bounds = bounds;
    }

    /// Takes a value in and gives what had to go for it. A value that is too large by itself goes at once.
    pub(super) fn put(&mut self, id: Arc<str>, size: u64, value: V) -> Vec<(Arc<str>, V)> {
        self.remove(&id);
        let used = self.tick();
        self.bytes += size;
        self.by_use.insert(used, id.clone());
        self.by_id.insert(id, Entry { value, size, used });
        let mut gone = Vec::new();
        while self.by_id.len() > self.bounds.entries || self.bytes > self.bounds.bytes {
            let (_, oldest) = self
                .by_use
                .first_key_value()
                .expect("what is over a bound is not empty");
            // one that cannot fit goes itself, and not everything else before it
            let last = self.by_use.last_key_value().map(|(_, id)| id);
            let victim = match last {
                Some(last) if self.by_id[last].size > self.bounds.bytes => last.clone(),
                _ => oldest.clone(),
            };
            let value = self.remove(&victim).expect("both maps know it");
            gone.push((victim, value));
        }
        gone
    }

    /// The value of that id, which counts as a use.
    pub(super) fn get(&mut self, id: &str) -> Option<V> {
        let used = self.tick();
        let (key, _) = self.by_id.get_key_value(id)?;
        let key = key.clone();
        let entry = self.by_id.get_mut(id)?;
        self.by_use.remove(&entry.used);
        self.by_use.insert(used, key);
        entry.used = used;
        Some(entry.value.clone())
    }

    pub(super) fn remove(&mut self, id: &str) -> Option<V> {
        let entry = self.by_id.remove(id)?;
        self.by_use.remove(&entry.used);
        self.bytes -= entry.size;
        Some(entry.value)
    }

    fn tick(&mut self) -> u64 {
        self.clock += 1;
        self.clock
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::rngs::StdRng;
    use rand::{Rng, SeedableRng};

    fn bounded(entries: usize, bytes: u64) -> Bounded<u32> {
        Bounded::new(Bounds { entries, bytes })
    }

    fn ids(gone: Vec<(Arc<str>, u32)>) -> Vec<String> {
        gone.into_iter().map(|(id, _)| id.to_string()).collect()
    }

    #[test]
    fn what_was_not_used_for_longest_goes_first() {
        let mut kept = bounded(2, 100);
        kept.put("a".into(), 1, 1);
        kept.put("b".into(), 1, 2);
        assert_eq!(kept.get("a"), Some(1));
        assert_eq!(ids(kept.put("c".into(), 1, 3)), ["b"]);
        assert_eq!(ids(kept.put("d".into(), 99, 4)), ["a"]);
        assert_eq!(ids(kept.put("e".into(), 100, 5)), ["c", "d"]);
    }

    #[test]
    fn what_is_too_large_by_itself_drives_nothing_else_out() {
        let mut kept = bounded(10, 100);
        kept.put("a".into(), 60, 1);
        assert_eq!(ids(kept.put("b".into(), 101, 2)), ["b"]);
        assert_eq!(kept.get("a"), Some(1));
    }

    #[test]
    fn nothing_is_kept_within_no_bounds() {
        assert_eq!(ids(bounded(0, 100).put("a".into(), 1, 1)), ["a"]);
    }

    #[test]
    fn bounds_and_counts_hold_whatever_is_done() {
        for seed in 0..20 {
            let mut random = StdRng::seed_from_u64(seed);
            let mut kept = bounded(random.random_range(1..20), random.random_range(1..500));
            for step in 0..2000 {
                let id = random.random_range(0..40).to_string();
                match random.random_range(0..4) {
                    0 => drop(kept.remove(&id)),
                    1 => drop(kept.get(&id)),
                    2 if step % 500 == 2 => kept.set_bounds(Bounds {
                        entries: random.random_range(1..20),
                        bytes: 300,
                    }),
                    _ => {
                        kept.put(id.into(), random.random_range(0..120), step);
                        assert!(
                            kept.len() <= kept.bounds().entries,
                            "seed {seed} step {step}"
                        );
                        assert!(
                            kept.bytes() <= kept.bounds().bytes,
                            "seed {seed} step {step}"
                        );
                    }
                }
                assert_eq!(kept.by_id.len(), kept.by_use.len(), "seed {seed}");
                let sum: u64 = kept.by_id.values().map(|entry| entry.size).sum();
                assert_eq!(sum, kept.bytes(), "seed {seed} step {step}");
            }
        }
    }
}
