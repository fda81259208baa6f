//! What this machine's processors and memory give at best, measured: the limits that figures of kernels are held against.
#![allow(unsafe_code)]

use super::pages::prefer_huge_pages;
use super::vector::{LANES, Vector, with_vectors};
#[cfg(target_arch = "x86_64")]
use super::{has_avx2, has_avx512};
#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;
use std::hint::black_box;
use std::time::Instant;

/// Sums that a thread works on side by side: as many as keep its multipliers busy, and stay in 16 registers with the factors.
const SUMS: usize = 12;
/// Products that each of them takes in.
const STEPS: usize = 1 << 19;
/// Vectors that are summed side by side as they are read.
const READ_TOGETHER: usize = 8;
/// Numbers that a measurement reads at least, so that waking threads does not count.
const LEAST_READ: usize = 1 << 24;

/// Numbers to be read, in the large pages that weights lie in.
#[must_use]
pub fn numbers(count: usize) -> Vec<f32> {
    let mut numbers = Vec::with_capacity(count);
    prefer_huge_pages(numbers.spare_capacity_mut());
    numbers.resize(count, 1.0);
    numbers
}

/// Bytes a second that all threads together read of `numbers`, the best of some rounds. Each thread has its own part and reads it
/// again and again, so that it comes from the caches where it has room there.
#[must_use]
pub fn read_bandwidth(numbers: &[f32], rounds: usize) -> f64 {
    let part = numbers.len().div_ceil(rayon::current_num_threads()).max(1);
    let passes = LEAST_READ.div_ceil(numbers.len().max(1));
    let seconds = best(rounds, |thread| {
        let own = numbers.chunks(part).nth(thread).unwrap_or(&[]);
        black_box(sum(own, passes));
    });
    (size_of_val(numbers) * passes) as f64 / seconds
}

/// Reads all of the numbers so many times, with one addition for each, so that reading is what takes time.
fn sum(numbers: &[f32], passes: usize) -> f32 {
    #[inline(always)]
    fn all<V: Vector>(numbers: &[f32], passes: usize) -> f32 {
        let mut sums = [V::splat(0.0); READ_TOGETHER];
        let mut rest = 0.0;
        for _ in 0..passes {
            let (vectors, last) = black_box(numbers).as_chunks::<LANES>();
            let (together, few) = vectors.as_chunks::<READ_TOGETHER>();
            for vectors in together {
                for (sum, vector) in sums.iter_mut().zip(vectors) {
                    *sum = sum.add(V::load(vector));
                }
            }
            rest += few.as_flattened().iter().chain(last).sum::<f32>();
        }
        rest + sums.iter().map(|sum| sum.sum()).sum::<f32>()
    }
    with_vectors!(all(numbers, passes))
}

/// Multiplications a second of all threads together.
#[derive(Debug, Clone, Copy)]
pub struct Peaks {
    /// Of f32, with an addition each.
    pub f32_rate: f64,
    /// Of bytes, by the instruction that multiplies most of them at once; where there is none they are multiplied as f32.
    pub byte_rate: f64,
}

impl Peaks {
    /// Measures; the best of some rounds counts.
    #[must_use]
    pub fn measure(rounds: usize) -> Self {
        let rate = |work: fn() -> usize| {
            let seconds = best(rounds, |_| {
                black_box(work());
            });
            (rayon::current_num_threads() * SUMS * STEPS * work()) as f64 / seconds
        };
        Self {
            f32_rate: rate(multiply_f32),
            byte_rate: rate(multiply_bytes),
        }
    }
}

/// Seconds that all threads take at best to do `work`, which is told the number of its thread.
fn best(rounds: usize, work: impl Fn(usize) + Sync) -> f64 {
    (0..rounds.max(1))
        .map(|_| {
            let began = Instant::now();
            rayon::broadcast(|thread| work(thread.index()));
            began.elapsed().as_secs_f64()
        })
        .fold(f64::INFINITY, f64::min)
}

/// Does `step` to sums that need not wait for each other.
#[inline(always)]
fn repeat<S: Copy>(start: S, step: impl Fn(S) -> S) {
    let mut sums = [start; SUMS];
    for _ in 0..STEPS {
        for sum in &mut sums {
            *sum = step(*sum);
        }
    }
    black_box(sums);
}

/// Returns how many products a step has.
fn multiply_f32() -> usize {
    #[inline(always)]
    fn any<V: Vector>() {
        let factor = V::splat(black_box(0.5));
        repeat(factor, |sum| sum.mul_add(factor, factor));
    }
    #[cfg(target_arch = "x86_64")]
    {
        #[target_feature(enable = "avx512f")]
        fn avx512() {
            let factor = _mm512_set1_ps(black_box(0.5));
            repeat(factor, |sum| _mm512_fmadd_ps(sum, factor, factor));
        }
        if has_avx512() {
            // SAFETY: the processor has what the function is compiled for
            unsafe { avx512() };
            return 16;
        }
    }
    with_vectors!(any());
    LANES
}

/// Returns how many products a step has.
fn multiply_bytes() -> usize {
    #[cfg(target_arch = "x86_64")]
    {
        #[target_feature(enable = "avx512f,avx512vnni")]
        fn avx512() {
            let factor = _mm512_set1_epi8(black_box(3));
            repeat(factor, |sum| _mm512_dpbusd_epi32(sum, factor, factor));
        }
        #[target_feature(enable = "avx2")]
        fn avx2() {
            // sums of two products stay in 16 bits: kernels have to add them up besides, which is not counted
            let factor = _mm256_set1_epi8(black_box(3));
            repeat(factor, |pairs| _mm256_maddubs_epi16(pairs, factor));
        }
        if has_avx512() {
            // SAFETY: the processor has what the function is compiled for
            unsafe { avx512() };
            return 64;
        }
        if has_avx2() {
            // SAFETY: as above
            unsafe { avx2() };
            return 32;
        }
    }
    multiply_f32()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_number_is_read_as_often_as_is_said() {
        for count in [0, 1, 8 * LANES + 3, 40 * LANES] {
            let numbers: Vec<f32> = (0..count as u16).map(f32::from).collect();
            let once = count * count.saturating_sub(1) / 2;
            for passes in 0..3 {
                assert_eq!(sum(&numbers, passes), (passes * once) as f32, "{count}");
            }
        }
    }
}
