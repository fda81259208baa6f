//! Every kernel against a plain reference in f64: on the emulator in tests, and on a device by `neuron selftest`.

#![allow(clippy::unwrap_used)] // a broken expectation is a failed check

mod attention;
mod choose;
mod experts;
mod matrix;

use crate::gpu::{Address, Arg, Buffer, Gpu, Launch};
use crate::kernels::testing::numbers;
use std::cell::RefCell;

/// A check: it panics where a kernel is wrong.
pub(crate) type Check = fn(&Device);

/// Every check with its name.
pub(crate) const ALL: &[(&str, Check)] = &[
    ("norms of rows", norms_of_rows),
    ("norms of heads", norms_of_heads),
    ("sums and gates of rows", sums_and_gates_of_rows),
    (
        "rows are gathered and scattered",
        rows_are_gathered_and_scattered,
    ),
    (
        "tokens are those of the host",
        choose::tokens_are_those_of_the_host,
    ),
    (
        "a convolution goes on over every split of the rows",
        a_convolution_goes_on_over_every_split_of_the_rows,
    ),
    (
        "the delta rule goes on over every split of the rows",
        the_delta_rule_goes_on_over_every_split_of_the_rows,
    ),
    (
        "chunks of the delta rule meet its scan",
        chunks_of_the_delta_rule_meet_its_scan,
    ),
    ("products with few rows", matrix::products_with_few_rows),
    (
        "products with chosen matrices",
        matrix::products_with_chosen_matrices,
    ),
    (
        "rows go to their likeliest experts",
        experts::rows_go_to_their_likeliest_experts,
    ),
    (
        "what is no number goes to experts that are there",
        experts::what_is_no_number_goes_to_experts_that_are_there,
    ),
    (
        "answers of experts are summed",
        experts::answers_of_experts_are_summed,
    ),
    (
        "rows of a part of the vocabulary",
        matrix::rows_of_a_part_of_the_vocabulary,
    ),
    (
        "whole matrices and rows as bf16",
        matrix::whole_matrices_and_rows_as_bf16,
    ),
    ("attention over f32", attention::attention_over_f32),
    ("attention over bf16", attention::attention_over_bf16),
];

/// Runs a check on `gpu`.
///
/// # Panics
/// With what is wrong, when a kernel is.
pub(crate) fn run(check: Check, gpu: &Gpu) {
    check(&Device::new(gpu));
}

/// A device, and short words for what tests do with it.
pub(crate) struct Device {
    gpu: Gpu,
    /// All that was put on it.
    held: RefCell<Vec<Buffer>>,
}

impl Device {
    fn new(gpu: &Gpu) -> Self {
        Self {
            gpu: gpu.clone(),
            held: RefCell::default(),
        }
    }

    fn keep(&self, buffer: Buffer) -> Address {
        let address = buffer.address();
        self.held.borrow_mut().push(buffer);
        address
    }

    pub(super) fn put<T: bytemuck::NoUninit>(&self, values: &[T]) -> Address {
        self.keep(self.gpu.buffer_of(values).expect("there is room"))
    }

    /// Room for `count` f32 that nobody has written.
    pub(super) fn room(&self, count: usize) -> Address {
        self.keep(self.gpu.buffer(4 * count).expect("there is room"))
    }

    pub(super) fn get<T: bytemuck::Pod>(&self, from: Address, count: usize) -> Vec<T> {
        let mut values = vec![T::zeroed(); count];
        self.gpu
            .driver()
            .download(from, bytemuck::cast_slice_mut(&mut values))
            .expect("it was allocated");
        values
    }

    pub(super) fn run(&self, kernel: &'static str, grid: [usize; 3], block: u32, args: &[Arg]) {
        self.run_shared(kernel, grid, block, 0, args);
    }

    pub(super) fn run_shared(
        &self,
        kernel: &'static str,
        grid: [usize; 3],
        block: u32,
        shared: u32,
        args: &[Arg],
    ) {
        self.gpu
            .driver()
            .launch(&Launch {
                kernel,
                grid: grid.map(|blocks| blocks as u32),
                block,
                shared,
                args,
            })
            .expect("the kernel takes this");
    }
}

