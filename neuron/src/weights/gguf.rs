//! GGUF files: a header of named values, a table of tensors, and their bytes, all mapped into memory.
//!
//! Nothing in the header is believed before it was held against the length of the file, and nothing is allocated by what
//! a header claims: values are read where they lie.

use crate::quant::{self, Format};
use memmap2::Mmap;
use std::collections::HashMap;
use std::ops::Range;

/// What a GGUF file begins with.
const MAGIC: [u8; 4] = *b"GGUF";
/// Where tensors begin is rounded up to this where the file names nothing else.
const ALIGNMENT: u64 = 32;
/// Dimensions of a tensor, at most.
const MAX_DIMENSIONS: u32 = 4;

/// A GGUF file that cannot be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum GgufError {
    /// It does not begin as one.
    #[error("it does not begin with `GGUF`")]
    Magic,
    /// It is of another generation.
    #[error("it is version {0}; read are 2 and 3, little-endian")]
    Version(u32),
    /// Something reaches past its end.
    #[error("{0} reaches past the end of the file")]
    Short(String),
    /// A value is of a kind that does not exist, or an array of arrays.
    #[error("the value of `{key}` is of kind {kind}, which is not read")]
    Kind {
        /// Its name.
        key: String,
        /// Its kind.
        kind: u32,
    },
    /// A name that is no text, or is there twice, or a tensor whose sizes make no sense.
    #[error("{0}")]
    Senseless(String),
    /// A value that is needed is not there, or is not of the kind it should be.
    #[error("`{0}` is missing or of the wrong kind")]
    Value(String),
}

/// A value of the header.
#[derive(Debug, Clone, PartialEq)]
enum Value {
    Whole(i128),
    Real(f64),
    Bool(bool),
    Text(Range<usize>),
    /// Elements of one kind, where they lie.
    Array {
        kind: u32,
        count: usize,
        bytes: Range<usize>,
    },
}

/// How the numbers of a tensor are stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Kind {
    /// As a format of ours.
    Format(Format),
    /// Otherwise: its number in the file.
    Other(u32),
}

/// A tensor of the table.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Tensor {
    pub(super) name: String,
    pub(super) kind: Kind,
    /// Outermost first, as everywhere else; the file has it the other way round.
    pub(super) shape: Vec<usize>,
    /// Its bytes in the file; none where the kind is not known.
    pub(super) bytes: Range<usize>,
}

/// A file.
pub struct Gguf {
    mapped: Mmap,
    values: HashMap<String, Value>,
    tensors: Vec<Tensor>,
}

/// Reads a header from front to back.
struct Reader<'a> {
    all: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    fn skip(&mut self, count: u64, what: &str) -> Result<Range<usize>, GgufError> {
        let end = usize::try_from(count)
            .ok()
            .and_then(|count| self.at.checked_add(count))
            .filter(|end| *end <= self.all.len())
            .ok_or_else(|| GgufError::Short(what.to_owned()))?;
        let range = self.at..end;
        self.at = end;
        Ok(range)
    }

    fn bytes<const N: usize>(&mut self, what: &str) -> Result<[u8; N], GgufError> {
        let range = self.skip(N as u64, what)?;
        Ok(self.all[range].try_into().expect("N bytes"))
    }

    fn u32(&mut self, what: &str) -> Result<u32, GgufError> {
        Ok(u32::from_le_bytes(self.bytes(what)?))
    }

    fn u64(&mut self, what: &str) -> Result<u64, GgufError> {
        Ok(u64::from_le_bytes(self.bytes(what)?))
    }

    fn text(&mut self, what: &str) -> Result<(Range<usize>, &'a str), GgufError> {
        let length = self.u64(what)?;
        let range = self.skip(length, what)?;
        let all: &'a [u8] = self.all;
        let text = std::str::from_utf8(&all[range.clone()])
            .map_err(|_| GgufError::Senseless(format!("{what} is no UTF-8")))?;
        Ok((range, text))
    }

    fn value(&mut self, key: &str, kind: u32) -> Result<Value, GgufError> {
        Ok(match kind {
            ARRAY => {
                let (kind, count) = (self.u32(key)?, self.u64(key)?);
                let start = self.at;
                match size(kind) {
                    Some(size) => {
                        let bytes = count.checked_mul(size);
                        self.skip(bytes.unwrap_or(u64::MAX), key)?;
                    }
                    // a string takes at least its length, so a count too large ends at the end of the file
                    None if kind == TEXT => {
                        for _ in 0..count {
                            self.text(key)?;
                        }
                    }
                    None => {
                        let key = key.to_owned();
                        return Err(GgufError::Kind { key, kind });
                    }
                }
                Value::Array {
                    kind,
                    count: usize::try_from(count).map_err(|_| GgufError::Short(key.into()))?,
                    bytes: start..self.at,
                }
            }
            TEXT => Value::Text(self.text(key)?.0),
            kind => match size(kind) {
                Some(size) => {
                    let range = self.skip(size, key)?;
                    single(kind, &self.all[range])
                }
                None => {
                    let key = key.to_owned();
                    return Err(GgufError::Kind { key, kind });
                }
            },
        })
    }
}

