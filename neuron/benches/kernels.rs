//! Kernels alone, against what memory and processor give: `cargo bench -p neuron`.

#![allow(missing_docs)] // criterion's macros make items of their own

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use neuron::kernels::causal_conv::causal_conv;
use neuron::kernels::delta_rule::{Heads, delta_rule};
use neuron::kernels::linear::{Processor, multiply};
use neuron::quant::{Format, Matrix};
use std::hint::black_box;

/// Inputs of projections of the 0.8B shape.
const WIDTH: usize = 1024;

/// Numbers between −1 and 1 that repeat after a while.
fn numbers(count: usize) -> Vec<f32> {
    (0..count)
        .map(|at| (at * 7919 % 2003) as f32 / 1001.5 - 1.0)
        .collect()
}

fn matrix(format: Format, rows: usize) -> Matrix {
    let values = numbers(WIDTH + rows);
    let row = |row: usize, out: &mut [f32]| out.copy_from_slice(&values[row..row + WIDTH]);
    Matrix::from_rows(format, rows, WIDTH, &row, |_| {})
        .expect("numbers this small fit every format")
}

/// Multiplications a second, with a matrix that mostly stays in the caches.
fn projections(criterion: &mut Criterion) {
    const OUT: usize = 16 * 1024;
    for processor in Processor::available().rev() {
        let mut group = criterion.benchmark_group(format!("linear/{processor:?}"));
        group.sample_size(10);
        for format in Format::ALL {
            let weight = matrix(format, OUT);
            for rows in [1, 2, 8, 64, 512] {
                let x = numbers(rows * WIDTH);
                group.throughput(Throughput::Elements((rows * WIDTH * OUT) as u64));
                let id = BenchmarkId::new(format.as_str(), rows);
                group.bench_with_input(id, &x, |bencher, x| {
                    bencher.iter(|| multiply(black_box(x), rows, [&weight], processor));
                });
            }
        }
        group.finish();
    }
}

/// Bytes a second of weights that come from memory, for one row.
fn streams(criterion: &mut Criterion) {
    const OUT: usize = 128 * 1024;
    let fastest = Processor::available()
        .next_back()
        .expect("every processor is of some kind");
    let mut group = criterion.benchmark_group("stream");
    group.sample_size(20);
    let x = numbers(WIDTH);
    for format in [Format::F16, Format::Q8_0, Format::Q6K, Format::Q4K] {
        let weight = matrix(format, OUT);
        group.throughput(Throughput::Bytes(weight.bytes()));
        group.bench_function(format.as_str(), |bencher| {
            bencher.iter(|| multiply(black_box(&x), 1, [&weight], fastest));
        });
    }
    group.finish();
}

/// Tokens a second of a layer of the 0.8B shape.
fn recurrent(criterion: &mut Criterion) {
    const HEADS: Heads = Heads {
        key: 16,
        value: 16,
        key_dim: 128,
        value_dim: 128,
    };
    const TAPS: usize = 4;
    let channels = HEADS.channels();
    let mut group = criterion.benchmark_group("recurrent");
    for rows in [1, 512] {
        let (qkv, gates) = (numbers(rows * channels), numbers(rows * HEADS.value));
        let decay: Vec<f32> = gates.iter().map(|gate| -gate.abs()).collect();
        let mut state = vec![0.0; HEADS.value * HEADS.key_dim * HEADS.value_dim];
        group.throughput(Throughput::Elements(rows as u64));
        group.bench_function(BenchmarkId::new("delta_rule", rows), |bencher| {
            bencher
                .iter(|| delta_rule(black_box(&qkv), &decay, &gates, &mut state, &mut [], HEADS));
        });
        let weight = numbers(TAPS * channels);
        let mut tail = vec![0.0; (TAPS - 1) * channels];
        group.bench_function(BenchmarkId::new("causal_conv", rows), |bencher| {
            bencher.iter(|| causal_conv(black_box(&qkv), &weight, &mut tail, channels));
        });
    }
    group.finish();
}

criterion_group!(benches, projections, streams, recurrent);
criterion_main!(benches);