/// Largest difference between numbers and what they should be; what is not a number is far off.
pub(super) fn worst(found: &[f32], expected: &[f64]) -> f64 {
    assert_eq!(found.len(), expected.len(), "as many numbers as expected");
    let differences = found.iter().zip(expected);
    differences
        .map(|(x, y)| (f64::from(*x) - y).abs())
        .fold(0.0, |worst, difference| {
            if difference <= worst {
                worst
            } else if difference.is_nan() {
                f64::INFINITY
            } else {
                difference
            }
        })
}

pub(super) fn wide(x: &[f32]) -> Vec<f64> {
    x.iter().map(|x| f64::from(*x)).collect()
}

fn silu(x: f64) -> f64 {
    x / (1.0 + (-x).exp())
}

/// `x / sqrt(mean(x²) + eps)`.
fn normalised(x: &[f64], eps: f64) -> Vec<f64> {
    let mean = x.iter().map(|x| x * x).sum::<f64>() / x.len() as f64;
    x.iter().map(|x| x / (mean + eps).sqrt()).collect()
}

const EPS: f32 = 1e-6;

fn norms_of_rows(device: &Device) {
    // narrower than a block, no multiple of it, and wider than what its threads hold
    for (width, block) in [(24, 32), (70, 64), (1000, 1024), (2050, 96), (1200, 64)] {
        let rows = 3;
        let (x, scale) = (numbers(1, rows * width), numbers(2, width));
        let before = numbers(3, rows * width);
        let (hidden, y) = (device.put(&before), device.room(rows * width));
        let (at, scales) = (device.put(&x), device.put(&scale));
        let norm = |rows: &[f64]| -> Vec<f64> {
            rows.chunks_exact(width)
                .flat_map(|row| {
                    let row = normalised(row, f64::from(EPS));
                    row.into_iter()
                        .zip(&scale)
                        .map(|(x, scale)| x * f64::from(*scale))
                })
                .collect()
        };
        let size = [Arg::Int(width as i32), Arg::Float(EPS)];
        let mut args = vec![Arg::Address(at), Arg::Address(scales), Arg::Address(y)];
        args.extend(size);
        device.run("rms_norm", [rows, 1, 1], block, &args);
        let found = device.get(y, rows * width);
        assert!(worst(&found, &norm(&wide(&x))) < 1e-5, "{width}");

        args.insert(0, Arg::Address(hidden));
        device.run("add_rms_norm", [rows, 1, 1], block, &args);
        let sum: Vec<f64> = wide(&x)
            .iter()
            .zip(wide(&before))
            .map(|(x, h)| x + h)
            .collect();
        let found = device.get(hidden, rows * width);
        assert!(worst(&found, &sum) < 1e-6, "{width}");
        let found = device.get(y, rows * width);
        assert!(worst(&found, &norm(&sum)) < 1e-5, "{width}");
    }
}

fn norms_of_heads(device: &Device) {
    for (width, block) in [(24, 32), (70, 64), (128, 128)] {
        let rows = 5;
        let (x, gate) = (numbers(1, rows * width), numbers(2, rows * width));
        let weight = numbers(3, width);
        let [at, gates, weights] = [&x, &gate, &weight].map(|values| device.put(values));
        device.run(
            "gated_rms_norm",
            [rows, 1, 1],
            block,
            &[
                Arg::Address(at),
                Arg::Address(gates),
                Arg::Address(weights),
                Arg::Int(width as i32),
                Arg::Float(EPS),
            ],
        );
        let expected: Vec<f64> = wide(&x)
            .chunks_exact(width)
            .flat_map(|row| normalised(row, f64::from(EPS)))
            .zip(wide(&gate))
            .enumerate()
            .map(|(at, (x, gate))| x * f64::from(weight[at % width]) * silu(gate))
            .collect();
        assert!(worst(&device.get(at, x.len()), &expected) < 1e-5, "{width}");
    }
    for (key_dim, key_heads) in [(16, 3), (48, 1), (128, 2)] {
        let (rows, channels) = (4, 2 * key_heads * key_dim + 7);
        let qkv = numbers(4, rows * channels);
        let at = device.put(&qkv);
        device.run(
            "l2_norm_heads",
            [rows, 2 * key_heads, 1],
            32,
            &[
                Arg::Address(at),
                Arg::Int(channels as i32),
                Arg::Int(key_heads as i32),
                Arg::Int(key_dim as i32),
            ],
        );
        let expected = unit_heads(&qkv, channels, key_heads, key_dim);
        let found: Vec<f32> = device.get(at, qkv.len());
        assert!(worst(&found, &expected) < 1e-6, "{key_dim}");
        for (found, given) in found.chunks_exact(channels).zip(qkv.chunks_exact(channels)) {
            let values = 2 * key_heads * key_dim;
            assert_eq!(found[values..], given[values..], "values stay");
        }
    }
}

