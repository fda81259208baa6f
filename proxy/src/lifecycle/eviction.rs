//! Which idle models have to go so that another one fits. A pure decision over values.

use crate::config::Strategy;
use std::sync::Arc;

/// A model on the node in question.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Resident {
    pub(crate) model: Arc<str>,
    /// Bytes on each of its devices.
    pub(crate) bytes: u64,
    /// Which of the node's devices hold it.
    pub(crate) devices: Vec<usize>,
    /// Serving now, or not to be evicted at all.
    pub(crate) kept: bool,
    pub(crate) priority: i32,
    /// The greater, the more recent.
    pub(crate) last_used: u64,
}

/// Which of `residents` to evict so that `count` devices have `share` bytes free each, where `free` are now; `None` if
/// that cannot be had. Never names a kept model, and none that need not go.
pub(crate) fn victims(
    strategy: Strategy,
    (count, share): (usize, u64),
    free: &[u64],
    residents: &[Resident],
) -> Option<Vec<usize>> {
    let idle = residents.iter().enumerate();
    let mut idle: Vec<(usize, &Resident)> = idle.filter(|(_, resident)| !resident.kept).collect();
    match strategy {
        Strategy::Lru => idle.sort_by_key(|(_, resident)| resident.last_used),
        Strategy::Priority => {
            idle.sort_by_key(|(_, resident)| (resident.priority, resident.last_used));
        }
    }
    let mut room = free.to_vec();
    let fits = |room: &[u64]| room.iter().filter(|free| **free >= share).count() >= count;
    let mut chosen: Vec<usize> = Vec::new();
    for (index, resident) in idle {
        if fits(&room) {
            break;
        }
        resident
            .devices
            .iter()
            .for_each(|&device| room[device] += resident.bytes);
        chosen.push(index);
    }
    if !fits(&room) {
        return None;
    }
    // one taken late may have made one taken early unnecessary
    let mut index = 0;
    while index < chosen.len() {
        let Resident { devices, bytes, .. } = &residents[chosen[index]];
        devices.iter().for_each(|&device| room[device] -= bytes);
        if fits(&room) {
            chosen.remove(index);
        } else {
            devices.iter().for_each(|&device| room[device] += bytes);
            index += 1;
        }
    }
    Some(chosen)
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
            devices: vec![0],
            kept,
            priority,
            last_used,
        }
    }

    fn names(residents: &[Resident], victims: Option<Vec<usize>>) -> Option<Vec<String>> {
        let name = |victim: &usize| residents[*victim].model.to_string();
        victims.map(|victims| victims.iter().map(name).collect())
    }

    #[test]
    fn the_strategy_decides_the_order() {
        let residents = [
            resident("old-dear", 4, false, 9, 1),
            resident("new-cheap", 4, false, 0, 2),
            resident("busy", 4, true, 0, 0),
        ];
        let by = |strategy, need| names(&residents, victims(strategy, (1, need), &[0], &residents));
        assert_eq!(by(Strategy::Lru, 4), Some(vec!["old-dear".into()]));
        assert_eq!(by(Strategy::Priority, 4), Some(vec!["new-cheap".into()]));
        assert_eq!(by(Strategy::Lru, 8).map(|all| all.len()), Some(2));
        assert_eq!(by(Strategy::Lru, 9), None, "the busy one stays");
    }

    #[test]
    fn several_devices_are_cleared_only_as_far_as_needed() {
        let on = |devices: &[usize], model| Resident {
            devices: devices.to_vec(),
            ..resident(model, 4, false, 0, u64::from(model != "wide"))
        };
        let residents = [on(&[0, 1], "wide"), on(&[2], "narrow")];
        let by = |count| {
            let free = [0, 0, 0, 4];
            names(
                &residents,
                victims(Strategy::Lru, (count, 4), &free, &residents),
            )
        };
        assert_eq!(by(1), Some(vec![]));
        assert_eq!(by(2), Some(vec!["wide".into()]), "the older one is enough");
        assert_eq!(by(4).map(|all| all.len()), Some(2));
        assert_eq!(by(5), None);
    }

    #[test]
    fn random_runs_evict_no_kept_model_and_none_in_vain() {
        for seed in 0..20_000 {
            let mut random = StdRng::seed_from_u64(seed);
            let devices = random.random_range(1..4);
            let residents: Vec<Resident> = (0..random.random_range(0..8))
                .map(|index| {
                    let kept = random.random_bool(0.3);
                    let (priority, used) = (random.random_range(0..3), random.random_range(0..100));
                    let bytes = random.random_range(1..10);
                    let mut model = resident(&index.to_string(), bytes, kept, priority, used);
                    model.devices = (0..devices).filter(|_| random.random_bool(0.5)).collect();
                    model
                })
                .collect();
            let wanted = (
                random.random_range(1..=devices),
                random.random_range(0..30u64),
            );
            let free: Vec<u64> = (0..devices).map(|_| random.random_range(0..10)).collect();
            let strategy = if random.random_bool(0.5) {
                Strategy::Lru
            } else {
                Strategy::Priority
            };
            let fits = |gone: &dyn Fn(&Resident) -> bool| {
                let room = free.iter().enumerate().map(|(device, free)| {
                    let there = residents.iter().filter(|r| r.devices.contains(&device));
                    free + there.filter(|r| gone(r)).map(|r| r.bytes).sum::<u64>()
                });
                room.filter(|free| *free >= wanted.1).count() >= wanted.0
            };
            match victims(strategy, wanted, &free, &residents) {
                None => assert!(!fits(&|r| !r.kept), "seed {seed}: gave up too early"),
                Some(chosen) => {
                    let chosen: Vec<_> = chosen.iter().map(|&at| &residents[at].model).collect();
                    let named = |r: &Resident| chosen.contains(&&r.model);
                    let kept = residents.iter().any(|r| r.kept && named(r));
                    assert!(!kept, "seed {seed}: a kept model went");
                    assert!(fits(&named), "seed {seed}: not enough room");
                    for spared in &chosen {
                        let without = |r: &Resident| named(r) && r.model != **spared;
                        assert!(!fits(&without), "seed {seed}: {spared} went in vain");
                    }
                }
            }
        }
    }
}
