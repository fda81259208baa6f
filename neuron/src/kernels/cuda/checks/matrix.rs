//! Kernels over matrices of weights, in every format, against products in f64.

use super::{Device, worst};
use crate::gpu::Arg;
use crate::kernels::testing::numbers;
use crate::quant::Unit;
use crate::quant::k_quants::{Q4K, Q5K, Q6K};
use half::{bf16, f16};

/// Widths that fill neither units nor stretches of x, and one longer than a stretch.
const ODD: &[usize] = &[1, 7, 515, 2048, 8200];
const FORMATS: &[(&str, &[usize])] = &[
    ("f32", ODD),
    ("bf16", ODD),
    ("f16", ODD),
    ("q8_0", &[32, 96, 2080, 8224]),
    ("fp8", &[128, 200, 1044, 8300]),
    ("q4_k", &[256, 768, 8448]),
    ("q5_k", &[256, 768, 8448]),
    ("q6_k", &[256, 768, 8448]),
];

/// A matrix as the device has it, and its numbers.
struct Matrix {
    bytes: Vec<u8>,
    numbers: Vec<f32>,
}

fn bytes(seed: u64, count: usize) -> Vec<u8> {
    let whole = |x: f32| (x * 128.0).floor() as i8 as u8;
    numbers(seed, count).into_iter().map(whole).collect()
}

fn scale(seed: u64) -> f16 {
    f16::from_f32(0.002 + 0.001 * numbers(seed, 1)[0])
}

fn blocks<U: Unit>(seed: u64, count: usize, scales: &[usize]) -> Matrix {
    let mut bytes = bytes(seed + 1, count / U::LEN * U::BYTES);
    let mut numbers = vec![0.0; count];
    let blocks = bytes.chunks_exact_mut(U::BYTES);
    for (i, (block, numbers)) in blocks.zip(numbers.chunks_exact_mut(U::LEN)).enumerate() {
        for at in scales {
            block[*at..at + 2].copy_from_slice(&scale((i + at) as u64).to_le_bytes());
        }
        U::read(block).decode(numbers);
    }
    Matrix { bytes, numbers }
}

fn e4m3(byte: u8) -> f32 {
    let (exponent, fraction) = (i32::from(byte >> 3 & 15), f32::from(byte & 7) / 8.0);
    let size = match exponent {
        0 => fraction * 2f32.powi(-6),
        _ => (1.0 + fraction) * 2f32.powi(exponent - 7),
    };
    if byte >> 7 == 1 { -size } else { size }
}

/// Each `seed` has numbers of its own.
fn matrix(format: &str, n: usize, k: usize, seed: u64) -> Matrix {
    let plain = numbers(seed + 2, n * k);
    match format {
        "f32" => Matrix {
            bytes: bytemuck::cast_slice(&plain).to_vec(),
            numbers: plain,
        },
        "bf16" => {
            let narrow: Vec<bf16> = plain.iter().map(|x| bf16::from_f32(*x)).collect();
            Matrix {
                bytes: narrow.iter().flat_map(|x| x.to_le_bytes()).collect(),
                numbers: narrow.iter().map(|x| x.to_f32()).collect(),
            }
        }
        "f16" => {
            // the first is below what f16 has with all its digits
            let narrow = plain.iter().enumerate();
            let narrow: Vec<f16> = narrow
                .map(|(i, x)| f16::from_f32(if i == 0 { 1e-6 } else { *x }))
                .collect();
            Matrix {
                bytes: narrow.iter().flat_map(|x| x.to_le_bytes()).collect(),
                numbers: narrow.iter().map(|x| x.to_f32()).collect(),
            }
        }
        "q8_0" => {
            let mut bytes = bytes(seed + 3, n * k);
            let scales: Vec<f16> = (0..n * k / 32).map(|i| scale(i as u64)).collect();
            let values = bytes.iter().enumerate();
            let numbers = values
                .map(|(i, value)| f32::from(*value as i8) * scales[i / 32].to_f32())
                .collect();
            bytes.extend(scales.iter().flat_map(|scale| scale.to_le_bytes()));
            Matrix { bytes, numbers }
        }
        "fp8" => {
            let mut bytes = bytes(seed + 4, n * k);
            // the two that are no numbers do not occur in weights
            let numeric = |byte: &mut u8| *byte ^= u8::from(*byte & 0x7f == 0x7f);
            bytes.iter_mut().for_each(numeric);
            let across = k.div_ceil(128);
            let scales = numbers(seed + 5, n.div_ceil(128) * across);
            let values = bytes.iter().enumerate();
            let numbers = values
                .map(|(i, byte)| e4m3(*byte) * scales[i / k / 128 * across + i % k / 128])
                .collect();
            bytes.extend(scales.iter().flat_map(|scale| scale.to_le_bytes()));
            Matrix { bytes, numbers }
        }
        "q4_k" => blocks::<Q4K>(seed, n * k, &[0, 2]),
        "q5_k" => blocks::<Q5K>(seed, n * k, &[0, 2]),
        _ => blocks::<Q6K>(seed, n * k, &[208]),
    }
}