const BOOL: u32 = 7;
const TEXT: u32 = 8;
const ARRAY: u32 = 9;

/// Bytes of a single value of this kind; none of texts and arrays.
fn size(kind: u32) -> Option<u64> {
    match kind {
        0 | 1 | BOOL => Some(1),
        2 | 3 => Some(2),
        4..=6 => Some(4),
        10..=12 => Some(8),
        _ => None,
    }
}

/// The value in `bytes`, which are as many as [`size`] says.
fn single(kind: u32, bytes: &[u8]) -> Value {
    fn of<const N: usize>(bytes: &[u8]) -> [u8; N] {
        bytes.try_into().expect("as many as its kind has")
    }
    match kind {
        0 => Value::Whole(u8::from_le_bytes(of(bytes)).into()),
        1 => Value::Whole(i8::from_le_bytes(of(bytes)).into()),
        2 => Value::Whole(u16::from_le_bytes(of(bytes)).into()),
        3 => Value::Whole(i16::from_le_bytes(of(bytes)).into()),
        4 => Value::Whole(u32::from_le_bytes(of(bytes)).into()),
        5 => Value::Whole(i32::from_le_bytes(of(bytes)).into()),
        // through its digits, so that 1e-6 is 1e-6 and not the nearest f32 in f64
        6 => Value::Real(
            f32::from_le_bytes(of(bytes))
                .to_string()
                .parse()
                .unwrap_or(f64::NAN),
        ),
        BOOL => Value::Bool(bytes[0] != 0),
        10 => Value::Whole(u64::from_le_bytes(of(bytes)).into()),
        11 => Value::Whole(i64::from_le_bytes(of(bytes)).into()),
        _ => Value::Real(f64::from_le_bytes(of(bytes))),
    }
}

/// What the numbers of ggml's kinds are here.
fn kind_of(number: u32) -> Kind {
    Kind::Format(match number {
        0 => Format::F32,
        1 => Format::F16,
        8 => Format::Q8_0,
        12 => Format::Q4K,
        13 => Format::Q5K,
        14 => Format::Q6K,
        30 => Format::Bf16,
        other => return Kind::Other(other),
    })
}

impl Gguf {
    /// Reads the header of a mapped file.
    pub(super) fn new(mapped: Mmap) -> Result<Self, GgufError> {
        let (values, tensors) = header(&mapped)?;
        Ok(Self {
            mapped,
            values,
            tensors,
        })
    }

    pub(super) fn tensors(&self) -> &[Tensor] {
        &self.tensors
    }

    pub(super) fn shape(&self, name: &str) -> Option<&[usize]> {
        let found = self.tensors.iter().find(|tensor| tensor.name == name);
        found.map(|tensor| &tensor.shape[..])
    }

    pub(super) fn into_mapped(self) -> Mmap {
        self.mapped
    }

    /// A text.
    #[must_use]
    pub fn text(&self, key: &str) -> Option<&str> {
        match self.values.get(key)? {
            Value::Text(range) => std::str::from_utf8(&self.mapped[range.clone()]).ok(),
            _ => None,
        }
    }

    /// A whole number that is not negative.
    #[must_use]
    pub fn whole(&self, key: &str) -> Option<u64> {
        match self.values.get(key)? {
            Value::Whole(number) => u64::try_from(*number).ok(),
            _ => None,
        }
    }

    /// A number.
    #[must_use]
    pub fn real(&self, key: &str) -> Option<f64> {
        match self.values.get(key)? {
            Value::Whole(number) => Some(*number as f64),
            Value::Real(number) => Some(*number),
            _ => None,
        }
    }

