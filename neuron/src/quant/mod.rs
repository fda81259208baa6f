//! The number formats that weight matrices are held in, and which tensor is held in which.

use crate::kernels::pages::prefer_huge_pages;
use crate::kernels::vectorised;
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use rayon::prelude::*;
use std::ops::Range;
use std::sync::Arc;

pub(crate) use k_quants::{Q4K, Q5K, Q6K};
use panels::{Bf16Block, Block, F16Block, F32Block, PANEL, Q4KRows, Q5KRows, Q6KRows, Q8Rows};
pub use protocol::node::WeightFormat as Format;

pub(crate) mod k_quants;
pub(crate) mod panels;

/// Bytes that `count` numbers of whole panels take in memory: what `format` has in files, and a little more where scales of
/// parts have a byte each.
#[must_use]
pub fn bytes(format: Format, count: usize) -> usize {
    fn of<B: Block>(count: usize) -> usize {
        count / (B::Unit::LEN * PANEL) * size_of::<B>()
    }
    match format {
        Format::F32 => of::<F32Block>(count),
        Format::F16 => of::<F16Block>(count),
        Format::Bf16 => of::<Bf16Block>(count),
        Format::Q8_0 => of::<Q8Rows>(count),
        Format::Q6K => of::<Q6KRows>(count),
        Format::Q5K => of::<Q5KRows>(count),
        Format::Q4K => of::<Q4KRows>(count),
    }
}

/// What a row of `format` is made of: numbers in one, and its bytes in files.
#[must_use]
pub fn unit(format: Format) -> (usize, usize) {
    fn of<U: Unit>() -> (usize, usize) {
        (U::LEN, U::BYTES)
    }
    match format {
        Format::F32 => of::<f32>(),
        Format::F16 => of::<f16>(),
        Format::Bf16 => of::<bf16>(),
        Format::Q8_0 => of::<Q8Block>(),
        Format::Q6K => of::<Q6K>(),
        Format::Q5K => of::<Q5K>(),
        Format::Q4K => of::<Q4K>(),
    }
}

/// The format that matrix `name` with rows of `width` numbers is held in, when the file has it in `stored` and the
/// user asked for `wanted`.
///
/// | tensors | held as | because |
/// |---|---|---|
/// | any, nothing asked for | stored | 16-bit weights widen to f32 without loss, in the kernel as in memory |
/// | `in_proj_a`, `in_proj_b` | stored | they steer what the recurrent state keeps, errors add up over time, and they are small |
/// | `gate`, `shared_expert_gate` | stored | a changed choice of experts changes everything, and they are small |
/// | `fc` (drafts) | stored | small |
/// | `in_proj_qkv`, below 8 bits asked for | `q8_0` | what it makes is written into the recurrent state, errors add up over time |
/// | `embed_tokens`, `lm_head`, 4 or 5 bits asked for | `q6_k` | the head's errors are those of the logits; often it is the embedding too |
/// | rows that are no whole number of blocks of 256 | `q8_0` | a block must not reach into the next row |
/// | rows that are no whole number of blocks of 32 | `f16` | the same |
/// | all others | wanted | |
#[must_use]
pub fn format_of(name: &str, width: usize, stored: Format, wanted: Option<Format>) -> Format {
    const AS_STORED: [&str; 5] = ["in_proj_a", "in_proj_b", "gate", "shared_expert_gate", "fc"];
    let format = match (module_of(name), wanted) {
        (_, None) => stored,
        (module, _) if AS_STORED.contains(&module) => stored,
        ("in_proj_qkv", Some(Format::Q6K | Format::Q5K | Format::Q4K)) => Format::Q8_0,
        ("embed_tokens" | "lm_head", Some(Format::Q5K | Format::Q4K)) => Format::Q6K,
        (_, Some(wanted)) => wanted,
    };
    let fits = |format| width.is_multiple_of(unit(format).0);
    if fits(format) {
        format
    } else if fits(Format::Q8_0) {
        Format::Q8_0
    } else {
        Format::F16
    }
}