/// Rows of `[q | k | v]` with queries and keys of length one, queries divided by the root of their width besides.
fn unit_heads(qkv: &[f32], channels: usize, key_heads: usize, key_dim: usize) -> Vec<f64> {
    let mut rows = wide(qkv);
    for row in rows.chunks_exact_mut(channels) {
        let heads = row.chunks_exact_mut(key_dim).take(2 * key_heads);
        for (head, x) in heads.enumerate() {
            let mut length = (x.iter().map(|x| x * x).sum::<f64>() + 1e-6).sqrt();
            if head < key_heads {
                length *= (key_dim as f64).sqrt();
            }
            x.iter_mut().for_each(|x| *x /= length);
        }
    }
    rows
}

pub(super) fn sums_and_gates_of_rows(device: &Device) {
    let (rows, width) = (5, 77);
    let (x, y) = (numbers(1, rows * width), numbers(2, rows * width));
    let count = Arg::Long((rows * width) as i64);
    let of_two = |kernel, expected: &dyn Fn(f64, f64) -> f64| {
        let [a, b] = [&x, &y].map(|values| device.put(values));
        let c = device.room(rows * width);
        let (found, args) = match kernel {
            "add" => (a, vec![Arg::Address(a), Arg::Address(b), count]),
            _ => (
                c,
                vec![Arg::Address(a), Arg::Address(b), Arg::Address(c), count],
            ),
        };
        device.run(kernel, [(rows * width).div_ceil(64), 1, 1], 64, &args);
        let expected: Vec<f64> = wide(&x)
            .into_iter()
            .zip(wide(&y))
            .map(|(x, y)| expected(x, y))
            .collect();
        let found = worst(&device.get(found, rows * width), &expected);
        assert!(found < 1e-6, "{kernel}: {found}");
    };
    of_two("add", &|x, y| x + y);
    of_two("swiglu", &|x, y| silu(x) * y);

    let gates = numbers(3, rows);
    let [at, factors] = [&x, &gates].map(|values| device.put(values));
    device.run(
        "scale_by_sigmoid",
        [rows, 1, 1],
        32,
        &[
            Arg::Address(at),
            Arg::Address(factors),
            Arg::Int(width as i32),
        ],
    );
    let expected: Vec<f64> = wide(&x)
        .into_iter()
        .enumerate()
        .map(|(at, x)| x / (1.0 + (-f64::from(gates[at / width])).exp()))
        .collect();
    assert!(worst(&device.get(at, rows * width), &expected) < 1e-6);
}

pub(super) fn rows_are_gathered_and_scattered(device: &Device) {
    let (rows, width) = (6, 45);
    let x = numbers(1, rows * width);
    let index = [4, 0, 5, 4_i32];
    let (at, indices) = (device.put(&x), device.put(&index));
    let y = device.room(index.len() * width);
    let size = Arg::Int(width as i32);
    device.run(
        "gather_rows",
        [index.len(), 1, 1],
        64,
        &[
            Arg::Address(at),
            Arg::Address(indices),
            Arg::Address(y),
            size,
        ],
    );
    let found: Vec<f32> = device.get(y, index.len() * width);
    for (found, row) in found.chunks_exact(width).zip(index) {
        assert_eq!(*found, x[row as usize * width..][..width]);
    }

    let (index, weights) = ([3, 0, 5_i32], [0.5, -2.0, 1.5_f32]);
    let added = numbers(2, index.len() * width);
    let sum = device.put(&x);
    let args = [
        sum,
        device.put(&added),
        device.put(&index),
        device.put(&weights),
    ];
    let mut args = args.map(Arg::Address).to_vec();
    args.push(size);
    device.run("scatter_add", [index.len(), 1, 1], 32, &args);
    let mut expected = wide(&x);
    for (i, row) in index.into_iter().enumerate() {
        for c in 0..width {
            expected[row as usize * width + c] +=
                f64::from(weights[i]) * f64::from(added[i * width + c]);
        }
    }
    assert!(worst(&device.get(sum, rows * width), &expected) < 1e-6);
}

