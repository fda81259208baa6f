//! Ranks as threads of one process. Sums are taken in the order of ranks, so that every run gives the same bits.

use super::{Communicator, GroupError};
use candle_core::Tensor;
use rayon::{ThreadPool, ThreadPoolBuilder};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// How often a rank looks for the others before it sleeps: some ten microseconds. Ranks that do the same work come at
/// nearly the same time, and to wake one takes longer.
const SPINS: usize = 1 << 9;

/// Ranks wait in so many pieces: if the whole process stands still for a while, that uses up one of them and not all.
const SLICES: u32 = 8;

/// One rank of a group of threads. When it is dropped, the group is broken.
#[derive(Debug)]
pub struct Threads {
    rank: usize,
    /// Calls it has made.
    calls: AtomicU64,
    group: Arc<Group>,
    pool: ThreadPool,
}

#[derive(Debug)]
struct Group {
    world_size: usize,
    deadline: Duration,
    /// Calls that all ranks have come to. Behind every later call the group is whole up to there.
    complete: AtomicU64,
    meeting: Mutex<Meeting>,
    changed: Condvar,
}

/// What is brought to a call is taken before the call after the next: nobody goes on before all have come to the next one,
/// and nobody comes there without having taken. So two places are enough, and ranks meet once a call.
#[derive(Debug)]
struct Meeting {
    places: [Place; 2],
    /// Ranks that have to be woken.
    asleep: usize,
    fault: Option<GroupError>,
}

#[derive(Debug)]
struct Place {
    call: Call,
    parts: Vec<Option<Tensor>>,
    arrived: usize,
    taken: usize,
}

/// What a rank asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Call {
    AllReduce,
    AllGather(usize),
    Gather(usize),
    Broadcast(usize),
}

impl Call {
    /// The first rank whose part is of another shape or type than that of rank 0, where all have to be alike.
    fn odd_one(self, parts: &[Tensor]) -> Option<usize> {
        let alike =
            |part: &Tensor| part.shape() == parts[0].shape() && part.dtype() == parts[0].dtype();
        match self {
            Self::AllReduce | Self::Broadcast(_) => parts.iter().position(|part| !alike(part)),
            Self::AllGather(_) | Self::Gather(_) => None,
        }
    }
}

impl Threads {
    /// The ranks of a new group, each with its share of as many threads as kernels use.
    ///
    /// # Errors
    /// When the system gives no threads.
    pub fn group(world_size: usize, deadline: Duration) -> Result<Vec<Self>, GroupError> {
        let place = || Place {
            call: Call::AllReduce,
            parts: vec![None; world_size],
            arrived: 0,
            taken: 0,
        };
        let group = Arc::new(Group {
            world_size,
            deadline,
            complete: AtomicU64::new(0),
            meeting: Mutex::new(Meeting {
                places: [place(), place()],
                asleep: 0,
                fault: None,
            }),
            changed: Condvar::new(),
        });
        let threads = (rayon::current_num_threads() / world_size.max(1)).max(1);
        let rank = |rank| {
            let pool = ThreadPoolBuilder::new()
                .num_threads(threads)
                .thread_name(move |index| format!("rank {rank}.{index}"))
                .build();
            Ok(Self {
                rank,
                calls: AtomicU64::new(0),
                group: group.clone(),
                pool: pool.map_err(|error| GroupError::NoThreads {
                    rank,
                    reason: error.to_string(),
                })?,
            })
        };
        (0..world_size).map(rank).collect()
    }

    /// Brings `part` and waits for the others; `take` is given what all have brought, alike where the call wants it so.
    fn meet<T>(
        &self,
        call: Call,
        part: &Tensor,
        take: impl FnOnce(Vec<Tensor>) -> candle_core::Result<T>,
    ) -> Result<T, GroupError> {
        let turn = self.calls.fetch_add(1, Ordering::Relaxed);
        let mut meeting = self.group.meeting();
        if let Some(fault) = &meeting.fault {
            return Err(fault.clone());
        }
        let place = &mut meeting.places[turn as usize % 2];
        if place.arrived == 0 {
            place.call = call;
        } else if place.call != call {
            let fault = GroupError::Apart { rank: self.rank };
            return Err(self.group.fail(meeting, fault));
        }
        place.parts[self.rank] = Some(part.clone());
        place.arrived += 1;
        if place.arrived == self.group.world_size {
            self.group.complete.store(turn + 1, Ordering::Release);
            if meeting.asleep > 0 {
                self.group.changed.notify_all();
            }
        } else {
            drop(meeting);
            meeting = self.group.wait(turn)?;
        }
        let parts = meeting.places[turn as usize % 2].take();
        if let Some(rank) = call.odd_one(&parts) {
            return Err(self.group.fail(meeting, GroupError::Apart { rank }));
        }
        drop(meeting);
        take(parts).map_err(|error| {
            let rank = self.rank;
            let reason = error.to_string();
            let fault = GroupError::Failed { rank, reason };
            self.group.fail(self.group.meeting(), fault)
        })
    }
}

