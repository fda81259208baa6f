//! Kernels alone, against what memory and processor give: `cargo bench -p neuron`. The run ends with a table of how near each
//! kernel is to the nearer of both limits; shapes are those of the 0.8B model.

use candle_core::{Device, Tensor};
use criterion::Criterion;
use neuron::kernels::attention::{Cache, attention};
use neuron::kernels::causal_conv::causal_conv;
use neuron::kernels::choose::{Pick, Rule};
use neuron::kernels::delta_rule::{Heads, delta_rule};
use neuron::kernels::linear::{Processor, multiply};
use neuron::kernels::norm::{gated_rms_norm, rms_norm};
use neuron::kernels::peaks::{self, Peaks, read_bandwidth};
use neuron::kernels::rows::{Place, Rows, Vector, add_rms_norm};
use neuron::kernels::{add_scaled, gate, swiglu};
use neuron::memory::pool::{BLOCK, Block, KvPool, KvShape};
use neuron::model::layers::rope::RotaryEmbedding;
use neuron::quant::{Format, Matrix};
use std::hint::black_box;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Memory is taken and given back as where the kernels are at home.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Inputs of projections, and what norms are over.
const WIDTH: usize = 1024;
/// Width of the feed-forward block.
const MLP: usize = 3584;
/// Entries of the vocabulary.
const VOCABULARY: usize = 248_320;
/// Query heads, heads with keys and values, and their width.
const HEADS: usize = 8;
const KV_HEADS: usize = 2;
const HEAD_DIM: usize = 256;
/// Of each head so many dimensions turn.
const ROTATED: usize = 64;
/// The heads of the gated delta net.
const DELTA: Heads = Heads {
    key: 16,
    value: 16,
    key_dim: 128,
    value_dim: 128,
};
/// Tokens that its convolution sees.
const TAPS: usize = 4;
const EPS: f32 = 1e-6;

/// Multiplications of an exponential and of `silu`, as they are computed here; a division counts as one.
const EXP: usize = 11;
const SILU: usize = EXP + 2;

/// Measurements of a kernel; the median counts.
const SAMPLES: usize = 10;
/// Numbers that no cache has room for: half a gigabyte.
const MORE_THAN_CACHES: usize = 1 << 27;
/// How often limits are measured; the best counts.
const ROUNDS: usize = 5;

/// What a call of a kernel cannot do without.
struct Needs {
    /// Numbers of f32 that it reads, and that it writes, each counted once.
    numbers: usize,
    /// Bytes of what is not in f32.
    others: usize,
    /// Of the numbers that it writes, those that lie where it has read them.
    in_place: usize,
    multiplications: usize,
    /// Whether it may multiply bytes.
    of_bytes: bool,
}

impl Needs {
    fn new(numbers: usize, multiplications: usize) -> Self {
        Self {
            numbers,
            others: 0,
            in_place: 0,
            multiplications,
            of_bytes: false,
        }
    }

    fn in_place(self, in_place: usize) -> Self {
        Self { in_place, ..self }
    }
}

struct Bench {
    criterion: Criterion,
    peaks: Peaks,
    /// Read to see how fast that goes.
    numbers: Vec<f32>,
    /// Of the table.
    lines: Vec<String>,
}