/// A sequence whose rows come in steps.
struct Sequence {
    slot: Address,
    /// Of the next step; 0 for none.
    trail: Address,
}

/// Tables of a step: addresses of the slots and trails, and where the segments start.
fn tables(device: &Device, sequences: &[Sequence], rows: &[usize]) -> [Address; 3] {
    let slots: Vec<u64> = sequences.iter().map(|sequence| sequence.slot).collect();
    let trails: Vec<u64> = sequences.iter().map(|sequence| sequence.trail).collect();
    let mut starts = vec![0_i32];
    for rows in rows {
        starts.push(starts[starts.len() - 1] + *rows as i32);
    }
    [device.put(&slots), device.put(&starts), device.put(&trails)]
}

/// Rows `done..` of each sequence, as many as the step takes, one sequence after another.
fn of_step(whole: &[Vec<f32>], width: usize, done: &[usize], rows: &[usize]) -> Vec<f32> {
    let parts = whole.iter().zip(done.iter().zip(rows));
    parts
        .flat_map(|(whole, (done, rows))| &whole[done * width..(done + rows) * width])
        .copied()
        .collect()
}

pub(super) fn a_convolution_goes_on_over_every_split_of_the_rows(device: &Device) {
    const OFFSET: usize = 3;
    for (channels, taps) in [(37, 4), (64, 2), (5, 8)] {
        let past = taps - 1;
        let weight = numbers(9, taps * channels);
        let weights = device.put(&weight);
        let lengths = [11, 1, 6];
        let inputs: Vec<Vec<f32>> = (0..3)
            .map(|s| numbers(s, lengths[s as usize] * channels))
            .collect();
        let tails: Vec<Vec<f32>> = (0..3).map(|s| numbers(20 + s, past * channels)).collect();
        // tail and inputs, as a trail has them
        let all: Vec<Vec<f32>> = (0..3)
            .map(|s| [tails[s].clone(), inputs[s].clone()].concat())
            .collect();
        for piece in 1..=11 {
            let mut sequences: Vec<Sequence> = tails
                .iter()
                .map(|tail| Sequence {
                    slot: device.put(&[&[5.0; OFFSET][..], tail, &[6.0]].concat()),
                    trail: 0,
                })
                .collect();
            let mut done = [0; 3];
            while done != lengths {
                let rows: Vec<usize> = (0..3).map(|s| piece.min(lengths[s] - done[s])).collect();
                let total: usize = rows.iter().sum();
                for (sequence, rows) in sequences.iter_mut().zip(&rows).skip(1) {
                    sequence.trail = device.room(OFFSET + (past + rows) * channels);
                }
                let [slots, starts, trails] = tables(device, &sequences, &rows);
                let given = device.put(&of_step(&inputs, channels, &done, &rows));
                let outputs = device.room(total * channels);
                let chunk = past.max(4);
                device.run(
                    "causal_conv",
                    [channels.div_ceil(32), piece.div_ceil(chunk), 3],
                    32,
                    &[
                        Arg::Address(given),
                        Arg::Address(weights),
                        Arg::Address(outputs),
                        Arg::Address(slots),
                        Arg::Long(OFFSET as i64),
                        Arg::Address(starts),
                        Arg::Address(trails),
                        Arg::Long(OFFSET as i64),
                        Arg::Int(channels as i32),
                        Arg::Int(taps as i32),
                        Arg::Int(chunk as i32),
                    ],
                );
                let mut expected = Vec::new();
                for s in 0..3 {
                    for row in done[s]..done[s] + rows[s] {
                        for c in 0..channels {
                            let product = |j| {
                                f64::from(weight[j * channels + c])
                                    * f64::from(all[s][(row + j) * channels + c])
                            };
                            expected.push(silu((0..taps).map(product).sum()));
                        }
                    }
                    if rows[s] > 0 && sequences[s].trail != 0 {
                        let count = (past + rows[s]) * channels;
                        let found: Vec<f32> = device.get(sequences[s].trail, OFFSET + count);
                        assert_eq!(found[OFFSET..], all[s][done[s] * channels..][..count]);
                    }
                    done[s] += rows[s];
                    let found: Vec<f32> =
                        device.get(sequences[s].slot, OFFSET + past * channels + 1);
                    assert_eq!(found[..OFFSET], [5.0; OFFSET]);
                    assert_eq!(found[OFFSET + past * channels], 6.0);
                    let tail = &found[OFFSET..][..past * channels];
                    assert_eq!(*tail, all[s][done[s] * channels..][..past * channels]);
                }
                let found = worst(&device.get(outputs, total * channels), &expected);
                assert!(
                    found < 1e-6,
                    "{channels} channels, pieces of {piece}: {found}"
                );
            }
        }
    }
}

