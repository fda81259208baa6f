//! A checkpoint as a model sees it while loading: names and shapes in, tensors on the device out.
//!
//! A model says at each weight how it is shared among ranks; that is the only place where ranks matter. Shapes are
//! checked whatever the world size. What is missing or has another shape is collected, so that [`Weights::finish`]
//! can name all of it at once.

use crate::model::LoadError;
use crate::parallel::Communicator;
use candle_core::{DType, Device, Tensor};
use checkpoint::Checkpoint;
use std::cell::{RefCell, RefMut};
use std::collections::BTreeSet;
use std::fmt;
use std::ops::Range;
use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;

mod checkpoint;
mod names;

pub use names::GroupedHeads;

/// What is wrong with a weights file.
pub use ::safetensors::SafeTensorError as FormatError;

/// A path in a checkpoint, for one rank.
#[derive(Clone)]
pub struct Weights<'a> {
    shared: Rc<Shared<'a>>,
    prefix: String,
}

struct Shared<'a> {
    checkpoint: Checkpoint,
    device: Device,
    communicator: Arc<dyn Communicator>,
    progress: &'a (dyn Fn(f32) + 'a),
    book: RefCell<Book>,
}

/// What loading has seen so far.
#[derive(Default)]
struct Book {
    used: BTreeSet<String>,
    faults: Vec<Fault>,
    bytes_read: u64,
    bytes_kept: u64,
}

/// A tensor that is not as the model needs it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fault {
    /// It is not there.
    Missing {
        /// Its full name.
        name: String,
        /// The shape it should have.
        needed: Vec<usize>,
    },
    /// It has another shape.
    Shape {
        /// The file it is in.
        file: String,
        /// Its full name.
        name: String,
        /// The shape it has.
        found: Vec<usize>,
        /// The shape it should have.
        needed: Vec<usize>,
    },
    /// Its numbers are of a kind that is not read.
    Format {
        /// The file it is in.
        file: String,
        /// Its full name.
        name: String,
        /// The kind.
        found: String,
    },
    /// It cannot be cut evenly.
    Cut {
        /// Its full name.
        name: String,
        /// How many equal parts it has.
        parts: usize,
        /// Among how many ranks they should go.
        world_size: usize,
    },
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Missing { name, needed } => write!(f, "{name} {needed:?} is missing"),
            Self::Shape {
                file,
                name,
                found,
                needed,
            } => {
                write!(
                    f,
                    "{name} in {file} has shape {found:?}, needed is {needed:?}"
                )
            }
            Self::Format { file, name, found } => {
                write!(f, "{name} in {file} is {found}; read are F32, F16 and BF16")
            }
            Self::Cut {
                name,
                parts,
                world_size,
            } => {
                write!(
                    f,
                    "{name} has {parts} parts, which cannot be shared among {world_size} ranks"
                )
            }
        }
    }
}

/// Which part of a dimension a rank holds: ranges that are laid one after the other.
type Cut = Vec<Range<usize>>;

impl<'a> Weights<'a> {
    /// Opens the safetensors files in `folder`: one, or those that an index names. `heads` are those of the linear
    /// attention, by which some checkpoints group rows.
    ///
    /// # Errors
    /// When a file is missing, cut short or no safetensors file.
    pub fn open(
        folder: &Path,
        heads: GroupedHeads,
        device: &Device,
        communicator: Arc<dyn Communicator>,
        progress: &'a dyn Fn(f32),
    ) -> Result<Self, LoadError> {
        let checkpoint = Checkpoint::open(folder, heads)?;
        let shared = Shared {
            checkpoint,
            device: device.clone(),
            communicator,
            progress,
            book: RefCell::default(),
        };
        Ok(Self {
            shared: Rc::new(shared),
            prefix: String::new(),
        })
    }

    /// The path `name` below this one.
    #[must_use]
    pub fn pp(&self, name: impl fmt::Display) -> Self {
        Self {
            shared: self.shared.clone(),
            prefix: self.full(&name),
        }
    }

    /// How the parts of ranks are joined.
    #[must_use]
    pub fn communicator(&self) -> Arc<dyn Communicator> {
        self.shared.communicator.clone()
    }

    /// Whether the checkpoint has a tensor of this name.
    #[must_use]
    pub fn has(&self, name: &str) -> bool {
        self.shared.checkpoint.find(&self.full(&name)).is_some()
    }

    /// The whole tensor, on every rank.
    ///
    /// # Errors
    /// When the device has no room; faults of the file are kept for [`Weights::finish`].
    pub fn replicated(&self, name: &str, shape: &[usize]) -> Result<Tensor, LoadError> {
        self.cut(name, shape, None)
    }

    /// Rows of a `[parts · width, …]` tensor: this rank's share of the parts, each of which stays whole.
    ///
    /// # Errors
    /// As [`Weights::replicated`].
    pub fn column_parallel(
        &self,
        name: &str,
        parts: usize,
        width: usize,
        rest: &[usize],
    ) -> Result<Tensor, LoadError> {
        self.split_columns(name, &[(parts, width)], rest)
    }