impl Bench {
    /// Measures `call`, and beside it how fast as much memory is read: from caches where it fits there. What memory gives changes
    /// from minute to minute where others use it too.
    fn kernel<T>(&mut self, name: &str, needs: &Needs, mut call: impl FnMut() -> T) {
        let mut samples = Vec::new();
        self.criterion.bench_function(name, |bencher| {
            bencher.iter_custom(|count| {
                let began = Instant::now();
                for _ in 0..count {
                    black_box(call());
                }
                let took = began.elapsed();
                samples.push(took.as_secs_f64() / count as f64);
                took
            });
        });
        // those before warmed up; where there are only few, nothing is measured
        let Some(first) = samples.len().checked_sub(SAMPLES) else {
            return;
        };
        let samples = &mut samples[first..];
        samples.sort_by(f64::total_cmp);
        let seconds = samples[SAMPLES / 2];

        let bytes = size_of::<f32>() * needs.numbers + needs.others;
        let held = bytes.div_ceil(size_of::<f32>()) - needs.in_place;
        let read = held.min(MORE_THAN_CACHES);
        let bandwidth = read_bandwidth(&self.numbers[..read], ROUNDS);
        let (rate, of) = if needs.of_bytes {
            (self.peaks.byte_rate, "bytes")
        } else {
            (self.peaks.f32_rate, "f32")
        };
        let (bytes, multiplications) = (bytes as f64, needs.multiplications as f64);
        let (reading, multiplying) = (bytes / bandwidth, multiplications / rate);
        let limit = if reading > multiplying {
            format!("reads {:.0} GB/s", bandwidth / 1e9)
        } else {
            format!("{of} {:.0} G/s", rate / 1e9)
        };
        self.lines.push(format!(
            "| {name} | {:.1?} | {:.1} | {:.1} | {limit} | {:.0} % |",
            Duration::from_secs_f64(seconds),
            bytes / seconds / 1e9,
            multiplications / seconds / 1e9,
            100.0 * reading.max(multiplying) / seconds
        ));
    }
}

/// Numbers between −1 and 1 that repeat after a while.
fn numbers(count: usize) -> Vec<f32> {
    (0..count)
        .map(|at| (at * 7919 % 2003) as f32 / 1001.5 - 1.0)
        .collect()
}

fn tensor(rows: usize, width: usize) -> Tensor {
    Tensor::from_vec(numbers(rows * width), (rows, width), &Device::Cpu).expect("as many numbers")
}

fn matrix(format: Format, rows: usize) -> Matrix {
    let values = numbers(WIDTH + rows);
    let row = |row: usize, out: &mut [f32]| out.copy_from_slice(&values[row..row + WIDTH]);
    Matrix::from_rows(format, rows, WIDTH, &row, |_| {})
        .expect("numbers this small fit every format")
}

fn product(bench: &mut Bench, name: &str, weight: &Matrix, rows: usize, processor: Processor) {
    let x = numbers(rows * WIDTH);
    let needs = Needs {
        others: weight.bytes() as usize,
        of_bytes: !matches!(weight.format(), Format::F32 | Format::F16 | Format::Bf16),
        ..Needs::new(rows * (WIDTH + weight.rows()), rows * WIDTH * weight.rows())
    };
    bench.kernel(name, &needs, || {
        multiply(black_box(&x), rows, [weight], processor)
    });
}

/// Products with a matrix that mostly stays in the caches.
fn projections(bench: &mut Bench) {
    for processor in Processor::available().rev() {
        for format in Format::ALL {
            let weight = matrix(format, 16 * 1024);
            for rows in [1, 2, 8, 64, 512] {
                let name = format!("linear/{processor:?}/{}/{rows}", format.as_str());
                product(bench, &name, &weight, rows, processor);
            }
        }
    }
}

/// Products of one row with weights that come from memory.
fn streams(bench: &mut Bench) {
    let fastest = Processor::available()
        .next_back()
        .expect("every processor is of some kind");
    for format in [Format::F16, Format::Q8_0, Format::Q6K, Format::Q4K] {
        let weight = matrix(format, 128 * 1024);
        let name = format!("stream/{}", format.as_str());
        product(bench, &name, &weight, 1, fastest);
    }
}

/// The keys and values of a sequence of `len` tokens.
fn keys_and_values(pool: &KvPool, len: usize) -> Vec<Arc<Block>> {
    let all = numbers(len + HEAD_DIM);
    let mut blocks: Vec<_> = (0..KvShape::blocks(len))
        .map(|_| pool.take().expect("the pool has no bound"))
        .collect();
    for (at, key) in all.windows(HEAD_DIM).take(len).enumerate() {
        let block = Arc::get_mut(&mut blocks[at / BLOCK]).expect("nobody else holds it");
        for head in 0..KV_HEADS {
            block.put((0, head), at % BLOCK, key, &all[..HEAD_DIM]);
        }
    }
    blocks
}

