//! Which idle models have to go so that another one fits. A pure decision over values.

use crate::config::Strategy;
use std::sync::Arc;

/// A model on the device in question.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Resident {
    pub(crate) model: Arc<str>,
    pub(crate) bytes: u64,
    /// Serving now, or not to be evicted at all.
    pub(crate) kept: bool,
    pub(crate) priority: i32,
    /// The greater, the more recent.
    pub(crate) last_used: u64,
}

/// The models to evict so that `need` bytes are free where `free` are now; `None` if that cannot be had.
///
/// Never names a kept model, and none that need not go.
pub(crate) fn victims(
    strategy: Strategy,
    need: u64,
    free: u64,
    residents: &[Resident],
) -> Option<Vec<Arc<str>>> {
    let mut idle: Vec<&Resident> = residents.iter().filter(|resident| !resident.kept).collect();
    match strategy {
        Strategy::Lru => idle.sort_by_key(|resident| resident.last_used),
        Strategy::Priority => idle.sort_by_key(|resident| (resident.priority, resident.last_used)),
    }
    let mut room = free;
    let mut chosen: Vec<&Resident> = Vec::new();
    for resident in idle {
        if room >= need {
            break;
        }
        room += resident.bytes;
        chosen.push(resident);
    }
    if room < need {
        return None;
    }
    // a large one taken late may have made a small one taken early unnecessary
    let mut index = 0;
    while index < chosen.len() {
        if room - chosen[index].bytes >= need {
            room -= chosen.remove(index).bytes;
        } else {
            index += 1;
        }
    }
    Some(
        chosen
            .into_iter()
            .map(|resident| resident.model.clone())
            .collect(),
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::rngs::StdRng;
    use rand::{Rng, SeedableRng};

    fn resident(model: &str, bytes: u64, kept: bool, priority: i32, last_used: u64) -> Resident {
        Resident {
            model: model.into(),
            bytes,
            kept,
            priority,
            last_used,
        }
    }

    fn names(victims: Option<Vec<Arc<str>>>) -> Option<Vec<String>> {
        victims.map(|models| models.iter().map(ToString::to_string).collect())
    }

    #[test]
    fn the_strategy_decides_the_order() {
        let residents = [
            resident("old-dear", 4, false, 9, 1),
            resident("new-cheap", 4, false, 0, 2),
            resident("busy", 4, true, 0, 0),
        ];
        let by = |strategy, need| names(victims(strategy, need, 0, &residents));
        assert_eq!(by(Strategy::Lru, 4), Some(vec!["old-dear".into()]));
        assert_eq!(by(Strategy::Priority, 4), Some(vec!["new-cheap".into()]));
        assert_eq!(by(Strategy::Lru, 8).map(|all| all.len()), Some(2));
        assert_eq!(by(Strategy::Lru, 9), None, "the busy one stays");
    }

    #[test]
    fn random_runs_evict_no_kept_model_and_none_in_vain() {
        for seed in 0..2000 {
            let mut random = StdRng::seed_from_u64(seed);
            let residents: Vec<Resident> = (0..random.random_range(0..8))
                .map(|index| {
                    resident(
                        &index.to_string(),
                        random.random_range(1..10),
                        random.random_bool(0.3),
                        random.random_range(0..3),
                        random.random_range(0..100),
                    )
                })
                .collect();
            let (need, free) = (random.random_range(0..40), random.random_range(0..10));
            let strategy = if random.random_bool(0.5) {
                Strategy::Lru
            } else {
                Strategy::Priority
            };
            let find = |id: &Arc<str>| {
                residents
                    .iter()
                    .find(|r| r.model == *id)
                    .expect("a resident")
            };
            let possible = free
                + residents
                    .iter()
                    .filter(|r| !r.kept)
                    .map(|r| r.bytes)
                    .sum::<u64>();
            match victims(strategy, need, free, &residents) {
                None => assert!(possible < need, "seed {seed}: gave up too early"),
                Some(chosen) => {
                    assert!(
                        chosen.iter().all(|id| !find(id).kept),
                        "seed {seed}: a kept model went"
                    );
                    let room = free + chosen.iter().map(|id| find(id).bytes).sum::<u64>();
                    assert!(room >= need, "seed {seed}: not enough room");
                    let spare = chosen.iter().any(|id| room - find(id).bytes >= need);
                    assert!(!spare, "seed {seed}: one went in vain");
                }
            }
        }
    }
}