/// The format on a CUDA device of a matrix for which [`format_of`] says `format`.
///
/// There, products of many rows with 16-bit weights round what is multiplied to 16 bits as well. What steers the recurrent
/// state, the choice of experts or the layer that drafts is small, and is held in f32, so that nothing is rounded.
#[must_use]
pub fn format_on_device(name: &str, format: Format) -> Format {
    const IN_F32: [&str; 5] = ["in_proj_a", "in_proj_b", "gate", "shared_expert_gate", "fc"];
    if IN_F32.contains(&module_of(name)) {
        Format::F32
    } else {
        format
    }
}

/// The module that the weight `name` is of: the last part of its path.
fn module_of(name: &str) -> &str {
    let module = name.strip_suffix(".weight").unwrap_or(name);
    module.rsplit('.').next().unwrap_or(module)
}

/// What rows of a matrix are made of: a number, or a block of them.
pub(crate) trait Unit: bytemuck::NoUninit + Send + Sync {
    /// Numbers in one.
    const LEN: usize;
    /// Its bytes in files.
    const BYTES: usize;
    /// One of zeros.
    const EMPTY: Self;

    /// The nearest one; `numbers` has [`Self::LEN`].
    fn encode(numbers: &[f32]) -> Self;

    /// Its numbers; `out` has [`Self::LEN`].
    fn decode(&self, out: &mut [f32]);

    /// As many as fit into `out`.
    #[inline(always)]
    fn encode_all(numbers: &[f32], out: &mut [Self]) {
        for (numbers, out) in numbers.chunks_exact(Self::LEN).zip(out) {
            *out = Self::encode(numbers);
        }
    }

    /// The numbers of all.
    #[inline(always)]
    fn decode_all(units: &[Self], out: &mut [f32]) {
        for (unit, out) in units.iter().zip(out.chunks_exact_mut(Self::LEN)) {
            unit.decode(out);
        }
    }

    /// Whether encoding stayed in range.
    fn is_finite(&self) -> bool;

    /// What a file has in [`Self::BYTES`] bytes.
    fn read(bytes: &[u8]) -> Self;
}

macro_rules! single_number {
    ($kind:ty, $empty:expr, $from:expr, $to:expr, $finite:expr $(, $all:item)*) => {
        impl Unit for $kind {
            const LEN: usize = 1;
            const BYTES: usize = size_of::<Self>();
            const EMPTY: Self = $empty;

            #[inline(always)]
            fn encode(numbers: &[f32]) -> Self {
                $from(numbers[0])
            }

            #[inline(always)]
            fn decode(&self, out: &mut [f32]) {
                out[0] = $to(*self);
            }

            fn is_finite(&self) -> bool {
                $finite(*self)
            }

            #[inline(always)]
            fn read(bytes: &[u8]) -> Self {
                Self::from_le_bytes(bytes.try_into().expect("a whole number"))
            }

            $($all)*
        }
    };
}
// what is not finite in the file is none of the format's doing, but a number that f16 cannot hold is
single_number!(f32, 0.0, |x| x, |x| x, |_| true);
single_number!(
    f16,
    f16::ZERO,
    f16::from_f32,
    f16::to_f32,
    |x: f16| !x.is_infinite(),
    // one by one, each would ask which processor this is
    fn encode_all(numbers: &[f32], out: &mut [Self]) {
        out.convert_from_f32_slice(numbers);
    },
    fn decode_all(units: &[Self], out: &mut [f32]) {
        units.convert_to_f32_slice(out);
    }
);
single_number!(bf16, bf16::ZERO, bf16::from_f32, bf16::to_f32, |_| true);

/// 32 numbers: `scale · values[i]`.
#[derive(Debug, Clone, Copy, PartialEq, bytemuck::NoUninit)]
#[repr(C)]
pub(crate) struct Q8Block {
    pub(crate) scale: f16,
    pub(crate) values: [i8; 32],
}

impl Unit for Q8Block {
    const LEN: usize = 32;
    const BYTES: usize = 34;
    const EMPTY: Self = Self {
        scale: f16::ZERO,
        values: [0; 32],
    };

    #[inline(always)]
    fn encode(numbers: &[f32]) -> Self {
        let numbers: &[f32; Self::LEN] = numbers.try_into().expect("a whole block");
        let scale = f16::from_f32(k_quants::largest(numbers) / 127.0);
        // by the scale that is kept, not the one before rounding: that halves the error of small blocks
        let inverse = match scale.to_f32() {
            0.0 => 0.0,
            scale => 1.0 / scale,
        };
        let mut values = [0; Self::LEN];
        for (value, x) in values.iter_mut().zip(numbers) {
            *value = k_quants::whole(x * inverse, -127.0, 127.0) as i8;
        }
        Self { scale, values }
    }