    /// Yes or no.
    #[must_use]
    pub fn flag(&self, key: &str) -> Option<bool> {
        match self.values.get(key)? {
            Value::Bool(flag) => Some(*flag),
            _ => None,
        }
    }

    /// A list of texts, in order.
    #[must_use]
    pub fn texts(&self, key: &str) -> Option<Vec<&str>> {
        let Value::Array {
            kind: TEXT,
            count,
            bytes,
        } = self.values.get(key)?
        else {
            return None;
        };
        let mut reader = Reader {
            all: &self.mapped[..bytes.end],
            at: bytes.start,
        };
        (0..*count)
            .map(|_| Some(reader.text(key).ok()?.1))
            .collect()
    }

    /// A list of whole numbers, or of flags as 0 and 1, in order.
    #[must_use]
    pub fn wholes(&self, key: &str) -> Option<Vec<i64>> {
        let Value::Array { kind, bytes, .. } = self.values.get(key)? else {
            return None;
        };
        let size = size(*kind)?;
        let elements = self.mapped[bytes.clone()].chunks_exact(size as usize);
        elements
            .map(|bytes| match single(*kind, bytes) {
                Value::Whole(number) => i64::try_from(number).ok(),
                Value::Bool(flag) => Some(flag.into()),
                _ => None,
            })
            .collect()
    }
}

/// Values and tensors of a file.
#[allow(clippy::type_complexity)]
fn header(all: &[u8]) -> Result<(HashMap<String, Value>, Vec<Tensor>), GgufError> {
    let mut reader = Reader { all, at: 0 };
    if reader.bytes("the header").ok() != Some(MAGIC) {
        return Err(GgufError::Magic);
    }
    let version = reader.u32("the header")?;
    if ![2, 3].contains(&version) {
        return Err(GgufError::Version(version));
    }
    let (tensor_count, value_count) = (reader.u64("the header")?, reader.u64("the header")?);
    let mut values = HashMap::new();
    for _ in 0..value_count {
        let (_, key) = reader.text("the list of values")?;
        let kind = reader.u32(key)?;
        let value = reader.value(key, kind)?;
        if values.insert(key.to_owned(), value).is_some() {
            return Err(GgufError::Senseless(format!("`{key}` is there twice")));
        }
    }
    let mut found = Vec::new();
    for _ in 0..tensor_count {
        let (_, name) = reader.text("the list of tensors")?;
        let dimensions = reader.u32(name)?;
        if dimensions > MAX_DIMENSIONS {
            let what = format!("{name} has {dimensions} dimensions");
            return Err(GgufError::Senseless(what));
        }
        let mut shape = Vec::new();
        for _ in 0..dimensions {
            shape.push(reader.u64(name)?);
        }
        shape.reverse();
        let (kind, offset) = (kind_of(reader.u32(name)?), reader.u64(name)?);
        found.push((name.to_owned(), kind, shape, offset));
    }
    let alignment = match values.get("general.alignment") {
        None => ALIGNMENT,
        Some(Value::Whole(number)) if (1..1 << 20).contains(number) => *number as u64,
        Some(_) => return Err(GgufError::Value("general.alignment".into())),
    };
    let start = (reader.at as u64).next_multiple_of(alignment);
    let tensors = found
        .into_iter()
        .map(|(name, kind, shape, offset)| {
            tensor(name, kind, &shape, (start, offset), all.len() as u64)
        })
        .collect::<Result<_, _>>()?;
    Ok((values, tensors))
}

