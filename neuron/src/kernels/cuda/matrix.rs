//! Weight matrices on a device, and what they are multiplied with.

use super::{BLOCK, DeviceRows, int, launch, long, step::Step};
use crate::gpu::{Address, Arg, Buffer, Factor, Gpu, GpuError, Product, Scratch};
use crate::quant::{self, Format, Rows, unit};
use std::ops::Range;
use std::sync::Arc;

/// A weight matrix, `[rows, width]`, row by row as files have it; of Q8_0 all values, and then all scales. Copies share the
/// numbers.
#[derive(Debug, Clone)]
pub struct DeviceMatrix {
    numbers: Arc<Buffer>,
    numerals: Numerals,
    rows: usize,
    width: usize,
}

/// What the numbers of a matrix are held as.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Numerals {
    /// As on the CPU.
    Of(Format),
    /// In 8 bits, four of them an exponent, and behind all of them the scales in f32 of blocks of 128 by 128.
    Fp8,
}

/// Bytes of a matrix on a device.
#[must_use]
pub(crate) fn bytes(format: Format, rows: usize, width: usize) -> usize {
    let (numbers, bytes) = unit(format);
    rows * (width / numbers * bytes)
}

impl DeviceMatrix {
    /// A matrix made of `rows` rows of `source`. `None` when a number does not fit the format. `taken` is told, in order,
    /// which rows are done and will not be asked for again.
    ///
    /// # Errors
    /// When the device has no room.
    pub fn from_rows(
        gpu: &Gpu,
        format: Format,
        (rows, width): (usize, usize),
        source: &(impl Rows + ?Sized),
        taken: impl Fn(Range<usize>),
    ) -> Result<Option<Self>, GpuError> {
        /// Bytes on their way to the device at once.
        const PIECE: usize = 1 << 25;
        let of_row = bytes(format, 1, width);
        let numbers = gpu.buffer(rows * of_row)?;
        let piece = (PIECE / of_row.max(1)).max(1);
        let mut first = 0;
        while first < rows {
            let own = first..rows.min(first + piece);
            let Some(encoded) = quant::encode_rows(format, own.clone(), width, source) else {
                return Ok(None);
            };
            let driver = gpu.driver();
            if format == Format::Q8_0 {
                let (values, scales) = apart(&encoded);
                let scales_at = rows * width + first * width / 32 * 2;
                driver.upload(numbers.address() + (first * width) as u64, &values)?;
                driver.upload(numbers.address() + scales_at as u64, &scales)?;
            } else {
                driver.upload(numbers.address() + (first * of_row) as u64, &encoded)?;
            }
            taken(own.clone());
            first = own.end;
        }
        Ok(Some(Self {
            numbers: Arc::new(numbers),
            numerals: Numerals::Of(format),
            rows,
            width,
        }))
    }

    /// A matrix of 8-bit numbers, of which files have `bytes`, and the `scales` of its blocks, row by row.
    ///
    /// # Errors
    /// When the device has no room.
    pub fn fp8(
        gpu: &Gpu,
        (rows, width): (usize, usize),
        bytes: &[u8],
        scales: &[f32],
    ) -> Result<Self, GpuError> {
        let numbers = gpu.buffer(bytes.len() + 4 * scales.len())?;
        let driver = gpu.driver();
        driver.upload(numbers.address(), bytes)?;
        let behind = numbers.address() + bytes.len() as u64;
        driver.upload(behind, bytemuck::cast_slice(scales))?;
        Ok(Self {
            numbers: Arc::new(numbers),
            numerals: Numerals::Fp8,
            rows,
            width,
        })
    }

    /// Its rows.
    #[must_use]
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Numbers in a row.
    #[must_use]
    pub fn width(&self) -> usize {
        self.width
    }

    /// The format of its numbers; of 8-bit ones with scales the one they would have on the CPU.
    #[must_use]
    pub fn format(&self) -> Format {
        match self.numerals {
            Numerals::Of(format) => format,
            Numerals::Fp8 => Format::Bf16,
        }
    }

    /// Bytes it holds.
    #[must_use]
    pub(crate) fn bytes(&self) -> u64 {
        self.numbers.bytes() as u64
    }

    /// Where its numbers are.
    pub(super) fn address(&self) -> Address {
        self.numbers.address()
    }

    /// What its numbers are held as.
    pub(super) fn numerals(&self) -> Numerals {
        self.numerals
    }

    fn arg(&self) -> Arg {
        Arg::Address(self.numbers.address())
    }

