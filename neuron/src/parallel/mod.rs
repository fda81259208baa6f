//! Ranks: the parts of a model that is shared out, what they tell each other, and the one model they are together.

use crate::gpu::Address;
use crate::kernels::rows::{Place, Rows};
use crate::kernels::with_f32;
use candle_core::Tensor;
use std::fmt::Debug;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

/// The calls of a [`Communicator`] that are those of its `host`, a communicator of threads, where it joins devices besides.
#[cfg(any(test, feature = "nccl"))]
macro_rules! joined_by_host {
    () => {
        fn rank(&self) -> usize {
            self.host.rank()
        }

        fn world_size(&self) -> usize {
            self.host.world_size()
        }

        fn all_reduce(&self, part: &Tensor) -> Result<Tensor, GroupError> {
            self.host.all_reduce(part)
        }

        fn all_gather(&self, part: &Tensor, dim: usize) -> Result<Tensor, GroupError> {
            self.host.all_gather(part, dim)
        }

        fn gather(&self, part: &Tensor, dim: usize) -> Result<Option<Tensor>, GroupError> {
            self.host.gather(part, dim)
        }

        fn broadcast(&self, value: &Tensor, root: usize) -> Result<Tensor, GroupError> {
            self.host.broadcast(value, root)
        }

        fn abort(&self, fault: GroupError) {
            self.host.abort(fault);
        }

        fn fault(&self) -> Option<GroupError> {
            self.host.fault()
        }

        fn on_devices(&self) -> Option<&dyn OnDevices> {
            Some(self)
        }

        fn pool(&self) -> Option<&rayon::ThreadPool> {
            self.host.pool()
        }
    };
}

mod metered;
#[cfg(feature = "nccl")]
mod nccl;
mod planned;
mod rank;
mod ranks;
mod solo;
mod threads;

#[cfg(test)]
pub(crate) mod fake;
#[cfg(test)]
mod suite;

pub use metered::{CollectiveMetrics, ModelCollectives};
#[cfg(feature = "nccl")]
pub use nccl::Nccl;
pub use planned::{Indivisible, weight_bytes};
pub use ranks::{Ranks, load};
pub use solo::Solo;
pub use threads::Threads;

/// How long ranks wait for one of them before they give it up: many times what any step takes between two calls, and less
/// than the patience of those who wait for an answer.
pub const DEADLINE: Duration = Duration::from_secs(60);

/// Joins the partial results of all ranks. Every rank makes the same calls in the same order, from one thread at a time.
///
/// No call waits for ever: where a rank has ended or does not come, all ranks get the same error, from that call and from
/// every later one. A group that is broken stays broken, as nobody knows any more who has heard what.
pub trait Communicator: Debug + Send + Sync {
    /// This rank, from 0.
    fn rank(&self) -> usize;

    /// How many ranks there are.
    fn world_size(&self) -> usize;

    /// The sum over all ranks, the same to the bit on each of them.
    ///
    /// # Errors
    /// When the group is broken.
    fn all_reduce(&self, part: &Tensor) -> Result<Tensor, GroupError>;

    /// The parts of all ranks side by side along dimension `dim`, in the order of ranks. Parts may differ in width.
    ///
    /// # Errors
    /// When the group is broken.
    fn all_gather(&self, part: &Tensor, dim: usize) -> Result<Tensor, GroupError>;

    /// As [`Self::all_gather`], for rank 0 alone; the others get nothing, and nothing is copied for them.
    ///
    /// # Errors
    /// When the group is broken.
    fn gather(&self, part: &Tensor, dim: usize) -> Result<Option<Tensor>, GroupError>;

    /// What rank `root` brought. The others bring a tensor of the same shape and type, whose numbers do not matter.
    ///
    /// # Errors
    /// When the group is broken.
    fn broadcast(&self, value: &Tensor, root: usize) -> Result<Tensor, GroupError>;

    /// Breaks the group: whoever waits stops waiting. Where it is broken already, nothing changes.
    fn abort(&self, fault: GroupError);

    /// What broke the group, if it is broken.
    fn fault(&self) -> Option<GroupError>;

    /// What joins results that are on devices, where they need not go through the host.
    fn on_devices(&self) -> Option<&dyn OnDevices> {
        None
    }

    /// The threads that compute for this rank alone; none where it uses those that all kernels share.
    fn pool(&self) -> Option<&rayon::ThreadPool>;
}

/// Joins what is in the memory of devices, in the order of each device's work.
pub trait OnDevices {
    /// The sum over all ranks of `count` f32 at `at`, in their place.
    ///
    /// # Errors
    /// When the group is broken.
    fn all_reduce(&self, at: Address, count: usize) -> Result<(), GroupError>;