    #[inline(always)]
    fn decode(&self, numbers: &mut [f32]) {
        let scale = self.scale.to_f32();
        for (x, value) in numbers.iter_mut().zip(&self.values) {
            *x = scale * f32::from(*value);
        }
    }

    fn is_finite(&self) -> bool {
        self.scale.is_finite()
    }

    fn read(bytes: &[u8]) -> Self {
        let (scale, values) = bytes.split_first_chunk().expect("a whole block");
        let values: [u8; Self::LEN] = values.try_into().expect("a whole block");
        Self {
            scale: f16::from_le_bytes(*scale),
            values: values.map(|byte| byte as i8),
        }
    }
}

/// The numbers that `bytes` of a file hold in `format`; `out` has room for all of them.
pub(crate) fn decode(format: Format, bytes: &[u8], out: &mut [f32]) {
    fn as_units<U: Unit>(bytes: &[u8], out: &mut [f32]) {
        vectorised(
            #[inline(always)]
            || {
                /// Numbers at a time.
                const PIECE: usize = 256;
                let mut units = [U::EMPTY; PIECE];
                let units = &mut units[..PIECE / U::LEN];
                for (bytes, out) in bytes
                    .chunks(units.len() * U::BYTES)
                    .zip(out.chunks_mut(PIECE))
                {
                    for (unit, bytes) in units.iter_mut().zip(bytes.chunks_exact(U::BYTES)) {
                        *unit = U::read(bytes);
                    }
                    U::decode_all(&units[..out.len() / U::LEN], out);
                }
            },
        );
    }
    match format {
        Format::F32 => as_units::<f32>(bytes, out),
        Format::F16 => as_units::<f16>(bytes, out),
        Format::Bf16 => as_units::<bf16>(bytes, out),
        Format::Q8_0 => as_units::<Q8Block>(bytes, out),
        Format::Q6K => as_units::<Q6K>(bytes, out),
        Format::Q5K => as_units::<Q5K>(bytes, out),
        Format::Q4K => as_units::<Q4K>(bytes, out),
    }
}

/// The numbers of a matrix, panel after panel.
#[derive(Debug)]
pub(crate) enum Numbers {
    F32(Vec<F32Block>),
    F16(Vec<F16Block>),
    Bf16(Vec<Bf16Block>),
    Q8_0(Vec<Q8Rows>),
    Q6K(Vec<Q6KRows>),
    Q5K(Vec<Q5KRows>),
    Q4K(Vec<Q4KRows>),
}

/// Does the same with the numbers of any format.
macro_rules! each_format {
    ($numbers:expr, $all:ident => $body:expr) => {
        match $numbers {
            Numbers::F32($all) => $body,
            Numbers::F16($all) => $body,
            Numbers::Bf16($all) => $body,
            Numbers::Q8_0($all) => $body,
            Numbers::Q6K($all) => $body,
            Numbers::Q5K($all) => $body,
            Numbers::Q4K($all) => $body,
        }
    };
}
pub(crate) use each_format;

/// A weight matrix, `[rows, width]`, in some number format. Copies share the numbers.
#[derive(Debug, Clone)]
pub struct Matrix {
    rows: usize,
    width: usize,
    numbers: Arc<Numbers>,
}

/// Where the rows of a matrix come from while it is made.
pub trait Rows: Sync {
    /// Row `row`, in f32; `out` has room for it. Called once for each row, from several threads.
    fn numbers(&self, row: usize, out: &mut [f32]);

    /// Row `row`, as bytes of the format the matrix is to have, where it can be had so: where it lies, or laid into `room`.
    fn bytes<'a>(&'a self, row: usize, room: &'a mut Vec<u8>) -> Option<&'a [u8]> {
        let _ = (row, room);
        None
    }
}

impl<F: Fn(usize, &mut [f32]) + Sync> Rows for F {
    fn numbers(&self, row: usize, out: &mut [f32]) {
        self(row, out);
    }
}

