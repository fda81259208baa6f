//! Ranks as threads of one process. Sums are taken in the order of ranks, so that every run gives the same bits.

use super::Communicator;
use candle_core::{Result, Tensor};
use std::sync::{Arc, Barrier, Mutex, PoisonError};

/// One rank of a group of threads.
#[derive(Debug, Clone)]
pub struct Threads {
    rank: usize,
    group: Arc<Group>,
}

#[derive(Debug)]
struct Group {
    /// What each rank brought to the current call.
    parts: Mutex<Vec<Option<Tensor>>>,
    barrier: Barrier,
}

impl Threads {
    /// The ranks of a new group, one for each thread.
    #[must_use]
    pub fn group(world_size: usize) -> Vec<Self> {
        let parts = Mutex::new(vec![None; world_size]);
        let group = Arc::new(Group {
            parts,
            barrier: Barrier::new(world_size),
        });
        (0..world_size)
            .map(|rank| Self {
                rank,
                group: group.clone(),
            })
            .collect()
    }

    /// Brings `part` and takes what all have brought.
    fn exchange(&self, part: &Tensor) -> Vec<Tensor> {
        let parts = || {
            self.group
                .parts
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
        };
        parts()[self.rank] = Some(part.clone());
        self.group.barrier.wait(); // all have brought theirs
        let all = parts().iter().flatten().cloned().collect();
        self.group.barrier.wait(); // all have taken them: the next call may overwrite
        all
    }
}

impl Communicator for Threads {
    fn rank(&self) -> usize {
        self.rank
    }

    fn world_size(&self) -> usize {
        self.group
            .parts
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .len()
    }

    fn all_reduce(&self, part: &Tensor) -> Result<Tensor> {
        let mut parts = self.exchange(part).into_iter();
        let first = parts.next().expect("a group has a first rank");
        parts.try_fold(first, |sum, part| sum + part)
    }

    fn all_gather(&self, part: &Tensor, dim: usize) -> Result<Tensor> {
        Tensor::cat(&self.exchange(part), dim)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    #[test]
    fn sums_and_gathers_are_the_same_on_every_rank() {
        let ranks = Threads::group(3);
        let results: Vec<(Vec<f32>, Vec<f32>)> = std::thread::scope(|scope| {
            let threads: Vec<_> = ranks
                .iter()
                .map(|rank| {
                    scope.spawn(move || {
                        let width = rank.rank() + 1; // parts of odd sizes
                        let own =
                            Tensor::full(width as f32, (1, width), &Device::Cpu).expect("a tensor");
                        let same =
                            Tensor::full(width as f32, (2,), &Device::Cpu).expect("a tensor");
                        let sum = rank.all_reduce(&same).expect("a sum");
                        let all = rank
                            .all_gather(&own, 1)
                            .expect("all parts")
                            .squeeze(0)
                            .expect("one row");
                        (sum.to_vec1().expect("a row"), all.to_vec1().expect("a row"))
                    })
                })
                .collect();
            threads
                .into_iter()
                .map(|thread| thread.join().expect("no panic"))
                .collect()
        });
        for result in results {
            assert_eq!(result, (vec![6.0, 6.0], vec![1.0, 2.0, 2.0, 3.0, 3.0, 3.0]));
        }
    }
}