    /// Rows of a tensor made of several blocks of `(parts, width)`, each shared on its own: a contiguous slice of the
    /// whole would be wrong. A block with fewer parts than ranks is copied to neighbouring ranks.
    ///
    /// # Errors
    /// As [`Weights::replicated`].
    pub fn split_columns(
        &self,
        name: &str,
        blocks: &[(usize, usize)],
        rest: &[usize],
    ) -> Result<Tensor, LoadError> {
        let mut cut = Cut::new();
        let mut start = 0;
        for &(parts, width) in blocks {
            let share = self.share(name, parts);
            cut.push(start + share.start * width..start + share.end * width);
            start += parts * width;
        }
        let shape: Vec<usize> = std::iter::once(start).chain(rest.iter().copied()).collect();
        self.cut(name, &shape, Some((0, cut)))
    }

    /// Columns of an `[out, parts · width]` tensor: the input this rank's column-parallel layer computed.
    ///
    /// # Errors
    /// As [`Weights::replicated`].
    pub fn row_parallel(
        &self,
        name: &str,
        out: usize,
        parts: usize,
        width: usize,
    ) -> Result<Tensor, LoadError> {
        let share = self.share(name, parts);
        let cut: Cut = std::iter::once(share.start * width..share.end * width).collect();
        self.cut(name, &[out, parts * width], Some((1, cut)))
    }

    /// Rows of a `[vocabulary, width]` table: shares may differ by one row. Also where this rank's begins.
    ///
    /// # Errors
    /// As [`Weights::replicated`].
    pub fn vocab_parallel(
        &self,
        name: &str,
        vocabulary: usize,
        width: usize,
    ) -> Result<(Tensor, usize), LoadError> {
        let (rank, world) = self.place();
        let rows = rank * vocabulary / world..(rank + 1) * vocabulary / world;
        let start = rows.start;
        Ok((
            self.cut(name, &[vocabulary, width], Some((0, vec![rows])))?,
            start,
        ))
    }

    /// Ends the loading: every fault at once, or the bytes this rank holds. Unknown tensors are named in a warning.
    ///
    /// # Errors
    /// [`LoadError::Tensors`] when any tensor was missing or not as needed.
    pub fn finish(&self, skipped: &[&str]) -> Result<u64, LoadError> {
        let book = self.book();
        if !book.faults.is_empty() {
            let folder = self.shared.checkpoint.folder().to_path_buf();
            return Err(LoadError::Tensors {
                folder,
                faults: book.faults.clone(),
            });
        }
        let mut left: Vec<&str> = self
            .shared
            .checkpoint
            .names()
            .filter(|name| !book.used.contains(*name))
            .collect();
        left.sort_unstable();
        for prefix in skipped {
            let count = left.iter().filter(|name| name.starts_with(prefix)).count();
            left.retain(|name| !name.starts_with(prefix));
            if count > 0 {
                tracing::info!("{count} tensors of {prefix}* are not used");
            }
        }
        if !left.is_empty() {
            tracing::warn!(
                tensors = left.join(", "),
                "the checkpoint has tensors that nothing here reads"
            );
        }
        Ok(book.bytes_kept)
    }

    fn full(&self, name: &impl fmt::Display) -> String {
        if self.prefix.is_empty() {
            name.to_string()
        } else {
            format!("{}.{name}", self.prefix)
        }
    }

    fn book(&self) -> RefMut<'_, Book> {
        self.shared.book.borrow_mut()
    }

    fn place(&self) -> (usize, usize) {
        (
            self.shared.communicator.rank(),
            self.shared.communicator.world_size(),
        )
    }

    /// This rank's share of `parts`; copied to neighbours when there are fewer parts than ranks.
    fn share(&self, name: &str, parts: usize) -> Range<usize> {
        let (rank, world) = self.place();
        if parts.is_multiple_of(world) {
            let each = parts / world;
            return rank * each..(rank + 1) * each;
        }
        if world.is_multiple_of(parts) {
            let own = rank * parts / world;
            return own..own + 1;
        }
        let fault = Fault::Cut {
            name: self.full(&name),
            parts,
            world_size: world,
        };
        self.book().faults.push(fault);
        0..1
    }

    /// Reads a tensor, or the ranges of it that `part` names along one dimension.
    fn cut(
        &self,
        name: &str,
        shape: &[usize],
        part: Option<(usize, Cut)>,
    ) -> Result<Tensor, LoadError> {
        let name = self.full(&name);
        let mut kept = shape.to_vec();
        if let Some((dim, cut)) = &part {
            kept[*dim] = cut.iter().map(Range::len).sum();
        }
        match self.shared.checkpoint.read(
            &name,
            shape,
            part.as_ref().map(|(dim, cut)| (*dim, &cut[..])),
        ) {
            Ok((values, bytes)) => {
                let mut book = self.book();
                book.used.insert(name);
                book.bytes_read += bytes;
                book.bytes_kept += 4 * values.len() as u64;
                let share = book.bytes_read as f32 / self.shared.checkpoint.bytes() as f32;
                drop(book);
                (self.shared.progress)(share.min(1.0));
                Ok(Tensor::from_vec(values, kept, &self.shared.device)?)
            }
            Err(fault) => {
                let mut book = self.book();
                book.used.insert(name);
                book.faults.push(fault);
                // a stand-in without memory behind it: loading goes on, to find the other faults
                Ok(Tensor::zeros((), DType::F32, &Device::Cpu)?.broadcast_as(kept)?)
            }
        }
    }
}
