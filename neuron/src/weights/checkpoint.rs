//! Files of weights, safetensors or GGUF, mapped into memory and read a tensor at a time.

use super::gguf::Gguf;
use super::names::{GroupedHeads, canonical};
use super::{Fault, FormatError, gguf_names};
use crate::model::LoadError;
use crate::quant::{self, Format};
use memmap2::{Mmap, UncheckedAdvice};
use safetensors::tensor::{Dtype, SafeTensors};
use serde::Deserialize;
use std::borrow::Cow;
use std::collections::{BTreeSet, HashMap};
use std::fs::File;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::ops::Range;
use std::path::{Path, PathBuf};

/// The name of a checkpoint of one file.
const SINGLE: &str = "model.safetensors";
/// The index of a checkpoint of several.
const INDEX: &str = "model.safetensors.index.json";

/// How the numbers of a tensor are stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Stored {
    /// In a format that is read.
    Format(Format),
    /// In 8 bits, four of them an exponent, with a scale for each 128 rows by 128 columns in a tensor beside it.
    Fp8,
    /// In another: its name.
    Other(String),
}

impl From<Dtype> for Stored {
    fn from(dtype: Dtype) -> Self {
        match dtype {
            Dtype::F32 => Self::Format(Format::F32),
            Dtype::F16 => Self::Format(Format::F16),
            Dtype::BF16 => Self::Format(Format::Bf16),
            Dtype::F8_E4M3 => Self::Fp8,
            other => Self::Other(format!("{other:?}")),
        }
    }
}

/// What becomes of each number when it is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Change {
    None,
    /// x − 1
    LessOne,
    /// ln(−x)
    LogOfNegative,
}

/// Where a tensor lies.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Entry {
    pub(super) file: usize,
    pub(super) stored: Stored,
    pub(super) shape: Vec<usize>,
    /// Its bytes in the file, in order: one range, or several where the file has its rows in another order.
    pub(super) bytes: Vec<Range<usize>>,
    /// Where its columns lie in a row of the file, in order; nothing where they are in order.
    pub(super) columns: Vec<Range<usize>>,
    pub(super) change: Change,
}

impl Entry {
    /// Numbers and bytes of what rows are made of. Of numbers that are not read it is no matter.
    fn unit(&self) -> (usize, usize) {
        match &self.stored {
            Stored::Format(format) => quant::unit(*format),
            Stored::Fp8 => (1, 1),
            Stored::Other(_) => {
                let count: usize = self.shape.iter().product();
                (1, self.byte_count() / count.max(1))
            }
        }
    }

    fn byte_count(&self) -> usize {
        self.bytes.iter().map(Range::len).sum()
    }

    /// The bytes of the numbers in `run`, which are whole blocks, in order.
    fn locate(&self, run: Range<usize>) -> impl Iterator<Item = Range<usize>> {
        let (numbers, size) = self.unit();
        let (start, end) = (run.start / numbers * size, run.end / numbers * size);
        let mut before = 0;
        self.bytes.iter().filter_map(move |piece| {
            let own = before..before + piece.len();
            before = own.end;
            let (from, to) = (start.max(own.start), end.min(own.end));
            (from < to).then(|| piece.start + from - own.start..piece.start + to - own.start)
        })
    }

    /// A tensor made of the given ranges of this one's first dimension, in that order.
    pub(super) fn rows(&self, ranges: &[Range<usize>]) -> Self {
        let width: usize = self.shape[1..].iter().product();
        let mut shape = self.shape.clone();
        shape[0] = ranges.iter().map(Range::len).sum();
        let bytes = ranges
            .iter()
            .flat_map(|range| self.locate(range.start * width..range.end * width))
            .collect();
        Self {
            shape,
            bytes,
            ..self.clone()
        }
    }

    /// The part `index` of a stack of tensors.
    pub(super) fn part(&self, index: usize) -> Self {
        let one = index..index + 1;
        let mut part = self.rows(std::slice::from_ref(&one));
        part.shape.remove(0);
        part
    }
}

/// The files of a checkpoint and what is in them.
pub(super) struct Checkpoint {
    /// The folder, or the only file.
    place: PathBuf,
    files: Vec<(String, Mmap)>,
    entries: HashMap<String, Entry>,
    /// Whatever a model asks for is there, in numbers that mean nothing.
    made_up: bool,
}

#[derive(Deserialize)]
struct Index {
    weight_map: HashMap<String, String>,
}