/// Sizes of a layer.
#[derive(Debug, Clone, Copy)]
struct Heads {
    key: usize,
    value: usize,
    key_dim: usize,
    value_dim: usize,
}

impl Heads {
    fn channels(&self) -> usize {
        2 * self.key * self.key_dim + self.value * self.value_dim
    }

    /// Numbers of a state.
    fn state(&self) -> usize {
        self.value * self.key_dim * self.value_dim
    }
}

/// What a layer has of its own.
struct Layer {
    heads: Heads,
    rate: Vec<f32>,
    dt_bias: Vec<f32>,
}

/// Rows of one sequence, queries and keys normalised.
struct Rows {
    qkv: Vec<f32>,
    a: Vec<f32>,
    b: Vec<f32>,
}

impl Layer {
    fn new(heads: Heads) -> Self {
        Self {
            heads,
            rate: numbers(5, heads.value).iter().map(|x| x.exp()).collect(),
            // one above what softplus passes through
            dt_bias: (0..heads.value).map(|h| h as f32 * 6.0 - 4.0).collect(),
        }
    }

    fn rows(&self, seed: u64, rows: usize) -> Rows {
        let heads = self.heads;
        let raw = numbers(seed, rows * heads.channels());
        let unit = unit_heads(&raw, heads.channels(), heads.key, heads.key_dim);
        Rows {
            qkv: unit.iter().map(|x| *x as f32).collect(),
            a: numbers(seed + 1, rows * heads.value),
            b: numbers(seed + 2, rows * heads.value),
        }
    }

    /// The scan in f64 as the formulas stand, on `state`: `o`, and the state after each row.
    fn scan(&self, rows: &Rows, state: &mut [f64]) -> (Vec<f64>, Vec<Vec<f64>>) {
        let Heads {
            key,
            value,
            key_dim,
            value_dim,
        } = self.heads;
        let (mut out, mut states) = (Vec::new(), Vec::new());
        for (t, row) in rows.qkv.chunks_exact(self.heads.channels()).enumerate() {
            let row = wide(row);
            for h in 0..value {
                let key_head = h / (value / key);
                let q = &row[key_head * key_dim..][..key_dim];
                let k = &row[(key + key_head) * key_dim..][..key_dim];
                let v = &row[2 * key * key_dim + h * value_dim..][..value_dim];
                let s = &mut state[h * key_dim * value_dim..][..key_dim * value_dim];
                let x = f64::from(rows.a[t * value + h]) + f64::from(self.dt_bias[h]);
                let kept = (-f64::from(self.rate[h]) * x.exp().ln_1p()).exp();
                let beta = 1.0 / (1.0 + (-f64::from(rows.b[t * value + h])).exp());
                s.iter_mut().for_each(|s| *s *= kept);
                for j in 0..value_dim {
                    let held: f64 = (0..key_dim).map(|i| s[i * value_dim + j] * k[i]).sum();
                    for i in 0..key_dim {
                        s[i * value_dim + j] += k[i] * beta * (v[j] - held);
                    }
                    out.push((0..key_dim).map(|i| s[i * value_dim + j] * q[i]).sum());
                }
            }
            states.push(state.to_vec());
        }
        (out, states)
    }
}