/// Room for some rows on their way.
struct Scratch<U> {
    numbers: Vec<f32>,
    rows: Vec<Room<U>>,
}

/// Room for one of them.
#[derive(Clone)]
struct Room<U> {
    bytes: Vec<u8>,
    units: Vec<U>,
}

impl<U: Unit> Scratch<U> {
    fn new(rows: usize) -> Self {
        let room = Room {
            bytes: Vec::new(),
            units: Vec::new(),
        };
        Self {
            numbers: Vec::new(),
            rows: vec![room; rows],
        }
    }
}

impl Matrix {
    /// A matrix made of `rows` rows of `source`. `None` when a number does not fit the format. `taken` is told, in order,
    /// which rows are done and will not be asked for again.
    ///
    /// # Panics
    /// When a row is no whole number of the format's blocks.
    pub fn from_rows(
        format: Format,
        rows: usize,
        width: usize,
        source: &(impl Rows + ?Sized),
        taken: impl Fn(Range<usize>),
    ) -> Option<Self> {
        fn blocks<B: Block>(
            rows: usize,
            width: usize,
            source: &(impl Rows + ?Sized),
            taken: impl Fn(Range<usize>),
        ) -> Option<Vec<B>> {
            /// Numbers after which `taken` is told: what was lent until then can be given back.
            const PIECE: usize = 1 << 23;
            assert!(
                width.is_multiple_of(B::Unit::LEN),
                "`format_of` leaves rows of {width} numbers to other formats"
            );
            let count = width / B::Unit::LEN; // blocks of a panel
            let mut all: Vec<B> = bytemuck::zeroed_vec(rows.div_ceil(PANEL) * count);
            prefer_huge_pages(&all);
            let piece = (PIECE / (width * PANEL).max(1)).max(1); // panels
            let mut fits = true;
            for (index, part) in all.chunks_mut((piece * count).max(1)).enumerate() {
                let first = index * piece * PANEL;
                let last = rows.min(first + piece * PANEL);
                fits &= part
                    .par_chunks_mut(count.max(1))
                    .enumerate()
                    .map_init(
                        || Scratch::new(PANEL),
                        |scratch, (panel, blocks)| {
                            let first = first + panel * PANEL;
                            let own = first..last.min(first + PANEL);
                            take_rows(source, own, width, scratch, blocks)
                        },
                    )
                    .reduce(|| true, |one, other| one && other);
                taken(first..last);
            }
            fits.then_some(all)
        }
        let numbers = match format {
            Format::F32 => Numbers::F32(blocks(rows, width, source, taken)?),
            Format::F16 => Numbers::F16(blocks(rows, width, source, taken)?),
            Format::Bf16 => Numbers::Bf16(blocks(rows, width, source, taken)?),
            Format::Q8_0 => Numbers::Q8_0(blocks(rows, width, source, taken)?),
            Format::Q6K => Numbers::Q6K(blocks(rows, width, source, taken)?),
            Format::Q5K => Numbers::Q5K(blocks(rows, width, source, taken)?),
            Format::Q4K => Numbers::Q4K(blocks(rows, width, source, taken)?),
        };
        Some(Self {
            rows,
            width,
            numbers: Arc::new(numbers),
        })
    }

    /// Its rows: outputs of a projection.
    #[must_use]
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Numbers in a row: inputs of a projection.
    #[must_use]
    pub fn width(&self) -> usize {
        self.width
    }

    /// The format of its numbers.
    #[must_use]
    pub fn format(&self) -> Format {
        match &*self.numbers {
            Numbers::F32(_) => Format::F32,
            Numbers::F16(_) => Format::F16,
            Numbers::Bf16(_) => Format::Bf16,
            Numbers::Q8_0(_) => Format::Q8_0,
            Numbers::Q6K(_) => Format::Q6K,
            Numbers::Q5K(_) => Format::Q5K,
            Numbers::Q4K(_) => Format::Q4K,
        }
    }