impl Checkpoint {
    /// Opens the files of `place`, a folder or a GGUF file, and gives each tensor the name and the shape a model asks for,
    /// see [`canonical`].
    pub(super) fn open(place: &Path, heads: GroupedHeads) -> Result<Self, LoadError> {
        let mut checkpoint = Self {
            place: place.to_path_buf(),
            files: Vec::new(),
            entries: HashMap::new(),
            made_up: false,
        };
        if place.is_dir() {
            checkpoint.add_folder(place)?;
        } else {
            checkpoint.add_gguf(place, heads)?;
        }
        checkpoint.entries = canonical(checkpoint.entries, heads);
        Ok(checkpoint)
    }

    /// A checkpoint that has every tensor in whatever shape it is asked for, with numbers that mean nothing but have the spread
    /// of a real model's. `name` stands where errors name a folder.
    pub(super) fn made_up(name: &str) -> Self {
        Self {
            place: name.into(),
            files: Vec::new(),
            entries: HashMap::new(),
            made_up: true,
        }
    }

    fn add_folder(&mut self, folder: &Path) -> Result<(), LoadError> {
        let index = folder.join(INDEX);
        let names: BTreeSet<String> = if index.is_file() {
            let text =
                std::fs::read_to_string(&index).map_err(|source| LoadError::io(&index, source))?;
            let index: Index = serde_json::from_str(&text).map_err(|source| LoadError::Json {
                file: index,
                source,
            })?;
            index.weight_map.into_values().collect()
        } else {
            BTreeSet::from([SINGLE.to_owned()])
        };
        for name in names {
            self.add_safetensors(folder, name)?;
        }
        Ok(())
    }

    fn add_gguf(&mut self, place: &Path, heads: GroupedHeads) -> Result<(), LoadError> {
        let first = open_gguf(place)?;
        for path in shards(place, &first) {
            let file = open_gguf(&path)?;
            // names and orders are told by the first of several
            let entries = gguf_names::entries(&file, &first, self.files.len(), heads);
            self.entries.extend(entries);
            self.files.push((file_name(&path), file.into_mapped()));
        }
        Ok(())
    }

    fn add_safetensors(&mut self, folder: &Path, name: String) -> Result<(), LoadError> {
        let path = folder.join(&name);
        let mapped = map(&path)?;
        let (header, metadata) =
            SafeTensors::read_metadata(&mapped).map_err(|source| LoadError::Weights {
                file: path,
                source: FormatError::Safetensors(source),
            })?;
        let start = header + 8; // the length of the header stands before it
        for (tensor, info) in metadata.tensors() {
            let entry = Entry {
                file: self.files.len(),
                stored: info.dtype.into(),
                shape: info.shape.clone(),
                bytes: std::iter::once(start + info.data_offsets.0..start + info.data_offsets.1)
                    .collect(),
                columns: Vec::new(),
                change: Change::None,
            };
            self.entries.insert(tensor, entry);
        }
        self.files.push((name, mapped));
        Ok(())
    }

    pub(super) fn place(&self) -> &Path {
        &self.place
    }

    pub(super) fn names(&self) -> impl Iterator<Item = &str> {
        self.entries.keys().map(String::as_str)
    }

    /// Bytes of all tensors.
    pub(super) fn bytes(&self) -> u64 {
        self.entries
            .values()
            .map(|entry| entry.byte_count() as u64)
            .sum()
    }

    /// Whether the tensor `name` is there. Of made-up ones those are that a text model of one file has.
    pub(super) fn has(&self, name: &str) -> bool {
        let plain = || !name.starts_with("model.language_model.") && !name.starts_with("mtp.");
        self.entries.contains_key(name) || self.made_up && plain()
    }

