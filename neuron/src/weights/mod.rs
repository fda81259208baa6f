//! A checkpoint as a model sees it while loading: names and shapes in, matrices and tensors on the device out.
//!
//! A model says at each weight how it is shared among ranks; that is the only place where ranks matter. Shapes are
//! checked whatever the world size. What is missing or has another shape is collected, so that [`Weights::finish`]
//! can name all of it at once.

use crate::gpu::GpuError;
use crate::kernels::cuda::{DeviceMatrix, matrix};
use crate::kernels::rows::{Place, Vector, Weight};
use crate::model::LoadError;
use crate::parallel::Communicator;
use crate::quant::panels::PANEL;
use crate::quant::{self, Format, Matrix, Rows, format_of, format_on_device};
use candle_core::{DType, Device, Tensor};
use checkpoint::{Checkpoint, Source};
use std::cell::{Cell, RefCell, RefMut};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::Arc;

mod checkpoint;
#[cfg(test)]
mod fp8_tests;
mod gguf;
mod gguf_names;
mod names;

pub use checkpoint::open_gguf;
pub use gguf::{Gguf, GgufError};
pub use names::GroupedHeads;

/// What is wrong with a weights file.
#[derive(Debug, thiserror::Error)]
pub enum FormatError {
    /// It is no safetensors file, or is cut short.
    #[error(transparent)]
    Safetensors(#[from] ::safetensors::SafeTensorError),
    /// It is no GGUF file, is cut short, or lacks a value.
    #[error(transparent)]
    Gguf(#[from] GgufError),
}

/// What a checkpoint says of itself: its `config.json`, or what is equal to it where a single file has everything. With
/// the file it stands in.
///
/// # Errors
/// When it is not there or cannot be read.
pub fn config(place: &Path) -> Result<(PathBuf, String), LoadError> {
    if place.is_file() {
        let file = open_gguf(place)?;
        let config = gguf_names::config(&file).map_err(|source| LoadError::Weights {
            file: place.to_path_buf(),
            source: source.into(),
        })?;
        return Ok((place.to_path_buf(), config.to_string()));
    }
    let file = place.join("config.json");
    let text = std::fs::read_to_string(&file).map_err(|source| LoadError::io(&file, source))?;
    Ok((file, text))
}

/// The files that hold the weights of the GGUF file at `place`, and how many numbers are in them.
///
/// # Errors
/// When one of them cannot be read.
pub fn gguf_files(place: &Path) -> Result<(Vec<PathBuf>, u64), LoadError> {
    let files = checkpoint::shards(place, &open_gguf(place)?);
    let mut numbers = 0u64;
    for file in &files {
        for tensor in open_gguf(file)?.tensors() {
            let count = tensor.shape.iter().product::<usize>() as u64;
            // tensors of a kind that is not known may claim to be of any size
            numbers = numbers.saturating_add(count);
        }
    }
    Ok((files, numbers))
}

/// A path in a checkpoint, for one rank.
#[derive(Clone)]
pub struct Weights<'a> {
    shared: Rc<Shared<'a>>,
    prefix: String,
}

struct Shared<'a> {
    checkpoint: Checkpoint,
    place: Place,
    /// The number format that was asked for.
    quant: Option<Format>,
    communicator: Arc<dyn Communicator>,
    progress: &'a (dyn Fn(f32) + 'a),
    /// Bytes of all tensors.
    bytes: u64,
    /// Nothing is read: what would be held is counted.
    planned: Cell<bool>,
    book: RefCell<Book>,
}

