//! Ranks: what a part of a model knows of the others.

use candle_core::{Result, Tensor};
use std::fmt::Debug;

mod solo;
mod threads;

pub use solo::Solo;
pub use threads::Threads;

/// Joins the partial results of all ranks. Every rank makes the same calls in the same order.
pub trait Communicator: Debug + Send + Sync {
    /// This rank, from 0.
    fn rank(&self) -> usize;

    /// How many ranks there are.
    fn world_size(&self) -> usize;

    /// The sum over all ranks, the same to the bit on each of them.
    ///
    /// # Errors
    /// When an operation on the device fails.
    fn all_reduce(&self, part: &Tensor) -> Result<Tensor>;

    /// The parts of all ranks side by side along dimension `dim`, in the order of ranks. Parts may differ in width.
    ///
    /// # Errors
    /// When an operation on the device fails.
    fn all_gather(&self, part: &Tensor, dim: usize) -> Result<Tensor>;
}

/// Does `work`, which makes calls of `communicator`, in a thread of the pool that kernels share: from outside each kernel
/// would have to wake the pool and wait. Not where there are other ranks: a call waits for them, and a thread of the pool
/// that waits is one too few.
pub fn in_pool<T: Send>(communicator: &dyn Communicator, work: impl FnOnce() -> T + Send) -> T {
    if communicator.world_size() == 1 {
        rayon::scope(|_| work())
    } else {
        work()
    }
}