    /// The tensor `name`, which must have `shape` and numbers of a kind that is read.
    pub(super) fn tensor(&self, name: &str, shape: &[usize]) -> Result<Source<'_>, Fault> {
        if self.made_up {
            return Ok(Source::made_up(name, shape));
        }
        let Some(entry) = self.entries.get(name) else {
            return Err(Fault::Missing {
                name: name.into(),
                needed: shape.to_vec(),
            });
        };
        let (file, mapped) = &self.files[entry.file];
        if entry.shape != shape {
            return Err(Fault::Shape {
                file: file.clone(),
                name: name.into(),
                found: entry.shape.clone(),
                needed: shape.to_vec(),
            });
        }
        let mut scales = None;
        let format = match &entry.stored {
            Stored::Format(format) => *format,
            Stored::Fp8 => {
                scales = Some(self.scales(name, entry)?);
                Format::Bf16 // has room for all its digits but those of the scale
            }
            Stored::Other(other) => {
                return Err(Fault::Format {
                    file: file.clone(),
                    name: name.into(),
                    found: other.clone(),
                });
            }
        };
        Ok(Source {
            format,
            entry: Cow::Borrowed(entry),
            bytes: Bytes::Mapped(mapped),
            scales,
        })
    }

    /// The scales of the 8-bit tensor `name`.
    fn scales(&self, name: &str, entry: &Entry) -> Result<Scales, Fault> {
        let (file, _) = &self.files[entry.file];
        let &[rows, width] = &entry.shape[..] else {
            return Err(Fault::Format {
                file: file.clone(),
                name: name.into(),
                found: format!("F8_E4M3 of {} dimensions", entry.shape.len()),
            });
        };
        if entry.bytes.len() > 1 || !entry.columns.is_empty() {
            return Err(Fault::Format {
                file: file.clone(),
                name: name.into(),
                found: "F8_E4M3 in another order of rows or columns".into(),
            });
        }
        let across = width.div_ceil(FP8_BLOCK);
        let shape = [rows.div_ceil(FP8_BLOCK), across];
        let source = self.tensor(&scales_of(name), &shape)?;
        let mut numbers = vec![0.0; shape[0] * across];
        for (row, out) in numbers.chunks_exact_mut(across.max(1)).enumerate() {
            source.decode(row * across..(row + 1) * across, out);
        }
        Ok(Scales { numbers, across })
    }
}

/// Rows and columns that share a scale.
pub(super) const FP8_BLOCK: usize = 128;

/// The name of the tensor with the scales of `name`.
pub(super) fn scales_of(name: &str) -> String {
    format!("{name}_scale_inv")
}

/// Scales of an 8-bit matrix.
#[derive(Debug, Clone)]
pub(super) struct Scales {
    /// Row by row of blocks.
    pub(super) numbers: Vec<f32>,
    /// Blocks in a row of them.
    across: usize,
}

impl Scales {
    /// Scales the numbers of `row` from column `first` on.
    fn apply(&self, row: usize, first: usize, numbers: &mut [f32]) {
        let scales = &self.numbers[row / FP8_BLOCK * self.across..];
        for (column, x) in (first..).zip(numbers) {
            *x *= scales[column / FP8_BLOCK];
        }
    }
}

/// The number that 8 bits stand for: a sign, an exponent of 4 bits and 3 bits of fraction, without infinities
/// (Micikevicius et al., "FP8 Formats for Deep Learning", 2022).
pub(super) fn e4m3(byte: u8) -> f32 {
    let exponent = i32::from(byte >> 3 & 15);
    let fraction = f32::from(byte & 7) / 8.0;
    let size = match (exponent, byte & 7) {
        (15, 7) => f32::NAN,
        (0, _) => fraction / 64.0,
        _ => (1.0 + fraction) * 2f32.powi(exponent - 7),
    };
    if byte >> 7 == 1 { -size } else { size }
}

/// The mapped file at `path`.
fn map(path: &Path) -> Result<Mmap, LoadError> {
    let file = File::open(path).map_err(|source| LoadError::io(path, source))?;
    // SAFETY: the mapping is read-only. Whoever changes a model file under a running daemon changes what the
    // model says; the bytes are only ever read as numbers, so no other harm is done.
    #[allow(unsafe_code)]
    let mapped = unsafe { Mmap::map(&file) };
    mapped.map_err(|source| LoadError::io(path, source))
}

/// The GGUF file at `path`.
///
/// # Errors
/// When it cannot be read, or is none.
pub fn open_gguf(path: &Path) -> Result<Gguf, LoadError> {
    Gguf::new(map(path)?).map_err(|source| LoadError::Weights {
        file: path.to_path_buf(),
        source: FormatError::Gguf(source),
    })
}

fn file_name(path: &Path) -> String {
    let name = path.file_name().unwrap_or(path.as_os_str());
    name.to_string_lossy().into_owned()
}