    /// Bytes its numbers hold, with what fills up the last panel.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        each_format!(&*self.numbers, all => size_of_val(all.as_slice())) as u64
    }

    pub(crate) fn numbers(&self) -> &Numbers {
        &self.numbers
    }

    /// Row `index` in f32; `out` has [`Self::width`].
    pub fn decode_row(&self, index: usize, out: &mut [f32]) {
        fn row<B: Block>(all: &[B], width: usize, index: usize, out: &mut [f32]) {
            let count = width / B::Unit::LEN; // blocks of a panel
            let panel = &all[index / PANEL * count..][..count];
            vectorised(
                #[inline(always)]
                || {
                    for (block, out) in panel.iter().zip(out.chunks_exact_mut(B::Unit::LEN)) {
                        block.get(index % PANEL).decode(out);
                    }
                },
            );
        }
        each_format!(&*self.numbers, all => row(all, self.width, index, out));
    }
}

/// Lays rows of `source`, at most [`PANEL`], into a panel. False when a number does not fit.
fn take_rows<B: Block>(
    source: &(impl Rows + ?Sized),
    rows: Range<usize>,
    width: usize,
    scratch: &mut Scratch<B::Unit>,
    blocks: &mut [B],
) -> bool {
    let Scratch {
        numbers,
        rows: rooms,
    } = scratch;
    let mut all_fit = true;
    let mut taken: [&[u8]; PANEL] = [&[]; PANEL];
    for ((row, room), taken) in rows.clone().zip(rooms).zip(&mut taken) {
        let (bytes, fits) = take_row(source, row, width, numbers, room);
        all_fit &= fits;
        *taken = bytes;
    }
    vectorised(
        #[inline(always)]
        || B::put_rows(blocks, &taken[..rows.len()]),
    );
    all_fit
}

/// The rows `rows` of `source` as files have them in `format`, one after another. `None` when a number does not fit.
///
/// # Panics
/// When a row is no whole number of the format's blocks.
pub(crate) fn encode_rows(
    format: Format,
    rows: Range<usize>,
    width: usize,
    source: &(impl Rows + ?Sized),
) -> Option<Vec<u8>> {
    fn encode<U: Unit>(
        rows: Range<usize>,
        width: usize,
        source: &(impl Rows + ?Sized),
    ) -> Option<Vec<u8>> {
        assert!(
            width.is_multiple_of(U::LEN),
            "`format_of` leaves rows of {width} numbers to other formats"
        );
        let of_row = width / U::LEN * U::BYTES;
        let mut all = vec![0; rows.len() * of_row];
        let fits = all
            .par_chunks_exact_mut(of_row.max(1))
            .enumerate()
            .map_init(
                || Scratch::<U>::new(1),
                |Scratch {
                     numbers,
                     rows: room,
                 },
                 (at, out)| {
                    let row = rows.start + at;
                    let (bytes, fits) = take_row(source, row, width, numbers, &mut room[0]);
                    out.copy_from_slice(bytes);
                    fits
                },
            )
            .reduce(|| true, |one, other| one && other);
        fits.then_some(all)
    }
    match format {
        Format::F32 => encode::<f32>(rows, width, source),
        Format::F16 => encode::<f16>(rows, width, source),
        Format::Bf16 => encode::<bf16>(rows, width, source),
        Format::Q8_0 => encode::<Q8Block>(rows, width, source),
        Format::Q6K => encode::<Q6K>(rows, width, source),
        Format::Q5K => encode::<Q5K>(rows, width, source),
        Format::Q4K => encode::<Q4K>(rows, width, source),
    }
}