pub(super) fn the_delta_rule_goes_on_over_every_split_of_the_rows(device: &Device) {
    const TAIL: usize = 10;
    let shapes = [
        // (key heads, value heads, key dim, value dim, offset): columns that fill no block, or no lane, or two blocks
        ("delta_rule_16", 1, 3, 16, 24, 2),
        ("delta_rule_32", 2, 4, 32, 7, 0),
        ("delta_rule_64", 1, 2, 64, 40, 6),
        ("delta_rule_128", 2, 2, 128, 32, 2),
    ];
    for (kernel, key, value, key_dim, value_dim, offset) in shapes {
        let layer = Layer::new(Heads {
            key,
            value,
            key_dim,
            value_dim,
        });
        let (heads, size) = (layer.heads, layer.heads.state());
        let lengths = [7, 1, 4];
        let sequences: Vec<Rows> = (0..3)
            .map(|s| layer.rows(10 * s + 30, lengths[s as usize]))
            .collect();
        let initial: Vec<Vec<f32>> = (0..3).map(|s| numbers(70 + s, size)).collect();
        let expected: Vec<(Vec<f64>, Vec<Vec<f64>>)> = sequences
            .iter()
            .zip(&initial)
            .map(|(rows, state)| layer.scan(rows, &mut wide(state)))
            .collect();
        let [rates, biases] = [&layer.rate, &layer.dt_bias].map(|values| device.put(values));
        let part = |of: fn(&Rows) -> &Vec<f32>, width, done: &[usize], rows: &[usize]| {
            let whole: Vec<Vec<f32>> = sequences.iter().map(|rows| of(rows).clone()).collect();
            device.put(&of_step(&whole, width, done, rows))
        };
        for piece in 1..=7 {
            let mut slots: Vec<Sequence> = initial
                .iter()
                .map(|state| Sequence {
                    slot: device.put(&[&vec![5.0; offset + TAIL], &state[..], &[6.0]].concat()),
                    trail: 0,
                })
                .collect();
            let mut done = [0; 3];
            while done != lengths {
                let rows: Vec<usize> = (0..3).map(|s| piece.min(lengths[s] - done[s])).collect();
                let total: usize = rows.iter().sum();
                let before = |rows: usize| TAIL + rows * heads.channels();
                for (sequence, rows) in slots.iter_mut().zip(&rows).step_by(2) {
                    let kept = rows.saturating_sub(1) * size;
                    sequence.trail = device.room(offset + before(*rows) + kept);
                }
                let [addresses, starts, trails] = tables(device, &slots, &rows);
                let out = device.room(total * value * value_dim);
                let numbers = [key, value, value_dim, TAIL].map(|x| Arg::Int(x as i32));
                let mut args = vec![
                    Arg::Address(part(|rows| &rows.qkv, heads.channels(), &done, &rows)),
                    Arg::Address(part(|rows| &rows.b, value, &done, &rows)),
                    Arg::Address(part(|rows| &rows.a, value, &done, &rows)),
                    Arg::Address(rates),
                    Arg::Address(biases),
                    Arg::Address(out),
                    Arg::Address(addresses),
                    Arg::Long(offset as i64),
                    Arg::Address(starts),
                    Arg::Address(trails),
                    Arg::Long(offset as i64),
                    Arg::Int(heads.channels() as i32),
                ];
                args.extend(numbers);
                device.run(kernel, [value_dim.div_ceil(32), value, 3], 128, &args);
                let mut read = Vec::new();
                for s in 0..3 {
                    let width = value * value_dim;
                    let (out, states) = &expected[s];
                    read.extend(&out[done[s] * width..][..rows[s] * width]);
                    if rows[s] > 1 && slots[s].trail != 0 {
                        let kept = (rows[s] - 1) * size;
                        let at = offset + before(rows[s]);
                        let found: Vec<f32> = device.get(slots[s].trail, at + kept);
                        let states = states[done[s]..][..rows[s] - 1].concat();
                        let found = worst(&found[at..], &states);
                        assert!(found < 1e-5, "{heads:?}, pieces of {piece}, trail: {found}");
                    }
                    done[s] += rows[s];
                    let found: Vec<f32> = device.get(slots[s].slot, offset + TAIL + size + 1);
                    assert_eq!(found[..offset + TAIL], vec![5.0; offset + TAIL]);
                    assert_eq!(found[offset + TAIL + size], 6.0);
                    let found = worst(&found[offset + TAIL..][..size], &states[done[s] - 1]);
                    assert!(found < 1e-5, "{heads:?}, pieces of {piece}, state: {found}");
                }
                let found = worst(&device.get(out, total * value * value_dim), &read);
                assert!(found < 1e-5, "{heads:?}, pieces of {piece}: {found}");
            }
        }
    }
}