/// All files of a model whose first is `first` at `path`: `NAME-00001-of-00003.gguf` and so on.
pub(super) fn shards(path: &Path, first: &Gguf) -> Vec<PathBuf> {
    let count = first.whole("split.count").unwrap_or(1);
    let name = file_name(path);
    let stem = name.strip_suffix(&format!("-00001-of-{count:05}.gguf"));
    match stem {
        Some(stem) if count > 1 => (1..=count)
            .map(|shard| path.with_file_name(format!("{stem}-{shard:05}-of-{count:05}.gguf")))
            .collect(),
        _ => vec![path.to_path_buf()],
    }
}

/// A tensor in a file.
pub(super) struct Source<'a> {
    /// How the file has its numbers.
    format: Format,
    entry: Cow<'a, Entry>,
    bytes: Bytes<'a>,
    /// Of 8-bit numbers.
    scales: Option<Scales>,
}

/// Where the bytes of a tensor come from.
enum Bytes<'a> {
    Mapped(&'a Mmap),
    /// From nowhere: bf16 numbers of this spread, which follow from their place and the name of the tensor.
    MadeUp {
        seed: u64,
        spread: f32,
    },
}

impl Bytes<'_> {
    /// Copies the bytes from `from` on.
    fn copy(&self, from: usize, out: &mut [u8]) {
        match self {
            Self::Mapped(mapped) => out.copy_from_slice(&mapped[from..from + out.len()]),
            Self::MadeUp { seed, spread } => {
                let scale = spread / f32::from(i16::MAX);
                let words = out.chunks_mut(8).zip(from as u64 / 8..);
                for (out, at) in words {
                    let mut word = splitmix(seed.wrapping_add(at));
                    for number in out.chunks_mut(2) {
                        let bits = (f32::from(word as i16) * scale).to_bits() >> 16; // of bf16
                        number.copy_from_slice(&(bits as u16).to_le_bytes()[..number.len()]);
                        word >>= 16;
                    }
                }
            }
        }
    }
}