    /// The rows of the step's tokens, the first row being that of token `first`; zeros where a token has none here.
    pub(crate) fn embed(&self, step: &Step, first: usize) -> Result<DeviceRows, GpuError> {
        let gpu = step.gpu();
        let y = DeviceRows::new(gpu, step.shape.rows, self.width)?;
        let args = [
            step.ids(),
            self.arg(),
            y.arg(),
            int(self.width),
            int(first),
            int(self.rows),
        ];
        let kernel = match self.numerals {
            Numerals::Fp8 => "embed_fp8",
            Numerals::Of(Format::F32) => "embed_f32",
            Numerals::Of(Format::F16) => "embed_f16",
            Numerals::Of(Format::Bf16) => "embed_bf16",
            Numerals::Of(Format::Q8_0) => "embed_q8_0",
            Numerals::Of(Format::Q6K) => "embed_q6_k",
            Numerals::Of(Format::Q5K) => "embed_q5_k",
            Numerals::Of(Format::Q4K) => "embed_q4_k",
        };
        launch(gpu, kernel, [step.shape.rows, 1, 1], BLOCK, &args)?;
        Ok(y)
    }

    /// The most rows that are multiplied with the weights as they are. A matrix that would take much memory when it is widened, as
    /// a head is, is spared that for as many rows as answers and scores of prompts want at once.
    fn most_rows(&self) -> usize {
        const MUCH: usize = 256 << 20;
        const SPARED: usize = 64;
        let as_it_is = matches!(self.numerals, Numerals::Of(Format::F32 | Format::Bf16));
        if !as_it_is && 2 * self.rows * self.width > MUCH {
            SPARED
        } else {
            MOST_ROWS
        }
    }

    /// The matrix in bf16, in the workspace.
    fn widened(&self, gpu: &Gpu) -> Result<Scratch, GpuError> {
        let wide = gpu.scratch(2 * self.rows * self.width)?;
        let kernel = match self.numerals {
            Numerals::Fp8 => "widen_fp8",
            Numerals::Of(Format::F16) => "widen_f16",
            Numerals::Of(Format::Q8_0) => "widen_q8_0",
            Numerals::Of(Format::Q6K) => "widen_q6_k",
            Numerals::Of(Format::Q5K) => "widen_q5_k",
            Numerals::Of(Format::Q4K) => "widen_q4_k",
            Numerals::Of(Format::F32 | Format::Bf16) => {
                unreachable!("these are multiplied as they are")
            }
        };
        let to = Arg::Address(wide.address());
        let args = [self.arg(), to, int(self.rows), int(self.width)];
        launch(gpu, kernel, [self.rows, 1, 1], BLOCK, &args)?;
        Ok(wide)
    }
}

/// The values and the scales of Q8_0 blocks.
fn apart(blocks: &[u8]) -> (Vec<u8>, Vec<u8>) {
    let (_, bytes) = unit(Format::Q8_0);
    let mut values = Vec::with_capacity(blocks.len());
    let mut scales = Vec::with_capacity(blocks.len() / bytes * 2);
    for block in blocks.chunks_exact(bytes) {
        scales.extend_from_slice(&block[..2]);
        values.extend_from_slice(&block[2..]);
    }
    (values, scales)
}

/// The most rows that go through one kernel with the weights as they are. The weights are read once for each 8 of them;
/// with more, products of whole matrices are faster.
const MOST_ROWS: usize = 16;

/// `x · Wᵀ` for several weights.
pub(crate) fn together<const N: usize>(
    x: &DeviceRows,
    weights: [&DeviceMatrix; N],
) -> Result<[DeviceRows; N], GpuError> {
    let mut narrow = None; // x in bf16, made once
    let mut products = Vec::with_capacity(N);
    for weight in weights {
        products.push(linear(x, weight, &mut narrow)?);
    }
    Ok(products.try_into().expect("a product for each weight"))
}