/// The last `rows` tokens of some sequences, one after the other as a model does.
fn attentions(bench: &mut Bench) {
    let pool = KvPool::new(KvShape {
        layers: 1,
        heads: KV_HEADS,
        dim: HEAD_DIM,
    });
    for (name, sequences, rows, before) in [
        ("decode", 1, 1, 512),
        ("decode", 1, 1, 4096),
        ("decode", 1, 1, 32_768),
        ("decode of 8", 8, 1, 512),
        ("decode of 8", 8, 1, 4096),
        ("prefill of 512", 1, 512, 0),
        ("prefill of 512", 1, 512, 4096),
    ] {
        let len = before + rows;
        let all: Vec<_> = (0..sequences)
            .map(|_| keys_and_values(&pool, len))
            .collect();
        let queries = numbers(rows * HEADS * HEAD_DIM);
        let seen = rows * before + rows * (rows + 1) / 2; // by all rows of a head
        let needs = Needs::new(
            sequences * 2 * (len * KV_HEADS * HEAD_DIM + queries.len()),
            sequences * HEADS * seen * (2 * HEAD_DIM + EXP),
        );
        bench.kernel(&format!("attention/{name}/{before}"), &needs, || {
            for blocks in &all {
                let cache = Cache {
                    blocks,
                    layer: 0,
                    len,
                    kv_heads: KV_HEADS,
                };
                black_box(attention(black_box(&queries), cache, HEADS, HEAD_DIM));
            }
        });
    }
}

/// The recurrent part of a gated delta net.
fn recurrent(bench: &mut Bench) {
    let channels = DELTA.channels();
    let (value, size) = (DELTA.value, DELTA.key_dim * DELTA.value_dim);
    for rows in [1, 512] {
        let (qkv, gates) = (numbers(rows * channels), numbers(rows * value));
        let decay: Vec<f32> = gates.iter().map(|gate| -gate.abs()).collect();
        let mut state = vec![0.0; value * size];
        let out = rows * value * DELTA.value_dim;
        // S ← e^g S, Sᵀk, S + k δᵀ, Sᵀq
        let needs = Needs::new(
            2 * state.len() + qkv.len() + 2 * gates.len() + out,
            4 * rows * state.len(),
        )
        .in_place(state.len());
        bench.kernel(&format!("delta_rule/{rows}"), &needs, || {
            delta_rule(black_box(&qkv), &decay, &gates, &mut state, &mut [], DELTA)
        });
        let weight = numbers(TAPS * channels);
        let mut tail = vec![0.0; (TAPS - 1) * channels];
        let needs = Needs::new(
            2 * qkv.len() + weight.len() + 2 * tail.len(),
            qkv.len() * (TAPS + SILU),
        );
        bench.kernel(&format!("causal_conv/{rows}"), &needs, || {
            causal_conv(black_box(&qkv), &weight, &mut tail, channels)
        });
        let (mut x, z) = (numbers(out), numbers(out));
        let needs = Needs::new(3 * out, out * (4 + SILU)).in_place(out);
        bench.kernel(&format!("gated_rms_norm/{rows}"), &needs, || {
            gated_rms_norm(black_box(&mut x), &z, &weight[..DELTA.value_dim], EPS);
        });
    }
}