/// The kernels' names are known when this is compiled, as everywhere.
fn named(kind: &str, format: &str, rows: &str) -> &'static str {
    format!("{kind}_{format}{rows}").leak()
}

pub(super) fn products_with_few_rows(device: &Device) {
    for (format, widths) in FORMATS {
        for &k in *widths {
            for n in [4, 36, 133] {
                if *format == "fp8" && (n * k) % 4 != 0 || n == 133 && k > 2080 {
                    continue;
                }
                let w = matrix(format, n, k, 0);
                let weights = device.put(&w.bytes);
                for rows in [1, 2, 4, 8] {
                    let x = numbers(6, rows * k);
                    let at = device.put(&x);
                    let (mut expected, mut size) = (Vec::new(), Vec::new());
                    for x in x.chunks_exact(k) {
                        for w in w.numbers.chunks_exact(k) {
                            let products =
                                x.iter().zip(w).map(|(x, w)| f64::from(*x) * f64::from(*w));
                            size.push(products.clone().map(|x| x * x).sum::<f64>().sqrt());
                            expected.push(products.sum());
                        }
                    }
                    let largest = size.iter().copied().fold(0.0, f64::max);
                    let kernel = named("gemv", format, &format!("_{rows}"));
                    // one block does all, a warp a pair, all warps of a block one pair, more than there is to do
                    for grid in [1, n.div_ceil(16), n.div_ceil(2), n] {
                        let y = device.room(rows * n);
                        let [n, k] = [n, k].map(|size| Arg::Int(size as i32));
                        let [w, x] = [weights, at].map(Arg::Address);
                        let mut args = vec![w, x, Arg::Address(y), n, k];
                        if matches!(rows, 1 | 4) {
                            // nothing is chosen
                            args.extend([Arg::Address(0); 2]);
                            args.extend([Arg::Int(0); 3]);
                        }
                        device.run(kernel, [grid, 1, 1], 256, &args);
                        let found = worst(&device.get(y, expected.len()), &expected) / largest;
                        assert!(found < 1e-5, "{kernel}, {n:?}, {k:?}, grid {grid}: {found}");
                    }
                }
            }
        }
    }
}

/// Gates and ups of some experts: each visit meets the matrices of its own, in groups of different sizes, and has the same
/// numbers to the bit whoever stands beside it.
pub(super) fn products_with_chosen_matrices(device: &Device) {
    const EXPERTS: usize = 5;
    const PARTS: usize = 2;
    const ROWS: usize = 3;
    const UNTOUCHED: f32 = -7.0;
    for (format, widths) in FORMATS {
        for &k in &widths[..widths.len() - 1] {
            let n = 12;
            let matrices = (0..PARTS * EXPERTS).map(|at| matrix(format, n, k, 10 * at as u64));
            let matrices: Vec<Matrix> = matrices.collect();
            let mut table: Vec<u64> = matrices.iter().map(|w| device.put(&w.bytes)).collect();
            table[EXPERTS + 3] = 0; // is of another format
            let table = device.put(&table);
            for (most, share) in [(1, 2), (4, 2), (4, 1)] {
                let visits = ROWS * 2;
                let x = numbers(6, visits / share * k);
                // experts 4, 0 and 3 are gone to, by four, one and one; the last two groups are none
                let sorted = [5, 0, 1, 2, 4, 3_i32];
                let of_four = [[0, 0, 1, 0], [3, 1, 1, 0], [4, 2, 4, 0], [0; 4], [0; 4]];
                let alone = [0, 3, 4, 4, 4, 4].into_iter().zip(0..);
                let alone: Vec<[i32; 4]> = alone.map(|(e, at)| [e, at, 1, 0]).collect();
                let mut outcomes = Vec::new();
                for groups in [&of_four[..], &alone] {
                    if groups.iter().any(|[_, _, count, _]| *count > most) {
                        continue;
                    }
                    let y = device.put(&vec![UNTOUCHED; PARTS * visits * n]);
                    let mut args = [table, device.put(&x), y].map(Arg::Address).to_vec();
                    args.extend([n, k].map(|size| Arg::Int(size as i32)));
                    args.extend([device.put(groups), device.put(&sorted)].map(Arg::Address));
                    args.extend([visits, share, EXPERTS].map(|size| Arg::Int(size as i32)));
                    let kernel = named("gemv", format, &format!("_{most}"));
                    device.run(kernel, [2, groups.len(), PARTS], 256, &args);
                    outcomes.push(device.get::<f32>(y, PARTS * visits * n));
                }
                let expert = |visit: usize| match sorted.iter().position(|v| *v as usize == visit) {
                    Some(0) => 0,
                    Some(1) => 3,
                    _ => 4,
                };
                let mut expected = Vec::new();
                let mut largest = 0.0f64;
                for part in 0..PARTS {
                    for visit in 0..visits {
                        let x = &x[visit / share * k..][..k];
                        let w = &matrices[part * EXPERTS + expert(visit)].numbers;
                        for w in w.chunks_exact(k) {
                            if (part, expert(visit)) == (1, 3) {
                                expected.push(f64::from(UNTOUCHED));
                                continue;
                            }
                            let products =
                                x.iter().zip(w).map(|(x, w)| f64::from(*x) * f64::from(*w));
                            let size = products.clone().map(|x| x * x).sum::<f64>().sqrt();
                            largest = largest.max(size);
                            expected.push(products.sum());
                        }
                    }
                }
                for outcome in &outcomes {
                    let found = worst(outcome, &expected) / largest;
                    assert!(found < 1e-5, "{format}, {k}, by {most}: {found}");
                    assert_eq!(outcome, &outcomes[0], "{format}, {k}, by {most}");
                }
            }
        }
    }
}