impl Group {
    fn meeting(&self) -> MutexGuard<'_, Meeting> {
        // nothing under this lock can panic half-way
        self.meeting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn all_have_come(&self, turn: u64) -> bool {
        self.complete.load(Ordering::Acquire) > turn
    }

    /// Waits until all ranks have made call number `turn`.
    fn wait(&self, turn: u64) -> Result<MutexGuard<'_, Meeting>, GroupError> {
        for _ in 0..SPINS {
            if self.all_have_come(turn) {
                return Ok(self.meeting());
            }
            std::hint::spin_loop();
        }
        let mut patience = SLICES;
        let mut meeting = self.meeting();
        while !self.all_have_come(turn) {
            if let Some(fault) = &meeting.fault {
                return Err(fault.clone());
            }
            if patience == 0 {
                let parts = meeting.places[turn as usize % 2].parts.iter();
                let missing = parts.enumerate().find(|(_, part)| part.is_none());
                let fault = GroupError::Stalled {
                    rank: missing.map_or(0, |(rank, _)| rank),
                    deadline: self.deadline,
                };
                return Err(self.fail(meeting, fault));
            }
            meeting.asleep += 1;
            let woken = self.changed.wait_timeout(meeting, self.deadline / SLICES);
            let waited;
            (meeting, waited) = woken.unwrap_or_else(PoisonError::into_inner);
            meeting.asleep -= 1;
            patience -= u32::from(waited.timed_out());
        }
        Ok(meeting)
    }

    /// Breaks the group, if it is whole, and says what broke it.
    fn fail(&self, mut meeting: MutexGuard<'_, Meeting>, fault: GroupError) -> GroupError {
        let first = meeting.fault.get_or_insert(fault).clone();
        self.changed.notify_all();
        first
    }
}

impl Place {
    /// The parts, in the order of ranks; the last one who takes them leaves the place empty.
    fn take(&mut self) -> Vec<Tensor> {
        self.taken += 1;
        if self.taken < self.arrived {
            return self.parts.iter().flatten().cloned().collect();
        }
        (self.taken, self.arrived) = (0, 0);
        self.parts.iter_mut().filter_map(Option::take).collect()
    }
}

impl Communicator for Threads {
    fn rank(&self) -> usize {
        self.rank
    }

    fn world_size(&self) -> usize {
        self.group.world_size
    }

    fn all_reduce(&self, part: &Tensor) -> Result<Tensor, GroupError> {
        self.meet(Call::AllReduce, part, |parts| {
            let mut parts = parts.into_iter();
            let first = parts.next().expect("this rank has brought a part");
            parts.try_fold(first, |sum, part| sum + part)
        })
    }

    fn all_gather(&self, part: &Tensor, dim: usize) -> Result<Tensor, GroupError> {
        self.meet(Call::AllGather(dim), part, |parts| Tensor::cat(&parts, dim))
    }

    fn gather(&self, part: &Tensor, dim: usize) -> Result<Option<Tensor>, GroupError> {
        self.meet(Call::Gather(dim), part, |parts| match self.rank {
            0 => Tensor::cat(&parts, dim).map(Some),
            _ => Ok(None),
        })
    }

    fn broadcast(&self, value: &Tensor, root: usize) -> Result<Tensor, GroupError> {
        self.meet(Call::Broadcast(root), value, |mut parts| {
            if root >= parts.len() {
                candle_core::bail!("there is no rank {root} among {}", parts.len());
            }
            Ok(parts.swap_remove(root))
        })
    }

    fn abort(&self, fault: GroupError) {
        self.group.fail(self.group.meeting(), fault);
    }

    fn fault(&self) -> Option<GroupError> {
        self.group.meeting().fault.clone()
    }

    fn pool(&self) -> Option<&ThreadPool> {
        Some(&self.pool)
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        let fault = GroupError::Ended { rank: self.rank };
        self.group.fail(self.group.meeting(), fault);
    }
}