/// What loading has seen so far.
#[derive(Default)]
struct Book {
    used: BTreeSet<String>,
    faults: Vec<Fault>,
    bytes_read: u64,
    bytes_kept: u64,
    /// Bytes of matrices by the format they are held in.
    held: BTreeMap<&'static str, u64>,
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
    /// It has numbers that the format asked for cannot hold.
    Range {
        /// Its full name.
        name: String,
        /// The format.
        format: Format,
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
                write!(
                    f,
                    "{name} in {file} is {found}; read are F32, F16, BF16, F8_E4M3 with scales, and in GGUF files Q8_0, Q6_K, Q5_K and Q4_K"
                )
            }
            Self::Range { name, format } => {
                write!(f, "{name} has numbers too large for {format}")
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

/// Which part of a dimension is held: ranges that are laid one after the other.
type Cut = Vec<Range<usize>>;

impl<'a> Weights<'a> {
    /// Opens `folder`, for a model that is to be at `place`: a folder with safetensors files, one or those that an index names, or a GGUF file. `heads` are those
    /// of the linear attention, by which some checkpoints group rows; `quant` is the number format asked for, see [`format_of`].
    ///
    /// # Errors
    /// When a file is missing, cut short or of another kind.
    pub fn open(
        folder: &Path,
        heads: GroupedHeads,
        place: &Place,
        quant: Option<Format>,
        communicator: Arc<dyn Communicator>,
        progress: &'a dyn Fn(f32),
    ) -> Result<Self, LoadError> {
        let checkpoint = Checkpoint::open(folder, heads)?;
        Ok(Self::of(checkpoint, place, quant, communicator, progress))
    }

    /// Weights of no checkpoint: whatever is asked for is there, in numbers that mean nothing but have the spread of a real
    /// model's. `name` stands where errors name a folder.
    #[must_use]
    pub fn made_up(
        name: &str,
        place: &Place,
        quant: Option<Format>,
        communicator: Arc<dyn Communicator>,
        progress: &'a dyn Fn(f32),
    ) -> Self {
        let checkpoint = Checkpoint::made_up(name);
        Self::of(checkpoint, place, quant, communicator, progress)
    }

    fn of(
        checkpoint: Checkpoint,
        place: &Place,
        quant: Option<Format>,
        communicator: Arc<dyn Communicator>,
        progress: &'a dyn Fn(f32),
    ) -> Self {
        let shared = Shared {
            bytes: checkpoint.bytes(),
            checkpoint,
            place: place.clone(),
            quant,
            communicator,
            progress,
            planned: Cell::new(false),
            book: RefCell::default(),
        };
        Self {
            shared: Rc::new(shared),
            prefix: String::new(),
        }
    }

    /// The same with nothing read from now on: matrices have no rows and tensors no numbers, and [`Self::finish`] counts what
    /// they would hold. Its faults are those of sharing alone; the others are found by whoever reads.
    #[must_use]
    pub fn planned(self) -> Self {
        self.shared.planned.set(true);
        self
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

    /// Where the model is to be.
    #[must_use]
    pub fn place(&self) -> &Place {
        &self.shared.place
    }

    /// Numbers of a layer, brought to where the model is.
    ///
    /// # Errors
    /// When the device has no room.
    pub fn vector(&self, numbers: Vec<f32>) -> Result<Vector, GpuError> {
        Vector::new(numbers, self.place())
    }

    /// Whether the checkpoint has a tensor of this name.
    #[must_use]
    pub fn has(&self, name: &str) -> bool {
        self.shared.checkpoint.has(&self.full(&name))
    }

    /// The whole tensor, on every rank.
    #[must_use]
    pub fn replicated(&self, name: &str, shape: &[usize]) -> Part<'_, 'a> {
        self.part(name, shape, None)
    }

    /// Rows of a `[parts · width, …]` tensor: this rank's share of the parts, each of which stays whole.
    #[must_use]
    pub fn column_parallel(
        &self,
        name: &str,
        parts: usize,
        width: usize,
        rest: &[usize],
    ) -> Part<'_, 'a> {
        self.split_columns(name, &[(parts, width)], rest)
    }

    /// Rows of a tensor made of several blocks of `(parts, width)`, each shared on its own: a contiguous slice of the
    /// whole would be wrong. A block with fewer parts than ranks is copied to neighbouring ranks.
    #[must_use]
    pub fn split_columns(
        &self,
        name: &str,
        blocks: &[(usize, usize)],
        rest: &[usize],
    ) -> Part<'_, 'a> {
        let mut rows = Cut::new();
        let mut start = 0;
        for &(parts, width) in blocks {
            let share = self.share(name, parts);
            rows.push(start + share.start * width..start + share.end * width);
            start += parts * width;
        }
        let shape: Vec<usize> = std::iter::once(start).chain(rest.iter().copied()).collect();
        self.part(name, &shape, Some((0, rows)))
    }

    /// Columns of an `[out, parts · width]` tensor: the input this rank's column-parallel layer computed. No part may be
    /// copied: what they give is summed over ranks.
    #[must_use]
    pub fn row_parallel(&self, name: &str, out: usize, parts: usize, width: usize) -> Part<'_, 'a> {
        let (_, world) = self.rank();
        let share = if parts.is_multiple_of(world) {
            self.share(name, parts)
        } else {
            self.cut(name, parts)
        };
        let columns = std::iter::once(share.start * width..share.end * width).collect();
        self.part(name, &[out, parts * width], Some((1, columns)))
    }

    /// Rows of a `[vocabulary, width]` table: shares may differ by one row. Also where this rank's begins.
    #[must_use]
    pub fn vocab_parallel(
        &self,
        name: &str,
        vocabulary: usize,
        width: usize,
    ) -> (Part<'_, 'a>, usize) {
        let (rank, world) = self.rank();
        let rows = rank * vocabulary / world..(rank + 1) * vocabulary / world;
        let start = rows.start;
        (
            self.part(name, &[vocabulary, width], Some((0, vec![rows]))),
            start,
        )
    }

    /// Ends the loading: every fault at once, or the bytes this rank holds. Unknown tensors are named in a warning.
    ///
    /// # Errors
    /// [`LoadError::Tensors`] when any tensor was missing or not as needed.
    pub fn finish(&self, skipped: &[&str]) -> Result<u64, LoadError> {
        let book = self.book();
        if !book.faults.is_empty() {
            return Err(self.faulty(&book));
        }
        if self.shared.planned.get() {
            return Ok(book.bytes_kept);
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
        let held = book.held.iter();
        let held: Vec<String> = held
            .map(|(format, bytes)| format!("{} MB in {format}", bytes / 1_000_000))
            .collect();
        tracing::info!("matrices: {}", held.join(", "));
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

    fn rank(&self) -> (usize, usize) {
        (
            self.shared.communicator.rank(),
            self.shared.communicator.world_size(),
        )
    }

    /// This rank's share of `parts`; copied to neighbours when there are fewer parts than ranks.
    fn share(&self, name: &str, parts: usize) -> Range<usize> {
        let (rank, world) = self.rank();
        if parts.is_multiple_of(world) {
            let each = parts / world;
            return rank * each..(rank + 1) * each;
        }
        if world.is_multiple_of(parts) {
            let own = rank * parts / world;
            return own..own + 1;
        }
        self.cut(name, parts)
    }

    /// Notes that `parts` cannot be shared, and goes on with one of them.
    fn cut(&self, name: &str, parts: usize) -> Range<usize> {
        let (_, world_size) = self.rank();
        let fault = Fault::Cut {
            name: self.full(&name),
            parts,
            world_size,
        };
        self.book().faults.push(fault);
        0..1
    }

    fn part(&self, name: &str, shape: &[usize], cut: Option<(usize, Cut)>) -> Part<'_, 'a> {
        let stride = shape[1..].iter().product();
        let mut held = Selection {
            rows: std::iter::once(0..shape[0]).collect(),
            columns: std::iter::once(0..stride).collect(),
            stride,
        };
        match cut {
            Some((0, rows)) => held.rows = rows,
            Some((_, columns)) => held.columns = columns,
            None => {}
        }
        Part {
            weights: self,
            name: self.full(&name),
            shape: shape.to_vec(),
            held,
        }
    }

    fn faulty(&self, book: &Book) -> LoadError {
        LoadError::Tensors {
            folder: self.shared.checkpoint.place().to_path_buf(),
            faults: book.faults.clone(),
        }
    }

    /// Notes a fault. Loading goes on, to find the others, until there are more than anybody reads.
    fn fault(&self, fault: Fault) -> Result<(), LoadError> {
        const MOST: usize = 1000;
        if self.shared.planned.get() {
            return Ok(());
        }
        let mut book = self.book();
        book.faults.push(fault);
        if book.faults.len() < MOST {
            return Ok(());
        }
        Err(self.faulty(&book))
    }

    /// Notes that `read` bytes were read.
    fn count(&self, read: u64) {
        /// Below this a model is there before anybody asks.
        const WORTH_TELLING: u64 = 1 << 28;
        let all = self.shared.bytes;
        let mut book = self.book();
        let tenth = |read: u64| 10 * read / all.max(1);
        let before = tenth(book.bytes_read);
        book.bytes_read += read;
        let read = book.bytes_read;
        drop(book);
        if all > WORTH_TELLING && tenth(read) > before {
            let mega = |bytes: u64| bytes / 1_000_000;
            tracing::info!("read {} of {} MB", mega(read), mega(all));
        }
        (self.shared.progress)((read as f32 / all as f32).min(1.0));
    }
}

/// The part of a tensor that this rank holds, still to be read.
pub struct Part<'w, 'a> {
    weights: &'w Weights<'a>,
    /// Its full name.
    name: String,
    /// Of the whole tensor.
    shape: Vec<usize>,
    held: Selection,
}

/// Which numbers of a tensor are held.
struct Selection {
    /// Ranges of the first dimension.
    rows: Cut,
    /// Ranges of all the others, taken as one.
    columns: Cut,
    /// All the others, taken as one.
    stride: usize,
}

impl Selection {
    fn row_count(&self) -> usize {
        self.rows.iter().map(Range::len).sum()
    }

    fn width(&self) -> usize {
        self.columns.iter().map(Range::len).sum()
    }

    /// Where the held row `row` lies: ranges of numbers, counted through the whole tensor.
    fn runs(&self, row: usize) -> impl Iterator<Item = Range<usize>> {
        let mut left = row;
        let range = self.rows.iter().find(|range| {
            let inside = left < range.len();
            if !inside {
                left -= range.len();
            }
            inside
        });
        let row = range.expect("a row that is held").start + left;
        let start = row * self.stride;
        let columns = self.columns.iter();
        columns.map(move |columns| start + columns.start..start + columns.end)
    }
}

/// The part of a tensor that is held, as a matrix is made of it.
struct Held<'a> {
    source: &'a Source<'a>,
    selection: &'a Selection,
    /// Whether the matrix has the format of the file.
    as_stored: bool,
}

impl Held<'_> {
    /// These rows are read and will not be again.
    fn give_back(&self, rows: Range<usize>) {
        let stride = self.selection.stride;
        match &self.selection.rows[..] {
            // nothing between them
            [held] => {
                let (start, end) = (held.start + rows.start, held.start + rows.end);
                self.source.give_back(start * stride..end * stride);
            }
            parts => {
                let all = self.selection.row_count();
                if rows.end == all {
                    for part in parts {
                        self.source
                            .give_back(part.start * stride..part.end * stride);
                    }
                }
            }
        }
    }
}

impl Rows for Held<'_> {
    fn numbers(&self, row: usize, mut out: &mut [f32]) {
        for run in self.selection.runs(row) {
            let (own, rest) = out.split_at_mut(run.len());
            self.source.decode(run, own);
            out = rest;
        }
    }

    fn bytes<'a>(&'a self, row: usize, room: &'a mut Vec<u8>) -> Option<&'a [u8]> {
        if !self.as_stored {
            return None;
        }
        let mut runs = self.selection.runs(row);
        if let (Some(run), None) = (runs.next(), runs.next())
            && let Some(bytes) = self.source.mapped(run)
        {
            return Some(bytes);
        }
        room.clear();
        self.selection
            .runs(row)
            .all(|run| self.source.bytes(run, room))
            .then_some(&**room)
    }
}

impl Part<'_, '_> {
    /// A matrix in the format that [`format_of`] says.
    ///
    /// # Errors
    /// When the device has no room; faults of the file are kept for [`Weights::finish`].
    pub fn matrix(self) -> Result<Weight, LoadError> {
        let (rows, width) = (self.held.row_count(), self.held.width());
        let shared = &self.weights.shared;
        let Some(source) = self.source()? else {
            return Ok(Self::stand_in());
        };
        let mut format = format_of(&self.name, width, source.format(), shared.quant);
        if shared.place.gpu().is_some() {
            format = format_on_device(&self.name, format);
        }
        if shared.planned.get() {
            let bytes = match shared.place {
                Place::Cpu => quant::bytes(format, rows.next_multiple_of(PANEL) * width), // whole panels
                Place::Gpu(_) => matrix::bytes(format, rows, width),
            };
            self.weights.book().bytes_kept += bytes as u64;
            return Ok(Self::stand_in());
        }
        if let Some(matrix) = self.as_fp8(&source)? {
            return Ok(matrix);
        }
        let held = Held {
            source: &source,
            selection: &self.held,
            as_stored: format == source.stored_format(),
        };
        let taken = |own: Range<usize>| {
            self.weights.count(source.stored(own.len() * width));
            held.give_back(own);
        };
        let matrix = match &shared.place {
            Place::Cpu => Matrix::from_rows(format, rows, width, &held, taken).map(Weight::Host),
            Place::Gpu(gpu) => DeviceMatrix::from_rows(gpu, format, (rows, width), &held, taken)?
                .map(Weight::Device),
        };
        let Some(matrix) = matrix else {
            let name = self.name.clone();
            self.weights.fault(Fault::Range { name, format })?;
            return Ok(Self::stand_in());
        };
        let mut book = self.weights.book();
        book.bytes_kept += matrix.bytes();
        *book.held.entry(format.as_str()).or_default() += matrix.bytes();
        drop(book);
        Ok(matrix)
    }

    /// The matrix in 8 bits as the file has it, where it is whole on a device that multiplies with them and nothing else was
    /// asked for.
    fn as_fp8(&self, source: &Source<'_>) -> Result<Option<Weight>, LoadError> {
        let shared = &self.weights.shared;
        let (rows, width) = (self.held.row_count(), self.held.width());
        let whole = [rows, width] == self.shape[..];
        let on_device = shared
            .place
            .gpu()
            .filter(|_| whole && shared.quant.is_none());
        let (Some(gpu), Some((bytes, scales))) = (on_device, source.fp8()) else {
            return Ok(None);
        };
        if !(rows * width).is_multiple_of(4)
            || format_on_device(&self.name, Format::Bf16) == Format::F32
        {
            return Ok(None);
        }
        let matrix = DeviceMatrix::fp8(gpu, (rows, width), bytes, scales)?;
        self.weights.count(bytes.len() as u64);
        source.give_back(0..rows * width);
        let mut book = self.weights.book();
        book.bytes_kept += matrix.bytes();
        *book.held.entry("fp8").or_default() += matrix.bytes();
        Ok(Some(Weight::Device(matrix)))
    }

    /// A tensor in f32 in the host's memory, for what is no matrix of a projection.
    ///
    /// # Errors
    /// As [`Part::matrix`].
    pub fn tensor(self) -> Result<Tensor, LoadError> {
        let (rows, width) = (self.held.row_count(), self.held.width());
        let mut shape = self.shape.clone();
        shape[0] = rows;
        if self.shape.len() == 2 {
            shape[1] = width;
        }
        let source = self.source()?;
        let planned = self.weights.shared.planned.get();
        let (Some(source), false) = (source, planned) else {
            self.weights.book().bytes_kept += 4 * (rows * width) as u64;
            return Ok(Tensor::zeros(shape, DType::F32, &Device::Cpu)?);
        };
        let mut numbers = vec![0.0; rows * width];
        let held = Held {
            source: &source,
            selection: &self.held,
            as_stored: false,
        };
        for (row, out) in numbers.chunks_exact_mut(width.max(1)).enumerate() {
            held.numbers(row, out);
        }
        source.give_back(0..self.shape.iter().product());
        self.weights.book().bytes_kept += 4 * numbers.len() as u64;
        self.weights.count(source.stored(numbers.len()));
        Ok(Tensor::from_vec(numbers, shape, &Device::Cpu)?)
    }

    /// The file's tensor; none, and a fault noted, where it is not as needed.
    fn source(&self) -> Result<Option<Source<'_>>, LoadError> {
        let checkpoint = &self.weights.shared.checkpoint;
        self.weights.book().used.insert(self.name.clone());
        let scales = checkpoint::scales_of(&self.name);
        if checkpoint.has(&scales) {
            self.weights.book().used.insert(scales);
        }
        match checkpoint.tensor(&self.name, &self.shape) {
            Ok(source) => Ok(Some(source)),
            Err(fault) => self.weights.fault(fault).map(|()| None),
        }
    }

    /// Loading goes on with it, to find the other faults, and then fails.
    fn stand_in() -> Weight {
        let empty = Matrix::from_rows(Format::F32, 0, 0, &|_, _: &mut [f32]| {}, |_| {});
        Weight::Host(empty.expect("there is no number in it"))
    }
}