pub(super) fn chunks_of_the_delta_rule_meet_its_scan(device: &Device) {
    const TAIL: usize = 12;
    const OFFSET: usize = 4;
    const CHUNK: usize = 64;
    const RECORD: usize = 147_712;
    const MOST: f64 = 2e-5;
    let layer = Layer {
        // one head that forgets within some rows, one within hundreds
        rate: vec![0.4, 0.004],
        dt_bias: vec![-0.5, 0.3],
        heads: Heads {
            key: 1,
            value: 2,
            key_dim: 128,
            value_dim: 128,
        },
    };
    let (heads, size) = (layer.heads, layer.heads.state());
    let lengths = [147, 64, 1, 79];
    let mut sequences: Vec<Rows> = (0..4)
        .map(|s| layer.rows(10 * s + 30, lengths[s as usize]))
        .collect();
    // keys that are much alike, as those of a model are
    for row in sequences[0].qkv.chunks_exact_mut(heads.channels()) {
        row[128..256].iter_mut().for_each(|x| *x += 0.1);
        let length = row[128..256].iter().map(|x| x * x).sum::<f32>().sqrt();
        row[128..256].iter_mut().for_each(|x| *x /= length);
    }
    let initial: Vec<Vec<f32>> = (0..4).map(|s| numbers(70 + s, size)).collect();
    let expected: Vec<(Vec<f64>, Vec<Vec<f64>>)> = sequences
        .iter()
        .zip(&initial)
        .map(|(rows, state)| layer.scan(rows, &mut wide(state)))
        .collect();
    let [rates, biases] = [&layer.rate, &layer.dt_bias].map(|values| device.put(values));
    let scale = |x: &[f64]| x.iter().fold(0.0, |most: f64, x| most.max(x.abs()));
    for (piece, block) in [(147, 128), (64, 256), (50, 256), (97, 128)] {
        let slots: Vec<Sequence> = initial
            .iter()
            .map(|state| Sequence {
                slot: device.put(&[&[5.0; OFFSET + TAIL], &state[..], &[6.0]].concat()),
                trail: 0,
            })
            .collect();
        let mut done = [0; 4];
        while done != lengths {
            let rows: Vec<usize> = (0..4).map(|s| piece.min(lengths[s] - done[s])).collect();
            let total: usize = rows.iter().sum();
            let part = |of: fn(&Rows) -> &Vec<f32>, width| {
                let whole: Vec<Vec<f32>> = sequences.iter().map(|rows| of(rows).clone()).collect();
                device.put(&of_step(&whole, width, &done, &rows))
            };
            let [addresses, starts, _] = tables(device, &slots, &rows);
            let records = heads.value * (total / CHUNK + 4);
            let scratch = device.room(records * RECORD / 4);
            let out = device.room(total * heads.value * 128);
            device.run_shared(
                "delta_chunk_prepare_128",
                [piece.div_ceil(CHUNK), heads.value, 4],
                128,
                87_808,
                &[
                    Arg::Address(part(|rows| &rows.qkv, heads.channels())),
                    Arg::Address(part(|rows| &rows.b, heads.value)),
                    Arg::Address(part(|rows| &rows.a, heads.value)),
                    Arg::Address(rates),
                    Arg::Address(biases),
                    Arg::Address(starts),
                    Arg::Address(scratch),
                    Arg::Int(heads.channels() as i32),
                    Arg::Int(heads.key as i32),
                    Arg::Int(heads.value as i32),
                ],
            );
            device.run_shared(
                "delta_chunk_scan_128",
                [512 / block as usize, heads.value, 4],
                block,
                24_576 * block / 128,
                &[
                    Arg::Address(scratch),
                    Arg::Address(out),
                    Arg::Address(addresses),
                    Arg::Long(OFFSET as i64),
                    Arg::Address(starts),
                    Arg::Int(heads.value as i32),
                    Arg::Int(TAIL as i32),
                ],
            );
            let mut read = Vec::new();
            for s in 0..4 {
                let width = heads.value * 128;
                let (out, states) = &expected[s];
                read.extend(&out[done[s] * width..][..rows[s] * width]);
                done[s] += rows[s];
                let found: Vec<f32> = device.get(slots[s].slot, OFFSET + TAIL + size + 1);
                assert_eq!(found[..OFFSET + TAIL], [5.0; OFFSET + TAIL]);
                assert_eq!(found[OFFSET + TAIL + size], 6.0);
                let state = &states[done[s] - 1];
                let off = worst(&found[OFFSET + TAIL..][..size], state) / scale(state);
                assert!(off < MOST, "state {s}, pieces of {piece}: {off}");
            }
            let found: Vec<f32> = device.get(out, total * heads.value * 128);
            let off = worst(&found, &read) / scale(&read);
            assert!(off < MOST, "pieces of {piece}: {off}");
        }
    }
}