/// Row `row` of `source` as files have it, and whether every number fits.
fn take_row<'a, U: Unit>(
    source: &'a (impl Rows + ?Sized),
    row: usize,
    width: usize,
    numbers: &mut Vec<f32>,
    Room { bytes, units }: &'a mut Room<U>,
) -> (&'a [u8], bool) {
    if let Some(stored) = source.bytes(row, bytes) {
        return (stored, true); // as the file has it
    }
    numbers.resize(width, 0.0);
    units.resize(width / U::LEN, U::EMPTY);
    source.numbers(row, numbers);
    vectorised(
        #[inline(always)]
        || U::encode_all(numbers, units),
    );
    let fits = units.iter().all(U::is_finite);
    (bytemuck::cast_slice(units), fits)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::testing::numbers;

    fn held(format: Format, rows: usize, width: usize, values: &[f32]) -> Option<Matrix> {
        Matrix::from_rows(
            format,
            rows,
            width,
            &|row, out: &mut [f32]| {
                out.copy_from_slice(&values[row * width..][..width]);
            },
            |_| {},
        )
    }

    #[test]
    fn every_format_keeps_numbers_as_well_as_it_can() {
        let (rows, width) = (35, 512);
        let values = numbers(1, rows * width);
        for (format, bound) in [
            (Format::F32, 0.0),
            (Format::F16, 1.0 / 2048.0),
            (Format::Bf16, 1.0 / 256.0),
            (Format::Q8_0, 1.1 * 0.5 / 127.0),
            (Format::Q6K, 2.0 * 0.5 / 32.0),
            (Format::Q5K, 2.0 * 0.5 / 16.0),
            (Format::Q4K, 2.0 * 0.5 / 8.0),
        ] {
            let matrix = held(format, rows, width, &values).expect("they fit");
            assert_eq!(matrix.format(), format);
            let whole_panels = rows.next_multiple_of(PANEL) * width;
            assert_eq!(matrix.bytes(), bytes(format, whole_panels) as u64);
            let mut row = vec![0.0; width];
            for (index, expected) in values.chunks(width).enumerate() {
                matrix.decode_row(index, &mut row);
                for (found, expected) in row.iter().zip(expected) {
                    let diff = (found - expected).abs();
                    assert!(diff <= bound, "{format}: {found} for {expected}");
                }
            }
        }
    }

    #[test]
    fn what_a_format_has_no_number_for_is_refused() {
        assert!(held(Format::F16, 1, 32, &[1e5; 32]).is_none());
        assert!(held(Format::Q8_0, 1, 32, &[1e7; 32]).is_none());
        for format in [Format::Q6K, Format::Q5K, Format::Q4K] {
            assert!(held(format, 1, 256, &[-1e9; 256]).is_none(), "{format}");
        }
        assert!(held(Format::Bf16, 1, 32, &[1e30; 32]).is_some());
    }

    #[test]
    fn a_block_that_was_decoded_is_encoded_to_the_same() {
        let block = Q8Block::encode(&numbers(7, 32));
        let mut decoded = [0.0; 32];
        block.decode(&mut decoded);
        assert_eq!(Q8Block::encode(&decoded), block);
        let zero = Q8Block::encode(&[0.0; 32]);
        assert_eq!(zero.values, [0; 32]);
    }

    #[test]
    fn what_steers_the_state_is_kept_as_it_is() {
        let of = |name, width| format_of(name, width, Format::Bf16, Some(Format::Q8_0));
        assert_eq!(
            of("model.layers.0.linear_attn.in_proj_a.weight", 64),
            Format::Bf16
        );
        assert_eq!(of("model.layers.0.mlp.gate.weight", 64), Format::Bf16);
        assert_eq!(of("model.layers.0.mlp.gate_proj.weight", 64), Format::Q8_0);
        assert_eq!(of("model.layers.0.mlp.down_proj.weight", 80), Format::F16);
        assert_eq!(format_of("x", 80, Format::Bf16, None), Format::Bf16);
        let of = |name, width| format_of(name, width, Format::Bf16, Some(Format::Q4K));
        assert_eq!(of("model.layers.0.mlp.down_proj.weight", 512), Format::Q4K);
        assert_eq!(of("model.layers.0.mlp.down_proj.weight", 320), Format::Q8_0);
        assert_eq!(of("model.layers.0.mlp.down_proj.weight", 80), Format::F16);
        assert_eq!(
            of("model.layers.0.linear_attn.in_proj_qkv.weight", 512),
            Format::Q8_0
        );
        assert_eq!(of("model.embed_tokens.weight", 512), Format::Q6K);
        assert_eq!(of("lm_head.weight", 512), Format::Q6K);
        for format in Format::ALL {
            assert_eq!(format.as_str().parse(), Ok(format));
        }
        assert!("q2".parse::<Format>().is_err());
        let on_device = |name| format_on_device(name, Format::Bf16);
        assert_eq!(
            on_device("model.layers.0.linear_attn.in_proj_a.weight"),
            Format::F32
        );
        assert_eq!(
            on_device("model.layers.0.mlp.gate_proj.weight"),
            Format::Bf16
        );
    }
}