    /// Waits until the device has done all its work. To be called before anything that waits for the device without end:
    /// work that waits for another rank ends only where that one comes.
    ///
    /// # Errors
    /// When the group is broken, or another rank does not come.
    fn settle(&self) -> Result<(), GroupError>;
}

/// The numbers of `rows` on the host, of a rank whose device may be waiting for others.
///
/// # Errors
/// When the group is broken, or the device fails.
pub fn brought(communicator: &dyn Communicator, rows: &Rows) -> candle_core::Result<Tensor> {
    if let Rows::Device(_) = rows {
        settle(communicator)?;
    }
    rows.tensor()
}

/// Waits until the device of the rank has done its work, where that may wait for other ranks, see [`OnDevices::settle`].
///
/// # Errors
/// When the group is broken.
pub fn settle(communicator: &dyn Communicator) -> Result<(), GroupError> {
    communicator.on_devices().map_or(Ok(()), OnDevices::settle)
}

/// The sum of `part` over all ranks, where the parts are.
///
/// # Errors
/// When the group is broken, or a device fails.
pub fn all_reduce(communicator: &dyn Communicator, part: Rows) -> candle_core::Result<Rows> {
    if is_alone(communicator) {
        return Ok(part);
    }
    match part {
        Rows::Host(part) => Ok(Rows::Host(communicator.all_reduce(&part)?)),
        Rows::Device(part) => {
            if let Some(devices) = communicator.on_devices() {
                devices.all_reduce(part.address(), part.count() * part.width())?;
            } else {
                let sum = communicator.all_reduce(&Rows::Device(part.clone()).tensor()?)?;
                with_f32(&sum, |sum| part.write(sum))??;
            }
            Ok(Rows::Device(part))
        }
    }
}

/// The parts of all ranks side by side in the host's memory, for rank 0 alone.
///
/// # Errors
/// As [`all_reduce`].
pub fn gather(communicator: &dyn Communicator, part: &Rows) -> candle_core::Result<Option<Tensor>> {
    Ok(communicator.gather(&brought(communicator, part)?, 1)?)
}

/// Ranks can no longer work together.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum GroupError {
    /// A rank is gone.
    #[error("rank {rank} has ended")]
    Ended {
        /// Which one.
        rank: usize,
    },
    /// A rank did not come to a call that others made.
    #[error("rank {rank} did not come within {deadline:?}")]
    Stalled {
        /// The first that was missing.
        rank: usize,
        /// How long the others waited.
        deadline: Duration,
    },
    /// A rank cannot go on.
    #[error("rank {rank} failed: {reason}")]
    Failed {
        /// Which one.
        rank: usize,
        /// Why.
        reason: String,
    },
    /// A rank made another call than those that came before it.
    #[error("rank {rank} is not where the others are")]
    Apart {
        /// Which one.
        rank: usize,
    },
    /// The threads of a rank cannot be had.
    #[error("no threads for rank {rank}: {reason}")]
    NoThreads {
        /// Which one.
        rank: usize,
        /// What the system says.
        reason: String,
    },
}

impl GroupError {
    /// By which rank the group broke.
    #[must_use]
    pub fn rank(&self) -> usize {
        match self {
            Self::Ended { rank }
            | Self::Stalled { rank, .. }
            | Self::Failed { rank, .. }
            | Self::Apart { rank }
            | Self::NoThreads { rank, .. } => *rank,
        }
    }
}

/// What can be told of a model's ranks by those who do not have the model.
#[derive(Debug, Clone, Default)]
pub struct RankInfo {
    /// Bytes of weights that each holds, in their order.
    pub weight_bytes: Vec<u64>,
    /// Which one the model failed by, when it is known.
    pub failed: Arc<OnceLock<usize>>,
}

impl From<GroupError> for candle_core::Error {
    fn from(error: GroupError) -> Self {
        Self::wrap(error)
    }
}

/// Where the rank of `communicator` is to be: `places` are those of all ranks in their order, which begins anew where there
/// are fewer.
pub fn place<'a>(communicator: &dyn Communicator, places: &'a [Place]) -> &'a Place {
    match places.len() {
        0 => &Place::Cpu,
        count => &places[communicator.rank() % count],
    }
}

/// Whether there is no other rank.
pub fn is_alone(communicator: &dyn Communicator) -> bool {
    communicator.world_size() == 1
}

/// Does `work`, which makes calls of `communicator`, in a thread of the pool that its kernels share: from outside each
/// kernel would have to wake the pool and wait.
pub fn in_pool<T: Send>(communicator: &dyn Communicator, work: impl FnOnce() -> T + Send) -> T {
    match communicator.pool() {
        Some(own) => own.install(work),
        None => rayon::scope(|_| work()),
    }
}
