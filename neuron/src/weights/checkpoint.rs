//! Safetensors files, mapped into memory and read a tensor at a time.

use super::names::{GroupedHeads, canonical};
use super::{Cut, Fault};
use crate::model::LoadError;
use half::{bf16, f16};
use memmap2::Mmap;
use rayon::prelude::*;
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

    /// The numbers of a tensor as f32, or of the ranges `cut` along one of its first two dimensions; and how many
    /// bytes of the file they are.
    pub(super) fn read(
        &self,
        name: &str,
        shape: &[usize],
        part: Option<(usize, &[Range<usize>])>,
    ) -> Result<(Vec<f32>, u64), Fault> {
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
        let numbers = match entry.dtype {
            Dtype::F32 => gather(mapped, entry, part, |b: [u8; 4]| f32::from_le_bytes(b)),
            Dtype::F16 => gather(mapped, entry, part, |b: [u8; 2]| {
                f16::from_le_bytes(b).to_f32()
            }),
            Dtype::BF16 => gather(mapped, entry, part, |b: [u8; 2]| {
                bf16::from_le_bytes(b).to_f32()
            }),
            other => {
                return Err(Fault::Format {
                    file: file.clone(),
                    name: name.into(),
                    found: format!("{other:?}"),
                });
            }
        };
        let read = (numbers.len() * entry.size()) as u64;
        Ok((numbers, read))
    }
}

/// The numbers of `entry` that `part` names, in order.
fn gather<const N: usize>(
    mapped: &[u8],
    entry: &Entry,
    part: Option<(usize, &[Range<usize>])>,
    convert: impl Fn([u8; N]) -> f32 + Sync,
) -> Vec<f32> {
    let runs = match part {
        None => std::iter::once(0..entry.count()).collect(),
        Some((dim, cut)) => runs(&entry.shape, dim, cut),
    };
    let mut numbers = vec![0.0; runs.iter().map(Range::len).sum()];
    let mut rest = &mut numbers[..];
    for bytes in runs.into_iter().flat_map(|run| entry.locate(run)) {
        let (own, after) = rest.split_at_mut(bytes.len() / N);
        own.par_iter_mut()
            .with_min_len(1 << 16)
            .zip(mapped[bytes].par_chunks_exact(N))
            .for_each(|(number, bytes)| {
                *number = convert(bytes.try_into().expect("chunks of N bytes"));
            });
        rest = after;
    }
    numbers
}

/// The contiguous runs of elements that a cut along `dim` leaves.
fn runs(shape: &[usize], dim: usize, cut: &[Range<usize>]) -> Cut {
    let inner: usize = shape[dim + 1..].iter().product();
    let outer: usize = shape[..dim].iter().product();
    (0..outer)
        .flat_map(|row| {
            let start = row * shape[dim] * inner;
            cut.iter()
                .map(move |range| start + range.start * inner..start + range.end * inner)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cut_takes_the_named_ranges_in_order() {
        assert_eq!(runs(&[4, 3], 0, &[1..2, 3..4]), [3..6, 9..12]);
        assert_eq!(runs(&[2, 6], 1, &[0..1, 4..6]), [0..1, 4..6, 6..7, 10..12]);
        assert_eq!(runs(&[3, 1, 4], 0, &[0..1, 2..3]), [0..4, 8..12]);
    }
}
