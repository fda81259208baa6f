//! The number formats that weight matrices are held in, and which tensor is held in which.

use half::{bf16, f16};
use rayon::prelude::*;
use std::sync::Arc;

pub use protocol::node::WeightFormat as Format;

/// Bytes of `count` numbers in a row of `format`.
#[must_use]
pub fn bytes(format: Format, count: usize) -> usize {
    match format {
        Format::F32 => 4 * count,
        Format::F16 | Format::Bf16 => 2 * count,
        Format::Q8_0 => count / Q8Block::LEN * size_of::<Q8Block>(),
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
/// | rows that are no whole number of blocks | f16 | a block must not reach into the next row |
/// | all others | wanted | |
#[must_use]
pub fn format_of(name: &str, width: usize, stored: Format, wanted: Option<Format>) -> Format {
    const AS_STORED: [&str; 5] = ["in_proj_a", "in_proj_b", "gate", "shared_expert_gate", "fc"];
    let module = name.strip_suffix(".weight").unwrap_or(name);
    let module = module.rsplit('.').next().unwrap_or(module);
    match wanted {
        Some(_) if AS_STORED.contains(&module) => stored,
        Some(Format::Q8_0) if !width.is_multiple_of(Q8Block::LEN) => Format::F16,
        Some(wanted) => wanted,
        None => stored,
    }
}

/// 32 numbers: `scale · values[i]`.
#[derive(Debug, Clone, Copy, PartialEq)]
#[repr(C)]
pub(crate) struct Q8Block {
    pub(crate) scale: f16,
    pub(crate) values: [i8; Self::LEN],
}

impl Q8Block {
    pub(crate) const LEN: usize = 32;

    /// The nearest block; `numbers` has [`Self::LEN`].
    pub(crate) fn encode(numbers: &[f32]) -> Self {
        let largest = numbers.iter().fold(0f32, |top, x| top.max(x.abs()));
        let scale = f16::from_f32(largest / 127.0);
        // by the scale that is kept, not the one before rounding: that halves the error of small blocks
        let inverse = match scale.to_f32() {
            0.0 => 0.0,
            scale => 1.0 / scale,
        };
        let mut values = [0; Self::LEN];
        for (value, x) in values.iter_mut().zip(numbers) {
            *value = (x * inverse).round().clamp(-127.0, 127.0) as i8;
        }
        Self { scale, values }
    }

    fn decode(&self, numbers: &mut [f32]) {
        let scale = self.scale.to_f32();
        for (x, value) in numbers.iter_mut().zip(&self.values) {
            *x = scale * f32::from(*value);
        }
    }
}

/// The numbers of a matrix, row after row.
#[derive(Debug)]
pub(crate) enum Numbers {
    F32(Vec<f32>),
    F16(Vec<f16>),
    Bf16(Vec<bf16>),
    Q8_0(Vec<Q8Block>),
}

/// A weight matrix, `[rows, width]`, in some number format. Copies share the numbers.
#[derive(Debug, Clone)]
pub struct Matrix {
    rows: usize,
    width: usize,
    numbers: Arc<Numbers>,
}

impl Matrix {
    /// A matrix whose rows `fill` gives: called once for each row, from several threads, with room for the row.
    /// `None` when a number does not fit the format.
    ///
    /// # Panics
    /// When a row is no whole number of the format's blocks.
    pub fn from_rows(
        format: Format,
        rows: usize,
        width: usize,
        fill: impl Fn(usize, &mut [f32]) + Sync,
    ) -> Option<Self> {
        /// Rows for a thread at a time, so that small rows do not cost a task each.
        const LEAST: usize = 16;
        fn encoded<T: Copy + Send>(
            empty: T,
            (rows, units, width): (usize, usize, usize),
            fill: impl Fn(usize, &mut [f32]) + Sync,
            encode: impl Fn(&[f32], &mut [T]) + Sync,
        ) -> Vec<T> {
            let mut all = vec![empty; rows * units];
            all.par_chunks_mut(units.max(1))
                .with_min_len(LEAST)
                .enumerate()
                .for_each_init(
                    || vec![0.0; width],
                    |row, (index, out)| {
                        fill(index, row);
                        encode(row, out);
                    },
                );
            all
        }
        let numbers = match format {
            Format::F32 => {
                let mut all = vec![0.0; rows * width];
                all.par_chunks_mut(width.max(1))
                    .with_min_len(LEAST)
                    .enumerate()
                    .for_each(|(index, row)| fill(index, row));
                Numbers::F32(all)
            }
            Format::F16 => {
                let narrow = |row: &[f32], out: &mut [f16]| {
                    out.iter_mut()
                        .zip(row)
                        .for_each(|(out, x)| *out = f16::from_f32(*x));
                };
                let all = encoded(f16::ZERO, (rows, width, width), fill, narrow);
                if all.par_iter().any(|x| x.is_infinite()) {
                    return None;
                }
                Numbers::F16(all)
            }
            Format::Bf16 => {
                let narrow = |row: &[f32], out: &mut [bf16]| {
                    out.iter_mut()
                        .zip(row)
                        .for_each(|(out, x)| *out = bf16::from_f32(*x));
                };
                Numbers::Bf16(encoded(bf16::ZERO, (rows, width, width), fill, narrow))
            }
            Format::Q8_0 => {
                assert!(
                    width.is_multiple_of(Q8Block::LEN),
                    "`format_of` leaves rows of {width} numbers to other formats"
                );
                let empty = Q8Block {
                    scale: f16::ZERO,
                    values: [0; Q8Block::LEN],
                };
                let blocks = |row: &[f32], out: &mut [Q8Block]| {
                    out.iter_mut()
                        .zip(row.chunks_exact(Q8Block::LEN))
                        .for_each(|(out, numbers)| *out = Q8Block::encode(numbers));
                };
                let shape = (rows, width / Q8Block::LEN, width);
                let all = encoded(empty, shape, fill, blocks);
                if all.par_iter().any(|block| block.scale.is_infinite()) {
                    return None;
                }
                Numbers::Q8_0(all)
            }
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
        }
    }

    /// Bytes its numbers hold.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        (self.rows * bytes(self.format(), self.width)) as u64
    }

    pub(crate) fn numbers(&self) -> &Numbers {
        &self.numbers
    }

    /// Row `index` in f32; `out` has [`Self::width`].
    pub fn decode_row(&self, index: usize, out: &mut [f32]) {
        let range = index * self.width..(index + 1) * self.width;
        match &*self.numbers {
            Numbers::F32(all) => out.copy_from_slice(&all[range]),
            Numbers::F16(all) => {
                out.iter_mut()
                    .zip(&all[range])
                    .for_each(|(out, x)| *out = x.to_f32());
            }
            Numbers::Bf16(all) => {
                out.iter_mut()
                    .zip(&all[range])
                    .for_each(|(out, x)| *out = x.to_f32());
            }
            Numbers::Q8_0(all) => {
                let blocks = range.start / Q8Block::LEN..range.end / Q8Block::LEN;
                for (block, out) in all[blocks].iter().zip(out.chunks_exact_mut(Q8Block::LEN)) {
                    block.decode(out);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::testing::numbers;

    fn held(format: Format, rows: usize, width: usize, values: &[f32]) -> Option<Matrix> {
        Matrix::from_rows(format, rows, width, |row, out| {
            out.copy_from_slice(&values[row * width..][..width]);
        })
    }

    #[test]
    fn every_format_keeps_numbers_as_well_as_it_can() {
        let (rows, width) = (35, 96);
        let values = numbers(1, rows * width);
        for (format, bound) in [
            (Format::F32, 0.0),
            (Format::F16, 1.0 / 2048.0),
            (Format::Bf16, 1.0 / 256.0),
            (Format::Q8_0, 1.1 * 0.5 / 127.0),
        ] {
            let matrix = held(format, rows, width, &values).expect("they fit");
            assert_eq!(matrix.format(), format);
            assert_eq!(matrix.bytes(), (rows * bytes(format, width)) as u64);
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
        assert_eq!("q8_0".parse(), Ok(Format::Q8_0));
        assert!("q2".parse::<Format>().is_err());
    }
}
