//! A world of one: every part is the whole.

use super::{Communicator, GroupError};
use candle_core::Tensor;

/// The communicator of a model on one device.
#[derive(Debug, Clone, Copy)]
pub struct Solo;

impl Communicator for Solo {
    fn rank(&self) -> usize {
        0
    }

    fn world_size(&self) -> usize {
        1
    }

    fn all_reduce(&self, part: &Tensor) -> Result<Tensor, GroupError> {
        Ok(part.clone())
    }

    fn all_gather(&self, part: &Tensor, _: usize) -> Result<Tensor, GroupError> {
        Ok(part.clone())
    }

    fn gather(&self, part: &Tensor, _: usize) -> Result<Option<Tensor>, GroupError> {
        Ok(Some(part.clone()))
    }

    fn broadcast(&self, value: &Tensor, _: usize) -> Result<Tensor, GroupError> {
        Ok(value.clone())
    }

    /// There is nobody to be told: whoever fails knows it.
    fn abort(&self, _: GroupError) {}

    fn fault(&self) -> Option<GroupError> {
        None
    }

    fn pool(&self) -> Option<&rayon::ThreadPool> {
        None
    }
}