pub(super) fn rows_of_a_part_of_the_vocabulary(device: &Device) {
    const FIRST: usize = 3;
    for (format, widths) in FORMATS {
        for &k in *widths {
            let rows = 8;
            let w = matrix(format, rows, k, 0);
            let ids = [FIRST, 0, FIRST + rows - 1, FIRST + rows, FIRST - 1, 5, 5];
            let given: Vec<u32> = ids.iter().map(|id| *id as u32).collect();
            let [given, table] = [device.put(&given), device.put(&w.bytes)];
            let y = device.room(ids.len() * k);
            let mut args = [given, table, y].map(Arg::Address).to_vec();
            args.extend([k, FIRST, rows].map(|size| Arg::Int(size as i32)));
            device.run(named("embed", format, ""), [ids.len(), 1, 1], 64, &args);
            let expected: Vec<f64> = ids
                .iter()
                .flat_map(|id| {
                    let own = (FIRST..FIRST + rows).contains(id).then(|| id - FIRST);
                    let row = own.map(|row| &w.numbers[row * k..][..k]);
                    (0..k).map(move |i| row.map_or(0.0, |row| f64::from(row[i])))
                })
                .collect();
            let largest = expected.iter().fold(0.0, |top: f64, x| top.max(x.abs()));
            let found = worst(&device.get(y, expected.len()), &expected) / largest;
            assert!(found < 1e-6, "{format}, {k}: {found}");
        }
    }
}

/// Whether each is the nearest bf16, or next to it where a last rounding before that decides.
fn assert_rounded(found: &[bf16], numbers: &[f32], what: &str) {
    assert_eq!(found.len(), numbers.len());
    let largest = numbers.iter().fold(0.0, |top: f32, x| top.max(x.abs()));
    for (found, x) in found.iter().zip(numbers) {
        let error = (found.to_f32() - x).abs();
        assert!(
            error <= x.abs() / 255.0 + largest * 1e-6,
            "{what}: {found} for {x}"
        );
    }
}

pub(super) fn whole_matrices_and_rows_as_bf16(device: &Device) {
    for (format, widths) in FORMATS.iter().skip(2) {
        for &k in *widths {
            let n = 8;
            let w = matrix(format, n, k, 0);
            let [weights, out] = [device.put(&w.bytes), device.put(&vec![0xffff_u16; n * k])];
            let mut args = [weights, out].map(Arg::Address).to_vec();
            args.extend([n, k].map(|size| Arg::Int(size as i32)));
            device.run(named("widen", format, ""), [n, 1, 1], 64, &args);
            let found: Vec<u16> = device.get(out, n * k);
            let found: Vec<bf16> = found.into_iter().map(bf16::from_bits).collect();
            assert_rounded(&found, &w.numbers, &format!("{format}, {k}"));
        }
    }
    for count in [1, 3, 64, 1003] {
        let x = numbers(7, count);
        let [at, y] = [device.put(&x), device.put(&vec![0xffff_u16; count])];
        let mut args = [at, y].map(Arg::Address).to_vec();
        args.push(Arg::Long(count as i64));
        device.run("to_bf16", [3, 1, 1], 64, &args);
        let expected: Vec<u16> = x.iter().map(|x| bf16::from_f32(*x).to_bits()).collect();
        assert_eq!(device.get::<u16>(y, count), expected);
    }
}