fn linear(
    x: &DeviceRows,
    weight: &DeviceMatrix,
    narrow: &mut Option<Scratch>,
) -> Result<DeviceRows, GpuError> {
    assert_eq!(x.width(), weight.width, "a row meets weights of its width");
    let gpu = x.gpu();
    let y = DeviceRows::new(gpu, x.count(), weight.rows)?;
    if x.count() <= weight.most_rows() {
        few_rows(x, weight, &y)?;
        return Ok(y);
    }
    let product = |factor, a, b| Product {
        factor,
        a,
        b,
        c: y.address(),
        m: x.count(),
        n: weight.rows,
        k: weight.width,
    };
    if weight.numerals == Numerals::Of(Format::F32) {
        let product = product(Factor::F32, x.address(), weight.numbers.address());
        gpu.driver().multiply(&product)?;
        return Ok(y);
    }
    if narrow.is_none() {
        *narrow = Some(to_bf16(x)?);
    }
    let x_at: Address = narrow.as_ref().expect("just made").address();
    let wide = match weight.numerals {
        Numerals::Of(Format::Bf16) => None,
        _ => Some(weight.widened(gpu)?),
    };
    let weights_at = wide
        .as_ref()
        .map_or(weight.numbers.address(), Scratch::address);
    gpu.driver()
        .multiply(&product(Factor::Bf16, x_at, weights_at))?;
    Ok(y)
}

fn to_bf16(x: &DeviceRows) -> Result<Scratch, GpuError> {
    let count = x.count() * x.width();
    let narrow = x.gpu().scratch(2 * count)?;
    let args = [x.arg(), Arg::Address(narrow.address()), long(count)];
    let grid = [count.div_ceil(BLOCK as usize), 1, 1];
    launch(x.gpu(), "to_bf16", grid, BLOCK, &args)?;
    Ok(narrow)
}

/// The kernels for 1, 2, 4 and 8 rows.
macro_rules! by_rows {
    ($rows:expr, $name:literal) => {
        match $rows {
            1 => concat!("gemv_", $name, "_1"),
            2 => concat!("gemv_", $name, "_2"),
            4 => concat!("gemv_", $name, "_4"),
            _ => concat!("gemv_", $name, "_8"),
        }
    };
}

/// The kernel that multiplies `rows` rows with weights as they are.
pub(super) fn gemv(numerals: Numerals, rows: usize) -> &'static str {
    match numerals {
        Numerals::Fp8 => by_rows!(rows, "fp8"),
        Numerals::Of(Format::F32) => by_rows!(rows, "f32"),
        Numerals::Of(Format::F16) => by_rows!(rows, "f16"),
        Numerals::Of(Format::Bf16) => by_rows!(rows, "bf16"),
        Numerals::Of(Format::Q8_0) => by_rows!(rows, "q8_0"),
        Numerals::Of(Format::Q6K) => by_rows!(rows, "q6_k"),
        Numerals::Of(Format::Q5K) => by_rows!(rows, "q5_k"),
        Numerals::Of(Format::Q4K) => by_rows!(rows, "q4_k"),
    }
}

/// Numbers of rows whose kernels also multiply with matrices that the device chooses.
const CHOOSING: [usize; 2] = [1, 4];

/// What a kernel is told where the device chooses nothing.
const NOT_CHOSEN: [Arg; 5] = [
    Arg::Address(0),
    Arg::Address(0),
    Arg::Int(0),
    Arg::Int(0),
    Arg::Int(0),
];

/// Blocks for weights of `n` rows, of which there are `beside` at once: warps of a block take two rows each, or share them where
/// there would be too few blocks to fill the device. A single row of x is cheapest to bring in where blocks go on to further rows.
pub(super) fn blocks(n: usize, rows: usize, beside: usize, gpu: &Gpu) -> usize {
    const OF_BLOCK: usize = 16;
    let busy = (4 * gpu.driver().processors() as usize).div_ceil(beside);
    match n.div_ceil(OF_BLOCK) {
        few if few < busy => few.max(n.div_ceil(2).min(busy)),
        _ if rows == 1 => busy,
        many => many,
    }
}

/// Products with the weights as they are.
fn few_rows(x: &DeviceRows, weight: &DeviceMatrix, y: &DeviceRows) -> Result<(), GpuError> {
    let mut first = 0;
    while first < x.count() {
        let left = x.count() - first;
        let rows = [8, 4, 2, 1]
            .into_iter()
            .find(|rows| *rows <= left)
            .expect("there is a row left");
        let mut args = vec![
            weight.arg(),
            Arg::Address(x.row(first)),
            Arg::Address(y.row(first)),
            int(weight.rows),
            int(weight.width),
        ];
        if CHOOSING.contains(&rows) {
            args.extend(NOT_CHOSEN);
        }
        let grid = [blocks(weight.rows, rows, 1, x.gpu()), 1, 1];
        launch(x.gpu(), gemv(weight.numerals, rows), grid, BLOCK, &args)?;
        first += rows;
    }
    Ok(())
}
