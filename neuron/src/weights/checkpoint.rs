//! Safetensors files, mapped into memory and read a tensor at a time.

use super::Fault;
use super::names::{GroupedHeads, canonical};
use crate::model::LoadError;
use crate::quant::{self, Format};
use memmap2::Mmap;
use safetensors::tensor::{Dtype, SafeTensors};
use serde::Deserialize;
use std::collections::{BTreeSet, HashMap};
use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};

/// The name of a checkpoint of one file.
const SINGLE: &str = "model.safetensors";
/// The index of a checkpoint of several.
const INDEX: &str = "model.safetensors.index.json";

/// Where a tensor lies.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Entry {
    pub(super) file: usize,
    pub(super) dtype: Dtype,
    pub(super) shape: Vec<usize>,
    /// Its bytes in the file, in order: one range, or several where the file has its rows in another order.
    pub(super) bytes: Vec<Range<usize>>,
}

impl Entry {
    /// Numbers in it.
    fn count(&self) -> usize {
        self.shape.iter().product()
    }

    /// Bytes of one number.
    fn size(&self) -> usize {
        self.byte_count() / self.count().max(1)
    }

    fn byte_count(&self) -> usize {
        self.bytes.iter().map(Range::len).sum()
    }

    /// The bytes of the numbers in `run`, in order.
    fn locate(&self, run: Range<usize>) -> impl Iterator<Item = Range<usize>> {
        let size = self.size();
        let (start, end) = (run.start * size, run.end * size);
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
            file: self.file,
            dtype: self.dtype,
            shape,
            bytes,
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
    folder: PathBuf,
    files: Vec<(String, Mmap)>,
    entries: HashMap<String, Entry>,
}

#[derive(Deserialize)]
struct Index {
    weight_map: HashMap<String, String>,
}

impl Checkpoint {
    /// Opens the files in `folder` and gives each tensor the name and the shape a model asks for, see [`canonical`].
    pub(super) fn open(folder: &Path, heads: GroupedHeads) -> Result<Self, LoadError> {
        let mut checkpoint = Self {
            folder: folder.to_path_buf(),
            files: Vec::new(),
            entries: HashMap::new(),
        };
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
            checkpoint.add(name)?;
        }
        checkpoint.entries = canonical(checkpoint.entries, heads);
        Ok(checkpoint)
    }

    fn add(&mut self, name: String) -> Result<(), LoadError> {
        let path = self.folder.join(&name);
        let file = File::open(&path).map_err(|source| LoadError::io(&path, source))?;
        // SAFETY: the mapping is read-only. Whoever changes a model file under a running daemon changes what the
        // model says; the bytes are only ever read as numbers, so no other harm is done.
        #[allow(unsafe_code)]
        let mapped = unsafe { Mmap::map(&file) }.map_err(|source| LoadError::io(&path, source))?;
        let (header, metadata) = SafeTensors::read_metadata(&mapped)
            .map_err(|source| LoadError::Weights { file: path, source })?;
        let start = header + 8; // the length of the header stands before it
        for (tensor, info) in metadata.tensors() {
            let entry = Entry {
                file: self.files.len(),
                dtype: info.dtype,
                shape: info.shape.clone(),
                bytes: std::iter::once(start + info.data_offsets.0..start + info.data_offsets.1)
                    .collect(),
            };
            self.entries.insert(tensor, entry);
        }
        self.files.push((name, mapped));
        Ok(())
    }

    pub(super) fn folder(&self) -> &Path {
        &self.folder
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

    pub(super) fn find(&self, name: &str) -> Option<&[usize]> {
        self.entries.get(name).map(|entry| &entry.shape[..])
    }

    /// The tensor `name`, which must have `shape` and numbers of a kind that is read.
    pub(super) fn tensor(&self, name: &str, shape: &[usize]) -> Result<Source<'_>, Fault> {
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
        let format = match entry.dtype {
            Dtype::F32 => Format::F32,
            Dtype::F16 => Format::F16,
            Dtype::BF16 => Format::Bf16,
            other => {
                return Err(Fault::Format {
                    file: file.clone(),
                    name: name.into(),
                    found: format!("{other:?}"),
                });
            }
        };
        Ok(Source {
            format,
            entry,
            mapped,
        })
    }
}

/// A tensor in a file.
pub(super) struct Source<'a> {
    /// How the file has its numbers.
    pub(super) format: Format,
    entry: &'a Entry,
    mapped: &'a [u8],
}

impl Source<'_> {
    /// Bytes in the file of `count` of its numbers.
    pub(super) fn bytes(&self, count: usize) -> u64 {
        (count * self.entry.size()) as u64
    }

    /// The numbers of `run`, counted through the whole tensor, as f32; `out` is as long.
    pub(super) fn decode(&self, run: Range<usize>, mut out: &mut [f32]) {
        let size = self.entry.size();
        for bytes in self.entry.locate(run) {
            let (own, rest) = out.split_at_mut(bytes.len() / size);
            let bytes = &self.mapped[bytes];
            quant::decode(self.format, bytes, own);
            out = rest;
        }
    }
}