/// A tensor whose bytes lie within a file of `length`, `offset` behind `start`.
fn tensor(
    name: String,
    kind: Kind,
    shape: &[u64],
    (start, offset): (u64, u64),
    length: u64,
) -> Result<Tensor, GgufError> {
    let senseless = || GgufError::Senseless(format!("{name} of {shape:?} numbers makes no sense"));
    let count = shape
        .iter()
        .try_fold(1u64, |count, size| count.checked_mul(*size))
        .filter(|count| *count > 0)
        .ok_or_else(senseless)?;
    let bytes = match &kind {
        Kind::Other(_) => 0,
        Kind::Format(format) => {
            let (numbers, bytes) = quant::unit(*format);
            let width = shape.last().copied().unwrap_or(1);
            if !width.is_multiple_of(numbers as u64) {
                return Err(senseless());
            }
            (count / numbers as u64)
                .checked_mul(bytes as u64)
                .ok_or_else(senseless)?
        }
    };
    let start = start.checked_add(offset).ok_or_else(senseless)?;
    let end = start.checked_add(bytes).filter(|end| *end <= length);
    let Some(end) = end else {
        return Err(GgufError::Short(name));
    };
    // within the length of a file that is mapped, so it fits
    Ok(Tensor {
        kind,
        shape: shape.iter().map(|size| *size as usize).collect(),
        bytes: start as usize..end as usize,
        name,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A header that says `tensors` and `values`, and then `rest`.
    fn file(tensors: u64, values: u64, rest: &[u8]) -> Vec<u8> {
        let mut bytes = b"GGUF\x03\0\0\0".to_vec();
        bytes.extend(tensors.to_le_bytes());
        bytes.extend(values.to_le_bytes());
        bytes.extend(rest);
        bytes
    }

    fn text(text: &str) -> Vec<u8> {
        let mut bytes = (text.len() as u64).to_le_bytes().to_vec();
        bytes.extend(text.as_bytes());
        bytes
    }

    fn entry(name: &str, shape: &[u64], kind: u32, offset: u64) -> Vec<u8> {
        let mut bytes = text(name);
        bytes.extend((shape.len() as u32).to_le_bytes());
        shape
            .iter()
            .for_each(|size| bytes.extend(size.to_le_bytes()));
        bytes.extend(kind.to_le_bytes());
        bytes.extend(offset.to_le_bytes());
        bytes
    }

    #[test]
    fn what_a_header_claims_is_held_against_the_file() {
        let huge = u64::MAX;
        let array = |kind: u32, count: u64| {
            let mut bytes = text("a");
            bytes.extend(ARRAY.to_le_bytes());
            bytes.extend(kind.to_le_bytes());
            bytes.extend(count.to_le_bytes());
            bytes
        };
        for (bytes, said) in [
            (b"GGML".to_vec(), "does not begin"),
            (b"GG".to_vec(), "does not begin"),
            (b"GGUF\x00\0\0\x03".to_vec(), "version"),
            (file(huge, 0, &[]), "past the end"),
            (file(0, huge, &[]), "past the end"),
            (file(0, 1, &huge.to_le_bytes()), "past the end"),
            (file(0, 1, &array(TEXT, huge)), "past the end"),
            (file(0, 1, &array(12, huge)), "past the end"),
            (file(0, 1, &array(ARRAY, 1)), "kind 9"),
            (
                file(0, 1, &[text("a"), vec![99, 0, 0, 0]].concat()),
                "kind 99",
            ),
            (file(1, 0, &entry("t", &[huge, huge], 0, 0)), "no sense"),
            (file(1, 0, &entry("t", &[huge], 0, 0)), "no sense"),
            (file(1, 0, &entry("t", &[1 << 40], 0, 0)), "past the end"),
            (file(1, 0, &entry("t", &[4], 0, huge)), "no sense"),
            (file(1, 0, &entry("t", &[40], 8, 0)), "no sense"),
            (file(1, 0, &entry("t", &[1; 5], 0, 0)), "dimensions"),
            (file(1, 0, &entry("t", &[1 << 40, 0], 0, 0)), "no sense"),
        ] {
            let error = header(&bytes).unwrap_err().to_string();
            assert!(error.contains(said), "{error} instead of {said}");
        }
    }

    #[test]
    fn tensors_of_unknown_kinds_that_claim_to_be_vast_are_counted_without_a_fault() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.gguf");
        let tensors = [entry("a", &[1 << 63], 99, 0), entry("b", &[1 << 63], 99, 0)];
        let mut bytes = file(2, 0, &tensors.concat());
        bytes.resize(256, 0);
        std::fs::write(&path, bytes).unwrap();
        let (files, numbers) = crate::weights::gguf_files(&path).unwrap();
        assert_eq!((files.len(), numbers), (1, u64::MAX));
    }

    #[test]
    fn every_cut_of_a_file_is_refused() {
        let mut bytes = text("name");
        bytes.extend(TEXT.to_le_bytes());
        bytes.extend(text("value"));
        bytes.extend(entry("t", &[3, 2], 0, 0));
        let mut whole = file(1, 1, &bytes);
        whole.resize(whole.len().next_multiple_of(32) + 24, 0);
        let (values, tensors) = header(&whole).unwrap();
        assert_eq!(values.len(), 1);
        assert_eq!(tensors[0].shape, [2, 3]);
        for length in 0..whole.len() {
            assert!(header(&whole[..length]).is_err(), "cut at {length}");
        }
    }
}
