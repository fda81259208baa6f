//! What ranks would hold, before any of them is there: the load lines of the model are asked, and nothing is read.

use super::{Communicator, GroupError};
use crate::model::{self, LoadError, LoadOptions};
use crate::weights::Fault;
use candle_core::Tensor;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Most ranks that are looked at to say which numbers of them would do.
const MOST: usize = 16;

/// A model cannot be shared among so many ranks.
#[derive(Debug, thiserror::Error)]
#[error("{}: {}; {}", folder.display(), first(faults), would_do(fits))]
pub struct Indivisible {
    /// The model's folder or file.
    pub folder: PathBuf,
    /// The ranks that were asked for.
    pub ranks: usize,
    /// What cannot be shared.
    pub faults: Vec<Fault>,
    /// Among how many it can, of those up to 16.
    pub fits: Vec<usize>,
}

/// One fault stands for all: layers are alike.
fn first(faults: &[Fault]) -> String {
    faults.first().map(Fault::to_string).unwrap_or_default()
}

/// `1, 2 or 4 would do`.
fn would_do(fits: &[usize]) -> String {
    let names: Vec<String> = fits.iter().map(usize::to_string).collect();
    match names.split_last() {
        Some((last, [])) => format!("{last} alone would do"),
        Some((last, others)) => format!("{} or {last} would do", others.join(", ")),
        None => "no number of them would do".into(),
    }
}

/// Bytes of weights that each of `ranks` would hold of the model in `folder`.
///
/// # Errors
/// [`Indivisible`] when it cannot be shared among so many; as [`model::load`] when the folder cannot be read.
pub fn weight_bytes(
    folder: &Path,
    options: &LoadOptions,
    ranks: usize,
) -> Result<Vec<u64>, LoadError> {
    let bytes = |rank| {
        let planned = Planned {
            rank,
            world_size: ranks,
        };
        model::planned_weight_bytes(folder, options, Arc::new(planned))
    };
    let bytes: Result<Vec<u64>, LoadError> = (0..ranks).map(bytes).collect();
    bytes.map_err(|error| match error {
        LoadError::Tensors { folder, faults } => LoadError::Indivisible(Indivisible {
            fits: sizes_that_fit(&folder, options),
            folder,
            ranks,
            faults,
        }),
        error => error,
    })
}

/// Among how many ranks the model in `folder` can be shared.
fn sizes_that_fit(folder: &Path, options: &LoadOptions) -> Vec<usize> {
    let fits = |world_size: &usize| {
        let planned = Planned {
            rank: 0,
            world_size: *world_size,
        };
        model::planned_weight_bytes(folder, options, Arc::new(planned)).is_ok()
    };
    (1..=MOST).filter(fits).collect()
}

/// A rank of a group that is not there: it can be asked for its place and for nothing else.
#[derive(Debug)]
struct Planned {
    rank: usize,
    world_size: usize,
}

impl Planned {
    fn alone<T>(&self) -> Result<T, GroupError> {
        Err(GroupError::Ended { rank: self.rank })
    }
}

impl Communicator for Planned {
    fn rank(&self) -> usize {
        self.rank
    }

    fn world_size(&self) -> usize {
        self.world_size
    }

    fn all_reduce(&self, _: &Tensor) -> Result<Tensor, GroupError> {
        self.alone()
    }

    fn all_gather(&self, _: &Tensor, _: usize) -> Result<Tensor, GroupError> {
        self.alone()
    }

    fn gather(&self, _: &Tensor, _: usize) -> Result<Option<Tensor>, GroupError> {
        self.alone()
    }

    fn broadcast(&self, _: &Tensor, _: usize) -> Result<Tensor, GroupError> {
        self.alone()
    }

    fn abort(&self, _: GroupError) {}

    fn fault(&self) -> Option<GroupError> {
        Some(GroupError::Ended { rank: self.rank })
    }

    fn pool(&self) -> Option<&rayon::ThreadPool> {
        None
    }
}