/// The output of SplitMix64 for one state (Steele, Lea, Flood, 2014).
fn splitmix(state: u64) -> u64 {
    let mut z = state.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

impl Source<'_> {
    fn made_up(name: &str, shape: &[usize]) -> Self {
        let mut hasher = DefaultHasher::new();
        name.hash(&mut hasher);
        let count: usize = shape.iter().product();
        // what a matrix makes has the spread of what it is multiplied with; norms and gates are near their resting place
        let spread = match shape {
            [_, width] => (3.0 / *width as f32).sqrt(),
            _ => 0.1,
        };
        let entry = Entry {
            file: 0,
            stored: Stored::Format(Format::Bf16),
            shape: shape.to_vec(),
            bytes: std::iter::once(0..2 * count).collect(),
            columns: Vec::new(),
            change: Change::None,
        };
        Self {
            format: Format::Bf16,
            entry: Cow::Owned(entry),
            bytes: Bytes::MadeUp {
                seed: hasher.finish(),
                spread,
            },
            scales: None,
        }
    }

    /// The bytes and the scales of the whole tensor, where its numbers have 8 bits.
    pub(super) fn fp8(&self) -> Option<(&[u8], &[f32])> {
        match (&self.scales, &self.bytes, &self.entry.bytes[..]) {
            (Some(scales), Bytes::Mapped(mapped), [bytes]) => {
                Some((&mapped[bytes.clone()], &scales.numbers))
            }
            _ => None,
        }
    }

    /// The format to hold it in when nothing else is asked for. Blocks of 256 cannot be moved where the columns of a head
    /// are put elsewhere: their numbers go into smaller ones, which round them by far less than the blocks did.
    pub(super) fn format(&self) -> Format {
        let (numbers, _) = self.entry.unit();
        let moved = !self.entry.columns.is_empty();
        if moved && numbers > quant::unit(Format::Q8_0).0 {
            Format::Q8_0
        } else {
            self.format
        }
    }

    /// How the file has it.
    pub(super) fn stored_format(&self) -> Format {
        self.format
    }

    /// Bytes in the file of `count` of its numbers.
    pub(super) fn stored(&self, count: usize) -> u64 {
        let (numbers, bytes) = self.entry.unit();
        (count / numbers * bytes) as u64
    }

    /// Lets the kernel take back the memory in which the file's bytes of `run` lie: what was read stays in the page cache,
    /// but is no longer this process's, so that a checkpoint is not there twice while it is converted.
    pub(super) fn give_back(&self, run: Range<usize>) {
        let Bytes::Mapped(mapped) = self.bytes else {
            return;
        };
        let (numbers, _) = self.entry.unit();
        let whole = run.start / numbers * numbers..run.end.next_multiple_of(numbers);
        for bytes in self.entry.locate(whole) {
            // SAFETY: the mapping is of a file and read-only, so its pages come back with the same bytes when asked for
            #[allow(unsafe_code)]
            let told = unsafe {
                mapped.unchecked_advise_range(UncheckedAdvice::DontNeed, bytes.start, bytes.len())
            };
            if let Err(error) = told {
                tracing::debug!(%error, "the kernel keeps pages of a checkpoint");
            }
        }
    }

    /// Whether the bytes of `run`, counted in numbers through the whole tensor, can be taken as they are.
    fn is_plain(&self, run: &Range<usize>) -> bool {
        let (numbers, _) = self.entry.unit();
        run.start.is_multiple_of(numbers)
            && run.end.is_multiple_of(numbers)
            && self.scales.is_none()
            && self.entry.columns.is_empty()
            && self.entry.change == Change::None
    }

    /// The bytes of `run` where they lie, if they can be taken as they are and lie in one piece.
    pub(super) fn mapped(&self, run: Range<usize>) -> Option<&[u8]> {
        let Bytes::Mapped(mapped) = self.bytes else {
            return None;
        };
        if !self.is_plain(&run) {
            return None;
        }
        let mut pieces = self.entry.locate(run);
        match (pieces.next(), pieces.next()) {
            (Some(piece), None) => Some(&mapped[piece]),
            _ => None,
        }
    }

    /// Lays the bytes of `run` behind those in `out`, if they can be taken as they are.
    pub(super) fn bytes(&self, run: Range<usize>, out: &mut Vec<u8>) -> bool {
        if !self.is_plain(&run) {
            return false;
        }
        for bytes in self.entry.locate(run) {
            let before = out.len();
            out.resize(before + bytes.len(), 0);
            self.bytes.copy(bytes.start, &mut out[before..]);
        }
        true
    }

    /// The numbers of `run`, counted through the whole tensor and within a row, as f32; `out` is as long.
    pub(super) fn decode(&self, run: Range<usize>, out: &mut [f32]) {
        if self.entry.columns.is_empty() {
            self.decode_stored(run, out);
        } else {
            let width = self.entry.shape.last().copied().unwrap_or(1);
            let row = run.start / width * width;
            let mut stored = vec![0.0; width];
            self.decode_stored(row..row + width, &mut stored);
            let columns = self.entry.columns.iter().cloned().flatten();
            let wanted = columns.skip(run.start - row);
            for (out, column) in out.iter_mut().zip(wanted) {
                *out = stored[column];
            }
        }
        match self.entry.change {
            Change::None => {}
            Change::LessOne => out.iter_mut().for_each(|x| *x -= 1.0),
            Change::LogOfNegative => out.iter_mut().for_each(|x| *x = (-*x).ln()),
        }
    }

    /// As [`Self::decode`], with columns and numbers as the file has them.
    fn decode_stored(&self, run: Range<usize>, mut out: &mut [f32]) {
        let (numbers, size) = self.entry.unit();
        let whole = run.start / numbers * numbers..run.end.next_multiple_of(numbers);
        if whole != run {
            // part of a block
            let mut blocks = vec![0.0; whole.len()];
            self.decode_stored(whole.clone(), &mut blocks);
            out.copy_from_slice(&blocks[run.start - whole.start..][..run.len()]);
            return;
        }
        if let (Some(scales), Bytes::Mapped(mapped)) = (&self.scales, &self.bytes) {
            let width = self.entry.shape[1];
            let (row, first) = (run.start / width, run.start % width);
            for bytes in self.entry.locate(run) {
                for (x, byte) in out.iter_mut().zip(&mapped[bytes]) {
                    *x = e4m3(*byte);
                }
            }
            scales.apply(row, first, out);
            return;
        }
        for bytes in self.entry.locate(run) {
            let (own, rest) = out.split_at_mut(bytes.len() / size * numbers);
            match self.bytes {
                Bytes::Mapped(mapped) => quant::decode(self.format, &mapped[bytes], own),
                Bytes::MadeUp { .. } => {
                    let mut copied = vec![0; bytes.len()];
                    self.bytes.copy(bytes.start, &mut copied);
                    quant::decode(self.format, &copied, own);
                }
            }
            out = rest;
        }
    }
}
