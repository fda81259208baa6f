//! Kernels alone, against what memory and processor give: `cargo bench -p neuron`.

#![allow(missing_docs)] // criterion's macros make items of their own

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use neuron::kernels::linear::{Processor, multiply};
use neuron::quant::{Format, Matrix};
use std::hint::black_box;

/// Numbers between −1 and 1 that repeat after a while.
fn numbers(count: usize) -> Vec<f32> {
    (0..count)
        .map(|at| (at * 7919 % 2003) as f32 / 1001.5 - 1.0)
        .collect()
}

fn matrix(format: Format, rows: usize, width: usize) -> Matrix {
    let values = numbers(width + rows);
    let row = |row: usize, out: &mut [f32]| out.copy_from_slice(&values[row..row + width]);
    Matrix::from_rows(format, rows, width, &row, |_| {})
        .expect("numbers this small fit every format")
}

/// Projections of the 0.8B shape: multiplications a second.
fn projections(criterion: &mut Criterion) {
    const WIDTH: usize = 1024;
    let out = std::env::var("OUT").map_or(16 * 1024, |o| o.parse().unwrap());
    for processor in Processor::available().into_iter().rev() {
        let mut group = criterion.benchmark_group(format!("linear/{processor:?}"));
        group.sample_size(10);
        for format in Format::ALL {
            let weight = matrix(format, out, WIDTH);
            for rows in [1, 2, 8, 64, 512] {
                let x = numbers(rows * WIDTH);
                group.throughput(Throughput::Elements((rows * WIDTH * out) as u64));
                let id = BenchmarkId::new(format.as_str(), rows);
                group.bench_with_input(id, &x, |bencher, x| {
                    bencher.iter(|| multiply(black_box(x), rows, [&weight], processor));
                });
            }
        }
        group.finish();
    }
}

criterion_group!(benches, projections);
criterion_main!(benches);