/// What is done to each number, to rows and to heads.
fn rows_alone(bench: &mut Bench) {
    let turning = RotaryEmbedding::new(ROTATED, 1e7);
    for rows in [1, 512] {
        let hidden = rows * WIDTH;
        let weight = vec![1.0; WIDTH];
        let mut x = numbers(hidden);
        bench.kernel(
            &format!("rms_norm/{rows}"),
            &Needs::new(2 * hidden, 3 * hidden).in_place(hidden),
            || rms_norm(black_box(&mut x), &weight, EPS),
        );
        let scale = Vector::new(weight, &Place::Cpu).expect("there is memory");
        let (mut h, x) = (
            Rows::Host(tensor(rows, WIDTH)),
            Rows::Host(tensor(rows, WIDTH)),
        );
        bench.kernel(
            &format!("add_rms_norm/{rows}"),
            &Needs::new(4 * hidden, 3 * hidden),
            || add_rms_norm(&mut h, black_box(&x), &scale, EPS),
        );
        let (x, mut sum) = (numbers(hidden), numbers(hidden));
        bench.kernel(
            &format!("add_scaled/{rows}"),
            &Needs::new(3 * hidden, hidden).in_place(hidden),
            || add_scaled(black_box(&mut sum), 0.5, &x),
        );
        let (gates, up) = (tensor(rows, MLP), tensor(rows, MLP));
        bench.kernel(
            &format!("swiglu/{rows}"),
            &Needs::new(3 * rows * MLP, rows * MLP * (SILU + 1)),
            || swiglu(black_box(&gates), &up),
        );
        let heads = rows * HEADS * HEAD_DIM;
        // gates that are open, or x would come to nothing
        let (mut x, gates) = (numbers(heads), vec![100.0; heads]);
        bench.kernel(
            &format!("gate/{rows}"),
            &Needs::new(3 * heads, heads * SILU).in_place(heads),
            || gate(black_box(&mut x), &gates),
        );
        let turned = rows * HEADS * ROTATED;
        bench.kernel(
            &format!("rope/{rows}"),
            &Needs::new(2 * turned, 2 * turned).in_place(turned),
            || {
                for (position, heads) in x.chunks_exact_mut(HEADS * HEAD_DIM).enumerate() {
                    turning.rotate(black_box(heads), HEAD_DIM, position);
                }
            },
        );
        for format in [Format::Bf16, Format::Q8_0] {
            let table = matrix(format, 32 * 1024);
            let needs = Needs {
                others: table.bytes() as usize / table.rows() * rows,
                ..Needs::new(hidden, hidden)
            };
            let name = format!("decode_row/{}/{rows}", format.as_str());
            let mut vector = numbers(hidden);
            bench.kernel(&name, &needs, || {
                for (at, vector) in vector.chunks_exact_mut(WIDTH).enumerate() {
                    table.decode_row(black_box(at * 7919 % table.rows()), vector);
                }
            });
        }
    }
    let mut logits: Vec<f32> = numbers(VOCABULARY).iter().map(|x| 12.0 * x).collect();
    for (name, pick) in [
        ("likeliest", Pick::LIKELIEST),
        ("by chance", Pick::by_chance(1.0, 0, 1.0, 0.0, 1 << 63)),
        (
            "top_k 20, top_p 0.95",
            Pick::by_chance(0.7, 20, 0.95, 0.0, 1 << 63),
        ),
    ] {
        let rule = Rule {
            pick,
            ..Rule::likeliest()
        };
        bench.kernel(
            &format!("choose/{name}"),
            &Needs::new(VOCABULARY, 0),
            || rule.choose(black_box(&mut logits)),
        );
    }
}

fn main() {
    let numbers = peaks::numbers(MORE_THAN_CACHES);
    let from_memory = read_bandwidth(&numbers, ROUNDS);
    let mut bench = Bench {
        criterion: Criterion::default()
            .sample_size(SAMPLES)
            .configure_from_args(),
        peaks: Peaks::measure(ROUNDS),
        numbers,
        lines: Vec::new(),
    };
    for kernels in [projections, streams, attentions, recurrent, rows_alone] {
        kernels(&mut bench);
    }
    bench.criterion.final_summary();
    let Peaks {
        f32_rate,
        byte_rate,
    } = bench.peaks;
    println!(
        "\n{} threads read {:.1} GB/s from memory, and multiply {:.1} G/s in f32 and {:.1} G/s in bytes.\n",
        rayon::current_num_threads(),
        from_memory / 1e9,
        f32_rate / 1e9,
        byte_rate / 1e9
    );
    println!("| kernel | time | GB/s | G multiplications/s | limit | of it |");
    println!("|---|--:|--:|--:|--:|--:|");
    println!("{}", bench.lines.join("\n"));
}
